// Depthwise 3x3 over NCHW in 16 bits whose rows are no whole words (cuda/stream_runs.cuh): which, their launch, shared
// by the planner and the launcher, and what they cost.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

inline constexpr int kRunsThreads = 256, kRunsWord = 8;  // of a block, at most; elements of a word

struct RunsTile {
  bool used = false;
  int threads = kRunsThreads;
  double ns = 0;
};

// fprop and dgrad of more than 64 columns, of which the kernels of whole units leave many over (as measured: 57 columns
// lose a tenth, 113 a twentieth, 97 take as long). Planes without gaps, stride 1, 'same' padding; a word holds the end
// of one row at most, and two those that it meets in a row above or below.
constexpr bool runs_supports(Problem const& p) {
  if (size_of(p.dtype) != 2 || p.R != 3 || p.S != 3 || p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 ||
      p.dilation_w != 1 || p.pad_top != 1 || p.pad_bottom != 1 || p.pad_left != 1 || p.pad_right != 1)
    return false;
  if (p.C_per_group() != 1 || p.K != p.C || p.W <= 64 || p.W % 4 == 0 || p.W % 64 >= 48) return false;
  auto dense = [&](Strides const& s, int align) constexpr {
    return s.w == 1 && (s.h == p.W || p.H == 1) && (s.c == p.H * p.W || p.C == 1) &&
           (s.n == p.C * p.H * p.W || p.N == 1) && align >= 16;
  };
  return dense(p.x, p.x_align) && dense(p.y, p.y_align) && double(p.H) * double(p.W) * double(p.W) < 4e9 &&
         double(p.N) * double(p.C) < 2e9;
}

constexpr RunsTile runs_tile(Op op, Problem const& p, Device const& d) {
  RunsTile t;
  if (op == Op::wgrad || !runs_supports(p)) return t;
  int64_t const words = ceil_div(p.H * p.W + kRunsWord - 1, kRunsWord), turns = ceil_div(words, kRunsThreads / 2);
  t.used = true, t.threads = int(ceil_div(ceil_div(words, turns), 32) * 32);
  t.ns = 8400 + 1.45e-3 * double(p.N) * double(p.C) * double(p.H) * double(p.W) * 132 / d.sm_count;
  return t;
}

// dgrad of 3x3 with stride 2 and a padding of 1, of odd rows; narrower ones lose.
struct SpreadRuns {
  bool used = false;
  int rows = 1, threads = kRunsThreads, shared_bytes = 0;  // rows: of y, of a block
  int64_t chunks = 1;
  double ns = 0;
};

constexpr SpreadRuns spread_runs_tile(Problem const& p, Device const& d) {
  SpreadRuns t;
  if (size_of(p.dtype) != 2 || p.R != 3 || p.S != 3 || p.stride_h != 2 || p.stride_w != 2 || p.dilation_h != 1 ||
      p.dilation_w != 1 || p.pad_top != 1 || p.pad_left != 1)
    return t;
  int64_t const P = p.P(), Q = p.Q();
  if (p.C_per_group() != 1 || p.K != p.C || P != ceil_div(p.H, 2) || Q != ceil_div(p.W, 2) || p.W % 2 == 0 || p.W < 49)
    return t;
  auto dense = [&](Strides const& s, int64_t H, int64_t W) constexpr {
    return (s.w == 1 || W == 1) && (s.h == W || H == 1) && (s.c == H * W || p.C == 1) &&
           (s.n == p.C * H * W || p.N == 1);
  };
  if (!dense(p.x, p.H, p.W) || !dense(p.y, P, Q) || p.x_align < 16) return t;
  constexpr int64_t most = 16 * 1024 / 2 - kRunsWord;  // elements of shared memory
  if (2 * p.W > most) return t;
  t.chunks = ceil_div(P, min64(P, most / (2 * p.W))), t.rows = int(ceil_div(P, t.chunks));
  t.chunks = ceil_div(P, t.rows);
  t.shared_bytes = int((2 * t.rows * p.W + kRunsWord) * 2 + 15) / 16 * 16;
  // Quotients are of numbers whose product with the divisor is below 2^32.
  double const planes = double(p.N) * double(p.C);
  if (planes * double(t.chunks * t.chunks) >= 4e9 || planes * double(p.C) >= 4e9 || double(p.H) * double(p.W) >= 1e9 ||
      double(t.rows * Q) * double(Q) >= 4e9 || planes * double(t.chunks) >= 2e9)
    return t;
  int64_t const turns = ceil_div(t.rows * Q, kRunsThreads);
  t.threads = int(ceil_div(ceil_div(t.rows * Q, turns), 32) * 32);
  t.used = true;
  t.ns = 7000 + 1.0e-3 * planes * double(p.H) * double(p.W) * 132 / d.sm_count;
  return t;
}

}  // namespace conv2d_ext
