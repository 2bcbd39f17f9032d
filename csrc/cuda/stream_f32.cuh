// Depthwise convolution of small filters in NCHW, float32, stride 1, on the FMA units and without shared memory. A warp
// walks down pieces of rows of one image or several. A lane loads 4 columns of every row of inputs once, gets the
// columns beside them from its neighbours, and adds them to its 4 columns of the R rows of outputs that they meet.
// Loads are a ring's length ahead. dgrad is fprop with the filter turned round. wgrad: a lane keeps the last R rows of
// its 4 columns of y, and a sum for each tap.
#pragma once

#include "stream.cuh"

namespace conv2d_ext::stream {

struct ParamsF32 {
  Source in, y;  // y: wgrad alone
  float* partial;
  float const* w;
  float const* bias;
  float* out;
  int64_t out_n, out_c, out_h;
  int64_t w_k, w_r, w_s, bias_stride;
  int64_t N;
  int C, R, S, out_H, out_W, pad_h, pad_w, origin, first, rows, in_width, out_width, splits;
  uint32_t walks;                                                // wgrad: of a channel
  uint32_t all, stretches, pieces, planes, slots, quads, warps;  // all: planes of all images
  bool turned;
};

// Row after row of 4 columns.
struct Quad {
  float const* from;
  uint32_t mask;  // which columns are within the image

  __device__ void load(Source const& s, int width, bool inside, float (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = 0;
    if (inside) {
      if (width == 4) {
        if (mask & 1) *reinterpret_cast<float4*>(to) = __ldg(reinterpret_cast<float4 const*>(from));
      } else if (width == 2) {
#pragma unroll
        for (int i = 0; i < 4; i += 2)
          if (mask >> i & 1) *reinterpret_cast<float2*>(to + i) = __ldg(reinterpret_cast<float2 const*>(from + i));
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (mask >> i & 1) to[i] = __ldg(from + i);
      }
    }
    from += s.h;
  }
};

// The 12 columns of a lane and its neighbours, of which `used` from `first` on are needed.
template <int first, int used>
__device__ inline void window_of(float const (&own)[4], int lane, float (&window)[12]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    window[4 + i] = own[i];
    if (i >= first) window[i] = __shfl_up_sync(0xffffffffu, own[i], 1);
    if (8 + i < first + used) {
      float const right = __shfl_down_sync(0xffffffffu, own[i], 1);
      window[8 + i] = lane == 31 ? 0.f : right;
    }
  }
}

__device__ inline uint32_t columns_within(int column, int W) {
  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (unsigned(column + i) < unsigned(W)) mask |= 1u << i;
  return mask;
}

// Filters of R x S, or (`part`) of p.R x p.S, which are no more.
template <int R, int S, int shift, bool part>
__global__ void __launch_bounds__(kStreamWarps * 32, stream_f32_blocks(R, S))
    gather_f32(__grid_constant__ ParamsF32 const p) {
  constexpr int U = R < 5 ? 2 * R : R;
  int const lane = int(threadIdx.x) % 32;
  uint32_t index = blockIdx.x * kStreamWarps + threadIdx.x / 32;
  if (index >= p.warps) return;
  uint32_t const piece = index % p.pieces;
  index /= p.pieces;
  uint32_t const stretch = index % p.stretches, which = uint32_t(lane) / p.slots;
  uint32_t const plane = index / p.stretches * p.planes + which;
  int const slot = lane - int(which * p.slots) - 1;  // -1 and the last hold the halo
  bool const exists = which < p.planes && plane < p.all;
  int const quad = int(piece * p.quads) + slot, c = exists ? int(plane % uint32_t(p.C)) : 0;
  int64_t const n = exists ? plane / uint32_t(p.C) : 0;
  int const p0 = int(stretch) * p.rows, rows = p.out_H - p0 < p.rows ? p.out_H - p0 : p.rows;

  float filter[R][S];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int s = 0; s < S; ++s) {
      filter[r][s] = 0;
      if (!part || (r < p.R && s < p.S))
        filter[r][s] =
            __ldg(p.w + c * p.w_k + (p.turned ? p.R - 1 - r : r) * p.w_r + (p.turned ? p.S - 1 - s : s) * p.w_s);
    }
  float const bias = p.bias != nullptr ? p.bias[c * p.bias_stride] : 0.f;

