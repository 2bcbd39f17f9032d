// Dense convolution in channels_last on Hopper's copy engine (TMA) and tensor cores (wgmma): fprop and dgrad as an
// implicit GEMM, out[pixel, n] = sum over taps and channels of A[pixel moved by the tap, channel] * B[n, tap, channel].
// docs/kernels.md has a figure of the pipeline; tma_swap.cuh has the tiles of 64 filters, tma_small.cuh those of 64
// pixels, tma_wgrad.cuh is the sibling.
//
// A persistent block of three warpgroups walks over TM x TN tiles. Four threads of the last feed two rings of
// stages in shared memory, two each: A (TM + kHalo pixels, 128 or 64 bytes of channels each) by im2col copies, which
// know the padding and the ends of rows and images; B (TN filters, or for dgrad the channels of 64 filters) by tiled
// copies. The warpgroups multiply, TM / 2 pixels each, and store; those of tiles of 128x128 take turns, a tile each, so
// that one multiplies while the other stores. `full` and `empty` barriers, a pair a stage, hand the stages over.
//
// Variant im2col: every tap copies its own pixels. Variant halo (stride 1 along W): the pixels of a tile include the
// padded columns, so that the pixels of tap s are those of tap 0 moved by s * dilation, lines of the same stage: one
// copy of A serves a row of the filter. The padded columns' results are not stored.
//
// Most problems are plain: for these there are kernels that do nothing else. Filters of few steps stay in shared memory
// for all tiles of a block. 128x256 has a second kernel, for large dilations, that leaves out rows of taps where all
// pixels of a tile meet padding.
//
// With a split, the tiles after the last whole round are not left to some of the blocks: their steps are shared out
// evenly, and tma_reduce adds the parts of a tile.
//
// Slices: two neighbouring groups of 32 channels (16 in TF32) are copied as one (core/merged.h). Each half of the
// channels meets the filters of its own group alone, whose results are columns of their own, so nothing is multiplied
// by zeros. Instructions that small are bound by what is beside them: addresses are added to descriptors, and filters
// that stay are waited for once.
//
// Floats are multiplied in TF32, rounded by the copy engine; tma_tf32.cuh launches these.
#pragma once

#include <type_traits>

#include "../core/merged.h"
#include "../core/phase_runs.h"
#include "../core/pointwise.h"
#include "fragments.cuh"
#include "gather.cuh"
#include "spread.cuh"
#include "tma_map.h"

namespace conv2d_ext::tma {

// What A is: pixels of an im2col copy, or filters of a turned problem with contiguous k or contiguous rows.
enum class A : uint8_t { pixels, lines, rows };

constexpr int kThreads = 3 * kWarpgroup;
constexpr int kRunBytes = 64 * kLineBytes;    // 64 k of 64 rows, N-major
constexpr int kPieceBytes = 16 * kLineBytes;  // of the output: a warp's rows, 128 bytes of columns
constexpr int kMaxKept = 64;                  // stages of B that stay
constexpr int kReduceThreads = 256;
constexpr int kReduceSide = 32;  // a block's four sums a thread as a square

template <class T, int TN>
struct Tables {
  // Where pixels go that are stored in single elements, or -1; for each warpgroup. Floats need none.
  int64_t out[2][sizeof(T) == 4 ? 1 : 64];
  T bias[2][TN];
  uint32_t steps[sizeof(T) == 4 || TN == 64 ? 4 : kListed];  // of a tile: chunk, row and column of the tap; if plain
  uint64_t full_a[kMaxStages], empty_a[kMaxStages], full_b[kMaxStages], empty_b[kMaxStages];
};

// Their addresses, kept in registers: worked out anew at every step they cost more instructions than the step itself.
struct Barriers {
  uint32_t full_a, empty_a, full_b, empty_b;

  template <class AnyTables>
  __device__ explicit Barriers(AnyTables const& t)
      : full_a(warp_uniform(ptx::shared_address(t.full_a))),
        empty_a(warp_uniform(ptx::shared_address(t.empty_a))),
        full_b(warp_uniform(ptx::shared_address(t.full_b))),
        empty_b(warp_uniform(ptx::shared_address(t.empty_b))) {}
};

// by_turns: the warpgroups of 128x128 have whole tiles, not halves, as those of 64 pixels in 16 bits.
template <class T, int TM, int TN, bool turned = false, bool by_turns = sizeof(T) == 2>
struct Shape {
  static constexpr int threads = kThreads;
  static constexpr int blocks = TM == 128 && TN == 64 ? 2 : 1;  // an SM
  // A warpgroup has whole tiles, not halves.
  static constexpr bool turns = by_turns && (TM == 64 || (TM == 128 && TN == 128));
  static constexpr bool keeps_b = false, stays = sizeof(T) == 2 && TM != 64, splits = true, even_stages = false;
  static constexpr int halo_stages = blocks == 2 ? 2 : 3;  // of A, lines of 128 bytes
  static constexpr int columns(int) { return 64; }         // that a copy of B takes at most, if it is N-major
  static constexpr int kept_bytes(int, int, bool) { return 0; }
  static constexpr int runs = (TN + 63) / 64;
  // As many if B is K-major: TN lines. Floats are never N-major.
  static constexpr int b_bytes = sizeof(T) == 4 ? TN * kLineBytes : runs * kRunBytes;
  // Pieces of the output on their way: one for each multiplying warp, or several if the copy engine stores them; they
  // divide those of a tile, so that the next tile's first takes the place of the oldest.
  static constexpr int lines = TN * int(sizeof(T)) / kLineBytes;  // of a pixel
  static constexpr int pieces = lines * kLineBytes != TN * int(sizeof(T)) ? 0
                                : blocks == 2                             ? 1
                                : lines % 2 == 0                          ? 2
                                : lines == 3                              ? 3
                                                                          : 1;
  static constexpr int ring_bytes = (blocks == 2 ? 94 : 207) * 1024;
  static constexpr int ring_beside_pieces = blocks == 2 ? ring_bytes : (224 - 16 * pieces) * 1024;
  // An SM has 228 KB, of which each block takes one more; the ring begins at a multiple of 1024, for the swizzle.
  static constexpr int tables_bytes = int(sizeof(Tables<T, TN>));
  static constexpr int shared_bytes = blocks == 2 ? 111 * 1024 : 227 * 1024 - tables_bytes;
  static constexpr int room = shared_bytes + tables_bytes - (tables_bytes + 1023) / 1024 * 1024;
  static_assert(ring_bytes + 8 * kPieceBytes <= room && ring_beside_pieces + 8 * pieces * kPieceBytes <= room);
  static_assert(blocks * (shared_bytes + tables_bytes + 1024) <= 228 * 1024 && tables_bytes % 16 == 0);
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

// How blocks share the tiles after the whole rounds: `aligned` blocks a tile take aligned_share of its first
// aligned_steps each, so that many read the same filters at a time. What is left, a strip of each tile, is cut into
// equal shares for the blocks that are left.
struct Shares {
  int32_t shared = 0;  // tiles
  int32_t aligned = 0, aligned_steps = 0, aligned_share = 0;
  int32_t strip_steps = 0, strip_share = 0;

