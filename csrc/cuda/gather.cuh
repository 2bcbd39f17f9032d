// The addresses of the implicit GEMMs. fprop, dgrad and wgrad are
//   out[m, n] = sum over k of A(m, k) * B(n, k) (+ bias[n]),
// and each gathers its operands from addresses that are a sum of a part of the row (m or n) and a part of k:
//            m             n        k           A                      B
//   fprop    n, p, q       filter   r, s, c     x at (p, q) * (r, s)   w
//   dgrad    n, h, w       c        r, s, k     y at (h, w) / (r, s)   w     one phase of the stride at a time
//   wgrad    r, s, c       filter   n, p, q     x at (p, q) * (r, s)   y
// The host writes these sums as linear maps of up to three digits (Params); a kernel knows no convolution but the
// bounds of A's two image coordinates, and dgrad's phases.
#pragma once

#include <cstdint>

#include "launch.h"

namespace conv2d_ext {

// A linear map of three digits.
struct Map {
  int64_t a[3], b[3], out[3];  // element offsets in A, B and out
  int32_t h[3], w[3];          // A's image coordinates
};

// dgrad, one image axis: the pixels of a phase are first + i * stride, and meet the taps first_tap + j * tap_step.
struct Axis {
  int64_t extent, taps, stride, pad, dilation;
  int64_t tap_step;    // stride / gcd(dilation, stride)
  int64_t coord_step;  // dilation / gcd: how far one tap_step moves in y
  int64_t phases;
};

struct Params {
  int64_t m_radix[3], k_radix[3];  // slowest digit first; m_radix[0] and k_radix[0] are not needed to split an index
  int64_t M, N, depth;             // depth = product of k_radix
  Map m, k;
  int64_t n_b, n_out;  // per row of B
  int64_t group_a, group_b, group_out, group_bias;
  int64_t a_base;  // offset of coordinate (0, 0) - padding
  int32_t h_base, w_base;
  int32_t h_extent, w_extent;  // A's coordinates are valid in [0, extent)
  bool phased;                 // dgrad
  Axis axis_h, axis_w;         // if phased; then m digits are (n, i, j), k digits hold tap digits at tap_h, tap_w
  int tap_h, tap_w;            // which digit of k is the tap
  int64_t phase_out_h, phase_out_w, phase_a_h, phase_a_w, phase_b_h, phase_b_w;
  int64_t tiles_m, tiles_n, phases, groups, splits;
  int64_t first_tile;  // of this launch
  int64_t tiles;       // of the whole problem, without splits
  void const* a;
  void const* b;
  void const* bias;
  int64_t bias_stride;
  void* out;
  void* workspace;
};

// Quotient and remainder; 32-bit where both fit, for 64-bit division is a long subroutine.
__device__ inline int64_t divide(int64_t& value, int64_t divisor) {
  int64_t quotient;
  if (((value | divisor) >> 32) == 0) {
    uint32_t const v = uint32_t(value), d = uint32_t(divisor);
    quotient = v / d;
    value = v % d;
  } else {
    quotient = value / divisor;
    value = value % divisor;
  }
  return quotient;
}

// What one block works on.
struct Tile {
  int64_t m0, n0, group, split;
  int64_t M, depth;  // of this phase
  int64_t m_radix[3], k_radix[3];
  int64_t a_base, b_base, out_base;
  int32_t h_base, w_base;
};

// The first tap that meets pixel `phase`, or axis.taps if none does.
__device__ inline int64_t first_tap(Axis const& axis, int64_t phase) {
  int64_t const limit = axis.tap_step < axis.taps ? axis.tap_step : axis.taps;
  for (int64_t r = 0; r < limit; ++r)
    if ((phase + axis.pad - r * axis.dilation) % axis.stride == 0) return r;
  return axis.taps;
}

__device__ inline void locate(Params const& p, int64_t index, Tile& t) {
  int64_t rest = index;
  t.split = divide(rest, p.tiles);
  t.group = divide(rest, p.tiles_m * p.tiles_n * p.phases);
  int64_t phase = divide(rest, p.tiles_m * p.tiles_n);
  t.m0 = divide(rest, p.tiles_n);
  t.n0 = rest;
  t.M = p.M;
  t.depth = p.depth;
  for (int i = 0; i < 3; ++i) {
    t.m_radix[i] = p.m_radix[i];
    t.k_radix[i] = p.k_radix[i];
  }
  t.a_base = p.a_base + t.group * p.group_a;
  t.b_base = t.group * p.group_b;
  t.out_base = t.group * p.group_out;
  t.h_base = p.h_base;
  t.w_base = p.w_base;
  if (p.phased) {
    int64_t const phase_h = divide(phase, p.axis_w.phases), phase_w = phase;
    int64_t const r0 = first_tap(p.axis_h, phase_h), s0 = first_tap(p.axis_w, phase_w);
    int64_t const taps_h = (p.axis_h.taps - r0 + p.axis_h.tap_step - 1) / p.axis_h.tap_step;
    int64_t const taps_w = (p.axis_w.taps - s0 + p.axis_w.tap_step - 1) / p.axis_w.tap_step;
    t.m_radix[1] = (p.axis_h.extent - phase_h + p.axis_h.stride - 1) / p.axis_h.stride;
    t.m_radix[2] = (p.axis_w.extent - phase_w + p.axis_w.stride - 1) / p.axis_w.stride;
    t.M = t.m_radix[0] * t.m_radix[1] * t.m_radix[2];
    t.k_radix[p.tap_h] = taps_h;
    t.k_radix[p.tap_w] = taps_w;
    t.depth = t.k_radix[0] * t.k_radix[1] * t.k_radix[2];
    if (t.depth > 0) {  // else no tap meets the phase, and its pixels are zero
      int64_t const h = (phase_h + p.axis_h.pad - r0 * p.axis_h.dilation) / p.axis_h.stride;
      int64_t const w = (phase_w + p.axis_w.pad - s0 * p.axis_w.dilation) / p.axis_w.stride;
      t.h_base = int32_t(h);
      t.w_base = int32_t(w);
      t.a_base += h * p.phase_a_h + w * p.phase_a_w;
      t.b_base += r0 * p.phase_b_h + s0 * p.phase_b_w;
    }
    t.out_base += phase_h * p.phase_out_h + phase_w * p.phase_out_w;
  }
}

// An offset that stays negative whatever is added to it: a row or a k that does not exist.
constexpr int64_t kNone = -(int64_t(1) << 62);

struct alignas(16) Point {
  int64_t offset;
  int32_t h, w;
};

// Where the rows of a tile are in A, B and out.
template <int TM, int TN>
struct Rows {
  Point a[TM];
  int64_t b[TN];
  int64_t out_m[TM], out_n[TN];  // -1: no such output
};

template <int TM, int TN>
__device__ inline void fill_rows(Params const& p, Tile const& t, int64_t tile_m, int64_t tile_n, Rows<TM, TN>& rows) {
  for (int i = threadIdx.x; i < TM; i += blockDim.x) {
    int64_t const m = tile_m * TM + i;
    if (m >= t.M) {
      rows.a[i] = {kNone, 0, 0};
      rows.out_m[i] = -1;
      continue;
    }
    int64_t d[3] = {0, 0, m};
    d[1] = divide(d[2], t.m_radix[2]);
    d[0] = divide(d[1], t.m_radix[1]);
    Point point{t.a_base, t.h_base, t.w_base};
    int64_t out = t.out_base;
    for (int j = 0; j < 3; ++j) {
      point.offset += d[j] * p.m.a[j];
      point.h += int32_t(d[j]) * p.m.h[j];
      point.w += int32_t(d[j]) * p.m.w[j];
      out += d[j] * p.m.out[j];
    }
    rows.a[i] = point;
    rows.out_m[i] = out;
  }
  for (int i = threadIdx.x; i < TN; i += blockDim.x) {
    int64_t const n = tile_n * TN + i;
    bool const exists = n < p.N;
    rows.b[i] = exists ? t.b_base + n * p.n_b : kNone;
    rows.out_n[i] = exists ? n * p.n_out : -1;
  }
}

// The parts of k of one step.
template <int TK>
struct Columns {
  Point a[TK];
  int64_t b[TK];
};

// Walks k in steps of TK without dividing: one thread per column counts its three digits. It lives in shared memory,
// for only TK threads need it and registers are short.
struct Counter {
  int64_t digit[3], step[3];
  int64_t k;

