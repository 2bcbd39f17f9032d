// tma_classes.cuh, dgrad with a stride of two: what it takes, how it cuts a problem and what that costs. It is the
// second kernel of the row of 256x128 with halo.
#pragma once

#include <cstdint>

#include "tma.h"

namespace conv2d_ext {

inline constexpr int kClassesPixels = 256;        // of y, of a tile
inline constexpr int kClassesPiece = 64;          // of them that a warpgroup stores at a time
inline constexpr int kClassesBytes = 205 * 1024;  // of shared memory, for y's slots and two rings of filters
inline constexpr int kClassesSlots = 16;

// Slots are a row of taps of 64 of y's channels; beside them each ring of filters has so many stages.
constexpr int64_t classes_stages(Problem const& p) {
  int64_t const slots = phase_taps(p.H, p.R, p.pad_top).count * ceil_div(p.K, 64);
  if (slots > kClassesSlots) return 0;
  return min64((kClassesBytes - slots * (kClassesPixels + kHalo) * 128) / (2 * 64 * 128), kMaxStages);
}

constexpr int64_t classes_tiles(Problem const& p) {
  PhaseTaps const h = phase_taps(p.H, p.R, p.pad_top), w = phase_taps(p.W, p.S, p.pad_left);
  return ceil_div(p.N * h.walk().pixels * halo_walk(w.walk()).pixels, kClassesPixels) * ceil_div(p.C, 128);
}

// Up to 64 channels: the warpgroups share the phases, not the channels.
constexpr bool classes_narrow(Problem const& p) { return p.C <= 64; }

constexpr bool classes_supports(Problem const& p) {
  if (p.S > kMaxPhaseTaps || p.K > kClassesSlots * 64 || p.C <= 32 || !phases_together_support(p)) return false;
  // Tiles are counted in 32 bits.
  return classes_stages(p) >= 3 && double(p.N) * double(p.H) * double(p.W + 2 * kHalo) * double(p.C) < 1e12;
}

constexpr bool takes_classes(Row const& row, Problem const& p) {
  return row.op == Op::dgrad && row.variant == Variant::halo && row.tile_m == 256 && row.tile_n == 128 &&
         row.dtype != DType::f32 && classes_supports(p);
}

// Rounds of whole tiles, then the phases of the others, the longest first. Fitted to seventeen layers (docs/tuning.md).
constexpr Estimate classes_estimate(Problem const& p, Device const& d) {
  PhaseTaps const h = phase_taps(p.H, p.R, p.pad_top), w = phase_taps(p.W, p.S, p.pad_left);
  double const chunks = double(ceil_div(p.K, 16)) / 4, taps = double(p.R) * double(p.S);
  int64_t const tiles = classes_tiles(p);
  double ns = 0;
  if (classes_narrow(p)) {
    double const tile_ns = taps * chunks * 300 + 3800 + (p.K % 64 == 0 ? 0 : 1200);
    ns = 6000 + double(ceil_div(tiles, d.sm_count)) * tile_ns;
  } else {
    double const tap_ns = 790 * chunks, store_ns = 1050, copy_ns = 1000;
    double const longest = double(max64(h.phase[0].taps, h.phase[1].taps) * max64(w.phase[0].taps, w.phase[1].taps));
    int64_t const left = tiles % d.sm_count;
    double const phases_ns = 1.15 * double(left) / d.sm_count * (taps * tap_ns + 4 * (store_ns + copy_ns)),
                 longest_ns = longest * tap_ns + store_ns + copy_ns;
    ns = 5500 + double(tiles / d.sm_count) * (taps * tap_ns + 4 * store_ns);
    if (left > 0) ns += phases_ns > longest_ns ? phases_ns : longest_ns;
  }
  double const memory_ns = (double(p.N) * double(p.C) * double(p.H) * double(p.W) +
                            double(p.N) * double(p.K) * double(p.P()) * double(p.Q())) *
                           size_of(p.dtype) / 3500;
  return {ns > memory_ns ? ns : memory_ns, 1};
}

}  // namespace conv2d_ext
