// tma_lean.cuh: what its rows take and cost. Apart from tma.h, which the other kernels include.
#pragma once

#include <cstdint>

#include "period.h"
#include "pointwise.h"

namespace conv2d_ext {

// Clusters of so many blocks that a GPU of 132 SMs holds at a time, a block an SM; 0: such a split is not made.
constexpr int64_t lean_clusters(int splits) {
  switch (splits) {
    case 2:
      return 64;
    case 3:
      return 39;
    case 4:
      return 30;
    case 8:
      return 15;
    default:
      return 0;
  }
}

// Tiles of 16-bit types for layers of 1x1 that have few of them: a stage is one step, there are no splits.
constexpr bool lean_large(DType t, int tile_m, int tile_n) { return t != DType::f32 && tile_m * tile_n > 64 * 128; }
constexpr bool lean_large(Row const& row) { return lean_large(row.dtype, row.tile_m, row.tile_n); }

// Does a row's tile take 1x1 filters over NCHW, in place? Those of 64 by 64 or 128 do; 128 by 128 only what is
// gathered.
constexpr bool lean_plane_tile(Row const& row, Problem const& p) {
  bool const large = lean_large(row) && row.op != Op::wgrad && row.tile_n == 128;
  if (row.tile_n < 64 || (row.tile_m != 64 && !large)) return false;
  // A few tiles and steps, which 32 bits count.
  return double(p.N) * double(p.H) * double(p.W) < 1e7 && max64(p.C, p.K) < 65536;
}

// Are they brought by tma_lean_gather.cuh, four pixels at a time, as the copy engine does not take the images? fprop
// and dgrad of 16-bit types.
constexpr bool lean_gathers(Row const& row, Problem const& p) {
  if (row.op == Op::wgrad || size_of(p.dtype) != 2 || !lean_plane_tile(row, p)) return false;
  if (p.R != 1 || p.S != 1 || p.stride_h != 1 || p.stride_w != 1 || p.groups != 1) return false;
  if (p.pad_top != 0 || p.pad_bottom != 0 || p.pad_left != 0 || p.pad_right != 0) return false;
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H * p.W == 0 || p.H * p.W % 4 != 0) return false;
  auto planes = [&](Strides const& s, int align, int64_t channels) {
    bool const flat = p.H == 1 || p.W == 1 || s.h == p.W * s.w;
    auto fours = [](int64_t size, int64_t step) { return size == 1 || (step > 0 && step % 4 == 0); };
    return flat && (p.W == 1 ? s.h : s.w) == 1 && align >= 8 && fours(channels, s.c) && fours(p.N, s.n);
  };
  if (!planes(p.x, p.x_align, p.C) || !planes(p.y, p.y_align, p.K)) return false;
  return p.w.c == 1 && channel_vectors(p.w, p.w_align, p.C, 8, p.dtype) && map_supports(p.w, p.K, 1, 1, p.dtype) &&
         !pointwise_supports(row.op, p);
}

// Does a row run 1x1 filters over NCHW, in place? What is not gathered, of 16-bit fprop and dgrad, by 64x64 alone.
constexpr bool lean_takes_planes(Row const& row, Problem const& p) {
  if (!lean_plane_tile(row, p)) return false;
  if (lean_gathers(row, p)) return true;
  if (size_of(p.dtype) == 2 && row.op != Op::wgrad && row.tile_n > 64) return false;
  int const v = 16 / size_of(p.dtype);
  if (channel_vectors(p.x, p.x_align, p.C, v, p.dtype) && channel_vectors(p.y, p.y_align, p.K, v, p.dtype))
    return false;
  if (!pointwise_supports(row.op, p) || (row.op == Op::dgrad && p.dtype == DType::f32 && row.tile_n != 64))
    return false;
  return channel_vectors(p.w, p.w_align, p.C, v, p.dtype) && map_supports(p.w, p.K, 1, 1, p.dtype);
}

