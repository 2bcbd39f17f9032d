// Depthwise convolution in channels_last without shared memory: square filters of compiled size, stride 1 or 2. A
// thread has V channels of `width` neighbouring columns, walks down some rows of them with its inputs straight from L1,
// and adds its products to the sums of all output rows that meet an input row. Nothing is set up and nobody waits,
// which small layers need; and channels need no vectors of 16 bytes. dgrad with stride 1 is fprop with the filter
// turned round. fprop and wgrad take K = m * C.
#pragma once

#include <utility>

#include "../core/walk.h"
#include "depthwise.cuh"
#include "ptx.cuh"

namespace conv2d_ext::depthwise {

struct WalkParams {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t in_n, in_h, in_w, out_n, out_h, out_w;
  int64_t w_k, w_r, w_s, bias_stride;
  int in_H, in_W, out_H, out_W;
  int pad_h, start_w, origin;  // rows before the first output's; first input and output column of strip 0
  int quads, strips, chunks, rows, multiplier;
  int staged;  // filters in shared memory
  uint32_t threads;
};

// V elements as one access; merged with zeros element by element, 16-bit types take twice the moves.
template <class T, int V>
struct Packed {
  static constexpr int bytes = int(sizeof(T)) * V;
  using Word = std::conditional_t<bytes == 2, uint16_t, std::conditional_t<bytes == 4, uint32_t, uint2>>;
  static_assert(sizeof(Word) == bytes);
  Word word;

  __device__ void clear() { word = Word{}; }
  __device__ void widen_to(float (&v)[V]) const {
    Vector<T, V> const h = *reinterpret_cast<Vector<T, V> const*>(&word);
#pragma unroll
    for (int e = 0; e < V; ++e) v[e] = widen(h.v[e]);
  }
  __device__ static void store(T* to, float const (&v)[V]) {
    Vector<T, V> h;
#pragma unroll
    for (int e = 0; e < V; ++e) h.v[e] = narrow<T>(v[e]);
    *reinterpret_cast<Word*>(to) = *reinterpret_cast<Word const*>(&h);
  }
};

// Sums of the output rows that an input row meets, of some neighbouring columns.
template <Op op, int R, int stride>
struct WalkRows {
  static constexpr bool backward = op == Op::dgrad;
  // Of output rows that further input rows meet. dgrad: `stride` of them are complete after every input row, else one
  // after every `stride` of them.
  static constexpr int slots = backward ? R : (R + stride - 1) / stride, done = backward ? stride : 1;

  // Row u of every `stride` rows; dgrad: 0. load(j, in) reads column j of it. The first product of each sum moves it on
  // by `done` rows, where that is due.
  template <int u, int V, int width, class Load>
  __device__ static void add(Load const& load, float const (&filter)[R][R][V], float const (&bias)[V],
                             float (&acc)[slots][width][V]) {
    constexpr ColumnAxis axis{backward, R, stride};
    constexpr auto tap = [](int k) { return backward ? k : u + (slots - 1 - k) * stride; };
#pragma unroll
    for (int j = 0; j < axis.extent(width); ++j) {
      float in[V];
      load(j, in);
#pragma unroll
      for (int k = 0; k < slots; ++k) {
        if (tap(k) >= R) continue;
#pragma unroll
        for (int b = 0; b < width; ++b)
#pragma unroll
          for (int s = 0; s < R; ++s) {
            if (axis.index(b, s) != j) continue;
#pragma unroll
            for (int e = 0; e < V; ++e) {
              float const before = u != 0 || !axis.first(s) ? acc[k][b][e]
                                   : k + done < slots       ? acc[k + done][b][e]
                                                            : bias[e];
              acc[k][b][e] = fmaf(in[e], filter[tap(k)][s][e], before);
            }
          }
      }
    }
  }
};

// wgrad: sums of all taps. Row u of a cycle of input rows meets slot(u, r) of the rows of y with tap r.
template <int R, int stride>
struct WalkTaps {
  static constexpr int slots = (R + stride - 1) / stride, period = slots * stride;
  static constexpr int slot(int u, int r) {
    return (u + period - r) % stride != 0 ? -1 : (u + period - r) / stride % slots;
  }

