// Of rows of tma of any variant: what they take without packing, and what that costs. Apart from what the kernels
// include, so that a new constant compiles none of them.
#pragma once

#include <cstdint>

#include "lean.h"
#include "matrix.h"
#include "merged.h"
#include "parts.h"
#include "pointwise.h"
#include "strict_phases.h"
#include "strict_turned.h"
#include "tma_classes.h"
#include "tma_held.h"
#include "tma_planes.h"
#include "tma_planes_wgrad.h"
#include "tma_resident.h"
#include "tma_strict.h"
#include "tma_strict_wgrad.h"
#include "tma_sums.h"
#include "tma_zeros.h"
#include "turned_filters.h"

namespace conv2d_ext {

// A sum, as rounds of tiles and memory hide each other in part. Fitted to 2,069 times (docs/tuning.md).
constexpr Estimate pointwise_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  double const bytes = double(p.N) * double(p.H) * double(p.W) * size_of(p.dtype);
  // Beside rounds of tiles, which wait for memory less than for each other, bytes that are read, written and of
  // filters.
  constexpr struct {
    double before, round, step, read, written, filters;
  } t{8950, 406, 283, 0.177, 0.077, 0.325};
  int64_t const depth = op == Op::fprop ? p.C : p.K, rows = op == Op::fprop ? p.K : p.C;
  int64_t const tiles = ceil_div(rows, row.tile_n) * ceil_div(p.N * ceil_div(p.H * p.W, 64), row.tile_m / 64);
  double const rounds = double(ceil_div(tiles, d.sm_count));
  double const filters = double(p.K) * double(p.C) * size_of(p.dtype);
  double const ns = t.before + rounds * (t.round + t.step * double(ceil_div(depth, 64))) +
                    (bytes * (double(depth) * t.read + double(rows) * t.written) + filters * t.filters) / 1000;
  // What L2 delivers, in bytes a ns (16x1920x20x20 to 2048 by 256x64: 119 us).
  double const tiles_read = bytes * double(p.C) * double(p.K) * (1.0 / row.tile_m + 1.0 / row.tile_n);
  double const least = 6000 + tiles_read / 9400;
  return {ns > least ? ns : least, 1};
}

// Pixels gathered four at a time: what a block waits for alone, or all bytes that are gathered, and what is stored.
// Fitted to 99 times of 33 problems, 6x6 to 18x18 (docs/tuning.md).
constexpr Estimate gather_estimate(Row const& row, Problem const& p) {
  bool const large = lean_large(row), wide = row.tile_n == 128;  // large tiles have an SM each
  int64_t const depth = row.op == Op::fprop ? p.C : p.K, rows = row.op == Op::fprop ? p.K : p.C;
  int64_t const steps = ceil_div(depth, 64), tiles = lean_tiles(row, p);
  double const gathered = double(tiles * steps) * double(row.tile_n) * 128 / 3080;
  double const stored = double(p.N) * double(p.H * p.W) * double(rows) * size_of(p.dtype) / 2170;
  double const rounds = double(ceil_div(tiles, large ? 132 : wide ? 264 : 396));
  // Filters' lines of which the tensor has less than 128 bytes take the copy engine 16.5 ns (48 bytes), 6.5 if more.
  double const line = p.C <= 24 ? 16.5 : row.op == Op::dgrad && p.C < 64 ? 6.5 : 0;
  double const lines = double(p.N) * double(p.H * p.W) / row.tile_n / 132 * double(p.K) * line;
  Estimate best;
  for (int split : {1, 2, 3, 4}) {
    if (split > 1 && (large || steps < 2 * split || tiles > lean_clusters(split))) continue;
    // Several rounds of small tiles store in turn.
    double const round = rounds == 1 || large ? 0 : 1500;
    double const alone = rounds * (round + double(ceil_div(steps, split)) * (large       ? 480
                                                                             : wide      ? 380
                                                                             : round > 0 ? 500
                                                                                         : 150));
    double const ns = (large ? 5100 + rounds * 1770 : 5830) + (alone > gathered ? alone : gathered) + stored + lines +
                      (split > 1 ? 1300 : 0);
    if (best.ns == 0 || ns < best.ns) best = {ns, split};
  }
  if (!large && wide) best.ns *= 0.98;  // as measured beside the others
  return best;
}

