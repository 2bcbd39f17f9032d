// Convolution to few results on tensor cores, in any strides: fprop of a network's last layer, dgrad of its first.
//   y[pixels, columns] = x[pixels, taps x channels] * w[taps x channels, columns]
// A column is a filter; of dgrad with strides it is a channel of one phase of the pixels, so that a window of y gives
// all pixels of a square. Taps that a phase does not meet have zero weights: a result that is NaN is summed again from
// its own taps.
//
// A block keeps the filters in shared memory, in the order of mma.sync's fragments, and walks over tiles of pixels and
// chunks of 64 bytes of their channels, which lie there pixel by pixel, with a halo: a tap is an offset for ldmatrix.
// They are copied with cp.async where channels are vectors in memory, else lanes go along W and each gathers 16 bytes
// of channels. Where two stages leave room for one block an SM only, there is one, and two blocks.
#pragma once

#include "stem.cuh"

namespace conv2d_ext::stem {

struct NarrowAxis {
  int low, span, step, out_step, phases;
  int stride, pad, dilation, taps;  // of the problem
  int in_extent, out_extent;
};

struct NarrowParams {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t bias_stride, in_n, in_c, in_h, in_w, out_n, out_c, out_h, out_w;
  NarrowAxis h, w_axis;
  int in_channels, out_channels, w_in, w_out, w_r, w_s;
  bool backward, vectors;
  int columns, slabs, rows, groups, tiles_h, tiles_w, in_rows, in_columns, chunks, weight_bytes, stages, stage_bytes;
  Divisor columns_of, groups_of;  // a pixel's row of inputs, a run's row
  int64_t tiles;
};

// Where a column's result is, from the first of its square.
struct Column {
  int64_t at;
  int h, w;  // its phase; beyond the image if there is no such column
};

// The filter's tap that phase `phase` meets at position u of its window, or -1.
__device__ inline int tap_at(NarrowAxis const& a, bool backward, int phase, int u) {
  int const distance = backward ? phase + a.pad - a.stride * (a.low + u) : u;
  return distance >= 0 && distance % a.dilation == 0 && distance / a.dilation < a.taps ? distance / a.dilation : -1;
}

// Shared memory: stages | filters | columns | bias | tables of the taps.
template <int blocks>
struct NarrowShared {
  uint2* weights;        // [tap][step][block][lane]
  Column* columns;       // [blocks * 8]
  float* bias;           // [blocks * 8]
  int *taps_h, *taps_w;  // [blocks * 8][span]: elements from a filter's first weight, or -1
  __device__ NarrowShared(NarrowParams const& p, char* dynamic) {
    weights = reinterpret_cast<uint2*>(dynamic + p.stages * p.stage_bytes);
    columns = reinterpret_cast<Column*>(dynamic + p.stages * p.stage_bytes + p.weight_bytes);
    bias = reinterpret_cast<float*>(columns + blocks * 8);
    taps_h = reinterpret_cast<int*>(bias + blocks * 8);
    taps_w = taps_h + blocks * 8 * p.h.span;
  }
};

template <class T, int blocks>
__device__ inline void load_narrow_filters(NarrowParams const& p, int first, NarrowShared<blocks> const& s) {
  constexpr int per_word = 4 / int(sizeof(T));
  for (int i = threadIdx.x; i < blocks * 8; i += kStemThreads) {
    int const column = first + i, c = column % p.out_channels, phase = column / p.out_channels;
    int const phase_h = phase / p.w_axis.phases, phase_w = phase % p.w_axis.phases;
    bool const exists = column < p.columns;
    s.columns[i] = {phase_h * p.out_h + phase_w * p.out_w + c * p.out_c, exists ? phase_h : 1 << 30, phase_w};
    s.bias[i] = p.bias != nullptr && exists ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
    for (int u = 0; u < p.h.span; ++u) {
      int const r = tap_at(p.h, p.backward, phase_h, u);
      s.taps_h[i * p.h.span + u] = exists && r >= 0 ? r * p.w_r + c * p.w_out : -1;
    }
    for (int v = 0; v < p.w_axis.span; ++v) {
      int const tap = tap_at(p.w_axis, p.backward, phase_w, v);
      s.taps_w[i * p.w_axis.span + v] = tap >= 0 ? tap * p.w_s : -1;
    }
  }
  __syncthreads();
  T const* const w = static_cast<T const*>(p.w);
  uint32_t* const weights = reinterpret_cast<uint32_t*>(s.weights);
  int const steps = p.chunks * 2;
#pragma unroll 4
  for (int i = threadIdx.x; i < p.weight_bytes / 4; i += kStemThreads) {
    int const part = i % 2, lane = i / 2 % 32, block = i / 64 % blocks, index = i / (64 * blocks);
    int const tap = index / steps, step = index - tap * steps, u = tap / p.w_axis.span, v = tap - u * p.w_axis.span;
    int const column = block * 8 + lane / 4, channel = (step * 8 + part * 4 + lane % 4) * per_word;
    int const at_h = s.taps_h[column * p.h.span + u], at_w = s.taps_w[column * p.w_axis.span + v];
    Vector<T, per_word> word;
#pragma unroll
    for (int e = 0; e < per_word; ++e)
      word.v[e] = at_h >= 0 && at_w >= 0 && channel + e < p.in_channels
                      ? rounded(w[at_h + at_w + (channel + e) * p.w_in])
                      : narrow<T>(0.f);
    weights[i] = *reinterpret_cast<uint32_t const*>(&word);
  }
}

// A chunk's channels of the pixels of a tile, from (h, w) on, zeros outside of the image.
template <class T>
__device__ inline void copy_chunk(NarrowParams const& p, int64_t n, int h, int w, int chunk, uint32_t to) {
  constexpr int lanes = 16 / int(sizeof(T)), per_chunk = lanes * 4;
  T const* const image = static_cast<T const*>(p.in) + n * p.in_n;
  int const first = chunk * per_chunk;
  if (p.vectors) {
    for (int row = threadIdx.x / 32; row < p.in_rows; row += kWarps) {
      bool const in_image = unsigned(h + row) < unsigned(p.h.in_extent);
      T const* const from = image + (h + row) * p.in_h + w * p.in_w + first;
      for (int i = threadIdx.x % 32; i < p.in_columns * 4; i += 32) {
        int const column = i / 4, vector = i % 4;
        bool const valid =
            in_image && unsigned(w + column) < unsigned(p.w_axis.in_extent) && first + vector * lanes < p.in_channels;
        ptx::cp_async_16(to + (row * p.in_columns + column) * int(kNarrowLine) + vector * 16,
                         from + column * p.in_w + vector * lanes, valid);
      }
    }
    return;
  }
  // 16 loads of a thread at a time.
  constexpr int together = 16 / lanes;
  int const count = p.in_rows * 4 * p.in_columns;
  for (int i0 = threadIdx.x; i0 < count; i0 += kStemThreads * together) {
    Vector<T, lanes> v[together];
    uint32_t at[together];
#pragma unroll
    for (int k = 0; k < together; ++k) {
      int const i = i0 + k * kStemThreads, line = p.columns_of.quotient(i), column = i - line * p.in_columns;
      int const row = line / 4, channel = first + line % 4 * lanes;
      bool const valid = row < p.in_rows && unsigned(h + row) < unsigned(p.h.in_extent) &&
                         unsigned(w + column) < unsigned(p.w_axis.in_extent);
      T const* const from = image + (h + row) * p.in_h + (w + column) * p.in_w + channel * p.in_c;
#pragma unroll
      for (int e = 0; e < lanes; ++e)
        v[k].v[e] = valid && channel + e < p.in_channels ? from[e * p.in_c] : narrow<T>(0.f);
      at[k] = to + (row * p.in_columns + column) * int(kNarrowLine) + line % 4 * 16;
    }
#pragma unroll
    for (int k = 0; k < together; ++k)
      if (i0 + k * kStemThreads < count) ptx::st_shared_v4(at[k], *reinterpret_cast<uint4 const*>(&v[k]));
  }
}

template <class T, int tiles, int blocks>
__device__ inline void multiply_narrow(float (&acc)[tiles][blocks][4], NarrowParams const& p,
                                       uint32_t const (&from)[tiles], uint2 const* weights) {
  int const tap_step = p.chunks * 2 * blocks * 32;
#pragma unroll 1
  for (int u = 0; u < p.h.span; ++u) {
#pragma unroll 1
    for (int v = 0; v < p.w_axis.span; ++v, weights += tap_step) {
      uint32_t const tap = (u * p.in_columns + v) * uint32_t(kNarrowLine);
#pragma unroll(blocks == 8 || is_split<T> ? 1 : 2)  // registers are short
      for (int step = 0; step < 2; ++step) {
        Word<T> b[blocks][2];
#pragma unroll
        for (int j = 0; j < blocks; ++j) {
          uint2 const two = weights[(step * blocks + j) * 32];
          b[j][0] = word_of<T>(two.x), b[j][1] = word_of<T>(two.y);
        }
#pragma unroll
        for (int m = 0; m < tiles; ++m) {
          uint32_t words[4];
          ptx::ldmatrix_x4(words, from[m] + tap + step * 32);
          Word<T> a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if constexpr (std::is_same_v<T, float>)
              a[i] = ptx::cvt_rn_tf32(__uint_as_float(words[i]));
            else
              a[i] = word_of<T>(words[i]);
          }
#pragma unroll
          for (int j = 0; j < blocks; ++j) mma<T>(acc[m][j], a[0], a[1], a[2], a[3], b[j][0], b[j][1]);
        }
      }
    }
  }
}