  template <int u, int V, int width, class Load>
  __device__ static void add(Load const& load, float const (&y)[slots][width][V], float (&acc)[R][R][V]) {
    constexpr ColumnAxis axis{false, R, stride};
#pragma unroll
    for (int j = 0; j < axis.extent(width); ++j) {
      float in[V];
      load(j, in);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (slot(u, r) < 0) continue;
#pragma unroll
        for (int b = 0; b < width; ++b)
#pragma unroll
          for (int s = 0; s < R; ++s) {
            if (axis.index(b, s) != j) continue;
#pragma unroll
            for (int e = 0; e < V; ++e) acc[r][s][e] = fmaf(in[e], y[slot(u, r)][b][e], acc[r][s][e]);
          }
      }
    }
  }
};

template <class T, Op op, int R, int stride, int V, int width>
__global__ void __launch_bounds__(walk_threads(R, stride), walk_threads(R, stride) < kWalkThreads ? 3 : 2)
    walk(__grid_constant__ WalkParams const p) {
  using Rows = WalkRows<op, R, stride>;
  constexpr bool backward = op == Op::dgrad;
  constexpr ColumnAxis axis{backward, R, stride};
  constexpr int IW = axis.extent(width), slots = Rows::slots, done = Rows::done, threads = walk_threads(R, stride);
  uint32_t const thread = blockIdx.x * threads + threadIdx.x;
  // Larger filters come through shared memory: in global memory, each tap of a warp's channels is in a line of its own.
  extern __shared__ __align__(16) unsigned char shared[];
  T* const filters = reinterpret_cast<T*>(shared);
  if constexpr (R > 3) {
    int const first = int(blockIdx.x * threads % p.quads);
#pragma unroll 7
    for (int i = threadIdx.x; i < p.staged * (R * R); i += threads) {
      int const k = first + i / (R * R), tap = i % (R * R);
      filters[i] =
          static_cast<T const*>(p.w)[(k < p.quads ? k : k - p.quads) * p.w_k + tap / R * p.w_r + tap % R * p.w_s];
    }
    __syncthreads();
  }
  if (thread >= p.threads) return;
  uint32_t rest = thread / p.quads;
  int const c = int(thread - rest * p.quads) * V;
  uint32_t const strip = rest;
  rest /= p.strips;
  int const column = int(strip - rest * p.strips) * width;
  int64_t const n = rest / p.chunks;
  int const h0 = int(rest - uint32_t(n) * p.chunks) * p.rows, rows = p.out_H - h0 < p.rows ? p.out_H - h0 : p.rows;

  float filter[R][R][V], bias[V];
#pragma unroll
  for (int e = 0; e < V; ++e) {
    T const* const w = static_cast<T const*>(p.w) + (c + e) * p.w_k;
#pragma unroll
    for (int tap = 0; tap < R * R; ++tap)
      filter[tap / R][tap % R][e] =
          widen(R == 3 ? w[tap / R * p.w_r + tap % R * p.w_s] : filters[int(threadIdx.x) % p.staged * (R * R) + tap]);
    bias[e] = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[(c + e) * p.bias_stride]) : 0.f;
  }

  int first, count;  // input rows
  if constexpr (backward) {
    int const past = h0 + p.pad_h + rows - 1, lowest = h0 + p.pad_h - R + stride;
    first = lowest >> 1, count = past / stride - first + 1;
  } else {
    first = h0 * stride - p.pad_h, count = (rows - 1) * stride + R;
  }
  int const w0 = p.start_w + axis.advance(column), q0 = p.origin + column;
  T const* from =
      static_cast<T const*>(p.in) + n * p.in_n + first * p.in_h + w0 * p.in_w + (V == 1 ? c / p.multiplier : c);
  int out_row = backward ? first * stride - p.pad_h - h0 : -(slots - 1);
  T* to = static_cast<T*>(p.out) + n * p.out_n + int64_t(h0 + out_row) * p.out_h + q0 * p.out_w + c;
  uint32_t const step_in = uint32_t(p.in_w) * sizeof(T), step_out = uint32_t(p.out_w) * sizeof(T);
  bool const whole = w0 >= 0 && w0 + IW <= p.in_W, whole_out = q0 >= 0 && q0 + width <= p.out_W;

  // A row's lines come to L2 before they are loaded: registers hold one row ahead.
  auto ask = [&](int row, T const* at) {
    if (row >= count || unsigned(first + row) >= unsigned(p.in_H)) return;
#pragma unroll
    for (int j = 0; j < IW; ++j)
      if (unsigned(w0 + j) < unsigned(p.in_W)) ptx::prefetch_l2(reinterpret_cast<char const*>(at) + j * step_in);
  };
  constexpr int ahead = walk_ahead(R);
  Packed<T, V> next[IW];
  auto load = [&](int row) {  // of the input, counted from the first
    if constexpr (ahead > 0) ask(row + ahead, from + ahead * p.in_h);
    auto at = [&](int j) {
      return *reinterpret_cast<typename Packed<T, V>::Word const*>(reinterpret_cast<char const*>(from) + j * step_in);
    };
    if (row < count && unsigned(first + row) < unsigned(p.in_H)) {
      if (whole) {
#pragma unroll
        for (int j = 0; j < IW; ++j) next[j].word = at(j);
      } else {
#pragma unroll
        for (int j = 0; j < IW; ++j) {
          next[j].clear();
          if (unsigned(w0 + j) < unsigned(p.in_W)) next[j].word = at(j);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < IW; ++j) next[j].clear();
    }
    from += p.in_h;
  };
  float acc[slots][width][V];
  auto store = [&](float const(&sums)[width][V]) {
    if (unsigned(out_row) < unsigned(rows)) {
#pragma unroll
      for (int b = 0; b < width; ++b)
        if (whole_out || unsigned(q0 + b) < unsigned(p.out_W))
          Packed<T, V>::store(reinterpret_cast<T*>(reinterpret_cast<char*>(to) + b * int64_t(step_out)), sums[b]);
    }
    ++out_row, to += p.out_h;
  };
  auto step = [&]<int u>(std::integral_constant<int, u>, int row) {
    Packed<T, V> now[IW];
#pragma unroll
    for (int j = 0; j < IW; ++j) now[j] = next[j];
    load(row + 1);
    Rows::template add<u>([&](int j, float (&in)[V]) { now[j].widen_to(in); }, filter, bias, acc);
    if constexpr (u == (backward ? 0 : (R - 1) % stride)) {
#pragma unroll
      for (int k = 0; k < done; ++k) store(acc[k]);
    }
  };
  if constexpr (ahead > 0) ask(1, from + p.in_h);
  load(0);
#pragma unroll 1
  for (int row = 0; row < count; row += backward ? 1 : stride) {
    step(std::integral_constant<int, 0>(), row);
    if constexpr (!backward && stride == 2)
      if (row + 1 < count) step(std::integral_constant<int, 1>(), row + 1);
  }
}

