// The tiles of cuda/toeplitz.cuh for a problem: shared by the planner and the launcher.
#pragma once

#include "depthwise.h"
#include "phases.h"

namespace conv2d_ext {

inline constexpr int kToeplitzStages = 12, kToeplitzBuffers = 3, kToeplitzChannels = 64;
// Warps that multiply, of a block of threads, one an SM. A warpgroup more copies, and leaves most of its registers to
// those.
inline constexpr int kToeplitzWarps = 8, kToeplitzThreads = 32 * kToeplitzWarps + 128;
inline constexpr int kToeplitzRegisters = 240, kToeplitzCopyRegisters = 24;
static_assert(256 * kToeplitzRegisters + 128 * kToeplitzCopyRegisters <= 384 * 168);
inline constexpr int kToeplitzPairs = 4;  // of channels, of a warp

// What a block of threads has. A warp has 8 channels of 16 blocks of 4 columns.
struct ToeplitzBlocks {
  int warp_channels = 8;                     // of a warp
  int channels = 8, blocks = 1, images = 1;  // of a block of threads
  int64_t slices = 1, tiles_w = 1, image_units = 1;
  int64_t rows = 1;  // of a strip: of one phase of the dilation
  // Rows of outputs of a slice, of a block's turn; blocks of a slice, which take turns.
  int64_t units = 1, each = 1, shares = 1;
  int stages = 1;
  int64_t shared_bytes = 0;
  double ns = 0;

