// tma_matrix.cuh: what its rows take, their tiles, and what they cost.
#pragma once

#include <cstdint>

#include "row.h"

namespace conv2d_ext {

inline constexpr int kMatrixStages = 12;  // at most
inline constexpr int kMatrixSharedBytes = 227 * 1024;

constexpr bool is_matrix(Row const& row) { return row.family == Family::tma && row.variant == Variant::lines; }

// A row's tile is tile_m pixels, wgmma's columns, by tile_n filters (dgrad: channels), its rows, 64 a warpgroup.
template <int tile_m, int tile_n>
struct MatrixTile {
  static_assert(tile_m % 16 == 0 && tile_m <= 256 && tile_n % 64 == 0 && tile_n <= 128);
  static constexpr int columns = tile_m, rows = tile_n;
  static constexpr int groups = rows / 64, threads = groups * 128 + 32;  // warpgroups that multiply; and one warp
  static constexpr int a_bytes = rows * 128, stage_bytes = a_bytes + columns * 128;
  static constexpr int staging_bytes = rows * columns * 2;  // of results
  static constexpr int fit = (kMatrixSharedBytes - 2048 - staging_bytes) / stage_bytes;
  static constexpr int stages = fit < kMatrixStages ? fit : kMatrixStages;
  static constexpr int shared_bytes = 1024 + staging_bytes + stages * stage_bytes;
};

// From pixel to pixel, where all pixels are equally far apart; 0: they are not.
constexpr int64_t matrix_stride(Strides const& s, Problem const& p) {
  int64_t const step = p.W > 1 ? s.w : p.H > 1 ? s.h : s.n;
  return (p.H > 1 && s.h != p.W * step) || (p.N > 1 && s.n != p.H * p.W * step) ? 0 : step;
}

constexpr bool matrix_supports(Problem const& p) {
  int const v = 16 / size_of(p.dtype);
  if (p.R != 1 || p.S != 1 || p.stride_h != 1 || p.stride_w != 1 || p.groups != 1) return false;
  if (p.pad_top != 0 || p.pad_bottom != 0 || p.pad_left != 0 || p.pad_right != 0) return false;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0) return false;
  if (!channel_vectors(p.x, p.x_align, p.C, v, p.dtype) || !channel_vectors(p.w, p.w_align, p.C, v, p.dtype) ||
      !channel_vectors(p.y, p.y_align, p.K, v, p.dtype))
    return false;
  if (!map_supports(p.w, p.K, 1, 1, p.dtype) || !map_supports(p.x, p.N, p.H, p.W, p.dtype) ||
      !map_supports(p.y, p.N, p.H, p.W, p.dtype))
    return false;
  constexpr double most = 1 << 30;
  if (double(p.N) * double(p.H) * double(p.W) >= most || double(max64(p.C, p.K)) >= most) return false;
  return p.N * p.H * p.W == 1 || (matrix_stride(p.x, p) > 0 && matrix_stride(p.y, p) > 0);
}

// What the two blocks of a pair share, and so read half as often.
enum class MatrixPair : uint8_t { none, pixels, filters };

struct MatrixCut {
  double ns = 0;
  MatrixPair pair = MatrixPair::none;
};

// Rows of a matrix that begin within a sector of 32 bytes: copies of them, above all from L2, take longer. Pairs pay
// there alone.
constexpr bool matrix_odd(int64_t channels) { return channels % 16 != 0; }

// Fitted to 1,641 times of 212 problems (docs/tuning.md), in ns: a launch, 1,500 less than measured, as the other rows'
// estimates leave so much out of such layers; of 128 rows of a tile, a column of it and one of a step's products; a
// line that is copied to the block in a step, or from L2 by all; bytes a ns that are read, of pixels and of filters,
// and written. Rows that end within lines of memory (across) or begin within sectors (odd) take so much longer. Rounds
// are in part as long as their mean. What is not the longest of products, memory and L2 counts by `rest`. Pairs take
// longer, as a launch and in each step.
struct MatrixTimes {
  double launch, column, product, line, line_across, line_odd, l2, l2_odd;
  double read, read_across, filters, written, written_across, memory_odd, mean, rest, pair, pair_step;
};
inline constexpr MatrixTimes kMatrixTimes[] = {
    // fprop
    {4840, 3.91, 2.01, 0.716, 0.0944, 0.592, 0.519, 2.58, 4050, 0.154, 1630, 5850, 0.499, 0, 0.153, 0.402, 599, 12.2},
    // dgrad
    {4960, 3.18, 2.25, 0.74, 0.49, 0, 0.537, 3.78, 3640, 0.255, 2360, 4820, 0.128, 0.559, 0.174, 0.269, 586, 12.7}};

constexpr double matrix_ns(Op op, int tile_m, int tile_n, Problem const& p, MatrixPair pair) {
  bool const dgrad = op == Op::dgrad, alone = pair == MatrixPair::none;
  MatrixTimes const& t = kMatrixTimes[dgrad ? 1 : 0];
  int const cm = pair == MatrixPair::pixels ? 2 : 1, cn = pair == MatrixPair::filters ? 2 : 1, room = 132 / (cm * cn);
  int64_t const pixels = p.N * p.H * p.W, depth = dgrad ? p.K : p.C, channels = dgrad ? p.C : p.K;
  int64_t const units = ceil_div(ceil_div(channels, tile_n), cm) * ceil_div(ceil_div(pixels, tile_m), cn);
  auto longer = [](int64_t row, double across, double odd) {
    return 1 + (row % 64 != 0 ? across : 0) + (matrix_odd(row) ? odd : 0);
  };
  double const steps = double(ceil_div(depth, 64)), columns = double(tile_m) * tile_n / 128;
  double const copies =
      t.line * (tile_n * longer(p.C, t.line_across, t.line_odd) + tile_m * longer(depth, t.line_across, t.line_odd));
  double const products = t.product * columns;
  double const step = (products > copies ? products : copies) + (alone ? 0 : t.pair_step);
  double const mean = double(units) / room, rounds = double(ceil_div(units, room)) * (1 - t.mean) + mean * t.mean;
  double const work = rounds * (steps * step + t.column * columns);
  double const read = double(pixels) * double(depth) * 2 / t.read * longer(depth, t.read_across, t.memory_odd),
               written =
                   double(pixels) * double(channels) * 2 / t.written * longer(channels, t.written_across, t.memory_odd);
  double const memory = read + double(p.K) * double(p.C) * 2 / t.filters + written;
  double const l2 = t.l2 * mean * steps *
                    (double(tile_n) / cn * longer(p.C, t.line_across, t.l2_odd) +
                     double(tile_m) / cm * longer(depth, t.line_across, t.l2_odd));
  double longest = work > memory ? work : memory;
  if (l2 > longest) longest = l2;
  return t.launch + longest + t.rest * (work + memory + l2 - longest) + (alone ? 0 : t.pair);
}

constexpr MatrixCut matrix_cut(Op op, int tile_m, int tile_n, Problem const& p) {
  MatrixCut best{matrix_ns(op, tile_m, tile_n, p, MatrixPair::none), MatrixPair::none};
  if (!matrix_odd(p.C) && !matrix_odd(p.K)) return best;
  for (MatrixPair pair : {MatrixPair::pixels, MatrixPair::filters})
    if (double const ns = matrix_ns(op, tile_m, tile_n, p, pair); ns < best.ns) best = {ns, pair};
  return best;
}

}  // namespace conv2d_ext
