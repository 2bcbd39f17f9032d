// grouped_images.cuh: fprop and dgrad of groups over small images, whole images in shared memory, in either layout.
#pragma once

#include <cstdint>

#include "grouped.h"

namespace conv2d_ext {

constexpr int kImageTeams = 4;  // warpgroups of a block at most, each with images of its own
constexpr int kImageTile = 64;  // lines of an instruction
constexpr int kImageTaps = 54;  // of a filter, in nines

constexpr bool is_images(Row const& row) { return row.family == Family::grouped && row.tile_m == 256; }

// What a block holds: the filters of a group, and a ring of images for each warpgroup.
struct ImageTile {
  int64_t teams = 0, slots = 0;  // warpgroups; images of a ring; 0: there is none
  int64_t pitch = 0, plane = 0,
          lines = 0;  // lines of a row, of pixels of the same remainder by the stride, of an image
  int64_t tiles = 0;  // of an image, 64 lines each
  int64_t filter_bytes = 0, line_bytes = 0, raw_bytes = 0, shared = 0;
  int64_t parts = 1;  // blocks of a group
  double cycles = 0;
};

// Zeros above, below (or left, right) of the images that are read.
struct ImageZeros {
  int64_t low, high;
};
constexpr ImageZeros image_zeros(Op op, int64_t low, int64_t high, int64_t taps, int64_t dilation) {
  int64_t const span = (taps - 1) * dilation;
  return op == Op::dgrad ? ImageZeros{span - low, span - high} : ImageZeros{low, high};
}

// A tensor whose channels lie side by side, or whose planes do.
constexpr bool image_lines(Strides const& s, int align, int64_t channels, DType t) {
  return channel_vectors(s, align, channels, 16 / size_of(t), t);
}
constexpr bool image_planes(Strides const& s, int align, int64_t channels, int64_t N, int64_t H, int64_t W, DType t) {
  int64_t const v = 16 / size_of(t);
  return align >= 16 && H * W > 1 && channels % v == 0 && (N == 1 || s.n % v == 0) && s.c == H * W &&
         (H == 1 || s.h == W) && (W == 1 || s.w == 1);
}

constexpr ImageTile image_tile(Op op, Problem const& p, Device const& d, int64_t channels) {
  ImageTile best, t;
  if (op == Op::wgrad || p.dtype == DType::f64 || (p.dtype == DType::f32 && !p.allow_tf32) || p.groups == 1)
    return best;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.P() == 0 || p.Q() == 0) return best;
  bool const backward = op == Op::dgrad;
  int64_t const step_h = p.stride_h, step_w = p.stride_w, most_step = backward ? 1 : 2;
  if (step_h > most_step || step_w > most_step) return best;
  int64_t const size = size_of(p.dtype), in = backward ? p.K_per_group() : p.C_per_group();
  int64_t const out = backward ? p.C_per_group() : p.K_per_group();
  if (in > channels || out > channels || in < 8 || out < 8) return best;
  constexpr int64_t most = int64_t(1) << 24;
  if (p.N >= most || p.groups >= most || p.H > 64 || p.W > 64 || p.R * p.S > 49) return best;
  if (p.R * p.w.h + p.S * p.w.w >= int64_t(1) << 31) return best;
  ImageZeros const h = image_zeros(op, p.pad_top, p.pad_bottom, p.R, p.dilation_h);
  ImageZeros const w = image_zeros(op, p.pad_left, p.pad_right, p.S, p.dilation_w);
  if (h.low < 0 || h.high < 0 || w.low < 0 || w.high < 0 || h.low + h.high + w.low + w.high > 64) return best;
  Strides const& x = backward ? p.y : p.x;
  Strides const& y = backward ? p.x : p.y;
  int const x_align = backward ? p.y_align : p.x_align, y_align = backward ? p.x_align : p.y_align;
  int64_t const in_h = backward ? p.P() : p.H, in_w = backward ? p.Q() : p.W;
  int64_t const out_h = backward ? p.H : p.P(), out_w = backward ? p.W : p.Q();
  bool const from_lines = image_lines(x, x_align, in, p.dtype), to_lines = image_lines(y, y_align, out, p.dtype);
  if (!from_lines && !image_planes(x, x_align, in, p.N, in_h, in_w, p.dtype)) return best;
  if (!to_lines && !image_planes(y, y_align, out, p.N, out_h, out_w, p.dtype)) return best;

  // Zeros behind a row are those before the next, but for strides. Padding beyond the filter's span gives more results
  // than there are pixels and zeros.
  int64_t const span_h = (p.R - 1) * p.dilation_h, span_w = (p.S - 1) * p.dilation_w;
  auto extent = [](int64_t pixels, ImageZeros const& z, int64_t step, int64_t results, int64_t span) {
    return step == 1 ? max64(pixels + max64(z.low, z.high), results)
                     : ceil_div(max64(pixels + z.low, (results - 1) * step + span + 1), step);
  };
  t.pitch = extent(in_w, w, step_w, out_w, span_w);
  t.plane = extent(in_h, h, step_h, out_h, span_h) * t.pitch, t.lines = step_h * step_w * t.plane;
  t.tiles = ceil_div((out_h - 1) * t.pitch + out_w, kImageTile);
  t.filter_bytes = p.R * p.S * channels * channels * size;
  int64_t const reach = span_h / step_h * t.pitch + span_w / step_w + t.tiles * kImageTile;
  t.raw_bytes = ceil_div(max64(from_lines ? 0 : in * in_h * in_w, to_lines ? 0 : out * out_h * out_w) * size, 16) * 16;
  // As measured (2026-11-28): cycles of an SM for an image. Rings of two wait for what they have asked for last.
  double const steps = double(t.tiles) * double(p.R * p.S) * double(channels * size / 32);
  double const busy = steps * (t.tiles > 1 ? 62 : 53) + 150;
  double const memory = double(in * in_h * in_w + out * out_h * out_w) * double(size) / 8.5;
  double const turned = from_lines && to_lines ? 0 : double(in * in_h * in_w * size) / 16 + 140;
  double const alone = steps * 67 + 500;
  for (t.teams = kImageTeams; t.teams >= 1; --t.teams) {
    for (t.slots = 4; t.slots >= 2; --t.slots) {
      t.line_bytes = ceil_div((t.teams * t.slots * t.lines + reach) * channels * size, 1024) * 1024;
      t.shared = 1024 + t.filter_bytes + t.line_bytes + t.teams * t.slots * t.raw_bytes;
      if (t.shared <= 231000) break;
    }
    if (t.slots < 2) continue;
    double image = busy > memory ? busy : memory;
    image = (image > alone / double(t.teams) ? image : alone / double(t.teams)) + turned;
    if (t.slots == 2 || (size == 4 && t.lines > t.plane)) image *= 1.3;
    if (t.tiles > 1 && !(from_lines && to_lines)) image *= 1.2;
    int64_t const most_parts = ceil_div(p.N, t.teams);
    for (int64_t turns = 1; turns <= 4; ++turns) {
      t.parts = min64(most_parts, max64(1, turns * d.sm_count / p.groups));
      double const of_team = double(ceil_div(p.N, t.parts * t.teams));
      double const rounds = double(ceil_div(p.groups * t.parts, d.sm_count));
      t.cycles = rounds * of_team * double(t.teams) * image;
      if (best.cycles == 0 || t.cycles < best.cycles) best = t;
    }
  }
  return best;
}

constexpr ImageTile image_tile(Row const& row, Op op, Problem const& p, Device const& d) {
  return image_tile(op, p, d, row.tile_n);
}

}  // namespace conv2d_ext
