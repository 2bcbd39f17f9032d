// The shares of cuda/stream.cuh for a problem: shared by the planner and the launcher.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

// Every row of `s` begins on a multiple of `bytes`.
constexpr bool stream_aligned(Strides const& s, int align, int bytes, int element) {
  int const v = bytes / element;
  return align >= bytes && s.n % v == 0 && s.c % v == 0 && s.h % v == 0;
}

inline constexpr int kStreamUnits = 16, kStreamWarps = 4, kStreamColumns = 8;

// Columns of a unit of fprop and dgrad with stride 1; cuda/stream_taller.cuh has two or four rows of outputs of them.
inline constexpr int kTallerBlocks = 2;
constexpr int stream_columns(int R) { return R > 13 ? 2 : R > 9 ? 4 : kStreamColumns; }
constexpr int stream_unit_rows(int R) { return kStreamColumns / stream_columns(R); }

// Rows of a stretch of `height` rows of outputs, `walks` images and pieces of them: the stretches fill the `slots` of
// the GPU evenly, and meet few rows twice; a walk's beginning takes the time of some rows more.
constexpr int stream_rows(int height, int stride, int R, double walks, double slots) {
  double best = 0;
  int rows = height;
  for (int stretches = 1; stretches <= 64 && (stretches == 1 || height / stretches >= 4); ++stretches) {
    int const each = int(ceil_div(height, stretches));
    double const rounds = walks * double(ceil_div(height, each)) / slots;
    double const whole = rounds > 1e9 ? rounds : double(int64_t(rounds) + (double(int64_t(rounds)) < rounds ? 1 : 0));
    double const cost = (rounds + 3 * whole) * double((each - 1) * stride + R + 10);
    if (best != 0 && cost >= best) continue;
    best = cost, rows = each;
  }
  return rows;
}

// How a team's ring in shared memory holds rows of a tensor: chunks of rows of each of its images, one after the other
// as in memory, or a segment of every row.
struct StreamRing {
  bool whole = true;     // rows
  int chunk = 8;         // rows; so many are a multiple of 16 bytes, whatever a row has
  int columns = 0;       // of a segment
  int pitch = 0;         // bytes from a row to the next
  int image_bytes = 0;   // from an image to the next
  int stage_bytes = 16;  // from a chunk to the next
};

// Bytes of a team before its ring of inputs: 8 barriers, what its copies are at, and a gap.
inline constexpr int kStreamRingBegin = 704;
inline constexpr int kStreamRingEnd = 32;  // bytes behind a ring of outputs: the last row's end, what is known of it

// `columns` of units of `unit` columns, of which a row has `span`; a lane may read `window` columns beyond either end.
constexpr StreamRing stream_ring(Strides const& s, int W, int columns, int unit, int span, int window, int images,
                                 bool whole, int element, int chunk) {
  StreamRing t;
  int const gap = window * element + 16;
  t.whole = whole, t.columns = columns, t.chunk = chunk;
  int64_t const row = s.h * element;
  t.pitch = whole ? W * element : columns * element + gap;
  while (!whole && (t.pitch - row) % 16 != 0) t.pitch += element;
  // Whole rows: units that are read together are in different banks.
  t.image_bytes = int(ceil_div(32 + chunk * t.pitch + gap, 16) * 16);
  while (whole && t.image_bytes % 128 != span * unit * element / 16 * 16 % 128) t.image_bytes += 16;
  t.stage_bytes = images * t.image_bytes;
  return t;
}

struct RingTile {
  bool used = false;
  bool odd = false;          // pairs of elements lie across words, or outputs are stored one by one
  int warps = 1, teams = 1;  // warps that share a row, a ring and a piece of the work; such teams of a block
  StreamRing in;
  int stages = 1;
  int out_bytes = 0;  // of an image's ring of outputs, where rows of outputs follow each other in memory; or 0
  int64_t team_bytes = 0, shared_bytes = 0;
};

// Whole planes of some images and neighbouring channels, of which a warp has a channel: cuda/stream_planes.cuh.
struct PlanesTile {
  bool used = false;
  bool odd = false;               // pairs of elements lie across words
  int channels = 1, stages = 1;   // of a block
  int in_bytes = 0, y_bytes = 0;  // in shared memory, from an image to the next: of inputs, of y or outputs
  int stage_bytes = 0;
  int64_t shared_bytes = 0;
  int bands = 1, band_rows = 0;                // of an image, and rows of outputs (wgrad: of y) of one; 0: whole planes
  int channel_bytes = 0, channel_y_bytes = 0;  // of bands, from a channel to the next
  int run_channels = 1;                        // of bands: of a run of memory
  int unit_stretches = 0;                      // of a band; 0: stream_units.cuh is not used
  int row_blocks = 0;                          // of 8 columns of two units; 0: stream_rows.cuh is not used
  int together = 1;                            // blocks of an SM
  double warps_ns = 0;                         // of the instructions
};

inline constexpr int kPlanesWarps = 8, kPlanesBegin = 256;

// wgrad over whole planes: cuda/stream_sums.cuh. Products of 16 rows of x and 8 of y, over 16 columns of x.
struct SumsTile {
  int rows = 1;        // of y, in a product
  int blocks = 0;      // products one below the other; 0: stream_sums.cuh is not used
  int first = 0;       // row of x in the first one
  int x0 = 0, y0 = 0;  // the first column of x, and that of y which it meets by the filter's middle
  int steps = 1;       // of 16 columns
  int twice = 0;       // a step has 8 columns of two images
  int zeros = 64;      // bytes of what stands for a row outside
};

// Blocks of an SM, as the registers allow.
constexpr int sums_blocks(int R) { return R >= 7 ? 2 : 3; }

// Blocks of an SM of dgrad with stride 2 by cuda/stream_units.cuh.
inline constexpr int kSpreadUnitsBlocks = 2;

// Blocks of an SM, as the registers allow.
constexpr int planes_blocks(int R, int stride) { return R >= 7 || (R == 5 && stride == 2) ? 2 : 3; }

// 16-bit types. A unit is 8 columns of outputs of one image (wgrad: of y); a warp walks down 16 units of one channel.
struct StreamTile {
  int in_H = 0, in_W = 0, out_H = 0, out_W = 0;
  int pad_h = 0, pad_w = 0;  // input coordinate = output coordinate * stride - pad + tap; may be negative
  int origin = 0;            // the first unit begins so many columns before the first output
  int shift = 0;             // columns from the first of a unit's inputs to its first tap
  int width = 1;             // elements of one copy; 2 and more: outputs are stored in pairs
  int blocks = 1, span = 1;  // units of a row, of a piece of it
  int images = 1, half = 1;  // of a warp, of 8 units; a unit more is left between two of them
  int first = 0, copies = 1, copies_y = 1;  // of a piece: first column that is copied; copies of a row
  int rows = 1;                             // of outputs, in a stretch that a warp walks down
  int64_t pieces = 1, stretches = 1, groups = 1;
  PlanesTile planes;  // small images
  SumsTile sums;      // wgrad of them
  RingTile ring;      // fprop and dgrad

