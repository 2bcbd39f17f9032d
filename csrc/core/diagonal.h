// The tile of cuda/diagonal.cuh for a problem: shared by the planner and the launcher.
#pragma once

#include "problem.h"

namespace conv2d_ext {

struct DiagonalTile {
  int rows = 1, strips = 1;  // outputs: rows, and strips of 16 pixels
  int groups = 1;            // of 8 channels, a warp each
  int64_t tiles_h = 1, tiles_w = 1, channel_units = 1;
  int pitch = 1;  // pixels of a row in shared memory
  int64_t plane_bytes = 0, shared_bytes = 0;
};

inline constexpr int kDiagonalGroups = 6;

// Blocks hide each other's copies: as many an SM as the registers allow.
constexpr int diagonal_blocks(Op op, int R) { return R == 3 || (R == 5 && op != Op::wgrad) ? 3 : 2; }
constexpr int diagonal_shared_bytes(Op op, int R) { return 225 * 1024 / diagonal_blocks(op, R) - 1024; }

// R, S: of the row of the table, not less than the filter's. The tile with the least copied and computed pixels.
constexpr DiagonalTile diagonal_tile(int64_t out_H, int64_t out_W, int64_t C, int R, int S) {
  DiagonalTile best;
  double best_cost = 0;
  int64_t const all = ceil_div(C, 8), units = ceil_div(all, kDiagonalGroups), strips_of_image = ceil_div(out_W, 16);
  for (int64_t more = 0; more < 4; ++more) {
    DiagonalTile t;
    t.groups = int(ceil_div(all, units + more));
    t.channel_units = ceil_div(all, t.groups);
    for (int64_t across = ceil_div(strips_of_image, 8); across <= strips_of_image && across < 64; ++across) {
      t.strips = int(ceil_div(strips_of_image, across));
      t.tiles_w = ceil_div(strips_of_image, t.strips);
      t.pitch = 16 * t.strips + S - 1;
      int64_t const room = diagonal_shared_bytes(Op::fprop, R) / t.groups / (t.pitch * 16) - R;
      if (room < 1) continue;
      t.tiles_h = ceil_div(out_H, min64(room, out_H));
      t.rows = int(ceil_div(out_H, t.tiles_h));
      t.tiles_h = ceil_div(out_H, t.rows);
      int64_t const pixels = int64_t(t.rows + R - 1) * t.pitch;
      t.plane_bytes = (pixels | 1) * 16;  // odd: a pixel's groups are in different banks
      t.shared_bytes = t.plane_bytes * t.groups;
      double const tiles = double(t.tiles_h) * double(t.tiles_w);
      // A pixel of the tile is copied, zeros outside the image too; one of the image is written. Few groups: short
      // runs.
      double const cost = tiles * (double(pixels) + double(t.rows) * 16 * t.strips) *
                          double(t.channel_units * t.groups) *
                          (t.groups >= 4   ? 1.0
                           : t.groups >= 2 ? 1.15
                                           : 1.6);
      if (best_cost == 0 || cost < best_cost) best = t, best_cost = cost;
    }
  }
  return best;
}

// wgrad: rows of x and strips of 16 columns of y in a step.
struct DiagonalSumsTile {
  int rows = 1, strips = 1, groups = 1;
  int rows_y = 1, pitch_x = 1, pitch_y = 1;  // of the planes, in pixels
  int64_t tiles_h = 1, tiles_w = 1, channel_units = 1;
  int64_t x_bytes = 0, y_bytes = 0, shared_bytes = 0;
  double copied = 0;  // pixels of a step, of x and y
};

constexpr DiagonalSumsTile diagonal_sums_tile(Problem const& p, int R, int S) {
  DiagonalSumsTile best;
  double best_cost = 0;
  int64_t const all = ceil_div(p.C, 8), units = ceil_div(all, kDiagonalGroups), strips_of_image = ceil_div(p.Q(), 16);
  int const halo = (R + 1) / 2 * 2 - 1;
  for (int64_t more = 0; more < 4; ++more) {
    DiagonalSumsTile t;
    t.groups = int(ceil_div(all, units + more));
    t.channel_units = ceil_div(all, t.groups);
    for (int64_t across = ceil_div(strips_of_image, 4); across <= strips_of_image && across < 64; ++across) {
      t.strips = int(ceil_div(strips_of_image, across));
      t.tiles_w = ceil_div(strips_of_image, t.strips);
      t.pitch_y = 16 * t.strips, t.pitch_x = t.pitch_y + S - 1;
      int64_t const room =
          (diagonal_shared_bytes(Op::wgrad, R) / t.groups / 16 - 2 - halo * t.pitch_y) / (t.pitch_x + t.pitch_y);
      if (room < 1) continue;
      t.tiles_h = ceil_div(p.H, min64(room, p.H));
      t.rows = int(ceil_div(p.H, t.tiles_h));
      t.tiles_h = ceil_div(p.H, t.rows);
      t.rows_y = t.rows + halo;
      t.x_bytes = ((int64_t(t.rows) * t.pitch_x) | 1) * 16;  // odd: a pixel's groups are in different banks
      t.y_bytes = ((int64_t(t.rows_y) * t.pitch_y) | 1) * 16;
      t.shared_bytes = (t.x_bytes + t.y_bytes) * t.groups;
      t.copied = double(t.rows) * t.pitch_x + double(t.rows_y) * t.pitch_y;
      double const cost = double(t.tiles_h) * double(t.tiles_w) * t.copied * double(t.channel_units * t.groups) *
                          (t.groups >= 4   ? 1.0
                           : t.groups >= 2 ? 1.15
                                           : 1.6);
      if (best_cost == 0 || cost < best_cost) best = t, best_cost = cost;
    }
  }
  return best;
}

}  // namespace conv2d_ext
