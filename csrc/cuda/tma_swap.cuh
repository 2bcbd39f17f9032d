// fprop and dgrad for 64 filters a tile (for dgrad: channels): tma.cuh with the operands exchanged.
//   out[n, pixel] = sum over taps and channels of B[n, tap, channel] * A[pixel moved by the tap, channel]
// An instruction multiplies 64 filters by 256 pixels. With 64 pixels by 64 filters, as tma.cuh would do it, the tensor
// cores wait for shared memory: those read 4 KB of operands in 32 cycles, these 10 KB in 128.
//
// The two warpgroups take turns, a tile each, so that one multiplies while the other stores. The stages of their tiles
// follow each other in the same rings.
//
// If there are few tiles of filters and all taps of one fit into shared memory beside three stages of A, a block copies
// those of its own tile once, and they stay (`keep_b`).
//
// A thread copies pixels and another filters, so that neither waits for the other's stages.
//
// Variant halo with a stride along W: taps whose distance is a multiple of the stride share a copy of A.
//
// Variant halo: the zeros behind a row of pixels are those before the next row, where both are as many.
//
// Tiles have 256, 248 or 232 pixels, a kernel each; the fewest that do as many rounds of the device. Of 16-bit types
// those are of plain problems (see tma_kernel in tma.cuh); shared tiles (a split) and those of phases have 256.
#pragma once

#include "tma.cuh"

namespace conv2d_ext::tma {

template <int pixels>
struct SwapTile {
  static constexpr int TM = pixels, TN = 64;
  static constexpr int threads = kThreads;
  static constexpr int blocks = 1;  // an SM
  static constexpr bool keeps_b = true, stays = false, splits = TM == 256, even_stages = false;
  static constexpr int halo_stages = 4;
  static constexpr int pieces = 0;  // the copy engine does not store
  static constexpr int b_bytes = kRunBytes;
  static constexpr int columns(int N) { return N <= 32 ? 32 : 64; }
  // Instructions read what is behind few filters too, for sums that are not stored.
  static constexpr int kept_bytes(int N, int line, bool forward) {
    return forward ? ((N < 64 ? N : 64) * line + kCoreBytes - 1) / kCoreBytes * kCoreBytes : line * columns(N);
  }
  static constexpr int ring_bytes = 205 * 1024, ring_beside_pieces = ring_bytes;
  static constexpr int shared_bytes = ring_bytes + 2 * kRunBytes + 1024;
  static constexpr int copy_regs = 56, multiply_regs = 224;
};

using SwapShape = SwapTile<256>;

struct SwapTables {
  int64_t out[2][256];  // where a tile's pixels go, or -1; for each warpgroup
  uint64_t full_a[kMaxStages], empty_a[kMaxStages], full_b[kMaxKept], empty_b[kMaxStages];
};
static_assert(SwapShape::shared_bytes + sizeof(SwapTables) + 1024 <= 228 * 1024);

// A step of the reduction: one copy of A, which serves `taps` taps.
struct SwapStep {
  int32_t copy, chunk, tap_h;

