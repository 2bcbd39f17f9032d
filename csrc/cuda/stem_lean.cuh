// fprop of a few channels in channels_last, f16 and bf16, by short sums: a network's first 3x3.
//   y[pixels, K] = windows of x[pixels, R x (S C)] * w[K, R x (S C)]
// A window is a pixel's inputs under a row of the filter: S x C neighbours in memory, so words of mma.sync's fragments
// are read from where they are, by way of L1, and nothing of x is copied to shared memory. (stem.cuh copies tiles; it
// takes longer sums, NCHW and float32.)
//
// A warp walks over tiles of 16 pixels of a row by all filters of its slab. It holds the filters' fragments, and a
// tile's words while it multiplies and stores the tile before. Filters are shared out among a fragment's columns so
// that a lane's sums are neighbours, and stores are vectors.
#pragma once

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
  int shift, window;  // elements of a window, and before it in its first word
  int row, run;       // elements of a row of x; words of a window
  int w_in, w_out, w_r, w_s, C, R_last, S_last;  // R_last, S_last: of mirrored filters the last tap, else 0
  int tiles, tiles_w, steps;
  depthwise::Divisor tiles_of, rows_of;
};

// A word of the reduction: the row of taps, the element within the window's words, and which halves there are.
struct alignas(16) LeanWord {
  int row, element;
  uint32_t mask;

  LeanWord() = default;
  __device__ LeanWord(LeanParams const& p, int index) {
    int const r = index / p.run;
    row = r * p.dilation_h, element = (index - r * p.run) * 2;
    int const at = element - p.shift;
    mask = r >= p.R ? 0 : (at >= 0 ? 0xffffu : 0) | (at + 1 < p.window ? 0xffff0000u : 0);
  }
};

// A tile: where its first tap's row is, and for each of a lane's two pixels the first element of its window there.
template <class T>
struct LeanTile {
  T const* from;
  int h, q, at[2];
  int64_t n;
  int p;

  __device__ LeanTile(LeanParams const& params, int index) {
    int const row = int(params.tiles_of.quotient(uint32_t(index)));
    q = (index - row * params.tiles_w) * 16 + int(threadIdx.x) % 32 / 4;
    n = params.rows_of.quotient(uint32_t(row)), p = row - int(n) * params.P;
    h = p * params.stride_h - params.pad_h;
    from = static_cast<T const*>(params.in) + n * params.in_n + h * params.in_h;
#pragma unroll
    for (int i = 0; i < 2; ++i) at[i] = (q + i * 8) * params.step - params.first;
  }
};

// A word of both of a lane's pixels.
template <class T, bool pairs>
__device__ inline void load_word(LeanParams const& p, LeanTile<T> const& tile, LeanWord const& word, uint32_t* x) {
  T const* const row = tile.from + int(word.row * int(p.in_h));
  bool const exists = word.mask != 0 && unsigned(tile.h + word.row) < unsigned(p.H);
#pragma unroll
  for (int pixel = 0; pixel < 2; ++pixel) {
    int const at = tile.at[pixel] + word.element;
    if constexpr (pairs) {  // both halves of a word are within the row, or none
      x[pixel] =
          exists && unsigned(at) < unsigned(p.row) ? *reinterpret_cast<uint32_t const*>(row + at) & word.mask : 0;
    } else {
      uint16_t const* const halves = reinterpret_cast<uint16_t const*>(row) + at;
      uint32_t const low = exists && unsigned(at) < unsigned(p.row) ? halves[0] : 0;
      uint32_t const high = exists && word.mask >> 16 != 0 && unsigned(at + 1) < unsigned(p.row) ? halves[1] : 0;
      x[pixel] = low | high << 16;
    }
  }
}

// Of fragments of `blocks` by 8 filters: a lane's columns of `near` of them are 2 * near neighbouring filters.
template <int blocks>
struct LeanFilters {
  static constexpr int near = blocks < 4 ? blocks : 4;
  static constexpr int of_column(int block, int column) {
    return block / near * (8 * near) + column / 2 * (2 * near) + block % near * 2 + column % 2;
  }
};

template <class T, int blocks>
__device__ inline void load_lean_filters(LeanParams const& p, int steps, int first, uint32_t* weights, float* bias) {
  T const* const w = static_cast<T const*>(p.w);
#pragma unroll 4
  for (int i = int(threadIdx.x); i < steps * blocks * 64; i += kLeanThreads) {
    int const half = i % 2, block = i / 2 % 2 + i / 128 % (blocks / 2) * 2, lane = i / 4 % 32, step = i / (64 * blocks);
    int const filter = first + LeanFilters<blocks>::of_column(block, lane / 4);
    int const word = step * 8 + half * 4 + lane % 4, r = word / p.run;
    Vector<T, 2> v;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      int const at = (word - r * p.run) * 2 + e - p.shift, s = at / p.C;
      bool const exists = r < p.R && at >= 0 && at < p.window && filter < p.K;
      int const tap = abs(r - p.R_last) * p.w_r + abs(s - p.S_last) * p.w_s;
      v.v[e] = exists ? w[filter * p.w_out + tap + (at - s * p.C) * p.w_in] : narrow<T>(0.f);
    }
    weights[i] = *reinterpret_cast<uint32_t const*>(&v);
  }
  for (int i = int(threadIdx.x); i < blocks * 8; i += kLeanThreads)
    bias[i] =
        p.bias != nullptr && first + i < p.K ? widen(static_cast<T const*>(p.bias)[(first + i) * p.bias_stride]) : 0.f;
}

