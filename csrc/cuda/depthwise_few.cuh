// Depthwise convolution in NCHW where an input is met few times: filters that lie apart, or of few taps. Every thread
// asks at once for what it needs, straight from global memory; what its neighbours ask for too comes from L1.
//   gather_few: fprop, and dgrad with stride 1 as fprop with the filter turned round. A thread has kFewRows outputs of
//     a column.
//   spread_few: dgrad with a stride: an output meets every stride-th tap of a row and a column, or none.
//   wgrad_few: a block has a channel, or some of its taps, and a share of the pixels; a thread takes kFewRows at once.
#pragma once

#include "../core/few.h"
#include "second_pass.cuh"

namespace conv2d_ext::depthwise {

struct FewParams {
  void const* in;     // wgrad: x
  void const* other;  // w; wgrad: y
  void const* bias;
  void* out;
  void* partial;
  int64_t in_n, in_c, out_n, out_c, w_k, w_r, w_s, bias_stride;  // wgrad: out: of y
  int64_t filter, tap_r, tap_s;                                  // gather_few: to the first tap, from a tap to the next
  int64_t in_row, out_row;                                       // bytes from a row to the next
  int in_h, out_h;
  int in_H, in_W, out_H, out_W, R, S, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w;
  uint32_t planes, channels, multiplier;  // planes: of outputs
  int filters;                            // that an output adds up
  int tiles, block_planes, plane_items;
  Divisor by_plane, by_row, by_groups, by_stride_h, by_stride_w;
  int64_t last;  // gather_few, wgrad_few: of the input's elements, from the first
  // wgrad: blocks for different taps; columns of a block, such strips of an image, rows of them that threads have; the
  // shares of all rows, which are groups of kFewRows.
  int tap_rows, tap_columns, columns, strips, block_rows, splits;
  uint32_t items;
};

// A thread's outputs: rows from `row` on of a column.
struct FewPlace {
  uint32_t n, c;
  int row, column;
  bool exists;

