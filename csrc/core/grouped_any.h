// grouped.cuh and grouped_wgrad.cuh, as measured: what its tiles (grouped_tile.h) take. Apart from what kernels
// include, so that a new constant compiles none.
#pragma once

#include "grouped_tile.h"
#include "images.h"

namespace conv2d_ext {

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
  GroupedAxis const h = grouped_axis_h(op, p), w = grouped_axis_w(op, p);
  int64_t const squares = t.squares_h * t.squares_w * t.images;
  // The share of the tiles' outputs that exist.
  double const stored = double(h.positions) * double(w.positions) * double(p.N) /
                        (double(t.tiles * squares) * kGroupedSide * kGroupedSide);
  bool const f32 = p.dtype == DType::f32, across = p.x.c == 1 && p.C > 1, backward = op == Op::dgrad;
  int64_t const slabs = ceil_div(ceil_div(p.groups, groups_per_unit(p)), t.slab), held = int64_t(d.sm_count) * t.of_sm;
  int64_t const each = ceil_div(t.tiles, max64(1, held / slabs)), blocks = ceil_div(t.tiles, each) * slabs;
  double const rounds = double(ceil_div(blocks, held)), turns = double(each) * rounds;
  double const warps = double(t.warps) * double(min64(ceil_div(blocks, d.sm_count), t.of_sm));  // of an SM
  // Of a warp: loads of its filters, four at a time; runs of 32 slots; products; outputs.
  double const loads =
      double(ceil_div(t.slab * t.n_groups * t.at_once * 4, t.warps)) * double(ceil_div(ceil_div(t.halves, 4), 4));
  double const copies =
      turns * double(ceil_div(ceil_div(t.window.columns * t.slab * t.inputs, 32) * t.images * t.window.rows, t.warps));
  double const items =
      turns * double(ceil_div(squares * ceil_div(t.slab * t.n_groups, t.runs), t.warps) * t.runs * t.at_once);
  // As measured: large filters, whose fragments do not stay near.
  double const far = p.R * p.S >= 49 ? 1.4 : f32 && p.R * p.S >= 25 ? 1.2 : 1;
  double const products = items * double(t.taken) / 2 * far;
  double const stores = items * double(h.phases * w.phases) * stored;
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
                    apart * (f32 ? 2.36 : 5.71) +
                    bytes * (f32 || width > 2 || strided ? 0.29
                             : width == 2                ? 0.6
                                                         : 0.85);
  return {us * 950, 1};
}

