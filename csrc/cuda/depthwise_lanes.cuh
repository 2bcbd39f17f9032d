// Depthwise convolution of small images in NCHW, 3x3, 5x5 and 7x7, stride 1 and 2: what such a layer takes is a launch
// and the latency of memory and of its code. A power of two of lanes has a row of an image, a column or a pair of
// columns each, and those beyond the image hold the zeros beside it; a lane asks at once for the rows that a band of
// outputs meets, and its neighbours' columns come by shuffles. wgrad: a block's lanes share out the bands of a
// channel's images, and their sums are added in shared memory.
#pragma once

#include "../core/lanes_choice.h"
#include "depthwise_copied.cuh"
#include "depthwise_few_outputs.cuh"
#include "depthwise_single.cuh"

namespace conv2d_ext::depthwise {

struct LanesParams {
  void const* a;  // dgrad: y; others: x
  void const* b;  // wgrad: y; others: the filter
  void const* bias;
  void* out;
  int64_t a_n, a_c, b_n, b_c, bias_stride;  // b: of the other image, also where it is the result
  int a_h, b_h, w_k, w_r, w_s;
  int N, C, H, W, P, Q;  // H, W: of a; P, Q: of the other image
  LanesAxis rows, columns;
  int before;                                                      // of LanesTile
  int items, lanes_log2, segments_log2, team_log2, channels_log2;  // channels: of a block
  int strip;
  Divisor by_strips, by_bands, by_channels;
};

// Neighbouring columns of a row, of a lane. `words`: rows begin at multiples of them, and end there, so that they are
// loaded and, in 16 bits, shuffled together.
template <class T, int columns, bool words>
struct Columns {
  using Bits = std::conditional_t<!words || columns == 1, T, std::conditional_t<sizeof(T) == 4, uint2, uint32_t>>;
  static constexpr int parts = words ? 1 : columns;
  Bits bits[parts]{};

  // From column w0 of a row of W.
  __device__ void load(T const* from, bool row, int w0, int W) {
#pragma unroll
    for (int i = 0; i < parts; ++i)
      if (row && unsigned(w0 + i) < unsigned(W)) bits[i] = __ldg(reinterpret_cast<Bits const*>(from + i));
  }

  __device__ void widened(float (&to)[columns]) const {
    if constexpr (parts == columns) {
#pragma unroll
      for (int i = 0; i < columns; ++i) to[i] = widen(bits[i]);
    } else if constexpr (sizeof(T) == 4) {
      to[0] = __uint_as_float(bits[0].x), to[1] = __uint_as_float(bits[0].y);
    } else {
      widen_word<T, 2>(bits[0], to);
    }
  }

  // to[i]: the column `first` + i from the lane's first.
  template <int first, int count>
  __device__ void window(int lane, int lanes, float (&to)[count]) const {
    constexpr int last = first + count - 1;
    constexpr int before = columns == 1 ? first : half_of(first), after = columns == 1 ? last : half_of(last);
#pragma unroll
    for (int d = before; d <= after; ++d) {
      Columns other = *this;
      if constexpr (parts < columns && sizeof(T) == 2)
        if (d != 0) other.bits[0] = __shfl_sync(0xffffffffu, bits[0], lane + d, lanes);
      float of_lane[columns];
      other.widened(of_lane);
#pragma unroll
      for (int e = 0; e < columns; ++e) {
        int const i = columns * d + e - first;
        if (i < 0 || i >= count) continue;
        bool const alone = parts == columns || sizeof(T) == 4;
        to[i] = alone && d != 0 ? __shfl_sync(0xffffffffu, of_lane[e], lane + d, lanes) : of_lane[e];
      }
    }
  }
};

// A lane's filter.
template <class T, int R>
__device__ inline void load_filter(LanesParams const& p, bool exists, int c, T (&filter)[R][R]) {
  T const* const from = static_cast<T const*>(p.b) + int64_t(c) * p.w_k;
#pragma unroll
  for (int tap = 0; tap < R * R; ++tap)
    filter[tap / R][tap % R] = exists ? __ldg(from + tap / R * p.w_r + tap % R * p.w_s) : T(narrow<T>(0.f));
}

// Where a lane is in its strip of a row.
struct LanesStrip {
  int lane, lanes;
  int in, out;  // numbers of its inputs and outputs in the row, of lanes
  bool stores;

