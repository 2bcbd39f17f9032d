// Rows of tma.cuh and its siblings with many steps a tile, and those of dgrad whose filters end within their lines
// (docs/tuning/dense.md, "Long sums", "96 channels"), as measured beside others.
#pragma once

#include "tma.h"

namespace conv2d_ext {

constexpr double long_sums_as_measured(Row const& row, Op op, Problem const& p, int64_t split_k) {
  if (op == Op::wgrad || row.dtype == DType::f32 || p.groups != 1 || p.x.c != 1) return 1;
  if (p.stride_h != 1 || p.stride_w != 1) return 1;
  bool const forward = op == Op::fprop, taps = p.R * p.S > 1;
  int64_t const columns = forward ? p.K : p.C, steps = p.R * p.S * ceil_div(forward ? p.C : p.K, 64);
  auto tile = [&](int m, int n) { return row.tile_m == m && row.tile_n == n; };
  if (is_halo(row.variant)) return tile(256, 64) && columns > 64 && columns <= 96 ? (forward ? 1.1 : 1.15) : 1;
  if (row.variant == Variant::lean) return steps >= 64 && split_k > 1 ? 1.15 : 1;
  if (row.variant != Variant::im2col) return 1;
  if (taps && tile(192, 128) && columns > 64 && columns % 64 != 0) {
    if (!forward) return p.K <= 128 ? 1.4 : 1.12;
    if (columns <= 96 && p.C % 64 != 0) return 1.12;
  }
  if (taps && !forward && row.tile_m == 64 && p.C <= 32 && p.C % 16 != 0 && p.N * p.H * p.W > 8000) return 1.3;
  if (p.C < 64) return 1;
  if (op == Op::dgrad) return steps >= 48 && tile(256, 64) && split_k == 1 ? 0.85 : 1;
  if (steps < 64 || split_k == 1) return 1;
  TileSplit const s = tma_split(row, tma_tiles(row, p), split_k);
  if (s.shared == 0 || s.workers % s.shared == 0) return 1;  // even shares
  return tile(64, 64) ? 1.2 : tile(128, 128) ? 1.11 : tile(128, 256) ? 1.07 : 1;
}

}  // namespace conv2d_ext
