// The CPU backend: ATen's convolution (oneDNN behind it) on checked arguments. Half types are computed in float32 and
// rounded once: ATen's own half convolution crashes on some shapes and spreads NaN on others.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "tensors.h"

namespace conv2d_ext {
namespace {

namespace stable = torch::stable;
using stable::detail::from;
using torch::headeronly::ScalarType;

template <size_t count>
Tensor call_aten(char const* op, char const* overload, std::array<StableIValue, count> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return stable::detail::to<Tensor>(stack[0]);
}

bool is_half(DType t) { return t == DType::f16 || t == DType::bf16; }
Tensor widened(Tensor const& t, DType dtype) { return is_half(dtype) ? stable::to(t, ScalarType::Float) : t; }

void check_kernel(char const* op, int64_t kernel) {
  if (kernel != -1) fail(op, "kernel", "expected -1 for CPU tensors (the rows are CUDA kernels), got ", kernel);
}

// The result in the strides and dtype that the call promised.
Tensor laid_out(Call const& call, Tensor const& value, Tensor const& like) {
  bool same = dtype_code(value) == dtype_code(like);
  for (int i = 0; i < 4; ++i) same = same && value.stride(i) == call.out_stride[i];
  if (same) return value;
  Tensor out = empty_strided(call.out_size, call.out_stride, like);
  return stable::copy_(out, value);
}

Tensor zeros(Call const& call, Tensor const& like) {
  Tensor out = empty_strided(call.out_size, call.out_stride, like);
  return stable::zero_(out);
}

// A tensor of the right size, dtype and strides-like behaviour that costs one element: ATen's backward asks for the
// input or weight that it does not read.
Tensor placeholder(Tensor const& like, std::array<int64_t, 4> const& size) {
  Tensor one = stable::new_zeros(like, IntList{1});
  return call_aten<3>("aten::expand", "", {from(one), from(IntList(size.begin(), size.end())), from(false)});
}

bool symmetric(Problem const& p) { return p.pad_top == p.pad_bottom && p.pad_left == p.pad_right; }

// x with its four-sided padding written out, for ATen knows two-sided padding alone.
Tensor padded(Problem const& p, Tensor const& x) {
  return stable::pad(x, IntList{p.pad_left, p.pad_right, p.pad_top, p.pad_bottom});
}

struct AtenArguments {
  IntList stride, padding, dilation;
  explicit AtenArguments(Problem const& p)
      : stride{p.stride_h, p.stride_w},
        padding(symmetric(p) ? IntList{p.pad_top, p.pad_left} : IntList{0, 0}),
        dilation{p.dilation_h, p.dilation_w} {}
};

Tensor aten_convolution(Problem const& p, Tensor const& x, Tensor const& w, std::optional<Tensor> const& bias) {
  AtenArguments const a(p);
  return call_aten<9>("aten::convolution", "",
                      {from(x), from(w), from(bias), from(a.stride), from(a.padding), from(a.dilation), from(false),
                       from(IntList{0, 0}), from(p.groups)});
}

// Element `which` of (grad_input, grad_weight, grad_bias); the other two are not computed.
Tensor aten_backward(Problem const& p, Tensor const& y, Tensor const& x, Tensor const& w, int which) {
  AtenArguments const a(p);
  StableListHandle mask_list = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(3, &mask_list));
  for (int i = 0; i < 3; ++i) STABLE_TORCH_ERROR_CODE_CHECK(torch_list_push_back(mask_list, from(i == which)));
  std::array<StableIValue, 11> stack{from(y),
                                     from(x),
                                     from(w),
                                     from(std::optional<IntList>()),
                                     from(a.stride),
                                     from(a.padding),
                                     from(a.dilation),
                                     from(false),
                                     from(IntList{0, 0}),
                                     from(p.groups),
                                     stable::detail::from<StableListHandle>(mask_list)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, 3> const all{stable::detail::to<Tensor>(stack[0]), stable::detail::to<Tensor>(stack[1]),
                                  stable::detail::to<Tensor>(stack[2])};
  return all[which];
}

bool is_empty(std::array<int64_t, 4> const& size) {
  return size[0] == 0 || size[1] == 0 || size[2] == 0 || size[3] == 0;
}

Tensor fprop(Tensor const& input, Tensor const& weight, std::optional<Tensor> const& bias, IntList const& stride,
             IntList const& padding, IntList const& dilation, int64_t groups, bool allow_tf32, int64_t kernel) {
  Call const call = check_fprop(input, weight, bias, {stride, padding, dilation, groups}, allow_tf32);
  check_kernel("conv2d", kernel);
  Problem const& p = call.problem;
  if (is_empty(call.out_size)) return empty_strided(call.out_size, call.out_stride, input);
  if (p.C == 0 || p.H == 0 || p.W == 0) {  // nothing but padding and bias
    Tensor out = zeros(call, input);
    if (!bias) return out;
    Tensor const column = call_aten<2>("aten::view", "", {from(*bias), from(IntList{1, p.K, 1, 1})});
    return stable::copy_(out, column);
  }
  std::optional<Tensor> wide_bias;
  if (bias) wide_bias = widened(*bias, p.dtype);
  Tensor const x = widened(input, p.dtype);
  return laid_out(call, aten_convolution(p, symmetric(p) ? x : padded(p, x), widened(weight, p.dtype), wide_bias),
                  input);
}

Tensor dgrad(Tensor const& grad_output, Tensor const& weight, IntList const& input_size, IntList const& stride,
             IntList const& padding, IntList const& dilation, int64_t groups, bool allow_tf32, int64_t kernel) {
  Call const call = check_dgrad(grad_output, weight, input_size, {stride, padding, dilation, groups}, allow_tf32);
  check_kernel("dgrad", kernel);
  Problem const& p = call.problem;
  if (is_empty(call.out_size) || p.K == 0) return zeros(call, grad_output);
  Tensor const y = widened(grad_output, p.dtype);
  bool const plain = symmetric(p);
  std::array<int64_t, 4> const size{p.N, p.C, plain ? p.H : p.H + p.pad_top + p.pad_bottom,
                                    plain ? p.W : p.W + p.pad_left + p.pad_right};
  Tensor grad = aten_backward(p, y, placeholder(y, size), widened(weight, p.dtype), 0);
  if (!plain) grad = stable::narrow(grad, 2, p.pad_top, p.H);
  if (!plain) grad = stable::narrow(grad, 3, p.pad_left, p.W);
  return laid_out(call, grad, grad_output);
}

Tensor wgrad(Tensor const& grad_output, Tensor const& input, IntList const& weight_size,
             std::optional<IntList> const& weight_stride, IntList const& stride, IntList const& padding,
             IntList const& dilation, int64_t groups, bool allow_tf32, int64_t kernel) {
  Call const call =
      check_wgrad(grad_output, input, weight_size, weight_stride, {stride, padding, dilation, groups}, allow_tf32);
  check_kernel("wgrad", kernel);
  Problem const& p = call.problem;
  if (is_empty(call.out_size) || p.N == 0 || p.H == 0 || p.W == 0) return zeros(call, grad_output);
  Tensor const y = widened(grad_output, p.dtype), x = widened(input, p.dtype);
  return laid_out(call, aten_backward(p, y, symmetric(p) ? x : padded(p, x), placeholder(y, call.out_size), 1),
                  grad_output);
}

}  // namespace
}  // namespace conv2d_ext

STABLE_TORCH_LIBRARY_IMPL(conv2d_ext, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d_ext::fprop));
  m.impl("fprop", TORCH_BOX(&conv2d_ext::fprop));
  m.impl("dgrad", TORCH_BOX(&conv2d_ext::dgrad));
  m.impl("wgrad", TORCH_BOX(&conv2d_ext::wgrad));
}
