// wgrad of 1x1 filters over NCHW in place, whatever the size of the planes: w[m, n] = sum over pixels of a[m, pixel] *
// b[n, pixel]. A block has a tile of TM x TN and a part of the steps, runs of 128 bytes of pixels of any images. Eight
// warps load both operands, lanes along the planes: 16-bit types are put into shared memory as lines of 64 channels a
// pixel (M- and N-major), floats as lines of 32 pixels a channel, rounded to TF32. pixels_wgrad.cuh adds the parts.
#pragma once

#include "pixels_gather.cuh"
#include "pixels_wgrad.cuh"

namespace conv2d_ext::pixels_gather {

template <int TM, int TN>
struct SumShape {
  static constexpr int groups = TM / 64, threads = (groups + 2) * kWarpgroup;
  static constexpr bool moves = TM * TN == 128 * 128;  // registers to the warps that load
  static constexpr int stage_bytes = (TM + TN) * kLineBytes, stages = min64(8, 220 * 1024 / stage_bytes);
  static constexpr int shared_bytes = stages * stage_bytes + 1024;
};

struct SumsParams {
  pixels_wgrad::Planes a, b;
  Divisor plane, tiles_n, tiles;
  int32_t pixels, steps, share;
  float* parts;
  void* w;
  int64_t w_m;
};

// One tensor's part of a step.
template <class T, int V, int channels>
struct SumOperand {
  static constexpr bool f32 = sizeof(T) == 4;
  static constexpr int groups = f32 ? 1 : 64 / (32 * V), runs = f32 ? 1 : channels / 64, lines = f32 ? channels / 8 : 1;
  Gathered<T, V, f32 ? 32 : 64> v[runs];
  uint32_t words[lines];

  __device__ __forceinline__ void fetch(pixels_wgrad::Planes const& p, Divisor const& plane, int pixels, int step,
                                        int first, int warp, int lane) {
    if constexpr (f32) {
      int pixel = step * 32 + lane;
      bool const valid = pixel < pixels;
      int const image = plane.divide(pixel);
      T const* at = static_cast<T const*>(p.at) + image * p.n + pixel + (first + warp) * p.c;
#pragma unroll
      for (int i = 0; i < lines; ++i, at += 8 * p.c)
        words[i] = valid && first + warp + i * 8 < p.channels ? __ldg(reinterpret_cast<uint32_t const*>(at)) : 0;
    } else {
      T const* from[groups];
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        int pixel = min(step * 64 + (g * 32 + lane) * V, pixels - V);
        int const image = plane.divide(pixel);
        from[g] = static_cast<T const*>(p.at) + image * p.n + pixel;
      }
      first += warp * 8;
#pragma unroll
      for (int run = 0; run < runs; ++run, first += 64) v[run].fetch(from, p.c, first * p.c, p.channels - first);
      if (step * 64 + 64 > pixels) {  // zeros behind the last pixel
#pragma unroll
        for (int g = 0; g < groups; ++g)
#pragma unroll
          for (int i = 0; i < runs * 8; ++i)
            if (step * 64 + (g * 32 + lane) * V >= pixels) v[i / 8].v[g][i % 8] = 0;
      }
    }
  }
  __device__ __forceinline__ void put(uint32_t to, int warp, int lane) const {
    if constexpr (f32) {
      to += warp * kLineBytes + ((lane / 4) ^ warp) * 16 + lane % 4 * 4;
#pragma unroll
      for (int i = 0; i < lines; ++i) ptx::st_shared(to + i * kCoreBytes, ptx::cvt_rn_tf32(__uint_as_float(words[i])));
    } else {
#pragma unroll
      for (int run = 0; run < runs; ++run) v[run].put(to + run * (64 * kLineBytes), warp, lane);
    }
  }
};

