// pixels_gather.cuh, pixels_gather_wgrad.cuh: 1x1 filters over NCHW in place, planes of any size. What their rows take,
// and how they cut a problem.
#pragma once

#include <cstdint>

#include "pixels_wgrad.h"

namespace conv2d_ext {

constexpr bool is_pixels_gather(Row const& row) { return row.family == Family::pixels && row.variant == Variant::raw; }

// fprop's and dgrad's tiles: columns that lie in one image, as few as the rounds allow, or several whole images.
struct PixelsGather {
  int64_t together = 1, width = 0, parts = 1;  // images; columns of each; tiles of an image
  int64_t vectors = 0;                         // of 16 bytes that those columns may lie in
  int64_t tiles_m = 0, tiles = 0;

  constexpr PixelsGather(int tile_m, int tile_n, Op op, Problem const& p, int sm_count) {
    int64_t const plane = p.H * p.W, size = size_of(p.dtype), slots = sm_count * (tile_m * tile_n == 64 * 64 ? 2 : 1);
    auto vectors_of = [size](int64_t columns) { return ceil_div(columns * size + 16 - size, 16); };
    tiles_m = ceil_div(op == Op::fprop ? p.K : p.C, tile_m);
    if (plane <= tile_n) {
      width = plane, vectors = vectors_of(plane);
      together = max64(1, min64(p.N, min64(tile_n / plane, (tile_n * size / 16 + 1) / vectors)));
      tiles = ceil_div(p.N, together) * tiles_m;
      return;
    }
    parts = ceil_div(plane, tile_n);
    int64_t const rounds = ceil_div(p.N * parts * tiles_m, slots);
    parts = max64(parts, min64(ceil_div(plane, 32), rounds * slots / (p.N * tiles_m)));
    width = min64(tile_n, ceil_div(ceil_div(plane, parts), 8) * 8);
    parts = ceil_div(plane, width);
    vectors = vectors_of(width), tiles = p.N * parts * tiles_m;
  }
};

constexpr bool pixels_gather_supports(Row const& row, Problem const& p) {
  if ((p.dtype == DType::f32 && !p.allow_tf32) || !group_one_by_one(p)) return false;
  Problem const g = group_of(p);
  auto planes = [&](Strides const& s, int64_t channels) {
    return (p.W == 1 || s.w == 1) && (p.H == 1 || s.h == p.W) && (channels == 1 || s.c > 0) && (p.N == 1 || s.n > 0);
  };
  if (!planes(p.x, p.C) || !planes(p.y, p.K)) return false;
  if (double(p.N) * double(p.H) * double(p.W) > 1e9 || double(p.C) * double(p.K) > 1e9) return false;
  if (row.op == Op::wgrad)
    return double(pixels_wgrad_bytes(row, p, 1)) * double(least_parts(p)) <= double(kMaxWorkspaceBytes);
  if ((g.C > 1 && p.w.c != 1) || (g.K > 1 && p.w.n <= 0)) return false;
  // Filters are copied by words at least, but for TF32's dgrad.
  return p.dtype == DType::f32 || (g.C % 2 == 0 && p.w.n % 2 == 0 && p.w_align >= 4);
}

}  // namespace conv2d_ext