  Shares() = default;
  Shares(TileSplit const& split, int64_t steps) : shared(int32_t(split.shared)) {
    if (shared == 0) return;
    aligned = int32_t(split.workers / shared);
    int64_t const left = split.workers - aligned * split.shared;
    aligned_steps = int32_t(left == 0 ? steps : aligned * split.shared * steps / split.workers);
    aligned_share = int32_t(ceil_div(aligned_steps, aligned));
    strip_steps = int32_t(steps - aligned_steps);
    if (left > 0) strip_share = int32_t(ceil_div(split.shared * strip_steps, left));
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
  int32_t copies;        // of A for all taps of a chunk
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
  CUtensorMap out_rows;  // the output's pixels as rows, for a piece, if `by_engine`
  Phase phase[kMaxPhases];
  Divisor phases, groups;
  Divisor tiles_n;
  Divisor turn, last_turn;  // tiles along M of a phase before the next one's
  Divisor cycle;            // of all phases
  int32_t cycles;           // before the last
  int32_t alone;            // tiles that a block has for itself
  Shares shares;            // the others
  Divisor strip_steps;
  bool by_engine;      // the copy engine stores tiles
  bool singly;         // the output takes no vectors of channels
  bool apart;          // plain but for that, and over planes: kernels of their own
  bool in_runs;        // likewise, of pixels whose channels follow each other without gaps
  Divisor rows_first;  // tiles along M that follow each other; 1: those along N do
  Divisor stages_a, stages_b;
  bool keep_b;                 // all filters stay in the stages of B
  bool plain;                  // see tma_kernel
  bool keep_a;                 // a block's rows of A, which all its tiles have, stay in the stages of A
  int32_t chunks;              // of the reduction's channels
  int32_t together;            // chunks whose taps are taken together
  int32_t last;                // instructions that the last chunk takes
  int32_t line;                // bytes of a chunk: 128, or 64 for up to 32 channels
  int32_t a_bytes, b_bytes;    // of a stage
  int32_t stride_h, stride_w;  // A's pixels
  int32_t N;                   // columns of a group; of a turned problem those of all images' runs
  Divisor runs;                // of a turned problem: of 64 pixels, of an image
  int32_t group_a;             // channels of A a group
  bool maps_groups;            // they have a map of their own; the group is a coordinate
  int64_t group_out, group_bias;
  int64_t out_n, out_c, out_h, out_w;
  void const* bias;
  void const* row_bias;  // of the rows, not the columns
  int64_t bias_stride;
  void* out;
  void* workspace;
  int32_t rows_a, tile_m;  // rows of A's images; both for skip_padding
  int32_t slices;          // groups that are copied as one
  PhaseRuns runs_of;       // which tiles blocks have for themselves; of dgrad with a stride
};

// A tile, or a block's part of one.
struct Unit {
  int32_t phase;              // its index
  int32_t tile;               // of all
  int32_t m, n, group;        // tiles of a phase and group
  int32_t begin, count;       // steps
  int32_t part;               // where in the workspace the sums go; -1: they are the result
  int32_t first_tap, copies;  // after skip_padding: row of taps; copies of A for all taps of a chunk

  Unit() = default;
  // quick: by one division where that will do, which blocks of a single tile notice.
  __device__ Unit(Params const& p, int index, bool quick = false) : tile(index), begin(0), part(-1) {
    int row = index;
    if (quick && p.phases == 1 && p.groups == 1 && p.rows_first == 1) {
      phase = group = 0, n = index, m = p.tiles_n.divide(n), count = p.phase[0].steps;
      return;
    }
    index = p.rows_first.divide(row);
    n = index, index = p.tiles_n.divide(n);
    group = index, index = p.groups.divide(group);
    int const cycle = p.cycle.divide(index);
    int const turn = (cycle < p.cycles ? p.turn : p.last_turn).divide(index);
    phase = turn;
    m = cycle * p.turn + index + row;
    count = m < p.phase[turn].tiles ? p.phase[turn].steps : 0;
  }

  // Of a plain problem.
  __device__ static Unit whole(Params const& p, int index) {
    Unit unit;
    unit.tile = index, unit.phase = unit.group = unit.begin = 0, unit.part = -1, unit.n = index;
    unit.m = p.tiles_n.divide(unit.n), unit.count = p.phase[0].steps;
    return unit;
  }

  // Leaves out the rows of taps with which all pixels of the tile meet padding; a tile of several images has all. A
  // part of a tile keeps its share of the steps that are left.
  __device__ void skip_padding(Params const& p) {
    Phase const& f = p.phase[phase];
    first_tap = 0, copies = f.copies;
    int64_t from = int64_t(m) * p.tile_m, to = min(from + p.tile_m, f.M) - 1;
    int64_t top = f.columns.divide(from), bottom = f.columns.divide(to);
    if (f.rows.divide(top) != f.rows.divide(bottom)) return;
    int const highest = f.h0 + int(top) * p.stride_h, lowest = f.h0 + int(bottom) * p.stride_h;  // at the first tap
    int rows = copies / f.taps_w;
    while (rows > 0 && highest + (rows - 1) * f.tap_h >= p.rows_a) --rows;
    while (first_tap < rows && lowest + first_tap * f.tap_h < 0) ++first_tap;
    copies = (rows - first_tap) * f.taps_w;
    int64_t const left = int64_t(copies) * p.chunks;
    int const end = int((begin + count) * left / f.steps);
    begin = int(begin * left / f.steps), count = end - begin;
  }
};

// The units of a block: every gridDim.x-th tile, or, if `by_runs`, those of p.runs_of; then its share of the tiles that
// are split.
template <bool by_runs>
struct WorkBy {
  int32_t tile, strip, strip_end;
  int32_t run, at;  // of p.runs_of; the block's next tile there
  bool aligned;

  WorkBy() = default;
  __device__ explicit WorkBy(Params const& p) : tile(int(blockIdx.x)), strip(0), strip_end(0), run(-1), at(0) {
    if (by_runs && p.runs_of.count > 0) advance(p);
    Shares const& s = p.shares;
    int const worker = int(blockIdx.x) - s.aligned * s.shared;
    aligned = worker < 0;
    if (aligned) return;
    strip = worker * s.strip_share;
    strip_end = min(strip + s.strip_share, s.shared * s.strip_steps);
  }
  __device__ bool more(Params const& p) const { return tile < p.alone || aligned || strip < strip_end; }
  // To the block's next tile, or none.
  __device__ void advance(Params const& p) {
    if (!by_runs || p.runs_of.count == 0) {
      tile += int(gridDim.x);
      return;
    }
    while (true) {
      if (run >= 0 && at >= 0 && at < p.runs_of.run[run].tiles) {
        PhaseRun const& r = p.runs_of.run[run];
        tile = r.first + at;
        at += r.blocks;
        return;
      }
      if (++run >= p.runs_of.count) break;
      at = int(blockIdx.x) - p.runs_of.run[run].block;
      if (at >= p.runs_of.run[run].blocks) at = -1;
    }
    tile = p.alone;
  }
  // False if there is none.
  template <bool skips = false>
  __device__ bool take(Params const& p, Unit& unit, bool quick = false) {
    Shares const& s = p.shares;
    int index = tile, begin = 0, count = 0, part = -1;
    if (tile < p.alone) {
      advance(p);
    } else if (aligned) {
      aligned = false;
      int const share = int(blockIdx.x) / s.shared;
      index = p.alone + int(blockIdx.x) % s.shared, part = int(blockIdx.x);
      begin = share * s.aligned_share;
      count = min(s.aligned_share, s.aligned_steps - begin);
    } else {
      if (strip >= strip_end) return false;
      int from = strip;
      int const of = p.strip_steps.divide(from);
      index = p.alone + of, part = int(blockIdx.x) + of;
      begin = s.aligned_steps + from;
      count = min(s.strip_steps - from, strip_end - strip);
      strip += count;
    }
    unit = Unit(p, index, quick);  // once: copies of its divisions would be a fifth of a kernel's code
    unit.begin = begin, unit.part = part;
    if (part >= 0) unit.count = max(min(unit.count - begin, count), 0);
    if constexpr (skips) unit.skip_padding(p);
    return true;
  }
};

using Work = WorkBy<true>;

// The same of a plain problem: whole tiles, one phase and group.
struct PlainWork {
  int32_t tile;

  PlainWork() = default;
  __device__ explicit PlainWork(Params const&) : tile(int(blockIdx.x)) {}
  __device__ bool more(Params const& p) const { return tile < p.alone; }
  template <bool skips = false>
  __device__ bool take(Params const& p, Unit& unit, bool = true) {
    if (tile >= p.alone) return false;
    unit = Unit::whole(p, tile);
    tile += int(gridDim.x);
    return true;
  }
};
template <bool plain>
using WorkOf = std::conditional_t<plain, PlainWork, Work>;

// The place in a ring `count` stages on.
__device__ inline Stage skip(Stage at, int count, Divisor const& stages) {
  at.index += count;
  at.parity ^= stages.divide(at.index) & 1;
  return at;
}

// Descriptors of operands with contiguous channels, without the address.
__device__ inline uint64_t layout_of(int line) {
  return line == kLineBytes ? ptx::wgmma_descriptor<128>(0, 0, 8 * 128) : ptx::wgmma_descriptor<64>(0, 0, 8 * 64);
}

__device__ inline uint64_t at_address(uint64_t layout, uint32_t shared) { return layout | (shared & 0x3FFFF) >> 4; }

// That of what lies so many bytes behind, in one instruction: nothing is carried beyond an address.
__device__ inline uint64_t bytes_on(uint64_t descriptor, uint32_t bytes) {
  return (descriptor >> 32 << 32) | (uint32_t(descriptor) + bytes / 16);
}

// A step of the reduction, one copy of A. All taps of `together` chunks follow each other, then those of the next ones:
// what the taps of a chunk share of A stays in L2, and chunks that are taken together share lines of 256 bytes.
struct Step {
  int32_t tap_w = 0, tap_h = 0, chunk = 0, first = 0;  // first: of the chunks taken together
  int32_t taps_w, copies, chunks, together;

