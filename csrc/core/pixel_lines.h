// pixels_lines.cuh, pixels_sums.cuh (wgrad): 1x1 filters in channels_last without gaps, any number of channels, read
// and written in place. What their rows take and cost, and what the launchers share with the planner.
#pragma once

#include <cstdint>

#include "row.h"

namespace conv2d_ext {

inline constexpr int kLinesPixels = 64;  // of a tile
inline constexpr int kLinesBytes = 224 * 1024;
inline constexpr int kLinesMostStages = 4;

// How a block uses shared memory: all filters stay there, beside what each of its warpgroups needs: pixels as they lie
// in memory, in `stages`, one tile's as the tensor cores want them, and its results as they will lie in memory.
struct PixelLines {
  int64_t depth = 0, columns = 0;  // channels that are summed over, and the result's
  int64_t chunks = 0;              // of 64 of the depth
  int64_t filter_bytes = 0, stage_bytes = 0, tile_bytes = 0, out_bytes = 0;
  int64_t groups = 0, stages = 0;  // groups == 0: it does not fit

  constexpr PixelLines(Row const& row, Problem const& p) {
    bool const forward = row.op == Op::fprop;
    depth = forward ? p.C : p.K, columns = forward ? p.K : p.C;
    if (depth > 2048 || columns > row.tile_n) return;
    chunks = ceil_div(depth, 64);
    filter_bytes = chunks * 64 * max64(row.tile_n, 64) * 2;
    // Filters pass through a stage too, 64 lines of them, each of one channel's or one filter's weights.
    int64_t const line = forward ? depth : max64(depth, columns);
    stage_bytes = ceil_div(kLinesPixels * line * 2 + 32, 128) * 128;
    tile_bytes = chunks * kLinesPixels * 128, out_bytes = ceil_div(kLinesPixels * columns * 2, 1024) * 1024;
    int64_t const left = kLinesBytes - filter_bytes;
    for (int64_t g = 4; g >= 1; --g) {
      int64_t const each = left / g / 1024 * 1024 - tile_bytes - out_bytes;
      if (each < stage_bytes) continue;
      stages = min64(kLinesMostStages, each / stage_bytes);
      groups = g;
      return;
    }
  }
  constexpr int64_t group_bytes() const { return tile_bytes + out_bytes + ceil_div(stages * stage_bytes, 1024) * 1024; }
};

inline constexpr int kSumsMostStages = 12;
inline constexpr int64_t kSumsBytes = 220 * 1024;
// Added up in one chain: tensor cores cut off the lowest bits of a sum. TF32: as kTf32Pixels in tma_tf32.h.
constexpr int64_t sums_part_units(DType t) { return t == DType::f32 ? 96 : 256; }

// wgrad: a tile's rows are of the tensor with more channels; blocks share a tile's units of 64 pixels.
struct PixelSums {
  bool swapped = false;  // rows are channels of x
  int64_t rows = 0, columns = 0, tiles_m = 0, tiles_n = 0, units = 0, split = 1, stage_bytes = 0, stages = 0;
  int64_t turns = 1;  // warps that have the same columns, of four that a tile's are shared out to

  constexpr PixelSums(Row const& row, Problem const& p) : swapped(p.C > p.K) {
    rows = swapped ? p.C : p.K, columns = swapped ? p.K : p.C;
    tiles_m = ceil_div(rows, row.tile_m), tiles_n = ceil_div(columns, row.tile_n);
    turns = columns * 4 <= row.tile_n ? 4 : columns * 2 <= row.tile_n ? 2 : 1;
    units = ceil_div(p.N * p.H * p.W, kLinesPixels);
    split = max64(max64(1, min64(132 / (tiles_m * tiles_n), units)), ceil_div(units, sums_part_units(p.dtype)));
    stage_bytes = (kLinesPixels * (rows + columns) + 128) *
                  size_of(p.dtype);  // the last pixel's channels that are not there are read
    stages = min64(kSumsMostStages, kSumsBytes / stage_bytes);
  }
  constexpr int64_t workspace_bytes(Row const& row) const {
    return tiles_m * tiles_n * split * row.tile_m * row.tile_n * 4;
  }
};

// Do the pixels of an image follow each other, channels side by side?
constexpr bool dense_pixels(Strides const& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  return (c == 1 || s.c == 1) && (w == 1 || s.w == c) && (h == 1 || s.h == w * c) && (n == 1 || s.n == h * w * c);
}

constexpr bool pixel_lines_supports(Row const& row, Problem const& p) {
  if (p.R != 1 || p.S != 1 || p.stride_h != 1 || p.stride_w != 1 || p.groups != 1) return false;
  if (p.dtype == DType::f32 && !p.allow_tf32) return false;
  if (p.pad_top != 0 || p.pad_bottom != 0 || p.pad_left != 0 || p.pad_right != 0) return false;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0) return false;
  if (!dense_pixels(p.x, p.N, p.C, p.H, p.W) || !dense_pixels(p.y, p.N, p.K, p.H, p.W)) return false;
  if (p.x_align < 16 || p.y_align < 16) return false;
  if (double(p.N) * double(p.H) * double(p.W) / kLinesPixels >= double(1 << 30)) return false;
  if (row.op == Op::wgrad) {
    if (p.C > 1024 || p.K > 1024) return false;
    PixelSums const s(row, p);
    return s.stages >= 3 && s.tiles_m * s.tiles_n <= 8 && s.workspace_bytes(row) <= kMaxWorkspaceBytes;
  }
  return dense_pixels(p.w, p.K, p.C, 1, 1) && p.w_align >= 16 && PixelLines(row, p).groups > 0;
}

