// grouped_few.cuh: fprop and dgrad of groups over few pixels, channels_last, 16-bit types and TF32.
#pragma once

#include <cstdint>

#include "row.h"

namespace conv2d_ext {

constexpr int kFewGroupWarps = 4;         // of a block
constexpr int kFewGroupRun = 8;           // neighbouring pixels of a row of the result; a warp has two runs
constexpr int kFewGroupOutputs = 16;      // channels of the result, of a warp
constexpr int64_t kFewGroupGrid = 65535;  // of the grid's second and third dimension

constexpr bool is_few_groups(Row const& row) {
  return row.family == Family::grouped && row.variant == Variant::nhwc && row.op != Op::wgrad && row.tile_m == 16;
}

// Pixels that meet the same taps: all of fprop, dgrad's of a phase of the stride.
struct FewGroups {
  int sums = 0;  // channels that a warp loads at once: 16 or 32; 0: not supported
  int64_t tiles = 0, phases_h = 1, phases_w = 1, rows = 0, columns = 0,
          in_row = 0;  // rows, columns: of a phase at most
  int64_t steps = 0;   // of a phase at most: pairs of runs
  double ns = 0;
};

constexpr FewGroups few_groups(Op op, Problem const& p, Device const& d) {
  FewGroups t;
  bool const backward = op == Op::dgrad;
  int64_t const C = p.C_per_group(), K = p.K_per_group(), P = p.P(), Q = p.Q();
  if (op == Op::wgrad || p.dtype == DType::f64 || (p.dtype == DType::f32 && !p.allow_tf32)) return t;
  if (p.groups < 2 || C < 8 || K < 8 || p.N < 1 || P < 1 || Q < 1 || p.H < 1 || p.W < 1 || p.R < 1 || p.S < 1) return t;
  if (!channel_vectors(p.x, p.x_align, C, 4, p.dtype) || !channel_vectors(p.y, p.y_align, K, 4, p.dtype) ||
      !channel_vectors(p.w, p.w_align, C, backward ? 2 : 4, p.dtype))
    return t;
  constexpr double most = double(1 << 30);
  auto reach = [](Strides const& s, int64_t n, int64_t h, int64_t w) {
    return double(n) * double(s.n) + double(h) * double(s.h) + double(w) * double(s.w);
  };
  int64_t const height = max64(p.H, P) + p.R * p.dilation_h + p.pad_top + p.pad_bottom + p.stride_h;
  int64_t const width = max64(p.W, Q) + p.S * p.dilation_w + p.pad_left + p.pad_right + p.stride_w * kFewGroupRun;
  if (reach(p.x, p.N, height, width) >= most || reach(p.y, p.N, height, width) >= most) return t;
  if (reach(p.w, p.K, p.R, p.S) >= most) return t;
  int64_t const outputs = backward ? C : K;
  t.tiles = ceil_div(outputs, kFewGroupOutputs);
  if (backward) t.phases_h = phases_of(p.H, p.stride_h), t.phases_w = phases_of(p.W, p.stride_w);
  t.rows = backward ? ceil_div(p.H, p.stride_h) : P, t.columns = backward ? ceil_div(p.W, p.stride_w) : Q;
  t.in_row = ceil_div(t.columns, kFewGroupRun), t.steps = ceil_div(p.N * t.rows * t.in_row, 2);
  if (p.groups * t.tiles > kFewGroupGrid || t.phases_h * t.phases_w > kFewGroupGrid || t.steps > int64_t(1) << 20)
    return t;
  t.sums = (backward ? K : C) > 16 ? 32 : 16;
  // As measured (2026-11-30): rows of taps follow each other; all warps, and their loads; bytes.
  struct Rates {
    double begin, turn, warp, load;
  };
  constexpr Rates rates[2][2] = {{{5146, 653, 7.4, 13.6}, {3149, 1406, 137, 9}},
                                 {{4410, 1049, 0, 18.3}, {2060, 1620, 111, 23.8}}};
  Rates const& e = rates[p.dtype == DType::f32][backward];
  int64_t const pieces = ceil_div(backward ? K : C, t.sums), phases = t.phases_h * t.phases_w;
  double const turns = double(pieces * ceil_div(p.R, t.phases_h) * ceil_div(p.S, 3));
  double const warps = double(t.steps * p.groups * t.tiles * phases) / d.sm_count;
  double const loads = double(p.R * p.S * pieces * t.sums / 16) / double(phases);
  double const elements = double(p.N) * (double(p.C) * double(p.H * p.W) + double(p.K) * double(P * Q)) +
                          double(p.K) * double(C * p.R * p.S);
  t.ns = e.begin + turns * e.turn + warps * (e.warp + loads * e.load) + elements * size_of(p.dtype) / 3400;
  return t;
}

}  // namespace conv2d_ext
