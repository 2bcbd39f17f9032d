// 1x1 filters in channels_last whose channels are no vectors, fprop and dgrad, 16-bit types and TF32, in place:
//   out[pixel, n] = sum over k of in[pixel, k] * w[n, k]     n: filters (dgrad: channels); k: the other ones
//
// The copy engine's boxes begin at vectors of 16 bytes, and pixels do not. But every second, fourth or eighth does
// (phases_period): so many are a row of a matrix, and those of a row differ by how far they lie behind a vector. A box
// has a line of channels of one pixel of each row, from that vector on, and a vector more. One or two warpgroups, which
// take turns, move what it has to where lines begin, in registers, round floats to TF32, and put zeros behind the last
// channel, since what lies there is the next pixel's; their lines are what wgmma takes. A tile's pixels lie in the
// order of their phases. Filters that are no lines are made so first (dgrad's turned), by a launch of its own, which
// the copies of pixels do not wait for.
//
// A persistent block: a warpgroup multiplies 64 results by all pixels of a tile; others repack; one warp copies pixels,
// one filters. Results are turned in shared memory and stored by the widest words that all pixels begin at.
#pragma once

#include "../core/pixels_phases.h"
#include "give_back.cuh"
#include "launch.h"
#include "tma_matrix.cuh"

namespace conv2d_ext::pixel_phases {

using tma::at_address;
using tma::Divisor;

struct Params {
  CUtensorMap in, filters;
  Divisor tiles_n;
  int32_t log_phase;  // of a tile's pixels of one phase
  int32_t tiles, steps, period, depth, N;
  int32_t rows;   // of `period` pixels
  int32_t piece;  // bytes that results are stored by
  bool alone;     // no launch before this one has made the filters lines
  int64_t out_step;
  void const* bias;
  int64_t bias_stride;
  void* out;
};

template <class Tile>
struct Barriers {
  uint64_t raw_full[Tile::raw_stages], raw_empty[Tile::raw_stages], full[Tile::stages], empty[Tile::stages];
};

// Pixels as the copy engine brought them, to lines, by warpgroups that take steps in turns. A lane has two vectors of a
// pixel, eight neighbouring lanes eight pixels of a phase.
template <class T, class Tile>
__device__ void repack(Params const& p, uint32_t raw, uint32_t ring, Barriers<Tile>& bars, int group) {
  constexpr int v = 16 / int(sizeof(T)), units = Tile::pixels / 32;
  int const warp = warp_uniform(int(threadIdx.x) / 32 % 4), lane = int(threadIdx.x) % 32, line = lane % 8,
            first = lane / 8 * 2;
  int behind[units];  // bytes, of the vector before
#pragma unroll
  for (int i = 0; i < units; ++i) {
    behind[i] = (((i * 4 + warp) * 8 >> p.log_phase) * p.depth & (v - 1)) * int(sizeof(T));
  }
  Stage from, to;
  int turn = 0;
#pragma unroll 1
  for (int tile = int(blockIdx.x); tile < p.tiles; tile += int(gridDim.x)) {
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step, from.advance(Tile::raw_stages), to.advance(Tile::stages)) {
      if (++turn == Tile::repacking) turn = 0;
      if (turn != group) continue;
      ptx::mbarrier_wait(&bars.raw_full[from.index], from.parity);
      uint32_t const in = raw + from.index * Tile::raw_bytes + (warp * 8 + line) * Tile::raw_line + first * 16,
                     out = ring + to.index * Tile::stage_bytes + Tile::a_bytes + (warp * 8 + line) * kLineBytes;
      uint32_t seen = 0;
#pragma unroll
      for (int unit = 0; unit < units; unit += 2) {
        uint32_t words[2][12];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 3; ++j) {
            uint4 const got = ptx::ld_shared_v4(in + (unit + i) * 32 * Tile::raw_line + j * 16);
            words[i][j * 4] = got.x, words[i][j * 4 + 1] = got.y;
            words[i][j * 4 + 2] = got.z, words[i][j * 4 + 3] = got.w;
          }
        if (unit == 0) ptx::mbarrier_wait(&bars.empty[to.index], to.parity ^ 1);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t (&v)[12] = words[i];
#pragma unroll
          for (int j = 0; j < 3; ++j) seen |= v[j * 4];
          int const bytes = behind[unit + i];  // two words, one, and half of one
#pragma unroll
          for (int j = 0; j < 10; ++j) v[j] = bytes & 8 ? v[j + 2] : v[j];
#pragma unroll
          for (int j = 0; j < 9; ++j) v[j] = bytes & 4 ? v[j + 1] : v[j];
#pragma unroll
          for (int j = 0; j < 8; ++j)
            if constexpr (sizeof(T) == 4)
              v[j] = ptx::cvt_rn_tf32(__uint_as_float(v[j]));
            else
              v[j] = __funnelshift_r(v[j], v[j + 1], bytes % 4 * 8);
          if (step == p.steps - 1) {
            int const left = (p.depth - step * Tile::line) * int(sizeof(T)) - first * 16;  // bytes, of both vectors
#pragma unroll
            for (int j = 0; j < 8; ++j)
              if (left < j * 4 + 4) v[j] = left > j * 4 ? v[j] & 0xffff : 0;
          }
#pragma unroll
          for (int j = 0; j < 2; ++j)
            ptx::st_shared_v4(out + (unit + i) * 32 * kLineBytes + ((first + j) ^ line) * 16,
                              uint4{v[j * 4], v[j * 4 + 1], v[j * 4 + 2], v[j * 4 + 3]});
        }
      }
      ptx::fence_proxy_async();
      give_back(&bars.raw_empty[from.index], seen);
      if (lane == 0) ptx::mbarrier_arrive(&bars.full[to.index]);
    }
  }
}

