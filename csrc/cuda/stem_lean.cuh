// fprop of a few channels in channels_last, f16 and bf16, by short sums: a network's first 3x3. dgrad of stride one is
// the same with mirrored filters.
//   y[pixels, K] = windows of x[pixels, R x (S C)] * w[K, R x (S C)]
// A window is a pixel's inputs under a row of the filter: S x C neighbours in memory, so words of mma.sync's fragments
// are read from where they are, by way of L1, and nothing of x is copied to shared memory. (stem.cuh copies tiles; it
// takes longer sums, NCHW and float32.)
//
// A warp walks over tiles of 16 pixels of a row by all filters of its slab. It holds where a tile's words are, and the
// next tile's words while it multiplies and stores. Filters are shared out among a fragment's columns so that a lane's
// sums are neighbours, and stores are vectors.
#pragma once

#include <type_traits>

#include "../core/stem_lean.h"
#include "depthwise_tile.cuh"
#include "fragments.cuh"

namespace conv2d_ext::stem {

constexpr int kLeanThreads = kStemLeanWarps * 32;

struct LeanParams {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t bias_stride, in_n, in_h, out_n, out_h, out_w;
  int H, K, P, Q, R;
  int stride_h, pad_h, dilation_h;
  int step, first;    // elements from a pixel's window to the next; of the padding before the first, and its shift
  int shift, window;  // elements before a window, in its first word, and of it
  int row, run;       // elements of a row of the inputs; words of a window
  int w_in, w_out, w_r, w_s, C;
  int last_r, last_s;  // the last tap, of mirrored filters; else 0
  int tiles, tiles_w;
  depthwise::Divisor tiles_of, rows_of, words_of, channels_of;
};

// A word of the reduction, of which there may be a half or nothing.
struct LeanWord {
  int row, element;  // rows below the window's first; within the window's words
  uint32_t offset;   // in memory, bytes
  uint32_t mask;
  int weights[2];  // offsets of its halves' weights in a filter, or -1

  LeanWord() = default;
  __device__ LeanWord(LeanParams const& p, int index) {
    int const r = int(p.words_of.quotient(uint32_t(index))), at = (index - r * p.run) * 2;
    bool const exists = r < p.R;
    row = exists ? r * p.dilation_h : 0, element = exists ? at : 0;
    offset = uint32_t(row * int(p.in_h) + element) * 2, mask = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const i = at + half - p.shift, s = int(p.channels_of.quotient(uint32_t(max(i, 0))));
      bool const has = exists && i >= 0 && i < p.window;
      mask |= has ? 0xffffu << half * 16 : 0;
      weights[half] = has ? abs(r - p.last_r) * p.w_r + abs(s - p.last_s) * p.w_s + (i - s * p.C) * p.w_in : -1;
    }
  }
};

// A tile, as a lane sees it: its two pixels' windows and results.
template <class T>
struct LeanTile {
  T const* from;  // the windows' first row
  T* to;          // of this row of results
  int h, q, at;   // of the first window: row, pixel, element
  bool inside;    // all words of all windows are

  __device__ LeanTile(LeanParams const& p, int index) {
    int const row = int(p.tiles_of.quotient(uint32_t(index))), q0 = (index - row * p.tiles_w) * 16;
    int const n = int(p.rows_of.quotient(uint32_t(row))), of_image = row - n * p.P, at0 = q0 * p.step - p.first;
    q = q0 + int(threadIdx.x) % 32 / 4, h = of_image * p.stride_h - p.pad_h, at = q * p.step - p.first;
    from = static_cast<T const*>(p.in) + n * p.in_n + h * p.in_h;
    to = static_cast<T*>(p.out) + n * p.out_n + of_image * p.out_h;
    inside = h >= 0 && h + (p.R - 1) * p.dilation_h < p.H && at0 >= 0 && at0 + 15 * p.step + 2 * p.run <= p.row;
  }
};

// Words of both pixels of a lane as they were loaded: halves, if they do not lie in a word of memory.
template <int steps, bool pairs>
struct LeanWords {
  uint32_t v[steps * 2][2][pairs ? 1 : 2];

