// Element types, their conversions and vectors of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../core/problem.h"

namespace conv2d_ext {

template <DType t>
struct TypeOf;
template <>
struct TypeOf<DType::f16> {
  using type = __half;
};
template <>
struct TypeOf<DType::bf16> {
  using type = __nv_bfloat16;
};
template <>
struct TypeOf<DType::f32> {
  using type = float;
};
template <>
struct TypeOf<DType::f64> {
  using type = double;
};

// Long sums are made of chains of this many terms, whose sums are added: a smaller rounding error than one chain's.
constexpr int kChain = 16;

__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }

template <class T, class Acc>
__device__ T narrow(Acc v);
template <>
__device__ inline __half narrow(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 narrow(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ inline float narrow(float v) {
  return v;
}
template <>
__device__ inline double narrow(double v) {
  return v;
}

template <class T, int count>
struct alignas(sizeof(T) * count) Vector {
  T v[count];
};

}  // namespace conv2d_ext
