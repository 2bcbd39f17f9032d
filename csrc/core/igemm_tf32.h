// igemm in TF32 (cuda/igemm_tf32.cuh): what its rows take and cost.
#pragma once

#include "gemm.h"

namespace conv2d_ext {

// Operands come in vectors of four channels, results go where they are in any strides, but for dgrad's pixels of a
// stride's phases, which lie apart. lines: filters of dgrad lie in lines of whole vectors, whatever C is.
constexpr bool igemm_tf32_supports(Op op, Problem const& p, bool lines = false) {
  if (!p.allow_tf32 || p.N == 0 || p.C == 0 || p.K == 0) return false;
  if (op == Op::dgrad && p.stride_w > 1 && p.x.c != 1) return false;
  int64_t const C = p.C_per_group(), K = p.K_per_group();
  bool const x = channel_vectors(p.x, p.x_align, C, 4, p.dtype), y = channel_vectors(p.y, p.y_align, K, 4, p.dtype);
  bool const w = channel_vectors(p.w, p.w_align, lines ? 4 : C, 4, p.dtype);
  if (op == Op::fprop ? !x || !w : op == Op::dgrad ? !y || !w : !x || !y) return false;
  // Offsets are counted in vectors, in 32 bits.
  constexpr double most = double(int64_t(1) << 33);
  return p.H + p.pad_top + p.pad_bottom <= (1 << 29) && p.W + p.pad_left + p.pad_right <= (1 << 29) &&
         span_of(p.x, p.N, p.C, p.H, p.W) < most && span_of(p.w, p.K, C, p.R, p.S) < most &&
         span_of(p.y, p.N, p.K, p.P(), p.Q()) < most && gemm_of(op, p).depth < (int64_t(1) << 31) - 128;
}

// Rounds of tiles, in nanoseconds as measured: a step of 32 k, what else a tile takes, and what a launch does. Phases
// of dgrad have different numbers of steps. A second pass adds the splits one after the other.
struct Tf32Times {
  double step, tile, launch;
};
constexpr Tf32Times igemm_tf32_times(int tile_n, Op op, bool phases) {
  if (op == Op::wgrad) return tile_n == 128 ? Tf32Times{825, 4400, 9500} : Tf32Times{690, 2200, 9500};
  return phases ? Tf32Times{715, 6800, 9800} : Tf32Times{680, 5000, 8800};
}

constexpr Estimate igemm_tf32_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  Gemm const g = gemm_of(op, p);
  bool const phases = op == Op::dgrad && (p.stride_h > 1 || p.stride_w > 1);
  Tf32Times const times = igemm_tf32_times(row.tile_n, op, phases);
  // Phases of an axis that meet taps.
  auto met = [](int64_t extent, int64_t taps, int64_t stride, int64_t dilation) {
    return min64(min64(taps, stride / gcd64(dilation, stride)), extent);
  };
  int64_t const with_taps =
      phases ? met(p.H, p.R, p.stride_h, p.dilation_h) * met(p.W, p.S, p.stride_w, p.dilation_w) : 1;
  double const of_phase = double(ceil_div(g.M, row.tile_m)) * double(ceil_div(g.N, row.tile_n)) * double(p.groups),
               tiles = of_phase * double(g.batches / p.groups), multiply = of_phase * double(with_taps);
  int64_t const steps = ceil_div(g.depth, row.tile_k);
  double const mean = !phases || with_taps == 0
                          ? double(steps)
                          : double(p.R) * double(p.S) * double(p.K_per_group()) / double(with_taps * row.tile_k);
  auto rounds = [&](double blocks) {
    return blocks > 1e15 ? blocks / d.sm_count : double(ceil_div(int64_t(blocks), d.sm_count));
  };
  Estimate best;
  for (int64_t split = 1; split <= 1024 && (split == 1 || split * 4 <= steps); split += split < 8 ? 1 : split / 4) {
    double const blocks = tiles * double(split), bytes = blocks * double(row.tile_m) * double(row.tile_n) * 4;
    if (split > 1 && bytes > double(kMaxWorkspaceBytes)) break;
    double const each = split == 1 ? mean : double(ceil_div(steps, split));
    double ns = rounds(multiply * double(split)) * each * times.step + rounds(blocks) * times.tile + times.launch;
    if (split > 1) ns += 2000 + double(split) * 560 + bytes * 1.4 / 2500;
    // Filters of several taps whose channels do not follow each other are stored one by one.
    if (op == Op::wgrad && p.w.c != 1 && p.R * p.S > 1) ns += double(p.K) * double(p.C * p.R * p.S) * 0.0215;
    // Neighbouring filters that take no vectors are stored one by one.
    if (op == Op::fprop && split == 1 && p.y.c == 1 && p.K_per_group() % 4 != 0)
      ns += double(p.N) * double(p.K) * double(p.P() * p.Q()) * 0.006;
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
    if (blocks >= 8.0 * d.sm_count) break;  // enough to fill the device evenly
  }
  return best;
}

}  // namespace conv2d_ext
