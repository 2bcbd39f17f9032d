// Depthwise convolution (one channel a group, one filter a channel) at memory speed: square filters of compiled size,
// stride 1 or 2, no dilation. out[n, c, p, q] = sum over (r, s) of in * w[c, r, s]; in is x for fprop, y for dgrad.
// dgrad adds up over the m filters of a channel, K = m * C; the others take K == C.
// A block copies a tile of the input with its halo to shared memory (asynchronous copies, zero outside the image), and
// each thread computes TH x TW outputs from it, or for wgrad adds TH x TW gradients to its R x R sums. A thread's
// outputs are neighbours along W; a block takes several planes of small images. channels_last: depthwise_walk.cuh.
// Blocks hide each other's copies: shared memory and registers allow several on an SM.
#pragma once

#include "dependent.cuh"
#include "depthwise_spread.cuh"
#include "depthwise_tile.cuh"
#include "ptx.cuh"

namespace conv2d_ext::depthwise {

// What a thread of a block works on: plane, row group and strip of its patch.
struct Item {
  int plane, row_group, strip;
  bool exists;
  __device__ static Item of_thread(Params const& p) {
    int const i = int(threadIdx.x);
    int const plane = int(p.per_plane.quotient(i)), rest = i - plane * int(p.per_plane.value);
    int const row_group = int(p.per_row.quotient(rest));
    return {plane, row_group, rest - row_group * int(p.per_row.value), plane < p.planes};
  }
};

// Block numbers and counts of tiles are below 2^31 (plan.h), and 64-bit division is a long subroutine.
__device__ inline int split_off(uint32_t& value, int divisor) {
  uint32_t const rest = value % uint32_t(divisor);
  value /= uint32_t(divisor);
  return int(rest);
}

template <class T, int TH, int TW>
__device__ inline void store_rows(Params const& p, T* out, int h0, int w0, float const (&acc)[TH][TW]) {
  auto store = [&]<int width>(Vector<T, width> const&) {
#pragma unroll
    for (int a = 0; a < TH; ++a) {
      int const h = h0 + a;
      if (unsigned(h) >= unsigned(p.out_H)) continue;
      T* const row = out + h * p.out_h;
#pragma unroll
      for (int b = 0; b < TW; b += width) {
        int const w = w0 + b;
        if (w >= 0 && w + width <= p.out_W) {
          Vector<T, width> v;
#pragma unroll
          for (int e = 0; e < width; ++e) v.v[e] = narrow<T>(acc[a][b + e]);
          *reinterpret_cast<Vector<T, width>*>(row + w) = v;
        } else if constexpr (width > 1) {
#pragma unroll
          for (int e = 0; e < width; ++e)
            if (unsigned(w + e) < unsigned(p.out_W)) row[w + e] = narrow<T>(acc[a][b + e]);
        }
      }
    }
  };
  if (p.out_width == 4)
    store(Vector<T, 4>{});
  else if (p.out_width == 2)
    store(Vector<T, 2>{});
  else
    store(Vector<T, 1>{});
}

// fprop and dgrad.
template <class T, Op op, int R, int stride>
__global__ void __launch_bounds__(kMaxThreads, 2) gather(__grid_constant__ Params const p) {
  using F = Patch<op, R, stride>;
  using A = typename F::A;
  constexpr int taps = R * R;
  extern __shared__ __align__(16) unsigned char shared[];
  float* const filters = reinterpret_cast<float*>(shared);
  T* const tile = reinterpret_cast<T*>(shared + p.weight_bytes);

  uint32_t index = blockIdx.x;
  int const tile_w = split_off(index, p.tiles_w), tile_h = split_off(index, p.tiles_h);
  int64_t const c0 = split_off(index, p.channel_units) * p.planes, n0 = index;
  int const present = int(smaller(p.C - c0, p.planes));
  T const* const base = static_cast<T const*>(p.in.data) + n0 * p.in.n + c0 * p.in.c;
  Item const item = Item::of_thread(p);
  int const c = item.plane;
  bool const works = item.exists && c < present;
  float acc[F::TH][F::TW];
  float const bias = works && p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[(c0 + c) * p.bias_stride]) : 0.f;
#pragma unroll
  for (int a = 0; a < F::TH; ++a)
#pragma unroll
    for (int b = 0; b < F::TW; ++b) acc[a][b] = bias;
  if (p.in.whole) {
    clear(tile, p.planes * p.in.rows * p.in.pitch);
    __syncthreads();
  }

