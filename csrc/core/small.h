// Depthwise layers of few outputs in channels_last, 5x5 and 7x7 with stride 1 (cuda/depthwise_small.cuh): which, shared
// by the planner and the launcher.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

// A thread has so many neighbouring columns of outputs, of one or two rows.
inline constexpr int kSmallColumns = 4, kSmallThreads = 128;

struct SmallTile {
  bool used = false;
  int rows = 1;
  int64_t groups = 0, strips = 0, chunks = 0, units = 0;  // of 32 channels; of a row; of rows; of a group
  double ns = 0;
};

constexpr SmallTile small_tile(Op op, Problem const& p, int R, int stride) {
  SmallTile t;
  if (op == Op::wgrad || R < 5 || stride != 1 || p.K != p.C || p.dtype == DType::f64) return t;
  int64_t const H = op == Op::dgrad ? p.H : p.P(), W = op == Op::dgrad ? p.W : p.Q();
  double const outputs = double(p.N) * double(p.C) * double(H) * double(W);
  // As measured: up to there it is faster than other rows are.
  if (outputs > (R == 5 ? 640e3 : 400e3)) return t;
  t.used = true, t.rows = outputs > 250e3 ? 2 : 1;
  t.groups = ceil_div(p.C, 32), t.strips = ceil_div(W, kSmallColumns), t.chunks = ceil_div(H, t.rows);
  t.units = p.N * t.strips * t.chunks;
  t.ns = R == 5 ? 5500 + 0.0070 * outputs : 6500 + 0.0110 * outputs;
  return t;
}

}  // namespace conv2d_ext
