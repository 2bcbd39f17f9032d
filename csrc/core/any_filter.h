// Depthwise rows for any filter, as measured: their headers' estimates, which the launchers choose kernels, tiles and
// splits by, left out much of what the kernels do. Apart from what kernels include, so that a new constant compiles
// none.
#pragma once

#include "lines.h"
#include "staged.h"

namespace conv2d_ext {

// What fprop and dgrad take, in instructions and ns: fitted.
struct LineRates {
  double load, load_channel, product, tap, row, skipped_row;  // instructions
  double filter;                                              // instructions of a thread for a tap and channel's copy
  double copy_ns, row_ns, load_ns;                            // waits: of a block's copies, of a row of taps
  double together;                                            // blocks of an SM whose waits hide each other
  double begin_ns, issue, chain;
};

constexpr Estimate gather_lines_estimate(Op op, Problem const& p, Device const& d) {
  bool const backward = op == Op::dgrad;
  constexpr LineRates forth{2.35, 3.32, 0.07, 8.1, 1.6, 1.3, 3.1, 350, 270, 16.2, 2.95, 6900, 1.15, 1.59};
  constexpr LineRates back{2.8, 0.85, 0.42, 3.7, 3.8, 16.2, 18.8, 122, 124, 8.8, 4.0, 6000, 1.58, 2.61};
  LineRates const& e = backward ? back : forth;
  LineTile const t = line_tile(op, p, d);
  double const sms = double(d.sm_count), V = t.vector, f64 = p.dtype == DType::f64 ? 1.2 : 1.0;
  double const elements =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  double const memory_ns = elements * size_of(p.dtype) / (3500 * sms / 132);
  // Of dgrad's phases some have no taps.
  int64_t const step_h = backward ? p.stride_h / gcd64(p.stride_h, p.dilation_h) : 1,
                step_w = backward ? p.stride_w / gcd64(p.stride_w, p.dilation_w) : 1;
  double const taps_h = double(ceil_div(p.R, step_h)), taps_w = double(ceil_div(p.S, step_w));
  double const share =
      backward ? double(p.R) / (taps_h * double(p.stride_h)) * double(min64(p.S, step_w)) / double(p.stride_w) : 1;
  double met = rows_met(p) * (backward ? double(p.P() * p.stride_h) / double(p.H) : 1);
  if (met > 1) met = 1;
  double const multiplier = backward ? double(p.K_per_group()) : 1;
  auto loads = [&](double taps) { return t.ratio == 0 ? kLineOutputs * taps : (kLineOutputs - 1) * t.ratio + taps; };
  double const all_loads = loads(t.ratio == 0 ? taps_w : double(ceil_div(int64_t(taps_w), kLineTaps) * kLineTaps));
  double const products = kLineOutputs * V;
  double const tap_row = all_loads * (e.load + V * e.load_channel) + taps_w * (products * e.product + e.tap) + e.row;
  double const rows = multiplier * taps_h * (met * tap_row + e.skipped_row) * f64, stores = 2 * products + 40;
  // The filter is copied to shared memory once, or for each row of outputs.
  bool const once = t.filter_rows >= int64_t(taps_h) && t.filter_columns >= int64_t(taps_w) && multiplier == 1;
  double const copies = once ? 1 : multiplier * t.rows, taps = taps_h * taps_w;
  double const filter = taps * V / t.groups * e.filter * copies + 100;
  double const copies_ns = double(ceil_div(int64_t(taps) * t.lanes * t.vector, kLineThreads)) * copies * e.copy_ns;
  double const phases = backward ? double(phases_of(p.H, p.stride_h)) * double(phases_of(p.W, p.stride_w)) : 1;
  // SMs that have a block more than others are waited for.
  double const blocks = double(t.blocks(p.N)) * phases, working = blocks * share;
  double const full = double(ceil_div(int64_t(working + 0.999), d.sm_count)) * sms / working;
  double const issue_ns = blocks * (kLineThreads / 32) * ((rows * share + stores) * t.rows + filter * share) * full /
                          (4 * sms * 1.755 * 0.5);
  // A block's instructions, or loads, follow each other.
  double const instructions_ns = ((rows + stores) * t.rows + filter) * 2,
               waits_ns = multiplier * met * taps_h * t.rows * (e.row_ns + e.load_ns * loads(taps_w));
  double const here = double(ceil_div(int64_t(blocks), d.sm_count)), together = here < e.together ? here : e.together;
  double const rounds = working / sms / together;
  double const chain_ns =
      ((instructions_ns > waits_ns ? instructions_ns : waits_ns) + copies_ns) * (rounds < 1 ? 1.0 : rounds);
  // A launch has so many phases either way.
  double const launches = backward ? double(ceil_div(phases_of(p.H, p.stride_h), kLinePhases)) *
                                         double(ceil_div(phases_of(p.W, p.stride_w), kLinePhases))
                                   : 1;
  return {e.begin_ns + e.issue * overlapped(memory_ns, issue_ns) + e.chain * chain_ns + (launches - 1) * 2700, 1};
}

// wgrad with this split: fitted to times with the splits that line_split() takes.
constexpr double line_sums_ns(LineTile const& t, Problem const& p, Device const& d, int split) {
  double const sms = double(d.sm_count), V = t.vector, f64 = p.dtype == DType::f64 ? 2 : 1;
  double const elements =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  double const memory_ns = elements * size_of(p.dtype) / (3500 * sms / 132);
  double const loads = t.ratio == 0 ? kLineOutputs * kLineTaps : (kLineOutputs - 1) * t.ratio + kLineTaps;
  double const group = loads * (14 + 4.2 * V) + kLineOutputs * 1.6 + kLineOutputs * kLineTaps * V * 2.4 * f64;
  double const columns = double(t.each) * rows_met(p);  // of a run, where its rows meet the image
  int64_t const runs = p.N * p.P() * t.segments, members = int64_t(split) * t.members;
  double const mine = double(ceil_div(runs, members)), blocks = double(t.slices * t.tap_slices) * split;
  double const work = mine * (group * columns * (size_of(p.dtype) == 2 ? 1.14 : 1.0) + 105);
  double const here = double(ceil_div(int64_t(blocks), d.sm_count)), resident = here < 4 ? here : 4;
  double const rounds = blocks / sms / resident < 1 ? 1 : blocks / sms / resident;
  double const issue_ns = here * (kLineThreads / 32) * work / (4 * 1.755 * 0.5) * 0.24;
  double const chain_ns = rounds * (work * 1.42 + mine * columns * 5);
  double const sums = double(p.K) * double(p.R) * double(p.S) * 4 * f64;
  return 8600 + 1.78 * overlapped(memory_ns, issue_ns) + chain_ns + (split > 1 ? 4100 + sums * split * 3.4 / 2500 : 0);
}

// Filters of any size straight from L1 (few.h), where they are not run by all their taps: columns in fours, of which
// the last may be fewer. A column of taps takes up to 2.3 times as long as few_tile() takes it to, by which the
// launcher chooses the kernel.
constexpr double few_any_ns(FewTile const& t, Op op, Problem const& p) {
  bool const backward = op == Op::dgrad, wide = p.dtype == DType::f64;
  int const size = size_of(p.dtype);
  double const bytes =
      double(p.N) * size * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  double const filters = backward ? double(p.K_per_group()) : 1, rows = double(p.R) * filters;
  double const fours = double(p.R * ceil_div(p.S, 4)) * filters, taps = double(p.R * p.S) * filters;
  double const row = backward ? 13 : 33, column = backward ? 5.5 : 5.8, left_out = backward ? 2.2 : 0.4;
  double const instructions = 130 + kFewRows * (taps * column + 4 * fours * left_out) * (wide ? 1.2 : 1.0) + rows * row;
  int64_t const width = min64(32, backward ? p.W : p.Q());
  double const reach = 32.0 * double(backward ? 1 : p.stride_w) * size / 128 + 0.4 * 32 / double(width);
  double const accesses = (kFewRows * taps + kFewRows) * (reach < 1 ? 1 : reach > 32 ? 32 : reach);
  double const planes = double(p.N) * double(backward ? p.C : p.K);
  double const warps = planes / t.planes * double(t.tiles) * (kFewThreads / 32);
  double const work_ns = warps * (instructions / 2.6 + 0.06 * accesses) / (1.755 * 132);
  double const waits = fours * (backward ? 255 : 407) * (size == 2 ? 1.0 : 0.9);
  return (backward ? 5770 : 5500) + waits + (backward ? 1.06 : 1.14) * overlapped(bytes / kFewBytesNs, work_ns);
}

// Planes in shared memory (staged.h): of a round of blocks, a warp's runs of outputs follow each other, and so do a
// run's taps; of an SM, instructions of all blocks. Fitted to 785 times. What staged_estimate() says, by which the
// launcher chooses the kernel, leaves out the former.
struct StagedRates {
  double before, round, run, tap_of_run, tap, warp_load, load, item;
  double class_tap, class_load, filter_tap;  // more, with a stride's phases, and of several filters
};
constexpr double staged_any_ns(StagedTile const& t, Op op, Problem const& p, Device const& d) {
  constexpr StagedRates forth{6240, 1020, 209, 11.6, 4.39, 6.62, 0.114, 0.168, 0, 0, 0};
  constexpr StagedRates back{6080, 1950, 873, 15.8, 0, 0, 0.35, 0.159, 6.53, 0.206, 6.38};
  bool const backward = op == Op::dgrad, phases = t.classes > 1, several = backward && p.K_per_group() > 1;
  StagedRates const& e = backward ? back : forth;
  int const warps = t.threads(op) / 32;
  double const taps = double(p.R * p.S) * (backward ? double(p.K_per_group()) : 1);
  int64_t const blocks = t.bands * t.groups * (backward ? p.C : p.K);
  double const rounds = double(ceil_div(blocks, int64_t(d.sm_count * t.together))),
               of_sm = double(ceil_div(blocks, d.sm_count)), runs = double(ceil_div(int64_t(t.items), warps));
  double const run_ns = e.run + taps / double(t.classes) * (e.tap_of_run + (phases ? e.class_tap : 0)) +
                        (several ? taps * e.filter_tap : 0);
  return e.before + rounds * (e.round + runs * run_ns + taps * e.tap + t.loads / warps * e.warp_load) +
         of_sm * (t.loads * (e.load + (phases ? e.class_load : 0)) + t.items * t.item * e.item);
}

constexpr Estimate any_filter_estimate(Op op, Problem const& p, Device const& d) {
  AnyFilter const a = any_filter(op, p, d);
  Estimate e = a.estimate;
  // As measured: columns of few taps in a thread's eight (19x14x148x148 3x1 48.1 us, estimated at 35.5).
  if (op == Op::wgrad && !a.patches.used && a.few.used && a.few.tall && size_of(p.dtype) == 2 && p.R <= 4 &&
      e.ns > 22000)
    e.ns *= 1.3;
  if (op == Op::wgrad || a.patches.used) return e;
  if (a.few.used && a.few.taps == 0 && !a.few.spread) e.ns = few_any_ns(a.few, op, p);
  if (a.staged.used && !a.few.used && p.dtype != DType::f64) e.ns = staged_any_ns(a.staged, op, p, d);
  // dgrad with strides: a tap waits for 100 ns of what few_tile(), by which the launcher chooses the kernel, has.
  if (a.few.used && a.few.spread)
    e.ns -= 500 * double(ceil_div(p.R, p.stride_h) * ceil_div(p.S, p.stride_w) - 1) * double(p.K_per_group());
  return e;
}

constexpr Estimate any_line_estimate(Op op, Problem const& p, Device const& d) {
  bool const empty =
      p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0 || p.R == 0 || p.S == 0 || p.P() <= 0 || p.Q() <= 0;
  if (empty) return {0, 1};
  if (op != Op::wgrad) return gather_lines_estimate(op, p, d);
  int const split = line_split(p, d);
  double const ns = line_sums_ns(line_tile(op, p, d), p, d, split);
  // One tap in float32: large layers are bound by memory, which the fit did not meet (64x128x56x56 88 us).
  bool const one = p.R * p.S == 1 && p.K == p.C && p.dtype == DType::f32;
  return {one && ns > 24000 ? 7000 + ns * 0.62 : ns, split};
}

}  // namespace conv2d_ext
