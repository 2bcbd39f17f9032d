// pixels_phases.cuh: fprop and dgrad of 1x1 filters in channels_last whose channels are no vectors. What its rows take
// and cost, and what the launcher shares with the planner.
#pragma once

#include <cstdint>

#include "pixels_any.h"

namespace conv2d_ext {

constexpr bool is_pixel_phases(Row const& row) {
  return row.family == Family::pixels && row.variant == Variant::phases;
}

// Pixels of `depth` channels until one begins at a vector again.
constexpr int phases_period(int64_t depth, DType t) {
  int const v = 16 / size_of(t);
  int period = 1;
  while (depth * period % v != 0) period *= 2;
  return period;
}

// A tile is tile_m pixels by tile_n results. Raw stages have pixels as they lie, with a vector more than a line, stages
// lines of both operands; results leave through shared memory, 64 of a pixel to a warpgroup.
template <class T, int tile_m, int tile_n>
struct PhasesTile {
  static constexpr int pixels = tile_m, results = tile_n, groups = tile_n / 64;
  static constexpr int line = 128 / int(sizeof(T)), raw_line = 144;  // channels; bytes
  // Warpgroups that repack: as many as registers allow.
  static constexpr int repacking = tile_m == tile_n ? 1 : 2, threads = (groups + repacking) * 128 + 64;
  static constexpr int raw_bytes = pixels * raw_line, a_bytes = results * 128, stage_bytes = a_bytes + pixels * 128;
  static constexpr int out_line = sizeof(T) == 4 ? 272 : 128;  // bytes of a pixel's 64 results; floats lie unswizzled
  static constexpr int staging_bytes = groups * pixels * out_line;
  static constexpr int blocks = pixels * results == 64 * 64 ? 2 : 1;  // an SM
  // Both even where two warpgroups repack: each empties and fills stages of its own, whose phases it waits for in
  // order.
  static constexpr int stages = repacking == 2 ? 4 : 3, room = (blocks == 2 ? 112 : 224) * 1024 - 1024 - staging_bytes;
  static constexpr int fit = (room - stages * stage_bytes) / raw_bytes / repacking * repacking;
  static constexpr int raw_stages = fit < 8 ? fit : 8;
  static_assert(tile_m % 64 == 0 && tile_n % 64 == 0 && raw_stages >= 3);
  static constexpr int shared_bytes = 1024 + staging_bytes + stages * stage_bytes + raw_stages * raw_bytes;
};

constexpr bool pixel_phases_supports(Op op, Problem const& p) {
  int const v = 16 / size_of(p.dtype);
  if (op == Op::wgrad || !is_product(p) || p.P() != p.H || p.Q() != p.W) return false;
  if (p.C % v == 0 && p.K % v == 0) return false;  // tma_matrix.cuh
  AnyPixels const s(op, p);
  if (!s.fits || !s.lines || p.C < 2 || p.K < 2) return false;
  constexpr double most = 1 << 30;
  if (double(s.M) >= most || p.C > 65536 || p.K > 65536 || double(p.C) * double(p.K) > 8e6) return false;
  int const period = phases_period(s.depth, p.dtype);
  if (s.a.align < 16 || s.M % period != 0) return false;
  if (period > 1 ? s.a.step != s.depth : s.a.step % v != 0) return false;
  return double(s.a.step) * period * size_of(p.dtype) < double(int64_t(1) << 40);
}

// Filters become lines in the workspace, of each result one of what is summed over.
constexpr int64_t phases_pitch(Problem const& p, int64_t depth) {
  int64_t const line = 128 / size_of(p.dtype);
  return ceil_div(depth, line) * line;
}
// Those that lie so already are taken as they are.
constexpr bool phases_take_filters(Op op, Problem const& p) {
  return op == Op::fprop && p.dtype != DType::f32 && channel_vectors(p.w, p.w_align, p.C, 8, p.dtype);
}
constexpr int64_t pixel_phases_workspace_bytes(Op op, Problem const& p) {
  AnyPixels const s(op, p);
  if (phases_take_filters(op, p)) return 0;
  return s.N * phases_pitch(p, s.depth) * size_of(p.dtype);
}

// Rounds of tiles, each of its steps and its stores, which nothing hides, and memory in part. Fitted to 1,680 times of
// 420 layers (docs/tuning/one-by-one.md); a launch is 600 less than measured, as other rows' estimates leave so much
// out.
constexpr Estimate pixel_phases_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  AnyPixels const s(op, p);
  int const tile = (row.tile_m == 128 ? 2 : 0) + (row.tile_n == 128 ? 1 : 0), size = size_of(p.dtype);
  constexpr double step_ns[] = {425, 279, 345, 480}, store_ns[] = {1330, 1510, 2310, 2650};
  bool const tf32 = p.dtype == DType::f32, alone = phases_take_filters(op, p);
  int const piece = s.out.vector(p.dtype, 16) * size;
  int64_t const line = phases_pitch(p, s.depth) * size, tiles_n = ceil_div(s.N, row.tile_n);
  int64_t const tiles = ceil_div(s.M, row.tile_m) * tiles_n;
  double const rounds = double(ceil_div(tiles, d.sm_count * (tile == 0 ? 2 : 1)));
  double const store = store_ns[tile] * (piece == 2 ? 2.76 : piece == 16 ? 0.405 : 1) * (tf32 ? 1.23 : 1);
  double const work = rounds * (double(line / 128) * step_ns[tile] * (tf32 ? 0.966 : 1) + store);
  double const read = double(s.M) * double(s.depth) * size, written = double(s.M) * double(s.N) * size;
  double const memory = read / 4230 * (1 + 0.369 * double(tiles_n - 1)) + written / 15900 * (piece == 2 ? 1.4 : 1);
  double const before = 6200 + (alone ? 0 : 415 + double(s.N) * double(line) / 600);
  return {before + (work > memory ? work + memory * 0.73 : memory + work * 0.73), 1};
}

}  // namespace conv2d_ext