// Fitted to 278 times; 1.12 and 1.06: beside rows on packed copies, whose estimates are above their times.
constexpr Estimate planes_wgrad_estimate(Row const& row, Problem const& given, Device const& d) {
  Problem const p = planes_problem(row, given);
  PlanesPieces const pieces(row, p);
  int const block = planes_block(row.tile_m), blocks = planes_blocks(row.tile_m);
  WgradTiles const t = pieces.tiles(row, p);
  double const area = double(row.tile_m) * row.tile_n, rows = double(pieces.rows);
  // Warpgroups at work; instructions take 64 bytes of pixels and all columns, copies always 128 and more.
  double const groups = double(min64(p.S, kPlanesTaps)),
               halves = double(ceil_div(p.W, wgrad_pixels(p.dtype) / 2)) / double(pieces.chunks * 2);
  double const mma_ns = groups * block * blocks * 64 * 64 / (2048 * 1.56 * 0.916) * halves;
  double const x_boxes = p.R > 1 ? (rows + blocks - 1) / rows : double(pieces.width) / block,
               copy_ns = block * x_boxes * 3.68 + 64 * 3.06;
  bool const f32 = p.dtype == DType::f32;  // adds its chains in memory
  double const piece_ns = ((mma_ns > copy_ns ? mma_ns : copy_ns) + (block == 64  ? 0
                                                                    : blocks > 3 ? 30
                                                                                 : 110)) *
                              rows +
                          (f32 ? 440 + rows * 15 : 440),
               fixed = 1240 + area * 0.067;
  double const memory_ns = (double(p.N) * double(p.C) * double(p.H) * double(p.W) +
                            double(p.N) * double(p.K) * double(p.P()) * double(p.Q())) *
                           size_of(p.dtype) / 1965;
  Estimate e = wgrad_shared_estimate(row, t, d.sm_count, piece_ns, fixed, memory_ns);
  if (!channel_vectors(p.w, p.w_align, p.C, 2, p.dtype))  // single weights
    e.ns += double(p.K) * double(p.C * p.R * p.S) * 0.0087;
  e.ns *= !f32 ? 1.12 : 1.06;
  if (block < 64) e.ns = e.ns * (blocks > 3 ? 1 : f32 ? 1.08 : 1.2) + 3500;
  return e;
}

// Filters of which a second tile of 128 has few: it takes as long as a full one.
constexpr bool fills_little(int64_t K) { return K > 128 && K <= 144; }

// wgrad's rows of 16-bit types, as measured beside each other: two blocks of 64x64 an SM take longer than was
// estimated, others less.
constexpr double wgrad_as_measured(Row const& row, Problem const& p) {
  bool const im2col = row.variant == Variant::im2col;
  if (row.tile_m == 64) return !im2col ? 1 : p.groups > 1 ? 1.06 : 1.03;
  if (p.groups > 1 || (p.R * p.S == 1 && !im2col)) return 1;
  if (is_halo(row.variant) && p.W <= 16) return 1;  // a row's two pixels more
  // Tiles of three runs of x over many taps (16x112x80x80 to 576, 5x5: 183 us for 148 by 256x128).
  double const share = row.tile_n == 160 ? 0.9 : im2col && row.tile_m == 192 && p.R * p.S > 9 ? 1.13 : 0.94;
  bool const second = im2col && row.tile_n == 128 && row.tile_m <= 192 && fills_little(p.K);
  return !second ? share : share * (row.tile_m == 128 ? 1.14 : 1.08);
}

// Rows of 16-bit types over dense layers, as measured beside each other: how much longer they take than was estimated.
constexpr double dense_as_measured(Row const& row, Problem const& p) {
  if (row.family != Family::tma || p.dtype == DType::f32) return 1;
  if (row.op == Op::wgrad) return wgrad_as_measured(row, p);
  bool const planes = row.op == Op::fprop && p.groups == 1 && p.R * p.S > 1 && p.y.c != 1;
  if (planes && row.variant == Variant::im2col && row.tile_n == 128 && row.tile_m <= 192 && fills_little(p.K))
    return row.tile_m == 192 ? 1.2 : row.tile_m == 128 ? 1.28 : 1;
  // dgrad of several taps, results that lie across lines of memory (32x96x56x56 3x3: 64.5 us, 54.9 by 256x64).
  // And of several taps over lines of y that end early (32x128x28x28 to 72 3x3: 24.7 us, 20.5 by 256x128).
  bool const wide = row.op == Op::dgrad && p.groups == 1 && p.R * p.S > 1 && row.variant == Variant::im2col;
  if (wide && row.tile_m == 192 && p.C % 64 != 0) return 1.2;
  if (wide && row.tile_m == 192 && p.K % 64 != 0 && p.x.c == 1 && p.stride_w == 1) return 1.25;
  // Few channels of many pixels; not understood.
  bool const few = row.op == Op::dgrad && p.groups == 1 && p.C <= 8 && p.N * p.H * p.W >= 30000;
  return few && row.variant == Variant::halo && tma_swapped(row) ? 1.2 : 1;
}