// Channels of wgrad's operands: copies of channels that are no whole vectors are padded.
constexpr int64_t lean_channels(int64_t channels, Strides const& s, DType t) {
  return channels % (16 / size_of(t)) == 0 ? channels : s.w;
}

// wgrad of 1x1 filters in TF32 where pixels of channels that are no vectors follow each other: so many are a row of a
// matrix (matrix_period). 1: it is not taken so.
constexpr int64_t lean_period(Row const& row, Problem const& p) {
  if (row.op != Op::wgrad || p.dtype != DType::f32 || p.R != 1 || p.S != 1 || p.groups != 1) return 1;
  if (p.stride_h != 1 || p.stride_w != 1 || p.P() != p.H || p.Q() != p.W || p.pad_top != 0 || p.pad_left != 0) return 1;
  int64_t const pixels = p.N * p.H * p.W;
  if (p.C < 16 || p.K < 16 || max64(p.C, p.K) > 8192 || p.w.c != 1 || pixels < 1024 || pixels > 1 << 22) return 1;
  return p.C * p.K > 150000 ? 1 : max64(matrix_period(p), 1);  // more weights take longer to add than to pack
}

// Tiles of wgrad, and steps of a tile.
constexpr int64_t lean_wgrad_tiles(Row const& row, Problem const& p) {
  if (lean_period(row, p) > 1)
    return ceil_div(matrix_shifted(p.K, p.dtype), row.tile_m) * ceil_div(matrix_shifted(p.C, p.dtype), row.tile_n);
  return ceil_div(p.K, row.tile_m) * ceil_div(p.C, row.tile_n) * p.R * p.S;
}
constexpr int64_t lean_wgrad_steps(Row const& row, Problem const& p) {
  int64_t const run = 128 / size_of(p.dtype), pixels = p.P() * p.Q(), period = lean_period(row, p);
  if (period > 1) return period * ceil_div(p.N * pixels / period, run);
  return lean_takes_planes(row, p) ? p.N * ceil_div(pixels, run) : ceil_div(p.N * pixels, run);
}

// Phases of dgrad's strides. Rows of TF32 take up to four, several taps, in one launch.
constexpr int64_t lean_phases(Problem const& p) { return phases_of(p.H, p.stride_h) * phases_of(p.W, p.stride_w); }
constexpr bool lean_takes_phases(Row const& row, Problem const& p) {
  return row.op == Op::dgrad && row.dtype == DType::f32 && p.R * p.S > 1 && lean_phases(p) <= 4;
}

// Tiles of a problem. Over planes those of fprop and dgrad have filters (channels) as rows and runs of pixels as
// columns, in 16-bit types of any images, gathered ones single pixels.
constexpr int64_t lean_tiles(Row const& row, Problem const& p) {
  if (row.op == Op::wgrad) return lean_wgrad_tiles(row, p);
  int64_t const channels = row.op == Op::fprop ? p.K : p.C, image = row.op == Op::fprop ? p.P() * p.Q() : p.H * p.W;
  if (!lean_takes_planes(row, p)) return ceil_div(p.N * image, row.tile_m) * ceil_div(channels, row.tile_n);
  if (lean_gathers(row, p)) return ceil_div(channels, row.tile_m) * ceil_div(p.N * image, row.tile_n);
  int64_t const columns =
      p.dtype == DType::f32 ? p.N * ceil_div(image, row.tile_n) : ceil_div(p.N * ceil_div(image, 64), row.tile_n / 64);
  return ceil_div(channels, row.tile_m) * columns;
}

