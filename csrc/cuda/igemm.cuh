// Dense and widely grouped convolution in f16 and bf16 on Hopper's tensor cores: the implicit GEMM of gather.cuh, with
// f32 accumulators. Any stride, dilation and padding; channels contiguous, a multiple of 8 and 16-byte aligned.
//
// A persistent block of three warpgroups walks over 128 x TN tiles. Warpgroup 0 gathers: each step it computes the
// parts of 64 k, then copies 128 x 64 of A and TN x 64 of B to a stage of a shared-memory ring with cp.async, zeros
// where the padding is. Warpgroups 1 and 2 multiply with wgmma, 64 x TN each, and store. `full` and `empty` barriers,
// one pair a stage, hand the stages over.
//
// An operand whose k is contiguous in memory (channels of fprop's x and w, and of dgrad's y) is K-major in shared
// memory: rows of 128 bytes, 64 k. The others (dgrad's w, both of wgrad's) are M- or N-major: for each run of 64 rows,
// 64 k's of 128 bytes. Both with the 128-byte swizzle: the 16-byte chunk c of line l is at c ^ (l % 8).
//
// split_k > 1: f32 partial tiles go to the workspace, and igemm_reduce adds them in order.
#pragma once

#include "../core/near_taps.h"
#include "fragments.cuh"
#include "gather.cuh"

namespace conv2d_ext::igemm {

constexpr int TM = 128, TK = 64;
static_assert(TM == kWarpgroup, "each gatherer prepares one row");
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kRunBytes = TK * kLineBytes;  // 64 k of 64 rows, M- or N-major

// 64K registers: one warpgroup gathers, two hold accumulators, x 128 threads.
constexpr int kGatherRegs = 120, kMultiplyRegs = 192;
static_assert((kGatherRegs + 2 * kMultiplyRegs) * kWarpgroup <= 65536, "register file");

template <int TN>
struct Ring {
  static constexpr int a_bytes = TM * kLineBytes, b_bytes = TN * kLineBytes;
  static constexpr int stage_bytes = a_bytes + b_bytes;
  static constexpr int stages = 196608 / stage_bytes;        // 192 of the 227 KB; the rest is tables
  static constexpr int bytes = stages * stage_bytes + 1024;  // + 1024: the swizzle wants 1024-byte alignment
  static_assert(stages >= 3);
};

// The steps of the reduction that a tile's split does.
struct Span {
  int64_t begin, count;
  __device__ Span(Params const& p, Tile const& t) {
    int64_t const steps = (t.depth + TK - 1) / TK, each = (steps + p.splits - 1) / p.splits;
    begin = t.split * each;
    int64_t const rest = steps - begin;
    count = rest < 0 ? 0 : rest < each ? rest : each;
  }
};

// Coordinates that are outside of an image whatever the other part adds: supports() keeps those below 2^29.
constexpr int32_t kNoRow = INT32_MIN, kNoColumn = 0x60000000;

struct RowPart {
  Point a;
  int64_t out;  // -1: no such row
};

__device__ inline RowPart row_part(Params const& p, Tile const& t, int64_t m) {
  if (m >= t.M) return {{0, kNoRow, 0}, -1};
  int64_t d[3] = {0, 0, m};
  d[1] = divide(d[2], t.m_radix[2]);
  d[0] = divide(d[1], t.m_radix[1]);
  RowPart part{{t.a_base, t.h_base, t.w_base}, t.out_base};
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    part.a.offset += d[j] * p.m.a[j];
    part.a.h += int32_t(d[j]) * p.m.h[j];
    part.a.w += int32_t(d[j]) * p.m.w[j];
    part.out += d[j] * p.m.out[j];
  }
  return part;
}

// Walks k in steps of TK without dividing, in registers: three digits and the maps' sums of them.
struct Walker {
  int64_t k, depth, high, high_step;  // `high` is the slowest digit: wgrad's batch may pass 2^31
  int32_t mid, low, mid_step, low_step, mid_radix, low_radix;

