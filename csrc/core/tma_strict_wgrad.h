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

// As tf32_wgrad_estimate.
constexpr Estimate strict_wgrad_estimate(Row const& row, Problem const& p, Device const& d) {
  double const TM = row.tile_m, TN = row.tile_n;
  int64_t const tiles = tf32_wgrad_tiles(row, p), steps = ceil_div(p.N * p.P() * p.Q(), 32);
  double const step_ns = strict_wgrad_step_ns(row), fixed = 400 + 0.2 * TM * TN;
  double const memory_ns = tf32_memory_ns(p, 3950), tile_bytes = TM * TN * 4;
  auto with = [&](int64_t split) {
    int64_t const each = ceil_div(steps, split), chains = ceil_div(each * 32, kTf32Pixels);
    double ns = double(ceil_div(tiles * split, d.sm_count)) * (double(each) * step_ns + double(chains) * fixed) + 2000;
    // The second launch: eight parts of a sum are loaded at a time, one after the other eight.
    if (split > 1)
      ns +=
          1400 + double(tiles * split) * tile_bytes * 2 / 12500 + double(ceil_div(split, 8)) * 400 + double(split) * 12;
    return (ns > memory_ns ? ns + memory_ns / 10 : memory_ns + ns / 10) + 3500;
  };
  Estimate best{with(1), 1};
  int64_t const first = ceil_div(tiles, d.sm_count);
  for (int64_t rounds = first; rounds < first + 8 && tiles > 0; ++rounds) {
    int64_t const split = min64(rounds * d.sm_count / tiles, steps / 2);
    if (split < 2 || double(tiles * split) * tile_bytes > double(kMaxWorkspaceBytes)) continue;
    double const ns = with(split);
    if (ns < best.ns) best = {ns, int(split)};
  }
  return best;
}

}  // namespace conv2d_ext
