// Which kernel runs a problem: make_plan enumerates the rows of kernels.def, drops those that do not support the
// problem and takes the cheapest. Pure and constexpr: nothing is read but the arguments.
#pragma once

#include <cstdint>

#include "kernels.def"
#include "problem.h"

namespace conv2d_ext {

enum class Family : uint8_t { simt };
enum class Variant : uint8_t { nhwc, any };

struct Row {
  Family family;
  Op op;
  DType dtype;
  int tile_m, tile_n, tile_k;
  Variant variant;
  char const* name;
};

#define CONV2D_EXT_ROW(family, op, dtype, tm, tn, tk, variant) \
  Row{Family::family,                                          \
      Op::op,                                                  \
      DType::dtype,                                            \
      tm,                                                      \
      tn,                                                      \
      tk,                                                      \
      Variant::variant,                                        \
      #family "_" #op "_" #dtype "_" #tm "x" #tn "_" #variant},
inline constexpr Row kRows[] = {CONV2D_EXT_KERNELS(CONV2D_EXT_ROW)};
#undef CONV2D_EXT_ROW
inline constexpr int kRowCount = sizeof(kRows) / sizeof(kRows[0]);

// What the planner knows of a GPU.
struct Device {
  int sm_count = 132;
  int compute_capability = 90;  // 10 * major + minor
};
inline constexpr Device h200_sxm{132, 90};

struct Plan {
  int kernel = -1;  // row of the table
  int split_k = 1;  // parts of the reduction, summed in order by a second pass
  int64_t workspace_bytes = 0;
};

// Partial sums never take more than this.
inline constexpr int64_t kMaxWorkspaceBytes = int64_t(64) << 20;

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

// Elements that the SIMT kernels' nhwc variant loads at once.
constexpr int simt_vector(DType t) { return t == DType::f64 ? 2 : 4; }

constexpr bool channel_vectors(Strides const& s, int align, int64_t channels, DType t) {
  int const v = simt_vector(t);
  return s.c == 1 && channels % v == 0 && s.n % v == 0 && s.h % v == 0 && s.w % v == 0 && align >= v * size_of(t);
}

constexpr bool supports(Row const& row, Op op, Problem const& p, Device const& d) {
  if (row.op != op || row.dtype != p.dtype) return false;
  switch (row.family) {
    case Family::simt: {
      if (d.compute_capability < 80) return false;
      if (row.variant != Variant::nhwc) return true;
      bool const x = channel_vectors(p.x, p.x_align, p.C_per_group(), p.dtype);
      bool const w = channel_vectors(p.w, p.w_align, p.C_per_group(), p.dtype);
      bool const y = channel_vectors(p.y, p.y_align, p.K_per_group(), p.dtype);
      return op == Op::fprop ? x && w : op == Op::dgrad ? y && w : x && y;
    }
  }
  return false;
}

// A row's estimated time and the split of the reduction that it was estimated with.
struct Estimate {
  double ns = 0;
  int split_k = 1;
};

// SIMT: tiles * split_k blocks over the SMs in rounds; a round costs its multiply-adds at a rate that was measured for
// the tile and the way it loads (docs/tuning.md), plus the prologue and epilogue of a tile, plus the second pass.
constexpr Estimate simt_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  Gemm const g = gemm_of(op, p);
  double const tile = double(row.tile_m) * row.tile_n;
  int const acc_bytes = p.dtype == DType::f64 ? 8 : 4;
  // Multiply-adds per SM and nanosecond: 128 lanes at 1.755 GHz, times the share that the tile was seen to reach.
  double const share = tile >= 128 * 128  ? 0.62
                       : tile >= 128 * 64 ? 0.57
                       : row.tile_n >= 64 ? 0.45
                       : row.tile_n >= 32 ? 0.40
                                          : 0.17;
  double rate = 128 * 1.755 * share * (p.dtype == DType::f64 ? 0.5 : 1.0);
  if (row.variant == Variant::any) rate *= tile >= 128 * 128 ? 0.86 : tile >= 64 * 64 ? 0.77 : 0.68;
  double const tiles = double(ceil_div(g.M, row.tile_m)) * double(ceil_div(g.N, row.tile_n)) * double(g.batches);
  int64_t const steps = ceil_div(g.depth, row.tile_k);
  double const step_ns = tile * row.tile_k / rate;
  double const fixed_ns = 1500 + tile * 0.05;

  Estimate best;
  for (int64_t split = 1; split <= 1024 && (split == 1 || split * 4 <= steps); split += split < 8 ? 1 : split / 4) {
    double const bytes = split == 1 ? 0 : tiles * double(split) * tile * acc_bytes;
    if (bytes > double(kMaxWorkspaceBytes)) break;
    double const blocks = tiles * double(split);
    int64_t const rounds = blocks > 1e15 ? int64_t(1e15) / d.sm_count : ceil_div(int64_t(blocks), d.sm_count);
    double ns = double(rounds) * (double(ceil_div(steps, split)) * step_ns + fixed_ns) + 3000;
    if (split > 1) ns += 3000 + bytes * 2 / 2500;  // written and read again at 2.5 TB/s
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
    if (blocks >= 8.0 * d.sm_count) break;  // enough to fill the device evenly
  }
  return best;
}

constexpr Estimate estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  return simt_estimate(row, op, p, d);
}

constexpr int64_t workspace_bytes(Row const& row, Op op, Problem const& p, int split_k) {
  if (split_k == 1) return 0;
  Gemm const g = gemm_of(op, p);
  int const acc_bytes = p.dtype == DType::f64 ? 8 : 4;
  return ceil_div(g.M, row.tile_m) * ceil_div(g.N, row.tile_n) * g.batches * split_k * row.tile_m * row.tile_n *
         acc_bytes;
}

// The plan for one row; the caller has asked supports() first.
constexpr Plan plan_row(int kernel, Op op, Problem const& p, Device const& d) {
  Estimate const e = estimate(kRows[kernel], op, p, d);
  return {kernel, e.split_k, workspace_bytes(kRows[kernel], op, p, e.split_k)};
}

// There is always a plan on a GPU of compute capability 8.0 or later; kernel = -1 otherwise.
constexpr Plan make_plan(Op op, Problem const& p, Device const& d) {
  int best = -1;
  double best_ns = 0;
  for (int i = 0; i < kRowCount; ++i) {
    if (!supports(kRows[i], op, p, d)) continue;
    double const ns = estimate(kRows[i], op, p, d).ns;
    if (best < 0 || ns < best_ns) {
      best = i;
      best_ns = ns;
    }
  }
  return best < 0 ? Plan{} : plan_row(best, op, p, d);
}

}  // namespace conv2d_ext
