// Dense convolution in channels_last on Hopper's copy engine (TMA) and tensor cores (wgmma): fprop and dgrad as an
// implicit GEMM, out[pixel, n] = sum over taps and channels of A[pixel moved by the tap, channel] * B[n, tap, channel].
// docs/kernels.md has a figure of the pipeline; tma_swap.cuh has the tiles of 64 filters, tma_wgrad.cuh is the sibling.
//
// A persistent block of three warpgroups walks over TM x TN tiles. One thread of the last feeds two rings of
// stages in shared memory: A (TM + kHalo pixels, 128 or 64 bytes of channels each) by im2col copies, which know the
// padding and the ends of rows and images; B (TN filters, or for dgrad the channels of 64 filters) by tiled copies. The
// warpgroups multiply, TM / 2 pixels each, and store. `full` and `empty` barriers, a pair a stage, hand the stages
// over.
//
// Variant im2col: every tap copies its own pixels. Variant halo (stride 1 along W): the pixels of a tile include the
// padded columns, so that the pixels of tap s are those of tap 0 moved by s * dilation, lines of the same stage: one
// copy of A serves a row of the filter. The padded columns' results are not stored.
//
// With a split, the tiles after the last whole round are not left to some of the blocks: their steps are shared out
// evenly, and tma_reduce adds the parts of a tile.
//
// tma_tf32.cuh does the same for float operands.
#pragma once

#include <type_traits>

#include "../core/pointwise.h"
#include "fragments.cuh"
#include "gather.cuh"
#include "tma_map.h"

namespace conv2d_ext::tma {

constexpr int kThreads = 3 * kWarpgroup;
constexpr int kRunBytes = 64 * kLineBytes;  // 64 k of 64 rows, N-major
constexpr int kMaxStages = 16;
constexpr int kMaxKept = 64;  // stages of B that stay

template <class T, int TN>
struct Tables {
  int64_t out[2][64];  // where a piece's pixels go, or -1; for each warpgroup
  T bias[2][TN];
  uint64_t full_a[kMaxStages], empty_a[kMaxStages], full_b[kMaxStages], empty_b[kMaxStages];
};

template <class T, int TM, int TN>
struct Shape {
  static constexpr int blocks = TM * TN <= 128 * 64 ? 2 : 1;  // an SM
  static constexpr bool keeps_b = false;
  static constexpr int columns(int) { return 64; }  // that a copy of B takes at most, if it is N-major
  static constexpr int kept_bytes(int, int, bool) { return 0; }
  static constexpr int runs = (TN + 63) / 64;
  static constexpr int b_bytes = runs * kRunBytes;     // as many if B is K-major: TN lines
  static constexpr int staging_bytes = 2 * kRunBytes;  // a piece of the output on its way, for each warpgroup
  static constexpr int ring_bytes = (blocks == 2 ? 94 : 207) * 1024;
  static constexpr int shared_bytes = ring_bytes + staging_bytes + 1024;  // the swizzle wants 1024-byte alignment
  // An SM has 228 KB, of which each block takes one more; the rest is in Tables.
  static constexpr int tables_bytes = int(sizeof(Tables<T, TN>));
  static_assert(blocks * (shared_bytes + tables_bytes + 1024) <= 228 * 1024);
  // 64K registers: three warpgroups of 128 threads in each block; the last only copies.
  static constexpr int copy_regs = blocks == 2 ? 48 : 56, multiply_regs = blocks == 2 ? 96 : 224;
};

// A divisor that the host knows. Division by multiplication is right for what is less than 2^31.
struct Divisor {
  int32_t value = 1;
  uint32_t multiplier = 0;
  int32_t shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t d) : value(int32_t(d)) {
    if (d <= 1) return;
    int log = 1;
    while (int64_t(1) << log < d) ++log;
    multiplier = uint32_t(((uint64_t(1) << (31 + log)) + uint64_t(d) - 1) / uint64_t(d));
    shift = log - 1;
  }
  __device__ operator int() const { return value; }
  // The quotient; the remainder is left in n.
  __device__ int divide(int& n) const {
    int const quotient = multiplier == 0 ? n : int(__umulhi(uint32_t(n), multiplier) >> shift);
    n -= quotient * value;
    return quotient;
  }
  __device__ int64_t divide(int64_t& n) const {
    int64_t quotient;
    if (n >> 31 == 0) {
      int rest = int(n);
      quotient = divide(rest);
    } else {
      quotient = int64_t(uint64_t(n) / uint32_t(value));
    }
    n -= quotient * value;
    return quotient;
  }
};

