// wgrad of filters with neighbouring taps (stride and dilation 1 along W), channels_last, in TF32. A run is 64 channels
// of a row of the filter, kTaps taps of it; a tile is three runs, one for each multiplying warpgroup, by 64 filters.
//   out[run, channel; tap, filter] = sum over pixels of x[pixel, channel] * y[pixel - tap, filter]
// As in tma_wgrad_tf32.cuh, x is loaded as fragments, and y turned by warps of its own; but the
// fragments of x are loaded once for all taps, which are columns of the same instruction.
//
// For that the pixels of a step, 32, are summed in the order 0 2 4 ... 14, 1 3 ... 15, 16 18 ... 30, 17 19 ... 31,
// eight an instruction. y's pixels include the padded columns, which are zeros, before those of the image. A turned
// stage has four regions of 64 filters: region h holds pixels h, h + 2, ... h + 14, and those 16 further. An
// instruction whose first pixel is odd or even takes regions 1 to 3 or 0 to 2: 192 columns.
//
// The fourth warpgroup: two warps turn y, two copy. Barriers as in tma_wgrad_tf32.cuh. Sums go to the workspace, after
// every kChainSteps steps and at the end; WgradShares says who has which. Zeros of y make NaN of an infinite x: weights
// that are NaN are summed again, product by product.
#pragma once

#include "../core/tma_tf32.h"
#include "tma_wgrad.cuh"

namespace conv2d_ext::tf32::halo {

using tma::Images, tma::WgradParams, tma::WgradUnit, tma::WgradWork;
using Run = tma::WgradRun<Variant::halo>;

constexpr int kRuns = 3, kTaps = kWgradTaps, kPixels = wgrad_pixels(DType::f32);
constexpr int kThreads = (kRuns + 1) * kWarpgroup;
constexpr int kXBytes = kPixels * kLineBytes, kYLines = kPixels + kTaps - 1;  // of 32 channels, filters
constexpr int kYBytes = (kYLines + 7) / 8 * kCoreBytes, kYAt = kRuns * 2 * kXBytes, kStageBytes = kYAt + 2 * kYBytes;
constexpr int kTurnedLine = kLineBytes / 2, kRegionBytes = 64 * kTurnedLine, kTurnedBytes = (kTaps + 1) * kRegionBytes;
constexpr int kTurnedStages = 3, kStages = (225 * 1024 - kTurnedStages * kTurnedBytes) / kStageBytes;
constexpr int kTurnedAt = kStages * kStageBytes, kSharedBytes = kTurnedAt + kTurnedStages * kTurnedBytes + 1024;
constexpr int kColumns = kTaps * 64, kRunFloats = kColumns * 64;  // of a run's sums
constexpr int kChainSteps = int(kTf32Pixels) / kPixels;
// 64K registers: three multiplying warpgroups, one that copies and turns.
constexpr int kMultiplyRegs = 144, kTurnRegs = 80;
static_assert((kRuns * kMultiplyRegs + kTurnRegs) * kWarpgroup <= 65536);

struct Barriers {
  uint64_t full[kStages], empty[kStages], turned[kTurnedStages], used[kTurnedStages];
};

// y's, before those of the image.
__device__ inline int padded_columns(WgradParams const& p) { return min(p.S, kTaps) - 1; }

// Two warps copy, each a half of the runs' channels and of the filters.
__device__ inline void copy(WgradParams const& p, uint32_t ring, Barriers& bars) {
  int const half = int(threadIdx.x) / 32 % 2;
  int const padded = padded_columns(p);
  Stage stage;
  WgradUnit unit;
  for (WgradWork work(p); work.next(p, unit);) {
    int c[kRuns], offset_h[kRuns], offset_w[kRuns];
    unsigned exists = 0;
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      Run const run(p, unit.m * kRuns + i);
      if (unit.m * kRuns + i < p.runs && run.c + half * 32 < p.C) exists |= 1u << i;
      c[i] = unit.group * p.C + run.c + half * 32;
      offset_h[i] = run.r * p.dilation_h, offset_w[i] = run.s;
    }
    int const k = unit.n * 64 + half * 32;
    int const bytes = __popc(exists) * kXBytes + (k < p.K ? kYLines * kLineBytes : 0);
    for (int step = 0; step < unit.count; ++step) {
      int64_t column = int64_t(unit.begin + step * unit.stride) * kPixels, row = divide(column, p.columns);
      int const n = int(divide(row, p.P)), w = int(column), h = p.h0 + int(row) * p.stride_h;
      uint64_t* const full = &bars.full[stage.index];
      ptx::mbarrier_wait(&bars.empty[stage.index], stage.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, bytes);
      uint32_t const to = ring + stage.index * kStageBytes;
      if (k < p.K)  // first, for these have the longer way
        ptx::cp_async_bulk_tensor_im2col(to + kYAt + half * kYBytes, &p.y, full, unit.group * p.K + k, w - padded,
                                         int(row), n, 0, 0);
#pragma unroll
      for (int i = 0; i < kRuns; ++i)
        if (exists >> i & 1)
          ptx::cp_async_bulk_tensor_im2col(to + (i * 2 + half) * kXBytes, &p.x, full, c[i], p.w0 + w, h, n, offset_w[i],
                                           offset_h[i]);
      stage.advance(kStages);
    }
  }
}