  Step() = default;
  __device__ Step(Params const& p, Phase const& phase, int step) : Step(p, phase, step, phase.copies) {}
  __device__ Step(Params const& p, Phase const& phase, int step, int copies)
      : taps_w(phase.taps_w), copies(copies), chunks(p.chunks), together(p.together) {
    if (step == 0) return;
    chunk = first = step / (together * copies) * together;
    step -= first * copies;
    int const row = min(together, chunks - first) * taps_w;
    tap_h = step / row, step %= row;
    chunk += step / taps_w, tap_w = step % taps_w;
  }
  __device__ bool last_chunk() const { return chunk == chunks - 1; }
  __device__ void advance() {
    if (++tap_w < taps_w) return;
    tap_w = 0;
    if (++chunk < min(first + together, chunks)) return;
    if (++tap_h * taps_w == copies) tap_h = 0, first = chunk;
    chunk = first;
  }
};

// The offset of pixel m, or -1.
__device__ inline int64_t out_of(Params const& p, Phase const& phase, int64_t m) {
  if (m >= phase.M) return -1;
  int64_t j = m, i = phase.columns.divide(j);
  if (j >= phase.valid_columns) return -1;
  int64_t const n = phase.rows.divide(i);
  return phase.out + n * p.out_n + i * p.out_h + j * p.out_w;
}

// Copies pixels of A from (w, h, n) on, moved by the offsets; `channel` counts within the group.
__device__ inline void copy_pixels(Params const& p, uint32_t to, CUtensorMap const& map, uint32_t bar, int group,
                                   int channel, int w, int h, int n, int offset_w, int offset_h) {
  if (p.maps_groups)
    ptx::cp_async_bulk_tensor_im2col_5d(to, &map, bar, channel, w, h, n, group, offset_w, offset_h);
  else
    ptx::cp_async_bulk_tensor_im2col(to, &map, bar, group * p.group_a + channel, w, h, n, offset_w, offset_h);
}

__device__ inline void copy_pixels(Params const& p, uint32_t to, CUtensorMap const& map, uint64_t* bar, int group,
                                   int channel, int w, int h, int n, int offset_w, int offset_h) {
  copy_pixels(p, to, map, ptx::shared_address(bar), group, channel, w, h, n, offset_w, offset_h);
}

// Two threads copy A, each to every other stage, and two B: one takes longer to prepare a copy than the engine takes
// for a small one. A stage has the same thread always, which cannot get two trips round the ring ahead of it.
constexpr int kCopiers = 2;

template <class T, int TM, A a_is, bool skips = false>
__device__ void copy_a(Params const& p, uint32_t ring, Barriers const& bars, int copier) {
  int const chunk_size = p.line / int(sizeof(T)), bytes = p.a_bytes, stages = p.stages_a;
  Stage a;
  Work work(p);
  for (Unit unit; work.take<skips>(p, unit);) {
    Phase const& phase = p.phase[unit.phase];
    int64_t j = int64_t(unit.m) * TM;
    int64_t i = phase.columns.divide(j);
    int const n = int(phase.rows.divide(i));
    int const h = phase.h0 + int(i) * p.stride_h, w = phase.w0 + int(j) * p.stride_w;
    int const tap_h = phase.tap_h, tap_w = phase.tap_w, first_h = skips ? unit.first_tap * tap_h : 0;
    CUtensorMap const& map = p.a[unit.phase];
    int const first_row = unit.m * TM, runs = min(TM / 64, (int(phase.M) - first_row + 63) / 64);
    Step at(p, phase, unit.begin, skips ? unit.copies : phase.copies);
#pragma unroll 1
    for (int step = 0; step < unit.count; ++step, at.advance()) {
      if (a.index % 2 == copier) {
        uint32_t const full = bars.full_a + a.index * 8, to = ring + a.index * bytes;
        // Passes at once on the first trip round the ring.
        ptx::mbarrier_wait(bars.empty_a + a.index * 8, a.parity ^ 1);
        if constexpr (a_is == A::rows) {  // 64 rows of a chunk at a time
          ptx::mbarrier_arrive_expect_tx(full, runs * chunk_size * kLineBytes);
#pragma unroll 1
          for (int run = 0; run < runs; ++run)
            ptx::cp_async_bulk_tensor_5d(to + run * kRunBytes, &map, full, first_row + run * 64, 0, 0,
                                         at.chunk * chunk_size, 0);
        } else {
          ptx::mbarrier_arrive_expect_tx(full, bytes);
          copy_pixels(p, to, map, full, unit.group, at.chunk * chunk_size, w, h, n, at.tap_w * tap_w,
                      first_h + at.tap_h * tap_h);
        }
      }
      a.advance(stages);
    }
    if (a_is != A::pixels && p.keep_a) return;
  }
}

// All threads of a block: the list of a plain problem's steps.
__device__ inline void list_steps(Params const& p, uint32_t* list, int threads) {
  for (int i = int(threadIdx.x); i < p.phase[0].steps; i += threads) {
    Step const at(p, p.phase[0], i);
    list[i] = uint32_t(at.chunk) | uint32_t(at.tap_h) << 16 | uint32_t(at.tap_w) << 24;
  }
}

// What one of two copying threads does in a plain problem: every other step, from a list, as the stages are even in
// number. begin(tile), then copy(stage, chunk, row and column of the tap) for each.
template <class Begin, class Copy>
__device__ __forceinline__ void copy_listed(Params const& p, uint32_t const* list, uint32_t empty, int stages,
                                            int copier, Begin begin, Copy copy) {
  int const steps = p.phase[0].steps;
  uint32_t parity = 1;  // passes at once on the first trip round the ring
  int stage = copier, step = copier;
  for (int tile = int(blockIdx.x); tile < p.alone; tile += int(gridDim.x)) {
    begin(tile);
#pragma unroll 1
    for (; step < steps; step += kCopiers) {
      uint32_t const of = list[step];
      ptx::mbarrier_wait(empty + stage * 8, parity);
      copy(stage, int(of & 0xFFFF), int(of >> 16 & 0xFF), int(of >> 24));
      if ((stage += kCopiers) >= stages) stage = copier, parity ^= 1;
    }
    step -= steps;
  }
}

template <class T, int TM>
__device__ void copy_listed_a(Params const& p, uint32_t ring, Barriers const& bars, uint32_t const* list, int copier) {
  int const chunk_size = p.line / int(sizeof(T)), bytes = p.a_bytes;
  Phase const& phase = p.phase[0];
  int const tap_h = phase.tap_h, tap_w = phase.tap_w;
  int n, h, w;
  auto begin = [&](int tile) {
    int64_t j = int64_t(p.tiles_n.divide(tile)) * TM;
    int64_t i = phase.columns.divide(j);
    n = int(phase.rows.divide(i)), h = phase.h0 + int(i) * p.stride_h, w = phase.w0 + int(j) * p.stride_w;
  };
  copy_listed(p, list, bars.empty_a, p.stages_a, copier, begin, [&](int stage, int chunk, int row, int column) {
    uint32_t const full = bars.full_a + stage * 8;
    ptx::mbarrier_arrive_expect_tx(full, bytes);
    ptx::cp_async_bulk_tensor_im2col(ring + stage * bytes, &p.a[0], full, chunk * chunk_size, w, h, n, column * tap_w,
                                     row * tap_h);
  });
}

template <class T, int TN, bool b_rows>
__device__ void copy_listed_b(Params const& p, uint32_t ring, Barriers const& bars, uint32_t const* list, int copier) {
  int const chunk_size = p.line / int(sizeof(T)), stage_bytes = p.b_bytes;
  ring += p.stages_a * p.a_bytes;
  Phase const& phase = p.phase[0];
  int const first_r = phase.first_r, first_s = phase.first_s, step_r = phase.step_r, step_s = phase.step_s;
  int first, runs, bytes;
  auto begin = [&](int tile) {
    p.tiles_n.divide(tile);  // leaves the tile along N
    first = tile * TN, runs = min((TN + 63) / 64, (p.N - first + 63) / 64);
    bytes = b_rows ? runs * chunk_size * kLineBytes : min(TN, p.N) * p.line;
  };
  copy_listed(p, list, bars.empty_b, p.stages_b, copier, begin, [&](int stage, int chunk, int row, int column) {
    uint32_t const full = bars.full_b + stage * 8, to = ring + stage * stage_bytes;
    int const k = chunk * chunk_size, s = first_s + column * step_s, r = first_r + row * step_r;
    ptx::mbarrier_arrive_expect_tx(full, bytes);
    if constexpr (b_rows) {
      for (int run = 0; run < runs; ++run)
        ptx::cp_async_bulk_tensor_5d(to + run * kRunBytes, &p.b, full, first + run * 64, s, r, k, 0);
    } else {
      ptx::cp_async_bulk_tensor_5d(to, &p.b, full, k, s, r, first, 0);
    }
  });
}

template <class T, int TM, int TN, bool b_rows, bool skips = false, bool turned = false>
__device__ void copy_b(Params const& p, uint32_t ring, Barriers const& bars, int copier) {
  int const chunk_size = p.line / int(sizeof(T)), stage_bytes = p.b_bytes, stages = p.stages_b;
  ring += p.stages_a * p.a_bytes;
  Stage b;
  Work work(p);
  for (Unit unit; work.take<skips>(p, unit);) {
    int const first = unit.n * TN, runs = min((TN + 63) / 64, (p.N - first + 63) / 64);
    int const bytes = p.slices > 1 ? stage_bytes : b_rows ? runs * chunk_size * kLineBytes : min(TN, p.N) * p.line;
    constexpr int most_runs = turned ? TN / 64 : 1;
    int pixel[most_runs], image[most_runs];  // of a turned problem's runs
    if constexpr (turned) {
#pragma unroll
      for (int i = 0; i < most_runs; ++i) {
        int run = unit.n * most_runs + i;
        image[i] = p.runs.divide(run), pixel[i] = run * 64;
      }
    }
    // Filters that stay are those of all phases.
#pragma unroll 1
    for (int i = 0; i < (p.keep_b ? int(p.phases) : 1); ++i) {
      Phase const& phase = p.phase[p.keep_b ? i : unit.phase];
      int const most_taps = phase.taps_a, full_copies = phase.full_copies, step_s = phase.step_s;
      int const first_s = phase.first_s, next_s = phase.taps_w * step_s, step_r = phase.step_r,
                first_r = phase.first_r + (skips ? unit.first_tap * step_r : 0);
      Step at(p, phase, unit.begin, skips ? unit.copies : phase.copies);
#pragma unroll 1
      for (int step = 0; step < (p.keep_b ? phase.steps : unit.count); ++step, at.advance()) {
        int const chunk = at.chunk * chunk_size, r = first_r + at.tap_h * step_r;
        int const taps = most_taps - (at.tap_w >= full_copies);
        int s = first_s + at.tap_w * step_s;
#pragma unroll 1
        for (int t = 0; t < taps; ++t, s += next_s) {
          if (b.index % 2 == copier) {
            uint32_t const full = bars.full_b + b.index * 8, to = ring + b.index * stage_bytes;
            ptx::mbarrier_wait(bars.empty_b + b.index * 8, b.parity ^ 1);
            ptx::mbarrier_arrive_expect_tx(full, bytes);
            if constexpr (turned) {
#pragma unroll
              for (int run = 0; run < most_runs; ++run)
                if (run < runs)
                  ptx::cp_async_bulk_tensor_5d(to + run * kRunBytes, &p.b, full, pixel[run], 0, 0, chunk, image[run]);
            } else if constexpr (b_rows) {  // a chunk of filters of 64 columns at a time
              for (int run = 0; run < runs; ++run)
                ptx::cp_async_bulk_tensor_5d(to + run * kRunBytes, &p.b, full, first + run * 64, s, r, chunk,
                                             unit.group);
            } else {
              ptx::cp_async_bulk_tensor_5d(to, &p.b, full, chunk, s, r, first, unit.group);
            }
          }
          b.advance(stages);
        }
      }
    }
    if (p.keep_b) return;
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

// The same for floats. A column's 64 pixels are two lines, each of which a warp stores at once. mine: the offset of the
// warp's pixel lane % 16.
template <int TN>
__device__ void store_floats_singly(Params const& p, Unit const& unit, int64_t mine, float const (&acc)[TN / 2],
                                    uint32_t staging) {
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  ptx::bar_sync(1 + group, kWarpgroup);  // the last lines have been read
  if (lane < 16) {
    ptx::st_shared(staging + (warp * 16 + lane) * 8, uint32_t(mine));
    ptx::st_shared(staging + (warp * 16 + lane) * 8 + 4, uint32_t(mine >> 32));
  }
  ptx::bar_sync(1 + group, kWarpgroup);
  uint2 const low = ptx::ld_shared_v2(staging + lane * 8), high = ptx::ld_shared_v2(staging + (lane + 32) * 8);
  // Column c has pixel i at i ^ c / 2 % 4 * 8, so that a warp's stores, to four pairs of columns, meet every bank once.
  uint32_t const put = staging + lane % 4 * 512 + ((warp * 16 + lane / 4) ^ (lane % 4 * 8)) * 4;
  uint32_t const get = staging + warp * 2048 + lane * 4;
#pragma unroll
  for (int piece = 0; piece < TN / 32; ++piece) {
    ptx::bar_sync(1 + group, kWarpgroup);
#pragma unroll
    for (int i = 0; i < 16; ++i)
      ptx::st_shared_f32((put ^ (i % 4 / 2 * 32)) + i / 4 * 2048 + i % 2 * 256, acc[piece * 16 + i]);
    ptx::bar_sync(1 + group, kWarpgroup);
    int const n = unit.n * TN + piece * 32 + warp * 8;
    float* const out = static_cast<float*>(p.out) + unit.group * p.group_out + n * p.out_c;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint2 const words = half == 0 ? low : high;
      int64_t const pixel = int64_t(words.y) << 32 | words.x;
      float* to = out + pixel;
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = ptx::ld_shared_f32((get ^ (i / 2 * 32)) + i * 256 + half * 128);
#pragma unroll
      for (int i = 0; i < 8; ++i, to += p.out_c)
        if (pixel >= 0 && n + i < p.N) __stcs(to, v[i]);
    }
  }
}

// Puts 16 rows by 128 bytes of columns of a warp's accumulators into lines of shared memory, every step-th from first.
template <class T, int TN>
__device__ void stage_piece(float const (&acc)[TN / 2], int piece, uint32_t lines, int step = 1, int first = 0) {
  int const lane = int(threadIdx.x) % 32;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int const line = (lane / 4 + i % 2 * 8) * step + first, chunk = i / 2 * 2 + lane % 4 / 2;
      int const at = (piece * 4 + i / 2) * 4 + i % 2 * 2;
      ptx::st_shared_f32x2(lines + line * kLineBytes + (chunk ^ (line % 8)) * 16 + lane % 2 * 8, acc[at], acc[at + 1]);
    }
    return;
  } else {
#pragma unroll
    for (int t = 0; t < 4; ++t) {  // 16 columns
      if (piece * 64 + t * 16 >= TN) break;
      uint32_t v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int const at = (piece * 8 + t * 2 + e / 2) * 4 + e % 2 * 2;
        v[e] = pack<T>(acc[at], acc[at + 1]);
      }
      int const line = lane % 16 * step + first, chunk = t * 2 + lane / 16;
      ptx::stmatrix_x4(lines + line * kLineBytes + (chunk ^ (line % 8)) * 16, v);
    }
  }
}

// Stores floats whose columns lie side by side, off 16 bytes: a warp a line of 32 at a time. mine: as above.
template <int TN>
__device__ void store_float_lines(Params const& p, Unit const& unit, int64_t mine, float const (&acc)[TN / 2],
                                  uint32_t lines) {
  int const lane = int(threadIdx.x) % 32;
  int count = p.N - unit.n * TN - lane;  // columns from the lane's on
  float* out = static_cast<float*>(p.out) + unit.group * p.group_out + unit.n * TN + lane;
#pragma unroll
  for (int piece = 0; piece < TN / 32; ++piece, out += 32, count -= 32) {
    __syncwarp();
    stage_piece<float, TN>(acc, piece, lines);
    __syncwarp();
#pragma unroll 4
    for (int line = 0; line < 16; ++line) {
      float const v = ptx::ld_shared_f32(lines + line * kLineBytes + ((lane / 4) ^ (line % 8)) * 16 + lane % 4 * 4);
      int64_t const pixel = __shfl_sync(0xffffffff, mine, line);
      if (pixel >= 0 && count > 0) out[pixel] = v;
    }
  }
}

// Has the copy engine store a warp's 16 x TN accumulators, rows from m on; it leaves out what is beyond the tensor.
template <class T, int TM, int TN, bool turned>
__device__ void store_by_engine(Params const& p, Unit const& unit, int64_t m, float const (&acc)[TN / 2],
                                uint32_t staging) {
  constexpr int pieces = Shape<T, TM, TN, turned>::pieces, columns = kLineBytes / int(sizeof(T));
  static_assert(TN / columns % pieces == 0);
  int const warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int piece = 0; piece < TN / columns; ++piece) {
    uint32_t const lines = staging + (warp * pieces + piece % pieces) * kPieceBytes;
    if (lane == 0) ptx::cp_async_bulk_wait_group_read<pieces - 1>();  // the lines are free
    __syncwarp();
    stage_piece<T, TN>(acc, piece, lines);
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane != 0) continue;
    int n = unit.n * TN + piece * columns, group = unit.group;
    if constexpr (turned) {
      int run = n / 64;
      group = p.runs.divide(run), n = run * 64;
    }
    ptx::cp_async_bulk_tensor_4d_store(&p.out_rows, lines, n, int(m), group, 0);
    ptx::cp_async_bulk_commit_group();
  }
}

