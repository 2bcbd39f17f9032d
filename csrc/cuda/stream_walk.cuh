// What the kernels of stream.cuh and stream_ring.cuh share: which outputs a warp has, the banded matrices, stores, and
// the single products for what is not finite.
#pragma once

#include "../core/stream.h"
#include "depthwise.cuh"
#include "ptx.cuh"

namespace conv2d_ext::stream {

struct Source {
  void const* data;
  int64_t n, c, h, w;  // element strides
  int H, W;
  char const* end;  // behind the last element
};

struct Params {
  Source in, y;   // y: wgrad alone
  void const* w;  // the tap that meets the first input; dgrad: the last one
  void const* bias;
  void* out;
  void* partial;
  int64_t out_n, out_c, out_h;
  int64_t w_k, w_r, w_s, bias_stride;  // w_r, w_s: dgrad: negative
  int64_t N;
  int C, R, S, out_H, out_W, pad_h, pad_w, pad_left, origin, shift, splits;  // pad_left: dgrad with stride 2
  int span, columns, images, half, first, copies, copies_y, rows;            // columns: of a piece
  int pitch, swizzle;                        // stream.cuh's gather: 16 bytes from an image's row to the next one's
  int of_span;                               // units to images, for eight units
  uint32_t pieces, stretches, walks;         // walks: of a channel
  int warps, stages, team_bytes, out_bytes;  // stream_ring.cuh
  uint32_t row_bytes;                        // of outputs
  StreamRing ring;
  int channels, image_bytes, image_bytes_y, stage_bytes;  // stream_planes.cuh
  uint32_t units, groups, items;                          // units: of a block's channels
  bool by_images;                                         // PlanesTurn
  SumsTile sums;                                          // stream_sums.cuh
  int channel_bytes, channel_bytes_y, band_rows;          // of bands
  uint32_t bands;
  int run_channels, unit_stretches;  // channels of a run of a band; stretches of one (stream_units.cuh)
  bool once;                         // walks_read_once
};

// Under which wgrad's walks read.
__device__ inline uint64_t walks_policy(bool once) {
  return once ? ptx::createpolicy_evict_first() : ptx::createpolicy_evict_unchanged();
}

// i * of_span >> 8 is i / span for i < 8 and span <= 8.
constexpr int span_divisor(int span) { return (255 + span) / span; }

// Which columns, rows and images of a channel a warp walks down.
struct Walk {
  int c, p0, rows, q0;
  int64_t n0;

  __device__ Walk(Params const& p, int c, uint32_t index) : c(c) {
    q0 = int(index % p.pieces) * p.columns - p.origin;
    index /= p.pieces;
    p0 = int(index % p.stretches) * p.rows;
    rows = p.out_H - p0 < p.rows ? p.out_H - p0 : p.rows;
    n0 = int64_t(index / p.stretches) * p.images;
  }
};

// One of a warp's 16 units, or of a team's: its image among the warp's, and its place among the image's.
struct Unit {
  int image, place;
  bool exists;

  __device__ Unit(Params const& p, int i) {
    if (p.span > 8) {
      image = 0, place = i, exists = i < p.span;
    } else {
      image = i % 8 * p.of_span >> 8, place = i % 8 - image * p.span, exists = image < p.half;
      image += i / 8 * p.half;
    }
    exists = exists && image < p.images;
    if (!exists) image = place = 0;
  }
};

// Two neighbouring outputs of a unit, row after row. `pairs`: both exist or none.
template <class T, bool pairs, int columns = kStreamColumns>
struct Outputs {
  char* to;
  int64_t row_bytes;
  bool keep[2];

