// tma_matrix.cuh: what its rows take, their tiles, and what they cost.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "period.h"
#include "reads_once.h"
#include "row.h"

namespace conv2d_ext {

inline constexpr int kMatrixStages = 12;  // at most
inline constexpr int kMatrixSharedBytes = 227 * 1024;
inline constexpr int kMatrixBeside = 24 * 1024;  // for blocks of the second pass, which wait for the first

constexpr bool is_matrix(Row const& row) { return row.family == Family::tma && row.variant == Variant::lines; }
// Over NCHW, what pixels_runs.h supports: tile_m filters (dgrad: channels), wgmma's columns, by tile_n pixels.
constexpr bool is_matrix_planes(Row const& row) {
  return row.family == Family::pixels && row.variant == Variant::lines;
}

// A row's tile is tile_m pixels (wgrad: filters), wgmma's columns, by tile_n filters (dgrad and wgrad: channels), its
// rows, 64 a warpgroup.
// b_rows: columns come in runs of 64. staged: results leave through shared memory, not as parts of sums.
template <int tile_m, int tile_n, bool b_rows = false, bool staged_ = true>
struct MatrixTile {
  static_assert(tile_m % 16 == 0 && tile_m <= 256 && tile_n % 64 == 0 && tile_n <= 192);
  static constexpr int columns = tile_m, rows = tile_n;
  static constexpr bool staged = staged_;
  static constexpr int groups = rows / 64, multiplying = groups * 128,
                       threads = multiplying + 32;  // and one that copies
  static constexpr int a_bytes = rows * 128,
                       stage_bytes = a_bytes + int(b_rows ? ceil_div(columns, 64) * 64 : columns) * 128;
  static constexpr int staging_bytes = staged ? rows * columns * 2 : 0;  // of results
  static constexpr int fit = (kMatrixSharedBytes - 2048 - (staged ? staging_bytes : kMatrixBeside)) / stage_bytes;
  static constexpr int stages = fit < kMatrixStages ? fit : kMatrixStages;
  static constexpr int shared_bytes = 1024 + staging_bytes + stages * stage_bytes;
};

// Are pixels, channels side by side, the rows of a matrix?
constexpr bool matrix_pixels(Strides const& s, int align, int64_t channels, Problem const& p) {
  return channel_vectors(s, align, channels, 16 / size_of(p.dtype), p.dtype) &&
         map_supports(s, p.N, p.H, p.W, p.dtype) && (p.N * p.H * p.W == 1 || matrix_stride(s, p) > 0);
}

constexpr bool matrix_supports(Op op, Problem const& p) {
  if (p.R != 1 || p.S != 1 || p.stride_h != 1 || p.stride_w != 1 || p.groups != 1) return false;
  if (p.pad_top != 0 || p.pad_bottom != 0 || p.pad_left != 0 || p.pad_right != 0) return false;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0) return false;
  constexpr double most = 1 << 30;
  if (double(p.N) * double(p.H) * double(p.W) >= most || double(max64(p.C, p.K)) >= most) return false;
  if (op == Op::wgrad && p.C > 1 && p.K > 1 && matrix_period(p) > 1)
    return p.w.c == 1 && max64(p.C, p.K) <= 8192 && p.C * p.K <= 1 << 19 && p.N * p.H * p.W >= 1024;  // 64 MiB of parts
  if (!channel_vectors(p.w, p.w_align, p.C, 16 / size_of(p.dtype), p.dtype) || !map_supports(p.w, p.K, 1, 1, p.dtype))
    return false;
  return matrix_pixels(p.x, p.x_align, p.C, p) && matrix_pixels(p.y, p.y_align, p.K, p);
}

// Of the last step of a sum: its channels, or pixels, in whole instructions of 16.
constexpr int matrix_last(int64_t depth) { return int(ceil_div((depth + 63) % 64 + 1, 16) * 16); }

// The product that a problem is: the result's rows and columns, the sum's length, and the elements that lie side by
// side in memory, of A, B and the result.
struct MatrixProduct {
  int64_t rows, columns, depth;
  int64_t side_a, side_b, side_out;
  bool planes = false, b_rows;  // rows are pixels; columns lie side by side in memory
  double copied = 1;            // beside times of when boxes reached beyond images (single blocks)

  // turned: wgrad's filters are rows.
  constexpr MatrixProduct(Op op, Problem const& p, bool turned = false)
      : rows(op == Op::fprop || turned ? p.K : p.C),
        columns(op != Op::wgrad ? p.N * p.H * p.W
                : turned        ? p.C
                                : p.K),
        depth(op == Op::fprop   ? p.C
              : op == Op::dgrad ? p.K
                                : p.N * p.H * p.W),
        side_a(turned ? p.K : p.C),
        side_b(op == Op::fprop || turned ? p.C : p.K),
        side_out(rows),
        b_rows(op == Op::wgrad) {}
};