struct WalkSumsParams {
  void const* x;
  void const* y;
  void* w;
  void* partial;  // [share][k][tap]
  int64_t x_n, x_h, x_w, y_n, y_h, y_w;
  int64_t w_k, w_r, w_s;
  int K, H, W, P, Q, pad_h, pad_w, multiplier;
  int lanes, members, slices, strips, rows, chunks, units, each, shares;
};

// What a thread walks down at a time: a strip's columns q0 on of rows [h0, h0 + rows) of y of an image.
struct WalkUnit {
  int64_t n;
  int h0, rows, q0;
};

template <int width>
__device__ inline WalkUnit walk_unit(WalkSumsParams const& p, int index) {
  uint32_t rest = uint32_t(index);
  WalkUnit u;
  u.q0 = split_off(rest, p.strips) * width;
  u.h0 = split_off(rest, p.chunks) * p.rows;
  u.rows = p.P - u.h0 < p.rows ? p.P - u.h0 : p.rows;
  u.n = rest;
  return u;
}

// A sum from global memory, over the block's units: for those that a zero made NaN.
template <class T, int width>
__device__ __noinline__ float walk_sum_again(WalkSumsParams const& p, int begin, int end, int k, int stride, int r,
                                             int s) {
  float sum = 0.f;
  for (int index = begin; index < end; ++index) {
    WalkUnit const u = walk_unit<width>(p, index);
    T const* const x = static_cast<T const*>(p.x) + u.n * p.x_n + k / p.multiplier;
    T const* const y = static_cast<T const*>(p.y) + u.n * p.y_n + k;
    for (int row = u.h0; row < u.h0 + u.rows; ++row) {
      int const h = row * stride - p.pad_h + r;
      if (unsigned(h) >= unsigned(p.H)) continue;
      for (int q = u.q0; q < u.q0 + width && q < p.Q; ++q) {
        int const v = q * stride - p.pad_w + s;
        if (unsigned(v) < unsigned(p.W))
          sum = fmaf(widen(x[h * p.x_h + v * p.x_w]), widen(y[row * p.y_h + q * p.y_w]), sum);
      }
      if (sum != sum) return sum;  // NaN, whatever comes
    }
  }
  return sum;
}

