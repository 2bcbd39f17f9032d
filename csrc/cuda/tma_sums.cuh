// wgrad in channels_last, 16-bit types, of few weights: w[k, tap, c] = sum over pixels of y[pixel, k] *
// x[moved pixel, c]. As in tma_lean.cuh a block has one tile, TM filters by TN channels of one tap, alone on its SM,
// and asks for the first trip round the ring before it meets. Several blocks have a tile; they take turns with its
// steps of 64 pixels, so that all blocks read neighbouring pixels at a time.
//
// They are a cluster, and every block adds some columns of the tile: the others write theirs into its ring, once nobody
// in the cluster reads that any more, and it adds all in their order. Or each stores its sums to the workspace, and
// sums_reduce adds these in their order.
#pragma once

#include "../core/tma_sums.h"
#include "tma_lean.cuh"
#include "tma_parts.cuh"

namespace conv2d_ext::tma {

struct SumsParams : LeanParams {
  int32_t parts;  // blocks of a tile
  bool once;      // L2 gives up what is read first (reads_once)
  void* workspace;
};

// The steps of one of the two copying threads.
template <class T, int TM, int TN, bool of_y>
struct SumsCopies {
  using S = LeanShapeOf<T, TM, TN, kLineBytes>;
  int32_t left, step, every, tap_h, tap_w, first, runs;
  uint32_t to;
  uint64_t once;  // the policy
  Stage stage;

