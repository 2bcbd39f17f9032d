// fprop of a few channels by short sums: a network's first 3x3. dgrad of stride one is the same with mirrored filters.
//   y[pixels, K] = windows of x[pixels, lines x window] * w[K, lines x window]
// A window is a pixel's inputs under a line of the filter, neighbours in memory: S x C where channels lie together,
// else S, of R x C lines. So words of mma.sync's fragments are read from where they are, by way of L1, and nothing of x
// is copied to shared memory. (stem.cuh copies tiles and takes longer sums. Strict float32, Split, is as there.)
//
// A warp walks over tiles of 16 pixels of a row by all filters of its slab. It holds where a tile's words are, and the
// next tile's words while it multiplies and stores. What lies together in the results is shared out among a fragment's
// columns so that a lane's sums are neighbours, and stores are vectors: filters in channels_last (nhwc), which are then
// mma's second operand, else pixels.
#pragma once

#include <type_traits>

#include "../core/stem_lean.h"
#include "stem.cuh"

namespace conv2d_ext::stem {

constexpr int kLeanThreads = kStemLeanWarps * 32;
template <class T>
constexpr int kPerWord = 4 / int(sizeof(T));

struct LeanParams {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t bias_stride, in_n, in_c, in_h, out_n, out_c, out_h, out_w;
  int H, K, P, Q, R, lines;
  int stride_h, pad_h, dilation_h;
  int step, first;    // elements from a pixel's window to the next; of the padding before the first, and its shift
  int shift, window;  // elements before a window, in its first word, and of it
  int row, run;       // elements of a row of the inputs; words of a window
  int w_in, w_out, w_r, w_s;
  int together;        // channels of a window
  int last_r, last_s;  // the last tap, of mirrored filters; else 0
  int vector;          // 4: a lane's results are stored as vectors, else through shared memory, as ones or twos
  int tiles, tiles_w;
  depthwise::Divisor tiles_of, rows_of, words_of, lines_of, channels_of;
};

// A word of the reduction, of which there may be a half or nothing.
template <class T>
struct LeanWord {
  int row, element;  // rows below the window's first; within the window's words
  uint32_t offset;   // in memory, bytes
  uint32_t mask;
  int weights[kPerWord<T>];  // offsets of its halves' weights in a filter, or -1

  LeanWord() = default;
  __device__ LeanWord(LeanParams const& p, int index) {
    constexpr int halves = kPerWord<T>;
    int const line = int(p.words_of.quotient(uint32_t(index))), at = (index - line * p.run) * halves;
    int const c = int(p.lines_of.quotient(uint32_t(line))), r = line - c * p.R;
    bool const exists = line < p.lines;
    row = exists ? r * p.dilation_h : 0, element = exists ? at : 0;
    offset = uint32_t((exists ? c * int(p.in_c) : 0) + row * int(p.in_h) + element) * uint32_t(sizeof(T)), mask = 0;
#pragma unroll
    for (int half = 0; half < halves; ++half) {
      int const i = at + half - p.shift, s = int(p.channels_of.quotient(uint32_t(max(i, 0))));
      bool const has = exists && i >= 0 && i < p.window;
      mask |= has ? 0xffffffffu >> (32 - 32 / halves) << half * 16 : 0;
      weights[half] =
          has ? abs(r - p.last_r) * p.w_r + abs(s - p.last_s) * p.w_s + (c + i - s * p.together) * p.w_in : -1;
    }
  }
};

// A tile, as a lane sees it: its two pixels' windows and results.
template <class T, bool nhwc>
struct LeanTile {
  static constexpr int apart = nhwc ? 8 : 2;  // pixels from a lane's first to its second
  T const* from;                              // the windows' first row
  T* to;                                      // of this row of results
  int h, q0, at;                              // the first window's row; the tile's first pixel; its window's element
  bool inside;                                // all words of all windows are

