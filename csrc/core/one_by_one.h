// 1x1 layers of 16-bit types with a stride of 1, dense: what the rows' estimates are off by beside each other. Fitted
// to 4,166 problems of such layers, those of lean in NCHW to 312 more (docs/tuning/one-by-one.md).
#pragma once

#include "problem.h"
#include "row.h"

namespace conv2d_ext {

struct OneByOne {
  Op op;
  Variant variant;
  int tile_m, tile_n;
  bool nchw;            // of layouts, if the row has both in place
  double whole, ended;  // where channels fill lines of 64, and where some end within one
};
inline constexpr OneByOne kOneByOne[] = {
    {Op::fprop, Variant::im2col, 144, 192, false, 1.05, 1.05},
    {Op::fprop, Variant::im2col, 192, 128, false, 1.05, 1.05},
    {Op::fprop, Variant::lean, 64, 64, true, 1.1, 1.1},
    {Op::fprop, Variant::lean, 64, 128, true, 1.15, 1.15},
    {Op::fprop, Variant::nhwc, 64, 32, false, 0.9, 0.9},
    {Op::dgrad, Variant::im2col, 128, 256, false, 1.15, 1.15},
    {Op::dgrad, Variant::lean, 64, 128, true, 1.13, 1.13},
    {Op::wgrad, Variant::im2col, 128, 128, false, 0.95, 0.95},
    {Op::wgrad, Variant::im2col, 256, 160, false, 0.95, 0.95},
    {Op::wgrad, Variant::im2col, 256, 64, false, 0.95, 0.95},
    {Op::wgrad, Variant::im2col, 64, 64, false, 0.95, 0.95},
    {Op::wgrad, Variant::nhwc, 64, 64, false, 0.95, 0.95},
    {Op::wgrad, Variant::lean, 64, 128, false, 1.05, 1.1},
    {Op::wgrad, Variant::lean, 64, 64, false, 0.97, 1.07},
};

// Sums over many pixels for few weights in tma_wgrad.cuh: memory gives less than its estimate has it, least to tiles of
// 64x64, which have half of an SM's shared memory each.
constexpr double few_weights_as_measured(Row const& row, Problem const& p) {
  if (row.op != Op::wgrad || row.variant != Variant::im2col) return 1;
  if (p.C > 1 && p.x.c != 1 && p.H * p.W % 2 != 0) return 1;  // odd planes are packed in less than their estimate
  int64_t const tiles = ceil_div(p.K, 64) * ceil_div(p.C, 64);
  if (row.tile_m == 64) return tiles > 132 ? 1 : p.C % 64 + p.K % 64 == 0 ? 1.15 : 1.3;
  int64_t const tile = int64_t(row.tile_m) * row.tile_n;
  if (p.x.c == 1 && p.K * p.C <= 2 * tile && p.N * p.H * p.W < 200000) return 1.19;
  return p.K * p.C <= 8 * tile ? 1.08 : 1;
}

// Pixels that begin within sectors of memory take the longer the more tiles read them: 8x728x19x19 to 728 by
// 64x128 23.5 us, estimated at 16.8.
constexpr bool odd_pixels(Problem const& p) { return min64(p.C, p.K) >= 256 && (p.C % 16 != 0 || p.K % 16 != 0); }

// wgrad's small tiles. 64x64 are as slow as they were taken to be before (kOneByOne) where channels fill no line and
// filters are many, and over many pixels: 16x24x35x35 to 2048 43.6 us (36.7 by 128x64), 8x104x128x257 to 96 59.8
// (46.1).
constexpr double small_tiles_as_measured(Row const& row, Problem const& p) {
  if (row.op != Op::wgrad || row.variant != Variant::lean || p.x.c != 1) return 1;
  bool const few = min64(p.C, p.K) <= 24 && p.N * p.H * p.W >= 50000;
  if (row.tile_m != 64) return few && row.tile_m == 128 ? 1.25 : 1;  // 32x24x56x56 to 144 by 128x64 23.6 us, 19.7
  if (odd_pixels(p)) return 1.35;
  if (row.tile_n != 64) return 1;
  if (few) return 1.25;  // 4x16x256x256 to 24 20.4 us, 15.2
  bool const short_lines = min64(p.C, p.K) < 32 && max64(p.C, p.K) > 1024;
  return short_lines || p.N * p.H * p.W >= 200000 ? 1.03 : 1;
}

// fprop and dgrad of up to 64 results a pixel by tiles of more than 128 pixels that all SMs have at once: 32x40x28x28
// to 120 D by 192x64 10.5 us, 96x64 11.8 (in L2 6.0, 8.0). And fprop by filters that stay, of many results:
// 64x128x28x28 to 512 22.3 us, 96x128 24.5 (16.6, 21.4).
constexpr double one_round_as_measured(Row const& row, Problem const& p) {
  if (row.op == Op::wgrad || p.x.c != 1) return 1;
  int64_t const pixels = p.N * p.H * p.W, results = row.op == Op::fprop ? p.K : p.C;
  if (row.variant == Variant::lines && row.tile_n == 64)
    return results <= 64 && results >= (row.op == Op::fprop ? 24 : 32) && pixels >= 17000 &&
                   ceil_div(pixels, row.tile_m) <= 132
               ? 0.92
               : 1;
  bool const stay = row.variant == Variant::im2col && row.tile_m == 64 && row.tile_n == 128 && row.op == Op::fprop;
  return stay && p.C >= 64 && p.C <= 128 && p.K >= 2 * p.C && pixels * p.K >= 10000000 ? 0.87 : 1;
}

// TF32's fprop in channels_last, beside each other: filters that stay, and small tiles of short sums that store much
// (32x40x28x28 to 120 14.2 us by 64x128 lean, estimated at 9.6; 11.9 by 64x128).
constexpr double tf32_lines_as_measured(Row const& row, Problem const& p) {
  if (row.family != Family::tma || row.op != Op::fprop || p.x.c != 1 || p.R * p.S != 1 || p.groups != 1 ||
      p.stride_h * p.stride_w != 1)
    return 1;
  if (row.variant == Variant::im2col && row.tile_m == 64 && row.tile_n == 128)
    return p.C % 256 == 0 && p.C <= 512 && p.K % 64 == 0 ? 0.83 : 0.9;
  double const stored = double(p.N) * double(p.P()) * double(p.Q()) * double(p.K);
  bool const stores_much = p.C <= 64 ? stored > 2e6 : p.C <= 256 && p.K >= 64 && stored > 2.5e6;
  return row.variant == Variant::lean && stores_much ? 1.3 : 1;
}

// Large tiles of tma.cuh, which read pixels that begin within sectors from L2 once a tile of the result's columns, take
// longer than estimated: 32x728x19x19 to 1024 F 54.0 us by 128x256, estimated at 37.4, 128x1096x14x14 to 384
// F 75.2, 49.2. So do those of dgrad whose results begin so: 128x728x19x19 to 1024 154.7, 109.7 (160x128_lines 118.4).
constexpr double large_tiles_as_measured(Row const& row, Problem const& p) {
  int64_t const read = row.op == Op::fprop ? p.C : p.K;
  if (row.family != Family::tma || row.variant != Variant::im2col || row.op == Op::wgrad || p.x.c != 1 ||
      row.tile_m * row.tile_n <= 128 * 128 || !odd_pixels(p) || read % 8 != 0)
    return 1;
  return read % 16 != 0 ? 1.35 : row.op == Op::dgrad && p.C % 8 == 0 ? 1.2 : 1;
}

// Up to a round of lean's tiles takes no longer where pixels share lines of memory (lean_estimate has 1.2; 1x992x14x14
// to 128 F 6.9 us by 80x64_lines, 6.0; 1x272x12x12 to 1632 D 8.6, 7.1), in TF32 that of 128x128 a little less.
constexpr double few_tiles_as_measured(Row const& row, Problem const& p) {
  int const v = 16 / size_of(p.dtype), line = 128 / size_of(p.dtype);
  if (row.family != Family::tma || row.variant != Variant::lean || row.op == Op::wgrad || p.x.c != 1) return 1;
  if (p.R * p.S != 1 || p.groups != 1 || p.stride_h * p.stride_w != 1 || p.C % v != 0 || p.K % v != 0) return 1;
  if (p.C % line == 0 && p.K % line == 0) return 1;
  int64_t const tiles = ceil_div(p.N * p.H * p.W, row.tile_m) * ceil_div(row.op == Op::fprop ? p.K : p.C, row.tile_n);
  if (p.dtype == DType::f32)
    return row.op == Op::dgrad && row.tile_m == 128 && tiles > 66 && tiles <= 132 ? 1 / 1.07 : 1;
  return row.tile_m == 64 && row.tile_n <= 64 && tiles <= (row.tile_n == 32 ? 132 : 66) ? 1 / 1.2 : 1;
}

constexpr double one_by_one_as_measured(Row const& row, Problem const& p) {
  // Gradients of many filters over planes, beside pixels_wgrad.cuh.
  double large =
      row.op == Op::wgrad && row.variant == Variant::lean && p.x.c != 1 && p.R * p.S == 1 && p.flops() > 2e9 ? 1.2 : 1;
  large *= few_tiles_as_measured(row, p);
  if (p.dtype == DType::f32) return large * tf32_lines_as_measured(row, p);
  if (p.dtype == DType::f64 || p.R != 1 || p.S != 1 || p.groups != 1 || p.stride_h != 1 || p.stride_w != 1 ||
      p.P() != p.H || p.Q() != p.W || (row.family != Family::tma && row.family != Family::pixels))
    return 1;
  bool const nchw = p.C > 1 && p.x.c != 1;
  if (nchw && row.variant == Variant::lean && p.H * p.W % 8 != 0)  // estimates of their own
    return row.op == Op::fprop && row.tile_n == 64 && p.K > 128 && p.C >= 512 && p.N * p.H * p.W > 1000 ? 1.05
           : row.op == Op::wgrad && p.N * p.H * p.W > 500000 ? 1.2  // 32x24x190x190 to 24 165 us, estimated at 102
                                                             : 1;
  // Odd planes, which are packed (64x512x7x7 to 2048 31.7 us, 144x192 36.1; 8x1280x19x19 to 320 D 23.8, 192x128 27.8).
  if (nchw && row.variant == Variant::im2col && row.op != Op::wgrad && row.tile_m == 64 && row.tile_n == 128 &&
      (row.op == Op::fprop ? p.K : p.C) >= 256)
    return 0.9;
  // Likewise, of long sums: 1x384x35x35 to 192 F 15.9 us, estimated at 11.7, `64x64_any` 11.1.
  if (nchw && row.variant == Variant::im2col && row.op == Op::fprop && row.tile_m == 64 && row.tile_n == 64 &&
      p.C >= 256 && p.H * p.W > 200)
    large *= 1.07;
  large *= large_tiles_as_measured(row, p) * one_round_as_measured(row, p);
  // Channels off vectors, which are packed: 128x570x14x14 to 106 F 35.7 us by 192x128, estimated at 48.7. Less in small
  // layers, and by small tiles (32x366x14x14 to 72 14.6 by 64x64, 11.9 by filters that stay).
  if (row.family == Family::tma && row.op != Op::wgrad && p.x.c == 1 && (p.C % 8 != 0 || p.K % 8 != 0) &&
      min64(p.C, p.K) > 64) {
    bool const fewer = (row.op == Op::fprop) == (p.K < p.C);
    bool const less = row.tile_m == 64 && (row.tile_n == 64 || (row.tile_n == 128 && fewer));
    large *= p.N * p.H * p.W < 5000 || less ? 0.92 : 0.83;
  }
  // As measured: gradients of few images (8x288x56x56 to 96 18.3 us, estimated at 14.5, 128x64_nchw 14.8).
  int64_t const pixels = p.N * p.H * p.W;
  if (nchw && row.op == Op::wgrad && row.variant == Variant::lean && pixels > 2000 && pixels < 30000)
    large = pixels < 15000 ? 1.22 : large > 1.12 ? large : 1.12;
  bool const whole = p.C % 64 == 0 && p.K % 64 == 0;
  // Memory takes results more slowly than it gives operands.
  double const y_bytes = double(p.N) * double(p.H) * double(p.W) * double(p.K) * size_of(p.dtype);
  if (row.op == Op::fprop && row.variant == Variant::pointwise && p.K > 2 * p.C && y_bytes > 1.5e7) large = 1.07;
  for (OneByOne const& f : kOneByOne)
    if (f.op == row.op && f.variant == row.variant && f.tile_m == row.tile_m && f.tile_n == row.tile_n &&
        (f.variant == Variant::im2col || f.nchw == nchw))
      return (whole ? f.whole : f.ended) * few_weights_as_measured(row, p) * small_tiles_as_measured(row, p) * large;
  return large * small_tiles_as_measured(row, p);
}

}  // namespace conv2d_ext
