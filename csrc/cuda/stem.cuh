// Convolution of a few channels on tensor cores, in any strides: fprop of a network's first layer, dgrad of its last.
//   y[pixels, K] = gathered x[pixels, R x (S C)] * w[R x (S C), K]
// The reduction runs over the filter's rows, and in each over its S C neighbouring inputs: nothing is padded but the
// end of a row, to a word of 32 bits.
//
// A block keeps the filters of its slab in shared memory, in the order of mma.sync's fragments, and walks over tiles:
// it copies a tile's inputs with their halo to shared memory, [row][column][channel], zeros outside of the image, and
// each warp gathers fragments from there, word by word: a word of the reduction is an offset. Where 16-bit runs begin
// at odd elements too, a second copy of the inputs lies one element further. Two blocks an SM: one copies, one
// multiplies.
//
// The same words are either operand of mma.sync: in channels_last (nhwc) pixels are its rows, else (nchw) filters are,
// and four lanes hold 32 pixels or filters that lie together in memory.
//
// Strict float32 (Split): words are kept as they are and split in registers into two TF32 numbers each; of a step, 8
// products, three mma.sync make a sum that is added to float32 registers. Results that are not finite, as an infinity
// times a split number may be, are summed again from the operands.
#pragma once

#include <type_traits>

#include "../core/stem.h"
#include "depthwise_tile.cuh"
#include "fragments.cuh"

namespace conv2d_ext {

// float32 whose products are as exact as float32's.
struct Split {
  float v;
};
__device__ inline float widen(Split v) { return v.v; }
template <>
__device__ inline Split narrow(float v) {
  return {v};
}

}  // namespace conv2d_ext

