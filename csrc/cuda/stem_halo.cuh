// fprop of a few channels with longer sums (7x7, 11x11), 16 bits and TF32, by wgmma on windows that overlap.
//   y[pixels, K] = windows of x[pixels, chunks] * w[chunks, K]
// Channels are padded to 4 or 8. A chunk is 16 bytes of a row of inputs, and of the sum; core/stem_halo.h says how they
// lie in shared memory so that windows of neighbouring pixels are 16 bytes apart. wgmma's operand without a swizzle is
// rows of 16 bytes, its two chunks any distance apart, so it reads windows where they lie, and no input is copied twice
// (but columns that end an odd row of two-column chunks: the other column must be zero, not a neighbour that may be
// infinite).
//
// A block keeps the filters of its slab of 64 and walks over tiles: it copies a tile's inputs, then each warpgroup
// multiplies and stores 64 pixels at a time. Two or three blocks an SM: one copies, one multiplies. In channels_last
// (nhwc) pixels are the first operand's rows, else filters are.
#pragma once

#include "../core/stem_halo.h"
#include "stem.cuh"

namespace conv2d_ext::stem {

struct HaloParams {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t bias_stride, in_n, in_h, out_n, out_c, out_h, out_w;
  int in_c, in_w, w_in, w_out, w_r, w_s;
  int C, H, W, K, P, Q, R, S, stride_h, stride_w, pad_h, pad_w;
  int rows, columns, pitch, pixels, in_rows, positions, unit;  // of a tile; pixels: rows of its product
  int plane, plane_rows;                                       // chunks of a plane
  int half_at, half_place;    // where chunks of half a row's last two columns lie, their place of `unit`; or -1
  int steps, zeros, filters;  // steps of two chunks; first chunk of zeros, of filters
  int in_row;                 // chunks of a row of the filter
  bool odd;                   // the last chunk is zeros
  int vector;                 // results that are stored together: 16 bytes, or in NCHW two; 1
  int tiles, tiles_h, tiles_w;
  Divisor tiles_h_of, tiles_w_of, positions_of, pitch_of, stride_of, unit_of;
  uint32_t chunks[kStemHaloSteps];     // of a step: the first chunk, and << 16 the distance to the second
  uint8_t places[2 * kStemHaloSteps];  // of a row's chunk, row by row: which chunk of the sum it is
};

// An operand's row of a filter, of a slab: in channels_last a lane has 16 bytes of neighbours.
template <class T, bool nhwc>
__device__ inline int halo_row(int filter) {
  constexpr int near = 8 / int(sizeof(T));  // pairs of neighbours
  return nhwc ? (filter / (8 * near) * near + filter / 2 % near) * 8 + filter / (2 * near) % 4 * 2 + filter % 2
              : filter;
}

template <class T, int channels>
struct HaloChunk {
  static constexpr int length = 16 / int(sizeof(T));
  // Column and channel of an element of a row's chunk.
  __device__ static int column(int chunk, int e) { return (chunk * length + e) / channels; }
  __device__ static int channel(int chunk, int e) { return (chunk * length + e) % channels; }
};

// The filters of a slab as chunks of the sum: lanes read neighbouring elements of a filter.
template <class T, int channels, bool nhwc>
__device__ inline void load_halo_filters(HaloParams const& p, int first, uint4* to) {
  using Chunk = HaloChunk<T, channels>;
  for (int i = int(threadIdx.x); i < p.steps * 128; i += kStemHaloThreads) to[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  constexpr int warps = kStemHaloThreads / 32;
  for (int e = int(threadIdx.x) % 32; e < p.R * p.S * p.C; e += 32) {
    bool const together = p.w_in == 1;
    int const outer = e / (together ? p.C : p.S), inner = e - outer * (together ? p.C : p.S);
    int const whole = outer / (together ? p.S : p.R), middle = outer - whole * (together ? p.S : p.R);
    int const r = together ? whole : middle, s = together ? middle : inner, c = together ? inner : whole;
    int const at = s * channels + c, place = p.places[r * p.in_row + at / Chunk::length];
    T const* const w = static_cast<T const*>(p.w) + (r * p.w_r + s * p.w_s + c * p.w_in);
    T* const chunk = reinterpret_cast<T*>(to + place * 64) + at % Chunk::length;
    T v[64 / warps];
#pragma unroll
    for (int k = 0; k < 64 / warps; ++k) {
      int const filter = first + k * warps + int(threadIdx.x) / 32;
      v[k] = filter < p.K ? w[int64_t(filter) * p.w_out] : narrow<T>(0.f);
    }
#pragma unroll
    for (int k = 0; k < 64 / warps; ++k)
      chunk[halo_row<T, nhwc>(k * warps + int(threadIdx.x) / 32) * Chunk::length] = rounded(v[k]);
  }
}

// A tile's inputs; n, row and column of the first. Where a chunk's elements are neighbours (nhwc) its bounds are looked
// at once; else that costs loads in flight (L05 float16 452 us in place of 343).
template <class T, int channels, bool nhwc>
__device__ inline void load_halo(HaloParams const& p, int64_t n, int h0, int w0, uint4* inputs) {
  using Chunk = HaloChunk<T, channels>;
  T const* const image = static_cast<T const*>(p.in) + n * p.in_n;
  constexpr int at_once = !nhwc && sizeof(T) == 4 ? 4 : 2;
  for (int i0 = int(threadIdx.x); i0 < p.in_rows * p.positions; i0 += at_once * kStemHaloThreads) {
    alignas(16) Vector<T, Chunk::length> v[at_once];
    int to[at_once], half[at_once];
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      int const i = i0 + k * kStemHaloThreads;
      int const row = int(p.positions_of.quotient(uint32_t(i))), chunk = i - row * p.positions, h = h0 + row;
      bool const in_row = row < p.in_rows && unsigned(h) < unsigned(p.H);
      int const w = w0 + Chunk::column(chunk, 0), c0 = Chunk::channel(chunk, 0);
      T const* const from = image + int64_t(h) * p.in_h + (w * p.in_w + c0 * p.in_c);
#pragma unroll
      for (int e = 0; e < Chunk::length; ++e) v[k].v[e] = narrow<T>(0.f);
      auto const load = [&](auto exists) {
#pragma unroll
        for (int e = 0; e < Chunk::length; ++e) {
          int const column = e / channels, c = e % channels;
          if (c0 + c < p.C && exists(column)) v[k].v[e] = from[column * p.in_w + c * p.in_c];
        }
      };
      constexpr int columns = (Chunk::length + channels - 1) / channels;
      if (nhwc && in_row && w >= 0 && w + columns <= p.W)
        load([](int) { return true; });
      else if (!nhwc || (columns > 1 && in_row))
        load([&](int column) { return in_row && unsigned(w + column) < unsigned(p.W); });
#pragma unroll
      for (int e = 0; e < Chunk::length; ++e) v[k].v[e] = rounded(v[k].v[e]);
      int const of_plane = int(p.stride_of.quotient(uint32_t(row))), plane_h = row - of_plane * p.stride_h;
      int const pixel = int(p.unit_of.quotient(uint32_t(chunk))), plane_w = chunk - pixel * p.unit;
      int const at = of_plane * p.pitch + pixel;
      to[k] = row < p.in_rows ? (plane_h * p.unit + plane_w) * p.plane + at : -1;
      half[k] = p.half_at >= 0 && plane_w == p.half_place ? p.half_at + plane_h * p.plane + at : -1;
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      if (to[k] < 0) continue;
      uint4 const words = *reinterpret_cast<uint4 const*>(&v[k]);
      inputs[to[k]] = words;
      if (half[k] >= 0) inputs[half[k]] = make_uint4(words.x, words.y, 0, 0);
    }
  }
}

// channels_last: a lane has vectors of two pixels, of 64 by 64 filters.
template <class T>
__device__ inline void store_halo_filters(HaloParams const& p, T* to, int rows, int columns, int pixel0, int first,
                                          float const* bias, float const (&acc)[32]) {
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32 % 4;
  constexpr int length = 16 / int(sizeof(T));
#pragma unroll
  for (int run = 0; run < 16 / length; ++run) {
    int const filter = (run * 4 + lane % 4) * length;
    alignas(16) float b[length];
#pragma unroll
    for (int i = 0; i < length; i += 4)
      *reinterpret_cast<float4*>(b + i) = *reinterpret_cast<float4 const*>(bias + filter + i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const pixel = pixel0 + warp * 16 + lane / 4 + half * 8, row = int(p.pitch_of.quotient(uint32_t(pixel)));
      int const column = pixel - row * p.pitch;
      if (row >= rows || column >= columns || first + filter >= p.K) continue;
      Vector<T, length> v;
#pragma unroll
      for (int i = 0; i < length; ++i)
        v.v[i] = narrow<T>(acc[(run * length + i / 2 * 2) * 2 + half * 2 + i % 2] + b[i]);
      *reinterpret_cast<Vector<T, length>*>(to + row * p.out_h + column * p.out_w + first + filter) = v;
    }
  }
}

// NCHW: a lane has pairs of two filters' pixels. Of 16 bits lanes exchange them where eight are stored together.
template <class T>
__device__ inline void store_halo_pixels(HaloParams const& p, T* to, int rows, int columns, int pixel0, int first,
                                         float const* bias, float const (&acc)[32]) {
  int const lane = int(threadIdx.x) % 32, filter0 = int(threadIdx.x) / 32 % 4 * 16 + lane / 4;
  bool const exchanged = sizeof(T) == 2 && p.vector == 8;
#pragma unroll
  for (int run = 0; run < 8; run += 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const filter = filter0 + half * 8;
      float const b = bias[filter];
      T* const of_filter = to + (first + filter) * p.out_c;
      Vector<T, 2> pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        pairs[j] = {narrow<T>(acc[(run + j) * 4 + half * 2] + b), narrow<T>(acc[(run + j) * 4 + half * 2 + 1] + b)};
      if (exchanged) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) words[j] = *reinterpret_cast<uint32_t const*>(&pairs[j]);
        transpose_quad(words);
        int const pixel = pixel0 + (run + lane % 4) * 8, row = int(p.pitch_of.quotient(uint32_t(pixel)));
        int const column = pixel - row * p.pitch;
        if (row < rows && column < columns && first + filter < p.K)
          *reinterpret_cast<uint4*>(of_filter + row * p.out_h + column * p.out_w) =
              make_uint4(words[0], words[1], words[2], words[3]);
        continue;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int const pixel = pixel0 + (run + j) * 8, row = int(p.pitch_of.quotient(uint32_t(pixel)));
        int const column = pixel - row * p.pitch + lane % 4 * 2;  // a row's pixels begin at multiples of eight
        if (row >= rows || column >= columns || first + filter >= p.K) continue;
        T* const at = of_filter + row * p.out_h + column * p.out_w;
        if (p.vector > 1) {
          *reinterpret_cast<Vector<T, 2>*>(at) = pairs[j];
        } else {
          at[0] = pairs[j].v[0];
          if (column + 1 < columns) at[p.out_w] = pairs[j].v[1];
        }
      }
    }
  }
}

