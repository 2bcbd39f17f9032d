// What a launcher of the table is given.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/kernels.def"
#include "../core/row.h"

namespace conv2d_ext {

// Device addresses. fprop: a = x, b = w, out = y; dgrad: a = y, b = w, out = x; wgrad: a = x, b = y, out = w.
struct Arguments {
  void const* a;
  void const* b;
  void const* bias;  // may be null; K elements, bias_stride apart
  int64_t bias_stride;
  void* out;
  void* workspace;  // plan.workspace_bytes
};

using Launcher = cudaError_t (*)(Problem const&, Plan const&, Arguments const&, cudaStream_t);

// A plan's row; ops/cuda.cpp has the table.
Row const& row_of(Plan const& plan);

// The SMs of the current device.
inline cudaError_t count_sms(int& count) {
  int device = 0;
  cudaError_t const error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace conv2d_ext

// The head of a row's launcher; its body, of problem p, plan, args and stream, follows.
#define CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant)                                                \
  namespace conv2d_ext {                                                                                       \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const&, Plan const&, Arguments const&, \
                                                                cudaStream_t);                                 \
  }                                                                                                            \
  cudaError_t conv2d_ext::family##_##op##_##dtype##_##tm##x##tn##_##variant(                                   \
      Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream)
