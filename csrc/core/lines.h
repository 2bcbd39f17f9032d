// The depthwise row for any filter in channels_last (cuda/depthwise_lines.cuh): its tile, shared by the planner and the
// launcher, and what it takes and costs.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

inline constexpr int kLineThreads = 256, kLineOutputs = 4, kLineTaps = 4;  // of a block; of a thread
inline constexpr int kLinePhases = 4;                                      // of a launch, along either side

struct LineTile {
  int vector = 1;                               // channels of a thread
  int lanes = 1, groups = 1;                    // threads of a block along the channels, and along the image
  int ratio = 1, spread = 1;                    // see there
  int rows = 1;                                 // of a thread
  int filter_rows = 1, filter_columns = 1;      // in shared memory at a time
  int64_t slices = 1, heights = 1, widths = 1;  // of a phase: rows of threads, and threads of a row
  // wgrad
  int tap_units = 1, tap_slices = 1, members = 1;
  int64_t segments = 1, each = 1;

  constexpr int64_t blocks(int64_t N) const { return ceil_div(N * heights * widths, groups) * slices; }
};

constexpr bool is_lines(Row const& row) {
  return row.family == Family::depthwise && row.tile_m == 0 && is_nhwc(row.variant);
}

constexpr bool line_supports(Row const& row, Problem p) {
  // If one of the tensors is in channels_last, the other's channels may lie anywhere: a thread's loads and stores go by
  // strides.
  if (p.x.c == 1 || p.y.c == 1) p.x.c = p.y.c = 1;
  // Numbers of blocks, and of their threads along the image, are 32-bit.
  double const pixels = double(max64(p.H, p.P()) + 8) * double(max64(p.W, p.Q()) + 8);
  return depthwise_supports(row, p) && double(p.N) * pixels * (double(max64(p.C, p.K)) / 16 + 1) < 4e9;
}

// The distance of a row's taps, in inputs. That of a single tap is free: as the stride it makes the window dense.
constexpr int64_t line_dilation(Problem const& p) { return p.S == 1 ? p.stride_w : p.dilation_w; }

constexpr LineTile line_tile(Op op, Problem const& p, Device const& d) {
  LineTile t;
  bool const backward = op == Op::dgrad;
  bool const hopper = d.compute_capability == 90;  // other GPUs have the plainest of the kernels
  int const acc = p.dtype == DType::f64 ? 8 : 4;
  if (hopper && p.K == p.C && p.dtype != DType::f64 && channel_vectors(p.x, p.x_align, p.C, 4, p.dtype) &&
      channel_vectors(p.y, p.y_align, p.C, 4, p.dtype))
    t.vector = 4;
  int64_t const quads = (backward ? p.C : p.K) / t.vector;
  t.slices = ceil_div(quads, 32), t.lanes = int(ceil_div(quads, t.slices)), t.groups = kLineThreads / t.lanes;
  int64_t const g = backward ? gcd64(line_dilation(p), p.stride_w) : 1;
  int64_t const stride = backward ? 1 : p.stride_w, tap_stride = line_dilation(p) / g;
  int64_t const height = backward ? ceil_div(p.H, p.stride_h) : p.P(),
                width = backward ? ceil_div(p.W, p.stride_w) : p.Q();
  auto columns = [&](int64_t spread) constexpr { return ceil_div(width, kLineOutputs * spread) * spread; };
  t.ratio = 0;
  if (hopper && tap_stride % stride == 0 && 2 * columns(tap_stride / stride) <= 3 * columns(1))
    t.ratio = 1, t.spread = int(tap_stride / stride);
  else if (stride == 2 * tap_stride && t.vector > 1)
    t.ratio = 2;
  t.widths = columns(t.spread), t.heights = height;
  if (op == Op::wgrad) {
    t.tap_units = int(p.R * ceil_div(p.S, kLineTaps));
    int const together = t.groups < t.tap_units ? t.groups : t.tap_units;
    t.tap_slices = int(ceil_div(t.tap_units, together)), t.members = t.groups / together;
    // Runs of columns: enough of them for all blocks.
    int64_t const rows = max64(p.N * height, 1),
                  wanted = int64_t(d.sm_count) * 8 * t.members / max64(t.slices * t.tap_slices, 1);
    t.segments = min64(t.widths, max64(ceil_div(t.widths, 16), min64(ceil_div(wanted, rows), ceil_div(t.widths, 2))));
    t.each = ceil_div(t.widths, t.segments), t.segments = ceil_div(t.widths, t.each);
    return t;
  }
  int64_t const taps = max64(1, 46 * 1024 / ((t.lanes * t.vector + 4) * acc));
  t.filter_columns = int(min64(p.S, taps)), t.filter_rows = int(min64(p.R, taps / t.filter_columns));
  // Copying the filter to shared memory is shared by some rows, if all threads have work.
  if (t.filter_rows == p.R && t.filter_columns == p.S && (!backward || p.K == p.C)) {
    double const threads = double(p.N) * double(height) * double(t.widths) * double(quads);
    t.rows = int(max64(1, min64(min64(8, height), int64_t(threads / (double(d.sm_count) * 2048 * 2)))));
    t.heights = ceil_div(height, t.rows);
  }
  return t;
}

