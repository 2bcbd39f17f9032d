// Depthwise fprop of 3x3 and dgrad of 3x3 with stride 1 in channels_last, of layers that are small for column.cuh and
// large for depthwise_near.cuh, and of channels that have no vectors. A thread has V channels of some rows of
// neighbouring outputs and asks at once for all inputs that they meet: one wait for memory, which the SM's other
// threads hide. Neighbours are neighbours along the channels, then down the image (of few channels: along the rows), so
// that L1 has what they share. The block's filters come through shared memory meanwhile. dgrad is fprop with the filter
// turned round.
#pragma once

#include "../core/wide.h"
#include "depthwise_tile.cuh"
#include "depthwise_walk.cuh"

namespace conv2d_ext::depthwise {

struct WideParams {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t in_n, out_n, w_k, bias_stride;
  int in_h, in_w, out_h, out_w, w_r, w_s;
  int K, in_H, in_W, out_H, out_W, pad_h, pad_w;
  int words, slices;
  uint32_t threads;                              // of a slice
  bool dense, across;                            // dense: filters are one behind the other
  Divisor by_slices, by_words, by_near, by_far;  // near: that of neighbouring threads, of chunks and strips
};

template <class T, int stride, int V, bool turned>
__global__ void __launch_bounds__(kWideThreads) wide(__grid_constant__ WideParams const p) {
  constexpr int R = 3, taps = R * R, width = wide_columns(sizeof(T), stride, V), tall = wide_rows(sizeof(T), stride, V);
  constexpr int rows = (tall - 1) * stride + R, columns = (width - 1) * stride + R;
  using Word = typename Packed<T, V>::Word;
  __shared__ Word filters[kWideWords * taps];
  int const block = int(blockIdx.x), group = int(p.by_slices.quotient(block));
  int const c0 = (block - group * p.slices) * p.words * V;
  uint32_t const thread = uint32_t(group) * kWideThreads + threadIdx.x, unit = p.by_words.quotient(thread);
  int const word = int(thread - unit * p.words), c = c0 + word * V;
  uint32_t const line = p.by_near.quotient(unit);  // of all images
  int const n = int(p.by_far.quotient(line));
  int const near = int(unit - line * p.by_near.value), far = int(line - uint32_t(n) * p.by_far.value);
  int const y0 = (p.across ? far : near) * tall, x0 = (p.across ? near : far) * width;
  int const h0 = y0 * stride - p.pad_h, w0 = x0 * stride - p.pad_w;
  bool const exists = thread < p.threads && c < p.K;
  T const* const in = static_cast<T const*>(p.in) + n * p.in_n + (h0 * p.in_h + w0 * p.in_w + c);
  auto at = [&](int r, int j) { return __ldg(reinterpret_cast<Word const*>(in + (r * p.in_h + j * p.in_w))); };
  Packed<T, V> x[rows][columns];
  if (exists && h0 >= 0 && h0 + rows <= p.in_H && w0 >= 0 && w0 + columns <= p.in_W) {
#pragma unroll
    for (int i = 0; i < rows * columns; ++i) x[i / columns][i % columns].word = at(i / columns, i % columns);
  } else {
    int const H = exists ? p.in_H : 0;
#pragma unroll
    for (int i = 0; i < rows * columns; ++i) {
      int const r = i / columns, j = i % columns;
      x[r][j].clear();
      if (unsigned(h0 + r) < unsigned(H) && unsigned(w0 + j) < unsigned(p.in_W)) x[r][j].word = at(r, j);
    }
  }
  int const here = min(p.words * V, p.K - c0) * taps;
  if (p.dense) {
    Word const* const w = reinterpret_cast<Word const*>(static_cast<T const*>(p.w) + int64_t(c0) * taps);
    constexpr int most = (kWideWords * taps + kWideThreads - 1) / kWideThreads;
#pragma unroll
    for (int k = 0; k < most; ++k)
      if (int const i = int(threadIdx.x) + k * kWideThreads; i < here / V) filters[i] = __ldg(w + i);
  } else {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < here; i += kWideThreads)
      reinterpret_cast<T*>(filters)[i] =
          static_cast<T const*>(p.w)[(c0 + i / taps) * p.w_k + i % taps / R * p.w_r + i % R * p.w_s];
  }
  float sum[tall][width][V];
#pragma unroll
  for (int e = 0; e < V; ++e) {
    float const bias =
        p.bias != nullptr && exists ? widen(static_cast<T const*>(p.bias)[(c + e) * p.bias_stride]) : 0.f;
#pragma unroll
    for (int i = 0; i < tall * width; ++i) sum[i / width][i % width][e] = bias;
  }
  __syncthreads();
  Packed<T, V> words[taps];  // the taps of a channel, then the next one's
#pragma unroll
  for (int i = 0; i < taps; ++i) words[i].word = filters[word * taps + i];
  auto tap = [&](int r, int s, int e) {
    int const i = e * taps + (turned ? taps - 1 - (r * R + s) : r * R + s);
    return widen(reinterpret_cast<Vector<T, V> const&>(words[i / V].word).v[i % V]);
  };
#pragma unroll
  for (int r = 0; r < rows; ++r)
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      float v[V];
      x[r][j].widen_to(v);
#pragma unroll
      for (int a = 0; a < tall; ++a)
#pragma unroll
        for (int b = 0; b < width; ++b) {
          int const tap_r = r - a * stride, tap_s = j - b * stride;
          if (tap_r < 0 || tap_r >= R || tap_s < 0 || tap_s >= R) continue;
#pragma unroll
          for (int e = 0; e < V; ++e) sum[a][b][e] = fmaf(v[e], tap(tap_r, tap_s, e), sum[a][b][e]);
        }
    }
  if (!exists) return;
  T* const out = static_cast<T*>(p.out) + n * p.out_n + (y0 * p.out_h + x0 * p.out_w + c);