  __device__ LanesStrip(LanesParams const& p, int strip) {
    lanes = 1 << p.lanes_log2, lane = int(threadIdx.x) & (lanes - 1);
    out = strip * p.strip + lane, in = lane < lanes - p.before ? out : out - lanes;
    stores = lane < p.strip;
  }
};

// The band of a thread: of which plane, and which of its bands.
struct LanesPlace {
  int strip, n, c, band;
  bool exists;

  __device__ LanesPlace(LanesParams const& p, int threads) {
    int const item = (int(blockIdx.x) * threads + int(threadIdx.x)) >> p.lanes_log2;
    int const line = int(p.by_strips.quotient(item)), plane = int(p.by_bands.quotient(line));
    strip = item - line * int(p.by_strips.value), band = line - plane * int(p.by_bands.value);
    n = int(p.by_channels.quotient(plane)), c = plane - n * p.C;
    exists = item < p.items;
  }
};

// fprop, and dgrad with stride 1, which is fprop with the filter turned round.
template <class T, int R, int stride, bool words>
__global__ void __launch_bounds__(lanes_threads(Op::fprop, R)) lanes_forward(__grid_constant__ LanesParams const p) {
  constexpr int pad = R / 2, outputs = stride == 1 && words ? 2 : 1, columns = outputs * stride;
  constexpr int band = lanes_band(Op::fprop, stride), rows = (band - 1) * stride + R;
  LanesPlace const at(p, lanes_threads(Op::fprop, R));
  LanesStrip const of(p, at.strip);
  int const p0 = at.band * band, h0 = p0 * stride - pad + p.rows.shift, w0 = of.in * columns + p.columns.shift;
  T const* const from = static_cast<T const*>(p.a) + at.n * p.a_n + at.c * p.a_c + (h0 * p.a_h + w0);
  int const H = at.exists ? p.H : 0;
  Columns<T, columns, words> x[rows];
#pragma unroll
  for (int j = 0; j < rows; ++j) x[j].load(from + j * p.a_h, unsigned(h0 + j) < unsigned(H), w0, p.W);
  T filter[R][R];
  load_filter<T, R>(p, at.exists, at.c, filter);
  float bias = 0;
  if (p.bias != nullptr && at.exists) bias = widen(static_cast<T const*>(p.bias)[at.c * p.bias_stride]);
  float sum[band][outputs];
#pragma unroll
  for (int i = 0; i < band * outputs; ++i) sum[i / outputs][i % outputs] = bias;
#pragma unroll
  for (int j = 0; j < rows; ++j) {
    float v[R + outputs - 1];
    x[j].template window<-pad, R + outputs - 1>(of.lane, of.lanes, v);
#pragma unroll
    for (int r = j % stride; r < R && r <= j; r += stride) {
      if ((j - r) / stride >= band) continue;
#pragma unroll
      for (int s = 0; s < R; ++s)
#pragma unroll
        for (int e = 0; e < outputs; ++e)
          sum[(j - r) / stride][e] = fmaf(v[s + e], widen(filter[r][s]), sum[(j - r) / stride][e]);
    }
  }
  int const q = of.out * outputs, end = at.exists && of.stores && q < p.Q ? p.P - p0 : 0;
  T* const out = static_cast<T*>(p.out) + at.n * p.b_n + at.c * p.b_c + (p0 * p.b_h + q);
#pragma unroll
  for (int b = 0; b < band; ++b) {
    if (b >= end) continue;
    Vector<T, outputs> v;
#pragma unroll
    for (int e = 0; e < outputs; ++e) v.v[e] = narrow<T>(sum[b][e]);
    *reinterpret_cast<Vector<T, outputs>*>(out + b * p.b_h) = v;
  }
}

// dgrad with stride 2: a lane has a column of y, and pairs of rows and columns of x.
template <class T, int R, bool words>
__global__ void __launch_bounds__(lanes_threads(Op::dgrad, R)) lanes_spread(__grid_constant__ LanesParams const p) {
  constexpr int pad = R / 2, band = lanes_band(Op::dgrad, 2);
  // Row and column 2 * i + f of x meet those of y from i + low to i + high, k on from i with tap f + pad - 2 * k.
  constexpr int low = half_of(pad - R + 2), high = (pad + 1) / 2, rows = band + high - low;
  LanesPlace const at(p, lanes_threads(Op::dgrad, R));
  LanesStrip const of(p, at.strip);
  int const i0 = at.band * band, h0 = i0 + low + p.rows.shift, q = of.in + p.columns.shift;
  T const* const from = static_cast<T const*>(p.a) + at.n * p.a_n + at.c * p.a_c + (h0 * p.a_h + q);
  int const H = at.exists ? p.H : 0;
  Columns<T, 1, true> y[rows];
#pragma unroll
  for (int j = 0; j < rows; ++j) y[j].load(from + j * p.a_h, unsigned(h0 + j) < unsigned(H), q, p.W);
  T filter[R][R];
  load_filter<T, R>(p, at.exists, at.c, filter);
  float sum[band][2][2] = {};
#pragma unroll
  for (int j = 0; j < rows; ++j) {
    float v[high - low + 1];
    y[j].template window<low, high - low + 1>(of.lane, of.lanes, v);
#pragma unroll
    for (int i = 0; i < band * 4; ++i) {
      int const b = i / 4, f = i / 2 % 2, e = i % 2, r = f + pad - 2 * (j + low - b);
      if (r < 0 || r >= R) continue;
#pragma unroll
      for (int k = low; k <= high; ++k)
        if (int const s = e + pad - 2 * k; s >= 0 && s < R)
          sum[b][f][e] = fmaf(v[k - low], widen(filter[r][s]), sum[b][f][e]);
    }
  }
  int const w0 = 2 * of.out - p.columns.odd, first = 2 * i0 - p.rows.odd;
  int const P = at.exists && of.stores && w0 < p.Q ? p.P : 0;
  T* const out = static_cast<T*>(p.out) + at.n * p.b_n + at.c * p.b_c + (first * p.b_h + w0);
#pragma unroll
  for (int row = 0; row < 2 * band; ++row) {
    if (unsigned(first + row) >= unsigned(P)) continue;
    Vector<T, 2> v;
#pragma unroll
    for (int e = 0; e < 2; ++e) v.v[e] = narrow<T>(sum[row / 2][row % 2][e]);
    if constexpr (words) {
      *reinterpret_cast<Vector<T, 2>*>(out + row * p.b_h) = v;
    } else {
      if (w0 >= 0) out[row * p.b_h] = v.v[0];
      if (w0 + 1 < p.Q) out[row * p.b_h + 1] = v.v[1];
    }
  }
}

// Product by product: where zeros beside the images have made a NaN.
template <class T, int R, int stride>
__device__ __noinline__ float exact_lanes(LanesParams const& p, int c, int tap) {
  float sum = 0;
  if (c >= p.C) return sum;
  int const r = tap / R, s = tap % R;
#pragma unroll 1
  for (int line = 0; line < p.N * p.P; ++line) {
    int const n = line / p.P, row = line - n * p.P, h = row * stride - R / 2 + p.rows.shift + r;
    if (unsigned(h) >= unsigned(p.H)) continue;
    T const* const x = static_cast<T const*>(p.a) + n * p.a_n + c * p.a_c + h * p.a_h;
    T const* const y = static_cast<T const*>(p.b) + n * p.b_n + c * p.b_c + row * p.b_h;
#pragma unroll 1
    for (int q = 0; q < p.Q; ++q)
      if (int const w = q * stride - R / 2 + p.columns.shift + s; unsigned(w) < unsigned(p.W))
        sum += widen(x[w]) * widen(y[q]);
    if (sum != sum) return sum;  // NaN, whatever comes
  }
  return sum;
}

template <class T, int R, int stride, bool words>
__global__ void __launch_bounds__(lanes_threads(Op::wgrad, R), R == 7 ? 1 : 2)
    lanes_sums(__grid_constant__ LanesParams const p) {
  constexpr int pad = R / 2, outputs = stride == 1 && words ? 2 : 1, columns = outputs * stride;
  constexpr int band = lanes_band(Op::wgrad, stride), rows = (band - 1) * stride + R;
  constexpr int taps = R * R;
  extern __shared__ float lanes_shared[];
  int const threads = int(blockDim.x), pitch = lanes_shared_pitch(threads);
  int const segment = int(threadIdx.x) >> p.lanes_log2, segments = 1 << p.segments_log2;
  int const channel_log2 = p.lanes_log2 + p.segments_log2, channels = 1 << p.channels_log2;
  int const c0 = int(blockIdx.x) << p.channels_log2, c = c0 + (segment >> p.segments_log2);
  T const* const x_of_c = static_cast<T const*>(p.a) + c * p.a_c;
  T const* const y_of_c = static_cast<T const*>(p.b) + c * p.b_c;
  int const items = c < p.C ? p.items : 0;
  float acc[R][R] = {};
#pragma unroll 1
  for (int first = 0; first < p.items; first += segments) {
    int const item = first + (segment & (segments - 1)), line = int(p.by_strips.quotient(item));
    int const n = int(p.by_bands.quotient(line)), p0 = (line - n * int(p.by_bands.value)) * band;
    LanesStrip const of(p, item - line * int(p.by_strips.value));
    int const h0 = p0 * stride - pad + p.rows.shift, w0 = of.in * columns + p.columns.shift, q = of.out * outputs;
    T const* const x_from = x_of_c + n * p.a_n + (h0 * p.a_h + w0);
    T const* const y_from = y_of_c + n * p.b_n + (p0 * p.b_h + q);
    int const H = item < items ? p.H : 0, end = item < items && of.stores && q < p.Q ? p.P - p0 : 0;
    Columns<T, columns, words> x[rows];
    Columns<T, outputs, words> y[band];
#pragma unroll
    for (int j = 0; j < rows; ++j) x[j].load(x_from + j * p.a_h, unsigned(h0 + j) < unsigned(H), w0, p.W);
#pragma unroll
    for (int b = 0; b < band; ++b) y[b].load(y_from + b * p.b_h, b < end, 0, 1);
#pragma unroll
    for (int j = 0; j < rows; ++j) {
      float v[R + outputs - 1];
      x[j].template window<-pad, R + outputs - 1>(of.lane, of.lanes, v);
#pragma unroll
      for (int r = j % stride; r < R && r <= j; r += stride) {
        if ((j - r) / stride >= band) continue;
        float g[outputs];
        y[(j - r) / stride].widened(g);
#pragma unroll
        for (int s = 0; s < R; ++s)
#pragma unroll
          for (int e = 0; e < outputs; ++e) acc[r][s] = fmaf(v[s + e], g[e], acc[r][s]);
      }
    }
  }
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) lanes_shared[tap * pitch + int(threadIdx.x)] = acc[tap / R][tap % R];
  __syncthreads();
  int const team = 1 << p.team_log2, member = int(threadIdx.x) & (team - 1), all = channels * taps;
  int const begin = int(threadIdx.x) >> p.team_log2, step = threads >> p.team_log2;
  auto store = [&](int i, float sum) {
    int const tap = i >> p.channels_log2, k = c0 + (i & (channels - 1));
    if (k < p.C) static_cast<T*>(p.out)[int64_t(k) * p.w_k + tap / R * p.w_r + tap % R * p.w_s] = narrow<T>(sum);
  };
  bool nan = false;
  // Teams of a warp go together.
#pragma unroll 1
  for (int i = begin; i - begin < all; i += step) {
    int const tap = min(i >> p.channels_log2, taps - 1);
    float const* const from = lanes_shared + tap * pitch + ((i & (channels - 1)) << channel_log2);
    float part[4] = {};
#pragma unroll 1
    for (int j = member; j < 1 << channel_log2; j += 4 * team)  // four at least of a thread
#pragma unroll
      for (int e = 0; e < 4; ++e) part[e] += from[j + e * team];
    float sum = (part[0] + part[1]) + (part[2] + part[3]);
#pragma unroll 1
    for (int distance = team / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (member == 0 && i < all) store(i, sum), nan |= sum != sum;
  }
  if (nan)
#pragma unroll 1
    for (int i = begin; i < all; i += step)
      store(i, exact_lanes<T, R, stride>(p, c0 + (i & (channels - 1)), i >> p.channels_log2));
}

// ---- host side

template <Op op, class T, int R, int stride, bool words>
cudaError_t start_lanes(LanesParams const& p, LanesTile const& t, cudaStream_t stream) {
  void (*kernel)(LanesParams);
  int const shared = op == Op::wgrad ? R * R * lanes_shared_pitch(t.threads) * 4 : 0;
  if constexpr (op == Op::wgrad)
    kernel = lanes_sums<T, R, stride, words>;
  else if constexpr (op == Op::dgrad && stride == 2)
    kernel = lanes_spread<T, R, words>;
  else
    kernel = lanes_forward<T, R, stride, words>;
  kernel<<<unsigned(t.blocks), unsigned(t.threads), size_t(shared), stream>>>(p);
  return cudaGetLastError();
}

template <Op op, DType dtype>
cudaError_t launch_lanes(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  LanesTile const t = lanes_tile(op, problem, h200_sxm);
  if (!t.used) return cudaErrorInvalidValue;
  bool const backward = op == Op::dgrad;
  Strides const &a = backward ? problem.y : problem.x, &b = backward ? problem.x : problem.y;
  LanesParams p{};
  p.a = args.a, p.b = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride, p.out = args.out;
  p.a_n = a.n, p.a_c = a.c, p.a_h = int(a.h), p.b_n = b.n, p.b_c = b.c, p.b_h = int(b.h);
  p.w_k = int(problem.w.n), p.w_r = int(problem.w.h), p.w_s = int(problem.w.w);
  p.N = int(problem.N), p.C = int(problem.C);
  p.H = int(backward ? problem.P() : problem.H), p.W = int(backward ? problem.Q() : problem.W);
  p.P = int(backward ? problem.H : problem.P()), p.Q = int(backward ? problem.W : problem.Q());
  if (backward && problem.stride_h == 1) {
    p.b = static_cast<T const*>(args.b) + (problem.R - 1) * (problem.w.h + problem.w.w);
    p.w_r = -p.w_r, p.w_s = -p.w_s;
  }
  p.rows = lanes_axis(op, problem.R, problem.stride_h, problem.pad_top);
  p.columns = lanes_axis(op, problem.R, problem.stride_w, problem.pad_left);
  p.before = t.before, p.items = int(t.items);
  while (1 << p.lanes_log2 < t.lanes) ++p.lanes_log2;
  while (1 << p.segments_log2 < t.segments) ++p.segments_log2;
  while (1 << p.team_log2 < t.team) ++p.team_log2;
  while (t.lanes * t.segments << p.channels_log2 < t.threads) ++p.channels_log2;
  p.strip = t.strip, p.by_strips = Divisor(uint32_t(t.strips)), p.by_bands = Divisor(uint32_t(t.bands)),
  p.by_channels = Divisor(uint32_t(p.C));
  return by_filter(problem, [&]<int R, int stride>() {
    return t.words ? start_lanes<op, T, R, stride, true>(p, t, stream)
                   : start_lanes<op, T, R, stride, false>(p, t, stream);
  });
}

}  // namespace conv2d_ext::depthwise

#define CONV2D_EXT_DEPTHWISE_LANES_INSTANCE(family, op, dtype, tm, tn, tk, variant)                                    \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                                            \
    LanesRoad const road = lanes_choice(Op::op, p).road;                                                               \
    if (road == LanesRoad::single) return depthwise::launch_single<Op::op, DType::dtype, true>(p, plan, args, stream); \
    if constexpr (DType::dtype == DType::f32)                                                                          \
      if (road == LanesRoad::copied) return depthwise::launch_copied<Op::op>(p, plan, args, stream);                   \
    return depthwise::launch_lanes<Op::op, DType::dtype>(p, args, stream);                                             \
  }
