// fprop and dgrad of 1x1 filters in NCHW in TF32, in place: out[n, pixel] = sum over c of filters[n, c] * in[c, pixel].
// In NCHW a channel's pixels are contiguous, and wgmma takes TF32 operands from shared memory with the reduction
// contiguous only. So the pixels are the rows of the product: they pass through registers, where they are rounded to
// nearest, and the order in which registers hold them is free.
//
// An image's pixels are cut into runs of 32. A stage holds the lines of TM / 32 runs: 32 channels, 128 bytes of pixels
// each, swizzled. A multiplying warp has a run. Of a line a thread loads four neighbouring pixels, which
// are its rows of two instructions; an accumulator's column then has four neighbouring pixels of a filter in each of
// eight threads: 128 contiguous bytes of the result, which go to memory from registers.
//
// A persistent block has TN filters of a group (blockIdx.y), rounded and ordered beforehand by prepare_kernel. They
// stay in shared memory if there is room, or come with the stages.
#pragma once

#include "../core/pixels.h"
#include "dependent.cuh"
#include "tma.cuh"

namespace conv2d_ext::pixels {

using tma::Divisor, tma::Tensor4, tma::encode_tiled;

constexpr int kWarps = 8;  // that multiply
constexpr int kThreads = kWarps * 32 + 128;
constexpr int kRunPixels = run_pixels(DType::f32);
constexpr int kRunBytes = kTf32Line * kLineBytes;        // of a warp, in a stage
constexpr int kSharedBytes = PixelsShape::bytes + 1024;  // the swizzle wants 1024-byte alignment

// 64K registers: two multiplying warpgroups and one that copies.
constexpr int kMultiplyRegs = 224, kCopyRegs = 56;
static_assert((2 * kMultiplyRegs + kCopyRegs) * kWarpgroup <= 65536);

struct Params {
  CUtensorMap in, filters;
  float const* bias;
  float* out;
  int64_t bias_stride, out_n, out_c;
  Divisor runs;  // of an image
  int32_t all_runs, pixels, N;
  int32_t chunks;  // of 32 channels of the reduction
  int32_t tiles, tiles_n;
  int32_t stages, stage_bytes;
  bool keep;  // the filters stay in shared memory
  bool once;  // L2 gives up pixels first
};

// The filters, rounded, their channels in whole lines. Of the places 8 i to 8 i + 7 of a line lane % 4 = q has q and
// q + 4 of an instruction, which are channels 8 i + 2 q and the next: of four lanes' lines the swizzle makes different
// banks.
struct PrepareParams {
  float const* w;
  float* out;
  int64_t n, k, group;  // strides of w
  int32_t N, depth, line;
  bool rows;  // neighbouring threads read neighbouring filters
};

__global__ void __launch_bounds__(256) prepare_kernel(__grid_constant__ PrepareParams const p) {
  ptx::griddepcontrol_launch_dependents();
  int64_t const i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= int64_t(p.N) * p.line) return;
  int const n = int(p.rows ? i % p.N : i / p.line), place = int(p.rows ? i / p.N : i % p.line);
  int const k = place / 8 * 8 + place % 4 * 2 + place / 4 % 2;
  float const v = k < p.depth ? p.w[blockIdx.y * p.group + n * p.n + k * p.k] : 0.f;
  p.out[(int64_t(blockIdx.y) * p.N + n) * p.line + place] = __uint_as_float(ptx::cvt_rn_tf32(v));
}

// The two multiplying warpgroups share a tile's pixels, or, if it has 128, its filters.
template <int TM, int TN>
struct Shape {
  static constexpr int runs = TM / kRunPixels, pixel_bytes = runs * kRunBytes, filter_bytes = TN * kLineBytes;
  static constexpr int N = TM == 128 ? TN / 2 : TN;  // filters of a warpgroup
  static_assert(TM == 128 || TM == 256);
};

template <int TN>
struct Tables {
  float bias[TN];
  uint64_t full[PixelsShape::most_stages], empty[PixelsShape::most_stages], filters;
};

