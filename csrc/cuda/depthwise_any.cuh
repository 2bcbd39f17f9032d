// Depthwise convolution in NCHW for everything that depthwise.cuh leaves: any filter, stride, dilation and padding,
// K = m * C. Taps and pixels come from global memory and its caches; depthwise_staged.cuh has what fits shared memory.
//   fprop, dgrad: a block has 256 threads of one channel, each with kPixels outputs.
//   dgrad adds over the m filters of a channel; a pixel meets every so many taps, whose distance the stride divides.
//   wgrad: a warp has kSumTaps taps of one filter, lanes over pixels.
#pragma once

#include "depthwise_lines.cuh"

namespace conv2d_ext::depthwise {

constexpr int kPixels = 4;
constexpr int kSumTaps = 9;           // of a warp of wgrad
constexpr int kNowhere = -(1 << 30);  // a coordinate that no step brings into an image

struct AnyParams {
  void const* in;
  void const* other;  // w, or y for wgrad
  void const* bias;
  void* out;
  void* partial;
  int64_t in_n, in_c, in_h, in_w;
  int64_t out_n, out_c, out_h, out_w;  // wgrad: of y
  int64_t w_k, w_r, w_s, bias_stride;
  int64_t pixels, pixel_units;
  int64_t channels;    // of out
  int64_t multiplier;  // filters a channel
  int64_t N;
  int64_t first_block;
  int64_t taps;  // R * S
  int in_H, in_W, out_H, out_W;
  int R, S, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w;
  int splits, tap_units;
};

// 64-bit division is a long subroutine, and most numbers don't need it.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  return uint64_t(a | b) >> 32 != 0 ? a / b : int64_t(uint32_t(a) / uint32_t(b));
}

__device__ inline int64_t split_off(int64_t& value, int64_t divisor) {
  int64_t const whole = quotient(value, divisor), rest = value - whole * divisor;
  value = whole;
  return rest;
}

template <class T>
__device__ inline bool finite(T v) {
  return v - v == T(0);
}

// Along one axis, the taps that an output meets: those from `first` on, `step` apart; and the input that it meets with
// the first of them, and how far on the next one's is. Padded sizes are below 2^30 (plan.h), so no coordinate leaves
// int.
struct Meetings {
  int first, step, input, next;

  __device__ Meetings(bool backward, int output, int stride, int dilation, int pad) {
    first = 0, step = 1, input = output * stride - pad, next = dilation;
    if (!backward) return;
    if (stride == 1) {
      input = output + pad, next = -dilation;
      return;
    }
    int divisor = stride;  // the greatest common one
    for (int rest = dilation; rest != 0;) {
      int const last = divisor % rest;
      divisor = rest, rest = last;
    }
    step = stride / divisor, next = -(dilation / divisor), input = output + pad;
    while (first < step && input % stride != 0) ++first, input -= dilation;
    input = first < step ? input / stride : kNowhere;
  }
};