  __device__ Outputs(Params const& p, Walk const& at, int unit, int t) : row_bytes(p.out_h * int64_t(sizeof(T))) {
    Unit const u(p, unit);
    int const x = at.q0 + u.place * columns + 2 * t;
    bool const exists = u.exists && at.n0 + u.image < p.N && 2 * t < columns;
    to = reinterpret_cast<char*>(static_cast<T*>(p.out) + (at.n0 + u.image) * p.out_n + at.c * p.out_c +
                                 at.p0 * p.out_h + x);
    keep[0] = exists && unsigned(x) < unsigned(p.out_W);
    keep[1] = pairs ? keep[0] : exists && unsigned(x + 1) < unsigned(p.out_W);
  }
  __device__ T* elements() const { return reinterpret_cast<T*>(to); }
  __device__ void store(Vector<T, 2> const& v) {
    if constexpr (pairs) {
      if (keep[0]) *reinterpret_cast<Vector<T, 2>*>(to) = v;
    } else {
      if (keep[0]) elements()[0] = v.v[0];
      if (keep[1]) elements()[1] = v.v[1];
    }
    to += row_bytes;
  }
};

// Outputs that are NaN or infinite make a NaN of their products with zero.
__device__ inline __half2 spoil(__half2 sum, Vector<__half, 2> const& v) {
  return __hfma2(__halves2half2(v.v[0], v.v[1]), __half2(), sum);
}
__device__ inline __nv_bfloat162 spoil(__nv_bfloat162 sum, Vector<__nv_bfloat16, 2> const& v) {
  return __hfma2(__halves2bfloat162(v.v[0], v.v[1]), __nv_bfloat162(), sum);
}
template <class T>
struct PairOf;
template <>
struct PairOf<__half> {
  using type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

// One output from global memory, product by product.
template <class T, int stride>
__device__ float exact(Params const& p, int64_t n, int c, int y, int x) {
  T const* const in = static_cast<T const*>(p.in.data) + n * p.in.n + c * p.in.c;
  T const* const w = static_cast<T const*>(p.w) + c * p.w_k;
  float sum = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
#pragma unroll 1
  for (int r = 0; r < p.R; ++r)
#pragma unroll 1
    for (int s = 0; s < p.S; ++s) {
      int const h = y * stride - p.pad_h + r, v = x * stride - p.pad_w + s;
      if (unsigned(h) < unsigned(p.in.H) && unsigned(v) < unsigned(p.in.W))
        sum = fmaf(widen(in[h * p.in.h + v]), widen(w[r * p.w_r + s * p.w_s]), sum);
    }
  return sum;
}

// A zero of the band or of the padding may have met an infinity: a lane's outputs that are NaN are made again, product
// by product. The warp's units are those from `first` on.
template <class T, int stride, int columns = kStreamColumns>
__device__ __noinline__ void again(Params const& p, uint32_t task, int first = 0) {
  int const lane = int(threadIdx.x) % 32;
  Walk const at(p, int(task % uint32_t(p.C)), task / uint32_t(p.C));
#pragma unroll 1
  for (int i = first + lane / 4; i < first + kStreamUnits; i += 8) {
    Unit const u(p, i);
    Outputs<T, false, columns> out(p, at, i, lane % 4);
#pragma unroll 1
    for (int y = at.p0; y < at.p0 + at.rows; ++y, out.to += out.row_bytes)
#pragma unroll 1
      for (int e = 0; e < 2; ++e)
        if ((e == 0 ? out.keep[0] : out.keep[1]) && widen(out.elements()[e]) != widen(out.elements()[e]))
          out.elements()[e] =
              narrow<T>(exact<T, stride>(p, at.n0 + u.image, at.c, y, at.q0 + u.place * columns + 2 * (lane % 4) + e));
  }
}

// Rows of outputs that a row of inputs meets.
constexpr int live(int R, int stride) { return (R + stride - 1) / stride; }

// b[k][n] of each filter row: tap k - n * stride - shift, of windows that begin `early` columns before.
template <class T, int R, int stride>
__device__ inline void load_band(Params const& p, int c, uint32_t (&band)[R][stride][2], int early = 0) {
  int const lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int k = 0; k < stride; ++k)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const s = 16 * k + 8 * i + lane % 4 * 2 - lane / 4 * stride - p.shift - early;
      T const* from = static_cast<T const*>(p.w) + c * p.w_k + s * p.w_s;
#pragma unroll
      for (int r = 0; r < R; ++r, from += p.w_r) {
        Vector<T, 2> v{{narrow<T>(0.f), narrow<T>(0.f)}};
        if (r < p.R && unsigned(s) < unsigned(p.S)) v.v[0] = from[0];
        if (r < p.R && unsigned(s + 1) < unsigned(p.S)) v.v[1] = from[p.w_s];
        band[r][k][i] = reinterpret_cast<uint32_t const&>(v);
      }
    }
}

