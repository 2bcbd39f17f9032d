// pixels_windows.cuh: 1x1 filters over NCHW in place, planes of any size, 16-bit types. What its rows take, how they
// cut a problem, and what they cost.
#pragma once

#include <cstdint>

#include "pixels_gather.h"

namespace conv2d_ext {

constexpr bool is_pixels_windows(Row const& row) { return is_pixels_gather(row) && row.tile_n == 248; }

inline constexpr int kWindowsColumns = 248;  // of a tile: 31 vectors

// Tiles: columns that lie in one image, as few as the rounds allow, or several whole images.
struct PixelsWindows {
  int64_t together = 1, width = 0, reach = 0, parts = 1;  // images; columns from a tile to the next; worked out
  int64_t vectors = 32;                                   // that the columns of an image may lie in
  int64_t tiles_m = 0, tiles = 0;

  constexpr PixelsWindows(int tile_m, Op op, Problem const& p, int sm_count) {
    int64_t const plane = p.H * p.W, over = 16;
    tiles_m = ceil_div(op == Op::fprop ? p.K : p.C, tile_m);
    if (plane <= kWindowsColumns) {
      width = reach = plane;
      int64_t const its = ceil_div(plane + 7, 8);
      together = max64(1, min64(p.N, 31 / its));
      if (together > 1) vectors = its;
      tiles = ceil_div(p.N, together) * tiles_m;
      return;
    }
    int64_t const most = kWindowsColumns - over;
    parts = ceil_div(plane, most);
    int64_t const rounds = ceil_div(p.N * parts * tiles_m, sm_count);
    parts = max64(parts, min64(ceil_div(plane, 32), rounds * sm_count / (p.N * tiles_m)));
    width = min64(most, ceil_div(ceil_div(plane, parts), 8) * 8);
    parts = ceil_div(plane, width);
    reach = width + over, tiles = p.N * parts * tiles_m;
  }
};

}  // namespace conv2d_ext
