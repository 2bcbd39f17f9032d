// dgrad with a stride of two and few channels, f16 and bf16: the four phases of the stride at once. tma.cuh takes them
// one after the other, each a convolution of its own, which copies y again and stores pixels that lie apart. Here a
// tile of pixels of y has the columns of all phases, CW channels each, in the order (a, b, c) of
//   x[2i + a, 2j + b, c] = sum over taps (u, v) and k of y[i + u, j + v, k] * w[k, r, s, c],  r(a, u), s(b, v).
// A tap is multiplied for those phases alone that have it. One copy of y serves a row of taps, as in tma.cuh's halo.
//
// The filters are copied once and stay. Each of two warpgroups computes tiles of its own, with a copying warp and a
// ring of stages of its own, so that one multiplies while the other stores.
#pragma once

#include "tma.cuh"

namespace conv2d_ext::tma {

constexpr int CW = PhasesShape::CW;

struct PhasesParams {
  CUtensorMap a, b;
  int64_t M;              // pixels of y that tiles are made of, padded columns included
  Divisor rows, columns;  // an image
  int32_t valid_columns, tiles;
  int32_t H, W, C;
  int32_t h0, w0;                                    // the first pixel at the first tap
  int32_t taps_h, taps_w;                            // u, v
  int32_t r[kMaxPhaseTaps][2], s[kMaxPhaseTaps][2];  // of a phase, -1: it does not have the tap
  int32_t R, S, chunks, stages;
  int32_t line, a_bytes, run_bytes;  // of a pixel, a stage, a chunk of filters at a tap
  int64_t out_n, out_h, out_w;
  void* out;
};

struct PhasesTables {
  uint64_t full[2][kMaxStages], empty[2][kMaxStages], filters;
};

// The tiles of warpgroup `group` are those of half a block.
__device__ inline int first_tile(int group) { return int(blockIdx.x) * 2 + group; }
__device__ inline int next_tile(int tile) { return tile + int(gridDim.x) * 2; }

__device__ inline void phases_copy(PhasesParams const& p, int group, uint32_t filters, uint32_t ring,
                                   PhasesTables& tables) {
  int const chunk_size = p.line / 2, runs = p.R * p.S * p.chunks;
  ptx::mbarrier_arrive_expect_tx(&tables.filters, (runs + 1 - group) / 2 * p.run_bytes);
  for (int run = group; run < runs; run += 2) {
    int const tap = run / p.chunks;
    ptx::cp_async_bulk_tensor_4d(filters + run * p.run_bytes, &p.b, &tables.filters, 0, tap % p.S, tap / p.S,
                                 run % p.chunks * chunk_size);
  }
  Stage at;
  for (int tile = first_tile(group); tile < p.tiles; tile = next_tile(tile)) {
    int64_t j = int64_t(tile) * PhasesShape::TM;
    int64_t i = p.columns.divide(j);
    int const n = int(p.rows.divide(i)), h = p.h0 + int(i), w = p.w0 + int(j);
    for (int u = 0; u < p.taps_h; ++u)
      for (int chunk = 0; chunk < p.chunks; ++chunk) {
        uint64_t* const full = &tables.full[group][at.index];
        ptx::mbarrier_wait(&tables.empty[group][at.index], at.parity ^ 1);  // passes on the first trip round the ring
        ptx::mbarrier_arrive_expect_tx(full, p.a_bytes);
        ptx::cp_async_bulk_tensor_im2col(ring + at.index * p.a_bytes, &p.a, full, chunk * chunk_size, w, h, n, 0, u);
        at.advance(p.stages);
      }
  }
}

// Stores the sums of 64 pixels, from row `first` of the tile on. Pieces of 64 columns pass through shared memory, so
// that eight lanes store a line of 128 bytes; every warp has its own 16 pixels, and waits for no other.
template <class T>
__device__ void phases_store(PhasesParams const& p, int64_t first, float const (&acc)[4][CW / 2], uint32_t staging) {
  int const warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  uint32_t const lines = staging + warp * 16 * kLineBytes;
  // Of pixel lane % 16: the offset in phase (0, 0), a multiple of 8, or -1; bits 0 and 1: there are pixels of b = 1, a
  // = 1.
  int64_t j = first + warp * 16 + lane % 16, to = -1;
  bool const is_pixel = j < p.M;
  int64_t i = p.columns.divide(j);
  int64_t const n = p.rows.divide(i);
  if (is_pixel && j < p.valid_columns)
    to = (n * p.out_n + i * 2 * p.out_h + j * 2 * p.out_w) | int64_t(2 * j + 1 < p.W) | int64_t(2 * i + 1 < p.H) << 1;
#pragma unroll
  for (int piece = 0; piece < CW / 16; ++piece) {
    __syncwarp();  // the last piece has been read
#pragma unroll
    for (int t = 0; t < 4; ++t) {  // 16 columns
      uint32_t v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int const at = (piece * 8 + t * 2 + e / 2) * 4 + e % 2 * 2;
        v[e] = pack<T>(acc[at / (CW / 2)][at % (CW / 2)], acc[at / (CW / 2)][at % (CW / 2) + 1]);
      }
      int const line = lane % 16, chunk = t * 2 + lane / 16;
      ptx::stmatrix_x4(lines + line * kLineBytes + (chunk ^ (line % 8)) * 16, v);
    }
    __syncwarp();
    int const column = piece * 64 + lane % 8 * 8, phase = column / CW, c = column % CW;
    int const needs = phase % 2 | phase / 2 << 1;
    T* const out = static_cast<T*>(p.out) + phase / 2 * p.out_h + phase % 2 * p.out_w + c;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const line = lane / 8 + i * 4;
      uint4 const v = ptx::ld_shared_v4(lines + line * kLineBytes + ((lane % 8) ^ (line % 8)) * 16);
      int64_t const at = __shfl_sync(0xffffffff, to, line);
      // An index in vectors: the compiler splits the store if the bits are masked out of an offset in elements.
      if (at >= 0 && (int(at) & needs) == needs && c < p.C) reinterpret_cast<uint4*>(out)[at / 8] = v;
    }
  }
}