// Two warps turn y, a lane has a filter of each.
__device__ inline void turn(WgradParams const& p, uint32_t ring, Barriers& bars) {
  constexpr int span = 16 + kTaps - 1;  // pixels that the regions have of 16
  int const warp = int(threadIdx.x) / 32 % 2, lane = int(threadIdx.x) % 32, filter = warp * 32 + lane;
  uint32_t const from = ring + kYAt + warp * kYBytes + lane % 4 * 4, to = ring + kTurnedAt + filter * kTurnedLine;
  Stage stage, turned;
  WgradUnit unit;
  for (WgradWork work(p); work.next(p, unit);) {
    for (int step = 0; step < unit.count; ++step) {
      ptx::mbarrier_wait(&bars.full[stage.index], stage.parity);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        uint32_t v[span];
#pragma unroll
        for (int i = 0; i < span; ++i) {
          int const line = part * 16 + i;
          v[i] = ptx::ld_shared(from + stage.index * kStageBytes + line * kLineBytes + ((lane / 4) ^ (line % 8)) * 16);
        }
        if (part == 0) ptx::mbarrier_wait(&bars.used[turned.index], turned.parity ^ 1);
#pragma unroll
        for (int h = 0; h <= kTaps; ++h)
#pragma unroll
          for (int i = h; i < 16; i += 8)
            ptx::st_shared_v4(
                to + turned.index * kTurnedBytes + h * kRegionBytes + ((part * 2 + i / 8) ^ (filter / 2 % 4)) * 16,
                make_uint4(v[i], v[i + 2], v[i + 4], v[i + 6]));
      }
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) {
        ptx::mbarrier_arrive(&bars.turned[turned.index]);
        ptx::mbarrier_arrive(&bars.empty[stage.index]);
      }
      stage.advance(kStages);
      turned.advance(kTurnedStages);
    }
  }
}

// Two neighbouring channels of pixels i and i + 8.
__device__ inline void load(uint32_t (&v)[4], uint32_t from) {
  uint2 const low = ptx::ld_shared_v2(from), high = ptx::ld_shared_v2(from + kCoreBytes);
  v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
}

// Writes, or adds, a thread's sums to the workspace: of two channels, columns 8 j + 2 (lane % 4) + {0, 1}.
__device__ inline void store_part(float* to, float const (&acc)[kColumns / 2], bool add) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float2* const at = reinterpret_cast<float2*>(to + (j * 8 + e) * 64);
      float2 const before = add ? *at : make_float2(0, 0);
      *at = make_float2(before.x + acc[j * 4 + e], before.y + acc[j * 4 + 2 + e]);
    }
    if (j % 4 == 3) ptx::compiler_fence();
  }
}