// The coordinate that result `out` meets at tap `tap`, or -1.
__device__ inline int meets(NarrowAxis const& a, bool backward, int out, int tap) {
  int at = backward ? out + a.pad - tap * a.dilation : out * a.stride - a.pad + tap * a.dilation;
  if (backward) {
    if (at < 0 || at % a.stride != 0) return -1;
    at /= a.stride;
  }
  return at >= 0 && at < a.in_extent ? at : -1;
}

// One result, from its own taps alone.
template <class T>
__device__ __noinline__ float sum_again(NarrowParams const& p, int64_t n, int h, int w, int c) {
  T const* const image = static_cast<T const*>(p.in) + n * p.in_n;
  T const* const filter = static_cast<T const*>(p.w) + c * p.w_out;
  float sum = 0;
  for (int r = 0; r < p.h.taps && sum == sum; ++r)  // a NaN stays one
    for (int s = 0; s < p.w_axis.taps; ++s) {
      int const row = meets(p.h, p.backward, h, r), column = meets(p.w_axis, p.backward, w, s);
      if (row < 0 || column < 0) continue;
      for (int k = 0; k < p.in_channels; ++k)
        sum += widen(image[row * p.in_h + column * p.in_w + k * p.in_c]) *
               widen(filter[r * p.w_r + s * p.w_s + k * p.w_in]);
    }
  return sum;
}

