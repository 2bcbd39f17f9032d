// Which kernel runs a problem: make_plan enumerates the rows of kernels.def, drops those that do not support the
// problem and takes the cheapest. Pure and constexpr: nothing is read but the arguments. What a family takes and costs
// is in the family's header.
#pragma once

#include <cstdint>

#include "any_filter.h"
#include "band_blocks.h"
#include "band_split.h"
#include "beside.h"
#include "column.h"
#include "depthwise.h"
#include "few_depth.h"
#include "few_sums.h"
#include "gemm.h"
#include "grouped.h"
#include "grouped_any.h"
#include "grouped_few.h"
#include "grouped_parts.h"
#include "grouped_slabs.h"
#include "images.h"
#include "lanes_choice.h"
#include "lines.h"
#include "long_sums.h"
#include "met_measured.h"
#include "near.h"
#include "near_taps.h"
#include "one_by_one.h"
#include "patch.h"
#include "pixel_lines.h"
#include "pixels.h"
#include "pixels_any.h"
#include "pixels_few.h"
#include "pixels_gather_estimate.h"
#include "pixels_phases.h"
#include "pixels_runs.h"
#include "pixels_strict.h"
#include "pixels_wgrad.h"
#include "plain_rows.h"
#include "planes_blocks.h"
#include "products.h"
#include "quads.h"
#include "small_images.h"
#include "staged.h"
#include "stem.h"
#include "stem_blocks.h"
#include "stem_halo.h"
#include "stem_lean.h"
#include "stem_taps.h"
#include "stem_vectors.h"
#include "stem_walks.h"
#include "stream_estimate.h"
#include "strip_blocks.h"
#include "strip_rows.h"
#include "strip_sums.h"
#include "table.h"
#include "tma.h"
#include "tma_lag.h"
#include "tma_planes_tf32.h"
#include "toeplitz_pairs.h"
#include "walk.h"
#include "winograd.h"