// One phase: its pixels, its taps, and where they are.
struct Phase {
  int64_t M;              // pixels of A, padded columns included
  int64_t out;            // offset of its first pixel
  Divisor rows, columns;  // pixels an image; columns may include padded ones
  int32_t valid_columns;
  int32_t tiles, steps;  // tiles along M
  int32_t taps;          // of a row of the filter
  int32_t taps_w;        // copies of A for them
  int32_t taps_a;        // taps that each of the first full_copies serves; the others serve one less
  int32_t full_copies;
  int32_t shift;         // pixels from one of these to the next
  int32_t stages_b;      // of B in all its steps
  int32_t first_b;       // where these are, if all are kept in shared memory
  int32_t h0, w0;        // coordinates of pixel (0, 0) at tap (0, 0)
  int32_t tap_h, tap_w;  // how far a tap moves, in pixels
  int32_t first_r, first_s, step_r, step_s;
};

struct Params {
  CUtensorMap a[kMaxPhases];
  CUtensorMap b;
  Phase phase[kMaxPhases];
  Divisor phases, groups;
  Divisor tiles_n;
  Divisor turn, last_turn;  // tiles along M of a phase before the next one's
  Divisor cycle;            // of all phases
  int32_t cycles;           // before the last
  int32_t alone, shared;    // tiles
  Divisor steps, share;     // of a shared tile; that a block takes of them
  bool singly;              // the output takes no vectors of channels
  Divisor rows_first;       // tiles along M that follow each other; 1: those along N do
  Divisor stages_a, stages_b;
  bool keep_b;                 // all filters stay in the stages of B
  int32_t chunks;              // of the reduction's channels
  int32_t last;                // instructions that the last chunk takes
  int32_t line;                // bytes of a chunk: 128, or 64 for up to 32 channels
  int32_t a_bytes, b_bytes;    // of a stage
  int32_t stride_h, stride_w;  // A's pixels
  int32_t N;                   // columns of a group
  int32_t group_a;             // channels of A, columns or filters of B a group
  int32_t group_b;
  int64_t group_out, group_bias;
  int64_t out_n, out_c, out_h, out_w;
  void const* bias;
  void const* row_bias;  // of the rows, not the columns
  int64_t bias_stride;
  void* out;
  void* workspace;
};

// A tile, or a block's part of one.
struct Unit {
  Phase const* phase;
  int32_t tile;          // of all
  int32_t m, n, group;   // tiles of a phase and group
  int32_t begin, count;  // steps
  int32_t part;          // where in the workspace the sums go; -1: they are the result

  Unit() = default;
  __device__ Unit(Params const& p, int index) : tile(index), begin(0), part(-1) {
    int row = index;
    index = p.rows_first.divide(row);
    n = index, index = p.tiles_n.divide(n);
    group = index, index = p.groups.divide(group);
    int const cycle = p.cycle.divide(index);
    int const turn = (cycle < p.cycles ? p.turn : p.last_turn).divide(index);
    phase = &p.phase[turn];
    m = cycle * p.turn + index + row;
    count = m < phase->tiles ? phase->steps : 0;
  }
};

// The units of a block: every gridDim.x-th tile, then its share of the tiles that are split.
struct Work {
  int32_t tile, at;

  __device__ explicit Work(Params const& p) : tile(int(blockIdx.x)), at(int(blockIdx.x) * p.share) {}
  __device__ bool more(Params const& p) const {
    return tile < p.alone || at < min((int(blockIdx.x) + 1) * p.share, p.shared * p.steps);
  }
  // False if there is none.
  __device__ bool take(Params const& p, Unit& unit) {
    if (tile < p.alone) {
      unit = Unit(p, tile);
      tile += int(gridDim.x);
      return true;
    }
    int const end = min((int(blockIdx.x) + 1) * p.share, p.shared * p.steps);
    if (at >= end) return false;
    int begin = at;
    int const index = p.steps.divide(begin), count = min(p.steps - begin, end - at);
    unit = Unit(p, p.alone + index);
    unit.begin = begin, unit.count = max(min(unit.count - begin, count), 0);
    unit.part = int(blockIdx.x) + index;
    at += count;
    return true;
  }
};

// Descriptors of operands with contiguous channels, without the address.
__device__ inline uint64_t layout_of(int line) {
  return line == kLineBytes ? ptx::wgmma_descriptor<128>(0, 0, 8 * 128) : ptx::wgmma_descriptor<64>(0, 0, 8 * 64);
}

