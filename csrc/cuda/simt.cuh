// Convolution as an implicit GEMM on the FMA units, for every problem: any stride, dilation, padding, group, layout,
// offset and size, in f16, bf16, f32 (all accumulated in f32) and f64; the three ops are one kernel (gather.cuh).
//
// A block of 256 threads computes a TM x TN tile. Row parts live in shared memory for the tile's life, the parts of k
// for two steps. Each step, threads load the next TK columns of A and B into registers, multiply the present ones out
// of shared memory, and store the loaded ones, converted to the accumulator's type, into the other buffer.
// split_k > 1: the blocks of a tile write partial sums to the workspace, and simt_reduce adds them in order.
//
// Variants (kernels.def) differ in the lanes' walk over the operands alone: one element at a time along k, or an
// aligned vector at a time along k or along the rows, whichever is contiguous in memory.
#pragma once

#include "gather.cuh"
#include "types.cuh"

namespace conv2d_ext::simt {

constexpr int kThreads = 256;

enum class Walk : uint8_t { depth, row_vectors, depth_vectors };

// Loads a TILE x TK operand into registers and stores it to shared memory as [TK][pitch], widened.
template <class T, class Acc, int TILE, int TK, int pitch, Walk walk, int vector>
struct Loader {
  static constexpr bool kAlongRows = walk == Walk::row_vectors;
  static constexpr int kWidth = walk == Walk::depth ? 1 : vector;
  static constexpr int kTotal = TILE * TK / kWidth;  // loads of the block
  static constexpr int kLoads = (kTotal + kThreads - 1) / kThreads;
  static constexpr int kFast = (kAlongRows ? TILE : TK) / kWidth;  // loads along the walk
  Vector<T, kWidth> loaded[kLoads];

  __device__ static int item(int i) { return int(threadIdx.x) + i * kThreads; }
  __device__ static bool active(int i) { return kTotal % kThreads == 0 || item(i) < kTotal; }
  __device__ static int row(int i) { return kAlongRows ? item(i) % kFast * kWidth : item(i) / kFast; }
  __device__ static int column(int i) { return kAlongRows ? item(i) / kFast : item(i) % kFast * kWidth; }

  // offset_of(row, column) is an element offset, negative where the operand is zero.
  template <class OffsetOf>
  __device__ void load(T const* __restrict__ base, OffsetOf const& offset_of) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int64_t const offset = active(i) ? offset_of(row(i), column(i)) : -1;
      if (offset >= 0) {
        loaded[i] = *reinterpret_cast<Vector<T, kWidth> const*>(base + offset);
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) loaded[i].v[j] = narrow<T>(Acc(0));
      }
    }
  }

  __device__ void store(Acc* shared) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (!active(i)) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        int const r = row(i) + (kAlongRows ? j : 0), c = column(i) + (kAlongRows ? 0 : j);
        shared[c * pitch + r] = widen(loaded[i].v[j]);
      }
    }
  }
};

// How the threads of a block share a tile: FM x FN outputs each, in runs of up to 4 rows and 4 columns; a warp spans
// 8 threads along n where there are as many, so that its fragments come from shared memory without bank conflicts.
template <int TM, int TN>
struct Layout {
  static constexpr int FM = TN == 8 ? 8 : TM == 128 && TN >= 64 ? 8 : 4;
  static constexpr int FN = TM * TN / kThreads / FM;
  static constexpr int VM = 4, VN = FN < 4 ? FN : 4;
  static constexpr int threads_m = TM / FM, threads_n = TN / FN;
  static constexpr int warp_n = threads_n < 8 ? threads_n : 8, warp_m = 32 / warp_n;
  static constexpr int warps_n = threads_n / warp_n;
  static_assert(threads_m * threads_n == kThreads && FM % VM == 0 && FN % VN == 0);

  __device__ static int thread_m() { return int(threadIdx.x) % 32 / warp_n + int(threadIdx.x) / 32 / warps_n * warp_m; }
  __device__ static int thread_n() { return int(threadIdx.x) % warp_n + int(threadIdx.x) / 32 % warps_n * warp_n; }
  __device__ static int row(int i) { return thread_m() * VM + i / VM * (TM / (FM / VM)) + i % VM; }
  __device__ static int column(int j) { return thread_n() * VN + j / VN * (TN / (FN / VN)) + j % VN; }
};