// Stores a warpgroup's 64 x TN accumulators from row `first` of the tile on. A thread has those of rows lane / 4 and
// lane / 4 + 8 of its warp's 16, columns 8 j + 2 (lane % 4) + {0, 1}. Pieces of a warp's rows and 128 bytes of columns
// pass through shared memory, so that eight lanes store the line of a pixel. Warps do not wait for each other.
// float_lines: of those off 16 bytes; their registers are too many for tma_strict.cuh.
template <class T, int TM, int TN, bool turned, bool plain = false, bool float_lines = true>
__device__ void store(Params const& p, Unit const& unit, int first, float (&acc)[TN / 2], Tables<T, TN>& tables,
                      uint32_t staging) {
  using S = Shape<T, TM, TN, turned>;
  constexpr int columns = kLineBytes / int(sizeof(T));  // of a piece
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  int const quad = lane % 4;
  int64_t const m = int64_t(unit.m) * TM + first + warp * 16;
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
  if (turned && p.row_bias != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int64_t const row = m + lane / 4 + half * 8;
      float const bias =
          row < p.phase[unit.phase].M ? widen(static_cast<T const*>(p.row_bias)[row * p.bias_stride]) : 0.0f;
#pragma unroll
      for (int j = 0; j < TN / 8; ++j) acc[j * 4 + half * 2] += bias, acc[j * 4 + half * 2 + 1] += bias;
    }
  }
  if constexpr (sizeof(T) == 2 && !plain)
    if (p.singly) {
      ptx::bar_sync(1 + group, kWarpgroup);  // the last tile's offsets have been read
      if (lane < 16) tables.out[group][warp * 16 + lane] = out_of(p, p.phase[unit.phase], m + lane);
      store_singly<T, TN>(p, unit, acc, tables.out[group], staging);
      return;
    }
  if constexpr (S::pieces > 0)
    if (p.by_engine) {
      store_by_engine<T, TM, TN, turned>(p, unit, m, acc, staging);
      return;
    }
  int64_t const mine = out_of(p, p.phase[unit.phase], m + lane % 16);
  if constexpr (sizeof(T) == 4)
    if (p.singly) {
      if (float_lines && p.out_c == 1)
        store_float_lines<TN>(p, unit, mine, acc, staging + warp * kPieceBytes);
      else
        store_floats_singly<TN>(p, unit, mine, acc, staging);
      return;
    }
  int64_t to[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = __shfl_sync(0xffffffff, mine, i * 4 + lane / 8);
  int const n = unit.n * TN + lane % 8 * (columns / 8);
  uint32_t const lines = staging + warp * kPieceBytes;
  T* const out = static_cast<T*>(p.out) + unit.group * p.group_out + n;
#pragma unroll
  for (int piece = 0; piece < (TN + columns - 1) / columns; ++piece) {
    __syncwarp();
    stage_piece<T, TN>(acc, piece, lines);
    __syncwarp();
    bool const inside = lane % 8 * (columns / 8) + piece * columns < TN && n + piece * columns < p.N;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const line = i * 4 + lane / 8;
      uint4 const v = ptx::ld_shared_v4(lines + line * kLineBytes + ((lane % 8) ^ (line % 8)) * 16);
      if (to[i] >= 0 && inside) *reinterpret_cast<uint4*>(out + to[i] + piece * columns) = v;
    }
  }
}