__device__ inline uint64_t at_address(uint64_t layout, uint32_t shared) { return layout | (shared & 0x3FFFF) >> 4; }

// The offset of pixel m, or -1.
__device__ inline int64_t out_of(Params const& p, Phase const& phase, int64_t m) {
  if (m >= phase.M) return -1;
  int64_t j = m, i = phase.columns.divide(j);
  if (j >= phase.valid_columns) return -1;
  int64_t const n = phase.rows.divide(i);
  return phase.out + n * p.out_n + i * p.out_h + j * p.out_w;
}

template <class T, int TM, int TN, bool b_rows>
__device__ void copy(Params const& p, uint32_t ring, Tables<T, TN>& tables) {
  using S = Shape<T, TM, TN>;
  int const chunk_size = p.line / int(sizeof(T));
  uint32_t const ring_b = ring + p.stages_a * p.a_bytes;
  Stage a, b;
  Work work(p);
  for (Unit unit; work.take(p, unit);) {
    Phase const& phase = *unit.phase;
    int64_t j = int64_t(unit.m) * TM;
    int64_t i = phase.columns.divide(j);
    int const n = int(phase.rows.divide(i));
    int const h = phase.h0 + int(i) * p.stride_h, w = phase.w0 + int(j) * p.stride_w;
    void const* const map_a = &p.a[unit.phase - p.phase];
    int const runs = min(S::runs, (p.N - unit.n * TN + 63) / 64);
    int const bytes_b = b_rows ? runs * chunk_size * kLineBytes : min(TN, p.N) * p.line;
    int chunk = 0, tap_w = 0, tap_h = 0;
    if (unit.begin > 0) {
      chunk = unit.begin % p.chunks;
      tap_w = unit.begin / p.chunks % phase.taps_w, tap_h = unit.begin / p.chunks / phase.taps_w;
    }
    for (int step = 0; step < unit.count; ++step) {
      ptx::mbarrier_wait(&tables.empty_a[a.index], a.parity ^ 1);  // passes at once on the first trip round the ring
      ptx::mbarrier_arrive_expect_tx(&tables.full_a[a.index], p.a_bytes);
      ptx::cp_async_bulk_tensor_im2col(ring + a.index * p.a_bytes, map_a, &tables.full_a[a.index],
                                       unit.group * p.group_a + chunk * chunk_size, w, h, n, tap_w * phase.tap_w,
                                       tap_h * phase.tap_h);
      a.advance(p.stages_a);
      int const r = phase.first_r + tap_h * phase.step_r;
      for (int t = 0; t < phase.taps_a; ++t) {
        int const s = phase.first_s + (tap_w + t) * phase.step_s;
        ptx::mbarrier_wait(&tables.empty_b[b.index], b.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(&tables.full_b[b.index], bytes_b);
        uint32_t const to = ring_b + b.index * p.b_bytes;
        uint64_t* const bar = &tables.full_b[b.index];
        if constexpr (b_rows) {  // a chunk of filters of 64 columns at a time
          for (int run = 0; run < runs; ++run)
            ptx::cp_async_bulk_tensor_4d(to + run * kRunBytes, &p.b, bar, unit.n * TN + run * 64, s, r,
                                         unit.group * p.group_b + chunk * chunk_size);
        } else {
          ptx::cp_async_bulk_tensor_4d(to, &p.b, bar, chunk * chunk_size, s, r, unit.group * p.group_b + unit.n * TN);
        }
        b.advance(p.stages_b);
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

// Stores a warp's 16 columns from n on, up to `end`: their lines of 64 pixels are in shared memory, a lane has a pair.
template <class T>
__device__ void store_pairs(Params const& p, T* first, int n, int end, int64_t const* to, uint32_t lines) {
  int const lane = int(threadIdx.x) % 32;
  int64_t const at0 = to[lane * 2], at1 = to[lane * 2 + 1];
  bool const neighbours = at0 >= 0 && at1 == at0 + 1;
  T* out = first + n * p.out_c;
  uint32_t words[16];
#pragma unroll
  for (int i = 0; i < 16; ++i)
    words[i] = ptx::ld_shared(lines + i * kLineBytes + ((lane / 4) ^ (i % 8)) * 16 + lane % 4 * 4);
#pragma unroll
  for (int i = 0; i < 16; ++i, ++n, out += p.out_c) {
    if (n >= end) break;
    Vector<T, 2> const pair = *reinterpret_cast<Vector<T, 2> const*>(&words[i]);
    if (neighbours && reinterpret_cast<uintptr_t>(out + at0) % 4 == 0) {
      *reinterpret_cast<Vector<T, 2>*>(out + at0) = pair;
    } else {
      if (at0 >= 0) out[at0] = pair.v[0];
      if (at1 >= 0) out[at1] = pair.v[1];
    }
  }
}

// Stores 64 x TN accumulators to an output that takes no vectors of columns, pairs of pixels by way of shared memory, a
// line for each column.
template <class T, int TN>
__device__ void store_singly(Params const& p, Unit const& unit, float (&acc)[TN / 2], int64_t const* to,
                             uint32_t staging) {
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  T* const first = static_cast<T*>(p.out) + unit.group * p.group_out;
  ptx::bar_sync(1 + group, kWarpgroup);
#pragma unroll
  for (int piece = 0; piece < (TN + 63) / 64; ++piece) {
    if (piece > 0) ptx::bar_sync(1 + group, kWarpgroup);
#pragma unroll
    for (int t = 0; t < 4; ++t) {  // 16 columns
      if (piece * 64 + t * 16 >= TN) break;
      uint32_t v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int const at = (piece * 8 + t * 2 + e / 2) * 4 + e % 2 * 2;
        v[e] = pack<T>(acc[at], acc[at + 1]);
      }
      int const line = t * 16 + lane / 16 * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
      ptx::stmatrix_x4_trans(staging + line * kLineBytes + (chunk ^ (line % 8)) * 16, v);
    }
    ptx::bar_sync(1 + group, kWarpgroup);
    store_pairs(p, first, unit.n * TN + piece * 64 + warp * 16, min(p.N, (unit.n + 1) * TN), to,
                staging + warp * 16 * kLineBytes);
  }
}

// Writes a warpgroup's 64 x TN accumulators, from row `first` of the tile on, to a part in the workspace.
template <int TM, int TN>
__device__ void store_part(Params const& p, int part, int first, float const (&acc)[TN / 2]) {
  int const row = first + int(threadIdx.x) / 32 % 4 * 16 + int(threadIdx.x) % 32 / 4, quad = int(threadIdx.x) % 4;
  float* const to = static_cast<float*>(p.workspace) + int64_t(part) * (TM * TN) + row * TN + quad * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int j = 0; j < TN / 8; ++j)
      *reinterpret_cast<float2*>(to + half * 8 * TN + j * 8) =
          make_float2(acc[j * 4 + half * 2], acc[j * 4 + half * 2 + 1]);
}

// Stores a warpgroup's 64 x TN accumulators from row `first` of the tile on. A thread has those of rows lane / 4 and
// lane / 4 + 8 of its warp's 16, columns 8 j + 2 (lane % 4) + {0, 1}. Pieces of 64 rows and 128 bytes of columns pass
// through shared memory, so that eight lanes store the line of a pixel.
template <class T, int TM, int TN>
__device__ void store(Params const& p, Unit const& unit, int first, float (&acc)[TN / 2], Tables<T, TN>& tables,
                      uint32_t staging) {
  constexpr int columns = kLineBytes / int(sizeof(T));  // of a piece
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  int const thread = int(threadIdx.x) % kWarpgroup, quad = lane % 4, row = warp * 16 + lane / 4;
  int64_t* const to = tables.out[group];
  ptx::bar_sync(1 + group, kWarpgroup);  // the last piece has been read, the bias written
  if (thread < 64) to[thread] = out_of(p, *unit.phase, int64_t(unit.m) * TM + first + thread);
  if (p.bias != nullptr) {
    T const* const bias = tables.bias[group];
#pragma unroll
    for (int j = 0; j < TN / 8; ++j) {
      Vector<T, 2> const pair = *reinterpret_cast<Vector<T, 2> const*>(bias + j * 8 + quad * 2);
      float const low = widen(pair.v[0]), high = widen(pair.v[1]);
      acc[j * 4] += low, acc[j * 4 + 1] += high;
      acc[j * 4 + 2] += low, acc[j * 4 + 3] += high;
    }
  }
  if (p.row_bias != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int64_t const m = int64_t(unit.m) * TM + first + row + half * 8;
      float const bias = m < unit.phase->M ? widen(static_cast<T const*>(p.row_bias)[m * p.bias_stride]) : 0.0f;
#pragma unroll
      for (int j = 0; j < TN / 8; ++j) acc[j * 4 + half * 2] += bias, acc[j * 4 + half * 2 + 1] += bias;
    }
  }
  if (p.singly) {
    store_singly<T, TN>(p, unit, acc, to, staging);
    return;
  }
  int const n = unit.n * TN + thread % 8 * (columns / 8);
  T* const out = static_cast<T*>(p.out) + unit.group * p.group_out + n;
#pragma unroll
  for (int piece = 0; piece < (TN + columns - 1) / columns; ++piece) {
    if (piece > 0) ptx::bar_sync(1 + group, kWarpgroup);
#pragma unroll
    for (int t = 0; t < 4; ++t) {  // 16 columns
      if (piece * columns + t * 16 >= TN) break;
      uint32_t v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int const at = (piece * 8 + t * 2 + e / 2) * 4 + e % 2 * 2;
        v[e] = pack<T>(acc[at], acc[at + 1]);
      }
      int const line = warp * 16 + lane % 16, chunk = t * 2 + lane / 16;
      ptx::stmatrix_x4(staging + line * kLineBytes + (chunk ^ (line % 8)) * 16, v);
    }
    ptx::bar_sync(1 + group, kWarpgroup);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const line = thread / 8 + i * 16;
      uint4 const v = ptx::ld_shared_v4(staging + line * kLineBytes + ((thread % 8) ^ (line % 8)) * 16);
      if (to[line] >= 0 && thread % 8 * (columns / 8) + piece * columns < TN && n + piece * columns < p.N)
        *reinterpret_cast<uint4*>(out + to[line] + piece * columns) = v;
    }
  }
}

