// pixels_pairs.cuh: 1x1 filters over NCHW in place, small planes of any size, 16 bits and TF32. What its rows take, and
// how they cut a problem.
#pragma once

#include <cstdint>

#include "pixels_gather.h"

namespace conv2d_ext {

constexpr bool is_pixel_pairs(Row const& row) { return row.family == Family::pixels && row.variant == Variant::narrow; }

// TF32's dgrad turns filters.
constexpr int64_t pixel_pairs_workspace_bytes(Row const& row, Problem const& p) {
  return row.op == Op::dgrad && p.dtype == DType::f32 ? p.C_per_group() * p.K * 4 : 0;
}

inline constexpr int kPairsStages = 8;  // at most

// Tiles of as many whole images as tile_m rows hold. An image's channels are lines in memory, of 128 bytes or less.
struct PixelsPairs {
  int64_t pairs = 1, together = 0, tiles_n = 1, tiles = 0;
  int line = 128, lines = 0;  // bytes; lines of a step's channels, one box of the copy engine
  int stage_bytes = 0, stages = 0, shared_bytes = 0;

  constexpr PixelsPairs(int tile_m, int tile_n, Op op, Problem const& p) {
    int64_t const plane = p.H * p.W;
    pairs = ceil_div(plane, 2);
    if (pairs > tile_m / 2) return;
    while (line > 16 && pixels_depth(op, p) * plane * size_of(p.dtype) % line != 0) line /= 2;
    lines = int(plane * (128 / line));
    if (lines > 256) return;
    auto bytes = [&](int64_t images) { return (tile_n * 128 + images * 128 * plane + 1023) / 1024 * 1024; };
    together = min64(p.N, tile_m / 2 / pairs);
    while (together > 1 && 3 * bytes(together) + together * tile_n * plane * size_of(p.dtype) > 225 * 1024) --together;
    int64_t const staging = together * tile_n * plane * size_of(p.dtype);
    stage_bytes = int(bytes(together)), stages = int(min64(kPairsStages, (225 * 1024 - staging) / stage_bytes));
    shared_bytes = int(1024 + stages * stage_bytes + staging);
    tiles_n = ceil_div(op == Op::fprop ? p.K : p.C, tile_n);
    tiles = ceil_div(p.N, together) * tiles_n;
  }
};

constexpr bool pixel_pairs_supports(Row const& row, Problem const& p) {
  if (!group_one_by_one(p) || (p.dtype == DType::f32 && !p.allow_tf32)) return false;
  Problem const g = group_of(p);
  if (g.C % 8 != 0 || g.K % 8 != 0 || p.H * p.W > row.tile_m || pixels_depth(row.op, g) % 16 != 0) return false;
  auto planes = [&](Strides const& s, int align) {
    return align >= 16 && (p.W == 1 || s.w == 1) && (p.H == 1 || s.h == p.W) && s.c == p.H * p.W &&
           (p.N == 1 || (s.n > 0 && s.n % 8 == 0));
  };
  if (!planes(p.x, p.x_align) || !planes(p.y, p.y_align)) return false;
  if (p.w.c != 1 || p.w.n <= 0 || !channel_vectors(p.w, p.w_align, g.C, 16 / size_of(p.dtype), p.dtype)) return false;
  PixelsPairs const cut(row.tile_m, row.tile_n, row.op, g);
  return cut.stages >= 2 && double(p.N) * double(cut.tiles_n) < double(1 << 30) && double(p.C) * double(p.K) < 1e9 &&
         pixel_pairs_workspace_bytes(row, p) <= kMaxWorkspaceBytes;
}

}  // namespace conv2d_ext
