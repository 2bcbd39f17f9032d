// Which kernel runs a problem: make_plan enumerates the rows of kernels.def, drops those that do not support the
// problem and takes the cheapest. Pure and constexpr: nothing is read but the arguments.
#pragma once

#include <cstdint>

#include "band.h"
#include "diagonal.h"
#include "kernels.def"
#include "problem.h"
#include "strip.h"

namespace conv2d_ext {

enum class Family : uint8_t { tma, igemm, simt, depthwise, grouped, band, diagonal, strip };
enum class Variant : uint8_t { nhwc, any, nchw, nchw_s2, nhwc_s2, im2col, halo };

struct Row {
  Family family;
  Op op;
  DType dtype;
  int tile_m, tile_n, tile_k;
  Variant variant;
  char const* name;
};

#define CONV2D_EXT_ROW(family, op, dtype, tm, tn, tk, variant) \
  Row{Family::family,                                          \
      Op::op,                                                  \
      DType::dtype,                                            \
      tm,                                                      \
      tn,                                                      \
      tk,                                                      \
      Variant::variant,                                        \
      #family "_" #op "_" #dtype "_" #tm "x" #tn "_" #variant},
inline constexpr Row kRows[] = {CONV2D_EXT_KERNELS(CONV2D_EXT_ROW)};
#undef CONV2D_EXT_ROW
inline constexpr int kRowCount = sizeof(kRows) / sizeof(kRows[0]);

// What the planner knows of a GPU.
struct Device {
  int sm_count = 132;
  int compute_capability = 90;  // 10 * major + minor
};
inline constexpr Device h200_sxm{132, 90};

struct Plan {
  int kernel = -1;  // row of the table
  int split_k = 1;  // parts of the reduction, summed in order by a second pass
  int64_t workspace_bytes = 0;
};

// Partial sums never take more than this.
inline constexpr int64_t kMaxWorkspaceBytes = int64_t(64) << 20;

// The implicit GEMM of one group: out[M, N] = sum over `depth` of a gathered operand times a plain one.
//   fprop: M = N*P*Q pixels, N = K/g, depth = R*S*C/g     wgrad: M = R*S*C/g, N = K/g, depth = N*P*Q
//   dgrad: M = N*H*W pixels, N = C/g, depth = R*S*K/g, in min(stride, H) * min(stride, W) phases: the pixels of a phase
//          meet the same filter taps, so that none of the work is on zeros.
struct Gemm {
  int64_t M, N, depth, batches;  // M, depth: of one phase, rounded up; batches = groups * phases
};

constexpr Gemm gemm_of(Op op, Problem const& p) {
  int64_t const taps = p.R * p.S;
  if (op == Op::fprop) return {p.N * p.P() * p.Q(), p.K_per_group(), taps * p.C_per_group(), p.groups};
  if (op == Op::wgrad) return {taps * p.C_per_group(), p.K_per_group(), p.N * p.P() * p.Q(), p.groups};
  int64_t const phases_h = min64(p.stride_h, p.H), phases_w = min64(p.stride_w, p.W);
  int64_t const rows = ceil_div(p.H, max64(phases_h, 1)), columns = ceil_div(p.W, max64(phases_w, 1));
  int64_t const taps_h = ceil_div(p.R, p.stride_h / gcd64(p.dilation_h, p.stride_h));
  int64_t const taps_w = ceil_div(p.S, p.stride_w / gcd64(p.dilation_w, p.stride_w));
  return {p.N * rows * columns, p.C_per_group(), taps_h * taps_w * p.K_per_group(), p.groups * phases_h * phases_w};
}

// Can a group's channels be read and written as vectors of v elements?
constexpr bool channel_vectors(Strides const& s, int align, int64_t channels, int v, DType t) {
  return s.c == 1 && channels % v == 0 && s.n % v == 0 && s.h % v == 0 && s.w % v == 0 && align >= v * size_of(t);
}

constexpr bool is_nhwc(Variant v) { return v == Variant::nhwc || v == Variant::nhwc_s2; }

// ---- tma

constexpr bool is_halo(Variant v) { return v == Variant::halo; }

inline constexpr int kHalo = 8;        // pixels that a tile of the halo variants copies beyond its own
inline constexpr int kMaxPhases = 16;  // of dgrad

constexpr Walk walk_h(Op op, Problem const& p, int64_t phase) {
  return op == Op::dgrad ? dgrad_walk(p.H, p.R, p.stride_h, p.pad_top, p.dilation_h, phase)
                         : fprop_walk(p.P(), p.R, p.stride_h, p.pad_top, p.dilation_h);
}
constexpr Walk walk_w(Op op, Problem const& p, int64_t phase) {
  return op == Op::dgrad ? dgrad_walk(p.W, p.S, p.stride_w, p.pad_left, p.dilation_w, phase)
                         : fprop_walk(p.Q(), p.S, p.stride_w, p.pad_left, p.dilation_w);
}

// The walk over all columns that its taps touch.
constexpr Walk halo_walk(Walk w) {
  w.pixels += (w.taps - 1) * w.tap_stride;
  return w;
}

// What an im2col copy can do along one axis.
constexpr bool im2col_supports(Walk const& w, int64_t extent) {
  auto corner = [](int64_t v) { return v >= -128 && v <= 127; };
  return w.stride <= 8 && corner(w.lower) && corner(box_upper(w, extent)) && (w.taps - 1) * w.tap_stride <= 255;
}

// Sizes and strides that a tensor map can hold; a dimension of size one has stride 0 in a Problem.
constexpr bool map_supports(Strides const& s, int64_t n, int64_t h, int64_t w, DType t) {
  constexpr int64_t most = int64_t(1) << 31;
  auto stride = [t](int64_t size, int64_t v) { return size == 1 || (v > 0 && v * size_of(t) < int64_t(1) << 40); };
  return n < most && h < most && w < most && stride(n, s.n) && stride(h, s.h) && stride(w, s.w);
}

constexpr bool tma_supports(Row const& row, Problem const& p) {
  bool const forward = row.op == Op::fprop;
  int const v = 16 / size_of(p.dtype);
  if (p.dtype == DType::f32 && !p.allow_tf32) return false;
  if (!channel_vectors(p.x, p.x_align, p.C_per_group(), v, p.dtype)) return false;
  if (!channel_vectors(p.w, p.w_align, p.C_per_group(), v, p.dtype)) return false;
  if (!channel_vectors(p.y, p.y_align, p.K_per_group(), v, p.dtype)) return false;
  if (row.op == Op::wgrad) {
    return map_supports(p.x, p.N, p.H, p.W, p.dtype) && map_supports(p.y, p.N, p.P(), p.Q(), p.dtype) &&
           im2col_supports(walk_h(row.op, p, 0), p.H) && im2col_supports(walk_w(row.op, p, 0), p.W) &&
           double(p.N) * double(p.P()) * double(p.Q()) < 1e11 &&
           double(p.R) * double(p.S) * double(ceil_div(p.C_per_group(), 64)) * double(p.K) < 1e9;
  }
  // One instruction reduces 2 v channels (TF32: a step's 32); those of the next group must not be among them.
  int const together = p.dtype == DType::f32 ? 32 : 2 * v;
  if (p.groups > 1 && (forward ? p.C_per_group() : p.K_per_group()) % together != 0) return false;
  if (!map_supports(p.w, p.K, p.R, p.S, p.dtype)) return false;
  if (!(forward ? map_supports(p.x, p.N, p.H, p.W, p.dtype) : map_supports(p.y, p.N, p.P(), p.Q(), p.dtype)))
    return false;
  int64_t const phases_h = forward ? 1 : phases_of(p.H, p.stride_h),
                phases_w = forward ? 1 : phases_of(p.W, p.stride_w);
  if (phases_h * phases_w > kMaxPhases) return false;
  bool shared = false;
  for (int64_t i = 0; i < phases_h; ++i)
    for (int64_t j = 0; j < phases_w; ++j) {
      Walk const h = walk_h(row.op, p, i);
      Walk w = walk_w(row.op, p, j);
      if (h.taps == 0 || w.taps == 0) continue;
      if (!im2col_supports(h, forward ? p.H : p.P())) return false;
      if (is_halo(row.variant)) {
        if (w.stride != 1 || (w.taps - 1) * w.tap_stride > kHalo) return false;
        shared = shared || w.taps > 1;
        w = halo_walk(w);
      }
      if (!im2col_supports(w, forward ? p.W : p.Q())) return false;
    }
  if (is_halo(row.variant) && !shared) return false;
  // Tiles and steps are counted in 32 bits.
  Gemm const g = gemm_of(row.op, p);
  double const pixels = double(g.M) * (is_halo(row.variant) ? double(p.S * p.dilation_w + 1) : 1.0);
  return (pixels / row.tile_m + 2) * double(ceil_div(g.N, row.tile_n)) * double(g.batches) < 1e6 * 500 &&
         double(g.depth) < 1e9;
}

constexpr bool depthwise_supports(Row const& row, Problem const& p) {
  if (p.C_per_group() != 1 || p.K == 0 || p.H == 0 || p.W == 0) return false;
  if (is_nhwc(row.variant)) {
    if ((p.C > 1 && p.x.c != 1) || (p.K > 1 && p.y.c != 1)) return false;
  } else {
    if ((p.W > 1 && p.x.w != 1) || (p.Q() > 1 && p.y.w != 1)) return false;
  }
  // Coordinates of padded images, and numbers of taps, are int in the kernels.
  constexpr int64_t most = int64_t(1) << 30;
  if (p.H + p.pad_top + p.pad_bottom > most || p.W + p.pad_left + p.pad_right > most) return false;
  if (double(p.R) * double(p.S) * double(p.K_per_group()) > double(most)) return false;
  if (row.tile_m == 0) return true;
  bool const rows = p.R == row.tile_m && p.stride_h == row.tile_k && p.dilation_h == 1;
  bool const columns = p.S == row.tile_n && p.stride_w == row.tile_k && p.dilation_w == 1;
  // A block has at least 4 x 4 outputs of one channel or more; the grid must hold the blocks.
  double const pixels = double(max64(p.H, p.P()) + 3) * double(max64(p.W, p.Q()) + 3);
  return p.K == p.C && rows && columns && double(p.N) * double(p.C) * pixels / 16 < double(most);
}

// The least number of groups whose channels and filters are multiples of 8 each.
constexpr int64_t groups_per_unit(Problem const& p) {
  return max64(8 / gcd64(8, p.C_per_group()), 8 / gcd64(8, p.K_per_group()));
}

// How many blocks of 8 outputs a warp computes from the same fragments of the inputs: those of a unit, up to four, or
// two of f32, whose fragments take more registers.
constexpr int grouped_shared_blocks(int64_t blocks, DType t) {
  int64_t const most = t == DType::f32 ? 2 : 4;
  return int(blocks <= most ? blocks : most == 4 && (blocks <= 6 || blocks == 9) ? 3 : most);
}

// wgrad of grouped.cuh. A half is a tap and 16 bytes of channels; a warp sums so many of them, of up to four blocks of
// 8 filters, over a share of the pixels: as many as its registers hold.
constexpr int grouped_halves(int together, DType t) { return t == DType::f32 ? 16 : together == 4 ? 8 : 10; }
struct GroupedSums {
  int64_t slab, together, n_groups, chunks, items, shares;
};
constexpr GroupedSums grouped_sums(Problem const& p) {
  int64_t const wide = size_of(p.dtype) / 2, per_unit = groups_per_unit(p);
  int64_t const C = per_unit * p.C_per_group() / 8 * wide, K = per_unit * p.K_per_group() / 8;
  int64_t const slab = min64(ceil_div(p.groups, per_unit), max64(1, 8 / max64(C, K * wide)));
  int const together = p.dtype == DType::f32 ? 1 : grouped_shared_blocks(K, p.dtype);
  int64_t const n_groups = ceil_div(K, together);
  int64_t const chunks = ceil_div(C * p.R * p.S, grouped_halves(together, p.dtype)), items = slab * n_groups * chunks;
  return {slab, together, n_groups, chunks, items, max64(1, 8 / items)};
}

constexpr bool grouped_supports(Row const& row, Op op, Problem const& p) {
  if (p.groups == 1 || p.C_per_group() < 2 || p.K == 0 || p.H == 0 || p.W == 0 || p.N == 0) return false;
  int const slot = 16 / size_of(p.dtype);  // channels that are copied at once
  if (row.variant == Variant::nhwc &&
      (p.C % 8 != 0 || p.K % 8 != 0 || !channel_vectors(p.x, p.x_align, p.C, slot, p.dtype) ||
       !channel_vectors(p.y, p.y_align, p.K, slot, p.dtype)))
    return false;
  if (p.R * p.S > 64 || p.stride_h > 4 || p.stride_w > 4 || p.R > 64 || p.S > 64) return false;
  // Coordinates of padded images are int in the kernels, and so is the number of tiles of 8 x 8 pixels.
  constexpr int64_t most = int64_t(1) << 30;
  if (p.H + p.pad_top + p.pad_bottom > most || p.W + p.pad_left + p.pad_right > most) return false;
  int64_t const out_h = op == Op::dgrad ? ceil_div(p.H, p.stride_h) : p.P();
  int64_t const out_w = op == Op::dgrad ? ceil_div(p.W, p.stride_w) : p.Q();
  if (double(p.N) * double(ceil_div(out_h, 8)) * double(ceil_div(out_w, 8)) >= double(most)) return false;
  // Shared memory must hold a tile of 8 x 8 outputs of one unit with its halo, and the filters.
  int64_t const per_unit = groups_per_unit(p), C = per_unit * p.C_per_group() / 8, K = per_unit * p.K_per_group() / 8;
  if (C > 16 || K > 16 || ceil_div(p.groups, per_unit) > 65535) return false;
  if (p.dilation_h > 64 || p.dilation_w > 64) return false;
  bool const backward = op == Op::dgrad;
  int64_t const step_h = backward ? 1 : p.stride_h, step_w = backward ? 1 : p.stride_w;
  int64_t const halo_h = 7 * step_h + (p.R - 1) * p.dilation_h / (backward ? p.stride_h : 1) + 2;
  int64_t const halo_w = 7 * step_w + (p.S - 1) * p.dilation_w / (backward ? p.stride_w : 1) + 2 + step_w;
  // Blocks of 16 bytes of inputs; f32's filters are kept in two parts.
  int64_t const wide = size_of(p.dtype) / 2, ins = (backward ? K : C) * wide, outs = backward ? C : K;
  if (op == Op::wgrad)
    return ((halo_h * halo_w + 16) * ins + 80 * (K * wide + 4)) * 16 + ins * p.R * p.S * 4 <= 220 * 1024;
  int64_t const together = grouped_shared_blocks(outs, p.dtype), taps = p.R == 3 && p.S == 3 ? 12 : p.R * p.S;
  int64_t const halves = taps * ins + 16, filters = halves * ceil_div(outs, together) * together * 128 * wide;
  return (halo_h * halo_w + 16) * 16 * ins + filters + halves * 16 <= 220 * 1024;
}

// Depthwise rows for stride 1 and K == C: what they have in common.
constexpr bool unit_stride_depthwise(Row const& row, Problem const& p) {
  if (p.C_per_group() != 1 || p.K != p.C || p.R > kBandMaxTaps || p.S > kBandMaxTaps) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.N == 0 || p.C == 0 || p.H == 0 || p.W == 0 || p.P() == 0 || p.Q() == 0) return false;
  bool const nhwc = is_nhwc(row.variant);
  if (nhwc ? p.C > 1 && (p.x.c != 1 || p.y.c != 1) : (p.W > 1 && p.x.w != 1) || (p.Q() > 1 && p.y.w != 1)) return false;
  constexpr int64_t most = int64_t(1) << 29;
  return p.H + p.pad_top + p.pad_bottom <= most && p.W + p.pad_left + p.pad_right <= most;
}

constexpr bool band_supports(Row const& row, Op op, Problem const& p) {
  if (!unit_stride_depthwise(row, p)) return false;
  bool const nhwc = is_nhwc(row.variant);
  constexpr int64_t most = int64_t(1) << 29;
  if (op == Op::wgrad) {
    BandSumsTile const t = band_sums_tile(p, row.tile_m / 16, row.tile_n / 8, nhwc);
    double const units = double(t.units_r) * double(t.units_s) * double(t.channel_units);
    double const steps = double(t.image_units) * double(t.tiles_h) * double(t.tiles_w);
    return t.shared_bytes <= kBandSharedBytes && units * 4096 < double(most) && steps < double(most);
  }
  BandTile const t = band_tile(op, p, row.tile_m / 16, row.tile_n / 16, nhwc);
  double const blocks =
      double(t.tiles_h) * double(t.tiles_w) * double(t.channel_units) * double(ceil_div(p.N, t.images));
  return t.shared_bytes <= kBandSharedBytes && blocks < double(most);
}

constexpr bool diagonal_supports(Row const& row, Op op, Problem const& p) {
  if (!unit_stride_depthwise(row, p) || p.R > row.tile_m || p.S > row.tile_n) return false;
  if (!channel_vectors(p.x, p.x_align, p.C, 8, p.dtype) || !channel_vectors(p.y, p.y_align, p.C, 8, p.dtype))
    return false;
  constexpr int64_t most = int64_t(1) << 29;
  if (op == Op::wgrad) {
    DiagonalSumsTile const t = diagonal_sums_tile(p, row.tile_m, row.tile_n);
    return double(t.tiles_h) * double(t.tiles_w) * double(t.image_units) < double(most) &&
           t.channel_units * 4096 < most;
  }
  bool const backward = op == Op::dgrad;
  DiagonalTile const t =
      diagonal_tile(p.N, backward ? p.H : p.P(), backward ? p.W : p.Q(), p.C, row.tile_m, row.tile_n);
  return double(t.tiles_h) * double(t.tiles_w) * double(t.channel_units) * double(t.image_units) < double(most);
}

constexpr bool strip_supports(Row const& row, Op op, Problem const& p) {
  if (!unit_stride_depthwise(row, p)) return false;
  StripTile const t = strip_tile(op, p, is_nhwc(row.variant));
  double const blocks = double(t.tiles_h) * double(t.tiles_w) * double(t.channel_units) * double(p.N);
  return t.items() <= kStripThreads && t.shared_bytes <= kStripSharedBytes && blocks < double(1 << 30);
}

constexpr bool supports(Row const& row, Op op, Problem const& p, Device const& d) {
  if (row.op != op || row.dtype != p.dtype) return false;
  switch (row.family) {
    case Family::simt: {
      if (d.compute_capability < 80) return false;
      if (row.variant != Variant::nhwc) return true;
      int const v = p.dtype == DType::f64 ? 2 : 4;  // elements that are loaded at once
      bool const x = channel_vectors(p.x, p.x_align, p.C_per_group(), v, p.dtype);
      bool const w = channel_vectors(p.w, p.w_align, p.C_per_group(), v, p.dtype);
      bool const y = channel_vectors(p.y, p.y_align, p.K_per_group(), v, p.dtype);
      return op == Op::fprop ? x && w : op == Op::dgrad ? y && w : x && y;
    }
    case Family::igemm:
      return d.compute_capability == 90 && p.H + p.pad_top + p.pad_bottom <= (1 << 29) &&
             p.W + p.pad_left + p.pad_right <= (1 << 29) &&
             channel_vectors(p.x, p.x_align, p.C_per_group(), 8, p.dtype) &&
             channel_vectors(p.w, p.w_align, p.C_per_group(), 8, p.dtype) &&
             channel_vectors(p.y, p.y_align, p.K_per_group(), 8, p.dtype);
    case Family::tma:
      return d.compute_capability == 90 && tma_supports(row, p);
    case Family::depthwise:
      return d.compute_capability >= 80 && depthwise_supports(row, p);
    case Family::grouped:
      return d.compute_capability == 90 && grouped_supports(row, op, p);
    case Family::diagonal:
      return d.compute_capability == 90 && diagonal_supports(row, op, p);
    case Family::strip:
      return d.compute_capability == 90 && strip_supports(row, op, p);
    case Family::band:
      return d.compute_capability == 90 && band_supports(row, op, p);
  }
  return false;
}

// A row's estimated time and the split of the reduction that it was estimated with.
struct Estimate {
  double ns = 0;
  int split_k = 1;
};

// The implicit GEMMs: tiles * split_k blocks over the SMs in rounds; a round costs its steps, plus the prologue and
// epilogue of a tile; a split costs the second pass.
constexpr Estimate gemm_estimate(Row const& row, Op op, Problem const& p, Device const& d, double step_ns,
                                 double fixed_ns) {
  Gemm const g = gemm_of(op, p);
  double const tile_bytes = double(row.tile_m) * row.tile_n * (p.dtype == DType::f64 ? 8 : 4);
  double const tiles = double(ceil_div(g.M, row.tile_m)) * double(ceil_div(g.N, row.tile_n)) * double(g.batches);
  int64_t const steps = ceil_div(g.depth, row.tile_k);
  Estimate best;
  for (int64_t split = 1; split <= 1024 && (split == 1 || split * 4 <= steps); split += split < 8 ? 1 : split / 4) {
    double const bytes = split == 1 ? 0 : tiles * double(split) * tile_bytes;
    if (bytes > double(kMaxWorkspaceBytes)) break;
    double const blocks = tiles * double(split);
    int64_t const rounds = blocks > 1e15 ? int64_t(1e15) / d.sm_count : ceil_div(int64_t(blocks), d.sm_count);
    double ns = double(rounds) * (double(ceil_div(steps, split)) * step_ns + fixed_ns) + 3000;
    if (split > 1) ns += 3000 + bytes * 2 / 2500;  // written and read again at 2.5 TB/s
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
    if (blocks >= 8.0 * d.sm_count) break;  // enough to fill the device evenly
  }
  return best;
}

constexpr Estimate simt_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  double const tile = double(row.tile_m) * row.tile_n;
  // Multiply-adds per SM and nanosecond: 128 lanes at 1.755 GHz, times the share that the tile was seen to reach.
  double const share = tile >= 128 * 128  ? 0.62
                       : tile >= 128 * 64 ? 0.57
                       : row.tile_n >= 64 ? 0.45
                       : row.tile_n >= 32 ? 0.40
                                          : 0.17;
  double rate = 128 * 1.755 * share * (p.dtype == DType::f64 ? 0.5 : 1.0);
  if (row.variant == Variant::any) rate *= tile >= 128 * 128 ? 0.86 : tile >= 64 * 64 ? 0.77 : 0.68;
  return gemm_estimate(row, op, p, d, tile * row.tile_k / rate, 1500 + tile * 0.05);
}

