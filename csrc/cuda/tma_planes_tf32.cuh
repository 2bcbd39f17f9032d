// fprop and dgrad of dense layers over NCHW in TF32 with stride 1, in place: pixels are read as they lie, in planes.
//
// wgmma takes TF32 from shared memory with the reduction contiguous only, but its first operand may come from
// registers. So pixels are the rows of the instruction, whose fragments threads load from a tile of planes, 16 channels
// of the pixels that all taps of a warpgroup's tile meet: one copy serves them all, a tap is a distance, and the copy
// engine rounds to TF32 and puts zeros for the padding. Filters are the columns, packed beforehand in the order of the
// steps.
//
// A warpgroup has TM / 2 pixels in blocks of 64, which lie below each other in the image. With several rows of taps
// the block one below is the next tap's operand: a fragment is loaded once for a column of taps. Two warpgroups with a
// tile each share the filters; one thread of a third has the copies made.
#pragma once

#include "../core/tma_planes_tf32.h"
#include "dependent.cuh"
#include "fragments.cuh"
#include "launch.h"
#include "tma.cuh"

namespace conv2d_ext::planes_tf32 {

using tma::Divisor;

// 64K registers: the third warpgroup only copies.
constexpr int kThreads = 3 * kWarpgroup, kCopyRegs = 56, kMultiplyRegs = 224;
constexpr int kFilterLine = kTf32PlaneDepth * 4;     // bytes of a filter in a stage
constexpr int kSharedBytes = kTf32PlaneRing + 1024;  // the ring begins at a multiple of 1024

struct Params {
  CUtensorMap pixels;
  char const* filters;  // packed
  float const* bias;
  int64_t bias_stride;
  float* out;
  int64_t out_n, out_c, out_h;
  Divisor tiles_n, tiles_w, tiles_h;
  int32_t units;                 // of two tiles by TN filters
  int32_t images, N, P, Q;       // of the result; N: its channels
  int32_t chunks, taps_w, rows;  // of the reduction; rows: groups of rows of taps
  int32_t top, left, lead;       // of a copy's first pixel; its columns before those of tap 0
  int32_t tap_h, tap_w;
  bool vectors;  // the result takes pairs
  int32_t log_columns, log_spread;
  int32_t tile_columns, tile_rows;
  int32_t box_w, plane;  // floats
  int32_t a_bytes, stages_a, stages_b;
};

struct Tables {
  uint64_t full_a[kMaxStages], empty_a[kMaxStages], full_b[kMaxStages], empty_b[kMaxStages];
};

struct Tile {
  int n, h, w;  // of its first pixel

