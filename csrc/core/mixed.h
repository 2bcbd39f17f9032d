// Depthwise layers one of whose tensors is in channels_last, and the other is not: rows of channels_last run them on a
// packed copy of the other. What the copy engine cannot take stays with depthwise_lines.cuh, in place.
#pragma once

#include "lines.h"

namespace conv2d_ext {

constexpr bool is_mixed(Row const& row, Problem const& p) {
  bool const depthwise = row.family == Family::depthwise || row.family == Family::column ||
                         row.family == Family::toeplitz || row.family == Family::strip || row.family == Family::band;
  int64_t const v = 16 / size_of(p.dtype);
  return depthwise && is_nhwc(row.variant) && !is_lines(row) && p.groups == p.C && p.C % v == 0 && p.K % v == 0 &&
         p.dtype != DType::f64 && (p.x.c == 1) != (p.y.c == 1);
}

}  // namespace conv2d_ext
