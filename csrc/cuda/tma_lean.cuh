// Small dense problems in channels_last: fprop, dgrad of one phase and wgrad as an implicit GEMM, as in tma.cuh, but
// one tile of TM x TN a block, and nothing that many tiles would need: no persistent blocks, phases or rows of padded
// columns. What a launch loses beside its products is what is left out here; so groups have kernels of their own, in
// which their tiles follow each other.
// fprop and dgrad: out[pixel, n] = sum over taps and channels of A[moved pixel, channel] * B[n, tap, channel].
// wgrad: w[k, tap, c] = sum over pixels of A[pixel, k] * B[moved pixel, c]; a tile is of one tap.
//
// A warp copies A and another B, each with barriers of its own, which it sets up itself: the first trip round the ring
// is asked for before the block meets. A stage is two steps, of large tiles one. One to three warpgroups multiply, 64
// rows each, and store from registers.
//
// 1x1 filters over NCHW in 16-bit types (planes) have channels as the rows of a tile and pixels as its columns (wgrad:
// as its sums), which boxes bring as they lie: runs of 64 of an image. A tile's runs may be of several images.
//
// A split of the reduction is a cluster, whose blocks have a part of the steps each. Every block adds some columns of
// the tile: the others write theirs into its shared memory, and it adds all in their order. There is no second launch.
#pragma once

#include <type_traits>

#include "../core/lean.h"
#include "tma.cuh"

namespace conv2d_ext::tma {

constexpr int kLeanStages = 8;  // at most

struct LeanParams {
  CUtensorMap a, b;
  Divisor columns, rows;  // of an image of the result; wgrad: of y
  Divisor tiles_n;        // wgrad: blockIdx.x counts them for each tap
  Divisor taps, taps_w;   // of the filter
  int32_t M, N;           // of the result
  int32_t steps, share;   // in all; of a block
  int32_t splits, per;    // blocks of a cluster; blocks of 8 columns whose sums one adds
  int32_t stages;
  int32_t h0, w0, stride_h, stride_w;  // of A's pixels; wgrad: of B's
  int32_t tap_h, tap_w;
  int32_t first_r, first_s, step_r, step_s;
  int64_t out_n, out_h, out_w;        // wgrad: from filter to filter, from tap to tap
  int64_t out_c = 1;                  // from column to column
  bool vectors = true, pairs = true;  // 8 columns may be stored at once; two
  void const* bias;
  int64_t bias_stride;
  void* out;
};

// line: bytes of the reduction of a step (wgrad: 128 for 64 pixels). across: elements of 128 bytes.
template <int TM, int TN, int line, int across = 64, bool large = false>
struct LeanShape {
  static constexpr int multiplying = TM / 64 * kWarpgroup, threads = multiplying + 2 * 32;
  static constexpr int steps = large ? 1 : line == 64 ? 3 : 2;    // of a stage
  static constexpr int a_bytes = TM * line, b_bytes = TN * line;  // of a step
  // N-major operands are copied in runs of 128 bytes of columns, B in runs of all if there are fewer.
  static constexpr int columns = TN < across ? TN : across, run_bytes = across * line, b_run_bytes = columns * line;
  static constexpr int stage_bytes = steps * (a_bytes + b_bytes);
};

template <class T, int TM, int TN, int line, int across = kLineBytes / int(sizeof(T))>
using LeanShapeOf = LeanShape<TM, TN, line, across, sizeof(T) == 2 && lean_large(DType::f16, TM, TN)>;

struct LeanTables {
  uint64_t full_a[kLeanStages], full_b[kLeanStages], empty[kLeanStages], parts;
};

// The steps of one of the two copying threads.
template <class T, int TM, int TN, int line, bool a_rows, bool b_rows, bool of_a, bool groups = false>
struct LeanCopies {
  static constexpr int chunk_size = line / int(sizeof(T)), across = kLineBytes / int(sizeof(T));
  using S = LeanShapeOf<T, TM, TN, line, across>;
  int32_t left, chunk, tap_h, tap_w;  // wgrad: chunk counts steps of pixels
  int32_t n, h, w, first, bytes;
  int32_t group;
  uint32_t to;
  Stage stage;

  // tap: of wgrad; of groups the group.
  __device__ void begin(LeanParams const& p, uint32_t ring, int begin, int count, int n_tile, int tap) {
    left = count, chunk = begin, tap_h = tap_w = 0, group = groups ? tap : 0;
    to = ring + (of_a ? 0 : S::steps * S::a_bytes);
    first = of_a ? int(blockIdx.y) * TM : n_tile * TN;
    if constexpr (a_rows) {
      tap_w = tap, tap_h = p.taps_w.divide(tap_w);
      bytes = of_a ? min(TM / across, (p.M - first + across - 1) / across) * S::run_bytes
                   : min((TN + across - 1) / across, (p.N - first + across - 1) / across) * S::b_run_bytes;
    } else {
      if (p.taps > 1 && begin > 0) {
        tap_w = begin, chunk = p.taps.divide(tap_w);
        tap_h = p.taps_w.divide(tap_w);
      }
      if (of_a) {
        int j = first;
        int i = p.columns.divide(j);
        n = p.rows.divide(i);
        h = p.h0 + i * p.stride_h, w = p.w0 + j * p.stride_w;
      }
      bytes = of_a     ? S::a_bytes
              : b_rows ? min((TN + across - 1) / across, (p.N - first + across - 1) / across) * S::b_run_bytes
                       : min(TN, p.N) * line;
    }
  }

