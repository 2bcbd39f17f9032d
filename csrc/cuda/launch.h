// What a launcher of the table is given, and the macro that declares them all.
#pragma once

#include <cuda_runtime_api.h>

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

#define CONV2D_EXT_DECLARE_LAUNCHER(family, op, dtype, tm, tn, tk, variant)                                    \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const&, Plan const&, Arguments const&, \
                                                                cudaStream_t);
CONV2D_EXT_KERNELS(CONV2D_EXT_DECLARE_LAUNCHER)
#undef CONV2D_EXT_DECLARE_LAUNCHER

}  // namespace conv2d_ext
