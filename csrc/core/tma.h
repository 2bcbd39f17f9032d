// tma.cuh and tma_wgrad.cuh: what their rows take and cost, and what the launchers share with the planner.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "gemm.h"
#include "phase_runs.h"

namespace conv2d_ext {

constexpr bool is_halo(Variant v) { return v == Variant::halo || v == Variant::raw_halo; }

inline constexpr int kHalo = 8;        // pixels that a tile of the halo variants copies beyond its own
inline constexpr int kMaxPhases = 16;  // of dgrad
inline constexpr int kMaxStages = 16;
inline constexpr int kMaxKeptTiles = 4;  // tiles of filters, of which a block keeps its own in shared memory

// Do blocks keep the filters of their tiles, if there is room? Of one group, and in TF32, few tiles' are kept; of
// groups those of any number, where that takes no more than a tenth more rounds: all tiles of a block are of one group
// then.
constexpr bool tma_keeps_tiles(DType t, int64_t tiles, int64_t tiles_n, int64_t groups, int64_t slots) {
  if (tiles_n <= kMaxKeptTiles || groups == 1 || t == DType::f32) return tiles_n <= kMaxKeptTiles;
  return tiles_n <= slots && ceil_div(tiles, slots - slots % tiles_n) * 10 <= ceil_div(tiles, slots) * 11;
}

// 1x1 filters of images of contiguous pixels: does a block keep its tile's, beside three stages of pixels?
constexpr bool keeps_filters(int64_t tiles, int64_t chunks, int64_t chunk_bytes, int64_t pixel_bytes, int64_t ring) {
  return tiles <= kMaxKeptTiles && chunks <= kMaxStages && chunks * chunk_bytes + 3 * pixel_bytes <= ring;
}

constexpr Walk walk_h(Op op, Problem const& p, int64_t phase) {
  return op == Op::dgrad ? dgrad_walk(p.H, p.R, p.stride_h, p.pad_top, p.dilation_h, phase)
                         : fprop_walk(p.P(), p.R, p.stride_h, p.pad_top, p.dilation_h);
}
constexpr Walk walk_w(Op op, Problem const& p, int64_t phase) {
  return op == Op::dgrad ? dgrad_walk(p.W, p.S, p.stride_w, p.pad_left, p.dilation_w, phase)
                         : fprop_walk(p.Q(), p.S, p.stride_w, p.pad_left, p.dilation_w);
}

// How the halo variants take a row of the filter: `copies` of the pixels; copy j serves the taps j, j + copies, ...,
// each `shift` pixels after the one before.
struct Halo {
  int64_t copies, shift;
};
constexpr Halo halo_of(Walk const& w) {
  int64_t const g = gcd64(w.tap_stride, w.stride);
  return {min64(w.stride / g, w.taps), w.tap_stride / g};
}

// The walk over all columns that its taps touch.
constexpr Walk halo_walk(Walk w) {
  Halo const halo = halo_of(w);
  w.pixels += (ceil_div(w.taps, halo.copies) - 1) * halo.shift;
  return w;
}

// How many columns at the end of such a walk lie outside of the tensor, as do as many at its beginning: a row's zeros
// behind it can be those before the next row.
constexpr int64_t halo_shared_columns(Walk const& w, int64_t extent) {
  Halo const halo = halo_of(w);
  int64_t const all = halo_walk(w).pixels;
  int64_t shared = all - w.pixels;
  for (int64_t copy = 0; copy < halo.copies; ++copy) {
    int64_t const first = w.lower + copy * w.tap_stride;
    int64_t const before = ceil_div(max64(-first, 0), w.stride),
                  behind = all - ceil_div(max64(extent - first, 0), w.stride);
    shared = min64(shared, min64(before, max64(behind, 0)));
  }
  return shared;
}

// What an im2col copy can do along one axis; groups: if they are a dimension of the map.
constexpr bool im2col_supports(Walk const& w, int64_t extent, bool groups = false) {
  int64_t const most = groups ? 16 : 128;
  auto corner = [=](int64_t v) { return v >= -most && v < most; };
  return w.stride <= 8 && corner(w.lower) && corner(box_upper(w, extent)) && (w.taps - 1) * w.tap_stride < 2 * most;
}

// Channels of the reduction that one instruction takes (TF32: a step); those of the next group must not be among them.
constexpr int tma_together(DType t) { return t == DType::f32 ? 32 : 16; }

// Are the groups a dimension of the map that fprop's and dgrad's pixels are copied by? It then puts zeros behind a
// group's channels. Such a map allows for small filters and padding alone.
constexpr bool tma_maps_groups(Op op, Problem const& p) {
  auto axis = [](int64_t taps, int64_t dilation, int64_t stride, int64_t before, int64_t behind) {
    return (taps - 1) * dilation + stride <= 16 && before <= 8 && behind <= 8;
  };
  return p.groups > 1 && (op == Op::fprop ? p.C_per_group() : p.K_per_group()) % tma_together(p.dtype) != 0 &&
         axis(p.R, p.dilation_h, p.stride_h, p.pad_top, p.pad_bottom) &&
         axis(p.S, p.dilation_w, p.stride_w, p.pad_left, p.pad_right);
}

// Tensors that may have any strides and alignment: fprop and dgrad store single elements where they must, but not those
// of a stride's phases, which lie apart.
struct TmaTakesAny {
  bool x, w, y;
};
constexpr TmaTakesAny tma_takes_any(Op op, Problem const& p) {
  return {op == Op::dgrad && p.stride_w == 1, false, op == Op::fprop};
}
// wgrad stores what it adds up in any strides where that is faster than a launch that unpacks it, but for rows whose
// whole tiles are stored at once.
constexpr bool tma_adds_into_any(Row const& row, Problem const& p) {
  bool const planes = row.variant == Variant::nchw;
  return row.op == Op::wgrad && (is_halo(row.variant) || row.variant == Variant::narrow || planes) &&
         double(p.K) * double(p.C_per_group()) * double(p.R) * double(p.S) <= 320 * 1024;
}
// Is the output of fprop or dgrad stored in single elements?
constexpr bool tma_stores_singly(Op op, Problem const& p) {
  bool const forward = op == Op::fprop;
  return !channel_vectors(forward ? p.y : p.x, forward ? p.y_align : p.x_align,
                          forward ? p.K_per_group() : p.C_per_group(), 16 / size_of(p.dtype), p.dtype);
}

// Rows of tma_swap.cuh.
constexpr bool tma_swapped(Row const& row) {
  return row.op != Op::wgrad && row.variant != Variant::pointwise && row.tile_m == 256 && row.tile_n == 64;
}

// Bytes of a pixel's channels that fprop and dgrad in 16-bit types copy at a time. Lines that end early are slow.
constexpr int tma_line(int64_t channels) { return channels <= 32 ? 64 : 128; }

// Rows of tma_swap_wide.cuh.
constexpr bool tma_swapped_wide(Row const& row) {
  return row.op != Op::wgrad && row.variant == Variant::im2col && row.dtype != DType::f32 && row.tile_m % 128 != 0 &&
         row.tile_m != 64;
}

// Steps that the list of a tile's steps holds.
inline constexpr int kListed = 128;

// Of these, fprop's pixels whose filters take no vectors but follow each other without gaps, all of one tile: a tile's
// pixels are a run of memory, which tma_swap_wide.cuh has the copy engine store.
constexpr bool tma_stores_runs(Row const& row, Problem const& p) {
  if (row.family != Family::tma || row.op != Op::fprop || !tma_swapped_wide(row) || p.groups > 1 ||
      !tma_stores_singly(row.op, p))
    return false;
  int64_t const K = p.K, P = p.P(), Q = p.Q(), steps = p.R * p.S * ceil_div(p.C, tma_line(p.C) / 2);
  auto is = [](int64_t size, int64_t stride, int64_t wanted) { return size == 1 || stride == wanted; };
  return K <= row.tile_n && p.y_align >= 16 && is(K, p.y.c, 1) && is(Q, p.y.w, K) && is(P, p.y.h, Q * K) &&
         is(p.N, p.y.n, P * Q * K) && p.N * P * Q < int64_t(1) << 31 && steps > 1 && steps <= kListed;
}

// Likewise lines of channels in channels_last, which tma.cuh stores as such in TF32. In 16-bit types and of few
// channels a packed result is faster, but for runs.
constexpr bool tma_stores_lines(Row const& row, Problem const& p) {
  bool const tile = row.variant == Variant::im2col || row.variant == Variant::halo;
  if (tma_stores_runs(row, p)) return true;
  if (row.family != Family::tma || row.dtype != DType::f32 || !tile || tma_swapped(row) || p.groups > 1) return false;
  return row.op == Op::fprop ? p.y.c == 1 && p.K >= 32
                             : row.op == Op::dgrad && p.x.c == 1 && p.C >= 32 && p.stride_w == 1;
}

// tma_phases.cuh, one image axis: the coordinates of y, beginning with `lower`, that the two phases of a stride of two
// meet, and the taps that they do it with.
inline constexpr int kMaxPhaseTaps = 16;
struct PhaseTaps {
  Walk phase[2];
  int64_t lower = 0, count = 0;

