// The ops' schemas, and the two that take no tensor: the table's names and the planner.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>

#include "../core/folded.h"
#include "../core/planner.h"
#include "checks.h"
#include "tensors.h"

namespace conv2d_ext {
namespace {

std::vector<std::string> kernels() {
  std::vector<std::string> names;
  for (int row = 0; row < row_count(); ++row) names.emplace_back(table_row(row).name);
  return names;
}

Op op_named(std::string const& wanted) {
  for (Op op : {Op::fprop, Op::dgrad, Op::wgrad})
    if (wanted == name(op)) return op;
  fail("plan", "op", "expected fprop, dgrad or wgrad, got ", wanted);
}

DType dtype_named(torch::headeronly::ScalarType t) {
  using torch::headeronly::ScalarType;
  switch (t) {
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    default:
      fail("plan", "dtype", "expected float16, bfloat16, float32 or float64");
  }
}

Strides strides_argument(char const* argument, IntList const& size, IntList const& stride) {
  if (stride.size() != 4) fail("plan", argument, "expected 4 integers, got ", stride.size());
  return strides_of(size.data(), stride.data());
}

IntList plan(StringHandle op_handle, torch::headeronly::ScalarType dtype, IntList const& input_size,
             IntList const& input_stride, IntList const& weight_size, IntList const& weight_stride,
             IntList const& output_stride, IntList const& stride, IntList const& padding, IntList const& dilation,
             int64_t groups, IntList const& alignments, bool allow_tf32, int64_t sm_count, int64_t compute_capability) {
  Op const op = op_named(take_string(op_handle));
  if (input_size.size() != 4) fail("plan", "input_size", "expected 4 integers, got ", input_size.size());
  if (weight_size.size() != 4) fail("plan", "weight_size", "expected 4 integers, got ", weight_size.size());
  if (sm_count < 1 || sm_count > kMaxExtent) fail("plan", "sm_count", "expected a positive count, got ", sm_count);
  Problem p = make_problem("plan", "input_size", input_size.data(), "weight_size", weight_size.data(),
                           {stride, padding, dilation, groups}, dtype_named(dtype), allow_tf32);
  p.x = strides_argument("input_stride", input_size, input_stride);
  p.w = strides_argument("weight_stride", weight_size, weight_stride);
  p.y = strides_argument("output_stride", {p.N, p.K, p.P(), p.Q()}, output_stride);
  p = folded(op, p);
  int* const aligns[] = {&p.x_align, &p.w_align, &p.y_align};
  if (alignments.size() != 3) fail("plan", "alignments", "expected 3 integers, got ", alignments.size());
  for (int i = 0; i < 3; ++i) *aligns[i] = int(min64(max64(alignments[i], 1), 16));
  Device const device{int(sm_count), int(compute_capability)};
  Choice const& chosen = best_choice(op, p, device);
  IntList out{chosen.plan.kernel, chosen.plan.split_k, chosen.plan.workspace_bytes, chosen.copies};
  for (int row = 0; row < row_count(); ++row) {
    double const ns = row_supports(row, op, p, device) ? row_ns(row, op, p, device) : -1;
    out.push_back(std::isfinite(ns) ? int64_t(ns) : std::numeric_limits<int64_t>::min());
  }
  return out;
}

}  // namespace
}  // namespace conv2d_ext

// The further arguments are keyword-only: allow_tf32 lets float32 operands be rounded to TF32 (Python resolves torch's
// flags), row >= 0 names a row of the table instead of letting the planner choose.
STABLE_TORCH_LIBRARY(conv2d_ext, m) {
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias=None, SymInt[2] stride=1, SymInt[2] padding=0, "
      "SymInt[2] dilation=1, SymInt groups=1, *, bool allow_tf32=False, int row=-1) -> Tensor");
  m.def(
      "fprop(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
      "SymInt groups, *, bool allow_tf32=False, int row=-1) -> Tensor");
  m.def(
      "dgrad(Tensor grad_output, Tensor weight, SymInt[] input_size, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, SymInt groups, *, bool allow_tf32=False, int row=-1) -> Tensor");
  m.def(
      "wgrad(Tensor grad_output, Tensor input, SymInt[] weight_size, SymInt[]? weight_stride, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, SymInt groups, *, bool allow_tf32=False, int row=-1) -> Tensor");
  // csrc/ops/eager.h
  m.def("plain_fprop(Tensor input, Tensor weight, Tensor? bias, int window, int groups_and_tf32) -> Tensor");
  for (std::string const op : {"plain_backward", "derived_backward"})
    m.def((op + "(Tensor grad_output, Tensor input, Tensor weight, int window, int groups_and_tf32, int wanted)"
                " -> (Tensor, Tensor, Tensor)")
              .c_str());
  m.def("kernels() -> str[]");
  m.def(
      "plan(str op, ScalarType dtype, int[] input_size, int[] input_stride, int[] weight_size, int[] weight_stride, "
      "int[] output_stride, int[] stride, int[] padding, int[] dilation, int groups, int[] alignments, "
      "bool allow_tf32, int sm_count, int compute_capability) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(conv2d_ext, CompositeExplicitAutograd, m) {
  m.impl("kernels", TORCH_BOX(&conv2d_ext::kernels));
  m.impl("plan", TORCH_BOX(&conv2d_ext::plan));
}
