// 1x1 fprop and dgrad over NCHW, in 16-bit types, of images that the copy engine does not take: whose planes are no
// multiple of 16 bytes but of 8, as those of 14x14. tma_lean.cuh's product of filters (channels) by pixels, in its
// tiles up to 128x128; only the pixels come another way: kGatherWarps warps copy four at a time (cp.async), to where
// the copy engine would have put them. The columns of a tile are pixels of all images, one after the other, so that
// none are in vain.
#pragma once

#include "tma_lean.cuh"

namespace conv2d_ext::tma {

constexpr int kGatherWarps = 4;

struct GatherParams : LeanParams {
  void const* in;
  int64_t in_n, in_c;
  int32_t channels;  // that are summed over
};

// The steps of one of the gathering threads: four pixels of every eighth channel, of each run of 64.
template <class T, int TM, int TN>
struct Gather {
  using S = LeanShapeOf<T, TM, TN, kLineBytes>;
  static constexpr int runs = TN / 64, apart = kGatherWarps * 2, passes = 64 / apart;  // channels
  static_assert(apart == 8, "a thread's lines have the same place in the swizzle");
  T const* from[runs];
  bool valid[runs];
  int32_t channel, left;
  uint32_t to;
  Stage stage;

  __device__ void begin(GatherParams const& p, uint32_t ring, int begin, int count, int n_tile, int thread) {
    int const unit = thread % 16, line = thread / 16;
    left = count, channel = begin * 64 + line;
    to = ring + S::steps * S::a_bytes + line * kLineBytes + ((unit / 2) ^ line) * 16 + unit % 2 * 8;
#pragma unroll
    for (int run = 0; run < runs; ++run) {
      int pixel = n_tile * TN + run * 64 + unit * 4;
      int const image = p.columns.divide(pixel);
      valid[run] = image < p.taps.value;
      from[run] = static_cast<T const*>(p.in);
      if (valid[run]) from[run] += image * p.in_n + channel * p.in_c + pixel;
    }
  }

  __device__ void copy_stage(GatherParams const& p) {
    uint32_t at = to + stage.index * S::stage_bytes;
#pragma unroll 1
    for (int step = min(left, S::steps); step > 0; --step, at += S::b_bytes, channel += 64) {
#pragma unroll
      for (int run = 0; run < runs; ++run) {
        T const* its = from[run];
#pragma unroll
        for (int i = 0; i < passes; ++i, its += apart * p.in_c)
          ptx::cp_async_ca<8>(at + run * S::b_run_bytes + i * (apart * kLineBytes), its,
                              valid[run] && channel + i * apart < p.channels);
        from[run] = its;
      }
    }
    left -= S::steps;
  }
};

template <class T, int TM, int TN, bool a_rows>
__global__ void __launch_bounds__(TM / 64 * kWarpgroup + (1 + kGatherWarps) * 32, TM == 64 ? 2 : 1)
    lean_gather_kernel(__grid_constant__ GatherParams const p) {
  using S = LeanShapeOf<T, TM, TN, kLineBytes>;
  extern __shared__ uint8_t dynamic[];
  __shared__ LeanTables tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int const warp = warp_uniform(int(threadIdx.x) / 32), copier = warp - S::multiplying / 32;
  int const n_tile = int(blockIdx.x), rank = int(blockIdx.z);
  int const begin = rank * p.share, count = max(min(p.share, p.steps - begin), 0);
  PlaneCopies<T, TM, TN, a_rows, true, true> copies;
  Gather<T, TM, TN> gather;
  if (copier == 0) {
    if (ptx::elect()) {
      ptx::griddepcontrol_wait();
      copies.begin(p, ring, begin, count, n_tile, 0);
      first_trip<true>(copies, p, tables);
    }
    __syncwarp();
  } else if (copier > 0) {
    gather.begin(p, ring, begin, count, n_tile, int(threadIdx.x) - S::multiplying - 32);
    ptx::griddepcontrol_wait();
    if (count > 0) gather.copy_stage(p);
  } else if (warp == 0) {
    if (ptx::elect()) {
      for (int i = 0; i < p.stages; ++i) {
        ptx::mbarrier_init(&tables.full_b[i], kGatherWarps * 32);
        ptx::mbarrier_init(&tables.empty[i], S::multiplying / 32);
      }
      ptx::mbarrier_init(&tables.parts, 1);
      ptx::fence_mbarrier_init();
      if (p.splits > 1) {
        int const mine = (TN / 8 + p.splits - 1 - rank) / p.splits;
        ptx::mbarrier_arrive_expect_tx(&tables.parts, (p.splits - 1) * mine * S::multiplying * 16);
      }
    }
    __syncwarp();
  }
  __syncthreads();
  if (p.splits > 1) ptx::barrier_cluster_arrive_relaxed();
  if (copier < 0) {
    ptx::griddepcontrol_wait();
    lean_multiply<T, TM, TN, kLineBytes, a_rows, true, true, true>(p, ring, tables, count, rank, n_tile, 0);
    return;
  }
  if (copier == 0) {
    if (ptx::elect()) {
      other_trips(copies, p, tables);
      ptx::griddepcontrol_launch_dependents();
    }
    __syncwarp();
  } else if (count > 0) {
    ptx::cp_async_mbarrier_arrive_noinc(&tables.full_b[0]);
    gather.stage.advance(p.stages);
#pragma unroll 1
    for (; gather.left > 0; gather.stage.advance(p.stages)) {
      ptx::mbarrier_wait(&tables.empty[gather.stage.index], gather.stage.parity ^ 1);  // passes on the first trip
      gather.copy_stage(p);
      ptx::cp_async_mbarrier_arrive_noinc(&tables.full_b[gather.stage.index]);
    }
  }
  if (p.splits > 1) ptx::barrier_cluster_wait();
}

template <Op op, DType dtype, int TM, int TN>
cudaError_t launch_lean_gather(Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  using S = LeanShapeOf<T, TM, TN, kLineBytes>;
  constexpr bool forward = op == Op::fprop;
  int64_t const pixels = p.H * p.W, depth = forward ? p.C : p.K;
  Strides const &in = forward ? p.x : p.y, &out = forward ? p.y : p.x;
  GatherParams q{};
  q.M = int32_t(forward ? p.K : p.C), q.N = int32_t(p.N * pixels);
  q.columns = Divisor(pixels), q.rows = q.taps_w = q.tiles_n = Divisor(1), q.taps = Divisor(p.N);
  q.steps = int32_t(ceil_div(depth, 64)), q.splits = plan.split_k;
  q.share = int32_t(ceil_div(q.steps, q.splits)), q.per = int32_t(ceil_div(TN / 8, q.splits));
  q.out_h = out.c, q.out_n = out.n;
  q.bias = args.bias, q.bias_stride = args.bias_stride, q.out = args.out;
  q.in = args.a, q.in_n = in.n, q.in_c = in.c, q.channels = int32_t(depth);
  Tensor4 const w{args.b, dtype, {p.C, p.K, 1, 1}, {1, p.w.n, 0, 0}};
  cudaError_t const error = encode_tiled(q.a, w, 64, forward ? TM : 64, 1, 1);
  if (error != cudaSuccess) return error;
  return start_lean<S>(lean_gather_kernel<T, TM, TN, op == Op::dgrad>, q, ceil_div(q.N, TN), ceil_div(q.M, TM), stream,
                       S::multiplying + (1 + kGatherWarps) * 32);
}

}  // namespace conv2d_ext::tma
