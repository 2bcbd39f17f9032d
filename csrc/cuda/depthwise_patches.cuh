// Depthwise convolution in NCHW by filters that don't meet: the stride is as large as the filter at least, or there is
// one output, so that an input meets one tap. A thread has a column of taps, neighbouring threads neighbouring columns.
//   gather_patches: fprop; an output's threads add up their columns in shared memory.
//   spread_patches: dgrad.
//   wgrad_patches: of one output; a block has some rows of a channel's taps and a share of the images.
#pragma once

#include "../core/patches.h"
#include "second_pass.cuh"

namespace conv2d_ext::depthwise {

struct PatchesParams {
  void const* in;     // wgrad: x
  void const* other;  // w; wgrad: y
  void const* bias;
  void* out;
  void* partial;
  int64_t in_n, in_c, in_h, in_patch, out_n, out_c, out_h, out_patch, w_k, w_r, w_s, bias_stride;  // wgrad: out: of y
  int H, W, P, Q, R, S, stride_h, stride_w, pad_h, pad_w;
  int outputs, rows, groups, lines, splits, K;  // of PatchesTile
  uint32_t items;
  Divisor by_S;
  WideDivisor by_row, by_group, by_channels, by_multiplier, by_stride_h, by_stride_w;
};

// A thread's column of taps of E outputs, one below the other.
template <class T, int E>
__global__ void __launch_bounds__(kPatchesThreads) gather_patches(__grid_constant__ PatchesParams const p) {
  using Acc = decltype(widen(T()));
  constexpr int unroll = 8 / E;
  __shared__ Acc sums[E][kPatchesThreads / 2 * 3];
  int const thread = int(threadIdx.x), o = int(p.by_S.quotient(thread)), s = thread - o * p.S;
  int const pitch = p.S | 1;  // outputs begin in different banks
  struct Place {
    int64_t n, k;
    int row, q;
  };
  auto place = [&](uint32_t i) {
    uint32_t const line = p.by_row.quotient(i), plane = p.by_group.quotient(line), n = p.by_channels.quotient(plane);
    return Place{n, plane - n * p.by_channels.value, int(line - plane * p.by_group.value) * E,
                 int(i - line * p.by_row.value)};
  };
  uint32_t const first = blockIdx.x * uint32_t(p.outputs);
  if (o < p.outputs && first + o < p.items) {
    Place const at = place(first + o);
    int const w = at.q * p.stride_w - p.pad_w + s, end = unsigned(w) < unsigned(p.W) ? p.R : 0;
    int const h0 = at.row * p.stride_h - p.pad_h;
    T const* x = static_cast<T const*>(p.in) + at.n * p.in_n + p.by_multiplier.quotient(uint32_t(at.k)) * p.in_c + w +
                 h0 * p.in_h;
    T const* filter = static_cast<T const*>(p.other) + at.k * p.w_k + s * p.w_s;
    Acc sum[E] = {};
#pragma unroll 1
    for (int r = 0; r < end; r += unroll) {
      T v[unroll][E], f[unroll];
#pragma unroll
      for (int j = 0; j < unroll; ++j, x += p.in_h, filter += p.w_r) {
        bool const tap = r + j < p.R;
        f[j] = narrow<T>(Acc(0));
        if (tap) f[j] = __ldg(filter);
#pragma unroll
        for (int e = 0; e < E; ++e) {
          v[j][e] = narrow<T>(Acc(0));
          if (tap && unsigned(h0 + e * p.stride_h + r + j) < unsigned(p.H)) v[j][e] = __ldg(x + e * p.in_patch);
        }
      }
#pragma unroll
      for (int j = 0; j < unroll; ++j)
#pragma unroll
        for (int e = 0; e < E; ++e) sum[e] += widen(v[j][e]) * widen(f[j]);
    }
#pragma unroll
    for (int e = 0; e < E; ++e) sums[e][o * pitch + s] = sum[e];
  }
  __syncthreads();
  for (int i = thread; i < p.outputs * E; i += kPatchesThreads) {
    int const e = i / p.outputs, of = i - e * p.outputs;
    if (first + of >= p.items) continue;
    Place const at = place(first + of);
    if (at.row + e >= p.P) continue;
    Acc sum = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[at.k * p.bias_stride]) : Acc(0);
#pragma unroll 4
    for (int j = 0; j < p.S; ++j) sum += sums[e][of * pitch + j];
    static_cast<T*>(p.out)[at.n * p.out_n + at.k * p.out_c + (at.row + e) * p.out_h + at.q] = narrow<T>(sum);
  }
}

// A thread has a column of x, of E rows that meet the same tap.
template <class T, int E>
__global__ void __launch_bounds__(kPatchesThreads) spread_patches(__grid_constant__ PatchesParams const p) {
  using Acc = decltype(widen(T()));
  uint32_t const i = blockIdx.x * kPatchesThreads + threadIdx.x;
  if (i >= p.items) return;
  uint32_t const line = p.by_row.quotient(i), unit = p.by_stride_h.quotient(line), plane = p.by_group.quotient(unit);
  int const w = int(i - line * p.by_row.value), r = int(line - unit * p.by_stride_h.value);
  int const row = int(unit - plane * p.by_group.value) * E, h0 = row * p.stride_h + r - p.pad_h;
  int64_t const n = p.by_channels.quotient(plane), c = plane - uint32_t(n) * p.by_channels.value;
  int const q = int(p.by_stride_w.quotient(uint32_t(w + p.pad_w))), s = w + p.pad_w - q * p.stride_w;
  bool const meets = s < p.S && q < p.Q && r < p.R;
  T const* const y = static_cast<T const*>(p.in) + n * p.in_n + c * p.in_c + row * p.in_h + q;
  T* const out = static_cast<T*>(p.out) + n * p.out_n + c * p.out_c + h0 * p.out_h + w;
  T f = narrow<T>(Acc(0)), v[E];
  if (meets) f = __ldg(static_cast<T const*>(p.other) + c * p.w_k + r * p.w_r + s * p.w_s);
#pragma unroll
  for (int e = 0; e < E; ++e) {
    v[e] = narrow<T>(Acc(0));
    if (meets && row + e < p.P) v[e] = __ldg(y + e * p.in_h);
  }
#pragma unroll
  for (int e = 0; e < E; ++e)
    if (unsigned(h0 + e * p.stride_h) < unsigned(p.H)) out[e * p.out_patch] = narrow<T>(widen(v[e]) * widen(f));
}