// One element of x, product by product.
template <class T>
__device__ __noinline__ float exact_spread(Params const& p, int64_t n, int c, int y, int x) {
  float sum = 0;
#pragma unroll 1
  for (int r = 0; r < p.R; ++r)
#pragma unroll 1
    for (int s = 0; s < p.S; ++s) {
      int const h = y + p.pad_h - r, w = x + p.pad_left - s;
      if (h % 2 != 0 || w % 2 != 0 || unsigned(h / 2) >= unsigned(p.in.H) || unsigned(w / 2) >= unsigned(p.in.W))
        continue;
      sum = fmaf(widen(static_cast<T const*>(p.in.data)[n * p.in.n + c * p.in.c + h / 2 * p.in.h + w / 2]),
                 widen(static_cast<T const*>(p.w)[c * p.w_k + r * p.w_r + s * p.w_s]), sum);
    }
  return sum;
}

__device__ inline bool on_word(void const* p) { return reinterpret_cast<uint64_t>(p) % 4 == 0; }

// Four neighbouring columns of a unit.
template <class T, bool vectors>
struct SpreadOutputs {
  char* to;  // in row 0
  int x;
  bool keep[vectors ? 1 : 4];

  __device__ SpreadOutputs(Params const& p, Walk const& at, int unit, int t) {
    Unit const u(p, unit);
    x = at.q0 * 2 + u.place * 16 + 4 * t;
    bool const exists = u.exists && at.n0 + u.image < p.N;
    to = reinterpret_cast<char*>(static_cast<T*>(p.out) + (at.n0 + u.image) * p.out_n + at.c * p.out_c + x);
#pragma unroll
    for (int i = 0; i < (vectors ? 1 : 4); ++i) keep[i] = exists && unsigned(x + i) < unsigned(p.out_W);
  }
  __device__ void store(int64_t offset, Vector<T, 4> const& v) const {
    if constexpr (vectors) {
      if (keep[0]) *reinterpret_cast<Vector<T, 4>*>(to + offset) = v;
    } else {
      T* const at = reinterpret_cast<T*>(to + offset);
      bool const low = on_word(at) && keep[0] && keep[1], high = on_word(at) && keep[2] && keep[3];
      bool const middle = !on_word(at) && keep[1] && keep[2];
      if (low) *reinterpret_cast<Vector<T, 2>*>(at) = {{v.v[0], v.v[1]}};
      if (high) *reinterpret_cast<Vector<T, 2>*>(at + 2) = {{v.v[2], v.v[3]}};
      if (middle) *reinterpret_cast<Vector<T, 2>*>(at + 1) = {{v.v[1], v.v[2]}};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (keep[i] && !(i < 2 ? low : high) && !(middle && (i == 1 || i == 2))) at[i] = v.v[i];
    }
  }
};

// A lane's outputs of `spread` that are NaN, product by product.
template <class T>
__device__ __noinline__ void spread_again(Params const& p, uint32_t task, int first = 0) {
  int const g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
  int64_t const row_bytes = p.out_h * int64_t(sizeof(T));
  Walk const walk(p, int(task % uint32_t(p.C)), task / uint32_t(p.C));
#pragma unroll 1
  for (int unit = first + g; unit < first + kStreamUnits; unit += 8) {
    Unit const u(p, unit);
    SpreadOutputs<T, false> const out(p, walk, unit, t);
#pragma unroll 1
    for (int row = walk.p0; row < walk.p0 + walk.rows; ++row)
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        T* const to = reinterpret_cast<T*>(out.to + row * row_bytes) + i;
        bool const inside = u.exists && walk.n0 + u.image < p.N && unsigned(out.x + i) < unsigned(p.out_W);
        if (inside && widen(*to) != widen(*to))
          *to = narrow<T>(exact_spread<T>(p, walk.n0 + u.image, walk.c, row, out.x + i));
      }
  }
}

// Column 2 n + b of x meets, in column k of the window, tap 2 (n + (odd + b) / 2 + low - k) + (odd + b) % 2.
template <class T, int R>
__device__ inline void load_spread_band(Params const& p, int c, uint32_t (&band)[R][2][2], int early = 0) {
  int const lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  int const odd = p.pad_left % 2, low = (p.S - 1) / 2 + p.shift + early;
#pragma unroll
  for (int b = 0; b < 2; ++b)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const s = 2 * (g + (odd + b) / 2 + low - 8 * i - 2 * t) + (odd + b) % 2;  // of the second element 2 less
      T const* from = static_cast<T const*>(p.w) + c * p.w_k + s * p.w_s;
#pragma unroll
      for (int r = 0; r < R; ++r, from += p.w_r) {
        Vector<T, 2> v{{narrow<T>(0.f), narrow<T>(0.f)}};
        if (r < p.R && unsigned(s) < unsigned(p.S)) v.v[0] = from[0];
        if (r < p.R && unsigned(s - 2) < unsigned(p.S)) v.v[1] = from[-2 * p.w_s];
        band[r][b][i] = reinterpret_cast<uint32_t const&>(v);
      }
    }
}

