// The tile of cuda/band.cuh for a problem, and what it costs: shared by the planner and the launcher.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

constexpr int64_t spread_extent(int64_t n, int64_t step) { return (n - 1) * step + 1; }

// The problem of unit stride and dilation of which this one is a part: zeros between the taps and between y's pixels.
constexpr Problem spread(Problem p) {
  p.R = spread_extent(p.R, p.dilation_h), p.S = spread_extent(p.S, p.dilation_w);
  p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
  return p;
}

struct BandTile {
  int in_H = 0, in_W = 0, out_H = 0, out_W = 0;
  int pad_h = 0, pad_w = 0;       // input coordinate = output coordinate - pad + tap; may be negative
  int origin_w = 0, skew = 0;     // first column of the first tile; columns from its first input to its first tap
  int shift[2] = {0, 0};          // even and odd blocks of 8 columns: units that their inputs begin earlier
  int pairs = 2, passes = 1;      // registers of the band; passes over the taps of a row
  int first_unit = 0, units = 1;  // columns in shared memory, in units of 8
  int rows = 1;                   // rows in shared memory for each remainder
  int channels = 1, images = 1;   // of a block
  int filter_pitch = 0, filter_copy = 0;  // elements
  int64_t plane_bytes = 0, filter_bytes = 0, shared_bytes = 0;
  int64_t tiles_h = 1, tiles_w = 1, channel_units = 1;
  double products = 0;  // multiplications of 16 x 8 x 8, of one tile and plane

  constexpr int64_t blocks_of_one_round(int64_t N) const {
    return tiles_h * tiles_w * channel_units * ceil_div(N, images);
  }
};

inline constexpr int kBandLead = 16, kBandPassPairs = 4, kBandSharedBytes = 227 * 1024;

// Images that a warp of a tile of 16 * depth rows works on.
constexpr int band_images(int depth) { return depth == 1 ? 4 : depth == 2 ? 2 : 1; }

// Rounds of images of a block, which share its filters: not so many that SMs go without a block.
constexpr int64_t band_rounds(BandTile const& t, int64_t N, int depth) {
  constexpr int64_t wanted = 528;  // blocks: four an SM of an H200
  return depth == 4 ? 1 : max64(1, min64(ceil_div(N, t.images), t.blocks_of_one_round(N) / wanted));
}

// depth, width: 16 * depth rows and 16 * width columns.
constexpr BandTile band_tile(Op op, Problem const& p, int depth, int width, bool nhwc) {
  BandTile t;
  bool const backward = op == Op::dgrad;
  t.in_H = int(backward ? p.P() : p.H), t.in_W = int(backward ? p.Q() : p.W);
  t.out_H = int(backward ? p.H : p.P()), t.out_W = int(backward ? p.W : p.Q());
  t.pad_h = int(backward ? p.R - 1 - p.pad_top : p.pad_top);
  t.pad_w = int(backward ? p.S - 1 - p.pad_left : p.pad_left);
  int const R = int(p.R), S = int(p.S), group = band_images(depth);

  // A tile's inputs begin on a multiple of 8 columns: either the outputs are shifted, or the taps.
  int const rest = ((-t.pad_w) % 8 + 8) % 8;
  int const plain = (S + 7 + 7) / 8, skewed = (S + rest + 7 + 7) / 8;
  int64_t const tiles = ceil_div(t.out_W, 16 * width), shifted_tiles = ceil_div(t.out_W + rest, 16 * width);
  bool const shifted = shifted_tiles * plain < tiles * skewed;
  t.origin_w = shifted ? -rest : 0, t.skew = shifted ? 0 : rest;
  t.tiles_w = shifted ? shifted_tiles : tiles, t.tiles_h = ceil_div(t.out_H, 16 * depth);
  int const all = shifted ? plain : skewed;
  // One block of outputs a warp: no window, so the band may be of any width, and begin with an even or an odd unit.
  bool const may_shift = width == 1 && t.tiles_w == 1;
  t.pairs = width == 1 ? (all + (may_shift ? 1 : 0) + 1) / 2 * 2 : all < 2 ? 2 : all;
  if (width > 1 && t.pairs > 5) t.pairs = kBandPassPairs, t.passes = (all + kBandPassPairs - 1) / kBandPassPairs;

  // Which blocks of 16 columns an even and an odd block of outputs multiply: those that meet the image.
  int const taps = (t.pairs + 1) / 2, blocks = width + taps - 1;
  int const base = t.origin_w - t.pad_w - t.skew;
  int low = 1 << 30, high = -(1 << 30);
  for (int odd = 0; odd < 2; ++odd) {
    auto count = [&](int shift, bool note) {
      int found = 0;
      for (int pass = 0; pass < t.passes; ++pass)
        for (int b = 0; b < blocks; ++b) {
          int const unit = odd - shift + pass * kBandPassPairs + 2 * b, column = base + 8 * unit;
          if (t.tiles_w == 1 && (column + 15 < 0 || column >= t.in_W)) continue;
          for (int nb = 0; nb < width; ++nb)
            if (b - nb >= 0 && b - nb < taps) found += 2 * (b - nb) + 1 < t.pairs ? 2 : 1;
          if (!note) continue;
          low = unit < low ? unit : low, high = unit + 2 > high ? unit + 2 : high;
        }
      return found;
    };
    t.shift[odd] = may_shift && count(1, false) < count(0, false) ? 1 : 0;
    t.products += double(count(t.shift[odd], true)) * R * depth;
  }
  if (low > high) low = 0, high = 1;
  t.first_unit = low, t.units = (high - low) | 1;  // odd: the rows of a multiplication are in different banks
  t.rows = int(ceil_div(16 * depth + R - 1, depth));

  t.filter_pitch = kBandLead + 8 * (kBandPassPairs * (t.passes - 1) + t.pairs);
  t.filter_copy = R * t.filter_pitch;
  while (t.filter_copy % 64 != 32) ++t.filter_copy;  // the copies are half the banks apart
  t.filter_bytes = int64_t(t.filter_copy) * 4;
  int64_t const inputs = int64_t(t.rows) * depth * t.units * 16;
  int64_t const outputs = nhwc || depth > 1 ? int64_t(16 * depth) * (16 * width + 8) * 2 : 0;
  t.plane_bytes = inputs > outputs ? inputs : outputs;

  int const groups = nhwc ? 1 : int(min64(4, ceil_div(max64(p.N, 1), group)));
  t.channels = int(min64(nhwc ? 8 : 4 / groups, p.C)), t.images = groups * group;
  auto shared = [&] { return t.channels * (t.filter_bytes + t.images * t.plane_bytes); };
  while (shared() > kBandSharedBytes && t.images > group) t.images -= group;
  while (shared() > kBandSharedBytes && t.channels > 1) t.channels /= 2;
  t.shared_bytes = shared();
  t.channel_units = ceil_div(p.C, t.channels);
  return t;
}

