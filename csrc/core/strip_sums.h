// The tile of cuda/strip_sums.cuh for a problem: shared by the planner and the launcher.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

inline constexpr int kSumsChunk = 8;      // neighbouring columns of y that a thread has at a time
inline constexpr int kSumsThreads = 512;  // of a block, at most
inline constexpr int kSumsMostTaps = 32;  // of a row or column of the filter
inline constexpr int kSumsShared = 220 * 1024;

// Elements of 16 bytes of a row in shared memory; a gap behind every eighth, so that lanes which read every second of
// them read different banks.
constexpr int sums_place(int unit) { return unit + unit / 8; }

struct StripSumsTile {
  int units_r = 1, units_s = 1, chunks = 1;  // blocks of taps; of columns of y
  int slots = 1, warps = 1;                  // shares of the rows: of a warp's lanes; warps of a block of rows of taps
  int channels = 1, images = 1, parts = 1;   // of a block: a share is a part of an image's rows
  int rows = 1, y_rows = 1;                  // of x and of y, in a step
  int x_pitch = 0, y_pitch = 0, x_bytes = 0, y_bytes = 0, stages = 1;
  int64_t tiles_h = 1, tiles_w = 1, channel_units = 1, image_units = 1, shared_bytes = 0;

  constexpr int64_t steps() const { return image_units * tiles_h * tiles_w; }
  constexpr int threads() const { return channels * units_r * warps * 32; }
};

// A thread has tile_m x tile_n taps.
constexpr StripSumsTile strip_sums_tile(Problem const& p, int tile_m, int tile_n, bool nhwc) {
  StripSumsTile t;
  t.units_r = int(ceil_div(p.R, tile_m)), t.units_s = int(ceil_div(p.S, tile_n));
  int64_t const all = ceil_div(p.Q(), kSumsChunk), most = max64(1, min64(8, 32 / t.units_s));
  t.tiles_w = ceil_div(all, most), t.chunks = int(ceil_div(all, t.tiles_w)), t.tiles_w = ceil_div(all, t.chunks);
  t.slots = 32 / (t.units_s * t.chunks);
  t.tiles_h = ceil_div(p.H, 64), t.rows = int(ceil_div(p.H, t.tiles_h));
  t.y_rows = int(min64(p.P(), t.rows + p.R - 1));
  t.warps = int(max64(1, min64(8 / t.units_r, t.rows / (4 * t.slots))));
  int const shares = t.slots * t.warps;
  while (shares % (2 * t.images) == 0 && 2 * t.images <= p.N && t.rows * t.images < 6 * shares) t.images *= 2;
  t.parts = shares / t.images;
  // Reads go on to the next whole 16 bytes behind the last column.
  int const window = (kSumsChunk + tile_n - 1 + 3) / 4;
  t.x_pitch = 4 * sums_place(t.chunks * 2 + (t.units_s - 1) * tile_n / 4 + window);
  t.y_pitch = 4 * sums_place(t.chunks * 2 + 1);
  t.x_bytes = t.rows * t.x_pitch * 4, t.y_bytes = t.y_rows * t.y_pitch * 4;
  t.channels = 1;
  while (nhwc && t.channels < 4 && t.channels * 2 <= p.C && t.threads() * 2 <= kSumsThreads &&
         4 * t.channels * t.images * (t.x_bytes + t.y_bytes) <= kSumsShared)
    t.channels *= 2;
  t.channel_units = ceil_div(p.C, t.channels), t.image_units = ceil_div(p.N, t.images);
  int64_t const stage = int64_t(t.channels) * t.images * (t.x_bytes + t.y_bytes);
  t.stages = 2 * stage <= (t.threads() > 256 ? kSumsShared : kSumsShared / 2) ? 2 : 1;
  int64_t const sums = int64_t(t.threads()) * tile_m * tile_n * 4;
  t.shared_bytes = max64(t.stages * stage, sums) + t.y_pitch * 4;
  return t;
}

constexpr bool is_strip_sums(Row const& row) { return row.family == Family::strip && row.op == Op::wgrad; }

constexpr bool strip_sums_supports(Row const& row, Problem const& p) {
  if (p.P() == 0 || p.Q() == 0 || p.R == 0 || p.S == 0 || p.R > kSumsMostTaps || p.S > kSumsMostTaps) return false;
  if (!unit_stride_depthwise(row, p) || max64(p.R, p.S) <= 7) return false;  // smaller ones are the walks'
  if (row.tile_n % 4 != 0 && p.S > row.tile_n) return false;                 // blocks of taps begin on 16 bytes
  StripSumsTile const t = strip_sums_tile(p, row.tile_m, row.tile_n, is_nhwc(row.variant));
  double const steps = double(t.image_units) * double(t.tiles_h) * double(t.tiles_w);
  return t.shared_bytes <= kSumsShared + 4096 &&
         t.threads() <= (is_nhwc(row.variant) ? kSumsThreads : kSumsThreads / 2) && steps < double(1 << 30) &&
         double(t.channel_units) * 4096 < double(1 << 30);
}

// As measured.
constexpr Estimate strip_sums_estimate(Row const& row, Problem const& p, Device const& d) {
  bool const nhwc = is_nhwc(row.variant);
  StripSumsTile const t = strip_sums_tile(p, row.tile_m, row.tile_n, nhwc);
  double const sums = double(p.K) * double(p.R) * double(p.S), taps = row.tile_m * row.tile_n;
  double met = 0;  // rows of x that a block of rows of taps meets
  for (int unit = 0; unit < t.units_r; ++unit) {
    int64_t const r0 = int64_t(unit) * row.tile_m;
    met += double(max64(0, min64(p.H, p.P() - p.pad_top + r0 + row.tile_m - 1) - max64(0, r0 - p.pad_top)));
  }
  met /= t.units_r;
  // Instructions of a warp in a step; an SM's registers hold 16 warps.
  double const warp = met * t.rows / double(p.H) / t.parts * (taps * kSumsChunk + 12 + row.tile_n) + row.tile_m + 20;
  int64_t const fit = kSumsShared / (t.shared_bytes + 1024), blocks_of_warps = 512 / t.threads();
  int64_t const together = max64(1, min64(fit, blocks_of_warps));
  double const elements = double(p.N) * double(p.C) * (double(p.H) * double(p.W) + double(p.P()) * double(p.Q()));
  double const sectors = !nhwc || t.channels == 4 ? 1.0 : t.channels == 2 ? 1.62 : 2.64;
  double const memory_ns = elements * 4 / 3500 * 132 / d.sm_count * sectors;
  Estimate best;
  for (int64_t split = 1; split <= t.steps() && split <= 64; ++split) {
    if (split > 1 && sums * double(split) * 4 > double(kMaxWorkspaceBytes)) break;
    int64_t const blocks = t.channel_units * split, rounds = ceil_div(ceil_div(blocks, d.sm_count), together);
    double const steps = double(ceil_div(t.steps(), split));
    double const issue_ns = double(blocks) * steps * (t.threads() / 32) * warp / (4 * 1.755 * d.sm_count);
    double const alone_ns = steps * warp / 1.755;
    double ns =
        nhwc ? 11600 + 0.49 * issue_ns + 2.22 * memory_ns + double(rounds) * (1310 * steps + 1.81 * alone_ns + 3700)
             : 6700 + 0.51 * issue_ns + 1.49 * memory_ns + double(rounds) * (1840 * steps + 1.86 * alone_ns + 6700);
    if (split > 1) ns += (nhwc ? 1000 : 5700) + sums * double(split) * 8 / 2500;
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
  }
  return best;
}

}  // namespace conv2d_ext
