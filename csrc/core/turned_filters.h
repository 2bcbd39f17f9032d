// The filters of dgrad in TF32, turned for the rows that want the sum along them: for each channel and tap the filters
// in whole lines, zeros behind the last. A launch that packs y makes them too, else tma_tf32.cuh does.
#pragma once

#include "tma_tf32.h"

namespace conv2d_ext {

constexpr bool wants_turned_filters(Row const& row) {
  return row.family == Family::tma && row.op == Op::dgrad && row.dtype == DType::f32 && !tf32_is_raw(row.variant) &&
         (row.variant == Variant::im2col || is_halo(row.variant));
}

constexpr Strides turned_strides(Problem const& p) {
  int64_t const line = ceil_div(p.K_per_group(), kTf32Line) * kTf32Line;
  return {1, p.R * p.S * line, p.S * line, line};
}

constexpr bool has_turned_filters(Problem const& p) {
  Strides const w = turned_strides(p);
  return p.w_align >= 16 && p.w.n == w.n && p.w.c == w.c && p.w.h == w.h && p.w.w == w.w;
}

}  // namespace conv2d_ext
