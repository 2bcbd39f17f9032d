// 1x1 filters in channels_last without gaps, any number of channels, f16 and bf16: fprop y[pixel, k] = sum over c of
// x[pixel, c] * w[k, c], dgrad x[pixel, c] = sum over k of y[pixel, k] * w[k, c]. The tensors lie there as matrices
// whose rows need not begin at vectors, so that neither tensor maps nor vectors of channels can read them.
//
// A persistent block keeps all filters in shared memory. Each of its warpgroups walks over tiles of 64 pixels by
// itself:
// - a thread has the copy engine bring the tile's bytes as they lie, in a ring of stages;
// - the threads put each 16 bytes of a row's channels, out of two neighbouring vectors, where wgmma wants them: lines
// of
//   64 channels, swizzled, zeros behind the last channel;
// - wgmma multiplies them by all filters;
// - the sums, with the bias, are put together as they will lie in memory, and stored by the copy engine.
// The warpgroups' copies, products and stores hide each other. Filters come the same way first, each warpgroup's share
// of their rows: of fprop K-major, of dgrad N-major.
#pragma once

#include "../core/pixel_lines.h"
#include "fragments.cuh"
#include "launch.h"
#include "window.cuh"

namespace conv2d_ext::pixel_lines {

constexpr int TM = kLinesPixels;
constexpr int kChunkBytes = TM * kLineBytes;  // 64 channels of a tile

struct Params {
  void const* in;
  void const* w;
  void const* bias;  // may be null
  void* out;
  int64_t bias_stride, pixels;
  int32_t depth, columns, w_rows, w_columns;  // w as it lies: of fprop columns x depth, of dgrad depth x columns
  int32_t tiles, slab_rows;                   // slab: of w, what a warpgroup takes at once
  int32_t stages, stage_bytes, group_bytes, tile_bytes, out_bytes, filter_bytes;
  int32_t filter_plane;  // bytes from 64 columns of w as it lies to the next, in shared memory
};

template <int TN>
struct Shape {
  static constexpr int most_groups = 4;
  static constexpr int threads = most_groups * kWarpgroup;
};

template <int TN>
struct Tables {
  uint64_t full[Shape<TN>::most_groups][kLinesMostStages];
  float bias[TN];
};

// What a warpgroup copies: first its slabs of the filters, then its tiles.
struct Items {
  int slabs, first_tile, step_tile, count;

  __device__ Items(Params const& p, int group, int groups) {
    int const all = (p.w_rows + p.slab_rows - 1) / p.slab_rows;
    slabs = (all - group + groups - 1) / groups;
    first_tile = int(blockIdx.x) * groups + group, step_tile = int(gridDim.x) * groups;
    count = slabs + (first_tile < p.tiles ? (p.tiles - first_tile + step_tile - 1) / step_tile : 0);
  }
};

// Rows as they lie in memory.
struct Rows {
  uint8_t const* from;
  int count, bytes;

  __device__ Rows(void const* tensor, int64_t first, int64_t all, int length, int most = TM) {
    from = static_cast<uint8_t const*>(tensor) + first * length * 2;
    count = int(min(all - first, int64_t(most)));
    bytes = count * length * 2;
  }
  // The copy engine moves multiples of 16 bytes.
  __device__ int by_engine() const { return bytes & ~15; }
};

// Where a thread begins among the vectors of rows, and how it goes on.
struct Vectors {
  int length, count, row, vector, step_row, step_vector;

