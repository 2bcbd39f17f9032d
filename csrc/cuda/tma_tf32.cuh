// fprop and dgrad of dense convolutions in channels_last in TF32: the kernels of tma.cuh and tma_swap.cuh for floats.
// The copy engine rounds both operands as it copies them, to nearest; wgmma would truncate them.
//
// wgmma takes TF32 operands with the reduction contiguous only. The filters of fprop are so; for dgrad they are turned
// beforehand, by prepare_kernel. Variants raw and raw_halo, for few pixels that meet many filters: by a warpgroup of
// the kernel's own, which reads copied stages and writes those that are multiplied.
#pragma once

#include "../core/tma_tf32.h"
#include "dependent.cuh"
#include "tma_swap.cuh"

namespace conv2d_ext::tf32 {

using tma::encode_filters, tma::encode_im2col, tma::kMaxStages, tma::params_of, tma::Phase, tma::Step, tma::Unit,
    tma::Work;
using Params = tma::Params;

constexpr int kRawThreads = 4 * kWarpgroup, kRawBarriers = 2 * kMaxStages * int(sizeof(uint64_t));

// The ring of stages of filters as they are.
struct RawRing {
  uint32_t first;
  int stages;
  uint64_t *full, *empty;
};

// Copies of 32 filters, 32 channels each, at a time.
template <int TM, int TN>
__device__ void raw_copy(Params const& p, uint32_t ring, tma::Tables<float, TN>& tables, RawRing const& raw) {
  constexpr int b_bytes = TN * kLineBytes;
  Stage a, b;
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
      ptx::mbarrier_wait(&tables.empty_a[a.index], a.parity ^ 1);  // passes at once on the first trip round the ring
      ptx::mbarrier_arrive_expect_tx(&tables.full_a[a.index], p.a_bytes);
      tma::copy_pixels(p, ring + a.index * p.a_bytes, p.a[unit.phase], &tables.full_a[a.index], unit.group, k, w, h, n,
                       at.tap_w * phase.tap_w, at.tap_h * phase.tap_h);
      a.advance(p.stages_a);
      int const r = phase.first_r + at.tap_h * phase.step_r, taps = phase.taps_a - (at.tap_w >= phase.full_copies);
      for (int t = 0; t < taps; ++t) {
        int const s = phase.first_s + (at.tap_w + t * phase.taps_w) * phase.step_s;
        uint64_t* const bar = &raw.full[b.index];
        uint32_t const to = raw.first + b.index * b_bytes;
        ptx::mbarrier_wait(&raw.empty[b.index], b.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(bar, b_bytes);
#pragma unroll
        for (int run = 0; run < TN / kTf32Line; ++run)
          ptx::cp_async_bulk_tensor_5d(to + run * kTf32Line * kLineBytes, &p.b, bar, unit.n * TN + run * kTf32Line, s,
                                       r, k, unit.group);
        b.advance(raw.stages);
      }
    }
  }
}

constexpr int kTurnedStages = 3;

