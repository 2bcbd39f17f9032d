// What the depthwise kernels share: the second pass of wgrad, single outputs, alignment.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "dependent.cuh"
#include "depthwise_tile.cuh"
#include "ptx.cuh"

namespace conv2d_ext::depthwise {

// Numbers of blocks are below 2^31 (plan.h), and 64-bit division is a long subroutine.
__device__ inline int split_off(uint32_t& value, int divisor) {
  uint32_t const rest = value % uint32_t(divisor);
  value /= uint32_t(divisor);
  return int(rest);
}

// Copies E elements, of which `valid` are in the tensor, or zeros.
template <class T, int E>
__device__ inline void copy(T* to, T const* from, int valid) {
  if constexpr (sizeof(T) * E >= 4)
    __pipeline_memcpy_async(to, from, sizeof(T) * E, sizeof(T) * (E - valid));
  else
    *to = valid > 0 ? *from : narrow<T>(0.f);
}

template <class T>
__device__ inline void clear(T* tile, int elements) {
  float4* const to = reinterpret_cast<float4*>(tile);
  for (int i = threadIdx.x; i < elements * int(sizeof(T)) / 16; i += blockDim.x) to[i] = make_float4(0, 0, 0, 0);
}

// Sums of a split go to partial[split][k][tap], or rounded to the filter where there is one split.
template <class T, class Acc>
__device__ inline void store_sum(void* w, void* partial, int splits, int64_t filter_offset, int64_t partial_offset,
                                 Acc sum) {
  if (splits == 1)
    static_cast<T*>(w)[filter_offset] = narrow<T>(sum);
  else
    static_cast<Acc*>(partial)[partial_offset] = sum;
}

// Second pass of wgrad: adds the splits in order.
struct Sum {
  void const* partial;
  void* w;
  int64_t count, w_k, w_r, w_s;  // count = K * R * S
  int64_t taps, S;
  int splits;
};

// A lane has a filter tap, each warp of a block every so many splits; the warps' sums are added in their order. It may
// begin before the first pass has ended.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) add_splits(__grid_constant__ Sum const p) {
  using Acc = decltype(widen(T()));
#if __CUDA_ARCH__ >= 900
  ptx::griddepcontrol_wait();
#endif
  __shared__ Acc sums[kMaxThreads];
  int const warps = int(blockDim.x) / 32, warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  for (int64_t first = int64_t(blockIdx.x) * 32; first < p.count; first += int64_t(gridDim.x) * 32) {
    int64_t const i = first + lane;
    Acc sum = 0;
    if (i < p.count) {
      Acc const* const from = static_cast<Acc const*>(p.partial) + i;
      for (int split = warp; split < p.splits;) {
        Acc chain = 0;
#pragma unroll 8
        for (int term = 0; term < kChain && split < p.splits; ++term, split += warps) chain += from[split * p.count];
        sum += chain;
      }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && i < p.count) {
      for (int other = 1; other < warps; ++other) sum += sums[other * 32 + lane];
      int64_t const k = i / p.taps, tap = i % p.taps;
      static_cast<T*>(p.w)[k * p.w_k + tap / p.S * p.w_r + tap % p.S * p.w_s] = narrow<T>(sum);
    }
    __syncthreads();
  }
}

// One output of fprop or dgrad at stride 1 from global memory, product by product: for those that tensor cores made
// NaN. unit_channels: a pixel's channels are neighbours in memory.
template <class T, bool unit_channels, class Tile>
__device__ __noinline__ float exact(Tile const& p, int64_t n, int c, int y, int x) {
  T const* in = static_cast<T const*>(p.in.data) + n * p.in.n;
  if constexpr (unit_channels)
    in += c;
  else
    in += c * p.in.c;
  T const* const w = static_cast<T const*>(p.w) + c * p.w_k;
  float sum = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
  for (int r = 0; r < p.R; ++r) {
    int const h = y - p.pad_h + r;
    if (unsigned(h) >= unsigned(p.in.H)) continue;
    for (int s = 0; s < p.S; ++s) {
      int const v = x - p.pad_w + s;
      if (unsigned(v) >= unsigned(p.in.W)) continue;
      sum = fmaf(widen(in[h * p.in.h + v * p.in.w]),
                 widen(w[(p.turned ? p.R - 1 - r : r) * p.w_r + (p.turned ? p.S - 1 - s : s) * p.w_s]), sum);
    }
  }
  return sum;
}

// ---- host side

// static: each source has its own kernel, for its architectures.
template <class T>
static cudaError_t launch_sum(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream,
                              bool dependent = false) {
  int64_t const taps = problem.R * problem.S, count = problem.K * taps;
  Sum const p{args.workspace, args.out, count, problem.w.n, problem.w.h, problem.w.w, taps, problem.S, plan.split_k};
  unsigned const blocks = unsigned(min64(ceil_div(count, 32), 65536));
  unsigned const warps = unsigned(min64(ceil_div(plan.split_k, 4), kMaxThreads / 32));
  if (dependent) return launch_dependent(add_splits<T>, dim3(blocks), int(32 * warps), 0, stream, p);
  add_splits<T><<<blocks, 32 * warps, 0, stream>>>(p);
  return cudaGetLastError();
}

// Every row of `s` starts on a multiple of `bytes`.
inline bool rows_aligned(Strides const& s, bool nhwc, int align, int bytes, int element_bytes) {
  int const v = bytes / element_bytes;
  return align >= bytes && s.n % v == 0 && s.h % v == 0 && (nhwc ? s.w : s.c) % v == 0;
}

}  // namespace conv2d_ext::depthwise
