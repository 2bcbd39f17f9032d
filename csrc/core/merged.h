// Merged groups: wgrad by tma's tiles of 64 channels and more multiplies neighbouring groups of 8 to 32 channels as if
// they were one, and keeps of each filter the channels of its own group. What groups yield with each other, NaN too, is
// dropped.
#pragma once

#include "pack.h"

namespace conv2d_ext {

// So many neighbouring groups as one, whose filters are in the workspace.
constexpr Problem merged(Problem p, int64_t together) {
  p.groups /= together;
  p.w = channels_last_strides(packed_w_channels(p.C_per_group(), p.dtype), p.R, p.S), p.w_align = 16;
  return p;
}

// The launch that keeps what is wanted.
constexpr double keep_ns(Problem const& p) {
  return 3000 + double(p.K) * double(p.C_per_group() * p.R * p.S) * size_of(p.dtype) * 2 / 1500;
}

// How many groups are one for this row: as many as have 64 channels, if that is estimated to be faster.
constexpr int64_t merged_groups(Row const& row, Problem p) {
  bool const takes =
      row.family == Family::tma && row.op == Op::wgrad && (row.variant == Variant::im2col || is_halo(row.variant));
  if (!takes || p.groups == 1 || p.C_per_group() < 8 || p.K_per_group() < 8) return 1;
  if (p.N < 1 || p.H < 1 || p.W < 1 || p.P() < 1 || p.Q() < 1 || p.R < 1 || p.S < 1) return 1;
  int64_t together = 64 / max64(p.C_per_group(), p.K_per_group());
  while (together > 1 && p.groups % together != 0) --together;
  if (together <= 1) return 1;
  int64_t const v = 16 / size_of(p.dtype);
  if (p.C_per_group() % v != 0 || p.K_per_group() % v != 0) return together;  // would be padded
  p.x = channels_last_strides(p.C, p.H, p.W), p.y = channels_last_strides(p.K, p.P(), p.Q());
  auto ns = [&](Problem const& of) { return in_place_estimate(row, Op::wgrad, of, h200_sxm).ns; };
  return ns(merged(p, together)) + keep_ns(p) < ns(p) ? together : 1;
}

constexpr int64_t merged_bytes(Row const& row, Problem const& p) {
  int64_t const together = merged_groups(row, p);
  return together == 1 ? 0 : round_up(p.K * merged(p, together).w.n * size_of(p.dtype), 256);
}

}  // namespace conv2d_ext
