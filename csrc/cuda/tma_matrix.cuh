// 1x1 filters of stride 1, 16-bit types: a product of two matrices, sums[m, n] = sum over k of A[m, k] * B[n, k], with
// plain boxes in place of im2col copies. In channels_last:
//
//   fprop   A filters, rows K            B pixels, columns N*H*W    sum over C
//   dgrad   A filters, turned, rows C    B pixels, columns N*H*W    sum over K
//   wgrad   A x, turned, rows C          B y, turned, columns K     sum over N*H*W, in parts, or A and B exchanged
//
// (of wgrad channels that are no vectors too, several pixels a row: matrix_period)
// and over NCHW (planes), where rows are runs of 64 pixels of any images:
//
//   fprop   A x, turned, rows pixels     B filters, columns K          sum over C
//   dgrad   A y, turned, rows pixels     B filters, turned, columns C  sum over K
//
// A persistent block has one or two warpgroups, 64 rows each, and a warp that copies; a stage is 64 k of both operands.
// Results are turned on their way through shared memory, a line of 64 rows for each column, and the copy engine stores
// all columns of a warpgroup at once. The blocks of a cluster share what they read of A along its columns, and of B
// along its rows: each copies its part of that to all of them.
//
// Each width is a kernel of its own, of 7 to 10 KB of code: one kernel with loops for all widths lost 4 us where other
// kernels ran in between (docs/tuning.md). The warps that multiply run once through all but the loop and the stores, on
// nothing, while the first copies are under way, so that the instructions are there when they are needed (0.1 us).
#pragma once

#include "../core/matrix.h"
#include "../core/pixels.h"
#include "ptx.cuh"
#include "tma.cuh"
#include "tma_parts.cuh"

