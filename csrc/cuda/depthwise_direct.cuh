// Depthwise convolution of few outputs, in any strides: what such a layer takes is a launch and the latency of memory,
// so every thread asks at once for all that it needs. fprop and dgrad: a thread has some neighbouring columns of a row
// of outputs. wgrad: a block has one channel (channels_last: 32) and adds up all pixels.
#pragma once

#include "../core/direct.h"
#include "depthwise.cuh"

namespace conv2d_ext::depthwise {

struct DirectParams {
  void const* in;  // wgrad: x
  void const* w;   // wgrad: y
  void const* bias;
  void* out;
  int64_t in_n, in_c, in_h, in_w, out_n, out_c, out_h, out_w;  // wgrad: out: of y
  int64_t w_k, w_r, w_s, bias_stride;
  int N, C, in_H, in_W, out_H, out_W, pad_h, pad_w, strips;
  uint32_t threads;
};

// A thread's outputs: columns x0 to x0 + 3 of row y. Lanes are neighbouring channels, or strips of rows.
struct DirectPlace {
  int n, c, y, x0;

  __device__ DirectPlace(DirectParams const& p, uint32_t i, bool nhwc) {
    uint32_t const inner = nhwc ? p.C : p.strips, next = i / inner;
    uint32_t const first = i - next * inner, middle = nhwc ? p.strips : p.out_H, third = next / middle;
    uint32_t const second = next - third * middle, outer = nhwc ? p.out_H : p.C;
    n = int(third / outer);
    int const last = int(third - n * outer);
    c = nhwc ? int(first) : last, y = nhwc ? last : int(second);
    x0 = (nhwc ? int(second) : int(first)) * kDirectColumns;
  }
};

// dgrad with a stride of 1 is fprop with the filter turned round. `spread`: dgrad with stride 2; a row of x meets every
// second row of the filter.
template <class T, int R, int stride, bool spread, bool nhwc>
__global__ void __launch_bounds__(kDirectThreads) direct(__grid_constant__ DirectParams const p) {
  constexpr int rows = spread ? (R + 1) / 2 : R;
  constexpr int before = spread ? (R - 1) / 2 : 0;  // columns of y before that of the first output and tap 0
  constexpr int columns = spread ? before + (kDirectColumns + 1) / 2 : (kDirectColumns - 1) * stride + R;
  uint32_t const i = blockIdx.x * kDirectThreads + threadIdx.x;
  if (i >= p.threads) return;
  DirectPlace at(p, i, nhwc);
  if (spread) at.x0 -= p.pad_w % 2;
  int const odd = spread ? (at.y + p.pad_h) % 2 : 0;
  int const h0 = spread ? (at.y + p.pad_h - odd) / 2 : at.y * stride - p.pad_h;
  int const w0 = spread ? (at.x0 + p.pad_w) / 2 - before : at.x0 * stride - p.pad_w;
  T const* const in = static_cast<T const*>(p.in) + at.n * p.in_n + at.c * p.in_c + h0 * p.in_h + w0 * p.in_w;
  T const* const w = static_cast<T const*>(p.w) + at.c * p.w_k;
  T filter[rows][R], x[rows][columns];
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    bool const row = unsigned(spread ? h0 - r : h0 + r) < unsigned(p.in_H);
    T const* const from = in + (spread ? -r : r) * p.in_h;
#pragma unroll
    for (int j = 0; j < columns; ++j)
      x[r][j] = row && unsigned(w0 + j) < unsigned(p.in_W) ? __ldg(from + j * p.in_w) : narrow<T>(0.f);
  }
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    int const tap = spread ? 2 * r + odd : r;
#pragma unroll
    for (int s = 0; s < R; ++s) filter[r][s] = !spread || tap < R ? __ldg(w + tap * p.w_r + s * p.w_s) : narrow<T>(0.f);
  }
  float const bias = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[at.c * p.bias_stride]) : 0.f;
  float sum[kDirectColumns];
#pragma unroll
  for (int e = 0; e < kDirectColumns; ++e) sum[e] = bias;
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    if (spread && 2 * r + odd >= R) continue;
#pragma unroll
    for (int e = 0; e < kDirectColumns; ++e)
#pragma unroll
      for (int s = spread ? e % 2 : 0; s < R; s += spread ? 2 : 1)
        sum[e] = fmaf(widen(x[r][spread ? before + (e - s) / 2 : e * stride + s]), widen(filter[r][s]), sum[e]);
  }
  T* const out = static_cast<T*>(p.out) + at.n * p.out_n + at.c * p.out_c + at.y * p.out_h + at.x0 * p.out_w;
#pragma unroll
  for (int e = 0; e < kDirectColumns; ++e)
    if (unsigned(at.x0 + e) < unsigned(p.out_W)) out[e * p.out_w] = narrow<T>(sum[e]);
}

