// tma_held.cuh, dgrad of 3x3 filters with a stride of two, and tma_held_ahead.cuh, 3x3 of few channels: what they take,
// how they cut a problem and what that costs. They are the second kernels of the rows of 256x96 with halo.
#pragma once

#include <cstdint>

#include "tma.h"

namespace conv2d_ext {

// Tiles are rectangles of `width` by `height` pixels of one image, columns of an instruction. A slot of shared memory
// has them and `more` rows below, 64 channels of each.
struct HeldCut {
  int64_t width = 0, height = 0, pixels = 0, slot_bytes = 0;
  int64_t columns = 0, rows = 0, tiles = 0;

  constexpr HeldCut(int64_t N, int64_t H, int64_t W, int64_t more) {
    double least = 0;
    for (int64_t w = 1; w <= 128 && w < W + 8; ++w)
      for (int64_t h = 1; h * w <= 128 && h < H + 8; ++h) {
        int64_t const n = h * w <= 112 ? 112 : 128, lines = w * (h + more);
        if (lines > 192) continue;
        // Beside the products, copies of lines, and short rows.
        double const cost =
            double(ceil_div(W, w) * ceil_div(H, h)) * (double(n) + double(lines) * 0.2 + 10.0 / double(w));
        if (least != 0 && cost >= least) continue;
        least = cost, width = w, height = h, pixels = n;
        slot_bytes = max64(ceil_div(lines, 8) * 1024, 16 * 1024);  // which filters come by, too
      }
    columns = ceil_div(W, width), rows = ceil_div(H, height), tiles = N * columns * rows;
  }
};

// Blocks of each of `parts`.
constexpr int64_t held_blocks(int64_t tiles, int64_t parts, int64_t sm_count) {
  return min64(tiles, max64(sm_count / parts, 1));
}

constexpr HeldCut held_cut(Problem const& p) { return HeldCut(p.N, ceil_div(p.H, 2), ceil_div(p.W, 2), 1); }

// Every other row and column of a tensor.
constexpr Strides every_other(Strides s) {
  s.h *= 2, s.w *= 2;
  return s;
}

constexpr bool held_supports(Problem const& p) {
  return p.R == 3 && p.S == 3 && p.K <= 128 && p.C > 32 && phases_together_support(p) &&
         map_supports(every_other(p.x), p.N, p.H, p.W, p.dtype) && double(p.N) * double(p.H) * double(p.W) < 1e9;
}

// tma_held_ahead.cuh.
constexpr HeldCut ahead_cut(Op op, Problem const& p) {
  bool const forward = op == Op::fprop;
  return HeldCut(p.N, forward ? p.P() : p.H, forward ? p.Q() : p.W, p.stride_h == 1 ? 2 : 1);
}

constexpr bool ahead_supports(Op op, Problem const& p) {
  bool const forward = op == Op::fprop;
  if (p.R != 3 || p.S != 3 || p.stride_h != p.stride_w || p.stride_h > (forward ? 2 : 1)) return false;
  if (p.dilation_h != 1 || p.dilation_w != 1 || p.groups != 1 || p.H < 2 || p.W < 2) return false;
  int64_t const C = forward ? p.C : p.K, N = forward ? p.K : p.C;
  // As measured: with a stride of one, channels that fill their lines.
  bool const takes = p.stride_h == 2 ? C > 32 && C <= 64 : C == 64 || (C == 128 && N <= 64);
  if (!takes || N <= 32 || double(p.N) * double(p.H + 2) * double(p.W + 2) >= 1e9) return false;
  return channel_vectors(p.x, p.x_align, p.C, 8, p.dtype) && channel_vectors(p.w, p.w_align, p.C, 8, p.dtype) &&
         channel_vectors(p.y, p.y_align, p.K, 8, p.dtype) && map_supports(p.w, p.K, p.R, p.S, p.dtype) &&
         map_supports(every_other(p.x), p.N, p.H, p.W, p.dtype) && map_supports(p.y, p.N, p.P(), p.Q(), p.dtype);
}

constexpr bool takes_held(Row const& row, Problem const& p) {
  if (row.family != Family::tma || row.variant != Variant::halo || row.tile_m != 256 || row.tile_n != 96) return false;
  return ahead_supports(row.op, p) || (row.op == Op::dgrad && held_supports(p));
}

// Rounds of tiles, or memory. Fitted to 60 layers.
constexpr Estimate held_estimate(Op op, Problem const& p, Device const& d) {
  bool const ahead = ahead_supports(op, p), forward = op == Op::fprop;
  HeldCut const cut = ahead ? ahead_cut(op, p) : held_cut(p);
  int64_t const C = forward ? p.C : p.K, N = forward ? p.K : p.C;
  int64_t const parts = ceil_div(N, ahead && C <= 64 && N > 64 ? 128 : 64);
  int64_t const tiles = ahead && C <= 64 && N <= 64 ? ceil_div(cut.tiles, 2) : cut.tiles;
  double const rounds = double(ceil_div(tiles, max64(d.sm_count / parts, 1)) * ceil_div(parts, d.sm_count));
  double tile_ns = !ahead ? (C > 96   ? 2930
                             : C > 64 ? 2500
                                      : 1750)
                          : (p.stride_h == 1 ? 2720 : 3050) + (C > 64 ? 250 : 0);
  if (ahead && C < 64) tile_ns *= 1.25;
  double const before = ahead ? 7400 : 7600, ns = before + rounds * tile_ns * double(cut.pixels) / 112;
  double const bytes = double(p.N) * size_of(p.dtype) *
                       (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  double const memory_ns = 1500 + bytes / 3350;
  // Results whose pixels begin within sectors.
  return {(ns > memory_ns ? ns : memory_ns) * (N % 16 == 0 && C % 16 == 0 ? 1 : 1.3), 1};
}

}  // namespace conv2d_ext
