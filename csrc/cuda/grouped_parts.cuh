// wgrad of groups of 8 to 64 channels in channels_last, 16-bit types, in one launch: the halo tile of tma_wgrad.cuh, 64
// filters by three taps of a row of the filter by 64 channels (of neighbouring groups, where these have fewer).
//
// A block has a tile's products with a share of the pixels; the blocks of a tile are a cluster. A warp's units, 8
// columns that its filters have with their own groups, go round them: the others write theirs into the shared memory of
// the block that adds it, before its ring, or, where two blocks share an SM, into the ring once nobody in the cluster
// reads that any more. It adds all in their order. Two warps copy, x one and y the other, as in tma_lean.cuh.
#pragma once

#include "../core/grouped_parts.h"
#include "tma_lean.cuh"
#include "tma_wgrad.cuh"

namespace conv2d_ext::tma {

template <int stride>
struct PartsShape {
  static constexpr int multiplying = kWarpgroup, threads = multiplying + 2 * 32;
  static constexpr int columns = kTaps * 64, units = columns / 8;
  static constexpr int x_bytes = (kPixels + kHalo) * kLineBytes, y_at = stride * x_bytes;
  static constexpr int stage_bytes = y_at + kRunBytes;
};

struct GroupPartsParams : WgradParams {
  Divisor of_column;          // rows of the filter: blockIdx.x counts them for each three of its columns
  Divisor row_columns, rows;  // of y, padded ones included
  int32_t share, parts, per;  // steps of a block; blocks of a tile; units of a warp that one adds
  bool in_ring;               // is where sums arrive; else it lies behind that
  int32_t ring_at;
  Images images;
};

// The steps of one of the two copying threads. Both run the same instructions, as memory brings those after a flush.
template <int stride>
struct GroupPartsCopies {
  using S = PartsShape<stride>;
  CUtensorMap const* map;
  uint64_t* full;
  uint32_t to, bytes;  // of a stage
  int32_t left, step, c, h0, w0, step_h, step_w, offset_h, offset_w, copies;
  Stage stage;

  __device__ void begin(GroupPartsParams const& p, LeanTables& tables, bool of_y, uint32_t ring, int begin, int count) {
    left = count, step = begin;
    offset_h = int(blockIdx.x), offset_w = p.of_column.divide(offset_h) * kTaps * p.dilation_w;
    offset_h *= p.dilation_h;
    map = of_y ? &p.y : &p.x, full = of_y ? tables.full_a : tables.full_b;
    c = int(blockIdx.y) * (of_y ? p.K : p.C), to = ring + (of_y ? S::y_at : 0);
    h0 = w0 = 0, step_h = step_w = copies = 1, bytes = kRunBytes;
    if (of_y)
      offset_h = offset_w = 0;
    else
      h0 = p.h0, w0 = p.w0, step_h = p.stride_h, step_w = p.stride_w, copies = stride, bytes = stride * p.copy_bytes;
  }
  __device__ void copy_stage(GroupPartsParams const& p) {
    uint32_t const bar = ptx::shared_address(full + stage.index), at = to + stage.index * S::stage_bytes;
    ptx::mbarrier_arrive_expect_tx(bar, bytes);
    int w = step * kPixels, h = p.row_columns.divide(w);
    int const image = p.rows.divide(h);
    h = h0 + h * step_h, w = w0 + w * step_w;
#pragma unroll
    for (int i = 0; i < stride; ++i)
      if (i < copies)
        ptx::cp_async_bulk_tensor_im2col(at + i * S::x_bytes, map, bar, c, w, h, image, offset_w + i * p.dilation_w,
                                         offset_h);
    ++step, --left;
  }
  // Before the barriers are known to others: the first trip round the ring.
  __device__ void first_trip(GroupPartsParams const& p) {
#pragma unroll 1
    for (; stage.index != p.stages; ++stage.index) {
      ptx::mbarrier_init(full + stage.index, 1);
      ptx::fence_mbarrier_init();
      if (left > 0) copy_stage(p);
    }
    stage.index = 0;
  }
  __device__ void other_trips(GroupPartsParams const& p, LeanTables& tables) {
#pragma unroll 1
    for (; left > 0; stage.advance(p.stages)) {
      ptx::mbarrier_wait(&tables.empty[stage.index], stage.parity);
      copy_stage(p);
    }
  }
};

// What a thread stores of 8 columns: two channels of each of two filters, rows lane / 4 and lane / 4 + 8 of its warp's
// 16. out: the first of them, of the first tap. own: a bit for each 8 of the 64 channels that are the filter's.
template <class T, int stride>
struct PartsOutputs {
  T* out[2];
  uint32_t own[2];
  int r, s;