  constexpr int64_t walks() const { return pieces * stretches * groups; }  // of a channel
};

// Blocks of an SM, as the registers and the rings allow.
constexpr int stream_blocks(int R, int stride, int width) {
  if (width == 4) return stride == 2 ? (R == 3 ? 5 : 4) : R == 3 ? 8 : R == 5 ? 6 : R == 7 ? 5 : 4;
  if (width == 2) return stride == 2 ? 3 : R == 3 ? 6 : R == 5 ? 5 : 4;
  return stride == 2 ? 2 : R == 3 ? 5 : R == 9 ? 3 : 4;
}

// Blocks of an SM of cuda/stream_ring.cuh, as the registers allow.
constexpr int ring_blocks(int R, int stride, bool spread) {
  if (stride == 2) return R == 3 ? 5 : R == 7 && spread ? 3 : 4;
  return R == 3 ? 7 : R == 5 ? 6 : R == 7 ? 5 : 4;
}

// Blocks of an SM of cuda/stream_rows.cuh, as the registers allow.
constexpr int row_planes_blocks(int R, int row_blocks) { return R == 3 && row_blocks == 2 ? 3 : 2; }
inline constexpr int kOddRowPlanesBlocks = 2;

// `s` has whole planes of H x W one after the other, and images that begin on 16 bytes.
constexpr bool whole_planes(Strides const& s, int align, int64_t H, int64_t W, int element) {
  return align >= 16 && s.n % (16 / element) == 0 && s.c == H * W && (H == 1 || s.h == W);
}

// wgrad of 7x7 with stride 2 and of more than nine taps has whole planes alone: rows for any filter are as fast
// otherwise.
constexpr bool stream_sums_walk(int R, int stride) { return stride == 1 ? R <= 9 : R < 7; }

// Does L2 give up first what walks of wgrad read? Lines that other kernels have written then stay, and need not be
// written back meanwhile. Of 3x3: as timed, larger filters gain nothing, and neither do tensors of which L2 holds
// little.
constexpr bool stream_hints(int R) { return R == 3; }
constexpr bool walks_read_once(Problem const& p) {
  double const elements = double(p.N) * double(p.C) * (double(p.H) * double(p.W) + double(p.P()) * double(p.Q()));
  return elements * size_of(p.dtype) < 400e6;
}

// Copies of a lane for each row of inputs, at most: enough for 16 units of one image. Of fprop and dgrad by four
// elements half of that: rows that take more are cuda/stream_ring.cuh's.
constexpr int stream_passes(int stride, int width, bool sums) {
  return (width == 4 ? (sums ? 2 : 1) : width == 2 ? 2 : 4) * stride;
}

// Warps that share a row of so many units, of which a warp has `units`; such teams of a block.
constexpr int ring_warps(int64_t span, int units) { return int(ceil_div(span, units)); }
constexpr int ring_teams(int warps) { return kStreamWarps / warps; }

// Bytes of an image's ring of outputs, or 0: `turn` rows of it are written while as many are stored. So many rows are
// a multiple of 16 bytes, whatever a row has. It pays for rows of several warps, in 16-bit types where they are off
// L2's sectors.
constexpr int ring_out_bytes(Strides const& out, int64_t H, int64_t W, int warps, int64_t pieces, int turn,
                             int element) {
  bool const dense = pieces == 1 && (H == 1 || out.h == W);
  if (!dense || warps == 1 || (element == 2 && W * element % 32 == 0) || double(H) * double(W) > double(1 << 28))
    return 0;
  int const unit = 16 / element;
  return int(ceil_div(2 * turn + 1, unit) * unit * W * element);
}

// A team's ring, for walks of so many rows of inputs, `turn` of them in a round of the loop.
constexpr RingTile ring_tile(StreamRing const& in, int warps, int images, int out_bytes, int rows, int turn,
                             int blocks) {
  RingTile t;
  t.used = true, t.in = in, t.warps = warps, t.teams = ring_teams(warps), t.out_bytes = out_bytes;
  auto bytes = [&](int stages) {
    return kStreamRingBegin + int64_t(stages) * in.stage_bytes +
           (out_bytes > 0 ? int64_t(images) * (out_bytes + kStreamRingEnd) : 0);
  };
  // The rows of a round are copied before it begins, also where it begins with the last row of a chunk.
  int const least = 1 + int(ceil_div(turn - 1, in.chunk)), all = int(ceil_div(rows, in.chunk));
  t.stages = all < 4 ? all : 4;
  while (t.stages > 2 && t.stages > least && t.teams * bytes(t.stages) + 1024 > 227 * 1024 / blocks) --t.stages;
  t.team_bytes = bytes(t.stages), t.shared_bytes = t.teams * t.team_bytes;
  return t;
}

// Changes a tile of fprop or dgrad to one for cuda/stream_ring.cuh.
constexpr void set_ring(StreamTile& t, Row const& row, Op op, Problem const& p, Device const& d) {
  bool const backward = op == Op::dgrad, spread = backward && row.tile_k == 2;
  int const step = spread ? 1 : row.tile_k, unit = kStreamColumns * step, window = 16 * step;
  int const stored = spread ? 4 : 2;  // elements at once
  Strides const& in = backward ? p.y : p.x;
  Strides const& out = backward ? p.x : p.y;
  int const align = backward ? p.y_align : p.x_align, out_align = backward ? p.x_align : p.y_align;
  bool const odd =
      !stream_aligned(in, align, 4, 2) || !stream_aligned(out, out_align, 2 * stored, 2) || t.out_W % stored != 0;
  t.origin = 0, t.shift = odd ? 0 : (t.pad_w % 2 + 2) % 2;
  t.blocks = int(ceil_div(t.out_W, kStreamColumns * (spread ? 2 : 1)));
  t.pieces = ceil_div(t.blocks, kStreamWarps * kStreamUnits), t.span = int(ceil_div(t.blocks, t.pieces));
  bool const whole =
      t.pieces == 1 && t.in_W <= kStreamWarps * kStreamUnits * unit + 64 && (t.in_H == 1 || in.h == t.in_W);
  int const warps = ring_warps(t.span, kStreamUnits);
  t.half = t.span <= 8 ? 8 / t.span : 1;
  t.images = whole && t.span <= 8 ? int(min64(2 * t.half, p.N)) : 1;
  t.groups = ceil_div(p.N, t.images);
  int const blocks = ring_blocks(row.tile_m, row.tile_k, spread);
  double const walks = double(t.groups) * double(t.pieces) * double(p.C);
  t.rows = stream_rows(t.out_H, row.tile_k, row.tile_m, walks, double(d.sm_count) * ring_teams(warps) * blocks);
  t.stretches = ceil_div(t.out_H, t.rows);
  int const rows = int(min64(t.in_H, spread ? t.rows / 2 + row.tile_m : (t.rows - 1) * row.tile_k + row.tile_m));
  int const live = (row.tile_m + row.tile_k - 1) / row.tile_k;
  int const out_bytes = spread ? 0 : ring_out_bytes(out, t.out_H, t.out_W, warps, t.pieces, live, 2);
  t.ring = ring_tile(stream_ring(in, t.in_W, (t.span - 1) * unit + window, unit, t.span, window, t.images, whole, 2, 8),
                     warps, t.images, out_bytes, rows, spread ? row.tile_m : live * row.tile_k, blocks);
  t.ring.odd = odd;
}