constexpr Estimate igemm_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  // 2048 multiply-adds per SM and cycle, 1.6 GHz under load, times the share that the tile was seen to reach
  // (docs/tuning.md): the gathering warpgroup bounds it, more so where it copies along rows.
  bool const along_k = op == Op::fprop;
  double const share = row.tile_n >= 256   ? (along_k ? 0.62 : 0.45)
                       : row.tile_n >= 128 ? (along_k ? 0.47 : 0.29)
                                           : (along_k ? 0.25 : 0.19);
  double const tile = double(row.tile_m) * row.tile_n;
  return gemm_estimate(row, op, p, d, tile * row.tile_k / (2048 * 1.6 * share), 1500 + tile * 0.05);
}

// Floats of the filters that the TF32 rows round beforehand; a multiple of 16 bytes.
constexpr int64_t tma_prepared(Problem const& p) { return ceil_div(p.K * p.C_per_group() * p.R * p.S, 64) * 64; }

// Tiles of all phases.
constexpr int64_t tma_tiles(Row const& row, Problem const& p) {
  Op const op = row.op;
  if (op == Op::wgrad) {
    int64_t const runs = p.R * p.S * ceil_div(p.C_per_group(), 64);
    return ceil_div(runs, row.tile_m / 64) * ceil_div(p.K_per_group(), row.tile_n) * p.groups;
  }
  int64_t const phases_h = op == Op::fprop ? 1 : phases_of(p.H, p.stride_h),
                phases_w = op == Op::fprop ? 1 : phases_of(p.W, p.stride_w);
  int64_t const N = op == Op::fprop ? p.K_per_group() : p.C_per_group();
  int64_t tiles = 0;
  for (int64_t i = 0; i < phases_h; ++i)
    for (int64_t j = 0; j < phases_w; ++j) {
      Walk const h = walk_h(op, p, i);
      Walk w = walk_w(op, p, j);
      if (is_halo(row.variant) && w.taps > 0 && h.taps > 0) w = halo_walk(w);
      tiles += ceil_div(p.N * h.pixels * w.pixels, row.tile_m) * ceil_div(N, row.tile_n) * p.groups;
    }
  return tiles;
}

