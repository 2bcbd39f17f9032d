// Depthwise layers of few outputs in channels_last (cuda/depthwise_near.cuh): which, their tile, shared by the planner
// and the launcher, and what they cost.
#pragma once

#include "single.h"

namespace conv2d_ext {

inline constexpr int kNearThreads = 128;  // of a block: warps of 32 neighbouring words of channels, or single channels

constexpr bool is_near(Row const& row) {
  return row.family == Family::depthwise && row.tile_m == 0 && row.tile_n == 2 && row.variant == Variant::nhwc;
}

// The least side of a square of 1, 3, 5 or 7 taps that holds the filter.
constexpr int few_outputs_side(Problem const& p) { return int(max64(p.R, p.S)) / 2 * 2 + 1; }

struct NearTile {
  bool used = false;
  int vector = 1;                             // channels of a thread
  int width = 4;                              // outputs of a thread in a row, as far apart as taps are
  int64_t slices = 1, strips = 1, units = 1;  // blocks along the channels; of a row; of all rows
  double ns = 0;
};

constexpr NearTile near_tile(Op op, Problem const& p, Device const& d) {
  NearTile t;
  bool const backward = op == Op::dgrad, spread = backward && p.stride_w == 2;
  int const side = few_outputs_side(p), size = size_of(p.dtype);
  if (p.C_per_group() != 1 || p.C <= 0 || p.dtype == DType::f64 || op == Op::wgrad) return t;
  if (p.R <= 0 || p.S <= 0 || side > 7 || p.stride_h != p.stride_w || p.stride_w > 2) return t;
  if (side == 1 && p.stride_w == 2) return t;  // single.h
  if (p.stride_w == 2 ? p.dilation_h != 1 || p.dilation_w != 1 : max64(p.dilation_h, p.dilation_w) > 64) return t;
  if (p.pad_top < 0 || p.pad_left < 0 || p.pad_top > (p.R - 1) * p.dilation_h || p.pad_left > (p.S - 1) * p.dilation_w)
    return t;
  int64_t const P = p.P(), Q = p.Q();
  if (p.N <= 0 || p.K <= 0 || p.H <= 0 || p.W <= 0 || P <= 0 || Q <= 0) return t;
  // Beyond, the others are faster, or not measured.
  bool const plain = p.R == side && p.S == side && p.dilation_h == 1 && p.dilation_w == 1;
  double const elements = double(p.N) * double(max64(p.C * p.H * p.W, p.K * P * Q));
  int64_t const filters = p.K / p.C;
  bool const many = filters > 1;  // others take two to three times as long for dgrad
  if (many && (!plain || side == 1 || (filters & (filters - 1)) != 0 || filters > 32)) return t;
  if (!plain && side > 3 && p.stride_w == 2) return t;  // never chosen
  if (elements > (many ? (backward ? 1e9 : 1.5e7) : plain || p.stride_w == 2 ? 3e7 : 3e6)) return t;
  // A dimension of size one has no stride.
  if ((p.K > 1 && p.w.n != p.R * p.S) || (p.R > 1 && p.w.h != p.S) || (p.S > 1 && p.w.w != 1) || p.w_align < 16)
    return t;
  constexpr int64_t most = int64_t(1) << 19;
  if (max64(max64(p.x.h, p.x.w), max64(p.y.h, p.y.w)) > most || max64(max64(p.H, p.W), max64(P, Q)) > 1024) return t;
  auto words = [&](int vector) {
    return channel_vectors(p.x, p.x_align, p.C, many ? 1 : vector, p.dtype) &&
           channel_vectors(p.y, p.y_align, p.K, vector, p.dtype);
  };
  if (!words(many ? 4 / size : 1)) return t;
  if (words(4 / size)) t.vector = 4 / size;
  int64_t const out_H = backward ? p.H : P, out_W = (backward ? p.W : Q) + (spread ? p.pad_left % 2 : 0);
  t.slices = ceil_div(p.K, 32 * t.vector);
  auto strips = [&](int width) { return p.dilation_w * ceil_div(ceil_div(out_W, p.dilation_w), width); };
  auto units = [&](int width) { return p.N * out_H * strips(width); };
  if (t.vector * size < 4 || double(t.slices) * double(units(4)) < 8.0 * d.sm_count) t.width = 2;
  t.strips = strips(t.width), t.units = units(t.width);
  if (double(t.units) * double(max64(t.strips, out_H)) >= 4e9 ||
      double(t.units + 4) * double(t.slices * t.slices) >= 4e9)
    return t;
  t.used = true;
  // As measured: the instructions of a warp one after the other, those of all warps, and the memory's time.
  int const V = t.vector, taps = side * side, rows = spread ? (side + 1) / 2 : side;
  int const columns = spread ? (side - 1) / 2 + (t.width + 1) / 2 : int((t.width - 1) * p.stride_w) + side;
  double const warp_ns =
      (rows * columns * (3 + V) + taps * (1 + V) + taps * t.width * V / (spread ? 4.0 : 1.0) + 60) / 1.755;
  double const warps = double(t.slices) * double(ceil_div(t.units, 4)) * 4 / d.sm_count;
  double const bytes =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(P) * double(Q)) * size;
  t.ns = (spread ? 5725 : 5370 + 3.1 * warp_ns) + 0.392 * warps * warp_ns +
         (spread ? 0.159 : 0.12) * bytes / 1000 * 132 / d.sm_count;
  if (plain && side > 1 && elements <= 1e6) t.ns *= p.stride_w == 1 ? 0.89 : 0.94;  // kernels of their own
  if (many) t.ns *= 1.12;
  if (p.R != side || p.S != side) t.ns += 600;
  if (!plain && side > 3) t.ns *= elements > 3e6 ? 1.35 : 1.08;
  if (t.vector * size < 4) t.ns *= 1.15;
  return t;
}

constexpr bool near_supports(Row const& row, Problem const& p) {
  return single_supports(row, p) || near_tile(row.op, p, h200_sxm).used;
}

constexpr Estimate near_estimate(Row const& row, Problem const& p, Device const& d) {
  if (single_supports(row, p)) return single_estimate(row.op, p);
  return {near_tile(row.op, p, d).ns, 1};
}

}  // namespace conv2d_ext
