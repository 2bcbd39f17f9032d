// 1x1 filters between few channels in channels_last, fprop and dgrad, of many pixels: memory's bandwidth is what such
// layers take.
//   out[m, n] = sum over k of a[m, k] * b[k, n]     m: pixels; n: filters (dgrad: channels); k: the other ones
//
// The filters lie in shared memory, of each result a line of what is summed over. A warp computes 16 pixels at a time by
// mma.sync: it loads all their channels as they lie, 16 bytes a thread, and those of its next pixels before it
// multiplies. The order of the sum and of the results is free, and is such that a thread's channels, its part of a
// filter and its results are 16 neighbouring bytes each. Nothing but the filters passes through shared memory.
#pragma once

#include "../core/pixels_any.h"
#include "fragments.cuh"
#include "launch.h"

namespace conv2d_ext::pixels_flow {

struct Params {
  void const* a;
  void const* w;
  void const* bias;
  void* out;
  int64_t a_step, w_step, out_step, bias_stride;  // elements
  int32_t M, N, depth;
  bool turned;  // the filters lie [k, n]
};

// Steps of 64 bytes of a pixel are what its four threads load at once; a slab of results is what they store.
template <class T, int steps>
struct Flow {
  static constexpr int vector = 16 / int(sizeof(T)), step = 4 * vector, fragments = vector / 2;
  static constexpr int threads = steps == 1 ? 896 : steps == 2 ? 768 : 384;
  static constexpr int pitch = 64 * (steps | 1);  // bytes of a line: eight threads' vectors meet every bank once
  static constexpr int bytes(int N) { return (N + step - 1) / step * step * (pitch + 4); }
};

template <class T>
__device__ inline uint32_t operand(uint32_t v) {
  if constexpr (sizeof(T) == 4)
    return ptx::cvt_rn_tf32(__uint_as_float(v));
  else
    return v;
}
template <class T>
__device__ inline uint4 operands(uint4 v) {
  return {operand<T>(v.x), operand<T>(v.y), operand<T>(v.z), operand<T>(v.w)};
}

// To lines [n, k], `lines` of them; zeros beyond the filters.
template <class T, int steps>
__device__ inline void copy_filters(Params const& p, uint32_t to, int lines) {
  using F = Flow<T, steps>;
  T const* const w = static_cast<T const*>(p.w);
  constexpr int depth = steps * F::step;
  if (!p.turned) {
    for (int i = int(threadIdx.x); i < lines * steps * 4; i += F::threads) {
      int const n = i / (steps * 4), k = i % (steps * 4) * F::vector;
      uint4 v{};
      if (n < p.N && k < p.depth) v = operands<T>(__ldg(reinterpret_cast<uint4 const*>(w + n * p.w_step + k)));
      ptx::st_shared_v4(to + n * F::pitch + k * int(sizeof(T)), v);
    }
  } else {
    for (int i = int(threadIdx.x); i < lines / F::vector * depth; i += F::threads) {
      int const n = i / depth * F::vector, k = i % depth;
      uint4 vector{};
      if (n < p.N && k < p.depth) vector = operands<T>(__ldg(reinterpret_cast<uint4 const*>(w + k * p.w_step + n)));
      uint32_t const v[4] = {vector.x, vector.y, vector.z, vector.w}, at = to + n * F::pitch + k * int(sizeof(T));
#pragma unroll
      for (int j = 0; j < F::vector; ++j)
        if constexpr (sizeof(T) == 4)
          ptx::st_shared(at + j * F::pitch, v[j]);
        else
          ptx::st_shared_u16(at + j * F::pitch, uint16_t(v[j / 2] >> j % 2 * 16));
    }
  }
}

template <class T, int steps>
__global__ void __launch_bounds__(Flow<T, steps>::threads, 1) flow_kernel(__grid_constant__ Params const p) {
  using F = Flow<T, steps>;
  extern __shared__ __align__(16) uint8_t dynamic[];
  uint32_t const filters = ptx::shared_address(dynamic);
  int const lines = (p.N + F::step - 1) / F::step * F::step;
  float* const bias = reinterpret_cast<float*>(dynamic + lines * F::pitch);
  int const g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
  int const blocks = int(gridDim.x), stride = blocks * (F::threads / 32) * 16;
  int m = (int(blockIdx.x) + int(threadIdx.x) / 32 * blocks) * 16 + g;  // and m + 8
  ptx::griddepcontrol_wait();
  uint4 next[steps][2];
  auto load = [&](int row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T const* const from = static_cast<T const*>(p.a) + (row + half * 8) * p.a_step + t * F::vector;
#pragma unroll
      for (int s = 0; s < steps; ++s)
        next[s][half] = row + half * 8 < p.M && s * F::step + t * F::vector < p.depth
                            ? __ldg(reinterpret_cast<uint4 const*>(from + s * F::step))
                            : uint4{};
    }
  };
  load(m);
  copy_filters<T, steps>(p, filters, lines);
  if (p.bias != nullptr)
    for (int i = int(threadIdx.x); i < lines; i += F::threads)
      bias[i] = i < p.N ? widen(static_cast<T const*>(p.bias)[i * p.bias_stride]) : 0;
  __syncthreads();
  uint32_t const mine = filters + (F::vector * (g / 2) + g % 2) * F::pitch + t * 16;
#pragma unroll 1
  for (; m - g < p.M; m += stride) {
    uint4 a[steps][2];
#pragma unroll
    for (int s = 0; s < steps; ++s) a[s][0] = operands<T>(next[s][0]), a[s][1] = operands<T>(next[s][1]);
    load(m + stride);
    T* const to = static_cast<T*>(p.out) + m * p.out_step + t * F::vector;
#pragma unroll 1
    for (int n = 0; n < p.N; n += F::step) {
      float acc[F::fragments][4] = {};
      if (p.bias != nullptr) {
#pragma unroll
        for (int j = 0; j < F::fragments; ++j)
          acc[j][0] = acc[j][2] = bias[n + t * F::vector + j * 2],
          acc[j][1] = acc[j][3] = bias[n + t * F::vector + j * 2 + 1];
      }
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int j = 0; j < F::fragments; ++j) {
          uint4 const b = ptx::ld_shared_v4(mine + (n + j * 2) * F::pitch + s * 64), &low = a[s][0], &high = a[s][1];
          if constexpr (sizeof(T) == 2) {
            ptx::mma_m16n8k16<T>(acc[j], low.x, high.x, low.y, high.y, b.x, b.y);
            ptx::mma_m16n8k16<T>(acc[j], low.z, high.z, low.w, high.w, b.z, b.w);
          } else {
            ptx::mma_m16n8k8_tf32(acc[j], low.x, high.x, low.y, high.y, b.x, b.y);
            ptx::mma_m16n8k8_tf32(acc[j], low.z, high.z, low.w, high.w, b.z, b.w);
          }
        }
      if (n + t * F::vector >= p.N) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vector<T, F::vector> v;
#pragma unroll
        for (int j = 0; j < F::fragments; ++j)
          v.v[j * 2] = narrow<T>(acc[j][half * 2]), v.v[j * 2 + 1] = narrow<T>(acc[j][half * 2 + 1]);
        if (m + half * 8 < p.M)
          *reinterpret_cast<Vector<T, F::vector>*>(to + half * 8 * p.out_step + n) = v;
      }
    }
  }
  ptx::griddepcontrol_launch_dependents();
}

