// fprop and dgrad of dense convolutions in channels_last in TF32: what tma.cuh does for the 16-bit types, for float
// operands. wgmma truncates those, but they should be rounded to nearest:
//   A (pixels) passes through registers and is rounded there;
//   B (filters) has been rounded, its reduction's channels contiguous, by prepare_kernel. Variants raw and raw_halo,
//   for few pixels that meet many filters: by a warpgroup of the kernel's own, which reads copied stages and writes
//   those that are multiplied.
// The walk over the tiles, im2col, halo and the rings are tma.cuh's, whose comment explains them. The last tiles, which
// would not fill a round, are split.
//
// The order of the sum is free as long as A and B agree. A thread needs two channels of a line for each of a step's
// four instructions; channel_at orders the channels of a line so that these eight lie in two vectors of four.
#pragma once

#include "../core/tma_tf32.h"
#include "dependent.cuh"
#include "fragments.cuh"
#include "gather.cuh"
#include "tma_map.h"

namespace conv2d_ext::tf32 {

using tma::encode_im2col, tma::encode_tiled, tma::Tensor4;

constexpr int kThreads = 3 * kWarpgroup, kRawThreads = 4 * kWarpgroup;
constexpr int kMaxStages = 16;
constexpr int kPieceBytes = 64 * kLineBytes;  // 64 pixels of the output on their way

template <int TN>
struct Tables {
  int64_t out[2][64];  // where a piece's pixels go, or -1; for each warpgroup
  float bias[2][TN];
  uint64_t full_a[kMaxStages], empty_a[kMaxStages], full_b[kMaxStages], empty_b[kMaxStages];
  uint64_t full_raw[kMaxStages], empty_raw[kMaxStages];
};

template <int TM, int TN>
struct Shape {
  static constexpr int blocks = tf32_blocks(TM, TN);  // an SM
  static constexpr int halves = TM / 128;             // 64-row instructions of a warpgroup
  static constexpr int b_bytes = TN * kLineBytes;
  static constexpr int staging_bytes = 2 * kPieceBytes;
  static constexpr int ring_bytes = (blocks == 2 ? 93 : 205) * 1024;
  static constexpr int shared_bytes = ring_bytes + staging_bytes + 1024;  // the swizzle wants 1024-byte alignment
  // An SM has 228 KB, of which each block takes one more; the rest is in Tables.
  static constexpr int tables_bytes = int(sizeof(Tables<TN>));
  static_assert(blocks * (shared_bytes + tables_bytes + 1024) <= 228 * 1024);
  // 64K registers: three warpgroups of 128 threads in each block; the last only copies.
  static constexpr int copy_regs = blocks == 2 ? 32 : 56, multiply_regs = blocks == 2 ? 104 : 224;
};

// One phase: its pixels, its taps, and where they are.
struct Phase {
  int64_t M;              // pixels of A, padded columns included
  int64_t out;            // offset of its first pixel
  int32_t rows, columns;  // pixels an image; columns may include padded ones
  int32_t valid_columns;
  int32_t first_tile, steps;
  int32_t taps_w;        // copies of A a row of the filter
  int32_t taps_a;        // taps that each of them serves
  int32_t h0, w0;        // coordinates of pixel (0, 0) at tap (0, 0)
  int32_t tap_h, tap_w;  // how far a tap moves, in pixels
  int32_t first_r, first_s, step_r, step_s;
};

struct Params {
  CUtensorMap a[kMaxPhases];
  CUtensorMap b;
  Phase phase[kMaxPhases];
  int32_t phases, groups, splits;
  int32_t tiles, tiles_n;
  int32_t whole;  // the first tiles, which are not split
  int32_t stages_a, stages_b, stages_raw;
  int32_t chunks;              // lines of the reduction's channels
  int32_t a_bytes;             // of a stage of A
  int32_t stride_h, stride_w;  // A's pixels
  int32_t N;                   // columns of a group
  int32_t group_a;             // channels of A, columns or filters of B a group
  int32_t group_b;
  int64_t group_out, group_bias;
  int64_t out_n, out_h, out_w;
  void const* bias;
  int64_t bias_stride;
  void* out;
  void* workspace;
};

// What one block works on.
struct Unit {
  Phase const* phase;
  int32_t m, n, group;
  int32_t parts, index;  // `index` counts the partial tiles
  int32_t begin, count;  // steps