// What a unit's loads and products take, more so the more of a tile there is; odd numbers of channels are loaded one by
// one, and pixels that lie a multiple of 64 bytes apart from the same banks. Few columns are shared out to warps that
// take turns, so that a unit's bytes bound it. Then a second launch adds the blocks' sums. Fitted to times of the rows
// (docs/tuning.md).
constexpr Estimate pixel_sums_estimate(Row const& row, Problem const& p) {
  PixelSums const s(row, p);
  bool const even = s.rows % 2 == 0 && (s.columns % 2 == 0 || s.turns > 1), large = row.tile_m >= 128;
  double const tiles = double(s.tiles_m * s.tiles_n), area = double(row.tile_m) * row.tile_n;
  double const filled = double(s.rows * s.columns) / (tiles * area);
  double const unit_ns =
      (large ? (even ? 700 + 700 * filled : 550 + 2500 * filled) : (even ? 260 + 450 * filled : 500 + 800 * filled)) *
      (s.rows % 32 != 0 && s.columns % 32 != 0 ? 1
       : even                                  ? 1.4
                                               : 1.06);
  double const rounds = double(ceil_div(s.units, s.split)) * double(ceil_div(s.tiles_m * s.tiles_n * s.split, 132));
  double const memory_ns = double(p.N) * double(p.H) * double(p.W) * size_of(p.dtype) * double(s.rows + s.columns) *
                           (1 / 3900.0 + (tiles - 1) / 9000.0);
  // Of floats every word is rounded; channels that the copy engine takes are faster by tma_lean_tf32.cuh (64x64x56x56
  // to 64 40.2 us, so 52.8).
  bool const tf32 = p.dtype == DType::f32, vectors = tf32 && p.C % 4 == 0 && p.K % 4 == 0;
  double const bytes = double(kLinesPixels * (s.rows + s.columns) * size_of(p.dtype)),
               copy_ns = s.turns == 1 ? 0 : (200 + bytes * (tiles > 1 ? 0.018 : 0.0225)) * (tf32 ? 1.37 : 1),
               multiply_ns = unit_ns * (tf32 ? 2 : 1) / double(s.turns);
  double const work = rounds * (copy_ns > multiply_ns ? copy_ns : multiply_ns),
               sum_ns = 5000 + tiles * area * (0.048 + 0.0004 * double(s.split));
  double const longest = work > memory_ns ? work : memory_ns;
  return {(7000 + longest + sum_ns) * (tiles < 4 ? 0.8 : 0.88) * (vectors ? 1.4 : 1), 1};
}

// A warpgroup's tile takes one thing after the other; the warpgroups of an SM share its units, and all memory.
// Constants fitted to times of the rows (docs/tuning.md).
constexpr Estimate pixel_lines_estimate(Row const& row, Problem const& p, Device const& d) {
  if (row.op == Op::wgrad) return pixel_sums_estimate(row, p);
  PixelLines const s(row, p);
  double const pixels = double(p.N) * double(p.H) * double(p.W), steps = double(ceil_div(s.depth, 16));
  double const multiply = steps * double(row.tile_n) * 0.309;
  double const repack = steps * 2 * (s.depth % 8 == 0 ? 1.4 : 22.9);
  double const store = double(s.columns) * (s.columns % 2 == 0 ? 4.8 : 10.1);
  double const each = multiply + repack + store;
  int64_t const tiles = ceil_div(int64_t(pixels), kLinesPixels);
  double const alone = double(ceil_div(tiles, d.sm_count * s.groups)) * (each + 965),
               together = double(ceil_div(tiles, d.sm_count)) * each;
  double const work = alone > together ? alone : together;
  double const memory_ns = pixels * 2 * (double(s.depth) / 4350 + double(s.columns) / 5010);
  double const before = 8180 + double(ceil_div(s.depth, 64) * ceil_div(s.columns, 64)) * 394;
  double const ns = before + (work > memory_ns ? work + memory_ns * 0.58 : memory_ns + work * 0.58);
  // As measured where channels are whole vectors (72 channels).
  return {row.tile_n != 128 ? ns : s.depth % 8 == 0 && s.columns % 8 == 0 ? ns * 0.91 : ns * 1.08, 1};
}

}  // namespace conv2d_ext
