// fprop of few whole vectors of channels (3x3 of 8 to 64), channels_last, 16 bits and TF32, by wgmma on windows that
// overlap. dgrad of stride one is the same with mirrored filters.
//   y[pixels, K] = windows of x[pixels, chunks] * w[chunks, K]
// A chunk is 16 bytes of a pixel's channels; core/stem_vectors.h says how they lie in shared memory so that windows of
// neighbouring pixels are 16 bytes apart. wgmma's operand without a swizzle is rows of 16 bytes, its two chunks any
// distance apart, so it reads windows where they lie, and no input is copied twice (see stem_halo.cuh, which gathers
// other channels).
//
// A block keeps the filters of its slab and walks over tiles: while it multiplies one, the next one's inputs are copied
// by cp.async where shared memory has room for two. A warpgroup multiplies and stores 64 pixels at a time, or twice 64.
#pragma once

#include "../core/stem_vectors.h"
#include "stem.cuh"

namespace conv2d_ext::stem {

struct VectorsParams {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t bias_stride, in_n, in_h, out_n, out_h, out_w;
  int in_w, w_in, w_out;
  int H, W, K, P, Q, stride_h, stride_w, pad_h, pad_w;
  int rows, columns, pitch, plane, in_rows, positions, lines;  // of a tile; positions: chunks of a row of inputs
  int stage, stages;                                           // chunks of a tile's inputs
  int filters, zeros;                                          // first chunk of filters, of zeros
  int chunks, steps;                                           // of the sum; of two
  int tiles, tiles_h, tiles_w;
  bool w_vectors;  // filters are read as chunks
  Divisor tiles_h_of, tiles_w_of, in_rows_of, pitch_of, stride_h_of, stride_w_of, lines_of;
  uint32_t pairs[kStemVectorsChunks / 2];  // the first chunk, and << 16 the distance to the second
  int taps[kStemVectorsChunks];            // where a chunk of the sum lies in a filter
};

// A lane's results of a pixel are neighbours: the filter that is an operand's row of a slab.
template <class T>
__device__ inline int vectors_filter(int row) {
  constexpr int near = 8 / int(sizeof(T));  // pairs of neighbours
  return (row / (8 * near) * 4 + row / 2 % 4) * 2 * near + row / 8 % near * 2 + row % 2;
}

// The filters of a slab as chunks of the sum: eight lanes have an operand's rows, four their chunks. Past L1
// (cp.async) this took 2 us more: a line's other chunks are read with other taps'.
template <class T, int filters>
__device__ inline void load_vectors_filters(VectorsParams const& p, int first, uint4* to) {
  constexpr int length = 16 / int(sizeof(T)), at_once = 4;
  int const all = (p.chunks + 3) / 4 * (filters / 8) * 32;
  for (int i0 = int(threadIdx.x); i0 < all; i0 += at_once * kStemVectorsThreads) {
    alignas(16) Vector<T, length> v[at_once];
    int at[at_once];
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      int const i = i0 + k * kStemVectorsThreads, row = i / 32 % (filters / 8) * 8 + i % 8;
      int const chunk = i / 32 / (filters / 8) * 4 + i / 8 % 4, filter = first + vectors_filter<T>(row);
      bool const exists = chunk < p.chunks && filter < p.K;
      at[k] = chunk < 2 * p.steps ? chunk * filters + row : -1;
      T const* const from = static_cast<T const*>(p.w) + (exists ? filter * p.w_out + p.taps[chunk] : 0);
#pragma unroll
      for (int e = 0; e < length; ++e) v[k].v[e] = narrow<T>(0.f);
      if (!exists) continue;
      if (p.w_vectors) {
        v[k] = *reinterpret_cast<Vector<T, length> const*>(from);
      } else {
#pragma unroll
        for (int e = 0; e < length; ++e) v[k].v[e] = from[e * p.w_in];
      }
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      if (at[k] < 0) continue;
#pragma unroll
      for (int e = 0; e < length; ++e) v[k].v[e] = rounded(v[k].v[e]);
      to[at[k]] = *reinterpret_cast<uint4 const*>(&v[k]);
    }
  }
}

