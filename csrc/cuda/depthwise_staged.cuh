// Depthwise convolution in NCHW with any filter, stride and dilation, from shared memory: a block copies images of a
// channel, or a band of rows of one, with zeros around them (core/staged.h), and a tap costs a load and an FMA.
//   fprop, dgrad with stride 1: a warp has 128 outputs at a time.
//   wgrad: a block walks over a share of the tiles; a warp has kStagedTaps taps, lanes over the outputs.
#pragma once

#include "../core/staged.h"
#include "depthwise_few.cuh"

namespace conv2d_ext::depthwise {

constexpr int kRunLanes = kStagedRun / 32;  // outputs of a lane

// A tensor that is copied: rows and columns of the same remainder by stride_h and stride_w lie together.
struct StagedSource {
  void const* data;
  int64_t c;
  int n, h;  // strides
  int H, W, pad_h, pad_w;
  int rows;  // of an image that are copied, of one remainder
  int stride_h, stride_w;
  int width;                                           // elements of one load
  Divisor by_stride_h, by_stride_w, by_row, by_image;  // by W / width; by the rows of a whole image that are copied
};

struct StagedParams {
  StagedSource in, y;  // y: wgrad alone
  void const* w;
  void const* bias;
  void* out;
  void* partial;
  int64_t N, out_c;
  int out_n, out_h;
  int64_t w_k, w_r, w_s, bias_stride;
  int out_H, out_W, R, S, taps;
  int stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w;
  int step_h, step_w;  // dgrad: from a tap of a class to the next
  int channels, multiplier;
  int pitch, rows, columns, images, image_rows, phase_rows, bands, outputs;
  int elements, plane_elements, y_elements;  // in shared memory: of in; of one channel of it; of y
  Divisor by_pitch, by_image_rows;
  int tap_groups, tap_units, splits, steps;
};

// The least multiple of `divisor` from `value` on, as its quotient.
__device__ inline int up(int value, int divisor) {
  return value > 0 ? (value + divisor - 1) / divisor : -(-value / divisor);
}

// From the first of a tile's inputs to the one that its first output meets with a tap.
template <bool backward>
__device__ inline int tap_offset(StagedParams const& p, int r, int s) {
  int const a = r * p.dilation_h, b = s * p.dilation_w;
  if (backward) return (up(p.pad_h - a, p.stride_h) + p.in.pad_h) * p.pitch + up(p.pad_w - b, p.stride_w) + p.in.pad_w;
  int const h = a / p.stride_h, w = b / p.stride_w;
  int const phase = (a - h * p.stride_h) * p.stride_w + b - w * p.stride_w;
  return (phase * p.phase_rows + h) * p.pitch + w;
}

// Copies what is in `present` images of the tile whose outputs begin with row `first`; zeros around it are there.
template <class T, class Acc, int width>
__device__ inline void stage(StagedParams const& p, StagedSource const& s, T const* base, int present, int first,
                             Acc* tile) {
  constexpr int batch = width > 1 ? 2 : 4;
  using V = Vector<T, width>;
  int const top = first * s.stride_h - s.pad_h, begin = top > 0 ? top : 0;  // the tile's first row, and in the image
  int const bottom = top + s.rows * s.stride_h, end = bottom < s.H ? bottom : s.H;
  int const rows = end - begin, row_loads = int(s.by_row.value), total = present * rows * row_loads;
  for (int i0 = threadIdx.x; i0 < total; i0 += batch * int(blockDim.x)) {
    V v[batch];
    int to[batch], column[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      int const i = i0 + j * int(blockDim.x);
      if (i >= total) continue;
      int row = int(s.by_row.quotient(i)), image = 0;
      column[j] = (i - row * row_loads) * width;
      if (p.images > 1) image = int(s.by_image.quotient(row)), row -= image * rows;
      row += begin;
      v[j] = *reinterpret_cast<V const*>(base + image * s.n + row * s.h + column[j]);
      int at = row - top, phase = 0;
      if (s.stride_h > 1) {
        int const t = at;
        at = int(s.by_stride_h.quotient(t)), phase = (t - at * s.stride_h) * s.stride_w;
      }
      to[j] = (phase * p.phase_rows + image * p.image_rows + at) * p.pitch;
    }
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      if (i0 + j * int(blockDim.x) >= total) continue;
      int u = column[j] + s.pad_w, phase = 0;
      if (s.stride_w > 1) {
        int const t = u;
        u = int(s.by_stride_w.quotient(t)), phase = t - u * s.stride_w;
      }
#pragma unroll
      for (int e = 0; e < width; ++e) {
        if (unsigned(u) < unsigned(p.pitch)) tile[to[j] + phase * p.phase_rows * p.pitch + u] = widen(v[j].v[e]);
        if (++phase >= s.stride_w) phase = 0, ++u;
      }
    }
  }
}

