// grouped_plain.cuh: fprop and dgrad of few channels a group over NCHW, from rows as they lie.
#pragma once

#include "plain.h"

namespace conv2d_ext {

constexpr int kRowPairs = 8;  // neighbours in a row, of which a warp computes so many at once

// Warps of a block that multiply, by the registers of their weights.
constexpr int rows_warps(DType t, bool strict, int64_t blocks, bool half) {
  return t != DType::f32 ? (blocks == 3 ? 12 : 16) : strict && blocks > (half ? 2 : 1) ? 8 : 12;
}

constexpr bool is_plain_rows(Row const& row) { return row.family == Family::grouped && row.tile_m == 32; }

// Blocks of 8 channels that are summed over, of a unit; those whose results are computed.
constexpr int64_t rows_in(Op op, Problem const& p) {
  return ceil_div(plain_per_unit(p) * (op == Op::dgrad ? p.K_per_group() : p.C_per_group()), 8);
}
constexpr int64_t rows_out(Op op, Problem const& p) {
  return ceil_div(plain_per_unit(p) * (op == Op::dgrad ? p.C_per_group() : p.K_per_group()), 8);
}

// Whether the last of several blocks that are summed over has four channels at most, whose products float32 has half as
// deep.
constexpr bool rows_half(Op op, Problem const& p) {
  int64_t const of_unit = plain_per_unit(p) * (op == Op::dgrad ? p.K_per_group() : p.C_per_group()), last = of_unit % 8;
  return p.dtype == DType::f32 && of_unit > 8 && last > 0 && last <= 4;
}

constexpr bool plain_rows_problem(Op op, Problem const& p) {
  if (op == Op::wgrad || p.dtype == DType::f64 || !runs_problem(p) || p.stride_h != 1) return false;
  // A warp's registers hold no more weights.
  return rows_in(op, p) <= 3 && rows_out(op, p) <= rows_warps(p.dtype, !p.allow_tf32, rows_in(op, p), rows_half(op, p));
}

// What a block computes, and the tiles that it goes through.
struct PlainRows {
  int64_t out = 1, jobs = 0;     // blocks of results of a unit; of a block, a warp for each; 0: there is none
  int64_t shares = 1;            // warps that share the pixels of such a job
  int64_t places = 1;            // blocks but for the splits
  int64_t rows = 0, images = 1;  // of a tile
  int64_t pairs = 0;             // of pixels, from an image's row to the next one's
  int64_t channels = 0;          // of a block, copied
  PlainRun x;
  int64_t stage_bytes = 0, stages = 0, shared = 0;
  int64_t tiles = 0, splits = 1;
  double cycles = 0;
};

constexpr PlainRows plain_rows(Op op, Problem const& p, Device const& d) {
  PlainRows best, t;
  if (!plain_rows_problem(op, p)) return best;
  int64_t const in = rows_in(op, p), size = size_of(p.dtype), pitch = p.W * size;
  int64_t const per_unit = plain_per_unit(p), units = p.groups / per_unit;
  int64_t const of_unit = per_unit * (op == Op::dgrad ? p.K_per_group() : p.C_per_group());
  bool const strict = p.dtype == DType::f32 && !p.allow_tf32;
  double const deep = double(in) - (rows_half(op, p) ? 0.5 : 0);
  double const products =
      (size == 2 ? double(3 * ceil_div(3 * in, 2)) : 9 * deep) * (strict ? 3 : 1);  // of a warp, row
  int64_t const most = rows_warps(p.dtype, strict, in, rows_half(op, p));
  t.out = rows_out(op, p);
  for (t.jobs = 1; t.jobs <= min64(most, units * t.out); ++t.jobs) {
    // Those of whole units; or as many as there are warps, so that none is idle, from one more unit.
    bool const whole = t.jobs % t.out == 0;
    if (!whole && (t.jobs < most || !strict)) continue;
    int64_t const met = min64(units, whole ? t.jobs / t.out : ceil_div(t.jobs - 1, t.out) + 1);
    t.places = ceil_div(units * t.out, t.jobs), t.channels = met * of_unit;
    for (int64_t parts = 1; parts <= 28; parts += parts < 2 ? 1 : parts < 8 ? 2 : 4)
      for (t.images = 1; t.images <= (parts == 1 ? min64(p.N, 8) : 1); t.images *= 2) {
        t.rows = ceil_div(p.H, parts);
        int64_t const of_image = ceil_div(p.H, t.rows);
        if (t.rows < 2 || p.H - (of_image - 1) * t.rows < 2) continue;
        // A warp's pairs go on in the next image where that spares a fifth of the work (7 columns: four of eight).
        int64_t const pairs = ceil_div(p.W, 2), whole = ceil_div(pairs, kRowPairs) * kRowPairs;
        t.pairs = ceil_div(t.images * pairs, kRowPairs) * kRowPairs * 5 <= t.images * whole * 4 ? pairs : whole;
        int64_t const items = ceil_div(t.images * t.pairs, kRowPairs);
        t.shares = min64(most / t.jobs, items);
        // 16-bit types: lanes side by side have every second channel.
        t.x = plain_run(p.H, pitch, parts == 1, t.rows + 1, t.images, true, 64);
        if (size == 2) t.x.stride = plain_channel(t.images * t.x.image, 64, 16);
        t.stage_bytes = ceil_div(kRunsFront + ceil_div(t.channels, t.x.together) * t.x.stride + pitch + 128, 128) * 128;
        t.tiles = of_image * ceil_div(p.N, t.images);
        for (t.stages = 4; t.stages >= 1; --t.stages)
          if ((t.shared = t.stages * t.stage_bytes) + kRunsTables <= kLinesShared) break;
        if (t.stages == 0) continue;
        double const steps = double(ceil_div(items, t.shares)) * double(t.rows + 2);
        double const warps = double(t.jobs * t.shares), work = products * 6.8 + (size == 2 ? 120 : 75);
        double const alone = work + (size == 2 ? 200 : 60);
        double busy = steps * work * double(ceil_div(int64_t(warps), 4));
        if (steps * alone > busy) busy = steps * alone;
        double const reads = double(t.images * t.channels * min64(t.rows + 2, p.H) * pitch);
        double const bytes = reads + double(t.images * t.jobs * 8 * t.rows * pitch);
        double const copies =
            bytes / (size == 2 ? 11 : 19) + double(t.images * ceil_div(t.channels, t.x.together)) * kRunCycles;
        double each = (busy > copies ? busy : copies) + 1500;
        if (t.stages == 1) each = busy + copies + 2500;
        if (t.x.shifts) each *= 1.05;
        t.splits = min64(t.tiles, max64(1, d.sm_count / t.places));
        double const waves = double(ceil_div(t.places * t.splits, d.sm_count));
        t.cycles = waves * (double(ceil_div(t.tiles, t.splits)) * each + reads / 16 + 2500);
        if (best.cycles == 0 || t.cycles < best.cycles) best = t;
      }
  }
  return best;
}

constexpr bool plain_rows_supports(Op op, Problem const& p, Device const& d) { return plain_rows(op, p, d).jobs > 0; }

constexpr Estimate plain_rows_estimate(Op op, Problem const& p, Device const& d) {
  // As measured: 16 warps hide more than the sums of a tile have it; rows of odd length; short walks.
  bool const f32 = p.dtype == DType::f32, strict = f32 && !p.allow_tf32, odd = p.W % 2 != 0;
  double const hidden = !f32 && rows_in(op, p) <= 2 ? 0.8 : 1;
  double const slower = (!odd ? 1 : !f32 ? 1.25 : strict ? 1.05 : 1.1) * (odd && !strict && p.H * p.W <= 64 ? 1.3 : 1);
  return {plain_rows(op, p, d).cycles / 1.75 * hidden * slower + 5500, 1};
}

}  // namespace conv2d_ext
