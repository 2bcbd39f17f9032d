// 1x1 filters that all stay in shared memory: fprop, and dgrad with a stride of one, of layers that are bound by what
// they read and write. out[pixel, n] = sum over channels of A[pixel, channel] * B[n, channel].
//
// A persistent block copies the filters once (or, of very many, the same part in all of its tiles). Each of its
// multiplying warpgroups then has tiles of 64 pixels of its own, a ring of stages for them, and a warp that copies
// these. It multiplies 128 filters at a time, or 192, and its warps put 16 pixels by 128 bytes of results into pieces
// of shared memory, which the copy engine stores: many of them are under way at a time, and no warp waits for another.
// Of 16-bit types two pieces are stored by one instruction, 256 bytes of a pixel after the other, where all columns
// have them.
//
// Needs results whose pixels are the rows of a matrix.
#pragma once

#include "../core/matrix.h"
#include "../core/tma_resident.h"
#include "tma_wgrad.cuh"
#include "tma_wgrad_tf32.cuh"

namespace conv2d_ext::tma {

struct ResidentParams {
  CUtensorMap a, b, out;
  CUtensorMap a_last;     // pixels' last chunk, if `narrow`
  Divisor columns, rows;  // of an image of the result
  int32_t N;              // columns of the result
  int32_t tiles, tiles_n;
  int32_t block_n;       // columns of a block
  int32_t chunks, last;  // of the reduction; instructions of the last
  int32_t line;          // bytes of a chunk
  int32_t b_bytes;       // of a chunk of the block's filters
  int32_t stages;
  bool pairs;  // 16 pixels by 256 bytes are stored at a time
  bool narrow;
  int32_t h0, w0, stride_h, stride_w;
  void const* bias;
  int64_t bias_stride;
};

template <int groups>
struct ResidentThreads {
  static constexpr int multiplying = groups * kWarpgroup, all = multiplying + groups * 32;
};

template <class T, int groups>
struct ResidentTables {
  T bias[ResidentShape::most];
  uint64_t full[groups][kMaxStages], empty[groups][kMaxStages], filters;
};

template <class T, int TN, bool b_rows>
__device__ void resident_filters(ResidentParams const& p, uint32_t shared, uint32_t full, int n_tile) {
  int const chunk_size = p.line / int(sizeof(T)), first = n_tile * p.block_n, end = min(p.block_n, p.N - first);
  constexpr int box = b_rows ? 64 : TN;  // columns of a copy
  int const boxes = (end + box - 1) / box, bytes = b_rows ? chunk_size * kLineBytes : min(box, p.N) * p.line;
  ptx::mbarrier_arrive_expect_tx(full, p.chunks * boxes * bytes);
#pragma unroll 1
  for (int chunk = 0; chunk < p.chunks; ++chunk)
#pragma unroll 1
    for (int i = 0; i < boxes; ++i) {
      uint32_t const to = shared + chunk * p.b_bytes + i * box * p.line;
      if constexpr (b_rows)
        ptx::cp_async_bulk_tensor_5d(to, &p.b, full, first + i * box, 0, 0, chunk * chunk_size, 0);
      else
        ptx::cp_async_bulk_tensor_5d(to, &p.b, full, chunk * chunk_size, 0, 0, first + i * box, 0);
    }
}

template <class T>
__device__ void resident_pixels(ResidentParams const& p, uint32_t ring, uint64_t* full, uint64_t const* empty, int tile,
                                int step) {
  int const chunk_size = p.line / int(sizeof(T)), bytes = 64 * p.line;
  uint32_t const bar_full = ptx::shared_address(full), bar_empty = ptx::shared_address(empty);
  Stage at;
#pragma unroll 1
  for (; tile < p.tiles; tile += step) {
    int j = tile * 64, i = p.columns.divide(j);
    int const n = p.rows.divide(i), h = p.h0 + i * p.stride_h, w = p.w0 + j * p.stride_w;
#pragma unroll 1
    for (int chunk = 0; chunk < p.chunks; ++chunk, at.advance(p.stages)) {
      ptx::mbarrier_wait(bar_empty + at.index * 8, at.parity ^ 1);
      uint32_t const to = ring + at.index * bytes, bar = bar_full + at.index * 8;
      if (p.narrow && chunk == p.chunks - 1) {
        ptx::mbarrier_arrive_expect_tx(bar, 64 * 32 * p.last);
        ptx::cp_async_bulk_tensor_4d(to, &p.a_last, full + at.index, chunk * chunk_size, tile * 64, 0, 0);
      } else {
        ptx::mbarrier_arrive_expect_tx(bar, bytes);
        ptx::cp_async_bulk_tensor_im2col(to, &p.a, bar, chunk * chunk_size, w, h, n, 0, 0);
      }
    }
  }
}

// staging: the warp's pieces.
template <class T, int TN, bool b_rows, int pieces, int groups>
__device__ void resident_multiply(ResidentParams const& p, uint32_t filters, uint32_t ring, uint32_t staging,
                                  ResidentTables<T, groups>& tables, int group, int n_tile, int tile, int step) {
  constexpr int columns = kLineBytes / int(sizeof(T));
  constexpr uint32_t step_b = b_rows ? 2 * kCoreBytes : 32;
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32 % 4;
  uint64_t const lines = layout_of(p.line),
                 layout_b = b_rows ? ptx::wgmma_descriptor(0, 64 * p.line, kCoreBytes) : lines;
  uint32_t const full = warp_uniform(ptx::shared_address(tables.full[group])),
                 empty = warp_uniform(ptx::shared_address(tables.empty[group]));
  int const first = n_tile * p.block_n, end = min(p.block_n, p.N - first), bytes = 64 * p.line;
  bool const biased = p.bias != nullptr;
  Stage next;
  int slot = 0;
  uint64_t const policy = ptx::createpolicy_evict_unchanged();
  ptx::mbarrier_wait(&tables.filters, 0);
#pragma unroll 1
  for (; tile < p.tiles; tile += step) {
    Stage const begin = next;
#pragma unroll 1
    for (int n = 0; n < end; n += TN) {
      float acc[TN / 2];
#pragma unroll
      for (int i = 0; i < TN / 2; ++i) acc[i] = 0;
      next = begin;
      bool const last = n + TN >= end;
      int before = -1;
      uint32_t from_b = filters + n * p.line;
#pragma unroll 1
      for (int chunk = 0; chunk < p.chunks; ++chunk, next.advance(p.stages), from_b += p.b_bytes) {
        ptx::mbarrier_wait(full + next.index * 8, next.parity);
        uint32_t const from_a = ring + next.index * bytes;
        ptx::wgmma_fence_operand(acc);
        auto instruct = [&](auto count) {
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < decltype(count)::value; ++k)
            ptx::wgmma_mma_async<T, false, b_rows>(acc, at_address(lines, from_a + k * 32),
                                                   at_address(layout_b, from_b + k * step_b));
          ptx::wgmma_commit_group();
        };
        with_constant(chunk == p.chunks - 1 ? p.last : 4, instruct);
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_fence_operand(acc);
        if (last && lane == 0 && before >= 0) ptx::mbarrier_arrive(empty + before * 8);
        before = next.index;
      }
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(acc);
      if (last && lane == 0) ptx::mbarrier_arrive(empty + before * 8);
      if (biased) {
#pragma unroll
        for (int j = 0; j < TN / 8; ++j) {
          float const low = widen(tables.bias[n + j * 8 + lane % 4 * 2]),
                      high = widen(tables.bias[n + j * 8 + lane % 4 * 2 + 1]);
          acc[j * 4] += low, acc[j * 4 + 1] += high;
          acc[j * 4 + 2] += low, acc[j * 4 + 3] += high;
        }
      }
#pragma unroll
      for (int piece = 0; piece < TN / columns; ++piece) {
        if (n + piece * columns >= end) break;
        if constexpr (sizeof(T) == 2) {
          if (TN == 128 && p.pairs) {
            if (piece == 0) {
              if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();
              __syncwarp();
            }
            stage_piece<T, TN>(acc, piece, staging, 2, piece);  // a row's 128 columns are neighbours
            if (piece == 0) continue;
            ptx::fence_proxy_async();
            __syncwarp();
            if (lane != 0) continue;
            ptx::cp_async_bulk_tensor_4d_store(&p.out, staging, 0, (first + n) / columns, tile * 64 + warp * 16, 0,
                                               policy);
            ptx::cp_async_bulk_commit_group();
            continue;
          }
        }
        uint32_t const to = staging + slot * kPieceBytes;
        if (++slot == pieces) slot = 0;
        if (lane == 0) ptx::cp_async_bulk_wait_group_read<pieces - 1>();
        __syncwarp();
        stage_piece<T, TN>(acc, piece, to);
        ptx::fence_proxy_async();
        __syncwarp();
        if (lane != 0) continue;
        ptx::cp_async_bulk_tensor_4d_store(&p.out, to, first + n + piece * columns, tile * 64 + warp * 16, 0, 0,
                                           policy);
        ptx::cp_async_bulk_commit_group();
      }
    }
  }
  if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();  // shared memory ends with the block
}