  template <class T>
  __device__ void load(LeanParams const& p, LeanTile<T> const& tile, LeanWord const (&words)[steps * 2]) {
    if (tile.inside)
      load_from<true>(p, tile, words);
    else
      load_from<false>(p, tile, words);
  }
  template <bool inside, class T>
  __device__ void load_from(LeanParams const& p, LeanTile<T> const& tile, LeanWord const (&words)[steps * 2]) {
    using Piece = std::conditional_t<pairs, uint32_t, uint16_t>;
#pragma unroll
    for (int pixel = 0; pixel < 2; ++pixel) {
      int const at = tile.at + pixel * 8 * p.step;
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
    return (pairs ? v[i][pixel][0] : __byte_perm(v[i][pixel][0], v[i][pixel][pairs ? 0 : 1], 0x5410)) & mask;
  }
};

// Of fragments of `blocks` by 8 filters: four of them, at the end perhaps two, share out their filters so that a lane's
// columns are neighbours.
template <int blocks>
struct LeanFilters {
  static constexpr int fours = blocks / 4 * 4;
  static constexpr int together(int block) { return block < fours ? 4 : 2; }
  static constexpr int of_column(int block, int column) {
    int const near = together(block), from = block < fours ? block / 4 * 4 : fours;
    return from * 8 + column / 2 * (2 * near) + (block - from) * 2 + column % 2;
  }
};

// The filters' words as Shared::weights of stem.cuh, and the bias.
template <class T, int blocks, int steps>
__device__ inline void load_lean_filters(LeanParams const& p, LeanWord const (&words)[steps * 2], int first,
                                         uint4* weights, float* bias) {
  int const lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int k = 0; k < (blocks + kStemLeanWarps - 1) / kStemLeanWarps; ++k) {
    int const block = k * kStemLeanWarps + int(threadIdx.x) / 32;
    int const filter = first + LeanFilters<blocks>::of_column(block, lane / 4);
    T const* const w = static_cast<T const*>(p.w) + int64_t(filter) * p.w_out;
    if (block >= blocks) continue;
#pragma unroll
    for (int i = 0; i < steps * 2; ++i) {
      Vector<T, 2> v;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        v.v[half] = words[i].weights[half] >= 0 && filter < p.K ? w[words[i].weights[half]] : narrow<T>(0.f);
      reinterpret_cast<uint32_t*>(weights + (i / 2 * (blocks / 2) + block / 2) * 32 + lane)[block % 2 * 2 + i % 2] =
          *reinterpret_cast<uint32_t const*>(&v);
    }
  }
  for (int i = int(threadIdx.x); i < blocks * 8; i += kLeanThreads)
    bias[i] =
        p.bias != nullptr && first + i < p.K ? widen(static_cast<T const*>(p.bias)[(first + i) * p.bias_stride]) : 0.f;
}

// Sums of `near` blocks of filters at a time, from block `begin` on.
template <class T, int blocks, int begin, int near>
__device__ inline void store_lean(LeanParams const& p, LeanTile<T> const& tile, int first,
                                  float const (&acc)[blocks][4]) {
#pragma unroll
  for (int pixel = 0; pixel < 2; ++pixel)
#pragma unroll
    for (int j = begin; j + near <= blocks; j += near) {
      int const q = tile.q + pixel * 8;
      int const filter = first + LeanFilters<blocks>::of_column(j, int(threadIdx.x) % 4 * 2);
      if (q >= p.Q || filter >= p.K) continue;
      Vector<uint32_t, near> v;
#pragma unroll
      for (int i = 0; i < near; ++i) v.v[i] = pack<T>(acc[j + i][pixel * 2], acc[j + i][pixel * 2 + 1]);
      *reinterpret_cast<Vector<uint32_t, near>*>(tile.to + q * p.out_w + filter) = v;
    }
}