namespace conv2d_ext::tma {

// Named barriers: 1 to 3 are a warpgroup's own; the rings' barriers are set up.
constexpr int kMatrixReady = 4;

struct MatrixParams {
  CUtensorMap a, b, out;
  CUtensorMap a_last, b_last;     // of a last step, if `last` < 4; wgrad in parts: of a last run, if it is `narrow`
  CUtensorMap a_end, a_end_last;  // planes: of an image's last run
  Divisor first;                  // tiles of a cluster, along the way on which blocks follow each other; in all
  int32_t units, steps;
  int32_t last;      // instructions of the last step, 16 k each
  bool n_first;      // that is along the columns
  bool rotates;      // a block has the next of `first` in its next turn, as the last ones may be few
  int32_t channels;  // of the result
  Divisor runs;      // planes: of an image
  int32_t pixels;    // planes: of an image
  void const* bias;
  int64_t bias_stride;
  // wgrad in parts: of all tiles; tiles along the rows; blocks of a tile, which take turns with its steps.
  Divisor tiles;
  int32_t tiles_m, parts;
  int32_t period, side_a, side_b;  // pixels of a row (matrix_period), each with so many channels
  bool narrow;
  void* workspace;
  bool once;  // L2 gives up what is read first (reads_once)
};

struct MatrixTables {
  uint64_t full[kMatrixStages], empty[kMatrixStages];
};

// Where a block is in its cluster, cm blocks along the rows by cn along the columns, and the tiles that it has in turn.
template <class Tile, int cm, int cn>
struct MatrixPlace {
  static_assert(cm <= 2 && cn <= 2);
  int unit = int(blockIdx.x) / (cm * cn), rank_m = int(blockIdx.x) % cm, rank_n = int(blockIdx.x) / cm % cn;
  int m = 0, n = 0, turn = 0, part = 0;
  __device__ bool more(MatrixParams const& p) {
    int fast = unit;
    if constexpr (!Tile::staged) part = p.tiles.divide(fast);
    int const slow = p.first.divide(fast);
    fast += turn;
    if (fast >= int(p.first.value)) fast -= int(p.first.value);
    m = p.n_first ? slow : fast, n = p.n_first ? fast : slow;
    n = (n * cn + rank_n) * Tile::columns;
    m = (m * cm + rank_m) * Tile::rows;
    return unit < p.units;
  }
  // Blocks of the cluster that share this one's A, B.
  __device__ uint32_t along_columns() const { return (cn > 1 ? 1u | 1u << cm : 1u) << rank_m; }
  __device__ uint32_t along_rows() const { return ((1u << cm) - 1) << rank_n * cm; }
  __device__ void advance(MatrixParams const& p) {
    unit += int(gridDim.x) / (cm * cn);
    if (p.rotates && ++turn == int(p.first.value)) turn = 0;
  }
};

// planes: the image of a row of the result, which becomes its pixel there.
__device__ __forceinline__ int matrix_run(MatrixParams const& p, int& row) {
  int run = row / 64;
  int const image = p.runs.divide(run);
  row = run * 64;
  return image;
}

// The copies of all tiles of the block, by one thread. Of what blocks of a cluster share each copies some of the lines:
// rows, or k where they lie in memory as lines.
template <class Tile, bool a_rows, bool b_rows, int cm, int cn, bool planes>
__device__ void matrix_copy(MatrixParams const& p, uint32_t ring, uint64_t* full, uint64_t* empty) {
  constexpr bool may_once = planes || !Tile::staged;
  uint64_t const once = may_once && p.once ? ptx::createpolicy_evict_first() : 0;
  auto copy = [once](auto shared, uint32_t to, CUtensorMap const& map, uint64_t* bar, int c0, int c1, uint32_t blocks) {
    if constexpr (decltype(shared)::value)
      ptx::cp_async_bulk_tensor_4d_multicast(to, &map, bar, c0, c1, uint16_t(blocks));
    else if (!Tile::staged && once != 0)
      ptx::cp_async_bulk_tensor_4d(to, &map, bar, c0, c1, 0, 0, once);
    else
      ptx::cp_async_bulk_tensor_4d(to, &map, bar, c0, c1, 0, 0);
  };
  constexpr std::bool_constant<(cn > 1)> a_shared;
  constexpr std::bool_constant<(cm > 1)> b_shared;
  MatrixPlace<Tile, cm, cn> at;
  int const from_a = at.rank_n * (a_rows ? 64 : Tile::rows) / cn,
            from_b = at.rank_m * (b_rows ? 64 : Tile::columns) / cm;
  uint32_t const with_a = at.along_columns(), with_b = at.along_rows();
  Stage stage;
#pragma unroll 1
  for (; at.more(p); at.advance(p)) {
    int const of_row = Tile::staged ? 0 : at.part & (p.period - 1);
    int const every = Tile::staged ? 64 : p.parts / p.period * 64;
    // Runs of wgrad's columns that tiles of no whole runs begin are not the channels' last ones.
    constexpr bool narrow_columns = Tile::columns % 64 == 0;
    constexpr int columns = int(ceil_div(Tile::columns, 64) * 64);
    bool const narrow_runs = !Tile::staged && cm * cn == 1 && p.narrow;
    int whole_bytes = Tile::stage_bytes;
    if (narrow_runs)
      whole_bytes =
          (min(Tile::rows, p.side_a - at.m) + (narrow_columns ? min(columns, p.side_b - at.n) : columns)) * kLineBytes;
    if constexpr (planes) {
#pragma unroll
      for (int run = 0; run < Tile::groups; ++run) {
        int to = at.m + run * 64;
        matrix_run(p, to);
        whole_bytes -= max(to + 64 - p.pixels, 0) * kLineBytes;
      }
    }
    if constexpr (!Tile::staged) at.m += of_row * p.side_a & ~7, at.n += of_row * p.side_b & ~7;
#pragma unroll 1
    for (int k = Tile::staged ? 0 : at.part / p.period * 64; k < p.steps * 64;
         k += every, stage.advance(Tile::stages)) {
      ptx::mbarrier_wait(empty + stage.index, stage.parity ^ 1);
      uint64_t* const bar = full + stage.index;
      uint32_t const a = ring + stage.index * Tile::stage_bytes + from_a * kLineBytes,
                     b = ring + stage.index * Tile::stage_bytes + Tile::a_bytes + from_b * kLineBytes;
      // Boxes that reach beyond the tensor's channels take longer, so those of the last step do not.
      bool const narrow = cm * cn == 1 && Tile::staged && k == p.steps * 64 - 64 && p.last < 4;
      CUtensorMap const &map_a = narrow ? p.a_last : p.a, &map_b = narrow ? p.b_last : p.b;
      ptx::mbarrier_arrive_expect_tx(bar, narrow ? whole_bytes / 4 * p.last : whole_bytes);
      if constexpr (a_rows) {
#pragma unroll
        for (int run = 0; run < Tile::groups; ++run) {
          int to = at.m + run * 64;
          if constexpr (planes) {
            int const image = matrix_run(p, to);
            CUtensorMap const& map = to + 64 <= p.pixels ? map_a : narrow ? p.a_end_last : p.a_end;
            if (once != 0)
              ptx::cp_async_bulk_tensor_4d(a + run * kRunBytes, &map, bar, to, k, image, 0, once);
            else
              ptx::cp_async_bulk_tensor_4d(a + run * kRunBytes, &map, bar, to, k, image, 0);
          } else {
            if (narrow_runs && to >= p.side_a) break;
            copy(a_shared, a + run * kRunBytes, narrow_runs && to + 64 > p.side_a ? p.a_last : map_a, bar, to,
                 k + from_a, with_a);
          }
        }
      } else {
        copy(a_shared, a, map_a, bar, k, at.m + from_a, with_a);
      }
      if constexpr (b_rows) {
#pragma unroll
        for (int run = 0; run < ceil_div(Tile::columns, 64); ++run) {
          int const to = at.n + run * 64;
          if (narrow_columns && narrow_runs && to >= p.side_b) break;
          copy(b_shared, b + run * kRunBytes, narrow_columns && narrow_runs && to + 64 > p.side_b ? p.b_last : map_b,
               bar, to, k + from_b, with_b);
        }
      } else {
        copy(b_shared, b, map_b, bar, k, at.n + from_b, with_b);
      }
    }
  }
}

// wgrad in parts: the steps of one.
__device__ __forceinline__ int matrix_part_steps(MatrixParams const& p, int part) {
  int const parts = p.parts / p.period;
  return (p.steps - part / p.period + parts - 1) / parts;
}

// To shared memory, as the boxes that store it are swizzled. bias: of rows; planes have one of columns.
template <class T, class Tile, bool planes>
__device__ __forceinline__ void matrix_stage(MatrixParams const& p, float (&acc)[Tile::columns / 2],
                                             float const (&bias)[2], int n, uint32_t staging) {
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32 % 4, part = lane / 8, line = lane % 8;
  staging += (part / 2 * 8 + line) * kLineBytes + ((warp * 2 + part % 2) ^ line) * 16;
#pragma unroll
  for (int j = 0; j < Tile::columns; j += 16) {
    float* const d = acc + j / 2;
    if (planes && p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const column = n + j + i / 2 * 8 + lane % 4 * 2 + i % 2;
        if (column >= p.channels) continue;
        float const add = widen(static_cast<T const*>(p.bias)[column * p.bias_stride]);
        d[i / 2 * 4 + i % 2] += add, d[i / 2 * 4 + 2 + i % 2] += add;
      }
    }
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = pack<T>(d[i * 2] + bias[i % 2], d[i * 2 + 1] + bias[i % 2]);
    ptx::stmatrix_x4_trans(staging + j * kLineBytes, v);
  }
}