  __device__ Tile(Params const& p, int tile) {
    int i = tile, j = p.tiles_w.divide(i);  // i: along a row
    n = p.tiles_h.divide(j);
    h = j * p.tile_rows, w = i * p.tile_columns;
  }
};

template <int b_bytes>
__device__ void copy(Params const& p, uint32_t ring, Tables& tables) {
  Stage a, b;
  uint32_t const ring_b = ring + p.stages_a * 2 * p.a_bytes;
  ptx::griddepcontrol_wait();  // the filters have been packed
  for (int u = int(blockIdx.x); u < p.units; u += int(gridDim.x)) {
    int n_tile = u;
    int const pair = p.tiles_n.divide(n_tile), steps = p.taps_w * p.rows;
    Tile const tiles[2] = {Tile(p, pair * 2), Tile(p, pair * 2 + 1)};
    char const* filters = p.filters + int64_t(n_tile) * p.chunks * steps * b_bytes;
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      ptx::mbarrier_wait(&tables.empty_a[a.index], a.parity ^ 1);  // passes at once on the first trip round the ring
      ptx::mbarrier_arrive_expect_tx(&tables.full_a[a.index], 2 * p.a_bytes);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        ptx::cp_async_bulk_tensor_4d(ring + (a.index * 2 + i) * p.a_bytes, &p.pixels, &tables.full_a[a.index],
                                     tiles[i].w + p.left, tiles[i].h + p.top, chunk * kTf32PlaneDepth, tiles[i].n);
      a.advance(p.stages_a);
      for (int step = 0; step < steps; ++step, filters += b_bytes) {
        ptx::mbarrier_wait(&tables.empty_b[b.index], b.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(&tables.full_b[b.index], b_bytes);
        ptx::cp_async_bulk(ring_b + b.index * b_bytes, filters, b_bytes, &tables.full_b[b.index]);
        b.advance(p.stages_b);
      }
    }
  }
}

// The row of the image of piece `sub` of a tile's first block, from the tile's first row.
template <int blocks>
__device__ inline int row_of(Params const& p, int sub) {
  int const rest = sub & ((1 << p.log_spread) - 1);
  return rest + (sub - rest) * blocks;
}

template <int blocks, int TN, int row_taps>
__device__ void store(Params const& p, Tile const& tile, int n_tile, float const (&acc)[blocks][TN / 2]) {
  int const warp = int(threadIdx.x) % kWarpgroup / 32, quad = int(threadIdx.x) % 4;
  int const row = warp * 16 + int(threadIdx.x) % 32 / 4 * 2;
  int const first = n_tile * TN + quad * 2, below = row_taps == 1 ? 1 : 1 << p.log_spread;
  int h[2], w[2];
  float* to[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int const at = row + i;
    h[i] = tile.h + row_of<blocks>(p, at >> p.log_columns), w[i] = tile.w + (at & (p.tile_columns - 1));
    if (tile.n >= p.images || w[i] >= p.Q) h[i] = p.P;
    to[i] = p.out + tile.n * p.out_n + h[i] * p.out_h + w[i] + first * p.out_c;
  }
  float const* bias = p.bias == nullptr ? nullptr : p.bias + first * p.bias_stride;
#pragma unroll
  for (int j = 0; j < TN / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      int const n = first + j * 8 + e;
      if (n >= p.N) continue;
      float const add = bias == nullptr ? 0.0f : bias[(j * 8 + e) * p.bias_stride];
      if (p.vectors) {
#pragma unroll
        for (int b = 0; b < blocks; ++b)
          if (h[0] + b * below < p.P)
            __stcs(reinterpret_cast<float2*>(to[0] + (j * 8 + e) * p.out_c + b * below * p.out_h),
                   make_float2(acc[b][j * 4 + e] + add, acc[b][j * 4 + 2 + e] + add));
        continue;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int b = 0; b < blocks; ++b)
          if (h[i] + b * below < p.P)
            __stcs(to[i] + (j * 8 + e) * p.out_c + b * below * p.out_h, acc[b][j * 4 + i * 2 + e] + add);
    }
  }
}

