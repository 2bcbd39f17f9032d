// pixels_wgrad.cuh: wgrad of 1x1 filters over NCHW, in place. What its rows take and cost, and how they cut a problem.
#pragma once

#include <cstdint>

#include "pixels.h"

namespace conv2d_ext {

constexpr bool is_pixels_wgrad(Row const& row) {
  return row.family == Family::pixels && row.op == Op::wgrad && row.variant == Variant::nchw && row.tile_k >= 32;
}

// A tile's rows are channels of y, or of x (swapped) where that takes fewer tiles.
struct PixelsWgrad {
  bool swapped = false;
  int64_t tiles_n = 0, tiles = 0;

  constexpr PixelsWgrad(int tile_m, int tile_n, Problem const& p) {
    int64_t const as_is = ceil_div(p.K, tile_m) * ceil_div(p.C, tile_n),
                  turned = ceil_div(p.C, tile_m) * ceil_div(p.K, tile_n);
    swapped = turned < as_is;
    tiles = swapped ? turned : as_is;
    tiles_n = ceil_div(swapped ? p.K : p.C, tile_n);
  }
};

// Are pixels gathered four at a time, as the copy engine does not take the images? 16-bit types.
constexpr bool pixels_wgrad_gathers(int tile_m, int tile_n, Problem const& p) {
  if (size_of(p.dtype) != 2 || tile_n != 128 || tile_m == 192 || p.H * p.W % 4 != 0) return false;
  if (!group_one_by_one(p)) return false;
  auto fours = [&](Strides const& s, int align, int64_t channels) {
    auto steps = [](int64_t size, int64_t step) { return size == 1 || (step > 0 && step % 4 == 0); };
    bool const flat = p.H == 1 || p.W == 1 || s.h == p.W * s.w;
    return flat && (p.W == 1 ? s.h : s.w) == 1 && align >= 8 && steps(channels, s.c) && steps(p.N, s.n);
  };
  return fours(p.x, p.x_align, p.C) && fours(p.y, p.y_align, p.K) && !group_planes(p);
}

// Does L2 give up first what is read? As measured: where it is read once, or lines of memory are no two runs' and the
// tensors small.
constexpr bool pixels_wgrad_reads_once(PixelsWgrad const& shape, Problem const& p) {
  int64_t const plane = p.H * p.W * size_of(p.dtype);
  return shape.tiles == 1 || (plane % 128 == 0 && double(p.N) * double(p.C + p.K) * double(plane) < 60e6);
}

// In TF32 parts are no longer than the tensor cores may add up.
constexpr int64_t least_parts(Problem const& p) { return p.dtype == DType::f32 ? ceil_div(runs_of(p), kChainRuns) : 1; }

constexpr int64_t pixels_wgrad_bytes(Row const& row, Problem const& p, int64_t split) {
  return PixelsWgrad(row.tile_m, row.tile_n, group_of(p)).tiles * p.groups * split * row.tile_m * row.tile_n * 4;
}

constexpr bool pixels_wgrad_supports(Row const& row, Problem const& p) {
  if (p.dtype == DType::f32 && !p.allow_tf32) return false;
  if (!group_planes(p) && !pixels_wgrad_gathers(row.tile_m, row.tile_n, p)) return false;
  if (double(p.C) * double(p.K) > 1e9) return false;
  return double(pixels_wgrad_bytes(row, p, 1)) * double(least_parts(p)) <= double(kMaxWorkspaceBytes);
}

// Rounds of blocks, their steps, bytes, parts and weights: a sum, as they hide each other in part; or products, or
// the lines that L2 delivers. Fitted to 30 to 98 times of each kind (docs/tuning.md); TF32's products and lines to
// what large layers take (docs/tuning/planner.md).
constexpr Estimate pixels_wgrad_estimate(Row const& row, Problem const& p, Device const& d) {
  struct Times {
    double before, read, parts, weights, across;       // a megabyte or million; across: 1,000 lines of a step
    double round[4], step[4];                          // of tiles 128x64, 128x128, 192x160, 256x128
    double products[4] = {}, rate = 9.5e6, twice = 0;  // of a step; bytes of lines; of lines that are two
  };
  constexpr Times halves{
      6.31, 0.2187, 1.24, 3.35, 0.403, {1.16, 1.58, 2, 2.33}, {0.145, 0.207, 0.297, 0.355}, {0.16, 0.32, 0.6, 0.64}},
      floats{6.73,
             0.2096,
             1.51,
             2.02,
             0.756,
             {1.08, 1.59, 2.79, 2.88},
             {0.131, 0.177, 0.185, 0.222},
             {0.18, 0.33, 0.56, 0.62},
             13.5e6,
             1.29},
      gathered{8.11, 0.1544, 1.09, 0, 0, {0, 1.24, 0, 1.62}, {0, 0.684, 0, 0.971}};
  Times const& t = p.dtype == DType::f32 ? floats : group_planes(p) ? halves : gathered;
  int const tile = row.tile_m == 192 ? 2 : row.tile_m == 256 ? 3 : row.tile_n == 128 ? 1 : 0;
  PixelsWgrad const shape(row.tile_m, row.tile_n, group_of(p));
  int64_t const steps = runs_of(p), tiles = shape.tiles * p.groups;
  int64_t const plane = p.H * p.W * size_of(p.dtype);
  double const area = double(row.tile_m) * row.tile_n / 1e6;
  double const read = double(p.N) * double(p.C + p.K) * double(plane) / 1e6;
  // Runs that begin within a line of memory are two lines.
  double const off = 1 - double(gcd64(plane, 128)) / 128, lines = double(row.tile_m + row.tile_n) / 1000 * off;
  double const copied = double(tiles * steps) * double(row.tile_m + row.tile_n) * 128 * (1 + t.twice * off) / t.rate;
  // As measured: each run is an image's (32x2048x8x8 to 320 16.7 us, estimated at 12).
  double const images = p.dtype != DType::f32 && p.N > 1 && p.H * p.W <= 64 ? 1.6 : 1;
  Estimate best;
  double least_ns = 0;
  for (int64_t sixths : {0, 2, 3, 4, 6, 12, 18}) {  // of a round of blocks; 0: one part, which is stored at once
    if (sixths % 6 != 0 && &t == &gathered) continue;
    int64_t const split =
        max64(least_parts(p), sixths == 0 ? 1 : min64(d.sm_count * sixths / 6 / tiles, ceil_div(steps, 4)));
    if (split < 1 || pixels_wgrad_bytes(row, p, split) > kMaxWorkspaceBytes) continue;
    double const r = double(ceil_div(tiles * split, d.sm_count)), share = double(ceil_div(steps, split));
    double const second = split > 1 ? 2.2 + double(tiles) * area * (double(split) * t.parts + t.weights) : 0;
    double work = r * (t.round[tile] + share * (t.step[tile] + lines * t.across)) + read * t.read;
    for (double const least : {r * (t.round[tile] + share * t.products[tile]), copied})
      if (work < least) work = least;
    // As measured where the parts take turns and L2 gives up first what is read.
    double const once[4] = {1, 0.93, 0.95, 0.95};
    bool const is_once = &t == &halves && pixels_wgrad_reads_once(shape, p);
    double const ns = 1000 * (t.before - 2.2 + work * images + second) * (is_once ? once[tile] : 1);
    // As measured, of a row's own parts: few cost less than their bytes (8x256x56x56 to 128 17.7 us by 66, 16.6 by 33).
    double const few = split > 1 && &t != &gathered ? 30 * double(max64(0, d.sm_count - tiles * split)) : 0;
    if (least_ns == 0 || ns - few < least_ns) least_ns = ns - few, best.split_k = int(split);
    if (sixths % 6 == 0 && (best.ns == 0 || ns < best.ns)) best.ns = ns;
  }
  if (best.ns == 0) best = {1e9, int(least_parts(p))};
  // As measured: single images by the largest tiles (1x2112x14x14 to 1056 18.8 us, estimated at 11.6).
  if (&t == &gathered && p.N == 1 && tile == 3) best.ns += 3000;
  return best;
}

}  // namespace conv2d_ext
