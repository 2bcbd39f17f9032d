// 1x1 fprop and dgrad over NCHW in place, 16-bit types, of planes of 196 pixels (14x14): out[m, pixel] = sum over k of
// w[m, k] * in[k, pixel].
//
// Such a plane is 24.5 vectors of 16 bytes, so that every other channel begins within one, where no box of the copy
// engine can. Two channels are a row of 49 vectors: of the even one the boxes bring the first 192 pixels, of the odd
// one the last 192, and one of 8 elements between them brings the even one's last four and the odd one's first four. So
// even and odd channels have sums of their own, of which the odd ones' are four columns further on; those of the 8
// elements between are sums of both. A result is two of them: the other is in the thread two lanes on.
//
// Persistent blocks, of tiles of 128 filters (dgrad: channels) by an image; a warpgroup has 64 of them. The filters lie
// as lines of k, neighbouring rows side by side; fprop's are turned so beforehand. The results of a warpgroup's filters
// are one piece of memory, which a warpgroup puts together in shared memory and stores at once.
#pragma once

#include "../core/pixels_halves.h"
#include "dependent.cuh"
#include "tma.cuh"

namespace conv2d_ext::pixels_halves {

using tma::Divisor, tma::Tensor4, tma::encode_tiled;

constexpr int kPlane = kHalvesPlane, kBoxes = 3, kColumns = 64 * kBoxes, kPairs = 32;  // pairs of channels of a step
constexpr int kBoxBytes = kPairs * kLineBytes, kBetweenBytes = kPairs * 16;
constexpr int kTM = 128, kFilterBytes = kTM / 64 * 2 * kBoxBytes, kPixelBytes = 2 * kBoxes * kBoxBytes;
constexpr int kStageBytes = (kFilterBytes + kPixelBytes + kBetweenBytes + 1023) / 1024 * 1024;
constexpr int kStagingBytes = 64 * kPlane * 2;  // of a warpgroup's results
constexpr int kStages = (226 * 1024 - 2 * kStagingBytes) / kStageBytes;
constexpr int kSharedBytes = kStages * kStageBytes + 2 * kStagingBytes + 1024;
constexpr int kThreads = 3 * kWarpgroup, kMultiplyRegs = 232, kCopyRegs = 40;
static_assert((2 * kMultiplyRegs + kCopyRegs) * kWarpgroup <= 65536 && kStages >= 3);

struct Params {
  CUtensorMap a, b, between;
  Divisor tiles_m;
  int32_t tiles, steps, M;
  bool prepared;  // the launch before turns filters alone
  void* out;
  int64_t out_n;
  void const* bias;
  int64_t bias_stride;
};

// N-major lines of 16 bytes, eight of them a core matrix.
__device__ inline uint64_t plain_descriptor(uint32_t shared) {
  return uint64_t((shared & 0x3FFFF) >> 4) | uint64_t(128 >> 4) << 16 | uint64_t(128 >> 4) << 32;
}

__device__ __forceinline__ void copy_pixels(Params const& p, uint32_t ring, uint64_t* full, uint64_t* empty) {
  if (!p.prepared) ptx::griddepcontrol_wait();
  Stage stage;
#pragma unroll 1
  for (int tile = int(blockIdx.x); tile < p.tiles; tile += int(gridDim.x)) {
    int m = tile;
    int const image = p.tiles_m.divide(m);
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step, stage.advance(kStages)) {
      uint32_t const to = ring + stage.index * kStageBytes + kFilterBytes;
      uint64_t* const bar = &full[stage.index];
      ptx::mbarrier_wait(&empty[stage.index], stage.parity ^ 1);  // passes on the first trip round the ring
      ptx::mbarrier_arrive_expect_tx(bar, kPixelBytes + kBetweenBytes);
#pragma unroll
      for (int i = 0; i < 2 * kBoxes; ++i)
        ptx::cp_async_bulk_tensor_4d(to + i * kBoxBytes, &p.b, bar,
                                     i / kBoxes * (2 * kPlane - kColumns) + i % kBoxes * 64, step * kPairs, image, 0);
      ptx::cp_async_bulk_tensor_4d(to + kPixelBytes, &p.between, bar, kColumns, step * kPairs, image, 0);
    }
  }
}

