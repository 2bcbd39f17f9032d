// Depthwise layers, and small groups, of few taps that meet (cuda/depthwise_met.cuh): which, their tile, shared by the
// planner and the launcher, and what they cost.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

inline constexpr int kMetThreads = 128;  // of a block
inline constexpr int kMetSumLog2 = 8;    // of the threads of a block of wgrad
inline constexpr int kMetSumThreads = 1 << kMetSumLog2;
inline constexpr int kMetSumChunk = 8;  // products of wgrad that a thread asks for together
inline constexpr int kMetRows = 4;      // of outputs below each other, of a thread, or one
inline constexpr int kMetFilters = 64;  // most that an output adds up

constexpr bool is_met(Row const& row) { return row.family == Family::depthwise && row.tile_m == 0 && row.tile_n == 1; }

// Of x and y, how many have neighbours in memory where the row's threads have them.
constexpr int met_neighbours(Problem const& p, bool channels_last) {
  auto along = [&](Strides const& s, int64_t channels, int64_t columns) {
    return channels_last ? channels == 1 || s.c == 1 : columns == 1 || s.w == 1;
  };
  return int(along(p.x, p.C, p.W)) + int(along(p.y, p.K, p.Q()));
}

// Taps of a thread that it asks for together.
constexpr int met_chunk(int size, int rows) { return rows == 1 ? (size == 8 ? 8 : 16) : size == 8 ? 4 : 8; }

// Along one axis. A thread's outputs and their taps: `step` taps from one that it meets to the next, whose inputs are
// `next` apart; dgrad: an output meets taps if `common` divides its place, and `inverse` is that of next, of step.
struct MetAxis {
  int step = 1, next = 1, common = 1, inverse = 0;
  int64_t most = 1;  // taps that an output meets
};

constexpr MetAxis met_axis(Op op, int64_t taps, int64_t stride, int64_t dilation, int64_t length) {
  MetAxis a;
  if (taps == 1) dilation = 1;
  if (op == Op::dgrad) a.common = int(gcd64(stride, dilation));
  if (op == Op::dgrad) a.step = int(stride / a.common);
  a.next = int(dilation / a.common);
  while (a.step > 1 && int64_t(a.inverse) * a.next % a.step != 1) ++a.inverse;
  a.most = min64(ceil_div(taps, a.step), ceil_div(length, a.next));
  return a;
}

struct MetTile {
  bool used = false;
  MetAxis h, w;
  int rows = 1;        // of outputs of a thread
  int64_t groups = 1;  // of them, of a plane's column
  int parts_log2 = 0;  // wgrad: of the threads of a sum
  int64_t items = 1, blocks = 1;
  double ns = 0;
};

// wgrad: of a tap, the outputs along an axis that it meets.
struct MetProducts {
  double mean = 0;
  int64_t most = 0;
};

constexpr MetProducts met_products(int64_t taps, int64_t outputs, int64_t length, int64_t stride, int64_t dilation,
                                   int64_t pad) {
  MetProducts found;
  int64_t const step = ceil_div(taps, 64);
  for (int64_t tap = 0; tap < taps; tap += step) {
    int64_t const low = pad - tap * dilation, begin = low > 0 ? ceil_div(low, stride) : 0;
    int64_t const end = length + low <= 0 ? 0 : min64(outputs, ceil_div(length + low, stride));
    int64_t const count = end > begin ? end - begin : 0;
    found.mean += double(count) / double(ceil_div(taps, step)), found.most = max64(found.most, count);
  }
  return found;
}

