// 1x1 filters between few channels in channels_last, fprop and dgrad, of many pixels: memory's bandwidth is what such
// layers take.
//   out[m, n] = sum over k of a[m, k] * b[k, n]     m: pixels; n: filters (dgrad: channels); k: the other ones
//
// The filters lie in shared memory, of each result a line of what is summed over. Each warp works for itself: the copy
// engine brings it runs of pixels, all their channels, as they lie, into a ring of its own; it multiplies 16 pixels at
// a time by mma.sync, and the copy engine stores their results, which lie in a row. The order of the sum and of the
// results is free, and is such that a thread's channels, its part of a filter and its results are 16 neighbouring
// bytes, which it takes in pieces of 4 or 2 where channels are no vectors. Where pixels are few, blocks share out the
// results' columns as well, parts that are stored from registers. What the copy engine does not take of the
// last pixels, up to 14 bytes, the lanes copy.
#pragma once

#include "../core/pixels_any.h"
#include "dependent.cuh"
#include "fragments.cuh"
#include "launch.h"

namespace conv2d_ext::pixels_flow {

constexpr int kMostWarps = 16, kMostStages = 4;

struct Params {
  void const* a;
  void const* w;
  void const* bias;
  void* out;
  int64_t w_step, bias_stride;  // elements
  int32_t M, N, depth;
  int32_t turned;               // the filters lie [k, n]
  int32_t tiles, stages, outs;  // 16 pixels of a run; runs of a warp's ring; tiles of results
  int32_t parts, columns;       // of the results, which different blocks compute; columns of one
};

// Steps of 64 bytes of a pixel are what its four threads load at once, as many results what they store.
template <class T, int steps>
struct Flow {
  static constexpr int vector = 16 / int(sizeof(T)), step = 4 * vector, fragments = vector / 2;
  static constexpr int pitch = 64 * (steps | 1);  // bytes of a line: eight threads' vectors meet every bank once
};

template <class T>
__device__ inline uint32_t operand(uint32_t v) {
  if constexpr (sizeof(T) == 4)
    return ptx::cvt_rn_tf32(__uint_as_float(v));
  else
    return v;
}
template <class T>
__device__ inline uint4 operands(uint4 v) {
  return {operand<T>(v.x), operand<T>(v.y), operand<T>(v.z), operand<T>(v.w)};
}

// What lies at `from` of up to `left` elements, in pieces of so many bytes; zeros beyond them.
template <class T, int piece>
__device__ inline uint4 load_pieces(uint32_t from, int left) {
  if constexpr (piece == 16) return left > 0 ? ptx::ld_shared_v4(from) : uint4{};
  uint32_t v[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (piece == 4) {
      if (left > i * 4 / int(sizeof(T))) v[i] = ptx::ld_shared(from + i * 4);
    } else {
      if (left > i * 2) v[i] = ptx::ld_shared_u16(from + i * 4);
      if (left > i * 2 + 1) v[i] |= uint32_t(ptx::ld_shared_u16(from + i * 4 + 2)) << 16;
    }
  }
  return {v[0], v[1], v[2], v[3]};
}
// put: takes a piece and where it begins among the 16 bytes.
template <class T, int piece, class Put>
__device__ inline void store_pieces(uint32_t const (&v)[4], int left, Put put) {
  if constexpr (piece == 16) {
    if (left > 0) put(0, make_uint4(v[0], v[1], v[2], v[3]));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (piece == 4) {
        if (left > i * 4 / int(sizeof(T))) put(i * 4, v[i]);
      } else {
        if (left > i * 2) put(i * 4, uint16_t(v[i]));
        if (left > i * 2 + 1) put(i * 4 + 2, uint16_t(v[i] >> 16));
      }
    }
  }
}