// wgrad: a thread keeps the sums of all taps of its channels, and the rows of y that an input row meets.
template <class T, int R, int stride, int V, int width>
__global__ void __launch_bounds__(walk_sums_threads(R), walk_sums_blocks(R, V))
    walk_wgrad(__grid_constant__ WalkSumsParams const p) {
  constexpr int threads = walk_sums_threads(R);
  using Taps = WalkTaps<R, stride>;
  constexpr ColumnAxis axis{false, R, stride};
  constexpr int IW = axis.extent(width), slots = Taps::slots, period = Taps::period;
  __shared__ float sums[R * V][threads];  // of a row of the filter
  int const slice = int(blockIdx.x) % p.slices, share = int(blockIdx.x) / p.slices;
  int const member = int(threadIdx.x) / p.lanes, lane = int(threadIdx.x) - member * p.lanes;
  int const k = (slice * p.lanes + lane) * V;
  int const begin = share * p.each, end = p.units - begin < p.each ? p.units : begin + p.each;
  uint32_t const step_x = uint32_t(p.x_w) * sizeof(T), step_y = uint32_t(p.y_w) * sizeof(T);
  using Word = typename Packed<T, V>::Word;

  float acc[R][R][V] = {};
  if (member < p.members && k < p.K)
    for (int index = begin + member; index < end; index += p.members) {
      WalkUnit const unit = walk_unit<width>(p, index);
      int const first = unit.h0 * stride - p.pad_h, count = (unit.rows - 1) * stride + R;
      int const w0 = unit.q0 * stride - p.pad_w;
      T const* x =
          static_cast<T const*>(p.x) + unit.n * p.x_n + first * p.x_h + w0 * p.x_w + (V == 1 ? k / p.multiplier : k);
      T const* y = static_cast<T const*>(p.y) + unit.n * p.y_n + unit.h0 * p.y_h + unit.q0 * p.y_w + k;
      // Bits: columns inside the images.
      uint32_t columns_x = 0, columns_y = 0;
#pragma unroll
      for (int j = 0; j < IW; ++j) columns_x |= uint32_t(unsigned(w0 + j) < unsigned(p.W)) << j;
#pragma unroll
      for (int b = 0; b < width; ++b) columns_y |= uint32_t(unit.q0 + b < p.Q) << b;
      Packed<T, V> next[IW], next_y[width];  // of the next row
      auto load = [](Packed<T, V>& to, uint32_t columns, T const* from, int j, uint32_t step) {
        to.clear();
        if (columns >> j & 1) to.word = *reinterpret_cast<Word const*>(reinterpret_cast<char const*>(from) + j * step);
      };
      auto load_y = [&](int row) {
        uint32_t const columns = row < unit.rows ? columns_y : 0;
#pragma unroll
        for (int b = 0; b < width; ++b) load(next_y[b], columns, y, b, step_y);
        y += p.y_h;
      };
      auto has_x = [&](int row) { return row < count && unsigned(first + row) < unsigned(p.H); };
      auto load_x = [&](uint32_t columns, int j) { load(next[j], columns, x, j, step_x); };
      float gradient[slots][width][V] = {};
      auto step = [&]<int u>(std::integral_constant<int, u>, int row) {
        if constexpr (u % stride == 0) {
#pragma unroll
          for (int b = 0; b < width; ++b) next_y[b].widen_to(gradient[Taps::slot(u, 0)][b]);
          load_y(row / stride + 1);
        }
        uint32_t const more = has_x(row + 1) ? columns_x : 0;
        if (!has_x(row)) {
#pragma unroll
          for (int j = 0; j < IW; ++j) load_x(more, j);
        } else {
          auto const read = [&](int j, float (&in)[V]) {
            next[j].widen_to(in);
            load_x(more, j);
          };
          Taps::template add<u>(read, gradient, acc);
        }
        x += p.x_h;
      };
      load_y(0);
#pragma unroll
      for (int j = 0; j < IW; ++j) load_x(has_x(0) ? columns_x : 0, j);
      x += p.x_h;
#pragma unroll 1
      for (int row = 0; row < count; row += period)
        [&]<int... u>(std::integer_sequence<int, u...>) {
          ((row + u < count ? step(std::integral_constant<int, u>(), row + u) : void()), ...);
        }(std::make_integer_sequence<int, period>());
    }

  // Sums of the threads that share channels, in their order.
#pragma unroll
  for (int r = 0; r < R; ++r) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < R * V; ++i) sums[i][threadIdx.x] = acc[r][i / V][i % V];
    __syncthreads();
    for (int i = threadIdx.x; i < p.lanes * R * V; i += threads) {
      int const column = i / p.lanes, to = (slice * p.lanes + i % p.lanes) * V + column % V, s = column / V;
      if (to >= p.K) continue;
      float sum = 0.f;
      for (int other = 0; other < p.members; ++other) sum += sums[column][other * p.lanes + i % p.lanes];
      if (sum != sum) sum = walk_sum_again<T, width>(p, begin, end, to, stride, r, s);
      store_sum<T>(p.w, p.partial, p.shares, to * p.w_k + r * p.w_r + s * p.w_s,
                   (int64_t(share) * p.K + to) * (R * R) + r * R + s, sum);
    }
  }
}