  int const multiplier = op == Op::dgrad ? p.multiplier : 1;
#pragma unroll 1
  for (int m = 0; m < multiplier; ++m) {
    if (m > 0) __syncthreads();  // the last filters' tile has been read
    fill<T>(p.in, base + m * p.in_m, p.in.c, p.planes, present, p.in.start_h + tile_h * p.in.step_h,
            p.in.start_w + tile_w * p.in.step_w, tile);
    __pipeline_commit();

    // Filters: [channel][tap].
    T const* const w = static_cast<T const*>(p.w) + m * p.w_m;
    for (int i = threadIdx.x; i < present * taps; i += blockDim.x) {
      int const which = i / taps, tap = i % taps;
      filters[i] = widen(w[(c0 + which) * p.w_c + tap / R * p.w_r + tap % R * p.w_s]);
    }
    __pipeline_wait_prior(0);
    __syncthreads();

    if (!works) continue;
    float filter[R][R];
#pragma unroll
    for (int tap = 0; tap < taps; ++tap) filter[tap / R][tap % R] = filters[c * taps + tap];
    int const column = item.strip * A::advance(F::TW);
    T const* from = tile + (c * p.in.rows + item.row_group * A::advance(F::TH)) * p.in.pitch + column + p.lead;
#pragma unroll
    for (int i = 0; i < F::IH; ++i, from += p.in.pitch) {
      float in[F::IW];
      load_row<T, F::IW, F::shift>(from, in);
#pragma unroll
      for (int a = 0; a < F::TH; ++a) {
        int const r = A::tap(a, i);
        if (r < 0 || r >= R) continue;
#pragma unroll
        for (int b = 0; b < F::TW; ++b)
#pragma unroll
          for (int s = 0; s < R; ++s)
            if (A::index(b, s) >= 0) acc[a][b] = fmaf(in[A::index(b, s)], filter[r][s], acc[a][b]);
      }
    }
  }
  if (!works) return;

  int const h0 = p.origin_h + (tile_h * p.row_groups + item.row_group) * F::TH;
  int const w0 = p.origin_w + (tile_w * p.strips + item.strip) * F::TW;
  store_rows<T>(p, static_cast<T*>(p.out) + n0 * p.out_n + (c0 + c) * p.out_c, h0, w0, acc);
}

// Sums of a split go to partial[split][k][tap], or rounded to the filter where there is one split.
template <class T, class Acc>
__device__ inline void store_sum(void* w, void* partial, int splits, int64_t filter_offset, int64_t partial_offset,
                                 Acc sum) {
  if (splits == 1)
    static_cast<T*>(w)[filter_offset] = narrow<T>(sum);
  else
    static_cast<Acc*>(partial)[partial_offset] = sum;
}

// A patch's products, added to the sums of its thread.
template <class T, int R, int stride>
__device__ inline void add_patch(Params const& p, T const* x, T const* y0, float (&acc)[R][R]) {
  using F = Patch<Op::wgrad, R, stride>;
  using A = typename F::A;
  float y[F::TH][F::TW];
#pragma unroll
  for (int a = 0; a < F::TH; ++a) load_row<T, F::TW, 0>(y0 + a * p.y.pitch, y[a]);
#pragma unroll
  for (int i = 0; i < F::IH; ++i, x += p.in.pitch) {
    float in[F::IW];
    load_row<T, F::IW, F::shift>(x, in);
#pragma unroll
    for (int a = 0; a < F::TH; ++a) {
      int const r = A::tap(a, i);
      if (r < 0 || r >= R) continue;
#pragma unroll
      for (int b = 0; b < F::TW; ++b)
#pragma unroll
        for (int s = 0; s < R; ++s) acc[r][s] = fmaf(in[A::index(b, s)], y[a][b], acc[r][s]);
    }
  }
}

