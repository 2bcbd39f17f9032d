// tma_strict_turned.cuh: wgrad of stride 1 and several taps in strict float32 with x and y in each other's place. What
// its row takes and costs, and what the launcher shares with the planner.
#pragma once

#include <cstdint>

#include "tma_strict.h"
#include "tma_strict_wgrad.h"

namespace conv2d_ext {

constexpr bool is_strict_turned(Row const& row) {
  return row.family == Family::tma_strict && row.op == Op::wgrad && row.variant == Variant::narrow;
}

inline constexpr int64_t kStrictTurnedMost = 32;  // filters; more fill half of a tile's columns and gain nothing

// The taps lie along y: its channels, tap by tap, are the tiles' rows, and x's their columns. Few filters then fill
// tiles that they would leave empty as columns, but the weights come turned, the last tap first.
constexpr Problem strict_turned(Problem const& p) {
  Problem q = p;
  q.C = p.K, q.H = p.P(), q.W = p.Q(), q.K = p.C;
  q.pad_top = (p.R - 1) * p.dilation_h - p.pad_top, q.pad_bottom = (p.R - 1) * p.dilation_h - p.pad_bottom;
  q.pad_left = (p.S - 1) * p.dilation_w - p.pad_left, q.pad_right = (p.S - 1) * p.dilation_w - p.pad_right;
  q.x = p.y, q.y = p.x, q.x_align = p.y_align, q.y_align = p.x_align;
  q.w = channels_last_strides(q.C_per_group(), q.R, q.S), q.w_align = 16;
  return q;
}

// The product's tile and split.
struct StrictTurned {
  int tile_m = 0, tile_n = 0;
  Estimate estimate;
};

// x and y as channels_last. tile_m is 0 if it does not take the problem.
constexpr StrictTurned strict_turned_tile(Problem const& p) {
  StrictTurned best;
  if (p.dtype != DType::f32 || p.allow_tf32 || p.groups != 1 || p.R * p.S == 1) return best;
  if (p.stride_h != 1 || p.stride_w != 1 || p.N < 1 || p.P() < 1 || p.Q() < 1 || p.C % 4 != 0 ||
      p.K > kStrictTurnedMost || p.K >= p.C)
    return best;
  Problem const q = strict_turned(p);
  if (min64(min64(q.pad_top, q.pad_bottom), min64(q.pad_left, q.pad_right)) < 0) return best;
  for (int tile_n : {128, 64, 32})
    for (int tile_m : {128, 192}) {
      if ((tile_m == 192) == (tile_n == 128) && tile_n != 64) continue;
      Row const row{Family::tma_strict, Op::wgrad, DType::f32, tile_m, tile_n, 32, Variant::im2col, ""};
      if (!strict_supports(row, q)) continue;
      Estimate const e = strict_wgrad_estimate(row, q, h200_sxm);
      if (best.tile_m == 0 || e.ns < best.estimate.ns) best = {tile_m, tile_n, e};
    }
  return best;
}

// The product's result, then what its row takes.
constexpr int64_t strict_turned_out_bytes(Problem const& p) { return ceil_div(p.K * p.C * p.R * p.S * 4, 256) * 256; }

constexpr int64_t strict_turned_bytes(Problem const& p) {
  StrictTurned const t = strict_turned_tile(p);
  Row const row{Family::tma_strict, Op::wgrad, DType::f32, t.tile_m, t.tile_n, 32, Variant::im2col, ""};
  return strict_turned_out_bytes(p) + strict_wgrad_workspace_bytes(row, strict_turned(p), t.estimate.split_k);
}

constexpr Estimate strict_turned_estimate(Problem const& p) {
  Estimate e = strict_turned_tile(p).estimate;
  e.ns += 3800 + double(p.K) * double(p.C * p.R * p.S) * 4 * 2 / 1800;
  return e;
}

}  // namespace conv2d_ext
