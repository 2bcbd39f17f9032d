// What the SIMT kernels share: how the threads of a block share a tile, how they store it, and the second pass over
// the partial sums of a split reduction.
#pragma once

#include "gather.cuh"
#include "types.cuh"

namespace conv2d_ext::simt {

// FM x FN outputs a thread, in runs of VM rows and VN columns; a warp spans 8 threads along n where there are as many,
// so that its fragments come from shared memory without bank conflicts.
template <int tile_m, int tile_n, int fm, int fn, int vm, int vn>
struct Layout {
  static constexpr int TM = tile_m, TN = tile_n, FM = fm, FN = fn, VM = vm, VN = vn;
  static constexpr int threads_m = TM / FM, threads_n = TN / FN, kThreads = threads_m * threads_n;
  static constexpr int warp_n = threads_n < 8 ? threads_n : 8, warp_m = 32 / warp_n;
  static constexpr int warps_n = threads_n / warp_n;
  static constexpr int runs_m = FM / VM, runs_n = FN / VN;
  static_assert(FM % VM == 0 && FN % VN == 0 && kThreads % 32 == 0 && threads_m % warp_m == 0);

  __device__ static int thread_m() { return int(threadIdx.x) % 32 / warp_n + int(threadIdx.x) / 32 / warps_n * warp_m; }
  __device__ static int thread_n() { return int(threadIdx.x) % warp_n + int(threadIdx.x) / 32 % warps_n * warp_n; }
  __device__ static int row(int i) { return thread_m() * VM + i / VM * (TM / runs_m) + i % VM; }
  __device__ static int column(int j) { return thread_n() * VN + j / VN * (TN / runs_n) + j % VN; }
};

// Bias, rounding and the store of one run of VM x VN outputs; neighbours in memory go out as vectors.
template <class L, class T, class Acc>
__device__ inline void store_run(Params const& p, Tile const& t, Rows<L::TM, L::TN> const& rows, int run_m, int run_n,
                                 Acc (&acc)[L::VM][L::VN]) {
  int const row = L::row(run_m * L::VM), column = L::column(run_n * L::VN);
  T* const out = static_cast<T*>(p.out);
  if (p.bias != nullptr) {
    T const* const bias = static_cast<T const*>(p.bias) + t.group * p.group_bias;
#pragma unroll
    for (int j = 0; j < L::VN; ++j) {
      int64_t const n = t.n0 * L::TN + column + j;
      Acc const b = n < p.N ? Acc(widen(bias[n * p.bias_stride])) : Acc(0);
#pragma unroll
      for (int i = 0; i < L::VM; ++i) acc[i][j] += b;
    }
  }
  constexpr int width = sizeof(T) == 8 ? 2 : 4;
  int64_t const first_m = rows.out_m[row], first_n = rows.out_n[column];
  // Are neighbours in the tile neighbours in memory?
  bool along_n = L::VN % width == 0 && first_n >= 0, along_m = L::VM % width == 0 && first_m >= 0;
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
          for (int e = 0; e < width; ++e) v.v[e] = narrow<T>(acc[(i + e) % L::VM][j]);
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

// The end of a tile: its outputs, or with a split its partial sums.
template <class L, class T, class Acc>
__device__ inline void store_tile(Params const& p, Tile const& t, int64_t index, Rows<L::TM, L::TN> const& rows,
                                  Acc const (&acc)[L::FM][L::FN]) {
  Acc* const partial = static_cast<Acc*>(p.workspace) + index * (L::TM * L::TN) + threadIdx.x;
#pragma unroll
  for (int run_m = 0; run_m < L::runs_m; ++run_m) {
#pragma unroll
    for (int run_n = 0; run_n < L::runs_n; ++run_n) {
      Acc run[L::VM][L::VN];
#pragma unroll
      for (int i = 0; i < L::VM; ++i)
#pragma unroll
        for (int j = 0; j < L::VN; ++j) {
          run[i][j] = acc[run_m * L::VM + i][run_n * L::VN + j];
          if (p.splits > 1)
            partial[((run_m * L::runs_n + run_n) * L::VM * L::VN + i * L::VN + j) * L::kThreads] = run[i][j];
        }
      if (p.splits == 1) store_run<L, T>(p, t, rows, run_m, run_n, run);
    }
  }
}

// Adds every kFolds'th of many splits, in order, to one of the first kFolds: a few tiles have too few threads for all.
constexpr int kFolds = 16, kFoldThreads = 256;
template <class Acc>
__global__ void __launch_bounds__(kFoldThreads) simt_fold(Acc* const partial, int64_t elements, int64_t splits) {
  Acc* const mine = partial + int64_t(blockIdx.x) * kFoldThreads + threadIdx.x;
  Acc sum = 0;
#pragma unroll 8
  for (int64_t split = blockIdx.y; split < splits; split += kFolds) sum += mine[split * elements];
  mine[blockIdx.y * elements] = sum;
}

// Sums a tile's partial sums in the order of the splits; one block for each run of a tile's threads.
template <class L, class T>
__global__ void __launch_bounds__(L::kThreads) simt_reduce(__grid_constant__ Params const p) {
  using Acc = decltype(widen(T()));
  __shared__ Rows<L::TM, L::TN> rows;
  __shared__ Tile tile;
  int64_t const index = p.first_tile + blockIdx.x;
  if (threadIdx.x == 0) locate(p, index, tile);
  __syncthreads();
  Tile const& t = tile;
  if (t.m0 * L::TM >= t.M) return;
  fill_rows(p, t, t.m0, t.n0, rows);
  __syncthreads();
  int const run_m = int(blockIdx.y) / L::runs_n, run_n = int(blockIdx.y) % L::runs_n;
  Acc const* partial = static_cast<Acc const*>(p.workspace) + index * (L::TM * L::TN) +
                       int64_t(blockIdx.y) * L::VM * L::VN * L::kThreads + threadIdx.x;
  Acc sum[L::VM][L::VN] = {};
  for (int64_t split = 0; split < p.splits;) {
    Acc chain[L::VM][L::VN] = {};
    int64_t const end = split + kChain < p.splits ? split + kChain : p.splits;
    for (; split < end; ++split, partial += p.tiles * (L::TM * L::TN))
#pragma unroll
      for (int i = 0; i < L::VM; ++i)
#pragma unroll
        for (int j = 0; j < L::VN; ++j) chain[i][j] += partial[(i * L::VN + j) * L::kThreads];
#pragma unroll
    for (int i = 0; i < L::VM; ++i)
#pragma unroll
      for (int j = 0; j < L::VN; ++j) sum[i][j] += chain[i][j];
  }
  store_run<L, T>(p, t, rows, run_m, run_n, sum);
}

// The steps of the reduction that a tile's split does.
struct Span {
  int64_t begin, count;
  __device__ Span(Params const& p, Tile const& t, int step) {
    int64_t const steps = (t.depth + step - 1) / step, each = (steps + p.splits - 1) / p.splits;
    begin = t.split * each;
    int64_t const rest = steps - begin;
    count = rest < 0 ? 0 : rest < each ? rest : each;
  }
};

// Launches `kernel` for all tiles, and the second pass.
template <class L, class T>
cudaError_t launch_tiles(void (*kernel)(Params), int shared_bytes, Params p, cudaStream_t stream) {
  for (p.first_tile = 0; p.first_tile < p.tiles * p.splits; p.first_tile += kMaxGrid) {
    unsigned const blocks = unsigned(min64(kMaxGrid, p.tiles * p.splits - p.first_tile));
    kernel<<<blocks, L::kThreads, shared_bytes, stream>>>(p);
    if (cudaError_t const error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  if (p.splits == 1) return cudaSuccess;
  p.first_tile = 0;  // partial sums fit in kMaxWorkspaceBytes, so these tiles fit one grid
  if (p.splits > 2 * kFolds) {
    using Acc = decltype(widen(T()));
    static_assert(L::TM * L::TN % kFoldThreads == 0);
    int64_t const elements = p.tiles * (L::TM * L::TN);
    simt_fold<<<dim3(unsigned(elements / kFoldThreads), kFolds), kFoldThreads, 0, stream>>>(
        static_cast<Acc*>(p.workspace), elements, p.splits);
    if (cudaError_t const error = cudaGetLastError(); error != cudaSuccess) return error;
    p.splits = kFolds;
  }
  simt_reduce<L, T><<<dim3(unsigned(p.tiles), L::runs_m * L::runs_n), L::kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::simt
