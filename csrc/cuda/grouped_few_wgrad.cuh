// wgrad of groups over few pixels in channels_last, on mma.sync, in one launch: pixels come from memory to registers.
//
// A block has 16 filters by 16 or 32 channels by a row of three taps. A warp has every so many steps: a step is two
// runs of 8 neighbouring results. A lane loads two filters and two or four channels of four pixels, and pairs of pixels
// become fragments by permutations. In the end the warps' sums are added in order.
//
// Pixels that do not exist are zeros; infinite y meets those of x, so sums that are NaN are made once more.
#pragma once

#include "../core/grouped_few.h"
#include "bring.cuh"
#include "fragments.cuh"
#include "grouped_tile.cuh"
#include "launch.h"
#include "ptx.cuh"
#include "types.cuh"

namespace conv2d_ext::few_groups_wgrad {

constexpr int kThreads = 32 * kFewGroupSumWarps, kTaps = kFewGroupTaps;
using grouped::Divisor;

struct Params {
  void const *x, *y;
  void* w;
  Strides x_strides, y_strides, w_strides;
  int x_n, x_h, x_w, y_n, y_h, y_w;
  int N, H, W, P, Q, R, S, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w;
  int C, K, all_C, all_K;  // of a group; of all
  int together, tiles_k, tiles_c, columns, runs, steps;
  Divisor by_in_row, by_P;
  Share share_x, share_y;
};

// What a lane loads of a step: pixels 0 and 1 of the first run, then of the second.
template <class T, int channels>
struct Loaded {
  static constexpr int words = channels / 8 * int(sizeof(T)) / 4, y_words = int(sizeof(T)) / 2;
  uint32_t y[4][y_words], x[kTaps][4][words];
};

template <int words>
__device__ inline void load(uint32_t (&to)[words], void const* from, bool exists) {
#pragma unroll
  for (int i = 0; i < words; ++i) to[i] = 0;
  if (!exists) return;
  if constexpr (words == 1) {
    to[0] = __ldg(static_cast<uint32_t const*>(from));
  } else if constexpr (words == 2) {
    uint2 const v = __ldg(static_cast<uint2 const*>(from));
    to[0] = v.x, to[1] = v.y;
  } else {
    uint4 const v = __ldg(static_cast<uint4 const*>(from));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
}

// A weight's sum once more.
template <class T>
__device__ __noinline__ float exact_sum(Params const& p, int k, int c, int r, int s) {
  float sum = 0;
  for (int64_t n = 0; n < p.N; ++n)
    for (int i = 0; i < p.P; ++i)
      for (int j = 0; j < p.Q; ++j) {
        int const h = i * p.stride_h + r * p.dilation_h - p.pad_h, w = j * p.stride_w + s * p.dilation_w - p.pad_w;
        if (unsigned(h) >= unsigned(p.H) || unsigned(w) >= unsigned(p.W)) continue;
        Strides const &x = p.x_strides, &y = p.y_strides;
        sum += widen(static_cast<T const*>(p.x)[n * x.n + h * x.h + w * x.w + c]) *
               widen(static_cast<T const*>(p.y)[n * y.n + i * y.h + j * y.w + k]);
        if (!(sum == sum)) return sum;
      }
  return sum;
}

template <class T, int channels>
__global__ void __launch_bounds__(kThreads, (sizeof(T) == 4 ? 1 : 2) + (channels == 16 ? 1 : 0))
    sums_kernel(__grid_constant__ Params const p) {
  constexpr int v = channels / 8, sums_of_lane = kTaps * v * 4;
  constexpr bool half = sizeof(T) == 2;
  __shared__ float sums[kFewGroupSumWarps][sums_of_lane][32];
  int const lane = threadIdx.x % 32, warp = warp_uniform(int(threadIdx.x) / 32), i = lane / 4, j = lane % 4;
  int block = blockIdx.x;
  auto take = [&](int count) {
    int const whole = block / count, rest = block - whole * count;
    block = whole;
    return rest;
  };
  p.share_x.bring(blockIdx.x), p.share_y.bring(blockIdx.x);
  int const s0 = take(p.columns) * kTaps, r = take(p.R);
  int const tile_c = take(p.tiles_c), tile_k = take(p.tiles_k), group = block * p.together;
  int const k0 = tile_k * kFewGroupFilters, c0 = tile_c * channels;  // from the first group's first
  int const k = group * p.K + k0 + 2 * i, c = group * p.C + c0 + v * i;
  bool const has_k = k < p.all_K, has_c = c < p.all_C;
  T const *const y = static_cast<T const*>(p.y) + k, *const x = static_cast<T const*>(p.x) + c;
  int const before = half ? 2 * j : j, next = half ? 1 : 4;  // of a run: the lane's first pixel, from it to the second

  auto load_step = [&](Loaded<T, channels>& to, int step) {
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      int const at = step * 2 + run, row = p.by_in_row.quotient(at), n = p.by_P.quotient(row), i = row - n * p.P;
      int const first = (at - row * int(p.by_in_row.value)) * kFewGroupRun + before;
      int const h = i * p.stride_h + r * p.dilation_h - p.pad_h;
      bool const exists = at < p.runs, has_row = exists && unsigned(h) < unsigned(p.H) && has_c;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int const j = first + e * next, w = j * p.stride_w - p.pad_w;
        bool const pixel = j < p.Q;
        load(to.y[run * 2 + e], y + (n * p.y_n + i * p.y_h + j * p.y_w), exists && pixel && has_k);
#pragma unroll
        for (int s = 0; s < kTaps; ++s) {
          int const column = w + (s0 + s) * p.dilation_w;
          bool const meets = pixel && unsigned(column) < unsigned(p.W) && s0 + s < p.S;
          load(to.x[s][run * 2 + e], x + (n * p.x_n + h * p.x_h + column * p.x_w), has_row && meets);
        }
      }
    }
  };
  float acc[kTaps][v][4] = {};
  auto multiply = [&](Loaded<T, channels> const& of) {
    if constexpr (half) {
      auto low = [](uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); };
      auto high = [](uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); };
      uint32_t const a[4] = {low(of.y[0][0], of.y[1][0]), high(of.y[0][0], of.y[1][0]), low(of.y[2][0], of.y[3][0]),
                             high(of.y[2][0], of.y[3][0])};
#pragma unroll
      for (int s = 0; s < kTaps; ++s)
#pragma unroll
        for (int u = 0; u < v; ++u) {
          auto pair = [&](int e) {
            uint32_t const first = of.x[s][e][u / 2], second = of.x[s][e + 1][u / 2];
            return u % 2 == 0 ? low(first, second) : high(first, second);
          };
          ptx::mma_m16n8k16<T>(acc[s][u], a[0], a[1], a[2], a[3], pair(0), pair(2));
        }
    } else {
      auto rounded = [](uint32_t word) { return ptx::cvt_rn_tf32(__uint_as_float(word)); };
#pragma unroll
      for (int run = 0; run < 4; run += 2) {
        uint32_t const a[4] = {rounded(of.y[run][0]), rounded(of.y[run][1]), rounded(of.y[run + 1][0]),
                               rounded(of.y[run + 1][1])};
#pragma unroll
        for (int s = 0; s < kTaps; ++s)
#pragma unroll
          for (int u = 0; u < v; ++u)
            ptx::mma_m16n8k8_tf32(acc[s][u], a[0], a[1], a[2], a[3], rounded(of.x[s][run][u]),
                                  rounded(of.x[s][run + 1][u]));
      }
    }
  };
  constexpr int every = kFewGroupSumWarps;
  int step = warp;
  if (step < p.steps) {
    constexpr int depth = 2;
    Loaded<T, channels> loaded[depth];
#pragma unroll
    for (int d = 0; d < depth - 1; ++d) load_step(loaded[d], step + d * every);  // past the last: zeros
#pragma unroll 1
    for (; step < p.steps; step += depth * every)
#pragma unroll
      for (int d = 0; d < depth; ++d) {
        load_step(loaded[(d + depth - 1) % depth], step + (d + depth - 1) * every);
        multiply(loaded[d]);
      }
  }
