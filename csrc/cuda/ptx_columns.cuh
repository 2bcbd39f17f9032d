// PTX that one kernel uses: multicast copies in a cluster, and widths of wgmma. As ptx.cuh, which all kernels include.
#pragma once

#include "ptx.cuh"

namespace conv2d_ext::ptx {

// Arrives at a barrier of a block of the cluster, which orders nothing: what the warp has read, it has read.
__device__ inline void mbarrier_arrive_cluster(uint32_t mapped) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
}

// A box of a 4-D tensor to each block of the cluster that is in `blocks`, at the same place, where the same barrier
// counts.
__device__ inline void cp_async_bulk_tensor_4d_multicast(uint32_t shared, void const* map, uint64_t* bar, int c0,
                                                         int c1, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %5}], [%2], %6;" ::"r"(shared),
      "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(0), "h"(blocks)
      : "memory");
}

#define CONV2D_EXT_REGS_80 \
  CONV2D_EXT_REGS_64       \
  ", "                     \
  "%32, %33, %34, %35, %36, %37, %38, %39"
#define CONV2D_EXT_REGS_96 \
  CONV2D_EXT_REGS_80       \
  ", "                     \
  "%40, %41, %42, %43, %44, %45, %46, %47"
#define CONV2D_EXT_REGS_112 \
  CONV2D_EXT_REGS_96        \
  ", "                      \
  "%48, %49, %50, %51, %52, %53, %54, %55"
#define CONV2D_EXT_ACC_80(d)                                                                                       \
  CONV2D_EXT_ACC_64(d), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), \
      "+f"(d[39])
#define CONV2D_EXT_ACC_96(d)                                                                                       \
  CONV2D_EXT_ACC_80(d), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), \
      "+f"(d[47])
#define CONV2D_EXT_ACC_112(d)                                                                                      \
  CONV2D_EXT_ACC_96(d), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), \
      "+f"(d[55])

// d[64, n] += a[64, 16] * b[16, n], as wgmma_mma_async, of n = 80, 96 and 112 too.
template <class T, bool transpose_a, bool transpose_b, int count>
__device__ inline void wgmma_mma_async_columns(float (&d)[count], uint64_t a, uint64_t b) {
  constexpr int ta = transpose_a, tb = transpose_b;
  if constexpr (count != 40 && count != 48 && count != 56) {
    wgmma_mma_async<T, transpose_a, transpose_b>(d, a, b);
  } else if constexpr (std::is_same_v<T, __half>) {
    if constexpr (count == 40) CONV2D_EXT_WGMMA(80, "f16", d, a, b, ta, tb, 40, 41, 42, 43);
    if constexpr (count == 48) CONV2D_EXT_WGMMA(96, "f16", d, a, b, ta, tb, 48, 49, 50, 51);
    if constexpr (count == 56) CONV2D_EXT_WGMMA(112, "f16", d, a, b, ta, tb, 56, 57, 58, 59);
  } else {
    if constexpr (count == 40) CONV2D_EXT_WGMMA(80, "bf16", d, a, b, ta, tb, 40, 41, 42, 43);
    if constexpr (count == 48) CONV2D_EXT_WGMMA(96, "bf16", d, a, b, ta, tb, 48, 49, 50, 51);
    if constexpr (count == 56) CONV2D_EXT_WGMMA(112, "bf16", d, a, b, ta, tb, 56, 57, 58, 59);
  }
}

}  // namespace conv2d_ext::ptx
