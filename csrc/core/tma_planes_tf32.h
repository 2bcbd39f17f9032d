// Geometry, support and cost of tma_planes_tf32.cuh: fprop and dgrad of dense layers over NCHW in TF32, in place.
#pragma once

#include "tma.h"

namespace conv2d_ext {

inline constexpr int kTf32PlaneDepth = 16;  // channels of a step
inline constexpr int64_t kTf32PlaneRing = 225 * 1024;

// How a warpgroup's pixels lie in the image. It has `blocks` of 64 rows of the instruction; the rows of one are `subs`
// pieces of `columns` neighbouring pixels. Blocks lie `spread` rows of the image apart, a dilation, pieces so that a
// tile's rows follow each other.
struct Tf32PlaneTile {
  int64_t columns = 0, subs = 0, rows = 0, spread = 1, row_taps = 1;
  int64_t tiles_w = 0, tiles_h = 0;
  int64_t lead = 0;              // of the copy's columns, which begin at a vector, before the tile's
  int64_t box_w = 0, box_h = 0;  // of the copy, with what the taps reach
  int64_t stages_a = 0, stages_b = 0, a_bytes = 0, b_bytes = 0;  // of a stage; a: of one warpgroup
};

// Rows of taps that share fragments.
constexpr int64_t tf32_plane_row_taps(int tile_n, int64_t taps) {
  if (tile_n <= 64 && taps % 7 == 0) return 7;
  if (tile_n <= 64 && taps % 5 == 0) return 5;
  return taps % 3 == 0 ? 3 : 1;
}

constexpr Tf32PlaneTile tf32_plane_tile(int tile_m, int tile_n, Op op, Problem const& p) {
  Walk const h = walk_h(op, p, 0), w = walk_w(op, p, 0);
  int64_t const blocks = tile_m / 128;
  Tf32PlaneTile best;
  double least = 0;
  for (int64_t columns = 64; columns >= 16; columns /= 2) {
    Tf32PlaneTile t;
    t.columns = columns, t.subs = 64 / columns, t.rows = t.subs * blocks;
    t.row_taps = t.subs % h.tap_stride == 0 ? tf32_plane_row_taps(tile_n, h.taps) : 1;
    t.spread = t.row_taps == 1 ? 1 : h.tap_stride;
    t.tiles_w = ceil_div(w.pixels, columns), t.tiles_h = ceil_div(h.pixels, t.rows);
    t.lead = (w.lower % 4 + 4) % 4;
    t.box_w = ceil_div(t.lead + columns + (w.taps - 1) * w.tap_stride, 4) * 4;
    t.box_h = t.rows + (h.taps - 1) * h.tap_stride;
    // Channels that a warp loads together lie 8 banks apart.
    if (t.box_w % 16 == 0) t.box_w += 4;
    while (t.box_w * t.box_h % 16 != 8) ++t.box_h;
    if (t.box_w > 256 || t.box_h > 256) continue;
    t.a_bytes = t.box_w * t.box_h * kTf32PlaneDepth * 4, t.b_bytes = t.row_taps * tile_n * kTf32PlaneDepth * 4;
    t.stages_a = min64((kTf32PlaneRing - 4 * t.b_bytes) / (2 * t.a_bytes), 4);
    if (t.stages_a < 2) t.stages_a = 2;
    if (kTf32PlaneRing < t.stages_a * 2 * t.a_bytes + 2 * t.b_bytes) continue;
    t.stages_b = min64((kTf32PlaneRing - t.stages_a * 2 * t.a_bytes) / t.b_bytes, kMaxStages);
    double const cost =
        double(t.tiles_w * t.tiles_h) * ((t.row_taps > 1 ? 1.0 : 1.25) + double(t.box_w * t.box_h) * 0.0003);
    if (best.columns == 0 || cost < least) best = t, least = cost;
  }
  return best;
}

constexpr bool is_tf32_planes(Row const& row) {
  return row.family == Family::tma && row.variant == Variant::nchw && row.dtype == DType::f32 && row.op != Op::wgrad;
}

// Terms of a sum. The tensor cores' sums lose their lowest bits: 2.7e-5 of the result's norm with 12,800 terms.
inline constexpr int64_t kTf32PlanesLongest = 9600;

constexpr int64_t tf32_planes_depth(Op op, Problem const& p) { return op == Op::fprop ? p.C : p.K; }
constexpr int64_t tf32_planes_columns(Op op, Problem const& p) { return op == Op::fprop ? p.K : p.C; }

// The filters, packed.
constexpr int64_t tf32_planes_workspace_bytes(Row const& row, Problem const& p) {
  return ceil_div(tf32_planes_columns(row.op, p), row.tile_n) * row.tile_n * p.R * p.S *
         ceil_div(tf32_planes_depth(row.op, p), kTf32PlaneDepth) * kTf32PlaneDepth * 4;
}

constexpr bool tf32_planes_supports(Row const& row, Problem const& p) {
  if (!p.allow_tf32 || p.groups != 1 || p.R * p.S <= 1 || p.stride_h != 1 || p.stride_w != 1) return false;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0 || p.P() == 0 || p.Q() == 0) return false;
  bool const forward = row.op == Op::fprop;
  Strides const &in = forward ? p.x : p.y, &out = forward ? p.y : p.x;
  int64_t const h = forward ? p.H : p.P(), w = forward ? p.W : p.Q(), columns = forward ? p.Q() : p.W;
  auto vectors = [](int64_t size, int64_t step) {
    return size == 1 || (step > 0 && step % 4 == 0 && step < int64_t(1) << 38);
  };
  if ((w > 1 && in.w != 1) || (columns > 1 && out.w != 1) || (forward ? p.x_align : p.y_align) < 16) return false;
  if (!vectors(p.N, in.n) || !vectors(tf32_planes_depth(row.op, p), in.c) || !vectors(h, in.h)) return false;
  constexpr double most = double(int64_t(1) << 30);
  if (double(p.R) * double(p.dilation_h) > 256 || double(p.S) * double(p.dilation_w) > 256) return false;
  if (double(p.H) + double(p.P()) + double(p.pad_top) >= most ||
      double(p.W) + double(p.Q()) + double(p.pad_left) >= most)
    return false;
  if (double(p.C) * double(p.K) * double(p.R) * double(p.S) >= most / 16) return false;
  if (tf32_planes_depth(row.op, p) <= 8) return false;  // stem's
  if (tf32_planes_depth(row.op, p) * p.R * p.S > kTf32PlanesLongest) return false;
  Tf32PlaneTile const t = tf32_plane_tile(row.tile_m, row.tile_n, row.op, p);
  double const tiles = double(p.N) * double(t.tiles_w) * double(t.tiles_h);
  return t.columns > 0 && tiles * double(ceil_div(tf32_planes_columns(row.op, p), row.tile_n)) < most;
}