// tma: a step takes the longest of its instructions and of the copies through L2.
constexpr Estimate tma_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  bool const halo = is_halo(row.variant);
  int const chunk = 128 / size_of(p.dtype);
  double const TM = row.tile_m, TN = row.tile_n;
  int64_t const C = op == Op::fprop ? p.C_per_group() : p.K_per_group(),
                N = op == Op::fprop ? p.K_per_group() : p.C_per_group();
  double const mma_ns = TM * TN * 64 / (2048 * 1.6 * (TN >= 128 ? 0.92 : TM >= 256 ? 0.80 : 0.72));
  bool const two = TM * TN <= 128 * 64;  // blocks an SM
  Estimate best;
  int64_t tiles = 0, most = 0;
  double whole = 0;  // steps of all tiles, in ns of one SM
  int64_t const phases_h = op == Op::fprop ? 1 : phases_of(p.H, p.stride_h),
                phases_w = op == Op::fprop ? 1 : phases_of(p.W, p.stride_w);
  double longest = 0;
  for (int64_t i = 0; i < phases_h; ++i)
    for (int64_t j = 0; j < phases_w; ++j) {
      Walk const h = walk_h(op, p, i);
      Walk w = walk_w(op, p, j);
      if (halo && w.taps > 0) w = halo_walk(w);
      int64_t const t = ceil_div(p.N * h.pixels * w.pixels, row.tile_m) * ceil_div(N, row.tile_n) * p.groups;
      int64_t const steps = h.taps * w.taps * ceil_div(C, chunk);
      double const a = halo && w.taps > 0 ? (TM + kHalo) / double(w.taps) : TM;
      double const copy_ns = (a + TN) * 128 / 70;
      double const ns = double(steps) * (mma_ns > copy_ns ? mma_ns : copy_ns);
      tiles += t;
      if (steps > most) most = steps;
      if (ns > longest) longest = ns;
      whole += double(t) * ns;
    }
  double const fixed = 900 + TM * TN * 0.03;
  double const memory_ns = (double(p.N) * double(p.C) * double(p.H) * double(p.W) +
                            double(p.N) * double(p.K) * double(p.P()) * double(p.Q())) *
                           size_of(p.dtype) / 3500;
  for (int64_t split = 1; split <= 256 && (split == 1 || split * 2 <= most); split += split < 8 ? 1 : split / 4) {
    double const bytes = split == 1 ? 0 : double(tiles) * double(split) * TM * TN * 4;
    if (bytes > double(kMaxWorkspaceBytes)) break;
    double const units = double(tiles) * double(split), slots = double(d.sm_count);
    // Whole rounds of the longest tile, but no less than an even share; two blocks an SM hide each other's epilogue.
    double const each = longest / double(split) + fixed * (two ? 0.5 : 1.0);
    int64_t const rounds = ceil_div(int64_t(units), int64_t(slots));
    double const share = (whole + units * fixed * (two ? 0.5 : 1.0)) / slots;
    double ns = phases_h * phases_w == 1 ? double(rounds) * each : (share > each ? share : each);
    if (ns < memory_ns) ns = memory_ns;
    ns += 3000;
    if (split > 1) ns += 2500 + bytes * 2 / 2500;
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
    if (units >= 4.0 * d.sm_count) break;
  }
  return best;
}

