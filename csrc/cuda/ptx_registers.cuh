// wgmma of 16-bit types with one operand in registers. Apart from ptx.cuh, which all kernels include.
#pragma once

#include "ptx.cuh"

namespace conv2d_ext::ptx {

// i to m number the operands after the accumulators.
#define CONV2D_EXT_WGMMA_REGISTERS(n, type, d, a, b, i, j, k, l, m)                                     \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" CONV2D_EXT_REGS_##n \
               "}, {%" #i ", %" #j ", %" #k ", %" #l "}, %" #m ", 1, 1, 1, 0;"                          \
               : CONV2D_EXT_ACC_##n(d)                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define CONV2D_EXT_WGMMA_REGISTERS_COLUMNS(type, d, a, b)                                        \
  if constexpr (count == 32) CONV2D_EXT_WGMMA_REGISTERS(64, type, d, a, b, 32, 33, 34, 35, 36);  \
  if constexpr (count == 64) CONV2D_EXT_WGMMA_REGISTERS(128, type, d, a, b, 64, 65, 66, 67, 68); \
  if constexpr (count == 96) CONV2D_EXT_WGMMA_REGISTERS(192, type, d, a, b, 96, 97, 98, 99, 100)

// d[64, n] += a[64, 16] * b[16, n]: a as wgmma.mma_async lays it out, b K-major.
template <class T, int count>
__device__ inline void wgmma_mma_async(float (&d)[count], uint32_t const (&a)[4], uint64_t b) {
  static_assert(count == 32 || count == 64 || count == 96);
  if constexpr (std::is_same_v<T, __half>) {
    CONV2D_EXT_WGMMA_REGISTERS_COLUMNS("f16", d, a, b);
  } else {
    CONV2D_EXT_WGMMA_REGISTERS_COLUMNS("bf16", d, a, b);
  }
}

}  // namespace conv2d_ext::ptx
