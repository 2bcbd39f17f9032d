// Axes that a filter covers whole: the result has one pixel along such an axis, and where memory allows it is the same
// product with the axis as more channels. A 7x7 filter over 7x7 images is a 1x1 one over 49 times the channels, a
// filter as wide as a line of text one of a single column. Nothing is copied.
#pragma once

#include "problem.h"

namespace conv2d_ext {

inline constexpr int64_t kMostFolded = 1 << 24;  // channels; a row's own limit is 2^30

// Of x or of w: does an axis follow the channels (0), do they follow it (1), as one uniform step?
constexpr bool one_step(int64_t channels, int64_t c, int64_t extent, int64_t axis, bool axis_inside) {
  if (channels == 1 || extent == 1) return true;
  return axis_inside ? c == extent * axis : axis == channels * c;
}

constexpr Problem folded(Problem p) {
  if (p.groups != 1 || p.C < 1) return p;
  auto fold = [&](int64_t& extent, int64_t& taps, int64_t& stride, int64_t& dilation, int64_t pads, int64_t& x_step,
                  int64_t& w_step) {
    if (taps == 1 || taps != extent || pads != 0 || p.C * extent > kMostFolded) return false;
    for (bool inside : {false, true}) {
      if (!one_step(p.C, p.x.c, extent, x_step, inside) || !one_step(p.C, p.w.c, extent, w_step, inside)) continue;
      if (inside || p.C == 1) p.x.c = x_step, p.w.c = w_step;
      p.C *= extent;
      extent = taps = stride = dilation = 1;
      x_step = w_step = 0;
      return true;
    }
    return false;
  };
  auto rows = [&] { return fold(p.H, p.R, p.stride_h, p.dilation_h, p.pad_top + p.pad_bottom, p.x.h, p.w.h); };
  auto columns = [&] { return fold(p.W, p.S, p.stride_w, p.dilation_w, p.pad_left + p.pad_right, p.x.w, p.w.w); };
  if (columns())
    rows();
  else if (rows())
    columns();
  return p;
}

}  // namespace conv2d_ext
