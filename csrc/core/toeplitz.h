// The tiles of cuda/toeplitz.cuh for a problem: shared by the planner and the launcher.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

inline constexpr int kToeplitzStages = 12, kToeplitzBuffers = 3, kToeplitzChannels = 64;
// Of a block: warps that multiply, and threads. 3x3: one warp more copies. Other filters' sums and operands need more
// than the 168 registers that 384 threads have; a warpgroup that copies leaves most of its own to the two that
// multiply.
constexpr int toeplitz_warps(int R) { return R == 3 ? 4 : 8; }
constexpr int toeplitz_threads(int R) { return 32 * toeplitz_warps(R) + (R == 3 ? 32 : 128); }
constexpr int toeplitz_resident(int R) { return R == 3 ? 3 : 1; }  // blocks of an SM
inline constexpr int kToeplitzRegisters = 232, kToeplitzCopyRegisters = 40;
static_assert(256 * kToeplitzRegisters + 128 * kToeplitzCopyRegisters <= 384 * 168);

// A window of inputs, in blocks of 4 columns, that 4 neighbouring outputs meet.
constexpr int toeplitz_window(int S) { return S <= 5 ? 2 : 3; }

// What a block of threads has. A warp has 8 channels of 16 blocks of 4 columns; wgrad: 4 channels of 16 blocks of 8.
struct ToeplitzBlocks {
  int warp_channels = 8;                     // of a warp
  int channels = 8, blocks = 1, images = 1;  // of a block of threads
  int64_t slices = 1, tiles_w = 1, image_units = 1;
  int64_t rows = 1;                         // of a strip: of one phase of the dilation
  int64_t units = 1, each = 1, shares = 1;  // rows of outputs of a slice, of a block; blocks of a slice
  int stages = 1;
  int64_t shared_bytes = 0;
  double ns = 0;

  constexpr int groups() const { return int(ceil_div(int64_t(blocks) * images, 16)); }  // of 16 blocks, a warp each
  constexpr int warps() const { return channels / warp_channels * groups(); }
};

struct ToeplitzTile : ToeplitzBlocks {
  int64_t in_bytes = 0, out_bytes = 0;  // of a stage, of a buffer
};

struct ToeplitzSumsTile : ToeplitzBlocks {
  int64_t x_bytes = 0, y_bytes = 0;  // of a stage
  constexpr int x_columns(Problem const& p) const { return blocks * 8 + int((p.S - 1) * p.dilation_w); }
};

constexpr double max_of(double a, double b) { return a > b ? a : b; }

constexpr int64_t to1024(int64_t bytes) { return (bytes + 1023) / 1024 * 1024; }

// Few idle warps, little halo. H, W: of the outputs, wgrad: of y. `halo`: blocks of columns of inputs more than of
// these.
constexpr ToeplitzBlocks toeplitz_blocks(Op op, Problem const& p, int R, int64_t H, int64_t W, double halo) {
  ToeplitzBlocks t;
  if (op == Op::wgrad) t.warp_channels = 4;
  int const warps = toeplitz_warps(R), columns = op == Op::wgrad ? 8 : 4;
  int64_t const all = ceil_div(W, columns);
  double best = 0;
  for (int channels = t.warp_channels * warps; channels >= 8; channels /= 2) {
    int64_t const slices = ceil_div(p.C, channels);
    // Blocks of columns, and those in a row: the copy engine takes up to 256 columns.
    int64_t const most = 16 * (warps / (channels / t.warp_channels)), first = ceil_div(all, min64(most, 240 / columns));
    for (int64_t tiles = first; tiles <= min64(all, first + 3); ++tiles) {
      int64_t const blocks = ceil_div(all, tiles);
      for (int64_t images = 1; images <= (tiles > 1 ? 1 : min64(p.N, most / blocks)); ++images) {
        int64_t const groups = ceil_div(blocks * images, 16);
        double const idle = double(groups * 16) / double(blocks * images) * double(tiles * blocks) / double(all) *
                            double(ceil_div(p.N, images) * images) / double(p.N) * double(slices * channels) /
                            double(p.C);
        double const cost = (idle + 2 + halo / double(blocks)) *
                            (channels >= 32   ? 1
                             : channels == 16 ? 1.05
                                              : 1.3) *
                            (1.3 - 0.3 * double(channels / t.warp_channels * groups) / warps);
        if (best != 0 && cost >= best) continue;
        best = cost;
        t.channels = channels, t.blocks = int(blocks), t.images = int(images);
      }
    }
  }
  t.slices = ceil_div(p.C, t.channels), t.tiles_w = ceil_div(all, t.blocks), t.image_units = ceil_div(p.N, t.images);
  t.rows = ceil_div(H, p.dilation_h);
  t.units = t.tiles_w * t.image_units * p.dilation_h * t.rows;
  return t;
}

