// grouped.cuh and grouped_wgrad.cuh: how groups share a product, what their rows take and cost.
#pragma once

#include <cstdint>

#include "row.h"

namespace conv2d_ext {

// The least number of groups whose channels and filters are multiples of 8 each.
constexpr int64_t groups_per_unit(Problem const& p) {
  return max64(8 / gcd64(8, p.C_per_group()), 8 / gcd64(8, p.K_per_group()));
}

// How many blocks of 8 outputs a warp computes from the same fragments of the inputs: those of a unit, up to four, or
// two of f32, whose fragments take more registers.
constexpr int grouped_shared_blocks(int64_t blocks, DType t) {
  int64_t const most = t == DType::f32 ? 2 : 4;
  return int(blocks <= most ? blocks : most == 4 && (blocks <= 6 || blocks == 9) ? 3 : most);
}

// wgrad of grouped.cuh. A half is a tap and 16 bytes of channels; a warp sums so many of them, of up to four blocks of
// 8 filters, over a share of the pixels: as many as its registers hold.
constexpr int grouped_halves(int together, DType t) { return t == DType::f32 ? 16 : together == 4 ? 8 : 10; }
struct GroupedSums {
  int64_t slab, together, n_groups, chunks, items, shares;
};
constexpr GroupedSums grouped_sums(Problem const& p) {
  int64_t const wide = size_of(p.dtype) / 2, per_unit = groups_per_unit(p);
  int64_t const C = per_unit * p.C_per_group() / 8 * wide, K = per_unit * p.K_per_group() / 8;
  int64_t const slab = min64(ceil_div(p.groups, per_unit), max64(1, 8 / max64(C, K * wide)));
  int const together = p.dtype == DType::f32 ? 1 : grouped_shared_blocks(K, p.dtype);
  int64_t const n_groups = ceil_div(K, together);
  int64_t const chunks = ceil_div(C * p.R * p.S, grouped_halves(together, p.dtype)), items = slab * n_groups * chunks;
  return {slab, together, n_groups, chunks, items, max64(1, 8 / items)};
}

// One axis of the image: output i of phase f is at i * out_step + f; its taps meet the inputs i * step + offset.
struct GroupedAxis {
  int step, out_step, phases;
  int low;        // the least offset of all phases and taps
  int span;       // from the least to the greatest, and one
  int positions;  // outputs of the largest phase
};

constexpr GroupedAxis grouped_axis(Op op, int64_t out_extent, int64_t taps, int64_t stride, int64_t pad,
                                   int64_t dilation) {
  GroupedAxis a{};
  bool const backward = op == Op::dgrad;
  a.step = backward ? 1 : int(stride), a.out_step = backward ? int(stride) : 1;
  a.phases = backward ? int(min64(stride, out_extent)) : 1;
  a.positions = int(ceil_div(out_extent, a.out_step));
  int64_t low = INT32_MAX, high = INT32_MIN;
  for (int phase = 0; phase < a.phases; ++phase)
    for (int64_t r = 0; r < taps; ++r) {
      int64_t const at = backward ? phase + pad - r * dilation : r * dilation - pad;
      if (backward && at % stride != 0) continue;
      int64_t const offset = backward ? at / stride : at;
      low = min64(low, offset), high = max64(high, offset);
    }
  if (low > high) low = high = 0;
  a.low = int(low), a.span = int(high - low + 1);
  return a;
}
constexpr GroupedAxis grouped_axis_h(Op op, Problem const& p) {
  return grouped_axis(op, op == Op::dgrad ? p.H : p.P(), p.R, p.stride_h, p.pad_top, p.dilation_h);
}
constexpr GroupedAxis grouped_axis_w(Op op, Problem const& p) {
  return grouped_axis(op, op == Op::dgrad ? p.W : p.Q(), p.S, p.stride_w, p.pad_left, p.dilation_w);
}

// 3x3 taps one input apart.
constexpr bool grouped_is_3x3(Problem const& p) {
  return p.R == 3 && p.S == 3 && p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1;
}

// The same with rows of outputs one or two inputs apart, as grouped_lines.cuh multiplies them: how many; 0: neither.
constexpr int64_t grouped_step_3x3(Op op, Problem const& p) {
  if (grouped_is_3x3(p)) return 1;
  bool const takes = op == Op::fprop && p.R == 3 && p.S == 3 && p.dilation_h == 1 && p.dilation_w == 1 &&
                     p.stride_h <= 2 && p.stride_w <= 2;
  return takes ? p.stride_h : 0;
}

// The inputs that a unit's results from `from` to before `to` meet, in vectors of so many channels: `from` and `to`
// within the unit, whose other inputs are zeros to all of them.
struct GroupedMet {
  int64_t first, count;
};
constexpr GroupedMet grouped_met(int64_t from, int64_t to, int64_t out_per_group, int64_t in_per_group,
                                 int64_t vector) {
  int64_t const first = from / out_per_group * in_per_group / vector;
  return {first, ceil_div(((to - 1) / out_per_group + 1) * in_per_group, vector) - first};
}

// fprop and dgrad of grouped_lines.cuh: a block's channels, tile and shared memory.
struct GroupedLines {
  int64_t slab;      // units of a block of threads, whose channels fit a line of 128 bytes on either side
  int64_t at_once;   // blocks of 8 outputs that a warp computes from the same inputs
  int64_t n_groups;  // runs of so many, of a unit
  int64_t squares_h, squares_w, images;  // of 8 x 8 outputs, of a tile
  int64_t shares;                        // warps that share the squares
  int64_t of_phases;                     // warps that share a square's phases
  int64_t step_h;                        // rows of shared memory between neighbouring outputs
  int64_t rows, columns;                 // of an image's inputs, of a plane
  int64_t planes, plane_bytes;           // with a stride, columns that leave the same remainder lie together
  double met;                            // the share of its unit's inputs that a run meets, 3x3
  int64_t halves, stages, stage_bytes, out_bytes, weight_bytes, shared, blocks_of_sm;
  bool planar;                   // see grouped_planar
  int64_t raw_pitch, raw_bytes;  // of a channel's pixels, and of all, as they are copied
  double cycles;
};

// NCHW without gaps, whose channels are turned into lines in shared memory: in place.
constexpr bool grouped_planar(Problem const& p) {
  auto planar = [](Strides const& s, int align, int64_t N, int64_t C, int64_t H, int64_t W) {
    auto is = [](int64_t size, int64_t stride, int64_t wanted) { return size == 1 || stride == wanted; };
    return align >= 16 && C % 8 == 0 && is(N, s.n, C * H * W) && is(C, s.c, H * W) && is(H, s.h, W) && is(W, s.w, 1);
  };
  return p.H * p.W > 1 && planar(p.x, p.x_align, p.N, p.C, p.H, p.W) && planar(p.y, p.y_align, p.N, p.K, p.P(), p.Q());
}

// Bytes of a channel of so many rows of a tensor, as they are copied: whole images lie together, else a channel's rows
// begin anywhere within 16 bytes.
constexpr int64_t planar_pitch(bool whole, int64_t rows, int64_t H, int64_t W, DType t) {
  return whole ? H * W * size_of(t) : ceil_div(min64(rows, H) * W * size_of(t) + 16 - size_of(t), 16) * 16;
}

// Warps of an SM, by their registers.
constexpr int grouped_line_warps(DType t, int64_t at_once, int64_t step) {
  return t == DType::f32 || at_once == 3 || (at_once == 2 && step == 2) ? 16 : at_once == 2 ? 20 : 24;
}

// The same of a unit of lines' fprop and dgrad. In float32, groups of more than 8 channels and of whole vectors of 16
// bytes are units by themselves in channels_last: half of the last block of results does not exist.
constexpr int64_t lines_per_unit(Op op, Problem const& p) {
  bool const vectors = p.C_per_group() % 4 == 0 && p.K_per_group() % 4 == 0;
  bool const alone = op != Op::wgrad && p.dtype == DType::f32 && vectors && !grouped_planar(p) && p.C_per_group() > 8 &&
                     p.K_per_group() > 8;
  return alone ? 1 : groups_per_unit(p);
}

// What a run of a unit's results meets of its inputs.
constexpr GroupedMet lines_met(Op op, Problem const& p, GroupedLines const& t, int64_t run) {
  int64_t const C = p.C_per_group(), K = p.K_per_group(), out = op == Op::dgrad ? C : K, in = op == Op::dgrad ? K : C;
  int64_t const begin = run * t.at_once * 8, end = min64(begin + t.at_once * 8, lines_per_unit(op, p) * out);
  return grouped_met(begin, end, out, in, 16 / size_of(p.dtype));
}

constexpr int kLinesTables = 256;  // bytes of what each row keeps beside
constexpr int64_t lines_shared(int64_t blocks) { return (228 / blocks - 1) * 1024; }  // bytes of each of so many an SM
constexpr int64_t kLinesShared = lines_shared(1);

// Planar tiles that do not fit with so many units are tried with half of them, but for a stride: packing is faster
// there. any: the first that fits will do.
constexpr GroupedLines grouped_lines(Op op, Problem const& p, Device const& d, bool any = false, int64_t most_units = 8,
                                     int64_t most_at_once = 3) {
  GroupedLines best{};
  bool const backward = op == Op::dgrad;
  int64_t const per_unit = lines_per_unit(op, p), units = ceil_div(p.groups, per_unit);
  int64_t const in_channels = per_unit * (backward ? p.K_per_group() : p.C_per_group()),
                out_channels = per_unit * (backward ? p.C_per_group() : p.K_per_group());
  int64_t const in = in_channels * size_of(p.dtype) / 16, out_slots = out_channels * size_of(p.dtype) / 16;
  int64_t const out = ceil_div(out_channels, 8);  // blocks of results
  if (in > 8 || out_slots > 8) return best;
  GroupedAxis const h = grouped_axis_h(op, p), w = grouped_axis_w(op, p);
  int64_t const step = grouped_step_3x3(op, p);
  bool const is_3x3 = step > 0, single = p.R * p.S == 1;
  int64_t const in_h = backward ? p.P() : p.H, in_w = backward ? p.Q() : p.W;
  GroupedLines t{};
  t.planar = grouped_planar(p);
  t.slab = min64(min64(units, most_units), 8 / max64(in, out_slots));
  t.at_once = p.dtype != DType::f32                       ? (out == 3 ? 3 : min64(out, 2))
              : p.allow_tf32 && !(is_3x3 && out % 2 == 1) ? min64(out, 2)
                                                          : 1;
  bool const once = most_at_once < t.at_once;
  t.at_once = min64(t.at_once, most_at_once);
  t.n_groups = ceil_div(out, t.at_once);
  int64_t most_met = 0, all_met = 0;  // vectors of inputs, of a run and of all
  for (int64_t i = 0; i < t.n_groups; ++i) {
    int64_t const count = is_3x3 ? lines_met(op, p, t, i).count : in;
    most_met = max64(most_met, count), all_met += count;
  }
  t.met = double(all_met) / double(in * t.n_groups);
  t.halves = is_3x3 ? most_met / 2 * 18 + most_met % 2 * 12 : in * p.R * p.S + h.phases * w.phases;
  int64_t const parts = p.dtype == DType::f32 && !p.allow_tf32 ? 2 : 1, runs = t.slab * t.n_groups;
  t.weight_bytes = runs * t.halves * t.at_once * 128 * parts;
  int64_t const fixed = t.weight_bytes + t.halves * 16 + runs * t.at_once * 32 + kLinesTables;
  int64_t const slabs = ceil_div(units, t.slab);
  // One tap with a stride: the copies leave out what lies between.
  t.step_h = single ? 1 : h.step, t.planes = single ? 1 : w.step;
  // Of a square and a run: halves, and cycles of an SM for each.
  double const products = double(in * p.R * p.S) * t.met, product = p.dtype != DType::f32 ? 5.4
                                                                    : p.allow_tf32        ? 5.8
                                                                                          : 15.5;
  double const loads = (step == 1 ? 4 : step == 2 ? 6 : 8) + double(t.at_once);
  // None that begin behind the last output.
  int64_t const most_h = min64(8, ceil_div(h.positions, 8)), most_w = min64(8, ceil_div(w.positions, 8));
  for (t.squares_h = 1; t.squares_h <= most_h; ++t.squares_h)
    for (t.squares_w = 1; t.squares_w <= most_w && t.squares_h * t.squares_w <= 8; ++t.squares_w) {
      bool const fills = t.squares_h * 8 >= h.positions && t.squares_w * 8 >= w.positions;
      if (t.planar && t.squares_w * 8 < w.positions) continue;  // whole rows are copied
      for (t.images = 1; t.squares_h * t.squares_w * t.images <= 8; ++t.images) {
        if (t.images > 1 && (!fills || t.images > p.N)) break;
        int64_t const squares = t.squares_h * t.squares_w * t.images;
        t.rows = (t.squares_h * 8 - 1) * t.step_h + h.span;
        t.columns = t.squares_w * 8 - 1 + ceil_div(w.span, t.planes);
        if (t.rows * h.step > 256 * t.step_h || t.columns * w.step > 256) continue;
        int64_t const outs = t.images * t.squares_h * t.squares_w * 64 * h.out_step * w.out_step;
        if (t.squares_h * 8 * h.out_step > 256 || t.squares_w * 8 * w.out_step > 256) continue;
        t.plane_bytes = ceil_div(t.images * t.rows * t.columns, 8) * 1024;
        t.stage_bytes = t.planes * t.plane_bytes, t.out_bytes = outs * 128;
        if (t.planar) {
          t.raw_pitch = planar_pitch(fills, (t.rows - 1) * h.step / t.step_h + 1, in_h, in_w, p.dtype);
          t.raw_bytes = ceil_div(t.images * t.slab * in * 16 / size_of(p.dtype) * t.raw_pitch, 128) * 128;
        }
        int64_t const besides = fixed + (t.planar ? t.out_bytes + t.raw_bytes : 2 * t.out_bytes);
        if (besides + t.stage_bytes > kLinesShared) continue;
        t.blocks_of_sm = besides + (t.planar ? 1 : 2) * t.stage_bytes <= lines_shared(2) ? 2 : 1;
        t.stages = t.planar ? 1 : min64(4, (lines_shared(t.blocks_of_sm) - besides) / t.stage_bytes);
        t.shares = max64(1, grouped_line_warps(p.dtype, t.at_once, step) / t.blocks_of_sm / runs);
        // A square's phases are shared too, evenly.
        int64_t const phases = h.phases * w.phases;
        t.of_phases = min64(phases, max64(1, t.shares / squares));
        while (phases % t.of_phases != 0) --t.of_phases;
        if (!t.planar) t.shares = min64(t.shares, squares * t.of_phases);  // the others turn planar tiles
        t.shared = besides + t.stages * t.stage_bytes;
        if (any) return t;
        int64_t const blocks = max64(1, d.sm_count * t.blocks_of_sm / slabs);
        double const tiles = double(ceil_div(h.positions, t.squares_h * 8)) *
                             double(ceil_div(w.positions, t.squares_w * 8)) * double(ceil_div(p.N, t.images));
        // Cycles of an SM: lines at 18 bytes a cycle, a square's loads from shared memory and products, and what a
        // warp takes from one end to the other.
        double const lines = (double(t.images * t.rows * t.columns * t.planes) + double(outs)) * 128 / 18;
        double const multiply = product * double(t.at_once), square = products * (multiply > loads ? multiply : loads) *
                                                                          (step == 1 || single ? 1
                                                                           : step == 2         ? 1.3
                                                                                               : 1.65) +
                                                                      90;
        double const work = double(squares * runs) * square;
        // Of a square, or of some of its phases, one of which has the most taps.
        double const most = double(in * ceil_div(p.R, h.phases) * ceil_div(p.S, w.phases)),
                     part = products / double(t.of_phases), mine = t.of_phases > 1 && most > part ? most : part;
        double const alone = double(ceil_div(squares * t.of_phases, t.shares)) * (300 + (once ? 26 : 35) * mine) + 700;
        double round = double(t.blocks_of_sm) * ((lines > work ? lines : work) + 300);
        if (t.planar) {
          // 16 bytes of a pixel turned either way, in cycles.
          double const turn = double(t.images * t.rows * t.columns * t.planes * t.slab * in) * 0.5 +
                              double(outs * t.slab * out_slots) * 0.6 + 800;
          double const busy = turn + (work > alone ? work : alone),
                       bytes = double(t.raw_bytes + outs * t.slab * out_slots * 16) / 18;
          round = double(t.blocks_of_sm) * (t.blocks_of_sm == 1 ? 1 : 0.85) * (turn + work);
          round = round > busy ? round : busy;
          round = (round > bytes * double(t.blocks_of_sm) ? round : bytes * double(t.blocks_of_sm)) + 600;
        } else if (t.stages == 1) {
          round += alone + 1500;
        }
        // As measured: where there is little work, the barriers of one block hide behind the other's.
        if (!t.planar && t.blocks_of_sm == 2 && t.images == 1 && squares > 1 && step == 1 && in <= 2) round *= 0.84;
        double const fill = double(t.weight_bytes) / 36 * double(t.blocks_of_sm) +
                            double(ceil_div(t.weight_bytes, 128 * 9 * runs * t.shares)) * 800;
        t.cycles = (round > alone ? round : alone) * double(int64_t((tiles + double(blocks) - 1) / double(blocks))) +
                   fill + double(t.blocks_of_sm) * 2000;
        if (best.slab == 0 || t.cycles < best.cycles) best = t;
      }
    }
  if (best.slab == 0)
    return !t.planar || t.planes > 1 || t.slab == 1 ? best : grouped_lines(op, p, d, any, t.slab / 2, most_at_once);
  // Few warps: with one block of outputs each there are more of them.
  int64_t const warps = best.slab * best.n_groups * best.shares * best.blocks_of_sm;
  if (best.at_once > 1 && !best.planar && warps <= 8) {
    GroupedLines const one = grouped_lines(op, p, d, any, most_units, 1);
    if (one.slab > 0 && one.cycles < best.cycles) best = one;
  }
  int64_t const tiles = ceil_div(h.positions, best.squares_h * 8) * ceil_div(w.positions, best.squares_w * 8) *
                        ceil_div(p.N, best.images);
  if (best.planar || best.slab == 1 || tiles * slabs * 2 > d.sm_count * best.blocks_of_sm) return best;
  // Few tiles: with half of the units more SMs have fewer filters to put in order.
  GroupedLines const half = grouped_lines(op, p, d, any, best.slab / 2, most_at_once);
  return half.slab > 0 && half.cycles < best.cycles ? half : best;
}

// wgrad of grouped_lines_wgrad.cuh. A job is one block of 8 filters and up to nine pairs of halves, whose sums a warp
// keeps; a half is a tap and 8 channels. Whole jobs (grouped_lines_whole.cuh) are all taps of 8 channels, five tiles
// for each of `together` blocks of filters.
struct GroupedSumLines {
  int64_t slab;            // units of a block of threads
  int64_t together, sets;  // blocks of filters of a whole job, else 0; such jobs of a unit's block of channels
  int64_t jobs, chunks;    // of a slab; of one of its blocks or sets of filters, not 3x3
  int64_t tiles;           // pairs of halves of a job, at most
  int64_t passes;          // how often the pixels are read, for so many parts of the jobs
  int64_t shares, warps;   // of a tile's squares; a warp for each job of a pass and share
  int64_t squares_h, squares_w, images;
  int64_t step_h, rows, columns, planes, plane_bytes;
  int64_t stages, x_bytes, stage_bytes, shared;
  bool planar;  // as in GroupedLines
  int64_t x_pitch, y_pitch, raw_x_bytes, raw_bytes;
  double tile_cycles, all_tiles;
};

constexpr int64_t kSumTables = 320;  // bytes
// Warps of a block: strict f32 takes more registers, and so do whole jobs of three blocks of filters. Strict, 3x3,
// nine (`kMoreJobs`) have enough of them, and multiply 5 % slower than eight: for three jobs, which else leave two
// warps idle.
inline constexpr int kMoreJobs = 9;
constexpr int64_t grouped_most_jobs(bool strict, int64_t together) { return strict ? 8 : together == 3 ? 12 : 16; }

// Blocks of filters of a whole job; 0: there are none. With one row of inputs from output to output, jobs of two blocks
// of channels have a tenth fewer products.
constexpr int64_t grouped_whole_jobs(Problem const& p, int64_t in, int64_t out) {
  bool const takes = size_of(p.dtype) == 2 && p.R == 3 && p.S == 3 && p.dilation_h == 1 && p.dilation_w == 1;
  if (!takes || p.stride_h > 2 || p.stride_w > 2) return 0;
  if (p.stride_h == 1) return p.stride_w == 1 && in == 1 ? 1 : 0;
  return out <= 3 ? out : out % 3 == 0 || out == 5 ? 3 : 2;
}

// Jobs of a unit whose filters are 3x3, one input between outputs, and whole ones are not taken: the pairs of blocks of
// 8 channels that a block of filters meets, from its first vector of 16 bytes on.
struct GroupedSumJobs {
  static constexpr int kMost = 32;
  struct Job {
    uint8_t filters, pair, first, blocks;
  } job[kMost] = {};
  int count = 0;
};
constexpr GroupedSumJobs grouped_sum_jobs(Problem const& p) {
  GroupedSumJobs all;
  int64_t const per_unit = groups_per_unit(p), vector = 16 / size_of(p.dtype), C = p.C_per_group(), K = p.K_per_group();
  for (int64_t i = 0; i < per_unit * K / 8; ++i) {
    GroupedMet const met = grouped_met(i * 8, i * 8 + 8, K, C, vector);
    int64_t const blocks = ceil_div(met.count * vector, 8),
                  first = min64(met.first, (per_unit * C - blocks * 8) / vector);
    for (int64_t pair = 0; pair * 2 < blocks; ++pair)
      all.job[all.count++] = {uint8_t(i), uint8_t(pair), uint8_t(first), uint8_t(blocks)};
  }
  return all;
}

constexpr GroupedSumLines grouped_sum_lines(Problem const& p, Device const& d, bool any = false,
                                            int64_t most_units = 8) {
  GroupedSumLines best{};
  int64_t const per_unit = groups_per_unit(p), units = ceil_div(p.groups, per_unit);
  int64_t const in = per_unit * p.C_per_group() / 8, out = per_unit * p.K_per_group() / 8;  // blocks of 8 channels
  int64_t const of_line = 16 / size_of(p.dtype);
  if (in > of_line || out > of_line) return best;
  GroupedAxis const h = grouped_axis_h(Op::wgrad, p), w = grouped_axis_w(Op::wgrad, p);
  bool const is_3x3 = grouped_is_3x3(p), one_tap = p.R * p.S == 1;
  GroupedSumLines t{};
  t.planar = grouped_planar(p);
  t.slab = min64(min64(units, most_units), of_line / max64(in, out));
  int64_t const halves = in * p.R * p.S;
  t.together = grouped_whole_jobs(p, in, out), t.sets = t.together > 0 ? ceil_div(out, t.together) : out;
  t.chunks = t.together > 0 ? in : ceil_div(halves, 18);
  t.tiles = t.together > 0 ? 5 * t.together : is_3x3 ? (in == 1 ? 5 : 9) : min64(9, ceil_div(halves, 2));
  t.jobs = t.slab * (is_3x3 && t.together == 0 ? grouped_sum_jobs(p).count : t.sets * t.chunks);
  bool const strict = p.dtype == DType::f32 && !p.allow_tf32;
  int64_t const most_jobs = strict && is_3x3 && t.jobs == 3 ? kMoreJobs : grouped_most_jobs(strict, t.together);
  t.passes = ceil_div(t.jobs, most_jobs);
  int64_t const at_once = ceil_div(t.jobs, t.passes), slabs = ceil_div(units, t.slab);
  t.step_h = one_tap ? 1 : h.step, t.planes = one_tap ? 1 : w.step;
  // Cycles of an SM, of a square and a job.
  double const f32 = p.dtype != DType::f32 ? 1 : p.allow_tf32 ? 3.1 : 5.5;
  double const f32_alone = p.dtype != DType::f32 ? 1 : p.allow_tf32 ? 7.5 : 9;
  double const square =
      t.together > 0 ? 30 + 38 * double(t.together)
                     : f32 * (is_3x3 ? (in == 1 ? 95 : 134) : 8 + double(t.tiles) * (p.dtype == DType::f32 ? 23 : 20));
  double best_cost = 0;
  // None that begin behind the last output.
  int64_t const most_h = min64(8, ceil_div(h.positions, 8)), most_w = min64(8, ceil_div(w.positions, 8));
  for (t.squares_h = 1; t.squares_h <= most_h; ++t.squares_h)
    for (t.squares_w = 1; t.squares_w <= most_w && t.squares_h * t.squares_w <= 8; ++t.squares_w) {
      bool const fills = t.squares_h * 8 >= h.positions && t.squares_w * 8 >= w.positions;
      if (t.planar && t.squares_w * 8 < w.positions) continue;  // whole rows are copied
      for (t.images = 1; t.squares_h * t.squares_w * t.images <= 8; ++t.images) {
        if (t.images > 1 && (!fills || t.images > p.N)) break;
        int64_t const squares = t.squares_h * t.squares_w * t.images;
        t.shares = max64(1, most_jobs / at_once);
        if (!t.planar && p.dtype == DType::f32) t.shares = min64(t.shares, squares);
        t.warps = at_once * t.shares;
        t.rows = (t.squares_h * 8 - 1) * t.step_h + h.span;
        t.columns = t.squares_w * 8 - 1 + ceil_div(w.span, t.planes);
        if (t.rows * h.step > 256 * t.step_h || t.columns * w.step > 256) continue;
        // The last fragments reach a row further.
        t.plane_bytes = ceil_div(t.images * t.rows * t.columns + (is_3x3 ? t.columns : 0), 8) * 1024;
        t.x_bytes = t.planes * t.plane_bytes;
        t.stage_bytes = t.x_bytes + squares * 64 * 128;
        t.stages = min64(4, (kLinesShared - kSumTables) / t.stage_bytes);
        if (t.planar) {
          t.x_pitch = planar_pitch(fills, (t.rows - 1) * h.step / t.step_h + 1, p.H, p.W, p.dtype);
          t.y_pitch = planar_pitch(fills, t.squares_h * 8, p.P(), p.Q(), p.dtype);
          t.raw_x_bytes = ceil_div(t.images * t.slab * in * 8 * t.x_pitch, 128) * 128;
          t.raw_bytes = t.raw_x_bytes + ceil_div(t.images * t.slab * out * 8 * t.y_pitch, 128) * 128;
          t.stages = t.stage_bytes + t.raw_bytes + kSumTables <= kLinesShared ? 1 : 0;
        }
        if (t.stages == 0) continue;
        if (any) return t;
        t.shared = max64(t.stages * t.stage_bytes + t.raw_bytes, t.shares > 1 ? t.warps * max64(9, t.tiles) * 512 : 0) +
                   kSumTables;
        double const tiles = double(ceil_div(h.positions, t.squares_h * 8)) *
                             double(ceil_div(w.positions, t.squares_w * 8)) * double(ceil_div(p.N, t.images));
        // Cycles of a block, an SM's one, for a tile: as in grouped_lines.
        double const lines = double(t.images * t.rows * t.columns * t.planes + squares * 64) * 128 / 20;
        double const work = double(squares * at_once) * square;
        // In 16-bit types, of which several tiles are there at a time, shares go on from tile to tile.
        double const of_share = t.stages > 1 && p.dtype != DType::f32 ? double(squares) / double(t.shares)
                                                                      : double(ceil_div(squares, t.shares));
        double const alone =
            of_share * (t.together > 0 ? 250 + 40 * double(t.tiles) : f32_alone * (150 + 60 * double(t.tiles))) + 300;
        t.tile_cycles = lines > work ? lines : work;
        t.tile_cycles = t.tile_cycles > alone ? t.tile_cycles : alone;
        t.tile_cycles += 300;
        // With one stage nothing is copied meanwhile, with two not all the time.
        t.tile_cycles += t.stages == 1 ? lines + 1500 : t.stages == 2 ? 600 : 0;
        if (t.planar) {
          double const slots = double(t.slab * size_of(p.dtype) / 2);  // 16 bytes of a pixel turned, in cycles
          double const turn = (double(t.images * t.rows * t.columns * t.planes * in) + double(squares * 64 * out)) *
                                  slots * 0.5 +
                              600,
                       bytes = double(t.raw_bytes) / 18, busy = turn + (work > alone ? work : alone);
          t.tile_cycles = (busy > bytes ? busy : bytes) + 600;
        }
        t.all_tiles = tiles;
        double const blocks = double(max64(1, d.sm_count / (slabs * t.passes)));
        double const cost = t.tile_cycles * double(int64_t((tiles + blocks - 1) / blocks));
        if (best.slab == 0 || cost < best_cost) best = t, best_cost = cost;
      }
    }
  return best.slab > 0 || !t.planar || t.planes > 1 || t.slab == 1 ? best : grouped_sum_lines(p, d, any, t.slab / 2);
}

// What the copy engine and a block's shared memory can hold.
constexpr bool grouped_lines_supports(Op op, Problem const& p) {
  return p.P() > 0 && p.Q() > 0 && ceil_div(p.groups, lines_per_unit(op, p)) <= 65535 &&
         map_supports(p.x, p.N, p.H, p.W, p.dtype) && map_supports(p.y, p.N, p.P(), p.Q(), p.dtype) &&
         (op == Op::wgrad ? grouped_sum_lines(p, h200_sxm, true).slab : grouped_lines(op, p, h200_sxm, true).slab) > 0;
}

constexpr bool grouped_supports(Row const& row, Op op, Problem const& p) {
  if (p.groups == 1 || p.C_per_group() < 2 || p.K == 0 || p.H == 0 || p.W == 0 || p.N == 0) return false;
  // Two TF32 halves of an operand leave up to 2^-21 of a product of strict f32, which is more than float32's rounding
  // explains where a result is one product.
  int64_t const terms = op == Op::wgrad ? p.N * p.P() * p.Q() : op == Op::dgrad ? p.K_per_group() * p.R * p.S : 2;
  if (p.dtype == DType::f32 && !p.allow_tf32 && terms == 1) return false;
  int const slot = 16 / size_of(p.dtype);  // channels that are copied at once
  bool const lines = row.variant == Variant::lines;
  if (lines &&
      (p.groups % lines_per_unit(op, p) != 0 || !channel_vectors(p.x, p.x_align, p.C, slot, p.dtype) ||
       !channel_vectors(p.y, p.y_align, p.K, slot, p.dtype)) &&
      !grouped_planar(p))
    return false;
  if (p.R * p.S > 81 || p.stride_h > 4 || p.stride_w > 4 || p.R > 64 || p.S > 64) return false;
  // Coordinates of padded images are int in the kernels, and so is the number of tiles of 8 x 8 pixels.
  constexpr int64_t most = int64_t(1) << 30;
  if (p.H + p.pad_top + p.pad_bottom > most || p.W + p.pad_left + p.pad_right > most) return false;
  int64_t const out_h = op == Op::dgrad ? ceil_div(p.H, p.stride_h) : p.P();
  int64_t const out_w = op == Op::dgrad ? ceil_div(p.W, p.stride_w) : p.Q();
  if (double(p.N) * double(ceil_div(out_h, 8)) * double(ceil_div(out_w, 8)) >= double(most)) return false;
  if (lines) return grouped_lines_supports(op, p);
  // Shared memory must hold a tile of 8 x 8 outputs of one unit with its halo, and the filters.
  int64_t const per_unit = groups_per_unit(p), C = per_unit * p.C_per_group() / 8, K = per_unit * p.K_per_group() / 8;
  if (C > 16 || K > 16 || ceil_div(p.groups, per_unit) > 65535) return false;
  if (p.dilation_h > 64 || p.dilation_w > 64) return false;
  bool const backward = op == Op::dgrad;
  int64_t const step_h = backward ? 1 : p.stride_h, step_w = backward ? 1 : p.stride_w;
  int64_t const halo_h = 7 * step_h + (p.R - 1) * p.dilation_h / (backward ? p.stride_h : 1) + 2;
  int64_t const halo_w = 7 * step_w + (p.S - 1) * p.dilation_w / (backward ? p.stride_w : 1) + 2 + step_w;
  // Blocks of 16 bytes of inputs; f32's filters are kept in two parts.
  int64_t const wide = size_of(p.dtype) / 2, ins = (backward ? K : C) * wide, outs = backward ? C : K;
  if (op == Op::wgrad) {
    int64_t const slab = grouped_sums(p).slab;  // units that a block has side by side
    return ((halo_h * halo_w + 16) * ins * slab + 80 * (K * wide * slab + 4)) * 16 + ins * p.R * p.S * 4 <= 220 * 1024;
  }
  int64_t const together = grouped_shared_blocks(outs, p.dtype), taps = p.R == 3 && p.S == 3 ? 12 : p.R * p.S;
  int64_t const halves = taps * ins + 16, filters = halves * ceil_div(outs, together) * together * 128 * wide;
  return (halo_h * halo_w + 16) * 16 * ins + filters + halves * 16 <= 220 * 1024;
}

// The same whatever the device.
constexpr int64_t grouped_lines_workspace_bytes(Problem const& p, int split_k) {
  GroupedSumLines const t = grouped_sum_lines(p, h200_sxm);
  int64_t const slabs = ceil_div(ceil_div(p.groups, groups_per_unit(p)), t.slab);
  return slabs * t.jobs * t.tiles * 512 * split_k;
}

// A launch and the filters, then rounds of tiles. wgrad: as many splits as there are SMs, unless adding them costs
// more.
constexpr Estimate grouped_lines_estimate(Op op, Problem const& p, Device const& d) {
  bool const f32 = p.dtype == DType::f32;
  if (op != Op::wgrad) {
    GroupedLines const t = grouped_lines(op, p, d);
    // As measured; with a stride, many blocks of inputs leave room for little else.
    double const in = double(lines_per_unit(op, p) * (op == Op::dgrad ? p.K_per_group() : p.C_per_group()) *
                             size_of(p.dtype) / 16),
                 strided = 0.8 + 0.085 * in > 1 ? 0.8 + 0.085 * in : 1,
                 wide = p.stride_w == 1 ? (!f32 && in > 5 ? 1.2 : 1)
                        : f32           ? (op == Op::dgrad && in > 5 ? 1.22 : 1)
                                        : (in >= (op == Op::dgrad ? 2 : 4) ? 1.17 : 1);
    double const rows = !t.planar && grouped_step_3x3(op, p) == 2 ? 0.85 : 1;  // that taps share
    double const slower = !t.planar ? (p.stride_w > 1 ? strided : 1) * wide : p.stride_w > 1 ? 1.35 : f32 ? 1.15 : 1.2;
    // Turned lines of many blocks and taps, whose filters leave room for small tiles.
    double const taps = !t.planar || f32 ? 1 : p.R * p.S >= 49 && in >= 2 ? 1.8 : p.R * p.S >= 25 && in >= 5 ? 1.4 : 1;
    double const alone = lines_per_unit(op, p) != groups_per_unit(p) && p.stride_w == 1 ? 1.08 : 1;
    return {t.cycles / 1.95 * slower * rows * taps * alone + (rows < 1 || (t.planar && !f32) ? 6000 : 5000), 1};
  }
  GroupedSumLines const t = grouped_sum_lines(p, d);
  int64_t const in = groups_per_unit(p) * p.C_per_group() / 8;
  double const slower = !t.planar && f32 ? (p.stride_w > 1 && !p.allow_tf32 ? 1.12 : 1)
                        : !t.planar      ? (p.stride_w == 1   ? (in > 1 ? 1.05 : 1)
                                            : t.together == 0 ? 1.25
                                            : in > 3          ? 1.2
                                                              : 0.9)
                        : p.stride_w > 1 ? (f32              ? 1.45
                                            : t.together > 0 ? 2.15
                                                             : 1.75)
                        : f32            ? 1.15
                        : t.together > 0 ? 1.55
                        : in <= 4        ? 1.38
                                         : 1.2;
  int64_t const slabs = ceil_div(ceil_div(p.groups, groups_per_unit(p)), t.slab) * t.passes;
  double const bytes = double(slabs / t.passes * t.jobs * t.tiles * 512);
  bool const one_tap = !t.planar && p.R * p.S == 1;
  double const begin = one_tap ? 12300 : t.planar && !f32 ? 10500 : 9000, more = one_tap && !f32 ? 1.1 : 1;
  Estimate best{};
  for (int64_t most = max64(1, d.sm_count / slabs);; most = most * 3 / 4) {
    // As even as can be.
    int64_t const tiles = int64_t(t.all_tiles), blocks = ceil_div(tiles, ceil_div(tiles, most));
    int64_t const rounds = ceil_div(tiles, blocks), waves = ceil_div(blocks * slabs, d.sm_count);
    double const ns =
        double(rounds * waves) * t.tile_cycles * slower * more / 1.75 + begin + bytes * double(blocks) / 1500;
    bool const fits = bytes * double(blocks) <= double(kMaxWorkspaceBytes) || most == 1;
    if (fits && (best.ns == 0 || ns < best.ns)) best = {ns, int(blocks)};
    if (most == 1) break;
  }
  return best;
}

// wgrad: reading and writing, and the products of whole blocks and squares, which overlap in part (docs/tuning.md).
// fprop and dgrad of any strides are in grouped_any.h.
constexpr Estimate grouped_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  if (row.variant == Variant::lines) return grouped_lines_estimate(op, p, d);
  double const sms = double(d.sm_count) / 132;
  double const elements =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  // Bytes per ns. Lanes go along rows, and channels_last rows are slow that way; so are a stride's single pixels.
  bool const f32 = p.dtype == DType::f32;
  double rate = p.x.c == 1 && p.C > 1 ? 500 : f32 ? 1500 : 1150;
  if (p.stride_w > 1) rate /= f32 ? 1.65 : 1.33;
  if (p.W < 8) rate /= 2.5;  // rows that leave most lanes idle
  int64_t const per_unit = groups_per_unit(p), C = per_unit * p.C_per_group() / 8, K = per_unit * p.K_per_group() / 8;
  double const squares = double(p.N) * double(ceil_div(p.P(), 8)) * double(ceil_div(p.Q(), 8));
  double memory_ns = elements * size_of(p.dtype) / (rate * sms);
  // With a stride over NCHW each square's inputs are copied with their halo, element by element, and channels that fill
  // up a unit of groups too.
  bool const planar = p.x.w == 1;
  if (planar && !f32 && p.R * p.S > 1 && p.stride_h * p.stride_w > 1) {
    double const halo = double(7 * p.stride_h + p.R) * double(7 * p.stride_w + p.S);
    double const halo_ns = squares * halo * double(p.C) * 2 / (530 * sms);
    memory_ns = memory_ns > halo_ns ? memory_ns : halo_ns;
  }
  if (planar && C * 8 * ceil_div(p.groups, per_unit) >= 2 * p.C) memory_ns *= 2;
  double const products = squares * double(ceil_div(p.groups, per_unit)) * double(C * K) * double(p.R * p.S) * 2;
  // 8 channels by 8 filters a product, or less.
  double const multiply_ns = products * (!f32 ? 1 : p.allow_tf32 ? 4 : 4.6) * 0.045 / sms;
  double const large = memory_ns > multiply_ns ? memory_ns : multiply_ns;
  double const small = memory_ns > multiply_ns ? multiply_ns : memory_ns;
  double const work_ns = (large + small * small / (2 * (large + 1))) * (!p.allow_tf32 ? 1.22 : 1.0);
  // As many shares of the pixels as keep two blocks an SM busy, unless adding them up costs more.
  GroupedSums const g = grouped_sums(p);
  int64_t const slabs = ceil_div(ceil_div(p.groups, per_unit), g.slab) * ceil_div(g.items, 16);
  double const share_bytes = double(p.K) * double(p.C_per_group()) * double(p.R * p.S) * 4 * double(g.shares);
  Estimate best{};
  for (int64_t blocks = 1; blocks == 1 || blocks * slabs <= 2 * d.sm_count; blocks += max64(1, blocks / 8)) {
    double const bytes = share_bytes * double(blocks);
    if (blocks > 1 && (bytes > double(kMaxWorkspaceBytes) || double(blocks) > squares / 2)) break;
    double const idle = 2.0 * d.sm_count / double(blocks * slabs);
    double const ns = work_ns * (idle > 1 ? idle : 1) + 16000 + bytes * 2 / 2500;
    if (blocks == 1 || ns < best.ns) best = {ns, int(blocks * g.shares)};
  }
  return best;
}

constexpr int64_t grouped_workspace_bytes(Row const& row, Problem const& p, int split_k) {
  if (row.variant == Variant::lines) return row.op == Op::wgrad ? grouped_lines_workspace_bytes(p, split_k) : 0;
  return split_k == 1 ? 0 : p.K * p.C_per_group() * p.R * p.S * split_k * 4;
}

}  // namespace conv2d_ext