template <class T, int blocks>
__device__ inline void begin_sums(float (&acc)[blocks][4], float const* bias) {
#pragma unroll
  for (int j = 0; j < blocks; j += 2) {
    float4 const b =
        *reinterpret_cast<float4 const*>(bias + LeanFilters<blocks>::of_column(j, int(threadIdx.x) % 4 * 2));
    acc[j][0] = acc[j][2] = b.x, acc[j][1] = acc[j][3] = b.y;
    acc[j + 1][0] = acc[j + 1][2] = b.z, acc[j + 1][1] = acc[j + 1][3] = b.w;
  }
}

// `at_once` tiles by the filters of a step, which are as Shared::weights of stem.cuh.
template <class T, int blocks, int at_once>
__device__ inline void multiply_step(float (&acc)[at_once][blocks][4], uint32_t const (&x)[at_once][4],
                                     uint4 const* weights) {
#pragma unroll
  for (int j = 0; j < blocks; j += 2) {
    uint4 const w = weights[j * 16 + int(threadIdx.x) % 32];
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      ptx::mma_m16n8k16<T>(acc[i][j], x[i][0], x[i][1], x[i][2], x[i][3], w.x, w.y);
      ptx::mma_m16n8k16<T>(acc[i][j + 1], x[i][0], x[i][1], x[i][2], x[i][3], w.z, w.w);
    }
  }
}

template <class T, int blocks>
__device__ inline void store_lean(LeanParams const& p, LeanTile<T> const& tile, int first,
                                  float const (&acc)[blocks][4]) {
  constexpr int near = LeanFilters<blocks>::near;
  T* const out = static_cast<T*>(p.out) + tile.n * p.out_n + tile.p * p.out_h + first;
#pragma unroll
  for (int pixel = 0; pixel < 2; ++pixel) {
    int const q = tile.q + pixel * 8;
#pragma unroll
    for (int j = 0; j < blocks; j += near) {
      int const filter = LeanFilters<blocks>::of_column(j, int(threadIdx.x) % 4 * 2);
      if (q >= p.Q || first + filter >= p.K) continue;
      Vector<uint32_t, near> v;
#pragma unroll
      for (int i = 0; i < near; ++i) v.v[i] = pack<T>(acc[j + i][pixel * 2], acc[j + i][pixel * 2 + 1]);
      *reinterpret_cast<Vector<uint32_t, near>*>(out + q * p.out_w + filter) = v;
    }
  }
}

template <class T, int blocks, int steps, bool pairs>
__global__ void __launch_bounds__(kLeanThreads, blocks < 8 && steps < 3 && pairs ? 8 : 4)
    windows(__grid_constant__ LeanParams const p) {
  __shared__ uint4 weights[steps * blocks / 2 * 32];
  __shared__ alignas(16) float bias[blocks * 8];
  int const first = int(blockIdx.y) * blocks * 8;
  int const warp = int(blockIdx.x * kStemLeanWarps + threadIdx.x / 32), warps = int(gridDim.x) * kStemLeanWarps;
  LeanWord words[steps * 2];
#pragma unroll
  for (int i = 0; i < steps * 2; ++i) words[i] = LeanWord(p, i * 4 + int(threadIdx.x) % 4);
  uint32_t next[steps][1][4];
  LeanTile<T> after(p, min(warp, p.tiles - 1));
  auto const load = [&] {
#pragma unroll
    for (int i = 0; i < steps * 2; ++i) load_word<T, pairs>(p, after, words[i], next[i / 2][0] + i % 2 * 2);
  };
  load();  // on their way while the filters are
  load_lean_filters<T, blocks>(p, steps, first, reinterpret_cast<uint32_t*>(weights), bias);
  __syncthreads();
  for (int index = warp; index < p.tiles; index += warps) {
    LeanTile<T> const tile = after;
    uint32_t x[steps][1][4];
#pragma unroll
    for (int i = 0; i < steps * 4; ++i) x[i / 4][0][i % 4] = next[i / 4][0][i % 4];
    if (index + warps < p.tiles) after = LeanTile<T>(p, index + warps), load();
    float acc[1][blocks][4];
    begin_sums<T, blocks>(acc[0], bias);
#pragma unroll
    for (int step = 0; step < steps; ++step) multiply_step<T, blocks, 1>(acc, x[step], weights + step * (blocks * 16));
    store_lean<T, blocks>(p, tile, first, acc[0]);
  }
}

