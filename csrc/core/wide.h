// Depthwise layers of medium size in channels_last (cuda/depthwise_wide.cuh): which, their tile, shared by the planner
// and the launcher, and what they cost.
#pragma once

#include "walk.h"

namespace conv2d_ext {

inline constexpr int kWideThreads = 128, kWideWords = 64;  // of a block: threads; words of channels, at most

// Of a thread: neighbouring outputs of a row, and rows.
constexpr int wide_columns(int size, int stride, int vector) {
  return vector > 1 || (stride == 1 && size == 2) ? 4 : stride == 2 ? 1 : 2;
}
constexpr int wide_rows(int size, int stride, int vector) {
  return vector == 1 ? 4 : stride == 2 ? 1 : vector * size == 4 ? 4 : 2;
}

struct WideTile {
  bool used = false, across = false;  // across: neighbouring threads are along the rows, not down the image
  int vector = 1, words = 1;          // channels of a thread; words of channels of a block
  int64_t slices = 1, chunks = 1, strips = 1, threads = 0;  // threads: of a slice
  double ns = 0;
};

// 3x3, K == C: fprop, and dgrad with stride 1.
constexpr WideTile wide_tile(Op op, Problem const& p, int stride, Device const& d) {
  WideTile t;
  int const size = size_of(p.dtype);
  if (!walks(op, p) || p.K != p.C || op == Op::wgrad || (op == Op::dgrad && stride != 1)) return t;
  for (int v = 2; v <= 8 / size; v *= 2)
    if (channel_vectors(p.x, p.x_align, p.C, v, p.dtype) && channel_vectors(p.y, p.y_align, p.C, v, p.dtype))
      t.vector = v;
  int64_t const H = op == Op::dgrad ? p.H : p.P(), W = op == Op::dgrad ? p.W : p.Q(), words = p.C / t.vector;
  t.chunks = ceil_div(H, wide_rows(size, stride, t.vector)),
  t.strips = ceil_div(W, wide_columns(size, stride, t.vector));
  // Few words, so that blocks reach down the image; but whole lines of memory, and few idle threads.
  t.slices = ceil_div(words, kWideWords), t.words = int(ceil_div(words, t.slices));
  if (100 * ceil_div(words, 16) * 16 <= 112 * words && words > 16) t.words = 16;
  t.slices = ceil_div(words, t.words), t.across = t.vector == 1 || t.words * t.vector * size < 64;
  // Offsets in an image and in a filter are int, and quotients are of numbers whose product with the divisor is below
  // 2^32.
  auto reach = [](Strides const& s, int64_t rows, int64_t columns) constexpr {
    return double(rows + 8) * double(s.h) + double(columns + 16) * double(s.w);
  };
  double const units = double(p.N) * double(t.chunks * t.strips), threads = units * t.words;
  if (reach(p.x, p.H, p.W) >= 1e9 || reach(p.y, p.P(), p.Q()) >= 1e9 || max64(p.w.h, p.w.w) >= int64_t(1) << 28 ||
      (threads + 128) * t.words >= 4e9 || (units + 128) * double(max64(t.chunks, t.strips)) >= 4e9 ||
      (threads / kWideThreads + 1) * double(t.slices * t.slices) >= 2e9)
    return t;
  t.used = true, t.threads = p.N * t.chunks * t.strips * t.words;
  // As measured: threads of s1 issue at their best, and bytes of s2 come as fast as they can.
  int const outputs = t.vector * wide_columns(size, stride, t.vector) * wide_rows(size, stride, t.vector);
  double const made = threads * double(t.slices) * outputs, sms = 132.0 / d.sm_count,
               exist = double(p.N) * double(p.C) * double(H) * double(W);
  bool const whole = t.vector * size == 8, f32 = size == 4;
  if (t.vector == 1)
    t.ns = stride == 2 ? 7000 + (f32 ? 5.2e-3 : 3.85e-3) * made * sms : 6500 + (f32 ? 2.45e-3 : 2.05e-3) * made * sms;
  else if (stride == 2)
    t.ns = f32 ? 8200 + 4.63e-3 * exist * sms : 9300 + (whole ? 2.45e-3 : 2.67e-3) * exist * sms;
  else
    t.ns = 6500 + (f32 ? 2.1e-3 : whole ? 1.42e-3 : 1.5e-3) * made * sms;
  return t;
}

}  // namespace conv2d_ext
