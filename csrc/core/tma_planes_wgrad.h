// tma_planes_wgrad.cuh: what its rows take and cost, and how they cut a problem.
#pragma once

#include <cstdint>

#include "tma.h"

namespace conv2d_ext {

constexpr bool is_planes_wgrad(Row const& row) {
  return row.family == Family::tma && row.op == Op::wgrad && row.variant == Variant::nchw;
}

// A tile has blocks of 64 or 32 columns: rows of the filter at as many channels, or, if it has but one, channels. The
// rows of a tile are kPlanesTaps taps of a row of the filter at 64 filters. A step is a line of 128 bytes of a row of
// x; a piece, of kPlanesRows of y at most, one below the other, `step` rows apart. WgradTiles' steps are pieces.
inline constexpr int kPlanesTaps = 3;
inline constexpr int kPlanesRows = 8;
constexpr int planes_block(int tile_m) { return tile_m == 576 ? 64 : 32; }  // columns
constexpr int planes_blocks(int tile_m) { return tile_m / kPlanesTaps / planes_block(tile_m); }

// Of blocks of 32 columns, where there are fewer filters than channels: the same sums with x and y exchanged, and the
// filter turned round. Its weights begin at the last one, and go backwards.
constexpr bool planes_exchanged(Row const& row, Problem const& p) {
  return planes_block(row.tile_m) == 32 && p.K <= p.C;
}
constexpr Problem planes_problem(Row const& row, Problem const& p) {
  if (!planes_exchanged(row, p)) return p;
  Problem t = p;
  t.C = p.K, t.K = p.C, t.H = p.P(), t.W = p.Q();
  int64_t const h = (p.R - 1) * p.dilation_h, w = (p.S - 1) * p.dilation_w;
  t.pad_top = h - p.pad_top, t.pad_bottom = h - p.pad_bottom;
  t.pad_left = w - p.pad_left, t.pad_right = w - p.pad_right;
  t.x = p.y, t.y = p.x, t.x_align = p.y_align, t.y_align = p.x_align;
  t.w = {p.w.c, p.w.n, -p.w.h, -p.w.w};
  return t;
}

struct PlanesPieces {
  int64_t s_runs = 0, r_runs = 0;  // taps of a row, rounded up; tiles along the rows of the filter, 0: one row
  int64_t width = 0, runs = 0;     // columns of a tile; tiles along the columns
  int64_t chunks = 0;              // of a row
  int64_t step = 1, phases = 1;    // rows of y that lie `step` apart
  int64_t rows = 0, parts = 0;     // of a piece; pieces of such rows of an image

  // p: planes_problem's.
  constexpr PlanesPieces(Row const& row, Problem const& p) {
    int const block = planes_block(row.tile_m), blocks = planes_blocks(row.tile_m);
    s_runs = ceil_div(p.S, kPlanesTaps) * kPlanesTaps;
    if (p.R > 1) {
      width = block * blocks, r_runs = ceil_div(p.R, blocks), runs = r_runs * ceil_div(p.C, block);
      step = p.dilation_h, phases = min64(p.dilation_h, p.P());
    } else {
      runs = ceil_div(p.C, block * blocks);
      width = ceil_div(ceil_div(p.C, runs), block) * block;
      runs = ceil_div(p.C, width);
    }
    chunks = ceil_div(p.W, wgrad_pixels(p.dtype));
    int64_t const all = ceil_div(p.P(), max64(phases, 1));
    rows = ceil_div(all, max64(ceil_div(all, kPlanesRows), 1));
    parts = ceil_div(all, max64(rows, 1));
  }
  constexpr WgradTiles tiles(Row const& row, Problem const& p) const {
    WgradTiles t;
    t.runs = s_runs * runs;
    t.tiles = ceil_div(s_runs, kPlanesTaps) * runs * ceil_div(p.K, row.tile_n);
    t.steps = p.N * phases * parts * chunks;  // pieces
    return t;
  }
};

// Bytes of y that a row's box has: those that meet a step's pixels of x at the tile's taps, from a multiple of 16 on.
inline constexpr int kPlanesBox = 176;

// Can the copy engine read a tensor's rows?
constexpr bool plane_rows(Strides const& s, int align, int64_t n, int64_t c, int64_t h, int64_t w, DType t) {
  int const v = 16 / size_of(t);
  auto stride = [&](int64_t size, int64_t step) {
    return size == 1 || (step > 0 && step % v == 0 && step * size_of(t) < int64_t(1) << 40);
  };
  constexpr int64_t most = int64_t(1) << 30;
  return n < most && c < most && h < most && w < most && w > 1 && s.w == 1 && align >= 16 && stride(n, s.n) &&
         stride(c, s.c) && stride(h, s.h);
}

constexpr bool planes_wgrad_supports(Row const& row, Problem const& given) {
  Problem const p = planes_problem(row, given);
  if (p.S == 1 || p.groups != 1 || p.stride_w != 1 || p.N == 0 || p.C == 0 || p.K == 0 || p.P() <= 0 || p.Q() <= 0)
    return false;
  if (!plane_rows(p.x, p.x_align, p.N, p.C, p.H, p.W, p.dtype)) return false;
  if (!plane_rows(p.y, p.y_align, p.N, p.K, p.P(), p.Q(), p.dtype)) return false;
  constexpr int64_t most = int64_t(1) << 28;
  if (p.pad_top > most || p.pad_left > most || (p.R - 1) * p.dilation_h > most || (p.S - 1) * p.dilation_w > most)
    return false;
  if (p.R > 1 && p.stride_h != 1) return false;
  if (planes_block(row.tile_m) == 32 &&
      (p.R == 1 || p.pad_top < 0 || p.pad_bottom < 0 || p.pad_left < 0 || p.pad_right < 0))
    return false;
  PlanesPieces const pieces(row, p);
  int64_t const before = 16 / size_of(p.dtype) - 1 + (min64(p.S, kPlanesTaps) - 1) * p.dilation_w;
  if ((before + wgrad_pixels(p.dtype)) * size_of(p.dtype) > kPlanesBox) return false;
  WgradTiles const t = pieces.tiles(row, p);
  // Of more tiles the parts would not fit the workspace.
  return t.tiles <= 128 && double(p.N) * double(p.P()) * double(pieces.chunks) < 1e9 && p.Q() > 0;
}

constexpr int64_t planes_wgrad_workspace_bytes(Row const& row, Problem const& given, int split_k) {
  Problem const p = planes_problem(row, given);
  return wgrad_shares(PlanesPieces(row, p).tiles(row, p), split_k).partial() * row.tile_m * row.tile_n * 4;
}

}  // namespace conv2d_ext
