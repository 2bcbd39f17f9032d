// Depthwise convolution with filters of 9x9 and more in float32, stride 1, on the FMA units. A block has planes of the
// image and their filters in shared memory; a thread computes 7 rows by 8 columns of outputs. It walks down the rows of
// inputs that they meet: a chunk of 4 taps costs one read of 4 inputs, and for each of the 7 rows one read of 4 taps,
// which all lanes share, and 32 FMAs. Threads that follow each other have rows that follow each other: pitches are odd
// numbers of 16 bytes, so they read different banks. Blocks are small, so that many hide each other's copies. dgrad is
// fprop with the filter turned round. nhwc: a block has 4 channels, neighbouring lanes.
#pragma once

#include "../core/strip_rows.h"
#include "depthwise.cuh"
#include "ptx.cuh"

namespace conv2d_ext::strip_rows {

using depthwise::Divisor;

struct Params {
  float const* in;
  float const* w;
  float const* bias;
  float* out;
  int64_t in_n, in_c, in_h, in_w, out_n, out_c, out_h, out_w;
  int64_t w_k, w_r, w_s, bias_stride;
  int64_t N;
  int C, in_H, in_W, out_H, out_W, R, S, pad_h, pad_w;
  int groups, strips, channels, images, pitch, plane_bytes, filter_bytes;
  int tiles_h, tiles_w, channel_units;
  int width;  // nchw: columns of one copy
  bool out_vectors;
};

// What a block's planes hold: images from n0 on, rows [h0, h0 + rows), and from column `origin` on, which may be
// outside the image, those of [column, column + columns).
struct Window {
  int64_t n0;
  int c0, channels, images, h0, rows, origin, column, columns;
};

// A warp has a row, E columns of it at a time; nhwc: 4 channels of a column, one by one.
template <int E, bool nhwc>
__device__ inline void fill(Params const& p, Window const& at, uint32_t planes) {
  int const copies = nhwc ? 4 * at.columns : at.columns / E, lane = int(threadIdx.x) % 32;
  float const* const in = p.in + at.n0 * p.in_n + at.c0 * p.in_c + at.h0 * p.in_h + at.column * p.in_w;
  for (int row = int(threadIdx.x) / 32; row < at.rows; row += int(blockDim.x) / 32)
    for (int i = lane; i < copies; i += 32) {
      int const c = nhwc ? i % 4 : 0, column = nhwc ? i / 4 : i * E;
      if (nhwc && c >= at.channels) continue;
      float const* from = in + row * p.in_h + column * p.in_w + c * p.in_c;
      uint32_t to = planes + c * p.images * p.plane_bytes + (row * p.pitch + at.column - at.origin + column) * 4;
      for (int image = 0; image < at.images; ++image, from += p.in_n, to += p.plane_bytes) {
        if constexpr (E == 4)
          ptx::cp_async_16(to, from, true);
        else
          ptx::cp_async_ca<4 * E>(to, from, true);
      }
    }
}

__device__ inline void add(float (&sum)[kStripColumns], float tap, float const (&x)[12], int first) {
#pragma unroll
  for (int i = 0; i < kStripColumns; ++i) sum[i] = fmaf(x[first + i], tap, sum[i]);
}

__device__ inline void load(float const* from, float* v) {
  *reinterpret_cast<float4*>(v) = *reinterpret_cast<float4 const*>(from);
}

// `count` taps, up to 4, of each of the rows of taps that a row of inputs meets: row i - t for output row t, where bit
// t of `rows` says that there is one. The next row's are asked for ahead.
template <int count>
__device__ inline void add_chunk(float (&acc)[kStripRows][kStripColumns], float const (&v)[12], float const* taps,
                                 uint32_t rows) {
  alignas(16) float tap[2][4];
  load(taps, tap[0]);
#pragma unroll
  for (int t = 0; t < kStripRows; ++t) {
    if (t + 1 < kStripRows) load(taps - (t + 1) * kStripTaps, tap[(t + 1) % 2]);
    if ((rows >> t & 1) == 0) continue;
#pragma unroll
    for (int k = 0; k < count; ++k) add(acc[t], tap[t % 2][k], v, k);
  }
}

template <bool nhwc>
__global__ void __launch_bounds__(kStripRowsThreads) gather(__grid_constant__ Params const p) {
  extern __shared__ __align__(16) unsigned char shared[];
  uint32_t const filters = ptx::shared_address(shared), planes = filters + p.channels * p.filter_bytes;
  uint32_t const zeros = planes + p.channels * p.images * p.plane_bytes;
  uint32_t index = blockIdx.x;
  auto digit = [&](int size) {
    uint32_t const quotient = index / uint32_t(size), rest = index - quotient * uint32_t(size);
    index = quotient;
    return int(rest);
  };
  Window at;
  at.c0 = digit(p.channel_units) * p.channels;
  int const q0 = digit(p.tiles_w) * p.strips * kStripColumns, p0 = digit(p.tiles_h) * p.groups * kStripRows;
  at.n0 = int64_t(index) * p.images;
  at.channels = p.C - at.c0 < p.channels ? p.C - at.c0 : p.channels;
  at.images = p.N - at.n0 < p.images ? int(p.N - at.n0) : p.images;
  at.h0 = max(p0 - p.pad_h, 0);
  at.rows = max(min(p.in_H, p0 - p.pad_h + p.groups * kStripRows + p.R - 1) - at.h0, 0);
  at.origin = q0 - p.pad_w, at.column = max(at.origin, 0);
  at.columns = max(min(p.in_W, at.origin + p.pitch) - at.column, 0);

  // Zeros around the image, and where there are no rows.
  int const cleared = (p.channels * p.images * p.plane_bytes) / 16 + p.pitch / 4;
  for (int i = threadIdx.x; i < cleared; i += int(blockDim.x)) ptx::st_shared_v4(planes + i * 16, {0, 0, 0, 0});
  __syncthreads();
  if constexpr (nhwc) {
    fill<1, true>(p, at, planes);
  } else {
    if (p.width == 4)
      fill<4, false>(p, at, planes);
    else if (p.width == 2)
      fill<2, false>(p, at, planes);
    else
      fill<1, false>(p, at, planes);
  }
  for (int i = threadIdx.x; i < at.channels * p.R * kStripTaps; i += int(blockDim.x)) {
    int const s = i % kStripTaps, row = i / kStripTaps, c = nhwc ? row / p.R : 0, r = row - c * p.R;
    if (s < p.S)
      ptx::cp_async_ca<4>(filters + c * p.filter_bytes + ((r + kStripRows - 1) * kStripTaps + s) * 4,
                          p.w + (at.c0 + c) * p.w_k + r * p.w_r + s * p.w_s, true);
  }
  ptx::cp_async_wait_all();
  __syncthreads();

  index = threadIdx.x;
  int c = digit(p.channels), group = digit(p.groups), image = digit(p.images), strip = int(index);
  bool const exists = strip < p.strips && c < at.channels && image < at.images;
  if (!exists) c = group = image = strip = 0;
  int const y = p0 + group * kStripRows, x = q0 + strip * kStripColumns, h = y - p.pad_h;
  float const* const begin = reinterpret_cast<float const*>(shared);
  float const* const filter = begin + c * (p.filter_bytes / 4) + (kStripRows - 1) * kStripTaps;
  float const* const plane =
      begin + (planes - filters) / 4 + (c * p.images + image) * (p.plane_bytes / 4) + strip * kStripColumns;
  float const* const outside = begin + (zeros - filters) / 4 + strip * kStripColumns;
  // Rows of inputs that a thread of the warp meets.
  int const first = __reduce_min_sync(0xffffffffu, h < 0 ? -h : 0);
  int const last = __reduce_max_sync(0xffffffffu, min(p.in_H - h, p.R + kStripRows - 1));
  int const chunks = p.S / 4, rest = p.S - 4 * chunks;
  float acc[kStripRows][kStripColumns] = {};
#pragma unroll 1
  for (int i = first; i < last; ++i) {
    float const* from = unsigned(h + i) < unsigned(p.in_H) ? plane + (h + i - at.h0) * p.pitch : outside;
    float const* taps = filter + i * kStripTaps;
    uint32_t rows = (2u << min(i, kStripRows - 1)) - 1;  // t <= i, and i - t < R
    if (i >= p.R) rows &= ~0u << (i - p.R + 1);
    alignas(16) float v[12];
    load(from, v), load(from + 4, v + 4);
#pragma unroll 3  // after which v is where it was
    for (int chunk = 0; chunk < chunks; ++chunk) {
      load(from + 8, v + 8);
      add_chunk<4>(acc, v, taps, rows);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = v[j + 4];
      from += 4, taps += 4;
    }
    // What is behind the last tap would make NaN of infinite inputs.
    if (rest > 0) load(from + 8, v + 8);
    if (rest == 1) add_chunk<1>(acc, v, taps, rows);
    if (rest == 2) add_chunk<2>(acc, v, taps, rows);
    if (rest == 3) add_chunk<3>(acc, v, taps, rows);
  }
  if (!exists) return;

  float const bias = p.bias != nullptr ? p.bias[(at.c0 + c) * p.bias_stride] : 0.f;
  float* to = p.out + (at.n0 + image) * p.out_n + (at.c0 + c) * p.out_c + y * p.out_h + x * p.out_w;
#pragma unroll
  for (int t = 0; t < kStripRows; ++t, to += p.out_h) {
    if (y + t >= p.out_H) break;
#pragma unroll
    for (int j = 0; j < kStripColumns; ++j) acc[t][j] += bias;
    if (!nhwc && p.out_vectors && x + kStripColumns <= p.out_W) {
      *reinterpret_cast<float4*>(to) = make_float4(acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
      *reinterpret_cast<float4*>(to + 4) = make_float4(acc[t][4], acc[t][5], acc[t][6], acc[t][7]);
    } else {
#pragma unroll
      for (int j = 0; j < kStripColumns; ++j)
        if (x + j < p.out_W) to[j * p.out_w] = acc[t][j];
    }
  }
}

// ---- host side

template <Op op, Variant variant>
cudaError_t launch(Problem const& problem, Plan const&, Arguments const& args, cudaStream_t stream) {
  constexpr bool nhwc = variant == Variant::nhwc, backward = op == Op::dgrad;
  StripRowsTile const t = strip_rows_tile(op, problem, nhwc);
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  int const in_align = backward ? problem.y_align : problem.x_align;
  int const out_align = backward ? problem.x_align : problem.y_align;
  Params p{};
  depthwise::set_turned<op, float>(p, problem, args);
  p.in = static_cast<float const*>(args.a), p.out = static_cast<float*>(args.out);
  p.bias = static_cast<float const*>(args.bias);
  p.in_c = in.c, p.in_w = nhwc ? in.w : 1, p.out_c = out.c, p.out_w = nhwc ? out.w : 1, p.N = problem.N;
  p.groups = t.groups, p.strips = t.strips, p.channels = t.channels, p.images = t.images;
  p.pitch = t.pitch, p.plane_bytes = t.plane_bytes, p.filter_bytes = t.filter_bytes;
  p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w), p.channel_units = int(t.channel_units);
  p.width = 4;
  while (p.width > 1 && (p.pad_w % p.width != 0 || p.in_W % p.width != 0 ||
                         !depthwise::rows_aligned(in, false, in_align, 4 * p.width, 4)))
    p.width /= 2;
  p.out_vectors = !nhwc && depthwise::rows_aligned(out, false, out_align, 16, 4);
  auto* const kernel = gather<nhwc>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(t.blocks()), unsigned(t.threads()), size_t(t.shared_bytes), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::strip_rows

#define CONV2D_EXT_STRIP_ROWS_INSTANCE(family, op, dtype, tm, tn, tk, variant)  \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                     \
    return strip_rows::launch<Op::op, Variant::variant>(p, plan, args, stream); \
  }
