// fprop and dgrad of grouped.cuh, as measured: its tiles, as set_tiles in grouped_tile.cuh chooses them, and what they
// take. Apart from what kernels include, so that a new constant compiles none.
#pragma once

#include "grouped.h"

namespace conv2d_ext {

struct GroupedTile {
  int64_t inputs, slab, n_groups, at_once, runs;  // blocks of a unit's inputs, units, runs of so many blocks of outputs
  int64_t halves, taken;                          // k8 steps of all phases, with and without those that fill up
  int64_t squares, images, warps, tiles, weight_bytes;
  int64_t rows, columns;  // of the inputs' window
  double stored;          // the share of a tile's outputs that exist
  int stages, of_sm;      // copies that are kept, blocks that an SM holds
};

constexpr GroupedTile grouped_tile(Op op, Problem const& p) {
  constexpr int64_t slot = 16, side = 8, most_warps = 8, most_shared = 226 * 1024, half_shared = most_shared / 2 - 1024;
  bool const backward = op == Op::dgrad, f32 = p.dtype == DType::f32;
  int64_t const unit = groups_per_unit(p), units = ceil_div(p.groups, unit), wide = f32 ? 2 : 1;
  int64_t const out = unit * (backward ? p.C_per_group() : p.K_per_group()) / 8;
  GroupedTile t{};
  t.inputs = unit * (backward ? p.K_per_group() : p.C_per_group()) / 8 * wide;
  t.at_once = grouped_shared_blocks(out, p.dtype), t.n_groups = ceil_div(out, t.at_once);
  t.runs = max64(1, 4 / (t.at_once * wide));
  GroupedAxis const h = grouped_axis_h(op, p), w = grouped_axis_w(op, p);
  for (int i = 0; i < h.phases; ++i)
    for (int j = 0; j < w.phases; ++j) {
      int64_t const taps = backward ? dgrad_walk(p.H, p.R, p.stride_h, p.pad_top, p.dilation_h, i).taps *
                                          dgrad_walk(p.W, p.S, p.stride_w, p.pad_left, p.dilation_w, j).taps
                                    : p.R * p.S;
      int64_t const count = t.inputs * (grouped_is_3x3(p) ? 12 : taps);
      t.taken += count, t.halves += ceil_div(count, 2) * 2;
    }
  t.slab = min64(units, max64(1, 8 / max64(t.inputs, out * wide)));
  for (;; t.slab = ceil_div(t.slab, 2)) {
    int64_t const per_slab = ceil_div(t.slab * t.n_groups, t.runs), blocks = t.slab * t.inputs;
    t.weight_bytes = t.slab * t.n_groups * t.halves * t.at_once * 128 * (f32 && !p.allow_tf32 ? 2 : 1);
    int64_t const fixed = t.weight_bytes + per_slab * t.runs * t.at_once * 32 + t.halves * 16;
    int64_t const most = max64(1, most_warps / per_slab), skew = blocks >= 8 || blocks % 2 != 0 ? 1 : 8 / blocks;
    double best = 0;
    for (int64_t high = 1; high <= most; ++high)
      for (int64_t across = 1; across * high <= most; ++across) {
        bool const fills = high * side >= h.positions && across * side >= w.positions;
        int64_t const images = fills ? min64(max64(1, most / (high * across)), p.N) : 1;
        int64_t const rows = (high * side - 1) * h.step + h.span, columns = (across * side - 1) * w.step + w.span;
        int64_t const slots = images * rows * ceil_div(columns, w.step) * w.step;
        int64_t const stage = ceil_div((ceil_div(slots, 8) * 8 + skew) * slot * blocks, 128) * 128;
        bool const none_fits = t.slab == 1 && high == 1 && across == 1;  // it is taken then
        if (stage + fixed > most_shared && !none_fits) continue;
        int64_t const tiles_h = max64(1, ceil_div(h.positions, high * side)),
                      tiles_w = max64(1, ceil_div(w.positions, across * side));
        int64_t const tiles = tiles_h * tiles_w * ceil_div(p.N, images), squares = high * across * images;
        double const multiplied =
            double(ceil_div(squares * per_slab, most_warps)) * double(most_warps) / double(per_slab);
        double const cost = double(tiles) * (double(slots) + multiplied * 32);
        if (best > 0 && cost >= best) continue;
        best = stage + fixed > most_shared ? 1e300 : cost;
        t.squares = squares, t.images = images, t.tiles = tiles, t.rows = rows, t.columns = columns;
        t.warps = min64(most_warps, squares * per_slab);
        t.stored = double(h.positions * w.positions) * double(p.N) /
                   (double(tiles_h * tiles_w * high * across) * 64 * double(ceil_div(p.N, images) * images));
        int64_t const one = stage + fixed, two = one + stage;
        t.stages = two <= half_shared || (two <= most_shared && one > half_shared) ? 2 : 1;
        t.of_sm = (t.stages == 2 ? two : one) <= half_shared ? 2 : 1;
      }
    if (best > 0 || t.slab == 1) return t;
  }
}

// How many neighbours of a row of outputs are stored at once, where addresses are aligned.
constexpr int64_t grouped_store_width(Op op, Problem const& p) {
  int64_t const step = op == Op::dgrad ? p.stride_w : 1, columns = op == Op::dgrad ? p.W : p.Q();
  if (step > 1 || (op == Op::dgrad ? p.x : p.y).w > 1) return 1;
  return gcd64(columns, 8);
}

// A block's filters, then its tiles: copies, products, stores, one after the other where one stage is all that fits.
// Fitted, in us, to 874 times of either layout.
constexpr Estimate grouped_any_estimate(Op op, Problem const& p, Device const& d) {
  GroupedTile const t = grouped_tile(op, p);
  bool const f32 = p.dtype == DType::f32, across = p.x.c == 1 && p.C > 1, backward = op == Op::dgrad;
  int64_t const slabs = ceil_div(ceil_div(p.groups, groups_per_unit(p)), t.slab), held = int64_t(d.sm_count) * t.of_sm;
  int64_t const each = ceil_div(t.tiles, max64(1, held / slabs)), blocks = ceil_div(t.tiles, each) * slabs;
  double const rounds = double(ceil_div(blocks, held)), turns = double(each) * rounds;
  double const warps = double(t.warps) * double(min64(ceil_div(blocks, d.sm_count), t.of_sm));  // of an SM
  // Of a warp: loads of its filters, four at a time; runs of 32 slots; products; outputs.
  double const loads =
      double(ceil_div(t.slab * t.n_groups * t.at_once * 4, t.warps)) * double(ceil_div(ceil_div(t.halves, 4), 4));
  double const copies =
      turns * double(ceil_div(ceil_div(t.columns * t.slab * t.inputs, 32) * t.images * t.rows, t.warps));
  double const items =
      turns * double(ceil_div(t.squares * ceil_div(t.slab * t.n_groups, t.runs), t.warps) * t.runs * t.at_once);
  double const products = items * double(t.taken) / 2;
  double const stores = items * double(grouped_axis_h(op, p).phases * grouped_axis_w(op, p).phases) * t.stored;
  int64_t const width = f32 ? 8 : grouped_store_width(op, p);
  double const y = double(p.N) * double(p.K) * double(p.P()) * double(p.Q()),
               x = double(p.N) * double(p.C) * double(p.H) * double(p.W), bytes = (x + y) * size_of(p.dtype) / 1e6;
  // Single pixels of a stride's phases, and rows that are stored so.
  bool const strided = backward && p.stride_w > 1;
  double const apart = strided && !across ? x / 1e6 : 0;
  double const us = 6.23 + rounds * (loads * (across ? 0.81 : 0.382) + double(t.weight_bytes) * 1.14e-4) +
                    copies * (t.stages == 1 ? 0.198 : 0.25) + warps * copies * 0.00617 +
                    products * (!f32           ? 0.0149
                                : p.allow_tf32 ? 0.0192
                                               : 0.0376) +
                    warps * products *
                        (!f32           ? 0.00189
                         : p.allow_tf32 ? 0.00311
                                        : 0.00797) +
                    stores * 0.946 +
                    warps * stores *
                        (f32      ? 0.0437
                         : across ? 0
                                  : 0.308 / double(width)) +
                    apart * (f32 ? 2.36 : 5.71) + bytes * (f32 || width > 1 || strided ? 0.29 : 0.75);
  return {us * 950, 1};
}

}  // namespace conv2d_ext