template <class T, class Acc>
__device__ inline void stage(StagedParams const& p, StagedSource const& s, T const* base, int present, int first,
                             Acc* tile) {
  if constexpr (sizeof(T) < 8)
    if (s.width == 4) return stage<T, Acc, 4>(p, s, base, present, first, tile);
  if (s.width == 2) return stage<T, Acc, 2>(p, s, base, present, first, tile);
  stage<T, Acc, 1>(p, s, base, present, first, tile);
}

template <class Acc>
struct alignas(2 * sizeof(Acc)) Tap {
  Acc weight;
  int offset;
};

// One output from global memory, product by product.
template <bool backward, class T>
__device__ __noinline__ auto exact_output(StagedParams const& p, T const* plane, T const* filter, int oh, int ow) {
  decltype(widen(T())) sum = 0;
  for (int m = backward ? p.multiplier : 1; m > 0; --m, plane += p.in.c, filter += p.w_k)
    for (int tap = 0; tap < p.taps; ++tap) {
      int const r = tap / p.S, s = tap - r * p.S;
      int h = oh * p.stride_h - p.pad_h + r * p.dilation_h, w = ow * p.stride_w - p.pad_w + s * p.dilation_w;
      if (backward) {
        h = oh + p.pad_h - r * p.dilation_h, w = ow + p.pad_w - s * p.dilation_w;
        if (h % p.stride_h != 0 || w % p.stride_w != 0) continue;
        h /= p.stride_h, w /= p.stride_w;
      }
      if (unsigned(h) >= unsigned(p.in.H) || unsigned(w) >= unsigned(p.in.W)) continue;
      sum += widen(plane[int64_t(h) * p.in.h + w]) * widen(filter[r * p.w_r + s * p.w_s]);
    }
  return sum;
}