// The same for the first `rows` rows and `columns` columns of the patch alone.
template <class T, int R, int stride>
__device__ inline void add_exactly(Params const& p, T const* x, T const* y, int rows, int columns, float (&acc)[R][R]) {
  using F = Patch<Op::wgrad, R, stride>;
#pragma unroll 1
  for (int i = 0; i < F::TH * F::TW; ++i) {
    int const a = i / F::TW, b = i % F::TW;
    if (a >= rows || b >= columns) continue;
    float const gradient = widen(y[a * p.y.pitch + b]);
    T const* const from = x + a * stride * p.in.pitch + b * stride + F::shift;
#pragma unroll
    for (int tap = 0; tap < R * R; ++tap)
      acc[tap / R][tap % R] = fmaf(widen(from[tap / R * p.in.pitch + tap % R]), gradient, acc[tap / R][tap % R]);
  }
}

// A block walks over its share of the tiles of one channel, `planes` images at a time.
template <class T, int R, int stride>
__global__ void __launch_bounds__(kMaxThreads, 2) wgrad(__grid_constant__ Params const p) {
  using F = Patch<Op::wgrad, R, stride>;
  constexpr int taps = R * R;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const tile = reinterpret_cast<T*>(shared);
  T* const tile_y = reinterpret_cast<T*>(shared + p.y_offset);

  uint32_t rest = blockIdx.x;
  int64_t const c = split_off(rest, p.channel_units);
  int const split = int(rest);
  int64_t const tiles = int64_t(p.image_units) * p.tiles_h * p.tiles_w;
  int64_t const begin = tiles * split / p.splits, end = tiles * (split + 1) / p.splits;
  Item const item = Item::of_thread(p);
  int const row0 = item.row_group * F::TH, column0 = item.strip * F::TW;
  T const* const x0 = tile + (item.plane * p.in.rows + row0 * stride) * p.in.pitch + column0 * stride + p.lead;
  T const* const y0 = tile_y + (item.plane * p.y.rows + row0) * p.y.pitch + column0;

  // A patch may reach beyond y, where y counts as zero. Only if that made a NaN of an infinite or NaN x does the block
  // start again and leave such products out.
  float acc[R][R];
  for (bool again = false;; again = true) {
#pragma unroll
    for (int tap = 0; tap < taps; ++tap) acc[tap / R][tap % R] = 0.f;
    for (int64_t step = begin; step < end; ++step) {
      uint32_t index = uint32_t(step);
      int const tile_w = split_off(index, p.tiles_w), tile_h = split_off(index, p.tiles_h);
      int64_t const n0 = int64_t(index) * p.planes;
      int const present = int(smaller(p.N - n0, p.planes));
      __syncthreads();                            // the last tile has been read
      if (step == begin || present < p.planes) {  // zeros around whole images stay
        if (p.in.whole) clear(tile, p.planes * p.in.rows * p.in.pitch);
        if (p.y.whole) clear(tile_y, p.planes * p.y.rows * p.y.pitch);
        __syncthreads();
      }
      fill<T>(p.in, static_cast<T const*>(p.in.data) + n0 * p.in.n + c * p.in.c, p.in.n, p.planes, present,
              p.in.start_h + tile_h * p.in.step_h, p.in.start_w + tile_w * p.in.step_w, tile);
      fill<T>(p.y, static_cast<T const*>(p.y.data) + n0 * p.y.n + c * p.y.c, p.y.n, p.planes, present,
              tile_h * p.y.step_h, tile_w * p.y.step_w, tile_y);
      __pipeline_commit();
      __pipeline_wait_prior(0);
      __syncthreads();
      if (!item.exists) continue;
      if (again)
        add_exactly<T, R, stride>(p, x0, y0, item.plane < present ? p.y.H - tile_h * p.y.step_h - row0 : 0,
                                  p.y.W - tile_w * p.y.step_w - column0, acc);
      else
        add_patch<T, R, stride>(p, x0, y0, acc);
    }
    bool nan = false;
#pragma unroll
    for (int tap = 0; tap < taps; ++tap) nan = nan || acc[tap / R][tap % R] != acc[tap / R][tap % R];
    if (again || __syncthreads_or(nan) == 0) break;
  }

  // The block's sums, always added in the order of lanes and warps.
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(shared);
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) {
    float v = acc[tap / R][tap % R];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
    if (lane == 0) sums[warp * taps + tap] = v;
  }
  __syncthreads();
  for (int tap = threadIdx.x; tap < taps; tap += blockDim.x) {
    float sum = sums[tap];
    for (int other = 1; other < warps; ++other) sum += sums[other * taps + tap];
    store_sum<T>(p.out, p.partial, p.splits, c * p.w_c + tap / R * p.w_r + tap % R * p.w_s,
                 (int64_t(split) * p.C + c) * taps + tap, sum);
  }
}