  __device__ void copy(LeanParams const& p, uint32_t at, uint32_t full) {
    if constexpr (a_rows) {
      int j = chunk * chunk_size;
      int i = p.columns.divide(j);
      int const image = p.rows.divide(i);
      if constexpr (!of_a) i = p.h0 + i * p.stride_h, j = p.w0 + j * p.stride_w;
#pragma unroll 1
      for (int run = 0; run * S::run_bytes < bytes; ++run)
        ptx::cp_async_bulk_tensor_im2col(at + run * S::run_bytes, of_a ? &p.a : &p.b, full, first + run * across, j, i,
                                         image, of_a ? 0 : tap_w * p.tap_w, of_a ? 0 : tap_h * p.tap_h);
      ++chunk;
      return;
    } else {
      if constexpr (of_a && groups) {
        ptx::cp_async_bulk_tensor_im2col_5d(at, &p.a, full, chunk * chunk_size, w, h, n, group, tap_w * p.tap_w,
                                            tap_h * p.tap_h);
      } else if constexpr (of_a) {
        ptx::cp_async_bulk_tensor_im2col(at, &p.a, full, chunk * chunk_size, w, h, n, tap_w * p.tap_w, tap_h * p.tap_h);
      } else {
        int const r = p.first_r + tap_h * p.step_r, s = p.first_s + tap_w * p.step_s;
        if constexpr (b_rows) {
#pragma unroll 1
          for (int run = 0; run * S::b_run_bytes < bytes; ++run)
            ptx::cp_async_bulk_tensor_5d(at + run * S::b_run_bytes, &p.b, full, first + run * across, s, r,
                                         chunk * chunk_size, group);
        } else {
          ptx::cp_async_bulk_tensor_5d(at, &p.b, full, chunk * chunk_size, s, r, first, group);
        }
      }
      if (p.taps == 1) {
        ++chunk;
        return;
      }
      if (++tap_w < p.taps_w) return;
      tap_w = 0;
      if (++tap_h * p.taps_w < p.taps) return;
      tap_h = 0, ++chunk;
    }
  }

  // The steps of a stage.
  __device__ void copy_stage(LeanParams const& p, LeanTables& tables) {
    int const steps = min(left, S::steps);
    uint32_t const full = ptx::shared_address(of_a ? &tables.full_a[stage.index] : &tables.full_b[stage.index]);
    ptx::mbarrier_arrive_expect_tx(full, steps * bytes);
    uint32_t at = to + stage.index * S::stage_bytes;
#pragma unroll 1
    for (int i = 0; i < steps; ++i, at += of_a ? S::a_bytes : S::b_bytes) copy(p, at, full);
    left -= steps;
  }
};

// The steps of one of the two copying threads for 1x1 filters over NCHW, whose images are planes of pixels: fprop and
// dgrad have runs of pixels as columns (TF32: an image's), wgrad sums over those of one image after the other.
template <class T, int TM, int TN, bool a_rows, bool b_rows, bool of_a>
struct PlaneCopies {
  static constexpr int across = kLineBytes / int(sizeof(T));
  using S = LeanShapeOf<T, TM, TN, kLineBytes>;
  static constexpr bool wgrad = !a_rows && !b_rows, rows = of_a ? a_rows : b_rows;
  static constexpr bool of_images = rows && !of_a && sizeof(T) == 2;  // runs may be of several
  static constexpr int most_runs = of_images ? TN / across : 1;
  int32_t left, chunk, image, first, runs;
  int32_t pixel[most_runs], images[most_runs];
  uint32_t to;
  Stage stage;

  __device__ void begin(LeanParams const& p, uint32_t ring, int begin, int count, int n_tile, int of_tile) {
    left = count, chunk = begin, image = wgrad ? p.taps.divide(chunk) : of_a ? 0 : of_tile;
    to = ring + (of_a ? 0 : S::steps * S::a_bytes);
    first = of_a ? int(blockIdx.y) * TM : n_tile * TN;
    runs = rows ? min((of_a ? TM : TN) / across, ((of_a ? p.M : p.N) - first + across - 1) / across) : 1;
    if constexpr (of_images) {
#pragma unroll
      for (int i = 0; i < most_runs; ++i) {
        int run = n_tile * most_runs + i;  // beyond the last image there are zeros
        images[i] = p.columns.divide(run);
        pixel[i] = run * across;
      }
      runs = most_runs;
    }
  }

