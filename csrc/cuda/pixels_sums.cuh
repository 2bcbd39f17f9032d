// wgrad of 1x1 filters in channels_last without gaps, any number of channels: w[k, c] = sum over pixels of y[pixel, k]
// * x[pixel, c]. Rows of pixels need not begin at vectors, but 64 of them always do. The rows of a tile are channels of
// the tensor that has more of them.
//
// A warp has the copy engine bring 64 pixels of both tensors as they lie, in a ring of stages. Eight warps make
// fragments for mma.sync of words of two channels: those of two pixels are two words of the reduction, whose order is
// free, and a tile's channels are numbered so that the two are rows of one instruction, or columns of two that a warp
// has next to each other. Of odd numbers of channels, whose words lie across those of memory, every element is loaded
// by itself, and so is every float, which is rounded to TF32. What lies behind a pixel's last channel is multiplied
// too, for sums that are not stored. Warps that a few columns leave without any take turns with the others at the
// stages, and these add their sums. The blocks of a tile take turns with the stages' pixels; their sums go to the
// workspace, and reduce_kernel adds them in the order of the blocks.
#pragma once

#include "../core/pixel_lines.h"
#include "give_back.cuh"
#include "spread.cuh"
#include "tma.cuh"

namespace conv2d_ext::pixel_sums {

constexpr int kWarps = 8;  // that multiply
constexpr int kThreads = (kWarps + 1) * 32;
constexpr int kReduceLanes = 32, kReduceParts = 8;

template <int TM, int TN>
struct Shape {
  static constexpr int warp_m = TM >= 128 ? 64 : 32, warp_n = TM * TN / (kWarps * warp_m), warps_n = TN / warp_n;
  static_assert(warp_n % 16 == 0 && TM / warp_m * warps_n == kWarps);
};

struct Params {
  void const *a, *b;
  float* parts;
  int64_t pixels;
  int32_t M, N, tiles_n, tiles, split, units, stages, stage_bytes, turns;
};

struct Barriers {
  uint64_t full[kSumsMostStages], empty[kSumsMostStages];
  uint64_t rest;  // what threads have put behind the last pixels
};

// A unit's pixels as they lie in memory.
struct Pixels {
  uint8_t const* from;
  int bytes;
  // pixel: its bytes.
  __device__ Pixels(void const* tensor, int64_t first, int count, int pixel)
      : from(static_cast<uint8_t const*>(tensor) + first * pixel), bytes(count * pixel) {}
  __device__ int by_engine() const { return bytes & ~15; }  // which moves multiples of 16 bytes
  // What the engine leaves, and zeros for the pixels that are not there.
  __device__ void rest(uint32_t to, int pixel) const {
    for (int at = by_engine() + int(threadIdx.x) % 32 * 2; at < kLinesPixels * pixel; at += 64)
      ptx::st_shared_u16(to + at, at < bytes ? *reinterpret_cast<uint16_t const*>(from + at) : uint16_t(0));
  }
};

// element: bytes.
template <int element>
__device__ inline void copy(Params const& p, uint32_t ring, Barriers& barriers) {
  int const lane = int(threadIdx.x) % 32, a_pixel = p.M * element, b_pixel = p.N * element;
  uint32_t const b_at = uint32_t(a_pixel) * kLinesPixels;
  Stage stage;
  for (int unit = int(blockIdx.x) / p.tiles; unit < p.units; unit += p.split) {
    int64_t const first = int64_t(unit) * kLinesPixels;
    int const count = int(min(p.pixels - first, int64_t(kLinesPixels)));
    Pixels const a(p.a, first, count, a_pixel), b(p.b, first, count, b_pixel);
    uint64_t* const full = &barriers.full[stage.index];
    uint32_t const to = ring + stage.index * p.stage_bytes;
    ptx::mbarrier_wait(&barriers.empty[stage.index], stage.parity ^ 1);  // passes on the first trip round the ring
    if (unit + 1 == p.units) {
      a.rest(to, a_pixel), b.rest(to + b_at, b_pixel);
      ptx::mbarrier_arrive(&barriers.rest);
    }
    __syncwarp();  // all lanes have seen the stage empty before it is filled, or one might miss two phases
    if (lane == 0) {
      ptx::mbarrier_arrive_expect_tx(full, a.by_engine() + b.by_engine());
      if (a.by_engine() > 0) ptx::cp_async_bulk(to, a.from, a.by_engine(), full);
      if (b.by_engine() > 0) ptx::cp_async_bulk(to + b_at, b.from, b.by_engine(), full);
    }
    stage.advance(p.stages);
  }
}

// Of 16 channels, lane / 4 * 2 and the next: v[half] of one of them, words of two pixels each.
template <bool even>
__device__ inline void load(uint32_t (&v)[2][2], uint32_t const (&at)[4], uint32_t offset) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t const p = at[i * 2] + offset, q = at[i * 2 + 1] + offset;
    if constexpr (even) {
      uint32_t const a = ptx::ld_shared(p), b = ptx::ld_shared(q);
      v[0][i] = __byte_perm(a, b, 0x5410), v[1][i] = __byte_perm(a, b, 0x7632);
    } else {
      v[0][i] = __byte_perm(ptx::ld_shared_u16(p), ptx::ld_shared_u16(q), 0x5410);
      v[1][i] = __byte_perm(ptx::ld_shared_u16(p + 2), ptx::ld_shared_u16(q + 2), 0x5410);
    }
  }
}

