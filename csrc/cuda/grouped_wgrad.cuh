// wgrad of grouped.cuh: dw[k][c][r][s] = sum over pixels of y[pixel][k] * x[pixel * stride + (r, s)][c].
//
// A tile of x with its halo and the same tile of y are in shared memory, pixel by pixel. ldmatrix.trans turns 8 pixels
// of 8 channels into a fragment whose k is the pixel. An mma has 16 rows of two halves, a tap and 8 channels of x each,
// 8 columns of filters, and 16 pixels of k: two rows of a warp's 8 x 8. A warp keeps the sums of up to ten halves and
// up to four blocks of filters for all the tiles that its block of threads walks over; then they go to the workspace,
// and a second kernel adds them in order. Sums between two groups are not stored.
//
// Outputs outside of y are zeros in shared memory, and their x is read from zeros too: 0 * NaN would spread.
#pragma once

#include "grouped_tile.cuh"

namespace conv2d_ext::grouped {

struct SumParams {
  Params p;  // of fprop; `out` is y here, and is read
  void* w;
  int64_t w_k, w_c, w_r, w_s;
  float* partial;  // [split][k][c][r][s]
  int64_t weights;
  int splits, shares, chunks, items;
  int R, S;
  Window y;
  int y_offset, zero_offset, table_offset;  // bytes
};

// The products of 8 x 8 pixels, `rows` of which exist from the lane's first on. x, y: addresses of the lane's first.
template <class T, int shared_blocks, int kTiles>
__device__ inline void sum_square(float (&acc)[shared_blocks][kTiles][4], uint32_t x, uint32_t y, int x_row, int y_row,
                                  int y_plane, int const (&offset)[kTiles][1], int tiles, int rows, bool inside,
                                  uint32_t zero) {
#pragma unroll
  for (int row = 0; row < kSide; row += 2) {
    uint32_t b[shared_blocks][2];
#pragma unroll
    for (int j = 0; j < shared_blocks; ++j) ptx::ldmatrix_x2_trans(b[j], y + j * y_plane + row * y_row);
    bool const valid = inside && row < rows;
    uint32_t const from = x + row * x_row;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (i >= tiles) break;
      uint32_t a[4];
      ptx::ldmatrix_x4_trans(a, valid ? from + offset[i][0] : zero);
#pragma unroll
      for (int j = 0; j < shared_blocks; ++j) ptx::mma_m16n8k16<T>(acc[j][i], a[0], a[1], a[2], a[3], b[j][0], b[j][1]);
    }
  }
}

// The same in f32; of the lane's two pixels in a row, those before `columns` exist. With two parts the products of four
// rows are summed apart, for the tensor cores cut where they add.
template <int parts, int kTiles>
__device__ inline void sum_square(float (&acc)[kTiles][4], uint32_t x, uint32_t y, int x_row, int y_row,
                                  int const (&offset)[kTiles][2], int tiles, int rows, int columns) {
  using P = Products<parts>;
  constexpr int at_once = 4;  // rows whose y is kept in registers
#pragma unroll
  for (int row0 = 0; row0 < kSide; row0 += at_once) {
    uint32_t b[at_once][2][parts];
#pragma unroll
    for (int row = 0; row < at_once; ++row)
#pragma unroll
      for (int k = 0; k < 2; ++k)
        split<float, parts>(ptx::ld_shared(y + (row0 + row) * y_row + k * 4 * kSlot), b[row][k]);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (i >= tiles) break;
      float sums[4] = {};
      float (&to)[4] = parts == 1 ? acc[i] : sums;
#pragma unroll
      for (int row = 0; row < at_once; ++row) {
        uint32_t a[4][parts];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          bool const valid = row0 + row < rows && k / 2 * 4 < columns;
          uint32_t const from = x + (row0 + row) * x_row + offset[i][k % 2] + k / 2 * 4 * kSlot;
          split<float, parts>(valid ? ptx::ld_shared(from) : 0, a[k]);
        }
#pragma unroll
        for (int t = 0; t < P::count; ++t)
          ptx::mma_m16n8k8_tf32(to, a[0][P::a(t)], a[1][P::a(t)], a[2][P::a(t)], a[3][P::a(t)], b[row][0][P::b(t)],
                                b[row][1][P::b(t)]);
      }
      if constexpr (parts == 2) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][e] += sums[e];
      }
    }
  }
}

