// tma.cuh and tma_wgrad.cuh: what their rows take and cost, and what the launchers share with the planner.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace conv2d_ext {

constexpr bool is_halo(Variant v) { return v == Variant::halo; }

inline constexpr int kHalo = 8;        // pixels that a tile of the halo variants copies beyond its own
inline constexpr int kMaxPhases = 16;  // of dgrad

constexpr Walk walk_h(Op op, Problem const& p, int64_t phase) {
  return op == Op::dgrad ? dgrad_walk(p.H, p.R, p.stride_h, p.pad_top, p.dilation_h, phase)
                         : fprop_walk(p.P(), p.R, p.stride_h, p.pad_top, p.dilation_h);
}
constexpr Walk walk_w(Op op, Problem const& p, int64_t phase) {
  return op == Op::dgrad ? dgrad_walk(p.W, p.S, p.stride_w, p.pad_left, p.dilation_w, phase)
                         : fprop_walk(p.Q(), p.S, p.stride_w, p.pad_left, p.dilation_w);
}

// The walk over all columns that its taps touch.
constexpr Walk halo_walk(Walk w) {
  w.pixels += (w.taps - 1) * w.tap_stride;
  return w;
}

// What an im2col copy can do along one axis.
constexpr bool im2col_supports(Walk const& w, int64_t extent) {
  auto corner = [](int64_t v) { return v >= -128 && v <= 127; };
  return w.stride <= 8 && corner(w.lower) && corner(box_upper(w, extent)) && (w.taps - 1) * w.tap_stride <= 255;
}

// Sizes and strides that a tensor map can hold; a dimension of size one has stride 0 in a Problem.
constexpr bool map_supports(Strides const& s, int64_t n, int64_t h, int64_t w, DType t) {
  constexpr int64_t most = int64_t(1) << 31;
  auto stride = [t](int64_t size, int64_t v) { return size == 1 || (v > 0 && v * size_of(t) < int64_t(1) << 40); };
  return n < most && h < most && w < most && stride(n, s.n) && stride(h, s.h) && stride(w, s.w);
}

// Channels of the reduction that one instruction takes (TF32: a step); those of the next group must not be among them.
constexpr int tma_together(DType t) { return t == DType::f32 ? 32 : 16; }

// Tensors that may have any strides and alignment: fprop and dgrad in 16-bit types store single elements where they
// must, but not those of a stride's phases, which lie apart.
struct TmaTakesAny {
  bool x, w, y;
};
constexpr TmaTakesAny tma_takes_any(Op op, Problem const& p) {
  if (p.dtype == DType::f32) return {false, false, false};
  return {op == Op::dgrad && p.stride_w == 1, false, op == Op::fprop};
}
// Is the output of fprop or dgrad stored in single elements?
constexpr bool tma_stores_singly(Op op, Problem const& p) {
  bool const forward = op == Op::fprop;
  return !channel_vectors(forward ? p.y : p.x, forward ? p.y_align : p.x_align,
                          forward ? p.K_per_group() : p.C_per_group(), 16 / size_of(p.dtype), p.dtype);
}