// 15 taps and two outputs meet all of a unit's 16 inputs, which may begin within a word.
constexpr bool stream_no_shift(Row const& row, Problem const& p) {
  return row.tile_m == 15 && p.S == 15 && p.pad_left % 2 != 0;
}

inline constexpr int kBandsMost = 4096;  // rows and columns

// Bands' runs of planes are brought in whole 16 bytes, which images have to be.
constexpr bool bands_exist(int64_t C, int H, int W) { return C * H * W % 8 == 0; }

// Bytes of a run of `rows` rows that begins anywhere within 16 bytes.
constexpr int run_bytes(int rows, int W) { return (rows * W * 2 + 14 + 15) / 16 * 16; }

// Instructions of a warp for a row of inputs.
constexpr double planes_steps(Row const& row, bool spread, bool odd) {
  int const size = row.tile_m, step = spread ? 1 : row.tile_k;
  return (spread ? 45.0 + 6 * size : step == 2 ? 24.0 + 4 * size : 22.0 + 5 * size) + (odd ? 14 * step : 0);
}

// The same of cuda/stream_rows.cuh for a row of outputs of both sets of a warp.
constexpr double row_planes_steps(Row const& row, int row_blocks) {
  return 38.0 + 3 * row.tile_m + (row_blocks == 3 ? 8 : 0);
}

// A tile of cuda/stream_planes.cuh changes `t` where it takes the problem, but for wgrad with stride 2. As measured, it
// beats other walks on images of up to 32 columns (3x3 with stride 2: 56), of which two blocks or more of an SM have
// enough in shared memory for a warp's units.
constexpr void set_planes(StreamTile& t, Row const& row, Op op, Problem const& p, Device const& d) {
  bool const backward = op == Op::dgrad, spread = backward && row.tile_k == 2, sums = op == Op::wgrad;
  int const step = spread ? 1 : row.tile_k, columns = kStreamColumns * (spread ? 2 : 1);
  Strides const& in = backward ? p.y : p.x;
  Strides const& out = backward ? p.x : p.y;
  int const align = backward ? p.y_align : p.x_align, out_align = backward ? p.x_align : p.y_align;
  if (p.N < 4 && !sums) return;
  int const most = row.tile_k == 2 && row.tile_m == 3 ? 56 : 32;
  if (t.in_H > most || t.in_W > most || t.out_H > most || t.out_W > most) return;
  // set_units
  if (op == Op::fprop && row.tile_k == 2 && ((t.in_W % 2 != 0 && t.in_W > 8) || (t.out_W % 2 != 0 && t.in_W > 32)))
    return;
  if (!whole_planes(in, align, t.in_H, t.in_W, 2) || !whole_planes(out, out_align, t.out_H, t.out_W, 2)) return;
  int const area = t.in_H * t.in_W, out_area = t.out_H * t.out_W;
  int const blocks = int(ceil_div(t.out_W, columns)), half = 8 / blocks;
  bool const odd = t.in_W % 2 != 0 || (sums && t.out_W % 2 != 0);
  // cuda/stream_rows.cuh, where it is as fast at least. Of even rows the first of two units begins with the columns
  // that its first taps meet, or one before.
  bool const odd_rows = row.tile_k == 1 && !sums && t.in_W % 2 != 0 && t.out_W % 2 != 0 && t.in_W < kStreamColumns &&
                        blocks == 1 && (row.tile_m == 5 || row.tile_m == 7);
  bool const two = t.out_W <= 16 && t.in_W + t.pad_w + (t.pad_w % 2 + 2) % 2 <= 16;
  bool const even_rows = row.tile_k == 1 && !sums && !odd && t.out_W % 2 == 0 && blocks > 1 &&
                         (row.tile_m == 3 ? two || blocks == 3 : row.tile_m == 5 && two);
  bool const rows = even_rows || odd_rows;
  int const row_blocks = odd_rows ? blocks : !rows ? 0 : two ? 2 : 3;
  double const row_steps = rows ? row_planes_steps(row, row_blocks) : planes_steps(row, spread, odd);
  // Units that are read together are in different banks.
  auto pitch = [&](int bytes, int unit) {
    while (bytes % 128 != (rows ? 16 : blocks * unit * 2 % 128)) bytes += 16;
    return bytes;
  };
  auto consider = [&](int channels, int together, int images) {
    PlanesTile q;
    q.channels = channels, q.odd = odd, q.row_blocks = row_blocks;
    q.in_bytes = pitch(channels * area * 2, kStreamColumns * step);
    q.y_bytes = pitch(channels * out_area * 2, columns);
    // Windows reach beyond a row's ends.
    q.stage_bytes = int(ceil_div(images * (q.in_bytes + (sums ? q.y_bytes : 0)) + 96, 128) * 128);
    int64_t const rest = kPlanesBegin + (sums ? 0 : 2 * images * q.y_bytes);
    int64_t const stages = (227 * 1024 / together - 1024 - rest) / q.stage_bytes;
    q.stages = int(min64(sums ? 2 : 3, stages));
    q.shared_bytes = rest + int64_t(q.stages) * q.stage_bytes;
    if (sums)
      q.shared_bytes =
          max64(q.shared_bytes, kPlanesBegin + int64_t(kPlanesWarps) * row.tile_m * 16 * (kStreamColumns + 1) * 4);
    if (stages < 2) return;
    q.used = true, q.together = together;
    int64_t const each = ceil_div(t.out_H, kPlanesWarps / channels), items = p.C / channels * ceil_div(p.N, images);
    double const steps = rows     ? (blocks != 2 ? double(each) : ceil_div(each, 2)) + 0.4 * (row.tile_m - 1)
                         : spread ? each / 2.0 + row.tile_m / 2
                                  : double(each - 1) * row.tile_k + row.tile_m;
    int64_t const sms = d.sm_count, most = sms * together;
    double const rounds = items <= most ? double(ceil_div(items, sms)) : double(ceil_div(items, most) * together);
    q.warps_ns = rounds * kPlanesWarps * (steps * row_steps + 120) / (4 * 1.755 * (together > 2 ? 0.62 : 0.57));
    if (t.planes.used && t.planes.warps_ns <= q.warps_ns) return;
    t.planes = q, t.images = images;
  };
  for (int images = int(min64(rows && !odd_rows ? 8 : 2 * half, p.N)); images > 0;
       images = images > half && row.tile_k == 2 ? half : 0) {
    for (int channels = 1; channels <= kPlanesWarps; channels *= 2) {
      // A run of a block's planes is a multiple of 16 bytes.
      if (channels * area % 8 != 0 || channels * out_area % 8 != 0 || p.C % channels != 0) continue;
      int const most_together = odd_rows ? kOddRowPlanesBlocks
                                : rows   ? row_planes_blocks(row.tile_m, row_blocks)
                                         : planes_blocks(row.tile_m, row.tile_k);
      for (int together = most_together; together > 1; --together) consider(channels, together, images);
    }
    if (t.planes.used) break;
  }
  if (!t.planes.used) return;
  t.origin = 0, t.shift = odd ? 0 : (t.pad_w % 2 + 2) % 2;
  t.pieces = 1, t.blocks = t.span = blocks, t.half = half;
  t.groups = ceil_div(p.N, t.images), t.stretches = kPlanesWarps / t.planes.channels;
  t.rows = int(ceil_div(t.out_H, t.stretches));
}

