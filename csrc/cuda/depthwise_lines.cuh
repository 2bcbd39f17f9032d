// Depthwise convolution in channels_last for everything that faster rows leave: any filter, stride, dilation, padding
// and channel count, K = m * C. No shared memory holds pixels: a thread's inputs come straight from L1, as vectors of V
// channels where the strides allow.
//   fprop, dgrad: a thread has kOutputs outputs of a row of the image. Along a row of the filter they meet a window of
//   inputs, which is loaded once for every kTaps taps. dgrad goes by phases of the stride (dgrad_walk), so that outputs
//   of a thread meet the same taps.
//   wgrad: a thread has kTaps neighbouring taps of a row of the filter, and takes kOutputs gradients at a time.
// Outputs of a thread are `spread` columns apart, so that windows stay dense with dilation.
#pragma once

#include "../core/lines.h"
#include "depthwise.cuh"

namespace conv2d_ext::depthwise {

constexpr int kOutputs = kLineOutputs, kTaps = kLineTaps, kPhases = kLinePhases;

// Of an SM, so that no registers are spilled.
constexpr int line_blocks(int ratio) { return ratio == 0 ? 1 : 2; }

// A Walk of problem.h on the device; output i of it is at coordinate phase + i * step.
struct Line {
  int pixels, taps, lower, stride, tap_stride, first_tap, tap_step, phase, step;
};

struct LineParams {
  void const* in;     // x; dgrad: y
  void const* other;  // w; wgrad: y
  void const* bias;
  void* out;
  void* partial;
  int64_t in_n, in_c, in_h, in_w;
  int64_t out_n, out_c, out_h, out_w;  // wgrad: of y
  int64_t w_k, w_r, w_s, bias_stride;
  int64_t N, channels;  // of out; wgrad: of y
  int in_H, in_W, multiplier;
  Line h[kPhases], w[kPhases];
  int phases_w;                     // of a launch
  int lanes, groups;                // of a block: threads side by side along the channels, and along the image
  int slices, spread, rows;         // rows of a thread
  int filter_rows, filter_columns;  // whose taps are in shared memory at a time
  // wgrad
  int S, tap_units, tap_slices, members, segments, each, splits;  // each: groups of columns of a segment
};

// V channels of a pixel, or zeros. As words: merged with zeros element by element, 16-bit types take twice the moves.
template <class T, int V, class Acc>
__device__ inline void load_channels(T const* from, bool exists, Acc (&to)[V]) {
  if constexpr (sizeof(T) == 2 && V == 4) {
    uint2 bits = make_uint2(0, 0);
    if (exists) bits = *reinterpret_cast<uint2 const*>(from);
    Vector<T, V> const v = *reinterpret_cast<Vector<T, V> const*>(&bits);
#pragma unroll
    for (int e = 0; e < V; ++e) to[e] = widen(v.v[e]);
  } else {
    Vector<T, V> v{};
    if (exists) v = *reinterpret_cast<Vector<T, V> const*>(from);
#pragma unroll
    for (int e = 0; e < V; ++e) to[e] = widen(v.v[e]);
  }
}

// The first of a thread's columns, of the group of columns `index`.
__device__ inline int column_of(int index, int spread) {
  return spread == 1 ? index * kOutputs : index / spread * kOutputs * spread + index % spread;
}

// ratio: the columns that a window moves by from output to output; 0: outputs share no inputs.
template <class T, Op op, int V, int ratio>
__global__ void __launch_bounds__(kLineThreads, line_blocks(ratio)) gather_lines(__grid_constant__ LineParams const p) {
  using Acc = decltype(widen(T()));
  constexpr int window = ratio == 0 ? kOutputs : (kOutputs - 1) * ratio + kTaps;
  extern __shared__ __align__(16) unsigned char shared[];
  Acc* const filters = reinterpret_cast<Acc*>(shared);
  Line const &ah = p.h[blockIdx.y / p.phases_w], &aw = p.w[blockIdx.y % p.phases_w];
  int const lane = int(threadIdx.x) % p.lanes, width = p.lanes * V, pitch = width + 4;
  int64_t const c0 = int64_t(blockIdx.x % p.slices) * width, c = c0 + lane * V;
  uint32_t unit = blockIdx.x / p.slices * p.groups + threadIdx.x / p.lanes;
  int const columns = int(ceil_div(aw.pixels, kOutputs * p.spread)) * p.spread, rows = int(ceil_div(ah.pixels, p.rows));
  int const i0 = column_of(split_off(unit, columns), p.spread), row0 = split_off(unit, rows) * p.rows;
  int64_t const n = unit;
  bool const exists = n < p.N && c < p.channels && int(threadIdx.x) / p.lanes < p.groups;
  T const* const in = static_cast<T const*>(p.in) + n * p.in_n;
  Acc bias[V];
#pragma unroll
  for (int e = 0; e < V; ++e)
    bias[e] = p.bias != nullptr && exists ? Acc(widen(static_cast<T const*>(p.bias)[(c + e) * p.bias_stride])) : Acc(0);

  bool const once = op != Op::dgrad || p.multiplier == 1 ? ah.taps <= p.filter_rows && aw.taps <= p.filter_columns
                                                         : false;  // the taps stay in shared memory
  for (int row = row0; row < row0 + p.rows; ++row) {
    Acc acc[kOutputs][V], chain[kOutputs][V] = {};
    int terms = 0;
#pragma unroll
    for (int i = 0; i < kOutputs * V; ++i) acc[i / V][i % V] = bias[i % V];
    auto add_chain = [&] {
#pragma unroll
      for (int i = 0; i < kOutputs * V; ++i) acc[i / V][i % V] += chain[i / V][i % V], chain[i / V][i % V] = 0;
      terms = 0;
    };
    bool const inside = exists && row < ah.pixels;
    for (int j = 0; j < (op == Op::dgrad ? p.multiplier : 1); ++j)
      for (int r0 = 0; r0 < ah.taps; r0 += p.filter_rows)
        for (int s0 = 0; s0 < aw.taps; s0 += p.filter_columns) {
          int const R = min(p.filter_rows, ah.taps - r0), S = min(p.filter_columns, aw.taps - s0);
          if (!once || row == row0) {
            __syncthreads();
            for (int i = threadIdx.x; i < R * S * width; i += blockDim.x) {
              int const tap = i % (R * S), channel = i / (R * S), r = tap / S, s = tap % S;
              int64_t const k = op == Op::dgrad ? (c0 + channel) * p.multiplier + j : c0 + channel;
              filters[tap * pitch + channel] =
                  c0 + channel < p.channels ? widen(static_cast<T const*>(
                                                  p.other)[k * p.w_k + (ah.first_tap + (r0 + r) * ah.tap_step) * p.w_r +
                                                           (aw.first_tap + (s0 + s) * aw.tap_step) * p.w_s])
                                            : Acc(0);
            }
            __syncthreads();
          }
          if (!inside) continue;
          int64_t const in_c = op == Op::dgrad ? c * p.multiplier + j : V == 1 ? c / p.multiplier : c;
          for (int r = 0; r < R; ++r) {
            int const h = ah.lower + row * ah.stride + (r0 + r) * ah.tap_stride;
            if (unsigned(h) >= unsigned(p.in_H)) continue;
            T const* const from = in + h * p.in_h + in_c * p.in_c;
            int const w0 = aw.lower + i0 * aw.stride + s0 * aw.tap_stride;
            Acc const* const taps = filters + r * S * pitch + lane * V;
            auto add = [&](int b, int s, Acc const(&v)[V]) {
              Vector<Acc, V> const tap = *reinterpret_cast<Vector<Acc, V> const*>(taps + s * pitch);
#pragma unroll
              for (int e = 0; e < V; ++e) chain[b][e] += v[e] * tap.v[e];
            };
            if constexpr (ratio == 0) {
              for (int s = 0; s < S; ++s) {
                Acc v[kOutputs][V];
#pragma unroll
                for (int b = 0; b < kOutputs; ++b) {
                  int const w = w0 + b * p.spread * aw.stride + s * aw.tap_stride;
                  load_channels(from + w * p.in_w, unsigned(w) < unsigned(p.in_W), v[b]);
                }
#pragma unroll
                for (int b = 0; b < kOutputs; ++b) add(b, s, v[b]);
                if (++terms == kChain) add_chain();
              }
            } else {
              Acc v[window][V];
#pragma unroll
              for (int i = 0; i < window - kTaps; ++i) {
                int const w = w0 + i * aw.tap_stride;
                load_channels(from + w * p.in_w, unsigned(w) < unsigned(p.in_W), v[i]);
              }
              for (int s = 0; s < S; s += kTaps) {
#pragma unroll
                for (int i = window - kTaps; i < window; ++i) {
                  int const w = w0 + (s + i) * aw.tap_stride;
                  load_channels(from + w * p.in_w, s + i - (window - kTaps) < S && unsigned(w) < unsigned(p.in_W),
                                v[i]);
                }
#pragma unroll
                for (int t = 0; t < kTaps; ++t)
                  if (s + t < S)
#pragma unroll
                    for (int b = 0; b < kOutputs; ++b) add(b, s + t, v[b * ratio + t]);
#pragma unroll
                for (int i = 0; i < (window - kTaps) * V; ++i) v[i / V][i % V] = v[i / V + kTaps][i % V];
                if ((terms += kTaps) >= kChain) add_chain();
              }
            }
          }
        }
    if (!inside) continue;
    add_chain();
    T* const to = static_cast<T*>(p.out) + n * p.out_n + c * p.out_c + (ah.phase + row * ah.step) * p.out_h;
#pragma unroll
    for (int b = 0; b < kOutputs; ++b) {
      int const i = i0 + b * p.spread;
      Vector<T, V> v;
#pragma unroll
      for (int e = 0; e < V; ++e) v.v[e] = narrow<T>(acc[b][e]);
      if (i < aw.pixels) *reinterpret_cast<Vector<T, V>*>(to + (aw.phase + i * aw.step) * p.out_w) = v;
    }
  }
}

// A block's groups: tap units, and members that share their units' pixels; the members' sums are added in order.
template <class T, int V, int ratio>
__global__ void __launch_bounds__(kLineThreads, line_blocks(ratio)) wgrad_lines(__grid_constant__ LineParams const p) {
  using Acc = decltype(widen(T()));
  constexpr int window = ratio == 0 ? kTaps : (kOutputs - 1) * ratio + kTaps;
  __shared__ Acc sums[kLineThreads * kTaps * V];
  Line const &ah = p.h[0], &aw = p.w[0];
  int const lane = int(threadIdx.x) % p.lanes, group = int(threadIdx.x) / p.lanes;
  int const units_here = min(p.groups, p.tap_units), member = group / units_here;
  uint32_t index = blockIdx.x;
  int64_t const c = int64_t(split_off(index, p.slices)) * p.lanes * V + lane * V;
  int const unit = split_off(index, p.tap_slices) * units_here + group % units_here, split = int(index);
  int const units_of_row = int(ceil_div(p.S, kTaps)), r = unit / units_of_row, s0 = unit % units_of_row * kTaps;
  bool const exists = c < p.channels && member < p.members && unit < p.tap_units;
  Acc acc[kTaps][V] = {};
  int const total = int(p.N) * ah.pixels * p.segments;  // runs of columns
  int const begin = int(int64_t(total) * split / p.splits), end = int(int64_t(total) * (split + 1) / p.splits);
  int const columns = int(ceil_div(aw.pixels, kOutputs * p.spread)) * p.spread;
  if (exists)
    for (int run = begin + member; run < end; run += p.members) {
      uint32_t rest = uint32_t(run);
      int const first = split_off(rest, p.segments) * p.each, row = split_off(rest, ah.pixels),
                h = ah.lower + row * ah.stride + r * ah.tap_stride;
      if (unsigned(h) >= unsigned(p.in_H)) continue;
      int64_t const n = rest;
      T const* const x =
          static_cast<T const*>(p.in) + n * p.in_n + h * p.in_h + (V == 1 ? c / p.multiplier : c) * p.in_c;
      T const* const y = static_cast<T const*>(p.other) + n * p.out_n + row * p.out_h + c * p.out_c;
      Acc chain[kTaps][V] = {};
      int terms = 0;
      for (int group = first; group < min(first + p.each, columns); ++group) {
        int const q0 = column_of(group, p.spread), w0 = aw.lower + q0 * aw.stride + s0 * aw.tap_stride;
        Acc gradient[kOutputs][V];
#pragma unroll
        for (int b = 0; b < kOutputs; ++b) {
          int const q = q0 + b * p.spread;
          load_channels(y + q * p.out_w, q < aw.pixels, gradient[b]);
        }
        // Products with what is outside of an image are left out: a zero times an infinity is NaN.
        auto add = [&](int b, int t, int w, Acc const(&v)[V]) {
          if (q0 + b * p.spread < aw.pixels && unsigned(w) < unsigned(p.in_W))
#pragma unroll
            for (int e = 0; e < V; ++e) chain[t][e] += v[e] * gradient[b][e];
        };
        if constexpr (ratio == 0) {
#pragma unroll
          for (int b = 0; b < kOutputs; ++b) {
            Acc v[kTaps][V];
#pragma unroll
            for (int t = 0; t < kTaps; ++t) {
              int const w = w0 + b * p.spread * aw.stride + t * aw.tap_stride;
              load_channels(x + w * p.in_w, unsigned(w) < unsigned(p.in_W) && s0 + t < p.S, v[t]);
            }
#pragma unroll
            for (int t = 0; t < kTaps; ++t) add(b, t, w0 + b * p.spread * aw.stride + t * aw.tap_stride, v[t]);
          }
        } else {
          Acc v[window][V];
#pragma unroll
          for (int i = 0; i < window; ++i) {
            int const w = w0 + i * aw.tap_stride;
            load_channels(x + w * p.in_w, unsigned(w) < unsigned(p.in_W), v[i]);
          }
#pragma unroll
          for (int t = 0; t < kTaps; ++t)
#pragma unroll
            for (int b = 0; b < kOutputs; ++b) add(b, t, w0 + (b * ratio + t) * aw.tap_stride, v[b * ratio + t]);
        }
        if ((terms += kOutputs) == kChain || group + 1 == min(first + p.each, columns)) {
          terms = 0;
#pragma unroll
          for (int i = 0; i < kTaps * V; ++i) acc[i / V][i % V] += chain[i / V][i % V], chain[i / V][i % V] = 0;
        }
      }
    }
  if (exists)
#pragma unroll
    for (int i = 0; i < kTaps * V; ++i)
      sums[(group * kTaps + i / V) * p.lanes * V + lane * V + i % V] = acc[i / V][i % V];
  __syncthreads();
  if (!exists || member != 0) return;
#pragma unroll
  for (int i = 0; i < kTaps * V; ++i) {
    int const s = s0 + i / V;
    if (s >= p.S) continue;
    Acc sum = 0;
    for (int other = 0; other < p.members; ++other)
      sum += sums[((other * units_here + group) * kTaps + i / V) * p.lanes * V + lane * V + i % V];
    int64_t const k = c + i % V;
    store_sum<T>(p.out, p.partial, p.splits, k * p.w_k + r * p.w_r + s * p.w_s,
                 (split * p.channels + k) * (ah.taps * p.S) + r * p.S + s, sum);
  }
}

// ---- host side

inline Line line_of(Walk const& w, int64_t phase, int64_t step) {
  return {int(w.pixels),    int(w.taps),     int(w.lower), int(w.stride), int(w.tap_stride),
          int(w.first_tap), int(w.tap_step), int(phase),   int(step)};
}

// `plain`: the kernels of GPUs other than Hopper.
template <Op op, DType dtype, bool plain>
cudaError_t launch_lines(Problem const& problem, Plan const& plan, Device const& gpu, Arguments const& args,
                         cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad, sums = op == Op::wgrad;
  constexpr int most = plain || sizeof(T) == 8 ? 1 : 4;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  LineParams p{};
  p.in = args.a, p.other = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride;
  p.out = args.out, p.partial = args.workspace, p.splits = plan.split_k;
  p.in_n = in.n, p.in_c = in.c, p.in_h = in.h, p.in_w = in.w;
  p.out_n = out.n, p.out_c = out.c, p.out_h = out.h, p.out_w = out.w;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.in_H = int(backward ? problem.P() : problem.H), p.in_W = int(backward ? problem.Q() : problem.W);
  p.N = problem.N, p.channels = backward ? problem.C : problem.K, p.multiplier = int(problem.K_per_group());
  p.S = int(problem.S);
  LineTile const t = line_tile(op, problem, gpu);
  p.lanes = t.lanes, p.groups = t.groups, p.slices = int(t.slices), p.spread = t.spread, p.rows = t.rows;
  p.filter_rows = t.filter_rows, p.filter_columns = t.filter_columns;
  auto start = [&](auto* kernel, int64_t blocks, int phases, size_t shared) {
    if (blocks == 0) return cudaSuccess;
    kernel<<<dim3(unsigned(blocks), unsigned(phases)), unsigned(ceil_div(t.lanes * t.groups, 32) * 32), shared,
             stream>>>(p);
    return cudaGetLastError();
  };
  if constexpr (sums) {
    p.h[0] = line_of(fprop_walk(problem.P(), problem.R, problem.stride_h, problem.pad_top, problem.dilation_h), 0, 1);
    p.w[0] =
        line_of(fprop_walk(problem.Q(), problem.S, problem.stride_w, problem.pad_left, line_dilation(problem)), 0, 1);
    p.tap_units = t.tap_units, p.tap_slices = t.tap_slices, p.members = t.members;
    p.segments = int(t.segments), p.each = int(t.each);
    auto* kernel = t.vector == 1 ? wgrad_lines<T, 1, 0> : wgrad_lines<T, most, 0>;
    if constexpr (!plain)
      if (t.ratio == 1) kernel = t.vector == 1 ? wgrad_lines<T, 1, 1> : wgrad_lines<T, most, 1>;
    if constexpr (most > 1)
      if (t.ratio == 2) kernel = wgrad_lines<T, most, 2>;
    if (cudaError_t const error = start(kernel, t.slices * t.tap_slices * p.splits, 1, 0);
        error != cudaSuccess || p.splits == 1)
      return error;
    return launch_sum<T>(problem, plan, args, stream);
  } else {
    auto* kernel = t.vector == 1 ? gather_lines<T, op, 1, 0> : gather_lines<T, op, most, 0>;
    if constexpr (!plain)
      if (t.ratio == 1) kernel = t.vector == 1 ? gather_lines<T, op, 1, 1> : gather_lines<T, op, most, 1>;
    if constexpr (!backward && most > 1)
      if (t.ratio == 2) kernel = gather_lines<T, op, most, 2>;
    constexpr int element = sizeof(T) == 8 ? 8 : 4;
    size_t const shared = size_t(t.filter_rows) * t.filter_columns * (t.lanes * t.vector + 4) * element;
    int64_t const phases_h = backward ? phases_of(problem.H, problem.stride_h) : 1;
    int64_t const phases_w = backward ? phases_of(problem.W, problem.stride_w) : 1;
    for (int64_t ph = 0; ph < phases_h; ph += kPhases)
      for (int64_t pw = 0; pw < phases_w; pw += kPhases) {
        int const count_h = int(min64(kPhases, phases_h - ph)), count_w = int(min64(kPhases, phases_w - pw));
        if constexpr (backward) {
          for (int i = 0; i < count_h; ++i)
            p.h[i] =
                line_of(dgrad_walk(problem.H, problem.R, problem.stride_h, problem.pad_top, problem.dilation_h, ph + i),
                        ph + i, problem.stride_h);
          for (int i = 0; i < count_w; ++i)
            p.w[i] = line_of(
                dgrad_walk(problem.W, problem.S, problem.stride_w, problem.pad_left, line_dilation(problem), pw + i),
                pw + i, problem.stride_w);
        } else {
          p.h[0] =
              line_of(fprop_walk(problem.P(), problem.R, problem.stride_h, problem.pad_top, problem.dilation_h), 0, 1);
          p.w[0] = line_of(
              fprop_walk(problem.Q(), problem.S, problem.stride_w, problem.pad_left, line_dilation(problem)), 0, 1);
        }
        p.phases_w = count_w;
        if (auto const error = start(kernel, t.blocks(p.N), count_h * count_w, shared)) return error;
      }
    return cudaSuccess;
  }
}

}  // namespace conv2d_ext::depthwise