  // Of column n of the first of two blocks of 8 pixels.
  __device__ static int column(int n) { return nhwc ? n : n / 2 * 4 + n % 2; }
  __device__ LeanTile(LeanParams const& p, int index) {
    int const row = int(p.tiles_of.quotient(uint32_t(index))), n = int(p.rows_of.quotient(uint32_t(row)));
    int const of_image = row - n * p.P;
    q0 = (index - row * p.tiles_w) * 16;
    int const at0 = q0 * p.step - p.first;
    h = of_image * p.stride_h - p.pad_h, at = at0 + column(int(threadIdx.x) % 32 / 4) * p.step;
    from = static_cast<T const*>(p.in) + n * p.in_n + h * p.in_h;
    to = static_cast<T*>(p.out) + n * p.out_n + of_image * p.out_h;
    inside =
        h >= 0 && h + (p.R - 1) * p.dilation_h < p.H && at0 >= 0 && at0 + 15 * p.step + kPerWord<T> * p.run <= p.row;
  }
};

// Words of both pixels of a lane as they were loaded: halves, if they do not lie in a word of memory.
template <class T, int steps, bool pairs>
struct LeanWords {
  uint32_t v[steps * 2][2][pairs ? 1 : 2];

  template <bool nhwc>
  __device__ void load(LeanParams const& p, LeanTile<T, nhwc> const& tile, LeanWord<T> const (&words)[steps * 2]) {
    if (tile.inside)
      load_from<true>(p, tile, words);
    else
      load_from<false>(p, tile, words);
  }
  template <bool inside, bool nhwc>
  __device__ void load_from(LeanParams const& p, LeanTile<T, nhwc> const& tile, LeanWord<T> const (&words)[steps * 2]) {
    using Piece = std::conditional_t<pairs, uint32_t, uint16_t>;
#pragma unroll
    for (int pixel = 0; pixel < 2; ++pixel) {
      int const at = tile.at + pixel * tile.apart * p.step;
      char const* const window = reinterpret_cast<char const*>(tile.from + at);
#pragma unroll
      for (int i = 0; i < steps * 2; ++i) {
        Piece const* const from = reinterpret_cast<Piece const*>(window + words[i].offset);
        bool const in_row = inside || unsigned(tile.h + words[i].row) < unsigned(p.H);
#pragma unroll
        for (int half = 0; half < (pairs ? 1 : 2); ++half) {  // both halves of a word are within the row, or none
          bool const exists = inside || (in_row && unsigned(at + words[i].element + half) < unsigned(p.row));
          v[i][pixel][half] = exists ? uint32_t(from[half]) : 0;
        }
      }
    }
  }
  __device__ uint32_t word(int i, int pixel, uint32_t mask) const {
    if constexpr (sizeof(T) == 4)
      return (is_split<T> ? v[i][pixel][0] : ptx::cvt_rn_tf32(__uint_as_float(v[i][pixel][0]))) & mask;
    return (pairs ? v[i][pixel][0] : __byte_perm(v[i][pixel][0], v[i][pixel][pairs ? 0 : 1], 0x5410)) & mask;
  }
};

// Of fragments of `blocks` by 8 filters: in channels_last four of them, at the end perhaps two, and two of floats,
// share out their filters so that a lane's columns are neighbours.
template <class T, int blocks, bool nhwc>
struct LeanFilters {
  static constexpr int fours = sizeof(T) == 2 ? blocks / 4 * 4 : 0;
  static constexpr int together(int block) { return !nhwc ? 1 : block < fours ? 4 : 2; }
  static constexpr int of_column(int block, int column) {
    if (!nhwc) return block * 8 + column;
    int const near = together(block), from = block / near * near;
    return from * 8 + column / 2 * (2 * near) + (block - from) * 2 + column % 2;
  }
};

// The filters' words as Shared::weights of stem.cuh, of Split their high parts and then their low ones, and the bias.
template <class T, int blocks, int steps, bool nhwc>
__device__ inline void load_lean_filters(LeanParams const& p, LeanWord<T> const (&words)[steps * 2], int first,
                                         uint4* weights, float* bias) {
  int const lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int k = 0; k < (blocks + kStemLeanWarps - 1) / kStemLeanWarps; ++k) {
    int const block = k * kStemLeanWarps + int(threadIdx.x) / 32;
    int const filter = first + LeanFilters<T, blocks, nhwc>::of_column(block, lane / 4);
    T const* const w = static_cast<T const*>(p.w) + int64_t(filter) * p.w_out;
    if (block >= blocks) continue;
#pragma unroll
    for (int i = 0; i < steps * 2; ++i) {
      Vector<T, kPerWord<T>> v;
#pragma unroll
      for (int half = 0; half < kPerWord<T>; ++half)
        v.v[half] = rounded(words[i].weights[half] >= 0 && filter < p.K ? w[words[i].weights[half]] : narrow<T>(0.f));
      uint4* const to = weights + (i / 2 * (blocks / 2) + block / 2) * 32 + lane;
      Word<T> const word = word_of<T>(*reinterpret_cast<uint32_t const*>(&v));
      if constexpr (is_split<T>) {
        reinterpret_cast<uint32_t*>(to)[block % 2 * 2 + i % 2] = word.high;
        reinterpret_cast<uint32_t*>(to + steps * blocks * 16)[block % 2 * 2 + i % 2] = word.low;
      } else {
        reinterpret_cast<uint32_t*>(to)[block % 2 * 2 + i % 2] = word;
      }
    }
  }
  for (int i = int(threadIdx.x); i < blocks * 8; i += kLeanThreads)
    bias[i] =
        p.bias != nullptr && first + i < p.K ? widen(static_cast<T const*>(p.bias)[(first + i) * p.bias_stride]) : 0.f;
}