namespace conv2d_ext::stem {

using depthwise::Divisor;

constexpr int kWarps = kStemThreads / 32;

struct Params {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t bias_stride, in_n, in_c, in_h, in_w, out_n, out_c, out_h, out_w;
  int C, H, W, K, P, Q, R, S;
  int stride_h, stride_w, pad_h, pad_w, dilation_h;
  int w_in, w_out, w_r, w_s;
  bool mirrored, runs, vectors;  // runs: a row of inputs is one run of memory; vectors: outputs are stored as such
  bool whole;                    // nhwc without vectors: eight pixels' outputs are one run of vectors
  int rows, groups, tiles_h, tiles_w, slabs, run, steps, in_rows, in_columns, pitch, copies;
  Divisor groups_of;  // a run's row
  int64_t tiles;
};

template <class T>
constexpr bool is_split = std::is_same_v<T, Split>;

// 32 bits of an operand, or the two parts of a number.
struct Parts {
  uint32_t high, low;
};
template <class T>
using Word = std::conditional_t<is_split<T>, Parts, uint32_t>;

template <class T>
__device__ inline Word<T> word_of(uint32_t bits) {
  if constexpr (is_split<T>) {
    float const v = __uint_as_float(bits);
    uint32_t const high = ptx::cvt_rn_tf32(v);
    // What is left has 12 bits, of which the tensor cores take 11.
    return {high, __float_as_uint(v - __uint_as_float(high))};
  } else {
    return bits;
  }
}

template <class T>
__device__ inline void mma(float (&d)[4], Word<T> a0, Word<T> a1, Word<T> a2, Word<T> a3, Word<T> b0, Word<T> b1) {
  if constexpr (is_split<T>) {
    float sum[4] = {};  // the small products first
    ptx::mma_m16n8k8_tf32(sum, a0.low, a1.low, a2.low, a3.low, b0.high, b1.high);
    ptx::mma_m16n8k8_tf32(sum, a0.high, a1.high, a2.high, a3.high, b0.low, b1.low);
    ptx::mma_m16n8k8_tf32(sum, a0.high, a1.high, a2.high, a3.high, b0.high, b1.high);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += sum[i];
  } else if constexpr (sizeof(T) == 2) {
    ptx::mma_m16n8k16<T>(d, a0, a1, a2, a3, b0, b1);
  } else {
    ptx::mma_m16n8k8_tf32(d, a0, a1, a2, a3, b0, b1);
  }
}

// What words of shared memory hold.
template <class T>
__device__ inline T rounded(T v) {
  if constexpr (std::is_same_v<T, float>)
    return __uint_as_float(ptx::cvt_rn_tf32(v));
  else
    return v;
}

// Shared memory: filters | offsets | bias | outputs | inputs | weights' places.
template <class T, bool nchw, int blocks>
struct Shared {
  uint4* weights;  // [step][pair of blocks of 8 filters][lane]: words t and t + 4 of the one block, of the other
  int4* words;     // [step][t]: offset and mask of word t, of word t + 4
  float* bias;     // [blocks * 8]
  T* staged;       // nchw: [warp][8][kStemStaged]; nhwc, 16-bit types without vectors: [warp][8 pixels][filters]
  T* inputs;       // [copy][row][pitch]
  __device__ Shared(Params const& p, char* dynamic) {
    weights = reinterpret_cast<uint4*>(dynamic);
    words = reinterpret_cast<int4*>(weights + p.steps * blocks * 16);
    bias = reinterpret_cast<float*>(words + p.steps * 4);
    staged = reinterpret_cast<T*>(bias + blocks * 8);
    inputs = staged + (nchw ? kWarps * 8 * kStemStaged : sizeof(T) == 4 || p.vectors ? 0 : kWarps * blocks * 64);
  }
};

// On their way to L2 while a block makes its tables.
template <class T>
__device__ inline void prefetch_filters(Params const& p, int first, int filters) {
  if (p.mirrored || p.w_out != p.R * p.S * p.C) return;
  constexpr int line = 128 / int(sizeof(T));
  T const* const w = static_cast<T const*>(p.w) + first * p.w_out;
  for (int i = threadIdx.x * line; i < min(filters, p.K - first) * p.w_out; i += kStemThreads * line)
    ptx::prefetch_l2(w + i);
}

template <class T, bool nchw, int blocks>
__device__ inline void load_filters(Params const& p, int first, Shared<T, nchw, blocks> const& s) {
  constexpr int per_word = 4 / int(sizeof(T));
  // Of each element of the reduction, its weight; -1: it is none. Behind the inputs, which other warps may be copying.
  int* const from = reinterpret_cast<int*>(s.inputs) + (is_split<T> ? 0 : p.copies * p.in_rows * p.pitch);
  uint32_t* const weights = reinterpret_cast<uint32_t*>(s.weights);
  int* const words = reinterpret_cast<int*>(s.words);
  for (int i = threadIdx.x; i < p.steps * 8; i += kStemThreads) {
    int const r = i / p.run, word = i % p.run;
    uint32_t mask = 0;
    for (int e = 0; e < per_word; ++e) {
      int const j = word * per_word + e, tap = j / p.C;
      bool const exists = r < p.R && tap < p.S;
      if (exists) mask |= (per_word == 2 ? 0xffffu : 0xffffffffu) << (16 * e);
      from[i * per_word + e] = exists ? (p.mirrored ? p.R - 1 - r : r) * p.w_r +
                                            (p.mirrored ? p.S - 1 - tap : tap) * p.w_s + j % p.C * p.w_in
                                      : -1;
    }
    int* const to = words + (i / 8 * 4 + i % 4) * 4 + i / 4 % 2 * 2;
    to[0] = r < p.R ? r * p.dilation_h * p.pitch + word : 0;
    to[1] = int(mask);
  }
  for (int i = threadIdx.x; i < blocks * 8; i += kStemThreads)
    s.bias[i] =
        p.bias != nullptr && first + i < p.K ? widen(static_cast<T const*>(p.bias)[(first + i) * p.bias_stride]) : 0.f;
  __syncthreads();
  T const* const w = static_cast<T const*>(p.w);
#pragma unroll 4
  for (int i = threadIdx.x; i < p.steps * blocks * 64; i += kStemThreads) {
    int const part = i % 4, lane = i / 4 % 32, pair = i / 128 % (blocks / 2), step = i / (64 * blocks);
    int const filter = first + (pair * 2 + part / 2) * 8 + lane / 4, word = step * 8 + part % 2 * 4 + lane % 4;
    Vector<T, per_word> v;
#pragma unroll
    for (int e = 0; e < per_word; ++e) {
      int const at = from[word * per_word + e];
      v.v[e] = at >= 0 && filter < p.K ? rounded(w[filter * p.w_out + at]) : narrow<T>(0.f);
    }
    weights[i] = *reinterpret_cast<uint32_t const*>(&v);
  }
}

// Four lines of elements: where they are, and which of them exist.
template <class T>
struct Lines {
  T const* from;
  int64_t line, step;           // from a line, an element, to the next
  int first, last, begin, end;  // lines [first, last) and elements [begin, end) exist; the rest are zeros
  T* to;
  int to_line, to_step;
  int lines, count;  // that are written
};

// 64 elements of each line, by a warp; `second` is where each is written once more, if not 0.
template <class T>
__device__ inline void copy_lines(Lines<T> const& l, int part, int second) {
  int const i = part * 64 + int(threadIdx.x) % 32;
  T v[4][2];
#pragma unroll
  for (int line = 0; line < 4; ++line)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      int const at = i + k * 32;
      bool const exists = line >= l.first && line < l.last && at >= l.begin && at < l.end;
      v[line][k] = exists ? rounded(l.from[line * l.line + at * l.step]) : narrow<T>(0.f);
    }
#pragma unroll
  for (int line = 0; line < 4; ++line)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      int const at = i + k * 32;
      if (line >= l.lines || at >= l.count) continue;
      T* const to = l.to + line * l.to_line + at * l.to_step;
      *to = v[line][k];
      if (second != 0) to[second] = v[line][k];
    }
}

