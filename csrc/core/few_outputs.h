// Depthwise fprop and dgrad of few outputs in channels_last, any filter (cuda/depthwise_few_outputs.cuh): which, its
// tile, shared by the planner and the launcher, and what it costs.
#pragma once

#include "row.h"

namespace conv2d_ext {

inline constexpr int kFewOutputsThreads = 512, kFewOutputsColumns = 4;  // of a block, at most; outputs of a thread
inline constexpr int64_t kFewOutputsBytes = 200 * 1024;                 // of shared memory, at most
inline constexpr int64_t kFewOutputsTaps = 121;                         // of a filter, at most: one chain of products
inline constexpr int64_t kFewOutputsExtent = 1 << 14;                   // strides, dilations and padding, at most

constexpr bool is_few_outputs(Row const& row) {
  return row.family == Family::depthwise && row.op != Op::wgrad && row.tile_m == 0 && row.tile_n == kFewOutputsColumns;
}

struct FewOutputsTile {
  bool used = false;
  // The instance: inputs from an output to the next, which share what they meet (0: any, and they share nothing); taps
  // of all rows (0: any).
  int step = 0, taps = 0;
  int lanes = 32;                 // threads side by side along the channels, 4 bytes each
  int band = 1, groups = 1;       // rows of outputs of a block; a row's groups of outputs of a thread
  int left = 0, pitch = 1;        // of a row of inputs in shared memory: zeros before it, pixels in all
  int first = 0, rows = 1;        // of inputs that a band meets: the first band's first, which may be outside; how many
  int threads = 32;               // of a block
  int64_t slices = 1, bands = 1;  // blocks along the channels; of an image
  int64_t bytes_x = 0, bytes_w = 0;  // of shared memory
  double ns = 0;
};

constexpr FewOutputsTile few_outputs_tile(Op op, Problem const& p, Device const& d) {
  FewOutputsTile t, best;
  bool const backward = op == Op::dgrad;
  int const size = size_of(p.dtype), vector = 16 / size;
  int64_t const P = p.P(), Q = p.Q();
  if (p.C_per_group() != 1 || p.K != p.C || p.dtype == DType::f64 || op == Op::wgrad) return t;
  if (p.N <= 0 || p.C <= 0 || p.H <= 0 || p.W <= 0 || P <= 0 || Q <= 0) return t;
  if (max64(max64(p.stride_h, p.stride_w), max64(p.dilation_h, p.dilation_w)) > kFewOutputsExtent ||
      max64(p.pad_top, p.pad_left) > kFewOutputsExtent || max64(p.R, p.S) > kFewOutputsTaps)
    return t;
  if (p.R * p.S > kFewOutputsTaps || p.N >= 1 << 16 || max64(max64(p.H, p.W), max64(P, Q)) > kFewOutputsExtent)
    return t;
  int64_t const dilation_h = p.R == 1 ? 1 : p.dilation_h, dilation_w = p.S == 1 ? 1 : p.dilation_w;
  if ((p.C > 1 && p.w.n != p.R * p.S) || (p.R > 1 && p.w.h != p.S) || (p.S > 1 && p.w.w != 1) || p.w_align < 16)
    return t;
  // As measured; the kernel takes any filter, stride and dilation (dgrad: one of the two).
  if (p.R != p.S || p.R > 7 || p.stride_h != p.stride_w || p.stride_h > 2 || dilation_h > 1 || dilation_w > 1) return t;
  if (double(p.N) * double(p.C) * double(max64(p.H * p.W, P * Q)) > 1.25e6) return t;
  if (!channel_vectors(p.x, p.x_align, p.C, vector, p.dtype) || !channel_vectors(p.y, p.y_align, p.C, vector, p.dtype))
    return t;
  int64_t const out_H = backward ? p.H : P, out_W = backward ? p.W : Q, in_H = backward ? P : p.H,
                in_W = backward ? Q : p.W;
  constexpr int64_t most = int64_t(1) << 30;
  Strides const& in = backward ? p.y : p.x;
  if (double(in.h) * double(in_H) * size > double(most) || double(in.w) * double(in_W) * size > double(most)) return t;
  // Columns of inputs that a row of outputs meets.
  int64_t const steps = backward ? p.stride_w : 1;  // from a thread's output to the next
  int64_t const runs = ceil_div(ceil_div(out_W, steps), kFewOutputsColumns), last = runs * kFewOutputsColumns - 1;
  int64_t const reach = (p.S - 1) * dilation_w;
  int64_t const low = backward ? (reach > p.pad_left ? -ceil_div(reach - p.pad_left, p.stride_w) : 0) : -p.pad_left;
  int64_t const high =
      backward ? last + (p.stride_w - 1 + p.pad_left) / p.stride_w : last * p.stride_w - p.pad_left + reach;
  t.groups = int(runs * steps), t.left = int(-low);
  t.pitch = int(t.left + max64(in_W, high + 1));
  bool const unit = p.stride_w == 1 && dilation_w == 1, odd = p.S == 3 || p.S == 5 || p.S == 7;
  t.step = backward                                               ? (p.stride_w > 1 || unit ? 1 : 0)
           : unit                                                 ? 1
           : p.stride_w == 2 && dilation_w == 1 && odd && p.S < 7 ? 2
                                                                  : 0;
  t.taps = (unit || t.step == 2) && odd ? int(p.S) : 0;
  int64_t const phases = backward ? p.stride_h : 1;  // a band has whole ones
  for (t.lanes = 32; t.lanes >= 8; t.lanes /= 2) {
    int64_t const channels = t.lanes * 4 / size, line = t.lanes * 4;
    t.slices = ceil_div(p.C, channels);
    t.bytes_w = ceil_div(channels * p.R * p.S * size, 16) * 16;
    for (int64_t bands = 1; bands <= out_H; ++bands) {
      t.band = int(ceil_div(ceil_div(out_H, bands), phases) * phases), t.bands = ceil_div(out_H, t.band);
      if (t.bands < bands) continue;
      int64_t const met = (p.R - 1) * dilation_h;
      t.first = int(backward ? -((met - p.pad_top) / p.stride_h) : -p.pad_top);
      t.rows =
          int(backward ? (t.band - 1 + p.pad_top) / p.stride_h - t.first + 1 : (t.band - 1) * p.stride_h + met + 1);
      t.bytes_x = min64(t.rows, in_H) * t.pitch * line;
      if (t.bytes_x + t.bytes_w > kFewOutputsBytes || t.bands >= 1 << 16) continue;
      int64_t const workers = int64_t(t.band) * t.groups * t.lanes, pieces = (t.bytes_x + t.bytes_w) / 16;
      t.threads = int(min64(kFewOutputsThreads, ceil_div(max64(max64(64, workers), ceil_div(pieces, 4)), 32) * 32));
      // As measured: of an SM, what it copies, and the instructions of its threads; lines of less than 128 bytes.
      int64_t const blocks = t.slices * t.bands * p.N, rounds = ceil_div(blocks, d.sm_count);
      double const share = double(blocks) / d.sm_count;
      double const items = double(ceil_div(workers, t.threads)), rows = double(ceil_div(p.R, phases));
      double const taps = rows * double(ceil_div(p.S, steps)) * 5 * 4 / size;
      double const thread = double(ceil_div(pieces, t.threads)) * 20 + items * (taps + rows * 20 + 228);
      double const issue = double(rounds) * t.threads / 32 * thread / 4, chain = thread * 2.77;
      t.ns = 5980 + 0.015 * double(t.bytes_x + t.bytes_w) * (share > 1 ? share : 1) +
             (issue > chain ? issue : chain) / 1.755 + 130 * (32 / t.lanes - 1);
      t.used = true;
      if (!best.used || t.ns < best.ns) best = t;
    }
  }
  // Larger layers: by the memory's time at least; what they take was not measured.
  double const memory_ns = double(p.N) * double(p.C) * (double(p.H) * double(p.W) + double(P) * double(Q)) * size /
                           (3300.0 * d.sm_count / 132);
  if (best.ns < 5500 + 1.2 * memory_ns) best.ns = 5500 + 1.2 * memory_ns;
  if (best.ns > 9000) best.ns += (best.ns - 9000) * 0.5;
  return best;
}

constexpr bool few_outputs_supports(Row const& row, Problem const& p) {
  return few_outputs_tile(row.op, p, h200_sxm).used;
}

constexpr Estimate few_outputs_estimate(Row const& row, Problem const& p, Device const& d) {
  return {few_outputs_tile(row.op, p, d).ns, 1};
}

}  // namespace conv2d_ext