// wgrad in TF32 in channels_last: blocks of a tile whose sums a second launch adds, `blocks` of them an SM. More than a
// cluster has; 0: they are too few.
inline constexpr int kLeanMostCluster = 8;
inline constexpr int kLeanChain = 6144;  // pixels that are added up in one chain (kTf32Pixels in tma_tf32.h)
constexpr int64_t lean_sums_parts(Row const& row, Problem const& p, int blocks) {
  if (int64_t const period = lean_period(row, p); period > 1) {  // each part has one pixel of each row
    int64_t const steps = lean_wgrad_steps(row, p) / period;
    return period * max64(max64(min64(blocks * 132 / lean_wgrad_tiles(row, p) / period, steps / 2), 1),
                          ceil_div(steps * 32, kLeanChain));
  }
  int64_t const parts = min64(blocks * 132 / max64(lean_wgrad_tiles(row, p), 1), lean_wgrad_steps(row, p) / 2);
  return lean_takes_planes(row, p) || parts <= kLeanMostCluster ? 0 : parts;
}
// The sums of a block's tile in the workspace.
constexpr int64_t lean_workspace_bytes(Row const& row, Problem const& p, int split) {
  bool const parts =
      row.op == Op::wgrad && p.dtype == DType::f32 && (split > kLeanMostCluster || lean_period(row, p) > 1);
  return parts ? lean_wgrad_tiles(row, p) * split * row.tile_m * row.tile_n * 4 : 0;
}

// wgrad in TF32 adds up no longer chains than tma_wgrad_tf32.cuh.
constexpr bool lean_chain_fits(Row const& row, Problem const& p, int64_t steps, int split) {
  return row.op != Op::wgrad || p.dtype != DType::f32 || ceil_div(steps, split) * 32 <= kLeanChain;
}

// Lines of 64 bytes, of a group's channels that a step sums over.
constexpr bool lean_short_lines(Op op, Problem const& p) {
  return size_of(p.dtype) == 2 && tma_line(op == Op::dgrad ? p.K_per_group() : p.C_per_group()) == 64;
}

// Groups: kernels of their own, of tiles that were chosen. The group is a dimension of the map, which allows for small
// filters and padding alone and puts zeros behind a group's channels.
constexpr bool lean_takes_groups(Row const& row, Problem const& p) {
  Op const op = row.op;
  if (op == Op::wgrad || row.tile_m != 64 || min64(p.C_per_group(), p.K_per_group()) < 16) return false;
  if (op == Op::dgrad && lean_phases(p) > 1) return false;
  if (lean_short_lines(op, p) && row.tile_n != (op == Op::dgrad ? 64 : 32)) return false;
  return im2col_supports(walk_h(op, p, 0), op == Op::fprop ? p.H : p.P(), true) &&
         im2col_supports(walk_w(op, p, 0), op == Op::fprop ? p.W : p.Q(), true);
}

constexpr bool lean_supports(Row const& row, Problem const& p) {
  if (p.dtype == DType::f32 && !p.allow_tf32) return false;
  if (lean_period(row, p) > 1)
    return lean_workspace_bytes(row, p, int(lean_sums_parts(row, p, 2))) <= kMaxWorkspaceBytes;
  if (row.op == Op::wgrad && p.dtype == DType::f32) {
    bool fits = false;
    int64_t const tiles = lean_wgrad_tiles(row, p), steps = lean_wgrad_steps(row, p);
    for (int split : {1, 2, 3, 4, 8})
      fits |= lean_chain_fits(row, p, steps, split) && (split == 1 || tiles <= lean_clusters(split));
    int64_t const parts = lean_sums_parts(row, p, 2);
    fits |= parts > 0 && lean_chain_fits(row, p, steps, int(parts));
    if (!fits) return false;
  }
  if (lean_takes_planes(row, p)) return true;
  int const v = 16 / size_of(p.dtype);
  if (p.groups == 0 || p.N == 0 || p.C == 0 || p.K == 0 || p.P() == 0 || p.Q() == 0 || p.R == 0 || p.S == 0)
    return false;
  if (p.groups > 1 && !lean_takes_groups(row, p)) return false;
  if (lean_large(row) && row.op != Op::wgrad && (row.op == Op::fprop ? p.C : p.K) <= 32) return false;
  if (row.op == Op::dgrad && lean_phases(p) > 1 && !lean_takes_phases(row, p)) return false;
  int64_t const C = p.C_per_group(), K = p.K_per_group();
  if (!channel_vectors(p.x, p.x_align, C, v, p.dtype) || !channel_vectors(p.w, p.w_align, C, v, p.dtype) ||
      !channel_vectors(p.y, p.y_align, K, v, p.dtype))
    return false;
  Row like = row;
  like.variant = Variant::im2col;
  if (!tma_supports(like, p)) return false;
  // Tiles along M are a grid's second dimension.
  int64_t const most = int64_t(65535) * 64, pixels = p.N * (row.op == Op::dgrad ? p.H * p.W : p.P() * p.Q());
  if (double(p.N) * double(p.H) * double(p.W) >= double(most) || double(p.N) * double(p.P()) * double(p.Q()) >= most)
    return false;
  return (row.op == Op::wgrad ? p.K : pixels) < most && max64(p.K, p.C) * p.R * p.S < int64_t(1) << 30;
}

