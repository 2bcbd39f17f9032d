// tma_lean.cuh: what its rows take and cost. Apart from tma.h, which the other kernels include.
#pragma once

#include <cstdint>

#include "tma.h"

namespace conv2d_ext {

inline constexpr int kLeanSplits = 8;  // blocks of a cluster at most

constexpr bool lean_supports(Row const& row, Problem const& p) {
  int const v = 16 / size_of(p.dtype);
  if (p.groups != 1 || p.N == 0 || p.C == 0 || p.K == 0 || p.P() == 0 || p.Q() == 0 || p.R == 0 || p.S == 0)
    return false;
  if (row.op == Op::dgrad && (min64(p.stride_h, p.H) > 1 || min64(p.stride_w, p.W) > 1)) return false;
  if (!channel_vectors(p.x, p.x_align, p.C, v, p.dtype) || !channel_vectors(p.w, p.w_align, p.C, v, p.dtype) ||
      !channel_vectors(p.y, p.y_align, p.K, v, p.dtype))
    return false;
  Row like = row;
  like.variant = Variant::im2col;
  if (!tma_supports(like, p)) return false;
  Gemm const g = gemm_of(row.op, p);
  return g.M < 65535 * 64 && g.N * p.R * p.S < int64_t(1) << 30;
}

// Not fitted yet.
constexpr Estimate lean_estimate(Row const& row, Problem const& p) { return {1e9 + double(p.N) + row.tile_m, 1}; }

}  // namespace conv2d_ext
