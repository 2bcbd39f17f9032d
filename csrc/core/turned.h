// grouped_turned.cuh: groups of many channels in NCHW, fprop and dgrad, in place.
#pragma once

#include <cstdint>

#include "planes.h"

namespace conv2d_ext {

// Of a warpgroup's instructions; of 16-bit types one number.
constexpr int kTurnedColumns[] = {64, 128, 192, 224, 256}, kTurnedSingle = 128;
constexpr int kTurnedPhases = 8, kTurnedBuffers = 2, kTurnedStages = 8;
constexpr int64_t kTurnedBarriers = 256, kTurnedLine = 128;                  // bytes
constexpr int64_t turned_line(DType t) { return kTurnedLine / size_of(t); }  // channels

// What a block computes at a time: 128 results' channels of a tile of whole rows, or of whole images, or 64 of two.
struct TurnedTile {
  int columns = 0;               // pixels of a warpgroup, those between rows and images among them; 0: no tile
  int passes = 1, phases_w = 1;  // dgrad's phases: one after the other, and side by side
  int subs = 1;                  // two: each warpgroup has a tile of its own, and the filters are the same
  int64_t rows = 0;              // of results of a phase
  int64_t images = 1;            // of a tile, if it has whole ones
  bool whole = false;
  int64_t planes_h = 1, planes_w = 1;             // with a stride, the lines that leave the same remainder lie together
  int64_t pitch = 0, image_pitch = 0;             // lines from row to row, image to image
  int64_t plane_pitch = 0, long_planes = 0;       // lines of the first planes, how many; the others lack a row
  int64_t lines = 0, in_rows = 0, in_pixels = 0;  // as copied: of an image, of all
  int64_t stages = 0, tables = 0, shared = 0, tiles = 0;
  double cycles = 0;
  constexpr int64_t members() const { return 2 / subs; }  // warpgroups with filters of their own
  constexpr int64_t plane_begin(int64_t plane) const {
    return plane * plane_pitch - max64(plane - long_planes, 0) * pitch;
  }
};

constexpr bool is_turned(Row const& row) { return row.family == Family::grouped && row.tile_m == 128; }

constexpr TurnedTile turned_tile(Op op, Problem const& p, Device const& d) {
  bool const backward = op == Op::dgrad;
  GroupedAxis const h = grouped_axis_h(op, p), w = grouped_axis_w(op, p);
  int64_t const line = turned_line(p.dtype), in = backward ? p.K_per_group() : p.C_per_group(),
                out = backward ? p.C_per_group() : p.K_per_group();
  int64_t const in_h = backward ? p.P() : p.H, in_w = backward ? p.Q() : p.W;
  int64_t const chunks = ceil_div(in, line), size = size_of(p.dtype);
  TurnedTile best, t;
  t.passes = h.phases, t.phases_w = w.phases;
  if (t.phases_w > 2) return best;
  t.planes_h = min64(h.step, h.span), t.planes_w = min64(w.step, w.span);
  // Even, so that neighbouring columns are neighbours in memory that are stored together.
  t.pitch = round_to(plane_pitch(w, in_w, w.positions), 2);
  t.long_planes = ((h.span - 1) % h.step + 1) * t.planes_w;
  for (t.rows = h.positions; t.rows >= 1; t.rows = t.rows > 32 ? 32 : t.rows - 1) {
    t.whole = t.rows == h.positions;
    for (t.images = 1; t.images <= (t.whole ? min64(p.N, 8) : 1); ++t.images) {
      t.image_pitch = image_lines(t, h, in_h);
      int64_t const needed = (t.images - 1) * t.image_pitch + (t.rows - 1) * t.pitch + w.positions;
      t.columns = 0;
      for (int const columns : kTurnedColumns) {
        bool const exists = size == 4 || columns == kTurnedSingle;
        if (exists && t.columns == 0 && needed <= columns) t.columns = columns;
      }
      if (t.columns == 0 || t.columns * t.phases_w > 256) continue;
      // The lines of results that exist. Other columns meet what lies behind, at most half of a ring of filters.
      t.plane_pitch = needed + ((h.span - 1) / h.step) * t.pitch + (w.span - 1) / w.step;
      t.lines = round_to(t.plane_begin(t.planes_h * t.planes_w), 8);
      t.in_rows = t.whole ? in_h : (t.rows - 1) * h.step + h.span;
      t.in_pixels = t.images * t.in_rows * in_w;
      t.tables = round_to(round_to(t.in_pixels, 2) * 4 + t.columns * t.phases_w * t.passes * 4 + kTurnedBarriers, 128);
      for (t.subs = 1; t.subs <= 2; ++t.subs) {
        if (t.subs == 1 && out <= 64) continue;
        int64_t const stage = kPlaneStep * t.members();
        int64_t const fixed = kTurnedBuffers * t.subs * t.lines * kTurnedLine + t.tables;
        t.stages = min64(kTurnedStages, (kLinesShared - fixed) / stage);
        if (t.stages < 2) continue;
        t.shared = fixed + t.stages * stage;
        int64_t const places = ceil_div(h.positions, t.rows) * ceil_div(p.N, t.images);
        t.tiles = p.groups * ceil_div(out, 64 * t.members()) * ceil_div(places, t.subs);
        // Cycles of an SM for a tile: products of both warpgroups, or what is turned meanwhile; then the stores.
        double const k = double(ceil_div(in * size, 32)) / double(chunks), steps = double(chunks) * double(p.R * p.S);
        double const products = steps * (2 * k * double(t.columns / 2) + 40);
        double const turns = double(chunks * t.passes * t.subs), bytes = double(t.in_pixels) * kTurnedLine * turns;
        double const turn = bytes / 14 + 400 * turns;
        double const put = double(t.passes) * (800 + double(t.columns * t.phases_w) * 10);
        double const each = larger_of(products, turn) + put;
        t.cycles = double(ceil_div(t.tiles, d.sm_count)) * each + 3000;
        if (best.columns == 0 || t.cycles < best.cycles) best = t;
      }
    }
  }
  return best;
}

constexpr bool turned_supports(Op op, Problem const& p, Device const& d) {
  if (op == Op::wgrad || (p.dtype == DType::f32 && !p.allow_tf32) || !turns_planes(op, p)) return false;
  if (8 * max64(p.C * p.H * p.W, p.K * p.P() * p.Q()) >= int64_t(1) << 31) return false;
  TurnedTile const t = turned_tile(op, p, d);
  return t.columns > 0 && t.tiles < int64_t(1) << 30;
}

constexpr int64_t turned_workspace_bytes(Op op, Problem const& p) {
  return plane_filter_bytes(op, p, turned_line(p.dtype));
}

// As measured: longer than the cycles say. The stores of small tiles are not hidden, nor those of dgrad's short rows.
constexpr Estimate turned_estimate(Op op, Problem const& p, Device const& d) {
  TurnedTile const t = turned_tile(op, p, d);
  bool const strided = p.stride_h > 1 || p.stride_w > 1, backward = op == Op::dgrad;
  int64_t const in = backward ? p.K_per_group() : p.C_per_group(), out_w = backward ? p.W : p.Q();
  bool const f32 = p.dtype == DType::f32;
  double slower = 1;
  if (!strided)
    slower = !f32                         ? 1.7
             : t.subs == 1                ? 1.1
             : in <= 16 && p.R * p.S > 16 ? 1.42
             : in <= turned_line(p.dtype) ? 1.08
             : out_w % 2 != 0             ? 1.65
                                          : 1.3;
  else if (in <= 32)
    slower = !f32 ? 0.95 : !backward && in < 32 ? 1.13 : 1.33;
  else if (backward && t.subs == 2)
    slower = 1 + (f32 ? 33 : 42) / double(out_w);
  else
    slower = f32 ? (backward ? 1.3 : 1.18) : t.subs == 1 ? 1.45 : 1.55;
  return {t.cycles / 1.6 * slower + 7000 + double(turned_workspace_bytes(op, p)) / 1500, 1};
}

}  // namespace conv2d_ext
