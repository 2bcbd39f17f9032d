// Convolution in f32 and f64 as an implicit GEMM on the FMA units, where channels are contiguous and come in aligned
// vectors of 16 bytes: the fast sibling of simt.cuh.
//
// A block computes a TM x TN tile, 8 x 8 outputs a thread. Each step, cp.async copies the next 64 bytes of k of A and B
// to a ring of stages in shared memory, zeros where the padding is, and the threads multiply those of the present step.
// An operand whose k is contiguous in memory (channels of fprop's x and w, and of dgrad's y) lies in shared memory as a
// line a row, k along it; the others (dgrad's w, both of wgrad's) as a line a k. Lines are in the order in which
// neighbouring threads read them, so that 16-byte loads meet each bank once.
//
// split_k > 1: as in simt.cuh.
#pragma once

#include "ptx.cuh"
#include "simt_tile.cuh"

namespace conv2d_ext::simt {

constexpr int F = 8;            // outputs of a thread along m, and along n
constexpr int kStepBytes = 64;  // of k

// An operand in shared memory: TILE rows of TK, TILE / F threads along the rows, F rows each in runs of V.
template <class T, bool along_k, int TILE, int kThreads>
struct Operand {
  static constexpr int V = 16 / sizeof(T), TK = kStepBytes / sizeof(T), threads = TILE / F;
  static constexpr int pitch = along_k ? TK + V : TILE;  // + V: eight lines' vectors lie in different banks
  static constexpr int elements = along_k ? TILE * pitch : TK * pitch;
  static constexpr int copies = TILE * 4 / kThreads;
  static constexpr int apart = along_k ? kThreads / 4 * pitch : kThreads / (TILE / V) * pitch;
  static_assert(TILE * 4 % kThreads == 0 && kThreads % 4 == 0 && kThreads % (TILE / V) == 0);

  // Which line of shared memory holds a row, backwards.
  __device__ static int row_of_line(int line) {
    int const i = line / threads;
    return line % threads * V + i % V + i / V * (threads * V);
  }

  // The copies of a step, of which a thread's are kThreads and in shared memory `apart` elements apart: the row, the k
  // within the step, and where to.
  __device__ static int row(int item) { return along_k ? row_of_line(item / 4) : item % (TILE / V) * V; }
  __device__ static int k(int item) { return along_k ? item % 4 * V : item / (TILE / V); }
  __device__ static int place(int item) { return along_k ? item / 4 * pitch + k(item) : k(item) * pitch + row(item); }

  // Along k: V values of k of the thread's row i.
  __device__ static void load_k(T (&f)[V], T const* shared, int thread, int i, int k) {
    *reinterpret_cast<Vector<T, V>*>(f) =
        *reinterpret_cast<Vector<T, V> const*>(shared + (thread + threads * i) * pitch + k);
  }
  // Else: the thread's rows at one k.
  __device__ static void load_rows(T (&f)[F], T const* shared, int thread, int k) {
#pragma unroll
    for (int i = 0; i < F; i += V)
      *reinterpret_cast<Vector<T, V>*>(f + i) =
          *reinterpret_cast<Vector<T, V> const*>(shared + k * pitch + thread * V + i / V * (threads * V));
  }
};

template <class T, int TM, int TN, bool a_along_k, bool b_along_k>
struct Copied {
  static constexpr int V = 16 / sizeof(T), TK = kStepBytes / sizeof(T);
  using L = Layout<TM, TN, F, F, V, V>;
  using A = Operand<T, a_along_k, TM, L::kThreads>;
  using B = Operand<T, b_along_k, TN, L::kThreads>;
  static constexpr int kStages = 3;
  static constexpr int stage = A::elements + B::elements;
  static constexpr int shared_bytes = kStages * stage * int(sizeof(T));
  // The parts of k are computed for kBatch steps at a time, one for each vector along k, or each k.
  static constexpr int kBatch = 8, kEach = a_along_k && b_along_k ? V : 1, kParts = TK / kEach;
};

// Parts of an address in elements, 32 bits: simt_supports() keeps tensors below 2^30 elements and images below 2^29.
// A row that does not exist has h = kNoRow, a k that does not w = kNoColumn: coordinates that are outside of an image
// whatever the other part adds. In B, kNoLine makes the sum negative.
constexpr int32_t kNoRow = INT32_MIN, kNoColumn = 0x60000000, kNoLine = -(1 << 30);

struct alignas(16) Part {
  int32_t a, h, w, b;
};

__device__ inline Part part_of(Params const& p, Tile const& t, uint32_t k) {
  if (k >= uint32_t(t.depth)) return {0, 0, kNoColumn, kNoLine};
  uint32_t const last = uint32_t(t.k_radix[2]), middle = uint32_t(t.k_radix[1]), high = k / last;
  uint32_t const d[3] = {high / middle, high % middle, k % last};
  uint32_t a = 0, h = 0, w = 0, b = 0;
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    a += d[j] * uint32_t(p.k.a[j]);
    h += d[j] * uint32_t(p.k.h[j]);
    w += d[j] * uint32_t(p.k.w[j]);
    b += d[j] * uint32_t(p.k.b[j]);
  }
  return {int32_t(a), int32_t(h), int32_t(w), int32_t(b)};
}