template <class T, int channels, bool nhwc>
__global__ void __launch_bounds__(kStemHaloThreads, 2) halo_windows(__grid_constant__ HaloParams const p) {
  extern __shared__ __align__(16) char dynamic[];
  uint4* const chunks = reinterpret_cast<uint4*>(dynamic);
  int const first = int(blockIdx.y) * 64, warpgroup = __shfl_sync(~0u, int(threadIdx.x) / 128, 0);
  constexpr int parts = nhwc ? 2 : 1;  // of 64 pixels, that a warpgroup multiplies at a time
  float* const bias = reinterpret_cast<float*>(chunks + p.zeros + 64);
  if (int const i = int(threadIdx.x); i < 64) {
    chunks[p.zeros + i] = make_uint4(0, 0, 0, 0);
    bias[i] =
        p.bias != nullptr && first + i < p.K ? widen(static_cast<T const*>(p.bias)[(first + i) * p.bias_stride]) : 0.f;
  }
  load_halo_filters<T, channels, nhwc>(p, first, chunks + p.filters);
  uint32_t const base = uint32_t(__cvta_generic_to_shared(dynamic)) >> 4;
  constexpr uint64_t layout = uint64_t(128 >> 4) << 32;
  for (int index = int(blockIdx.x); index < p.tiles; index += int(gridDim.x)) {
    int const line = int(p.tiles_w_of.quotient(uint32_t(index))), n = int(p.tiles_h_of.quotient(uint32_t(line)));
    int const row0 = (line - n * p.tiles_h) * p.rows, column0 = (index - line * p.tiles_w) * p.columns;
    load_halo<T, channels, nhwc>(p, n, row0 * p.stride_h - p.pad_h, column0 * p.stride_w - p.pad_w, chunks);
    ptx::fence_proxy_async();
    __syncthreads();
    T* const to = static_cast<T*>(p.out) + n * p.out_n + row0 * p.out_h + column0 * p.out_w;
    int const rows = min(p.rows, p.P - row0), columns = min(p.columns, p.Q - column0);
    for (int pixel0 = warpgroup * 64 * parts; pixel0 < rows * p.pitch; pixel0 += 128 * parts) {
      float acc[parts][32] = {};
      uint32_t filters = base + uint32_t(p.filters) | 64u << 16;
      auto const multiply = [&](uint32_t x, uint32_t to_next) {
#pragma unroll
        for (int i = 0; i < parts; ++i, x += to_next)
          if constexpr (nhwc)
            ptx::wgmma_mma_async<T, false, false>(acc[i], layout | x, layout | filters);
          else
            ptx::wgmma_mma_async<T, false, false>(acc[i], layout | filters, layout | x);
        filters += 128;
      };
#pragma unroll
      for (int i = 0; i < parts; ++i) ptx::wgmma_fence_operand(acc[i]);
      ptx::wgmma_fence();
      uint32_t const from = base + uint32_t(pixel0);
      int const whole = p.steps - p.odd;
#pragma unroll 2
      for (int i = 0; i < whole; ++i) multiply(p.chunks[i] + from, 64);
      // Zeros stay where they are.
      if (p.odd) multiply(p.chunks[whole] + from - (uint32_t(pixel0) << 16), 64 - (64u << 16));
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
#pragma unroll
      for (int i = 0; i < parts; ++i) ptx::wgmma_fence_operand(acc[i]);
#pragma unroll
      for (int i = 0; i < parts; ++i)
        if constexpr (nhwc)
          store_halo_filters<T>(p, to, rows, columns, pixel0 + i * 64, first, bias, acc[i]);
        else
          store_halo_pixels<T>(p, to, rows, columns, pixel0 + i * 64, first, bias, acc[i]);
    }
    __syncthreads();
  }
}

