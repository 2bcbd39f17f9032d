// Patches: what a filter meets at a pixel is copied to the workspace, patch by patch, in the order of the filters'
// memory and padded with zeros to whole vectors, and the rows of tma and tma_strict run the product of matrices that is
// left: a 1x1 filter over patches. For filters of few channels that step by their own size, as in the first layer of a
// vision transformer, and for what the copy engine does not take: long steps, far taps. dgrad's patches share no input.
#pragma once

#include "pack.h"

namespace conv2d_ext {

inline constexpr int kPatchMostChannels = 4;  // more of them fill the lines of packed copies well enough

inline constexpr int kPartLeastChannels = 16;  // of fprop's parts, whose steps take 32 and more

// Elements of a patch, and with its padding. Padded patches meet padded copies of the filters.
constexpr int64_t patch_elements(Problem const& p) { return p.C * p.R * p.S; }
constexpr int64_t patch_length(Problem const& p) { return round_up(patch_elements(p), 16 / size_of(p.dtype)); }
constexpr bool patch_pads(Problem const& p) { return patch_length(p) != patch_elements(p); }

// Do the filters step by their own size?
constexpr bool patch_steps(Problem const& p) {
  return p.stride_h == p.R && p.stride_w == p.S && p.dilation_h == 1 && p.dilation_w == 1 && p.pad_top == 0 &&
         p.pad_bottom == 0 && p.pad_left == 0 && p.pad_right == 0;
}

// Is every input in one patch at most? Then no two taps are a multiple of the stride apart, or further than all pixels.
constexpr bool patches_apart(Problem const& p) {
  auto axis = [](int64_t taps, int64_t stride, int64_t dilation, int64_t pixels) {
    return taps * gcd64(dilation, stride) <= stride || (pixels - 1) * stride < dilation;
  };
  return axis(p.R, p.stride_h, p.dilation_h, p.P()) && axis(p.S, p.stride_w, p.dilation_w, p.Q());
}

// dgrad of so many phases is not for one launch of tma.
constexpr bool patch_many_phases(Problem const& p) {
  return phases_of(p.H, p.stride_h) * phases_of(p.W, p.stride_w) > kMaxPhases;
}

// wgrad of few channels and many taps by rows of lean: in 16-bit types by the large tiles of tma_sums.cuh, in TF32 to
// many filters. A tap's channels would fill a quarter of a run of columns at most.
constexpr bool patch_few_sums(Row const& row, Problem const& p) {
  if (row.op != Op::wgrad || row.variant != Variant::lean || p.R * p.S < 9) return false;
  return row.dtype == DType::f32 ? p.C <= 8 && p.K >= 128 : p.C <= 16 && row.tile_m == 128;
}

constexpr bool is_patches(Row const& row, Problem const& p) {
  if (row.family != Family::tma && row.family != Family::tma_strict) return false;
  if (is_pointwise(row) || is_matrix(row) || is_strict_phases(row) || is_strict_turned(row) ||
      row.variant == Variant::nchw || p.groups != 1 || p.C < 1 || p.N == 0 || p.K == 0 || p.P() == 0 || p.Q() == 0)
    return false;
  bool const steps = patch_steps(p) && p.R * p.S > 1, backward = row.op == Op::dgrad;
  bool const taken = engine_takes(p) && !(backward && patch_many_phases(p));
  // Parts copy nothing.
  if (row.op == Op::fprop && p.C >= kPartLeastChannels && parts_of(row, p).count() > 0) return false;
  bool const in_place = taken && !(steps && p.C <= kPatchMostChannels);  // fewer bytes, but slower
  if (in_place && !patch_few_sums(row, p)) return false;
  if (backward && !patches_apart(p)) return false;  // would be sums of rounded products
  double const bytes = double(p.N) * double(p.P()) * double(p.Q()) * double(patch_length(p)) * size_of(p.dtype);
  if (bytes > (in_place ? kFreePackedBytes : kMaxPackedBytes)) return false;
  bool const channels_last = (p.C == 1 || p.w.c == 1) && (p.R == 1 || p.w.h == p.S * p.C) && (p.S == 1 || p.w.w == p.C);
  return channels_last || filters_channels_first(p);
}

constexpr Problem without_window(Problem p) {
  p.stride_h = p.R, p.stride_w = p.S, p.dilation_h = p.dilation_w = 1;
  p.pad_top = p.pad_bottom = p.pad_left = p.pad_right = 0;
  return p;
}

constexpr Problem patches(Problem const& p) {
  Problem q = p;
  q.C = patch_length(p), q.H = p.P(), q.W = p.Q(), q.R = q.S = 1;
  q = without_window(q);
  q.x = channels_last_strides(q.C, q.H, q.W), q.x_align = 16;
  q.w = {patch_pads(p) ? q.C : p.w.n, 1, 0, 0};
  if (patch_pads(p)) q.w_align = 16;
  if (q.N == 1) q.x.n = 0;
  if (q.H == 1) q.x.h = 0;
  if (q.W == 1) q.x.w = 0;
  return q;
}

// The filters as images of a patch each.
constexpr Problem patch_filters(Problem const& p) {
  Problem q = without_window(p);
  q.N = p.K, q.H = p.R, q.W = p.S, q.x = p.w, q.x_align = p.w_align;
  return q;
}

// The problem that a row runs, but for packing; of another family its own.
constexpr Problem tma_problem(Row const& row, Problem const& p) { return is_patches(row, p) ? patches(p) : p; }

// Of the workspace: the images' patches, and behind them the filters' where they are padded.
constexpr int64_t patch_images_bytes(Problem const& p) {
  return round_up(p.N * p.P() * p.Q() * patch_length(p) * size_of(p.dtype), 256);
}
constexpr int64_t patch_bytes(Row const& row, Problem const& p) {
  if (!is_patches(row, p)) return 0;
  return patch_images_bytes(p) + (patch_pads(p) ? round_up(p.K * patch_length(p) * size_of(p.dtype), 256) : 0);
}

// Do 16 bytes of a patch lie together in the image? As a row's, a pixel's channels, or those of pixels side by side.
constexpr bool patch_vectors(Problem const& p) {
  auto whole = [&](int64_t elements) { return elements % (16 / size_of(p.dtype)) == 0; };
  if (p.x_align < 16 || !whole(p.x.n) || !whole(p.x.h)) return false;
  bool const unpadded = p.dilation_w == 1 && p.pad_left == 0 && p.pad_right == 0;
  if (filters_channels_first(p)) return unpadded && p.x.w == 1 && whole(p.stride_w) && whole(p.S) && whole(p.x.c);
  if (p.x.c != 1) return false;
  return (whole(p.C) && whole(p.x.w)) || (unpadded && p.x.w == p.C && whole(p.stride_w * p.x.w) && whole(p.S * p.C));
}

// Is every input in a patch?
constexpr bool patch_fills(Problem const& p) { return patch_steps(p) && p.P() * p.R == p.H && p.Q() * p.S == p.W; }

// Is dgrad's result written along planes, each pixel from its patch?
inline constexpr int64_t kMostFilledAxes = 8192;  // rows and columns
constexpr bool patch_fills_planes(Problem const& p) {
  return p.x.w == 1 && p.W > 1 && p.H + p.W <= kMostFilledAxes && p.x.c != 1 && !patch_vectors(p) &&
         double(p.N) * double(p.C) < 2e9 && double(p.P()) * double(p.Q()) * double(patch_length(p)) < 2e9;
}

// Elements of 2 bytes that are moved one by one: as measured, of NCHW and channels_last.
constexpr double patch_ns(Row const& row, Problem const& p) {
  if (!is_patches(row, p)) return 0;
  bool const singly = size_of(p.dtype) == 2 && !patch_vectors(p), backward = row.op == Op::dgrad;
  bool const planes = backward && patch_fills_planes(p);
  double const each = !singly || planes ? 0 : !backward ? 0.0016 : 0.004;
  double const elements = double(p.N) * double(p.P()) * double(p.Q()) * double(patch_length(p));
  double const byte_ns = (planes ? 0.4 : row.op == Op::wgrad ? 0.8 : 0.5) / 1000;
  double const patches_ns = double(patch_bytes(row, p)) * byte_ns;
  // Whole planes, or zeros beforehand.
  double const x_bytes = double(p.N) * double(p.C) * double(p.H) * double(p.W) * size_of(p.dtype);
  double const pixel_ns = p.W % 4 == 0 ? 0.001 : 0.0018;  // of a row's four at a time, or words
  double const filled_ns = planes                        ? x_bytes / size_of(p.dtype) * pixel_ns
                           : !backward || patch_fills(p) ? 0
                                                         : 2000 + x_bytes / 3000;
  // As measured: whole vectors for tma_sums.cuh (2x8x64x64 to 512 3x3 15.1 us, estimated at 19.0).
  bool const alone = patch_few_sums(row, p) && engine_takes(p) && !patch_steps(p);  // other rows take no patches
  double const less = alone && patch_vectors(p) ? 2000 + patches_ns * 0.4 : 0;
  return (patch_pads(p) ? 7000 : 4000) + patches_ns + elements * each + filled_ns - less;
}

}  // namespace conv2d_ext
