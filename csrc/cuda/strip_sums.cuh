// The gradient of depthwise filters of 9x9 and more in float32, stride 1, on the FMA units. A block has planes of x and
// y in shared memory, of one image or some at a time, and all taps of its channels: a thread has rows x columns of
// them, and for these some neighbouring columns of y and a share of the rows. It walks down x: a row brings 8 columns
// of a new row of y, whose last rows stay in registers, and as many columns of x as they and its taps meet, for 8 *
// rows * columns FMAs. A warp has one block of rows of taps, so it leaves out what lies above and below the image. At
// its end a block adds up the threads of a tap in order; splits are added by a second pass. nhwc: a block has up to 4
// channels.
//
// Products with the zeros around y and x can make NaN of infinities: then a tap is summed again, product by product.
#pragma once

#include "../core/strip_sums.h"
#include "ptx.cuh"
#include "second_pass.cuh"

namespace conv2d_ext::strip_sums {

struct Source {
  float const* data;
  int64_t n, c, h, w;
  int width;  // nchw: columns of one copy
};

struct Params {
  Source x, y;
  void* out;
  void* partial;
  int64_t w_k, w_r, w_s;
  int64_t N;
  int C, H, W, P, Q, R, S, pad_h, pad_w;
  int units_r, units_s, chunks, slots, warps, channels, images, parts;
  int rows, x_pitch, y_pitch, x_bytes, y_bytes, stages;
  int tiles_h, tiles_w, channel_units, steps, splits;
};

// Of a step: its images, rows of x, rows of y that these meet, and columns of y.
struct Step {
  int64_t n0;
  int h0, rows, p0, y_rows, q0;

