// Rows of small layers, as measured beside each other: what their estimates are off by, that is near the best rows of
// 11,232 problems of all kinds and at least as much in 5,190 others, the newest of 4,468 (docs/tuning/planner.md).
#pragma once

#include "row.h"

namespace conv2d_ext {

constexpr double beside_ns(Row const& row, Problem const& p, double ns) {
  bool const f32 = row.dtype == DType::f32, across = p.x.c == 1 && p.C > 1, taps = p.R * p.S > 1;
  int64_t const plane = p.P() * p.Q(), pixels = p.N * plane;
  auto is = [&](Family family, Variant variant, Op op) {
    return row.family == family && row.variant == variant && row.op == op;
  };
  auto tile = [&](int m, int n) { return row.tile_m == m && row.tile_n == n; };
  if (f32) {
    // 47x24x10x10 to 48 3x3 s(2,1) W strict 29.3 us, estimated at 19.8.
    if (is(Family::simt, Variant::any, Op::wgrad))
      return ns * (pixels > 4000 ? 1.15 : pixels > 1000 ? 1.2 : 1) * (plane <= 100 && taps ? 0.87 : 1);
    if (row.family == Family::simt && row.op == Op::dgrad) {
      if (!p.allow_tf32 && row.variant == Variant::any && taps && !across) ns *= 1.15;
      if (!p.allow_tf32 && row.variant == Variant::nhwc && tile(128, 64) && !across && p.stride_h * p.stride_w == 1)
        ns *= 1.15;
      bool const phases = p.stride_h > 1 && p.stride_w > 1;  // several taps of each
      return ns * (!phases || !taps ? 1 : tile(64, 64) ? 1.15 : 1.06);
    }
    if (is(Family::tma_strict, Variant::im2col, Op::wgrad)) return ns * (tile(128, 128) && p.groups == 1 ? 0.95 : 1);
    if (row.family == Family::grouped && row.variant == Variant::lines && row.op != Op::wgrad)
      return ns * (p.allow_tf32 ? 1 : 0.9);
    if (row.family == Family::tma && row.variant == Variant::halo && row.op != Op::wgrad) {  // large, and packed
      ns *= p.groups > 1 && !across && taps && tile(256, 64) && ns > 60000 ? 1.12 : 1;
      return ns + (row.op == Op::fprop && p.C_per_group() <= 64 ? 3000 : 0);
    }
    if (is(Family::tma, Variant::raw, Op::dgrad)) return ns - (!taps && plane <= 200 && ns < 60000 ? 1500 : 0);
    if (is(Family::tma, Variant::im2col, Op::dgrad)) return ns * (taps || ns > 60000 ? 1 : 0.93);
    if (is(Family::tma, Variant::im2col, Op::fprop)) return ns * (tile(64, 128) && pixels > 10000 ? 0.93 : 1);
    if (is(Family::tma, Variant::lean, Op::fprop))  // over planes: 8x1536x10x10 to 2048 51.5 us, estimated at 29.8
      return (ns - 1500) * (tile(128, 128) ? 1.05 : !across && !taps && ns > 13500 ? 1.2 : 1);
    // Two tiles an SM: 32x1024x10x10 to 256 D 19.5 us, estimated at 14.6.
    if (is(Family::tma, Variant::lean, Op::dgrad) && tile(128, 128) && across && !taps)
      return ns * (ceil_div(p.N * p.H * p.W, 128) * ceil_div(p.C, 128) > 132 ? 1.05 : 1);
    if (is(Family::tma, Variant::lean, Op::wgrad)) return ns - (tile(64, 64) && pixels <= 1000 ? 1500 : 0);
    return ns;
  }
  // wgrad over few pixels, whose launches are most of it.
  if (is(Family::tma, Variant::im2col, Op::wgrad) && pixels <= 1000) ns *= 1.05;
  // Phases of groups (92x69x8x8 3x3 s3 in 3 groups 23.3 us, estimated at 16.1).
  if (is(Family::simt, Variant::any, Op::dgrad) && p.groups > 1 && p.stride_h * p.stride_w > 1)
    ns *= tile(64, 64) ? 1.14 : 1.07;
  // dgrad's phases of few filters: 141x24x134x46 to 32 1x1 s(2,1) 67.8 us, estimated at 50.4.
  if (is(Family::tma, Variant::im2col, Op::dgrad) && tile(128, 64) && across && p.groups == 1 &&
      p.stride_h * p.stride_w > 1 && p.K <= 32 && ns > 20000)
    return ns * 1.15;
  if (!taps && p.groups == 1) {  // and one_by_one.h
    bool const gathers = row.family == Family::tma && row.op != Op::wgrad;
    // To few filters: 3x36x318x272 to 18 s2 d2 18.2 us, estimated at 25.7.
    if (gathers && row.variant == Variant::lean && !across) {
      ns += row.op == Op::fprop ? 1200 : 1500;
      return ns * (row.op == Op::fprop && tile(64, 32) && p.K <= 48 && ns > 15000 ? 0.8 : 1);
    }
    // Small tiles of packed planes; where others stay in place, of many weights.
    bool const packs = p.x.w != 1 || plane % 4 != 0 || p.C * p.K >= 500000;
    if (is(Family::tma, Variant::lines, Op::wgrad) && !across && row.tile_n == 64) return ns - (packs ? 1500 : 0);
    // wgrad by tiles that take long: 32x256x40x40 to 256 27.2 us by 64x64, estimated at 23.3, 128x64 24.7.
    if (is(Family::tma, Variant::lean, Op::wgrad) && across && p.stride_w == 1) {
      if (tile(64, 64)) return ns * (ns > 12000 && ns < (min64(p.C, p.K) < 64 ? 40000 : 25000) ? 1.1 : 1);
      if (tile(128, 128)) return ns * (ns > 11000 && ns < 40000 ? 1.05 : 1);
    }
    // By tiles of 96 columns, whose lines many share: 32x2304x14x14 to 512 42.2 us, estimated at 31.3.
    if (is(Family::tma, Variant::lines, Op::wgrad) && across && tile(96, 128) &&
        ceil_div(p.C, 96) * ceil_div(p.K, 128) > 66)
      return ns * (ns > 15000 ? 1.1 : 1);
    // dgrad to few channels: 32x8x112x112 to 48 26.5 us, estimated at 20.5.
    if (is(Family::tma, Variant::im2col, Op::dgrad) && across && tile(64, 128) && p.C <= 16 && p.K > 32)
      return ns * 1.2;
    return ns + (is(Family::tma, Variant::im2col, Op::wgrad) && across ? 1000 : 0);
  }
  if (is(Family::tma, Variant::im2col, Op::fprop)) {
    if (p.groups > 1) return ns;
    return ns * (tile(128, 128) && !across && plane <= 200 ? 1.06 : 1) - (pixels <= 10000 ? 1000 : 0);
  }
  // 2x96x128x128 to 32 3x3 19.5 us, estimated at 14.0.
  if (is(Family::tma, Variant::lean, Op::fprop) && across && tile(64, 32) && ns > 12000) return ns * 1.15;
  if (is(Family::tma, Variant::im2col, Op::dgrad))
    return ns - (p.groups == 1 && (pixels <= 1000 || (across && p.K <= 8)) ? 1000 : 0);
  if (is(Family::tma, Variant::im2col, Op::wgrad))
    return ns - (p.groups > 1 ? 1500 : 0) - (tile(64, 64) && taps && pixels > 100 && pixels <= 1000 ? 1000 : 0);
  if (is(Family::tma, Variant::halo, Op::fprop) && tile(256, 64) && across && p.C <= 64) return ns - 2000;
  if (is(Family::tma, Variant::narrow, Op::wgrad)) {
    ns -= p.C <= 32 && pixels > 4000 ? 3000 : 0;
    return ns * (across && ns < 14000 ? 1.15 : 1);  // 8x32x35x35 to 32 3x3 13.2 us, estimated at 10.9
  }
  if (is(Family::tma, Variant::halo, Op::dgrad) && tile(256, 64) && across) {
    // But for small images (L16 D 19.3 us, by images 17.3) and strides of many channels (L18 157, 256x128 131).
    bool const grouped = p.groups > 1 && p.H * p.W >= 64 && (p.stride_w == 1 || p.C_per_group() <= 96);
    return (ns - (pixels <= 10000 ? 1500 : 0)) * (grouped ? 0.88 : 1);
  }
  return ns;
}

// Rows of all families, where a problem is within up to three ranges: factors that were right several times as often as
// wrong in each half of 27,000 timed problems and in draws that asked for doubtful choices, or on plans of no part in
// them (docs/tuning/planner.md). All that hold count.
// all_taps: of all groups; weights, inputs, outputs: elements; ..._fits: the largest power of two up to 16 that divides
// it; C and K are of a group.
enum class Of : uint8_t {
  any,
  us,
  N,
  H,
  W,
  P,
  Q,
  R,
  pixels,
  plane,
  in_plane,
  taps,
  all_taps,
  stride,
  dilation,
  C,
  K,
  all_K,
  K_over_C,
  groups,
  weights,
  inputs,
  outputs,
  Q_fits,
  plane_fits,
  group_C_fits,
  group_K_fits
};
struct Range {
  Of of = Of::any;
  double least = 0, most = 1e18;
};
enum class Kind : uint8_t { half, single, tf32, strict };  // types of 16 bits; float32, in any way or in one
inline constexpr int kAnyTile = -1;
struct Beside {
  Op op;
  Family family;
  Variant variant;
  Kind kind;
  int tile_m, tile_n;
  bool nhwc;
  double factor;
  Range a, b, c = {};
};
inline constexpr Beside kBeside[] = {
    {Op::fprop, Family::tma, Variant::lean, Kind::single, 64, 64, false, 1.07, {Of::us, 0, 7}, {}},
    {Op::dgrad, Family::tma, Variant::lean, Kind::single, 64, 128, true, 0.87, {Of::pixels, 0, 1550}, {Of::us, 6}},
    {Op::wgrad, Family::tma, Variant::lean, Kind::single, 64, 64, false, 0.87, {Of::stride, 2}, {Of::taps, 0, 1}},
    {Op::fprop, Family::tma, Variant::im2col, Kind::half, 192, 128, false, 0.9, {Of::all_taps, 0, 1}, {}},
    {Op::fprop, Family::tma, Variant::im2col, Kind::half, 64, 128, false, 1.12, {Of::all_taps, 0, 1}, {Of::stride, 2}},
    {Op::dgrad, Family::tma, Variant::im2col, Kind::half, 64, 64, false, 1.12, {Of::all_taps, 0, 1}, {}},
    {Op::dgrad, Family::pixels, Variant::nchw, Kind::half, 128, 256, false, 1.07, {Of::us, 8, 16}, {}},
    {Op::wgrad, Family::pixels, Variant::nchw, Kind::half, 128, 64, false, 1.12, {Of::us, 16, 60}, {}},
    {Op::wgrad, Family::pixels, Variant::nchw, Kind::single, 128, 128, false, 0.93, {Of::pixels, 20000}, {}},
    {Op::wgrad, Family::tma, Variant::lines, Kind::half, 128, 64, true, 0.93, {Of::pixels, 6400}, {Of::us, 11, 36}},
    {Op::wgrad, Family::tma, Variant::lines, Kind::half, 128, 128, true, 0.95, {Of::pixels, 6400}, {Of::us, 11}},
    {Op::wgrad, Family::tma, Variant::lean, Kind::half, 64, 64, true, 1.04, {Of::us, 9, 24}, {Of::all_taps, 0, 1}},
    {Op::fprop, Family::pixels, Variant::any, Kind::half, 32, 32, true, 1.06, {Of::pixels, 0, 200}, {}},
    {Op::wgrad, Family::pixels, Variant::raw, Kind::half, 128, 128, false, 0.9, {Of::C, 128}, {Of::K, 128}},
    {Op::dgrad, Family::tma, Variant::pointwise, Kind::half, 256, 64, false, 1.2, {Of::C, 128}, {}},
    {Op::fprop, Family::pixels, Variant::nchw, Kind::half, 64, 256, false, 1.04, {Of::K_over_C, 0, 1}, {Of::us, 0, 36}},
    {Op::dgrad, Family::pixels, Variant::nchw, Kind::half, 64, 256, false, 1.04, {Of::us, 0, 17}, {}},
    {Op::fprop, Family::pixels, Variant::narrow, Kind::half, 256, 64, false, 1.07, {Of::us, 0, 13}, {}},
    {Op::dgrad, Family::pixels, Variant::narrow, Kind::half, 256, 64, false, 1.07, {Of::pixels, 0, 150}, {}},
    {Op::dgrad, Family::pixels, Variant::lean, Kind::half, 16, 32, true, 1.15, {Of::C, 120}, {}},
    {Op::fprop, Family::pixels, Variant::any, Kind::single, 64, 64, false, 1.15, {Of::C, 0, 180}, {}},
    {Op::wgrad, Family::pixels, Variant::any, Kind::single, 64, 64, false, 1.15, {Of::plane, 0, 200}, {}},
    {Op::wgrad, Family::pixels, Variant::any, Kind::single, 32, 32, true, 1.15, {Of::K, 48}, {Of::us, 5.7}},
    {Op::wgrad, Family::pixels, Variant::any, Kind::half, 32, 32, true, 1.15, {Of::K, 64}, {Of::us, 6.5}},
    {Op::fprop, Family::stem, Variant::halo, Kind::single, 64, 32, true, 0.85, {Of::us, 0, 16}, {}},
    {Op::wgrad, Family::grouped, Variant::nchw, Kind::half, 64, 64, false, 0.93, {Of::C, 24}, {}},
    {Op::dgrad, Family::depthwise, Variant::nchw, Kind::single, 0, 2, false, 0.87, {Of::stride, 0, 1}, {Of::us, 0, 25}},
    {Op::wgrad, Family::depthwise, Variant::nchw, Kind::half, 0, 0, false, 0.85, {Of::K_over_C, 2}, {Of::taps, 9, 25}},
    {Op::wgrad, Family::depthwise, Variant::nchw, Kind::half, 0, 1, false, 1.07, {Of::pixels, 0, 1800}, {}},
    {Op::wgrad, Family::column, Variant::nhwc_s2, Kind::single, 3, 3, true, 0.85, {Of::us, 20}, {Of::K_over_C, 0, 1}},
    {Op::fprop, Family::stream, Variant::nchw, Kind::single, 3, 3, false, 1.07, {Of::taps, 9}, {}},
    {Op::dgrad, Family::stream, Variant::nchw, Kind::single, 3, 3, false, 1.07, {Of::taps, 9}, {}},
    {Op::dgrad, Family::strip, Variant::nhwc, Kind::single, 7, 8, true, 0.9, {}, {}},
    {Op::fprop, Family::band, Variant::nchw, Kind::half, 16, 16, false, 1.2, {Of::plane, 200}, {}},
    // 157x240x5x5 to 120 4x4 s4 in 30 groups D 65.8 us, estimated at 24.0.
    {Op::dgrad, Family::grouped, Variant::nchw, Kind::half, 8, 8, true, 2.7, {Of::stride, 16}, {Of::taps, 16}},
    {Op::wgrad, Family::depthwise, Variant::nchw, Kind::single, 0, 2, false, 0.75, {Of::us, 25}, {Of::plane, 5000}},
    {Op::wgrad, Family::depthwise, Variant::nchw, Kind::single, 0, 1, false, 0.85, {Of::us, 15}, {Of::C, 0, 2}},
    {Op::wgrad, Family::stream, Variant::nchw, Kind::single, 5, 5, false, 1.15, {Of::us, 30}, {Of::plane, 5000}},
    {Op::wgrad, Family::stream, Variant::nchw_s2, Kind::half, 9, 9, false, 0.75, {Of::us, 0, 26}, {}},
    {Op::fprop, Family::depthwise, Variant::nchw, Kind::half, 0, 1, false, 1.15, {Of::us, 18}, {Of::C, 0, 1}},
    {Op::wgrad, Family::depthwise, Variant::nhwc, Kind::half, 0, 4, true, 0.87, {Of::us, 10, 40}, {Of::groups, 0, 90}},
    {Op::dgrad, Family::tma, Variant::lean, Kind::half, 64, 64, true, 0.8, {Of::plane, 0, 49}, {Of::taps, 2}},
    {Op::dgrad, Family::tma, Variant::lean, Kind::half, 64, 64, false, 0.93, {Of::pixels, 0, 3136}, {}},
    {Op::dgrad, Family::tma, Variant::lean, Kind::single, 64, 64, false, 1.15, {Of::pixels, 3200}, {}},
    {Op::fprop, Family::pixels, Variant::raw, Kind::single, 64, 64, false, 0.9, {}, {}},
    {Op::fprop, Family::stem, Variant::nhwc, Kind::single, 32, 64, true, 1.25, {Of::K, 48}, {}},
    {Op::wgrad, Family::simt, Variant::any, Kind::single, 256, 8, false, 1.25, {Of::stride, 90}, {}},
    {Op::wgrad, Family::tma, Variant::im2col, Kind::half, 64, 64, true, 1.5, {Of::K, 0, 8}, {Of::C, 500}},
    {Op::fprop, Family::tma, Variant::im2col, Kind::half, 64, 64, false, 1.25, {Of::groups, 2}, {Of::taps, 2, 4}},
    {Op::fprop, Family::depthwise, Variant::nhwc, Kind::half, 0, 1, true, 1.12, {Of::us, 9}, {Of::stride, 0, 2}},
    {Op::fprop, Family::pixels, Variant::any, Kind::single, 32, 32, true, 1.3, {Of::C, 512}, {}},
    {Op::dgrad, Family::stream, Variant::nchw, Kind::half, 9, 9, false, 0.8, {Of::us, 0, 40}, {}},
    {Op::fprop, Family::stem, Variant::lean, Kind::single, 16, 64, true, 0.9, {Of::us, 10}, {Of::C, 2}},
    {Op::dgrad, Family::igemm, Variant::nhwc, Kind::half, 128, 128, true, 1.1, {}, {}},
    // Packed pixels of groups of 33 to 64 odd channels, more than L2 holds: 111x627x20x20 3x3 in 11 groups 922 us,
    // estimated at 453, 87x684x20x20 by 128x128 1,585, 540; 128x32 takes what it is estimated at.
    {Op::fprop,
     Family::tma_strict,
     Variant::im2col,
     Kind::strict,
     128,
     64,
     false,
     2.05,
     {Of::C, 33, 64},
     {Of::group_C_fits, 1, 2},
     {Of::inputs, 1.2e7}},
    {Op::fprop,
     Family::tma_strict,
     Variant::im2col,
     Kind::strict,
     128,
     128,
     false,
     2.2,
     {Of::C, 33, 64},
     {Of::group_C_fits, 1, 2},
     {Of::inputs, 1.2e7}},
    // 68 tiles, of which 132 blocks have uneven shares: 1x2048x65x65 to 256 3x3 d6 103 us, estimated at 73.
    {Op::fprop, Family::tma, Variant::im2col, Kind::half, 128, 128, true, 1.3, {Of::C, 1024}, {Of::pixels, 4224, 4352}},
    // Of draws of 11-30, 21:30 to 22:30 (docs/tuning/planner.md), each with the problem that showed it where it changes
    // much.
    {Op::dgrad, Family::band, Variant::nchw, Kind::half, kAnyTile, 0, false, 1.09, {Of::W, 123}, {}},
    // 83x96x56x56 3x3 d5 101.8 us, estimated at 125.0.
    {Op::dgrad, Family::band, Variant::nchw, Kind::half, 64, 64, false, 0.85, {Of::dilation, 16}, {Of::taps, 0, 9}},
    // 109x64x56x56 3x3 d5 90.2 us, estimated at 109.9.
    {Op::fprop, Family::band, Variant::nchw, Kind::half, 64, 64, false, 0.85, {Of::dilation, 16}, {Of::taps, 0, 9}},
    {Op::fprop, Family::band, Variant::nchw, Kind::single, kAnyTile, 0, false, 1.13, {Of::W, 65}, {}},
    // 1x236x49x49 to 944 9x9 s2 68.6 us, estimated at 39.9.
    {Op::wgrad, Family::band, Variant::nchw, Kind::half, kAnyTile, 0, false, 1.19, {Of::plane, 211}, {Of::stride, 4}},
    {Op::wgrad, Family::band, Variant::nhwc, Kind::half, 16, 16, true, 0.91, {Of::inputs, 0, 4e6}, {Of::outputs, 4e5}},
    // 56x200x17x17 to 400 3x3 s2 11.9 us, estimated at 25.7.
    {Op::dgrad, Family::column, Variant::nhwc_s2, Kind::single, kAnyTile, 0, true, 0.84, {Of::us, 15}, {}},
    {Op::dgrad, Family::depthwise, Variant::nchw, Kind::single, 0, 0, false, 0.94, {Of::K, 0, 3}, {}},
    // 6x171x12x12 to 24 3x1 s2 in 3 groups 17.6 us, estimated at 12.3.
    {Op::fprop,
     Family::depthwise,
     Variant::nchw,
     Kind::half,
     0,
     1,
     false,
     1.3,
     {Of::K, 0, 8},
     {Of::C, 20},
     {Of::stride, 2}},
    // 116x946x12x12 to 1892 13x13 s2 85.7 us, estimated at 52.4.
    {Op::fprop, Family::depthwise, Variant::nchw, Kind::single, 0, 1, false, 1.19, {Of::taps, 61}, {}},
    {Op::wgrad,
     Family::depthwise,
     Variant::nchw,
     Kind::single,
     kAnyTile,
     0,
     false,
     0.88,
     {Of::weights, 100},
     {Of::R, 0, 6}},
    // 27x23x51x51 5x5 d2 41.1 us, estimated at 28.4.
    {Op::dgrad,
     Family::depthwise,
     Variant::nhwc,
     Kind::half,
     kAnyTile,
     0,
     true,
     1.15,
     {Of::outputs, 1.28e6},
     {Of::in_plane, 201}},
    {Op::dgrad, Family::depthwise, Variant::nhwc, Kind::half, 0, 1, true, 1.07, {Of::pixels, 4101}, {}},
    // 2x8x37x37 21x21 s(2,1) 10.4 us, estimated at 18.0.
    {Op::dgrad, Family::depthwise, Variant::nhwc, Kind::half, 0, 1, true, 0.76, {Of::pixels, 0, 2200}, {Of::R, 13}},
    {Op::dgrad,
     Family::depthwise,
     Variant::nhwc,
     Kind::half,
     0,
     2,
     true,
     0.93,
     {Of::weights, 0, 3700},
     {Of::outputs, 0, 48000}},
    {Op::dgrad, Family::depthwise, Variant::nhwc, Kind::single, 0, 1, true, 1.05, {Of::pixels, 0, 2.3e5}, {Of::H, 30}},
    // 4x8x21x21 to 32 13x13 13.1 us, estimated at 24.0.
    {Op::fprop, Family::depthwise, Variant::nhwc, Kind::half, 0, 1, true, 0.78, {Of::outputs, 0, 2e5}, {Of::us, 16}},
    {Op::wgrad, Family::depthwise, Variant::nhwc, Kind::single, 0, 4, true, 0.9, {Of::groups, 0, 14}, {}},
    // 23x8x172x172 7x7 s2 39.5 us, estimated at 27.7.
    {Op::wgrad, Family::depthwise, Variant::nhwc_s2, Kind::single, 7, 7, true, 1.22, {}, {}},
    {Op::wgrad, Family::grouped, Variant::halo, Kind::half, kAnyTile, 0, true, 0.9, {Of::groups, 0, 20}, {}},
    {Op::fprop, Family::grouped, Variant::nchw, Kind::half, kAnyTile, 0, true, 1.07, {Of::weights, 900}, {}},
    // 77x360x26x26 to 180 1x1 d2 in 9 groups 98.0 us, estimated at 56.7.
    {Op::fprop, Family::grouped, Variant::nhwc, Kind::half, 16, 16, true, 1.31, {Of::taps, 0, 2}, {Of::us, 9}},
    // 15x384x9x132 1x1 d2 in 16 groups 54.5 us, estimated at 31.8.
    {Op::fprop, Family::grouped, Variant::nhwc, Kind::tf32, 16, 16, true, 1.42, {Of::taps, 0, 6}, {Of::outputs, 9e5}},
    {Op::fprop, Family::igemm, Variant::nhwc, Kind::tf32, kAnyTile, 0, true, 1.11, {}, {}},
    {Op::wgrad, Family::igemm, Variant::nhwc, Kind::tf32, kAnyTile, 0, false, 1.08, {}, {}},
    // 21x64x58x55 to 128 1x1 58.9 us, estimated at 33.8.
    {Op::dgrad,
     Family::pixels,
     Variant::any,
     Kind::tf32,
     64,
     64,
     false,
     1.48,
     {Of::plane_fits, 2},
     {Of::C, 51},
     {Of::K, 0, 200}},
    // 141x5x6x6 to 224 1x1 11.3 us, estimated at 18.6.
    {Op::wgrad, Family::pixels, Variant::any, Kind::tf32, 32, 32, true, 0.84, {Of::pixels, 2101}, {}},
    {Op::dgrad, Family::pixels, Variant::narrow, Kind::half, kAnyTile, 0, false, 1.05, {}, {}},
    {Op::wgrad,
     Family::pixels,
     Variant::nchw,
     Kind::half,
     kAnyTile,
     0,
     false,
     0.94,
     {Of::pixels, 421},
     {Of::W, 11},
     {Of::plane_fits, 0, 4}},
    // 19x144x58x58 to 24 1x1 22.0 us, estimated at 31.4.
    {Op::wgrad,
     Family::pixels,
     Variant::nchw,
     Kind::tf32,
     192,
     160,
     false,
     0.79,
     {Of::us, 15.2},
     {Of::weights, 0, 6300}},
    // 3x256x33x33 to 21 1x1 17.9 us, estimated at 12.1.
    {Op::wgrad, Family::pixels, Variant::nhwc, Kind::half, kAnyTile, 0, true, 1.14, {Of::K_over_C, 0, 0.18}, {}},
    {Op::fprop, Family::pixels, Variant::pointwise, Kind::strict, kAnyTile, 0, true, 0.89, {Of::pixels, 0, 6000}, {}},
    {Op::dgrad, Family::simt, Variant::any, Kind::tf32, 128, 128, false, 1.12, {}, {}},
    {Op::dgrad, Family::simt, Variant::any, Kind::strict, kAnyTile, 0, true, 1.07, {Of::Q, 24}, {}},
    {Op::dgrad, Family::simt, Variant::any, Kind::strict, kAnyTile, 0, true, 1.05, {}, {}},
    // 14x5x40x40 to 10 7x1 s(7,1) 12.1 us, estimated at 9.3.
    {Op::dgrad, Family::simt, Variant::any, Kind::strict, 256, 8, true, 1.14, {Of::us, 0, 18.5}, {}},
    {Op::fprop, Family::simt, Variant::any, Kind::strict, kAnyTile, 0, false, 0.95, {Of::outputs, 0, 1e6}, {Of::H, 61}},
    {Op::fprop,
     Family::simt,
     Variant::any,
     Kind::tf32,
     kAnyTile,
     0,
     false,
     0.95,
     {Of::groups, 0, 40},
     {Of::K_over_C, 3.8}},
    // 27x616x37x37 to 308 1x1 s2 in 11 groups 57.7 us, estimated at 77.3.
    {Op::fprop, Family::simt, Variant::any, Kind::tf32, 128, 32, false, 0.87, {}, {}},
    {Op::wgrad, Family::simt, Variant::any, Kind::strict, 128, 64, false, 0.9, {}, {}},
    // 108x32x30x30 to 4 4x4 s2 d2 37.7 us, estimated at 59.1.
    {Op::dgrad, Family::simt, Variant::nhwc, Kind::strict, kAnyTile, 0, false, 0.84, {Of::us, 17.5}, {Of::stride, 4}},
    {Op::dgrad, Family::stem, Variant::halo, Kind::half, kAnyTile, 0, true, 0.89, {Of::plane, 0, 8300}, {}},
    // 147x400x9x34 to 16 7x1 41.6 us, estimated at 57.5.
    {Op::dgrad, Family::stem, Variant::halo, Kind::tf32, 64, 32, true, 0.85, {}, {}},
    // 89x6x110x110 to 16 7x7 181.8 us, estimated at 116.1.
    {Op::fprop, Family::stem, Variant::halo, Kind::half, kAnyTile, 0, false, 1.2, {Of::all_K, 0, 34}, {}},
    {Op::fprop,
     Family::stem,
     Variant::halo,
     Kind::tf32,
     kAnyTile,
     0,
     true,
     0.9,
     {Of::stride, 0, 10},
     {Of::outputs, 2.6e6}},
    {Op::fprop, Family::stem, Variant::lean, Kind::tf32, 16, 64, false, 0.94, {Of::outputs, 0, 6e6}, {}},
    {Op::fprop, Family::stem, Variant::lean, Kind::tf32, kAnyTile, 0, true, 0.9, {Of::outputs, 0, 1.7e6}, {}},
    {Op::fprop, Family::stem, Variant::lines, Kind::strict, kAnyTile, 0, true, 1.12, {}, {}},
    // 1x128x512x512 to 3 3x3 33.2 us, estimated at 46.1.
    {Op::dgrad,
     Family::stem,
     Variant::nchw,
     Kind::half,
     kAnyTile,
     0,
     false,
     0.84,
     {Of::group_C_fits, 16},
     {Of::inputs, 0, 6e7}},
    {Op::fprop,
     Family::stem,
     Variant::nchw,
     Kind::half,
     kAnyTile,
     0,
     false,
     0.94,
     {Of::Q_fits, 0, 4},
     {Of::in_plane, 0, 18000}},
    {Op::fprop,
     Family::stem,
     Variant::nchw,
     Kind::half,
     64,
     32,
     false,
     0.91,
     {Of::P, 0, 270},
     {Of::stride, 0, 3},
     {Of::group_C_fits, 0, 1}},
    {Op::fprop, Family::stem, Variant::nchw, Kind::strict, kAnyTile, 0, false, 0.91, {}, {}},
    {Op::dgrad, Family::stem, Variant::nhwc, Kind::half, kAnyTile, 0, true, 1.08, {}, {}},
    // 110x3x18x234 to 81 2x2 s2 54.7 us, estimated at 41.2.
    {Op::fprop,
     Family::stem,
     Variant::nhwc,
     Kind::half,
     kAnyTile,
     0,
     true,
     1.15,
     {Of::inputs, 0, 2e7},
     {Of::K, 66},
     {Of::us, 22.1}},
    // 7x2103x8x8 7x7 s2 40.0 us, estimated at 9.5.
    {Op::wgrad,
     Family::stream,
     Variant::nchw_s2,
     Kind::half,
     kAnyTile,
     0,
     false,
     1.23,
     {Of::N, 0, 202},
     {Of::us, 0, 11.3}},
    {Op::dgrad, Family::strip, Variant::nchw, Kind::single, 7, 8, false, 0.88, {}, {}},
    {Op::fprop, Family::strip, Variant::nchw, Kind::single, 1, 8, false, 1.13, {Of::plane, 1301}, {}},
    {Op::dgrad, Family::tma, Variant::halo, Kind::half, 256, 96, false, 0.91, {Of::K, 0, 30}, {}},
    {Op::dgrad,
     Family::tma,
     Variant::halo,
     Kind::half,
     256,
     64,
     true,
     0.88,
     {Of::weights, 0, 50000},
     {Of::C, 71},
     {Of::inputs, 1e6}},
    {Op::dgrad, Family::tma, Variant::halo, Kind::half, 256, 96, true, 0.95, {}, {}},
    {Op::dgrad, Family::tma, Variant::im2col, Kind::half, 128, 64, false, 1.07, {Of::us, 20.7}, {Of::plane_fits, 0, 4}},
    // 14x448x6x6 to 224 3x3 in 4 groups 20.0 us, estimated at 11.9.
    {Op::dgrad,
     Family::tma,
     Variant::im2col,
     Kind::half,
     64,
     64,
     false,
     1.15,
     {Of::stride, 0, 1},
     {Of::group_C_fits, 16},
     {Of::inputs, 0, 6e5}},
    // 2x55x222x222 to 21 1x1 s(2,1) d2 33.2 us, estimated at 21.4.
    {Op::fprop,
     Family::tma,
     Variant::im2col,
     Kind::half,
     192,
     128,
     false,
     1.32,
     {Of::taps, 0, 2},
     {Of::inputs, 0, 2.4e7},
     {Of::Q, 81}},
    {Op::fprop,
     Family::tma,
     Variant::im2col,
     Kind::half,
     256,
     64,
     false,
     0.89,
     {Of::inputs, 0, 1.678e7},
     {Of::outputs, 0, 2.3e7},
     {Of::K_over_C, 0.72}},
    {Op::fprop, Family::tma, Variant::im2col, Kind::half, 64, 64, false, 1.06, {Of::C, 54}, {}},
    {Op::fprop, Family::tma, Variant::im2col, Kind::tf32, 256, 160, false, 1.12, {}, {}},
    {Op::fprop,
     Family::tma,
     Variant::im2col,
     Kind::half,
     kAnyTile,
     0,
     true,
     1.07,
     {Of::group_K_fits, 8},
     {Of::N, 0, 4}},
    {Op::fprop, Family::tma, Variant::im2col, Kind::half, 64, 64, true, 1.05, {Of::K, 12}, {}},
    {Op::fprop, Family::tma, Variant::im2col, Kind::tf32, kAnyTile, 0, true, 1.11, {Of::us, 0, 14.07}, {}},
    {Op::fprop, Family::tma, Variant::im2col, Kind::tf32, 256, 160, true, 1.06, {Of::us, 21.5}, {Of::weights, 0, 7e5}},
    // 23x240x6x46 to 120 2x2 s(2,1) in 10 groups 15.8 us, estimated at 9.8.
    {Op::fprop, Family::tma, Variant::im2col, Kind::tf32, 256, 64, true, 1.15, {Of::us, 0, 19}, {}},
    // 10x1664x6x29 to 6656 7x7 d2 757.1 us, estimated at 448.4.
    {Op::wgrad,
     Family::tma,
     Variant::im2col,
     Kind::half,
     kAnyTile,
     0,
     false,
     1.2,
     {Of::inputs, 0, 9e6},
     {Of::groups, 48}},
    // 4x560x4x4 to 280 7x7 s(2,1) in 5 groups 19.2 us, estimated at 14.7.
    {Op::wgrad, Family::tma, Variant::im2col, Kind::tf32, kAnyTile, 0, false, 1.14, {Of::C, 0, 370}, {Of::us, 0, 14.9}},
    // 199x216x10x10 to 8 4x4 s2 53.6 us, estimated at 31.2.
    {Op::dgrad, Family::tma, Variant::lean, Kind::tf32, 64, 128, false, 1.51, {Of::inputs, 2.1e6}, {}},
    // 10x288x22x22 to 6 3x3 10.8 us, estimated at 13.8.
    {Op::dgrad,
     Family::tma,
     Variant::lean,
     Kind::half,
     64,
     128,
     true,
     0.82,
     {Of::K, 0, 31},
     {Of::us, 0, 14.7},
     {Of::inputs, 9.2e5}},
    // 58x149x14x14 to 8 3x3 s2 15.7 us, estimated at 49.9.
    {Op::dgrad, Family::tma, Variant::lean, Kind::tf32, kAnyTile, 0, true, 0.73, {Of::stride, 2}, {Of::K, 0, 15}},
    // 2x471x85x119 to 26 4x4 s2 d(1,3) 34.4 us, estimated at 58.2.
    {Op::dgrad, Family::tma, Variant::lean, Kind::tf32, 128, 128, true, 0.87, {Of::us, 10.3}, {Of::group_K_fits, 0, 2}},
    {Op::dgrad,
     Family::tma,
     Variant::lean,
     Kind::tf32,
     64,
     64,
     true,
     0.9,
     {Of::stride, 0, 1},
     {Of::plane_fits, 0, 2},
     {Of::group_K_fits, 0, 8}},
    {Op::fprop, Family::tma, Variant::lean, Kind::tf32, kAnyTile, 0, false, 0.9, {Of::us, 10.34}, {Of::C, 5}},
    // 23x186x18x18 to 16 7x7 s2 d2 22.9 us, estimated at 36.2.
    {Op::fprop, Family::tma, Variant::lean, Kind::tf32, 64, 32, false, 0.87, {Of::K_over_C, 0, 0.77}, {}},
    // 2x16x56x170 to 56 1x1 s(2,1) 9.6 us, estimated at 14.5.
    {Op::fprop,
     Family::tma,
     Variant::lean,
     Kind::tf32,
     64,
     32,
     false,
     0.86,
     {Of::stride, 2},
     {Of::taps, 0, 2},
     {Of::C, 5}},
    {Op::wgrad,
     Family::tma,
     Variant::lean,
     Kind::half,
     128,
     64,
     true,
     1.16,
     {Of::taps, 0, 2},
     {Of::K, 25},
     {Of::C, 25}},
    {Op::wgrad, Family::tma, Variant::lines, Kind::half, 128, 128, false, 0.92, {Of::group_K_fits, 16}, {Of::H, 0, 18}},
    {Op::wgrad, Family::tma, Variant::lines, Kind::half, kAnyTile, 0, true, 0.89, {Of::us, 8.4}, {Of::K, 0, 13}},
    {Op::dgrad, Family::tma, Variant::raw, Kind::tf32, kAnyTile, 0, true, 0.93, {Of::us, 10.5}, {Of::weights, 0, 9400}},
    {Op::dgrad, Family::tma, Variant::raw, Kind::tf32, 256, 128, true, 1.07, {Of::K, 0, 120}, {Of::N, 0, 96}},
    // 4x192x175x175 1x1 s2 d2 in 3 groups 29.2 us, estimated at 45.6.
    {Op::fprop,
     Family::tma_strict,
     Variant::im2col,
     Kind::strict,
     kAnyTile,
     0,
     true,
     0.87,
     {Of::taps, 0, 2},
     {Of::stride, 2}},
};

constexpr double value_of(Of of, Problem const& p, double ns) {
  auto fits = [](int64_t size) { return double(min64(size & -size, 16)); };
  switch (of) {
    case Of::us:
      return ns / 1000;
    case Of::N:
      return double(p.N);
    case Of::H:
      return double(p.H);
    case Of::W:
      return double(p.W);
    case Of::P:
      return double(p.P());
    case Of::Q:
      return double(p.Q());
    case Of::R:
      return double(p.R);
    case Of::pixels:
      return double(p.N) * double(p.P()) * double(p.Q());
    case Of::plane:
      return double(p.P()) * double(p.Q());
    case Of::in_plane:
      return double(p.H) * double(p.W);
    case Of::taps:
      return double(p.R * p.S);
    case Of::all_taps:
      return double(p.R * p.S * p.groups);
    case Of::stride:
      return double(p.stride_h * p.stride_w);
    case Of::dilation:
      return double(p.dilation_h * p.dilation_w);
    case Of::C:
      return double(p.C_per_group());
    case Of::K:
      return double(p.K_per_group());
    case Of::all_K:
      return double(p.K);
    case Of::K_over_C:
      return double(p.K) / double(p.C);
    case Of::groups:
      return double(p.groups);
    case Of::weights:
      return double(p.K) * double(p.C_per_group() * p.R * p.S);
    case Of::inputs:
      return double(p.N) * double(p.C) * double(p.H) * double(p.W);
    case Of::outputs:
      return double(p.N) * double(p.K) * double(p.P()) * double(p.Q());
    case Of::Q_fits:
      return fits(p.Q());
    case Of::plane_fits:
      return fits(p.P() * p.Q());
    case Of::group_C_fits:
      return fits(p.C_per_group());
    case Of::group_K_fits:
      return fits(p.K_per_group());
    case Of::any:
      break;
  }
  return 1;
}

constexpr double beside_others_ns(Row const& row, Problem const& p, double ns) {
  bool const nhwc = p.C > 1 ? p.x.c == 1 : p.y.c == 1, single = row.dtype == DType::f32;
  auto of_row = [&](Beside const& f) {
    bool const kind = f.kind == Kind::half     ? size_of(row.dtype) == 2
                      : f.kind == Kind::single ? single
                                               : single && p.allow_tf32 == (f.kind == Kind::tf32);
    bool const tile = f.tile_m == kAnyTile || (f.tile_m == row.tile_m && f.tile_n == row.tile_n);
    bool const measured = f.family != Family::pixels || p.groups == 1;  // whose groups were fitted without these
    return measured && f.op == row.op && f.family == row.family && f.variant == row.variant && kind && tile &&
           f.nhwc == nhwc;
  };
  auto within = [&](Range const& r) {
    double const value = r.of == Of::any ? 1 : value_of(r.of, p, ns);
    return value >= r.least && value <= r.most;
  };
  double factor = 1;
  for (Beside const& f : kBeside)
    if (of_row(f) && within(f.a) && within(f.b) && within(f.c)) factor *= f.factor;
  return ns * factor;
}

}  // namespace conv2d_ext
