// Depthwise fprop and dgrad of few outputs in channels_last, up to 7x7: what such a layer takes is a launch, the
// latency of memory and of its code. A thread has a word of channels (4 bytes, or a single one) of some outputs of a
// row, which are neighbours but for a dilation, and asks at once for all inputs that they meet; its block's filters
// come through shared memory meanwhile, with zeros beside those that are no square of 1, 3, 5 or 7 taps. Where a
// channel of x has several filters, a thread's channels are y's, and dgrad adds the sums of those that share one.
#pragma once

#include "depthwise_few_outputs.cuh"
#include "depthwise_single.cuh"
#include "ptx.cuh"

namespace conv2d_ext::depthwise {

struct NearParams {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t in_n, out_n, bias_stride;
  int in_h, in_w, out_h, out_w;
  int K, R, S, in_H, in_W, out_H, out_W, pad_h, pad_w, dilation_h, slices, strips, units, filters;
  bool square;
  Divisor by_slices, by_strips, by_rows, by_dilation;
};

// dgrad with stride 1 is fprop with the filter turned round; with stride 2 a row of x meets every second row of it.
// plain: R x R taps without a dilation. many: a channel of x has p.filters, V of them and more.
template <class T, Op op, int R, int stride, int V, int width, bool plain, bool many>
__global__ void __launch_bounds__(kNearThreads) near(__grid_constant__ NearParams const p) {
  constexpr bool spread = op == Op::dgrad && stride == 2, turned = op == Op::dgrad && stride == 1;
  using Word = std::conditional_t<V * sizeof(T) == 4, uint32_t, uint16_t>;
  constexpr bool single = many && op == Op::fprop;  // a thread reads one channel
  using Input = std::conditional_t<single && sizeof(T) == 2, uint16_t, Word>;
  constexpr int taps = R * R, warps = kNearThreads / 32, step = spread ? 1 : stride;
  constexpr int rows = spread ? (R + 1) / 2 : R;
  constexpr int before = spread ? (R - 1) / 2 : 0;  // columns of y before that of the first output and tap 0
  constexpr int columns = spread ? before + (width + 1) / 2 : (width - 1) * step + R;
  __shared__ __align__(16) Word filters[32 * taps];
  int const lane = int(threadIdx.x) % 32, block = int(blockIdx.x), group = int(p.by_slices.quotient(block));
  int const c0 = (block - group * p.slices) * 32 * V, c = c0 + lane * V;
  constexpr int piece = 16 / int(sizeof(Word));
  bool const square = plain || p.square;
  int const here = min(32, (p.K - c0) / V) * taps, whole = square ? here / piece * piece : here;
  Word const* const w = static_cast<Word const*>(p.w) + int64_t(c0 / V) * taps;  // of squares
  if (square)
#pragma unroll 1
    for (int i = int(threadIdx.x) * piece; i < whole; i += kNearThreads * piece)
      ptx::cp_async_16(ptx::shared_address(filters + i), w + i, true);
  ptx::cp_async_commit_group();
  int const unit = group * warps + int(threadIdx.x) / 32;
  int const line = int(p.by_strips.quotient(unit)), n = int(p.by_rows.quotient(line));
  // A strip's columns are `apart`, and the first strips begin with each of the first columns.
  int const strip = unit - line * p.strips, run = plain ? strip : int(p.by_dilation.quotient(strip));
  int const apart = plain ? 1 : int(p.by_dilation.value), first = strip - run * apart;
  int const y0 = line - n * p.out_H, x0 = first + run * width * apart - (spread ? p.pad_w % 2 : 0);
  int const odd = spread ? (y0 + p.pad_h) % 2 : 0;
  int const h0 = spread ? (y0 + p.pad_h) / 2 : y0 * step - p.pad_h;
  int const w0 = spread ? (x0 + p.pad_w) / 2 - before : x0 * step - p.pad_w;
  bool const exists = unit < p.units && c < p.K;
  T const* const in =
      static_cast<T const*>(p.in) + n * p.in_n + (h0 * p.in_h + w0 * p.in_w + (single ? c / p.filters : c));
  int const H = exists ? p.in_H : 0;
  uint32_t x[rows][columns];
#pragma unroll
  for (int r = 0; r < rows; ++r)
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      int const h = (spread ? -r : r) * (spread || plain ? 1 : p.dilation_h), v = j * apart;
      bool const met = (spread ? 2 * r + odd : r) < (plain ? R : p.R) && unsigned(h0 + h) < unsigned(H);
      bool const inside = met && unsigned(w0 + v) < unsigned(p.in_W);
      Input const* const from = reinterpret_cast<Input const*>(in + h * p.in_h + v * p.in_w);
      x[r][j] = inside ? __ldg(from) : 0;
    }
  if (int const i = whole + int(threadIdx.x); i < here) filters[i] = w[i];
  if (!square) {
    // The zeros are behind a filter, or before one that is turned round.
    T* const to = reinterpret_cast<T*>(filters);
    int const from_r = turned ? R - p.R : 0, from_s = turned ? R - p.S : 0;
#pragma unroll 4
    for (int i = int(threadIdx.x); i < here * V; i += kNearThreads) {
      int const k = i / taps, r = (i - k * taps) / R - from_r, s = (i - k * taps) % R - from_s;
      bool const inside = unsigned(r) < unsigned(p.R) && unsigned(s) < unsigned(p.S);
      to[i] = inside ? static_cast<T const*>(p.w)[(int64_t(c0 + k) * p.R + r) * p.S + s] : T(narrow<T>(0.f));
    }
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
      for (int j = 0; j < columns; ++j) {
        if constexpr (single) {
          float one[1];
          widen_word<T, 1>(x[r][j], one);
#pragma unroll
          for (int i = 0; i < V; ++i) v[j][i] = one[0];
        } else {
          widen_word<T, V>(x[r][j], v[j]);
        }
      }
#pragma unroll
      for (int e = 0; e < width; ++e)
#pragma unroll
        for (int s = spread ? e % 2 : 0; s < R; s += spread ? 2 : 1) {
          if (!plain && s >= p.S) continue;  // no product with what lies beside a filter
          int const tap = tap_row * R + s;
#pragma unroll
          for (int i = 0; i < V; ++i)
            sum[e][i] = fmaf(v[spread ? before + (e - s) / 2 : e * step + s][i],
                             weight(turned ? taps - 1 - tap : tap, i), sum[e][i]);
        }
    }
  }
  constexpr bool folds = many && op == Op::dgrad;
  T* const out = static_cast<T*>(p.out) + n * p.out_n + (y0 * p.out_h + x0 * p.out_w + (folds ? c / p.filters : c));