// Turns the copied stages, whose lines hold columns of one filter: a warp has eight of the filters, a lane a column of
// each 32.
template <int TM, int TN>
__device__ void raw_turn(Params const& p, RawRing const& from, uint32_t to, tma::Tables<float, TN>& tables) {
  constexpr int b_bytes = TN * kLineBytes, together = 2;  // as many runs as there are registers for
  static_assert(TN / 32 % together == 0);
  int const warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  Stage raw, b;
  Work work(p);
  for (Unit unit; work.take(p, unit);) {
    int stages = 0;
    Phase const& phase = p.phase[unit.phase];
    for (Step at(p, phase, unit.begin); unit.count > 0; --unit.count, at.advance())
      stages += phase.taps_a - (at.tap_w >= phase.full_copies);
    for (; stages > 0; --stages) {
      uint32_t const source = from.first + raw.index * b_bytes, turned = to + b.index * b_bytes;
      ptx::mbarrier_wait(&from.full[raw.index], raw.parity);
      ptx::mbarrier_wait(&tables.empty_b[b.index], b.parity ^ 1);
#pragma unroll
      for (int first = 0; first < TN / 32; first += together) {
        uint32_t v[together][8];
#pragma unroll
        for (int i = 0; i < together * 8; ++i) {
          int const line = (first + i / 8) * 32 + warp * 8 + i % 8;
          v[i / 8][i % 8] = ptx::ld_shared(source + line * kLineBytes + ((lane / 4) ^ (i % 8)) * 16 + lane % 4 * 4);
        }
#pragma unroll
        for (int run = 0; run < together; ++run) {
          uint32_t const line = turned + ((first + run) * 32 + lane) * kLineBytes;
          uint32_t const(&u)[8] = v[run];
          ptx::st_shared_v4(line + ((warp * 2) ^ (lane % 8)) * 16, make_uint4(u[0], u[1], u[2], u[3]));
          ptx::st_shared_v4(line + ((warp * 2 + 1) ^ (lane % 8)) * 16, make_uint4(u[4], u[5], u[6], u[7]));
        }
      }
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) {
        ptx::mbarrier_arrive(&tables.full_b[b.index]);
        ptx::mbarrier_arrive(&from.empty[raw.index]);
      }
      raw.advance(from.stages);
      b.advance(p.stages_b);
    }
  }
}

