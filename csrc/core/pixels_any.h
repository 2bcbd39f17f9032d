// pixels_any.cuh: small layers of 1x1 filters in either layout, whatever their channels, in one launch. What its rows
// take and cost, and what the launcher shares with the planner.
#pragma once

#include <cstdint>

#include "lean.h"
#include "row.h"

namespace conv2d_ext {

constexpr bool is_any_pixels(Row const& row) { return row.family == Family::pixels && row.variant == Variant::any; }

// An operand, or the result, as a matrix whose columns lie side by side in memory: channels of a pixel, or the pixels
// of an image, `image` of them, before those of the next image.
struct Matrix {
  int64_t rows = 0, columns = 0, step = 0;         // elements from row to row
  int64_t image = 0, image_step = 0;               // image == 0: all columns follow each other
  int align = 1;                                   // of its address, in bytes
  constexpr int vector(DType t, int most) const {  // elements that lie together wherever a vector begins
    int v = most / size_of(t);
    while (v > 1 && (columns % v != 0 || (rows > 1 && step % v != 0) || align % (v * size_of(t)) != 0 ||
                     (image > 0 && (image % v != 0 || image_step % v != 0))))
      v /= 2;
    return v;
  }
};

// out[m, n] = sum over k of a[m, k] * b[k, n]
struct AnyPixels {
  bool fits = false;
  bool lines = false;  // channels_last; else NCHW
  Matrix a, b, out;
  bool a_along = false, b_along = false;  // columns of the operand are what is summed over
  int64_t M = 0, N = 0, depth = 0;
  constexpr int vector(DType t) const {  // elements of both operands, up to four
    int const of_a = a.vector(t, 4 * size_of(t)), of_b = b.vector(t, 4 * size_of(t));
    return of_a < of_b ? of_a : of_b;
  }