// The same over NCHW.
constexpr MatrixProduct matrix_planes_product(Op op, Problem const& p) {
  MatrixProduct product(op, p);
  product.columns = product.rows, product.rows = p.N * ceil_div(p.H * p.W, 64) * 64;
  product.side_a = product.side_out = p.H * p.W, product.side_b = p.C;
  product.planes = true, product.b_rows = op == Op::dgrad;
  double const there = double(p.N * p.H * p.W) / double(product.rows);
  // As measured; 28x28 gains 1 to 3 % in all.
  if (p.N >= 4 && there < 0.9) product.copied = there > 0.75 ? there : 0.75;
  return product;
}

// Rows are int.
constexpr bool matrix_planes_supports(Row const& row, Problem const& p) {
  return matrix_planes_product(row.op, p).rows < int64_t(1) << 30;
}

// Blocks along the rows, which share B, by blocks along the columns, which share A.
struct MatrixCluster {
  int m = 1, n = 1;
  constexpr int blocks() const { return m * n; }
};

// Clusters that a GPU of so many SMs holds at a time, a block an SM.
constexpr int64_t matrix_clusters(int blocks, int64_t sm_count) {
  return blocks == 4 ? sm_count * 30 / 132 : sm_count / blocks;
}

// Tiles of fprop and dgrad that have no kernels for clusters.
constexpr bool matrix_alone(int tile_m, int tile_n) { return tile_n == 64 && tile_m >= 192; }

// turned: parts of wgrad have filters as rows.
struct MatrixCut {
  double ns = 0;
  MatrixCluster cluster;
  int64_t parts = 1;
  bool turned = false;
};

// Rows of a matrix that begin within a sector of 32 bytes: copies of them, above all from L2, take longer. Clusters pay
// there alone.
constexpr bool matrix_odd(int64_t channels) { return channels % 16 != 0; }

// Fitted to 3,932 times of one half of 374 layers (docs/tuning.md), in ns: a launch, 500 to 800 less than measured, as
// the other rows' estimates leave so much out of such layers; of 128 rows of a tile, a column of it and one of a step's
// products; a line that is copied to the block in a step, or from L2 by all; bytes a ns that are read, of B and of A,
// and written. Rows that end within lines of memory (across: fprop's and dgrad's the more the shorter they are) or
// begin within sectors (odd) take so much longer. What is not the longest of products, memory and L2 counts by `rest`.
// Clusters take longer, as a launch and in each step. spread: copies where nearly all SMs have a block and 16 of these
// or more have rows of A of their own that blocks far apart share (fprop's and dgrad's by the choices that it mends),
// in long sums (spread_steps) from 72 SMs.
struct MatrixTimes {
  double launch, column, product, line, line_across, l2, l2_odd;
  double read, read_across, filters, written, written_across, memory_odd, rest, cluster, cluster_step, spread,
      spread_steps;
};
inline constexpr MatrixTimes kMatrixTimes[] = {
    // fprop
    {4390, 3.43, 1.94, 0.605, 1.25, 0.42, 3.13, 4360, 0.856, 3720, 6950, 0.774, 0, 0.513, 414, 7.7, 0.6, 24},
    // dgrad
    {4330, 3.51, 1.85, 0.578, 1.18, 0.611, 2.85, 4140, 0.143, 3030, 7720, 2.39, 0.116, 0.479, 488, 5.3, 0.6, 1e9},
    // wgrad
    {4490, 4.04, 1.9, 0.669, 0.312, 0.719, 1.49, 49700, 1.38, 30900, 4880, 0.114, 0.308, 0.526, 1200, 15.1, 0, 1e9}};

// Do blocks that follow each other have the same rows, rather than the same columns? They read what they share once,
// and what blocks far apart share several times: the operand that more tiles cut should be read once.
constexpr bool matrix_n_first(int64_t units_m, int64_t units_n) { return units_n < units_m && units_n <= 8; }

// Over NCHW, where rows are pixels, tiles of 128 rows gain by it up to more columns (128x1280x8x8 to 1280 D by 128x128
// 58.0 us, so 42.4); those of 64 lose.
constexpr bool matrix_planes_n_first(int tile_n, int64_t units_m, int64_t units_n) {
  return tile_n == 128 && units_n * 2 <= units_m && units_n <= 16;
}

