// Small layers of 1x1 filters, all three ops, in channels_last without gaps or NCHW, whatever the channels and pixels:
// a product of matrices in one launch,
//   out[m, n] = sum over k of a[m, k] * b[k, n]
// where an operand's columns in memory are what is summed over, or its rows or columns of the result.
//
// A block computes a tile of 64 x 64 by mma.sync, a warp a quarter of it over half of the sums. All threads copy, 16
// bytes at a time or, where vectors do not lie so, 4 or 8 (cp.async), or single elements, and an operand stays in
// shared memory as it lay in memory; fragments are loaded from either order, for the order of the sum is free. TF32 is
// rounded in registers.
//
// A split of the reduction is a cluster, as in tma_lean.cuh: its blocks send each other their sums, each adds some of
// the tile in their order, and stores.
#pragma once

#include <type_traits>

#include "../core/pixels_any.h"
#include "fragments.cuh"
#include "launch.h"
#include "tma.cuh"

namespace conv2d_ext::any_pixels {

using tma::Divisor;

constexpr int kThreads = 256;
constexpr int kUnitBytes = kWarpgroup * 16;  // of four sums of every thread of a group

struct Operand {
  void const* from;
  int64_t step, image_step;  // elements
  Divisor image;             // columns of an image; all columns if there are no images
  int32_t rows, columns;
  int32_t bytes, log_elements;  // that are copied at once; that a thread copies
};
struct Result {
  void* to;
  int64_t step, image_step;
  Divisor image;
  int32_t vector;  // elements that are stored at once
};
struct Params {
  Operand a, b;
  Result out;
  void const* bias;
  int64_t bias_stride;
  int32_t bias_rows;  // it belongs to the rows of the result
  int32_t M, N;
  int32_t steps, share;
  int32_t stages;       // 4, 6 or 10
  uint32_t zero;        // which the compiler does not know
  int32_t splits, per;  // blocks of a cluster: 1, 2, 4 or 8; units of a thread's sums that one adds
};

// An operand's part of a stage: `rows` of `columns` elements. along: its columns are what is summed over.
template <class T, int size, bool along>
struct Part {
  static constexpr int depth = kLineBytes / int(sizeof(T));
  static constexpr int rows = along ? size : depth, columns = along ? depth : size;
  // Lanes' loads of fragments meet every bank once.
  static constexpr int pitch = columns * int(sizeof(T)) + (sizeof(T) == 2 ? 16 : along ? 32 : 16);
  static constexpr int bytes = rows * pitch;
};

// A thread's copies of an operand's part of each stage, one after the other.
template <class T, int size, bool along>
struct Copies {
  using S = Part<T, size, along>;
  T const* from;
  int column, row;
  uint32_t to;    // in a stage
  int64_t apart;  // of single elements, from one to the next, which may be another image's

