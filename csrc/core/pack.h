// Packing: tensors that a tma row cannot read or write in place are copied to the workspace, channels_last, each
// group's channels and filters padded with zeros to what the row takes; the row then runs on the packed problem, and a
// result is copied back. Padded channels are zeros in both operands of a product; what a padded filter yields is dropped.
#pragma once

#include <cstdint>

#include "pointwise.h"

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

// Channels and filters a group, padded. Those that an im2col copy takes from a packed tensor are padded to whole lines
// of 128 bytes where half of the last would be empty: the copy engine takes up to 16 ns for such a line, 2 for a full one.
struct PackedGroup {
  int64_t C, K;
};
constexpr PackedGroup packed_group(Op op, Problem const& p) {
  int64_t const v = 16 / size_of(p.dtype), apart = p.groups == 1 || op == Op::wgrad ? v : tma_together(p.dtype);
  TmaTakesAny const any = tma_takes_any(op, p.dtype);
  auto pad = [&](bool takes_any, int64_t channels, Strides const& s, int align, int64_t h, int64_t w) {
    if (takes_any) return op == Op::fprop || any.w ? channels : round_up(channels, v);
    int64_t const line = 128 / size_of(p.dtype), least = round_up(channels, apart), whole = round_up(channels, line);
    bool const is_packed = least != channels || !fits_in_place(s, align, channels, p.N, h, w, p.dtype);
    double const bytes = double(p.N) * double(h) * double(w) * double(whole) * double(p.groups) * size_of(p.dtype);
    return is_packed && least % line <= line / 2 && bytes <= kFreePackedBytes ? whole : least;
  };
  return {pad(any.x, p.C_per_group(), p.x, p.x_align, p.H, p.W),
          pad(any.y, p.K_per_group(), p.y, p.y_align, p.P(), p.Q())};
}

// What of the problem is packed for the rows of tma, and the problem that they then run.
struct Packed {
  Packing which;
  Problem problem;
};
constexpr Packed packed(Row const& row, Problem const& p) {
  Op const op = row.op;
  if (is_pointwise(row)) {  // only filters are packed, those of dgrad with k contiguous
    Packed q{{false, true, false}, p};
    q.problem.w = op == Op::dgrad ? Strides{1, p.K, 0, 0} : Strides{p.C, 1, 0, 0};
    q.problem.w_align = 16;
    return q;
  }
  PackedGroup const g = packed_group(op, p);
  bool const C = g.C != p.C_per_group(), K = g.K != p.K_per_group();
  TmaTakesAny const any = tma_takes_any(op, p.dtype);
  Packed q{{}, p};
  q.which.x = C || (!any.x && !fits_in_place(p.x, p.x_align, g.C, p.N, p.H, p.W, p.dtype));
  q.which.w = C || K || (!any.w && !fits_in_place(p.w, p.w_align, g.C, p.K, p.R, p.S, p.dtype));
  q.which.y = K || (!any.y && !fits_in_place(p.y, p.y_align, g.K, p.N, p.P(), p.Q(), p.dtype));
  q.problem.C = g.C * p.groups, q.problem.K = g.K * p.groups;
  if (q.which.x) q.problem.x = channels_last_strides(q.problem.C, p.H, p.W), q.problem.x_align = 16;
  if (q.which.w) q.problem.w = channels_last_strides(g.C, p.R, p.S), q.problem.w_align = 16;
  if (q.which.y) q.problem.y = channels_last_strides(q.problem.K, p.P(), p.Q()), q.problem.y_align = 16;
  return q;
}

constexpr bool pack_supports(Row const& row, Problem const& p) {
  if (p.N == 0 || p.C == 0 || p.H == 0 || p.W == 0 || p.K == 0) return false;
  PackedGroup const g = packed_group(row.op, p);
  double const x = double(p.N) * double(p.H) * double(p.W), y = double(p.N) * double(p.P()) * double(p.Q()),
               w = double(p.R) * double(p.S), groups = double(p.groups);
  double const plain = (x * double(p.C) + y * double(p.K) + w * double(p.K) * double(p.C_per_group())) * size_of(p.dtype);
  double const copies = (x * double(g.C) + y * double(g.K) + w * double(g.K) * double(g.C)) * groups * size_of(p.dtype);
  if (copies > kMaxPackedBytes || (copies > kFreePackedBytes && copies > 3 * plain)) return false;
  if (is_pointwise(row)) return row.op != Op::wgrad && pointwise_supports(row.op, packed(row, p).problem);
  Packed const q = packed(row, p);
  return q.which.any() && tma_supports(row, q.problem);
}

// Where the copies are, in bytes from the start of the workspace, behind the row's own part; -1: there is none.
struct PackedPlaces {
  int64_t x = -1, w = -1, y = -1, bias = -1, bytes = 0;
};
constexpr PackedPlaces packed_places(Op op, Problem const& p, Packed const& q, int64_t row_bytes) {
  PackedPlaces at;
  at.bytes = round_up(row_bytes, 256);
  auto place = [&](bool wanted, int64_t elements) {
    int64_t const begin = at.bytes;
    if (wanted) at.bytes = round_up(begin + elements * size_of(p.dtype), 256);
    return wanted ? begin : -1;
  };
  Problem const& c = q.problem;
  at.x = place(q.which.x, c.N * c.C * c.H * c.W);
  at.w = place(q.which.w, c.K * c.C_per_group() * c.R * c.S);
  at.y = place(q.which.y, c.N * c.K * c.P() * c.Q());
  at.bias = place(op == Op::fprop && c.K != p.K, c.K);
  return at;
}

// The passes that pack and unpack: one launch for the operands, one for the result.
constexpr double packing_ns(Op op, Problem const& p, Packed const& q) {
  Problem const& c = q.problem;
  double const x = double(p.N) * double(p.H) * double(p.W) * double(p.C + c.C),
               y = double(p.N) * double(p.P()) * double(p.Q()) * double(p.K + c.K),
               w = double(p.R) * double(p.S) *
                   (double(p.K) * double(p.C_per_group()) + double(c.K) * double(c.C_per_group()));
  bool const out = op == Op::fprop ? q.which.y : op == Op::dgrad ? q.which.x : q.which.w;
  bool const in = (op != Op::dgrad && q.which.x) || (op != Op::wgrad && q.which.w) || (op != Op::fprop && q.which.y);
  double const elements = (q.which.x ? x : 0) + (q.which.w ? w : 0) + (q.which.y ? y : 0);
  return elements * size_of(p.dtype) / 3400 + (in ? 3000 : 0) + (out ? 3000 : 0);
}

}  // namespace conv2d_ext