// One of a warp's sums once more, without tensor cores: those that are NaN. Infinity is, once it is split into parts,
// and so is the product of an infinite output with the zeros around an image.
template <class T>
__device__ __noinline__ float exact_sum(Params const& p, int shares, int share, Tap tap, int64_t k, int64_t c) {
  float sum = 0;
  for (int number = blockIdx.x; number < p.tiles; number += gridDim.x) {
    Tile const tile(p, number);
    for (int square = share; square < p.squares_h * p.squares_w * p.images; square += shares)
      for (int i = 0; i < kSide * kSide; ++i) {
        int const row = square / p.squares_w;
        int64_t const n = tile.n + row / p.squares_h;
        int const h = tile.h + row % p.squares_h * kSide + i / kSide;
        int const w = tile.w + square % p.squares_w * kSide + i % kSide;
        int const in_h = h * p.axis_h.step + p.axis_h.low + tap.h, in_w = w * p.axis_w.step + p.axis_w.low + tap.w;
        if (n >= p.N || h >= p.out.H || w >= p.out.W) continue;
        if (unsigned(in_h) >= unsigned(p.in.H) || unsigned(in_w) >= unsigned(p.in.W)) continue;
        sum += widen(static_cast<T const*>(p.in.data)[n * p.in.n + c * p.in.c + in_h * p.in.h + in_w * p.in.w]) *
               widen(static_cast<T const*>(p.out.data)[n * p.out.n + k * p.out.c + h * p.out.h + w * p.out.w]);
        if (!(sum == sum)) return sum;
      }
  }
  return sum;
}

template <class T, int parts, int shared_blocks>
__global__ void __launch_bounds__(kMaxSumWarps * 32, 1) sum_kernel(__grid_constant__ SumParams const q) {
  constexpr int per_tile = 16 / kChannels<T>;  // halves of an mma
  constexpr int most_halves = sizeof(T) == 4 ? 16 : shared_blocks == 4 ? 8 : 10, kTiles = most_halves / per_tile;
  Params const& p = q.p;
  extern __shared__ __align__(128) char dynamic[];
  uint32_t const base = ptx::shared_address(dynamic);
  int* const offsets = reinterpret_cast<int*>(dynamic + q.table_offset);
  int const first_unit = blockIdx.y * p.slab, units = min(p.slab, p.units - first_unit);
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int const item = blockIdx.z * kMaxSumWarps + warp % (blockDim.x / 32 / q.shares),
            share = warp / (blockDim.x / 32 / q.shares);
  int const chunk = item % q.chunks, n_group = item / q.chunks, unit = n_group / p.n_groups;
  bool const works = unit < units;
  int const half0 = chunk * most_halves, halves = min(most_halves, p.in_blocks * p.taps - half0);
  int const tiles = works ? (halves + per_tile - 1) / per_tile : 0;

  for (int i = threadIdx.x; i < 8; i += blockDim.x) reinterpret_cast<uint32_t*>(dynamic + q.zero_offset)[i] = 0;
  for (int i = threadIdx.x; i < p.in_blocks * p.taps; i += blockDim.x)
    offsets[i] = i / p.taps * p.window.plane + p.tap[i % p.taps].offset * kSlot;
  __syncthreads();

  // f16: lanes 0-7 give the addresses of the first half's 8 pixels of a row, 8-15 of the second half's; 16-31 the same
  // of the next row. f32: a lane reads channel lane / 4 % 4 of the half lane / 16 and of the second next, of the pixels
  // lane % 4 and lane % 4 + 4.
  constexpr bool wide = sizeof(T) == 4;
  constexpr int of_lane = wide ? 2 : 1;  // halves
  int const row_of_lane = wide ? 0 : lane / 16, column_of_lane = wide ? lane % 4 : lane % 8;
  int offset[kTiles][of_lane];
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int k = 0; k < of_lane; ++k) {
      int const half = i * per_tile + (wide ? lane / 16 + k * 2 : lane / 8 % 2);
      offset[i][k] = works ? offsets[half0 + (half < halves ? half : 0)] + unit * p.in_blocks * p.window.plane : 0;
    }
  float acc[shared_blocks][kTiles][4] = {};
  int const squares = p.squares_h * p.squares_w * p.images;
  int const row_bytes = p.axis_h.step * p.window.pitch * kSlot;
  uint32_t const zero = base + q.zero_offset;
  int const step = gridDim.x, ahead = p.stages == 2 ? step : 0;
  for (int number = int(blockIdx.x) - ahead, stage = p.stages - 1; number < p.tiles;
       number += step, stage ^= p.stages - 1) {
    if (number + ahead < p.tiles) {
      Tile const next(p, number + ahead);
      uint32_t const to = base + (stage ^ (p.stages - 1)) * p.stage_bytes;
      load_inputs<T>(p, next, first_unit, to);
      load_window<T>(p.out, q.y, p.images, next.n, p.N, next.h, next.w, int64_t(first_unit) * p.out_blocks * kBlock,
                     to + q.y_offset);
    }
    ptx::cp_async_commit_group();
    if (number < 0) continue;
    if (p.stages == 2)
      ptx::cp_async_wait_group<1>();
    else
      ptx::cp_async_wait_group<0>();
    __syncthreads();
    Tile const tile(p, number);
    uint32_t const data = base + stage * p.stage_bytes;
    if (works) {
      for (int square = share; square < squares; square += q.shares) {
        int const row = p.columns_of.quotient(square), w = (square - row * p.squares_w) * kSide;
        int const image = row / p.squares_h, h = row % p.squares_h * kSide;
        int const rows = min(p.out.H - tile.h - h, kSide), columns = p.out.W - tile.w - w;
        if (tile.n + image >= p.N || rows <= 0 || columns <= 0) continue;
        uint32_t const x = data + image * p.window.rows * p.window.pitch * kSlot + (h + row_of_lane) * row_bytes +
                           (w + column_of_lane) * kSlot;
        int const block = unit * p.out_blocks + n_group % p.n_groups * shared_blocks;
        uint32_t const y = data + q.y_offset + block * (kBlock / kChannels<T>)*q.y.plane +
                           ((image * q.y.rows + h) * q.y.pitch + w + column_of_lane) * kSlot;
        int const y_row = q.y.pitch * kSlot;
        if constexpr (wide)
          sum_square<parts>(acc[0], x + lane / 4 % 4 * 4, y + lane / 16 * q.y.plane + lane / 4 % 4 * 4, row_bytes,
                            y_row, offset, tiles, rows, columns - column_of_lane);
        else
          sum_square<T>(acc, x, y + lane / 8 * y_row, row_bytes, y_row, q.y.plane, offset, tiles, rows - row_of_lane,
                        column_of_lane < columns, zero);
      }
    }
    __syncthreads();
  }
  if (!works) return;
  int64_t const split = int64_t(blockIdx.x) * q.shares + share;
  float* const partial = q.partial + split * q.weights;
  int const filter0 = n_group % p.n_groups * shared_blocks * kBlock + lane % 4 * 2;
  int64_t const k0 = int64_t(first_unit + unit) * p.out_blocks * kBlock;
  // By way of local memory, so that where a sum belongs is worked out in a loop.
  float sums[kTiles * shared_blocks * 4];
