// Which problems the kernels of cuda/stream.cuh take, and their times: for the planner alone.
#pragma once

#include "runs.h"
#include "stream.h"

namespace conv2d_ext {

constexpr bool stream_supports(Row const& row, Problem const& p) {
  // The smallest size that holds the filter.
  int64_t const side = max64(p.R, p.S);
  int const size = side <= 7    ? (side <= 3   ? 3
                                   : side <= 5 ? 5
                                               : 7)
                   : side <= 9  ? 9
                   : side <= 13 ? 13
                   : side <= 15 ? 15
                                : 0;
  if (p.C_per_group() != 1 || p.K != p.C || row.tile_m != size) return false;
  if (size == 15 && (p.R < 14 || p.S < 14)) return false;  // others were not timed
  // Nine taps and eight outputs, or 13 and four, meet all of a unit's 16 inputs, which begin on a word; 15 and two are
  // loaded as they lie.
  if (size > 7 && row.tile_k == 1 && p.S == size && p.pad_left % 2 != 0 && !stream_no_shift(row, p)) return false;
  bool const f32 = p.dtype == DType::f32 && p.stride_h == 2;  // planes alone
  if (p.dtype == DType::f32 && size > 7) return false;        // quads.h alone
  int64_t const stride = f32 ? 2 : row.tile_k;
  if (p.stride_h != stride || p.stride_w != stride || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.N == 0 || p.C == 0 || p.H == 0 || p.W == 0 || p.P() == 0 || p.Q() == 0 || p.R == 0 || p.S == 0) return false;
  if ((p.W > 1 && p.x.w != 1) || (p.Q() > 1 && p.y.w != 1)) return false;
  // Numbers of units, walks and planes, and coordinates of padded images, are 32 bits in the kernels.
  constexpr int64_t most = int64_t(1) << 29;
  if (p.H + p.pad_top + p.pad_bottom > most || p.W + p.pad_left + p.pad_right > most) return false;
  double const rows = double(p.N) * double(p.C) * double(max64(p.H, p.P()));
  if (f32 && !planes_f32_tile(row.tile_m, row.op, p, h200_sxm).planes.used) return false;
  // f32, fprop and dgrad: of filters of four rows and columns and more that 5x5 does not hold, 7x7 alone.
  if (p.dtype == DType::f32 && row.op != Op::wgrad && row.tile_m == 7 && p.R > 3 && p.S > 3 && p.R * p.S < 49)
    return false;
  if (p.dtype != DType::f32 && (row.op == Op::wgrad ? !stream_sums_walk(size, row.tile_k) : size > 9) &&
      !stream_tile(row, row.op, p, h200_sxm).planes.used)
    return false;
  // dgrad: paddings beyond the filter make rows of y that a team copies whole, of several images, longer than its
  // outputs need, and than shared memory is.
  if (row.op == Op::dgrad && (p.pad_left >= p.S || p.pad_right >= p.S)) {
    bool const halves = p.dtype != DType::f32;
    RingTile const ring = halves ? stream_tile(row, row.op, p, h200_sxm).ring
                          : planes_f32_tile(row.tile_m, row.op, p, h200_sxm).planes.used
                              ? RingTile{}
                              : stream_lanes_tile(row.tile_m, row.op, p, h200_sxm).ring;
    if (ring.shared_bytes + 1024 > 227 * 1024) return false;
  }
  return rows * double(ceil_div(max64(p.W, p.Q()), kStreamColumns) + 1) < double(most);
}

// Small images have kernels of their own, whose estimates are of small layers too.
constexpr bool is_small_stream(Row const& row, Problem const& p) {
  return row.family == Family::stream && p.dtype == DType::f32 &&
         planes_f32_tile(row.tile_m, row.op, p, h200_sxm).planes.used;
}

// Shares of wgrad by walks of 16-bit types. A block's four warps take its share's walks in turn, and an SM has few
// blocks at a time: as measured, it is the SM with most blocks and the warp with most walks that count, and what lasts
// longer than the others of many.
constexpr int stream_shares(int R, int64_t walks, int64_t C, double most, Device const& d) {
  double const together = R == 3 ? 5 : 4;
  double best = 0;
  int shares = 1;
  for (int64_t each = 1; each <= 64; ++each) {  // walks of a warp
    int64_t const split = ceil_div(walks, kStreamWarps * each);
    if (double(split) > most) continue;
    double const blocks = double(C) * double(split) / d.sm_count;
    double const turns = blocks > together ? blocks + 0.3 * together : double(ceil_div(C * split, d.sm_count));
    double const cost =
        turns * double(ceil_div(walks, kStreamWarps * split)) * (blocks < 4 ? 1.2 - 0.05 * blocks : 1.0);
    if (best == 0 || cost < best) best = cost, shares = int(split);
  }
  return shares;
}

// 3x3 in 16 bits by stream_runs.cuh; 0: not taken.
constexpr Estimate runs_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  if (row.tile_m != 3) return {0, 1};
  if (row.tile_k == 1) {
    RunsTile const runs = runs_tile(op, p, d);
    return {runs.used ? runs.ns : 0, 1};
  }
  SpreadRuns const runs = op == Op::dgrad ? spread_runs_tile(p, d) : SpreadRuns{};
  return {runs.used ? runs.ns : 0, 1};
}

