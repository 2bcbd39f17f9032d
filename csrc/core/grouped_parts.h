// grouped_parts.cuh: wgrad of groups in channels_last, 16-bit types, whose pixels clusters share.
#pragma once

#include <cstdint>

#include "lean.h"
#include "merged.h"

namespace conv2d_ext {

constexpr bool is_group_parts(Row const& row) { return row.family == Family::grouped && row.variant == Variant::halo; }

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
constexpr int64_t group_clusters(int parts) { return parts == 1 ? 132 : lean_clusters(parts); }

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
  // Fitted to 92 times of 23 layers (rms 5.5 %; what is fixed, anew to 13): the steps of a block, lines that lie across
  // those of memory or have a stride, which all SMs together take in, and memory.
  bool const strided = p.stride_w > 1, across = g.problem.C_per_group() % 64 != 0 || g.problem.K_per_group() % 64 != 0;
  double const lines_ns = double(g.tiles.tiles * g.tiles.steps) *
                          (across    ? (strided ? 800 : 337)
                           : strided ? 447
                                     : 41) /
                          132;
  double const bytes = (double(p.N) * double(p.C) * double(p.H) * double(p.W) +
                        double(p.N) * double(p.K) * double(p.P()) * double(p.Q())) *
                       2;
  double const least = lines_ns > bytes / 6130 ? lines_ns : bytes / 6130;
  for (int parts : {1, 2, 3, 4, kMostParts}) {
    if (parts > 1 && g.tiles.steps < 2 * parts) break;
    int64_t const held = group_clusters(parts);
    bool const two = g.tiles.tiles > held;
    double const rounds = double(ceil_div(g.tiles.tiles, two ? 2 * held : held)),
                 work = rounds * double(ceil_div(g.tiles.steps, parts)) * (strided ? 195 : 230) * (two ? 2 : 1);
    double ns = 8400 + (rounds - 1) * 2000 + (work > least ? work + least * 0.485 : least + work * 0.485);
    ns += (two ? 350 : 0) + (parts == 1 ? 1200 : parts == kMostParts ? 320 : 0);
    if (g.parts == 0 || ns < g.ns) g.parts = parts, g.two = two, g.ns = ns;
  }
  // As measured beside 64x64_im2col, whose estimate leaves so much out of a few steps.
  if (g.tiles.steps <= 14 && g.tiles.tiles <= 64) g.ns -= p.C_per_group() < 48 ? 1300 : 500;
  return g;
}

}  // namespace conv2d_ext
