// Depthwise 3x3 with stride 1 in channels_last, 16-bit types, of channels that are no vectors, such as odd ones. A row
// of an image is one run of memory, and a word of it, four elements, is of channels that go on from one pixel to the
// next. A thread has one word's place in a row and walks down some rows. The pixels on either side begin C elements
// away, which is inside of a word: their four elements are cut from two words by a shift that is the same everywhere.
// So all of memory is read and written in words, though a pixel has none. dgrad is fprop with the filter turned round.
#pragma once

#include "../core/flat.h"
#include "depthwise.cuh"
#include "depthwise_walk.cuh"

namespace conv2d_ext::depthwise {

// The pixels before and behind a thread's (0, 1): how far from it, in elements, the first of the two words is that hold
// them, and where in these they begin, in bits.
struct FlatSides {
  int apart[2], bits[2];
};

// A thread's word of a row of `row` elements, as elements from the row's first. Beside it: which elements are in the
// row, and which words.
template <class T>
struct FlatPlace {
  static constexpr int V = kFlatBytes / int(sizeof(T));
  int own;
  int edge = 0;  // bits: words that are not in the row, low and high of either side
  uint2 mask[2];

  __device__ FlatPlace(FlatSides const& sides, int word, int C, int row) : own(word * V) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      int const begin = own + (side == 0 ? -C : C), first = own + sides.apart[side];
      edge |= (int(unsigned(first) >= unsigned(row)) | int(unsigned(first + V) >= unsigned(row)) << 1) << 2 * side;
      uint32_t part[2] = {};
#pragma unroll
      for (int e = 0; e < V; ++e)
        if (unsigned(begin + e) < unsigned(row)) part[e / 2] |= 0xffffu << (e % 2 * 16);
      mask[side] = make_uint2(part[0], part[1]);
    }
  }
};

// A row's words of a thread, and the elements of three pixels that they hold.
template <class T>
struct FlatRow {
  static constexpr int V = FlatPlace<T>::V;
  uint2 own, low[2], high[2];

  __device__ void clear() { own = low[0] = low[1] = high[0] = high[1] = make_uint2(0, 0); }
  __device__ void load(T const* from, FlatSides const& sides, FlatPlace<T> const& at) {
    uint2 const* const before = reinterpret_cast<uint2 const*>(from + sides.apart[0]);
    uint2 const* const behind = reinterpret_cast<uint2 const*>(from + sides.apart[1]);
    own = __ldg(reinterpret_cast<uint2 const*>(from));
    if (at.edge == 0) {
      low[0] = __ldg(before), high[0] = __ldg(before + 1), low[1] = __ldg(behind), high[1] = __ldg(behind + 1);
    } else {
      low[0] = high[0] = low[1] = high[1] = make_uint2(0, 0);
      if (!(at.edge & 1)) low[0] = __ldg(before);
      if (!(at.edge & 2)) high[0] = __ldg(before + 1);
      if (!(at.edge & 4)) low[1] = __ldg(behind);
      if (!(at.edge & 8)) high[1] = __ldg(behind + 1);
    }
  }
  __device__ void pixel(int j, FlatSides const& sides, FlatPlace<T> const& at, Packed<T, V>& to) const {
    if (j == 1) {
      to.word = own;
      return;
    }
    int const side = j / 2, bits = sides.bits[side];
    bool const far = bits >= 32;
    uint2 const a = low[side], b = high[side];
    uint32_t const w0 = far ? a.y : a.x, w1 = far ? b.x : a.y, w2 = far ? b.y : b.x;
    to.word = make_uint2(__funnelshift_r(w0, w1, bits & 31) & at.mask[side].x,
                         __funnelshift_r(w1, w2, bits & 31) & at.mask[side].y);
  }
};

struct FlatParams {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t in_n, in_h, out_n, out_h;
  int64_t w_k, w_r, w_s, bias_stride;
  int C, H, row;  // row: elements
  int words, chunks, rows;
  FlatSides sides;
  uint32_t threads;
};