// wgrad of several taps in 16-bit types: how much longer lines take that begin off 32 bytes, what L2 delivers at a
// time. Each tap copies them anew, but for halo's.
constexpr double off_sectors(Row const& row, Problem const& p) {
  bool const across = p.x.c == 1 && p.y.c == 1;
  if (row.family != Family::tma || row.op != Op::wgrad || p.dtype == DType::f32 || p.groups > 1 || p.R * p.S == 1 ||
      !across || is_halo(row.variant))
    return 1;
  int const off = (p.x.w % 16 != 0) + (p.y.w % 16 != 0);
  return 1 + off * (row.variant == Variant::lean && row.tile_m == 64 ? 0.25 : 0.13);
}

inline constexpr double kFewApart = 4e6;  // elements of x

// dgrad of 1x1 filters with strides over planes, of whose pixels they meet few: may a packed result have those alone?
constexpr bool meets_few_pixels(Problem const& p) {
  bool const padded = p.pad_top != 0 || p.pad_bottom != 0 || p.pad_left != 0 || p.pad_right != 0;
  return p.R == 1 && p.S == 1 && p.stride_w > 1 && p.groups == 1 && !padded && p.C >= 16 &&
         p.C % (16 / size_of(p.dtype)) == 0 && p.x.c != 1 && p.P() > 0 && p.Q() > 0;
}

// dgrad in TF32 with a stride over NCHW: few results are stored by single elements, though those of a phase lie apart,
// rather than by a launch that unpacks them (16-bit types: 0 to 20 us more).
constexpr bool stores_apart(Row const& row, Problem const& p) {
  bool const pixels = row.variant == Variant::im2col || row.variant == Variant::raw || is_halo(row.variant);
  return row.family == Family::tma && row.op == Op::dgrad && row.dtype == DType::f32 && pixels && p.groups == 1 &&
         p.stride_w > 1 && p.x.c > 1 && p.C % 4 == 0 && !(meets_few_pixels(p) && p.K >= 512) &&
         double(p.N) * double(p.C) * double(p.H) * double(p.W) <= kFewApart;
}

inline constexpr double kMostSingleWeights = 112 * 1024;

// wgrad in TF32 by rows of im2col: few weights are stored in any strides by the second launch, which a single part then
// has too, rather than by one that unpacks them.
constexpr bool tf32_adds_into_any(Row const& row, Problem const& p) {
  return row.family == Family::tma && row.op == Op::wgrad && row.dtype == DType::f32 && p.allow_tf32 &&
         row.variant == Variant::im2col && p.groups == 1 &&
         double(p.K) * double(p.C) * double(p.R) * double(p.S) <= kMostSingleWeights;
}
constexpr bool tf32_stores_apart(Row const& row, Problem const& p) { return tf32_adds_into_any(row, p) && p.w.c > 1; }

// May a row of lean run on packed copies? 1x1 filters over planes have kernels of their own, but where they step over
// pixels.
constexpr bool lean_packs(Row const& row, Problem const& p) {
  Strides const& in = row.op == Op::dgrad ? p.y : p.x;
  bool const planes = in.c != 1 && (p.W == 1 || in.w == 1);
  return row.family == Family::tma && row.variant == Variant::lean && p.groups == 1 &&
         (p.R * p.S > 1 || p.stride_h * p.stride_w > 1 || !planes);
}
// These store results in any strides, of any number of channels, by elements or pairs, but for large tiles. More
// weights than so many are packed.
constexpr bool lean_stores_apart(Row const& row, Problem const& p) {
  if (lean_large(row) || !lean_packs(row, p)) return false;
  int const v = 16 / size_of(p.dtype);
  if (row.op == Op::fprop) return !channel_vectors(p.y, p.y_align, p.K, v, p.dtype);
  if (row.op == Op::dgrad) return !channel_vectors(p.x, p.x_align, p.C, v, p.dtype);
  return !channel_vectors(p.w, p.w_align, p.C, v, p.dtype) &&
         double(p.K) * double(p.C) * double(p.R) * double(p.S) <= kMostSingleWeights;
}