// Of 16 channels, lane / 4 and eight on: v[half] of one of them, pixels t and t + 4.
__device__ inline void load_floats(uint32_t (&v)[2][2], uint32_t const (&at)[2], uint32_t offset) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      v[half][i] = ptx::cvt_rn_tf32(__uint_as_float(ptx::ld_shared(at[i] + offset + half * 32)));
}

template <class T, int TM, int TN, bool even_a, bool even_b>
__device__ void multiply(Params const& p, uint32_t ring, Barriers& barriers) {
  using S = Shape<TM, TN>;
  constexpr int rows = S::warp_m / 16, columns = S::warp_n / 16;
  int const warp = warp_uniform(int(threadIdx.x) / 32), lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  int const tile = int(blockIdx.x) % p.tiles, part = int(blockIdx.x) / p.tiles;
  int const across = S::warps_n / p.turns, turn = warp % S::warps_n / across;  // warps that columns are shared out to
  int const m = warp / S::warps_n * S::warp_m, n = warp % across * S::warp_n;
  int const first_m = tile / p.tiles_n * TM + m, first_n = tile % p.tiles_n * TN + n;
  bool const needed = first_m < p.M && first_n < p.N;
  constexpr bool floats = sizeof(T) == 4;
  constexpr int element = sizeof(T), depth = 32 / element, quads = depth / 4;         // pixels of an instruction
  uint32_t const a_step = uint32_t(p.M) * element, b_step = uint32_t(p.N) * element;  // bytes of a pixel
  uint32_t const a_from = ring + t * a_step + first_m * element + g * 4;
  uint32_t const b_from = ring + a_step * kLinesPixels + t * b_step + first_n * element + g * 4;
  float acc[rows][columns][2][4] = {};
  Stage stage;
  int until = turn;
  for (int unit = part; unit < p.units; unit += p.split) {
    ptx::mbarrier_wait(&barriers.full[stage.index], stage.parity);
    if (unit + 1 == p.units) ptx::mbarrier_wait(&barriers.rest, 0);
    uint32_t words = 0;
    if (needed && until-- == 0) {
      until = p.turns - 1;
      uint32_t const from = stage.index * p.stage_bytes;
#pragma unroll
      for (int step = 0; step < kLinesPixels / depth; ++step) {
        uint32_t a_at[quads], b_at[quads];  // pixels t, t + 4 and so on
#pragma unroll
        for (int i = 0; i < quads; ++i) {
          a_at[i] = a_from + from + (step * depth + i * 4) * a_step;
          b_at[i] = b_from + from + (step * depth + i * 4) * b_step;
        }
        uint32_t a[rows][2][2], b[columns][2][2];
#pragma unroll
        for (int i = 0; i < rows; ++i) {
          if constexpr (floats)
            load_floats(a[i], a_at, i * 64);
          else
            load<even_a>(a[i], a_at, i * 32);
        }
#pragma unroll
        for (int j = 0; j < columns; ++j) {
          if constexpr (floats)
            load_floats(b[j], b_at, j * 64);
          else
            load<even_b>(b[j], b_at, j * 32);
        }
#pragma unroll
        for (int i = 0; i < rows; ++i)
#pragma unroll
          for (int j = 0; j < columns; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              uint32_t const(&of_b)[2] = b[j][half];
              if constexpr (floats)
                ptx::mma_m16n8k8_tf32(acc[i][j][half], a[i][0][0], a[i][1][0], a[i][0][1], a[i][1][1], of_b[0],
                                      of_b[1]);
              else
                ptx::mma_m16n8k16<T>(acc[i][j][half], a[i][0][0], a[i][1][0], a[i][0][1], a[i][1][1], of_b[0], of_b[1]);
            }
        if (step + 1 == kLinesPixels / depth) {
#pragma unroll
          for (int i = 0; i < rows; ++i) words |= a[i][0][0] | a[i][0][1];
#pragma unroll
          for (int j = 0; j < columns; ++j) words |= b[j][0][0] | b[j][0][1];
          if constexpr (floats || !even_a)
#pragma unroll
            for (int i = 0; i < rows; ++i) words |= a[i][1][0] | a[i][1][1];
          if constexpr (floats || !even_b)
#pragma unroll
            for (int j = 0; j < columns; ++j) words |= b[j][1][0] | b[j][1][1];
        }
      }
    }
    give_back(&barriers.empty[stage.index], words);
    stage.advance(p.stages);
  }
  if (p.turns > 1) {
    constexpr int sums = rows * columns * 8;
    auto place = [&](int of, int i) { return ring + (of * sums + i * 4) * 128 + lane * 16; };
    ptx::bar_sync(1, kWarps * 32);  // all stages have been read
    if (turn > 0)
#pragma unroll
      for (int i = 0; i < sums / 4; ++i) {
        float const(&v)[4] = acc[i / 2 / columns][i / 2 % columns][i % 2];
        ptx::st_shared_v4(place(warp, i), make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]),
                                                     __float_as_uint(v[2]), __float_as_uint(v[3])));
      }
    ptx::bar_sync(1, kWarps * 32);
    if (turn > 0) return;
    for (int other = 1; other < p.turns; ++other)
