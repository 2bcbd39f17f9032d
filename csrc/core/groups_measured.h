// Rows over groups, as measured beside each other: what the estimates of grouped_*.h and tma.h leave out.
#pragma once

#include "grouped.h"
#include "grouped_any.h"
#include "grouped_few.h"
#include "grouped_slabs.h"
#include "images.h"
#include "merged.h"
#include "pack.h"
#include "plain.h"
#include "plain_rows.h"
#include "planes.h"
#include "tma.h"
#include "turned.h"

namespace conv2d_ext {

// wgrad of a few rows of an image in 16-bit types by rows as they lie, as measured beside packed ones.
constexpr double small_plain_share(Problem const& p) {
  if (size_of(p.dtype) != 2 || p.N * p.P() * p.Q() > 1000 || (p.C_per_group() >= 48 && p.stride_w == 1)) return 1;
  return p.Q() <= 14 ? 0.91 : p.stride_w > 1 ? 0.65 : 0.83;
}

// Lines in channels_last, as measured: ns more, of wgrad beside merged groups, of dgrad of small layers with a stride.
constexpr double lines_as_measured_ns(Row const& row, Problem const& p, double ns) {
  if (row.family != Family::grouped || row.variant != Variant::lines || p.x.c != 1) return 0;
  bool const strided = p.stride_w > 1;
  if (row.op == Op::dgrad) return strided && p.dtype != DType::f32 && p.C_per_group() == 24 && ns < 20000 ? 4500 : 0;
  if (row.op == Op::fprop) return 0;
  // Groups off 16 bytes, which multiply what their results meet (20 a group, 32x320x28x28 35.7 us, estimated at 44.0).
  bool const shared = p.C_per_group() % 8 == 4 && p.C_per_group() > 8;
  if (p.dtype != DType::f32) return strided ? 1800 : shared && ns > 24000 ? -0.15 * ns : 900;
  return p.allow_tf32 && p.C_per_group() < 16 && ns < 40000 ? ns * (strided ? 0.2 : 0.12) : 0;
}

// Rows over groups, as measured beside each other: how much longer they take than was estimated.
constexpr double groups_as_measured(Row const& row, Problem const& p) {
  bool const strided = p.stride_w > 1, f32 = p.dtype == DType::f32, halo = is_halo(row.variant);
  int64_t const C = p.C_per_group(), line = 128 / size_of(p.dtype);
  if (is_planes(row) || is_turned(row) || is_plain(row) || is_plain_rows(row)) return 1;
  if (is_images(row) || is_slabs(row) || is_few_groups(row)) return 1;
  if (row.family == Family::grouped && row.variant == Variant::lines && strided && !grouped_planar(p)) {
    if (row.op == Op::wgrad) return !f32 ? (C == 16 && p.Q() <= 16 ? 1.03 : 0.93) : p.allow_tf32 && C >= 16 ? 1.3 : 1;
    return row.op == Op::fprop && f32 && p.allow_tf32 && C >= 16 ? 0.86 : 1;
  }
  bool const planar_lines = row.family == Family::grouped && row.variant == Variant::lines && grouped_planar(p);
  if (planar_lines && row.op == Op::fprop && strided && p.W <= 28) return f32 && p.W <= 14 ? 0.75 : 0.85;
  if (planar_lines && row.op == Op::dgrad && strided && !f32) return 0.91;
  if (planar_lines && row.op == Op::wgrad && f32 && p.allow_tf32) return 1.1;
  // Beside whole small images.
  if (row.family == Family::grouped && row.op == Op::wgrad && !f32 && !planar_lines && C == 16 && p.Q() <= 16)
    return row.variant == Variant::lines ? 1.1 : 1;
  // NCHW in 16-bit types, turned two pixels at a time.
  if (row.family == Family::grouped)
    return planar_lines && row.op == Op::wgrad && !f32 && !strided && p.W % 2 == 0 && p.H * p.W % 8 != 0 ? 0.9 : 1;
  if (row.family != Family::tma || p.groups == 1 || sliced_groups(row, p) > 1) return 1;
  auto is = [&](int tile_m, int tile_n) { return row.tile_m == tile_m && row.tile_n == tile_n; };
  if (row.op == Op::wgrad) {
    if (f32) return strided && is(256, 64) && C > 32 ? 0.9 : 1;
    if (row.variant == Variant::narrow) return channel_vectors(p.x, p.x_align, C, 8, p.dtype) ? 0.78 : 0.95;
    if (is(576, 64)) return C > 32 ? 0.83 : 1;
    // Lines that end early; those of whole instructions leave some out.
    bool const across = C % line != 0 && C > 32, whole = C % 16 == 0;
    if (across && strided) return (is(64, 64) ? 1.35 : is(128, 128) ? 1.12 : 1) * (whole ? 0.8 : 1.05);
    if (whole && across && !strided) return is(64, 64) ? 1.1 : 0.77;
    if (is(64, 64)) return strided ? 1.35 : 1.1;
    if (is(256, 64)) return strided && C > 32 ? 1.1 : 1;
    return strided && is(128, 128) ? 1.12 : 1;
  }
  if (f32) {
    // Lines that begin off 32 bytes.
    int64_t const depth = row.op == Op::dgrad ? p.K_per_group() : C;
    if (depth < line && depth % 8 != 0 && is(256, 64) && halo) return row.op == Op::dgrad ? 1.33 : strided ? 1.55 : 1.6;
    bool const across = strided && C > line && C % line != 0;
    if (row.op == Op::dgrad && strided && is(256, 64) && C > 16 && C < 32) return 1.2;
    if (row.op == Op::dgrad) return across && halo ? (is(256, 64) ? 1.3 : is(128, 64) ? 0.86 : 1) : 1;
    if (across) return is(128, 128) ? 1.12 : is(256, 64) ? (halo ? 0.86 : 0.7) : 1;
    if (C <= line && is(256, 64) && halo) return !strided ? 1.05 : C >= 24 ? 1.4 : 1;
    return C < line && is(256, 32) ? 1.2 : 1;
  }
  bool const planes = p.x.c > 1, fprop = row.op == Op::fprop;
  if (planes && strided && is(256, 64)) return fprop ? (halo ? 1.25 : 1.18) : halo ? 1.08 : 1;
  if (strided && is(256, 64) && halo) return 1.15;
  // Small layers.
  if (fprop && C <= 32 && planes && is(64, 64)) return 1.3;
  if (fprop && C <= 32 && !strided && halo && is(128, 64)) return 1.25;
  if (row.op == Op::dgrad && strided && is(256, 128) && C > line && C % line != 0) return halo ? 1.22 : 1.15;
  if ((!fprop || C <= 32) && !strided && C % line != 0 && C < 96 && is(256, 64) && halo) return 1.15;
  if (!strided && C > line && C <= 96 && is(256, 96) && halo) return 0.85;
  if (row.op == Op::fprop && !strided && C > line && C % line == 0 && is(128, 128)) return 1.15;
  return C < line && C > 32 && ((is(128, 64) && halo) || is(64, 64)) ? 1.2 : 1;
}

// grouped_lines.cuh's 3x3 in channels_last in float32, as measured since nothing is divided in its loop, beside others
// (TF32 8x96x28x28 in 4 groups F 12.4 us, 16.4 by 256x64; strict 8x64x28x28 s2 in 4 11.5, 13.2).
constexpr double lines_of_3x3(Row const& row, Problem const& p, double ns) {
  bool const lines = row.family == Family::grouped && row.variant == Variant::lines && row.op != Op::wgrad;
  if (!lines || p.dtype != DType::f32 || p.R != 3 || p.S != 3 || grouped_planar(p)) return 1;
  return (p.allow_tf32 ? ns > 13000 : ns < 32000) ? 0.95 : 1;
}

// The same of fprop and dgrad by tma, 16-bit types, packed or not, and small layers of TF32.
constexpr double groups_with_packing_ns(Row const& row, Problem const& p, bool packs, double ns) {
  if (row.family == Family::tma && row.variant == Variant::im2col && row.op == Op::fprop && p.dtype == DType::f32 &&
      p.groups > 1 && !packs && p.R * p.S > 1 && p.R * p.S <= 25 && ns < 17000)
    return ns * (row.tile_m == 64 && p.C_per_group() <= 32                  ? 1.13
                 : row.tile_m == 128 && row.tile_n >= 128 && p.stride_w > 1 ? 1.2
                                                                            : 1);
  if (row.family != Family::tma || row.op == Op::wgrad || p.groups == 1 || size_of(p.dtype) != 2) return ns;
  bool const backward = row.op == Op::dgrad;
  if (packs) {
    bool const small = backward && row.tile_m == 64 && row.tile_n == 64 && p.stride_w == 1 && p.C_per_group() <= 64;
    bool const few = !backward && row.tile_m == 64 && row.tile_n == 64;  // 4x432x14x14 in 9 groups 18.2 us, 13.4
    return ns * (p.R * p.S == 1 ? 1.1 : few ? 1.03 : 1) + (small ? 3300 : 0);
  }
  // 32x768x12x12 3x3 s2 in 6 groups 18.3 us by 256x128 halo, estimated at 15.2.
  bool const slow = is_halo(row.variant) && row.tile_n == 128 && p.stride_w > 1 && ns < 26000;
  if (backward && row.tile_m == 256)
    return is_halo(row.variant) && p.stride_w == 1 ? 0.96 * ns + 2000 : slow ? ns : 0.9 * ns;
  return row.tile_m == 192 && row.tile_n == 128 ? 1.08 * ns : ns;
}

constexpr Estimate grouped_measured(Row const& row, Op op, Problem const& p, Packed const& q, Device const& d) {
  if (row.variant != Variant::lines)
    return op == Op::wgrad ? grouped_sums_any_estimate(row, p, d) : grouped_any_estimate(op, p, d);
  return op == Op::wgrad ? grouped_estimate(row, op, q.problem, d)
                         : grouped_lines_any_estimate(op, q.problem, d, q.which.any());
}

}  // namespace conv2d_ext
