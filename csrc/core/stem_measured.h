// The estimates of stem's rows, with what was measured beside other rows.
#pragma once

#include "stem.h"
#include "stem_blocks.h"
#include "stem_halo.h"
#include "stem_lean.h"
#include "stem_lines.h"
#include "stem_taps.h"
#include "stem_vectors.h"
#include "stem_walks.h"

namespace conv2d_ext {

constexpr Estimate stem_as_measured(Row const& row, Op op, Problem const& p) {
  if (is_stem_lean(row)) {
    // As measured: 1x1 to one and two channels of large planes (2x64x388x388 to 1 D 44.4 us, estimated at 25.7).
    Estimate e = stem_lean_estimate(op, p, h200_sxm);
    if (op == Op::dgrad && p.dtype == DType::f32 && p.y.c != 1 && p.R * p.S == 1 && e.ns > 22000) e.ns *= 1.3;
    return e;
  }
  if (is_stem_halo(row)) {
    // As measured, in TF32: patches (16x3x224x224 to 96 4x4 s4 26.7 us, estimated at 24.0), small layers
    // (1x3x224x224 to 64 7x7 s4 13.2, in channels_last 12.9, estimated at 16.9), and results over planes whose rows
    // begin off 16 bytes (37x4x84x84 to 128 3x3 154, 76).
    Estimate e = stem_halo_estimate(op, p, h200_sxm);
    if (p.dtype == DType::f32 && p.y.c != 1 && p.Q() % 4 != 0 && p.R * p.S <= 25 && e.ns > 20000)
      e.ns += double(p.N) * double(p.K) * double(p.P()) * double(p.Q()) * 0.0027;
    // In 16 bits, large patches that meet padding (70x3x374x374 to 32 7x7 s7 260 us, estimated at 101).
    if (p.dtype != DType::f32 && p.stride_w >= 5 && p.pad_left > 0 && p.x.c == 1) e.ns *= 2.3;
    if (p.dtype == DType::f32 && p.R == p.stride_h && p.S == p.stride_w)
      e.ns *= 1.08;
    else if (p.dtype == DType::f32 && e.ns < 18000)
      e.ns -= 2500;
    return e;
  }
  if (is_stem_vectors(row)) return {stem_vectors(op, p, h200_sxm).ns, 1};
  if (is_stem_taps(row)) {
    Estimate e{StemTaps(op, p, h200_sxm).ns, 1};
    if (p.R * p.S == 1 && max64(p.C, p.K) <= 64 && p.x.c == 1 && min64(p.C, p.K) < 8)
      e.ns *= max64(p.C, p.K) <= 16 ? 1.28 : 1.1;
    return e;
  }
  if (is_stem_lines(row)) {
    Estimate e = stem_lines_estimate(op, p, h200_sxm);
    // As measured (L52): one channel, strict.
    if (op == Op::dgrad && p.C == 1 && p.y.c == 1 && p.stride_w <= 2 && stem_is_strict(p)) e.ns *= 1.15;
    // As measured: filters of one row over planes (200x16x48x48 to 3 1x7 88.0 us, estimated at 46.1).
    if (op == Op::fprop && p.R == 1 && p.y.c != 1) e.ns *= 1.3 + 0.08 * double(min64(p.S, 8));
    // As measured: strict sums over many planes (2x8x174x174 to 264 7x7 1,066 us, estimated at 715).
    if (op == Op::dgrad && p.K > 128 && p.y.c != 1) e.ns *= stem_is_strict(p) ? 1.35 : 1.2;
    return e;
  }
  if (op == Op::wgrad) return stem_sums_estimate(row, p, h200_sxm);
  if (!stem_is_narrow(row)) {
    Estimate e = stem_tile_estimate(row, op, p, h200_sxm);
    // As measured: long sums of several channels in TF32 (L01 285 us, estimated at 397).
    if (op == Op::fprop && p.dtype == DType::f32 && p.allow_tf32 && p.C > 1 && p.C * p.R * p.S >= 147) e.ns *= 0.82;
    // Likewise: filters that are no whole vectors (8x3x224x224 to 66 3x3 s2 51.6 us, estimated at 32.1).
    if (op == Op::fprop && p.dtype == DType::f32 && p.allow_tf32 && is_nhwc(row.variant) && row.tile_m == 64 &&
        p.K % 4 != 0 && e.ns > 25000)
      e.ns *= 1.5;
    // Likewise: large results of one tap over planes (6x1x338x338 to 32 70.0 us, estimated at 44.5).
    if (op == Op::fprop && p.dtype == DType::f32 && p.allow_tf32 && p.R * p.S == 1 && row.tile_m == 64 && p.y.c != 1 &&
        e.ns > 15000)
      e.ns *= 1.3;
    return e;
  }
  // As measured beside packed rows: 12x7x16x16 to 8 3x3 D 15.5 us, 64x64 10.7.
  Estimate e = stem_narrow_estimate(row, op, p, h200_sxm);
  if (op == Op::dgrad && size_of(p.dtype) == 2 && row.tile_m == 512 && e.ns > 11000 && e.ns < 25000) e.ns *= 1.1;
  return e;
}

}  // namespace conv2d_ext
