// Depthwise layers of few outputs (cuda/depthwise_direct.cuh): which, shared by the planner and the launchers.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

inline constexpr int kDirectSize = 5;  // of filters, at most

// As measured: threads up to which this is faster than other rows are, and wgrad's pixels.
inline constexpr int64_t kDirectMost = int64_t(1) << 17, kDirectPixels = 256;

// A thread has so many neighbouring columns of outputs.
inline constexpr int kDirectColumns = 4, kDirectThreads = 128;

struct DirectTile {
  bool used = false;
  int64_t strips = 0, threads = 0;
  double ns = 0;
};

constexpr DirectTile direct_tile(Op op, Problem const& p, int R, int stride) {
  DirectTile t;
  bool const backward = op == Op::dgrad;
  if (R > kDirectSize || p.R != R || p.S != R || p.K != p.C || p.dtype == DType::f64) return t;
  int64_t const H = backward ? p.H : p.P(), W = backward ? p.W : p.Q();
  if (op == Op::wgrad) {
    double const pixels = double(p.N) * double(H) * double(W);
    t.used = pixels <= kDirectPixels && pixels * double(p.C) < double(int64_t(1) << 18), t.ns = 6800;
    return t;
  }
  t.strips = ceil_div(W + (backward && stride == 2 ? p.pad_left % 2 : 0), kDirectColumns);
  if (double(p.N) * double(p.C) * double(H) * double(t.strips) > double(kDirectMost)) return t;
  t.used = true, t.threads = p.N * p.C * H * t.strips;
  t.ns = 6000 + 0.014 * double(t.threads) + (size_of(p.dtype) == 2 && p.C > 1 && p.x.c == 1 && p.y.c == 1 ? 800 : 0);
  return t;
}

}  // namespace conv2d_ext
