// Depthwise convolution with large filters in float32, stride 1, on the FMA units. A block has planes of the image with
// their halo and its filters in shared memory; a thread computes 8 neighbouring outputs of a row, and a chunk of 4 taps
// costs it one read of 4 inputs, one of 4 taps, and 32 FMAs. Threads that follow each other have rows that follow each
// other, so they read the same taps and different banks. Each filter row is summed apart. dgrad is fprop with the
// filter turned round. nhwc: a block has 4 channels, and its outputs go through shared memory.
#pragma once

#include "../core/strip.h"
#include "band_tile.cuh"

namespace conv2d_ext::strip {

using band::Source;
using depthwise::Divisor;

constexpr int kUnrolled = 8;  // chunks

struct Params {
  Source in;
  float const* w;
  float const* bias;
  float* out;
  int64_t out_n, out_c, out_h, out_w;
  int64_t w_k, w_r, w_s, bias_stride;
  int C, out_H, out_W, R, S, pad_h, pad_w;
  int tiles_h, tiles_w, channel_units, channels, images, rows, strips, chunks, plane_bytes;
  bool turned, out_vectors;
  Divisor taps_of, columns_of;  // by R * S, by S
};

// Rows of taps, padded to chunks.
__device__ inline void load_filters(Params const& p, int c0, int channels, float* filters) {
  int const taps = p.R * p.S, total = channels * taps;
#pragma unroll 4
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    int const c = int(p.taps_of.quotient(i)), tap = i - c * taps;
    int const r = int(p.columns_of.quotient(tap)), s = tap - r * p.S;
    float* const to =
        filters + ((c * p.R + (p.turned ? p.R - 1 - r : r)) * p.chunks * 4 + (p.turned ? p.S - 1 - s : s));
    depthwise::copy<float, 1>(to, p.w + (c0 + c) * p.w_k + r * p.w_r + s * p.w_s, 1);
  }
}

__device__ inline void add(float (&sum)[kStripWidth], float tap, float const (&x)[12], int first) {
#pragma unroll
  for (int i = 0; i < kStripWidth; ++i) sum[i] = fmaf(x[first + i], tap, sum[i]);
}

