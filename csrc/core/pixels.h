// pixels.cuh: fprop and dgrad of 1x1 filters in NCHW in TF32, read and written in place. What its rows take and cost,
// and what rows of 1x1 filters over images in place share.
#pragma once

#include <cstdint>

#include "pointwise.h"

namespace conv2d_ext {

// An image's pixels are cut into runs; a run's channels lie as lines of 128 bytes in shared memory.
constexpr int run_pixels(DType t) { return 128 / size_of(t); }

// Runs that wgrad adds up in one chain at most in TF32: the tensor cores cut off the lowest bits of a sum. 8192 pixels.
inline constexpr int kChainRuns = 256;

constexpr int64_t runs_of(Problem const& p) { return p.N * ceil_div(p.H * p.W, run_pixels(p.dtype)); }

// The channels that are summed over, and the result's.
constexpr int64_t pixels_depth(Op op, Problem const& p) { return op == Op::fprop ? p.C : p.K; }
constexpr int64_t pixels_columns(Op op, Problem const& p) { return op == Op::fprop ? p.K : p.C; }

// How they use shared memory: the filters of a block stay there if three stages of pixels fit beside them, or are part
// of the stages.
struct PixelsShape {
  static constexpr int bytes = 224 * 1024, most_stages = 8;
  int64_t chunks = 0;  // of the reduction
  bool keep = false;
  int stage_bytes = 0;
  int64_t stages = 0;

  constexpr PixelsShape(Row const& row, Problem const& p) : chunks(ceil_div(pixels_depth(row.op, p), kTf32Line)) {
    int const pixels = row.tile_m * kTf32Line * 4, filters = row.tile_n * kTf32Line * 4;
    keep = chunks * filters + 3 * pixels <= bytes;
    stage_bytes = pixels + (keep ? 0 : filters);
    stages = min64(most_stages, (bytes - (keep ? chunks * filters : 0)) / stage_bytes);
  }
};

// A group's problem. Of rows that take groups, which lie behind each other as an image's channels do, blockIdx.y counts
// them.
constexpr Problem group_of(Problem p) {
  p.C = p.C_per_group(), p.K = p.K_per_group(), p.groups = 1;
  return p;
}

// Blocks of a group that a GPU holds beside those of the others, one an SM.
constexpr int64_t group_blocks(Problem const& p, int64_t sm_count) { return max64(1, sm_count / p.groups); }

// A filter of one tap, with a stride of one, no padding and one group.
constexpr bool one_by_one(Problem const& p) {
  if (p.R != 1 || p.S != 1 || p.stride_h != 1 || p.stride_w != 1 || p.groups != 1) return false;
  if (p.pad_top != 0 || p.pad_bottom != 0 || p.pad_left != 0 || p.pad_right != 0) return false;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0) return false;
  constexpr double most = double(int64_t(1) << 31);
  return double(p.H) * double(p.W) < most / 2 && double(runs_of(p)) < most / 2 && p.C < most / 4 && p.K < most / 4;
}

// The channels of all groups, which lie alike.
constexpr Problem all_groups(Problem p) {
  p.groups = 1;
  return p;
}

// The same of each group, of so many channels and filters at least.
inline constexpr int64_t kLeastGroup = 4;
constexpr bool group_one_by_one(Problem const& p) {
  if (p.groups == 1) return one_by_one(p);
  return p.groups > 1 && p.groups < 1 << 15 && min64(p.C_per_group(), p.K_per_group()) >= kLeastGroup &&
         one_by_one(all_groups(p));
}

// Can the copy engine read and write the images as they lie?
constexpr bool pixel_planes(Problem const& p) {
  if (!one_by_one(p)) return false;
  if (!pixel_vectors(p.x, p.x_align, p) || !pixel_vectors(p.y, p.y_align, p)) return false;
  auto rows = [&](int64_t size, int64_t step) {
    return size == 1 || (step > 0 && step % (16 / size_of(p.dtype)) == 0 && step < int64_t(1) << 38);
  };
  return rows(p.C, p.x.c) && rows(p.K, p.y.c);
}