constexpr double lean_apart_ns(Row const& row, Problem const& p) {
  if (!lean_stores_apart(row, p)) return 0;
  if (row.op == Op::wgrad) return double(p.K) * double(p.C) * double(p.R) * double(p.S) * 0.012;
  // As measured: elements of channels_last, which follow each other (D of 32x63x28x28 to 128 3x3 30.5 us, estimated at
  // 19.5); fprop stores pairs of an even number.
  bool const across =
      size_of(p.dtype) == 2 && (row.op == Op::fprop ? p.y.c == 1 && p.K % 8 != 0 : p.x.c == 1 && p.C % 8 != 0);
  double const each = !across ? 0.0007 : row.op == Op::fprop && p.K % 2 == 0 ? 0.0015 : 0.0045;
  return 300 + (row.op == Op::fprop ? double(p.N) * double(p.K) * double(p.P()) * double(p.Q())
                                    : double(p.N) * double(p.C) * double(p.H) * double(p.W)) *
                   each;
}

// The problem with results and filters as tma_supports knows them.
constexpr Problem as_channels_last(Row const& row, Problem p) {
  if (lean_stores_apart(row, p)) {
    int64_t const v = 16 / size_of(p.dtype);
    if (row.op == Op::fprop) p.K = ceil_div(p.K, v) * v, p.y = channels_last_strides(p.K, p.P(), p.Q()), p.y_align = 16;
    if (row.op == Op::dgrad) p.C = ceil_div(p.C, v) * v, p.x = channels_last_strides(p.C, p.H, p.W), p.x_align = 16;
    if (row.op == Op::wgrad) p.w = channels_last_strides(p.C, p.R, p.S), p.w_align = 16;
  }
  if (stores_apart(row, p)) p.x = channels_last_strides(p.C, p.H, p.W), p.x_align = 16;
  if (tf32_stores_apart(row, p) || (wants_turned_filters(row) && p.groups == 1 && has_turned_filters(p)))
    p.w = channels_last_strides(p.C_per_group(), p.R, p.S), p.w_align = 16;
  return p;
}

// TF32's of 128x128: what the estimate leaves out of that, less where many of the pixels that taps meet lie in the
// padding, as blocks then are soon at different steps. As measured (34 layers, 28x28 to 65x65, dilations of 1 to 18).
constexpr double tf32_neighbours_share(Row const& row, Op op, Problem const& p) {
  int64_t const C = op == Op::fprop ? p.C : p.K, N = op == Op::fprop ? p.K : p.C;
  if (row.variant != Variant::im2col || row.tile_m != 128 || row.tile_n != 128) return 1;
  if (p.R * p.S == 1 || p.groups != 1 || p.stride_h != 1 || p.stride_w != 1 || C < 128 || N % 128 != 0) return 1;
  if (tma_tiles(row, p) < 132) return 1;
  bool const forward = op == Op::fprop;
  double const lost =
      1 - taps_inside(walk_h(op, p, 0), forward ? p.H : p.P()) * taps_inside(walk_w(op, p, 0), forward ? p.W : p.Q());
  double const from = forward ? 0.25 : 0.08, least = forward ? 0.88 : 0.87, most = forward ? 1.4 : 1.35;
  double const share = lost > from ? least + (lost - from) * (forward ? 1.5 : 1.9) : least;
  return share < most ? share : most;
}

inline constexpr double kFirstPartNs = 3000;  // what one launch takes that those behind it do not

// Of any row of the families tma and tma_strict.
// wgrad of groups that fit a tile, merged or not, by rows whose filters are not narrow.
constexpr bool is_grouped_sums(Row const& row, Problem const& p) {
  return row.family == Family::tma && row.op == Op::wgrad && p.groups > 1 &&
         (row.variant == Variant::im2col || is_halo(row.variant)) && max64(p.C_per_group(), p.K_per_group()) <= 64;
}

