// toeplitz_pairs.cuh: its tiles and what they cost, and what all rows of toeplitz do. It is the second kernel of those
// for wgrad of 3 and 5 rows.
#pragma once

#include "toeplitz_wgrad.h"

namespace conv2d_ext {

inline constexpr int kPairChannels = 64;  // of a block; a warp has 8 of them
inline constexpr int kPairRuns = 8;       // of a half
inline constexpr int kPairSums = 32 + 1;  // floats of a channel and a row of the filter at the end, a bank apart
inline constexpr int kPairTaps = 5;       // of a row of a filter, at most

// A row of the images is two halves, of `half_images` images or of one image's two parts, which have up to 8 runs of 4
// columns each: `runs` of an image.
struct PairsTile : ToeplitzBlocks {
  int runs = 1, half_images = 1;
  bool parts = false;
  int x_columns = 0, y_columns = 0;  // of an image of a half in shared memory
  int x_half = 0, y_half = 0;        // pixels from a half to the other
  int64_t x_bytes = 0, y_bytes = 0;  // of a row
  int cycles = 1;                    // of R rows, in the ring
};

// Halves begin an odd multiple of 2 pixels from each other: in different banks.
constexpr int pairs_half(int pixels) { return (pixels + 1) / 4 * 4 + 2; }

constexpr PairsTile pairs_blocks(Problem const& p, int R) {
  PairsTile t;
  t.warp_channels = 8, t.channels = kPairChannels;
  int64_t const all = ceil_div(p.Q(), 4), tiles = ceil_div(all, 2 * kPairRuns), blocks = ceil_div(all, tiles);
  t.parts = blocks > kPairRuns;
  t.runs = int(t.parts ? ceil_div(blocks, 2) : blocks), t.half_images = t.parts ? 1 : kPairRuns / t.runs;
  t.blocks = t.parts ? 2 * t.runs : t.runs, t.images = t.parts ? 1 : 2 * t.half_images;
  t.x_columns = t.runs * 4 + 4, t.y_columns = t.runs * 4;
  int const x = t.half_images * t.x_columns, y = t.half_images * t.y_columns;
  t.x_half = pairs_half(x), t.y_half = pairs_half(y);
  t.x_bytes = to1024(int64_t(t.x_half + x) * kPairChannels * 2);
  t.y_bytes = to1024(int64_t(t.y_half + y) * kPairChannels * 2);
  int64_t const cycle = R * (t.x_bytes + t.y_bytes);
  t.cycles = int(min64(kPieceCycles, (225 * 1024) / cycle));
  t.slices = ceil_div(p.C, int64_t(kPairChannels)), t.tiles_w = ceil_div(all, int64_t(t.blocks));
  t.image_units = ceil_div(p.N, t.images), t.rows = ceil_div(p.P(), p.dilation_h);
  t.units = t.tiles_w * t.image_units * p.dilation_h * t.rows;
  int64_t const sums = int64_t(kPairChannels) * R * (kPairSums + kPairTaps) * 4;
  t.shared_bytes = max64(t.cycles * cycle, sums) + 1024;
  return t;
}

constexpr PairsTile pairs_tile(Problem const& p, int R, Device const& d) {
  PairsTile best;
  double const taps = double(p.C) * double(p.R) * double(p.S);
  auto consider = [&](PairsTile const& u) {
    if (u.shares > 1 && double(u.shares) * taps * 4 > double(kMaxWorkspaceBytes)) return;
    // As measured.
    double const sums = u.shares > 1 ? 3500 + double(u.shares) * taps * 8 / 2500 : 0;
    double const fixed = R == 3 ? 9000 : 10000;
    double const ns = fixed + sums + max_of(turns_memory_ns(u, p, R, 3500, d), toeplitz_rows(u, R, d) * 370);
    if (best.ns == 0 || ns < best.ns) best = u, best.ns = ns;
  };
  PairsTile t = pairs_blocks(p, R);
  consider_turns(t, d, consider);
  t.each = t.units, t.shares = 1;
  consider(t);  // the least partial sums
  return best;
}

// Of what a row of toeplitz takes, that which this kernel is faster with: more than a slice of channels, and of 3 rows
// images that are narrow. The row of 5 rows leaves filters of 3 to the other one.
constexpr bool takes_pairs(Problem const& p, int R, Device const& d) {
  if (R > 5 || (p.S - 1) * p.dilation_w > 4 || p.K != p.C || p.C <= kPairChannels) return false;
  if (p.R <= 3 && (R > 3 || p.Q() > 28)) return false;
  return pairs_tile(p, R, d).ns < pieces_tile(p, R, d).ns;
}

constexpr Estimate toeplitz_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  if (toeplitz_phased(row.tile_n, p)) {
    Estimate all{toeplitz_phase_ns(op), op == Op::wgrad ? 0 : 1};
    int64_t const wide = p.W % p.dilation_w;  // phases of a column more than the others
    auto add = [&](int64_t phases, int64_t w) constexpr {
      if (phases == 0) return;
      Estimate const one = toeplitz_estimate(row, op, toeplitz_phase(p, w), d);
      all.ns += double(phases) * (one.ns - toeplitz_phase_ns(op));
      if (op == Op::wgrad) all.split_k += int(phases) * one.split_k;
    };
    add(wide, 0), add(p.dilation_w - wide, p.dilation_w - 1);
    return all;
  }
  if (op == Op::wgrad) {
    PairsTile const pairs = takes_pairs(p, row.tile_m, d) ? pairs_tile(p, row.tile_m, d) : PairsTile{};
    if (pairs.ns != 0) return {pairs.ns, int(pairs.shares)};
    PiecesTile const t = pieces_tile(p, row.tile_m, d);
    return {t.ns, int(t.shares)};
  }
  if (takes_gather(op, p, row.tile_m, d)) return {gather_tile(op, p, row.tile_m, d).ns, 1};
  ToeplitzTile const t = toeplitz_tile(op, p, row.tile_m, d);
  // As measured, 3x3: slices that are not full take as long as others.
  double const filled = double(p.C) / double(t.slices * t.channels);
  return {row.tile_m == 3 ? 7800 + (1.48 - 0.52 * filled) * (t.ns - 7800) : t.ns, 1};
}

// Is there room for the partial sums of all phases of a dilation?
constexpr bool toeplitz_sums_fit(Row const& row, Op op, Problem const& p) {
  return op != Op::wgrad || !toeplitz_phased(row.tile_n, p) ||
         toeplitz_estimate(row, op, p, h200_sxm).split_k * p.K * p.R * p.S * 4 <= kMaxWorkspaceBytes;
}

}  // namespace conv2d_ext
