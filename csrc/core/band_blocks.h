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

// ns. Of a block: its filters (four loads of a thread), and what it clears, 16 bytes a thread. Of each round of images:
// loads of single elements (four of a thread; far: where channels lie apart, of an SM), of two pixels' channels,
// products and loads of a warp, stores of a thread, and the rest. apart: of an SM, outputs that a stride leaves out.
struct BandRates {
  double before, filters, clear, element, far, pixels, apart, byte;
  struct Depth {
    double product, load, store, round;
  } of[3];  // 1, 2 and 4
};

constexpr Estimate band_estimate(Row const& row, Op op, Problem const& problem, Device const& d) {
  // Fitted to 4,222 times.
  constexpr BandRates planes{
      5830, 1160, 0, 259, 0, 0, 3.29, 0.000861, {{30.4, 0, 439, 1640}, {21.4, 0, 104, 1590}, {12.5, 41, 69.7, 2590}}};
  constexpr BandRates lines{6110, 1190,     19.7,
                            263,  65.7,     456,
                            0,    0.000554, {{0, 9.63, 806, 1330}, {17.3, 0, 424, 1830}, {17.7, 0, 1170, 2160}}};
  bool const nhwc = is_nhwc(row.variant), backward = op == Op::dgrad;
  int const depth = row.tile_m / 16, images = band_images(depth);
  Problem const p = spread(problem);
  BandTile const t = band_tile(op, p, depth, row.tile_n / 16, nhwc);
  BandRates const& e = nhwc ? lines : planes;
  BandRates::Depth const& of = e.of[depth == 4 ? 2 : depth - 1];
  int const threads = 64 * t.channels * (t.images / images), warps = threads / 32;
  int64_t const units = ceil_div(problem.N, t.images), rounds = band_rounds(t, problem.N, depth);
  int64_t const blocks = t.tiles_h * t.tiles_w * t.channel_units * ceil_div(units, rounds);
  int64_t const registers = !nhwc && depth == 1 ? 80 : 128;
  int64_t const held = max64(1, min64(228 * 1024 / (t.shared_bytes + 1024), 65536 / (registers * threads)));
  double const waves = double(ceil_div(blocks, d.sm_count * held)), of_sm = double(ceil_div(blocks, d.sm_count));
  bool const strided = problem.stride_h > 1 || problem.stride_w > 1, some = strided && !backward;

  // Copies: of a plane, and of a thread.
  Strides const &in = backward ? problem.y : problem.x, &out = backward ? problem.x : problem.y;
  bool const eight = t.channels == 8 && problem.C % 8 == 0;
  auto whole = [&](Strides const& s, int elements) {
    return s.n % elements == 0 && s.c % elements == 0 && s.h % elements == 0;
  };
  bool const singly = (strided && backward) || (nhwc ? !eight : !whole(in, 2));
  int64_t const in_H = backward ? spread_extent(problem.P(), problem.stride_h) : problem.H,
                in_W = backward ? spread_extent(problem.Q(), problem.stride_w) : problem.W;
  int64_t const copies = ceil_div(min64(8 * t.units, in_W), singly ? 1 : 2) * min64(int64_t(t.rows) * depth, in_H);
  int64_t const part = copies >= threads ? threads : ceil_div(copies, 32) * 32, parts = threads / part;
  int64_t const planes_of_round = min64(t.images, problem.N);
  double const places = double(ceil_div(copies, part)),
               elements = !singly ? 0 : places * t.channels * double(ceil_div(planes_of_round, parts * 4)),
               pixels = singly || !nhwc ? 0 : places * double(ceil_div(planes_of_round, parts * 2));

  // Stores. Outputs go by way of the planes, an element a thread (channels_last: two pixels), but where a warp stores
  // them in pairs of columns, or (16 rows) as they are.
  bool const vectors = nhwc ? eight && whole(out, 8) : whole(out, 2) && t.origin_w % 2 == 0 && t.out_W % 2 == 0;
  bool const staged = nhwc || (depth > 1 && (some || !vectors));
  double const area = 256.0 * depth * depth;  // of a tile
  double const exist =
      double(t.out_H) * t.out_W / (double(t.tiles_h * t.tiles_w) * area) * double(problem.N) / double(units * t.images);
  double const each =
      staged ? double(ceil_div(t.channels * t.images * int64_t(area), threads)) : 2 * images * depth * depth;
  double const left_out = some && !nhwc ? each : 0;
  double const stores = nhwc ? double(ceil_div(t.images * int64_t(area) / 2, threads)) * exist * (some ? 0.5 : 1)
                             : (staged ? each : 0) + left_out;

  BandWork const work = band_work(t, p.R, depth, depth);
  double const clear =
      double(ceil_div(t.shared_bytes / 16, threads)) +
      (staged ? double(rounds - 1) * double(ceil_div(t.channels * t.images * t.plane_bytes / 16, threads)) : 0);
  double const filters = double(ceil_div(t.channels * problem.R * problem.S, threads * 4));
  double const round = elements * e.element + pixels * e.pixels +
                       images * (work.products * of.product + work.loads * of.load) + stores * of.store + of.round;
  double const far = nhwc ? elements * (problem.C < 16 ? double(problem.C) / 16 : 1) * e.far : 0;
  double const bytes = 2 * double(problem.N) * double(problem.C) *
                       (double(problem.H) * double(problem.W) + double(problem.P()) * double(problem.Q()));
  return {e.before + waves * (filters * e.filters + double(rounds) * (round + far)) +
              of_sm * warps * (clear * e.clear + double(rounds) * left_out * e.apart) + bytes * e.byte,
          1};
}

}  // namespace conv2d_ext
