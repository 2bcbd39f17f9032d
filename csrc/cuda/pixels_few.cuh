// fprop and dgrad of 1x1 filters between few channels over NCHW, in place, in strict float32:
//   y[columns, pixels] = w[columns, channels] * x[channels, pixels]
// A warp computes 32 pixels of 32 filters at a time, by mma.sync of words split as in stem.cuh. Its lanes read pixels
// as vectors that are fragments already, for the order of the pixels is free; a later slab of filters finds them in L1.
// Filters stay in shared memory as fragments. Results that are not finite are made again from the operands.
#pragma once

#include "../core/pixels_few.h"
#include "stem.cuh"

namespace conv2d_ext::pixels_few {

using depthwise::Divisor;

struct Params {
  float const *in, *w, *bias;
  float* out;
  int64_t bias_stride, in_n, out_n, w_in, w_out;
  Divisor groups_of;  // of an image
  int in_c, out_c, groups, groups_of_image, pixels, depth, columns, steps, slabs;
};

__device__ inline float made_again(Params const& p, float const* in, int column) {
  float sum = 0;
#pragma unroll 1
  for (int k = 0; k < p.depth; ++k) sum = fmaf(in[k * p.in_c], p.w[column * p.w_out + k * p.w_in], sum);
  return sum + (p.bias != nullptr ? p.bias[column * p.bias_stride] : 0.0f);
}

inline constexpr int kGatherThreads = kFewWarps * 32;

__global__ void __launch_bounds__(kGatherThreads, 2) gather_pixels(__grid_constant__ Params const p) {
  extern __shared__ __align__(16) char dynamic[];
  float* const weights = reinterpret_cast<float*>(dynamic);  // [slab][step][half of the slab][lane][4]
  int const lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll 4
  for (int i = threadIdx.x; i < p.slabs * p.steps * 256; i += kGatherThreads) {
    int const e = i % 4, of = i / 4 % 32, half = i / 128 % 2, step = i / 256 % p.steps, slab = i / 256 / p.steps;
    int const column = slab * 32 + half * 16 + of / 4 + e % 2 * 8, k = step * 8 + of % 4 + e / 2 * 4;
    weights[i] = column < p.columns && k < p.depth ? p.w[column * p.w_out + k * p.w_in] : 0.0f;
  }
  __syncthreads();
  uint32_t const fragments = ptx::shared_address(dynamic) + lane * 16;
  bool const odd = t % 2 != 0;
#pragma unroll 1
  for (int group = int(blockIdx.x) * kFewWarps + int(threadIdx.x) / 32; group < p.groups;
       group += int(gridDim.x) * kFewWarps) {
    int const n = p.groups_of.quotient(group), first = (group - n * p.groups_of_image) * kFewGroup;
    float const* const in = p.in + n * p.in_n + first;
    float* const out = p.out + n * p.out_n + first;
    bool const exists = first + g * 4 < p.pixels;
    int const pixel = t / 2 * 16 + (odd ? 4 : 0);  // that this lane stores, and 8 further
#pragma unroll 1
    for (int slab = 0; slab < p.slabs; ++slab) {
      float acc[2][4][4] = {};
#pragma unroll 1
      for (int step = 0; step < p.steps; ++step) {
        float4 v[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int const k = step * 8 + i * 4 + t;
          v[i] = make_float4(0, 0, 0, 0);
          if (exists && k < p.depth) v[i] = __ldg(reinterpret_cast<float4 const*>(in + k * p.in_c + g * 4));
        }
        auto split = [](float x) { return stem::word_of<Split>(__float_as_uint(x)); };
        stem::Parts const x[4][2] = {{split(v[0].x), split(v[1].x)},
                                     {split(v[0].y), split(v[1].y)},
                                     {split(v[0].z), split(v[1].z)},
                                     {split(v[0].w), split(v[1].w)}};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          uint4 const four = ptx::ld_shared_v4(fragments + ((slab * p.steps + step) * 2 + m) * 512);
          auto part = [](uint32_t bits) { return stem::word_of<Split>(bits); };
          stem::Parts const w[4] = {part(four.x), part(four.y), part(four.z), part(four.w)};
#pragma unroll
          for (int j = 0; j < 4; ++j) stem::mma<Split>(acc[m][j], w[0], w[1], w[2], w[3], x[j][0], x[j][1]);
        }
      }
      float nothing[4] = {};  // NaN, if a sum is not finite
#pragma unroll
      for (int i = 0; i < 32; ++i) nothing[i % 4] += acc[i / 16][i / 4 % 4][i % 4] * 0.0f;
      bool const wrong = __any_sync(0xffffffffu, (nothing[0] + nothing[1]) + (nothing[2] + nothing[3]) != 0.0f) != 0;
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int const column = slab * 32 + m * 16 + half * 8 + g;
          float const bias = p.bias != nullptr && column < p.columns ? p.bias[column * p.bias_stride] : 0.0f;
          // A lane has pixels 8 t to 8 t + 7; neighbours exchange fours, so that two of them store 32 bytes together.
          float mine[4], other[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float const low = acc[m][j][half * 2] + bias, high = acc[m][j][half * 2 + 1] + bias;
            mine[j] = odd ? high : low;
            other[j] = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
          }
          float4 const a = make_float4(mine[0], mine[1], mine[2], mine[3]),
                       b = make_float4(other[0], other[1], other[2], other[3]);
          if (column >= p.columns) continue;
          float* const to = out + column * p.out_c + pixel;
          if (first + pixel < p.pixels) *reinterpret_cast<float4*>(to) = odd ? b : a;
          if (first + pixel + 8 < p.pixels) *reinterpret_cast<float4*>(to + 8) = odd ? a : b;
        }
      if (!wrong) continue;
      __syncwarp();
#pragma unroll 1
      for (int i = 0; i < 32; ++i) {
        int const column = slab * 32 + i;
        if (column >= p.columns || first + lane >= p.pixels) continue;
        float* const to = out + column * p.out_c + lane;
        if (!isfinite(*to)) *to = made_again(p, in + lane, column);
      }
    }
  }
}

