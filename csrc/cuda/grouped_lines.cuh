// Grouped convolution, fprop and dgrad: grouped.cuh's arithmetic, with the copy engine on either side.
//
// A pixel's channels are lines of 128 bytes. A block of threads works on a slab of units whose channels fit one line
// of the inputs and one of the outputs, and walks over tiles. The copy engine fills a ring of stages with the lines of
// a tile's inputs and their halo, zeros outside of the image; the warps multiply, and put the outputs into shared
// memory, from where the engine stores what exists of them. The engine swizzles: a line's eight chunks of 16 bytes are
// in the order chunk ^ (line % 8), so that eight neighbouring pixels' equal chunks lie in different banks.
//
// With a stride along W, neighbouring outputs would read every second line, and so half of the banks: there each
// remainder of the column has a copy and a plane of its own. The filters come as they lie in memory, if they lie
// together, to where the outputs will be, and are put in the order of the fragments from there.
//
// NCHW without gaps is planar: the engine copies whole rows of a channel as they lie in memory, or whole images; the
// warps turn them into the lines, and after the products turn the outputs' lines into runs of pixels, which they store
// themselves. There is one stage then, and the next tile is copied while this one is multiplied.
//
// A warp computes 8 x 8 outputs of up to three blocks of 8 channels as four m16 tiles, rows i and i + 4 of the square
// each: then the fragment of rows i and i + 4 of the inputs is that of tile i for a tap of the first row, of tile i - 1
// for one of the second, and so on, as ldmatrix has loaded it.
//
// Warps that a tile has beyond its squares share the phases of a square (dgrad's stride).
//
// The zeros between a unit's groups meet infinities and NaN as in grouped.cuh, and such outputs are computed again.
#pragma once

#include "fragments.cuh"
#include "grouped.cuh"
#include "tma_map.h"

namespace conv2d_ext::grouped {

constexpr int kLine = 128;  // bytes
constexpr int kNone = -(1 << 30);
// At most, of a block; f32 of either kind has as many.
template <class T>
constexpr int line_warps(int blocks, int step) {
  return grouped_line_warps(sizeof(T) == 4 ? DType::f32 : DType::f16, blocks, step);
}

// What is contiguous in memory of a 16-bit filter, and can be loaded by pairs.
enum class Words { none, channels, filters };

// How a tile's channels are copied from NCHW, rows of pixels of each or whole images, and the lines that they are
// turned into.
struct Planar {
  bool whole;
  int offset, pitch;         // in shared memory; bytes of a channel there
  int shift;                 // bytes that a channel begins later than the one before, within 16
  int step_h, low_h, low_w;  // a tile's first line
  int skip_h, skip_w;        // from line to line
  int planes, plane_bytes, images, rows, columns, slots;
  bool vectors, twos;  // see turn_vectors and turn_twos
  Divisor plane_of, row_of, image_of, pairs, width;
};

// How the engine sees the inputs: with a stride along W, each remainder of the column is a tensor of its own, of which
// a plane takes neighbouring columns. A map that skips columns itself copies no faster than if it read them.
constexpr int kMaxPlanes = 4;
struct LineMaps {
  CUtensorMap plane[kMaxPlanes];
  int column[kMaxPlanes];  // of a plane's first line, in its tensor, if the tile begins at output 0
};

struct LineParams {
  LineMaps in;
  CUtensorMap out;
  int step_h;               // rows of shared memory between neighbouring outputs
  int planes, plane_bytes;  // of the inputs' columns
  int filter_bytes;         // of a group's filters, if they are copied as they lie in memory; else 0
  int shares, of_phases, stage_bytes, out_bytes, tables_offset;  // of_phases: of the shares, those of a square
  int out_columns, out_rows;                                     // of an image's tile
  int out_channels;                                              // of a unit; the last of its blocks may be half empty
  uint8_t first[8], count[8];  // of a unit's runs: the blocks of inputs that they meet; 3x3, else all
  bool mirrored;               // the taps: dgrad
  Words words;
  bool planar;       // NCHW, in place
  int fixed_offset;  // what lies behind stages, outputs and the planar copies
  Planar raw;
  Divisor out_pixels, out_width;
  Params p;
};

// Where the engine has put what would be at this address.
__device__ inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// The 8 x 8 outputs of a phase that a warp computes at once: where they begin in the tile.
struct Square {
  int image, h, w;

  __device__ Square(Params const& p, int number) {
    int const row = p.columns_of.quotient(number);
    image = row / p.squares_h, h = row % p.squares_h * kSide, w = (number - row * p.squares_w) * kSide;
  }
};

// A square of a tile: its first input and output, bytes before swizzling, its first output of phase 0 and its image.
struct TileSquare {
  int in, out, h, w, image;
};
constexpr int kMaxSquares = 8, kMaxStages = 4;

// A tap and 16 bytes of channels; two are a k step of the products.
struct Half {
  int64_t from;  // elements from a filter's first weight
  int offset;    // bytes from an output's first input, before swizzling; not 3x3
  int channel;   // its first within the unit; negative if there is no such half
};

// Shared memory: stages | two tiles of outputs | filters | halves | bias | tables | barriers. Planar: one stage, one
// tile of outputs, and the channels as they were copied behind them.
struct LineShared {
  uint32_t* weights;  // [part][run][step][block][lane][2]
  Half* halves;
  float* bias;  // [run][block][8]
  TileSquare* squares;
  uint64_t *full, *filters;

