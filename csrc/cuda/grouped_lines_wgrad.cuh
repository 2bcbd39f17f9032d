// wgrad of grouped_lines.cuh: dw[k][c][r][s] = sum over pixels of y[pixel][k] * x[pixel * stride + (r, s)][c].
//
// A stage holds a tile's lines of x with their halo and its lines of y. ldmatrix.trans turns 8 pixels of 8 channels
// into a fragment whose k is the pixel. An m16 tile has two halves, a tap and 8 channels of x each; its 8 columns are
// filters, its 16 pixels rows i and i + 4 of an 8 x 8 square. A warp keeps the sums of up to nine such tiles for one
// block of filters for all the pixels that its block of threads walks over: a job. Then they go to the workspace as
// they lie in the registers, and a second kernel adds them in order and puts them where they belong.
//
// Outputs outside of y are zeros in shared memory, and their x must not be multiplied: 0 * NaN would spread. Lanes
// whose column does not exist read zeros for x; rows that do not exist are left out.
#pragma once

#include "grouped_lines.cuh"

namespace conv2d_ext::grouped {

constexpr int kJobTiles = 9;

struct SumLineParams {
  CUtensorMap x, y;
  Params p;  // of fprop; `out` is y
  void* w;
  int64_t w_k, w_c, w_r, w_s;
  float* partial;  // [split][slab][job][tile][lane][4]
  int step_h, step_w;
  int jobs, chunks, tiles;  // of a slab; jobs of a block of filters; m16 tiles of a job
  int shares, splits;
  int y_rows, y_columns, y_offset, stage_bytes, tables_offset;
  int64_t fragments;  // of a split
};

// A square of a tile: its first pixel of x and of y, bytes before swizzling, and its first output.
struct SumSquare {
  int x, y, h, w;
};

// Shared memory: stages | tables | barriers. The sums of shares take the stages' place in the end.
struct SumShared {
  StageTile* tiles;  // [stage]
  SumSquare* squares;
  uint32_t zero;  // address of 16 bytes of zeros
  uint64_t *full, *empty;

  __device__ SumShared(SumLineParams const& q, char* dynamic) {
    char* const tables = dynamic + q.tables_offset;
    tiles = reinterpret_cast<StageTile*>(tables);
    squares = reinterpret_cast<SumSquare*>(tiles + kMaxStages);
    full = reinterpret_cast<uint64_t*>(squares + kMaxSquares);
    empty = full + kMaxStages;
    zero = ptx::shared_address(empty + kMaxStages);
  }
};

// The products of one tile with rows i and i + 4, of which `rows` exist in all.
template <class T, bool full>
__device__ inline void sum_rows(float (&acc)[4], uint32_t const (&x)[4], uint32_t const (&y)[2], int row, int rows) {
  if (full || row + 4 < rows)
    ptx::mma_m16n8k16<T>(acc, x[0], x[1], x[2], x[3], y[0], y[1]);
  else if (row < rows)
    ptx::mma_m16n8k8<T>(acc, x[0], x[1], y[0]);
}

// 3x3: the columns s of two blocks of channels; tile 3 s + r.
template <class T, bool full>
__device__ inline void sum_pair(float (&acc)[kJobTiles][4], uint32_t from, int row_bytes, uint32_t const (&y)[4][2],
                                int rows, bool valid, uint32_t zero) {
#pragma unroll
  for (int row = 0; row < 6; ++row, from += row_bytes)
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      uint32_t x[4];
      ptx::ldmatrix_x4_trans(x, valid ? swizzled(from + s * kLine) : zero);
#pragma unroll
      for (int r = 0; r < 3; ++r)
        if (row - r >= 0 && row - r < 4) sum_rows<T, full>(acc[s * 3 + r], x, y[row - r], row - r, rows);
    }
}

