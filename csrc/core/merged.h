// Merged groups, and sliced ones (tma.cuh).
//
// Merged: wgrad by tma's tiles of 64 channels and more, in channels_last, multiplies neighbouring groups of 8 to
// 32 channels as if they were one, and stores of each filter the channels of its own group. What groups yield with each
// other, NaN too, is dropped.
#pragma once

#include "tma_tf32.h"

namespace conv2d_ext {

// So many neighbouring groups as one, with the strides of filters that rows take: there are no such filters. The last
// may have groups that do not exist.
constexpr Problem merged(Problem p, int64_t together) {
  int64_t const C = p.C_per_group(), K = p.K_per_group(), groups = ceil_div(p.groups, together);
  p.C = groups * together * C, p.K = groups * together * K, p.groups = groups;
  p.w = channels_last_strides(p.C_per_group(), p.R, p.S), p.w_align = 16;
  return p;
}

// Are the weights of a group's filter stored side by side, in TF32 four channels at a time?
constexpr bool merged_stores_runs(Problem const& p) {
  return channel_vectors(p.w, p.w_align, p.C_per_group(), p.dtype == DType::f32 ? 4 : 2, p.dtype);
}

// In TF32 single weights are stored by the second pass alone.
constexpr bool merged_adds_always(Row const& row, Problem const& p) {
  return row.dtype == DType::f32 && !is_halo(row.variant) && !merged_stores_runs(p);
}

// fprop and dgrad by tma.cuh's slices: two groups of 32 channels are copied as one; fprop in TF32 of 16.
constexpr int64_t sliced_groups(Row const& row, Problem const& p) {
  if (row.family != Family::tma || row.op == Op::wgrad || row.variant != Variant::halo) return 1;
  bool const f32 = p.dtype == DType::f32;
  int64_t const C = p.C_per_group();
  if (f32 ? row.op != Op::fprop || row.tile_n != 32 : row.tile_m != 128 || row.tile_n != 64) return 1;
  if (C != (f32 ? 16 : 32) || p.K_per_group() != C || (f32 && !p.allow_tf32)) return 1;
  if (p.groups % 2 != 0 || p.N < 1 || p.H < 1 || p.W < 1 || p.P() < 1 || p.Q() < 1) return 1;
  if (!channel_vectors(p.w, p.w_align, C, 16 / size_of(p.dtype), p.dtype) || !map_supports(p.w, p.K, p.R, p.S, p.dtype))
    return 1;
  return tma_supports(row, merged(p, 2), true) ? 2 : 1;
}

// How many groups are one for this row: as many as have 64 channels.
constexpr int64_t merged_groups(Row const& row, Problem const& p) {
  if (row.op != Op::wgrad) return sliced_groups(row, p);
  bool const halo = is_halo(row.variant), f32 = row.dtype == DType::f32;
  if (row.family != Family::tma || row.op != Op::wgrad || (row.variant != Variant::im2col && !halo)) return 1;
  int64_t const C = p.C_per_group(), K = p.K_per_group(), v = 16 / size_of(row.dtype);
  if (p.groups == 1 || C < 8 || K < 8 || (f32 && !p.allow_tf32)) return 1;
  if (p.N < 1 || p.H < 1 || p.W < 1 || p.P() < 1 || p.Q() < 1 || p.R < 1 || p.S < 1) return 1;
  int64_t together = min64(64 / max64(C, K), p.groups);
  while (together > 1 && (C * together % v != 0 || K * together % v != 0)) --together;
  if (together <= 1) return 1;
  bool const few = double(p.K) * double(C) * double(p.R * p.S) <= 320 * 1024;  // as tma_adds_into_any
  if (!merged_stores_runs(p) && !(few && (halo || f32))) return 1;
  Problem const m = merged(p, together);
  // TF32's runs have 32 channels: fewer groups may have as many tiles.
  if (f32 && !halo && C % v == 0 && K % v == 0 && tf32_wgrad_tiles(row, m) >= tf32_wgrad_tiles(row, p)) return 1;
  return tma_supports(row, m) ? together : 1;
}

constexpr Problem as_merged(Row const& row, Problem const& p) {
  int64_t const together = merged_groups(row, p);
  return together > 1 ? merged(p, together) : p;
}

// Groups padded to whole vectors, in channels_last, as packed copies have them.
constexpr Problem padded_to_merge(Problem p) {
  int64_t const v = 16 / size_of(p.dtype), C = ceil_div(p.C_per_group(), v) * v, K = ceil_div(p.K_per_group(), v) * v;
  p.C = C * p.groups, p.K = K * p.groups;
  p.x = channels_last_strides(p.C, p.H, p.W), p.y = channels_last_strides(p.K, p.P(), p.Q());
  p.w = channels_last_strides(C, p.R, p.S);
  p.x_align = p.w_align = p.y_align = 16;
  return p;
}

}  // namespace conv2d_ext
