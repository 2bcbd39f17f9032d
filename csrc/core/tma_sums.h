// tma_sums.cuh: what its rows take and cost. The row of 64x64 is tma_lean.cuh's where tiles are not shared out.
#pragma once

#include <cstdint>

#include "lean.h"
#include "reads_once.h"

namespace conv2d_ext {

constexpr bool is_sums(Row const& row, Problem const& p) {
  if (row.family != Family::tma || row.op != Op::wgrad || row.variant != Variant::lean || row.dtype == DType::f32)
    return false;
  bool const also_lean = row.tile_m == 64 && row.tile_n == 64;
  return also_lean ? !lean_takes_planes(row, p) : row.tile_m == 128 && row.tile_n <= 128;
}

// How the steps of a tile are shared out: among the blocks of a cluster, or among single blocks whose sums a second
// pass adds.
struct SumsCut {
  int splits = 1, parts = 1;  // blocks of a cluster; in all
  constexpr bool second_pass() const { return parts > splits; }
};

constexpr bool sums_supports(Row const& row, Problem const& p) {
  Row like = row;
  like.tile_n = like.tile_m = 64;
  return !lean_takes_planes(like, p) && lean_supports(like, p) && (row.tile_m == 64 || lean_wgrad_tiles(row, p) <= 132);
}

struct SumsEstimate {
  double ns = 0;
  SumsCut cut;
};

// Fitted to 260 times of 93 layers (docs/tuning.md): what an SM takes in, its products, or memory, which
// fewer blocks than some 112 do not keep busy; then the sums of a cluster or of a second pass.
constexpr SumsEstimate sums_estimate(Row const& row, Problem const& p) {
  // Lines that the channels do not fill, or that lie across those of memory.
  auto line = [](int64_t channels) { return channels % 64 == 0 ? 1 : channels < 64 ? 1.07 : 1.45; };
  int64_t const tiles = lean_wgrad_tiles(row, p), steps = lean_wgrad_steps(row, p);
  bool const taps = p.R * p.S > 1;
  double const area = double(row.tile_m) * row.tile_n;
  double const lines_ns = (row.tile_m * line(p.K) + row.tile_n * line(p.C)) * 1.37, products_ns = area / (32 * 1.46);
  // With one tap and a stride, pixels are left out.
  double const x = double(p.C) * double(taps ? p.H * p.W : p.P() * p.Q()), y = double(p.K) * double(p.P() * p.Q());
  double const bytes = double(p.N) * (x + y) * 2;
  // As the other rows' estimates of such layers are.
  double const beside = row.tile_m == 64 ? 0.97 : row.tile_n == 64 ? 1.04 : 1;
  SumsEstimate best;
  auto weigh = [&](SumsCut cut) {
    double const blocks = double(tiles) * cut.parts, idle = blocks < 112 ? 112 / blocks : 1;
    double const memory_ns = bytes / 3450 * idle + 930;
    double const each = double(ceil_div(steps, cut.parts)) * (lines_ns > products_ns ? lines_ns : products_ns);
    double ns = 6160 + (each > memory_ns ? each : memory_ns) + area * 0.055 + (cut.splits > 1 ? area * 0.226 : 0);
    if (cut.second_pass()) ns += 3020 + blocks * area * 8 / 6970;
    ns *= beside * (taps ? 1.04 : each > memory_ns * 1.1 ? 1.1 : 0.9);
    // As measured: what is read is given up first; rows that begin within sectors (32x256x37x37 to 728: 47.6 us).
    if (reads_once(p) && memory_ns > each) ns *= 0.93;
    if (!taps && ((p.C > 64 && p.C % 16 != 0) || (p.K > 64 && p.K % 16 != 0))) ns *= 1.12;
    if (best.ns == 0 || ns < best.ns) best = {ns, cut};
  };
  if (row.tile_m == 64) {
    Estimate const lean = lean_estimate(row, p);
    best = {lean.ns, {lean.split_k, lean.split_k}};
  } else {
    for (int splits : {1, 2, 3, 4, 8})
      if (splits == 1 || (tiles <= lean_clusters(splits) && steps >= 2 * splits)) weigh({splits, splits});
  }
  int const parts = int(min64(132 / max64(tiles, 1), steps / 3));
  if (parts > 1) weigh({1, parts});
  return best;
}

constexpr int64_t sums_workspace_bytes(Row const& row, Problem const& p) {
  SumsCut const cut = sums_estimate(row, p).cut;
  return cut.second_pass() ? lean_wgrad_tiles(row, p) * cut.parts * row.tile_m * row.tile_n * 4 : 0;
}

}  // namespace conv2d_ext
