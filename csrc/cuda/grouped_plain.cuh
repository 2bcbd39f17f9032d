// fprop, and dgrad of stride 1, of groups of few channels over NCHW: grouped_plain_wgrad.cuh's rows, in which lanes
// find pixels side by side. What is summed over are channels: a lane reads four pixels of a row, and those beside them
// for the taps of a row of the filter, of two channels at once. Its results are four pixels of a filter, which go to
// memory as they are, or by way of shared memory, where whole images are put together.
//
// A warp has 32 pixels of a row by 16 filters (dgrad: channels), which are the rows of mma.sync, its pixels the columns;
// or by the 8 of a unit, and then it is the other way round. It walks down the rows of a tile: each row of inputs meets
// three rows of results, whose sums are kept at a time. Pixels are asked for a step ahead.
//
// The zeros between a unit's groups meet infinities: a thread that finds NaN makes its results again, product by
// product.
#pragma once

#include "grouped_plain_wgrad.cuh"
#include "grouped_tile.cuh"

namespace conv2d_ext::plain {

struct RowParams {
  Side x;
  void const* w;
  void* out;
  void const* bias;
  int64_t bias_stride, w_in, w_out, w_h, w_w;  // dgrad: channels are what results
  int flip, in_unit, out_unit, in_group, out_group, outs;
  int units, jobs, shares, rows, images, quads, tiles_h, tiles, splits, N, P, Q;
  int stage_bytes, stages, stages_at, out_at;  // out_at: where images of results are put together; 0: nowhere
};

constexpr int kQuad = 4;  // pixels of a lane

// Inputs that are one product's: two blocks of 8 channels of 16 bits, one of f32.
template <class T>
constexpr int kStepBlocks = sizeof(T) == 4 ? 1 : 2;

// A filter of the unit that begins at unit0 + u; zero between groups and behind the last.
template <class T>
__device__ T weight(RowParams const& p, int unit, int in, int out, int r, int s) {
  int const channel = unit * p.in_unit + in, result = unit * p.out_unit + out, group = channel / p.in_group;
  if (in >= p.in_unit || out >= p.out_unit || result >= p.outs || result / p.out_group != group) return T(0.f);
  if (p.flip) r = 2 - r, s = 2 - s;
  int64_t const at = p.flip ? int64_t(channel) * p.w_in + (result - group * p.out_group) * p.w_out
                            : int64_t(result) * p.w_out + (channel - group * p.in_group) * p.w_in;
  return static_cast<T const*>(p.w)[at + r * p.w_h + s * p.w_w];
}

// A word of an operand: f32: of input t, or of t + 4; 16-bit types: both.
template <class T>
__device__ uint32_t weights(RowParams const& p, int unit, int in, int half, int out, int r, int s) {
  if constexpr (sizeof(T) == 4) {
    return ptx::cvt_rn_tf32(weight<T>(p, unit, in + half * 4, out, r, s));
  } else {
    T const a = weight<T>(p, unit, in + half * 8, out, r, s), b = weight<T>(p, unit, in + half * 8 + 4, out, r, s);
    return uint32_t(reinterpret_cast<unsigned short const&>(a)) |
           uint32_t(reinterpret_cast<unsigned short const&>(b)) << 16;
  }
}

// What a lane reads of a row: a quad of pixels and those beside it, of channels t and t + 4 of each block.
template <class T>
struct Pixels {
  static constexpr bool f32 = sizeof(T) == 4;
  static constexpr int blocks = kStepBlocks<T>;
  uint32_t raw[blocks][2][f32 ? 6 : 4];

  __device__ void load(uint32_t at, int four, bool second) {
#pragma unroll
    for (int b = 0; b < blocks; ++b)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t(&v)[f32 ? 6 : 4] = raw[b][i];
        if (b == 0 || second) {
          uint32_t const from = at + (2 * b + i) * four;
          v[0] = ptx::ld_shared(from - 4);
          if constexpr (f32) {
            uint4 const middle = ptx::ld_shared_v4(from);
            v[1] = middle.x, v[2] = middle.y, v[3] = middle.z, v[4] = middle.w, v[5] = ptx::ld_shared(from + 16);
          } else {
            uint2 const middle = ptx::ld_shared_v2(from);
            v[1] = middle.x, v[2] = middle.y, v[3] = ptx::ld_shared(from + 8);
          }
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) v[j] = 0;
        }
      }
  }

  // Pixel i - 1 of the quad: words of an operand.
  __device__ uint32_t word(int i, int half) const {
    if constexpr (f32) {
      return ptx::cvt_rn_tf32(__uint_as_float(raw[0][half][i]));
    } else {
      uint32_t const(&a)[4] = raw[half][0], (&b)[4] = raw[half][1];
      int const at = (i + 1) / 2;
      return __byte_perm(a[at], b[at], i % 2 == 0 ? 0x7632 : 0x5410);
    }
  }
};