// May a sum be NaN, or infinite where numbers are split, that is not so?
template <class T>
__device__ inline bool is_wrong(float sum) {
  return is_split<T> ? !isfinite(sum) : isnan(sum);
}

// Result (row lane / 4 of run `group`, column `index`), or null if there is none.
template <class T, int blocks>
struct NarrowResult {
  T* at = nullptr;
  int h, w;
  __device__ NarrowResult(NarrowParams const& p, int64_t n, int row0, int column0, int group, int index,
                          NarrowShared<blocks> const& s) {
    int const row = p.groups_of.quotient(group);
    int const h0 = (row0 + row) * p.h.out_step;
    int const w0 = (column0 + (group - row * p.groups) * 8 + int(threadIdx.x) % 32 / 4) * p.w_axis.out_step;
    Column const column = s.columns[index];
    h = h0 + column.h, w = w0 + column.w;
    if (row < p.rows && h < p.h.out_extent && w < p.w_axis.out_extent)
      at = static_cast<T*>(p.out) + n * p.out_n + h0 * p.out_h + w0 * p.out_w + column.at;
  }
};

template <class T, int tiles, int blocks>
__device__ inline void store_narrow(NarrowParams const& p, float const (&acc)[tiles][blocks][4], int64_t n, int row0,
                                    int column0, int group0, int first, NarrowShared<blocks> const& s) {
  int const t = threadIdx.x % 4;
  bool again = false;
#pragma unroll
  for (int i = 0; i < tiles * 2; ++i)
#pragma unroll
    for (int j = 0; j < blocks; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int const index = j * 8 + t * 2 + e;
        NarrowResult<T, blocks> const r(p, n, row0, column0, group0 + i, index, s);
        float const v = acc[i / 2][j][i % 2 * 2 + e];
        again |= is_wrong<T>(v);
        if (r.at != nullptr) *r.at = narrow<T>(v + s.bias[index]);
      }
  if (!again) return;
#pragma unroll 1
  for (int i = 0; i < tiles * 2; ++i)
#pragma unroll 1
    for (int k = 0; k < blocks * 2; ++k) {
      int const index = k / 2 * 8 + t * 2 + k % 2;
      NarrowResult<T, blocks> const r(p, n, row0, column0, group0 + i, index, s);
      if (r.at != nullptr && is_wrong<T>(widen(*r.at)))
        *r.at = narrow<T>(sum_again<T>(p, n, r.h, r.w, (first + index) % p.out_channels) + s.bias[index]);
    }
}