// As tma_estimate; the pixels are split for whole rounds.
constexpr Estimate tma_wgrad_estimate(Row const& row, Problem const& p, Device const& d) {
  double const TM = row.tile_m, TN = row.tile_n;
  int64_t const tiles = tma_tiles(row, p), steps = ceil_div(p.N * p.P() * p.Q(), 64);
  double const mma_ns = TM * TN * 64 / (2048 * 1.6 * (TN >= 128 ? 0.92 : 0.75));
  double const copy_ns = (TM + TN) * 128 / 70;
  double const step_ns = mma_ns > copy_ns ? mma_ns : copy_ns, fixed = 1200 + TM * TN * 0.05;
  bool const two = TM * TN <= 128 * 64;
  Estimate best;
  for (int64_t split = 1; split <= 1024 && (split == 1 || split * 4 <= steps); split += split < 32 ? 1 : split / 16) {
    double const bytes = split == 1 ? 0 : double(tiles) * double(split) * TM * TN * 4;
    if (bytes > double(kMaxWorkspaceBytes)) break;
    double const slots = double(d.sm_count) * (two ? 2 : 1);
    int64_t const rounds = ceil_div(tiles * split, int64_t(slots));
    double ns = double(rounds) * (double(ceil_div(steps, split)) * step_ns * (two ? 2 : 1) + fixed) + 3000;
    if (split > 1) ns += 2500 + bytes * 2 / 3000;
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
    if (double(tiles * split) >= 12.0 * d.sm_count) break;
  }
  return best;
}

