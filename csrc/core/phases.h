// Depthwise layers with a dilation whose every so many rows and columns are layers of their own (column.h, toeplitz.h).
#pragma once

#include "problem.h"

namespace conv2d_ext {

// Phases begin at every row and column up to the dilation, which may be less aligned than the tensor.
constexpr void align_phases(Problem& p, bool rows, bool columns) {
  auto aligned = [&](int align, Strides const& s) constexpr {
    while ((rows && s.h * size_of(p.dtype) % align != 0) || (columns && s.w * size_of(p.dtype) % align != 0))
      align /= 2;
    return align;
  };
  p.x_align = aligned(p.x_align, p.x), p.y_align = aligned(p.y_align, p.y);
}

}  // namespace conv2d_ext
