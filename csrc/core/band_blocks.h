// fprop and dgrad of band.cuh, as measured: what its blocks take one after the other. Apart from what kernels include,
// so that a new constant compiles none.
#pragma once

#include "band.h"

namespace conv2d_ext {

// Products of a warp, and loads of inputs for them, of one image: as the kernel leaves out what lies beside it, in the
// mean of a row's tiles.
struct BandWork {
  double products = 0, loads = 0;
};
constexpr BandWork band_work(BandTile const& t, int64_t R, int depth, int width) {
  int const taps = (t.pairs + 1) / 2, blocks = depth == 1 && width == 1 ? t.pairs / 2 : width + taps - 1;
  int64_t const tiles = min64(t.tiles_w, 16);
  BandWork w;
  for (int64_t i = 0; i < tiles * 2 * t.passes; ++i) {
    int const tile = int(i / (2 * t.passes)), odd = int(i % 2), pass = int(i / 2 % t.passes);
    int const from =
        t.origin_w - t.pad_w - t.skew + tile * 16 * width + 8 * (odd - t.shift[odd] + pass * kBandPassPairs);
    int const first = from + 15 >= 0 ? 0 : -from / 16, last = t.in_W > from ? (t.in_W - from + 15) / 16 : 0;
    for (int b = first; b < last && b < blocks; ++b) {
      w.loads += double(R + depth - 1);
      for (int nb = 0; nb < width; ++nb)
        if (b - nb >= 0 && b - nb < taps) w.products += double(R * depth) * (2 * (b - nb) + 1 < t.pairs ? 1 : 0.5);
    }
  }
  w.products /= double(2 * tiles), w.loads /= double(2 * tiles);
  return w;
}

// A problem's blocks and their copies.
struct BandBlocks {
  BandTile tile;
  int threads = 0, images = 0;  // of a warp
  int64_t rounds = 1, blocks = 0, held = 1;
  double waves = 0, of_sm = 0;
  double places = 0, planes = 0;  // of a thread: places of a plane, planes that it has them of
  double filters = 0, clear = 0;  // loads and stores of a thread, four and one at a time
};
constexpr BandBlocks band_blocks(Row const& row, Op op, Problem const& problem, bool staged, int64_t width,
                                 Device const& d) {
  bool const nhwc = is_nhwc(row.variant), backward = op == Op::dgrad;
  int const depth = row.tile_m / 16;
  BandBlocks b;
  BandTile const t = b.tile = band_tile(op, spread(problem), depth, row.tile_n / 16, nhwc);
  b.images = band_images(depth), b.threads = 64 * t.channels * (t.images / b.images);
  int64_t const threads = b.threads, units = ceil_div(problem.N, t.images);
  b.rounds = band_rounds(t, problem.N, depth);
  b.blocks = t.tiles_h * t.tiles_w * t.channel_units * ceil_div(units, b.rounds);
  int64_t const registers = !nhwc && depth == 1 ? 80 : 128;
  b.held = max64(1, min64(228 * 1024 / (t.shared_bytes + 1024), 65536 / (registers * threads)));
  b.waves = double(ceil_div(b.blocks, d.sm_count * b.held)), b.of_sm = double(ceil_div(b.blocks, d.sm_count));
  int64_t const in_H = backward ? spread_extent(problem.P(), problem.stride_h) : problem.H,
                in_W = backward ? spread_extent(problem.Q(), problem.stride_w) : problem.W;
  int64_t const copies = ceil_div(min64(8 * t.units, in_W), width) * min64(int64_t(t.rows) * depth, in_H);
  int64_t const part = copies >= threads ? threads : ceil_div(copies, 32) * 32;
  b.places = double(ceil_div(copies, part));
  b.planes = double(min64(t.images, problem.N)) / double(threads / part);
  b.filters = double(ceil_div(t.channels * problem.R * problem.S, threads * 4));
  b.clear = double(ceil_div(t.shared_bytes / 16, threads)) +
            (staged ? double(b.rounds - 1) * double(ceil_div(t.channels * t.images * t.plane_bytes / 16, threads)) : 0);
  return b;
}
constexpr double rounded_up(double x) {
  double const whole = double(int64_t(x));
  return whole < x ? whole + 1 : whole;
}

// channels_last: ns of loads that a thread waits for (four single elements, or two pixels' channels), products, stores
// of two pixels' channels, or of single elements, and what else a round of images takes. Where channels are no multiple
// of 8, neighbouring blocks' sectors are moved several times. Fitted to 844 times.
constexpr Estimate band_lines_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  int const depth = row.tile_m / 16;
  bool const backward = op == Op::dgrad, strided = p.stride_h > 1 || p.stride_w > 1, eight = p.C % 8 == 0;
  bool const singly = !eight || (strided && backward);
  BandBlocks const b = band_blocks(row, op, p, true, singly ? 1 : 2, d);
  BandTile const& t = b.tile;
  // dgrad passes over rows that a stride leaves out.
  double const met = strided && backward && p.stride_h > 1 ? 0.1 + 1.0 / double(p.stride_h) : 1;
  double const loads =
      singly ? b.places * met * t.channels * rounded_up(b.planes / 4) : b.places * rounded_up(b.planes / 2);
  double const area = 256.0 * depth * depth;  // of a tile
  double const exist = double(t.out_H) * t.out_W / (double(t.tiles_h * t.tiles_w) * area) * double(p.N) /
                       double(ceil_div(p.N, t.images) * t.images);
  double const stores =
      double(ceil_div(t.images * int64_t(area) / 2, b.threads)) * exist * (strided && !backward ? 0.5 : 1);
  double const product = depth == 1 ? 42 : 22.5, round = depth == 1 ? 1790 : depth == 2 ? 3150 : 4890;
  double const each = loads * 265 + b.images * band_work(t, spread(p).R, depth, depth).products * product +
                      stores * (eight ? 536 : 3740) + round;
  double const bytes = 2 * double(p.N) * double(p.C) * (double(p.H) * double(p.W) + double(p.P()) * double(p.Q()));
  double const sectors = eight ? 0 : 0.0022 * (p.C < 200 ? double(p.C) / 200 : 1);
  return {5000 + b.waves * (b.filters * 1300 + double(b.rounds) * each) + b.of_sm * (b.threads / 32) * b.clear * 5 +
              bytes * (0.00064 + sectors),
          1};
}

