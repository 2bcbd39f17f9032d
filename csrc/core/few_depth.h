// few_depth.cuh: fprop and dgrad of 1x1 filters over planes in strict float32 whose sums have few products. What its
// rows take and cost, and what the launcher shares with the planner.
#pragma once

#include <cstdint>

#include "row.h"

namespace conv2d_ext {

constexpr bool is_few_depth(Row const& row) {
  return row.family == Family::pixels && row.variant == Variant::halo && row.op != Op::wgrad;
}

inline constexpr int kFewDepth = 16, kFewDepthThreads = 256, kFewDepthOutputs = 128;  // outputs of a block, at most

// What is read, and what is made, of a pixel.
struct FewDepth {
  Strides in, out;
  int in_align, out_align;
  int64_t depth, outputs, w_out, w_in;  // w_out, w_in: strides of the filters
  constexpr FewDepth(Op op, Problem const& p)
      : in(op == Op::fprop ? p.x : p.y),
        out(op == Op::fprop ? p.y : p.x),
        in_align(op == Op::fprop ? p.x_align : p.y_align),
        out_align(op == Op::fprop ? p.y_align : p.x_align),
        depth(op == Op::fprop ? p.C : p.K),
        outputs(op == Op::fprop ? p.K : p.C),
        w_out(op == Op::fprop ? p.w.n : p.w.c),
        w_in(op == Op::fprop ? p.w.c : p.w.n) {}

  // Pixels of a thread.
  constexpr int64_t vector(Problem const& p) const {
    bool const fours = p.H * p.W % 4 == 0 && in.n % 4 == 0 && in.c % 4 == 0 && out.n % 4 == 0 && out.c % 4 == 0 &&
                       in_align >= 16 && out_align >= 16;
    return fours ? 4 : 1;
  }
  constexpr int64_t blocks(Problem const& p) const {
    return ceil_div(p.N * p.H * p.W / vector(p), int64_t(kFewDepthThreads));
  }
  // Outputs of a block: few pixels share them out, to some four blocks an SM.
  constexpr int64_t share(Problem const& p, int sm_count) const {
    int64_t const wanted = ceil_div(int64_t(4) * sm_count, max64(blocks(p), 1));
    int64_t const parts =
        max64(ceil_div(outputs, int64_t(kFewDepthOutputs)), min64(ceil_div(outputs, int64_t(8)), wanted));
    return ceil_div(outputs, parts);
  }
};

constexpr bool few_depth_supports(Op op, Problem const& p) {
  if (p.dtype != DType::f32 || p.allow_tf32 || p.groups != 1 || p.R != 1 || p.S != 1) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.pad_top != 0 || p.pad_bottom != 0 || p.pad_left != 0 || p.pad_right != 0)
    return false;
  FewDepth const f(op, p);
  if (f.depth < 1 || f.depth > kFewDepth || f.outputs < 1 || p.N < 1 || p.H < 1 || p.W < 1) return false;
  auto plane = [&](Strides const& s) { return (p.W == 1 || s.w == 1) && (p.H == 1 || s.h == p.W); };
  if (!plane(f.in) || !plane(f.out)) return false;
  return double(p.N) * double(p.H) * double(p.W) < 1e9 && f.outputs <= 1 << 20;
}

// Bytes, or products by FMA. Fitted to 21 times (docs/tuning/strict.md).
constexpr Estimate few_depth_estimate(Op op, Problem const& p, Device const& d) {
  FewDepth const f(op, p);
  double const pixels = double(p.N) * double(p.H) * double(p.W), padded = f.depth > 8 ? 16 : 8;
  double const sms = double(d.sm_count) / 132;
  double const memory = pixels * double(f.depth + f.outputs) * 4 / (f.vector(p) == 4 ? 3900 : 2900) / sms,
               products = pixels * double(f.outputs) * padded / 13000 / sms;
  return {7000 + (memory > products ? memory + products * 0.1 : products + memory * 0.1), 1};
}

}  // namespace conv2d_ext