// Of the pairs of an output's and a filter's row, those that meet one of the image.
constexpr double rows_met(Problem const& p) {
  int64_t const P = p.P(), s = p.stride_h;
  double met = 0;
  for (int64_t r = 0; r < p.R; ++r) {
    int64_t const first = p.pad_top - r * p.dilation_h, last = p.H - 1 + first;  // of outputs, times the stride
    if (last < 0) continue;
    met += double(max64(0, min64(P - 1, last / s) - (first > 0 ? ceil_div(first, s) : 0) + 1));
  }
  return met / (double(P) * double(p.R));
}

// The split of wgrad; the rates are fitted.
constexpr int line_split(Problem const& p, Device const& d) {
  LineTile const t = line_tile(Op::wgrad, p, d);
  double const sms = double(d.sm_count), V = t.vector, f64 = p.dtype == DType::f64 ? 2 : 1;
  double const elements =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  double const memory_ns = elements * size_of(p.dtype) / (3500 * sms / 132);
  // Of a row of taps a thread has a unit: loads, conversions and products.
  double const columns = double(min64(p.S, kLineTaps));
  double const loads = t.ratio == 0 ? kLineOutputs * columns : (kLineOutputs - 1) * t.ratio + columns;
  double const products = kLineOutputs * V * f64;
  double const runs = double(p.N) * double(p.P()) * double(t.segments), units = double(t.slices) * t.tap_slices;
  double const group =
      loads * (6 + V) + kLineOutputs * (6 + V) + kLineTaps * products * 1.4 + (p.S > kLineTaps ? 60 : 40);
  double const run = group * double(t.each) * rows_met(p) + 60;
  double const sums = double(p.K) * double(p.R) * double(p.S);
  double const begin = size_of(p.dtype) == 2 ? 12000 : 14000, scale = size_of(p.dtype) == 2 ? 1.65 : 1.25;
  Estimate best;
  for (int64_t split = 1; split <= 4096; split += split < 8 ? 1 : split / 8) {
    if (split > 1 && (sums * double(split) * 4 * f64 > double(kMaxWorkspaceBytes) || double(split) > runs)) break;
    double const blocks = units * double(split), members = double(split) * t.members;
    double const mine = double(int64_t((runs + members - 1) / members)) * run;           // a thread's
    double const resident = blocks / sms > 4 ? 4 : blocks / sms < 1 ? 1 : blocks / sms;  // blocks of an SM
    double const rounds = blocks / sms / resident < 1 ? 1 : blocks / sms / resident;
    double const speed = resident * 8 * mine / (4 * 1.755 * 0.5), chain = mine * 4;
    double const products_ns = rounds * (speed > chain ? speed : chain);
    double const ns = begin + scale * overlapped(memory_ns, products_ns) +
                      (split > 1 ? 2500 + sums * 4 * f64 * double(split) * 2 / 2500 : 0);
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
  }
  return best.split_k;
}

}  // namespace conv2d_ext
