#include "planner.h"

#include <cstddef>
#include <initializer_list>
#include <vector>

#include "plan.h"

namespace conv2d_ext {
namespace {

// The facts that static_assert can state about the planner, with no GPU.
constexpr Problem resnet50_conv2(DType t) {
  Problem p;
  p.N = 256, p.C = 64, p.H = 56, p.W = 56, p.K = 64, p.R = 3, p.S = 3;
  p.pad_top = p.pad_bottom = p.pad_left = p.pad_right = 1;
  p.dtype = t;
  p.x = channels_last_strides(64, 56, 56);
  p.w = channels_last_strides(64, 3, 3);
  p.y = channels_last_strides(64, 56, 56);
  return p;
}
static_assert(resnet50_conv2(DType::f32).P() == 56);
static_assert(make_plan(Op::fprop, resnet50_conv2(DType::f16), h200_sxm).split_k == 1);
static_assert(make_plan(Op::wgrad, resnet50_conv2(DType::f32), h200_sxm).split_k > 1);
static_assert(make_plan(Op::dgrad, resnet50_conv2(DType::f64), h200_sxm).kernel >= 0);
static_assert(make_plan(Op::fprop, resnet50_conv2(DType::f32), {132, 75}).kernel == -1);

// A question to the planner and its answer; an empty one is of a device that nobody has.
struct Answered {
  Op op = Op::fprop;
  Problem problem;
  Device device{0, 0};
  Plan plan;
};

std::size_t place_of(Op op, Problem const& p, std::size_t places) {
  uint64_t mixed = uint64_t(op);
  for (int64_t value : {p.N, p.C, p.H, p.W, p.K, p.R, p.S, p.stride_h, p.stride_w, p.pad_top, p.pad_left, p.dilation_h,
                        p.groups, int64_t(p.dtype), p.x.c, p.y.c})
    mixed = (mixed ^ uint64_t(value)) * 0x9e3779b97f4a7c15u;
  return std::size_t(mixed >> 32) % places;
}

}  // namespace

int row_count() { return kRowCount; }
Row const& table_row(int index) { return kRows[index]; }

bool row_supports(int index, Op op, Problem const& p, Device const& d) { return supports(kRows[index], op, p, d); }
double row_ns(int index, Op op, Problem const& p, Device const& d) { return estimate(kRows[index], op, p, d).ns; }
Plan plan_of_row(int index, Op op, Problem const& p, Device const& d) { return plan_row(index, op, p, d); }

Plan best_plan(Op op, Problem const& p, Device const& d) {
  // To weigh all rows takes 4 to 16 us, and a network asks for the same layers again and again.
  thread_local std::vector<Answered> answered(256);
  Answered& known = answered[place_of(op, p, answered.size())];
  if (known.op != op || known.device != d || known.problem != p) known = {op, p, d, make_plan(op, p, d)};
  return known.plan;
}

Road road_of(Plan const& plan, Problem const& p) {
  Row const& row = kRows[plan.kernel];
  Packing const which = packing(row, p);
  return {which.x + 2 * which.w + 4 * which.y, parts_of(row, p).count() > 0, depthwise_turns(row, p),
          depthwise_turn(row, p)};
}

}  // namespace conv2d_ext