constexpr double matrix_ns(MatrixTimes const& t, bool wgrad, int tile_m, int tile_n, MatrixProduct const& product,
                           MatrixCluster const& cluster) {
  bool const alone = cluster.blocks() == 1;
  int64_t const tiles_a = ceil_div(product.rows, tile_n);
  int64_t const room = matrix_clusters(cluster.blocks(), 132), units_m = ceil_div(tiles_a, cluster.m),
                units_n = ceil_div(ceil_div(product.columns, tile_m), cluster.n), units = units_m * units_n;
  auto longer = [wgrad](int64_t side, double across, double odd) {
    return 1 + (side % 64 == 0 ? 0 : wgrad ? across : across * 64 / double(side)) + (matrix_odd(side) ? odd : 0);
  };
  auto bytes = [](int64_t rows, int64_t columns) { return double(rows) * double(columns) * 2; };
  double const steps = double(ceil_div(product.depth, 64)), columns = double(tile_m) * tile_n / 128;
  int64_t const blocks = units * cluster.blocks();
  bool const spread = tiles_a >= 16 && (blocks >= 112 || (blocks >= 72 && steps >= t.spread_steps));
  double const lines_b = double(product.b_rows ? ceil_div(tile_m, 64) * 64 : tile_m);
  double const copies =
      t.line *
      (tile_n * longer(product.side_a, t.line_across, 0) + lines_b * longer(product.side_b, t.line_across, 0)) *
      (spread ? 1 + t.spread * (matrix_n_first(units_m, units_n) && tiles_a < 32 ? 0.5 : 1) : 1);
  double const products = t.product * columns;
  double const step = (products > copies ? products : copies) + (alone ? 0 : t.cluster_step);
  double const work = double(ceil_div(units, room)) * (steps * step + t.column * columns);
  bool const planes = product.planes;
  double const memory =
      bytes(planes ? product.rows : product.columns, product.depth) / t.read *
          longer(planes ? product.side_a : product.side_b, t.read_across, t.memory_odd) +
      bytes(planes ? product.columns : product.rows, product.depth) / t.filters +
      bytes(product.columns, product.rows) / t.written * longer(product.side_out, t.written_across, t.memory_odd);
  double const l2 = t.l2 * double(units) / double(room) * steps *
                    (double(tile_n) / cluster.n * longer(product.side_a, t.line_across, t.l2_odd) +
                     lines_b / cluster.m * longer(product.side_b, t.line_across, t.l2_odd));
  double longest = work > memory ? work : memory;
  if (l2 > longest) longest = l2;
  return t.launch + (longest + t.rest * (work + memory + l2 - longest)) * (alone ? product.copied : 1) +
         (alone ? 0 : t.cluster);
}

// Tiles of wgrad in parts, those that a cluster has beyond the last ones too.
constexpr int64_t matrix_parts_tiles(int tile_m, int tile_n, MatrixProduct const& product, MatrixCluster const& c) {
  return ceil_div(product.rows, tile_n * c.m) * ceil_div(product.columns, tile_m * c.n) * c.blocks();
}

// Of wgrad in parts.
constexpr MatrixProduct matrix_parts_product(Problem const& p, bool turned) {
  MatrixProduct product(Op::wgrad, p, turned);
  product.depth /= max64(matrix_period(p), 1);  // 0: matrix_supports() refuses the problem
  product.rows = matrix_shifted(product.rows, p.dtype), product.columns = matrix_shifted(product.columns, p.dtype);
  return product;
}

