// depthwise.cuh and depthwise_any.cuh: what their rows take and cost; what all rows for stride 1 and K == C share.
#pragma once

#include <cstdint>

#include "row.h"

namespace conv2d_ext {

// By rows in NCHW that are made for one: more would take many launches, or one sum of all products (dgrad).
inline constexpr int64_t kMostFiltersAChannel = 8;

// channels_last: where the last slice of `channels` begins. The copy engine is slow with boxes that end behind the
// channels; where that is worth making some twice, the slice ends with them.
constexpr int last_slice(Op op, int64_t C, int channels) {
  int64_t const rest = C % channels;
  return int(C > channels && (op == Op::wgrad || 2 * rest >= channels) ? C - channels : C / channels * channels);
}
static_assert(last_slice(Op::wgrad, 72, 32) == 40 && last_slice(Op::fprop, 72, 32) == 64);
static_assert(last_slice(Op::fprop, 144, 32) == 112 && last_slice(Op::wgrad, 24, 32) == 0);

// dgrad with stride 2 by cuda/depthwise_spread.cuh.
constexpr int spread_pairs(int R) { return R == 3 ? 2 : 3; }
constexpr int64_t spread_threads(Problem const& p) {
  return p.N * p.C * ceil_div(p.W, 4) * ceil_div(ceil_div(p.H, 2), spread_pairs(int(p.R)));
}
constexpr bool spreads(Problem const& p) {
  return p.dtype == DType::f32 && p.K == p.C && p.R == p.S && (p.R == 3 || p.R == 5) && p.stride_h == 2 &&
         p.stride_w == 2 && p.dilation_h == 1 && p.dilation_w == 1 && (p.pad_top - p.pad_left) % 2 == 0 &&
         double(p.N) * double(p.C) * double(p.H + 8) * double(p.W + 4) < 8e9;
}

constexpr bool depthwise_supports(Row const& row, Problem const& p) {
  if (p.C_per_group() != 1 || p.K == 0 || p.H == 0 || p.W == 0) return false;
  if (is_nhwc(row.variant)) {
    if ((p.C > 1 && p.x.c != 1) || (p.K > 1 && p.y.c != 1)) return false;
  } else {
    if ((p.W > 1 && p.x.w != 1) || (p.Q() > 1 && p.y.w != 1)) return false;
  }
  // Coordinates of padded images, and numbers of taps, are int in the kernels.
  constexpr int64_t most = int64_t(1) << 30;
  if (p.H + p.pad_top + p.pad_bottom > most || p.W + p.pad_left + p.pad_right > most) return false;
  if (double(p.R) * double(p.S) * double(p.K_per_group()) > double(most)) return false;
  if (row.tile_m == 0) return true;
  if (row.op == Op::dgrad && row.tile_k == 2) return p.R == row.tile_m && spreads(p);
  bool const rows = p.R == row.tile_m && p.stride_h == row.tile_k && p.dilation_h == 1;
  bool const columns = p.S == row.tile_n && p.stride_w == row.tile_k && p.dilation_w == 1;
  // A block has at least 4 x 4 outputs of a channel; the grid must hold the blocks.
  double const pixels = double(max64(p.H, p.P()) + 3) * double(max64(p.W, p.Q()) + 3);
  return p.K == p.C && rows && columns && double(p.N) * double(p.C) * pixels / 16 < double(most);
}

// One filter size: what narrow copies and stores of rows off 16 bytes cost, and small images, was measured.
constexpr double depthwise_nchw_ns(Row const& row, Op op, Problem const& p, double memory_ns, double fma_ns) {
  auto bytes_of = [&](Strides const& s, int align) {
    int bytes = align < 16 ? align : 16;
    while (bytes > 4 && (s.n * 4 % bytes != 0 || s.c * 4 % bytes != 0 || s.h * 4 % bytes != 0)) bytes /= 2;
    return bytes;
  };
  if (op == Op::dgrad && row.tile_k == 2)
    return 6500 + memory_ns * 1.04 * (p.R == 5 ? 1.25 : 1.0) * (bytes_of(p.x, p.x_align) < 16 ? 1.15 : 1.0) *
                      (p.W <= 16   ? 1.3
                       : p.W <= 32 ? 1.13
                                   : 1.0);
  int const x = bytes_of(p.x, p.x_align), y = bytes_of(p.y, p.y_align), bytes = x < y ? x : y;
  double narrow = bytes >= 16 ? 1.0 : bytes >= 8 ? 1.7 : 1.9;
  int64_t const width = max64(p.W, p.Q());
  if (width <= 16) narrow *= width <= 8 ? 3.7 : 1.9;
  double const slower = row.tile_m == 7 ? 1.1 : 1.0;
  // Small images: the latency of copies that no other work of the block hides.
  double const latency = width <= 16 ? 8000 : 7000;
  return latency + overlapped(memory_ns * 3500 / 4000 * narrow, fma_ns) * slower;
}

// Rows for any filter: a warp's steps one after the other, each with its instructions and a wait for its loads, which
// the SM's other warps hide; as measured. A step is a row of taps of fprop and dgrad, for 128 outputs, and for wgrad 32
// pixels with nine taps.
constexpr Estimate depthwise_any_estimate(Op op, Problem const& p, Device const& d) {
  double const elements =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  double const memory_ns = elements * size_of(p.dtype) / 2500 * 132 / d.sm_count;
  auto ns = [&](double warps, double steps, double instructions, double wait_ns) {
    double const issue_ns = warps * steps * instructions / (4.2 * d.sm_count);
    double const rounds = warps / (16.0 * d.sm_count), waits_ns = steps * wait_ns * (rounds < 1 ? 1.0 : rounds);
    double const most = issue_ns > waits_ns ? issue_ns : waits_ns;
    double const begin = op == Op::fprop ? 5800 : op == Op::dgrad ? 8500 : 7500;
    return begin + (most > memory_ns ? most : memory_ns) * (p.dtype == DType::f64 ? 2.0 : 1.0);
  };
  if (op == Op::wgrad) {
    double const taps = double(p.R) * double(p.S), units = double(p.K) * double(ceil_div(p.R * p.S, 9));
    double const pixels = double(p.N) * double(p.P()) * double(p.Q());
    int const acc_bytes = p.dtype == DType::f64 ? 8 : 4;
    // The registers of an SM hold 16 warps, in blocks of up to eight for different taps.
    int64_t const block = min64(8, ceil_div(p.R * p.S, 9)), together = 16 / block;
    double split = double(together * d.sm_count) / double(max64(p.K * ceil_div(p.R * p.S, 9 * block), 1));
    split = split < pixels / 128 ? split : pixels / 128;
    double const room = double(kMaxWorkspaceBytes) / double(max64(p.K * p.R * p.S, 1) * acc_bytes);
    split = split < room ? split : room;
    Estimate e{0, split < 2 ? 1 : split > 4096 ? 4096 : int(split)};
    e.ns = ns(units * e.split_k, pixels / 32 / e.split_k + 4, 220, 900);
    if (e.split_k > 1) e.ns += 3000 + double(p.K) * taps * acc_bytes * e.split_k * 2 / 2500;
    return e;
  }
  bool const backward = op == Op::dgrad, phases = backward && (p.stride_h > 1 || p.stride_w > 1);
  double const outputs = backward ? double(p.H) * double(p.W) : double(p.P()) * double(p.Q());
  double const planes = double(p.N) * double(backward ? p.C : p.K);
  double const warps = planes * double(ceil_div(int64_t(outputs), 128));
  auto met = [&](int64_t taps, int64_t stride, int64_t dilation) {
    return ceil_div(taps, backward ? stride / gcd64(stride, dilation) : 1);
  };
  double const rows = double(met(p.R, p.stride_h, p.dilation_h)) * double(backward ? p.K_per_group() : 1);
  double const columns = double(met(p.S, p.stride_w, p.dilation_w));
  double const start = phases     ? 1400.0 + 40 * double(p.stride_h + p.stride_w)  // instructions of a thread
                       : backward ? 850.0
                                  : 650.0;
  double const row = backward && !phases ? 55 : 40, column = phases ? 60 : backward ? 36 : 26;
  return {ns(warps, rows, (rows > 0 ? start / rows : 0) + row + column * columns, 550 + (phases ? 150 : 60) * columns),
          1};
}

// Rows in NCHW for one filter size: the slower of memory and multiply-adds.
constexpr Estimate depthwise_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  double const sms = double(d.sm_count) / 132;
  double const elements =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  double const memory_ns = elements * size_of(p.dtype) / (3500 * sms), fma_ns = p.flops() / 2 / (17000 * sms);
  return {depthwise_nchw_ns(row, op, p, memory_ns, fma_ns), 1};
}