// wgrad: as many parts of a sum as take the least time.
constexpr MetTile met_sums(Problem const& p, Device const& d, bool channels_last, double slower, double memory_ns) {
  MetTile best;
  MetProducts const rows = met_products(p.R, p.P(), p.H, p.stride_h, p.dilation_h, p.pad_top);
  MetProducts const columns = met_products(p.S, p.Q(), p.W, p.stride_w, p.dilation_w, p.pad_left);
  int64_t const most = p.N * rows.most * columns.most, items = p.K * p.C_per_group() * p.R * p.S;
  for (int log2 = 0; log2 <= kMetSumLog2 && (log2 == 0 || most >> log2 > 0); ++log2) {
    // Of a warp that has several parts, or few channels, a load meets more lines of memory.
    double const lines = 1 / double(min64(min64(32, kMetSumThreads >> log2), channels_last ? p.K : 32));
    double const chunks = double(ceil_div(ceil_div(most, int64_t(1) << log2), kMetSumChunk));
    // A warp has a tap of many channels, or in NCHW several taps of a channel and waits for those that meet most.
    double const of_row = channels_last ? columns.mean : double(columns.most);
    double const mean = double(p.N) * rows.mean * of_row / double(kMetSumChunk << log2);
    MetTile t{.used = true, .parts_log2 = log2, .items = items, .blocks = ceil_div(items << log2, kMetSumThreads)};
    double const warps = double(t.blocks) * (kMetSumThreads / 32) / d.sm_count;
    // As measured: waits for a chunk, instructions and lines of all warps.
    bool const half = size_of(p.dtype) == 2;
    double const wait = channels_last ? 480 + 180 * lines : 550, line = channels_last ? 320 : half ? 51 : 96;
    double const chunk = (channels_last ? 27 : half ? 36 : 49) + line * lines;
    t.ns = 6200 + wait * (chunks - 1) + 1.1 * warps * (55 + chunk * mean) * slower + memory_ns;
    if (!best.used || t.ns < best.ns) best = t;
  }
  return best;
}

// fprop and dgrad: one or kMetRows outputs of a thread.
constexpr MetTile met_outputs(Op op, Problem const& p, Device const& d, bool channels_last, double slower,
                              double memory_ns) {
  MetTile best;
  bool const backward = op == Op::dgrad, half = size_of(p.dtype) == 2;
  MetAxis const h = met_axis(op, p.R, p.stride_h, p.dilation_h, backward ? p.P() : p.H);
  MetAxis const w = met_axis(op, p.S, p.stride_w, p.dilation_w, backward ? p.Q() : p.W);
  int64_t const H = backward ? p.H : p.P(), W = backward ? p.W : p.Q(), classes = backward ? p.stride_h : 1;
  double const columns = double(p.N) * double(backward ? p.C : p.K) * double(W);
  double const filters = double(backward ? p.K_per_group() : p.C_per_group());
  // Taps of a row's lattice, and inputs from an output to the next.
  int64_t const all = backward ? ceil_div(p.R, h.step) : p.R, moves = backward ? 1 : p.stride_h;
  for (int rows = 1; rows <= kMetRows; rows += kMetRows - 1) {
    MetTile t{.used = true, .h = h, .w = w, .rows = rows};
    t.groups = ceil_div(ceil_div(H, classes), rows) * classes;
    if (columns * double(t.groups) >= double(1 << 30)) continue;
    t.items = int64_t(columns) * t.groups, t.blocks = ceil_div(t.items, kMetThreads);
    int64_t const met = min64(all, h.most + ceil_div((rows - 1) * moves, h.next)) * w.most;
    double const chunks = double(ceil_div(met * int64_t(filters), met_chunk(size_of(p.dtype), rows)));
    double const warps = double(t.items) / 32 / d.sm_count;
    // As measured: waits for a chunk, longer where neighbours' filters lie apart; instructions of all warps.
    double const of_filter = double(p.R * p.S * size_of(p.dtype)) / 128, plane = double(t.groups * W);
    double const apart = channels_last ? (of_filter < 1 ? of_filter : 1.0) : plane < 32 ? 1 / plane : 1.0 / 32;
    double const wait = rows == 1 ? 290 : 390, far = rows == 1 ? 600 : channels_last ? 200 : 400;
    double chunk = rows == 1 ? 41 : half ? 63 : 49;
    if (channels_last) chunk = (rows == 1 ? 12 + 45 * apart : 30 + 22 * apart) * (half && backward ? 1.2 : 1.0);
    t.ns = (rows == 1 ? 5900 : 6050) + wait * (chunks - 1) + far * chunks * apart +
           warps * (34 + chunk * chunks) * slower * (backward ? 1.05 : 1.0) + memory_ns;
    if (p.C_per_group() > 1) {  // likewise, where several filters follow each other
      double const lines = double((backward ? p.w.c : p.w.n) * size_of(p.dtype)) / 128;
      double const far_filters = lines < 1 ? lines : 1.0;
      double const each =
          rows == 1 ? (channels_last ? 54 + 30 * far_filters : 76) : (channels_last ? 63 + 26 * far_filters : 87);
      t.ns = (rows == 1 ? 6450 : 6600) +
             (rows == 1       ? 480
              : channels_last ? 630
                              : 430) *
                 (chunks - 1) +
             warps * (43 + each * chunks) * slower;
    }
    if (!best.used || t.ns < best.ns) best = t;
  }
  return best;
}