// Calls `run` with the count, 1 to 4, as a constant: the instructions of a loop would wait for each other.
template <class Run>
__device__ __forceinline__ void with_constant(int count, Run const& run) {
  if (count == 4)
    run(std::integral_constant<int, 4>());
  else if (count == 3)
    run(std::integral_constant<int, 3>());
  else if (count == 2)
    run(std::integral_constant<int, 2>());
  else
    run(std::integral_constant<int, 1>());
}

// A tap of slices: pixels' and filters' descriptors. A slice's filters are lines of its own channels.
template <class T, int TN, bool b_rows, int slices, int halves>
__device__ __forceinline__ void multiply_slices(float (&acc)[halves][TN / 2], uint64_t pixels, uint64_t filters) {
  constexpr int line = kLineBytes / slices, in_slice = 4 / slices, count = TN / 2 / slices;  // in_slice: instructions
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int h = 0; h < halves; ++h) {
      int const slice = k / in_slice;
      uint32_t const from = b_rows ? k * 16 * line : slice * (TN / slices) * line + k % in_slice * 32;
      ptx::wgmma_mma_async<T, false, b_rows>(reinterpret_cast<float (&)[count]>(acc[h][slice * count]),
                                             bytes_on(pixels, h * 64 * kLineBytes + k * 32), bytes_on(filters, from));
    }
}

template <class T, int TM, int TN, A a_is, bool b_rows, bool skips, bool plain = false, int slices = 1,
          bool by_turns = sizeof(T) == 2>
