// grouped_few_wgrad.cuh: wgrad of groups over few pixels, channels_last, 16-bit types and TF32.
#pragma once

#include <cstdint>

#include "row.h"

namespace conv2d_ext {

constexpr int kFewPixelWarps = 6;     // of a block
constexpr int kFewPixelTaps = 3;      // of a row of the filter, of a block
constexpr int kFewPixelFilters = 16;  // of a block
constexpr int kFewPixelRun = 8;       // pixels of a row; a step has two runs

constexpr bool is_few_pixel_sums(Row const& row) {
  return row.family == Family::grouped && row.variant == Variant::nhwc && row.op == Op::wgrad && row.tile_m == 32;
}

struct FewPixels {
  int channels = 0;                 // of a block: 16 or 32; 0: not supported
  int64_t together = 1, units = 0;  // groups as one, and how many of those
  // Of a unit, its blocks and columns of taps; runs of a row.
  int64_t tiles_k = 1, tiles_c = 1, columns = 1, in_row = 1;
  int64_t steps = 0, blocks = 0;
  double ns = 0;
};

constexpr FewPixels few_pixels(Problem const& p, Device const& d) {
  FewPixels t;
  int64_t const C = p.C_per_group(), K = p.K_per_group(), P = p.P(), Q = p.Q();
  if (p.dtype == DType::f64 || (p.dtype == DType::f32 && !p.allow_tf32)) return t;
  if (p.groups < 2 || C < 8 || K < 8 || p.N < 1 || P < 1 || Q < 1 || p.H < 1 || p.W < 1 || p.R < 1 || p.S < 1) return t;
  int const channels = C > 16 ? 32 : 16, v = channels / 8;
  if (!channel_vectors(p.x, p.x_align, C, v, p.dtype) || !channel_vectors(p.y, p.y_align, K, 2, p.dtype)) return t;
  constexpr double most = double(1 << 30);
  auto reach = [](Strides const& s, int64_t n, int64_t h, int64_t w) {
    return double(n) * double(s.n) + double(h) * double(s.h) + double(w) * double(s.w);
  };
  int64_t const height = p.H + p.R * p.dilation_h + p.pad_top + p.pad_bottom + p.stride_h;
  int64_t const width = p.W + p.S * p.dilation_w + p.pad_left + p.pad_right + p.stride_w * kFewPixelRun;
  if (reach(p.x, p.N, height, width) >= most || reach(p.y, p.N, P, Q + kFewPixelRun) >= most) return t;
  t.together = C <= 8 && K <= 8 ? 2 : 1, t.units = ceil_div(p.groups, t.together);
  t.tiles_k = ceil_div(K * t.together, kFewPixelFilters), t.tiles_c = ceil_div(C * t.together, channels);
  t.columns = ceil_div(p.S, kFewPixelTaps), t.in_row = ceil_div(Q, kFewPixelRun);
  t.steps = ceil_div(p.N * P * t.in_row, 2), t.blocks = t.units * t.tiles_k * t.tiles_c * t.columns * p.R;
  if (t.steps > 256 || t.blocks > int64_t(1) << 20) return t;
  t.channels = channels;
  // As measured (2026-11-30): a warp's steps follow each other; from some two blocks an SM on, so do blocks.
  double const turns = double(ceil_div(t.steps, kFewPixelWarps)), blocks = double(t.blocks) / d.sm_count;
  double const turn = channels == 16 ? 340 + 310 * blocks : 500 + 220 * blocks;
  t.ns = (channels == 16 ? 6450 : 7300) + turns * turn * (p.dtype == DType::f32 ? 1.1 : 1.0) +
         (blocks > 2 ? (blocks - 2) * 1500 : 0);
  return t;
}

}  // namespace conv2d_ext