  __device__ void begin(SumsParams const& p, uint32_t ring, int part, int count, int n_tile, int tap) {
    left = count, step = part, every = p.parts;
    once = p.once ? ptx::createpolicy_evict_first() : 0;
    tap_h = tap_w = 0;
    if constexpr (!of_y) {
      tap_w = tap, tap_h = p.taps_w.divide(tap_w);
      tap_h *= p.tap_h, tap_w *= p.tap_w;
    }
    to = ring + (of_y ? 0 : S::steps * S::a_bytes);
    first = of_y ? int(blockIdx.y) * TM : n_tile * TN;
    runs = of_y ? min(TM / 64, (p.M - first + 63) / 64) : min(TN / 64, (p.N - first + 63) / 64);
  }
  __device__ void copy_stage(LeanParams const& p, LeanTables& tables) {
    constexpr int step_bytes = of_y ? S::a_bytes : S::b_bytes;
    int const steps = min(left, S::steps);
    uint32_t const full = ptx::shared_address(of_y ? &tables.full_a[stage.index] : &tables.full_b[stage.index]);
    ptx::mbarrier_arrive_expect_tx(full, steps * runs * S::run_bytes);
    uint32_t at = to + stage.index * S::stage_bytes;
#pragma unroll 1
    for (int i = 0; i < steps; ++i, at += step_bytes, step += every) {
      int w = step * 64, h = p.columns.divide(w);
      int const image = p.rows.divide(h);
      if constexpr (!of_y) h = p.h0 + h * p.stride_h, w = p.w0 + w * p.stride_w;
#pragma unroll 1
      for (int run = 0; run < runs; ++run) {
        uint32_t const run_at = at + run * S::run_bytes;
        CUtensorMap const* const map = of_y ? &p.a : &p.b;
        if (once != 0)
          ptx::cp_async_bulk_tensor_im2col(run_at, map, full, first + run * 64, w, h, image, tap_w, tap_h, once);
        else
          ptx::cp_async_bulk_tensor_im2col(run_at, map, full, first + run * 64, w, h, image, tap_w, tap_h);
      }
    }
    left -= steps;
  }
};

// Stores what thread `thread` of a block has of 8 columns of two rows: the j-th of its tile.
template <class T, int TM, int TN>
__device__ inline void sums_store(SumsParams const& p, float const* sum, int m_tile, int n_tile, int tap, int thread,
                                  int j) {
  int const lane = thread % 32, m = m_tile * TM + thread / 32 * 16 + lane / 4;
  int const n = n_tile * TN + j * 8 + lane % 4 * 2;
  int tap_w = tap;
  int const tap_h = p.taps_w.divide(tap_w);
  int64_t out[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    out[half] = m + half * 8 >= p.M ? -1 : (m + half * 8) * p.out_n + tap_h * p.out_h + tap_w * p.out_w;
  lean_store_block<T>(p, sum, out, n < p.N ? n : -1);
}

template <class T, int TM, int TN>
__global__ void __launch_bounds__(LeanShape<TM, TN, kLineBytes>::threads)
    sums_kernel(__grid_constant__ SumsParams const p) {
  using S = LeanShapeOf<T, TM, TN, kLineBytes>;
  constexpr int units = TN / 8;
  extern __shared__ uint8_t dynamic[];
  __shared__ LeanTables tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  bool const clusters = p.splits > 1;
  int const part = int(blockIdx.z), count = max((p.steps - part + p.parts - 1) / p.parts, 0);
  int n_tile = int(blockIdx.x);
  int const tap = p.tiles_n.divide(n_tile);
  int const warp = warp_uniform(int(threadIdx.x) / 32), copier = warp - S::multiplying / 32;
  SumsCopies<T, TM, TN, true> copies_y;
  SumsCopies<T, TM, TN, false> copies_x;
  if (copier == 0) {
    if (ptx::elect()) {
      ptx::griddepcontrol_wait();
      copies_y.begin(p, ring, part, count, n_tile, tap);
      first_trip<true>(copies_y, p, tables);
    }
  } else if (copier == 1) {
    if (ptx::elect()) {
      ptx::griddepcontrol_wait();
      copies_x.begin(p, ring, part, count, n_tile, tap);
      first_trip<false>(copies_x, p, tables);
    }
  } else if (warp == 0 && ptx::elect()) {
    for (int i = 0; i < p.stages; ++i) ptx::mbarrier_init(&tables.empty[i], S::multiplying / 32);
    ptx::mbarrier_init(&tables.parts, 1);
    ptx::fence_mbarrier_init();
    if (clusters) {
      int const mine = (units + p.splits - 1 - part) / p.splits;
      ptx::mbarrier_arrive_expect_tx(&tables.parts, (p.splits - 1) * mine * S::multiplying * 16);
    }
  }
  __syncwarp();
  __syncthreads();
  if (copier >= 0) {
    if (ptx::elect()) {
      if (copier == 0) {
        other_trips(copies_y, p, tables);
        ptx::griddepcontrol_launch_dependents();
      } else {
        other_trips(copies_x, p, tables);
      }
    }
    __syncwarp();
    if (clusters) {
      ptx::barrier_cluster_arrive();
      ptx::barrier_cluster_wait();
    }
    return;
  }

  ptx::griddepcontrol_wait();
  int const group = warp / 4, lane = int(threadIdx.x) % 32;
  uint64_t const layout = ptx::wgmma_descriptor(0, S::run_bytes, kCoreBytes);
  float acc[TN / 2];
#pragma unroll
  for (int i = 0; i < TN / 2; ++i) acc[i] = 0;
  Stage stage;
  int before = -1;
#pragma unroll 1
  for (int step = 0; step < count; step += S::steps, stage.advance(p.stages)) {
    ptx::mbarrier_wait(&tables.full_a[stage.index], stage.parity);
    ptx::mbarrier_wait(&tables.full_b[stage.index], stage.parity);
    uint32_t const from_a = ring + stage.index * S::stage_bytes + group * S::run_bytes,
                   from_b = ring + stage.index * S::stage_bytes + S::steps * S::a_bytes;
#pragma unroll
    for (int t = 0; t < S::steps; ++t) {
      if (step + t >= count) break;
      ptx::wgmma_fence_operand(acc);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        ptx::wgmma_mma_async<T, true, true>(acc, at_address(layout, from_a + t * S::a_bytes + k * 2 * kCoreBytes),
                                            at_address(layout, from_b + t * S::b_bytes + k * 2 * kCoreBytes));
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(acc);
      if (t == 0 && lane == 0 && before >= 0) ptx::mbarrier_arrive(&tables.empty[before]);
    }
    before = stage.index;
  }
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_fence_operand(acc);

  auto store = [&](float const* sum, int j) {
    sums_store<T, TM, TN>(p, sum, int(blockIdx.y), n_tile, tap, int(threadIdx.x), j);
  };
  if (clusters) {
    ptx::barrier_cluster_arrive();
    lean_add_parts<units, S::multiplying>(p, ring, tables, part, acc, store);
  } else if (p.parts > 1) {
    int64_t const tile = (int64_t(part) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    float4* const to = static_cast<float4*>(p.workspace) + tile * (units * S::multiplying) + threadIdx.x;
#pragma unroll
    for (int j = 0; j < units; ++j)
      to[j * S::multiplying] = make_float4(acc[j * 4], acc[j * 4 + 1], acc[j * 4 + 2], acc[j * 4 + 3]);
  } else {
#pragma unroll
    for (int j = 0; j < units; ++j) store(acc + j * 4, j);
  }
}

// Adds the parts of the tiles, as parts_sum has them: what a thread of sums_kernel has of 8 columns is a warp's lane's.
template <class T, int TM, int TN>
__global__ void __launch_bounds__(kPartsWarps * 32)
    sums_reduce(__grid_constant__ SumsParams const p, int items, int slices) {
  constexpr int multiplying = TM / 64 * kWarpgroup, units = TN / 8;
  int const item = parts_item(slices);
  float4 const sum = parts_sum(static_cast<float4 const*>(p.workspace) + item, items, p.parts, slices);
  if (parts_slice(slices) > 0) return;
  int const in_row = p.tiles_n * p.taps;
  int const thread = item % multiplying, j = item / multiplying % units, tile = item / (multiplying * units);
  int n_tile = tile % in_row;
  int const tap = p.tiles_n.divide(n_tile);
  float const v[4] = {sum.x, sum.y, sum.z, sum.w};
  sums_store<T, TM, TN>(p, v, tile / in_row, n_tile, tap, thread, j);
}

template <DType dtype, int TM, int TN>
cudaError_t launch_sums(Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  using S = LeanShapeOf<T, TM, TN, kLineBytes>;
  SumsCut const cut = sums_estimate(row_of(plan), p).cut;
  Walk const h = walk_h(Op::wgrad, p, 0), w = walk_w(Op::wgrad, p, 0);
  int64_t const taps = h.taps * w.taps;
  SumsParams q{};
  q.columns = Divisor(w.pixels), q.rows = Divisor(h.pixels);
  q.taps_w = Divisor(w.taps), q.taps = Divisor(taps);
  q.M = int32_t(p.K), q.N = int32_t(p.C);
  q.tiles_n = Divisor(ceil_div(q.N, TN));
  q.steps = int32_t(ceil_div(p.N * h.pixels * w.pixels, 64));
  q.splits = cut.splits, q.parts = cut.parts, q.once = reads_once(p);
  q.share = int32_t(ceil_div(q.steps, cut.parts)), q.per = int32_t(ceil_div(TN / 8, cut.splits));
  q.h0 = int32_t(h.lower), q.w0 = int32_t(w.lower);
  q.stride_h = int32_t(h.stride), q.stride_w = int32_t(w.stride);
  q.tap_h = int32_t(h.tap_stride), q.tap_w = int32_t(w.tap_stride);
  lean_stores(q, p, p.w, p.w_align);
  q.out = args.out, q.workspace = args.workspace;
  Tensor4 const y{args.b, dtype, {lean_channels(p.K, p.y, dtype), p.Q(), p.P(), p.N}, {1, p.y.w, p.y.h, p.y.n}};
  Tensor4 const x{args.a, dtype, {lean_channels(p.C, p.x, dtype), p.W, p.H, p.N}, {1, p.x.w, p.x.h, p.x.n}};
  cudaError_t error = encode_im2col(q.a, y, Walk{p.P(), 1}, Walk{p.Q(), 1}, 64, 64);
  if (error != cudaSuccess) return error;
  if ((error = encode_im2col(q.b, x, h, w, 64, 64)) != cudaSuccess) return error;
  int64_t const tiles_n = q.tiles_n.value * taps, tiles_m = ceil_div(q.M, TM), tiles = tiles_n * tiles_m;
  error = start_lean<S>(sums_kernel<T, TM, TN>, q, tiles_n, tiles_m, stream, S::threads, cut.parts / cut.splits, true);
  if (error != cudaSuccess || !cut.second_pass()) return error;
  int const items = int(tiles * (TN / 8) * S::multiplying);
  PartsLaunch const launch(items, cut.parts);
  return launch_dependent(sums_reduce<T, TM, TN>, launch.grid, launch.threads, launch.shared_bytes, stream, q, items,
                          launch.slices);
}

}  // namespace conv2d_ext::tma

#define CONV2D_EXT_TMA_SUMS_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                  \
    return tma::launch_sums<DType::dtype, tm, tn>(p, plan, args, stream);    \
  }
