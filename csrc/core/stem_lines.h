// The tiles of cuda/stem_lines.cuh for a problem: shared by the planner and the launcher.
#pragma once

#include "row.h"

namespace conv2d_ext {

inline constexpr int kStemThreads = 256;

constexpr bool is_stem_lines(Row const& row) { return row.family == Family::stem && row.variant == Variant::lines; }

constexpr int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// One axis: output at * stride - pad + tap is met by input `at`. Inputs first to last end the sums of `stride` outputs
// each, for which those before, `warm` of them, are needed too; some may lie outside of the tensor.
struct StemLinesAxis {
  int64_t in, out, taps, stride, pad;
  int64_t first, last, warm;
  constexpr int64_t count() const { return last - first + 1; }
};
constexpr StemLinesAxis stem_lines_axis(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t pad) {
  return {in, out, taps, stride, pad, floor_div(pad, stride), floor_div(out - 1 + pad, stride), (taps - 1) / stride};
}
constexpr StemLinesAxis stem_lines_axis_h(Op op, Problem const& p) {
  return op == Op::dgrad ? stem_lines_axis(p.P(), p.H, p.R, p.stride_h, p.pad_top)
                         : stem_lines_axis(p.H, p.P(), p.R, 1, p.R - 1 - p.pad_top);
}
constexpr StemLinesAxis stem_lines_axis_w(Op op, Problem const& p) {
  return op == Op::dgrad ? stem_lines_axis(p.Q(), p.W, p.S, p.stride_w, p.pad_left)
                         : stem_lines_axis(p.W, p.Q(), p.S, 1, p.S - 1 - p.pad_left);
}

// A block walks down rows of inputs: of `rows` of them at a time it multiplies a segment's pixels by all taps of its
// channels' filters, and adds up the products of neighbours, line by line.
struct StemLines {
  bool used = false;
  int64_t depth = 0;                // channels of the inputs
  int64_t channels = 0, slabs = 0;  // of the results, of a block
  int64_t m_tiles = 0, steps = 0;   // of 16 taps; of 16 of the depth, in TF32 of 8
  bool wide = false;                // a warp has four blocks of 8 pixels at a time, else two
  int64_t segments = 0, ends_w = 0, in_columns = 0;
  int64_t ranges = 0, ends_h = 0, rows = 0, pixels = 0;  // pixels: of a step, in blocks of 8
  int64_t vector = 0;                                    // bytes of a copy; 0: single elements
  bool nhwc = false;            // pixels lie in shared memory line by line of their channels, else channels of pixels
  int64_t line = 0, pitch = 0;  // bytes of such a line; products of a tap
  int64_t ring_rows = 0, items = 0;
  int64_t weight_bytes = 0, stage_bytes = 0, sum_bytes = 0, ring_bytes = 0, stages = 0, shared_bytes = 0;
  int64_t blocks_of_sm = 0, strips = 0;
  double ns = 0;
};

constexpr int64_t stem_lines_shared(int64_t blocks) {
  return (228 / blocks - 1) * 1024;
}  // bytes of each of so many an SM

// The widest copies of rows (of channels' vectors in channels_last) that the inputs allow.
constexpr int64_t stem_lines_vector(Strides const& s, int align, bool nhwc, int64_t depth, int64_t width,
                                    int64_t size) {
  for (int64_t bytes = 16; bytes >= 4; bytes /= 2) {
    auto whole = [&](int64_t extent, int64_t stride) { return extent == 1 || stride * size % bytes == 0; };
    if (align % bytes != 0 || !whole(2, s.n) || !whole(2, s.h)) continue;
    if (nhwc ? depth * size % bytes == 0 && whole(2, s.w)
             : (s.w == 1 || width == 1) && width * size % bytes == 0 && whole(depth, s.c))
      return bytes;
  }
  return 0;
}

constexpr StemLines stem_lines(Op op, Problem const& p, Device const& d) {
  StemLines best, t;
  StemLinesAxis const h = stem_lines_axis_h(op, p), w = stem_lines_axis_w(op, p);
  Strides const& in = op == Op::dgrad ? p.y : p.x;
  int64_t const size = size_of(p.dtype), all = op == Op::dgrad ? p.C : p.K;
  bool const strict = p.dtype == DType::f32 && !p.allow_tf32;
  t.depth = op == Op::dgrad ? p.K : p.C;
  t.nhwc = in.c == 1 && t.depth > 1 && (in.w != 1 || w.in == 1);
  t.vector = stem_lines_vector(in, op == Op::dgrad ? p.y_align : p.x_align, t.nhwc, t.depth, w.in, size);
  t.steps = strict ? ceil_div(t.depth, 16) : ceil_div(t.depth * size, 32);
  int64_t const depth_step = p.dtype == DType::f32 && !strict ? 8 : 16;
  t.ring_rows = max64(h.taps, h.stride);
  int64_t const elements = t.vector > 0 && !t.nhwc ? t.vector / size : 1;
  for (int64_t slabs = 1; slabs <= all; slabs = slabs == 1 && all > 1 ? all : all + 1) {
    t.channels = ceil_div(all, slabs), t.slabs = slabs;
    t.m_tiles = ceil_div(t.channels * p.R * p.S, 16);
    t.weight_bytes = t.m_tiles * t.steps * 512 * (strict ? 3 : 1);
    if (t.weight_bytes > stem_lines_shared(1)) continue;
    for (int64_t segments = 1; segments <= w.count(); segments *= 2) {
      t.ends_w = ceil_div(w.count(), segments), t.segments = ceil_div(w.count(), t.ends_w);
      int64_t const columns = t.ends_w + w.warm + elements - 1;
      t.in_columns = ceil_div(min64(columns, w.in), elements) * elements;
      t.items = t.channels * t.ends_w * w.stride;
      t.ring_bytes = t.ring_rows * ceil_div(t.items, 4) * 16;
      for (int64_t rows = 1; rows <= 16; rows *= 2) {
        if (rows > 1 && (rows / 2 >= h.count() || rows * t.in_columns > 256)) break;
        t.rows = rows, t.pixels = ceil_div(rows * t.in_columns, 8) * 8;
        t.pitch = t.pixels / 8 % 2 != 0 ? t.pixels : t.pixels + 8;
        t.line = t.nhwc ? t.steps * depth_step * size + 16 : size == 4 ? t.pitch * 4 : t.pitch * 2;
        t.stage_bytes = t.nhwc ? t.pixels * t.line : t.steps * depth_step * t.line;
        t.sum_bytes = t.m_tiles * 16 * t.pitch * 4;
        int64_t const fixed = t.weight_bytes + t.sum_bytes + t.ring_bytes + t.items * 16;
        if (fixed + t.stage_bytes > stem_lines_shared(1)) break;
        for (int wide = 0; wide < (strict ? 1 : 2); ++wide) {
          t.wide = wide != 0;
          t.blocks_of_sm = 1;
          while (t.blocks_of_sm < (strict || t.wide ? 2 : 3) &&
                 fixed + t.stage_bytes <= stem_lines_shared(t.blocks_of_sm + 1))
            ++t.blocks_of_sm;
          t.stages = fixed + 2 * t.stage_bytes <= stem_lines_shared(t.blocks_of_sm) ? 2 : 1;
          t.shared_bytes = fixed + t.stages * t.stage_bytes;
          // Cycles of an SM for a step of a block; of a block that is alone, what its warps wait for.
          int64_t const blocks8 = t.pixels / 8, across = t.wide ? 4 : 2, terms = ceil_div(p.S, w.stride);
          int64_t const turns = ceil_div(ceil_div(t.m_tiles, 2) * ceil_div(blocks8, across), 8);
          // As fitted to times of 156 tiles of 16 problems (docs/tuning.md).
          double const multiply = double(turns * across * t.steps) * (strict ? 216 : 48);
          double const traffic = double(t.pixels * t.depth * size) / 17.6;
          double const rounds_of_items = double(ceil_div(t.items, kStemThreads) * t.rows);
          double const gather = rounds_of_items * 2 * double(h.stride) * 109;
          double const wait_multiply = double(turns * t.steps) * 171,
                       wait_gather =
                           rounds_of_items * double(p.R) * (terms > 4 ? 125.0 * double(ceil_div(terms, 4)) : 125);
          double const alone = (multiply > wait_multiply ? multiply : wait_multiply) +
                               (gather > wait_gather ? gather : wait_gather) +
                               (t.stages == 1 ? 1210 + 0.7 * traffic : 2430);
          for (int64_t ranges = 1; ranges <= h.count(); ranges = ranges < 8 ? ranges + 1 : ranges * 5 / 4) {
            t.ends_h = ceil_div(h.count(), ranges), t.ranges = ceil_div(h.count(), t.ends_h);
            t.strips = p.N * t.segments * t.ranges;
            int64_t const slots = max64(1, d.sm_count * t.blocks_of_sm / t.slabs) * t.slabs;
            int64_t const rounds = ceil_div(t.strips * t.slabs, slots);
            double const of_sm = double(min64(t.blocks_of_sm, ceil_div(t.strips * t.slabs, d.sm_count)));
            double const busy = multiply + gather, most = of_sm * (busy > traffic ? busy : traffic) * 1.18;
            double const step = most > alone ? most + 0.52 * alone : alone + 0.52 * most;
            double const cycles = double(rounds) * (double(ceil_div(t.ends_h + h.warm, t.rows)) * step);
            t.ns = cycles / 1.7 + 11300;
            if (!best.used || t.ns < best.ns) best = t, best.used = true;
          }
        }
      }
    }
  }
  return best;
}

constexpr bool stem_lines_supports(Op op, Problem const& p, Device const& d) {
  if (p.dtype != DType::f32 || op == Op::wgrad || p.dilation_h != 1 || p.dilation_w != 1 || p.R * p.S == 1)
    return false;
  if (op == Op::fprop && (p.stride_h != 1 || p.stride_w != 1 || p.pad_top >= p.R || p.pad_left >= p.S)) return false;
  int64_t const few = op == Op::dgrad ? p.C : p.K;
  Strides const& out = op == Op::dgrad ? p.x : p.y;
  double const reach = double(few) * double(max64(out.c, 0)) + double(op == Op::dgrad ? p.W : p.Q()) * double(out.w);
  return reach < double(int64_t(1) << 31) && p.R < 64 && stem_lines(op, p, d).used;
}

}  // namespace conv2d_ext
