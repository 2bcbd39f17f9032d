// wgrad of groups of 8 to 64 channels in channels_last, 16-bit types, in one launch: the halo tile of tma_wgrad.cuh,
// 64 filters by three taps of a row of the filter of 64 channels (of neighbouring groups, if they have fewer), alone on
// its block. Blocks that share a tile's pixels are a cluster: each adds some columns of it. The others write theirs into
// its ring, of what their own groups have alone, once nobody in the cluster reads that any more, and it adds all in
// their order.
#pragma once

#include "../core/grouped_parts.h"
#include "tma_lean.cuh"
#include "tma_wgrad_trial.cuh"

namespace conv2d_ext::tma {

template <int stride>
struct PartsShape {
  static constexpr int multiplying = kWarpgroup, threads = multiplying + 2 * 32, steps = 1;
  static constexpr int columns = kTaps * 64, units = columns / 8;
  static constexpr int x_bytes = (kPixels + kHalo) * kLineBytes, y_at = stride * x_bytes;
  static constexpr int stage_bytes = y_at + kRunBytes;
};

struct GroupPartsParams : WgradParams {
  Divisor row_columns, rows;   // of y, with padded columns
  int32_t share, splits, per;  // steps of a block; blocks of a cluster; blocks of 8 columns that one adds
  Images images;
};

// The steps of one of the two copying threads.
template <int stride, bool of_y>
struct GroupPartsCopies {
  using S = PartsShape<stride>;
  int32_t left, step, c, offset_h, offset_w;
  uint32_t to;
  Stage stage;

