// pixels_runs.cuh, pixels_turns.cuh: 1x1 fprop and dgrad over NCHW of 16-bit types, in place. What their rows take and
// cost.
#pragma once

#include <cstdint>

#include "pixels.h"

namespace conv2d_ext {

constexpr bool is_pixel_runs(Row const& row) {
  return row.family == Family::pixels && row.op != Op::wgrad && row.dtype != DType::f32 && row.variant == Variant::nchw;
}

// Persistent blocks, of many tiles (pixels_turns.cuh)?
constexpr bool takes_turns(int tile_m) { return tile_m <= 128; }

// Tiles of tile_m filters (dgrad: channels) by tile_n pixels. Their columns are runs of 64 pixels of any images, or, of
// tiles whose width is no multiple of 64, pixels of one image.
struct PixelRuns {
  int64_t tiles_m = 0, per_image = 0, tiles = 0;  // per_image: runs, or tiles

  constexpr PixelRuns(int tile_m, int tile_n, Op op, Problem const& p) {
    bool const runs = tile_n % 64 == 0;
    tiles_m = ceil_div(op == Op::fprop ? p.K : p.C, tile_m);
    per_image = ceil_div(p.H * p.W, runs ? 64 : tile_n);
    tiles = (runs ? ceil_div(p.N * per_image, tile_n / 64) : p.N * per_image) * tiles_m;
  }
};

constexpr bool pixel_runs_supports(Row const& row, Problem const& p) {
  if (p.groups > 1 && (!is_pixel_runs(row) || row.tile_n != 256)) return false;
  if (is_pixel_runs(row) && row.tile_n == 144 && p.H * p.W % 144 != 0) return false;  // 12x12, 24x24
  if (!group_planes(p) || p.w.c != 1 || p.w.n <= 0) return false;
  if (!channel_vectors(p.w, p.w_align, p.C_per_group(), 8, p.dtype)) return false;
  // Tiles are a grid, and images and runs are counted in 32 bits.
  return double(p.N) * double(ceil_div(p.H * p.W, 64)) * double(ceil_div(max64(p.C, p.K), 64)) < double(1 << 30);
}

// Tiles of 128 rows in turns: a launch; a tile and a step of it, a round; what memory gives and takes, in us for a
// million elements of one channel of 2 bytes; the larger of these two and of what L2 delivers, and a part of the
// others. Fitted to 543 layers (docs/tuning/one-by-one.md).
struct PixelTurnsTimes {
  double launch, tile, step, read, written, rest, off;
};
constexpr PixelTurnsTimes pixel_turns_times(Op op, int tile_n) {
  if (tile_n == 144) return {6.13, 0.797, 0.359, 0.331, 0.187, 0.0906, 0.582};
  if (op == Op::fprop)
    return tile_n == 128 ? PixelTurnsTimes{6.67, 0.423, 0.212, 0.223, 0.173, 0.276, 0.47}
                         : PixelTurnsTimes{6.71, 0.431, 0.277, 0.21, 0.186, 0.395, 0.105};
  return tile_n == 128 ? PixelTurnsTimes{6.41, 0.364, 0.245, 0.237, 0.175, 0.239, 0.227}
                       : PixelTurnsTimes{6.37, 0.446, 0.337, 0.246, 0.206, 0.234, 0.496};
}
constexpr Estimate pixel_turns_estimate(Row const& row, Problem const& p, Device const& d) {
  PixelTurnsTimes const t = pixel_turns_times(row.op, row.tile_n);
  PixelRuns const shape(row.tile_m, row.tile_n, row.op, p);
  int64_t const depth = row.op == Op::fprop ? p.C : p.K, rows = row.op == Op::fprop ? p.K : p.C;
  double const steps = double(ceil_div(depth, 64)), plane = double(p.H * p.W);
  double const work = double(ceil_div(shape.tiles, d.sm_count)) * (t.tile + t.step * steps);
  double const memory = double(p.N) * plane * 2e-6 * (double(depth) * t.read + double(rows) * t.written);
  // Lines that begin within others come in two parts.
  double const off = 1 - double(gcd64(p.H * p.W * 2, 128)) / 128;
  double const l2 = double(shape.tiles) * steps * double(row.tile_m + row.tile_n) * 128 / 16.5e6 * (1 + t.off * off);
  double const longest = work > memory ? (work > l2 ? work : l2) : memory > l2 ? memory : l2;
  double const few = p.N * p.H * p.W < 4000 ? 1.12 : depth < 64 ? 1.15 : 1;  // of which none or few were measured
  return {few * 1000 * (t.launch + longest + t.rest * (work + memory + l2 - longest)), 1};
}

// Rounds of tiles, their steps, and bytes: a sum, as they hide each other in part. Fitted to 292 times
// (docs/tuning.md).
constexpr Estimate pixel_runs_estimate(Row const& row, Problem const& p, Device const& d) {
  struct Times {
    double round, step;
  };
  if (row.tile_m == 128 && row.tile_n < 256) return pixel_turns_estimate(row, p, d);
  constexpr Times t256x160{1.8, 0.695}, t64x256{0.267, 0.295}, t128x256{0.718, 0.496};
  Times const& t = !takes_turns(row.tile_m) ? t256x160 : row.tile_m == 128 ? t128x256 : t64x256;
  Problem const g = group_of(p);
  PixelRuns const shape(row.tile_m, row.tile_n, row.op, g);
  int64_t const depth = row.op == Op::fprop ? g.C : g.K, rows = row.op == Op::fprop ? g.K : g.C;
  double const tiles = double(shape.tiles * p.groups);
  double const steps = double(ceil_div(depth, 64)), all = tiles / d.sm_count;
  double const rounds = double(ceil_div(shape.tiles, group_blocks(p, d.sm_count)));
  double const pixels = double(p.N * p.groups) * double(p.H) * double(p.W) * 2 / 1e6;
  // dgrad's boxes of filters whose channels end within them.
  double const ended = row.op == Op::dgrad && g.C % 64 != 0 ? 0.0131 * row.tile_m / 64 * all * steps : 0;
  double const few = row.op == Op::dgrad && depth < 64 ? 0.95 : 1;  // as measured
  // What L2 delivers, lines that begin within others twice (32x768x12x12 to 1536 38.9 us, estimated at 28.5).
  int64_t const plane = p.H * p.W * 2;
  double const off = 1 - double(gcd64(plane, 128)) / 128;
  double const lines = tiles * steps * double(row.tile_m + row.tile_n) * (1 + 1.29 * off);
  double work = rounds * (t.round + t.step * steps) + pixels * (double(depth) * 0.1644 + double(rows) * 0.1355) + ended;
  if (work < lines * 128 / 16.5e6) work = lines * 128 / 16.5e6;
  return {few * 1000 * (6.37 + work), 1};
}

}  // namespace conv2d_ext
