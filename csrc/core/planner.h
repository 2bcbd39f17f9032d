// What the ops ask the planner. planner.cpp answers, the one source that compiles plan.h: it takes long.
#pragma once

#include "row.h"

namespace conv2d_ext {

int row_count();
Row const& table_row(int index);

bool row_supports(int index, Op op, Problem const& p, Device const& d);
double row_ns(int index, Op op, Problem const& p, Device const& d);  // of a row that supports the problem

// A plan, and how its row runs: on copies of x (1), w (2) and y (4), in parts of its own, or in turns of a smaller
// problem.
struct Choice {
  Plan plan;
  int copies = 0;
  bool parts = false;
  int64_t turns = 1;
  Problem turn;
};
Choice choice_of_row(int index, Op op, Problem const& p, Device const& d);
Choice const& best_choice(Op op, Problem const& p, Device const& d);  // until the thread asks again

}  // namespace conv2d_ext
