// Depthwise convolution, and groups of few channels, with any filter, stride and dilation of small layers, and where
// few taps meet: the image is smaller than the filter, or a stride leaves most of them out. Tensors may lie in any
// layout.
//   gather_met: fprop, dgrad. A thread has one output or kMetRows of a column, goes over the taps alone that these
//     meet, of one filter after the other, and asks for a chunk of them at once.
//   sums_met: wgrad. A thread has a part of the products of a tap; a block adds the parts up in a fixed order.
#pragma once

#include "../core/met.h"
#include "depthwise.cuh"

namespace conv2d_ext::depthwise {

// Along one axis: core's MetAxis with its divisors.
struct MetSteps {
  int stride, pad, taps, length;  // length: of the input
  int step, next, common, inverse;
  Divisor by_step, by_next, by_common;
};

struct MetParams {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t in_n, in_c, out_n, out_c, out_h, out_w, w_k, bias_stride;
  int in_h, in_w, w_r, w_s, w_c;
  int out_H;
  MetSteps h, w_axis;
  uint32_t items, multiplier;  // outputs of a group
  int filters;                 // that an output adds up, `next_tap` apart, of inputs `next_in` apart
  int next_in, next_tap;
  bool channels_last;  // neighbouring threads have neighbouring channels, not columns
  WideDivisor by_first, by_second, by_third, by_stride_h;
};

// The taps that outputs meet: `count` of them from `tap` on; the first one's input of the first output.
struct MetTaps {
  int tap, count, input;

