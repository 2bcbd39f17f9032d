// dgrad of 1x1 filters with a stride of two, 16-bit types: of the phases of x only the first has a tap. Its pixels are
// those of a convolution of stride one whose results lie apart, tma.cuh's; what is between is written as zeros, by two
// warps of each block, while the others multiply. (As tiles of their own the zeros take turns with the products;
// written by the copy engine, their lines hold up those of the operands.)
#pragma once

#include "../core/tma_zeros.h"
#include "tma_wgrad.cuh"

namespace conv2d_ext::tma {

struct ZerosParams {
  Params p;      // of the pixels that have a tap
  Divisor rows;  // of an image of x
  Divisor stride_h;
  int32_t stride_w, W;
  int64_t rows_of_all;          // images
  int32_t vectors;              // of a pixel
  int64_t out_n, out_h, out_w;  // strides of x, in vectors
};

constexpr int kZerosWarps = 2;

// One thread copies pixels, another filters.
template <class T, int TM>
__device__ void zeros_copy_a(Params const& p, uint32_t ring, Barriers const& bars) {
  int const chunk_size = p.line / int(sizeof(T)), bytes = p.a_bytes, stages = p.stages_a;
  Phase const& phase = p.phase[0];
  Stage a;
  Work work(p);
#pragma unroll 1
  for (Unit unit; work.take(p, unit);) {
    int64_t j = int64_t(unit.m) * TM;
    int64_t i = phase.columns.divide(j);
    int const n = int(phase.rows.divide(i)), h = phase.h0 + int(i), w = phase.w0 + int(j);
#pragma unroll 1
    for (int chunk = 0; chunk < p.chunks; ++chunk, a.advance(stages)) {
      uint32_t const full = bars.full_a + a.index * 8;
      ptx::mbarrier_wait(bars.empty_a + a.index * 8, a.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, bytes);
      ptx::cp_async_bulk_tensor_im2col(ring + a.index * bytes, &p.a[0], full, chunk * chunk_size, w, h, n, 0, 0);
    }
  }
}

template <class T, int TN>
__device__ void zeros_copy_b(Params const& p, uint32_t ring, Barriers const& bars) {
  int const chunk_size = p.line / int(sizeof(T)), stages = p.stages_b;
  ring += p.stages_a * p.a_bytes;
  Stage b;
  Work work(p);
#pragma unroll 1
  for (Unit unit; work.take(p, unit);) {
    int const first = unit.n * TN, runs = min(TN / 64, (p.N - first + 63) / 64);
#pragma unroll 1
    for (int chunk = 0; chunk < p.chunks; ++chunk, b.advance(stages)) {
      uint32_t const full = bars.full_b + b.index * 8, to = ring + b.index * p.b_bytes;
      ptx::mbarrier_wait(bars.empty_b + b.index * 8, b.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, runs * chunk_size * kLineBytes);
#pragma unroll 1
      for (int run = 0; run < runs; ++run)
        ptx::cp_async_bulk_tensor_5d(to + run * kRunBytes, &p.b, full, first + run * 64, 0, 0, chunk * chunk_size, 0);
    }
    if (p.keep_b) return;
  }
}

constexpr int kZerosPause = 100;  // ns, after a pixel, lest the stores of all blocks stand before their first loads

// A warp's rows of x, in turn with those of all others; from turn to turn it takes the place of its neighbour, lest all
// of its rows be of the same phase.
__device__ inline void write_zeros(ZerosParams const& q) {
  int const lane = int(threadIdx.x) % 32, warps = int(gridDim.x) * kZerosWarps;
  int place = int(blockIdx.x) * kZerosWarps + int(threadIdx.x) / 32 % kZerosWarps;
  uint4* const out = static_cast<uint4*>(q.p.out) + lane;
#pragma unroll 1
  for (int64_t first = 0; first < q.rows_of_all; first += warps) {
    int64_t i = first + place;
    if (++place == warps) place = 0;
    if (i >= q.rows_of_all) continue;
    int64_t const n = q.rows.divide(i);
    int h = int(i);
    uint4* to = out + n * q.out_n + i * q.out_h;
    q.stride_h.divide(h);         // the remainder
    int next = h == 0 ? 0 : q.W;  // the next pixel with a tap
#pragma unroll 1
    for (int w = 0; w < q.W; ++w, to += q.out_w) {
      if (w == next) {
        next += q.stride_w;
        continue;
      }
      int at = 0;
#pragma unroll 1
      for (; at + lane + 96 < q.vectors; at += 128)
#pragma unroll
        for (int i = 0; i < 4; ++i) to[at + i * 32] = make_uint4(0, 0, 0, 0);
#pragma unroll 1
      for (; at + lane < q.vectors; at += 32) to[at] = make_uint4(0, 0, 0, 0);
      __nanosleep(kZerosPause);
    }
  }
}

template <class T, int TM, int TN>
__global__ void __launch_bounds__(kThreads, 1) zeros_kernel(__grid_constant__ ZerosParams const q) {
  using S = Shape<T, TM, TN>;
  extern __shared__ uint8_t dynamic[];
  __shared__ Tables<T, TN> tables;
  Params const& p = q.p;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  if (threadIdx.x % 32 == 0) {
    constexpr int warps = S::turns ? 4 : 8;  // that read a stage
    for (int i = int(threadIdx.x) / 32; i < kMaxStages; i += kThreads / 32) {
      ptx::mbarrier_init(&tables.full_a[i], 1);
      ptx::mbarrier_init(&tables.empty_a[i], warps);
      ptx::mbarrier_init(&tables.full_b[i], 1);
      ptx::mbarrier_init(&tables.empty_b[i], warps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
  int const warp = warp_uniform(int(threadIdx.x) / 32);
  if (warp < 8) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    multiply<T, TM, TN, A::pixels, true, false>(p, ring, tables);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    Barriers const bars(tables);
    if (warp >= 12 - kZerosWarps)
      write_zeros(q);
    else if (ptx::elect())
      warp == 8 ? zeros_copy_a<T, TM>(p, ring, bars) : zeros_copy_b<T, TN>(p, ring, bars);
  }
}

template <DType dtype, int TM, int TN>
cudaError_t launch_zeros(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  using S = Shape<T, TM, TN>;
  constexpr int elements = 16 / int(sizeof(T));
  Problem const apart = zeros_apart(problem);
  Plan whole = plan;
  whole.split_k = 1;
  ZerosParams q{};
  int64_t blocks = 0;
  cudaError_t error = params_of<S, T, TM, TN>(q.p, blocks, Op::dgrad, apart, row_of(plan), whole, args);
  if (error != cudaSuccess) return error;
  int const chunk = q.p.line / int(sizeof(T));
  if ((error = encode_filters(q.p.b, args.b, apart, S::columns(q.p.N), chunk)) != cudaSuccess) return error;
  q.rows = Divisor(problem.H), q.stride_h = Divisor(problem.stride_h), q.stride_w = int32_t(problem.stride_w);
  q.W = int32_t(problem.W), q.rows_of_all = problem.N * problem.H, q.vectors = int32_t(problem.C / elements);
  q.out_n = problem.x.n / elements, q.out_h = problem.x.h / elements, q.out_w = problem.x.w / elements;
  auto const kernel = zeros_kernel<T, TM, TN>;
  if ((error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes)) !=
      cudaSuccess)
    return error;
  int sm_count = 0;
  if ((error = count_sms(sm_count)) != cudaSuccess) return error;
  blocks = min64(blocks, sm_count);
  if (q.p.keep_b) blocks -= blocks % q.p.tiles_n.value;
  return launch_dependent(kernel, dim3(unsigned(blocks)), kThreads, S::shared_bytes, stream, q);
}

template <Op op, DType dtype, int TM, int TN, Variant variant>
cudaError_t launch_zeros_or(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  if constexpr (op == Op::dgrad && variant == Variant::im2col && TN == 256 && size_of(dtype) == 2)
    if (takes_zeros(row_of(plan), problem)) return launch_zeros<dtype, TM, TN>(problem, plan, args, stream);
  return launch_row<op, dtype, TM, TN, variant>(problem, plan, args, stream);
}

}  // namespace conv2d_ext::tma

#define CONV2D_EXT_TMA_ZEROS_INSTANCE(family, op, dtype, tm, tn, tk, variant)                           \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                             \
    return tma::launch_zeros_or<Op::op, DType::dtype, tm, tn, Variant::variant>(p, plan, args, stream); \
  }