__device__ void multiply(Params const& p, uint32_t ring, Tables<T, TN>& tables) {
  constexpr bool a_rows = a_is == A::rows, turned = a_is != A::pixels;
  using S = Shape<T, TM, TN, turned, by_turns>;
  constexpr int halves = S::turns ? TM / 64 : TM / 128;  // 64-row instructions of a warpgroup
  constexpr uint32_t step_a = a_rows ? 2 * kCoreBytes : 32, step_b = b_rows ? 2 * kCoreBytes : 32;
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32;
  uint32_t const ring_b = ring + p.stages_a * p.a_bytes;
  int const my_rows = S::turns ? 0 : group * (TM / 2);
  uint32_t const half_a = a_rows ? kRunBytes : 64 * p.line, my_a = ring + my_rows / 64 * half_a;
  uint64_t const rows = ptx::wgmma_descriptor(0, kRunBytes, kCoreBytes),
                 lines = slices > 1 ? ptx::wgmma_descriptor<kLineBytes>(0, 0, 8 * kLineBytes) : layout_of(p.line),
                 layout_a = a_rows ? rows : lines;
  constexpr int slice_line = kLineBytes / slices;  // of filters
  uint64_t const layout_b = slices > 1 ? ptx::wgmma_descriptor<slice_line>(0, 0, 8 * slice_line)
                            : b_rows   ? rows
                                       : lines;
  Barriers const bars(tables);
  uint32_t const staging = ring + (p.by_engine ? S::ring_beside_pieces : S::ring_bytes + group * kRunBytes);
  Stage a, b;
  float acc[halves][TN / 2];
  auto release = [&](int stage_a, int stage_b) {  // -1: none
    if (lane == 0 && stage_a >= 0) ptx::mbarrier_arrive(bars.empty_a + stage_a * 8);
    if (lane == 0 && stage_b >= 0) ptx::mbarrier_arrive(bars.empty_b + stage_b * 8);
  };
  uint32_t met = 0;  // phases of slices whose filters, which stay, have been waited for
  WorkOf<plain> work(p);
  Unit unit, next;
  auto take = [&] {
    bool const more = work.template take<skips>(p, next);
    if constexpr (skips)  // or the compiler takes them for different in each lane
      next.begin = warp_uniform(next.begin), next.count = warp_uniform(next.count),
      next.copies = warp_uniform(next.copies);
    return more;
  };
  bool mine = !S::turns || group == 0, first = true;
  for (bool more = take(); more;) {
    unit = next;
    if (!mine) {
      a = skip(a, unit.count, p.stages_a), b = skip(b, unit.count * p.phase[unit.phase].taps_a, p.stages_b);
      mine = true, first = false;
      more = take();
      continue;
    }
#pragma unroll
    for (int h = 0; h < halves; ++h)
#pragma unroll
      for (int i = 0; i < TN / 2; ++i) acc[h][i] = 0;
    int before_a = -1, before_b = -1;  // stages of the multiplications that are under way
    Phase const& phase = p.phase[unit.phase];
    int const most_taps = phase.taps_a, full_copies = phase.full_copies;
    uint32_t const shift = phase.shift * p.line;
    T bias[(TN + kWarpgroup - 1) / kWarpgroup] = {};  // on its way while the tile is multiplied
    if (p.bias != nullptr)
#pragma unroll
      for (int i = 0; i < TN; i += kWarpgroup) {
        int const n = i + int(threadIdx.x) % kWarpgroup, at = unit.n * TN + n;
        if (n < TN && at < p.N)
          bias[i / kWarpgroup] = static_cast<T const*>(p.bias)[unit.group * p.group_bias + at * p.bias_stride];
      }
    if (!plain && p.keep_b) b = {}, b.index = phase.first_b;
    bool const waits = (met >> unit.phase & 1) == 0;
    if (unit.count > 0) met |= 1u << unit.phase;
    Step at(p, phase, plain ? 0 : unit.begin, skips ? unit.copies : phase.copies);
    // A turn begins when the other has seen its last stage arrive, as in tma_swap.cuh.
    if (S::turns && !first) ptx::bar_sync(3 + group, 2 * kWarpgroup);
    for (int step = 0; step < unit.count; ++step, at.advance()) {
      int const instructions = at.last_chunk() ? p.last : 4;
      int const taps = most_taps - ((sizeof(T) == 4 || slices > 1) && at.tap_w >= full_copies);
      ptx::mbarrier_wait(bars.full_a + a.index * 8, turned && p.keep_a ? 0 : a.parity);
      uint32_t from_a = my_a + a.index * p.a_bytes;
      if constexpr (slices > 1)
        if (p.keep_b) {
          uint64_t at_a = at_address(layout_a, from_a), at_b = at_address(layout_b, ring_b + b.index * p.b_bytes);
#pragma unroll 1
          for (int t = 0; t < taps; ++t, ++b.index) {
            if (waits) ptx::mbarrier_wait(bars.full_b + b.index * 8, 0);
#pragma unroll
            for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
            multiply_slices<T, TN, b_rows, slices>(acc, at_a, at_b);
            ptx::wgmma_commit_group();
            at_a = bytes_on(at_a, shift), at_b = bytes_on(at_b, p.b_bytes);
            if (t > 0) continue;
            ptx::wgmma_wait_group<1>();
            release(before_a, -1);  // the step before has been read
          }
          before_a = a.index;
          a.advance(p.stages_a);
          continue;
        }
      for (int t = 0; t < taps; ++t, from_a += shift) {
        ptx::mbarrier_wait(bars.full_b + b.index * 8, b.parity);
        uint32_t const from_b = ring_b + b.index * p.b_bytes;
#pragma unroll
        for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
        auto instruct = [&](auto count) {
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < decltype(count)::value; ++k)
#pragma unroll
            for (int h = 0; h < halves; ++h) {
              uint64_t const of_a = at_address(layout_a, from_a + h * half_a + k * step_a);
              ptx::wgmma_mma_async<T, a_rows, b_rows>(acc[h], of_a, at_address(layout_b, from_b + k * step_b));
            }
          ptx::wgmma_commit_group();
        };
        if constexpr (slices > 1) {
          multiply_slices<T, TN, b_rows, slices>(acc, at_address(layout_a, from_a), at_address(layout_b, from_b));
          ptx::wgmma_commit_group();
        } else {
          with_constant(instructions, instruct);
        }
        ptx::wgmma_wait_group<1>();
#pragma unroll
        for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
        release(before_a, before_b);  // the step before has been read
        before_a = t == taps - 1 ? a.index : -1;
        before_b = !plain && p.keep_b ? -1 : b.index;
        b.advance(p.stages_b);
      }
      a.advance(p.stages_a);
    }
    if (S::turns) {
      if (work.more(p)) ptx::bar_arrive(4 - group, 2 * kWarpgroup);
      mine = first = false;
    }
    // Worked out while the last multiplications are under way; this one anew, rather than kept in registers until now.
    more = take();
    Unit const done = plain ? Unit::whole(p, unit.tile) : Unit(p, unit.tile);
    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
    release(before_a, before_b);
    if (p.bias != nullptr) {
      ptx::bar_sync(1 + group, kWarpgroup);  // the last tile's have been read
#pragma unroll
      for (int i = 0; i < TN; i += kWarpgroup) {
        int const n = i + int(threadIdx.x) % kWarpgroup;
        if (n < TN) tables.bias[group][n] = bias[i / kWarpgroup];
      }
      ptx::bar_sync(1 + group, kWarpgroup);
    }
    if (!plain && unit.part >= 0) {
#pragma unroll
      for (int h = 0; h < halves; ++h) store_part<TM, TN>(p, unit.part, my_rows + h * 64, acc[h]);
      continue;
    }
#pragma unroll
    for (int h = 0; h < halves; ++h)
      store<T, TM, TN, turned, plain>(p, done, my_rows + h * 64, acc[h], tables, staging);
  }
  if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();  // shared memory ends with the block
}

// b_rows: B's columns are contiguous in memory, not its k. skips: rows of taps where all of a tile's pixels meet
// padding. plain: of a problem of whole tiles, one phase and group, whose results are vectors and whose filters do not
// stay. Such a kernel has half of the code, which memory brings where other kernels ran before.
template <class T, int TM, int TN, A a_is, bool b_rows, bool skips = false, bool plain = false, int slices = 1,
          bool by_turns = sizeof(T) == 2>