// N of them, from n0 on, to `lines` lines [n, k]; zeros beyond the filters.
template <class T, int steps, int piece, bool turned>
__device__ inline void copy_filters(Params const& p, uint32_t to, int lines, int n0, int N) {
  using F = Flow<T, steps>;
  T const* const w = static_cast<T const*>(p.w) + (turned ? n0 : n0 * p.w_step);
  constexpr int depth = steps * F::step, vector = piece / int(sizeof(T));
  constexpr int at_once = piece == 16 ? 4 : 8;  // of a thread: latencies are what they take
  using V = Vector<T, vector>;
  // A vector of channels of a filter, or as they lie turned, of filters of a channel.
  constexpr int wide = turned ? 1 : vector, high = turned ? vector : 1;
  int const all = lines * depth / vector;
  auto place = [&](int i, int& n, int& k) { n = i / (depth / wide) * high, k = i % (depth / wide) * wide; };
#pragma unroll 1
  for (int first = int(threadIdx.x); first < all; first += at_once * int(blockDim.x)) {
    V v[at_once];
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      int n, k;
      place(first + j * int(blockDim.x), n, k);
      v[j] = V{};
      if (n < N && k < p.depth) v[j] = *reinterpret_cast<V const*>(w + (turned ? k * p.w_step + n : n * p.w_step + k));
    }
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      int n, k;
      place(first + j * int(blockDim.x), n, k);
      if (n >= lines) break;
      uint32_t const at = to + n * F::pitch + k * int(sizeof(T));
      uint32_t words[vector * int(sizeof(T)) / 4 + 1];
      if constexpr (piece == 2)
        words[0] = *reinterpret_cast<uint16_t const*>(&v[j]);
      else
#pragma unroll
        for (int i = 0; i < piece / 4; ++i) words[i] = operand<T>(reinterpret_cast<uint32_t const*>(&v[j])[i]);
      if constexpr (piece == 16 && !turned) {
        ptx::st_shared_v4(at, make_uint4(words[0], words[1], words[2], words[3]));
      } else if constexpr (piece == 4 && !turned) {
        ptx::st_shared(at, words[0]);
      } else {
#pragma unroll
        for (int i = 0; i < vector; ++i)
          if constexpr (sizeof(T) == 4)
            ptx::st_shared(at + i * F::pitch, words[i]);
          else
            ptx::st_shared_u16(at + i * F::pitch, uint16_t(words[i / 2] >> i % 2 * 16));
      }
    }
  }
}

// Of so many bytes those that the copy engine moves.
template <int piece>
__device__ constexpr int engine_bytes(int bytes) {
  return piece == 16 ? bytes : bytes & ~15;
}

