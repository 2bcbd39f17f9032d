// dgrad with a stride to few channels in strict float32. tma_strict.cuh takes the phases of the stride one after the
// other, each with few columns of a tile. Here one convolution of y computes all (core/strict_phases.h): its filters
// are the phases' channels, (i, j, c), with zeros for taps that a phase has not. A launch before makes the filters, one
// behind it moves the pixels to where they belong. Those that are not finite it sums again, since zeros of the filters
// make NaN of infinities.
#pragma once

#include <cfloat>

#include "../core/strict_phases.h"
#include "launch.h"

namespace conv2d_ext::phases_at_once {

constexpr int kThreads = 256, kColumns = 64;  // of a block: columns u of the product's result

struct Filters {
  float const* w;
  float* out;  // K, R, S, C of the product
  int64_t k, c, r, s;
  int C, R, S, stride_h, stride_w;
  int product_K, product_R, product_S, product_C;
};

static __global__ void __launch_bounds__(kThreads) filters_kernel(__grid_constant__ Filters const f) {
  int64_t const at = int64_t(blockIdx.x) * kThreads + threadIdx.x, n_taps = at / f.product_C;
  int const k = int(at - n_taps * f.product_C), taps = f.product_R * f.product_S, n = int(n_taps / taps),
            tap = int(n_taps) - n * taps, a = tap / f.product_S, b = tap - a * f.product_S, phase = n / f.C,
            i = phase / f.stride_w, r = (f.product_R - 1 - a) * f.stride_h + i,
            s = (f.product_S - 1 - b) * f.stride_w + phase - i * f.stride_w;
  if (n >= f.product_K) return;
  bool const exists = i < f.stride_h && r < f.R && s < f.S;
  f.out[at] = exists ? f.w[k * f.k + (n - phase * f.C) * f.c + r * f.r + s * f.s] : 0.f;
}

struct Pixels {
  float const* from;  // the product's result
  float* to;
  int64_t n, c, h, w;  // strides of x
  int C, H, W, stride_h, stride_w, pad_top, pad_left;
  int u_h, u_w, rows, columns, K;  // of the product's result
  int parts;                       // of a row
  Filters filters;
  float const* y;
  int64_t y_n, y_h, y_w;
  int P, Q, filters_of_y;
};

// A pixel, product by product, until it is NaN.
__device__ __noinline__ float sum_again(Pixels const& p, int n, int c, int h, int w) {
  float sum = 0;
  for (int r = (h + p.pad_top) % p.stride_h; r < p.filters.R; r += p.stride_h)
    for (int s = (w + p.pad_left) % p.stride_w; s < p.filters.S; s += p.stride_w) {
      int const i = (h + p.pad_top - r) / p.stride_h, j = (w + p.pad_left - s) / p.stride_w;
      if (h + p.pad_top < r || w + p.pad_left < s || i >= p.P || j >= p.Q) continue;
      float const* const y = p.y + n * p.y_n + i * p.y_h + j * p.y_w;
      float const* const filter = p.filters.w + c * p.filters.c + r * p.filters.r + s * p.filters.s;
      for (int k = 0; k < p.filters_of_y; ++k) {
        sum += y[k] * filter[k * p.filters.k];
        if (sum != sum) return sum;
      }
    }
  return sum;
}

// A block: kColumns pixels of a row of the product's result.
static __global__ void __launch_bounds__(kThreads) pixels_kernel(__grid_constant__ Pixels const p) {
  __shared__ float shared[kColumns * (kStrictPhasesTile + 1)];
  int const row_at = int(blockIdx.x) / p.parts, part = int(blockIdx.x) - row_at * p.parts, n = row_at / p.rows,
            row = row_at - n * p.rows, first = part * kColumns, count = min(kColumns, p.columns - first);
  int const pitch = p.K | 1;
  auto const* const from =
      reinterpret_cast<float4 const*>(p.from + ((int64_t(n) * p.rows + row) * p.columns + first) * p.K);
  for (int i = int(threadIdx.x); i < count * p.K / 4; i += kThreads) {
    float4 const v = __ldg(from + i);
    int const column = i * 4 / p.K;
    float* const to = shared + column * pitch + i * 4 - column * p.K;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
  __syncthreads();
  int const width = count * p.stride_w, h0 = (row + p.u_h) * p.stride_h - p.pad_top,
            w0 = (first + p.u_w) * p.stride_w - p.pad_left, of_row = width * p.C;
  float* const to = p.to + n * p.n;
  bool finite = true;
  for (int at = int(threadIdx.x); at < of_row; at += kThreads) {
    int const c = p.c == 1 ? at % p.C : at / width, column = p.c == 1 ? at / p.C : at - c * width,
              u = column / p.stride_w, j = column - u * p.stride_w, w = w0 + column;
    if (w < 0 || w >= p.W) continue;
    float const* const of = shared + u * pitch + j * p.C + c;
    for (int i = 0, h = h0; i < p.stride_h; ++i, ++h)
      if (h >= 0 && h < p.H) {
        float const v = of[i * p.stride_w * p.C];
        finite &= fabsf(v) <= FLT_MAX;
        to[c * p.c + h * p.h + w * p.w] = v;
      }
  }
  if (__syncthreads_and(finite)) return;
  for (int at = int(threadIdx.x); at < p.stride_h * of_row; at += kThreads) {
    int const i = at / of_row, rest = at - i * of_row, c = rest / width, h = h0 + i, w = w0 + rest - c * width;
    if (h < 0 || h >= p.H || w < 0 || w >= p.W) continue;
    float* const out = to + c * p.c + h * p.h + w * p.w;
    if (!isfinite(*out)) *out = sum_again(p, n, c, h, w);
  }
}

// product: the launcher of kStrictPhasesProduct.
inline cudaError_t launch(Launcher product, Problem const& problem, Plan const& plan, Arguments const& args,
                          cudaStream_t stream) {
  StrictPhases const t = strict_phases(problem);
  Problem const& q = t.product;
  StrictPhasesPlaces const at = strict_phases_places(problem, plan.split_k);
  char* const workspace = static_cast<char*>(args.workspace);
  Filters f{};
  f.w = static_cast<float const*>(args.b), f.out = reinterpret_cast<float*>(workspace + at.filters);
  f.k = problem.w.n, f.c = problem.w.c, f.r = problem.w.h, f.s = problem.w.w;
  f.C = int(problem.C), f.R = int(problem.R), f.S = int(problem.S);
  f.stride_h = int(problem.stride_h), f.stride_w = int(problem.stride_w);
  f.product_K = int(q.K), f.product_R = int(q.R), f.product_S = int(q.S), f.product_C = int(q.C);
  filters_kernel<<<unsigned(ceil_div(q.K * q.w.n, int64_t(kThreads))), kThreads, 0, stream>>>(f);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  Arguments own{};
  own.a = args.a, own.b = f.out, own.out = workspace + at.out, own.workspace = workspace + at.own;
  if ((error = product(q, plan, own, stream)) != cudaSuccess) return error;
  Strides const& s = problem.x;
  Pixels p{};
  p.from = reinterpret_cast<float const*>(workspace + at.out), p.to = static_cast<float*>(args.out);
  p.n = s.n, p.c = s.c, p.h = s.h, p.w = s.w;
  p.C = f.C, p.H = int(problem.H), p.W = int(problem.W), p.stride_h = f.stride_h, p.stride_w = f.stride_w;
  p.pad_top = int(problem.pad_top), p.pad_left = int(problem.pad_left), p.u_h = int(t.u_h), p.u_w = int(t.u_w);
  p.rows = int(q.P()), p.columns = int(q.Q()), p.K = int(q.K), p.parts = int(ceil_div(q.Q(), int64_t(kColumns)));
  p.filters = f, p.y = static_cast<float const*>(args.a), p.filters_of_y = int(problem.K);
  p.y_n = problem.y.n, p.y_h = problem.y.h, p.y_w = problem.y.w, p.P = int(problem.P()), p.Q = int(problem.Q());
  pixels_kernel<<<unsigned(q.N * p.rows * p.parts), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::phases_at_once

namespace conv2d_ext {
cudaError_t tma_strict_fprop_f32_128x64_im2col(Problem const&, Plan const&, Arguments const&, cudaStream_t);
}

#define CONV2D_EXT_TMA_STRICT_PHASES_INSTANCE(family, op, dtype, tm, tn, tk, variant)          \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                    \
    return phases_at_once::launch(&tma_strict_fprop_f32_128x64_im2col, p, plan, args, stream); \
  }