constexpr bool tma_supports(Row const& row, Problem const& p) {
  bool const forward = row.op == Op::fprop;
  int const v = 16 / size_of(p.dtype);
  if (p.dtype == DType::f32 && !p.allow_tf32) return false;
  TmaTakesAny const any = tma_takes_any(row.op, p);
  if (!any.x && !channel_vectors(p.x, p.x_align, p.C_per_group(), v, p.dtype)) return false;
  if (!any.w && !channel_vectors(p.w, p.w_align, p.C_per_group(), v, p.dtype)) return false;
  if (!any.y && !channel_vectors(p.y, p.y_align, p.K_per_group(), v, p.dtype)) return false;
  if (row.op == Op::wgrad) {
    return map_supports(p.x, p.N, p.H, p.W, p.dtype) && map_supports(p.y, p.N, p.P(), p.Q(), p.dtype) &&
           im2col_supports(walk_h(row.op, p, 0), p.H) && im2col_supports(walk_w(row.op, p, 0), p.W) &&
           double(p.N) * double(p.P()) * double(p.Q()) < 1e11 &&
           double(p.R) * double(p.S) * double(ceil_div(p.C_per_group(), 64)) * double(p.K) < 1e9;
  }
  if (p.groups > 1 && (forward ? p.C_per_group() : p.K_per_group()) % tma_together(p.dtype) != 0) return false;
  if (!any.w && !map_supports(p.w, p.K, p.R, p.S, p.dtype)) return false;
  if (!(forward ? map_supports(p.x, p.N, p.H, p.W, p.dtype) : map_supports(p.y, p.N, p.P(), p.Q(), p.dtype)))
    return false;
  int64_t const phases_h = forward ? 1 : phases_of(p.H, p.stride_h),
                phases_w = forward ? 1 : phases_of(p.W, p.stride_w);
  if (phases_h * phases_w > kMaxPhases) return false;
  bool shared = false;
  for (int64_t i = 0; i < phases_h; ++i)
    for (int64_t j = 0; j < phases_w; ++j) {
      Walk const h = walk_h(row.op, p, i);
      Walk w = walk_w(row.op, p, j);
      if (h.taps == 0 || w.taps == 0) continue;
      if (!im2col_supports(h, forward ? p.H : p.P())) return false;
      if (is_halo(row.variant)) {
        if (w.stride != 1 || (w.taps - 1) * w.tap_stride > kHalo) return false;
        shared = shared || w.taps > 1;
        w = halo_walk(w);
      }
      if (!im2col_supports(w, forward ? p.W : p.Q())) return false;
    }
  if (is_halo(row.variant) && !shared) return false;
  // Tiles and steps are counted in 32 bits.
  Gemm const g = gemm_of(row.op, p);
  double const pixels = double(g.M) * (is_halo(row.variant) ? double(p.S * p.dilation_w + 1) : 1.0);
  return (pixels / row.tile_m + 2) * double(ceil_div(g.N, row.tile_n)) * double(g.batches) < 1e6 * 500 &&
         double(g.depth) < 1e9;
}

// Floats of the filters that the TF32 rows round beforehand; a multiple of 16 bytes.
constexpr int64_t tma_prepared(Problem const& p) { return ceil_div(p.K * p.C_per_group() * p.R * p.S, 64) * 64; }

// Tiles of all phases.
constexpr int64_t tma_tiles(Row const& row, Problem const& p) {
  Op const op = row.op;
  if (op == Op::wgrad) {
    int64_t const runs = p.R * p.S * ceil_div(p.C_per_group(), 64);
    return ceil_div(runs, row.tile_m / 64) * ceil_div(p.K_per_group(), row.tile_n) * p.groups;
  }
  int64_t const phases_h = op == Op::fprop ? 1 : phases_of(p.H, p.stride_h),
                phases_w = op == Op::fprop ? 1 : phases_of(p.W, p.stride_w);
  int64_t const N = op == Op::fprop ? p.K_per_group() : p.C_per_group();
  int64_t tiles = 0;
  for (int64_t i = 0; i < phases_h; ++i)
    for (int64_t j = 0; j < phases_w; ++j) {
      Walk const h = walk_h(op, p, i);
      Walk w = walk_w(op, p, j);
      if (is_halo(row.variant) && w.taps > 0 && h.taps > 0) w = halo_walk(w);
      tiles += ceil_div(p.N * h.pixels * w.pixels, row.tile_m) * ceil_div(N, row.tile_n) * p.groups;
    }
  return tiles;
}

