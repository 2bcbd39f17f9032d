// The filter's gradient for band.cuh: for one channel and one row h of x
//   w[r, s] += sum over q of y[h + pad - r, q] * x[h, q + s - pad].
// A: 16 rows of y (one for each r) by 16 columns, as ldmatrix reads them. B: 16 columns by 8 columns of taps; its
// elements depend on q + s alone, so a lane's pair depends on 2 * (block of q) + (block of s) alone. For odd s the
// pairs begin at odd elements: x is in shared memory twice, moved by one element.
//
// A warp holds 16 * D by 8 * NB taps and walks down rows of x. The rows of an A are D apart, so that all but one of the
// D blocks of A are those of the rows before. A block adds up its warps in order; splits are added by a second pass.
// Products with the zeros around y and x can make NaN of infinities: then the block sums again, one product at a time.
#pragma once

#include "band_tile.cuh"

namespace conv2d_ext::band {

constexpr int kLargest = 4;  // blocks of 16 columns in a step

struct SumsParams {
  Source x, y;
  void* out;
  void* partial;
  int64_t w_k, w_r, w_s;
  int C, R, S, pad_h, pad_w, skew;
  int taps_h, taps_w, tap_step_h, tap_step_w;  // of R x S, the taps that are not zeros
  int channels, images, parts, rows, columns;
  int tiles_h, tiles_w, units_r, units_s, channel_units;
  int copy_bytes, x_bytes, y_bytes;
  int steps, splits;
};

// Second copies of rows: element i is element i + 1 of the first.
__device__ inline void shift_copies(unsigned char* planes, int count, int plane_bytes, int copy_bytes, int bytes) {
  int const vectors = bytes / 16;
  for (int i = threadIdx.x; i < count * vectors; i += blockDim.x) {
    unsigned char* const from = planes + i / vectors * plane_bytes + i % vectors * 16;
    uint4 const v = *reinterpret_cast<uint4 const*>(from);
    // The last element of a row is never used: what follows it may be anything that is there.
    uint32_t const next = i % vectors + 1 < vectors ? *reinterpret_cast<uint32_t const*>(from + 16) : 0;
    *reinterpret_cast<uint4*>(from + copy_bytes) =
        make_uint4(__funnelshift_r(v.x, v.y, 16), __funnelshift_r(v.y, v.z, 16), __funnelshift_r(v.z, v.w, 16),
                   __funnelshift_r(v.w, next, 16));
  }
}

// A warp's taps: 16 * D rows and 8 * NB columns.
template <class T, int D, int NB>
struct Sums {
  static constexpr int kPlace = D;
  float acc[D][NB][4] = {};

  // Rows [first, last) of x in the step's planes.
  __device__ void walk(SumsParams const& p, unsigned char const* plane_x, unsigned char const* plane_y, int first,
                       int last, int columns) {
    int const lane = int(threadIdx.x) % 32, blocks = (columns + 15) / 16;
    uint32_t const pitch_x = p.x.pitch * 2, pitch_y = p.y.pitch * 2;
    // B's element (k, n) = (2 * (lane % 4), lane / 4) and the next of its column.
    int const element = p.skew + lane % 4 * 2 + lane / 4;
    uint32_t const x = ptx::shared_address(plane_x + (element % 2 == 0 ? element * 2 : p.copy_bytes + element * 2 - 2));
    // A's row m is the row of y for tap D * m: 15 - m rows further down the plane.
    uint32_t const y = ptx::shared_address(plane_y) + (15 - lane % 16) * pitch_y + lane / 16 * 16;
    uint32_t a[2][kLargest][4];
    auto load = [&](int which, int row) {  // A for taps 0, D, 2 D ... at row `row` - (D - 1) of x
      uint32_t const from = y + uint32_t(row_place<D>(p.y.rows, row)) * pitch_y;
#pragma unroll
      for (int k = 0; k < kLargest; ++k)
        if (k < blocks) ptx::ldmatrix_x4(a[which][k], from + k * 32);
    };
    if constexpr (D == 1) {
      for (int h = first; h < last; ++h) {
        load(0, h);
        add(a, 0, x + h * pitch_x, blocks);
      }
    } else {
      load(0, first);
      for (int h = first; h < last; h += 2) {
        load(1, h + 1);
        add(a, 1, x + h * pitch_x, blocks);
        if (h + 1 >= last) break;
        load(0, h + 2);
        add(a, 0, x + (h + 1) * pitch_x, blocks);
      }
    }
  }