  // `span`: from the first output's input to the last one's.
  template <bool backward>
  __device__ static MetTaps of(MetSteps const& a, int output, int span) {
    MetTaps t;
    int first = 0, all = a.taps;
    t.input = output * a.stride - a.pad;
    if constexpr (backward) {
      // input * step = place - first * next
      uint32_t const u = uint32_t(output + a.pad), place = a.by_common.quotient(u);
      uint32_t const whole = a.by_step.quotient(place), rest = place - whole * uint32_t(a.step);
      uint32_t const product = rest * uint32_t(a.inverse);
      first = int(product - a.by_step.quotient(product) * uint32_t(a.step));
      t.input = int(whole + a.by_step.quotient(rest + uint32_t((a.step - first) * a.next))) - a.next;
      bool const meets = place * uint32_t(a.common) == u && first < a.taps;
      all = meets ? int(a.by_step.quotient(uint32_t(a.taps - first + a.step - 1))) : 0;
    }
    int const before = backward ? t.input - (a.length - 1) : -(t.input + span);
    int const last = backward ? t.input + span : a.length - 1 - t.input;
    int const begin = before > 0 ? int(a.by_next.quotient(uint32_t(before + a.next - 1))) : 0;
    int const end = last < 0 ? 0 : min(all, int(a.by_next.quotient(uint32_t(last))) + 1);
    t.tap = first + begin * a.step, t.count = max(end - begin, 0);
    t.input += begin * (backward ? -a.next : a.next);
    return t;
  }
};

// Blocks of an SM, as the registers allow; without, the compiler waits for some loads before it asks for others.
constexpr int met_blocks(int size, int rows) { return size == 8 ? 3 : rows == 1 ? 6 : 4; }

// Outputs of a thread: dgrad's are a stride apart, and meet the same taps.
template <class T, bool backward, int E, bool several>
__global__ void __launch_bounds__(kMetThreads, met_blocks(sizeof(T), E))
    gather_met(__grid_constant__ MetParams const p) {
  using Acc = decltype(widen(T()));
  constexpr int chunk = met_chunk(sizeof(T), E);
  uint32_t const i = blockIdx.x * kMetThreads + threadIdx.x;
  if (i >= p.items) return;
  uint32_t const second = p.by_first.quotient(i), third = p.by_second.quotient(second), n = p.by_third.quotient(third);
  uint32_t const of_first = i - second * p.by_first.value, of_second = second - third * p.by_second.value;
  uint32_t const of_third = third - n * p.by_third.value;
  uint32_t const c = p.channels_last ? of_first : of_third, group = p.channels_last ? of_third : of_second;
  uint32_t const apart = p.by_stride_h.value, whole = p.by_stride_h.quotient(group);
  int const column = int(p.channels_last ? of_second : of_first), row = int(group + whole * apart * (E - 1));
  if (row >= p.out_H) return;

  int const in_step = backward ? 1 : p.h.stride;
  MetTaps const h = MetTaps::of<backward>(p.h, row, (E - 1) * in_step), w = MetTaps::of<backward>(p.w_axis, column, 0);
  uint32_t const of_c = p.multiplier > 1 ? c / p.multiplier : c, inputs = of_c * uint32_t(p.filters);
  T const* const from = static_cast<T const*>(p.in) + n * p.in_n + inputs * p.in_c;
  T const* taps = static_cast<T const*>(p.w);
  taps += backward ? inputs * p.w_k + (c - of_c * p.multiplier) * uint32_t(p.w_c) : c * p.w_k;
  int const next_h = backward ? -p.h.next : p.h.next, next_w = (backward ? -p.w_axis.next : p.w_axis.next) * p.in_w;
  int const tap_s = p.w_axis.step * p.w_s, tap_row = p.h.step * p.w_r - (w.count - 1) * tap_s;
  int const at_row = next_h * p.in_h - (w.count - 1) * next_w;
  // From the last tap of a filter to the first of the next.
  int const at_filter = p.next_in - h.count * next_h * p.in_h, tap_filter = p.next_tap - h.count * p.h.step * p.w_r;
  Acc acc[E] = {};
  int y = h.input, at = h.input * p.in_h + w.input * p.in_w, tap = h.tap * p.w_r + w.tap * p.w_s, columns = w.count;
  int rows = h.count;
#pragma unroll 1
  for (int left = h.count * w.count * (several ? p.filters : 1); left > 0; left -= chunk) {
    T v[chunk][E], f[chunk];
#pragma unroll
    for (int j = 0; j < chunk; ++j) {
      bool const exists = j < left;
      f[j] = narrow<T>(Acc(0));
      if (exists) f[j] = __ldg(taps + tap);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        v[j][e] = narrow<T>(Acc(0));
        bool const inside = E == 1 || unsigned(y + e * in_step) < unsigned(p.h.length);
        if (exists && inside) v[j][e] = __ldg(from + (at + e * in_step * p.in_h));
      }
      bool const ends = --columns == 0;
      columns = ends ? w.count : columns, y += ends ? next_h : 0;
      at += ends ? at_row : next_w, tap += ends ? tap_row : tap_s;
      if constexpr (several) {
        rows -= ends;
        bool const filter_ends = rows == 0;
        rows = filter_ends ? h.count : rows, y = filter_ends ? h.input : y;
        at += filter_ends ? at_filter : 0, tap += filter_ends ? tap_filter : 0;
      }
    }
    Acc chain[E] = {};
#pragma unroll
    for (int j = 0; j < chunk; ++j)
#pragma unroll
      for (int e = 0; e < E; ++e) chain[e] += widen(v[j][e]) * widen(f[j]);
#pragma unroll
    for (int e = 0; e < E; ++e) acc[e] += chain[e];
  }
  Acc const bias = p.bias != nullptr ? Acc(widen(static_cast<T const*>(p.bias)[c * p.bias_stride])) : Acc(0);
  T* const out = static_cast<T*>(p.out) + n * p.out_n + c * p.out_c + column * p.out_w;
#pragma unroll
  for (int e = 0; e < E; ++e) {
    int const to = row + e * int(apart);
    if (to >= p.out_H) break;
    out[to * p.out_h] = narrow<T>(acc[e] + bias);
  }
}

struct MetSumParams {
  void const* x;
  void const* y;
  void* out;
  int64_t x_c, y_c, w_k, w_c, w_r, w_s;
  int x_n, x_h, x_w, y_n, y_h, y_w;
  int N, H, W, P, Q, S, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w;
  uint32_t units, multiplier, channels;  // channels: of a group
  int units_log2;                        // of a block
  bool channels_last;                    // neighbouring threads have neighbouring channels, not taps
  WideDivisor by_first, by_S;
  Divisor by_stride_h, by_stride_w;
};

