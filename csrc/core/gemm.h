// simt and igemm: the implicit GEMM of a problem, what its rows take and cost.
#pragma once

#include <cstdint>

#include "row.h"

namespace conv2d_ext {

// The implicit GEMM of one group: out[M, N] = sum over `depth` of a gathered operand times a plain one.
//   fprop: M = N*P*Q pixels, N = K/g, depth = R*S*C/g     wgrad: M = R*S*C/g, N = K/g, depth = N*P*Q
//   dgrad: M = N*H*W pixels, N = C/g, depth = R*S*K/g, in min(stride, H) * min(stride, W) phases: the pixels of a phase
//          meet the same filter taps, so that none of the work is on zeros.
struct Gemm {
  int64_t M, N, depth, batches;  // M, depth: of one phase, rounded up; batches = groups * phases
};

constexpr Gemm gemm_of(Op op, Problem const& p) {
  int64_t const taps = p.R * p.S;
  if (op == Op::fprop) return {p.N * p.P() * p.Q(), p.K_per_group(), taps * p.C_per_group(), p.groups};
  if (op == Op::wgrad) return {taps * p.C_per_group(), p.K_per_group(), p.N * p.P() * p.Q(), p.groups};
  int64_t const phases_h = min64(p.stride_h, p.H), phases_w = min64(p.stride_w, p.W);
  int64_t const rows = ceil_div(p.H, max64(phases_h, 1)), columns = ceil_div(p.W, max64(phases_w, 1));
  int64_t const taps_h = ceil_div(p.R, p.stride_h / gcd64(p.dilation_h, p.stride_h));
  int64_t const taps_w = ceil_div(p.S, p.stride_w / gcd64(p.dilation_w, p.stride_w));
  return {p.N * rows * columns, p.C_per_group(), taps_h * taps_w * p.K_per_group(), p.groups * phases_h * phases_w};
}

// Elements from the first to the last of a tensor.
constexpr double span_of(Strides const& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  auto reach = [](int64_t size, int64_t stride) { return double(max64(size - 1, 0)) * double(stride); };
  return reach(n, s.n) + reach(c, s.c) + reach(h, s.h) + reach(w, s.w) + 1;
}

// The operands of an op that simt_copy.cuh can copy in vectors of 16 bytes.
struct SimtVectors {
  bool x, w, y;
};
constexpr SimtVectors simt_vectors(Problem const& p) {
  int const v = 16 / size_of(p.dtype);
  return {channel_vectors(p.x, p.x_align, p.C_per_group(), v, p.dtype),
          channel_vectors(p.w, p.w_align, p.C_per_group(), v, p.dtype),
          channel_vectors(p.y, p.y_align, p.K_per_group(), v, p.dtype)};
}

constexpr bool simt_supports(Row const& row, Op op, Problem const& p) {
  if (row.variant != Variant::nhwc) return true;
  SimtVectors const v = simt_vectors(p);
  constexpr double most = 1 << 30;  // it computes addresses in 32 bits
  bool const x = v.x && span_of(p.x, p.N, p.C, p.H, p.W) < most;
  bool const w = v.w && span_of(p.w, p.K, p.C_per_group(), p.R, p.S) < most;
  bool const y = v.y && span_of(p.y, p.N, p.K, p.P(), p.Q()) < most;
  return p.H + p.pad_top + p.pad_bottom <= (1 << 29) && p.W + p.pad_left + p.pad_right <= (1 << 29) &&
         gemm_of(op, p).depth < int64_t(1) << 31 &&
         (op == Op::fprop   ? x && w
          : op == Op::dgrad ? y && w
                            : x && y);
}

constexpr bool igemm_supports(Problem const& p) {
  return p.H + p.pad_top + p.pad_bottom <= (1 << 29) && p.W + p.pad_left + p.pad_right <= (1 << 29) &&
         channel_vectors(p.x, p.x_align, p.C_per_group(), 8, p.dtype) &&
         channel_vectors(p.w, p.w_align, p.C_per_group(), 8, p.dtype) &&
         channel_vectors(p.y, p.y_align, p.K_per_group(), 8, p.dtype);
}

// The implicit GEMMs: tiles * split_k blocks over the SMs in rounds; a round costs its steps, plus the prologue and
// epilogue of a tile; a split costs the second pass. `alone`: how much longer a step of the only block of an SM takes.
// Fitted to benchmarks/sweep.py.
constexpr Estimate gemm_estimate(Row const& row, Op op, Problem const& p, Device const& d, double step_ns,
                                 double fixed_ns, double alone) {
  Gemm const g = gemm_of(op, p);
  double const tile_bytes = double(row.tile_m) * row.tile_n * (p.dtype == DType::f64 ? 8 : 4);
  double const tiles = double(ceil_div(g.M, row.tile_m)) * double(ceil_div(g.N, row.tile_n)) * double(g.batches);
  int64_t const steps = ceil_div(g.depth, row.tile_k);
  Estimate best;
  for (int64_t split = 1; split <= 1024 && (split == 1 || split * 4 <= steps); split += split < 8 ? 1 : split / 4) {
    double const bytes = split == 1 ? 0 : tiles * double(split) * tile_bytes;
    if (bytes > double(kMaxWorkspaceBytes)) break;
    double const blocks = tiles * double(split);
    int64_t const rounds = blocks > 1e15 ? int64_t(1e15) / d.sm_count : ceil_div(int64_t(blocks), d.sm_count);
    double const each_ns = double(ceil_div(steps, split)) * step_ns * (rounds == 1 ? alone : 1.0) + fixed_ns;
    double ns = double(rounds) * each_ns + 6000;
    if (split > 1) ns += 6000 + bytes * 2 / 2500;  // written and read again at 2.5 TB/s
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
    if (blocks >= 8.0 * d.sm_count) break;  // enough to fill the device evenly
  }
  return best;
}

// simt_copy.cuh: blocks of 64 to 256 threads, 512 threads an SM (f64: 256) at a time; fewer warps wait more for each
// other.
constexpr Estimate simt_copy_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  bool const f64 = p.dtype == DType::f64;
  double const tile = double(row.tile_m) * row.tile_n;
  // Multiply-adds per SM and nanosecond: 128 lanes at 1.755 GHz, times the share that the tile was seen to reach.
  double const share = f64                ? 0.30
                       : tile >= 128 * 64 ? (op == Op::fprop ? 0.56 : 0.64)
                       : row.tile_n >= 64 ? (op == Op::fprop ? 0.50 : 0.56)
                                          : (op == Op::fprop ? 0.43 : 0.48);
  double const step_ns = tile * row.tile_k / (128 * 1.755 * share), fixed_ns = tile * 0.14;
  int64_t const warps = int64_t(tile) / 64 / 32, most = (f64 ? 8 : 16) / warps;  // of a block; blocks an SM
  // How much longer than its share of a full SM a block takes if `blocks` are on it.
  auto slower = [&](int64_t blocks) {
    double const w = double(blocks * warps), full = double(most * warps);
    return (w + 3.5) / w * full / (full + 3.5) * (w < 4 ? (4 + 3.5) / (w + 3.5) : 1);
  };
  Gemm const g = gemm_of(op, p);
  double const tiles = double(ceil_div(g.M, row.tile_m)) * double(ceil_div(g.N, row.tile_n)) * double(g.batches);
  int64_t const steps = ceil_div(g.depth, row.tile_k);
  Estimate best;
  for (int64_t split = 1; split <= 1024 && (split == 1 || split * 4 <= steps); split += split < 32 ? 1 : split / 16) {
    double const bytes = split == 1 ? 0 : tiles * double(split) * tile * size_of(p.dtype);
    if (bytes > double(kMaxWorkspaceBytes)) break;
    double const blocks = tiles * double(split);
    int64_t const each = blocks > 1e15 ? int64_t(1e15) / d.sm_count : ceil_div(int64_t(blocks), d.sm_count);
    int64_t const last = each % most;
    double const block_ns = double(ceil_div(steps, split)) * step_ns + fixed_ns;
    double ns = (double(each - last) + (last > 0 ? double(last) * slower(last) : 0)) * block_ns + 7000;
    if (split > 1) ns += 4000 + bytes * 2 / 2500;  // written and read again at 2.5 TB/s
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
    if (blocks >= 64.0 * d.sm_count) break;  // enough to fill the device evenly
  }
  return best;
}