#pragma unroll
  for (int i = 0; i < kTiles * shared_blocks * 4; ++i)
    sums[i] = acc[i / 4 % shared_blocks][i / 4 / shared_blocks][i % 4];
#pragma unroll 1
  for (int i = 0; i < tiles * shared_blocks * 4; ++i) {
    int const of_chunk = i / (shared_blocks * 4) * per_tile + (i / 2 % 2 * 8 + lane / 4) / kChannels<T>;
    int const half = half0 + of_chunk, channel = half / p.taps * kChannels<T> + lane / 4 % kChannels<T>;
    int const filter = filter0 + i / 4 % shared_blocks * kBlock + i % 2, group = p.filters.quotient(filter);
    int const c = channel - group * p.in_per_group;
    if (of_chunk >= halves || filter >= p.out_blocks * kBlock || unsigned(c) >= unsigned(p.in_per_group)) continue;
    int64_t const k = k0 + filter;
    if (k >= p.out.channels) continue;
    Tap const& t = p.tap[half % p.taps];
    float sum = sums[i];
    if (!(sum == sum)) {  // once more
      int64_t const first = (int64_t(first_unit + unit) * p.groups_per_unit + group) * p.in_per_group;
      sum = exact_sum<T>(p, q.shares, share, t, k, first + c);
    }
    if (q.splits > 1)
      partial[((k * p.in_per_group + c) * q.R + t.r) * q.S + t.s] = sum;
    else
      static_cast<T*>(q.w)[k * q.w_k + c * q.w_c + t.r * q.w_r + t.s * q.w_s] = narrow<T>(sum);
  }
}

constexpr int kAddWarps = 16;

