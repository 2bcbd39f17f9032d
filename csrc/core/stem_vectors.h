// stem_vectors.cuh, fprop and dgrad (stride one) of few whole vectors of channels in channels_last: what it takes and
// its cut of a problem.
#pragma once

#include "stem.h"

namespace conv2d_ext {

inline constexpr int kStemVectorsThreads = 256;
inline constexpr int kStemVectorsChunks = 128;  // of a filter, at most: they are parameters
inline constexpr int kStemVectorsLines = 8;     // of a pixel: of more, other rows are faster

constexpr bool is_stem_vectors(Row const& row) {
  return row.family == Family::stem && row.variant == Variant::halo && row.tile_n == 32;
}

// Inputs lie in shared memory as [plane][row][place] chunks of 16 bytes, a plane for a chunk's place among a pixel's
// and for the row's and the column's phase of the stride: windows of neighbouring pixels are 16 bytes apart in each, as
// the rows of wgmma's operands are without a swizzle, and a tile of several rows is one line of pixels.
struct StemVectors {
  int64_t vector, lines;      // elements of a chunk; chunks of a pixel
  int64_t chunks;             // of the sum, and zeros to make them even
  int64_t filters, slabs;     // of a slab: 32 or 64
  int64_t rows = 0, columns;  // of a tile's results
  int64_t tiles_h, tiles_w;
  int64_t pitch, plane;         // pixels of a line, with what windows reach beyond; chunks of a plane
  int64_t in_rows, in_columns;  // that a tile reads
  int64_t stage_bytes, stages;  // of a tile's inputs
  int64_t shared_bytes, blocks_of_sm;
  bool twice;  // a warpgroup has twice 64 pixels at a time
  double ns = 0;
};

// The tile of the least estimate, fitted to 370 times (7 % rms; the tile that it takes is 3 % from the best in
// the mean of 13 layers).
constexpr StemVectors stem_vectors(Op op, Problem const& p, Device const& d) {
  StemVectors best, t;
  StemView const v = stem_view(op, p);
  int64_t const size = size_of(p.dtype);
  bool const half = size == 2;
  t.vector = 16 / size, t.lines = v.C / t.vector, t.chunks = ceil_div(p.R * p.S * t.lines, 2) * 2;
  t.filters = v.K <= 32 ? 32 : 64, t.slabs = ceil_div(v.K, t.filters);
  int64_t const reach_h = (p.R - 1) * p.dilation_h, reach_w = (p.S - 1) * p.dilation_w;
  int64_t const fixed = t.chunks * t.filters * 16 + 1024 + t.filters * 4, planes = v.stride_h * v.stride_w * t.lines;
  // Chunks that eight threads copy at a time lie in different banks.
  int64_t const of_pixel = v.stride_w * t.lines, shift = of_pixel == 1 ? 0 : of_pixel <= 4 ? ceil_div(8, of_pixel) : 1;
  double const of_group = double(t.chunks / 2 * t.filters / 32) * (half ? 13.8 : 8) + (half ? 0 : 40);
  double const bytes =
      double(p.N) * double(size) * (double(v.C) * double(v.H) * double(v.W) + double(v.K) * double(v.P) * double(v.Q));
  // dgrad's filters are read element by element.
  double const begin = (half ? 7190 : 6820) + bytes * (half ? 0.17e-3 : 0.24e-3) +
                       double(t.chunks * t.filters) * (!half             ? 1.5
                                                       : op == Op::dgrad ? 2
                                                                         : 0.5);
  for (int64_t parts = 1; parts <= ceil_div(v.Q, 8); parts *= 2) {
    t.columns = ceil_div(v.Q, parts), t.tiles_w = ceil_div(v.Q, t.columns);
    t.pitch = t.columns + reach_w / v.stride_w;
    t.in_columns = (t.columns - 1) * v.stride_w + reach_w + 1;
    for (int64_t rows = 1; rows <= 16 && (rows == 1 || rows / 2 < v.P); rows *= 2) {
      t.tiles_h = ceil_div(v.P, rows), t.rows = ceil_div(v.P, t.tiles_h);
      t.in_rows = (t.rows - 1) * v.stride_h + reach_h + 1;
      int64_t const chunks = (t.rows + reach_h / v.stride_h) * t.pitch;
      t.plane = chunks + (shift - chunks % 8 + 8) % 8, t.stage_bytes = planes * t.plane * 16;
      double const tiles = double(p.N) * double(t.tiles_h * t.tiles_w);
      t.twice = t.rows * t.pitch > 128;
      double const groups = double(ceil_div(t.rows * t.pitch, t.twice ? 256 : 128) * (t.twice ? 4 : 2));
      double const work = groups * of_group + double(t.in_rows * ceil_div(t.in_columns * t.lines, 32)) * 21;
      for (t.stages = 1; t.stages <= 2; ++t.stages) {
        t.shared_bytes = fixed + t.stages * t.stage_bytes;
        if (t.shared_bytes > stem_shared(1)) break;
        t.blocks_of_sm = t.shared_bytes <= stem_shared(3) && t.filters == 32 ? 3
                         : t.shared_bytes <= stem_shared(2)                  ? 2
                                                                             : 1;
        double const blocks = double(max64(1, d.sm_count * t.blocks_of_sm / t.slabs));
        double const rounds = double(int64_t((tiles + blocks - 1) / blocks));
        if (t.stages == 2 && rounds < 2) break;
        int64_t const on = ceil_div(int64_t((tiles + rounds - 1) / rounds) * t.slabs, d.sm_count);
        bool const hidden = on > 1 || t.stages == 2;  // copies, by products
        t.ns = begin + rounds * (double(on) * work * (hidden ? 1 : 1.06) + (t.stages == 2 ? 125 : 190));
        if (best.rows == 0 || t.ns < best.ns) best = t;
      }
    }
  }
  return best;
}

constexpr bool stem_vectors_supports(Op op, Problem const& p) {
  if (op == Op::wgrad || size_of(p.dtype) > 4 || stem_is_strict(p) || p.groups != 1 || p.R * p.S == 1) return false;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0 || p.P() <= 0 || p.Q() <= 0) return false;
  if (op == Op::dgrad && (p.stride_h != 1 || p.stride_w != 1)) return false;
  if (p.R > 64 || p.S > 64 || p.stride_h > 8 || p.stride_w > 8 || p.dilation_h > 64 || p.dilation_w > 64) return false;
  constexpr int64_t most = int64_t(1) << 24;
  if (p.H + p.pad_top + p.pad_bottom > most || p.W + p.pad_left + p.pad_right > most) return false;
  StemView const v = stem_view(op, p);
  int64_t const size = size_of(p.dtype), vector = 16 / size;
  bool const backward = op == Op::dgrad;
  auto const whole = [&](int64_t stride) { return stride % vector == 0; };
  if (v.C > kStemVectorsLines * vector || !whole(v.C) || v.in.c != 1 || (backward ? p.y_align : p.x_align) < 16 ||
      !whole(v.in.n) || !whole(v.in.h) || !whole(v.in.w))
    return false;
  if (!stem_is_nhwc(v.out, v.K, v.Q) || !stem_has_vectors(true, v, backward ? p.x_align : p.y_align, vector, size))
    return false;
  // Offsets of filters and of a row's inputs are int, divisions of 32 bits.
  double const reach = double(p.K) * double(max64(p.w.n, 0)) + double(p.C) * double(max64(p.w.c, 0)) +
                       double(p.R) * double(p.w.h) + double(p.S) * double(p.w.w);
  if (reach >= 2e9 || double(v.W) * double(v.in.w) >= 2e9) return false;
  int64_t const chunks = p.R * p.S * (v.C / vector);
  // Products of pixels beyond a tile's last read up to 255 chunks behind the inputs: filters and zeros.
  if (chunks < 6 || chunks > kStemVectorsChunks) return false;
  StemVectors const t = stem_vectors(op, p, h200_sxm);
  double const columns = double(p.N) * double(t.tiles_h), tiles = columns * double(t.tiles_w);
  return t.rows > 0 && t.slabs < 65536 && tiles < 1e9 && tiles * double(t.tiles_w) < 4e9 &&
         columns * double(t.tiles_h) < 4e9;
}

}  // namespace conv2d_ext
