// stem_lean.cuh, fprop of a first layer in channels_last, 16 bits: what it takes, its cut of a problem and its
// estimate.
#pragma once

#include "stem.h"

namespace conv2d_ext {

inline constexpr int kStemLeanWarps = 4;  // of a block
inline constexpr int kStemLeanSteps = 3;  // of 8 words of the reduction, that registers hold

constexpr bool is_stem_lean(Row const& row) { return row.family == Family::stem && row.variant == Variant::lean; }

// A window is a pixel's inputs under a row of the filter: S x C neighbouring elements.
struct StemLean {
  bool pairs;          // all windows begin at the same half of a word: words are read whole
  int64_t shift;       // elements before a window, in its first word
  int64_t run, steps;  // words of a window; steps of 8 words
  int64_t blocks;      // of 8 filters, that a warp has; more filters are slabs of so many
  int64_t slabs, tiles_w, tiles;
  int64_t blocks_of_sm;
};

constexpr StemLean stem_lean(Problem const& p) {
  StemLean t{};
  int64_t const step = p.stride_w * p.C, first = p.pad_left * p.C;
  t.pairs = step % 2 == 0 && (p.H == 1 || p.x.h % 2 == 0) && (p.N == 1 || p.x.n % 2 == 0) && p.W * p.C % 2 == 0 &&
            p.x_align >= 4;
  t.shift = t.pairs ? first % 2 : 0;
  t.run = ceil_div(p.S * p.C + t.shift, 2), t.steps = ceil_div(p.R * t.run, 8);
  t.blocks = p.K <= 16 ? 2 : p.K <= 32 ? 4 : 8;
  t.slabs = ceil_div(p.K, t.blocks * 8);
  t.tiles_w = ceil_div(p.Q(), 16), t.tiles = p.N * p.P() * t.tiles_w;
  t.blocks_of_sm = t.blocks < 8 && t.steps < 3 && t.pairs ? 8 : 4;
  return t;
}

constexpr bool stem_lean_supports(Op op, Problem const& p) {
  if (op != Op::fprop || size_of(p.dtype) != 2 || p.groups != 1 || p.K % 8 != 0 || p.C > kStemMostChannels)
    return false;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0 || p.P() <= 0 || p.Q() <= 0) return false;
  if (p.dilation_w != 1 && p.S != 1) return false;
  if (p.R > 64 || p.S > 64 || p.stride_h > 64 || p.stride_w > 64 || p.dilation_h > 64) return false;
  StemView const v = stem_view(op, p);
  if (!stem_has_runs(v) || !stem_is_nhwc(v.out, v.K, v.Q) || !stem_has_vectors(true, v, p.y_align, 8, 2)) return false;
  // Coordinates, elements of an image's rows under a filter, and offsets of filters are int; so are divisions.
  constexpr int64_t most = int64_t(1) << 24;
  if (p.H > most || (p.W + p.pad_left + p.pad_right) * p.C > most || p.pad_top > most || p.x.h > most) return false;
  double const reach = double(p.K) * double(max64(p.w.n, 0)) + double(p.C) * double(max64(p.w.c, 0)) +
                       double(p.R) * double(p.w.h) + double(p.S) * double(p.w.w);
  StemLean const t = stem_lean(p);
  double const tiles = double(p.N) * double(p.P()) * double(t.tiles_w);
  return reach < 2e9 && tiles < 1e9 && tiles * double(t.tiles_w) < 4e9 &&
         double(p.N) * double(p.P()) * double(p.P()) < 4e9 && t.steps <= kStemLeanSteps && t.slabs < 65536;
}

constexpr Estimate stem_lean_estimate(Problem const& p, Device const& d) {
  StemLean const t = stem_lean(p);
  double const tile_ns = 12 + double(t.steps) * (t.pairs ? 9 : 16) + double(t.blocks) * (2 + double(t.steps));
  double const work = double(ceil_div(t.tiles * t.slabs, d.sm_count)) * tile_ns;
  double const bytes =
      double(p.N) * 2 * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  return {6300 + overlapped(work, bytes / 3500), 1};
}

}  // namespace conv2d_ext