  __device__ Step(Params const& p, int index) {
    int const tile_w = index % p.tiles_w, rest = index / p.tiles_w, tile_h = rest % p.tiles_h;
    n0 = int64_t(rest / p.tiles_h) * p.images, h0 = tile_h * p.rows, q0 = tile_w * p.chunks * kSumsChunk;
    rows = min(p.rows, p.H - h0);
    p0 = max(h0 + p.pad_h - p.R + 1, 0), y_rows = max(min(p.P, h0 + rows + p.pad_h) - p0, 0);
  }
};

// A plane's part: rows from h0 on, columns [column, column + columns), the first of which has place `place`.
struct Window {
  int c0, channels, images, h0, rows, column, columns, place;
  int64_t n0;
};

// A warp has a row, E columns of it at a time; nhwc: some channels of a column, one by one.
template <int E, bool nhwc>
__device__ inline void fill(Params const& p, Source const& s, Window const& at, uint32_t planes, int plane_bytes,
                            int pitch) {
  int const copies = nhwc ? p.channels * at.columns : at.columns / E, lane = int(threadIdx.x) % 32;
  int const bits = 31 - __clz(p.channels);
  float const* const data = s.data + at.n0 * s.n + at.c0 * s.c + at.h0 * s.h + at.column * s.w;
  for (int row = int(threadIdx.x) / 32; row < at.rows; row += int(blockDim.x) / 32)
    for (int i = lane; i < copies; i += 32) {
      int const c = nhwc ? i & (p.channels - 1) : 0, column = nhwc ? i >> bits : i * E, place = at.place + column;
      if (nhwc && c >= at.channels) continue;
      float const* from = data + row * s.h + column * s.w + c * s.c;
      uint32_t to = planes + c * p.images * plane_bytes + (row * pitch + sums_place(place / 4) * 4 + place % 4) * 4;
      for (int image = 0; image < at.images; ++image, from += s.n, to += plane_bytes) {
        if constexpr (E == 4)
          ptx::cp_async_16(to, from, true);
        else
          ptx::cp_async_ca<4 * E>(to, from, true);
      }
    }
}

template <bool nhwc>
__device__ inline void fill(Params const& p, Source const& s, Window const& at, uint32_t planes, int plane_bytes,
                            int pitch) {
  if constexpr (nhwc) {
    fill<1, true>(p, s, at, planes, plane_bytes, pitch);
  } else {
    if (s.width == 4)
      fill<4, false>(p, s, at, planes, plane_bytes, pitch);
    else if (s.width == 2)
      fill<2, false>(p, s, at, planes, plane_bytes, pitch);
    else
      fill<1, false>(p, s, at, planes, plane_bytes, pitch);
  }
}

// A tap from global memory, over the block's steps.
__device__ __noinline__ inline float exact_sum(Params const& p, int begin, int end, int c, int r, int s) {
  float sum = 0;
  for (int index = begin; index < end; ++index) {
    Step const step(p, index);
    for (int64_t n = step.n0; n < step.n0 + p.images && n < p.N; ++n)
      for (int h = step.h0; h < step.h0 + step.rows; ++h) {
        int const row = h + p.pad_h - r;
        if (unsigned(row) >= unsigned(p.P)) continue;
        for (int q = step.q0; q < step.q0 + p.chunks * kSumsChunk && q < p.Q; ++q) {
          int const w = q + s - p.pad_w;
          if (unsigned(w) < unsigned(p.W))
            sum = fmaf(p.x.data[n * p.x.n + c * p.x.c + h * p.x.h + w * p.x.w],
                       p.y.data[n * p.y.n + c * p.y.c + row * p.y.h + q * p.y.w], sum);
        }
        if (sum != sum) return sum;  // NaN, whatever comes
      }
  }
  return sum;
}

template <int TR, int TS, bool nhwc>
__global__ void __launch_bounds__(nhwc ? kSumsThreads : 256, nhwc ? 1 : 2) wgrad(__grid_constant__ Params const p) {
  constexpr int window = (kSumsChunk + TS - 1 + 3) / 4;  // of x, in 16 bytes
  extern __shared__ __align__(16) unsigned char shared[];
  depthwise::let_second_pass_begin();
  int const unit = int(blockIdx.x) % p.channel_units, split = int(blockIdx.x) / p.channel_units;
  int const c0 = unit * p.channels, channels = min(p.C - c0, p.channels);
  int const begin = int(int64_t(p.steps) * split / p.splits), end = int(int64_t(p.steps) * (split + 1) / p.splits);
  int const planes = p.channels * p.images, stage_bytes = planes * (p.x_bytes + p.y_bytes);
  uint32_t const base = ptx::shared_address(shared);

  // Zeros around the images, and a row of them.
  int const zeros = p.stages * stage_bytes;
  for (int i = threadIdx.x; i < (zeros + p.y_pitch * 4) / 16; i += int(blockDim.x))
    ptx::st_shared_v4(base + i * 16, {0, 0, 0, 0});
  __syncthreads();

  auto copy = [&](int index, int stage) {
    Step const step(p, index);
    uint32_t const to = base + stage * stage_bytes;
    int const images = p.N - step.n0 < p.images ? int(p.N - step.n0) : p.images;
    if (p.tiles_w > 1) {  // other columns are around the image
      for (int i = threadIdx.x; i < stage_bytes / 16; i += int(blockDim.x))
        ptx::st_shared_v4(to + i * 16, {0, 0, 0, 0});
      __syncthreads();
    }
    int const origin = step.q0 - p.pad_w, column = max(origin, 0);
    int const width = p.chunks * kSumsChunk + ((p.units_s - 1) * TS + TS - 1 + 3) / 4 * 4;
    fill<nhwc>(p, p.x,
               {c0, channels, images, step.h0, step.rows, column, max(min(p.W, origin + width) - column, 0),
                column - origin, step.n0},
               to, p.x_bytes, p.x_pitch);
    fill<nhwc>(
        p, p.y,
        {c0, channels, images, step.p0, step.y_rows, step.q0, min(p.Q - step.q0, p.chunks * kSumsChunk), 0, step.n0},
        to + planes * p.x_bytes, p.y_bytes, p.y_pitch);
    ptx::cp_async_commit_group();
  };

  // A warp has a channel, a block of rows of taps, and some shares; a lane a share, a chunk and a block of columns.
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int const of_unit = warp % p.warps, r0 = warp / p.warps % p.units_r * TR, c = warp / p.warps / p.units_r;
  int rest = lane;
  int const unit_s = rest % p.units_s, unit_q = (rest /= p.units_s) % p.chunks;
  int const slot = rest / p.chunks, share = slot * p.warps + of_unit;
  bool const exists = slot < p.slots && c < channels;
  int const image = exists ? share / p.parts : 0, part = share % p.parts;
  int x_place[window], y_place[2];
#pragma unroll
  for (int i = 0; i < window; ++i) x_place[i] = sums_place(unit_q * 2 + unit_s * (TS / 4) + i) * 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) y_place[i] = sums_place(unit_q * 2 + i) * 4;