// One block: tile r is columns 0 and 1 of row r, tile 3 column 2 of rows 0 and 1, tile 4 column 2 of row 2.
template <class T, bool full>
__device__ inline void sum_single(float (&acc)[kJobTiles][4], uint32_t columns, uint32_t column, int row_bytes,
                                  uint32_t const (&y)[4][2], int rows, bool valid, uint32_t zero) {
#pragma unroll
  for (int row = 0; row < 6; ++row, columns += row_bytes, column += row_bytes) {
    uint32_t x[4];
    ptx::ldmatrix_x4_trans(x, valid ? swizzled(columns) : zero);
#pragma unroll
    for (int r = 0; r < 3; ++r)
      if (row - r >= 0 && row - r < 4) sum_rows<T, full>(acc[r], x, y[row - r], row - r, rows);
    // The second half's row is one further, so that of row 9 does not exist; nor is it needed there.
    ptx::ldmatrix_x4_trans(x, valid ? swizzled(column) : zero);
    if (row < 4) sum_rows<T, full>(acc[3], x, y[row], row, rows);
    if (row >= 2) sum_rows<T, full>(acc[4], x, y[row - 2], row - 2, rows);
  }
}

// The halves of a job's tile: 8 channels of x and a tap each.
template <bool is_3x3>
__device__ inline bool sum_half(Params const& p, int chunk, int tile, int upper, int& block, int& tap) {
  if constexpr (is_3x3) {
    if (chunk * 2 + 1 < p.in_blocks) {
      block = chunk * 2 + upper, tap = tile;
      return true;
    }
    block = p.in_blocks - 1;
    tap = tile < 3 ? upper * 3 + tile : tile == 3 ? 6 + upper : 8;
    return tile < 4 || (tile == 4 && upper == 0);
  } else {
    int const index = (chunk * kJobTiles + tile) * 2 + upper;
    tap = index / p.in_blocks, block = index - tap * p.in_blocks;
    return tap < p.taps;
  }
}

// Where a sum belongs: element e of a lane's four.
template <class T, bool is_3x3>
__device__ inline T* weight_of(SumLineParams const& q, int slab, int job, int tile, int lane, int e) {
  Params const& p = q.p;
  int const of_block = job / q.chunks, unit = of_block / p.out_blocks;
  int block, tap;
  if (!sum_half<is_3x3>(p, job - of_block * q.chunks, tile, e / 2, block, tap)) return nullptr;
  int const filter = (of_block - unit * p.out_blocks) * kBlock + lane % 4 * 2 + e % 2;
  int const of_group = p.filters.quotient(filter), c = block * kBlock + lane / 4 - of_group * p.in_per_group;
  int64_t const k = (int64_t(slab) * p.slab + unit) * p.out_blocks * kBlock + filter;
  if (unsigned(c) >= unsigned(p.in_per_group) || k >= p.out.channels) return nullptr;
  return static_cast<T*>(q.w) + k * q.w_k + c * q.w_c + p.tap[tap].r * q.w_r + p.tap[tap].s * q.w_s;
}