template <class T, bool backward>
__global__ void __launch_bounds__(kMaxThreads, sizeof(T) == 8 ? 3 : 4)
    gather_staged(__grid_constant__ StagedParams const p) {
  using Acc = decltype(widen(T()));
  extern __shared__ __align__(16) unsigned char shared[];
  int const filters = backward ? p.multiplier : 1;
  Acc* const tile = reinterpret_cast<Acc*>(shared);
  Tap<Acc>* const taps = reinterpret_cast<Tap<Acc>*>(tile + p.elements);
  int* const first_r = reinterpret_cast<int*>(taps + filters * p.taps);  // of a class
  int* const first_s = first_r + p.stride_h;
  uint32_t index = blockIdx.x;
  int const first = split_off(index, p.bands) * p.rows, c = split_off(index, p.channels);
  int64_t const n0 = int64_t(index) * p.images;
  int const present = int(smaller(p.N - n0, p.images));
  int64_t const plane = backward ? c * int64_t(p.multiplier) : c / p.multiplier;
  T const* const base = static_cast<T const*>(p.in.data) + n0 * p.in.n + plane * p.in.c;
  T const* const filter = static_cast<T const*>(p.w) + (backward ? plane : c) * p.w_k;
  clear(tile, p.elements);
  for (int i = threadIdx.x; i < filters * p.taps; i += blockDim.x) {
    int const m = i / p.taps, tap = i - m * p.taps, r = tap / p.S, s = tap - r * p.S;
    taps[i] = {widen(filter[m * p.w_k + r * p.w_r + s * p.w_s]), m * p.plane_elements + tap_offset<backward>(p, r, s)};
  }
  if constexpr (backward) {
    for (int i = threadIdx.x; i < p.stride_h + p.stride_w; i += blockDim.x) {
      bool const rows = i < p.stride_h;
      int const which = rows ? i : i - p.stride_h, count = rows ? p.R : p.S;
      int const pad = rows ? p.pad_h : p.pad_w, dilation = rows ? p.dilation_h : p.dilation_w;
      int tap = 0;
      while (tap < count && (which + pad - tap * dilation) % (rows ? p.stride_h : p.stride_w) != 0) ++tap;
      first_r[i] = tap;
    }
  }
  Acc const bias = p.bias != nullptr ? Acc(widen(static_cast<T const*>(p.bias)[c * p.bias_stride])) : Acc(0);
  T* const out = static_cast<T*>(p.out) + n0 * p.out_n + c * p.out_c;
  __syncthreads();
  for (int m = 0; m < filters; ++m) stage<T>(p, p.in, base + m * p.in.c, present, first, tile + m * p.plane_elements);
  __syncthreads();

  // dgrad: neighbouring warps have neighbouring columns.
  int const classes_h = backward ? p.stride_h : 1, classes_w = backward ? p.stride_w : 1;
  int const items = (p.outputs + kStagedRun - 1) / kStagedRun * classes_h * classes_w;
  for (int item = int(threadIdx.x) / 32; item < items; item += kMaxThreads / 32) {
    int run = item, a = 0, b = 0;
    if (backward && p.stride_h * p.stride_w > 1)
      b = run % classes_w, run /= classes_w, a = run % classes_h, run /= classes_h;
    int const f0 = run * kStagedRun + int(threadIdx.x) % 32;
    Acc acc[kRunLanes] = {};
    Acc const* const from = tile + f0;
    if constexpr (backward) {
      for (int m = 0; m < filters; ++m)
        for (int r = first_r[a]; r < p.R; r += p.step_h) {
          Acc chain[kRunLanes] = {};
          Tap<Acc> const* const row = taps + (m * p.R + r) * p.S;
#pragma unroll 4
          for (int s = first_s[b]; s < p.S; s += p.step_w) {
            Tap<Acc> const t = row[s];
#pragma unroll
            for (int j = 0; j < kRunLanes; ++j) chain[j] += from[t.offset + 32 * j] * t.weight;
          }
#pragma unroll
          for (int j = 0; j < kRunLanes; ++j) acc[j] += chain[j];
        }
    } else {
      for (int tap = 0; tap < p.taps;) {
        Acc chain[kRunLanes] = {};
        int const end = p.taps - tap < kChain ? p.taps : tap + kChain;
#pragma unroll 4
        for (; tap < end; ++tap) {
          Tap<Acc> const t = taps[tap];
#pragma unroll
          for (int j = 0; j < kRunLanes; ++j) chain[j] += from[t.offset + 32 * j] * t.weight;
        }
#pragma unroll
        for (int j = 0; j < kRunLanes; ++j) acc[j] += chain[j];
      }
    }
    // Of output j: its image and place, if it has one.
    auto place = [&](int j, int& image, int& h, int& w) {
      int const f = f0 + 32 * j;
      int row = int(p.by_pitch.quotient(f));
      int const q = f - row * p.pitch;
      image = 0;
      if (p.images > 1) image = int(p.by_image_rows.quotient(row)), row -= image * p.image_rows;
      h = (first + row) * classes_h + a, w = q * classes_w + b;
      return q < p.columns && w < p.out_W && row < p.rows && h < p.out_H && image < present;
    };
    bool nan = false;
#pragma unroll
    for (int j = 0; j < kRunLanes; ++j) {
      int image, h, w;
      if (!place(j, image, h, w)) continue;
      out[image * p.out_n + h * p.out_h + w] = narrow<T>(acc[j] + bias);
      nan = nan || acc[j] != acc[j];
    }
    // Zeros around the image make a NaN of a weight that is not finite.
#pragma unroll 1
    for (int j = 0; nan && j < kRunLanes; ++j) {
      int image, h, w;
      if (!place(j, image, h, w)) continue;
      Acc const sum = exact_output<backward>(p, base + image * p.in.n, filter, h, w);
      out[image * p.out_n + h * p.out_h + w] = narrow<T>(sum + bias);
    }
  }
}

// A lane's part of the sum of one tap over a share of the tiles, product by product.
template <class T>
__device__ __noinline__ auto exact_sum(StagedParams const& p, T const* x, T const* y, int begin, int end, int tap) {
  int const lane = int(threadIdx.x) % 32, r = tap / p.S, s = tap - r * p.S;
  decltype(widen(T())) sum = 0;
  for (int step = begin; step < end; ++step) {
    int const group = step / p.bands, first = (step - group * p.bands) * p.rows;
    int64_t const n0 = int64_t(group) * p.images;
    int const rows = p.out_H - first < p.rows ? p.out_H - first : p.rows;
    for (int64_t n = n0; n < smaller(p.N, n0 + p.images); ++n)
      for (int i = lane; i < rows * p.out_W; i += 32) {
        int const oh = first + i / p.out_W, ow = i % p.out_W;
        int const h = oh * p.stride_h - p.in.pad_h + r * p.dilation_h;
        int const w = ow * p.stride_w - p.in.pad_w + s * p.dilation_w;
        if (unsigned(h) < unsigned(p.in.H) && unsigned(w) < unsigned(p.in.W))
          sum += widen(x[n * p.in.n + h * p.in.h + w]) * widen(y[n * p.y.n + oh * p.y.h + ow]);
      }
    if (sum != sum) return sum;  // NaN, whatever comes
  }
  return sum;
}

