// grouped_parts.cuh: wgrad of groups in channels_last, 16-bit types, whose pixels clusters share.
#pragma once

#include <cstdint>

#include "merged.h"

namespace conv2d_ext {

constexpr bool is_group_parts(Row const& row) {
  return row.family == Family::grouped && row.variant == Variant::halo;
}

inline constexpr int kMostParts = 8;  // of a tile: blocks of a cluster

// What a launch is: the problem with neighbouring groups as one, its tiles, and how many blocks share a tile.
struct GroupParts {
  Problem problem;
  WgradTiles tiles;
  int parts = 0;     // 0: it is not taken
  bool two = false;  // blocks share an SM
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
  // Rows share their padded columns: a tap beyond one's end meets the zeros before the next.
  if (p.S == 3 && p.stride_w == 1 && p.pad_left == p.dilation_w && p.pad_right == p.dilation_w) {
    g.tiles.columns = p.Q() + p.dilation_w;
    g.tiles.steps = ceil_div(p.N * p.P() * g.tiles.columns, kWgradPixels);
  }
  // Lines copied take what the SMs together take in, more with a stride or where they lie across those of memory.
  bool const strided = p.stride_w > 1, across = g.problem.C_per_group() % 64 != 0 || g.problem.K_per_group() % 64 != 0;
  double const line_ns = across ? 4.5 : strided ? 2.9 : 2.3, lines = strided ? 194 : 130;
  double const lines_ns = double(g.tiles.tiles * g.tiles.steps) * lines * line_ns / 132;
  double const bytes = (double(p.N) * double(p.C) * double(p.H) * double(p.W) +
                        double(p.N) * double(p.K) * double(p.P()) * double(p.Q())) *
                       2;
  double const least = lines_ns > bytes / 3400 ? lines_ns : bytes / 3400;
  for (int parts : {1, 2, 3, 4, 5, kMostParts}) {
    if (parts > 1 && g.tiles.steps < 2 * parts) break;
    int64_t const held = group_clusters(parts), steps = ceil_div(g.tiles.steps, parts);
    bool const two = g.tiles.tiles > held;
    double const step_ns = (strided ? 280 : 204) * (two ? 2 : 1);
    double const work = double(ceil_div(g.tiles.tiles, two ? 2 * held : held)) * double(steps) * step_ns;
    double const ns = 9000 + (work > least ? work : least);
    if (g.parts == 0 || ns < g.ns) g.parts = parts, g.two = two, g.ns = ns;
  }
  return g;
}

}  // namespace conv2d_ext
