// The smallest layers of 1x1 filters: the products of pixels_any.cuh,
//   out[m, n] = sum over k of a[m, k] * b[k, n]
// without shared memory before the products.
//
// A block computes a tile of 32 x 32 by mma.sync. Each of its warps multiplies every eighth run of 16 of the sum, whose
// fragments it loads as they lie: four neighbours in memory at a time, along what is summed over or across it, for the
// order of the sum and of the tile's rows and columns is free. All that a warp's registers hold is asked for at once.
// The warps' sums meet in shared memory, are added in the warps' order and stored.
//
// A split of the reduction is a cluster, whose blocks send each other their sums, as in pixels_any.cuh.
#pragma once

#include "pixels_any.cuh"

namespace conv2d_ext::direct_pixels {

using any_pixels::Operand;
using any_pixels::Params;

constexpr int kWarps = 8, kTile = 32, kRun = 16;
constexpr int kPitch = kTile + 8;  // floats of a row of sums: lanes meet every bank once

// The words of four neighbours in memory.
template <class T>
struct Four {
  static constexpr int words = int(sizeof(T));
  uint32_t v[words];
};

// `vector` of them, from the first-th on; zeros where there are none.
template <int vector, int first, class T>
__device__ inline void load(Four<T>& four, T const* at, bool exists) {
  constexpr int bytes = vector * int(sizeof(T)), word = first * int(sizeof(T)) / 4;
  if constexpr (bytes == 16) {
    uint4 const v = exists ? __ldg(reinterpret_cast<uint4 const*>(at)) : uint4{};
    four.v[0] = v.x, four.v[1] = v.y, four.v[2] = v.z, four.v[3] = v.w;
  } else if constexpr (bytes == 8) {
    uint2 const v = exists ? __ldg(reinterpret_cast<uint2 const*>(at)) : uint2{};
    four.v[word] = v.x, four.v[word + 1] = v.y;
  } else if constexpr (bytes == 4) {
    four.v[word] = exists ? __ldg(reinterpret_cast<uint32_t const*>(at)) : 0;
  } else {
    uint32_t const v = exists ? __ldg(reinterpret_cast<uint16_t const*>(at)) : 0;
    four.v[word] = first % 2 == 0 ? v : four.v[word] | v << 16;
  }
}

// A thread's part of an operand, 32 rows or columns of the result by a run of the sum: along, of rows g, g + 8, g + 16
// and g + 24 the four t-th columns; else the four g-th columns of the four t-th rows. It reads every eighth run.
template <class T, bool along, int vector, bool images>
struct Reader {
  T const* at;     // what it reads next, but for the place of a column among images
  int64_t step;    // to the next of its four rows
  int rows, left;  // of its four rows' first, those to the end; along: columns from the first of the next run
  int column;      // along, images: the first of the next run
  int64_t beyond[4 / vector];  // across, images: from its first column to the others