template <class T, class Tile>
__device__ void copy_pixels(Params const& p, uint32_t raw, Barriers<Tile>& bars) {
  constexpr int v = 16 / int(sizeof(T));
  if (p.alone) ptx::griddepcontrol_wait();
  Stage stage;
#pragma unroll 1
  for (int tile = int(blockIdx.x); tile < p.tiles; tile += int(gridDim.x)) {
    int n = tile;
    int const m = p.tiles_n.divide(n);
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step) {
      ptx::mbarrier_wait(&bars.raw_empty[stage.index], stage.parity ^ 1);
      uint64_t* const full = &bars.raw_full[stage.index];
      ptx::mbarrier_arrive_expect_tx(full, Tile::raw_bytes);
      uint32_t const to = raw + stage.index * Tile::raw_bytes;
#pragma unroll 1
      for (int phase = 0; phase < p.period; ++phase)
        ptx::cp_async_bulk_tensor_4d(to + (phase << p.log_phase) * Tile::raw_line, &p.in, full,
                                     (phase * p.depth & ~(v - 1)) + step * Tile::line, m << p.log_phase, 0, 0);
      stage.advance(Tile::raw_stages);
    }
  }
}

template <class Tile>
__device__ void copy_filters(Params const& p, uint32_t ring, Barriers<Tile>& bars) {
  ptx::griddepcontrol_wait();
  Stage stage;
#pragma unroll 1
  for (int tile = int(blockIdx.x); tile < p.tiles; tile += int(gridDim.x)) {
    int n = tile;
    p.tiles_n.divide(n);
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step) {
      ptx::mbarrier_wait(&bars.empty[stage.index], stage.parity ^ 1);
      uint64_t* const full = &bars.full[stage.index];
      ptx::mbarrier_arrive_expect_tx(full, Tile::a_bytes);
      ptx::cp_async_bulk_tensor_4d(ring + stage.index * Tile::stage_bytes, &p.filters, full, step * Tile::line,
                                   n * Tile::results, 0, 0);
      stage.advance(Tile::stages);
    }
  }
}