template <int blocks, int TN, int row_taps>
__device__ void multiply(Params const& p, uint32_t ring, Tables& tables) {
  constexpr int b_bytes = row_taps * TN * kFilterLine, instructions = kTf32PlaneDepth / 8;
  constexpr int fragments = blocks + row_taps - 1;  // of a step, each of a row of pixels
  static_assert(fragments > 1);                     // filters are given back with the second
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32;
  int const row = int(threadIdx.x) % kWarpgroup / 32 * 16 + lane / 4 * 2;
  // Rows i and i + 8 of a warp's sixteen are neighbouring pixels, which are stored together. Lanes of odd channels load
  // the second one first, so that a load meets every bank once.
  bool const odd = lane % 2 == 1;
  uint32_t const ring_b = ring + p.stages_a * 2 * p.a_bytes;
  auto place = [&](int i) {
    return (lane % 4 * p.plane + row_of<blocks>(p, i >> p.log_columns) * p.box_w + p.lead +
            (i & (p.tile_columns - 1))) *
           4;
  };
  uint32_t const pixels = ring + group * p.a_bytes + place(row + odd), second = odd ? -4 : 4;
  uint32_t const four = p.plane * 16, line = (p.box_w * 4) << (row_taps == 1 ? 0 : p.log_spread);
  uint64_t const layout = tma::layout_of(kFilterLine);
  Stage a, b;
  for (int u = int(blockIdx.x); u < p.units; u += int(gridDim.x)) {
    int n_tile = u;
    int const pair = p.tiles_n.divide(n_tile);
    float acc[blocks][TN / 2];
#pragma unroll
    for (int i = 0; i < blocks; ++i)
#pragma unroll
      for (int j = 0; j < TN / 2; ++j) acc[i][j] = 0;
    uint32_t v[2][instructions][4] = {};
    int before = -1;  // stage of the filters that are under way
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      ptx::mbarrier_wait(&tables.full_a[a.index], a.parity);
      uint32_t const from_a = pixels + a.index * 2 * p.a_bytes;
      for (int s = 0; s < p.taps_w; ++s)
        for (int r = 0; r < p.rows; ++r) {
          ptx::mbarrier_wait(&tables.full_b[b.index], b.parity);
          uint32_t const from_b = ring_b + b.index * b_bytes;
          uint32_t from = from_a + (s * p.tap_w + r * row_taps * p.tap_h * p.box_w) * 4;
#pragma unroll
          for (int i = 0; i < fragments; ++i, from += line) {
            ptx::wgmma_wait_group<1>();  // fragments are loaded while those before are multiplied
            ptx::wgmma_fence_operand(v[i % 2]);
            if (i == 1 && before >= 0 && lane == 0) ptx::mbarrier_arrive(&tables.empty_b[before]);
#pragma unroll
            for (int k = 0; k < instructions; ++k) {
              uint32_t const at = from + k * 2 * four;
              uint32_t const a = ptx::ld_shared(at), b = ptx::ld_shared(at + second);
              uint32_t const c = ptx::ld_shared(at + four), d = ptx::ld_shared(at + four + second);
              v[i % 2][k][0] = odd ? b : a, v[i % 2][k][1] = odd ? a : b;
              v[i % 2][k][2] = odd ? d : c, v[i % 2][k][3] = odd ? c : d;
            }
#pragma unroll
            for (int t = 0; t < row_taps; ++t)
              if (i - t >= 0 && i - t < blocks) ptx::wgmma_fence_operand(acc[i - t]);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < instructions; ++k)
#pragma unroll
              for (int t = 0; t < row_taps; ++t)
                if (i - t >= 0 && i - t < blocks)
                  ptx::wgmma_mma_async_tf32(acc[i - t], v[i % 2][k],
                                            tma::at_address(layout, from_b + t * TN * kFilterLine + k * 32));
            ptx::wgmma_commit_group();
          }
          before = b.index;
          b.advance(p.stages_b);
        }
      // The fragments are in registers, or their instructions had not been issued.
      if (lane == 0) ptx::mbarrier_arrive(&tables.empty_a[a.index]);
      a.advance(p.stages_a);
    }
    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (int i = 0; i < blocks; ++i) ptx::wgmma_fence_operand(acc[i]);
    if (lane == 0 && before >= 0) ptx::mbarrier_arrive(&tables.empty_b[before]);
    store<blocks, TN, row_taps>(p, Tile(p, pair * 2 + group), n_tile, acc);
  }
}