  __device__ Unit(Params const& p, int unit) {
    int tile = unit, split = 0;
    parts = 1, index = 0;
    if (unit >= p.whole) {
      int const rest = p.tiles - p.whole;
      parts = p.splits, index = unit - p.whole;
      split = index / rest, tile = p.whole + index % rest;
    }
    int i = p.phases - 1;
    while (tile < p.phase[i].first_tile) --i;
    phase = &p.phase[i];
    tile -= phase->first_tile;
    n = tile % p.tiles_n;
    tile /= p.tiles_n;
    group = tile % p.groups;
    m = tile / p.groups;
    int const each = (phase->steps + parts - 1) / parts;
    begin = split * each;
    int const rest = phase->steps - begin;
    count = rest < 0 ? 0 : rest < each ? rest : each;
  }
};

__device__ inline int units(Params const& p) { return p.whole + (p.tiles - p.whole) * p.splits; }

// The offset of pixel m, or -1.
__device__ inline int64_t out_of(Params const& p, Phase const& phase, int64_t m) {
  if (m >= phase.M) return -1;
  int64_t j = m, i = divide(j, phase.columns);
  if (j >= phase.valid_columns) return -1;
  int64_t const n = divide(i, phase.rows);
  return phase.out + n * p.out_n + i * p.out_h + j * p.out_w;
}

// A ring of stages of B.
struct RingB {
  uint32_t first;
  int stages;
  uint64_t *full, *empty;
};

// b_rows: B's rows are contiguous in memory, not its channels.
template <int TM, int TN, bool b_rows>
__device__ void copy(Params const& p, uint32_t ring, Tables<TN>& tables, RingB const& ring_b) {
  using S = Shape<TM, TN>;
  Stage a, b;
  for (int u = blockIdx.x; u < units(p); u += gridDim.x) {
    Unit const unit(p, u);
    Phase const& phase = *unit.phase;
    int64_t j = int64_t(unit.m) * TM;
    int64_t i = divide(j, phase.columns);
    int const n = int(divide(i, phase.rows));
    int const h = phase.h0 + int(i) * p.stride_h, w = phase.w0 + int(j) * p.stride_w;
    void const* const map_a = &p.a[unit.phase - p.phase];
    int chunk = unit.begin % p.chunks, tap_w = unit.begin / p.chunks % phase.taps_w,
        tap_h = unit.begin / p.chunks / phase.taps_w;
    for (int step = 0; step < unit.count; ++step) {
      ptx::mbarrier_wait(&tables.empty_a[a.index], a.parity ^ 1);  // passes at once on the first trip round the ring
      ptx::mbarrier_arrive_expect_tx(&tables.full_a[a.index], p.a_bytes);
      ptx::cp_async_bulk_tensor_im2col(ring + a.index * p.a_bytes, map_a, &tables.full_a[a.index],
                                       unit.group * p.group_a + chunk * kTf32Line, w, h, n, tap_w * phase.tap_w,
                                       tap_h * phase.tap_h);
      a.advance(p.stages_a);
      int const r = phase.first_r + tap_h * phase.step_r;
      for (int t = 0; t < phase.taps_a; ++t) {
        int const s = phase.first_s + (tap_w + t) * phase.step_s;
        uint64_t* const bar = &ring_b.full[b.index];
        uint32_t const to = ring_b.first + b.index * S::b_bytes;
        ptx::mbarrier_wait(&ring_b.empty[b.index], b.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(bar, S::b_bytes);
        if constexpr (b_rows) {  // 32 channels of the reduction, 32 rows each, at a time
#pragma unroll
          for (int run = 0; run < TN / kTf32Line; ++run)
            ptx::cp_async_bulk_tensor_4d(to + run * kTf32Line * kLineBytes, &p.b, bar, unit.n * TN + run * kTf32Line, s,
                                         r, unit.group * p.group_b + chunk * kTf32Line);
        } else {
          ptx::cp_async_bulk_tensor_4d(to, &p.b, bar, chunk * kTf32Line, s, r, unit.group * p.group_b + unit.n * TN);
        }
        b.advance(ring_b.stages);
      }
      if (++chunk == p.chunks) {
        chunk = 0;
        if (++tap_w == phase.taps_w) {
          tap_w = 0;
          ++tap_h;
        }
      }
    }
  }
}

// Stores a warpgroup's 64 x TN accumulators from row `first` of the tile on. A thread has those of rows lane / 4 and
// lane / 4 + 8 of its warp's 16, columns 8 j + 2 (lane % 4) + {0, 1}. Pieces of 64 rows and 32 columns pass through
// shared memory, so that eight lanes store the line of a pixel.
template <int TM, int TN>
__device__ void store(Params const& p, Unit const& unit, int first, float (&acc)[TN / 2], Tables<TN>& tables,
                      uint32_t staging) {
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  int const thread = int(threadIdx.x) % kWarpgroup, quad = lane % 4, row = warp * 16 + lane / 4;
  if (unit.parts > 1) {
    float* const partial = static_cast<float*>(p.workspace) + int64_t(unit.index) * (TM * TN) + first * TN;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < TN / 8; ++j)
        *reinterpret_cast<float2*>(partial + (row + half * 8) * TN + j * 8 + quad * 2) =
            make_float2(acc[j * 4 + half * 2], acc[j * 4 + half * 2 + 1]);
    return;
  }
  int64_t* const to = tables.out[group];
  ptx::bar_sync(1 + group, kWarpgroup);  // the last piece has been read, the bias written
  if (thread < 64) to[thread] = out_of(p, *unit.phase, int64_t(unit.m) * TM + first + thread);
  if (p.bias != nullptr) {
    float const* const bias = tables.bias[group];
#pragma unroll
    for (int j = 0; j < TN / 8; ++j) {
      float2 const pair = *reinterpret_cast<float2 const*>(bias + j * 8 + quad * 2);
      acc[j * 4] += pair.x, acc[j * 4 + 1] += pair.y;
      acc[j * 4 + 2] += pair.x, acc[j * 4 + 3] += pair.y;
    }
  }
  int const n = unit.n * TN + thread % 8 * 4;
  float* const out = static_cast<float*>(p.out) + unit.group * p.group_out + n;
#pragma unroll
  for (int piece = 0; piece < TN / 32; ++piece) {
    if (piece > 0) ptx::bar_sync(1 + group, kWarpgroup);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int const line = row + i % 2 * 8, chunk = i / 2 * 2 + quad / 2, at = (piece * 4 + i / 2) * 4 + i % 2 * 2;
      ptx::st_shared_f32x2(staging + line * kLineBytes + (chunk ^ (line % 8)) * 16 + quad % 2 * 8, acc[at],
                           acc[at + 1]);
    }
    ptx::bar_sync(1 + group, kWarpgroup);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const line = thread / 8 + i * 16;
      uint4 const v = ptx::ld_shared_v4(staging + line * kLineBytes + ((thread % 8) ^ (line % 8)) * 16);
      if (to[line] >= 0 && n + piece * 32 < p.N) *reinterpret_cast<uint4*>(out + to[line] + piece * 32) = v;
    }
  }
}