// Bytes of a band's channels and images, of up to `taken` rows of inputs. Whole planes of all channels are one run.
constexpr void set_runs(PlanesTile& q, StreamTile const& t, int taken) {
  q.run_channels = q.bands == 1 ? q.channels : 1;
  if (q.run_channels > 1) {
    q.channel_bytes = t.in_H * t.in_W * 2, q.channel_y_bytes = t.out_H * t.out_W * 2;
    q.in_bytes = run_bytes(q.channels * t.in_H, t.in_W), q.y_bytes = run_bytes(q.channels * t.out_H, t.out_W);
  } else {
    q.channel_bytes = run_bytes(int(min64(taken, t.in_H)), t.in_W);
    q.channel_y_bytes = run_bytes(q.band_rows, t.out_W);
    q.in_bytes = q.channels * q.channel_bytes, q.y_bytes = q.channels * q.channel_y_bytes;
  }
}

// The same for bands of rows of larger images, fprop and dgrad with stride 1: rows off what a copy of lanes takes, or
// wider than a warp's units.
constexpr void set_bands(StreamTile& t, Row const& row, Op op, Problem const& p, Device const& d) {
  bool const backward = op == Op::dgrad;
  int const size = row.tile_m;
  if (row.tile_k == 2) return;  // set_units
  Strides const& in = backward ? p.y : p.x;
  Strides const& out = backward ? p.x : p.y;
  int const align = backward ? p.y_align : p.x_align, out_align = backward ? p.x_align : p.y_align;
  if ((p.N < 4 && size <= 9) || t.in_H > kBandsMost || t.in_W > kBandsMost || t.out_H > kBandsMost ||
      t.out_W > kBandsMost)
    return;
  if (!whole_planes(in, align, t.in_H, t.in_W, 2) || !whole_planes(out, out_align, t.out_H, t.out_W, 2)) return;
  if (!bands_exist(p.C, t.in_H, t.in_W) || !bands_exist(p.C, t.out_H, t.out_W)) return;
  int const blocks = int(ceil_div(t.out_W, stream_columns(size)));
  bool const odd = t.in_W % 2 != 0 || stream_no_shift(row, p);
  int pieces = 1;
  while (pieces < kPlanesWarps && blocks > pieces * kStreamUnits) pieces *= 2;
  int const span = int(ceil_div(blocks, pieces)), half = span <= 8 ? 8 / span : 1;
  int const images = span <= 8 ? int(min64(2 * half, p.N)) : 1;
  if (span > kStreamUnits) return;
  // Longer than beside whole planes, as measured.
  double const row_steps = size > 9 ? 40.0 + (odd ? 10 : 0)
                                    : (planes_steps(row, false, false) + (!odd       ? 0
                                                                          : size < 9 ? 4
                                                                                     : 14)) *
                                          1.13;
  for (int channels = 1; channels * images <= 32 && channels * pieces <= kPlanesWarps; channels *= 2) {
    if (p.C % channels != 0) continue;
    int const stretches = kPlanesWarps / channels / pieces;
    for (int together = planes_blocks(size, 1); together > 1; --together) {
      // Two stages of inputs and two places of outputs, of as many rows as there is room for.
      int64_t const room = (227 * 1024 / together - 1024 - kPlanesBegin - 256) / (2 * images * channels);
      int64_t const beside = size * t.in_W * 2 + 60;
      int64_t const most = (room - beside) / (2 * t.out_W + 2 * t.in_W) / stretches;
      if (most < 1) continue;
      int64_t const least = ceil_div(t.out_H, most * stretches);
      for (int64_t count = max64(1, least - 1);
           count < least + 4 && (count <= least || t.out_H / count >= 2 * stretches); ++count) {
        PlanesTile q;
        int rows = int(ceil_div(t.out_H, count * stretches));
        rows = int(ceil_div(rows, stream_unit_rows(size))) * stream_unit_rows(size);
        q.used = true, q.odd = odd, q.channels = channels, q.together = together;
        q.band_rows = rows * stretches, q.bands = int(ceil_div(t.out_H, q.band_rows));
        set_runs(q, t, q.band_rows - 1 + size);
        if (images * channels / q.run_channels > 16) continue;  // copies, by one warp
        q.stage_bytes = int(ceil_div(images * q.in_bytes + 96, 128) * 128);
        int64_t const rest = kPlanesBegin + 2 * images * q.y_bytes;
        q.stages = int(min64(3, (227 * 1024 / together - 1024 - rest) / q.stage_bytes));
        if (q.stages < 2) continue;
        q.shared_bytes = rest + int64_t(q.stages) * q.stage_bytes;
        int64_t const items = p.C / channels * ceil_div(p.N, images) * q.bands;
        double const steps = rows - 1 + size;
        int64_t const sms = d.sm_count, slots = sms * together;
        double const rounds = items <= slots ? double(ceil_div(items, sms)) : double(ceil_div(items, slots) * together);
        q.warps_ns = rounds * kPlanesWarps * (steps * row_steps + 200) / (4 * 1.755 * (together > 2 ? 0.62 : 0.57));
        if (t.planes.used && t.planes.warps_ns <= q.warps_ns) continue;
        t.planes = q, t.stretches = q.bands * stretches, t.rows = rows;
      }
    }
  }
  if (!t.planes.used) return;
  t.origin = 0, t.shift = odd ? 0 : (t.pad_w % 2 + 2) % 2;
  t.pieces = pieces, t.blocks = blocks, t.span = span, t.half = half, t.images = images;
  t.groups = ceil_div(p.N, images);
}

