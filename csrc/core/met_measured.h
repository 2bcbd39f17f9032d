// What depthwise_met.cuh takes beyond the estimates of met.h, by which the launcher chooses tiles. Apart from what
// kernels include, so that a new constant compiles none.
#pragma once

#include "met.h"

namespace conv2d_ext {

// wgrad: of `together` taps of an axis that follow each other, where the first one follows the last, the outputs that
// the one meets that meets most; the mean of all that begin at a tap.
constexpr double met_by_runs(int64_t taps, int64_t together, int64_t outputs, int64_t length, int64_t stride,
                             int64_t dilation, int64_t pad) {
  int64_t met[64] = {};
  for (int64_t tap = 0; tap < taps; ++tap)
    met[tap] = met_products(1, outputs, length, stride, dilation, pad - tap * dilation).most;
  double sum = 0;
  for (int64_t first = 0; first < taps; ++first) {
    int64_t most = 0;
    for (int64_t i = 0; i < together; ++i) most = max64(most, met[(first + i) % taps]);
    sum += double(most);
  }
  return sum / double(taps);
}

// wgrad over NCHW: a warp has several rows of taps, and waits for those that meet most, as along a row
// (8x1440x5x25 to 5760 7x7 d2 437 us, estimated at 184).
constexpr double met_sums_beyond_ns(Problem const& p, Device const& d, MetTile const& t) {
  int64_t const taps = min64(32, kMetSumThreads >> t.parts_log2), together = min64(p.R, (taps + p.S - 1) / p.S);
  if (together <= 1 || p.R > 64) return 0;
  double const mean = met_products(p.R, p.P(), p.H, p.stride_h, p.dilation_h, p.pad_top).mean;
  double const by_runs = met_by_runs(p.R, together, p.P(), p.H, p.stride_h, p.dilation_h, p.pad_top);
  int64_t const columns = met_products(p.S, p.Q(), p.W, p.stride_w, p.dilation_w, p.pad_left).most;
  double const warps = double(t.blocks) * (kMetSumThreads / 32) / d.sm_count;
  double const chunks = double(p.N) * (by_runs - mean) * double(columns) / double(kMetSumChunk << t.parts_log2);
  return 1.1 * warps * (size_of(p.dtype) == 2 ? 38 : 52) * chunks;
}

// fprop and dgrad of groups. Of planes of few pixels neighbours have other filters, which lie apart (1x384x2x2 to 256
// 3x3 s2 in 8 groups 21.1 us, estimated at 11.8). In channels_last those of a warp have other groups, whose inputs lie
// in lines of their own (64x96x32x80 to 3 3x1 in 3 groups 294 us, estimated at 50).
constexpr double met_groups_beyond_ns(Row const& row, Problem const& p, Device const& d, MetTile const& t) {
  bool const backward = row.op == Op::dgrad;
  int64_t const many = backward ? p.K_per_group() : p.C_per_group(), few = backward ? p.C_per_group() : p.K_per_group();
  int64_t const all = backward ? ceil_div(p.R, t.h.step) : p.R, moves = backward ? 1 : p.stride_h;
  double const taps = double(min64(all, t.h.most + ceil_div((t.rows - 1) * moves, t.h.next)) * t.w.most) * double(many);
  if (!is_nhwc(row.variant)) {
    double const plane = double(t.groups) * double(backward ? p.W : p.Q());
    double const lines = double((backward ? p.w.c : p.w.n) * size_of(p.dtype)) / 128;
    return plane < 32 ? 47 * taps * (lines < 1 ? lines : 1.0) / plane : 0;
  }
  double const groups = double(min64(32, ceil_div(32, few)));
  double const share = double(many * size_of(p.dtype)) / 128, lines = groups * (share < 1 ? share : 1.0);
  double const warps = double(t.items) / 32 / d.sm_count;
  return lines <= 2 ? 0 : warps * taps * (lines - 2) * (t.rows == 1 ? 0.7 : 2.7);
}

constexpr double met_beyond_ns(Row const& row, Problem const& p, Device const& d) {
  bool const nhwc = is_nhwc(row.variant);
  if (p.dtype == DType::f64 || (row.op == Op::wgrad ? nhwc : p.C_per_group() == 1)) return 0;  // f64: not timed
  MetTile const t = met_tile(row.op, p, d, nhwc);
  return row.op == Op::wgrad ? met_sums_beyond_ns(p, d, t) : met_groups_beyond_ns(row, p, d, t);
}

// depthwise_met.cuh in channels_last, as measured: filters of many taps lie in few lines of memory (3x8x21x21 9x9 8.1
// us, estimated at 12.0; 94x78x32x32 5x5 D in float16 98, 116).
constexpr Estimate met_as_measured(Row const& row, Problem const& p, Device const& d) {
  Estimate e = met_estimate(row, p, d);
  e.ns += met_beyond_ns(row, p, d);
  bool const sums = row.op == Op::wgrad, half = size_of(p.dtype) == 2, f32 = p.dtype == DType::f32;
  if (p.C_per_group() >
      1) {  // 3x64x25x33 1x1 in 4 groups W 11.2 us, 1x640x7x7 3x3 in 160 F 8.0, estimated at 15.7, 9.6
    bool const few = max64(p.C_per_group(), p.K_per_group()) <= 8;
    if (f32 && (sums ? !is_nhwc(row.variant) && p.R * p.S <= 7 && e.ns > 12000 : few && e.ns < 16000)) e.ns *= 0.9;
    if (!sums && is_nhwc(row.variant) && e.ns > 18000) e.ns *= 1.1;  // 18x12x240x240 1x1 in 6 F 102, 85
    return e;
  }
  // dgrad of several filters a channel, and large filters, in float32 over NCHW (23x192x22x22 to 384 7x7 s(2,1) D 99.4
  // us, estimated at 67.0), fprop in 16-bit types in channels_last (3x992x29x29 11x1 35.7, 25.9).
  if (f32 && !sums && !is_nhwc(row.variant) && e.ns > 15000) {
    if (p.K > p.C && row.op == Op::dgrad && e.ns > 20000) e.ns *= 1.1;
    if (p.K == p.C && p.R * p.S > 25) e.ns *= 1.15;
  }
  if (!is_nhwc(row.variant) || sums) return e;
  bool const small = p.R * p.S >= 49 && p.stride_h == 1 && p.stride_w == 1 && e.ns < 17000;
  bool const large = row.op == Op::dgrad && half && p.R * p.S >= 25;
  if (small || large)
    e.ns = 6000 + (e.ns - 6000) * (small ? 0.7 : 0.87);
  else if (half && row.op == Op::fprop && e.ns > 15000)
    e.ns *= 1.2;
  return e;
}

}  // namespace conv2d_ext