template <class T, int TM, int TN, bool b_rows>
__device__ void multiply(Params const& p, uint32_t ring, Tables<T, TN>& tables) {
  using S = Shape<T, TM, TN>;
  constexpr int halves = TM / 128;  // 64-row instructions of a warpgroup
  constexpr uint32_t step_b = b_rows ? 2 * kCoreBytes : 32;
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  uint32_t const ring_b = ring + p.stages_a * p.a_bytes;
  uint32_t const my_a = ring + group * (TM / 2) * p.line;
  uint64_t const layout = layout_of(p.line),
                 layout_b = b_rows ? ptx::wgmma_descriptor(0, kRunBytes, kCoreBytes) : layout;
  uint32_t const staging = ring + S::ring_bytes + group * kRunBytes;
  Stage a, b;
  float acc[halves][TN / 2];
  auto release = [&](int stage_a, int stage_b) {  // -1: none
    if (lane == 0 && stage_a >= 0) ptx::mbarrier_arrive(&tables.empty_a[stage_a]);
    if (lane == 0 && stage_b >= 0) ptx::mbarrier_arrive(&tables.empty_b[stage_b]);
  };
  Work work(p);
  for (Unit unit; work.take(p, unit);) {
#pragma unroll
    for (int h = 0; h < halves; ++h)
#pragma unroll
      for (int i = 0; i < TN / 2; ++i) acc[h][i] = 0;
    int before_a = -1, before_b = -1;  // stages of the multiplications that are under way
    Phase const& phase = *unit.phase;
    T bias[(TN + kWarpgroup - 1) / kWarpgroup] = {};  // on its way while the tile is multiplied
    if (p.bias != nullptr)
#pragma unroll
      for (int i = 0; i < TN; i += kWarpgroup) {
        int const n = i + int(threadIdx.x) % kWarpgroup, at = unit.n * TN + n;
        if (n < TN && at < p.N)
          bias[i / kWarpgroup] = static_cast<T const*>(p.bias)[unit.group * p.group_bias + at * p.bias_stride];
      }
    int chunk = unit.begin == 0 ? 0 : unit.begin % p.chunks;
    for (int step = 0; step < unit.count; ++step) {
      int const instructions = chunk == p.chunks - 1 ? p.last : 4;
      if (++chunk == p.chunks) chunk = 0;
      ptx::mbarrier_wait(&tables.full_a[a.index], a.parity);
      for (int t = 0; t < phase.taps_a; ++t) {
        ptx::mbarrier_wait(&tables.full_b[b.index], b.parity);
        uint32_t const from_a = my_a + a.index * p.a_bytes + t * phase.shift * p.line;
        uint32_t const from_b = ring_b + b.index * p.b_bytes;
#pragma unroll
        for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
        auto instruct = [&](auto count) {
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < decltype(count)::value; ++k)
#pragma unroll
            for (int h = 0; h < halves; ++h)
              ptx::wgmma_mma_async<T, false, b_rows>(acc[h], at_address(layout, from_a + h * 64 * p.line + k * 32),
                                                     at_address(layout_b, from_b + k * step_b));
          ptx::wgmma_commit_group();
        };
        // The count is a constant in each: the instructions of a loop would wait for each other.
        if (instructions == 4)
          instruct(std::integral_constant<int, 4>());
        else if (instructions == 3)
          instruct(std::integral_constant<int, 3>());
        else if (instructions == 2)
          instruct(std::integral_constant<int, 2>());
        else
          instruct(std::integral_constant<int, 1>());
        ptx::wgmma_wait_group<1>();
#pragma unroll
        for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
        release(before_a, before_b);  // the step before has been read
        before_a = t == phase.taps_a - 1 ? a.index : -1;
        before_b = b.index;
        b.advance(p.stages_b);
      }
      a.advance(p.stages_a);
    }
    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
    release(before_a, before_b);
    if (p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < TN; i += kWarpgroup) {
        int const n = i + int(threadIdx.x) % kWarpgroup;
        if (n < TN) tables.bias[group][n] = bias[i / kWarpgroup];
      }
    }
    if (unit.part >= 0) {
#pragma unroll
      for (int h = 0; h < halves; ++h) store_part<TM, TN>(p, unit.part, group * (TM / 2) + h * 64, acc[h]);
      continue;
    }
    Unit const done(p, unit.tile);  // worked out anew, rather than kept in registers while the tile was multiplied