// Second pass of wgrad: adds the splits in order.
struct Sum {
  void const* partial;
  void* w;
  int64_t count, w_k, w_r, w_s;  // count = K * R * S
  int64_t taps, S;
  int splits;
};

// A lane has a filter tap, each warp of a block every so many splits; the warps' sums are added in their order. It may
// begin before the first pass has ended.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) add_splits(__grid_constant__ Sum const p) {
  using Acc = decltype(widen(T()));
#if __CUDA_ARCH__ >= 900
  ptx::griddepcontrol_wait();
#endif
  __shared__ Acc sums[kMaxThreads];
  int const warps = int(blockDim.x) / 32, warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  for (int64_t first = int64_t(blockIdx.x) * 32; first < p.count; first += int64_t(gridDim.x) * 32) {
    int64_t const i = first + lane;
    Acc sum = 0;
    if (i < p.count) {
      Acc const* const from = static_cast<Acc const*>(p.partial) + i;
      for (int split = warp; split < p.splits;) {
        Acc chain = 0;
#pragma unroll 8
        for (int term = 0; term < kChain && split < p.splits; ++term, split += warps) chain += from[split * p.count];
        sum += chain;
      }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && i < p.count) {
      for (int other = 1; other < warps; ++other) sum += sums[other * 32 + lane];
      int64_t const k = i / p.taps, tap = i % p.taps;
      static_cast<T*>(p.w)[k * p.w_k + tap / p.S * p.w_r + tap % p.S * p.w_s] = narrow<T>(sum);
    }
    __syncthreads();
  }
}

// One output of fprop or dgrad at stride 1 from global memory, product by product: for those that tensor cores made
// NaN. unit_channels: a pixel's channels are neighbours in memory.
template <class T, bool unit_channels, class Tile>
__device__ __noinline__ float exact(Tile const& p, int64_t n, int c, int y, int x) {
  T const* in = static_cast<T const*>(p.in.data) + n * p.in.n;
  if constexpr (unit_channels)
    in += c;
  else
    in += c * p.in.c;
  T const* const w = static_cast<T const*>(p.w) + c * p.w_k;
  float sum = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
  for (int r = 0; r < p.R; ++r) {
    int const h = y - p.pad_h + r;
    if (unsigned(h) >= unsigned(p.in.H)) continue;
    for (int s = 0; s < p.S; ++s) {
      int const v = x - p.pad_w + s;
      if (unsigned(v) >= unsigned(p.in.W)) continue;
      sum = fmaf(widen(in[h * p.in.h + v * p.in.w]),
                 widen(w[(p.turned ? p.R - 1 - r : r) * p.w_r + (p.turned ? p.S - 1 - s : s) * p.w_s]), sum);
    }
  }
  return sum;
}