constexpr Estimate simt_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  if (row.variant == Variant::nhwc) return simt_copy_estimate(row, op, p, d);
  double const tile = double(row.tile_m) * row.tile_n;
  // The same of simt.cuh, whose blocks of 256 threads come two an SM.
  double const share = tile >= 128 * 128  ? 0.53
                       : tile >= 128 * 64 ? 0.44
                       : row.tile_n >= 64 ? 0.35
                       : row.tile_n >= 32 ? 0.27
                                          : 0.12;
  double rate = 128 * 1.755 * share * (p.dtype == DType::f64 ? 0.5 : 1.0);
  if (op == Op::wgrad) rate /= 1.3;
  // Neighbours along k lie apart: filters of one tap over NCHW.
  if (op != Op::wgrad && p.R * p.S == 1 && (op == Op::fprop ? p.x : p.y).c != 1) rate *= 0.7;
  Estimate e = gemm_estimate(row, op, p, d, tile * row.tile_k / rate, 1500 + tile * 0.05, 1.4);
  // Of groups side by side each pixel of each is a sector of its own.
  if (p.groups > 1 && p.x.c == 1 && p.y.c == 1) {
    double const sectors = double(p.N) * double(p.groups) *
                           (double(p.H) * double(p.W) * double(ceil_div(p.C_per_group() * size_of(p.dtype), 32)) +
                            double(p.P()) * double(p.Q()) * double(ceil_div(p.K_per_group() * size_of(p.dtype), 32)));
    double const least = 7000 + sectors * 32 / 4300;
    if (e.ns < least) e.ns = least;
  }
  return e;
}

constexpr Estimate igemm_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  // 2048 multiply-adds per SM and cycle, 1.6 GHz under load, times the share that the tile was seen to reach
  // (docs/tuning.md): the gathering warpgroup bounds it, more so where it copies along rows.
  double const share = op == Op::fprop ? 0.47 : 0.29;
  double const tile = double(row.tile_m) * row.tile_n;
  Estimate e = gemm_estimate(row, op, p, d, tile * row.tile_k / (2048 * 1.6 * share), 1500 + tile * 0.05, 1.0);
  // As much as tma's estimates have beside their tiles, lest igemm win small problems.
  e.ns += 3000;
  return e;
}

constexpr int64_t gemm_workspace_bytes(Row const& row, Op op, Problem const& p, int split_k) {
  if (split_k == 1) return 0;
  Gemm const g = gemm_of(op, p);
  int const acc_bytes = p.dtype == DType::f64 ? 8 : 4;
  return ceil_div(g.M, row.tile_m) * ceil_div(g.N, row.tile_n) * g.batches * split_k * row.tile_m * row.tile_n *
         acc_bytes;
}

}  // namespace conv2d_ext
