// stem_lean.cuh, fprop of a first layer in channels_last, 16 bits: what it takes, its cut of a problem and its
// estimate.
#pragma once

#include "stem.h"

namespace conv2d_ext {

inline constexpr int kStemLeanWarps = 4;  // of a block
inline constexpr int kStemLeanSteps = 3;  // of 8 words of the reduction, at most: registers hold them

constexpr bool is_stem_lean(Row const& row) { return row.family == Family::stem && row.variant == Variant::lean; }

// Blocks of an SM that its registers hold, of a kernel for so many blocks of 8 filters.
constexpr int stem_lean_blocks(int64_t blocks, int64_t steps, bool pairs) {
  return blocks < 8 && steps < 3 && pairs ? 6 : 4;
}

// A window is a pixel's inputs under a row of the filter: S x C neighbouring elements.
struct StemLean {
  bool pairs;                     // all windows begin at the same half of a word: words are read whole
  int64_t shift;                  // elements before a window, in its first word
  int64_t run, steps;             // words of a window; steps of 8 words
  int64_t blocks;                 // of 8 filters, that a warp has; more filters are slabs of so many
  int64_t slabs, tiles_w, tiles;  // tiles of 16 pixels
};

constexpr StemLean stem_lean(Op op, Problem const& p) {
  StemLean t{};
  StemView const v = stem_view(op, p);
  int64_t const step = v.stride_w * v.C, first = v.pad_w * v.C;
  int const align = op == Op::dgrad ? p.y_align : p.x_align;
  t.pairs = step % 2 == 0 && (v.H == 1 || v.in.h % 2 == 0) && (p.N == 1 || v.in.n % 2 == 0) && v.W * v.C % 2 == 0 &&
            align >= 4;
  t.shift = t.pairs ? (first % 2 + 2) % 2 : 0;
  t.run = ceil_div(p.S * v.C + t.shift, 2), t.steps = ceil_div(p.R * t.run, 8);
  t.slabs = ceil_div(v.K, 64), t.blocks = ceil_div(v.K, t.slabs * 16) * 2;
  t.tiles_w = ceil_div(v.Q, 16), t.tiles = p.N * v.P * t.tiles_w;
  return t;
}

constexpr bool stem_lean_supports(Op op, Problem const& p) {
  if (op == Op::wgrad || size_of(p.dtype) != 2 || p.groups != 1) return false;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0 || p.P() <= 0 || p.Q() <= 0) return false;
  if ((p.dilation_w != 1 && p.S != 1) || (op == Op::dgrad && (p.stride_h != 1 || p.stride_w != 1))) return false;
  if (p.R > 64 || p.S > 64 || p.stride_h > 64 || p.stride_w > 64 || p.dilation_h > 64) return false;
  StemView const v = stem_view(op, p);
  if (v.C > kStemMostChannels || v.K % 8 != 0 || !stem_has_runs(v) || !stem_is_nhwc(v.out, v.K, v.Q) ||
      !stem_has_vectors(true, v, op == Op::dgrad ? p.x_align : p.y_align, 8, 2))
    return false;
  // Coordinates, elements of the rows under a filter, and offsets of filters are int; divisions are of 32 bits.
  constexpr int64_t most = int64_t(1) << 24;
  if (v.H > most || (v.W + p.pad_left + p.pad_right) * v.C > most || p.pad_top > most) return false;
  if (double(p.R * p.dilation_h) * double(v.in.h) > 1e9) return false;
  double const reach = double(p.K) * double(max64(p.w.n, 0)) + double(p.C) * double(max64(p.w.c, 0)) +
                       double(p.R) * double(p.w.h) + double(p.S) * double(p.w.w);
  StemLean const t = stem_lean(op, p);
  double const rows = double(p.N) * double(v.P), tiles = rows * double(t.tiles_w);
  return reach < 2e9 && tiles < 1e9 && tiles * double(t.tiles_w) < 4e9 && rows * double(v.P) < 4e9 &&
         t.steps <= kStemLeanSteps && t.slabs < 65536;
}

// The filters, then rounds of tiles: products and stores, or bytes. Fitted to 173 layers, 5.3 % rms.
constexpr Estimate stem_lean_estimate(Op op, Problem const& p, Device const& d) {
  StemLean const t = stem_lean(op, p);
  StemView const v = stem_view(op, p);
  double const steps = double(t.steps), blocks = double(t.blocks);
  double const tile_ns = 17.5 + steps * (t.pairs ? 6.5 : 10.9) + 0.95 * blocks * steps;
  double const work = double(t.tiles * t.slabs) / d.sm_count * tile_ns;
  double const bytes =
      double(p.N) * 2 * (double(v.C) * double(v.H) * double(v.W) + double(v.K) * double(v.P) * double(v.Q));
  double const rounds = double(
      ceil_div(t.tiles * t.slabs, int64_t(d.sm_count) * kStemLeanWarps * stem_lean_blocks(t.blocks, t.steps, t.pairs)));
  return {6960 + 76 * steps * blocks + 87 * rounds + overlapped(work, bytes / 5170), 1};
}

}  // namespace conv2d_ext