// Taps of a row or column that the rows for stride 1 take.
inline constexpr int kBandMaxTaps = 127;

// Depthwise rows for stride 1 and K == C: what they have in common.
constexpr bool unit_stride_depthwise(Row const& row, Problem const& p) {
  if (p.C_per_group() != 1 || p.K != p.C || p.R > kBandMaxTaps || p.S > kBandMaxTaps) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.N == 0 || p.C == 0 || p.H == 0 || p.W == 0 || p.P() == 0 || p.Q() == 0) return false;
  bool const nhwc = is_nhwc(row.variant);
  if (nhwc ? p.C > 1 && (p.x.c != 1 || p.y.c != 1) : (p.W > 1 && p.x.w != 1) || (p.Q() > 1 && p.y.w != 1)) return false;
  constexpr int64_t most = int64_t(1) << 29;
  return p.H + p.pad_top + p.pad_bottom <= most && p.W + p.pad_left + p.pad_right <= most;
}

// One sum a weight and split.
constexpr int64_t depthwise_workspace_bytes(Problem const& p, int split_k) {
  return split_k == 1 ? 0 : p.K * p.R * p.S * split_k * (p.dtype == DType::f64 ? 8 : 4);
}

// The least time of memory at the rate of large layers.
constexpr double walk_memory_ns(Problem const& p, Device const& d) {
  double const elements =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  return elements * size_of(p.dtype) / (3300.0 * d.sm_count / 132);
}

}  // namespace conv2d_ext