// Bias, rounding and the store of one run of VM x VN outputs; four neighbours in memory go out as one vector.
template <class T, class Acc, int TM, int TN>
__device__ inline void store_run(Params const& p, Tile const& t, int64_t tile_n, Rows<TM, TN> const& rows, int run_m,
                                 int run_n, Acc (&acc)[Layout<TM, TN>::VM][Layout<TM, TN>::VN]) {
  using L = Layout<TM, TN>;
  int const row = L::row(run_m * L::VM), column = L::column(run_n * L::VN);
  T* const out = static_cast<T*>(p.out);
  if (p.bias != nullptr) {
    T const* const bias = static_cast<T const*>(p.bias) + t.group * p.group_bias;
#pragma unroll
    for (int j = 0; j < L::VN; ++j) {
      int64_t const n = tile_n * TN + column + j;
      Acc const b = n < p.N ? Acc(widen(bias[n * p.bias_stride])) : Acc(0);
#pragma unroll
      for (int i = 0; i < L::VM; ++i) acc[i][j] += b;
    }
  }
  constexpr int width = sizeof(T) == 8 ? 2 : 4;
  int64_t const first_m = rows.out_m[row], first_n = rows.out_n[column];
  bool along_n = L::VN == 4 && first_n >= 0,
       along_m = first_m >= 0;  // are neighbours in the tile neighbours in memory?
#pragma unroll
  for (int j = 1; j < L::VN; ++j) along_n = along_n && rows.out_n[column + j] == first_n + j;
#pragma unroll
  for (int i = 1; i < L::VM; ++i) along_m = along_m && rows.out_m[row + i] == first_m + i;
  if (along_n) {
#pragma unroll
    for (int i = 0; i < L::VM; ++i) {
      int64_t const m = rows.out_m[row + i];
      if (m < 0) continue;
      if ((m + first_n) % width == 0) {
#pragma unroll
        for (int j = 0; j < L::VN; j += width) {
          Vector<T, width> v;
#pragma unroll
          for (int e = 0; e < width; ++e) v.v[e] = narrow<T>(acc[i][(j + e) % L::VN]);
          *reinterpret_cast<Vector<T, width>*>(out + m + first_n + j) = v;
        }
      } else {
#pragma unroll
        for (int j = 0; j < L::VN; ++j) out[m + first_n + j] = narrow<T>(acc[i][j]);
      }
    }
  } else if (along_m) {
#pragma unroll
    for (int j = 0; j < L::VN; ++j) {
      int64_t const n = rows.out_n[column + j];
      if (n < 0) continue;
      if ((first_m + n) % width == 0) {
#pragma unroll
        for (int i = 0; i < L::VM; i += width) {
          Vector<T, width> v;
#pragma unroll
          for (int e = 0; e < width; ++e) v.v[e] = narrow<T>(acc[i + e][j]);
          *reinterpret_cast<Vector<T, width>*>(out + first_m + n + i) = v;
        }
      } else {
#pragma unroll
        for (int i = 0; i < L::VM; ++i) out[first_m + n + i] = narrow<T>(acc[i][j]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < L::VM; ++i) {
      int64_t const m = rows.out_m[row + i];
#pragma unroll
      for (int j = 0; j < L::VN; ++j) {
        int64_t const n = rows.out_n[column + j];
        if (m >= 0 && n >= 0) out[m + n] = narrow<T>(acc[i][j]);
      }
    }
  }
}

template <class T, int TM, int TN, int TK, Walk walk_a, Walk walk_b>
__global__ void __launch_bounds__(kThreads, 2) simt_gemm(__grid_constant__ Params const p) {
  using Acc = decltype(widen(T()));
  using L = Layout<TM, TN>;
  constexpr int vector = sizeof(T) == 8 ? 2 : 4;
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
  int64_t const steps = (t.depth + TK - 1) / TK;
  int64_t const per_split = (steps + p.splits - 1) / p.splits;
  int64_t const begin = t.split * per_split, rest = steps - begin;
  int64_t const count = rest < 0 ? 0 : rest < per_split ? rest : per_split;

  fill_rows(p, t, t.m0, t.n0, rows);
  if (threadIdx.x < TK) counters[threadIdx.x].start(t, begin * TK + threadIdx.x, TK);
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
  Loader<T, Acc, TM, TK, pitch_a, walk_a, vector> load_a;
  Loader<T, Acc, TN, TK, pitch_b, walk_b, vector> load_b;
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

  Acc* const partial = static_cast<Acc*>(p.workspace) + index * (TM * TN) + threadIdx.x;
#pragma unroll
  for (int run_m = 0; run_m < L::FM / L::VM; ++run_m) {
#pragma unroll
    for (int run_n = 0; run_n < L::FN / L::VN; ++run_n) {
      Acc run[L::VM][L::VN];
#pragma unroll
      for (int i = 0; i < L::VM; ++i)
#pragma unroll
        for (int j = 0; j < L::VN; ++j) {
          run[i][j] = acc[run_m * L::VM + i][run_n * L::VN + j];
          if (p.splits > 1)
            partial[((run_m * (L::FN / L::VN) + run_n) * L::VM * L::VN + i * L::VN + j) * kThreads] = run[i][j];
        }
      if (p.splits == 1) store_run<T>(p, t, t.n0, rows, run_m, run_n, run);
    }
  }
}

// Sums a tile's partial sums in the order of the splits; one block for each run of a tile's threads.
template <class T, int TM, int TN>
__global__ void __launch_bounds__(kThreads) simt_reduce(__grid_constant__ Params const p) {
  using Acc = decltype(widen(T()));
  using L = Layout<TM, TN>;
  __shared__ Rows<TM, TN> rows;
  __shared__ Tile tile;
  constexpr int runs_n = L::FN / L::VN;
  int64_t const index = p.first_tile + blockIdx.x;
  if (threadIdx.x == 0) locate(p, index, tile);
  __syncthreads();
  Tile const& t = tile;
  if (t.m0 * TM >= t.M) return;
  fill_rows(p, t, t.m0, t.n0, rows);
  __syncthreads();
  int const run_m = int(blockIdx.y) / runs_n, run_n = int(blockIdx.y) % runs_n;
  Acc const* partial = static_cast<Acc const*>(p.workspace) + index * (TM * TN) +
                       int64_t(blockIdx.y) * L::VM * L::VN * kThreads + threadIdx.x;
  Acc sum[L::VM][L::VN] = {};
  for (int64_t split = 0; split < p.splits;) {
    Acc chain[L::VM][L::VN] = {};
    int64_t const end = split + kChain < p.splits ? split + kChain : p.splits;
    for (; split < end; ++split, partial += p.tiles * (TM * TN))
#pragma unroll
      for (int i = 0; i < L::VM; ++i)
#pragma unroll
        for (int j = 0; j < L::VN; ++j) chain[i][j] += partial[(i * L::VN + j) * kThreads];
#pragma unroll
    for (int i = 0; i < L::VM; ++i)
#pragma unroll
      for (int j = 0; j < L::VN; ++j) sum[i][j] += chain[i][j];
  }
  store_run<T>(p, t, t.n0, rows, run_m, run_n, sum);
}

struct Walks {
  Walk a, b;
};

constexpr Walks walks_of(Op op, Variant v) {
  if (v == Variant::any) return {Walk::depth, Walk::depth};
  switch (op) {
    case Op::fprop:
      return {Walk::depth_vectors, Walk::depth_vectors};
    case Op::dgrad:
      return {Walk::depth_vectors, Walk::row_vectors};
    case Op::wgrad:
      return {Walk::row_vectors, Walk::row_vectors};
  }
  return {Walk::depth, Walk::depth};
}

template <Op op, DType dtype, int TM, int TN, int TK, Variant variant>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr Walks walks = walks_of(op, variant);
  Params p = params_of(op, problem, kRows[plan.kernel], plan, args);
  for (p.first_tile = 0; p.first_tile < p.tiles * p.splits; p.first_tile += kMaxGrid) {
    unsigned const blocks = unsigned(min64(kMaxGrid, p.tiles * p.splits - p.first_tile));
    simt_gemm<T, TM, TN, TK, walks.a, walks.b><<<blocks, kThreads, 0, stream>>>(p);
    if (cudaError_t const error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  if (p.splits == 1) return cudaSuccess;
  using L = Layout<TM, TN>;
  constexpr unsigned runs = (L::FM / L::VM) * (L::FN / L::VN);
  p.first_tile = 0;  // partial sums fit in kMaxWorkspaceBytes, so these tiles fit one grid
  simt_reduce<T, TM, TN><<<dim3(unsigned(p.tiles), runs), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::simt

#define CONV2D_EXT_SIMT_INSTANCE(family, op, dtype, tm, tn, tk, variant)                            \
  cudaError_t conv2d_ext::family##_##op##_##dtype##_##tm##x##tn##_##variant(                        \
      Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) {             \
    return simt::launch<Op::op, DType::dtype, tm, tn, tk, Variant::variant>(p, plan, args, stream); \
  }
