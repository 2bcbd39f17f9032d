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

__device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int modulo(int64_t a, int64_t b) { return int((a % b + b) % b); }

}  // namespace conv2d_ext::depthwise
