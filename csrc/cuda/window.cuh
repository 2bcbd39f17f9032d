// Vectors of 16 bytes out of elements that begin anywhere.
#pragma once

#include <cstdint>

namespace conv2d_ext {

// 16 of the 32 bytes of a and b, from `bytes` < 16 on.
__device__ inline uint4 window(uint4 a, uint4 b, uint32_t bytes) {
  uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = bytes & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = bytes & 4 ? w[i + 1] : w[i];
  uint32_t const shift = bytes % 4 * 8;
  return make_uint4(__funnelshift_r(w[0], w[1], shift), __funnelshift_r(w[1], w[2], shift),
                    __funnelshift_r(w[2], w[3], shift), __funnelshift_r(w[3], w[4], shift));
}

// Zeros from byte `bytes` on.
__device__ inline uint4 first_bytes(uint4 v, int bytes) {
  auto mask = [=](int word) { return bytes >= word * 4 + 4 ? 0xFFFFFFFF : bytes <= word * 4 ? 0 : 0xFFFF; };
  return make_uint4(v.x & mask(0), v.y & mask(1), v.z & mask(2), v.w & mask(3));
}

}  // namespace conv2d_ext
