// Depthwise convolution in channels_last on tensor cores (mma.sync), float16 and bfloat16, 7x7 filters of stride 1 over
// large tensors: along a row of the image, 8 neighbouring outputs of a channel are a window of 16 inputs times a matrix
// with the taps of a row of the filter along its diagonals:
//   out[16 blocks of 8 columns; 8 columns] += in[the blocks; 16 columns] * taps[r].
// A lane reads 4 channels of a pixel at once; of the words of two pixels a permutation of bytes makes the operands of
// two channels. Borders cost nothing: the copy engine writes the zeros.
//
// As toeplitz.cuh, but a strip is walked in cycles of 7 rows, which are a loop unrolled: between its rows nothing is
// asked but whether the strip or the image ends. A stage and a buffer have 4 rows or the cycle's other 3, so that waits
// and arrivals are fewer; the taps' operands stay in registers; one warp copies and another stores.
#pragma once

#include "../core/toeplitz_cycles.h"
#include "toeplitz.cuh"

namespace conv2d_ext::toeplitz {

struct CyclesParams : Params {
  int readers, columns;  // threads that multiply; columns of an image in a row
};

__device__ inline Strip next_cycles_strip(CyclesParams const& p, int& index, int& end) {
  return next_strip(p, index, end, 8, 0);
}

// The filters of a block's channels: of each channel and row of the filter the words (tap d, tap d + 4) for the
// distances d = -7 .. 11 of an input from an output, zeros where there is no tap.
inline constexpr int kTapRow = kCycleTapWords * 4;

template <class T>
__device__ inline void spread_taps(CyclesParams const& p, uint32_t table, int c0, int thread, int threads) {
  constexpr int taps = kCycle * kCycle;
  for (int i = thread; i < p.channels * taps; i += threads) {
    int const c = i / taps, tap = i - c * taps, r = tap / kCycle, s = tap - r * kCycle;
    if (c0 + c >= p.C) break;
    uint16_t const w =
        *reinterpret_cast<uint16_t const*>(static_cast<T const*>(p.w) + (c0 + c) * p.w_k + r * p.w_r + s * p.w_s);
    uint32_t const to = table + (c * kCycle + r) * kTapRow + (s + 7) * 4;
    ptx::st_shared_u16(to, w);
    ptx::st_shared_u16(to - 4 * 4 + 2, w);
  }
}

// Of the stages and of the buffers of finished rows.
struct CyclesBarriers {
  uint64_t full[kCycleStages], empty[kCycleStages];
  uint64_t done[kCycleBuffers], free[kCycleBuffers];
  uint64_t stored;  // all rows

  // By a thread of each of `warps` warps: a barrier takes 30 ns.
  __device__ void start(int stages, int readers, int warp, int warps) {
    for (int i = warp; i < 2 * stages + 2 * kCycleBuffers + 1; i += warps) {
      int const j = i - 2 * stages;
      if (j < 0)
        ptx::mbarrier_init(i % 2 == 0 ? &full[i / 2] : &empty[i / 2], i % 2 == 0 ? 1 : readers);
      else if (j < 2 * kCycleBuffers)
        ptx::mbarrier_init(j % 2 == 0 ? &done[j / 2] : &free[j / 2], j % 2 == 0 ? readers : 1);
      else
        ptx::mbarrier_init(&stored, 1);
    }
    ptx::fence_mbarrier_init();
  }
};

// A strip's cycles, the second of them beginning with its first row inside the image if that is not row 0. Rows are
// those of the inputs that the strip meets; row r completes output r - 6, which is stored a row later, at place
// (r + 1) % 7 of a cycle.
struct Cycles {
  int begin, end;   // rows inside the image
  int first, rows;  // of the first cycle; outputs