// Depthwise: the slower of memory and multiply-adds, and for wgrad as many splits as give an SM a dozen blocks.
// The rates are estimates still.
constexpr Estimate depthwise_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  bool const nhwc = is_nhwc(row.variant), any = row.tile_m == 0;
  double const sms = double(d.sm_count) / 132, work = p.flops() / 2;
  double const elements =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  // nhwc: lanes without a channel wait. A row of an image off 16 bytes is copied in smaller pieces.
  double const lanes = nhwc ? double(p.K) / double(ceil_div(p.K, 32) * 32) : 1.0;
  double const f64 = p.dtype == DType::f64 ? 0.5 : 1.0;
  double const phases =
      any && op == Op::dgrad ? double(p.stride_h) * double(p.stride_w) : 1.0;  // taps that do not meet
  double const memory_ns = elements * size_of(p.dtype) / ((any ? 2000 : 3500) * sms);
  double const fma_ns = work * phases / ((any ? 300 : 17000) * sms * lanes * f64);
  // 16-bit types: their conversions (docs/tuning.md).
  double const slower = any || size_of(p.dtype) > 2 ? 1.0 : nhwc ? 2.1 : 1.4;
  Estimate best{(memory_ns > fma_ns ? memory_ns : fma_ns) * slower + (any ? 5000.0 : 4000.0), 1};
  if (op != Op::wgrad) return best;
  double const units = any ? double(ceil_div(p.K, nhwc ? 32 : 1)) * double(ceil_div(p.R * p.S, 32))
                           : double(ceil_div(p.K, nhwc ? 32 : 1));
  double const sums = double(p.K) * double(p.R) * double(p.S);
  double const pixels = double(p.N) * double(p.P()) * double(p.Q());
  double split = 12.0 * d.sm_count / units;
  split = split < pixels / 256 ? split : pixels / 256;
  int const acc_bytes = p.dtype == DType::f64 ? 8 : 4;
  double const room = double(kMaxWorkspaceBytes) / (sums * acc_bytes);
  split = split < room ? split : room;
  best.split_k = split < 2 ? 1 : split > 4096 ? 4096 : int(split);
  double const blocks = units * best.split_k;
  if (blocks < 2.0 * d.sm_count) best.ns += (best.ns - 4000) * (2.0 * d.sm_count / blocks - 1);
  if (best.split_k > 1) best.ns += 3000 + sums * acc_bytes * best.split_k * 2 / 2500;
  return best;
}