#pragma unroll
      for (int i = 0; i < sums / 4; ++i) {
        uint4 const v = ptx::ld_shared_v4(place(warp + other * across, i));
        float (&sum)[4] = acc[i / 2 / columns][i / 2 % columns][i % 2];
        sum[0] += __uint_as_float(v.x), sum[1] += __uint_as_float(v.y);
        sum[2] += __uint_as_float(v.z), sum[3] += __uint_as_float(v.w);
      }
  }
  if (!needed) return;
  float* const to = p.parts + (int64_t(tile) * p.split + part) * TM * TN + m * TN + n;
#pragma unroll
  for (int i = 0; i < rows; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        float const(&low)[4] = acc[i][j][0], (&high)[4] = acc[i][j][1];
        int const row = i * 16 + (floats ? half * 8 + g : g * 2 + half), column = j * 16 + t * (floats ? 2 : 4);
        if (first_m + row >= p.M || first_n + column >= p.N) continue;
        float* const at = to + row * TN + column;
        if constexpr (floats) {
          *reinterpret_cast<float2*>(at) = make_float2(low[half * 2], low[half * 2 + 1]);
          *reinterpret_cast<float2*>(at + 8) = make_float2(high[half * 2], high[half * 2 + 1]);
        } else {
          *reinterpret_cast<float4*>(at) =
              make_float4(low[half * 2], high[half * 2], low[half * 2 + 1], high[half * 2 + 1]);
        }
      }
}

template <class T, int TM, int TN, bool even_a, bool even_b>
__global__ void __launch_bounds__(kThreads, 1) main_kernel(__grid_constant__ Params const p) {
  extern __shared__ uint8_t dynamic[];
  __shared__ Barriers barriers;
  uint32_t const ring = (ptx::shared_address(dynamic) + 127) / 128 * 128;
  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::mbarrier_init(&barriers.full[i], 1);
      ptx::mbarrier_init(&barriers.empty[i], kWarps);
    }
    ptx::mbarrier_init(&barriers.rest, 32);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kWarps * 32)
    multiply<T, TM, TN, even_a, even_b>(p, ring, barriers);
  else
    copy<sizeof(T)>(p, ring, barriers);
}