template <DType dtype>
cudaError_t launch_halo(Op op, Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  StemHalo const t = stem_halo(op, problem, h200_sxm);
  StemView const v = stem_view(op, problem);
  HaloParams p{};
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.out = args.out, p.bias_stride = args.bias_stride;
  p.in_n = v.in.n, p.in_c = int(v.in.c), p.in_h = v.in.h, p.in_w = int(v.in.w);
  p.out_n = v.out.n, p.out_c = v.out.c, p.out_h = v.out.h, p.out_w = v.out.w;
  p.w_in = int(v.w_in), p.w_out = int(v.w_out), p.w_r = int(problem.w.h), p.w_s = int(problem.w.w);
  p.C = int(v.C), p.H = int(v.H), p.W = int(v.W), p.K = int(v.K), p.P = int(v.P), p.Q = int(v.Q), p.R = int(problem.R),
  p.S = int(problem.S);
  p.stride_h = int(v.stride_h), p.stride_w = int(v.stride_w), p.pad_h = int(v.pad_h), p.pad_w = int(v.pad_w);
  p.rows = int(t.rows), p.columns = int(t.columns), p.pitch = int(t.pitch);
  p.in_rows = int(t.in_rows), p.positions = int(t.positions), p.unit = int(t.unit);
  p.plane = int(t.plane_rows * t.pitch), p.steps = int(t.chunks / 2), p.in_row = int(t.in_row),
  p.vector = int(t.vector);
  int const halves = p.stride_h * p.unit * p.plane, last = int(t.in_row) - 1;
  p.half_at = t.half ? halves : -1, p.half_place = last % p.unit;
  // Zeros behind the filters: so far behind every window that the distance is positive for pixels beyond a tile, too.
  p.filters = int(t.input_bytes / 16), p.zeros = p.filters + p.steps * 128;
  p.tiles = int(problem.N * t.tiles_h * t.tiles_w), p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w);
  p.tiles_h_of = Divisor(uint32_t(t.tiles_h)), p.tiles_w_of = Divisor(uint32_t(t.tiles_w));
  p.positions_of = Divisor(uint32_t(t.positions)), p.pitch_of = Divisor(uint32_t(t.pitch));
  p.stride_of = Divisor(uint32_t(p.stride_h)), p.unit_of = Divisor(uint32_t(p.unit));
  // Chunks of the sum in the order in which they lie, as the distance to a second one is not negative.
  int count = 0, at[2 * kStemHaloSteps];
  auto const add = [&](int r, int chunk, int from) {
    int const h = r * int(problem.dilation_h), plane = h % p.stride_h;
    p.places[r * p.in_row + chunk] = uint8_t(count);
    at[count++] = from + plane * (from == halves ? 1 : p.unit) * p.plane +
                  (from == halves ? 0 : chunk % p.unit * p.plane) + h / p.stride_h * p.pitch + chunk / p.unit;
  };
  for (int part = 0; part <= int(t.half); ++part)
    for (int plane = 0; plane < p.stride_h * p.unit; ++plane)
      for (int r = 0; r < int(problem.R); ++r)
        for (int chunk = 0; chunk <= last; ++chunk) {
          bool const apart = t.half && chunk == last, here = r * int(problem.dilation_h) % p.stride_h == plane / p.unit;
          if (here && chunk % p.unit == plane % p.unit && apart == (part == 1)) add(r, chunk, part ? halves : 0);
        }
  p.odd = count % 2 != 0;
  if (p.odd) at[count++] = p.zeros;
  for (int step = 0; step < p.steps; ++step)
    p.chunks[step] = uint32_t(at[2 * step]) | uint32_t(at[2 * step + 1] - at[2 * step]) << 16;
  auto* const kernel = t.channels == 4 ? (t.nhwc ? halo_windows<T, 4, true> : halo_windows<T, 4, false>)
                                       : (t.nhwc ? halo_windows<T, 8, true> : halo_windows<T, 8, false>);
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  int64_t const most = max64(1, h200_sxm.sm_count * t.blocks_of_sm / t.slabs),
                blocks = ceil_div(p.tiles, ceil_div(p.tiles, most));
  kernel<<<dim3(unsigned(blocks), unsigned(t.slabs)), kStemHaloThreads, size_t(t.shared_bytes), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::stem

#define CONV2D_EXT_STEM_HALO_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                   \
    return stem::launch_halo<DType::dtype>(Op::op, p, args, stream);          \
  }