// Grouped: reading and writing, and the products of whole blocks and squares, which overlap in part (docs/tuning.md).
constexpr Estimate grouped_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  bool const nhwc = row.variant == Variant::nhwc, backward = op == Op::dgrad, sums = op == Op::wgrad;
  double const sms = double(d.sm_count) / 132;
  double const elements =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  // Bytes per ns. nchw: lanes go along rows, and channels_last rows are slow that way; so are a stride's single pixels.
  double rate = nhwc ? 1650 : p.x.c == 1 && p.C > 1 ? 500 : 1150;
  if (!nhwc && backward && p.stride_w > 1) rate /= 6;
  double const memory_ns = elements * size_of(p.dtype) / (rate * sms);
  int64_t const per_unit = groups_per_unit(p), C = per_unit * p.C_per_group() / 8, K = per_unit * p.K_per_group() / 8;
  int64_t const h = backward ? ceil_div(p.H, p.stride_h) : p.P(), w = backward ? ceil_div(p.W, p.stride_w) : p.Q();
  double const squares = double(p.N) * double(ceil_div(h, 8)) * double(ceil_div(w, 8));
  double const products = squares * double(ceil_div(p.groups, per_unit)) * double(C * K) * double(p.R * p.S) * 2;
  double const f32 = p.dtype != DType::f32 ? 1 : p.allow_tf32 ? 2 : 6;  // 8 channels by 8 filters a product, or less
  double const multiply_ns = products * f32 * (sums ? 0.045 : 0.030) / sms;
  double const large = memory_ns > multiply_ns ? memory_ns : multiply_ns;
  double const small = memory_ns > multiply_ns ? multiply_ns : memory_ns;
  double const work_ns = large + small * small / (2 * (large + 1));
  if (!sums) return {work_ns + 13000, 1};
  // As many shares of the pixels as keep two blocks an SM busy, unless adding them up costs more.
  GroupedSums const g = grouped_sums(p);
  int64_t const slabs = ceil_div(ceil_div(p.groups, per_unit), g.slab) * ceil_div(g.items, 16);
  double const share_bytes = double(p.K) * double(p.C_per_group()) * double(p.R * p.S) * 4 * double(g.shares);
  Estimate best{};
  for (int64_t blocks = 1; blocks == 1 || blocks * slabs <= 2 * d.sm_count; blocks += max64(1, blocks / 8)) {
    double const bytes = share_bytes * double(blocks);
    if (blocks > 1 && (bytes > double(kMaxWorkspaceBytes) || double(blocks) > squares / 2)) break;
    double const idle = 2.0 * d.sm_count / double(blocks * slabs);
    double const ns = work_ns * (idle > 1 ? idle : 1) + 16000 + bytes * 2 / 2500;
    if (blocks == 1 || ns < best.ns) best = {ns, int(blocks * g.shares)};
  }
  return best;
}

