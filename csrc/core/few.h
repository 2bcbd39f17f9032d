// What cuda/depthwise_few.cuh takes and costs: shared by the planner and the launcher.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

inline constexpr int kFewRows = 4;                       // of outputs, or of y, of a thread
inline constexpr int kFewThreads = 128;                  // of a block
inline constexpr int kFewSplits = 512;                   // at most
inline constexpr int64_t kFewTaps = 49;                  // of filters that meet, at most
inline constexpr double kFewBytesNs = 3600;              // as measured
inline constexpr int64_t kFewExtent = int64_t(1) << 16;  // strides and dilations, at most

// The instance: a filter of taps x taps (wgrad: so many of a thread's), with `stride` and no dilation; stride 0: any
// stride and dilation. taps 0: any filter (wgrad: a thread has a row of eight taps).
struct FewTile {
  bool used = false;
  int taps = 0, stride = 0;
  bool spread = false;                                 // dgrad with a stride
  bool tall = false;                                   // wgrad, taps 0: a column of eight taps in place of a row
  int64_t groups = 1;                                  // of kFewRows rows
  int planes = 1;                                      // of a block
  int64_t tiles = 1;                                   // blocks of a plane
  int64_t blocks = 1;                                  // wgrad: without splits
  int64_t tap_rows = 1, tap_columns = 1;               // wgrad: blocks for different taps
  int64_t items = 1;                                   // wgrad: groups of a channel's rows
  int columns = 1, strips = 1, threads = kFewThreads;  // wgrad: of a block; of an image
  int split_k = 1;
  double ns = 0;
};

