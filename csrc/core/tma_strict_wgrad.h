// tma_strict_wgrad.cuh: what its rows cost, and what the launcher shares with the planner. They take what rows of TF32
// take.
#pragma once

#include <cstdint>

#include "tma_tf32.h"

namespace conv2d_ext {

// Partial tiles, or a flag for each warp.
constexpr int64_t strict_wgrad_workspace_bytes(Row const& row, Problem const& p, int split_k) {
  int64_t const tiles = tf32_wgrad_tiles(row, p);
  return split_k == 1 ? tiles * (row.tile_m / 16) * 4 : tiles * split_k * row.tile_m * row.tile_n * 4;
}

// ns of a step of 32 pixels, measured: nearly what three products take in 128x128, more in the others.
constexpr double strict_wgrad_step_ns(Row const& row) {
  if (row.tile_n == 128) return 1015;
  if (row.tile_n == 32) return 705;
  return row.tile_m == 128 ? 690 : 875;
}

constexpr Estimate strict_wgrad_estimate(Row const& row, Problem const& p, Device const& d) {
  double const chain_ns = 400 + 0.2 * double(row.tile_m) * row.tile_n;
  return tf32_wgrad_by_splits(row, p, d, {strict_wgrad_step_ns(row), chain_ns, 3500, 2000, 1400, 8});
}

}  // namespace conv2d_ext