// ---- host side

template <class T>
cudaError_t launch_sum(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream,
                       bool dependent = false) {
  int64_t const taps = problem.R * problem.S, count = problem.K * taps;
  Sum const p{args.workspace, args.out, count, problem.w.n, problem.w.h, problem.w.w, taps, problem.S, plan.split_k};
  unsigned const blocks = unsigned(min64(ceil_div(count, 32), 65536));
  unsigned const warps = unsigned(min64(ceil_div(plan.split_k, 4), kMaxThreads / 32));
  if (dependent) return launch_dependent(add_splits<T>, dim3(blocks), int(32 * warps), 0, stream, p);
  add_splits<T><<<blocks, 32 * warps, 0, stream>>>(p);
  return cudaGetLastError();
}

inline int log2_at_least(int64_t value) {
  int log2 = 0;
  while (log2 < 5 && (1 << log2) < value) ++log2;
  return log2;
}

// Every row of `s` starts on a multiple of `bytes`.
inline bool rows_aligned(Strides const& s, bool nhwc, int align, int bytes, int element_bytes) {
  int const v = bytes / element_bytes;
  return align >= bytes && s.n % v == 0 && s.h % v == 0 && (nhwc ? s.w : s.c) % v == 0;
}

// Sets how the rows of a tile are copied; `lead` columns are put before the first, so that copies are aligned.
inline int set_copies(Source& s, Strides const& strides, int align, int element_bytes, int shift,
                      bool several_tiles_w) {
  int lead = 0;
  s.width = 1;
  for (int bytes = 16; bytes > element_bytes; bytes /= 2) {
    int const v = bytes / element_bytes, rest = modulo(int64_t(s.start_w) - shift, v);
    if (!rows_aligned(strides, false, align, bytes, element_bytes)) continue;
    if (rest % kQuad != 0 || (several_tiles_w && s.step_w % v != 0)) continue;
    lead = rest, s.width = v;
    break;
  }
  s.start_w -= shift + lead;
  return lead;
}

// For one tile an image. Rows and columns that no output meets may be missing from the tile.
inline void copy_whole(Source& s) {
  int64_t const rows = min64(s.H, int64_t(s.start_h) + s.rows), columns = min64(s.W, int64_t(s.start_w) + s.pitch);
  s.whole = s.start_h <= 0 && s.start_w <= 0 && rows > 0 && columns > 0;
  if (!s.whole) return;
  int64_t const copies = ceil_div(columns, s.width);
  s.row_copies = Divisor(uint32_t(copies));
  s.image_copies = Divisor(uint32_t(copies * rows));
}

template <class T, Op op, int R, int stride>
struct Tiling {
  using F = Patch<op, R, stride>;
  using A = typename F::A;
  static constexpr int kMaxFilterBytes = op == Op::wgrad ? 0 : kMaxPlanes * R * R * 4;
  int strips = 1, row_groups = 1, planes = 1, tiles_h = 1, tiles_w = 1;

  // Elements of a row of the tile: the most that any alignment may need.
  static constexpr int64_t pitch(int64_t strips) {
    return ceil_div(A::advance(F::TW) * (strips - 1) + F::quads * kQuad, 8) * 8 + 8;
  }
  static constexpr int64_t pitch_y(int64_t strips) { return ceil_div(strips * F::TW, 8) * 8; }
  static constexpr int64_t rows(int64_t row_groups) { return A::advance(F::TH) * (row_groups - 1) + F::IH; }
  static constexpr int64_t bytes(int64_t strips, int64_t row_groups) {
    int64_t const y = op == Op::wgrad ? pitch_y(strips) * row_groups * F::TH : 0;
    return (pitch(strips) * rows(row_groups) + y) * int64_t(sizeof(T));
  }

