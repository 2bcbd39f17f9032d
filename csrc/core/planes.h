// grouped_planes.cuh: groups of many channels in NCHW, fprop and dgrad of 16-bit types, in place.
#pragma once

#include <cstdint>

#include "grouped.h"

namespace conv2d_ext {

constexpr int kPlaneTaps = 64, kPlaneChannels = 64;   // of a filter, at most; of a line of 128 bytes
constexpr int kSumTaps = 9;                           // wgrad's, at most
constexpr int64_t kPlaneStep = 64 * 128;              // bytes: 64 filters of a tap and a line
constexpr int kPlaneColumns[] = {64, 128, 192, 216};  // of one instruction
constexpr int64_t kPlaneTables = 768;  // bytes for barriers, and 2 for each thread: what is between rows goes there

// What a block computes at a time: 64 results' channels, or twice as many, of a tile of whole rows, or of whole images.
struct PlaneTile {
  int columns = 0;     // pixels of an instruction, those between rows and images among them; 0: there is no tile
  int phases = 1;      // dgrad's, whose sums are kept side by side
  int64_t groups = 1;  // warpgroups, of 64 filters (dgrad: channels) each
  int64_t teams = 1;   // two: each warpgroup has a tile of its own, and the filters are the same
  constexpr int64_t members() const { return groups / teams; }
  constexpr int64_t plane_begin(int64_t plane) const { return plane * plane_pitch; }
  int64_t rows = 0;    // of results of a phase
  int64_t images = 1;  // of a tile, if it has whole ones
  bool whole = false;
  int64_t planes_h = 1, planes_w = 1;  // with a stride, the lines that leave the same remainder lie together
  int64_t pitch = 0, image_pitch = 0, plane_pitch = 0;  // lines from row to row, image to image, plane to plane
  int64_t lines = 0;
  int64_t in_rows = 0, in_pixels = 0;                   // as copied: of an image, of all
  int64_t raw_pitch = 0, raw_image = 0, raw_bytes = 0;  // bytes of a channel, of an image, of all
  int64_t out_rows = 0, out_pitch = 0, out_bytes = 0;   // of an image's results; bytes of a channel, all of a warpgroup
  int64_t tables = 0, stages = 0, shared = 0;
  int64_t tiles = 0;
  double cycles = 0;
};

constexpr bool is_planes(Row const& row) {
  return row.family == Family::grouped && row.tile_m == 64 && row.variant == Variant::nchw;
}

constexpr int64_t round_to(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr double larger_of(double a, double b) { return a > b ? a : b; }

constexpr int plane_columns(int64_t needed) {
  for (int const columns : kPlaneColumns)
    if (needed <= columns) return columns;
  return 0;
}

// From one row of lines to the next: results' and their taps' inputs must fit, but zeros on either side are shared.
constexpr int64_t plane_pitch(GroupedAxis const& a, int64_t extent, int64_t positions) {
  int64_t const needed = positions + (a.span - 1) / a.step;
  if (a.step > 1 || a.low > 0) return needed;
  return max64(max64(needed + a.low, min64(extent - a.low, needed)), positions);
}

// Lines from an image of a tile to the next.
template <class Tile>
constexpr int64_t image_lines(Tile const& t, GroupedAxis const& h, int64_t in_h) {
  return (t.whole ? plane_pitch(h, in_h, t.rows) : t.rows + (h.span - 1) / h.step) * t.pitch;
}
// Lines from a plane to the next: the last instruction's with the last tap, and the last image's.
template <class Tile>
constexpr int64_t plane_lines(Tile const& t, GroupedAxis const& h, GroupedAxis const& w, int64_t columns) {
  int64_t const reach = ((h.span - 1) / h.step) * t.pitch + (w.span - 1) / w.step;
  return round_to(max64(columns + reach, t.images * t.image_pitch + (t.whole ? t.pitch : w.span)), 8);
}

constexpr PlaneTile plane_tile(Op op, Problem const& p, Device const& d) {
  bool const backward = op == Op::dgrad;
  GroupedAxis const h = grouped_axis_h(op, p), w = grouped_axis_w(op, p);
  int64_t const in = backward ? p.K_per_group() : p.C_per_group(), out = backward ? p.C_per_group() : p.K_per_group();
  int64_t const in_h = backward ? p.P() : p.H, in_w = backward ? p.Q() : p.W;
  int64_t const out_h = backward ? p.H : p.P(), out_w = backward ? p.W : p.Q();
  int64_t const chunks = ceil_div(in, kPlaneChannels), channels = min64(round_to(in, 8), kPlaneChannels);
  int const phases = h.phases * w.phases;
  PlaneTile best;
  if (phases != 1 && phases != 4) return best;
  PlaneTile t;
  t.phases = phases;
  t.planes_h = min64(h.step, h.span), t.planes_w = min64(w.step, w.span);
  t.pitch = plane_pitch(w, in_w, w.positions);
  for (t.rows = h.positions; t.rows >= 1; t.rows = t.rows > 16 ? 16 : t.rows - 1) {
    t.whole = t.rows == h.positions;
    for (t.images = 1; t.images <= (t.whole ? min64(p.N, 8) : 1); ++t.images) {
      t.image_pitch = image_lines(t, h, in_h);
      int64_t const columns = (t.images - 1) * t.image_pitch + (t.rows - 1) * t.pitch + w.positions;
      t.columns = plane_columns(columns);
      if (t.columns == 0 || (phases == 4 && t.columns != 64)) continue;
      t.plane_pitch = plane_lines(t, h, w, t.columns);
      t.lines = t.planes_h * t.planes_w * t.plane_pitch;
      t.in_rows = t.whole ? in_h : (t.rows - 1) * h.step + h.span;
      t.in_pixels = t.images * t.in_rows * in_w;
      t.raw_pitch = t.whole ? in_h * in_w * 2 : planar_pitch(false, t.in_rows, in_h, in_w, p.dtype);
      t.raw_image = channels * t.raw_pitch, t.raw_bytes = round_to(t.images * t.raw_image, 128);
      t.out_rows = t.whole ? out_h : t.rows * h.out_step;
      // Eight channels' places are in different banks.
      t.out_pitch = t.whole ? out_h * out_w * 2 : round_to(t.out_rows * out_w * 2 - 16, 128) + 16;
      t.out_bytes = round_to(t.images * 64 * t.out_pitch, 128);
      t.tables = round_to(round_to(t.in_pixels, 2) * 4 + t.columns * phases * 4 + kPlaneTables, 128);
      // One warpgroup; two that share a tile, with other filters; two with a tile each.
      for (int mode = 0; mode < 3; ++mode) {
        t.groups = mode == 0 ? 1 : 2, t.teams = mode == 2 ? 2 : 1;
        if (mode == 1 && out <= 64) continue;
        int64_t const fixed = t.teams * (t.lines * 128 + t.raw_bytes) + t.groups * t.out_bytes + t.tables;
        t.stages = min64(8, (kLinesShared - fixed) / (kPlaneStep * t.members()));
        if (t.stages < 2) continue;
        t.shared = fixed + t.stages * kPlaneStep * t.members();
        int64_t const places = ceil_div(h.positions, t.rows) * ceil_div(p.N, t.images);
        t.tiles = p.groups * ceil_div(out, 64 * t.members()) * ceil_div(places, t.teams);
        // Cycles of an SM for a tile: products; what is waited for, turned, put aside and stored, which another team
        // hides.
        double const steps = double(chunks) * double(p.R * p.S), lines = double(t.columns);
        double const k = double(ceil_div(in, 16)) / double(chunks);
        double const product = k * (lines / 2 < 32 ? 32 : lines / 2) + (t.columns <= 128 ? 30 : 10);
        double const products = steps * product * double(t.groups);
        double const pairs = double(t.in_pixels) / 64 * double(channels) / 8 * double(chunks);
        double const turn = 700 * double(chunks) + pairs * 60 / double(t.members());
        double const put = 1600 + lines * phases * 4.2 + (t.whole ? 300 : double(t.members() * t.out_bytes) / 10);
        double const bytes = double(t.raw_bytes * chunks) + double(t.members() * t.out_bytes);
        double const alone = products / double(t.teams) + turn + put;
        double each = t.teams == 2 ? larger_of(products, alone) : alone;
        double const memory = bytes * double(t.teams) / 18;
        if (memory > each) each = memory;
        t.cycles = double(ceil_div(t.tiles, d.sm_count)) * each + turn + put;
        if (best.columns == 0 || t.cycles < best.cycles) best = t;
      }
    }
  }
  return best;
}

// wgrad of grouped_planes_wgrad.cuh: a block sums 64 filters by 64 channels by up to nine taps, three a warpgroup, over
// a share of the tiles, whose pixels are the reduction.
struct PlaneSums {
  int64_t pixels = 0;  // of a tile, those between rows and images among them: a multiple of 16; 0: there is no tile
  int64_t rows = 0, images = 1;
  bool whole = false;
  int64_t planes_h = 1, planes_w = 1, pitch = 0, image_pitch = 0, plane_pitch = 0, x_lines = 0;  // as in PlaneTile
  int64_t x_rows = 0, x_pixels = 0, x_pitch = 0, x_image = 0, x_raw = 0;
  int64_t y_rows = 0, y_pixels = 0, y_pitch = 0, y_image = 0, y_raw = 0;
  int64_t tables = 0, shared = 0;
  int64_t tiles = 0, units = 0, splits = 1;
  double cycles = 0;
};

// Are a row's three taps of the filter one instruction?
constexpr bool plane_sums_joined(Problem const& p) { return p.S == 3 && p.stride_w == 1; }

constexpr PlaneSums plane_sums(Problem const& p, Device const& d) {
  GroupedAxis const h = grouped_axis_h(Op::wgrad, p), w = grouped_axis_w(Op::wgrad, p);
  int64_t const P = p.P(), Q = p.Q();
  int64_t const C = min64(p.C_per_group(), 64), K = min64(p.K_per_group(), 64);
  PlaneSums best, t;
  t.units = p.groups * ceil_div(p.C_per_group(), 64) * ceil_div(p.K_per_group(), 64);
  t.planes_h = min64(h.step, h.span), t.planes_w = min64(w.step, w.span);
  t.pitch = plane_pitch(w, p.W, Q);
  for (t.rows = P; t.rows >= 1; t.rows = t.rows > 16 ? 16 : t.rows - 1) {
    t.whole = t.rows == P;
    for (t.images = 1; t.images <= (t.whole ? min64(p.N, 8) : 1); ++t.images) {
      t.image_pitch = image_lines(t, h, p.H);
      t.pixels = round_to((t.images - 1) * t.image_pitch + (t.rows - 1) * t.pitch + Q, 16);
      if (t.pixels > 512) continue;
      t.plane_pitch = plane_lines(t, h, w, t.pixels);
      t.x_lines = t.planes_h * t.planes_w * t.plane_pitch;
      t.x_rows = t.whole ? p.H : (t.rows - 1) * h.step + h.span, t.y_rows = t.rows;
      t.x_pixels = t.images * t.x_rows * p.W, t.y_pixels = t.images * t.y_rows * Q;
      t.x_pitch = t.whole ? p.H * p.W * 2 : planar_pitch(false, t.x_rows, p.H, p.W, p.dtype);
      t.y_pitch = t.whole ? P * Q * 2 : planar_pitch(false, t.y_rows, P, Q, p.dtype);
      t.x_image = C * t.x_pitch, t.y_image = K * t.y_pitch;
      t.x_raw = round_to(t.images * t.x_image, 128), t.y_raw = round_to(t.images * t.y_image, 128);
      t.tables = round_to((t.x_pixels + t.y_pixels) * 4 + kPlaneTables, 128);
      t.shared = (t.x_lines + t.pixels) * 128 + t.x_raw + t.y_raw + t.tables;
      if (t.shared > kLinesShared) continue;
      t.tiles = ceil_div(P, t.rows) * ceil_div(p.N, t.images);
      double const instruction = plane_sums_joined(p) ? 100 * 3 : 36 * double(p.R * p.S);
      double const products = double(t.pixels / 16) * instruction + 150;
      double const turn = (double(t.x_pixels * C) + double(t.y_pixels * K)) / 512 * 20 + 700;
      double const memory = double(t.x_raw + t.y_raw) / 18;
      double each = products + turn + 300;
      if (memory > each) each = memory;
      for (int64_t splits = 1; splits <= min64(t.tiles, max64(1, 2 * d.sm_count / t.units)); ++splits) {
        double const bytes = double(t.units * splits) * 9 * 64 * 64 * 4;
        if (splits > 1 && bytes > double(kMaxWorkspaceBytes)) break;
        double const waves = double(ceil_div(t.units * splits, d.sm_count));
        double const cycles = waves * (double(ceil_div(t.tiles, splits)) * each + 3000) + bytes / 1100;
        if (best.pixels == 0 || cycles < best.cycles) best = t, best.splits = splits, best.cycles = cycles;
      }
    }
  }
  return best;
}

// What rows that turn planes into lines take of a problem, grouped_turned.cuh's among them; and their filters, in the
// order of the steps, of lines of so many channels.
constexpr bool turns_planes(Op op, Problem const& p) {
  if (p.groups == 1 || p.N == 0 || p.K == 0 || p.C == 0 || p.P() < 1 || p.Q() < 1) return false;
  if (p.C_per_group() % 8 != 0 || p.K_per_group() % 8 != 0 || !grouped_planar(p) || p.P() * p.Q() < 2) return false;
  constexpr int64_t most = int64_t(1) << 24;
  if (p.N > most || p.C > most || p.K > most || p.H > 4096 || p.W > 4096 || p.stride_h > 4 || p.stride_w > 4)
    return false;
  if (p.pad_left > 64 || p.pad_right > 64 || p.pad_top > 64 || p.pad_bottom > 64) return false;
  return p.R * p.S <= (op == Op::wgrad ? kSumTaps : kPlaneTaps) && (p.R - 1) * p.dilation_h <= 64 &&
         (p.S - 1) * p.dilation_w <= 64;
}
constexpr int64_t plane_filter_bytes(Op op, Problem const& p, int64_t line) {
  int64_t const in = op == Op::dgrad ? p.K_per_group() : p.C_per_group(),
                out = op == Op::dgrad ? p.C_per_group() : p.K_per_group();
  return p.groups * ceil_div(out, 128) * 2 * ceil_div(in, line) * p.R * p.S * kPlaneStep;
}

constexpr bool planes_supports(Op op, Problem const& p, Device const& d) {
  if (size_of(p.dtype) != 2 || !turns_planes(op, p)) return false;
  if (op == Op::wgrad) {
    PlaneSums const t = plane_sums(p, d);
    return t.pixels > 0 && t.tiles < int64_t(1) << 30 && t.units * t.splits < int64_t(1) << 24;
  }
  PlaneTile const t = plane_tile(op, p, d);
  return t.columns > 0 && t.tiles < int64_t(1) << 30;
}

// fprop, dgrad: the filters of a step, in the order of the steps. wgrad: shares of the sums.
constexpr int64_t planes_workspace_bytes(Op op, Problem const& p, Device const& d) {
  if (op == Op::wgrad) {
    PlaneSums const t = plane_sums(p, d);
    return t.units * t.splits * p.R * p.S * 64 * 64 * 4;
  }
  return plane_filter_bytes(op, p, kPlaneChannels);
}

}  // namespace conv2d_ext