// Begins to copy a tile's inputs; n, row and column of the first. A warp has neighbouring rows of 32 of their chunks.
template <class T>
__device__ inline void copy_vectors(VectorsParams const& p, int64_t n, int h0, int w0, uint32_t to) {
  constexpr int length = 16 / int(sizeof(T)), warps = kStemVectorsThreads / 32;
  T const* const image = static_cast<T const*>(p.in) + n * p.in_n;
  int const warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), runs = (p.positions + 31) / 32;
  int const items = p.in_rows * runs, end = (warp + 1) * items / warps;
  int item = warp * items / warps, run = int(p.in_rows_of.quotient(uint32_t(item))), row = item - run * p.in_rows;
  while (item < end) {
    int const place = run * 32 + int(threadIdx.x) % 32;
    int const column = int(p.lines_of.quotient(uint32_t(place))), line = place - column * p.lines;
    int const column_at = int(p.stride_w_of.quotient(uint32_t(column))), phase_w = column - column_at * p.stride_w;
    int const w = w0 + column;
    bool const in_row = unsigned(w) < unsigned(p.W);
    T const* const from = image + (in_row ? w * p.in_w + line * length : 0);
    uint32_t const lane_to = to + uint32_t((phase_w * p.lines + line) * p.plane + column_at) * 16;
    int const rows = min(p.in_rows, row + end - item);
    item += rows - row;
    if (place < p.positions) {
      for (; row < rows; ++row) {
        int const row_at = int(p.stride_h_of.quotient(uint32_t(row))), phase_h = row - row_at * p.stride_h,
                  h = h0 + row;
        bool const exists = unsigned(h) < unsigned(p.H);
        ptx::cp_async_16(lane_to + uint32_t(phase_h * p.stride_w * p.lines * p.plane + row_at * p.pitch) * 16,
                         from + (exists ? int64_t(h) * p.in_h : 0), exists && in_row);
      }
    }
    row = 0, ++run;
  }
}

// A lane has vectors of two pixels, of 64 by `filters` filters.
template <class T, int filters>
__device__ inline void store_vectors(VectorsParams const& p, T* to, int rows, int columns, int pixel0, int first,
                                     float const* bias, float const (&acc)[filters / 2]) {
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32 % 4;
  constexpr int length = 16 / int(sizeof(T));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const pixel = pixel0 + warp * 16 + lane / 4 + half * 8, row = int(p.pitch_of.quotient(uint32_t(pixel)));
    int const column = pixel - row * p.pitch;
    if (row >= rows || column >= columns) continue;
    T* const of_pixel = to + row * p.out_h + column * p.out_w;
#pragma unroll
    for (int run = 0; run < filters / 4 / length; ++run) {
      int const filter = (run * 4 + lane % 4) * length;
      if (first + filter >= p.K) continue;
      alignas(16) Vector<T, length> v;
#pragma unroll
      for (int i = 0; i < length; ++i)
        v.v[i] = narrow<T>(acc[(run * length + i / 2 * 2) * 2 + half * 2 + i % 2] + bias[filter + i]);
      *reinterpret_cast<Vector<T, length>*>(of_pixel + first + filter) = v;
    }
  }
}

