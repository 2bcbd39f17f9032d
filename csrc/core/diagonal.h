// The tile of cuda/diagonal.cuh for a problem: shared by the planner and the launcher.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

inline constexpr int kDiagonalGroups = 6, kDiagonalStages = 3;

// Blocks hide each other's copies: as many an SM as the registers allow.
inline constexpr int kDiagonalBlocks = 2;

struct DiagonalTile {
  int rows = 1, strips = 1;  // outputs of a block: rows, and strips of 16 pixels
  bool pairs = false;        // images of up to 8 columns: a strip is two images
  int groups = 1;            // of 8 channels, a warp each
  int images = 1;            // of a block, one after the other; or pairs of them
  int pitch = 1;             // pixels of a row in shared memory
  int64_t tiles_h = 1, tiles_w = 1, channel_units = 1, image_units = 1;
  int64_t plane_bytes = 0, shared_bytes = 0;

  constexpr int64_t blocks() const { return tiles_h * tiles_w * channel_units * image_units; }
};

// Few idle warps, and an even number, since two of them share a sector of 32 bytes.
constexpr int diagonal_groups(int64_t C) {
  int64_t const all = ceil_div(C, 8);
  int found = 1;
  double best = 0;
  for (int groups = 1; groups <= kDiagonalGroups; ++groups) {
    double const cost = double(ceil_div(all, groups) * groups) *
                        (groups >= 4   ? 1.0
                         : groups >= 2 ? 1.2
                                       : 1.6) *
                        (groups % 2 == 0 || groups == all ? 1.0 : 1.1);
    if (best == 0 || cost <= best) best = cost, found = groups;
  }
  return found;
}

// R, S: of the row of the table, not less than the filter's.
constexpr DiagonalTile diagonal_tile(Op op, Problem const& p, int R, int S, Device const& d) {
  int64_t const N = p.N, C = p.C;
  int64_t const out_H = op == Op::dgrad ? p.H : p.P(), out_W = op == Op::dgrad ? p.W : p.Q();
  DiagonalTile t;
  t.groups = diagonal_groups(C), t.channel_units = ceil_div(C, 8 * t.groups);
  t.pairs = out_W <= 8 && N > 1;
  t.strips = out_W <= 16 || R == 7 ? 1 : 2;
  t.tiles_w = ceil_div(out_W, 16 * t.strips);
  t.pitch = t.pairs ? 2 * (8 + S - 1) : 16 * t.strips + S - 1;
  // Enough blocks for several an SM; a tile's rows of halo are read twice.
  int64_t const units = t.pairs ? ceil_div(N, 2) : N, wanted = d.sm_count * 12;
  int64_t const columns = t.tiles_w * t.channel_units;
  int const least = 4 * R;
  t.tiles_h = max64(1, min64(ceil_div(wanted, max64(columns * units, 1)), out_H / least));
  t.rows = int(ceil_div(out_H, t.tiles_h)), t.tiles_h = ceil_div(out_H, t.rows);
  t.images = int(max64(1, min64(min64(columns * t.tiles_h * units / wanted, units), 64)));
  t.image_units = ceil_div(units, t.images);
  t.plane_bytes = ((int64_t(R) * t.pitch) | 1) * 16;  // odd: a pixel's groups are in different banks
  t.shared_bytes = kDiagonalStages * t.plane_bytes * t.groups;
  return t;
}

// wgrad: a block walks down strips of images, in steps of R rows of x and of y.
struct DiagonalSumsTile {
  int rows = 1, groups = 1;
  bool pairs = false;            // images of up to 8 columns: a strip is two images
  int pitch_x = 1, pitch_y = 1;  // pixels of a row in shared memory
  int64_t tiles_h = 1, tiles_w = 1, channel_units = 1, image_units = 1;
  int64_t x_bytes = 0, y_bytes = 0, shared_bytes = 0;

  constexpr int64_t units() const { return image_units * tiles_h * tiles_w; }
};

inline constexpr int kDiagonalSumsStages = 4;

constexpr DiagonalSumsTile diagonal_sums_tile(Problem const& p, int R, int S, Device const& d) {
  DiagonalSumsTile t;
  t.groups = diagonal_groups(p.C), t.channel_units = ceil_div(p.C, 8 * t.groups);
  t.pairs = p.Q() <= 8 && p.N > 1, t.image_units = t.pairs ? ceil_div(p.N, 2) : p.N;
  t.tiles_w = ceil_div(p.Q(), 16);
  t.pitch_y = 16, t.pitch_x = t.pairs ? 2 * (8 + S - 1) : t.pitch_y + S - 1;
  int64_t const wanted = d.sm_count * 12, columns = t.tiles_w * t.channel_units * t.image_units;
  t.tiles_h = max64(1, min64(ceil_div(wanted, max64(columns, 1)), p.H / (8 * R)));
  t.rows = int(ceil_div(ceil_div(p.H, t.tiles_h), R) * R), t.tiles_h = ceil_div(p.H, t.rows);
  t.x_bytes = ((int64_t(R) * t.pitch_x) | 1) * 16;  // odd: a pixel's groups are in different banks
  t.y_bytes = ((int64_t(R) * t.pitch_y) | 1) * 16;
  t.shared_bytes = kDiagonalSumsStages * (t.x_bytes + t.y_bytes) * t.groups;
  return t;
}

