// Depthwise wgrad of few pixels in channels_last in one launch: what such a layer takes is the latency of memory and of
// its code. A block copies all pixels of some channels to shared memory at once, columns as far apart as taps are side
// by side. A thread adds up a run of taps of one row of a filter over its rows of y, four columns at a time, from a
// window of inputs in registers; the threads' sums are added in their order.
#pragma once

#include <cooperative_groups.h>

#include "../core/few_sums.h"
#include "depthwise_few_outputs.cuh"
#include "depthwise_single.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace conv2d_ext::depthwise {

// Pieces of 16 bytes: a row's pixels with zeros beside them.
struct FewSumsSource {
  unsigned char const* data;
  int64_t of_block;  // bytes from one to the next
  uint32_t of_image, of_row, of_piece;
  Divisor by_pitch, by_rows, by_phase;  // pieces of a row in shared memory; rows of an image; pieces of a phase
  int phases;
  int left, pieces;  // pieces of zeros before a row's own
  int channels;      // bytes of a pixel's
  int n, h, c;       // strides in shared memory, in elements; c: of the threads' channels
  int H, W;
  Strides strides;  // in memory, in elements
};

struct FewSumsParams {
  FewSumsSource x, y;
  void* out;
  int64_t w_k, w_r, w_s;
  int C, piece, channels_log2, lanes_log2, S, stride_h, dilation_h, pad_h, pad_w;
  int N, images, stages;  // images of a stage
  int parts, bands_log2, share, band, rows;
  int units, runs, groups;          // runs: of taps, in all; units: of a block
  int bytes_x, bytes, shared_sums;  // of a stage; where the blocks' sums lie
  int each, columns;                // of a phase of a row of y: columns of a segment, and in all
  int phases;                       // the dilation of columns
  Divisor by_units, by_chunks, by_band, by_segments, by_phases;
};

// Of some images, from a row of the first; so many bytes at a time.
template <int bytes>
__device__ inline void copy_pieces(FewSumsSource const& s, int first, int first_row, int images, uint32_t shared) {
  unsigned char const* const from =
      s.data + int64_t(blockIdx.x) * s.of_block + int64_t(first) * s.of_image + int64_t(first_row) * s.of_row;
  int const count = images * int(s.by_rows.value * s.by_pitch.value), here = s.channels - int(blockIdx.x) * 16;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    uint32_t const line = s.by_pitch.quotient(i), image = s.by_rows.quotient(line),
                   row = line - image * s.by_rows.value;
    uint32_t column = i - line * s.by_pitch.value;
    if (s.phases > 1) {
      uint32_t const phase = s.by_phase.quotient(column);
      column = (column - phase * s.by_phase.value) * s.phases + phase;
    }
    uint32_t const piece = column - s.left;
    bool const valid = piece < uint32_t(s.pieces);
    unsigned char const* const pixel =
        from + uint64_t(image) * s.of_image + uint64_t(row) * s.of_row + uint64_t(piece) * s.of_piece;
    if constexpr (bytes == 16) {
      ptx::cp_async_16(shared + i * 16, pixel, valid);
    } else {
#pragma unroll
      for (int part = 0; part < 16; part += bytes)
        ptx::cp_async_ca<bytes>(shared + i * 16 + part, pixel + part, valid && part < here);
    }
  }
}

// A thread's channels of a pixel in shared memory.
template <class T, int V>
__device__ inline void load_pixel(T const* from, float (&to)[V]) {
  widen_word<T, V>(*reinterpret_cast<uint32_t const*>(from), to);
}

