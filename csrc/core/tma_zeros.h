// tma_zeros.cuh, dgrad of 1x1 filters with a stride: what it takes and what that costs. It is the second kernel of the
// row of 128x256 with im2col.
#pragma once

#include <cstdint>

#include "tma.h"

namespace conv2d_ext {

// Of x and filters, at least: fewer leave the warps that write zeros too little time.
inline constexpr int64_t kZerosChannels = 1024;

constexpr bool takes_zeros(Row const& row, Problem const& p) {
  return row.family == Family::tma && row.op == Op::dgrad && row.variant == Variant::im2col && row.tile_m == 128 &&
         row.tile_n == 256 && size_of(row.dtype) == 2 && p.R * p.S == 1 && p.stride_h == 2 && p.stride_w == 2 &&
         p.groups == 1 && p.pad_top == 0 && p.pad_bottom == 0 && p.pad_left == 0 && p.pad_right == 0 &&
         p.C >= kZerosChannels && p.K >= kZerosChannels && channel_vectors(p.x, p.x_align, p.C, 8, p.dtype) &&
         tma_supports(row, p);
}

// The pixels that have a tap, as the problem of a convolution of stride one.
constexpr Problem zeros_apart(Problem p) {
  int64_t const P = p.P(), Q = p.Q();
  p.x.h *= p.stride_h, p.x.w *= p.stride_w;
  p.H = P, p.W = Q, p.stride_h = p.stride_w = 1;
  return p;
}

constexpr Estimate zeros_estimate(Row const& row, Problem const& p, Device const& d) {
  double const ns = tma_estimate(row, Op::dgrad, zeros_apart(p), d).ns * 1.15;  // as measured
  double const memory_ns = (double(p.N) * double(p.C) * double(p.H) * double(p.W) +
                            double(p.N) * double(p.K) * double(p.P()) * double(p.Q())) *
                               size_of(p.dtype) / 3440 +
                           6680;
  return {ns > memory_ns ? ns : memory_ns, 1};
}

}  // namespace conv2d_ext
