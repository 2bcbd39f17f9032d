// wgrad of 1x1 filters between few channels in float32: dw[rows, columns] = a[pixels, rows]^T * b[pixels, columns],
// where a is the tensor with fewer channels. Memory bounds it: nothing passes through shared memory.
//
// A warp has all weights, as sums of mma.sync, over 16 pixels at a time, which each of its lanes reads as vectors: the
// order of the rows and of the columns is free, and that of the pixels, as long as both operands agree. In
// channels_last (nhwc) a vector is neighbouring channels of a pixel, else (nchw) neighbouring pixels of a channel. The
// warps of a block add their sums, and a second kernel those of the blocks, in order.
//
// Strict float32 is as in stem.cuh, whose split words these are; weights that are not finite are summed again.
#pragma once

#include "../core/pixels_few.h"
#include "dependent.cuh"
#include "stem.cuh"

namespace conv2d_ext::pixels_few {

using depthwise::WideDivisor;
using stem::is_split, stem::Word;

constexpr int kThreads = kFewWarps * 32;

struct Operand {
  float const* at;
  int64_t image;  // nchw
  int step;       // nchw: of a channel; nhwc: of a pixel
  int channels;
};

struct SumParams {
  Operand a, b;
  WideDivisor units_of;  // of an image
  int units, units_of_image, images;
  int64_t pixels;                         // nchw: of an image; nhwc: of all
  int parts, rows, columns, slabs, wide;  // wide: columns of a slab
  float* sums;                            // [part][slab][rows of the tile][columns of the tile]
  float* out;
  int64_t out_row, out_column;
};

template <class T>
__device__ inline Word<T> word(float v) {
  if constexpr (is_split<T>)
    return stem::word_of<T>(__float_as_uint(v));
  else
    return ptx::cvt_rn_tf32(v);
}

// Numbers [step of 8 pixels][block of 8 channels][half of the pixels] of 16 pixels. nhwc: of pixel `at` + lane % 4 and
// every fourth from there, `left` of them exist, and of channels first + lane / 4 * blocks and the next; nchw: of
// element `at` of an image, if it exists, and the next three, and of channels first + 8 i + lane / 4.
template <bool nchw, int blocks>
__device__ inline void load(float (&v)[2][blocks][2], Operand const& o, int64_t at, bool exists, int64_t left,
                            int first, int last) {
  int const step = warp_uniform(o.step);  // lest registers keep its multiples
  int const lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  if constexpr (nchw) {
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
      int const channel = first + i * 8 + g;
      float4 four = make_float4(0, 0, 0, 0);
      if (exists && channel < last) four = *reinterpret_cast<float4 const*>(o.at + at + channel * step);
      v[0][i][0] = four.x, v[0][i][1] = four.y, v[1][i][0] = four.z, v[1][i][1] = four.w;
    }
  } else {
    using V = Vector<float, blocks>;
    int const channel = first + g * blocks;
    float const* const from = o.at + (at + t) * step + channel;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // pixels t + 4 i
      V vector{};
      if (t + i * 4 < left && channel < last) vector = *reinterpret_cast<V const*>(from + i * 4 * step);
#pragma unroll
      for (int j = 0; j < blocks; ++j) v[i / 2][j][i % 2] = vector.v[j];
    }
  }
}