__device__ __forceinline__ void copy_filters(Params const& p, uint32_t ring, uint64_t* full, uint64_t* empty) {
  ptx::griddepcontrol_wait();
  Stage stage;
#pragma unroll 1
  for (int tile = int(blockIdx.x); tile < p.tiles; tile += int(gridDim.x)) {
    int m = tile;
    p.tiles_m.divide(m);
    m *= kTM;
    int const boxes = m + 64 < p.M ? 4 : 2;
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step, stage.advance(kStages)) {
      uint64_t* const bar = &full[stage.index];
      ptx::mbarrier_wait(&empty[stage.index], stage.parity ^ 1);  // passes on the first trip round the ring
      ptx::mbarrier_arrive_expect_tx(bar, boxes * kBoxBytes);
#pragma unroll 1
      for (int i = 0; i < boxes; ++i)
        ptx::cp_async_bulk_tensor_4d(ring + stage.index * kStageBytes + i * kBoxBytes, &p.a, bar, m + i / 2 * 64, i % 2,
                                     step * kPairs, 0);
    }
  }
  ptx::griddepcontrol_launch_dependents();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) main_kernel(__grid_constant__ Params const p) {
  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t full[kStages], empty[kStages];
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), warp = warp_uniform(int(threadIdx.x) / 32 % 4);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&full[i], 2);
      ptx::mbarrier_init(&empty[i], 8);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (group == 2) {
    ptx::setmaxnreg_dec<kCopyRegs>();
    if (warp >= 2 || !ptx::elect()) return;
    if (warp == 0)
      copy_pixels(p, ring, full, empty);
    else
      copy_filters(p, ring, full, empty);
    return;
  }
  ptx::setmaxnreg_inc<kMultiplyRegs>();
  int const lane = int(threadIdx.x) % 32, quad = lane % 4;
  uint64_t const layout = ptx::wgmma_descriptor(0, kBoxBytes, kCoreBytes);
  uint32_t const staging = ring + kStages * kStageBytes + group * kStagingBytes;
  bool const first_thread = threadIdx.x % kWarpgroup == 0;
  Stage stage;
#pragma unroll 1
  for (int tile = int(blockIdx.x); tile < p.tiles; tile += int(gridDim.x)) {
    int m = tile;
    int const image = p.tiles_m.divide(m);
    m = m * kTM + group * 64;
    if (m >= p.M) {
#pragma unroll 1
      for (int step = 0; step < p.steps; ++step, stage.advance(kStages)) {
        ptx::mbarrier_wait(&full[stage.index], stage.parity);
        __syncwarp();  // no lane falls behind
        if (lane == 0) ptx::mbarrier_arrive(&empty[stage.index]);
      }
      continue;
    }
    float even[kColumns / 2] = {}, odd[kColumns / 2] = {}, even_between[4] = {}, odd_between[4] = {};
    auto fence_sums = [&] {
      ptx::wgmma_fence_operand(even);
      ptx::wgmma_fence_operand(odd);
      ptx::wgmma_fence_operand(even_between);
      ptx::wgmma_fence_operand(odd_between);
    };
    int before = -1;
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step, stage.advance(kStages)) {
      uint32_t const a = ring + stage.index * kStageBytes + group * 2 * kBoxBytes,
                     b = ring + stage.index * kStageBytes + kFilterBytes;
      ptx::mbarrier_wait(&full[stage.index], stage.parity);
      fence_sums();
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kPairs / 16; ++k) {
        uint64_t const a_even = tma::at_address(layout, a + k * 2 * kCoreBytes),
                       a_odd = tma::at_address(layout, a + kBoxBytes + k * 2 * kCoreBytes),
                       between = plain_descriptor(b + kPixelBytes + k * 256);
        ptx::wgmma_mma_async<T, true, true>(even, a_even, tma::at_address(layout, b + k * 2 * kCoreBytes));
        ptx::wgmma_mma_async<T, true, true>(odd, a_odd,
                                            tma::at_address(layout, b + (kBoxes * kBoxBytes + k * 2 * kCoreBytes)));
        ptx::wgmma_mma_async<T, true, true>(even_between, a_even, between);
        ptx::wgmma_mma_async<T, true, true>(odd_between, a_odd, between);
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
      fence_sums();
      if (before >= 0 && lane == 0) ptx::mbarrier_arrive(&empty[before]);
      before = stage.index;
    }
    ptx::wgmma_wait_group<0>();
    fence_sums();
    if (lane == 0) ptx::mbarrier_arrive(&empty[before]);
    float bias[2] = {};
    if (p.bias != nullptr) {
      ptx::griddepcontrol_wait();
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (int const at = m + warp * 16 + lane / 4 + half * 8; at < p.M)
          bias[half] = widen(static_cast<T const*>(p.bias)[at * p.bias_stride]);
    }
    if (first_thread) ptx::cp_async_bulk_wait_group_read<0>();  // the results before are stored
    ptx::bar_sync(1 + group, kWarpgroup);
    // Of eight pixels a thread has two; the odd channels' part of these is two lanes on, or that of eight before.
    bool const later = quad >= 2;
    uint32_t const row = staging + (warp * 16 + lane / 4) * (kPlane * 2) + quad * 4;