  __device__ SwapStep(Params const& p, Phase const& phase, int step) : copy(0), chunk(0), tap_h(0) {
    if (step == 0) return;
    copy = step % phase.taps_w;
    step /= phase.taps_w;
    chunk = step % p.chunks, tap_h = step / p.chunks;
  }
  __device__ void advance(Params const& p, int taps_w) {
    if (++copy < taps_w) return;
    copy = 0;
    if (++chunk < p.chunks) return;
    chunk = 0;
    ++tap_h;
  }
};

// Stages of B in the first `steps` steps of a phase.
__device__ inline int stages_of_b(Phase const& phase, int steps) {
  if (steps == 0) return 0;
  if (steps == phase.steps) return phase.stages_b;
  int const rows = steps / phase.taps_w, copies = steps % phase.taps_w;
  return rows * phase.taps + copies * phase.taps_a - max(copies - phase.full_copies, 0);
}

template <class T, int TM, bool plain>
__device__ void swap_copy_a(Params const& p, uint32_t ring, SwapTables& tables) {
  int const chunk_size = p.line / int(sizeof(T));
  Stage a;
  WorkOf<plain> work(p);
  for (Unit unit; work.take(p, unit);) {
    if (unit.count == 0) continue;
    Phase const& phase = p.phase[unit.phase];
    CUtensorMap const& map = p.a[unit.phase];
    int64_t j = int64_t(unit.m) * (plain ? TM : p.tile_m);
    int64_t i = phase.columns.divide(j);
    int const n = int(phase.rows.divide(i));
    int const h = phase.h0 + int(i) * p.stride_h, w = phase.w0 + int(j) * p.stride_w;
    SwapStep at(p, phase, plain ? 0 : unit.begin);
    for (int step = 0; step < unit.count; ++step, at.advance(p, phase.taps_w), a.advance(p.stages_a)) {
      uint64_t* const bar = &tables.full_a[a.index];
      ptx::mbarrier_wait(&tables.empty_a[a.index], a.parity ^ 1);  // passes at once on the first trip round the ring
      ptx::mbarrier_arrive_expect_tx(bar, p.a_bytes);
      copy_pixels(p, ring + a.index * p.a_bytes, map, bar, unit.group, at.chunk * chunk_size, w, h, n,
                  at.copy * phase.tap_w, at.tap_h * phase.tap_h);
    }
  }
}

template <class T, bool b_rows, bool plain>
__device__ void swap_copy_b(Params const& p, uint32_t ring, SwapTables& tables) {
  uint32_t const ring_b = ring + p.stages_a * p.a_bytes;
  int const chunk_size = p.line / int(sizeof(T));
  int const bytes_b = b_rows ? chunk_size * 2 * SwapShape::columns(p.N) : min(SwapShape::TN, p.N) * p.line;
  uint32_t kept = 0;  // phases whose filters have been copied
  Stage b;
  WorkOf<plain> work(p);
  for (Unit unit; work.take(p, unit);) {
    int const index = unit.phase;
    Phase const& phase = p.phase[index];
    if (unit.count == 0) continue;
    if (p.keep_b) {
      if (kept >> index & 1) continue;
      kept |= 1u << index;
      b.index = phase.first_b;
    }
    SwapStep at(p, phase, plain ? 0 : unit.begin);
    for (int step = 0; step < unit.count; ++step, at.advance(p, phase.taps_w)) {
      int const r = phase.first_r + at.tap_h * phase.step_r, taps = phase.taps_a - (at.copy >= phase.full_copies);
      for (int t = 0; t < taps; ++t) {
        int const s = phase.first_s + (at.copy + t * phase.taps_w) * phase.step_s;
        if (!p.keep_b) ptx::mbarrier_wait(&tables.empty_b[b.index], b.parity ^ 1);
        uint64_t* const bar = &tables.full_b[b.index];
        ptx::mbarrier_arrive_expect_tx(bar, bytes_b);
        uint32_t const to = ring_b + b.index * p.b_bytes;
        int const n = unit.n * SwapShape::TN, k = at.chunk * chunk_size;
        ptx::cp_async_bulk_tensor_5d(to, &p.b, bar, b_rows ? n : k, s, r, b_rows ? k : n, unit.group);
        if (p.keep_b)
          ++b.index;
        else
          b.advance(p.stages_b);
      }
    }
  }
}

// A warp's accumulators of 16 rows and of the 32 pixels of a piece, turned in 16 lines of shared memory: store(i, v) is
// called with row i's at pixel `lane`, so that a store of a warp is a line of a row. Four rows at a time.
template <int kCount, class Store>
__device__ inline void swap_piece(float const (&acc)[kCount], int piece, uint32_t lines, Store const& store) {
  int const lane = int(threadIdx.x) % 32, quad = lane % 4;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int const row = lane / 4 + i % 2 * 8, chunk = i / 2 * 2 + quad / 2, at = piece * 16 + i / 2 * 4 + i % 2 * 2;
    if (at >= kCount) break;  // the last pixels of a tile are not the last of a piece
    ptx::st_shared_f32x2(lines + row * kLineBytes + (chunk ^ (row % 4 * 2)) * 16 + quad % 2 * 8, acc[at], acc[at + 1]);
  }
  __syncwarp();
#pragma unroll 1
  for (int row = 0; row < 16; row += 4) {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      v[i] = ptx::ld_shared_f32(lines + (row + i) * kLineBytes + ((lane / 4) ^ (i * 2)) * 16 + lane % 4 * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) store(row + i, v[i]);
  }
}