template <int blocks, int TN, int row_taps>
__global__ void __launch_bounds__(kThreads, 1) kernel(__grid_constant__ Params const p) {
  extern __shared__ uint8_t dynamic[];
  __shared__ Tables tables;
  static_assert(kSharedBytes + sizeof(Tables) + 1024 <= 228 * 1024);
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  if (threadIdx.x < kMaxStages) {
    ptx::mbarrier_init(&tables.full_a[threadIdx.x], 1);
    ptx::mbarrier_init(&tables.empty_a[threadIdx.x], 8);
    ptx::mbarrier_init(&tables.full_b[threadIdx.x], 1);
    ptx::mbarrier_init(&tables.empty_b[threadIdx.x], 8);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 2 * kWarpgroup) {
    ptx::setmaxnreg_inc<kMultiplyRegs>();
    multiply<blocks, TN, row_taps>(p, ring, tables);
  } else {
    ptx::setmaxnreg_dec<kCopyRegs>();
    if (threadIdx.x == 2 * kWarpgroup) copy<row_taps * TN * kFilterLine>(p, ring, tables);
  }
}

// The filters in the order of the steps: tile, chunk, column of taps, row of taps, then lines of 16 channels, swizzled
// by 64 bytes, with zeros behind the last filter and channel.
struct PackParams {
  float const* w;
  float4* out;
  int64_t n, c, r, s;  // element strides of w by its place in the product: column, channel, tap
  int32_t N, C;
  Divisor taps, taps_w, chunks, tn;
  int32_t first_r, step_r, first_s, step_s, taps_h;
  bool columns_first;
  int64_t count;
  Divisor quads, columns;
};

template <int threads>
__global__ void __launch_bounds__(threads) pack_kernel(__grid_constant__ PackParams const p) {
  ptx::griddepcontrol_launch_dependents();
  for (int64_t t = blockIdx.x * int64_t(threads) + threadIdx.x; t < p.count; t += gridDim.x * int64_t(threads)) {
    int tap = int(t), i = p.taps.divide(tap), quad = i, n = i;
    if (p.columns_first)
      quad = p.columns.divide(n);
    else
      n = p.quads.divide(quad);
    int s = tap;
    int const r = p.taps_w.divide(s);
    float v[4];
    float const* from =
        p.w + n * p.n + quad * 4 * p.c + (p.first_r + r * p.step_r) * p.r + (p.first_s + s * p.step_s) * p.s;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      v[j] = n < p.N && quad * 4 + j < p.C ? __uint_as_float(ptx::cvt_rn_tf32(from[j * p.c])) : 0.0f;
    int row = n;
    int const tile = p.tn.divide(row), chunk = quad / 4;
    int64_t const line = (((int64_t(tile) * p.chunks + chunk) * p.taps_w + s) * p.taps_h + r) * p.tn + row;
    p.out[line * 4 + (quad % 4 ^ (row / 2 % 4))] = make_float4(v[0], v[1], v[2], v[3]);
  }
}

constexpr int log2_of(int64_t v) { return v <= 1 ? 0 : 1 + log2_of(v / 2); }

