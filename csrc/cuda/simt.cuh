// Convolution as an implicit GEMM on the FMA units, for every problem: any stride, dilation, padding, group, layout,
// offset and size, in f16, bf16, f32 (all accumulated in f32) and f64; the three ops are one kernel (gather.cuh).
//
// A block of 256 threads computes a TM x TN tile. Row parts live in shared memory for the tile's life, the parts of k
// for two steps. Each step, threads load the next TK columns of A and B into registers, multiply the present ones out
// of shared memory, and store the loaded ones, converted to the accumulator's type, into the other buffer.
// split_k > 1: the blocks of a tile write partial sums to the workspace, and simt_reduce adds them in order, after
// simt_fold has made few of many.
// Operands are loaded one element at a time; simt_copy.cuh is for those that come in vectors.
#pragma once

#include "simt_tile.cuh"

namespace conv2d_ext::simt {

// Loads a TILE x TK operand into registers, an element at a time along k, and stores it to shared memory as
// [TK][pitch], widened.
template <class T, class Acc, int TILE, int TK, int pitch, int kThreads>
struct Loader {
  static constexpr int kTotal = TILE * TK;  // loads of the block
  static constexpr int kLoads = (kTotal + kThreads - 1) / kThreads;
  T loaded[kLoads];

  __device__ static int item(int i) { return int(threadIdx.x) + i * kThreads; }
  __device__ static bool active(int i) { return kTotal % kThreads == 0 || item(i) < kTotal; }
  __device__ static int row(int i) { return item(i) / TK; }
  __device__ static int column(int i) { return item(i) % TK; }

  // offset_of(row, column) is an element offset, negative where the operand is zero.
  template <class OffsetOf>
  __device__ void load(T const* __restrict__ base, OffsetOf const& offset_of) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int64_t const offset = active(i) ? offset_of(row(i), column(i)) : -1;
      loaded[i] = offset >= 0 ? base[offset] : narrow<T>(Acc(0));
    }
  }

  __device__ void store(Acc* shared) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (active(i)) shared[column(i) * pitch + row(i)] = widen(loaded[i]);
  }
};

// 256 threads; FM x FN outputs each.
template <int TM, int TN>
constexpr int kRowsOfThread = TN == 8                 ? 8
                              : TM == 128 && TN >= 64 ? 8
                                                      : 4;
template <int TM, int TN, int FM = kRowsOfThread<TM, TN>, int FN = TM * TN / 256 / FM>
using AnyLayout = Layout<TM, TN, FM, FN, 4, (FN < 4 ? FN : 4)>;

template <class T, int TM, int TN, int TK>
__global__ void __launch_bounds__(256, 2) simt_gemm(__grid_constant__ Params const p) {
  using Acc = decltype(widen(T()));
  using L = AnyLayout<TM, TN>;
  constexpr int pitch_a = TM + 4, pitch_b = TN + 4;  // + 4: the transposing stores of a warp spread over the banks
  __shared__ alignas(16) Acc tile_a[2][TK * pitch_a];
  __shared__ alignas(16) Acc tile_b[2][TK * pitch_b];
  __shared__ Rows<TM, TN> rows;
  __shared__ Columns<TK> columns[2];
  __shared__ Counter counters[TK];
  __shared__ Tile tile;

  int64_t const index = p.first_tile + blockIdx.x;
  if (threadIdx.x == 0) locate(p, index, tile);
  __syncthreads();
  Tile const& t = tile;
  if (t.m0 * TM >= t.M) return;  // the phases of dgrad differ in size
  Span const span(p, t, TK);
  int64_t const count = span.count;

  fill_rows(p, t, t.m0, t.n0, rows);
  if (threadIdx.x < TK) counters[threadIdx.x].start(t, span.begin * TK + threadIdx.x, TK);
  auto write_columns = [&](int buffer) {
    if (threadIdx.x < TK) {
      Counter& counter = counters[threadIdx.x];
      counter.write(p, t, columns[buffer].a[threadIdx.x], columns[buffer].b[threadIdx.x]);
      counter.advance(t, TK);
    }
  };
  write_columns(0);
  write_columns(1);
  __syncthreads();

  T const* const a = static_cast<T const*>(p.a);
  T const* const b = static_cast<T const*>(p.b);
  Loader<T, Acc, TM, TK, pitch_a, L::kThreads> load_a;
  Loader<T, Acc, TN, TK, pitch_b, L::kThreads> load_b;
  uint32_t const h_extent = p.h_extent, w_extent = p.w_extent;
  auto load = [&](int buffer) {
    Columns<TK> const& c = columns[buffer];
    load_a.load(a, [&](int row, int column) -> int64_t {
      Point const r = rows.a[row], k = c.a[column];
      bool const inside = uint32_t(r.h + k.h) < h_extent && uint32_t(r.w + k.w) < w_extent;
      return inside ? r.offset + k.offset : -1;
    });
    load_b.load(b, [&](int row, int column) -> int64_t { return rows.b[row] + c.b[column]; });
  };

  // A step's products are summed apart where registers allow: shorter chains of additions, a smaller rounding error.
  constexpr bool kTwoSums = sizeof(Acc) == 4 && L::FM * L::FN <= 16;
  Acc acc[L::FM][L::FN];
#pragma unroll
  for (int i = 0; i < L::FM; ++i)
#pragma unroll
    for (int j = 0; j < L::FN; ++j) acc[i][j] = 0;

  if (count > 0) {
    load(0);
    load_a.store(tile_a[0]);
    load_b.store(tile_b[0]);
  }
  __syncthreads();
  for (int64_t step = 0; step < count; ++step) {
    int const now = int(step & 1), next = now ^ 1;
    bool const more = step + 1 < count;
    if (more) load(next);
    write_columns(now);  // for step + 2: the columns of this step were last read one step ago
    Acc part[kTwoSums ? L::FM : 1][kTwoSums ? L::FN : 1] = {};
#pragma unroll
    for (int k = 0; k < TK; ++k) {
      Acc fragment_a[L::FM], fragment_b[L::FN];
#pragma unroll
      for (int i = 0; i < L::FM; ++i) fragment_a[i] = tile_a[now][k * pitch_a + L::row(i)];
#pragma unroll
      for (int j = 0; j < L::FN; ++j) fragment_b[j] = tile_b[now][k * pitch_b + L::column(j)];
#pragma unroll
      for (int i = 0; i < L::FM; ++i)
#pragma unroll
        for (int j = 0; j < L::FN; ++j) {
          if constexpr (kTwoSums)
            part[i][j] += fragment_a[i] * fragment_b[j];
          else
            acc[i][j] += fragment_a[i] * fragment_b[j];
        }
    }
    if constexpr (kTwoSums) {
#pragma unroll
      for (int i = 0; i < L::FM; ++i)
#pragma unroll
        for (int j = 0; j < L::FN; ++j) acc[i][j] += part[i][j];
    }
    if (more) {
      load_a.store(tile_a[next]);
      load_b.store(tile_b[next]);
    }
    __syncthreads();
  }

  store_tile<L, T>(p, t, index, rows, acc);
}

template <Op op, DType dtype, int TM, int TN, int TK>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  return launch_tiles<AnyLayout<TM, TN>, T>(simt_gemm<T, TM, TN, TK>, 0,
                                            params_of(op, problem, row_of(plan), plan, args), stream);
}

}  // namespace conv2d_ext::simt

#define CONV2D_EXT_SIMT_INSTANCE(family, op, dtype, tm, tn, tk, variant)          \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                       \
    return simt::launch<Op::op, DType::dtype, tm, tn, tk>(p, plan, args, stream); \
  }