// Stores a piece of 32 pixels, whose offsets are `to`, by the 64 columns from n on; eight lanes store the line of a
// pixel. at(pixel, column): where it is in shared memory.
template <class At>
__device__ inline void store_float_piece(Params const& p, At at, float* out, int n, int64_t const* to) {
  int const thread = int(threadIdx.x) % kWarpgroup;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int const pixel = thread / 8 + i % 2 * 16, column = i / 2 * 32 + thread % 8 * 4;
    uint4 const v = ptx::ld_shared_v4(at(pixel, column));
    int64_t const where = to[pixel];
    if (where >= 0 && n + column < p.N) *reinterpret_cast<uint4*>(out + where + n + column) = v;
  }
}

// Sectors of 32 bytes that two tiles of floats store in part take L2 much longer. So tiles may overlap (overlap_tiles),
// and one stores the sectors that begin between its first result and the next tile's.
struct SwapSectors {
  int64_t first, next;  // offsets

  // All lanes; to: of the tile's pixels.
  template <int TM>
  __device__ static SwapSectors of(Params const& p, Unit const& unit, int64_t const* to) {
    constexpr int64_t none = int64_t(1) << 58;
    SwapSectors s{-none, none};
    if (p.tile_m == TM) return s;
    auto valid = [&](int from) {
      int const at = from + int(threadIdx.x) % 32;
      unsigned const found = __ballot_sync(0xffffffff, at < TM && to[min(at, TM - 1)] >= 0);
      return found == 0 ? none : to[from + __ffs(int(found)) - 1];
    };
    if (unit.m > 0) s.first = valid(0);
    s.next = valid(p.tile_m);
    return s;
  }
  // Of a pixel at `where`, whose offset is `offset`.
  __device__ bool begins_behind_first(void const* where, int64_t offset) const {
    return int64_t(reinterpret_cast<uint64_t>(where) & 31) <= (offset - first) * 4;
  }
  __device__ bool begins_before_next(void const* where, int64_t offset) const {
    return int64_t(reinterpret_cast<uint64_t>(where) & 31) > (offset - next) * 4;
  }
};

// Stores floats as swap_store does. Pieces of 32 pixels, whose 64 filters are two lines. Where the result takes no
// vectors, a filter's 64 pixels are two lines, which a warp stores one after the other: what they have of a sector
// meets in L2.
template <int TM, bool plain>
__device__ void swap_store_floats(Params const& p, Unit const& unit, float (&acc)[TM / 2], int64_t const* to,
                                  float const (&bias)[2], uint32_t staging) {
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  int const filter = warp * 16 + lane / 4, quad = lane % 4;
#pragma unroll
  for (int i = 0; i < TM / 2; ++i) acc[i] += bias[i % 4 / 2];
  float* const out = static_cast<float*>(p.out) + unit.group * p.group_out;
  int const n = unit.n * SwapShape::TN;
  if (!plain && p.singly) {
    uint32_t const lines = staging + warp * kPieceBytes;
    auto const sectors = SwapSectors::of<TM>(p, unit, to);
#pragma unroll
    for (int piece = 0; piece < (TM + 63) / 64; ++piece) {
      // A line has pixels of eight at a time by the filter's number, so that a warp meets every bank once.
      auto at = [&](int row, int eight) { return lines + row * 2 * kLineBytes + (eight ^ (row % 4)) * 32; };
      int64_t const pixel[2] = {to[piece * 64 + lane], to[piece * 64 + 32 + lane]};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const filters = min(p.N - n - warp * 16 - half * 8, 8);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          int const k = (piece * 8 + i) * 4 + half * 2;
          if (k >= TM / 2) break;
          ptx::st_shared_f32x2(at(lane / 4, i) + quad * 8, acc[k], acc[k + 1]);
        }
        __syncwarp();
        float* line = out + (n + warp * 16 + half * 8) * p.out_c;
#pragma unroll 1
        for (int row = 0; row < 8; row += 4) {
          float v[4][2];
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j) v[i][j] = ptx::ld_shared_f32(at(row + i, j * 4 + lane / 8) + lane % 8 * 4);
#pragma unroll
          for (int i = 0; i < 4; ++i, line += p.out_c)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              bool mine = pixel[j] >= 0 && row + i < filters;
              float* const where = line + pixel[j];
              if (piece == 0 && j == 0) mine &= sectors.begins_behind_first(where, pixel[j]);
              if (piece * 64 + j * 32 + 64 > TM) mine &= sectors.begins_before_next(where, pixel[j]);
              if (mine) __stcs(where, v[i][j]);
            }
        }
      }
    }
    return;
  }
  // Filter f of pixel i is in line f / 32 * 32 + i; chunks are exchanged so that a store of a warp meets every bank
  // once.
  auto at = [&](int pixel, int f) {
    return staging + (f / 32 * 32 + pixel) * kLineBytes + ((f % 32 / 4) ^ (pixel & 6)) * 16 + f % 4 * 4;
  };