template <class T, int TM, int TN, int V>
__global__ void __launch_bounds__(SumShape<TM, TN>::threads, 1) sums_kernel(__grid_constant__ SumsParams const p) {
  using S = SumShape<TM, TN>;
  constexpr bool rows = sizeof(T) == 2;
  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t full[S::stages], empty[S::stages];
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int const warp = warp_uniform(int(threadIdx.x) / 32), lane = int(threadIdx.x) % 32;
  ptx::griddepcontrol_launch_dependents();
  int n0 = int(blockIdx.x);
  int const part = p.tiles.divide(n0), tile = n0, m0 = p.tiles_n.divide(n0) * TM;
  n0 *= TN;
  int const begin = part * p.share, end = min(begin + p.share, p.steps);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; ++i) {
      ptx::mbarrier_init(&full[i], kGatherWarps);
      ptx::mbarrier_init(&empty[i], S::groups * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  Stage stage;
  if (warp >= S::groups * 4) {
    if constexpr (S::moves) ptx::setmaxnreg_inc<160>();
    int const mine = warp - S::groups * 4;
    SumOperand<T, V, TM> a;
    SumOperand<T, V, TN> b;
    ptx::griddepcontrol_wait();
    a.fetch(p.a, p.plane, p.pixels, begin, m0, mine, lane);
#pragma unroll 1
    for (int step = begin; step < end; ++step, stage.advance(S::stages)) {
      b.fetch(p.b, p.plane, p.pixels, step, n0, mine, lane);
      ptx::mbarrier_wait(&empty[stage.index], stage.parity ^ 1);  // passes on the first trip round the ring
      uint32_t const to = ring + stage.index * S::stage_bytes;
      a.put(to, mine, lane);
      if (step + 1 < end) a.fetch(p.a, p.plane, p.pixels, step + 1, m0, mine, lane);
      b.put(to + TM * kLineBytes, mine, lane);
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&full[stage.index]);
    }
    return;
  }
  if constexpr (S::moves) ptx::setmaxnreg_dec<96>();
  int const group = warp / 4, thread = int(threadIdx.x) % kWarpgroup;
  uint64_t const layout = rows ? ptx::wgmma_descriptor(0, tma::kRunBytes, kCoreBytes) : tma::layout_of(kLineBytes);
  constexpr uint32_t part_bytes = rows ? 2 * kCoreBytes : 32;
  float acc[TN / 2] = {};
  int before = -1;
#pragma unroll 1
  for (int step = begin; step < end; ++step, stage.advance(S::stages)) {
    ptx::mbarrier_wait(&full[stage.index], stage.parity);
    uint32_t const from = ring + stage.index * S::stage_bytes;
    ptx::wgmma_fence_operand(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      ptx::wgmma_mma_async<T, rows, rows>(
          acc, tma::at_address(layout, from + group * 64 * kLineBytes + k * part_bytes),
          tma::at_address(layout, from + TM * kLineBytes + k * part_bytes));
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_fence_operand(acc);
    if (before >= 0 && lane == 0) ptx::mbarrier_arrive(&empty[before]);
    before = stage.index;
  }
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_fence_operand(acc);
  if (p.w != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const m = m0 + warp * 16 + lane / 4 + half * 8;
      T* const to = static_cast<T*>(p.w) + m * p.w_m + n0 + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < TN / 8; ++j)
        if (m < p.a.channels && n0 + j * 8 + lane % 4 * 2 < p.b.channels)
          *reinterpret_cast<Vector<T, 2>*>(to + j * 8) = {narrow<T>(acc[j * 4 + half * 2]),
                                                          narrow<T>(acc[j * 4 + half * 2 + 1])};
    }
    return;
  }
  float4* const to = reinterpret_cast<float4*>(p.parts + int64_t(part * p.tiles.value + tile) * (TM * TN)) +
                     group * (TN / 8 * kWarpgroup) + thread;
#pragma unroll
  for (int j = 0; j < TN / 8; ++j)
    if (n0 + j * 8 < p.b.channels)
      to[j * kWarpgroup] = make_float4(acc[j * 4], acc[j * 4 + 1], acc[j * 4 + 2], acc[j * 4 + 3]);
}