  // -1: the phase does not meet it.
  constexpr int64_t tap(int64_t i, int p) const {
    Walk const& w = phase[p];
    int64_t const at = lower + i - w.lower;
    return at < 0 || at >= w.taps ? -1 : w.first_tap + at * w.tap_step;
  }
  constexpr Walk walk() const { return {phase[0].pixels, count, lower}; }
};
constexpr PhaseTaps phase_taps(int64_t extent, int64_t taps, int64_t pad) {
  PhaseTaps t{{dgrad_walk(extent, taps, 2, pad, 1, 0), dgrad_walk(extent, taps, 2, pad, 1, 1)}};
  Walk const &a = t.phase[0], &b = t.phase[1];
  t.lower = min64(a.lower, b.lower);
  t.count = max64(a.lower + a.taps, b.lower + b.taps) - t.lower;
  return t;
}

// How tma_phases.cuh cuts a problem.
inline constexpr int kPhasesBytes = 207 * 1024;  // of shared memory, for the filters and two rings of stages
struct PhasesShape {
  static constexpr int TM = 128, CW = 32;  // pixels of y of a tile, channels of x
  int line, a_bytes, run_bytes;
  int64_t chunks, stages;  // of each ring

  constexpr explicit PhasesShape(Problem const& p)
      : line(tma_line(p.K)),
        a_bytes((TM + kHalo) * line),
        run_bytes(line * CW),
        chunks(ceil_div(p.K * 2, line)),
        stages((kPhasesBytes - p.R * p.S * chunks * run_bytes) / (2 * a_bytes)) {}
};

// The walk of a row's halo variant, along W: tma_swap.cuh's rows and those of slices (merged.h) share columns. Where
// they store pairs of neighbouring pixels, as in NCHW, padded columns stay even in number: else every other row's pairs
// would begin off 4 bytes.
constexpr Walk halo_walk(Row const& row, Problem const& p, Walk const& w) {
  Walk all = halo_walk(w);
  if (!tma_swapped(row) && (p.dtype == DType::f32 || row.tile_m != 128 || row.tile_n != 64)) return all;
  bool const forward = row.op == Op::fprop;
  int64_t const shared = halo_shared_columns(w, forward ? p.W : p.Q());
  all.pixels -= shared;
  bool const pairs = p.dtype != DType::f32 && (forward ? p.y.w == 1 : p.x.w == 1 && p.stride_w == 1);
  if (pairs && shared > 0 && (all.pixels - w.pixels) % 2 != 0) ++all.pixels;
  return all;
}

inline constexpr int kWgradPixels = 64;  // of a step; TF32: 32
constexpr int wgrad_pixels(DType t) { return t == DType::f32 ? 32 : kWgradPixels; }
inline constexpr int kWgradTaps = 3;  // of a row of the filter, that one copy serves in wgrad's halo variant

// How a row of wgrad cuts a problem. A tile's rows are runs: 64 channels of a tap, in the halo variant of kWgradTaps
// taps, in the narrow one all channels of a tap.
struct WgradTiles {
  bool stores = false;  // whole tiles; else all go through the workspace
  int64_t columns = 0;  // of y, padded ones included
  int64_t runs = 0, tiles = 0, steps = 0;
};

// Filters are the rows of the instruction, in the variant im2col, too.
constexpr bool wgrad_filters_first(Row const& row) {
  return row.dtype != DType::f32 && row.variant == Variant::im2col && row.tile_m == 192;
}

constexpr WgradTiles wgrad_tiles(Row const& row, Problem const& p) {
  bool const halo = is_halo(row.variant), narrow = row.variant == Variant::narrow;
  WgradTiles t;
  t.stores = !halo && !narrow && !wgrad_filters_first(row);
  t.columns = p.Q() + (halo ? (min64(p.S, kWgradTaps) - 1) / p.stride_w * p.dilation_w : 0);
  t.runs = p.R * (halo ? ceil_div(p.S, kWgradTaps) : p.S) * (narrow ? 1 : ceil_div(p.C_per_group(), 64));
  int64_t const run_rows = halo ? 64 * kWgradTaps : narrow ? 32 : 64;
  t.tiles = ceil_div(t.runs, row.tile_m / run_rows) * ceil_div(p.K_per_group(), row.tile_n) * p.groups;
  t.steps = ceil_div(p.N * p.P() * t.columns, wgrad_pixels(p.dtype));
  return t;
}

// How blocks share the work. First `whole` tiles, one block each. Of the others, `aligned` blocks a tile take turns
// with the steps of its first `aligned_steps`, so that all read neighbouring pixels at a time, which stay in L2. What
// is left of the tiles, a strip of each, is cut into equal shares for the blocks that are left.
struct WgradShares {
  int64_t whole = 0, shared = 0;  // tiles
  int64_t aligned = 0, aligned_steps = 0;
  int64_t strip_steps = 0, strip_workers = 0;

