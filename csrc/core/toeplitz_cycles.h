// toeplitz_cycles.cuh, depthwise 7x7 filters over large tensors: its tiles, what it takes and what that costs. It is
// the second kernel of the rows of toeplitz of 7 x 9.
#pragma once

#include "toeplitz.h"

namespace conv2d_ext {

inline constexpr int kCycle = 7;       // rows of the filter, and of a turn of the unrolled loop
inline constexpr int kCycleGroup = 4;  // rows of a stage and of a buffer; a cycle's others are another
inline constexpr int kCycleStages = 12, kCycleBuffers = 2, kCycleChannels = 32;
// Words of a row of the filter of a channel in shared memory, by distances of an input from an output from -7 on.
inline constexpr int kCycleTapWords = 20;

// A warp has 4 channels of 16 blocks of 8 columns.
struct CyclesTile : ToeplitzBlocks {
  int columns = 8;                      // of an image in a row
  int64_t in_bytes = 0, out_bytes = 0;  // of a row
};

constexpr CyclesTile cycles_tile(Op op, Problem const& p, Device const& d) {
  bool const backward = op == Op::dgrad;
  int64_t const H = backward ? p.H : p.P(), W = backward ? p.W : p.Q();
  CyclesTile best;
  for (int channels = kCycleChannels; channels >= 8; channels /= 2) {
    CyclesTile t;
    static_cast<ToeplitzBlocks&>(t) = toeplitz_blocks(Op::wgrad, p, channels, H, W, 1);  // as wide as wgrad's
    int64_t const pixel = int64_t(t.channels) * 2 * t.images;
    // The windows' last columns, which meet no taps, are the next image's, or zeros behind the last one's.
    t.columns = int(ceil_div(min64(t.blocks * 8, W) + kCycle - 1, 4) * 4);
    t.in_bytes = to1024(pixel * t.columns + ((t.blocks + 1) * 8 - t.columns) * t.channels * 2);
    t.out_bytes = to1024(pixel * t.blocks * 8);
    int64_t const taps = int64_t(t.channels) * kCycle * kCycleTapWords * 4;
    int64_t const rest = kCycleBuffers * kCycleGroup * t.out_bytes + taps, stage = kCycleGroup * t.in_bytes;
    t.stages = int(max64(2, min64(kCycleStages, (224 * 1024 - 2048 - rest) / stage)));
    t.shared_bytes = t.stages * stage + rest + 1024;
    if (t.shared_bytes > 225 * 1024) continue;
    consider_turns(t, d, [&](CyclesTile const& u) {
      // As measured.
      double const short_runs = u.channels == 32 ? 1 : u.channels == 16 ? 1.2 : 1.6;
      double const ns = 14000 + toeplitz_rows(u, kCycle, d) * 500 * short_runs;
      if (best.ns == 0 || ns < best.ns) best = u, best.ns = ns;
    });
  }
  return best;
}

constexpr bool cycles_supports(Op op, Problem const& p) {
  return op != Op::wgrad && p.R == kCycle && p.S == kCycle && p.dilation_h == 1 && p.dilation_w == 1;
}

// Of what the rows of 7 x 9 take, that which is faster by cycles.
constexpr bool takes_cycles(Op op, Problem const& p, Device const& d) {
  if (!cycles_supports(op, p) || (op == Op::dgrad ? p.H : p.P()) < 14) return false;
  CyclesTile const t = cycles_tile(op, p, d);
  return t.ns != 0 && t.ns < toeplitz_tile(op, p, kCycle, 9, d).ns;
}

constexpr Estimate toeplitz_or_cycles_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  if (row.tile_m == kCycle && takes_cycles(op, p, d)) return {cycles_tile(op, p, d).ns, 1};
  return toeplitz_estimate(row, op, p, d);
}

}  // namespace conv2d_ext