template <class T, int filters, int parts>
__global__ void __launch_bounds__(kStemVectorsThreads, filters == 32 ? 3 : 2)
    vectors_windows(__grid_constant__ VectorsParams const p) {
  extern __shared__ __align__(16) char dynamic[];
  uint4* const chunks = reinterpret_cast<uint4*>(dynamic);
  int const first = int(blockIdx.y) * filters, warpgroup = __shfl_sync(~0u, int(threadIdx.x) / 128, 0);
  uint32_t const shared = ptx::shared_address(dynamic), base = shared >> 4;
  float* const bias = reinterpret_cast<float*>(chunks + p.zeros + 64);
  struct Tile {
    int n, row, column;
  };
  auto const tile = [&](int index) {
    int const line = int(p.tiles_w_of.quotient(uint32_t(index))), n = int(p.tiles_h_of.quotient(uint32_t(line)));
    return Tile{n, (line - n * p.tiles_h) * p.rows, (index - line * p.tiles_w) * p.columns};
  };
  auto const copy = [&](int index, int stage) {
    if (index < p.tiles) {
      Tile const t = tile(index);
      copy_vectors<T>(p, t.n, t.row * p.stride_h - p.pad_h, t.column * p.stride_w - p.pad_w,
                      shared + uint32_t(stage * p.stage) * 16);
    }
    ptx::cp_async_commit_group();
  };
  copy(int(blockIdx.x), 0);
  load_vectors_filters<T, filters>(p, first, chunks + p.filters);
  if (int const i = int(threadIdx.x); i < 64) {
    chunks[p.zeros + i] = make_uint4(0, 0, 0, 0);
    if (i < filters)
      bias[i] = p.bias != nullptr && first + i < p.K ? widen(static_cast<T const*>(p.bias)[(first + i) * p.bias_stride])
                                                     : 0.f;
  }
  constexpr uint64_t layout = uint64_t(128 >> 4) << 32;
  int stage = 0;
  for (int index = int(blockIdx.x); index < p.tiles; index += int(gridDim.x)) {
    int const next = index + int(gridDim.x);
    if (p.stages == 2)
      copy(next, 1 - stage), ptx::cp_async_wait_group<1>();
    else
      ptx::cp_async_wait_group<0>();
    if constexpr (sizeof(T) == 4) {
      __syncthreads();
      for (int i = int(threadIdx.x); i < p.stage; i += kStemVectorsThreads) {
        uint4* const at = chunks + stage * p.stage + i;
        alignas(16) Vector<T, 4> v = *reinterpret_cast<Vector<T, 4> const*>(at);
#pragma unroll
        for (int e = 0; e < 4; ++e) v.v[e] = rounded(v.v[e]);
        *at = *reinterpret_cast<uint4 const*>(&v);
      }
    }
    ptx::fence_proxy_async();
    __syncthreads();
    Tile const t = tile(index);
    T* const to = static_cast<T*>(p.out) + t.n * p.out_n + t.row * p.out_h + t.column * p.out_w;
    int const rows = min(p.rows, p.P - t.row), columns = min(p.columns, p.Q - t.column);
    for (int pixel0 = warpgroup * 64 * parts; pixel0 < rows * p.pitch; pixel0 += 128 * parts) {
      float acc[parts][filters / 2] = {};
      uint32_t const from = base + uint32_t(stage * p.stage + pixel0);
#pragma unroll
      for (int i = 0; i < parts; ++i) ptx::wgmma_fence_operand(acc[i]);
      ptx::wgmma_fence();
      uint32_t operand = base + uint32_t(p.filters) | uint32_t(filters) << 16;
#pragma unroll 2
      for (int step = 0; step < p.steps; ++step, operand += 2 * filters) {
        // Zeros stay where they are.
        bool const odd = 2 * step + 1 == p.chunks;
        uint32_t x = p.pairs[step] + from - (odd ? uint32_t(stage * p.stage + pixel0) << 16 : 0);
#pragma unroll
        for (int i = 0; i < parts; ++i, x += odd ? 64 - (64u << 16) : 64)
          ptx::wgmma_mma_async<T, false, false>(acc[i], layout | x, layout | operand);
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
#pragma unroll
      for (int i = 0; i < parts; ++i) ptx::wgmma_fence_operand(acc[i]);
#pragma unroll
      for (int i = 0; i < parts; ++i)
        store_vectors<T, filters>(p, to, rows, columns, pixel0 + i * 64, first, bias, acc[i]);
    }
    __syncthreads();
    if (p.stages == 2)
      stage = 1 - stage;
    else
      copy(next, 0);
  }
}

template <DType dtype>
cudaError_t launch_vectors(Op op, Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  StemVectors const t = stem_vectors(op, problem, h200_sxm);
  StemView const v = stem_view(op, problem);
  VectorsParams p{};
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.out = args.out, p.bias_stride = args.bias_stride;
  p.in_n = v.in.n, p.in_h = v.in.h, p.in_w = int(v.in.w), p.out_n = v.out.n, p.out_h = v.out.h, p.out_w = v.out.w;
  p.w_in = int(v.w_in), p.w_out = int(v.w_out);
  p.H = int(v.H), p.W = int(v.W), p.K = int(v.K), p.P = int(v.P), p.Q = int(v.Q);
  p.stride_h = int(v.stride_h), p.stride_w = int(v.stride_w), p.pad_h = int(v.pad_h), p.pad_w = int(v.pad_w);
  p.rows = int(t.rows), p.columns = int(t.columns), p.pitch = int(t.pitch), p.plane = int(t.plane);
  p.in_rows = int(t.in_rows), p.positions = int(t.in_columns * t.lines), p.lines = int(t.lines);
  p.stage = int(t.stage_bytes / 16), p.stages = int(t.stages), p.filters = p.stage * p.stages;
  p.zeros = p.filters + int(t.chunks * t.filters);
  p.tiles = int(problem.N * t.tiles_h * t.tiles_w), p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w);
  p.tiles_h_of = Divisor(uint32_t(t.tiles_h)), p.tiles_w_of = Divisor(uint32_t(t.tiles_w));
  p.in_rows_of = Divisor(uint32_t(t.in_rows)), p.pitch_of = Divisor(uint32_t(t.pitch));
  p.stride_h_of = Divisor(uint32_t(p.stride_h)), p.stride_w_of = Divisor(uint32_t(p.stride_w));
  p.lines_of = Divisor(uint32_t(p.lines));
  auto const whole = [&](int64_t stride) { return stride % t.vector == 0; };
  p.w_vectors = v.w_in == 1 && whole(v.w_out) && whole(problem.w.h) && whole(problem.w.w) &&
                reinterpret_cast<uintptr_t>(args.b) % 16 == 0;
  // Chunks of the sum in the order in which they lie, as the distance to a second one is not negative.
  int at[kStemVectorsChunks + 1];
  for (int r = 0; r < int(problem.R); ++r)
    for (int s = 0; s < int(problem.S); ++s)
      for (int line = 0; line < p.lines; ++line) {
        int const h = r * int(problem.dilation_h), w = s * int(problem.dilation_w);
        int const here = ((h % p.stride_h * p.stride_w + w % p.stride_w) * p.lines + line) * p.plane +
                         h / p.stride_h * p.pitch + w / p.stride_w;
        int const tap_r = v.mirrored ? int(problem.R) - 1 - r : r, tap_s = v.mirrored ? int(problem.S) - 1 - s : s;
        int i = p.chunks++;
        for (; i > 0 && at[i - 1] > here; --i) at[i] = at[i - 1], p.taps[i] = p.taps[i - 1];
        at[i] = here;
        p.taps[i] = tap_r * int(problem.w.h) + tap_s * int(problem.w.w) + line * int(t.vector) * p.w_in;
      }
  if (p.chunks % 2 != 0) at[p.chunks] = p.zeros;
  p.steps = int(t.chunks / 2);
  for (int step = 0; step < p.steps; ++step)
    p.pairs[step] = uint32_t(at[2 * step]) | uint32_t(at[2 * step + 1] - at[2 * step]) << 16;
  auto* const kernel = t.filters == 32 ? (t.twice ? vectors_windows<T, 32, 2> : vectors_windows<T, 32, 1>)
                                       : (t.twice ? vectors_windows<T, 64, 2> : vectors_windows<T, 64, 1>);
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  int64_t const most = max64(1, h200_sxm.sm_count * t.blocks_of_sm / t.slabs),
                blocks = ceil_div(p.tiles, ceil_div(p.tiles, most));
  kernel<<<dim3(unsigned(blocks), unsigned(t.slabs)), kStemVectorsThreads, size_t(t.shared_bytes), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::stem

#define CONV2D_EXT_STEM_VECTORS_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                      \
    return stem::launch_vectors<DType::dtype>(Op::op, p, args, stream);          \
  }
