// pixels_strict.cuh: fprop and dgrad of 1x1 filters in strict float32, in place in either layout;
// pixels_strict_wgrad.cuh: wgrad over NCHW. What their rows take and cost, and what the launcher shares with the
// planner.
#pragma once

#include "pixels_wgrad.h"
#include "tma_strict.h"

namespace conv2d_ext {

constexpr bool is_strict_pixels(Row const& row) {
  return row.family == Family::pixels && row.variant == Variant::pointwise;
}

// Pixels of channels_last that follow each other, of whole vectors.
constexpr bool pixel_lines(Strides const& s, int align, int64_t channels, Problem const& p) {
  int64_t const step = p.W > 1 ? s.w : p.H > 1 ? s.h : s.n;
  return s.c == 1 && channels % 4 == 0 && align >= 16 && step > 0 && step % 4 == 0 && step < int64_t(1) << 32 &&
         (p.W == 1 || s.w == step) && (p.H == 1 || s.h == p.W * step) && (p.N == 1 || s.n == p.H * p.W * step);
}

constexpr bool strict_filter_vectors(Problem const& p) { return channel_vectors(p.w, p.w_align, p.C, 4, p.dtype); }

// A warpgroup multiplies units of 64 pixels by the tile_n filters that its block keeps in shared memory, in two parts;
// with tile_m of 128 they come with the stages, which both warpgroups share.
struct StrictPixels {
  static constexpr int room = 222 * 1024, unit = 64, most_stages = 8;
  static constexpr int stage_bytes = unit * kTf32Line * 4;  // 32 channels
  bool lines = false;
  int64_t depth = 0, columns = 0, chunks = 0, units = 0, tiles_n = 1, blocks = 1, stages = 0;  // stages: of a warpgroup
  int64_t kept_bytes = 0;
  bool keep = false;

  // Of a group's problem.
  constexpr StrictPixels(Row const& row, Problem const& p, int64_t sm_count)
      : lines(p.x.c == 1 && p.y.c == 1),
        depth(pixels_depth(row.op, p)),
        columns(pixels_columns(row.op, p)),
        keep(row.tile_m == unit) {
    chunks = ceil_div(depth, kTf32Line), tiles_n = ceil_div(columns, int64_t(row.tile_n));
    units = lines ? ceil_div(p.N * p.H * p.W, int64_t(unit)) : ceil_div(runs_of(p), 2);
    int64_t const filters = 2 * row.tile_n * 128;
    kept_bytes = keep ? chunks * filters : 0;
    if (kept_bytes < room) stages = min64(most_stages, (room - kept_bytes) / (2 * stage_bytes + (keep ? 0 : filters)));
    blocks = min64(max64(1, sm_count / tiles_n), keep ? units : ceil_div(units, 2));
  }
};

constexpr bool strict_pixels_supports(Row const& row, Problem const& p, Device const& d) {
  if (p.dtype != DType::f32 || p.allow_tf32) return false;
  if (row.op == Op::wgrad)
    return group_planes(p) && double(p.C) * double(p.K) <= 1e9 &&
           double(pixels_wgrad_bytes(row, p, 1)) * double(least_parts(p)) <= double(kMaxWorkspaceBytes);
  if (p.groups == 0 || (p.groups > 1 ? !group_planes(p) : !one_by_one(p))) return false;
  Problem const g = group_of(p);
  StrictPixels const s(row, g, group_blocks(p, d.sm_count));
  if (s.depth < kStrictLeast || s.stages < 3 || p.groups * s.tiles_n > d.sm_count || (s.lines && !s.keep)) return false;
  if ((g.C > 1 && p.w.c != 1) || (!s.keep && (p.groups > 1 || !strict_filter_vectors(p)))) return false;
  if (double(p.N) * double(p.H) * double(p.W) >= double(int64_t(1) << 31)) return false;
  return s.lines ? p.groups == 1 && pixel_lines(p.x, p.x_align, p.C, p) && pixel_lines(p.y, p.y_align, p.K, p)
                 : group_planes(p);
}

constexpr int64_t strict_pixels_bytes(Row const& row, Problem const& p, int64_t split) {
  if (row.op == Op::wgrad) return pixels_wgrad_bytes(row, p, split);
  return row.tile_m == StrictPixels::unit ? 0 : strict_prepared_bytes(row.op, p);
}

// Rounds of blocks and their steps, and parts.
constexpr Estimate strict_pixels_sums_estimate(Row const& row, Problem const& p, Device const& d) {
  PixelsWgrad const shape(row.tile_m, row.tile_n, group_of(p));
  int64_t const tiles = shape.tiles * p.groups;
  double const step_ns = row.tile_n == 128 ? 920 : 640, area = double(row.tile_m) * row.tile_n / 1e6;
  double const memory_ns = double(p.N) * double(p.C + p.K) * double(p.H) * double(p.W) * 4 / 3600;
  Estimate best{1e12, int(least_parts(p))};
  for (int64_t rounds : {1, 2, 3, 4}) {
    int64_t const split = max64(least_parts(p), min64(d.sm_count * rounds / tiles, ceil_div(runs_of(p), int64_t(4))));
    if (split < 1 || pixels_wgrad_bytes(row, p, split) > kMaxWorkspaceBytes) continue;
    double const share = double(ceil_div(runs_of(p), split));
    double const work = double(ceil_div(tiles * split, d.sm_count)) * (2500 + share * step_ns);
    double const second = 2000 + double(tiles) * area * (double(split) * 1510 + 2020);
    double const ns = 6700 + second + (work > memory_ns ? work + memory_ns * 0.2 : memory_ns + work * 0.2);
    if (ns < best.ns) best = {ns, int(split)};
  }
  best.ns *= 0.92;  // as measured beside the rows on copies (1x256x16x16 to 256 9.6 us, 192x32 11.0)
  return best;
}

// A block's units or memory, which hide each other in part. Fitted to 226 times of the rows (4 %,
// docs/tuning/strict.md).
constexpr Estimate strict_pixels_estimate(Row const& row, Problem const& p, Device const& d) {
  if (row.op == Op::wgrad) return strict_pixels_sums_estimate(row, p, d);
  Problem const g = group_of(p);
  StrictPixels const s(row, g, group_blocks(p, d.sm_count));
  double const step_ns = row.tile_n == 64 ? 241
                         : s.keep         ? 324
                                          : 419,
               fixed = row.tile_n == 64 ? 304
                       : s.keep         ? 604
                                        : 634;
  int64_t const of_block = s.keep ? ceil_div(s.units, s.blocks) : 2 * ceil_div(s.units, 2 * s.blocks);
  double const products = double(of_block) * (double(s.chunks) * step_ns + fixed);
  double const read = double(s.depth) * (1 + 0.58 * double(s.tiles_n - 1)) / 4760, written = double(s.columns) / 4480;
  double const memory_ns = double(p.N * p.groups) * double(p.H) * double(p.W) * 4 * (read + written);
  double const before = s.keep ? 7290 + double(s.kept_bytes) * 0.03 : 9430;
  double const ns = before + (products > memory_ns ? products + memory_ns * 0.32 : memory_ns + products * 0.32);
  // As measured: long sums of few pixels (8x2048x8x8 to 512 D 33.4 us, estimated at 25.1).
  bool const few = row.op == Op::dgrad && row.tile_n == 128 && p.N * p.H * p.W < 1200 && ns > 23000;
  return {few ? ns * 1.15 : ns, 1};
}

}  // namespace conv2d_ext
