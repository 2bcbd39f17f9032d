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

// As tf32_wgrad_estimate. A step's instructions come thrice, and read the turned B thrice, which is written twice.
constexpr Estimate strict_wgrad_estimate(Row const& row, Problem const& p, Device const& d) {
  double const TM = row.tile_m, TN = row.tile_n;
  int64_t const tiles = tf32_wgrad_tiles(row, p), pixels = p.N * p.P() * p.Q(), steps = ceil_div(pixels, 32);
  int64_t const rows = p.R * p.S * ceil_div(p.C_per_group(), kTf32Line) * kTf32Line;
  double const of_x = double(min64(row.tile_m, rows)), lines = TM / 64 * TN * 3 + TM + of_x + 4 * TN;
  // Lines that end early or lie across those of memory take longer.
  int64_t const of_y = min64(row.tile_n, ceil_div(p.K_per_group(), kTf32Line) * kTf32Line);
  double const copied = of_x * (p.C_per_group() % kTf32Line == 0 ? 1 : 1.11) +
                        double(of_y) * (p.K_per_group() % kTf32Line == 0 ? 1 : 1.12);
  double const step_ns = tf32_step_ns(TM * TN / 32 * 3 * 1.1, lines * 1.05, copied * 3.57) + 10,
               fixed = 400 + 0.2 * TM * TN;
  double const memory_ns = tf32_memory_ns(p, 3950), tile_bytes = TM * TN * 4;
  auto with = [&](int64_t split) {
    int64_t const each = ceil_div(steps, split), chains = ceil_div(each * 32, kTf32Pixels);
    double ns = double(ceil_div(tiles * split, d.sm_count)) * (double(each) * step_ns + double(chains) * fixed) + 2000;
    // The second launch: eight parts of a sum are loaded at a time, one after the other eight.
    if (split > 1)
      ns +=
          1400 + double(tiles * split) * tile_bytes * 2 / 12500 + double(ceil_div(split, 8)) * 400 + double(split) * 12;
    return (ns > memory_ns ? ns + memory_ns / 10 : memory_ns + ns / 10) + 5000;
  };
  Estimate best{with(1), 1};
  int64_t const first = ceil_div(tiles, d.sm_count);
  for (int64_t rounds = first; rounds < first + 5 && tiles > 0; ++rounds) {
    int64_t const split = min64(rounds * d.sm_count / tiles, steps / 2);
    if (split < 2 || double(tiles * split) * tile_bytes > double(kMaxWorkspaceBytes)) continue;
    double const ns = with(split);
    if (ns < best.ns) best = {ns, int(split)};
  }
  return best;
}

}  // namespace conv2d_ext