#pragma unroll
    for (int h = 0; h < halves; ++h) store<T, TM, TN>(p, done, group * (TM / 2) + h * 64, acc[h], tables, staging);
  }
}

// b_rows: B's columns are contiguous in memory, not its k.
template <class T, int TM, int TN, bool b_rows>
__global__ void __launch_bounds__(kThreads, Shape<T, TM, TN>::blocks) tma_kernel(__grid_constant__ Params const p) {
  using S = Shape<T, TM, TN>;
  extern __shared__ uint8_t dynamic[];
  __shared__ Tables<T, TN> tables;
  uint32_t const ring = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxStages; ++i) {
      ptx::mbarrier_init(&tables.full_a[i], 1);
      ptx::mbarrier_init(&tables.empty_a[i], 8);  // multiplying warps
      ptx::mbarrier_init(&tables.full_b[i], 1);
      ptx::mbarrier_init(&tables.empty_b[i], 8);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 2 * kWarpgroup) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    multiply<T, TM, TN, b_rows>(p, ring, tables);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    if (threadIdx.x == 2 * kWarpgroup) copy<T, TM, TN, b_rows>(p, ring, tables);
  }
}

// Sums the parts of the shared tiles in the order of the blocks; a thread has four columns.
template <class T, int TM, int TN>
__global__ void __launch_bounds__(256) tma_reduce(__grid_constant__ Params const p) {
  int const tile = int(blockIdx.x);
  Unit const unit(p, p.alone + tile);
  int const first = (int(blockIdx.y) * 256 + int(threadIdx.x)) * 4;
  int const n = unit.n * TN + first % TN;
  if (n >= p.N) return;
  int const begin = tile * p.steps, from = begin / p.share, to_block = (begin + p.steps - 1) / p.share;
  float const* partial = static_cast<float const*>(p.workspace) + int64_t(from + tile) * (TM * TN) + first;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int block = from; block <= to_block; ++block, partial += TM * TN) {
    float4 const v = *reinterpret_cast<float4 const*>(partial);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  int64_t const m = int64_t(unit.m) * TM + first / TN, to = out_of(p, *unit.phase, m);
  if (to < 0) return;
  if (p.row_bias != nullptr) {
    float const bias = widen(static_cast<T const*>(p.row_bias)[m * p.bias_stride]);
    sum.x += bias, sum.y += bias, sum.z += bias, sum.w += bias;
  }
  float const values[4] = {sum.x, sum.y, sum.z, sum.w};
  Vector<T, 4> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float const bias = p.bias == nullptr || n + i >= p.N
                           ? 0
                           : widen(static_cast<T const*>(p.bias)[unit.group * p.group_bias + (n + i) * p.bias_stride]);
    out.v[i] = narrow<T>(values[i] + bias);
    if (p.singly && n + i < p.N) static_cast<T*>(p.out)[unit.group * p.group_out + to + (n + i) * p.out_c] = out.v[i];
  }
  if (!p.singly) *reinterpret_cast<Vector<T, 4>*>(static_cast<T*>(p.out) + unit.group * p.group_out + to + n) = out;
}