__global__ void __launch_bounds__(kThreads, Shape<T, TM, TN>::blocks) tma_kernel(__grid_constant__ Params const p) {
  using S = Shape<T, TM, TN, a_is != A::pixels, by_turns>;
  extern __shared__ uint8_t dynamic[];
  __shared__ Tables<T, TN> tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  if (threadIdx.x % 32 == 0) {               // one thread for all barriers would take 1 us
    constexpr int warps = S::turns ? 4 : 8;  // that read a stage
    for (int i = int(threadIdx.x) / 32; i < kMaxStages; i += kThreads / 32) {
      ptx::mbarrier_init(&tables.full_a[i], 1);
      ptx::mbarrier_init(&tables.empty_a[i], warps);
      ptx::mbarrier_init(&tables.full_b[i], 1);
      ptx::mbarrier_init(&tables.empty_b[i], warps);
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (plain) list_steps(p, tables.steps, kThreads);
  __syncthreads();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
  if (threadIdx.x < 2 * kWarpgroup) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    multiply<T, TM, TN, a_is, b_rows, skips, plain, slices, by_turns>(p, ring, tables);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    Barriers const bars(tables);
    int const copier = warp_uniform(int(threadIdx.x) / 32 % 4);
    if (!ptx::elect()) return;
    if (copier < kCopiers) {
      if constexpr (plain)
        copy_listed_a<T, TM>(p, ring, bars, tables.steps, copier);
      else
        copy_a<T, TM, a_is, skips>(p, ring, bars, copier);
      ptx::griddepcontrol_launch_dependents();
    } else if constexpr (plain) {
      copy_listed_b<T, TN, b_rows>(p, ring, bars, tables.steps, copier - kCopiers);
    } else {
      copy_b<T, TM, TN, b_rows, skips, a_is != A::pixels>(p, ring, bars, copier - kCopiers);
    }
  }
}

// Sums the parts of the shared tiles in the order of their steps; a thread has four columns.
// Where those are stored far apart, a block has 32 pixels by 32 columns, and its lanes go along the pixels to store
// them.
template <class T, int TM, int TN>
__global__ void __launch_bounds__(kReduceThreads) tma_reduce(__grid_constant__ Params const p) {
  constexpr int together = 8, side = kReduceSide, blocks_n = TN / side;
  static_assert(kReduceThreads * 4 == side * side && TN % side == 0 && TM % side == 0);
  __shared__ float turned[side][side + 1];  // column, pixel
  Shares const& s = p.shares;
  int const tile = int(blockIdx.x);
  Unit const unit(p, p.alone + tile);
  bool const turns = p.singly && p.out_c != 1;
  int const block = int(blockIdx.y), thread = int(threadIdx.x);
  int const first = turns ? (block / blocks_n * side + thread / 8) * TN + block % blocks_n * side + thread % 8 * 4
                          : (block * kReduceThreads + thread) * 4;
  int const n = unit.n * TN + first % TN;
  if (!turns && n >= p.N) return;
  int count = s.aligned, strips = 0;
  if (s.strip_steps > 0) {
    int const begin = tile * s.strip_steps, from = begin / s.strip_share;
    count += (begin + s.strip_steps - 1) / s.strip_share - from + 1;
    strips = s.aligned * s.shared + from + tile - s.aligned;
  }
  float const* const partial = static_cast<float const*>(p.workspace) + first;
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  float4 sum = make_float4(0, 0, 0, 0);
  for (int i = 0; i < count; i += together) {
    float4 v[together];
#pragma unroll
    for (int j = 0; j < together; ++j) {
      int const part = i + j < s.aligned ? (i + j) * s.shared + tile : strips + i + j;
      v[j] = i + j < count ? *reinterpret_cast<float4 const*>(partial + int64_t(part) * (TM * TN))
                           : make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < together; ++j) sum.x += v[j].x, sum.y += v[j].y, sum.z += v[j].z, sum.w += v[j].w;
  }
  if (turns) {
    turned[thread % 8 * 4][thread / 8] = sum.x, turned[thread % 8 * 4 + 1][thread / 8] = sum.y;
    turned[thread % 8 * 4 + 2][thread / 8] = sum.z, turned[thread % 8 * 4 + 3][thread / 8] = sum.w;
  }
  int64_t const m = int64_t(unit.m) * TM + (turns ? block / blocks_n * side + thread % 32 : first / TN),
                to = out_of(p, p.phase[unit.phase], m);
  if (turns) {
    int const lane = int(threadIdx.x) % 32, column = int(threadIdx.x) / 32 * 4;
    Unit const same(p, p.alone + int(blockIdx.x));  // anew, rather than kept in registers
    __syncthreads();
    T* const out = static_cast<T*>(p.out) + same.group * p.group_out + to;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const at = same.n * TN + int(blockIdx.y) % blocks_n * side + column + i;
      if (to < 0 || at >= p.N) break;
      float const bias =
          p.bias == nullptr ? 0 : widen(static_cast<T const*>(p.bias)[same.group * p.group_bias + at * p.bias_stride]);
      out[at * p.out_c] = narrow<T>(turned[column + i][lane] + bias);
    }
    return;
  }
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
cudaError_t params_of(Params& q, int64_t& blocks, Op op, Problem const& p, Row const& kernel_row, Plan const& plan,
                      Arguments const& args, bool rounded = sizeof(T) == 4, int slices = 1) {
  bool const forward = op == Op::fprop, halo = is_halo(kernel_row.variant);
  int64_t const C = forward ? p.C_per_group() : p.K_per_group();  // of the reduction
  Strides const &in = forward ? p.x : p.y, &out = forward ? p.y : p.x;
  int64_t const in_H = forward ? p.H : p.P(), in_W = forward ? p.W : p.Q();
  bool const turned = is_pointwise(kernel_row);  // images are the groups
  bool const a_rows = turned && in.c != 1;
  q.line = sizeof(T) == 4 ? kLineBytes : tma_line(C);
  int const chunk_size = q.line / int(sizeof(T));
  q.groups = Divisor(turned ? 1 : p.groups);
  q.chunks = int32_t(ceil_div(C, chunk_size));
  q.last = int32_t(ceil_div(C - (q.chunks - 1) * chunk_size, 32 / int64_t(sizeof(T))));
  q.together = forward && p.stride_w > 1 ? (sizeof(T) == 4 ? int32_t(min64(q.chunks, 2)) : q.chunks) : 1;
  int64_t const columns = forward ? p.K_per_group() : p.C_per_group();
  // Runs of an image's pixels are columns, so that a tile may have those of several images.
  q.runs = Divisor(turned ? ceil_div(columns, 64) : 1);
  q.N = int32_t(turned ? p.groups * q.runs.value * 64 : columns);
  q.tiles_n = Divisor(ceil_div(q.N, TN));
  q.group_a = turned ? 0 : int32_t(C);
  q.maps_groups = !turned && tma_maps_groups(op, p);
  q.group_out = turned ? out.n : q.N * out.c;
  q.group_bias = q.N * args.bias_stride;
  (turned ? q.row_bias : q.bias) = args.bias;
  q.bias_stride = args.bias_stride, q.out = args.out, q.workspace = args.workspace;
  q.singly = !turned && tma_stores_singly(op, p);
  q.out_n = out.n, q.out_c = out.c, q.out_h = out.h, q.out_w = out.w;
  q.stride_h = q.stride_w = 1;
  q.rows_a = int32_t(in_H), q.tile_m = TM;
  q.a_bytes = a_rows ? TM * kLineBytes : (halo ? TM + kHalo : TM) * q.line;
  q.b_bytes = forward ? S::b_bytes / kLineBytes * q.line : S::b_bytes;
  q.slices = slices, q.b_bytes /= slices;
  if (S::keeps_b) q.b_bytes = S::kept_bytes(q.N, q.line, forward || sizeof(T) == 4);
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
    if (halo && taps) w = halo_walk(kernel_row, p, w);
    f.rows = Divisor(h.pixels), f.columns = Divisor(w.pixels);
    f.M = p.N * h.pixels * w.pixels;
    f.tiles = int32_t(ceil_div(f.M, TM));
    most = max64(most, f.tiles);
    f.taps = int32_t(w.taps), f.taps_w = int32_t(shared.copies), f.shift = int32_t(shared.shift);
    if (taps) {
      f.taps_a = int32_t(ceil_div(w.taps, shared.copies));
      f.full_copies = int32_t(w.taps - (f.taps_a - 1) * shared.copies);
    }
    f.copies = taps ? int32_t(h.taps * f.taps_w) : 1;
    f.steps = taps ? f.copies * q.chunks : 0;
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
    int64_t const groups_of_map = q.maps_groups ? p.groups : 0;
    Tensor4 const a{
        args.a, p.dtype, {turned || q.maps_groups ? C : C * p.groups, in_W, in_H, p.N}, {1, in.w, in.h, in.n}, rounded};
    Problem filters;
    filters.C = in_W, filters.K = C, filters.R = filters.S = 1, filters.w.n = in.c, filters.dtype = p.dtype;
    cudaError_t const error = a_rows
                                  ? encode_filters(q.a[i], args.a, filters, 64, chunk_size)
                                  : encode_im2col(q.a[i], a, h, w, chunk_size, halo ? TM + kHalo : TM, groups_of_map);
    if (error != cudaSuccess) return error;
  }
  int64_t const tiles_n = int64_t(q.tiles_n.value) * q.groups.value, turn = tma_turn(with_taps, most, tiles_n);
  q.turn = Divisor(turn), q.cycle = Divisor(turn * phases), q.cycles = int32_t(most / turn);
  q.last_turn = Divisor(max64(most % turn, 1));
  TileSplit const split = tma_split(kernel_row, most * phases * tiles_n, plan.split_k);
  bool const keeps =
      tma_keeps_tiles(slices > 1 ? DType::f16 : p.dtype, split.alone, tiles_n, p.groups, tma_slots(kernel_row));
  q.alone = int32_t(split.alone);
  q.shares = Shares(split, steps);
  q.strip_steps = Divisor(q.shares.strip_steps);
  blocks = split.shared == 0 ? split.alone : split.alone > 0 ? tma_slots(kernel_row) : split.workers;
  if (turned) q.rows_first = Divisor(q.phase[0].tiles);
  int64_t const out_W = forward ? p.Q() : p.W, out_H = forward ? p.P() : p.H;
  // Are the output's pixels rows of a matrix?
  int64_t const row = out_W > 1 ? out.w : out_H > 1 ? out.h : p.N > 1 ? out.n : columns * p.groups;
  q.by_engine = S::pieces > 0 && !halo && !q.singly && phases == 1 && (forward || p.stride_h == 1) &&
                (out_H == 1 || out.h == out_W * row) && (p.N == 1 || out.n == out_H * out_W * row) &&
                q.phase[0].M < int64_t(1) << 31;
  if (q.by_engine) {
    Tensor4 const rows{args.out, p.dtype, {columns, q.phase[0].M, p.groups, 1}, {1, row, q.group_out, 0}};
    cudaError_t const error = encode_tiled(q.out_rows, rows, kLineBytes / int(sizeof(T)), 16, 1, 1);
    if (error != cudaSuccess) return error;
  }
  int64_t const ring = q.by_engine ? S::ring_beside_pieces : S::ring_bytes;
  int64_t stages_a = halo ? S::halo_stages * (kLineBytes / q.line) : min64(ring / (q.a_bytes + q.b_bytes), kMaxStages);
  bool const one = !turned && p.groups == 1 && phases == 1 && q.shares.shared == 0, whole = one && !q.singly;
  // The stages of B begin at a multiple of 1024 bytes.
  if ((S::even_stages && one) || (S::keeps_b && q.line == 64)) stages_a -= stages_a % 2;
  int64_t stages_b = min64((ring - stages_a * q.a_bytes) / q.b_bytes, kMaxStages);
  q.keep_b = S::keeps_b && q.shares.shared == 0 && keeps && first_b <= kMaxKept &&
             first_b * q.b_bytes + 3 * q.a_bytes <= S::ring_bytes;
  if (q.keep_b) {
    stages_b = first_b;
    stages_a = min64((S::ring_bytes - first_b * q.b_bytes) / q.a_bytes, kMaxStages);
    if (q.line == 64) stages_a -= stages_a % 2;
  }
  // A block's tiles have the same filters, if the blocks are a multiple of the tiles along N.
  if ((S::stays || slices > 1) && !turned && q.shares.shared == 0 && (phases == 1 || slices > 1) && keeps &&
      first_b <= kMaxStages && first_b * q.b_bytes <= ring / 2) {
    q.keep_b = true;
    stages_b = first_b;
    stages_a = min64((ring - first_b * q.b_bytes) / q.a_bytes, kMaxStages);
  }
  // Images share the filters, which are A.
  q.keep_a = turned && q.shares.shared == 0 && keeps_filters(q.phase[0].tiles, q.chunks, q.a_bytes, q.b_bytes, ring);
  if (q.keep_a) {
    stages_a = q.chunks;
    stages_b = min64((ring - q.chunks * q.a_bytes) / q.b_bytes, kMaxStages);
  }
  int64_t const listed = q.phase[0].steps;
  bool const lists =
      !halo && !q.keep_b && listed > 1 && listed <= kListed && stages_a % kCopiers == 0 && stages_b % kCopiers == 0;
  q.plain = whole && (S::keeps_b || TM == 64 || (lists && (q.by_engine || !S::even_stages)));
  q.apart = one && q.singly && q.out_c != 1 && (S::keeps_b || lists);
  q.in_runs = one && lists && tma_stores_runs(kernel_row, p);
  q.stages_a = Divisor(stages_a), q.stages_b = Divisor(stages_b);
  return cudaSuccess;
}

