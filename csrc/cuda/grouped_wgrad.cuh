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
  int splits, parts, chunks, items;
  int R, S;
  Window y;
  int y_offset, zero_offset, table_offset;  // bytes
};

template <class T, bool nhwc, int shared_blocks, int most_halves>
__global__ void __launch_bounds__(kMaxSumWarps * 32, 1) sum_kernel(__grid_constant__ SumParams const q) {
  constexpr int kPairs = most_halves / 2;
  Params const& p = q.p;
  extern __shared__ __align__(128) char dynamic[];
  uint32_t const base = ptx::shared_address(dynamic);
  int* const offsets = reinterpret_cast<int*>(dynamic + q.table_offset);
  int const first_unit = blockIdx.y * p.slab, units = min(p.slab, p.units - first_unit);
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int const item = blockIdx.z * kMaxSumWarps + warp % (blockDim.x / 32 / q.parts),
            part = warp / (blockDim.x / 32 / q.parts);
  int const chunk = item % q.chunks, n_group = item / q.chunks, unit = n_group / p.n_groups;
  bool const works = unit < units;
  int const half0 = chunk * most_halves, halves = min(most_halves, p.in_blocks * p.taps - half0);
  int const pairs = works ? (halves + 1) / 2 : 0;

  for (int i = threadIdx.x; i < 8; i += blockDim.x) reinterpret_cast<uint32_t*>(dynamic + q.zero_offset)[i] = 0;
  for (int i = threadIdx.x; i < p.in_blocks * p.taps; i += blockDim.x)
    offsets[i] = i / p.taps * p.window.plane + p.tap[i % p.taps].offset * kSlot;
  __syncthreads();

  // Lanes 0-7 give the addresses of the first half's 8 pixels of the first row, 8-15 of the second half's; 16-31 the
  // same of the second row.
  int const second = lane / 8 % 2, row_of_pair = lane / 16, column_of_lane = lane % 8;
  int offset[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    int const half = i * 2 + second < halves ? half0 + i * 2 + second : half0;
    offset[i] = i < pairs ? offsets[half] + unit * p.in_blocks * p.window.plane : 0;
  }
  float acc[shared_blocks][kPairs][4] = {};
  int const squares = p.squares_h * p.squares_w * p.images;
  int const row_bytes = p.axis_h.step * p.window.pitch * kSlot;
  uint32_t const zero = base + q.zero_offset;
  int const step = gridDim.x, ahead = p.stages == 2 ? step : 0;
  for (int number = int(blockIdx.x) - ahead, stage = p.stages - 1; number < p.tiles;
       number += step, stage ^= p.stages - 1) {
    if (number + ahead < p.tiles) {
      Tile const next(p, number + ahead);
      uint32_t const to = base + (stage ^ (p.stages - 1)) * p.stage_bytes;
      load_inputs<T, nhwc>(p, next, first_unit, to);
      load_window<T, nhwc>(p.out, q.y, p.images, next.n, p.N, next.h, next.w,
                           int64_t(first_unit) * p.out_blocks * kBlock, to + q.y_offset);
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
      for (int square = part; square < squares; square += q.parts) {
        int const row = p.columns_of.quotient(square), w = (square - row * p.squares_w) * kSide;
        int const image = row / p.squares_h, h = row % p.squares_h * kSide;
        int const rows = min(p.out.H - tile.h - h, kSide), columns = p.out.W - tile.w - w;
        if (tile.n + image >= p.N || rows <= 0 || columns <= 0) continue;
        uint32_t const x = data + image * p.window.rows * p.window.pitch * kSlot + (h + row_of_pair) * row_bytes +
                           (w + column_of_lane) * kSlot;
        int const block = unit * p.out_blocks + n_group % p.n_groups * shared_blocks;
        uint32_t const y = data + q.y_offset + block * q.y.plane +
                           ((image * q.y.rows + h + lane / 8) * q.y.pitch + w + column_of_lane) * kSlot;
        bool const inside = column_of_lane < columns;
#pragma unroll
        for (int m = 0; m < kSide; m += 2) {
          if (m >= rows) break;
          uint32_t b[shared_blocks][2];
#pragma unroll
          for (int j = 0; j < shared_blocks; ++j)
            ptx::ldmatrix_x2_trans(b[j], y + j * q.y.plane + m * q.y.pitch * kSlot);
          bool const valid = inside && m + row_of_pair < rows;
          uint32_t const from = x + m * row_bytes;
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
            if (i >= pairs) break;
            uint32_t a[4];
            ptx::ldmatrix_x4_trans(a, valid ? from + offset[i] : zero);
#pragma unroll
            for (int j = 0; j < shared_blocks; ++j)
              ptx::mma_m16n8k16<T>(acc[j][i], a[0], a[1], a[2], a[3], b[j][0], b[j][1]);
          }
        }
      }
    }
    __syncthreads();
  }
  if (!works) return;
  int64_t const split = int64_t(blockIdx.x) * q.parts + part;
  float* const partial = q.partial + split * q.weights;
  int const filter0 = n_group % p.n_groups * shared_blocks * kBlock + lane % 4 * 2;
  int64_t const k0 = int64_t(first_unit + unit) * p.out_blocks * kBlock;
