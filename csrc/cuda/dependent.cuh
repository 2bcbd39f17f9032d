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

// The kernel waits for the one before by itself. clusters: their blocks along each axis; one: there are none. static:
// sources of an older PTX launch otherwise.
template <class... Params>
static cudaError_t launch_clusters(void (*kernel)(Params...), dim3 clusters, dim3 grid, int threads, int shared_bytes,
                                   cudaStream_t stream, Params const&... params) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = compiled_for_hopper() ? 1 : 0;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {clusters.x, clusters.y, clusters.z};
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes), config.stream = stream;
  config.attrs = attributes, config.numAttrs = clusters.x * clusters.y * clusters.z > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

template <class... Params>
static cudaError_t launch_dependent(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
                                    cudaStream_t stream, Params const&... params) {
  return launch_clusters(kernel, dim3(1), grid, threads, shared_bytes, stream, params...);
}

}  // namespace conv2d_ext