// Results of a warp. wide: 16 filters by 4 x 8 pixels, else 2 x 16 pixels by 8 filters.
template <class T, bool wide>
struct Rows {
  static constexpr bool f32 = sizeof(T) == 4;
  static constexpr int tiles = wide ? 4 : 2;
  float d[3][tiles][4];  // of the row that begins, the one above, and the one above that, which is complete
  uint32_t held[wide ? 1 : 3][f32 ? 6 : 3];

  __device__ void hold(uint32_t w) {
#pragma unroll
    for (int r = 0; r < 3; ++r)
#pragma unroll
      for (int i = 0; i < (f32 ? 6 : 3); ++i) held[r][i] = ptx::ld_shared(w + (r * 6 + i) * 128);
  }

  __device__ void next() {
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) d[2][i][j] = d[1][i][j], d[1][i][j] = d[0][i][j], d[0][i][j] = 0;
  }

  template <bool r0, bool r1, bool r2>
  __device__ void multiply(uint32_t const (&v)[6][2], uint32_t w) {
    constexpr bool takes[3] = {r0, r1, r2};
    if constexpr (wide) {
#pragma unroll
      for (int s = 0; s < 3; ++s)
#pragma unroll
        for (int r = 0; r < 3; ++r) {
          if (!takes[r]) continue;
          uint4 const a = ptx::ld_shared_v4(w + (r * 3 + s) * 512);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if constexpr (f32)
              ptx::mma_m16n8k8_tf32(d[r][i], a.x, a.y, a.z, a.w, v[i + s][0], v[i + s][1]);
            else
              ptx::mma_m16n8k16<T>(d[r][i], a.x, a.y, a.z, a.w, v[i + s][0], v[i + s][1]);
          }
        }
    } else if constexpr (f32) {
#pragma unroll
      for (int s = 0; s < 3; ++s)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int r = 0; r < 3; ++r)
            if (takes[r])
              ptx::mma_m16n8k8_tf32(d[r][i], v[2 * i + s][0], v[2 * i + s + 1][0], v[2 * i + s][1],
                                    v[2 * i + s + 1][1], held[r][s * 2], held[r][s * 2 + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 3; ++r)
          if (takes[r])
            ptx::mma_m16n8k16<T>(d[r][i], v[2 * i][0], v[2 * i + 1][0], v[2 * i + 1][0], v[2 * i + 2][0], held[r][0],
                                 held[r][1]);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 3; ++r)
          if (takes[r]) ptx::mma_m16n8k8<T>(d[r][i], v[2 * i + 2][0], v[2 * i + 3][0], held[r][2]);
    }
  }

  // Of the row that is complete: lane's quad `h` (wide: two), filter `f`, pixel `j`.
  __device__ float result(int f, int h, int j) const {
    return wide ? d[2][j][f * 2 + h] : d[2][j / 2][j % 2 * 2 + f];
  }
};

template <class T>
__device__ void store_quad(T* to, float const (&v)[kQuad], int count, int Q) {
  if (Q % 4 == 0) {
    Vector<T, 4> q;
#pragma unroll
    for (int i = 0; i < 4; ++i) q.v[i] = narrow<T>(v[i]);
    *reinterpret_cast<Vector<T, 4>*>(to) = q;
  } else if (Q % 2 == 0) {
    *reinterpret_cast<Vector<T, 2>*>(to) = Vector<T, 2>{narrow<T>(v[0]), narrow<T>(v[1])};
    if (count > 2) *reinterpret_cast<Vector<T, 2>*>(to + 2) = Vector<T, 2>{narrow<T>(v[2]), narrow<T>(v[3])};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) to[i] = narrow<T>(v[i]);
  }
}

