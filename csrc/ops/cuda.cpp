// The CUDA backend: check, plan, allocate, launch. No arithmetic and no choice of its own.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../core/folded.h"
#include "../core/planner.h"
#include "../cuda/launch.h"
#include "../cuda/load.h"
#include "../cuda/pack.h"
#include "checks.h"
#include "eager.h"
#include "tensors.h"

namespace conv2d_ext {

#define CONV2D_EXT_DECLARE_LAUNCHER(family, op, dtype, tm, tn, tk, variant)                                    \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const&, Plan const&, Arguments const&, \
                                                                cudaStream_t);
CONV2D_EXT_KERNELS(CONV2D_EXT_DECLARE_LAUNCHER)
#undef CONV2D_EXT_DECLARE_LAUNCHER

Row const& row_of(Plan const& plan) { return table_row(plan.kernel); }

namespace {

#define CONV2D_EXT_ADDRESS(family, op, dtype, tm, tn, tk, variant) &family##_##op##_##dtype##_##tm##x##tn##_##variant,
constexpr Launcher kLaunchers[] = {CONV2D_EXT_KERNELS(CONV2D_EXT_ADDRESS)};
#undef CONV2D_EXT_ADDRESS

void check_cuda(char const* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it, too
  throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
}

int attribute(char const* op, cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(op, cudaDeviceGetAttribute(&value, which, device));
  return value;
}

Device const& device_of(char const* op, int index) {
  thread_local std::vector<Device> known;
  if (size_t(index) >= known.size()) known.resize(size_t(index) + 1, Device{0, 0});
  Device& device = known[size_t(index)];
  if (device.sm_count == 0)
    device = {attribute(op, cudaDevAttrMultiProcessorCount, index),
              10 * attribute(op, cudaDevAttrComputeCapabilityMajor, index) +
                  attribute(op, cudaDevAttrComputeCapabilityMinor, index)};
  return device;
}

int alignment(void const* address) {
  uintptr_t const low = reinterpret_cast<uintptr_t>(address) | 16;
  return int(low & (~low + 1));
}

// Kernels add up element offsets of padded positions, which lie outside the tensor: the sums must not wrap.
void check_offsets(char const* op, Problem const& p) {
  double const reach = double(p.H + p.pad_top + p.pad_bottom) * double(max64(p.x.h, p.y.h)) +
                       double(p.W + p.pad_left + p.pad_right) * double(max64(p.x.w, p.y.w));
  if (reach > double(int64_t(1) << 60))
    fail(op, "padding", "expected padding times the tensor's strides below 2^60 on CUDA, got ", reach);
}

Choice choice_for(char const* op_name, Op op, Problem const& p, Device const& device, int64_t row) {
  if (row == -1) {
    Choice const& best = best_choice(op, p, device);
    if (best.plan.kernel < 0)
      fail(op_name, "input", "expected a GPU of compute capability 8.0 or later, got ", device.compute_capability / 10,
           ".", device.compute_capability % 10);
    return best;
  }
  if (row < 0 || row >= row_count())
    fail(op_name, "row", "expected -1 or a row of the table, 0 to ", row_count() - 1, ", got ", row);
  if (!row_supports(int(row), op, p, device))
    fail(op_name, "row", "expected a row that supports the problem, got ", row, " (", table_row(int(row)).name, ")");
  return choice_of_row(int(row), op, p, device);
}

// x, w, y: the tensors in the problem's roles; out is one of them.
Tensor run(char const* op_name, Op op, Call const& call, Tensor const* x, Tensor const* w, Tensor const* y,
           std::optional<Tensor> const& bias, int64_t row) {
  Tensor const& like = x ? *x : *y;
  torch::stable::accelerator::DeviceGuard const guard(like.get_device_index());
  // A thread of autograd may come here before anything has made the device's context current in it, and the driver's
  // tensor maps need one.
  check_cuda(op_name, cudaSetDevice(like.get_device_index()));
  load_kernels(like.get_device_index());
  Tensor out = empty_strided(call.out_size, call.out_stride, like);
  for (int64_t size : call.out_size)
    if (size == 0) return out;
  auto address = [&](Tensor const* t) { return t ? t->const_data_ptr() : out.const_data_ptr(); };
  Problem p = folded(op, call.problem);
  p.x_align = alignment(address(x));
  p.w_align = alignment(address(w));
  p.y_align = alignment(address(y));
  check_offsets(op_name, p);
  Choice const choice = choice_for(op_name, op, p, device_of(op_name, like.get_device_index()), row);
  Plan const& plan = choice.plan;

  Arguments args{};
  args.a = address(op == Op::dgrad ? y : x);
  args.b = address(op == Op::wgrad ? y : w);
  if (bias) args.bias = bias->const_data_ptr(), args.bias_stride = bias->stride(0);
  args.out = out.mutable_data_ptr();
  std::optional<Tensor> workspace;
  if (plan.workspace_bytes > 0) {
    workspace = empty_bytes(plan.workspace_bytes, like);
    args.workspace = workspace->mutable_data_ptr();
  }
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  Launcher const launcher = kLaunchers[plan.kernel];
  auto const on = static_cast<cudaStream_t>(stream);
  if (choice.copies != 0 || choice.parts) {
    check_cuda(op_name, launch_packed(launcher, op, p, plan, args, on));
    return out;
  }
  int const element = size_of(p.dtype);
  auto past = [element](void const* address, int64_t elements) {
    return static_cast<char const*>(address) + elements * element;
  };
  for (int64_t i = 0; i < choice.turns; ++i) {
    int64_t const w_step = i * p.w.n, y_step = i * p.y.c;
    Arguments part = args;
    part.b = past(args.b, op == Op::wgrad ? y_step : w_step);
    part.out = static_cast<char*>(args.out) + (op == Op::wgrad ? w_step : y_step) * element;
    if (args.bias) part.bias = past(args.bias, i * args.bias_stride);
    part.bias_stride = args.bias_stride * choice.turns;
    check_cuda(op_name, launcher(choice.turn, plan, part, on));
  }
  return out;
}

Tensor fprop(Tensor const& input, Tensor const& weight, std::optional<Tensor> const& bias, IntList const& stride,
             IntList const& padding, IntList const& dilation, int64_t groups, bool allow_tf32, int64_t row) {
  Call const call = check_fprop(input, weight, bias, {stride, padding, dilation, groups}, allow_tf32);
  return run("conv2d", Op::fprop, call, &input, &weight, nullptr, bias, row);
}

Tensor dgrad(Tensor const& grad_output, Tensor const& weight, IntList const& input_size, IntList const& stride,
             IntList const& padding, IntList const& dilation, int64_t groups, bool allow_tf32, int64_t row) {
  Call const call = check_dgrad(grad_output, weight, input_size, {stride, padding, dilation, groups}, allow_tf32);
  return run("dgrad", Op::dgrad, call, nullptr, &weight, &grad_output, std::nullopt, row);
}

Tensor wgrad(Tensor const& grad_output, Tensor const& input, IntList const& weight_size,
             std::optional<IntList> const& weight_stride, IntList const& stride, IntList const& padding,
             IntList const& dilation, int64_t groups, bool allow_tf32, int64_t row) {
  Call const call =
      check_wgrad(grad_output, input, weight_size, weight_stride, {stride, padding, dilation, groups}, allow_tf32);
  return run("wgrad", Op::wgrad, call, &input, nullptr, &grad_output, std::nullopt, row);
}

}  // namespace
}  // namespace conv2d_ext

STABLE_TORCH_LIBRARY_IMPL(conv2d_ext, CUDA, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d_ext::fprop));
  m.impl("fprop", TORCH_BOX(&conv2d_ext::fprop));
  m.impl("dgrad", TORCH_BOX(&conv2d_ext::dgrad));
  m.impl("wgrad", TORCH_BOX(&conv2d_ext::wgrad));
  m.impl("plain_fprop", TORCH_BOX(&conv2d_ext::plain_fprop<conv2d_ext::fprop>));
  m.impl("plain_backward", TORCH_BOX((&conv2d_ext::plain_backward<conv2d_ext::dgrad, conv2d_ext::wgrad>)));
}

STABLE_TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("convolution_overrideable", TORCH_BOX(&conv2d_ext::node_fprop<conv2d_ext::fprop>));
  m.impl("convolution_backward_overrideable", TORCH_BOX(&conv2d_ext::node_backward));
}
STABLE_TORCH_LIBRARY_IMPL(aten, AutogradCUDA, m) {
  m.impl("convolution_backward_overrideable", TORCH_BOX(&conv2d_ext::node_backward));
}