template <class T, int TM, int TN, bool a_along_k, bool b_along_k>
__global__ void __launch_bounds__(TM* TN / (F * F), (sizeof(T) == 8 ? 256 : 512) / (TM * TN / (F * F)))
    simt_copy(__grid_constant__ Params const p) {
  using C = Copied<T, TM, TN, a_along_k, b_along_k>;
  using L = typename C::L;
  using A = typename C::A;
  using B = typename C::B;
  constexpr int V = C::V, TK = C::TK;
  extern __shared__ uint4 ring_start[];
  T* const ring = reinterpret_cast<T*>(ring_start);
  __shared__ Rows<TM, TN> rows;
  __shared__ Part rows_a[TM];
  __shared__ int32_t rows_b[TN];
  __shared__ Part parts[2][C::kBatch * C::kParts];
  __shared__ Tile tile;

  int64_t const index = p.first_tile + blockIdx.x;
  if (threadIdx.x == 0) locate(p, index, tile);
  __syncthreads();
  Tile const& t = tile;
  if (t.m0 * TM >= t.M) return;  // the phases of dgrad differ in size
  Span const span(p, t, TK);
  int const count = int(span.count);
  uint32_t const first_k = uint32_t(span.begin * TK);
  fill_rows(p, t, t.m0, t.n0, rows);  // a thread narrows the rows that it has filled
  for (int i = int(threadIdx.x); i < TM; i += L::kThreads) {
    Point const r = rows.a[i];
    rows_a[i] = {int32_t(r.offset), rows.out_m[i] < 0 ? kNoRow : r.h, r.w, 0};
  }
  for (int i = int(threadIdx.x); i < TN; i += L::kThreads) rows_b[i] = rows.out_n[i] < 0 ? kNoLine : int32_t(rows.b[i]);
  auto write_parts = [&](int batch) {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < C::kBatch * C::kParts; i += L::kThreads)
      parts[batch & 1][i] = part_of(p, t, first_k + batch * (C::kBatch * TK) + i * C::kEach);
  };
  write_parts(0);
  write_parts(1);
  __syncthreads();

  T const* const a = static_cast<T const*>(p.a);
  T const* const b = static_cast<T const*>(p.b);
  uint32_t const h_extent = p.h_extent, w_extent = p.w_extent, shared = ptx::shared_address(ring);
  auto copy = [&](int step, int stage) {
    int const item = ptx::unknown(int(threadIdx.x));
    Part const* const now = &parts[step / C::kBatch & 1][step % C::kBatch * C::kParts];
    uint32_t const to_a = shared + (stage * C::stage + A::place(item)) * int(sizeof(T));
    uint32_t const to_b = shared + (stage * C::stage + A::elements + B::place(item)) * int(sizeof(T));
#pragma unroll
    for (int i = 0; i < A::copies; ++i) {
      Part const r = rows_a[A::row(item + i * L::kThreads)], k = now[A::k(item + i * L::kThreads) / C::kEach];
      bool const there = uint32_t(r.h + k.h) < h_extent && uint32_t(r.w + k.w) < w_extent;
      ptx::cp_async_16(to_a + i * A::apart * int(sizeof(T)), a + (r.a + k.a), there);
    }
#pragma unroll
    for (int i = 0; i < B::copies; ++i) {
      int32_t const offset = rows_b[B::row(item + i * L::kThreads)] + now[B::k(item + i * L::kThreads) / C::kEach].b;
      ptx::cp_async_16(to_b + i * B::apart * int(sizeof(T)), b + offset, offset >= 0);
    }
  };

  T acc[F][F];