struct ReduceParams {
  float const* parts;
  void* w;
  int64_t m, n;  // strides of w
  int32_t M, N, tiles_n, split;
};

// A lane has a place of a tile, of which its thread adds every kReduceParts-th part.
template <class T, int TM, int TN>
__global__ void __launch_bounds__(kReduceLanes* kReduceParts) reduce_kernel(__grid_constant__ ReduceParams const p) {
  __shared__ float sums[kReduceParts][kReduceLanes];
  int const lane = int(threadIdx.x) % kReduceLanes, first = int(threadIdx.x) / kReduceLanes;
  int64_t const at = int64_t(blockIdx.x) * kReduceLanes + lane;
  int const tile = int(at / (TM * TN)), place = int(at % (TM * TN));
  int const m = tile / p.tiles_n * TM + place / TN, n = tile % p.tiles_n * TN + place % TN;
  ptx::griddepcontrol_wait();
  bool const exists = m < p.M && n < p.N;
  float sum = 0;
  if (exists) {
    float const* from = p.parts + int64_t(tile) * p.split * TM * TN + place;
#pragma unroll 8
    for (int i = first; i < p.split; i += kReduceParts) sum += from[int64_t(i) * TM * TN];
  }
  sums[first][lane] = sum;
  __syncthreads();
  if (first != 0 || !exists) return;
#pragma unroll
  for (int i = 1; i < kReduceParts; ++i) sum += sums[i][lane];
  static_cast<T*>(p.w)[m * p.m + n * p.n] = narrow<T>(sum);
}

// ---- host side

template <DType dtype, int TM, int TN>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  PixelSums const shape(row_of(plan), problem);
  Params p{};
  p.a = shape.swapped ? args.a : args.b, p.b = shape.swapped ? args.b : args.a;
  p.parts = static_cast<float*>(args.workspace), p.pixels = problem.N * problem.H * problem.W;
  p.M = int32_t(shape.rows), p.N = int32_t(shape.columns);
  p.tiles_n = int32_t(shape.tiles_n), p.tiles = int32_t(shape.tiles_m * shape.tiles_n), p.split = int32_t(shape.split);
  p.units = int32_t(shape.units), p.stages = int32_t(shape.stages), p.stage_bytes = int32_t(shape.stage_bytes),
  p.turns = int32_t(shape.turns);
  // The last pixel's words of channels that are not there lie behind a stage.
  int const ring = int(shape.stages * shape.stage_bytes) + (TM > TN ? TM : TN) * int(sizeof(T));
  int const bytes = 128 + max(ring, p.turns > 1 ? TM * TN * 4 : 0);  // and what warps add up
  auto* kernel = main_kernel<T, TM, TN, true, true>;
  if constexpr (sizeof(T) == 2) {
    if (p.M % 2 != 0)
      kernel = main_kernel<T, TM, TN, false, false>;
    else if (p.N % 2 != 0)
      kernel = main_kernel<T, TM, TN, true, false>;
  }
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(p.tiles * p.split), kThreads, bytes, stream>>>(p);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  ReduceParams r{};
  r.parts = p.parts, r.w = args.out, r.M = p.M, r.N = p.N;
  r.m = shape.swapped ? problem.w.c : problem.w.n, r.n = shape.swapped ? problem.w.n : problem.w.c;
  r.tiles_n = p.tiles_n, r.split = p.split;
  return launch_spread(reduce_kernel<T, TM, TN>, dim3(unsigned(int64_t(p.tiles) * TM * TN / kReduceLanes)),
                       kReduceLanes * kReduceParts, kReduceLanes * kReduceParts * int(sizeof(float)), stream, r);
}

}  // namespace conv2d_ext::pixel_sums

#define CONV2D_EXT_PIXEL_SUMS_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                    \
    return pixel_sums::launch<DType::dtype, tm, tn>(p, plan, args, stream);    \
  }