template <class T, int tiles, int blocks>
__global__ void __launch_bounds__(kStemThreads, blocks == 1 && sizeof(T) == 2 ? 3 : 2)
    gather_narrow(__grid_constant__ NarrowParams const p) {
  extern __shared__ __align__(16) char dynamic[];
  NarrowShared<blocks> const s(p, dynamic);
  int const first = int(blockIdx.x) % p.slabs * (blocks * 8), lane = threadIdx.x % 32;
  int const group0 = int(threadIdx.x) / 32 * (tiles * 2);
  uint32_t from[tiles];  // of this lane's row of ldmatrix
#pragma unroll
  for (int m = 0; m < tiles; ++m) {
    int const index = group0 + m * 2 + lane / 8 % 2, group = index < p.rows * p.groups ? index : 0;
    int const row = p.groups_of.quotient(group), column = (group - row * p.groups) * 8 + lane % 8;
    from[m] = ptx::shared_address(dynamic) + lane / 16 * 16 +
              (row * p.h.step * p.in_columns + column * p.w_axis.step) * int(kNarrowLine);
  }
  auto place = [&](int64_t tile, int64_t& n, int& row0, int& column0) {
    n = tile / (p.tiles_h * p.tiles_w);
    int const of_image = int(tile - n * (p.tiles_h * p.tiles_w));
    row0 = of_image / p.tiles_w * p.rows, column0 = of_image % p.tiles_w * (p.groups * 8);
  };
  auto copy = [&](int64_t tile, int chunk, int stage) {
    int64_t n;
    int row0, column0;
    place(tile, n, row0, column0);
    copy_chunk<T>(p, n, row0 * p.h.step + p.h.low, column0 * p.w_axis.step + p.w_axis.low, chunk,
                  ptx::shared_address(dynamic) + stage * p.stage_bytes);
    ptx::cp_async_commit_group();
  };
  int64_t const begin = blockIdx.x / p.slabs, step = gridDim.x / p.slabs;
  copy(begin, 0, 0);
  load_narrow_filters<T, blocks>(p, first, s);
  int stage = 0;
  for (int64_t tile = begin; tile < p.tiles; tile += step) {
    float acc[tiles][blocks][4] = {};
    for (int chunk = 0; chunk < p.chunks; ++chunk, stage ^= p.stages - 1) {
      ptx::cp_async_wait_all();
      __syncthreads();  // the chunk is there, and the one before has been read
      bool const last = chunk + 1 == p.chunks, more = !last || tile + step < p.tiles;
      auto copy_next = [&](int to) { copy(last ? tile + step : tile, last ? 0 : chunk + 1, to); };
      if (more && p.stages == 2) copy_next(stage ^ 1);
      uint32_t at[tiles];
#pragma unroll
      for (int m = 0; m < tiles; ++m) at[m] = from[m] + stage * p.stage_bytes;
      multiply_narrow<T, tiles, blocks>(acc, p, at, s.weights + chunk * 2 * blocks * 32 + lane);
      if (more && p.stages == 1) {
        __syncthreads();
        copy_next(0);
      }
    }
    int64_t n;
    int row0, column0;
    place(tile, n, row0, column0);
    store_narrow<T, tiles, blocks>(p, acc, n, row0, column0, group0, first, s);
  }
}