  __device__ explicit FewPlace(FewParams const& p) {
    uint32_t const unit = blockIdx.x / uint32_t(p.tiles), tile = blockIdx.x - unit * uint32_t(p.tiles);
    uint32_t plane = unit, i = tile * kFewThreads + threadIdx.x;
    exists = true;
    if (p.block_planes > 1) {
      uint32_t const which = p.by_plane.quotient(i);
      plane = unit * uint32_t(p.block_planes) + which, i -= which * uint32_t(p.plane_items);
      exists = which < uint32_t(p.block_planes);
    }
    uint32_t const group = p.by_row.quotient(i);
    row = int(group) * kFewRows, column = int(i - group * uint32_t(p.out_W));
    exists = exists && plane < p.planes && row < p.out_H;
    n = plane / p.channels, c = plane - n * p.channels;
  }
};

// An output, product by product: where zeros beside the images have made a NaN.
template <class T>
__device__ __noinline__ auto exact_few(FewParams const& p, T const* in, T const* filter, int row, int column) {
  decltype(widen(T())) sum = 0;
  for (int m = 0; m < p.filters; ++m, in += p.in_c, filter += p.w_k)
    for (int r = 0; r < p.R; ++r)
      for (int s = 0; s < p.S; ++s) {
        int const h = row * p.stride_h - p.pad_h + r * p.dilation_h,
                  w = column * p.stride_w - p.pad_w + s * p.dilation_w;
        if (unsigned(h) >= unsigned(p.in_H) || unsigned(w) >= unsigned(p.in_W)) continue;
        sum += widen(in[h * p.in_h + w]) * widen(filter[r * p.tap_r + s * p.tap_s]);
      }
  return sum;
}

// Rows of inputs from the first row of a thread's outputs to the last one's, with R taps.
template <int R, int stride>
__device__ inline int few_reach(FewParams const& p) {
  return stride > 0 ? (kFewRows - 1) * stride + R - 1 : (kFewRows - 1) * p.stride_h + (R - 1) * p.dilation_h;
}

// Are all of a thread's columns, beside the image too, in the input's memory? `begin`: its plane; `more`: to the last.
template <int R, int S, int stride>
__device__ inline bool few_inside(FewParams const& p, int64_t begin, int64_t more, int h0, int w0) {
  int const reach = few_reach<R, stride>(p), top = h0 > 0 ? h0 : 0;
  int const bottom = h0 + reach < p.in_H ? h0 + reach : p.in_H - 1;
  int64_t const low = begin + int64_t(top) * p.in_h + w0;
  int64_t const high = begin + more + int64_t(bottom) * p.in_h + w0 + (S - 1) * (stride > 0 ? 1 : p.dilation_w);
  return low >= 0 && high <= p.last;
}

// Addresses as numbers: sums of pointers are taken apart by the compiler, and put together for each load.
template <class T>
__device__ inline uint64_t address_of(T const* p) {
  return reinterpret_cast<uint64_t>(p);
}

template <class T>
__device__ inline T load_from(uint64_t address) {
  return __ldg(reinterpret_cast<T const*>(address));
}

// A row of inputs, `h` rows from the first. `ends`: without the columns beside the image.
template <class T, int S, int stride, bool ends>
__device__ inline void load_few(FewParams const& p, uint64_t from, int h0, int w0, int h, T (&v)[S]) {
  bool const row = unsigned(h0 + h) < unsigned(p.in_H);
  uint64_t const first = from + int64_t(h) * p.in_row;
#pragma unroll
  for (int s = 0; s < S; ++s) {
    v[s] = narrow<T>(decltype(widen(T()))(0));
    int const to = stride > 0 ? s : s * p.dilation_w;
    if (row && (!ends || unsigned(w0 + to) < unsigned(p.in_W))) v[s] = load_from<T>(first + int64_t(to) * sizeof(T));
  }
}

// Blocks of an SM, as the registers allow.
constexpr int few_blocks(int size, int R, int stride) {
  return size == 8               ? (R == 5                                   ? 2
                                    : stride == 2 || (R == 3 && stride == 0) ? 3
                                                                             : 4)
         : R == 3 && stride == 0 ? 4
         : R == 5                ? 4
         : stride == 1           ? 8
         : stride == 2           ? 5
                                 : 6;
}

template <class T, int R, int stride>
__global__ void __launch_bounds__(kFewThreads, few_blocks(sizeof(T), R, stride))
    gather_few(__grid_constant__ FewParams const p) {
  using Acc = decltype(widen(T()));
  FewPlace const at(p);
  if (!at.exists) return;
  T const* const in = static_cast<T const*>(p.in) + at.n * p.in_n + at.c / p.multiplier * uint32_t(p.filters) * p.in_c;
  T const* const filter = static_cast<T const*>(p.other) + at.c * uint32_t(p.filters) * p.w_k + p.filter;
  int const h0 = at.row * p.stride_h - p.pad_h, w0 = at.column * p.stride_w - p.pad_w;
  Acc acc[kFewRows] = {};
  T const* from = in + h0 * p.in_h + w0;
  T const* taps = filter;
  constexpr int rows = R > 0 ? R : 1;
  auto add = [&]<bool ends>() {
#pragma unroll 1
    for (int m = 0; m < p.filters; ++m, from += p.in_c, taps += p.w_k) {
      // Columns beside the image are other rows' ends, and meet zeros.
      Acc f[R][R];
#pragma unroll
      for (int s = 0; s < R; ++s) {
        bool const column = unsigned(w0 + (stride > 0 ? s : s * p.dilation_w)) < unsigned(p.in_W);
#pragma unroll
        for (int r = 0; r < R; ++r) f[r][s] = column ? widen(__ldg(taps + r * p.tap_r + s * p.tap_s)) : Acc(0);
      }
#pragma unroll
      for (int i = 0; i < (stride > 0 ? (kFewRows - 1) * stride + R : kFewRows * R); ++i) {
        T v[R];
        load_few<T, R, stride, ends>(p, address_of(from), h0, w0,
                                     stride > 0 ? i : i / rows * p.stride_h + i % rows * p.dilation_h, v);
#pragma unroll
        for (int e = 0; e < kFewRows; ++e) {
          int const r = stride > 0 ? i - e * stride : i - e * R;
          if (r >= 0 && r < R)
#pragma unroll
            for (int s = 0; s < R; ++s) acc[e] += widen(v[s]) * f[r][s];
        }
      }
    }
  };
  if constexpr (R > 0) {
    if (few_inside<R, R, stride>(p, from - static_cast<T const*>(p.in) - h0 * p.in_h - w0, (p.filters - 1) * p.in_c, h0,
                                 w0))
      add.template operator()<false>();
    else
      add.template operator()<true>();
  } else {
#pragma unroll 1
    for (int m = 0; m < p.filters; ++m, from += p.in_c, taps += p.w_k)
      for (int r = 0; r < p.R; ++r) {
        bool row[kFewRows];
        T const* rows[kFewRows];
#pragma unroll
        for (int e = 0; e < kFewRows; ++e) {
          int const h = e * p.stride_h + r * p.dilation_h;
          row[e] = unsigned(h0 + h) < unsigned(p.in_H), rows[e] = from + h * p.in_h;
        }
        Acc chain[kFewRows] = {};
#pragma unroll 4
        for (int s = 0; s < p.S; ++s) {
          int const to = s * p.dilation_w;
          bool const column = unsigned(w0 + to) < unsigned(p.in_W);
          Acc const tap = widen(__ldg(taps + r * p.tap_r + s * p.tap_s));
#pragma unroll
          for (int e = 0; e < kFewRows; ++e) {
            T v = narrow<T>(Acc(0));
            if (row[e] && column) v = __ldg(rows[e] + to);
            chain[e] += widen(v) * tap;
          }
        }
#pragma unroll
        for (int e = 0; e < kFewRows; ++e) acc[e] += chain[e];
      }
  }
  Acc const bias = p.bias != nullptr ? Acc(widen(static_cast<T const*>(p.bias)[at.c * p.bias_stride])) : Acc(0);
  T* const out = static_cast<T*>(p.out) + at.n * p.out_n + at.c * p.out_c + int64_t(at.row) * p.out_h + at.column;
#pragma unroll
  for (int e = 0; e < kFewRows; ++e) {
    if (at.row + e >= p.out_H) break;
    if (acc[e] != acc[e]) acc[e] = exact_few(p, in, filter, at.row + e, at.column);
    out[e * p.out_h] = narrow<T>(acc[e] + bias);
  }
}

template <class T>
__global__ void __launch_bounds__(kFewThreads, 8) spread_few(__grid_constant__ FewParams const p) {
  using Acc = decltype(widen(T()));
  FewPlace const at(p);
  if (!at.exists) return;
  int const w = at.column + p.pad_w, q = int(p.by_stride_w.quotient(w)), s = w - q * p.stride_w;
  T const* const in = static_cast<T const*>(p.in) + at.n * p.in_n + at.c * uint32_t(p.filters) * p.in_c + q;
  T const* const filter = static_cast<T const*>(p.other) + at.c * uint32_t(p.filters) * p.w_k + s * p.w_s;
  uint64_t y[kFewRows], taps[kFewRows];
  int row[kFewRows], r[kFewRows];
#pragma unroll
  for (int e = 0; e < kFewRows; ++e) {
    int const h = at.row + e + p.pad_h;
    row[e] = int(p.by_stride_h.quotient(h)), r[e] = h - row[e] * p.stride_h;
    y[e] = address_of(in + int64_t(row[e]) * p.in_h), taps[e] = address_of(filter + r[e] * p.w_r);
  }
  Acc acc[kFewRows] = {};
#pragma unroll 1
  for (int m = 0; m < p.filters; ++m)
  // Of the filter's taps, an output meets every stride-th.
#pragma unroll 1
    for (int i = 0; i * p.stride_h < p.R; ++i)
#pragma unroll 2
      for (int j = 0; j * p.stride_w < p.S; ++j) {
        bool const column = s + j * p.stride_w < p.S && unsigned(q - j) < unsigned(p.in_W);
        int64_t const from = (m * p.in_c - j) * int64_t(sizeof(T)) - i * p.in_row;
        int64_t const tap = (m * p.w_k + i * p.stride_h * p.w_r + j * p.stride_w * p.w_s) * int64_t(sizeof(T));
#pragma unroll
        for (int e = 0; e < kFewRows; ++e)
          if (column && r[e] + i * p.stride_h < p.R && unsigned(row[e] - i) < unsigned(p.in_H))
            acc[e] += widen(load_from<T>(y[e] + from)) * widen(load_from<T>(taps[e] + tap));
      }
  T* const out = static_cast<T*>(p.out) + at.n * p.out_n + at.c * p.out_c + int64_t(at.row) * p.out_h + at.column;
#pragma unroll
  for (int e = 0; e < kFewRows; ++e)
    if (at.row + e < p.out_H) out[e * p.out_h] = narrow<T>(acc[e]);
}

// The sum of a tap over a block's share, of a lane.
template <class T>
__device__ __noinline__ auto exact_few_sum(FewParams const& p, T const* x, T const* y, uint32_t begin, uint32_t end,
                                           int first_column, int r, int s) {
  decltype(widen(T())) sum = 0;
  int const columns = p.out_W - first_column < p.columns ? p.out_W - first_column : p.columns;
  for (uint32_t i = begin; i < end; ++i) {
    uint32_t const n = p.by_groups.quotient(i);
    int const first = int(i - n * p.by_groups.value) * kFewRows;
    for (int row = first; row < first + kFewRows && row < p.out_H; ++row) {
      int const h = row * p.stride_h - p.pad_h + r * p.dilation_h;
      if (unsigned(h) >= unsigned(p.in_H)) continue;
      for (int column = first_column + int(threadIdx.x) % 32; column < first_column + columns; column += 32) {
        int const w = column * p.stride_w - p.pad_w + s * p.dilation_w;
        if (unsigned(w) < unsigned(p.in_W))
          sum += widen(x[n * p.in_n + h * p.in_h + w]) * widen(y[n * p.out_n + row * p.out_h + column]);
      }
    }
    if (sum != sum) return sum;  // NaN, whatever comes
  }
  return sum;
}

// Blocks of an SM, as the registers allow.
constexpr int few_sum_blocks(int size, int taps, int stride) {
  return size == 8 ? (taps > 9 ? 3 : 4) : taps > 9 ? 4 : taps > 4 && stride == 0 ? 6 : 8;
}

// A block's taps: R x S of them from the block's first on.
template <class T, int R, int S, int stride>
__global__ void __launch_bounds__(kFewThreads, few_sum_blocks(sizeof(T), R* S, stride))
    wgrad_few(__grid_constant__ FewParams const p) {
  using Acc = decltype(widen(T()));
  constexpr int taps = R * S;
  __shared__ Acc sums[kFewThreads / 32][taps];
  let_second_pass_begin();
  int const warps = int(blockDim.x) / 32;
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  uint32_t index = blockIdx.x;
  int const s0 = split_off(index, p.tap_columns) * S, r0 = split_off(index, p.tap_rows) * R;
  int const k = split_off(index, int(p.channels)), split = int(index);
  int const strip = split % p.strips, part = split / p.strips, parts = p.splits / p.strips;
  uint32_t const share = (p.items + parts - 1) / parts, begin = share * part;
  uint32_t const end = begin + share < p.items ? begin + share : p.items;
  T const* const x = static_cast<T const*>(p.in) + uint32_t(k) / p.multiplier * p.in_c;
  T const* const y = static_cast<T const*>(p.other) + k * p.out_c;

  // A thread stays in its column.
  int const first_row = int(threadIdx.x) / p.columns, first_column = strip * p.columns;
  int const q = first_column + int(threadIdx.x) - first_row * p.columns;
  int const w0 = q * p.stride_w - p.pad_w + s0 * p.dilation_w;
  Acc acc[R][S] = {};
  if (first_row < p.block_rows && q < p.out_W)
#pragma unroll 1
    for (uint32_t i = begin + first_row; i < end; i += p.block_rows) {
      uint32_t const n = p.by_groups.quotient(i);
      int const row = int(i - n * p.by_groups.value) * kFewRows;
      int const h0 = row * p.stride_h - p.pad_h + r0 * p.dilation_h;
      uint64_t const from_y = address_of(y + n * p.out_n + int64_t(row) * p.out_h + q);
      uint64_t const from = address_of(x + n * p.in_n + int64_t(h0) * p.in_h + w0);
      Acc gradient[kFewRows];
#pragma unroll
      for (int e = 0; e < kFewRows; ++e) {
        T v = narrow<T>(Acc(0));
        if (row + e < p.out_H) v = load_from<T>(from_y + e * p.out_row);
        gradient[e] = widen(v);
      }
      auto add = [&]<bool ends>() {
#pragma unroll
        for (int j = 0; j < (stride > 0 ? (kFewRows - 1) * stride + R : kFewRows * R); ++j) {
          T v[S];
          load_few<T, S, stride, ends>(p, from, h0, w0, stride > 0 ? j : j / R * p.stride_h + j % R * p.dilation_h, v);
#pragma unroll
          for (int e = 0; e < kFewRows; ++e) {
            int const r = stride > 0 ? j - e * stride : j - e * R;
            if (r >= 0 && r < R)
#pragma unroll
              for (int s = 0; s < S; ++s) acc[r][s] += widen(v[s]) * gradient[e];
          }
        }
      };
      if (few_inside<R, S, stride>(p, x - static_cast<T const*>(p.in) + n * p.in_n, 0, h0, w0))
        add.template operator()<false>();
      else
        add.template operator()<true>();
    }
  // Columns beside the image.
#pragma unroll
  for (int s = 0; s < S; ++s)
    if (unsigned(w0 + (stride > 0 ? s : s * p.dilation_w)) >= unsigned(p.in_W))
#pragma unroll
      for (int r = 0; r < R; ++r) acc[r][s] = 0;

#pragma unroll
  for (int tap = 0; tap < taps; ++tap) {
    Acc v = acc[tap / S][tap % S];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
    if (lane == 0) sums[warp][tap] = v;
  }
  __syncthreads();
  auto store = [&](int r, int s, Acc sum) {
    store_sum<T>(p.out, p.partial, p.splits, k * p.w_k + r * p.w_r + s * p.w_s,
                 (int64_t(split) * p.channels + k) * (p.R * p.S) + r * p.S + s, sum);
  };
  bool nan = false;
  int const tap = int(threadIdx.x), r = r0 + tap / S, s = s0 + tap % S;
  if (tap < taps && r < p.R && s < p.S) {
    Acc sum = sums[0][tap];
    for (int other = 1; other < warps; ++other) sum += sums[other][tap];
    nan = sum != sum;
    store(r, s, sum);
  }
  // Zeros beside the images may have made a NaN of what is not finite.
  if (__syncthreads_or(nan) == 0) return;
  for (int i = warp; i < taps; i += warps) {
    if (r0 + i / S >= p.R || s0 + i % S >= p.S) continue;
    Acc sum = exact_few_sum(p, x, y, begin, end, first_column, r0 + i / S, s0 + i % S);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) store(r0 + i / S, s0 + i % S, sum);
  }
}

