// grouped_plain.cuh, grouped_plain_wgrad.cuh: groups over NCHW, from rows as they lie.
#pragma once

#include <cstdint>

#include "planes.h"

namespace conv2d_ext {

constexpr int64_t kPlainFront = 16;  // bytes of zeros before the first row of a stage
// Of a block of fprop and dgrad, and of wgrad: by their registers.
constexpr int plain_row_warps(bool wide) { return wide ? 12 : 16; }
constexpr int plain_warps(int blocks_k) { return blocks_k == 1 ? 16 : blocks_k == 2 ? 12 : 8; }

constexpr bool is_plain(Row const& row) { return row.family == Family::grouped && row.tile_m == 16; }

// Bytes of a channel: such that those of neighbouring lanes lie in other banks.
constexpr int64_t plain_channel(int64_t bytes, int64_t step, int64_t rest) {
  return (ceil_div(bytes - rest, step) * step) + rest;
}

// Bytes that are copied at once.
constexpr int plain_piece(int64_t W, DType t) {
  int64_t const bytes = W * size_of(t);
  return bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 2;
}

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
  t.x_pitch = ceil_div((p.W + 1) * size, 8 * stride) * 8 * stride;
  if (p.H * (p.W * size / plain_piece(p.W, p.dtype)) >= 16384) return best;
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
              t.y_pitch = (t.quads + (columns % 4 != 0 ? 1 : 0)) * 8;
              // What the last row's lanes read behind it is zeros.
              t.x_channel = plain_channel(t.images * t.x_rows * t.x_pitch + 16, stride == 1 ? 64 : 128,
                                          stride == 1 ? 32 : 64);
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
              // Cycles of an SM for a tile: products, or what a warp takes from row to row; bytes.
              double const steps = double(ceil_div(ceil_div(columns, 4), t.shares)) * double(t.rows + 1);
              double const work = double(products) * 8.5, alone = work + 200;
              double busy = steps * work * double(ceil_div(t.warps(), 4));
              if (steps * alone > busy) busy = steps * alone;
              double const bytes = double(t.images * size) * (double(t.x_channels * min64(t.x_rows, p.H) * p.W) +
                                                              double(t.y_channels * t.rows * p.Q()));
              double const memory = bytes / 16;
              double each = (busy > memory ? busy : memory) + 600;
              if (t.stages == 1) each = busy + memory + 1500;
              for (int64_t rounds = 1; rounds <= 2; ++rounds) {
                t.splits = min64(t.tiles, max64(1, rounds * d.sm_count / t.places));
                double const partial = double(units) * double(C * K) * 36 * double(t.splits);
                if (t.splits > 1 && partial > double(kMaxWorkspaceBytes)) continue;
                double const waves = double(ceil_div(t.places * t.splits, d.sm_count));
                t.cycles = waves * (double(ceil_div(t.tiles, t.splits)) * each + 3000) + partial * 2 / 1500;
                if (best.cycles == 0 || t.cycles < best.cycles) best = t;
              }
            }
        }
  }
  return best;
}

// What a block of fprop and dgrad computes: some units with all of their filters.
struct PlainRows {
  bool wide = false;                        // 16 filters a warp, or the 8 of a unit
  int64_t units = 1, jobs = 1, shares = 1;  // warps of a unit, that share its pixels
  int64_t rows = 0, images = 1, quads = 0;  // of results; four pixels of a row
  int64_t x_rows = 0, x_pitch = 0, x_channel = 0;
  int64_t out_at = 0, stages_at = 0, stage_bytes = 0, stages = 0, shared = 0;  // out_at > 0: whole images, put together
  int64_t tiles = 0, blocks = 1;                                               // that share the tiles
  double cycles = 0;                                                           // 0: there is no tile
};

