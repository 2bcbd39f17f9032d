// The rows of few outputs in NCHW, beside lanes.h: which of their kernels takes a problem.
#pragma once

#include "copied.h"
#include "lanes.h"
#include "single.h"

namespace conv2d_ext {

enum class LanesRoad { none, single, copied, lanes };
struct LanesChoice {
  LanesRoad road = LanesRoad::none;
  Estimate estimate;
};
constexpr LanesChoice lanes_choice(Op op, Problem const& p) {
  if (takes_single<true>(op, p)) return {LanesRoad::single, single_estimate(op, p)};
  LanesTile const lanes = lanes_tile(op, p, h200_sxm);
  CopiedTile const copied = copied_tile(op, p);
  if (copied.used && (!lanes.used || copied.ns < lanes.ns))
    return {LanesRoad::copied, {copied.ns, op == Op::wgrad ? int(copied.shares) : 1}};
  if (lanes.used) return {LanesRoad::lanes, {lanes.ns, 1}};
  return {};
}

constexpr bool lanes_supports(Row const& row, Problem const& p) {
  return lanes_choice(row.op, p).road != LanesRoad::none;
}

constexpr Estimate lanes_estimate(Row const& row, Problem const& p, Device const& d) {
  LanesChoice const taken = lanes_choice(row.op, p);
  return taken.road == LanesRoad::lanes ? Estimate{lanes_tile(row.op, p, d).ns, 1} : taken.estimate;
}

}  // namespace conv2d_ext