constexpr FewTile few_tile(Op op, Problem const& p) {
  FewTile t;
  bool const backward = op == Op::dgrad, sums = op == Op::wgrad, wide = p.dtype == DType::f64;
  int const size = size_of(p.dtype);
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0 || p.R == 0 || p.S == 0) return t;
  int64_t const P = p.P(), Q = p.Q();
  if (P <= 0 || Q <= 0 || (backward && p.K_per_group() > kMostFiltersAChannel)) return t;
  bool const apart = p.stride_h >= p.R && p.stride_w >= p.S;  // filters that don't meet
  if (p.R * p.S > kFewTaps && !apart) return t;
  bool const unit = p.stride_h == 1 && p.stride_w == 1;
  bool const square = p.R == p.S, dense = (p.R == 1 || p.dilation_h == 1) && (p.S == 1 || p.dilation_w == 1);
  t.spread = backward && !unit;
  if (t.spread && !dense) return t;
  double const met = double(ceil_div(p.R, p.stride_h)) * double(ceil_div(p.S, p.stride_w));  // taps of an output
  if (!t.spread) {
    bool const two = p.stride_h == 2 && p.stride_w == 2;
    if (square && dense && (p.R == 3 || (p.R == 5 && (wide || sums || (two && !backward)))) && (unit || two))
      t.taps = int(p.R), t.stride = unit ? 1 : 2;
    else if (square && p.R <= 3)
      t.taps = int(p.R);
    else if (sums && p.R % 3 == 0 && p.S % 3 == 0)
      t.taps = 3;
    else if (sums && p.R % 2 == 0 && p.S % 2 == 0 && p.S <= 4)
      t.taps = 2;
  }
  t.tall = sums && t.taps == 0 && p.S == 1 && p.R > 1;
  // Of 32 bits: strides of rows, coordinates, and what is divided by multiplication.
  int64_t const H = backward ? p.H : P, W = backward ? p.W : Q;
  if (max64(max64(p.stride_h, p.stride_w), max64(p.dilation_h, p.dilation_w)) > kFewExtent) return t;
  if (p.R > kFewExtent || p.S > kFewExtent || double(p.R) * double(p.S) > 65536) return t;
  double const far =
      double(max64(p.H, P)) + double(kFewRows + 1) * double(p.stride_h) + double(p.R) * double(p.dilation_h);
  if (far * double(max64(max64(p.x.h, p.y.h), 1)) >= 1073741824.0) return t;
  constexpr double words = 4294967296.0;
  t.groups = ceil_div(H, kFewRows);
  double const items = double(t.groups) * double(W) + kFewThreads;
  if (items * double(W) >= words || items * items >= words * words) return t;
  if (t.spread && (double(p.H + p.pad_top + p.stride_h) * double(p.stride_h) >= words ||
                   double(p.W + p.pad_left + p.stride_w) * double(p.stride_w) >= words))
    return t;
  double const bytes =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(P) * double(Q)) * size;
  double const memory_ns = bytes / kFewBytesNs;
  // Instructions and accesses of L1 of a warp, for kFewRows rows of outputs.
  int64_t const rows = t.taps == 0 ? p.R : t.taps;
  int64_t const columns = t.taps == 0 ? (!sums || t.tall ? p.S : 8) : t.taps;
  int64_t const block_rows = sums && t.taps == 0 ? (t.tall ? 8 : 1) : rows;
  double const loads =
      double((t.stride > 0 ? (kFewRows - 1) * t.stride + rows : kFewRows * block_rows) * columns) + kFewRows;
  double const fmas = double(kFewRows * block_rows * columns) * (wide ? 2 : 1);
  double const reach = 32.0 * double(t.spread ? 1 : p.stride_w) * size / 128 + 0.4 * 32 / double(W < 32 ? W : 32);
  double const accesses = loads * (reach < 1 ? 1 : reach > 32 ? 32 : reach);
  if (!sums) {
    double const planes = double(p.N) * double(backward ? p.C : p.K);
    t.planes = int(max64(1, kFewThreads / (t.groups * W)));
    t.tiles = t.planes > 1 ? 1 : ceil_div(t.groups * W, kFewThreads);
    t.used = planes < double(1 << 30) && planes * double(t.tiles) < double(1 << 30);
    double const warps = planes / t.planes * double(t.tiles) * (kFewThreads / 32);
    double const filters = backward ? double(p.K_per_group()) : 1;
    double const instructions =
        t.spread ? 110 + 50 * met * filters : 130 + filters * (3.6 * loads + fmas + 3.0 * double(rows * columns));
    double const issue = instructions / 2.6, l1 = t.spread ? 16 * met * filters : accesses * filters;
    // As measured: how much longer than that, and the loops' waits.
    double const slower = t.spread                       ? 1.15
                          : t.taps == 0                  ? 0.95
                          : t.taps == 5                  ? 1.4
                          : t.stride == 0 && t.taps == 3 ? (wide ? 2.0 : 1.4)
                          : t.taps == 2 && wide          ? 1.25
                                                         : 0.9;
    double const work_ns = warps * (issue > l1 ? issue : l1) / (1.755 * 132) * slower;
    double const waits = t.spread ? met - 1 : t.taps == 0 ? double(p.R * ceil_div(p.S, 4)) - 1 : 0;
    t.ns = 6300 + (waits < 16 ? 620 : 480) * waits * filters + overlapped(memory_ns, work_ns);
    return t;
  }
  t.tap_rows = ceil_div(p.R, block_rows), t.tap_columns = ceil_div(p.S, columns);
  if (double(p.N) * double(t.groups) * double(t.groups) >= words || double(p.N) * double(t.groups) >= double(1 << 30))
    return t;
  t.items = p.N * t.groups;
  // Threads stay in their columns; as many as whole warps have.
  double used = 0;
  for (int64_t strips = ceil_div(W, kFewThreads); strips < ceil_div(W, kFewThreads) + 3; ++strips)
    for (int threads = kFewThreads; threads >= 64; threads -= 32) {
      int64_t const columns = ceil_div(W, strips);
      if (columns > threads) continue;
      double const share = double(W) * double(threads / columns) / double(strips) / threads;
      if (share <= used * 1.1) continue;
      used = share, t.columns = int(columns), t.strips = int(ceil_div(W, columns)), t.threads = threads;
    }
  double const blocks = double(p.K) * double(t.tap_rows) * double(t.tap_columns);
  if (blocks * kFewSplits >= double(1 << 30)) return t;
  t.blocks = int64_t(blocks), t.used = true;
  // Passes of a block's threads over its share; blocks that SMs have at once; a second pass over what they add up.
  double const sum_bytes = double(p.K) * double(p.R) * double(p.S) * (wide ? 8 : 4);
  int64_t const together = t.taps == 5 ? (wide ? 3 : 4) : wide ? 4 : t.stride == 0 && t.taps != 2 ? 6 : 8;
  int64_t const slots = 132 * together, pass_rows = t.threads / t.columns;
  double const issue = (60 + 4 * loads + fmas) / 2.6, pass = (issue > accesses ? issue : accesses) * (t.threads / 32);
  double const end = double(block_rows * columns) * 14 / 2.6 * (t.threads / 32) + 400;
  for (int64_t parts = 1; parts * t.strips <= kFewSplits && parts <= t.items; parts += 1 + parts / 8) {
    int64_t const split = parts * t.strips;
    if (split > 1 && sum_bytes * double(split) > double(kMaxWorkspaceBytes)) break;
    int64_t const all = t.blocks * split, full = ceil_div(all, slots);
    double const passes = double(ceil_div(ceil_div(t.items, parts), pass_rows));
    // Of an SM: the blocks that it has at once, each with its own waits.
    double const at_once = all < slots ? double(ceil_div(all, 132)) : double(together);
    double const work = at_once * (passes * pass + end), wait = passes * 2200 + 1500;
    double ns = double(full) * (work > wait ? work : wait) / 1.755;
    ns = 5500 + overlapped(memory_ns, ns * (wide        ? (t.stride == 0 && t.taps == 3 ? 1.0 : 0.7)
                                            : size == 2 ? (t.taps == 5 ? 1.15 : 1.0)
                                                        : 0.8));
    if (split > 1) ns += 3000 + sum_bytes * double(split) * 2 / 2500;
    if (t.ns == 0 || ns < t.ns) t.ns = ns, t.split_k = int(split);
  }
  t.used = t.ns > 0;
  return t;
}

}  // namespace conv2d_ext
