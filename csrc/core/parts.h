// Problems that a launch of tma.cuh does not take, in parts that it does, one launch each: of dgrad with a stride of
// many phases those along H, each with all along W; of fprop and dgrad with far taps every f-th row or column, whose
// taps lie f times as near. A part is a problem of its own, whose rows and columns lie apart.
#pragma once

#include "near_taps.h"
#include "tma.h"

namespace conv2d_ext {

inline constexpr int64_t kMaxPartsOfAxis = 32;

// What a part has of an axis: every x_step-th pixel of x from x_first on, and so on.
struct AxisPart {
  int64_t x_first = 0, x_step = 1, extent = 0, w_first = 0, w_step = 1, taps = 0, y_first = 0, y_step = 1, pixels = 0;
  int64_t stride = 1, pad = 0, dilation = 1;
};

// One of the phases of dgrad; no taps if none meets it.
constexpr AxisPart phase_part(int64_t extent, int64_t pixels, int64_t taps, int64_t stride, int64_t pad,
                              int64_t dilation, int64_t phase) {
  Walk const w = dgrad_walk(extent, taps, stride, pad, dilation, phase);
  AxisPart a;
  a.x_first = phase, a.x_step = stride, a.extent = w.pixels, a.pixels = pixels;
  a.taps = w.taps, a.w_step = -w.tap_step, a.dilation = w.tap_stride;
  if (w.taps > 0) a.w_first = w.first_tap + (w.taps - 1) * w.tap_step, a.pad = w.lower + (w.taps - 1) * w.tap_stride;
  return a;
}

// Of every `of`-th pixel, which divides the dilation; a stride of one.
constexpr AxisPart far_part(int64_t extent, int64_t pixels, int64_t taps, int64_t pad, int64_t dilation, int64_t of,
                            int64_t index) {
  AxisPart a;
  int64_t const at = index - pad, before = at < 0 ? ceil_div(-at, of) : -(at / of);
  a.x_first = at + before * of, a.x_step = a.y_step = of, a.y_first = index;
  a.extent = ceil_div(extent - a.x_first, of), a.pixels = ceil_div(pixels - index, of);
  a.taps = taps, a.pad = before, a.dilation = dilation / of;
  return a;
}

// Can one launch's copies reach all taps of an axis?
constexpr bool engine_reaches(Op op, int64_t extent, int64_t pixels, int64_t taps, int64_t pad, int64_t dilation) {
  return op == Op::fprop ? im2col_supports(fprop_walk(pixels, taps, 1, pad, dilation), extent)
                         : im2col_supports(dgrad_walk(extent, taps, 1, pad, dilation, 0), pixels);
}

// In how many parts an axis with a stride of one is taken; 0: in none.
constexpr int64_t far_parts(Op op, int64_t extent, int64_t pixels, int64_t taps, int64_t pad, int64_t dilation) {
  for (int64_t of = 1; of <= min64(min64(extent, pixels), kMaxPartsOfAxis); ++of) {
    bool reached = dilation % of == 0;
    for (int64_t index = 0; index < of && reached; ++index) {  // parts differ by a pixel: any may be the longest
      AxisPart const part = far_part(extent, pixels, taps, pad, dilation, of, index);
      reached = engine_reaches(op, part.extent, part.pixels, taps, part.pad, part.dilation);
    }
    if (reached) return of;
  }
  return 0;
}

struct Parts {
  bool phases = false;
  int64_t h = 0, w = 0;  // 0: the row runs the problem as it is
  Near near{};           // the problem that is cut
  constexpr int64_t count() const { return h * w; }
};

constexpr Parts parts_of(Row const& row, Problem const& p) {
  bool const pixels = row.variant == Variant::im2col || row.variant == Variant::raw || is_halo(row.variant);
  if (row.family != Family::tma || row.op == Op::wgrad || !pixels || p.groups != 1) return {};
  bool const plain = p.stride_h == 1 && p.stride_w == 1;
  if (plain && engine_reaches(row.op, p.H, p.P(), p.R, p.pad_top, p.dilation_h) &&
      engine_reaches(row.op, p.W, p.Q(), p.S, p.pad_left, p.dilation_w))
    return {};
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.P() == 0 || p.Q() == 0) return {};
  if (plain) {
    Near const near = without_far_taps(p);
    Problem const& q = near.problem;
    int64_t const h = far_parts(row.op, q.H, q.P(), q.R, q.pad_top, q.dilation_h),
                  w = far_parts(row.op, q.W, q.Q(), q.S, q.pad_left, q.dilation_w);
    return h * w == 0 ? Parts{} : Parts{false, h, w, near};
  }
  int64_t const rows = phases_of(p.H, p.stride_h), columns = phases_of(p.W, p.stride_w);
  bool const many = row.op == Op::dgrad && rows * columns > kMaxPhases && rows <= kMaxPartsOfAxis && columns > 1 &&
                    columns <= kMaxPhases;
  return many ? Parts{true, rows, 1, {p, 0}} : Parts{};
}

// Offsets are elements. A part of no taps is zeros.
struct Part {
  Problem problem;
  int64_t x, w, y;
};
constexpr Part part_of(Parts const& parts, int64_t index) {
  Problem const& p = parts.near.problem;
  AxisPart h, w;
  if (parts.phases) {
    h = phase_part(p.H, p.P(), p.R, p.stride_h, p.pad_top, p.dilation_h, index);
    w.extent = p.W, w.taps = p.S, w.pixels = p.Q(), w.stride = p.stride_w, w.pad = p.pad_left,
    w.dilation = p.dilation_w;
  } else {
    h = far_part(p.H, p.P(), p.R, p.pad_top, p.dilation_h, parts.h, index / parts.w);
    w = far_part(p.W, p.Q(), p.S, p.pad_left, p.dilation_w, parts.w, index % parts.w);
  }
  Part part{p, h.x_first * p.x.h + w.x_first * p.x.w, parts.near.w_offset + h.w_first * p.w.h + w.w_first * p.w.w,
            h.y_first * p.y.h + w.y_first * p.y.w};
  Problem& q = part.problem;
  auto behind = [](AxisPart const& a) {
    return (a.pixels - 1) * a.stride + (a.taps - 1) * a.dilation + 1 - a.extent - a.pad;
  };
  q.H = h.extent, q.R = h.taps, q.stride_h = h.stride, q.dilation_h = h.dilation;
  q.W = w.extent, q.S = w.taps, q.stride_w = w.stride, q.dilation_w = w.dilation;
  q.pad_top = h.pad, q.pad_bottom = behind(h), q.pad_left = w.pad, q.pad_right = behind(w);
  q.x.h *= h.x_step, q.x.w *= w.x_step, q.w.h *= h.w_step, q.w.w *= w.w_step, q.y.h *= h.y_step, q.y.w *= w.y_step;
  return part;
}

}  // namespace conv2d_ext