  // first: where the tile begins; step: of the reduction.
  __device__ void begin(Operand const& o, int first, int step) {
    constexpr int log_columns = S::columns == 64 ? 6 : 5;
    static_assert(S::columns == 1 << log_columns);
    int const log_chunks = log_columns - o.log_elements;
    int const chunk = (int(threadIdx.x) & ((1 << log_chunks) - 1)) << o.log_elements;
    int const of = int(threadIdx.x) >> log_chunks;
    column = (along ? step * S::depth : first) + chunk, row = (along ? first : step * S::depth) + of;
    to = of * S::pitch + chunk * int(sizeof(T));
    place(o);
  }
  __device__ void place(Operand const& o) {
    int rest = column;
    int64_t const n = o.image.divide(rest);
    from = static_cast<T const*>(o.from) + n * o.image_step + rest + row * o.step;
    apart = o.image_step == 0 || rest + 1 < o.image.value ? 1 : o.image_step - rest;
  }
  template <int vector>
  __device__ void copy_vectors(Operand const& o, uint32_t stage) const {
    constexpr int chunks = S::columns * int(sizeof(T)) / (vector == 2 ? 4 : vector), at_once = kThreads / chunks;
    static_assert(kThreads % chunks == 0 && S::rows % at_once == 0);
    bool const exists = column < o.columns;
    int64_t const next = o.step * at_once;
    T const* at = from;
    if constexpr (vector == 2) {  // two of them
      uint16_t v[S::rows / at_once][2];
      bool const second = column + 1 < o.columns;
#pragma unroll
      for (int i = 0; i < S::rows / at_once; ++i, at += next) {
        bool const is_row = row + i * at_once < o.rows;
        auto const* const elements = reinterpret_cast<uint16_t const*>(at);
        v[i][0] = exists && is_row ? elements[0] : uint16_t(0);
        v[i][1] = second && is_row ? elements[apart] : uint16_t(0);
      }
#pragma unroll
      for (int i = 0; i < S::rows / at_once; ++i)
        ptx::st_shared(stage + to + i * at_once * S::pitch, v[i][0] | uint32_t(v[i][1]) << 16);
    } else {
#pragma unroll
      for (int i = 0; i < S::rows / at_once; ++i, at += next) {
        bool const valid = exists && row + i * at_once < o.rows;
        uint32_t const shared = stage + to + i * at_once * S::pitch;
        if constexpr (vector == 16)
          ptx::cp_async_16(shared, at, valid);
        else
          ptx::cp_async_ca<vector>(shared, at, valid);
      }
    }
  }
  __device__ void copy(Operand const& o, uint32_t stage) {
    if (o.bytes == 16)
      copy_vectors<16>(o, stage);
    else if (sizeof(T) == 2 && o.bytes == 8)
      copy_vectors<8>(o, stage);
    else if (o.bytes == 4)
      copy_vectors<4>(o, stage);
    else if constexpr (sizeof(T) == 2)
      copy_vectors<2>(o, stage);
    if (!along)
      row += S::depth, from += S::depth * o.step;
    else if (column += S::depth; o.image_step == 0)
      from += S::depth;
    else
      place(o);
  }
};

// A warp's 32 x 32 sums, as two by four instructions. Which row and column of them a lane has depends on the order in
// which it loads fragments: of floats whose neighbours are rows or columns of the result, four at a time.
template <class T, bool a_along, bool b_along>
struct Places {
  static constexpr bool rows_by_four = sizeof(T) == 4 && !a_along, columns_by_four = sizeof(T) == 4 && !b_along;
  int g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
  __device__ int row(int i, int half) const { return rows_by_four ? g * 4 + i * 2 + half : i * 16 + half * 8 + g; }
};

template <class T, bool along>
struct Fragments;

template <bool along>
struct Fragments<float, along> {
  using A = Part<float, 64, along>;
  // Of the reduction's eight, position t is 2 t and position t + 4 is 2 t + 1.
  // Rows `first` to first + 31 of A, as two instructions' operands.
  static __device__ void rows(uint32_t (&v)[2][4], uint32_t from, int first, int k, uint32_t zero) {
    int const g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
    if constexpr (along) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint2 const two = ptx::ld_shared_v2(from + (first + i * 16 + half * 8 + g) * A::pitch + (k * 8 + t * 2) * 4);
          v[i][half] = rounded(two.x, zero), v[i][2 + half] = rounded(two.y, zero);
        }
    } else {
      uint32_t const at = from + (k * 8 + t * 2) * A::pitch + (first + g * 4) * 4;
      uint4 const low = ptx::ld_shared_v4(at), high = ptx::ld_shared_v4(at + A::pitch);
      v[0][0] = rounded(low.x, zero), v[0][1] = rounded(low.y, zero), v[1][0] = rounded(low.z, zero),
      v[1][1] = rounded(low.w, zero);
      v[0][2] = rounded(high.x, zero), v[0][3] = rounded(high.y, zero), v[1][2] = rounded(high.z, zero),
      v[1][3] = rounded(high.w, zero);
    }
  }
  static __device__ void columns(uint32_t (&v)[4][2], uint32_t from, int first, int k, uint32_t zero) {
    int const g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
    if constexpr (along) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint2 const two = ptx::ld_shared_v2(from + (first + j * 8 + g) * A::pitch + (k * 8 + t * 2) * 4);
        v[j][0] = rounded(two.x, zero), v[j][1] = rounded(two.y, zero);
      }
    } else {
      uint32_t const at = from + (k * 8 + t * 2) * A::pitch + (first + g * 4) * 4;
      uint4 const low = ptx::ld_shared_v4(at), high = ptx::ld_shared_v4(at + A::pitch);
      v[0][0] = rounded(low.x, zero), v[1][0] = rounded(low.y, zero), v[2][0] = rounded(low.z, zero),
      v[3][0] = rounded(low.w, zero);
      v[0][1] = rounded(high.x, zero), v[1][1] = rounded(high.y, zero), v[2][1] = rounded(high.z, zero),
      v[3][1] = rounded(high.w, zero);
    }
  }
  // What the conversion leaves, ptxas moves to other registers, once for every product that takes it; a sum's result it
  // does not.
  static __device__ uint32_t rounded(uint32_t v, uint32_t zero) { return ptx::cvt_rn_tf32(__uint_as_float(v)) + zero; }
};

