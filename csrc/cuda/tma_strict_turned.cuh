// wgrad of stride 1 in strict float32 with x and y in each other's place (core/strict_turned.h): a row of
// tma_strict_wgrad.cuh computes w[C,K,R,S], the last tap first, from which a launch behind it makes w[K,C,R,S].
#pragma once

#include "../core/strict_turned.h"
#include "winograd.cuh"

namespace conv2d_ext::turned_sums {

constexpr int kThreads = 256, kSide = 32;

struct Weights {
  float const* from;  // C, taps, K
  float* to;
  int64_t k, c, r, s;
  int K, C, S, taps;
};

// A block: 32 filters by 32 channels of a tap.
static __global__ void __launch_bounds__(kThreads) weights_kernel(__grid_constant__ Weights const p) {
  __shared__ float tile[kSide][kSide + 1];  // channel, filter
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, tap = int(blockIdx.x) % p.taps,
            c0 = int(blockIdx.x) / p.taps * kSide, k0 = int(blockIdx.y) * kSide;
  for (int i = warp; i < kSide; i += kThreads / 32)
    if (c0 + i < p.C && k0 + lane < p.K)
      tile[i][lane] = __ldg(p.from + (int64_t(c0 + i) * p.taps + p.taps - 1 - tap) * p.K + k0 + lane);
  __syncthreads();
  int const r = tap / p.S, s = tap - r * p.S;
  for (int i = warp; i < kSide; i += kThreads / 32)
    if (k0 + i < p.K && c0 + lane < p.C) p.to[(k0 + i) * p.k + (c0 + lane) * p.c + r * p.r + s * p.s] = tile[lane][i];
}

// product: the launcher of the row of these tiles.
inline cudaError_t launch(Launcher (*product)(int tile_m, int tile_n), Problem const& problem, Plan const& plan,
                          Arguments const& args, cudaStream_t stream) {
  StrictTurned const t = strict_turned_tile(problem);
  if (t.tile_m == 0) return cudaErrorInvalidValue;
  Plan own_plan = plan;
  own_plan.split_k = t.estimate.split_k;
  char* const workspace = static_cast<char*>(args.workspace);
  Arguments own{};
  own.a = args.b, own.b = args.a, own.out = workspace, own.workspace = workspace + strict_turned_out_bytes(problem);
  cudaError_t const error = product(t.tile_m, t.tile_n)(strict_turned(problem), own_plan, own, stream);
  if (error != cudaSuccess) return error;
  Weights w{};
  w.from = reinterpret_cast<float const*>(workspace), w.to = static_cast<float*>(args.out);
  w.k = problem.w.n, w.c = problem.w.c, w.r = problem.w.h, w.s = problem.w.w;
  w.K = int(problem.K), w.C = int(problem.C), w.S = int(problem.S), w.taps = int(problem.R * problem.S);
  dim3 const grid(unsigned(ceil_div(problem.C, int64_t(kSide)) * w.taps),
                  unsigned(ceil_div(problem.K, int64_t(kSide))));
  weights_kernel<<<grid, kThreads, 0, stream>>>(w);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::turned_sums

#define CONV2D_EXT_TMA_STRICT_TURNED_INSTANCE(family, op, dtype, tm, tn, tk, variant)       \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                 \
    return turned_sums::launch(&winograd::product_launcher<Op::op>, p, plan, args, stream); \
  }