// A warp's 16 x 16 results, on their way to lines of memory that are no vectors: a lane's four of a line.
template <class T>
struct LeanStage {
  static constexpr int pitch = 20;
  T v[16 * pitch];

  __device__ void put(int line, int column, Vector<T, 4> const& of_lane) {
    *reinterpret_cast<Vector<T, 4>*>(v + line * pitch + column) = of_lane;
  }
  // Stores the first `columns` of `lines` lines, `length` neighbours at a time.
  template <int length>
  __device__ void store(T* to, int lines, int64_t line_step, int columns, int64_t column_step) const {
    constexpr int lanes = 16 / length;
    int const lane = int(threadIdx.x) % 32, column = lane % lanes * length;
#pragma unroll
    for (int i = 0; i < 16; i += 32 / lanes) {
      int const line = i + lane / lanes;
      if (line < lines && column < columns)
        *reinterpret_cast<Vector<T, length>*>(to + line * line_step + column * column_step) =
            *reinterpret_cast<Vector<T, length> const*>(v + line * pitch + column);
    }
  }
};

// channels_last: sums of `near` blocks of filters at a time, from block `begin` on.
template <class T, int blocks, int begin, int near>
__device__ inline void store_filters(LeanParams const& p, LeanTile<T, true> const& tile, int first, LeanStage<T>& stage,
                                     float const (&acc)[blocks][4]) {
  constexpr int length = 2 * near;
#pragma unroll
  for (int j = begin; j + near <= blocks; j += near) {
    int const filter = first + LeanFilters<T, blocks, true>::of_column(j, int(threadIdx.x) % 4 * 2);
#pragma unroll
    for (int pixel = 0; pixel < 2; ++pixel) {
      int const at = int(threadIdx.x) % 32 / 4 + pixel * 8, q = tile.q0 + at;
      Vector<T, length> v;
#pragma unroll
      for (int i = 0; i < length; ++i) v.v[i] = narrow<T>(acc[j + i / 2][pixel * 2 + i % 2]);
      if (sizeof(T) == 2 || p.vector == 4) {
        if (q < p.Q && filter < p.K) *reinterpret_cast<Vector<T, length>*>(tile.to + q * p.out_w + filter) = v;
      } else if constexpr (length == 4) {
        stage.put(at, int(threadIdx.x) % 4 * 4, v);
      }
    }
    if (sizeof(T) == 2 || p.vector == 4) continue;
    __syncwarp();
    int const from = first + j * 8;
    stage.template store<1>(tile.to + tile.q0 * p.out_w + from * p.out_c, p.Q - tile.q0, p.out_w, p.K - from, p.out_c);
    __syncwarp();
  }
}

