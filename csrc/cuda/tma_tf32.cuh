// fprop and dgrad of dense convolutions in channels_last in TF32: what tma.cuh does for the 16-bit types, for float
// operands. wgmma truncates those, but they should be rounded to nearest:
//   A (pixels) passes through registers and is rounded there;
//   B (filters) has been rounded, its reduction's channels contiguous, by prepare_kernel. Variants raw and raw_halo,
//   for few pixels that meet many filters: by a warpgroup of the kernel's own, which reads copied stages and writes
//   those that are multiplied.
// Tiles, splits, im2col and the rings are tma.cuh's, whose comment explains them. Variant halo takes any stride along
// W: taps whose distance is a multiple of it share a copy.
//
// The order of the sum is free as long as A and B agree. A thread needs two channels of a line for each of a step's
// four instructions; channel_at orders the channels of a line so that these eight lie in two vectors of four.
#pragma once

#include "../core/tma_tf32.h"
#include "dependent.cuh"
#include "tma.cuh"

namespace conv2d_ext::tf32 {

using tma::encode_filters, tma::encode_im2col, tma::kMaxStages, tma::out_of, tma::params_of, tma::Phase, tma::Unit,
    tma::Work;
using Params = tma::Params;

constexpr int kThreads = 3 * kWarpgroup, kRawThreads = 4 * kWarpgroup;
constexpr int kPieceBytes = 64 * kLineBytes;  // 64 pixels of the output on their way

template <int TM, int TN>
struct Tables {
  int64_t out[2][2][TM / 2];  // where a tile's pixels go, or -1; for each warpgroup, every other tile
  float bias[2][TN];
  uint64_t full_a[kMaxStages], empty_a[kMaxStages], full_b[kMaxStages], empty_b[kMaxStages];
  uint64_t full_raw[kMaxStages], empty_raw[kMaxStages];
};

template <int TM, int TN>
struct Shape {
  static constexpr int blocks = TM * TN <= 128 * 64 ? 2 : 1;  // an SM
  static constexpr int halves = TM / 128;                     // 64-row instructions of a warpgroup
  static constexpr bool keeps_b = false;
  static constexpr int kept_bytes(int, int, bool) { return 0; }
  static constexpr int pieces = 0;  // of the output that the copy engine stores
  static constexpr int b_bytes = TN * kLineBytes;
  static constexpr int staging_bytes = 2 * kPieceBytes;
  static constexpr int ring_bytes = (blocks == 2 ? 90 : 203) * 1024, ring_beside_pieces = ring_bytes;
  static constexpr int shared_bytes = ring_bytes + staging_bytes + 1024;  // the swizzle wants 1024-byte alignment
  // An SM has 228 KB, of which each block takes one more; the rest is in Tables.
  static constexpr int tables_bytes = int(sizeof(Tables<TM, TN>));
  static_assert(blocks * (shared_bytes + tables_bytes + 1024) <= 228 * 1024);
  // 64K registers: three warpgroups of 128 threads in each block; the last only copies.
  static constexpr int copy_regs = blocks == 2 ? 48 : 56, multiply_regs = blocks == 2 ? 96 : 224;
};

// A ring of stages of B.
struct RingB {
  uint32_t first;
  int stages;
  uint64_t *full, *empty;
};

// A step of the reduction: one copy of A, a line of its channels, which serves `taps` taps. All taps of a line follow
// each other: they read the same pixels, which stay in L2.
struct Step {
  int32_t copy, chunk, tap_h, taps_h;

