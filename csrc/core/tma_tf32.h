// tma_tf32.cuh and tma_wgrad_tf32.cuh: what their rows take and cost, and what the launchers share with the planner.
#pragma once

#include <cstdint>

#include "tma.h"

namespace conv2d_ext {

constexpr bool tf32_is_halo(Variant v) { return v == Variant::halo || v == Variant::raw_halo; }
constexpr bool tf32_is_raw(Variant v) { return v == Variant::raw || v == Variant::raw_halo; }

inline constexpr int kTf32Line = 32;  // channels of a line, and of a step

constexpr bool tf32_supports(Row const& row, Problem const& p) {
  bool const forward = row.op == Op::fprop, halo = tf32_is_halo(row.variant);
  if (!p.allow_tf32 || !channel_vectors(p.x, p.x_align, p.C_per_group(), 4, p.dtype) ||
      !channel_vectors(p.w, p.w_align, p.C_per_group(), 4, p.dtype) ||
      !channel_vectors(p.y, p.y_align, p.K_per_group(), 4, p.dtype))
    return false;
  bool const x = map_supports(p.x, p.N, p.H, p.W, p.dtype), y = map_supports(p.y, p.N, p.P(), p.Q(), p.dtype);
  double const taps = double(p.R) * double(p.S);
  if (row.op == Op::wgrad && halo) return p.dilation_w == 1 && wgrad_supports(row, p);
  if (row.op == Op::wgrad)
    return x && y && im2col_supports(walk_h(row.op, p, 0), p.H) && im2col_supports(walk_w(row.op, p, 0), p.W) &&
           double(p.N) * double(p.P()) * double(p.Q()) < 1e11 &&
           taps * double(ceil_div(p.C_per_group(), kTf32Line)) * double(p.K) < 1e9;
  // A step takes a line of channels; those of the next group must not be among them.
  if (p.groups > 1 && (forward ? p.C_per_group() : p.K_per_group()) % kTf32Line != 0) return false;
  if (!(forward ? x : y) || !map_supports(p.w, p.K, p.R, p.S, p.dtype)) return false;
  int64_t const phases_h = forward ? 1 : phases_of(p.H, p.stride_h),
                phases_w = forward ? 1 : phases_of(p.W, p.stride_w);
  if (phases_h * phases_w > kMaxPhases) return false;
  bool shared = false;
  for (int64_t i = 0; i < phases_h; ++i)
    for (int64_t j = 0; j < phases_w; ++j) {
      Walk const h = walk_h(row.op, p, i);
      Walk w = walk_w(row.op, p, j);
      if (h.taps == 0 || w.taps == 0) continue;
      if (!im2col_supports(h, forward ? p.H : p.P())) return false;
      if (halo) {
        if (w.stride != 1 || (w.taps - 1) * w.tap_stride > kHalo) return false;
        shared = shared || w.taps > 1;
        w = halo_walk(w);
      }
      if (!im2col_supports(w, forward ? p.W : p.Q())) return false;
    }
  if (halo && !shared) return false;
  // Tiles and steps are counted in 32 bits.
  Gemm const g = gemm_of(row.op, p);
  double const pixels = double(g.M) * (halo ? double(p.S * p.dilation_w + 1) : 1.0);
  return (pixels / row.tile_m + 2) * double(ceil_div(g.N, row.tile_n)) * double(g.batches) < 1e6 * 500 &&
         double(g.depth) < 1e9;
}

// Blocks that an SM runs, and the device.
constexpr int tf32_blocks(int tile_m, int tile_n) { return tile_m * tile_n <= 128 * 64 ? 2 : 1; }
constexpr int64_t tf32_slots(Row const& row, Device const& d) {
  return d.sm_count * (row.op == Op::wgrad ? 1 : tf32_blocks(row.tile_m, row.tile_n));
}

// Tiles of all phases.
constexpr int64_t tf32_tiles(Row const& row, Problem const& p) {
  Op const op = row.op;
  if (op == Op::wgrad)
    return ceil_div(p.R * p.S * ceil_div(p.C_per_group(), kTf32Line), row.tile_m / kTf32Line) *
           ceil_div(p.K_per_group(), row.tile_n) * p.groups;
  int64_t const phases_h = op == Op::fprop ? 1 : phases_of(p.H, p.stride_h),
                phases_w = op == Op::fprop ? 1 : phases_of(p.W, p.stride_w);
  int64_t const N = op == Op::fprop ? p.K_per_group() : p.C_per_group();
  int64_t tiles = 0;
  for (int64_t i = 0; i < phases_h; ++i)
    for (int64_t j = 0; j < phases_w; ++j) {
      Walk const h = walk_h(op, p, i);
      Walk w = walk_w(op, p, j);
      if (tf32_is_halo(row.variant) && w.taps > 0 && h.taps > 0) w = halo_walk(w);
      tiles += ceil_div(p.N * h.pixels * w.pixels, row.tile_m) * ceil_div(N, row.tile_n) * p.groups;
    }
  return tiles;
}

// Bytes of the filters that the rows but the raw ones round beforehand, the reduction's channels in whole lines.
constexpr int64_t tf32_prepared_bytes(Row const& row, Op op, Problem const& p) {
  if (op == Op::wgrad || tf32_is_raw(row.variant)) return 0;
  int64_t const rows = op == Op::fprop ? p.K : p.C, depth = op == Op::fprop ? p.C_per_group() : p.K_per_group();
  return rows * p.R * p.S * ceil_div(depth, kTf32Line) * kTf32Line * 4;
}

// Tiles that are not split: all, or whole rounds of the blocks that run at a time. A split shares out the rest, so that
// the last round is as full as the others.
constexpr int64_t tf32_whole(int64_t tiles, int split, int64_t slots) {
  return split == 1 ? tiles : tiles - tiles % slots;
}

constexpr int64_t tf32_workspace_bytes(Row const& row, Op op, Problem const& p, int split_k, Device const& d) {
  if (op == Op::wgrad && tf32_is_halo(row.variant))
    return wgrad_shares(wgrad_tiles(row, p), split_k).partial() * row.tile_m * row.tile_n * 4;
  int64_t const tiles = split_k == 1 ? 0 : tf32_tiles(row, p);
  int64_t const whole = op == Op::wgrad ? 0 : tf32_whole(tiles, split_k, tf32_slots(row, d));
  return (tiles - whole) * split_k * row.tile_m * row.tile_n * 4 + tf32_prepared_bytes(row, op, p);
}

// The constants below were fitted to times of the rows (docs/tuning.md): the model is off by a tenth, wgrad's by half
// that. Launches count less than was measured, by what SIMT's estimates leave out, for they are compared with those.

// What the tensors themselves take, in bytes a nanosecond.
constexpr double tf32_memory_ns(Problem const& p, double rate) {
  double const x = double(p.N) * double(p.C) * double(p.H) * double(p.W),
               y = double(p.N) * double(p.K) * double(p.P()) * double(p.Q()),
               w = double(p.K) * double(p.C_per_group()) * double(p.R) * double(p.S);
  return (x + y + w) * 4 / rate;
}

// A step takes the longest of three: the multiplications, the lines of shared memory that are read or written, one a
// cycle, and the lines that L2 delivers. All in cycles.
constexpr double tf32_step_ns(double multiply, double lines, double copied) {
  double const most = multiply > lines ? multiply : lines;
  return (most > copied ? most : copied) / 1.755;
}

// fprop and dgrad. A tile's lines: wgmma reads B for each 64 rows, A is loaded to registers, both are copied; the raw
// variants read and write B once more.
constexpr Estimate tf32_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  bool const halo = tf32_is_halo(row.variant), raw = tf32_is_raw(row.variant), forward = op == Op::fprop;
  double const TM = row.tile_m, TN = row.tile_n;
  int64_t const C = forward ? p.C_per_group() : p.K_per_group(), N = forward ? p.K_per_group() : p.C_per_group();
  int64_t const slots = tf32_slots(row, d);
  bool const two = slots > d.sm_count;  // blocks an SM
  int64_t const phases_h = forward ? 1 : phases_of(p.H, p.stride_h),
                phases_w = forward ? 1 : phases_of(p.W, p.stride_w);
  int64_t tiles = 0, most = 0;
  double whole = 0, longest = 0;  // ns of all tiles, of one
  for (int64_t i = 0; i < phases_h; ++i)
    for (int64_t j = 0; j < phases_w; ++j) {
      Walk const h = walk_h(op, p, i);
      Walk w = walk_w(op, p, j);
      if (halo && h.taps > 0 && w.taps > 0) w = halo_walk(w);
      int64_t const t = ceil_div(p.N * h.pixels * w.pixels, row.tile_m) * ceil_div(N, row.tile_n) * p.groups;
      int64_t const steps = h.taps * w.taps * ceil_div(C, kTf32Line);
      double const copied = (halo && w.taps > 0 ? (TM + kHalo) / double(w.taps) : TM) + TN;
      double const lines = TM / 64 * TN + TM + copied + (raw ? 2 * TN : 0);
      double const ns = double(steps) * tf32_step_ns(TM * TN / 32 * 1.16, lines * 1.17, copied * 3.09) * (two ? 2 : 1);
      tiles += t;
      if (steps > most) most = steps;
      if (ns > longest) longest = ns;
      whole += double(t) * ns;
    }
  double const fixed = (1330 + 0.1 * TM * TN) * (two ? 0.82 : 1);  // of a tile
  double const filters = double(p.K) * double(p.C_per_group()) * double(p.R) * double(p.S) * 4;
  double const before = 1500 + (raw ? 0 : 1000 + filters * 2 / 2300), memory_ns = tf32_memory_ns(p, 4100);
  auto with = [&](int64_t split) {
    int64_t const unsplit = tf32_whole(tiles, int(split), slots), parts = (tiles - unsplit) * split;
    double ns = 0;
    if (split > 1) {
      double const mean = whole / double(tiles), share = double(ceil_div(most, split)) / double(most);
      ns = double(unsplit / slots) * (mean + fixed) + double(ceil_div(parts, slots)) * (mean * share + fixed) + 4600 +
           double(parts) * TM * TN * 8 / 10300;
    } else if (phases_h * phases_w == 1) {
      ns = double(ceil_div(tiles, slots)) * (longest + fixed);
    } else {  // no less than an even share
      double const share = (whole + double(tiles) * fixed) / double(slots) + longest * 0.21;
      ns = share > longest + fixed ? share : longest + fixed;
    }
    return (ns > memory_ns ? ns : memory_ns) + before;
  };
  Estimate best{with(1), 1};
  int64_t const rest = tiles % slots;
  for (int64_t rounds = 1; rounds <= 2 && rest > 0; ++rounds) {  // of the parts of the rest
    int64_t const split = min64(rounds * slots / rest, most / 2);
    if (split < 2 || double(rest * split) * TM * TN * 4 > double(kMaxWorkspaceBytes)) continue;
    double const ns = with(split);
    if (ns < best.ns) best = {ns, int(split)};
  }
  return best;
}

