// The CPU backend: ATen's convolution (oneDNN behind it) on checked arguments. Half types are computed in float32 and
// rounded once: ATen's own half convolution crashes on some shapes and spreads NaN on others.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "eager.h"
#include "tensors.h"

namespace conv2d_ext {
namespace {

namespace stable = torch::stable;
using stable::detail::from;
using torch::headeronly::ScalarType;

template <size_t count>
Tensor call_aten(char const* op, char const* overload, std::array<StableIValue, count> stack) {
  if (torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS)
    fail_like_torch(std::string(op) + " failed");
  return stable::detail::to<Tensor>(stack[0]);
}

// Whether ATen is given channels_last tensors. Not if grouped: ATen's grouped convolution of channels_last tensors
// crashes on some shapes (5x1, 24 filters a channel) and gives wrong numbers for some strides of size-one dimensions.
// Nor for a single channel, whose memory is the same: some of oneDNN's kernels for stride 2 and 3 are wrong there; nor
// for wgrad of 1x1 filters with strides: with 3 to 15 channels it writes beyond its memory where rows or columns are
// left over (torch 2.13, a processor with AMX); nor for long filters: fprop of 208x1 over 60 channels is wrong.
bool aten_channels_last(Problem const& p, Tensor const& a, Tensor const& b) {
  bool const long_filters = max64(p.R, p.S) > 64;
  return p.groups == 1 && !long_filters && p.C > 1 && p.dtype != DType::f64 &&
         (suggests_channels_last(a) || suggests_channels_last(b));
}

// The same values in exactly the strides of a contiguous or channels_last tensor, those of size-one dimensions
// included.
Tensor canonical(Tensor const& t, bool channels_last) {
  std::array<int64_t, 4> const size{t.size(0), t.size(1), t.size(2), t.size(3)};
  std::array<int64_t, 4> const stride = strides_for(size, channels_last);
  bool exact = true, dense = true;
  for (int i = 0; i < 4; ++i) {
    bool const same = t.stride(i) == stride[i];
    exact = exact && same;
    dense = dense && (same || size[i] == 1);
  }
  if (exact) return t;
  if (dense) {
    IntList const sizes(size.begin(), size.end()), strides(stride.begin(), stride.end());
    return call_aten<4>("aten::as_strided", "", {from(t), from(sizes), from(strides), from(std::optional<int64_t>())});
  }
  Tensor copy = empty_strided(size, stride, t);
  return stable::copy_(copy, t);
}

bool is_half(DType t) { return t == DType::f16 || t == DType::bf16; }
Tensor widened(Tensor const& t, DType dtype) { return is_half(dtype) ? stable::to(t, ScalarType::Float) : t; }

void check_row(char const* op, int64_t row) {
  if (row != -1) fail(op, "row", "expected -1 for CPU tensors (the rows are CUDA kernels), got ", row);
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

// Does ATen pad? It knows two-sided padding alone. And where a long window is as long as the image, or padding as half
// the window, some of oneDNN's kernels give wrong numbers and write beyond their memory (torch 2.13, AVX-512: wgrad of
// 40x3 filters over 31 rows; of windows of up to 16 none was met).
bool aten_pads(Problem const& p) {
  auto takes = [](int64_t extent, int64_t taps, int64_t dilation, int64_t before, int64_t after) {
    int64_t const window = (taps - 1) * dilation + 1;
    return before == after && (before == 0 || window <= 8 || (window < extent && 2 * before < window));
  };
  return takes(p.H, p.R, p.dilation_h, p.pad_top, p.pad_bottom) &&
         takes(p.W, p.S, p.dilation_w, p.pad_left, p.pad_right);
}

// x with its padding written out.
Tensor padded(Problem const& p, Tensor const& x) {
  return stable::pad(x, IntList{p.pad_left, p.pad_right, p.pad_top, p.pad_bottom});
}

// A step beyond the image meets the same pixels however long it is: with long ones oneDNN's dgrad divides by zero
// (2^31 - 1) or takes minutes (100000; torch 2.13).
int64_t stride_within(int64_t padded, int64_t taps, int64_t stride, int64_t dilation) {
  return min64(stride, padded - (taps - 1) * dilation);
}

struct AtenArguments {
  IntList stride, padding, dilation;
  explicit AtenArguments(Problem const& p)
      : stride{stride_within(p.H + p.pad_top + p.pad_bottom, p.R, p.stride_h, p.dilation_h),
               stride_within(p.W + p.pad_left + p.pad_right, p.S, p.stride_w, p.dilation_w)},
        padding(aten_pads(p) ? IntList{p.pad_top, p.pad_left} : IntList{0, 0}),
        dilation{p.R == 1 ? 1 : p.dilation_h, p.S == 1 ? 1 : p.dilation_w} {}
};

Tensor aten_convolution(Problem const& p, Tensor const& x, Tensor const& w, std::optional<Tensor> const& bias) {
  AtenArguments const a(p);
  bool const last = aten_channels_last(p, x, w);
  return call_aten<9>("aten::convolution", "",
                      {from(canonical(x, last)), from(canonical(w, last)), from(bias), from(a.stride), from(a.padding),
                       from(a.dilation), from(false), from(IntList{0, 0}), from(p.groups)});
}

// grad_input from y and w, or grad_weight from y and x: ATen is given an unread tensor of `size` for the one that is
// null.
Tensor aten_backward(Problem const& p, Tensor const& y, Tensor const* x, Tensor const* w,
                     std::array<int64_t, 4> const& size) {
  AtenArguments const a(p);
  bool const apart = x && p.R * p.S == 1 && p.stride_h * p.stride_w > 1;
  bool const last = !apart && aten_channels_last(p, y, x ? *x : *w);
  auto operand = [&](Tensor const* t) {
    return t ? canonical(*t, last) : empty_strided(size, strides_for(size, last), y);
  };
  int const which = x ? 1 : 0;  // of grad_input, grad_weight, grad_bias
  StableListHandle mask_list = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(3, &mask_list));
  for (int i = 0; i < 3; ++i) STABLE_TORCH_ERROR_CODE_CHECK(torch_list_push_back(mask_list, from(i == which)));
  std::array<StableIValue, 11> stack{from(canonical(y, last)),
                                     from(operand(x)),
                                     from(operand(w)),
                                     from(std::optional<IntList>()),
                                     from(a.stride),
                                     from(a.padding),
                                     from(a.dilation),
                                     from(false),
                                     from(IntList{0, 0}),
                                     from(p.groups),
                                     stable::detail::from<StableListHandle>(mask_list)};
  if (torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS)
    fail_like_torch("aten::convolution_backward failed");
  std::array<Tensor, 3> const all{stable::detail::to<Tensor>(stack[0]), stable::detail::to<Tensor>(stack[1]),
                                  stable::detail::to<Tensor>(stack[2])};
  return all[which];
}

bool is_empty(std::array<int64_t, 4> const& size) {
  return size[0] == 0 || size[1] == 0 || size[2] == 0 || size[3] == 0;
}

Tensor fprop(Tensor const& input, Tensor const& weight, std::optional<Tensor> const& bias, IntList const& stride,
             IntList const& padding, IntList const& dilation, int64_t groups, bool allow_tf32, int64_t row) {
  Call const call = check_fprop(input, weight, bias, {stride, padding, dilation, groups}, allow_tf32);
  check_row("conv2d", row);
  Problem const& p = call.problem;
  if (is_empty(call.out_size)) return empty_strided(call.out_size, call.out_stride, input);
  if (p.C == 0 || p.H == 0 || p.W == 0) {  // nothing but padding and bias
    Tensor out = zeros(call, input);
    if (!bias) return out;
    Tensor const column = call_aten<2>("aten::view", "", {from(*bias), from(IntList{1, p.K, 1, 1})});
    return stable::copy_(out, column);
  }
  std::optional<Tensor> wide_bias;
  if (bias) wide_bias = is_half(p.dtype) ? stable::to(*bias, ScalarType::Float) : *bias;
  Tensor const x = widened(input, p.dtype);
  return laid_out(call, aten_convolution(p, aten_pads(p) ? x : padded(p, x), widened(weight, p.dtype), wide_bias),
                  input);
}

Tensor dgrad(Tensor const& grad_output, Tensor const& weight, IntList const& input_size, IntList const& stride,
             IntList const& padding, IntList const& dilation, int64_t groups, bool allow_tf32, int64_t row) {
  Call const call = check_dgrad(grad_output, weight, input_size, {stride, padding, dilation, groups}, allow_tf32);
  check_row("dgrad", row);
  Problem const& p = call.problem;
  if (is_empty(call.out_size) || p.K == 0) return zeros(call, grad_output);
  Tensor const y = widened(grad_output, p.dtype);
  bool const plain = aten_pads(p);
  std::array<int64_t, 4> const size{p.N, p.C, plain ? p.H : p.H + p.pad_top + p.pad_bottom,
                                    plain ? p.W : p.W + p.pad_left + p.pad_right};
  Tensor const w = widened(weight, p.dtype);
  Tensor grad = aten_backward(p, y, nullptr, &w, size);
  if (!plain) grad = stable::narrow(grad, 2, p.pad_top, p.H);
  if (!plain) grad = stable::narrow(grad, 3, p.pad_left, p.W);
  return laid_out(call, grad, grad_output);
}

Tensor wgrad(Tensor const& grad_output, Tensor const& input, IntList const& weight_size,
             std::optional<IntList> const& weight_stride, IntList const& stride, IntList const& padding,
             IntList const& dilation, int64_t groups, bool allow_tf32, int64_t row) {
  Call const call =
      check_wgrad(grad_output, input, weight_size, weight_stride, {stride, padding, dilation, groups}, allow_tf32);
  check_row("wgrad", row);
  Problem const& p = call.problem;
  if (is_empty(call.out_size) || p.N == 0 || p.H == 0 || p.W == 0) return zeros(call, grad_output);
  Tensor const y = widened(grad_output, p.dtype), x = widened(input, p.dtype);
  Tensor const whole = aten_pads(p) ? x : padded(p, x);
  return laid_out(call, aten_backward(p, y, &whole, nullptr, call.out_size), grad_output);
}

}  // namespace
}  // namespace conv2d_ext

STABLE_TORCH_LIBRARY_IMPL(conv2d_ext, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d_ext::fprop));
  m.impl("fprop", TORCH_BOX(&conv2d_ext::fprop));
  m.impl("dgrad", TORCH_BOX(&conv2d_ext::dgrad));
  m.impl("wgrad", TORCH_BOX(&conv2d_ext::wgrad));
  m.impl("plain_fprop", TORCH_BOX(&conv2d_ext::plain_fprop<conv2d_ext::fprop>));
  m.impl("plain_backward", TORCH_BOX((&conv2d_ext::plain_backward<conv2d_ext::dgrad, conv2d_ext::wgrad>)));
}

STABLE_TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("convolution_overrideable", TORCH_BOX(&conv2d_ext::node_fprop<conv2d_ext::fprop>));
  m.impl("convolution_backward_overrideable", TORCH_BOX(&conv2d_ext::node_backward));
}
STABLE_TORCH_LIBRARY_IMPL(aten, AutogradCPU, m) {
  m.impl("convolution_backward_overrideable", TORCH_BOX(&conv2d_ext::node_backward));
}