template <class T, int TN, bool b_rows, int pieces, int groups>
__global__ void __launch_bounds__(ResidentThreads<groups>::all, 1)
    resident_kernel(__grid_constant__ ResidentParams const p) {
  using S = ResidentThreads<groups>;
  extern __shared__ uint8_t dynamic[];
  __shared__ ResidentTables<T, groups> tables;
  uint32_t const filters = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  uint32_t const rings = filters + p.chunks * p.b_bytes, staging = rings + groups * p.stages * 64 * p.line;
  int const warp = warp_uniform(int(threadIdx.x) / 32), copier = warp - S::multiplying / 32;
  int const n_tile = int(blockIdx.x) % p.tiles_n, block = int(blockIdx.x) / p.tiles_n;
  int const step = int(gridDim.x) / p.tiles_n * groups;
  if (copier >= 0 && ptx::elect()) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::mbarrier_init(&tables.full[copier][i], 1);
      ptx::mbarrier_init(&tables.empty[copier][i], 4);
    }
    if (copier == 0) ptx::mbarrier_init(&tables.filters, 1);
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
  ptx::griddepcontrol_wait();
  if (p.bias != nullptr)
    for (int i = int(threadIdx.x); i < p.block_n && i < ResidentShape::most; i += S::all) {
      int const n = n_tile * p.block_n + i;
      tables.bias[i] = n < p.N ? static_cast<T const*>(p.bias)[n * p.bias_stride] : narrow<T>(0.0f);
    }
  __syncthreads();
  if (copier >= 0) {
    if (!ptx::elect()) return;
    if (copier == 0) resident_filters<T, TN, b_rows>(p, filters, ptx::shared_address(&tables.filters), n_tile);
    resident_pixels<T>(p, rings + copier * p.stages * 64 * p.line, tables.full[copier], tables.empty[copier],
                       block * groups + copier, step);
    ptx::griddepcontrol_launch_dependents();
  } else {
    int const group = warp / 4;
    resident_multiply<T, TN, b_rows, pieces, groups>(p, filters, rings + group * p.stages * 64 * p.line,
                                                     staging + warp * pieces * kPieceBytes, tables, group, n_tile,
                                                     block * groups + group, step);
  }
}