// One filter row.
__device__ inline void add_row(float (&sum)[kStripWidth], float const* x, float const* taps, int S) {
  for (int s0 = 0; s0 < S; s0 += 4 * kUnrolled, x += 4 * kUnrolled, taps += 4 * kUnrolled) {
    float v[12];
    *reinterpret_cast<float4*>(v) = *reinterpret_cast<float4 const*>(x);
    *reinterpret_cast<float4*>(v + 4) = *reinterpret_cast<float4 const*>(x + 4);
#pragma unroll
    for (int chunk = 0; chunk < kUnrolled; ++chunk) {
      int const left = S - s0 - 4 * chunk;
      if (left <= 0) break;
      float4 const tap = *reinterpret_cast<float4 const*>(taps + 4 * chunk);
      *reinterpret_cast<float4*>(v + 8) = *reinterpret_cast<float4 const*>(x + 8 + 4 * chunk);
      add(sum, tap.x, v, 0);
      if (left >= 4) {
        add(sum, tap.y, v, 1);
        add(sum, tap.z, v, 2);
        add(sum, tap.w, v, 3);
      } else {  // the zeros behind the last tap would make NaN of infinite inputs
        if (left > 1) add(sum, tap.y, v, 1);
        if (left > 2) add(sum, tap.z, v, 2);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = v[i + 4];
    }
  }
}

// From planes of outputs, [channel][row][8 * strips + 4], to memory.
__device__ inline void store_nhwc(Params const& p, int64_t n0, int c0, int channels, int p0, int q0,
                                  float const* planes) {
  int const columns = p.strips * kStripWidth, pitch = columns + 4, pixels = p.rows * columns;
  for (int i = threadIdx.x; i < p.images * pixels; i += blockDim.x) {
    int const image = i / pixels, row = i % pixels / columns, column = i % columns;
    int const y = p0 + row, x = q0 + column;
    if (n0 + image >= p.in.N || y >= p.out_H || x >= p.out_W) continue;
    float* const to = p.out + (n0 + image) * p.out_n + c0 * p.out_c + y * p.out_h + x * p.out_w;
    float v[4];
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (c < channels) v[c] = planes[((c * p.images + image) * p.rows + row) * pitch + column];
    if (p.out_vectors) {
      *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (c < channels) to[c * p.out_c] = v[c];
    }
  }
}

template <bool nhwc>
__global__ void __launch_bounds__(kStripThreads, 2) gather(__grid_constant__ Params const p) {
  extern __shared__ __align__(16) unsigned char shared[];
  float* const filters = reinterpret_cast<float*>(shared);
  unsigned char* const planes = shared + p.channels * p.R * p.chunks * 16;
  uint32_t index = blockIdx.x;
  int const c0 = depthwise::split_off(index, p.channel_units) * p.channels;
  int const q0 = depthwise::split_off(index, p.tiles_w) * p.strips * kStripWidth;
  int const p0 = depthwise::split_off(index, p.tiles_h) * p.rows;
  int64_t const n0 = int64_t(index) * p.images;
  int const channels = p.C - c0 < p.channels ? p.C - c0 : p.channels;

  band::clear(shared, p.channels * (p.R * p.chunks * 16 + p.images * p.plane_bytes));
  __syncthreads();
  load_filters(p, c0, channels, filters);
  band::fill<float, 1, nhwc>(p.in, {p0 - p.pad_h, q0 - p.pad_w, c0, channels, p.images, n0}, planes, p.plane_bytes);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();

  int const rows = p.images * p.rows, i = int(threadIdx.x), row = i % p.rows;
  int const strip = i / rows % p.strips, image = i / p.rows % p.images, c = i / rows / p.strips;
  int const y = p0 + row, x = q0 + strip * kStripWidth;
  bool const exists = c < channels && n0 + image < p.in.N && y < p.out_H && x < p.out_W;
  float acc[kStripWidth];
  float const bias = p.bias != nullptr && exists ? p.bias[(c0 + c) * p.bias_stride] : 0.f;
#pragma unroll
  for (int j = 0; j < kStripWidth; ++j) acc[j] = bias;
  if (exists) {
    float const* from = reinterpret_cast<float const*>(planes + (c * p.images + image) * p.plane_bytes) +
                        row * p.in.pitch + strip * kStripWidth;
    float const* taps = filters + c * p.R * p.chunks * 4;
#pragma unroll 1
    for (int r = 0; r < p.R; ++r, from += p.in.pitch, taps += p.chunks * 4) {
      float sum[kStripWidth] = {};
      add_row(sum, from, taps, p.S);
#pragma unroll
      for (int j = 0; j < kStripWidth; ++j) acc[j] += sum[j];
    }
  }
  if constexpr (nhwc) {
    float* const staged = reinterpret_cast<float*>(planes);
    __syncthreads();  // the planes have been read, and take the outputs
    if (exists) {
      int const pitch = p.strips * kStripWidth + 4;
      float* const to = staged + ((c * p.images + image) * p.rows + row) * pitch + strip * kStripWidth;
      *reinterpret_cast<float4*>(to) = make_float4(acc[0], acc[1], acc[2], acc[3]);
      *reinterpret_cast<float4*>(to + 4) = make_float4(acc[4], acc[5], acc[6], acc[7]);
    }
    __syncthreads();
    store_nhwc(p, n0, c0, channels, p0, q0, staged);
  } else if (exists) {
    float* const to = p.out + (n0 + image) * p.out_n + (c0 + c) * p.out_c + y * p.out_h + x;
    if (p.out_vectors && x + kStripWidth <= p.out_W) {
      *reinterpret_cast<float4*>(to) = make_float4(acc[0], acc[1], acc[2], acc[3]);
      *reinterpret_cast<float4*>(to + 4) = make_float4(acc[4], acc[5], acc[6], acc[7]);
    } else {
#pragma unroll
      for (int j = 0; j < kStripWidth; ++j)
        if (x + j < p.out_W) to[j] = acc[j];
    }
  }
}

// ---- host side

template <Op op, Variant variant>
cudaError_t launch(Problem const& problem, Plan const&, Arguments const& args, cudaStream_t stream) {
  constexpr bool nhwc = variant == Variant::nhwc, backward = op == Op::dgrad;
  StripTile const t = strip_tile(op, problem, nhwc);
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  bool const vectors = nhwc ? t.channels == 4 && problem.C % 4 == 0 : t.pad_w % 4 == 0;
  Params p{};
  p.in = band::source_of<float>(in, args.a, problem.N, t.in_H, t.in_W, nhwc,
                                backward ? problem.y_align : problem.x_align, vectors, 1, t.plane_rows, t.pitch);
  p.w = static_cast<float const*>(args.b), p.bias = static_cast<float const*>(args.bias);
  p.out = static_cast<float*>(args.out), p.bias_stride = args.bias_stride;
  p.out_n = out.n, p.out_c = out.c, p.out_h = out.h, p.out_w = nhwc ? out.w : 1;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.C = int(problem.C), p.R = int(problem.R), p.S = int(problem.S);
  p.out_H = t.out_H, p.out_W = t.out_W, p.pad_h = t.pad_h, p.pad_w = t.pad_w, p.turned = backward;
  p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w), p.channel_units = int(t.channel_units);
  p.channels = t.channels, p.images = t.images, p.rows = t.rows, p.strips = t.strips, p.chunks = t.chunks;
  p.plane_bytes = t.plane_rows * t.pitch * 4;
  p.out_vectors =
      (!nhwc || vectors) && depthwise::rows_aligned(out, nhwc, backward ? problem.x_align : problem.y_align, 16, 4);
  p.taps_of = Divisor(uint32_t(p.R * p.S)), p.columns_of = Divisor(uint32_t(p.S));
  auto* const kernel = gather<nhwc>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(t.blocks(problem.N)), unsigned(ceil_div(t.items(), 32) * 32), size_t(t.shared_bytes), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::strip

#define CONV2D_EXT_STRIP_INSTANCE(family, op, dtype, tm, tn, tk, variant)               \
  cudaError_t conv2d_ext::family##_##op##_##dtype##_##tm##x##tn##_##variant(            \
      Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) { \
    return strip::launch<Op::op, Variant::variant>(p, plan, args, stream);              \
  }