template <class T, bool nchw, int TM, int TN>
__global__ void __launch_bounds__(kThreads, kFewPixelsBlocks) sum_pixels(__grid_constant__ SumParams const p) {
  constexpr int A = TM / 16, B = TN / 32;
  extern __shared__ __align__(16) char dynamic[];
  int const warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  int const part = int(blockIdx.x) / p.slabs, first = int(blockIdx.x) % p.slabs * p.wide;
  int const last = min(first + p.wide, p.columns);
  float acc[A][4 * B][4] = {};
#pragma unroll 1
  for (int unit = part * kFewWarps + warp; unit < p.units; unit += p.parts * kFewWarps) {
    int64_t at_a, at_b, left = 0;
    bool exists = true;
    if constexpr (nchw) {
      int const n = p.units_of.quotient(unit), pixel = (unit - n * p.units_of_image) * kFewRun + t * 4;
      exists = pixel < p.pixels;
      at_a = n * p.a.image + pixel, at_b = n * p.b.image + pixel;
    } else {
      at_a = at_b = int64_t(unit) * kFewRun;
      left = p.pixels - at_a;
    }
    float a[2][2 * A][2], b[B][2][4][2];
    load<nchw, 2 * A>(a, p.a, at_a, exists, left, 0, p.rows);
#pragma unroll
    for (int c = 0; c < B; ++c) {
      load<nchw, 4>(b[c], p.b, at_b, exists, left, first + c * 32, last);
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      Word<T> rows[2 * A][2];
#pragma unroll
      for (int i = 0; i < 4 * A; ++i) rows[i / 2][i % 2] = word<T>(a[s][i / 2][i % 2]);
#pragma unroll
      for (int j = 0; j < 4 * B; ++j) {
        Word<T> const low = word<T>(b[j / 4][s][j % 4][0]), high = word<T>(b[j / 4][s][j % 4][1]);
#pragma unroll
        for (int m = 0; m < A; ++m)
          stem::mma<T>(acc[m][j], rows[2 * m][0], rows[2 * m + 1][0], rows[2 * m][1], rows[2 * m + 1][1], low, high);
      }
    }
  }
  ptx::griddepcontrol_launch_dependents();
  float4* const shared = reinterpret_cast<float4*>(dynamic) + lane;
#pragma unroll
  for (int half = kFewWarps / 2; half > 0; half /= 2) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < A * B * 4; ++i) {
      float (&v)[4] = acc[i / (4 * B)][i % (4 * B)];
      if (warp >= half && warp < 2 * half)
        shared[((warp - half) * (A * B * 4) + i) * 32] = make_float4(v[0], v[1], v[2], v[3]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < A * B * 4; ++i) {
      float (&v)[4] = acc[i / (4 * B)][i % (4 * B)];
      if (warp < half) {
        float4 const other = shared[(warp * (A * B * 4) + i) * 32];
        v[0] += other.x, v[1] += other.y, v[2] += other.z, v[3] += other.w;
      }
    }
  }
  if (warp != 0) return;
  float* const to = p.sums + int64_t(blockIdx.x) * (TM * TN);
#pragma unroll
  for (int m = 0; m < A; ++m)
#pragma unroll
    for (int n = 0; n < 4 * B; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int const block = 2 * m + e / 2, column = 2 * t + e % 2;
        int const row = nchw ? block * 8 + g : g * 2 * A + block;
        to[row * TN + n / 4 * 32 + (nchw ? n % 4 * 8 + column : column * 4 + n % 4)] = acc[m][n][e];
      }
}

// A weight, product by product, by all threads of a block; the value of thread 0 counts.
template <bool nchw>
__device__ inline float exact(SumParams const& p, int row, int column) {
  __shared__ double shares[kFewWarps];
  double sum = 0;
  for (int n = 0; n < (nchw ? p.images : 1); ++n)
    for (int64_t pixel = threadIdx.x; pixel < p.pixels && sum == sum; pixel += kThreads) {  // a NaN stays one
      float const a = nchw ? p.a.at[n * p.a.image + row * int64_t(p.a.step) + pixel] : p.a.at[pixel * p.a.step + row],
                  b = nchw ? p.b.at[n * p.b.image + column * int64_t(p.b.step) + pixel]
                           : p.b.at[pixel * p.b.step + column];
      sum += double(a) * double(b);
    }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  __syncthreads();  // the shares of the sum before have been read
  if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = sum;
  __syncthreads();
  for (int i = 1; threadIdx.x == 0 && i < kFewWarps; ++i) sum += shares[i];
  return float(sum);
}

