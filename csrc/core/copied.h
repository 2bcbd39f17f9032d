// Depthwise layers over NCHW whose planes, or bands of their rows, are copied as they lie in memory
// (cuda/depthwise_copied.cuh): which, their tile, shared by the planner and the launcher, and what they cost.
#pragma once

#include "row.h"

namespace conv2d_ext {

inline constexpr int kCopiedStages = 2;

// Of a block, with the warp that copies; blocks of an SM that registers are for.
constexpr int copied_threads(int R) { return R == 7 ? 320 : 448; }
constexpr int copied_registers(int R) { return R == 7 ? 102 : 72; }

struct CopiedTile {
  bool used = false;
  int group = 1;            // channels of a block
  int bands = 1, rows = 1;  // of a unit: bands that threads walk down; rows of outputs of one
  int64_t unit_rows = 1;    // rows of outputs that are copied for at a time
  int64_t image_units = 1;  // of a channel's image
  int threads = 64;         // with the warp that copies
  int64_t in_bytes = 0, y_bytes = 0, shared_bytes = 0;  // of a stage; of a block
  int64_t groups = 1, units = 1, each = 1, shares = 1;
  double ns = 0;
};

constexpr CopiedTile copied_tile(Op op, Problem const& p) {
  int const size = size_of(p.dtype), R = int(p.R);
  bool const sums = op == Op::wgrad, backward = op == Op::dgrad;
  if (p.C_per_group() != 1 || p.K != p.C || p.C <= 0 || p.dtype == DType::f64 || p.R != p.S) return {};
  if (p.dtype != DType::f32 || (R != 3 && R != 5 && R != 7) || p.stride_h != p.stride_w || p.stride_h > 2) return {};
  if (p.dilation_h != 1 || p.dilation_w != 1 || (R != 5 && p.stride_h == 1)) return {};  // others: not as fast
  if (p.pad_top < 0 || p.pad_left < 0 || max64(p.pad_top, p.pad_left) >= R || p.N <= 0) return {};
  int64_t const P = p.P(), Q = p.Q();
  if (p.H <= 0 || p.W <= 0 || P <= 0 || Q <= 0 || max64(max64(p.H, p.W), max64(P, Q)) > 4096) return {};
  auto dense = [&](Strides const& s, int64_t H, int64_t W) {
    return (W == 1 || s.w == 1) && (H == 1 || s.h == W) && (p.C == 1 || s.c == H * W);
  };
  if (!dense(p.x, p.H, p.W) || !dense(p.y, P, Q)) return {};
  int const stride = int(p.stride_h);
  bool const spread = backward && stride == 2;
  // What is read; rows and columns of threads, dgrad with stride 2: pairs; rows of inputs that one meets.
  int64_t const H = backward ? P : p.H, W = backward ? Q : p.W;
  int64_t const rows = spread ? ceil_div(p.H + p.pad_top, 2) : backward ? p.H : P;
  int64_t const columns = spread ? ceil_div(p.W + p.pad_left, 2) : backward ? p.W : Q;
  int const apart = spread ? 1 : stride, meets = spread ? (R + 1) / 2 : R, slots = (R + stride - 1) / stride;
  int64_t const most = copied_threads(R) - 32;
  if (columns > most || p.N * rows > int64_t(1) << 24) return {};
  // As measured: bands of up to 36 rows, some 256 threads, and for fprop and dgrad four rounds of blocks.
  CopiedTile t;
  int64_t const lanes = min64(most, 256), limit = sums && stride == 1 ? 24 * 1024 : 48 * 1024;
  t.unit_rows = rows;
  if (H * W * size > limit) {
    t.unit_rows = (limit / (W * size) - (meets - 1)) / apart;
    if (t.unit_rows < 8) return t;
    t.unit_rows = ceil_div(rows, ceil_div(rows, t.unit_rows));
  }
  t.image_units = ceil_div(rows, t.unit_rows);
  t.bands = int(max64(1, min64(ceil_div(t.unit_rows, 36), lanes / columns)));
  t.rows = int(ceil_div(t.unit_rows, t.bands));
  if (t.image_units == 1)
    t.group = int(max64(1, min64(min64(p.C, 64), min64(lanes / (t.bands * columns), limit / (H * W * size)))));
  int64_t const copied = t.group > 1 ? t.group * H * W : min64(H, (t.unit_rows - 1) * apart + meets) * W;
  t.in_bytes = (copied * size + 15) / 16 * 16 + 16;
  t.y_bytes = sums ? (t.group * t.unit_rows * columns * size + 15) / 16 * 16 + 16 : 0;
  int64_t const walkers = t.group * t.bands * columns, taps = R * R;
  t.threads = int(ceil_div(walkers, 32) * 32 + 32);
  t.shared_bytes = max64(kCopiedStages * (t.in_bytes + t.y_bytes), sums ? (walkers + 32) * taps * 4 : 0);
  int64_t const resident =
      min64(min64(65536 / (copied_registers(R) * t.threads), 2048 / t.threads), 220 * 1024 / (t.shared_bytes + 1024));
  if (resident < 1) return t;
  t.groups = ceil_div(p.C, t.group), t.units = p.N * t.image_units;
  int64_t const full = resident * 132;
  t.each = ceil_div(t.units, max64(1, (sums ? 1 : 4) * full / t.groups)), t.shares = ceil_div(t.units, t.each);
  if (sums && t.shares * p.C * taps * 4 > kMaxWorkspaceBytes) return t;
  t.used = true;
  // A product of three registers takes two turns of a scheduler, in part.
  double const walked = double(t.rows) + (t.bands == 1 && t.image_units == 1 ? slots / 2 : slots - 1);
  double const row = 1.5 * double(taps) + 2.0 * R * apart + 12 + (sums ? R : 0) + (spread ? 12 : 0);
  double const warps = double(t.threads / 32 - 1), all = double(t.units) * double(t.groups);
  double const issue_ns = all * warps * (walked * row + 60) / (4 * 132 * 1.755);
  double const bytes = double(p.N) * double(p.C) * (double(p.H) * double(p.W) + double(P) * double(Q)) * size;
  double const memory_ns = bytes / 3300, longer = issue_ns > memory_ns ? issue_ns : memory_ns;
  double const slower = (sums     ? 1.15
                         : spread ? 1.25
                                  : 1.0) *
                        (t.image_units == 1    ? 1.0
                         : sums && stride == 1 ? 1.5
                                               : 1.1);
  t.ns = (8500 + 1.1 * longer + (sums ? 5000 : 0)) * slower;
  return t;
}

}  // namespace conv2d_ext
