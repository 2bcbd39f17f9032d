// Which kernel runs a problem: make_plan enumerates the rows of kernels.def, drops those that do not support the
// problem and takes the cheapest. Pure and constexpr: nothing is read but the arguments. What a family takes and costs
// is in the family's header; what was found wrong with that beside other families' rows is in *_measured.h and
// beside.h.
#pragma once

#include "beside.h"
#include "depthwise_measured.h"
#include "mixed.h"
#include "pack.h"
#include "pixels_measured.h"
#include "stem_measured.h"
#include "supports.h"
#include "table.h"
#include "tiles_measured.h"
#include "turns.h"
#include "workspace.h"

namespace conv2d_ext {

// Without beside.def.
constexpr Estimate estimate_apart(Row const& row, Op op, Problem const& p, Device const& d) {
  if (int64_t const turns = depthwise_turns(row, p); turns > 1) {
    Estimate e = estimate_apart(row, op, depthwise_turn(row, p), d);
    double const begun = op == Op::wgrad ? e.ns * sums_turn_share(row, p) : e.ns * 0.4 < 3300 ? e.ns * 0.4 : 3300;
    e.ns = e.ns * double(turns) - begun * double(turns - 1);
    return e;
  }
  if (is_mixed(row, p)) {
    Packed const q = packed_mixed(p);
    Estimate e = estimate_apart(row, op, q.problem, d);
    e.ns += replaces_planes(row, p) ? packing_planes_ns(op, p, q) : packing_ns(op, p, q);
    // As measured: 32x64x57x57 15x15 60.4 us, by band 53.8, both estimated at 56.
    if (row.family == Family::stream && row.tile_m == 15) e.ns += 5000;
    return e;
  }
  switch (row.family) {
    case Family::tma:
    case Family::tma_strict:
    case Family::grouped:
    case Family::simt:
      return tiles_estimate(row, op, p, d);
    case Family::igemm:
      return igemm_as_measured(row, op, p, d);
    case Family::depthwise:
    case Family::column:
    case Family::toeplitz:
    case Family::strip:
    case Family::stream:
    case Family::band:
      return one_channel_estimate(row, op, p, d);
    case Family::stem:
      return stem_as_measured(row, op, p);
    case Family::pixels:
      return pixel_rows_estimate(row, op, p, d);
  }
  return {};
}

constexpr Estimate estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  Estimate e = estimate_apart(row, op, p, d);
  e.ns = beside_others_ns(row, p, e.ns);
  return e;
}

// The plan for one row; the caller has asked supports() first.
constexpr Plan plan_row(int kernel, Op op, Problem const& p, Device const& d) {
  Estimate const e = estimate(kRows[kernel], op, p, d);
  return {kernel, e.split_k, workspace_bytes(kRows[kernel], op, p, e.split_k, d)};
}

// There is always a plan on a GPU of compute capability 8.0 or later; kernel = -1 otherwise.
constexpr Plan make_plan(Op op, Problem const& p, Device const& d) {
  int best = -1;
  double best_ns = 0;
  for (int i = 0; i < kRowCount; ++i) {
    if (!supports(kRows[i], op, p, d)) continue;
    double const ns = estimate(kRows[i], op, p, d).ns;
    if (best < 0 || ns < best_ns) {
      best = i;
      best_ns = ns;
    }
  }
  return best < 0 ? Plan{} : plan_row(best, op, p, d);
}

}  // namespace conv2d_ext
