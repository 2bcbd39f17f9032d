// tma_strict.cuh: what its rows take and cost, and what the launcher shares with the planner.
#pragma once

#include <cstdint>

#include "tma.h"

namespace conv2d_ext {

inline constexpr int kStrictLine = 32;  // channels of a step

// Sums of a few products, whose error is that of the split operands, are left to FMA. Asked of a problem as it comes:
// in packed copies channels are padded.
inline constexpr int64_t kStrictLeast = 16;  // channels, dgrad: filters, of a group

constexpr bool strict_is_exact(Op op, Problem const& p) {
  return op == Op::wgrad || (op == Op::fprop ? p.C_per_group() : p.K_per_group()) >= kStrictLeast;
}

// Filters of several taps in the order channel, row, column: the launch that splits them reads them as they lie.
constexpr bool strict_turns_filters(Op op, Problem const& p) {
  return op != Op::wgrad && p.R * p.S > 1 && p.w.c == p.R * p.S && (p.R == 1 || p.w.h == p.S) &&
         (p.S == 1 || p.w.w == 1);
}

constexpr bool strict_supports(Row const& row, Problem p) {
  if (strict_turns_filters(row.op, p)) p.w = channels_last_strides(p.C_per_group(), p.R, p.S), p.w_align = 16;
  return p.dtype == DType::f32 && !p.allow_tf32 && tma_supports(row, p);
}

// Bytes of the split filters: two parts of whole lines.
constexpr int64_t strict_prepared_bytes(Op op, Problem const& p) {
  int64_t const depth = op == Op::fprop ? p.C_per_group() : p.K_per_group(), rows = op == Op::fprop ? p.K : p.C;
  return rows * p.R * p.S * ceil_div(depth, kStrictLine) * kStrictLine * 2 * 4;
}

constexpr int64_t strict_workspace_bytes(Row const& row, Op op, Problem const& p, int split_k) {
  return tma_workspace_bytes(row, p, split_k) + strict_prepared_bytes(op, p);
}

// Rounds of tiles, or memory. Constants fitted to times of the rows (docs/tuning.md): the model is off by a twentieth.
constexpr Estimate strict_estimate(Row const& row, Op op, Problem const& p) {
  bool const forward = op == Op::fprop;
  double const area = double(row.tile_m) * row.tile_n;
  int64_t const C = forward ? p.C_per_group() : p.K_per_group(), N = forward ? p.K_per_group() : p.C_per_group();
  int64_t const slots = tma_slots(row), tiles_n = ceil_div(N, row.tile_n) * p.groups;
  int64_t const phases_h = forward ? 1 : phases_of(p.H, p.stride_h),
                phases_w = forward ? 1 : phases_of(p.W, p.stride_w), phases = phases_h * phases_w;
  // Instructions of the last channels are left out in pairs.
  bool const half = C % kStrictLine != 0 && C % kStrictLine <= kStrictLine / 2;
  double const chunks = double(ceil_div(C, kStrictLine)), filled = half ? (chunks - 0.26) / chunks : 1;
  double const step_ns = (row.tile_n == 128  ? 901
                          : row.tile_n == 64 ? 617
                                             : 464) *
                         filled,
               fixed = row.tile_n == 128  ? 2310
                       : row.tile_n == 64 ? 1610
                                          : 1390;
  int64_t const tiles = tma_tiles(row, p);
  int64_t most = 1;
  double whole = 0, empty = double(tiles);
  for (int64_t i = 0; i < phases_h; ++i)
    for (int64_t j = 0; j < phases_w; ++j) {
      Walk const h = walk_h(op, p, i), w = walk_w(op, p, j);
      int64_t const steps = h.taps * w.taps * ceil_div(C, kStrictLine);
      most = max64(most, steps);
      double const count = double(ceil_div(p.N * h.pixels * w.pixels, row.tile_m) * tiles_n);
      whole += count * (double(steps) * step_ns + fixed), empty -= count;
    }
  whole += empty * 300;
  double const x = double(p.N) * double(p.C) * double(p.H) * double(p.W),
               y = double(p.N) * double(p.K) * double(p.P()) * double(p.Q()),
               prepared = double(strict_prepared_bytes(op, p));
  double const memory_ns = (x + y) * 4 / 3590, before = 6990 + prepared / 2340;
  Estimate best;
  for (int64_t split = 1; split <= 28 && split * 2 <= max64(most, 2); split += split < 4 ? 1 : split / 2) {
    TileSplit const s = tma_split(row, tiles, split);
    if (split > 1 && (s.shared == 0 || s.shared * most > 1 << 30)) break;
    double const bytes = double(s.shared + s.workers) * area * 4;
    if (bytes > double(kMaxWorkspaceBytes)) break;
    double ns = 0;
    if (s.alone > 0) {
      double const each = double(most) * step_ns + fixed,
                   share = whole / double(slots) * double(s.alone) / double(tiles) + each * 0.55;
      ns = phases == 1 ? double(ceil_div(s.alone, slots)) * each : share > each ? share : each;
    }
    if (split > 1)
      ns += tma_shared_ns(s, double(most), step_ns, fixed * 1.07) + 770 + double(split) * 75 + bytes / 3610;
    ns = (ns > memory_ns ? ns + memory_ns * 0.2 : memory_ns + ns * 0.2) + before;
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
  }
  return best;
}

}  // namespace conv2d_ext
