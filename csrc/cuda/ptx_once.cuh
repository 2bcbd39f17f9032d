#pragma once
#include "ptx.cuh"
namespace conv2d_ext::ptx {
// The same under a policy of L2.
__device__ inline void cp_async_bulk_tensor_4d(uint32_t shared, void const* map, uint64_t* bar, int c0, int c1, int c2,
                                               int c3, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared),
      "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
      : "memory");
}

// A policy of L2 whose lines are given up first.
__device__ inline uint64_t createpolicy_evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// The same under a policy of L2.
__device__ inline void cp_async_bulk_tensor_im2col(uint32_t shared, void const* map, uint32_t bar, int c, int w, int h,
                                                   int n, int offset_w, int offset_h, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8}, %9;" ::"r"(shared),
      "l"(map), "r"(bar), "r"(c), "r"(w), "r"(h), "r"(n), "h"(uint16_t(offset_w)), "h"(uint16_t(offset_h)), "l"(policy)
      : "memory");
}

}