// NCHW: a lane has four pixels of two filters of each two blocks.
template <class T, int blocks>
__device__ inline void store_pixels(LeanParams const& p, LeanTile<T, false> const& tile, int first, LeanStage<T>& stage,
                                    float const (&acc)[blocks][4]) {
  int const column = int(threadIdx.x) % 4 * 4, q = tile.q0 + column;
#pragma unroll
  for (int j = 0; j < blocks; j += 2) {
    T* const to = tile.to + (first + j * 8) * p.out_c + tile.q0 * p.out_w;
    int const filters = p.K - first - j * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const filter = int(threadIdx.x) % 32 / 4 + half * 8;
      Vector<T, 4> v;
#pragma unroll
      for (int i = 0; i < 4; ++i) v.v[i] = narrow<T>(acc[j + i / 2][half * 2 + i % 2]);
      if (p.vector != 4)
        stage.put(filter, column, v);
      else if (filter < filters && q < p.Q)
        *reinterpret_cast<Vector<T, 4>*>(to + filter * p.out_c + column) = v;
    }
    if (p.vector == 4) continue;
    __syncwarp();
    if (p.vector == 2)
      stage.template store<2>(to, filters, p.out_c, p.Q - tile.q0, 1);
    else
      stage.template store<1>(to, filters, p.out_c, p.Q - tile.q0, p.out_w);
    __syncwarp();
  }
}

// Looks through a tile's results, which have been stored, for those that are not finite, and makes them again.
template <bool nhwc>
__device__ inline void mend_lean(LeanParams const& p, LeanTile<Split, nhwc> const& tile, int first, int filters,
                                 float const* bias) {
  __syncwarp();
#pragma unroll 1
  for (int i = int(threadIdx.x) % 32; i < 16 * filters; i += 32) {
    int const q = tile.q0 + i % 16, k = first + i / 16, at0 = q * p.step - p.first + p.shift;
    if (q >= p.Q || k >= p.K) continue;
    float* const to = &tile.to[q * p.out_w + k * p.out_c].v;
    if (isfinite(*to)) continue;
    float const* const filter = static_cast<float const*>(p.w) + int64_t(k) * p.w_out;
    float sum = 0;
#pragma unroll 1
    for (int line = 0; line < p.lines; ++line) {
      int const c = line / p.R, r = line - c * p.R;
      if (unsigned(tile.h + r * p.dilation_h) >= unsigned(p.H)) continue;
      float const* const row = &tile.from[c * p.in_c + r * p.dilation_h * p.in_h].v;
#pragma unroll 1
      for (int j = 0; j < p.window; ++j) {
        int const s = j / p.together;
        float const w =
            filter[abs(r - p.last_r) * p.w_r + abs(s - p.last_s) * p.w_s + (c + j - s * p.together) * p.w_in];
        if (unsigned(at0 + j) < unsigned(p.row)) sum = fmaf(row[at0 + j], w, sum);
      }
    }
    *to = sum + bias[i / 16];
  }
}

// The parts of a fragment's words.
template <class T, int steps, int blocks>
struct LeanWeights {
  Word<T> v[4];
  __device__ explicit LeanWeights(uint4 const* at) {
    uint4 const word = *at;
    if constexpr (is_split<T>) {
      uint4 const low = at[steps * blocks * 16];
      v[0] = {word.x, low.x}, v[1] = {word.y, low.y}, v[2] = {word.z, low.z}, v[3] = {word.w, low.w};
    } else {
      v[0] = word.x, v[1] = word.y, v[2] = word.z, v[3] = word.w;
    }
  }
};

