// Patches: a filter that steps by its own size over an image that it divides meets every input once, as in the first
// layer of a vision transformer. Few channels of it are copied to the workspace patch by patch, in the order of the
// filters' memory, and the rows of tma and tma_strict run the product of matrices that is left: a 1x1
// filter over patches.
#pragma once

#include "pack.h"

namespace conv2d_ext {

inline constexpr int kPatchMostChannels = 4;  // more of them fill the lines of packed copies well enough

// Are a filter's weights dense, and in the order channel, row, column?
constexpr bool patch_channels_first(Problem const& p) {
  return (p.C == 1 || p.w.c == p.R * p.S) && (p.R == 1 || p.w.h == p.S) && (p.S == 1 || p.w.w == 1);
}

constexpr bool is_patches(Row const& row, Problem const& p) {
  if (row.family != Family::tma && row.family != Family::tma_strict) return false;
  if (is_pointwise(row) || is_planes_wgrad(row) || p.groups != 1 || p.C < 1 || p.C > kPatchMostChannels || p.N == 0)
    return false;
  if (p.stride_h != p.R || p.stride_w != p.S || p.R * p.S == 1 || p.H % p.R != 0 || p.W % p.S != 0) return false;
  if (p.pad_top != 0 || p.pad_bottom != 0 || p.pad_left != 0 || p.pad_right != 0) return false;
  if (p.dilation_h != 1 || p.dilation_w != 1 || p.H == 0 || p.W == 0) return false;
  if (p.C * p.R * p.S % (16 / size_of(p.dtype)) != 0) return false;
  if (double(p.N) * double(p.C) * double(p.H) * double(p.W) * size_of(p.dtype) > kMaxPackedBytes) return false;
  bool const channels_last = (p.C == 1 || p.w.c == 1) && (p.R == 1 || p.w.h == p.S * p.C) && (p.S == 1 || p.w.w == p.C);
  return channels_last || patch_channels_first(p);
}

constexpr Problem patches(Problem const& p) {
  Problem q = p;
  q.C = p.C * p.R * p.S, q.H = p.P(), q.W = p.Q(), q.R = q.S = q.stride_h = q.stride_w = 1;
  q.x = channels_last_strides(q.C, q.H, q.W), q.x_align = 16;
  q.w = {p.w.n, 1, 0, 0};
  if (q.N == 1) q.x.n = 0;
  if (q.H == 1) q.x.h = 0;
  if (q.W == 1) q.x.w = 0;
  return q;
}

// The problem that a row runs, but for packing; of another family its own.
constexpr Problem tma_problem(Row const& row, Problem const& p) { return is_patches(row, p) ? patches(p) : p; }

constexpr int64_t patch_bytes(Row const& row, Problem const& p) {
  return is_patches(row, p) ? round_up(p.N * p.C * p.H * p.W * size_of(p.dtype), 256) : 0;
}
constexpr double patch_ns(Row const& row, Problem const& p) {
  return is_patches(row, p) ? 4000 + double(patch_bytes(row, p)) * 2 / 2500 : 0;
}

}  // namespace conv2d_ext