constexpr ToeplitzTile toeplitz_tile(Op op, Problem const& p, int R, int S, Device const& d) {
  bool const backward = op == Op::dgrad;
  int const window = toeplitz_window(S), resident = toeplitz_resident(R);
  ToeplitzTile t;
  static_cast<ToeplitzBlocks&>(t) =
      toeplitz_blocks(op, p, R, backward ? p.H : p.P(), backward ? p.W : p.Q(), window - 1);
  int64_t const pixel = int64_t(t.channels) * 2 * t.images;
  t.in_bytes = to1024(pixel * (t.blocks + window - 1) * 4), t.out_bytes = to1024(pixel * t.blocks * 4);
  t.stages = int(
      max64(2, min64(kToeplitzStages, (224 * 1024 / resident - 2048 - kToeplitzBuffers * t.out_bytes) / t.in_bytes)));
  t.shared_bytes = t.stages * t.in_bytes + kToeplitzBuffers * t.out_bytes + 1024;
  int64_t const slots = max64(1, int64_t(resident) * d.sm_count / t.slices);
  // Of the bytes beyond those that L2 keeps, as measured for channels that fill no slices.
  double const bytes = 2.0 * double(p.N) * double(p.C) * (double(p.H) * double(p.W) + double(p.P()) * double(p.Q()));
  double const memory_ns = (bytes - 40e6) / (2200.0 * d.sm_count / 132);
  auto consider = [&](int64_t each) {
    ToeplitzTile u = t;
    u.each = min64(each, t.units), u.shares = ceil_div(t.units, u.each);
    // As measured.
    double const blocks = double(u.shares * t.slices), full = double(resident) * d.sm_count;
    double const present = blocks < full ? max_of(1, blocks / d.sm_count) : resident;
    double const alone = R == 3 ? 445 : R == 5 ? 465 : 745, beside = R == 3 ? 28 : R == 5 ? 25 : 35;
    double const ragged = R == 3 && t.slices * t.channels != p.C ? 1.3 : 1.0;
    double const row_ns = (alone + beside * present * present) * ragged;
    double const halo = double((R - 1) * ceil_div(u.each, t.rows) + (u.each % t.rows == 0 ? 0 : (R - 1) / 2));
    u.ns = (R == 7   ? 9000
            : R == 5 ? 6300
                     : 6800) +
           double(ceil_div(int64_t(blocks), int64_t(full))) * (double(u.each) + halo) * row_ns;
    if (t.ns == 0 || u.ns < t.ns) t = u;
  };
  int64_t const even = ceil_div(t.units, slots);
  consider(even);
  consider(ceil_div(even, t.rows) * t.rows);
  if (t.rows > 1 && even < t.rows) consider(ceil_div(t.rows, t.rows / even));
  t.ns = max_of(t.ns, memory_ns);
  return t;
}

