// What a row of the table takes; what each family takes is in the family's header.
#pragma once

#include "band.h"
#include "band_split.h"
#include "column.h"
#include "depthwise.h"
#include "few_depth.h"
#include "few_sums.h"
#include "gemm.h"
#include "grouped.h"
#include "grouped_few.h"
#include "grouped_parts.h"
#include "grouped_slabs.h"
#include "igemm_tf32.h"
#include "images.h"
#include "in_place.h"
#include "lanes.h"
#include "lanes_choice.h"
#include "lines.h"
#include "matrix.h"
#include "met.h"
#include "mixed.h"
#include "near.h"
#include "pack.h"
#include "patch.h"
#include "pixel_lines.h"
#include "pixels.h"
#include "pixels_any.h"
#include "pixels_few.h"
#include "pixels_gather.h"
#include "pixels_halves.h"
#include "pixels_pairs.h"
#include "pixels_phases.h"
#include "pixels_runs.h"
#include "pixels_strict.h"
#include "pixels_wgrad.h"
#include "plain.h"
#include "plain_rows.h"
#include "planes.h"
#include "products.h"
#include "quads.h"
#include "small_images.h"
#include "stem.h"
#include "stem_halo.h"
#include "stem_lean.h"
#include "stem_taps.h"
#include "stem_vectors.h"
#include "stream_estimate.h"
#include "strip.h"
#include "strip_rows.h"
#include "strip_sums.h"
#include "tma_planes_tf32.h"
#include "tma_strict.h"
#include "toeplitz.h"
#include "toeplitz_pairs.h"
#include "turned.h"
#include "turns.h"
#include "walk.h"
#include "winograd.h"

namespace conv2d_ext {

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

}  // namespace conv2d_ext
