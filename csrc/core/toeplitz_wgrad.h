// toeplitz_wgrad.cuh: its tiles and what they cost.
#pragma once

#include "toeplitz_gather.h"

namespace conv2d_ext {

inline constexpr int kPieceRows = 2;         // of the ring, that one barrier is of
inline constexpr int kPieceCycles = 4;       // at most in the ring
inline constexpr int kPieceSums = 128 + 10;  // floats of the products of a row of a filter at the end, a bank apart
inline constexpr int kPieceTaps = 9;         // of a row of a filter, at most
constexpr int piece_groups(int R) { return (R + kPieceRows - 1) / kPieceRows; }  // barriers of a cycle of R rows

// A row of the images is 16 runs of 8 columns: of `images`, each `pieces` of `length` columns in `run` runs.
struct PiecesTile : ToeplitzBlocks {
  int run = 4, pieces = 1, length = 8;
  int x_columns = 0, y_columns = 0;  // of an image in shared memory
  int64_t x_bytes = 0, y_bytes = 0;  // of a row
  int cycles = 1;                    // of R rows, in the ring
};

// Do the 16 lanes of which half a load is, 4 neighbouring pixels of each of four pieces, meet all banks alike?
constexpr bool pieces_meet_banks(int pieces, int length, int columns) {
  int counts[8] = {};
  for (int t = 0; t < 4; ++t)
    for (int g = 0; g < 4; ++g) ++counts[(t / pieces * columns + t % pieces * length + g) % 8];
  for (int count : counts)
    if (count > 2) return false;
  return true;
}

constexpr int pieces_columns(int pieces, int length, int columns) {
  for (int more = 0; more < 8; ++more)
    if (pieces_meet_banks(pieces, length, columns + more)) return columns + more;
  return columns;
}

// `run` and `pieces` given; shared_bytes is 0 if it does not fit.
constexpr PiecesTile pieces_blocks(Problem const& p, int R, int run, int pieces, int warp_channels) {
  PiecesTile t;
  int64_t const m = p.K / p.C;  // filters of a channel, whose gradients are the block's channels
  t.warp_channels = warp_channels, t.channels = warp_channels * kToeplitzWarps;
  t.run = run, t.pieces = pieces, t.images = 16 / run / pieces;
  int64_t const Q = p.Q(), most = int64_t(pieces) * run * 8;
  t.tiles_w = ceil_div(Q, most);
  if (run == 1 && Q > 8) return t;  // zeros behind a row are the copy engine's
  t.length = int(ceil_div(ceil_div(Q, t.tiles_w), pieces));
  // The next length whose pieces meet all banks alike, if any does.
  for (int length = t.length; length <= run * 8 && length < t.length + 8; ++length)
    if (pieces_meet_banks(pieces, length, 4)) {
      t.length = length;
      break;
    }
  if (t.length <= (run - 1) * 8) return t;  // zeros are made of the last run alone
  int const halo = int((p.S - 1) * p.dilation_w), width = pieces * t.length;
  t.x_columns = pieces_columns(pieces, t.length, width + halo);
  t.y_columns = pieces_columns(pieces, t.length, run == 1 && width < 8 ? 8 : width);
  int const end = (t.images - 1) * t.x_columns + (pieces - 1) * t.length + (run + 1) * 8;  // that windows reach
  int const all = t.images * t.x_columns;
  auto aligned = [&](int64_t bytes) { return warp_channels == 8 ? to1024(bytes) : to512(bytes); };  // to the swizzle
  t.x_bytes = aligned(int64_t(end > all ? end : all) * (t.channels / m) * 2);
  t.y_bytes = aligned(int64_t(t.images) * t.y_columns * t.channels * 2);
  if (t.x_columns > 256 || t.y_columns > 256) return t;
  int64_t const cycle = R * (t.x_bytes + t.y_bytes);
  t.cycles = int(min64(kPieceCycles, (225 * 1024) / cycle));
  if (t.cycles < 1) return t;
  t.slices = ceil_div(p.K, int64_t(t.channels)), t.image_units = ceil_div(p.N, t.images);
  t.rows = ceil_div(p.P(), p.dilation_h);
  t.units = t.tiles_w * t.image_units * p.dilation_h * t.rows;
  int64_t const sums = int64_t(kToeplitzWarps) * R * warp_channels * (kPieceSums + kPieceTaps) * 4;
  t.shared_bytes = max64(t.cycles * cycle, sums) + 1024;
  return t;
}

// Of warps of 4 channels, or 8.
constexpr PiecesTile pieces_tile(Problem const& p, int R, int warp_channels, Device const& d) {
  PiecesTile best;
  double const taps = double(p.K) * double(p.R) * double(p.S);
  bool const wide = warp_channels == 8;
  for (int run = wide || p.K > p.C ? 2 : 1; run <= 4; run *= 2)
    for (int pieces = 1; pieces <= (run == 1 ? 1 : 4); pieces *= 2) {
      PiecesTile const t = pieces_blocks(p, R, run, pieces, warp_channels);
      if (t.shared_bytes == 0) continue;
      auto consider = [&](PiecesTile const& u) {
        if (u.shares > 1 && double(u.shares) * taps * 4 > double(kMaxWorkspaceBytes)) return;
        // As measured.
        double const sums = u.shares > 1 ? 3500 + double(u.shares) * taps * 8 / 2500 : 0;
        double const row_ns = wide ? 550 : R == 3 ? 400 : 470;
        // Up to 5x5: columns that two tiles read. 3x3: slices that share 128 bytes; turns no better with 4 channels.
        double const shift = wide ? (p.C % 16 == 0 ? 1 / 1.2 : 1.3 / 1.4) : p.K % 32 != 0 ? 1.2 : 1;
        double const columns = double(u.pieces) * u.length, halo = double((p.S - 1) * p.dilation_w);
        double const twice = R <= 5 && u.tiles_w > 1 ? 1 + halo / columns : 1;
        double const three = R == 3 ? shift / (wide || u.each * u.shares < u.units ? 1 : 1.04) : 1;
        // Blocks that have a turn less than others leave some of the rate.
        double const slots = double(max64(1, d.sm_count / u.slices)), all = double(u.units) / slots;
        double const busiest = double(u.each) * double(ceil_div(ceil_div(u.units, u.each), u.shares));
        double const uneven = busiest > all ? 1 + 0.25 * (busiest / all - 1) : 1;
        double const memory_ns = twice * three * uneven * pieces_memory_ns(u, p, R, R == 3 ? 3400 : 3100, d);
        // 5x5, slices that begin within 64 bytes of others', as of 240 channels: turns of 14 rows for whole strips.
        double const turns = R == 5 && p.C % 32 == 16 && u.rows == 28 ? (u.each == 14 ? 0.82 : 1.08) : 1;
        double const ns = 9000 + sums + turns * max_of(memory_ns, toeplitz_rows(u, R, d) * row_ns);
        bool const longer = R == 5 && ns == best.ns && u.run > best.run;  // of equals
        if (best.ns == 0 || ns < best.ns || longer) best = u, best.ns = ns;
      };
      consider_turns(t, d, consider);
      // Fewer blocks, whose sums are fewer.
      PiecesTile u = t;
      u.each = min64(u.units, 4 * ceil_div(u.units, max64(1, d.sm_count / u.slices)));
      u.shares = ceil_div(u.units, u.each);
      consider(u);
      u.each = u.units, u.shares = 1;
      consider(u);  // the least partial sums
    }
  return best;
}

// 3x3: a warp has 8 channels where slices of 32 would share 128 bytes of memory with others'.
constexpr PiecesTile pieces_tile(Problem const& p, int R, Device const& d) {
  PiecesTile const t = R == 3 && p.K == p.C && p.C > 32 && p.C % 64 != 0 ? pieces_tile(p, R, 8, d) : PiecesTile{};
  return t.ns != 0 ? t : pieces_tile(p, R, 4, d);
}

}  // namespace conv2d_ext
