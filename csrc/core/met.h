// Depthwise layers of few taps that meet (cuda/depthwise_met.cuh): which, their tile, shared by the planner and the
// launcher, and what they cost.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

inline constexpr int kMetThreads = 128;     // of a block
inline constexpr int kMetSumThreads = 256;  // of a block of wgrad
inline constexpr int kMetSumChunk = 8;      // products of wgrad that a thread asks for together
inline constexpr int kMetRows = 4;          // of outputs below each other, of a thread, or one

constexpr bool is_met(Row const& row) { return row.family == Family::depthwise && row.tile_m == 0 && row.tile_n == 1; }

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
  int parts_log2 = 0;  // wgrad: threads of a sum
  int64_t items = 1, blocks = 1;
  double ns = 0;
};

constexpr MetTile met_tile(Op op, Problem const& p, Device const& d, bool channels_last, int forced = 0) {
  MetTile t;
  bool const backward = op == Op::dgrad;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0 || p.R == 0 || p.S == 0) return t;
  int64_t const P = p.P(), Q = p.Q();
  if (P <= 0 || Q <= 0 || (backward && p.K_per_group() > kMostFiltersAChannel)) return t;
  // Of 32 bits: coordinates, and what is divided by multiplication; steps in an image and in a filter.
  constexpr int64_t far = 1024, most = int64_t(1) << 20;
  if (max64(max64(p.stride_h, p.stride_w), max64(p.dilation_h, p.dilation_w)) > far) return t;
  int64_t const height = p.H + p.pad_top + p.pad_bottom + p.R * p.dilation_h + kMetRows * p.stride_h;
  int64_t const width = p.W + p.pad_left + p.pad_right + p.S * p.dilation_w;
  if (max64(height, width) > most || p.R > most || p.S > most) return t;
  auto reach = [](int64_t rows, int64_t h, int64_t columns, int64_t w) {
    return double(rows) * double(h < 0 ? -h : h) + double(columns) * double(w < 0 ? -w : w);
  };
  if (reach(height, p.x.h, width, p.x.w) >= double(1 << 30) || reach(height, p.y.h, width, p.y.w) >= double(1 << 30) ||
      reach(p.R, p.w.h, p.S, p.w.w) >= double(1 << 30))
    return t;
  int const size = size_of(p.dtype);
  double const bytes =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(P) * double(Q)) * size;
  if (op == Op::wgrad) {
    double const units = double(p.K) * double(p.R) * double(p.S);
    if (double(p.N) * double(max64(max64(p.x.n, p.y.n), 1)) >= double(1 << 30) || units * 256 >= double(1 << 30))
      return t;
    // Products of a sum, at most.
    int64_t const products = p.N * min64(P, ceil_div(p.H, p.stride_h)) * min64(Q, ceil_div(p.W, p.stride_w));
    // Threads that the SMs have at once, if each has some products.
    double const room = 1280.0 * d.sm_count;
    while (t.parts_log2 < 8 && (products >> t.parts_log2) > kMetSumChunk * max64(forced, 1) &&
           units * double(2 << t.parts_log2) <= room)
      ++t.parts_log2;
    t.items = int64_t(units), t.blocks = ceil_div(t.items << t.parts_log2, kMetSumThreads), t.used = true;
    // As measured: waits for a chunk, sums in shared memory, instructions of all warps.
    double const chunks = double(ceil_div(ceil_div(products, int64_t(1) << t.parts_log2), kMetSumChunk));
    double const warps = double(t.blocks) * (kMetSumThreads / 32) / d.sm_count;
    t.rows = forced, t.ns = 6000 + 450 * (chunks - 1) + 70 * t.parts_log2 + warps * (60 + 38 * chunks) + bytes / 3600;
    return t;
  }
  t.h = met_axis(op, p.R, p.stride_h, p.dilation_h, backward ? P : p.H);
  t.w = met_axis(op, p.S, p.stride_w, p.dilation_w, backward ? Q : p.W);
  int64_t const H = backward ? p.H : P, W = backward ? p.W : Q, classes = backward ? p.stride_h : 1;
  double const columns = double(p.N) * double(backward ? p.C : p.K) * double(W);
  double const filters = backward ? double(p.K_per_group()) : 1;
  double const filter_lines = p.R * p.S * size < 128 ? double(p.R * p.S * size) / 128 : 1.0;
  // Taps of a row's lattice, and those that `rows` outputs meet.
  int64_t const all = backward ? ceil_div(p.R, t.h.step) : p.R, moves = backward ? 1 : p.stride_h;
  for (int rows = 1; rows <= kMetRows; rows += kMetRows - 1) {
    MetTile c = t;
    c.rows = rows, c.groups = ceil_div(ceil_div(H, classes), rows) * classes;
    if (columns * double(c.groups) >= double(1 << 30)) continue;
    c.items = int64_t(columns) * c.groups, c.blocks = ceil_div(c.items, kMetThreads), c.used = true;
    int64_t const met = min64(all, t.h.most + ceil_div((rows - 1) * moves, t.h.next)) * t.w.most;
    double const chunks = double(ceil_div(met, met_chunk(size, rows))) * filters,
                 warps = double(c.items) / 32 / d.sm_count;
    // As measured: waits for a chunk, longer where neighbours' filters lie apart; instructions of all warps.
    double const apart = channels_last ? filter_lines : c.groups * W < 32 ? 1 / double(c.groups * W) : 1.0 / 32;
    double const wait = rows == 1 ? 290 : 390, far = channels_last && rows > 1 ? 200 : rows == 1 ? 600 : 400;
    double const chunk = channels_last ? (rows == 1 ? 12 + 45 * apart : 30 + 22 * apart)
                                       : (rows == 1   ? 41
                                          : size == 2 ? 63
                                                      : 49);
    c.ns = (rows == 1 ? 5900 : 6050) + wait * (chunks - 1) + far * chunks * apart +
           warps * (34 + chunk * chunks) * (size == 8 ? 1.5 : 1.0) + bytes / 3600;
    if (forced == 0 ? !t.used || c.ns < t.ns : rows == forced) t = c;
  }
  return t;
}

constexpr bool met_supports(Row const& row, Problem const& p) {
  return p.C_per_group() == 1 && met_tile(row.op, p, h200_sxm, is_nhwc(row.variant)).used;
}

constexpr Estimate met_estimate(Row const& row, Problem const& p, Device const& d) {
  return {met_tile(row.op, p, d, is_nhwc(row.variant)).ns, 1};
}

}  // namespace conv2d_ext