constexpr PlainRows plain_rows(Op op, Problem const& p, Device const& d) {
  bool const backward = op == Op::dgrad, f32 = p.dtype == DType::f32;
  int64_t const per_unit = groups_per_unit(p), size = size_of(p.dtype), units = p.groups / per_unit;
  int64_t const in = per_unit * (backward ? p.K_per_group() : p.C_per_group());
  int64_t const out = per_unit * (backward ? p.C_per_group() : p.K_per_group());
  PlainRows best, t;
  if (in > 128 || out > 128 || p.H * (p.W * size / plain_piece(p.W, p.dtype)) >= 8192) return best;
  t.wide = in > 8 || out > 8;
  int64_t const steps = ceil_div(in * size, 32);  // of 16 channels, of 8 of f32
  t.jobs = ceil_div(out, t.wide ? 16 : 8);
  t.quads = ceil_div(p.W, 4), t.x_pitch = ceil_div((p.W + 1) * size, 4 * size) * 4 * size;
  for (t.units = 1; t.units <= min64(units, plain_row_warps(t.wide) / t.jobs); ++t.units)
    for (int64_t parts = 1; parts <= 16; parts *= 2)
      for (t.images = 1; t.images <= (parts == 1 ? min64(p.N, 8) : 1); t.images *= 2) {
        t.rows = ceil_div(p.H, parts), t.x_rows = t.rows + 2;
        t.shares = min64(plain_row_warps(t.wide) / (t.units * t.jobs), ceil_div(t.images * t.quads, 8));
        t.x_channel = plain_channel(t.images * t.x_rows * t.x_pitch + 16, 64, 32);
        int64_t const weights = ceil_div(t.units * t.jobs * steps * (t.wide ? 4608 : 2304), 128) * 128;
        // Images whose rows are no whole sectors.
        bool const together = parts == 1 && p.W * size % 32 != 0;
        int64_t const outs = together ? ceil_div(t.images * t.units * out * p.H * p.W * size, 128) * 128 : 0;
        t.out_at = together ? weights : 0, t.stages_at = weights + outs;
        t.stage_bytes = ceil_div(kPlainFront + t.units * in * t.x_channel + t.x_pitch, 128) * 128;
        t.stages = min64(3, (kLinesShared - t.stages_at) / t.stage_bytes);
        if (t.stages < 1) continue;
        t.shared = t.stages_at + t.stages * t.stage_bytes;
        t.tiles = ceil_div(p.H, t.rows) * ceil_div(p.N, t.images);
        double const walks = double(ceil_div(ceil_div(t.images * t.quads, 8), t.shares)) * double(t.rows + 2);
        double const work = double(steps) * (t.wide ? 36 : f32 ? 18 : 9) * 8.5 + 60, alone = work + 150;
        double busy = walks * work * double(ceil_div(t.units * t.jobs * t.shares, 4));
        if (walks * alone > busy) busy = walks * alone;
        double const bytes = double(t.images * t.units * size * p.W) *
                             double(in * min64(t.x_rows, p.H) + out * t.rows);
        double each = (busy > bytes / 16 ? busy : bytes / 16) + 600;
        if (t.stages == 1) each = busy + bytes / 16 + 1500;
        int64_t const slabs = ceil_div(units, t.units);
        t.blocks = min64(t.tiles, max64(1, d.sm_count / slabs));
        double const waves = double(ceil_div(slabs * t.blocks, d.sm_count));
        t.cycles = waves * (double(ceil_div(t.tiles, t.blocks)) * each + 3000 + double(weights) / 10);
        if (best.cycles == 0 || t.cycles < best.cycles) best = t;
      }
  return best;
}

constexpr bool plain_supports(Op op, Problem const& p, Device const& d) {
  if (!plain_problem(p)) return false;
  if (op == Op::wgrad) return plain_sums(p, d).blocks_c > 0;
  return p.stride_h == 1 && plain_rows(op, p, d).cycles > 0;
}

constexpr int64_t plain_workspace_bytes(Op op, Problem const& p, Device const& d) {
  if (op != Op::wgrad) return 0;
  return p.C * groups_per_unit(p) * p.K_per_group() * 36 * plain_sums(p, d).splits;
}

constexpr Estimate plain_estimate(Op op, Problem const& p, Device const& d) {
  if (op == Op::wgrad) return {plain_sums(p, d).cycles / 1.7 + 8000, 1};
  return {plain_rows(op, p, d).cycles / 1.7 + 6000, 1};
}

}  // namespace conv2d_ext
