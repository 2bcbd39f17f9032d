// Depthwise convolution with large filters in float32, on the FMA units. A block has planes of the image and its
// filters in shared memory; a thread computes 8 neighbouring outputs of a row, and a chunk of 4 taps costs it one read
// of 4 inputs, one of 4 taps, and 32 FMAs. Threads that follow each other have images, or rows, that follow each other,
// so they read the same taps and different banks; taps that meet no row of the image are skipped. Each filter row is
// summed apart. dgrad is fprop with the filter turned round. nhwc: a block has 4 channels, and its outputs go through
// shared memory.
//
// With a stride or a dilation, outputs whose coordinates leave the same remainder meet every so many inputs: a block
// has such a class of outputs, and one after the other the parts of the filter and the inputs that meet, each a
// convolution of unit stride.
#pragma once

#include "../core/strip.h"
#include "band_tile.cuh"

namespace conv2d_ext::strip {

using band::Source;
using depthwise::Divisor;

struct Params {
  Source in;  // of a part
  int64_t in_h, in_w;
  StripAxis h, w;
  StripPart whole_h, whole_w;  // the only parts, without strides and dilations
  bool whole;
  float const* weights;
  float const* bias;
  float* out;
  int64_t out_n, out_c, out_h, out_w;
  int64_t w_k, w_r, w_s, bias_stride;
  int C;
  int tiles_h, tiles_w, channel_units, channels, images, rows, strips, group, chunks, plane_bytes, filter_bytes;
  bool out_vectors;
  Divisor by_images, by_group, by_strips, by_groups;
};

// The block's outputs: of a class of rows and of one of columns, from p0 and q0 on.
struct Where {
  int class_h, class_w, p0, q0, c0, channels;
  int64_t n0;
};

__device__ inline int outputs_h(Params const& p, Where const& at) {
  return p.whole ? p.h.out : p.h.outputs(at.class_h);
}
__device__ inline int outputs_w(Params const& p, Where const& at) {
  return p.whole ? p.w.out : p.w.outputs(at.class_w);
}

// Rows of taps, padded to chunks: a warp has a row.
__device__ inline void load_filters(Params const& p, Where const& at, StripPart const& h, StripPart const& w,
                                    float* filters) {
  int const rows = at.channels * h.taps, warps = (int(blockDim.x) + 31) / 32;
  for (int i = int(threadIdx.x) / 32; i < rows; i += warps) {
    int const c = i / h.taps, r = i % h.taps;
    float const* const from = p.weights + (at.c0 + c) * p.w_k + (h.tap_first + r * p.h.tap_step) * p.w_r;
    float* const to = filters + c * (p.filter_bytes / 4) + r * p.chunks * 4;
    for (int s = int(threadIdx.x) % 32; s < w.taps; s += 32)
      depthwise::copy<float, 1>(to + s, from + (w.tap_first + s * p.w.tap_step) * p.w_s, 1);
  }
}

// The inputs of a part.
__device__ inline Source source_of(Params const& p, StripPart const& h, StripPart const& w) {
  Source s = p.in;
  s.data = static_cast<float const*>(s.data) + h.in_first * p.in_h + w.in_first * p.in_w;
  s.H = h.in_count, s.W = w.in_count;
  return s;
}

__device__ inline void add(float (&sum)[kStripWidth], float tap, float const (&x)[12], int first) {
#pragma unroll
  for (int i = 0; i < kStripWidth; ++i) sum[i] = fmaf(x[first + i], tap, sum[i]);
}

// `count` taps of a row.
__device__ inline void add_row(float (&sum)[kStripWidth], float const* x, float const* taps, int count) {
  float v[12];
  *reinterpret_cast<float4*>(v) = *reinterpret_cast<float4 const*>(x);
  *reinterpret_cast<float4*>(v + 4) = *reinterpret_cast<float4 const*>(x + 4);
#pragma unroll 3  // after which v is where it was
  for (; count >= 4; count -= 4, x += 4, taps += 4) {
    float4 const tap = *reinterpret_cast<float4 const*>(taps);
    *reinterpret_cast<float4*>(v + 8) = *reinterpret_cast<float4 const*>(x + 8);
    add(sum, tap.x, v, 0);
    add(sum, tap.y, v, 1);
    add(sum, tap.z, v, 2);
    add(sum, tap.w, v, 3);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = v[i + 4];
  }
  if (count <= 0) return;
  // The zeros behind the last tap would make NaN of infinite inputs.
  float4 const tap = *reinterpret_cast<float4 const*>(taps);
  *reinterpret_cast<float4*>(v + 8) = *reinterpret_cast<float4 const*>(x + 8);
  add(sum, tap.x, v, 0);
  if (count > 1) add(sum, tap.y, v, 1);
  if (count > 2) add(sum, tap.z, v, 2);
}

// From planes of outputs, [channel][row][8 * strips + 4], to memory.
__device__ inline void store_nhwc(Params const& p, Where const& at, float const* planes) {
  int const columns = p.strips * kStripWidth, pitch = columns + 4, pixels = p.rows * columns;
  int const out_H = outputs_h(p, at), out_W = outputs_w(p, at);
  for (int i = threadIdx.x; i < p.images * pixels; i += blockDim.x) {
    int const image = i / pixels, row = i % pixels / columns, column = i % columns;
    int const y = at.p0 + row, x = at.q0 + column;
    if (at.n0 + image >= p.in.N || y >= out_H || x >= out_W) continue;
    float* const to = p.out + (at.n0 + image) * p.out_n + at.c0 * p.out_c + (at.class_h + y * p.h.out_step) * p.out_h +
                      (at.class_w + x * p.w.out_step) * p.out_w;
    float v[4];
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (c < at.channels) v[c] = planes[((c * p.images + image) * p.rows + row) * pitch + column];
    if (p.out_vectors) {
      *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (c < at.channels) to[c * p.out_c] = v[c];
    }
  }
}

template <bool nhwc>
__global__ void __launch_bounds__(kStripThreads, 2) gather(__grid_constant__ Params const p) {
  extern __shared__ __align__(16) unsigned char shared[];
  float* const filters = reinterpret_cast<float*>(shared);
  unsigned char* const planes = shared + p.channels * p.filter_bytes;
  uint32_t index = blockIdx.x;
  Where at;
  at.c0 = depthwise::split_off(index, p.channel_units) * p.channels;
  at.q0 = depthwise::split_off(index, p.tiles_w) * p.strips * kStripWidth;
  at.p0 = depthwise::split_off(index, p.tiles_h) * p.rows;
  at.class_w = p.whole ? 0 : depthwise::split_off(index, p.w.classes);
  at.class_h = p.whole ? 0 : depthwise::split_off(index, p.h.classes);
  at.n0 = int64_t(index) * p.images;
  at.channels = p.C - at.c0 < p.channels ? p.C - at.c0 : p.channels;

  // Threads that follow each other have images of the same row, or else rows of the same strip.
  uint32_t item = threadIdx.x;
  auto digit = [&](Divisor const& by) {
    uint32_t const quotient = by.quotient(item), rest = item - quotient * by.value;
    item = quotient;
    return int(rest);
  };
  bool const many = p.images >= kStripImages;
  int image = many ? digit(p.by_images) : 0, row = digit(p.by_group);
  if (!many) image = digit(p.by_images);
  int const strip = digit(p.by_strips);
  row += digit(p.by_groups) * p.group;
  int const c = int(item), y = at.p0 + row, x = at.q0 + strip * kStripWidth;
  bool const exists = c < at.channels && at.n0 + image < p.in.N && y < outputs_h(p, at) && x < outputs_w(p, at);
  float acc[kStripWidth] = {};

#pragma unroll 1
  for (int part = 0; part < p.h.parts * p.w.parts; ++part) {
    StripPart h = p.whole_h, w = p.whole_w;
    if (!p.whole) h = p.h.part(at.class_h, part / p.w.parts), w = p.w.part(at.class_w, part % p.w.parts);
    if (h.taps == 0 || w.taps == 0) continue;
    int const begin = at.p0 + h.offset > 0 ? at.p0 + h.offset : 0;  // the planes' first row
    __syncthreads();                                                // the last part's planes have been read
    band::clear(shared, p.channels * (p.filter_bytes + p.images * p.plane_bytes));
    __syncthreads();
    load_filters(p, at, h, w, filters);
    band::fill<float, 1, nhwc, 1>(source_of(p, h, w), {begin, at.q0 + w.offset, at.c0, at.channels, p.images, at.n0},
                                  planes, p.plane_bytes);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();

    // The warp's taps that meet the image: rows, and columns in chunks.
    int const h0 = y + h.offset, w0 = x + w.offset;
    auto least = [&](int v) { return __reduce_min_sync(0xffffffffu, exists ? v : 1 << 30); };
    auto most = [&](int v) { return __reduce_max_sync(0xffffffffu, exists ? v : 0); };
    int const first = least(h0 < 0 ? -h0 : 0), last = most(h.in_count - h0 < h.taps ? h.in_count - h0 : h.taps);
    int const low = least(w0 + kStripWidth - 1 < 0 ? -(w0 + kStripWidth - 1) : 0) / 4 * 4;
    int const high = most(w.in_count - w0 < w.taps ? w.in_count - w0 : w.taps), whole = (high + 3) / 4 * 4;
    int const columns = (whole < w.taps ? whole : w.taps) - low;
    float const* from = reinterpret_cast<float const*>(planes + (c * p.images + image) * p.plane_bytes) +
                        (h0 - begin + first) * p.in.pitch + strip * kStripWidth + low;
    float const* taps = filters + c * (p.filter_bytes / 4) + first * p.chunks * 4 + low;
#pragma unroll 1
    for (int r = first; r < last; ++r, from += p.in.pitch, taps += p.chunks * 4) {
      if (!exists || columns <= 0 || unsigned(h0 + r) >= unsigned(h.in_count)) continue;
      float sum[kStripWidth] = {};
      add_row(sum, from, taps, columns);
#pragma unroll
      for (int j = 0; j < kStripWidth; ++j) acc[j] += sum[j];
    }
  }
  float const bias = p.bias != nullptr && exists ? p.bias[(at.c0 + c) * p.bias_stride] : 0.f;
#pragma unroll
  for (int j = 0; j < kStripWidth; ++j) acc[j] += bias;
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
    store_nhwc(p, at, staged);
  } else if (exists) {
    float* const to = p.out + (at.n0 + image) * p.out_n + (at.c0 + c) * p.out_c +
                      (at.class_h + y * p.h.out_step) * p.out_h + at.class_w + x * p.w.out_step;
    int const out_W = outputs_w(p, at);
    if (p.out_vectors && x + kStripWidth <= out_W) {
      *reinterpret_cast<float4*>(to) = make_float4(acc[0], acc[1], acc[2], acc[3]);
      *reinterpret_cast<float4*>(to + 4) = make_float4(acc[4], acc[5], acc[6], acc[7]);
    } else {
#pragma unroll
      for (int j = 0; j < kStripWidth; ++j)
        if (x + j < out_W) to[j * p.w.out_step] = acc[j];
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
  bool const vectors = nhwc ? t.channels == 4 && problem.C % 4 == 0 : t.w.whole() && t.w.part(0, 0).offset % 4 == 0;
  Params p{};
  p.h = t.h, p.w = t.w, p.whole_h = t.h.part(0, 0), p.whole_w = t.w.part(0, 0), p.whole = t.h.whole() && t.w.whole();
  p.in = band::source_of<float>(in, args.a, problem.N, t.h.most_in(), t.w.most_in(), nhwc,
                                backward ? problem.y_align : problem.x_align, vectors, 1, t.plane_rows, t.pitch);
  p.weights = static_cast<float const*>(args.b), p.bias = static_cast<float const*>(args.bias);
  p.out = static_cast<float*>(args.out), p.bias_stride = args.bias_stride;
  p.out_n = out.n, p.out_c = out.c, p.out_h = out.h, p.out_w = nhwc ? out.w : 1;
  p.in_h = in.h, p.in_w = p.in.w, p.in.h *= t.h.in_step, p.in.w *= t.w.in_step;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.C = int(problem.C);
  p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w), p.channel_units = int(t.channel_units);
  p.channels = t.channels, p.images = t.images, p.rows = t.rows, p.strips = t.strips, p.group = t.group;
  p.chunks = t.chunks, p.plane_bytes = t.plane_bytes, p.filter_bytes = t.filter_bytes;
  p.by_images = Divisor(uint32_t(t.images)), p.by_group = Divisor(uint32_t(t.group));
  p.by_strips = Divisor(uint32_t(t.strips)), p.by_groups = Divisor(uint32_t(t.rows / t.group));
  p.out_vectors = (nhwc ? vectors : t.w.whole()) &&
                  depthwise::rows_aligned(out, nhwc, backward ? problem.x_align : problem.y_align, 16, 4);
  auto* const kernel = gather<nhwc>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(t.blocks(problem.N)), unsigned(ceil_div(t.items(), 32) * 32), size_t(t.shared_bytes), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::strip

#define CONV2D_EXT_STRIP_INSTANCE(family, op, dtype, tm, tn, tk, variant)  \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                \
    return strip::launch<Op::op, Variant::variant>(p, plan, args, stream); \
  }
