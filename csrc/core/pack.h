// Packing: tensors that a row of tma, of grouped's lines, of igemm, of simt's nhwc or of depthwise layers in two
// layouts cannot read or write in place are copied to the workspace, channels_last, each group's channels and filters
// padded with zeros to what the row takes; the row then runs on the packed problem, and a result is copied back. Padded
// channels are zeros in both operands of a product; what a padded filter yields is dropped.
#pragma once

#include <cstdint>

#include "grouped.h"
#include "igemm_tf32.h"
#include "in_place.h"
#include "mixed.h"
#include "one_by_one.h"
#include "tma_planes_tf32.h"

namespace conv2d_ext {

struct Packing {
  bool x = false, w = false, y = false;
  constexpr bool any() const { return x || w || y; }
};

constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Above this, copies are not padded further than they must be, nor made at all if they are more than three times the
// tensors' bytes; above the second they are not made in any case.
inline constexpr double kFreePackedBytes = double(int64_t(1) << 29), kMaxPackedBytes = double(int64_t(1) << 35);

constexpr bool fits_in_place(Strides const& s, int align, int64_t channels, int64_t n, int64_t h, int64_t w, DType t) {
  return channel_vectors(s, align, channels, 16 / size_of(t), t) && map_supports(s, n, h, w, t);
}

// What tma takes in any strides, unless a pass over memory is faster: some rows store fprop's pixels of channels that
// lie side by side but take no vectors one by one. A packed result takes an eighth of that time, and 6 us for its
// launches. Few tiles with long sums are split, and tma_reduce stores neighbouring channels at once.
constexpr TmaTakesAny packs_rather(Row const& row, Problem const& p) {
  Op const op = row.op;
  TmaTakesAny any = tma_takes_any(op, p);
  any.x |= stores_apart(row, p);
  double const pixels = double(p.N) * double(p.P()) * double(p.Q()),
               bytes = pixels * double(p.K + 16) * size_of(p.dtype);
  bool const across = p.y.c == 1 && p.K_per_group() % (16 / size_of(p.dtype)) != 0;
  bool const split = pixels * double(round_up(p.K, 128)) <= 66.0 * 128 * 128 && p.C * p.R * p.S >= 4096;
  if (op == Op::fprop && across && !tma_stores_lines(row, p) && !split && pixels * double(p.K) > 500e3 &&
      bytes <= kMaxPackedBytes)
    any.y = false;
  return any;
}

// Channels and filters a group, padded. Where more than half of the last line of 128 bytes of a packed tensor would be
// empty, it is filled with zeros: the copy engine takes up to 16 ns for a line that ends early, 2 for a whole one. Up
// to 32 channels of 16-bit types have lines of 64 bytes where they are summed over, and in wgrad's narrow rows. Lines
// that begin off 32 bytes are as slow to copy as those that end early: operands of several taps are padded to 16
// channels.
struct PackedGroup {
  int64_t C, K;
};
constexpr PackedGroup packed_group(Row const& row, Problem const& p) {
  Op const op = row.op;
  int64_t const line = 128 / size_of(p.dtype), v = 16 / size_of(p.dtype);
  TmaTakesAny const any = packs_rather(row, p);
  // reduced: over these channels; few: up to 32 have shorter lines; most: what may be left in the last line for it to
  // be filled.
  bool const taps = p.groups == 1 && p.R * p.S > 1 && size_of(p.dtype) == 2;
  auto pad = [&](bool reduced, bool few, int64_t most, bool in_place, bool operand, int64_t channels, double pixels) {
    bool const narrow = few && p.groups == 1 && size_of(p.dtype) == 2;
    int64_t const whole = round_up(channels, narrow ? tma_line(channels) / 2 : line);
    bool const whole_steps = reduced && p.groups > 1 && !tma_maps_groups(op, p);
    int64_t least = round_up(channels, whole_steps ? tma_together(p.dtype) : v);
    bool const is_packed = least != channels || !in_place;
    bool const small = pixels * double(whole) * double(p.groups) * size_of(p.dtype) <= kFreePackedBytes;
    if (is_packed && small && operand && taps) least = round_up(least, 16);
    return is_packed && small && least % line <= most ? whole : least;
  };
  bool const x = any.x || fits_in_place(p.x, p.x_align, p.C_per_group(), p.N, p.H, p.W, p.dtype);
  bool const y = any.y || fits_in_place(p.y, p.y_align, p.K_per_group(), p.N, p.P(), p.Q(), p.dtype);
  double const x_pixels = double(p.N) * double(p.H) * double(p.W),
               y_pixels = double(p.N) * double(p.P()) * double(p.Q());
  int64_t const C = p.C_per_group(), K = p.K_per_group();
  // dgrad copies filters along C, but for TF32. tma_strict's results are slow to store in lines that end early.
  bool const strict = row.family == Family::tma_strict;
  int64_t const most = op != Op::dgrad || strict ? line / 2 : any.w || C > line ? -1 : line / 2;
  // Halves of lines do for narrow, whose taps of a group have 32 channels.
  if (row.variant == Variant::narrow && p.groups > 1 && C == 32 && K % line == 32) return {C, K};
  // Merged groups fill lines.
  if (Problem const q = padded_to_merge(p); merged_groups(row, q) > 1) return {q.C_per_group(), q.K_per_group()};
  bool const as_it_is = any.x && (any.w || (op == Op::dgrad && tma_stores_lines(row, p)));
  return {as_it_is ? C : pad(op == Op::fprop, op != Op::dgrad, most, x, op != Op::dgrad, C, x_pixels),
          any.y ? K
                : pad(op == Op::dgrad, op == Op::dgrad, op == Op::fprop && !strict ? -1 : line / 2, y, op != Op::fprop,
                      K, y_pixels)};
}

// Filters are packed in lines of whole vectors, even if the row does with fewer channels. In 16-bit types lines of more
// than one begin on 32 bytes, as operands' do.
constexpr int64_t packed_w_channels(int64_t C, DType t) {
  return round_up(C, size_of(t) == 2 && C > 8 ? 16 : 16 / size_of(t));
}

// Are a filter's weights dense, and in the order channel, row, column?
constexpr bool filters_channels_first(Problem const& p) {
  return (p.C == 1 || p.w.c == p.R * p.S) && (p.R == 1 || p.w.h == p.S) && (p.S == 1 || p.w.w == 1);
}

// What of the problem is packed for a row that supports it, and the problem that the row then runs.
struct Packed {
  Packing which;
  Problem problem;
};

// The passes that pack and unpack: one launch for the operands, one for the result.
constexpr double packing_ns(Op op, Problem const& p, Packed const& q) {
  Problem const& c = q.problem;
  // Of planes whose columns lie apart, sectors of 32 bytes are read.
  double const apart = p.x.c != 1 && p.W > 1 ? double(min64(max64(p.x.w, 1), 32 / size_of(p.dtype))) : 1;
  double const x = double(p.N) * (double(p.H * p.W) * double(p.C) * apart + double(c.x.n)),
               zeros = c.H != p.H || c.W != p.W ? 0.6 * x : 0,  // as measured of those that unpacking fills in
      y = double(p.N) * (double(p.P()) * double(p.Q()) * double(p.K) + double(c.y.n)),
               w = double(p.R) * double(p.S) *
                   (double(p.K) * double(p.C_per_group()) + double(c.K) * double(c.C_per_group()));
  bool const out = op == Op::fprop ? q.which.y : op == Op::dgrad ? q.which.x : q.which.w;
  bool const in = (op != Op::dgrad && q.which.x) || (op != Op::wgrad && q.which.w) || (op != Op::fprop && q.which.y);
  double const elements = (q.which.x ? x + zeros : 0) + (q.which.w ? w : 0) + (q.which.y ? y : 0);
  bool const half = size_of(p.dtype) == 2;
  double rate = half && p.H * p.W <= 256 ? 3350 : 4150;  // short planes
  // Groups that are padded are moved by elements.
  bool const x_pads = q.which.x && c.C != p.C, y_pads = q.which.y && c.K != p.K;
  if (p.groups > 1 && (x_pads || y_pads))
    rate = (x_pads ? p.x.c : p.y.c) == 1 ? (half ? 2050 : 3200) : half ? rate * 0.82 : rate;
  return elements * size_of(p.dtype) / rate + (in ? 2600 : 0) + (out ? 3300 : 0);
}

// Those of a depthwise layer's x and y over planes, as measured: of an odd number of pixels single elements are moved.
constexpr double packing_planes_ns(Op op, Problem const& p, Packed const& q) {
  bool const half = size_of(p.dtype) == 2;
  auto bytes = [&](int64_t channels, int64_t pixels) {
    double const more = pixels % 8 == 0 ? (half ? 0.05 : 0.2) : half && pixels % 2 != 0 ? 0.67 : 0.3;
    return more * double(p.N) * double(channels) * double(pixels) * size_of(p.dtype);
  };
  return packing_ns(op, p, q) + 1500 + (bytes(p.C, p.H * p.W) + bytes(p.K, p.P() * p.Q())) * 2 / 4150;
}

// For rows of grouped. NCHW that lines takes is not packed, and filters stay where they are, unless groups are padded.
constexpr Packed packed_lines_as_is(Row const& row, Problem const& p) {
  Packed q{{}, p};
  if (row.variant != Variant::lines || grouped_supports(row, row.op, p)) return q;
  q.which.x = !fits_in_place(p.x, p.x_align, p.C, p.N, p.H, p.W, p.dtype);
  q.which.y = !fits_in_place(p.y, p.y_align, p.K, p.N, p.P(), p.Q(), p.dtype);
  if (q.which.x) q.problem.x = channels_last_strides(p.C, p.H, p.W), q.problem.x_align = 16;
  if (q.which.y) q.problem.y = channels_last_strides(p.K, p.P(), p.Q()), q.problem.y_align = 16;
  return q;
}

// Results of a unit meet more than their own group: of 6 channels a group four share a unit of 24, whose three blocks
// meet two blocks of inputs each, where four groups of 8 have four that meet one. Of 5 a unit has 40, more than lines
// takes in f32.
constexpr Packed packed_lines(Row const& row, Problem const& p) {
  Packed const as_is = packed_lines_as_is(row, p);
  // All groups' channels are to be a multiple of 8.
  auto padded = [&](int64_t channels) {
    int64_t const part = channels <= 2 ? channels : channels <= 4 ? 4 : 8;
    return round_up(channels, part * p.groups % 8 == 0 ? part : 8);
  };
  int64_t const C = padded(p.C_per_group()), K = padded(p.K_per_group());
  bool const padded_already = C == p.C_per_group() && K == p.K_per_group();
  // Of 2 channels in an odd number of groups, three quarters would be zeros: grouped.cuh is faster.
  bool const mostly_zeros = C > 2 * p.C_per_group() || K > 2 * p.K_per_group();
  if (row.variant != Variant::lines || padded_already || mostly_zeros) return as_is;
  Packed q{{}, p};
  q.problem.C = C * p.groups, q.problem.K = K * p.groups;
  q.which.x = C != p.C_per_group() || !fits_in_place(p.x, p.x_align, p.C, p.N, p.H, p.W, p.dtype);
  q.which.y = K != p.K_per_group() || !fits_in_place(p.y, p.y_align, p.K, p.N, p.P(), p.Q(), p.dtype);
  q.which.w = true;
  if (q.which.x) q.problem.x = channels_last_strides(q.problem.C, p.H, p.W), q.problem.x_align = 16;
  if (q.which.y) q.problem.y = channels_last_strides(q.problem.K, p.P(), p.Q()), q.problem.y_align = 16;
  q.problem.w = channels_last_strides(packed_w_channels(C, p.dtype), p.R, p.S), q.problem.w_align = 16;
  double const elements = double(p.N) * (double(p.H) * double(p.W) * double(q.problem.C) +
                                         double(p.P()) * double(p.Q()) * double(q.problem.K));
  if (elements * size_of(p.dtype) > kFreePackedBytes || !grouped_supports(row, row.op, q.problem)) return as_is;
  auto ns = [&](Packed const& of) {
    return grouped_lines_estimate(row.op, of.problem, h200_sxm).ns + (of.which.any() ? packing_ns(row.op, p, of) : 0);
  };
  return !grouped_supports(row, row.op, as_is.problem) || ns(q) * 1.05 < ns(as_is) ? q : as_is;
}

// For rows of simt in f32, which pad nothing. Results are stored in place, but for filters, whose taps would be far
// apart in a tile, and dgrad's pixels of a stride's phases.
constexpr Packed packed_simt(Row const& row, Problem const& p) {
  Packed q{{}, p};
  if (row.variant != Variant::nhwc || p.dtype != DType::f32) return q;
  SimtVectors const v = simt_vectors(p);
  q.which = {(row.op != Op::dgrad || p.stride_w > 1) && !v.x, !v.w, row.op != Op::fprop && !v.y};
  if (q.which.x) q.problem.x = channels_last_strides(p.C, p.H, p.W), q.problem.x_align = 16;
  if (q.which.w) q.problem.w = channels_last_strides(p.C_per_group(), p.R, p.S), q.problem.w_align = 16;
  if (q.which.y) q.problem.y = channels_last_strides(p.K, p.P(), p.Q()), q.problem.y_align = 16;
  return q;
}

// Does the copy engine take what a pixel of the result meets? Not long steps, nor taps or padding beyond its corners.
constexpr bool engine_takes(Problem const& p) {
  return im2col_supports(fprop_walk(p.P(), p.R, p.stride_h, p.pad_top, p.dilation_h), p.H) &&
         im2col_supports(fprop_walk(p.Q(), p.S, p.stride_w, p.pad_left, p.dilation_w), p.W);
}

// For rows of igemm: of one group, in other layouts and of other channel counts.
constexpr Packed packed_igemm(Problem const& p) {
  Packed q{{}, p};
  if (p.groups != 1 || igemm_supports(p)) return q;
  int64_t const v = 16 / size_of(p.dtype), C = round_up(p.C, v), K = round_up(p.K, v);
  q.which.x = C != p.C || !channel_vectors(p.x, p.x_align, C, v, p.dtype);
  q.which.w = C != p.C || K != p.K || !channel_vectors(p.w, p.w_align, C, v, p.dtype);
  q.which.y = K != p.K || !channel_vectors(p.y, p.y_align, K, v, p.dtype);
  q.problem.C = C, q.problem.K = K;
  if (q.which.x) q.problem.x = channels_last_strides(C, p.H, p.W), q.problem.x_align = 16;
  if (q.which.w) q.problem.w = channels_last_strides(packed_w_channels(C, p.dtype), p.R, p.S), q.problem.w_align = 16;
  if (q.which.y) q.problem.y = channels_last_strides(K, p.P(), p.Q()), q.problem.y_align = 16;
  return q;
}

// In TF32: operands that take no vectors, and results whose channels are padded.
constexpr Packed packed_igemm_tf32(Op op, Problem const& p) {
  Packed q{{}, p};
  bool const apart = op == Op::dgrad && p.stride_w > 1 && p.x.c != 1;
  if (p.groups != 1 || apart || igemm_tf32_supports(op, p)) return q;
  int64_t const C = op == Op::dgrad ? p.C : round_up(p.C, 4), K = op == Op::fprop ? p.K : round_up(p.K, 4);
  bool const padded = C != p.C || K != p.K;
  q.which.x = op != Op::dgrad && (C != p.C || !channel_vectors(p.x, p.x_align, C, 4, p.dtype));
  q.which.w = padded || (op != Op::wgrad && !channel_vectors(p.w, p.w_align, p.C, 4, p.dtype));
  q.which.y = op != Op::fprop && (K != p.K || !channel_vectors(p.y, p.y_align, K, 4, p.dtype));
  q.problem.C = C, q.problem.K = K;
  if (q.which.x) q.problem.x = channels_last_strides(C, p.H, p.W), q.problem.x_align = 16;
  if (q.which.w) q.problem.w = channels_last_strides(packed_w_channels(C, p.dtype), p.R, p.S), q.problem.w_align = 16;
  if (q.which.y) q.problem.y = channels_last_strides(K, p.P(), p.Q()), q.problem.y_align = 16;
  return q;
}

// dgrad of 1x1 filters with strides over planes: of the packed result there are the pixels that filters meet alone; the
// launch that unpacks it fills in zeros.
constexpr bool packs_met_pixels(Row const& row, Problem const& p) {
  return (row.family == Family::tma || row.family == Family::tma_strict) && row.op == Op::dgrad &&
         meets_few_pixels(p) && !stores_apart(row, p);
}

// wgrad of 1x1 filters over planes, 16-bit types: operands become matrices of pixels.
constexpr bool packs_pixels(Row const& row, Problem const& p) {
  bool const one = p.R * p.S == 1 && p.stride_h * p.stride_w == 1 && p.groups == 1;
  bool const padded = p.pad_top != 0 || p.pad_bottom != 0 || p.pad_left != 0 || p.pad_right != 0;
  bool const vectors = p.C % 8 == 0 && p.K % 8 == 0;  // copies of others would have to be padded
  return row.op == Op::wgrad && one && !padded && ((is_matrix(row) && vectors) || is_sums(row, p)) &&
         !in_place_supports(row, p);
}
constexpr Packed packed_pixels(Problem const& p) {
  Packed q{{}, p};
  q.which.x = !matrix_pixels(p.x, p.x_align, p.C, p), q.which.y = !matrix_pixels(p.y, p.y_align, p.K, p);
  if (q.which.x) q.problem.x = channels_last_strides(p.C, p.H, p.W), q.problem.x_align = 16;
  if (q.which.y) q.problem.y = channels_last_strides(p.K, p.H, p.W), q.problem.y_align = 16;
  return q;
}

constexpr Packed packed_mixed(Problem const& p) {
  if (p.x.c == 1 && p.y.c == 1) {
    Packed q{{true, false, true}, p};
    q.problem.x = contiguous_strides(p.C, p.H, p.W), q.problem.y = contiguous_strides(p.K, p.P(), p.Q());
    return q;
  }
  Packed q{{p.x.c != 1, false, p.y.c != 1}, p};
  if (q.which.x) q.problem.x = channels_last_strides(p.C, p.H, p.W), q.problem.x_align = 16;
  if (q.which.y) q.problem.y = channels_last_strides(p.K, p.P(), p.Q()), q.problem.y_align = 16;
  return q;
}

// For rows of lean, but for large tiles of fprop and dgrad. Copies' lines are filled with zeros, which the engine
// copies faster than lines that end early: of fprop and dgrad whole ones (16 bits, up to 32 channels: halves), of
// wgrad, whose result has the channels too, only where these are no whole vectors.
constexpr int64_t lean_padded(Op op, int64_t channels, int v) {
  int64_t const line = v * 8, least = round_up(channels, 2 * v);
  if (op != Op::wgrad) return round_up(channels, v == 8 && channels <= 32 ? 32 : line);
  return channels % v == 0 ? channels : least * 4 > line ? round_up(channels, line) : least;
}
constexpr Packed packed_lean(Row const& row, Problem const& p) {
  Packed q{{}, p};
  int const v = 16 / size_of(p.dtype);
  Op const op = row.op;
  if (!lean_packs(row, p) || (lean_large(row) && op != Op::wgrad) || lean_period(row, p) > 1) return q;
  q.which.x = op != Op::dgrad && !channel_vectors(p.x, p.x_align, p.C, v, p.dtype);
  q.which.y = op != Op::fprop && !channel_vectors(p.y, p.y_align, p.K, v, p.dtype);
  q.which.w = !channel_vectors(p.w, p.w_align, p.C, v, p.dtype);
  int64_t const C = q.which.x ? lean_padded(op, p.C, v) : p.C, K = q.which.y ? lean_padded(op, p.K, v) : p.K;
  if (op == Op::wgrad)
    q.which.w = q.which.w && !lean_stores_apart(row, p);
  else
    q.which.w = q.which.w || C != p.C || K != p.K, q.problem.C = C, q.problem.K = K;
  if (q.which.x) q.problem.x = channels_last_strides(C, p.H, p.W), q.problem.x_align = 16;
  if (q.which.y) q.problem.y = channels_last_strides(K, p.P(), p.Q()), q.problem.y_align = 16;
  if (q.which.w)
    q.problem.w = channels_last_strides(packed_w_channels(q.problem.C, p.dtype), p.R, p.S), q.problem.w_align = 16;
  return q;
}

constexpr Packed packed(Row const& row, Problem const& p) {
  if (is_mixed(row, p)) return packed_mixed(p);
  if (row.family == Family::simt) return packed_simt(row, p);
  if (row.family == Family::igemm) return row.dtype == DType::f32 ? packed_igemm_tf32(row.op, p) : packed_igemm(p);
  if (row.family == Family::grouped) return packed_lines(row, p);
  Op const op = row.op;
  if (is_pointwise(row)) {  // only filters are packed, with contiguous k of the turned problem
    if (pointwise_supports(op, p)) return {{}, p};
    Packed q{{false, true, false}, p};
    q.problem.w = op == Op::dgrad ? Strides{1, packed_w_channels(p.K, p.dtype), 0, 0}
                                  : Strides{packed_w_channels(p.C, p.dtype), 1, 0, 0};
    q.problem.w_align = 16;
    return q;
  }
  if (packs_pixels(row, p)) return packed_pixels(p);
  if (row.variant == Variant::lean) return packed_lean(row, p);
  if (is_matrix(row) || is_tf32_planes(row)) return {{}, p};
  if (is_tma_planes(row)) {
    Packed q{{}, p};
    if (tma_planes_supports(row, p)) return q;
    q.which.w = true;
    q.problem.w = channels_last_strides(packed_w_channels(p.C, p.dtype), p.R, p.S), q.problem.w_align = 16;
    return q;
  }
  if (is_planes_wgrad(row)) {  // only many filters
    Packed q{{}, p};
    q.which.w = !tma_adds_into_any(row, p) && !channel_vectors(p.w, p.w_align, p.C, 2, p.dtype);
    if (q.which.w)
      q.problem.w = channels_last_strides(packed_w_channels(p.C, p.dtype), p.R, p.S), q.problem.w_align = 16;
    return q;
  }
  if (is_strict_phases(row) || is_strict_turned(row)) {  // filters in any strides; phases' result, too
    Packed q{{}, p};
    q.which.x = is_strict_turned(row) && !fits_in_place(p.x, p.x_align, p.C, p.N, p.H, p.W, p.dtype);
    if (q.which.x) q.problem.x = channels_last_strides(p.C, p.H, p.W), q.problem.x_align = 16;
    q.which.y = !fits_in_place(p.y, p.y_align, p.K, p.N, p.P(), p.Q(), p.dtype);
    if (q.which.y) q.problem.y = channels_last_strides(p.K, p.P(), p.Q()), q.problem.y_align = 16;
    return q;
  }
  if (packs_met_pixels(row, p)) {
    Problem met = p;
    met.H = p.P(), met.W = p.Q(), met.stride_h = met.stride_w = 1;
    met.x = channels_last_strides(p.C, met.H, met.W), met.x_align = 16;
    Packed q = packed(row, met);
    q.which.x = true;
    return q;
  }
  if (merged_groups(row, p) > 1) return {{}, p};
  PackedGroup const g = packed_group(row, p);
  bool const C = g.C != p.C_per_group(), K = g.K != p.K_per_group();
  TmaTakesAny any = packs_rather(row, p);
  Problem as_it_is = padded_to_merge(p);
  as_it_is.w = p.w, as_it_is.w_align = p.w_align;
  any.w |= row.family == Family::tma_strict && !C && !K && strict_turns_filters(op, p);  // not of padded ones
  any.w |= tma_adds_into_any(row, p) || tf32_adds_into_any(row, p) || merged_groups(row, as_it_is) > 1;
  Packed q{{}, p};
  q.which.x = C || (!any.x && !fits_in_place(p.x, p.x_align, g.C, p.N, p.H, p.W, p.dtype));
  q.which.w = C || K || (!any.w && !fits_in_place(p.w, p.w_align, g.C, p.K, p.R, p.S, p.dtype));
  q.which.y = K || (!any.y && !fits_in_place(p.y, p.y_align, g.K, p.N, p.P(), p.Q(), p.dtype));
  q.problem.C = g.C * p.groups, q.problem.K = g.K * p.groups;
  if (q.which.x) q.problem.x = channels_last_strides(q.problem.C, p.H, p.W), q.problem.x_align = 16;
  if (q.which.w) q.problem.w = channels_last_strides(packed_w_channels(g.C, p.dtype), p.R, p.S), q.problem.w_align = 16;
  if (q.which.y) q.problem.y = channels_last_strides(q.problem.K, p.P(), p.Q()), q.problem.y_align = 16;
  if (wants_turned_filters(row) && q.which.y && p.x.c > 1 && !C && p.groups == 1 && p.allow_tf32 &&
      filters_channels_first(p) && parts_of(row, p).count() == 0)
    q.which.w = true, q.problem.w = turned_strides(q.problem), q.problem.w_align = 16;
  return q;
}

// x and y.
constexpr double activation_bytes(Problem const& p) {
  return double(p.N) * (double(p.H) * double(p.W) * double(p.C) + double(p.P()) * double(p.Q()) * double(p.K)) *
         size_of(p.dtype);
}

constexpr bool pack_supports(Row const& row, Problem const& p) {
  if (p.N == 0 || p.C == 0 || p.H == 0 || p.W == 0 || p.K == 0) return false;
  if (packs_pixels(row, p)) {
    Packed const q = packed_pixels(p);
    return q.which.any() && activation_bytes(p) <= kMaxPackedBytes && in_place_supports(row, q.problem);
  }
  // Launches that pack cost more than it gains; images that are packed have rows of their own.
  if (is_matrix(row) || is_planes_wgrad(row)) return false;
  if (row.family == Family::grouped) {
    Packed const q = packed_lines(row, p);
    return q.which.any() && activation_bytes(p) <= kMaxPackedBytes && grouped_supports(row, row.op, q.problem);
  }
  if (row.family == Family::simt) {
    Packed const q = packed_simt(row, p);
    return q.which.any() && activation_bytes(p) <= kMaxPackedBytes && simt_supports(row, row.op, q.problem);
  }
  if (row.family == Family::igemm) {
    Packed const q = packed(row, p);
    double const copies = activation_bytes(q.problem);
    if (copies > kMaxPackedBytes || (copies > kFreePackedBytes && copies > 3 * activation_bytes(p))) return false;
    if (!q.which.any()) return false;
    return row.dtype == DType::f32 ? igemm_tf32_supports(row.op, q.problem, q.which.w) : igemm_supports(q.problem);
  }
  if (is_pointwise(row)) return pointwise_supports(row.op, packed(row, p).problem);
  if (is_tma_planes(row)) return tma_planes_supports(row, packed(row, p).problem);
  if (is_strict_phases(row) || is_strict_turned(row))
    return activation_bytes(p) <= kMaxPackedBytes && in_place_supports(row, packed(row, p).problem);
  if (row.variant == Variant::lean) {
    Packed q = packed_lean(row, p);
    int const v = 16 / size_of(p.dtype);
    if (row.op == Op::wgrad) q.problem.C = round_up(p.C, v), q.problem.K = round_up(p.K, v);
    double const elements = double(q.which.x ? q.problem.x.n : 0) + double(q.which.y ? q.problem.y.n : 0);
    double const copies = double(p.N) * elements * size_of(p.dtype);
    if (copies > kMaxPackedBytes || (copies > kFreePackedBytes && copies > 3 * activation_bytes(p))) return false;
    return q.which.any() && in_place_supports(row, q.problem);
  }
  PackedGroup const g = packed_group(row, p);
  double const x = double(p.N) * double(p.H) * double(p.W), y = double(p.N) * double(p.P()) * double(p.Q()),
               w = double(p.R) * double(p.S), groups = double(p.groups);
  double const plain =
      (x * double(p.C) + y * double(p.K) + w * double(p.K) * double(p.C_per_group())) * size_of(p.dtype);
  double const copies = (x * double(g.C) + y * double(g.K) + w * double(g.K) * double(g.C)) * groups * size_of(p.dtype);
  if (copies > kMaxPackedBytes || (copies > kFreePackedBytes && copies > 3 * plain)) return false;
  Packed const q = packed(row, p);
  return q.which.any() && in_place_supports(row, q.problem);
}

// Where the copies are, in bytes from the start of the workspace, -1: there is none; the row's own part is at `bytes`.
struct PackedPlaces {
  int64_t x = -1, w = -1, y = -1, bias = -1, bytes = 0;
};
constexpr PackedPlaces packed_places(Packed const& q) {
  PackedPlaces at;
  auto place = [&](bool wanted, int64_t elements) {
    int64_t const begin = at.bytes;
    if (wanted) at.bytes = round_up(begin + elements * size_of(q.problem.dtype), 256);
    return wanted ? begin : -1;
  };
  Problem const& c = q.problem;
  at.x = place(q.which.x, c.N * c.x.n);
  at.w = place(q.which.w, c.w.n == 1 ? c.C * c.w.c : c.K * packed_w_channels(c.C_per_group(), c.dtype) * c.R * c.S);
  at.y = place(q.which.y, c.N * c.y.n);
  at.bias = place(q.which.y, c.K);  // of fprop, padded as y is
  return at;
}

// fprop and dgrad in 16-bit types that store single elements, as in NCHW, unless all tiles are split: how much longer
// than by 128x64 the last tile's stores take, which no other tile's multiplication hides; measured, by rows.
constexpr double last_store_ns(Row const& row, Problem const& p, int split_k) {
  // Of strict rows some take 20, 14 and 4.5 us longer, others nothing.
  if (row.family == Family::tma_strict)
    return row.op != Op::fprop || p.K_per_group() % 4 == 0 ? 0
           : row.tile_n == 128                             ? 7000
           : row.tile_n == 64                              ? 5000
                                                           : 2500;
  if (row.family != Family::tma || row.op == Op::wgrad || is_pointwise(row) || is_tma_planes(row) ||
      row.variant == Variant::phases || row.variant == Variant::lean || is_matrix(row))
    return 0;
  if (p.dtype == DType::f32 || !tma_stores_singly(row.op, p) || tma_stores_runs(row, p)) return 0;
  if (split_k > 1 && tma_tiles(row, p) < tma_slots(row)) return -823;
  bool const few = p.R * p.S > 1 && (row.op == Op::fprop ? p.C : p.K) <= 32;  // as measured (L40)
  if (row.tile_m == 64) return row.tile_n == 64 ? (few ? 1500 : 133) : 2460;
  if (tma_swapped_wide(row)) return row.tile_n == 192 ? 2150 : 1010;
  switch (row.tile_n) {
    case 64:
      if (row.tile_m == 256 && p.groups == 1 && (row.op == Op::fprop || p.stride_h * p.stride_w == 1)) return 3750;
      return row.tile_m == 256 ? 5250 : 2500;
    case 128:
      return 9040;
    case 160:
      return 7780;
    case 192:
      return 2210;
    default:
      return 6340;
  }
}

// Rows of lean on packed copies: what they take beyond their estimates, as measured beside other rows (370 problems).
constexpr double packed_lean_ns(Row const& row, Problem const& p, Packing const& which, double ns) {
  if (row.family != Family::tma || row.variant != Variant::lean || !(which.x || which.y)) return 0;
  bool const wide = row.tile_n == 128, wgrad = row.op == Op::wgrad, forward = row.op == Op::fprop;
  if (row.dtype == DType::f32) {
    // Of 1x1 filters `pixels_wgrad` takes any channels in place (4x254x48x87 to 4 17.2 us, 25.9 by this).
    bool const one = p.R * p.S == 1 && p.stride_h * p.stride_w == 1;
    if (wgrad) return (ns < 20000 ? 1500 : 0) + (one ? (ns > 40000 ? ns * 0.2 : 2500) : 0);
    return forward ? 2700 + ns * (wide ? 0.2 : 0.1) : 2500 + ns * (row.tile_m == 128 ? 0.15 : 0.05);
  }
  if (wgrad) return 900 + (wide && row.tile_m == 64 ? ns * 0.05 : 0);
  if (forward) return wide && p.K % 128 != 0 ? ns * 0.08 : 0;
  // Filters' lines that end early (32x24x28x28 to 128 3x3: 39.0 us, estimated at 19.2).
  double const lines = double(lean_tiles(row, p) * ceil_div(p.K, 64) * p.R * p.S) * 64;
  return p.C < 64 && p.C % 32 != 0 ? lines / 132 * 4 : 0;
}

// Phases of dgrad by rows of lean: as measured beside other rows (77 layers; 1x128x56x56 s2 10.5 us, estimated at 6.3).
// Over NCHW results are stored singly, which few steps do not hide (4x384x188x52 to 16 2x2 s2 131 us, estimated at 50).
constexpr double lean_phases_ns(Row const& row, Problem const& p, Packing const& which, double ns) {
  if (row.family != Family::tma || row.variant != Variant::lean || row.op != Op::dgrad || lean_phases(p) == 1) return 0;
  if (!which.y) return 3000;
  Problem const phase = lean_longest_phase(p);
  double const results = double(p.N * p.C) * double(p.H * p.W), steps = double(ceil_div(p.K, 32) * phase.R * phase.S);
  return 1000 + (ns > 18000 ? ns * 0.12 : 0) + (p.x.c != 1 && results > 1e6 ? (results - 1e6) * 0.0056 / steps : 0);
}

// wgrad in 16-bit types on packed copies: how much longer its own part was measured to take than in channels_last.
constexpr double packed_wgrad_share(Row const& row, Problem const& p, Packing const& which) {
  if (row.family != Family::tma || row.op != Op::wgrad || row.dtype == DType::f32 || !which.x) return 1;
  if (is_sums(row, p)) return row.tile_m == 128 ? 1 : odd_pixels(p) ? 1.5 : 1.12;
  if (is_halo(row.variant)) return 1.03;
  if (row.tile_m == 128 && row.tile_n == 128) return p.H * p.W <= 512 ? 1.2 : 1.06;
  return row.tile_n == 64 ? 1.12 : 1.08;
}

}  // namespace conv2d_ext