template <class T, int blocks, int steps, bool pairs>
__global__ void __launch_bounds__(kLeanThreads, stem_lean_blocks(blocks, steps, pairs))
    windows(__grid_constant__ LeanParams const p) {
  using Filters = LeanFilters<blocks>;
  __shared__ uint4 weights[steps * blocks / 2 * 32];
  __shared__ alignas(16) float bias[blocks * 8];
  int const lane = int(threadIdx.x) % 32, first = int(blockIdx.y) * blocks * 8;
  int const warp = int(blockIdx.x * kStemLeanWarps + threadIdx.x / 32), warps = int(gridDim.x) * kStemLeanWarps;
  LeanWord words[steps * 2];
#pragma unroll
  for (int i = 0; i < steps * 2; ++i) words[i] = LeanWord(p, i * 4 + lane % 4);
  LeanTile<T> after(p, min(warp, p.tiles - 1));
  LeanWords<steps, pairs> next;
  next.load(p, after, words);  // on their way while the filters are
  load_lean_filters<T, blocks, steps>(p, words, first, weights, bias);
  __syncthreads();
  for (int index = warp; index < p.tiles; index += warps) {
    LeanTile<T> const tile = after;
    uint32_t x[steps][4];
#pragma unroll
    for (int i = 0; i < steps * 4; ++i) x[i / 4][i % 4] = next.word(i / 2, i % 2, words[i / 2].mask);
    if (index + warps < p.tiles) {
      after = LeanTile<T>(p, index + warps);
      next.load(p, after, words);
    }
    float acc[blocks][4];
#pragma unroll
    for (int j = 0; j < blocks; j += 2) {
      float4 const b = *reinterpret_cast<float4 const*>(bias + Filters::of_column(j, lane % 4 * 2));
      acc[j][0] = acc[j][2] = b.x, acc[j][1] = acc[j][3] = b.y;
      acc[j + 1][0] = acc[j + 1][2] = b.z, acc[j + 1][1] = acc[j + 1][3] = b.w;
    }
#pragma unroll
    for (int step = 0; step < steps; ++step)
#pragma unroll
      for (int j = 0; j < blocks; j += 2) {
        uint4 const w = weights[(step * blocks / 2 + j / 2) * 32 + lane];
        ptx::mma_m16n8k16<T>(acc[j], x[step][0], x[step][1], x[step][2], x[step][3], w.x, w.y);
        ptx::mma_m16n8k16<T>(acc[j + 1], x[step][0], x[step][1], x[step][2], x[step][3], w.z, w.w);
      }
    store_lean<T, blocks, 0, 4>(p, tile, first, acc);
    if constexpr (blocks % 4 != 0) store_lean<T, blocks, Filters::fours, 2>(p, tile, first, acc);
  }
}

template <class T, int blocks, bool pairs>
auto windows_kernel(int64_t steps) {
  static_assert(kStemLeanSteps == 3);
  return steps == 1   ? windows<T, blocks, 1, pairs>
         : steps == 2 ? windows<T, blocks, 2, pairs>
                      : windows<T, blocks, 3, pairs>;
}

template <DType dtype>
cudaError_t launch_lean(Op op, Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  StemLean const t = stem_lean(op, problem);
  StemView const v = stem_view(op, problem);
  LeanParams p{};
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.out = args.out, p.bias_stride = args.bias_stride;
  p.in_n = v.in.n, p.in_h = v.in.h, p.out_n = v.out.n, p.out_h = v.out.h, p.out_w = v.out.w;
  p.H = int(v.H), p.K = int(v.K), p.P = int(v.P), p.Q = int(v.Q), p.R = int(problem.R), p.C = int(v.C);
  p.stride_h = int(v.stride_h), p.pad_h = int(v.pad_h), p.dilation_h = int(problem.dilation_h);
  p.shift = int(t.shift), p.window = int(problem.S * v.C), p.run = int(t.run);
  p.step = int(v.stride_w * v.C), p.first = int(v.pad_w * v.C + t.shift), p.row = int(v.W * v.C);
  p.w_in = int(v.w_in), p.w_out = int(v.w_out), p.w_r = int(problem.w.h), p.w_s = int(problem.w.w);
  if (v.mirrored) p.last_r = int(problem.R - 1), p.last_s = int(problem.S - 1);
  p.tiles = int(t.tiles), p.tiles_w = int(t.tiles_w);
  p.tiles_of = depthwise::Divisor(uint32_t(t.tiles_w)), p.rows_of = depthwise::Divisor(uint32_t(v.P));
  p.words_of = depthwise::Divisor(uint32_t(p.run)), p.channels_of = depthwise::Divisor(uint32_t(p.C));
  // As many rounds of tiles for all warps.
  int64_t const blocks = h200_sxm.sm_count * stem_lean_blocks(t.blocks, t.steps, t.pairs),
                most = max64(blocks / t.slabs, 1) * kStemLeanWarps, warps = ceil_div(t.tiles, ceil_div(t.tiles, most));
  auto const of = [&](auto count) {
    return t.pairs ? windows_kernel<T, count, true>(t.steps) : windows_kernel<T, count, false>(t.steps);
  };
  auto* const kernel = t.blocks == 2   ? of(std::integral_constant<int, 2>{})
                       : t.blocks == 4 ? of(std::integral_constant<int, 4>{})
                       : t.blocks == 6 ? of(std::integral_constant<int, 6>{})
                                       : of(std::integral_constant<int, 8>{});
  kernel<<<dim3(unsigned(ceil_div(warps, kStemLeanWarps)), unsigned(t.slabs)), kLeanThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::stem

#define CONV2D_EXT_STEM_LEAN_INSTANCE(family, op, dtype, tm, tn, tk, variant)                                         \
  namespace conv2d_ext {                                                                                              \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const&, Arguments const& args, \
                                                                cudaStream_t stream) {                                \
    return stem::launch_lean<DType::dtype>(Op::op, p, args, stream);                                                  \
  }                                                                                                                   \
  }