  __device__ void begin(GroupPartsParams const& p, uint32_t ring, int begin, int count) {
    left = count, step = begin;
    WgradRun<Variant::halo> const run(p, int(blockIdx.x));
    offset_h = run.r * p.dilation_h, offset_w = run.s * p.dilation_w;
    c = int(blockIdx.y) * (of_y ? p.K : p.C), to = ring + (of_y ? S::y_at : 0);
  }
  __device__ void copy_stage(GroupPartsParams const& p, LeanTables& tables) {
    uint32_t const full = ptx::shared_address(of_y ? &tables.full_a[stage.index] : &tables.full_b[stage.index]);
    ptx::mbarrier_arrive_expect_tx(full, of_y ? kRunBytes : stride * p.copy_bytes);
    int w = step * kPixels, h = p.row_columns.divide(w);
    int const image = p.rows.divide(h);
    uint32_t const at = to + stage.index * S::stage_bytes;
    if constexpr (of_y) {
      ptx::cp_async_bulk_tensor_im2col(at, &p.y, full, c, w, h, image, 0, 0);
    } else {
      h = p.h0 + h * p.stride_h, w = p.w0 + w * p.stride_w;
#pragma unroll
      for (int i = 0; i < stride; ++i)
        ptx::cp_async_bulk_tensor_im2col(at + i * S::x_bytes, &p.x, full, c, w, h, image, offset_w + i * p.dilation_w,
                                         offset_h);
    }
    ++step, --left;
  }
  __device__ void first_trip(GroupPartsParams const& p, LeanTables& tables) {
#pragma unroll 1
    for (int i = 0; i < p.stages; ++i) {
      ptx::mbarrier_init(of_y ? &tables.full_a[i] : &tables.full_b[i], 1);
      ptx::fence_mbarrier_init();
      stage.index = i;
      if (left > 0) copy_stage(p, tables);
    }
    stage.index = 0;
  }
  __device__ void other_trips(GroupPartsParams const& p, LeanTables& tables) {
#pragma unroll 1
    for (; left > 0; stage.advance(p.stages)) {
      ptx::mbarrier_wait(&tables.empty[stage.index], stage.parity);
      copy_stage(p, tables);
    }
  }
};

// The warps' 16 filters that meet 8 channels of the 64, a bit each: warp * 8 + channel / 8.
__device__ inline uint32_t parts_met(GroupPartsParams const& p, int filters_end) {
  int const lane = int(threadIdx.x) % 32, k = lane / 8 * 16, c = lane % 8 * 8;
  return __ballot_sync(0xffffffff, k < filters_end && c < p.C && p.own.meets(k, 16, c, 8));
}

template <class T, int stride>
__device__ void parts_multiply(GroupPartsParams const& p, uint32_t ring, LeanTables& tables, int count, float (&acc)[96]) {
  using S = PartsShape<stride>;
  int const lane = int(threadIdx.x) % 32;
  uint32_t const distance = p.dilation_w * kLineBytes;
#pragma unroll
  for (int i = 0; i < 96; ++i) acc[i] = 0;
  Stage stage;
  int before = -1;
#pragma unroll 1
  for (int step = 0; step < count; ++step, stage.advance(p.stages)) {
    ptx::mbarrier_wait(&tables.full_a[stage.index], stage.parity);
    ptx::mbarrier_wait(&tables.full_b[stage.index], stage.parity);
    uint32_t const from = ring + stage.index * S::stage_bytes;
    ptx::wgmma_fence_operand(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kPixels / 16; ++k) {
      uint64_t const a = ptx::wgmma_descriptor(from + S::y_at + k * 2 * kCoreBytes, kRunBytes, kCoreBytes);
      auto b = [&](int copy) {
        return ptx::wgmma_descriptor(from + copy * S::x_bytes + k * 2 * kCoreBytes, distance, kCoreBytes);
      };
      if constexpr (stride == 1) {
        ptx::wgmma_mma_async<T, true, true>(acc, a, b(0));
      } else {
        ptx::wgmma_mma_async<T, true, true>(reinterpret_cast<float (&)[64]>(acc), a, b(0));
        ptx::wgmma_mma_async<T, true, true>(reinterpret_cast<float (&)[32]>(acc[64]), a, b(1));
      }
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_fence_operand(acc);
    if (lane == 0 && before >= 0) ptx::mbarrier_arrive(&tables.empty[before]);
    before = stage.index;
  }
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_fence_operand(acc);
}

// Stores a warp's sums of 8 columns: rows lane / 4 and lane / 4 + 8 of its 16 filters, two channels each.
template <class T>
__device__ void parts_store(GroupPartsParams const& p, float const (&sum)[4], int column, int filters_end) {
  int const lane = int(threadIdx.x) % 32, group = int(blockIdx.y);
  WgradRun<Variant::halo> const at(p, int(blockIdx.x), column);
  if (at.s >= p.S) return;
  int const k = int(threadIdx.x) / 32 * 16;
  auto filter_of = [&](int lane, int i) { return k + lane / 4 + i / 2 * 8; };
  auto channel_of = [&](int lane, int i) { return at.c + lane % 4 * 2 + i % 2; };
  auto exists = [&](int i) {
    int const filter = filter_of(lane, i), channel = channel_of(lane, i);
    return filter < filters_end && channel < p.C && p.own.has(filter, channel);
  };
  float values[4] = {sum[0], sum[1], sum[2], sum[3]};
  wgrad_mend<T>(p, p.images, values, at.r, at.s, exists, [&](int lane, int i) { return group * p.K + filter_of(lane, i); },
                [&](int lane, int i) { return group * p.C + channel_of(lane, i); });
  T* const out = static_cast<T*>(p.out) + at.r * p.out_r + at.s * p.out_s;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    if (!exists(i)) continue;
    int const filter = filter_of(lane, i), channel = channel_of(lane, i) - p.own.first(filter);
    wgrad_store_pair<T>(p, out + (int64_t(group) * p.K + filter) * p.out_k + channel * p.out_c,
                        WgradPair<T>::of(values[i], values[i + 1]), exists(i + 1));
  }
}

template <class T, int stride>
__global__ void __launch_bounds__(PartsShape<stride>::threads, 2)
    group_parts_kernel(__grid_constant__ GroupPartsParams const p) {
  using S = PartsShape<stride>;
  extern __shared__ uint8_t dynamic[];
  __shared__ LeanTables tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int const rank = int(blockIdx.z), begin = rank * p.share, count = max(min(p.share, p.steps - begin), 0);
  int const warp = warp_uniform(int(threadIdx.x) / 32), copier = warp - S::multiplying / 32;
  int const filters_end = p.own.filters(int(blockIdx.y), p.K), first = rank * p.per, last = min(first + p.per, S::units);
  GroupPartsCopies<stride, true> copies_y;
  GroupPartsCopies<stride, false> copies_x;
  uint32_t met = 0;
  if (copier == 0) {
    if (ptx::elect()) {
      ptx::griddepcontrol_wait();
      copies_y.begin(p, ring, begin, count);
      copies_y.first_trip(p, tables);
    }
  } else if (copier == 1) {
    if (ptx::elect()) {
      ptx::griddepcontrol_wait();
      copies_x.begin(p, ring, begin, count);
      copies_x.first_trip(p, tables);
    }
  } else {
    met = parts_met(p, filters_end);
    if (warp == 0 && ptx::elect()) {
      for (int i = 0; i < p.stages; ++i) ptx::mbarrier_init(&tables.empty[i], S::multiplying / 32);
      ptx::mbarrier_init(&tables.parts, 1);
      ptx::fence_mbarrier_init();
      int mine = 0;  // pairs of a warp and 8 columns
      for (int j = first; j < last; ++j) mine += __popc(met & 0x01010101u << j % 8);
      ptx::mbarrier_arrive_expect_tx(&tables.parts, p.splits * mine * 32 * 16);
    }
  }
  __syncwarp();
  __syncthreads();
  if (copier >= 0) {
    if (ptx::elect()) {
      if (copier == 0) {
        copies_y.other_trips(p, tables);
        ptx::griddepcontrol_launch_dependents();
      } else {
        copies_x.other_trips(p, tables);
      }
    }
    __syncwarp();
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
    return;
  }
  ptx::griddepcontrol_wait();
  float acc[96];
  parts_multiply<T, stride>(p, ring, tables, count, acc);
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
  met >>= warp * 8;
  uint32_t const mine = ring + int(threadIdx.x) * 16, bar = ptx::shared_address(&tables.parts);
  int const unit_bytes = S::multiplying * 16, part_bytes = p.per * unit_bytes;
  int to = 0, its = 0;
#pragma unroll
  for (int j = 0; j < S::units; ++j, ++its) {
    if (its == p.per) its = 0, ++to;
    if (met >> j % 8 & 1)
      ptx::st_async_v4(ptx::mapa(mine + rank * part_bytes + its * unit_bytes, to), acc + j * 4, ptx::mapa(bar, to));
  }
  ptx::mbarrier_wait_cluster(bar, 0);
#pragma unroll 1
  for (int j = first; j < last; ++j) {
    if ((met >> j % 8 & 1) == 0) continue;
    float sum[4] = {};
    uint32_t from = mine + (j - first) * unit_bytes;
#pragma unroll 4
    for (int s = 0; s < p.splits; ++s, from += part_bytes) {
      uint4 const v = ptx::ld_shared_v4(from);
      sum[0] += __uint_as_float(v.x), sum[1] += __uint_as_float(v.y), sum[2] += __uint_as_float(v.z),
          sum[3] += __uint_as_float(v.w);
    }
    parts_store<T>(p, sum, j * 8, filters_end);
  }
}

template <DType dtype, int stride>
cudaError_t launch_group_parts(Problem const& given, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  using S = PartsShape<stride>;
  GroupParts const g = group_parts(row_of(plan), given);
  GroupPartsParams p{};
  cudaError_t const error = encode_wgrad<dtype>(p, given, g.problem, g.tiles, args, true, 64);
  if (error != cudaSuccess) return error;
  p.images = images_of(g.problem, args);
  p.row_columns = Divisor(p.columns), p.rows = Divisor(p.P);
  p.splits = g.parts;
  if (char const* e = getenv("GRP_PARTS")) p.splits = atoi(e);
  p.share = int32_t(ceil_div(p.steps, p.splits)), p.per = int32_t(ceil_div(S::units, p.splits));
  return start_lean<S>(group_parts_kernel<T, stride>, p, p.runs, p.groups, stream, S::threads, 1, true);
}

}  // namespace conv2d_ext::tma

#define CONV2D_EXT_GROUPED_PARTS_INSTANCE(family, op, dtype, tm, tn, tk, variant)                             \
  namespace conv2d_ext {                                                                                      \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const& plan,           \
                                                                Arguments const& args, cudaStream_t stream) { \
    return p.stride_w == 2 ? tma::launch_group_parts<DType::dtype, 2>(p, plan, args, stream)                  \
                           : tma::launch_group_parts<DType::dtype, 1>(p, plan, args, stream);                 \
  }                                                                                                           \
  }
