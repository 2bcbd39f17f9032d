// 1x1 filters between few channels in channels_last, fprop and dgrad, of many pixels: memory's bandwidth is what such
// layers take.
//   out[m, n] = sum over k of a[m, k] * b[k, n]     m: pixels; n: filters (dgrad: channels); k: the other ones
//
// The filters lie in shared memory, of each result a line of what is summed over. Each warp works for itself: the copy
// engine brings it runs of pixels, all their channels, as they lie, into a ring of its own; it multiplies 16 pixels at
// a time by mma.sync, and the copy engine stores their results, which lie in a row, those of a run at once where they
// are few. The order of the sum and of the results is free, and is such that a thread's channels, its part of a filter
// and its results are 16 neighbouring bytes, which it takes in pieces of 4 or 2 where channels are no vectors. Where
// pixels are few, blocks share out the results' columns as well, parts that are stored from registers. What the copy
// engine does not take of the last pixels, up to 14 bytes, the lanes copy.
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
  int32_t held;                 // tiles of a run whose results leave at once
  uint32_t zero;                // which the compiler does not know
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
template <class T, int piece>
__device__ inline void store_pieces(uint32_t const (&v)[4], int left, uint8_t* to) {
  if constexpr (piece == 16) {
    if (left > 0) *reinterpret_cast<uint4*>(to) = {v[0], v[1], v[2], v[3]};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      auto* const elements = reinterpret_cast<uint16_t*>(to + i * 4);
      if constexpr (piece == 4) {
        if (left > i * 4 / int(sizeof(T))) *reinterpret_cast<uint32_t*>(elements) = v[i];
      } else {
        if (left > i * 2) elements[0] = uint16_t(v[i]);
        if (left > i * 2 + 1) elements[1] = uint16_t(v[i] >> 16);
      }
    }
  }
}
template <class T>
__device__ inline void multiply(float (&acc)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 2)
    ptx::mma_m16n8k16<T>(acc, a[0], a[1], a[2], a[3], b0, b1);
  else
    ptx::mma_m16n8k8_tf32(acc, a[0], a[1], a[2], a[3], b0, b1);
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

// A tile has rows_16 times 16 pixels.
template <class T, int steps, int piece, int rows_16>
__global__ void __launch_bounds__(512, 1) flow_kernel(__grid_constant__ Params const p) {
  using F = Flow<T, steps>;
  constexpr int TM = rows_16 * 16;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ uint64_t full[kMostWarps * kMostStages];
  int const parts = p.parts, part = int(blockIdx.x) % parts, block = int(blockIdx.x) / parts;
  int const n0 = part * p.columns, N = min(p.N - n0, p.columns), lines = (N + F::step - 1) / F::step * F::step;
  int const warps = int(blockDim.x) / 32, warp = warp_uniform(int(threadIdx.x) / 32);
  int const lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  int const row_bytes = p.depth * int(sizeof(T)), out_bytes = N * int(sizeof(T));
  int const run = p.tiles * TM, run_bytes = run * row_bytes;
  uint32_t const filters = ptx::shared_address(dynamic);
  uint32_t const ring =
      filters + lines * (F::pitch + 4) + warp * (p.stages * run_bytes + p.outs * p.held * TM * out_bytes);
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
      int const m = now * run + tile * TM;
      uint32_t a[rows_16][steps][2][4];              // operands of two products each
      uint32_t const zero = steps > 6 ? 0 : p.zero;  // of more there are no registers to load beside
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int i = 0; i < rows_16 * 2; ++i) {
          uint32_t const of = from + (tile * TM + i * 8) * row_bytes + s * 64;
          uint4 const v = load_pieces<T, piece>(of, p.depth - s * F::step - t * F::vector);
          // What was loaded lies in other registers than a product takes; a sum's result does not move once more for
          // each of them.
          uint32_t (&to)[2][4] = a[i / 2][s];
          to[0][i % 2] = operand<T>(v.x) + zero, to[0][2 + i % 2] = operand<T>(v.y) + zero;
          to[1][i % 2] = operand<T>(v.z) + zero, to[1][2 + i % 2] = operand<T>(v.w) + zero;
        }
      if (tile == p.tiles - 1) {  // once all words of the stage are there, as in give_back.cuh
        uint32_t words = 0;
#pragma unroll
        for (int i = 0; i < rows_16 * steps * 2; ++i) {
          uint32_t const(&v)[4] = a[i / steps / 2][i / 2 % steps][i % 2];
          words |= v[0] | v[1] | (piece == 16 ? 0 : v[2] | v[3]);
        }
        __syncwarp();
        copy(at.index + int(words & blockIdx.z));
      }
      if (m >= p.M) continue;
      int const held = tile & (p.held - 1), first = m - held * TM;  // of a slot
      uint32_t const slot = results + out * p.held * TM * out_bytes;
      // Where the tile's rows go: parts to memory.
      uint8_t* const to = parts == 1 ? dynamic + (slot - filters) + held * TM * out_bytes
                                     : static_cast<uint8_t*>(p.out) + (int64_t(m) * p.N + n0) * int(sizeof(T));
      int const rows = parts == 1 ? TM : p.M - m, step = (parts == 1 ? N : p.N) * int(sizeof(T));
      if (parts == 1 && held == 0) {
        if (p.outs == 2)
          ptx::cp_async_bulk_wait_group_read<1>();
        else
          ptx::cp_async_bulk_wait_group_read<0>();
        __syncwarp();
      }
