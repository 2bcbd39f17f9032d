// Tensor maps: how the copy engine (TMA) sees a tensor. Host code; the driver's encoder is found at run time, so that
// the library does not need libcuda to load.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../core/problem.h"

namespace conv2d_ext::tma {

constexpr CUtensorMapDataType tensor_type(DType t, bool rounded = false) {
  return t == DType::f16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
         : t == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
         : rounded          ? CU_TENSOR_MAP_DATA_TYPE_TFLOAT32
                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

template <class Function>
Function driver_function(char const* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  if (cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result) != cudaSuccess) return nullptr;
  return result == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(found) : nullptr;
}

// A 4-D tensor with contiguous channels: sizes and element strides, fastest dimension (channels, stride 1) first.
struct Tensor4 {
  void const* address;
  DType dtype;
  int64_t size[4];
  int64_t stride[4];
  bool rounded = false;  // the engine rounds floats to TF32, to nearest and ties to even, as it copies them
};

struct Encoded {
  cuuint64_t size[4];
  cuuint64_t stride[3];  // in bytes

  explicit Encoded(Tensor4 const& t) {
    for (int i = 0; i < 4; ++i) size[i] = cuuint64_t(t.size[i]);
    // A dimension of size one has stride 0 in a Problem; the engine wants a multiple of 16 bytes, and never uses it.
    for (int i = 1; i < 4; ++i) stride[i - 1] = t.size[i] == 1 ? 16 : cuuint64_t(t.stride[i]) * size_of(t.dtype);
  }
};

// The driver's errors have the runtime's numbers.
inline cudaError_t status(CUresult result) { return static_cast<cudaError_t>(result); }

inline cudaError_t encode_tiled(CUtensorMap& map, Tensor4 const& t, int channels, int b1, int b2, int b3, int step1,
                                int step2, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  static auto const encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (encode == nullptr) return cudaErrorNotSupported;
  Encoded const e(t);
  cuuint32_t const box[4] = {cuuint32_t(channels), cuuint32_t(b1), cuuint32_t(b2), cuuint32_t(b3)};
  cuuint32_t const step[4] = {1, cuuint32_t(step1), cuuint32_t(step2), 1};
  return status(encode(&map, tensor_type(t.dtype, t.rounded), 4, const_cast<void*>(t.address), e.size, e.stride, box,
                       step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

// Boxes of the tensor, channels x box[0] x box[1] x box[2], swizzled by 128 bytes; of the first two dimensions beside
// the channels every step-th.
inline cudaError_t encode_tiled(CUtensorMap& map, Tensor4 const& t, int channels, int b1, int b2, int b3, int step1 = 1,
                                int step2 = 1) {
  return encode_tiled(map, t, channels, b1, b2, b3, step1, step2, CU_TENSOR_MAP_SWIZZLE_128B);
}

// The same in plain order.
inline cudaError_t encode_boxes(CUtensorMap& map, Tensor4 const& t, int channels, int b1, int b2, int b3) {
  return encode_tiled(map, t, channels, b1, b2, b3, 1, 1, CU_TENSOR_MAP_SWIZZLE_NONE);
}

// Runs of `pixels` pixels of an NHWC tensor (size = C, W, H, N), `channels` of each, 128 bytes or 64, which are
// swizzled. The walks give the bounding box: their pixels at tap 0. groups > 0: the tensor is one of so many, of C
// channels each, that follow each other in a pixel; the group is the last coordinate, and behind its channels are
// zeros.
inline cudaError_t encode_im2col(CUtensorMap& map, Tensor4 const& t, Walk const& h, Walk const& w, int channels,
                                 int pixels, int64_t groups = 0) {
  static auto const encode = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  if (encode == nullptr) return cudaErrorNotSupported;
  Encoded const e(t);
  cuuint64_t const size[5] = {e.size[0], e.size[1], e.size[2], e.size[3], cuuint64_t(groups)};
  cuuint64_t const stride[4] = {e.stride[0], e.stride[1], e.stride[2], e.size[0] * size_of(t.dtype)};
  int const lower[3] = {int(w.lower), int(h.lower), 0};
  int const upper[3] = {int(box_upper(w, t.size[1])), int(box_upper(h, t.size[2])), 0};
  cuuint32_t const step[5] = {1, cuuint32_t(w.stride), cuuint32_t(h.stride), 1, 1};
  CUtensorMapSwizzle const swizzle =
      channels * size_of(t.dtype) == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
  return status(encode(&map, tensor_type(t.dtype, t.rounded), groups > 0 ? 5 : 4, const_cast<void*>(t.address), size,
                       stride, lower, upper, cuuint32_t(channels), cuuint32_t(pixels), step,
                       CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

// The filters of a problem, boxes of `channels` of one tap x `filters`, swizzled as their lines of 128 or 64 bytes are;
// coordinates channel, s, r, filter, group.
inline cudaError_t encode_filters(CUtensorMap& map, void const* address, Problem const& p, int channels, int filters,
                                  bool rounded = false) {
  static auto const encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (encode == nullptr) return cudaErrorNotSupported;
  int64_t const sizes[5] = {p.C_per_group(), p.S, p.R, p.K_per_group(), p.groups};
  int64_t const strides[4] = {p.w.w, p.w.h, p.w.n, p.K_per_group() * p.w.n};
  cuuint64_t size[5], stride[4];
  for (int i = 0; i < 5; ++i) size[i] = cuuint64_t(sizes[i]);
  for (int i = 0; i < 4; ++i) stride[i] = sizes[i + 1] == 1 ? 16 : cuuint64_t(strides[i]) * size_of(p.dtype);
  cuuint32_t const box[5] = {cuuint32_t(channels), 1, 1, cuuint32_t(filters), 1}, step[5] = {1, 1, 1, 1, 1};
  CUtensorMapSwizzle const swizzle =
      channels * size_of(p.dtype) == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
  return status(encode(&map, tensor_type(p.dtype, rounded), 5, const_cast<void*>(address), size, stride, box, step,
                       CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

}  // namespace conv2d_ext::tma