// Shares the phases' tiles out, unless blocks take turns with the phases, or filters stay.
inline void share_phases(Params& p, int64_t blocks) {
  int const phases = p.phases.value;
  if (phases == 1 || p.shares.shared > 0 || p.cycles != 1 || blocks > INT16_MAX) return;
  int64_t const across = int64_t(p.tiles_n.value) * p.groups.value;
  if (p.keep_b && across > 1) return;
  int64_t tiles[kMaxPhases], steps[kMaxPhases];
  int with_taps = 0;
  for (int i = 0; i < phases; ++i)
    tiles[i] = p.phase[i].tiles * across, steps[i] = p.phase[i].steps, with_taps += steps[i] > 0;
  if (with_taps < 2) return;
  p.runs_of.share(tiles, steps, phases, p.turn.value * across, int(blocks));
}

// Launches tma_reduce, `each` blocks for a tile.
inline cudaError_t launch_reduce(void (*kernel)(Params), Params const& p, int each, cudaStream_t stream) {
  dim3 const grid{unsigned(p.shares.shared), unsigned(each)};
  return launch_spread(kernel, grid, kReduceThreads, kReduceSide * (kReduceSide + 1) * 4, stream, p);
}

// S: the shape of `kernel`'s blocks. skipping: leaves out rows of taps; filters that stay are those of all taps. plain:
// for plain problems. adjust: changes the parameters and the blocks. pairs: for problems `apart`. runs: for those
// `in_runs`.
template <class S, Op op, DType dtype, int TM, int TN, int slices = 1>
cudaError_t launch_kernel(void (*kernel)(Params), Problem const& problem, Plan const& plan, Arguments const& args,
                          cudaStream_t stream, void (*skipping)(Params) = nullptr, void (*plain)(Params) = nullptr,
                          void (*adjust)(Params&, int64_t&) = nullptr, void (*pairs)(Params) = nullptr,
                          void (*runs)(Params) = nullptr) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool b_rows = op == Op::dgrad;  // B is N-major
  Params p{};
  int64_t blocks = 0;
  Problem const as_one = slices > 1 ? merged(problem, slices) : problem;
  cudaError_t error = params_of<S, T, TM, TN>(p, blocks, op, as_one, row_of(plan), plan, args, sizeof(T) == 4, slices);
  if (error != cudaSuccess) return error;
  if (skipping != nullptr && !p.keep_b)
    kernel = skipping;
  else if (plain != nullptr && p.plain)
    kernel = plain;
  else if (pairs != nullptr && p.apart)
    kernel = pairs;
  else if (runs != nullptr && p.in_runs)
    kernel = runs;
  int const chunk = p.line / int(sizeof(T)), columns = S::columns(p.N);
  Problem filters = problem;  // of slices: 64 of a group's channels each
  filters.C /= slices, filters.groups /= slices;
  error = encode_filters(p.b, args.b, filters, (b_rows ? columns : chunk) / slices,
                         b_rows ? chunk : int(min64(TN, p.N)), sizeof(T) == 4);
  if (error != cudaSuccess) return error;

  if ((error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes)) !=
      cudaSuccess)
    return error;
  int sm_count = 0;
  if ((error = count_sms(sm_count)) != cudaSuccess) return error;
  if (p.shares.shared == 0) blocks = min64(blocks, int64_t(sm_count) * S::blocks);
  if (p.keep_b) blocks -= blocks % (p.tiles_n.value * p.groups.value);
  if (p.keep_a) blocks -= blocks % p.phase[0].tiles;
  if (adjust != nullptr) adjust(p, blocks);
  share_phases(p, blocks);
  error = launch_dependent(kernel, dim3(unsigned(blocks)), S::threads, S::shared_bytes, stream, p);
  if (error != cudaSuccess || p.shares.shared == 0) return error;
  if constexpr (S::splits) error = launch_reduce(tma_reduce<T, TM, TN>, p, TM * TN / (4 * kReduceThreads), stream);
  return error;
}

template <Op op, DType dtype, int TM, int TN, Variant variant>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool images = variant == Variant::pointwise;  // are the groups
  constexpr A a_is = images ? A::lines : A::pixels;
  void (*kernel)(Params) = nullptr, (*skipping)(Params) = nullptr, (*plain)(Params) = nullptr;
  if constexpr (variant == Variant::halo && TM == 128 && TN == 64 && sizeof(T) == 2) {
    if (sliced_groups(row_of(plan), problem) == 2) {
      kernel = tma_kernel<T, TM, TN, a_is, op == Op::dgrad, false, false, 2>;
      return launch_kernel<Shape<T, TM, TN>, op, dtype, TM, TN, 2>(kernel, problem, plan, args, stream);
    }
    if constexpr (op == Op::fprop) kernel = tma_kernel<T, TM, TN, a_is, false>;
  } else {
    kernel = tma_kernel<T, TM, TN, a_is, op == Op::dgrad>;
  }
  if constexpr (variant == Variant::im2col && TN != 64 && TN != TM)  // 128x128 gains nothing by it
    plain = tma_kernel<T, TM, TN, a_is, op == Op::dgrad, false, true>;
  if constexpr (images)
    if (problem.y.c != 1) kernel = tma_kernel<T, TM, TN, A::rows, true>;
  if constexpr (tma_skips_padding(TM, TN, variant))
    if (tma_steps_left(row_of(plan), op, problem) < 1) skipping = tma_kernel<T, TM, TN, a_is, op == Op::dgrad, true>;
  return launch_kernel<Shape<T, TM, TN, images>, op, dtype, TM, TN>(kernel, problem, plan, args, stream, skipping,
                                                                    plain);
}

}  // namespace conv2d_ext::tma
