// tma_lean.cuh over groups: what its rows cost. Apart from lean.h, which the kernels include.
#pragma once

#include "lean.h"

namespace conv2d_ext {

constexpr bool is_lean_groups(Row const& row, Problem const& p) {
  return row.family == Family::tma && row.variant == Variant::lean && p.groups > 1;
}

// Do a group's channels end within a step?
constexpr bool lean_ends_early(Op op, Problem const& p) {
  int64_t const depth = op == Op::dgrad ? p.K_per_group() : p.C_per_group();
  return depth % (lean_short_lines(op, p) ? 32 : 128 / size_of(p.dtype)) != 0;
}

// The lines that L2 delivers to all SMs, those of groups that end within a step taking longer, or what a block alone on
// its SM waits for; bytes; and blocks that send each other their sums. Fitted to 672 times of layers of networks
// (docs/tuning/grouped.md), a tenth off, and lowered by what the other rows' estimates leave out of such layers.
constexpr double lean_groups_ns(Row const& row, Problem const& p, int split) {
  bool const f32 = p.dtype == DType::f32, dgrad = row.op == Op::dgrad, ended = lean_ends_early(row.op, p);
  int64_t const depth = dgrad ? p.K_per_group() : p.C_per_group(), out = dgrad ? p.C_per_group() : p.K_per_group();
  int64_t const pixels = p.N * (dgrad ? p.H * p.W : p.P() * p.Q()), taps = p.R * p.S;
  int64_t const TM = row.tile_m, TN = dgrad && lean_short_lines(row.op, p) && out <= 32 ? 32 : row.tile_n;
  int64_t const steps = ceil_div(depth, f32 ? 32 : tma_line(depth) / 2) * taps, share = ceil_div(steps, split);
  int64_t const blocks = ceil_div(pixels, TM) * ceil_div(out, TN) * p.groups * split;
  double const each = double(ceil_div(blocks, 132)), lines = double(TM + TN) / 128;
  // Of 128 lines, whole and ended; lines of 16-bit types have 128 or 64 bytes.
  struct Times {
    double whole, ended;
  };
  constexpr Times floats[] = {{141, 165}, {144, 208}}, halves[] = {{157, 260}, {157, 286}},
                  short_halves[] = {{35, 150}, {75, 260}};
  Times const& t = (f32 ? floats : depth <= 32 ? short_halves : halves)[dgrad];
  double const full = (each * 0.79 + double(blocks) / 132 * 0.21) * double(share) * lines * (ended ? t.ended : t.whole);
  double const resident = TM * TN <= 64 * 64 ? 3 : 2;
  double const alone = double(share) * ((f32 ? 50 : 80) + 50 * lines) * (each > resident ? each / resident : 1);
  double const bytes = (double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P() * p.Q())) +
                        double(p.K) * double(p.C_per_group()) * double(taps)) *
                       size_of(p.dtype);
  double ns = (f32 && dgrad ? 7300 : 6800) + (full > alone ? full + alone * 0.1 : alone + full * 0.1) +
              bytes * (taps == 1 ? 0.31e-3 : 0.26e-3);
  if (split > 1) ns += 800 + (!f32 && TN == 128 ? 3000 : 0);
  // As measured: long sums, and more than a round or two.
  if (taps > 49) ns *= 1.4;
  if (each > 2 && steps > 4) ns *= each > 4 ? 1.25 : 1.1;
  if (!f32 && taps == 1 && each > 8) ns *= 1.15;
  ns *= f32 && dgrad ? 0.9 : 0.88;
  return ns > 16000 ? ns * 1.2 : ns;  // as measured beside other rows (637 layers)
}

}  // namespace conv2d_ext