template <class Acc>
__device__ inline Acc warp_sum(Acc v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
  return v;
}

template <class T>
__global__ void __launch_bounds__(32 * kStagedWarps, sizeof(T) == 8 ? 1 : 2)
    wgrad_staged(__grid_constant__ StagedParams const p) {
  using Acc = decltype(widen(T()));
  extern __shared__ __align__(16) unsigned char shared[];
  Acc* const tile = reinterpret_cast<Acc*>(shared);
  Acc* const tile_y = tile + p.elements + kStagedRun;
  let_second_pass_begin();
  uint32_t index = blockIdx.x;
  int const unit = split_off(index, p.tap_units), k = split_off(index, p.channels), split = int(index);
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  int const group = warp % p.tap_groups, part = warp / p.tap_groups, parts = warps / p.tap_groups;
  int const unit_tap = unit * p.tap_groups * kStagedTaps, tap0 = unit_tap + group * kStagedTaps;
  T const* const x = static_cast<T const*>(p.in.data) + k / p.multiplier * p.in.c;
  T const* const y = static_cast<T const*>(p.y.data) + k * p.y.c;
  int const begin = int(int64_t(p.steps) * split / p.splits), end = int(int64_t(p.steps) * (split + 1) / p.splits);

  int offset[kStagedTaps];
  Acc acc[kStagedTaps] = {};
#pragma unroll
  for (int i = 0; i < kStagedTaps; ++i) {
    int const tap = tap0 + i < p.taps ? tap0 + i : p.taps - 1;
    offset[i] = tap_offset<false>(p, tap / p.S, tap % p.S);
  }
  for (int step = begin; step < end; ++step) {
    int const images = step / p.bands, first = (step - images * p.bands) * p.rows;
    int64_t const n0 = int64_t(images) * p.images;
    int const present = int(smaller(p.N - n0, p.images));
    __syncthreads();  // the last tile has been read
    if (step == begin || p.bands > 1 || present < p.images) {
      clear(tile, p.elements + kStagedRun + p.y_elements + kStagedRun);
      __syncthreads();
    }
    stage<T>(p, p.in, x + n0 * p.in.n, present, first, tile);
    stage<T>(p, p.y, y + n0 * p.y.n, present, first, tile_y);
    __syncthreads();
    Acc chain[kStagedTaps] = {};
    for (int f = part * kStagedRun + lane; f < p.outputs; f += parts * kStagedRun) {
      Acc gradient[kRunLanes];
#pragma unroll
      for (int j = 0; j < kRunLanes; ++j) gradient[j] = tile_y[f + 32 * j];
#pragma unroll
      for (int i = 0; i < kStagedTaps; ++i) {
        Acc const* const from = tile + offset[i] + f;
#pragma unroll
        for (int j = 0; j < kRunLanes; ++j) chain[i] += from[32 * j] * gradient[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kStagedTaps; ++i) acc[i] += chain[i];
  }

  // The parts' sums, added in their order.
  __syncthreads();
  Acc* const sums = tile;
#pragma unroll
  for (int i = 0; i < kStagedTaps; ++i) {
    Acc const v = warp_sum(acc[i]);
    if (lane == 0) sums[warp * kStagedTaps + i] = v;
  }
  __syncthreads();
  int const count = p.tap_groups * kStagedTaps, left = p.taps - unit_tap, taps = left < count ? left : count;
  auto store = [&](int tap, Acc sum) {
    store_sum<T>(p.out, p.partial, p.splits, k * p.w_k + tap / p.S * p.w_r + tap % p.S * p.w_s,
                 (int64_t(split) * p.channels + k) * p.taps + tap, sum);
  };
  bool nan = false;
  for (int i = threadIdx.x; i < taps; i += blockDim.x) {
    Acc sum = sums[i];
    for (int other = 1; other < parts; ++other) sum += sums[other * count + i];
    nan = nan || sum != sum;
    store(unit_tap + i, sum);
  }
  // Zeros beyond the images may have made a NaN of what is not finite.
  if (__syncthreads_or(nan) == 0) return;
  for (int i = warp; i < taps; i += warps) {
    Acc const sum = warp_sum(exact_sum<T>(p, x, y, begin, end, unit_tap + i));
    if (lane == 0) store(unit_tap + i, sum);
  }
}

template <Op op, DType dtype>
cudaError_t launch_staged(Problem const& problem, StagedTile const& tile, Plan const& plan, Arguments const& args,
                          cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool sums = op == Op::wgrad, backward = op == Op::dgrad;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  StagedParams p{};
  auto source = [&](void const* data, Strides const& s, int H, int W, int rows, int width) {
    StagedSource to{};
    to.data = data, to.n = int(s.n), to.c = s.c, to.h = int(s.h), to.H = H, to.W = W, to.rows = rows;
    to.stride_h = to.stride_w = 1, to.width = width;
    to.by_row = Divisor(uint32_t(W / width));
    return to;
  };
  p.stride_h = int(problem.stride_h), p.stride_w = int(problem.stride_w);
  p.dilation_h = int(problem.dilation_h), p.dilation_w = int(problem.dilation_w);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.step_h = tile.step_h, p.step_w = tile.step_w;
  p.in = source(args.a, in, tile.in_H, tile.in_W, tile.image_rows, tile.width);
  p.in.pad_h = tile.pad_h, p.in.pad_w = tile.pad_w;
  p.in.stride_h = tile.phases_h, p.in.stride_w = tile.phases_w;
  p.in.by_stride_h = Divisor(uint32_t(tile.phases_h)), p.in.by_stride_w = Divisor(uint32_t(tile.phases_w));
  // Of a tile of several images, which are whole.
  int const last = tile.image_rows * tile.phases_h - tile.pad_h, from = tile.pad_h < 0 ? -tile.pad_h : 0;
  p.in.by_image = Divisor(uint32_t(max64(1, (last < tile.in_H ? last : tile.in_H) - from)));
  p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride, p.out = args.out, p.partial = args.workspace;
  p.N = problem.N, p.out_n = int(out.n), p.out_c = out.c, p.out_h = int(out.h);
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.out_H = int(backward ? problem.H : problem.P()), p.out_W = int(backward ? problem.W : problem.Q());
  p.R = int(problem.R), p.S = int(problem.S), p.taps = p.R * p.S;
  p.channels = int(backward ? problem.C : problem.K), p.multiplier = int(problem.K_per_group());
  p.pitch = tile.pitch, p.rows = tile.rows, p.columns = tile.out_W, p.images = tile.images;
  p.image_rows = tile.image_rows, p.phase_rows = tile.phase_rows, p.bands = int(tile.bands), p.outputs = tile.outputs;
  p.by_pitch = Divisor(uint32_t(tile.pitch)), p.by_image_rows = Divisor(uint32_t(tile.image_rows));
  p.elements = int(tile.elements), p.y_elements = int(tile.elements_y);
  p.plane_elements = p.elements / (backward ? p.multiplier : 1);
  p.tap_groups = tile.tap_groups, p.tap_units = tile.tap_units, p.splits = plan.split_k;
  p.steps = int(tile.bands * tile.groups);
  auto start = [&](auto* kernel, int64_t blocks) {
    if (tile.shared_bytes > 48 * 1024)
      if (auto const error =
              cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(tile.shared_bytes)))
        return error;
    kernel<<<unsigned(blocks), unsigned(tile.threads(op)), size_t(tile.shared_bytes), stream>>>(p);
    return cudaGetLastError();
  };
  if constexpr (!sums) {
    return start(gather_staged<T, backward>, tile.bands * tile.groups * p.channels);
  } else {
    p.y = source(args.b, problem.y, tile.out_H, tile.out_W, tile.rows, tile.width_y);
    p.y.by_image = Divisor(uint32_t(tile.out_H));
    if (cudaError_t const error = start(wgrad_staged<T>, tile.tap_units * problem.K * p.splits);
        error != cudaSuccess || p.splits == 1)
      return error;
    return launch_second_pass<T>(problem, plan, args, stream);
  }
}

}  // namespace conv2d_ext::depthwise