// The same for units of several stretches, cuda/stream_units.cuh.
constexpr void set_units(StreamTile& t, Row const& row, Op op, Problem const& p, Device const& d) {
  bool const backward = op == Op::dgrad;
  bool const spread = backward && row.tile_k == 2;
  int const size = row.tile_m, step = spread ? 1 : row.tile_k;
  int const span = int(ceil_div(t.out_W, kStreamColumns * (spread ? 2 : 1)));
  Strides const& in = backward ? p.y : p.x;
  Strides const& out = backward ? p.x : p.y;
  int const align = backward ? p.y_align : p.x_align, out_align = backward ? p.x_align : p.y_align;
  bool const odd = t.in_W % 2 != 0;
  if (p.N < 4 || size > 9 || (spread && (odd ? size == 7 : t.out_W % 2 == 0))) return;
  if (!spread && step == 1) {
    // Pays where bands' warps, of which a power of two have a row, have ten units of 16 or fewer.
    int pieces = 1;
    while (pieces * kStreamUnits < span) pieces *= 2;
    if (pieces == 1 || span > 10 * pieces || odd || t.out_W % 2 != 0) return;
  }
  if (t.in_H > kBandsMost || t.in_W > kBandsMost || t.out_H > kBandsMost || t.out_W > kBandsMost) return;
  if (!whole_planes(in, align, t.in_H, t.in_W, 2) || !whole_planes(out, out_align, t.out_H, t.out_W, 2)) return;
  if (!bands_exist(p.C, t.in_H, t.in_W) || !bands_exist(p.C, t.out_H, t.out_W)) return;
  double const row_steps = spread ? 75.0 + 8 * size : (step == 1 ? 31.0 : 36.0) + 4.2 * size;
  int const unit = spread ? odd ? 4 : 2 : 1;  // of rows of a stretch
  // Rows of inputs of two rows of outputs, and of a band beside them.
  int const rows_in = spread ? 1 : 2 * step, beside = spread ? size / 2 + 2 : size;
  double best = 0;
  for (int channels = 1; channels <= kPlanesWarps; channels *= 2) {
    if (p.C % channels != 0) continue;
    int const units = kStreamUnits * kPlanesWarps / channels;
    for (int images = 1; images <= 32 && images <= p.N && span * images <= units; images *= 2) {
      int const stretches = units / (span * images);
      for (int together = spread ? kSpreadUnitsBlocks : planes_blocks(size, step); together > 1; --together) {
        // Two stages of inputs and two places of outputs, of as many rows as there is room for, or somewhat less.
        int64_t const room = (227 * 1024 / together - 1024 - kPlanesBegin - 256) / (2 * images * channels);
        int64_t const most = (room - beside * t.in_W * 2 - 60) * 2 / (4 * t.out_W + 2 * rows_in * t.in_W);
        if (most < 1) continue;
        int64_t const least = ceil_div(t.out_H, most);
        for (int64_t count = max64(1, least - 1); count < least + 2; ++count) {
          PlanesTile q;
          q.used = true, q.odd = odd, q.channels = channels, q.together = together, q.unit_stretches = stretches;
          q.band_rows = int(ceil_div(ceil_div(t.out_H, count), unit) * unit),
          q.bands = int(ceil_div(t.out_H, q.band_rows));
          int const rows = int(ceil_div(ceil_div(q.band_rows, stretches), unit) * unit);
          set_runs(q, t, spread ? q.band_rows / 2 + size / 2 + 2 : (q.band_rows - 1) * step + size);
          int const runs = images * channels / q.run_channels;
          if (runs > 32) continue;
          q.stage_bytes = int(ceil_div(images * q.in_bytes + 96, 128) * 128);
          int64_t const rest = kPlanesBegin + 2 * images * q.y_bytes;
          q.stages = int(min64(3, (227 * 1024 / together - 1024 - rest) / q.stage_bytes));
          if (q.stages < 2) continue;
          q.shared_bytes = rest + int64_t(q.stages) * q.stage_bytes;
          int64_t const items = p.C / channels * ceil_div(p.N, images) * q.bands, sms = d.sm_count,
                        slots = sms * together;
          double const rounds =
              items <= slots ? double(ceil_div(items, sms)) : double(ceil_div(items, slots) * together);
          double const steps = spread ? rows / 2 + size / 2 + 1 : (rows - 1) * step + size + 1;
          double const each = steps * row_steps + 250 + 12.0 * runs;
          q.warps_ns = rounds * kPlanesWarps * each / (4 * 1.755 * (together > 2 ? 0.62 : 0.57));
          // Rows that come twice, mostly from L2.
          double const twice =
              double(p.N) * double(p.C) * q.bands * double(spread ? size / 2 : max64(size - step, 0)) * t.in_W;
          double const ns = q.warps_ns * (q.bands > 1 ? 1.1 : 1.0) + twice / 3900 * 132 / d.sm_count;
          if (best != 0 && best <= ns) continue;
          best = ns, t.planes = q, t.images = images, t.rows = rows;
        }
      }
    }
  }
  if (!t.planes.used) return;
  t.origin = 0, t.shift = 0, t.pieces = 1, t.blocks = t.span = span, t.half = 1;
  t.groups = ceil_div(p.N, t.images), t.stretches = t.planes.bands;
}

