// grouped.cuh and grouped_wgrad.cuh: slab, tile and shared memory of a block of threads. The launchers and the planner
// ask here.
#pragma once

#include "grouped.h"

namespace conv2d_ext {

inline constexpr int kGroupedSlot = 16;  // bytes of channels that are copied at once
inline constexpr int kGroupedBlock = 8;  // channels of the results that one mma computes
inline constexpr int kGroupedSide = 8;   // outputs of a warp: 8 x 8
inline constexpr int kGroupedWarps = 8;  // of a block of threads, at most
inline constexpr int64_t kGroupedShared = 226 * 1024, kGroupedSharedHalf = kGroupedShared / 2 - 1024;

// Runs of `shared_blocks` blocks of outputs that a warp computes: 64 bytes of a pixel.
constexpr int grouped_runs(int shared_blocks, int element) {
  return shared_blocks * element >= 8 ? 1 : 8 / (shared_blocks * element);
}

// Planes are apart by so many slots that the copies of a pixel's channels go to different banks.
constexpr int64_t grouped_plane_bytes(int64_t slots, int64_t blocks) {
  int64_t const skew = blocks >= 8 || blocks % 2 != 0 ? 1 : 8 / blocks;
  return (ceil_div(slots, 8) * 8 + skew) * kGroupedSlot;
}

// The inputs of a tile with their halo, and their planes in shared memory, one for each block of channels. The columns
// that leave the same remainder lie together.
struct GroupedWindow {
  int64_t rows, columns, parity_columns, pitch, plane, bytes;
};
constexpr GroupedWindow grouped_window(GroupedAxis const& h, GroupedAxis const& w, int64_t squares_h, int64_t squares_w,
                                       int64_t images, int64_t blocks) {
  GroupedWindow a{};
  a.rows = (squares_h * kGroupedSide - 1) * h.step + h.span;
  a.columns = (squares_w * kGroupedSide - 1) * w.step + w.span;
  a.parity_columns = ceil_div(a.columns, w.step);
  a.pitch = a.parity_columns * w.step;
  a.plane = grouped_plane_bytes(images * a.rows * a.pitch, blocks);
  a.bytes = ceil_div(a.plane * blocks, 128) * 128;
  return a;
}

// Copies of a tile that are kept, `bytes` each beside `fixed`: two where an SM holds as many blocks as with one.
constexpr int64_t grouped_stages(int64_t bytes, int64_t fixed) {
  int64_t const one = fixed + bytes, two = one + bytes;
  return two <= kGroupedSharedHalf || (two <= kGroupedShared && one > kGroupedSharedHalf) ? 2 : 1;
}

struct GroupedTile {
  int64_t inputs, outputs;  // of a unit: slots of a pixel's channels, blocks of results
  int at_once, runs;        // blocks of results that share their inputs' fragments; such runs of a warp
  int64_t slab, n_groups;   // units of a block of threads, and runs of a unit's results
  int64_t taken, halves;    // k8 steps of all phases, without and with those that fill them up
  int64_t squares_h, squares_w, images, tiles;
  GroupedWindow window;
  int64_t warps, stages, weight_bytes, shared;
  int of_sm;  // blocks of threads that an SM holds
};

// The cheapest tile: inputs read, and squares multiplied, per output that exists. Where none fits, with half the units;
// of one unit the least tile is taken.
constexpr GroupedTile grouped_tile(Op op, Problem const& p) {
  bool const backward = op == Op::dgrad;
  int const element = size_of(p.dtype);
  int64_t const unit = groups_per_unit(p), units = ceil_div(p.groups, unit);
  GroupedTile t{};
  t.inputs = unit * (backward ? p.K_per_group() : p.C_per_group()) * element / kGroupedSlot;
  t.outputs = unit * (backward ? p.C_per_group() : p.K_per_group()) / kGroupedBlock;
  t.at_once = grouped_shared_blocks(t.outputs, p.dtype), t.runs = grouped_runs(t.at_once, element);
  t.n_groups = ceil_div(t.outputs, t.at_once);
  GroupedAxis const h = grouped_axis_h(op, p), w = grouped_axis_w(op, p);
  for (int i = 0; i < h.phases; ++i)
    for (int j = 0; j < w.phases; ++j) {
      int64_t const taps = backward ? dgrad_walk(p.H, p.R, p.stride_h, p.pad_top, p.dilation_h, i).taps *
                                          dgrad_walk(p.W, p.S, p.stride_w, p.pad_left, p.dilation_w, j).taps
                                    : p.R * p.S;
      int64_t const count = t.inputs * (grouped_is_3x3(p) ? 12 : taps);
      t.taken += count, t.halves += ceil_div(count, 2) * 2;
    }
  // 64 channels of a pixel are 128 bytes, a line of the caches.
  int64_t const slots = max64(t.inputs, t.outputs * kGroupedBlock * element / kGroupedSlot);
  t.slab = min64(units, max64(1, 128 / kGroupedSlot / slots));
  for (;; t.slab = ceil_div(t.slab, 2)) {
    int64_t const per_slab = ceil_div(t.slab * t.n_groups, t.runs);  // warps for one square
    int64_t const parts = p.dtype == DType::f32 && !p.allow_tf32 ? 2 : 1;
    t.weight_bytes = t.slab * t.n_groups * t.halves * t.at_once * 128 * parts;
    int64_t const fixed = t.weight_bytes + per_slab * t.runs * t.at_once * kGroupedBlock * 4 + t.halves * 16;
    auto set = [&](int64_t high, int64_t across, int64_t images) {
      t.squares_h = high, t.squares_w = across, t.images = images;
      t.window = grouped_window(h, w, high, across, images, t.slab * t.inputs);
      t.tiles = max64(1, ceil_div(h.positions, high * kGroupedSide)) *
                max64(1, ceil_div(w.positions, across * kGroupedSide)) * ceil_div(p.N, images);
    };
    double best = 0;
    int64_t best_h = 1, best_w = 1, best_images = 1;
    int64_t const most = max64(1, kGroupedWarps / per_slab);
    for (int64_t high = 1; high <= most; ++high)
      for (int64_t across = 1; across * high <= most; ++across) {
        bool const fills = high * kGroupedSide >= h.positions && across * kGroupedSide >= w.positions;
        set(high, across, fills ? min64(max64(1, most / (high * across)), p.N) : 1);
        if (t.window.bytes + fixed > kGroupedShared) continue;
        double const multiplied =
            double(ceil_div(high * across * t.images * per_slab, kGroupedWarps)) * kGroupedWarps / double(per_slab);
        double const cost = double(t.tiles) * (double(t.images * t.window.rows * t.window.pitch) +
                                               multiplied * kGroupedSide * kGroupedSide * 0.5);
        if (best == 0 || cost < best) best = cost, best_h = high, best_w = across, best_images = t.images;
      }
    if (best == 0 && t.slab > 1) continue;
    set(best_h, best_w, best_images);
    t.warps = min64(kGroupedWarps, best_h * best_w * best_images * per_slab);
    t.stages = grouped_stages(t.window.bytes, fixed), t.shared = fixed + t.stages * t.window.bytes;
    t.of_sm = t.shared <= kGroupedSharedHalf ? 2 : 1;
    return t;
  }
}

// wgrad: the tile of x with its halo, and that of y behind it.
struct GroupedSumTile {
  int64_t squares_h = 1, squares_w = 1, images = 1, tiles = 1;
  GroupedWindow x{}, y{};
  int64_t y_blocks = 0, stages = 1, stage_bytes = 0, shared = 0;
};

inline constexpr int64_t kGroupedZeros = 32;  // bytes that are read for pixels outside of y

constexpr GroupedSumTile grouped_sum_tile(Problem const& p, int64_t shares) {
  int const element = size_of(p.dtype);
  int64_t const unit = groups_per_unit(p), slab = grouped_sums(p).slab;
  int64_t const inputs = unit * p.C_per_group() * element / kGroupedSlot, outputs = unit * p.K_per_group();
  GroupedAxis const h = grouped_axis_h(Op::fprop, p), w = grouped_axis_w(Op::fprop, p);
  int64_t const most = max64(2, shares * 2), fixed = kGroupedZeros + inputs * p.R * p.S * 4;
  GroupedSumTile t{};
  auto set = [&](int64_t high, int64_t across, int64_t images) {
    t.squares_h = high, t.squares_w = across, t.images = images;
    t.x = grouped_window(h, w, high, across, images, slab * inputs);
    t.y.rows = high * kGroupedSide, t.y.columns = t.y.parity_columns = t.y.pitch = across * kGroupedSide;
    t.y_blocks = slab * outputs * element / kGroupedSlot;
    t.y.plane = grouped_plane_bytes(images * t.y.rows * t.y.pitch, t.y_blocks);
    t.y.bytes = t.y.plane * (t.y_blocks + 4);  // the last run of blocks may reach past them
    t.tiles = ceil_div(h.positions, high * kGroupedSide) * ceil_div(w.positions, across * kGroupedSide) *
              ceil_div(p.N, images);
    t.stage_bytes = ceil_div(t.x.bytes + t.y.bytes, 128) * 128;
    t.stages = grouped_stages(t.stage_bytes, fixed), t.shared = fixed + t.stages * t.stage_bytes;
  };
  double best = 0;
  int64_t best_h = 1, best_w = 1, best_images = 1;
  for (int64_t high = 1; high <= most; ++high)
    for (int64_t across = 1; across * high <= most; ++across) {
      bool const fills = high * kGroupedSide >= h.positions && across * kGroupedSide >= w.positions;
      set(high, across, fills ? min64(p.N, max64(1, most / (high * across))) : 1);
      if (2 * t.stage_bytes + fixed > kGroupedSharedHalf) continue;
      double const pixels = double(t.images * high * across) * kGroupedSide * kGroupedSide;
      double const cost = double(t.tiles) * (double(t.images * t.x.rows * t.x.pitch) + 1.5 * pixels + 64);
      if (best == 0 || cost < best) best = cost, best_h = high, best_w = across, best_images = t.images;
    }
  set(best_h, best_w, best_images);
  return t;
}

}  // namespace conv2d_ext
