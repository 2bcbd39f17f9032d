// 1x1 fprop and dgrad over NCHW of 16-bit types in place: out[m, pixel] = sum over c of w[m, c] * in[c, pixel].
//
// A block has one tile: TM filters (dgrad: channels) by TN pixels, runs of 64 of any images, or, of tiles whose width
// is no multiple of 64, of one image. A warp copies the filters' part of a step of 64 channels and another the pixels',
// which lie as they come (N-major). The others multiply, 64 or 128 rows a warpgroup, put their results over the ring
// and have the copy engine store them, which leaves out what lies outside of the tensor. The code is short on purpose:
// a block runs most of it once, and it comes from memory.
#pragma once

#include "../core/pixels_runs.h"
#include "dependent.cuh"
#include "pixels_maps.cuh"

namespace conv2d_ext::pixel_runs {

using tma::Divisor;

constexpr int kRunBytes = 64 * kLineBytes;

template <int TM, int TN>
struct Shape {
  static constexpr int blocks = TM == 256 ? 2 : 1, groups = TM / 64 / blocks;  // of 64 rows, a warpgroup
  static constexpr bool two = TM * TN <= 128 * 128;                            // blocks share an SM
  static constexpr int threads = groups * kWarpgroup + (two ? 64 : kWarpgroup);
  static constexpr int runs = (TN + 63) / 64, stage_bytes = TM * kLineBytes + runs * kRunBytes;
  // Two blocks share an SM's memory, if there are so many.
  static constexpr int most_stages = 222 * 1024 / stage_bytes, stages = (two ? 110 : 222) * 1024 / stage_bytes;
  static constexpr int out_run = TN % 64 == 0 ? 64 : 32, out_runs = TN / out_run, out_bytes = 16 * out_run * 2;
  static constexpr int multiply_regs = 224, copy_regs = 56;  // where a block has an SM alone
  static_assert(two || (groups * multiply_regs + copy_regs) * kWarpgroup <= 65536);
  static_assert(TM * TN * 2 <= stages * stage_bytes);
};

struct Params {
  CUtensorMap a, b, out;
  Divisor tiles_m, per_image;  // per_image: runs, or tiles
  int32_t stages, steps, M, images;
  void const* bias;
  int64_t bias_stride;
};

template <class T, int TM, int TN, bool a_rows>
__global__ void __launch_bounds__(Shape<TM, TN>::threads, Shape<TM, TN>::two ? 2 : 1)
    main_kernel(__grid_constant__ Params const p) {
  using S = Shape<TM, TN>;
  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t full_a[S::most_stages], full_b[S::most_stages], empty[S::most_stages];
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), warp = warp_uniform(int(threadIdx.x) / 32 % 4);
  int m0 = int(blockIdx.x);
  int const tile = p.tiles_m.divide(m0);
  m0 *= TM;
  int const groups = min(S::groups, (p.M - m0 + S::blocks * 64 - 1) / (S::blocks * 64));  // that have rows
  // Where a run of columns lies.
  auto image_of = [&](int columns, int& pixel) {
    int run = TN % 64 == 0 ? tile * (TN / 64) + columns / 64 : tile;
    int const image = p.per_image.divide(run);
    pixel = TN % 64 == 0 ? run * 64 : run * TN + columns;
    return image;
  };
  auto copy_a = [&](int step, int stage) {
    uint32_t const to = ring + stage * S::stage_bytes;
    if constexpr (a_rows) {
      int const bytes = min(TM / 64, (p.M - m0 + 63) / 64) * kRunBytes;
      ptx::mbarrier_arrive_expect_tx(&full_a[stage], bytes);
#pragma unroll 1
      for (int run = 0; run * kRunBytes < bytes; ++run)
        ptx::cp_async_bulk_tensor_4d(to + run * kRunBytes, &p.a, &full_a[stage], m0 + run * 64, step * 64, 0, 0);
    } else {
      ptx::mbarrier_arrive_expect_tx(&full_a[stage], TM * kLineBytes);
      ptx::cp_async_bulk_tensor_4d(to, &p.a, &full_a[stage], step * 64, m0, 0, 0);
    }
  };
  int pixel[S::runs], image[S::runs];
  auto copy_b = [&](int step, int stage) {
    uint32_t const to = ring + stage * S::stage_bytes + TM * kLineBytes;
    ptx::mbarrier_arrive_expect_tx(&full_b[stage], S::runs * kRunBytes);
#pragma unroll
    for (int run = 0; run < S::runs; ++run)
      ptx::cp_async_bulk_tensor_4d(to + run * kRunBytes, &p.b, &full_b[stage], pixel[run], step * 64, image[run], 0);
  };
  // The first trip round the ring is asked for before the block meets.
  auto copy_all = [&](uint64_t* full, auto copy, bool first) {
    int const trip = min(p.stages, p.steps);
    if (first) {
#pragma unroll 1
      for (int i = 0; i < p.stages; ++i) ptx::mbarrier_init(&full[i], 1);
      ptx::fence_mbarrier_init();
      ptx::griddepcontrol_wait();
    }
    Stage stage;
#pragma unroll 1
    for (int step = first ? 0 : trip; step < (first ? trip : p.steps); ++step, stage.advance(p.stages)) {
      if (!first) ptx::mbarrier_wait(&empty[stage.index], stage.parity);
      copy(step, stage.index);
    }
  };
  bool const of_a = warp == 0, copies = group == S::groups && warp < 2 && ptx::elect();
  if (copies && of_a) copy_all(full_a, copy_a, true);
  if (copies && !of_a) {
#pragma unroll
    for (int run = 0; run < S::runs; ++run) image[run] = image_of(run * 64, pixel[run]);
    copy_all(full_b, copy_b, true);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) ptx::mbarrier_init(&empty[i], groups * 4);
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
  __syncthreads();
  if (group == S::groups) {
    if constexpr (!S::two) ptx::setmaxnreg_dec<S::copy_regs>();
    if (copies && of_a) copy_all(full_a, copy_a, false);
    if (copies && !of_a) copy_all(full_b, copy_b, false);
    if (copies && of_a) ptx::griddepcontrol_launch_dependents();
    return;
  }
  if constexpr (!S::two) ptx::setmaxnreg_inc<S::multiply_regs>();
  if (group >= groups) return;
  int const lane = int(threadIdx.x) % 32;
  uint64_t const layout_a = a_rows ? ptx::wgmma_descriptor(0, kRunBytes, kCoreBytes) : tma::layout_of(kLineBytes),
                 layout_b = ptx::wgmma_descriptor(0, kRunBytes, kCoreBytes);
  constexpr uint32_t step_a = a_rows ? 2 * kCoreBytes : 32;
  float acc[S::blocks][TN / 2] = {};
  auto fence_operands = [&] {
#pragma unroll
    for (int b = 0; b < S::blocks; ++b) ptx::wgmma_fence_operand(acc[b]);
  };
  Stage stage;
  int before = 0;
#pragma unroll 1
  for (int step = 0; step < p.steps; ++step) {
    ptx::mbarrier_wait(&full_a[stage.index], stage.parity);
    ptx::mbarrier_wait(&full_b[stage.index], stage.parity);
    uint32_t const from = ring + stage.index * S::stage_bytes;
    fence_operands();
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int b = 0; b < S::blocks; ++b)
        ptx::wgmma_mma_async<T, a_rows, true>(
            acc[b], tma::at_address(layout_a, from + (group * S::blocks + b) * kRunBytes + k * step_a),
            tma::at_address(layout_b, from + TM * kLineBytes + k * (2 * kCoreBytes)));
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();
    fence_operands();
    if (step > 0 && lane == 0) ptx::mbarrier_arrive(&empty[before]);
    before = stage.index;
    stage.advance(p.stages);
  }
  ptx::wgmma_wait_group<0>();
  fence_operands();
  if (p.bias != nullptr) {
    ptx::griddepcontrol_wait();
#pragma unroll
    for (int b = 0; b < S::blocks; ++b) {
      float bias[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const m = m0 + (group * S::blocks + b) * 64 + warp * 16 + lane / 4 + half * 8;
        if (m < p.M) bias[half] = widen(static_cast<T const*>(p.bias)[m * p.bias_stride]);
      }
#pragma unroll
      for (int i = 0; i < TN / 2; ++i) acc[b][i] += bias[i / 2 % 2];
    }
  }
  ptx::bar_sync(1, groups * kWarpgroup);  // nobody reads the ring
  // 16 rows of a run of pixels are a box; stmatrix stores two blocks of 8 columns.
  uint32_t const mine = ring + (group * 4 + warp) * (S::blocks * S::out_runs * S::out_bytes);
  uint32_t const row = mine + (lane / 8 % 2 * 8 + lane % 8) * (S::out_run * 2);
  uint32_t const place = uint32_t(lane / 16 ^ (S::out_run == 64 ? lane % 8 : lane % 8 / 2)) * 16;