template <class S, class T, int TM, int TN>
cudaError_t params_of(Params& q, int64_t& blocks, Op op, Problem const& p, Row const& row, Plan const& plan,
                      Arguments const& args) {
  bool const forward = op == Op::fprop, halo = is_halo(row.variant), turned = is_pointwise(row);
  int64_t const C = forward ? p.C_per_group() : p.K_per_group();  // of the reduction
  Strides const &in = forward ? p.x : p.y, &out = forward ? p.y : p.x;
  int64_t const in_H = forward ? p.H : p.P(), in_W = forward ? p.W : p.Q();
  q.line = tma_line(C);
  int const chunk_size = q.line / int(sizeof(T));
  q.groups = Divisor(p.groups);
  q.chunks = int32_t(ceil_div(C, chunk_size));
  q.last = int32_t(ceil_div(C - (q.chunks - 1) * chunk_size, 16));
  q.N = int32_t(forward ? p.K_per_group() : p.C_per_group());
  q.tiles_n = Divisor(ceil_div(q.N, TN));
  q.group_a = turned ? 0 : int32_t(C);
  q.group_out = turned ? out.n : q.N * out.c;
  q.group_bias = q.N * args.bias_stride;
  (turned ? q.row_bias : q.bias) = args.bias;
  q.bias_stride = args.bias_stride, q.out = args.out, q.workspace = args.workspace;
  q.singly = !turned && tma_stores_singly(op, p);
  q.out_n = out.n, q.out_c = out.c, q.out_h = out.h, q.out_w = out.w;
  q.stride_h = q.stride_w = 1;
  q.a_bytes = (halo ? TM + kHalo : TM) * q.line;
  q.b_bytes = forward ? S::b_bytes / kLineBytes * q.line : S::b_bytes;
  if (S::keeps_b) q.b_bytes = S::kept_bytes(q.N, q.line, forward);
  if (forward)
    q.stride_h = int32_t(p.stride_h), q.stride_w = int32_t(p.stride_w);
  else
    q.out_h *= p.stride_h, q.out_w *= p.stride_w;
  int64_t const phases_w = forward ? 1 : phases_of(p.W, p.stride_w);
  int64_t const phases = forward ? 1 : phases_of(p.H, p.stride_h) * phases_w;
  q.phases = Divisor(phases);
  int64_t most = 0, steps = 1, with_taps = 0, first_b = 0;
  for (int i = 0; i < phases; ++i) {
    Walk const h = walk_h(op, p, i / phases_w);
    Walk w = walk_w(op, p, i % phases_w);
    Phase& f = q.phase[i];
    bool const taps = h.taps > 0 && w.taps > 0;
    f.valid_columns = int32_t(w.pixels);
    Halo const shared = halo && taps ? halo_of(w) : Halo{w.taps, 0};
    if (halo && taps) w = halo_walk(w);
    f.rows = Divisor(h.pixels), f.columns = Divisor(w.pixels);
    f.M = p.N * h.pixels * w.pixels;
    f.tiles = int32_t(ceil_div(f.M, TM));
    most = max64(most, f.tiles);
    f.taps = int32_t(w.taps), f.taps_w = int32_t(shared.copies), f.shift = int32_t(shared.shift);
    if (taps) {
      f.taps_a = int32_t(ceil_div(w.taps, shared.copies));
      f.full_copies = int32_t(w.taps - (f.taps_a - 1) * shared.copies);
    }
    f.steps = taps ? int32_t(h.taps * f.taps_w * q.chunks) : 0;
    steps = max64(steps, f.steps), with_taps += taps;
    f.stages_b = taps ? int32_t(h.taps * w.taps * q.chunks) : 0;
    f.first_b = int32_t(first_b);
    first_b += f.stages_b;
    f.h0 = int32_t(h.lower), f.w0 = int32_t(w.lower);
    f.tap_h = int32_t(h.tap_stride), f.tap_w = int32_t(w.tap_stride);
    f.first_r = int32_t(h.first_tap), f.step_r = int32_t(h.tap_step);
    f.first_s = int32_t(w.first_tap), f.step_s = int32_t(w.tap_step);
    f.out = forward ? 0 : i / phases_w * out.h + i % phases_w * out.w;
    if (!taps) continue;
    Tensor4 const a{args.a, p.dtype, {turned ? C : C * p.groups, in_W, in_H, p.N}, {1, in.w, in.h, in.n}};
    // A turned problem's taps may reach further than the box's corners; what is beyond the one row is not stored.
    Walk box_h = h;
    if (turned) box_h.pixels = max64(h.pixels, in_H - 127);
    cudaError_t const error = encode_im2col(q.a[i], a, box_h, w, chunk_size, halo ? TM + kHalo : TM);
    if (error != cudaSuccess) return error;
  }
  int64_t const tiles_n = q.tiles_n.value * p.groups, turn = tma_turn(with_taps, most, tiles_n);
  q.turn = Divisor(turn), q.cycle = Divisor(turn * phases), q.cycles = int32_t(most / turn);
  q.last_turn = Divisor(max64(most % turn, 1));
  Split const split = tma_split(row, most * phases * tiles_n, plan.split_k);
  q.alone = int32_t(split.alone), q.shared = int32_t(split.shared);
  q.steps = Divisor(steps), q.share = Divisor(ceil_div(split.shared * steps, max64(split.workers, 1)));
  blocks = split.shared == 0 ? split.alone : split.alone > 0 ? tma_slots(row) : split.workers;
  if (turned) q.rows_first = Divisor(q.phase[0].tiles);
  int64_t stages_a = halo ? (S::blocks == 2 ? 2 : 3) * (kLineBytes / q.line)
                          : min64(S::ring_bytes / (q.a_bytes + q.b_bytes), kMaxStages);
  int64_t stages_b = min64((S::ring_bytes - stages_a * q.a_bytes) / q.b_bytes, kMaxStages);
  q.keep_b = S::keeps_b && q.shared == 0 && tiles_n == 1 && first_b <= kMaxKept &&
             first_b * q.b_bytes + 3 * q.a_bytes <= S::ring_bytes;
  if (q.keep_b) {
    stages_b = first_b;
    stages_a = min64((S::ring_bytes - first_b * q.b_bytes) / q.a_bytes, kMaxStages);
    if (q.line == 64) stages_a -= stages_a % 2;  // the stages of B begin at a multiple of 1024 bytes
  }
  q.stages_a = Divisor(stages_a), q.stages_b = Divisor(stages_b);
  return cudaSuccess;
}