  // Takes the tile with the least copied inputs and computed outputs.
  Tiling(int64_t height, int64_t width, int64_t count) {
    constexpr int64_t budget = kSharedBytes - kMaxFilterBytes;
    int most_strips = 32;
    while (most_strips > 2 && bytes(most_strips, 1) > budget) most_strips -= 2;  // even, and two always fit
    static_assert(bytes(2, 1) <= budget);
    int64_t const all_strips = ceil_div(width, F::TW), all_groups = ceil_div(height, F::TH);
    int64_t const first = ceil_div(all_strips, most_strips);
    double best = 0;
    for (int64_t across = first; across < first + 8 && (across == first || across <= all_strips); ++across) {
      int64_t s = ceil_div(all_strips, across);
      if (across > 1 && s % 2 == 1 && s < most_strips) ++s;  // tiles begin on multiples of 8 columns
      int64_t groups = min64(kMaxThreads / s, all_groups);
      while (groups > 1 && bytes(s, groups) > budget) --groups;
      if (bytes(s, groups) > budget && s > 1) continue;
      int64_t const down = ceil_div(all_groups, groups);
      groups = ceil_div(all_groups, down);
      int64_t const tiles = ceil_div(all_strips, s) * down;
      double const cost =
          double(tiles) * (double(bytes(s, groups)) / sizeof(T) + 2.0 * double(s * F::TW * groups * F::TH));
      if (best != 0 && cost >= best) continue;
      best = cost;
      strips = int(s), row_groups = int(groups), tiles_h = int(down), tiles_w = int(ceil_div(all_strips, s));
    }
    int64_t const fit = min64(kMaxThreads / (strips * row_groups), budget / bytes(strips, row_groups));
    planes = int(max64(1, min64(min64(fit, kMaxPlanes), count)));
  }
};

// The parts of the parameters that depend on shapes alone, and the tile's.
template <class Tile, Op op>
Source source_of(Problem const& p, Tile const& tile, void const* data, bool output_side, bool halo) {
  using F = typename Tile::F;
  using A = typename F::A;
  Strides const& strides = output_side ? p.y : p.x;
  Source s{};
  s.data = data;
  s.n = strides.n, s.c = strides.c, s.h = strides.h, s.w = strides.w;
  s.H = int(output_side ? p.P() : p.H), s.W = int(output_side ? p.Q() : p.W);
  int const rows = tile.row_groups * F::TH, columns = tile.strips * F::TW;
  s.start_h = halo ? int(A::start(p.pad_top)) : 0, s.start_w = halo ? int(A::start(p.pad_left)) : 0;
  s.step_h = halo ? A::advance(rows) : rows, s.step_w = halo ? A::advance(columns) : columns;
  s.rows = int(halo ? Tile::rows(tile.row_groups) : rows);
  s.rows_of = Divisor(uint32_t(s.rows));
  return s;
}