constexpr MetTile met_tile(Op op, Problem const& p, Device const& d, bool channels_last) {
  if ((p.groups == 1 && p.C > 1) || p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0 || p.R == 0 || p.S == 0)
    return {};
  int64_t const P = p.P(), Q = p.Q(), filters = op == Op::dgrad ? p.K_per_group() : p.C_per_group();
  int const neighbours = met_neighbours(p, channels_last);
  if (neighbours == 0 || neighbours < met_neighbours(p, !channels_last)) return {};
  if (P <= 0 || Q <= 0 || filters > (p.C_per_group() == 1 ? kMostFiltersAChannel : kMetFilters)) return {};
  // Of 32 bits: coordinates, and what is divided by multiplication; steps in an image and in a filter.
  constexpr int64_t far = 1024, most = int64_t(1) << 20;
  if (max64(max64(p.stride_h, p.stride_w), max64(p.dilation_h, p.dilation_w)) > far) return {};
  if (max64(p.R, p.S) > most) return {};
  int64_t const height = p.H + p.pad_top + p.pad_bottom + p.R * p.dilation_h + kMetRows * p.stride_h;
  int64_t const width = p.W + p.pad_left + p.pad_right + p.S * p.dilation_w;
  if (max64(height, width) > most) return {};
  auto reach = [](int64_t rows, int64_t h, int64_t columns, int64_t w) {
    return double(rows) * double(h < 0 ? -h : h) + double(columns) * double(w < 0 ? -w : w);
  };
  constexpr double words = double(1 << 30);
  if (reach(height, p.x.h, width, p.x.w) >= words || reach(height, p.y.h, width, p.y.w) >= words) return {};
  if (reach(p.R, p.w.h, p.S, p.w.w) + reach(p.C_per_group() - 1, p.w.c, p.K_per_group() - 1, p.w.n) >= words) return {};
  if (reach(p.C_per_group() - 1, p.x.c, p.K_per_group() - 1, p.y.c) >= words) return {};
  double const elements = double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(P) * double(Q));
  double const memory_ns = elements * size_of(p.dtype) / 3600 * 132 / d.sm_count;
  double const slower = (p.dtype == DType::f64 ? 1.5 : 1.0) * (neighbours == 1 ? 2.0 : 1.0);
  if (op != Op::wgrad) return met_outputs(op, p, d, channels_last, slower, memory_ns);
  if (double(p.N + kMetSumChunk) * double(max64(max64(p.x.n, p.y.n), P * Q)) >= words) return {};
  if (double(p.K) * double(p.C_per_group() * p.R * p.S) * kMetSumThreads >= words) return {};
  return met_sums(p, d, channels_last, slower, memory_ns);
}

constexpr bool met_supports(Row const& row, Problem const& p) {
  return met_tile(row.op, p, h200_sxm, is_nhwc(row.variant)).used;
}

constexpr Estimate met_estimate(Row const& row, Problem const& p, Device const& d) {
  return {met_tile(row.op, p, d, is_nhwc(row.variant)).ns, 1};
}

}  // namespace conv2d_ext
