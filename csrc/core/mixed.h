// Depthwise layers one of whose tensors is in channels_last, and the other is not: rows of channels_last run them on a
// packed copy of the other. What the copy engine cannot take stays with depthwise_lines.cuh, in place. wgrad of band.h,
// and filters of eight to 15 taps of stream.h, in 16-bit types run on copies of both as planes, too: rows of
// channels_last take up to four times as long. And where planes have nothing as good, rows of channels_last run on
// copies of both tensors.
#pragma once

#include "lines.h"

namespace conv2d_ext {

constexpr bool runs_over_planes(Row const& row, Problem const& p) {
  bool const band = row.family == Family::band && row.op == Op::wgrad && row.variant == Variant::nchw;
  bool const stream = row.family == Family::stream && row.tile_m >= 9;
  return (band || stream) && size_of(p.dtype) == 2 && p.groups == p.C && p.K == p.C && p.C > 1 && p.C % 8 == 0 &&
         p.x_align >= 16 && p.y_align >= 16 && p.x == channels_last_strides(p.C, p.H, p.W) &&
         p.y == channels_last_strides(p.K, p.P(), p.Q());
}

// Of rows of channels_last: layers over planes that they compute so much faster that copies of both tensors pay, as
// timed: dilations, several filters a channel, and large filters of float32 or with a stride.
constexpr bool replaces_planes(Row const& row, Problem const& p) {
  bool const f32 = row.dtype == DType::f32, fprop = row.op == Op::fprop, sums = row.op == Op::wgrad;
  bool const strided = p.stride_h > 1 || p.stride_w > 1, apart = p.dilation_h > 1 || p.dilation_w > 1;
  if (p.x.c == 1 || p.y.c == 1) return false;
  switch (row.family) {
    case Family::column:
      if (strided) return p.K == 2 * p.C && (f32 || !fprop);
      if (p.K == 2 * p.C) return f32 && !fprop && (!sums || row.tile_m == 7);
      return apart ? row.tile_m > 3 || row.op == Op::dgrad : f32 && (row.tile_m > 7 || sums);
    case Family::toeplitz:
      return (apart || (p.K > p.C && !fprop)) && p.K >= 32;
    case Family::band:
      return !f32 && (fprop || (!sums && !strided));
    case Family::depthwise:  // walks
      return row.tile_m == 7 && p.K > p.C && (f32 || sums);
    default:
      return false;
  }
}

constexpr bool is_mixed(Row const& row, Problem const& p) {
  if (runs_over_planes(row, p)) return true;
  bool const depthwise = row.family == Family::depthwise || row.family == Family::column ||
                         row.family == Family::toeplitz || row.family == Family::strip || row.family == Family::band;
  int64_t const v = 16 / size_of(p.dtype);
  return depthwise && is_nhwc(row.variant) && !is_lines(row) && p.groups == p.C && p.C % v == 0 && p.K % v == 0 &&
         p.dtype != DType::f64 && ((p.x.c == 1) != (p.y.c == 1) || replaces_planes(row, p));
}

}  // namespace conv2d_ext