// The same for wgrad by cuda/stream_sums.cuh, as measured: with stride 2; with stride 1 what the whole planes above
// don't take, but rows of whole 8 bytes of 7x7 up to 64 columns alone. Whole planes up to 64 columns (stride 2: 128) if
// they fit, else bands.
constexpr void set_sums(StreamTile& t, Row const& row, Problem const& p, Device const& d) {
  int const size = row.tile_m, stride = row.tile_k, half = size / 2, most = stride == 1 ? 64 : 128;
  if (t.in_H > kBandsMost || t.in_W > kBandsMost || t.out_H > kBandsMost || t.out_W > kBandsMost) return;
  // Rows of which eight lie in the same banks are slower; of 7x7 with stride 2 there is no other row.
  if (t.in_W % 32 == 0 && size <= 9 && (size < 7 || stride == 1)) return;
  if (!whole_planes(p.x, p.x_align, t.in_H, t.in_W, 2) || !whole_planes(p.y, p.y_align, t.out_H, t.out_W, 2)) return;
  SumsTile s;
  // The middle of the filter and column x0 meet a column of y, with stride 1 one that begins a word.
  s.x0 = (t.pad_w + half) % 2 != 0 ? -1 : 0;
  bool const odd = t.in_W % 2 != 0 || s.x0 != 0 || (stride == 1 && t.out_W % 2 != 0);
  if (stride == 1 && size <= 9 && (t.planes.used || (!odd && t.in_W % 4 == 0 && (size < 7 || t.in_W > most)))) return;
  s.twice = t.in_W - s.x0 <= 8, s.steps = s.twice ? 1 : int(ceil_div(t.in_W - s.x0, 16));
  // Between the first and the last step all columns that meet exist: these two have 7 of the image at least.
  if (s.steps > 2) s.x0 -= (16 * s.steps - (t.in_W - s.x0) + 1) / 4 * 2;
  if (size > 9 && s.steps > 2 && (s.x0 + 16 + t.pad_w < p.S - 1 || t.out_W < t.in_W + t.pad_w - 8)) return;
  s.y0 = (s.x0 + t.pad_w - half) / stride, s.zeros = 32 * s.steps + 32;
  if (t.in_H <= 16 && t.out_H <= 8) {
    s.rows = t.out_H, s.blocks = 1;
  } else {
    s.first = -t.pad_h, s.rows = (16 - size) / stride + 1;
    s.blocks = int(ceil_div(t.out_H, s.rows < 8 ? s.rows : 8)), s.rows = int(ceil_div(t.out_H, s.blocks));
  }
  int const area = t.in_H * t.in_W, out_area = t.out_H * t.out_W;
  double const step = 24.0 + 3 * size + (odd ? 16 : 0);
  int64_t const rest = kPlanesBegin + s.zeros, room = 227 * 1024 / sums_blocks(size) - 1024 - rest;
  bool const small = t.in_H <= most && t.in_W <= most && t.out_H <= most && t.out_W <= most;
  for (int channels = 1; small && channels <= kPlanesWarps; channels *= 2) {
    // A run of a block's planes is a multiple of 16 bytes.
    if (channels * area % 8 != 0 || channels * out_area % 8 != 0 || p.C % channels != 0) continue;
    PlanesTile q;
    q.channels = channels, q.odd = odd, q.together = sums_blocks(size);
    q.in_bytes = channels * area * 2, q.y_bytes = channels * out_area * 2;
    // Stages of some 20 KB, of whole pairs of images.
    int const each = 1 + s.twice, images = int(max64(1, 20480 / (q.in_bytes + q.y_bytes) / each) * each);
    int const all = int(min64(min64(images, 32), p.N));
    q.stage_bytes = int(ceil_div(all * (q.in_bytes + q.y_bytes) + 96, 128) * 128);
    q.stages = int(min64(4, room / q.stage_bytes));
    q.shared_bytes = max64(rest + int64_t(q.stages) * q.stage_bytes,
                           kPlanesBegin + int64_t(kPlanesWarps) * size * 16 * (kStreamColumns + 1) * 4);
    if (q.stages < 2) continue;
    q.used = true;
    double const tasks = double(p.N) * double(p.C) * s.blocks / (1 + s.twice);
    q.warps_ns = tasks * (32 + s.steps * step) / (4 * 1.755 * 0.6 * d.sm_count);
    t.planes = q, t.images = all, t.sums = s;
  }
  // Bands of rows of one image.
  bool const bands =
      !t.planes.used && t.in_H > 8 && bands_exist(p.C, t.in_H, t.in_W) && bands_exist(p.C, t.out_H, t.out_W);
  s.first = -t.pad_h, s.twice = 0;
  for (int channels = kPlanesWarps; bands && channels > 0; channels /= 2) {
    if (p.C % channels != 0) continue;
    int const parts = kPlanesWarps / channels, turn = (16 - size) / stride + 1;
    // Two stages of as many rows as there is room for, or somewhat less.
    int64_t const bytes = room / 2 / channels - 2 * size * t.in_W - 192;
    int64_t const most_rows = bytes / (2 * (t.in_W * stride + t.out_W));
    if (most_rows < 1) continue;
    int64_t const least = ceil_div(t.out_H, most_rows);
    for (int64_t count = max64(1, least - 1); count < least + 4 && count <= t.out_H; ++count) {
      PlanesTile q;
      q.used = true, q.channels = channels, q.odd = odd, q.together = sums_blocks(size);
      q.band_rows = int(ceil_div(t.out_H, count)), q.bands = int(ceil_div(t.out_H, q.band_rows));
      q.channel_bytes = run_bytes(int(min64((q.band_rows - 1) * stride + size, t.in_H)), t.in_W);
      q.channel_y_bytes = run_bytes(q.band_rows, t.out_W);
      q.in_bytes = channels * q.channel_bytes, q.y_bytes = channels * q.channel_y_bytes;
      q.stage_bytes = int(ceil_div(q.in_bytes + q.y_bytes + 96, 128) * 128);
      q.stages = int(min64(4, room / q.stage_bytes));
      if (q.stages < 2) continue;
      q.shared_bytes = max64(rest + int64_t(q.stages) * q.stage_bytes,
                             kPlanesBegin + int64_t(kPlanesWarps) * size * 16 * (kStreamColumns + 1) * 4);
      s.blocks = int(ceil_div(q.band_rows, turn < 8 ? turn : 8)), s.rows = int(ceil_div(q.band_rows, s.blocks));
      // The warps that have most products, and rows that come twice, mostly from L2.
      double const items = double(p.N) * double(p.C) / channels * q.bands;
      double const turns = double(ceil_div(s.blocks, parts)) * (32 + s.steps * step) + 200;
      double const more = items * q.in_bytes - double(p.N) * double(p.C) * area * 2;
      q.warps_ns = (items * kPlanesWarps * turns / (4 * 1.755 * 0.6) + more / 3900 * 132) / d.sm_count;
      q.warps_ns *= parts == 8 ? 1.3 : parts == 4 ? 1.1 : 1.0;  // many warps of a plane, as measured
      if (t.planes.used && t.planes.warps_ns <= q.warps_ns) continue;
      t.planes = q, t.images = 1, t.sums = s;
    }
  }
  if (!t.planes.used) return;
  t.pieces = 1, t.blocks = t.span = int(ceil_div(t.out_W, kStreamColumns));
  t.groups = ceil_div(p.N, t.images), t.stretches = t.planes.bands;
  t.rows = t.planes.band_rows > 0 ? t.planes.band_rows : t.out_H;
}

constexpr StreamTile stream_tile(Row const& row, Op op, Problem const& p, Device const& d) {
  StreamTile t;
  bool const backward = op == Op::dgrad;
  int const stride = row.tile_k;
  // dgrad with stride 2: a unit is 16 columns of x, which meet 16 columns of y as with stride 1.
  bool const spread = backward && stride == 2;
  int const columns = kStreamColumns * (spread ? 1 : stride), unit_W = kStreamColumns * (spread ? 2 : 1);
  t.in_H = int(backward ? p.P() : p.H), t.in_W = int(backward ? p.Q() : p.W);
  t.out_H = int(backward ? p.H : p.P()), t.out_W = int(backward ? p.W : p.Q());
  t.pad_h = int(backward && !spread ? p.R - 1 - p.pad_top : p.pad_top);
  t.pad_w = int(spread ? (p.S - 1) / 2 - p.pad_left / 2 : backward ? p.S - 1 - p.pad_left : p.pad_left);
  Strides const& in = backward ? p.y : p.x;
  Strides const& out = backward ? p.x : p.y;
  int const align = backward ? p.y_align : p.x_align, out_align = backward ? p.x_align : p.y_align;
  if (row.tile_m <= 9 && (op != Op::wgrad || stride == 1)) set_planes(t, row, op, p, d);
  if (op == Op::wgrad) set_sums(t, row, p, d);
  if (t.planes.used) return t;
  // A unit's 16 * stride inputs begin on a multiple of a copy; the taps of its last output end with the last.
  for (int width = 4;; width /= 2) {
    int const width_out = op == Op::wgrad ? width : width == 1 ? 1 : spread ? 4 : 2;
    t.width = width, t.shift = ((-t.pad_w) % width + width) % width;
    t.origin = !spread && 7 * stride + p.S + t.shift > 16 * stride ? 2 : 0, t.shift -= t.origin * stride;
    bool const takes = stream_aligned(in, align, width * 2, 2) && t.in_W % width == 0;
    bool const stores = stream_aligned(out, out_align, width_out * 2, 2) && t.out_W % width_out == 0;
    // With stride 2 24 inputs are multiplied.
    bool const meets = spread || op == Op::wgrad || stride == 1 ? t.shift >= 0 : 14 + p.S + t.shift <= 24;
    if (width == 1 || (takes && stores && t.origin % width_out == 0 && meets)) break;
  }
  t.blocks = int(ceil_div(t.out_W + t.origin, unit_W));
  t.pieces = ceil_div(t.blocks, t.width == 4 ? 16 : 15);
  t.span = int(ceil_div(t.blocks, t.pieces));
  // What of a piece's columns is in the image; of a single piece, no more.
  int const base = -t.origin * stride - t.pad_w - t.shift, end = base + (t.span + 1) * columns;
  t.first = t.pieces == 1 && base < 0 ? 0 : base;
  t.copies = int(max64(1, ceil_div((t.pieces == 1 && end > t.in_W ? t.in_W : end) - t.first, t.width)));
  t.copies_y = int(ceil_div(t.pieces == 1 ? t.out_W + t.origin : t.span * kStreamColumns, t.width));
  t.half = t.span <= 8 ? 8 / t.span : 1;
  int const images = t.span <= 8 ? 2 * t.half : 1;
  int const most = 32 * stream_passes(spread ? 1 : stride, t.width, op == Op::wgrad) / t.copies;
  t.images = int(min64(images, most));
  if (op != Op::wgrad && (t.width == 1 || t.pieces > 1 || (t.width == 4 && most < images) || row.tile_m > 9)) {
    set_units(t, row, op, p, d);
    if (!t.planes.used) set_bands(t, row, op, p, d);
    if (!t.planes.used && row.tile_m <= 9) set_ring(t, row, op, p, d);
    return t;
  }
  t.groups = ceil_div(p.N, t.images);
  double const slots = double(d.sm_count) * kStreamWarps * stream_blocks(row.tile_m, stride, t.width);
  t.rows = stream_rows(t.out_H, stride, row.tile_m, double(t.groups) * double(t.pieces) * double(p.C), slots);
  t.stretches = ceil_div(t.out_H, t.rows);
  return t;
}