  __device__ void begin(GroupPartsParams const& p, int filters_end) {
    int const lane = int(threadIdx.x) % 32, channels = p.own.C == 0 ? p.C : p.own.C;
    r = int(blockIdx.x), s = p.of_column.divide(r) * kTaps;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const k = int(threadIdx.x) / 32 * 16 + lane / 4 + i * 8, first = p.own.first(k) - lane % 4 * 2;
      out[i] = static_cast<T*>(p.out) + r * p.out_r + s * p.out_s + (int64_t(blockIdx.y) * p.K + k) * p.out_k -
               first * p.out_c;
      own[i] = 0;
#pragma unroll
      for (int c = 0; c < 8; ++c)
        own[i] |= uint32_t(k < filters_end && unsigned(c * 8 - first) < unsigned(channels)) << c;
    }
  }
  // A bit for each 8 channels of some filter of the warp; these are neighbours.
  __device__ uint32_t met() const { return __reduce_or_sync(0xffffffff, own[0] | own[1]); }

  // Channels 8 c and further of a tap of the tile. Sums that are NaN are made once more.
  template <bool again>
  __device__ bool store(GroupPartsParams const& p, float4 sum, int part, int c) const {
    int const tap = stride == 1 ? part : part * 2 % kTaps;  // stride 2: taps 0, 2, 1
    if (s + tap >= p.S) return false;
    if constexpr (again) {
      float values[4] = {sum.x, sum.y, sum.z, sum.w};
      int const group = int(blockIdx.y), k = group * p.K + int(threadIdx.x) / 32 * 16, channel = group * p.C + c * 8;
      wgrad_mend<T>(
          p, p.images, values, r, s + tap, [&](int i) { return (own[i / 2] >> c & 1) != 0; },
          [&](int lane, int i) { return k + lane / 4 + i / 2 * 8; },
          [&](int lane, int i) { return channel + lane % 4 * 2 + i % 2; });
      sum = make_float4(values[0], values[1], values[2], values[3]);
    }
    int64_t const at = tap * p.out_s + c * 8 * p.out_c;
    if (own[0] >> c & 1) wgrad_store_pair<T>(p, out[0] + at, WgradPair<T>::of(sum.x, sum.y), true);
    if (own[1] >> c & 1) wgrad_store_pair<T>(p, out[1] + at, WgradPair<T>::of(sum.z, sum.w), true);
    float const all = sum.x + sum.y + sum.z + sum.w;
    return all != all;
  }
};

