// Loads all kernels of the library when it first uses a device. CUDA would load each when it is first launched, which
// takes up to 4 ms, and the call of a new shape waits for that (docs/tuning.md). And keeps what shared memory each
// kernel was allowed, for which every launch asks: the driver takes its time to answer.
#include "load.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <mutex>
#include <unordered_map>
#include <vector>

extern "C" cudaError_t __real_cudaFuncSetAttribute(void const* kernel, cudaFuncAttribute attribute, int value);

namespace conv2d_ext {
namespace {

constexpr int kMostDevices = 128;  // as many as torch can number

// Of one device.
struct Loaded {
  std::once_flag once;
  std::mutex mutex;
  std::unordered_map<void const*, std::atomic<int>> shared_bytes;  // that a kernel may have; its keys never change
};
thread_local Loaded* current = nullptr;  // the device that this thread named last

// Neither is ever destroyed: threads of autograd may outlive the statics.
std::vector<void const*>& kernels() {
  static auto& all = *new std::vector<void const*>;
  return all;
}
Loaded* loaded() {
  static auto const all = new Loaded[kMostDevices];
  return all;
}

}  // namespace

void load_kernels(int device) {
  if (device >= kMostDevices) return;
  current = &loaded()[device];
  std::call_once(current->once, [] {
    // Streams of other threads may be capturing.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaFuncAttributes attributes;
    for (void const* kernel : kernels()) {
      cudaFuncGetAttributes(&attributes, kernel);
      current->shared_bytes[kernel] = 0;
    }
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaGetLastError();  // kernels for other GPUs than this one
  });
}

}  // namespace conv2d_ext

// The linker puts the functions called __wrap_ in place of the runtime's (setup.py).
extern "C" {
cudaError_t __wrap_cudaFuncSetAttribute(void const* kernel, cudaFuncAttribute attribute, int value) {
  using namespace conv2d_ext;
  if (current == nullptr || attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return __real_cudaFuncSetAttribute(kernel, attribute, value);
  auto const known = current->shared_bytes.find(kernel);
  if (known == current->shared_bytes.end()) return __real_cudaFuncSetAttribute(kernel, attribute, value);
  std::atomic<int>& allowed = known->second;
  if (allowed >= value) return cudaSuccess;
  std::lock_guard const lock(current->mutex);  // or a smaller value might be the last to be set
  if (allowed >= value) return cudaSuccess;
  cudaError_t const error = __real_cudaFuncSetAttribute(kernel, attribute, value);
  if (error == cudaSuccess) allowed = value;
  return error;
}

// nvcc has every kernel registered by this function before the library is used.
void __real___cudaRegisterFunction(void** module, char const* host, char* device, char const* name, int thread_limit,
                                   void* thread, void* block, void* block_size, void* grid_size, int* warp_size);

void __wrap___cudaRegisterFunction(void** module, char const* host, char* device, char const* name, int thread_limit,
                                   void* thread, void* block, void* block_size, void* grid_size, int* warp_size) {
  conv2d_ext::kernels().push_back(host);
  __real___cudaRegisterFunction(module, host, device, name, thread_limit, thread, block, block_size, grid_size,
                                warp_size);
}
}
