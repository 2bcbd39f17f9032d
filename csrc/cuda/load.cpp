// Loads all kernels of the library when it first uses a device. CUDA would load each when it is first launched, which
// takes up to 4 ms, and the call of a new shape waits for that (docs/tuning.md).
#include "load.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

namespace conv2d_ext {
namespace {

constexpr int kMostDevices = 64;

std::vector<void const*>& kernels() {
  static std::vector<void const*> all;
  return all;
}

}  // namespace

void load_kernels(int device) {
  static std::once_flag loaded[kMostDevices];
  if (device >= kMostDevices) return;
  std::call_once(loaded[device], [] {
    // Streams of other threads may be capturing.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaFuncAttributes attributes;
    for (void const* kernel : kernels()) cudaFuncGetAttributes(&attributes, kernel);
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaGetLastError();  // kernels for other GPUs than this one
  });
}

}  // namespace conv2d_ext

// nvcc has every kernel registered by this function of the runtime before the library is used; the linker puts the
// first of these in its place (setup.py).
extern "C" {
void __real___cudaRegisterFunction(void** module, char const* host, char* device, char const* name, int thread_limit,
                                   void* thread, void* block, void* block_size, void* grid_size, int* warp_size);

void __wrap___cudaRegisterFunction(void** module, char const* host, char* device, char const* name, int thread_limit,
                                   void* thread, void* block, void* block_size, void* grid_size, int* warp_size) {
  conv2d_ext::kernels().push_back(host);
  __real___cudaRegisterFunction(module, host, device, name, thread_limit, thread, block, block_size, grid_size,
                                warp_size);
}
}
