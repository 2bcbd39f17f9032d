// The ops of plain tensors, which conv2d_ext/_autograd.py calls where nothing else looks on: a call of the dispatcher
// costs the host as much as its arguments are many, so that these take integers in few, and all gradients come from one
// call. Each backend makes them of its own fprop, dgrad and wgrad.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "checks.h"

namespace conv2d_ext {

// What a call takes beside tensors and sizes, as functional.py packs it: bytes, the least first. Calls whose numbers
// are larger go by the other ops.
struct Window {
  IntList stride, padding, dilation;
  int64_t groups;
  bool allow_tf32;

  Window(int64_t bytes, int64_t groups_and_tf32)
      : stride{at(bytes, 0), at(bytes, 1)},
        padding{at(bytes, 2), at(bytes, 3), at(bytes, 4), at(bytes, 5)},
        dilation{at(bytes, 6), at(bytes, 7)},
        groups(groups_and_tf32 >> 1),
        allow_tf32((groups_and_tf32 & 1) != 0) {}

 private:
  static int64_t at(int64_t bytes, int i) { return bytes >> 8 * i & 255; }
};

template <auto fprop>
Tensor plain_fprop(Tensor const& input, Tensor const& weight, std::optional<Tensor> const& bias, int64_t window,
                   int64_t groups_and_tf32) {
  Window const w(window, groups_and_tf32);
  return fprop(input, weight, bias, w.stride, w.padding, w.dilation, w.groups, w.allow_tf32, -1);
}

// ATen's CPU sum of a half type rounds to that type between the dimensions that it reduces one after the other; its
// CUDA sum keeps float32 to the end.
inline Tensor bias_grad(Tensor const& grad_output) {
  using torch::headeronly::ScalarType;
  int64_t const dims[] = {0, 2, 3};
  torch::headeronly::IntHeaderOnlyArrayRef const all_but_filters(dims, 3);
  DType const dtype = dtype_of("plain_backward", "grad_output", grad_output);
  if (grad_output.is_cuda() || (dtype != DType::f16 && dtype != DType::bf16))
    return torch::stable::sum(grad_output, all_but_filters);
  return torch::stable::to(torch::stable::sum(grad_output, all_but_filters, false, ScalarType::Float),
                           dtype == DType::f16 ? ScalarType::Half : ScalarType::BFloat16);
}

inline IntList list(torch::headeronly::IntHeaderOnlyArrayRef values) { return {values.begin(), values.end()}; }

// The gradients of input, if there is a weight, of weight, if there is an input, and of bias, if asked for; the others
// are undefined. sizes: where one of the two is missing, input's size, and weight's size and strides. The gradient of
// weight gets these strides if they are dense.
template <auto dgrad, auto wgrad>
std::tuple<Tensor, Tensor, Tensor> plain_backward(Tensor const& grad_output, std::optional<Tensor> const& input,
                                                  std::optional<Tensor> const& weight, IntList const& sizes,
                                                  int64_t window, int64_t groups_and_tf32, bool bias) {
  if (sizes.size() != 12 && !(input && weight))
    fail("plain_backward", "sizes", "expected 12 integers, got ", sizes.size());
  Window const w(window, groups_and_tf32);
  auto given = [&](int i) { return IntList(sizes.begin() + 4 * i, sizes.begin() + 4 * i + 4); };
  std::tuple<Tensor, Tensor, Tensor> out;
  if (weight)
    std::get<0>(out) = dgrad(grad_output, *weight, input ? list(input->sizes()) : given(0), w.stride, w.padding,
                             w.dilation, w.groups, w.allow_tf32, -1);
  if (input) {
    IntList const size = weight ? list(weight->sizes()) : given(1);
    std::optional<IntList> stride = weight ? list(weight->strides()) : given(2);
    if (!is_dense({size[0], size[1], size[2], size[3]}, *stride)) stride.reset();
    std::get<1>(out) =
        wgrad(grad_output, *input, size, stride, w.stride, w.padding, w.dilation, w.groups, w.allow_tf32, -1);
  }
  if (bias) std::get<2>(out) = bias_grad(grad_output);
  return out;
}

}  // namespace conv2d_ext