template <class T, int stride>
__device__ __forceinline__ void parts_multiply(GroupPartsParams const& p, uint32_t ring, LeanTables& tables, int count,
                                               float (&acc)[96]) {
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

// Adds a warp's units in the order of the blocks, two at a time, and stores them. Is a sum NaN?
template <bool again, class T, int stride>
__device__ __forceinline__ bool parts_store(GroupPartsParams const& p, uint32_t mine, int rank, int units, uint32_t met,
                                            PartsOutputs<T, stride> const& outputs) {
  constexpr int unit_bytes = PartsShape<stride>::multiplying * 16, together = again ? 1 : 2, first_parts = 4;
  int const part_bytes = p.per * unit_bytes, first = __ffs(int(met)) - 1, count = __popc(met);
  bool nan = false;
#pragma unroll 1
  for (int unit = 0, tap = 0, c = rank; unit < units; unit += together) {
    float4 sum[together] = {};
    auto add = [&](int from, int to) {
      float4 v[kMostParts][together];
#pragma unroll
      for (int i = from; i < to; ++i)
#pragma unroll
        for (int u = 0; u < together; ++u) {
          v[i][u] = make_float4(0, 0, 0, 0);
          if (i >= p.parts) continue;
          uint4 const words = ptx::ld_shared_v4(mine + i * part_bytes + min(unit + u, units - 1) * unit_bytes);
          v[i][u] = make_float4(__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z),
                                __uint_as_float(words.w));
        }
#pragma unroll
      for (int i = from; i < to; ++i)
#pragma unroll
        for (int u = 0; u < together; ++u)
          sum[u].x += v[i][u].x, sum[u].y += v[i][u].y, sum[u].z += v[i][u].z, sum[u].w += v[i][u].w;
    };
    add(0, first_parts);
    if (p.parts > first_parts) add(first_parts, kMostParts);
#pragma unroll
    for (int u = 0; u < together; ++u, c += p.parts) {
      for (; c >= count; c -= count) ++tap;
      if (unit + u < units) nan |= outputs.template store<again>(p, sum[u], tap, first + c);
    }
  }
  return __any_sync(0xffffffff, nan);
}

// Not inlined, lest it lie between what every tile runs.
template <class T, int stride>
__device__ __noinline__ void parts_mend(GroupPartsParams const& p, uint32_t mine, int rank, int units, uint32_t met,
                                        PartsOutputs<T, stride> const outputs) {
  parts_store<true>(p, mine, rank, units, met, outputs);
}

// Adds what the cluster's blocks have of this one's units, and stores it.
template <class T, int stride>
__device__ __forceinline__ void parts_add(GroupPartsParams const& p, uint32_t room, LeanTables& tables, int rank,
                                          int units, uint32_t met, PartsOutputs<T, stride> const& outputs,
                                          float const (&acc)[96]) {
  using S = PartsShape<stride>;
  constexpr int unit_bytes = S::multiplying * 16;
  uint32_t const mine = room + int(threadIdx.x) * 16, bar = ptx::shared_address(&tables.parts);
  if (p.parts == 1) {
    ptx::bar_sync(1, S::multiplying);  // nobody reads the ring any more
  } else {
    if (p.in_ring) ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
  }
  uint32_t at = mine + rank * p.per * unit_bytes;
  int to = 0;
#pragma unroll
  for (int j = 0; j < S::units; ++j) {
    if ((met >> j % 8 & 1) == 0) continue;
    if (to == rank)
      ptx::st_shared_v4(at, make_uint4(__float_as_uint(acc[j * 4]), __float_as_uint(acc[j * 4 + 1]),
                                       __float_as_uint(acc[j * 4 + 2]), __float_as_uint(acc[j * 4 + 3])));
    else
      ptx::st_async_v4(ptx::mapa(at, to), acc + j * 4, ptx::mapa(bar, to));
    if (++to == p.parts) to = 0, at += unit_bytes;
  }
  if (p.parts > 1) ptx::mbarrier_wait_cluster(bar, 0);
  if (parts_store<false>(p, mine, rank, units, met, outputs)) parts_mend<T, stride>(p, mine, rank, units, met, outputs);
}