// Pixels that are added up in one chain, if the workspace allows. The tensor cores cut off the lowest bits of what they
// add: an error of 2.3e-9 a pixel for random data, here at most 2e-5.
inline constexpr int64_t kTf32Pixels = 8192;

// wgrad's halo. Lines of a step: each run's x is copied and loaded, y copied, read, and written for two sets of taps, and
// wgmma reads that for each run.
constexpr Estimate tf32_wgrad_halo_estimate(Row const& row, Problem const& p, Device const& d) {
  double const x = 3 * 64, y = 2 * 34, columns = 3 * 64, copied = x + y;
  double const lines = copied + x + y + 128 + 3 * columns;
  double const step_ns = tf32_step_ns(3 * 64 * columns / 32.0 * 1.2, lines * 1.1, copied * 3.22);
  return wgrad_shared_estimate(row, wgrad_tiles(row, p), d.sm_count, step_ns, 200 + 0.15 * row.tile_m * row.tile_n,
                               tf32_memory_ns(p, 3600));
}

// wgrad. A tile's lines: wgmma reads the turned B for each 64 rows; A and B are copied and read, B is written again.
constexpr Estimate tf32_wgrad_estimate(Row const& row, Problem const& p, Device const& d) {
  if (tf32_is_halo(row.variant)) return tf32_wgrad_halo_estimate(row, p, d);
  double const TM = row.tile_m, TN = row.tile_n;
  int64_t const tiles = tf32_tiles(row, p), pixels = p.N * p.P() * p.Q(), steps = ceil_div(pixels, 32);
  int64_t const rows = p.R * p.S * ceil_div(p.C_per_group(), kTf32Line) * kTf32Line;
  double const copied = double(min64(row.tile_m, rows)) + TN, lines = TM / 64 * TN + TM + copied + 2 * TN;
  double const step_ns = tf32_step_ns(TM * TN / 32 * 1.37, lines, copied * 3.22), fixed = 200 + 0.15 * TM * TN;
  double const memory_ns = tf32_memory_ns(p, 3600), tile_bytes = TM * TN * 4;
  int64_t const least =
      min64(ceil_div(pixels, kTf32Pixels), int64_t(double(kMaxWorkspaceBytes) / tile_bytes) / max64(tiles, 1));
  auto with = [&](int64_t split) {
    double ns = double(ceil_div(tiles * split, d.sm_count)) * (double(ceil_div(steps, split)) * step_ns + fixed);
    if (split > 1) ns += 5100 + double(tiles * split) * tile_bytes * 2 / 12500;
    return (ns > memory_ns ? ns + memory_ns / 10 : memory_ns + ns / 10) + 1000;
  };
  Estimate best{with(max64(least, 1)), int(max64(least, 1))};
  int64_t const first = ceil_div(max64(least, 1) * tiles, d.sm_count);
  for (int64_t rounds = first; rounds < first + 5 && tiles > 0; ++rounds) {
    int64_t const split = min64(rounds * d.sm_count / tiles, steps / 2);
    if (split < max64(least, 2) || double(tiles * split) * tile_bytes > double(kMaxWorkspaceBytes)) continue;
    double const ns = with(split);
    if (ns < best.ns) best = {ns, int(split)};
  }
  return best;
}

}  // namespace conv2d_ext