// Threads of a block, as shared memory allows.
constexpr int direct_sums_threads(int R, bool nhwc) { return nhwc ? (R == 3 ? 512 : R == 5 ? 256 : 128) : 128; }

// Lanes are pixels of the block's channel; channels_last: channels, and warps are pixels.
template <class T, int R, int stride, bool nhwc>
__global__ void __launch_bounds__(direct_sums_threads(R, nhwc)) direct_wgrad(__grid_constant__ DirectParams const p) {
  constexpr int taps = R * R, warps = direct_sums_threads(R, nhwc) / 32;
  __shared__ float sums[warps][nhwc ? taps : 1][nhwc ? 32 : taps];
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int const c = nhwc ? int(blockIdx.x) * 32 + lane : int(blockIdx.x);
  int const area = p.out_H * p.out_W, pixels = c < p.C ? p.N * area : 0;
  T const* const x = static_cast<T const*>(p.in) + c * p.in_c;
  T const* const y = static_cast<T const*>(p.w) + c * p.out_c;
  float acc[R][R] = {};
#pragma unroll 1
  for (int i = nhwc ? warp : int(threadIdx.x); i < pixels; i += nhwc ? warps : 32 * warps) {
    int const n = i / area, rest = i - n * area, row = rest / p.out_W, column = rest - row * p.out_W;
    int const h0 = row * stride - p.pad_h, w0 = column * stride - p.pad_w;
    float const gradient = widen(__ldg(y + n * p.out_n + row * p.out_h + column * p.out_w));
    T const* const from = x + n * p.in_n + h0 * p.in_h + w0 * p.in_w;
    T v[R][R];
    bool have[R][R];
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int s = 0; s < R; ++s) {
        have[r][s] = unsigned(h0 + r) < unsigned(p.in_H) && unsigned(w0 + s) < unsigned(p.in_W);
        v[r][s] = have[r][s] ? __ldg(from + r * p.in_h + s * p.in_w) : narrow<T>(0.f);
      }
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int s = 0; s < R; ++s)
        if (have[r][s]) acc[r][s] = fmaf(widen(v[r][s]), gradient, acc[r][s]);
  }
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) {
    float v = acc[tap / R][tap % R];
    if constexpr (nhwc) {
      sums[warp][tap][lane] = v;
    } else {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
      if (lane == 0) sums[warp][0][tap] = v;
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < taps * (nhwc ? 32 : 1); i += blockDim.x) {
    int const tap = nhwc ? i / 32 : i, k = nhwc ? int(blockIdx.x) * 32 + i % 32 : c;
    float sum = 0;
#pragma unroll
    for (int other = 0; other < warps; ++other) sum += nhwc ? sums[other][tap][i % 32] : sums[other][0][tap];
    if (k < p.C) static_cast<T*>(p.out)[k * p.w_k + tap / R * p.w_r + tap % R * p.w_s] = narrow<T>(sum);
  }
}

// ---- host side

template <Op op, class T, int R, int stride, bool nhwc>
cudaError_t launch_direct(Problem const& problem, DirectTile const& t, Arguments const& args, cudaStream_t stream) {
  constexpr bool backward = op == Op::dgrad, spread = backward && stride == 2, sums = op == Op::wgrad;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  DirectParams p{};
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride, p.out = args.out;
  p.in_n = in.n, p.in_c = in.c, p.in_h = in.h, p.in_w = in.w;
  p.out_n = out.n, p.out_c = out.c, p.out_h = out.h, p.out_w = out.w;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.N = int(problem.N), p.C = int(problem.C);
  p.in_H = int(backward ? problem.P() : problem.H), p.in_W = int(backward ? problem.Q() : problem.W);
  p.out_H = int(backward ? problem.H : problem.P()), p.out_W = int(backward ? problem.W : problem.Q());
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  if (backward && !spread) {
    p.w = static_cast<T const*>(args.b) + (R - 1) * (p.w_r + p.w_s);
    p.w_r = -p.w_r, p.w_s = -p.w_s, p.pad_h = R - 1 - p.pad_h, p.pad_w = R - 1 - p.pad_w;
  }
  p.strips = int(t.strips), p.threads = uint32_t(t.threads);
  if constexpr (R > kDirectSize)
    return cudaErrorInvalidValue;
  else if constexpr (sums)
    direct_wgrad<T, R, stride, nhwc>
        <<<unsigned(nhwc ? ceil_div(problem.C, 32) : problem.C), direct_sums_threads(R, nhwc), 0, stream>>>(p);
  else
    direct<T, R, spread ? 1 : stride, spread, nhwc>
        <<<unsigned(ceil_div(t.threads, kDirectThreads)), kDirectThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::depthwise