// NCHW, ns. Of a block: its filters. Of each round of images: loads of single elements (four of a thread), products and
// loads of a warp, stores of a thread, and the rest; of an SM, outputs that a stride leaves out. Fitted to 4,222 times.
constexpr Estimate band_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  if (is_nhwc(row.variant)) return band_lines_estimate(row, op, p, d);
  struct Rates {
    double product, load, store, round;
  };
  constexpr Rates rates[] = {{30.4, 0, 439, 1640}, {21.4, 0, 104, 1590}, {12.5, 41, 69.7, 2590}};  // 1, 2 and 4
  bool const backward = op == Op::dgrad, strided = p.stride_h > 1 || p.stride_w > 1, some = strided && !backward;
  int const depth = row.tile_m / 16;
  Rates const& e = rates[depth == 4 ? 2 : depth - 1];
  Strides const &in = backward ? p.y : p.x, &out = backward ? p.x : p.y;
  auto pairs = [&](Strides const& s) { return s.n % 2 == 0 && s.c % 2 == 0 && s.h % 2 == 0; };
  bool const singly = (strided && backward) || !pairs(in);

  // Outputs go by way of the planes, an element a thread, but where a warp stores them in pairs of columns, or (16
  // rows) as they are.
  BandTile const shape = band_tile(op, spread(p), depth, row.tile_n / 16, false);
  bool const vectors = pairs(out) && shape.origin_w % 2 == 0 && shape.out_W % 2 == 0;
  bool const staged = depth > 1 && (some || !vectors);
  BandBlocks const b = band_blocks(row, op, p, staged, singly ? 1 : 2, d);
  BandTile const& t = b.tile;
  double const elements = singly ? b.places * t.channels * rounded_up(b.planes / 4) : 0;
  double const each = staged ? double(ceil_div(t.channels * t.images * int64_t(256) * depth * depth, b.threads))
                             : 2.0 * b.images * depth * depth;
  double const left_out = some ? each : 0, stores = (staged ? each : 0) + left_out;
  BandWork const work = band_work(t, spread(p).R, depth, depth);
  double const round =
      elements * 259 + b.images * (work.products * e.product + work.loads * e.load) + stores * e.store + e.round;
  double const bytes = 2 * double(p.N) * double(p.C) * (double(p.H) * double(p.W) + double(p.P()) * double(p.Q()));
  return {5830 + b.waves * (b.filters * 1160 + double(b.rounds) * round) +
              b.of_sm * (b.threads / 32) * double(b.rounds) * left_out * 3.29 + bytes * 0.000861,
          1};
}

}  // namespace conv2d_ext
