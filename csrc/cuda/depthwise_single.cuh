// Depthwise layers of a single tap without padding, both layouts: y = x * w + b, at the speed of memory. A thread has a
// vector of neighbouring channels (in NCHW of columns) of some pixels, all of which it asks for at once. wgrad: its
// block adds up the products of a share of the pixels, and a second pass the blocks' sums.
#pragma once

#include "../core/single.h"
#include "depthwise.cuh"

namespace conv2d_ext::depthwise {

struct SingleParams {
  void const* a;  // what is read: x, of dgrad y
  void const* b;  // wgrad: y
  void const* w;
  void const* bias;
  void* out;
  void* partial;
  int64_t a_n, a_c, a_h, a_w, b_n, b_c, b_h, b_w;  // b: of what is written, too
  int64_t w_k, bias_stride;
  int C, slices, lanes, groups;
  int64_t x_h, x_w;  // dgrad with a stride
  int H, W, stride_h, stride_w;
  bool w_vectors;
  uint32_t units, each;
  WideDivisor by_lanes, by_columns, by_rows, by_channels;
};

template <class T, int V>
__device__ inline Vector<T, V> load_vector(T const* from) {
  return *reinterpret_cast<Vector<T, V> const*>(from);
}

// The image, channel, row and vector of a row that a unit is.
struct SinglePlace {
  int n, c, row, column;

  template <bool planes>
  __device__ static SinglePlace of(SingleParams const& p, uint32_t unit) {
    uint32_t const line = p.by_columns.quotient(unit), plane = p.by_rows.quotient(line);
    uint32_t const n = planes ? p.by_channels.quotient(plane) : plane;
    return {int(n), int(plane - n * p.by_channels.value), int(line - plane * p.by_rows.value),
            int(unit - line * p.by_columns.value)};
  }
};

// A thread's channels of a block, and its first pixel.
struct SingleThread {
  int slice, lane, group;

  __device__ explicit SingleThread(SingleParams const& p)
      : slice(int(blockIdx.x) % p.slices), group(int(p.by_lanes.quotient(threadIdx.x))) {
    lane = int(threadIdx.x) - group * p.lanes;
  }
};

// fprop, dgrad. A unit's output, or what it is one of in x, has zeros beside it (spread: dgrad with a stride). step:
// columns of x for each of y, which a thread has as one vector.
template <class T, bool planes, bool spread, int V, int step>
__global__ void __launch_bounds__(256, 3) scale(__grid_constant__ SingleParams const p) {
  constexpr int U = kSingleTogether, reads = spread ? V : V * step, writes = spread ? V * step : V;
  SingleThread const me(p);
  int const channel = planes ? 0 : (me.slice * p.lanes + me.lane) * V;
  bool const exists = me.group < p.groups && channel < p.C;
  uint32_t const first = blockIdx.x / p.slices * p.each + me.group;
  Vector<T, reads> in[U];
  T w[U], b[U];
  Vector<T, planes ? 1 : V> weights;
  if constexpr (!planes) {
    T const* const from = static_cast<T const*>(p.w) + channel * p.w_k;
    if (exists && p.w_vectors) weights = load_vector<T, V>(from);
#pragma unroll
    for (int e = 0; e < V; ++e)
      if (exists && !p.w_vectors) weights.v[e] = from[e * p.w_k];
  }
  int64_t to[U];
  int rows[U], columns[U];  // of x, that the unit has
#pragma unroll
  for (int u = 0; u < U; ++u) {
    uint32_t const unit = first + u * p.groups;
    rows[u] = columns[u] = 0;
    if (!exists || unit >= p.units) continue;
    SinglePlace const at = SinglePlace::of<planes>(p, unit);
    int const c = planes ? at.c : channel;
    to[u] = at.n * p.b_n + (planes ? c * p.b_c : c) + at.row * p.b_h + at.column * p.b_w;
    rows[u] = spread ? min(p.stride_h, p.H - at.row * p.stride_h) : 1;
    columns[u] = spread ? min(p.stride_w, p.W - at.column * p.stride_w) : 1;
    in[u] = load_vector<T, reads>(static_cast<T const*>(p.a) + at.n * p.a_n + (planes ? c * p.a_c : c) +
                                  at.row * p.a_h + at.column * p.a_w);
    if constexpr (planes) {
      w[u] = static_cast<T const*>(p.w)[c * p.w_k];
      if (p.bias != nullptr) b[u] = static_cast<T const*>(p.bias)[c * p.bias_stride];
    }
  }
  float filter[V], bias[V] = {};
  if constexpr (!planes) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      filter[e] = widen(weights.v[e]);
      if (exists && p.bias != nullptr) bias[e] = widen(static_cast<T const*>(p.bias)[(channel + e) * p.bias_stride]);
    }
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (rows[u] == 0) continue;
    if constexpr (planes) {
#pragma unroll
      for (int e = 0; e < V; ++e) filter[e] = widen(w[u]), bias[e] = p.bias != nullptr ? widen(b[u]) : 0.f;
    }
    Vector<T, writes> v;
#pragma unroll
    for (int e = 0; e < writes; ++e) v.v[e] = narrow<T>(0.f);
#pragma unroll
    for (int e = 0; e < V; ++e)
      v.v[spread ? e * step : e] = narrow<T>(fmaf(widen(in[u].v[spread ? e : e * step]), filter[e], bias[e]));
    T* const out = static_cast<T*>(p.out) + to[u];
    *reinterpret_cast<Vector<T, writes>*>(out) = v;
    if constexpr (spread) {
      using Word = std::conditional_t<sizeof(T) * writes == 2, uint16_t, uint32_t>;
      using Zeros = Vector<Word, int(sizeof(T) * writes / sizeof(Word))>;
#pragma unroll 1
      for (int i = 0; i < rows[u]; ++i)
#pragma unroll 1
        for (int j = i == 0; j < columns[u]; ++j) *reinterpret_cast<Zeros*>(out + i * p.x_h + j * p.x_w) = Zeros{};
    }
  }
}