  constexpr int64_t partial() const {  // tiles at most in the workspace: a strip's neighbour is a block's or a tile's
    return shared * aligned + (strip_workers == 0 ? 0 : strip_workers + shared - 1);
  }
};

// workers == 1: no tile is shared, unless it must be.
constexpr WgradShares wgrad_shares(WgradTiles const& t, int64_t workers) {
  WgradShares s;
  s.whole = !t.stores ? 0 : workers == 1 ? t.tiles : t.tiles / workers * workers;
  s.shared = t.tiles - s.whole;
  if (s.shared == 0) return s;
  s.aligned = workers / s.shared;
  s.strip_workers = workers - s.aligned * s.shared;
  s.aligned_steps = s.strip_workers == 0 ? t.steps : s.aligned * s.shared * t.steps / workers;
  s.strip_steps = t.steps - s.aligned_steps;
  return s;
}

// Blocks whose two warpgroups are half a tile apart (tma_wgrad.cuh). All tiles of a block have the same filters;
// 128x256 alone gains by it. A constant, so that results do not depend on the device.
constexpr int64_t wgrad_lag_blocks(int64_t tiles_n) { return 132 / tiles_n * tiles_n; }
constexpr int64_t wgrad_lag_rounds(WgradTiles const& t, int64_t tiles_n) { return ceil_div(t.runs, 132 / tiles_n * 2); }
// Of whole tiles, more than there are blocks, if these need no more rounds for it; in longer ones stores matter little.
constexpr bool wgrad_lags(Row const& row, Problem const& p, WgradTiles const& t) {
  int64_t const tiles_n = ceil_div(p.K, row.tile_n);
  return row.dtype != DType::f32 && row.variant == Variant::im2col && row.tile_m == 128 && row.tile_n == 256 &&
         p.groups == 1 && t.steps >= 6 && t.steps <= 32 && tiles_n <= 132 && t.tiles > 132 &&
         wgrad_lag_rounds(t, tiles_n) <= ceil_div(t.tiles, 132);
}

constexpr bool wgrad_supports(Row const& row, Problem const& p) {
  Walk w = walk_w(row.op, p, 0);
  if (!map_supports(p.x, p.N, p.H, p.W, p.dtype) || !map_supports(p.y, p.N, p.P(), p.Q(), p.dtype)) return false;
  if (!im2col_supports(walk_h(row.op, p, 0), p.H) || !im2col_supports(w, p.W)) return false;
  if (double(p.N) * double(p.P()) * double(p.Q()) >= 1e11) return false;
  if (double(p.R) * double(p.S) * double(ceil_div(p.C_per_group(), 64)) * double(p.K) >= 1e9) return false;
  WgradTiles const t = wgrad_tiles(row, p);
  constexpr int64_t most = int64_t(1) << 30;
  if (t.columns >= most || p.P() >= most) return false;  // the sum of two coordinates is an int
  if (t.stores) return true;
  if (t.tiles > 128 || t.steps == 0) return false;
  if (row.variant == Variant::narrow) return p.C_per_group() <= 32;
  if (row.variant == Variant::im2col) return true;
  if (w.stride > 2 || w.taps < 2 || (kWgradTaps - 1) / w.stride * p.dilation_w > kHalo) return false;
  if (p.dtype == DType::f32 && (w.stride != 1 || p.dilation_w != 1)) return false;
  w.pixels = t.columns;
  return im2col_supports(w, p.W);
}

// What both kernels for all phases of a stride of two ask for: tma_phases.cuh, tma_classes.cuh.
constexpr bool phases_together_support(Problem const& p) {
  if (p.stride_h != 2 || p.stride_w != 2 || p.dilation_h != 1 || p.dilation_w != 1 || p.groups != 1) return false;
  if (p.R < 2 || p.S < 2 || p.R > kMaxPhaseTaps || p.H < 2 || p.W < 2) return false;
  if (!channel_vectors(p.x, p.x_align, p.C, 8, p.dtype) || !channel_vectors(p.w, p.w_align, p.C, 8, p.dtype) ||
      !channel_vectors(p.y, p.y_align, p.K, 8, p.dtype))
    return false;
  if (!map_supports(p.w, p.K, p.R, p.S, p.dtype) || !map_supports(p.y, p.N, p.P(), p.Q(), p.dtype)) return false;
  PhaseTaps const h = phase_taps(p.H, p.R, p.pad_top), w = phase_taps(p.W, p.S, p.pad_left);
  return w.count - 1 <= kHalo && im2col_supports(h.walk(), p.P()) && im2col_supports(halo_walk(w.walk()), p.Q());
}

constexpr bool phases_supports(Problem const& p) {
  if (p.K > 4096 || p.C > PhasesShape::CW || !phases_together_support(p)) return false;
  return PhasesShape(p).stages >= 2 && double(p.N) * double(p.H) * double(p.W + 2 * kHalo) < 1e11;
}

// Blocks of a round; a constant, so that results do not depend on the device.
constexpr int64_t tma_slots(Row const& row) {
  return row.family == Family::tma && row.tile_m == 128 && row.tile_n == 64 ? 264 : 132;
}

// slices: sliced groups (merged.h), of which the halo variant takes strides along W, too; one row is of these alone.
constexpr bool tma_supports(Row const& row, Problem const& p, bool slices = false) {
  if (row.variant == Variant::phases) return phases_supports(p);
  bool const forward = row.op == Op::fprop;
  bool const half = size_of(p.dtype) == 2;
  if (half && !forward && row.op != Op::wgrad && is_halo(row.variant) && tma_slots(row) > 132 && !slices) return false;
  int const v = 16 / size_of(p.dtype);
  TmaTakesAny any = tma_takes_any(row.op, p);
  any.w |= tma_adds_into_any(row, p);
  if (!any.x && !channel_vectors(p.x, p.x_align, p.C_per_group(), v, p.dtype)) return false;
  // Packed lines of dgrad's filters have more channels than those that are stored as lines.
  bool const packed_lines = row.op == Op::dgrad && p.C % v != 0 && tma_stores_lines(row, p);
  if (!any.w && !channel_vectors(p.w, p.w_align, packed_lines ? v : p.C_per_group(), v, p.dtype)) return false;
  if (!any.y && !channel_vectors(p.y, p.y_align, p.K_per_group(), v, p.dtype)) return false;
  if (row.op == Op::wgrad) return wgrad_supports(row, p);
  bool const groups = tma_maps_groups(row.op, p);
  if (p.groups > 1 && !groups && (forward ? p.C_per_group() : p.K_per_group()) % tma_together(p.dtype) != 0)
    return false;
  if (!any.w && !map_supports(p.w, p.K, p.R, p.S, p.dtype)) return false;
  if (!(forward ? map_supports(p.x, p.N, p.H, p.W, p.dtype) : map_supports(p.y, p.N, p.P(), p.Q(), p.dtype)))
    return false;
  int64_t const phases_h = forward ? 1 : phases_of(p.H, p.stride_h),
                phases_w = forward ? 1 : phases_of(p.W, p.stride_w);
  if (phases_h * phases_w > kMaxPhases) return false;
  bool shared = false;
  for (int64_t i = 0; i < phases_h; ++i)
    for (int64_t j = 0; j < phases_w; ++j) {
      Walk const h = walk_h(row.op, p, i);
      Walk w = walk_w(row.op, p, j);
      if (h.taps == 0 || w.taps == 0) continue;
      if (!im2col_supports(h, forward ? p.H : p.P(), groups)) return false;
      if (is_halo(row.variant)) {
        Halo const halo = halo_of(w);
        if (w.stride != 1 && !slices && !tma_swapped(row) && p.dtype != DType::f32) return false;
        if ((ceil_div(w.taps, halo.copies) - 1) * halo.shift > kHalo) return false;
        shared = shared || w.taps > halo.copies;
        w = halo_walk(row, p, w);
      }
      if (!im2col_supports(w, forward ? p.W : p.Q(), groups)) return false;
    }
  if (is_halo(row.variant) && !shared) return false;
  // Tiles and steps are counted in 32 bits.
  Gemm const g = gemm_of(row.op, p);
  double const pixels = double(g.M) * (is_halo(row.variant) ? double(p.S * p.dilation_w + 1) : 1.0);
  return (pixels / row.tile_m + 2) * double(ceil_div(g.N, row.tile_n)) * double(g.batches) < 1e6 * 500 &&
         double(g.depth) < 1e9;
}

// How many of its `most` tiles along M a phase computes before it is the next one's turn: the phases of dgrad read the
// same pixels, so they should not be far apart. A round of the device each, lest some blocks have the longest phase
// every time; no turns, if there are few tiles, or one phase alone has taps.
constexpr int64_t tma_turn(int64_t phases_with_taps, int64_t most, int64_t tiles_n) {
  return phases_with_taps > 1 && most * tiles_n >= 4 * 132 ? max64(132 / tiles_n, 1) : max64(most, 1);
}

// Phases that do not take turns are shared out so that no block has much more to do than others (phase_runs.h). What
// the block takes that has most; 0: they are not.
constexpr double tma_phases_longest(Row const& row, double const* count, double const* times, int64_t phases,
                                    int64_t with_taps, int64_t tiles, int64_t tiles_n) {
  int64_t const most = tiles / phases / tiles_n;
  if (with_taps < 2 || tma_turn(with_taps, most, tiles_n) < most) return 0;
  int64_t counts[kMaxPhases] = {};
  for (int64_t i = 0; i < phases; ++i) counts[i] = int64_t(count[i]);
  return phases_longest(counts, times, phases, min64(tiles, tma_slots(row)));
}

// A split: whole rounds of tiles have a block each; the steps of the remaining tiles are shared out evenly, in their
// order, among `workers` blocks, on average split_k or fewer a tile. A block's part of a tile goes to the workspace, at
// the sum of their numbers.
struct TileSplit {
  int64_t alone, shared, workers;
};
constexpr TileSplit tma_split(Row const& row, int64_t tiles, int64_t split_k) {
  if (split_k == 1) return {tiles, 0, 0};
  int64_t const slots = tma_slots(row), shared = tiles % slots;
  return {tiles - shared, shared, min64(slots, shared * split_k)};
}

// Tiles of all phases, as many of each; some may be empty.
constexpr int64_t tma_tiles(Row const& row, Problem const& p) {
  Op const op = row.op;
  int64_t const phases_h = op == Op::fprop ? 1 : phases_of(p.H, p.stride_h),
                phases_w = op == Op::fprop ? 1 : phases_of(p.W, p.stride_w);
  int64_t const N = op == Op::fprop ? p.K_per_group() : p.C_per_group();
  int64_t most = 0;
  for (int64_t i = 0; i < phases_h; ++i)
    for (int64_t j = 0; j < phases_w; ++j) {
      Walk const h = walk_h(op, p, i);
      Walk w = walk_w(op, p, j);
      if (is_halo(row.variant) && w.taps > 0 && h.taps > 0) w = halo_walk(row, p, w);
      most = max64(most, ceil_div(p.N * h.pixels * w.pixels, row.tile_m));
    }
  return most * phases_h * phases_w * ceil_div(N, row.tile_n) * p.groups;
}

// Tiles of tma_swap.cuh where none is shared and there are no phases: of 256 pixels, or of fewer if as many rounds of
// the device do with these. time: of the tiles, beside that of tiles of 256.
struct TmaTilePixels {
  int64_t pixels = 256;
  double time = 1;