// Product by product: a result's pixel.
template <class T>
__device__ __noinline__ float result_again(RowParams const& p, int result, int image, int h, int w) {
  int const group = result / p.out_group;
  T const* const x = static_cast<T const*>(p.x.data) + image * p.x.image + int64_t(group) * p.in_group * p.P * p.Q;
  float sum = 0;
  for (int c = 0; c < p.in_group; ++c)
    for (int r = 0; r < 3; ++r)
      for (int s = 0; s < 3; ++s)
        if (unsigned(h + r - 1) < unsigned(p.P) && unsigned(w + s - 1) < unsigned(p.Q))
          sum += widen(x[(c * p.P + h + r - 1) * p.Q + w + s - 1]) *
                 widen(weight<T>(p, result / p.out_unit, group * p.in_group + c - result / p.out_unit * p.in_unit,
                                 result % p.out_unit, r, s));
  return sum;
}

template <class T, bool wide>
__global__ void __launch_bounds__(plain_row_warps(wide) * 32, 1) rows_kernel(__grid_constant__ RowParams const p) {
  extern __shared__ __align__(128) char shared[];
  constexpr bool f32 = sizeof(T) == 4;
  constexpr int size = int(sizeof(T)), blocks = kStepBlocks<T>, filters = wide ? 16 : 8, quads = wide ? 2 : 1;
  constexpr int words = wide ? 4 * 32 * 9 : 6 * 32 * 3;  // of a job and step
  uint32_t const base = ptx::shared_address(shared), stages = base + p.stages_at;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int const split = blockIdx.x % p.splits, unit0 = blockIdx.x / p.splits * p.units;
  int const first = int(int64_t(split) * p.tiles / p.splits), end = int(int64_t(split + 1) * p.tiles / p.splits);
  for (int i = threadIdx.x * 16; i < p.stages * p.stage_bytes; i += blockDim.x * 16)
    ptx::st_shared_v4(stages + i, uint4{});
  __syncthreads();
  auto fetch = [&](int number) {
    if (number < end) {
      int const image = number / p.tiles_h, tile_h = number - image * p.tiles_h;
      copy(p.x, size, stages + (number - first) % p.stages * p.stage_bytes + kPlainFront, unit0 * p.in_unit,
           image * p.images, tile_h, p.N);
    }
    ptx::cp_async_commit_group();
  };
  for (int i = 0; i < p.stages - 1; ++i) fetch(first + i);

  // Filters. wide: [unit][job][step][r][s][lane] of four words; else [unit][r][two taps, or one, of 16 bits][lane].
  int const steps = (p.in_unit / 8 + blocks - 1) / blocks;
  for (int i = threadIdx.x; i < p.units * p.jobs * steps * words; i += blockDim.x) {
    int const step = i / words % steps, job = i / words / steps % p.jobs, unit = unit0 + i / words / steps / p.jobs;
    int const at = i % words;
    if constexpr (wide) {
      int const word = at % 4, of = at / 4 % 32, tap = at / 128;
      ptx::st_shared(base + i * 4, weights<T>(p, unit, step * blocks * 8 + of % 4, word / 2,
                                              job * 16 + of / 4 + word % 2 * 8, tap / 3, tap % 3));
    } else {
      int const of = at % 32, r = at / 192, word = at / 32 % 6;
      if (f32 || word < 3)
        ptx::st_shared(base + i * 4, weights<T>(p, unit, of % 4, f32 ? word % 2 : 0, of / 4, r, f32 ? word / 2 : word));
    }
  }

  int const share = warp % p.shares, job = warp / p.shares % p.jobs, u = warp / (p.shares * p.jobs);
  bool const works = u < p.units && (unit0 + u) * p.out_unit < p.outs;
  uint32_t const w_at = base + (u * p.jobs + job) * steps * words * 4 + lane * (wide ? 16 : 4);
  int const four = 4 * p.x.channel, columns = p.images * p.quads, rounds = (columns + 7) / 8;
  // This lane's filters: f of two; quads of results: h of one or two.
  auto filter = [&](int f) { return job * filters + (wide ? g + f * 8 : 2 * t + f); };
  float bias[2] = {};
  if (p.bias && works)
#pragma unroll
    for (int f = 0; f < 2; ++f)
      if (filter(f) < p.out_unit)
        bias[f] = widen(static_cast<T const*>(p.bias)[((unit0 + u) * p.out_unit + filter(f)) * p.bias_stride]);
  int const plane = p.P * p.Q, slab = min(p.units * p.out_unit, p.outs - unit0 * p.out_unit);
  Rows<T, wide> sums;

  for (int number = first; number < end; ++number) {
    if (p.stages == 1) fetch(number);
    p.stages <= 2 ? ptx::cp_async_wait_group<0>() : ptx::cp_async_wait_group<1>();
    if (p.out_at && threadIdx.x == 0) ptx::cp_async_bulk_wait_group_read<0>();
    __syncthreads();
    if (p.stages > 1) fetch(number + p.stages - 1);
    int const tile_n = number / p.tiles_h, tile_h = number - tile_n * p.tiles_h, image0 = tile_n * p.images;
    if (works) {
      if constexpr (!wide) sums.hold(w_at);
      uint32_t const stage = stages + (number - first) % p.stages * p.stage_bytes;
      int const rows = min(p.rows, p.P - tile_h * p.rows);
      for (int round = share; round < rounds; round += p.shares) {
        int const column = round * 8 + g, image = column / p.quads, quad = column - image * p.quads;
        uint32_t const x = stage + kPlainFront + (u * p.in_unit + t) * p.x.channel +
                           (column < columns ? image * p.x.rows * p.x.pitch + quad * kQuad * size : 0);
        // Where this lane's results go, the first of its filters' and the first row's; how many there are of a quad.
        T* to[quads];
        int count[quads], images[quads], qs[quads];
#pragma unroll
        for (int h = 0; h < quads; ++h) {
          int const at = wide ? round * 8 + 2 * t + h : column, i = at / p.quads, q = (at - i * p.quads) * kQuad;
          bool const exists = at < columns && image0 + i < p.N;
          count[h] = exists ? min(kQuad, p.Q - q) : 0, images[h] = i, qs[h] = q;
          if (p.out_at)
            to[h] = reinterpret_cast<T*>(shared + p.out_at) + (i * slab + u * p.out_unit + filter(0)) * plane + q;
          else
            to[h] = static_cast<T*>(p.out) +
                    (int64_t(image0 + i) * p.outs + (unit0 + u) * p.out_unit + filter(0)) * plane +
                    tile_h * p.rows * p.Q + q;
        }
        int const other = (filter(1) - filter(0)) * plane;
        bool nan = false;
        auto store = [&](int row) {
#pragma unroll
          for (int f = 0; f < 2; ++f)
#pragma unroll
            for (int h = 0; h < quads; ++h) {
              float v[kQuad];
#pragma unroll
              for (int j = 0; j < kQuad; ++j) {
                v[j] = sums.result(f, h, j) + bias[f];
                nan |= !(v[j] == v[j]);
              }
              if (count[h] > 0 && filter(f) < p.out_unit)
                store_quad<T>(to[h] + f * other + row * p.Q, v, count[h], p.Q);
            }
        };
        Pixels<T> pixels;
        auto load = [&](int row, int step) {
          pixels.load(x + row * p.x.pitch + step * blocks * 2 * four, four, (step + 1) * blocks * 8 <= p.in_unit);
        };
        sums.next(), sums.next(), sums.next();
        load(0, 0);
#pragma unroll 1
        for (int i = 0; i < rows + 2; ++i) {
#pragma unroll 1
          for (int step = 0; step < steps; ++step) {
            uint32_t v[6][2];
#pragma unroll
            for (int j = 0; j < 6; ++j) {
              v[j][0] = pixels.word(j, 0);
              v[j][1] = wide || f32 ? pixels.word(j, 1) : 0;
            }
            bool const last = step + 1 == steps;
            load(last ? i + 1 : i, last ? 0 : step + 1);
            sums.template multiply<true, true, true>(v, w_at + step * words * 4);
          }
          if (i > 1) store(i - 2);
          sums.next();
        }
        if (nan && p.in_unit > p.in_group)
          for (int f = 0; f < 2; ++f)
            for (int h = 0; h < quads; ++h)
              for (int row = 0; row < rows; ++row)
                for (int j = 0; j < count[h] && filter(f) < p.out_unit; ++j)
                  to[h][f * other + row * p.Q + j] =
                      narrow<T>(bias[f] + result_again<T>(p, (unit0 + u) * p.out_unit + filter(f), image0 + images[h],
                                                          tile_h * p.rows + row, qs[h] + j));
      }
    }
    if (p.out_at) {
      ptx::fence_proxy_async();
      __syncthreads();
      if (threadIdx.x == 0) {
        for (int i = 0; i < p.images && image0 + i < p.N; ++i)
          ptx::cp_async_bulk_store(static_cast<T*>(p.out) + (int64_t(image0 + i) * p.outs + unit0 * p.out_unit) * plane,
                                   base + p.out_at + i * slab * plane * size, slab * plane * size);
        ptx::cp_async_bulk_commit_group();
      }
    } else if (p.stages == 1) {
      __syncthreads();
    }
  }
  ptx::cp_async_wait_all();
  if (p.out_at && threadIdx.x == 0) ptx::cp_async_bulk_wait_all();
}