// Large tiles: as measured on layers of fprop and wgrad, dgrad as fprop. A step takes as long whether an SM has
// company or not.
constexpr Estimate lean_large_estimate(Row const& row, Problem const& p) {
  bool const wgrad = row.op == Op::wgrad, dgrad = row.op == Op::dgrad;
  int64_t const pixels = p.N * (dgrad ? p.H * p.W : p.P() * p.Q());
  int64_t const steps = ceil_div(wgrad ? pixels : dgrad ? p.K : p.C, 64) * (wgrad ? 1 : p.R * p.S);
  int64_t const tiles = lean_tiles(row, p), each = ceil_div(tiles, 132);
  double const area = double(row.tile_m) * row.tile_n;
  bool const two = area <= 128 * 128;  // blocks share an SM
  double const step_ns = two ? 330 : 500;
  double const bytes = (double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P() * p.Q())) +
                        double(p.K) * double(p.C) * double(wgrad ? p.R * p.S : 1)) *
                       size_of(p.dtype);
  double const work = double(each) * double(steps) * step_ns, memory = bytes / 3500;
  double ns = (wgrad ? 4900 : 5700) + (work > memory ? work : memory) + bytes / 12000;
  bool const taps = p.R * p.S > 1, shared = p.C % 64 != 0 || p.K % 64 != 0;
  if (shared) ns *= taps ? 1.5 : 1.15;  // lines of memory are shared
  if (wgrad && taps) ns *= each > 1 ? 1.35 : 1.17;
  // Fewer tiles, and more than a round, were slower than other rows.
  if (tiles < 60 || (wgrad && steps < 4) || each > (two ? 2 : 1)) ns *= 1.5;
  return {ns, 1};
}