  // pairs: up to a whole instruction's channels, else up to a whole vector's.
  __device__ Vectors(int length, bool pairs) : length(length) {
    count = pairs ? (length + 15) / 16 * 2 : (length + 7) / 8;
    int const thread = int(threadIdx.x) % kWarpgroup;
    row = thread / count, vector = thread % count;
    step_row = kWarpgroup / count, step_vector = kWarpgroup % count;
  }
};

// Puts `all` rows of channels where wgmma wants them; zeros behind the last channel and for rows that are not there.
__device__ inline void repack(uint32_t from, uint32_t to, Vectors const& of, int rows, int all, int plane) {
  int r = of.row, v = of.vector;
  bool const whole = of.length % 8 == 0;
#pragma unroll 4
  for (; r < all;) {
    uint32_t const byte = uint32_t(r * of.length + v * 8) * 2, at = from + (byte & ~15u);
    uint4 moved = ptx::ld_shared_v4(at);
    if (!whole) moved = window(moved, ptx::ld_shared_v4(at + 16), byte & 15);
    moved = first_bytes(moved, r < rows ? (of.length - v * 8) * 2 : 0);
    ptx::st_shared_v4(to + (v >> 3) * plane + r * kLineBytes + (((v & 7) ^ (r & 7)) << 4), moved);
    r += of.step_row, v += of.step_vector;
    if (v >= of.count) v -= of.count, ++r;
  }
}

template <class T, int TN, bool forward>
__global__ void __launch_bounds__(Shape<TN>::threads, 1) kernel(__grid_constant__ Params const p) {
  extern __shared__ uint8_t dynamic[];
  __shared__ Tables<TN> tables;
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), groups = int(blockDim.x) / kWarpgroup;
  int const thread = int(threadIdx.x) % kWarpgroup;
  uint32_t const filters = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  uint32_t const tile = filters + p.filter_bytes + group * p.group_bytes, out = tile + p.tile_bytes,
                 ring = out + p.out_bytes;
  uint64_t* const full = tables.full[group];
  if (thread == 0) {
    for (int i = 0; i < p.stages; ++i) ptx::mbarrier_init(&full[i], 1);
    ptx::fence_mbarrier_init();
  }
  for (int i = int(threadIdx.x); i < TN; i += int(blockDim.x))
    tables.bias[i] = p.bias != nullptr && i < p.columns ? widen(static_cast<T const*>(p.bias)[i * p.bias_stride]) : 0.f;
  __syncthreads();

  Items const items(p, group, groups);
  auto rows_of = [&](int item) {
    return item < items.slabs
               ? Rows(p.w, int64_t(group + item * groups) * p.slab_rows, p.w_rows, p.w_columns, p.slab_rows)
               : Rows(p.in, (items.first_tile + int64_t(item - items.slabs) * items.step_tile) * TM, p.pixels, p.depth);
  };
  auto copy = [&](int item, int stage) {  // one thread
    if (item >= items.count) return;
    Rows const rows = rows_of(item);
    int const bytes = rows.by_engine();
    ptx::mbarrier_arrive_expect_tx(&full[stage], bytes);
    if (bytes > 0) ptx::cp_async_bulk(ring + stage * p.stage_bytes, rows.from, bytes, &full[stage]);
  };
  if (thread == 0)
    for (int i = 0; i < p.stages; ++i) copy(i, i);

  Stage stage;
  // Waits for an item and puts it to `to`.
  auto take = [&](int item, uint32_t to, Vectors const& of, int all, int plane) {
    Rows const rows = rows_of(item);
    uint32_t const from = ring + stage.index * p.stage_bytes;
    ptx::mbarrier_wait(&full[stage.index], stage.parity);
    int const rest = (rows.bytes - rows.by_engine()) / 2;
    if (thread < rest) {
      int const at = rows.by_engine() + thread * 2;
      ptx::st_shared_u16(from + at, *reinterpret_cast<uint16_t const*>(rows.from + at));
    }
    ptx::bar_sync(1 + group, kWarpgroup);  // and the tensor cores have read the tile before
    repack(from, to, of, rows.count, all, plane);
    ptx::fence_proxy_async();
    ptx::bar_sync(1 + group, kWarpgroup);
    if (thread == 0) copy(item + p.stages, stage.index);
    stage.advance(p.stages);
  };
  int item = 0;
  Vectors const of_filters(p.w_columns, forward), of_pixels(p.depth, true);
  for (; item < items.slabs; ++item) {
    int const first = (group + item * groups) * p.slab_rows, left = p.filter_plane / kLineBytes - first;
    take(item, filters + first * kLineBytes, of_filters, min(p.slab_rows, left), p.filter_plane);
  }
  __syncthreads();  // all filters are there

