// Arguments to Problem: every check of every op, for all backends, in one place; conv2d_ext/_shapes.py mirrors it for
// fake tensors. An error reads "<op>: <argument>: expected <what>, got <what>".
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/problem.h"

namespace conv2d_ext {

using torch::stable::Tensor;
using IntList = std::vector<int64_t>;

template <class... Args>
[[noreturn]] void fail(char const* op, char const* argument, Args const&... what) {
  std::ostringstream message;
  message << op << ": " << argument << ": ";
  (message << ... << what);
  throw std::runtime_error(message.str());
}

inline std::string text(int64_t const* values, size_t count) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < count; ++i) out << (i ? ", " : "") << values[i];
  out << "]";
  return out.str();
}
inline std::string text(IntList const& list) { return text(list.data(), list.size()); }

// What the shim's integer codes of dtype, device and layout are called in torch.
inline std::string dtype_text(int32_t code) {
  struct Named {
    int32_t code;
    char const* name;
  };
#define NAMED(dtype) {aoti_torch_dtype_##dtype(), #dtype}
  Named const known[] = {
      NAMED(float16),    NAMED(bfloat16),      NAMED(float32),         NAMED(float64),     NAMED(bool),
      NAMED(uint8),      NAMED(uint16),        NAMED(uint32),          NAMED(uint64),      NAMED(int8),
      NAMED(int16),      NAMED(int32),         NAMED(int64),           NAMED(complex32),   NAMED(complex64),
      NAMED(complex128), NAMED(float8_e4m3fn), NAMED(float8_e4m3fnuz), NAMED(float8_e5m2), NAMED(float8_e5m2fnuz)};
#undef NAMED
  for (Named const& k : known)
    if (k.code == code) return k.name;
  return "dtype number " + std::to_string(code);
}

inline int32_t dtype_code(Tensor const& t) {
  int32_t code = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}
inline int32_t device_type(Tensor const& t) {
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type;
}
inline std::string device_text(Tensor const& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "device type " + std::to_string(device_type(t));
}

inline DType dtype_of(char const* op, char const* argument, Tensor const& t) {
  int32_t const code = dtype_code(t);
  if (code == aoti_torch_dtype_float32()) return DType::f32;
  if (code == aoti_torch_dtype_float16()) return DType::f16;
  if (code == aoti_torch_dtype_bfloat16()) return DType::bf16;
  if (code == aoti_torch_dtype_float64()) return DType::f64;
  fail(op, argument, "expected float16, bfloat16, float32 or float64, got ", dtype_text(code));
}

inline void check_same(char const* op, char const* argument, Tensor const& t, char const* leader_name,
                       Tensor const& leader) {
  if (dtype_code(t) != dtype_code(leader))
    fail(op, argument, "expected ", dtype_text(dtype_code(leader)), " like ", leader_name, ", got ",
         dtype_text(dtype_code(t)));
  if (device_type(t) != device_type(leader) || t.get_device_index() != leader.get_device_index())
    fail(op, argument, "expected a tensor on ", device_text(leader), " like ", leader_name, ", got ", device_text(t));
}

inline void check_rank(char const* op, char const* argument, Tensor const& t, int64_t rank, char const* shape) {
  int32_t layout = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  if (layout != aoti_torch_layout_strided()) fail(op, argument, "expected a strided tensor, got another layout");
  if (t.dim() != rank)
    fail(op, argument, "expected ", rank, " dimension", rank == 1 ? "" : "s", " ", shape, ", got ", t.dim());
}

// A dimension of size one is never stepped along; its stride may be anything, and 0 says so.
inline Strides strides_of(int64_t const* sizes, int64_t const* strides) {
  auto step = [&](int i) { return sizes[i] > 1 ? strides[i] : 0; };
  return {step(0), step(1), step(2), step(3)};
}
inline Strides strides_of(Tensor const& t) { return strides_of(t.sizes().data(), t.strides().data()); }

// ATen's rule for reading channels_last off the strides, with its tie-breaks for dimensions of size one.
inline bool suggests_channels_last(int64_t const* sizes, int64_t const* strides) {
  if (strides[1] == 0) return false;
  int64_t least = 0;
  for (int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < least) return false;
    if (d == 0 && least == strides[1]) return false;  // N111: ambiguous, and contiguous by default
    least = sizes[d] > 1 ? strides[d] * sizes[d] : strides[d];
  }
  return true;
}
inline bool suggests_channels_last(Tensor const& t) {
  return suggests_channels_last(t.sizes().data(), t.strides().data());
}

struct Attributes {
  IntList const& stride;
  IntList const& padding;  // (H, W) or (top, bottom, left, right)
  IntList const& dilation;
  int64_t groups;
};

inline constexpr int64_t kMaxExtent = (int64_t(1) << 31) - 1;