#pragma unroll
  for (int i = 0; i < F; ++i)
#pragma unroll
    for (int j = 0; j < F; ++j) acc[i][j] = 0;
  int const thread_m = L::thread_m(), thread_n = L::thread_n();
  auto multiply = [&](int stage) {
    T const* const tile_a = ring + stage * C::stage;
    T const* const tile_b = tile_a + A::elements;
#pragma unroll 1  // more would take registers
    for (int k = 0; k < TK; k += V) {
      T along_a[F][V];
      if constexpr (a_along_k)
#pragma unroll
        for (int i = 0; i < F; ++i) A::load_k(along_a[i], tile_a, thread_m, i, k);
      if constexpr (b_along_k) {
        static_assert(a_along_k);
#pragma unroll
        for (int j = 0; j < F; ++j) {
          T along_b[V];
          B::load_k(along_b, tile_b, thread_n, j, k);
#pragma unroll
          for (int v = 0; v < V; ++v)
#pragma unroll
            for (int i = 0; i < F; ++i) acc[i][j] += along_a[i][v] * along_b[v];
        }
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          T of_a[F], of_b[F];
          if constexpr (a_along_k)
#pragma unroll
            for (int i = 0; i < F; ++i) of_a[i] = along_a[i][v];
          else
            A::load_rows(of_a, tile_a, thread_m, k + v);
          B::load_rows(of_b, tile_b, thread_n, k + v);
#pragma unroll
          for (int n = 0; n < F * F; ++n) {
            int const i = a_along_k ? n / F : n % F, j = a_along_k ? n % F : n / F;
            acc[i][j] += of_a[i] * of_b[j];
          }
        }
      }
    }
  };

  constexpr int kAhead = C::kStages - 1;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i < count) copy(i, i);
    ptx::cp_async_commit_group();
  }
  int stage = 0;
  for (int step = 0; step < count; ++step) {
    ptx::cp_async_wait_group<kAhead - 1>();
    __syncthreads();
    int const ahead = step + kAhead;
    if (ahead < count) {
      if (ahead % C::kBatch == 0) write_parts(ahead / C::kBatch + 1);
      copy(ahead, stage == 0 ? kAhead : stage - 1);
    }
    ptx::cp_async_commit_group();
    multiply(stage);
    stage = stage == kAhead ? 0 : stage + 1;
  }
  if constexpr (a_along_k == b_along_k) {
    // Else the sums take the registers that vector stores want, more often in the operands' bank (docs/tuning.md).
    T const nothing = ptx::unknown(T(-0.0));
#pragma unroll
    for (int i = 0; i < F; ++i)
#pragma unroll
      for (int j = 0; j < F; ++j) acc[i][j] += nothing;
  }
  store_tile<L, T>(p, t, index, rows, acc);
}

template <Op op, DType dtype, int TM, int TN>
cudaError_t launch_copy(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool a_along_k = op != Op::wgrad, b_along_k = op == Op::fprop;
  using C = Copied<T, TM, TN, a_along_k, b_along_k>;
  auto* const kernel = simt_copy<T, TM, TN, a_along_k, b_along_k>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::shared_bytes))
    return error;
  return launch_tiles<typename C::L, T>(kernel, C::shared_bytes, params_of(op, problem, row_of(plan), plan, args),
                                        stream);
}

}  // namespace conv2d_ext::simt

#define CONV2D_EXT_SIMT_COPY_INSTANCE(family, op, dtype, tm, tn, tk, variant)               \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                 \
    static_assert(tk * sizeof(conv2d_ext::TypeOf<DType::dtype>::type) == simt::kStepBytes); \
    return simt::launch_copy<Op::op, DType::dtype, tm, tn>(p, plan, args, stream);          \
  }