template <class T, bool along>
struct Fragments {
  using A = Part<T, 64, along>;
  static __device__ void rows(uint32_t (&v)[2][4], uint32_t from, int first, int k, uint32_t) {
    int const lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const m = first + i * 16;
      if constexpr (along)
        ptx::ldmatrix_x4(v[i], from + (m + lane % 16) * A::pitch + (k * 16 + lane / 16 * 8) * 2);
      else
        ptx::ldmatrix_x4_trans(v[i],
                               from + (k * 16 + lane / 16 * 8 + lane % 8) * A::pitch + (m + lane / 8 % 2 * 8) * 2);
    }
  }
  static __device__ void columns(uint32_t (&v)[4][2], uint32_t from, int first, int k, uint32_t) {
    int const lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      uint32_t two[4];
      int const n = first + j * 8 + lane / 16 * 8;
      if constexpr (along)
        ptx::ldmatrix_x4(two, from + (n + lane % 8) * A::pitch + (k * 16 + lane / 8 % 2 * 8) * 2);
      else
        ptx::ldmatrix_x4_trans(two, from + (k * 16 + lane / 8 % 2 * 8 + lane % 8) * A::pitch + n * 2);
      v[j][0] = two[0], v[j][1] = two[1], v[j + 1][0] = two[2], v[j + 1][1] = two[3];
    }
  }
};

template <class T>
__device__ inline void mma(float (&acc)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
  if constexpr (sizeof(T) == 4)
    ptx::mma_m16n8k8_tf32(acc, a[0], a[1], a[2], a[3], b[0], b[1]);
  else
    ptx::mma_m16n8k16<T>(acc, a[0], a[1], a[2], a[3], b[0], b[1]);
}

// A thread's eight units of four sums: four columns of a row where fragments are loaded so, else two columns of two
// rows.
template <class T, bool a_along, bool b_along>
struct Units {
  static constexpr bool by_four = Places<T, a_along, b_along>::columns_by_four;
  // All of a thread's units to shared memory.
  static __device__ void put(float const (&acc)[2][4][4], uint32_t to) {
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      float v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = by_four ? acc[u / 4][j][u % 4] : acc[u / 4][u % 4][j];
      ptx::st_shared_v4(to + u * kUnitBytes, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]),
                                                        __float_as_uint(v[2]), __float_as_uint(v[3])));
    }
  }

  static __device__ void store(Params const& p, int u, float (&v)[4], int row0, int column0) {
    int const i = u / 4, of = u % 4;
    Places<T, a_along, b_along> const places;
    constexpr int rows = by_four ? 1 : 2, columns = 4 / rows;
    int const column = column0 + (by_four ? places.t * 8 + of % 2 * 4 : of * 8 + places.t * 2);
    if (column >= p.N) return;
    T* const out = static_cast<T*>(p.out.to);
    T const* const bias = static_cast<T const*>(p.bias);
    bool const whole = p.out.vector >= columns;
    if (bias != nullptr && !p.bias_rows) {
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        float const add = widen(bias[min(column + j, p.N - 1) * p.bias_stride]);
#pragma unroll
        for (int r = 0; r < rows; ++r) v[r * columns + j] += add;
      }
    }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      int const m = row0 + places.row(i, by_four ? of / 2 : r);
      if (m >= p.M) continue;
      if (bias != nullptr && p.bias_rows) {
        float const add = widen(bias[m * p.bias_stride]);
#pragma unroll
        for (int j = 0; j < columns; ++j) v[r * columns + j] += add;
      }
      T* const to = out + m * p.out.step;
      if (whole) {
        int rest = column;
        int64_t const n = p.out.image.divide(rest);
        Vector<T, columns> vector;
#pragma unroll
        for (int j = 0; j < columns; ++j) vector.v[j] = narrow<T>(v[r * columns + j]);
        *reinterpret_cast<Vector<T, columns>*>(to + n * p.out.image_step + rest) = vector;
      } else {
#pragma unroll
        for (int j = 0; j < columns; ++j) {
          int rest = column + j;
          int64_t const n = p.out.image.divide(rest);
          if (column + j < p.N) to[n * p.out.image_step + rest] = narrow<T>(v[r * columns + j]);
        }
      }
    }
  }
};