inline void check_list(char const* op, char const* argument, IntList const& list, int64_t least, bool four_allowed) {
  if (list.size() != 2 && !(four_allowed && list.size() == 4))
    fail(op, argument, "expected ", four_allowed ? "2 or 4" : "2", " integers, got ", list.size());
  for (int64_t v : list)
    if (v < least || v > kMaxExtent)
      fail(op, argument, "expected integers from ", least, " to ", kMaxExtent, ", got ", text(list));
}

// x is input's size, w weight's; x_name and w_name are what the op calls the arguments that they came from.
inline Problem make_problem(char const* op, char const* x_name, int64_t const* x, char const* w_name, int64_t const* w,
                            Attributes const& a, DType dtype, bool allow_tf32) {
  check_list(op, "stride", a.stride, 1, false);
  check_list(op, "padding", a.padding, 0, true);
  check_list(op, "dilation", a.dilation, 1, false);
  if (a.groups < 1 || a.groups > kMaxExtent)
    fail(op, "groups", "expected an integer from 1 to ", kMaxExtent, ", got ", a.groups);

  Problem p;
  p.N = x[0], p.C = x[1], p.H = x[2], p.W = x[3];
  p.K = w[0], p.R = w[2], p.S = w[3];
  p.stride_h = a.stride[0], p.stride_w = a.stride[1];
  p.dilation_h = a.dilation[0], p.dilation_w = a.dilation[1];
  bool const four = a.padding.size() == 4;
  p.pad_top = a.padding[0], p.pad_bottom = a.padding[four ? 1 : 0];
  p.pad_left = a.padding[four ? 2 : 1], p.pad_right = a.padding[four ? 3 : 1];
  p.groups = a.groups;
  p.dtype = dtype;
  p.allow_tf32 = allow_tf32;

  for (int i = 1; i < 4; ++i)
    if (x[i] < 0 || x[i] > kMaxExtent)
      fail(op, x_name, "expected channels, height and width from 0 to ", kMaxExtent, ", got ", text(x, 4));
  if (x[0] < 0) fail(op, x_name, "expected a batch of 0 or more, got ", text(x, 4));
  for (int i = 0; i < 4; ++i)
    if (w[i] < (i < 2 ? 0 : 1) || w[i] > kMaxExtent)
      fail(op, w_name, "expected 0 or more channels and a kernel of at least 1x1, all below 2^31, got ", text(w, 4));
  // w[1] * groups cannot overflow: both are below 2^31.
  if (w[1] * p.groups != p.C)
    fail(op, w_name, "expected ", p.C, " input channels / ", p.groups, " groups in dimension 1, got ", w[1]);
  if (p.K % p.groups != 0)
    fail(op, w_name, "expected a number of filters divisible by groups = ", p.groups, ", got ", p.K);
  int64_t const height = p.H + p.pad_top + p.pad_bottom, width = p.W + p.pad_left + p.pad_right;
  if (height > kMaxExtent || width > kMaxExtent)
    fail(op, "padding", "expected a padded input below 2^31 in height and width, got ", height, "x", width);
  int64_t const window_h = (p.R - 1) * p.dilation_h + 1, window_w = (p.S - 1) * p.dilation_w + 1;
  if (height < window_h || width < window_w)
    fail(op, x_name, "expected a padded size of at least ", window_h, "x", window_w, " (the dilated kernel), got ",
         height, "x", width);
  int64_t count = 0;
  if (__builtin_mul_overflow(p.N, p.K, &count) || __builtin_mul_overflow(count, p.P(), &count) ||
      __builtin_mul_overflow(count, p.Q(), &count) || __builtin_mul_overflow(count, int64_t(8), &count))
    fail(op, x_name, "expected an output of fewer than 2^60 elements, got ", p.N, "x", p.K, "x", p.P(), "x", p.Q());
  return p;
}

inline void check_grad_output(char const* op, Tensor const& grad_output, Problem const& p) {
  int64_t const want[4] = {p.N, p.K, p.P(), p.Q()};
  for (int i = 0; i < 4; ++i)
    if (grad_output.size(i) != want[i])
      fail(op, "grad_output", "expected ", text(want, 4), ", got ", text(grad_output.sizes().data(), 4));
}

inline std::array<int64_t, 4> strides_for(std::array<int64_t, 4> const& size, bool channels_last) {
  Strides const s = channels_last ? channels_last_strides(max64(size[1], 1), max64(size[2], 1), max64(size[3], 1))
                                  : contiguous_strides(max64(size[1], 1), max64(size[2], 1), max64(size[3], 1));
  return {s.n, s.c, s.h, s.w};
}

// One checked call: the problem, and the size and strides of the tensor that the op makes.
struct Call {
  Problem problem;
  std::array<int64_t, 4> out_size, out_stride;
};