#pragma unroll
  for (int s = 0; s < kTaps; ++s)
#pragma unroll
    for (int u = 0; u < v; ++u)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[warp][(s * 4 + e) * v + u][lane] = acc[s][u][e];
  __syncthreads();
  constexpr int items = kTaps * 4 * 32;  // v neighbouring channels each
#pragma unroll 1
  for (int item = threadIdx.x; item < items; item += kThreads) {
    int const e = item / 32 % 4, s = s0 + item / 128, i = item % 32 / 4, j = item % 4;
    int const filter = k0 + 2 * i + e / 2, first = c0 + v * (2 * j + e % 2);
    int const own = filter / p.K, channel = first - own * p.C, k = group * p.K + filter;
    if (s >= p.S || own >= p.together || k >= p.all_K || unsigned(channel) >= unsigned(p.C)) continue;
    Strides const& at = p.w_strides;
    T* const to = static_cast<T*>(p.w) + k * at.n + channel * at.c + r * at.h + s * at.w;
    Vector<T, v> out;
#pragma unroll
    for (int u = 0; u < v; ++u) {
      float sum = sums[0][item / 32 * v + u][item % 32];
#pragma unroll
      for (int w = 1; w < kFewGroupSumWarps; ++w) sum += sums[w][item / 32 * v + u][item % 32];
      if (!(sum == sum)) sum = exact_sum<T>(p, k, (group + own) * p.C + channel + u, r, s);
      out.v[u] = narrow<T>(sum);
    }
    if (at.c == 1 && (reinterpret_cast<uintptr_t>(to) & (v * sizeof(T) - 1)) == 0) {
      *reinterpret_cast<Vector<T, v>*>(to) = out;
    } else {
#pragma unroll
      for (int u = 0; u < v; ++u) to[u * at.c] = out.v[u];
    }
  }
}