template <class T>
__device__ void phases_multiply(PhasesParams const& p, uint32_t filters, uint32_t ring, uint32_t staging,
                                PhasesTables& tables) {
  constexpr int TM = PhasesShape::TM, halves = TM / 64, line_b = CW * int(sizeof(T));
  int const group = __shfl_sync(0xffffffff, int(threadIdx.x) / kWarpgroup, 0), lane = int(threadIdx.x) % 32;
  uint64_t const layout = layout_of(p.line), layout_b = layout_of(line_b);
  Stage at;
  float acc[halves][4][CW / 2];
  auto fence = [&] {
#pragma unroll
    for (int h = 0; h < halves; ++h)
#pragma unroll
      for (int phase = 0; phase < 4; ++phase) ptx::wgmma_fence_operand(acc[h][phase]);
  };
  auto release = [&](int stage) {  // -1: none
    if (lane == 0 && stage >= 0) ptx::mbarrier_arrive(&tables.empty[group][stage]);
  };
  ptx::mbarrier_wait(&tables.filters, 0);
  for (int tile = first_tile(group); tile < p.tiles; tile = next_tile(tile)) {
#pragma unroll
    for (int h = 0; h < halves; ++h)
#pragma unroll
      for (int i = 0; i < 2 * CW; ++i) acc[h][i / (CW / 2)][i % (CW / 2)] = 0;
    int before = -1;  // stage of the multiplications that are under way
    for (int u = 0; u < p.taps_h; ++u)
      for (int chunk = 0; chunk < p.chunks; ++chunk) {
        ptx::mbarrier_wait(&tables.full[group][at.index], at.parity);
        for (int v = 0; v < p.taps_w; ++v) {
          uint32_t const from_a = ring + at.index * p.a_bytes + v * p.line;
          fence();
#pragma unroll
          for (int phase = 0; phase < 4; ++phase) {
            int const r = p.r[u][phase / 2], s = p.s[v][phase % 2];
            if (r < 0 || s < 0) continue;
            uint32_t const from_b = filters + ((r * p.S + s) * p.chunks + chunk) * p.run_bytes;
            auto instruct = [&](auto count) {
              ptx::wgmma_fence();
#pragma unroll
              for (int k = 0; k < decltype(count)::value; ++k)
#pragma unroll
                for (int h = 0; h < halves; ++h)
                  ptx::wgmma_mma_async<T, false, true>(acc[h][phase],
                                                       at_address(layout, from_a + h * 64 * p.line + k * 32),
                                                       at_address(layout_b, from_b + k * 16 * line_b));
            };
            // The count is a constant in each: the instructions of a loop would wait for each other.
            if (p.line == kLineBytes)
              instruct(std::integral_constant<int, 4>());
            else
              instruct(std::integral_constant<int, 2>());
          }
          ptx::wgmma_commit_group();
          ptx::wgmma_wait_group<1>();
          fence();
          release(before);  // the step before has been read
          before = v == p.taps_w - 1 ? at.index : -1;
        }
        at.advance(p.stages);
      }
    ptx::wgmma_wait_group<0>();
    fence();
    release(before);
#pragma unroll
    for (int h = 0; h < halves; ++h) phases_store<T>(p, int64_t(tile) * TM + h * 64, acc[h], staging);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) phases_kernel(__grid_constant__ PhasesParams const p) {
  using S = Shape<T, 128, 256>;
  extern __shared__ uint8_t dynamic[];
  __shared__ PhasesTables tables;
  uint32_t const filters = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  uint32_t const rings = filters + p.R * p.S * p.chunks * p.run_bytes;
  if (threadIdx.x % 32 == 0) {
    for (int i = int(threadIdx.x) / 32; i < 2 * kMaxStages; i += kThreads / 32) {
      ptx::mbarrier_init(&tables.full[i / kMaxStages][i % kMaxStages], 1);
      ptx::mbarrier_init(&tables.empty[i / kMaxStages][i % kMaxStages], kWarpgroup / 32);
    }
    if (threadIdx.x == 0) ptx::mbarrier_init(&tables.filters, 2);  // copying warps
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
  int const warpgroup = int(threadIdx.x) / kWarpgroup;
  if (warpgroup < 2) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    phases_multiply<T>(p, filters, rings + warpgroup * p.stages * p.a_bytes,
                       filters + kPhasesBytes + warpgroup * kRunBytes, tables);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    int const group = int(threadIdx.x) / 32 % 4;
    if (group < 2 && threadIdx.x % 32 == 0)
      phases_copy(p, group, filters, rings + group * p.stages * p.a_bytes, tables);
  }
}

template <DType dtype>
cudaError_t launch_phases(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr int TM = PhasesShape::TM, shared_bytes = kPhasesBytes + 2 * kRunBytes + 1024;
  static_assert(shared_bytes + int(sizeof(PhasesTables)) + 1024 <= 228 * 1024);
  Strides const &x = problem.x, &y = problem.y, &w = problem.w;
  PhasesParams p{};
  PhaseTaps const h = phase_taps(problem.H, problem.R, problem.pad_top),
                  v = phase_taps(problem.W, problem.S, problem.pad_left);
  for (int phase = 0; phase < 2; ++phase) {
    for (int i = 0; i < h.count; ++i) p.r[i][phase] = int32_t(h.tap(i, phase));
    for (int i = 0; i < v.count; ++i) p.s[i][phase] = int32_t(v.tap(i, phase));
  }
  Walk const walk_h = h.walk(), walk_w = halo_walk(v.walk());
  PhasesShape const shape(problem);
  p.rows = Divisor(walk_h.pixels), p.columns = Divisor(walk_w.pixels), p.valid_columns = int32_t(v.walk().pixels);
  p.M = problem.N * walk_h.pixels * walk_w.pixels, p.tiles = int32_t(ceil_div(p.M, TM));
  p.H = int32_t(problem.H), p.W = int32_t(problem.W), p.C = int32_t(problem.C);
  p.R = int32_t(problem.R), p.S = int32_t(problem.S);
  p.h0 = int32_t(walk_h.lower), p.w0 = int32_t(walk_w.lower), p.taps_h = int32_t(h.count), p.taps_w = int32_t(v.count);
  p.line = shape.line, p.a_bytes = shape.a_bytes, p.run_bytes = shape.run_bytes;
  p.chunks = int32_t(shape.chunks), p.stages = int32_t(min64(shape.stages, kMaxStages));
  p.out_n = x.n, p.out_h = x.h, p.out_w = x.w, p.out = args.out;
  int const chunk_size = p.line / int(sizeof(T));
  Tensor4 const a{args.a, dtype, {problem.K, problem.Q(), problem.P(), problem.N}, {1, y.w, y.h, y.n}};
  cudaError_t error = encode_im2col(p.a, a, walk_h, walk_w, chunk_size, TM + kHalo);
  if (error != cudaSuccess) return error;
  Tensor4 const b{args.b, dtype, {problem.C, problem.S, problem.R, problem.K}, {1, w.w, w.h, w.n}};
  error = encode_tiled(p.b, b, CW, 1, 1, chunk_size, 1, 1, CU_TENSOR_MAP_SWIZZLE_64B);
  if (error != cudaSuccess) return error;
  auto const kernel = phases_kernel<T>;
  if ((error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes)) != cudaSuccess)
    return error;
  int sm_count = 0;
  if ((error = count_sms(sm_count)) != cudaSuccess) return error;
  return launch_dependent(kernel, dim3(unsigned(min64(ceil_div(p.tiles, 2), sm_count))), kThreads, shared_bytes, stream,
                          p);
}

}  // namespace conv2d_ext::tma
