// fprop and dgrad of one phase and group (core/tma.h: tma_lags), tma.cuh's tiles of 128x256. Two warpgroups, each with
// pixels of its own, share the filters of every stage, and the second is half a tile behind the first: a tile's steps
// are a circle, and the second warpgroup's begin in the middle of the filters. So one multiplies while the other
// stores, and a stage brings the pixels of two tiles for one of filters.
//
// A copying thread for each warpgroup's pixels and one for the filters; each arrives at every stage, also where there
// is nothing to copy.
#pragma once

#include "tma.cuh"

namespace conv2d_ext::tma {

// A block's tiles: all have the same filters; those of a warpgroup are every stride-th along M.
struct Lag {
  int32_t n, first, stride, half, total;  // half: steps that the second is behind; total: stages

  __device__ explicit Lag(Params const& p) : n(int(blockIdx.x)), half(p.phase[0].steps / 2) {
    first = p.tiles_n.divide(n) * 2, stride = int(gridDim.x) / p.tiles_n * 2;
    int const tiles = p.phase[0].tiles, steps = p.phase[0].steps;
    int const rounds[2] = {(tiles - first + stride - 1) / stride, (tiles - first + stride - 2) / stride};
    total = max(rounds[0] * steps, rounds[1] > 0 ? half + rounds[1] * steps : 0);
  }
};

// Steps in turn, round and round.
struct LagStep {
  int32_t step;
  Step at;

  __device__ LagStep(Params const& p, int step) : step(step), at(p, p.phase[0], step) {}
  __device__ void advance(Params const& p) {
    at.advance();
    if (++step == p.phase[0].steps) step = 0, at = Step(p, p.phase[0], 0);
  }
};

__host__ __device__ inline int lag_stage_bytes(Params const& p) { return 2 * p.a_bytes + p.b_bytes; }

// One thread for each warpgroup's pixels.
template <class T>
__device__ void lag_copy_pixels(Params const& p, Lag const& lag, uint32_t ring, Barriers const& bars, int group) {
  int const chunk_size = p.line / int(sizeof(T)), stage_bytes = lag_stage_bytes(p), steps = p.phase[0].steps;
  Phase const& phase = p.phase[0];
  int const tap_h = phase.tap_h, tap_w = phase.tap_w;
  int n = 0, h = 0, w = 0, tile = lag.first + group, own = -group * lag.half;
  bool copies = false;
  LagStep of(p, 0);
  Stage at;
#pragma unroll 1
  for (int i = 0; i < lag.total; ++i, ++own) {
    if (own == 0) {
      copies = tile < phase.tiles;
      int64_t j = int64_t(tile) * kLagPixels, row = phase.columns.divide(j);
      n = int(phase.rows.divide(row)), h = phase.h0 + int(row) * p.stride_h, w = phase.w0 + int(j) * p.stride_w;
      tile += lag.stride, own = -steps;
    }
    uint32_t const full = bars.full_a + at.index * 8;
    ptx::mbarrier_wait(bars.empty_a + at.index * 8, at.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, copies ? p.a_bytes : 0);
    if (copies)
      ptx::cp_async_bulk_tensor_im2col(ring + at.index * stage_bytes + group * p.a_bytes, &p.a[0], full,
                                       of.at.chunk * chunk_size, w, h, n, of.at.tap_w * tap_w, of.at.tap_h * tap_h);
    of.advance(p);
    at.advance(p.stages_a);
  }
}

template <class T, bool b_rows>
__device__ void lag_copy_filters(Params const& p, Lag const& lag, uint32_t ring, Barriers const& bars) {
  int const chunk_size = p.line / int(sizeof(T)), stage_bytes = lag_stage_bytes(p);
  Phase const& phase = p.phase[0];
  int const first_r = phase.first_r, first_s = phase.first_s, step_r = phase.step_r, step_s = phase.step_s;
  constexpr int TN = kLagColumns;
  int const first = lag.n * TN, runs = min(TN / 64, (p.N - first + 63) / 64);
  int const bytes = b_rows ? runs * chunk_size * kLineBytes : min(TN, p.N) * p.line;
  ring += 2 * p.a_bytes;
  LagStep of(p, 0);
  Stage at;
#pragma unroll 1
  for (int i = 0; i < lag.total; ++i) {
    uint32_t const full = bars.full_a + at.index * 8, to = ring + at.index * stage_bytes;
    int const k = of.at.chunk * chunk_size, s = first_s + of.at.tap_w * step_s, r = first_r + of.at.tap_h * step_r;
    ptx::mbarrier_wait(bars.empty_a + at.index * 8, at.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, bytes);
    if constexpr (b_rows) {
      for (int run = 0; run < runs; ++run)
        ptx::cp_async_bulk_tensor_5d(to + run * kRunBytes, &p.b, full, first + run * 64, s, r, k, 0);
    } else {
      ptx::cp_async_bulk_tensor_5d(to, &p.b, full, k, s, r, first, 0);
    }
    of.advance(p);
    at.advance(p.stages_a);
  }
}

template <class T, bool b_rows>
__device__ void lag_multiply(Params const& p, Lag const& lag, uint32_t ring, Tables<T, kLagColumns>& tables) {
  constexpr int TN = kLagColumns;
  using S = Shape<T, kLagPixels, TN>;
  constexpr uint32_t step_b = b_rows ? 2 * kCoreBytes : 32;
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32;
  uint32_t const stage_bytes = lag_stage_bytes(p);
  uint64_t const layout_a = layout_of(p.line),
                 layout_b = b_rows ? ptx::wgmma_descriptor(0, kRunBytes, kCoreBytes) : layout_a;
  Barriers const bars(tables);
  uint32_t const staging = ring + (p.by_engine ? S::ring_beside_pieces : S::ring_bytes + group * kRunBytes);
  int const steps = p.phase[0].steps;
  Stage at;
  auto release = [&](int stage) {  // -1: none
    if (lane == 0 && stage >= 0) ptx::mbarrier_arrive(bars.empty_a + stage * 8);
  };
  int passed = 0;
  auto pass = [&](int count) {  // stages of the other warpgroup's tiles alone
    for (passed += count; count > 0; --count) {
      ptx::mbarrier_wait(bars.full_a + at.index * 8, at.parity);
      __syncwarp();
      release(at.index);
      at.advance(p.stages_a);
    }
  };
  if (p.bias != nullptr) {
    for (int i = int(threadIdx.x) % kWarpgroup; i < TN; i += kWarpgroup)
      if (lag.n * TN + i < p.N) tables.bias[group][i] = static_cast<T const*>(p.bias)[(lag.n * TN + i) * p.bias_stride];
    ptx::bar_sync(1 + group, kWarpgroup);
  }
  float acc[TN / 2];
  pass(group * lag.half);
  LagStep of(p, group * lag.half);
  for (int tile = lag.first + group; tile < p.phase[0].tiles; tile += lag.stride) {
#pragma unroll
    for (int i = 0; i < TN / 2; ++i) acc[i] = 0;
    int before = -1;
    for (int step = 0; step < steps; ++step) {
      int const instructions = of.at.last_chunk() ? p.last : 4;
      ptx::mbarrier_wait(bars.full_a + at.index * 8, at.parity);
      uint32_t const from = ring + at.index * stage_bytes, from_a = from + group * p.a_bytes,
                     from_b = from + 2 * p.a_bytes;
      ptx::wgmma_fence_operand(acc);
      with_constant(instructions, [&](auto count) {
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < decltype(count)::value; ++k)
          ptx::wgmma_mma_async<T, false, b_rows>(acc, at_address(layout_a, from_a + k * 32),
                                                 at_address(layout_b, from_b + k * step_b));
        ptx::wgmma_commit_group();
      });
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(acc);
      release(before);
      before = at.index;
      at.advance(p.stages_a);
      of.advance(p);
    }
    passed += steps;
    Unit done;
    done.phase = done.group = 0, done.m = tile, done.n = lag.n, done.part = -1;
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
    release(before);
    store<T, kLagPixels, TN, false, true>(p, done, 0, acc, tables, staging);
  }
  pass(lag.total - passed);
  if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();  // shared memory ends with the block
}