template <class T, class Tile, bool a_rows, bool b_rows, int cm, int cn, bool planes>
__device__ void matrix_multiply(MatrixParams const& p, uint32_t ring, uint32_t staging, uint32_t full, uint32_t empty) {
  constexpr uint32_t step_a = a_rows ? 2 * kCoreBytes : 32, step_b = b_rows ? 2 * kCoreBytes : 32;
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32;
  bool const stores = threadIdx.x % kWarpgroup == 0;
  uint64_t const lines = layout_of(kLineBytes), runs = ptx::wgmma_descriptor(0, kRunBytes, kCoreBytes),
                 layout_a = a_rows ? runs : lines, layout_b = b_rows ? runs : lines;
  staging += group * Tile::columns * kLineBytes;
  MatrixPlace<Tile, cm, cn> at;
  bool const shares = lane < cm * cn && ((at.along_columns() | at.along_rows()) >> lane & 1) != 0;
  auto give_back = [&](int stage) {  // to all that copy to this block
    if constexpr (cm * cn == 1) {
      if (lane == 0) ptx::mbarrier_arrive(empty + stage * 8);
    } else {
      if (shares) ptx::mbarrier_arrive_cluster(ptx::mapa(empty + stage * 8, lane));
    }
  };
  bool const narrow = cm * cn == 1 && Tile::staged && p.last < 4;
  Stage stage;
  bool dry = true;  // the first time
#pragma unroll 1
  while (at.more(p)) {
    float acc[Tile::columns / 2], bias[2];
#pragma unroll
    for (float& sum : acc) sum = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = at.m + int(threadIdx.x) / 32 * 16 + lane / 4 + half * 8;
      bias[half] = !planes && p.bias != nullptr && row < p.channels
                       ? widen(static_cast<T const*>(p.bias)[row * p.bias_stride])
                       : 0.f;
    }
    int const steps = dry ? 0 : Tile::staged ? p.steps : matrix_part_steps(p, at.part);
    int before = -1;
    auto multiply = [&](auto instructions) {
      ptx::mbarrier_wait(full + stage.index * 8, stage.parity);
      uint32_t const a = ring + stage.index * Tile::stage_bytes + group * 64 * kLineBytes,
                     b = ring + stage.index * Tile::stage_bytes + Tile::a_bytes;
      ptx::wgmma_fence_operand(acc);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < decltype(instructions)::value; ++k)
        ptx::wgmma_mma_async<T, a_rows, b_rows>(acc, at_address(layout_a, a + k * step_a),
                                                at_address(layout_b, b + k * step_b));
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(acc);
      if (before >= 0) give_back(before);
      before = stage.index;
      stage.advance(Tile::stages);
    };
    int const whole = narrow && !dry ? steps - 1 : steps;