  constexpr TmaTilePixels(Row const& row, Problem const& p) {
    bool const forward = row.op == Op::fprop;
    if (!tma_swapped(row)) return;
    if (!forward && (phases_of(p.H, p.stride_h) > 1 || phases_of(p.W, p.stride_w) > 1)) return;
    if (row.dtype != DType::f32 && (p.groups > 1 || tma_stores_singly(row.op, p))) return;  // not plain
    Walk const h = walk_h(row.op, p, 0);
    Walk w = walk_w(row.op, p, 0);
    if (h.taps == 0 || w.taps == 0) return;
    if (is_halo(row.variant)) w = halo_walk(row, p, w);
    int64_t const tiles_n = ceil_div(forward ? p.K_per_group() : p.C_per_group(), row.tile_n) * p.groups;
    int64_t first = 0, least = 0;
    for (int64_t of_tile : {256, 248, 232}) {
      int64_t const each = ceil_div(ceil_div(p.N * h.pixels * w.pixels, of_tile) * tiles_n, 132) * of_tile;
      if (first == 0) first = least = each;
      if (each < least) pixels = of_tile, least = each;
    }
    if (first > 0) time = double(least) / double(first);
  }
};
constexpr int64_t tma_tile_pixels(Row const& row, Problem const& p, int64_t split_k) {
  return split_k > 1 ? 256 : TmaTilePixels(row, p).pixels;
}

// Are lines of filters of several taps, in 16-bit types, slow to copy? fprop's where they begin off 32 bytes, what L2
// delivers at a time, dgrad's, which run along its results' channels, where they end off those.
constexpr bool slow_filter_lines(Op op, Problem const& p) {
  if (p.R * p.S == 1) return false;
  if (op == Op::dgrad) return ceil_div(p.C_per_group(), 8) % 2 != 0;
  auto off = [](int64_t size, int64_t stride) { return size > 1 && stride % 16 != 0; };
  return off(p.K, p.w.n) || off(p.R, p.w.h) || off(p.S, p.w.w);
}

// What a tile of fprop or dgrad takes. All constants of these estimates were fitted to times of random layers
// (docs/tuning.md).
struct TmaTile {
  double rate;          // multiply-adds a nanosecond
  double fixed;         // ns before and after its steps
  double im2col, halo;  // what the fit is off by
  double copies = 1;    // and its copies alone
};
constexpr TmaTile tma_tile(Row const& row) {
  bool const forward = row.op == Op::fprop, halo = is_halo(row.variant);
  if (row.tile_m == 64 && row.tile_n == 64) return {1750, 1520, 0.80, 1, forward ? 1 : 1.15};
  if (row.tile_m == 64) return {2670, 1070, 0.97, 1};
  if (row.tile_m == 144) return {3450, 2230, forward ? 0.96 : 1.02, 1};
  if (row.tile_m == 192) return {3350, 2420, 0.92, 1};
  if (row.tile_n == 256) return {5350, 1720, forward ? 1.23 : 1.19, 1};
  if (row.tile_n == 192) return {4160, 1450, forward ? 1.10 : 1.07, 1};
  if (row.tile_n == 160) return {3720, 3340, 1.10, 1};
  if (row.tile_n == 96) return {4100, 2600, 1, forward ? 1 : 1.06};
  if (row.tile_m == 256 && row.tile_n == 128) return {3580, 1670, forward ? 1.16 : 1.19, forward ? 0.97 : 1.01};
  if (row.tile_m == 256) return {4330, 617, 1.28, forward ? 1.05 : 1.01, halo ? 1 : 0.7};
  if (row.tile_n == 128) return {5960, 768, 1.16, 1};
  return {2280, 646, 1.11, 0.88, forward ? 1 : 1.15};
}

// Each of the two warpgroups of an SM multiplies at half the rate, and stores while the other multiplies.
constexpr Estimate phases_estimate(Problem const& p) {
  PhasesShape const shape(p);
  PhaseTaps const h = phase_taps(p.H, p.R, p.pad_top), w = phase_taps(p.W, p.S, p.pad_left);
  double const taps = double(p.R) * double(p.S) * double(shape.chunks);
  double const tile_ns = taps * shape.TM * shape.CW * (shape.line / 2) / 800 + 1700;
  int64_t const tiles = ceil_div(p.N * h.walk().pixels * halo_walk(w.walk()).pixels, shape.TM);
  double const ns = double(ceil_div(tiles, 264)) * tile_ns;
  double const elements =
      double(p.N) * double(p.C) * double(p.H) * double(p.W) + double(p.N) * double(p.K) * double(p.P()) * double(p.Q());
  double const memory_ns = elements * size_of(p.dtype) / 3500;
  return {(ns > memory_ns ? ns : memory_ns) + 6000, 1};
}

// The share of an axis's taps that lie within the tensor.
constexpr double taps_inside(Walk const& w, int64_t extent) {
  int64_t inside = 0;
  for (int64_t tap = 0; tap < w.taps; ++tap) {
    int64_t const at = w.lower + tap * w.tap_stride;
    int64_t const first = at < 0 ? ceil_div(-at, w.stride) : 0, last = at >= extent ? -1 : (extent - 1 - at) / w.stride;
    inside += max64(min64(last, w.pixels - 1) - first + 1, 0);
  }
  return double(inside) / double(max64(w.taps * w.pixels, 1));
}

// Tiles whose kernel leaves out rows of taps where all pixels of a tile meet padding. (In others the test alone cost as
// much as it saved.)
constexpr bool tma_skips_padding(int tile_m, int tile_n, Variant v) {
  return tile_m == 128 && tile_n == 256 && v == Variant::im2col;
}

// The share of the steps that is left, 1 if that kernel is not worth it.
constexpr double tma_steps_left(Row const& row, Op op, Problem const& p) {
  if (op == Op::wgrad || row.dtype == DType::f32 || !tma_skips_padding(row.tile_m, row.tile_n, row.variant)) return 1;
  if (op == Op::dgrad && phases_of(p.H, p.stride_h) * phases_of(p.W, p.stride_w) > 1) return 1;
  Walk const h = walk_h(op, p, 0), w = walk_w(op, p, 0);
  if (h.taps < 2 || h.pixels == 0 || w.pixels == 0) return 1;
  int64_t const extent = op == Op::fprop ? p.H : p.P();
  double const pixels = double(h.pixels), tile = row.tile_m / double(w.pixels) / pixels;  // a tile's share of an image
  if (tile >= 1) return 1;
  double left = 0;
  for (int64_t tap = 0; tap < h.taps; ++tap) {
    Walk one = h;
    one.lower += tap * h.tap_stride, one.taps = 1;
    double const inside = taps_inside(one, extent);
    if (inside > 0) left += inside + tile < 1 ? inside + tile : 1;
  }
  left = tile + (1 - tile) * left / double(h.taps);
  return left < 0.8 ? left : 1;
}

// fprop and dgrad by tma_lag.cuh, a kernel of 128x256 im2col: two warpgroups some steps apart, tiles of 64 pixels each;
// all of a block at a time have the same filters.
inline constexpr int kLagPixels = 64, kLagColumns = 256;

// How 132 blocks (a constant, so that results do not depend on the device) share pairs of tiles: each of tiles_n tiles
// of filters has as many blocks to itself, whose rounds are `rounds`; pairs beyond those are the other blocks', which
// have several tiles of filters in turn, if that takes no longer.
struct LagBlocks {
  int64_t own, others = 0, rounds;