#pragma unroll
  for (int piece = 0; piece < (TM + 31) / 32; ++piece) {
    if (piece > 0) ptx::bar_sync(1 + group, kWarpgroup);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      int const pixel = i / 4 * 8 + quad * 2 + i % 2;
      if (piece * 16 + i >= TM / 2) break;
      ptx::st_shared_f32(at(pixel, filter + i % 4 / 2 * 8), acc[piece * 16 + i]);
    }
    ptx::bar_sync(1 + group, kWarpgroup);
    store_float_piece(p, at, out, n, to + piece * 32);
  }
}

// Stores a warpgroup's accumulators: 64 filters by the TM pixels whose offsets are `to`. A thread has those of filters
// lane / 4 and lane / 4 + 8 of its warp's 16, pixels 8 j + 2 (lane % 4) + {0, 1}. Pieces of 64 pixels pass through
// shared memory, transposed, so that eight lanes store the line of a pixel.
template <class T, int TM, bool plain, bool pairs>
__device__ void swap_store(Params const& p, Unit const& unit, float (&acc)[TM / 2], int64_t const* to,
                           uint32_t staging) {
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  int const thread = int(threadIdx.x) % kWarpgroup;
  if (!plain && SwapTile<TM>::splits && unit.part >= 0) {
    float* const partial = static_cast<float*>(p.workspace) + int64_t(unit.part) * (SwapShape::TM * SwapShape::TN) +
                           lane % 4 * 2 * SwapShape::TN + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < TM / 2; ++i) partial[(i / 4 * 8 + i % 2) * SwapShape::TN + i % 4 / 2 * 8] = acc[i];
    return;
  }
  int const n = unit.n * SwapShape::TN;
  float bias[2] = {};
  if (p.bias != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const at = n + warp * 16 + lane / 4 + half * 8;
      if (at < p.N) bias[half] = widen(static_cast<T const*>(p.bias)[unit.group * p.group_bias + at * p.bias_stride]);
    }
  }
  if constexpr (sizeof(T) == 4) {
    swap_store_floats<TM, plain>(p, unit, acc, to, bias, staging);
    return;
  } else {
    if (plain ? pairs : p.singly) {  // a warp's 16 filters as lines of pixels
      ptx::bar_sync(1 + group, kWarpgroup);
#pragma unroll
      for (int piece = 0; piece < (TM + 63) / 64; ++piece) {
        __syncwarp();
#pragma unroll
        for (int t = 0; t < 4; ++t) {  // 16 pixels
          uint32_t v[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            int const at = (piece * 8 + t * 2 + e / 2) * 4 + e % 2 * 2;
            v[e] = at < TM / 2 ? pack<T>(acc[at] + bias[e % 2], acc[at + 1] + bias[e % 2]) : 0;
          }
          int const line = warp * 16 + lane / 8 % 2 * 8 + lane % 8, chunk = t * 2 + lane / 16;
          ptx::stmatrix_x4(staging + line * kLineBytes + (chunk ^ (line % 8)) * 16, v);
        }
        __syncwarp();
        store_pairs(p, static_cast<T*>(p.out) + unit.group * p.group_out, n + warp * 16, p.N, to + piece * 64,
                    staging + warp * 16 * kLineBytes);
      }
      return;
    }
    int const column = n + thread % 8 * 8;
    T* const out = static_cast<T*>(p.out) + unit.group * p.group_out + column;
#pragma unroll
    for (int piece = 0; piece < (TM + 63) / 64; ++piece) {
      if (piece > 0) ptx::bar_sync(1 + group, kWarpgroup);
#pragma unroll
      for (int t = 0; t < 4; ++t) {  // 16 pixels
        uint32_t v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          int const at = (piece * 8 + t * 2 + e / 2) * 4 + e % 2 * 2;
          v[e] = at < TM / 2 ? pack<T>(acc[at] + bias[e % 2], acc[at + 1] + bias[e % 2]) : 0;
        }
        int const line = t * 16 + lane / 16 * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
        ptx::stmatrix_x4_trans(staging + line * kLineBytes + (chunk ^ (line % 8)) * 16, v);
      }
      ptx::bar_sync(1 + group, kWarpgroup);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const line = thread / 8 + i * 16;
        uint4 const v = ptx::ld_shared_v4(staging + line * kLineBytes + ((thread % 8) ^ (line % 8)) * 16);
        int64_t const pixel = to[piece * 64 + line];
        if (pixel >= 0 && column < p.N) *reinterpret_cast<uint4*>(out + pixel) = v;
      }
    }
  }
}