__device__ inline void multiply(WgradParams const& p, uint32_t ring, Barriers& bars) {
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  int const channel = warp * 16 + lane / 4 * 2;
  uint32_t const lines = ring + (group * 2 + channel / 32) * kXBytes + channel % 4 * 4, chunk = channel % 32 / 4;
  uint32_t const from[2] = {lines + lane % 4 * 2 * kLineBytes + (chunk ^ (lane % 4 * 2)) * 16,
                            lines + (lane % 4 * 2 + 1) * kLineBytes + (chunk ^ (lane % 4 * 2 + 1)) * 16};
  Stage stage, turned;
  float acc[kColumns / 2];
  uint32_t a[2][2][4] = {};
  WgradUnit unit;
  for (WgradWork work(p); work.next(p, unit);) {
    if (unit.m * kRuns + group >= p.runs) {  // nothing to do
      for (int step = 0; step < unit.count; ++step) {
        ptx::mbarrier_wait(&bars.full[stage.index], stage.parity);
        ptx::mbarrier_wait(&bars.turned[turned.index], turned.parity);
        if (lane == 0) ptx::mbarrier_arrive(&bars.empty[stage.index]);
        if (lane == 0) ptx::mbarrier_arrive(&bars.used[turned.index]);
        stage.advance(kStages);
        turned.advance(kTurnedStages);
      }
      continue;
    }
    float* const part =
        static_cast<float*>(p.workspace) + (int64_t(unit.slot) * kRuns + group) * kRunFloats + lane % 4 * 128 + channel;
    int step = 0;
    do {
      int const begin = step, end = min(step + kChainSteps, unit.count);
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) acc[i] = 0;
      int before = -1;  // turned stage of the multiplications that are under way
      for (; step < end; ++step) {
        ptx::mbarrier_wait(&bars.full[stage.index], stage.parity);
        uint32_t const at = stage.index * kStageBytes, from_b = ring + kTurnedAt + turned.index * kTurnedBytes;
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // fragments are loaded while those before are multiplied
          ptx::wgmma_wait_group<1>();
          ptx::wgmma_fence_operand(a[half]);
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) load(a[half][odd], from[odd] + at + half * 2 * kCoreBytes);
          if (half == 0) ptx::mbarrier_wait(&bars.turned[turned.index], turned.parity);
          if (half == 1 && lane == 0 && before >= 0) ptx::mbarrier_arrive(&bars.used[before]);
          ptx::wgmma_fence_operand(acc);
          ptx::wgmma_fence();
#pragma unroll
          for (int odd = 0; odd < 2; ++odd)
            ptx::wgmma_mma_async_tf32(
                acc, a[half][odd],
                ptx::wgmma_descriptor<64>(from_b + odd * kRegionBytes + half * 32, 0, 8 * kTurnedLine));
          ptx::wgmma_commit_group();
        }
        if (lane == 0) ptx::mbarrier_arrive(&bars.empty[stage.index]);
        before = turned.index;
        stage.advance(kStages);
        turned.advance(kTurnedStages);
      }
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(acc);
      if (lane == 0 && before >= 0) ptx::mbarrier_arrive(&bars.used[before]);
      store_part(part, acc, begin > 0);
    } while (step < unit.count);
  }
}

