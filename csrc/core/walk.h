// The tiles of cuda/depthwise_walk.cuh for a problem: shared by the planner and the launcher.
#pragma once

#include "depthwise.h"
#include "flat.h"

namespace conv2d_ext {

// Along one axis: which input, counted from the strip's first, output a meets with tap r.
//   fprop, wgrad: a * stride + r     dgrad: (a + parity - r) / stride + low where that divides, else none
struct ColumnAxis {
  bool backward;
  int R, stride;

  constexpr int parity() const { return backward ? (R - 1) / 2 % stride : 0; }  // of 'same' padding; others move strips
  constexpr int low() const { return backward ? (R - 1 - parity()) / stride : 0; }
  constexpr int index(int a, int r) const {
    if (!backward) return a * stride + r;
    int const t = a + parity() - r;
    return t % stride != 0 ? -1 : t / stride + low();
  }
  // Is tap r the one with which an output meets its first input?
  constexpr bool first(int r) const {
    if (!backward) return r == 0;
    return r + stride >= R;
  }
  // How many inputs `count` neighbouring outputs meet, and how far the inputs of `count` outputs are from the next's.
  constexpr int extent(int count) const {
    return backward ? (count - 1 + parity()) / stride + low() + 1 : (count - 1) * stride + R;
  }
  constexpr int advance(int count) const { return backward ? count / stride : count * stride; }
  // The first output of the first strip, and the coordinate of its index 0.
  constexpr int64_t origin(int64_t pad) const { return backward ? -((pad + parity()) % stride) : 0; }
  constexpr int64_t start(int64_t pad) const {
    return backward ? (origin(pad) + pad - parity()) / stride - low() : -pad;
  }
};

// A thread has `vector` channels of `width` columns and walks down `rows` rows of y (dgrad: of x). Other filters, sums
// and inputs leave no registers for more.
inline constexpr int kWalkThreads = 256;
constexpr int walk_threads(int R, int stride) { return R == 7 && stride == 1 ? 128 : kWalkThreads; }  // of wide strips
constexpr int walk_sums_threads(int R) { return R == 7 ? 192 : 256; }
// Blocks of an SM, by their registers.
constexpr int walk_sums_blocks(int R, int vector) { return R == 3 && vector == 1 ? 3 : 2; }

constexpr int walk_vector(Op op, int R, int size) {
  if (R != 3) return 1;
  return op == Op::wgrad ? (size == 2 ? 2 : 1) : size == 2 ? 4 : 2;
}
constexpr int walk_width(Op op, int R, int stride, int vector) {
  if (R == 7 && stride == 1 && op != Op::wgrad) return 7;
  if (R == 7 || op == Op::wgrad) return 4;
  if (R == 5) return op == Op::dgrad || stride == 1 ? 8 : 4;
  return vector == 4 && stride == 2 && op == Op::fprop ? 2 : 4;
}

// Rows that fprop and dgrad ask for in L2 ahead of the one that they load; larger filters gain nothing.
constexpr int walk_ahead(int R) { return R == 3 ? 2 : 0; }

// Channels of a thread: vectors where the strides allow.
constexpr int walk_channels(Op op, Problem const& p, int R) {
  int const v = walk_vector(op, R, size_of(p.dtype));
  return p.K == p.C && channel_vectors(p.x, p.x_align, p.C, v, p.dtype) &&
                 channel_vectors(p.y, p.y_align, p.C, v, p.dtype)
             ? v
             : 1;
}

struct WalkTile {
  int vector = 1, width = 4;
  int64_t strips = 1, rows = 1, chunks = 1, threads = 0;
  double ns = 0;
};

constexpr WalkTile walk_tile(Op op, Problem const& p, int R, int stride, Device const& d) {
  bool const backward = op == Op::dgrad;
  int const size = size_of(p.dtype);
  WalkTile best;
  int const v = walk_channels(op, p, R);
  best.vector = v, best.width = walk_width(op, R, stride, v);
  ColumnAxis const axis{backward, R, stride};
  int64_t const H = backward ? p.H : p.P(), W = (backward ? p.W : p.Q()) - axis.origin(p.pad_left);
  best.strips = ceil_div(W, best.width);
  // Instructions of a thread for an input row.
  double const outputs = best.width * v * (backward ? double(stride) : 1.0 / stride);
  double const issue = outputs * R * R / (backward ? stride * stride : 1) + axis.extent(best.width) * (v + 6.0) +
                       outputs * (1 + 6.0 / v) + 30;
  double const memory_ns = (walk_ahead(R) > 0 ? 0.85 : 1) * walk_memory_ns(p, d);
  for (int64_t chunks = 1; chunks <= H; chunks = chunks < 4 ? chunks + 1 : ceil_div(chunks * 3, 2)) {
    int64_t const rows = ceil_div(H, chunks), threads = p.N * best.strips * (p.K / v) * ceil_div(H, rows);
    if (chunks > 1 && threads >= int64_t(1) << 31) break;
    int const of_block = walk_threads(R, stride), warps = of_block < kWalkThreads ? 12 : 16;  // of an SM
    double const blocks = double(ceil_div(threads, of_block)), resident = warps * 32.0 / of_block * d.sm_count;
    // Of an input row, where an SM has all its blocks, and where it waits for one load after the other.
    double const share = blocks > resident ? 1 : blocks > resident / 2 ? blocks / resident : 0.5;
    double const multiply = issue * share * warps / 4 / 0.55 / 1.755;
    double const least = walk_ahead(R) > 0 ? 300 : 400, step = multiply > least ? multiply : least;
    double const rounds = blocks > resident ? blocks / resident : 1;
    double const count = backward ? double(rows - 1) / stride + R / stride + 1 : double((rows - 1) * stride + R);
    double const walk_ns = rounds * (count * step + 1000);
    double const both = memory_ns > walk_ns ? memory_ns + walk_ns / 8 : walk_ns + memory_ns / 8;
    // As measured. Rows far apart share less of what is in L2.
    double const apart = R == 3 && rows > 16 && rounds > 1 ? 1.1 : 1.0;
    double const start_ns = R == 3 && size == 4 && rounds >= 2.5 ? 8000 : 4300;
    double const ns = start_ns + ((size == 2 && stride == 2 && !backward) || rounds < 2.5 ? 1.17 : 1.0) * apart * both;
    if (best.ns == 0 || ns < best.ns)
      best.ns = ns, best.rows = rows, best.chunks = ceil_div(H, rows), best.threads = threads;
    if (rows == 1) break;
  }
  return best;
}

// wgrad: the threads of a block are `lanes` along the channels by `members`, which take units in turn: strips of
// a few columns, chunks of rows, and images.
struct WalkSumsTile {
  int vector = 1, lanes = 1, members = 1;
  int64_t slices = 1, strips = 1, rows = 1, chunks = 1;
  int64_t units = 1, each = 1, shares = 1;  // of a slice; of a block; blocks of a slice
  double ns = 0;
};

constexpr WalkSumsTile walk_sums_tile(Problem const& p, int R, int stride, Device const& d) {
  WalkSumsTile best;
  int const v = walk_channels(Op::wgrad, p, R), width = walk_width(Op::wgrad, R, stride, v);
  ColumnAxis const axis{false, R, stride};
  int64_t const P = p.P(), quads = p.K / v, strips = ceil_div(p.Q(), width);
  // Instructions of a thread for an input row.
  double const issue =
      double(width) * v * R * R / stride + (axis.extent(width) + double(width) / stride) * (v + 5.0) + 35;
  double const taps = double(p.K) * R * R, memory_ns = walk_memory_ns(p, d);
  for (int64_t most = 64; most >= 16; most /= 2) {
    WalkSumsTile t;
    t.vector = v, t.strips = strips;
    t.slices = ceil_div(quads, most), t.lanes = int(ceil_div(quads, t.slices)),
    t.members = walk_sums_threads(R) / t.lanes;
    for (int64_t chunks = 1; chunks <= P; chunks = chunks < 4 ? chunks + 1 : ceil_div(chunks * 3, 2)) {
      t.rows = ceil_div(P, chunks), t.chunks = ceil_div(P, t.rows), t.units = p.N * strips * t.chunks;
      double const count = double((t.rows - 1) * stride + R);
      int64_t const full = walk_sums_blocks(R, v) * int64_t(d.sm_count);
      // Blocks that fill the GPU once, or one of a slice.
      int64_t const counts[] = {max64(1, full / t.slices), max64(1, full / 2 / t.slices), 1};
      for (int64_t wanted : counts) {
        t.each = ceil_div(ceil_div(t.units, t.members), wanted) * t.members, t.shares = ceil_div(t.units, t.each);
        if (t.shares > 1 && double(t.shares) * taps * 4 > double(kMaxWorkspaceBytes)) continue;
        double const blocks = double(t.shares * t.slices);
        double const share = blocks > double(full) / 2 ? (blocks < double(full) ? blocks / double(full) : 1.0) : 0.5;
        double const multiply = issue * share * 2 * walk_sums_blocks(R, v) / 0.55 / 1.755,
                     step = multiply > 400 ? multiply : 400;
        double const turns = double(ceil_div(t.each, t.members)) * double(ceil_div(t.shares * t.slices, full));
        double const walk_ns = turns * (count * step + 300);
        double ns = memory_ns > walk_ns ? memory_ns + walk_ns / 8 : walk_ns + memory_ns / 8;
        ns += 6500 + (t.shares > 1 ? 3500 + double(t.shares) * taps * 8 / 2500 : 0);
        if (best.ns != 0 && ns >= best.ns) continue;
        best = t, best.ns = ns;
      }
      if (t.rows == 1) break;
    }
  }
  return best;
}

// Numbers of threads, and offsets in bytes from pixel to pixel of a row, are 32-bit.
constexpr bool walks(Op op, Problem const& p) {
  constexpr int64_t most = int64_t(1) << 31;
  return p.C_per_group() == 1 && p.K > 0 && (p.K == p.C || op != Op::dgrad) && (p.C == 1 || p.x.c == 1) &&
         (p.K == 1 || p.y.c == 1) && p.x.w < most / 512 && p.y.w < most / 512 &&
         double(p.N) * (double(max64(p.W, p.Q())) + 8) * double(max64(p.K, p.P())) < double(most);
}

// The filter and the image of a row for one size of filter; coordinates, and rows of all strips, are int.
constexpr bool walk_filter(Row const& row, Problem const& p) {
  if (p.R != row.tile_m || p.S != row.tile_n || p.stride_h != row.tile_k || p.stride_w != row.tile_k) return false;
  if (p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.N == 0 || p.C == 0 || p.H == 0 || p.W == 0 || p.P() == 0 || p.Q() == 0) return false;
  constexpr int64_t most = int64_t(1) << 30;
  double const columns = double(max64(p.W, p.Q())) + 8, rows = double(max64(p.H, p.P())) + 8;
  return p.H + p.pad_top + p.pad_bottom < most && p.W + p.pad_left + p.pad_right < most &&
         double(p.N) * columns * rows < double(most);
}

// The rows of depthwise for one size of filter in channels_last.
constexpr bool is_walk(Row const& row) {
  return row.family == Family::depthwise && row.tile_m != 0 && is_nhwc(row.variant);
}

constexpr bool walk_supports(Row const& row, Op op, Problem const& p) { return walks(op, p) && walk_filter(row, p); }

// As measured, beside the tile's own time.
constexpr double walk_sums_ns(WalkSumsTile const& t, int R, int stride) {
  return 6500 + (R == 7 ? 1.05 : stride == 2 ? 1.5 : R == 5 ? 1.2 : 1.3) * (t.ns - 6500);
}

// Does depthwise_flat.cuh take wgrad, not the walk?
constexpr bool sums_are_flat(Problem const& p, int R, int stride, Device const& d) {
  FlatTile const flat = flat_sums_tile(p, d);
  return flat.used && flat.ns < walk_sums_ns(walk_sums_tile(p, R, stride, d), R, stride);
}

constexpr Estimate walk_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  int const R = row.tile_m, stride = row.tile_k;
  if (op != Op::wgrad) return {(R == 5 && stride == 2 ? 1.45 : 1.0) * walk_tile(op, p, R, stride, d).ns, 1};
  if (sums_are_flat(p, R, stride, d)) {
    FlatTile const flat = flat_sums_tile(p, d);
    return {flat.ns, int(flat.parts)};
  }
  WalkSumsTile const t = walk_sums_tile(p, R, stride, d);
  return {walk_sums_ns(t, R, stride), int(t.shares)};
}

}  // namespace conv2d_ext