template <class T, bool is_3x3>
__global__ void __launch_bounds__(kMaxJobs * 32, 1) sum_lines_kernel(__grid_constant__ SumLineParams const q) {
  extern __shared__ __align__(1024) char lines[];
  Params const& p = q.p;
  uint32_t const base = ptx::shared_address(lines);
  SumShared const t(q, lines);
  uint32_t const zero = t.zero;
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int const squares = p.squares_h * p.squares_w * p.images;
  int const first_unit = blockIdx.y * p.slab;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::mbarrier_init(&t.full[i], 1);
      ptx::mbarrier_init(&t.empty[i], warps);
    }
    ptx::fence_mbarrier_init();
  }
  if (threadIdx.x < squares) {
    Square const a(p, threadIdx.x);
    t.squares[threadIdx.x] = {((a.image * p.window.rows + a.h * q.step_h) * p.window.columns + a.w * q.step_w) * kLine,
                              ((a.image * q.y_rows + a.h) * q.y_columns + a.w) * kLine, a.h, a.w};
  }
  if (threadIdx.x < 4) reinterpret_cast<uint32_t*>(t.empty + kMaxStages)[threadIdx.x] = 0;
  __syncthreads();
  // The first thread has the engine fill the stages, ...
  int const x_bytes = p.images * p.window.rows * p.window.columns * p.slab * p.in_blocks * kSlot;
  int const y_bytes = p.images * q.y_rows * q.y_columns * p.slab * p.out_blocks * kSlot;
  auto copy = [&](int number, int stage) {
    Tile const tile(p, number);
    uint32_t const to = base + stage * q.stage_bytes;
    t.tiles[stage] = {existing_squares(p, tile), tile.w, tile.h, int(tile.n)};
    ptx::mbarrier_arrive_expect_tx(&t.full[stage], x_bytes + y_bytes);
    ptx::cp_async_bulk_tensor_4d(to, &q.x, &t.full[stage], first_unit * p.in_blocks * kBlock,
                                 tile.w * p.axis_w.step + p.axis_w.low, tile.h * p.axis_h.step + p.axis_h.low,
                                 int(tile.n));
    ptx::cp_async_bulk_tensor_4d(to + q.y_offset, &q.y, &t.full[stage], first_unit * p.out_blocks * kBlock, tile.w,
                                 tile.h, int(tile.n));
  };
  int next = blockIdx.x;  // tile to be copied
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages && next < p.tiles; ++i, next += gridDim.x) copy(next, i);
  }

  int const per_share = warps / q.shares, share = warp / per_share;
  int const job = blockIdx.z * per_share + warp % per_share;
  int const of_block = job / q.chunks, chunk = job - of_block * q.chunks, unit = of_block / p.out_blocks;
  bool const works = job < q.jobs && first_unit + unit < p.units;
  bool const single = is_3x3 && chunk * 2 + 1 >= p.in_blocks;
  int const row_bytes = q.step_h * p.window.columns * kLine, y_row = q.y_columns * kLine;
  // x: matrices are half 0 of row i, half 1 of row i, and of row i + 4. y: rows i, i + 4, i + 1, i + 5.
  int const upper = lane / 8 % 2;
  int const x_lane =
      (lane / 16 * 4 * q.step_h * p.window.columns + lane % 8 * q.step_w) * kLine + unit * p.in_blocks * kSlot;
  int const y_lane = ((lane / 8 % 2 * 4 + lane / 16) * q.y_columns + lane % 8) * kLine + of_block * kSlot + q.y_offset;
  constexpr int offsets = is_3x3 ? 2 : kJobTiles;
  int offset[offsets];
  if constexpr (is_3x3) {
    offset[0] = single ? (p.in_blocks - 1) * kSlot + upper * kLine : (chunk * 2 + upper) * kSlot;
    offset[1] = (p.in_blocks - 1) * kSlot + 2 * kLine + upper * row_bytes;
  } else {
#pragma unroll
    for (int i = 0; i < offsets; ++i) {
      int block, tap;
      bool const exists = sum_half<false>(p, chunk, i, upper, block, tap);
      offset[i] = exists ? p.tap[tap].offset * kLine + block * kSlot : 0;
    }
  }
  int const tiles = min(q.tiles, is_3x3 ? kJobTiles : (p.taps * p.in_blocks + 1) / 2 - chunk * kJobTiles);

  float acc[kJobTiles][4] = {};
  Stage stage, refill;
  for (int number = blockIdx.x; number < p.tiles; number += gridDim.x) {
    uint32_t const data = base + stage.index * q.stage_bytes;
    ptx::mbarrier_wait(&t.full[stage.index], stage.parity);
    StageTile const tile = t.tiles[stage.index];
    for (int square = share; works && square < squares; square += q.shares) {
      if ((tile.squares >> square & 1) == 0) continue;
      SumSquare const a = t.squares[square];
      int const rows = p.out.H - tile.h - a.h, columns = p.out.W - tile.w - a.w;
      bool const valid = lane % 8 < columns;
      uint32_t const from = data + a.x + x_lane, at = data + a.y + y_lane;
      uint32_t y[4][2];
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        uint32_t v[4];
        ptx::ldmatrix_x4_trans(v, swizzled(at + i * y_row));
        y[i][0] = v[0], y[i][1] = v[1], y[i + 1][0] = v[2], y[i + 1][1] = v[3];
      }
      if constexpr (is_3x3) {
        if (single && rows >= kSide)
          sum_single<T, true>(acc, from + offset[0], from + offset[1], row_bytes, y, rows, valid, zero);
        else if (single)
          sum_single<T, false>(acc, from + offset[0], from + offset[1], row_bytes, y, rows, valid, zero);
        else if (rows >= kSide)
          sum_pair<T, true>(acc, from + offset[0], row_bytes, y, rows, valid, zero);
        else
          sum_pair<T, false>(acc, from + offset[0], row_bytes, y, rows, valid, zero);
      } else {
        int const mine = valid ? rows - lane / 16 * 4 : 0;  // of the lane's from its first on
#pragma unroll
        for (int i = 0; i < kJobTiles; ++i) {
          if (i >= tiles) break;
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            uint32_t x[4];
            ptx::ldmatrix_x4_trans(x, m < mine ? swizzled(from + offset[i] + m * row_bytes) : zero);
            ptx::mma_m16n8k16<T>(acc[i], x[0], x[1], x[2], x[3], y[m][0], y[m][1]);
          }
        }
      }
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&t.empty[stage.index]);
    stage.advance(p.stages);
    // ... and again, of three a tile later, when the other warps are likely to have left them too.
    if (threadIdx.x == 0 && next < p.tiles && (p.stages <= 2 || number != int(blockIdx.x))) {
      ptx::mbarrier_wait(&t.empty[refill.index], refill.parity);
      copy(next, refill.index);
      refill.advance(p.stages);
      next += gridDim.x;
    }
  }
  // The first share adds the others' sums to its own, in order.
  if (q.shares > 1) {
    ptx::bar_sync(1, warps * 32);  // everybody has read the stages
    float4* const sums = reinterpret_cast<float4*>(lines) + warp * (kJobTiles * 32) + lane;
    if (share > 0) {
#pragma unroll
      for (int i = 0; i < kJobTiles; ++i) sums[i * 32] = make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    }
    ptx::bar_sync(1, warps * 32);
    if (share > 0) return;
    for (int other = 1; other < q.shares; ++other)
#pragma unroll
      for (int i = 0; i < kJobTiles; ++i) {
        float4 const v = sums[(other * per_share * kJobTiles + i) * 32];
        acc[i][0] += v.x, acc[i][1] += v.y, acc[i][2] += v.z, acc[i][3] += v.w;
      }
  }
  if (!works) return;
  float4* const partial = reinterpret_cast<float4*>(q.partial) +
                          (blockIdx.x * q.fragments + (int64_t(blockIdx.y) * q.jobs + job) * q.tiles) * 32 + lane;
