// The ops of plain tensors, which conv2d_ext/_autograd.py calls where nothing else looks on: a call of the dispatcher
// costs the host as much as its arguments are many, so that these take integers in few, and all gradients come from one
// call. Each backend makes them of its own fprop, dgrad and wgrad.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "tensors.h"

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

// The gradients of input, weight and bias as bits of `wanted` ask for them; the others are undefined. The gradient of
// weight gets weight's strides if they are dense. The sum for bias comes first, which reads what was just written, and
// the gradient of input last, which the next layer is about to read: so both are still in L2 (docs/tuning/host.md).
template <auto dgrad, auto wgrad>
std::tuple<Tensor, Tensor, Tensor> plain_backward(Tensor const& grad_output, Tensor const& input, Tensor const& weight,
                                                  int64_t window, int64_t groups_and_tf32, int64_t wanted) {
  Window const w(window, groups_and_tf32);
  std::tuple<Tensor, Tensor, Tensor> out;
  try {
    if (wanted & 4) std::get<2>(out) = bias_grad(grad_output);
    if (wanted & 2) {
      IntList const size = list(weight.sizes());
      std::optional<IntList> stride = list(weight.strides());
      if (size.size() != 4 || !is_dense({size[0], size[1], size[2], size[3]}, *stride)) stride.reset();
      std::get<1>(out) =
          wgrad(grad_output, input, size, stride, w.stride, w.padding, w.dilation, w.groups, w.allow_tf32, -1);
    }
    if (wanted & 1)
      std::get<0>(out) =
          dgrad(grad_output, weight, list(input.sizes()), w.stride, w.padding, w.dilation, w.groups, w.allow_tf32, -1);
  } catch (std::exception const& error) {
    last_failure = error.what();
    throw;
  }
  return out;
}

// aten::convolution_overrideable and its backward are torch's for convolutions of other backends: it calls neither for
// tensors of CPU and CUDA, but has an autograd node for the first. The stable ABI has no nodes, and one in Python takes
// 10 to 25 us more (docs/tuning/host.md). The two integers of a call travel as `stride`; the other attributes are
// empty.
inline void check_ours(IntList const& stride, IntList const& padding) {
  if (stride.size() != 2 || !padding.empty())
    fail("convolution_overrideable", "stride", "expected the two integers of conv2d_ext, whose kernel this is");
}

template <auto fprop>
Tensor node_fprop(Tensor const& input, Tensor const& weight, std::optional<Tensor> const& bias, IntList const& stride,
                  IntList const& padding, IntList const&, bool, IntList const&, int64_t) {
  check_ours(stride, padding);
  return plain_fprop<fprop>(input, weight, bias, stride[0], stride[1]);
}

template <size_t count>
void call(char const* op, std::array<StableIValue, count>& stack) {
  last_failure.clear();
  if (torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS)
    fail_like_torch(last_failure.empty() ? std::string(op) + " failed" : last_failure);
}

// Whether t is a dual number of forward-mode differentiation.
inline bool has_tangent(Tensor const& t) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 2> stack{from(t), from(int64_t(0))};
  call("aten::_unpack_dual", stack);
  to<Tensor>(stack[0]);
  return to<Tensor>(stack[1]).defined();
}

// What the node calls. For the Autograd keys as well, where torch's own kernel would record a node that ends in ATen's
// convolution; inference mode passes these over. The tensors may be any (fake ones, or a mode looks on), so that this
// hands over to ops.
inline std::tuple<Tensor, Tensor, Tensor> node_backward(Tensor const& grad_output, Tensor const& input,
                                                        Tensor const& weight, IntList const& stride,
                                                        IntList const& padding, IntList const&, bool, IntList const&,
                                                        int64_t, std::vector<bool> const& wanted) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  check_ours(stride, padding);
  int64_t const bits = wanted[0] + 2 * wanted[1] + 4 * wanted[2];
  std::array<StableIValue, 6> stack{from(grad_output), from(input),     from(weight),
                                    from(stride[0]),   from(stride[1]), from(bits)};
  bool const derived = aoti_torch_grad_mode_is_enabled() || has_tangent(grad_output);
  call(derived ? "conv2d_ext::derived_backward" : "conv2d_ext::plain_backward", stack);
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

}  // namespace conv2d_ext
