// What the kernels of few outputs share (depthwise_lanes.cuh, depthwise_near.cuh, depthwise_few_sums.cuh): words of
// elements, and which instance a filter takes.
#pragma once

#include <type_traits>

#include "../core/near.h"
#include "depthwise_tile.cuh"

namespace conv2d_ext::depthwise {

// V neighbouring elements of 16 bits, or one of 32, in a word.
template <class T, int V>
__device__ inline void widen_word(uint32_t word, float (&to)[V]) {
  if constexpr (sizeof(T) == 4) {
    to[0] = __uint_as_float(word);
  } else if constexpr (V == 1) {
    uint16_t const bits = uint16_t(word);
    to[0] = widen(reinterpret_cast<T const&>(bits));
  } else if constexpr (std::is_same_v<T, __half>) {
    float2 const both = __half22float2(reinterpret_cast<__half2 const&>(word));
    to[0] = both.x, to[1] = both.y;
  } else {
    to[0] = __uint_as_float(word << 16), to[1] = __uint_as_float(word & 0xffff0000u);
  }
}

// start<side, stride>() of the square that holds the filter.
template <class Start>
cudaError_t by_filter(Problem const& p, Start start) {
  int const side = few_outputs_side(p);
  bool const strided = p.stride_w == 2;
  if (side == 1) return start.template operator()<1, 1>();  // with a stride: depthwise_single.cuh
  if (side == 3) return strided ? start.template operator()<3, 2>() : start.template operator()<3, 1>();
  if (side == 5) return strided ? start.template operator()<5, 2>() : start.template operator()<5, 1>();
  return strided ? start.template operator()<7, 2>() : start.template operator()<7, 1>();
}

}  // namespace conv2d_ext::depthwise
