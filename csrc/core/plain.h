// grouped_plain_wgrad.cuh: wgrad of groups over NCHW, from rows as they lie.
#pragma once

#include <cstdint>

#include "planes.h"

namespace conv2d_ext {

constexpr int64_t kPlainFront = 16;  // bytes of zeros before the first row of a stage
// Of a block, by the registers of a job.
constexpr int plain_warps(int blocks_k) { return blocks_k == 1 ? 16 : blocks_k == 2 ? 12 : 8; }

constexpr bool is_plain(Row const& row) { return row.family == Family::grouped && row.tile_m == 16; }

// Bytes of a channel: such that those of neighbouring lanes lie in other banks.
constexpr int64_t plain_channel(int64_t bytes, int64_t step, int64_t rest) {
  return (ceil_div(bytes - rest, step) * step) + rest;
}

// Bytes that are copied at once.
constexpr int plain_piece(int64_t W, DType t) {
  int64_t const bytes = W * size_of(t);
  return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 2;
}

// Cycles of an SM for 32 of them, as measured.
constexpr double plain_copy(int64_t piece) { return piece == 8 ? 12 : piece == 4 ? 9 : 21; }

constexpr bool plain_problem(Problem const& p) {
  if (p.dtype == DType::f64 || (p.dtype == DType::f32 && !p.allow_tf32)) return false;
  if (p.groups == 1 || p.N == 0 || p.K == 0 || p.C == 0 || p.P() < 1 || p.Q() < 1 || !grouped_planar(p)) return false;
  if (p.R != 3 || p.S != 3 || p.dilation_h != 1 || p.dilation_w != 1 || p.stride_h != p.stride_w || p.stride_h > 2)
    return false;
  if (p.pad_top != 1 || p.pad_bottom != 1 || p.pad_left != 1 || p.pad_right != 1) return false;
  constexpr int64_t most = int64_t(1) << 24;
  return p.N < most && p.C < most && p.K < most && p.H <= 256 && p.W <= 256 && p.C_per_group() > 1 &&
         p.K_per_group() > 1;
}

// What a block of wgrad sums, and the tiles that it goes through.
struct PlainSums {
  int blocks_c = 0, blocks_k = 0;      // of 8 channels, of 8 filters: a warp's job; 0: there is none
  int64_t units = 1;                   // of a block, each with warps of its own
  int64_t jobs_c = 1, jobs_k = 1;      // of a unit and block
  int64_t shares = 1;                  // warps that share the pixels of a job
  int64_t chunks_c = 1, chunks_k = 1;  // blocks that share the jobs of a unit
  int64_t places = 1;                  // blocks but for the splits
  int64_t rows = 0, images = 1;        // of outputs, of a tile
  int64_t quads = 0;                   // 8 bytes of a row of y
  int64_t x_rows = 0, x_pitch = 0, x_channel = 0, x_channels = 0;  // rows of an image; bytes; channels of a block
  int64_t y_pitch = 0, y_channel = 0, y_channels = 0;
  int64_t y_at = 0, stage_bytes = 0, stages = 0, shared = 0;
  int64_t tiles = 0, splits = 1;
  double cycles = 0;
  constexpr int64_t warps() const { return units * jobs_c * jobs_k * shares; }
};

constexpr PlainSums plain_sums(Problem const& p, Device const& d) {
  int64_t const per_unit = groups_per_unit(p), size = size_of(p.dtype), stride = p.stride_h;
  int64_t const C = per_unit * p.C_per_group(), K = per_unit * p.K_per_group(), units = p.C / C;
  PlainSums best, t;
  t.quads = ceil_div(p.Q() * size, 8);
  int64_t const x_piece = plain_piece(p.W, p.dtype), y_piece = plain_piece(p.Q(), p.dtype);
  t.x_pitch = round_to((p.W + 1) * size, max64(8 * stride, x_piece));
  if (p.H * (p.W * size / x_piece) >= 16384) return best;
  for (t.blocks_k = 1; t.blocks_k <= 4; t.blocks_k *= 2) {
    t.blocks_c = t.blocks_k == 1 ? 1 : 2;
    if ((C == 8 || K == 8) != (t.blocks_k == 1) || (t.blocks_k == 4 && K == 16)) continue;
    int64_t const jobs_c = ceil_div(C, 8 * t.blocks_c), jobs_k = ceil_div(K, 8 * t.blocks_k);
    int64_t const most = plain_warps(t.blocks_k);
    for (t.units = 1; t.units <= min64(units, most); ++t.units)
      for (t.chunks_c = 1; t.chunks_c <= jobs_c; ++t.chunks_c)
        for (t.chunks_k = 1; t.chunks_k <= jobs_k; ++t.chunks_k) {
          t.jobs_c = ceil_div(jobs_c, t.chunks_c), t.jobs_k = ceil_div(jobs_k, t.chunks_k);
          if (t.units > 1 && (t.chunks_c > 1 || t.chunks_k > 1)) continue;
          int64_t const jobs = t.units * t.jobs_c * t.jobs_k;
          if (jobs > most) continue;
          t.places = ceil_div(units, t.units) * t.chunks_c * t.chunks_k;
          t.x_channels = t.units > 1 ? t.units * C : t.jobs_c * t.blocks_c * 8;
          // Of several units the last may end within a job.
          t.y_channels = (t.units - 1) * K + t.jobs_k * t.blocks_k * 8;
          for (int64_t parts = 1; parts <= 16; parts *= 2)
            for (t.images = 1; t.images <= (parts == 1 ? min64(p.N, 4) : 1); t.images *= 2) {
              t.rows = ceil_div(p.P(), parts);
              if (t.rows < 2) continue;
              int64_t const columns = t.images * t.quads;
              t.shares = min64(most / jobs, ceil_div(columns, 4));
              t.x_rows = (t.rows - 1) * stride + 3;
              t.y_pitch = round_to((t.quads + (columns % 4 != 0 ? 1 : 0)) * 8, max64(8, y_piece));
              // What the last row's lanes read behind it is zeros.
              t.x_channel =
                  plain_channel(t.images * t.x_rows * t.x_pitch + 16, stride == 1 ? 64 : 128, stride == 1 ? 32 : 64);
              t.y_channel = plain_channel(t.images * t.rows * t.y_pitch, 64, 32);
              t.y_at = ceil_div(kPlainFront + t.x_channels * t.x_channel, 128) * 128;
              t.stage_bytes = ceil_div(t.y_at + t.y_channels * t.y_channel + t.y_pitch, 128) * 128;
              t.tiles = ceil_div(p.P(), t.rows) * ceil_div(p.N, t.images);
              int64_t const products = (t.blocks_c == 2 ? 9 : 6) * t.blocks_k;  // of a warp and row
              int64_t const sums = t.shares > 1 ? t.warps() * products * 512 : 0;
              for (t.stages = 3; t.stages >= 1; --t.stages) {
                t.shared = max64(t.stages * t.stage_bytes, sums);
                if (t.shared <= kLinesShared) break;
              }
              if (t.stages == 0) continue;
              // Cycles of an SM for a tile: products, or what a warp takes from row to row; pieces, copied by a warp 32
              // at a time. They hardly hide each other.
              double const steps = double(ceil_div(ceil_div(columns, 4), t.shares)) * (double(t.rows) + 0.2);
              double const work = double(products) * 6.8, alone = work + 200;
              double busy = steps * work * double(ceil_div(t.warps(), 4));
              if (steps * alone > busy) busy = steps * alone;
              double const copies =
                  double(t.x_channels * ceil_div(t.images * t.x_rows * p.W * size / x_piece, 32)) *
                      plain_copy(x_piece) +
                  double(t.y_channels * ceil_div(t.images * t.rows * p.Q() * size / y_piece, 32)) * plain_copy(y_piece);
              double each = (busy > copies ? busy + copies * 0.84 : copies + busy * 0.84) + 1500;
              if (t.stages == 1) each = busy + copies + 3400;
              for (int64_t rounds = 1; rounds <= 2; ++rounds) {
                t.splits = min64(t.tiles, max64(1, rounds * d.sm_count / t.places));
                double const partial = double(units) * double(C * K) * 36 * double(t.splits);
                if (t.splits > 1 && partial > double(kMaxWorkspaceBytes)) continue;
                double const waves = double(ceil_div(t.places * t.splits, d.sm_count));
                t.cycles = waves * double(ceil_div(t.tiles, t.splits)) * each + partial / 1400;
                if (best.cycles == 0 || t.cycles < best.cycles) best = t;
              }
            }
        }
  }
  return best;
}

constexpr bool plain_supports(Op op, Problem const& p, Device const& d) {
  return op == Op::wgrad && plain_problem(p) && plain_sums(p, d).blocks_c > 0;
}

constexpr int64_t plain_workspace_bytes(Problem const& p, Device const& d) {
  return p.C * groups_per_unit(p) * p.K_per_group() * 36 * plain_sums(p, d).splits;
}

constexpr Estimate plain_estimate(Problem const& p, Device const& d) {
  return {plain_sums(p, d).cycles / 1.75 + 12000, 1};
}

}  // namespace conv2d_ext