  float acc[TR][TS] = {};
  int ahead = begin;  // the next step to be copied
#pragma unroll 1
  for (int index = begin; index < end; ++index) {
    int const stage = p.stages == 2 ? (index - begin) % 2 : 0;
#pragma unroll 1
    for (; ahead < end && ahead < index + p.stages; ++ahead) copy(ahead, p.stages == 2 ? (ahead - begin) % 2 : 0);
    if (ahead > index + 1)
      ptx::cp_async_wait_group<1>();
    else
      ptx::cp_async_wait_group<0>();
    __syncthreads();
    Step const step(p, index);
    if (exists && step.n0 + image < p.N) {
      // Rows of x that meet rows of y; the thread's part of them.
      int const low = max(step.h0, r0 - p.pad_h), high = min(step.h0 + step.rows, p.P - p.pad_h + r0 + TR - 1);
      int const count = max(high - low, 0), first = low + count * part / p.parts,
                last = low + count * (part + 1) / p.parts;
      float const* const stage_x = reinterpret_cast<float const*>(shared + stage * stage_bytes);
      float const* x = stage_x + (c * p.images + image) * (p.x_bytes / 4) + (first - step.h0) * p.x_pitch;
      float const* const y_plane = stage_x + planes * (p.x_bytes / 4) + (c * p.images + image) * (p.y_bytes / 4);
      float const* const none = reinterpret_cast<float const*>(shared + zeros);
      int row = first + p.pad_h - r0 - (TR - 1) - step.p0;  // of y, in its plane
      alignas(16) float y[TR][kSumsChunk];                  // the last rows
      auto load_y = [&](float (&to)[kSumsChunk]) {
        float const* const from = unsigned(row) < unsigned(step.y_rows) ? y_plane + row * p.y_pitch : none;
        ++row;
#pragma unroll
        for (int i = 0; i < 2; ++i)
          *reinterpret_cast<float4*>(to + 4 * i) = *reinterpret_cast<float4 const*>(from + y_place[i]);
      };
#pragma unroll
      for (int i = 0; i < TR - 1; ++i) load_y(y[i]);
      // Row `newest` of `y` is the first tap's.
      auto walk = [&]<int newest>(std::integral_constant<int, newest>) {
        load_y(y[newest]);
        alignas(16) float v[4 * window];
#pragma unroll
        for (int i = 0; i < window; ++i)
          *reinterpret_cast<float4*>(v + 4 * i) = *reinterpret_cast<float4 const*>(x + x_place[i]);
        x += p.x_pitch;
#pragma unroll
        for (int k = 0; k < kSumsChunk; ++k)
#pragma unroll
          for (int i = 0; i < TR; ++i)
#pragma unroll
            for (int j = 0; j < TS; ++j) acc[i][j] = fmaf(y[(newest - i + TR) % TR][k], v[k + j], acc[i][j]);
      };
#pragma unroll 1
      for (int h = first; h < last; h += TR)
        [&]<int... u>(std::integer_sequence<int, u...>) {
          ((h + u < last ? walk(std::integral_constant<int, (TR - 1 + u) % TR>()) : void()), ...);
        }(std::make_integer_sequence<int, TR>());
    }
    __syncthreads();  // the stage has been read
  }

