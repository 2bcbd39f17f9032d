// The second pass of depthwise wgrad, launched while the first runs where the GPU can do so.
#pragma once

#include "depthwise.cuh"

namespace conv2d_ext::depthwise {

// In the first pass: the second may be launched now. It waits for this one's end before it reads.
__device__ inline void let_second_pass_begin() {
#if __CUDA_ARCH__ >= 900
  ptx::griddepcontrol_launch_dependents();
#endif
}

template <class T>
static cudaError_t launch_second_pass(Problem const& problem, Plan const& plan, Arguments const& args,
                                      cudaStream_t stream) {
  int device = 0, major = 0;
  if (auto const error = cudaGetDevice(&device)) return error;
  if (auto const error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  return launch_sum<T>(problem, plan, args, stream, major >= 9);
}

}  // namespace conv2d_ext::depthwise