  __device__ LineShared(LineParams const& q, char* dynamic) {
    Params const& p = q.p;
    char* const fixed = dynamic + q.fixed_offset;
    weights = reinterpret_cast<uint32_t*>(fixed);
    halves = reinterpret_cast<Half*>(fixed + p.weight_bytes);
    bias = reinterpret_cast<float*>(halves + p.halves);
    squares = reinterpret_cast<TileSquare*>(dynamic + q.tables_offset);
    full = reinterpret_cast<uint64_t*>(squares + kMaxSquares), filters = full + kMaxStages;
  }
};

// The order of the halves, and whether there is such a one. 3x3: the steps of two of `count` blocks of channels go by
// columns, and a last odd block has steps of two columns, then halves of the third.
template <bool is_3x3>
__device__ inline bool half_of(Params const& p, int count, int half, int phase, int& block, int& tap) {
  if constexpr (is_3x3) {
    int const pairs = count / 2 * 18;
    if (half < pairs) {
      block = half / 18 * 2 + half % 2, tap = half % 18 / 2;
      return true;
    }
    int const rest = half - pairs;
    block = count - 1;
    tap = rest < 6 ? rest % 2 * 3 + rest / 2 : 6 + (rest - 6) / 2;
    return rest < 6 || rest % 2 == 0;
  } else {
    int const index = half - p.phase_half[phase];
    tap = p.phase_tap[phase] + index / p.in_blocks, block = index % p.in_blocks;
    return tap < p.phase_tap[phase + 1];
  }
}

// `staged`: where the slab's filters are, if the engine copies them.
template <class T, int parts, int blocks, bool is_3x3>
__device__ inline void fill_lines(LineParams const& q, int first_unit, int units, LineShared const& s,
                                  char const* staged) {
  Params const& p = q.p;
  auto from_of = [&](int r, int column, int block) {
    return r * p.w_r + column * p.w_s + block * kChannels<T> * p.w_in;
  };
  if constexpr (!is_3x3) {
    for (int i = threadIdx.x; i < p.halves; i += blockDim.x) {
      int phase = 0, block = 0, tap = 0;
      while (i >= p.phase_half[phase + 1]) ++phase;
      bool const exists = half_of<false>(p, p.in_blocks, i, phase, block, tap);
      if (!exists) block = 0, tap = 0;
      s.halves[i] = {from_of(p.tap[tap].r, p.tap[tap].s, block), p.tap[tap].offset * kLine + block * kSlot,
                     exists ? block * kChannels<T> : kNone};
    }
  }
  // Those of 3x3 are worked out where they are needed: nobody has to wait for a table.
  auto half_at = [&](int i, int first_block, int count) {
    if constexpr (is_3x3) {
      int block, tap;
      bool const exists = half_of<true>(p, count, i, 0, block, tap);
      block += first_block;
      int const r = tap % 3, column = tap / 3;  // in the order of the inputs; dgrad's taps are mirrored
      return Half{q.mirrored ? from_of(2 - r, 2 - column, block) : from_of(r, column, block), 0,
                  exists ? block * kChannels<T> : kNone};
    } else {
      return s.halves[i];
    }
  };
  if (threadIdx.x < p.squares_h * p.squares_w * p.images) {
    Square const a(p, threadIdx.x);
    s.squares[threadIdx.x] = {
        ((a.image * p.window.rows + a.h * q.step_h) * p.window.columns + a.w) * kLine,
        ((a.image * q.out_rows + a.h * p.axis_h.out_step) * q.out_columns + a.w * p.axis_w.out_step) * kLine, a.h, a.w,
        a.image};
  }
  int const of_unit = p.n_groups * blocks;  // blocks of outputs
  for (int i = threadIdx.x; i < p.slab * of_unit * kBlock; i += blockDim.x) {
    int const unit = i / (of_unit * kBlock), out = i % (of_unit * kBlock);
    int64_t const at = int64_t(first_unit + unit) * q.out_channels + out;
    bool const exists = p.bias != nullptr && unit < units && out < q.out_channels && at < p.out.channels;
    s.bias[i] = exists ? widen(static_cast<T const*>(p.bias)[at * p.bias_stride]) : 0;
  }
  if constexpr (!is_3x3) __syncthreads();
  // A warp takes the halves of one block of outputs, or a share of them. A lane's word of a fragment is of one filter
  // and two channels (f32: one), or, where the filters are contiguous in memory, of two filters and one channel; then
  // the fragment is transposed.
  constexpr int per_word = 4 / int(sizeof(T));
  bool const is_staged = q.filter_bytes > 0;
  if (is_staged) ptx::mbarrier_wait(s.filters, 0);
  // Of the slab's first group.
  T const* const w = is_staged ? reinterpret_cast<T const*>(staged)
                               : static_cast<T const*>(p.w) + int64_t(first_unit) * p.groups_per_unit * p.w_group;
  int const lane = threadIdx.x % 32, warps = blockDim.x / 32, total = units * of_unit, shares = max(1, warps / total);
  int const share = (p.halves + shares - 1) / shares;
  bool const transposed = sizeof(T) == 2 && q.words == Words::filters, words = sizeof(T) == 4 || q.words != Words::none;
  // The warp's shares of the fragments: its block of outputs, its halves, and the first one's word of the lane.
  auto each_share = [&](auto const& f) {
    for (int i = threadIdx.x / 32; i < total * shares; i += warps) {
      int const block = i / shares, begin = (i - block * shares) * share;
      int const count = q.count[block % of_unit / blocks];
      f(block, begin, min(begin + share, is_3x3 ? count / 2 * 18 + count % 2 * 12 : p.halves),
        s.weights + (block / blocks * p.halves * blocks + block % blocks * 2) * 32 + lane * 2);
    }
  };
  auto word_of = [](uint32_t* first, int half) { return first + half / 2 * (blocks * 64) + half % 2; };
  auto finish = [&](uint32_t* to, uint32_t word) {
    uint32_t part[parts];
    if (transposed) word = ptx::movmatrix_trans(word);
    split<T, parts>(word, part);
#pragma unroll
    for (int k = 0; k < parts; ++k) to[k * p.part_words] = part[k];
  };
  each_share([&](int block, int begin, int end, uint32_t* to) {
    int const unit = block / of_unit, out = block % of_unit * kBlock + (transposed ? lane % 4 * 2 : lane / 4);
    int const of_group = p.filters.quotient(out);
    int const group = unit * p.groups_per_unit + of_group;  // of the slab's
    bool const exists = of_group < p.groups_per_unit && first_unit * p.groups_per_unit + group < p.groups;
    // Within the group, of the half's first block.
    int const channel = (transposed ? lane / 4 : lane % 4 * per_word) - of_group * p.in_per_group;
    T const* const from = w + group * p.w_group + (out - of_group * p.out_per_group) * p.w_out + channel * p.w_in;
    int const first_block = q.first[block % of_unit / blocks], count = q.count[block % of_unit / blocks];
    // The lanes work out 32 halves at once; then all copy the words of one half after the other.
    for (int first = begin; first < end; first += 32) {
      Half const mine = half_at(min(first + lane, end - 1), first_block, count);
      for (int n = 0; n < min(32, end - first); ++n) {
        int64_t const at = __shfl_sync(0xffffffff, mine.from, n);
        int const c = __shfl_sync(0xffffffff, mine.channel, n) + channel;
        bool const valid = exists && unsigned(c) < unsigned(p.in_per_group);
        if (words && is_staged) {
          finish(word_of(to, first + n), valid ? *reinterpret_cast<uint32_t const*>(from + at) : 0);
        } else if (words) {
          ptx::cp_async_ca<4>(ptx::shared_address(word_of(to, first + n)), valid ? from + at : w, valid);
        } else {
          Vector<T, per_word> v;
#pragma unroll
          for (int e = 0; e < per_word; ++e)
            v.v[e] = exists && unsigned(c + e) < unsigned(p.in_per_group) ? from[at + e * p.w_in] : narrow<T>(0.f);
          *word_of(to, first + n) = *reinterpret_cast<uint32_t const*>(&v);
        }
      }
    }
  });
  ptx::cp_async_wait_all();
  if (!is_staged && (sizeof(T) == 4 || transposed)) {  // every lane changes its own words
    each_share([&](int, int begin, int end, uint32_t* to) {
      for (int half = begin; half < end; ++half) finish(word_of(to, half), *word_of(to, half));
    });
  }
  __syncthreads();
}

// 3x3: a column of the taps for two halves' channels, or two columns for one's; `from` is the lane's input in the
// first row, `weights` the lane's of the first row's tap. step: rows of inputs from output to output.
template <class T, int parts, int blocks, int step>
__device__ inline void multiply_pair(float (&acc)[blocks][4][4], uint32_t from, int row_bytes, uint32_t const* weights,
                                     int part_words) {
  using P = Products<parts>;
  uint2 b[3][blocks][parts];
#pragma unroll
  for (int r = 0; r < 3; ++r)
#pragma unroll
    for (int j = 0; j < blocks; ++j)
#pragma unroll
      for (int k = 0; k < parts; ++k)
        b[r][j][k] = *reinterpret_cast<uint2 const*>(weights + k * part_words + (r * blocks + j) * 64);
#pragma unroll
  for (int row = 0; row < 3 * step + 3; ++row) {
    uint32_t raw[4], v[4][parts];
    ptx::ldmatrix_x4(raw, swizzled(from + row * row_bytes));
#pragma unroll
    for (int i = 0; i < 4; ++i) split<T, parts>(raw[i], v[i]);
#pragma unroll
    for (int r = 0; r < 3; ++r) {
      if (row < r || (row - r) % step != 0 || row - r > 3 * step) continue;
      int const m = (row - r) / step;
#pragma unroll
      for (int j = 0; j < blocks; ++j)
#pragma unroll
        for (int i = 0; i < P::count; ++i)
          mma_two<T>(acc[j][m], v[0][P::a(i)], v[1][P::a(i)], v[2][P::a(i)], v[3][P::a(i)], b[r][j][P::b(i)].x,
                     b[r][j][P::b(i)].y);
    }
  }
}

// The same for one column of one half's channels. The lanes' addresses are of two rows.
template <class T, int parts, int blocks, int step>
__device__ inline void multiply_single(float (&acc)[blocks][4][4], uint32_t from, int row_bytes,
                                       uint32_t const* weights, int part_words) {
  using P = Products<parts>;
  uint32_t b[3][blocks][parts];
#pragma unroll
  for (int r = 0; r < 3; ++r)
#pragma unroll
    for (int j = 0; j < blocks; ++j)
#pragma unroll
      for (int k = 0; k < parts; ++k) b[r][j][k] = weights[k * part_words + (r * blocks + j) * 64];
#pragma unroll
  for (int pair = 0; pair < (3 * step + 4) / 2; ++pair) {
    uint32_t raw[4], v[4][parts];
    ptx::ldmatrix_x4(raw, swizzled(from + pair * 2 * row_bytes));
#pragma unroll
    for (int i = 0; i < 4; ++i) split<T, parts>(raw[i], v[i]);
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        int const row = pair * 2 + e;
        if (row < r || (row - r) % step != 0 || row - r > 3 * step) continue;
        int const m = (row - r) / step;
#pragma unroll
        for (int j = 0; j < blocks; ++j)
#pragma unroll
          for (int i = 0; i < P::count; ++i)
            mma_one<T>(acc[j][m], v[e * 2][P::a(i)], v[e * 2 + 1][P::a(i)], b[r][j][P::b(i)]);
      }
  }
}