// The channel at a place of a prepared line. Instruction i / 8 takes places 8 (i / 8) to 8 (i / 8) + 7; lane % 4 = q
// has places q and q + 4 of them, which are channels 8 q + 2 (i / 8) and the next.
__host__ __device__ constexpr int channel_at(int i) { return i % 4 * 8 + i / 8 * 2 + i / 4 % 2; }

// A's values for instructions 2 i and 2 i + 1 of a line, rounded.
__device__ inline void load(uint32_t (&v)[2][4], uint32_t line, int lane, int i) {
  uint32_t const at = line + lane / 4 * kLineBytes;
  uint32_t const chunk = uint32_t(lane % 4 * 2 + i) ^ (at / kLineBytes % 8);  // the ring is 1024-byte aligned
  uint4 const low = ptx::ld_shared_v4(at + chunk * 16), high = ptx::ld_shared_v4(at + kCoreBytes + chunk * 16);
  v[0][0] = low.x, v[0][1] = high.x, v[0][2] = low.y, v[0][3] = high.y;
  v[1][0] = low.z, v[1][1] = high.z, v[1][2] = low.w, v[1][3] = high.w;
#pragma unroll
  for (int e = 0; e < 8; ++e) v[e / 4][e % 4] = ptx::cvt_rn_tf32(__uint_as_float(v[e / 4][e % 4]));
}