// One tap's sum over the pixels of some walks, by a warp: for those that a zero made NaN.
template <class T, int stride>
__device__ __noinline__ float exact_sum(Params const& p, int c, uint32_t begin, uint32_t end, int r, int s) {
  float sum = 0;
  int const columns = p.span * kStreamColumns;
#pragma unroll 1
  for (uint32_t index = begin; index < end && sum == sum; ++index) {  // a NaN stays one
    Walk const at(p, c, index);
#pragma unroll 1
    for (int64_t n = at.n0; n < at.n0 + p.images && n < p.N; ++n)
#pragma unroll 1
      for (int pixel = int(threadIdx.x) % 32; pixel < at.rows * columns; pixel += 32) {
        int const y = at.p0 + pixel / columns, x = at.q0 + pixel % columns;
        int const h = y * stride - p.pad_h + r, w = x * stride - p.pad_w + s;
        if (unsigned(x) >= unsigned(p.out_W) || unsigned(h) >= unsigned(p.in.H) || unsigned(w) >= unsigned(p.in.W))
          continue;
        sum = fmaf(widen(static_cast<T const*>(p.in.data)[n * p.in.n + c * p.in.c + h * p.in.h + w]),
                   widen(static_cast<T const*>(p.y.data)[n * p.y.n + c * p.y.c + y * p.y.h + x]), sum);
      }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

// The end of wgrad, by a block's warps: acc[r][k] are the sums of products of input 16 k + i and output j of a unit,
// which belong to tap i - j * stride - shift.
template <class T, int R, int stride>
__device__ inline void store_sums(Params const& p, int c, int split, uint32_t begin, uint32_t end,
                                  float const (&acc)[R][stride][4], unsigned char* shared) {
  int const lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4, warp = int(threadIdx.x) / 32;
  __syncthreads();
  float (*const sums)[R][16 * stride][kStreamColumns + 1] =
      reinterpret_cast<float (*)[R][16 * stride][kStreamColumns + 1]>(shared);
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int k = 0; k < stride; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[warp][r][16 * k + g + j / 2 * 8][2 * t + j % 2] = acc[r][k][j];
  __syncthreads();
  bool nan = false;
  for (int i = threadIdx.x; i < p.R * p.S; i += blockDim.x) {
    int const r = i / p.S, s = i % p.S;
    float sum = 0;
#pragma unroll 1
    for (int other = 0; other < kStreamWarps; ++other)
#pragma unroll
      for (int j = 0; j < kStreamColumns; ++j) sum += sums[other][r][s + p.shift + j * stride][j];
    nan = nan || sum != sum;
    depthwise::store_sum<T>(p.out, p.partial, p.splits, c * p.w_k + r * p.w_r + s * p.w_s,
                            (int64_t(split) * p.C + c) * p.R * p.S + i, sum);
  }
  if (__syncthreads_or(nan) == 0) return;
#pragma unroll 1
  for (int i = warp; i < p.R * p.S; i += kStreamWarps) {
    int const r = i / p.S, s = i % p.S;
    float const sum = exact_sum<T, stride>(p, c, begin, end, r, s);
    if (lane == 0)
      depthwise::store_sum<T>(p.out, p.partial, p.splits, c * p.w_k + r * p.w_r + s * p.w_s,
                              (int64_t(split) * p.C + c) * p.R * p.S + i, sum);
  }
}

inline Source source_of(void const* data, Strides const& s, Problem const& p, int H, int W, int64_t element) {
  int64_t const last = (p.N - 1) * s.n + (p.C - 1) * s.c + (H - 1) * s.h + W;
  return {data, s.n, s.c, s.h, 1, H, W, static_cast<char const*>(data) + last * element};
}

}  // namespace conv2d_ext::stream
