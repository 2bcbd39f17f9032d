// wgrad of 1x1 filters in NCHW, in TF32 and the 16-bit types, in place: w[k, c] = sum over images and pixels of y[k,
// pixel] * x[c, pixel]. Both operands have the reduction contiguous. The rows of a tile are channels of the tensor that
// has more of them.
//
// A stage holds a run of 128 bytes of pixels: TM lines of one tensor, TN of the other, swizzled. Eight warps load
// fragments for mma.sync, and round floats to nearest; of a line a thread has two neighbouring vectors of 16 bytes, for
// the order of the sum is free. The blocks of a tile take turns with the runs, so that all read neighbouring
// pixels at a time. Their sums go to the workspace, and reduce_kernel adds them in the order of the blocks.
#pragma once

#include "../core/pixels.h"
#include "give_back.cuh"
#include "spread.cuh"
#include "tma.cuh"

namespace conv2d_ext::pixels_wgrad {

using tma::Divisor, tma::Tensor4, tma::encode_tiled;

constexpr int kWarps = 8;  // that multiply
constexpr int kThreads = kWarps * 32 + 128;
// Runs that are added up in one chain: the tensor cores cut off the lowest bits of a sum. 8192 pixels in TF32.
constexpr int kChain = 256;
constexpr int kReduceLanes = 32, kReduceParts = 8;
// 64K registers: two multiplying warpgroups and one that copies.
constexpr int kMultiplyRegs = 224, kCopyRegs = 56;
static_assert((2 * kMultiplyRegs + kCopyRegs) * kWarpgroup <= 65536);

template <int TM, int TN>
struct Shape {
  static constexpr int stage_bytes = (TM + TN) * kLineBytes, stages = 220 * 1024 / stage_bytes;
  static constexpr int shared_bytes = stages * stage_bytes + 1024;         // the swizzle wants 1024-byte alignment
  static constexpr int warps_n = TN / 32, warp_m = TM * warps_n / kWarps;  // a warp has warp_m x 32 sums
};

struct Params {
  CUtensorMap a, b;
  Divisor runs;  // of an image
  int32_t all_runs, run_pixels, M, N;
  int32_t tiles_n, tiles, split;
  int32_t bytes;  // of a stage that are copied
  float* parts;
};

template <int TM, int TN>
struct Barriers {
  uint64_t full[Shape<TM, TN>::stages], empty[Shape<TM, TN>::stages];
};

template <int TM, int TN>
__device__ void copy(Params const& p, uint32_t ring, Barriers<TM, TN>& barriers) {
  using S = Shape<TM, TN>;
  int const tile = int(blockIdx.x) % p.tiles, m0 = tile / p.tiles_n * TM, n0 = tile % p.tiles_n * TN;
  Stage stage;
  for (int run = int(blockIdx.x) / p.tiles; run < p.all_runs; run += p.split) {
    int pixel = run;
    int const image = p.runs.divide(pixel);
    pixel *= p.run_pixels;
    uint64_t* const full = &barriers.full[stage.index];
    uint32_t const to = ring + stage.index * S::stage_bytes;
    ptx::mbarrier_wait(&barriers.empty[stage.index], stage.parity ^ 1);  // passes on the first trip round the ring
    ptx::mbarrier_arrive_expect_tx(full, p.bytes);
    ptx::cp_async_bulk_tensor_4d(to, &p.a, full, pixel, m0, image, 0);
    ptx::cp_async_bulk_tensor_4d(to + TM * kLineBytes, &p.b, full, pixel, n0, image, 0);
    stage.advance(S::stages);
  }
}

// 16 bytes of pixels of each of `count` times 8 lines.
template <class T, int count>
__device__ inline void load(uint32_t (&v)[count][4], uint32_t from) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    uint4 const u = ptx::ld_shared_v4(from + i * kCoreBytes);
    v[i][0] = u.x, v[i][1] = u.y, v[i][2] = u.z, v[i][3] = u.w;
    if constexpr (std::is_same_v<T, float>)
#pragma unroll
      for (int e = 0; e < 4; ++e) v[i][e] = ptx::cvt_rn_tf32(__uint_as_float(v[i][e]));
  }
}

template <class T>
__device__ inline void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1) {
  if constexpr (std::is_same_v<T, float>)
    ptx::mma_m16n8k8_tf32(d, a0, a1, a2, a3, b0, b1);
  else
    ptx::mma_m16n8k16<T>(d, a0, a1, a2, a3, b0, b1);
}