// ---- host side

template <Op op, DType dtype>
cudaError_t launch_few(Problem const& problem, FewTile const& t, Plan const& plan, Arguments const& args,
                       cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad, sums = op == Op::wgrad, wide = dtype == DType::f64;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  FewParams p{};
  p.in = args.a, p.other = args.b, p.bias = args.bias, p.out = args.out, p.partial = args.workspace;
  p.in_n = in.n, p.in_c = in.c, p.in_h = int(in.h), p.out_n = out.n, p.out_c = out.c, p.out_h = int(out.h);
  p.in_row = in.h * int(sizeof(T)), p.out_row = out.h * int(sizeof(T));
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w, p.bias_stride = args.bias_stride;
  p.in_H = int(backward ? problem.P() : problem.H), p.in_W = int(backward ? problem.Q() : problem.W);
  p.out_H = int(backward ? problem.H : problem.P()), p.out_W = int(backward ? problem.W : problem.Q());
  p.R = int(problem.R), p.S = int(problem.S), p.stride_h = int(problem.stride_h), p.stride_w = int(problem.stride_w);
  p.dilation_h = p.R == 1 ? 1 : int(problem.dilation_h), p.dilation_w = p.S == 1 ? 1 : int(problem.dilation_w);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.tap_r = p.w_r, p.tap_s = p.w_s;
  if (backward && !t.spread) {
    p.filter = (p.R - 1) * p.w_r + (p.S - 1) * p.w_s, p.tap_r = -p.w_r, p.tap_s = -p.w_s;
    p.pad_h = (p.R - 1) * p.dilation_h - p.pad_h, p.pad_w = (p.S - 1) * p.dilation_w - p.pad_w;
  }
  p.channels = uint32_t(backward ? problem.C : problem.K), p.planes = uint32_t(problem.N) * p.channels;
  p.multiplier = backward ? 1 : uint32_t(problem.K_per_group());
  p.filters = backward ? int(problem.K_per_group()) : 1;
  p.by_row = Divisor(uint32_t(p.out_W)), p.by_groups = Divisor(uint32_t(t.groups));
  p.by_stride_h = Divisor(uint32_t(p.stride_h)), p.by_stride_w = Divisor(uint32_t(p.stride_w));
  p.tiles = int(t.tiles), p.block_planes = t.planes, p.plane_items = int(t.groups * p.out_W);
  p.by_plane = Divisor(uint32_t(p.plane_items));
  p.tap_rows = int(t.tap_rows), p.tap_columns = int(t.tap_columns), p.splits = plan.split_k;
  p.columns = t.columns, p.strips = t.strips, p.block_rows = t.threads / t.columns, p.items = uint32_t(t.items);
  int64_t const last_channel = (backward ? problem.K : problem.C) - 1;
  p.last = (problem.N - 1) * in.n + last_channel * in.c + int64_t(p.in_H - 1) * in.h + p.in_W - 1;

  if constexpr (sums) {
    auto start = [&]<int R, int S, int stride>() {
      wgrad_few<T, R, S, stride><<<unsigned(t.blocks * p.splits), unsigned(t.threads), 0, stream>>>(p);
      return cudaGetLastError();
    };
    auto run = [&] {
      if (t.taps == 1) return start.template operator()<1, 1, 0>();
      if (t.taps == 2) return start.template operator()<2, 2, 0>();
      if (t.tall) return start.template operator()<8, 1, 0>();
      if (t.taps == 0) return start.template operator()<1, 8, 0>();
      if (t.taps == 3 && t.stride == 0) return start.template operator()<3, 3, 0>();
      if (t.taps == 3 && t.stride == 2) return start.template operator()<3, 3, 2>();
      if (t.taps == 5 && t.stride == 2) return start.template operator()<5, 5, 2>();
      if (t.taps == 3 && t.stride == 1) return start.template operator()<3, 3, 1>();
      if (t.taps == 5 && t.stride == 1) return start.template operator()<5, 5, 1>();
      return cudaErrorInvalidValue;
    };
    if (cudaError_t const error = run(); error != cudaSuccess || p.splits == 1) return error;
    return launch_second_pass<T>(problem, plan, args, stream);
  } else {
    unsigned const grid = unsigned(ceil_div(int64_t(p.planes), t.planes) * t.tiles);
    auto start = [&]<int R, int stride>() {
      gather_few<T, R, stride><<<grid, kFewThreads, 0, stream>>>(p);
      return cudaGetLastError();
    };
    if constexpr (backward)
      if (t.spread) {
        spread_few<T><<<grid, kFewThreads, 0, stream>>>(p);
        return cudaGetLastError();
      }
    if (t.taps == 0) return start.template operator()<0, 0>();
    if (t.taps == 1) return start.template operator()<1, 0>();
    if (t.taps == 2) return start.template operator()<2, 0>();
    if (t.taps == 3 && t.stride == 0) return start.template operator()<3, 0>();
    if (t.taps == 3 && t.stride == 1) return start.template operator()<3, 1>();
    if constexpr (!backward) {
      if (t.taps == 3 && t.stride == 2) return start.template operator()<3, 2>();
      if (t.taps == 5 && t.stride == 2) return start.template operator()<5, 2>();
    }
    if constexpr (wide)
      if (t.taps == 5 && t.stride == 1) return start.template operator()<5, 1>();
    return cudaErrorInvalidValue;
  }
}

}  // namespace conv2d_ext::depthwise