template <class T, int stride>
__global__ void __launch_bounds__(PartsShape<stride>::threads, 2)
    group_parts_kernel(__grid_constant__ GroupPartsParams const p) {
  using S = PartsShape<stride>;
  extern __shared__ uint8_t dynamic[];
  __shared__ LeanTables tables;
  uint32_t const room = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024), ring = room + p.ring_at;
  int const rank = int(blockIdx.z), begin = rank * p.share, count = max(min(p.share, p.steps - begin), 0);
  int const warp = warp_uniform(int(threadIdx.x) / 32), copier = warp - S::multiplying / 32;
  bool const clusters = p.parts > 1;
  GroupPartsCopies<stride> copies;
  if (copier >= 0) {
    if (ptx::elect()) {
      ptx::griddepcontrol_wait();
      copies.begin(p, tables, copier == 0, ring, begin, count);
      copies.first_trip(p);
    }
    __syncwarp();
  } else if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < p.stages; ++i) ptx::mbarrier_init(&tables.empty[i], S::multiplying / 32);
    ptx::mbarrier_init(&tables.parts, S::multiplying / 32);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (clusters && !p.in_ring) ptx::barrier_cluster_arrive_relaxed();  // the barriers are there
  if (copier >= 0) {
    if (ptx::elect()) {
      copies.other_trips(p, tables);
      if (copier == 0) ptx::griddepcontrol_launch_dependents();
    }
    __syncwarp();
    if (clusters && p.in_ring) ptx::barrier_cluster_arrive();
    if (clusters) ptx::barrier_cluster_wait();
    return;
  }

  // While the first copies are under way.
  PartsOutputs<T, stride> outputs;
  outputs.begin(p, p.own.filters(int(blockIdx.y), p.K));
  uint32_t const met = outputs.met();
  int const units = (kTaps * __popc(met) + p.parts - 1 - rank) / p.parts;
  if (clusters && threadIdx.x % 32 == 0) ptx::mbarrier_arrive_expect_tx(&tables.parts, (p.parts - 1) * units * 32 * 16);
  __syncwarp();
  ptx::griddepcontrol_wait();
  float acc[96];
  parts_multiply<T, stride>(p, ring, tables, count, acc);
  parts_add<T, stride>(p, room, tables, rank, units, met, outputs, acc);
}

template <DType dtype, int stride>
cudaError_t launch_group_parts(Problem const& given, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  using S = PartsShape<stride>;
  GroupParts const g = group_parts(row_of(plan), given);
  GroupPartsParams p{};
  cudaError_t error = encode_wgrad<dtype>(p, given, g.problem, g.tiles, args, true, 64);
  if (error != cudaSuccess) return error;
  p.images = images_of(g.problem, args);
  p.of_column = Divisor(p.R), p.row_columns = Divisor(p.columns), p.rows = Divisor(p.P);
  p.parts = g.parts;
  p.share = int32_t(ceil_div(p.steps, p.parts)), p.per = int32_t(ceil_div(S::units, p.parts));
  int64_t const sent = int64_t(p.parts) * p.per * S::multiplying * 16;
  p.in_ring = p.parts == 1 || g.two;
  p.ring_at = p.in_ring ? 0 : int32_t(sent);
  int64_t const room = (g.two ? 110 : 222) * 1024 - p.ring_at;
  p.stages = int32_t(min64(min64(room / S::stage_bytes, kLeanStages), p.share));
  if (p.in_ring) p.stages = int32_t(max64(p.stages, ceil_div(sent, S::stage_bytes)));
  auto* const kernel = group_parts_kernel<T, stride>;
  if ((error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 224 * 1024)) != cudaSuccess)
    return error;
  dim3 const grid(unsigned(p.runs), unsigned(p.groups), unsigned(p.parts));
  return launch_clusters(kernel, dim3(1, 1, grid.z), grid, S::threads, p.ring_at + p.stages * S::stage_bytes + 1024,
                         stream, p);
}

}  // namespace conv2d_ext::tma

#define CONV2D_EXT_GROUPED_PARTS_INSTANCE(family, op, dtype, tm, tn, tk, variant)             \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                   \
    return p.stride_w == 2 ? tma::launch_group_parts<DType::dtype, 2>(p, plan, args, stream)  \
                           : tma::launch_group_parts<DType::dtype, 1>(p, plan, args, stream); \
  }
