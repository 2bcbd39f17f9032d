// The blocks of a launch bring all of a tensor to L2, a share each, before they load of it what they need: a warp whose
// loads follow each other waits for memory but once.
#pragma once

#include "launch.h"
#include "ptx.cuh"

namespace conv2d_ext {

struct Share {
  char const* from = nullptr;
  uint32_t bytes = 0, all = 0;  // of a block; of the tensor, or 0: it is left

  Share() = default;
  // A tensor whose pixels' channels follow each other.
  Share(void const* data, Strides const& s, int64_t n, int64_t c, int64_t h, int64_t w, int size, int64_t blocks) {
    int64_t const image = h * w * c, total = n * image * size;
    bool const dense = (w == 1 || s.w == c) && (h == 1 || s.h == w * c) && (n == 1 || s.n == image);
    if (!dense || total > (int64_t(24) << 20)) return;
    from = static_cast<char const*>(data), all = uint32_t(total);
    bytes = uint32_t(ceil_div(ceil_div(total, blocks), 128) * 128);
  }
  // By all threads of a block.
  __device__ void bring(uint32_t block) const {
    uint32_t const first = block * bytes, end = min(first + bytes, all);
    for (uint32_t at = first + threadIdx.x * 128; at < end; at += blockDim.x * 128) ptx::prefetch_l2(from + at);
  }
};

}  // namespace conv2d_ext