template <int TM, int TN>
__global__ void __launch_bounds__(kRawThreads, 1) raw_kernel(__grid_constant__ Params const p, int stages_raw) {
  using S = tma::Shape<float, TM, TN>;
  static_assert(S::blocks == 1 && (S::tables_bytes + kRawBarriers + 1023) / 1024 == (S::tables_bytes + 1023) / 1024);
  // 64K registers: two multiplying warpgroups, one that turns, one that copies.
  constexpr int multiply_regs = 208, turn_regs = 56, copy_regs = 40;
  static_assert((2 * multiply_regs + turn_regs + copy_regs) * kWarpgroup <= 65536);
  extern __shared__ uint8_t dynamic[];
  __shared__ tma::Tables<float, TN> tables;
  __shared__ uint64_t full_raw[kMaxStages], empty_raw[kMaxStages];
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  uint32_t const turned = ring + p.stages_a * p.a_bytes;
  RawRing const raw{turned + p.stages_b * S::b_bytes, stages_raw, full_raw, empty_raw};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxStages; ++i) {
      ptx::mbarrier_init(&tables.full_a[i], 1);
      ptx::mbarrier_init(&tables.empty_a[i], 8);  // multiplying warps
      ptx::mbarrier_init(&tables.full_b[i], 4);   // turning warps
      ptx::mbarrier_init(&tables.empty_b[i], 8);
      ptx::mbarrier_init(&full_raw[i], 1);
      ptx::mbarrier_init(&empty_raw[i], 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  int const role = int(threadIdx.x) / kWarpgroup;
  if (role < 2) {
    ptx::setmaxnreg_inc<multiply_regs>();
    tma::multiply<float, TM, TN, false>(p, ring, tables);
  } else if (role == 2) {
    ptx::setmaxnreg_dec<turn_regs>();
    raw_turn<TM, TN>(p, raw, turned, tables);
  } else {
    ptx::setmaxnreg_dec<copy_regs>();
    if (threadIdx.x == 3 * kWarpgroup) {
      raw_copy<TM, TN>(p, ring, tables, raw);
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
};

// A tile of 32 channels and a line of one tap passes through shared memory.
template <int threads>
__global__ void __launch_bounds__(threads) prepare_kernel(__grid_constant__ PrepareParams const p) {
  static_assert(threads == 256);
  __shared__ float tile[32][kTf32Line + 1];  // channel, filter
  ptx::griddepcontrol_launch_dependents();
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
  using S = tma::Shape<float, TM, TN>;
  p.stages_b = tma::Divisor(kTurnedStages);
  int const ring = (p.by_engine ? S::ring_beside_pieces : S::ring_bytes) - kTurnedStages * S::b_bytes;
  int64_t const stages_a = min64(p.stages_a.value, ring / (p.a_bytes + S::b_bytes));
  int const stages_raw = int(min64((ring - stages_a * p.a_bytes) / S::b_bytes, kMaxStages));
  p.stages_a = tma::Divisor(stages_a);
  cudaError_t error = encode_filters(p.b, filters, problem, kTf32Line, kTf32Line, true);
  if (error != cudaSuccess) return error;
  auto* const kernel = raw_kernel<TM, TN>;
  constexpr int shared_bytes = S::shared_bytes - kRawBarriers;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(blocks), kRawThreads, shared_bytes, stream>>>(p, stages_raw);
  return cudaGetLastError();
}

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
  prepare_kernel<256><<<unsigned(min64(q.tiles, sm_count * 8)), 256, 0, stream>>>(q);
  int64_t const row = q.lines * kTf32Line;
  filters = q.out, of_filters.C = row * problem.groups, of_filters.K = rows * problem.groups;
  of_filters.w = {taps * row, 1, problem.S * row, row};
  p.workspace = q.out + rows * problem.groups * taps * row;
  return cudaGetLastError();
}

template <Op op, int TM, int TN, Variant variant>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  constexpr bool swapped = TM == 256 && TN == 64;
  using S = std::conditional_t<swapped, tma::SwapShape, tma::Shape<float, TM, TN>>;
  int device = 0, sm_count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if ((error = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device)) != cudaSuccess) return error;
  Params p{};
  int64_t blocks = 0;
  error = params_of<S, float, TM, TN>(p, blocks, op, problem, kRows[plan.kernel], plan, args);
  if (error != cudaSuccess) return error;
  if (p.shares.shared == 0) blocks = min64(blocks, int64_t(sm_count) * S::blocks);
  Phase const& first = p.phase[0];
  if (!swapped && is_halo(variant) && first.taps_w > 1) {  // a copy of A serves fewer taps: more on their way
    int64_t const room = S::ring_bytes / (p.a_bytes + first.taps * S::b_bytes / first.taps_w);
    int64_t const stages_a = max64(p.stages_a.value, min64(room, kMaxStages));
    p.stages_a = tma::Divisor(stages_a);
    p.stages_b = tma::Divisor(min64((S::ring_bytes - stages_a * p.a_bytes) / S::b_bytes, kMaxStages));
  }
  if constexpr (tf32_is_raw(variant)) {
    error = launch_raw<TM, TN>(p, problem, args.b, blocks, stream);
  } else {
    void const* filters = args.b;
    Problem of_filters = problem;
    if (op == Op::dgrad && (error = prepare(p, filters, of_filters, problem, sm_count, stream)) != cudaSuccess)
      return error;
    error = encode_filters(p.b, filters, of_filters, kTf32Line, int(min64(TN, p.N)), true);
    if (error != cudaSuccess) return error;
    if (p.keep_b) blocks -= blocks % (p.tiles_n.value * p.groups.value);
    void (*kernel)(Params) = nullptr;
    if constexpr (swapped)
      kernel = tma::tma_swap_kernel<float, false>;
    else
      kernel = tma::tma_kernel<float, TM, TN, false>;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
    if (error != cudaSuccess) return error;
    error = launch_dependent(kernel, dim3(unsigned(blocks)), tma::kThreads, S::shared_bytes, stream, p);
  }
  if (error != cudaSuccess || p.shares.shared == 0) return error;
  return tma::launch_reduce(tma::tma_reduce<float, TM, TN>, p, TM * TN / (4 * tma::kReduceThreads), sm_count, stream);
}

}  // namespace conv2d_ext::tf32