template <class T, int steps, int piece>
__global__ void __launch_bounds__(512, 1) flow_kernel(__grid_constant__ Params const p) {
  using F = Flow<T, steps>;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ uint64_t full[kMostWarps * kMostStages];
  int const parts = p.parts, part = int(blockIdx.x) % parts, block = int(blockIdx.x) / parts;
  int const n0 = part * p.columns, N = min(p.N - n0, p.columns), lines = (N + F::step - 1) / F::step * F::step;
  int const warps = int(blockDim.x) / 32, warp = warp_uniform(int(threadIdx.x) / 32);
  int const lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  int const row_bytes = p.depth * int(sizeof(T)), out_bytes = N * int(sizeof(T));
  int const run = p.tiles * 16, run_bytes = run * row_bytes;
  uint32_t const filters = ptx::shared_address(dynamic);
  uint32_t const ring = filters + lines * (F::pitch + 4) + warp * (p.stages * run_bytes + p.outs * 16 * out_bytes);
  uint32_t const results = ring + p.stages * run_bytes;
  float* const bias = reinterpret_cast<float*>(dynamic + lines * F::pitch);
  uint64_t* const bars = full + warp * kMostStages;
  if (ptx::elect())
    for (int i = 0; i < p.stages; ++i) ptx::mbarrier_init(&bars[i], 1);
  ptx::fence_mbarrier_init();
  __syncwarp();
  int const blocks = int(gridDim.x) / parts, apart = blocks * warps;  // runs
  int next = block + warp * blocks;
  ptx::griddepcontrol_wait();
  auto copy = [&](int stage) {
    if (int64_t const m = int64_t(next) * run; m < p.M && ptx::elect()) {
      int const bytes = min(run, int(p.M - m)) * row_bytes;
      ptx::mbarrier_arrive_expect_tx(&bars[stage], engine_bytes<piece>(bytes));
      if (piece == 16 || engine_bytes<piece>(bytes) > 0)
        ptx::cp_async_bulk(ring + stage * run_bytes, static_cast<T const*>(p.a) + m * p.depth,
                           engine_bytes<piece>(bytes), &bars[stage]);
    }
    next += apart;
  };
  int now = next;
  for (int i = 0; i < p.stages; ++i) copy(i);
  if (p.turned)
    copy_filters<T, steps, piece, true>(p, filters, lines, n0, N);
  else
    copy_filters<T, steps, piece, false>(p, filters, lines, n0, N);
  if (p.bias != nullptr)
    for (int i = int(threadIdx.x); i < lines; i += int(blockDim.x))
      bias[i] = i < N ? widen(static_cast<T const*>(p.bias)[(n0 + i) * p.bias_stride]) : 0;
  __syncthreads();
  uint32_t const mine = filters + (F::vector * (g / 2) + g % 2) * F::pitch + t * 16;
  Stage at;
  int out = 0;
#pragma unroll 1
  for (; int64_t(now) * run < p.M; now += apart) {
    ptx::mbarrier_wait(&bars[at.index], at.parity);
    if constexpr (piece < 16) {
      int const bytes = min(run, p.M - now * run) * row_bytes, rest = engine_bytes<piece>(bytes) + lane * 2;
      if (rest < bytes) {
        uint8_t const* const of = static_cast<uint8_t const*>(p.a) + int64_t(now) * run * row_bytes + rest;
        ptx::st_shared_u16(ring + at.index * run_bytes + rest, *reinterpret_cast<uint16_t const*>(of));
      }
      __syncwarp();
    }
    uint32_t const from = ring + at.index * run_bytes + g * row_bytes + t * 16;
#pragma unroll 1
    for (int tile = 0; tile < p.tiles; ++tile) {
      int const m = now * run + tile * 16;
      uint4 a[steps][2];
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t const of = from + (tile * 16 + half * 8) * row_bytes + s * 64;
          a[s][half] = operands<T>(load_pieces<T, piece>(of, p.depth - s * F::step - t * F::vector));
        }
      if (tile == p.tiles - 1) {  // once all words of the stage are there, as in give_back.cuh
        uint32_t words = 0;
#pragma unroll
        for (int s = 0; s < steps * 2; ++s) {
          uint4 const& v = a[s / 2][s % 2];
          words |= piece == 16 ? v.x : v.x | v.y | v.z | v.w;
        }
        __syncwarp();
        copy(at.index + int(words & blockIdx.z));
      }
      if (m >= p.M) continue;
      uint32_t const to = results + out * 16 * out_bytes;
      if (parts == 1) {
        if (p.outs == 2)
          ptx::cp_async_bulk_wait_group_read<1>();
        else
          ptx::cp_async_bulk_wait_group_read<0>();
        __syncwarp();
      }
#pragma unroll 1
      for (int n = 0; n < N; n += F::step) {
        float acc[F::fragments][4] = {};
        if (p.bias != nullptr) {
#pragma unroll
          for (int j = 0; j < F::fragments; ++j)
            acc[j][0] = acc[j][2] = bias[n + t * F::vector + j * 2],
            acc[j][1] = acc[j][3] = bias[n + t * F::vector + j * 2 + 1];
        }
#pragma unroll
        for (int s = 0; s < steps; ++s)
#pragma unroll
          for (int j = 0; j < F::fragments; ++j) {
            uint4 const b = ptx::ld_shared_v4(mine + (n + j * 2) * F::pitch + s * 64), &low = a[s][0], &high = a[s][1];
            if constexpr (sizeof(T) == 2) {
              ptx::mma_m16n8k16<T>(acc[j], low.x, high.x, low.y, high.y, b.x, b.y);
              ptx::mma_m16n8k16<T>(acc[j], low.z, high.z, low.w, high.w, b.z, b.w);
            } else {
              ptx::mma_m16n8k8_tf32(acc[j], low.x, high.x, low.y, high.y, b.x, b.y);
              ptx::mma_m16n8k8_tf32(acc[j], low.z, high.z, low.w, high.w, b.z, b.w);
            }
          }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t v[4];
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if constexpr (sizeof(T) == 2)
              v[j] = pack<T>(acc[j][half * 2], acc[j][half * 2 + 1]);
            else
              v[j] = __float_as_uint(acc[j / 2][half * 2 + j % 2]);
          int const row = half * 8 + g, column = n + t * F::vector;
          if (parts == 1) {
            uint32_t const at = to + row * out_bytes + column * int(sizeof(T));
            store_pieces<T, piece>(v, N - column, [at](int byte, auto some) {
              if constexpr (sizeof(some) == 16)
                ptx::st_shared_v4(at + byte, some);
              else if constexpr (sizeof(some) == 4)
                ptx::st_shared(at + byte, some);
              else
                ptx::st_shared_u16(at + byte, some);
            });
          } else if (m + row < p.M) {
            T* const at = static_cast<T*>(p.out) + int64_t(m + row) * p.N + n0 + column;
            store_pieces<T, piece>(v, N - column, [at](int byte, auto some) {
              *reinterpret_cast<decltype(some)*>(reinterpret_cast<uint8_t*>(at) + byte) = some;
            });
          }
        }
      }
      if (parts > 1) continue;
      ptx::fence_proxy_async();
      __syncwarp();
      int const bytes = min(16, p.M - m) * out_bytes;
      T* const result = static_cast<T*>(p.out) + int64_t(m) * p.N;
      if (ptx::elect() && (piece == 16 || engine_bytes<piece>(bytes) > 0))
        ptx::cp_async_bulk_store(result, to, engine_bytes<piece>(bytes));
      ptx::cp_async_bulk_commit_group();
      if constexpr (piece < 16)
        if (int const rest = engine_bytes<piece>(bytes) + lane * 2; rest < bytes)
          *reinterpret_cast<uint16_t*>(reinterpret_cast<uint8_t*>(result) + rest) = ptx::ld_shared_u16(to + rest);
      if (++out == p.outs) out = 0;
    }
    at.advance(p.stages);
  }
  ptx::griddepcontrol_launch_dependents();
  ptx::cp_async_bulk_wait_group_read<0>();
}