template <class T, bool b_rows>
__global__ void __launch_bounds__(kThreads, 1) lag_kernel(__grid_constant__ Params const p) {
  using S = Shape<T, kLagPixels, kLagColumns>;
  extern __shared__ uint8_t dynamic[];
  __shared__ Tables<T, kLagColumns> tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  if (threadIdx.x % 32 == 0) {
    for (int i = int(threadIdx.x) / 32; i < kMaxStages; i += kThreads / 32) {
      ptx::mbarrier_init(&tables.full_a[i], 3);  // copying threads
      ptx::mbarrier_init(&tables.empty_a[i], 8);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
  Lag const lag(p);
  if (threadIdx.x < 2 * kWarpgroup) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    lag_multiply<T, b_rows>(p, lag, ring, tables);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    Barriers const bars(tables);
    int const copier = warp_uniform(int(threadIdx.x) / 32 % 4);
    if (copier == 3 || !ptx::elect()) return;
    if (copier == 2)
      lag_copy_filters<T, b_rows>(p, lag, ring, bars);
    else
      lag_copy_pixels<T>(p, lag, ring, bars, copier);
    if (copier == 2) ptx::griddepcontrol_launch_dependents();
  }
}

template <Op op, DType dtype>
cudaError_t launch_lag(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  using S = Shape<T, kLagPixels, kLagColumns>;
  auto const adjust = [](Params& p, int64_t& blocks) {
    p.stages_a = Divisor((p.by_engine ? S::ring_beside_pieces : S::ring_bytes) / lag_stage_bytes(p));
    blocks = lag_blocks(p.tiles_n.value);
  };
  return launch_kernel<S, op, dtype, kLagPixels, kLagColumns>(lag_kernel<T, op == Op::dgrad>, problem, plan, args,
                                                              stream, nullptr, nullptr, adjust);
}

}  // namespace conv2d_ext::tma
