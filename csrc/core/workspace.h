// The workspace that a row asks for: copies, partial sums, filters in another order.
#pragma once

#include "depthwise.h"
#include "few_depth.h"
#include "gemm.h"
#include "grouped.h"
#include "grouped_few.h"
#include "grouped_parts.h"
#include "grouped_slabs.h"
#include "images.h"
#include "in_place.h"
#include "matrix.h"
#include "mixed.h"
#include "near_taps.h"
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
#include "small_images.h"
#include "stem.h"
#include "tma_planes_tf32.h"
#include "turned.h"
#include "turns.h"
#include "winograd.h"

namespace conv2d_ext {

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

}  // namespace conv2d_ext
