// pixels_strict.cuh: fprop and dgrad of 1x1 filters in strict float32, in place in either layout. What its rows take
// and cost, and what the launcher shares with the planner.
#pragma once

#include "pixels.h"

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

// A warpgroup multiplies units of 64 pixels by the tile_n filters that its block keeps in shared memory, in two parts.
struct StrictPixels {
  static constexpr int room = 222 * 1024, unit = 64, most_stages = 8;
  static constexpr int stage_bytes = unit * kTf32Line * 4;  // 32 channels
  bool lines = false;
  int64_t depth = 0, columns = 0, chunks = 0, units = 0, tiles_n = 1, blocks = 1, stages = 0;  // stages: of a warpgroup
  int64_t kept_bytes = 0;

  constexpr StrictPixels(Row const& row, Problem const& p, Device const& d)
      : lines(p.x.c == 1 && p.y.c == 1), depth(pixels_depth(row.op, p)), columns(pixels_columns(row.op, p)) {
    chunks = ceil_div(depth, kTf32Line), tiles_n = ceil_div(columns, int64_t(row.tile_n));
    units = lines ? ceil_div(p.N * p.H * p.W, int64_t(unit)) : ceil_div(runs_of(p), 2);
    kept_bytes = chunks * 2 * row.tile_n * 128;
    if (kept_bytes < room) stages = min64(most_stages, (room - kept_bytes) / (2 * stage_bytes));
    // As many warpgroups as have equal shares.
    int64_t const most = max64(1, d.sm_count / tiles_n);
    blocks = min64(most, ceil_div(units, 1));
  }
};

constexpr bool strict_pixels_supports(Row const& row, Problem const& p, Device const& d) {
  if (p.dtype != DType::f32 || p.allow_tf32 || !one_by_one(p)) return false;
  StrictPixels const s(row, p, d);
  if (s.depth < 16 || s.stages < 3 || s.tiles_n > d.sm_count) return false;  // few products: tma_strict.h
  if (p.w.c != 1 || p.C % 4 != 0 || p.w.n % 4 != 0 || p.w_align < 16) return false;
  if (double(p.N) * double(p.H) * double(p.W) >= double(int64_t(1) << 31)) return false;
  return s.lines ? pixel_lines(p.x, p.x_align, p.C, p) && pixel_lines(p.y, p.y_align, p.K, p) : pixel_planes(p);
}

// Rounds of units, or memory.
constexpr Estimate strict_pixels_estimate(Row const& row, Problem const& p, Device const& d) {
  StrictPixels const s(row, p, d);
  double const step_ns = row.tile_n == 128 ? 450 : 310, fixed = row.tile_n == 128 ? 900 : 600;
  int64_t const of_block = ceil_div(s.units, s.blocks);
  double const products = double(of_block) * (double(s.chunks) * step_ns + fixed);
  double const alone = double(ceil_div(of_block, 2)) * (double(s.chunks) * step_ns * 1.3 + fixed * 2);
  double const ns = products > alone ? products : alone;
  double const memory_ns = double(p.N) * double(p.H) * double(p.W) * 4 *
                           (double(s.depth) * (1 + 0.3 * double(s.tiles_n - 1)) + double(s.columns)) / 3600;
  return {7000 + double(s.kept_bytes) / 100 + (ns > memory_ns ? ns + memory_ns * 0.2 : memory_ns + ns * 0.2), 1};
}

}  // namespace conv2d_ext