template <class T, bool wide>
cudaError_t launch_rows(Op op, Problem const& problem, PlainRows const& t, Arguments const& args,
                        cudaStream_t stream) {
  bool const backward = op == Op::dgrad;
  int64_t const per_unit = groups_per_unit(problem), outs = backward ? problem.C : problem.K;
  RowParams p{};
  p.x = make_side(args.a, backward ? problem.K : problem.C, problem.H, problem.W, problem.dtype, t.x_rows, t.images,
                  t.x_pitch, t.x_channel, 0, t.rows, 1);
  p.in_group = int(backward ? problem.K_per_group() : problem.C_per_group()), p.in_unit = int(per_unit * p.in_group);
  p.out_group = int(backward ? problem.C_per_group() : problem.K_per_group()), p.out_unit = int(per_unit * p.out_group);
  p.x.of_block = int(t.units * p.in_unit);
  p.w = args.b, p.out = args.out, p.bias = args.bias, p.bias_stride = args.bias_stride;
  p.w_in = backward ? problem.w.n : problem.w.c, p.w_out = backward ? problem.w.c : problem.w.n;
  p.w_h = problem.w.h, p.w_w = problem.w.w, p.flip = backward, p.outs = int(outs);
  p.units = int(t.units), p.jobs = int(t.jobs), p.shares = int(t.shares), p.rows = int(t.rows);
  p.images = int(t.images), p.quads = int(t.quads), p.tiles_h = int(ceil_div(problem.H, t.rows));
  p.tiles = int(t.tiles), p.splits = int(t.blocks), p.N = int(problem.N), p.P = int(problem.H), p.Q = int(problem.W);
  p.stage_bytes = int(t.stage_bytes), p.stages = int(t.stages), p.stages_at = int(t.stages_at);
  p.out_at = int(t.out_at);
  auto* const kernel = rows_kernel<T, wide>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared));
  if (error != cudaSuccess) return error;
  int64_t const slabs = ceil_div(problem.groups / per_unit, t.units);
  kernel<<<unsigned(slabs * t.blocks), plain_row_warps(wide) * 32, size_t(t.shared), stream>>>(p);
  return cudaGetLastError();
}