// wgrad in TF32, as measured: what a block waits for, alone on its SM or with others. Of planes whose rows share lines
// of memory it is more. Lowered by what the other rows' estimates leave out of such layers.
constexpr Estimate lean_sums_estimate(Row const& row, Problem const& p) {
  bool const planes = lean_takes_planes(row, p), shared = p.H * p.W % 32 != 0 && p.N > 1;
  int64_t const tiles = lean_wgrad_tiles(row, p), steps = lean_wgrad_steps(row, p);
  double const step_ns = !planes ? 282 : shared ? 290 : 150;
  double const bytes = (double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P() * p.Q())) +
                        double(p.K) * double(p.C) * double(p.R * p.S)) *
                       4;
  Estimate best;
  for (int split : {1, 2, 3, 4, 8}) {
    if (lean_period(row, p) > 1 || (split > 1 && (steps < 2 * split || tiles > lean_clusters(split)))) continue;
    if (!lean_chain_fits(row, p, steps, split)) continue;
    double const each = double(ceil_div(tiles * split, 132)),
                 work = double(ceil_div(steps, split)) * step_ns * (each > 1 ? each * 0.72 : 1);
    double ns = (!planes  ? 5300
                 : shared ? 5800
                          : 4800) +
                (work > bytes / 3500 ? work : bytes / 3500) + (split > 1 ? 900 : 0);
    if (each > 3) ns += (each - 3) * 1700;  // first copies and stores, of which others no longer cover all
    if (ns > 40000) ns *= 1.1;
    if (best.ns == 0 || ns < best.ns) best = {ns, split};
  }
  for (int blocks : {1, 2}) {
    int64_t const parts = lean_sums_parts(row, p, blocks);
    if (parts == 0 || !lean_chain_fits(row, p, steps, int(parts))) continue;
    double const work = double(ceil_div(steps, parts)) * step_ns * (blocks > 1 ? 1.44 : 1);
    double const ns = 5300 + (work > bytes / 3500 ? work : bytes / 3500) + 2600 +
                      double(tiles * parts) * row.tile_m * row.tile_n * 8 / 7000;
    if (best.ns == 0 || ns < best.ns) best = {ns, int(parts)};
  }
  // As measured beside other rows: 8x144x56x56 to 192 over NCHW 29.4 us, estimated at 20.4.
  if (p.R * p.S == 1) best.ns += !planes ? 400 : best.ns > 10000 ? (best.ns - 10000) * 0.3 : 0;
  // Several pixels a row: single sums of all parts; fitted to 67 layers, with 6 % for what it is off by.
  if (lean_period(row, p) > 1)
    best.ns = (best.ns * 1.43 - 3600 + double(best.split_k) * 31 + double(p.K) * double(p.C) * 0.042) * 1.06;
  return best;
}

// dgrad in TF32 over NCHW by the same instructions.
constexpr Estimate lean_sums_planes_estimate(Row const& row, Problem const& p) {
  int64_t const tiles = lean_tiles(row, p), steps = ceil_div(p.K, 32);
  double const bytes = (double(p.N) * double(p.C + p.K) * double(p.H) * double(p.W) + double(p.K) * double(p.C)) * 4;
  Estimate best;
  for (int split : {1, 2, 3, 4, 8}) {
    if (split > 1 && (steps < 2 * split || tiles > lean_clusters(split))) continue;
    double const each = double(ceil_div(tiles * split, 132)),
                 work = double(ceil_div(steps, split)) * 282 * (each > 1 ? each * 0.72 : 1);
    double ns = 5300 + (work > bytes / 3500 ? work : bytes / 3500) + (split > 1 ? 900 : 0);
    if (each > 1) ns += (each - 1) * 900;
    if (best.ns == 0 || ns < best.ns) best = {ns, split};
  }
  // As measured: 8x256x32x32 to 512 27.9 us, estimated at 21.0.
  if (p.C <= 256 && best.ns > 19000) best.ns *= 1.1;
  return best;
}

// A phase of a strided dgrad as a problem without strides: the largest, with as many taps as the one that meets most.
constexpr Problem lean_longest_phase(Problem p) {
  int64_t const phases_h = phases_of(p.H, p.stride_h), phases_w = phases_of(p.W, p.stride_w);
  int64_t R = 1, S = 1;
  for (int64_t i = 0; i < phases_h; ++i) R = max64(R, walk_h(Op::dgrad, p, i).taps);
  for (int64_t i = 0; i < phases_w; ++i) S = max64(S, walk_w(Op::dgrad, p, i).taps);
  p.H = ceil_div(p.H, phases_h), p.W = ceil_div(p.W, phases_w), p.R = R, p.S = S;
  p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
  p.pad_top = R - 1, p.pad_left = S - 1, p.pad_bottom = p.pad_right = 0;
  return p;
}

// What groups cost: a group of so many more images.
constexpr Problem lean_of_groups(Problem p) {
  p.N *= p.groups, p.C = p.C_per_group(), p.K = p.K_per_group(), p.groups = 1;
  return p;
}