  // One row of x with D blocks of rows of y.
  __device__ void add(uint32_t const (&a)[2][kLargest][4], int newest, uint32_t x, int blocks) {
    uint32_t b[2 * kLargest + NB - 1];
#pragma unroll
    for (int j = 0; j < 2 * kLargest + NB - 1; ++j)
      if (j < 2 * blocks + NB - 1) b[j] = ptx::ld_shared(x + j * 16);
#pragma unroll
    for (int k = 0; k < kLargest; ++k) {
      if (k >= blocks) break;
#pragma unroll
      for (int i = 0; i < D; ++i) {
        uint32_t const(&v)[4] = a[(newest + i) % 2][k];  // i = 1: of the row before
#pragma unroll
        for (int nb = 0; nb < NB; ++nb)
          ptx::mma_m16n8k16<T>(acc[i][nb], v[0], v[1], v[2], v[3], b[2 * k + nb], b[2 * k + nb + 1]);
      }
    }
  }

  // f(row, column, sum) for each tap of the lane.
  template <class F>
  __device__ void each(F f) const {
    int const lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < D; ++i)
#pragma unroll
      for (int nb = 0; nb < NB; ++nb)
#pragma unroll
        for (int j = 0; j < 4; ++j) f((lane / 4 + j / 2 * 8) * D + i, nb * 8 + lane % 4 * 2 + j % 2, acc[i][nb][j]);
  }
};

// The same on the FMA units: a lane has every eighth row of taps, and 8 neighbouring columns; a row of x is summed
// apart.
template <>
struct Sums<float, 2, 4> {
  static constexpr int kRows = 32, kPlace = 1;
  float acc[4][8] = {};