#pragma unroll
  for (int i = 0; i < kJobTiles; ++i) {
    if (i >= tiles) break;
    partial[i * 32] = make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
  }
}

constexpr int kAddLineWarps = 8;

// Adds the partial sums of a fragment: `together` warps those of every together-th split, then one of them the sums,
// in order.
template <class T, bool is_3x3>
__global__ void __launch_bounds__(32 * kAddLineWarps)
    add_lines_kernel(__grid_constant__ SumLineParams const q, int together) {
  __shared__ float4 sums[kAddLineWarps][32];
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = warp % together;
  int64_t const fragment = int64_t(blockIdx.x) * (kAddLineWarps / together) + warp / together;
  auto add = [](float4& a, float4 const& b) { a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w; };
  float4 sum{};
  if (fragment < q.fragments) {
    float4 const* const partial = reinterpret_cast<float4 const*>(q.partial) + fragment * 32 + lane;
#pragma unroll 4
    for (int split = first; split < q.splits; split += together) add(sum, partial[split * q.fragments * 32]);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (first > 0 || fragment >= q.fragments) return;
  for (int i = 1; i < together; ++i) add(sum, sums[warp + i][lane]);
  int const tile = int(fragment % q.tiles), job = int(fragment / q.tiles % q.jobs);
  int const slab = int(fragment / (int64_t(q.tiles) * q.jobs));
  float const values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    T* const to = weight_of<T, is_3x3>(q, slab, job, tile, lane, e);
    if (to != nullptr) *to = narrow<T>(values[e]);
  }
}

