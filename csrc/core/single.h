// Depthwise layers of a single tap without padding (cuda/depthwise_single.cuh): which, their tile, shared by the
// planner and the launcher, and what they cost.
#pragma once

#include "row.h"

namespace conv2d_ext {

inline constexpr int kSingleTogether = 4;  // of a thread's loads, asked for at once

struct SingleTile {
  bool used = false, planes = false;
  int vector = 1;  // of a thread: channels, or columns of y in NCHW
  int step = 1;    // NCHW: columns of x for each of y, as one vector
  int threads = 256;
  int lanes = 1, groups = 256;              // a block's threads along the channels, and of its pixels
  int64_t slices = 1;                       // blocks along the channels
  int64_t N = 1, rows = 1, columns = 1;     // columns: vectors of a row; rows of dense tensors are one
  int64_t units = 1, each = 1, shares = 1;  // vectors of a lane's channels; of a block; blocks of a slice
  double ns = 0;
};

constexpr SingleTile single_tile(Op op, Problem const& p) {
  SingleTile t;
  constexpr int64_t sms = 132;
  int const size = size_of(p.dtype);
  if (p.R != 1 || p.S != 1 || p.C_per_group() != 1 || p.K != p.C || p.C <= 0 || p.dtype == DType::f64) return t;
  if (p.pad_top != 0 || p.pad_left != 0 || p.pad_bottom != 0 || p.pad_right != 0) return t;
  if (p.N <= 0 || p.H <= 0 || p.W <= 0 || max64(p.stride_h, p.stride_w) > 64) return t;
  bool const sums = op == Op::wgrad, spread = op == Op::dgrad, planes = p.x.c != 1 || p.y.c != 1 || p.C == 1;
  t.planes = planes;
  int64_t const P = p.P(), Q = p.Q();
  bool const strided = p.stride_h > 1 || p.stride_w > 1;
  // As measured: fprop and dgrad without a stride of small layers, and in NCHW, go to near.h and lanes.h.
  bool const small = double(p.N) * double(p.C) * double(p.H) * double(p.W) < 1.2e7;
  if (!sums && !strided && (planes || small)) return t;
  if (planes && ((p.W > 1 && p.x.w != 1) || (Q > 1 && p.y.w != 1))) return t;
  t.vector = 16 / size;
  t.N = p.N, t.rows = P, t.columns = Q;
  if (planes) {
    // Planes without a stride, and without gaps between their rows, are one row.
    if (!strided && (P == 1 || (p.x.h == Q && p.y.h == Q))) t.rows = 1, t.columns = P * Q;
    bool const together = p.stride_w == 1 || (p.stride_w == 2 && p.W == 2 * Q);
    if (p.stride_w == 2 && together) t.step = 2, t.vector /= 2;
    auto fits = [&](Strides const& s, int align, int v) {
      return s.n % v == 0 && s.c % v == 0 && (t.rows == 1 || s.h % v == 0) && align >= v * size;
    };
    while (t.vector > 1 && (!together || t.columns % t.vector != 0 || !fits(p.x, p.x_align, t.vector * t.step) ||
                            !fits(p.y, p.y_align, t.vector)))
      t.vector /= 2;
    if (t.step == 2 && !fits(p.x, p.x_align, 2)) t.step = 1;  // with single elements
    t.columns /= t.vector;
  } else {
    auto dense = [&](Strides const& s) { return (P == 1 || s.h == Q * s.w) && (p.N == 1 || s.n == P * Q * s.w); };
    if (!strided && dense(p.x) && dense(p.y)) t.N = 1, t.rows = 1, t.columns = p.N * P * Q;
    while (t.vector > 1 && !(channel_vectors(p.x, p.x_align, p.C, t.vector, p.dtype) &&
                             channel_vectors(p.y, p.y_align, p.C, t.vector, p.dtype)))
      t.vector /= 2;
  }
  int64_t const vectors = planes ? 1 : p.C / t.vector;
  double const all = double(t.N) * double(t.rows) * double(t.columns) * (planes ? double(p.C) : double(vectors));
  if (all >= 1e9) return t;
  if (!sums && all < 512.0 * kSingleTogether * sms) t.threads = 64;
  if (sums && planes) {
    t.slices = p.C, t.groups = t.threads = 256;
  } else if (planes) {
    t.groups = t.threads;
  } else {
    // Few idle threads.
    int64_t const least = ceil_div(vectors, sums ? 16 : t.threads);
    t.groups = 0;
    for (int64_t slices = least; slices <= min64(vectors, least + 3); ++slices) {
      int64_t const lanes = ceil_div(vectors, slices), groups = t.threads / lanes;
      if (lanes * groups <= t.lanes * t.groups) continue;
      t.slices = slices, t.lanes = int(lanes), t.groups = int(groups);
    }
  }
  t.units = t.N * t.rows * t.columns * (planes && !sums ? p.C : 1);
  int64_t const turn = int64_t(t.groups) * kSingleTogether;
  if (!sums) {
    t.each = turn;
  } else {
    int64_t const turns = ceil_div(t.units, turn);
    t.shares = turns <= 4 ? 1 : min64(turns, max64(1, 2 * sms / t.slices));
    t.each = ceil_div(turns, t.shares) * turn;
  }
  t.shares = ceil_div(t.units, t.each);
  if (double(t.shares) * double(t.slices) >= 2e9) return t;
  t.used = true;
  // What is read of x with a stride: rows and pixels, but in NCHW whole rows.
  double const x = double(p.N) * double(p.C) *
                   (spread ? double(p.H) * double(p.W) : double(P) * double(planes ? p.W : Q)),
               y = double(p.N) * double(p.C) * double(P) * double(Q);
  // As measured: planes' units take a warp's instructions, more of few bytes.
  double const memory_ns = (x + y) * size / (sums ? 3400 : 4000),
               units = double(t.units) * (planes && sums ? double(p.C) : 1.0);
  double const issue_ns = planes ? units / (32 * sms) * (t.vector * t.step * size > 4 ? 10 : 25) : 0;
  double const most_ns = memory_ns > issue_ns ? memory_ns : issue_ns;
  t.ns = (!sums    ? 6500
          : planes ? 6700
                   : 8600) +
         (t.shares > 1 && sums ? 1700 : 0) +
         (sums && strided ? 1.15 : 1.0) * (most_ns + (memory_ns + issue_ns - most_ns) / 4);
  return t;
}

// Is it one over NCHW, or one in channels_last?
template <bool planes>
constexpr bool takes_single(Op op, Problem const& p) {
  SingleTile const t = single_tile(op, p);
  return t.used && t.planes == planes;
}
constexpr bool single_supports(Row const& row, Problem const& p) {
  return is_nhwc(row.variant) ? takes_single<false>(row.op, p) : takes_single<true>(row.op, p);
}

constexpr Estimate single_estimate(Op op, Problem const& p) {
  SingleTile const t = single_tile(op, p);
  return {t.ns, op == Op::wgrad ? int(t.shares) : 1};
}

}  // namespace conv2d_ext