constexpr Estimate band_sums_estimate(Row const& row, Problem const& p, Device const& d) {
  int const depth = row.tile_m / 16, width = row.tile_n / 8;
  BandSumsTile const t = band_sums_tile(p, depth, width, is_nhwc(row.variant));
  double const units = double(t.units_r) * double(t.units_s) * double(t.channel_units);
  double const products = double(t.channels) * t.images * t.rows * (t.columns / 16) * depth * width;
  // Multiplications of 16 x 8 x 16, or their FMAs.
  double const product_ns = p.dtype == DType::f32 ? 2048 / (128 * 1.755 * 0.75) : 1.6 / 1.755;
  // As measured, the copies of a step included.
  double const slower = is_nhwc(row.variant) ? 2.6 : 1.7;
  double const step_ns = (700 + products * product_ns) * slower, sums = double(p.K) * double(p.R) * double(p.S);
  Estimate best;
  for (int64_t split = 1; split <= t.steps() && split <= 64; ++split) {
    if (split > 1 && sums * double(split) * 4 > double(kMaxWorkspaceBytes)) break;
    double const rounds = double(ceil_div(int64_t(units * double(split)), 2 * d.sm_count));  // two blocks an SM
    double ns = 4000 + rounds * double(ceil_div(t.steps(), split)) * step_ns * 2;
    if (split > 1) ns += 3000 + sums * double(split) * 8 / 2500;
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
  }
  return best;
}

// Multiplications of 16 x 8 x 8 in 3.2 cycles on each of an SM's four tensor cores.
constexpr Estimate band_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  if (op == Op::wgrad) return band_sums_estimate(row, p, d);
  BandTile const t = band_tile(op, p, row.tile_m / 16, row.tile_n / 16, is_nhwc(row.variant));
  double const planes = double(ceil_div(p.N, t.images) * t.images) * double(t.channel_units) * t.channels;
  double const tiles = planes * double(t.tiles_h) * double(t.tiles_w);
  // Copies and stores of a tile, which the multiplications of others do not hide; nhwc turns them round.
  double const tile_ns = row.tile_m == 64 ? 2000 : row.tile_m == 32 ? 600 : 150;
  double const ns = tiles * (t.products * 0.8 / 1.755 + tile_ns) / d.sm_count;
  return {4000 + ns * (is_nhwc(row.variant) ? 1.4 : 1.0), 1};
}

// FMAs at six tenths of their peak, not measured yet, in threads for 8 columns of a row.
constexpr Estimate strip_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  StripTile const t = strip_tile(op, p, is_nhwc(row.variant));
  double const fmas = double(ceil_div(t.items(), 32) * 32) * kStripWidth * double(p.R) * double(p.S);
  int64_t const blocks = t.blocks(p.N);
  double const rounds = blocks < 2 * d.sm_count ? 1.0 : double(blocks) / double(2 * d.sm_count);
  return {5000 + rounds * (fmas * 2 / (128 * 1.755 * 0.6) + 2000), 1};
}