inline Call check_fprop(Tensor const& input, Tensor const& weight, std::optional<Tensor> const& bias,
                        Attributes const& a, bool allow_tf32) {
  char const* op = "conv2d";
  check_rank(op, "input", input, 4, "(N, C, H, W)");
  check_rank(op, "weight", weight, 4, "(K, C/groups, R, S)");
  DType const dtype = dtype_of(op, "input", input);
  check_same(op, "weight", weight, "input", input);
  Problem p = make_problem(op, "input", input.sizes().data(), "weight", weight.sizes().data(), a, dtype, allow_tf32);
  if (bias) {
    check_rank(op, "bias", *bias, 1, "(K)");
    check_same(op, "bias", *bias, "input", input);
    if (bias->size(0) != p.K) fail(op, "bias", "expected ", p.K, " elements (weight's filters), got ", bias->size(0));
  }
  bool const channels_last = dtype != DType::f64 && (suggests_channels_last(input) || suggests_channels_last(weight));
  Call call{p, {p.N, p.K, p.P(), p.Q()}, {}};
  call.out_stride = strides_for(call.out_size, channels_last);
  call.problem.x = strides_of(input);
  call.problem.w = strides_of(weight);
  call.problem.y = strides_of(call.out_size.data(), call.out_stride.data());
  return call;
}

inline Call check_dgrad(Tensor const& grad_output, Tensor const& weight, IntList const& input_size, Attributes const& a,
                        bool allow_tf32) {
  char const* op = "dgrad";
  check_rank(op, "grad_output", grad_output, 4, "(N, K, P, Q)");
  check_rank(op, "weight", weight, 4, "(K, C/groups, R, S)");
  DType const dtype = dtype_of(op, "grad_output", grad_output);
  check_same(op, "weight", weight, "grad_output", grad_output);
  if (input_size.size() != 4) fail(op, "input_size", "expected 4 integers (N, C, H, W), got ", input_size.size());
  Problem p = make_problem(op, "input_size", input_size.data(), "weight", weight.sizes().data(), a, dtype, allow_tf32);
  check_grad_output(op, grad_output, p);
  bool const channels_last =
      dtype != DType::f64 && (suggests_channels_last(grad_output) || suggests_channels_last(weight));
  Call call{p, {p.N, p.C, p.H, p.W}, {}};
  call.out_stride = strides_for(call.out_size, channels_last);
  call.problem.x = strides_of(call.out_size.data(), call.out_stride.data());
  call.problem.w = strides_of(weight);
  call.problem.y = strides_of(grad_output);
  return call;
}

// A tensor of this size and stride has no gaps and no element twice.
inline bool is_dense(std::array<int64_t, 4> const& size, IntList const& stride) {
  for (int64_t s : stride)
    if (s < 0) return false;
  for (int64_t s : size)
    if (s == 0) return true;
  int64_t next = 1;
  bool used[4] = {};
  for (int step = 0; step < 4; ++step) {
    int pick = -1;
    for (int i = 0; i < 4; ++i)
      if (!used[i] && (size[i] == 1 || (stride[i] == next))) pick = i;
    if (pick < 0) return false;
    used[pick] = true;
    next *= size[pick];
  }
  return true;
}

inline Call check_wgrad(Tensor const& grad_output, Tensor const& input, IntList const& weight_size,
                        std::optional<IntList> const& weight_stride, Attributes const& a, bool allow_tf32) {
  char const* op = "wgrad";
  check_rank(op, "grad_output", grad_output, 4, "(N, K, P, Q)");
  check_rank(op, "input", input, 4, "(N, C, H, W)");
  DType const dtype = dtype_of(op, "grad_output", grad_output);
  check_same(op, "input", input, "grad_output", grad_output);
  if (weight_size.size() != 4)
    fail(op, "weight_size", "expected 4 integers (K, C/groups, R, S), got ", weight_size.size());
  Problem p = make_problem(op, "input", input.sizes().data(), "weight_size", weight_size.data(), a, dtype, allow_tf32);
  check_grad_output(op, grad_output, p);
  Call call{p, {weight_size[0], weight_size[1], weight_size[2], weight_size[3]}, {}};
  call.out_stride = strides_for(call.out_size, false);
  if (weight_stride) {
    if (weight_stride->size() != 4) fail(op, "weight_stride", "expected 4 integers, got ", weight_stride->size());
    if (!is_dense(call.out_size, *weight_stride))
      fail(op, "weight_stride", "expected the strides of a dense tensor of size ", text(weight_size), ", got ",
           text(*weight_stride));
    for (int i = 0; i < 4; ++i) call.out_stride[i] = (*weight_stride)[i];
  }
  call.problem.x = strides_of(input);
  call.problem.w = strides_of(call.out_size.data(), call.out_stride.data());
  call.problem.y = strides_of(grad_output);
  return call;
}

}  // namespace conv2d_ext
