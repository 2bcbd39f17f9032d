// What tma_lean.cuh takes beyond the estimate of lean.h, by which the launcher chooses splits. Apart from what kernels
// include, so that a new constant compiles none.
#pragma once

#include "lean.h"

namespace conv2d_ext {

// fprop and dgrad in TF32 in channels_last, lines that begin off the 32 bytes that L2 delivers at a time, which a block
// waits for: of fprop pixels of an odd number of fours of channels, and filters of several taps with them (1x4x32x32 to
// 184 3x5 16.0 us, estimated at 5.9; 150x12x10x76 to 128 1x1 s2 23.7, 15.0); of dgrad, whose filters have lines of its
// results' channels, up to four of these (8x3x32x32 to 64 3x3 21.4, 9.4; 2x3x92x92 to 128 1x7 46.7, 28.0).
constexpr double lean_beyond_ns(Row const& row, Problem const& p, int split) {
  if (row.op == Op::wgrad || p.dtype != DType::f32 || lean_takes_planes(row, p)) return 0;
  bool const taps = p.R * p.S > 1, backward = row.op == Op::dgrad;
  double line_ns = 0;
  if (backward)
    line_ns = taps && p.C <= 4 ? 4 : 0;
  else if (p.C % 8 == 4)
    line_ns = taps ? (p.C == 4 ? 4 : 2) : p.stride_h * p.stride_w > 1 ? 1 : 0;
  int64_t const steps = ceil_div(ceil_div(backward ? p.K : p.C, 32) * p.R * p.S, split);
  double const each = double(ceil_div(lean_tiles(row, p) * split, 132)),
               resident = row.tile_m * row.tile_n <= 64 * 64 ? 3 : 2;
  return double(steps) * double(row.tile_m + row.tile_n) * line_ns * (each > resident ? each / resident : 1);
}

}  // namespace conv2d_ext
