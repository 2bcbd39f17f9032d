// The tiles of cuda/stream_quads_f32.cuh for a problem: shared by the planner and the launcher.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

inline constexpr int kQuadsReaders = 128;  // threads that multiply; one warp more copies
inline constexpr int kQuadsRows = 4;       // of a stage
inline constexpr int kQuadsStages = 8;

// Floats from a thread's first input to its first tap, which is aligned with 'same' padding; its loads of 16 bytes.
constexpr int quads_shift(int R) { return (4 - (R - 1) / 2 % 4) % 4; }
constexpr int quads_loads(int R, int stride) { return (quads_shift(R) + 3 * stride + R + 3) / 4; }
// Blocks of an SM, as the registers allow.
constexpr int quads_blocks(int R) { return R == 9 ? 2 : R == 7 ? 3 : R == 5 ? 4 : 5; }

struct QuadsTile {
  bool used = false;
  int in_H = 0, in_W = 0, out_H = 0, out_W = 0, pad_h = 0;
  int strips = 1, planes = 1;    // threads of a row; planes of a block
  int lead = 0, pitch = 0;       // floats of zeros before a row in shared memory; floats from row to row
  int stored = 1;                // floats of a store
  int resident = 1, stages = 0;  // blocks of an SM
  int stage_bytes = 0, y_bytes = 0, shared_bytes = 0;
  int64_t groups = 1, units = 0, shares = 1;  // of planes; rows of outputs that the shares divide; wgrad: of a group
  double ns = 0;
};

// Floats of the widest vectors that rows of `columns` are made of.
constexpr int quads_width(Strides const& s, int align, int64_t columns) {
  for (int width = 4; width > 1; width /= 2)
    if (align >= 4 * width && columns % width == 0 && s.n % width == 0 && s.c % width == 0 && s.h % width == 0)
      return width;
  return 1;
}

// Where they are faster than whole planes, as measured: for rows of more than so many columns; 0: nowhere.
constexpr int quads_least(Op op, int R, int stride) {
  bool const sums = op == Op::wgrad;
  if (stride == 1) return R >= 7 || (R == 5 && sums) ? 32 : 0;
  return stride != 2 || op == Op::dgrad || R > 5 ? 0 : sums || R == 5 ? 64 : 128;
}

constexpr QuadsTile quads_tile(int R, Op op, Problem const& p, Device const& d) {
  int const stride = int(min64(p.stride_h, 3));
  QuadsTile t;
  bool const backward = op == Op::dgrad, sums = op == Op::wgrad;
  t.in_H = int(backward ? p.P() : p.H), t.in_W = int(backward ? p.Q() : p.W);
  t.out_H = int(backward ? p.H : p.P()), t.out_W = int(backward ? p.W : p.Q());
  t.pad_h = int(backward ? R - 1 - p.pad_top : p.pad_top);
  int64_t const pad_w = backward ? R - 1 - p.pad_left : p.pad_left;
  Strides const& in = backward ? p.y : p.x;
  Strides const& out = backward ? p.x : p.y;
  int const align = backward ? p.y_align : p.x_align, out_align = backward ? p.x_align : p.y_align;
  if (p.dtype != DType::f32 || p.R != R || p.S != R || p.stride_w != p.stride_h || pad_w != (R - 1) / 2) return t;
  if (p.C_per_group() != 1 || p.K != p.C || p.dilation_h != 1 || p.dilation_w != 1) return t;
  if (p.N == 0 || p.C == 0 || p.H == 0 || p.P() == 0 || p.Q() == 0 || p.x.w != 1 || (p.Q() > 1 && p.y.w != 1)) return t;
  if (quads_least(op, R, stride) == 0 || p.W <= quads_least(op, R, stride)) return t;
  // Planes of fprop and dgrad are counted over the images.
  if (!sums && p.N > 1 && (in.n != p.C * in.c || out.n != p.C * out.c)) return t;
  t.strips = int(ceil_div(t.out_W, 4));
  if (t.strips > kQuadsReaders) return t;
  int64_t const all = sums ? p.C : p.N * p.C;
  t.planes = int(min64(kQuadsReaders / t.strips, all));
  t.groups = ceil_div(all, t.planes);
  t.lead = int(pad_w) + quads_shift(R), t.pitch = 4 * (stride * (t.strips - 1) + quads_loads(R, stride));
  t.stored = quads_width(out, out_align, t.out_W);
  // The copy engine's boxes and strides.
  if (t.pitch > 256 || quads_width(in, align, 4) < 4 || (sums && quads_width(out, out_align, 4) < 4)) return t;
  t.y_bytes = int(ceil_div(4 * kQuadsRows * t.planes * t.pitch, 128) * 128);
  t.stage_bytes = t.y_bytes + (sums ? int(ceil_div(16 * (kQuadsRows / stride) * t.planes * t.strips, 128) * 128) : 0);
  int64_t const all_units = (sums ? p.N * t.groups : t.groups) * t.out_H, sms = d.sm_count;
  t.units = sums ? p.N * t.out_H : all_units;
  t.resident = quads_blocks(R);
  // As measured: two blocks bring as much as memory has; a few long shares have fewer partial sums.
  if (stride == 2 || (sums && all_units < 128 * t.resident * sms)) t.resident = 2;
  for (; t.resident > 0; --t.resident) {
    t.stages = int(min64(kQuadsStages, (225 * 1024 / t.resident - 1200) / t.stage_bytes));
    if (t.stages >= 2) break;
  }
  if (t.resident == 0 || all_units >= int64_t(1) << 29 || p.H + p.pad_top + p.pad_bottom >= int64_t(1) << 29) return t;
  t.shared_bytes = int(max64(t.stages * t.stage_bytes, sums ? R * R * kQuadsReaders * 4 : 0));
  int64_t const slots = t.resident * sms, room = kMaxWorkspaceBytes / max64(p.C * R * R * 4, 1);
  t.shares = max64(1, sums ? min64(slots / t.groups, room) : slots);
  // Few rows a share are halo for the most part.
  t.used = t.units >= 14 * t.shares && t.shares * (sums ? t.groups : 1) * 10 >= slots * 8;
  double const each = double(t.units) / double(t.shares),
               steps = each * stride + (R - 1) * (0.4 + 0.8 * each / t.out_H);
  double const issue_ns = steps * (sums ? 1.05 : 1.0) * (4.0 * R * R / stride + 36) * t.resident / (R > 7 ? 1.04 : 1.3);
  double const memory_ns =
      double(p.N) * double(p.C) * (double(p.H) * double(p.W) + double(p.P()) * double(p.Q())) / 975 * 132 / d.sm_count;
  t.ns = (sums ? 14000 : 6500) + (memory_ns > issue_ns ? memory_ns : issue_ns);
  return t;
}

// The rows of stream have them.
constexpr bool takes_quads(Row const& row, Problem const& p) {
  return row.family == Family::stream && row.dtype == DType::f32 && quads_tile(row.tile_m, row.op, p, h200_sxm).used;
}

constexpr Estimate quads_estimate(Row const& row, Op op, Problem const& p) {
  QuadsTile const t = quads_tile(row.tile_m, op, p, h200_sxm);
  return {t.ns, op == Op::wgrad ? int(t.shares) : 1};
}

}  // namespace conv2d_ext