#pragma unroll 1
    for (int step = 0; step < whole; ++step) multiply(std::integral_constant<int, 4>());
    if (whole < steps) {
      if (p.last == 1)
        multiply(std::integral_constant<int, 1>());
      else if (p.last == 2)
        multiply(std::integral_constant<int, 2>());
      else
        multiply(std::integral_constant<int, 3>());
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
    if (before >= 0) give_back(before);
    if constexpr (Tile::staged) {
      if (stores) ptx::cp_async_bulk_wait_group_read<0>();  // of the tile before
      ptx::bar_sync(1 + group, kWarpgroup);
      matrix_stage<T, Tile, planes>(p, acc, bias, at.n, staging);
      ptx::fence_proxy_async();
      ptx::bar_sync(1 + group, kWarpgroup);
      if (stores && !dry) {
        int to = at.m + group * 64;
        int const image = planes ? matrix_run(p, to) : 0;
        ptx::cp_async_bulk_tensor_4d_store(&p.out, staging, to, at.n, image, 0);
        ptx::cp_async_bulk_commit_group();
      }
    } else if (!dry) {
      int64_t const tile = at.part * p.tiles.value * (cm * cn) + at.n / Tile::columns * p.tiles_m + at.m / Tile::rows;
      float4* const to =
          static_cast<float4*>(p.workspace) + tile * (Tile::columns / 8 * Tile::multiplying) + threadIdx.x;
#pragma unroll
      for (int j = 0; j < Tile::columns / 8; ++j)
        to[j * Tile::multiplying] = make_float4(acc[j * 4], acc[j * 4 + 1], acc[j * 4 + 2], acc[j * 4 + 3]);
    }
    if (dry) {
      if constexpr (cm * cn == 1)
        ptx::bar_sync(kMatrixReady, Tile::threads);
      else
        ptx::barrier_cluster_wait();
      ptx::griddepcontrol_wait();
    } else {
      at.advance(p);
    }
    dry = false;
  }
  if (stores) ptx::cp_async_bulk_wait_group_read<0>();  // shared memory ends with the block
}

// Do the rows, the columns, lie side by side in memory?
constexpr bool matrix_a_rows(Op op, bool planes) { return planes || op != Op::fprop; }
constexpr bool matrix_b_rows(Op op, bool planes) { return op == (planes ? Op::dgrad : Op::wgrad); }