// tma: a step takes the longest of its instructions and of the copies through L2.
constexpr Estimate tma_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  bool const halo = is_halo(row.variant);
  int const chunk = 128 / size_of(p.dtype);
  double const TM = row.tile_m, TN = row.tile_n;
  int64_t const C = op == Op::fprop ? p.C_per_group() : p.K_per_group(),
                N = op == Op::fprop ? p.K_per_group() : p.C_per_group();
  double const mma_ns = TM * TN * 64 / (2048 * 1.6 * (TN >= 128 ? 0.92 : TM >= 256 ? 0.80 : 0.72));
  bool const two = TM * TN <= 128 * 64;  // blocks an SM
  Estimate best;
  int64_t tiles = 0, most = 0;
  double whole = 0;  // steps of all tiles, in ns of one SM
  int64_t const phases_h = op == Op::fprop ? 1 : phases_of(p.H, p.stride_h),
                phases_w = op == Op::fprop ? 1 : phases_of(p.W, p.stride_w);
  double longest = 0;
  for (int64_t i = 0; i < phases_h; ++i)
    for (int64_t j = 0; j < phases_w; ++j) {
      Walk const h = walk_h(op, p, i);
      Walk w = walk_w(op, p, j);
      if (halo && w.taps > 0) w = halo_walk(w);
      int64_t const t = ceil_div(p.N * h.pixels * w.pixels, row.tile_m) * ceil_div(N, row.tile_n) * p.groups;
      int64_t const steps = h.taps * w.taps * ceil_div(C, chunk);
      double const a = halo && w.taps > 0 ? (TM + kHalo) / double(w.taps) : TM;
      double const copy_ns = (a + TN) * 128 / 70;
      double const ns = double(steps) * (mma_ns > copy_ns ? mma_ns : copy_ns);
      tiles += t;
      if (steps > most) most = steps;
      if (ns > longest) longest = ns;
      whole += double(t) * ns;
    }
  double const fixed = 900 + TM * TN * 0.03;
  double const memory_ns = (double(p.N) * double(p.C) * double(p.H) * double(p.W) +
                            double(p.N) * double(p.K) * double(p.P()) * double(p.Q())) *
                           size_of(p.dtype) / 3500;
  for (int64_t split = 1; split <= 256 && (split == 1 || split * 2 <= most); split += split < 8 ? 1 : split / 4) {
    double const bytes = split == 1 ? 0 : double(tiles) * double(split) * TM * TN * 4;
    if (bytes > double(kMaxWorkspaceBytes)) break;
    double const units = double(tiles) * double(split), slots = double(d.sm_count);
    // Whole rounds of the longest tile, but no less than an even share; two blocks an SM hide each other's epilogue.
    double const each = longest / double(split) + fixed * (two ? 0.5 : 1.0);
    int64_t const rounds = ceil_div(int64_t(units), int64_t(slots));
    double const share = (whole + units * fixed * (two ? 0.5 : 1.0)) / slots;
    double ns = phases_h * phases_w == 1 ? double(rounds) * each : (share > each ? share : each);
    if (ns < memory_ns) ns = memory_ns;
    ns += 3000;
    if (split > 1) ns += 2500 + bytes * 2 / 2500;
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
    if (units >= 4.0 * d.sm_count) break;
  }
  return best;
}

// As tma_estimate; the pixels are split for whole rounds.
constexpr Estimate tma_wgrad_estimate(Row const& row, Problem const& p, Device const& d) {
  double const TM = row.tile_m, TN = row.tile_n;
  int64_t const tiles = tma_tiles(row, p), steps = ceil_div(p.N * p.P() * p.Q(), 64);
  double const mma_ns = TM * TN * 64 / (2048 * 1.6 * (TN >= 128 ? 0.92 : 0.75));
  double const copy_ns = (TM + TN) * 128 / 70;
  double const step_ns = mma_ns > copy_ns ? mma_ns : copy_ns, fixed = 1200 + TM * TN * 0.05;
  bool const two = TM * TN <= 128 * 64;
  Estimate best;
  for (int64_t split = 1; split <= 1024 && (split == 1 || split * 4 <= steps); split += split < 32 ? 1 : split / 16) {
    double const bytes = split == 1 ? 0 : double(tiles) * double(split) * TM * TN * 4;
    if (bytes > double(kMaxWorkspaceBytes)) break;
    double const slots = double(d.sm_count) * (two ? 2 : 1);
    int64_t const rounds = ceil_div(tiles * split, int64_t(slots));
    double ns = double(rounds) * (double(ceil_div(steps, split)) * step_ns * (two ? 2 : 1) + fixed) + 3000;
    if (split > 1) ns += 2500 + bytes * 2 / 3000;
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
    if (double(tiles * split) >= 12.0 * d.sm_count) break;
  }
  return best;
}

constexpr int64_t tma_workspace_bytes(Row const& row, Problem const& p, int split_k) {
  int64_t const partial = split_k == 1 ? 0 : tma_tiles(row, p) * split_k * row.tile_m * row.tile_n * 4;
  return partial + (p.dtype == DType::f32 ? tma_prepared(p) * 4 : 0);
}

}  // namespace conv2d_ext