// Longer sums: the words' places are in shared memory. Words of some steps are on their way while those before are
// multiplied.
template <class T, int blocks, bool pairs>
__global__ void __launch_bounds__(kLeanThreads, 3) long_windows(__grid_constant__ LeanParams const p) {
  constexpr int ahead = 2, at_once = 2;
  extern __shared__ __align__(16) char dynamic[];
  LeanWord* const words = reinterpret_cast<LeanWord*>(dynamic);
  uint4* const weights = reinterpret_cast<uint4*>(words + p.steps * 8);
  float* const bias = reinterpret_cast<float*>(weights + p.steps * blocks * 16);
  int const first = int(blockIdx.y) * blocks * 8, t = int(threadIdx.x) % 4;
  int const warp = int(blockIdx.x * kStemLeanWarps + threadIdx.x / 32), warps = int(gridDim.x) * kStemLeanWarps;
  for (int i = int(threadIdx.x); i < p.steps * 8; i += kLeanThreads) words[i] = LeanWord(p, i);
  load_lean_filters<T, blocks>(p, p.steps, first, reinterpret_cast<uint32_t*>(weights), bias);
  __syncthreads();
  for (int index = warp * at_once; index < p.tiles; index += warps * at_once) {
    LeanTile<T> const tiles[at_once] = {LeanTile<T>(p, index), LeanTile<T>(p, min(index + 1, p.tiles - 1))};
    float acc[at_once][blocks][4];
#pragma unroll
    for (int i = 0; i < at_once; ++i) begin_sums<T, blocks>(acc[i], bias);
    uint32_t next[ahead][at_once][4];
    auto const load = [&](int from) {
#pragma unroll
      for (int k = 0; k < ahead * 2; ++k) {
        LeanWord word = words[min(from * 8 + k * 4, p.steps * 8 - 4) + t];
        if (from + k / 2 >= p.steps) word.mask = 0;
#pragma unroll
        for (int i = 0; i < at_once; ++i) load_word<T, pairs>(p, tiles[i], word, next[k / 2][i] + k % 2 * 2);
      }
    };
    load(0);
#pragma unroll 1
    for (int from = 0; from < p.steps; from += ahead) {
      uint32_t x[ahead][at_once][4];
#pragma unroll
      for (int k = 0; k < ahead * at_once * 4; ++k) x[k / 8][k / 4 % 2][k % 4] = next[k / 8][k / 4 % 2][k % 4];
      if (from + ahead < p.steps) load(from + ahead);
#pragma unroll
      for (int k = 0; k < ahead; ++k)
        if (from + k < p.steps) multiply_step<T, blocks, at_once>(acc, x[k], weights + (from + k) * (blocks * 16));
    }
#pragma unroll
    for (int i = 0; i < at_once; ++i)
      if (index + i < p.tiles) store_lean<T, blocks>(p, tiles[i], first, acc[i]);
  }
}

template <class T, int blocks, bool pairs>
auto windows_kernel(int steps) {
  static_assert(kStemLeanSteps == 3);
  return steps == 1   ? windows<T, blocks, 1, pairs>
         : steps == 2 ? windows<T, blocks, 2, pairs>
         : steps == 3 ? windows<T, blocks, 3, pairs>
                      : long_windows<T, blocks, pairs>;
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
  if (v.mirrored) p.R_last = int(problem.R - 1), p.S_last = int(problem.S - 1);
  p.tiles = int(t.tiles), p.tiles_w = int(t.tiles_w), p.steps = int(t.steps);
  p.tiles_of = depthwise::Divisor(uint32_t(t.tiles_w)), p.rows_of = depthwise::Divisor(uint32_t(v.P));
  // As many rounds of tiles for all warps.
  int64_t const turns = ceil_div(t.tiles, t.at_once),
                most = max64(h200_sxm.sm_count * t.blocks_of_sm / t.slabs, 1) * kStemLeanWarps,
                warps = ceil_div(turns, ceil_div(turns, most));
  auto const of = [&](auto blocks) {
    constexpr int count = decltype(blocks)::value;
    return t.pairs ? windows_kernel<T, count, true>(int(t.steps)) : windows_kernel<T, count, false>(int(t.steps));
  };
  auto* const kernel = t.blocks == 2   ? of(std::integral_constant<int, 2>{})
                       : t.blocks == 4 ? of(std::integral_constant<int, 4>{})
                                       : of(std::integral_constant<int, 8>{});
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  dim3 const grid{unsigned(ceil_div(warps, kStemLeanWarps)), unsigned(t.slabs)};
  kernel<<<grid, kLeanThreads, size_t(t.shared_bytes), stream>>>(p);
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