template <class T>
__global__ void __launch_bounds__(kPatchesThreads) wgrad_patches(__grid_constant__ PatchesParams const p) {
  using Acc = decltype(widen(T()));
  __shared__ Acc sums[kPatchesTaps][kPatchesThreads];
  let_second_pass_begin();
  uint32_t unit = blockIdx.x;
  int const group = split_off(unit, p.groups), split = split_off(unit, p.splits);
  int64_t const k = unit;
  uint32_t const begin = uint32_t(uint64_t(p.items) * split / p.splits);
  uint32_t const end = uint32_t(uint64_t(p.items) * (split + 1) / p.splits);
  int const thread = int(threadIdx.x), line = int(p.by_S.quotient(thread)), s = thread - line * p.S;
  int const r0 = group * p.rows, rows = min(p.rows, p.R - r0), h0 = r0 - p.pad_h, w = s - p.pad_w;
  T const* const x = static_cast<T const*>(p.in) + p.by_multiplier.quotient(uint32_t(k)) * p.in_c + h0 * p.in_h + w;
  T const* const y = static_cast<T const*>(p.other) + k * p.out_c;
  Acc acc[kPatchesTaps] = {};
  if (line < p.lines && unsigned(w) < unsigned(p.W))
#pragma unroll 2
    for (uint32_t n = begin + line; n < end; n += p.lines) {
      T const* from = x + n * p.in_n;
      T v[kPatchesTaps];
#pragma unroll
      for (int e = 0; e < kPatchesTaps; ++e, from += p.in_h)
        if (e < rows && unsigned(h0 + e) < unsigned(p.H)) v[e] = __ldg(from);
      Acc const gradient = widen(__ldg(y + n * p.out_n));
#pragma unroll
      for (int e = 0; e < kPatchesTaps; ++e)
        if (e < rows && unsigned(h0 + e) < unsigned(p.H)) acc[e] += widen(v[e]) * gradient;
    }
#pragma unroll
  for (int e = 0; e < kPatchesTaps; ++e) sums[e][thread] = acc[e];
  __syncthreads();
  for (int i = thread; i < rows * p.S; i += kPatchesThreads) {
    int const r = int(p.by_S.quotient(i)), tap = i - r * p.S;
    Acc sum = 0;
#pragma unroll 4
    for (int at = tap; at < p.lines * p.S; at += p.S) sum += sums[r][at];
    store_sum<T>(p.out, p.partial, p.splits, k * p.w_k + (r0 + r) * p.w_r + tap * p.w_s,
                 (int64_t(split) * p.K + k) * (p.R * p.S) + (r0 + r) * p.S + tap, sum);
  }
}

// ---- host side

template <Op op, DType dtype>
cudaError_t launch_patches(Problem const& problem, PatchesTile const& t, Plan const& plan, Arguments const& args,
                           cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  PatchesParams p{};
  p.in = args.a, p.other = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride;
  p.out = args.out, p.partial = args.workspace;
  p.stride_h = t.stride_h, p.stride_w = t.stride_w;
  p.in_n = in.n, p.in_c = in.c, p.in_h = in.h, p.in_patch = in.h * p.stride_h;
  p.out_n = out.n, p.out_c = out.c, p.out_h = out.h, p.out_patch = out.h * p.stride_h;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.H = int(problem.H), p.W = int(problem.W), p.P = int(problem.P()), p.Q = int(problem.Q());
  p.R = int(problem.R), p.S = int(problem.S), p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.outputs = t.outputs, p.rows = t.rows, p.groups = int(t.groups), p.lines = t.lines, p.splits = plan.split_k;
  p.K = int(problem.K), p.items = uint32_t(t.items), p.by_S = Divisor(uint32_t(p.S));
  p.by_row = WideDivisor(uint32_t(backward ? p.W : p.Q)), p.by_group = WideDivisor(uint32_t(t.groups));
  p.by_channels = WideDivisor(uint32_t(problem.K)), p.by_multiplier = WideDivisor(uint32_t(problem.K_per_group()));
  p.by_stride_h = WideDivisor(uint32_t(p.stride_h)), p.by_stride_w = WideDivisor(uint32_t(p.stride_w));
  void (*kernel)(PatchesParams);
  if constexpr (op == Op::fprop)
    kernel = t.rows == 1 ? gather_patches<T, 1> : gather_patches<T, kPatchesOutputs>;
  else if constexpr (backward)
    kernel = t.rows == 1 ? spread_patches<T, 1> : spread_patches<T, kPatchesOutputs>;
  else
    kernel = wgrad_patches<T>;
  kernel<<<unsigned(t.blocks), kPatchesThreads, 0, stream>>>(p);
  cudaError_t const error = cudaGetLastError();
  if (op != Op::wgrad || plan.split_k == 1 || error != cudaSuccess) return error;
  return launch_second_pass<T>(problem, plan, args, stream);
}

}  // namespace conv2d_ext::depthwise