// A warpgroup's sums, to its part of shared memory: of each pixel 64 results.
template <class T, class Tile>
__device__ __forceinline__ void stage_results(float const (&acc)[Tile::pixels / 2], float const (&bias)[2],
                                              uint32_t staging) {
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32 % 4;
  if constexpr (sizeof(T) == 4) {
    staging += lane % 4 * 2 * Tile::out_line + (warp * 16 + lane / 4) * 4;
#pragma unroll
    for (int j = 0; j < Tile::pixels / 2; ++j)
      ptx::st_shared_f32(staging + (j / 4 * 8 + j % 2) * Tile::out_line + j / 2 % 2 * 32, acc[j] + bias[j / 2 % 2]);
  } else {
    int const part = lane / 8, line = lane % 8;
    staging += (part / 2 * 8 + line) * kLineBytes + ((warp * 2 + part % 2) ^ line) * 16;
#pragma unroll
    for (int j = 0; j < Tile::pixels; j += 16) {
      uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        v[i] = pack<T>(acc[j / 2 + i * 2] + bias[i % 2], acc[j / 2 + i * 2 + 1] + bias[i % 2]);
      ptx::stmatrix_x4_trans(staging + j * kLineBytes, v);
    }
  }
}

// From there to memory, `piece` bytes a lane: a warp stores one or several pixels' results at a time. Of 2 bytes two
// are put together, those that begin at a word: of every other pixel the first and the last are left, which lanes store
// singly.
template <class T, class Tile, int piece>
__device__ __forceinline__ void store_results(Params const& p, uint32_t staging, int m, int n) {
  constexpr int each = piece == 2 ? 2 : piece / int(sizeof(T)), lanes = 64 / each < 32 ? 64 / each : 32,
                together = 32 / lanes, turns = 64 / (lanes * each), at_once = 4 / turns;
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32 % 4;
  int const first = lane % lanes * each, results = min(p.N - n, 64), rows = p.rows - (m << p.log_phase);
  if (results <= 0) return;
  T* const out = static_cast<T*>(p.out) + (int64_t(m) << p.log_phase) * p.period * p.out_step + n;
  auto at = [&](int line, int i) {
    int const byte = i * int(sizeof(T));
    return staging + line * Tile::out_line + (sizeof(T) == 4 ? byte : ((byte / 16) ^ (line % 8)) * 16 + byte % 16);
  };
#pragma unroll 1
  for (int line0 = warp * together + lane / lanes; line0 < Tile::pixels; line0 += 4 * together * at_once) {
    T* to[at_once];
    uint4 v[at_once][turns];
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      int const line = line0 + j * 4 * together, phase = line >> p.log_phase, row = line - (phase << p.log_phase);
      bool const exists = row < rows;
      to[j] = exists ? out + int64_t(row * p.period + phase) * p.out_step : nullptr;
      bool const odd = piece == 2 && (reinterpret_cast<uint64_t>(to[j]) & 2) != 0;
#pragma unroll
      for (int turn = 0; turn < turns; ++turn) {
        int const i = first + turn * lanes * each;
        if (!exists) continue;
        if constexpr (piece == 16)
          v[j][turn] = ptx::ld_shared_v4(at(line, i));
        else
          v[j][turn].x = ptx::ld_shared(at(line, i));
        if constexpr (piece == 2) {  // an odd pixel's words begin one before
          uint32_t const before = __shfl_up_sync(__activemask(), v[j][turn].x, 1);
          if (odd) v[j][turn].y = v[j][turn].x >> 16, v[j][turn].x = __funnelshift_r(before, v[j][turn].x, 16);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      if (to[j] == nullptr) continue;
      bool const odd = piece == 2 && (reinterpret_cast<uint64_t>(to[j]) & 2) != 0;
#pragma unroll
      for (int turn = 0; turn < turns; ++turn) {
        int const i = first + turn * lanes * each - odd;
        uint4 const& value = v[j][turn];
        if constexpr (piece == 16) {
          if (i < results) *reinterpret_cast<uint4*>(to[j] + i) = value;
        } else if constexpr (piece == 4) {
          if (i < results) *reinterpret_cast<uint32_t*>(to[j] + i) = value.x;
        } else {
          auto* const words = reinterpret_cast<uint16_t*>(to[j]);
          if (i >= 0 && i + 1 < results)
            *reinterpret_cast<uint32_t*>(words + i) = value.x;
          else if (i >= 0 && i < results)
            words[i] = uint16_t(value.x);
          else if (i < 0)
            words[0] = uint16_t(value.x >> 16);
          if (odd && lane == 31 && results == 64) words[63] = uint16_t(value.y);
        }
      }
    }
  }
}

template <class T, class Tile>
__device__ void multiply(Params const& p, uint32_t ring, uint32_t staging, Barriers<Tile>& bars) {
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32;
  uint64_t const lines = tma::layout_of(kLineBytes);
  staging += group * Tile::pixels * Tile::out_line;
  if (p.bias != nullptr) ptx::griddepcontrol_wait();  // the launch before may have made it
  Stage stage;
#pragma unroll 1
  for (int tile = int(blockIdx.x); tile < p.tiles; tile += int(gridDim.x)) {
    int n = tile;
    int const m = p.tiles_n.divide(n);
    n = n * Tile::results + group * 64;
    float acc[Tile::pixels / 2], bias[2];
#pragma unroll
    for (float& sum : acc) sum = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = n + int(threadIdx.x) / 32 % 4 * 16 + lane / 4 + half * 8;
      bias[half] = p.bias != nullptr && row < p.N ? widen(static_cast<T const*>(p.bias)[row * p.bias_stride]) : 0.f;
    }
    int before = -1;
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step) {
      ptx::mbarrier_wait(&bars.full[stage.index], stage.parity);
      uint32_t const a = ring + stage.index * Tile::stage_bytes + group * 64 * kLineBytes,
                     b = ring + stage.index * Tile::stage_bytes + Tile::a_bytes;
      ptx::wgmma_fence_operand(acc);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        ptx::wgmma_mma_async<T, false, false>(acc, at_address(lines, a + k * 32), at_address(lines, b + k * 32));
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(acc);
      if (before >= 0 && lane == 0) ptx::mbarrier_arrive(&bars.empty[before]);
      before = stage.index;
      stage.advance(Tile::stages);
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
    if (lane == 0) ptx::mbarrier_arrive(&bars.empty[before]);
    ptx::bar_sync(1 + group, kWarpgroup);  // all have stored the tile before
    stage_results<T, Tile>(acc, bias, staging);
    ptx::bar_sync(1 + group, kWarpgroup);
    if (p.piece == 16) {
      store_results<T, Tile, 16>(p, staging, m, n);
    } else if (p.piece == 4) {
      store_results<T, Tile, 4>(p, staging, m, n);
    } else {
      if constexpr (sizeof(T) == 2) store_results<T, Tile, 2>(p, staging, m, n);
    }
  }
}