template <Op op, DType dtype, int R, int S, int stride>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  static_assert(R == S);
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad, sums = op == Op::wgrad;
  using Tile = Tiling<T, op, R, stride>;
  using F = typename Tile::F;
  using A = typename F::A;
  constexpr int element = int(sizeof(T));
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  if constexpr (backward && stride == 2 && dtype == DType::f32 && R < 7)
    if (spreads(op, problem)) return launch_spread<R>(problem, args, stream);

  Params p{};
  p.N = problem.N, p.C = int(problem.C);
  p.out_H = int(backward ? problem.H : problem.P()), p.out_W = int(backward ? problem.W : problem.Q());
  p.origin_h = int(A::origin(problem.pad_top)), p.origin_w = int(A::origin(problem.pad_left));
  Tile const tile(p.out_H - p.origin_h, p.out_W - p.origin_w, sums ? problem.N : problem.C);
  p.strips = tile.strips, p.row_groups = tile.row_groups, p.planes = tile.planes;
  p.tiles_h = tile.tiles_h, p.tiles_w = tile.tiles_w;
  p.per_plane = Divisor(uint32_t(p.strips * p.row_groups)), p.per_row = Divisor(uint32_t(p.strips));
  p.channel_units = int(ceil_div(problem.C, sums ? 1 : p.planes));
  p.image_units = int(sums ? ceil_div(problem.N, p.planes) : problem.N);

  p.in = source_of<Tile, op>(problem, tile, args.a, backward, true);
  p.multiplier = int(problem.K_per_group()), p.in_m = p.in.c, p.w_m = problem.w.n;
  if (backward) p.in.c *= p.multiplier;
  p.lead = set_copies(p.in, in, backward ? problem.y_align : problem.x_align, element, F::shift, p.tiles_w > 1);
  int const columns = A::advance(F::TW) * (p.strips - 1) + F::quads * kQuad;
  p.in.pitch = int(ceil_div(p.lead + columns, 8) * 8);
  p.in.lanes_log2 = log2_at_least(p.in.pitch / p.in.width);
  bool const whole = p.tiles_h == 1 && p.tiles_w == 1;
  if (whole) copy_whole(p.in);

  p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride;
  p.w_c = problem.w.n * p.multiplier, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.out = args.out, p.partial = args.workspace, p.splits = plan.split_k;
  p.out_n = out.n, p.out_c = out.c, p.out_h = out.h, p.out_w = out.w;
  int const out_align = backward ? problem.x_align : problem.y_align;
  p.out_width = 1;
  for (int width = kQuad; width > 1 && p.out_width == 1; width /= 2)
    if (rows_aligned(out, false, out_align, width * element, element) && p.origin_w % width == 0) p.out_width = width;

  unsigned const threads = unsigned(ceil_div(p.planes * p.strips * p.row_groups, 32) * 32);
  int64_t const filters = sums ? 0 : int64_t(p.planes) * R * R * 4;
  p.weight_bytes = int(ceil_div(filters, 16) * 16);
  int64_t shared = p.weight_bytes + ceil_div(int64_t(p.planes) * p.in.rows * p.in.pitch * element, 16) * 16;
  auto start = [&](auto* kernel, int64_t blocks) {
    if (shared > 48 * 1024)
      if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)))
        return error;
    kernel<<<unsigned(blocks), threads, size_t(shared), stream>>>(p);
    return cudaGetLastError();
  };
  if constexpr (!sums) {
    int64_t const blocks = int64_t(p.tiles_h) * p.tiles_w * p.channel_units * p.image_units;
    if constexpr (backward && stride == 1)
      if (p.multiplier == 1) {  // fprop with the filter turned round, without the loop over filters
        p.w = static_cast<T const*>(p.w) + (R - 1) * (p.w_r + p.w_s), p.w_r = -p.w_r, p.w_s = -p.w_s;
        return start(gather<T, Op::fprop, R, stride>, blocks);
      }
    return start(gather<T, op, R, stride>, blocks);
  } else {
    p.y = source_of<Tile, op>(problem, tile, args.b, true, false);
    set_copies(p.y, out, problem.y_align, element, 0, p.tiles_w > 1);
    p.y.pitch = int(Tile::pitch_y(p.strips));
    p.y.lanes_log2 = log2_at_least(p.y.pitch / p.y.width);
    if (whole) copy_whole(p.y);
    p.y_offset = int(shared);
    shared += int64_t(p.planes) * p.y.rows * p.y.pitch * element;
    shared = max64(shared, int64_t(kMaxThreads / 32) * R * R * 4);
    if (cudaError_t const error = start(wgrad<T, R, stride>, int64_t(p.channel_units) * p.splits);
        error != cudaSuccess || p.splits == 1)
      return error;
    return launch_sum<T>(problem, plan, args, stream);
  }
}

}  // namespace conv2d_ext::depthwise
