// fprop and dgrad of 1x1 filters over planes in strict float32, of up to 16 products a sum, by FMA: memory bounds them.
// A thread has one pixel or four of a row, whose inputs stay in registers; a block's filters lie in shared memory.
#pragma once

#include "../core/few_depth.h"
#include "launch.h"

namespace conv2d_ext::few_depth {

constexpr int kThreads = kFewDepthThreads;

struct Params {
  float const *in, *w, *bias;
  float* out;
  int64_t in_n, in_c, out_n, out_c, w_out, w_in, bias_stride;
  int64_t pixels;  // of all images, in vectors
  int plane;       // in vectors
  int depth, outputs, share;
};

template <int V>
struct Vector;
template <>
struct Vector<1> {
  using Type = float;
};
template <>
struct Vector<4> {
  using Type = float4;
};

// depth: up to so many products. V: pixels of a thread.
template <int depth, int V>
__global__ void __launch_bounds__(kThreads) few_depth_kernel(__grid_constant__ Params const p) {
  using Pixels = typename Vector<V>::Type;
  __shared__ float4 filters[kFewDepthOutputs][depth / 4];
  __shared__ float bias[kFewDepthOutputs];
  int const first = int(blockIdx.y) * p.share, count = min(p.share, p.outputs - first);
  for (int i = int(threadIdx.x); i < count * depth; i += kThreads) {
    int const output = i / depth, d = i - output * depth;
    reinterpret_cast<float*>(filters)[i] = d < p.depth ? __ldg(p.w + (first + output) * p.w_out + d * p.w_in) : 0.f;
  }
  for (int i = int(threadIdx.x); i < count; i += kThreads)
    bias[i] = p.bias != nullptr ? __ldg(p.bias + (first + i) * p.bias_stride) : 0.f;
  int64_t const at = int64_t(blockIdx.x) * kThreads + threadIdx.x, n = at / p.plane;
  bool const exists = at < p.pixels;
  int64_t const pixel = (at - n * p.plane) * V;
  float v[depth][V];
#pragma unroll
  for (int d = 0; d < depth; ++d) {
    Pixels loaded{};
    if (exists && d < p.depth) loaded = __ldg(reinterpret_cast<Pixels const*>(p.in + n * p.in_n + d * p.in_c + pixel));
#pragma unroll
    for (int i = 0; i < V; ++i) v[d][i] = reinterpret_cast<float const*>(&loaded)[i];
  }
  __syncthreads();
  if (!exists) return;
  float* out = p.out + n * p.out_n + first * p.out_c + pixel;
#pragma unroll 2
  for (int output = 0; output < count; ++output, out += p.out_c) {
    float sums[V] = {};
#pragma unroll
    for (int d = 0; d < depth; d += 4) {
      float4 const w = filters[output][d / 4];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sums[i] += w.x * v[d][i], sums[i] += w.y * v[d + 1][i];
        sums[i] += w.z * v[d + 2][i], sums[i] += w.w * v[d + 3][i];
      }
    }
    Pixels stored;
#pragma unroll
    for (int i = 0; i < V; ++i) reinterpret_cast<float*>(&stored)[i] = sums[i] + bias[output];
    *reinterpret_cast<Pixels*>(out) = stored;
  }
}

template <Op op>
cudaError_t launch(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  int sm_count = 0;
  if (auto const error = count_sms(sm_count)) return error;
  FewDepth const f(op, problem);
  int64_t const vector = f.vector(problem);
  Params p{};
  p.in = static_cast<float const*>(args.a), p.w = static_cast<float const*>(args.b);
  p.bias = static_cast<float const*>(args.bias), p.bias_stride = args.bias_stride;
  p.out = static_cast<float*>(args.out);
  p.in_n = f.in.n, p.in_c = f.in.c, p.out_n = f.out.n, p.out_c = f.out.c, p.w_out = f.w_out, p.w_in = f.w_in;
  p.plane = int(problem.H * problem.W / vector), p.pixels = problem.N * p.plane;
  p.depth = int(f.depth), p.outputs = int(f.outputs), p.share = int(f.share(problem, sm_count));
  dim3 const grid(unsigned(f.blocks(problem)), unsigned(ceil_div(f.outputs, int64_t(p.share))));
  auto* const kernel = p.depth <= 8 ? (vector == 4 ? few_depth_kernel<8, 4> : few_depth_kernel<8, 1>)
                                    : (vector == 4 ? few_depth_kernel<16, 4> : few_depth_kernel<16, 1>);
  kernel<<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::few_depth

#define CONV2D_EXT_FEW_DEPTH_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) { return few_depth::launch<Op::op>(p, args, stream); }