// `phases`: dgrad with a stride: the pixels of a thread may meet different taps. The 1: without it ptxas aims at more
// blocks an SM and spills.
template <class T, bool backward, bool phases>
__global__ void __launch_bounds__(kMaxThreads, 1) gather_any(__grid_constant__ AnyParams const p) {
  using Acc = decltype(widen(T()));
  int const step = int(blockDim.x);
  int64_t index = p.first_block + blockIdx.x;
  int64_t const unit = index % p.pixel_units;
  index /= p.pixel_units;
  int64_t const c = index % p.channels, n = index / p.channels;
  T const* plane = static_cast<T const*>(p.in) + n * p.in_n + (backward ? c * p.multiplier : c / p.multiplier) * p.in_c;
  T const* filter = static_cast<T const*>(p.other) + (backward ? c * p.multiplier : c) * p.w_k;

  Acc acc[kPixels] = {};
  int oh[kPixels], ow[kPixels], h0[kPixels], w0[kPixels], r0[kPixels], s0[kPixels];
  int step_r = 1, step_s = 1, next_h = 1, next_w = 1;
  int64_t const pixel0 = unit * step * kPixels + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    int64_t const pixel = pixel0 + i * step;
    bool const inside = pixel < p.pixels;
    oh[i] = inside ? int(pixel / p.out_W) : -1;
    ow[i] = inside ? int(pixel - int64_t(oh[i]) * p.out_W) : 0;
    Meetings const h(backward, inside ? oh[i] : 0, p.stride_h, p.dilation_h, p.pad_h);
    Meetings const w(backward, ow[i], p.stride_w, p.dilation_w, p.pad_w);
    h0[i] = inside ? h.input : kNowhere, w0[i] = w.input, r0[i] = h.first, s0[i] = w.first;
    step_r = h.step, step_s = w.step, next_h = h.next, next_w = w.next;
  }
  int const rows = (p.R + step_r - 1) / step_r, columns = (p.S + step_s - 1) / step_s;
  int64_t const next_tap = step_s * p.w_s;

  for (int64_t m = backward ? p.multiplier : 1; m > 0; --m, plane += p.in_c, filter += p.w_k)
    for (int j = 0; j < rows; ++j) {
      T const *row[kPixels], *taps[phases ? kPixels : 1];
      int w[kPixels];
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        int const h = h0[i] + j * next_h, r = (phases ? r0[i] : 0) + j * step_r;
        bool const meets = unsigned(h) < unsigned(p.in_H) && r < p.R;
        row[i] = plane + (meets ? h : 0) * p.in_h, w[i] = meets ? w0[i] : kNowhere;
        if (phases || i == 0) taps[i] = filter + r * p.w_r + (phases ? s0[i] : 0) * p.w_s;
      }
      for (int k = 0; k < columns;) {
        Acc chain[kPixels] = {};
        int const end = columns - k < kChain ? columns : k + kChain;
#pragma unroll(phases ? 2 : 4)
        for (; k < end; ++k) {
          Acc const tap = phases ? Acc(0) : widen(taps[0][k * next_tap]);
#pragma unroll
          for (int i = 0; i < kPixels; ++i) {
            int const v = w[i] + k * next_w;
            if (unsigned(v) >= unsigned(p.in_W)) continue;
            if constexpr (phases) {
              if (s0[i] + k * step_s < p.S) chain[i] += widen(row[i][v]) * widen(taps[i][k * next_tap]);
            } else {
              chain[i] += widen(row[i][v]) * tap;
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kPixels; ++i) acc[i] += chain[i];
      }
    }

  Acc const bias = p.bias != nullptr ? Acc(widen(static_cast<T const*>(p.bias)[c * p.bias_stride])) : Acc(0);
#pragma unroll
  for (int i = 0; i < kPixels; ++i)
    if (oh[i] >= 0)
      static_cast<T*>(p.out)[n * p.out_n + c * p.out_c + oh[i] * p.out_h + ow[i]] = narrow<T>(acc[i] + bias);
}

// in = x, other = y; the pixels are N * P * Q, shared out among the splits.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, sizeof(T) == 8 ? 1 : 2) wgrad_any(__grid_constant__ AnyParams const p) {
  using Acc = decltype(widen(T()));
  constexpr int lanes = 32;
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int64_t index = p.first_block + blockIdx.x;
  int64_t const tap_unit = split_off(index, p.tap_units), k = split_off(index, p.channels);
  int const split = int(index);
  int64_t const tap0 = (tap_unit * (blockDim.x / 32) + warp) * kSumTaps;
  if (tap0 >= p.taps) return;  // a warp stays or goes as one

  int dh[kSumTaps], dw[kSumTaps];
  int64_t offset[kSumTaps];
  Acc acc[kSumTaps] = {};