#pragma unroll
  for (int i = 0; i < kPairs; ++i)
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      int const half = half0 + i * 2 + upper;
      if (i * 2 + upper >= halves) continue;
      int const channel = half / p.taps * kBlock + lane / 4;
      Tap const& t = p.tap[half % p.taps];
#pragma unroll
      for (int j = 0; j < shared_blocks; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          int const filter = filter0 + j * kBlock + e, c = channel - p.filters.quotient(filter) * p.in_per_group;
          if (filter >= p.out_blocks * kBlock || unsigned(c) >= unsigned(p.in_per_group)) continue;
          if (k0 + filter >= p.out.channels) continue;
          float const sum = acc[j][i][upper * 2 + e];
          if (q.splits > 1)
            partial[(((k0 + filter) * p.in_per_group + c) * q.R + t.r) * q.S + t.s] = sum;
          else
            static_cast<T*>(q.w)[(k0 + filter) * q.w_k + c * q.w_c + t.r * q.w_r + t.s * q.w_s] = narrow<T>(sum);
        }
    }
}

constexpr int kAddLanes = 16;  // threads that share the splits of one weight

// Adds the partial sums: each thread those of every 16th split, then one the 16 sums, in order.
template <class T>
__global__ void __launch_bounds__(32 * kAddLanes) add_kernel(__grid_constant__ SumParams const q) {
  __shared__ float sums[kAddLanes][32];
  int const lane = threadIdx.x % 32, part = threadIdx.x / 32;
  int64_t const index = int64_t(blockIdx.x) * 32 + lane;
  float sum = 0;
  if (index < q.weights) {
#pragma unroll 8
    for (int split = part; split < q.splits; split += kAddLanes) sum += q.partial[split * q.weights + index];
  }
  sums[part][lane] = sum;
  __syncthreads();
  if (part > 0 || index >= q.weights) return;
#pragma unroll
  for (int i = 1; i < kAddLanes; ++i) sum += sums[i][lane];
  int64_t const s = index % q.S, r = index / q.S % q.R, kc = index / (q.S * q.R);
  int64_t const c = kc % q.p.in_per_group, k = kc / q.p.in_per_group;
  static_cast<T*>(q.w)[k * q.w_k + c * q.w_c + r * q.w_r + s * q.w_s] = narrow<T>(sum);
}