// A tile's inputs, from (h, w) on, `pitch` elements a row; zeros outside of the image.
template <class T>
__device__ inline void copy_inputs(Params const& p, int64_t n, int h, int w, int pitch, T* inputs) {
  // One element further: the first of all falls into the end of the first copy's last row, which is masked.
  int const second = p.copies == 2 ? p.in_rows * pitch - 1 : 0;
  int const together = p.runs ? p.C : 1, channels = p.runs ? 1 : p.C;  // of a line; lines of a row
  int const parts = (p.in_columns * together + 63) / 64, units = (p.in_rows + 3) / 4 * channels * parts;
  // The stride of a width of one is 0, also where a row is one run.
  T const* const image = static_cast<T const*>(p.in) + n * p.in_n + int64_t(w) * (p.runs ? p.C : p.in_w);
  for (int unit = threadIdx.x / 32; unit < units; unit += int(blockDim.x) / 32) {
    int const index = unit / parts, four = index / channels, c = index - four * channels, row = four * 4;
    Lines<T> const l{image + (h + row) * p.in_h + c * p.in_c,
                     p.in_h,
                     p.runs ? 1 : p.in_w,
                     -(h + row),
                     p.H - (h + row),
                     max(0, -w) * together,
                     min(p.in_columns, p.W - w) * together,
                     inputs + row * pitch + c,
                     pitch,
                     channels,
                     p.in_rows - row,
                     p.in_columns * together};
    copy_lines(l, unit - index * parts, second);
  }
}