template <class T, int tile_m, int tile_n, Op op, int cm, int cn, bool planes, bool in_parts = false>
__global__ void __launch_bounds__(MatrixTile<tile_m, tile_n>::threads, 1)
    matrix_kernel(__grid_constant__ MatrixParams const p) {
  constexpr bool alone = cm * cn == 1, a_rows = matrix_a_rows(op, planes), b_rows = matrix_b_rows(op, planes);
  using Tile = MatrixTile<tile_m, tile_n, b_rows, !in_parts>;
  extern __shared__ uint8_t dynamic[];
  __shared__ MatrixTables tables;
  uint32_t const staging = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024),
                 ring = staging + Tile::staging_bytes;
  if (warp_uniform(int(threadIdx.x) / 32) < Tile::groups * 4) {
    if constexpr (!alone) ptx::barrier_cluster_arrive();
    matrix_multiply<T, Tile, a_rows, b_rows, cm, cn, planes>(p, ring, staging,
                                                             warp_uniform(ptx::shared_address(tables.full)),
                                                             warp_uniform(ptx::shared_address(tables.empty)));
  } else {
    bool const copies = ptx::elect();
    if (copies) {
      for (int i = 0; i < Tile::stages; ++i) {
        ptx::mbarrier_init(&tables.full[i], 1);
        ptx::mbarrier_init(&tables.empty[i], Tile::groups * 4 * (cm + cn - 1));  // warps that multiply
      }
      ptx::fence_mbarrier_init();
    }
    __syncwarp();
    if constexpr (alone) {
      ptx::bar_arrive(kMatrixReady, Tile::threads);
    } else {
      ptx::barrier_cluster_arrive();
      ptx::barrier_cluster_wait();
    }
    if (copies) {
      ptx::griddepcontrol_wait();
      matrix_copy<Tile, a_rows, b_rows, cm, cn, planes>(p, ring, tables.full, tables.empty);
      ptx::griddepcontrol_launch_dependents();
    }
  }
  if constexpr (!alone) {  // no block ends while the other gives back to it
    __syncwarp();
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
  }
}

// wgrad in parts: adds those of the tiles, as parts_sum has them. A lane's sums are pairs of neighbouring columns of
// two rows. turned: rows are filters, not channels.
template <class T, class Tile>
__global__ void __launch_bounds__(kPartsWarps * 32)
    matrix_sums(__grid_constant__ MatrixParams const p, int items, int slices, int rows, int columns, bool turned,
                void* out, int64_t stride) {
  int const item = parts_item(slices);
  int const thread = item % Tile::multiplying, lane = thread % 32;
  int const j = item / Tile::multiplying % (Tile::columns / 8), tile = item / (Tile::multiplying * (Tile::columns / 8));
  int const m = tile % p.tiles_m * Tile::rows + thread / 32 * 16, n = tile / p.tiles_m * Tile::columns + j * 8;
  bool const exists = item < items && m < rows && n < columns;
  float4 const sum = parts_sum(static_cast<float4 const*>(p.workspace) + item, items, exists ? p.parts : 0, slices);
  if (!exists || parts_slice(slices) > 0) return;
  T* const w = static_cast<T*>(out);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t pair = half == 0 ? pack<T>(sum.x, sum.y) : pack<T>(sum.z, sum.w);
    if (!turned) pair = ptx::movmatrix_trans(pair);
    int const row = m + half * 8 + (turned ? lane / 4 : lane % 4 * 2), column = n + (turned ? lane % 4 * 2 : lane / 4);
    if (row < rows && column < columns)
      *reinterpret_cast<uint32_t*>(w + (turned ? row * stride + column : column * stride + row)) = pair;
  }
}