  static __device__ int64_t place_of(Operand const& o, int column) {
    int64_t const n = o.image.divide(column);
    return n * o.image_step + column;
  }
  // tile: where the block's begins in the result; run: the first to be read.
  __device__ void begin(Operand const& o, int tile, int run) {
    int const g = int(threadIdx.x) % 32 / 4, sum = run * kRun + int(threadIdx.x) % 4 * 4;
    at = static_cast<T const*>(o.from);
    if constexpr (along) {
      at += (tile + g) * o.step + (images ? 0 : sum);
      step = 8 * o.step, rows = o.rows - tile - g, left = o.columns - sum, column = sum;
    } else {
      int const first = tile + g * 4;
      int64_t const place = images ? place_of(o, first) : first;
      at += sum * o.step + place;
      step = o.step, rows = o.rows - sum, left = o.columns - first;
#pragma unroll
      for (int i = 1; i < 4 / vector; ++i) beyond[i] = images ? place_of(o, first + i * vector) - place : i * vector;
    }
  }
  template <int i>
  __device__ void piece(Four<T> (&v)[4], Operand const& o) const {
    bool const exists = left > i * vector;
    T const* from = at;
    if constexpr (along && images)
      from += exists ? place_of(o, column + i * vector) : 0;
    else if constexpr (images && i > 0)
      from += beyond[i];
    else
      from += i * vector;
#pragma unroll
    for (int j = 0; j < 4; ++j, from += step)
      load<vector, i * vector>(v[j], from, exists && rows > (along ? j * 8 : j));
  }
  __device__ void read(Four<T> (&v)[4], Operand const& o) {
    piece<0>(v, o);
    if constexpr (vector < 4) piece<4 / vector / 2>(v, o);
    if constexpr (vector == 1) piece<1>(v, o), piece<3>(v, o);
    if constexpr (along) {
      left -= kWarps * kRun, column += kWarps * kRun;
      if (!images) at += kWarps * kRun;
    } else {
      rows -= kWarps * kRun, at += kWarps * kRun * step;
    }
  }
};

// Fragment i of four of an operand, whose row or column g of the result is that of its lane: for 16 of the sum.
template <bool along>
__device__ inline void fragment(uint32_t (&f)[2], Four<__half> const (&v)[4], int i) {
  if constexpr (along) {
    f[0] = v[i].v[0], f[1] = v[i].v[1];
  } else {
    uint32_t const order = i % 2 == 0 ? 0x5410 : 0x7632;
    f[0] = __byte_perm(v[0].v[i / 2], v[1].v[i / 2], order), f[1] = __byte_perm(v[2].v[i / 2], v[3].v[i / 2], order);
  }
}

template <class T, bool a_along, bool b_along>
__device__ inline void multiply(float (&acc)[2][4][4], Four<T> const (&a)[4], Four<T> const (&b)[4]) {
  if constexpr (sizeof(T) == 2) {
    auto const& ha = reinterpret_cast<Four<__half> const(&)[4]>(a);
    auto const& hb = reinterpret_cast<Four<__half> const(&)[4]>(b);
    uint32_t fb[4][2];
#pragma unroll
    for (int j = 0; j < 4; ++j) fragment<b_along>(fb[j], hb, j);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t low[2], high[2];
      fragment<a_along>(low, ha, i * 2), fragment<a_along>(high, ha, i * 2 + 1);
#pragma unroll
      for (int j = 0; j < 4; ++j) ptx::mma_m16n8k16<T>(acc[i][j], low[0], high[0], low[1], high[1], fb[j][0], fb[j][1]);
    }
  } else {
    // Of a run's sixteen, positions t and t + 4 of instruction s are 4 t + 2 s and the next.
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      auto of = [&](Four<T> const(&v)[4], bool along, int i, int k) {
        return ptx::cvt_rn_tf32(__uint_as_float(along ? v[i].v[s * 2 + k] : v[s * 2 + k].v[i]));
      };
      uint32_t fb[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) fb[j][0] = of(b, b_along, j, 0), fb[j][1] = of(b, b_along, j, 1);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t const a0 = of(a, a_along, i * 2, 0), a1 = of(a, a_along, i * 2 + 1, 0), a2 = of(a, a_along, i * 2, 1),
                       a3 = of(a, a_along, i * 2 + 1, 1);
#pragma unroll
        for (int j = 0; j < 4; ++j) ptx::mma_m16n8k8_tf32(acc[i][j], a0, a1, a2, a3, fb[j][0], fb[j][1]);
      }
    }
  }
}

template <class T>
__device__ inline void store(Params const& p, float4 const& sum, int row, int column) {
  if (row >= p.M || column >= p.N) return;
  float v[4] = {sum.x, sum.y, sum.z, sum.w};
  T* const to = static_cast<T*>(p.out.to) + row * p.out.step;
  T const* const bias = static_cast<T const*>(p.bias);
  if (bias != nullptr)
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] += widen(bias[(p.bias_rows ? row : min(column + j, p.N - 1)) * p.bias_stride]);
  if (p.out.vector == 4) {
    int rest = column;
    int64_t const n = p.out.image.divide(rest);
    Vector<T, 4> vector;
#pragma unroll
    for (int j = 0; j < 4; ++j) vector.v[j] = narrow<T>(v[j]);
    *reinterpret_cast<Vector<T, 4>*>(to + n * p.out.image_step + rest) = vector;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int rest = column + j;
      int64_t const n = p.out.image.divide(rest);
      if (column + j < p.N) to[n * p.out.image_step + rest] = narrow<T>(v[j]);
    }
  }
}

