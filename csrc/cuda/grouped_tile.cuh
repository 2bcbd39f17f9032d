// Tiles of the grouped kernels: which channels, outputs and inputs a block works on, and the copy to shared memory.
//
// Channels go in blocks of 16 bytes (8 of a 16-bit type). A unit is the least number of groups whose channels fill
// blocks on either side: one group of 8, 16, 24, ... channels, two of 4, four of 2, two of 12. Within a unit every
// block of inputs meets every block of outputs; weights between two groups are zero. A block of threads works on a
// slab of units, and on `images` x rows x columns of 8 x 8 outputs, one such square a warp.
//
// Shared memory holds a plane for each block of input channels: the slots of an image's tile with its halo, 16 bytes
// each. With a step of 2 between the inputs of neighbouring outputs, the columns of a row are sorted by parity, so that
// the eight outputs of a row always read eight neighbouring slots, which lie in different banks.
#pragma once

#include "launch.h"
#include "ptx.cuh"
#include "types.cuh"

namespace conv2d_ext::grouped {

constexpr int kBlock = 8;  // channels of 16 bytes, and filters of one mma
constexpr int kSide = 8;   // outputs of a warp: 8 x 8
constexpr int kSlot = 16;  // bytes
constexpr int kMaxWarps = 8, kMaxSumWarps = 16;
constexpr int kMaxTaps = 64, kMaxPhases = 16;

// Quotients of numbers whose product with the divisor is below 2^32.
struct Divisor {
  uint32_t value = 1, magic = 0;
  Divisor() = default;
  explicit Divisor(uint32_t d) : value(d), magic(d == 1 ? 0 : uint32_t(((uint64_t(1) << 32) + d - 1) / d)) {}
  __device__ uint32_t quotient(uint32_t n) const { return magic == 0 ? n : __umulhi(n, magic); }
};

// One axis of the image: output i of phase f is at i * out_step + f; its taps meet the inputs i * step + offset.
struct Axis {
  int step, out_step, phases;
  int in_extent, out_extent;
  int low;        // the least offset of all phases and taps
  int span;       // from the least to the greatest, and one
  int positions;  // outputs of the largest phase
};

// A tap of a phase: how far from an output's first input, in rows and columns; the same in slots.
struct Tap {
  int h, w, r, s;
  int offset = 0;
};

struct Params {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t in_n, in_h, in_w, out_n, out_h, out_w, bias_stride;
  // Weight of output channel o and input channel i of group g, both counted within it.
  int64_t w_group, w_out, w_in, w_r, w_s;
  int64_t N;
  Axis h, w_axis;
  int in_per_group, out_per_group, groups_per_unit;
  int in_blocks, out_blocks;         // of a unit
  int units, slab;                   // in all; of a block of threads
  int n_groups;                      // of a unit: runs of output blocks that share their inputs' fragments
  int squares_h, squares_w, images;  // of a tile
  int tiles_h, tiles_w, tiles;
  int halo_h, halo_w, pitch, parity_columns;  // slots of an image's tile; columns from one parity to the next
  int plane;                                  // bytes
  int stages, stage_bytes, weight_bytes, table_offset, bias_count;
  int halves, taps;                // k8 steps of all phases; taps
  bool is_3x3;                     // unit stride and dilation; each column's three taps are padded to four
  bool mixed;                      // zero weights within units: NaN and infinity may spread, and are looked for
  int phase_tap[kMaxPhases + 1];   // the first tap of each phase
  int phase_half[kMaxPhases + 1];  // and its first half, which is even
  int phase_count[kMaxPhases];     // its halves
  Tap tap[kMaxTaps];
  Divisor halo_rows, blocks_of_slab, blocks_of_outputs, squares_of, columns_of, filters, step_w;
};

struct Tile {
  int64_t n;  // its first image
  int h, w;   // its first output of a phase
};

__device__ inline Tile tile_of(Params const& p, int index) {
  int const per_image = p.tiles_h * p.tiles_w, rest = index % per_image;
  return {int64_t(index / per_image) * p.images, rest / p.tiles_w * p.squares_h * kSide,
          rest % p.tiles_w * p.squares_w * kSide};
}

// Copies a tile of `in` with its halo, zeros outside of the image. A warp copies a row at a time.
template <class T>
__device__ inline void load_tile(Params const& p, Tile const& tile, int first_block, int blocks, uint32_t stage) {
  int const lane = threadIdx.x % 32, warps = blockDim.x / 32;
  int const h0 = tile.h * p.h.step + p.h.low, w0 = tile.w * p.w_axis.step + p.w_axis.low;
  int const per_pixel = int(p.blocks_of_slab.value), items = p.halo_w * per_pixel;
  T const* const in = static_cast<T const*>(p.in);
  for (int row = threadIdx.x / 32; row < p.images * p.halo_h; row += warps) {
    int const image = int(p.halo_rows.quotient(row)), h = h0 + row - image * p.halo_h;
    bool const inside = tile.n + image < p.N && unsigned(h) < unsigned(p.h.in_extent);
    T const* const from = in + (tile.n + image) * p.in_n + h * p.in_h + first_block * kBlock;
    uint32_t const to = stage + row * p.pitch * kSlot;
#pragma unroll 4
    for (int i = lane; i < items; i += 32) {
      int const column = int(p.blocks_of_slab.quotient(i)), block = i - column * per_pixel, w = w0 + column;
      bool const valid = inside && block < blocks && unsigned(w) < unsigned(p.w_axis.in_extent);
      int const place = int(p.step_w.quotient(column)), parity = column - place * p.w_axis.step;
      int const slot = parity * p.parity_columns + place;
      ptx::cp_async_16(to + block * p.plane + slot * kSlot, valid ? from + w * p.in_w + block * kBlock : in, valid);
    }
  }
}

// ---- host side

inline Axis axis_of(Op op, int64_t in_extent, int64_t out_extent, int64_t taps, int64_t stride, int64_t pad,
                    int64_t dilation) {
  Axis a{};
  bool const backward = op == Op::dgrad;
  a.step = backward ? 1 : int(stride), a.out_step = backward ? int(stride) : 1;
  a.phases = backward ? int(min64(stride, out_extent)) : 1;
  a.in_extent = int(in_extent), a.out_extent = int(out_extent);
  a.positions = int(ceil_div(out_extent, a.out_step));
  int64_t low = INT32_MAX, high = INT32_MIN;
  for (int phase = 0; phase < a.phases; ++phase)
    for (int64_t r = 0; r < taps; ++r) {
      int64_t const at = backward ? phase + pad - r * dilation : r * dilation - pad;
      if (backward && at % stride != 0) continue;
      int64_t const offset = backward ? at / stride : at;
      low = min64(low, offset), high = max64(high, offset);
    }
  if (low > high) low = high = 0;
  a.low = int(low), a.span = int(high - low + 1);
  return a;
}

// The offset of tap r in phase f from the tile's first input, or -1 if they do not meet.
inline int tap_offset(Op op, Axis const& a, int phase, int64_t r, int64_t stride, int64_t pad, int64_t dilation) {
  if (op != Op::dgrad) return int(r * dilation - pad) - a.low;
  int64_t const at = phase + pad - r * dilation;
  return at % stride != 0 ? -1 : int(at / stride) - a.low;
}

// Runs of output blocks that a warp computes: four blocks in all, so that a quad of lanes stores 64 bytes.
constexpr int groups_of_warp(int shared) { return shared == 1 ? 4 : shared == 2 ? 2 : 1; }

constexpr int64_t kSharedMost = 227 * 1024 - 1024, kSharedHalf = kSharedMost / 2 - 1024;

// Everything but the tiles.
inline Params params_of(Op op, Problem const& problem, Arguments const& args) {
  Params p{};
  bool const backward = op == Op::dgrad;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.out = args.out, p.bias_stride = args.bias_stride;
  p.in_n = in.n, p.in_h = in.h, p.in_w = in.w;
  p.out_n = out.n, p.out_h = out.h, p.out_w = out.w;
  int64_t const C = problem.C_per_group(), K = problem.K_per_group();
  p.w_group = K * problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.w_out = backward ? problem.w.c : problem.w.n, p.w_in = backward ? problem.w.n : problem.w.c;
  p.N = problem.N;
  p.h = axis_of(op, backward ? problem.P() : problem.H, backward ? problem.H : problem.P(), problem.R, problem.stride_h,
                problem.pad_top, problem.dilation_h);
  p.w_axis = axis_of(op, backward ? problem.Q() : problem.W, backward ? problem.W : problem.Q(), problem.S,
                     problem.stride_w, problem.pad_left, problem.dilation_w);
  p.in_per_group = int(backward ? K : C), p.out_per_group = int(backward ? C : K);
  p.groups_per_unit = int(groups_per_unit(problem));
  p.in_blocks = p.groups_per_unit * p.in_per_group / kBlock,
  p.out_blocks = p.groups_per_unit * p.out_per_group / kBlock;
  p.units = int(problem.groups / p.groups_per_unit);
  p.mixed = p.groups_per_unit > 1;
  for (int phase = 0; phase < p.h.phases * p.w_axis.phases; ++phase) {
    p.phase_tap[phase] = p.taps;
    for (int i = 0; i < problem.R * problem.S; ++i) {
      // In the order of the inputs: by columns, and dgrad's mirrored.
      int const place = backward ? int(problem.R * problem.S) - 1 - i : i;
      int const r = place % int(problem.R), s = place / int(problem.R);
      int const h =
          tap_offset(op, p.h, phase / p.w_axis.phases, r, problem.stride_h, problem.pad_top, problem.dilation_h);
      int const w =
          tap_offset(op, p.w_axis, phase % p.w_axis.phases, s, problem.stride_w, problem.pad_left, problem.dilation_w);
      if (h >= 0 && w >= 0) p.tap[p.taps++] = {h, w, r, s};
    }
    p.phase_tap[phase + 1] = p.taps;
  }
  return p;
}

// The k8 steps of each phase.
inline void set_halves(Params& p, bool is_3x3) {
  p.is_3x3 = is_3x3;
  for (int phase = 0; phase < p.h.phases * p.w_axis.phases; ++phase) {
    int const taps = p.phase_tap[phase + 1] - p.phase_tap[phase];
    p.phase_count[phase] = p.in_blocks * (is_3x3 ? 12 : taps);
    p.phase_half[phase] = p.halves;
    p.halves += (p.phase_count[phase] + 1) / 2 * 2;
    p.phase_half[phase + 1] = p.halves;
  }
}

// Slots of an image's tile.
inline void set_halo(Params& p) {
  p.halo_h = (p.squares_h * kSide - 1) * p.h.step + p.h.span;
  p.halo_w = (p.squares_w * kSide - 1) * p.w_axis.step + p.w_axis.span;
  p.parity_columns = int(ceil_div(p.halo_w, p.w_axis.step));
  p.pitch = p.parity_columns * p.w_axis.step;
}

// What follows from the tile.
inline void set_offsets(Params& p) {
  p.tiles_h = int(ceil_div(p.h.positions, p.squares_h * kSide));
  p.tiles_w = int(ceil_div(p.w_axis.positions, p.squares_w * kSide));
  p.tiles = int(p.tiles_h * p.tiles_w * ceil_div(p.N, p.images));
  for (int i = 0; i < p.taps; ++i) {
    int const w = p.tap[i].w;
    p.tap[i].offset = p.tap[i].h * p.pitch + w % p.w_axis.step * p.parity_columns + w / p.w_axis.step;
  }
  p.halo_rows = Divisor(uint32_t(p.halo_h)), p.blocks_of_slab = Divisor(uint32_t(p.slab * p.in_blocks));
  p.squares_of = Divisor(uint32_t(p.squares_h * p.squares_w * p.images));
  p.columns_of = Divisor(uint32_t(p.squares_w));
  p.filters = Divisor(uint32_t(p.out_per_group)), p.step_w = Divisor(uint32_t(p.w_axis.step));
}

// Chooses slab and tile, and returns the bytes of shared memory.
inline int64_t set_tiles(Params& p, int shared_blocks, int runs) {
  p.n_groups = int(ceil_div(p.out_blocks, shared_blocks));
  // 64 channels of a pixel are 128 bytes, a line of the caches.
  p.slab = int(min64(p.units, max64(1, 64 / kBlock / max64(p.in_blocks, p.out_blocks))));
  int64_t shared = 0;
  for (;; p.slab = int(ceil_div(p.slab, 2))) {
    int64_t const per_slab = ceil_div(p.slab * p.n_groups, runs);  // warps for one square
    p.weight_bytes = int(p.slab * p.n_groups * p.halves * shared_blocks * 128);
    p.bias_count = int(per_slab * runs * shared_blocks * kBlock);
    int64_t const fixed = p.weight_bytes + p.bias_count * 4 + p.halves * 8;
    // The cheapest tile: inputs read, and squares multiplied, per output that exists.
    double best = 0;
    int best_h = 0, best_w = 0, best_images = 0;
    int64_t const most = max64(1, kMaxWarps / per_slab);
    for (p.squares_h = 1; p.squares_h <= most; ++p.squares_h)
      for (p.squares_w = 1; p.squares_w * p.squares_h <= most; ++p.squares_w) {
        set_halo(p);
        p.images = int(max64(1, most / (p.squares_h * p.squares_w)));
        bool const fills = p.squares_h * kSide >= p.h.positions && p.squares_w * kSide >= p.w_axis.positions;
        if (!fills) p.images = 1;
        p.images = int(min64(p.images, p.N));
        int64_t const slots = int64_t(p.images) * p.halo_h * p.pitch;
        int64_t const bytes = slots * kSlot * p.in_blocks * p.slab + fixed + 1024;
        if (bytes > kSharedMost) continue;
        double const tiles = double(ceil_div(p.h.positions, p.squares_h * kSide)) *
                             double(ceil_div(p.w_axis.positions, p.squares_w * kSide)) *
                             double(ceil_div(p.N, p.images));
        double const squares = double(ceil_div(int64_t(p.squares_h) * p.squares_w * p.images * per_slab, kMaxWarps)) *
                               kMaxWarps / double(per_slab);
        double const cost = tiles * (double(slots) + squares * kSide * kSide * 0.5);
        if (best_h == 0 || cost < best) best = cost, best_h = p.squares_h, best_w = p.squares_w, best_images = p.images;
      }
    if (best_h == 0 && p.slab > 1) continue;
    p.squares_h = best_h > 0 ? best_h : 1, p.squares_w = best_h > 0 ? best_w : 1;
    p.images = best_h > 0 ? best_images : 1;
    set_halo(p);
    // Planes are apart by as many slots that the copies of a pixel's blocks go to different banks.
    int const blocks = p.slab * p.in_blocks;
    int const skew = blocks >= 8 || blocks % 2 != 0 ? 1 : 8 / blocks;
    int const slots = int(ceil_div(int64_t(p.images) * p.halo_h * p.pitch, 8)) * 8 + skew;
    p.plane = slots * kSlot;
    p.stage_bytes = int(ceil_div(int64_t(p.plane) * blocks, 128) * 128);
    int64_t const two = 2 * p.stage_bytes + fixed, one = p.stage_bytes + fixed;
    p.stages = two <= kSharedHalf || (two <= kSharedMost && one > kSharedHalf) ? 2 : 1;
    shared = p.stages == 2 ? two : one;
    break;
  }
  p.table_offset = p.stages * p.stage_bytes + p.weight_bytes + p.bias_count * 4;
  set_offsets(p);
  return shared;
}

}  // namespace conv2d_ext::grouped
