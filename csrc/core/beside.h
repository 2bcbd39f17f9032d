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

// Single rows of all families, where a problem is within two ranges: factors that were right several times as often as
// wrong in each half of 27,000 timed problems and in draws that asked for doubtful choices (docs/tuning/planner.md).
// all_taps: of all groups
enum class Of : uint8_t { any, us, pixels, plane, taps, all_taps, stride, C, K, K_over_C, groups };
struct Range {
  Of of = Of::any;
  double least = 0, most = 1e18;
};
struct Beside {
  Op op;
  Family family;
  Variant variant;
  int bytes, tile_m, tile_n;
  bool nhwc;
  double factor;
  Range a, b;
};
inline constexpr Beside kBeside[] = {
    {Op::fprop, Family::tma, Variant::lean, 4, 64, 64, false, 1.07, {Of::us, 0, 7}, {}},
    {Op::dgrad, Family::tma, Variant::lean, 4, 64, 128, true, 0.87, {Of::pixels, 0, 1550}, {Of::us, 6}},
    {Op::wgrad, Family::tma, Variant::lean, 4, 64, 64, false, 0.87, {Of::stride, 2}, {Of::taps, 0, 1}},
    {Op::fprop, Family::tma, Variant::im2col, 2, 192, 128, false, 0.9, {Of::all_taps, 0, 1}, {}},
    {Op::fprop, Family::tma, Variant::im2col, 2, 64, 128, false, 1.12, {Of::all_taps, 0, 1}, {Of::stride, 2}},
    {Op::dgrad, Family::tma, Variant::im2col, 2, 64, 64, false, 1.12, {Of::all_taps, 0, 1}, {}},
    {Op::dgrad, Family::pixels, Variant::nchw, 2, 128, 256, false, 1.07, {Of::us, 8, 16}, {}},
    {Op::wgrad, Family::pixels, Variant::nchw, 2, 128, 64, false, 1.12, {Of::us, 16, 60}, {}},
    {Op::wgrad, Family::pixels, Variant::nchw, 4, 128, 128, false, 0.93, {Of::pixels, 20000}, {}},
    {Op::wgrad, Family::tma, Variant::lines, 2, 128, 64, true, 0.93, {Of::pixels, 6400}, {Of::us, 11, 36}},
    {Op::wgrad, Family::tma, Variant::lines, 2, 128, 128, true, 0.95, {Of::pixels, 6400}, {Of::us, 11}},
    {Op::wgrad, Family::tma, Variant::lean, 2, 64, 64, true, 1.04, {Of::us, 9, 24}, {Of::all_taps, 0, 1}},
    {Op::fprop, Family::pixels, Variant::any, 2, 32, 32, true, 1.06, {Of::pixels, 0, 200}, {}},
    {Op::wgrad, Family::pixels, Variant::raw, 2, 128, 128, false, 0.9, {Of::C, 128}, {Of::K, 128}},
    {Op::dgrad, Family::tma, Variant::pointwise, 2, 256, 64, false, 1.2, {Of::C, 128}, {}},
    {Op::fprop, Family::pixels, Variant::nchw, 2, 64, 256, false, 1.04, {Of::K_over_C, 0, 1}, {Of::us, 0, 36}},
    {Op::dgrad, Family::pixels, Variant::nchw, 2, 64, 256, false, 1.04, {Of::us, 0, 17}, {}},
    {Op::fprop, Family::pixels, Variant::narrow, 2, 256, 64, false, 1.07, {Of::us, 0, 13}, {}},
    {Op::dgrad, Family::pixels, Variant::narrow, 2, 256, 64, false, 1.07, {Of::pixels, 0, 150}, {}},
    {Op::dgrad, Family::pixels, Variant::lean, 2, 16, 32, true, 1.15, {Of::C, 120}, {}},
    {Op::fprop, Family::pixels, Variant::any, 4, 64, 64, false, 1.15, {Of::C, 0, 180}, {}},
    {Op::wgrad, Family::pixels, Variant::any, 4, 64, 64, false, 1.15, {Of::plane, 0, 200}, {}},
    {Op::wgrad, Family::pixels, Variant::any, 4, 32, 32, true, 1.15, {Of::K, 48}, {Of::us, 5.7}},
    {Op::wgrad, Family::pixels, Variant::any, 2, 32, 32, true, 1.15, {Of::K, 64}, {Of::us, 6.5}},
    {Op::fprop, Family::stem, Variant::halo, 4, 64, 32, true, 0.85, {Of::us, 0, 16}, {}},
    {Op::wgrad, Family::grouped, Variant::nchw, 2, 64, 64, false, 0.93, {Of::C, 24}, {}},
    {Op::dgrad, Family::depthwise, Variant::nchw, 4, 0, 2, false, 0.87, {Of::stride, 0, 1}, {Of::us, 0, 25}},
    {Op::wgrad, Family::depthwise, Variant::nchw, 2, 0, 0, false, 0.85, {Of::K_over_C, 2}, {Of::taps, 9, 25}},
    {Op::wgrad, Family::depthwise, Variant::nchw, 2, 0, 1, false, 1.07, {Of::pixels, 0, 1800}, {}},
    {Op::wgrad, Family::column, Variant::nhwc_s2, 4, 3, 3, true, 0.85, {Of::us, 20}, {Of::K_over_C, 0, 1}},
    {Op::fprop, Family::stream, Variant::nchw, 4, 3, 3, false, 1.07, {Of::taps, 9}, {}},
    {Op::dgrad, Family::stream, Variant::nchw, 4, 3, 3, false, 1.07, {Of::taps, 9}, {}},
    {Op::dgrad, Family::strip, Variant::nhwc, 4, 7, 8, true, 0.9, {}, {}},
    {Op::fprop, Family::band, Variant::nchw, 2, 16, 16, false, 1.2, {Of::plane, 200}, {}},
    // 157x240x5x5 to 120 4x4 s4 in 30 groups D 65.8 us, estimated at 24.0.
    {Op::dgrad, Family::grouped, Variant::nchw, 2, 8, 8, true, 2.7, {Of::stride, 16}, {Of::taps, 16}},
    {Op::wgrad, Family::depthwise, Variant::nchw, 4, 0, 2, false, 0.75, {Of::us, 25}, {Of::plane, 5000}},
    {Op::wgrad, Family::depthwise, Variant::nchw, 4, 0, 1, false, 0.85, {Of::us, 15}, {Of::C, 0, 2}},
    {Op::wgrad, Family::stream, Variant::nchw, 4, 5, 5, false, 1.15, {Of::us, 30}, {Of::plane, 5000}},
    {Op::wgrad, Family::stream, Variant::nchw_s2, 2, 9, 9, false, 0.75, {Of::us, 0, 26}, {}},
    {Op::fprop, Family::depthwise, Variant::nchw, 2, 0, 1, false, 1.15, {Of::us, 18}, {Of::C, 0, 1}},
    {Op::wgrad, Family::depthwise, Variant::nhwc, 2, 0, 4, true, 0.87, {Of::us, 10, 40}, {Of::groups, 0, 90}},
    {Op::dgrad, Family::tma, Variant::lean, 2, 64, 64, true, 0.9, {Of::plane, 0, 49}, {}},
    {Op::dgrad, Family::tma, Variant::lean, 2, 64, 64, false, 0.93, {Of::pixels, 0, 3136}, {}},
    {Op::dgrad, Family::tma, Variant::lean, 4, 64, 64, false, 1.15, {Of::pixels, 3200}, {}},
    {Op::fprop, Family::pixels, Variant::raw, 4, 64, 64, false, 0.9, {}, {}},
    {Op::fprop, Family::stem, Variant::nhwc, 4, 32, 64, true, 1.25, {Of::K, 48}, {}},
    {Op::wgrad, Family::simt, Variant::any, 4, 256, 8, false, 1.25, {Of::stride, 90}, {}},
    {Op::wgrad, Family::tma, Variant::im2col, 2, 64, 64, true, 1.5, {Of::K, 0, 8}, {Of::C, 500}},
    {Op::fprop, Family::tma, Variant::im2col, 2, 64, 64, false, 1.25, {Of::groups, 2}, {Of::taps, 2, 4}},
    {Op::fprop, Family::depthwise, Variant::nhwc, 2, 0, 1, true, 1.12, {Of::us, 9}, {Of::stride, 0, 2}},
    {Op::fprop, Family::pixels, Variant::any, 4, 32, 32, true, 1.3, {Of::C, 512}, {}},
    {Op::dgrad, Family::stream, Variant::nchw, 2, 9, 9, false, 0.8, {Of::us, 0, 40}, {}},
    {Op::fprop, Family::stem, Variant::lean, 4, 16, 64, true, 0.9, {Of::us, 10}, {Of::C, 2}},
    {Op::dgrad, Family::igemm, Variant::nhwc, 2, 128, 128, true, 1.1, {}, {}},
    // 68 tiles, of which 132 blocks have uneven shares: 1x2048x65x65 to 256 3x3 d6 103 us, estimated at 73.
    {Op::fprop, Family::tma, Variant::im2col, 2, 128, 128, true, 1.3, {Of::C, 1024}, {Of::pixels, 4224, 4352}},
};