// Chooses the tile, and returns the bytes of shared memory.
inline int64_t set_sum_tiles(SumParams& q, int most_squares, int warps) {
  Params& p = q.p;
  int64_t const fixed = 32 + p.in_blocks * p.taps * 4;
  double best = 0;
  int best_h = 1, best_w = 1, best_images = 1;
  auto stage = [&] {
    q.y_offset = int(set_window(p));
    Window& y = q.y;
    y.rows = p.squares_h * kSide, y.columns = y.pitch = y.parity_columns = p.squares_w * kSide;
    y.blocks = p.slab * p.out_blocks;
    y.plane = plane_bytes(int64_t(p.images) * y.rows * y.columns, y.blocks);
    // Four more planes: the last run of blocks may reach past them.
    p.stage_bytes = int(ceil_div(q.y_offset + int64_t(y.plane) * (y.blocks + 4), 128) * 128);
    return int64_t(p.stage_bytes);
  };
  for (p.squares_h = 1; p.squares_h <= most_squares; ++p.squares_h)
    for (p.squares_w = 1; p.squares_w * p.squares_h <= most_squares; ++p.squares_w) {
      bool const fills = p.squares_h * kSide >= p.axis_h.positions && p.squares_w * kSide >= p.axis_w.positions;
      p.images = int(fills ? min64(p.N, max64(1, most_squares / (p.squares_h * p.squares_w))) : 1);
      if (2 * stage() + fixed > kSharedHalf) continue;
      double const tiles = double(ceil_div(p.axis_h.positions, p.squares_h * kSide)) *
                           double(ceil_div(p.axis_w.positions, p.squares_w * kSide)) * double(ceil_div(p.N, p.images));
      double const pixels = double(p.images) * p.squares_h * p.squares_w * kSide * kSide;
      double const cost = tiles * (double(p.images) * p.window.rows * p.window.pitch + 1.5 * pixels + 64);
      if (best == 0 || cost < best) best = cost, best_h = p.squares_h, best_w = p.squares_w, best_images = p.images;
    }
  p.squares_h = best_h, p.squares_w = best_w, p.images = best_images;
  int64_t const one = stage() + fixed, two = one + p.stage_bytes;
  p.stages = two <= kSharedHalf || (two <= kSharedMost && one > kSharedHalf) ? 2 : 1;
  q.zero_offset = p.stages * p.stage_bytes;
  q.table_offset = q.zero_offset + 32;
  set_offsets(p, warps);
  set_copies(q.y, 1, p.images, warps);
  return p.stages == 2 ? two : one;
}

template <class T, bool nhwc, int shared_blocks>
cudaError_t start_sum(SumParams const& q, dim3 grid, unsigned threads, int64_t shared, cudaStream_t stream) {
  auto* const kernel = sum_kernel<T, nhwc, shared_blocks, grouped_halves(shared_blocks)>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, size_t(shared), stream>>>(q);
  return cudaGetLastError();
}

template <DType dtype, bool nhwc>
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
  q.parts = int(min64(sums.parts, plan.split_k));
  q.w = args.out, q.partial = static_cast<float*>(args.workspace);
  q.w_k = problem.w.n, q.w_c = problem.w.c, q.w_r = problem.w.h, q.w_s = problem.w.w;
  q.R = int(problem.R), q.S = int(problem.S);
  q.weights = problem.K * problem.C_per_group() * problem.R * problem.S;
  int const warps = int(min64(q.items, kMaxSumWarps)) * q.parts;
  int64_t const shared = set_sum_tiles(q, int(max64(2, q.parts * 2)), warps);
  dim3 const grid(even_blocks(p, plan.split_k / q.parts), unsigned(ceil_div(p.units, p.slab)),
                  unsigned(ceil_div(q.items, kMaxSumWarps)));
  q.splits = int(grid.x) * q.parts;
  int const blocks = grouped_shared_blocks(p.out_blocks, problem.dtype);
  cudaError_t const error = blocks == 1   ? start_sum<T, nhwc, 1>(q, grid, 32 * warps, shared, stream)
                            : blocks == 2 ? start_sum<T, nhwc, 2>(q, grid, 32 * warps, shared, stream)
                            : blocks == 3 ? start_sum<T, nhwc, 3>(q, grid, 32 * warps, shared, stream)
                                          : start_sum<T, nhwc, 4>(q, grid, 32 * warps, shared, stream);
  if (error != cudaSuccess || q.splits == 1) return error;
  add_kernel<T><<<unsigned(ceil_div(q.weights, 32)), 32 * kAddLanes, 0, stream>>>(q);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::grouped
