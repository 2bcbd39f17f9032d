// pixels_few_wgrad.cuh: wgrad of 1x1 filters between few channels in float32, read in place. What its rows take and
// cost, and what the launcher shares with the planner.
#pragma once

#include <cstdint>

#include "row.h"

namespace conv2d_ext {

constexpr bool is_few_pixels(Row const& row) { return row.family == Family::pixels && row.tile_k == 8; }

inline constexpr int kFewWarps = 8, kFewRun = 16;  // kFewRun: pixels of a warp's turn

// Is a pixel's address a multiple of its number in the image (nchw: of contiguous planes), or of all images (nhwc)?
constexpr bool few_pixels_lie(bool nhwc, Strides const& s, int align, Problem const& p, int64_t channels) {
  auto whole = [](int64_t size, int64_t step) { return size == 1 || (step > 0 && step % 4 == 0 && step < 1 << 22); };
  if (align < 16 || p.H >= 1 << 15 || p.W >= 1 << 15) return false;
  if (!nhwc)
    return (p.W == 1 || s.w == 1) && (p.H == 1 || s.h == p.W) && p.H * p.W % 4 == 0 && whole(channels, s.c) &&
           (p.N == 1 || (s.n > 0 && s.n % 4 == 0));
  int64_t const pixel = p.W > 1 ? s.w : p.H > 1 ? s.h : s.n;
  return (channels == 1 || s.c == 1) && channels % 4 == 0 && whole(p.N * p.H * p.W, pixel) &&
         (p.H == 1 || s.h == p.W * pixel) && (p.N == 1 || s.n == p.H * p.W * pixel);
}

// A warp has all weights of a slab, rows of the tensor with fewer channels.
inline constexpr int kFewPixelsBlocks = 2;  // of an SM, for which there are registers
struct FewSums {
  bool swapped = false;  // rows are channels of y
  int64_t rows, columns, slabs, wide, units, parts;
  constexpr FewSums(Row const& row, Problem const& p) : swapped(p.K < p.C) {
    rows = swapped ? p.K : p.C, columns = swapped ? p.C : p.K;
    units = is_nhwc(row.variant) ? ceil_div(p.N * p.H * p.W, kFewRun) : p.N * ceil_div(p.H * p.W, kFewRun);
    slabs = ceil_div(columns, row.tile_n), wide = ceil_div(columns, slabs * 4) * 4;
    parts = max64(1, min64(kFewPixelsBlocks * 132 / slabs, units / kFewWarps));
  }
};

constexpr bool few_pixels_supports(Row const& row, Problem const& p) {
  if (p.dtype != DType::f32 || p.R != 1 || p.S != 1 || p.stride_h != 1 || p.stride_w != 1 || p.groups != 1)
    return false;
  if (p.pad_top != 0 || p.pad_bottom != 0 || p.pad_left != 0 || p.pad_right != 0) return false;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0) return false;
  bool const nhwc = is_nhwc(row.variant);
  if (!few_pixels_lie(nhwc, p.x, p.x_align, p, p.C) || !few_pixels_lie(nhwc, p.y, p.y_align, p, p.K)) return false;
  if (double(p.N) * double(ceil_div(p.H * p.W, kFewRun)) >= double(1 << 30)) return false;
  FewSums const s(row, p);
  return s.rows <= row.tile_m && s.slabs <= 3 && s.units >= kFewWarps;
}

constexpr int64_t few_pixels_workspace_bytes(Row const& row, Problem const& p) {
  return FewSums(row, p).parts * FewSums(row, p).slabs * row.tile_m * row.tile_n * 4;
}

// Memory. Fitted to times of the rows (docs/tuning.md).
constexpr Estimate few_pixels_estimate(Row const& row, Problem const& p) {
  FewSums const s(row, p);
  double const elements = double(p.N) * double(p.H) * double(p.W) * double(s.rows * s.slabs + s.columns);
  return {9000 + elements * 4 / (is_nhwc(row.variant) ? 3200 : 2400), 1};
}

}  // namespace conv2d_ext