  __device__ Walker(Tile const& t, int64_t first) : k(first), depth(t.depth) {
    Counter counter;
    counter.start(t, first, TK);
    high = counter.digit[0], mid = int32_t(counter.digit[1]), low = int32_t(counter.digit[2]);
    high_step = counter.step[0], mid_step = int32_t(counter.step[1]), low_step = int32_t(counter.step[2]);
    mid_radix = int32_t(t.k_radix[1]), low_radix = int32_t(t.k_radix[2]);
  }

  __device__ void advance() {
    k += TK;
    low += low_step;
    bool carry = low >= low_radix;
    low -= carry ? low_radix : 0;
    mid += mid_step + carry;
    carry = mid >= mid_radix;
    mid -= carry ? mid_radix : 0;
    high += high_step + carry;
  }

  __device__ void write(Params const& p, Point& a, int64_t& b) const {
    Map const& m = p.k;
    int32_t const top = int32_t(high);
    a = {high * m.a[0] + mid * m.a[1] + low * m.a[2], top * m.h[0] + mid * m.h[1] + low * m.h[2],
         top * m.w[0] + mid * m.w[1] + low * m.w[2]};
    b = high * m.b[0] + mid * m.b[1] + low * m.b[2];
    if (k >= depth) {
      a.h = kNoColumn;
      b = kNone;
    }
  }
};

template <class T, int TN, bool a_rows, bool b_rows>
__device__ void gather(Params const& p, Tile& tile, Point (&rows)[TM], Columns<TK> (&columns)[2], uint32_t ring,
                       uint64_t* full, uint64_t* empty) {
  using R = Ring<TN>;
  constexpr int kBarrier = 1;
  constexpr int loads_a = TM * 8 / kWarpgroup, loads_b = TN * 8 / kWarpgroup;
  int const thread = threadIdx.x;
  T const* const a = static_cast<T const*>(p.a);
  T const* const b = static_cast<T const*>(p.b);
  // K-major: lane % 8 is the chunk of 8 k, and 16 rows are copied at a time. Otherwise: the chunk of 8 rows, and k's.
  constexpr int chunks_a = a_rows ? TM / 8 : 8, chunks_b = b_rows ? TN / 8 : 8;
  constexpr int lines_a = kWarpgroup / chunks_a, lines_b = kWarpgroup / chunks_b;  // copied at a time
  int const chunk_a = thread % chunks_a, line_a = thread / chunks_a;
  int const chunk_b = thread % chunks_b, line_b = thread / chunks_b;
  constexpr bool by_table = a_rows || b_rows;  // else a thread needs the k of its own chunk alone
  Stage stage;
  for (int64_t unit = blockIdx.x; unit < p.tiles * p.splits; unit += gridDim.x) {
    ptx::bar_sync(kBarrier, kWarpgroup);
    if (thread == 0) locate(p, unit, tile);
    ptx::bar_sync(kBarrier, kWarpgroup);
    Tile const& t = tile;
    if (t.m0 * TM >= t.M) continue;
    Span const span(p, t);
    rows[thread] = row_part(p, t, t.m0 * TM + thread).a;
    Walker walker(t, span.begin * TK + (by_table ? thread % TK : chunk_a * 8));
    if constexpr (by_table) {
      if (thread < TK) walker.write(p, columns[0].a[thread], columns[0].b[thread]);
      walker.advance();
    }
    ptx::bar_sync(kBarrier, kWarpgroup);
    Point row_a[a_rows ? 1 : loads_a];
#pragma unroll
    for (int i = 0; i < (a_rows ? 1 : loads_a); ++i) row_a[i] = rows[a_rows ? chunk_a * 8 : line_a + i * lines_a];
    int64_t const n0 = t.n0 * TN + (b_rows ? chunk_b * 8 : line_b);
    int64_t const row_b = t.b_base + n0 * p.n_b, more_b = lines_b * p.n_b;
    int const rows_b = p.N - n0 < TN ? int(p.N - n0) : TN;  // rows of B from n0 on

    for (int64_t step = 0; step < span.count; ++step) {
      Columns<TK> const& c = columns[step & 1];
      Point own_a{};
      int64_t own_b = 0;
      if constexpr (!by_table) {
        walker.write(p, own_a, own_b);
        walker.advance();
      }
      ptx::mbarrier_wait(&empty[stage.index], stage.parity ^ 1);  // passes at once on the first trip round the ring
      uint32_t const to_a = ring + stage.index * R::stage_bytes, to_b = to_a + R::a_bytes;
      if constexpr (by_table && !a_rows) own_a = c.a[chunk_a * 8];
#pragma unroll
      for (int i = 0; i < loads_a; ++i) {
        int const line = line_a + i * lines_a;
        Point const k = a_rows ? c.a[line] : own_a, row = row_a[a_rows ? 0 : i];
        bool const valid = uint32_t(row.h + k.h) < uint32_t(p.h_extent) && uint32_t(row.w + k.w) < uint32_t(p.w_extent);
        uint32_t const to =
            to_a + (a_rows ? chunk_a / 8 * kRunBytes : 0) + line * kLineBytes + ((chunk_a % 8) ^ (line % 8)) * 16;
        ptx::cp_async_16(to, a + row.offset + k.offset, valid);
      }
      T const* row = b + row_b + (b_rows ? 0 : own_b);
#pragma unroll 8  // not more: registers are short
      for (int i = 0; i < loads_b; ++i) {
        int const line = line_b + i * lines_b;
        int64_t const k = b_rows ? c.b[line] : own_b;  // kNone past the reduction's end
        bool const valid = (b_rows ? 0 : i * lines_b) < rows_b && k >= 0;
        uint32_t const to =
            to_b + (b_rows ? chunk_b / 8 * kRunBytes : 0) + line * kLineBytes + ((chunk_b % 8) ^ (line % 8)) * 16;
        ptx::cp_async_16(to, b_rows ? row + k : row, valid);
        if constexpr (!b_rows) row += more_b;
      }
      ptx::cp_async_mbarrier_arrive_noinc(&full[stage.index]);  // arrives when this thread's copies have landed
      stage.advance(R::stages);
      if constexpr (by_table) {  // of the next step, while the copies fly
        Columns<TK>& next = columns[step + 1 & 1];
        if (thread < TK) walker.write(p, next.a[thread], next.b[thread]);
        walker.advance();
        ptx::bar_sync(kBarrier, kWarpgroup);
      }
    }
  }
  ptx::cp_async_wait_all();
}

