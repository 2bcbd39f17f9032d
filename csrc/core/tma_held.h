// tma_held.cuh, dgrad of 3x3 filters with a stride of two, tma_held_ahead.cuh and tma_held_part.cuh, 3x3 of few
// channels: what they take, how they cut a problem and what that costs. They are the second kernels of the rows of
// 256x96 with halo, in TF32 of those of 256x32.
#pragma once

#include <cstdint>

#include "tma.h"

namespace conv2d_ext {

// Tiles are rectangles of `width` by `height` pixels of one image, columns of an instruction. A slot of shared memory
// has them and `more` rows below, 64 channels of each.
struct HeldCut {
  int64_t width = 0, height = 0, pixels = 0, slot_bytes = 0;
  int64_t columns = 0, rows = 0, tiles = 0;

  constexpr HeldCut(int64_t N, int64_t H, int64_t W, int64_t more, int64_t most = 128) {
    double least = 0;
    for (int64_t w = 1; w <= most && w < W + 8; ++w)
      for (int64_t h = 1; h * w <= most && h < H + 8; ++h) {
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

// tma_held_ahead.cuh and tma_held_part.cuh. The channels that are summed over, the results, channels that fill a line.
constexpr int64_t ahead_depth(Op op, Problem const& p) { return op == Op::fprop ? p.C : p.K; }
constexpr int64_t ahead_results(Op op, Problem const& p) { return op == Op::fprop ? p.K : p.C; }
constexpr int64_t ahead_line(Problem const& p) { return p.dtype == DType::f32 ? 32 : 64; }

constexpr HeldCut ahead_cut(Op op, Problem const& p, int64_t most = 128) {
  bool const forward = op == Op::fprop;
  return HeldCut(p.N, forward ? p.P() : p.H, forward ? p.Q() : p.W, p.stride_h == 1 ? 2 : 1, most);
}

constexpr bool ahead_or_part_supports(Op op, Problem const& p) {
  bool const forward = op == Op::fprop, f32 = p.dtype == DType::f32;
  if (p.R != 3 || p.S != 3 || p.stride_h != p.stride_w || p.stride_h > (forward ? 2 : 1)) return false;
  if (p.dilation_h != 1 || p.dilation_w != 1 || p.groups != 1 || p.H < 2 || p.W < 2) return false;
  if ((f32 && !forward) || double(p.N) * double(p.H + 2) * double(p.W + 2) >= 1e9) return false;
  int64_t const v = f32 ? 4 : 8;
  return channel_vectors(p.x, p.x_align, p.C, v, p.dtype) && channel_vectors(p.w, p.w_align, p.C, v, p.dtype) &&
         channel_vectors(p.y, p.y_align, p.K, v, p.dtype) && map_supports(p.w, p.K, p.R, p.S, p.dtype) &&
         map_supports(every_other(p.x), p.N, p.H, p.W, p.dtype) && map_supports(p.y, p.N, p.P(), p.Q(), p.dtype);
}

// As measured: with a stride of one, channels that fill their lines.
constexpr bool ahead_supports(Op op, Problem const& p) {
  int64_t const C = ahead_depth(op, p), N = ahead_results(op, p), line = ahead_line(p);
  bool const takes = p.stride_h == 2 ? C > line / 2 && C <= line : C == line || (C == 128 && N <= 64 && line == 64);
  return takes && N > 32 && ahead_or_part_supports(op, p);
}

// As measured: with a stride of one 64 channels, too, where tiles are of 112 pixels; to up to 96 results, for which the
// rows have a tile of their own, from up to 96 channels and in more than three rounds.
constexpr bool part_supports(Op op, Problem const& p) {
  int64_t const C = ahead_depth(op, p), N = ahead_results(op, p);
  if (p.dtype == DType::f32 || C < 64 || C > 128 || N <= 64 || !ahead_or_part_supports(op, p)) return false;
  if (C == 64) return p.stride_h == 1 && ahead_cut(op, p).pixels == 112;
  return N > 96 || (C <= 96 && N % 16 == 0 && ahead_cut(op, p, 112).tiles > 3 * 132);
}

constexpr bool takes_held(Row const& row, Problem const& p) {
  bool const f32 = p.dtype == DType::f32;
  if (row.family != Family::tma || row.variant != Variant::halo || row.tile_m != 256) return false;
  if (row.tile_n != (f32 ? 32 : 96)) return false;
  return ahead_supports(row.op, p) || part_supports(row.op, p) || (!f32 && row.op == Op::dgrad && held_supports(p));
}

// Rounds of tiles, or memory. Fitted to 60 layers.
constexpr Estimate held_estimate(Op op, Problem const& p, Device const& d) {
  bool const part = part_supports(op, p), ahead = !part && ahead_supports(op, p), strided = p.stride_h == 2;
  HeldCut const cut = part ? ahead_cut(op, p, 112) : ahead ? ahead_cut(op, p) : held_cut(p);
  int64_t const C = ahead_depth(op, p), N = ahead_results(op, p), line = ahead_line(p);
  int64_t const parts = ceil_div(N, part || (ahead && C <= line && N > 64) ? 128 : 64);
  int64_t const tiles = ahead && C <= line && N <= 64 ? ceil_div(cut.tiles, 2) : cut.tiles;
  double const rounds = double(ceil_div(tiles, max64(d.sm_count / parts, 1)) * ceil_div(parts, d.sm_count));
  double before = ahead ? 7400 : 7600, tile_ns = C > 96 ? 2930 : C > 64 ? 2500 : 1750;
  if (ahead) tile_ns = ((strided ? 3050 : 2720) + (C > line ? 250 : 0)) * (C < line ? 0.88 : 1);
  if (part) {
    before = C > 96 ? 11600 : C > 64 ? 11000 : 7400;
    tile_ns = C > 96 ? (strided ? 6400 : 4950) : C > 64 ? (strided ? 4700 : 3900) : 2600;
  }
  double const ns = before + rounds * tile_ns * double(cut.pixels) / 112;
  double const bytes = double(p.N) * size_of(p.dtype) *
                       (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  bool const f32 = p.dtype == DType::f32;
  double const memory_ns = f32 ? 8000 + bytes / 3690 : 1500 + bytes / 3350;
  // Beside other rows' estimates: those of 256x64 are a tenth too low in many rounds.
  double share = f32 ? 0.88 : part && C > 96 && !strided && rounds >= 8 ? 0.97 : 1;
  if (!f32 && (N % 16 != 0 || C % 16 != 0))  // pixels begin within sectors
    share = part && C > 64 ? (N % 16 != 0 ? 1.2 : 1.15) : 1.3;
  return {(ns > memory_ns ? ns : memory_ns) * share, 1};
}

}  // namespace conv2d_ext
