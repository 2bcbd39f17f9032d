// grouped_planes.cuh, grouped_planes_wgrad.cuh and grouped_turned.cuh, as measured: what their blocks take for a tile.
// Apart from what kernels include, so that a new constant compiles none.
#pragma once

#include "turned.h"

namespace conv2d_ext {

// ns for the instructions of a step, by 16 columns and 32 bytes of channels of a warpgroup; for its filters of 8 KiB;
// until one that is asked for is there. Then of results: of rows of odd length, whose elements are stored one by one.
struct PlaneRates {
  double begin, product, filter, latency, odd_input, odd_result;
};
constexpr double plane_steps_ns(PlaneRates const& e, double steps, double pieces, int64_t members, int64_t stages) {
  double const each = e.product * pieces + e.filter * double(members), least = e.latency / double(stages);
  return steps * (each > least ? each : least);
}
constexpr double plane_odd_ns(PlaneRates const& e, Op op, Problem const& p) {
  bool const backward = op == Op::dgrad;
  double const x = double(p.N) * double(p.C) * double(p.H) * double(p.W),
               y = double(p.N) * double(p.K) * double(p.P()) * double(p.Q());
  return ((backward ? p.Q() : p.W) % 2 != 0 ? (x + y) * e.odd_input : 0) +
         ((backward ? p.W : p.Q()) % 2 != 0 ? (backward ? x : y) * e.odd_result : 0);
}

// As measured beside other rows.
inline constexpr double kPlanesBeside = 0.93, kPlaneSumsBeside = 0.95, kTurnedFloatsBeside = 1.05;

// wgrad: tiles one after the other, each turned, then multiplied. Fitted to 231 times.
constexpr Estimate plane_sums_estimate(Problem const& p, Device const& d) {
  PlaneSums const t = plane_sums(p, d);
  double const C = double(min64(p.C_per_group(), 64)), K = double(min64(p.K_per_group(), 64));
  auto turned = [](int64_t pixels, double channels, int64_t row) {
    return double(pixels) * channels * (row % 2 != 0 ? 0.0891 : 0.0761);
  };
  double const products = double(t.pixels / 16) * (plane_sums_joined(p) ? 71 : 8 * double(p.R * p.S));
  double const work = 3047 + products + turned(t.x_pixels, C, p.W) + turned(t.y_pixels, K, p.Q());
  double const each = larger_of(work, double(t.x_raw + t.y_raw) / 13);
  int64_t const blocks = t.units * t.splits;
  return {kPlaneSumsBeside *
              (10800 + double(ceil_div(blocks, d.sm_count)) * (double(ceil_div(t.tiles, t.splits)) * each + 1300) +
               double(blocks * p.R * p.S) * 64 * 64 * 4 * 0.000578),
          1};
}

// Two teams hide what the other waits for; all else of a tile follows each other. Fitted to 537 times.
constexpr Estimate planes_estimate(Op op, Problem const& p, Device const& d) {
  if (op == Op::wgrad) return plane_sums_estimate(p, d);
  constexpr PlaneRates e{8865, 2.16, 117, 1279, 0.000066, 0.000365};
  PlaneTile const t = plane_tile(op, p, d);
  int64_t const in = op == Op::dgrad ? p.K_per_group() : p.C_per_group(), chunks = ceil_div(in, kPlaneChannels);
  double const pieces = double(ceil_div(in, 16)) / double(chunks) * double(t.columns * t.groups) / 8;
  double const products = plane_steps_ns(e, double(chunks * p.R * p.S), pieces, t.members(), t.stages);
  double const others = 1395 * double(chunks) + 0.048 * double(t.members() * t.out_bytes);
  double const alone = products / double(t.teams) + others;
  double const each = t.teams == 2 ? larger_of(products, alone) + 0.6 * (products < others ? products : others) : alone;
  double const beside = kPlanesBeside * (p.stride_w == 1 && p.R * p.S > 1 && in >= 48 && in < 192 ? 0.93 : 1);
  double const elements = double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P() * p.Q()));
  return {beside * (e.begin + 1200 + double(ceil_div(t.tiles, d.sm_count)) * each + 419 * double(chunks) +
                    plane_odd_ns(e, op, p) + double(planes_workspace_bytes(op, p, d)) * 0.0008 + elements * 0.0006),
          1};
}

// Two warpgroups multiply one tile while the next is turned. Fitted to 750 times.
constexpr Estimate turned_estimate(Op op, Problem const& p, Device const& d) {
  // turn: a byte; chunk: 128 bytes of channels of a tile; store: a column of a pass; result: an element.
  struct Rates {
    PlaneRates of;
    double turn, chunk, store, result;
  };
  constexpr Rates rates[2][2] = {{{{9675, 5.45, 19, 803, 0.000681, 0.001898}, 0.0291, 478, 0.4, 0.001004},
                                  {{10017, 5.14, 24, 690, 0.000372, 0.003009}, 0.0016, 164, 7.03, 0.001275}},
                                 {{{9071, 3.86, 61, 952, 0.000018, 0.000868}, 0.0214, 531, 0.11, 0.001468},
                                  {{8419, 2.46, 112, 1212, 0.000014, 0.001712}, 0.0005, 761, 0.05, 0.002166}}};
  bool const backward = op == Op::dgrad;
  Rates const& e = rates[p.dtype == DType::f32][backward];
  TurnedTile const t = turned_tile(op, p, d);
  int64_t const in = backward ? p.K_per_group() : p.C_per_group(), chunks = ceil_div(in, turned_line(p.dtype));
  double const pieces = double(ceil_div(in * size_of(p.dtype), 32)) / double(chunks) * double(t.columns) / 8;
  double const products = plane_steps_ns(e.of, double(chunks * p.R * p.S), pieces, t.members(), t.stages);
  double const turns = double(chunks * t.passes * t.subs),
               turn = turns * (e.turn * double(t.in_pixels * kTurnedLine) + e.chunk);
  double const each = larger_of(products, turn) + (products < turn ? products : turn) / 2 +
                      e.store * double(t.columns * t.phases_w * t.passes);
  double const results =
      double(p.N) * (backward ? double(p.C) * double(p.H) * double(p.W) : double(p.K) * double(p.P() * p.Q()));
  // dgrad with strides of 48 to 64 channels a group: not understood.
  bool const waits =
      backward && p.dtype != DType::f32 && p.stride_w > 1 && p.dilation_w == 1 && in >= 48 && t.subs == 2;
  // As measured beside other rows: strides, single taps.
  bool const f32 = p.dtype == DType::f32, strided = p.stride_w > 1, many = strided && in >= 48;
  double const more = backward && many && p.Q() <= 14             ? (f32 ? 1.4 : 1.25)
                      : p.R * p.S == 1 && (!f32 || in >= 128)     ? 1.3
                      : f32                                       ? 1
                      : many && !backward                         ? 1.15
                      : backward && strided && in > 16 && in < 32 ? 0.82
                                                                  : 1;
  return {(f32 ? kTurnedFloatsBeside : kPlanesBeside * (waits ? 1.15 : 1)) * more *
              (e.of.begin + (f32 ? 0 : 1200) + double(ceil_div(t.tiles, d.sm_count)) * each + e.result * results +
               plane_odd_ns(e.of, op, p) + double(turned_workspace_bytes(op, p)) * 0.0006),
          1};
}

}  // namespace conv2d_ext