template <int TM, int TN>
__device__ void copy(Params const& p, uint32_t kept, uint32_t ring, Tables<TN>& tables) {
  using S = Shape<TM, TN>;
  int const lane = int(threadIdx.x) % 32, n0 = int(blockIdx.x) % p.tiles_n * TN;
  ptx::griddepcontrol_wait();  // for the filters
  if (p.keep && lane == 0) {
    ptx::mbarrier_arrive_expect_tx(&tables.filters, p.chunks * S::filter_bytes);
    for (int chunk = 0; chunk < p.chunks; ++chunk)
      ptx::cp_async_bulk_tensor_4d(kept + chunk * S::filter_bytes, &p.filters, &tables.filters, chunk * kTf32Line, n0,
                                   int(blockIdx.y), 0);
  }
  uint64_t const once = p.once ? ptx::createpolicy_evict_first() : 0;
  Stage stage;
  for (int tile = int(blockIdx.x) / p.tiles_n; tile < p.tiles; tile += int(gridDim.x) / p.tiles_n) {
    int pixel = tile * S::runs + lane;  // a lane copies a run; beyond the last image there are zeros
    int const image = p.runs.divide(pixel);
    pixel *= kRunPixels;
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      uint64_t* const full = &tables.full[stage.index];
      uint32_t const to = ring + stage.index * p.stage_bytes;
      if (lane == 0) {
        ptx::mbarrier_wait(&tables.empty[stage.index], stage.parity ^ 1);  // passes on the first trip round the ring
        ptx::mbarrier_arrive_expect_tx(full, p.stage_bytes);
        if (!p.keep)
          ptx::cp_async_bulk_tensor_4d(to + S::pixel_bytes, &p.filters, full, chunk * kTf32Line, n0, int(blockIdx.y),
                                       0);
      }
      __syncwarp();
      if (lane < S::runs && once != 0)
        ptx::cp_async_bulk_tensor_4d(to + lane * kRunBytes, &p.in, full, pixel, chunk * kTf32Line, image,
                                     int(blockIdx.y), once);
      else if (lane < S::runs)
        ptx::cp_async_bulk_tensor_4d(to + lane * kRunBytes, &p.in, full, pixel, chunk * kTf32Line, image,
                                     int(blockIdx.y));
      stage.advance(p.stages);
    }
  }
}

// Operands of the two instructions for each of two steps of 8 channels, rounded: `lines` are the first channel's.
__device__ inline void load(uint32_t (&v)[2][2][4], uint32_t lines, uint32_t even, uint32_t odd) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint4 const low = ptx::ld_shared_v4(lines + step * kCoreBytes + even);
    uint4 const high = ptx::ld_shared_v4(lines + step * kCoreBytes + odd);
    uint32_t const values[2][4] = {{low.x, low.y, high.x, high.y}, {low.z, low.w, high.z, high.w}};
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i / 4][step][i % 4] = ptx::cvt_rn_tf32(__uint_as_float(values[i / 4][i % 4]));
  }
}

// N accumulators of each of a run's pixels, from filter n0 on.
template <int N>
__device__ void store(Params const& p, int run, int n0, float const (&acc)[2][N / 2], float const* biases) {
  if (run >= p.all_runs) return;
  int const lane = int(threadIdx.x) % 32, quad = lane % 4;
  int pixel = run;
  int64_t const image = p.runs.divide(pixel);
  pixel = pixel * kRunPixels + lane / 4 * 4;
  if (pixel >= p.pixels) return;
  int const n = n0 + quad * 2;
  float* to = p.out + image * p.out_n + (int64_t(blockIdx.y) * p.N + n) * p.out_c + pixel;
#pragma unroll
  for (int j = 0; j < N / 8; ++j, to += 8 * p.out_c) {
    float2 const bias = *reinterpret_cast<float2 const*>(biases + j * 8 + quad * 2);
    float const(&a)[N / 2] = acc[0], (&b)[N / 2] = acc[1];
    if (n + j * 8 < p.N)
      __stcs(reinterpret_cast<float4*>(to),
             make_float4(a[j * 4] + bias.x, a[j * 4 + 2] + bias.x, b[j * 4] + bias.x, b[j * 4 + 2] + bias.x));
    if (n + j * 8 + 1 < p.N)
      __stcs(reinterpret_cast<float4*>(to + p.out_c),
             make_float4(a[j * 4 + 1] + bias.y, a[j * 4 + 3] + bias.y, b[j * 4 + 1] + bias.y, b[j * 4 + 3] + bias.y));
  }
}

template <int TM, int TN>
__device__ void multiply(Params const& p, uint32_t kept, uint32_t ring, Tables<TN>& tables) {
  using S = Shape<TM, TN>;
  int const warp = warp_uniform(int(threadIdx.x) / 32), lane = int(threadIdx.x) % 32, quad = lane % 4;
  int const run = warp % S::runs, n = warp / S::runs * S::N;  // of the tile
  uint32_t const even = quad * 2 * kLineBytes + ((lane / 4) ^ (quad * 2)) * 16;
  uint32_t const odd = (quad * 2 + 1) * kLineBytes + ((lane / 4) ^ (quad * 2 + 1)) * 16;
  float acc[2][S::N / 2];
  uint32_t v[2][2][2][4] = {};
  Stage stage;
  auto release = [&](int index) {  // -1: none
    if (lane == 0 && index >= 0) ptx::mbarrier_arrive(&tables.empty[index]);
  };
  if (p.keep) ptx::mbarrier_wait(&tables.filters, 0);
  for (int tile = int(blockIdx.x) / p.tiles_n; tile < p.tiles; tile += int(gridDim.x) / p.tiles_n) {
#pragma unroll
    for (int i = 0; i < S::N / 2; ++i) acc[0][i] = acc[1][i] = 0;
    int before = -1;  // the stage of multiplications that are under way
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      uint32_t const from = ring + stage.index * p.stage_bytes;
      uint32_t const filters = (p.keep ? kept + chunk * S::filter_bytes : from + S::pixel_bytes) + n * kLineBytes;
      ptx::mbarrier_wait(&tables.full[stage.index], stage.parity);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_fence_operand(v[half][0]);
        ptx::wgmma_fence_operand(v[half][1]);
        if (half == 1) release(before);
        load(v[half], from + run * kRunBytes + half * 2 * kCoreBytes, even, odd);
        ptx::wgmma_fence_operand(acc[0]);
        ptx::wgmma_fence_operand(acc[1]);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            ptx::wgmma_mma_async_tf32(acc[i], v[half][i][step],
                                      ptx::wgmma_descriptor(filters + (half * 2 + step) * 32, 0, kCoreBytes));
        ptx::wgmma_commit_group();
      }
      before = stage.index;
      stage.advance(p.stages);
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc[0]);
    ptx::wgmma_fence_operand(acc[1]);
    release(before);
    store<S::N>(p, tile * S::runs + run, int(blockIdx.x) % p.tiles_n * TN + n, acc, tables.bias + n);
  }
}

