// The estimates of rows of one channel a group, with what was measured beside each other: their own estimates, which
// are of large layers, leave that out.
#pragma once

#include "any_filter.h"
#include "band.h"
#include "band_blocks.h"
#include "band_split.h"
#include "column.h"
#include "depthwise.h"
#include "few_sums.h"
#include "lanes.h"
#include "lanes_choice.h"
#include "lines.h"
#include "met.h"
#include "met_measured.h"
#include "near.h"
#include "products.h"
#include "quads.h"
#include "stream.h"
#include "stream_estimate.h"
#include "strip_blocks.h"
#include "strip_rows.h"
#include "strip_sums.h"
#include "toeplitz_pairs.h"
#include "walk.h"

namespace conv2d_ext {

// wgrad with stride 2 that cuda/stream_sums.cuh computes: its estimate is as measured.
constexpr bool is_strided_sums(Row const& row, Problem const& p) {
  return row.family == Family::stream && row.op == Op::wgrad && row.tile_k == 2 && p.dtype != DType::f32 &&
         stream_tile(row, row.op, p, h200_sxm).sums.blocks > 0;
}

// Depthwise rows, as measured beside each other: what their own estimates, which are of large layers, leave out.
constexpr Estimate depthwise_as_measured(Row const& row, Problem const& p, Estimate e) {
  bool const f32 = row.dtype == DType::f32, sums = row.op == Op::wgrad;
  bool const stream = row.family == Family::stream, tiles = row.family == Family::depthwise && row.tile_m > 0;
  if (stream && !sums && f32 && row.tile_m == 7 && e.ns < 9500) e.ns = 9500;
  // Every other image begins off a pair of elements, or three of four off 16 bytes.
  int64_t const from_n = row.op == Op::dgrad ? p.y.n : p.x.n;
  if (stream && !sums && !f32 && from_n % 2 != 0) e.ns *= p.W > 128 ? 2.2 : p.stride_w == 1 ? 1.25 : 1;
  if (stream && !sums && f32 && row.tile_m == 7 && p.stride_w == 1 && p.P() > 1 && from_n % 4 != 0) e.ns *= 2.5;
  if (is_nhwc(row.variant) || is_small_stream(row, p) || is_strided_sums(row, p)) return e;
  bool const odd = p.W % 2 != 0 || p.Q() % 2 != 0, smaller = p.R != row.tile_m || p.S != row.tile_m;
  if (stream && f32 && (!sums || row.tile_m > 3)) e.ns *= 1.25;
  // Long rows off 16 bytes (2x64x191x191 3x3 24.0 us, estimated at 19.5; 8x72x130x130 W 63.6, 42.2).
  if (stream && f32 && row.tile_m == 3 && p.stride_w == 1)
    e.ns *= !sums ? (p.W % 2 != 0 && p.W > 128 ? 1.15 : 1) : p.W % 4 == 2 && p.W > 64 ? 1.3 : 1;
  // Beside what comes straight from L1 (few.h): filters smaller than the row's, odd rows, few outputs.
  if (stream && f32 && smaller && odd && (!sums || row.tile_m > 3)) e.ns *= 1.4;
  if (stream && f32 && smaller && !odd && !sums && e.ns < 15000) e.ns = 3000 + e.ns * 1.28;
  if (stream && !f32 && sums && row.tile_k == 2 && (row.tile_m == 3 || odd)) e.ns = 3000 + e.ns * 1.08;
  if (stream && !f32 && sums && row.tile_m == 3 && row.tile_k == 1) e.ns *= 1.25;
  if (stream && !f32 && !sums && e.ns < 11000) e.ns += e.ns < 7000 ? 3000 : 1300;
  if (stream && !f32 && !sums && smaller && row.tile_m == 3) e.ns *= 1.15;
  if (tiles && row.op == Op::dgrad && row.tile_k == 2) return e;
  // Images of one row are beginnings of walks alone.
  if (stream && !f32 && p.P() == 1 && row.tile_m > 3) e.ns *= sums ? 1.4 : 1.7;
  if (tiles && row.tile_m == 7) e.ns *= 1.25;
  // A walk's steps follow each other, however few walks there are.
  double const least = stream && f32 && sums ? (row.tile_m == 3 ? 11500 : 20000) : tiles && row.tile_m == 7 ? 13000 : 0;
  if (e.ns < least) e.ns = least;
  // Rows that begin off pairs, copied one by one.
  if (tiles && odd && max64(p.W, p.Q()) > 32 && row.tile_k == 2) e.ns *= 1.1;
  return e;
}

// Depthwise rows of up to 30 million elements, as measured beside lanes.h and near.h.
constexpr double beside_few_outputs_ns(Row const& row, Problem const& p, double ns) {
  bool const f32 = row.dtype == DType::f32, strided = row.tile_k == 2, sums = row.op == Op::wgrad;
  bool const fprop = row.op == Op::fprop, dgrad = row.op == Op::dgrad;
  int const R = row.tile_m;
  // What is beyond `from` takes so much longer, up to `most`.
  auto longer = [ns](double share, double from, double most) {
    double const more = share * (ns - from);
    return ns + (more < 0 ? 0 : more < most ? more : most);
  };
  auto at_least = [](double least, double found) { return found < least ? least : found; };
  // fprop and wgrad go through rows of x, dgrad through those of y.
  if (row.family == Family::column && R >= 9) {
    double const rows = double(p.P()) / double(p.H), halo = rows < 0.33 ? 2 : (1 + 1 / rows) / 2;
    if (sums) return R < 13 ? ns : ns * halo * (p.P() <= 20 ? 1.25 : 1);
    return at_least(12500, 6500 + (ns - 6500) * (fprop ? halo : rows) * (R == 13 ? 0.82 : 1));
  }
  if (row.family == Family::column && strided) {
    double const pairs = p.K > p.C && !sums ? 0.82 : 1;  // of filters of a channel
    if (R == 3 && p.K > p.C) return sums ? ns : fprop ? 1500 + 0.85 * ns : f32 ? 0.93 * ns : 3500 + 0.57 * ns;
    if (R == 3)
      return sums || column_choice(row.op, p, R, 2, h200_sxm).road == ColumnRoad::wide
                 ? ns
                 : longer(fprop ? 0.3 : 0.2, 4000, (fprop ? 2500 : 1000) + (f32 ? 0 : 1000 - 500 * dgrad));
    if (R == 7) return ns + (p.K > p.C && fprop && ns < 20000 ? 2000 : 0);
    return column_fives(row.op, p, R, 2) ? ns : ns * (sums ? 0.9 : f32 ? 0.855 : fprop ? 0.82 : 1) * pairs;
  }
  if (row.family == Family::toeplitz) {
    // Filters of nine rows do not stay in registers: 1x64x161x161 F 29.9 us, estimated at 17.0.
    if (fprop && R > 7) return ns < 18000 ? ns * 1.3 : at_least(23400, ns);
    if (sums || R > 7) return ns;
    if (R != 3) return ns + (R == 5 ? 1100 : 1900);
    return ns + 600 - (ns > 9000 && ns < 32000 ? (ns - 9000) * 0.1 : 0);  // of what L2 holds
  }
  if (row.family == Family::stream && f32) {
    if (sums) return R == 3 ? longer(0.3, 12000, 1500) : longer(0.6, 11000, 1600 + 0.1 * ns);
    return at_least(R == 3 ? 7000 : 8000, fprop && R == 5 ? longer(0.35, 6500, 2400) : ns);
  }
  if (row.family == Family::stream) {
    if (sums) return at_least(9500, R == 5 ? ns * 1.12 : R == 3 && !strided ? ns * 0.91 : ns);
    return strided ? longer(0.5, 9000, 0.17 * ns) : ns;
  }
  if (row.family != Family::depthwise || p.dtype == DType::f64) return ns;
  if (is_walk(row)) return !strided || sums || R == 3 ? ns : R == 5 ? ns * (fprop ? 0.86 : 0.81) : ns + 2500;
  if (R == 0 && !is_nhwc(row.variant) && few_outputs_side(p) <= 7)
    return f32 ? ns * 1.05 : fprop ? longer(0.2, 4500, 1e9) : ns * 1.02;
  return is_nhwc(row.variant) || R != 3 || strided ? ns : ns + 1200;
}

constexpr Estimate beside_few_outputs(Row const& row, Problem const& p, Estimate e) {
  e.ns = beside_few_outputs_ns(row, p, e.ns);
  return e;
}

// Two filters a channel with stride 1 by column.cuh, as measured: 7x7 of rows that threads' seven columns do not fill
// takes longer (64x40x80x80 F 118.6 us, estimated at 93.1; 4x320x64x64 W 93.1, 60.2), 5x5 of such rows less.
constexpr double column_pairs_share(Row const& row, Problem const& p, double ns) {
  bool const sums = row.op == Op::wgrad, off = (row.op == Op::dgrad ? p.W : p.Q()) % 7 != 0;
  if (p.K == p.C || row.tile_k == 2 || row.tile_m == 3 || !off) return 1;
  if (row.tile_m == 7) return sums ? (p.K >= 384 ? 1.35 : 1) : ns > 25000 ? 1.2 : 1.08;
  return ns < 25000 ? 1 : row.op == Op::fprop ? 0.83 : 0.9;
}

// Of bands over planes in 16-bit types, dilations as measured: rows of whole vectors, or pairs, take less than others
// (32x96x56x56 5x5 dilation 3 F 46.9 us, W 62, estimated at 68.9 and 92.5 without).
constexpr double dilated_band_share(Row const& row, Problem const& p) {
  bool const sums = row.op == Op::wgrad, apart = p.dilation_h > 1 || p.dilation_w > 1;
  if (is_nhwc(row.variant) || p.dtype == DType::f32 || !apart || p.stride_h * p.stride_w > 1) return 1;
  if (!sums && row.tile_m == 16) return 1;
  return p.W % 8 == 0 ? (sums ? 0.72 : 0.76) : p.W % 2 == 0 ? (sums ? 0.78 : 0.9) : sums ? 1.2 : 1;
}

// strip_rows.cuh over NCHW: results of rows that begin off 16 bytes, or end within a thread's columns, are stored one
// by one (64x90x14x14 9x9 37.8 us, estimated at 24.5 without; 6x232x79x79 124, 81).
constexpr double strip_stores_ns(Row const& row, Problem const& p) {
  if (is_nhwc(row.variant)) return 0;
  bool const backward = row.op == Op::dgrad;
  int64_t const W = backward ? p.W : p.Q();
  double const outputs = double(p.N) * double(W) * (backward ? double(p.C) * double(p.H) : double(p.K) * double(p.P()));
  if (W % 4 != 0) return outputs * (W <= 16 ? 0.0105 : W > 100 ? 0.0022 : W % 2 == 0 ? 0.0035 : 0.0045);
  return W % 8 != 0 && W <= 32 ? outputs * 0.001 : 0;
}

// Depthwise wgrad of 16-bit types by lines over planes, as measured beside the other rows for any filter.
constexpr Estimate lines_of_planes(Row const& row, Problem const& p, Estimate e) {
  if (row.op == Op::wgrad && !is_nhwc(row.variant) && size_of(p.dtype) == 2) e.ns *= 0.95;
  // In channels_last, of few channels: 71x16x61x61 11x1 149 us, estimated at 71, 229x24x12x12 3x1 29.4, 18.5.
  if (row.op == Op::wgrad && is_nhwc(row.variant) && p.dtype == DType::f32 && p.C <= 64 && p.R * p.S <= 90 &&
      e.ns > 14000)
    e.ns *= 1.25;
  // Likewise in 16 bits (43x40x62x62 3x3 s(2,1) 52.9 us, 33.2; 87x16x21x48 1x11 d2 37.7, 18.2).
  if (row.op == Op::wgrad && is_nhwc(row.variant) && size_of(p.dtype) == 2 && p.C <= 48 && p.K == p.C && e.ns > 14000 &&
      e.ns < 60000)
    e.ns *= 1.4;
  return e;
}

// Rows of depthwise, column, toeplitz, strip, stream and band.
constexpr Estimate one_channel_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  switch (row.family) {
    case Family::depthwise:
      if (is_few_sums(row)) {
        // As measured: large filters in float32 (170x32x43x43 11x1 s(2,1) 104 us, estimated at 123).
        Estimate e = few_sums_estimate(row, p, d);
        if (p.dtype == DType::f32 && max64(p.R, p.S) > 7 && e.ns > 10000) e.ns *= 0.92;
        return e;
      }
      if (is_lanes(row)) return lanes_estimate(row, p, d);
      if (is_near(row)) return near_estimate(row, p, d);
      if (is_met(row)) return met_as_measured(row, p, d);
      return beside_few_outputs(row, p,
                                is_lines(row)     ? lines_of_planes(row, p, any_line_estimate(op, p, d))
                                : is_walk(row)    ? walk_estimate(row, op, p, d)
                                : row.tile_m == 0 ? any_filter_estimate(op, p, d)
                                                  : depthwise_as_measured(row, p, depthwise_estimate(row, op, p, d)));
    case Family::column: {
      // As measured: float32 5x5 D with a stride (4x192x64x64 10.8 us, estimated at 17.1).
      Estimate e = column_estimate(row, op, p, d);
      if (op == Op::dgrad && p.dtype == DType::f32 && row.tile_m == 5 && row.tile_k == 2 && e.ns > 12000 &&
          e.ns < 20000)
        e.ns *= 0.8;
      e.ns *= column_pairs_share(row, p, e.ns);
      return beside_few_outputs(row, p, e);
    }
    case Family::toeplitz:
      return beside_few_outputs(row, p, toeplitz_estimate(row, op, p, d));
    case Family::strip:
      if (is_strip_rows(row)) {
        // As measured: columns of taps (16x64x32x128 11x1 26.6 us, estimated at 36).
        double const column = p.S == 1 && !is_nhwc(row.variant) ? 0.9 : 1;
        return {strip_rows_estimate(row, op, p, d).ns * column + strip_stores_ns(row, p), 1};
      }
      if (is_strip_sums(row)) {
        Estimate e = strip_sums_estimate(row, p, d);
        if (is_nhwc(row.variant) && row.tile_m == 4) e.ns *= 1.15;  // as measured (29x416x22x22 13x13 207 us, 143)
        return e;
      }
      return is_nhwc(row.variant) ? strip_lines_estimate(op, p, d) : strip_planes_estimate(op, p, d);
    case Family::stream:
      if (is_products(row)) return products_estimate(p, d);
      if (takes_quads(row, p)) return quads_estimate(row, op, p);
      if (Estimate const runs = runs_estimate(row, op, p, d); runs.ns > 0) return runs;
      return beside_few_outputs(row, p, depthwise_as_measured(row, p, stream_estimate(row, op, p, d)));
    case Family::band:
      if (is_split(row)) return split_estimate(row, op, p, d);
      if (op == Op::wgrad) {
        Estimate e = band_sums_estimate(row, p, d);
        // As measured: large images that are copied one by one (1x392x115x115 5x5 s(2,1) 165 us, estimated at 71).
        bool const singly = p.stride_h * p.stride_w > 1 || p.W % 8 != 0;
        if (!is_nhwc(row.variant) && p.dtype != DType::f32 && singly && p.H > 90 && p.W > 64) e.ns *= 1.3;
        e.ns *= dilated_band_share(row, p);
        return e;
      }
      return {band_estimate(row, op, p, d).ns * dilated_band_share(row, p), 1};
    default:
      return {};
  }
}

}  // namespace conv2d_ext