template <class T, bool is_3x3>
cudaError_t start_sum_lines(SumLineParams const& q, dim3 grid, unsigned threads, int64_t shared, cudaStream_t stream) {
  auto* const kernel = sum_lines_kernel<T, is_3x3>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, size_t(shared), stream>>>(q);
  int together = 1;
  while (together < kAddLineWarps && together * 4 <= q.splits) together *= 2;
  add_lines_kernel<T, is_3x3>
      <<<unsigned(ceil_div(q.fragments, kAddLineWarps / together)), 32 * kAddLineWarps, 0, stream>>>(q, together);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_sum_lines(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  int sm_count = 0, device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if ((error = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device)) != cudaSuccess) return error;
  GroupedSumLines const t = grouped_sum_lines(problem, Device{sm_count, 90});
  SumLineParams q{};
  Arguments swapped = args;
  swapped.out = const_cast<void*>(args.b), swapped.b = nullptr, swapped.bias = nullptr;
  Params& p = q.p = params_of(Op::fprop, problem, swapped);
  p.slab = int(t.slab), p.stages = int(t.stages);
  p.squares_h = int(t.squares_h), p.squares_w = int(t.squares_w), p.images = int(t.images);
  p.window.rows = int(t.rows), p.window.columns = int(t.columns);
  for (int i = 0; i < p.taps; ++i) p.tap[i].offset = p.tap[i].h * p.window.columns + p.tap[i].w;
  p.tiles_h = int(ceil_div(p.axis_h.positions, p.squares_h * kSide));
  p.tiles_w = int(ceil_div(p.axis_w.positions, p.squares_w * kSide));
  p.tiles = int(p.tiles_h * p.tiles_w * ceil_div(p.N, p.images));
  p.tiles_of_image = Divisor(uint32_t(p.tiles_h * p.tiles_w)), p.tiles_of_row = Divisor(uint32_t(p.tiles_w));
  p.columns_of = Divisor(uint32_t(p.squares_w)), p.filters = Divisor(uint32_t(p.out_per_group));
  q.w = args.out, q.partial = static_cast<float*>(args.workspace);
  q.w_k = problem.w.n, q.w_c = problem.w.c, q.w_r = problem.w.h, q.w_s = problem.w.w;
  q.step_h = int(t.step_h), q.step_w = int(t.step_w);
  q.jobs = int(t.jobs), q.chunks = int(t.chunks), q.tiles = int(t.tiles), q.shares = int(t.shares);
  q.y_rows = p.squares_h * kSide, q.y_columns = p.squares_w * kSide;
  q.y_offset = int(t.x_bytes), q.stage_bytes = int(t.stage_bytes), q.tables_offset = int(t.shared) - int(kSumTables);
  int64_t const slabs = ceil_div(p.units, p.slab);
  q.fragments = slabs * q.jobs * q.tiles;
  bool const skips = t.step_h != p.axis_h.step || t.step_w != p.axis_w.step;
  int const skip_h = skips ? p.axis_h.step : 1, skip_w = skips ? p.axis_w.step : 1;
  auto tensor = [&](Image const& image) {
    return tma::Tensor4{
        image.data, problem.dtype, {image.channels, image.W, image.H, problem.N}, {1, image.w, image.h, image.n}};
  };
  error = tma::encode_tiled(q.x, tensor(p.in), p.slab * p.in_blocks * kBlock, (p.window.columns - 1) * skip_w + 1,
                            (p.window.rows - 1) * skip_h + 1, p.images, skip_w, skip_h);
  if (error != cudaSuccess) return error;
  error = tma::encode_tiled(q.y, tensor(p.out), p.slab * p.out_blocks * kBlock, q.y_columns, q.y_rows, p.images);
  if (error != cudaSuccess) return error;
  dim3 const grid(even_blocks(p, plan.split_k), unsigned(slabs), unsigned(t.passes));
  q.splits = int(grid.x);
  unsigned const threads = 32 * unsigned(t.warps);
  return grouped_is_3x3(problem) ? start_sum_lines<T, true>(q, grid, threads, t.shared, stream)
                                 : start_sum_lines<T, false>(q, grid, threads, t.shared, stream);
}

template <Op op, DType dtype>
cudaError_t start_rows(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  if constexpr (op == Op::wgrad)
    return launch_sum_lines<T>(problem, plan, args, stream);
  else if constexpr (dtype == DType::f32)
    return problem.allow_tf32 ? launch_lines<T, 1>(op, problem, args, stream)
                              : launch_lines<T, 2>(op, problem, args, stream);
  else
    return launch_lines<T, 1>(op, problem, args, stream);
}

}  // namespace conv2d_ext::grouped

#define CONV2D_EXT_GROUPED_LINES_INSTANCE(family, op, dtype, tm, tn, tk, variant)       \
  cudaError_t conv2d_ext::family##_##op##_##dtype##_##tm##x##tn##_##variant(            \
      Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) { \
    return grouped::start_rows<Op::op, DType::dtype>(p, plan, args, stream);            \
  }
