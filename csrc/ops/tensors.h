// The few things that the ops ask of torch beyond torch/csrc/stable's own functions.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <string>

namespace conv2d_ext {

inline torch::stable::Tensor empty_strided(std::array<int64_t, 4> const& size, std::array<int64_t, 4> const& stride,
                                           torch::stable::Tensor const& like) {
  int32_t dtype = 0, device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle out = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, size.data(), stride.data(), dtype, device_type, like.get_device_index(), &out));
  return torch::stable::Tensor(out);
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
