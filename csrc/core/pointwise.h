// Variant pointwise of tma: 1x1 filters over images whose pixels are contiguous, channel by channel, as in NCHW.
// Images are not packed: the kernels of tma.cuh run another problem, the turned one, whose operands lie as they want
// them.
//   fprop   y[k, pixel] = sum over c of w[k, c] * x[c, pixel], for each image: dgrad's kernel with filters for pixels,
//           pixels for channels and images for groups, which all have the same A; a tile's columns are runs of 64
//           pixels of one image or several
//   dgrad   x[c, pixel] = sum over k of w[k, c] * y[k, pixel]: likewise, with A's rows contiguous
#pragma once

#include <cstdint>

#include "tma_tf32.h"

namespace conv2d_ext {

inline constexpr int kMaxWgradImages = 256;

// May the copy engine read the filters as A with contiguous k (lines), or with contiguous rows?
constexpr bool turned_lines(Op op, Problem const& p) {
  bool const forward = op == Op::fprop;
  return (forward ? p.w.c : p.w.n) == 1 && (forward ? p.w.n : p.w.c) % (16 / size_of(p.dtype)) == 0 && p.w_align >= 16;
}
constexpr bool turned_rows(Op op, Problem const& p) {
  bool const forward = op == Op::fprop;
  return (forward ? p.w.n : p.w.c) == 1 && (forward ? p.w.c : p.w.n) % (16 / size_of(p.dtype)) == 0 && p.w_align >= 16;
}

constexpr Problem turned(Op op, Problem const& p) {
  Problem t;
  t.dtype = p.dtype, t.allow_tf32 = p.allow_tf32;
  t.N = t.R = t.S = t.H = 1;
  int64_t const pixels = p.H * p.W;
  bool const forward = op == Op::fprop;
  Strides const &in = forward ? p.x : p.y, &out = forward ? p.y : p.x;
  t.groups = p.N;
  t.C = pixels * p.N, t.W = forward ? p.K : p.C, t.K = (forward ? p.C : p.K) * p.N;
  t.y = turned_lines(op, p) ? Strides{0, 1, 0, forward ? p.w.n : p.w.c} : Strides{0, forward ? p.w.c : p.w.n, 0, 1};
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
  // Also those of small images.
  if (double(p.N) * double(ceil_div(p.H * p.W, 64)) * double(ceil_div(max64(p.C, p.K), 64)) >= most) return false;
  if (!pixel_vectors(p.x, p.x_align, p) || !pixel_vectors(p.y, p.y_align, p)) return false;
  int const v = 16 / size_of(p.dtype);
  auto rows = [&](int64_t size, int64_t step) { return size == 1 || (step > 0 && step % v == 0); };
  if (!rows(p.C, p.x.c) || !rows(p.K, p.y.c)) return false;
  if (op == Op::wgrad)  // by lean rows
    return p.N <= kMaxWgradImages && channel_vectors(p.w, p.w_align, p.C, v, p.dtype);
  if (double(p.N) * double(ceil_div(p.H * p.W, 64)) * 64 >= most) return false;  // columns
  if (!map_supports(p.w, p.K, 1, 1, p.dtype)) return false;
  // Images follow each other as channels do; the copy engine puts zeros behind the channels of one.
  bool const forward = op == Op::fprop;
  Strides const& in = forward ? p.x : p.y;
  if (p.N > 1 && in.n != (forward ? p.C : p.K) * in.c) return false;
  return turned_lines(op, p) || turned_rows(op, p);
}

constexpr bool is_pointwise(Row const& row) { return row.variant == Variant::pointwise; }

constexpr Row turned(Row row) {
  row.op = Op::dgrad;
  return row;
}

}  // namespace conv2d_ext