// wgrad, of 16-bit types and of f32: a block's 8 warps share out channels, images, and the rows of a plane.
struct BandSumsTile {
  int channels = 1, images = 1, parts = 1;  // of a block
  int rows = 1, columns = 16;               // rows of x and columns of y in a step
  int skew = 0, x_units = 1, y_units = 1, y_rows = 1;
  int64_t tiles_h = 1, tiles_w = 1, units_r = 1, units_s = 1, channel_units = 1, image_units = 1;
  int64_t copy_bytes = 0, x_bytes = 0, y_bytes = 0, shared_bytes = 0;

  constexpr int64_t steps() const { return image_units * tiles_h * tiles_w; }
};

inline constexpr int kBandSumsWarps = 8, kBandSumsBytes = 110 * 1024;  // two blocks an SM

// depth, width: 16 * depth rows and 8 * width columns of the filter.
constexpr BandSumsTile band_sums_tile(Problem const& p, int depth, int width, bool nhwc) {
  BandSumsTile t;
  int const element = size_of(p.dtype), unit = 16 / element;  // columns of 16 bytes
  bool const halves = element == 2;
  t.channels = nhwc ? unit : 1, t.channel_units = ceil_div(p.C, t.channels);
  t.units_r = ceil_div(p.R, 16 * depth), t.units_s = ceil_div(p.S, 8 * width);
  t.tiles_w = ceil_div(p.Q(), 64);
  t.columns = int(ceil_div(ceil_div(p.Q(), t.tiles_w), 16) * 16);
  t.skew = halves ? int(((-p.pad_left) % 8 + 8) % 8) : 0;
  t.x_units = ((t.columns + 8 * width) / unit + 1) | 1, t.y_units = (t.columns / unit) | 1;
  auto set = [&](int64_t rows) {
    t.rows = int(rows), t.tiles_h = ceil_div(p.H, rows);
    t.y_rows = halves ? int(ceil_div(rows + 16 * depth - 1, depth)) : int(rows) + 16 * depth - 1;
    t.copy_bytes = rows * t.x_units * 16;
    while (halves && t.copy_bytes % 128 != 64) t.copy_bytes += 16;  // the copies are half the banks apart
    t.x_bytes = halves ? 2 * t.copy_bytes : t.copy_bytes;
    t.y_bytes = int64_t(t.y_rows) * (halves ? depth : 1) * t.y_units * 16;
    return (t.x_bytes + t.y_bytes) * t.channels * t.images;
  };
  // As many images as warps, if they are small; else the warps share out the rows of one.
  int const most = kBandSumsWarps / t.channels;
  for (t.images = most; t.images > 1; t.images /= 2)
    if (t.images <= p.N && set(p.H < 64 ? p.H : 64) <= kBandSumsBytes && (p.H <= 32 || t.images < most)) break;
  t.parts = most / t.images;
  int64_t tiles = ceil_div(p.H, 64);
  while (set(ceil_div(p.H, tiles)) > kBandSumsBytes && t.rows > 1) tiles = tiles < 8 ? tiles + 1 : tiles * 2;
  t.image_units = ceil_div(p.N, t.images);
  t.shared_bytes = (t.x_bytes + t.y_bytes) * t.channels * t.images;
  int64_t const sums = int64_t(kBandSumsWarps) * 16 * depth * 8 * width * 4;
  if (t.shared_bytes < sums) t.shared_bytes = sums;
  return t;
}