template <DType dtype, int TM, int TN>
cudaError_t launch_sums(Problem const& problem, int split_k, Arguments const& args, cudaStream_t stream) {
  using S = SumShape<TM, TN>;
  using T = typename TypeOf<dtype>::type;
  PixelsWgrad const shape(TM, TN, problem);
  pixels_wgrad::Planes const x{args.a, problem.x.n, problem.x.c, int32_t(problem.C)},
      y{args.b, problem.y.n, problem.y.c, int32_t(problem.K)};
  int64_t const plane = problem.H * problem.W;
  SumsParams p{};
  p.a = shape.swapped ? x : y, p.b = shape.swapped ? y : x;
  p.plane = Divisor(plane), p.tiles_n = Divisor(shape.tiles_n), p.tiles = Divisor(shape.tiles);
  p.pixels = int32_t(problem.N * plane), p.steps = int32_t(ceil_div(p.pixels, kLineBytes / int(sizeof(T))));
  p.share = int32_t(ceil_div(p.steps, split_k));
  int64_t const split = ceil_div(p.steps, p.share);  // without empty parts
  p.parts = static_cast<float*>(args.workspace);
  int64_t const w_m = shape.swapped ? problem.w.c : problem.w.n, w_n = shape.swapped ? problem.w.n : problem.w.c;
  bool const pairs =  // of columns can be stored at once
      w_n == 1 && p.b.channels % 2 == 0 && w_m % 2 == 0 && problem.w_align >= 2 * size_of(dtype);
  if (split == 1 && pairs) p.w = args.out, p.w_m = w_m;
  auto even = [&](pixels_wgrad::Planes const& t) {
    return plane % 2 == 0 && t.c % 2 == 0 && t.n % 2 == 0 && reinterpret_cast<uint64_t>(t.at) % 4 == 0;
  };
  auto* kernel = sums_kernel<T, TM, TN, 1>;
  if constexpr (sizeof(T) == 2)
    if (even(p.a) && even(p.b)) kernel = sums_kernel<T, TM, TN, 2>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
  if (error != cudaSuccess) return error;
  error = launch_dependent(kernel, dim3(unsigned(shape.tiles * split)), S::threads, S::shared_bytes, stream, p);
  if (error != cudaSuccess || p.w != nullptr) return error;
  pixels_wgrad::SumParams r{};
  r.parts = p.parts, r.w = args.out, r.m = w_m, r.n = w_n, r.pairs = pairs, r.M = p.a.channels, r.N = p.b.channels;
  r.tiles = int32_t(shape.tiles), r.split = int32_t(split), r.tile_m = TM, r.tile_n = TN;
  int const groups = split <= 2 ? 1 : split <= 8 ? 2 : split <= 24 ? 4 : split <= 100 ? 8 : 16;  // threads of a place
  r.tiles_n = p.tiles_n, r.of_tile = Divisor(TM * TN / 4), r.columns = Divisor(TN / 8);
  r.lanes = Divisor(pixels_wgrad::kSumThreads / groups);
  int64_t const blocks = ceil_div(shape.tiles * (TM * TN / 4), r.lanes.value);
  return launch_dependent(pixels_wgrad::sum_kernel<T>, dim3(unsigned(blocks)), pixels_wgrad::kSumThreads, 0, stream, r);
}

}  // namespace conv2d_ext::pixels_gather

#define CONV2D_EXT_PIXELS_GATHER_SUMS_INSTANCE(family, op, dtype, tm, tn, tk, variant)                        \
  namespace conv2d_ext {                                                                                      \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const& plan,           \
                                                                Arguments const& args, cudaStream_t stream) { \
    return pixels_gather::launch_sums<DType::dtype, tm, tn>(p, plan.split_k, args, stream);                   \
  }                                                                                                           \
  }
