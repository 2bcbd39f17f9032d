// pixels_halves.cuh: 1x1 filters over NCHW in place, planes of 196 pixels (14x14), 16-bit types. What its rows take.
#pragma once

#include <cstdint>

#include "pixels_gather.h"

namespace conv2d_ext {

inline constexpr int kHalvesPlane = 196;  // pixels: 24.5 vectors

constexpr bool is_pixel_halves(Row const& row) {
  return is_pixels_gather(row) && row.op != Op::wgrad && row.tile_n == kHalvesPlane;
}

// fprop's filters are turned.
constexpr int64_t pixel_halves_workspace_bytes(Row const& row, Problem const& p) {
  return row.op == Op::fprop ? p.C * p.K * size_of(p.dtype) : 0;
}

constexpr bool pixel_halves_supports(Row const& row, Problem const& p) {
  if (!one_by_one(p) || p.H * p.W != kHalvesPlane || p.C % 8 != 0 || p.K % 8 != 0) return false;
  auto planes = [&](Strides const& s, int align) {
    return align >= 16 && s.w == 1 && (p.H == 1 || s.h == p.W) && s.c == kHalvesPlane &&
           (p.N == 1 || (s.n > 0 && s.n % 8 == 0 && s.n < int64_t(1) << 38));
  };
  if (!planes(p.x, p.x_align) || !planes(p.y, p.y_align)) return false;
  if (p.w.c != 1 || p.w.n <= 0 || !channel_vectors(p.w, p.w_align, p.C, 8, p.dtype)) return false;
  return double(p.N) * double(ceil_div(max64(p.C, p.K), 64)) < double(1 << 30) && double(p.C) * double(p.K) < 1e9 &&
         pixel_halves_workspace_bytes(row, p) <= kMaxWorkspaceBytes;
}

}  // namespace conv2d_ext
