// The few things that the ops ask of torch beyond torch/csrc/stable's own functions.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <stdexcept>
#include <string>

namespace conv2d_ext {

// What failed in this thread last: a call within a call that fails does not say before torch 2.13.
inline thread_local std::string last_failure;

// Throws what torch says of a call that failed. Before 2.13 it cannot be asked: then what is likely.
[[noreturn]] inline void fail_like_torch(std::string const& likely) {
  static auto const what =
      reinterpret_cast<char const* (*)()>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  last_failure = what ? what() : likely;
  throw std::runtime_error(last_failure);
}

template <size_t rank>
torch::stable::Tensor empty_strided(std::array<int64_t, rank> const& size, std::array<int64_t, rank> const& stride,
                                    int32_t dtype, torch::stable::Tensor const& device_of) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(device_of.get(), &device_type));
  AtenTensorHandle out = nullptr;
  if (aoti_torch_empty_strided(int64_t(rank), size.data(), stride.data(), dtype, device_type,
                               device_of.get_device_index(), &out) != TORCH_SUCCESS) {
    double bytes = double(aoti_torch_dtype_element_size(dtype));
    for (int64_t n : size) bytes *= double(n);
    // Libraries that retry with less look for these words, and so does _autograd.py.
    fail_like_torch(std::string(device_of.is_cuda() ? "CUDA" : "CPU") + " out of memory. Tried to allocate " +
                    std::to_string(bytes / double(1 << 30)) + " GiB.");
  }
  return torch::stable::Tensor(out);
}

inline torch::stable::Tensor empty_strided(std::array<int64_t, 4> const& size, std::array<int64_t, 4> const& stride,
                                           torch::stable::Tensor const& like) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_strided<4>(size, stride, dtype, like);
}

// new_empty of torch/csrc/stable/ops.h goes through the dispatcher, which takes the host longer.
inline torch::stable::Tensor empty_bytes(int64_t bytes, torch::stable::Tensor const& device_of) {
  return empty_strided<1>({bytes}, {1}, aoti_torch_dtype_uint8(), device_of);
}

// Steals a string argument. The boxed conversion to std::string in torch's header leaks a copy for each call.
inline std::string take_string(StringHandle handle) {
  size_t length = 0;
  char const* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string value(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return value;
}

}  // namespace conv2d_ext
