// What rows of pixels_gather.cuh and pixels_gather_wgrad.cuh cost. Apart from what the kernels include, so that a new
// constant compiles none of them.
#pragma once

#include "pixels_gather.h"

namespace conv2d_ext {

constexpr Estimate pixels_gather_estimate(Row const& row, Problem const& p, Device const& d) {
  if (row.op != Op::wgrad) return {1e9, 1};
  int64_t const steps = ceil_div(p.N * p.H * p.W, run_pixels(p.dtype)),
                tiles = PixelsWgrad(row.tile_m, row.tile_n, p).tiles;
  return {1e9, int(max64(least_parts(p), max64(1, min64(d.sm_count / tiles, ceil_div(steps, 4)))))};
}

}  // namespace conv2d_ext