// What these take beside their estimates, and of these, with whole tiles and with shares of them: as measured (516
// layers).
constexpr Estimate grouped_sums_estimate(Row const& row, Problem const& p, Device const& d) {
  Problem const m = as_merged(row, p);
  bool const f32 = row.dtype == DType::f32, merges = m.groups != p.groups;
  Estimate e = f32 ? tf32_wgrad_estimate(row, m, d) : tma_wgrad_estimate(row, m, d);
  struct Share {
    int tile_m, tile_n;
    double before_whole, whole, before, share;
  };
  constexpr Share shares[] = {{64, 64, 2450, 1.03, 1000, 1.05}, {128, 128, 3900, 0.79, 0, 1.01},
                              {192, 128, 0, 1, 0, 0.98},        {256, 64, 4500, 0.82, 0, 1},
                              {576, 64, 0, 1, 2000, 0.8},       {0, 0, 3300, 0.87, -1000, 1}};
  constexpr Share tf32_shares[] = {{128, 128, 5300, 0.82, 3650, 0.88},
                                   {128, 192, 4300, 0.82, 1800, 0.93},
                                   {256, 64, 5550, 0.7, 4900, 0.78},
                                   {576, 64, 0, 1, 3750, 0.98},
                                   {0, 0, 2500, 0.84, 2500, 0.85}};
  Share const* of = f32 ? tf32_shares : shares;
  while (of->tile_m != 0 && (of->tile_m != row.tile_m || of->tile_n != row.tile_n)) ++of;
  double share = e.split_k == 1 ? of->whole : of->share;
  // Long sums of 16-bit types: lines that begin off 32 bytes, short ones, and those in lines of memory.
  if (!f32 && (e.split_k > 1 || e.ns > 12000) && !is_halo(row.variant)) {
    bool const off = m.x.w % 16 != 0, short_lines = m.C_per_group() <= 48, aligned = m.x.w % 64 == 0;
    share += (off ? (row.tile_m == 64 ? 0.3 : 0.13) : 0) + (p.stride_w > 1 ? 0.05 : 0);
    if (short_lines && row.tile_m != 192) share -= 0.1;
    if (row.tile_m == 64 && !merges && m.C_per_group() < 64 && e.ns > 20000) share += 0.6;
    if (short_lines && aligned && row.tile_m != 64) share -= 0.1;
  }
  if (is_halo(row.variant) && !merges && p.stride_w > 1 && m.C_per_group() < 64) share -= 0.08;  // lines that end early
  e.ns = e.ns * share + (e.split_k == 1 ? of->before_whole : of->before);
  int64_t const pixels = p.N * p.P() * p.Q();
  if (!f32 && row.tile_m == 64 && pixels > 100 && pixels <= 1000 && e.ns < 14000) e.ns -= 1300;
  if (merges && merged_adds_always(row, p) && e.split_k == 1) e.ns += 4000;
  if (merges && !merged_stores_runs(p)) e.ns += double(p.K) * double(p.C_per_group() * p.R * p.S) * 0.0087;
  return e;
}

// Rows of lean make a map of dgrad's one phase also where that has no taps, which tma_supports passes over.
constexpr bool lean_maps(Row const& row, Problem const& p) {
  if (row.op != Op::dgrad || lean_phases(p) > 1 || lean_takes_planes(row, p)) return true;
  return im2col_supports(walk_h(row.op, p, 0), p.P()) && im2col_supports(walk_w(row.op, p, 0), p.Q());
}