// The bytes at the rate that the copies reach, and half of the walks' steps, which they don't hide (docs/tuning.md).
constexpr Estimate stream_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  bool const sums = op == Op::wgrad, halves = p.dtype != DType::f32;
  double const elements = double(p.N) * double(p.C) * (double(p.H) * double(p.W) + double(p.P()) * double(p.Q()));
  double const memory_ns = elements * size_of(p.dtype) / 3900 * 132 / d.sm_count;
  // wgrad: so many blocks an SM; every warp has a walk. A second pass takes longer than an uneven first one does.
  auto with_splits = [&](double ns, double blocks, double units, double shares) {
    Estimate best{ns, 1};
    if (!sums || (units >= 2.0 * d.sm_count && memory_ns < 20000)) return best;
    double split = blocks * d.sm_count / units;
    split = split < shares ? split : shares;
    double const taps = double(p.K) * double(p.R) * double(p.S), room = double(kMaxWorkspaceBytes) / (taps * 4);
    split = split < room ? split : room;
    best.split_k = split < 2 ? 1 : split > 4096 ? 4096 : int(split);
    if (best.split_k > 1) best.ns += 6000 + taps * 4 * best.split_k * 2 / 2500;
    return best;
  };
  // Of planes: what the copies or the warps take, whichever is more.
  auto with_planes = [&](PlanesTile const& q, int64_t groups, bool stream_sums = false) {
    double const copies_ns = memory_ns * (sums ? 1.25 : 1.15);
    double const most = stream_sums ? memory_ns + 0.4 * q.warps_ns : copies_ns > q.warps_ns ? copies_ns : q.warps_ns;
    // 15x15, as measured: rows above and below small images take little.
    if (row.tile_m == 15) return Estimate{9000 + most * (p.H <= 14 ? 0.63 : 0.84), 1};
    if (!sums) return Estimate{7000 + most * (row.tile_m > 9 ? 1.15 : 1.0) + (row.tile_m > 9 ? 1000 : 0), 1};
    // A block's first copies and its sums take the time of an item and a half.
    int64_t const slots = int64_t(q.together) * d.sm_count, units = p.C / q.channels;
    int64_t const room = max64(1, kMaxWorkspaceBytes / (p.K * p.R * p.S * 4));
    Estimate best{0, 1};
    for (int64_t split = 1; split <= 64 && split <= groups && split <= room; ++split) {
      double const rounds = double(ceil_div(units * split, slots)) * (double(ceil_div(groups, split)) + 1.5);
      if (split == 1 || rounds + 0.5 < best.ns) best = {rounds + (split > 1 ? 0.5 : 0), int(split)};
    }
    best.ns = 7500 + most + (best.split_k > 1 ? 3000 : 0) + (q.band_rows > 0 ? 4000 : 0);
    if (stream_sums && row.tile_m > 7) best.ns += 10000 + (row.tile_m > 9 ? 0.45 * q.warps_ns : 0);
    return best;
  };
  if (!halves) {
    PlanesF32Tile const t = planes_f32_tile(row.tile_m, op, p, d);
    if (t.planes.used) return with_planes(t.planes, ceil_div(p.N, t.images));
  }
  if (!halves && sums) {
    StreamF32Tile const t = stream_f32_tile(row.tile_m, p, d);
    double const steps = double(t.walks()) * double(p.C) * (t.rows + row.tile_m + 9);
    double const single = row.tile_m == 3 && t.width == 1 ? 60 : 0;  // loads of single elements
    double const step_ns = (40 + single + 4.0 * double(p.R) * double(p.S)) / (9.6 * d.sm_count);
    double const lanes = t.out_W <= 16 ? 2.2 : 1.0;  // small images leave lanes without work
    return with_splits(3000 + memory_ns + steps * step_ns * lanes * 1.1, row.tile_m == 3 ? 4 : 6, double(p.C),
                       double(ceil_div(t.walks(), kStreamWarps)));
  }
  if (!halves) {
    // FMAs, what is beside them and, of odd rows, loads of single elements.
    StreamLanesTile const t = stream_lanes_tile(row.tile_m, op, p, d);
    double const steps = double(t.walks()) * t.ring.warps * double(p.C) * (t.rows + row.tile_m + 3);
    double const instructions = 4.0 * double(p.R) * double(p.S) + 50 + (t.width == 1 ? 8.0 * double(p.S) : 0);
    double const issue_ns = steps * instructions / (7.0 * d.sm_count), sum = memory_ns + issue_ns;
    double const most = memory_ns > issue_ns ? memory_ns : issue_ns;
    return {4000 + (most + (sum - most) / 4) * (row.tile_m == 3 && t.ring.warps == 1 ? 1.2 : 1.0), 1};
  }
  StreamTile const t = stream_tile(row, op, p, d);
  bool const spread = op == Op::dgrad && row.tile_k == 2;
  if (t.planes.used) return with_planes(t.planes, t.groups * t.planes.bands, t.sums.blocks > 0);
  double const rows = spread ? t.rows / 2.0 + row.tile_m / 2 + 10 : double(t.rows - 1) * row.tile_k + row.tile_m + 10;
  double const steps = double(t.walks()) * t.ring.warps * double(p.C) * rows;
  double const copies = t.ring.used    ? (!t.ring.odd ? 1.2
                                          : spread    ? 5.5
                                                      : 2.9)
                        : t.width == 1 ? 5.2
                        : t.width == 2 ? 1.3
                                       : 1.0;
  double const strided = row.tile_k == 1 || spread ? 1.0 : sums ? 1.2 : 0.9;
  double const slower = copies * strided * (sums ? 1.4 : 1.0);
  double const step_ns = (25 + 2.0 * row.tile_m) * slower / (7.2 * d.sm_count);
  double const walk_ns = t.ring.used && t.ring.odd && !spread ? rows * 55 * row.tile_m : 0;  // of one warp
  double const steps_ns = steps * step_ns, begin = t.width == 1 ? 5500 : 4500;
  double const ns = begin + memory_ns + (steps_ns > walk_ns ? steps_ns : walk_ns);
  if (!sums) return {ns, 1};
  double const taps = double(p.K) * double(p.R) * double(p.S), room = double(kMaxWorkspaceBytes) / (taps * 4);
  bool const small = p.C >= 2 * d.sm_count && memory_ns < 10000;  // a second pass takes longer than an uneven first one
  int const shares = small ? 1 : stream_shares(row.tile_m, t.walks(), p.C, room < 4096 ? room : 4096, d);
  double const begins = row.tile_m > 7 ? 8000 : 0;
  return {ns + begins + (shares > 1 ? 6000 + taps * 4 * shares * 2 / 2500 : 0), shares};
}

}  // namespace conv2d_ext
