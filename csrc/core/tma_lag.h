// TF32's tiles of tma_lag.cuh (16 bits: core/tma.h, tma_lags), and what was measured (docs/tuning/dense.md).
#pragma once

#include "tma.h"

namespace conv2d_ext {

// fprop of 128x256 in TF32: one group, whole tiles of several steps, where this takes no more rounds.
constexpr bool tf32_lags(Row const& row, Op op, Problem const& p, int64_t split_k) {
  if (op != Op::fprop || row.dtype != DType::f32 || row.variant != Variant::im2col || row.tile_m != 128 ||
      row.tile_n != kLagColumns || p.groups > 1 || split_k > 1 || tma_stores_singly(op, p))
    return false;
  int64_t const steps = p.R * p.S * ceil_div(p.C, 32), tiles_n = ceil_div(p.K, kLagColumns);
  if (steps < 8 || tiles_n < 1 || tiles_n > 16) return false;
  int64_t const pairs = ceil_div(p.N * p.P() * p.Q(), 2 * kLagPixels);
  LagBlocks const lag(tiles_n, pairs);
  return pairs >= 2 * lag.own && lag.rounds <= ceil_div(tma_tiles(row, p), 132);
}

// The time of a row beside its estimate: 1x1 with a stride by 128x256.
constexpr double lag_as_measured(Row const& row, Op op, Problem const& p, int64_t split_k) {
  bool const strided = op == Op::fprop && p.R * p.S == 1 && p.stride_w > 1;
  return strided && tma_lags(row, op, p, split_k) ? 0.95 : 1;
}

}  // namespace conv2d_ext