template <int TM, int TN>
__device__ void multiply(Params const& p, uint32_t ring, Tables<TN>& tables) {
  using S = Shape<TM, TN>;
  constexpr int halves = S::halves;
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  uint32_t const ring_b = ring + p.stages_a * p.a_bytes;
  uint32_t const my_a = ring + (group * (TM / 2) + warp * 16) * kLineBytes;
  uint32_t const staging = ring + S::ring_bytes + group * kPieceBytes;
  Stage a, b;
  float acc[halves][TN / 2];
  uint32_t v[2][2][4] = {};
  for (int u = blockIdx.x; u < units(p); u += gridDim.x) {
    Unit const unit(p, u);
#pragma unroll
    for (int h = 0; h < halves; ++h)
#pragma unroll
      for (int i = 0; i < TN / 2; ++i) acc[h][i] = 0;
    int before = -1;  // stage of B of the multiplications that are under way
    Phase const& phase = *unit.phase;
    float bias[(TN + kWarpgroup - 1) / kWarpgroup] = {};  // on its way while the tile is multiplied
    if (p.bias != nullptr)
#pragma unroll
      for (int i = 0; i < TN; i += kWarpgroup) {
        int const n = i + int(threadIdx.x) % kWarpgroup, at = unit.n * TN + n;
        if (n < TN && at < p.N)
          bias[i / kWarpgroup] = static_cast<float const*>(p.bias)[unit.group * p.group_bias + at * p.bias_stride];
      }
    for (int step = 0; step < unit.count; ++step) {
      ptx::mbarrier_wait(&tables.full_a[a.index], a.parity);
      for (int t = 0; t < phase.taps_a; ++t) {
        uint32_t const from_a = my_a + a.index * p.a_bytes + t * phase.tap_w * kLineBytes;
        uint32_t const from_b = ring_b + b.index * S::b_bytes;
#pragma unroll
        for (int part = 0; part < 2 * halves; ++part) {  // one is loaded and rounded while the one before is multiplied
          int const i = part / halves, h = part % halves;
          ptx::wgmma_wait_group<1>();
          ptx::wgmma_fence_operand(v[part % 2]);
          load(v[part % 2], from_a + h * 64 * kLineBytes, lane, i);
          if (part == 0) ptx::mbarrier_wait(&tables.full_b[b.index], b.parity);
          if (part == 1 && lane == 0 && before >= 0) ptx::mbarrier_arrive(&tables.empty_b[before]);
          ptx::wgmma_fence_operand(acc[h]);
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < 2; ++k)
            ptx::wgmma_mma_async_tf32(acc[h], v[part % 2][k],
                                      ptx::wgmma_descriptor(from_b + (i * 2 + k) * 32, 0, kCoreBytes));
          ptx::wgmma_commit_group();
        }
        before = b.index;
        b.advance(p.stages_b);
      }
      if (lane == 0) ptx::mbarrier_arrive(&tables.empty_a[a.index]);
      a.advance(p.stages_a);
    }
    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
    if (lane == 0 && before >= 0) ptx::mbarrier_arrive(&tables.empty_b[before]);
    if (p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < TN; i += kWarpgroup) {
        int const n = i + int(threadIdx.x) % kWarpgroup;
        if (n < TN) tables.bias[group][n] = bias[i / kWarpgroup];
      }
    }
#pragma unroll
    for (int h = 0; h < halves; ++h) store<TM, TN>(p, unit, group * (TM / 2) + h * 64, acc[h], tables, staging);
  }
}

// fillers_b: arrivals that fill a stage of B.
template <int TN>
__device__ void init_barriers(Tables<TN>& tables, int fillers_b) {
  for (int i = 0; i < kMaxStages; ++i) {
    ptx::mbarrier_init(&tables.full_a[i], 1);
    ptx::mbarrier_init(&tables.empty_a[i], 8);  // multiplying warps
    ptx::mbarrier_init(&tables.full_b[i], fillers_b);
    ptx::mbarrier_init(&tables.empty_b[i], 8);
    ptx::mbarrier_init(&tables.full_raw[i], 1);
    ptx::mbarrier_init(&tables.empty_raw[i], 4);  // rounding warps
  }
  ptx::fence_mbarrier_init();
}