// ---- host side

template <class T, int steps, int piece>
cudaError_t start(Params const& p, PixelFlow const& shape, cudaStream_t stream) {
  auto* const kernel = flow_kernel<T, steps, piece>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 224 * 1024))
    return error;
  int sms = 0;
  if (auto const error = count_sms(sms)) return error;
  dim3 const blocks(unsigned(min64(sms / p.parts, ceil_div(p.M, 16 * p.tiles)) * p.parts));
  return launch_dependent(kernel, blocks, int(shape.warps * 32), int(shape.bytes), stream, p);
}

template <class T, int steps>
cudaError_t start(Params const& p, PixelFlow const& shape, int piece, cudaStream_t stream) {
  if (piece == 16) return start<T, steps, 16>(p, shape, stream);
  if constexpr (sizeof(T) == 2)
    if (piece == 2) return start<T, steps, 2>(p, shape, stream);
  return start<T, steps, 4>(p, shape, stream);
}

template <Op op, DType dtype>
cudaError_t launch(Problem const& problem, Plan const&, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  AnyPixels const s(op, problem);
  PixelFlow const shape = pixel_flow_shape(op, dtype, s);
  Params p{};
  p.a = args.a, p.w = args.b, p.bias = args.bias, p.out = args.out;
  p.w_step = problem.w.n, p.bias_stride = args.bias_stride;
  p.M = int32_t(s.M), p.N = int32_t(s.N), p.depth = int32_t(s.depth), p.turned = op == Op::dgrad;
  p.tiles = shape.tiles, p.stages = shape.stages, p.outs = shape.outs;
  p.parts = int32_t(shape.parts), p.columns = int32_t(shape.columns);
  int const piece = pixel_flow_piece(dtype, s);
  switch (pixel_flow_steps(dtype, s)) {
    case 1:
      return start<T, 1>(p, shape, piece, stream);
    case 2:
      return start<T, 2>(p, shape, piece, stream);
    case 3:
      return start<T, 3>(p, shape, piece, stream);
    case 4:
      return start<T, 4>(p, shape, piece, stream);
    case 6:
      return start<T, 6>(p, shape, piece, stream);
    default:
      return start<T, 8>(p, shape, piece, stream);
  }
}

}  // namespace conv2d_ext::pixels_flow

#define CONV2D_EXT_PIXELS_FLOW_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                     \
    return pixels_flow::launch<Op::op, DType::dtype>(p, plan, args, stream);    \
  }