#pragma unroll
  for (int b = 0; b < S::blocks; ++b)
#pragma unroll
    for (int j = 0; j < TN / 8; j += 2) {
      float const* const v = acc[b] + j * 4;
      uint32_t const words[4] = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
      int const run = j * 8 / S::out_run, chunk = j * 8 % S::out_run / 8;
      ptx::stmatrix_x4(row + (b * S::out_runs + run) * S::out_bytes + (place ^ (chunk * 16)), words);
    }
  ptx::fence_proxy_async();
  __syncwarp();
  if (ptx::elect()) {
#pragma unroll 1
    for (int i = 0; i < S::blocks * S::out_runs; ++i) {
      int const b = i / S::out_runs, run = i % S::out_runs;
      int pixel;
      int const image = image_of(run * S::out_run, pixel), m = m0 + (group * S::blocks + b) * 64 + warp * 16;
      if (image < p.images && m < p.M)
        ptx::cp_async_bulk_tensor_4d_store(&p.out, mine + i * S::out_bytes, pixel, m, image, 0);
    }
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read<0>();
  }
}

template <Op op, DType dtype, int TM, int TN>
cudaError_t launch(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using S = Shape<TM, TN>;
  PixelRuns const t(TM, TN, op, problem);
  Params p{};
  if (auto const error = set_params<op, dtype>(p, t, problem, args, TM, S::out_run)) return error;
  int sm_count = 0;
  if (auto const error = count_sms(sm_count)) return error;
  p.stages = t.tiles <= sm_count ? S::most_stages : S::stages;
  int const shared_bytes = p.stages * S::stage_bytes + 1024;  // the swizzle wants 1024-byte alignment
  auto* const kernel = main_kernel<typename TypeOf<dtype>::type, TM, TN, op == Op::dgrad>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
    return error;
  return launch_dependent(kernel, dim3(unsigned(t.tiles)), S::threads, shared_bytes, stream, p);
}

}  // namespace conv2d_ext::pixel_runs

#define CONV2D_EXT_PIXEL_RUNS_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                    \
    return pixel_runs::launch<Op::op, DType::dtype, tm, tn>(p, args, stream);  \
  }
