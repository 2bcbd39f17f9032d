// Depthwise rows of NCHW that run a problem of several filters a channel in turns.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

// Rows of NCHW that take one filter a channel run K = m * C in m turns, each with every m-th filter: fprop and wgrad.
constexpr int64_t depthwise_turns(Row const& row, Problem const& p) {
  bool const one_filter = (row.family == Family::depthwise && row.tile_m > 0) || row.family == Family::stream ||
                          row.family == Family::strip || row.family == Family::band;
  bool const several = p.C_per_group() == 1 && p.K_per_group() > 1 && p.K_per_group() <= kMostFiltersAChannel;
  return one_filter && !is_nhwc(row.variant) && row.op != Op::dgrad && several ? p.K_per_group() : 1;
}

// The first turn's problem. Another begins so many filters on in w and y; none is aligned better than that allows.
constexpr Problem depthwise_turn(Row const& row, Problem p) {
  int64_t const turns = depthwise_turns(row, p);
  if (turns == 1) return p;
  auto aligned = [&](int align, int64_t step) {
    while (step * size_of(p.dtype) % align != 0) align /= 2;
    return align;
  };
  p.w_align = aligned(p.w_align, p.w.n), p.y_align = aligned(p.y_align, p.y.c);
  p.K /= turns, p.w.n *= turns, p.y.c *= turns;
  return p;
}

// wgrad of several filters a channel: the share of a turn that later ones do without. They find in L2 what the first
// one has read, and begin while the one before ends (11x48x80x80 to 192 1x3 49.4 us, estimated at 82.9 as four alike).
constexpr double sums_turn_share(Row const& row, Problem const& p) {
  double const elements =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  if (p.C >= 800)  // 69x1163x6x6 to 4652 5x5 90.7 us, estimated at 55.5
    return row.family == Family::stream && size_of(p.dtype) == 2 ? -0.4 : 0;
  if (elements * size_of(p.dtype) > 70e6) return 0;
  if (row.family == Family::band) return 0.35;
  if (row.family == Family::strip) return 0.4;
  return row.family == Family::stream ? (row.tile_m == 5 ? 0.15 : 0.45) : 0;
}

}  // namespace conv2d_ext
