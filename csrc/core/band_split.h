// The tiles of cuda/band_split.cuh for a problem: shared by the planner and the launcher.
#pragma once

#include "depthwise.h"
#include "rounds.h"

namespace conv2d_ext {

// 64 rows of a product: 8 rows of taps by 8 columns of outputs.
inline constexpr int kSplitTaps = 8, kSplitColumns = 8;
inline constexpr int kSplitLead = 16;  // zeros before a row of taps; 14 behind it
inline constexpr int kSplitSharedBytes = 227 * 1024;
inline constexpr int kSplitBeyond = 512;  // threads without outputs read beyond the sums

constexpr int split_channels(bool nhwc) { return nhwc ? 4 : 1; }  // of a block: a warpgroup each
constexpr int split_sums_pitch(int wide) { return wide + 8; }

struct SplitTile {
  int wide = 64;                          // columns of a product: rows of inputs by images
  int images = 1, rows = 1, columns = 8;  // of a block's outputs
  int steps = 1;                          // of 8 rows of taps
  int units = 2, slots = 64;              // of 4 columns; of rows by images, with those around them
  int filter_pitch = 0;                   // in elements
  int64_t tiles_h = 1, tiles_w = 1, channel_units = 1, image_units = 1;
  int64_t plane_bytes = 0, filter_bytes = 0, sums_bytes = 0, shared_bytes = 0;  // a channel's; a block's
  double ns = 0;