// With two parts the products are summed apart before they are added: the tensor cores cut where they add to a sum, so
// the sums they add to stay small.
template <int parts, int blocks, class Multiply>
__device__ inline void add_products(float (&acc)[blocks][4][4], Multiply const& multiply) {
  if constexpr (parts == 1) {
    multiply(acc);
  } else {
    float sums[blocks][4][4] = {};
    multiply(sums);
#pragma unroll
    for (int j = 0; j < blocks; ++j)
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[j][m][e] += sums[j][m][e];
  }
}

// `from`: the address of the lane's pixel, lane % 8, in the square's first row of inputs; row_bytes: of inputs; second:
// from the first column of the filter to the next.
template <class T, int parts, int blocks, int step>
__device__ inline void multiply_lines_3x3(float (&acc)[blocks][4][4], uint32_t from, int row_bytes, int second,
                                          int in_blocks, uint32_t const* weights, int part_words) {
  int const lane = threadIdx.x % 32, upper = lane / 16;
  int const third = second == kLine ? 2 * kLine : kLine;
  weights += lane * 2;
  from += lane / 8 % 2 * 4 * step * row_bytes;
#pragma unroll 1
  for (int block = 0; block + 1 < in_blocks; block += 2)
#pragma unroll 1
    for (int s = 0; s < 3; ++s, weights += 3 * blocks * 64)
      add_products<parts>(acc, [&](auto& sums) {
        int const column = s == 0 ? 0 : s == 1 ? second : third;
        multiply_pair<T, parts, blocks, step>(sums, from + (block + upper) * kSlot + column, row_bytes, weights,
                                              part_words);
      });
  if (in_blocks % 2 == 0) return;
  from += (in_blocks - 1) * kSlot;
  add_products<parts>(acc, [&](auto& sums) {
    multiply_pair<T, parts, blocks, step>(sums, from + upper * second, row_bytes, weights, part_words);
    multiply_single<T, parts, blocks, step>(sums, from + upper * row_bytes + third, row_bytes,
                                            weights + 3 * blocks * 64, part_words);
  });
}

// Any taps: `count` halves.
template <class T, int parts, int blocks>
__device__ inline void multiply_lines_any(float (&acc)[blocks][4][4], uint32_t from, int row_bytes, Half const* half,
                                          uint32_t const* weights, int part_words, int count) {
  using P = Products<parts>;
  int const lane = threadIdx.x % 32;
  weights += lane * 2;
  from += lane / 8 % 2 * 4 * row_bytes;
#pragma unroll 1
  for (; count > 1; count -= 2, half += 2, weights += blocks * 64) {
    uint32_t const a = from + half[lane / 16].offset;
    uint2 b[blocks][parts];
#pragma unroll
    for (int j = 0; j < blocks; ++j)
#pragma unroll
      for (int k = 0; k < parts; ++k) b[j][k] = *reinterpret_cast<uint2 const*>(weights + k * part_words + j * 64);
    add_products<parts>(acc, [&](auto& sums) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t raw[4], v[4][parts];
        ptx::ldmatrix_x4(raw, swizzled(a + m * row_bytes));
#pragma unroll
        for (int i = 0; i < 4; ++i) split<T, parts>(raw[i], v[i]);
#pragma unroll
        for (int j = 0; j < blocks; ++j)
#pragma unroll
          for (int i = 0; i < P::count; ++i)
            mma_two<T>(sums[j][m], v[0][P::a(i)], v[1][P::a(i)], v[2][P::a(i)], v[3][P::a(i)], b[j][P::b(i)].x,
                       b[j][P::b(i)].y);
      }
    });
  }
  if (count > 0) {
    uint32_t const a = from + half->offset + lane / 16 * row_bytes;
    add_products<parts>(acc, [&](auto& sums) {
#pragma unroll
      for (int m = 0; m < 4; m += 2) {
        uint32_t raw[4], v[4][parts];
        ptx::ldmatrix_x4(raw, swizzled(a + m * row_bytes));
#pragma unroll
        for (int i = 0; i < 4; ++i) split<T, parts>(raw[i], v[i]);
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int j = 0; j < blocks; ++j)
#pragma unroll
            for (int i = 0; i < P::count; ++i)
              mma_one<T>(sums[j][m + e], v[e * 2][P::a(i)], v[e * 2 + 1][P::a(i)],
                         weights[P::b(i) * part_words + j * 64]);
      }
    });
  }
}

// Which outputs a warp computes of a square: its unit, and the first of its blocks within the unit.
struct Run {
  int number, unit, block;
};

// Where a lane's first output is, counted from the square's and before swizzling. f32: a lane has two channels of its
// pixel in each row. Otherwise lanes 0-7 give the addresses of row i to stmatrix, the next those of row i + 4, then
// those of rows i + 1 and i + 5.
template <class T>
__device__ inline int output_of_lane(LineParams const& q, Run const& run) {
  constexpr bool wide = sizeof(T) == 4;
  Params const& p = q.p;
  int const lane = threadIdx.x % 32, row = wide ? 0 : lane / 8 % 2 * 4 + lane / 16, column = wide ? lane / 4 : lane % 8;
  return (row * p.axis_h.out_step * q.out_columns + column * p.axis_w.out_step) * kLine +
         (run.unit * q.out_channels + run.block * kBlock) * int(sizeof(T)) + (wide ? lane % 4 / 2 * kSlot : 0);
}

