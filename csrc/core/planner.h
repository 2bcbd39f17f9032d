// What the ops ask the planner. planner.cpp answers, the one source that compiles plan.h: it takes long.
#pragma once

#include "row.h"

namespace conv2d_ext {

int row_count();
Row const& table_row(int index);

bool row_supports(int index, Op op, Problem const& p, Device const& d);
double row_ns(int index, Op op, Problem const& p, Device const& d);  // of a row that supports the problem
Plan plan_of_row(int index, Op op, Problem const& p, Device const& d);
Plan best_plan(Op op, Problem const& p, Device const& d);

// How the row of a plan runs: on copies of x (1), w (2) and y (4), in parts of its own, or in turns of a smaller
// problem.
struct Road {
  int copies = 0;
  bool parts = false;
  int64_t turns = 1;
  Problem turn;
};
Road road_of(Plan const& plan, Problem const& p);

}  // namespace conv2d_ext