// The sums of a warp's runs of outputs, from the words where each run's inputs begin.
template <class T, bool nchw, int groups, int blocks>
__device__ inline void multiply(float (&acc)[groups * blocks / 2][4], uint32_t const (&from)[groups], int steps,
                                Shared<T, nchw, blocks> const& s) {
  int const lane = threadIdx.x % 32;
  int4 const* words = s.words + lane % 4;
  uint4 const* weights = s.weights + lane;
#pragma unroll 1
  for (; steps > 0; --steps, words += 4, weights += blocks * 16) {
    int4 const at = *words;
    Word<T> x[groups][2];
#pragma unroll
    for (int i = 0; i < groups; ++i) {
      x[i][0] = word_of<T>(ptx::ld_shared(from[i] + at.x * 4) & uint32_t(at.y));
      x[i][1] = word_of<T>(ptx::ld_shared(from[i] + at.z * 4) & uint32_t(at.w));
    }
#pragma unroll
    for (int j = 0; j < blocks / 2; ++j) {
      uint4 const four = weights[j * 32];
      Word<T> const w[4] = {word_of<T>(four.x), word_of<T>(four.y), word_of<T>(four.z), word_of<T>(four.w)};
      if constexpr (nchw) {
#pragma unroll
        for (int i = 0; i < groups; ++i) mma<T>(acc[j * groups + i], w[0], w[2], w[1], w[3], x[i][0], x[i][1]);
      } else {
#pragma unroll
        for (int i = 0; i < groups; i += 2) {
          mma<T>(acc[i / 2 * blocks + 2 * j], x[i][0], x[i + 1][0], x[i][1], x[i + 1][1], w[0], w[1]);
          mma<T>(acc[i / 2 * blocks + 2 * j + 1], x[i][0], x[i + 1][0], x[i][1], x[i + 1][1], w[2], w[3]);
        }
      }
    }
  }
}

template <class T>
__device__ inline void store_two(T* to, int64_t step, int left, bool vector, float a, float b) {
  if (vector && left >= 2) {
    *reinterpret_cast<Vector<T, 2>*>(to) = {narrow<T>(a), narrow<T>(b)};
  } else {
    if (left > 0) to[0] = narrow<T>(a);
    if (left > 1) to[step] = narrow<T>(b);
  }
}

// Where a run of 8 outputs is, and how many of them exist.
template <class T>
struct Outputs {
  T* at;
  int left, h, w;
  __device__ Outputs(Params const& p, int64_t n, int row0, int column0, int group, int first) {
    int const row = p.groups_of.quotient(group);
    h = row0 + row, w = column0 + (group - row * p.groups) * 8;
    bool const exists = row < p.rows && h < p.P && w < p.Q;
    at = static_cast<T*>(p.out) + n * p.out_n + h * p.out_h + w * p.out_w + first * p.out_c;
    left = exists ? min(8, p.Q - w) : 0;
  }
};

// Pixels are rows: a lane has two neighbouring filters of pixel lane / 4 of each run.
template <class T, int groups, int blocks>
__device__ inline void store_nhwc(Params const& p, float const (&acc)[groups * blocks / 2][4], int64_t n, int row0,
                                  int column0, int group0, int first, float const* bias, T* staged) {
  int const lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < groups; ++i) {
    Outputs<T> const o(p, n, row0, column0, group0 + i, first);
    if (sizeof(T) == 4 || p.vectors) {
      T* const to = o.at + g * p.out_w;
      bool const pairs = reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0;
#pragma unroll
      for (int j0 = 0; j0 < blocks; j0 += 4) {
        float v[4][2];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float2 const b = *reinterpret_cast<float2 const*>(bias + (j0 + j) * 8 + t * 2);
          v[j][0] = acc[i / 2 * blocks + j0 + j][i % 2 * 2] + b.x;
          v[j][1] = acc[i / 2 * blocks + j0 + j][i % 2 * 2 + 1] + b.y;
        }
        if constexpr (sizeof(T) == 2) {
          uint32_t words[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) words[j] = pack<T>(v[j][0], v[j][1]);
          transpose_quad(words);
          if (g < o.left && first + (j0 + t) * 8 < p.K)
            *reinterpret_cast<uint4*>(to + (j0 + t) * 8) = make_uint4(words[0], words[1], words[2], words[3]);
        } else if (g < o.left) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            int const filter = (j0 + j) * 8 + t * 2;
            store_two(to + filter, 1, p.K - first - filter, pairs, v[j][0], v[j][1]);
          }
        }
      }
    } else {  // by way of shared memory, so that lanes store neighbouring filters, or vectors of several pixels'
              // filters
      int const filters = min(blocks * 8, p.K - first);
      T* const to = staged + g * filters + t * 2;
      __syncwarp();
#pragma unroll
      for (int j = 0; j < blocks; ++j) {
        float2 const b = *reinterpret_cast<float2 const*>(bias + j * 8 + t * 2);
        float const* const v = acc[i / 2 * blocks + j] + i % 2 * 2;
        if (j * 8 + t * 2 < filters) to[j * 8] = narrow<T>(v[0] + b.x);
        if (j * 8 + t * 2 + 1 < filters) to[j * 8 + 1] = narrow<T>(v[1] + b.y);
      }
      __syncwarp();
      if (p.whole && o.left == 8) {
        for (int k = lane; k < filters * int(sizeof(T)) / 2; k += 32)
          reinterpret_cast<uint4*>(o.at)[k] = reinterpret_cast<uint4 const*>(staged)[k];
      } else {
        for (int pixel = 0; pixel < o.left; ++pixel)
          for (int k = lane; k < filters; k += 32) o.at[pixel * p.out_w + k] = staged[pixel * filters + k];
      }
    }
  }
}