  __device__ void copy_stage(LeanParams const& p, LeanTables& tables) {
    constexpr int step_bytes = of_a ? S::a_bytes : S::b_bytes;
    int const steps = min(left, S::steps);
    uint64_t* const full = of_a ? &tables.full_a[stage.index] : &tables.full_b[stage.index];
    ptx::mbarrier_arrive_expect_tx(full, steps * (rows ? runs * S::run_bytes : step_bytes));
    uint32_t at = to + stage.index * S::stage_bytes;
#pragma unroll 1
    for (int i = 0; i < steps; ++i, at += step_bytes) {
      void const* const map = of_a ? &p.a : &p.b;
      if constexpr (of_images) {
#pragma unroll
        for (int run = 0; run < most_runs; ++run)
          ptx::cp_async_bulk_tensor_4d(at + run * S::run_bytes, map, full, pixel[run], chunk * across, images[run], 0);
      } else if constexpr (rows) {
#pragma unroll 1
        for (int run = 0; run < runs; ++run)
          ptx::cp_async_bulk_tensor_4d(at + run * S::run_bytes, map, full, first + run * across, chunk * across, image,
                                       0);
      } else {
        ptx::cp_async_bulk_tensor_4d(at, map, full, chunk * across, first, image, 0);
      }
      ++chunk;
      if (wgrad && chunk == p.taps.value) chunk = 0, ++image;
    }
    left -= steps;
  }
};

// Before the barriers are known to others: the first trip round the ring.
template <bool of_a, class Copies>
__device__ inline void first_trip(Copies& copies, LeanParams const& p, LeanTables& tables) {
#pragma unroll 1
  for (int i = 0; i < p.stages; ++i) {
    ptx::mbarrier_init(of_a ? &tables.full_a[i] : &tables.full_b[i], 1);
    ptx::fence_mbarrier_init();
    copies.stage.index = i;
    if (copies.left > 0) copies.copy_stage(p, tables);
  }
  copies.stage.index = 0;
}
template <class Copies>
__device__ inline void other_trips(Copies& copies, LeanParams const& p, LeanTables& tables) {
#pragma unroll 1
  for (; copies.left > 0; copies.stage.advance(p.stages)) {
    ptx::mbarrier_wait(&tables.empty[copies.stage.index], copies.stage.parity);
    copies.copy_stage(p, tables);
  }
}

// Stores a thread's pairs of 8 columns; column: of the pairs in a row of the result, or -1.
// apart: they may be apart.
template <class T, bool apart = true>
__device__ void lean_store_block(LeanParams const& p, float const* acc, int64_t const (&out)[2], int64_t column) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (out[half] < 0 || column < 0) continue;
    Vector<T, 2> const v{narrow<T>(acc[half * 2]), narrow<T>(acc[half * 2 + 1])};
    T* const to = static_cast<T*>(p.out) + out[half] + column * p.out_c;
    if (!apart || p.pairs) {
      *reinterpret_cast<Vector<T, 2>*>(to) = v;
      continue;
    }
    to[0] = v.v[0];
    if (column + 1 < p.N) to[p.out_c] = v.v[1];
  }
}

// Adds what a cluster's blocks have of a tile, acc, and calls use(sums, i) for those of 8 columns that are this
// block's: every splits-th, so that the blocks send to each other, not all to the first one first. A thread's sums go
// to the thread of the same number there, or stay. parts: where they arrive, behind the ring.
template <int blocks, int threads, class Use>
__device__ __forceinline__ void lean_add_parts(LeanParams const& p, uint32_t parts, LeanTables& tables, int rank,
                                               float const* acc, Use use) {
  uint32_t const mine = parts + int(threadIdx.x) * 16, bar = ptx::shared_address(&tables.parts);
  int const part_bytes = p.per * threads * 16;
  ptx::barrier_cluster_wait();  // the others have set up their barriers
  uint32_t at = mine + rank * part_bytes;
  int to = 0;
#pragma unroll
  for (int j = 0; j < blocks; ++j) {
    if (to == rank)
      ptx::st_shared_v4(at, make_uint4(__float_as_uint(acc[j * 4]), __float_as_uint(acc[j * 4 + 1]),
                                       __float_as_uint(acc[j * 4 + 2]), __float_as_uint(acc[j * 4 + 3])));
    else
      ptx::st_async_v4(ptx::mapa(at, to), acc + j * 4, ptx::mapa(bar, to));
    if (++to == p.splits) to = 0, at += threads * 16;
  }
  ptx::mbarrier_wait_cluster(bar, 0);
#pragma unroll 1
  for (int j = rank, i = 0; j < blocks; j += p.splits, ++i) {
    float sum[4] = {};
    uint32_t from = mine + i * (threads * 16);
#pragma unroll 4
    for (int s = 0; s < p.splits; ++s, from += part_bytes) {
      uint4 const v = ptx::ld_shared_v4(from);
      sum[0] += __uint_as_float(v.x), sum[1] += __uint_as_float(v.y), sum[2] += __uint_as_float(v.z),
          sum[3] += __uint_as_float(v.w);
    }
    use(sum, j);
  }
}