template <class T, int tile_m, int tile_n>
__global__ void __launch_bounds__(PhasesTile<T, tile_m, tile_n>::threads, PhasesTile<T, tile_m, tile_n>::blocks)
    main_kernel(__grid_constant__ Params const p) {
  using Tile = PhasesTile<T, tile_m, tile_n>;
  extern __shared__ uint8_t dynamic[];
  __shared__ Barriers<Tile> bars;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024),
                 staging = ring + Tile::stages * Tile::stage_bytes, raw = staging + Tile::staging_bytes;
  int const warp = warp_uniform(int(threadIdx.x) / 32);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::raw_stages; ++i) {
      ptx::mbarrier_init(&bars.raw_full[i], 1);
      ptx::mbarrier_init(&bars.raw_empty[i], 4);
    }
    for (int i = 0; i < Tile::stages; ++i) {
      ptx::mbarrier_init(&bars.full[i], 1 + 4);  // the copies of filters, and the warps that repack
      ptx::mbarrier_init(&bars.empty[i], Tile::groups * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (warp < Tile::groups * 4) {
    multiply<T, Tile>(p, ring, staging, bars);
  } else if (int const other = warp - Tile::groups * 4; other < Tile::repacking * 4) {
    repack<T, Tile>(p, raw, ring, bars, other / 4);
  } else if (ptx::elect()) {
    if (other == Tile::repacking * 4)
      copy_pixels<T, Tile>(p, raw, bars);
    else
      copy_filters<Tile>(p, ring, bars);
  }
}

// Filters as lines: of each of N results `pitch` channels, zeros behind the last; floats are rounded.
constexpr int kSide = 32;
template <class T>
__global__ void __launch_bounds__(256)
    lines_kernel(T const* w, int64_t step_n, int64_t step_k, int N, int depth, int pitch, T* lines) {
  __shared__ T square[kSide][kSide + 2];
  ptx::griddepcontrol_launch_dependents();
  int const x = int(threadIdx.x) % kSide, y = int(threadIdx.x) / kSide, k0 = int(blockIdx.x) * kSide,
            n0 = int(blockIdx.y) * kSide;
  bool const turned = step_n < step_k;  // neighbours in memory are of different lines
#pragma unroll
  for (int i = y; i < kSide; i += 256 / kSide) {
    int const n = n0 + (turned ? x : i), k = k0 + (turned ? i : x);
    T value{};
    if (n < N && k < depth) value = w[n * step_n + k * step_k];
    (turned ? square[x][i] : square[i][x]) = value;
  }
  __syncthreads();
#pragma unroll
  for (int i = y; i < kSide; i += 256 / kSide) {
    if (n0 + i >= N) break;
    T value = square[i][x];
    if constexpr (sizeof(T) == 4) value = __uint_as_float(ptx::cvt_rn_tf32(value));
    lines[int64_t(n0 + i) * pitch + k0 + x] = value;
  }
}

// ---- host side

template <Op op, DType dtype, int tile_m, int tile_n>
cudaError_t launch(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  using Tile = PhasesTile<T, tile_m, tile_n>;
  AnyPixels const s(op, problem);
  int const period = phases_period(s.depth, dtype), pitch = int(phases_pitch(problem, s.depth));
  Params p{};
  p.period = period, p.depth = int32_t(s.depth), p.N = int32_t(s.N), p.steps = pitch / Tile::line;
  p.rows = int32_t(s.M / period), p.log_phase = 0;
  while (period << p.log_phase < tile_m) ++p.log_phase;
  int64_t const tiles_n = ceil_div(s.N, tile_n);
  p.tiles_n = Divisor(tiles_n), p.tiles = int32_t(tiles_n * ceil_div(s.M, tile_m));
  p.piece = s.out.vector(dtype, 16) * size_of(dtype);
  if (p.piece == 8) p.piece = 4;
  p.out = args.out, p.out_step = s.out.step, p.bias = args.bias, p.bias_stride = args.bias_stride;
  int64_t const row = s.a.step * period;
  cudaError_t error =
      tma::encode_boxes(p.in, tma::Tensor4{args.a, dtype, {period == 1 ? s.depth : row, p.rows, 1, 1}, {1, row, 0, 0}},
                        Tile::raw_line / int(sizeof(T)), tile_m / period, 1, 1);
  if (error != cudaSuccess) return error;
  Strides const& w = problem.w;
  p.alone = phases_take_filters(op, problem);
  error = p.alone ? tma::encode_matrix(p.filters, args.b, dtype, s.depth, s.N, w.n, tile_n, 1, 0, Tile::line)
                  : tma::encode_matrix(p.filters, args.workspace, dtype, pitch, s.N, pitch, tile_n, 1, 0, Tile::line);
  if (error != cudaSuccess) return error;
  if (!p.alone) {
    constexpr bool forward = op == Op::fprop;
    dim3 const squares(unsigned(pitch / kSide), unsigned(ceil_div(s.N, kSide)));
    lines_kernel<T><<<squares, 256, 0, stream>>>(static_cast<T const*>(args.b), forward ? w.n : w.c,
                                                 forward ? w.c : w.n, p.N, p.depth, pitch,
                                                 static_cast<T*>(args.workspace));
    if ((error = cudaGetLastError()) != cudaSuccess) return error;
  }
  auto* const kernel = main_kernel<T, tile_m, tile_n>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::shared_bytes);
  if (error != cudaSuccess) return error;
  int sms = 0;
  if ((error = count_sms(sms)) != cudaSuccess) return error;
  dim3 const blocks(unsigned(min64(p.tiles, int64_t(sms) * Tile::blocks)));
  return launch_dependent(kernel, blocks, Tile::threads, Tile::shared_bytes, stream, p);
}

}  // namespace conv2d_ext::pixel_phases

#define CONV2D_EXT_PIXELS_PHASES_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                       \
    return pixel_phases::launch<Op::op, DType::dtype, tm, tn>(p, args, stream);   \
  }