template <class T>
__global__ void __launch_bounds__(kFlatThreads, 5) flat(__grid_constant__ FlatParams const p) {
  constexpr int V = FlatPlace<T>::V, R = 3;
  using Rows = WalkRows<Op::fprop, R, 1>;
  uint32_t const thread = blockIdx.x * kFlatThreads + threadIdx.x;
  if (thread >= p.threads) return;
  uint32_t rest = thread / p.words;
  FlatPlace<T> const at(p.sides, int(thread - rest * p.words), p.C, p.row);
  int64_t const n = rest / p.chunks;
  int const h0 = int(rest - uint32_t(n) * p.chunks) * p.rows, rows = min(p.H - h0, p.rows);
  float filter[R][R][V], bias[V];
#pragma unroll
  for (int e = 0; e < V; ++e) {
    int const c = (at.own + e) % p.C;
    T const* const w = static_cast<T const*>(p.w) + c * p.w_k;
#pragma unroll
    for (int tap = 0; tap < R * R; ++tap) filter[tap / R][tap % R][e] = widen(w[tap / R * p.w_r + tap % R * p.w_s]);
    bias[e] = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
  }
  int const count = rows + R - 1;
  T const* from = static_cast<T const*>(p.in) + n * p.in_n + (h0 - 1) * p.in_h + at.own;
  T* to = static_cast<T*>(p.out) + n * p.out_n + (h0 - (R - 1)) * p.out_h + at.own;
  auto inside = [&](int row) { return row < count && unsigned(h0 - 1 + row) < unsigned(p.H); };
  // Words come to L2 before they are loaded: registers hold one row ahead.
  constexpr int ahead = 2;
  auto ask = [&](int row, T const* at_row) {
    if (inside(row)) ptx::prefetch_l2(at_row);
  };
  FlatRow<T> next;
  auto load = [&](int row) {
    ask(row + ahead, from + ahead * p.in_h);
    if (inside(row))
      next.load(from, p.sides, at);
    else
      next.clear();
    from += p.in_h;
  };
  float acc[Rows::slots][1][V];
  ask(1, from + p.in_h);
  load(0);
#pragma unroll 1
  for (int row = 0; row < count; ++row) {
    Packed<T, V> now[R];
#pragma unroll
    for (int j = 0; j < R; ++j) next.pixel(j, p.sides, at, now[j]);
    load(row + 1);
    Rows::template add<0>([&](int j, float (&in)[V]) { now[j].widen_to(in); }, filter, bias, acc);
    if (row >= R - 1) Packed<T, V>::store(to, acc[0][0]);
    to += p.out_h;
  }
}

struct FlatSumsParams {
  void const* x;
  void const* y;
  void* w;
  void* partial;  // [part][k][tap]
  int64_t x_n, x_h, y_n, y_h;
  int64_t w_k, w_r, w_s;
  int C, H, row;  // row: elements
  int words, slices, chunks, rows, units, each, parts;
  FlatSides sides;
};

// A sum from global memory, over the block's rows and places: for those that a zero made NaN.
template <class T>
__device__ __noinline__ float flat_sum_again(FlatSumsParams const& p, int begin, int end, int first, int past, int c,
                                             int r, int s) {
  float sum = 0.f;
  for (int index = begin; index < end; ++index) {
    int const n = index / p.chunks, h0 = (index - n * p.chunks) * p.rows;
    T const* const x = static_cast<T const*>(p.x) + n * p.x_n + (s - 1) * p.C;
    T const* const y = static_cast<T const*>(p.y) + n * p.y_n;
    for (int row = h0; row < min(h0 + p.rows, p.H); ++row) {
      int const h = row - 1 + r;
      if (unsigned(h) >= unsigned(p.H)) continue;
      for (int i = c + max(0, first - c + p.C - 1) / p.C * p.C; i < past; i += p.C)
        if (unsigned(i + (s - 1) * p.C) < unsigned(p.row)) {
          sum = fmaf(widen(x[h * p.x_h + i]), widen(y[row * p.y_h + i]), sum);
          if (sum != sum) return sum;  // a NaN stays one
        }
    }
  }
  return sum;
}