// f32, fprop and dgrad: a unit is `width` columns of outputs, and a warp's lanes have units for 128 columns of one
// channel. A team of up to kStreamWarps warps has a row.
struct StreamLanesTile {
  int in_H = 0, in_W = 0, out_H = 0, out_W = 0;
  int pad_h = 0, pad_w = 0;  // input coordinate = output coordinate - pad + tap; may be negative
  int width = 1, shift = 0;  // shift: columns from the first of a unit's inputs to its first tap
  int span = 1, images = 1;  // units of a piece of a row; images of a team
  int rows = 1;              // of outputs, in a stretch that a team walks down
  int64_t pieces = 1, stretches = 1, groups = 1;
  RingTile ring;

  constexpr int64_t walks() const { return pieces * stretches * groups; }  // of a channel
};

inline constexpr int kStreamLanes = 128;

// Blocks of an SM, as the registers allow.
constexpr int ring_f32_blocks(int R, int S) { return R * S <= 9 ? 6 : R * S <= 25 ? 5 : 4; }

constexpr StreamLanesTile stream_lanes_tile(int size, Op op, Problem const& p, Device const& d) {
  StreamLanesTile t;
  bool const backward = op == Op::dgrad;
  t.in_H = int(backward ? p.P() : p.H), t.in_W = int(backward ? p.Q() : p.W);
  t.out_H = int(backward ? p.H : p.P()), t.out_W = int(backward ? p.W : p.Q());
  t.pad_h = int(backward ? p.R - 1 - p.pad_top : p.pad_top);
  t.pad_w = int(backward ? p.S - 1 - p.pad_left : p.pad_left);
  Strides const& in = backward ? p.y : p.x;
  Strides const& out = backward ? p.x : p.y;
  int const align = backward ? p.y_align : p.x_align, out_align = backward ? p.x_align : p.y_align;
  bool const pairs =
      stream_aligned(in, align, 8, 4) && stream_aligned(out, out_align, 8, 4) && t.out_W % 2 == 0 && t.in_W % 2 == 0;
  t.width = pairs ? 2 : 1, t.shift = pairs ? (t.pad_w % 2 + 2) % 2 : 0;
  int const units = kStreamLanes / t.width, all = int(ceil_div(t.out_W, t.width)), window = size + 3;
  t.pieces = ceil_div(all, kStreamWarps * units), t.span = int(ceil_div(all, t.pieces));
  bool const whole = t.pieces == 1 && t.in_W <= kStreamWarps * kStreamLanes + 64 && (t.in_H == 1 || in.h == t.in_W);
  int const warps = ring_warps(t.span, units);
  t.images = whole && warps == 1 ? int(min64(min64(units / t.span, 32), p.N)) : 1;
  t.groups = ceil_div(p.N, t.images);
  int const blocks = ring_f32_blocks(int(p.R), int(p.S));
  double const walks = double(t.groups) * double(t.pieces) * double(p.C);
  t.rows = stream_rows(t.out_H, 1, size, walks, double(d.sm_count) * ring_teams(warps) * blocks);
  t.stretches = ceil_div(t.out_H, t.rows);
  int const turn = size == 7 && p.R <= 3 ? 3 : size;
  // Larger filters have no time left for a ring of outputs (docs/tuning.md).
  int const out_bytes = size == 3 ? ring_out_bytes(out, t.out_H, t.out_W, warps, t.pieces, turn, 4) : 0;
  t.ring = ring_tile(stream_ring(in, t.in_W, (t.span - 1) * t.width + window, t.width, t.span, window, t.images, whole,
                                 4, out_bytes > 0 ? 4 : 8),
                     warps, t.images, out_bytes, int(min64(t.in_H, t.rows - 1 + size)), turn, blocks);
  return t;
}

// f32, wgrad. A lane has 4 columns of y, and the inputs 4 columns on; its neighbours have the others.
struct StreamF32Tile {
  int in_H = 0, in_W = 0, out_H = 0, out_W = 0;
  int pad_h = 0, pad_w = 0;           // input coordinate = coordinate of y - pad + tap
  int origin = 0;                     // the first lane's columns begin so many before the first
  int shift = 0;                      // of the 12 inputs of a lane and its neighbours, the first tap's
  int width = 1;                      // elements of one load
  int quads = 1, pieces = 1;          // of columns in a piece of a row; pieces of a row
  int slots = 1, planes = 1;          // lanes for a piece, with those that hold its halo; planes of a warp
  int rows = 1;                       // of y, in a stretch that a warp walks down
  int64_t stretches = 1, groups = 1;  // of an image; of `planes` planes

  constexpr int64_t walks() const { return stretches * pieces * groups; }  // of a channel
};

// Blocks of an SM, as the registers allow.
constexpr int stream_f32_blocks(int R, int S) {
  return R <= 3 && S <= 3 ? 6 : R <= 5 && S <= 5 ? 4 : R <= 3 || S <= 3 ? 4 : 3;
}

