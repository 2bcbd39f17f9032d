// tma_planes.cuh, dense fprop and dgrad over NCHW without packing x: what its rows take, how they cut a problem and
// what that costs.
#pragma once

#include <cstdint>

#include "tma.h"

namespace conv2d_ext {

constexpr bool is_tma_planes(Row const& row) {
  return row.family == Family::tma && row.variant == Variant::nchw && row.op != Op::wgrad && row.dtype != DType::f32;
}

struct PlanesCut {
  static constexpr int chunk = 32;                    // channels of a stage
  static constexpr int half_bytes = 128 * chunk * 2;  // of it: 128 pixels
  static constexpr int w_bytes = 3 * 64 * chunk * 2;
  static constexpr int shared_bytes = 225 * 1024, room = shared_bytes - 1024 - 8 * 16 * 128;  // beside results
  static constexpr int most_stages = 16;

  Walk h, w;
  bool turns;  // filters stay in shared memory, and warpgroups take turns with tiles of 128 pixels
  int tile;    // pixels
  bool whole;  // tiles are whole rows, which have no neighbours
  int64_t pixels, chunks, stages, advance, tiles_n, tiles_image, tiles;

  constexpr PlanesCut(Op op, Problem const& p)
      : h(walk_h(op, p, 0)),
        w(walk_w(op, p, 0)),
        turns(false),
        tile(256),
        whole(false),
        pixels(h.pixels * w.pixels),
        chunks(ceil_div(op == Op::fprop ? p.C : p.K, chunk)),
        tiles_n(ceil_div(op == Op::fprop ? p.K : p.C, 64)) {
    int64_t const filters = chunks * h.taps * w_bytes;
    turns = tiles_n <= kMaxKeptTiles && filters + 8 * half_bytes <= room;
    if (turns) tile = 128;
    stages = min64(turns ? (room - filters) / half_bytes : room / (2 * half_bytes + w_bytes), most_stages);
    whole = tile % w.pixels == 0;
    advance = whole ? tile : tile - 16;
    tiles_image = max64(ceil_div(whole ? pixels : pixels - 16, advance), 1);
    tiles = p.N * tiles_n * tiles_image;
  }
};

// Planes whose pixels follow each other, and that the copy engine moves.
constexpr bool whole_planes(Strides const& s, int align, int64_t N, int64_t C, int64_t H, int64_t W, DType t) {
  int const v = 16 / size_of(t);
  auto stride = [&](int64_t size, int64_t step) {
    return size == 1 || (step > 0 && step % v == 0 && step * size_of(t) < int64_t(1) << 40);
  };
  return s.w == 1 && (H == 1 || s.h == W) && W % v == 0 && align >= 16 && stride(N, s.n) && stride(C, s.c);
}

constexpr bool tma_planes_supports(Row const& row, Problem const& p) {
  if (p.groups != 1 || p.S != 3 || p.stride_h != 1 || p.stride_w != 1) return false;
  if (p.dilation_w != 1 || p.pad_left != 1 || p.pad_right != 1) return false;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.R == 0 || p.H == 0 || p.W == 0 || p.P() == 0) return false;
  if (!whole_planes(p.x, p.x_align, p.N, p.C, p.H, p.W, p.dtype) ||
      !whole_planes(p.y, p.y_align, p.N, p.K, p.P(), p.W, p.dtype))
    return false;
  auto stride = [](int64_t size, int64_t step) { return size == 1 || (step > 0 && step % 8 == 0); };
  if ((p.C > 1 && p.w.c != 1) || p.w_align < 16 || !stride(p.K, p.w.n) || !stride(p.R, p.w.h) || !stride(p.S, p.w.w) ||
      !map_supports(p.w, p.K, p.R, p.S, p.dtype))
    return false;
  // Pixels and tiles are counted in 32 bits.
  constexpr double most = 1 << 30;
  double const rows =
      double(p.R) * double(p.dilation_h) + double(max64(p.pad_top, -p.pad_top)) + double(max64(p.H, p.P()));
  double const tiles = double(p.N) * (rows * double(p.W) / 112 + 1) * double(max64(p.C, p.K));
  return rows * double(p.W) < most && tiles < most && PlanesCut(row.op, p).stages >= 2;
}

// Rounds of tiles, fitted to 285 times (docs/tuning.md). A device that is not full has a higher clock.
constexpr Estimate tma_planes_estimate(Row const& row, Problem const& p, Device const& d) {
  PlanesCut const cut(row.op, p);
  double const steps = double(cut.chunks * cut.h.taps), rounds = double(ceil_div(cut.tiles, d.sm_count));
  if (cut.turns) return {7700 + rounds * (650 + steps * 218), 1};
  return {7000 + rounds * (1450 + steps * (cut.tiles * 5 < d.sm_count * 3 ? 415 : 480)), 1};
}

}  // namespace conv2d_ext
