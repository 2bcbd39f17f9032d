// fprop and dgrad of one phase and group (core/tma.h: tma_lags), tma.cuh's tiles of 128x256. Two warpgroups, each with
// pixels of its own, share the filters of every stage, and the second is some steps behind the first: a tile's steps
// are a circle, and the second warpgroup's begin a few on. So one multiplies while the other stores, and a stage brings
// the pixels of two tiles for one of filters.
//
// A copying thread for each warpgroup's pixels and one for the filters; each arrives at every stage, also where there
// is nothing to copy.
#pragma once

#include "../core/tma_lag.h"
#include "tma.cuh"

namespace conv2d_ext::tma {

// Steps that the second warpgroup is behind: as long as a tile's stores take, as it begins and ends that much later.
constexpr int kLagSteps = 3;

// Some of a block's tiles, with the same filters: those of a warpgroup are every stride-th along M.
struct Lag {
  int32_t n, first, end, stride;
  int32_t total;  // stages
};

// All of a block's, as LagBlocks says.
struct LagWork {
  int32_t own, each, n, step;

  __device__ explicit LagWork(Params const& p) : n(int(blockIdx.x)) {
    own = int(gridDim.x) / p.tiles_n, each = p.tiles_n.divide(n);
    step = each < own ? int(p.tiles_n) : int(gridDim.x) - own * p.tiles_n;
  }
  // False if there are none.
  __device__ bool take(Params const& p, Lag& lag) {
    if (n >= p.tiles_n) return false;
    Phase const& f = p.phase[0];
    int const shared = own * p.cycles * 2;  // from this tile on they are the other blocks'
    bool const alone = each < own;
    lag.n = n, n += step;
    lag.first = alone ? each * 2 : shared, lag.stride = alone ? own * 2 : 2;
    lag.end = alone ? min(f.tiles, shared) : f.tiles;
    int const rounds = max((lag.end - lag.first + lag.stride - 1) / lag.stride, 0),
              behind = max((lag.end - lag.first + lag.stride - 2) / lag.stride, 0);
    lag.total = max(rounds * f.steps, behind > 0 ? kLagSteps + behind * f.steps : 0);
    return true;
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
template <class T, int TM>
__device__ void lag_copy_pixels(Params const& p, Lag const& lag, uint32_t ring, Barriers const& bars, int group,
                                Stage& at) {
  int const chunk_size = p.line / int(sizeof(T)), stage_bytes = lag_stage_bytes(p), steps = p.phase[0].steps;
  Phase const& phase = p.phase[0];
  int const tap_h = phase.tap_h, tap_w = phase.tap_w;
  int n = 0, h = 0, w = 0, tile = lag.first + group, own = -group * kLagSteps;
  bool copies = false;
  LagStep of(p, 0);
#pragma unroll 1
  for (int i = 0; i < lag.total; ++i, ++own) {
    if (own == 0) {
      copies = tile < lag.end;
      int64_t j = int64_t(tile) * TM, row = phase.columns.divide(j);
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

template <class T, int TN, bool b_rows>
__device__ void lag_copy_filters(Params const& p, Lag const& lag, uint32_t ring, Barriers const& bars, Stage& at) {
  int const chunk_size = p.line / int(sizeof(T)), stage_bytes = lag_stage_bytes(p);
  Phase const& phase = p.phase[0];
  int const first_r = phase.first_r, first_s = phase.first_s, step_r = phase.step_r, step_s = phase.step_s;
  int const first = lag.n * TN, runs = min(TN / 64, (p.N - first + 63) / 64);
  int const bytes = b_rows ? runs * chunk_size * kLineBytes : min(TN, p.N) * p.line;
  ring += 2 * p.a_bytes;
  LagStep of(p, 0);
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

// The place for a tile's results, which the warpgroups have in turn, by warps: `done` barriers, one for each warp of
// each warpgroup, say that the copy engine has read what its tile before had there.
template <class T, int TM, int TN>
__device__ void lag_store(Params const& p, int m, int n, float (&acc)[TM / 64][TN / 2], uint32_t place) {
  constexpr int columns = kLineBytes / int(sizeof(T)), of_half = TN / columns, pieces = TM / 64 * of_half, slots = 4;
  static_assert(of_half % 2 == 0 && 4 * slots * kPieceBytes <= 224 * 1024 - Shape<T, TM, TN>::ring_beside_pieces);
  int const warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  place += warp * slots * kPieceBytes;
#pragma unroll
  for (int i = 0; i < pieces; i += 2) {  // two at a time
    if (i >= slots) {
      if (lane == 0) ptx::cp_async_bulk_wait_group_read<slots / 2 - 1>();
      __syncwarp();
    }
#pragma unroll
    for (int j = i; j < i + 2; ++j) stage_piece<T, TN>(acc[j / of_half], j % of_half, place + j % slots * kPieceBytes);
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane != 0) continue;
#pragma unroll
    for (int j = i; j < i + 2; ++j)
      ptx::cp_async_bulk_tensor_4d_store(&p.out_rows, place + j % slots * kPieceBytes, n * TN + j % of_half * columns,
                                         m * TM + j / of_half * 64 + warp * 16, 0, 0);
    ptx::cp_async_bulk_commit_group();
  }
}

template <class T, int TM, int TN, bool b_rows>
__device__ void lag_multiply(Params const& p, LagWork work, uint32_t ring, Tables<T, TN>& tables) {
  using S = Shape<T, TM, TN>;
  constexpr int halves = TM / 64;
  constexpr uint32_t step_b = b_rows ? 2 * kCoreBytes : 32;
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32;
  int const warp = warp_uniform(int(threadIdx.x) / 32 % 4);
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
  auto pass = [&](int count) {  // stages of the other warpgroup's tiles alone
    for (; count > 0; --count) {
      ptx::mbarrier_wait(bars.full_a + at.index * 8, at.parity);
      __syncwarp();
      release(at.index);
      at.advance(p.stages_a);
    }
  };
  uint32_t const done = bars.full_b + (group * 4 + warp) * 8, others_done = bars.full_b + ((1 - group) * 4 + warp) * 8;
  bool pending = false;  // the place has what is not yet known to have been read
  auto leave = [&] {
    if (pending && lane == 0) {
      ptx::cp_async_bulk_wait_group_read<0>();
      ptx::mbarrier_arrive(done);
    }
    pending = false;
  };
  uint32_t parity = group ^ 1;  // of the other warpgroup's tile before the next one; the very first passes at once
  float acc[halves][TN / 2];
  for (Lag lag; work.take(p, lag);) {
    if (p.bias != nullptr) {
      ptx::bar_sync(1 + group, kWarpgroup);  // the last filters' have been read
      for (int i = int(threadIdx.x) % kWarpgroup; i < TN; i += kWarpgroup)
        if (lag.n * TN + i < p.N)
          tables.bias[group][i] = static_cast<T const*>(p.bias)[(lag.n * TN + i) * p.bias_stride];
      ptx::bar_sync(1 + group, kWarpgroup);
    }
    pass(group * kLagSteps);
    int passed = group * kLagSteps;
    LagStep of(p, group * kLagSteps);
    for (int tile = lag.first + group; tile < lag.end; tile += lag.stride) {
#pragma unroll
      for (int h = 0; h < halves; ++h)
#pragma unroll
        for (int i = 0; i < TN / 2; ++i) acc[h][i] = 0;
      int before = -1;
      for (int step = 0; step < steps; ++step) {
        int const instructions = of.at.last_chunk() ? p.last : 4;
        ptx::mbarrier_wait(bars.full_a + at.index * 8, at.parity);
        uint32_t const from = ring + at.index * stage_bytes, from_a = from + group * p.a_bytes,
                       from_b = from + 2 * p.a_bytes;
#pragma unroll
        for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
        with_constant(instructions, [&](auto count) {
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < decltype(count)::value; ++k)
#pragma unroll
            for (int h = 0; h < halves; ++h)
              ptx::wgmma_mma_async<T, false, b_rows>(acc[h], at_address(layout_a, from_a + h * 64 * p.line + k * 32),
                                                     at_address(layout_b, from_b + k * step_b));
          ptx::wgmma_commit_group();
        });
        ptx::wgmma_wait_group<1>();
#pragma unroll
        for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
        release(before);
        before = at.index;
        at.advance(p.stages_a);
        of.advance(p);
        if (step == 1) leave();
      }
      passed += steps;
      ptx::wgmma_wait_group<0>();
#pragma unroll
      for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
      release(before);
      if (p.by_engine) {
        if (p.bias != nullptr) {
#pragma unroll
          for (int j = 0; j < TN / 8; ++j) {
            T const* const bias = tables.bias[group] + j * 8 + lane % 4 * 2;
            float const low = widen(bias[0]), high = widen(bias[1]);
#pragma unroll
            for (int h = 0; h < halves; ++h) {
              acc[h][j * 4] += low, acc[h][j * 4 + 1] += high;
              acc[h][j * 4 + 2] += low, acc[h][j * 4 + 3] += high;
            }
          }
        }
        ptx::mbarrier_wait(others_done, parity);
        parity ^= 1;
        lag_store<T, TM, TN>(p, tile, lag.n, acc, staging);
        pending = true;
        continue;
      }
      Unit unit;
      unit.phase = unit.group = 0, unit.m = tile, unit.n = lag.n, unit.part = -1;
#pragma unroll
      for (int h = 0; h < halves; ++h) store<T, TM, TN, false, true>(p, unit, h * 64, acc[h], tables, staging);
    }
    leave();
    int const left = lag.total - passed;
    pass(left);
    if ((left > 0) != (group == 1)) continue;  // else the first warpgroup has had a tile more
    if (group == 1 && p.by_engine) ptx::mbarrier_wait(others_done, parity);
    parity ^= 1;
  }
  if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();  // shared memory ends with the block
}

template <class T, int TM, int TN, bool b_rows>
__global__ void __launch_bounds__(kThreads, 1) lag_kernel(__grid_constant__ Params const p) {
  using S = Shape<T, TM, TN>;
  extern __shared__ uint8_t dynamic[];
  __shared__ Tables<T, TN> tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  if (threadIdx.x % 32 == 0) {
    for (int i = int(threadIdx.x) / 32; i < kMaxStages; i += kThreads / 32) {
      ptx::mbarrier_init(&tables.full_a[i], 3);  // copying threads
      ptx::mbarrier_init(&tables.empty_a[i], 8);
      ptx::mbarrier_init(&tables.full_b[i], 1);  // `done`
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
  LagWork work(p);
  if (threadIdx.x < 2 * kWarpgroup) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    lag_multiply<T, TM, TN, b_rows>(p, work, ring, tables);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    Barriers const bars(tables);
    int const copier = warp_uniform(int(threadIdx.x) / 32 % 4);
    if (copier == 3 || !ptx::elect()) return;
    Stage at;
    for (Lag lag; work.take(p, lag);)
      if (copier == 2)
        lag_copy_filters<T, TN, b_rows>(p, lag, ring, bars, at);
      else
        lag_copy_pixels<T, TM>(p, lag, ring, bars, copier, at);
    if (copier == 2) ptx::griddepcontrol_launch_dependents();
  }
}

template <class T, int TM, int TN>
struct LagShape : Shape<T, TM, TN> {
  static constexpr bool splits = false;
};

template <Op op, DType dtype, int TM, int TN>
cudaError_t launch_lag(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  using S = LagShape<T, TM, TN>;
  auto const adjust = [](Params& p, int64_t& blocks) {
    LagBlocks const lag(p.tiles_n.value, ceil_div(p.phase[0].tiles, 2));
    p.stages_a = Divisor((p.by_engine ? S::ring_beside_pieces : S::ring_bytes) / lag_stage_bytes(p));
    p.cycles = int32_t(lag.rounds), blocks = lag.blocks(p.tiles_n.value);
  };
  return launch_kernel<S, op, dtype, TM, TN>(lag_kernel<T, TM, TN, op == Op::dgrad>, problem, plan, args, stream,
                                             nullptr, nullptr, adjust);
}

}  // namespace conv2d_ext::tma