  // Threads of a tap, in their order.
  float* const sums = reinterpret_cast<float*>(shared);
  if (exists)
#pragma unroll
    for (int i = 0; i < TR * TS; ++i) sums[i * int(blockDim.x) + threadIdx.x] = acc[i / TS][i % TS];
  __syncthreads();
  int const taps = p.R * p.S;
  for (int i = threadIdx.x; i < channels * taps; i += int(blockDim.x)) {
    int const k = i / taps, tap = i - k * taps, r = tap / p.S, s = tap - r * p.S;
    int const first = (k * p.units_r + r / TR) * p.warps * 32 + s / TS;
    float const* const from = sums + (r % TR * TS + s % TS) * int(blockDim.x) + first;
    float sum = 0;
    for (int other = 0; other < p.warps; ++other)
      for (int j = 0; j < p.slots * p.chunks; ++j) sum += from[other * 32 + j * p.units_s];
    if (sum != sum) sum = exact_sum(p, begin, end, c0 + k, r, s);
    depthwise::store_sum<float>(p.out, p.partial, p.splits, (c0 + k) * p.w_k + r * p.w_r + s * p.w_s,
                                (int64_t(split) * p.C + c0 + k) * taps + tap, sum);
  }
}

// ---- host side

template <int TR, int TS, Variant variant>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  constexpr bool nhwc = variant == Variant::nhwc;
  StripSumsTile const t = strip_sums_tile(problem, TR, TS, nhwc);
  auto source = [&](Strides const& s, void const* data, int align, int64_t columns, int64_t shift) {
    Source made{static_cast<float const*>(data), s.n, s.c, s.h, nhwc ? s.w : 1, 4};
    while (made.width > 1 && (shift % made.width != 0 || columns % made.width != 0 ||
                              !depthwise::rows_aligned(s, false, align, 4 * made.width, 4)))
      made.width /= 2;
    return made;
  };
  Params p{};
  p.x = source(problem.x, args.a, problem.x_align, problem.W, problem.pad_left);
  p.y = source(problem.y, args.b, problem.y_align, problem.Q(), 0);
  p.out = args.out, p.partial = args.workspace, p.splits = plan.split_k;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.N = problem.N, p.C = int(problem.C), p.H = int(problem.H), p.W = int(problem.W);
  p.P = int(problem.P()), p.Q = int(problem.Q()), p.R = int(problem.R), p.S = int(problem.S);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.units_r = t.units_r, p.units_s = t.units_s, p.chunks = t.chunks, p.slots = t.slots, p.warps = t.warps;
  p.channels = t.channels, p.images = t.images, p.parts = t.parts;
  p.rows = t.rows, p.x_pitch = t.x_pitch, p.y_pitch = t.y_pitch, p.x_bytes = t.x_bytes, p.y_bytes = t.y_bytes;
  p.stages = t.stages, p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w);
  p.channel_units = int(t.channel_units), p.steps = int(t.steps());
  auto* const kernel = wgrad<TR, TS, nhwc>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(t.channel_units * p.splits), unsigned(t.threads()), size_t(t.shared_bytes), stream>>>(p);
  if (cudaError_t const error = cudaGetLastError(); error != cudaSuccess || p.splits == 1) return error;
  return depthwise::launch_second_pass<float>(problem, plan, args, stream);
}

}  // namespace conv2d_ext::strip_sums

#define CONV2D_EXT_STRIP_SUMS_INSTANCE(family, op, dtype, tm, tn, tk, variant)  \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                     \
    return strip_sums::launch<tm, tn, Variant::variant>(p, plan, args, stream); \
  }
