// stem_halo.cuh, fprop of a first layer by wgmma on windows that overlap in shared memory: what it takes and its cut of
// a problem.
#pragma once

#include "stem_lean.h"

namespace conv2d_ext {

inline constexpr int kStemHaloThreads = 256;
inline constexpr int kStemHaloSteps = 64;  // of two chunks, at most: they are parameters

constexpr bool is_stem_halo(Row const& row) {
  return row.family == Family::stem && row.variant == Variant::halo && row.tile_n == 64;
}

// Inputs lie in shared memory as [plane][row][place] chunks of 16 bytes: of two or one columns of 4 or 8 channels, or
// of half a column's. From a pixel to the next there are `unit` chunks, so every unit-th is a plane's, as every
// stride_h-th row is: windows of neighbouring pixels are 16 bytes apart everywhere, as the rows of wgmma's operands are
// without a swizzle, and a tile of several rows is one line of pixels.
struct StemHalo {
  bool nhwc;                  // results of a pixel lie together
  bool half;                  // the last chunk of a filter's row has one column of two: it is stored apart, with zeros
  int64_t vector;             // results that are stored together: 16 bytes, or in NCHW two; 1
  int64_t channels, unit;     // padded; chunks from a pixel to the next
  int64_t in_row, chunks;     // of a row of the filter; of the filter, and zeros to make them even
  int64_t slabs;              // of 64 filters
  int64_t rows = 0, columns;  // of a tile's results
  int64_t tiles_h, tiles_w;
  int64_t pitch, plane_rows;   // pixels of a line, with what windows reach beyond; rows of a plane
  int64_t in_rows, positions;  // of inputs that a tile reads; their chunks
  int64_t input_bytes, shared_bytes, blocks_of_sm;
  double ns = 0;
};

constexpr StemHalo stem_halo(Op op, Problem const& p, Device const& d) {
  StemHalo best, t;
  StemView const v = stem_view(op, p);
  int64_t const size = size_of(p.dtype);
  t.nhwc = stem_is_nhwc(v.out, v.K, v.Q);
  auto const vectors = [&](int64_t of) {
    return stem_has_vectors(t.nhwc, v, op == Op::dgrad ? p.x_align : p.y_align, of, size) && (!t.nhwc || v.K % 8 == 0);
  };
  t.vector = vectors(16 / size) && (t.nhwc || size == 2) ? 16 / size : !t.nhwc && vectors(2) ? 2 : 1;
  t.channels = v.C <= 4 && (size == 4 || v.stride_w % 2 == 0) ? 4 : 8;
  int64_t const column = t.channels * size;
  t.half = column == 8 && p.S % 2 != 0;
  t.unit = v.stride_w * column / 16, t.in_row = ceil_div(p.S * column, 16);
  t.chunks = ceil_div(p.R * t.in_row, 2) * 2, t.slabs = ceil_div(v.K, 64);
  int64_t const fixed = t.chunks * 1024 + 1024 + 256;
  int64_t const at_once = t.nhwc ? 256 : 128;  // pixels of both warpgroups
  constexpr int64_t kRows[] = {1, 2, 3, 4, 6, 8, 12, 16};
  double const of_step = 20, of_item = 0.2 * (size == 4 ? 0.7 : 1), store = 64.0 * 64 * double(size) / 25;
  for (int64_t parts = 1; parts <= ceil_div(v.Q, 8); parts *= 2) {
    t.columns = ceil_div(ceil_div(v.Q, parts), 8) * 8, t.tiles_w = ceil_div(v.Q, t.columns);
    t.pitch = t.columns + ceil_div(max64(t.in_row - t.unit, 0), t.unit);
    if (!t.nhwc) t.pitch = ceil_div(t.pitch, 8) * 8;
    t.positions = (t.columns - 1) * t.unit + t.in_row;
    for (int64_t rows : kRows) {
      if (rows > 1 && rows / 2 >= v.P) break;
      t.tiles_h = ceil_div(v.P, rows), t.rows = ceil_div(v.P, t.tiles_h);
      int64_t const reach = (p.R - 1) * p.dilation_h;
      t.in_rows = (t.rows - 1) * v.stride_h + reach + 1, t.plane_rows = t.rows + reach / v.stride_h;
      t.input_bytes = v.stride_h * t.plane_rows * t.pitch * 16 * (t.unit + (t.half ? 1 : 0));
      t.shared_bytes = fixed + t.input_bytes;
      if (t.shared_bytes > stem_shared(1)) break;
      t.blocks_of_sm = t.shared_bytes <= stem_shared(3) ? 3 : t.shared_bytes <= stem_shared(2) ? 2 : 1;
      double const tiles = double(p.N) * double(t.tiles_h * t.tiles_w);
      double const blocks = double(max64(1, d.sm_count * t.blocks_of_sm / t.slabs));
      double const work =
          double(ceil_div(t.rows * t.pitch, at_once) * (at_once / 64)) * (double(t.chunks / 2) * of_step + store) +
          double(t.in_rows * t.positions) * of_item;
      double const round = work * double(t.blocks_of_sm) * (t.blocks_of_sm == 1 ? 2 : 1) + 1000;
      t.ns = double(int64_t((tiles + blocks - 1) / blocks)) * round;
      if (best.rows == 0 || t.ns < best.ns) best = t;
    }
  }
  return best;
}

constexpr bool stem_halo_supports(Op op, Problem const& p) {
  if (op != Op::fprop || size_of(p.dtype) > 4 || stem_is_strict(p) || p.groups != 1) return false;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0 || p.P() <= 0 || p.Q() <= 0) return false;
  if (p.C > kStemMostChannels || (p.dilation_w != 1 && p.S != 1)) return false;
  if (p.R > 64 || p.S > 64 || p.stride_h > 16 || p.stride_w > 16 || p.dilation_h > 64) return false;
  constexpr int64_t most = int64_t(1) << 24;
  if (p.H + p.pad_top + p.pad_bottom > most || p.W + p.pad_left + p.pad_right > most) return false;
  // Offsets of filters and of a row's inputs are int, divisions of 32 bits.
  double const reach = double(p.K) * double(max64(p.w.n, 0)) + double(p.C) * double(max64(p.w.c, 0)) +
                       double(p.R) * double(p.w.h) + double(p.S) * double(p.w.w);
  if (reach >= 2e9 || double(p.W) * double(p.x.w) + double(p.C) * double(p.x.c) >= 2e9) return false;
  StemHalo const t = stem_halo(op, p, h200_sxm);
  double const columns = double(p.N) * double(t.tiles_h), tiles = columns * double(t.tiles_w);
  // Two steps of filters at least: warpgroups read windows up to 255 pixels beyond a tile's last.
  return t.rows > 0 && (!t.nhwc || t.vector > 1) && t.chunks >= 4 && t.chunks <= 2 * kStemHaloSteps &&
         t.slabs < 65536 && tiles < 1e9 && tiles * double(t.tiles_w) < 4e9 && columns * double(t.tiles_h) < 4e9;
}

}  // namespace conv2d_ext
