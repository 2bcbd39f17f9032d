// Variant pointwise of tma: 1x1 filters over images whose pixels are contiguous, channel by channel, as in NCHW.
// Nothing is packed: the kernels of tma.cuh run another problem, the turned one, whose operands lie as they want them.
//   fprop   y[k, pixel] = sum over c of w[k, c] * x[c, pixel], for each image: dgrad's kernel with filters for pixels,
//           pixels for channels and images for groups, which all have the same A
//   dgrad   x[c, pixel] = sum over k of w[k, c] * y[k, pixel]: likewise, of filters packed with k contiguous
//   wgrad   w[k, c] = sum over images and pixels of y[k, pixel] * x[c, pixel]: fprop's kernel, with filters for pixels,
//           channels for filters, pixels for channels and images for taps
#pragma once

#include <cstdint>

#include "tma_tf32.h"

namespace conv2d_ext {

inline constexpr int kMaxTurnedTaps = 256;  // what an im2col copy's offset can say

constexpr Op turned_op(Op op) { return op == Op::wgrad ? Op::fprop : Op::dgrad; }

constexpr Problem turned(Op op, Problem const& p) {
  Problem t;
  t.dtype = p.dtype, t.allow_tf32 = p.allow_tf32;
  t.N = t.R = t.S = t.H = 1;
  int64_t const pixels = p.H * p.W;
  if (op == Op::wgrad) {
    t.C = pixels, t.H = t.R = p.N, t.W = p.K, t.K = p.C;
    t.x = {0, 1, p.y.n, p.y.c};
    t.w = {p.x.c, 1, p.x.n, 0};
    t.y = {0, 1, 0, p.w.n};
    return t;
  }
  bool const forward = op == Op::fprop;
  Strides const &in = forward ? p.x : p.y, &out = forward ? p.y : p.x;
  t.groups = p.N;
  t.C = pixels * p.N, t.W = forward ? p.K : p.C, t.K = (forward ? p.C : p.K) * p.N;
  t.y = {0, 1, 0, forward ? p.w.n : p.w.c};
  t.w = {in.c, 1, 0, 0};
  t.x = {out.n, 1, 0, out.c};  // n: from a group to the next
  return t;
}

// Can a channel's pixels be copied as one row?
constexpr bool pixel_vectors(Strides const& s, int align, Problem const& p) {
  int const v = 16 / size_of(p.dtype);
  bool const flat = p.H == 1 || p.W == 1 || s.h == p.W * s.w;
  auto stride = [&](int64_t size, int64_t step) {
    return size == 1 || (step > 0 && step % v == 0 && step * size_of(p.dtype) < int64_t(1) << 40);
  };
  return flat && (p.W == 1 ? s.h : s.w) == 1 && p.H * p.W % v == 0 && align >= 16 && stride(p.N, s.n);
}

constexpr bool pointwise_supports(Op op, Problem const& p) {
  if (p.R != 1 || p.S != 1 || p.stride_h != 1 || p.stride_w != 1 || p.groups != 1) return false;
  if (p.pad_top != 0 || p.pad_bottom != 0 || p.pad_left != 0 || p.pad_right != 0) return false;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0) return false;
  constexpr double most = double(int64_t(1) << 31);
  double const pixels = double(p.H) * double(p.W);
  if (pixels >= most || double(p.N) * double(p.C) >= most || double(p.N) * double(p.K) >= most) return false;
  if (pixels * double(p.N) * double(p.K + p.C) >= 4e12) return false;  // tiles are counted in 32 bits
  if (!pixel_vectors(p.x, p.x_align, p) || !pixel_vectors(p.y, p.y_align, p)) return false;
  int const v = 16 / size_of(p.dtype);
  auto rows = [&](int64_t size, int64_t step) { return size == 1 || (step > 0 && step % v == 0); };
  if (!rows(p.C, p.x.c) || !rows(p.K, p.y.c)) return false;
  if (op == Op::wgrad) return p.N <= kMaxTurnedTaps && channel_vectors(p.w, p.w_align, p.C, v, p.dtype);
  // Images follow each other as channels do; an instruction must not reduce channels of the next.
  bool const forward = op == Op::fprop;
  int64_t const depth = forward ? p.C : p.K;
  Strides const& in = forward ? p.x : p.y;
  if (depth % v != 0 || (p.N > 1 && (depth % tma_together(p.dtype) != 0 || in.n != depth * in.c))) return false;
  return (forward ? p.w.c : p.w.n) == 1 && (forward ? p.w.n : p.w.c) % v == 0 && p.w_align >= 16;
}

constexpr bool is_pointwise(Row const& row) { return row.variant == Variant::pointwise; }

constexpr Row turned(Row row) {
  row.op = turned_op(row.op);
  return row;
}

// What the turned problem's estimate leaves out, by rows, as measured.
constexpr double pointwise_more_ns(Row const& row) {
  if (row.tile_m == 128 && row.tile_n == 128) return row.op == Op::wgrad ? 1400 : 800;
  if (row.tile_m == 128 && row.tile_n == 64) return row.op == Op::wgrad ? 0 : -1500;
  if (row.tile_n == 64) return 1500;
  return row.tile_m == 256 && row.tile_n == 128 ? 800 : -300;
}

constexpr Estimate pointwise_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  Estimate e = tma_estimate(turned(row), turned_op(op), turned(op, p), d);
  double const bytes = double(p.N) * double(p.H) * double(p.W) * double(p.C + p.K) * size_of(p.dtype);
  e.ns += pointwise_more_ns(row);
  if (e.ns < bytes / 3500 + 3000) e.ns = bytes / 3500 + 3000;
  return e;
}

// Of any row of the family, by its variant.
constexpr bool in_place_supports(Row const& row, Problem const& p) {
  if (is_pointwise(row)) return pointwise_supports(row.op, p);
  return (p.dtype != DType::f32 || p.allow_tf32) && tma_supports(row, p);
}
constexpr Estimate in_place_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  if (is_pointwise(row)) return pointwise_estimate(row, op, p, d);
  bool const tf32 = p.dtype == DType::f32;
  if (op == Op::wgrad) return tf32 ? tf32_wgrad_estimate(row, p, d) : tma_wgrad_estimate(row, p, d);
  Estimate e = tf32 ? tf32_estimate(row, op, p) : tma_estimate(row, op, p, d);
  if (tma_stores_singly(op, p)) {
    double const elements = op == Op::fprop ? double(p.N) * double(p.K) * double(p.P()) * double(p.Q())
                                            : double(p.N) * double(p.C) * double(p.H) * double(p.W);
    // Lanes go along the pixels.
    bool const across = (op == Op::fprop ? p.y.c : p.x.c) == 1 && p.H * p.W > 1;
    e.ns += elements * (across ? (tf32 ? 0.01 : 0.016) : tf32 ? 0.0002 : 0.0007) * 132 / d.sm_count;
  }
  return e;
}
constexpr int64_t in_place_workspace_bytes(Row const& row, Problem const& p, int split_k, Device const& d) {
  if (is_pointwise(row)) return tma_workspace_bytes(turned(row), turned(row.op, p), split_k);
  return p.dtype == DType::f32 ? tf32_workspace_bytes(row, row.op, p, split_k) : tma_workspace_bytes(row, p, split_k);
}

}  // namespace conv2d_ext