// Product by product: where zeros beside the images have made a NaN.
template <class T>
__device__ __forceinline__ float exact_few_pixels(FewSumsParams const& p, int k, int r, int s, int stride_w) {
  T const* const x = reinterpret_cast<T const*>(p.x.data) + k * p.x.strides.c;
  T const* const y = reinterpret_cast<T const*>(p.y.data) + k * p.y.strides.c;
  float sum = 0;
#pragma unroll 1
  for (int line = 0; line < p.N * p.y.H; ++line) {
    int const n = line / p.y.H, row = line - n * p.y.H, h = row * p.stride_h - p.pad_h + r * p.dilation_h;
    if (unsigned(h) >= unsigned(p.x.H)) continue;
#pragma unroll 1
    for (int q = 0; q < p.y.W; ++q) {
      int const w = q * stride_w - p.pad_w + s * p.phases;
      if (unsigned(w) < unsigned(p.x.W))
        sum += widen(x[n * p.x.strides.n + h * p.x.strides.h + w * p.x.strides.w]) *
               widen(y[n * p.y.strides.n + row * p.y.strides.h + q * p.y.strides.w]);
    }
    if (sum != sum) return sum;  // NaN, whatever comes
  }
  return sum;
}

// S: taps of a thread.
template <class T, int S, int stride>
__global__ void __launch_bounds__(kFewSumsThreads, 1) wgrad_few_pixels(__grid_constant__ FewSumsParams const p) {
  constexpr int V = 4 / int(sizeof(T));      // channels of a thread
  constexpr int next = 16 / int(sizeof(T));  // from one column to the next
  constexpr int columns = kFewSumsColumns, window = (columns - 1) * stride + S, kept = S > stride ? S - stride : 0;
  extern __shared__ __align__(16) unsigned char few_sums_shared[];
  uint32_t const shared = ptx::shared_address(few_sums_shared);
  int const lane = int(threadIdx.x) & ((1 << p.lanes_log2) - 1), worker = int(threadIdx.x) >> p.lanes_log2;
  int const group = int(p.by_units.quotient(worker)), first = int(blockIdx.y) * p.units;
  int const unit = first + worker - group * p.units;
  int const r = int(p.by_chunks.quotient(unit)), s0 = (unit - r * int(p.by_chunks.value)) * S;
  bool const works = group < p.groups && unit < p.runs;
  // The block's images and rows of y; the first rows that it copies.
  int const part = int(blockIdx.z), begin = (part >> p.bands_log2) * p.share, end = min(p.N, begin + p.share);
  int const begin_y = (part & ((1 << p.bands_log2) - 1)) * p.band, first_y = min(begin_y, p.y.H - p.band);
  int const first_x = min(max(0, begin_y * p.stride_h - p.pad_h), p.x.H - p.rows);
  if (p.parts > 1) ptx::barrier_cluster_arrive();
  float total[S][V] = {};
#pragma unroll 1
  for (int stage = -1, image = begin - p.images; stage < p.stages; ++stage, image += p.images) {
    if (stage + 1 < p.stages) {
      int const copied = image + p.images, images = min(p.images, end - copied);
      uint32_t const to = shared + ((stage + 1) & 1) * p.bytes;
      auto copy = [&]<int bytes>() {
        copy_pieces<bytes>(p.x, copied, first_x, images, to);
        copy_pieces<bytes>(p.y, copied, first_y, images, to + p.bytes_x);
      };
      if (p.piece == 16)
        copy.template operator()<16>();
      else if (p.piece == 8)
        copy.template operator()<8>();
      else
        copy.template operator()<4>();
    }
    ptx::cp_async_commit_group();
    if (stage < 0) continue;
    ptx::cp_async_wait_group<1>();
    __syncthreads();
    T const* const x = reinterpret_cast<T const*>(few_sums_shared + (stage & 1) * p.bytes);
    T const* const y = reinterpret_cast<T const*>(few_sums_shared + (stage & 1) * p.bytes + p.bytes_x);
    int const items = works ? min(p.images, end - image) * p.band * int(p.by_segments.value) : 0;
    float acc[S][V] = {};
#pragma unroll 1
    for (int item = group; item < items; item += p.groups) {
      int const line = int(p.by_segments.quotient(item)), segment = item - line * int(p.by_segments.value);
      int const run = int(p.by_phases.quotient(segment)), phase = segment - run * p.phases, begin_q = run * p.each;
      int const n = int(p.by_band.quotient(line)), row = begin_y + line - n * p.band;
      int const h = row * p.stride_h - p.pad_h + r * p.dilation_h;
      if (unsigned(h) >= unsigned(p.x.H) || row >= p.y.H) continue;
      T const* from = x + n * p.x.n + (h - first_x) * p.x.h + lane * p.x.c +
                      (phase * int(p.x.by_phase.value) + begin_q * stride + s0) * next;
      T const* from_y =
          y + n * p.y.n + (row - first_y) * p.y.h + lane * p.y.c + (phase * int(p.y.by_phase.value) + begin_q) * next;
      int const end_q = min(begin_q + p.each, p.columns);
      float v[window][V];
      auto load = [&](int j) { load_pixel<T, V>(from + j * next, v[j]); };
#pragma unroll
      for (int j = 0; j < kept; ++j) load(j);
#pragma unroll 1
      for (int q = begin_q; q < end_q; q += columns) {
        float gradient[columns][V];
#pragma unroll
        for (int e = 0; e < columns; ++e) load_pixel<T, V>(from_y + e * next, gradient[e]);
#pragma unroll
        for (int j = kept; j < window; ++j) load(j);
#pragma unroll
        for (int e = 0; e < columns; ++e)
#pragma unroll
          for (int i = 0; i < S * V; ++i) acc[i / V][i % V] += v[e * stride + i / V][i % V] * gradient[e][i % V];
#pragma unroll
        for (int i = 0; i < kept * V; ++i) v[i / V][i % V] = v[i / V + columns * stride][i % V];
        from += columns * stride * next, from_y += columns * next;
      }
    }
#pragma unroll
    for (int i = 0; i < S * V; ++i) total[i / V][i % V] += acc[i / V][i % V];
    __syncthreads();  // the stage has been read
  }
  float* const sums = reinterpret_cast<float*>(few_sums_shared);
  if (works)
#pragma unroll
    for (int i = 0; i < S * V; ++i)
      sums[((worker * S + i / V) << p.channels_log2) + lane * V + i % V] = total[i / V][i % V];
  __syncthreads();

  // Sums of the threads, and of the cluster's blocks by the first of them, in their order.
  int const count = (p.units * S) << p.channels_log2;
  float* blocks = reinterpret_cast<float*>(few_sums_shared + p.shared_sums);
  auto add = [&](float const* from, int i, int terms) {
    float sum = from[i];
#pragma unroll 4
    for (int other = 1; other < terms; ++other) sum += from[other * count + i];
    return sum;
  };
  if (p.parts > 1) {
    ptx::barrier_cluster_wait();  // all blocks run
    float* const to = cooperative_groups::this_cluster().map_shared_rank(blocks, 0) + part * count;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) to[i] = add(sums, i, p.groups);
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
    if (part > 0) return;
  } else {
    blocks = sums;
  }
  int const terms = p.parts > 1 ? p.parts : p.groups;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    int const tap = i >> p.channels_log2, run = first + tap / S, row = int(p.by_chunks.quotient(run));
    int const s = tap % S + (run - row * int(p.by_chunks.value)) * S;
    if (s >= p.S || run >= p.runs) continue;
    int const k = (int(blockIdx.x) << p.channels_log2) + (i & ((1 << p.channels_log2) - 1));
    if (k >= p.C) continue;
    float sum = add(blocks, i, terms);
    if (sum != sum) sum = exact_few_pixels<T>(p, k, row, s, stride);
    static_cast<T*>(p.out)[k * p.w_k + row * p.w_r + s * p.w_s] = narrow<T>(sum);
  }
}