// Filters are rows: a lane has two neighbouring pixels of filter lane / 4 of each block.
template <class T, int groups, int blocks>
__device__ inline void store_nchw(Params const& p, float const (&acc)[groups * blocks / 2][4], int64_t n, int row0,
                                  int column0, int group0, int first, float const* bias, T* staged) {
  int const lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i0 = 0; i0 < groups; i0 += 4) {
    if (sizeof(T) == 2 && p.vectors) {
      Outputs<T> const o(p, n, row0, column0, group0 + i0 + t, first);
#pragma unroll
      for (int j = 0; j < blocks; ++j) {
        float const b = bias[j * 8 + g];
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float const* const v = acc[j / 2 * groups + i0 + i] + j % 2 * 2;
          words[i] = pack<T>(v[0] + b, v[1] + b);
        }
        transpose_quad(words);
        if (o.left > 0 && first + j * 8 + g < p.K)
          *reinterpret_cast<uint4*>(o.at + (j * 8 + g) * p.out_c) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    } else {  // by way of shared memory, so that lanes store neighbouring pixels
      Outputs<T> const o(p, n, row0, column0, group0 + i0 + lane / 8, first);
      T* const to = o.at + lane % 8 * p.out_w;
#pragma unroll
      for (int j = 0; j < blocks; ++j) {
        float const b = bias[j * 8 + g];
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float const* const v = acc[j / 2 * groups + i0 + i] + j % 2 * 2;
          *reinterpret_cast<Vector<T, 2>*>(staged + g * kStemStaged + i * 8 + t * 2) = {narrow<T>(v[0] + b),
                                                                                        narrow<T>(v[1] + b)};
        }
        __syncwarp();
        int const filters = min(8, p.K - first - j * 8);
#pragma unroll
        for (int k = 0; k < 8; ++k)
          if (lane % 8 < o.left && k < filters) to[(j * 8 + k) * p.out_c] = staged[k * kStemStaged + lane];
      }
    }
  }
}

// Filter k's result of pixel (h, w), product by product.
__device__ inline float made_again(Params const& p, int64_t n, int h, int w, int k) {
  float const* const image = static_cast<float const*>(p.in) + n * p.in_n;
  float const* const filter = static_cast<float const*>(p.w) + int64_t(k) * p.w_out;
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < p.R * p.S; ++i) {
    int const r = i / p.S, s = i - r * p.S;
    int const row = h * p.stride_h - p.pad_h + r * p.dilation_h, column = w * p.stride_w - p.pad_w + s;
    if (unsigned(row) >= unsigned(p.H) || unsigned(column) >= unsigned(p.W)) continue;
    float const* const weights =
        filter + (p.mirrored ? p.R - 1 - r : r) * p.w_r + (p.mirrored ? p.S - 1 - s : s) * p.w_s;
#pragma unroll 1
    for (int c = 0; c < p.C; ++c)
      sum = fmaf(image[row * p.in_h + column * p.in_w + c * p.in_c], weights[c * p.w_in], sum);
  }
  return sum;
}