  __device__ void walk(SumsParams const& p, unsigned char const* plane_x, unsigned char const* plane_y, int first,
                       int last, int columns) {
    int const lane = int(threadIdx.x) % 32;
    float const* x = reinterpret_cast<float const*>(plane_x) + first * p.x.pitch + lane % 4 * 8;
    float const* y = reinterpret_cast<float const*>(plane_y) + (first + kRows - 1 - lane / 4) * p.y.pitch;
    for (int h = first; h < last; ++h, x += p.x.pitch, y += p.y.pitch) {
      float sum[4][8] = {};
#pragma unroll 1
      for (int q = 0; q < columns; q += 4) {
        float v[12], g[4][4];
#pragma unroll
        for (int j = 0; j < 3; ++j)
          *reinterpret_cast<float4*>(v + 4 * j) = *reinterpret_cast<float4 const*>(x + q + 4 * j);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          *reinterpret_cast<float4*>(g[i]) = *reinterpret_cast<float4 const*>(y + q - 8 * i * p.y.pitch);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (k > 0 && q + k >= columns) break;
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(g[i][k], v[k + j], sum[i][j]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[i][j] += sum[i][j];
    }
  }

  template <class F>
  __device__ void each(F f) const {
    int const lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) f(lane / 4 + 8 * i, lane % 4 * 8 + j, acc[i][j]);
  }
};

// A tap from global memory, over the block's steps.
template <class T>
__device__ __noinline__ float exact_sum(SumsParams const& p, int begin, int end, int c, int r, int s) {
  T const* const x = static_cast<T const*>(p.x.data) + c * p.x.c;
  T const* const y = static_cast<T const*>(p.y.data) + c * p.y.c;
  float sum = 0.f;
  for (int step = begin; step < end; ++step) {
    int const tile_w = step % p.tiles_w, tile_h = step / p.tiles_w % p.tiles_h;
    int64_t const n0 = int64_t(step / p.tiles_w / p.tiles_h) * p.images;
    for (int image = 0; image < p.images && n0 + image < p.x.N; ++image)
      for (int h = tile_h * p.rows; h < (tile_h + 1) * p.rows && h < p.x.H; ++h) {
        int const row = h + p.pad_h - r;
        if (unsigned(row) >= unsigned(p.y.H) || row % p.y.step_h != 0) continue;
        for (int q = tile_w * p.columns; q < (tile_w + 1) * p.columns && q < p.y.W; ++q) {
          int const w = q + s - p.pad_w;
          if (unsigned(w) < unsigned(p.x.W) && q % p.y.step_w == 0)
            sum = fmaf(widen(x[(n0 + image) * p.x.n + h * p.x.h + w * p.x.w]),
                       widen(y[(n0 + image) * p.y.n + row / p.y.step_h * p.y.h + q / p.y.step_w * p.y.w]), sum);
        }
        if (sum != sum) return sum;  // NaN, whatever comes
      }
  }
  return sum;
}

template <class T, int D, int NB, bool nhwc>
__global__ void __launch_bounds__(32 * kBandSumsWarps, nhwc ? 1 : 2) wgrad(__grid_constant__ SumsParams const p) {
  extern __shared__ __align__(16) unsigned char shared[];
  uint32_t index = blockIdx.x;
  int const s0 = depthwise::split_off(index, p.units_s) * 8 * NB;
  int const r0 = depthwise::split_off(index, p.units_r) * 16 * D;
  int const c0 = depthwise::split_off(index, p.channel_units) * p.channels, split = int(index);
  int const channels = p.C - c0 < p.channels ? p.C - c0 : p.channels;
  int const begin = int(int64_t(p.steps) * split / p.splits), end = int(int64_t(p.steps) * (split + 1) / p.splits);
  int const planes = p.channels * p.images;
  unsigned char* const planes_y = shared + planes * p.x_bytes;

  int const warp = int(threadIdx.x) / 32;
  int const part = warp % p.parts, image = warp / p.parts % p.images, c = warp / p.parts / p.images;
  unsigned char* const plane_x = shared + (c * p.images + image) * p.x_bytes;
  unsigned char* const plane_y = planes_y + (c * p.images + image) * p.y_bytes;
  Sums<T, D, NB> sums;
  for (int step = begin; step < end; ++step) {
    uint32_t rest = uint32_t(step);
    int const tile_w = depthwise::split_off(rest, p.tiles_w), tile_h = depthwise::split_off(rest, p.tiles_h);
    int64_t const n0 = int64_t(rest) * p.images;
    int const h0 = tile_h * p.rows, q0 = tile_w * p.columns;
    __syncthreads();                                        // the last step's planes have been read
    if (step == begin || p.tiles_h > 1 || p.tiles_w > 1) {  // zeros around the image stay where they are
      clear(shared, planes * (p.x_bytes + p.y_bytes));
      __syncthreads();
    }
    fill<T, 1, nhwc>(p.x, {h0, q0 + s0 - p.pad_w - p.skew, c0, channels, p.images, n0}, shared, p.x_bytes);
    fill<T, Sums<T, D, NB>::kPlace, nhwc>(p.y, {h0 + p.pad_h - r0 - 16 * D + 1, q0, c0, channels, p.images, n0},
                                          planes_y, p.y_bytes);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    if constexpr (sizeof(T) == 2) {
      shift_copies(shared, planes, p.x_bytes, p.copy_bytes, p.rows * p.x.pitch * 2);
      __syncthreads();
    }

    if (n0 + image >= p.x.N || c >= channels) continue;
    int const rows = p.x.H - h0 < p.rows ? p.x.H - h0 : p.rows;
    int const first = rows * part / p.parts, last = rows * (part + 1) / p.parts;
    sums.walk(p, plane_x, plane_y, first, last, p.y.W - q0 < p.columns ? p.y.W - q0 : p.columns);
  }

  // Warps of a channel are added in order.
  constexpr int taps = 16 * D * 8 * NB;
  __syncthreads();
  float* const totals = reinterpret_cast<float*>(shared);
  sums.each([&](int r, int s, float sum) { totals[warp * taps + r * 8 * NB + s] = sum; });
  __syncthreads();
  int const warps = p.parts * p.images;
  for (int i = threadIdx.x; i < channels * taps; i += blockDim.x) {
    int const k = i / taps, tap = i % taps, r = r0 + tap / (8 * NB), s = s0 + tap % (8 * NB);
    if (r >= p.R || s >= p.S || r % p.tap_step_h != 0 || s % p.tap_step_w != 0) continue;
    int const tap_h = r / p.tap_step_h, tap_w = s / p.tap_step_w;
    float sum = 0.f;
    for (int other = 0; other < warps; ++other) sum += totals[(k * warps + other) * taps + tap];
    if (sum != sum) sum = exact_sum<T>(p, begin, end, c0 + k, r, s);
    depthwise::store_sum<T>(p.out, p.partial, p.splits, (c0 + k) * p.w_k + tap_h * p.w_r + tap_w * p.w_s,
                            ((int64_t(split) * p.C + c0 + k) * p.taps_h + tap_h) * p.taps_w + tap_w, sum);
  }
}

template <DType dtype, int tile_m, int tile_n, Variant variant>
cudaError_t launch_wgrad(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr int D = tile_m / 16, NB = tile_n / 8;
  constexpr bool nhwc = variant == Variant::nhwc;
  Problem const whole = spread(problem);
  BandSumsTile const t = band_sums_tile(whole, D, NB, nhwc);
  constexpr int unit = 16 / int(sizeof(T));
  bool const vectors = nhwc ? problem.C % unit == 0 : sizeof(T) == 2 || problem.pad_left % unit == 0;
  SumsParams p{};
  p.x = source_of<T>(problem.x, args.a, problem.N, problem.H, problem.W, nhwc, problem.x_align, vectors, 1, t.rows,
                     unit * t.x_units);
  p.y = source_of<T>(problem.y, args.b, problem.N, problem.P(), problem.Q(), nhwc, problem.y_align, vectors || !nhwc,
                     Sums<T, D, NB>::kPlace, t.y_rows, unit * t.y_units, problem.stride_h, problem.stride_w);
  p.out = args.out, p.partial = args.workspace, p.splits = plan.split_k;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.C = int(problem.C), p.R = int(whole.R), p.S = int(whole.S);
  p.taps_h = int(problem.R), p.taps_w = int(problem.S);
  p.tap_step_h = int(problem.dilation_h), p.tap_step_w = int(problem.dilation_w);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left), p.skew = t.skew;
  p.channels = t.channels, p.images = t.images, p.parts = t.parts, p.rows = t.rows, p.columns = t.columns;
  p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w), p.units_r = int(t.units_r), p.units_s = int(t.units_s);
  p.channel_units = int(t.channel_units), p.steps = int(t.steps());
  p.copy_bytes = int(t.copy_bytes), p.x_bytes = int(t.x_bytes), p.y_bytes = int(t.y_bytes);
  auto* const kernel = wgrad<T, D, NB, nhwc>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  int64_t const blocks = t.units_r * t.units_s * t.channel_units * plan.split_k;
  kernel<<<unsigned(blocks), 32 * kBandSumsWarps, size_t(t.shared_bytes), stream>>>(p);
  if (cudaError_t const error = cudaGetLastError(); error != cudaSuccess || p.splits == 1) return error;
  return depthwise::launch_sum<T>(problem, plan, args, stream);
}

}  // namespace conv2d_ext::band

#define CONV2D_EXT_BAND_WGRAD_INSTANCE(family, op, dtype, tm, tn, tk, variant)                \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                   \
    return band::launch_wgrad<DType::dtype, tm, tn, Variant::variant>(p, plan, args, stream); \
  }
