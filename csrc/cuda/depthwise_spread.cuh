// dgrad of depthwise convolution with stride 2 in NCHW, float32, small filters: what is written is four times what is
// read. A thread has 4 neighbouring columns of x, walks down some pairs of its rows, which the same rows of y meet, and
// has these in registers, one ahead. No shared memory: what neighbours share comes from L1. Rows that begin off 16
// bytes: a thread stores the 16 bytes that begin in its columns, with what its neighbour has of them.
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
  uint32_t threads;
};

// Four columns of a row, of which `columns` are left, that may begin off 16 bytes. follows: the next lane has the next
// four; leads: no lane before has those before.
__device__ inline void store_shifted(float* to, int columns, bool exists, bool follows, bool leads,
                                     float const (&v)[4]) {
  int const before = int(-(reinterpret_cast<uintptr_t>(to) / 4) % 4);  // columns before the next 16 bytes
  float all[7];
#pragma unroll
  for (int i = 0; i < 4; ++i) all[i] = v[i];
#pragma unroll
  for (int i = 0; i < 3; ++i) all[4 + i] = __shfl_down_sync(0xffffffffu, v[i], 1);
  if (!exists) return;
  int const end = min(columns, follows ? before + 4 : 4);
  if (end == before + 4) {
    float four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      four[i] = before < 2 ? before == 0 ? all[i] : all[i + 1] : before == 2 ? all[i + 2] : all[i + 3];
    *reinterpret_cast<float4*>(to + before) = make_float4(four[0], four[1], four[2], four[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 7; ++i)
      if (i >= before && i < end) to[i] = all[i];
  }
  if (leads)
#pragma unroll
    for (int i = 0; i < 3; ++i)
      if (i < before && i < columns) to[i] = all[i];
}

// parity: of the padding. Output e of a pair or strip meets input (e + parity - r) / 2 with tap r, where that divides.
// shifted: rows may begin off 16 bytes.
template <int R, int parity, bool shifted>
__global__ void __launch_bounds__(kSpreadThreads) spread(__grid_constant__ SpreadParams const p) {
  constexpr int rows = (R + 1) / 2, columns = (R + 3) / 2, low = parity - (R - 1) / 2;
  constexpr auto meets = [](int e, int r) { return (e + parity - r) % 2 == 0; };
  constexpr auto input = [](int e, int r) { return (e + parity - r) / 2; };
  uint32_t rest = blockIdx.x * kSpreadThreads + threadIdx.x;
  bool const exists = rest < p.threads;
  if (!shifted && !exists) return;
  if (!exists) rest = p.threads - 1;
  auto digit = [&](int size) {
    uint32_t const quotient = rest / uint32_t(size), value = rest - quotient * uint32_t(size);
    rest = quotient;
    return int(value);
  };
  int const x0 = digit(p.strips) * 4, first = digit(p.chunks) * p.pairs, c = digit(p.C);
  int64_t const n = rest;
  int const pairs = shifted ? p.pairs : min(p.pairs, (p.H + 1) / 2 - first), q0 = x0 / 2 + p.first_w + low;
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
  int const lane = int(threadIdx.x) % 32, left = p.W - x0;
#pragma unroll 2
  for (int k = 0; k < pairs; ++k) {
#pragma unroll
    for (int d = rows - 1; d >= 0; --d)
#pragma unroll
      for (int j = 0; j < columns; ++j) window[d][j] = d > 0 ? window[d > 0 ? d - 1 : 0][j] : next[j];
    if (k + 1 < pairs) load(next);
#pragma unroll
    for (int e = 0; e < 2; ++e, to += p.x_h) {
      bool const has = 2 * (first + k) + e < p.H;
      if (!shifted && !has) continue;
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
      if constexpr (shifted) {
        store_shifted(to, left, exists && has, lane < 31 && left > 4, lane == 0 || x0 == 0, sum);
      } else if (left >= 4) {
        *reinterpret_cast<float4*>(to) = make_float4(sum[0], sum[1], sum[2], sum[3]);
      } else {
#pragma unroll
        for (int b = 0; b < 4; ++b)
          if (b < left) to[b] = sum[b];
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
  bool const vectors = problem.x_align >= 16 && x.n % 4 == 0 && x.c % 4 == 0 && x.h % 4 == 0;
  auto* kernel = problem.pad_top % 2 == 0 ? spread<R, 0, false> : spread<R, 1, false>;
  if (!vectors) kernel = problem.pad_top % 2 == 0 ? spread<R, 0, true> : spread<R, 1, true>;
  kernel<<<unsigned(ceil_div(spread_threads(problem), kSpreadThreads)), kSpreadThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::depthwise
