// A launch that may begin before the kernel before it has ended.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

namespace conv2d_ext {

// Of the kernels of this source; one whose PTX is of an older one than 9.0 does not wait for another.
constexpr bool compiled_for_hopper() {
#ifdef __CUDA_ARCH_LIST__
  for (int architecture : {__CUDA_ARCH_LIST__})
    if (architecture >= 900) return true;
#endif
  return false;
}

// The kernel waits for the one before by itself. static: sources of an older PTX launch otherwise.
template <class... Params>
static cudaError_t launch_dependent(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
                                    cudaStream_t stream, Params const&... params) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = compiled_for_hopper() ? 1 : 0;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes), config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace conv2d_ext