// Looks through a warp's results, which have been stored, for those that are not finite.
template <int groups, int blocks>
__device__ __noinline__ void mend(Params const& p, int64_t n, int row0, int column0, int group0, int first,
                                  float const* bias) {
  __syncwarp();
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < groups * blocks * 64; i += 32) {
    int const pixel = i % 8, filter = i / (groups * 8);
    Outputs<float> const o(p, n, row0, column0, group0 + i / 8 % groups, first);
    if (pixel >= o.left || first + filter >= p.K) continue;
    float* const to = o.at + pixel * p.out_w + filter * p.out_c;
    if (!isfinite(*to)) *to = made_again(p, n, o.h, o.w + pixel, first + filter) + bias[filter];
  }
}

template <class T, bool nchw, int groups, int blocks>
__global__ void __launch_bounds__(kStemThreads, 2) gather(__grid_constant__ Params const p) {
  extern __shared__ __align__(16) char dynamic[];
  Shared<T, nchw, blocks> const s(p, dynamic);
  constexpr int per_word = 4 / int(sizeof(T));
  int const first = int(blockIdx.x) % p.slabs * (blocks * 8), pixel = threadIdx.x % 32 / 4;
  if constexpr (!is_split<T>) prefetch_filters<T>(p, first, blocks * 8);  // strict float32 has no registers left
  load_filters<T, nchw, blocks>(p, first, s);
  int const items = (p.rows * p.groups + groups - 1) / groups;
  for (int64_t tile = blockIdx.x / p.slabs; tile < p.tiles; tile += gridDim.x / p.slabs) {
    int64_t const n = tile / (p.tiles_h * p.tiles_w);
    int const of_image = int(tile - n * (p.tiles_h * p.tiles_w));
    int const row0 = of_image / p.tiles_w * p.rows, column0 = of_image % p.tiles_w * (p.groups * 8);
    if (is_split<T> || tile >= gridDim.x / p.slabs) __syncthreads();  // the tile before has been read
    copy_inputs<T>(p, n, row0 * p.stride_h - p.pad_h, column0 * p.stride_w - p.pad_w, p.pitch * per_word, s.inputs);
    __syncthreads();
    for (int item = threadIdx.x / 32; item < items; item += kWarps) {
      uint32_t from[groups];
#pragma unroll
      for (int i = 0; i < groups; ++i) {
        int const group = item * groups + i < p.rows * p.groups ? item * groups + i : 0;
        int const row = p.groups_of.quotient(group);
        int const element = ((group - row * p.groups) * 8 + pixel) * p.stride_w * p.C;
        int const word = (row * p.stride_h + (element % per_word != 0 ? p.in_rows : 0)) * p.pitch + element / per_word;
        from[i] = ptx::shared_address(s.inputs) + word * 4;
      }
      float acc[groups * blocks / 2][4] = {};
      multiply<T, nchw, groups, blocks>(acc, from, p.steps, s);
      bool wrong = false;
      if constexpr (is_split<T>) {
        float nothing[4] = {};  // NaN, if a sum is not finite
#pragma unroll
        for (int i = 0; i < groups * blocks * 2; ++i) nothing[i % 4] += acc[i / 4][i % 4] * 0.0f;
        wrong = __any_sync(0xffffffffu, (nothing[0] + nothing[1]) + (nothing[2] + nothing[3]) != 0.0f);
      }
      if constexpr (nchw)
        store_nchw<T, groups, blocks>(p, acc, n, row0, column0, item * groups, first, s.bias,
                                      s.staged + threadIdx.x / 32 * 8 * kStemStaged);
      else
        store_nhwc<T, groups, blocks>(p, acc, n, row0, column0, item * groups, first, s.bias,
                                      s.staged + threadIdx.x / 32 * blocks * 64);
      if constexpr (is_split<T>)
        if (wrong) mend<groups, blocks>(p, n, row0, column0, item * groups, first, s.bias);
    }
  }
}

