// Does L2 give up first what depthwise wgrad in channels_last reads?
#pragma once

#include "row.h"

namespace conv2d_ext {

// What is read puts results of kernels before out of L2, which have to be written back. Not where slices share 64
// bytes, or where L2 holds little of all.
constexpr bool sums_read_once(Problem const& p) {
  int64_t const pixel = p.C * size_of(p.dtype);
  double const pixels = double(p.N) * double(p.H * p.W + p.P() * p.Q());
  return pixel == 64 || (pixel % 64 == 0 && pixels * double(pixel) < 80e6);
}

// The same of toeplitz_wgrad.cuh, which has lines of 128 bytes brought and slices of `channels`.
constexpr bool pieces_read_once(Problem const& p, int channels) {
  int64_t const pixel = p.C * size_of(p.dtype);
  double const bytes = double(p.N) * double(p.H * p.W + p.P() * p.Q()) * double(pixel);
  return pixel <= 64 || bytes < (p.C <= 2 * channels ? 160e6 : pixel % 128 == 0 ? 110e6 : 80e6);
}

}  // namespace conv2d_ext
