// Depthwise 3x3 in channels_last, 16 bits, of channels that are no vectors (cuda/depthwise_flat.cuh): which, their
// tiles, shared by the planner and the launcher, and what they cost.
#pragma once

#include "depthwise.h"

namespace conv2d_ext {

inline constexpr int kFlatThreads = 128, kFlatSumsThreads = 256;  // of a block; wgrad's
inline constexpr int kFlatBytes = 8;                              // of a thread's elements, a word

struct FlatTile {
  bool used = false;
  int64_t words = 1, rows = 1, chunks = 1;             // words of a row of the image; rows of a thread
  int64_t threads = 0;                                 // fprop, dgrad
  int64_t slices = 1, units = 1, each = 1, parts = 1;  // wgrad: blocks along a row; chunks of all images; of a block
  double ns = 0;
};

// 3x3, stride 1, 'same' padding, K == C; rows without gaps that are whole words.
constexpr bool flat_supports(Problem const& p) {
  int const v = kFlatBytes / size_of(p.dtype);
  if (size_of(p.dtype) != 2 || p.R != 3 || p.S != 3 || p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 ||
      p.dilation_w != 1 || p.pad_top != 1 || p.pad_bottom != 1 || p.pad_left != 1 || p.pad_right != 1)
    return false;
  if (p.C_per_group() != 1 || p.K != p.C || p.C % v == 0 || p.W * p.C % v != 0) return false;
  auto rows = [&](Strides const& s, int align) constexpr {
    return (s.c == 1 || p.C == 1) && s.w == p.C && s.h % v == 0 && s.n % v == 0 && align >= kFlatBytes;
  };
  // Offsets in a row are int, numbers of threads 32-bit.
  return rows(p.x, p.x_align) && rows(p.y, p.y_align) && double(p.W) * double(p.C) < 1e8 &&
         double(p.N) * double(p.H + 1) * double(p.W) * double(p.C) / v < 2e9;
}

// What lies ahead of the first row that a thread needs, and behind the last.
inline constexpr int kFlatBorder = 2;

constexpr double flat_elements(Problem const& p) { return double(p.N) * double(p.C) * double(p.H) * double(p.W); }

// Chunks of rows of an image by what threads wait for, who have five blocks an SM by their registers; `ns` as measured.
constexpr FlatTile flat_tile(Problem const& p, Device const& d) {
  FlatTile best;
  if (!flat_supports(p)) return best;
  double const memory_ns = walk_memory_ns(p, d);
  best.words = p.W * p.C * size_of(p.dtype) / kFlatBytes;
  double least = 0;
  for (int64_t chunks = 1; chunks <= p.H; chunks = chunks < 4 ? chunks + 1 : ceil_div(chunks * 3, 2)) {
    int64_t const rows = ceil_div(p.H, chunks), threads = p.N * best.words * ceil_div(p.H, rows);
    double const rounds = double(threads) / (5.0 * kFlatThreads * d.sm_count);
    double const step = rounds > 1 ? 400 : rounds > 0.5 ? 400 * rounds : 200;
    double const walk_ns = (rounds > 1 ? rounds : 1) * (double(rows + kFlatBorder) * step + 1200);
    double const ns = memory_ns > walk_ns ? memory_ns + walk_ns / 8 : walk_ns + memory_ns / 8;
    if (!best.used || ns < least)
      best.used = true, least = ns, best.rows = rows, best.chunks = ceil_div(p.H, rows), best.threads = threads;
    if (rows == 1) break;
  }
  best.ns = 7800 + 1.72e-3 * flat_elements(p) * 132 / d.sm_count;
  return best;
}

// wgrad: two blocks an SM. More channels than the bound make longer sums than were timed.
constexpr FlatTile flat_sums_tile(Problem const& p, Device const& d) {
  FlatTile best;
  if (!flat_supports(p) || p.C > 300) return best;
  double const taps = double(p.C) * 9;
  int64_t const words = p.W * p.C * size_of(p.dtype) / kFlatBytes, slices = ceil_div(words, kFlatSumsThreads),
                full = 2 * int64_t(d.sm_count);
  double least = 0;
  for (int64_t chunks = 1; chunks <= p.H; chunks = chunks < 4 ? chunks + 1 : ceil_div(chunks * 3, 2)) {
    FlatTile t;
    t.words = words, t.slices = slices;
    t.rows = ceil_div(p.H, chunks), t.chunks = ceil_div(p.H, t.rows), t.units = p.N * t.chunks;
    int64_t const counts[] = {max64(1, full / slices), max64(1, full / 2 / slices), 1};
    for (int64_t wanted : counts) {
      t.each = ceil_div(t.units, wanted), t.parts = slices * ceil_div(t.units, t.each);
      if (t.parts > 1 && double(t.parts) * taps * 4 > double(kMaxWorkspaceBytes)) continue;
      double const rounds = double(t.parts) / double(full), step = rounds > 0.7 ? 400 * rounds : 280;
      double const ns =
          double(t.each) * (double(t.rows + kFlatBorder) * step + 600) + double(t.parts) * taps * 8 / 2500;
      if (best.used && ns >= least) continue;
      best = t, best.used = true, least = ns;
    }
    if (t.rows == 1) break;
  }
  best.ns = 16200 + 2.15e-3 * flat_elements(p) * 132 / d.sm_count + double(best.parts) * taps * 8 / 2500;
  return best;
}

}  // namespace conv2d_ext