namespace conv2d_ext {

// Rows of NCHW that take one filter a channel run K = m * C in m turns, each with every m-th filter: fprop and wgrad.
constexpr int64_t depthwise_turns(Row const& row, Problem const& p) {
  bool const one_filter = (row.family == Family::depthwise && row.tile_m > 0) || row.family == Family::stream ||
                          row.family == Family::strip || row.family == Family::band;
  bool const several = p.C_per_group() == 1 && p.K_per_group() > 1 && p.K_per_group() <= kMostFiltersAChannel;
  return one_filter && !is_nhwc(row.variant) && row.op != Op::dgrad && several ? p.K_per_group() : 1;
}

// The first turn's problem. Another begins so many filters on in w and y; none is aligned better than that allows.
constexpr Problem depthwise_turn(Row const& row, Problem p) {
  int64_t const turns = depthwise_turns(row, p);
  if (turns == 1) return p;
  auto aligned = [&](int align, int64_t step) {
    while (step * size_of(p.dtype) % align != 0) align /= 2;
    return align;
  };
  p.w_align = aligned(p.w_align, p.w.n), p.y_align = aligned(p.y_align, p.y.c);
  p.K /= turns, p.w.n *= turns, p.y.c *= turns;
  return p;
}

// Of tensors that rows of channels_last run on copies of though others need none (replaces_planes), at most.
inline constexpr int64_t kMostReplacedBytes = int64_t(1) << 32;

// Copies that no part of `pack_supports` weighs: patches, many times as large as the image where filters are large or
// padding is far, and copies of filters. Above the first no more than so many times the tensors: 3x3 patches for as
// many filters as channels are 4.5 times as large.
inline constexpr double kFreeCopiedBytes = double(int64_t(1) << 30), kMostCopied = 5;

constexpr bool copies_fit(Row const& row, Problem const& p) {
  double const weights = double(p.K) * double(p.C_per_group()) * double(p.R) * double(p.S) * size_of(p.dtype);
  // Of one channel and one filter to whole vectors of both: 64 times as many.
  if (weights * 64 <= kFreeCopiedBytes && !is_patches(row, p)) return true;
  double const bytes = double(patch_bytes(row, p)) + double(packed_places(packed(row, tma_problem(row, p))).bytes);
  return bytes <= kFreeCopiedBytes || bytes <= kMostCopied * (activation_bytes(p) + weights);
}

constexpr bool supports(Row const& row, Op op, Problem const& p, Device const& d) {
  if (row.op != op || row.dtype != p.dtype) return false;
  if (depthwise_turns(row, p) > 1) return supports(row, op, depthwise_turn(row, p), d);
  if (is_mixed(row, p))
    return activation_bytes(p) <= (replaces_planes(row, p) ? kMostReplacedBytes : kMaxPackedBytes) &&
           supports(row, op, packed_mixed(p).problem, d);
  bool const hopper = d.compute_capability == 90;
  switch (row.family) {
    case Family::simt:
      if (packed_simt(row, p).which.any()) return hopper && pack_supports(row, p);  // pack_sm90.cu
      return d.compute_capability >= 80 && simt_supports(row, op, p);
    case Family::igemm:
      return hopper &&
             ((row.dtype == DType::f32 ? igemm_tf32_supports(op, p) : igemm_supports(p)) || pack_supports(row, p)) &&
             copies_fit(row, p);
    case Family::tma:
    case Family::tma_strict: {
      if (is_winograd(row)) return hopper && winograd_of(op, p, d).tile_m > 0;
      if (row.family == Family::tma_strict && !strict_is_exact(op, p)) return false;
      if (is_tf32_planes(row)) return hopper && tf32_planes_supports(row, p);
      Problem const t = tma_problem(row, p);
      return hopper && (in_place_supports(row, t) || pack_supports(row, t)) && copies_fit(row, p);
    }
    case Family::depthwise:
      if (is_few_sums(row)) return hopper && few_sums_supports(row, p);
      if (is_lanes(row)) return hopper && lanes_supports(row, p);
      if (is_near(row)) return hopper && near_supports(row, p);
      if (is_met(row)) return hopper && met_supports(row, p);
      if (is_walk(row)) return hopper && walk_supports(row, op, p);
      return (hopper || (row.tile_m == 0 && d.compute_capability >= 80)) &&
             (is_lines(row) ? line_supports(row, p) : depthwise_supports(row, p));
    case Family::grouped:
      if (is_planes(row)) return hopper && planes_supports(op, p, d);
      if (is_turned(row)) return hopper && turned_supports(op, p, d);
      if (is_plain(row)) return hopper && plain_supports(op, p, d);
      if (is_plain_rows(row)) return hopper && plain_rows_supports(op, p, d);
      if (is_images(row)) return hopper && image_tile(row, op, p, d).slots > 0;
      if (is_few_groups(row)) return hopper && few_groups(op, p, d).sums > 0;
      if (is_slabs(row)) return hopper && grouped_slabs(op, p, d).shared > 0;
      if (is_group_parts(row)) return hopper && group_parts(row, p).parts > 0;
      return hopper && (grouped_supports(row, op, p) || pack_supports(row, p));
    case Family::column:
      return hopper && column_supports(row, op, p);
    case Family::toeplitz:
      return hopper && toeplitz_supports(row, op, p) && toeplitz_sums_fit(row, op, p);
    case Family::strip:
      return hopper && (is_strip_sums(row)   ? strip_sums_supports(row, p)
                        : is_strip_rows(row) ? strip_rows_supports(row, op, p)
                                             : strip_supports(row, op, p));
    case Family::stream:
      if (is_products(row)) return hopper && products_tile(p, h200_sxm).used;
      return hopper && (stream_supports(row, p) || takes_quads(row, p));
    case Family::band:
      return hopper && (is_split(row) ? split_supports(row, op, p) : band_supports(row, op, p));
    case Family::stem:
      return hopper && (is_stem_lean(row)      ? stem_lean_supports(op, p)
                        : is_stem_halo(row)    ? stem_halo_supports(op, p)
                        : is_stem_taps(row)    ? stem_taps_supports(op, p, d)
                        : is_stem_vectors(row) ? stem_vectors_supports(op, p)
                                               : stem_supports(row, op, p, h200_sxm));
    case Family::pixels:
      if (is_few_depth(row)) return hopper && few_depth_supports(op, p);
      if (is_small_images(row)) return hopper && !p.allow_tf32 && small_images_supports(p);
      if (is_few_pixels(row)) return hopper && few_pixels_supports(row, p);
      if (is_strict_pixels(row)) return hopper && strict_pixels_supports(row, p, d);
      if (is_any_pixels(row)) return hopper && any_pixels_supports(row, op, p);
      if (is_pixel_flow(row)) return hopper && pixel_flow_supports(row, op, p);
      if (is_pixel_phases(row)) return hopper && pixel_phases_supports(op, p);
      if (is_pixel_halves(row)) return hopper && pixel_halves_supports(row, p);
      if (is_pixel_pairs(row)) return hopper && pixel_pairs_supports(row, p);
      if (is_pixels_gather(row)) return hopper && pixels_gather_supports(row, p);
      if (is_pixel_runs(row)) return hopper && pixel_runs_supports(row, p);
      if (is_matrix_planes(row)) return hopper && pixel_runs_supports(row, p) && matrix_planes_supports(row, p);
      if (is_pixels_wgrad(row)) return hopper && pixels_wgrad_supports(row, p);
      return hopper && (is_nhwc(row.variant) ? pixel_lines_supports(row, p) : pixels_supports(row, op, p));
  }
  return false;
}

// Of a row that supports the problem: the tensors that it runs on copies of.
constexpr Packing packing(Row const& row, Problem const& p) {
  if (is_mixed(row, p)) return packed_mixed(p).which;
  if (row.family != Family::tma && row.family != Family::tma_strict && row.family != Family::grouped &&
      row.family != Family::simt && row.family != Family::igemm)
    return {};
  if (is_winograd(row)) return {};
  Packing which = packed(row, tma_problem(row, p)).which;
  which.x |= is_patches(row, p);
  return which;
}

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

// wgrad of a few rows of an image in 16-bit types by rows as they lie, as measured beside packed ones.
constexpr double small_plain_share(Problem const& p) {
  if (size_of(p.dtype) != 2 || p.N * p.P() * p.Q() > 1000 || (p.C_per_group() >= 48 && p.stride_w == 1)) return 1;
  return p.Q() <= 14 ? 0.91 : p.stride_w > 1 ? 0.65 : 0.83;
}

// Lines in channels_last, as measured: ns more, of wgrad beside merged groups, of dgrad of small layers with a stride.
constexpr double lines_as_measured_ns(Row const& row, Problem const& p, double ns) {
  if (row.family != Family::grouped || row.variant != Variant::lines || p.x.c != 1) return 0;
  bool const strided = p.stride_w > 1;
  if (row.op == Op::dgrad) return strided && p.dtype != DType::f32 && p.C_per_group() == 24 && ns < 20000 ? 4500 : 0;
  if (row.op == Op::fprop) return 0;
  // Groups off 16 bytes, which multiply what their results meet (20 a group, 32x320x28x28 35.7 us, estimated at 44.0).
  bool const shared = p.C_per_group() % 8 == 4 && p.C_per_group() > 8;
  if (p.dtype != DType::f32) return strided ? 1800 : shared && ns > 24000 ? -0.15 * ns : 900;
  return p.allow_tf32 && p.C_per_group() < 16 && ns < 40000 ? ns * (strided ? 0.2 : 0.12) : 0;
}

// Rows over groups, as measured beside each other: how much longer they take than was estimated.
constexpr double groups_as_measured(Row const& row, Problem const& p) {
  bool const strided = p.stride_w > 1, f32 = p.dtype == DType::f32, halo = is_halo(row.variant);
  int64_t const C = p.C_per_group(), line = 128 / size_of(p.dtype);
  if (is_planes(row) || is_turned(row) || is_plain(row) || is_plain_rows(row)) return 1;
  if (is_images(row) || is_slabs(row) || is_few_groups(row)) return 1;
  if (row.family == Family::grouped && row.variant == Variant::lines && strided && !grouped_planar(p)) {
    if (row.op == Op::wgrad) return !f32 ? (C == 16 && p.Q() <= 16 ? 1.03 : 0.93) : p.allow_tf32 && C >= 16 ? 1.3 : 1;
    return row.op == Op::fprop && f32 && p.allow_tf32 && C >= 16 ? 0.86 : 1;
  }
  bool const planar_lines = row.family == Family::grouped && row.variant == Variant::lines && grouped_planar(p);
  if (planar_lines && row.op == Op::fprop && strided && p.W <= 28) return f32 && p.W <= 14 ? 0.75 : 0.85;
  if (planar_lines && row.op == Op::dgrad && strided && !f32) return 0.91;
  if (planar_lines && row.op == Op::wgrad && f32 && p.allow_tf32) return 1.1;
  // Beside whole small images.
  if (row.family == Family::grouped && row.op == Op::wgrad && !f32 && !planar_lines && C == 16 && p.Q() <= 16)
    return row.variant == Variant::lines ? 1.1 : 1;
  // NCHW in 16-bit types, turned two pixels at a time.
  if (row.family == Family::grouped)
    return planar_lines && row.op == Op::wgrad && !f32 && !strided && p.W % 2 == 0 && p.H * p.W % 8 != 0 ? 0.9 : 1;
  if (row.family != Family::tma || p.groups == 1 || sliced_groups(row, p) > 1) return 1;
  auto is = [&](int tile_m, int tile_n) { return row.tile_m == tile_m && row.tile_n == tile_n; };
  if (row.op == Op::wgrad) {
    if (f32) return strided && is(256, 64) && C > 32 ? 0.9 : 1;
    if (row.variant == Variant::narrow) return channel_vectors(p.x, p.x_align, C, 8, p.dtype) ? 0.78 : 0.95;
    if (is(576, 64)) return C > 32 ? 0.83 : 1;
    // Lines that end early; those of whole instructions leave some out.
    bool const across = C % line != 0 && C > 32, whole = C % 16 == 0;
    if (across && strided) return (is(64, 64) ? 1.35 : is(128, 128) ? 1.12 : 1) * (whole ? 0.8 : 1.05);
    if (whole && across && !strided) return is(64, 64) ? 1.1 : 0.77;
    if (is(64, 64)) return strided ? 1.35 : 1.1;
    if (is(256, 64)) return strided && C > 32 ? 1.1 : 1;
    return strided && is(128, 128) ? 1.12 : 1;
  }
  if (f32) {
    // Lines that begin off 32 bytes.
    int64_t const depth = row.op == Op::dgrad ? p.K_per_group() : C;
    if (depth < line && depth % 8 != 0 && is(256, 64) && halo) return row.op == Op::dgrad ? 1.33 : strided ? 1.55 : 1.6;
    bool const across = strided && C > line && C % line != 0;
    if (row.op == Op::dgrad && strided && is(256, 64) && C > 16 && C < 32) return 1.2;
    if (row.op == Op::dgrad) return across && halo ? (is(256, 64) ? 1.3 : is(128, 64) ? 0.86 : 1) : 1;
    if (across) return is(128, 128) ? 1.12 : is(256, 64) ? (halo ? 0.86 : 0.7) : 1;
    if (C <= line && is(256, 64) && halo) return !strided ? 1.05 : C >= 24 ? 1.4 : 1;
    return C < line && is(256, 32) ? 1.2 : 1;
  }
  bool const planes = p.x.c > 1, fprop = row.op == Op::fprop;
  if (planes && strided && is(256, 64)) return fprop ? (halo ? 1.25 : 1.18) : halo ? 1.08 : 1;
  if (strided && is(256, 64) && halo) return 1.15;
  // Small layers.
  if (fprop && C <= 32 && planes && is(64, 64)) return 1.3;
  if (fprop && C <= 32 && !strided && halo && is(128, 64)) return 1.25;
  if (row.op == Op::dgrad && strided && is(256, 128) && C > line && C % line != 0) return halo ? 1.22 : 1.15;
  if ((!fprop || C <= 32) && !strided && C % line != 0 && C < 96 && is(256, 64) && halo) return 1.15;
  if (!strided && C > line && C <= 96 && is(256, 96) && halo) return 0.85;
  if (row.op == Op::fprop && !strided && C > line && C % line == 0 && is(128, 128)) return 1.15;
  return C < line && C > 32 && ((is(128, 64) && halo) || is(64, 64)) ? 1.2 : 1;
}

// grouped_lines.cuh's 3x3 in channels_last in float32, as measured since nothing is divided in its loop, beside others
// (TF32 8x96x28x28 in 4 groups F 12.4 us, 16.4 by 256x64; strict 8x64x28x28 s2 in 4 11.5, 13.2).
constexpr double lines_of_3x3(Row const& row, Problem const& p, double ns) {
  bool const lines = row.family == Family::grouped && row.variant == Variant::lines && row.op != Op::wgrad;
  if (!lines || p.dtype != DType::f32 || p.R != 3 || p.S != 3 || grouped_planar(p)) return 1;
  return (p.allow_tf32 ? ns > 13000 : ns < 32000) ? 0.95 : 1;
}

// The same of fprop and dgrad by tma, 16-bit types, packed or not, and small layers of TF32.
constexpr double groups_with_packing_ns(Row const& row, Problem const& p, bool packs, double ns) {
  if (row.family == Family::tma && row.variant == Variant::im2col && row.op == Op::fprop && p.dtype == DType::f32 &&
      p.groups > 1 && !packs && p.R * p.S > 1 && p.R * p.S <= 25 && ns < 17000)
    return ns * (row.tile_m == 64 && p.C_per_group() <= 32                  ? 1.13
                 : row.tile_m == 128 && row.tile_n >= 128 && p.stride_w > 1 ? 1.2
                                                                            : 1);
  if (row.family != Family::tma || row.op == Op::wgrad || p.groups == 1 || size_of(p.dtype) != 2) return ns;
  bool const backward = row.op == Op::dgrad;
  if (packs) {
    bool const small = backward && row.tile_m == 64 && row.tile_n == 64 && p.stride_w == 1 && p.C_per_group() <= 64;
    bool const few = !backward && row.tile_m == 64 && row.tile_n == 64;  // 4x432x14x14 in 9 groups 18.2 us, 13.4
    return ns * (p.R * p.S == 1 ? 1.1 : few ? 1.03 : 1) + (small ? 3300 : 0);
  }
  // 32x768x12x12 3x3 s2 in 6 groups 18.3 us by 256x128 halo, estimated at 15.2.
  bool const slow = is_halo(row.variant) && row.tile_n == 128 && p.stride_w > 1 && ns < 26000;
  if (backward && row.tile_m == 256)
    return is_halo(row.variant) && p.stride_w == 1 ? 0.96 * ns + 2000 : slow ? ns : 0.9 * ns;
  return row.tile_m == 192 && row.tile_n == 128 ? 1.08 * ns : ns;
}

// Tiles of few pixels in 16-bit types, filters of several taps: what lines that begin off 32 bytes take beyond others,
// which the estimates of larger tiles count, for each tap and tile of filters. dgrad's filters have lines of its
// results' channels; those of 16 bytes take 8 ns each.
constexpr double early_lines_ns(Row const& row, Problem const& p, bool packs_filters) {
  bool const lean = row.variant == Variant::lean, backward = row.op == Op::dgrad;
  if (row.op == Op::wgrad || row.tile_m > 128 || size_of(p.dtype) != 2 || p.R * p.S == 1 || p.groups > 1) return 0;
  if (row.tile_m != 64 && (lean || !backward || row.variant != Variant::im2col)) return 0;
  double const taps = double(p.N) * double(backward ? p.H * p.W : p.P() * p.Q()) * double(p.R * p.S);
  int64_t const depth = backward ? p.K : p.C, results = backward ? p.C : p.K;
  double ns = depth % 16 == 8 && (lean || !backward) ? taps * double(ceil_div(results, row.tile_n)) * 0.05 : 0;
  // So do lean's, less so, where no block has an SM for itself (32x40x27x23 to 64 3x3 21.4 us, estimated at 9.9).
  bool const off =
      lean && !packs_filters && results < 64 && (results % 16 == 8 || results == 16) && lean_tiles(row, p) > 132;
  if (backward && (results <= 8 || off)) {
    int64_t const phases = lean ? 1 : p.stride_h * p.stride_w;
    ns += taps * double(ceil_div(depth, 64)) * (results <= 8 ? 8 : 6) * 64 / double(row.tile_m * phases) / 132;
  }
  return ns;
}

// simt.cuh over NCHW: planes that are no multiple of a vector, and pixels of a stride's phases, are stored by single
// elements, which nothing hides.
constexpr double simt_single_stores_ns(Row const& row, Problem const& p, int split_k, Device const& d) {
  bool const single = row.op == Op::fprop
                          ? p.y.w == 1 && p.y.c > 1 && p.P() * p.Q() % (16 / size_of(p.dtype)) != 0
                          : row.op == Op::dgrad && p.dtype == DType::f32 && p.stride_w > 1 && p.x.w == 1 && p.x.c > 1;
  if (!single || split_k > 1) return 0;
  Gemm const g = gemm_of(row.op, p);
  int64_t const tiles = ceil_div(g.M, row.tile_m) * ceil_div(g.N, row.tile_n) * g.batches;
  double const filled = double(min64(g.N, row.tile_n)) * double(row.tile_m);
  return double(ceil_div(tiles, d.sm_count)) * filled * 0.25;
}

constexpr Estimate grouped_measured(Row const& row, Op op, Problem const& p, Packed const& q, Device const& d) {
  if (row.variant != Variant::lines)
    return op == Op::wgrad ? grouped_sums_any_estimate(row, p, d) : grouped_any_estimate(op, p, d);
  return op == Op::wgrad ? grouped_estimate(row, op, q.problem, d)
                         : grouped_lines_any_estimate(op, q.problem, d, q.which.any());
}

// SIMT's estimate of dgrad has all phases meet as many taps as one does at most: the share of its time where most meet
// fewer, as measured.
constexpr double simt_phases_share(Op op, Problem const& p) {
  if (op != Op::dgrad || p.groups > 1 || (p.stride_h == 1 && p.stride_w == 1)) return 1;
  Gemm const g = gemm_of(op, p);
  if (g.batches * g.depth == 0) return 1;
  double const share = double(p.R) * double(p.S) * double(p.K) / (double(g.batches) * double(g.depth));
  return share < 0.58 ? 0.65 + 0.6 * share : 1;
}

// wgrad of several filters a channel: the share of a turn that later ones do without. They find in L2 what the first
// one has read, and begin while the one before ends (11x48x80x80 to 192 1x3 49.4 us, estimated at 82.9 as four alike).
constexpr double sums_turn_share(Row const& row, Problem const& p) {
  double const elements =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  if (p.C >= 800)  // 69x1163x6x6 to 4652 5x5 90.7 us, estimated at 55.5
    return row.family == Family::stream && size_of(p.dtype) == 2 ? -0.4 : 0;
  if (elements * size_of(p.dtype) > 70e6) return 0;
  if (row.family == Family::band) return 0.35;
  if (row.family == Family::strip) return 0.4;
  return row.family == Family::stream ? (row.tile_m == 5 ? 0.15 : 0.45) : 0;
}

constexpr Estimate estimate_apart(Row const& row, Op op, Problem const& p, Device const& d) {
  if (int64_t const turns = depthwise_turns(row, p); turns > 1) {
    Estimate e = estimate_apart(row, op, depthwise_turn(row, p), d);
    double const begun = op == Op::wgrad ? e.ns * sums_turn_share(row, p) : e.ns * 0.4 < 3300 ? e.ns * 0.4 : 3300;
    e.ns = e.ns * double(turns) - begun * double(turns - 1);
    return e;
  }
  if (is_mixed(row, p)) {
    Packed const q = packed_mixed(p);
    Estimate e = estimate_apart(row, op, q.problem, d);
    e.ns += replaces_planes(row, p) ? packing_planes_ns(op, p, q) : packing_ns(op, p, q);
    // As measured: 32x64x57x57 15x15 60.4 us, by band 53.8, both estimated at 56.
    if (row.family == Family::stream && row.tile_m == 15) e.ns += 5000;
    return e;
  }
  switch (row.family) {
    case Family::tma:
    case Family::tma_strict:
    case Family::grouped:
    case Family::simt: {
      if (is_planes(row) || is_turned(row)) {
        Estimate e = is_planes(row) ? planes_estimate(op, p, d) : turned_estimate(op, p, d);
        // As measured beside packed rows: 1x1008x14x14 3x3 s2 in 21 groups D 12.8 us, 64x128 18.7, both estimated
        // at 16.
        if (op != Op::wgrad && p.stride_w > 1 && p.dtype != DType::f32) e.ns *= 0.97;
        return e;
      }
      if (is_winograd(row)) return {winograd_of(op, p, d).ns, 1};
      if (is_plain(row)) return {plain_estimate(p, d).ns * small_plain_share(p), 1};
      if (is_plain_rows(row)) return plain_rows_estimate(op, p, d);
      if (is_images(row)) return images_estimate(row, op, p, d);
      if (is_few_groups(row)) return {few_groups(op, p, d).ns, 1};
      if (is_slabs(row)) return {grouped_slabs(op, p, d).ns, 1};
      if (is_group_parts(row)) return {group_parts(row, p).ns, 1};
      if (is_tf32_planes(row)) return tf32_planes_estimate(row, p, d);
      Problem const t = tma_problem(row, p);
      Packed const q = packed(row, t);
      Estimate e = row.family == Family::simt      ? simt_estimate(row, op, q.problem, d)
                   : row.family == Family::grouped ? grouped_measured(row, op, p, q, d)
                                                   : in_place_estimate(row, op, q.problem, d);
      if (is_grouped_sums(row, q.problem)) {
        // As measured: one channel a group (8x1120x5x25 to 4480 7x7 d2 224 us, estimated at 149).
        if (p.C_per_group() == 1 && p.dtype != DType::f32 && row.tile_m == 256 && row.tile_n == 64 && p.R * p.S > 25 &&
            p.x.c != 1 && p.stride_h * p.stride_w == 1)
          e.ns *= 1.55;
        if (q.which.any()) e.ns += packing_ns(op, t, q);
        return e;
      }
      // dgrad with a stride stores single pixels that lie apart, in NCHW.
      if (row.family == Family::simt && row.variant == Variant::any && op == Op::dgrad && p.stride_w > 1 &&
          p.x.w == 1) {
        double const least = double(p.N) * double(p.C) * double(p.H) * double(p.W) * 0.013 + 7500;
        if (e.ns < least) e.ns = least * 0.85 + e.ns * 0.15;  // their order stays
      }
      if (row.family == Family::tma) {
        e.ns += early_lines_ns(row, q.problem, q.which.w);
        e.ns *= long_sums_as_measured(row, op, p, e.split_k) * lag_as_measured(row, op, p, e.split_k);
      }
      // As measured beside pixels_strict.h (267 times).
      if (row.family == Family::tma_strict && op != Op::wgrad && p.R * p.S == 1) e.ns += 2200;
      // As measured: phases of dgrad with filters as they lie (8x256x32x32 s2 23.1 us, estimated at 18.6).
      if (row.variant == Variant::raw_halo && row.tile_m == 128 && p.stride_w > 1 && p.groups == 1) e.ns *= 1.2;
      if (row.family == Family::simt) e.ns += simt_single_stores_ns(row, p, e.split_k, d);
      // Filters that do not lie as the channels of x do (images of one pixel lie both ways) are stored one by one.
      if (row.family == Family::simt && row.variant == Variant::any && op == Op::wgrad && p.x.c == 1 && p.C > 1 &&
          p.w.c > 1)
        e.ns += double(p.K) * double(p.C_per_group() * p.R * p.S) * 0.018;
      // As measured beside rows of the tensor cores.
      if (row.family == Family::simt && p.dtype == DType::f32 && p.allow_tf32) e.ns *= 1.12 * simt_phases_share(op, p);
      if (row.family == Family::simt && row.op == Op::dgrad && size_of(p.dtype) == 2 && p.groups == 1)
        e.ns *= p.R * p.S > 1 ? 1.3 : 1.2;
      e.ns *= dense_as_measured(row, p) * off_sectors(row, q.problem);
      // As measured: tiles that are not added, and filters of lines of groups, which few blocks store.
      if (row.family == Family::tma && row.variant == Variant::im2col && op == Op::wgrad && size_of(p.dtype) == 2 &&
          row.tile_m == 128 && row.tile_n == 128 && p.groups == 1 && p.R * p.S > 1 && e.split_k == 1)
        e.ns *= 0.94;
      // As measured: results in lines of 16 bytes (2x8x19x19 to 1736 4x4 34.0 us, estimated at 16.8). More taps:
      // tma_wgrad_estimate.
      if (row.family == Family::tma && (row.variant == Variant::im2col || row.variant == Variant::lean) &&
          op == Op::wgrad && size_of(p.dtype) == 2 && p.w.c == 1 && t.C_per_group() <= 8 && t.R * t.S < 36)
        e.ns += double(max64(p.K * t.R * t.S - 13000, 0)) * 0.7;
      if (row.family == Family::grouped && row.variant == Variant::lines && op == Op::wgrad && size_of(p.dtype) == 2 &&
          p.x.c != 1)
        e.ns += double(p.K) * double(p.C_per_group() * p.R * p.S) * 0.01;
      e.ns += last_store_ns(row, q.problem, e.split_k);
      e.ns *=
          packed_wgrad_share(row, t, q.which) * groups_as_measured(row, row.family == Family::grouped ? q.problem : t);
      e.ns *= lines_of_3x3(row, q.problem, e.ns);
      if (q.which.any()) e.ns += packing_ns(op, t, q) + (packs_pixels(row, t) ? (row.tile_n == 64 ? 2600 : 1000) : 0);
      e.ns += packed_lean_ns(row, q.problem, q.which, e.ns);
      e.ns += lean_phases_ns(row, t, q.which, e.ns);
      e.ns = groups_with_packing_ns(row, t, q.which.x || q.which.y, e.ns);
      e.ns += lines_as_measured_ns(row, p, e.ns);
      // As measured: with a single step nothing hides single stores.
      if (row.family == Family::tma && row.variant == Variant::im2col && op != Op::wgrad && row.tile_m == 64 &&
          tma_stores_singly(op, q.problem) && p.x.c != 1 && p.R * p.S == 1 &&
          (op == Op::fprop ? p.C_per_group() : p.K_per_group()) * size_of(p.dtype) <= 128)
        e.ns *= 1.2;
      e.ns += patch_ns(row, p);
      e.ns *= one_by_one_as_measured(row, p);
      e.ns = beside_ns(row, p, e.ns);
      return e;
    }
    case Family::igemm: {
      Packed const q = packed(row, p);
      Problem const near = without_far_taps(q.problem).problem;
      Estimate e = row.dtype == DType::f32 ? igemm_tf32_estimate(row, op, near, d) : igemm_estimate(row, op, near, d);
      if (q.which.any()) e.ns += packing_ns(op, p, q);
      // As measured: 16-bit dgrad's phases over planes (17x328x26x12 to 12 7x1 s2 23.5 us, estimated at 20.0).
      if (op == Op::dgrad && p.dtype != DType::f32 && p.x.c != 1 && p.stride_h * p.stride_w > 1) e.ns *= 1.12;
      // Likewise TF32's wgrad of few channels in channels_last (138x1x448x280 to 16 7x7 s7 d2 372 us, estimated at
      // 262).
      if (op == Op::wgrad && p.dtype == DType::f32 && (p.x.c == 1 || p.C == 1) && p.C_per_group() <= 4) e.ns *= 1.4;
      return e;
    }
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
    case Family::stem: {
      if (is_stem_lean(row)) {
        // As measured: 1x1 to one and two channels of large planes (2x64x388x388 to 1 D 44.4 us, estimated at 25.7).
        Estimate e = stem_lean_estimate(op, p, h200_sxm);
        if (op == Op::dgrad && p.dtype == DType::f32 && p.y.c != 1 && p.R * p.S == 1 && e.ns > 22000) e.ns *= 1.3;
        return e;
      }
      if (is_stem_halo(row)) {
        // As measured, in TF32: patches (16x3x224x224 to 96 4x4 s4 26.7 us, estimated at 24.0), small layers
        // (1x3x224x224 to 64 7x7 s4 13.2, in channels_last 12.9, estimated at 16.9), and results over planes whose rows
        // begin off 16 bytes (37x4x84x84 to 128 3x3 154, 76).
        Estimate e = stem_halo_estimate(op, p, h200_sxm);
        if (p.dtype == DType::f32 && p.y.c != 1 && p.Q() % 4 != 0 && p.R * p.S <= 25 && e.ns > 20000)
          e.ns += double(p.N) * double(p.K) * double(p.P()) * double(p.Q()) * 0.0027;
        // In 16 bits, large patches that meet padding (70x3x374x374 to 32 7x7 s7 260 us, estimated at 101).
        if (p.dtype != DType::f32 && p.stride_w >= 5 && p.pad_left > 0 && p.x.c == 1) e.ns *= 2.3;
        if (p.dtype == DType::f32 && p.R == p.stride_h && p.S == p.stride_w)
          e.ns *= 1.08;
        else if (p.dtype == DType::f32 && e.ns < 18000)
          e.ns -= 2500;
        return e;
      }
      if (is_stem_vectors(row)) return {stem_vectors(op, p, h200_sxm).ns, 1};
      if (is_stem_taps(row)) {
        Estimate e{StemTaps(op, p, h200_sxm).ns, 1};
        if (p.R * p.S == 1 && max64(p.C, p.K) <= 64 && p.x.c == 1 && min64(p.C, p.K) < 8)
          e.ns *= max64(p.C, p.K) <= 16 ? 1.28 : 1.1;
        return e;
      }
      if (is_stem_lines(row)) {
        Estimate e = stem_lines_estimate(op, p, h200_sxm);
        // As measured (L52): one channel, strict.
        if (op == Op::dgrad && p.C == 1 && p.y.c == 1 && p.stride_w <= 2 && stem_is_strict(p)) e.ns *= 1.15;
        // As measured: filters of one row over planes (200x16x48x48 to 3 1x7 88.0 us, estimated at 46.1).
        if (op == Op::fprop && p.R == 1 && p.y.c != 1) e.ns *= 1.3 + 0.08 * double(min64(p.S, 8));
        // As measured: strict sums over many planes (2x8x174x174 to 264 7x7 1,066 us, estimated at 715).
        if (op == Op::dgrad && p.K > 128 && p.y.c != 1) e.ns *= stem_is_strict(p) ? 1.35 : 1.2;
        return e;
      }
      if (op == Op::wgrad) return stem_sums_estimate(row, p, h200_sxm);
      if (!stem_is_narrow(row)) {
        Estimate e = stem_tile_estimate(row, op, p, h200_sxm);
        // As measured: long sums of several channels in TF32 (L01 285 us, estimated at 397).
        if (op == Op::fprop && p.dtype == DType::f32 && p.allow_tf32 && p.C > 1 && p.C * p.R * p.S >= 147) e.ns *= 0.82;
        // Likewise: filters that are no whole vectors (8x3x224x224 to 66 3x3 s2 51.6 us, estimated at 32.1).
        if (op == Op::fprop && p.dtype == DType::f32 && p.allow_tf32 && is_nhwc(row.variant) && row.tile_m == 64 &&
            p.K % 4 != 0 && e.ns > 25000)
          e.ns *= 1.5;
        // Likewise: large results of one tap over planes (6x1x338x338 to 32 70.0 us, estimated at 44.5).
        if (op == Op::fprop && p.dtype == DType::f32 && p.allow_tf32 && p.R * p.S == 1 && row.tile_m == 64 &&
            p.y.c != 1 && e.ns > 15000)
          e.ns *= 1.3;
        return e;
      }
      // As measured beside packed rows: 12x7x16x16 to 8 3x3 D 15.5 us, 64x64 10.7.
      Estimate e = stem_narrow_estimate(row, op, p, h200_sxm);
      if (op == Op::dgrad && size_of(p.dtype) == 2 && row.tile_m == 512 && e.ns > 11000 && e.ns < 25000) e.ns *= 1.1;
      return e;
    }
    case Family::pixels: {
      if (is_few_depth(row)) return few_depth_estimate(op, p);
      if (is_small_images(row)) return small_images_estimate(p);
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
      if (is_pixel_phases(row)) return pixel_phases_estimate(row, op, p);
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
      if (is_nhwc(row.variant) && op == Op::wgrad && p.dtype != DType::f32 && row.tile_m == 128 &&
          min64(p.C, p.K) <= 64 && e.ns > 18000)
        e.ns *= 1.12;
      // As measured: one to four filters of many channels (8x256x100x152 to 3 32.4 us, estimated at 26.8).
      if (is_nhwc(row.variant) && op == Op::fprop && p.K <= 4 && p.C >= 128 && e.ns > 14000) e.ns *= 1.15;
      // As measured: long sums for filters that are no vectors (8x512x65x65 to 21: 29.2 us, packed 24.9).
      if (is_nhwc(row.variant) && op == Op::fprop && p.C >= 512 && p.K % 8 != 0) e.ns *= 1.4;
      return e;
    }
  }
  return {};
}

constexpr Estimate estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  Estimate e = estimate_apart(row, op, p, d);
  e.ns = beside_others_ns(row, p, e.ns);
  return e;
}