// gathered: B came by plain copies, its columns are the pixels of all images (tma_lean_gather.cuh). groups: tap is the
// group.
template <class T, int TM, int TN, int line, bool a_rows, bool b_rows, bool planes, bool gathered = false,
          bool groups = false>
__device__ void lean_multiply(LeanParams const& p, uint32_t ring, LeanTables& tables, int count, int rank, int n_tile,
                              int tap) {
  using S = LeanShapeOf<T, TM, TN, line>;
  constexpr bool apart = !planes && (sizeof(T) == 4 || !lean_large(DType::f16, TM, TN));  // lean_stores_apart
  constexpr int column_bytes = S::columns * int(sizeof(T)), core_b = 8 * column_bytes;    // of a line of B, N-major
  constexpr uint32_t step_a = a_rows ? 2 * kCoreBytes : 32, step_b = b_rows ? 2 * core_b : 32;
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), warp = int(threadIdx.x) / 32 % 4;
  int const lane = int(threadIdx.x) % 32, quad = lane % 4;
  uint64_t const lines = layout_of(line),
                 layout_a = a_rows ? ptx::wgmma_descriptor(0, S::run_bytes, kCoreBytes) : lines;
  uint64_t layout_b = lines;
  if constexpr (b_rows) layout_b = ptx::wgmma_descriptor<column_bytes>(0, S::b_run_bytes, core_b);
  int const n = n_tile * TN + quad * 2;
  float acc[TN / 2];
#pragma unroll
  for (int i = 0; i < TN / 2; ++i) acc[i] = 0;
  constexpr bool late = TM * TN > 64 * 128;  // bias is loaded behind the products, for want of registers
  Vector<T, 2> bias[late ? 1 : TN / 8];
  bool const biased = !planes && !a_rows && p.bias != nullptr;
  int64_t const group_column = groups ? int64_t(tap) * p.N : 0;  // the group's first
  auto biases = [&] { return static_cast<T const*>(p.bias) + group_column * p.bias_stride; };
  if (!late && biased && p.splits == 1) {
    T const* const from = biases();
#pragma unroll
    for (int j = 0; j < TN / 8; ++j) {
      int const at = n + j * 8;
      bias[late ? 0 : j] = {narrow<T>(0.0f), narrow<T>(0.0f)};
      if (at < p.N) bias[late ? 0 : j] = {from[at * p.bias_stride], from[min(at + 1, p.N - 1) * p.bias_stride]};
    }
  }
  int64_t out[2];
  float row_bias[2] = {};  // planes
  int tap_w = tap;
  int const tap_h = a_rows && !planes ? p.taps_w.divide(tap_w) : 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const m = int(blockIdx.y) * TM + group * 64 + warp * 16 + lane / 4 + half * 8;
    if constexpr (planes) {
      out[half] = m >= p.M ? -1 : m * p.out_h;
      if (!a_rows && b_rows && p.bias != nullptr && m < p.M)
        row_bias[half] = widen(static_cast<T const*>(p.bias)[m * p.bias_stride]);
      continue;
    }
    int j = m, i = p.columns.divide(j), image = p.rows.divide(i);
    out[half] = m >= p.M ? -1
                : a_rows ? m * p.out_n + tap_h * p.out_h + tap_w * p.out_w
                         : image * p.out_n + i * p.out_h + j * p.out_w + group_column * p.out_c;
  }
  // Where a column of the tile is in a row of the result. -1: nowhere.
  auto column_of = [&](int column) -> int64_t {
    if constexpr (gathered) {
      int pixel = n_tile * TN + column;
      int const image = p.columns.divide(pixel);
      return image < p.taps.value ? image * p.out_n + pixel : -1;
    } else if constexpr (planes && b_rows) {
      int run = n_tile * (TN / 64) + column / 64;
      int const image = p.columns.divide(run), pixel = run * 64 + column % 64;
      return image < p.taps.value && pixel < p.N ? image * p.out_n + pixel : -1;
    } else {
      int const at = n_tile * TN + column;
      return at < p.N ? at : -1;
    }
  };
  uint32_t const my_ring = ring + group * (64 * line);
  Stage stage;
  int before = -1;