template <Op op, DType dtype>
cudaError_t launch_resident(Problem const& p, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool forward = op == Op::fprop;
  ResidentShape const shape(op, p);
  Walk const h = walk_h(op, p, 0), w = walk_w(op, p, 0);
  int64_t const C = forward ? p.C : p.K, N = forward ? p.K : p.C;
  int64_t const in_H = forward ? p.H : p.P(), in_W = forward ? p.W : p.Q();
  Strides const &in = forward ? p.x : p.y, &out = forward ? p.y : p.x;
  int const chunk_size = shape.line / int(sizeof(T));
  ResidentParams q{};
  q.columns = Divisor(w.pixels), q.rows = Divisor(h.pixels);
  q.N = int32_t(N), q.tiles = int32_t(shape.tiles), q.tiles_n = int32_t(shape.tiles_n);
  q.block_n = int32_t(shape.block_n), q.chunks = int32_t(shape.chunks), q.line = shape.line;
  q.last = int32_t(ceil_div(C - (q.chunks - 1) * chunk_size, 32 / int64_t(sizeof(T))));
  q.b_bytes = int32_t(shape.block_n * shape.line), q.stages = int32_t(shape.stages);
  q.h0 = int32_t(h.lower), q.w0 = int32_t(w.lower);
  q.stride_h = int32_t(h.stride), q.stride_w = int32_t(w.stride);
  q.bias = args.bias, q.bias_stride = args.bias_stride;
  Tensor4 const pixels{args.a, p.dtype, {C, in_W, in_H, p.N}, {1, in.w, in.h, in.n}, sizeof(T) == 4};
  int64_t const row = w.pixels > 1 ? out.w : h.pixels > 1 ? out.h : p.N > 1 ? out.n : N;
  Tensor4 const rows{args.out, p.dtype, {N, p.N * h.pixels * w.pixels, 1, 1}, {1, row, 0, 0}};
  cudaError_t error;
  if ((error = encode_im2col(q.a, pixels, h, w, chunk_size, 64)) != cudaSuccess) return error;
  if ((error = encode_filters(q.b, args.b, p, forward ? chunk_size : 64,
                              forward ? int(min64(shape.columns, N)) : chunk_size, sizeof(T) == 4)) != cudaSuccess)
    return error;
  // The engine takes longer for boxes that reach beyond the pixels' channels.
  q.narrow = shape.line == kLineBytes && q.last < 4 && h.pixels == in_H && w.pixels == in_W && h.lower == 0 &&
             w.lower == 0 && h.stride * w.stride == 1 && matrix_stride(in, p) > 0;
  Tensor4 const matrix{args.a, p.dtype, {C, p.N * in_H * in_W, 1, 1}, {1, matrix_stride(in, p), 0, 0}, sizeof(T) == 4};
  if (q.narrow && (error = encode_tiled(q.a_last, matrix, q.last * 32 / int(sizeof(T)), 64, 1, 1)) != cudaSuccess)
    return error;
  q.pairs = sizeof(T) == 2 && shape.columns == 128 && N % 128 == 0;
  Tensor4 const halves{args.out, p.dtype, {64, N / 64, rows.size[1], 1}, {1, 64, row, 0}};
  error = q.pairs ? encode_tiled(q.out, halves, 64, 2, 16, 1)
                  : encode_tiled(q.out, rows, kLineBytes / int(sizeof(T)), 16, 1, 1);
  if (error != cudaSuccess) return error;
  constexpr int pieces = sizeof(T) == 4 ? 4 : 2;
  auto* kernel = resident_kernel<T, 128, !forward, pieces, 2>;
  if constexpr (sizeof(T) == 2) {
    if (shape.columns == 192)
      kernel = shape.groups == 3 ? resident_kernel<T, 192, !forward, pieces, 3>
                                 : resident_kernel<T, 192, !forward, pieces, 2>;
    else if (shape.groups == 3)
      kernel = resident_kernel<T, 128, !forward, pieces, 3>;
  }
  int const threads = shape.groups == 3 ? ResidentThreads<3>::all : ResidentThreads<2>::all;
  int const shared = ResidentShape::room + 1024;
  if ((error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) != cudaSuccess)
    return error;
  int sm_count = 0;
  if ((error = count_sms(sm_count)) != cudaSuccess) return error;
  // Blocks of the same part of the columns share the tiles.
  int64_t const blocks = min64(ceil_div(shape.tiles, shape.groups), max64(sm_count / shape.tiles_n, 1)) * shape.tiles_n;
  return launch_dependent(kernel, dim3(unsigned(blocks)), threads, shared, stream, q);
}