constexpr bool diagonal_supports(Row const& row, Op op, Problem const& p, Device const& d) {
  if (!unit_stride_depthwise(row, p) || p.R > row.tile_m || p.S > row.tile_n) return false;
  if (!channel_vectors(p.x, p.x_align, p.C, 8, p.dtype) || !channel_vectors(p.y, p.y_align, p.C, 8, p.dtype))
    return false;
  constexpr int64_t most = int64_t(1) << 29;
  if (op == Op::wgrad) {
    DiagonalSumsTile const t = diagonal_sums_tile(p, row.tile_m, row.tile_n, d);
    return double(t.tiles_h) * double(t.tiles_w) * double(t.image_units) < double(most) &&
           t.channel_units * 4096 < most;
  }
  DiagonalTile const t = diagonal_tile(op, p, row.tile_m, row.tile_n, d);
  return double(t.tiles_h) * double(t.tiles_w) * double(t.channel_units) * double(t.image_units) < double(most);
}

constexpr Estimate diagonal_sums_estimate(Row const& row, Problem const& p, Device const& d) {
  DiagonalSumsTile const t = diagonal_sums_tile(p, row.tile_m, row.tile_n, d);
  int const resident = kDiagonalBlocks * d.sm_count;
  // Of a strip, where each SM has one.
  double const copied = (t.rows + row.tile_m) * double(t.pitch_x + t.pitch_y) * t.groups * 16;
  double const products = double(t.rows) * t.groups * ((row.tile_m + 1) / 2) * row.tile_n;
  double const copy_ns = copied / 3500 * d.sm_count, multiply_ns = products * 1.6 / 1.755;
  double const unit_ns = overlapped(copy_ns, multiply_ns), sums = double(p.K) * double(p.R) * double(p.S);
  Estimate best;
  for (int64_t split = 1; split <= t.units() && split <= 4096; split += split < 32 ? 1 : split / 32) {
    if (split > 1 && sums * double(split) * 4 > double(kMaxWorkspaceBytes)) break;
    double const blocks = double(t.channel_units) * double(split), full = double(resident);
    double const rounds = blocks > full ? double(ceil_div(int64_t(blocks), resident)) : 1.0;
    double const shared = blocks < full ? (blocks < d.sm_count ? 1.0 : blocks / d.sm_count) : full / d.sm_count;
    double ns =
        9000 + (row.tile_m == 7 ? 1.55 : 1.3) * rounds * (double(ceil_div(t.units(), split)) * unit_ns * shared + 1000);
    if (split > 1) ns += 2500 + sums * double(split) * 8 / 2500;
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
  }
  return best;
}

// Memory, or the multiplications: R * S of 8 channels for 16 pixels, in 3.2 cycles on each of an SM's four tensor
// cores.
constexpr Estimate diagonal_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  if (op == Op::wgrad) return diagonal_sums_estimate(row, p, d);
  DiagonalTile const t = diagonal_tile(op, p, row.tile_m, row.tile_n, d);
  double const units = t.pairs ? double(ceil_div(p.N, 2)) : double(p.N);
  double const planes = units * double(t.channel_units) * t.groups * double(t.tiles_h) * double(t.tiles_w);
  double const pixels = double(t.rows + row.tile_m - 1) * t.pitch + double(t.rows) * 16 * t.strips;
  double const products = double(t.rows) * t.strips * row.tile_m * row.tile_n;
  double const memory_ns = planes * pixels * 16 / 3500, multiply_ns = planes * products * 0.8 / 1.755 / d.sm_count;
  // As measured: all of a few blocks' rows wait for their copies, one after the other.
  double const ns = row.tile_m == 7 ? 11000 + 1.3 * overlapped(memory_ns, multiply_ns)
                                    : 8500 + 1.25 * overlapped(memory_ns, multiply_ns);
  double const chain_ns = 5000 + 420.0 * t.images * (t.rows + row.tile_m - 1);
  return {ns > chain_ns ? ns : chain_ns, 1};
}

}  // namespace conv2d_ext