// S: the shape of `kernel`'s blocks.
template <class S, Op op, DType dtype, int TM, int TN>
cudaError_t launch_kernel(void (*kernel)(Params), Problem const& problem, Plan const& plan, Arguments const& args,
                          cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool b_rows = op == Op::dgrad;  // B is N-major
  Params p{};
  int64_t blocks = 0;
  cudaError_t error = params_of<S, T, TM, TN>(p, blocks, op, problem, kRows[plan.kernel], plan, args);
  if (error != cudaSuccess) return error;
  Strides const& w = problem.w;
  Tensor4 const b{args.b, dtype, {problem.C_per_group(), problem.S, problem.R, problem.K}, {1, w.w, w.h, w.n}};
  p.group_b = int32_t(problem.K_per_group());
  int const chunk = p.line / int(sizeof(T)), columns = S::columns(p.N);
  bool const short_lines = (b_rows ? columns : chunk) * int(sizeof(T)) == 64;
  error = encode_tiled(p.b, b, b_rows ? columns : chunk, 1, 1, b_rows ? chunk : int(min64(TN, p.N)), 1, 1,
                       short_lines ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;

  if ((error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes)) !=
      cudaSuccess)
    return error;
  int device = 0, sm_count = 0;
  if ((error = cudaGetDevice(&device)) != cudaSuccess) return error;
  if ((error = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device)) != cudaSuccess) return error;
  if (p.shared == 0) blocks = min64(blocks, int64_t(sm_count) * S::blocks);
  kernel<<<unsigned(blocks), kThreads, S::shared_bytes, stream>>>(p);
  if ((error = cudaGetLastError()) != cudaSuccess || p.shared == 0) return error;
  tma_reduce<T, TM, TN><<<dim3(unsigned(p.shared), TM * TN / 1024), 256, 0, stream>>>(p);
  return cudaGetLastError();
}

template <Op op, DType dtype, int TM, int TN, Variant variant>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  return launch_kernel<Shape<T, TM, TN>, op, dtype, TM, TN>(tma_kernel<T, TM, TN, op == Op::dgrad>, problem, plan, args,
                                                            stream);
}

}  // namespace conv2d_ext::tma