constexpr bool in_place_supports(Row const& row, Problem const& p) {
  if (Parts const parts = parts_of(row, p); parts.count() > 0) {
    for (int64_t i = 0; i < parts.count(); ++i) {
      Problem const part = part_of(parts, i).problem;
      if (part.R > 0 && !in_place_supports(row, part)) return false;
    }
    return true;
  }
  if (row.op == Op::wgrad && is_halo(row.variant) && p.stride_w > 1 && p.groups == 1) return false;  // not timed
  if (merged_groups(row, p) > 1) return true;
  if (is_strict_phases(row)) return strict_phases_supports(p);
  if (is_strict_turned(row)) return strict_turned_tile(p).tile_m > 0;
  if (row.family == Family::tma_strict) return strict_supports(row, p);
  if (is_pointwise(row)) return pointwise_supports(row.op, p);
  if (is_matrix(row)) return matrix_supports(row.op, p);
  if (is_tma_planes(row)) return tma_planes_supports(row, p);
  if (p.dtype == DType::f32 && !p.allow_tf32) return false;
  if (is_planes_wgrad(row)) return planes_wgrad_supports(row, p);
  if (is_sums(row, p)) return sums_supports(row, as_channels_last(row, p));
  return row.variant == Variant::lean ? lean_supports(row, as_channels_last(row, p)) && lean_maps(row, p)
                                      : takes_classes(row, p) || takes_held(row, p) || takes_resident(row, p) ||
                                            tma_supports(row, as_channels_last(row, p));
}
constexpr Estimate in_place_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  if (Parts const parts = parts_of(row, p); parts.count() > 0) {
    Estimate sum{kFirstPartNs, 1};
    for (int64_t i = 0; i < parts.count(); ++i) {
      Problem const part = part_of(parts, i).problem;
      if (part.R > 0) sum.ns += in_place_estimate(row, op, part, d).ns - kFirstPartNs;
    }
    // fprop in TF32, as measured (dilations of 130 and 140): 128x128, and tiles of 160 filters that these do not fill.
    bool const tf32_fprop = op == Op::fprop && p.dtype == DType::f32 && row.family == Family::tma;
    if (tf32_fprop && row.tile_n == 160 && p.K % 160 != 0) sum.ns *= 1.3;
    if (tf32_fprop && row.tile_m == 128 && row.tile_n == 128) sum.ns *= 0.84;
    return sum;
  }
  if (is_strict_phases(row)) return strict_phases_estimate(p);
  if (is_strict_turned(row)) return strict_turned_estimate(p);
  if (row.family == Family::tma_strict)
    return op == Op::wgrad ? strict_wgrad_estimate(row, p, d) : strict_estimate(row, op, p);
  if (is_pointwise(row)) return pointwise_estimate(row, op, p, d);
  if (is_matrix(row)) {
    MatrixCut const cut = matrix_cut(op, row.tile_m, row.tile_n, p);
    double ns = cut.ns;
    MatrixProduct const product(op, p);
    if (op == Op::wgrad || product.depth > 64) return {ns, int(cut.parts)};
    // As measured: single steps of parts of lines (128x40x28x28 to 120 F 22.4 us, estimated at 16), and those whose
    // results, wider than what is read, memory takes more slowly than from tma_resident.cuh (256x64x56x56 to 256 F:
    // 158).
    if (product.depth < 64 && ns > 10000) ns += (ns - 10000) * 0.35;
    // Less in layers of up to 10 us (25088 pixels of 64 to 256 F 10.8 us by 64x128_im2col, 10.3 by this).
    bool const small = product.columns < (product.rows % 128 == 0 ? 45000 : 13000);
    double const least = memory_bound_ns(op, p) * 1.04 + (small ? 5700 : 6700);
    return {product.rows > 2 * product.depth && ns < least ? least : ns, 1};
  }
  if (is_tma_planes(row)) return tma_planes_estimate(row, p, d);
  if (is_sums(row, p)) {
    SumsEstimate const e = sums_estimate(row, p);
    return {e.ns + lean_apart_ns(row, p), e.cut.parts};
  }
  if (row.variant == Variant::lean) {
    if (lean_gathers(row, p)) return gather_estimate(row, p);
    Estimate e = lean_estimate(row, p);
    e.ns += lean_apart_ns(row, p);
    // As measured, 1x1 in 16 bits whose rows begin within sectors (32x776x8x5 to 3064 F 25.8 us, estimated at 16.0;
    // 32x40x28x28 to 120 13.0 and 16.9, estimated at 9.0 and 9.6).
    if (op != Op::wgrad && p.R * p.S == 1 && p.dtype != DType::f32 && !lean_takes_planes(row, p) &&
        (matrix_odd(p.C) || matrix_odd(p.K)))
      e.ns *= lean_large(row) ? 1.35 : lean_tiles(row, p) > 264 ? 1.6 : 1;
    return e;
  }
  if (is_planes_wgrad(row)) return planes_wgrad_estimate(row, p, d);
  bool const tf32 = p.dtype == DType::f32;
  if (op == Op::wgrad) {
    if (is_grouped_sums(row, p)) return grouped_sums_estimate(row, p, d);
    Estimate e = tf32 ? tf32_wgrad_estimate(row, p, d) : tma_wgrad_estimate(row, p, d);
    // What memory gives to sums over many pixels for few weights: 64x128x48x48 to 128 58.3 us by 128x128, estimated at
    // 43 (lean 53.1), 32x128x32x32 to 512 39.4, estimated at 32.5 (lean 38.0).
    if (tf32 && p.R * p.S == 1 && p.groups == 1 && p.x.c == 1 && p.stride_h * p.stride_w == 1) {
      double const least = memory_bound_ns(op, p) * 1.3 + 10500;
      if (e.ns < least) e.ns = least * 0.95 + e.ns * 0.05;  // the rows keep their order
    }
    if (tf32_stores_apart(row, p)) e.ns += double(p.K) * double(p.C * p.R * p.S) * 0.015 + (e.split_k == 1 ? 4000 : 0);
    return e;
  }
  if (Problem const m = as_merged(row, p); m.groups != p.groups) {  // slices, as measured
    Estimate e = tf32 ? tf32_estimate(row, op, m) : tma_estimate(row, op, m, d);
    if (tf32)
      e.ns = p.stride_w > 1 ? e.ns * 0.95 + 3200 : e.ns + 500;
    else if (p.stride_w == 1)
      e.ns = e.ns < 11000 ? e.ns + 1300 : e.ns * 0.545 + 6300;
    else if (op == Op::fprop)
      e.ns = e.ns * 0.855 + 4100;
    else
      e.ns = e.ns < 17000 ? e.ns + 1400 : e.ns * 0.83 + 4300;
    return e;
  }
  if (takes_classes(row, p)) return classes_estimate(p, d);
  if (takes_held(row, p)) return held_estimate(row.op, p, d);
  if (takes_zeros(row, p)) return zeros_estimate(row, p, d);
  if (takes_resident(row, p)) {
    Estimate e = resident_estimate(op, p, d);
    // As measured: a last line of 8 channels (72, 136; not 80).
    int64_t const depth = op == Op::fprop ? p.C : p.K;
    if (depth > 64 && depth % 64 != 0 && depth % 64 <= 8) e.ns *= 1.12;
    // A pixel's line takes the copy engine the longer the shorter it is (256x8x49x49 to 8 F 32.4 us, estimated
    // at 13.9).
    auto line_ns = [&](int64_t channels) {
      int64_t const bytes = channels * size_of(p.dtype);
      return bytes <= 16 ? 3.0 : bytes <= 64 ? 2.2 : 1.3;
    };
    double const pixels = double(p.N) * double(op == Op::fprop ? p.P() * p.Q() : p.H * p.W);
    double const least = 5000 + pixels / d.sm_count * (line_ns(p.C) + line_ns(p.K));
    if (e.ns < least) e.ns = least;
    // Two stages of floats (16x216x80x80 to 144 F 82.0 us, estimated at 43.9).
    if (tf32 && ResidentShape(op, p).stages == 2) e.ns *= 1.6;
    return e;
  }
  Estimate e = tf32 ? tf32_estimate(row, op, p) : tma_estimate(row, op, p, d);
  // As measured: lines of 64 bytes; what stores by the copy engine save where the pixels are rows of a matrix.
  bool const halves = !tf32 && p.groups == 1 && tma_line(op == Op::fprop ? p.C : p.K) == 64;
  if (halves && is_halo(row.variant) && row.tile_m == 128 && row.tile_n == 64)
    e.ns *= 1.38;
  else if (halves && p.R * p.S > 1 && e.ns < 16000)
    e.ns += (16000 - e.ns) * 0.35;
  // TF32's pixels that begin off 32 bytes, what L2 delivers at a time (32x60x28x28 to 128 3x3 by 64x128 45 us).
  if (tf32 && op == Op::fprop && p.R * p.S > 1 && row.variant == Variant::im2col && p.x.c == 1 && p.x.w % 8 != 0)
    e.ns *= row.tile_m > 64 ? 1.4 : row.tile_n > 64 ? 2 : 1;
  // Strides, as measured (L08, L41, and others of docs/tuning.md).
  if (tf32 && op == Op::fprop && p.stride_w > 1 && p.R * p.S > 1 && p.groups == 1 && row.variant == Variant::im2col &&
      row.tile_m == 128 && row.tile_n == 128 && p.C >= 128)
    e.ns *= 0.87;
  if (tf32) e.ns *= tf32_neighbours_share(row, op, p);
  // Of what tf32_estimate has for it. The launch's own time the raw rows gain as well, by beginning early.
  if (wants_turned_filters(row) && has_turned_filters(p))
    e.ns -= double(p.K) * double(p.C) * double(p.R) * double(p.S) * 0.0028;
  if (stores_apart(row, p)) e.ns += double(p.N) * double(p.C) * double(p.H) * double(p.W) * 0.0025;
  // Results in NCHW of dilated filters, as measured (L34, and others of docs/tuning.md).
  if (!tf32 && op == Op::fprop && row.variant == Variant::im2col && row.tile_m == 128 && row.tile_n == 256 &&
      p.dilation_w > 1 && p.y.c > 1 && p.groups == 1 && e.ns > 60000)
    e.ns *= 1.1;
  bool const one_tap = op != Op::wgrad && p.R * p.S == 1 && p.groups == 1;
  if (one_tap && !tf32 && row.variant == Variant::im2col) e.ns *= 1.07;
  if (one_tap && p.stride_h * p.stride_w == 1) {
    double const least = memory_bound_ns(op, p) * 1.04 + (tf32 ? 6500 : 8000);
    if (e.ns < least) e.ns = least * 0.95 + e.ns * 0.05;  // the rows keep their order
  }
  // As measured: TF32's dgrad of strides by raw (32x1024x14x14 to 2048 53.8 us, 128x128 45.9).
  if (one_tap && tf32 && op == Op::dgrad && p.stride_w > 1 && row.variant == Variant::raw) e.ns *= 1.1;
  // As measured: few channels of TF32's dgrad (8x24x56x56 to 72: 13.5 us, estimated at 10.4).
  if (one_tap && tf32 && op == Op::dgrad && p.C <= 32 && e.ns < 25000) e.ns += 3000;
  bool const one_phase = op == Op::fprop || phases_of(p.H, p.stride_h) * phases_of(p.W, p.stride_w) == 1;
  bool const runs = tma_stores_runs(row, p);
  if (tma_swapped_wide(row) && one_phase && (runs || !tma_stores_singly(op, p)))
    e.ns = (e.ns - double(ceil_div(tma_tiles(row, p), 132)) * (row.tile_m == 192 ? 400 : 600)) *
           (row.tile_m != 192            ? 1
            : one_tap                    ? 1.06
            : p.stride_w == 1 && !halves ? (op == Op::fprop ? 0.965 : 0.93)
                                         : 1);
  if (runs) {
    e.ns += 1700;  // as measured
  } else if (tma_stores_singly(op, p)) {
    double const elements = op == Op::fprop ? double(p.N) * double(p.K) * double(p.P()) * double(p.Q())
                                            : double(p.N) * double(p.C) * double(p.H) * double(p.W);
    // Lanes go along the pixels.
    bool const across = (op == Op::fprop ? p.y.c : p.x.c) == 1 && p.H * p.W > 1 && !tma_stores_lines(row, p);
    e.ns += elements * (across ? (tf32 ? 0.01 : 0.016) : tf32 ? 0.0002 : 0.0007) * 132 / d.sm_count;
  }
  return e;
}
constexpr int64_t in_place_workspace_bytes(Row const& row, Problem const& p, int split_k) {
  if (Parts const parts = parts_of(row, p); parts.count() > 0) {  // one after the other
    int64_t most = 0;
    for (int64_t i = 0; i < parts.count(); ++i) {
      Problem const part = part_of(parts, i).problem;
      if (part.R == 0) continue;
      most = max64(most, in_place_workspace_bytes(row, part, in_place_estimate(row, row.op, part, h200_sxm).split_k));
    }
    return most;
  }
  if (is_strict_phases(row)) return strict_phases_places(p, split_k).bytes;
  if (is_strict_turned(row)) return strict_turned_bytes(p);
  if (row.family == Family::tma_strict)
    return row.op == Op::wgrad ? strict_wgrad_workspace_bytes(row, p, split_k)
                               : strict_workspace_bytes(row, row.op, p, split_k);
  if (is_pointwise(row)) return tma_workspace_bytes(turned(row), turned(row.op, p), split_k);
  if (is_sums(row, p)) return sums_workspace_bytes(row, p);
  if (row.variant == Variant::lean) return lean_workspace_bytes(row, p, split_k);
  if (is_matrix(row)) return matrix_workspace_bytes(row, p);
  if (is_tma_planes(row)) return 0;
  if (is_planes_wgrad(row)) return planes_wgrad_workspace_bytes(row, p, split_k);
  if (Problem const m = as_merged(row, p); m.groups != p.groups) {
    if (merged_adds_always(row, p) && split_k == 1) return tf32_wgrad_tiles(row, m) * row.tile_m * row.tile_n * 4;
    return in_place_workspace_bytes(row, m, split_k);
  }
  if (tf32_stores_apart(row, p) && split_k == 1) return tf32_wgrad_tiles(row, p) * row.tile_m * row.tile_n * 4;
  return p.dtype == DType::f32 ? tf32_workspace_bytes(row, row.op, p, split_k) : tma_workspace_bytes(row, p, split_k);
}

}  // namespace conv2d_ext