// Rounds a warp's outputs into shared memory; says whether one may be NaN.
template <class T, int blocks>
__device__ inline bool put(LineParams const& q, Run const& run, uint32_t to, int row_bytes,
                           float const (&acc)[blocks][4][4]) {
  Params const& p = q.p;
  if constexpr (sizeof(T) == 4) {
    bool nan = false;
#pragma unroll
    for (int j = 0; j < blocks; ++j) {
      if ((run.block + j) * kBlock + int(threadIdx.x % 4) * 2 >= q.out_channels) continue;
#pragma unroll
      for (int row = 0; row < kSide; ++row) {
        float const low = acc[j][row % 4][row / 4 * 2], high = acc[j][row % 4][row / 4 * 2 + 1];
        nan = nan || !(low == low) || !(high == high);
        ptx::st_shared_f32x2(swizzled(to + row * row_bytes + j * 32) + threadIdx.x % 2 * 8, low, high);
      }
    }
    return nan;
  } else {
    Vector<T, 2> marks{};
#pragma unroll
    for (int j = 0; j < blocks; ++j) {
      if (run.block + j >= p.out_blocks) continue;
#pragma unroll
      for (int m = 0; m < 4; m += 2) {
        uint32_t const v[4] = {pack<T>(acc[j][m][0], acc[j][m][1]), pack<T>(acc[j][m][2], acc[j][m][3]),
                               pack<T>(acc[j][m + 1][0], acc[j][m + 1][1]),
                               pack<T>(acc[j][m + 1][2], acc[j][m + 1][3])};
        ptx::stmatrix_x4(swizzled(to + m * row_bytes + j * kSlot), v);
        if (p.mixed) {
#pragma unroll
          for (int i = 0; i < 4; ++i) mark<T>(marks, v[i]);
        }
      }
    }
    float const low = widen(marks.v[0]), high = widen(marks.v[1]);
    return !(low == low) || !(high == high);
  }
}

// Computes a warp's outputs again, one at a time, each from the channels of its group. `in` and `out`: the square's
// first pixels, bytes from the start of shared memory.
template <class T, int blocks>
__device__ __noinline__ void repair_lines(LineParams const& q, Run run, int phase, int first_unit, int in, int out,
                                          char* shared, float const* bias) {
  __syncwarp();  // what is overwritten here has been written
  Params const& p = q.p;
  T const* const w = static_cast<T const*>(p.w);
  for (int i = threadIdx.x % 32; i < blocks * kBlock * kSide * kSide; i += 32) {
    int const filter = run.block * kBlock + i % (blocks * kBlock), pixel = i / (blocks * kBlock);
    int const row = pixel / kSide, column = pixel % kSide, of_group = filter / p.out_per_group;
    int64_t const group = int64_t(first_unit + run.unit) * p.groups_per_unit + of_group;
    if (filter >= q.out_channels || group >= p.groups) continue;
    T const* const weights = w + group * p.w_group + filter % p.out_per_group * p.w_out;
    float sum = 0;
    for (int t = p.phase_tap[phase]; t < p.phase_tap[phase + 1]; ++t)
      for (int c = 0; c < p.in_per_group; ++c) {
        int const channel = run.unit * p.in_blocks * kChannels<T> + of_group * p.in_per_group + c;
        uint32_t const at = in + (row * q.step_h * p.window.columns + column + p.tap[t].offset) * kLine +
                            channel / kChannels<T> * kSlot;
        sum += widen(reinterpret_cast<T const*>(shared + swizzled(at))[channel % kChannels<T>]) *
               widen(weights[p.tap[t].r * p.w_r + p.tap[t].s * p.w_s + c * p.w_in]);
      }
    int const channel = run.unit * q.out_channels + filter;
    uint32_t const to = out + (row * p.axis_h.out_step * q.out_columns + column * p.axis_w.out_step) * kLine +
                        channel / kChannels<T> * kSlot;
    reinterpret_cast<T*>(shared + swizzled(to))[channel % kChannels<T>] =
        narrow<T>(sum + bias[filter % (blocks * kBlock)]);
  }
}

// ---- NCHW, in place

// Of so many lines.
inline Planar planar_of(Image const& image, int size, bool whole, int64_t offset, int64_t pitch, int images, int rows,
                        int columns, int slots) {
  Planar t{};
  t.whole = whole, t.offset = int(offset), t.pitch = int(pitch);
  t.shift = whole ? 0 : int(int64_t(image.H) * image.W * size % 16);
  t.step_h = t.skip_h = t.skip_w = t.planes = 1;
  t.images = images, t.rows = rows, t.columns = columns, t.slots = slots;
  t.plane_of = Divisor(uint32_t(images * rows * columns)), t.row_of = Divisor(uint32_t(columns));
  t.image_of = Divisor(uint32_t(rows)), t.pairs = Divisor(uint32_t(ceil_div(slots, 2)));
  t.width = Divisor(uint32_t(image.W));
  t.vectors = size == 2 && int64_t(image.H) * image.W % 8 == 0;
  t.twos = image.W % 2 == 0;
  return t;
}

// Of a tile's inputs, whose window is known.
template <class Lines>
Planar planar_inputs(Params const& p, Lines const& t, int size, int64_t offset, int64_t pitch) {
  bool const whole = t.squares_h * kSide >= p.axis_h.positions;
  Planar q = planar_of(p.in, size, whole, offset, pitch, p.images, p.window.rows, p.window.columns, p.window.blocks);
  q.step_h = p.axis_h.step, q.low_h = p.axis_h.low, q.low_w = p.axis_w.low;
  q.skip_h = p.axis_h.step / int(t.step_h), q.skip_w = p.axis_w.step;
  q.planes = int(t.planes), q.plane_bytes = int(t.plane_bytes);
  bool const all_rows = q.skip_h == 1 && q.skip_w == q.planes;
  q.vectors = q.vectors && all_rows;
  q.twos = q.twos && all_rows && (size == 2 || t.planes == 1);  // as measured
  return q;
}

// The rows of an image that a tile needs.
struct PlanarRows {
  int first, end;

  __device__ PlanarRows(Planar const& t, Image const& image, Tile const& tile) {
    int const h0 = tile.h * t.step_h + t.low_h;
    first = t.whole ? 0 : max(h0, 0);
    end = t.whole ? image.H : max(first, min(h0 + (t.rows - 1) * t.skip_h + 1, image.H));
  }
};

// One run of memory for each channel, or image. Each warp's first lane has a share of them, and arrives once.
template <class T>
__device__ inline void copy_planar(Planar const& t, Image const& image, int64_t N, Tile const& tile, int first_channel,
                                   uint32_t raw, uint64_t* full) {
  if (threadIdx.x % 32 != 0) return;
  PlanarRows const rows(t, image, tile);
  int const warp = threadIdx.x / 32, warps = blockDim.x / 32, most = t.slots * kChannels<T>;
  int const channels = int(min(int64_t(most), image.channels - first_channel));
  int const runs = t.whole ? int(min(int64_t(t.images), N - tile.n)) : channels;
  int64_t const pitch = int64_t(image.H) * image.W * int(sizeof(T)), step = t.whole ? image.n * int(sizeof(T)) : pitch;
  int64_t const begin = int64_t(rows.first) * image.W * int(sizeof(T)),
                length = t.whole ? channels * pitch : int64_t(rows.end - rows.first) * image.W * int(sizeof(T));
  char const* const from =
      static_cast<char const*>(image.data) + tile.n * image.n * int(sizeof(T)) + first_channel * pitch;
  // From 16 bytes to 16 bytes: what else is there belongs to the same tensor.
  auto each = [&](auto const& f) {
    for (int i = warp; i < runs && length > 0; i += warps) {
      int64_t const at = i * step + begin, aligned = at & ~int64_t(15);
      f(i, aligned, uint32_t(((at + length + 15) & ~int64_t(15)) - aligned));
    }
  };
  uint32_t bytes = 0;
  each([&](int, int64_t, uint32_t count) { bytes += count; });
  ptx::mbarrier_arrive_expect_tx(full, bytes);
  int const to = t.whole ? most * t.pitch : t.pitch;
  each([&](int i, int64_t at, uint32_t count) { ptx::cp_async_bulk(raw + i * to, from + at, count, full); });
}

