// grouped_plain_wgrad.cuh: wgrad of groups over NCHW, from rows as they lie, in runs that the copy engine brings.
#pragma once

#include <cstdint>

#include "planes.h"

namespace conv2d_ext {

constexpr int64_t kRunsFront = 16, kRunsTables = 256;  // bytes: before the first row of a stage; barriers and zeros

constexpr double kRunCycles = 12;  // to have one copied

constexpr bool is_plain(Row const& row) {
  return row.family == Family::grouped && row.tile_m == 16 && row.op == Op::wgrad;
}

// Bytes of a channel: such that those of neighbouring lanes lie in other banks.
constexpr int64_t plain_channel(int64_t bytes, int64_t step, int64_t rest) {
  return (ceil_div(bytes - rest, step) * step) + rest;
}

// Warps of a block that multiply, by the registers of a job.
constexpr int runs_warps(int blocks_k, bool strict) { return blocks_k == 1 ? 16 : blocks_k == 2 && !strict ? 12 : 8; }

// Rows of x that begin off what a lane loads at once, 8 bytes (with a stride 16).
constexpr bool runs_off_vectors(Problem const& p) { return p.W * size_of(p.dtype) % (8 * p.stride_h) != 0; }

// Groups of a unit. Those of 12 and 20 channels are units by themselves, whose last block of 8 is half empty, and of 3
// and of 5 to 7 as many as fit a block, if runs begin with them.
constexpr int64_t plain_per_unit(Problem const& p) {
  int64_t const C = p.C_per_group(), K = p.K_per_group(), all = groups_per_unit(p),
                few = max64(1, 8 / max64(max64(C, K), 1));
  auto begin = [&](int64_t C, int64_t K) {
    return C * p.H * p.W * size_of(p.dtype) % 16 == 0 && K * p.P() * p.Q() * size_of(p.dtype) % 16 == 0;
  };
  if (C > 8 && K > 8 && C % 4 == 0 && K % 4 == 0 && begin(4, 4)) return 1;
  auto fits = [few](int64_t channels) { return few * channels > 4 && few * channels <= 8; };
  return fits(C) && fits(K) && all % few == 0 && begin(few * C, few * K) ? few : all;
}

constexpr bool runs_problem(Problem const& p) {
  if (p.dtype == DType::f64 || p.groups == 1 || p.N == 0 || p.K == 0 || p.C == 0 || p.P() < 2 || p.Q() < 1)
    return false;
  if (!grouped_planar(p) || p.C_per_group() < 2 || p.K_per_group() < 2) return false;
  if (p.R != 3 || p.S != 3 || p.dilation_h != 1 || p.dilation_w != 1 || p.stride_h != p.stride_w || p.stride_h > 2)
    return false;
  if (p.pad_top != 1 || p.pad_bottom != 1 || p.pad_left != 1 || p.pad_right != 1) return false;
  if (p.stride_h == 2 && p.W % 2 != 0) return false;
  constexpr int64_t most = int64_t(1) << 24;
  return p.N < most && p.C < most && p.K < most && p.H <= 256 && p.W <= 256 && p.N * p.P() * p.Q() >= 64;
}

// A side's tile in shared memory. Of whole images: runs of `together` channels, whose bytes are a multiple of 16, of
// one image each. Else runs of a channel's rows, from the 16 bytes where they begin to those where they end.
struct PlainRun {
  int64_t together = 1;
  int64_t lead = 0;               // bytes of a run before the image's first row of the tile
  int64_t image = 0, stride = 0;  // bytes from image to image of a run, from run to run
  bool shifts = false;            // runs may begin within 16 bytes
};

// What a block sums, and the tiles that it goes through.
struct PlainRuns {
  int blocks_c = 0, blocks_k = 0;      // of 8 channels, of 8 filters: a warp's job; 0: there is none
  int64_t units = 1;                   // of a block, each with warps of its own
  int64_t jobs_c = 1, jobs_k = 1;      // of a unit and block
  int64_t shares = 1;                  // warps that share the pixels of a job
  int64_t chunks_c = 1, chunks_k = 1;  // blocks that share the jobs of a unit
  int64_t places = 1;                  // blocks but for the splits
  int64_t rows = 0, images = 1;        // of outputs, of a tile
  int64_t quads = 0;                   // 8 bytes of a row of y
  int64_t x_channels = 0, y_channels = 0;
  PlainRun x, y;
  int64_t y_at = 0, stage_bytes = 0, stages = 0, shared = 0;
  int64_t tiles = 0, splits = 1;
  double cycles = 0;
  constexpr int64_t warps() const { return units * jobs_c * jobs_k * shares; }
};

constexpr PlainRun plain_run(int64_t H, int64_t pitch, bool whole, int64_t rows, int64_t images, bool lead,
                             int64_t step) {
  PlainRun r;
  while (whole && H * pitch * r.together % 16 != 0) r.together *= 2;
  r.lead = lead ? ceil_div(pitch, 16) * 16 : 0, r.shifts = !whole && pitch % 16 != 0;
  r.image = r.lead + ceil_div(((r.together - 1) * H + rows) * pitch, 16) * 16 + (r.shifts ? 16 : 0);
  r.stride = plain_channel(images * r.image, step, step / 2);
  return r;
}

constexpr PlainRuns plain_runs(Problem const& p, Device const& d) {
  int64_t const per_unit = plain_per_unit(p), size = size_of(p.dtype), stride = p.stride_h;
  int64_t const C = per_unit * p.C_per_group(), K = per_unit * p.K_per_group(), units = p.C / max64(C, 1);
  int64_t const x_pitch = p.W * size, y_pitch = p.Q() * size;
  bool const strict = p.dtype == DType::f32 && !p.allow_tf32;
  PlainRuns best, t;
  if (!runs_problem(p)) return best;
  t.quads = ceil_div(y_pitch, 8);
  // As measured: cycles of a quarter of an SM for a product of jobs of 8 and of 16 channels, of a warp from row to row.
  double const product_8 = size == 2 ? 6.8 : strict ? 10.2 : 8;
  double const product_16 = strict ? (stride == 2 ? 9.5 : 8.5) : stride == 2 ? 8.5 : size == 2 ? 8.5 : 7.8;
  double const row = 60;
  for (t.blocks_k = 1; t.blocks_k <= (strict ? 3 : 4); ++t.blocks_k) {
    t.blocks_c = t.blocks_k == 1 ? 1 : 2;
    double const product = t.blocks_k == 1 ? product_8 : product_16 * (strict && t.blocks_k == 3 ? 1.17 : 1);
    if ((C <= 8 || K <= 8) != (t.blocks_k == 1) || (t.blocks_k > 2 && K <= 16)) continue;
    // Jobs of three blocks leave 17 to 24 filters no block of zeros. Strict, others are slower by them, as measured.
    if (int64_t const all = ceil_div(K, 8); t.blocks_k == 3 && (strict ? all != 3 : all % 4 == 0)) continue;
    int64_t const jobs_c = ceil_div(C, 8 * t.blocks_c), jobs_k = ceil_div(K, 8 * t.blocks_k);
    int64_t const most = runs_warps(t.blocks_k, strict);
    for (t.units = 1; t.units <= min64(units, most); ++t.units)
      for (t.chunks_c = 1; t.chunks_c <= (t.units > 1 ? 1 : jobs_c); ++t.chunks_c)
        for (t.chunks_k = 1; t.chunks_k <= (t.units > 1 ? 1 : jobs_k); ++t.chunks_k) {
          t.jobs_c = ceil_div(jobs_c, t.chunks_c), t.jobs_k = ceil_div(jobs_k, t.chunks_k);
          if (t.jobs_c * (t.chunks_c - 1) >= jobs_c || t.jobs_k * (t.chunks_k - 1) >= jobs_k) continue;
          int64_t const jobs = t.units * t.jobs_c * t.jobs_k;
          if (jobs > most) continue;
          t.places = ceil_div(units, t.units) * t.chunks_c * t.chunks_k;
          // Of several units the last may end within a job.
          t.x_channels = (t.units - 1) * C + t.jobs_c * t.blocks_c * 8;
          t.y_channels = (t.units - 1) * K + t.jobs_k * t.blocks_k * 8;
          for (int64_t parts = 1; parts <= 28; parts += parts < 2 ? 1 : parts < 8 ? 2 : 4)
            for (t.images = 1; t.images <= (parts == 1 ? min64(p.N, 8) : 1); t.images *= 2) {
              t.rows = ceil_div(p.P(), parts);
              int64_t const of_image = ceil_div(p.P(), t.rows);
              // Rows of a tile are a run of memory; the last tile has two of them at least.
              if (t.rows < 2 || p.P() - (of_image - 1) * t.rows < 2) continue;
              int64_t const columns = t.images * t.quads, x_rows = (t.rows - 1) * stride + 3;
              t.shares = min64(most / jobs, ceil_div(columns, 4));
              t.x = plain_run(p.H, x_pitch, parts == 1, x_rows - 1, t.images, true, stride == 1 ? 64 : 128);
              t.y = plain_run(p.P(), y_pitch, parts == 1, t.rows, t.images, false, 64);
              int64_t const x_runs = ceil_div(t.x_channels, t.x.together),
                            y_runs = ceil_div(t.y_channels, t.y.together);
              t.y_at = ceil_div(kRunsFront + x_runs * t.x.stride, 128) * 128;
              t.stage_bytes = ceil_div(t.y_at + y_runs * t.y.stride + y_pitch + 16, 128) * 128;
              t.tiles = of_image * ceil_div(p.N, t.images);
              int64_t const products = (t.blocks_c == 2 ? 9 : 6) * t.blocks_k * (strict ? 3 : 1);  // of a warp and row
              int64_t const sums = t.shares > 1 ? t.warps() * (t.blocks_c == 2 ? 9 : 6) * t.blocks_k * 512 : 0;
              for (t.stages = 4; t.stages >= 1; --t.stages) {
                t.shared = max64(t.stages * t.stage_bytes, sums);
                if (t.shared + kRunsTables <= kLinesShared) break;
              }
              if (t.stages == 0) continue;
              // Cycles of an SM for a tile: products, or what a warp takes from row to row, or its bytes.
              double const steps = double(ceil_div(ceil_div(columns, 4), t.shares)), rows = double(t.rows) + 0.2;
              double const work = double(products) * product, alone = work + row;
              double busy = steps * (rows * work + 350) * double(ceil_div(t.warps(), 4));
              if (steps * (rows * alone + 350) > busy) busy = steps * (rows * alone + 350);
              // Chunks of a unit read the same again, from L2.
              double const bytes_x = double(t.images * t.x_channels * min64(x_rows, p.H) * x_pitch);
              double const bytes_y = double(t.images * t.y_channels * t.rows * y_pitch);
              double const once = (bytes_x / double(t.chunks_k) + bytes_y / double(t.chunks_c)) / 18;
              double const all = (bytes_x + bytes_y) / 24;
              double const copies = (once > all ? once : all) + double(t.images * (x_runs + y_runs)) * kRunCycles;
              double each = (busy > copies ? busy : copies) + 400;
              if (t.stages == 1) each = busy + copies + 1500;
              // Shares are added by one of them.
              double const together = t.shares > 1 ? double((t.shares - 1) * sums / t.warps()) / 25 + 800 : 0;
              for (int64_t rounds = 1; rounds <= 2; ++rounds) {
                t.splits = min64(t.tiles, max64(1, rounds * d.sm_count / t.places));
                double const partial = double(units * ceil_div(C, 8) * ceil_div(K, 8)) * 64 * 36 * double(t.splits);
                if (t.splits > 1 && partial > double(kMaxWorkspaceBytes)) continue;
                double const waves = double(ceil_div(t.places * t.splits, d.sm_count));
                t.cycles =
                    waves * (double(ceil_div(t.tiles, t.splits)) * each + copies + together + 1500) + partial / 1400;
                if (best.cycles == 0 || t.cycles < best.cycles) best = t;
              }
            }
        }
  }
  return best;
}

constexpr bool plain_supports(Op op, Problem const& p, Device const& d) {
  return op == Op::wgrad && plain_runs(p, d).blocks_c > 0;
}

constexpr int64_t plain_workspace_bytes(Problem const& p, Device const& d) {
  int64_t const per_unit = plain_per_unit(p);
  int64_t const blocks = ceil_div(per_unit * p.C_per_group(), 8) * ceil_div(per_unit * p.K_per_group(), 8);
  return p.groups / per_unit * blocks * 64 * 36 * plain_runs(p, d).splits;
}

constexpr Estimate plain_estimate(Problem const& p, Device const& d) {
  // As measured: many channels, short rows.
  double const many = p.C_per_group() < 48 || p.Q() > 14 ? 1 : p.stride_w > 1 ? 1.5 : p.Q() <= 8 ? 1.28 : 1;
  return {(plain_runs(p, d).cycles / 1.75 + 9400) * many, 1};
}

}  // namespace conv2d_ext
