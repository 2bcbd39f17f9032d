// Depthwise layers of small images in NCHW, 3x3, 5x5 and 7x7 (cuda/depthwise_lanes.cuh): which, their tile, shared by
// the planner and the launcher, and what they cost.
#pragma once

#include "row.h"

namespace conv2d_ext {

inline constexpr int kLanesColumns = 2;  // of a row, of a lane, at most

constexpr bool is_lanes(Row const& row) {
  return row.family == Family::depthwise && row.tile_m == 0 && row.tile_n == kLanesColumns &&
         row.variant == Variant::nchw;
}

// The greatest whole number up to a half.
constexpr int half_of(int a) { return a >= 0 ? a / 2 : (a - 1) / 2; }

// Rows of outputs of a band (wgrad: of y; dgrad with stride 2: pairs of rows of x).
constexpr int lanes_band(Op op, int stride) { return stride == 1 ? 7 : op == Op::dgrad ? 2 : 4; }
// Of a block, at most; wgrad has a number for each of them and tap in shared memory.
constexpr int lanes_threads(Op op, int R) { return op == Op::wgrad && R < 7 ? 256 : 128; }
constexpr int lanes_shared_pitch(int threads) { return threads + 1; }  // rows of a tap begin in different banks

// Where a lane's inputs lie along one axis. The kernels know the padding that keeps an image's size; less of it moves
// the inputs on by `shift`, that of dgrad with stride 2 the outputs back by one, too, where it is odd.
struct LanesAxis {
  int shift = 0, odd = 0;
};

constexpr LanesAxis lanes_axis(Op op, int64_t R, int64_t stride, int64_t pad) {
  int const less = int(R / 2 - (op == Op::dgrad && stride == 1 ? R - 1 - pad : pad));
  if (op != Op::dgrad || stride == 1) return {less, 0};
  return {half_of(-less), less & 1};
}

struct LanesTile {
  bool used = false;
  bool words = false;  // a lane's two columns of x are one load
  int strips = 1;      // of a row
  int strip = 1;       // lanes of a strip that have outputs
  int before = 0;      // lanes whose columns those of the first meet, before it: the last of a strip
  int lanes = 8;       // of a strip; those beyond the image hold the zeros beside it
  int segments = 1;    // wgrad: of `lanes` each, that share a channel
  int team = 1;        // wgrad: threads that add up a sum
  int threads = 128;   // of a block
  int bands = 1;       // of an image
  int64_t items = 1;   // strips of the bands of all images, for wgrad of a channel
  int64_t blocks = 1;
  double ns = 0;
};

constexpr LanesTile lanes_tile(Op op, Problem const& p, Device const& d) {
  LanesTile t;
  bool const sums = op == Op::wgrad, spread = op == Op::dgrad && p.stride_w == 2;
  int const R = int(p.R), pad = R / 2, stride = int(p.stride_w), size = size_of(p.dtype);
  if (p.C_per_group() != 1 || p.K != p.C || p.dtype == DType::f64 || p.R != p.S || R % 2 == 0 || R > 7) return t;
  if (p.stride_h != p.stride_w || stride > 2 || p.dilation_h != 1 || p.dilation_w != 1) return t;
  if (R == 1 && stride == 2) return t;  // single.h
  if (p.pad_top < 0 || p.pad_left < 0 || max64(p.pad_top, p.pad_left) >= R || p.N <= 0 || p.C <= 0) return t;
  int64_t const P = p.P(), Q = p.Q();
  if (p.H <= 0 || p.W <= 0 || P <= 0 || Q <= 0 || max64(max64(p.H, p.W), max64(P, Q)) > 1024) return t;
  // As measured: beyond, rows off 16 bytes with a stride in float32 alone, for which only rows for any filter are
  // there.
  bool const strided = stride == 2 && p.dtype == DType::f32 && !sums && !(spread && R == 5);
  if (double(p.N) * double(p.C) * double(max64(p.H * p.W, P * Q)) > (strided ? 3e8 : 3e7)) return t;
  if ((p.W > 1 && p.x.w != 1) || (Q > 1 && p.y.w != 1)) return t;
  constexpr int64_t most = int64_t(1) << 20;
  if (max64(max64(p.x.h, p.y.h), max64(p.w.n, max64(p.w.h, p.w.w))) > most || p.N * p.C > int64_t(1) << 24) return t;
  auto even = [&](Strides const& s, int align) {
    return s.n % 2 == 0 && s.c % 2 == 0 && s.h % 2 == 0 && align >= 2 * size;
  };
  LanesAxis const rows = lanes_axis(op, R, stride, p.pad_top), columns = lanes_axis(op, R, stride, p.pad_left);
  t.words = p.W % 2 == 0 && even(p.x, p.x_align) && (stride == 2 || (Q % 2 == 0 && even(p.y, p.y_align))) &&
            (spread ? columns.odd : columns.shift % 2) == 0;
  // Lanes of inputs and of outputs, and of those that these meet on either side.
  bool const pairs = (t.words || stride == 2) && !spread;
  int64_t const in_W = op == Op::dgrad ? Q : p.W, out_W = op == Op::dgrad ? p.W + columns.odd : Q;
  int64_t const in_lanes = ceil_div(in_W - columns.shift, pairs ? 2 : 1);
  int64_t const out_lanes = ceil_div(out_W, spread || (pairs && stride == 1) ? 2 : 1);
  t.before = spread ? -half_of(pad - R + 2) : pairs ? (pad + 1) / 2 : pad;
  int const after = !pairs && !spread ? pad : pairs && stride == 2 ? pad / 2 : (pad + 1) / 2;
  int64_t needed = columns.shift > 0 ? max64(in_lanes, out_lanes + after) + t.before
                                     : max64(max64(in_lanes, out_lanes) + t.before, out_lanes + after);
  if (needed > 32) {
    t.strips = int(ceil_div(out_lanes, 32 - t.before - after));
    needed = ceil_div(out_lanes, t.strips) + t.before + after;
  }
  t.strip = int(ceil_div(out_lanes, t.strips));
  while (t.lanes < needed) t.lanes *= 2;
  int const most_threads = lanes_threads(op, R), band = lanes_band(op, stride);
  t.bands = int(ceil_div(spread ? ceil_div(p.H + rows.odd, 2) : op == Op::dgrad ? p.H : P, band));
  t.items = p.N * t.bands * t.strips * (sums ? 1 : p.C);
  if (sums) {
    while (t.segments * t.lanes < most_threads && t.segments < t.items) t.segments *= 2;
    t.threads = int(max64(64, t.segments * t.lanes));
    int64_t const channels = t.threads / (t.segments * t.lanes), all = channels * R * R;
    t.blocks = ceil_div(p.C, channels);
    // A team is within a warp, and each of its threads adds up four numbers at least.
    while (t.team < 32 && t.team * 8 <= t.segments * t.lanes && t.team * 2 * all <= t.threads) t.team *= 2;
  } else {
    t.blocks = ceil_div(t.items * t.lanes, t.threads);
  }
  if (double(t.items) * (t.bands > t.strips ? t.bands : t.strips) >= 4e9 ||
      double(p.N) * double(p.C) * double(p.C) >= 4e9)
    return t;
  t.used = true;
  // As measured: the instructions of a warp one after the other, those of all warps, and the memory's time.
  int const outputs = t.words && stride == 1 ? 2 : 1, taps = R * R;
  int const lines = spread ? band + pad + 1 : (band - 1) * stride + R, line = 5 + R + outputs;
  double const bytes = double(p.N) * double(p.C) * (double(p.H) * double(p.W) + double(P) * double(Q)) * size;
  double const memory = bytes / 1000 * 132 / d.sm_count;
  if (sums) {
    double const rounds = double(ceil_div(t.items, t.segments)), of_channel = t.segments * t.lanes;
    // Pairs of columns that are no words are loaded one by one.
    double const of_rows = lines * (line + (t.words || stride == 1 ? 0.0 : 10.4));
    double const band_ns = rounds * (of_rows + band * (5 + outputs) + taps * band * outputs + 60) / 1.755;
    double const all = t.threads / of_channel * taps;
    double const end_ns =
        (double(ceil_div(int64_t(all) * t.team, t.threads)) * (of_channel / t.team + 50) + taps * 2) / 1.755;
    // Three blocks are on an SM at a time.
    double const turns = double(ceil_div(t.blocks, 3 * d.sm_count)), of_sm = double(ceil_div(t.blocks, d.sm_count));
    t.ns = 5970 + 3.09 * turns * band_ns + 0.17 * of_sm * t.threads / 32 * (band_ns + end_ns) + 0.227 * memory;
  } else {
    double const warps = double(t.blocks) * t.threads / 32 / d.sm_count;
    double const of_rows =
        spread ? lines * (4 + R) + band * 16 : lines * (line + (t.words || stride == 1 ? 0 : 4)) + band;
    double const band_ns = (of_rows + taps * (3 + band * (spread ? 1 : outputs)) + 60) / 1.755;
    t.ns = spread ? 4490 + 9.15 * band_ns + 0.488 * warps * band_ns
                  : 5940 + 0.07 * band_ns + 0.4465 * warps * band_ns + 0.056 * memory;
  }
  return t;
}

}  // namespace conv2d_ext