constexpr bool group_planes(Problem const& p) { return group_one_by_one(p) && pixel_planes(all_groups(p)); }

// Does L2 give up the pixels of fprop and dgrad first? What they would put out of it, results of kernels before among
// it, has to be written back. As measured: not where lines of memory are two runs' (16-bit types), nor where tiles of
// filters find pixels there later.
constexpr bool pixels_once(Problem const& p) {
  int64_t const plane = p.H * p.W * size_of(p.dtype);
  double const bytes = double(p.N) * double(p.C + p.K) * double(plane);
  return bytes > 10e6 && bytes < 60e6 && (plane % 128 == 0 || p.dtype == DType::f32);
}

constexpr bool pixels_supports(Row const& row, Op op, Problem const& p) {
  if (!p.allow_tf32 || !group_planes(p)) return false;
  return p.groups * ceil_div(pixels_columns(op, group_of(p)), row.tile_n) <= 132 && double(p.C) * double(p.K) < 1e9;
}

constexpr int64_t pixels_workspace_bytes(Row const& row, Op op, Problem const& p) {
  return pixels_columns(op, p) * PixelsShape(row, group_of(p)).chunks * kTf32Line * 4;
}

// Tiles in rounds, each of its steps and its stores, or memory, which writes more slowly than it
// reads. The fewer rounds, the less these overlap. Fitted to times of the rows (docs/tuning.md).
constexpr Estimate pixels_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  Problem const g = group_of(p);
  PixelsShape const s(row, g);
  double const TM = row.tile_m, TN = row.tile_n, area = TM * TN;
  int64_t const group_tiles = ceil_div(pixels_columns(op, g), row.tile_n), tiles_n = p.groups * group_tiles;
  int64_t const tiles_m = ceil_div(runs_of(p), row.tile_m / run_pixels(p.dtype));
  int64_t const rounds = ceil_div(tiles_m, max64(1, d.sm_count / tiles_n));
  double const busy = rounds > 1 ? 1 : double(tiles_m * tiles_n) / d.sm_count;  // of the SMs, which share L2
  double const multiply = area / 32 * (rounds == 1 ? 1.34 : 1.29) * (TN == 256 && !s.keep ? 1.02 : 1),
               copied = (TM + (s.keep ? 0 : TN)) * 3.46 * busy;
  double step_ns = tf32_step_ns(multiply, 0, copied);
  if (!s.keep && TN == 64 && step_ns < 550) step_ns = 550;
  double const tile_ns = double(s.chunks) * step_ns + 828 + 0.052 * area;
  // The filters are rounded into lines beforehand, dgrad's are turned as well, and those that stay are copied first.
  double const weights = double(s.chunks) * TN * 128;
  double const prepare_ns = weights * double(tiles_n) / (op == Op::fprop ? 3920 : 515);
  double const before = 4840 + prepare_ns + (s.keep ? weights / 43 : 0);
  // Tiles of filters beyond the first find the pixels in L2.
  double const in = double(pixels_depth(op, p)), out = double(pixels_columns(op, p)), again = double(group_tiles - 1);
  double const memory_ns =
      double(p.N) * double(p.H) * double(p.W) * 4 * (in / 6300 + in * again / 12190 + out / 5100) * 132 / d.sm_count;
  double const ns = double(rounds) * tile_ns;
  double const most = ns > memory_ns ? ns : memory_ns, least = ns > memory_ns ? memory_ns : ns;
  // As measured: long sums for a second tile of 256 that is half empty (1x320x128x128 to 1280 D 103 us, estimated at
  // 84.5).
  bool const idle = TN == 256 && out > 256 && out <= 384 && in >= 256;
  return {(before + most + least / double(rounds + 1)) * (idle ? 1.06 : 1), 1};
}

}  // namespace conv2d_ext