#pragma unroll 1
  for (int step = 0; step < count; step += S::steps, stage.advance(p.stages)) {
    ptx::mbarrier_wait(&tables.full_a[stage.index], stage.parity);
    ptx::mbarrier_wait(&tables.full_b[stage.index], stage.parity);
    if constexpr (gathered) ptx::fence_proxy_async();  // cp.async wrote through the generic proxy
    uint32_t const from_a = my_ring + stage.index * S::stage_bytes,
                   from_b = ring + stage.index * S::stage_bytes + S::steps * S::a_bytes;
#pragma unroll
    for (int t = 0; t < S::steps; ++t) {
      if (step + t >= count) break;
      ptx::wgmma_fence_operand(acc);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < line / 32; ++k)
        ptx::wgmma_mma_async<T, a_rows, b_rows>(acc, at_address(layout_a, from_a + t * S::a_bytes + k * step_a),
                                                at_address(layout_b, from_b + t * S::b_bytes + k * step_b));
      // In the same block of instructions: a group begun elsewhere would be a second one, of nothing.
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(acc);
      if (t == 0 && lane == 0 && before >= 0) ptx::mbarrier_arrive(&tables.empty[before]);
    }
    before = stage.index;
  }
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_fence_operand(acc);
  if (p.splits > 1) {
    lean_add_parts<TN / 8, S::multiplying>(
        p, ring + p.stages * S::stage_bytes, tables, rank, acc, [&](float* sum, int j) {
          int const at = n + j * 8;
          if (biased && at < p.N) {
            T const* const from = biases();
            float const low = widen(from[at * p.bias_stride]), high = widen(from[min(at + 1, p.N - 1) * p.bias_stride]);
            sum[0] += low, sum[1] += high, sum[2] += low, sum[3] += high;
          }
          if constexpr (planes)
            sum[0] += row_bias[0], sum[1] += row_bias[0], sum[2] += row_bias[1], sum[3] += row_bias[1];
          lean_store_block<T, apart>(p, sum, out, column_of(j * 8 + quad * 2));
        });
    return;
  }
  if constexpr (planes)
#pragma unroll
    for (int i = 0; i < TN / 2; ++i) acc[i] += row_bias[i / 2 % 2];
  if (biased) {
    T const* const from = biases();
#pragma unroll
    for (int j = 0; j < TN / 8; ++j) {
      if constexpr (late) {
        int const at = n + j * 8;
        if (at >= p.N) continue;
        float const low = widen(from[at * p.bias_stride]), high = widen(from[min(at + 1, p.N - 1) * p.bias_stride]);
        acc[j * 4] += low, acc[j * 4 + 1] += high, acc[j * 4 + 2] += low, acc[j * 4 + 3] += high;
        continue;
      }
      Vector<T, 2> const its = bias[late ? 0 : j];
      acc[j * 4] += widen(its.v[0]), acc[j * 4 + 1] += widen(its.v[1]);
      acc[j * 4 + 2] += widen(its.v[0]), acc[j * 4 + 3] += widen(its.v[1]);
    }
  }
  if (sizeof(T) == 4 || (apart && !p.vectors)) {
#pragma unroll
    for (int j = 0; j < TN / 8; ++j) lean_store_block<T, apart>(p, acc + j * 4, out, column_of(j * 8 + quad * 2));
  } else {
    // Four lanes exchange their words of four blocks of 8 columns, so that each stores one block of a row at once.
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < TN / 8; j += 4) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = pack<T>(acc[(j + i) * 4 + half * 2], acc[(j + i) * 4 + half * 2 + 1]);
        transpose_quad(v);
        if constexpr (gathered) {  // half a block may be of another image
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            int64_t const column = column_of((j + quad) * 8 + i * 4);
            if (out[half] >= 0 && column >= 0)
              *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + out[half] + column) =
                  make_uint2(v[i * 2], v[i * 2 + 1]);
          }
          continue;
        }
        int64_t const column = column_of((j + quad) * 8);
        if (out[half] >= 0 && column >= 0)
          *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + out[half] + column) = make_uint4(v[0], v[1], v[2], v[3]);
      }
  }
}

// What a block does beside its products. `prepare` is for the warps that multiply, before the block meets.
template <class S, int units, class CopiesA, class CopiesB, class Prepare, class Multiply>
__device__ __forceinline__ void lean_block(LeanParams const& p, uint32_t ring, LeanTables& tables, int n_tile, int tap,
                                           Prepare prepare, Multiply multiply) {
  int const warp = warp_uniform(int(threadIdx.x) / 32), copier = warp - S::multiplying / 32, rank = int(blockIdx.z);
  int const begin = rank * p.share, count = max(min(p.share, p.steps - begin), 0);
  CopiesA copies_a;
  CopiesB copies_b;
  if (copier == 0) {
    if (ptx::elect()) {
      ptx::griddepcontrol_wait();
      copies_a.begin(p, ring, begin, count, n_tile, tap);
      first_trip<true>(copies_a, p, tables);
    }
  } else if (copier == 1) {
    if (ptx::elect()) {
      ptx::griddepcontrol_wait();
      copies_b.begin(p, ring, begin, count, n_tile, tap);
      first_trip<false>(copies_b, p, tables);
    }
  } else {
    if (warp == 0 && ptx::elect()) {
      for (int i = 0; i < p.stages; ++i) ptx::mbarrier_init(&tables.empty[i], S::multiplying / 32);
      ptx::mbarrier_init(&tables.parts, 1);
      ptx::fence_mbarrier_init();
      if (p.splits > 1) {
        int const mine = (units + p.splits - 1 - rank) / p.splits;
        ptx::mbarrier_arrive_expect_tx(&tables.parts, (p.splits - 1) * mine * S::multiplying * 16);
      }
    }
    prepare();
  }
  __syncwarp();
  __syncthreads();
  if (p.splits > 1) ptx::barrier_cluster_arrive_relaxed();
  if (copier < 0) {
    ptx::griddepcontrol_wait();
    multiply(count, rank);
  } else {
    if (ptx::elect()) {
      if (copier == 0) {
        other_trips(copies_a, p, tables);
        ptx::griddepcontrol_launch_dependents();
      } else {
        other_trips(copies_b, p, tables);
      }
    }
    __syncwarp();
    if (p.splits > 1) ptx::barrier_cluster_wait();
  }
}

