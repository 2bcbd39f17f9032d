// The tile of cuda/strip_rows.cuh for a problem: shared by the planner and the launcher.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

inline constexpr int kStripRows = 7, kStripColumns = 8;  // a thread's outputs
inline constexpr int kStripTaps = 32;                    // of a row of the filter, at most
inline constexpr int kStripRowsBeyond = 1024;            // rows of taps behind the last are read, and not used
inline constexpr int kStripRowsThreads = 256, kStripRowsBytes = 110 * 1024;

constexpr double in_whole(double n) { return n > 1e9 || n == double(int64_t(n)) ? n : double(int64_t(n) + 1); }

struct StripRowsTile {
  int groups = 1, strips = 1;    // of rows and columns: a block's threads for a plane
  int channels = 1, images = 1;  // of a block
  int pitch = 0;                 // of a plane in shared memory, in elements
  int plane_bytes = 0, filter_bytes = 0;
  int64_t tiles_h = 1, tiles_w = 1, channel_units = 1, image_units = 1, shared_bytes = 0;

  constexpr int items() const { return channels * images * groups * strips; }
  constexpr int64_t threads() const { return ceil_div(items(), 32) * 32; }
  constexpr int64_t blocks() const { return tiles_h * tiles_w * channel_units * image_units; }
};

constexpr StripRowsTile strip_rows_tile(Op op, Problem const& p, bool nhwc) {
  bool const backward = op == Op::dgrad;
  int64_t const in_H = backward ? p.P() : p.H, out_H = backward ? p.H : p.P(), out_W = backward ? p.W : p.Q();
  StripRowsTile t;
  t.channels = int(min64(nhwc ? 4 : 1, p.C)), t.channel_units = ceil_div(p.C, t.channels);
  // Filters of neighbouring channels are in different banks. What is read before a filter's first row is not used.
  t.filter_bytes = (int(p.R + kStripRows - 1) * kStripTaps / 4 | 1) * 16;
  int64_t const groups = ceil_div(out_H, kStripRows), strips = ceil_div(out_W, kStripColumns);
  auto set = [&](int64_t tiles_h, int64_t tiles_w) {
    t.groups = int(ceil_div(groups, tiles_h)), t.strips = int(ceil_div(strips, tiles_w));
    t.tiles_h = ceil_div(groups, t.groups), t.tiles_w = ceil_div(strips, t.strips);
    t.pitch = int(t.strips * kStripColumns / 4 + ceil_div(p.S, 4)) * 4;
    t.pitch += t.pitch % 8 == 0 ? 4 : 0;  // an odd number of 16 bytes: so are 7 rows
    // Neighbouring groups of rows, then images (nhwc: four channels before them), are in different banks.
    int const apart = nhwc ? 2 : t.groups < 8 ? t.groups : 0;
    int units = int(min64(in_H, t.groups * kStripRows + p.R - 1)) * t.pitch / 4;
    while (units % 8 != apart) ++units;
    t.plane_bytes = units * 16, t.images = 1;
    t.shared_bytes = t.channels * (int64_t(t.plane_bytes) + t.filter_bytes) + t.pitch * 4 + kStripRowsBeyond;
    return t.shared_bytes <= kStripRowsBytes && t.items() <= kStripRowsThreads;
  };
  int64_t most_groups = 8, most_strips = 8;
  while (!set(ceil_div(groups, most_groups), ceil_div(strips, most_strips)) && (most_groups > 1 || most_strips > 1))
    if (most_groups > 1 && most_groups >= most_strips)
      --most_groups;
    else
      --most_strips;
  // Several small images: two warps, or what fills a warp's lanes.
  int64_t const plane = int64_t(t.channels) * t.plane_bytes;
  while (2 * t.images <= p.N && t.items() * 2 <= 64 && t.shared_bytes + t.images * plane <= kStripRowsBytes / 4) {
    t.shared_bytes += t.images * plane;
    t.images *= 2;
  }
  t.image_units = ceil_div(p.N, t.images);
  return t;
}

constexpr bool is_strip_rows(Row const& row) { return row.family == Family::strip && row.tile_m == kStripRows; }

constexpr bool strip_rows_supports(Row const& row, Op op, Problem const& p) {
  if (p.P() == 0 || p.Q() == 0 || p.R == 0 || p.S == 0 || p.S > kStripTaps) return false;
  if (!unit_stride_depthwise(row, p) || max64(p.R, p.S) <= 7) return false;  // smaller ones are the walks'
  StripRowsTile const t = strip_rows_tile(op, p, is_nhwc(row.variant));
  double const blocks = double(t.tiles_h) * double(t.tiles_w) * double(t.channel_units) * double(t.image_units);
  return t.shared_bytes <= kStripRowsBytes && t.items() <= kStripRowsThreads && blocks < double(1 << 30);
}

// As measured. Blocks that begin together wait together, for their copies and for each other.
constexpr Estimate strip_rows_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  bool const nhwc = is_nhwc(row.variant);
  StripRowsTile const t = strip_rows_tile(op, p, nhwc);
  double const R = double(p.R), S = double(p.S);
  // Instructions of a warp; an SM's registers hold 16 of them.
  double const warp =
      R * kStripRows * (S * kStripColumns + 3 * double(ceil_div(p.S, 4))) + (R + kStripRows - 1) * (20 + 1.5 * S);
  int64_t const fit = 220 * 1024 / (t.shared_bytes + 1024), warps = 512 / t.threads();
  double const together = double(max64(1, min64(16, min64(fit, warps))));
  double const rounds = in_whole(double(ceil_div(t.blocks(), d.sm_count)) / together);
  double const issue_ns = double(t.blocks()) * double(t.threads() / 32) * warp / (4 * 1.755 * d.sm_count);
  double const elements = double(p.N) * double(p.C) * (double(p.H) * double(p.W) + double(p.P()) * double(p.Q()));
  double const memory_ns = elements * 4 / 3500 * 132 / d.sm_count, alone_ns = 2 * warp / 1.755;
  return {nhwc ? 10300 + 0.37 * issue_ns + 1.77 * memory_ns + rounds * (8400 + 1.45 * alone_ns)
               : 8200 + 1.05 * issue_ns + 0.22 * memory_ns + rounds * (10000 + 0.18 * alone_ns),
          1};
}

}  // namespace conv2d_ext