  __device__ Cycles(CyclesParams const& p, Strip const& s) : rows(s.rows) {
    int const until = p.in_H - s.first;
    begin = s.first < 0 ? -s.first : 0;
    end = min(until, rows + kCycle - 1);
    int const before = begin < rows + kCycle ? begin : 0;
    first = before - (before + kCycle - 1) / kCycle * kCycle;
  }
  __device__ bool more(int row) const { return row < rows + kCycle; }
  __device__ int inputs(int row) const { return row < begin ? 0 : min(end - row, kCycle); }  // may be negative
  // Of the outputs row - 7 + u those with lower <= u < upper.
  __device__ int lower(int row) const { return max(kCycle - row, 0); }
  __device__ int upper(int row) const { return min(rows + kCycle - row, kCycle); }
};

// Has the rows of the block's share copied; by one thread.
__device__ inline void copy_cycles(CyclesParams const& p, CyclesBarriers& barriers, int index, int end, int c0,
                                   uint32_t shared) {
  int stage = 0;
  uint32_t parity = 1;
  while (index < end) {
    Strip const s = next_cycles_strip(p, index, end);
    Cycles const cycles(p, s);
    for (int row = cycles.first; cycles.more(row); row += kCycle) {
      int const inputs = cycles.inputs(row);
      for (int u = 0; u < inputs; u += kCycleGroup) {
        int const count = min(inputs - u, kCycleGroup);
        ptx::mbarrier_wait(&barriers.empty[stage], parity);
        ptx::mbarrier_arrive_expect_tx(&barriers.full[stage], uint32_t(count * p.in_copied));
#pragma unroll 1
        for (int i = 0; i < count; ++i)
          ptx::cp_async_bulk_tensor_4d(shared + (stage * kCycleGroup + i) * p.in_bytes, &p.in, &barriers.full[stage],
                                       c0, s.w0 - p.pad_w, s.first + row + u + i, s.n0);
        if (++stage == p.stages) stage = 0, parity ^= 1;
      }
    }
  }
}

// Has the finished rows stored; by one thread.
__device__ inline void store_cycles(CyclesParams const& p, CyclesBarriers& barriers, int index, int end, int c0,
                                    uint32_t outputs) {
  int buffer = 0;
  uint32_t parity = 0;
  while (index < end) {
    Strip const s = next_cycles_strip(p, index, end);
    Cycles const cycles(p, s);
    for (int row = cycles.first; cycles.more(row); row += kCycle) {
      int const upper = cycles.upper(row);
      for (int u = cycles.lower(row); u < upper;) {
        ptx::mbarrier_wait(&barriers.done[buffer], parity);
#pragma unroll 1
        do {
          ptx::cp_async_bulk_tensor_4d_store(&p.out, outputs + (buffer * kCycleGroup + u % kCycleGroup) * p.out_bytes,
                                             c0, s.w0, s.h0 + row - kCycle + u, s.n0);
        } while (++u < upper && u % kCycleGroup != 0);
        ptx::cp_async_bulk_commit_group();
        ptx::cp_async_bulk_wait_group_read<0>();
        ptx::mbarrier_arrive(&barriers.free[buffer]);
        if (++buffer == kCycleBuffers) buffer = 0, parity ^= 1;
      }
    }
  }
  ptx::cp_async_bulk_wait_group<0>();
}

// The products of a warp; returns the larger of its outputs, or a NaN.
template <class T>
__device__ inline uint32_t multiply_cycles(CyclesParams const& p, CyclesBarriers& barriers, float const* biases,
                                           uint32_t table, int index, int end, uint32_t shared) {
  constexpr int R = kCycle, group = kCycleGroup, channels = 4, pairs = 2;  // of a warp
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  int const octets = p.channels / 8, mates = p.channels / channels, mate = warp % mates;
  int const octet = mate / 2, first = mate % 2 * 8;  // byte of the octet
  uint32_t taps[channels][R][2];
  uint32_t const from_taps = table + mate * channels * R * kTapRow + (t - g / 2 - g % 2 * 4 + 7) * 4;
#pragma unroll
  for (int i = 0; i < channels * R; ++i) {
    taps[i / R][i % R][0] = ptx::ld_shared(from_taps + i * kTapRow);
    taps[i / R][i % R][1] = ptx::ld_shared(from_taps + i * kTapRow + 8 * 4);
  }
  // Of blocks g and g + 8 of the warp's, pixels t and t + 4 of each eight; every other block the other way round, so
  // that eight pixels in different banks are read at a time. Eight pixels on, the swizzle is the same.
  uint32_t const step_in = p.channels * 16;
  uint32_t const over = p.channels * 8 | (octets > 1 ? p.channels : 0);  // from a pixel of eight outputs to another
  uint32_t from[2][2], to[2], low[2];                                    // low: selects the first of two channels
  bool exists[2];
  bool const odd = g % 2 != 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const block = warp / mates * 16 + g + 8 * half;
    exists[half] = block < p.blocks * p.images;
    int const image = exists[half] ? block / p.blocks : 0, column = (exists[half] ? block - image * p.blocks : 0) * 8;
    int const in = image * p.columns + column, out = image * p.blocks * 8 + column;
    bool const turned = (g + in / 4) % 2 != 0;
    low[half] = turned ? 0x1054 : 0x5410;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      from[half][i] = shared + swizzled(in + t + ((i != 0) != turned ? 4 : 0), octet, octets) + first;
    to[half] = shared + p.stages * group * p.in_bytes + swizzled(out + t + (odd ? 4 : 0), octet, octets) + first;
  }
  uint32_t const from_bias = ptx::shared_address(biases + mate * channels);  // what sums begin with
  uint32_t most = 0, parity = 0, parity_out = 1;
  float acc[R][channels][4];
  int stage = 0, held = 0, buffer = 0;  // held: the stage of the row that is loaded
  // By shuffles, what strips are is known to be the same in all lanes, and takes none of their registers.
  index = __shfl_sync(~0u, index, 0), end = __shfl_sync(~0u, end, 0);
  while (index < end) {
    Strip const s = next_cycles_strip(p, index, end);
    Cycles const cycles(p, s);
#pragma unroll 1
    for (int row = cycles.first; cycles.more(row); row += R) {
      int const count = cycles.inputs(row), lower = cycles.lower(row), upper = cycles.upper(row);
      Pixel<pairs> in[2][2][2];  // of the next row: block, eight pixels, pixel
      auto load = [&](int u) {
        if (u % group == 0) ptx::mbarrier_wait(&barriers.full[stage], parity);
        uint32_t const offset = (stage * group + u % group) * p.in_bytes;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            in[half][0][i].load(from[half][i] + offset);
            in[half][1][i].load(from[half][i] + offset + step_in);
          }
        held = stage;
        if ((u % group == group - 1 || u == R - 1 || u == count - 1) && ++stage == p.stages) stage = 0, parity ^= 1;
      };
      auto store = [&](int u, float const(&sums)[channels][4]) {
        Pixel<pairs> out[2][2];
#pragma unroll
        for (int pair = 0; pair < pairs; ++pair)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t v[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              v[i] = pack<T>(sums[pair * 2][half * 2 + i], sums[pair * 2 + 1][half * 2 + i]);
              if (exists[half]) most = max_or_nan<T>(most, v[i]);
            }
            out[half][0].v[pair] = odd ? v[1] : v[0];
            out[half][1].v[pair] = odd ? v[0] : v[1];
          }
        if (u % group == 0 || u == lower) ptx::mbarrier_wait(&barriers.free[buffer], parity_out);
        uint32_t const offset = (buffer * group + u % group) * p.out_bytes;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!exists[half]) continue;
          out[half][0].store(to[half] + offset);
          out[half][1].store((to[half] + offset) ^ over);
        }
        if (u % group != group - 1 && u != R - 1 && u != upper - 1) return;
        ptx::fence_proxy_async();
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&barriers.done[buffer]);
        if (++buffer == kCycleBuffers) buffer = 0, parity_out ^= 1;
      };
      if (count > 0) load(0);
      uint32_t all = 0;
      // Row u of the cycle: the sums that it completes are in place u, those of k rows on in place (u + k) % R. What
      // the row before has completed is stored, and its place is taken.
      auto step = [&]<int u>(std::integral_constant<int, u>) {
        uint32_t words[channels][4];
        if (u < count) {
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
#pragma unroll
              for (int pair = 0; pair < pairs; ++pair) {
                uint32_t const a = in[half][j][0].v[pair], b = in[half][j][1].v[pair];
                words[pair * 2][j * 2 + half] = __byte_perm(a, b, low[half]);
                words[pair * 2 + 1][j * 2 + half] = __byte_perm(a, b, low[half] ^ 0x2222);
              }
              all |= words[0][j * 2 + half];
            }
          if (u % group == group - 1 || u == R - 1 || u == count - 1) give_back(&barriers.empty[held], all);
          if (u + 1 < R && u + 1 < count) load(u + 1);
        }
        auto multiply = [&](int from_row, int to_row) {
#pragma unroll
          for (int c = 0; c < channels; ++c)
#pragma unroll
            for (int k = from_row; k < to_row; ++k)
              ptx::mma_m16n8k16<T>(acc[(u + k) % R][c], words[c][0], words[c][1], words[c][2], words[c][3],
                                   taps[c][R - 1 - k][0], taps[c][R - 1 - k][1]);
        };
        if (u < count) multiply(0, R - 1);
        auto& last = acc[(u + R - 1) % R];
        if (u >= lower && u < upper) store(u, last);
        uint4 const bias = ptx::ld_shared_v4(from_bias);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          last[0][i] = __uint_as_float(bias.x), last[1][i] = __uint_as_float(bias.y);
          last[2][i] = __uint_as_float(bias.z), last[3][i] = __uint_as_float(bias.w);
        }
        if (u < count) multiply(R - 1, R);
      };
      [&]<int... u>(std::integer_sequence<int, u...>) {
        (step(std::integral_constant<int, u>()), ...);
      }(std::make_integer_sequence<int, R>());
    }
  }
  return most;
}

