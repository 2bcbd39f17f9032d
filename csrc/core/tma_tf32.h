// tma_tf32.cuh and tma_wgrad_tf32.cuh: what their rows take and cost, and what the launchers share with the planner.
#pragma once

#include <cstdint>

#include "tma.h"

namespace conv2d_ext {

constexpr bool tf32_is_raw(Variant v) { return v == Variant::raw || v == Variant::raw_halo; }

inline constexpr int kTf32Line = 32;  // channels of a line, and of a step

// Tiles of wgrad's im2col variant.
constexpr int64_t tf32_wgrad_tiles(Row const& row, Problem const& p) {
  return ceil_div(p.R * p.S * ceil_div(p.C_per_group(), kTf32Line), row.tile_m / kTf32Line) *
         ceil_div(p.K_per_group(), row.tile_n) * p.groups;
}

// Bytes of the filters that dgrad's rows but the raw ones turn beforehand, in whole lines.
constexpr int64_t tf32_prepared_bytes(Row const& row, Op op, Problem const& p) {
  if (op != Op::dgrad || tf32_is_raw(row.variant)) return 0;
  return p.C * p.R * p.S * ceil_div(p.K_per_group(), kTf32Line) * kTf32Line * 4;
}

constexpr int64_t tf32_workspace_bytes(Row const& row, Op op, Problem const& p, int split_k) {
  if (op == Op::wgrad && !is_halo(row.variant))
    return split_k == 1 ? 0 : tf32_wgrad_tiles(row, p) * split_k * row.tile_m * row.tile_n * 4;
  return tma_workspace_bytes(row, p, split_k) + tf32_prepared_bytes(row, op, p);
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

// fprop and dgrad. A tile's lines: wgmma reads A, and B for each 64 rows (with exchanged operands, 64 filters and all
// pixels; the raw variants read the filters as fragments, and all pixels for each 64 channels), both are copied.
constexpr Estimate tf32_estimate(Row const& row, Op op, Problem const& p) {
  bool const halo = is_halo(row.variant), raw = tf32_is_raw(row.variant), forward = op == Op::fprop;
  bool const swapped = tma_swapped(row);
  double const TM = row.tile_m, TN = row.tile_n, area = TM * TN;
  int64_t const C = forward ? p.C_per_group() : p.K_per_group(), N = forward ? p.K_per_group() : p.C_per_group();
  int64_t const slots = tma_slots(row), tiles_n = ceil_div(N, row.tile_n) * p.groups;
  bool const two = slots > 132;  // blocks an SM
  int64_t const phases_h = forward ? 1 : phases_of(p.H, p.stride_h),
                phases_w = forward ? 1 : phases_of(p.W, p.stride_w), phases = phases_h * phases_w;
  int64_t const stages_b = p.R * p.S * ceil_div(C, kTf32Line);
  bool const keeps_b =
      swapped && tiles_n <= kMaxKeptTiles && stages_b <= 64 && (stages_b * min64(N, 64) + 3 * 264) * 128 <= 205 * 1024;
  double const filled = double(ceil_div(C, 8)) / double(ceil_div(C, kTf32Line) * 4);  // instructions of the steps
  double const fixed = swapped ? 2270 : 880 + 0.1 * area;                             // of a part
  double const store_ns = 2330;  // with exchanged operands one warpgroup multiplies while the other stores
  double const slower_raw = !raw ? 1 : area > 128 * 128 ? 0.93 : 1.23;
  // The raw variants have neighbouring pixels of a channel in neighbouring threads' registers: results in NCHW are
  // single elements, lines of channels are put together by a warpgroup. With short sums all SMs store at the same time.
  double const of_result = tma_stores_singly(op, p) ? (raw                        ? 0.17
                                                       : tma_stores_lines(row, p) ? 0.03
                                                                                  : 0.049)
                           : raw                    ? 1.2 / double(max64(p.R * p.S * ceil_div(C, kTf32Line), 16))
                                                    : 0;
  double const stored = swapped ? 0 : area * of_result;
  auto tile_ns = [&](double ns) { return swapped ? (ns > store_ns ? ns : store_ns) + 550 : ns + fixed + stored; };
  int64_t const tiles = tma_tiles(row, p);
  int64_t most = 1, with_taps = 0;
  double whole = 0, longest = 0, empty = double(tiles);  // ns of all tiles, of one; tiles
  double counts[kMaxPhases] = {}, of_tile[kMaxPhases] = {};
  for (int64_t i = 0; i < phases_h; ++i)
    for (int64_t j = 0; j < phases_w; ++j) {
      Walk const h = walk_h(op, p, i);
      Walk w = walk_w(op, p, j);
      int64_t const steps = h.taps * w.taps * ceil_div(C, kTf32Line);
      int64_t copies = steps;
      double of_a = TM;
      if (halo && steps > 0) {
        Halo const shared = halo_of(w);
        // With a stride a copy serves fewer taps and there are fewer of them on their way.
        double const slower = shared.copies == 1 ? 1 : two ? 1.02 : 0.94;
        of_a = (TM + kHalo) * double(shared.copies) / double(w.taps) * slower;
        copies = h.taps * shared.copies * ceil_div(C, kTf32Line);
        w = halo_walk(row, p, w);
      }
      double const copied = (of_a + (keeps_b ? 0 : TN * 0.52)) * (C * 4 <= 16 ? 2.66 : 1);
      double const lines = (swapped ? 64 + TM : raw ? TN / 64 * TM + TN : TM / 64 * TN + TM) + copied;
      double const ns = double(steps) * (two ? 2.54 : slower_raw) *
                        tf32_step_ns(area / 32 * filled * (swapped ? 0.95 : 0.99), lines * 0.87, copied * 3.35);
      double const count = double(ceil_div(p.N * h.pixels * w.pixels, row.tile_m) * tiles_n);
      most = max64(most, copies);
      if (ns > longest) longest = ns;
      whole += count * tile_ns(ns), empty -= count;
      with_taps += steps > 0, counts[i * phases_w + j] = count, of_tile[i * phases_w + j] = tile_ns(ns);
    }
  whole += empty * 300;
  double const filters = double(p.K) * double(p.C_per_group()) * double(p.R) * double(p.S) * 4;
  double const prepare = forward || raw ? 0 : 1550 + filters * 2 / 2310 + (p.groups == 1 ? 0 : 2800);
  double const first = !swapped ? 0 : halo ? 3370 : 1070;  // with exchanged operands nothing hides the first stages
  // Tiles of filters beyond the first find the pixels in L2.
  double const again_ns = double(ceil_div(N, row.tile_n) - 1) * double(p.N) * double(C * p.groups) *
                          (forward ? double(p.H) * double(p.W) : double(p.P()) * double(p.Q())) * 4 / 38400;
  double const before = 3940 + first + prepare, memory_ns = tf32_memory_ns(p, 5300) + again_ns;
  double const unshared = TmaTilePixels(row, p).time;  // as in tma_estimate
  Estimate best;
  for (int64_t split = 1; split <= 28 && split * 2 <= max64(most, 2); split += split < 4 ? 1 : split / 2) {
    TileSplit const s = tma_split(row, tiles, split);
    if (split > 1 && (s.shared == 0 || s.shared * most > 1 << 30)) break;
    double const bytes = double(s.shared + s.workers) * area * 4;
    if (bytes > double(kMaxWorkspaceBytes)) break;
    double ns = 0;
    if (s.alone > 0) {
      double const each = tile_ns(longest),
                   most_of_phases =
                       split > 1 ? 0 : tma_phases_longest(row, counts, of_tile, phases, with_taps, tiles, tiles_n),
                   share = most_of_phases > 0 ? most_of_phases
                                              : whole / double(slots) * double(s.alone) / double(tiles) + each * 0.55;
      ns = phases == 1 ? double(ceil_div(s.alone, slots)) * each : share > each ? share : each;
      if (two && tiles <= 132) ns -= longest * 0.21;  // a block has an SM for itself
    }
    if (split > 1) {
      double const step_ns = longest / double(most);
      // Blocks that share tiles unevenly are at different steps; halo's copies serve several, and wait less.
      ns += tma_shared_ns(s, double(most), step_ns, fixed) * (!halo && s.workers % s.shared != 0 ? 1.3 : 1);
      ns += 830 + double(split) * 100 + bytes / 1930;  // the second launch
      // Blocks that are not at the same steps read filters that do not stay in L2 anew.
      if (s.shared * split > slots && filters > 2e7) ns += filters / 4210;
    }
    // Pixels that several tiles of 64 filters read.
    bool const again = halo && swapped && s.alone > s.shared && p.groups == 1 && N > 64;
    double const off = again     ? 1.06 + 0.007 * double(min64(tiles_n, 8) - 1)
                       : halo    ? (swapped || area == 128 * 128 ? (raw ? 1.02 : 1.05) : 1.09)
                       : swapped ? 1.23
                                 : 1.06;  // what the fit is off by
    ns = ((ns > memory_ns ? ns + memory_ns * 0.065 : memory_ns + ns * 0.065) + before) * off;
    if (!forward && swapped && p.groups > 1 && N <= 32 && p.stride_w > 1) ns *= 0.8;  // as measured
    if (split == 1 || ns < best.ns * (best.split_k == 1 ? unshared : 1)) best = {ns, int(split)};
  }
  return best;
}

// fprop of 128x128 with a stride and several taps, more than two rounds of whole tiles: its warpgroups take turns, a
// tile each. Elsewhere that is slower: of few tiles, and of many channels with dilations, up to 1.7 times.
constexpr bool tf32_takes_turns(Row const& row, Problem const& p, int64_t split_k) {
  return split_k == 1 && p.stride_w > 1 && p.R * p.S > 1 && p.dilation_h == 1 && p.dilation_w == 1 && p.groups == 1 &&
         tma_tiles(row, p) > 2 * 132;
}

// fprop of 256x64 halo with a stride and one line of channels waits for memory, which has more copies under way of
// shorter tiles, if whole tiles of one group are stored in vectors.
inline constexpr int kTf32ShortTile = 128;
constexpr bool tf32_short_tiles(Problem const& p, int64_t split_k) {
  return split_k == 1 && p.stride_w > 1 && p.R * p.S > 1 && p.R * p.S <= 9 && p.W <= 320 && p.C > 16 && p.C <= 32 &&
         p.K > 32 && p.K <= 64 && p.groups == 1 && !tma_stores_singly(Op::fprop, p) &&
         p.N * p.P() * p.Q() >= 256 * 1024;
}

// Pixels that wgrad adds up in one chain. The tensor cores cut off the lowest bits of what they add: an error of 2.3e-9
// a pixel for random data, here at most 1.4e-5.
inline constexpr int64_t kTf32Pixels = 6144;

// wgrad's halo. Lines of a step: each run's x is copied and loaded, y copied, read, and written for two sets of taps,
// and wgmma reads that for each run.
constexpr Estimate tf32_wgrad_halo_estimate(Row const& row, Problem const& p, Device const& d) {
  double const x = 3 * 64, y = 2 * 34, columns = 3 * 64, copied = x + y;
  double const lines = copied + x + y + 128 + 3 * columns;
  double const step_ns = tf32_step_ns(3 * 64 * columns / 32.0 * 1.45, lines * 1.35, copied * 3.22);
  return wgrad_shared_estimate(row, wgrad_tiles(row, p), d.sm_count, step_ns, 200 + 0.1 * row.tile_m * row.tile_n,
                               tf32_memory_ns(p, 3600));
}

// What was measured of wgrad's rows without halo: ns of a step of 32 pixels, of a chain's sums, of all before, of a
// launch with whole tiles and of a second one; rounds of the device that splits are tried for.
struct Tf32WgradTimes {
  double step_ns, chain_ns, before_ns, launch_ns, second_ns;
  int64_t rounds;
};

constexpr Estimate tf32_wgrad_by_splits(Row const& row, Problem const& p, Device const& d, Tf32WgradTimes const& t) {
  int64_t const tiles = tf32_wgrad_tiles(row, p), steps = ceil_div(p.N * p.P() * p.Q(), 32);
  double const memory_ns = tf32_memory_ns(p, 3950), tile_bytes = double(row.tile_m) * row.tile_n * 4;
  auto with = [&](int64_t split) {
    int64_t const each = ceil_div(steps, split), chains = ceil_div(each * 32, kTf32Pixels);
    double ns = double(ceil_div(tiles * split, d.sm_count)) * (double(each) * t.step_ns + double(chains) * t.chain_ns) +
                t.launch_ns;
    // The second launch: eight parts of a sum are loaded at a time, one after the other eight.
    if (split > 1)
      ns += t.second_ns + double(tiles * split) * tile_bytes * 2 / 12500 + double(ceil_div(split, 8)) * 400 +
            double(split) * 12;
    return (ns > memory_ns ? ns + memory_ns / 10 : memory_ns + ns / 10) + t.before_ns;
  };
  Estimate best{with(1), 1};
  int64_t const first = ceil_div(tiles, d.sm_count);
  for (int64_t rounds = first; rounds < first + t.rounds && tiles > 0; ++rounds) {
    int64_t const split = min64(rounds * d.sm_count / tiles, steps / 2);
    if (split < 2 || double(tiles * split) * tile_bytes > double(kMaxWorkspaceBytes)) continue;
    double const ns = with(split);
    if (ns < best.ns) best = {ns, int(split)};
  }
  return best;
}

// wgrad. A tile's lines: wgmma reads the turned B for each 64 rows; A and B are copied and read, B is written again.
constexpr Estimate tf32_wgrad_estimate(Row const& row, Problem const& p, Device const& d) {
  if (is_halo(row.variant)) return tf32_wgrad_halo_estimate(row, p, d);
  double const TM = row.tile_m, TN = row.tile_n;
  int64_t const rows = p.R * p.S * ceil_div(p.C_per_group(), kTf32Line) * kTf32Line;
  double const of_x = double(min64(row.tile_m, rows)), lines = TM / 64 * TN + TM + of_x + 3 * TN;
  // Lines that end early or lie across those of memory take longer.
  int64_t const of_y = min64(row.tile_n, ceil_div(p.K_per_group(), kTf32Line) * kTf32Line);
  double const copied = of_x * (p.C_per_group() % kTf32Line == 0 ? 1 : 1.11) +
                        double(of_y) * (p.K_per_group() % kTf32Line == 0 ? 1 : 1.12);
  double const step_ns = tf32_step_ns(TM * TN / 32 * 1.315, lines * 1.11, copied * 3.57) + 10;
  return tf32_wgrad_by_splits(row, p, d, {step_ns, 210 + 0.2 * TM * TN, 1200, 0, 3400, 5});
}

}  // namespace conv2d_ext
