// Depthwise wgrad of few pixels in one launch (cuda/depthwise_few_sums.cuh): which, its tile, shared by the planner and
// the launcher, and what it costs.
#pragma once

#include "single.h"

namespace conv2d_ext {

inline constexpr int kFewSumsThreads = 512, kFewSumsColumns = 4;  // of a block, at most; of y, of a thread at a time
inline constexpr int64_t kFewSumsBytes = 220 * 1024;              // of shared memory
inline constexpr int64_t kFewSumsWhole = 100 * 1024;              // of it, up to which all images are one stage
inline constexpr int64_t kFewSumsStage = 48 * 1024;               // of it, of one of several stages
inline constexpr int64_t kFewSumsPart = 12 * 1024;                // of it, from which pixels are shared out
inline constexpr int64_t kFewSumsBlocks = 132;                    // that are there at a time
inline constexpr int64_t kFewSumsExtent = 1 << 14;                // strides, dilations, padding and taps, at most
inline constexpr int64_t kFewSumsPhases = 64;                     // dilations of columns, at most

constexpr bool is_few_sums(Row const& row) {
  return row.family == Family::depthwise && row.op == Op::wgrad && row.tile_m == 0 && row.tile_n == kFewSumsColumns;
}

struct FewSumsTile {
  bool used = false;
  int taps = 3;                 // of a thread, of a row of the filter
  int units = 1, chunks = 1;    // runs of taps of the filter, of a block; of a row of it
  int slices = 1;               // of the filter: blocks that have the same channels and pixels
  int shares = 1, bands = 1;    // of the images; of an image's rows: a cluster's blocks
  int share = 1, band = 1;      // images of one; rows of y of one
  int rows = 1;                 // of x, that a band meets
  int images = 1, stages = 1;   // of a stage; of a block
  int piece = 16;               // bytes of a pixel that are copied together
  int channels = 8, lanes = 4;  // of a block, 16 bytes; threads that have them, 4 bytes each
  int phases = 1;               // of a row: columns as far apart as taps are, which lie side by side in shared memory
  int phase = 1, phase_y = 1;   // pixels of one, with zeros beside it
  int pitch = 1, pitch_y = 1;   // of a row: pixels
  int segments = 1, each = 1;   // of a row of y; columns of one
  int groups = 1;               // threads for each run of taps of a channel: they share the segments
  int threads = 32;             // of a block
  int64_t bytes_x = 0, bytes_y = 0, sums = 0, shared_bytes = 0;  // of a stage; numbers of a block; in all
};

// Do pixels take pieces of so many bytes?
constexpr bool few_sums_pieces(Strides const& s, int align, int64_t C, int bytes, DType t) {
  constexpr int64_t most = int64_t(1) << 30;  // of bytes, a quarter
  int const vector = bytes / size_of(t);
  return vector > 0 && max64(max64(s.n, s.c), max64(s.h, s.w)) < most && channel_vectors(s, align, C, vector, t);
}

constexpr FewSumsTile few_sums_tile(Problem const& p) {
  FewSumsTile t;
  int const size = size_of(p.dtype), vector = 16 / size;
  int64_t const P = p.P(), Q = p.Q();
  if (p.C_per_group() != 1 || p.K != p.C || p.dtype == DType::f64) return t;
  if (p.N <= 0 || p.C <= 0 || p.H <= 0 || p.W <= 0 || P <= 0 || Q <= 0) return t;
  t.phases = p.S > 1 ? int(min64(p.dilation_w, kFewSumsPhases + 1)) : 1;
  if (p.stride_w > 2 || (t.phases > 1 && (p.stride_w > 1 || t.phases > kFewSumsPhases))) return t;
  if (max64(p.stride_h, p.dilation_h) > kFewSumsExtent || max64(p.pad_top, p.pad_left) > kFewSumsExtent ||
      max64(p.R, p.S) > kFewSumsExtent)
    return t;
  if (p.N > 1 << 16 || (double(p.H) * double(p.W + p.S) + double(P) * double(Q)) * size > double(kFewSumsBytes))
    return t;
  auto pieces = [&](int bytes) {
    return few_sums_pieces(p.x, p.x_align, p.C, bytes, p.dtype) && few_sums_pieces(p.y, p.y_align, p.C, bytes, p.dtype);
  };
  while (t.piece > 2 && !pieces(t.piece)) t.piece /= 2;
  if (t.piece < 4) return t;
  t.channels = vector;
  t.taps = p.S == 1 ? 1 : p.S <= 3 ? 3 : p.S <= 5 || p.S == 9 || p.S == 10 ? 5 : 7;
  t.chunks = int(ceil_div(p.S, t.taps));
  // One round of blocks: clusters of up to eight that share pixels, then slices of the filter.
  int64_t const columns = ceil_div(ceil_div(Q, t.phases), kFewSumsColumns), padded = columns * kFewSumsColumns;
  // Odd: rows meet different banks.
  t.phase = int((padded - 1) * p.stride_w + t.chunks * t.taps), t.phase_y = int(padded);
  t.pitch = t.phases * t.phase | 1, t.pitch_y = t.phases * t.phase_y + 1;
  int64_t const line = t.channels * size, wanted = kFewSumsBlocks / ceil_div(p.C, t.channels);
  auto share_out = [&](int64_t parts) {
    t.shares = 1, t.bands = 1;
    while (t.shares * 2 <= parts && t.shares * 2 <= p.N) t.shares *= 2;
    while (t.shares * t.bands * 2 <= parts && t.bands * 2 <= P) t.bands *= 2;
    t.share = int(ceil_div(p.N, t.shares)), t.band = int(ceil_div(P, t.bands));
    t.rows = int(min64(p.H, (t.band - 1) * p.stride_h + (p.R - 1) * p.dilation_h + 1));
  };
  auto image_bytes = [&] { return line * (int64_t(t.rows) * t.pitch + int64_t(t.band) * t.pitch_y); };
  share_out(1);
  for (int64_t parts = 2; parts <= min64(8, wanted); parts *= 2)
    if (t.share * image_bytes() >= kFewSumsPart) share_out(parts);
  int64_t const image = image_bytes();
  t.images = int(t.share * image <= kFewSumsWhole ? t.share : max64(1, kFewSumsStage / image));
  t.stages = int(ceil_div(t.share, t.images)), t.images = int(ceil_div(t.share, t.stages));
  // Threads for all runs of taps of a slice.
  int64_t const runs = p.R * t.chunks, lines = t.images * t.band, most = kFewSumsThreads / t.lanes;
  int64_t const slices = max64(min64(runs, wanted / (t.shares * t.bands)), ceil_div(runs, most));
  int64_t const units = ceil_div(runs, max64(1, slices));
  t.units = int(units), t.slices = int(ceil_div(runs, units));
  // Segments whose threads have as little to do as can be; one begins with what takes a step's time.
  int64_t least = 0;
  for (int64_t segments = 1; segments <= columns && segments <= most / units; ++segments) {
    int64_t const each = ceil_div(columns, segments), items = lines * t.phases * ceil_div(columns, each);
    int64_t const rows = ceil_div(items, most / units), cost = rows * (each + 1);
    if (least > 0 && cost >= least) continue;
    least = cost, t.each = int(each * kFewSumsColumns), t.segments = int(t.phases * ceil_div(columns, each));
    t.groups = int(ceil_div(items, rows));
  }
  t.bytes_x = line * t.images * t.rows * t.pitch, t.bytes_y = line * t.images * t.band * t.pitch_y;
  t.sums = units * t.taps * t.channels;
  // The threads' sums lie where the stages were, the blocks' behind them.
  t.shared_bytes = max64((t.bytes_x + t.bytes_y) * (t.stages > 1 ? 2 : 1), t.groups * t.sums * 4) +
                   (t.shares * t.bands > 1 ? t.shares * t.bands * t.sums * 4 : 0);
  if (t.shared_bytes > kFewSumsBytes) return t;
  int64_t const workers = int64_t(t.lanes) * t.units * t.groups, copies = (t.bytes_x + t.bytes_y) / 16;
  t.threads = int(min64(kFewSumsThreads, ceil_div(max64(max64(64, workers), ceil_div(copies, 4)), 32) * 32));
  t.used = true;
  return t;
}

constexpr bool few_sums_supports(Row const& row, Problem const& p) {
  return single_supports(row, p) || few_sums_tile(p).used;
}

// Rounds of blocks, whose threads' items follow each other; all warps' instructions; bytes, which the slices of the
// filter read anew. Fitted to 349 times.
constexpr Estimate few_sums_estimate(Row const& row, Problem const& p, Device const& d) {
  if (single_supports(row, p)) return single_estimate(row.op, p);
  FewSumsTile const t = few_sums_tile(p);
  double const V = 4.0 / size_of(p.dtype), steps = double(t.each) / kFewSumsColumns;
  double const items = double(t.stages) * double(ceil_div(t.images * t.band * t.segments, t.groups));
  double const instructions = (kFewSumsColumns + 1) * V * t.taps + 26;
  int64_t const blocks = ceil_div(p.C, t.channels) * t.slices * t.shares * t.bands,
                rounds = ceil_div(blocks, d.sm_count);
  double const share = double(blocks) / d.sm_count;
  double const bytes = double(t.stages) * double(t.bytes_x + t.bytes_y) * (share > 1 ? share : 1);
  double const issue = double(rounds) * t.threads / 32 * items * (steps * instructions + 45) / 4 / 1.755;
  double const chain = items * (steps * instructions + 60) * 2.5 / 1.755;
  double const copy = (t.stages > 1 && t.piece == 4 && p.C * size_of(p.dtype) > 128 ? 0.11 : 0.0545) * bytes,
               work = issue > chain ? issue : chain;
  double const most = copy > work ? copy : work, least = copy + work - most;
  double const all = (t.stages > 1 ? 0.813 * most + 1.078 * least : copy + work) + (t.shares * t.bands > 1 ? 980 : 0);
  // Clusters of four and eight leave some SMs of a GPC without work: beyond so many blocks there are two rounds.
  bool const twice = t.shares * t.bands >= 4 && rounds == 1 && blocks > 120 * d.sm_count / 132;
  return {twice ? 5290 + 1.843 * all : 6290 + all, 1};
}

}  // namespace conv2d_ext