constexpr StreamF32Tile stream_f32_tile(int size, Problem const& p, Device const& d) {
  StreamF32Tile t;
  t.in_H = int(p.H), t.in_W = int(p.W), t.out_H = int(p.P()), t.out_W = int(p.Q());
  t.pad_h = int(p.pad_top), t.pad_w = int(p.pad_left);
  for (int width = 4; width > 1 && t.width == 1; width /= 2)
    if (stream_aligned(p.x, p.x_align, width * 4, 4) && t.in_W % width == 0) t.width = width;
  t.shift = ((-t.pad_w) % t.width + t.width) % t.width;
  if (size + t.shift > 9) t.origin = 2, t.shift -= 2;  // the last tap of the last column is one of the 12
  int const all = int(ceil_div(t.out_W + t.origin, 4));
  t.pieces = int(ceil_div(all, 30)), t.quads = int(ceil_div(all, t.pieces));
  // One lane between two rows where what it holds for both is zero.
  int const first = 4 - t.origin - t.pad_w - t.shift;
  bool const zeros = t.pieces == 1 && first <= 0 && first + 4 * all >= t.in_W;
  t.slots = t.quads + (zeros ? 1 : 2);
  t.planes = 32 / t.slots;
  t.groups = ceil_div(p.N, t.planes);
  double const slots = double(d.sm_count) * kStreamWarps * stream_f32_blocks(int(p.R), int(p.S));
  t.rows = stream_rows(t.out_H, 1, size, double(t.groups) * t.pieces * double(p.C), slots);
  t.stretches = ceil_div(t.out_H, t.rows);
  return t;
}

// f32, whole planes of small images: cuda/stream_planes_f32.cuh. A unit is `width` columns of outputs (wgrad: of y) of
// one image; dgrad with stride 2: 2.
struct PlanesF32Tile {
  int in_H = 0, in_W = 0, out_H = 0, out_W = 0;
  int pad_h = 0, pad_w = 0;  // as in StreamTile
  int width = 1, shift = 0;  // shift: columns from the first of a unit's inputs to its first tap
  int span = 1, slots = 1;   // units of a row; lanes from one image's to the next one's
  int images = 1;            // of a warp
  PlanesTile planes;
};

// Blocks of an SM, as the registers allow.
constexpr int planes_f32_blocks(int R) { return R == 3 ? 3 : 2; }

// Units of a lane.
constexpr int planes_f32_units(int width) { return width == 2 ? 1 : 2; }

constexpr PlanesF32Tile planes_f32_tile(int size, Op op, Problem const& p, Device const& d) {
  PlanesF32Tile t;
  bool const backward = op == Op::dgrad, sums = op == Op::wgrad;
  int const stride = int(p.stride_h);
  bool const spread = backward && stride == 2;
  t.in_H = int(backward ? p.P() : p.H), t.in_W = int(backward ? p.Q() : p.W);
  t.out_H = int(backward ? p.H : p.P()), t.out_W = int(backward ? p.W : p.Q());
  t.pad_h = int(backward && !spread ? p.R - 1 - p.pad_top : p.pad_top);
  t.pad_w = int(backward && !spread ? p.S - 1 - p.pad_left : p.pad_left);
  Strides const& in = backward ? p.y : p.x;
  Strides const& out = backward ? p.x : p.y;
  int const align = backward ? p.y_align : p.x_align, out_align = backward ? p.x_align : p.y_align;
  if (p.R != size || p.S != size || (p.N < 4 && !sums)) return t;
  if (t.in_H > 64 || t.in_W > 64 || t.out_H > 64 || t.out_W > 64) return t;
  if (!whole_planes(in, align, t.in_H, t.in_W, 4) || !whole_planes(out, out_align, t.out_H, t.out_W, 4)) return t;
  int const area = t.in_H * t.in_W, out_area = t.out_H * t.out_W;
  bool const pairs = spread || (t.in_W % 2 == 0 && (stride == 2 || t.out_W % 2 == 0));
  t.width = pairs ? 2 : 1, t.shift = pairs && !spread ? (t.pad_w % 2 + 2) % 2 : 0;
  t.span = int(ceil_div(t.out_W, t.width)), t.slots = t.span;
  // Lanes of an image that are a power of two meet no other image's banks.
  for (int slots = 1; slots <= 32; slots *= 2)
    if (slots >= t.span && 8 * t.span >= 7 * slots) t.slots = slots;
  // From an image to the next: so that lanes read different banks.
  auto pitch = [&](int bytes, int unit_bytes) {
    int const apart = int(ceil_div(t.slots * unit_bytes, 16)) * 16 % 128;
    bytes = int(ceil_div(bytes, 16) * 16);
    while (bytes % 128 != apart) bytes += 16;
    return bytes;
  };
  int const in_bytes = spread ? 4 : 4 * t.width * stride, out_bytes = 4 * t.width;
  double const loads = spread ? (p.S + 1) / 2 : double(ceil_div((t.width - 1) * stride + p.S + t.shift, t.width));
  double const unit = loads * (1 + t.width) + double(p.R) * double(p.S) * (spread ? 1 : double(t.width) / stride) +
                      (spread ? 8 : 4.0 / stride);
  int const units = planes_f32_units(t.width);
  t.images = int(min64(min64(32 * units / t.slots, 32), p.N));  // a lane copies an image
  if (t.images == 0) return t;
  for (int channels = 1; channels <= kPlanesWarps; channels *= 2) {
    // A run of a block's planes is a multiple of 16 bytes.
    if (channels * area % 4 != 0 || channels * out_area % 4 != 0 || p.C % channels != 0) continue;
    for (int together = planes_f32_blocks(size); together > 1; --together) {
      PlanesTile q;
      q.channels = channels;
      q.in_bytes = pitch(channels * area * 4, in_bytes), q.y_bytes = pitch(channels * out_area * 4, out_bytes);
      // Windows reach beyond a row's ends.
      q.stage_bytes = int(ceil_div(t.images * (q.in_bytes + (sums ? q.y_bytes : 0)) + 96, 128) * 128);
      int64_t const rest = kPlanesBegin + (sums ? 0 : 2 * t.images * q.y_bytes);
      int64_t const stages = (227 * 1024 / together - 1024 - rest) / q.stage_bytes;
      if (stages < 2) continue;
      q.stages = int(min64(3, stages)), q.shared_bytes = rest + int64_t(q.stages) * q.stage_bytes;
      if (sums) q.shared_bytes = max64(q.shared_bytes, kPlanesBegin + kPlanesWarps * size * size * 4);
      q.used = true, q.together = together;
      int64_t const rows = ceil_div(t.out_H, kPlanesWarps / channels), items = p.C / channels * ceil_div(p.N, t.images);
      double const steps = spread ? rows / 2.0 + size / 2 : min64((rows - 1) * stride + size, t.in_H);
      int64_t const sms = d.sm_count, most = sms * together;
      double const rounds = items <= most ? double(ceil_div(items, sms)) : double(ceil_div(items, most) * together);
      q.warps_ns = rounds * kPlanesWarps * (steps * (12 + units * unit) + 250) / (4 * 1.755 * (sums ? 0.78 : 1.0));
      if (t.planes.used && t.planes.warps_ns <= q.warps_ns) continue;
      t.planes = q;
    }
  }
  return t;
}

}  // namespace conv2d_ext