// ---- host side

template <DType dtype>
cudaError_t launch_few_sums(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  FewSumsTile const t = few_sums_tile(problem);
  if (!t.used) return cudaErrorInvalidValue;
  constexpr int size = int(sizeof(T));
  auto log2_of = [](int v) {
    int log2 = 0;
    while (1 << log2 < v) ++log2;
    return log2;
  };
  auto source = [&](void const* data, Strides const& s, int64_t H, int64_t W, int rows, int pitch, int phase,
                    int64_t left) {
    FewSumsSource f{};
    f.data = static_cast<unsigned char const*>(data), f.strides = s, f.H = int(H), f.W = int(W);
    f.by_pitch = Divisor(uint32_t(pitch)), f.by_rows = Divisor(uint32_t(rows));
    f.by_phase = Divisor(uint32_t(phase)), f.phases = t.phases;
    f.pieces = int(W), f.left = int(left);
    f.channels = int(problem.C) * size;
    f.of_block = t.channels * size, f.of_image = uint32_t(s.n * size);
    f.of_piece = uint32_t(s.w * size), f.of_row = uint32_t(s.h * size);
    f.h = pitch * t.channels, f.n = rows * pitch * t.channels, f.c = 4 / size;
    return f;
  };
  FewSumsParams p{};
  p.x = source(args.a, problem.x, problem.H, problem.W, t.rows, t.pitch, t.phase, problem.pad_left);
  p.y = source(args.b, problem.y, problem.P(), problem.Q(), t.band, t.pitch_y, t.phase_y, 0);
  p.out = args.out, p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.C = int(problem.C), p.piece = t.piece;
  p.channels_log2 = log2_of(t.channels), p.lanes_log2 = log2_of(t.lanes), p.S = int(problem.S);
  p.stride_h = int(problem.stride_h), p.dilation_h = int(problem.dilation_h);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.units = t.units, p.runs = int(problem.R) * t.chunks, p.groups = t.groups;
  p.N = int(problem.N), p.images = t.images, p.stages = t.stages;
  p.bytes_x = int(t.bytes_x), p.bytes = int(t.bytes_x + t.bytes_y);
  p.by_units = Divisor(uint32_t(t.units)), p.by_chunks = Divisor(uint32_t(t.chunks));
  p.by_band = Divisor(uint32_t(t.band)), p.by_segments = Divisor(uint32_t(t.segments)), p.each = t.each;
  p.phases = t.phases, p.by_phases = Divisor(uint32_t(t.phases));
  p.columns = int(ceil_div(problem.Q(), t.phases));
  p.parts = t.shares * t.bands, p.bands_log2 = log2_of(t.bands), p.share = t.share, p.band = t.band, p.rows = t.rows;
  p.shared_sums = int(t.shared_bytes - (p.parts > 1 ? p.parts * t.sums * 4 : 0));
  auto start = [&](auto* kernel) {
    int const bytes = int(t.shared_bytes);
    if (bytes > 48 * 1024)
      if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
        return error;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(ceil_div(problem.C, t.channels)), unsigned(t.slices), unsigned(p.parts));
    config.blockDim = dim3(unsigned(t.threads)), config.dynamicSmemBytes = size_t(bytes), config.stream = stream;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = 1, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = unsigned(p.parts);
    config.attrs = &cluster, config.numAttrs = p.parts > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, p);
  };
  bool const strided = problem.stride_w == 2;
  if (t.taps == 1) return start(strided ? wgrad_few_pixels<T, 1, 2> : wgrad_few_pixels<T, 1, 1>);
  if (t.taps == 3) return start(strided ? wgrad_few_pixels<T, 3, 2> : wgrad_few_pixels<T, 3, 1>);
  if (t.taps == 5) return start(strided ? wgrad_few_pixels<T, 5, 2> : wgrad_few_pixels<T, 5, 1>);
  return start(strided ? wgrad_few_pixels<T, 7, 2> : wgrad_few_pixels<T, 7, 1>);
}

}  // namespace conv2d_ext::depthwise

#define CONV2D_EXT_DEPTHWISE_FEW_SUMS_INSTANCE(family, op, dtype, tm, tn, tk, variant)     \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                \
    if (takes_single<false>(Op::op, p))                                                    \
      return depthwise::launch_single<Op::op, DType::dtype, false>(p, plan, args, stream); \
    return depthwise::launch_few_sums<DType::dtype>(p, args, stream);                      \
  }