template <class T, int TM, int TN, int line, bool a_rows, bool b_rows, bool planes = false>
__global__ void __launch_bounds__(LeanShape<TM, TN, line>::threads, TM == 64 ? 2 : 1)
    lean_kernel(__grid_constant__ LeanParams const p) {
  using S = LeanShapeOf<T, TM, TN, line>;
  extern __shared__ uint8_t dynamic[];
  __shared__ LeanTables tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int n_tile = int(blockIdx.x), tap = 0;
  if constexpr (a_rows && !planes) tap = p.tiles_n.divide(n_tile);
  using A = std::conditional_t<planes, PlaneCopies<T, TM, TN, a_rows, b_rows, true>,
                               LeanCopies<T, TM, TN, line, a_rows, b_rows, true>>;
  using B = std::conditional_t<planes, PlaneCopies<T, TM, TN, a_rows, b_rows, false>,
                               LeanCopies<T, TM, TN, line, a_rows, b_rows, false>>;
  lean_block<S, TN / 8, A, B>(
      p, ring, tables, n_tile, tap, [] {},
      [&](int count, int rank) {
        lean_multiply<T, TM, TN, line, a_rows, b_rows, planes>(p, ring, tables, count, rank, n_tile, tap);
      });
}

// Groups of fprop and dgrad: blockIdx.x counts the tiles of each (tiles_n), which is a dimension of both maps.
template <class T, int TM, int TN, int line, bool b_rows>
__global__ void __launch_bounds__(LeanShape<TM, TN, line>::threads, 2)
    lean_groups_kernel(__grid_constant__ LeanParams const p) {
  using S = LeanShapeOf<T, TM, TN, line>;
  extern __shared__ uint8_t dynamic[];
  __shared__ LeanTables tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int n_tile = int(blockIdx.x);
  int const group = p.tiles_n.divide(n_tile);
  using A = LeanCopies<T, TM, TN, line, false, b_rows, true, true>;
  using B = LeanCopies<T, TM, TN, line, false, b_rows, false, true>;
  lean_block<S, TN / 8, A, B>(
      p, ring, tables, n_tile, group, [] {},
      [&](int count, int rank) {
        lean_multiply<T, TM, TN, line, false, b_rows, false, false, true>(p, ring, tables, count, rank, n_tile, group);
      });
}

// Sets a ring's stages and says what shared memory a block of `blocks` takes. in_ring: what the blocks of a cluster
// send each other takes the ring's place.
template <class S>
int lean_ring(LeanParams& q, int64_t blocks, bool in_ring) {
  constexpr bool two = S::multiplying > kWarpgroup;
  int64_t const splits = q.splits;
  // Two or three blocks share an SM where there are so many.
  int64_t const sent = splits == 1 ? 0 : splits * q.per * S::multiplying * 16, parts = in_ring ? 0 : sent;
  int64_t const room = (blocks <= 132 ? 224 : blocks <= 264 || two ? 111 : 73) * 1024 - 2048 - parts;
  int64_t const shared = ceil_div(q.share, S::steps);
  // A stage is given back when the next one has arrived.
  q.stages = int32_t(min64(max64(min64(room / S::stage_bytes, kLeanStages), 2), shared));
  if (in_ring) q.stages = int32_t(max64(q.stages, ceil_div(sent, S::stage_bytes)));
  return int(q.stages * S::stage_bytes + parts + 1024);
}

template <class P>
cudaError_t launch_lean_grid(void (*kernel)(P), P const& q, dim3 grid, int64_t splits, int threads, int shared_bytes,
                             cudaStream_t stream) {
  auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 224 * 1024);
  if (error != cudaSuccess) return error;
  return launch_clusters(kernel, dim3(1, 1, unsigned(splits)), grid, threads, shared_bytes, stream, q);
}

// clusters: of a tile.
template <class S, class P>
cudaError_t start_lean(void (*kernel)(P), P& q, int64_t tiles_n, int64_t tiles_m, cudaStream_t stream,
                       int threads = S::threads, int64_t clusters = 1, bool in_ring = false) {
  int const shared_bytes = lean_ring<S>(q, tiles_n * tiles_m * q.splits * clusters, in_ring);
  dim3 const grid(unsigned(tiles_n), unsigned(tiles_m), unsigned(q.splits * clusters));
  return launch_lean_grid(kernel, q, grid, q.splits, threads, shared_bytes, stream);
}