constexpr ToeplitzSumsTile toeplitz_sums_tile(Problem const& p, int R, Device const& d) {
  int const resident = toeplitz_resident(R);
  ToeplitzSumsTile t;
  static_cast<ToeplitzBlocks&>(t) =
      toeplitz_blocks(Op::wgrad, p, R, p.P(), p.Q(), double((p.S - 1) * p.dilation_w) / 8);
  int64_t const pixel = int64_t(t.channels) * 2 * t.images;
  t.x_bytes = to1024(pixel * t.x_columns(p)), t.y_bytes = to1024(pixel * t.blocks * 8);
  int64_t const stage = t.x_bytes + t.y_bytes;
  t.stages = int(max64(4, min64(kToeplitzStages, (224 * 1024 / resident - 2048) / stage)));
  int64_t const totals = int64_t(t.warps()) * 2048 + int64_t(t.groups()) * t.channels * p.R * p.S * 4;
  t.shared_bytes = max64(t.stages * stage, totals) + 1024;
  int64_t const slots = max64(1, int64_t(resident) * d.sm_count / t.slices);
  double const taps = double(p.C) * double(p.R) * double(p.S);
  auto consider = [&](int64_t each) {
    ToeplitzSumsTile u = t;
    u.each = min64(each, t.units), u.shares = ceil_div(t.units, u.each);
    if (u.shares > 1 && double(u.shares) * taps * 4 > double(kMaxWorkspaceBytes)) return;
    double const blocks = double(u.shares * t.slices), full = double(resident) * d.sm_count;
    double const present = blocks < full ? max_of(1, blocks / d.sm_count) : resident;
    double const row_ns = R == 3   ? 460 + 105 * present * present
                          : R == 5 ? 690 + 54 * present * present
                                   : 760 + 48 * present * present;
    double const halo = double((p.R - 1) * (ceil_div(u.each, t.rows) + (u.each % t.rows == 0 ? 0 : 1)));
    u.ns = (R == 5 ? 5500 : 4500) + double(ceil_div(int64_t(blocks), int64_t(full))) * (double(u.each) + halo) * row_ns;
    if (u.shares > 1) u.ns += 3500 + double(u.shares) * taps * 8 / 2500;
    if (t.ns == 0 || u.ns < t.ns) t = u;
  };
  int64_t const even = ceil_div(t.units, slots);
  consider(even);
  consider(ceil_div(even, t.rows) * t.rows);
  if (t.rows > 1 && even < t.rows) consider(ceil_div(t.rows, t.rows / even));
  if (even < 16) {
    consider(4 * even);
    consider(t.units);
  }
  if (t.ns == 0) consider(t.units);  // there is no room for partial sums
  return t;
}

constexpr bool toeplitz_supports(Row const& row, Op op, Problem const& p) {
  if (p.C_per_group() != 1 || p.K != p.C || p.R > row.tile_m || (p.S - 1) * p.dilation_w > row.tile_n - 1) return false;
  if (p.stride_h != 1 || p.stride_w != 1) return false;
  if (p.N == 0 || p.C == 0 || p.H == 0 || p.W == 0 || p.P() == 0 || p.Q() == 0) return false;
  if (!channel_vectors(p.x, p.x_align, p.C, 8, p.dtype) || !channel_vectors(p.y, p.y_align, p.C, 8, p.dtype) ||
      !map_supports(p.x, p.N, p.H, p.W, p.dtype) || !map_supports(p.y, p.N, p.P(), p.Q(), p.dtype))
    return false;
  // Rows of all strips, and coordinates, are int.
  constexpr int64_t most = int64_t(1) << 29;
  double const columns = double(max64(p.W, p.Q())) + 8, rows = double(max64(p.H, p.P()) + p.dilation_h) + 8;
  return p.H + p.pad_top + p.pad_bottom < most && p.W + p.pad_left + p.pad_right < most && p.dilation_h < most / 8 &&
         double(p.N) * columns * rows < double(most);
}

constexpr Estimate toeplitz_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  if (op != Op::wgrad) return {toeplitz_tile(op, p, row.tile_m, row.tile_n, d).ns, 1};
  ToeplitzSumsTile const t = toeplitz_sums_tile(p, row.tile_m, d);
  return {t.ns, int(t.shares)};
}

}  // namespace conv2d_ext
