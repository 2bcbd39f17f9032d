// The tile of cuda/strip.cuh for a problem: shared by the planner and the launcher.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

struct StripTile {
  int in_H = 0, in_W = 0, out_H = 0, out_W = 0;
  int pad_h = 0, pad_w = 0;       // input coordinate = output coordinate - pad + tap; may be negative
  int rows = 1, strips = 1;       // of outputs: a thread has 8 columns of a row
  int channels = 1, images = 1;   // of a block
  int chunks = 1;                 // of 4 taps in a row
  int pitch = 0, plane_rows = 0;  // of a plane in shared memory, in elements
  int64_t tiles_h = 1, tiles_w = 1, channel_units = 1;
  int64_t shared_bytes = 0;

  constexpr int items() const { return channels * images * rows * strips; }
  constexpr int64_t blocks(int64_t N) const { return tiles_h * tiles_w * channel_units * ceil_div(N, images); }
};

inline constexpr int kStripThreads = 512, kStripSharedBytes = 227 * 1024, kStripWidth = 8;

constexpr StripTile strip_tile(Op op, Problem const& p, bool nhwc) {
  StripTile t;
  bool const backward = op == Op::dgrad;
  t.in_H = int(backward ? p.P() : p.H), t.in_W = int(backward ? p.Q() : p.W);
  t.out_H = int(backward ? p.H : p.P()), t.out_W = int(backward ? p.W : p.Q());
  t.pad_h = int(backward ? p.R - 1 - p.pad_top : p.pad_top);
  t.pad_w = int(backward ? p.S - 1 - p.pad_left : p.pad_left);
  t.channels = int(min64(nhwc ? 4 : 1, p.C)), t.channel_units = ceil_div(p.C, t.channels);
  t.chunks = int(ceil_div(p.S, 4));
  int64_t const all = ceil_div(t.out_W, kStripWidth);
  t.tiles_w = ceil_div(all, 8), t.strips = int(ceil_div(all, t.tiles_w));
  // An odd number of 16-byte units: threads that follow each other have rows that follow each other.
  t.pitch = ((t.strips * kStripWidth / 4 + t.chunks) | 1) * 4;
  auto set = [&](int64_t rows, int64_t images) {
    t.rows = int(rows), t.images = int(images), t.plane_rows = int(rows + p.R - 1);
    t.tiles_h = ceil_div(t.out_H, rows);
    int64_t const planes = int64_t(t.images) * t.plane_rows * t.pitch;
    t.shared_bytes = t.channels * (planes + p.R * t.chunks * 4) * 4;
    return t.shared_bytes;
  };
  int64_t const most = max64(1, kStripThreads / (t.channels * t.strips));
  int64_t tiles = ceil_div(t.out_H, most);
  while (set(ceil_div(t.out_H, tiles), 1) > kStripSharedBytes / 2 && t.rows > 1) ++tiles;
  int64_t const plane = (t.shared_bytes - t.channels * p.R * t.chunks * 16) / t.images;
  int64_t const fit = (kStripSharedBytes / 3 - t.channels * p.R * t.chunks * 16) / plane;
  set(t.rows, max64(1, min64(min64(p.N, most / t.rows), fit)));
  return t;
}

constexpr bool strip_supports(Row const& row, Op op, Problem const& p) {
  if (!unit_stride_depthwise(row, p)) return false;
  StripTile const t = strip_tile(op, p, is_nhwc(row.variant));
  double const blocks = double(t.tiles_h) * double(t.tiles_w) * double(t.channel_units) * double(p.N);
  return t.items() <= kStripThreads && t.shared_bytes <= kStripSharedBytes && blocks < double(1 << 30);
}

// FMAs at half of their peak, in threads for 8 columns of a row, and the planes' copies, which blocks hide badly.
constexpr Estimate strip_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  StripTile const t = strip_tile(op, p, is_nhwc(row.variant));
  double const fmas = double(ceil_div(t.items(), 32) * 32) * kStripWidth * double(p.R) * double(p.S);
  int64_t const blocks = t.blocks(p.N);
  double const rounds = blocks < 2 * d.sm_count ? 1.0 : double(blocks) / double(2 * d.sm_count);
  double const elements = double(p.N) * double(p.C) * (double(p.H) * double(p.W) + double(p.P()) * double(p.Q()));
  double const memory_ns = elements * 4 / (t.out_W <= 16 ? 1100 : 1600) * 132 / d.sm_count;
  return {5000 + memory_ns + rounds * (fmas * 2 / (128 * 1.755 * 0.55) + 2000), 1};
}

}  // namespace conv2d_ext