template <class T, int TN, bool a_rows, bool b_rows>
__device__ void multiply(Params const& p, Tile& tile, uint32_t ring, uint64_t* full, uint64_t* empty) {
  using R = Ring<TN>;
  int const group = threadIdx.x / kWarpgroup - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  int const barrier = 2 + group;
  // A K-major descriptor strides from 8 rows to the next 8. An M- or N-major one strides from 8 k to the next 8, and
  // leads from 64 rows to the next 64.
  constexpr uint32_t step_a = a_rows ? 2 * kCoreBytes : 32, step_b = b_rows ? 2 * kCoreBytes : 32;  // 16 k, in bytes
  uint32_t const a_start = ring + group * (a_rows ? kRunBytes : 64 * kLineBytes);
  Stage stage;
  float acc[TN / 2];
  for (int64_t unit = blockIdx.x; unit < p.tiles * p.splits; unit += gridDim.x) {
    ptx::bar_sync(barrier, kWarpgroup);
    if (threadIdx.x % kWarpgroup == 0) locate(p, unit, tile);
    ptx::bar_sync(barrier, kWarpgroup);
    Tile const& t = tile;
    if (t.m0 * TM >= t.M) continue;
    Span const span(p, t);
#pragma unroll
    for (int i = 0; i < TN / 2; ++i) acc[i] = 0;
    int before = -1;
    for (int64_t step = 0; step < span.count; ++step) {
      ptx::mbarrier_wait(&full[stage.index], stage.parity);
      ptx::fence_proxy_async();  // cp.async wrote through the generic proxy, wgmma reads through the async one
      uint32_t const from_a = a_start + stage.index * R::stage_bytes;
      uint32_t const from_b = ring + stage.index * R::stage_bytes + R::a_bytes;
      ptx::wgmma_fence_operand(acc);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < TK / 16; ++k)
        ptx::wgmma_mma_async<T, a_rows, b_rows>(acc, ptx::wgmma_descriptor(from_a + k * step_a, kRunBytes, kCoreBytes),
                                                ptx::wgmma_descriptor(from_b + k * step_b, kRunBytes, kCoreBytes));
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(acc);
      if (before >= 0 && lane == 0) ptx::mbarrier_arrive(&empty[before]);  // the step before has been read
      before = stage.index;
      stage.advance(R::stages);
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
    if (before >= 0 && lane == 0) ptx::mbarrier_arrive(&empty[before]);

    // A thread's accumulators: of rows lane / 4 and lane / 4 + 8 of its warp's 16, columns 8 j + 2 (lane % 4) + {0, 1}.
    int const row = group * 64 + warp * 16 + lane / 4, quad = lane % 4;
    int64_t const first_n = t.n0 * TN;
    if (p.splits > 1) {
      float* const partial = static_cast<float*>(p.workspace) + unit * (TM * TN);
#pragma unroll
      for (int i = 0; i < TN / 2; ++i) {
        int const m = row + i % 4 / 2 * 8, n = i / 4 * 8 + quad * 2 + i % 2;
        partial[a_rows ? n * TM + m : m * TN + n] = acc[i];
      }
      continue;
    }
    T* const out = static_cast<T*>(p.out);
    if (p.bias != nullptr) {
      T const* const bias = static_cast<T const*>(p.bias) + t.group * p.group_bias;
#pragma unroll
      for (int j = 0; j < TN / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          int64_t const n = first_n + j * 8 + quad * 2 + e;
          float const value = n < p.N ? widen(bias[n * p.bias_stride]) : 0;
          acc[j * 4 + e] += value;
          acc[j * 4 + 2 + e] += value;
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int64_t const to = row_part(p, t, t.m0 * TM + row + half * 8).out;
      if constexpr (a_rows) {  // wgrad: rows are contiguous, 8 lanes write 8 neighbours
        T* to_n = out + to + (first_n + quad * 2) * p.n_out;
        int64_t n = first_n + quad * 2;
#pragma unroll
        for (int j = 0; j < TN / 8; ++j, n += 8, to_n += 8 * p.n_out) {
          if (to < 0 || n >= p.N) continue;
          to_n[0] = narrow<T>(acc[j * 4 + half * 2]);  // N is a multiple of 8: n + 1 exists too
          to_n[p.n_out] = narrow<T>(acc[j * 4 + half * 2 + 1]);
        }
      } else {  // columns are contiguous: the quad shares 32 of them out so that a lane writes 16 bytes
#pragma unroll
        for (int j = 0; j < TN / 8; j += 4) {
          uint32_t v[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) v[i] = pack<T>(acc[(j + i) * 4 + half * 2], acc[(j + i) * 4 + half * 2 + 1]);
          transpose_quad(v);
          int64_t const n = first_n + (j + quad) * 8;
          if (to >= 0 && n < p.N) *reinterpret_cast<uint4*>(out + to + n) = make_uint4(v[0], v[1], v[2], v[3]);
        }
      }
    }
  }
}

// a_rows, b_rows: the operand's rows are contiguous in memory, not its k.
template <class T, int TN, bool a_rows, bool b_rows>
__global__ void __launch_bounds__(kThreads, 1) igemm_kernel(__grid_constant__ Params const p) {
  using R = Ring<TN>;
  extern __shared__ uint8_t dynamic[];
  __shared__ Tile tiles[3];
  __shared__ Point rows[TM];
  __shared__ Columns<TK> columns[2];
  __shared__ uint64_t full[R::stages], empty[R::stages];
  uint32_t const ring = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int i = 0; i < R::stages; ++i) {
      ptx::mbarrier_init(&full[i], kWarpgroup);  // every gatherer
      ptx::mbarrier_init(&empty[i], 8);          // every multiplying warp
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  int const role = threadIdx.x / kWarpgroup;
  if (role == 0) {
    ptx::setmaxnreg_dec<kGatherRegs>();
    gather<T, TN, a_rows, b_rows>(p, tiles[0], rows, columns, ring, full, empty);
  } else {
    ptx::setmaxnreg_inc<kMultiplyRegs>();
    multiply<T, TN, a_rows, b_rows>(p, tiles[role], ring, full, empty);
  }
}

// Sums the partial tiles in the order of the splits. A thread has four neighbours in memory: four rows of wgrad's out,
// or four columns of the others'.
template <class T, int TN, bool a_rows>
__global__ void __launch_bounds__(256) igemm_reduce(__grid_constant__ Params const p) {
  __shared__ Tile tile;
  if (threadIdx.x == 0) locate(p, blockIdx.x, tile);
  __syncthreads();
  Tile const& t = tile;
  int const first = (int(blockIdx.y) * 256 + int(threadIdx.x)) * 4;
  int const m = a_rows ? first % TM : first / TN, n = a_rows ? first / TM : first % TN;
  int64_t const to = row_part(p, t, t.m0 * TM + m).out, column = t.n0 * TN + n;
  if (to < 0 || column >= p.N) return;
  float const* partial = static_cast<float const*>(p.workspace) + int64_t(blockIdx.x) * (TM * TN) + first;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int64_t split = 0; split < p.splits; ++split, partial += p.tiles * (TM * TN)) {
    float4 const v = *reinterpret_cast<float4 const*>(partial);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  float values[4] = {sum.x, sum.y, sum.z, sum.w};
  Vector<T, 4> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (!a_rows && p.bias != nullptr)
      values[i] += widen(static_cast<T const*>(p.bias)[t.group * p.group_bias + (column + i) * p.bias_stride]);
    out.v[i] = narrow<T>(values[i]);
  }
  *reinterpret_cast<Vector<T, 4>*>(static_cast<T*>(p.out) + to + column * p.n_out) = out;
}