constexpr bool band_supports(Row const& row, Op op, Problem const& problem) {
  if (problem.P() == 0 || problem.Q() == 0 || problem.R == 0 || problem.S == 0) return false;
  Problem const p = spread(problem);
  if (!unit_stride_depthwise(row, p)) return false;
  bool const nhwc = is_nhwc(row.variant);
  constexpr int64_t most = int64_t(1) << 29;
  if (op == Op::wgrad) {
    BandSumsTile const t = band_sums_tile(p, row.tile_m / 16, row.tile_n / 8, nhwc);
    double const units = double(t.units_r) * double(t.units_s) * double(t.channel_units);
    double const steps = double(t.image_units) * double(t.tiles_h) * double(t.tiles_w);
    return t.shared_bytes <= kBandSharedBytes && units * 4096 < double(most) && steps < double(most);
  }
  BandTile const t = band_tile(op, p, row.tile_m / 16, row.tile_n / 16, nhwc);
  double const blocks =
      double(t.tiles_h) * double(t.tiles_w) * double(t.channel_units) * double(ceil_div(p.N, t.images));
  return t.shared_bytes <= kBandSharedBytes && blocks < double(most);
}

// A step's copies and multiplications, of 16 x 8 x 16 or their FMAs, as measured. fprop and dgrad are in band_blocks.h.
constexpr Estimate band_sums_estimate(Row const& row, Problem const& problem, Device const& d) {
  Problem const p = spread(problem);
  bool const strided = problem.stride_h > 1 || problem.stride_w > 1;
  int const depth = row.tile_m / 16, width = row.tile_n / 8;
  BandSumsTile const t = band_sums_tile(p, depth, width, is_nhwc(row.variant));
  bool const nhwc = is_nhwc(row.variant), f32 = p.dtype == DType::f32;
  bool const vectors = nhwc ? channel_vectors(p.x, p.x_align, p.C, 8, p.dtype) : p.W % 8 == 0;
  double const units = double(t.units_r) * double(t.units_s) * double(t.channel_units);
  double const planes = double(t.channels) * t.images, sums = double(p.K) * double(p.R) * double(p.S);
  double const products = planes * t.rows * (t.columns / 16) * depth * width;
  double const fma_ns = nhwc ? 23.0 : strided ? 27.0 : 25.0, mma_ns = nhwc ? 3.9 : depth == 1 ? 11.3 : 4.2;
  double const product_ns = f32 ? fma_ns : mma_ns;
  double const byte_ns = nhwc ? (f32 ? 0.17 : 0.159) * (vectors || f32 ? 1 : 2) : f32 ? 0 : vectors ? 0.011 : 0.04;
  double const y_bytes = double(t.y_bytes) * (strided && !nhwc ? 2.7 : 1.0);  // copied one by one
  double const step_ns = (f32    ? 0
                          : nhwc ? 1100
                                 : 1830) +
                         products * product_ns + planes * (double(t.x_bytes) + y_bytes) * byte_ns;
  double const begin = f32 ? 6600 : 3700, end = f32 ? (nhwc ? 0 : 2500) : nhwc ? 4670 : 3330;
  Estimate best;
  for (int64_t split = 1; split <= t.steps() && split <= 64; ++split) {
    if (split > 1 && sums * double(split) * 4 > double(kMaxWorkspaceBytes)) break;
    double const rounds = double(ceil_div(int64_t(units * double(split)), 2 * d.sm_count));  // two blocks an SM
    double ns = begin + rounds * (double(ceil_div(t.steps(), split)) * step_ns + end);
    if (split > 1) ns += 2700 + sums * double(split) * 8 / 2500;
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
  }
  // As measured: large filters by tiles of 32x32, pixel by pixel (3x115x105x105 31x31 259 us, estimated at 118).
  if (nhwc && !f32 && depth == 2 && p.C > 16 && (strided ? p.S : problem.S) > 24) best.ns *= 1.5;
  return best;
}

}  // namespace conv2d_ext
