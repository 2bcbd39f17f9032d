#include "planner.h"

#include <cstddef>
#include <initializer_list>
#include <unordered_map>

#include "phase_runs.h"
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

// dgrad of 3x3 filters with a stride of two: each of 100 tiles a phase has one block, and none has much more to do than
// the mean of 121.2.
constexpr bool shares_phases() {
  int64_t const tiles[] = {100, 100, 100, 100}, steps[] = {16, 32, 32, 64};
  PhaseRuns runs;
  runs.share(tiles, steps, 4, 100, 132);
  int of_tile[400] = {};
  for (int i = 0; i < runs.count; ++i)
    for (int j = 0; j < runs.run[i].tiles; ++j) ++of_tile[runs.run[i].first + j];
  for (int const blocks : of_tile)
    if (blocks != 1) return false;
  return runs.count > 0 && runs.longest <= 144;
}
static_assert(shares_phases());

struct Question {
  Op op;
  Problem problem;
  Device device;
  friend bool operator==(Question const&, Question const&) = default;
};

struct Mixed {
  std::size_t operator()(Question const& q) const {
    Problem const& p = q.problem;
    uint64_t mixed = uint64_t(q.op);
    for (int64_t value : {p.N, p.C, p.H, p.W, p.K, p.R, p.S, p.stride_h, p.stride_w, p.pad_top, p.pad_left,
                          p.dilation_h, p.groups, int64_t(p.dtype), p.x.c, p.y.c})
      mixed = (mixed ^ uint64_t(value)) * 0x9e3779b97f4a7c15u;
    return std::size_t(mixed >> 32);
  }
};

constexpr std::size_t kMostKept = 2048;  // choices of a thread: 1.2 MB

Choice with_road(Plan const& plan, Problem const& p) {
  if (plan.kernel < 0) return {plan};
  Row const& row = kRows[plan.kernel];
  Packing const which = packing(row, p);
  return {plan, which.x + 2 * which.w + 4 * which.y, parts_of(row, p).count() > 0, depthwise_turns(row, p),
          depthwise_turn(row, p)};
}

}  // namespace

int row_count() { return kRowCount; }
Row const& table_row(int index) { return kRows[index]; }

bool row_supports(int index, Op op, Problem const& p, Device const& d) { return supports(kRows[index], op, p, d); }
double row_ns(int index, Op op, Problem const& p, Device const& d) { return estimate(kRows[index], op, p, d).ns; }

Choice choice_of_row(int index, Op op, Problem const& p, Device const& d) {
  return with_road(plan_row(index, op, p, d), p);
}

Choice const& best_choice(Op op, Problem const& p, Device const& d) {
  // To weigh all rows takes 10 to 40 us, and a network asks for the same layers, hundreds of them, again and again.
  thread_local std::unordered_map<Question, Choice, Mixed> kept;
  Question const question{op, p, d};
  auto found = kept.find(question);
  if (found == kept.end()) {
    if (kept.size() >= kMostKept) kept.clear();
    found = kept.emplace(question, with_road(make_plan(op, p, d), p)).first;
  }
  return found->second;
}

}  // namespace conv2d_ext