  int const h0 = p0 - p.pad_h, steps = rows + R - 1, column = p.first + 4 * quad, x = 4 * quad - p.origin;
  Quad in{static_cast<float const*>(p.in.data) + n * p.in.n + c * p.in.c + h0 * p.in.h + column,
          exists ? columns_within(column, p.in.W) : 0};
  bool const stores = exists && slot >= 0 && slot < int(p.quads);
  uint32_t const keep = stores ? columns_within(x, p.out_W) : 0;
  float* out = p.out + n * p.out_n + c * p.out_c + p0 * p.out_h + x;

  float own[U][4];
#pragma unroll
  for (int i = 0; i < U; ++i) in.load(p.in, p.in_width, unsigned(h0 + i) < unsigned(p.in.H), own[i]);
  float acc[R][4];  // of the row of outputs so many rows above the walk's
#pragma unroll 1
  for (int first = 0; first < steps; first += U) {
#pragma unroll
    for (int i = 0; i < U; ++i) {
#pragma unroll
      for (int r = R - 1; r > 0; --r)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[r][j] = acc[r - 1][j];
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[0][j] = bias;
      float window[12];
      window_of<shift, S + 3>(own[i], lane, window);
      int const step = first + i;
      in.load(p.in, p.in_width, unsigned(h0 + step + U) < unsigned(p.in.H), own[i]);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (part && r >= p.R) break;
#pragma unroll
        for (int s = 0; s < S; ++s) {
          if (part && s >= p.S) break;
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[r][j] = fmaf(window[shift + s + j], filter[r][s], acc[r][j]);
        }
      }
      if (step >= R - 1 && step < steps) {
        float const(&sum)[4] = acc[R - 1];
        if (keep == 15 && p.out_width == 4) {
          *reinterpret_cast<float4*>(out) = make_float4(sum[0], sum[1], sum[2], sum[3]);
        } else {
#pragma unroll
          for (int j = 0; j < 4; j += 2) {
            if ((keep >> j & 3) == 3 && p.out_width >= 2) {
              *reinterpret_cast<float2*>(out + j) = make_float2(sum[j], sum[j + 1]);
            } else {
              if (keep >> j & 1) out[j] = sum[j];
              if (keep >> j & 2) out[j + 1] = sum[j + 1];
            }
          }
        }
        out += p.out_h;
      }
    }
  }
}

// Where a lane of wgrad works: a piece of a stretch of an image.
struct Share {
  int64_t n;
  int p0, rows, quad;
  bool exists, sums;  // sums: has columns of y, not the halo alone

  __device__ Share(ParamsF32 const& p, uint32_t index) {
    int const lane = int(threadIdx.x) % 32;
    uint32_t const piece = index % p.pieces;
    index /= p.pieces;
    uint32_t const stretch = index % p.stretches, which = uint32_t(lane) / p.slots;
    n = int64_t(index / p.stretches) * p.planes + which;
    int const slot = lane - int(which * p.slots) - 1;
    exists = which < p.planes && n < p.N, sums = exists && slot >= 0 && slot < int(p.quads);
    quad = int(piece * p.quads) + slot;
    p0 = int(stretch) * p.rows, rows = p.out_H - p0 < p.rows ? p.out_H - p0 : p.rows;
  }
};