// ---- host side

// What follows from the problem, for a kernel that reads or writes the result's tensor in vectors of `lanes`.
template <bool nchw, DType dtype>
Params view_params(Op op, Problem const& problem, int lanes) {
  StemView const v = stem_view(op, problem);
  Params p{};
  p.in_n = v.in.n, p.in_c = v.in.c, p.in_h = v.in.h, p.in_w = v.in.w;
  p.out_n = v.out.n, p.out_c = v.out.c, p.out_h = v.out.h, p.out_w = v.out.w;
  p.C = int(v.C), p.H = int(v.H), p.W = int(v.W), p.K = int(v.K), p.P = int(v.P), p.Q = int(v.Q);
  p.R = int(problem.R), p.S = int(problem.S), p.dilation_h = int(problem.dilation_h);
  p.stride_h = int(v.stride_h), p.stride_w = int(v.stride_w), p.pad_h = int(v.pad_h), p.pad_w = int(v.pad_w);
  p.w_in = int(v.w_in), p.w_out = int(v.w_out), p.w_r = int(problem.w.h), p.w_s = int(problem.w.w);
  p.mirrored = v.mirrored;
  p.runs = stem_has_runs(v);
  p.vectors = stem_has_vectors(!nchw, v, op == Op::dgrad ? problem.x_align : problem.y_align, lanes, size_of(dtype));
  return p;
}

// Blocks that go through `tiles` tiles of a slab of filters each; t: StemTile or its like.
template <class Params, class Tile>
cudaError_t launch_blocks(void (*kernel)(Params), Params const& p, int64_t tiles, Tile const& t, cudaStream_t stream) {
  int64_t const blocks = min64(tiles, max64(1, h200_sxm.sm_count * t.blocks_of_sm / t.slabs)) * t.slabs;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(blocks), kStemThreads, size_t(t.shared_bytes), stream>>>(p);
  return cudaGetLastError();
}

template <Op op, DType dtype, int tile_m, int tile_n, Variant variant>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool nchw = variant == Variant::nchw;
  StemTile const t = stem_tile(row_of(plan), op, problem, h200_sxm);
  Params p = view_params<nchw, dtype>(op, problem, dtype == DType::f32 ? 2 : 8);
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.out = args.out, p.bias_stride = args.bias_stride;
  p.rows = int(t.rows), p.groups = int(t.groups), p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w);
  p.slabs = int(t.slabs), p.run = int(t.run), p.steps = int(t.steps), p.in_rows = int(t.in_rows);
  p.in_columns = int(t.in_columns), p.pitch = int(t.pitch), p.copies = int(t.copies);
  p.tiles = problem.N * t.tiles_h * t.tiles_w;
  p.groups_of = Divisor(uint32_t(p.groups)), p.whole = t.whole;
  auto* kernel = gather<T, nchw, tile_m / 8, tile_n / 8>;
  constexpr int at_once = 4;  // runs for whose parts there are registers
  if constexpr (dtype == DType::f32)
    if (!problem.allow_tf32) kernel = gather<Split, nchw, at_once, tile_n / 8>;
  return launch_blocks(kernel, p, p.tiles, t, stream);
}

}  // namespace conv2d_ext::stem

#define CONV2D_EXT_STEM_INSTANCE(family, op, dtype, tm, tn, tk, variant)                        \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                     \
    return stem::launch<Op::op, DType::dtype, tm, tn, Variant::variant>(p, plan, args, stream); \
  }
