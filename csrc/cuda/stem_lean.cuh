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
  int C, H, K, P, Q, R;
  int stride_h, pad_h, dilation_h;
  int step, first;    // elements from a pixel's window to the next; of the padding before the first, and its shift
  int shift, window;  // elements of a window, and before it in its first word
  int row, run;       // elements of a row of x; words of a window
  int w_in, w_out, w_r, w_s, w_C;
  int tiles, tiles_w;
  depthwise::Divisor tiles_of, rows_of;
};

// A word of the reduction: the row of taps, the element within the window's words, and which halves there are.
struct LeanWord {
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

template <class T, int steps, bool pairs>
__device__ inline void load_words(LeanParams const& p, LeanTile<T> const& tile, LeanWord const (&words)[steps * 2],
                                  uint32_t (&x)[steps][4]) {
#pragma unroll
  for (int i = 0; i < steps * 2; ++i) {
    LeanWord const& word = words[i];
    T const* const row = tile.from + word.row * p.in_h;
    bool const exists = word.mask != 0 && unsigned(tile.h + word.row) < unsigned(p.H);
#pragma unroll
    for (int pixel = 0; pixel < 2; ++pixel) {
      int const at = tile.at[pixel] + word.element;
      uint32_t& v = x[i / 2][i % 2 * 2 + pixel];
      if constexpr (pairs) {  // both halves of a word are within the row, or none
        v = exists && unsigned(at) < unsigned(p.row) ? *reinterpret_cast<uint32_t const*>(row + at) & word.mask : 0;
      } else {
        uint16_t const* const halves = reinterpret_cast<uint16_t const*>(row) + at;
        uint32_t const low = exists && unsigned(at) < unsigned(p.row) ? halves[0] : 0;
        uint32_t const high = exists && word.mask >> 16 != 0 && unsigned(at + 1) < unsigned(p.row) ? halves[1] : 0;
        v = low | high << 16;
      }
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

template <class T, int blocks, int steps>
__device__ inline void load_lean_filters(LeanParams const& p, int first, uint32_t* weights, float* bias) {
  T const* const w = static_cast<T const*>(p.w);
#pragma unroll
  for (int i = int(threadIdx.x); i < steps * blocks * 64; i += kLeanThreads) {
    int const half = i % 2, block = i / 2 % 2 + i / 128 % (blocks / 2) * 2, lane = i / 4 % 32, step = i / (64 * blocks);
    int const filter = first + LeanFilters<blocks>::of_column(block, lane / 4);
    int const word = step * 8 + half * 4 + lane % 4, r = word / p.run;
    Vector<T, 2> v;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      int const at = (word - r * p.run) * 2 + e - p.shift, s = at / p.w_C;
      bool const exists = r < p.R && at >= 0 && at < p.window && filter < p.K;
      v.v[e] = exists ? w[filter * p.w_out + r * p.w_r + s * p.w_s + (at - s * p.w_C) * p.w_in] : narrow<T>(0.f);
    }
    weights[i] = *reinterpret_cast<uint32_t const*>(&v);
  }
  for (int i = int(threadIdx.x); i < blocks * 8; i += kLeanThreads)
    bias[i] =
        p.bias != nullptr && first + i < p.K ? widen(static_cast<T const*>(p.bias)[(first + i) * p.bias_stride]) : 0.f;
}

template <class T, int blocks, int steps, bool pairs>
__global__ void __launch_bounds__(kLeanThreads, blocks < 8 && steps < 3 && pairs ? 8 : 4)
    windows(__grid_constant__ LeanParams const p) {
  using Filters = LeanFilters<blocks>;
  constexpr int near = Filters::near;
  __shared__ uint4 weights[steps * blocks / 2 * 32];  // as Shared::weights of stem.cuh
  __shared__ alignas(16) float bias[blocks * 8];
  int const lane = int(threadIdx.x) % 32, first = int(blockIdx.y) * blocks * 8;
  int const warp = int(blockIdx.x * kStemLeanWarps + threadIdx.x / 32), warps = int(gridDim.x) * kStemLeanWarps;
  LeanWord words[steps * 2];
#pragma unroll
  for (int i = 0; i < steps * 2; ++i) words[i] = LeanWord(p, i * 4 + lane % 4);
  uint32_t next[steps][4];
  LeanTile<T> after(p, min(warp, p.tiles - 1));
  load_words<T, steps, pairs>(p, after, words, next);  // on their way while the filters are
  load_lean_filters<T, blocks, steps>(p, first, reinterpret_cast<uint32_t*>(weights), bias);
  __syncthreads();
  for (int index = warp; index < p.tiles; index += warps) {
    LeanTile<T> const tile = after;
    uint32_t x[steps][4];
#pragma unroll
    for (int i = 0; i < steps * 4; ++i) x[i / 4][i % 4] = next[i / 4][i % 4];
    if (index + warps < p.tiles) {
      after = LeanTile<T>(p, index + warps);
      load_words<T, steps, pairs>(p, after, words, next);
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
    T* const out = static_cast<T*>(p.out) + tile.n * p.out_n + tile.p * p.out_h + first;
#pragma unroll
    for (int pixel = 0; pixel < 2; ++pixel) {
      int const q = tile.q + pixel * 8;
#pragma unroll
      for (int j = 0; j < blocks; j += near) {
        int const filter = Filters::of_column(j, lane % 4 * 2);
        if (q >= p.Q || first + filter >= p.K) continue;
        Vector<uint32_t, near> v;
#pragma unroll
        for (int i = 0; i < near; ++i) v.v[i] = pack<T>(acc[j + i][pixel * 2], acc[j + i][pixel * 2 + 1]);
        *reinterpret_cast<Vector<uint32_t, near>*>(out + q * p.out_w + filter) = v;
      }
    }
  }
}

template <DType dtype, int blocks, int steps>
auto windows_kernel(bool pairs) {
  using T = typename TypeOf<dtype>::type;
  return pairs ? windows<T, blocks, steps, true> : windows<T, blocks, steps, false>;
}

template <DType dtype>
cudaError_t launch_lean(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  StemLean const t = stem_lean(problem);
  LeanParams p{};
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.out = args.out, p.bias_stride = args.bias_stride;
  p.in_n = problem.x.n, p.in_h = problem.x.h;
  p.out_n = problem.y.n, p.out_h = problem.y.h, p.out_w = problem.y.w;
  p.H = int(problem.H), p.K = int(problem.K), p.P = int(problem.P()), p.Q = int(problem.Q()), p.R = int(problem.R);
  p.stride_h = int(problem.stride_h), p.pad_h = int(problem.pad_top), p.dilation_h = int(problem.dilation_h);
  p.shift = int(t.shift), p.window = int(problem.S * problem.C), p.run = int(t.run);
  p.step = int(problem.stride_w * problem.C), p.first = int(problem.pad_left * problem.C + t.shift);
  p.row = int(problem.W * problem.C);
  p.w_in = int(problem.w.c), p.w_out = int(problem.w.n), p.w_r = int(problem.w.h), p.w_s = int(problem.w.w);
  p.w_C = int(problem.C), p.tiles = int(t.tiles), p.tiles_w = int(t.tiles_w);
  p.tiles_of = depthwise::Divisor(uint32_t(t.tiles_w)), p.rows_of = depthwise::Divisor(uint32_t(p.P));
  // As many rounds of tiles for all warps.
  int64_t const most = h200_sxm.sm_count * t.blocks_of_sm / min64(t.slabs, t.blocks_of_sm) * kStemLeanWarps;
  int64_t const warps = ceil_div(t.tiles, ceil_div(t.tiles, most));
  auto const by_steps = [&](auto blocks) {
    constexpr int of = decltype(blocks)::value;
    return t.steps == 1   ? windows_kernel<dtype, of, 1>(t.pairs)
           : t.steps == 2 ? windows_kernel<dtype, of, 2>(t.pairs)
                          : windows_kernel<dtype, of, 3>(t.pairs);
  };
  static_assert(kStemLeanSteps == 3);
  auto* const kernel = t.blocks == 2   ? by_steps(std::integral_constant<int, 2>{})
                       : t.blocks == 4 ? by_steps(std::integral_constant<int, 4>{})
                                       : by_steps(std::integral_constant<int, 8>{});
  dim3 const grid{unsigned(ceil_div(warps, kStemLeanWarps)), unsigned(t.slabs)};
  kernel<<<grid, kLeanThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::stem

#define CONV2D_EXT_STEM_LEAN_INSTANCE(family, op, dtype, tm, tn, tk, variant)                                         \
  namespace conv2d_ext {                                                                                              \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const&, Arguments const& args, \
                                                                cudaStream_t stream) {                                \
    return stem::launch_lean<DType::dtype>(p, args, stream);                                                          \
  }                                                                                                                   \
  }