// How the columns of a result in these strides are stored.
inline void lean_stores(LeanParams& q, Problem const& p, Strides const& out, int align) {
  q.out_n = out.n, q.out_h = out.h, q.out_w = out.w, q.out_c = out.c;
  q.vectors = channel_vectors(out, align, q.N, 8, p.dtype), q.pairs = channel_vectors(out, align, q.N, 2, p.dtype);
}

template <Op op, DType dtype, int TM, int TN, int line, bool groups = false>
cudaError_t launch_lean_lines(Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  using S = LeanShapeOf<T, TM, TN, line>;
  constexpr bool forward = op == Op::fprop, wgrad = op == Op::wgrad, b_rows = !forward;
  constexpr int chunk_size = line / int(sizeof(T));
  constexpr Op walked = wgrad ? Op::fprop : op;
  Walk const h = walk_h(walked, p, 0), w = walk_w(walked, p, 0);
  int64_t const C = op == Op::dgrad ? p.K_per_group() : p.C_per_group(), splits = plan.split_k;
  int64_t const in_H = op == Op::dgrad ? p.P() : p.H, in_W = op == Op::dgrad ? p.Q() : p.W;
  Strides const &in = op == Op::dgrad ? p.y : p.x, &out = forward ? p.y : wgrad ? p.w : p.x;
  int64_t const pixels = p.N * h.pixels * w.pixels, taps = h.taps * w.taps;
  LeanParams q{};
  q.columns = Divisor(w.pixels), q.rows = Divisor(h.pixels);
  q.taps_w = Divisor(w.taps), q.taps = Divisor(taps);
  q.M = int32_t(wgrad ? p.K : pixels), q.N = int32_t(forward ? p.K_per_group() : p.C_per_group());
  q.tiles_n = Divisor(ceil_div(q.N, TN));
  q.steps = int32_t(wgrad ? ceil_div(pixels, 64) : ceil_div(C, chunk_size) * taps);
  q.splits = int32_t(splits), q.share = int32_t(ceil_div(q.steps, splits)), q.per = int32_t(ceil_div(TN / 8, splits));
  q.h0 = int32_t(h.lower), q.w0 = int32_t(w.lower);
  q.stride_h = int32_t(h.stride), q.stride_w = int32_t(w.stride);
  q.tap_h = int32_t(h.tap_stride), q.tap_w = int32_t(w.tap_stride);
  q.first_r = int32_t(h.first_tap), q.step_r = int32_t(h.tap_step);
  q.first_s = int32_t(w.first_tap), q.step_s = int32_t(w.tap_step);
  lean_stores(q, p, out, forward ? p.y_align : wgrad ? p.w_align : p.x_align);
  q.bias = args.bias, q.bias_stride = args.bias_stride, q.out = args.out;
  int64_t const channels = wgrad ? lean_channels(C, in, dtype) : C;
  Tensor4 const walks{args.a, p.dtype, {channels, in_W, in_H, p.N}, {1, in.w, in.h, in.n}, sizeof(T) == 4};
  cudaError_t error;
  if constexpr (wgrad) {
    Tensor4 const y{args.b, p.dtype, {lean_channels(p.K, p.y, dtype), p.Q(), p.P(), p.N}, {1, p.y.w, p.y.h, p.y.n}};
    if ((error = encode_im2col(q.a, y, Walk{p.P(), 1}, Walk{p.Q(), 1}, 64, 64)) != cudaSuccess) return error;
    error = encode_im2col(q.b, walks, h, w, 64, 64);
  } else {
    error = encode_im2col(q.a, walks, h, w, chunk_size, TM, groups ? p.groups : 0);
    if (error != cudaSuccess) return error;
    error = encode_filters(q.b, args.b, p, b_rows ? S::columns : chunk_size, b_rows ? chunk_size : int(min64(TN, q.N)),
                           sizeof(T) == 4);
  }
  if (error != cudaSuccess) return error;
  if constexpr (groups)
    return start_lean<S>(lean_groups_kernel<T, TM, TN, line, b_rows>, q, q.tiles_n.value * p.groups, ceil_div(q.M, TM),
                         stream);
  else
    return start_lean<S>(lean_kernel<T, TM, TN, line, wgrad, b_rows>, q, q.tiles_n.value * (wgrad ? taps : 1),
                         ceil_div(q.M, TM), stream);
}

