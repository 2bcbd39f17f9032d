// Pixels as rows of a matrix that the copy engine takes.
#pragma once

#include <cstdint>

#include "row.h"

namespace conv2d_ext {

// From pixel to pixel, where all pixels are equally far apart; 0: they are not.
constexpr int64_t matrix_stride(Strides const& s, Problem const& p) {
  int64_t const step = p.W > 1 ? s.w : p.H > 1 ? s.h : s.n;
  return (p.H > 1 && s.h != p.W * step) || (p.N > 1 && s.n != p.H * p.W * step) ? 0 : step;
}

// wgrad of channels that are no vectors, where all pixels follow each other: so many pixels are a row of a matrix that
// the copy engine takes. A part of the sum has one pixel of each row, whose channels it copies from the vector on in
// which they begin: up to 7 (TF32: 3) rows and columns of its tiles are another pixel's channels, for nothing. 1:
// channels are vectors; 0: it cannot be.
constexpr int matrix_period(Problem const& p) {
  int const v = 16 / size_of(p.dtype);
  int period = 1;
  while (p.C * period % v != 0 || p.K * period % v != 0) period *= 2;
  if (period == 1) return 1;
  bool const dense = (p.C == 1 || p.x.c == 1) && (p.K == 1 || p.y.c == 1) && matrix_stride(p.x, p) == p.C &&
                     matrix_stride(p.y, p) == p.K && p.x_align >= 16 && p.y_align >= 16;
  return dense && p.N * p.H * p.W % period == 0 ? period : 0;
}
// Channels, and those of other pixels before them.
constexpr int64_t matrix_shifted(int64_t channels, DType t) {
  int const v = 16 / size_of(t);
  int step = v;  // that all pixels' first channels are multiples of
  while (channels % step != 0) step /= 2;
  return channels + v - step;
}

}  // namespace conv2d_ext