#pragma unroll
  for (int i = 0; i < kSumTaps; ++i) {
    int64_t const tap = smaller(tap0 + i, p.taps - 1), r = quotient(tap, p.S);
    dh[i] = int(r) * p.dilation_h - p.pad_h, dw[i] = int(tap - r * p.S) * p.dilation_w - p.pad_w;
    offset[i] = dh[i] * p.in_h + dw[i] * p.in_w;
  }
  int64_t const share = (p.pixels + p.splits - 1) / p.splits;
  int64_t const end = smaller(p.pixels, share * (split + 1));
  int64_t pixel = share * split + lane, n = pixel;
  int q = int(split_off(n, p.out_W)), ph = int(split_off(n, p.out_H));
  T const* x = static_cast<T const*>(p.in) + quotient(k, p.multiplier) * p.in_c + n * p.in_n +
               int64_t(ph) * p.stride_h * p.in_h + int64_t(q) * p.stride_w * p.in_w;
  T const* y = static_cast<T const*>(p.other) + k * p.out_c + n * p.out_n + ph * p.out_h + q * p.out_w;
  // To a lane's next pixel; from the end of a row to the next; from the end of an image to the next.
  int const rows = lanes / p.out_W, columns = lanes % p.out_W;
  int64_t const x_row = p.stride_h * p.in_h, y_row = p.out_h;
  int64_t const x_step = rows * x_row + columns * p.stride_w * p.in_w, y_step = rows * y_row + columns * p.out_w;
  int64_t const x_turn = x_row - p.out_W * p.stride_w * p.in_w, y_turn = y_row - p.out_W * p.out_w;
  int64_t const x_image = p.in_n - p.out_H * x_row, y_image = p.out_n - p.out_H * y_row;
  while (pixel < end) {
    Acc chain[kSumTaps] = {};
    for (int64_t const stop = smaller(end, pixel + kChain * lanes); pixel < stop; pixel += lanes) {
      Acc const gradient = widen(*y);
      int const h0 = ph * p.stride_h, w0 = q * p.stride_w;
      auto meets = [&](int i) {
        return unsigned(h0 + dh[i]) < unsigned(p.in_H) && unsigned(w0 + dw[i]) < unsigned(p.in_W);
      };
      T v[kSumTaps];
#pragma unroll
      for (int i = 0; i < kSumTaps; ++i) {
        v[i] = narrow<T>(Acc(0));
        if (meets(i)) v[i] = x[offset[i]];
      }
      if (finite(gradient)) {  // zeros may stand for what lies outside
#pragma unroll
        for (int i = 0; i < kSumTaps; ++i) chain[i] += widen(v[i]) * gradient;
      } else {
#pragma unroll
        for (int i = 0; i < kSumTaps; ++i)
          if (meets(i)) chain[i] += widen(v[i]) * gradient;
      }
      q += columns, ph += rows, x += x_step, y += y_step;
      if (q >= p.out_W) q -= p.out_W, ++ph, x += x_turn, y += y_turn;
      while (ph >= p.out_H) ph -= p.out_H, x += x_image, y += y_image;
    }
#pragma unroll
    for (int i = 0; i < kSumTaps; ++i) acc[i] += chain[i];
  }
#pragma unroll
  for (int i = 0; i < kSumTaps; ++i) {
    Acc v = acc[i];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
    int64_t const tap = tap0 + i;
    if (tap < p.taps && lane == 0)
      store_sum<T>(p.out, p.partial, p.splits, k * p.w_k + tap / p.S * p.w_r + tap % p.S * p.w_s,
                   (int64_t(split) * p.channels + k) * p.taps + tap, v);
  }
}