template <class T, bool planes, int V, int step>
__global__ void __launch_bounds__(256, 4) single_sums(__grid_constant__ SingleParams const p) {
  constexpr int U = kSingleTogether, sums = planes ? 1 : V;
  __shared__ float shared[256 * sums];
  ptx::griddepcontrol_launch_dependents();
  SingleThread const me(p);
  int const channel = planes ? me.slice : (me.slice * p.lanes + me.lane) * V, share = int(blockIdx.x) / p.slices;
  bool const exists = me.group < p.groups && channel < p.C;
  uint32_t const begin = share * p.each, end = p.units - begin < p.each ? p.units : begin + p.each;
  T const* const a = static_cast<T const*>(p.a) + (planes ? channel * p.a_c : channel);
  T const* const b = static_cast<T const*>(p.b) + (planes ? channel * p.b_c : channel);
  float acc[V] = {};
  if (exists)
#pragma unroll 1
    for (uint32_t unit = begin + me.group; unit < end; unit += U * p.groups) {
      Vector<T, V * step> x[U];
      Vector<T, V> y[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        uint32_t const i = unit + u * p.groups;
        SinglePlace const at = SinglePlace::of<false>(p, i < end ? i : unit);
        x[u] = load_vector<T, V * step>(a + at.n * p.a_n + at.row * p.a_h + at.column * p.a_w);
        y[u] = load_vector<T, V>(b + at.n * p.b_n + at.row * p.b_h + at.column * p.b_w);
      }
#pragma unroll
      for (int u = 0; u < U; ++u)
        if (unit + u * p.groups < end)
#pragma unroll
          for (int e = 0; e < V; ++e) acc[e] = fmaf(widen(x[u].v[e * step]), widen(y[u].v[e]), acc[e]);
    }
  if constexpr (planes) {
#pragma unroll
    for (int e = 1; e < V; ++e) acc[0] += acc[e];
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) acc[0] += __shfl_xor_sync(~0u, acc[0], lane);
  }
  // planes: a number of each warp; else of the threads that share channels, in their order.
  bool const puts = planes ? threadIdx.x % 32 == 0 : exists;
  int const members = planes ? int(blockDim.x) / 32 : p.groups, pitch = planes ? 1 : p.lanes * V;
  int const at = planes ? int(threadIdx.x) / 32 : me.group * pitch + me.lane * V;
  if (puts)