// The kernel of the products, and the one that adds the partial tiles: blocks along a tile, and their threads.
struct Kernels {
  void (*main)(Params);
  int threads, shared_bytes;
  void (*reduce)(Params);
  int reduce_blocks, reduce_threads;
};

// Of the problem without far taps, which get zeros in wgrad.
inline cudaError_t launch(Op op, Kernels const& kernels, Problem const& problem, Plan const& plan, Arguments args,
                          cudaStream_t stream) {
  Near const near = without_far_taps(problem);
  int64_t const offset = near.w_offset * size_of(problem.dtype);
  cudaError_t error = cudaSuccess;
  if (op == Op::wgrad) {
    if (near.problem.R * near.problem.S < problem.R * problem.S) {
      Strides const& w = problem.w;  // dense, or lines of packed channels
      int64_t const last =
          (problem.K - 1) * w.n + (problem.C_per_group() - 1) * w.c + (problem.R - 1) * w.h + (problem.S - 1) * w.w;
      error = cudaMemsetAsync(args.out, 0, size_t((last + 1) * size_of(problem.dtype)), stream);
      if (error != cudaSuccess) return error;
    }
    args.out = static_cast<char*>(args.out) + offset;
  } else {
    args.b = static_cast<char const*>(args.b) + offset;
  }
  Params const p = params_of(op, near.problem, row_of(plan), plan, args);
  error = cudaFuncSetAttribute(kernels.main, cudaFuncAttributeMaxDynamicSharedMemorySize, kernels.shared_bytes);
  if (error != cudaSuccess) return error;
  int sm_count = 0;
  if ((error = count_sms(sm_count)) != cudaSuccess) return error;
  unsigned const blocks = unsigned(min64(p.tiles * p.splits, sm_count));
  kernels.main<<<blocks, kernels.threads, kernels.shared_bytes, stream>>>(p);
  if ((error = cudaGetLastError()) != cudaSuccess || p.splits == 1) return error;
  kernels.reduce<<<dim3(unsigned(p.tiles), kernels.reduce_blocks), kernels.reduce_threads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <Op op, DType dtype, int TN>
Kernels kernels() {
  using T = typename TypeOf<dtype>::type;
  constexpr bool a_rows = op == Op::wgrad, b_rows = op != Op::fprop;
  return {igemm_kernel<T, TN, a_rows, b_rows>, kThreads,       Ring<TN>::bytes,
          igemm_reduce<T, TN, a_rows>,         TM * TN / 1024, 256};
}

}  // namespace conv2d_ext::igemm

#define CONV2D_EXT_IGEMM_INSTANCE(family, op, dtype, tm, tn, tk, variant)                            \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                          \
    static_assert(tm == igemm::TM && tk == igemm::TK);                                               \
    return igemm::launch(Op::op, igemm::kernels<Op::op, DType::dtype, tn>(), p, plan, args, stream); \
  }
