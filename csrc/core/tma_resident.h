// tma_resident.cuh, 1x1 filters that all stay in shared memory: what it takes, how it cuts a problem and what that
// costs. It is the second kernel of the rows of 64x128.
#pragma once

#include <cstdint>

#include "tma.h"

namespace conv2d_ext {

// Columns are filters, for dgrad channels; a chunk is a line's part of what is summed over.
struct ResidentShape {
  static constexpr int most = 512;              // columns of a block
  static constexpr int piece_bytes = 16 * 128;  // of results, of a warp
  static constexpr int room = 223 * 1024;       // of shared memory

  int columns = 128;           // that are multiplied at a time
  int groups = 0, pieces = 0;  // warpgroups that multiply, and pieces of each of their warps; 0: it does not fit
  int line = 0;
  int64_t chunks = 0, tiles = 0, tiles_n = 0, block_n = 0, stages = 0;

  constexpr ResidentShape(Op op, Problem const& p) : pieces(p.dtype == DType::f32 ? 4 : 2) {
    int64_t const C = op == Op::fprop ? p.C : p.K, N = op == Op::fprop ? p.K : p.C;
    if (p.dtype != DType::f32 && N > 128 && N <= 192) columns = 192;  // all at once
    line = p.dtype == DType::f32 ? 128 : tma_line(C);
    chunks = ceil_div(C * size_of(p.dtype), line);
    tiles = ceil_div(p.N * (op == Op::fprop ? p.P() * p.Q() : p.H * p.W), 64);
    for (int warpgroups : {3, 2}) {
      if (warpgroups == 3 && p.dtype == DType::f32) continue;
      groups = warpgroups;
      int64_t const left = room - groups * 4 * pieces * piece_bytes, stage_bytes = int64_t(groups) * 64 * line;
      // Pixels are met by several parts of the columns; they stay until the last.
      int64_t const fit = (left - (chunks + 1) * stage_bytes) / (chunks * line) / columns * columns;
      block_n = fit <= 0 ? columns : min64(fit, most);
      tiles_n = ceil_div(N, block_n);
      block_n = ceil_div(ceil_div(N, tiles_n), columns) * columns;
      tiles_n = ceil_div(N, block_n);
      stages = min64((left - chunks * block_n * line) / stage_bytes, kMaxStages);
      if (stages >= 2 && (block_n == columns || stages >= chunks)) return;
    }
    groups = 0;
  }
};

constexpr bool resident_supports(Op op, Problem const& p) {
  int const v = 16 / size_of(p.dtype);
  if (op == Op::wgrad || p.groups != 1 || p.R != 1 || p.S != 1) return false;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.P() == 0 || p.Q() == 0) return false;
  bool const forward = op == Op::fprop;
  if (!forward && (p.dtype == DType::f32 || min64(p.stride_h, p.H) > 1 || min64(p.stride_w, p.W) > 1)) return false;
  if (!channel_vectors(p.x, p.x_align, p.C, v, p.dtype) || !channel_vectors(p.w, p.w_align, p.C, v, p.dtype) ||
      !channel_vectors(p.y, p.y_align, p.K, v, p.dtype))
    return false;
  if (!map_supports(p.w, p.K, 1, 1, p.dtype) || !map_supports(p.x, p.N, p.H, p.W, p.dtype) ||
      !map_supports(p.y, p.N, p.P(), p.Q(), p.dtype))
    return false;
  if (!im2col_supports(walk_h(op, p, 0), forward ? p.H : p.P()) ||
      !im2col_supports(walk_w(op, p, 0), forward ? p.W : p.Q()))
    return false;
  // The result's pixels are rows of a matrix.
  Strides const& out = forward ? p.y : p.x;
  int64_t const H = forward ? p.P() : p.H, W = forward ? p.Q() : p.W;
  int64_t const row = W > 1 ? out.w : H > 1 ? out.h : out.n;
  if ((H > 1 && out.h != W * row) || (p.N > 1 && out.n != H * W * row)) return false;
  constexpr double most = 1 << 30;
  return double(p.N) * double(p.H) * double(p.W) < most && double(p.N) * double(p.P()) * double(p.Q()) < most &&
         double(max64(p.C, p.K)) < most && ResidentShape(op, p).groups > 0;
}

// Fewer tiles are left to the rows' first kernel.
constexpr bool takes_resident(Row const& row, Problem const& p) {
  return row.family == Family::tma && row.tile_m == 64 && row.tile_n == 128 && row.variant == Variant::im2col &&
         resident_supports(row.op, p) && ResidentShape(row.op, p).tiles * ResidentShape(row.op, p).tiles_n >= 132;
}

// What fprop or dgrad reads and writes, filters left out. Writing is slower than reading, and lines of memory that
// pixels share take longer; of 16-bit types, halves of them do not.
constexpr double memory_bound_ns(Op op, Problem const& p) {
  double const pixels = double(p.N) * double(op == Op::fprop ? p.P() * p.Q() : p.H * p.W) * size_of(p.dtype);
  double const C = double(p.C), K = double(p.K);
  double const ns = pixels * (op == Op::fprop ? C / 4280 + K / 3510 : K / 4280 + C / 3510);
  bool const shared = p.C % 32 != 0 || p.K % 32 != 0;  // 64 bytes; of floats 128
  return shared ? ns * 1.2 + 1000 : ns;
}

// Memory, or rounds of tiles. Fitted to 170 times of the rows (docs/tuning.md).
constexpr Estimate resident_estimate(Op op, Problem const& p, Device const& d) {
  ResidentShape const s(op, p);
  bool const tf32 = p.dtype == DType::f32, few = s.groups == 2 && !tf32;  // pixels under way
  double const N = double(op == Op::fprop ? p.K : p.C), parts = double(s.tiles_n);
  double const read = double(s.tiles) * 64 * double(s.chunks) * s.line;
  double ns = memory_bound_ns(op, p) + (s.tiles_n == 1 ? double(s.chunks - 1) * 300 : 0);
  if (few) {
    double const least = read * parts / 3900 + double(s.tiles) * 64 * N * size_of(p.dtype) / 3510;
    if (ns < least) ns = least;
  }
  int64_t const slots = max64(d.sm_count / s.tiles_n, 1) * s.groups, units = s.block_n / s.columns;
  double const tile_ns = double(units * s.chunks) * s.line * (s.groups == 2 ? 1.46 : 1.25) * s.columns / 128 +
                         N / parts / 128 * (tf32 ? 500 : 300);
  double const rounds = double(s.tiles) / double(slots) * 0.6 + double(ceil_div(s.tiles, slots)) * 0.4;
  double const work_ns = rounds * s.groups * tile_ns + double(s.chunks * s.block_n * s.line) / 65;
  // As measured: two stages hide little of what memory takes; all of up to 192 columns at once.
  double const share = !tf32 && s.stages == 2 ? 1.4 : s.columns == 192 ? 0.85 : 1;
  return {6500 + (ns > work_ns ? ns : work_ns) * share, 1};
}

}  // namespace conv2d_ext