template <class T, int blocks, int steps, bool pairs, bool nhwc>
__global__ void __launch_bounds__(kLeanThreads, stem_lean_blocks(blocks, steps, pairs, nhwc, is_split<T>))
    windows(__grid_constant__ LeanParams const p) {
  using Filters = LeanFilters<T, blocks, nhwc>;
  using Tile = LeanTile<T, nhwc>;
  __shared__ uint4 weights[steps * blocks * 16 * (is_split<T> ? 2 : 1)];
  __shared__ alignas(16) float bias[blocks * 8];
  __shared__ alignas(16) LeanStage<T> stages[kStemLeanWarps];
  int const lane = int(threadIdx.x) % 32, first = int(blockIdx.y) * blocks * 8;
  int const warp = int(blockIdx.x * kStemLeanWarps + threadIdx.x / 32), warps = int(gridDim.x) * kStemLeanWarps;
  LeanWord<T> words[steps * 2];
#pragma unroll
  for (int i = 0; i < steps * 2; ++i) words[i] = LeanWord<T>(p, i * 4 + lane % 4);
  Tile after(p, min(warp, p.tiles - 1));
  LeanWords<T, steps, pairs> next;
  next.load(p, after, words);  // on their way while the filters are
  load_lean_filters<T, blocks, steps, nhwc>(p, words, first, weights, bias);
  __syncthreads();
  bool wrong = false;  // strict: a sum was not finite
  for (int index = warp; index < p.tiles; index += warps) {
    Tile const tile = after;
    uint32_t x[steps][4];
#pragma unroll
    for (int i = 0; i < steps * 4; ++i) x[i / 4][i % 4] = next.word(i / 2, i % 2, words[i / 2].mask);
    if (index + warps < p.tiles) {
      after = Tile(p, index + warps);
      next.load(p, after, words);
    }
    float acc[blocks][4];
#pragma unroll
    for (int j = 0; j < blocks; j += 2) {
      if constexpr (nhwc) {
        float4 const b = *reinterpret_cast<float4 const*>(bias + Filters::of_column(j, lane % 4 * 2));
        acc[j][0] = acc[j][2] = b.x, acc[j][1] = acc[j][3] = b.y;
        acc[j + 1][0] = acc[j + 1][2] = b.z, acc[j + 1][1] = acc[j + 1][3] = b.w;
      } else {
        float const upper = bias[j * 8 + lane / 4], lower = bias[j * 8 + 8 + lane / 4];
        acc[j][0] = acc[j][1] = acc[j + 1][0] = acc[j + 1][1] = upper;
        acc[j][2] = acc[j][3] = acc[j + 1][2] = acc[j + 1][3] = lower;
      }
    }
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      Word<T> a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = word_of<T>(x[step][i]);
#pragma unroll
      for (int j = 0; j < blocks; j += 2) {
        LeanWeights<T, steps, blocks> const w(weights + (step * blocks / 2 + j / 2) * 32 + lane);
        if constexpr (nhwc) {
          mma<T>(acc[j], a[0], a[1], a[2], a[3], w.v[0], w.v[1]);
          mma<T>(acc[j + 1], a[0], a[1], a[2], a[3], w.v[2], w.v[3]);
        } else {
          mma<T>(acc[j], w.v[0], w.v[2], w.v[1], w.v[3], a[0], a[2]);
          mma<T>(acc[j + 1], w.v[0], w.v[2], w.v[1], w.v[3], a[1], a[3]);
        }
      }
    }
    if constexpr (is_split<T>) {
      float nothing[4] = {};
#pragma unroll
      for (int i = 0; i < blocks * 4; ++i) nothing[i % 4] += acc[i / 4][i % 4] * 0.0f;
      wrong |= (nothing[0] + nothing[1]) + (nothing[2] + nothing[3]) != 0.0f;
    }
    LeanStage<T>& stage = stages[threadIdx.x / 32];
    if constexpr (nhwc) {
      if constexpr (Filters::fours > 0) store_filters<T, blocks, 0, 4>(p, tile, first, stage, acc);
      if constexpr (Filters::fours < blocks) store_filters<T, blocks, Filters::fours, 2>(p, tile, first, stage, acc);
    } else {
      store_pixels<T, blocks>(p, tile, first, stage, acc);
    }
  }
  if constexpr (is_split<T>)
    if (__any_sync(0xffffffffu, wrong))
      for (int index = warp; index < p.tiles; index += warps)
        mend_lean<nhwc>(p, Tile(p, index), first, blocks * 8, bias);
}

using LeanKernel = void (*)(LeanParams);