// A row of 64x128, of which 1x1 filters have this second kernel; `other` launches the first.
template <Op op, DType dtype, int TN, class Other>
cudaError_t launch_resident_or(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream,
                               Other const& other) {
  if constexpr (TN == 128 && (op == Op::fprop || (op == Op::dgrad && dtype != DType::f32)))
    if (takes_resident(row_of(plan), problem)) return launch_resident<op, dtype>(problem, args, stream);
  return other();
}

}  // namespace conv2d_ext::tma

// launch: the first kernel of a row.
#define CONV2D_EXT_TMA_RESIDENT_ROW(family, op, dtype, tm, tn, variant, launch)                              \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                                  \
    return tma::launch_resident_or<Op::op, DType::dtype, tn>(p, plan, args, stream,                          \
                                                             [&] { return launch(p, plan, args, stream); }); \
  }
#define CONV2D_EXT_TMA_RESIDENT_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_TMA_RESIDENT_ROW(family, op, dtype, tm, tn, variant,                \
                              (tma::launch_row<Op::op, DType::dtype, tm, tn, Variant::variant>))
#define CONV2D_EXT_TMA_TF32_RESIDENT_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_TMA_RESIDENT_ROW(family, op, dtype, tm, tn, variant, (tf32::launch_row<Op::op, tm, tn, Variant::variant>))
