// The estimates of rows that compute tiles of a matrix, of packed tensors or as they lie: tma, tma_strict, grouped,
// simt and igemm, with what was measured beside other rows.
#pragma once

#include "beside.h"
#include "gemm.h"
#include "grouped_any.h"
#include "grouped_few.h"
#include "grouped_parts.h"
#include "grouped_slabs.h"
#include "groups_measured.h"
#include "igemm_tf32.h"
#include "images.h"
#include "in_place.h"
#include "lean.h"
#include "lean_groups.h"
#include "lean_measured.h"
#include "long_sums.h"
#include "near_taps.h"
#include "one_by_one.h"
#include "pack.h"
#include "patch.h"
#include "plain.h"
#include "plain_rows.h"
#include "planes.h"
#include "planes_blocks.h"
#include "tma.h"
#include "tma_lag.h"
#include "tma_planes_tf32.h"
#include "turned.h"
#include "winograd.h"

namespace conv2d_ext {

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

// SIMT's estimate of dgrad has all phases meet as many taps as one does at most: the share of its time where most meet
// fewer, as measured.
constexpr double simt_phases_share(Op op, Problem const& p) {
  if (op != Op::dgrad || p.groups > 1 || (p.stride_h == 1 && p.stride_w == 1)) return 1;
  Gemm const g = gemm_of(op, p);
  if (g.batches * g.depth == 0) return 1;
  double const share = double(p.R) * double(p.S) * double(p.K) / (double(g.batches) * double(g.depth));
  return share < 0.58 ? 0.65 + 0.6 * share : 1;
}

// wgrad of groups over NCHW by rows as they lie, which stores single weights: as measured of many (1x2048x16x16 3x3 in
// 4 groups 116 us, estimated at 43; in TF32 137, 57).
constexpr double weights_apart_ns(Problem const& p) {
  return double(max64(p.K * p.C_per_group() * p.R * p.S - 6000000, 0)) * 0.0085;
}

// Rows of tma, tma_strict, grouped and simt.
constexpr Estimate tiles_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  if (is_planes(row) || is_turned(row)) {
    Estimate e = is_planes(row) ? planes_estimate(op, p, d) : turned_estimate(op, p, d);
    // As measured beside packed rows: 1x1008x14x14 3x3 s2 in 21 groups D 12.8 us, 64x128 18.7, both estimated
    // at 16.
    if (op != Op::wgrad && p.stride_w > 1 && p.dtype != DType::f32) e.ns *= 0.97;
    if (op == Op::wgrad) e.ns += weights_apart_ns(p);
    return e;
  }
  if (is_winograd(row)) return {winograd_of(op, p, d).ns, 1};
  if (is_plain(row)) return {plain_estimate(p, d).ns * small_plain_share(p) + weights_apart_ns(p), 1};
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
  if (row.family == Family::simt && row.variant == Variant::any && op == Op::dgrad && p.stride_w > 1 && p.x.w == 1) {
    double const least = double(p.N) * double(p.C) * double(p.H) * double(p.W) * 0.013 + 7500;
    if (e.ns < least) e.ns = least * 0.85 + e.ns * 0.15;  // their order stays
  }
  if (row.family == Family::tma) {
    if (row.variant == Variant::lean) e.ns += lean_beyond_ns(row, q.problem, e.split_k);
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
  e.ns *= packed_wgrad_share(row, t, q.which) * groups_as_measured(row, row.family == Family::grouped ? q.problem : t);
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
  if (is_lean_groups(row, p)) e.ns = lean_groups_ns(row, p, e.split_k);
  return e;
}

constexpr Estimate igemm_as_measured(Row const& row, Op op, Problem const& p, Device const& d) {
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

}  // namespace conv2d_ext