// The instructions between two taps of 32 channels take as long as their multiplication. So what they need is in
// registers: addresses and descriptors in units of 16 bytes, and the fields of the phase.
template <class T, bool b_rows, int TM, bool plain, bool pairs>
__device__ void swap_multiply(Params const& p, uint32_t ring, SwapTables& tables) {
  // 32 columns are read twice; the second time for sums that are not stored.
  int const line_b = b_rows ? 2 * SwapShape::columns(p.N) : p.line;
  uint32_t const step_b = b_rows ? line_b : 2;  // 16 k
  uint64_t const layout = layout_of(p.line), layout_b = layout_of(line_b);
  int const group = __shfl_sync(0xffffffff, int(threadIdx.x) / kWarpgroup, 0), lane = int(threadIdx.x) % 32;
  int const thread = int(threadIdx.x) % kWarpgroup;
  uint32_t const staging = ring + SwapShape::ring_bytes + group * kRunBytes;
  // From a shuffle, or the compiler works them out anew for every tap.
  uint32_t const ring_a = __shfl_sync(0xffffffff, ring / 16, 0);
  uint32_t const bars = __shfl_sync(0xffffffff, ptx::shared_address(&tables), 0);
  uint32_t const full_a = bars + offsetof(SwapTables, full_a), full_b = bars + offsetof(SwapTables, full_b);
  uint32_t seen = 0;  // phases whose filters have arrived and stay
  Stage a, b;
  float acc[TM / 2];
  auto release = [&](int stage_a, int stage_b) {  // -1: none
    if (lane == 0 && stage_a >= 0) ptx::mbarrier_arrive(&tables.empty_a[stage_a]);
    if (lane == 0 && stage_b >= 0) ptx::mbarrier_arrive(&tables.empty_b[stage_b]);
  };
  WorkOf<plain> work(p);
  Unit unit;
  bool first = true;
  for (bool mine = group == 0; work.take(p, unit); mine = !mine, first = false) {
    Phase const& phase = p.phase[unit.phase];
    if (!mine) {
      a = skip(a, unit.count, p.stages_a);
      if (!p.keep_b && unit.count > 0)
        b = skip(b, stages_of_b(phase, unit.begin + unit.count) - stages_of_b(phase, unit.begin), p.stages_b);
      continue;
    }
    bool const more = work.more(p);
    int64_t* const to = tables.out[group];
    ptx::bar_sync(1 + group, kWarpgroup);  // the last tile's offsets and piece have been read
#pragma unroll
    for (int i = 0; i < 2; ++i)
      to[i * kWarpgroup + thread] =
          TM == 256 || i * kWarpgroup + thread < TM
              ? out_of(p, phase, int64_t(unit.m) * (plain ? TM : p.tile_m) + i * kWarpgroup + thread)
              : -1;
#pragma unroll
    for (int i = 0; i < TM / 2; ++i) acc[i] = 0;
    bool const wait_b = !(seen >> unit.phase & 1);
    if (p.keep_b) {
      b = {phase.first_b, 0};
      if (unit.count > 0) seen |= 1u << unit.phase;
    }
    // A warpgroup's turn begins when the other has seen its last stage arrive: a barrier's parity says nothing about
    // the trip before the last.
    if (!first) ptx::bar_sync(3 + group, 2 * kWarpgroup);
    int before_a = -1, before_b = -1;  // stages of the multiplications that are under way
    int const taps_w = phase.taps_w, taps_a = phase.taps_a, full_copies = phase.full_copies;
    uint32_t const shift = uint32_t(phase.shift * p.line) / 16, ring_b = ring_a + uint32_t(p.stages_a * p.a_bytes) / 16;
    SwapStep at(p, phase, plain || unit.count == 0 ? 0 : unit.begin);
    for (int step = 0; step < unit.count; ++step, at.advance(p, taps_w)) {
      int const instructions = at.chunk == p.chunks - 1 ? p.last : 4, taps = taps_a - (at.copy >= full_copies);
      ptx::mbarrier_wait(full_a + a.index * 8, a.parity);
      uint32_t from_a = ring_a + a.index * (uint32_t(p.a_bytes) / 16);
      if (p.keep_b && instructions == 2) {  // nothing is released within a row of taps
        ptx::wgmma_fence_operand(acc);
        ptx::wgmma_fence();
        for (int t = 0; t < taps; ++t, from_a += shift, ++b.index) {
          if (wait_b) ptx::mbarrier_wait(full_b + b.index * 8, 0);
          uint32_t const from_b = ring_b + b.index * (uint32_t(p.b_bytes) / 16);
#pragma unroll
          for (int k = 0; k < 2; ++k)
            ptx::wgmma_mma_async<T, b_rows, false>(acc, layout_b | (from_b + k * step_b), layout | (from_a + k * 2));
          ptx::wgmma_commit_group();  // behind the loop it would end a group of nothing, and all taps be waited for
        }
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_fence_operand(acc);
        release(before_a, -1);
        before_a = a.index;
        a.advance(p.stages_a);
        continue;
      }
      for (int t = 0; t < taps; ++t, from_a += shift) {
        if (wait_b) ptx::mbarrier_wait(full_b + b.index * 8, b.parity);
        uint32_t const from_b = ring_b + b.index * (uint32_t(p.b_bytes) / 16);
        ptx::wgmma_fence_operand(acc);
        auto instruct = [&](auto count) {
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < decltype(count)::value; ++k)
            ptx::wgmma_mma_async<T, b_rows, false>(acc, layout_b | (from_b + k * step_b), layout | (from_a + k * 2));
          ptx::wgmma_commit_group();
        };
        // As with_constant of tma.cuh, but that 2 comes before 3: the taps of 32 channels have no time to spare.
        if (instructions == 4)
          instruct(std::integral_constant<int, 4>());
        else if (instructions == 2)
          instruct(std::integral_constant<int, 2>());
        else if (instructions == 3)
          instruct(std::integral_constant<int, 3>());
        else
          instruct(std::integral_constant<int, 1>());
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_fence_operand(acc);
        release(before_a, before_b);  // the step before has been read
        before_a = t == taps - 1 ? a.index : -1;
        before_b = p.keep_b ? -1 : b.index;
        if (p.keep_b)
          ++b.index;
        else
          b.advance(p.stages_b);
      }
      a.advance(p.stages_a);
    }
    if (more) ptx::bar_arrive(4 - group, 2 * kWarpgroup);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
    release(before_a, before_b);
    ptx::bar_sync(1 + group, kWarpgroup);  // the offsets have been written
    swap_store<T, TM, plain, pairs>(p, unit, acc, to, staging);
  }
}