template <class T>
__global__ void __launch_bounds__(toeplitz_threads(kToeplitzWarps), 1)
    gather_cycles(__grid_constant__ CyclesParams const p) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  __shared__ CyclesBarriers barriers;
  __shared__ __align__(16) float biases[kCycleChannels];
  __shared__ int again;
  constexpr int threads = toeplitz_threads(kToeplitzWarps);
  uint32_t const shared = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  int const slice = int(blockIdx.x) % p.slices, share = int(blockIdx.x) / p.slices, c0 = slice * p.channels;
  int const begin = share * p.each, end = p.units - begin < p.each ? p.units : begin + p.each;
  uint32_t const outputs = shared + p.stages * kCycleGroup * p.in_bytes;
  uint32_t const table = outputs + kCycleBuffers * kCycleGroup * p.out_bytes;
  int const warp = int(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) barriers.start(p.stages, p.readers / 32, warp, threads / 32);
  if (threadIdx.x == 0) again = 0;
  for (int i = threadIdx.x; i < p.channels * kCycle * (kTapRow / 16); i += threads)
    ptx::st_shared_v4(table + i * 16, make_uint4(0, 0, 0, 0));
  if (int(threadIdx.x) < p.channels)
    biases[threadIdx.x] = p.bias != nullptr && c0 + int(threadIdx.x) < p.C
                              ? widen(static_cast<T const*>(p.bias)[(c0 + int(threadIdx.x)) * p.bias_stride])
                              : 0.f;
  __syncthreads();
  if (!take_role<kToeplitzWarps>()) {
    if (warp == kToeplitzWarps && ptx::elect()) copy_cycles(p, barriers, begin, end, c0, shared);
    if (warp == kToeplitzWarps + 1 && ptx::elect()) {
      store_cycles(p, barriers, begin, end, c0, outputs);
      ptx::mbarrier_arrive(&barriers.stored);
    }
  } else if (int(threadIdx.x) < p.readers) {
    // Behind the last image of a row, which the last windows reach.
    int const chunks = ((p.blocks + 1) * 8 - p.columns) * p.channels / 8;
    for (int i = threadIdx.x; i < p.stages * kCycleGroup * chunks; i += p.readers)
      ptx::st_shared_v4(shared + i / chunks * p.in_bytes + p.in_copied + i % chunks * 16, make_uint4(0, 0, 0, 0));
    spread_taps<T>(p, table, c0, int(threadIdx.x), p.readers);
    ptx::bar_sync(1, p.readers);
    uint32_t const most = multiply_cycles<T>(p, barriers, biases, table, begin, end, shared);
    if (has_nan<T>(most)) again = 1;
    ptx::bar_sync(1, p.readers);
    if (again == 0) return;
    ptx::mbarrier_wait(&barriers.stored, 0);
    store_again<T, kCycle, 8>(p, begin, end, c0, p.readers);
  }
}