  __device__ Step(Phase const& phase, Params const& p, int step)
      : copy(0), chunk(0), tap_h(0), taps_h(phase.steps / max(phase.taps_w * p.chunks, 1)) {
    if (step == 0) return;
    copy = step % phase.taps_w;
    step /= phase.taps_w;
    tap_h = step % taps_h, chunk = step / taps_h;
  }
  __device__ int taps(Phase const& phase) const { return phase.taps_a - (copy >= phase.full_copies); }
  __device__ void advance(Phase const& phase) {
    if (++copy < phase.taps_w) return;
    copy = 0;
    if (++tap_h < taps_h) return;
    tap_h = 0;
    ++chunk;
  }
};

// b_rows: B's rows are contiguous in memory, not its channels.
template <int TM, int TN, bool b_rows>
__device__ void copy(Params const& p, uint32_t ring, Tables<TM, TN>& tables, RingB const& ring_b) {
  using S = Shape<TM, TN>;
  Stage a, b;
  Work work(p);
  for (Unit unit; work.take(p, unit);) {
    Phase const& phase = p.phase[unit.phase];
    int64_t j = int64_t(unit.m) * TM;
    int64_t i = phase.columns.divide(j);
    int const n = int(phase.rows.divide(i));
    int const h = phase.h0 + int(i) * p.stride_h, w = phase.w0 + int(j) * p.stride_w;
    CUtensorMap const& map_a = p.a[unit.phase];
    Step at(phase, p, unit.begin);
    for (int step = 0; step < unit.count; ++step, at.advance(phase)) {
      ptx::mbarrier_wait(&tables.empty_a[a.index], a.parity ^ 1);  // passes at once on the first trip round the ring
      ptx::mbarrier_arrive_expect_tx(&tables.full_a[a.index], p.a_bytes);
      tma::copy_pixels(p, ring + a.index * p.a_bytes, map_a, &tables.full_a[a.index], unit.group, at.chunk * kTf32Line,
                       w, h, n, at.copy * phase.tap_w, at.tap_h * phase.tap_h);
      a.advance(p.stages_a);
      int const r = phase.first_r + at.tap_h * phase.step_r, taps = at.taps(phase);
      for (int t = 0; t < taps; ++t) {
        int const s = phase.first_s + (at.copy + t * phase.taps_w) * phase.step_s;
        uint64_t* const bar = &ring_b.full[b.index];
        uint32_t const to = ring_b.first + b.index * S::b_bytes;
        ptx::mbarrier_wait(&ring_b.empty[b.index], b.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(bar, S::b_bytes);
        if constexpr (b_rows) {  // 32 channels of the reduction, 32 rows each, at a time
#pragma unroll
          for (int run = 0; run < TN / kTf32Line; ++run)
            ptx::cp_async_bulk_tensor_5d(to + run * kTf32Line * kLineBytes, &p.b, bar, unit.n * TN + run * kTf32Line, s,
                                         r, at.chunk * kTf32Line, unit.group);
        } else {
          ptx::cp_async_bulk_tensor_5d(to, &p.b, bar, at.chunk * kTf32Line, s, r, unit.n * TN, unit.group);
        }
        b.advance(ring_b.stages);
      }
    }
  }
}

// Stores a warp's 16 lines of 32 columns, from column n on, that are in shared memory, to an output that takes no
// vectors of columns: eight lanes have neighbouring pixels.
__device__ inline void store_singly(Params const& p, Unit const& unit, int n, int64_t const* to, uint32_t lines) {
  int const lane = int(threadIdx.x) % 32, line = lane % 8;
  int64_t const low = to[line], high = to[line + 8];
  n += lane / 8;
  float* out = static_cast<float*>(p.out) + unit.group * p.group_out + n * p.out_c;
#pragma unroll 1
  for (int chunk = 0; chunk < 8 && n < p.N; ++chunk, n += 4, out += 4 * p.out_c) {
    uint32_t const from = lines + line * kLineBytes + (chunk ^ line) * 16 + lane / 8 * 4;
    float const first = ptx::ld_shared_f32(from), second = ptx::ld_shared_f32(from + kCoreBytes);
    if (low >= 0) out[low] = first;
    if (high >= 0) out[high] = second;
  }
}

// Stores 64 x TN accumulators; their pixels' offsets are `to`. A thread has those of rows lane / 4 and
// lane / 4 + 8 of its warp's 16, columns 8 j + 2 (lane % 4) + {0, 1}. Pieces of 64 rows and 32 columns pass through
// shared memory, so that eight lanes store the line of a pixel.
template <int TM, int TN>
__device__ void store(Params const& p, Unit const& unit, int64_t const* to, float (&acc)[TN / 2],
                      Tables<TM, TN> const& tables, uint32_t staging) {
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  int const thread = int(threadIdx.x) % kWarpgroup, quad = lane % 4, row = warp * 16 + lane / 4;
  ptx::bar_sync(1 + group, kWarpgroup);  // the last piece has been read; `to` and the bias are written
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
    if (p.singly) {
      store_singly(p, unit, unit.n * TN + piece * 32, to + warp * 16, staging + warp * 16 * kLineBytes);
      continue;
    }
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

// A's values for `count` instructions of a line from `first` on, rounded.
template <int count>
__device__ inline void load(uint32_t (&v)[count][4], uint32_t line, int lane, int first) {
  uint32_t const at = line + lane / 4 * kLineBytes;
#pragma unroll
  for (int i = 0; i < count; i += 2) {
    uint32_t const chunk =
        uint32_t(lane % 4 * 2 + (first + i) / 2) ^ (at / kLineBytes % 8);  // the ring is 1024-byte aligned
    uint4 const low = ptx::ld_shared_v4(at + chunk * 16), high = ptx::ld_shared_v4(at + kCoreBytes + chunk * 16);
    v[i][0] = low.x, v[i][1] = high.x, v[i][2] = low.y, v[i][3] = high.y;
    v[i + 1][0] = low.z, v[i + 1][1] = high.z, v[i + 1][2] = low.w, v[i + 1][3] = high.w;
  }
#pragma unroll
  for (int e = 0; e < count * 4; ++e) v[e / 4][e % 4] = ptx::cvt_rn_tf32(__uint_as_float(v[e / 4][e % 4]));
}

// together: instructions of a line that follow each other, as many as there are registers for; the next are loaded
// while they run.
template <int TM, int TN, int together>
__device__ void multiply(Params const& p, uint32_t ring, Tables<TM, TN>& tables) {
  using S = Shape<TM, TN>;
  constexpr int halves = S::halves;
  static_assert(halves == 2 || together == 4);
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), warp = int(threadIdx.x) / 32 % 4;
  int const lane = int(threadIdx.x) % 32;
  uint32_t const ring_b = ring + p.stages_a * p.a_bytes;
  uint32_t const my_a = ring + (group * (TM / 2) + warp * 16) * kLineBytes;
  uint32_t const staging = ring + S::ring_bytes + group * kPieceBytes;
  auto release = [&](int stage_b) {  // -1: none
    if (lane == 0 && stage_b >= 0) ptx::mbarrier_arrive(&tables.empty_b[stage_b]);
  };
  Stage a, b;
  float acc[halves][TN / 2];
  uint32_t v[2][together][4] = {};
  Work work(p);
  int odd = 0;  // of the tile's number
  for (Unit unit; work.take(p, unit); odd ^= 1) {
    Phase const& phase = p.phase[unit.phase];
    int64_t* const to = tables.out[group][odd];
    if (int const row = int(threadIdx.x) % kWarpgroup; row < TM / 2)
      to[row] = out_of(p, phase, int64_t(unit.m) * TM + group * (TM / 2) + row);
#pragma unroll
    for (int h = 0; h < halves; ++h)
#pragma unroll
      for (int i = 0; i < TN / 2; ++i) acc[h][i] = 0;
    int before = -1, oldest = -1;  // stages of B of the multiplications that are under way
    bool odd_tap = false;
    float bias[(TN + kWarpgroup - 1) / kWarpgroup] = {};  // on its way while the tile is multiplied
    if (p.bias != nullptr)
#pragma unroll
      for (int i = 0; i < TN; i += kWarpgroup) {
        int const n = i + int(threadIdx.x) % kWarpgroup, at = unit.n * TN + n;
        if (n < TN && at < p.N)
          bias[i / kWarpgroup] = static_cast<float const*>(p.bias)[unit.group * p.group_bias + at * p.bias_stride];
      }
    int copy = unit.begin == 0 ? 0 : unit.begin % phase.taps_w;
    for (int step = 0; step < unit.count; ++step) {
      int const taps = phase.taps_a - (copy >= phase.full_copies);
      if (++copy == phase.taps_w) copy = 0;
      ptx::mbarrier_wait(&tables.full_a[a.index], a.parity);
      for (int t = 0; t < taps; ++t) {
        uint32_t const from_a = my_a + a.index * p.a_bytes + t * phase.shift * kLineBytes;
        uint32_t const from_b = ring_b + b.index * S::b_bytes;
        auto instruct = [&](int h, int first, uint32_t (&values)[together][4]) {
          ptx::wgmma_wait_group<1>();
          ptx::wgmma_fence_operand(values);
          load(values, from_a + h * 64 * kLineBytes, lane, first);
          if (h == halves - 1 && first == 0) release(halves == 2 ? before : oldest);
          if (h == 0 && first == 0) ptx::mbarrier_wait(&tables.full_b[b.index], b.parity);
          ptx::wgmma_fence_operand(acc[h]);
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < together; ++k)
            ptx::wgmma_mma_async_tf32(acc[h], values[k],
                                      ptx::wgmma_descriptor(from_b + (first + k) * 32, 0, kCoreBytes));
          ptx::wgmma_commit_group();
        };
        if constexpr (halves == 2) {
#pragma unroll
          for (int first = 0; first < 4; first += together) {
            instruct(0, first, v[0]);
            instruct(1, first, v[1]);
          }
        } else {
          if (odd_tap)  // registers have no index
            instruct(0, 0, v[1]);
          else
            instruct(0, 0, v[0]);
          odd_tap = !odd_tap, oldest = before;
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
    if (halves == 1) release(oldest);
    release(before);
    if (p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < TN; i += kWarpgroup) {
        int const n = i + int(threadIdx.x) % kWarpgroup;
        if (n < TN) tables.bias[group][n] = bias[i / kWarpgroup];
      }
    }
    if (unit.part >= 0) {
#pragma unroll
      for (int h = 0; h < halves; ++h) tma::store_part<TM, TN>(p, unit.part, group * (TM / 2) + h * 64, acc[h]);
      continue;
    }
    Unit const done(p, unit.tile);  // worked out anew, rather than kept in registers while the tile was multiplied
#pragma unroll
    for (int h = 0; h < halves; ++h) store<TM, TN>(p, done, to + h * 64, acc[h], tables, staging);
  }
}

// fillers_b: arrivals that fill a stage of B.
template <int TM, int TN>
__device__ void init_barriers(Tables<TM, TN>& tables, int fillers_b) {
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
  __shared__ Tables<TM, TN> tables;
  uint32_t const ring = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) init_barriers(tables, 1);
  __syncthreads();
  if (threadIdx.x < 2 * kWarpgroup) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    multiply<TM, TN, TM * TN <= 256 * 128 ? 4 : 2>(p, ring, tables);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    if (threadIdx.x == 2 * kWarpgroup) {
      ptx::griddepcontrol_wait();  // for B
      copy<TM, TN, false>(p, ring, tables, {ring + p.stages_a * p.a_bytes, p.stages_b, tables.full_b, tables.empty_b});
    }
  }
}

constexpr int kRoundedStages = 3;

// A warpgroup's work in the raw variants: rounds the copied stages of B and orders their channels. b_rows: their lines
// hold columns of one filter, and are turned as well.
template <int TM, int TN, bool b_rows>
__device__ void round_b(Params const& p, RingB const& from, uint32_t to, Tables<TM, TN>& tables) {
  using S = Shape<TM, TN>;
  int const thread = int(threadIdx.x) % kWarpgroup, warp = thread / 32, lane = thread % 32;
  Stage raw, b;
  Work work(p);
  for (Unit unit; work.take(p, unit);) {
    int stages = 0;
    Phase const& phase = p.phase[unit.phase];
    for (Step at(phase, p, unit.begin); unit.count > 0; --unit.count, at.advance(phase)) stages += at.taps(phase);
    for (; stages > 0; --stages) {
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
__global__ void __launch_bounds__(kRawThreads, 1) raw_kernel(__grid_constant__ Params const p, int stages_raw) {
  using S = Shape<TM, TN>;
  static_assert(S::blocks == 1);
  // 64K registers: two multiplying warpgroups, one that rounds, one that copies.
  constexpr int multiply_regs = 200, round_regs = b_rows ? 56 : 64, copy_regs = b_rows ? 56 : 48;
  static_assert((2 * multiply_regs + round_regs + copy_regs) * kWarpgroup <= 65536);
  extern __shared__ uint8_t dynamic[];
  __shared__ Tables<TM, TN> tables;
  uint32_t const ring = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  uint32_t const rounded = ring + p.stages_a * p.a_bytes;
  RingB const raw{rounded + p.stages_b * S::b_bytes, stages_raw, tables.full_raw, tables.empty_raw};
  if (threadIdx.x == 0) init_barriers(tables, 4);
  __syncthreads();
  int const role = int(threadIdx.x) / kWarpgroup;
  if (role < 2) {
    ptx::setmaxnreg_inc<multiply_regs>();
    multiply<TM, TN, TM == 256 ? 2 : 4>(p, ring, tables);
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

// The filters as they are, for the raw variants.
template <Op op, int TM, int TN>
cudaError_t launch_raw(Params& p, Problem const& problem, void const* filters, int64_t blocks, cudaStream_t stream) {
  using S = Shape<TM, TN>;
  constexpr bool b_rows = op == Op::dgrad;
  p.stages_b = tma::Divisor(kRoundedStages);
  int const ring = S::ring_bytes - kRoundedStages * S::b_bytes;
  int64_t const stages_a = min64(p.stages_a.value, ring / (p.a_bytes + S::b_bytes));
  int const stages_raw = int(min64((ring - stages_a * p.a_bytes) / S::b_bytes, kMaxStages));
  p.stages_a = tma::Divisor(stages_a);
  cudaError_t error = encode_filters(p.b, filters, problem, kTf32Line, b_rows ? kTf32Line : TN);
  if (error != cudaSuccess) return error;
  auto* const kernel = raw_kernel<TM, TN, b_rows>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(blocks), kRawThreads, S::shared_bytes, stream>>>(p, stages_raw);
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
  int64_t const row = q.lines * kTf32Line;
  Problem prepared = problem;
  prepared.C = row * problem.groups, prepared.K = rows * problem.groups;
  prepared.w = {taps * row, 1, problem.S * row, row};
  if ((error = encode_filters(p.b, q.out, prepared, kTf32Line, TN)) != cudaSuccess) return error;
  p.workspace = q.out + rows * problem.groups * taps * row;
  auto* const kernel = main_kernel<TM, TN>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
  if (error != cudaSuccess) return error;
  return launch_dependent(kernel, dim3(unsigned(blocks)), kThreads, S::shared_bytes, stream, p);
}

template <Op op, int TM, int TN, Variant variant>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using S = Shape<TM, TN>;
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
  if (is_halo(variant) && first.taps_w > 1) {  // a copy of A serves fewer taps, so more are to be on their way
    int64_t const room = S::ring_bytes / (p.a_bytes + first.taps * S::b_bytes / first.taps_w);
    int64_t const stages_a = max64(p.stages_a.value, min64(room, kMaxStages));
    p.stages_a = tma::Divisor(stages_a);
    p.stages_b = tma::Divisor(min64((S::ring_bytes - stages_a * p.a_bytes) / S::b_bytes, kMaxStages));
  }
  if constexpr (tf32_is_raw(variant))
    error = launch_raw<op, TM, TN>(p, problem, args.b, blocks, stream);
  else
    error = launch_prepared<op, TM, TN>(p, problem, args.b, blocks, sm_count, stream);
  if (error != cudaSuccess || p.shares.shared == 0) return error;
  return tma::launch_reduce(tma::tma_reduce<float, TM, TN>, p, TM * TN / (4 * tma::kReduceThreads), stream);
}

}  // namespace conv2d_ext::tf32