template <class T, int blocks, bool nhwc>
LeanKernel windows_kernel(StemLean const& t) {
  LeanKernel kernel = nullptr;
  if constexpr (is_split<T>) {
    kernel = windows<T, blocks, stem_lean_steps(4), true, nhwc>;
  } else if constexpr (sizeof(T) == 4) {
    static_assert(stem_lean_steps(4) == 4);
    kernel = t.steps == 1   ? windows<T, blocks, 1, true, nhwc>
             : t.steps == 2 ? windows<T, blocks, 2, true, nhwc>
             : t.steps == 3 ? windows<T, blocks, 3, true, nhwc>
                            : windows<T, blocks, 4, true, nhwc>;
  } else {
    static_assert(stem_lean_steps(2) == 3);
    auto const of = [&](auto pairs) -> LeanKernel {
      return t.steps == 1   ? windows<T, blocks, 1, pairs, nhwc>
             : t.steps == 2 ? windows<T, blocks, 2, pairs, nhwc>
                            : windows<T, blocks, 3, pairs, nhwc>;
    };
    kernel = t.pairs ? of(std::true_type{}) : of(std::false_type{});
  }
  return kernel;
}

template <class T>
LeanKernel windows_kernel(StemLean const& t) {
  auto const of = [&](auto count) {
    return t.nhwc ? windows_kernel<T, count, true>(t) : windows_kernel<T, count, false>(t);
  };
  return t.blocks == 2   ? of(std::integral_constant<int, 2>{})
         : t.blocks == 4 ? of(std::integral_constant<int, 4>{})
         : t.blocks == 6 ? of(std::integral_constant<int, 6>{})
                         : of(std::integral_constant<int, 8>{});
}

template <DType dtype>
cudaError_t launch_lean(Op op, Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  StemLean const t = stem_lean(op, problem);
  StemView const v = stem_view(op, problem);
  LeanParams p{};
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.out = args.out, p.bias_stride = args.bias_stride;
  p.in_n = v.in.n, p.in_c = v.in.c, p.in_h = v.in.h;
  p.out_n = v.out.n, p.out_c = v.out.c, p.out_h = v.out.h, p.out_w = v.out.w;
  p.H = int(v.H), p.K = int(v.K), p.P = int(v.P), p.Q = int(v.Q), p.R = int(problem.R), p.lines = int(t.lines);
  p.stride_h = int(v.stride_h), p.pad_h = int(v.pad_h), p.dilation_h = int(problem.dilation_h);
  p.together = int(t.together), p.shift = int(t.shift), p.window = int(problem.S * t.together), p.run = int(t.run);
  p.step = int(v.stride_w * t.together), p.first = int(v.pad_w * t.together + t.shift), p.row = int(v.W * t.together);
  p.w_in = int(v.w_in), p.w_out = int(v.w_out), p.w_r = int(problem.w.h), p.w_s = int(problem.w.w);
  if (v.mirrored) p.last_r = int(problem.R - 1), p.last_s = int(problem.S - 1);
  p.vector = int(t.vector);
  p.tiles = int(t.tiles), p.tiles_w = int(t.tiles_w);
  p.tiles_of = depthwise::Divisor(uint32_t(t.tiles_w)), p.rows_of = depthwise::Divisor(uint32_t(v.P));
  p.words_of = depthwise::Divisor(uint32_t(p.run)), p.channels_of = depthwise::Divisor(uint32_t(p.together));
  p.lines_of = depthwise::Divisor(uint32_t(problem.R));
  // As many rounds of tiles for all warps.
  int64_t const blocks =
                    h200_sxm.sm_count * stem_lean_blocks(t.blocks, t.steps, t.pairs, t.nhwc, stem_is_strict(problem)),
                most = max64(blocks / t.slabs, 1) * kStemLeanWarps, warps = ceil_div(t.tiles, ceil_div(t.tiles, most));
  LeanKernel kernel = windows_kernel<T>(t);
  if constexpr (dtype == DType::f32)
    if (!problem.allow_tf32) kernel = windows_kernel<Split>(t);
  kernel<<<dim3(unsigned(ceil_div(warps, kStemLeanWarps)), unsigned(t.slabs)), kLeanThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::stem

#define CONV2D_EXT_STEM_LEAN_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                   \
    return stem::launch_lean<DType::dtype>(Op::op, p, args, stream);          \
  }
