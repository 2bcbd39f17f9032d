// fprop and dgrad of strip.cuh, as measured. Apart from what the kernel includes, so that a new constant compiles none.
#pragma once

#include "strip.h"

namespace conv2d_ext {

// NCHW. Copies by how rows are aligned, FMAs, and rounds of blocks. dgrad reads y for each phase of a stride.
// Fitted, in us, to 500 times.
constexpr Estimate strip_planes_estimate(Op op, Problem const& p, Device const& d) {
  StripTile const t = strip_tile(op, p, false);
  bool const backward = op == Op::dgrad, whole = t.h.whole() && t.w.whole();
  int const together = t.images >= kStripImages ? int(ceil_div(32, t.images)) : t.group < 32 ? t.group : 32;
  double const parts =
      backward ? 1.0 : double(t.h.parts) * double(t.w.parts);  // dgrad's classes have one each, or none
  double const taps = strip_met(t.h, together) * t.h.most_taps() * t.chunks * 4 * parts;
  double const fmas = double(ceil_div(t.items(), 32) * 32) * kStripWidth * taps;
  double const blocks = double(t.blocks(p.N)) / d.sm_count, share = blocks < 1 ? 1 : blocks;  // of an SM
  double const resident = double(max64(2, min64(16, 896 / max64(32, t.items()))));
  double const rounds = blocks < resident ? 1 : blocks / resident;
  double const megabytes =
      double(p.N) * double(p.C) * (double(p.H) * double(p.W) + double(p.P()) * double(p.Q())) * 4e-6;
  int64_t const aligned = gcd64(gcd64(p.W, p.Q()), 4);
  double const copy = !whole ? (p.stride_w > 1 ? 1.21 : 1.55) : aligned == 4 ? 0.54 : aligned == 2 ? 1.13 : 1.45;
  int64_t const phases = backward ? p.stride_h * p.stride_w : 1;
  int64_t root = 1;
  while ((root + 1) * (root + 1) <= phases) ++root;
  double us = 6.16 + share * fmas / (128 * 1755) * 0.523 + megabytes * copy +
              share * double(t.images) * double(t.plane_bytes) * (whole && aligned == 4 ? 1.55e-5 : 2.4e-5) +
              rounds * (2.31 * parts + 0.0149 * taps);
  if (phases > 1) us += rounds * 1.35 * double(root) + double(phases) * megabytes * (phases > 4 ? 0.516 : 0.251);
  return {us * 1000, 1};
}

// channels_last. Rounds of blocks: filters and planes that threads copy, vectors at best, and parts of taps, each after
// the other; FMAs; bytes, of dgrad y's for each phase of a stride. Fitted, in us, to 607 times.
constexpr Estimate strip_lines_estimate(Op op, Problem const& p, Device const& d) {
  StripTile const t = strip_tile(op, p, true);
  bool const backward = op == Op::dgrad, whole = t.h.whole() && t.w.whole(),
             vectors = channel_vectors(p.x, p.x_align, p.C, 4, p.dtype);
  int const together = t.images >= kStripImages ? int(ceil_div(32, t.images)) : t.group < 32 ? t.group : 32;
  double const parts = backward ? 1.0 : double(t.h.parts) * double(t.w.parts);
  double const taps = strip_met(t.h, together) * t.h.most_taps() * t.chunks * 4 * parts;
  int64_t const threads = ceil_div(t.items(), 32) * 32, blocks = ceil_div(t.blocks(p.N), d.sm_count);
  int64_t const room = max64(1, min64(min64(kStripSharedBytes / (t.shared_bytes + 1024), 896 / threads), 16));
  double const plane_bytes = double(t.channels) * double(t.images) * double(t.plane_bytes) * parts;
  double const round =
      1.94 * parts + 0.4 * double(ceil_div(t.channels * p.R * p.S, threads)) + plane_bytes / double(threads) * 0.0159;
  double const megabytes =
      double(p.N) * double(p.C) * (double(p.H) * double(p.W) + double(p.P()) * double(p.Q())) * 4e-6;
  int64_t const phases = backward ? p.stride_h * p.stride_w : 1;
  double const us = 7.33 + double(ceil_div(blocks, room)) * round +
                    double(blocks) * (double(threads) * kStripWidth * taps / (128 * 1755) * 1.36 +
                                      (whole ? 0 : plane_bytes * (vectors ? 1.84e-5 : 2.08e-5))) +
                    megabytes * (0.389 + (vectors ? 0 : 0.784) + (phases > 1 ? 0.539 * double(phases) : 0));
  return {us * 1000, 1};
}

}  // namespace conv2d_ext