// b_rows: B's columns are contiguous in memory, not its k. pairs: of plain problems, 16 bits, that are stored over
// planes.
template <class T, bool b_rows, int TM = 256, bool plain = false, bool pairs = false>
__global__ void __launch_bounds__(kThreads, 1) tma_swap_kernel(__grid_constant__ Params const p) {
  extern __shared__ uint8_t dynamic[];
  __shared__ SwapTables tables;
  uint32_t const ring = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  if (threadIdx.x % 32 == 0) {
    constexpr int warps = kWarpgroup / 32;  // that read a stage
    int const warp = int(threadIdx.x) / 32;
    for (int i = warp; i < kMaxStages; i += kThreads / 32) {
      ptx::mbarrier_init(&tables.full_a[i], 1);
      ptx::mbarrier_init(&tables.empty_a[i], warps);
      ptx::mbarrier_init(&tables.empty_b[i], warps);
    }
    for (int i = warp; i < kMaxKept; i += kThreads / 32) ptx::mbarrier_init(&tables.full_b[i], 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
  if (threadIdx.x < 2 * kWarpgroup) {
    ptx::setmaxnreg_inc<SwapShape::multiply_regs>();
    swap_multiply<T, b_rows, TM, plain, pairs>(p, ring, tables);
  } else {
    ptx::setmaxnreg_dec<SwapShape::copy_regs>();
    int const warp = warp_uniform(int(threadIdx.x) / 32 % 4);
    if (warp == 0 && ptx::elect()) {
      swap_copy_a<T, TM, plain>(p, ring, tables);
      ptx::griddepcontrol_launch_dependents();
    } else if (warp == 1 && ptx::elect()) {
      swap_copy_b<T, b_rows, plain>(p, ring, tables);
    }
  }
}

// Has tiles of few steps overlap by as much as their last sectors need, where the rows of planes follow each other and
// results are many: elsewhere these, 4 % more, take longer than what they save.
template <int TM>
void overlap_tiles(Params& p, int64_t depth, int64_t results) {
  Phase& phase = p.phase[0];
  int const valid = phase.valid_columns, gap = phase.columns.value - valid;
  if (!p.singly || p.phases.value != 1 || p.shares.shared > 0 || p.out_w != 1 || p.out_h != valid || valid < 16 ||
      gap > kHalo || p.out_n < p.out_h * phase.rows.value)
    return;
  if (depth % 16 != 0 || depth > 32 || phase.stages_b > 9 || results < 100'000'000) return;
  p.tile_m = (TM - gap - 7) / 2 * 2;
  phase.tiles = int32_t(ceil_div(phase.M, p.tile_m));
  p.turn = p.cycle = Divisor(phase.tiles);
  p.alone = phase.tiles * p.tiles_n.value * p.groups.value;
}

template <Op op, DType dtype>
cudaError_t launch_swapped(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  auto launch = [&](auto pixels) {
    constexpr int TM = decltype(pixels)::value, TN = SwapShape::TN;
    auto const plain = tma_swap_kernel<T, op == Op::dgrad, TM, true>;
    auto kernel = plain, pairs = plain;  // tiles of fewer pixels are of plain problems alone
    if constexpr (TM == SwapShape::TM)
      kernel = tma_swap_kernel<T, op == Op::dgrad>, pairs = tma_swap_kernel<T, op == Op::dgrad, TM, true, true>;
    return launch_kernel<SwapTile<TM>, op, dtype, TM, TN>(kernel, problem, plan, args, stream, nullptr, plain, nullptr,
                                                          pairs);
  };
  switch (tma_tile_pixels(row_of(plan), problem, plan.split_k)) {
    case 232:
      return launch(std::integral_constant<int, 232>());
    case 248:
      return launch(std::integral_constant<int, 248>());
    default:
      return launch(std::integral_constant<int, SwapShape::TM>());
  }
}

}  // namespace conv2d_ext::tma