// Turns the channels that were copied into lines, zeros outside of the image. A warp takes 32 lines and two slots of
// each.
template <class T>
__device__ inline void turn_planar(Planar const& t, Image const& image, int64_t N, Tile const& tile, char* lines,
                                   char const* raw) {
  constexpr int channels = kChannels<T>, size = int(sizeof(T));
  using Word = std::conditional_t<size == 2, uint16_t, uint32_t>;
  PlanarRows const rows(t, image, tile);
  int const lane = threadIdx.x % 32, warps = blockDim.x / 32, W = image.W;
  int const of_plane = t.images * t.rows * t.columns, positions = t.planes * of_plane;
  int const h0 = tile.h * t.step_h + t.low_h, start = t.whole ? 0 : rows.first * W * size;
  int const pairs = (t.slots + 1) / 2, units = (positions + 31) / 32 * pairs;
  int offset[channels];  // of a slot's channels, which begin like any other slot's
#pragma unroll
  for (int c = 0; c < channels; ++c) offset[c] = c * t.pitch + ((start + c * t.shift) & (t.whole ? 0 : 15));
  for (int unit = threadIdx.x / 32; unit < units; unit += warps) {
    int const run = t.pairs.quotient(unit), pair = unit - run * pairs, position = run * 32 + lane;
    int const plane = t.planes == 1 ? 0 : t.plane_of.quotient(position), line = position - plane * of_plane;
    int const image_row = t.row_of.quotient(line), column = line - image_row * t.columns;
    int const n = t.image_of.quotient(image_row), row = image_row - n * t.rows;
    int const h = h0 + row * t.skip_h, w = t.low_w + plane + column * t.skip_w;
    bool const inside = unsigned(h) < unsigned(image.H) && unsigned(w) < unsigned(W) && tile.n + n < N;
    char const* const from = raw + (inside ? n * t.slots * channels * t.pitch + ((h - rows.first) * W + w) * size : 0);
    int const to = plane * t.plane_bytes + line * kLine;
    if (position >= positions) continue;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      int const slot = pair * 2 + k;
      if (slot >= t.slots) break;
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        auto word = [&](int c) {
          return uint32_t(*reinterpret_cast<Word const*>(from + slot * channels * t.pitch + offset[c]));
        };
        words[i] = size == 4 ? word(i) : word(i * 2 % channels) | word((i * 2 + 1) % channels) << 16;
        if (!inside) words[i] = 0;
      }
      *reinterpret_cast<uint4*>(lines + swizzled(to + slot * kSlot)) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// Zeroes the lines outside of the image, those beside it only once, where others are written for every tile.
__device__ inline void zero_outside(Planar const& t, Image const& image, Tile const& tile, int images, char* lines,
                                    bool first) {
  int const h0 = tile.h * t.step_h + t.low_h;
  bool const inside = h0 >= 0 && h0 + t.rows <= image.H;
  if (!first && (t.whole || inside) && images == t.images) return;
  int const of_plane = t.images * t.rows * t.columns;
  for (int position = threadIdx.x; position < t.planes * of_plane; position += blockDim.x) {
    int const plane = t.planes == 1 ? 0 : t.plane_of.quotient(position), line = position - plane * of_plane;
    int const image_row = t.row_of.quotient(line), w = t.low_w + plane + (line - image_row * t.columns) * t.planes;
    int const n = t.image_of.quotient(image_row), h = h0 + image_row - n * t.rows;
    if (unsigned(h) < unsigned(image.H) && unsigned(w) < unsigned(image.W) && n < images) continue;
    for (int slot = 0; slot < t.slots; ++slot)
      *reinterpret_cast<uint4*>(lines + swizzled(plane * t.plane_bytes + line * kLine + slot * kSlot)) = uint4{};
  }
}

// The same where 8 pixels of a channel, which begin at 16 bytes in shared memory, may be in several rows of the image
// but lie together for all channels: ldmatrix and stmatrix turn blocks of 8 channels. A warp takes 32 pixels and four
// slots of each.
template <class T>
__device__ inline void turn_vectors(Planar const& t, Image const& image, int64_t N, Tile const& tile, char* lines,
                                    char const* raw) {
  constexpr int channels = kChannels<T>;
  PlanarRows const rows(t, image, tile);
  int const lane = threadIdx.x % 32, warps = blockDim.x / 32, W = image.W;
  int const h0 = tile.h * t.step_h + t.low_h, images = int(min(int64_t(t.images), N - tile.n));
  int const begin = rows.first * W, end = rows.end * W, aligned = begin & ~7;
  int const runs = (end - aligned + 31) / 32, quads = (t.slots + 3) / 4, units = runs * images * quads;
  uint32_t const lines_at = ptx::shared_address(lines), raw_at = ptx::shared_address(raw);
  for (int unit = threadIdx.x / 32; unit < units; unit += warps) {
    int const of_quad = quads == 1 ? unit : unit / 2, first_slot = (unit - of_quad * quads) * 4;
    int const n = images == 1 ? 0 : int(unsigned(of_quad) / unsigned(runs)), in_run = (of_quad - n * runs) * 32;
    int const pixel = aligned + in_run + lane, h = t.width.quotient(pixel);
    int const row = h - h0, from_left = pixel - h * W - t.low_w;
    int const column = t.planes == 1 ? from_left : from_left / t.planes, plane = from_left - column * t.planes;
    bool const valid =
        pixel >= begin && pixel < end && unsigned(row) < unsigned(t.rows) && from_left >= 0 && column < t.columns;
    uint32_t const line = lines_at + plane * t.plane_bytes + ((n * t.rows + row) * t.columns + column) * kLine;
    uint32_t const to = swizzled(line);
    bool const all = __all_sync(0xffffffff, valid);
    // A lane's channel and block of 8 pixels; blocks beyond the end are not read.
    int const block = in_run + lane / 8 * 8;
    uint32_t const from = raw_at + (n * t.slots * channels + lane % 8) * t.pitch +
                          (block < end - aligned ? block : in_run) * int(sizeof(T));
    for (int slot = first_slot; slot < min(first_slot + 4, t.slots); ++slot) {
      uint32_t v[4];
      ptx::ldmatrix_x4_trans(v, from + slot * channels * t.pitch);
      if (all) {
        ptx::stmatrix_x4(to ^ slot * kSlot, v);
        continue;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // word by word: two channels of the pixel lane / 4 of a block
        uint32_t const word = __shfl_sync(0xffffffff, valid ? to - lines_at : ~0u, i * 8 + lane / 4);
        if (word != ~0u) *reinterpret_cast<uint32_t*>(lines + (word ^ slot * kSlot) + lane % 4 * 4) = v[i];
      }
    }
  }
}

// The same for rows of even length, by loads of two pixels of a channel. A warp takes 64 pixels and two slots of each.
template <class T>
__device__ inline void turn_twos(Planar const& t, Image const& image, int64_t N, Tile const& tile, char* lines,
                                 char const* raw) {
  constexpr int channels = kChannels<T>, size = int(sizeof(T));
  using Two = std::conditional_t<size == 2, uint32_t, uint2>;
  PlanarRows const rows(t, image, tile);
  int const lane = threadIdx.x % 32, warps = blockDim.x / 32, W = image.W;
  int const h0 = tile.h * t.step_h + t.low_h, images = int(min(int64_t(t.images), N - tile.n));
  int const pixels = (rows.end - rows.first) * W, start = t.whole ? 0 : rows.first * W * size;
  int const pairs = (t.slots + 1) / 2, runs = (pixels + 63) / 64, units = runs * images * pairs;
  int offset[channels];  // of a slot's channels, which begin like any other slot's
#pragma unroll
  for (int c = 0; c < channels; ++c) offset[c] = c * t.pitch + ((start + c * t.shift) & (t.whole ? 0 : 15));
  for (int unit = threadIdx.x / 32; unit < units; unit += warps) {
    int const of_pair = t.pairs.quotient(unit), pair = unit - of_pair * pairs;
    int const n = images == 1 ? 0 : int(unsigned(of_pair) / unsigned(runs)),
              pixel = (of_pair - n * runs) * 64 + lane * 2;
    int const from_first = t.width.quotient(pixel), row = rows.first + from_first - h0;
    if (pixel >= pixels || unsigned(row) >= unsigned(t.rows)) continue;
    int const from_left = pixel - from_first * W - t.low_w;
    // Where the two pixels go, or -1. Of eight neighbouring lanes four begin with the second one: then all banks
    // differ.
    int const swap = lane / 4 % 2;
    int to[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const at = from_left + (i ^ swap), column = t.planes == 1 ? at : at / t.planes;
      int const line = (n * t.rows + row) * t.columns + column;
      to[i] =
          at < 0 || column >= t.columns ? -1 : int(swizzled((at - column * t.planes) * t.plane_bytes + line * kLine));
    }
    char const* const from = raw + n * t.slots * channels * t.pitch + pixel * size;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      int const slot = pair * 2 + k;
      if (slot >= t.slots) break;
      Two v[channels];
#pragma unroll
      for (int c = 0; c < channels; ++c)
        v[c] = *reinterpret_cast<Two const*>(from + slot * channels * t.pitch + offset[c]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (size == 2)
            words[j] = __byte_perm(v[j * 2], v[j * 2 + 1], (i ^ swap) == 0 ? 0x5410 : 0x7632);
          else
            words[j] = (i ^ swap) == 0 ? v[j].x : v[j].y;
        }
        if (to[i] >= 0)
          *reinterpret_cast<uint4*>(lines + (to[i] ^ slot * kSlot)) =
              make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

template <class T>
__device__ inline void turn(Planar const& t, Image const& image, int64_t N, Tile const& tile, char* lines,
                            char const* raw, bool first) {
  bool const vectors = sizeof(T) == 2 && t.vectors;
  if (!vectors && !t.twos) return turn_planar<T>(t, image, N, tile, lines, raw);
  if constexpr (sizeof(T) == 2)
    if (vectors) turn_vectors<T>(t, image, N, tile, lines, raw);
  if (!vectors) turn_twos<T>(t, image, N, tile, lines, raw);
  zero_outside(t, image, tile, int(min(int64_t(t.images), N - tile.n)), lines, first);
}

// Stores the outputs of a tile, whose rows are whole, as runs of pixels. A warp takes 32 pixels, in rows of even length
// 32 pairs of them, and two slots of each.
template <class T, int together>
__device__ inline void store_planar(LineParams const& q, Tile const& tile, int first_channel, char const* out) {
  Params const& p = q.p;
  constexpr int channels = kChannels<T>, size = int(sizeof(T));
  int const lane = threadIdx.x % 32, warps = blockDim.x / 32, W = p.out.W;
  int const h0 = tile.h * p.axis_h.out_step, rows = min(q.out_rows, p.out.H - h0);
  int const images = int(min(int64_t(p.images), p.N - tile.n)), pixels = images * rows * W;
  int const blocks = p.slab * p.out_blocks * kBlock / channels, pairs = (blocks + 1) / 2;
  int const left = int(min(int64_t(blocks), (p.out.channels - first_channel) / channels));
  int const units = (pixels + 32 * together - 1) / (32 * together) * pairs;
  T* const data = static_cast<T*>(p.out.data) + tile.n * p.out.n + first_channel * p.out.c + h0 * p.out.h;
  for (int unit = threadIdx.x / 32; unit < units; unit += warps) {
    int const run = unit / pairs, pair = unit - run * pairs, position = (run * 32 + lane) * together;
    int const image = p.images == 1 ? 0 : q.out_pixels.quotient(position), pixel = position - image * p.out.H * W;
    int const row = q.out_width.quotient(pixel), column = pixel - row * W;
    if (position >= pixels) continue;
    int const from = ((image * q.out_rows + row) * q.out_columns + column) * kLine;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      int const block = pair * 2 + k;
      if (block >= left) break;
      uint32_t v[together][4];
#pragma unroll
      for (int i = 0; i < together; ++i)
        *reinterpret_cast<uint4*>(v[i]) =
            *reinterpret_cast<uint4 const*>(out + swizzled(from + i * kLine + block * kSlot));
      T* to = data + image * p.out.n + int64_t(block * channels) * p.out.c + pixel;
#pragma unroll
      for (int c = 0; c < channels; ++c, to += p.out.c) {
        if constexpr (size == 4 && together == 1)
          *reinterpret_cast<uint32_t*>(to) = v[0][c];
        else if constexpr (size == 4)
          *reinterpret_cast<uint2*>(to) = make_uint2(v[0][c], v[1][c]);
        else if constexpr (together == 1)
          *reinterpret_cast<uint16_t*>(to) = uint16_t(v[0][c / 2] >> c % 2 * 16);
        else
          *reinterpret_cast<uint32_t*>(to) = __byte_perm(v[0][c / 2], v[1][c / 2], c % 2 == 0 ? 0x5410 : 0x7632);
      }
    }
  }
}

template <class T>
__device__ inline void store_planar(LineParams const& q, Tile const& tile, int first_channel, char const* out) {
  if (q.p.out.W % 2 == 0)
    store_planar<T, 2>(q, tile, first_channel, out);
  else
    store_planar<T, 1>(q, tile, first_channel, out);
}

// step: 0 for any taps; 3x3: rows of inputs from output to output.
template <class T, int parts, int blocks, int step>
__global__ void __launch_bounds__(line_warps<T>(blocks, step) * 32, 1)
    lines_kernel(__grid_constant__ LineParams const q) {
  constexpr bool is_3x3 = step > 0;
  extern __shared__ __align__(1024) char lines[];
  Params const& p = q.p;
  LineShared const s(q, lines);
  uint32_t const base = ptx::shared_address(lines);
  int const first_unit = blockIdx.y * p.slab, units = min(p.slab, p.units - first_unit);
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, threads = blockDim.x;
  int const bytes = q.planes * p.images * p.window.rows * p.window.columns * p.window.blocks * kSlot;
  auto copy = [&](int number, int stage) {
    Tile const tile(p, number);
    ptx::mbarrier_arrive_expect_tx(&s.full[stage], bytes);
    for (int plane = 0; plane < q.planes; ++plane)
      ptx::cp_async_bulk_tensor_4d(base + stage * q.stage_bytes + plane * q.plane_bytes, &q.in.plane[plane],
                                   &s.full[stage], first_unit * p.in_blocks * kChannels<T>, tile.w + q.in.column[plane],
                                   tile.h * p.axis_h.step + p.axis_h.low, int(tile.n));
  };
  auto copy_raw = [&](int number) {
    copy_planar<T>(q.raw, p.in, p.N, Tile(p, number), first_unit * p.in_blocks * kChannels<T>, base + q.raw.offset,
                   s.full);
  };
  int next = blockIdx.x;  // tile to be copied
  bool const copies = int(threadIdx.x) == threads - 32;
  char* const staged = lines + p.stages * q.stage_bytes;  // in the outputs' place
  if (copies) {
    for (int i = 0; i < p.stages; ++i) ptx::mbarrier_init(&s.full[i], q.planar ? threads / 32 : 1);
    ptx::mbarrier_init(s.filters, 1);
    ptx::fence_mbarrier_init();
    if (q.filter_bytes > 0) {
      int const first_group = first_unit * p.groups_per_unit,
                groups = min(units * p.groups_per_unit, p.groups - first_group);
      uint32_t const bytes = uint32_t(groups) * uint32_t(q.filter_bytes);
      ptx::mbarrier_arrive_expect_tx(s.filters, bytes);
      ptx::cp_async_bulk(ptx::shared_address(staged), static_cast<T const*>(p.w) + first_group * p.w_group, bytes,
                         s.filters);
    }
  }
  if (q.filter_bytes > 0 || q.planar) __syncthreads();  // everybody waits for the filters, or copies
  if (q.planar) {
    copy_raw(next);
    next += gridDim.x;
  } else if (copies) {
    for (int i = 0; i < p.stages && next < p.tiles; ++i, next += gridDim.x) copy(next, i);
    ptx::prefetch_tensormap(&q.out);
  }
  fill_lines<T, parts, blocks, is_3x3>(q, first_unit, units, s, staged);

  int const runs = threads / 32 / q.shares;
  Run run;
  run.number = warp % runs, run.unit = run.number / p.n_groups;
  run.block = (run.number - run.unit * p.n_groups) * blocks;
  uint32_t const* const weights = s.weights + run.number * p.halves * blocks * 32;
  float const* const bias = s.bias + run.number * blocks * kBlock;
  int const row_bytes = q.step_h * p.window.columns * kLine, out_row_bytes = p.axis_h.out_step * q.out_columns * kLine;
  int const of_unit = run.block / blocks, in_blocks = q.count[of_unit];
  int const in_of_lane = (run.unit * p.in_blocks + q.first[of_unit]) * kSlot + lane % 8 * kLine;
  int const out_of_lane = output_of_lane<T>(q, run);
  int const squares = run.unit < units ? p.squares_h * p.squares_w * p.images : 0;
  int const phases_w = is_3x3 ? 1 : p.axis_w.phases, phases = is_3x3 ? 1 : p.axis_h.phases * phases_w;
  // Quotients taken here: none is in the loop over squares.
  int const share = warp / runs, of_phases = is_3x3 ? 1 : q.of_phases;
  int const first_square = share / of_phases, first_phase = share - first_square * of_phases;
  int const next_square = q.shares / of_phases;
  Stage stage;
  uint32_t out = base + p.stages * q.stage_bytes, other = out + q.out_bytes;
  for (int number = blockIdx.x; number < p.tiles; number += gridDim.x) {
    uint32_t const data = base + stage.index * q.stage_bytes;
    ptx::mbarrier_wait(&s.full[stage.index], stage.parity);
    Tile const tile(p, number);
    if (q.planar) {
      turn<T>(q.raw, p.in, p.N, tile, lines, lines + q.raw.offset, number == int(blockIdx.x));
      __syncthreads();
      if (next < p.tiles) copy_raw(next);
      next += gridDim.x;
    }
    for (int square = first_square; square < squares; square += next_square) {
      TileSquare const at = s.squares[square];
      if (tile.h + at.h >= p.axis_h.positions || tile.w + at.w >= p.axis_w.positions || tile.n + at.image >= p.N)
        continue;
      uint32_t const from = data + at.in + in_of_lane;
      // Phases in turn from either end, for the last have the most taps.
      for (int first = 0, mine = first_phase; first < phases; first += of_phases, mine = of_phases - 1 - mine) {
        int const phase = first + mine, phase_h = phase / phases_w, phase_w = phase - phase_h * phases_w;
        float acc[blocks][4][4];
#pragma unroll
        for (int j = 0; j < blocks; ++j) {
          float2 const b = *reinterpret_cast<float2 const*>(bias + j * kBlock + lane % 4 * 2);
#pragma unroll
          for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[j][m][e] = e % 2 == 0 ? b.x : b.y;
        }
        if constexpr (is_3x3)
          multiply_lines_3x3<T, parts, blocks, step>(acc, from, p.window.columns * kLine,
                                                     q.planes == 1 ? kLine : q.plane_bytes, in_blocks, weights,
                                                     p.part_words);
        else
          multiply_lines_any<T, parts, blocks>(acc, from, row_bytes, s.halves + p.phase_half[phase],
                                               weights + p.phase_half[phase] * blocks * 32, p.part_words,
                                               p.phase_count[phase]);
        uint32_t const to = out + at.out + (phase_h * q.out_columns + phase_w) * kLine;
        bool const nan = put<T, blocks>(q, run, to + out_of_lane, out_row_bytes, acc);
        if (p.mixed && __any_sync(0xffffffff, nan))
          repair_lines<T, blocks>(q, run, phase, first_unit, int(data + at.in - base), int(to - base), lines, bias);
      }
    }
    if (q.planar) {
      __syncthreads();
      store_planar<T>(q, tile, first_unit * p.out_blocks * kBlock, staged);
      stage.advance(1);
      continue;
    }
    // The engine has read the other tile of outputs before anybody passes, so that it can be written next.
    ptx::fence_proxy_async();
    if (copies) ptx::cp_async_bulk_wait_group_read<0>();
    __syncthreads();
    if (copies) {
      ptx::cp_async_bulk_tensor_4d_store(&q.out, out, first_unit * q.out_channels, tile.w * p.axis_w.out_step,
                                         tile.h * p.axis_h.out_step, int(tile.n));
      ptx::cp_async_bulk_commit_group();
      if (next < p.tiles) copy(next, stage.index);
      next += gridDim.x;
    }
    stage.advance(p.stages);
    uint32_t const written = out;
    out = other, other = written;
  }
  if (copies) ptx::cp_async_bulk_wait_group_read<0>();
}

template <class T, int parts, int blocks>
cudaError_t start_lines(LineParams const& q, int64_t step, dim3 grid, unsigned threads, int64_t shared,
                        cudaStream_t stream) {
  auto* const kernel = step == 1   ? lines_kernel<T, parts, blocks, 1>
                       : step == 2 ? lines_kernel<T, parts, blocks, 2>
                                   : lines_kernel<T, parts, blocks, 0>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, size_t(shared), stream>>>(q);
  return cudaGetLastError();
}

// A plan of core/grouped.h: its tiles.
template <class Lines>
void set_lines(Params& p, Lines const& t) {
  p.slab = int(t.slab), p.stages = int(t.stages);
  p.squares_h = int(t.squares_h), p.squares_w = int(t.squares_w), p.images = int(t.images);
  p.window.rows = int(t.rows), p.window.columns = int(t.columns), p.window.blocks = p.slab * p.in_blocks;
  int const planes = int(t.planes), plane = int(t.plane_bytes) / kLine;
  for (int i = 0; i < p.taps; ++i) {
    Tap& tap = p.tap[i];
    tap.offset = tap.w % planes * plane + tap.h * p.window.columns + tap.w / planes;
  }
  count_tiles(p);
}

// The maps of its boxes of inputs and outputs; step_h: rows of shared memory between neighbouring outputs.
inline cudaError_t encode_lines(LineMaps& in, CUtensorMap& out, Params const& p, DType dtype, int step_h, int planes,
                                int out_rows, int out_columns, int out_channels) {
  int const skip_h = p.axis_h.step / step_h, step = p.axis_w.step;
  for (int i = 0; i < planes; ++i) {
    int const first = p.axis_w.low + i, column = first >= 0 ? first / step : -((step - 1 - first) / step);
    int const remainder = first - column * step;
    // A remainder of no columns has one that lies behind all images.
    bool const exists = remainder < p.in.W;
    void* const data = static_cast<char*>(p.in.data) + (exists ? remainder * p.in.w * size_of(dtype) : 0);
    int64_t const W = exists ? (p.in.W - remainder + step - 1) / step : 1;
    in.column[i] = exists ? column : 1 << 16;
    tma::Tensor4 const tensor{data, dtype, {p.in.channels, W, p.in.H, p.N}, {1, p.in.w * step, p.in.h, p.in.n}};
    cudaError_t const error =
        tma::encode_tiled(in.plane[i], tensor, p.window.blocks * kSlot / size_of(dtype), p.window.columns,
                          (p.window.rows - 1) * skip_h + 1, p.images, 1, skip_h);
    if (error != cudaSuccess) return error;
  }
  tma::Tensor4 const tensor{p.out.data, dtype, {p.out.channels, p.out.W, p.out.H, p.N}, {1, p.out.w, p.out.h, p.out.n}};
  return tma::encode_tiled(out, tensor, p.slab * out_channels, out_columns, out_rows, p.images);
}

template <class T, int parts>
cudaError_t launch_lines(Op op, Problem const& problem, Arguments const& args, cudaStream_t stream) {
  int sm_count = 0;
  cudaError_t error = count_sms(sm_count);
  if (error != cudaSuccess) return error;
  GroupedLines const t = grouped_lines(op, problem, Device{sm_count, 90});
  int64_t const step = grouped_step_3x3(op, problem);
  bool const backward = op == Op::dgrad;
  LineParams q{};
  Params& p = q.p = params_of(op, problem, args);
  p.groups_per_unit = int(lines_per_unit(op, problem));
  q.out_channels = p.groups_per_unit * p.out_per_group;
  p.in_blocks = p.groups_per_unit * p.in_per_group / kChannels<T>, p.out_blocks = int(ceil_div(q.out_channels, kBlock));
  p.units = int(ceil_div(p.groups, p.groups_per_unit)), p.mixed = p.groups_per_unit > 1;
  // Infinity is NaN once it is split into parts, so that is looked for too.
  if (parts == 2) p.mixed = true;
  bool const even = p.w_group % 2 == 0 && p.w_r % 2 == 0 && p.w_s % 2 == 0 && problem.w_align >= 4;
  q.words = even && p.w_in == 1 && p.w_out % 2 == 0 && p.in_per_group % 2 == 0    ? Words::channels
            : even && p.w_out == 1 && p.w_in % 2 == 0 && p.out_per_group % 2 == 0 ? Words::filters
                                                                                  : Words::none;
  set_lines(p, t);
  p.n_groups = int(t.n_groups);
  for (int i = 0; i < p.n_groups; ++i) {
    GroupedMet const met = step > 0 ? lines_met(op, problem, t, i) : GroupedMet{0, p.in_blocks};
    q.first[i] = uint8_t(met.first), q.count[i] = uint8_t(met.count);
  }
  for (int phase = 0; phase < p.axis_h.phases * p.axis_w.phases; ++phase) {
    int const taps = p.phase_tap[phase + 1] - p.phase_tap[phase];
    p.phase_count[phase] = step > 0 ? int(t.halves) : p.in_blocks * taps;
    p.phase_half[phase] = p.halves;
    p.halves += (p.phase_count[phase] + 1) / 2 * 2;
    p.phase_half[phase + 1] = p.halves;
  }
  p.weight_bytes = int(t.weight_bytes), p.part_words = p.weight_bytes / 4 / parts;
  q.step_h = int(t.step_h), q.shares = int(t.shares), q.of_phases = int(t.of_phases);
  q.planes = int(t.planes), q.plane_bytes = int(t.plane_bytes);
  // Filters that lie together in memory, and have room in the outputs' place.
  Strides const& w = problem.w;
  int64_t const filter = problem.C_per_group() * problem.R * problem.S,
                group_bytes = problem.K_per_group() * filter * size_of(problem.dtype);
  bool const dense =
      w.n == filter && (problem.C_per_group() - 1) * w.c + (problem.R - 1) * w.h + (problem.S - 1) * w.w == filter - 1;
  int64_t const outs = (t.planar ? 1 : 2) * t.out_bytes;
  if (dense && problem.w_align >= 16 && t.slab * p.groups_per_unit * group_bytes <= outs)
    q.filter_bytes = int(group_bytes);
  q.stage_bytes = int(t.stage_bytes), q.out_bytes = int(t.out_bytes);
  q.out_rows = p.squares_h * kSide * p.axis_h.out_step, q.out_columns = p.squares_w * kSide * p.axis_w.out_step;
  q.mirrored = backward;
  q.tables_offset = int(t.shared) - kLinesTables;
  q.planar = t.planar, q.fixed_offset = int(t.stages * t.stage_bytes + outs + t.raw_bytes);
  if (t.planar) {
    q.raw = planar_inputs(p, t, size_of(problem.dtype), t.stage_bytes + t.out_bytes, t.raw_pitch);
    q.out_pixels = Divisor(uint32_t(p.out.H * p.out.W)), q.out_width = Divisor(uint32_t(p.out.W));
  } else {
    error = encode_lines(q.in, q.out, p, problem.dtype, q.step_h, q.planes, q.out_rows, q.out_columns, q.out_channels);
    if (error != cudaSuccess) return error;
  }
  int const slabs = int(ceil_div(p.units, p.slab));
  dim3 const grid(even_blocks(p, sm_count * t.blocks_of_sm / slabs), unsigned(slabs));
  unsigned const threads = 32 * unsigned(t.slab * t.n_groups * t.shares);
  if (t.at_once == 1) return start_lines<T, parts, 1>(q, step, grid, threads, t.shared, stream);
  if constexpr (parts == 1) {
    if (t.at_once == 2) return start_lines<T, parts, 2>(q, step, grid, threads, t.shared, stream);
    if constexpr (sizeof(T) == 2) return start_lines<T, parts, 3>(q, step, grid, threads, t.shared, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace conv2d_ext::grouped