template <class T, bool a_along, bool b_along>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(__grid_constant__ Params const p) {
  using A = Part<T, 64, a_along>;
  using B = Part<T, 64, b_along>;
  using U = Units<T, a_along, b_along>;
  constexpr int stage_bytes = A::bytes + B::bytes;
  extern __shared__ __align__(16) uint8_t dynamic[];
  __shared__ uint64_t parts;
  uint32_t const ring = ptx::shared_address(dynamic), bar = ptx::shared_address(&parts);
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), warp = warp_uniform(int(threadIdx.x) / 32 % 4);
  int const warp_m = warp / 2 * 32, warp_n = warp % 2 * 32;
  int const row0 = int(blockIdx.y) * 64, column0 = int(blockIdx.x) * 64, rank = int(blockIdx.z);
  int const begin = rank * p.share, count = max(min(p.share, p.steps - begin), 0);
  if (p.splits > 1) {
    if (threadIdx.x < 32) {
      if (ptx::elect()) ptx::mbarrier_init(&parts, 1), ptx::fence_mbarrier_init();
      __syncwarp();
      if (ptx::elect()) ptx::mbarrier_arrive_expect_tx(bar, 8 * kUnitBytes);
    }
    __syncwarp();
    ptx::barrier_cluster_arrive();
  }
  Copies<T, 64, a_along> copies_a;
  Copies<T, 64, b_along> copies_b;
  copies_a.begin(p.a, row0, begin), copies_b.begin(p.b, column0, begin);
  ptx::griddepcontrol_wait();
  float acc[2][4][4] = {};
  int slot = 0, filled = 0;
  auto copy_stage = [&] {
    uint32_t const to = ring + filled * stage_bytes;
    copies_a.copy(p.a, to), copies_b.copy(p.b, to + A::bytes);
    if (++filled == p.stages) filled = 0;
  };
#pragma unroll 1
  for (int step = 1 - p.stages; step < count; ++step) {
    if (step >= 0) {
      if (p.stages == 4)
        ptx::cp_async_wait_group<2>();
      else if (p.stages == 6)
        ptx::cp_async_wait_group<4>();
      else
        ptx::cp_async_wait_group<8>();
      __syncthreads();
    }
    bool const more = step + p.stages - 1 < count, early = group == 0 || step < 0;
    if (more && early) copy_stage();
    if (step < 0) {
      ptx::cp_async_commit_group();
      continue;
    }
    uint32_t const from_a = ring + slot * stage_bytes, from_b = from_a + A::bytes;
    if (++slot == p.stages) slot = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const k = group * 2 + i;
      uint32_t a[2][4], b[4][2];
      Fragments<T, a_along>::rows(a, from_a, warp_m, k, p.zero);
      Fragments<T, b_along>::columns(b, from_b, warp_n, k, p.zero);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) mma<T>(acc[m][n], a[m], b[n]);
    }
    if (more && !early) copy_stage();  // so that some copy while others multiply
    ptx::cp_async_commit_group();
  }
  ptx::griddepcontrol_launch_dependents();
  __syncthreads();
  int const thread = int(threadIdx.x) % kWarpgroup;
  U::put(acc, ring + group * 8 * kUnitBytes + thread * 16);
  __syncthreads();
  // The parts of a unit's sums: of the two groups, or, once those are added, of the blocks of a cluster, to which a
  // thread sends them, to threads of the same place in the tile.
  uint32_t from = ring + thread * 16;
  int first = 0, last = 8, parts_of = 2, part_bytes = 8 * kUnitBytes;
  if (p.splits > 1) {
    uint32_t const mine = ring + p.stages * stage_bytes + thread * 16;
    ptx::barrier_cluster_wait();  // the others have set up their barriers
#pragma unroll 1
    for (int u = group; u < 8; u += 2) {
      uint4 const a = ptx::ld_shared_v4(from + u * kUnitBytes), b = ptx::ld_shared_v4(from + (8 + u) * kUnitBytes);
      float const v[4] = {__uint_as_float(a.x) + __uint_as_float(b.x), __uint_as_float(a.y) + __uint_as_float(b.y),
                          __uint_as_float(a.z) + __uint_as_float(b.z), __uint_as_float(a.w) + __uint_as_float(b.w)};
      int const to = u / p.per, at = rank * p.per + u - to * p.per;
      ptx::st_async_v4(ptx::mapa(mine + at * kUnitBytes, to), v, ptx::mapa(bar, to));
    }
    ptx::mbarrier_wait_cluster(bar, 0);
    first = rank * p.per, last = first + p.per, parts_of = p.splits, part_bytes = p.per * kUnitBytes;
    from = mine - first * kUnitBytes;
  }