// wgrad in parts, as many blocks as there are SMs, or two thirds. Fitted to 405 times of 38 layers (docs/tuning.md),
// less what the other rows' estimates leave out: a step, and each line that is copied in it, of channels that do not
// fill lines more, but less where a cluster shares them; or memory, and a part of the other; then the second pass.
constexpr MatrixCut matrix_parts_cut(int tile_m, int tile_n, Problem const& p) {
  auto line = [](int64_t channels, bool shared) {
    double const ns = channels % 64 == 0 ? 0.4 : channels % 32 == 0 ? 0.78 : channels % 16 == 0 ? 1.32 : 1.4;
    return shared ? 1.23 * (0.4 + (ns - 0.4) * 0.22) : ns;
  };
  double const area = double(tile_m) * tile_n, bytes = double(p.N * p.H * p.W) * double(p.C + p.K) * 2;
  MatrixCut best;
  int const period = matrix_period(p);
  for (bool const turned : {false, true}) {
    if (period > 1 && !turned) continue;
    MatrixProduct const product = matrix_parts_product(p, turned);
    for (MatrixCluster const cluster : {MatrixCluster{1, 1}, MatrixCluster{2, 1}, MatrixCluster{1, 2}}) {
      bool const alone = cluster.blocks() == 1;
      if (!alone && (period > 1 || (!matrix_odd(p.C) && !matrix_odd(p.K)))) continue;
      if (product.rows <= tile_n * (cluster.m - 1) || product.columns <= tile_m * (cluster.n - 1)) continue;
      int64_t const tiles = matrix_parts_tiles(tile_m, tile_n, product, cluster), steps = ceil_div(product.depth, 64),
                    most =
                        period > 1 ? max64(min64(132 / tiles / period, steps / 3), 1) : min64(132 / tiles, steps / 3);
      auto lines = [](int64_t tile, int64_t channels) { return double(ceil_div(min64(tile, channels), 64) * 64); };
      double const copies = lines(tile_n, product.rows) * line(product.side_a, cluster.n > 1) +
                            lines(tile_m, product.columns) * line(product.side_b, cluster.m > 1) + (alone ? 0 : 7);
      double const step = 125 + (copies > area / 96 ? copies : area / 96);
      for (int64_t const each_parts : {most, most * 2 / 3}) {
        int64_t const parts = each_parts * period;
        if (parts < 2) continue;
        double const blocks = double(tiles * parts),
                     each = double(ceil_div(steps, each_parts) * ceil_div(tiles * parts, 132)) * step;
        double const memory =
            bytes / (period == 1 && reads_once(p) ? 4760 : 3560) * (blocks < 68 ? 68 / blocks : 1) + 1660;
        double ns = 5700 + (each > memory ? each + 0.27 * memory : memory + 0.27 * each) + area * 0.006 +
                    (alone ? 0 : 510) + blocks * area * 8 / 3590;
        // As measured: tiles that share lines (64x160x28x28 to 320 by 96x128 30.5 us, 128x128 24.9).
        if (tile_m % 64 != 0 && product.columns > tile_m) ns *= 1.15;
        if (period > 1) {  // single sums are added; short lines
          ns += blocks * area * 8 / 8975 + double(p.K * p.C) * 0.02;
          if (min64(p.C, p.K) <= 12) ns *= 1.2;
        }
        if (best.ns == 0 || ns < best.ns) best = {ns, cluster, parts, turned};
      }
    }
  }
  return best;
}

constexpr MatrixCut matrix_cut(Op op, int tile_m, int tile_n, Problem const& p) {
  MatrixProduct const product(op, p);
  auto ns_of = [&](MatrixCluster const& cluster) {
    return matrix_ns(kMatrixTimes[int(op)], op == Op::wgrad, tile_m, tile_n, product, cluster);
  };
  MatrixCut best{ns_of({}), {}};
  if (op == Op::wgrad && matrix_period(p) > 1) return matrix_parts_cut(tile_m, tile_n, p);
  bool const odd = matrix_odd(p.C) || matrix_odd(p.K), alone = op != Op::wgrad && matrix_alone(tile_m, tile_n);
  // As measured: 128x1096x14x14 to 384 F by 256x64 68.1 us, 144x128 46.4; filters that stay (tma_resident.h) are first.
  if (alone) best.ns *= odd ? 1.1 : tile_m == 256 ? 1.01 : 1;
  if (!alone && odd)
    for (MatrixCluster const cluster : {MatrixCluster{2, 1}, MatrixCluster{1, 2}, MatrixCluster{2, 2}})
      if (double const ns = ns_of(cluster); ns < best.ns) best = {ns, cluster};
  if (op == Op::wgrad)
    if (MatrixCut const cut = matrix_parts_cut(tile_m, tile_n, p); cut.parts > 1 && cut.ns < best.ns) best = cut;
  return best;
}

constexpr int64_t matrix_workspace_bytes(Row const& row, Problem const& p) {
  if (row.op != Op::wgrad) return 0;
  MatrixCut const cut = matrix_cut(row.op, row.tile_m, row.tile_n, p);
  if (cut.parts == 1) return 0;
  MatrixProduct const product = matrix_parts_product(p, cut.turned);
  return matrix_parts_tiles(row.tile_m, row.tile_n, product, cut.cluster) * cut.parts * row.tile_m * row.tile_n * 4;
}

// Over NCHW: fitted to 1,503 times of 219 layers (docs/tuning.md); a launch is 600 less than measured.
inline constexpr MatrixTimes kMatrixPlanesTimes[] = {
    // fprop
    {6120, 3.33, 1.62, 0.631, 2.02, 0.371, 0, 5180, 1.72, 29600, 8350, 0.0241, 0, 0.848, 0, 0, 0, 0},
    // dgrad
    {6350, 2.83, 1.54, 0.0579, 5.13, 0.473, 0, 6120, 0.02, 21600, 5830, 0.168, 0, 0.809, 0, 0, 0, 0}};

constexpr Estimate matrix_planes_estimate(Row const& row, Problem const& p) {
  MatrixProduct const product = matrix_planes_product(row.op, p);
  return {matrix_ns(kMatrixPlanesTimes[int(row.op)], false, row.tile_m, row.tile_n, product, {}), 1};
}

}  // namespace conv2d_ext
