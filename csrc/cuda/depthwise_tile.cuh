// Division by numbers that a launch knows, and other small functions of the depthwise kernels.
#pragma once

#include "launch.h"
#include "types.cuh"

namespace conv2d_ext::depthwise {

constexpr int kMaxThreads = 256;

// Quotients of numbers whose product with the divisor is below 2^32.
struct Divisor {
  uint32_t value = 1, magic = 0;
  Divisor() = default;
  explicit Divisor(uint32_t d) : value(d), magic(d == 1 ? 0 : uint32_t(((uint64_t(1) << 32) + d - 1) / d)) {}
  __device__ uint32_t quotient(uint32_t n) const { return magic == 0 ? n : __umulhi(n, magic); }
};

// Quotients of numbers below 2^31.
struct WideDivisor {
  uint32_t value = 1, magic = 0;
  int shift = 0;
  WideDivisor() = default;
  explicit WideDivisor(uint32_t d) : value(d) {
    int log = 1;
    while (uint64_t(1) << log < d) ++log;
    magic = d == 1 ? 0 : uint32_t(((uint64_t(1) << (31 + log)) + d - 1) / d), shift = log - 1;
  }
  __device__ uint32_t quotient(uint32_t n) const { return magic == 0 ? n : __umulhi(n, magic) >> shift; }
};

__device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Of fprop, or of dgrad with stride 1, which is fprop by a filter that is turned round: the filter, sizes, strides (but
// the channels') and padding.
template <Op op, class T, class Params>
void set_turned(Params& p, Problem const& problem, Arguments const& args) {
  constexpr bool backward = op == Op::dgrad;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  p.in_n = in.n, p.in_h = in.h, p.in_w = in.w, p.out_n = out.n, p.out_h = out.h, p.out_w = out.w;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.C = int(problem.C), p.R = int(problem.R), p.S = int(problem.S);
  p.in_H = int(backward ? problem.P() : problem.H), p.in_W = int(backward ? problem.Q() : problem.W);
  p.out_H = int(backward ? problem.H : problem.P()), p.out_W = int(backward ? problem.W : problem.Q());
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.bias_stride = args.bias_stride;
  T const* w = static_cast<T const*>(args.b);
  if constexpr (backward) {
    p.pad_h = (p.R - 1) * int(problem.dilation_h) - p.pad_h, p.pad_w = (p.S - 1) * int(problem.dilation_w) - p.pad_w;
    w += (p.R - 1) * p.w_r + (p.S - 1) * p.w_s;
    p.w_r = -p.w_r, p.w_s = -p.w_s;
  }
  p.w = w;
}

constexpr int modulo(int64_t a, int64_t b) { return int((a % b + b) % b); }

}  // namespace conv2d_ext::depthwise