template <class T, int TM, int TN>
__device__ void multiply(Params const& p, uint32_t ring, Barriers<TM, TN>& barriers) {
  using S = Shape<TM, TN>;
  constexpr int rows = S::warp_m / 16, columns = 4;  // instructions
  int const warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, quad = lane % 4;
  int const tile = int(blockIdx.x) % p.tiles, part = int(blockIdx.x) / p.tiles;
  int const m = warp / S::warps_n * S::warp_m, n = warp % S::warps_n * 32;
  bool const needed = tile / p.tiles_n * TM + m < p.M && tile % p.tiles_n * TN + n < p.N;
  uint32_t const at = ring + lane / 4 * kLineBytes;
  float acc[rows][columns][4] = {};
  uint32_t a[2][rows * 2][4], b[2][columns][4];  // of the two halves of a run
  Stage stage;
  auto load_half = [&](int half) {
    uint32_t const from = at + stage.index * S::stage_bytes + ((quad * 2 + half) ^ (lane / 4)) * 16;
    load<T>(a[half], from + m * kLineBytes);
    load<T>(b[half], from + (TM + n) * kLineBytes);
  };
  auto multiply_half = [&](int half) {
#pragma unroll
    for (int step = 0; step < 4; step += 2)
#pragma unroll
      for (int i = 0; i < rows; ++i)
#pragma unroll
        for (int j = 0; j < columns; ++j)
          mma<T>(acc[i][j], a[half][i * 2][step], a[half][i * 2 + 1][step], a[half][i * 2][step + 1],
                 a[half][i * 2 + 1][step + 1], b[half][j][step], b[half][j][step + 1]);
  };
  float* const to = p.parts + (int64_t(tile) * p.split + part) * TM * TN + (m + lane / 4) * TN + n + quad * 2;
  auto store = [&](bool first) {
#pragma unroll
    for (int i = 0; i < rows * 2; ++i)
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        float2* const at_pair = reinterpret_cast<float2*>(to + i * 8 * TN + j * 8);
        float &x = acc[i / 2][j][i % 2 * 2], &y = acc[i / 2][j][i % 2 * 2 + 1];
        float2 const before = first ? make_float2(0, 0) : *at_pair;
        *at_pair = make_float2(before.x + x, before.y + y);
        x = y = 0;
      }
  };
  ptx::mbarrier_wait(&barriers.full[0], 0);
  if (needed) load_half(0);
  int chain = 0;
  bool first = true;
  for (int run = part; run < p.all_runs; run += p.split) {
    if (needed) load_half(1);
    int const loaded = stage.index;
    stage.advance(S::stages);
    if (needed) multiply_half(0);
    uint32_t words = 0;
    if (needed) {
#pragma unroll
      for (int i = 0; i < rows * 2; ++i) words |= a[1][i][3];
#pragma unroll
      for (int j = 0; j < columns; ++j) words |= b[1][j][3];
    }
    give_back(&barriers.empty[loaded], words);
    if (run + p.split < p.all_runs) {  // loaded while the other half is multiplied
      ptx::mbarrier_wait(&barriers.full[stage.index], stage.parity);
      if (needed) load_half(0);
    }
    if (needed) multiply_half(1);
    if (++chain == kChain) {
      store(first);
      chain = 0, first = false;
    }
  }
  store(first);
}

template <class T, int TM, int TN>
__global__ void __launch_bounds__(kThreads, 1) main_kernel(__grid_constant__ Params const p) {
  extern __shared__ uint8_t dynamic[];
  __shared__ Barriers<TM, TN> barriers;
  uint32_t const ring = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape<TM, TN>::stages; ++i) {
      ptx::mbarrier_init(&barriers.full[i], 1);
      ptx::mbarrier_init(&barriers.empty[i], kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kWarps * 32) {
    ptx::setmaxnreg_inc<kMultiplyRegs>();
    multiply<T, TM, TN>(p, ring, barriers);
  } else {
    ptx::setmaxnreg_dec<kCopyRegs>();
    if (threadIdx.x == kWarps * 32) copy<TM, TN>(p, ring, barriers);
  }
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

template <class T, int TM, int TN>
cudaError_t launch_reduce(ReduceParams const& p, int64_t tiles, cudaStream_t stream) {
  return launch_spread(reduce_kernel<T, TM, TN>, dim3(unsigned(tiles * TM * TN / kReduceLanes)),
                       kReduceLanes * kReduceParts, kReduceLanes * kReduceParts * int(sizeof(float)), stream, p);
}

template <DType dtype, int TM, int TN>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using S = Shape<TM, TN>;
  using T = TypeOf<dtype>::type;
  constexpr int run = run_pixels(dtype);
  PixelsWgrad const shape(row_of(plan), problem);
  int64_t const pixels = problem.H * problem.W;
  Tensor4 const x{args.a, dtype, {pixels, problem.C, problem.N, 1}, {1, problem.x.c, problem.x.n, 0}};
  Tensor4 const y{args.b, dtype, {pixels, problem.K, problem.N, 1}, {1, problem.y.c, problem.y.n, 0}};
  Tensor4 const &a = shape.swapped ? x : y, &b = shape.swapped ? y : x;
  int const rows = int(min64(TM, a.size[1])), columns = int(min64(TN, b.size[1]));
  Params p{};
  cudaError_t error = encode_tiled(p.a, a, run, rows, 1, 1);
  if (error != cudaSuccess) return error;
  if ((error = encode_tiled(p.b, b, run, columns, 1, 1)) != cudaSuccess) return error;
  p.runs = Divisor(ceil_div(pixels, run)), p.all_runs = int32_t(runs_of(problem)), p.run_pixels = run;
  p.M = int32_t(a.size[1]), p.N = int32_t(b.size[1]), p.bytes = (rows + columns) * kLineBytes;
  p.tiles_n = int32_t(shape.tiles_n), p.tiles = int32_t(shape.tiles_m * shape.tiles_n), p.split = int32_t(shape.split);
  p.parts = static_cast<float*>(args.workspace);
  auto* const kernel = main_kernel<T, TM, TN>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(p.tiles * p.split), kThreads, S::shared_bytes, stream>>>(p);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  ReduceParams r{};
  r.parts = p.parts, r.w = args.out, r.M = p.M, r.N = p.N;
  r.m = shape.swapped ? problem.w.c : problem.w.n, r.n = shape.swapped ? problem.w.n : problem.w.c;
  r.tiles_n = p.tiles_n, r.split = p.split;
  return launch_reduce<T, TM, TN>(r, p.tiles, stream);
}

}  // namespace conv2d_ext::pixels_wgrad

#define CONV2D_EXT_PIXELS_WGRAD_INSTANCE(family, op, dtype, tm, tn, tk, variant)                              \
  namespace conv2d_ext {                                                                                      \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const& plan,           \
                                                                Arguments const& args, cudaStream_t stream) { \
    return pixels_wgrad::launch<DType::dtype, tm, tn>(p, plan, args, stream);                                 \
  }                                                                                                           \
  }