// A step takes the longest of three: what a block alone on its SM waits for, the lines that L2 delivers to all SMs, and
// the multiplications. Constants fitted to the times of 798 choices of tile and split (docs/tuning.md).
constexpr Estimate lean_estimate(Row const& row, Problem const& p, int64_t phases = 1) {
  if (p.groups > 1) return lean_estimate(row, lean_of_groups(p), phases);
  if (lean_large(row)) return lean_large_estimate(row, p);
  if (row.op == Op::wgrad && p.dtype == DType::f32) return lean_sums_estimate(row, p);
  bool const tf32 = p.dtype == DType::f32, planes = lean_takes_planes(row, p);
  if (tf32 && planes && row.op == Op::dgrad) return lean_sums_planes_estimate(row, p);
  if (row.op == Op::dgrad && lean_phases(p) > 1) return lean_estimate(row, lean_longest_phase(p), lean_phases(p));
  bool const wgrad = row.op == Op::wgrad, dgrad = row.op == Op::dgrad;
  // dgrad's tiles of 64x64 are half as wide for up to 32 channels.
  double const TM = row.tile_m, TN = dgrad && !tf32 && row.tile_n == 64 && p.C <= 32 && !planes ? 32 : row.tile_n;
  double const area = TM * TN;
  int64_t const taps = p.R * p.S, line = 128 / size_of(p.dtype), C = dgrad ? p.K : p.C;
  int64_t const image = p.H * p.W;
  int64_t const steps = wgrad ? lean_wgrad_steps(row, p) : ceil_div(C, line) * taps;
  int64_t const tiles = lean_tiles(row, p) * phases;
  double const bytes =
      (double(p.N * phases) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P() * p.Q())) +
       double(p.K) * double(p.C) * double(taps)) *
      size_of(p.dtype);
  // Lines of 64 bytes take less, those that end early more (32x48x35x35 to 64 3x3 F 26.8 us, estimated at 13.3).
  bool const halves = C * size_of(p.dtype) <= 64 && !(planes && tiles <= 132 * 6);
  bool const short_lines = !wgrad && !tf32 && taps > 1 && C < 64;
  // TF32 of several taps: 1x24x128x128 to 32 3x3 F 12.9 us, estimated at 6; 2x12x64x64 to 16 4x4 14.8 (6.3).
  bool const tf32_taps = tf32 && !wgrad && taps > 1 && C <= 32 && !planes && (dgrad || tiles > 100);
  bool const ends = tf32_taps && C % 16 != 0;
  double const whole_ns = ends && !dgrad ? 3.9 : short_lines ? 1.7 : 1;
  double const line_ns = !halves                                   ? whole_ns
                         : ends                                    ? (dgrad ? 4 : 6)
                         : tf32_taps && !dgrad                     ? 2.7
                         : tf32 || wgrad || taps == 1              ? 1.6
                         : C % 32 != 0 || (dgrad && p.C % 32 != 0) ? 4
                         : dgrad                                   ? 0.75
                                                                   : 1;
  // dgrad's filters lie along its results' channels: those of 96 begin across lines of memory (26x96x31x9 to 208 7x7:
  // 85.3 us, estimated at 52.5).
  double const across = dgrad && !tf32 && taps > 1 && p.C > 64 && p.C % 64 != 0 ? 2 : 1;
  double const lines_ns = (TM + TN * across) * (dgrad ? 1.237 : 1.08) * line_ns;
  double const multiply_ns = area * (tf32 ? 32 / (1024 * 1.43) : 64 / (2048 * 1.43));
  double const busy_ns = lines_ns > multiply_ns ? lines_ns : multiply_ns;
  double const alone_ns = 78 + (TM + TN) * 0.35 + (taps == 1 ? 0 : TN < 64 ? 45 : 20);
  double const resident = area <= 64 * 64 ? 3 : 2;  // blocks of an SM
  // 5968 as measured, less by what the other rows' estimates leave out of layers of 6 to 20 us.
  double const before = tf32 ? 3000 : wgrad ? 4300 : 4470;
  int const off = (p.C % 64 != 0) + (p.K % 64 != 0);  // tensors whose pixels end within a line of memory
  Estimate best;
  for (int split : {1, 2, 3, 4, 8}) {
    if (split > 1 && (split > row.tile_n / 8 || steps < 2 * split || tiles > lean_clusters(split))) continue;
    double const share = double(ceil_div(steps, split)), blocks = double(tiles) * split / 132,
                 each = double(ceil_div(tiles * split, 132));
    double const full = (each * 0.79 + blocks * 0.21) * share * busy_ns * (halves && each > 4 ? dgrad ? 1.9 : 1.45 : 1);
    double const alone = share * alone_ns * (each > resident ? each / resident : 1);
    double ns = before + (full > alone ? full + alone * 0.04 : alone + full * 0.04) + (each - 1) * 51 +
                area * each * 0.041 + bytes / 5560;
    if (split > 1) ns += (tf32 ? 376 : 676) + (split == 2 ? (tf32 ? 1900 : 600) : 0) + area * 0.155;
    // As measured: 1x1 filters whose pixels share lines of memory, and tiles of 128x128 that do not fit at a time.
    if (taps == 1 && !wgrad && (p.C * size_of(p.dtype) % 128 != 0 || p.K * size_of(p.dtype) % 128 != 0))
      ns *= planes ? 1.06 : 1.2;
    if (taps == 1 && dgrad && !planes && each > 2 && p.C % 64 != 0) ns *= 1.4;
    if (taps == 1 && area >= 64 * 128 && each > (area > 64 * 128 ? 1 : 2))
      ns *= area > 64 * 128 && each > 2 ? (dgrad ? 1.3 : 1.17) : 1.12;
    // As measured: boxes of filters whose channels end within them.
    if (planes && !wgrad && p.C % 64 != 0)
      ns += double(tiles) / 132 * (dgrad ? double(steps) / double(ceil_div(p.C, 64)) : 1) * 600;
    // As measured: few channels of large tiles (25x24x26x26 to 72).
    if (tf32 && dgrad && taps == 1 && p.C <= 32 && TM > 64) ns += 2000;
    // As measured beside the other rows that take planes.
    if (planes)
      ns += tf32 ? 3200 : wgrad ? (row.tile_n == 64 ? -1200 : 0) : image * size_of(p.dtype) % 128 != 0 ? 600 : -500;
    // As measured beside other rows: what wgrad's steps take beyond, more so in lines that lie across those of memory.
    if (wgrad && !tf32 && taps > 1 && ns > 8000) ns += (ns - 8000) * (off == 2 ? 0.5 : off == 1 ? 0.3 : 0.12);
    // As measured: lines of 80 to 112 bytes.
    if (tf32 && row.op == Op::fprop && !planes && !ends && C < 32 && C % 16 != 0) ns *= 1.3;
    // As measured: larger layers take longer, those of several taps from a smaller size on (L19, L56; 1x1: L22), but
    // not where each block has an SM for itself.
    bool const alone_on_sm = taps > 1 && split == 1 && each <= 1 && (!tf32 || dgrad || area <= 64 * 128);
    if (!alone_on_sm && ns > (taps > 1 ? 16500 : tf32 ? 38000 : 30000)) ns *= 1.5;
    if (best.ns == 0 || ns < best.ns) best = {ns, split};
  }
  if (tf32 && best.split_k > 2) best.ns += 700;  // as measured beside other rows
  // As measured beside other rows: 8x128x28x28 to 512 by 64x64 14.2 us, estimated at 9.1, `64x128_im2col` 13.0, 10.6;
  // 64x128 beside 64x64, too; over NCHW short sums beside `32x32_any` (1x256x14x14 to 128 8.6, 7.4).
  if (tf32 && row.op == Op::fprop && taps == 1 && area <= 64 * 128)
    best.ns += planes ? (p.C <= 384 ? 500 : 0) + (area == 64 * 128 ? 300 : 0) : area == 64 * 128 ? 1300 : 400;
  return best;
}

}  // namespace conv2d_ext
