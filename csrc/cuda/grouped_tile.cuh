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

#include "../core/grouped_tile.h"
#include "launch.h"
#include "ptx.cuh"
#include "types.cuh"

namespace conv2d_ext::grouped {

constexpr int kBlock = kGroupedBlock, kSide = kGroupedSide, kSlot = kGroupedSlot;
constexpr int kMaxWarps = kGroupedWarps, kMaxSumWarps = 16;
template <class T>
constexpr int kChannels = kSlot / int(sizeof(T));  // of a slot
constexpr int kMaxTaps = 81, kMaxPhases = 16;

// Quotients of numbers below 2^31: with 2^l >= value, n * ceil(2^(31 + l) / value) errs by less than n * 2^l.
struct Divisor {
  uint32_t value = 1, magic = 0;
  int shift = 0;
  Divisor() = default;
  explicit Divisor(uint32_t d) : value(d) {
    int l = 1;
    while ((uint64_t(1) << l) < d) ++l;
    magic = d == 1 ? 0 : uint32_t(((uint64_t(1) << (31 + l)) + d - 1) / d);
    shift = l - 1;
  }
  __device__ int quotient(int n) const { return magic == 0 ? n : int(__umulhi(uint32_t(n), magic) >> shift); }
};

using Axis = GroupedAxis;

// A tap of a phase: how far from an output's first input, in rows and columns; the same in slots.
struct Tap {
  int h, w, r, s;
  int offset = 0;
};

// A tensor that tiles are copied from or written to.
struct Image {
  void* data;
  int64_t n, c, h, w;  // element strides
  int64_t channels;
  int H, W;
};

// The part of an image that a block copies, and its slots in shared memory.
struct Window {
  int rows, columns;          // of an image's tile, with its halo
  int blocks, plane;          // planes, and bytes from one to the next
  int pitch, parity_columns;  // slots from row to row, and from one parity of the columns to the next
  int chunks, share;          // runs of 32 slots of a row, and how many of those, of all rows, a warp copies
  Divisor rows_of, columns_of, step, all_rows;
};

struct Params {
  Image in, out;
  void const* w;
  void const* bias;
  int64_t bias_stride;
  // Weight of output channel o and input channel i of group g, both counted within it.
  int64_t w_group, w_out, w_in, w_r, w_s;
  int64_t N;
  Axis axis_h, axis_w;
  int groups, in_per_group, out_per_group, groups_per_unit;
  int in_blocks, out_blocks;         // of a unit
  int units, slab;                   // in all; of a block of threads
  int n_groups;                      // of a unit: runs of output blocks that share their inputs' fragments
  int squares_h, squares_w, images;  // of a tile
  int tiles_h, tiles_w, tiles;
  Window window;  // of `in`
  int warps, stages, stage_bytes, weight_bytes, part_words, table_offset, bias_count;
  int halves, taps;     // k8 steps of all phases; taps
  int store_width;      // outputs of a row that are stored at once
  bool is_3x3;          // unit stride and dilation; each column's three taps are padded to four
  bool paired_weights;  // two channels of a 16-bit weight are loaded at once
  bool mixed;           // zero weights within units: NaN and infinity may spread, and are looked for
  Divisor tiles_of_image, tiles_of_row, squares_of, columns_of, filters, runs_of;
  int phase_tap[kMaxPhases + 1];   // the first tap of each phase
  int phase_half[kMaxPhases + 1];  // and its first half, which is even
  int phase_count[kMaxPhases];     // its halves
  Tap tap[kMaxTaps];               // last: a cold line of the parameters costs a trip to memory
};

// A tile's first image and its first output of a phase.
struct Tile {
  int64_t n;
  int h, w;