template <Op op, DType dtype, int TM, int TN>
cudaError_t launch_lean_planes(Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool forward = op == Op::fprop, wgrad = op == Op::wgrad;
  constexpr int run = kLineBytes / int(sizeof(T));
  int64_t const pixels = p.H * p.W, depth = forward ? p.C : wgrad ? pixels : p.K, chunks = ceil_div(depth, run);
  LeanParams q{};
  q.M = int32_t(op == Op::dgrad ? p.C : p.K), q.N = int32_t(wgrad ? p.C : pixels);
  // fprop and dgrad: taps are images here, columns the runs of one.
  int64_t const runs = ceil_div(pixels, run), tiles_n = wgrad ? ceil_div(p.C, TN) : ceil_div(p.N * runs, TN / run);
  q.columns = Divisor(runs), q.rows = q.taps_w = q.tiles_n = Divisor(1), q.taps = Divisor(wgrad ? chunks : p.N);
  q.steps = int32_t(wgrad ? p.N * chunks : chunks), q.splits = plan.split_k;
  q.share = int32_t(ceil_div(q.steps, q.splits)), q.per = int32_t(ceil_div(TN / 8, q.splits));
  q.out_h = forward ? p.y.c : wgrad ? p.w.n : p.x.c, q.out_n = forward ? p.y.n : wgrad ? 0 : p.x.n;
  q.bias = args.bias, q.bias_stride = args.bias_stride, q.out = args.out;
  auto image = [&](void const* at, int64_t channels, Strides const& s) {
    return Tensor4{at, dtype, {pixels, channels, p.N, 1}, {1, s.c, s.n, 0}, sizeof(T) == 4};
  };
  Tensor4 const w{args.b, dtype, {p.C, p.K, 1, 1}, {1, p.w.n, 0, 0}};
  cudaError_t error = wgrad ? encode_tiled(q.a, image(args.b, p.K, p.y), run, TM, 1, 1)
                            : encode_tiled(q.a, w, run, forward ? TM : run, 1, 1);
  if (error != cudaSuccess) return error;
  error = encode_tiled(q.b, forward || wgrad ? image(args.a, p.C, p.x) : image(args.a, p.K, p.y), run, wgrad ? TN : run,
                       1, 1);
  if (error != cudaSuccess) return error;
  return start_lean<LeanShapeOf<T, TM, TN, kLineBytes>>(
      lean_kernel<T, TM, TN, kLineBytes, op == Op::dgrad, !wgrad, true>, q, tiles_n, ceil_div(q.M, TM), stream);
}

// tma_lean_gather.cuh
template <Op op, DType dtype, int TM, int TN>
cudaError_t launch_lean_gather(Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream);

// tma_sums.cuh
template <DType dtype, int TM, int TN>
cudaError_t launch_sums(Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream);

// What lean_takes_groups names.
template <Op op, DType dtype, int TM, int TN>
cudaError_t launch_lean_groups(Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  if constexpr (dtype != DType::f32 && TN == (op == Op::dgrad ? 64 : 32))
    if (lean_short_lines(op, p)) {
      if constexpr (op == Op::dgrad)
        if (p.C_per_group() <= 32) return launch_lean_lines<op, dtype, TM, 32, 64, true>(p, plan, args, stream);
      return launch_lean_lines<op, dtype, TM, TN, 64, true>(p, plan, args, stream);
    }
  return launch_lean_lines<op, dtype, TM, TN, kLineBytes, true>(p, plan, args, stream);
}

template <Op op, DType dtype, int TM, int TN>
cudaError_t launch_lean(Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  if constexpr (op != Op::wgrad && TM == 64 && !(op == Op::dgrad && TN == 32))
    if (p.groups > 1) return launch_lean_groups<op, dtype, TM, TN>(p, plan, args, stream);
  if constexpr (dtype != DType::f32 && op != Op::wgrad && TN >= 64 && TN <= 128)
    if (lean_gathers(row_of(plan), p)) return launch_lean_gather<op, dtype, TM, TN>(p, plan, args, stream);
  if constexpr (dtype != DType::f32 && TM == 64 && (TN == 64 || (op == Op::wgrad && TN == 128)))
    if (lean_takes_planes(row_of(plan), p)) return launch_lean_planes<op, dtype, TM, TN>(p, plan, args, stream);
  if constexpr (op == Op::wgrad && dtype != DType::f32 && TM == 64 && TN == 64)
    if (plan.split_k > 1) return launch_sums<dtype, TM, TN>(p, plan, args, stream);
  if constexpr (op == Op::dgrad && TM == 64 && TN == 64)
    if (p.C <= 32) return launch_lean<op, dtype, TM, 32>(p, plan, args, stream);
  if constexpr (op != Op::wgrad && dtype != DType::f32 && !lean_large(dtype, TM, TN))
    if (tma_line(op == Op::fprop ? p.C : p.K) == 64)
      return launch_lean_lines<op, dtype, TM, TN, 64>(p, plan, args, stream);
  return launch_lean_lines<op, dtype, TM, TN, kLineBytes>(p, plan, args, stream);
}

}  // namespace conv2d_ext::tma

#define CONV2D_EXT_TMA_LEAN_INSTANCE(family, op, dtype, tm, tn, tk, variant)      \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                       \
    return tma::launch_lean<Op::op, DType::dtype, tm, tn>(p, plan, args, stream); \
  }