// wgrad: a thread has a part of the products of a tap, in the order of the images.
template <class T>
__global__ void __launch_bounds__(kMetSumThreads, sizeof(T) == 8 ? 3 : 5)
    sums_met(__grid_constant__ MetSumParams const p) {
  using Acc = decltype(widen(T()));
  __shared__ Acc sums[kMetSumThreads];
  int const thread = int(threadIdx.x), part = thread >> p.units_log2, parts = kMetSumThreads >> p.units_log2;
  uint32_t const unit = (blockIdx.x << p.units_log2) + (thread & ((1 << p.units_log2) - 1));
  uint32_t const second = p.by_first.quotient(unit), of_first = unit - second * p.by_first.value;
  uint32_t const plane = p.channels_last ? of_first : second, tap = p.channels_last ? second : of_first;
  uint32_t const k = p.channels > 1 ? plane / p.channels : plane, c = plane - k * p.channels;
  uint32_t const r = p.by_S.quotient(tap), s = tap - r * p.by_S.value;
  struct Range {
    int begin, count;
  };
  // Outputs that meet a tap whose input of the first is -low.
  auto met = [](int low, int stride, Divisor const& by_stride, int length, int outputs) {
    int const begin = low > 0 ? int(by_stride.quotient(uint32_t(low + stride - 1))) : 0, last = length - 1 + low;
    int const end = last < 0 ? 0 : min(outputs, int(by_stride.quotient(uint32_t(last))) + 1);
    return Range{begin, max(end - begin, 0)};
  };
  int const low_h = p.pad_h - int(r) * p.dilation_h, low_w = p.pad_w - int(s) * p.dilation_w;
  Range const rows = met(low_h, p.stride_h, p.by_stride_h, p.H, p.P);
  Range const columns = met(low_w, p.stride_w, p.by_stride_w, p.W, p.Q);
  int const image = rows.count * columns.count, all = unit < p.units ? image * p.N : 0;
  int const begin = int(int64_t(all) * part / parts);
  int left = int(int64_t(all) * (part + 1) / parts) - begin;
  Acc acc = 0;
  if (left > 0) {
    int const n = begin / image, i = begin - n * image, row = i / columns.count, column = i - row * columns.count;
    uint32_t const group = p.multiplier > 1 ? k / p.multiplier : k;
    T const* const x = static_cast<T const*>(p.x) + (group * p.channels + c) * p.x_c;
    T const* const y = static_cast<T const*>(p.y) + k * p.y_c;
    int const h = rows.begin + row, w = columns.begin + column;
    int at_x = n * p.x_n + (h * p.stride_h - low_h) * p.x_h + (w * p.stride_w - low_w) * p.x_w;
    int at_y = n * p.y_n + h * p.y_h + w * p.y_w;
    // From a column to the next, from the last one of a row to the next row's first, and of an image likewise.
    int const next_x = p.stride_w * p.x_w, row_x = p.stride_h * p.x_h - (columns.count - 1) * next_x;
    int const row_y = p.y_h - (columns.count - 1) * p.y_w;
    int const image_x = p.x_n - rows.count * p.stride_h * p.x_h, image_y = p.y_n - rows.count * p.y_h;
    int columns_left = columns.count - column, rows_left = rows.count - row;
#pragma unroll 1
    for (; left > 0; left -= kMetSumChunk) {
      T a[kMetSumChunk], b[kMetSumChunk];
#pragma unroll
      for (int j = 0; j < kMetSumChunk; ++j) {
        a[j] = b[j] = narrow<T>(Acc(0));
        if (j < left) a[j] = __ldg(x + at_x), b[j] = __ldg(y + at_y);
        bool const row_ends = --columns_left == 0;
        rows_left -= row_ends;
        bool const image_ends = rows_left == 0;
        at_x += (row_ends ? row_x : next_x) + (image_ends ? image_x : 0);
        at_y += (row_ends ? row_y : p.y_w) + (image_ends ? image_y : 0);
        columns_left = row_ends ? columns.count : columns_left, rows_left = image_ends ? rows.count : rows_left;
      }
      Acc chain = 0;
#pragma unroll
      for (int j = 0; j < kMetSumChunk; ++j) chain += widen(a[j]) * widen(b[j]);
      acc += chain;
    }
  }
  sums[thread] = acc;
  __syncthreads();
  for (int half = kMetSumThreads / 2; half >= 1 << p.units_log2; half /= 2) {
    if (thread < half) sums[thread] += sums[thread + half];
    __syncthreads();
  }
  if (part == 0 && unit < p.units)
    static_cast<T*>(p.out)[k * p.w_k + c * p.w_c + r * p.w_r + s * p.w_s] = narrow<T>(sums[thread]);
}

// ---- host side

