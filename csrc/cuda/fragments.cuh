// What the tensor-core kernels share: the layout of operands in shared memory and of accumulators in registers.
#pragma once

#include "ptx.cuh"
#include "types.cuh"

namespace conv2d_ext {

constexpr int kWarpgroup = 128;
constexpr int kLineBytes = 128;             // a swizzled line of shared memory
constexpr int kCoreBytes = 8 * kLineBytes;  // the eight lines that the swizzle permutes within

// A place in a ring of stages, and the parity of the trip round it.
struct Stage {
  int index = 0;
  uint32_t parity = 0;
  __device__ void advance(int stages) {
    if (++index == stages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// A value that is the same in all lanes of a warp, which the compiler then keeps in a register, a uniform one where it
// can.
template <class T>
__device__ inline T warp_uniform(T v) {
  return __shfl_sync(0xffffffff, v, 0);
}

template <class T>
__device__ inline uint32_t pack(float low, float high) {
  Vector<T, 2> const v{narrow<T>(low), narrow<T>(high)};
  return *reinterpret_cast<uint32_t const*>(&v);
}

// Four lanes hold four words each; lane i gets word i of all four, in the order of the lanes.
__device__ inline void transpose_quad(uint32_t (&v)[4]) {
  bool const odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t const got = __shfl_xor_sync(0xffffffff, odd ? v[i] : v[i + 1], 1);
    (odd ? v[i] : v[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t const got = __shfl_xor_sync(0xffffffff, upper ? v[i] : v[i + 2], 2);
    (upper ? v[i] : v[i + 2]) = got;
  }
}

}  // namespace conv2d_ext
