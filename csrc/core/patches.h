// Depthwise filters that don't meet, in NCHW (cuda/depthwise_patches.cuh): which, their tiles, shared by the planner
// and the launcher, and what they cost.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

inline constexpr int kPatchesThreads = 256;  // of a block, each with a column of taps
inline constexpr int kPatchesOutputs = 4;    // of fprop and dgrad, below each other, of a thread, or one
inline constexpr int kPatchesTaps = 8;       // of wgrad, of a thread, at most

struct PatchesTile {
  bool used = false;
  int stride_h = 1, stride_w = 1;  // those of one output may be smaller than the filter
  int outputs = 1;                 // columns of them of a block
  int rows = 1;                    // of outputs of a thread; wgrad: of taps
  int64_t groups = 1;              // of such rows
  int64_t items = 1;               // of all planes: columns of outputs; dgrad: of x; wgrad: of a channel: images
  int lines = 1;                   // wgrad: images of a block at a time
  int split_k = 1;
  int64_t blocks = 1;
  double ns = 0;
};

constexpr PatchesTile patches_tile(Op op, Problem const& p, Device const& d) {
  PatchesTile t;
  bool const backward = op == Op::dgrad;
  if (p.N == 0 || p.C == 0 || p.H == 0 || p.W == 0 || p.P() <= 0 || p.Q() <= 0) return t;
  int64_t const stride_h = p.P() == 1 ? max64(p.stride_h, p.R) : p.stride_h;
  int64_t const stride_w = p.Q() == 1 ? max64(p.stride_w, p.S) : p.stride_w;
  if (stride_h < p.R || stride_w < p.S || p.S < 2 || p.S > kPatchesThreads || (backward && p.K != p.C)) return t;
  if ((p.R > 1 && p.dilation_h != 1) || p.dilation_w != 1 || p.pad_top < 0 || p.pad_left < 0) return t;
  // As measured: others are faster for wgrad, and fprop of few taps, where there is more than one output.
  if (p.P() * p.Q() > 1 && (op == Op::wgrad || (op == Op::fprop && p.S < 5))) return t;
  double const outputs = double(p.N) * double(p.K) * double(p.P()) * double(p.Q());
  double const inputs = double(p.N) * double(p.C) * double(p.H) * double(p.W);
  constexpr double most = double(1 << 30);
  constexpr int64_t far = int64_t(1) << 24;
  if (outputs > most || inputs > most || p.R > far || stride_h > far || stride_w > far) return t;
  t.stride_h = int(stride_h), t.stride_w = int(stride_w), t.outputs = int(kPatchesThreads / p.S);
  // As measured: instructions of all warps.
  double instructions = 0;
  constexpr double warps = kPatchesThreads / 32;
  if (op == Op::wgrad) {
    t.items = p.N, t.groups = ceil_div(p.R, kPatchesTaps), t.rows = int(ceil_div(p.R, t.groups));
    t.lines = int(min64(t.outputs, p.N));
    int64_t const blocks = p.K * t.groups, room = max64(1, kMaxWorkspaceBytes / (p.K * p.R * p.S * 8));
    int64_t const share = ceil_div(p.N, 4 * t.lines);  // a thread has four images at least
    t.split_k = int(min64(min64(share, room), max64(1, 6 * d.sm_count / blocks)));
    t.blocks = blocks * t.split_k;
    instructions =
        warps * (double(blocks) * double(ceil_div(p.N, t.lines)) * (24 + 8.0 * t.rows) + 300.0 * double(t.blocks));
  } else {
    // Of dgrad those of x, with what lies behind the last patch.
    int64_t const rows = backward ? ceil_div(p.H + p.pad_top, stride_h) : p.P();
    auto of_a_thread = [&](int count) {
      return backward ? 70 + 10.0 * count : 90 + double(p.R) * (5 + 7.0 * count) + 2.0 * count * double(p.S);
    };
    double const four = double(ceil_div(rows, kPatchesOutputs)) * of_a_thread(kPatchesOutputs);
    bool const many = backward || outputs * double(p.S) > 4e5;
    if (many && four < double(rows) * of_a_thread(1)) t.rows = kPatchesOutputs;
    t.groups = ceil_div(rows, t.rows), t.items = p.N * p.K * t.groups * (backward ? stride_h * p.W : p.Q());
    t.blocks = ceil_div(t.items, backward ? kPatchesThreads : t.outputs);
    instructions = double(t.blocks) * warps * of_a_thread(t.rows);
  }
  t.used = t.items < int64_t(1) << 30;
  double const memory_ns = (inputs + outputs) * size_of(p.dtype) / (3500.0 * d.sm_count / 132);
  double const work_ns = instructions / (4 * 1.755 * 0.6 * d.sm_count);
  // Columns of few 16-bit taps take longer beside few.h's.
  bool const few = op == Op::fprop && size_of(p.dtype) == 2 && p.S < 8 && t.rows > 1;
  t.ns = 5500 + (t.rows > 1 ? 500 : 0) + overlapped(memory_ns, work_ns) * (few ? 1.35 : 1.0);
  if (t.split_k > 1) t.ns += 3000 + double(p.K * p.R * p.S) * t.split_k * 8 / 2500;
  return t;
}

}  // namespace conv2d_ext
