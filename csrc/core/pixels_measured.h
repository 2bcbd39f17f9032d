// The estimates of pixels' rows, which are of 1x1 layers, with what was measured beside other rows.
#pragma once

#include "few_depth.h"
#include "matrix.h"
#include "one_by_one.h"
#include "pixel_lines.h"
#include "pixels.h"
#include "pixels_any.h"
#include "pixels_few.h"
#include "pixels_gather.h"
#include "pixels_gather_estimate.h"
#include "pixels_halves.h"
#include "pixels_pairs.h"
#include "pixels_phases.h"
#include "pixels_runs.h"
#include "pixels_strict.h"
#include "pixels_wgrad.h"
#include "pixels_windows.h"
#include "small_images.h"

namespace conv2d_ext {

// 1x1 layers by pixels_direct.cuh in TF32 that take long, and by pixels_windows.cuh over small planes, as measured
// (32x1440x7x7 to 128 W 36.3 us, estimated at 19.5; 128x576x7x7 to 128 D 25.6, 18.4).
constexpr Estimate pixels_as_measured(Row const& row, Problem const& p, Estimate e) {
  if (is_direct_pixels(row) && p.dtype == DType::f32) {
    if (row.op == Op::wgrad && e.ns > (p.x.c == 1 ? 6100 : 7000)) e.ns *= p.x.c == 1 && row.tile_m == 32 ? 1.3 : 1.25;
    // Rows off vectors are copied one by one: 8x832x7x7 to 192 F 15.4 us, estimated at 9.7.
    bool const odd = p.x.c != 1 && p.H * p.W % 4 != 0;
    if (row.op == Op::fprop && p.x.c != 1 && e.ns > (odd ? 8000 : 12000)) e.ns *= 1.3;
    if (row.op == Op::dgrad && (odd || p.x.c == 1) && e.ns > 7000) e.ns *= 1.3;
    // Long sums: 8x192x7x7 to 960 D 12.5 us, estimated at 6.3; over NCHW 2x512x5x5 to 2048 17.1, 11.1.
    if (row.op == Op::dgrad && p.K >= (p.x.c == 1 ? 384 : 1024)) e.ns *= p.x.c == 1 ? 1.45 : 1.12;
  }
  // 8x512x14x14 to 128 W 14.0 us, estimated at 11.8 as 64x64 (11.2).
  if (is_direct_pixels(row) && size_of(p.dtype) == 2 && row.op == Op::wgrad && p.x.c != 1 && e.ns > 9000 &&
      (p.N * p.H * p.W > 700 || p.H * p.W % 2 != 0))
    e.ns *= 1.07;
  if (is_pixels_windows(row) && p.H * p.W <= 64) e.ns *= 1.2;
  return e;
}

constexpr Estimate pixel_rows_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  if (is_few_depth(row)) return few_depth_estimate(op, p, d);
  if (is_small_images(row)) return small_images_estimate(p, d);
  if (is_few_pixels(row)) return few_pixels_estimate(row, p);
  if (is_strict_pixels(row)) return strict_pixels_estimate(row, p, d);
  if (is_pixel_runs(row)) return pixel_runs_estimate(row, p, d);
  if (is_matrix_planes(row)) return matrix_planes_estimate(row, p);
  if (is_pixel_halves(row)) return pixel_halves_estimate(row, p, d);
  if (is_pixel_pairs(row)) return pixel_pairs_estimate(row, p, d);
  if (is_pixels_windows(row)) return pixels_as_measured(row, p, pixels_windows_estimate(row, p, d));
  if (is_pixels_gather(row)) return pixels_gather_estimate(row, p, d);
  if (is_pixels_wgrad(row)) {
    // As measured: groups of few channels (32x64x128x128 to 32 in two groups 34.3 us, estimated at 56.1).
    Estimate e = pixels_wgrad_estimate(row, p, d);
    if (p.groups > 1 && min64(p.C_per_group(), p.K_per_group()) <= 32) e.ns *= 0.75;
    return e;
  }
  if (is_pixel_flow(row)) return pixel_flow_estimate(op, p);
  if (is_pixel_phases(row)) return pixel_phases_estimate(row, op, p, d);
  if (is_direct_pixels(row)) return pixels_as_measured(row, p, direct_pixels_estimate(row, op, p));
  Estimate e = is_any_pixels(row)     ? any_pixels_estimate(row, op, p)
               : is_nhwc(row.variant) ? pixel_lines_estimate(row, p, d)
                                      : pixels_estimate(row, op, p, d);
  e.ns *= one_by_one_as_measured(row, p);
  // As measured: small layers over planes (TF32 1x64x128x128 to 32 D 9.2 us, estimated at 7.7). No jump at the end:
  // that would put rows of nearly the same time in another order.
  if (!is_any_pixels(row) && !is_nhwc(row.variant) && e.ns < 11200) e.ns = e.ns < 10000 ? 1.12 * e.ns : 11200;
  // As measured: 16-bit wgrad over planes (8x1392x14x14 to 192 20.9 us, estimated at 15.6).
  if (is_any_pixels(row) && p.x.c != 1 && p.dtype != DType::f32 && op == Op::wgrad && e.ns > 12800) e.ns *= 1.15;
  // As measured: few channels of many pixels (64x64x56x56 to 128 38.7 us, estimated at 26.7).
  if (is_nhwc(row.variant) && op == Op::wgrad && p.dtype != DType::f32 && row.tile_m == 128 && min64(p.C, p.K) <= 64 &&
      e.ns > 18000)
    e.ns *= 1.12;
  // As measured: one to four filters of many channels (8x256x100x152 to 3 32.4 us, estimated at 26.8).
  if (is_nhwc(row.variant) && op == Op::fprop && p.K <= 4 && p.C >= 128 && e.ns > 14000) e.ns *= 1.15;
  // As measured: long sums for filters that are no vectors (8x512x65x65 to 21: 29.2 us, packed 24.9).
  if (is_nhwc(row.variant) && op == Op::fprop && p.C >= 512 && p.K % 8 != 0) e.ns *= 1.4;
  return e;
}

}  // namespace conv2d_ext