#pragma unroll 1
  for (int u = first + group; u < last; u += 2) {
    float sum[4] = {};
    uint32_t at = from + u * kUnitBytes;
#pragma unroll 2
    for (int i = 0; i < parts_of; ++i, at += part_bytes) {
      uint4 const v = ptx::ld_shared_v4(at);
      sum[0] += __uint_as_float(v.x), sum[1] += __uint_as_float(v.y), sum[2] += __uint_as_float(v.z),
          sum[3] += __uint_as_float(v.w);
    }
    U::store(p, u, sum, row0 + warp_m, column0 + warp_n);
  }
}

// ---- host side

inline Operand operand_of(Matrix const& m, void const* from, DType t) {
  int const vector = m.vector(t, 16), bytes = t == DType::f32 && vector < 4 ? 4 : vector * size_of(t);
  int log = bytes == 2 ? 1 : 0;  // single elements: two at a time
  while (size_of(t) << log < bytes) ++log;
  return {from,
          m.step,
          m.image_step,
          Divisor(m.image > 0 ? m.image : max64(m.columns, 1)),
          int32_t(m.rows),
          int32_t(m.columns),
          bytes,
          log};
}

// All but the steps. out_bytes: that are stored at once.
inline Params params_of(Op op, AnyPixels const& s, Problem const& problem, Plan const& plan, Arguments const& args,
                        int out_bytes) {
  bool const turned = op == Op::wgrad || !s.lines;  // y, x; or the filters, pixels
  DType const t = problem.dtype;
  Params p{};
  p.a = operand_of(s.a, turned ? args.b : args.a, t), p.b = operand_of(s.b, turned ? args.a : args.b, t);
  p.out = {args.out, s.out.step, s.out.image_step, Divisor(s.out.image > 0 ? s.out.image : max64(s.out.columns, 1)),
           s.out.vector(t, out_bytes)};
  p.bias = args.bias, p.bias_stride = args.bias_stride, p.bias_rows = s.lines ? 0 : 1;
  p.M = int32_t(s.M), p.N = int32_t(s.N), p.splits = plan.split_k, p.per = int32_t(ceil_div(8, p.splits));
  return p;
}

template <class T, bool a_along, bool b_along>
cudaError_t start(Params& p, cudaStream_t stream) {
  auto* const kernel = product_kernel<T, a_along, b_along>;
  // Two blocks share an SM where there are so many; else all that a block reads is on its way at once, if it fits.
  bool const alone = any_pixels_alone(ceil_div(p.N, 64) * ceil_div(p.M, 64), p.splits);
  p.stages = !alone || p.share < 4 ? 4 : p.share < 6 ? 6 : 10;
  int const bytes =
      p.stages * (Part<T, 64, a_along>::bytes + Part<T, 64, b_along>::bytes) + (p.splits > 1 ? 8 * kUnitBytes : 0);
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 224 * 1024))
    return error;
  dim3 const grid(unsigned(ceil_div(p.N, 64)), unsigned(ceil_div(p.M, 64)), unsigned(p.splits));
  return launch_clusters(kernel, dim3(1, 1, grid.z), grid, kThreads, bytes, stream, p);
}

template <Op op, DType dtype>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  AnyPixels const s(op, problem);
  Params p = params_of(op, s, problem, plan, args, dtype == DType::f32 ? 16 : 4);
  p.steps = int32_t(any_pixels_steps(problem, s)), p.share = int32_t(ceil_div(p.steps, p.splits));
  if (s.a_along && s.b_along) return start<T, true, true>(p, stream);
  if constexpr (op != Op::wgrad)
    if (s.a_along) return start<T, true, false>(p, stream);
  return start<T, false, false>(p, stream);
}

}  // namespace conv2d_ext::any_pixels

#define CONV2D_EXT_PIXELS_ANY_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                    \
    return any_pixels::launch<Op::op, DType::dtype>(p, plan, args, stream);    \
  }
