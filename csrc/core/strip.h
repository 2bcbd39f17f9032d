// The tile of cuda/strip.cuh for a problem: shared by the planner and the launcher.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

// One axis of a convolution of unit stride and dilation: with tap i, output j meets input j + i + offset. These are
// every so many of the tensors' outputs, inputs and taps.
struct StripPart {
  int in_first = 0, in_count = 0, offset = 0;
  int tap_first = 0, taps = 0;
};

// An axis of any stride and dilation: classes of outputs, to each of which some parts add up, one for each class of
// taps.
struct StripAxis {
  int in = 0, out = 0, taps = 0, pad = 0, stride = 1, dilation = 1;
  bool backward = false;
  int in_step = 1, out_step = 1, tap_step = 1;  // of a part; dgrad's taps are met backwards
  int classes = 1, parts = 1;

  constexpr int most_in() const { return (in + in_step - 1) / in_step; }
  constexpr int most_taps() const { return (taps + parts - 1) / parts; }
  constexpr int outputs(int which) const { return (out - which + out_step - 1) / out_step; }
  constexpr bool whole() const { return in_step == 1 && out_step == 1 && parts == 1; }

  static constexpr int modulo(int a, int n) { return (a % n + n) % n; }

  // No taps, if the class has no such part.
  constexpr StripPart part(int which, int tap) const {
    StripPart t;
    int const count = tap < taps ? (taps - tap + parts - 1) / parts : 0;
    int const place = backward ? which + pad - dilation * tap : which * stride + dilation * tap - pad;
    if (backward && place % stride != 0) return t;
    int const first = backward ? place / stride : place;
    t.taps = count, t.tap_first = backward ? tap + (count - 1) * parts : tap;
    t.in_first = modulo(first, in_step), t.offset = (first - t.in_first) / in_step - (backward ? count - 1 : 0);
    t.in_count = in > t.in_first ? (in - t.in_first + in_step - 1) / in_step : 0;
    return t;
  }
};

constexpr StripAxis strip_axis(bool backward, int64_t in, int64_t out, int64_t taps, int64_t pad, int64_t stride,
                               int64_t dilation) {
  StripAxis a{int(in), int(out), int(taps), int(pad), int(stride), int(dilation), backward};
  int const common = int(gcd64(stride, dilation)), few = int(dilation) / common,
            many = int(dilation) * int(stride) / common;
  a.in_step = backward ? few : many, a.out_step = backward ? many : few, a.parts = int(stride) / common;
  a.tap_step = backward ? -a.parts : a.parts;
  a.classes = a.out_step < a.out ? a.out_step : a.out;
  return a;
}

struct StripTile {
  StripAxis h, w;
  int rows = 1, strips = 1;       // of outputs: a thread has 8 columns of a row
  int group = 1;                  // neighbouring rows that neighbouring threads have
  int channels = 1, images = 1;   // of a block
  int chunks = 1;                 // of 4 taps in a row
  int pitch = 0, plane_rows = 0;  // of a plane in shared memory, in elements
  int plane_bytes = 0, filter_bytes = 0;
  int64_t tiles_h = 1, tiles_w = 1, channel_units = 1;
  int64_t shared_bytes = 0;

  constexpr int items() const { return channels * images * rows * strips; }
  constexpr int64_t blocks(int64_t N) const {
    return int64_t(h.classes) * w.classes * tiles_h * tiles_w * channel_units * ceil_div(N, images);
  }
};

inline constexpr int kStripThreads = 448, kStripSharedBytes = 227 * 1024, kStripWidth = 8;
inline constexpr int kStripImages = 8;  // so many that neighbouring threads have images of the same row

