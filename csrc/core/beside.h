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

// The lines of beside.def: factors of rows of all families, where a problem is within ranges.
namespace beside {

enum class Kind : uint8_t { half, single, tf32, strict };  // types of 16 bits; float32, in any way or in one
enum class Layout : uint8_t { nchw, nhwc };
inline constexpr int any = -1;  // tile

// all_taps: of all groups; weights, inputs, outputs: elements; ..._fits: the largest power of two up to 16 that divides
// it; least: the smaller of C and K; products: multiplications, of 1x1; lines: 1 if channels and filters fill lines of
// 64, one_by_one: of dense 1x1 with a stride of 1; else 0. C and K are of a group; us is the row's estimate without the
// table.
enum class Of : uint8_t {
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
  least,
  products,
  lines,
  one_by_one,
  groups,
  weights,
  inputs,
  outputs,
  Q_fits,
  plane_fits,
  group_C_fits,
  group_K_fits
};
struct Bound {
  Of of = Of::us;
  bool most = false;
  double value = -1;
};
constexpr Bound operator>=(Of of, double least) { return {of, false, least}; }
constexpr Bound operator<=(Of of, double most) { return {of, true, most}; }

struct Line {
  Family family;
  Variant variant;
  Op op;
  Kind kind;
  int tile_m, tile_n;
  Layout layout;
  double factor;
  Bound bounds[4];
};

using enum Of;
inline constexpr Line kLines[] = {
#define BESIDE(family, variant, op, kind, tile_m, tile_n, layout, factor, ...) \
  {Family::family, Variant::variant, Op::op, Kind::kind, tile_m, tile_n, Layout::layout, factor, {__VA_ARGS__}},
#include "beside.def"
#undef BESIDE
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
    case Of::least:
      return double(min64(p.C, p.K));
    case Of::products:
      return double(p.N) * double(p.P()) * double(p.Q()) * double(p.C) * double(p.K);
    case Of::lines:
      return p.C % 64 == 0 && p.K % 64 == 0 ? 1 : 0;
    case Of::one_by_one:
      return p.R * p.S * p.groups * p.stride_h * p.stride_w == 1 ? 1 : 0;
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
  }
  return 1;
}

constexpr bool is_of(Line const& l, Row const& row, Problem const& p) {
  if (l.family != row.family || l.variant != row.variant || l.op != row.op) return false;
  if (l.tile_m != any && (l.tile_m != row.tile_m || l.tile_n != row.tile_n)) return false;
  if ((l.layout == Layout::nhwc) != (p.C > 1 ? p.x.c == 1 : p.y.c == 1)) return false;
  if (l.kind == Kind::half) return size_of(row.dtype) == 2;
  return row.dtype == DType::f32 && (l.kind == Kind::single || p.allow_tf32 == (l.kind == Kind::tf32));
}

constexpr bool holds(Bound const& b, Problem const& p, double ns) {
  double const value = value_of(b.of, p, ns);
  return b.most ? value <= b.value : value >= b.value;
}

}  // namespace beside

constexpr double beside_others_ns(Row const& row, Problem const& p, double ns) {
  if (row.family == Family::pixels && p.groups > 1) return ns;  // groups were fitted without the lines
  double factor = 1;
  for (beside::Line const& l : beside::kLines) {
    bool all = is_of(l, row, p);
    for (beside::Bound const& b : l.bounds) all = all && holds(b, p, ns);
    if (all) factor *= l.factor;
  }
  return ns * factor;
}

}  // namespace conv2d_ext
