// Rows of tma.cuh and tma_swap.cuh with many steps a tile (docs/tuning/dense.md, "Long sums"), as measured beside
// others.
#pragma once

#include "tma.h"

namespace conv2d_ext {

constexpr double long_sums_as_measured(Row const& row, Op op, Problem const& p, int64_t split_k) {
  if (op == Op::wgrad || row.variant != Variant::im2col || row.dtype == DType::f32 || p.groups != 1) return 1;
  if (p.x.c != 1 || p.C < 64 || p.stride_h != 1 || p.stride_w != 1) return 1;
  int64_t const steps = p.R * p.S * ceil_div(op == Op::fprop ? p.C : p.K, 64);
  auto tile = [&](int m, int n) { return row.tile_m == m && row.tile_n == n; };
  if (op == Op::dgrad) return steps >= 48 && tile(256, 64) && split_k == 1 ? 0.85 : 1;
  if (steps < 64 || split_k == 1) return 1;
  TileSplit const s = tma_split(row, tma_tiles(row, p), split_k);
  if (s.shared == 0 || s.workers % s.shared == 0) return 1;  // even shares
  return tile(64, 64) ? 1.2 : tile(128, 128) ? 1.11 : tile(128, 256) ? 1.07 : 1;
}

}  // namespace conv2d_ext
