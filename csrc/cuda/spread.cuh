// A second launch of few blocks, spread over the device.
#pragma once

#include <cstdint>

#include "dependent.cuh"
#include "launch.h"

namespace conv2d_ext {

// As launch_dependent. Blocks may be on an SM as soon as the kernel before has left that: lest the first few SMs get
// all of them, each asks for as much shared memory, beside its own_bytes, as makes them spread over the device.
template <class... Params>
static cudaError_t launch_spread(void (*kernel)(Params...), dim3 grid, int threads, int own_bytes, cudaStream_t stream,
                                 Params const&... params) {
  int sm_count = 0;
  cudaError_t error = count_sms(sm_count);
  if (error != cudaSuccess) return error;
  constexpr int most = 224 * 1024;    // of an SM
  int const more = 1024 + own_bytes;  // that each block takes than it asks for
  int64_t const an_sm = ceil_div(int64_t(grid.x) * grid.y, int64_t(sm_count));
  int const shared_bytes = an_sm < 2048 / threads ? int(most / an_sm - more) : 0;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - more);
  if (error != cudaSuccess) return error;
  return launch_dependent(kernel, grid, threads, shared_bytes, stream, params...);
}

}  // namespace conv2d_ext