// A template, so that only the source that launches it compiles it.
template <int runs>
__global__ void __launch_bounds__(kThreads, 1) kernel(__grid_constant__ WgradParams const p) {
  extern __shared__ uint8_t dynamic[];
  __shared__ Barriers bars;
  uint32_t const ring = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&bars.full[i], 2);              // copying warps
      ptx::mbarrier_init(&bars.empty[i], runs * 4 + 2);  // multiplying and turning warps
    }
    for (int i = 0; i < kTurnedStages; ++i) {
      ptx::mbarrier_init(&bars.turned[i], 2);
      ptx::mbarrier_init(&bars.used[i], runs * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
  if (threadIdx.x < runs * kWarpgroup) {
    ptx::setmaxnreg_inc<kMultiplyRegs>();
    multiply(p, ring, bars);
  } else {
    ptx::setmaxnreg_dec<kTurnRegs>();
    if (threadIdx.x / 32 % 4 < 2)
      turn(p, ring, bars);
    else if (threadIdx.x % 32 == 0)
      copy(p, ring, bars);
  }
}

constexpr int kReduceWarps = 16;

// Adds the parts of the tiles in the order of the blocks that made them. `slices` warps have two columns of 64
// channels, and each adds every slices'th part.
template <int runs>
__global__ void __launch_bounds__(kReduceWarps * 32)
    reduce(__grid_constant__ WgradParams const p, __grid_constant__ Images const images, int slices) {
  constexpr int items = runs * kRunFloats / 128, together = 4;  // items: of a tile
  __shared__ float4 sums[kReduceWarps][32];
  int const warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, slice = warp % slices;
  int const item = int(blockIdx.x) * (kReduceWarps / slices) + warp / slices, tile = item / items;
  int const at = item % items * 128 + lane * 4;  // of the tile's sums
  WgradUnit unit;
  unit.locate(p, tile);
  Run const run(p, unit.m * runs + at / kRunFloats);
  int const column = at / 64 % kColumns, tap = padded_columns(p) - column / 64;
  int const k = unit.n * 64 + column % 64, c = run.c + at % 64, s = run.s + tap;
  bool const valid = tile < p.shares.shared && unit.m * runs + at / kRunFloats < p.runs && tap >= 0 && s < p.S &&
                     k < p.own.filters(unit.group, p.K) && c < p.C && p.own.meets(k, 1, c, 4);
  tma::WgradParts const parts(p.shares, tile);
  int const count = valid ? parts.count : 0;
  float const* const from = static_cast<float const*>(p.workspace) + at;
  ptx::griddepcontrol_wait();
  float4 sum = make_float4(0, 0, 0, 0);
  for (int i = slice; i < count; i += slices * together) {
    float4 v[together];
#pragma unroll
    for (int u = 0; u < together; ++u)
      v[u] = i + u * slices < count
                 ? *reinterpret_cast<float4 const*>(from + parts.slot(i + u * slices) * (runs * kRunFloats))
                 : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int u = 0; u < together; ++u) sum.x += v[u].x, sum.y += v[u].y, sum.z += v[u].z, sum.w += v[u].w;
  }
  if (slices > 1) {
    sums[warp][lane] = sum;
    __syncthreads();
    if (slice > 0) return;
    for (int i = 1; i < slices; ++i) {
      float4 const v = sums[warp + i][lane];
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
  }
  float values[4] = {sum.x, sum.y, sum.z, sum.w};
  unsigned nan = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (valid && p.own.has(k, c + i) && values[i] != values[i]) nan |= 1u << i;
  for (unsigned lanes; (lanes = __ballot_sync(0xffffffff, nan != 0)) != 0;) {
    int const whose = __ffs(int(lanes)) - 1, which = __ffs(int(__shfl_sync(0xffffffff, nan, whose))) - 1;
    float const exact = tma::wgrad_exact<float>(p, images, unit.group * p.K + __shfl_sync(0xffffffff, k, whose),
                                                unit.group * p.C + __shfl_sync(0xffffffff, c, whose) + which, run.r,
                                                __shfl_sync(0xffffffff, s, whose));
    if (lane != whose) continue;
    nan &= nan - 1;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i == which) values[i] = exact;
  }
  if (!valid) return;
  float* const out = static_cast<float*>(p.out) + (int64_t(unit.group) * p.K + k) * p.out_k + run.r * p.out_r;
  float* const to = out + s * p.out_s + (c - p.own.first(k)) * p.out_c;
  if (p.pairs) {
    *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (p.own.has(k, c + i)) to[i * p.out_c] = values[i];
}

template <int TM, int TN>
cudaError_t launch(Problem const& given, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  static_assert(TM == kRuns * kColumns && TN == 64);
  Problem const problem = as_merged(row_of(plan), given);
  Walk const h = walk_h(Op::wgrad, problem, 0), w = walk_w(Op::wgrad, problem, 0);
  WgradTiles const t = wgrad_tiles(row_of(plan), problem);
  int64_t const P = problem.P(), Q = problem.Q();
  WgradParams p{};
  p.P = int32_t(P), p.columns = int32_t(t.columns);
  p.h0 = int32_t(h.lower), p.w0 = int32_t(w.lower);
  p.stride_h = int32_t(h.stride), p.stride_w = 1, p.dilation_h = int32_t(h.tap_stride), p.dilation_w = 1;
  p.R = int32_t(problem.R), p.S = int32_t(problem.S);
  p.C = int32_t(problem.C_per_group()), p.K = int32_t(problem.K_per_group());
  p.runs = int32_t(t.runs), p.steps = int32_t(t.steps), p.groups = int32_t(problem.groups);
  p.tiles_n = int32_t(ceil_div(p.K, TN));
  p.shares = wgrad_shares(t, plan.split_k);
  p.own = tma::OwnGroup(given, problem);
  p.out_k = given.w.n, p.out_c = given.w.c, p.out_r = given.w.h, p.out_s = given.w.w;
  p.pairs = channel_vectors(given.w, given.w_align, given.C_per_group(), 4, DType::f32);
  p.out = args.out, p.workspace = args.workspace;
  Strides const &x = problem.x, &y = problem.y;
  Walk box_x = w, box_y{t.columns, 1, Q - t.columns};
  box_x.pixels = t.columns;
  cudaError_t error = tma::encode_im2col(
      p.x, {args.a, DType::f32, {given.C, problem.W, problem.H, problem.N}, {1, x.w, x.h, x.n}, true}, h, box_x, 32,
      kPixels);
  if (error != cudaSuccess) return error;
  error = tma::encode_im2col(p.y, {args.b, DType::f32, {given.K, Q, P, problem.N}, {1, y.w, y.h, y.n}, true},
                             Walk{P, 1}, box_y, 32, kYLines);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel<kRuns>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  error = launch_dependent(kernel<kRuns>, dim3(unsigned(plan.split_k)), kThreads, kSharedBytes, stream, p);
  if (error != cudaSuccess) return error;
  Images const images{args.a, args.b, x, y, problem.N * P * Q, int32_t(problem.H), int32_t(problem.W), int32_t(Q)};
  int slices = 1;
  while (slices < kReduceWarps && slices * t.tiles * 4 < plan.split_k) slices *= 2;
  int64_t const blocks = ceil_div(t.tiles * (TM * TN / 128) * slices, kReduceWarps);
  return launch_spread(reduce<kRuns>, dim3(unsigned(blocks)), kReduceWarps * 32,
                       kReduceWarps * 32 * int(sizeof(float4)), stream, p, images, slices);
}

}  // namespace conv2d_ext::tf32::halo

#define CONV2D_EXT_TMA_TF32_HALO_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) { return tf32::halo::launch<tm, tn>(p, plan, args, stream); }
