// stem_lines.cuh, as measured: what its blocks take as they walk down an image with the tile that stem_lines() chose.
// Apart from what kernels include, so that a new constant compiles none.
#pragma once

#include "stem_lines.h"

namespace conv2d_ext {

// Filters are loaded an element at a time before the first step. Of a step, neighbours' products are gathered by each
// block in turn; multiplications, stores and copies share the SM. Fitted to 383 times of random layers and 16 of
// networks.
constexpr Estimate stem_lines_estimate(Op op, Problem const& p, Device const& d) {
  StemLines const t = stem_lines(op, p, d);
  StemLinesAxis const h = stem_lines_axis_h(op, p), w = stem_lines_axis_w(op, p);
  bool const strict = !p.allow_tf32;
  int64_t const blocks = t.strips * t.slabs, slots = max64(1, d.sm_count * t.blocks_of_sm / t.slabs) * t.slabs;
  double const steps = double(ceil_div(blocks, slots)) * double(ceil_div(t.ends_h + h.warm, t.rows));
  double const of_sm = double(min64(t.blocks_of_sm, ceil_div(blocks, d.sm_count)));
  int64_t const across = t.wide ? 4 : 2, terms = ceil_div(p.S, w.stride);
  int64_t const turns = ceil_div(ceil_div(t.m_tiles, 2) * ceil_div(t.pixels / 8, across), 8);
  double const products = double(turns * across * t.steps), items = double(ceil_div(t.items, kStemThreads) * t.rows);
  double const copied = double(t.pixels * t.depth * size_of(p.dtype));
  double const byte_ns = t.vector <= 4 ? 0.0404 : 0.006;  // of vectors of one element, and of more
  double const step_ns = 634 + 112 * items * double(p.R * ceil_div(terms, 4)) +
                         of_sm * (products * (strict ? 142 : 32.3) + items * double(h.stride) * 122 + copied * byte_ns);
  // Over NCHW and in TF32 the other rows' estimates of large filters are 1.2 to 1.4 times too high (7x7, 11x11).
  double const beside = p.allow_tf32 && p.R * p.S >= 49 && p.x.c != 1 ? 1.4 : 1;
  return {(7910 + double(t.m_tiles * t.steps) * 134 + steps * step_ns) * beside, 1};
}

}  // namespace conv2d_ext
