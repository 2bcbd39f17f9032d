// Depthwise convolution of few outputs in channels_last, 5x5 and 7x7 with stride 1: what such a layer takes is a launch
// and the latency of memory, so that a thread asks at once for all inputs of its outputs, and a block for its filters.
// Lanes are neighbouring channels; a warp has some columns of one or two rows. dgrad is fprop with the filter turned
// round.
#pragma once

#include "../core/small.h"
#include "depthwise.cuh"

namespace conv2d_ext::depthwise {

struct SmallParams {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t in_n, in_h, in_w, out_n, out_h, out_w;
  int64_t w_k, w_r, w_s, bias_stride;
  int C, in_H, in_W, out_H, out_W, pad_h, pad_w;
  int groups, strips, chunks, units;
};

// An element in a register of its own: pairs of 16 bits would be put together one after the other, each behind its
// load.
template <class T>
using Raw = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
template <class T>
__device__ inline uint32_t load_raw(T const* from) {
  return __ldg(reinterpret_cast<Raw<T> const*>(from));
}
template <class T>
__device__ inline float widen_raw(uint32_t raw) {
  Raw<T> const bits = static_cast<Raw<T>>(raw);
  return widen(*reinterpret_cast<T const*>(&bits));
}

template <class T, int R, int rows>
__global__ void __launch_bounds__(kSmallThreads, R == 7 ? 3 : 4) small(__grid_constant__ SmallParams const p) {
  constexpr int taps = R * R, width = kSmallColumns, warps = kSmallThreads / 32, channels = 32;
  constexpr int each = (channels * taps + kSmallThreads - 1) / kSmallThreads;
  __shared__ float filters[channels * taps];
  int const group = int(blockIdx.x) % p.groups, c0 = group * channels, lane = int(threadIdx.x) % 32, c = c0 + lane;
  int const unit = int(blockIdx.x) / p.groups * warps + int(threadIdx.x) / 32;
  int const here = (p.C - c0 < channels ? p.C - c0 : channels) * taps;
  uint32_t part[each];
#pragma unroll
  for (int i = 0; i < each; ++i) {
    int const at = i * kSmallThreads + int(threadIdx.x), k = at / taps, tap = at % taps;
    part[i] =
        at < here ? load_raw(static_cast<T const*>(p.w) + (c0 + k) * p.w_k + tap / R * p.w_r + tap % R * p.w_s) : 0;
  }
  bool const exists = unit < p.units && c < p.C;
  int const rest = unit / p.strips, q0 = (unit - rest * p.strips) * width, n = rest / p.chunks;
  int const p0 = (rest - n * p.chunks) * rows, h0 = p0 - p.pad_h, w0 = q0 - p.pad_w;
  T const* const in = static_cast<T const*>(p.in) + n * p.in_n + h0 * p.in_h + w0 * p.in_w + c;
  uint32_t x[rows + R - 1][width + R - 1];
#pragma unroll
  for (int r = 0; r < rows + R - 1; ++r)
#pragma unroll
    for (int j = 0; j < width + R - 1; ++j)
      x[r][j] = exists && unsigned(h0 + r) < unsigned(p.in_H) && unsigned(w0 + j) < unsigned(p.in_W)
                    ? load_raw(in + r * p.in_h + j * p.in_w)
                    : 0;
  float const bias = exists && p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
#pragma unroll
  for (int i = 0; i < each; ++i)
    if (int const at = i * kSmallThreads + int(threadIdx.x); at < channels * taps) filters[at] = widen_raw<T>(part[i]);
  __syncthreads();
  float sum[rows][width];
#pragma unroll
  for (int i = 0; i < rows * width; ++i) sum[i / width][i % width] = bias;
#pragma unroll
  for (int r = 0; r < rows + R - 1; ++r) {
    float v[width + R - 1];
#pragma unroll
    for (int j = 0; j < width + R - 1; ++j) v[j] = widen_raw<T>(x[r][j]);
#pragma unroll
    for (int y = 0; y < rows; ++y) {
      if (r < y || r - y >= R) continue;
#pragma unroll
      for (int s = 0; s < R; ++s) {
        float const filter = filters[lane * taps + (r - y) * R + s];
#pragma unroll
        for (int e = 0; e < width; ++e) sum[y][e] = fmaf(v[e + s], filter, sum[y][e]);
      }
    }
  }
  T* const out = static_cast<T*>(p.out) + n * p.out_n + p0 * p.out_h + q0 * p.out_w + c;
#pragma unroll
  for (int y = 0; y < rows; ++y)
#pragma unroll
    for (int e = 0; e < width; ++e)
      if (exists && p0 + y < p.out_H && q0 + e < p.out_W) out[y * p.out_h + e * p.out_w] = narrow<T>(sum[y][e]);
}

// ---- host side

template <Op op, class T, int R>
cudaError_t launch_small(Problem const& problem, SmallTile const& t, Arguments const& args, cudaStream_t stream) {
  constexpr bool backward = op == Op::dgrad;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  SmallParams p{};
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride, p.out = args.out;
  p.in_n = in.n, p.in_h = in.h, p.in_w = in.w, p.out_n = out.n, p.out_h = out.h, p.out_w = out.w;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.C = int(problem.C);
  p.in_H = int(backward ? problem.P() : problem.H), p.in_W = int(backward ? problem.Q() : problem.W);
  p.out_H = int(backward ? problem.H : problem.P()), p.out_W = int(backward ? problem.W : problem.Q());
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  if (backward) {
    p.w = static_cast<T const*>(args.b) + (R - 1) * (p.w_r + p.w_s);
    p.w_r = -p.w_r, p.w_s = -p.w_s, p.pad_h = R - 1 - p.pad_h, p.pad_w = R - 1 - p.pad_w;
  }
  p.groups = int(t.groups), p.strips = int(t.strips), p.chunks = int(t.chunks), p.units = int(t.units);
  unsigned const blocks = unsigned(t.groups * ceil_div(t.units, kSmallThreads / 32));
  void (*const kernel)(SmallParams) = t.rows == 1 ? small<T, R, 1> : small<T, R, 2>;
  kernel<<<blocks, kSmallThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::depthwise