// Adds the partial sums of 32 weights: `lanes` warps those of every lanes-th split, then one of them the sums, in
// order.
template <class T>
__global__ void __launch_bounds__(32 * kAddWarps) add_kernel(__grid_constant__ SumParams const q, int lanes) {
  __shared__ float sums[kAddWarps][32];
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = warp % lanes;
  int64_t const index = (int64_t(blockIdx.x) * (kAddWarps / lanes) + warp / lanes) * 32 + lane;
  float sum = 0;
  if (index < q.weights) {
#pragma unroll 8
    for (int split = first; split < q.splits; split += lanes) sum += q.partial[split * q.weights + index];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (first > 0 || index >= q.weights) return;
  for (int i = 1; i < lanes; ++i) sum += sums[warp + i][lane];
  int64_t const s = index % q.S, r = index / q.S % q.R, kc = index / (q.S * q.R);
  int64_t const c = kc % q.p.in_per_group, k = kc / q.p.in_per_group;
  static_cast<T*>(q.w)[k * q.w_k + c * q.w_c + r * q.w_r + s * q.w_s] = narrow<T>(sum);
}

inline void set_sum_tiles(SumParams& q, GroupedSumTile const& t, int warps) {
  Params& p = q.p;
  p.squares_h = int(t.squares_h), p.squares_w = int(t.squares_w), p.images = int(t.images);
  p.stages = int(t.stages), p.stage_bytes = int(t.stage_bytes);
  set_window(p.window, t.x, p.slab * p.in_blocks);
  set_window(q.y, t.y, int(t.y_blocks));
  q.y_offset = int(t.x.bytes);
  q.zero_offset = p.stages * p.stage_bytes;
  q.table_offset = q.zero_offset + int(kGroupedZeros);
  set_offsets(p, warps);
  set_copies(q.y, 1, p.images, warps);
}

template <class T, int parts, int shared_blocks>
cudaError_t start_sum(SumParams const& q, dim3 grid, unsigned threads, int64_t shared, cudaStream_t stream) {
  auto* const kernel = sum_kernel<T, parts, shared_blocks>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, size_t(shared), stream>>>(q);
  return cudaGetLastError();
}

template <DType dtype>
cudaError_t launch_wgrad(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  GroupedSums const sums = grouped_sums(problem);
  SumParams q{};
  Arguments swapped = args;
  swapped.out = const_cast<void*>(args.b), swapped.b = nullptr, swapped.bias = nullptr;
  q.p = params_of(Op::fprop, problem, swapped);
  Params& p = q.p;
  p.slab = int(sums.slab), p.n_groups = int(sums.n_groups);
  q.chunks = int(sums.chunks), q.items = int(sums.items);
  q.shares = int(min64(sums.shares, plan.split_k));
  q.w = args.out, q.partial = static_cast<float*>(args.workspace);
  q.w_k = problem.w.n, q.w_c = problem.w.c, q.w_r = problem.w.h, q.w_s = problem.w.w;
  q.R = int(problem.R), q.S = int(problem.S);
  q.weights = problem.K * problem.C_per_group() * problem.R * problem.S;
  int const warps = int(min64(q.items, kMaxSumWarps)) * q.shares;
  GroupedSumTile const t = grouped_sum_tile(problem, q.shares);
  set_sum_tiles(q, t, warps);
  dim3 const grid(even_blocks(p, plan.split_k / q.shares), unsigned(ceil_div(p.units, p.slab)),
                  unsigned(ceil_div(q.items, kMaxSumWarps)));
  q.splits = int(grid.x) * q.shares;
  cudaError_t error = cudaSuccess;
  if constexpr (dtype == DType::f32)
    error = problem.allow_tf32 ? start_sum<T, 1, 1>(q, grid, 32 * warps, t.shared, stream)
                               : start_sum<T, 2, 1>(q, grid, 32 * warps, t.shared, stream);
  else
    error = sums.together == 1   ? start_sum<T, 1, 1>(q, grid, 32 * warps, t.shared, stream)
            : sums.together == 2 ? start_sum<T, 1, 2>(q, grid, 32 * warps, t.shared, stream)
            : sums.together == 3 ? start_sum<T, 1, 3>(q, grid, 32 * warps, t.shared, stream)
                                 : start_sum<T, 1, 4>(q, grid, 32 * warps, t.shared, stream);
  if (error != cudaSuccess || q.splits == 1) return error;
  int lanes = 1;
  while (lanes < kAddWarps && lanes * 8 < q.splits) lanes *= 2;
  add_kernel<T><<<unsigned(ceil_div(q.weights, 32 * kAddWarps / lanes)), 32 * kAddWarps, 0, stream>>>(q, lanes);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::grouped
