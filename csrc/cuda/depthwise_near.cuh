// Depthwise fprop and dgrad of few outputs in channels_last, 1x1 to 7x7: what such a layer takes is a launch, the
// latency of memory and of its code. A thread has 4 bytes of channels of some neighbouring outputs of a row, and asks
// at once for all inputs that they meet; its block's filters come through shared memory meanwhile.
#pragma once

#include <type_traits>

#include "../core/near.h"
#include "depthwise_tile.cuh"
#include "ptx.cuh"

namespace conv2d_ext::depthwise {

struct NearParams {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t in_n, out_n, bias_stride;
  int in_h, in_w, out_h, out_w;
  int C, in_H, in_W, out_H, out_W, pad_h, pad_w, slices, strips, units;
  Divisor by_slices, by_strips, by_rows;
};

template <class T, int V>
__device__ inline void widen_word(uint32_t word, float (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = __uint_as_float(word);
  } else if constexpr (std::is_same_v<T, __half>) {
    float2 const both = __half22float2(reinterpret_cast<__half2 const&>(word));
    to[0] = both.x, to[1] = both.y;
  } else {
    to[0] = __uint_as_float(word << 16), to[1] = __uint_as_float(word & 0xffff0000u);
  }
}

// dgrad with stride 1 is fprop with the filter turned round; with stride 2 a row of x meets every second row of it.
template <class T, Op op, int R, int stride, int width>
__global__ void __launch_bounds__(kNearThreads) near(__grid_constant__ NearParams const p) {
  constexpr bool spread = op == Op::dgrad && stride == 2, turned = op == Op::dgrad && stride == 1;
  constexpr int V = 4 / int(sizeof(T)), taps = R * R, warps = kNearThreads / 32, step = spread ? 1 : stride;
  constexpr int rows = spread ? (R + 1) / 2 : R;
  constexpr int before = spread ? (R - 1) / 2 : 0;  // columns of y before that of the first output and tap 0
  constexpr int columns = spread ? before + (width + 1) / 2 : (width - 1) * step + R;
  __shared__ __align__(16) uint32_t filters[32 * taps];
  int const lane = int(threadIdx.x) % 32, block = int(blockIdx.x), group = int(p.by_slices.quotient(block));
  int const c0 = (block - group * p.slices) * 32 * V, c = c0 + lane * V;
  int const here = min(32 * V, p.C - c0) * taps * int(sizeof(T));
  unsigned char const* const w = static_cast<unsigned char const*>(p.w) + int64_t(c0) * taps * int(sizeof(T));
#pragma unroll 1
  for (int i = int(threadIdx.x) * 16; i < here; i += kNearThreads * 16)
    ptx::cp_async_16(ptx::shared_address(filters) + i, w + i, true);
  ptx::cp_async_commit_group();
  int const unit = group * warps + int(threadIdx.x) / 32;
  int const line = int(p.by_strips.quotient(unit)), n = int(p.by_rows.quotient(line));
  int const y0 = line - n * p.out_H, x0 = (unit - line * p.strips) * width - (spread ? p.pad_w % 2 : 0);
  int const odd = spread ? (y0 + p.pad_h) % 2 : 0;
  int const h0 = spread ? (y0 + p.pad_h) / 2 : y0 * step - p.pad_h;
  int const w0 = spread ? (x0 + p.pad_w) / 2 - before : x0 * step - p.pad_w;
  bool const exists = unit < p.units && c < p.C;
  T const* const in = static_cast<T const*>(p.in) + n * p.in_n + (h0 * p.in_h + w0 * p.in_w + c);
  int const H = exists ? p.in_H : 0;
  uint32_t x[rows][columns];
#pragma unroll
  for (int r = 0; r < rows; ++r)
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      bool const inside = unsigned(spread ? h0 - r : h0 + r) < unsigned(H) && unsigned(w0 + j) < unsigned(p.in_W);
      uint32_t const* const from = reinterpret_cast<uint32_t const*>(in + (spread ? -r : r) * p.in_h + j * p.in_w);
      x[r][j] = inside ? __ldg(from) : 0;
    }
  float bias[V] = {};
  if (op == Op::fprop && p.bias != nullptr && exists)
#pragma unroll
    for (int i = 0; i < V; ++i) bias[i] = widen(static_cast<T const*>(p.bias)[(c + i) * p.bias_stride]);
  float sum[width][V];
#pragma unroll
  for (int i = 0; i < width * V; ++i) sum[i / V][i % V] = bias[i % V];
  ptx::cp_async_wait_group<0>();
  __syncthreads();
  // Words with the taps of a thread's channels, one channel after the other.
  uint32_t words[taps];
#pragma unroll
  for (int i = 0; i < taps; ++i) words[i] = filters[lane * taps + i];
  auto weight = [&](int tap, int channel) {
    float of_word[V];
    widen_word<T, V>(words[(channel * taps + tap) / V], of_word);
    return of_word[(channel * taps + tap) % V];
  };
#pragma unroll
  for (int parity = 0; parity < (spread ? 2 : 1); ++parity) {
    if (parity != odd) continue;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      int const tap_row = spread ? 2 * r + parity : r;
      if (tap_row >= R) continue;
      float v[columns][V];
#pragma unroll
      for (int j = 0; j < columns; ++j) widen_word<T, V>(x[r][j], v[j]);
#pragma unroll
      for (int e = 0; e < width; ++e)
#pragma unroll
        for (int s = spread ? e % 2 : 0; s < R; s += spread ? 2 : 1) {
          int const tap = tap_row * R + s;
#pragma unroll
          for (int i = 0; i < V; ++i)
            sum[e][i] = fmaf(v[spread ? before + (e - s) / 2 : e * step + s][i],
                             weight(turned ? taps - 1 - tap : tap, i), sum[e][i]);
        }
    }
  }
  T* const out = static_cast<T*>(p.out) + n * p.out_n + (y0 * p.out_h + x0 * p.out_w + c);