// ---- host side

template <Op op, class T, int R, int stride>
cudaError_t launch_walk(Problem const& problem, WalkTile const& t, Arguments const& args, cudaStream_t stream) {
  constexpr bool backward = op == Op::dgrad, turned = backward && stride == 1;
  constexpr ColumnAxis axis{backward && !turned, R, stride};
  constexpr Op kind = turned ? Op::fprop : op;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  WalkParams p{};
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride, p.out = args.out;
  p.in_n = in.n, p.in_h = in.h, p.in_w = in.w, p.out_n = out.n, p.out_h = out.h, p.out_w = out.w;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.in_H = int(backward ? problem.P() : problem.H), p.in_W = int(backward ? problem.Q() : problem.W);
  p.out_H = int(backward ? problem.H : problem.P()), p.out_W = int(backward ? problem.W : problem.Q());
  p.pad_h = int(problem.pad_top);
  int64_t pad_w = problem.pad_left;
  if (turned) {
    p.w = static_cast<T const*>(args.b) + (R - 1) * (p.w_r + p.w_s);
    p.w_r = -p.w_r, p.w_s = -p.w_s, p.pad_h = R - 1 - p.pad_h, pad_w = R - 1 - pad_w;
  }
  p.start_w = int(axis.start(pad_w)), p.origin = int(axis.origin(pad_w));
  p.multiplier = int(problem.K_per_group());
  p.quads = int(problem.K / t.vector), p.strips = int(t.strips), p.chunks = int(t.chunks), p.rows = int(t.rows);
  p.threads = uint32_t(t.threads);
  constexpr int V = walk_vector(op, R, sizeof(T));
  void (*kernel)(WalkParams) = walk<T, kind, R, stride, V, walk_width(op, R, stride, V)>;
  if constexpr (V > 1)
    if (t.vector == 1) kernel = walk<T, kind, R, stride, 1, walk_width(op, R, stride, 1)>;
  constexpr int threads = walk_threads(R, stride);
  p.staged = R == 3 ? 0 : int(min64(p.quads, threads));
  size_t const shared = size_t(p.staged) * R * R * sizeof(T);
  if (shared > 48 * 1024)
    if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)))
      return error;
  kernel<<<unsigned(ceil_div(t.threads, threads)), threads, shared, stream>>>(p);
  return cudaGetLastError();
}