// The same where channels are no vectors: rows are filters, and each part has them, and the channels, as far into its
// tiles as they lie behind a vector. Eight warps have every eighth part of 32 weights.
template <class T, class Tile>
__global__ void __launch_bounds__(256) matrix_sums_shifted(__grid_constant__ MatrixParams const p, int64_t part_sums,
                                                           int rows, int columns, void* out, int64_t stride) {
  __shared__ float sums[8][32];
  int const slice = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  int const column = int(blockIdx.x) * 32 + lane, row = int(blockIdx.y), of_row = slice & (p.period - 1);
  int const m = row + (of_row * p.side_a & 7), n = column + (of_row * p.side_b & 7), r = m % Tile::rows,
            c = n % Tile::columns;
  int64_t const tile = n / Tile::columns * p.tiles_m + m / Tile::rows;
  int const thread = r / 16 * 32 + r % 8 * 4 + c % 8 / 2;
  float const* const from = static_cast<float const*>(p.workspace) + slice * part_sums +
                            ((tile * (Tile::columns / 8) + c / 8) * Tile::multiplying + thread) * 4 + r % 16 / 8 * 2 +
                            c % 2;
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  float sum = 0;
#pragma unroll 8
  for (int part = slice; part < p.parts; part += 8)
    if (column < columns) sum += from[(part - slice) * part_sums];
  sums[slice][lane] = sum;
  __syncthreads();
  if (slice > 0 || column >= columns) return;
  for (int i = 1; i < 8; ++i) sum += sums[i][lane];
  static_cast<T*>(out)[row * stride + column] = narrow<T>(sum);
}