// wgrad with the split that grouped_estimate() takes: tiles one after the other, each copied, then multiplied; of
// strict float32 products follow each other. Fitted to 1,175 times of either layout.
constexpr Estimate grouped_sums_any_estimate(Row const& row, Problem const& p, Device const& d) {
  Estimate e = grouped_estimate(row, Op::wgrad, p, d);
  GroupedSums const g = grouped_sums(p);
  int64_t const shares = min64(g.shares, e.split_k), warps = min64(g.items, 16) * shares;
  GroupedSumTile const t = grouped_sum_tile(p, shares);
  bool const f32 = p.dtype == DType::f32, strict = f32 && !p.allow_tf32;
  int64_t const slabs = ceil_div(ceil_div(p.groups, groups_per_unit(p)), g.slab) * ceil_div(g.items, 16);
  int64_t const tiles = max64(1, t.tiles), turns = ceil_div(tiles, max64(1, e.split_k / shares));
  int64_t const splits = ceil_div(tiles, turns);
  int64_t const blocks = splits * slabs, of_sm = max64(1, min64(228 * 1024 / (t.shared + 1024), 16 / warps));
  double const rounds = double(ceil_div(blocks, d.sm_count * of_sm)), busy = double(ceil_div(blocks, d.sm_count));
  // Of a warp: runs of 32 slots that it copies, halves in fragments, loads of fragments for them.
  auto runs = [&](GroupedWindow const& w, int64_t all) { return ceil_div(w.columns * all, 32) * t.images * w.rows; };
  int64_t const inputs = groups_per_unit(p) * p.C_per_group() / 8 * (f32 ? 2 : 1);
  double const copies = double(ceil_div(runs(t.x, g.slab * inputs), warps) + ceil_div(runs(t.y, t.y_blocks), warps));
  double const fragments =
      double(ceil_div(min64(grouped_halves(int(g.together), p.dtype), inputs * p.R * p.S), f32 ? 4 : 2));
  double const squares = double(ceil_div(t.squares_h * t.squares_w * t.images, shares)), together = double(g.together);
  double const loads = squares * 4 * (fragments + together), products = strict ? squares * fragments * 8 : 0;
  double const sums = double(p.K) * double(p.C_per_group() * p.R * p.S) * double(splits * shares) * 4;
  double const bytes = size_of(p.dtype) * double(p.N) *
                       (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  e.ns = 7440 +
         double(turns) * (rounds * (1320 + 240 * copies + 39.9 * products) + busy * double(warps) * loads * 5.48) +
         rounds * fragments * together * 1084 + sums * 0.00212 + (splits * shares > 1 ? 3180 : 0) + bytes * 0.000283;
  return e;
}

// fprop and dgrad of lines, but for the copies of packed tensors: the filters, then tiles, in which a warp's products
// follow each other while the SM's multiply, are stored and (planes) turned. Fitted to 2,531 times.
constexpr Estimate grouped_lines_any_estimate(Op op, Problem const& p, Device const& d, bool packed) {
  GroupedLines const t = grouped_lines(op, p, d);
  bool const f32 = p.dtype == DType::f32, backward = op == Op::dgrad;
  int64_t const unit = groups_per_unit(p), slabs = ceil_div(ceil_div(p.groups, unit), t.slab);
  int64_t const inputs = unit * (backward ? p.K_per_group() : p.C_per_group()) / 8 * (f32 ? 2 : 1);
  GroupedAxis const h = grouped_axis_h(op, p), w = grouped_axis_w(op, p);
  int64_t const step = grouped_step_3x3(op, p), squares = t.squares_h * t.squares_w * t.images;
  int64_t const tiles =
      ceil_div(h.positions, t.squares_h * 8) * ceil_div(w.positions, t.squares_w * 8) * ceil_div(p.N, t.images);
  int64_t const each = ceil_div(tiles, max64(1, d.sm_count * t.blocks_of_sm / slabs));
  int64_t const blocks = ceil_div(tiles, each) * slabs, runs = t.slab * t.n_groups;
  double const of_sm = double(each * min64(t.blocks_of_sm, ceil_div(blocks, d.sm_count)));  // tiles
  double const taps = double(inputs * p.R * p.S) * t.met;
  double const product = (!f32 ? 1.32 : p.allow_tf32 ? 0.765 : 5.48) + (step == 1 ? 0 : 1.09);
  // A warp's share of a square, or the phase with the most taps.
  double const most = double(inputs * ceil_div(p.R, h.phases) * ceil_div(p.S, w.phases)) * t.met;
  double const part = taps / double(t.of_phases), mine = t.of_phases > 1 && most > part ? most : part;
  double const alone = double(ceil_div(squares * t.of_phases, t.shares)) * mine * (step == 1 ? 24.6 : 38.7);
  double const turned = t.planar ? double(t.images * t.rows * t.columns * t.planes * t.slab * inputs) * 0.551 : 0;
  double const busy = double(squares * 64 * h.out_step * w.out_step) * 0.997 + turned +
                      double(squares * runs) * (taps * double(t.at_once) * product + (step == 0 ? 37.6 : 14.5));
  double const filters = double(ceil_div(t.weight_bytes, 128 * 9 * runs * t.shares)) * 421 +
                         double(t.weight_bytes * t.blocks_of_sm) * 0.0525;
  double const bytes = size_of(p.dtype) * double(p.N) *
                       (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  double const ns =
      7500 + (packed ? 1590 : 0) + filters + bytes * 0.000118 + of_sm * busy +
      double(each) * (alone + double(h.phases * w.phases / t.of_phases) * 175 + (t.stages == 1 ? 1330 : 0));
  // As measured: strides over NCHW, and of floats of up to four channels.
  double const few = f32 && min64(p.C_per_group(), p.K_per_group()) <= 4 ? 1500 : 0;
  return {t.of_phases == 1 ? ns : packed || t.planar ? ns * 1.15 : ns + few, 1};
}

// Whole images (grouped_images.cuh): a block's filters and zeros, then its teams' images, whose products follow each
// other, and share the SM. Fitted to 256 times.
constexpr Estimate images_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  ImageTile const t = image_tile(row, op, p, d);
  bool const backward = op == Op::dgrad;
  double const rounds = double(ceil_div(p.groups * t.parts, d.sm_count)),
               images = double(ceil_div(p.N, t.parts * t.teams)), teams = double(t.teams);  // images of a team
  double const steps = double(t.tiles * p.R * p.S * row.tile_n * size_of(p.dtype) / 32);
  double const bytes =
      size_of(p.dtype) * double(backward ? p.K_per_group() * p.P() * p.Q() : p.C_per_group() * p.H * p.W);
  double const image =
      teams * 206 + steps * (16.3 + teams * 6.74) + bytes * 0.0525 + double(t.lines) * 0.587 + double(t.tiles) * 555;
  double ns = 5850 + rounds * (1170 + double(t.filter_bytes) * 0.063 + double(t.line_bytes) * 0.0101 + images * image);
  // Many images of several tiles take longer (64x1024x14x14 in float16: 42.0 us, estimated at 36.8).
  if (size_of(p.dtype) == 2 && t.tiles > 1 && ns > 18000) ns += (ns - 18000) * 0.27;
  if (p.dtype == DType::f32 && ns > 20000) ns += (ns - 20000) * 0.65;  // 128x1024x7x7 43 us, 32x2048x7x7 26.5
  // Beside rows of lines and, in TF32, of tma, which are as much too short (L16 TF32 24.7 us; 256x32 halo 32.7,
  // estimated at 21.6; float16 17.2, lines 17.5).
  return {ns * (p.dtype == DType::f32 ? 0.88 : 0.97), 1};
}

}  // namespace conv2d_ext
