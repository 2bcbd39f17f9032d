// toeplitz_gather.cuh: its tiles and what they cost. It is the kernel of the rows of toeplitz for fprop and dgrad of 7
// and 9 rows, and the second one of those of 3 and 5.
#pragma once

#include "toeplitz.h"

namespace conv2d_ext {

inline constexpr int kGatherChannels = 32;                   // of a block; a warp has 4 of them
inline constexpr int kGatherRows = 2;                        // of a group, of which one barrier is, and of a buffer
inline constexpr int kGatherCycles = 4;                      // at most in the ring
inline constexpr int kGatherBuffers = 3;                     // of results
constexpr int gather_taps(int R) { return R >= 7 ? 9 : 5; }  // columns of a filter, at most
inline constexpr int kGatherPairs = 7;                       // rows of filters that are two of a channel, at most
constexpr bool gather_holds_taps(int R) { return R <= 7; }   // in registers
constexpr int gather_groups(int R) { return (R + kGatherRows - 1) / kGatherRows; }  // of a cycle of R rows
// Words of a row of the filter of a channel in shared memory, by distances of an input from an output from -7 on; of
// inputs that a stride of dgrad sets 2 apart, from -8 on.
constexpr int gather_tap_words(int apart) { return apart == 2 ? 16 : 20; }

// A row is 8 pieces of `pairs` pairs of runs of 8 columns: of `images`, or of the two parts of a wide row.
struct GatherTile : ToeplitzBlocks {
  int pairs = 4, parts = 1;
  int in_columns = 0, out_columns = 0;  // of a piece in shared memory
  int64_t in_bytes = 0, out_bytes = 0;  // of a row
  int cycles = 1;                       // of R rows, in the ring
};

constexpr int64_t to512(int64_t bytes) { return (bytes + 511) / 512 * 512; }

// Pieces begin 4 pixels, or an odd multiple of these, from each other: in different banks.
constexpr int gather_columns(int columns) { return (columns + 3) / 8 * 8 + 4; }

constexpr GatherTile gather_blocks(Op op, Problem const& p, int R, int pairs) {
  bool const backward = op == Op::dgrad;
  int64_t const H = backward ? p.H : p.P(), W = backward ? p.W : p.Q();
  GatherTile t;
  if (p.dilation_w == 7) return t;  // an infinity can then meet taps of both outputs that are looked at
  t.channels = kGatherChannels, t.pairs = pairs;
  int const run = pairs * 16, halo = int((p.S - 1) * p.dilation_w), apart = int(p.stride_w);
  if (W > run) {
    if (pairs != 4) return t;
    t.parts = 2;
  }
  t.images = 8 / pairs / t.parts;
  int64_t const width = t.parts > 1 ? run : W;
  t.in_columns = gather_columns((int(width - 1) + halo) / apart + apart), t.out_columns = gather_columns(run);
  int const pieces = 8 / pairs;
  int const end = (pieces - 1) * t.in_columns + run / apart + 8, all = pieces * t.in_columns;  // that windows reach
  int64_t const m = p.K / p.C, in = kGatherChannels / (backward ? 1 : m), out = kGatherChannels / (backward ? m : 1);
  t.in_bytes = to512(int64_t(end > all ? end : all) * in * 2);
  t.out_bytes = to512(int64_t(pieces) * t.out_columns * out * 2);
  int64_t const results = kGatherBuffers * kGatherRows * t.out_bytes,
                table = int64_t(kGatherChannels) * R * gather_tap_words(apart) * 4;
  int64_t const buffers = gather_holds_taps(R) ? max64(results, table) : results + table;
  int64_t const cycle = R * t.in_bytes;
  t.cycles = int(min64(kGatherCycles, (226 * 1024 - 512 - buffers) / cycle));  // 512: of the barriers
  if (t.cycles < 1) return t;
  t.slices = ceil_div(p.K, kGatherChannels), t.tiles_w = ceil_div(W, int64_t(t.parts) * run);
  t.image_units = ceil_div(p.N, t.images), t.rows = ceil_div(H, p.dilation_h);
  t.units = t.tiles_w * t.image_units * p.dilation_h * t.rows;
  t.shared_bytes = t.cycles * cycle + buffers + 1024;
  return t;
}

// What memory takes at `gbytes` a microsecond, as measured: rows that turns read twice. The first half of the elements
// has a halo.
constexpr double turns_memory_ns(ToeplitzBlocks const& t, Problem const& p, int R, double gbytes, Device const& d) {
  double const elements =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  double const parts =
      t.rows % t.each == 0 || t.each % t.rows == 0 ? double(t.each < t.rows) : 1 + double(t.each) / double(t.rows);
  double const halo = parts * double(R - 1) / double(t.each);
  return 2 * elements / (gbytes * d.sm_count / 132) * (1 + halo / 2) * (t.each * t.shares < t.units ? 1 : 1.04);
}
// The same of slices of 32 channels, which begin within 64 bytes, or 32, of their neighbours'.
constexpr double pieces_memory_ns(ToeplitzBlocks const& t, Problem const& p, int R, double gbytes, Device const& d) {
  return (p.K % 32 == 0 ? 1 : p.K % 16 == 0 ? 1.2 : 1.4) * turns_memory_ns(t, p, R, gbytes, d);
}

constexpr GatherTile gather_tile(Op op, Problem const& p, int R, Device const& d) {
  GatherTile best;
  for (int pairs = 1; pairs <= 4; pairs *= 2) {
    GatherTile const t = gather_blocks(op, p, R, pairs);
    if (t.shared_bytes == 0) continue;
    consider_turns(t, d, [&](GatherTile const& u) {
      // As measured.
      bool const apart = p.stride_h == 2;
      double const row_ns = R == 9 ? 760 : R == 7 ? 420 : apart ? 285 : 400;
      double const gbytes = p.R > 5 || apart ? 3700 : p.R > 3 || t.slices == 1 ? 3450 : 3300;
      double const shared = apart && p.C % 16 != 0 && t.slices > 1 ? 1.7 : 1;  // sectors of slices
      double const ns =
          7000 + 10 * R + max_of(shared * pieces_memory_ns(u, p, R, gbytes, d), toeplitz_rows(u, R, d) * row_ns);
      if (best.ns == 0 || ns < best.ns) best = u, best.ns = ns;
    });
  }
  return best;
}

// dgrad of 5x5 with stride 2: inputs are 2 apart.
constexpr bool gather_strided(Row const& row, Op op, Problem const& p) {
  return op == Op::dgrad && row.tile_m == 5 && p.R == 5 && p.S == 5 && p.stride_h == 2 && p.stride_w == 2 &&
         p.dilation_h == 1 && p.dilation_w == 1 && p.pad_top >= 0 && p.pad_top <= 4 && p.pad_left >= 0 &&
         p.pad_left <= 4;
}

// Of what a row of toeplitz takes, that which this kernel is faster with.
constexpr bool takes_gather(Op op, Problem const& p, int R, Device const& d) {
  if (R >= 7 || p.stride_h == 2 || p.K > p.C) return true;
  GatherTile const t = gather_tile(op, p, R, d);
  return t.ns != 0 && t.ns < toeplitz_tile(op, p, R, d).ns;
}

}  // namespace conv2d_ext
