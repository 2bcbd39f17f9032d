// dgrad of depthwise convolution with stride 2 in NCHW, float32, small filters: what is written is four times what is
// read. A thread has 4 neighbouring columns of x, walks down some pairs of its rows, which the same rows of y meet, and
// has these in registers, one ahead. No shared memory: what neighbours share comes from L1.
#pragma once

#include "../core/depthwise.h"
#include "launch.h"
#include "types.cuh"

namespace conv2d_ext::depthwise {

constexpr int kSpreadThreads = 256;

struct SpreadParams {
  float const* y;
  float const* w;
  float* x;
  int64_t y_n, y_c, y_h, x_n, x_c, x_h, w_k, w_r, w_s;
  int C, P, Q, H, W, first_h, first_w;  // first: row and column of y that x's first meets with tap `parity`
  int strips, chunks, pairs;            // pairs: of rows of x, of a thread
  bool vectors;
  uint32_t threads;
};

// parity: of the padding. Output e of a pair or strip meets input (e + parity - r) / 2 with tap r, where that divides.
template <int R, int parity>
__global__ void __launch_bounds__(kSpreadThreads) spread(__grid_constant__ SpreadParams const p) {
  constexpr int rows = (R + 1) / 2, columns = (R + 3) / 2, low = parity - (R - 1) / 2;
  constexpr auto meets = [](int e, int r) { return (e + parity - r) % 2 == 0; };
  constexpr auto input = [](int e, int r) { return (e + parity - r) / 2; };
  uint32_t rest = blockIdx.x * kSpreadThreads + threadIdx.x;
  if (rest >= p.threads) return;
  auto digit = [&](int size) {
    uint32_t const quotient = rest / uint32_t(size), value = rest - quotient * uint32_t(size);
    rest = quotient;
    return int(value);
  };
  int const x0 = digit(p.strips) * 4, first = digit(p.chunks) * p.pairs, c = digit(p.C);
  int64_t const n = rest;
  int const pairs = min(p.pairs, (p.H + 1) / 2 - first), q0 = x0 / 2 + p.first_w + low;
  float filter[R][R];
#pragma unroll
  for (int tap = 0; tap < R * R; ++tap)
    filter[tap / R][tap % R] = __ldg(p.w + c * p.w_k + tap / R * p.w_r + tap % R * p.w_s);
  int row = first + p.first_h + parity - (rows - 1);
  float const* from = p.y + n * p.y_n + c * p.y_c + row * p.y_h + q0;
  bool inside[columns];
#pragma unroll
  for (int j = 0; j < columns; ++j) inside[j] = unsigned(q0 + j) < unsigned(p.Q);
  auto load = [&](float (&v)[columns]) {
    bool const has = unsigned(row) < unsigned(p.P);
#pragma unroll
    for (int j = 0; j < columns; ++j) v[j] = has && inside[j] ? __ldg(from + j) : 0.f;
    ++row, from += p.y_h;
  };
  float window[rows][columns], next[columns];  // newest row first
#pragma unroll
  for (int d = rows - 2; d >= 0; --d) load(window[d]);
  load(next);
  float* to = p.x + n * p.x_n + c * p.x_c + int64_t(2 * first) * p.x_h + x0;
  bool const whole = p.vectors && x0 + 4 <= p.W;
#pragma unroll 2
  for (int k = 0; k < pairs; ++k) {
#pragma unroll
    for (int d = rows - 1; d >= 0; --d)
#pragma unroll
      for (int j = 0; j < columns; ++j) window[d][j] = d > 0 ? window[d > 0 ? d - 1 : 0][j] : next[j];
    if (k + 1 < pairs) load(next);
#pragma unroll
    for (int e = 0; e < 2; ++e, to += p.x_h) {
      if (2 * (first + k) + e >= p.H) continue;
      float sum[4] = {};
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (!meets(e, r)) continue;
#pragma unroll
        for (int b = 0; b < 4; ++b)
#pragma unroll
          for (int s = 0; s < R; ++s)
            if (meets(b, s)) sum[b] = fmaf(window[parity - input(e, r)][input(b, s) - low], filter[r][s], sum[b]);
      }
      if (whole) {
        *reinterpret_cast<float4*>(to) = make_float4(sum[0], sum[1], sum[2], sum[3]);
      } else {
#pragma unroll
        for (int b = 0; b < 4; ++b)
          if (x0 + b < p.W) to[b] = sum[b];
      }
    }
  }
}

// ---- host side

template <int R>
cudaError_t launch_spread(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  Strides const &x = problem.x, &y = problem.y, &w = problem.w;
  SpreadParams p{};
  p.y = static_cast<float const*>(args.a), p.w = static_cast<float const*>(args.b), p.x = static_cast<float*>(args.out);
  p.y_n = y.n, p.y_c = y.c, p.y_h = y.h, p.x_n = x.n, p.x_c = x.c, p.x_h = x.h;
  p.w_k = w.n, p.w_r = w.h, p.w_s = w.w;
  p.C = int(problem.C), p.P = int(problem.P()), p.Q = int(problem.Q()), p.H = int(problem.H), p.W = int(problem.W);
  p.first_h = int(problem.pad_top / 2), p.first_w = int(problem.pad_left / 2);
  p.strips = int(ceil_div(problem.W, 4)), p.pairs = spread_pairs(R);
  p.chunks = int(ceil_div(ceil_div(problem.H, 2), p.pairs)), p.threads = uint32_t(spread_threads(problem));
  p.vectors = problem.x_align >= 16 && x.n % 4 == 0 && x.c % 4 == 0 && x.h % 4 == 0;
  auto* const kernel = problem.pad_top % 2 == 0 ? spread<R, 0> : spread<R, 1>;
  kernel<<<unsigned(ceil_div(spread_threads(problem), kSpreadThreads)), kSpreadThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::depthwise