#pragma unroll
  for (int i = 0; i < tall * width; ++i)
    if (int const a = i / width, b = i % width; y0 + a < p.out_H && x0 + b < p.out_W)
      Packed<T, V>::store(out + a * p.out_h + b * p.out_w, sum[a][b]);
}

// ---- host side

template <Op op, class T, int stride>
cudaError_t launch_wide(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  constexpr bool turned = op == Op::dgrad;
  static_assert(op == Op::fprop || (turned && stride == 1));
  WideTile const t = wide_tile(op, problem, stride, h200_sxm);
  if (!t.used) return cudaErrorInvalidValue;
  Strides const &in = turned ? problem.y : problem.x, &out = turned ? problem.x : problem.y;
  WideParams p{};
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride, p.out = args.out;
  p.in_n = in.n, p.in_h = int(in.h), p.in_w = int(in.w), p.out_n = out.n, p.out_h = int(out.h), p.out_w = int(out.w);
  p.w_k = problem.w.n, p.w_r = int(problem.w.h), p.w_s = int(problem.w.w);
  p.dense = (problem.K == 1 || p.w_k == 9) && p.w_r == 3 && p.w_s == 1 && problem.w_align >= 8;
  p.K = int(problem.K);
  p.in_H = int(turned ? problem.P() : problem.H), p.in_W = int(turned ? problem.Q() : problem.W);
  p.out_H = int(turned ? problem.H : problem.P()), p.out_W = int(turned ? problem.W : problem.Q());
  p.pad_h = int(turned ? 2 - problem.pad_top : problem.pad_top);
  p.pad_w = int(turned ? 2 - problem.pad_left : problem.pad_left);
  p.words = t.words, p.slices = int(t.slices), p.across = t.across;
  p.threads = uint32_t(t.threads);
  p.by_slices = Divisor(uint32_t(t.slices)), p.by_words = Divisor(uint32_t(t.words));
  p.by_near = Divisor(uint32_t(t.across ? t.strips : t.chunks));
  p.by_far = Divisor(uint32_t(t.across ? t.chunks : t.strips));
  constexpr int most = 8 / int(sizeof(T));
  void (*kernel)(WideParams) = wide<T, stride, most, turned>;
  if constexpr (most > 2)
    if (t.vector == 2) kernel = wide<T, stride, 2, turned>;
  if (t.vector == 1) kernel = wide<T, stride, 1, turned>;
  kernel<<<unsigned(ceil_div(t.threads, kWideThreads) * t.slices), kWideThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::depthwise
