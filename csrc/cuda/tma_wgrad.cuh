// wgrad in channels_last on Hopper's copy engine and tensor cores, f16 and bf16: the sibling of tma.cuh.
//   out[tap, channel; filter] = sum over pixels of x[pixel moved by the tap, channel] * y[pixel, filter]
// Rows are runs of 64 channels of one tap, TM / 64 of them a tile; columns are TN filters. A stage holds 64 pixels:
// each run of x comes by an im2col copy, each 64 filters of y too. Both operands are contiguous along rows, not along
// the pixels that are summed over: M- and N-major. The pixels are split among the blocks; f32 partial tiles go to the
// workspace, and wgrad_reduce adds them in order.
#pragma once

#include "tma_swap.cuh"

namespace conv2d_ext::tma {

constexpr int kPixels = 64;  // of a step

template <class T, int TM, int TN>
struct WgradShape {
  static constexpr int blocks = Shape<T, TM, TN>::blocks;
  static constexpr int a_bytes = TM * kLineBytes, runs = (TN + 63) / 64, b_bytes = runs * kRunBytes;
  static constexpr int stage_bytes = a_bytes + b_bytes;
  static constexpr int stages = (blocks == 2 ? 111 : 224) * 1024 / stage_bytes;
  static constexpr int shared_bytes = stages * stage_bytes + 1024;
};

struct WgradParams {
  CUtensorMap a, b;  // x, y
  int64_t pixels;    // N * P * Q
  int32_t P, Q;
  int32_t h0, w0, stride_h, stride_w, dilation_h, dilation_w;
  int32_t S, C, K;       // C, K: of a group
  int32_t runs, chunks;  // chunks: runs a tap
  int32_t steps, groups, splits;
  int32_t tiles, tiles_n;
  int64_t out_k, out_r, out_s;
  void* out;
  void* workspace;
};

struct WgradUnit {
  int32_t m, n, group, index;
  int32_t begin, count;