constexpr bool within(Range const& r, Problem const& p, double ns) {
  auto of = [&]() -> double {
    switch (r.of) {
      case Of::us:
        return ns / 1000;
      case Of::pixels:
        return double(p.N) * double(p.P()) * double(p.Q());
      case Of::plane:
        return double(p.P()) * double(p.Q());
      case Of::taps:
        return double(p.R * p.S);
      case Of::all_taps:
        return double(p.R * p.S * p.groups);
      case Of::stride:
        return double(p.stride_h * p.stride_w);
      case Of::C:
        return double(p.C_per_group());
      case Of::K:
        return double(p.K_per_group());
      case Of::K_over_C:
        return double(p.K) / double(p.C);
      case Of::groups:
        return double(p.groups);
      case Of::any:
        break;
    }
    return 1;
  };
  double const value = of();
  return value >= r.least && value <= r.most;
}

constexpr double beside_others_ns(Row const& row, Problem const& p, double ns) {
  bool const nhwc = p.C > 1 ? p.x.c == 1 : p.y.c == 1;
  for (Beside const& f : kBeside)
    if (f.op == row.op && f.family == row.family && f.variant == row.variant && f.bytes == size_of(row.dtype) &&
        f.tile_m == row.tile_m && f.tile_n == row.tile_n && f.nhwc == nhwc && within(f.a, p, ns) && within(f.b, p, ns))
      return ns * f.factor;
  return ns;
}

}  // namespace conv2d_ext
