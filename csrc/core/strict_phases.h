// tma_strict_phases.cuh: dgrad with a stride to few channels in strict float32, as one convolution of y whose filters
// are the pixels of all phases. What its row takes and costs, and what the launcher shares with the planner.
#pragma once

#include <cstdint>

#include "tma_strict.h"

namespace conv2d_ext {

constexpr bool is_strict_phases(Row const& row) {
  return row.family == Family::tma_strict && row.variant == Variant::phases;
}

inline constexpr int kStrictPhasesTile = 64;  // filters of a tile of the product

// The row that runs it.
inline constexpr Row kStrictPhasesProduct{Family::tma_strict, Op::fprop,   DType::f32,      128,
                                          kStrictPhasesTile,  kStrictLine, Variant::im2col, ""};

// With h + pad_top = stride * u + i and r = stride * a + i, x's pixel (u, i) is the sum over a of y[u - a] * w[r]:
// fprop of y, backwards along a, whose filters are (i, j, c). u_h, u_w: the first of an axis.
struct StrictPhases {
  Problem product;
  int64_t u_h = 0, u_w = 0;
};

constexpr StrictPhases strict_phases(Problem const& p) {
  StrictPhases t;
  Problem& q = t.product;
  struct Axis {
    int64_t first, taps, before, after;
  };
  auto axis = [](int64_t pixels, int64_t outputs, int64_t taps, int64_t stride, int64_t pad) {
    int64_t const first = pad / stride, all = ceil_div(taps, stride), last = (pixels - 1 + pad) / stride;
    return Axis{first, all, all - 1 - first, last + 1 - outputs};
  };
  Axis const h = axis(p.H, p.P(), p.R, p.stride_h, p.pad_top), w = axis(p.W, p.Q(), p.S, p.stride_w, p.pad_left);
  t.u_h = h.first, t.u_w = w.first;
  q.N = p.N, q.C = p.K, q.H = p.P(), q.W = p.Q();
  q.K = ceil_div(p.C * p.stride_h * p.stride_w, 4) * 4, q.R = h.taps, q.S = w.taps;
  q.pad_top = h.before, q.pad_bottom = h.after, q.pad_left = w.before, q.pad_right = w.after;
  q.x = p.y, q.x_align = p.y_align;
  q.y = channels_last_strides(q.K, q.P(), q.Q()), q.w = channels_last_strides(q.C, q.R, q.S);
  return t;
}

// y as channels_last.
constexpr bool strict_phases_supports(Problem const& p) {
  if (p.dtype != DType::f32 || p.allow_tf32 || p.groups != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.N < 1 || p.C < 2 || p.K % 4 != 0 || p.H < 1 || p.W < 1 || p.P() < 1 || p.Q() < 1) return false;
  // Filters that step by their own size and more are patches. More padding than taps has outputs that meet no input.
  if (p.stride_h * p.stride_w == 1 || (p.R <= p.stride_h && p.S <= p.stride_w)) return false;
  if (max64(p.pad_top, p.pad_bottom) >= p.R || max64(p.pad_left, p.pad_right) >= p.S) return false;
  if (max64(p.stride_h, p.stride_w) > kStrictPhasesTile || p.C * p.stride_h * p.stride_w > kStrictPhasesTile)
    return false;
  if (max64(max64(p.H, p.W), max64(p.R, p.S)) > 1 << 24) return false;
  Problem const q = strict_phases(p).product;
  return double(q.N) * double(q.P()) * double(q.Q()) * double(q.K) * 4 <= double(int64_t(1) << 29) &&
         strict_supports(kStrictPhasesProduct, q);
}

// Of the workspace: the phases' filters, the product's result, and what the product's row takes.
struct StrictPhasesPlaces {
  int64_t filters = 0, out = 0, own = 0, bytes = 0;
};
constexpr StrictPhasesPlaces strict_phases_places(Problem const& p, int split_k) {
  Problem const q = strict_phases(p).product;
  StrictPhasesPlaces at;
  auto behind = [](int64_t begin, int64_t elements) { return ceil_div(begin + elements * 4, 256) * 256; };
  at.out = behind(at.filters, q.K * q.w.n);
  at.own = behind(at.out, q.N * q.y.n);
  at.bytes = at.own + strict_workspace_bytes(kStrictPhasesProduct, Op::fprop, q, split_k);
  return at;
}

constexpr Estimate strict_phases_estimate(Problem const& p) {
  Problem const q = strict_phases(p).product;
  Estimate e = strict_estimate(kStrictPhasesProduct, Op::fprop, q);
  double const spread = double(q.N) * double(q.y.n) + double(p.N) * double(p.C) * double(p.H) * double(p.W);
  e.ns += 7000 + spread * 4 / 1750;
  return e;
}

}  // namespace conv2d_ext