// A tap's sum over some walks, by a warp: for those that a zero made NaN.
__device__ __noinline__ inline float exact_sum(ParamsF32 const& p, int c, uint32_t begin, uint32_t end, int r, int s) {
  float const* const in = static_cast<float const*>(p.in.data) + c * p.in.c;
  float const* const y = static_cast<float const*>(p.y.data) + c * p.y.c;
  float sum = 0;
  for (uint32_t index = begin; index < end; ++index) {
    Share const at(p, index);
    for (int i = 0; at.sums && i < 4 * at.rows; ++i) {
      int const row = at.p0 + i / 4, x = 4 * at.quad - p.origin + i % 4, h = row - p.pad_h + r, w = x - p.pad_w + s;
      if (unsigned(x) < unsigned(p.out_W) && unsigned(h) < unsigned(p.in.H) && unsigned(w) < unsigned(p.in.W))
        sum = fmaf(in[at.n * p.in.n + h * p.in.h + w], y[at.n * p.y.n + row * p.y.h + x], sum);
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

template <int R, int shift>
__global__ void __launch_bounds__(kStreamWarps * 32, R == 3   ? 4
                                                     : R == 5 ? 3
                                                              : 2) wgrad_f32(__grid_constant__ ParamsF32 const p) {
  constexpr int U = R, taps = R * R;
  __shared__ float sums[kStreamWarps][taps];
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int const c = int(blockIdx.x % uint32_t(p.C)), split = int(blockIdx.x / uint32_t(p.C));
  uint32_t const begin = uint32_t(uint64_t(p.walks) * split / p.splits);
  uint32_t const end = uint32_t(uint64_t(p.walks) * (split + 1) / p.splits);
  float acc[R][R] = {};
  for (uint32_t index = begin + warp; index < end; index += kStreamWarps) {
    Share const at(p, index);
    int64_t const n = at.exists ? at.n : 0;
    int const h0 = at.p0 - p.pad_h, steps = at.rows + R - 1, column = p.first + 4 * at.quad;
    int const x = 4 * at.quad - p.origin;
    Quad in{static_cast<float const*>(p.in.data) + n * p.in.n + c * p.in.c + h0 * p.in.h + column,
            at.exists ? columns_within(column, p.in.W) : 0};
    Quad y{static_cast<float const*>(p.y.data) + n * p.y.n + c * p.y.c + at.p0 * p.y.h + x,
           at.sums ? columns_within(x, p.out_W) : 0};
    float own[U][4], own_y[U][4], last[R][4] = {};
    auto load = [&](int i, int step) {
      in.load(p.in, p.in_width, step < steps && unsigned(h0 + step) < unsigned(p.in.H), own[i]);
      y.load(p.y, p.out_width, step < at.rows, own_y[i]);
    };
#pragma unroll
    for (int i = 0; i < U; ++i) load(i, i);
#pragma unroll 1
    for (int first = 0; first < steps; first += U) {
#pragma unroll
      for (int i = 0; i < U; ++i) {
#pragma unroll
        for (int r = R - 1; r > 0; --r)
#pragma unroll
          for (int j = 0; j < 4; ++j) last[r][j] = last[r - 1][j];
#pragma unroll
        for (int j = 0; j < 4; ++j) last[0][j] = own_y[i][j];
        float window[12];
        window_of<shift, R + 3>(own[i], lane, window);
        load(i, first + i + U);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int s = 0; s < R; ++s) acc[r][s] = fmaf(window[shift + s + j], last[r][j], acc[r][s]);
      }
    }
  }
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) {
    float v = acc[tap / R][tap % R];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
    if (lane == 0) sums[warp][tap] = v;
  }
  __syncthreads();
  auto store = [&](int r, int s, float sum) {
    depthwise::store_sum<float>(p.out, p.partial, p.splits, c * p.w_k + r * p.w_r + s * p.w_s,
                                (int64_t(split) * p.C + c) * p.R * p.S + r * p.S + s, sum);
  };
  bool nan = false;
  for (int i = threadIdx.x; i < taps; i += blockDim.x) {
    if (i / R >= p.R || i % R >= p.S) continue;
    float sum = sums[0][i];
    for (int other = 1; other < kStreamWarps; ++other) sum += sums[other][i];
    nan = nan || sum != sum;
    store(i / R, i % R, sum);
  }
  if (__syncthreads_or(nan) == 0) return;
  for (int i = warp; i < p.R * p.S; i += kStreamWarps) {
    float const sum = exact_sum(p, c, begin, end, i / p.S, i % p.S);
    if (lane == 0) store(i / p.S, i % p.S, sum);
  }
}

// ---- host side

template <Op op, int R>
cudaError_t launch_f32(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  constexpr Row row{Family::stream, op, DType::f32, R, R, 1, Variant::nchw, ""};
  constexpr bool backward = op == Op::dgrad, sums = op == Op::wgrad;
  StreamF32Tile const t = stream_f32_tile(row, op, problem, h200_sxm);
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  ParamsF32 p{};
  p.in = {args.a, in.n, in.c, in.h, 1, t.in_H, t.in_W};
  p.w = static_cast<float const*>(args.b), p.bias = static_cast<float const*>(args.bias);
  p.bias_stride = args.bias_stride, p.out = static_cast<float*>(args.out);
  p.out_n = out.n, p.out_c = out.c, p.out_h = out.h;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.C = int(problem.C), p.R = int(problem.R), p.S = int(problem.S);
  p.out_H = t.out_H, p.out_W = t.out_W, p.pad_h = t.pad_h, p.origin = t.origin;
  p.first = 4 - t.origin - t.pad_w - t.shift, p.rows = t.rows, p.in_width = t.width;
  int const align = backward ? problem.x_align : problem.y_align;
  p.out_width = t.origin == 0 && stream_aligned(out, align, 16, 4) ? 4 : stream_aligned(out, align, 8, 4) ? 2 : 1;
  p.all = uint32_t(problem.N * problem.C), p.stretches = uint32_t(t.stretches), p.pieces = uint32_t(t.pieces);
  p.planes = uint32_t(t.planes), p.slots = uint32_t(t.slots), p.quads = uint32_t(t.quads);
  p.warps = uint32_t(t.stretches * t.pieces * t.groups);
  p.turned = backward;
  p.pad_w = t.pad_w, p.N = problem.N, p.splits = plan.split_k;
  if constexpr (sums) {
    p.y = {args.b, out.n, out.c, out.h, 1, t.out_H, t.out_W};
    if (t.out_W % p.out_width != 0) p.out_width = 1;
    p.partial = static_cast<float*>(args.workspace), p.walks = uint32_t(t.walks());
    auto start = [&](auto* kernel) {
      kernel<<<unsigned(problem.C * p.splits), kStreamWarps * 32, 0, stream>>>(p);
      return cudaGetLastError();
    };
    cudaError_t error = cudaErrorInvalidValue;
    if (t.shift == 0) error = start(wgrad_f32<R, 0>);
    if (t.shift == 1) error = start(wgrad_f32<R, 1>);
    if (t.shift == 2) error = start(wgrad_f32<R, 2>);
    if constexpr (R + 3 <= 9)
      if (t.shift == 3) error = start(wgrad_f32<R, 3>);
    if (error != cudaSuccess || p.splits == 1) return error;
    return depthwise::launch_sum<float>(problem, plan, args, stream);
  } else {
    auto start = [&](auto* kernel) {
      kernel<<<unsigned(ceil_div(p.warps, kStreamWarps)), kStreamWarps * 32, 0, stream>>>(p);
      return cudaGetLastError();
    };
    auto shifted = [&]<int rows, int columns, bool part>() {
      if (t.shift == 0) return start(gather_f32<rows, columns, 0, part>);
      if (t.shift == 1) return start(gather_f32<rows, columns, 1, part>);
      if (t.shift == 2) return start(gather_f32<rows, columns, 2, part>);
      if constexpr (columns + 3 <= 9) return start(gather_f32<rows, columns, 3, part>);
      return cudaErrorInvalidValue;
    };
    if (problem.R == R && problem.S == R) return shifted.template operator()<R, R, false>();
    if constexpr (R == 7) {
      if (problem.R <= 3) return shifted.template operator()<3, R, true>();
      if (problem.S <= 3) return shifted.template operator()<R, 3, true>();
    }
    return shifted.template operator()<R, R, true>();
  }
}

}  // namespace conv2d_ext::stream

#define CONV2D_EXT_STREAM_F32_INSTANCE(family, op, dtype, tm, tn, tk, variant)          \
  cudaError_t conv2d_ext::family##_##op##_##dtype##_##tm##x##tn##_##variant(            \
      Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) { \
    return stream::launch_f32<Op::op, tm>(p, plan, args, stream);                       \
  }