template <Op op, DType dtype>
cudaError_t start_row(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  int sm_count = 0;
  if (cudaError_t const error = grouped::count_sms(sm_count)) return error;
  Device const device{sm_count, 90};
  if constexpr (op == Op::wgrad) {
    PlainSums const t = plain_sums(problem, device);
    bool const strided = problem.stride_h == 2;
    auto* const start = t.blocks_k == 1   ? (strided ? launch<T, 2, 1, 1> : launch<T, 1, 1, 1>)
                        : t.blocks_k == 2 ? (strided ? launch<T, 2, 2, 2> : launch<T, 1, 2, 2>)
                                          : (strided ? launch<T, 2, 2, 4> : launch<T, 1, 2, 4>);
    return start(problem, t, args, stream);
  } else {
    PlainRows const t = plain_rows(op, problem, device);
    return t.wide ? launch_rows<T, true>(op, problem, t, args, stream)
                  : launch_rows<T, false>(op, problem, t, args, stream);
  }
}

}  // namespace conv2d_ext::plain

#define CONV2D_EXT_GROUPED_PLAIN_INSTANCE(family, op, dtype, tm, tn, tk, variant)  \
  cudaError_t conv2d_ext::family##_##op##_##dtype##_##tm##x##tn##_##variant(       \
      Problem const& p, Plan const&, Arguments const& args, cudaStream_t stream) { \
    return plain::start_row<Op::op, DType::dtype>(p, args, stream);                \
  }