  constexpr LagBlocks(int64_t tiles_n, int64_t pairs) : own(132 / tiles_n), rounds(ceil_div(pairs * tiles_n, 132)) {
    int64_t const spare = 132 % tiles_n, rest = pairs - own * rounds;
    // Each tile of filters begins with steps of one warpgroup alone.
    if (spare > 0 && rest > 0 && ceil_div(tiles_n, spare) * (2 * rest + 1) <= 2 * rounds + 1)
      others = spare;
    else
      rounds = ceil_div(pairs, own);
  }
  constexpr int64_t blocks(int64_t tiles_n) const { return own * tiles_n + others; }
};

// 16-bit types, one phase and group, whole tiles of steps that do not stay, where this takes no more rounds.
constexpr bool tma_lags(Row const& row, Op op, Problem const& p, int64_t split_k) {
  bool const forward = op == Op::fprop;
  if (op == Op::wgrad || row.dtype == DType::f32 || row.variant != Variant::im2col || row.tile_m != 128 ||
      row.tile_n != kLagColumns || p.groups > 1 || tma_stores_singly(op, p))
    return false;
  if (!forward && (p.stride_h > 1 || p.stride_w > 1)) return false;
  int64_t const C = forward ? p.C : p.K, tiles_n = ceil_div(forward ? p.K : p.C, kLagColumns);
  int64_t const steps = p.R * p.S * ceil_div(C, tma_line(C) / 2), tiles = tma_tiles(row, p);
  if (steps < 6 || tiles_n < 1 || tiles_n > 16 || tma_split(row, tiles, split_k).shared > 0 ||
      tma_steps_left(row, op, p) < 1)
    return false;
  int64_t const pixels = forward ? p.N * p.P() * p.Q() : p.N * p.H * p.W, pairs = ceil_div(pixels, 2 * kLagPixels);
  LagBlocks const lag(tiles_n, pairs);
  return pairs >= 2 * lag.own && lag.rounds <= ceil_div(tiles, 132);
}

// The steps that are shared out by a split, as `Shares` in tma.cuh has them: ns of the block with the most work.
constexpr double tma_shared_ns(TileSplit const& s, double steps, double step_ns, double part_ns) {
  double const shared = double(s.shared), aligned = double(s.workers / s.shared);
  double const left = double(s.workers) - aligned * shared;
  double const aligned_steps = left == 0 ? steps : double(int64_t(aligned * shared * steps / double(s.workers)));
  double const ns = double(ceil_div(int64_t(aligned_steps), int64_t(aligned))) * step_ns + part_ns;
  double const strip_steps = steps - aligned_steps;
  if (left == 0 || strip_steps == 0) return ns;
  double const strip = double(ceil_div(int64_t(shared * strip_steps), int64_t(left)));
  double const strip_ns = strip * step_ns + (strip / strip_steps + 1) * part_ns;
  return ns > strip_ns ? ns : strip_ns;
}

// fprop and dgrad. A tile takes the longer of its instructions and its copies, line by line, and part of the other.
constexpr Estimate tma_estimate(Row const& row, Op op, Problem const& p, Device const&) {
  if (row.variant == Variant::phases) return phases_estimate(p);
  bool const halo = is_halo(row.variant), two = tma_slots(row) > 132, forward = op == Op::fprop,
             swapped = tma_swapped(row);
  TmaTile const tile = tma_tile(row);
  double const TM = row.tile_m, TN = row.tile_n, area = TM * TN, slots = double(tma_slots(row));
  int64_t const C = forward ? p.C_per_group() : p.K_per_group(), N = forward ? p.K_per_group() : p.C_per_group();
  int64_t const line = 128 / size_of(p.dtype), chunks = ceil_div(C, line), tiles_n = ceil_div(N, row.tile_n) * p.groups;
  double const filled = double(ceil_div(C * 4, line)) / double(chunks * 4);  // instructions of the steps
  double const mma_ns = area * 64 / tile.rate * filled * (swapped && C <= 32 ? 1.03 : 1.0);
  int64_t const stages_b = p.R * p.S * chunks, tiles = tma_tiles(row, p);
  bool const keeps_b =
      tma_keeps_tiles(p.dtype, tiles, tiles_n, p.groups, tma_slots(row)) &&
      (swapped ? stages_b <= 64 && (stages_b * (N <= 32 ? 32 : 64) + 3 * 264) * tma_line(C) <= 205 * 1024
               : !tma_swapped_wide(row) && stages_b <= 16 && stages_b * row.tile_n * tma_line(C) <= 100 * 1024);
  // Lines that end early take longer, more so if they begin off 32 bytes, or lie across those of memory.
  bool const small = row.tile_m == 64 || two;
  double const ended = C % (tma_line(C) / 2) == 0 ? 1
                       : p.groups > 1             ? 1.66
                       : C % 16 == 0              ? (small ? 2.43 : 1.54)
                                                  : (small ? 3.43 : 2.17);
  double const line_ns = tma_maps_groups(op, p) && C > 32 ? 1.92 + 3.01 * (1 - double(C) / double(chunks * line))
                                                          : 1.07 * ended *
                                                                (C <= 8             ? 1.54
                                                                 : C <= 16 && small ? 1.22
                                                                                    : 1);
  double const filter_ns = keeps_b ? 0 : 0.37 * (forward ? 1 : 0.38) + (slow_filter_lines(op, p) ? 2 : 0);
  int64_t const phases_h = forward ? 1 : phases_of(p.H, p.stride_h),
                phases_w = forward ? 1 : phases_of(p.W, p.stride_w), phases = phases_h * phases_w;
  double const fixed = tile.fixed * (phases > 1 ? 1.54 : 1) *
                       (N % (line / 2) == 0 ? 1 : 1.30);  // results that lie across lines of memory
  double const lagging = p.R * p.S > 1 || p.stride_w > 1 || !tma_lags(row, op, p, 1) ? 1
                         : forward                                                   ? 0.91
                                                                                     : 0.8;  // 1x1 gains by it
  double const beside = two ? 2.11 : 1, padded = halo && !swapped ? 1.18 : 1;
  // Single rows said so of 3x3 filters with a stride (L08 and L41 of docs/tuning.md, and dgrad of few tiles).
  double const strided = forward && p.stride_w > 1 && p.R * p.S > 1 && row.tile_m == 256 && row.tile_n == 128 ? 0.91
                         : phases > 1 && swapped && halo && chunks <= 2                                       ? 1.09
                         : phases > 1 && !halo && row.tile_m == 256 && row.tile_n == 128                      ? 1.03
                                                                                                              : 1;
  // Few filters leave half of the instructions' rows empty; as measured (L56, L19).
  double const few = forward && halo && swapped && N <= 32 && C > 32 ? 1.07 : 1;
  double const met = tma_steps_left(row, op, p);
  double const filter_bytes = double(p.K) * double(p.C_per_group() * p.R * p.S) * size_of(p.dtype);
  double touched = 1;  // of x
  if (forward && p.R < p.stride_h) touched *= double(p.R) / double(p.stride_h);
  if (forward && p.S < p.stride_w) touched *= double(p.S) / double(p.stride_w);
  double const memory_ns = ((double(p.N) * double(p.C) * double(p.H) * double(p.W) * touched +
                             double(p.N) * double(p.K) * double(p.P()) * double(p.Q())) *
                                size_of(p.dtype) +
                            filter_bytes) /
                           6660;
  // The GPU lowers its clock when all tensor cores multiply what is not zero, and L2 serves all SMs at once more slowly
  // than a few: fprop's smaller tiles, which read more lines for their products, are bound by that.
  double least_ns = 0;
  // A phase's tiles, and ns of the steps of one while all SMs are at work.
  double count[kMaxPhases] = {}, steps_ns[kMaxPhases] = {};
  int64_t steps = 1, with_taps = 0;
  for (int64_t i = 0; i < phases; ++i) {
    Walk const h = walk_h(op, p, i / phases_w);
    Walk w = walk_w(op, p, i % phases_w);
    int64_t const taps = h.taps * w.taps;
    with_taps += taps > 0;
    int64_t copies = taps;
    double const inside =
        phases > 1 ? 1 : taps_inside(h, forward ? p.H : p.P()) * taps_inside(w, forward ? p.W : p.Q());
    if (halo && taps > 0) {
      copies = h.taps * halo_of(w).copies;
      w = halo_walk(row, p, w);
    }
    double const math = double(taps * chunks) * met * mma_ns;
    double const pixels_ns =
        double(copies * chunks) * (TM + (halo ? kHalo : 0)) * line_ns * (2.11 - 1.11 * inside / met);
    double const copy = (pixels_ns + double(taps * chunks) * TN * filter_ns) * met * tile.copies;
    steps_ns[i] = math > copy ? math + copy * 0.36 : copy + math * 0.36;
    count[i] = double(ceil_div(p.N * h.pixels * w.pixels, row.tile_m) * tiles_n);
    double const lines =
        met * (double(copies * chunks) * (TM + (halo ? kHalo : 0)) + (keeps_b ? 0 : double(taps * chunks) * TN));
    double const busy_ns = double(taps * chunks) * area * 64 * filled * inside / 3780,
                 l2_ns = forward ? lines * 1.24 : 0;
    least_ns += count[i] * (busy_ns > l2_ns ? busy_ns : l2_ns) / 132;
    steps = max64(steps, taps * chunks);
  }
  double const unshared = TmaTilePixels(row, p).time;
  Estimate best;
  for (int64_t split = 1; split <= 28 && split * 2 <= max64(steps, 2); split += split < 4 ? 1 : split / 2) {
    TileSplit const s = tma_split(row, tiles, split);
    if (split > 1 && (tma_swapped_wide(row) || s.shared == 0 || s.shared * steps > 1 << 30)) break;
    if (double(s.shared + s.workers) * area * 4 > double(kMaxWorkspaceBytes)) break;
    double const blocks = double(tiles) * double(split) < slots ? double(tiles) * double(split) : slots;
    double const busy = 1 - 0.18 * (1 - blocks / slots);
    double longest = 0, each = 0, whole = 0, empty = double(tiles), of_tile[kMaxPhases] = {};
    for (int64_t i = 0; i < phases; ++i) {
      double const ns = steps_ns[i] * busy;
      double const tile_ns = swapped ? (ns > 140 ? ns : 140) + fixed : ns * beside * padded + fixed;
      if (ns > longest) longest = ns;
      if (tile_ns > each) each = tile_ns;
      whole += count[i] * tile_ns, empty -= count[i], of_tile[i] = tile_ns;
    }
    whole += empty * 300;
    double ns = swapped ? 1290 : 0;
    if (s.alone > 0 && phases > 1) {
      double share = whole / slots * double(s.alone) / double(tiles) + (split > 1 ? 0 : each * 0.43);
      if (double const most =
              split > 1 ? 0 : tma_phases_longest(row, count, of_tile, phases, with_taps, tiles, tiles_n);
          most > 0)
        share = most;
      if (p.R * p.S == 1 && split == 1 && p.groups == 1)  // rounds of those with a tap, and the others' zeros
        ns += 0.9 * (double(ceil_div(int64_t(count[0]), tma_slots(row))) * each + (whole - count[0] * each) / slots);
      else
        ns += share > each ? share : each;
    } else if (two) {  // a block that has an SM for itself is faster
      int64_t const rest = s.alone % tma_slots(row);
      ns += double(s.alone / tma_slots(row)) * each;
      ns += rest == 0 ? 0 : rest <= 132 ? longest * padded * 1.19 + fixed : each;
    } else {
      ns += double(ceil_div(s.alone, tma_slots(row))) * each;
    }
    if (split > 1) {
      double const step_ns = longest * padded / double(steps) * (s.workers > 132 ? beside : 1);
      ns += tma_shared_ns(s, double(steps), step_ns, 1340 + area * 0.014);
      int64_t const aligned = s.workers / s.shared * s.shared;
      double const parts = double(s.workers == aligned ? aligned : s.workers + s.shared);
      // The second launch, which adds a tile's parts one after the other.
      ns += (s.alone == 0 ? 1930 + double(split) * 250 : 2930) + parts * area * 4 / 2550;
      // Blocks that are not at the same steps read filters that do not stay in L2 anew.
      if (s.shared * split > tma_slots(row) && filter_bytes > 2e7) ns += filter_bytes / 4300;
    }
    // As measured; C > line: groups that end within their second line.
    if (p.groups > 1 && halo && two && tiles > tma_slots(row)) ns *= 1.13;
    if (p.groups > 1 && C == 32 && N == 32) {
      if (tma_swapped_wide(row) || (!halo && row.tile_n == 64 && p.stride_w == 1)) ns *= 1.3;
      if (!forward && swapped && halo) ns *= phases > 1 ? 1.2 : 1.1;
    }
    if (p.groups > 1 && C > line && C % line != 0) {
      if (phases > 1 && !swapped) ns *= 0.74;
      if (row.tile_m == 128 && row.tile_n == 128) ns *= 1.29;
      if (phases == 1 && swapped && halo) ns *= 0.90;
    }
    if (ns < least_ns) ns = least_ns * 0.83 + ns * 0.17;
    ns = ns > memory_ns ? ns + memory_ns * 0.068 : memory_ns + ns * 0.068;
    // Filters of a group do not stay.
    double const anew = !swapped || p.groups == 1 ? 0 : tma_maps_groups(op, p) ? 2350 : 896;
    ns = (ns + 6680 + anew) * (halo ? tile.halo : tile.im2col) * strided * few * (split == 1 ? lagging : 1);
    // The estimate has tiles of 256 pixels; a split must be faster than tiles of fewer.
    if (split == 1 || ns < best.ns * (best.split_k == 1 ? unshared : 1)) best = {ns, int(split)};
  }
  return best;
}

// The best way to share the tiles: split_k is the number of blocks that share some, 1 if none does. fixed: ns of a tile
// or part beside its steps.
constexpr Estimate wgrad_shared_estimate(Row const& row, WgradTiles const& t, int64_t slots, double step_ns,
                                         double fixed, double memory_ns) {
  Estimate best;
  if (t.stores) {
    double const ns = double(ceil_div(t.tiles, slots)) * (double(t.steps) * step_ns + fixed);
    best = {(ns > memory_ns ? ns : memory_ns) + 3980, 1};
  }
  int64_t const even = t.tiles > 0 && t.tiles < slots ? slots / t.tiles * t.tiles : slots;  // no strips
  int64_t const long_parts = min64(t.tiles * t.steps / 3, slots);
  for (int64_t workers : {slots, even, long_parts, slots / 2, slots / 4, slots / 8, int64_t(1)}) {
    if (workers < 1 || (workers == 1 && t.stores)) continue;
    WgradShares const s = wgrad_shares(t, workers);
    double const bytes = double(s.partial()) * row.tile_m * row.tile_n * 4;
    if (s.shared == 0 || s.shared * t.steps < workers || bytes > double(kMaxWorkspaceBytes)) continue;
    double longest = s.aligned == 0 ? 0 : double(ceil_div(s.aligned_steps, s.aligned)) * step_ns + fixed;
    if (s.strip_workers > 0) {
      double const strips = double(s.shared) / double(s.strip_workers);
      double const ns = strips * double(s.strip_steps) * step_ns + (strips + 1) * fixed;
      if (ns > longest) longest = ns;
    }
    double ns = double(s.whole / workers) * (double(t.steps) * step_ns + fixed) + longest;
    if (ns < memory_ns) ns = memory_ns;
    ns += 3980 + 2560 + bytes * 2 / 4430;
    if (best.ns == 0 || ns < best.ns) best = {ns, int(workers)};
  }
  return best;
}

// As tma_estimate.
constexpr Estimate tma_wgrad_estimate(Row const& row, Problem const& p, Device const& d) {
  double const TM = row.tile_m, TN = row.tile_n;
  bool const halo = is_halo(row.variant), narrow = row.variant == Variant::narrow;
  WgradTiles const t = wgrad_tiles(row, p);
  bool const small = TM == 64, two = small && t.tiles > d.sm_count;  // blocks an SM
  bool const filters_first = wgrad_filters_first(row);
  double const share = halo && TN == 64       ? 0.86
                       : halo || narrow       ? 0.77
                       : small                ? 0.55
                       : TN < 128             ? 0.75
                       : TM * TN <= 128 * 128 ? 0.9
                       : filters_first        ? 0.82
                       : TM > TN              ? 0.78
                                              : 0.93;
  double const mma_ns = TM * TN * 64 / (2048 * 1.56 * share);
  // Copies take the time of their bytes through L2, or of their lines; those that the channels do not fill take longer.
  // With a stride there are two copies of halo's, which take twice as long, as measured.
  double const x_copies = p.stride_w > 1 ? 4.2 : 1;
  double const x_lines = halo ? TM / (64 * kWgradTaps) * (kWgradPixels + 2) * x_copies : narrow ? TM * 2 : TM;
  double const filled = p.C_per_group() % (narrow ? 32 : 64) == 0 ? 1 : 1 - 1.0 / double(ceil_div(p.C_per_group(), 64));
  double const lines_ns = x_lines * (2.65 - 1.18 * filled) + TN * 1.68;
  // Lines that lie across those of memory.
  double const x_across = p.C_per_group() % 64 == 0 ? 1 : 1.51, y_across = p.K_per_group() % 64 == 0 ? 1 : 1.87;
  double const bytes_ns = (x_lines * x_across * (narrow ? 0.5 : 1.0) + TN * y_across) * 128 / 89;
  double const copy_ns = lines_ns > bytes_ns ? lines_ns : bytes_ns;
  // As measured: a few steps of a group's whole lines take longer than their products, many do not.
  bool const short_sums = halo && p.groups > 1 && p.C_per_group() > 32;
  double const beside = two ? 1.44 : 1;  // the other block of an SM
  double const step_ns = (mma_ns > copy_ns ? mma_ns : copy_ns) * beside * (short_sums ? 0.90 : 1),
               fixed = 1240 + TM * TN * 0.067 + (short_sums ? 4380 : 0);
  double const memory_ns = (double(p.N) * double(p.C) * double(p.H) * double(p.W) +
                            double(p.N) * double(p.K) * double(p.P()) * double(p.Q())) *
                           size_of(p.dtype) / 3440;
  Estimate e = wgrad_shared_estimate(row, t, int64_t(d.sm_count) * (two ? 2 : 1), step_ns, fixed, memory_ns);
  if (wgrad_lags(row, p, t)) {
    double const rounds = double(wgrad_lag_rounds(t, ceil_div(p.K, row.tile_n)));
    // Above what was measured: other rows' estimates are up to as much too high here (20 layers timed as chosen).
    double const ns = 1.05 * (5000 + (rounds + 0.2) * double(t.steps) * step_ns + rounds * 1200);
    if (e.split_k == 1 || ns < e.ns) e = {ns > memory_ns ? ns : memory_ns, 1};
  }
  if (small) e.ns += 288;  // few steps take as long as with larger tiles
  // As measured: many taps' results in lines of 16 bytes (2x8x26x26 to 1360 7x7: 88 us, 41 where the filters are NCHW).
  if (t.stores && p.w.c == 1 && p.C_per_group() <= 8 && p.R * p.S >= 36) e.ns += double(p.K) * double(p.R * p.S) * 0.7;
  if (!channel_vectors(p.w, p.w_align, p.C_per_group(), 2, p.dtype))  // single weights
    e.ns += double(p.K) * double(p.C_per_group() * p.R * p.S) * 0.0087;
  return e;
}

constexpr int64_t tma_workspace_bytes(Row const& row, Problem const& p, int split_k) {
  if (row.op == Op::wgrad) return wgrad_shares(wgrad_tiles(row, p), split_k).partial() * row.tile_m * row.tile_n * 4;
  TileSplit const split = tma_split(row, tma_tiles(row, p), split_k);
  int64_t const parts = split_k == 1 ? 0 : split.shared + split.workers;
  return parts * row.tile_m * row.tile_n * 4;
}

}  // namespace conv2d_ext