  __device__ WgradUnit(WgradParams const& p, int unit) {
    int const split = unit / p.tiles;
    int tile = unit % p.tiles;
    n = tile % p.tiles_n;
    tile /= p.tiles_n;
    group = tile % p.groups;
    m = tile / p.groups;
    index = unit;
    int const each = (p.steps + p.splits - 1) / p.splits;
    begin = split * each;
    int const rest = p.steps - begin;
    count = rest < 0 ? 0 : rest < each ? rest : each;
  }
};

template <class T, int TM, int TN>
__device__ void wgrad_copy(WgradParams const& p, uint32_t ring, uint64_t* full, uint64_t* empty) {
  using S = WgradShape<T, TM, TN>;
  Stage stage;
  for (int u = blockIdx.x; u < p.tiles * p.splits; u += gridDim.x) {
    WgradUnit const unit(p, u);
    int c[TM / 64], offset_h[TM / 64], offset_w[TM / 64];
    int runs = 0;
#pragma unroll
    for (int i = 0; i < TM / 64; ++i) {
      int const run = unit.m * (TM / 64) + i, tap = run / p.chunks;
      if (run < p.runs) ++runs;
      c[i] = unit.group * p.C + run % p.chunks * 64;
      offset_h[i] = tap / p.S * p.dilation_h, offset_w[i] = tap % p.S * p.dilation_w;
    }
    int const k = unit.group * p.K + unit.n * TN;
    for (int step = 0; step < unit.count; ++step) {
      int64_t q = int64_t(unit.begin + step) * kPixels;
      int64_t ph = divide(q, p.Q);
      int const n = int(divide(ph, p.P));
      int const h = p.h0 + int(ph) * p.stride_h, w = p.w0 + int(q) * p.stride_w;
      ptx::mbarrier_wait(&empty[stage.index], stage.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(&full[stage.index], S::b_bytes + runs * kRunBytes);
      uint32_t const to = ring + stage.index * S::stage_bytes;
#pragma unroll
      for (int i = 0; i < TM / 64; ++i)
        if (i < runs)
          ptx::cp_async_bulk_tensor_im2col(to + i * kRunBytes, &p.a, &full[stage.index], c[i], w, h, n, offset_w[i],
                                           offset_h[i]);
#pragma unroll
      for (int i = 0; i < S::runs; ++i)
        ptx::cp_async_bulk_tensor_im2col(to + S::a_bytes + i * kRunBytes, &p.b, &full[stage.index], k + i * 64, int(q),
                                         int(ph), n, 0, 0);
      stage.advance(S::stages);
    }
  }
}

// The offset of row m (channel m % 64 of a run) within a filter, or -1.
__device__ inline int64_t wgrad_out_of(WgradParams const& p, int m) {
  int const run = m / 64, tap = run / p.chunks, c = run % p.chunks * 64 + m % 64;
  return run < p.runs && c < p.C ? tap / p.S * p.out_r + tap % p.S * p.out_s + c : -1;
}

template <class T, int TM, int TN>
__device__ void wgrad_multiply(WgradParams const& p, uint32_t ring, uint64_t* full, uint64_t* empty) {
  using S = WgradShape<T, TM, TN>;
  constexpr int halves = TM / 128;
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  auto release = [&](int stage) {  // -1: none
    if (lane == 0 && stage >= 0) ptx::mbarrier_arrive(&empty[stage]);
  };
  Stage stage;
  float acc[halves][TN / 2];
  for (int u = blockIdx.x; u < p.tiles * p.splits; u += gridDim.x) {
    WgradUnit const unit(p, u);
#pragma unroll
    for (int h = 0; h < halves; ++h)
#pragma unroll
      for (int i = 0; i < TN / 2; ++i) acc[h][i] = 0;
    int before = -1;
    for (int step = 0; step < unit.count; ++step) {
      ptx::mbarrier_wait(&full[stage.index], stage.parity);
      uint32_t const from_a = ring + stage.index * S::stage_bytes + group * halves * kRunBytes;
      uint32_t const from_b = ring + stage.index * S::stage_bytes + S::a_bytes;
#pragma unroll
      for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kPixels / 16; ++k)
#pragma unroll
        for (int h = 0; h < halves; ++h)
          ptx::wgmma_mma_async<T, true, true>(
              acc[h], ptx::wgmma_descriptor(from_a + h * kRunBytes + k * 2 * kCoreBytes, kRunBytes, kCoreBytes),
              ptx::wgmma_descriptor(from_b + k * 2 * kCoreBytes, kRunBytes, kCoreBytes));
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
#pragma unroll
      for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
      release(before);  // the step before has been read
      before = stage.index;
      stage.advance(S::stages);
    }
    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
    release(before);

    // A thread's accumulators: of rows lane / 4 and lane / 4 + 8 of its warp's 16, columns 8 j + 2 (lane % 4) + {0, 1}.
    int const quad = lane % 4;
#pragma unroll
    for (int h = 0; h < halves; ++h) {
      int const row = (group * halves + h) * 64 + warp * 16 + lane / 4;
      if (p.splits > 1) {
        float* const partial = static_cast<float*>(p.workspace) + int64_t(unit.index) * (TM * TN);
#pragma unroll
        for (int i = 0; i < TN / 2; ++i) {
          int const m = row + i % 4 / 2 * 8, n = i / 4 * 8 + quad * 2 + i % 2;
          partial[n * TM + m] = acc[h][i];
          if (i % 16 == 15) ptx::compiler_fence();  // registers are too short for more addresses
        }
        continue;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // 8 lanes write 8 neighbours
        int64_t const to = wgrad_out_of(p, unit.m * TM + row + half * 8);
        int n = unit.n * TN + quad * 2;
        T* to_n = static_cast<T*>(p.out) + to + (unit.group * p.K + n) * p.out_k;
#pragma unroll
        for (int j = 0; j < TN / 8; ++j, n += 8, to_n += 8 * p.out_k) {
          if (to < 0 || n >= p.K) continue;
          to_n[0] = narrow<T>(acc[h][j * 4 + half * 2]);  // K is a multiple of 8: n + 1 exists too
          to_n[p.out_k] = narrow<T>(acc[h][j * 4 + half * 2 + 1]);
          ptx::compiler_fence();
        }
      }
    }
  }
}

template <class T, int TM, int TN>
__global__ void __launch_bounds__(kThreads, WgradShape<T, TM, TN>::blocks)
    wgrad_kernel(__grid_constant__ WgradParams const p) {
  using S = WgradShape<T, TM, TN>;
  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t full[S::stages], empty[S::stages];
  uint32_t const ring = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], 8);  // multiplying warps
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 2 * kWarpgroup) {
    ptx::setmaxnreg_inc<Shape<T, TM, TN>::multiply_regs>();
    wgrad_multiply<T, TM, TN>(p, ring, full, empty);
  } else {
    ptx::setmaxnreg_dec<Shape<T, TM, TN>::copy_regs>();
    if (threadIdx.x == 2 * kWarpgroup) wgrad_copy<T, TM, TN>(p, ring, full, empty);
  }
}