  constexpr int64_t blocks() const { return tiles_h * tiles_w * channel_units * image_units; }
};

// Of a tile of columns: its first input's column, and the distance of taps and columns there.
struct SplitColumns {
  int origin, delta;
  constexpr SplitColumns(int q0, int pad) : origin(0), delta(0) {
    int const first = q0 - pad;
    origin = first > 0 ? first / 4 * 4 : 0;
    delta = origin - first;
  }
  // The blocks of 8 inputs that block j of outputs meets.
  constexpr int begin(int j) const {
    int const m = j - ((delta + 7) >> 3);
    return m > 0 ? m : 0;
  }
  constexpr int end(int j, int S, int width) const {
    int const m = j + ((S + 6 - delta) >> 3) + 1, all = (width + 7) / 8;
    return m < all ? m : all;
  }
};

// As measured on 132 SMs. A block: `products` blocks of 8 inputs for each of `steps`; they take tensor cores 3 * wide /
// 2 cycles each, and what comes before and after them instructions. A block alone waits for each of them.
constexpr double split_ns(SplitTile const& t, bool nhwc, double products, double steps) {
  bool const large = t.wide == 128;
  double const columns = t.columns / 8, tensor_ns = products * steps * 3 * t.wide / 2 / 1.755 * 1.27;
  double const other_ns = nhwc    ? 700 + 150 * t.steps + 480 * columns
                          : large ? 1100 + 100 * t.steps + 600 * columns
                                  : 400 + 100 * t.steps + 260 * columns;
  double const block_ns = (tensor_ns + other_ns) * split_channels(nhwc);
  double const alone_ns =
      3000 + products * steps * (large ? 200 : 130) * (nhwc ? 2.5 : 1.0) + columns * (large || nhwc ? 1150 : 450);
  double const blocks = double(t.blocks()) / 132;
  int64_t const fit = max64(kSplitSharedBytes / (t.shared_bytes + 1024), 1);
  double const rounds = double(ceil_div(ceil_div(t.blocks(), 132), nhwc ? 1 : min64(large ? 2 : 4, fit)));
  // Beside strip, whose own estimate is high on small images.
  double const small = t.images > 1 && t.rows <= 16 && !nhwc ? 1.25 : 1.0;
  return 5500 + small * (blocks * block_ns > rounds * alone_ns ? blocks * block_ns : rounds * alone_ns);
}

constexpr SplitTile split_tile(Op op, Problem const& p, bool nhwc) {
  bool const backward = op == Op::dgrad;
  int const in_H = int(backward ? p.P() : p.H), in_W = int(backward ? p.Q() : p.W);
  int const out_H = int(backward ? p.H : p.P()), out_W = int(backward ? p.W : p.Q());
  int const R = int(p.R), S = int(p.S);
  int const pad_h = int(backward ? R - 1 - p.pad_top : p.pad_top),
            pad_w = int(backward ? S - 1 - p.pad_left : p.pad_left);
  int const channels = split_channels(nhwc);
  SplitTile best;
  for (int wide = 64; wide <= (nhwc ? 64 : 128); wide *= 2)
    for (int images = 1; images <= min64(p.N, wide / 8); ++images) {
      int const most = wide / images - (kSplitTaps - 1);
      if (most < 1) break;
      SplitTile t;
      t.wide = wide, t.images = images;
      t.tiles_h = ceil_div(out_H, most), t.rows = int(ceil_div(out_H, t.tiles_h)), t.tiles_h = ceil_div(out_H, t.rows);
      if (images > 1 && t.tiles_h > 1) break;
      t.steps = int(ceil_div(R, kSplitTaps));
      t.slots = int(ceil_div(wide + kSplitTaps * (t.steps - 1) * images, 8)) * 8;  // whole lines of shared memory
      t.filter_pitch = (S + kSplitLead + 14 + 3) / 4 * 4;
      t.channel_units = ceil_div(p.C, channels), t.image_units = ceil_div(p.N, images);
      t.filter_bytes = int64_t(t.steps) * kSplitTaps * t.filter_pitch * 4;
      t.sums_bytes = int64_t(32) * split_sums_pitch(wide) * 4;
      int const all = int(ceil_div(out_W, kSplitColumns));
      for (int tiles = 1; tiles <= all; ++tiles) {
        int const blocks = int(ceil_div(all, tiles));
        t.columns = blocks * kSplitColumns, t.tiles_w = ceil_div(all, blocks);
        int const width = int(min64(in_W, t.columns + S - 1 + 3));
        t.units = int(ceil_div(width, 8)) * 2;
        t.plane_bytes = int64_t(2) * t.units * t.slots * 16;
        t.shared_bytes = channels * (t.plane_bytes + t.filter_bytes + t.sums_bytes) + kSplitBeyond;
        if (t.shared_bytes <= kSplitSharedBytes) break;
      }
      if (t.shared_bytes > kSplitSharedBytes) continue;
      double products = 0;
      for (int tile = 0; tile < t.tiles_w; ++tile) {
        SplitColumns const at(tile * t.columns, pad_w);
        int const width = int(min64(in_W - at.origin, t.units * 4));
        for (int j = 0; j < t.columns / 8 && tile * t.columns + j * 8 < out_W; ++j) {
          int const count = at.end(j, S, width) - at.begin(j);
          products += count > 0 ? count : 0;
        }
      }
      double steps = 0;
      for (int tile = 0; tile < t.tiles_h; ++tile)
        for (int step = 0; step < t.steps; ++step) {
          int const first = tile * t.rows - pad_h + step * kSplitTaps;
          steps += first < in_H && first + t.rows + kSplitTaps - 1 > 0;
        }
      t.ns = split_ns(t, nhwc, products / double(t.tiles_w), steps / double(t.tiles_h));
      if (best.ns == 0 || t.ns < best.ns) best = t;
    }
  return best;
}

constexpr bool is_split(Row const& row) {
  return row.family == Family::band && row.dtype == DType::f32 && row.op != Op::wgrad;
}

constexpr bool split_supports(Row const& row, Op op, Problem const& p) {
  if (p.P() == 0 || p.Q() == 0 || p.R == 0 || p.S == 0 || !unit_stride_depthwise(row, p)) return false;
  // Few taps leave most of a product empty. The tile is searched for in steps of a few columns.
  constexpr int64_t most = 1 << 12;
  if (p.R < 5 || p.R * p.S < 45) return false;
  if (max64(max64(p.H, p.W), max64(p.P(), p.Q())) > most || max64(p.pad_top, p.pad_left) > most) return false;
  SplitTile const t = split_tile(op, p, is_nhwc(row.variant));
  double const blocks = double(t.tiles_h) * double(t.tiles_w) * double(t.channel_units) * double(t.image_units);
  return t.ns > 0 && blocks < double(1 << 30);
}

constexpr Estimate split_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  double const ns = split_tile(op, p, is_nhwc(row.variant)).ns;
  return {5500 + (ns - 5500) * 132 / d.sm_count, 1};
}

}  // namespace conv2d_ext
