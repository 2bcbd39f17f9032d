// stem_taps.cuh, a last layer's few results in 16 bits and TF32 from the products of all taps: what it takes and its
// cut of a problem.
#pragma once

#include "stem.h"
#include "tma.h"

namespace conv2d_ext {

constexpr bool is_stem_taps(Row const& row) {
  return row.family == Family::stem && row.variant == Variant::lines && row.tile_m == 64;
}

inline constexpr int kTapsRows = 64;      // of an instruction: taps of all results
inline constexpr int kTapsOutputs = 128;  // of a line, one a thread
inline constexpr int kTapsGroups = 2;     // warpgroups, each of which walks for itself

constexpr int64_t stem_taps_results(int64_t R) { return min64(8, kTapsRows / (R * R)); }

// Planes of pixels side by side.
constexpr bool stem_taps_planes(StemView const& v) { return v.in.c != 1 || (v.in.w == 1 && v.W > 1); }

// A warpgroup walks down the rows of a segment: `ends_w` outputs of `ends_h` rows. Over planes (NCHW, 16 bits) a line
// is boxes of 64 pixels by 64 channels, which begin at multiples of 16 bytes, `lead` pixels before the first that is
// needed.
struct StemTaps {
  bool planes = false;
  int64_t columns = 0;  // of an instruction; 0: it does not fit
  int64_t segments = 0, ends_w = 0, ranges = 0, ends_h = 0, items = 0;
  int64_t lead = 0, box = 0, chunks = 0;  // pixels of a line; its parts of 128 bytes of channels
  int64_t filter_bytes = 0, stage_bytes = 0, stages = 0, sum_bytes = 0, shared_bytes = 0;
  double ns = 0;

  constexpr StemTaps(Op op, Problem const& p, Device const& d) {
    StemView const v = stem_view(op, p);
    planes = stem_taps_planes(v);
    lead = planes ? ((-v.pad_w) % 8 + 8) % 8 : 0;
    segments = ceil_div(v.Q, planes ? (kTapsOutputs - lead - p.S + 1) / 8 * 8 : kTapsOutputs);
    ends_w = ceil_div(v.Q, segments);
    if (planes && segments > 1) ends_w = ceil_div(ends_w, 8) * 8;
    box = lead + ends_w + p.S - 1;
    int64_t const size = size_of(p.dtype), small = size == 2 ? 80 : 128;
    int64_t const wide = box <= small ? small : size == 4 ? 160 : planes ? 128 : 144;
    chunks = ceil_div(v.C * size, 128), filter_bytes = chunks * kTapsRows * 128;
    stage_bytes = planes ? ceil_div(wide, 64) * 64 * 128 : wide * 128;
    sum_bytes = ceil_div(v.K * p.R * p.S * (wide + 8) * 4, 128) * 128;
    int64_t const left = 224 * 1024 - filter_bytes - kTapsGroups * sum_bytes;
    stages = left < 0 ? 0 : min64(left / (kTapsGroups * stage_bytes), 16);
    if (stages < 2) return;
    shared_bytes = filter_bytes + kTapsGroups * (sum_bytes + stages * stage_bytes) + 1024;
    columns = wide;
    // A line's products on an SM that both warpgroups share, or what a warpgroup's line takes, step by step; and all
    // lines from L2. As fitted to 60 layers (docs/tuning/stem.md).
    double const products = double(chunks * wide) * 1.2, taps = double(v.K * p.R * p.S);
    double const alone = products + 250 + 12 * taps, line_ns = 2 * products > alone ? 2 * products : alone;
    // Pixels of a box beyond the plane take half.
    int64_t const boxes = ceil_div(box, 64) * 64;
    double const line_bytes = planes ? double(chunks * 64 * (boxes + min64(boxes, v.W))) : double(box * v.C * size);
    int64_t before = 0;
    for (int64_t rounds = 1; rounds <= 8; ++rounds) {
      int64_t const of = min64(v.P, max64(1, kTapsGroups * d.sm_count * rounds / (p.N * segments)));
      if (of == before) continue;
      before = of;
      int64_t const rows = ceil_div(v.P, of), parts = ceil_div(v.P, rows), all = p.N * segments * parts;
      double const lines = double(rows + p.R - 1), copy_ns = double(all) * lines * line_bytes / 3400;
      double const work_ns = double(ceil_div(all, kTapsGroups * d.sm_count)) * lines * line_ns;
      double const least = copy_ns > work_ns ? copy_ns : work_ns;
      if (ns != 0 && least >= ns) continue;
      ns = least, ranges = parts, ends_h = rows, items = all;
    }
    // As measured, stores that one tap does not hide: 32x8x112x112 to 48 D 29.2 us, estimated at 18.7 without.
    if (p.R == 1) ns += double(p.N) * double(v.P * v.Q * v.K) * (size == 2 ? 0.0034 : 0.0022);
    // Filters that are read one by one take turns of 16 loads.
    ns += 7300 + (v.w_in == 1 ? 0 : taps * double(v.C) / (256 * 16) * (size == 4 ? 4500 : 1200));
  }
};

constexpr bool stem_taps_supports(Op op, Problem const& p, Device const& d) {
  if (op == Op::wgrad || size_of(p.dtype) > 4 || p.groups != 1 || p.N == 0 || p.P() <= 0 || p.Q() <= 0) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.R != p.S || (p.R != 1 && p.R != 3 && p.R != 5 && p.R != 7)) return false;
  if (p.dtype == DType::f32 && !p.allow_tf32) return false;
  StemView const v = stem_view(op, p);
  if (v.C < 8 || v.C > 512 || v.K < 1 || v.K > stem_taps_results(p.R) || min64(min64(v.H, v.W), min64(v.P, v.Q)) < 1)
    return false;
  int const align = op == Op::dgrad ? p.y_align : p.x_align;
  if (!map_supports(v.in, p.N, v.H, v.W, p.dtype)) return false;
  if (stem_taps_planes(v)) {
    auto const whole = [](int64_t stride) { return stride % 8 == 0; };
    if (p.dtype == DType::f32 || v.in.w != 1 || !whole(v.in.c) || !whole(v.in.h) || !whole(v.in.n) || align < 16 ||
        v.in.c <= 0)
      return false;
  } else if (!channel_vectors(v.in, align, v.C, 16 / size_of(p.dtype), p.dtype)) {
    return false;
  }
  double const limit = double(int64_t(1) << 30);
  double const reach = double(p.K) * double(max64(p.w.n, 0)) + double(p.C) * double(max64(p.w.c, 0)) +
                       double(p.R) * double(p.w.h) + double(p.S) * double(p.w.w);  // int in the kernel
  if (reach >= 2 * limit) return false;
  if (double(p.N) * double(v.P + v.H + 64) * double(v.Q + v.W + 64) >= limit) return false;
  return StemTaps(op, p, d).columns > 0;
}

}  // namespace conv2d_ext
