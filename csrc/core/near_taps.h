// Taps at the ends of a filter that meet padding alone, as those of a 3x3 filter do whose dilation is beyond the image:
// igemm leaves them out.
#pragma once

#include "problem.h"

namespace conv2d_ext {

// Of an image axis: the taps from the first to the last that meet a pixel; all if none does.
struct NearTaps {
  int64_t first, count;
};
constexpr NearTaps near_taps(int64_t extent, int64_t pixels, int64_t taps, int64_t stride, int64_t pad,
                             int64_t dilation) {
  auto meets = [&](int64_t tap) {
    int64_t const before = pad - tap * dilation, pixel = before > 0 ? ceil_div(before, stride) : 0;
    return pixel < pixels && pixel * stride - before < extent;
  };
  int64_t first = 0, end = taps;
  while (first < end && !meets(first)) ++first;
  while (first < end && !meets(end - 1)) --end;
  return first < end ? NearTaps{first, end - first} : NearTaps{0, taps};
}

// The problem without those taps, and where its filters begin, in elements from the first.
struct Near {
  Problem problem;
  int64_t w_offset;
};
constexpr Near without_far_taps(Problem p) {
  NearTaps const h = near_taps(p.H, p.P(), p.R, p.stride_h, p.pad_top, p.dilation_h),
                 w = near_taps(p.W, p.Q(), p.S, p.stride_w, p.pad_left, p.dilation_w);
  p.pad_top -= h.first * p.dilation_h, p.pad_bottom -= (p.R - h.first - h.count) * p.dilation_h;
  p.pad_left -= w.first * p.dilation_w, p.pad_right -= (p.S - w.first - w.count) * p.dilation_w;
  p.R = h.count, p.S = w.count;
  return {p, h.first * p.w.h + w.first * p.w.w};
}

}  // namespace conv2d_ext