// wgrad: a thread keeps the sums of all taps of its elements; a block adds up those that are of one channel.
template <class T>
__global__ void __launch_bounds__(kFlatSumsThreads, 2) flat_wgrad(__grid_constant__ FlatSumsParams const p) {
  constexpr int V = FlatPlace<T>::V, R = 3, taps = R * R, threads = kFlatSumsThreads, places = threads * V;
  using Taps = WalkTaps<R, 1>;
  __shared__ __align__(16) float sums[taps][places];
  int const share = int(blockIdx.x) / p.slices, slice = int(blockIdx.x) - share * p.slices;
  int const word = slice * threads + int(threadIdx.x);
  int const begin = share * p.each, end = min(p.units, begin + p.each);
  float acc[R][R][V] = {};
  if (word < p.words) {
    FlatPlace<T> const at(p.sides, word, p.C, p.row);
    for (int index = begin; index < end; ++index) {
      int64_t const n = index / p.chunks;
      int const h0 = (index - int(n) * p.chunks) * p.rows, rows = min(p.H - h0, p.rows), count = rows + R - 1;
      T const* x = static_cast<T const*>(p.x) + n * p.x_n + (h0 - 1) * p.x_h + at.own;
      T const* y = static_cast<T const*>(p.y) + n * p.y_n + h0 * p.y_h + at.own;
      auto inside = [&](int row) { return row < count && unsigned(h0 - 1 + row) < unsigned(p.H); };
      constexpr int ahead = 2;
      auto ask = [&](int row, T const* at_x, T const* at_y) {
        if (inside(row)) ptx::prefetch_l2(at_x);
        if (row < rows) ptx::prefetch_l2(at_y);
      };
      FlatRow<T> next;
      Packed<T, V> next_y;
      auto load = [&](int row) {
        ask(row + ahead, x + ahead * p.x_h, y + ahead * p.y_h);
        if (inside(row))
          next.load(x, p.sides, at);
        else
          next.clear();
        next_y.clear();
        if (row < rows) next_y.word = __ldg(reinterpret_cast<uint2 const*>(y));
        x += p.x_h, y += p.y_h;
      };
      float gradient[Taps::slots][1][V] = {};
      auto step = [&]<int u>(std::integral_constant<int, u>, int row) {
        Packed<T, V> now[R];
#pragma unroll
        for (int j = 0; j < R; ++j) next.pixel(j, p.sides, at, now[j]);
        next_y.widen_to(gradient[Taps::slot(u, 0)][0]);
        load(row + 1);
        Taps::template add<u>([&](int j, float (&in)[V]) { now[j].widen_to(in); }, gradient, acc);
      };
      ask(1, x + p.x_h, y + p.y_h);
      load(0);
#pragma unroll 1
      for (int row = 0; row < count; row += Taps::period)
        [&]<int... u>(std::integer_sequence<int, u...>) {
          ((row + u < count ? step(std::integral_constant<int, u>(), row + u) : void()), ...);
        }(std::make_integer_sequence<int, Taps::period>());
    }
  }
#pragma unroll
  for (int i = 0; i < taps; ++i)
#pragma unroll
    for (int e = 0; e < V; ++e) sums[i][int(threadIdx.x) * V + e] = acc[i / R][i % R][e];
  __syncthreads();
  int const first = slice * places, ahead = first % p.C;
  for (int i = threadIdx.x; i < p.C * taps; i += threads) {
    int const tap = i / p.C, c = i - tap * p.C, place = c >= ahead ? c - ahead : c - ahead + p.C;
    float sum = 0.f;
#pragma unroll 4
    for (int q = place; q < places; q += p.C) sum += sums[tap][q];
    if (sum != sum) sum = flat_sum_again<T>(p, begin, end, first, min(first + places, p.row), c, tap / R, tap % R);
    store_sum<T>(p.w, p.partial, p.parts, c * p.w_k + tap / R * p.w_r + tap % R * p.w_s,
                 (int64_t(blockIdx.x) * p.C + c) * taps + tap, sum);
  }
}

// ---- host side

template <class T>
FlatSides flat_sides(int C) {
  constexpr int V = FlatPlace<T>::V, bits = 8 * int(sizeof(T));
  int const past = C % V;
  return {{-C - (V - past) % V, C - past}, {(V - past) % V * bits, past * bits}};
}

template <Op op, class T>
cudaError_t launch_flat(Problem const& problem, FlatTile const& t, Arguments const& args, cudaStream_t stream) {
  constexpr bool backward = op == Op::dgrad;
  if (!t.used) return cudaErrorInvalidValue;
  Strides const &in = backward ? problem.y : problem.x, &out = backward ? problem.x : problem.y;
  FlatParams p{};
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride, p.out = args.out;
  p.in_n = in.n, p.in_h = in.h, p.out_n = out.n, p.out_h = out.h;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  if (backward) {
    p.w = static_cast<T const*>(args.b) + 2 * (p.w_r + p.w_s);
    p.w_r = -p.w_r, p.w_s = -p.w_s;
  }
  p.C = int(problem.C), p.H = int(problem.H), p.row = int(problem.W * problem.C);
  p.words = int(t.words), p.chunks = int(t.chunks), p.rows = int(t.rows), p.threads = uint32_t(t.threads);
  p.sides = flat_sides<T>(p.C);
  flat<T><<<unsigned(ceil_div(t.threads, kFlatThreads)), kFlatThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_flat_sums(Problem const& problem, Plan const& plan, FlatTile const& t, Arguments const& args,
                             cudaStream_t stream) {
  if (!t.used || t.parts != plan.split_k) return cudaErrorInvalidValue;
  FlatSumsParams p{};
  p.x = args.a, p.y = args.b, p.w = args.out, p.partial = args.workspace;
  p.x_n = problem.x.n, p.x_h = problem.x.h, p.y_n = problem.y.n, p.y_h = problem.y.h;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.C = int(problem.C), p.H = int(problem.H), p.row = int(problem.W * problem.C);
  p.words = int(t.words), p.slices = int(t.slices), p.chunks = int(t.chunks), p.rows = int(t.rows);
  p.units = int(t.units), p.each = int(t.each), p.parts = int(t.parts);
  p.sides = flat_sides<T>(p.C);
  flat_wgrad<T><<<unsigned(t.parts), kFlatSumsThreads, 0, stream>>>(p);
  if (cudaError_t const error = cudaGetLastError(); error != cudaSuccess || p.parts == 1) return error;
  return launch_sum<T>(problem, plan, args, stream);
}

}  // namespace conv2d_ext::depthwise