  constexpr AnyPixels(Op op, Problem const& p) {
    int64_t const HW = p.H * p.W, pixels = p.N * HW;
    auto flat = [&](Strides const& s, int64_t channels, int64_t& step) {
      step = p.W > 1 ? s.w : p.H > 1 ? s.h : s.n;
      return (channels == 1 || s.c == 1) && (pixels == 1 || step > 0) && (p.W == 1 || s.w == step) &&
             (p.H == 1 || s.h == p.W * step) && (p.N == 1 || s.n == HW * step);
    };
    auto planes = [&](Strides const& s, int64_t channels) {
      return (p.W == 1 || s.w == 1) && (p.H == 1 || s.h == p.W) && (channels == 1 || s.c > 0) && (p.N == 1 || s.n > 0);
    };
    int64_t x_step = 0, y_step = 0;
    lines = flat(p.x, p.C, x_step) && flat(p.y, p.K, y_step);
    if (!lines && !(planes(p.x, p.C) && planes(p.y, p.K))) return;
    if ((p.C > 1 && p.w.c != 1) || (p.K > 1 && p.w.n <= 0)) return;
    Matrix const x =
        lines ? Matrix{pixels, p.C, x_step, 0, 0, p.x_align} : Matrix{p.C, pixels, p.x.c, HW, p.x.n, p.x_align};
    Matrix const y =
        lines ? Matrix{pixels, p.K, y_step, 0, 0, p.y_align} : Matrix{p.K, pixels, p.y.c, HW, p.y.n, p.y_align};
    Matrix const w{p.K, p.C, p.w.n, 0, 0, p.w_align};
    fits = true;
    switch (op) {
      case Op::fprop:
        a = lines ? x : w, b = lines ? w : x, out = y, a_along = true, b_along = lines;
        M = lines ? pixels : p.K, N = lines ? p.K : pixels, depth = p.C;
        return;
      case Op::dgrad:
        a = lines ? y : w, b = lines ? w : y, out = x, a_along = lines, b_along = false;
        M = lines ? pixels : p.C, N = lines ? p.C : pixels, depth = p.K;
        return;
      case Op::wgrad:
        a = y, b = x, out = w, a_along = b_along = !lines;
        M = p.K, N = p.C, depth = pixels;
        return;
    }
  }
};

constexpr int64_t any_pixels_steps(Problem const& p, AnyPixels const& s) {
  return ceil_div(s.depth, 128 / size_of(p.dtype));
}

// 1x1 filters without padding: a product of matrices; not of strict float32.
constexpr bool is_product(Problem const& p) {
  return (p.dtype != DType::f32 || p.allow_tf32) && p.R == 1 && p.S == 1 && p.groups == 1 && p.P() == p.H &&
         p.Q() == p.W && p.pad_top == 0 && p.pad_bottom == 0 && p.pad_left == 0 && p.pad_right == 0 && p.N > 0 &&
         p.C > 0 && p.K > 0 && p.H > 0 && p.W > 0;
}

constexpr bool any_pixels_supports(Row const& row, Op op, Problem const& p) {
  if (!is_product(p)) return false;
  // Small ones: what 32 bits count, and sums that are not cut off often.
  if (double(p.N) * double(p.H) * double(p.W) > 1e6 || p.C > 65536 || p.K > 65536) return false;
  if (op == Op::wgrad && double(p.N) * double(p.H) * double(p.W) > 6144) return false;
  AnyPixels const s(op, p);
  if (!s.fits) return false;
  return ceil_div(s.M, row.tile_m) < 65536;
}

// Do the blocks of a launch have an SM each, and clusters fit at a time?
constexpr bool any_pixels_alone(int64_t tiles, int split) { return tiles <= (split == 1 ? 132 : lean_clusters(split)); }

// A step takes what a block waits for and, of operands that are not copied 16 bytes at a time, more; two blocks share
// an SM. Fitted to the times of 4,900 choices of split, and lowered by what the other rows' estimates leave out of such
// layers (docs/tuning.md).
constexpr Estimate any_pixels_estimate(Row const& row, Op op, Problem const& p) {
  AnyPixels const s(op, p);
  bool const tf32 = p.dtype == DType::f32;
  auto slow = [&](Matrix const& m) {
    int const bytes = m.vector(p.dtype, 16) * size_of(p.dtype);
    return bytes == 16 ? 0 : bytes == 8 && !tf32 ? 1 : bytes >= 4 ? 2 : 6;
  };
  double const singly = slow(s.a) + slow(s.b), element = size_of(p.dtype);
  int64_t const tiles = ceil_div(s.M, row.tile_m) * ceil_div(s.N, row.tile_n), steps = any_pixels_steps(p, s);
  double const out = double(s.M) * double(s.N) * element;
  double const bytes = out + (double(s.M) + double(s.N)) * double(s.depth) * element;
  double const before = s.lines ? (tf32 ? (op == Op::fprop   ? 5400
                                           : op == Op::dgrad ? 6400
                                                             : 4900)
                                        : (op == Op::fprop   ? 7450
                                           : op == Op::dgrad ? 7700
                                                             : 7800))
                                : (tf32 ? (op == Op::fprop   ? 6400
                                           : op == Op::dgrad ? 5900
                                                             : 5400)
                                        : (op == Op::wgrad ? 8000 : 7500));
  bool const slow_sums = tf32 && op == Op::wgrad && s.lines && singly > 0;
  Estimate best;
  for (int split : {1, 2, 4, 8}) {
    if (split > 1 && steps < 2 * split) continue;
    int64_t const blocks = tiles * split, rounds = ceil_div(blocks, 264);
    double const share = double(ceil_div(steps, split));
    double const step_ns = any_pixels_alone(tiles, split) ? (tf32 ? 474 : 347) : double(rounds) * (tf32 ? 522 : 479);
    double ns = before +
                share * (step_ns + singly * (slow_sums ? 45
                                             : tf32    ? 30
                                                       : 102)) +
                double(rounds - 1) * (tf32 ? 971 : 2521) + double(tiles * steps) * (tf32 ? 0.33 : 0.52) +
                double(blocks) * (tf32 ? 12.9 : 6.7) + bytes * 3e-5;
    if (slow_sums) ns += 1200;
    if (s.out.vector(p.dtype, 8) * size_of(p.dtype) < 8) ns += out * (tf32 ? 0.0013 : 0.0006);
    if (tf32 && op == Op::wgrad && !s.lines && s.depth > 1000) ns *= 1.4;  // as measured (32x672x7x7 to 192 22.5 us)
    if (best.ns == 0 || ns < best.ns) best = {ns, split};
  }
  return best;
}

// pixels_direct.cuh: the smallest of them, by tiles of 32 x 32, of whose sums a warp takes every eighth run of 16.
constexpr bool is_direct_pixels(Row const& row) { return is_any_pixels(row) && row.tile_m == 32; }

// What the rows that take such layers otherwise need beside their estimates: of whole vectors of channels, or of
// others.
constexpr double direct_pixels_others(Op op, Problem const& p, bool lines, int64_t blocks) {
  bool const tf32 = p.dtype == DType::f32, few = blocks <= 132;
  auto by_op = [&](double fprop, double dgrad, double wgrad) {
    return op == Op::fprop ? fprop : op == Op::dgrad ? dgrad : wgrad;
  };
  bool const whole = p.C * size_of(p.dtype) % 16 == 0 && p.K * size_of(p.dtype) % 16 == 0;
  if (!lines) return tf32 ? (few ? 1.25 : 1) : by_op(1, 1, whole ? 0.92 : 1.04);
  if (whole) return tf32 ? by_op(1.5, few ? 1.9 : 1.1, 1.45) : by_op(1.3, 1.2, 1.34);
  return tf32 ? by_op(1.2, 1.1, 1.35) : 1;
}

// A warp waits for its first loads at once and then for each run; 264 blocks are under way at a time. Fitted to 488
// times of 208 problems.
constexpr Estimate direct_pixels_estimate(Row const& row, Op op, Problem const& p) {
  AnyPixels const s(op, p);
  bool const tf32 = p.dtype == DType::f32, singly = !tf32 && s.vector(p.dtype) == 1;
  int64_t const tiles = ceil_div(s.M, row.tile_m) * ceil_div(s.N, row.tile_n), runs = ceil_div(s.depth, 16);
  // wgrad's runs in TF32, as measured: 8x512x14x14 to 128 15.7 us, 64x174x7x7 to 1044, of pairs, 46.6.
  bool const sums = tf32 && op == Op::wgrad;
  double const pieces = sums && s.vector(p.dtype) < 4 ? 1.35 : 1;
  double const run = (sums     ? 1600
                      : tf32   ? 801
                      : singly ? 1350
                               : 710) *
                     pieces,
               first = (tf32     ? 631
                        : singly ? 1365
                                 : 357) *
                       pieces;
  double const at_once = tf32 || singly ? 2 : 4;  // runs
  double const begin = 6000 - (!tf32 || !s.lines || op == Op::fprop ? 0 : sums ? 1300 : 700);
  Estimate best;
  for (int split : {1, 2, 4, 8}) {
    if (split > 1 && runs < 8 * split) continue;
    int64_t const blocks = tiles * split;
    double const rounds = double(ceil_div(blocks, 264)), share = double(ceil_div(ceil_div(runs, split), 8));
    double const crowd = blocks <= 132 ? 1 : blocks >= 264 ? 1.5 : 1 + 0.5 * double(blocks - 132) / 132;
    double const later = share > at_once ? share - at_once : 0;
    double const others = direct_pixels_others(op, p, s.lines, blocks);
    double const launch = begin + (split > 1 ? 596 : 0) + (s.lines ? 0 : 262) + (rounds - 1) * 387 +
                          (singly ? 12.4 : 7.4) * double(blocks);
    double const work = rounds * crowd * (later * run + (share - later) * first);
    double const ns = launch / others + work / (sums ? 1 : others);
    if (best.ns == 0 || ns < best.ns) best = {ns, split};
  }
  return best;
}

// pixels_flow.cuh: few channels, many pixels, in channels_last.
constexpr bool is_pixel_flow(Row const& row) { return row.family == Family::pixels && row.variant == Variant::lean; }

// Steps of 64 bytes of a pixel, as many as a kernel is compiled for; 0 if there are more.
constexpr int pixel_flow_steps(DType t, AnyPixels const& s) {
  for (int steps : {1, 2, 3, 4, 6, 8})
    if (s.depth * size_of(t) <= steps * 64) return steps;
  return 0;
}

// Bytes that a thread takes at a time of pixels, results and filters: 16, 4 or 2.
constexpr int pixel_flow_piece(DType t, AnyPixels const& s) {
  int least = 16;
  for (Matrix const& m : {s.a, s.b, s.out})
    if (int const bytes = m.vector(t, 16) * size_of(t); bytes < least) least = bytes;
  return least == 8 ? 4 : least;
}

// What blocks compute of the results, and how their shared memory is shared out, if it can be. element: bytes.
struct PixelFlow {
  int64_t parts = 1, columns = 0;  // of the results; columns of one
  int64_t filter_bytes = 0;        // filters, and what is added to their sums
  int warps = 0, tiles = 1, held = 1, stages = 0, outs = 0, bytes = 0;
  double ns = 0;
  constexpr PixelFlow(AnyPixels const& s, int element, int steps, int64_t most_parts) {
    int64_t const step = 64 / element;
    columns = ceil_div(ceil_div(s.N, step), most_parts) * step, parts = ceil_div(s.N, columns);
    filter_bytes = columns * (64 * (steps | 1) + 4);
    int64_t const tile = 16 * s.depth * element, out = parts > 1 ? 0 : 16 * s.N * element,
                  most = 220 * 1024 - filter_bytes;
    while (tiles < 4 && tiles * tile < 1024 && s.M > 132 * 16 * 16 * 2 * tiles) tiles *= 2;
    while (held < tiles && held * out < 1024) held *= 2;
    for (int w : {16, 12, 8, 4})
      for (int o : {2, 1})
        for (int n : {4, 3, 2})
          if (warps == 0 && w * (n * tiles * tile + o * held * out) <= most) warps = w, outs = o, stages = n;
    if (parts > 1) outs = 0;
    bytes = int(filter_bytes + warps * (stages * tiles * tile + outs * held * out));
  }
};

// In ns: a launch; a byte that is read, and written; a warp's tile and each of its products; what is shorter of memory
// and products; a byte of filters, of dgrad's so many times; a byte of pixels that another part reads again. Fitted to
// 289 times (within 5 and 8 %).
struct PixelFlowTimes {
  double launch, read, written, tile, product, rest, filters, turned, again;
};
inline constexpr PixelFlowTimes kPixelFlowTimes16 = {6200, 2.26e-4, 2.02e-4, 228, 41.2, 1.34, 0.043, 1.82, 0.83e-4},
                                kPixelFlowTimes32 = {6080, 2.41e-4, 1.74e-4, 573, 99.3, 0.71, 0.034, 1.78, 0.46e-4};

// Pieces take longer, by most as results of parts, which go to memory from registers.
struct PixelFlowPieces {
  double memory, products, filters, stored;
};
// two: a warp has two tiles at a time, whose results leave at once. few: of up to 96 channels and filters, as in 4,331
// times.
constexpr PixelFlowPieces pixel_flow_pieces(int element, int piece, bool two, bool few) {
  if (piece == 16) return two ? PixelFlowPieces{0.9, element == 2 ? 0.9 : 0.7, 1, 0} : PixelFlowPieces{1, 1, 1, 0};
  if (element == 4) {
    double const times = two ? 0.9 : few ? 1.1 : 1.35;
    return {times, times, 1, 9e-4};
  }
  if (piece == 4) return {two ? 0.8 : few ? 1.1 : 1.2, two ? 1.2 : few ? 1.4 : 1.5, 1.4, 6e-4};
  return {two ? 0.75 : few ? 1.1 : 1.3, two ? 1.9 : few ? 2.1 : 3, 3, 33e-4};
}

// warps == 0: there is none.
constexpr PixelFlow pixel_flow_shape(Op op, DType type, AnyPixels const& s) {
  int const element = size_of(type), steps = pixel_flow_steps(type, s), piece = pixel_flow_piece(type, s);
  PixelFlowTimes const& t = element == 2 ? kPixelFlowTimes16 : kPixelFlowTimes32;
  double const turned = op == Op::dgrad && piece == 16 ? t.turned : 1;
  double const read = double(s.M) * double(s.depth) * element, written = double(s.M) * double(s.N) * element;
  PixelFlow best(s, element, steps, 1);
  for (int64_t const parts : {1, 2, 4, 8}) {
    PixelFlow shape(s, element, steps, parts);
    if (shape.warps == 0) continue;
    bool const two = steps == 1 && shape.held > 1 && shape.parts == 1, few = s.depth <= 96 && s.N <= 96;
    PixelFlowPieces const pieces = pixel_flow_pieces(element, piece, two, few);
    double const memory = (read * t.read + written * t.written) * pieces.memory;
    double const tiles = double(ceil_div(ceil_div(s.M, 16), 132 / shape.parts * shape.warps));
    double const products = double(shape.columns / (64 / element) * steps) * (element == 2 ? 1 : 0.5);
    double const chain = tiles * (t.tile + t.product * products) * pieces.products;
    double const stored = shape.parts > 1 ? written * pieces.stored : 0;
    shape.ns = t.launch + (memory > chain ? memory + t.rest * chain : chain + t.rest * memory) +
               double(shape.filter_bytes) * t.filters * pieces.filters * turned +
               read * double(shape.parts - 1) * t.again + stored;
    if (best.ns == 0 || shape.ns < best.ns) best = shape;
  }
  return best;
}

constexpr bool pixel_flow_supports(Row const& row, Op op, Problem const& p) {
  if (!is_product(p) || op == Op::wgrad) return false;
  AnyPixels const s(op, p);
  if (!s.fits || !s.lines || s.M > int64_t(1) << 30 || s.N > 2048) return false;
  if (s.a.align % 16 != 0 || s.out.align % 16 != 0) return false;
  if (s.a.rows > 1 && (s.a.step != s.depth || s.out.step != s.N)) return false;  // rows follow each other
  return pixel_flow_steps(p.dtype, s) > 0 && pixel_flow_shape(op, p.dtype, s).warps > 0;
}

// Less what the rows that it stands beside leave out of such layers.
constexpr Estimate pixel_flow_estimate(Op op, Problem const& p) {
  AnyPixels const s(op, p);
  bool const whole = pixel_flow_piece(p.dtype, s) == 16, tf32 = p.dtype == DType::f32;
  // As measured: up to four floats a pixel read (1x256x50x84 to 3 D 10.7 us, estimated at 8.5, `stem_lean` 7.5).
  double const few = tf32 && !whole && s.depth <= 4 ? 2000 : 0;
  return {pixel_flow_shape(op, p.dtype, s).ns + few - (whole ? (tf32 ? 3250 : 800) : tf32 ? 800 : 0), 1};
}

}  // namespace conv2d_ext