template <int TM, int TN>
__global__ void __launch_bounds__(kThreads, Shape<TM, TN>::blocks) main_kernel(__grid_constant__ Params const p) {
  using S = Shape<TM, TN>;
  extern __shared__ uint8_t dynamic[];
  __shared__ Tables<TN> tables;
  uint32_t const ring = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) init_barriers(tables, 1);
  __syncthreads();
  if (threadIdx.x < 2 * kWarpgroup) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    multiply<TM, TN>(p, ring, tables);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    if (threadIdx.x == 2 * kWarpgroup) {
      ptx::griddepcontrol_wait();  // for B
      copy<TM, TN, false>(p, ring, tables, {ring + p.stages_a * p.a_bytes, p.stages_b, tables.full_b, tables.empty_b});
    }
  }
}

constexpr int kRoundedStages = 2;

// A warpgroup's work in the raw variants: rounds the copied stages of B and orders their channels. b_rows: their lines
// hold columns of one filter, and are turned as well.
template <int TM, int TN, bool b_rows>
__device__ void round_b(Params const& p, RingB const& from, uint32_t to, Tables<TN>& tables) {
  using S = Shape<TM, TN>;
  int const thread = int(threadIdx.x) % kWarpgroup, warp = thread / 32, lane = thread % 32;
  Stage raw, b;
  for (int u = blockIdx.x; u < units(p); u += gridDim.x) {
    Unit const unit(p, u);
    for (int step = 0; step < unit.count * unit.phase->taps_a; ++step) {
      uint32_t const source = from.first + raw.index * S::b_bytes, rounded = to + b.index * S::b_bytes;
      ptx::mbarrier_wait(&from.full[raw.index], raw.parity);
      ptx::mbarrier_wait(&tables.empty_b[b.index], b.parity ^ 1);
      if constexpr (b_rows) {  // a warp has eight places of every line; a lane has a line of each run
#pragma unroll
        for (int run = 0; run < TN / 32; ++run) {
          uint32_t v[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            int const k = channel_at(i) + warp * 2;
            v[i] = ptx::cvt_rn_tf32(
                ptx::ld_shared_f32(source + (run * 32 + k) * kLineBytes + ((lane / 4) ^ (k % 8)) * 16 + lane % 4 * 4));
          }
          uint32_t const line = rounded + (run * 32 + lane) * kLineBytes;
          ptx::st_shared_v4(line + ((warp * 2) ^ (lane % 8)) * 16, make_uint4(v[0], v[1], v[2], v[3]));
          ptx::st_shared_v4(line + ((warp * 2 + 1) ^ (lane % 8)) * 16, make_uint4(v[4], v[5], v[6], v[7]));
        }
      } else {  // a thread has a line
#pragma unroll
        for (int line = thread; line < TN; line += kWarpgroup) {
          uint32_t v[32];
#pragma unroll
          for (int chunk = 0; chunk < 8; ++chunk) {
            uint4 const c = ptx::ld_shared_v4(source + line * kLineBytes + (chunk ^ (line % 8)) * 16);
            v[chunk * 4] = c.x, v[chunk * 4 + 1] = c.y, v[chunk * 4 + 2] = c.z, v[chunk * 4 + 3] = c.w;
          }
#pragma unroll
          for (int i = 0; i < 32; ++i) v[i] = ptx::cvt_rn_tf32(__uint_as_float(v[i]));
#pragma unroll
          for (int chunk = 0; chunk < 8; ++chunk)
            ptx::st_shared_v4(rounded + line * kLineBytes + (chunk ^ (line % 8)) * 16,
                              make_uint4(v[channel_at(chunk * 4)], v[channel_at(chunk * 4 + 1)],
                                         v[channel_at(chunk * 4 + 2)], v[channel_at(chunk * 4 + 3)]));
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

template <int TM, int TN, bool b_rows>
__global__ void __launch_bounds__(kRawThreads, 1) raw_kernel(__grid_constant__ Params const p) {
  using S = Shape<TM, TN>;
  static_assert(S::blocks == 1);
  // 64K registers: two multiplying warpgroups, one that rounds, one that copies.
  constexpr int multiply_regs = 200, round_regs = 64, copy_regs = 48;
  static_assert((2 * multiply_regs + round_regs + copy_regs) * kWarpgroup <= 65536);
  extern __shared__ uint8_t dynamic[];
  __shared__ Tables<TN> tables;
  uint32_t const ring = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  uint32_t const rounded = ring + p.stages_a * p.a_bytes;
  RingB const raw{rounded + p.stages_b * S::b_bytes, p.stages_raw, tables.full_raw, tables.empty_raw};
  if (threadIdx.x == 0) init_barriers(tables, 4);
  __syncthreads();
  int const role = int(threadIdx.x) / kWarpgroup;
  if (role < 2) {
    ptx::setmaxnreg_inc<multiply_regs>();
    multiply<TM, TN>(p, ring, tables);
  } else if (role == 2) {
    ptx::setmaxnreg_dec<round_regs>();
    round_b<TM, TN, b_rows>(p, raw, rounded, tables);
  } else {
    ptx::setmaxnreg_dec<copy_regs>();
    if (threadIdx.x == 3 * kWarpgroup) copy<TM, TN, b_rows>(p, ring, tables, raw);
  }
}

// The filters rounded, for each row of B and tap the reduction's channels in lines of 32, in the order of channel_at,
// zeros after the last.
struct PrepareParams {
  float const* w;
  float* out;
  int32_t N, K, taps_w;         // rows of B and channels a group; S
  int32_t taps, lines, blocks;  // lines: of a row and tap; blocks: of 32 rows
  int64_t tiles;
  int64_t n, k, r, s, g;  // element strides of w; g: from a group to the next
};

// A tile of 32 rows and a line of one tap passes through shared memory. rows: B's rows are contiguous in w, not its
// channels.
template <bool rows>
__global__ void __launch_bounds__(256) prepare_kernel(__grid_constant__ PrepareParams const p) {
  __shared__ float tile[32][kTf32Line + 1];  // row, channel
  ptx::griddepcontrol_launch_dependents();
  int const i = int(threadIdx.x) / 8, j = int(threadIdx.x) % 8 * 4;
  for (int64_t t = blockIdx.x; t < p.tiles; t += gridDim.x) {
    int64_t line = t, tap = divide(line, p.lines), block = divide(tap, p.taps), group = divide(block, p.blocks);
    int64_t s = tap, r = divide(s, p.taps_w);
    int const n0 = int(block) * 32, k0 = int(line) * kTf32Line;
    int const n = n0 + (rows ? j : i), k = k0 + (rows ? i : j);
    float4 v = make_float4(0, 0, 0, 0);
    if (n < p.N && k < p.K)
      v = *reinterpret_cast<float4 const*>(p.w + group * p.g + n * p.n + k * p.k + r * p.r + s * p.s);
    float const values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) (rows ? tile[j + e][i] : tile[i][j + e]) = values[e];
    __syncthreads();
    if (n0 + i < p.N) {
      uint4 rounded;
      rounded.x = ptx::cvt_rn_tf32(tile[i][channel_at(j)]);
      rounded.y = ptx::cvt_rn_tf32(tile[i][channel_at(j + 1)]);
      rounded.z = ptx::cvt_rn_tf32(tile[i][channel_at(j + 2)]);
      rounded.w = ptx::cvt_rn_tf32(tile[i][channel_at(j + 3)]);
      int64_t const to = ((group * p.N + n0 + i) * p.taps + r * p.taps_w + s) * p.lines + line;
      *reinterpret_cast<uint4*>(p.out + to * kTf32Line + j) = rounded;
    }
    __syncthreads();
  }
}

// Sums the partial tiles in the order of the splits; a thread has four columns.
template <int TM, int TN>
__global__ void __launch_bounds__(256) reduce_kernel(__grid_constant__ Params const p) {
  Unit const unit(p, p.whole + int(blockIdx.x));
  int const first = (int(blockIdx.y) * 256 + int(threadIdx.x)) * 4;
  int64_t const to = out_of(p, *unit.phase, int64_t(unit.m) * TM + first / TN);
  int const n = unit.n * TN + first % TN;
  if (to < 0 || n >= p.N) return;
  float const* partial = static_cast<float const*>(p.workspace) + int64_t(unit.index) * (TM * TN) + first;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int split = 0; split < p.splits; ++split, partial += int64_t(p.tiles - p.whole) * (TM * TN)) {
    float4 const v = *reinterpret_cast<float4 const*>(partial);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  if (p.bias != nullptr) {
    float const* const bias = static_cast<float const*>(p.bias) + unit.group * p.group_bias + n * p.bias_stride;
    sum.x += bias[0], sum.y += bias[p.bias_stride], sum.z += bias[2 * p.bias_stride], sum.w += bias[3 * p.bias_stride];
  }
  *reinterpret_cast<float4*>(static_cast<float*>(p.out) + unit.group * p.group_out + to + n) = sum;
}

template <int TM, int TN>
cudaError_t params_of(Params& q, Op op, Variant variant, Problem const& p, Plan const& plan, Arguments const& args,
                      int sm_count) {
  using S = Shape<TM, TN>;
  bool const forward = op == Op::fprop, halo = tf32_is_halo(variant);
  int64_t const C = forward ? p.C_per_group() : p.K_per_group();  // of the reduction
  Strides const &in = forward ? p.x : p.y, &out = forward ? p.y : p.x;
  int64_t const in_H = forward ? p.H : p.P(), in_W = forward ? p.W : p.Q();
  q.groups = int32_t(p.groups), q.splits = plan.split_k;
  q.chunks = int32_t(ceil_div(C, kTf32Line));
  q.N = int32_t(forward ? p.K_per_group() : p.C_per_group());
  q.tiles_n = int32_t(ceil_div(q.N, TN));
  q.group_a = int32_t(C);
  q.group_out = q.N;
  q.group_bias = q.N * args.bias_stride;
  q.bias = args.bias, q.bias_stride = args.bias_stride, q.out = args.out, q.workspace = args.workspace;
  q.out_n = out.n, q.out_h = out.h, q.out_w = out.w;
  q.stride_h = q.stride_w = 1;
  q.a_bytes = (halo ? TM + kHalo : TM) * kLineBytes;
  if (forward)
    q.stride_h = int32_t(p.stride_h), q.stride_w = int32_t(p.stride_w);
  else
    q.out_h *= p.stride_h, q.out_w *= p.stride_w;
  int64_t const phases_w = forward ? 1 : phases_of(p.W, p.stride_w);
  q.phases = int32_t(forward ? 1 : phases_of(p.H, p.stride_h) * phases_w);
  int64_t tiles = 0;
  for (int i = 0; i < q.phases; ++i) {
    Walk const h = walk_h(op, p, i / phases_w);
    Walk w = walk_w(op, p, i % phases_w);
    Phase& f = q.phase[i];
    bool const taps = h.taps > 0 && w.taps > 0;
    f.valid_columns = int32_t(w.pixels);
    if (halo && taps) w = halo_walk(w);
    f.rows = int32_t(h.pixels), f.columns = int32_t(w.pixels);
    f.M = p.N * h.pixels * w.pixels;
    f.first_tile = int32_t(tiles);
    tiles += ceil_div(f.M, TM) * q.tiles_n * p.groups;
    f.taps_w = int32_t(halo ? 1 : w.taps), f.taps_a = int32_t(halo ? w.taps : 1);
    f.steps = taps ? int32_t(h.taps * f.taps_w * q.chunks) : 0;
    f.h0 = int32_t(h.lower), f.w0 = int32_t(w.lower);
    f.tap_h = int32_t(h.tap_stride), f.tap_w = int32_t(w.tap_stride);
    f.first_r = int32_t(h.first_tap), f.step_r = int32_t(h.tap_step);
    f.first_s = int32_t(w.first_tap), f.step_s = int32_t(w.tap_step);
    f.out = forward ? 0 : i / phases_w * out.h + i % phases_w * out.w;
    if (!taps) continue;
    Tensor4 const a{args.a, p.dtype, {C * p.groups, in_W, in_H, p.N}, {1, in.w, in.h, in.n}};
    cudaError_t const error = encode_im2col(q.a[i], a, h, w, kTf32Line, halo ? TM + kHalo : TM);
    if (error != cudaSuccess) return error;
  }
  q.tiles = int32_t(tiles);
  q.whole = int32_t(tf32_whole(tiles, q.splits, int64_t(sm_count) * S::blocks));
  q.stages_a = halo ? (S::blocks == 2 ? 2 : 3) : S::ring_bytes / (q.a_bytes + S::b_bytes);
  q.stages_b = int32_t(min64((S::ring_bytes - q.stages_a * q.a_bytes) / S::b_bytes, kMaxStages));
  return cudaSuccess;
}

// The filters as they are, for the raw variants.
template <Op op, int TM, int TN>
cudaError_t launch_raw(Params& p, Problem const& problem, void const* filters, int64_t blocks, cudaStream_t stream) {
  using S = Shape<TM, TN>;
  constexpr bool b_rows = op == Op::dgrad;
  Strides const& w = problem.w;
  p.group_b = int32_t(problem.K_per_group());
  p.stages_b = kRoundedStages;
  int const ring = S::ring_bytes - p.stages_b * S::b_bytes;
  p.stages_a = min64(p.stages_a, ring / (p.a_bytes + S::b_bytes));
  p.stages_raw = int32_t(min64((ring - p.stages_a * p.a_bytes) / S::b_bytes, kMaxStages));
  Tensor4 const b{filters, DType::f32, {problem.C_per_group(), problem.S, problem.R, problem.K}, {1, w.w, w.h, w.n}};
  cudaError_t error = encode_tiled(p.b, b, kTf32Line, 1, 1, b_rows ? kTf32Line : TN);
  if (error != cudaSuccess) return error;
  auto* const kernel = raw_kernel<TM, TN, b_rows>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(blocks), kRawThreads, S::shared_bytes, stream>>>(p);
  return cudaGetLastError();
}

// Prepared beforehand, for the others.
template <Op op, int TM, int TN>
cudaError_t launch_prepared(Params& p, Problem const& problem, void const* filters, int64_t blocks, int sm_count,
                            cudaStream_t stream) {
  using S = Shape<TM, TN>;
  constexpr bool forward = op == Op::fprop;
  Strides const& w = problem.w;
  int64_t const C = problem.C_per_group(), K = problem.K_per_group(), taps = problem.R * problem.S;
  int64_t const depth = forward ? C : K, rows = forward ? K : C;
  PrepareParams q{};
  q.w = static_cast<float const*>(filters), q.out = static_cast<float*>(p.workspace);
  q.N = int32_t(rows), q.K = int32_t(depth), q.taps_w = int32_t(problem.S), q.taps = int32_t(taps);
  q.lines = int32_t(ceil_div(depth, kTf32Line)), q.blocks = int32_t(ceil_div(rows, 32));
  q.tiles = problem.groups * q.blocks * taps * q.lines;
  q.n = forward ? w.n : w.c, q.k = forward ? w.c : w.n, q.r = w.h, q.s = w.w, q.g = K * w.n;
  prepare_kernel<!forward><<<unsigned(min64(q.tiles, sm_count * 8)), 256, 0, stream>>>(q);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  p.group_b = int32_t(rows);
  int64_t const row = q.lines * kTf32Line;
  Tensor4 const b{
      q.out, DType::f32, {row, problem.S, problem.R, rows * problem.groups}, {1, row, problem.S * row, taps * row}};
  if ((error = encode_tiled(p.b, b, kTf32Line, 1, 1, TN)) != cudaSuccess) return error;
  p.workspace = q.out + rows * problem.groups * taps * row;
  auto* const kernel = main_kernel<TM, TN>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
  if (error != cudaSuccess) return error;
  return launch_dependent(kernel, blocks, kThreads, S::shared_bytes, stream, p);
}

template <Op op, int TM, int TN, Variant variant>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using S = Shape<TM, TN>;
  int device = 0, sm_count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if ((error = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device)) != cudaSuccess) return error;
  Params p{};
  if ((error = params_of<TM, TN>(p, op, variant, problem, plan, args, sm_count)) != cudaSuccess) return error;
  int64_t const all = p.whole + int64_t(p.tiles - p.whole) * p.splits;
  int64_t const blocks = min64(all, int64_t(sm_count) * S::blocks);
  if constexpr (tf32_is_raw(variant))
    error = launch_raw<op, TM, TN>(p, problem, args.b, blocks, stream);
  else
    error = launch_prepared<op, TM, TN>(p, problem, args.b, blocks, sm_count, stream);
  if (error != cudaSuccess || p.tiles == p.whole) return error;
  reduce_kernel<TM, TN><<<dim3(unsigned(p.tiles - p.whole), TM * TN / 1024), 256, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::tf32