// ---- host side

template <Op op>
cudaError_t launch_gather(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  constexpr bool forward = op == Op::fprop;
  Strides const &in = forward ? problem.x : problem.y, &out = forward ? problem.y : problem.x;
  Params p{};
  p.in = static_cast<float const*>(args.a), p.w = static_cast<float const*>(args.b);
  p.bias = static_cast<float const*>(args.bias), p.bias_stride = args.bias_stride,
  p.out = static_cast<float*>(args.out);
  p.in_n = in.n, p.in_c = int(in.c), p.out_n = out.n, p.out_c = int(out.c);
  p.w_in = forward ? problem.w.c : problem.w.n, p.w_out = forward ? problem.w.n : problem.w.c;
  p.depth = int(forward ? problem.C : problem.K), p.columns = int(forward ? problem.K : problem.C);
  p.pixels = int(problem.H * problem.W), p.groups_of_image = int(ceil_div(p.pixels, kFewGroup));
  p.groups_of = Divisor(uint32_t(p.groups_of_image)), p.groups = int(problem.N) * p.groups_of_image;
  p.steps = int(ceil_div(p.depth, 8)), p.slabs = int(ceil_div(p.columns, 32));
  int const bytes = p.slabs * p.steps * 1024;
  if (auto const error = cudaFuncSetAttribute(gather_pixels, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  int64_t const blocks = min64(ceil_div(p.groups, kFewWarps), 132 * 2);
  gather_pixels<<<unsigned(blocks), kGatherThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::pixels_few

#define CONV2D_EXT_PIXELS_FEW_INSTANCE(family, op, dtype, tm, tn, tk, variant)                                \
  namespace conv2d_ext {                                                                                      \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const& plan,           \
                                                                Arguments const& args, cudaStream_t stream) { \
    return pixels_few::launch_gather<Op::op>(p, plan, args, stream);                                          \
  }                                                                                                           \
  }