#pragma unroll
    for (int e = 0; e < sums; ++e) shared[at + e] = acc[e];
  __syncthreads();
  for (int i = int(threadIdx.x); i < pitch; i += int(blockDim.x)) {
    int const c = planes ? channel : me.slice * pitch + i;
    if (c >= p.C) break;
    float sum = 0.f;
#pragma unroll 8
    for (int member = 0; member < members; ++member) sum += shared[member * pitch + i];
    store_sum<T>(p.out, p.partial, p.units > p.each ? 2 : 1, c * p.w_k, int64_t(share) * p.C + c, sum);
  }
}

// ---- host side

template <Op op, class T, bool planes, bool spread, int V, int step>
cudaError_t start_single(SingleParams const& p, SingleTile const& t, cudaStream_t stream) {
  void (*kernel)(SingleParams);
  if constexpr (op == Op::wgrad)
    kernel = single_sums<T, planes, V, step>;
  else
    kernel = scale<T, planes, spread, V, step>;
  kernel<<<unsigned(t.shares * t.slices), unsigned(t.threads), 0, stream>>>(p);
  return cudaGetLastError();
}

// Where single.h says so for the layout.
template <Op op, DType dtype, bool planes>
cudaError_t launch_single(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  SingleTile const t = single_tile(op, problem);
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad, sums = op == Op::wgrad;
  Strides const &a = backward ? problem.y : problem.x, &b = backward ? problem.x : problem.y;
  bool const spread = backward && (problem.stride_h > 1 || problem.stride_w > 1);
  SingleParams p{};
  p.a = args.a, p.b = args.b, p.w = args.b, p.bias = backward ? nullptr : args.bias, p.bias_stride = args.bias_stride;
  p.out = args.out, p.partial = args.workspace, p.w_k = problem.w.n;
  // Units of x begin `stride` apart, and in NCHW vectors of its columns.
  auto set = [&](Strides const& from, bool of_x, int64_t& h, int64_t& w) {
    h = from.h * (of_x ? problem.stride_h : 1);
    w = (planes ? t.vector : from.w) * (of_x ? problem.stride_w : 1);
  };
  p.a_n = a.n, p.a_c = a.c, p.b_n = b.n, p.b_c = b.c;
  set(a, !backward, p.a_h, p.a_w), set(b, backward, p.b_h, p.b_w);
  p.x_h = problem.x.h, p.x_w = planes ? 1 : problem.x.w;
  p.H = int(problem.H), p.W = int(problem.W), p.stride_h = int(problem.stride_h), p.stride_w = int(problem.stride_w);
  if (t.step == 2) p.W = int(t.columns), p.stride_w = 1;  // vectors
  p.C = int(problem.C), p.slices = int(t.slices), p.lanes = t.lanes, p.groups = t.groups;
  p.w_vectors = problem.w.n == 1 && problem.w_align >= 16;
  p.units = uint32_t(t.units), p.each = uint32_t(t.each);
  p.by_lanes = WideDivisor(uint32_t(t.lanes)), p.by_columns = WideDivisor(uint32_t(t.columns));
  p.by_rows = WideDivisor(uint32_t(t.rows)), p.by_channels = WideDivisor(uint32_t(planes ? problem.C : 1));
  auto by_vector = [&]<bool spreads, int step>() {
    constexpr int most = 16 / int(sizeof(T)) / step;
    if constexpr (most >= 8)
      if (t.vector == 8) return start_single<op, T, planes, spreads, 8, step>(p, t, stream);
    if constexpr (most >= 4)
      if (t.vector == 4) return start_single<op, T, planes, spreads, 4, step>(p, t, stream);
    if (t.vector == 2) return start_single<op, T, planes, spreads, 2, step>(p, t, stream);
    return start_single<op, T, planes, spreads, 1, step>(p, t, stream);
  };
  cudaError_t error = cudaErrorInvalidValue;
  if constexpr (planes)
    if (t.step == 2)
      error = spread ? by_vector.template operator()<backward, 2>() : by_vector.template operator()<false, 2>();
  if (t.step == 1)
    error = spread ? by_vector.template operator()<backward, 1>() : by_vector.template operator()<false, 1>();
  if (error != cudaSuccess || !sums || t.shares == 1) return error;
  if (plan.split_k != t.shares) return cudaErrorInvalidValue;
  return launch_sum<T>(problem, plan, args, stream, true);
}

}  // namespace conv2d_ext::depthwise