// A matrix of which the copy engine has boxes of so many elements of so many rows. L2 asks memory for 256 bytes at a
// time; of rows that begin within sectors, which are slowest, for 128, as that was measured to take 3 % less.
inline cudaError_t encode_matrix(CUtensorMap& map, void const* at, DType dtype, int64_t row_elements, int64_t rows,
                                 int64_t stride, int box_rows, int64_t images = 1, int64_t image_stride = 0,
                                 int box_elements = 64) {
  static auto const encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (encode == nullptr) return cudaErrorNotSupported;
  Encoded const e(Tensor4{at, dtype, {row_elements, rows, images, 1}, {1, stride, image_stride, 0}});
  cuuint32_t const box[4] = {cuuint32_t(box_elements), cuuint32_t(box_rows), 1, 1}, step[4] = {1, 1, 1, 1};
  return status(
      encode(&map, tensor_type(dtype), 4, const_cast<void*>(at), e.size, e.stride, box, step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             matrix_odd(row_elements) ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

// A launch whose params have the matrices.
template <Op op, class T, int tile_m, int tile_n, int cm, int cn, bool planes, bool in_parts = false>
cudaError_t start_matrix(MatrixParams& q, MatrixProduct const& product, Arguments const& args, cudaStream_t stream,
                         int64_t parts = 1) {
  using Tile = MatrixTile<tile_m, tile_n, matrix_b_rows(op, planes), !in_parts>;
  int64_t const units_m = ceil_div(product.rows, Tile::rows * cm),
                units = units_m * ceil_div(product.columns, Tile::columns * cn);
  q.units = int32_t(units * parts), q.steps = int32_t(ceil_div(product.depth, 64));
  q.last = int32_t(matrix_last(product.depth) / 16);
  q.tiles = Divisor(units), q.tiles_m = int32_t(units_m * cm), q.parts = int32_t(parts), q.workspace = args.workspace;
  q.bias = args.bias, q.bias_stride = args.bias_stride;
  auto* const kernel = matrix_kernel<T, tile_m, tile_n, op, cm, cn, planes, in_parts>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::shared_bytes);
  if (error != cudaSuccess) return error;
  int sm_count = 0;
  if ((error = count_sms(sm_count)) != cudaSuccess) return error;
  constexpr int blocks = cm * cn;
  int64_t const room = min64(units * parts, matrix_clusters(blocks, sm_count));
  q.n_first =
      matrix_n_first(units_m, units / units_m) || (planes && matrix_planes_n_first(tile_n, units_m, units / units_m));
  int64_t const first = q.n_first ? units / units_m : units_m;
  q.first = Divisor(first), q.rotates = !in_parts && room % first == 0;
  return launch_clusters(kernel, dim3(blocks), dim3(unsigned(room * blocks)), Tile::threads, Tile::shared_bytes, stream,
                         q);
}

template <Op op, DType dtype, int tile_m, int tile_n, int cm, int cn>
cudaError_t launch_matrix_by(Problem const& p, Arguments const& args, cudaStream_t stream) {
  using Tile = MatrixTile<tile_m, tile_n>;
  constexpr bool a_rows = matrix_a_rows(op, false), b_rows = matrix_b_rows(op, false);
  MatrixProduct const product(op, p);
  int64_t const x = matrix_stride(p.x, p), y = matrix_stride(p.y, p), w = p.w.n;
  int64_t const rows_a = a_rows ? product.depth : product.rows, rows_b = b_rows ? product.depth : product.columns;
  MatrixParams q{};
  q.channels = int32_t(product.rows);
  int const last = matrix_last(product.depth);
  auto encode = [&](CUtensorMap& a, CUtensorMap& b, int k) {
    cudaError_t const error = encode_matrix(a, b_rows ? args.a : args.b, dtype, product.side_a, rows_a, b_rows ? x : w,
                                            (a_rows ? k : Tile::rows) / cn, 1, 0, a_rows ? 64 : k);
    if (error != cudaSuccess) return error;
    return encode_matrix(b, b_rows ? args.b : args.a, dtype, product.side_b, rows_b, op == Op::fprop ? x : y,
                         (b_rows ? k : Tile::columns) / cm, 1, 0, b_rows ? 64 : k);
  };
  cudaError_t error = encode(q.a, q.b, 64);
  if (error == cudaSuccess && cm * cn == 1 && last < 64) error = encode(q.a_last, q.b_last, last);
  if (error != cudaSuccess) return error;
  error = encode_matrix(q.out, args.out, dtype, product.side_out, product.columns,
                        op == Op::fprop   ? y
                        : op == Op::dgrad ? x
                                          : w,
                        Tile::columns);
  if (error != cudaSuccess) return error;
  return start_matrix<op, typename TypeOf<dtype>::type, tile_m, tile_n, cm, cn, false>(q, product, args, stream);
}

// wgrad, the steps of a tile shared out among several blocks.
template <DType dtype, int tile_m, int tile_n, int cm, int cn>
cudaError_t launch_matrix_parts(Problem const& p, MatrixCut const& cut, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  using Tile = MatrixTile<tile_m, tile_n, true, false>;
  MatrixProduct const product = matrix_parts_product(p, cut.turned);
  int const period = matrix_period(p);
  int64_t const x = matrix_stride(p.x, p) * period, y = matrix_stride(p.y, p) * period;
  MatrixParams q{};
  q.once = period == 1 && reads_once(p);
  q.period = period, q.side_a = int32_t(product.side_a), q.side_b = int32_t(product.side_b);
  cudaError_t error = encode_matrix(q.a, cut.turned ? args.b : args.a, dtype, product.side_a * period, product.depth,
                                    cut.turned ? y : x, 64 / cn);
  if (error != cudaSuccess) return error;
  error = encode_matrix(q.b, cut.turned ? args.a : args.b, dtype, product.side_b * period, product.depth,
                        cut.turned ? x : y, 64 / cm);
  if (error != cudaSuccess) return error;
  q.narrow = period == 1 && cm * cn == 1;
  if (q.narrow && product.side_a % 64 != 0)
    error = encode_matrix(q.a_last, cut.turned ? args.b : args.a, dtype, product.side_a, product.depth,
                          cut.turned ? y : x, 64, 1, 0, int(product.side_a % 64));
  if (error == cudaSuccess && q.narrow && product.side_b % 64 != 0)
    error = encode_matrix(q.b_last, cut.turned ? args.a : args.b, dtype, product.side_b, product.depth,
                          cut.turned ? x : y, 64, 1, 0, int(product.side_b % 64));
  if (error != cudaSuccess) return error;
  error = start_matrix<Op::wgrad, T, tile_m, tile_n, cm, cn, false, true>(q, product, args, stream, cut.parts);
  if (error != cudaSuccess) return error;
  int const items = q.tiles.value * (cm * cn) * (Tile::columns / 8) * Tile::multiplying;
  if (period > 1)
    return launch_dependent(matrix_sums_shifted<T, Tile>, dim3(unsigned(ceil_div(p.C, 32)), unsigned(p.K)), 256, 0,
                            stream, q, int64_t(items) * 4, int(p.K), int(p.C), args.out, p.w.n);
  PartsLaunch const launch(items, cut.parts);
  return launch_dependent(matrix_sums<T, Tile>, launch.grid, launch.threads, launch.shared_bytes, stream, q, items,
                          launch.slices, int(product.rows), int(product.columns), cut.turned, args.out, p.w.n);
}

template <Op op, DType dtype, int tile_m, int tile_n>
cudaError_t launch_matrix_planes(Problem const& p, Arguments const& args, cudaStream_t stream) {
  MatrixProduct const product = matrix_planes_product(op, p);
  Strides const &in = op == Op::fprop ? p.x : p.y, &out = op == Op::fprop ? p.y : p.x;
  int64_t const pixels = p.H * p.W;
  MatrixParams q{};
  q.channels = int32_t(product.columns), q.runs = Divisor(ceil_div(pixels, 64)), q.pixels = int32_t(pixels);
  q.once = pixels_once(p);
  int const last = matrix_last(product.depth);
  int const end = int(pixels % 64);
  auto encode = [&](CUtensorMap& a, CUtensorMap& a_end, CUtensorMap& b, int k) {
    cudaError_t error = encode_matrix(a, args.a, dtype, pixels, product.depth, in.c, k, p.N, in.n);
    if (error == cudaSuccess && end > 0)
      error = encode_matrix(a_end, args.a, dtype, pixels, product.depth, in.c, k, p.N, in.n, end);
    if (error != cudaSuccess) return error;
    return encode_matrix(b, args.b, dtype, p.C, p.K, p.w.n, op == Op::fprop ? tile_m : k, 1, 0,
                         op == Op::fprop ? k : 64);
  };
  cudaError_t error = encode(q.a, q.a_end, q.b, 64);
  if (error == cudaSuccess && last < 64) error = encode(q.a_last, q.a_end_last, q.b_last, last);
  if (error != cudaSuccess) return error;
  error = encode_matrix(q.out, args.out, dtype, pixels, product.columns, out.c, tile_m, p.N, out.n);
  if (error != cudaSuccess) return error;
  return start_matrix<op, typename TypeOf<dtype>::type, tile_m, tile_n, 1, 1, true>(q, product, args, stream);
}

template <Op op, DType dtype, int tile_m, int tile_n>
cudaError_t launch_matrix(Problem const& p, Arguments const& args, cudaStream_t stream) {
  MatrixCut const cut = matrix_cut(op, tile_m, tile_n, p);
  MatrixCluster const cluster = cut.cluster;
  if constexpr (op == Op::wgrad) {
    if (cut.parts > 1)
      return cluster.m == 2   ? launch_matrix_parts<dtype, tile_m, tile_n, 2, 1>(p, cut, args, stream)
             : cluster.n == 2 ? launch_matrix_parts<dtype, tile_m, tile_n, 1, 2>(p, cut, args, stream)
                              : launch_matrix_parts<dtype, tile_m, tile_n, 1, 1>(p, cut, args, stream);
  }
  if constexpr (op == Op::wgrad || !matrix_alone(tile_m, tile_n)) {
    if (cluster.blocks() == 4) return launch_matrix_by<op, dtype, tile_m, tile_n, 2, 2>(p, args, stream);
    if (cluster.m == 2) return launch_matrix_by<op, dtype, tile_m, tile_n, 2, 1>(p, args, stream);
    if (cluster.n == 2) return launch_matrix_by<op, dtype, tile_m, tile_n, 1, 2>(p, args, stream);
  }
  return launch_matrix_by<op, dtype, tile_m, tile_n, 1, 1>(p, args, stream);
}

}  // namespace conv2d_ext::tma

#define CONV2D_EXT_TMA_MATRIX_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                    \
    return tma::launch_matrix<Op::op, DType::dtype, tm, tn>(p, args, stream);  \
  }

#define CONV2D_EXT_PIXEL_MATRIX_INSTANCE(family, op, dtype, tm, tn, tk, variant)     \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                          \
    return tma::launch_matrix_planes<Op::op, DType::dtype, tm, tn>(p, args, stream); \
  }