template <class T, bool a_along, bool b_along, int vector, bool planes>
__global__ void __launch_bounds__(kWarps * 32, vector == 4 ? 2 : 1) product_kernel(__grid_constant__ Params const p) {
  constexpr int ahead = sizeof(T) == 2 && vector > 1 ? 4 : 2;  // runs
  __shared__ __align__(16) float sums[kWarps][kTile][kPitch];
  __shared__ __align__(16) float4 of_others[kWarps * 32];
  __shared__ uint64_t arrived;
  int const thread = int(threadIdx.x), warp = warp_uniform(thread / 32);
  int const row0 = int(blockIdx.y) * kTile, column0 = int(blockIdx.x) * kTile, rank = int(blockIdx.z);
  int const begin = rank * p.share, end = min(begin + p.share, p.steps);
  uint32_t const bar = ptx::shared_address(&arrived);
  if (p.splits > 1) {
    if (warp == 0) {
      if (ptx::elect()) ptx::mbarrier_init(&arrived, 1), ptx::fence_mbarrier_init();
      __syncwarp();
      if (ptx::elect()) ptx::mbarrier_arrive_expect_tx(bar, kWarps * 32 * 16);
    }
    __syncwarp();
    ptx::barrier_cluster_arrive();
  }
  Reader<T, a_along, vector, planes && a_along && b_along> a;
  Reader<T, b_along, vector, planes> b;
  int run = begin + warp;
  a.begin(p.a, row0, run), b.begin(p.b, column0, run);
  ptx::griddepcontrol_wait();
  Four<T> va[ahead][4], vb[ahead][4];
  auto read = [&](int i) {
    if (run + i * kWarps < end) a.read(va[i % ahead], p.a), b.read(vb[i % ahead], p.b);
  };
#pragma unroll
  for (int i = 0; i < ahead; ++i) read(i);
  float acc[2][4][4] = {};
  while (run < end) {
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (run + i * kWarps < end) multiply<T, a_along, b_along>(acc, va[i], vb[i]);
      read(i + ahead);
    }
    run += ahead * kWarps;
  }
  ptx::griddepcontrol_launch_dependents();
  int const g = thread % 32 / 4, t = thread % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const to = sums[warp][a_along ? i * 16 + half * 8 + g : g * 4 + i * 2 + half];
      if constexpr (b_along) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          *reinterpret_cast<float2*>(to + j * 8 + t * 2) = make_float2(acc[i][j][half * 2], acc[i][j][half * 2 + 1]);
      } else {
#pragma unroll
        for (int c = 0; c < 2; ++c)
          *reinterpret_cast<float4*>(to + t * 8 + c * 4) = make_float4(
              acc[i][0][half * 2 + c], acc[i][1][half * 2 + c], acc[i][2][half * 2 + c], acc[i][3][half * 2 + c]);
      }
    }
  __syncthreads();
  auto add = [](float4& sum, float4 const& v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; };
  float4 sum{};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) add(sum, *reinterpret_cast<float4 const*>(&sums[i][thread / 8][thread % 8 * 4]));
  int place = thread;
  if (p.splits > 1) {
    int const per = kWarps * 32 / p.splits, to = thread / per;
    float const v[4] = {sum.x, sum.y, sum.z, sum.w};
    ptx::barrier_cluster_wait();  // the others have set up their barriers
    ptx::st_async_v4(ptx::mapa(ptx::shared_address(&of_others[rank * per + thread % per]), to), v, ptx::mapa(bar, to));
    ptx::mbarrier_wait_cluster(bar, 0);
    if (thread >= per) return;
    sum = {};
    for (int i = 0; i < p.splits; ++i) add(sum, of_others[i * per + thread]);
    place = rank * per + thread;
  }
  store<T>(p, sum, row0 + place / 8, column0 + place % 8 * 4);
}

// ---- host side

template <class T, bool a_along, bool b_along, bool planes, int vector>
cudaError_t start(Params const& p, cudaStream_t stream) {
  dim3 const grid(unsigned(ceil_div(p.N, kTile)), unsigned(ceil_div(p.M, kTile)), unsigned(p.splits));
  return launch_clusters(product_kernel<T, a_along, b_along, vector, planes>, dim3(1, 1, grid.z), grid, kWarps * 32, 0,
                         stream, p);
}

template <class T, bool a_along, bool b_along, bool planes>
cudaError_t start(Params const& p, int vector, cudaStream_t stream) {
  if (vector == 4) return start<T, a_along, b_along, planes, 4>(p, stream);
  if (vector == 2) return start<T, a_along, b_along, planes, 2>(p, stream);
  return start<T, a_along, b_along, planes, 1>(p, stream);
}

template <Op op, DType dtype>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  AnyPixels const s(op, problem);
  Params p = any_pixels::params_of(op, s, problem, plan, args, 4 * size_of(dtype));
  p.steps = int32_t(ceil_div(s.depth, kRun)), p.share = int32_t(ceil_div(p.steps, p.splits));
  int const vector = s.vector(dtype);
  constexpr bool fprop = op == Op::fprop, wgrad = op == Op::wgrad;
  if (s.lines) return start<T, !wgrad, fprop, false>(p, vector, stream);
  return start<T, op != Op::dgrad, wgrad, true>(p, vector, stream);
}

}  // namespace conv2d_ext::direct_pixels

#define CONV2D_EXT_PIXELS_DIRECT_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                       \
    return direct_pixels::launch<Op::op, DType::dtype>(p, plan, args, stream);    \
  }