constexpr int64_t workspace_bytes(Row const& row, Op op, Problem const& p, int split_k, Device const& d) {
  if (depthwise_turns(row, p) > 1) return workspace_bytes(row, op, depthwise_turn(row, p), split_k, d);
  switch (row.family) {
    case Family::tma:
    case Family::tma_strict:
    case Family::grouped:
    case Family::simt: {
      if (is_planes(row)) return planes_workspace_bytes(op, p, d);
      if (is_turned(row)) return turned_workspace_bytes(op, p);
      if (is_winograd(row)) return winograd_of(op, p, d).bytes;
      if (is_plain(row)) return plain_workspace_bytes(p, d);
      if (is_plain_rows(row) || is_images(row) || is_slabs(row) || is_few_groups(row)) return 0;
      if (is_group_parts(row)) return 0;
      if (is_tf32_planes(row)) return tf32_planes_workspace_bytes(row, p);
      Packed const q = packed(row, tma_problem(row, p));
      return patch_bytes(row, p) + packed_places(q).bytes +
             (row.family == Family::simt      ? gemm_workspace_bytes(row, op, p, split_k)
              : row.family == Family::grouped ? grouped_workspace_bytes(row, q.problem, split_k)
                                              : in_place_workspace_bytes(row, q.problem, split_k));
    }
    case Family::depthwise:
    case Family::band:
    case Family::column:
    case Family::toeplitz:
    case Family::strip:
    case Family::stream:
      return (is_mixed(row, p) ? packed_places(packed_mixed(p)).bytes : 0) + depthwise_workspace_bytes(p, split_k);
    case Family::stem:
      return stem_workspace_bytes(op, row, p, h200_sxm);
    case Family::pixels:
      if (is_small_images(row) || is_few_depth(row)) return 0;
      if (is_few_pixels(row)) return few_pixels_workspace_bytes(row, p);
      if (is_any_pixels(row) || is_pixel_flow(row) || is_pixel_runs(row) || is_matrix_planes(row)) return 0;
      if (is_pixel_phases(row)) return pixel_phases_workspace_bytes(op, p);
      if (is_strict_pixels(row)) return strict_pixels_bytes(row, p, split_k);
      if (is_pixels_wgrad(row)) return pixels_wgrad_bytes(row, p, split_k);
      if (is_pixel_halves(row)) return pixel_halves_workspace_bytes(row, p);
      if (is_pixel_pairs(row)) return pixel_pairs_workspace_bytes(row, p);
      if (is_pixels_gather(row)) return op == Op::wgrad ? pixels_wgrad_bytes(row, p, split_k) : 0;
      if (is_nhwc(row.variant)) return op == Op::wgrad ? PixelSums(row, p).workspace_bytes(row) : 0;
      return pixels_workspace_bytes(row, op, p);
    case Family::igemm:
      break;
  }
  Packed const q = packed(row, p);
  return packed_places(q).bytes + gemm_workspace_bytes(row, op, without_far_taps(q.problem).problem, split_k);
}

// The plan for one row; the caller has asked supports() first.
constexpr Plan plan_row(int kernel, Op op, Problem const& p, Device const& d) {
  Estimate const e = estimate(kRows[kernel], op, p, d);
  return {kernel, e.split_k, workspace_bytes(kRows[kernel], op, p, e.split_k, d)};
}

// There is always a plan on a GPU of compute capability 8.0 or later; kernel = -1 otherwise.
constexpr Plan make_plan(Op op, Problem const& p, Device const& d) {
  int best = -1;
  double best_ns = 0;
  for (int i = 0; i < kRowCount; ++i) {
    if (!supports(kRows[i], op, p, d)) continue;
    double const ns = estimate(kRows[i], op, p, d).ns;
    if (best < 0 || ns < best_ns) {
      best = i;
      best_ns = ns;
    }
  }
  return best < 0 ? Plan{} : plan_row(best, op, p, d);
}

}  // namespace conv2d_ext