template <Op op, DType dtype>
cudaError_t launch_any(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool sums = op == Op::wgrad;
  Strides const& in = op == Op::dgrad ? problem.y : problem.x;
  Strides const& out = op == Op::dgrad ? problem.x : problem.y;
  AnyParams p{};
  p.in = args.a, p.other = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride;
  p.out = args.out, p.partial = args.workspace, p.splits = plan.split_k;
  p.in_n = in.n, p.in_c = in.c, p.in_h = in.h, p.in_w = in.w;
  p.out_n = out.n, p.out_c = out.c, p.out_h = out.h, p.out_w = out.w;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  int const H = int(problem.H), W = int(problem.W), P = int(problem.P()), Q = int(problem.Q());
  p.in_H = op == Op::dgrad ? P : H, p.in_W = op == Op::dgrad ? Q : W;
  p.out_H = op == Op::dgrad ? H : P, p.out_W = op == Op::dgrad ? W : Q;
  p.N = problem.N;
  p.channels = op == Op::dgrad ? problem.C : problem.K, p.multiplier = problem.K_per_group();
  p.taps = problem.R * problem.S;
  p.R = int(problem.R), p.S = int(problem.S);
  p.stride_h = int(problem.stride_h), p.stride_w = int(problem.stride_w);
  p.dilation_h = int(problem.dilation_h), p.dilation_w = int(problem.dilation_w);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.pixels = int64_t(p.out_H) * p.out_W * (sums ? p.N : 1);

  int64_t blocks = 0;
  unsigned threads = kMaxThreads;
  if constexpr (sums) {
    threads = unsigned(min64(kMaxThreads, ceil_div(p.taps, kSumTaps) * 32));
    p.tap_units = int(ceil_div(p.taps, int64_t(threads) / 32 * kSumTaps));
    blocks = p.tap_units * p.channels * p.splits;
  } else {
    int64_t const units = ceil_div(p.pixels, kMaxThreads * kPixels);  // as even as whole warps allow
    threads = unsigned(ceil_div(ceil_div(p.pixels, units * kPixels), 32) * 32);
    p.pixel_units = ceil_div(p.pixels, int64_t(threads) * kPixels);
    blocks = p.pixel_units * p.channels * p.N;
  }
  constexpr int64_t kMaxGrid = (int64_t(1) << 31) - 1;
  for (p.first_block = 0; p.first_block < blocks; p.first_block += kMaxGrid) {
    unsigned const grid = unsigned(min64(kMaxGrid, blocks - p.first_block));
    if constexpr (sums)
      wgrad_any<T><<<grid, threads, 0, stream>>>(p);
    else if (op == Op::fprop)
      gather_any<T, false, false><<<grid, threads, 0, stream>>>(p);
    else if (p.stride_h == 1 && p.stride_w == 1)
      gather_any<T, true, false><<<grid, threads, 0, stream>>>(p);
    else
      gather_any<T, true, true><<<grid, threads, 0, stream>>>(p);
    if (cudaError_t const error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  if (!sums || p.splits == 1) return cudaSuccess;
  return launch_sum<T>(problem, plan, args, stream);
}

template <Op op, DType dtype, Variant variant>
cudaError_t launch_plain(Problem const& problem, Plan const& plan, Device const& gpu, Arguments const& args,
                         cudaStream_t stream) {
  if constexpr (is_nhwc(variant))
    return launch_lines<op, dtype, true>(problem, plan, gpu, args, stream);
  else
    return launch_any<op, dtype>(problem, plan, args, stream);
}

}  // namespace conv2d_ext::depthwise

// What all GPUs have of a row for any filter (depthwise_rows.cuh).
#define CONV2D_EXT_DEPTHWISE_PLAIN_INSTANCE(family, op, dtype, tm, tn, tk, variant)                                 \
  template cudaError_t                                                                                              \
  conv2d_ext::depthwise::launch_plain<conv2d_ext::Op::op, conv2d_ext::DType::dtype, conv2d_ext::Variant::variant>(  \
      conv2d_ext::Problem const&, conv2d_ext::Plan const&, conv2d_ext::Device const&, conv2d_ext::Arguments const&, \
      cudaStream_t);
