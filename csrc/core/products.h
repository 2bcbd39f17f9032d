// The tiles of cuda/stream_products.cuh: shared by the planner and the launcher.
#pragma once

#include "row.h"

namespace conv2d_ext {

inline constexpr int kProductImages = 16;   // of a step
inline constexpr int kProductsBegin = 128;  // barriers

// A product has 16 elements of y of some neighbouring planes, and `blocks` times 8 elements of x around them.
struct ProductsTile {
  bool used = false;
  int channels = 1, positions = 1;  // of a unit; its products
  int warps = 1;                    // that multiply; one more copies
  int blocks = 0, below = 0;        // those before the first element of y
  int inner = 8;                    // elements of a row of the copy engine's boxes
  int stage_bytes = 0, stages = 0, shared_bytes = 0;
  int64_t groups = 0, items = 0, grid = 0;  // of images
  int shares = 1, team_log2 = 0;            // partial sums; lanes that add one
};

// Warps that multiply, at most, products of one and blocks of an SM: what registers allow.
constexpr int product_warps(int blocks) { return blocks <= 6 ? 13 : 25; }
constexpr int product_each(int blocks) { return blocks <= 6 ? 2 : 1; }
constexpr int products_together(int blocks) { return blocks <= 6 ? 2 : 1; }
constexpr int product_pitch(int blocks) { return 8 * blocks + 8; }  // floats of a row of sums in shared memory

// wgrad of small planes of 16-bit types that lie one after the other, as large as y's.
constexpr ProductsTile products_tile(Problem const& p, Device const& d) {
  ProductsTile t;
  if (size_of(p.dtype) != 2 || p.C_per_group() != 1 || p.K != p.C || p.N == 0 || p.H * p.W > 256 || p.R > 7 || p.S > 7)
    return t;
  bool const same = p.stride_h == 1 && p.stride_w == 1 && p.P() == p.H && p.Q() == p.W;
  bool const inner = p.pad_top >= 0 && p.pad_left >= 0 && p.pad_top < p.R && p.pad_left < p.S;
  if (!same || p.dilation_h != 1 || p.dilation_w != 1 || !inner) return t;
  int const area = int(p.H * p.W);
  auto whole = [&](Strides const& s, int align) {
    return align >= 16 && s.n % 8 == 0 && s.c == area && (p.H == 1 || s.h == p.W) && (p.W == 1 || s.w == 1) &&
           (p.N == 1 || s.n > 0) && double(s.n) * 2 < double(int64_t(1) << 40);
  };
  if (!whole(p.x, p.x_align) || !whole(p.y, p.y_align)) return t;
  t.below = int(ceil_div(p.pad_top * p.W + p.pad_left, 8));
  t.blocks = 2 + t.below + int(ceil_div((p.R - 1 - p.pad_top) * p.W + p.S - 1 - p.pad_left, 8));
  t.blocks = t.blocks < 4 ? 4 : int(ceil_div(t.blocks, 2) * 2);
  if (t.blocks > 10) return t;
  // Planes of whole 16 bytes, an odd number of them: rows of eight images' elements are in different banks.
  for (t.channels = 1; t.channels <= 8 && t.channels * area % 8 != 0; t.channels *= 2) {}
  int const run = t.channels * area;
  t.positions = int(ceil_div(run, 16));
  if (t.channels > 8 || p.C % t.channels != 0 || run % 16 != 8 || run / 8 < t.blocks) return t;
  if (t.positions > product_warps(t.blocks) * product_each(t.blocks)) return t;
  t.warps = int(ceil_div(t.positions, product_each(t.blocks)));
  for (int i = 8; i <= 256; i += 8)
    if (run % i == 0) t.inner = i;
  int const together = products_together(t.blocks), room = 227 * 1024 / together - 1024 - kProductsBegin - 128;
  t.stage_bytes = 2 * kProductImages * run * 2, t.stages = int(min64(8, room / t.stage_bytes));
  t.shared_bytes =
      kProductsBegin + 128 + int(max64(t.stages * t.stage_bytes, t.positions * 64 * product_pitch(t.blocks)));
  t.groups = ceil_div(p.N, kProductImages);
  int64_t const units = p.C / t.channels, slots = int64_t(together) * d.sm_count;
  if (t.stages < 2 || t.shared_bytes > room + kProductsBegin + 128 ||
      double(units) * double(t.groups) * double(t.groups) > 4e9)
    return t;
  t.items = units * t.groups;
  // Blocks with whole units need no second pass, and half of them read as fast as memory.
  bool const whole_units = units <= slots && 5 * units >= 2 * slots;
  t.grid = whole_units ? units : min64(t.items, slots);
  t.shares = whole_units ? 1 : int(min64(t.groups, ceil_div(t.groups - 1, t.items / t.grid) + 1));
  if (double(p.K) * double(p.R * p.S) * 4 * t.shares > double(kMaxWorkspaceBytes)) return t;
  while (t.team_log2 < 5 && t.channels * p.R * p.S << (t.team_log2 + 1) <= (t.warps + 1) * 32) ++t.team_log2;
  t.used = true;
  return t;
}

constexpr bool is_products(Row const& row) { return row.family == Family::stream && row.tile_m == kProductImages; }

// As measured: what is done once, and 16 images of a block after another, at 23 bytes a ns. Blocks with parts of units
// begin more than once, and have a second pass.
constexpr Estimate products_estimate(Problem const& p, Device const& d) {
  ProductsTile const t = products_tile(p, h200_sxm);
  int64_t const area = p.H * p.W, units = p.C / t.channels;
  double const memory_ns = double(p.N) * double(p.C) * double(area) * 4 / 4250 * 132 / d.sm_count;
  if (t.shares > 1) {
    bool const many = units > products_together(t.blocks) * int64_t(d.sm_count);
    double const begin = !many ? 13000 + 25 * double(p.N) : area <= 64 ? 24000 : 33000;
    return {1.04 * (begin + 1.1 * memory_ns), t.shares};
  }
  double const tasks = double(min64(t.channels * p.R * p.S, 250)), share = double(units) / d.sm_count;
  double const item_ns = t.stage_bytes / 23.0 * (share <= 1 ? 1.0 : 0.9 + 0.48 * share);
  // With up to 16 images nothing is copied meanwhile (16x1152x6x6 5x5 14.2 us, estimated at 9.3).
  double const single = t.groups == 1 ? 1.5 : 1;
  return {1.04 * single * (7200 + 16 * tasks + 10 * double(area) + double(t.groups) * item_ns), 1};
}

}  // namespace conv2d_ext