constexpr StripTile strip_tile(Op op, Problem const& p, bool nhwc) {
  StripTile t;
  bool const backward = op == Op::dgrad;
  t.h = backward ? strip_axis(true, p.P(), p.H, p.R, p.pad_top, p.stride_h, p.dilation_h)
                 : strip_axis(false, p.H, p.P(), p.R, p.pad_top, p.stride_h, p.dilation_h);
  t.w = backward ? strip_axis(true, p.Q(), p.W, p.S, p.pad_left, p.stride_w, p.dilation_w)
                 : strip_axis(false, p.W, p.Q(), p.S, p.pad_left, p.stride_w, p.dilation_w);
  int const out_H = t.h.outputs(0), R = t.h.most_taps();
  t.channels = int(min64(nhwc ? 4 : 1, p.C)), t.channel_units = ceil_div(p.C, t.channels);
  t.chunks = int(ceil_div(t.w.most_taps(), 4));
  int64_t const all = ceil_div(t.w.outputs(0), kStripWidth);
  t.tiles_w = ceil_div(all, 8), t.strips = int(ceil_div(all, t.tiles_w));
  // An odd number of 16-byte units: threads that follow each other have rows or planes that follow each other.
  t.pitch = ((t.strips * kStripWidth / 4 + t.chunks) | 1) * 4;
  t.filter_bytes = R * t.chunks * 16;
  auto set = [&](int64_t tiles, int64_t images) {
    int64_t const rows = ceil_div(out_H, tiles);
    t.tiles_h = ceil_div(out_H, rows), t.rows = int(rows), t.images = int(images);
    t.plane_rows = int(max64(rows, min64(t.h.most_in(), rows + R - 1)));
    t.plane_bytes = (t.plane_rows * (t.pitch / 4) | 1) * 16;
    t.shared_bytes = t.channels * (t.images * int64_t(t.plane_bytes) + t.filter_bytes);
    return t.shared_bytes <= kStripSharedBytes / 2;
  };
  int64_t const most = max64(1, kStripThreads / (t.channels * t.strips));
  // Threads of one row skip the taps that meet no row of the image: several images, or 8 rows by some strips.
  int64_t tiles = ceil_div(out_H, max64(1, most / kStripImages));
  if (p.N >= kStripImages && tiles <= 2 && set(tiles, kStripImages)) {
    int64_t images = most / t.rows;
    while (images > kStripImages && !set(tiles, images)) --images;
    set(tiles, ceil_div(p.N, ceil_div(p.N, images)));
  } else {
    tiles = ceil_div(out_H, most);
    while (!set(tiles, 1) && t.rows > 1) ++tiles;
    int64_t images = max64(1, min64(p.N, most / t.rows));
    while (images > 1 && !set(tiles, images)) --images;
    set(tiles, images);
  }
  t.group = t.images < kStripImages && t.rows % 8 == 0 ? 8 : t.rows;
  return t;
}

constexpr bool strip_supports(Row const& row, Op op, Problem const& p) {
  if (p.P() == 0 || p.Q() == 0 || p.R == 0 || p.S == 0) return false;
  constexpr int64_t most_step = 1 << 12;
  if (max64(p.stride_h, p.stride_w) > most_step || max64(p.dilation_h, p.dilation_w) > most_step) return false;
  Problem plain = p;
  plain.stride_h = plain.stride_w = plain.dilation_h = plain.dilation_w = 1;
  if (!unit_stride_depthwise(row, plain)) return false;
  StripTile const t = strip_tile(op, p, is_nhwc(row.variant));
  double const blocks = double(t.h.classes) * double(t.w.classes) * double(t.tiles_h) * double(t.tiles_w) *
                        double(t.channel_units) * double(p.N);
  return t.items() <= kStripThreads && t.shared_bytes <= kStripSharedBytes && blocks < double(1 << 30);
}

// Of the rows of taps, those that a warp multiplies: it skips what lies above and below the image for all of its rows.
constexpr double strip_met(StripAxis const& a, int rows) {
  StripPart t = a.part(0, 0);
  for (int tap = 1; tap < a.parts && t.taps == 0; ++tap) t = a.part(0, tap);
  if (t.taps == 0) return 1;
  auto sum = [](double n) { return n > 0 ? n * (n + 1) / 2 : 0; };
  double const out = a.outputs(0), taps = t.taps;
  double const above = -t.offset, below = out - 1 + taps - t.in_count - above;
  double const skipped = (sum(above) - sum(above - out) + sum(below) - sum(below - out)) / (out * taps);
  double const met = (skipped < 1 ? 1 - skipped : 0) + (rows - 1) / taps;
  return met < 1 ? met : 1;
}

}  // namespace conv2d_ext