  __device__ Tile(Params const& p, int number) {
    int const image = p.tiles_of_image.quotient(number), rest = number - image * p.tiles_h * p.tiles_w;
    int const row = p.tiles_of_row.quotient(rest);
    n = int64_t(image) * p.images;
    h = row * p.squares_h * kSide, w = (rest - row * p.tiles_w) * p.squares_w * kSide;
  }
};

// Copies a window of `images` images from n0 on to shared memory, zeros outside of the image. The lanes go along the
// row, and load a slot's channels one by one. A warp copies 32 slots of a row at a time, those of the rows below next.
template <class T>
__device__ inline void load_window(Image const& image, Window const& window, int images, int64_t n0, int64_t N, int h0,
                                   int w0, int64_t channel0, uint32_t stage) {
  constexpr int channels = kChannels<T>;
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int const rows = images * window.rows, total = window.chunks * rows;
  T const* const data = static_cast<T const*>(image.data);
  int const left = int(min(image.channels - channel0, int64_t(window.blocks) * channels));
  int next = warp * window.share;
  int const end = min(next + window.share, total);
  while (next < end) {
    int const chunk = window.all_rows.quotient(next), row0 = next - chunk * rows, i = chunk * 32 + lane;
    int const count = min(end - next, rows - row0);
    next += count;
    int const block = window.columns_of.quotient(i), column = i - block * window.columns;
    int const place = window.step.quotient(column), parity = column - place * int(window.step.value);
    int const w = w0 + column;
    bool const exists = block < window.blocks;
    bool const valid = block * channels < left && unsigned(w) < unsigned(image.W);
    int at = window.rows_of.quotient(row0), h = row0 - at * window.rows;
    T const* const pixel = data + n0 * image.n + w * image.w + (channel0 + block * channels) * image.c;
    T const* from = pixel + at * image.n + (h0 + h) * image.h;
    uint32_t to = stage + block * window.plane + (row0 * window.pitch + parity * window.parity_columns + place) * kSlot;
#pragma unroll 2
    for (int k = 0; k < count; ++k) {
      bool const inside = valid && n0 + at < N && unsigned(h0 + h) < unsigned(image.H);
      Vector<T, channels> v;
#pragma unroll
      for (int c = 0; c < channels; ++c)
        v.v[c] = inside && block * channels + c < left ? from[c * image.c] : narrow<T>(0.f);
      if (exists) ptx::st_shared_v4(to, *reinterpret_cast<uint4 const*>(&v));
      to += window.pitch * kSlot;
      from += image.h;
      if (++h == window.rows) {
        h = 0, ++at;
        from = pixel + at * image.n + h0 * image.h;
      }
    }
  }
}

// The inputs of a tile with their halo.
template <class T>
__device__ inline void load_inputs(Params const& p, Tile const& tile, int first_unit, uint32_t stage) {
  load_window<T>(p.in, p.window, p.images, tile.n, p.N, tile.h * p.axis_h.step + p.axis_h.low,
                 tile.w * p.axis_w.step + p.axis_w.low, int64_t(first_unit) * p.in_blocks * kChannels<T>, stage);
}

// k of an operand's register: two channels of a 16-bit type, one of f32. `parts` says what f32 operands are made of:
// one TF32 number, the nearest, or two, their sum 22 bits; the products of the two small ones are left out.
template <class T, int parts>
__device__ inline void split(uint32_t raw, uint32_t (&part)[parts]) {
  if constexpr (sizeof(T) == 2) {
    part[0] = raw;
  } else {
    part[0] = ptx::cvt_rn_tf32(__uint_as_float(raw));
    if constexpr (parts == 2) part[1] = ptx::cvt_rn_tf32(__uint_as_float(raw) - __uint_as_float(part[0]));
  }
}

// The pairs of parts that are multiplied, the small products first.
template <int parts>
struct Products {
  static constexpr int count = parts == 2 ? 3 : 1;
  __device__ static constexpr int a(int i) { return i == 0 && parts == 2 ? 1 : 0; }
  __device__ static constexpr int b(int i) { return i == 1 ? 1 : 0; }
};

// ---- host side

// The offset of tap r in phase f from the tile's first input, or -1 if they do not meet.
inline int tap_offset(Op op, Axis const& a, int phase, int64_t r, int64_t stride, int64_t pad, int64_t dilation) {
  if (op != Op::dgrad) return int(r * dilation - pad) - a.low;
  int64_t const at = phase + pad - r * dilation;
  return at % stride != 0 ? -1 : int(at / stride) - a.low;
}

inline Image image_of(void const* data, Strides const& s, int64_t channels, int64_t H, int64_t W) {
  return {const_cast<void*>(data), s.n, s.c, s.h, s.w, channels, int(H), int(W)};
}

// Everything but the tiles.
inline Params params_of(Op op, Problem const& problem, Arguments const& args) {
  Params p{};
  bool const backward = op == Op::dgrad;
  int64_t const P = problem.P(), Q = problem.Q();
  Image const x = image_of(backward ? args.out : args.a, problem.x, problem.C, problem.H, problem.W);
  Image const y = image_of(backward ? args.a : args.out, problem.y, problem.K, P, Q);
  p.in = backward ? y : x, p.out = backward ? x : y;
  p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride;
  int64_t const C = problem.C_per_group(), K = problem.K_per_group();
  p.w_group = K * problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.w_out = backward ? problem.w.c : problem.w.n, p.w_in = backward ? problem.w.n : problem.w.c;
  p.N = problem.N;
  p.axis_h = grouped_axis_h(op, problem), p.axis_w = grouped_axis_w(op, problem);
  p.groups = int(problem.groups);
  p.in_per_group = int(backward ? K : C), p.out_per_group = int(backward ? C : K);
  p.groups_per_unit = int(groups_per_unit(problem));
  p.in_blocks = p.groups_per_unit * p.in_per_group * size_of(problem.dtype) / kSlot,
  p.out_blocks = p.groups_per_unit * p.out_per_group / kBlock;
  p.units = int(ceil_div(problem.groups, p.groups_per_unit));
  p.mixed = p.groups_per_unit > 1;
  for (int phase = 0; phase < p.axis_h.phases * p.axis_w.phases; ++phase) {
    p.phase_tap[phase] = p.taps;
    for (int i = 0; i < problem.R * problem.S; ++i) {
      // In the order of the inputs: by columns, and dgrad's mirrored.
      int const place = backward ? int(problem.R * problem.S) - 1 - i : i;
      int const r = place % int(problem.R), s = place / int(problem.R);
      int const h =
          tap_offset(op, p.axis_h, phase / p.axis_w.phases, r, problem.stride_h, problem.pad_top, problem.dilation_h);
      int const w =
          tap_offset(op, p.axis_w, phase % p.axis_w.phases, s, problem.stride_w, problem.pad_left, problem.dilation_w);
      if (h >= 0 && w >= 0) p.tap[p.taps++] = {h, w, r, s};
    }
    p.phase_tap[phase + 1] = p.taps;
  }
  return p;
}

// The k8 steps of each phase.
inline void set_halves(Params& p, bool is_3x3) {
  p.is_3x3 = is_3x3;
  for (int phase = 0; phase < p.axis_h.phases * p.axis_w.phases; ++phase) {
    int const taps = p.phase_tap[phase + 1] - p.phase_tap[phase];
    p.phase_count[phase] = p.in_blocks * (is_3x3 ? 12 : taps);
    p.phase_half[phase] = p.halves;
    p.halves += (p.phase_count[phase] + 1) / 2 * 2;
    p.phase_half[phase + 1] = p.halves;
  }
}

inline void set_window(Window& w, GroupedWindow const& a, int blocks) {
  w.rows = int(a.rows), w.columns = int(a.columns), w.parity_columns = int(a.parity_columns);
  w.blocks = blocks, w.pitch = int(a.pitch), w.plane = int(a.plane);
}

// What the copies need, by so many warps.
inline void set_copies(Window& w, int step, int images, int warps) {
  int const rows = images * w.rows;
  w.chunks = int(ceil_div(w.columns * w.blocks, 32));
  w.share = int(ceil_div(w.chunks * rows, warps));
  w.rows_of = Divisor(uint32_t(w.rows)), w.columns_of = Divisor(uint32_t(w.columns));
  w.step = Divisor(uint32_t(step));
  w.all_rows = Divisor(uint32_t(rows));
}

// What follows from a tile's squares and images.
inline void count_tiles(Params& p) {
  p.tiles_h = int(ceil_div(p.axis_h.positions, p.squares_h * kSide));
  p.tiles_w = int(ceil_div(p.axis_w.positions, p.squares_w * kSide));
  p.tiles = int(p.tiles_h * p.tiles_w * ceil_div(p.N, p.images));
  p.tiles_of_image = Divisor(uint32_t(p.tiles_h * p.tiles_w)), p.tiles_of_row = Divisor(uint32_t(p.tiles_w));
  p.columns_of = Divisor(uint32_t(p.squares_w)), p.filters = Divisor(uint32_t(p.out_per_group));
}

// The same, and from its window.
inline void set_offsets(Params& p, int warps) {
  set_copies(p.window, p.axis_w.step, p.images, warps);
  count_tiles(p);
  for (int i = 0; i < p.taps; ++i) {
    int const w = p.tap[i].w;
    p.tap[i].offset = p.tap[i].h * p.window.pitch + w % p.axis_w.step * p.window.parity_columns + w / p.axis_w.step;
  }
  p.squares_of = Divisor(uint32_t(p.squares_h * p.squares_w * p.images));
  p.runs_of = Divisor(uint32_t(p.n_groups));
}

// Blocks of threads for the tiles, of at most so many, as even as can be.
inline unsigned even_blocks(Params const& p, int64_t most) {
  return unsigned(ceil_div(p.tiles, ceil_div(p.tiles, max64(1, most))));
}

}  // namespace conv2d_ext::grouped