template <int TM, int TN>
__global__ void __launch_bounds__(kThreads, 1) main_kernel(__grid_constant__ Params const p) {
  extern __shared__ uint8_t dynamic[];
  __shared__ Tables<TN> tables;
  uint32_t const kept = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  uint32_t const ring = kept + (p.keep ? p.chunks * TN * kLineBytes : 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < PixelsShape::most_stages; ++i) {
      ptx::mbarrier_init(&tables.full[i], 1);
      ptx::mbarrier_init(&tables.empty[i], kWarps);
    }
    ptx::mbarrier_init(&tables.filters, 1);
    ptx::fence_mbarrier_init();
  }
  if (int const n = int(blockIdx.x) % p.tiles_n * TN + int(threadIdx.x); threadIdx.x < TN)
    tables.bias[threadIdx.x] =
        p.bias != nullptr && n < p.N ? p.bias[(int64_t(blockIdx.y) * p.N + n) * p.bias_stride] : 0.f;
  __syncthreads();
  if (threadIdx.x < kWarps * 32) {
    ptx::setmaxnreg_inc<kMultiplyRegs>();
    multiply<TM, TN>(p, kept, ring, tables);
  } else {
    ptx::setmaxnreg_dec<kCopyRegs>();
    if (threadIdx.x < kWarps * 32 + 32) copy<TM, TN>(p, kept, ring, tables);
  }
}

// ---- host side

template <Op op, int TM, int TN>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  constexpr bool forward = op == Op::fprop;
  int sm_count = 0;
  cudaError_t error = count_sms(sm_count);
  if (error != cudaSuccess) return error;
  Problem const g = group_of(problem);
  PixelsShape const shape(row_of(plan), g);
  Strides const &in = forward ? problem.x : problem.y, &out = forward ? problem.y : problem.x, &w = problem.w;
  int64_t const depth = pixels_depth(op, g), N = pixels_columns(op, g), pixels = problem.H * problem.W;
  unsigned const groups = unsigned(problem.groups);

  PrepareParams q{};
  q.w = static_cast<float const*>(args.b), q.out = static_cast<float*>(args.workspace);
  q.n = forward ? w.n : w.c, q.k = forward ? w.c : w.n, q.rows = q.n < q.k;
  q.group = g.K * w.n;
  q.N = int32_t(N), q.depth = int32_t(depth), q.line = int32_t(shape.chunks * kTf32Line);
  prepare_kernel<<<dim3(unsigned(ceil_div(N * q.line, 256)), groups), 256, 0, stream>>>(q);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;

  Params p{};
  Tensor4 const x{args.a, DType::f32, {pixels, depth, problem.N, problem.groups}, {1, in.c, in.n, depth * in.c}};
  if ((error = encode_tiled(p.in, x, kRunPixels, kTf32Line, 1, 1)) != cudaSuccess) return error;
  Tensor4 const filters{q.out, DType::f32, {q.line, N, problem.groups, 1}, {1, q.line, N * q.line, 0}};
  if ((error = encode_tiled(p.filters, filters, kTf32Line, TN, 1, 1)) != cudaSuccess) return error;
  p.bias = static_cast<float const*>(args.bias), p.bias_stride = args.bias_stride;
  p.out = static_cast<float*>(args.out), p.out_n = out.n, p.out_c = out.c;
  p.runs = Divisor(ceil_div(pixels, kRunPixels)), p.all_runs = int32_t(runs_of(problem));
  p.pixels = int32_t(pixels), p.N = int32_t(N), p.chunks = int32_t(shape.chunks);
  p.tiles = int32_t(ceil_div(runs_of(problem), Shape<TM, TN>::runs)), p.tiles_n = int32_t(ceil_div(N, TN));
  p.stages = int32_t(shape.stages), p.stage_bytes = shape.stage_bytes, p.keep = shape.keep;
  p.once = pixels_once(problem);
  int64_t const blocks = min64(p.tiles, max64(1, group_blocks(problem, sm_count) / p.tiles_n)) * p.tiles_n;
  auto* const kernel = main_kernel<TM, TN>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch_dependent(kernel, dim3(unsigned(blocks), groups), kThreads, kSharedBytes, stream, p);
}

}  // namespace conv2d_ext::pixels

#define CONV2D_EXT_PIXELS_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                \
    return pixels::launch<Op::op, tm, tn>(p, plan, args, stream);          \
  }
