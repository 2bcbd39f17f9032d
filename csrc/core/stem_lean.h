// stem_lean.cuh, fprop of a first layer by short sums: what it takes and its cut of a problem.
#pragma once

#include "stem.h"

namespace conv2d_ext {

inline constexpr int kStemLeanWarps = 4;  // of a block
// Steps of 8 words of the reduction, at most: registers hold them.
constexpr int64_t stem_lean_steps(int64_t size) { return size == 4 ? 4 : 3; }

constexpr bool is_stem_lean(Row const& row) { return row.family == Family::stem && row.variant == Variant::lean; }

// Blocks of an SM that its registers hold, of a kernel for so many blocks of 8 filters.
constexpr int stem_lean_blocks(int64_t blocks, int64_t steps, bool pairs, bool nhwc, bool strict) {
  if (strict) return blocks == 2 ? 4 : blocks == 4 ? 3 : 2;
  return blocks == 8 || steps >= 3 || !pairs ? 4 : steps == 1 || blocks == 2 || (nhwc && blocks == 4) ? 6 : 5;
}

// A window is a pixel's inputs under a line of the filter: S x C neighbouring elements, or S of a plane.
struct StemLean {
  bool nhwc;                      // results of a pixel lie together
  bool pairs;                     // all windows begin at the same part of a word: words are read whole
  int64_t vector;                 // results that are stored together: 4, or in NCHW 2; 1
  int64_t together, lines;        // channels of a window; windows of a pixel
  int64_t shift;                  // elements before a window, in its first word
  int64_t run, steps;             // words of a window; steps of 8 words
  int64_t blocks;                 // of 8 filters, that a warp has; more filters are slabs of so many
  int64_t slabs, tiles_w, tiles;  // tiles of 16 pixels
};

constexpr StemLean stem_lean(Op op, Problem const& p) {
  StemLean t{};
  StemView const v = stem_view(op, p);
  int64_t const per_word = 4 / size_of(p.dtype);
  t.nhwc = stem_is_nhwc(v.out, v.K, v.Q), t.together = stem_has_runs(v) ? v.C : 1, t.lines = p.R * v.C / t.together;
  int64_t const step = v.stride_w * t.together, first = v.pad_w * t.together;
  int const align = op == Op::dgrad ? p.y_align : p.x_align;
  auto const whole = [&](int64_t stride) { return stride % per_word == 0; };
  t.pairs = whole(step) && (v.H == 1 || whole(v.in.h)) && (p.N == 1 || whole(v.in.n)) &&
            (t.together == v.C || whole(v.in.c)) && whole(v.W * t.together) && align >= 4;
  auto const cut = [&] {
    t.shift = t.pairs ? (first % per_word + per_word) % per_word : 0;
    t.run = ceil_div(p.S * t.together + t.shift, per_word), t.steps = ceil_div(t.lines * t.run, 8);
  };
  cut();
  if (t.pairs && t.shift != 0 && t.steps > stem_lean_steps(size_of(p.dtype))) t.pairs = false, cut();
  t.slabs = ceil_div(v.K, 64), t.blocks = ceil_div(v.K, t.slabs * 16) * 2;
  t.tiles_w = ceil_div(v.Q, 16), t.tiles = p.N * v.P * t.tiles_w;
  int const out_align = op == Op::dgrad ? p.x_align : p.y_align;
  auto const vectors = [&](int64_t of) {
    auto const whole = [&](int64_t stride) { return stride % of == 0; };
    return out_align >= of * size_of(p.dtype) && whole(v.out.n) && whole(v.out.h) &&
           (t.nhwc ? v.out.c == 1 && whole(v.K) && whole(v.out.w)
                   : (v.Q == 1 || v.out.w == 1) && whole(v.out.c) && whole(v.Q));
  };
  t.vector = vectors(t.nhwc ? 4 * per_word : 4) ? 4 : !t.nhwc && vectors(2) ? 2 : 1;
  if (stem_is_strict(p)) t.steps = max64(t.steps, stem_lean_steps(4));  // of which alone there are kernels
  return t;
}

constexpr bool stem_lean_supports(Op op, Problem const& p) {
  if (op == Op::wgrad || size_of(p.dtype) > 4 || p.groups != 1) return false;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0 || p.P() <= 0 || p.Q() <= 0) return false;
  if ((p.dilation_w != 1 && p.S != 1) || (op == Op::dgrad && (p.stride_h != 1 || p.stride_w != 1))) return false;
  if (p.R > 64 || p.S > 64 || p.stride_h > 64 || p.stride_w > 64 || p.dilation_h > 64) return false;
  StemView const v = stem_view(op, p);
  if (stem_is_strict(p) && v.C * p.R * p.S < kStemStrictLeast) return false;
  if (v.C > kStemMostChannels || !(stem_has_runs(v) || v.W == 1 || v.in.w == 1)) return false;
  // Coordinates, elements under a filter, and offsets of filters are int; divisions are of 32 bits.
  constexpr int64_t most = int64_t(1) << 24;
  if (v.H > most || (v.W + p.pad_left + p.pad_right) * v.C > most || p.pad_top > most) return false;
  if (double(p.R * p.dilation_h) * double(v.in.h) + double(v.C) * double(v.in.c) > 1e9) return false;
  double const reach = double(p.K) * double(max64(p.w.n, 0)) + double(p.C) * double(max64(p.w.c, 0)) +
                       double(p.R) * double(p.w.h) + double(p.S) * double(p.w.w);
  StemLean const t = stem_lean(op, p);
  if (t.nhwc && t.vector != 4 && size_of(p.dtype) == 2) return false;
  double const rows = double(p.N) * double(v.P), tiles = rows * double(t.tiles_w);
  return reach < 2e9 && tiles < 1e9 && tiles * double(t.tiles_w) < 4e9 && rows * double(v.P) < 4e9 &&
         t.steps <= stem_lean_steps(size_of(p.dtype)) && t.slabs < 65536;
}

}  // namespace conv2d_ext
