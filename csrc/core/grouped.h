// grouped.cuh and grouped_wgrad.cuh: how groups share a product, what their rows take and cost.
#pragma once

#include <cstdint>

#include "row.h"

namespace conv2d_ext {

// The least number of groups whose channels and filters are multiples of 8 each.
constexpr int64_t groups_per_unit(Problem const& p) {
  return max64(8 / gcd64(8, p.C_per_group()), 8 / gcd64(8, p.K_per_group()));
}

// How many blocks of 8 outputs a warp computes from the same fragments of the inputs: those of a unit, up to four, or
// two of f32, whose fragments take more registers.
constexpr int grouped_shared_blocks(int64_t blocks, DType t) {
  int64_t const most = t == DType::f32 ? 2 : 4;
  return int(blocks <= most ? blocks : most == 4 && (blocks <= 6 || blocks == 9) ? 3 : most);
}

// wgrad of grouped.cuh. A half is a tap and 16 bytes of channels; a warp sums so many of them, of up to four blocks of
// 8 filters, over a share of the pixels: as many as its registers hold.
constexpr int grouped_halves(int together, DType t) { return t == DType::f32 ? 16 : together == 4 ? 8 : 10; }
struct GroupedSums {
  int64_t slab, together, n_groups, chunks, items, shares;
};
constexpr GroupedSums grouped_sums(Problem const& p) {
  int64_t const wide = size_of(p.dtype) / 2, per_unit = groups_per_unit(p);
  int64_t const C = per_unit * p.C_per_group() / 8 * wide, K = per_unit * p.K_per_group() / 8;
  int64_t const slab = min64(ceil_div(p.groups, per_unit), max64(1, 8 / max64(C, K * wide)));
  int const together = p.dtype == DType::f32 ? 1 : grouped_shared_blocks(K, p.dtype);
  int64_t const n_groups = ceil_div(K, together);
  int64_t const chunks = ceil_div(C * p.R * p.S, grouped_halves(together, p.dtype)), items = slab * n_groups * chunks;
  return {slab, together, n_groups, chunks, items, max64(1, 8 / items)};
}

constexpr bool grouped_supports(Row const& row, Op op, Problem const& p) {
  if (p.groups == 1 || p.C_per_group() < 2 || p.K == 0 || p.H == 0 || p.W == 0 || p.N == 0) return false;
  int const slot = 16 / size_of(p.dtype);  // channels that are copied at once
  if (row.variant == Variant::nhwc &&
      (p.C % 8 != 0 || p.K % 8 != 0 || !channel_vectors(p.x, p.x_align, p.C, slot, p.dtype) ||
       !channel_vectors(p.y, p.y_align, p.K, slot, p.dtype)))
    return false;
  if (p.R * p.S > 64 || p.stride_h > 4 || p.stride_w > 4 || p.R > 64 || p.S > 64) return false;
  // Coordinates of padded images are int in the kernels, and so is the number of tiles of 8 x 8 pixels.
  constexpr int64_t most = int64_t(1) << 30;
  if (p.H + p.pad_top + p.pad_bottom > most || p.W + p.pad_left + p.pad_right > most) return false;
  int64_t const out_h = op == Op::dgrad ? ceil_div(p.H, p.stride_h) : p.P();
  int64_t const out_w = op == Op::dgrad ? ceil_div(p.W, p.stride_w) : p.Q();
  if (double(p.N) * double(ceil_div(out_h, 8)) * double(ceil_div(out_w, 8)) >= double(most)) return false;
  // Shared memory must hold a tile of 8 x 8 outputs of one unit with its halo, and the filters.
  int64_t const per_unit = groups_per_unit(p), C = per_unit * p.C_per_group() / 8, K = per_unit * p.K_per_group() / 8;
  if (C > 16 || K > 16 || ceil_div(p.groups, per_unit) > 65535) return false;
  if (p.dilation_h > 64 || p.dilation_w > 64) return false;
  bool const backward = op == Op::dgrad;
  int64_t const step_h = backward ? 1 : p.stride_h, step_w = backward ? 1 : p.stride_w;
  int64_t const halo_h = 7 * step_h + (p.R - 1) * p.dilation_h / (backward ? p.stride_h : 1) + 2;
  int64_t const halo_w = 7 * step_w + (p.S - 1) * p.dilation_w / (backward ? p.stride_w : 1) + 2 + step_w;
  // Blocks of 16 bytes of inputs; f32's filters are kept in two parts.
  int64_t const wide = size_of(p.dtype) / 2, ins = (backward ? K : C) * wide, outs = backward ? C : K;
  if (op == Op::wgrad)
    return ((halo_h * halo_w + 16) * ins + 80 * (K * wide + 4)) * 16 + ins * p.R * p.S * 4 <= 220 * 1024;
  int64_t const together = grouped_shared_blocks(outs, p.dtype), taps = p.R == 3 && p.S == 3 ? 12 : p.R * p.S;
  int64_t const halves = taps * ins + 16, filters = halves * ceil_div(outs, together) * together * 128 * wide;
  return (halo_h * halo_w + 16) * 16 * ins + filters + halves * 16 <= 220 * 1024;
}

// Grouped: reading and writing, and the products of whole blocks and squares, which overlap in part (docs/tuning.md).
constexpr Estimate grouped_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  bool const nhwc = row.variant == Variant::nhwc, backward = op == Op::dgrad, sums = op == Op::wgrad;
  double const sms = double(d.sm_count) / 132;
  double const elements =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  // Bytes per ns. nchw: lanes go along rows, and channels_last rows are slow that way; so are a stride's single pixels.
  double rate = nhwc ? 1650 : p.x.c == 1 && p.C > 1 ? 500 : 1150;
  if (!nhwc && backward && p.stride_w > 1) rate /= 6;
  double const memory_ns = elements * size_of(p.dtype) / (rate * sms);
  int64_t const per_unit = groups_per_unit(p), C = per_unit * p.C_per_group() / 8, K = per_unit * p.K_per_group() / 8;
  int64_t const h = backward ? ceil_div(p.H, p.stride_h) : p.P(), w = backward ? ceil_div(p.W, p.stride_w) : p.Q();
  double const squares = double(p.N) * double(ceil_div(h, 8)) * double(ceil_div(w, 8));
  double const products = squares * double(ceil_div(p.groups, per_unit)) * double(C * K) * double(p.R * p.S) * 2;
  double const f32 = p.dtype != DType::f32 ? 1 : p.allow_tf32 ? 2 : 6;  // 8 channels by 8 filters a product, or less
  double const multiply_ns = products * f32 * (sums ? 0.045 : 0.030) / sms;
  double const large = memory_ns > multiply_ns ? memory_ns : multiply_ns;
  double const small = memory_ns > multiply_ns ? multiply_ns : memory_ns;
  double const work_ns = large + small * small / (2 * (large + 1));
  if (!sums) return {work_ns + 13000, 1};
  // As many shares of the pixels as keep two blocks an SM busy, unless adding them up costs more.
  GroupedSums const g = grouped_sums(p);
  int64_t const slabs = ceil_div(ceil_div(p.groups, per_unit), g.slab) * ceil_div(g.items, 16);
  double const share_bytes = double(p.K) * double(p.C_per_group()) * double(p.R * p.S) * 4 * double(g.shares);
  Estimate best{};
  for (int64_t blocks = 1; blocks == 1 || blocks * slabs <= 2 * d.sm_count; blocks += max64(1, blocks / 8)) {
    double const bytes = share_bytes * double(blocks);
    if (blocks > 1 && (bytes > double(kMaxWorkspaceBytes) || double(blocks) > squares / 2)) break;
    double const idle = 2.0 * d.sm_count / double(blocks * slabs);
    double const ns = work_ns * (idle > 1 ? idle : 1) + 16000 + bytes * 2 / 2500;
    if (blocks == 1 || ns < best.ns) best = {ns, int(blocks * g.shares)};
  }
  return best;
}

constexpr int64_t grouped_workspace_bytes(Problem const& p, int split_k) {
  return split_k == 1 ? 0 : p.K * p.C_per_group() * p.R * p.S * split_k * 4;
}

}  // namespace conv2d_ext
