// The tiles of cuda/stem.cuh for a problem: shared by the planner and the launcher.
#pragma once

#include "grouped.h"
#include "stem_lines.h"

namespace conv2d_ext {

// fprop, or dgrad of stride one as the convolution of y with mirrored filters: the same kernel computes both.
struct StemView {
  int64_t C, H, W, K, P, Q;  // of the tensor that is read, and of the result
  int64_t stride_h, stride_w, pad_h, pad_w, w_in, w_out;
  Strides in, out;
  bool mirrored;
};
constexpr StemView stem_view(Op op, Problem const& p) {
  int64_t const pad_h = (p.R - 1) * p.dilation_h - p.pad_top, pad_w = (p.S - 1) * p.dilation_w - p.pad_left;
  if (op == Op::dgrad) return {p.K, p.P(), p.Q(), p.C, p.H, p.W, 1, 1, pad_h, pad_w, p.w.n, p.w.c, p.y, p.x, true};
  return {p.C,       p.H,        p.W,   p.K,   p.P(), p.Q(), p.stride_h, p.stride_w,
          p.pad_top, p.pad_left, p.w.c, p.w.n, p.x,   p.y,   false};
}

// A tile is `rows` x `groups` runs of 8 outputs along W, of tile_n filters; a warp computes tile_m / 8 runs at a time.
struct StemTile {
  int64_t rows = 0, groups = 0, tiles_h = 0, tiles_w = 0, slabs = 0, blocks_of_sm = 0;
  int64_t run, steps;           // words of a row of the filter; steps of 8 words
  int64_t in_rows, in_columns;  // of the inputs of a tile
  int64_t pitch, copies;        // words of a row of inputs; copies of the inputs
  int64_t fixed_bytes, shared_bytes;
  bool whole = false;  // in channels_last: eight pixels' results are one run of vectors, where a pixel's are none
  double ns = 0;
};

// Are results stored as vectors of `lanes`?
constexpr bool stem_has_vectors(bool nhwc, StemView const& v, int align, int64_t lanes, int64_t size) {
  auto whole = [&](int64_t stride) { return stride % lanes == 0; };
  return align >= lanes * size && whole(v.out.n) && whole(v.out.h) &&
         (nhwc ? (v.K == 1 || v.out.c == 1) && whole(v.out.w) && whole(v.K)
               : (v.Q == 1 || v.out.w == 1) && whole(v.out.c) && v.Q % (lanes == 2 ? 2 : 8) == 0);
}

inline constexpr int kStemMostChannels = 8;
// Elements of a row of 32 outputs that a warp stages: eight rows' lie in different banks.
inline constexpr int kStemStaged = 40;
constexpr int64_t stem_shared(int64_t blocks) { return (228 / blocks - 1) * 1024; }  // bytes of each of so many an SM

// Is a row of inputs one run of memory?
constexpr bool stem_has_runs(StemView const& v) { return (v.C == 1 || v.in.c == 1) && (v.W == 1 || v.in.w == v.C); }
// Elements of a tile's inputs as warps copy them: four lines by 64.
constexpr double stem_copied(StemView const& v, int64_t rows, int64_t columns) {
  int64_t const together = stem_has_runs(v) ? v.C : 1;
  return double(ceil_div(rows, 4) * (v.C / together) * ceil_div(columns * together, 64)) * 256;
}

constexpr StemTile stem_tile(Row const& row, Op op, Problem const& p, Device const& d) {
  StemView const v = stem_view(op, p);
  int64_t const per_word = 4 / size_of(p.dtype), all = ceil_div(v.Q, 8), at_once = row.tile_m / 8;
  StemTile best, t;
  t.slabs = ceil_div(v.K, row.tile_n);
  t.run = ceil_div(p.S * v.C, per_word), t.steps = ceil_div(p.R * t.run, 8);
  // Two 16-bit neighbours must lie in one word, wherever a run of the filter begins.
  t.copies = per_word == 2 && v.stride_w * v.C % 2 != 0 ? 2 : 1;
  int const align = op == Op::dgrad ? p.x_align : p.y_align;
  bool const nhwc = is_nhwc(row.variant),
             staged_pixels = nhwc && per_word == 2 && !stem_has_vectors(nhwc, v, align, 8, 2);
  t.whole = staged_pixels && t.slabs == 1 && align >= 16 && v.out.w == v.K && v.out.n % 8 == 0 && v.out.h % 8 == 0;
  int64_t const of_warp = !nhwc ? 8 * kStemStaged : staged_pixels ? 8 * row.tile_n : 0;
  int64_t const staged = kStemThreads / 32 * of_warp * size_of(p.dtype);
  t.fixed_bytes = t.steps * (row.tile_n * 32 + 64) + row.tile_n * 4 + staged;
  constexpr int64_t kRows[] = {1, 2, 4, 6, 8, 12, 16, 24, 32};
  // Nanoseconds of an SM for an input's element, a step of a warp, and a warp's outputs.
  double const element = 0.13 * double(t.copies), step = 18.0 * size_of(p.dtype) / 2,
               store = 60.0 * size_of(p.dtype) / 2;
  for (int64_t parts = 1; parts <= all; parts *= 2) {
    t.groups = ceil_div(all, parts), t.tiles_w = ceil_div(all, t.groups);
    t.in_columns = (t.groups * 8 - 1) * v.stride_w + p.S;
    t.pitch = ceil_div(t.in_columns * v.C + 1, per_word);
    for (int64_t rows : kRows) {
      if (rows > 1 && rows / 2 >= v.P) break;
      t.tiles_h = ceil_div(v.P, rows), t.rows = ceil_div(v.P, t.tiles_h);
      t.in_rows = (t.rows - 1) * v.stride_h + (p.R - 1) * p.dilation_h + 1;
      t.shared_bytes = t.fixed_bytes + t.copies * t.in_rows * t.pitch * 4 + t.steps * 8 * per_word * 4;
      if (t.shared_bytes > stem_shared(1)) break;
      t.blocks_of_sm = t.shared_bytes <= stem_shared(2) ? 2 : 1;
      double const tiles = double(v.P == 0 ? 0 : t.tiles_h * t.tiles_w) * double(p.N);
      double const blocks = double(max64(1, d.sm_count * t.blocks_of_sm / t.slabs));
      int64_t const items = ceil_div(t.rows * t.groups, at_once);
      double const work =
          stem_copied(v, t.in_rows, t.in_columns) * element + double(items) * (double(t.steps) * step + store);
      double const round = work * double(t.blocks_of_sm) + (t.blocks_of_sm == 1 ? 1500 : 500);
      t.ns = double(int64_t((tiles + blocks - 1) / blocks)) * round + 4000 + double(t.steps) * 100;
      if (best.rows == 0 || t.ns < best.ns) best = t;
    }
  }
  return best;
}

// wgrad of stem_wgrad.cuh: a warp sums 32 or 64 channels of the one tensor, whose pixels are summed over, by 32
// elements of the filter; `chunks` of those are a block's, and `splits` warps share its pixels.
struct StemSums {
  int64_t rows = 0, groups = 0, tiles_h = 0, tiles_w = 0;
  int64_t channels, channel_slabs, slabs, chunks, splits, slots;
  int64_t in_rows, in_columns, pitch;  // elements of a row of inputs
  int64_t line, row_bytes, big_bytes, small_bytes, shared_bytes, blocks_of_sm, parts;
  bool whole = false;  // lines of inputs are whole vectors
  double ns = 0;
};
constexpr Op stem_wgrad_view(Problem const& p) {
  return p.C <= p.K || p.stride_h != 1 || p.stride_w != 1 ? Op::fprop : Op::dgrad;
}
constexpr StemSums stem_sums(Row const& row, Problem const& p, Device const& d) {
  StemView const v = stem_view(stem_wgrad_view(p), p);
  bool const nhwc = is_nhwc(row.variant);
  int64_t const size = size_of(p.dtype), all = ceil_div(v.Q, 8), chunks = ceil_div(p.R * p.S * v.C, 32);
  StemSums best, t;
  bool const mirrored = stem_wgrad_view(p) == Op::dgrad;
  bool const runs = stem_has_runs(v);
  int64_t const lanes = 16 / size, together = runs ? v.C : 1;
  bool const vectors = stem_has_vectors(nhwc, v, mirrored ? p.x_align : p.y_align, lanes, size);
  t.whole = (mirrored ? p.y_align : p.x_align) >= 16 && v.in.n % lanes == 0 && v.in.h % lanes == 0 &&
            v.W * together % lanes == 0 && (runs || (v.in.w == 1 && v.in.c % lanes == 0));
  t.channels = v.K <= 32 || (size == 4 && !p.allow_tf32) ? 32 : 64;  // strict float32 has registers for no more
  int64_t const pixel = t.channels * size + (size == 2 ? 16 : 32);
  t.channel_slabs = ceil_div(v.K, t.channels), t.slabs = ceil_div(chunks, 8);
  t.chunks = ceil_div(chunks, t.slabs), t.splits = 8 / t.chunks;
  int64_t const each = t.channel_slabs * t.slabs;
  constexpr int64_t kRows[] = {1, 2, 4, 6, 8, 12, 16, 24, 32};
  for (int64_t parts = 1; parts <= all; parts *= 2) {
    t.groups = ceil_div(all, parts), t.tiles_w = ceil_div(all, t.groups);
    t.in_columns = (t.groups * 8 - 1) * v.stride_w + p.S;
    t.pitch = t.whole ? ceil_div(t.in_columns * together + lanes - 1, lanes) * lanes : t.in_columns * v.C;
    for (int64_t rows : kRows) {
      if (rows > 1 && rows / 2 >= v.P) break;
      t.tiles_h = ceil_div(v.P, rows), t.rows = ceil_div(v.P, t.tiles_h);
      t.in_rows = (t.rows - 1) * v.stride_h + (p.R - 1) * p.dilation_h + 1;
      t.slots = size == 2 ? ceil_div(t.rows * t.groups, 2) * 2 : t.rows * t.groups;
      int64_t const pixels = t.slots * 8;
      // Lines as they lie in memory, which may begin up to 16 bytes later; an odd slot's zeros. Padded so that the rows
      // of a fragment lie in different banks.
      t.row_bytes = nhwc ? t.groups * 8 * pixel : t.groups * 8 * size + (vectors ? 0 : 16);
      int64_t const odd = t.slots > t.rows * t.groups ? 16 + (vectors ? 0 : 16) : 0;
      int64_t const whole = t.rows * t.row_bytes + odd;
      t.line = nhwc ? pixel : whole + (whole % 32 == 0 ? 16 : 0);
      t.big_bytes = t.line * (nhwc ? pixels : t.channels);
      t.small_bytes = ceil_div(t.in_rows * t.pitch * (t.whole ? v.C / together : 1) * size, 16) * 16;
      t.shared_bytes = max64(2 * t.big_bytes + t.small_bytes * (size == 2 && !t.whole ? 1 : 2),
                             t.splits > 1 ? t.chunks * t.channels * 128 : 0);
      if (t.shared_bytes > stem_shared(2)) break;
      // Of 128 registers a thread, an SM has enough for 16 warps.
      t.blocks_of_sm = 3 * t.chunks * t.splits <= 16 && t.shared_bytes <= stem_shared(3) ? 3 : 2;
      double const tiles = double(p.N) * double(t.tiles_h) * double(t.tiles_w);
      double const blocks = double(max64(1, t.blocks_of_sm * d.sm_count / each));
      t.parts = int64_t(tiles < blocks ? tiles : blocks);
      // Nanoseconds of an SM for an input's element, a warp's step of 8 pixels, and 16 bytes of the pixels' lines.
      double const work =
          stem_copied(v, t.in_rows, t.in_columns) * 0.08 +
          double(ceil_div(t.slots, t.splits)) * double(t.splits * t.chunks * t.channels) / 64 * (size == 2 ? 9 : 18) +
          double(pixels * size * t.channels) * 0.03125;
      t.ns = double(int64_t((tiles + blocks - 1) / blocks)) * double(t.blocks_of_sm) *
                 (work * (t.blocks_of_sm == 3 ? 0.75 : 1) + 400) +
             10000 + double(t.parts) * double(each * t.chunks * t.channels) * 256 / 2500;
      if (best.rows == 0 || t.ns < best.ns) best = t;
    }
  }
  return best;
}
constexpr int64_t stem_sums_bytes(StemSums const& t) {
  return t.parts * t.channel_slabs * t.slabs * t.chunks * t.channels * 128;
}

// Few results, stem_narrow.cuh: fprop of few filters, dgrad of few channels. dgrad with a stride computes the pixels of
// all phases at a time, as channels of one result: a column is (phase along H, along W, channel).
struct StemNarrow {
  GroupedAxis h, w;
  int64_t columns, slabs;                                  // slabs: of tile_n columns
  int64_t rows = 0, groups = 0, tiles_h = 0, tiles_w = 0;  // of a tile: rows x runs of 8 results along W
  int64_t in_rows, in_columns, chunks;                     // of the tensor that is read; chunks of 64 bytes of channels
  int64_t weight_bytes, stages, stage_bytes, shared_bytes, blocks_of_sm;
  double ns = 0;
};
inline constexpr int64_t kNarrowLine = 80;  // bytes of a pixel of a chunk, padded: eight of them lie in different banks

// Blocks of an SM that its registers hold.
constexpr int stem_narrow_blocks(int64_t tile_n, DType t) { return tile_n == 8 && size_of(t) == 2 ? 3 : 2; }

constexpr StemNarrow stem_narrow(Row const& row, Op op, Problem const& p, Device const& d) {
  StemNarrow best, t;
  t.h = grouped_axis_h(op, p), t.w = grouped_axis_w(op, p);
  bool const backward = op == Op::dgrad;
  int64_t const in = backward ? p.K : p.C, size = size_of(p.dtype), runs = row.tile_m / 8;
  t.columns = (backward ? p.C : p.K) * t.h.phases * t.w.phases, t.slabs = ceil_div(t.columns, row.tile_n);
  t.chunks = ceil_div(in * size, 64);
  t.weight_bytes = int64_t(t.h.span) * t.w.span * t.chunks * row.tile_n * 64;
  int64_t const tables = row.tile_n * 20 + row.tile_n * (t.h.span + t.w.span) * 4;
  int64_t const all = ceil_div(t.w.positions, 8), most_blocks = stem_narrow_blocks(row.tile_n, p.dtype);
  // Cycles of a step of all warps: wavefronts of shared memory, or products.
  double const loads = double(row.tile_m) / 16 * 4 + 2 * double(row.tile_n),
               products = double(row.tile_m) / 16 * double(row.tile_n) / 8 * 1.7 * double(size) / 2;
  for (int64_t parts = 1; parts <= all; parts *= 2) {
    t.groups = ceil_div(all, parts), t.tiles_w = ceil_div(all, t.groups);
    if (t.groups > runs) continue;
    t.tiles_h = ceil_div(t.h.positions, min64(runs / t.groups, t.h.positions));
    t.rows = ceil_div(t.h.positions, t.tiles_h);
    t.in_rows = (t.rows - 1) * t.h.step + t.h.span, t.in_columns = (t.groups * 8 - 1) * t.w.step + t.w.span;
    t.stage_bytes = t.in_rows * t.in_columns * kNarrowLine;
    int64_t const fixed = t.weight_bytes + tables;
    if (fixed + t.stage_bytes > stem_shared(1)) continue;
    t.blocks_of_sm = 1;
    while (t.blocks_of_sm < most_blocks && fixed + t.stage_bytes <= stem_shared(t.blocks_of_sm + 1)) ++t.blocks_of_sm;
    t.stages = fixed + 2 * t.stage_bytes <= stem_shared(t.blocks_of_sm) ? 2 : 1;
    t.shared_bytes = fixed + t.stages * t.stage_bytes;
    double const tiles = double(t.tiles_h) * double(t.tiles_w) * double(p.N);
    double const blocks = double(max64(1, d.sm_count * t.blocks_of_sm / t.slabs));
    double const copied = double(t.in_rows * t.in_columns) * 64 / 22;
    double const work = double(t.h.span * t.w.span) * 2 * (loads > products ? loads : products) / 1.7;
    double const round = double(t.chunks) * (overlapped(copied, work) + (t.stages == 1 ? 600 : 200)) + 500;
    t.ns = double(int64_t((tiles + blocks - 1) / blocks)) * round * double(t.blocks_of_sm) + 5000 +
           double(t.weight_bytes) * 0.05;
    if (best.rows == 0 || t.ns < best.ns) best = t;
  }
  return best;
}

inline constexpr int64_t kStemStrictLeast = 16;  // products of a sum
constexpr bool stem_is_strict(Problem const& p) { return p.dtype == DType::f32 && !p.allow_tf32; }

constexpr bool stem_is_narrow(Row const& row) { return row.variant == Variant::any; }

// Where channels lie closer than pixels, a store has neighbouring filters, else neighbouring pixels.
constexpr bool stem_is_nhwc(Strides const& s, int64_t channels, int64_t columns) {
  return channels > 1 && s.c == 1 && (columns == 1 || s.w != 1);
}

constexpr bool stem_supports(Row const& row, Op op, Problem const& p, Device const& d) {
  if (p.groups != 1 || p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0 || p.P() <= 0 || p.Q() <= 0)
    return false;
  // In strict float32, sums of a few products, whose error is that of the split operands, are left to FMA.
  int64_t const products = op == Op::wgrad ? p.N * p.P() * p.Q() : (op == Op::fprop ? p.C : p.K) * p.R * p.S;
  if (stem_is_strict(p) && products < kStemStrictLeast) return false;
  bool const unit_stride = p.stride_h == 1 && p.stride_w == 1, lines = is_stem_lines(row),
             narrow = stem_is_narrow(row) || lines;
  Op const view_op = op == Op::wgrad ? stem_wgrad_view(p) : op;
  bool const few_filters = narrow ? op == Op::fprop : view_op == Op::dgrad;
  int64_t const few = few_filters ? p.K : p.C;
  if (few > kStemMostChannels || p.R > 64 || p.S > 64 || p.stride_h > 16 || p.stride_w > 16) return false;
  if (p.dilation_h > 64 || p.dilation_w > 64) return false;
  // Offsets of filters, coordinates and squares of pixels are int in the kernels.
  constexpr int64_t most = int64_t(1) << 28;
  if (p.H + p.pad_top + p.pad_bottom > most || p.W + p.pad_left + p.pad_right > most) return false;
  double const reach = double(p.K) * double(max64(p.w.n, 0)) + double(p.C) * double(max64(p.w.c, 0)) +
                       double(p.R) * double(p.w.h) + double(p.S) * double(p.w.w);
  if (reach >= double(int64_t(1) << 31)) return false;
  if (lines) return stem_lines_supports(op, p, d);
  if (narrow) {
    StemNarrow const t = stem_narrow(row, op, p, d);
    return t.rows > 0 && t.slabs <= 16;
  }
  if ((p.dilation_w != 1 && p.S != 1) || (view_op == Op::dgrad && !unit_stride)) return false;
  StemView const v = stem_view(view_op, p);
  if (stem_is_nhwc(v.out, v.K, v.Q) != is_nhwc(row.variant)) return false;
  if (op != Op::wgrad) return stem_tile(row, op, p, d).rows > 0;
  StemSums const t = stem_sums(row, p, d);
  return t.rows > 0 && stem_sums_bytes(t) <= kMaxWorkspaceBytes && p.N <= (int64_t(1) << 30) / (t.tiles_h * t.tiles_w);
}

constexpr int64_t stem_workspace_bytes(Op op, Row const& row, Problem const& p, Device const& d) {
  return op == Op::wgrad ? stem_sums_bytes(stem_sums(row, p, d)) : 0;
}

}  // namespace conv2d_ext
