// tma_planes_wgrad.cuh: what its rows take and cost, and how they cut a problem.
#pragma once

#include <cstdint>

#include "tma.h"

namespace conv2d_ext {

constexpr bool is_planes_wgrad(Row const& row) {
  return row.family == Family::tma && row.op == Op::wgrad && row.variant == Variant::nchw;
}

// A tile has kPlanesBlocks blocks of 64 columns: rows of the filter at 64 channels, or, if it has but one, channels.
// The rows of a tile are kPlanesBlocks taps of a row of the filter at 64 filters. A step is a line of 128 bytes of a
// row of x; a piece, of kPlanesRows of y at most, one below the other, `step` rows apart. WgradTiles' steps are pieces.
inline constexpr int kPlanesBlocks = 3;
inline constexpr int kPlanesRows = 8;
struct PlanesPieces {
  int64_t s_runs = 0, r_runs = 0;  // taps of a row, rounded up; tiles along the rows of the filter, 0: one row
  int64_t width = 0, runs = 0;     // columns of a tile; tiles along the columns
  int64_t chunks = 0;              // of a row
  int64_t step = 1, phases = 1;    // rows of y that lie `step` apart
  int64_t rows = 0, parts = 0;     // of a piece; pieces of such rows of an image

  constexpr PlanesPieces(Problem const& p) {
    s_runs = ceil_div(p.S, kPlanesBlocks) * kPlanesBlocks;
    if (p.R > 1) {
      width = 64 * kPlanesBlocks, r_runs = ceil_div(p.R, kPlanesBlocks), runs = r_runs * ceil_div(p.C, 64);
      step = p.dilation_h, phases = min64(p.dilation_h, p.P());
    } else {
      runs = ceil_div(p.C, 64 * kPlanesBlocks);
      width = ceil_div(ceil_div(p.C, runs), 64) * 64;
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
    t.tiles = ceil_div(s_runs, kPlanesBlocks) * runs * ceil_div(p.K, row.tile_n);
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

constexpr bool planes_wgrad_supports(Row const& row, Problem const& p) {
  if (p.S == 1 || p.groups != 1 || p.stride_w != 1 || p.N == 0 || p.C == 0 || p.K == 0 || p.P() <= 0 || p.Q() <= 0)
    return false;
  if (!plane_rows(p.x, p.x_align, p.N, p.C, p.H, p.W, p.dtype)) return false;
  if (!plane_rows(p.y, p.y_align, p.N, p.K, p.P(), p.Q(), p.dtype)) return false;
  constexpr int64_t most = int64_t(1) << 28;
  if (p.pad_top > most || p.pad_left > most || (p.R - 1) * p.dilation_h > most || (p.S - 1) * p.dilation_w > most)
    return false;
  PlanesPieces const pieces(p);
  if (p.R > 1 && p.stride_h != 1) return false;
  int64_t const before = 16 / size_of(p.dtype) - 1 + (min64(p.S, kPlanesBlocks) - 1) * p.dilation_w;
  if ((before + wgrad_pixels(p.dtype)) * size_of(p.dtype) > kPlanesBox) return false;
  WgradTiles const t = pieces.tiles(row, p);
  // Of more tiles the parts would not fit the workspace.
  return t.tiles <= 128 && double(p.N) * double(p.P()) * double(pieces.chunks) < 1e9 && p.Q() > 0;
}

constexpr int64_t planes_wgrad_workspace_bytes(Row const& row, Problem const& p, int split_k) {
  return wgrad_shares(PlanesPieces(p).tiles(row, p), split_k).partial() * row.tile_m * row.tile_n * 4;
}

}  // namespace conv2d_ext