  uint64_t const layout = ptx::wgmma_descriptor(0, 0, kCoreBytes),
                 layout_b = forward ? layout : ptx::wgmma_descriptor(0, p.filter_plane, kCoreBytes);
  auto at_address = [](uint64_t layout, uint32_t shared) { return layout | (shared & 0x3FFFF) >> 4; };
  int const steps = (p.depth + 15) / 16, warp = thread / 32, lane = thread % 32;
  for (; item < items.count; ++item) {
    take(item, tile, of_pixels, TM, kChunkBytes);
    float acc[TN / 2] = {};
    ptx::wgmma_fence_operand(acc);
    ptx::wgmma_fence();
#pragma unroll 1
    for (int k = 0; k < steps; ++k) {
      uint32_t const a = tile + (k >> 2) * kChunkBytes + (k & 3) * 32;
      uint32_t const b = filters + (forward ? (k >> 2) * p.filter_plane + (k & 3) * 32 : k * 2 * kCoreBytes);
      ptx::wgmma_mma_async<T, false, !forward>(acc, at_address(layout, a), at_address(layout_b, b));
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
    if (thread == 0) ptx::cp_async_bulk_wait_group_read<0>();  // the results before
    ptx::bar_sync(1 + group, kWarpgroup);

    int const N = p.columns, row = warp * 16 + lane / 4;
    bool const even = N % 2 == 0;
#pragma unroll
    for (int j = 0; j < TN / 8; ++j) {
      int const n = j * 8 + lane % 4 * 2;
      if (n >= N) break;
      float const first = tables.bias[n], second = tables.bias[n + 1];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t const to = out + uint32_t((row + half * 8) * N + n) * 2;
        uint32_t const both = pack<T>(acc[j * 4 + half * 2] + first, acc[j * 4 + half * 2 + 1] + second);
        if (even) {
          ptx::st_shared(to, both);
        } else {
          ptx::st_shared_u16(to, uint16_t(both));
          if (n + 1 < N) ptx::st_shared_u16(to + 2, uint16_t(both >> 16));
        }
      }
    }
    ptx::fence_proxy_async();
    ptx::bar_sync(1 + group, kWarpgroup);
    Rows const rows(p.out, (items.first_tile + int64_t(item - items.slabs) * items.step_tile) * TM, p.pixels, N);
    uint8_t* const to = const_cast<uint8_t*>(rows.from);
    if (thread == 0 && rows.by_engine() > 0) {
      ptx::cp_async_bulk_store(to, out, rows.by_engine());
      ptx::cp_async_bulk_commit_group();
    }
    int const at = rows.by_engine() + thread * 2;
    if (at < rows.bytes) *reinterpret_cast<uint16_t*>(to + at) = ptx::ld_shared_u16(out + at);
  }
  if (thread == 0) ptx::cp_async_bulk_wait_group_read<0>();  // shared memory ends with the block
}

template <Op op, DType dtype, int TN>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool forward = op == Op::fprop;
  int sm_count = 0;
  cudaError_t error = count_sms(sm_count);
  if (error != cudaSuccess) return error;
  PixelLines const shape(row_of(plan), problem);
  Params p{};
  p.in = args.a, p.w = args.b, p.out = args.out;
  p.bias = args.bias, p.bias_stride = args.bias_stride;
  p.pixels = problem.N * problem.H * problem.W;
  p.depth = int32_t(shape.depth), p.columns = int32_t(shape.columns);
  p.w_rows = int32_t(problem.K), p.w_columns = int32_t(problem.C);
  p.tiles = int32_t(ceil_div(p.pixels, TM));
  p.stages = int32_t(shape.stages), p.stage_bytes = int32_t(shape.stage_bytes);
  p.group_bytes = int32_t(shape.group_bytes()), p.tile_bytes = int32_t(shape.tile_bytes);
  p.out_bytes = int32_t(shape.out_bytes), p.filter_bytes = int32_t(shape.filter_bytes);
  // A share of the rows for each warpgroup, in whole instructions' depths.
  p.slab_rows = int32_t(min64(ceil_div(ceil_div(p.w_rows, shape.groups), 16) * 16, 64));
  p.filter_plane = int32_t(forward ? max64(TN, 64) : shape.chunks * 64) * kLineBytes;
  int const bytes = int(1024 + shape.filter_bytes + shape.groups * shape.group_bytes());
  auto* const main_kernel = kernel<T, TN, forward>;
  if ((error = cudaFuncSetAttribute(main_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) != cudaSuccess)
    return error;
  int64_t const blocks = min64(sm_count, ceil_div(p.tiles, shape.groups));
  main_kernel<<<unsigned(blocks), unsigned(shape.groups * kWarpgroup), bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::pixel_lines

#define CONV2D_EXT_PIXEL_LINES_INSTANCE(family, op, dtype, tm, tn, tk, variant)  \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                      \
    return pixel_lines::launch<Op::op, DType::dtype, tn>(p, plan, args, stream); \
  }