template <DType dtype, bool channels_last>
cudaError_t launch_met_sums(Problem const& problem, MetTile const& t, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  Strides const &x = problem.x, &y = problem.y;
  MetSumParams p{};
  p.x = args.a, p.y = args.b, p.out = args.out, p.x_c = x.c, p.y_c = y.c;
  p.w_k = problem.w.n, p.w_c = problem.w.c, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.x_n = int(x.n), p.x_h = int(x.h), p.x_w = int(x.w), p.y_n = int(y.n), p.y_h = int(y.h), p.y_w = int(y.w);
  p.N = int(problem.N), p.H = int(problem.H), p.W = int(problem.W), p.P = int(problem.P()), p.Q = int(problem.Q());
  p.S = int(problem.S), p.stride_h = int(problem.stride_h), p.stride_w = int(problem.stride_w);
  p.dilation_h = int(problem.dilation_h), p.dilation_w = int(problem.dilation_w);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.units = uint32_t(t.items), p.multiplier = uint32_t(problem.K_per_group()), p.channels_last = channels_last;
  p.channels = uint32_t(problem.C_per_group());
  p.units_log2 = kMetSumLog2 - t.parts_log2, p.by_S = WideDivisor(uint32_t(p.S));
  p.by_first = WideDivisor(uint32_t(channels_last ? problem.K * problem.C_per_group() : problem.R * problem.S));
  p.by_stride_h = Divisor(uint32_t(p.stride_h)), p.by_stride_w = Divisor(uint32_t(p.stride_w));
  sums_met<T><<<unsigned(t.blocks), kMetSumThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <Op op, DType dtype, bool channels_last>
cudaError_t launch_met(Problem const& problem, MetTile const& t, Arguments const& args, cudaStream_t stream) {
  if constexpr (op == Op::wgrad) {
    return launch_met_sums<dtype, channels_last>(problem, t, args, stream);
  } else {
    using T = typename TypeOf<dtype>::type;
    constexpr bool backward = op == Op::dgrad;
    Strides const &in = backward ? problem.y : problem.x, &out = backward ? problem.x : problem.y;
    MetParams p{};
    p.in = args.a, p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride, p.out = args.out;
    p.in_n = in.n, p.in_c = in.c, p.in_h = int(in.h), p.in_w = int(in.w);
    p.out_n = out.n, p.out_c = out.c, p.out_h = out.h, p.out_w = out.w;
    p.w_k = problem.w.n, p.w_r = int(problem.w.h), p.w_s = int(problem.w.w), p.w_c = int(problem.w.c);
    p.out_H = int(backward ? problem.H : problem.P()), p.channels_last = channels_last;
    auto steps = [](MetAxis const& a, int64_t stride, int64_t pad, int64_t taps, int64_t length) {
      MetSteps to{int(stride), int(pad), int(taps), int(length), a.step, a.next, a.common, a.inverse};
      to.by_step = Divisor(uint32_t(a.step)), to.by_next = Divisor(uint32_t(a.next));
      to.by_common = Divisor(uint32_t(a.common));
      return to;
    };
    p.h = steps(t.h, problem.stride_h, problem.pad_top, problem.R, backward ? problem.P() : problem.H);
    p.w_axis = steps(t.w, problem.stride_w, problem.pad_left, problem.S, backward ? problem.Q() : problem.W);
    p.items = uint32_t(t.items);
    p.multiplier = uint32_t(backward ? problem.C_per_group() : problem.K_per_group());
    p.filters = int(backward ? problem.K_per_group() : problem.C_per_group());
    if (p.filters > 1) p.next_in = int(in.c), p.next_tap = int(backward ? problem.w.n : problem.w.c);
    WideDivisor const channels(uint32_t(backward ? problem.C : problem.K)), groups(uint32_t(t.groups));
    WideDivisor const columns(uint32_t(backward ? problem.W : problem.Q()));
    p.by_first = channels_last ? channels : columns, p.by_second = channels_last ? columns : groups;
    p.by_third = channels_last ? groups : channels;
    p.by_stride_h = WideDivisor(uint32_t(backward ? problem.stride_h : 1));
    bool const one = p.filters == 1;
    void (*kernel)(MetParams) =
        one ? gather_met<T, backward, kMetRows, false> : gather_met<T, backward, kMetRows, true>;
    if (t.rows == 1) kernel = one ? gather_met<T, backward, 1, false> : gather_met<T, backward, 1, true>;
    kernel<<<unsigned(t.blocks), kMetThreads, 0, stream>>>(p);
    return cudaGetLastError();
  }
}

}  // namespace conv2d_ext::depthwise

#define CONV2D_EXT_DEPTHWISE_MET_INSTANCE(family, op, dtype, tm, tn, tk, variant)             \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                   \
    constexpr bool channels_last = is_nhwc(Variant::variant);                                 \
    MetTile const tile = met_tile(Op::op, p, h200_sxm, channels_last);                        \
    return depthwise::launch_met<Op::op, DType::dtype, channels_last>(p, tile, args, stream); \
  }
