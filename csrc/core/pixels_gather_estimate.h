// What rows of pixels_gather.cuh and pixels_gather_wgrad.cuh cost. Apart from what the kernels include, so that a new
// constant compiles none of them.
#pragma once

#include "pixels_halves.h"
#include "pixels_pairs.h"
#include "pixels_windows.h"

namespace conv2d_ext {

// Rounds of tiles, their steps, and bytes (each also as often as a tile of filters reads it again): a sum, as they hide
// each other in part; in us, a megabyte. odd: of a step, where pixels of 16-bit types are read one by one; together:
// tiles of several images. Fitted to 222 times each of 37 layers with planes of 7x7 to 257x257 (docs/tuning/nchw.md).
struct PixelsGatherTimes {
  double launch, tile, step, odd, read, written, again, together;
};
constexpr PixelsGatherTimes pixels_gather_times(Row const& row) {
  if (row.dtype == DType::f32)
    return row.tile_m == 128 ? PixelsGatherTimes{7.81, 3.68, 0.786, 0, 0.0417, 0.0535, 0.0397, 4.34}
                             : PixelsGatherTimes{7.23, 1.47, 0.629, 0, 0.163, 0.204, 0.0918, 0};
  return row.op == Op::fprop ? PixelsGatherTimes{6.89, 1.83, 0.606, 0.0312, 0.139, 0.304, 0.0958, 0}
                             : PixelsGatherTimes{6.52, 2.19, 0.684, 0, 0.289, 0, 0.0529, 0};
}

// wgrad: rounds of blocks and their steps, bytes, parts and weights.
struct PixelsGatherSums {
  double launch, second, round, step, odd, read, parts, weights;
};
constexpr PixelsGatherSums pixels_gather_sums(Row const& row) {
  if (row.dtype == DType::f32)
    return row.tile_m == 128 ? PixelsGatherSums{8.06, 0, 0, 1.586, 0, 0, 1.12, 12.9}
                             : PixelsGatherSums{0, 2.77, 6.94, 0.76, 0, 0, 0, 0.585};
  return row.tile_m == 128 ? PixelsGatherSums{6.91, 0, 1.82, 1.091, 0.113, 0.0106, 0.506, 16.9}
                           : PixelsGatherSums{7.13, 1.74, 0, 0.623, 0.104, 0, 0, 8.44};
}

constexpr Estimate pixels_gather_estimate(Row const& row, Problem const& p, Device const& d) {
  Problem const g = group_of(p);
  int64_t const plane = p.H * p.W, slots = d.sm_count * (row.tile_m == 64 ? 2 : 1);
  double const pixels = double(p.N) * double(plane) * size_of(p.dtype) / 1e6;
  bool const odd = plane % 2 != 0;
  // Beside the other rows, whose estimates are too low where odd planes, but small ones, are packed.
  bool const few = row.tile_m == 64 && p.N * plane > 64 && p.N * plane < 2500;
  double const beside = (row.op != Op::wgrad ? 1
                         : odd && plane > 64 ? 0.85
                         : few               ? 1
                                             : 1.1) *
                        (row.op == Op::wgrad && row.dtype == DType::f32 && row.tile_m == 64 ? 0.9 : 1);
  if (row.op == Op::wgrad) {
    PixelsGatherSums const t = pixels_gather_sums(row);
    int64_t const tiles = p.groups * PixelsWgrad(row.tile_m, row.tile_n, g).tiles, steps = runs_of(p);
    double const area = double(tiles) * row.tile_m * row.tile_n / 1e6;
    Estimate best;
    for (int64_t rounds : {1, 2}) {
      int64_t const wanted = max64(least_parts(p), max64(1, min64(d.sm_count * rounds / tiles, ceil_div(steps, 4))));
      int64_t const share = ceil_div(steps, wanted), split = ceil_div(steps, share), blocks = tiles * split;
      if (pixels_wgrad_bytes(row, p, wanted) > kMaxWorkspaceBytes && wanted > least_parts(p)) continue;
      double const r = double(ceil_div(blocks, slots)), each = double(blocks) / d.sm_count,
                   load = row.tile_m == 128 ? r
                          : each > 1        ? each
                                            : 1;  // two blocks share an SM
      double const second = split > 1 ? t.second + area * (double(split) * t.parts + t.weights) : 0;
      double const us = t.launch + r * t.round + load * double(share) * (t.step + (odd ? t.odd : 0)) +
                        pixels * double(p.C + p.K) * t.read + second;
      if (double const ns = us * 1000 * beside; best.ns == 0 || ns < best.ns) best = {ns, int(wanted)};
    }
    return best;
  }
  PixelsGatherTimes const t = pixels_gather_times(row);
  int64_t const sms = group_blocks(p, d.sm_count);
  PixelsGather const cut(row.tile_m, row.tile_n, row.op, g, int(sms));
  int64_t const depth = pixels_depth(row.op, p), steps = ceil_div(pixels_depth(row.op, g), run_pixels(p.dtype));
  double const rounds = double(ceil_div(cut.tiles, sms * (row.tile_m == 64 ? 2 : 1)));
  double const us =
      t.launch +
      rounds * (t.tile + double(steps) * (t.step + (odd ? t.odd : 0)) + (cut.together > 1 ? t.together : 0)) +
      pixels * (double(depth) * (t.read + double(cut.tiles_m - 1) * t.again) +
                double(pixels_columns(row.op, p)) * t.written);
  return {us * 1000 * beside, 1};
}

// Rounds of tiles, of each its steps, their parts of 16 k, and what it stores; bytes, in us a megabyte. Fitted to 80
// times each of 40 layers with planes of 9x9 to 301x301, 3.3 and 4.2 % off.
constexpr Estimate pixels_windows_estimate(Row const& row, Problem const& p, Device const& d) {
  struct Times {
    double launch, tile, step, part, store, read, written;
  };
  constexpr Times small{8.37, 0.588, 0.325, 0.2925, 0, 0.036, 0.06},
      large{8.38, 0.796, 0.197, 0.364, 0.471, 0.009, 0.042};
  Times const& t = row.tile_m == 64 ? small : large;
  Problem const g = group_of(p);
  int64_t const sms = group_blocks(p, d.sm_count);
  PixelsWindows const cut(row.tile_m, row.op, g, int(sms));
  int64_t const depth = pixels_depth(row.op, g), columns = pixels_columns(row.op, g);
  double const rounds = double(ceil_div(cut.tiles, sms)), pixels = double(p.N * p.groups) * double(p.H * p.W) * 2e-6,
               stored = double(min64(row.tile_m, columns)) / 64 * double(cut.reach * cut.together) / kWindowsColumns;
  double const us = t.launch +
                    rounds * (t.tile + double(ceil_div(depth, 64)) * t.step + double(ceil_div(depth, 16)) * t.part +
                              stored * t.store) +
                    pixels * (double(depth) * t.read + double(columns) * t.written);
  // As measured: results of several images (64x1392x7x7 to 192 D 29.3 us, estimated at 21.8).
  return {us * (cut.together > 1 ? 1200 : 1000), 1};
}

// Rounds of tiles and their steps, which take longer where all SMs have one; bytes, and fprop's filters, which are
// turned. Fitted to 36 times, 4.3 % off.
constexpr Estimate pixel_halves_estimate(Row const& row, Problem const& p, Device const& d) {
  int64_t const tiles = p.N * ceil_div(pixels_columns(row.op, p), row.tile_m);
  double const rounds = double(ceil_div(tiles, d.sm_count)), busy = double(min64(tiles, d.sm_count)) / d.sm_count,
               steps = double(ceil_div(pixels_depth(row.op, p), 64));
  double const turned = row.op == Op::fprop ? 1.91 + double(p.C) * double(p.K) * 0.7e-6 : 0;
  double const us = 7.62 + turned + rounds * (0.384 + steps * (0.412 + 0.139 * busy)) +
                    double(p.N) * kHalvesPlane * double(p.C + p.K) * 2e-6 * 0.145;
  return {us * 1000, 1};
}

// Rounds of tiles, what each stores (10,000 bytes of a type of one), its steps, their filters (64) and pixels (100),
// those of even planes more; bytes that are read, written and copied to blocks, and TF32's dgrad's filters, in us a
// megabyte. Fitted to 650 times of 92 layers each way, planes of 5x5 to 15x15: 2.3 to 2.9 % off. Beside the other rows'
// estimates 0.94 of it.
struct PairsTimes {
  double launch, round, stored, step, filters, pixels, even, read, written, copied, turned;
};
constexpr PairsTimes pairs_times(Row const& row) {
  if (row.dtype != DType::f32) return {6.84, 0.188, 0.655, 0.138, 0.0726, 0.147, 0.182, 0.0618, 0.13, 0.00541, 0};
  return row.op == Op::fprop
             ? PairsTimes{7.32, 0, 0.772, 0.077, 0.095, 0.115, 0.126, 0.067, 0.108, 0.00512, 0}
             : PairsTimes{8.61, 0.058, 0.886, 0.0795, 0.0934, 0.113, 0.149, 0.0598, 0.0935, 0.00508, 0.474};
}

constexpr Estimate pixel_pairs_estimate(Row const& row, Problem const& p, Device const& d) {
  PairsTimes const t = pairs_times(row);
  Problem const g = group_of(p);
  PixelsPairs const cut(row.tile_m, row.tile_n, row.op, g);
  double const size = size_of(p.dtype), plane = double(p.H * p.W), pixels = double(cut.together) * plane,
               steps = double(ceil_div(pixels_depth(row.op, g), run_pixels(p.dtype))),
               images = double(p.N) * plane * size / 1e6;
  double const step =
      t.step + row.tile_n / 64. * t.filters + pixels / 100 * (t.pixels + (p.H * p.W % 2 == 0 ? t.even : 0));
  double const us =
      t.launch +
      double(ceil_div(cut.tiles, group_blocks(p, d.sm_count))) *
          (t.round + pixels * row.tile_n / 1e4 * t.stored + steps * step) +
      images * (double(pixels_depth(row.op, p)) * t.read + double(pixels_columns(row.op, p)) * t.written) +
      double(cut.tiles * p.groups) * steps * cut.stage_bytes / 1e6 * t.copied +
      double(g.C) * double(p.K) * size / 1e6 * t.turned;
  return {us * 940, 1};
}

}  // namespace conv2d_ext