#pragma unroll
  for (int e = 0; e < width; ++e) {
    if (!exists || unsigned(x0 + e) >= unsigned(p.out_W)) continue;
    Vector<T, V> v;
#pragma unroll
    for (int i = 0; i < V; ++i) v.v[i] = narrow<T>(sum[e][i]);
    *reinterpret_cast<Vector<T, V>*>(out + e * p.out_w) = v;
  }
}

// ---- host side

template <Op op, class T, int R, int stride>
cudaError_t start_near(NearParams const& p, NearTile const& t, cudaStream_t stream) {
  void (*const kernel)(NearParams) = t.width == 2 ? near<T, op, R, stride, 2> : near<T, op, R, stride, 4>;
  kernel<<<unsigned(t.slices * ceil_div(t.units, kNearThreads / 32)), kNearThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <Op op, DType dtype>
cudaError_t launch_near(Problem const& problem, NearTile const& t, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  if (!t.used) return cudaErrorInvalidValue;
  bool const backward = op == Op::dgrad, turned = backward && problem.stride_h == 1;
  Strides const &in = backward ? problem.y : problem.x, &out = backward ? problem.x : problem.y;
  NearParams p{};
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride, p.out = args.out;
  p.in_n = in.n, p.in_h = int(in.h), p.in_w = int(in.w), p.out_n = out.n, p.out_h = int(out.h), p.out_w = int(out.w);
  p.C = int(problem.C);
  p.in_H = int(backward ? problem.P() : problem.H), p.in_W = int(backward ? problem.Q() : problem.W);
  p.out_H = int(backward ? problem.H : problem.P()), p.out_W = int(backward ? problem.W : problem.Q());
  p.pad_h = int(turned ? problem.R - 1 - problem.pad_top : problem.pad_top);
  p.pad_w = int(turned ? problem.R - 1 - problem.pad_left : problem.pad_left);
  p.slices = int(t.slices), p.strips = int(t.strips), p.units = int(t.units);
  p.by_slices = Divisor(uint32_t(t.slices)), p.by_strips = Divisor(uint32_t(t.strips));
  p.by_rows = Divisor(uint32_t(p.out_H));
  if (problem.R == 1) return start_near<op, T, 1, 2>(p, t, stream);
  auto of_size = [&]<int R>() {
    return problem.stride_w == 2 ? start_near<op, T, R, 2>(p, t, stream) : start_near<op, T, R, 1>(p, t, stream);
  };
  return problem.R == 3   ? of_size.template operator()<3>()
         : problem.R == 5 ? of_size.template operator()<5>()
                          : of_size.template operator()<7>();
}

}  // namespace conv2d_ext::depthwise

#define CONV2D_EXT_DEPTHWISE_NEAR_INSTANCE(family, op, dtype, tm, tn, tk, variant)                                    \
  namespace conv2d_ext {                                                                                              \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const&, Arguments const& args, \
                                                                cudaStream_t stream) {                                \
    return depthwise::launch_near<Op::op, DType::dtype>(p, near_tile(Op::op, p, h200_sxm), args, stream);             \
  }                                                                                                                   \
  }
