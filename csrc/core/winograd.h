// winograd.cuh: 3x3 filters of stride 1 in strict float32 by fewer products. What its rows take and cost, and what the
// launcher shares with the planner.
#pragma once

#include <cstdint>

#include "in_place.h"

namespace conv2d_ext {

constexpr bool is_winograd(Row const& row) { return row.family == Family::tma_strict && row.variant == Variant::any; }

// A tile of 2 x 2 outputs, or of y in wgrad, meets 4 x 4 inputs. Both are turned into 16 points; each, of a group, is a
// group of a product of matrices: 1x1 filters over images of tiles.
inline constexpr int64_t kWinogradSide = 2, kWinogradPoints = 16;

// Fewer channels of a group leave memory to bound it, whose bytes are four times those of the tensors.
inline constexpr int64_t kWinogradLeast = 32;

// At most, of the workspace; above the first no more than five times the tensors.
inline constexpr double kWinogradFreeBytes = double(int64_t(1) << 30), kWinogradBytes = 2 * kWinogradFreeBytes;

// The product, which a row of tma_strict runs; bytes from the start of the workspace.
struct Winograd {
  Problem product;
  int tile_m = 0, tile_n = 0;
  Plan plan;  // its kernel is not known here
  double ns = 0;
  int64_t x = 0, w = 0, y = 0, own = 0, bytes = 0;
};

// fprop's product for fprop and dgrad, whose inputs are y, wgrad's for wgrad.
constexpr Problem winograd_product(Op op, Problem const& p) {
  bool const backward = op == Op::dgrad;
  Problem q;
  q.N = p.N, q.H = ceil_div(backward ? p.H : p.P(), kWinogradSide);
  q.W = ceil_div(backward ? p.W : p.Q(), kWinogradSide);
  int64_t const C = backward ? p.K : p.C, K = backward ? p.C : p.K;
  q.C = kWinogradPoints * C, q.K = kWinogradPoints * K, q.R = q.S = 1, q.groups = kWinogradPoints * p.groups;
  q.x = channels_last_strides(q.C, q.H, q.W), q.y = channels_last_strides(q.K, q.H, q.W);
  q.w = channels_last_strides(q.C_per_group(), 1, 1);
  return q;
}

// tile_m is 0 if it does not take the problem.
constexpr Winograd winograd_of(Op op, Problem const& p, Device const& d) {
  Winograd best;
  if (p.dtype != DType::f32 || p.allow_tf32 || p.groups < 1 || p.R != 3 || p.S != 3) return best;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return best;
  int64_t const C = p.C_per_group(), K = p.K_per_group();
  if (C % 4 != 0 || K % 4 != 0 || min64(C, K) < kWinogradLeast) return best;
  if (p.N < 1 || p.H < 1 || p.W < 1 || p.P() < 1 || p.Q() < 1) return best;
  // Coordinates and counts of blocks are int in the kernels.
  if (max64(max64(p.H, p.W), max64(p.P(), p.Q())) > 1 << 28 || max64(p.C, p.K) > 1 << 15) return best;
  Problem const q = winograd_product(op, p);
  double const tiles = double(q.N) * double(q.H) * double(q.W), weights = double(p.K) * double(C);
  double const pixels =
      double(p.N) * (double(p.H) * double(p.W) * double(p.C) + double(p.P()) * double(p.Q()) * double(p.K));
  double const points = tiles * double(q.C + q.K) + weights * kWinogradPoints;
  if (points * 4 > kWinogradBytes) return best;
  Op const product = op == Op::wgrad ? Op::wgrad : Op::fprop;
  for (int tile_n : {128, 64, 32})
    for (int tile_m : {128, 192}) {
      if (product == Op::fprop ? tile_m == 192 : (tile_m == 192) == (tile_n == 128) && tile_n != 64) continue;
      Row const row{Family::tma_strict, product, DType::f32, tile_m, tile_n, 32, Variant::im2col, ""};
      if (!in_place_supports(row, q)) continue;
      Estimate const e = in_place_estimate(row, product, q, d);
      if (best.tile_m > 0 && e.ns >= best.ns) continue;
      best.tile_m = tile_m, best.tile_n = tile_n, best.ns = e.ns;
      best.plan = {-1, e.split_k, in_place_workspace_bytes(row, q, e.split_k)};
    }
  if (best.tile_m == 0) return best;
  best.product = q;
  auto place = [&](int64_t elements) {
    int64_t const begin = best.bytes;
    best.bytes = ceil_div(begin + elements * 4, 256) * 256;
    return begin;
  };
  best.x = place(q.N * q.x.n), best.y = place(q.N * q.y.n), best.w = place(q.K * q.w.n);
  best.own = best.bytes, best.bytes += best.plan.workspace_bytes;
  double const bytes = double(best.bytes);
  if (bytes > kWinogradBytes || (bytes > kWinogradFreeBytes && bytes > 20 * (pixels + weights * 9))) return {};
  // As measured (49 times, 6 % rms): the launches before and after by the bytes of tensors and their points, weights
  // and theirs.
  bool const sums = op == Op::wgrad;
  double const of_tensors = (pixels + tiles * double(q.C + q.K)) * 4, of_weights = weights * (9 + kWinogradPoints) * 4;
  best.ns += (sums ? 9770 : 5640) + of_tensors / (sums ? 4100 : 3470) + of_weights / 1870;
  return best;
}

}  // namespace conv2d_ext