// Rounds of units of two tiles, each of its steps and of its stores, in which all SMs write at the same time; or
// memory. Results whose rows begin off 32 bytes are slower to write. Fitted to times of the rows (docs/tuning/tf32.md).
constexpr Estimate tf32_planes_estimate(Row const& row, Problem const& p, Device const& d) {
  struct Times {
    double before, weight, unit, tap, single_tap, copied, stored, stored_off, memory_off;
  };
  constexpr Times times[] = {{10500, 1.36, 880, 285, 497, 0.0139, 3640, 1.9, 3.0},  // 512x64
                             {9740, 1.7, 2060, 277, 348, 0.0092, 3890, 1.3, 3.4},   // 256x128
                             {9490, 3.6, 910, 164, 300, 0.0203, 2180, 1.4, 1.5}};   // 256x64
  Times const& t = times[row.tile_m == 512 ? 0 : row.tile_n == 128 ? 1 : 2];
  bool const forward = row.op == Op::fprop;
  Tf32PlaneTile const tile = tf32_plane_tile(row.tile_m, row.tile_n, row.op, p);
  int64_t const tiles_n = ceil_div(tf32_planes_columns(row.op, p), row.tile_n);
  int64_t const chunks = ceil_div(tf32_planes_depth(row.op, p), kTf32PlaneDepth);
  int64_t const units = ceil_div(p.N * tile.tiles_w * tile.tiles_h, 2) * tiles_n;
  double const x = double(p.N) * double(p.C) * double(p.H) * double(p.W),
               y = double(p.N) * double(p.K) * double(p.P()) * double(p.Q()), out = forward ? y : x;
  bool const off = (forward ? p.Q() : p.W) % 8 != 0;
  double const steps = double(p.R * p.S) * (tile.row_taps > 1 ? t.tap : t.single_tap) + double(tile.a_bytes) * t.copied;
  double const stored = out / double(units) / double(row.tile_m * row.tile_n) * t.stored * (off ? t.stored_off : 1);
  double const ns = double(ceil_div(units, d.sm_count)) * (t.unit + double(chunks) * steps + stored);
  double const memory_ns = (x + y) * 4 / 4200 * (off ? t.memory_off : 1);
  double const weights = double(p.K) * double(p.C) * double(p.R * p.S) * t.weight / 1000;
  constexpr double near = 1.03;  // rather the rows that are known better
  return {near * (t.before + weights + (ns > memory_ns ? ns : memory_ns)), 1};
}

}  // namespace conv2d_ext
