// Axes that become channels, where memory allows; nothing is copied.
// - A filter covers an axis whole: the result has one pixel along it. A 7x7 filter over 7x7 images is a 1x1 one over 49
//   times the channels, a filter as wide as a line of text one of a single column.
// - In channels_last a filter steps by its own width: the columns that it meets at a time are a run of channels.
// And pixels that no filter meets are left out: 1x1 filters with strides, over planes, which are packed.
#pragma once

#include <initializer_list>

#include "problem.h"

namespace conv2d_ext {

inline constexpr int64_t kMostFolded = 1 << 24;  // channels; a row's own limit is 2^30

// Of x or of w: does an axis follow the channels (0), do they follow it (1), as one uniform step?
constexpr bool one_step(int64_t channels, int64_t c, int64_t extent, int64_t axis, bool axis_inside) {
  if (channels == 1 || extent == 1) return true;
  return axis_inside ? c == extent * axis : axis == channels * c;
}

// Does a filter step by its own width, over columns of less than two lines of 128 bytes that they do not fill, or with
// more phases of dgrad than the rows of wgmma take? (Few channels are patches: patch.h.)
constexpr bool folds_columns(Problem const& p) {
  bool const steps = p.S > 1 && p.stride_w == p.S && p.dilation_w == 1 && p.pad_left == 0 && p.pad_right == 0 &&
                     p.W % p.S == 0 && p.W > p.S;
  bool const runs = p.x.c == 1 && p.x.w == p.C && p.w.c == 1 && p.w.w == p.C;
  int64_t const bytes = p.C * size_of(p.dtype);
  return steps && runs && p.C > 4 && (p.R * p.S > 16 || (bytes < 256 && bytes % 128 != 0));
}

constexpr Problem folded(Op op, Problem p) {
  if (p.groups != 1 || p.C < 1) return p;
  bool const padded = p.pad_top != 0 || p.pad_bottom != 0 || p.pad_left != 0 || p.pad_right != 0;
  if (op != Op::dgrad && p.R == 1 && p.S == 1 && p.stride_w > 1 && !padded && p.C >= 16 && p.x.c != 1) {
    p.x.h *= p.stride_h, p.x.w *= p.stride_w;
    p.H = p.P(), p.W = p.Q();
    p.stride_h = p.stride_w = 1;
    if (p.H == 1) p.x.h = 0;
    if (p.W == 1) p.x.w = 0;
  }
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
  if (folds_columns(p)) {
    p.C *= p.S, p.W /= p.S;
    p.x.w = p.C, p.w.w = 0;
    p.S = p.stride_w = 1;
  }
  return p;
}

}  // namespace conv2d_ext
