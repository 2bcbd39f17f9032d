// The convolution problem as one value, in the field's letters. Everything about shapes is here; no torch, no CUDA.
//   x[N,C,H,W] * w[K,C/groups,R,S] + bias[K] -> y[N,K,P,Q]
// fprop computes y, dgrad computes x from (y, w), wgrad computes w from (y, x): the same Problem serves all three.
#pragma once

#include <cstdint>

namespace conv2d_ext {

enum class Op : uint8_t { fprop, dgrad, wgrad };
enum class DType : uint8_t { f16, bf16, f32, f64 };

constexpr char const* name(Op op) { return op == Op::fprop ? "fprop" : op == Op::dgrad ? "dgrad" : "wgrad"; }
constexpr int size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// Element strides of a 4-D tensor by the role of the dimension: n = batch (or K of a filter), c = channel, h, w.
struct Strides {
  int64_t n = 0, c = 0, h = 0, w = 0;
  friend constexpr bool operator==(Strides const&, Strides const&) = default;
};

constexpr Strides contiguous_strides(int64_t C, int64_t H, int64_t W) { return {C * H * W, H * W, W, 1}; }
constexpr Strides channels_last_strides(int64_t C, int64_t H, int64_t W) { return {H * W * C, 1, W * C, C}; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t gcd64(int64_t a, int64_t b) { return b == 0 ? a : gcd64(b, a % b); }

struct Problem {
  int64_t N = 0, C = 0, H = 0, W = 0;
  int64_t K = 0, R = 0, S = 0;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t groups = 1;
  DType dtype = DType::f32;
  bool allow_tf32 = false;                       // f32 operands may be rounded to TF32
  Strides x, w, y;                               // w: n = filter, c = channel within the group
  int x_align = 16, w_align = 16, y_align = 16;  // largest power of two, at most 16, that divides the address in bytes

  constexpr int64_t P() const { return extent(H + pad_top + pad_bottom, R, stride_h, dilation_h); }
  constexpr int64_t Q() const { return extent(W + pad_left + pad_right, S, stride_w, dilation_w); }
  constexpr int64_t C_per_group() const { return groups == 0 ? 0 : C / groups; }
  constexpr int64_t K_per_group() const { return groups == 0 ? 0 : K / groups; }
  // Multiply-adds of the three ops alike, times two.
  constexpr double flops() const {
    return 2.0 * double(N) * double(K) * double(P()) * double(Q()) * double(C_per_group()) * double(R) * double(S);
  }

  friend constexpr bool operator==(Problem const&, Problem const&) = default;

  static constexpr int64_t extent(int64_t padded, int64_t taps, int64_t stride, int64_t dilation) {
    int64_t const window = (taps - 1) * dilation + 1;
    return padded < window ? 0 : (padded - window) / stride + 1;
  }
};

// One image axis of fprop or dgrad: `pixels` of the result, of which pixel i meets tap j of `taps` at the coordinate
// lower + i * stride + j * tap_stride of the other tensor. Tap j is the filter's first_tap + j * tap_step. dgrad has a
// walk for each phase of the stride: its pixels are phase + i * stride, and all meet the same taps.
struct Walk {
  int64_t pixels = 0, taps = 0;
  int64_t lower = 0, stride = 1, tap_stride = 1;
  int64_t first_tap = 0, tap_step = 1;
};

// The last coordinate of the walk's pixels at tap 0, counted from the end of the other tensor's axis.
constexpr int64_t box_upper(Walk const& w, int64_t extent) { return w.lower + (w.pixels - 1) * w.stride + 1 - extent; }

constexpr int64_t phases_of(int64_t extent, int64_t stride) { return min64(stride, extent); }

constexpr Walk fprop_walk(int64_t pixels, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  return {pixels, taps, -pad, stride, dilation, 0, 1};
}

// No taps if none meets the phase.
constexpr Walk dgrad_walk(int64_t extent, int64_t taps, int64_t stride, int64_t pad, int64_t dilation, int64_t phase) {
  Walk w;
  w.pixels = ceil_div(extent - phase, stride);
  int64_t const g = gcd64(dilation, stride), step = stride / g;
  int64_t r = 0;
  while (r < min64(step, taps) && (phase + pad - r * dilation) % stride != 0) ++r;
  if (r == min64(step, taps)) return w;
  w.taps = ceil_div(taps - r, step);
  w.tap_stride = dilation / g;
  // Backwards, so that coordinates grow with the tap.
  w.first_tap = r + (w.taps - 1) * step;
  w.tap_step = -step;
  w.lower = (phase + pad - r * dilation) / stride - (w.taps - 1) * w.tap_stride;
  return w;
}

}  // namespace conv2d_ext
