// grouped_parts.cuh: wgrad of groups in channels_last, 16-bit types, whose pixels clusters share.
#pragma once

#include <cstdint>

#include "merged.h"

namespace conv2d_ext {

constexpr bool is_group_parts(Row const& row) {
  return row.family == Family::grouped && row.variant == Variant::halo;
}

// What a launch is: the problem with neighbouring groups as one, its tiles, and how many blocks share a tile.
struct GroupParts {
  Problem problem;
  WgradTiles tiles;
  int parts = 0;  // 0: it is not taken
  double ns = 0;
};

// Clusters of so many blocks that a GPU of 132 SMs holds at a time, a block an SM.
constexpr int64_t group_clusters(int parts) {
  constexpr int64_t held[] = {132, 64, 39, 30, 22, 18, 15, 15};
  return held[parts - 1];
}

constexpr GroupParts group_parts(Row const& row, Problem const& p) {
  GroupParts g;
  Row const like{Family::tma, Op::wgrad, row.dtype, 192, 64, 64, Variant::halo};
  if (p.groups == 1 || size_of(p.dtype) != 2 || max64(p.C_per_group(), p.K_per_group()) > 64) return g;
  if (min64(p.C_per_group(), p.K_per_group()) < 8) return g;
  if (p.N < 1 || p.H < 1 || p.W < 1 || p.P() < 1 || p.Q() < 1 || p.R < 1 || p.S < 1) return g;
  g.problem = as_merged(like, p);
  if (max64(g.problem.C_per_group(), g.problem.K_per_group()) <= 32 || !tma_supports(like, g.problem)) return g;
  if (double(p.N) * double(p.P() + 8) * double(p.Q() + 8) >= double(1 << 30)) return g;
  g.tiles = wgrad_tiles(like, g.problem);
  bool const strided = p.stride_w > 1;
  double const bytes = (double(p.N) * double(p.C) * double(p.H) * double(p.W) +
                        double(p.N) * double(p.K) * double(p.P()) * double(p.Q())) * 2;
  for (int parts : {1, 2, 3, 4, 5, 8}) {
    int64_t const blocks = g.tiles.tiles * parts, steps = ceil_div(g.tiles.steps, parts);
    if (parts > 1 && g.tiles.steps < 2 * parts) break;
    bool const alone = g.tiles.tiles <= group_clusters(parts);
    double const rounds = alone ? 1 : double(ceil_div(blocks, 2 * group_clusters(parts) * parts));
    double const step_ns = (strided ? 420 : 260) * (alone ? 1 : 1.8);
    double const work = rounds * double(steps) * step_ns, memory = bytes / 3400;
    double const ns = 7000 + (work > memory ? work : memory) + (parts > 1 ? 1200 : 0);
    if (g.parts == 0 || ns < g.ns) g.parts = parts, g.ns = ns;
  }
  return g;
}

}  // namespace conv2d_ext