// TM pixels by TN channels of the result.
template <Op op, int TM, int TN>
cudaError_t launch(Problem const& problem, Plan const&, Arguments const& args, cudaStream_t stream) {
  constexpr int blocks = TM / 128;
  int sm_count = 0;
  cudaError_t error = count_sms(sm_count);
  if (error != cudaSuccess) return error;
  constexpr bool forward = op == Op::fprop;
  Walk const h = walk_h(op, problem, 0), w = walk_w(op, problem, 0);
  Tf32PlaneTile const tile = tf32_plane_tile(TM, TN, op, problem);
  Strides const& in = forward ? problem.x : problem.y;
  Strides const& out = forward ? problem.y : problem.x;
  int64_t const C = forward ? problem.C : problem.K, N = forward ? problem.K : problem.C;
  int64_t const chunks = ceil_div(C, kTf32PlaneDepth), tiles_n = ceil_div(N, TN);

  PackParams q{};
  q.w = static_cast<float const*>(args.b), q.out = static_cast<float4*>(args.workspace);
  q.n = forward ? problem.w.n : problem.w.c, q.c = forward ? problem.w.c : problem.w.n;
  q.r = problem.w.h, q.s = problem.w.w;
  q.N = int32_t(N), q.C = int32_t(C);
  q.taps = Divisor(h.taps * w.taps), q.taps_w = Divisor(w.taps), q.taps_h = int32_t(h.taps);
  q.chunks = Divisor(chunks), q.tn = Divisor(TN);
  q.first_r = int32_t(h.first_tap), q.step_r = int32_t(h.tap_step);
  q.first_s = int32_t(w.first_tap), q.step_s = int32_t(w.tap_step);
  q.columns_first = !forward;
  q.quads = Divisor(chunks * 4), q.columns = Divisor(tiles_n * TN);
  q.count = tiles_n * TN * chunks * 4 * h.taps * w.taps;
  pack_kernel<256><<<unsigned(min64(ceil_div(q.count, 256), sm_count * 8)), 256, 0, stream>>>(q);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;

  Params p{};
  tma::Tensor4 const planes{args.a,
                            DType::f32,
                            {forward ? problem.W : problem.Q(), forward ? problem.H : problem.P(), C, problem.N},
                            {1, in.h, in.c, in.n},
                            true};
  error = tma::encode_boxes(p.pixels, planes, int(tile.box_w), int(tile.box_h), kTf32PlaneDepth, 1);
  if (error != cudaSuccess) return error;
  p.filters = static_cast<char const*>(args.workspace);
  p.bias = static_cast<float const*>(args.bias), p.bias_stride = args.bias_stride;
  p.out = static_cast<float*>(args.out), p.out_n = out.n, p.out_c = out.c, p.out_h = out.h;
  p.tiles_n = Divisor(tiles_n), p.tiles_w = Divisor(tile.tiles_w), p.tiles_h = Divisor(tile.tiles_h);
  p.units = int32_t(ceil_div(problem.N * tile.tiles_h * tile.tiles_w, 2) * tiles_n);
  p.images = int32_t(problem.N), p.N = int32_t(N), p.P = int32_t(h.pixels), p.Q = int32_t(w.pixels);
  p.chunks = int32_t(chunks), p.taps_w = int32_t(w.taps), p.rows = int32_t(h.taps / tile.row_taps);
  p.top = int32_t(h.lower), p.left = int32_t(w.lower - tile.lead), p.lead = int32_t(tile.lead),
  p.tap_h = int32_t(h.tap_stride), p.tap_w = int32_t(w.tap_stride);
  p.log_columns = log2_of(tile.columns), p.log_spread = log2_of(tile.spread);
  p.tile_columns = int32_t(tile.columns), p.tile_rows = int32_t(tile.rows);
  p.box_w = int32_t(tile.box_w), p.plane = int32_t(tile.box_w * tile.box_h);
  p.a_bytes = int32_t(tile.a_bytes), p.stages_a = int32_t(tile.stages_a), p.stages_b = int32_t(tile.stages_b);
  auto even = [](int64_t size, int64_t step) { return size == 1 || step % 2 == 0; };
  p.vectors = p.Q % 2 == 0 && (forward ? problem.y_align : problem.x_align) >= 8 && even(problem.N, out.n) &&
              even(N, out.c) && even(p.P, out.h);
  auto* chosen = tile.row_taps == 3 ? kernel<blocks, TN, 3> : kernel<blocks, TN, 1>;
  if constexpr (TN <= 64) {
    if (tile.row_taps == 5) chosen = kernel<blocks, TN, 5>;
    if (tile.row_taps == 7) chosen = kernel<blocks, TN, 7>;
  }
  error = cudaFuncSetAttribute(chosen, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch_dependent(chosen, dim3(unsigned(min64(p.units, sm_count))), kThreads, kSharedBytes, stream, p);
}

}  // namespace conv2d_ext::planes_tf32

#define CONV2D_EXT_TMA_TF32_PLANES_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                         \
    return planes_tf32::launch<Op::op, tm, tn>(p, plan, args, stream);              \
  }