// ---- host side

template <Op op, DType dtype>
cudaError_t launch_cycles(Problem const& problem, CyclesTile const& t, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  CyclesParams p{};
  p.in_data = args.a, p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride, p.out_data = args.out;
  p.in_n = in.n, p.in_h = in.h, p.in_w = in.w, p.out_n = out.n, p.out_h = out.h, p.out_w = out.w;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.N = int(problem.N), p.C = int(problem.C), p.R = p.S = kCycle, p.dilation_h = p.dilation_w = 1;
  p.in_H = int(backward ? problem.P() : problem.H), p.in_W = int(backward ? problem.Q() : problem.W);
  p.out_H = int(backward ? problem.H : problem.P()), p.out_W = int(backward ? problem.W : problem.Q());
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  if (backward) {
    p.w = static_cast<T const*>(args.b) + (kCycle - 1) * (p.w_r + p.w_s);
    p.w_r = -p.w_r, p.w_s = -p.w_s;
    p.pad_h = kCycle - 1 - p.pad_h, p.pad_w = kCycle - 1 - p.pad_w;
  }
  p.channels = t.channels, p.blocks = t.blocks, p.images = t.images;
  p.slices = int(t.slices), p.tiles_w = int(t.tiles_w), p.rows = int(t.rows);
  p.units = int(t.units), p.each = int(t.each), p.skip = int((t.shares - 1) * t.each), p.stages = t.stages;
  p.in_bytes = int(t.in_bytes), p.out_bytes = int(t.out_bytes);
  p.readers = t.warps() * 32, p.columns = t.columns;
  p.in_copied = t.columns * t.images * t.channels * int(sizeof(T));
  if (auto const error =
          map_of(p.in, args.a, dtype, in, problem.C, p.in_W, p.in_H, problem.N, t.channels, t.columns, t.images))
    return error;
  if (auto const error = map_of(p.out, args.out, dtype, out, problem.C, p.out_W, p.out_H, problem.N, t.channels,
                                t.blocks * 8, t.images))
    return error;
  auto* const kernel = gather_cycles<T>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(t.slices * t.shares), toeplitz_threads(kToeplitzWarps), size_t(t.shared_bytes), stream>>>(p);
  return cudaGetLastError();
}

template <Op op, DType dtype, int R, int S>
cudaError_t launch_cycles_or(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  if constexpr (R == kCycle) {
    int device = 0;
    Device gpu = h200_sxm;
    if (auto const error = cudaGetDevice(&device)) return error;
    if (auto const error = cudaDeviceGetAttribute(&gpu.sm_count, cudaDevAttrMultiProcessorCount, device)) return error;
    if (takes_cycles(op, problem, gpu))
      return launch_cycles<op, dtype>(problem, cycles_tile(op, problem, gpu), args, stream);
  }
  return launch<op, dtype, R, S>(problem, plan, args, stream);
}

}  // namespace conv2d_ext::toeplitz

#define CONV2D_EXT_TOEPLITZ_CYCLES_INSTANCE(family, op, dtype, tm, tn, tk, variant)                           \
  namespace conv2d_ext {                                                                                      \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const& plan,           \
                                                                Arguments const& args, cudaStream_t stream) { \
    return toeplitz::launch_cycles_or<Op::op, DType::dtype, tm, tn>(p, plan, args, stream);                   \
  }                                                                                                           \
  }