  __device__ void start(Tile const& t, int64_t first, int step_size) {
    k = first;
    digit[0] = digit[1] = 0, digit[2] = first;
    step[0] = step[1] = 0, step[2] = step_size;
    if (t.depth == 0) return;
    digit[1] = divide(digit[2], t.k_radix[2]);
    digit[0] = divide(digit[1], t.k_radix[1]);
    step[1] = divide(step[2], t.k_radix[2]);
    step[0] = divide(step[1], t.k_radix[1]);
  }

  __device__ void advance(Tile const& t, int step_size) {
    k += step_size;
    digit[2] += step[2];
    int64_t carry = digit[2] >= t.k_radix[2];
    digit[2] -= carry ? t.k_radix[2] : 0;
    digit[1] += step[1] + carry;
    carry = digit[1] >= t.k_radix[1];
    digit[1] -= carry ? t.k_radix[1] : 0;
    digit[0] += step[0] + carry;
  }

  __device__ void write(Params const& p, Tile const& t, Point& a, int64_t& b) const {
    bool const exists = k < t.depth;
    Point point{exists ? 0 : kNone, 0, 0};
    int64_t offset = exists ? 0 : kNone;
    if (exists) {
      for (int j = 0; j < 3; ++j) {
        point.offset += digit[j] * p.k.a[j];
        point.h += int32_t(digit[j]) * p.k.h[j];
        point.w += int32_t(digit[j]) * p.k.w[j];
        offset += digit[j] * p.k.b[j];
      }
    }
    a = point;
    b = offset;
  }
};

// ---- host side

struct Digits {
  int64_t c, r, s;  // a filter position's three digits, as indices into the radices
};

// Channels are the fastest digit where they are contiguous, else the filter's columns.
inline Digits order_of(bool channels_fastest) { return channels_fastest ? Digits{2, 0, 1} : Digits{0, 1, 2}; }

inline Params params_of(Op op, Problem const& p, Row const& row, Plan const& plan, Arguments const& args) {
  Params q{};
  int64_t const P = p.P(), Q = p.Q(), C = p.C_per_group(), K = p.K_per_group();
  Digits const d = order_of((op == Op::dgrad ? p.y.c : p.x.c) == 1);
  q.splits = plan.split_k;
  q.groups = p.groups;
  q.phases = 1;
  if (op == Op::fprop || op == Op::wgrad) {
    // A is x. `pixel` maps (n, p, q), `tap` maps (r, s, c).
    Map pixel{}, tap{};
    pixel.a[0] = p.x.n, pixel.a[1] = p.stride_h * p.x.h, pixel.a[2] = p.stride_w * p.x.w;
    pixel.h[1] = int32_t(p.stride_h), pixel.w[2] = int32_t(p.stride_w);
    tap.a[d.c] = p.x.c, tap.a[d.r] = p.dilation_h * p.x.h, tap.a[d.s] = p.dilation_w * p.x.w;
    tap.h[d.r] = int32_t(p.dilation_h), tap.w[d.s] = int32_t(p.dilation_w);
    int64_t const pixel_radix[3] = {p.N, P, Q};
    int64_t tap_radix[3];
    tap_radix[d.c] = C, tap_radix[d.r] = p.R, tap_radix[d.s] = p.S;
    q.a_base = -p.pad_top * p.x.h - p.pad_left * p.x.w;
    q.h_base = int32_t(-p.pad_top), q.w_base = int32_t(-p.pad_left);
    q.h_extent = int32_t(p.H), q.w_extent = int32_t(p.W);
    q.N = K;
    q.group_a = C * p.x.c;
    bool const forward = op == Op::fprop;
    int64_t const pixel_y[3] = {p.y.n, p.y.h, p.y.w};
    int64_t tap_w[3];
    tap_w[d.c] = p.w.c, tap_w[d.r] = p.w.h, tap_w[d.s] = p.w.w;
    for (int i = 0; i < 3; ++i) {
      (forward ? pixel.out : pixel.b)[i] = pixel_y[i];
      (forward ? tap.b : tap.out)[i] = tap_w[i];
      q.m_radix[i] = (forward ? pixel_radix : tap_radix)[i];
      q.k_radix[i] = (forward ? tap_radix : pixel_radix)[i];
    }
    q.m = forward ? pixel : tap;
    q.k = forward ? tap : pixel;
    q.n_b = forward ? p.w.n : p.y.c;
    q.n_out = forward ? p.y.c : p.w.n;
    q.group_b = K * q.n_b;
    q.group_out = K * q.n_out;
    q.group_bias = K * args.bias_stride;
  } else {
    // A is y at ((h, w) + pad - (r, s) * dilation) / stride, phase by phase.
    auto axis = [](int64_t extent, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
      int64_t const g = gcd64(dilation, stride);
      return Axis{extent, taps, stride, pad, dilation, stride / g, dilation / g, min64(stride, extent)};
    };
    q.phased = p.stride_h > 1 || p.stride_w > 1;
    q.axis_h = axis(p.H, p.R, p.stride_h, p.pad_top, p.dilation_h);
    q.axis_w = axis(p.W, p.S, p.stride_w, p.pad_left, p.dilation_w);
    q.phases = q.axis_h.phases * q.axis_w.phases;
    q.tap_h = int(d.r), q.tap_w = int(d.s);
    q.m_radix[0] = p.N, q.m_radix[1] = ceil_div(p.H, p.stride_h), q.m_radix[2] = ceil_div(p.W, p.stride_w);
    q.k_radix[d.c] = K, q.k_radix[d.r] = p.R, q.k_radix[d.s] = p.S;
    q.m.a[0] = p.y.n, q.m.a[1] = p.y.h, q.m.a[2] = p.y.w;
    q.m.h[1] = q.m.w[2] = 1;
    q.m.out[0] = p.x.n, q.m.out[1] = p.stride_h * p.x.h, q.m.out[2] = p.stride_w * p.x.w;
    q.k.a[d.c] = p.y.c;
    q.k.a[d.r] = -q.axis_h.coord_step * p.y.h, q.k.a[d.s] = -q.axis_w.coord_step * p.y.w;
    q.k.h[d.r] = int32_t(-q.axis_h.coord_step), q.k.w[d.s] = int32_t(-q.axis_w.coord_step);
    q.k.b[d.c] = p.w.n, q.k.b[d.r] = q.axis_h.tap_step * p.w.h, q.k.b[d.s] = q.axis_w.tap_step * p.w.w;
    q.h_extent = int32_t(P), q.w_extent = int32_t(Q);
    if (!q.phased) {  // one phase, from tap (0, 0) on
      q.h_base = int32_t(p.pad_top), q.w_base = int32_t(p.pad_left);
      q.a_base = p.pad_top * p.y.h + p.pad_left * p.y.w;
    }
    q.phase_out_h = p.x.h, q.phase_out_w = p.x.w;
    q.phase_a_h = p.y.h, q.phase_a_w = p.y.w;
    q.phase_b_h = p.w.h, q.phase_b_w = p.w.w;
    q.N = C;
    q.n_b = p.w.c, q.n_out = p.x.c;
    q.group_a = K * p.y.c, q.group_b = K * p.w.n, q.group_out = C * p.x.c;
  }
  q.M = q.m_radix[0] * q.m_radix[1] * q.m_radix[2];
  q.depth = q.k_radix[0] * q.k_radix[1] * q.k_radix[2];
  q.tiles_m = ceil_div(q.M, row.tile_m);
  q.tiles_n = ceil_div(q.N, row.tile_n);
  q.tiles = q.tiles_m * q.tiles_n * q.phases * q.groups;
  q.a = args.a, q.b = args.b, q.bias = args.bias, q.out = args.out, q.workspace = args.workspace;
  q.bias_stride = args.bias_stride;
  return q;
}

constexpr int64_t kMaxGrid = (int64_t(1) << 31) - 1;

}  // namespace conv2d_ext