#pragma unroll
  for (int e = 0; e < width; ++e) {
    if constexpr (folds) {
      if constexpr (V == 2) sum[e][0] += sum[e][1];
      for (int lane = 1; lane < p.filters / V; lane *= 2) sum[e][0] += __shfl_xor_sync(~0u, sum[e][0], lane);
    }
    if (!exists || unsigned(x0 + e * apart) >= unsigned(p.out_W)) continue;
    if constexpr (folds) {
      if (c % p.filters == 0) out[e * p.out_w] = narrow<T>(sum[e][0]);
      continue;
    }
    Vector<T, V> v;
#pragma unroll
    for (int i = 0; i < V; ++i) v.v[i] = narrow<T>(sum[e][i]);
    *reinterpret_cast<Vector<T, V>*>(out + e * apart * p.out_w) = v;
  }
}

// ---- host side

template <Op op, class T, int R, int stride, bool plain, bool many = false>
cudaError_t start_near(NearParams const& p, NearTile const& t, cudaStream_t stream) {
  constexpr int V = 4 / int(sizeof(T));
  void (*kernel)(NearParams) =
      t.width == 2 ? near<T, op, R, stride, V, 2, plain, many> : near<T, op, R, stride, V, 4, plain, many>;
  if constexpr (V > 1 && !many)
    if (t.vector == 1) kernel = near<T, op, R, stride, 1, 2, plain, false>;
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
  p.K = int(problem.K), p.filters = int(problem.K / problem.C), p.R = int(problem.R), p.S = int(problem.S);
  p.square = p.R == p.S && p.R == few_outputs_side(problem);
  p.in_H = int(backward ? problem.P() : problem.H), p.in_W = int(backward ? problem.Q() : problem.W);
  p.out_H = int(backward ? problem.H : problem.P()), p.out_W = int(backward ? problem.W : problem.Q());
  p.dilation_h = int(problem.dilation_h), p.by_dilation = Divisor(uint32_t(problem.dilation_w));
  p.pad_h = int(turned ? (problem.R - 1) * problem.dilation_h - problem.pad_top : problem.pad_top);
  p.pad_w = int(turned ? (problem.S - 1) * problem.dilation_w - problem.pad_left : problem.pad_left);
  p.slices = int(t.slices), p.strips = int(t.strips), p.units = int(t.units);
  p.by_slices = Divisor(uint32_t(t.slices)), p.by_strips = Divisor(uint32_t(t.strips));
  p.by_rows = Divisor(uint32_t(p.out_H));
  bool const plain = p.square && problem.dilation_h == 1 && problem.dilation_w == 1;
  return by_filter(problem, [&]<int R, int stride>() {
    if constexpr (R > 1)
      if (p.filters > 1) return start_near<op, T, R, stride, true, true>(p, t, stream);
    if constexpr (R > 1 && (R == 3 || stride == 1))  // a single tap has no dilation
      if (!plain) return start_near<op, T, R, stride, false>(p, t, stream);
    return start_near<op, T, R, stride, true>(p, t, stream);
  });
}

}  // namespace conv2d_ext::depthwise

#define CONV2D_EXT_DEPTHWISE_NEAR_INSTANCE(family, op, dtype, tm, tn, tk, variant)                        \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                               \
    if (takes_single<false>(Op::op, p))                                                                   \
      return depthwise::launch_single<Op::op, DType::dtype, false>(p, plan, args, stream);                \
    return depthwise::launch_near<Op::op, DType::dtype>(p, near_tile(Op::op, p, h200_sxm), args, stream); \
  }