// Two kinds of work that hide each other in part.
constexpr double overlapped(double a, double b) { return a > b ? a + b / 2 : b + a / 2; }

constexpr Estimate diagonal_sums_estimate(Row const& row, Problem const& p, Device const& d) {
  DiagonalSumsTile const t = diagonal_sums_tile(p, row.tile_m, row.tile_n);
  int const resident = diagonal_blocks(Op::wgrad, row.tile_m) * d.sm_count;
  // Of a strip, where each SM has one.
  double const copied = (t.rows + row.tile_m) * double(t.pitch_x + t.pitch_y) * t.groups * 16;
  double const products = double(t.rows) * t.strips * t.groups * ((row.tile_m + 1) / 2) * row.tile_n;
  double const copy_ns = copied / 3500 * d.sm_count, multiply_ns = products * 1.6 / 1.755;
  double const unit_ns = overlapped(copy_ns, multiply_ns), sums = double(p.K) * double(p.R) * double(p.S);
  Estimate best;
  for (int64_t split = 1; split <= t.units() && split <= 4096; split += split < 32 ? 1 : split / 32) {
    if (split > 1 && sums * double(split) * 4 > double(kMaxWorkspaceBytes)) break;
    double const blocks = double(t.channel_units) * double(split), full = double(resident);
    double const rounds = blocks > full ? double(ceil_div(int64_t(blocks), resident)) : 1.0;
    double const shared = blocks < full ? (blocks < d.sm_count ? 1.0 : blocks / d.sm_count) : full / d.sm_count;
    double ns = 3000 + rounds * (double(ceil_div(t.units(), split)) * unit_ns * shared + 1000);
    if (split > 1) ns += 2500 + sums * double(split) * 8 / 2500;
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
  }
  return best;
}

// Memory, or the multiplications: R * S of 8 channels for 16 pixels, in 3.2 cycles on each of an SM's four tensor
// cores.
constexpr Estimate diagonal_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  if (op == Op::wgrad) return diagonal_sums_estimate(row, p, d);
  bool const backward = op == Op::dgrad;
  DiagonalTile const t =
      diagonal_tile(p.N, backward ? p.H : p.P(), backward ? p.W : p.Q(), p.C, row.tile_m, row.tile_n);
  double const units = t.pairs ? double(ceil_div(p.N, 2)) : double(p.N);
  double const planes = units * double(t.channel_units) * t.groups * double(t.tiles_h) * double(t.tiles_w);
  double const pixels = double(t.rows + row.tile_m - 1) * t.pitch + double(t.rows) * 16 * t.strips;
  double const products = double(t.rows) * t.strips * row.tile_m * row.tile_n;
  double const memory_ns = planes * pixels * 16 / 3500, multiply_ns = planes * products * 0.8 / 1.755 / d.sm_count;
  return {4000 + overlapped(memory_ns, multiply_ns), 1};
}

constexpr Estimate estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  switch (row.family) {
    case Family::tma:
      return op == Op::wgrad ? tma_wgrad_estimate(row, p, d) : tma_estimate(row, op, p, d);
    case Family::igemm:
      return igemm_estimate(row, op, p, d);
    case Family::depthwise:
      return depthwise_estimate(row, op, p, d);
    case Family::grouped:
      return grouped_estimate(row, op, p, d);
    case Family::diagonal:
      return diagonal_estimate(row, op, p, d);
    case Family::strip:
      return strip_estimate(row, op, p, d);
    case Family::band:
      return band_estimate(row, op, p, d);
    case Family::simt:
      break;
  }
  return simt_estimate(row, op, p, d);
}

constexpr int64_t workspace_bytes(Row const& row, Op op, Problem const& p, int split_k) {
  if (row.family == Family::tma) {
    int64_t const partial = split_k == 1 ? 0 : tma_tiles(row, p) * split_k * row.tile_m * row.tile_n * 4;
    return partial + (p.dtype == DType::f32 ? tma_prepared(p) * 4 : 0);
  }
  if (split_k == 1) return 0;
  if (row.family == Family::depthwise || row.family == Family::band || row.family == Family::diagonal)
    return p.K * p.R * p.S * split_k * (p.dtype == DType::f64 ? 8 : 4);
  if (row.family == Family::grouped) return p.K * p.C_per_group() * p.R * p.S * split_k * 4;
  Gemm const g = gemm_of(op, p);
  int const acc_bytes = p.dtype == DType::f64 ? 8 : 4;
  return ceil_div(g.M, row.tile_m) * ceil_div(g.N, row.tile_n) * g.batches * split_k * row.tile_m * row.tile_n *
         acc_bytes;
}

// The plan for one row; the caller has asked supports() first.
constexpr Plan plan_row(int kernel, Op op, Problem const& p, Device const& d) {
  Estimate const e = estimate(kRows[kernel], op, p, d);
  return {kernel, e.split_k, workspace_bytes(kRows[kernel], op, p, e.split_k)};
}

// There is always a plan on a GPU of compute capability 8.0 or later; kernel = -1 otherwise.
constexpr Plan make_plan(Op op, Problem const& p, Device const& d) {
  int best = -1;
  double best_ns = 0;
  for (int i = 0; i < kRowCount; ++i) {
    if (!supports(kRows[i], op, p, d)) continue;
    double const ns = estimate(kRows[i], op, p, d).ns;
    if (best < 0 || ns < best_ns) {
      best = i;
      best_ns = ns;
    }
  }
  return best < 0 ? Plan{} : plan_row(best, op, p, d);
}

}  // namespace conv2d_ext