#pragma unroll
    for (int j = 0; j <= kColumns / 8; ++j) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float const high = j > 0 ? odd[j * 4 - 4 + i] : odd_between[i], low = j < kColumns / 8 ? odd[j * 4 + i] : 0.f;
        v[i] = (j < kColumns / 8 ? even[j * 4 + i] : even_between[i]) + __shfl_xor_sync(~0u, later ? high : low, 2) +
               bias[i / 2];
      }
      if (j < kColumns / 8 || !later) {
        ptx::st_shared(row + j * 16, pack<T>(v[0], v[1]));
        ptx::st_shared(row + 8 * (kPlane * 2) + j * 16, pack<T>(v[2], v[3]));
      }
    }
    ptx::fence_proxy_async();
    ptx::bar_sync(1 + group, kWarpgroup);
    if (first_thread) {
      ptx::cp_async_bulk_store(static_cast<T*>(p.out) + image * p.out_n + m * kPlane, staging,
                               min(64, p.M - m) * (kPlane * 2));
      ptx::cp_async_bulk_commit_group();
    }
  }
  if (first_thread) ptx::cp_async_bulk_wait_group_read<0>();  // shared memory ends with the block
}

// Filters whose neighbouring rows of the product lie side by side: out[c, k] of w[k, c]. blockIdx.z: the group.
template <class T>
__global__ void __launch_bounds__(256) turn_kernel(T const* w, int64_t stride, T* out, int K, int C) {
  __shared__ T tile[64][66];
  ptx::griddepcontrol_launch_dependents();
  int const k0 = int(blockIdx.y) * 64, c0 = int(blockIdx.x) * 64, x = int(threadIdx.x) % 32 * 2,
            y = int(threadIdx.x) / 32;
  w += int64_t(blockIdx.z) * K * stride, out += int64_t(blockIdx.z) * K * C;
  using Pair = Vector<T, 2>;
#pragma unroll
  for (int i = 0; i < 64; i += 8)
    if (k0 + y + i < K && c0 + x < C)
      *reinterpret_cast<Pair*>(&tile[y + i][x]) = *reinterpret_cast<Pair const*>(w + (k0 + y + i) * stride + c0 + x);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; i += 8)
    if (c0 + y + i < C && k0 + x < K)
      *reinterpret_cast<Pair*>(out + int64_t(c0 + y + i) * K + k0 + x) = {tile[x][y + i], tile[x + 1][y + i]};
}

template <Op op, DType dtype>
cudaError_t launch(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool forward = op == Op::fprop;
  Strides const &in = forward ? problem.x : problem.y, &out = forward ? problem.y : problem.x;
  int64_t const depth = forward ? problem.C : problem.K, M = forward ? problem.K : problem.C;
  Params p{};
  p.M = int32_t(M), p.steps = int32_t(ceil_div(depth, 2 * kPairs)), p.tiles_m = Divisor(ceil_div(M, kTM));
  p.tiles = int32_t(problem.N * p.tiles_m.value), p.out = args.out, p.out_n = out.n;
  p.bias = args.bias, p.bias_stride = args.bias_stride, p.prepared = forward;
  void const* filters = args.b;
  int64_t stride = problem.w.n;
  if constexpr (forward) {
    dim3 const grid(unsigned(ceil_div(problem.C, 64)), unsigned(ceil_div(problem.K, 64)));
    turn_kernel<T><<<grid, 256, 0, stream>>>(static_cast<T const*>(args.b), stride, static_cast<T*>(args.workspace),
                                             int(problem.K), int(problem.C));
    if (auto const error = cudaGetLastError()) return error;
    filters = args.workspace, stride = M;
  }
  Tensor4 const a{filters, dtype, {M, 2, depth / 2, 1}, {1, stride, 2 * stride, 0}};
  if (auto const error = encode_tiled(p.a, a, 64, 1, kPairs, 1)) return error;
  Tensor4 const b{args.a, dtype, {2 * kPlane, depth / 2, problem.N, 1}, {1, 2 * kPlane, in.n, 0}};
  if (auto const error = encode_tiled(p.b, b, 64, kPairs, 1, 1)) return error;
  if (auto const error = tma::encode_boxes(p.between, b, 8, kPairs, 1, 1)) return error;
  int sm_count = 0;
  if (auto const error = count_sms(sm_count)) return error;
  auto* const kernel = main_kernel<T>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes))
    return error;
  return launch_dependent(kernel, dim3(unsigned(min64(p.tiles, sm_count))), kThreads, kSharedBytes, stream, p);
}

}  // namespace conv2d_ext::pixels_halves

#define CONV2D_EXT_PIXELS_HALVES_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                       \
    return pixels_halves::launch<Op::op, DType::dtype>(p, args, stream);          \
  }
