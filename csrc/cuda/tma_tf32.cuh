// fprop and dgrad of dense convolutions in channels_last in TF32: the kernels of tma.cuh and tma_swap.cuh for floats.
// The copy engine rounds both operands as it copies them, to nearest; wgmma would truncate them.
//
// wgmma takes TF32 operands from shared memory with the reduction contiguous only. The filters of fprop are so; for
// dgrad they are turned beforehand, by prepare_kernel. Variants raw and raw_halo read them as they are, with the
// operands exchanged: the channels are the rows of the instruction, whose fragments come from registers, and the pixels
// its columns.
#pragma once

#include "../core/turned_filters.h"
#include "dependent.cuh"
#include "tma_lag.cuh"
#include "tma_small.cuh"
#include "tma_swap.cuh"

namespace conv2d_ext::tf32 {

using tma::encode_filters, tma::encode_im2col, tma::params_of, tma::Phase, tma::share_phases, tma::Step, tma::Unit,
    tma::Work;
using Params = tma::Params;

// raw: a tile's TN channels are the rows, 64 a warpgroup, its TM pixels the columns. A stage of filters has lines of 32
// channels of a filter, 32 filters for each of TN / 32 runs.
template <int TM, int TN>
struct RawShape {
  static_assert(TN == 128 && (TM == 128 || TM == 256));
  static constexpr int run_bytes = kTf32Line * kLineBytes, b_bytes = TN * kLineBytes;
  static constexpr int ring_bytes = 205 * 1024;
  static constexpr int shared_bytes = ring_bytes + 2 * tma::kRunBytes + 1024;
  static constexpr int copy_regs = 56, multiply_regs = 224;
};

template <int TM>
struct RawTables {
  int64_t out[2][TM];  // where a tile's pixels go, or -1; for each warpgroup
  uint64_t full_a[kMaxStages], empty_a[kMaxStages], full_b[kMaxStages], empty_b[kMaxStages];
};

// The channel of row i of a warp's first eight rows; row i + 8 has the next one, so that a thread loads two neighbours.
// Of the 16 lanes that load at a time, eight have channels that are 16 further than those of the others: they read, of
// four filters, every bank once.
__device__ inline int raw_channel(int warp, int i) {
  return warp / 2 * 32 + (warp % 2 * 2 + i / 4 + i / 2 % 2 * 4) * 4 + i % 2 * 2;
}

// Two threads, one copies pixels, the other filters.
template <int TM, int TN>
__device__ void raw_copy(Params const& p, uint32_t ring, RawTables<TM>& tables, bool pixels) {
  using S = RawShape<TM, TN>;
  uint32_t const ring_b = ring + p.stages_a * p.a_bytes;
  Stage stage;
  Work work(p);
  for (Unit unit; work.take(p, unit);) {
    Phase const& phase = p.phase[unit.phase];
    int64_t j = int64_t(unit.m) * TM;
    int64_t i = phase.columns.divide(j);
    int const n = int(phase.rows.divide(i));
    int const h = phase.h0 + int(i), w = phase.w0 + int(j);
    Step at(p, phase, unit.begin);
    for (int step = 0; step < unit.count; ++step, at.advance()) {
      int const k = at.chunk * kTf32Line;
      if (pixels) {
        ptx::mbarrier_wait(&tables.empty_a[stage.index], stage.parity ^ 1);  // passes at once on the first trip
        ptx::mbarrier_arrive_expect_tx(&tables.full_a[stage.index], p.a_bytes);
        tma::copy_pixels(p, ring + stage.index * p.a_bytes, p.a[unit.phase], &tables.full_a[stage.index], unit.group, k,
                         w, h, n, at.tap_w * phase.tap_w, at.tap_h * phase.tap_h);
        stage.advance(p.stages_a);
        continue;
      }
      int const r = phase.first_r + at.tap_h * phase.step_r, taps = phase.taps_a - (at.tap_w >= phase.full_copies);
      for (int t = 0; t < taps; ++t) {
        int const s = phase.first_s + (at.tap_w + t * phase.taps_w) * phase.step_s;
        uint64_t* const bar = &tables.full_b[stage.index];
        ptx::mbarrier_wait(&tables.empty_b[stage.index], stage.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(bar, S::b_bytes);
#pragma unroll
        for (int run = 0; run < TN / kTf32Line; ++run)
          ptx::cp_async_bulk_tensor_5d(ring_b + stage.index * S::b_bytes + run * S::run_bytes, &p.b, bar,
                                       unit.n * TN + run * kTf32Line, s, r, k, unit.group);
        stage.advance(p.stages_b);
      }
    }
  }
}

// Stores a warpgroup's accumulators: a thread has those of channels first and first + 1 of the 64, pixels
// 8 j + 2 (lane % 4) + {0, 1}. Pieces of 32 pixels pass through shared memory, two lines each, so that eight lanes
// store the line of a pixel; where the result takes no vectors, a channel's 32 pixels are a line, which a warp stores
// at once.
template <int TM, int TN>
__device__ void raw_store(Params const& p, Unit const& unit, float const (&acc)[TM / 2], int64_t const* to,
                          uint32_t staging) {
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  int const quad = lane % 4, first = raw_channel(warp, lane / 4);
  if (unit.part >= 0) {
    float* const partial = static_cast<float*>(p.workspace) + int64_t(unit.part) * (TM * TN) + group * 64 + first;
#pragma unroll
    for (int i = 0; i < TM / 4; ++i)
      *reinterpret_cast<float2*>(partial + (i / 2 * 8 + quad * 2 + i % 2) * TN) =
          make_float2(acc[i / 2 * 4 + i % 2], acc[i / 2 * 4 + i % 2 + 2]);
    return;
  }
  int const n = unit.n * TN + group * 64;
  float* const out = static_cast<float*>(p.out) + unit.group * p.group_out;
  if (p.singly) {
    uint32_t const lines = staging + warp * tma::kPieceBytes;
#pragma unroll
    for (int piece = 0; piece < TM / 32; ++piece) {
      int64_t const pixel = to[piece * 32 + lane];
      tma::swap_piece(acc, piece, lines, [&](int i, float v) {
        int const column = n + raw_channel(warp, i % 8) + i / 8;
        if (pixel >= 0 && column < p.N) __stcs(out + pixel + column * p.out_c, v);
      });
    }
    return;
  }
  // Chunks are exchanged so that a store of a warp meets every bank once.
  auto at = [&](int pixel, int channel) {
    return staging + (channel / 32 * 32 + pixel) * kLineBytes + ((channel % 32 / 4) ^ (pixel / 2 % 4)) * 16 +
           channel % 4 * 4;
  };
#pragma unroll
  for (int piece = 0; piece < TM / 32; ++piece) {
    ptx::bar_sync(1 + group, kWarpgroup);  // the last piece has been read
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int const a = piece * 16 + i / 2 * 4 + i % 2;
      ptx::st_shared_f32x2(at(i / 2 * 8 + quad * 2 + i % 2, first), acc[a], acc[a + 2]);
    }
    ptx::bar_sync(1 + group, kWarpgroup);
    tma::store_float_piece(p, at, out, n, to + piece * 32);
  }
}

template <int TM, int TN>
__device__ void raw_multiply(Params const& p, uint32_t ring, RawTables<TM>& tables) {
  using S = RawShape<TM, TN>;
  constexpr int together = 2, parts = kTf32Line / 8 / together;  // instructions whose fragments are loaded together
  static_assert(parts == 2);
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32;
  int const thread = int(threadIdx.x) % kWarpgroup;
  // A thread's two channels in the lines of filters lane % 4 and lane % 4 + 4.
  int const first = raw_channel(thread / 32, lane / 4), chunk = first % 32 / 4;
  uint32_t const lines = ring + p.stages_a * p.a_bytes + (group * 2 + first / 32) * S::run_bytes + first % 4 * 4;
  uint32_t const low = lines + lane % 4 * kLineBytes + (chunk ^ (lane % 4)) * 16;
  uint32_t const high = lines + (lane % 4 + 4) * kLineBytes + (chunk ^ (lane % 4 + 4)) * 16;
  uint64_t const layout = tma::layout_of(kLineBytes);
  uint32_t const staging = ring + S::ring_bytes + group * tma::kRunBytes;
  tma::Barriers const bars(tables);
  int64_t* const to = tables.out[group];
  Stage a, b;
  float acc[TM / 2];
  uint32_t v[parts][together][4] = {};
  Work work(p);
  for (Unit unit; work.take(p, unit);) {
    Phase const& phase = p.phase[unit.phase];
    if (unit.part < 0) {
      ptx::bar_sync(1 + group, kWarpgroup);  // the last tile's offsets have been read
#pragma unroll
      for (int i = thread; i < TM; i += kWarpgroup) to[i] = tma::out_of(p, phase, int64_t(unit.m) * TM + i);
    }
#pragma unroll
    for (int i = 0; i < TM / 2; ++i) acc[i] = 0;
    int before_a = -1;  // stage of the multiplications that are under way
    uint32_t const shift = phase.shift * kLineBytes;
    int const taps_a = phase.taps_a, full_copies = phase.full_copies;
    Step at(p, phase, unit.begin);
    for (int step = 0; step < unit.count; ++step, at.advance()) {
      int const taps = taps_a - (at.tap_w >= full_copies);
      ptx::mbarrier_wait(bars.full_a + a.index * 8, a.parity);
      uint32_t from_a = ring + a.index * p.a_bytes;
      for (int t = 0; t < taps; ++t, from_a += shift) {
        ptx::mbarrier_wait(bars.full_b + b.index * 8, b.parity);
#pragma unroll
        for (int part = 0; part < parts; ++part) {  // fragments are loaded while those before are multiplied
          ptx::wgmma_wait_group<1>();
          ptx::wgmma_fence_operand(v[part]);
#pragma unroll
          for (int i = 0; i < together; ++i) {
            uint32_t const offset = b.index * S::b_bytes + (part * together + i) * kCoreBytes;
            uint2 const l = ptx::ld_shared_v2(low + offset), h = ptx::ld_shared_v2(high + offset);
            v[part][i][0] = l.x, v[part][i][1] = l.y, v[part][i][2] = h.x, v[part][i][3] = h.y;
          }
          if (part == 1 && lane == 0 && before_a >= 0) ptx::mbarrier_arrive(bars.empty_a + before_a * 8);
          ptx::wgmma_fence_operand(acc);
          ptx::wgmma_fence();
#pragma unroll
          for (int i = 0; i < together; ++i)
            ptx::wgmma_mma_async_tf32(acc, v[part][i], tma::at_address(layout, from_a + (part * together + i) * 32));
          ptx::wgmma_commit_group();
        }
        if (lane == 0) ptx::mbarrier_arrive(bars.empty_b + b.index * 8);
        before_a = t == taps - 1 ? a.index : -1;
        b.advance(p.stages_b);
      }
      a.advance(p.stages_a);
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
    if (lane == 0 && before_a >= 0) ptx::mbarrier_arrive(bars.empty_a + before_a * 8);
    ptx::bar_sync(1 + group, kWarpgroup);  // the offsets have been written
    raw_store<TM, TN>(p, unit, acc, to, staging);
  }
}

template <int TM, int TN>
__global__ void __launch_bounds__(tma::kThreads, 1) raw_kernel(__grid_constant__ Params const p) {
  using S = RawShape<TM, TN>;
  extern __shared__ uint8_t dynamic[];
  __shared__ RawTables<TM> tables;
  static_assert(S::shared_bytes + sizeof(tables) + 1024 <= 228 * 1024);
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  if (threadIdx.x == 2 * kWarpgroup) {
    if (p.phase[0].steps > 0) ptx::prefetch_tensormap(&p.a[0]);
    ptx::prefetch_tensormap(&p.b);
  }
  if (threadIdx.x % 32 == 0) {
    constexpr int warps = 8;  // that read a stage
    for (int i = int(threadIdx.x) / 32; i < kMaxStages; i += tma::kThreads / 32) {
      ptx::mbarrier_init(&tables.full_a[i], 1);
      ptx::mbarrier_init(&tables.empty_a[i], warps);
      ptx::mbarrier_init(&tables.full_b[i], 1);
      ptx::mbarrier_init(&tables.empty_b[i], warps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();  // for what the kernel before has packed
  if (threadIdx.x < 2 * kWarpgroup) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    raw_multiply<TM, TN>(p, ring, tables);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    if (threadIdx.x % 32 == 0 && threadIdx.x < 2 * kWarpgroup + 64) {
      raw_copy<TM, TN>(p, ring, tables, threadIdx.x == 2 * kWarpgroup);
      ptx::griddepcontrol_launch_dependents();
    }
  }
}

// The filters turned: for each channel and tap of dgrad, the filters in whole lines of 32, zeros after the last.
struct PrepareParams {
  float const* w;
  float* out;
  int32_t N, K, taps_w;         // channels and filters a group; S
  int32_t taps, lines, blocks;  // lines: of a channel and tap; blocks: of 32 channels
  int64_t tiles;
  int64_t k, r, s, g;  // element strides of w; g: from a group to the next
  bool early;          // the launch behind may begin before this one ends
};

// A tile of 32 channels and a line of one tap passes through shared memory.
template <int threads>
__global__ void __launch_bounds__(threads) prepare_kernel(__grid_constant__ PrepareParams const p) {
  static_assert(threads == 256);
  __shared__ float tile[32][kTf32Line + 1];  // channel, filter
  if (p.early) ptx::griddepcontrol_launch_dependents();
  int const i = int(threadIdx.x) / 8, j = int(threadIdx.x) % 8 * 4;
  for (int64_t t = blockIdx.x; t < p.tiles; t += gridDim.x) {
    int64_t line = t, tap = divide(line, p.lines), block = divide(tap, p.taps), group = divide(block, p.blocks);
    int64_t s = tap, r = divide(s, p.taps_w);
    int const n0 = int(block) * 32, n = n0 + j, k = int(line) * kTf32Line + i;
    float4 v = make_float4(0, 0, 0, 0);
    if (n < p.N && k < p.K) v = *reinterpret_cast<float4 const*>(p.w + group * p.g + n + k * p.k + r * p.r + s * p.s);
    tile[j][i] = v.x, tile[j + 1][i] = v.y, tile[j + 2][i] = v.z, tile[j + 3][i] = v.w;
    __syncthreads();
    if (n0 + i < p.N) {
      int64_t const to = ((group * p.N + n0 + i) * p.taps + r * p.taps_w + s) * p.lines + line;
      *reinterpret_cast<float4*>(p.out + to * kTf32Line + j) =
          make_float4(tile[i][j], tile[i][j + 1], tile[i][j + 2], tile[i][j + 3]);
    }
    __syncthreads();
  }
}

template <int TM, int TN>
cudaError_t launch_raw(Params& p, Problem const& problem, void const* filters, int64_t blocks, cudaStream_t stream) {
  using S = RawShape<TM, TN>;
  int64_t const taps = p.phase[0].taps_w == 0 ? 1 : ceil_div(p.phase[0].taps, p.phase[0].taps_w);  // that share a copy
  int64_t const stages_a = min64(max64(S::ring_bytes / (p.a_bytes + taps * S::b_bytes), 2), kMaxStages);
  p.stages_a = tma::Divisor(stages_a);
  p.stages_b = tma::Divisor(min64((S::ring_bytes - stages_a * p.a_bytes) / S::b_bytes, kMaxStages));
  p.by_engine = false;
  cudaError_t error = encode_filters(p.b, filters, problem, kTf32Line, kTf32Line, true);
  if (error != cudaSuccess) return error;
  auto* const kernel = raw_kernel<TM, TN>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
  if (error != cudaSuccess) return error;
  return launch_dependent(kernel, dim3(unsigned(blocks)), tma::kThreads, S::shared_bytes, stream, p);
}

// Beyond, what the launch behind would gain by an early begin is less than it loses: its blocks would be where SMs
// become free first, and neighbours, which read the same lines, no longer beside each other.
constexpr double kEarlyFlops = 1e10;

// Strides of turned filters whose channels are what they count.
constexpr Strides turned_filters(Strides const& w) { return {w.c, w.n, w.h, w.w}; }

// Turns the filters of dgrad. `filters` and `of_filters` then are the copy, at the beginning of the workspace.
inline cudaError_t prepare(Params& p, void const*& filters, Problem& of_filters, Problem const& problem, int sm_count,
                           cudaStream_t stream) {
  Strides const& w = problem.w;
  int64_t const K = problem.K_per_group(), taps = problem.R * problem.S, rows = problem.C_per_group();
  PrepareParams q{};
  q.w = static_cast<float const*>(filters), q.out = static_cast<float*>(p.workspace);
  q.N = int32_t(rows), q.K = int32_t(K), q.taps_w = int32_t(problem.S), q.taps = int32_t(taps);
  q.lines = int32_t(ceil_div(K, kTf32Line)), q.blocks = int32_t(ceil_div(rows, 32));
  q.tiles = problem.groups * q.blocks * taps * q.lines;
  q.k = w.n, q.r = w.h, q.s = w.w, q.g = K * w.n;
  q.early = problem.flops() < kEarlyFlops;
  prepare_kernel<256><<<unsigned(min64(q.tiles, sm_count * 8)), 256, 0, stream>>>(q);
  int64_t const row = q.lines * kTf32Line;
  filters = q.out, of_filters.C = row * problem.groups, of_filters.K = rows * problem.groups;
  of_filters.w = turned_filters(turned_strides(problem));
  p.workspace = q.out + rows * problem.groups * taps * row;
  return cudaGetLastError();
}

// TM: pixels of a tile, of which a row of tma_swap.cuh has several. slices: fprop's.
template <Op op, int TM, int TN, Variant variant, bool swapped, int slices = 1>
cudaError_t launch_tiles(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using S = std::conditional_t<swapped, tma::SwapTile<TM>, tma::Shape<float, TM, TN>>;
  int sm_count = 0;
  cudaError_t error = count_sms(sm_count);
  if (error != cudaSuccess) return error;
  Params p{};
  int64_t blocks = 0;
  Problem const as_one = slices > 1 ? merged(problem, slices) : problem;
  error = params_of<S, float, TM, TN>(p, blocks, op, as_one, row_of(plan), plan, args, true, slices);
  if (error != cudaSuccess) return error;
  if constexpr (swapped)
    tma::overlap_tiles<TM>(p, op == Op::fprop ? problem.C_per_group() : problem.K_per_group(),
                           op == Op::fprop ? problem.N * problem.K * problem.P() * problem.Q()
                                           : problem.N * problem.C * problem.H * problem.W);
  if (p.shares.shared == 0) blocks = min64(blocks, int64_t(sm_count) * S::blocks);
  Phase const& first = p.phase[0];
  if (!swapped && is_halo(variant) && first.taps_w > 1 &&
      !p.keep_b) {  // a copy of A serves fewer taps: more on their way
    int64_t const room = S::ring_bytes / (p.a_bytes + first.taps * S::b_bytes / first.taps_w);
    int64_t const stages_a = max64(p.stages_a.value, min64(room, kMaxStages));
    p.stages_a = tma::Divisor(stages_a);
    p.stages_b = tma::Divisor(min64((S::ring_bytes - stages_a * p.a_bytes) / S::b_bytes, kMaxStages));
  }
  if constexpr (tf32_is_raw(variant)) {
    share_phases(p, blocks);
    error = launch_raw<TM, TN>(p, problem, args.b, blocks, stream);
  } else {
    void const* filters = args.b;
    Problem of_filters = problem;
    if (op == Op::dgrad && has_turned_filters(problem))
      of_filters.C = problem.w.w, of_filters.K = problem.C, of_filters.w = turned_filters(problem.w);
    else if (op == Op::dgrad && (error = prepare(p, filters, of_filters, problem, sm_count, stream)) != cudaSuccess)
      return error;
    of_filters.C /= slices, of_filters.groups /= slices;
    error = encode_filters(p.b, filters, of_filters, kTf32Line / slices, int(min64(TN, p.N)), true);
    if (error != cudaSuccess) return error;
    if (p.keep_b) blocks -= blocks % (p.tiles_n.value * p.groups.value);
    share_phases(p, blocks);
    void (*kernel)(Params) = nullptr;
    if constexpr (swapped && TM == kTf32ShortTile)
      kernel = tma::tma_swap_kernel<float, false, TM, true>;
    else if constexpr (swapped)
      kernel = p.plain ? tma::tma_swap_kernel<float, false, TM, true> : tma::tma_swap_kernel<float, false, TM>;
    else if constexpr (TM == 64)
      kernel = p.plain ? tma::small_kernel<float, TN, false, true> : tma::small_kernel<float, TN, false, false>;
    else
      kernel = tma::tma_kernel<float, TM, TN, tma::A::pixels, false, false, false, slices>;
    if constexpr (op == Op::fprop && TM == 128 && TN == 128 && variant == Variant::im2col && slices == 1)
      if (tf32_takes_turns(row_of(plan), problem, plan.split_k))
        kernel = tma::tma_kernel<float, TM, TN, tma::A::pixels, false, false, false, 1, true>;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
    if (error != cudaSuccess) return error;
    error = launch_dependent(kernel, dim3(unsigned(blocks)), tma::kThreads, S::shared_bytes, stream, p);
  }
  if (error != cudaSuccess || p.shares.shared == 0) return error;
  if constexpr (S::splits)
    error = tma::launch_reduce(tma::tma_reduce<float, TM, TN>, p, TM * TN / (4 * tma::kReduceThreads), stream);
  return error;
}

template <Op op, int TM, int TN, Variant variant>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  constexpr bool swapped = TM == 256 && TN == 64;
  if constexpr (op == Op::fprop && TN == 32 && is_halo(variant))
    if (sliced_groups(row_of(plan), problem) == 2)
      return launch_tiles<op, TM, TN, variant, swapped, 2>(problem, plan, args, stream);
  if constexpr (op == Op::fprop && variant == Variant::im2col && TM == 128 && TN == kLagColumns)
    if (tf32_lags(row_of(plan), op, problem, plan.split_k))
      return tma::launch_lag<op, DType::f32, kLagPixels, TN>(problem, plan, args, stream);
  if constexpr (swapped && op == Op::fprop && is_halo(variant))
    if (tf32_short_tiles(problem, plan.split_k))
      return launch_tiles<op, kTf32ShortTile, TN, variant, true>(problem, plan, args, stream);
  if constexpr (swapped) {
    switch (tma_tile_pixels(row_of(plan), problem, plan.split_k)) {
      case 232:
        return launch_tiles<op, 232, TN, variant, true>(problem, plan, args, stream);
      case 248:
        return launch_tiles<op, 248, TN, variant, true>(problem, plan, args, stream);
    }
  }
  return launch_tiles<op, TM, TN, variant, swapped>(problem, plan, args, stream);
}

}  // namespace conv2d_ext::tf32