// 32 weights by 8 shares of the parts.
template <class T, bool nchw, int TM, int TN>
__global__ void __launch_bounds__(kThreads) add_parts(__grid_constant__ SumParams const p) {
  __shared__ float shares[kFewWarps][32];
  __shared__ unsigned again;
  int const share = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, place = int(blockIdx.x) * 32;
  int const slab = place / (TM * TN), row = place / TN % TM, in_slab = place % TN + lane;
  int const column = slab * p.wide + in_slab;
  ptx::griddepcontrol_wait();
  float sum = 0;
#pragma unroll 8
  for (int i = share; i < p.parts; i += kFewWarps) sum += p.sums[int64_t(i) * p.slabs * (TM * TN) + place + lane];
  shares[share][lane] = sum;
  __syncthreads();
  float* const to = p.out + row * p.out_row;
  if (share == 0) {
#pragma unroll
    for (int i = 1; i < kFewWarps; ++i) sum += shares[i][lane];
    bool const exists = row < p.rows && in_slab < p.wide && column < p.columns;
    if (exists) to[column * p.out_column] = sum;
    unsigned const wrong = __ballot_sync(0xffffffffu, exists && !isfinite(sum));
    if (lane == 0) again = wrong;
  }
  if (!is_split<T>) return;
  __syncthreads();
  for (unsigned left = again; left != 0; left &= left - 1) {
    int const c = column - lane + __ffs(int(left)) - 1;
    float const v = exact<nchw>(p, row, c);
    if (threadIdx.x == 0) to[c * p.out_column] = v;
  }
}

// ---- host side

template <int TM, int TN, Variant variant>
cudaError_t launch_wgrad(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  constexpr bool nchw = variant == Variant::nchw;
  FewSums const t(row_of(plan), problem);
  int64_t const pixels = problem.H * problem.W;
  auto operand = [&](void const* at, Strides const& s, int64_t channels) {
    int64_t const pixel = problem.W > 1 ? s.w : problem.H > 1 ? s.h : s.n;
    return Operand{static_cast<float const*>(at), s.n, int(nchw ? s.c : pixel), int(channels)};
  };
  Operand const x = operand(args.a, problem.x, problem.C), y = operand(args.b, problem.y, problem.K);
  SumParams p{};
  p.a = t.swapped ? y : x, p.b = t.swapped ? x : y;
  p.units = int(t.units), p.pixels = nchw ? pixels : pixels * problem.N;
  int64_t const each = ceil_div(pixels, kFewRun);
  p.units_of = WideDivisor(uint32_t(each)), p.units_of_image = int(each), p.images = int(problem.N);
  p.parts = int(t.parts), p.slabs = int(t.slabs), p.wide = int(t.wide), p.rows = int(t.rows),
  p.columns = int(t.columns);
  p.sums = static_cast<float*>(args.workspace), p.out = static_cast<float*>(args.out);
  p.out_row = t.swapped ? problem.w.n : problem.w.c, p.out_column = t.swapped ? problem.w.c : problem.w.n;
  auto run = [&](auto* main, auto* second) {
    constexpr int bytes = TM * TN * 4 * kFewWarps / 2;
    if (auto const error = cudaFuncSetAttribute(main, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
    main<<<unsigned(t.parts * t.slabs), kThreads, bytes, stream>>>(p);
    if (auto const error = cudaGetLastError()) return error;
    return launch_dependent(second, dim3(unsigned(t.slabs * TM * TN / 32)), kThreads, 0, stream, p);
  };
  return problem.allow_tf32 ? run(sum_pixels<float, nchw, TM, TN>, add_parts<float, nchw, TM, TN>)
                            : run(sum_pixels<Split, nchw, TM, TN>, add_parts<Split, nchw, TM, TN>);
}

}  // namespace conv2d_ext::pixels_few

#define CONV2D_EXT_PIXELS_FEW_WGRAD_INSTANCE(family, op, dtype, tm, tn, tk, variant)  \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                           \
    return pixels_few::launch_wgrad<tm, tn, Variant::variant>(p, plan, args, stream); \
  }