  constexpr int groups() const { return int(ceil_div(int64_t(blocks) * images, 16)); }  // of 16 blocks, a warp each
  constexpr int warps() const { return channels / warp_channels * groups(); }
};

struct ToeplitzTile : ToeplitzBlocks {
  int64_t in_bytes = 0, out_bytes = 0;  // of a stage, of a buffer
};

constexpr double max_of(double a, double b) { return a > b ? a : b; }

constexpr int64_t to1024(int64_t bytes) { return (bytes + 1023) / 1024 * 1024; }

// For a number of channels of a block: few idle warps, little halo. H, W: of the outputs.
constexpr ToeplitzBlocks toeplitz_blocks(Problem const& p, int channels, int64_t H, int64_t W) {
  ToeplitzBlocks t;
  t.channels = channels;
  int const columns = 4;
  int64_t const all = ceil_div(W, columns);
  // Blocks of columns, and those in a row: the copy engine takes up to 256 columns.
  int64_t const most = 16 * (kToeplitzWarps / (channels / t.warp_channels)),
                first = ceil_div(all, min64(most, 240 / columns));
  double best = 0;
  for (int64_t tiles = first; tiles <= min64(all, first + 3); ++tiles) {
    int64_t const blocks = ceil_div(all, tiles);
    for (int64_t images = 1; images <= (tiles > 1 ? 1 : min64(p.N, most / blocks)); ++images) {
      int64_t const groups = ceil_div(blocks * images, 16);
      double const idle = double(groups * 16) / double(blocks * images) * double(tiles * blocks) / double(all) *
                          double(ceil_div(p.N, images) * images) / double(p.N);
      double const cost =
          (idle + 2 + 1 / double(blocks)) * (1.3 - 0.3 * double(channels / t.warp_channels * groups) / kToeplitzWarps);
      if (best != 0 && cost >= best) continue;
      best = cost;
      t.blocks = int(blocks), t.images = int(images);
    }
  }
  t.slices = ceil_div(p.C, t.channels), t.tiles_w = ceil_div(all, t.blocks), t.image_units = ceil_div(p.N, t.images);
  t.rows = ceil_div(H, p.dilation_h);
  t.units = t.tiles_w * t.image_units * p.dilation_h * t.rows;
  return t;
}

// What a block's rows take, each `row_ns`, or memory, as measured: short runs of channels take longer, and blocks that
// take turns less, since they are near each other.
constexpr double toeplitz_walk_ns(ToeplitzBlocks const& t, Problem const& p, double rows, double row_ns,
                                  Device const& d) {
  double const elements = double(p.N) * double(p.C) * (double(p.H) * double(p.W) + double(p.P()) * double(p.Q()));
  double const memory_ns = 2 * elements / (3400.0 * d.sm_count / 132) * (t.channels >= 64 ? 1 : 1.1) *
                           (t.each * t.shares < t.units ? 1 : 1.04);
  return max_of(memory_ns, rows * row_ns) * (t.channels >= 32 ? 1 : t.channels == 16 ? 1.2 : 1.6);
}

// Rows that a block multiplies, one round of blocks after the other, and a part of those that lie outside of the image.
// Turns that do not end where strips do have a halo of rows.
constexpr double toeplitz_rows(ToeplitzBlocks const& t, int64_t R, Device const& d) {
  double const strips = double(t.each) / double(t.rows), turns = double(ceil_div(ceil_div(t.units, t.each), t.shares));
  double const halo = t.each % t.rows == 0 ? 0 : t.rows % t.each == 0 ? 1 - strips : 1;
  return double(ceil_div(t.shares * t.slices, d.sm_count)) * turns *
         (double(t.each) + double(R - 1) * (halo + 0.3 * strips));
}

// Turns of some lengths: one for each block, whole strips, and parts of them.
template <class Tile, class Consider>
constexpr void consider_turns(Tile t, Device const& d, Consider const& consider) {
  int64_t const slots = max64(1, d.sm_count / t.slices), even = ceil_div(t.units, slots);
  auto turns_of = [&](int64_t each) {
    t.each = min64(each, t.units), t.shares = min64(slots, ceil_div(t.units, t.each));
    consider(t);
  };
  turns_of(even);
  turns_of(ceil_div(even, t.rows) * t.rows);
  if (even > t.rows) turns_of(t.rows);
  if (t.rows > 1 && even < t.rows) turns_of(ceil_div(t.rows, t.rows / even));
  for (int64_t parts = 2; t.rows / parts >= 14 && even > t.rows / parts; parts *= 2) turns_of(ceil_div(t.rows, parts));
}

// For filters of up to 5 rows, which reach over up to 5 columns.
constexpr ToeplitzTile toeplitz_tile(Op op, Problem const& p, int R, Device const& d) {
  bool const backward = op == Op::dgrad;
  ToeplitzTile best;
  for (int channels = kToeplitzChannels; channels >= 8; channels /= 2) {
    ToeplitzTile t;
    static_cast<ToeplitzBlocks&>(t) = toeplitz_blocks(p, channels, backward ? p.H : p.P(), backward ? p.W : p.Q());
    int64_t const pixel = int64_t(t.channels) * 2 * t.images;
    t.in_bytes = to1024(pixel * (t.blocks + 1) * 4), t.out_bytes = to1024(pixel * t.blocks * 4);
    t.stages = int(max64(2, min64(kToeplitzStages, (224 * 1024 - 2048 - kToeplitzBuffers * t.out_bytes) / t.in_bytes)));
    t.shared_bytes = t.stages * t.in_bytes + kToeplitzBuffers * t.out_bytes + 1024;
    // As measured.
    double const row_ns = R == 3 ? 400 : 450;
    consider_turns(t, d, [&](ToeplitzTile const& u) {
      double const ns = 7800 + toeplitz_walk_ns(u, p, toeplitz_rows(u, R, d), row_ns, d);
      if (best.ns == 0 || ns < best.ns) best = u, best.ns = ns;
    });
  }
  return best;
}

constexpr bool gather_strided(Row const& row, Op op, Problem const& p);

// With a dilation along the rows by which a filter reaches over more columns than a row of the table takes, x and y are
// images without one, their phases: every dilation_w-th column. Each is a launch of its own.
inline constexpr int64_t kToeplitzPhases = 18;
constexpr bool toeplitz_phased(int columns, Problem const& p) {
  int64_t const reach = (p.S - 1) * p.dilation_w;
  return reach > columns - 1 && p.dilation_w > 1 && p.dilation_w <= kToeplitzPhases && p.stride_w == 1 &&
         p.Q() == p.W && p.W >= p.dilation_w && p.pad_left % p.dilation_w == 0 && p.pad_left >= 0 &&
         p.pad_left <= reach;
}
constexpr Problem toeplitz_phase(Problem const& p, int64_t w) {
  Problem phase = p;
  phase.W = ceil_div(p.W - w, p.dilation_w), phase.dilation_w = 1;
  phase.pad_left = p.pad_left / p.dilation_w, phase.pad_right = p.S - 1 - phase.pad_left;
  align_phases(phase, false, true);
  phase.x.w *= p.dilation_w, phase.y.w *= p.dilation_w;
  return phase;
}
// What a launch takes less than one alone; wgrad: its sums are added once.
constexpr double toeplitz_phase_ns(Op op) { return op == Op::wgrad ? 7000 : 3000; }

constexpr bool toeplitz_supports(Row const& row, Op op, Problem const& p) {
  if (toeplitz_phased(row.tile_n, p)) return p.K == p.C && toeplitz_supports(row, op, toeplitz_phase(p, 0));
  // Two filters a channel; wgrad has no run of 8 columns of them alone.
  bool const pairs = p.K == 2 * p.C && p.stride_h == 1 && p.stride_w == 1 && p.dilation_w != 7 &&
                     (op == Op::wgrad ? p.Q() > 8 : row.tile_m <= 7);
  if (p.C_per_group() != 1 || (p.K != p.C && !pairs) || p.R > row.tile_m || (p.S - 1) * p.dilation_w > row.tile_n - 1)
    return false;
  if ((p.stride_h != 1 || p.stride_w != 1) && !gather_strided(row, op, p)) return false;
  if (op != Op::wgrad && row.tile_m >= 7 && p.dilation_w == 7) return false;  // toeplitz_gather.h
  if (p.N == 0 || p.C == 0 || p.H == 0 || p.W == 0 || p.P() == 0 || p.Q() == 0) return false;
  if (!channel_vectors(p.x, p.x_align, p.C, 8, p.dtype) || !channel_vectors(p.y, p.y_align, p.K, 8, p.dtype) ||
      !map_supports(p.x, p.N, p.H, p.W, p.dtype) || !map_supports(p.y, p.N, p.P(), p.Q(), p.dtype))
    return false;
  // Rows of all strips, and coordinates, are int.
  constexpr int64_t most = int64_t(1) << 29;
  double const columns = double(max64(p.W, p.Q())) + 8, rows = double(max64(p.H, p.P()) + p.dilation_h) + 8;
  return p.H + p.pad_top + p.pad_bottom < most && p.W + p.pad_left + p.pad_right < most && p.dilation_h < most / 8 &&
         double(p.N) * columns * rows < double(most);
}

}  // namespace conv2d_ext