// ---- host side

inline NarrowAxis narrow_axis(GroupedAxis const& a, int64_t stride, int64_t pad, int64_t dilation, int64_t taps,
                              int64_t in_extent, int64_t out_extent) {
  return {a.low,    a.span,        a.step,    a.out_step,     a.phases,       int(stride),
          int(pad), int(dilation), int(taps), int(in_extent), int(out_extent)};
}

template <Op op, DType dtype, int tile_m, int tile_n>
cudaError_t launch_narrow(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad;
  StemNarrow const t = stem_narrow(row_of(plan), op, problem, h200_sxm);
  Strides const &in = backward ? problem.y : problem.x, &out = backward ? problem.x : problem.y;
  NarrowParams p{};
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.out = args.out, p.bias_stride = args.bias_stride;
  p.in_n = in.n, p.in_c = in.c, p.in_h = in.h, p.in_w = in.w;
  p.out_n = out.n, p.out_c = out.c, p.out_h = out.h, p.out_w = out.w;
  p.h = narrow_axis(t.h, problem.stride_h, problem.pad_top, problem.dilation_h, problem.R,
                    backward ? problem.P() : problem.H, backward ? problem.H : problem.P());
  p.w_axis = narrow_axis(t.w, problem.stride_w, problem.pad_left, problem.dilation_w, problem.S,
                         backward ? problem.Q() : problem.W, backward ? problem.W : problem.Q());
  p.in_channels = int(backward ? problem.K : problem.C), p.out_channels = int(backward ? problem.C : problem.K);
  p.w_in = int(backward ? problem.w.n : problem.w.c), p.w_out = int(backward ? problem.w.c : problem.w.n);
  p.w_r = int(problem.w.h), p.w_s = int(problem.w.w), p.backward = backward;
  p.vectors =
      channel_vectors(in, backward ? problem.y_align : problem.x_align, p.in_channels, 16 / size_of(dtype), dtype);
  p.columns = int(t.columns), p.slabs = int(t.slabs), p.rows = int(t.rows), p.groups = int(t.groups);
  p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w), p.in_rows = int(t.in_rows);
  p.in_columns = int(t.in_columns), p.chunks = int(t.chunks), p.weight_bytes = int(t.weight_bytes);
  p.stages = int(t.stages), p.stage_bytes = int(t.stage_bytes);
  p.columns_of = Divisor(uint32_t(p.in_columns)), p.groups_of = Divisor(uint32_t(p.groups));
  p.tiles = problem.N * t.tiles_h * t.tiles_w;
  auto* kernel = gather_narrow<T, tile_m / 16 / kWarps, tile_n / 8>;
  if constexpr (dtype == DType::f32)
    if (!problem.allow_tf32) kernel = gather_narrow<Split, tile_m / 16 / kWarps, tile_n / 8>;
  return launch_blocks(kernel, p, p.tiles, t, stream);
}

}  // namespace conv2d_ext::stem

#define CONV2D_EXT_STEM_NARROW_INSTANCE(family, op, dtype, tm, tn, tk, variant)      \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                          \
    return stem::launch_narrow<Op::op, DType::dtype, tm, tn>(p, plan, args, stream); \
  }