#pragma unroll 1
      for (int n = 0; n < N; n += F::step) {
        float acc[rows_16][F::fragments][4] = {};
#pragma unroll
        for (int s = 0; s < steps; ++s)
#pragma unroll
          for (int j = 0; j < F::fragments; ++j) {
            uint4 const b = ptx::ld_shared_v4(mine + (n + j * 2) * F::pitch + s * 64);
#pragma unroll
            for (int i = 0; i < rows_16; ++i)
              multiply<T>(acc[i][j], a[i][s][0], b.x, b.y), multiply<T>(acc[i][j], a[i][s][1], b.z, b.w);
          }
        if (p.bias != nullptr) {
#pragma unroll
          for (int j = 0; j < F::vector; ++j) {
            float const add = bias[n + t * F::vector + j];
#pragma unroll
            for (int i = 0; i < rows_16; ++i) acc[i][j / 2][j % 2] += add, acc[i][j / 2][2 + j % 2] += add;
          }
        }
#pragma unroll
        for (int i = 0; i < rows_16 * 2; ++i) {
          auto const& sum = acc[i / 2];
          uint32_t v[4];
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if constexpr (sizeof(T) == 2)
              v[j] = pack<T>(sum[j][i % 2 * 2], sum[j][i % 2 * 2 + 1]);
            else
              v[j] = __float_as_uint(sum[j / 2][i % 2 * 2 + j % 2]);
          int const row = i * 8 + g, column = n + t * F::vector;
          store_pieces<T, piece>(v, row < rows ? N - column : 0, to + row * step + column * int(sizeof(T)));
        }
      }
      if (parts > 1 || (held + 1 < p.held && m + TM < p.M)) continue;
      ptx::fence_proxy_async();
      __syncwarp();
      int const bytes = min((held + 1) * TM, p.M - first) * out_bytes;
      T* const result = static_cast<T*>(p.out) + int64_t(first) * p.N;
      if (ptx::elect() && (piece == 16 || engine_bytes<piece>(bytes) > 0))
        ptx::cp_async_bulk_store(result, slot, engine_bytes<piece>(bytes));
      ptx::cp_async_bulk_commit_group();
      if constexpr (piece < 16)
        if (int const rest = engine_bytes<piece>(bytes) + lane * 2; rest < bytes)
          *reinterpret_cast<uint16_t*>(reinterpret_cast<uint8_t*>(result) + rest) = ptx::ld_shared_u16(slot + rest);
      if (++out == p.outs) out = 0;
    }
    at.advance(p.stages);
  }
  ptx::griddepcontrol_launch_dependents();
  ptx::cp_async_bulk_wait_group_read<0>();
}

// ---- host side

template <class T, int steps, int piece, int rows_16>
cudaError_t start(Params p, PixelFlow const& shape, cudaStream_t stream) {
  auto* const kernel = flow_kernel<T, steps, piece, rows_16>;
  p.tiles = shape.tiles / rows_16, p.held = shape.held / rows_16;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 224 * 1024))
    return error;
  int sms = 0;
  if (auto const error = count_sms(sms)) return error;
  dim3 const blocks(unsigned(min64(sms / p.parts, ceil_div(p.M, 16 * shape.tiles)) * p.parts));
  return launch_dependent(kernel, blocks, int(shape.warps * 32), int(shape.bytes), stream, p);
}

template <class T, int steps, int piece>
cudaError_t start(Params const& p, PixelFlow const& shape, cudaStream_t stream) {
  if constexpr (steps == 1)
    if (shape.held > 1) return start<T, steps, piece, 2>(p, shape, stream);
  return start<T, steps, piece, 1>(p, shape, stream);
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
  p.stages = shape.stages, p.outs = shape.outs;
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