// ---- host side

template <class T, int steps>
cudaError_t start(Params const& p, cudaStream_t stream) {
  using F = Flow<T, steps>;
  auto* const kernel = flow_kernel<T, steps>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 224 * 1024))
    return error;
  int sms = 0;
  if (auto const error = count_sms(sms)) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(min64(sms, ceil_div(p.M, 16))));
  config.blockDim = dim3(F::threads), config.dynamicSmemBytes = size_t(F::bytes(p.N)), config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <Op op, DType dtype>
cudaError_t launch(Problem const& problem, Plan const&, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  AnyPixels const s(op, problem);
  Params const p{args.a,     args.b,           args.bias,    args.out,     s.a.step,         problem.w.n,
                 s.out.step, args.bias_stride, int32_t(s.M), int32_t(s.N), int32_t(s.depth), op == Op::dgrad};
  switch (pixel_flow_steps(problem.dtype, s)) {
    case 1:
      return start<T, 1>(p, stream);
    case 2:
      return start<T, 2>(p, stream);
    case 4:
      return start<T, 4>(p, stream);
    default:
      return start<T, 8>(p, stream);
  }
}

}  // namespace conv2d_ext::pixels_flow

#define CONV2D_EXT_PIXELS_FLOW_INSTANCE(family, op, dtype, tm, tn, tk, variant)                               \
  namespace conv2d_ext {                                                                                      \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const& plan,           \
                                                                Arguments const& args, cudaStream_t stream) { \
    return pixels_flow::launch<Op::op, DType::dtype>(p, plan, args, stream);                                  \
  }                                                                                                           \
  }