template <class T>
cudaError_t launch(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  FewGroupSums const t = few_group_sums(problem, h200_sxm);
  Params p{};
  p.x = args.a, p.y = args.b, p.w = args.out;
  p.x_strides = problem.x, p.y_strides = problem.y, p.w_strides = problem.w;
  p.x_n = int(problem.x.n), p.x_h = int(problem.x.h), p.x_w = int(problem.x.w);
  p.y_n = int(problem.y.n), p.y_h = int(problem.y.h), p.y_w = int(problem.y.w);
  p.N = int(problem.N), p.H = int(problem.H), p.W = int(problem.W), p.P = int(problem.P()), p.Q = int(problem.Q());
  p.R = int(problem.R), p.S = int(problem.S), p.stride_h = int(problem.stride_h), p.stride_w = int(problem.stride_w);
  p.dilation_h = int(problem.dilation_h), p.dilation_w = int(problem.dilation_w);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.C = int(problem.C_per_group()), p.K = int(problem.K_per_group());
  p.all_C = int(problem.C), p.all_K = int(problem.K), p.together = int(t.together);
  p.tiles_k = int(t.tiles_k), p.tiles_c = int(t.tiles_c), p.columns = int(t.columns);
  p.runs = int(problem.N * problem.P() * t.in_row), p.steps = int(t.steps);
  p.by_in_row = Divisor(uint32_t(t.in_row)), p.by_P = Divisor(uint32_t(problem.P()));
  p.share_x = Share(args.a, problem.x, problem.N, problem.C, problem.H, problem.W, sizeof(T), t.blocks);
  p.share_y = Share(args.b, problem.y, problem.N, problem.K, problem.P(), problem.Q(), sizeof(T), t.blocks);
  auto* const kernel = t.channels == 32 ? sums_kernel<T, 32> : sums_kernel<T, 16>;
  kernel<<<unsigned(t.blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::few_groups_wgrad

#define CONV2D_EXT_GROUPED_FEW_SUMS_INSTANCE(family, op, dtype, tm, tn, tk, variant)                                  \
  namespace conv2d_ext {                                                                                              \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const&, Arguments const& args, \
                                                                cudaStream_t stream) {                                \
    return few_groups_wgrad::launch<typename TypeOf<DType::dtype>::type>(p, args, stream);                            \
  }                                                                                                                   \
  }