template <class T, int R, int stride>
cudaError_t launch_walk_wgrad(Problem const& problem, Plan const& plan, Device const& gpu, Arguments const& args,
                              cudaStream_t stream) {
  WalkSumsTile const t = walk_sums_tile(problem, R, stride, gpu);
  if (t.shares != plan.split_k) return cudaErrorInvalidValue;
  Strides const &x = problem.x, &y = problem.y;
  WalkSumsParams p{};
  p.x = args.a, p.y = args.b, p.w = args.out, p.partial = args.workspace;
  p.x_n = x.n, p.x_h = x.h, p.x_w = x.w, p.y_n = y.n, p.y_h = y.h, p.y_w = y.w;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.K = int(problem.K), p.H = int(problem.H), p.W = int(problem.W), p.P = int(problem.P()), p.Q = int(problem.Q());
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left), p.multiplier = int(problem.K_per_group());
  p.lanes = t.lanes, p.members = t.members, p.slices = int(t.slices), p.strips = int(t.strips);
  p.rows = int(t.rows), p.chunks = int(t.chunks);
  p.units = int(t.units), p.each = int(t.each), p.shares = int(t.shares);
  constexpr int V = walk_vector(Op::wgrad, R, sizeof(T)), width = walk_width(Op::wgrad, R, stride, V);
  void (*kernel)(WalkSumsParams) = walk_wgrad<T, R, stride, V, width>;
  if constexpr (V > 1)
    if (t.vector == 1) kernel = walk_wgrad<T, R, stride, 1, width>;
  kernel<<<unsigned(t.slices * t.shares), walk_sums_threads(R), 0, stream>>>(p);
  if (cudaError_t const error = cudaGetLastError(); error != cudaSuccess || p.shares == 1) return error;
  return launch_sum<T>(problem, plan, args, stream);
}

template <Op op, DType dtype, int R, int S, int stride>
cudaError_t launch_walks(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  static_assert(R == S);
  using T = typename TypeOf<dtype>::type;
  Device gpu = h200_sxm;
  if (auto const error = count_sms(gpu.sm_count)) return error;
  if constexpr (op == Op::wgrad)
    return launch_walk_wgrad<T, R, stride>(problem, plan, gpu, args, stream);
  else
    return launch_walk<op, T, R, stride>(problem, walk_tile(op, problem, R, stride, gpu), args, stream);
}

}  // namespace conv2d_ext::depthwise