// Sums the partial tiles in the order of the splits; a thread has four rows, neighbours in memory.
template <class T, int TM, int TN>
__global__ void __launch_bounds__(256) wgrad_reduce(__grid_constant__ WgradParams const p) {
  WgradUnit const unit(p, int(blockIdx.x));
  int const first = (int(blockIdx.y) * 256 + int(threadIdx.x)) * 4;
  int64_t const to = wgrad_out_of(p, unit.m * TM + first % TM);
  int const n = unit.n * TN + first / TM;
  if (to < 0 || n >= p.K) return;
  float const* partial = static_cast<float const*>(p.workspace) + int64_t(unit.index) * (TM * TN) + first;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int split = 0; split < p.splits; ++split, partial += int64_t(p.tiles) * (TM * TN)) {
    float4 const v = *reinterpret_cast<float4 const*>(partial);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  Vector<T, 4> const out{narrow<T>(sum.x), narrow<T>(sum.y), narrow<T>(sum.z), narrow<T>(sum.w)};
  *reinterpret_cast<Vector<T, 4>*>(static_cast<T*>(p.out) + to + (unit.group * p.K + n) * p.out_k) = out;
}

template <DType dtype, int TM, int TN, Variant variant>
cudaError_t launch_wgrad(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  using S = WgradShape<T, TM, TN>;
  Walk const h = walk_h(Op::wgrad, problem, 0), w = walk_w(Op::wgrad, problem, 0);
  int64_t const P = problem.P(), Q = problem.Q();
  WgradParams p{};
  p.pixels = problem.N * P * Q, p.P = int32_t(P), p.Q = int32_t(Q);
  p.h0 = int32_t(h.lower), p.w0 = int32_t(w.lower);
  p.stride_h = int32_t(h.stride), p.stride_w = int32_t(w.stride);
  p.dilation_h = int32_t(h.tap_stride), p.dilation_w = int32_t(w.tap_stride);
  p.S = int32_t(problem.S), p.C = int32_t(problem.C_per_group()), p.K = int32_t(problem.K_per_group());
  p.chunks = int32_t(ceil_div(p.C, 64)), p.runs = int32_t(problem.R * problem.S * p.chunks);
  p.steps = int32_t(ceil_div(p.pixels, kPixels)), p.groups = int32_t(problem.groups), p.splits = plan.split_k;
  p.tiles_n = int32_t(ceil_div(p.K, TN));
  p.tiles = int32_t(ceil_div(p.runs, TM / 64)) * p.tiles_n * p.groups;
  p.out_k = problem.w.n, p.out_r = problem.w.h, p.out_s = problem.w.w;
  p.out = args.out, p.workspace = args.workspace;
  Strides const &x = problem.x, &y = problem.y;
  cudaError_t error = encode_im2col(
      p.a, {args.a, dtype, {problem.C, problem.W, problem.H, problem.N}, {1, x.w, x.h, x.n}}, h, w, 64, kPixels);
  if (error != cudaSuccess) return error;
  error = encode_im2col(p.b, {args.b, dtype, {problem.K, Q, P, problem.N}, {1, y.w, y.h, y.n}}, Walk{P, 1}, Walk{Q, 1},
                        64, kPixels);
  if (error != cudaSuccess) return error;

  auto* const kernel = wgrad_kernel<T, TM, TN>;
  if ((error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes)) !=
      cudaSuccess)
    return error;
  int device = 0, sm_count = 0;
  if ((error = cudaGetDevice(&device)) != cudaSuccess) return error;
  if ((error = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device)) != cudaSuccess) return error;
  int64_t const blocks = min64(int64_t(p.tiles) * p.splits, int64_t(sm_count) * S::blocks);
  kernel<<<unsigned(blocks), kThreads, S::shared_bytes, stream>>>(p);
  if ((error = cudaGetLastError()) != cudaSuccess || p.splits == 1) return error;
  wgrad_reduce<T, TM, TN><<<dim3(unsigned(p.tiles), TM * TN / 1024), 256, 0, stream>>>(p);
  return cudaGetLastError();
}

template <Op op, DType dtype, int TM, int TN, Variant variant>
cudaError_t launch_row(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  if constexpr (variant == Variant::pointwise) {
    Arguments turned_args = args;
    turned_args.a = args.b, turned_args.b = args.a;
    return launch<turned_op(op), dtype, TM, TN, variant>(turned(op, problem), plan, turned_args, stream);
  } else if constexpr (op == Op::wgrad)
    return launch_wgrad<dtype, TM, TN, variant>(problem, plan, args, stream);
  else if constexpr (dtype != DType::f32 && TM == SwapShape::TM && TN == SwapShape::TN)
    return launch_swapped<op, dtype>(problem, plan, args, stream);
  else
    return launch<op, dtype, TM, TN, variant>(problem, plan, args, stream);
}

}  // namespace conv2d_ext::tma

#define CONV2D_EXT_TMA_INSTANCE(family, op, dtype, tm, tn, tk, variant)                            \
  cudaError_t conv2d_ext::family##_##op##_##dtype##_##tm##x##tn##_##variant(                       \
      Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) {            \
    return tma::launch_row<Op::op, DType::dtype, tm, tn, Variant::variant>(p, plan, args, stream); \
  }
