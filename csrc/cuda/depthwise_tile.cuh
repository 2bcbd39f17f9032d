// The tiles of depthwise.cuh: which inputs an output meets, parameters, copies to shared memory and reads from it.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "launch.h"
#include "types.cuh"

namespace conv2d_ext::depthwise {

constexpr int kMaxThreads = 256;
constexpr int kQuad = 4;                 // elements that a lane reads from shared memory at once
constexpr int kSharedBytes = 74 * 1024;  // three blocks fit an SM of 227 KB; a GPU of 8.x still fits one
constexpr int kMaxPlanes = 128;

// Quotients of numbers whose product with the divisor is below 2^32.
struct Divisor {
  uint32_t value = 1, magic = 0;
  Divisor() = default;
  explicit Divisor(uint32_t d) : value(d), magic(d == 1 ? 0 : uint32_t(((uint64_t(1) << 32) + d - 1) / d)) {}
  __device__ uint32_t quotient(uint32_t n) const { return magic == 0 ? n : __umulhi(n, magic); }
};

__device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int modulo(int64_t a, int64_t b) { return int((a % b + b) % b); }

// Along one axis: which input, counted from the tile's first, a thread's a-th output meets with tap r.
//   fprop, wgrad: a * stride + r     dgrad: (a + parity - r) / stride + low where that divides, else none
template <Op op, int R, int stride>
struct Axis {
  static constexpr bool backward = op == Op::dgrad;
  static constexpr int parity =
      backward ? (R - 1) / 2 % stride : 0;  // of 'same' padding; other paddings shift the tile
  static constexpr int low = backward ? (R - 1 - parity) / stride : 0;

  __host__ __device__ static constexpr int index(int a, int r) {
    if (!backward) return a * stride + r;
    int const t = a + parity - r;
    return t % stride != 0 ? -1 : t / stride + low;
  }
  // The inverse: the tap with which output a meets an input; R or more, or negative: none.
  __host__ __device__ static constexpr int tap(int a, int input) {
    return backward ? a + parity - (input - low) * stride : input - a * stride;
  }
  // How many inputs `count` neighbouring outputs meet, and how far the inputs of `count` outputs are from the next's.
  __host__ __device__ static constexpr int extent(int count) {
    return backward ? (count - 1 + parity) / stride + low + 1 : (count - 1) * stride + R;
  }
  __host__ __device__ static constexpr int advance(int count) { return backward ? count / stride : count * stride; }
  // The first output of the first tile, and the input coordinate of its index 0.
  static constexpr int64_t origin(int64_t pad) { return backward ? -((pad + parity) % stride) : 0; }
  static constexpr int64_t start(int64_t pad) { return backward ? (origin(pad) + pad - parity) / stride - low : -pad; }
};

// One thread's outputs. 7 rows: images of 7 * 2^i rows leave no row of a tile empty; dgrad with stride 2 needs pairs.
template <Op op, int R, int stride>
struct Patch {
  using A = Axis<op, R, stride>;
  static constexpr bool pairs = op == Op::dgrad && stride == 2;
  static constexpr int TH = pairs ? 4 : 7, TW = pairs ? 8 : 4;
  static constexpr int IH = A::extent(TH), IW = A::extent(TW);
  // A strip's inputs begin at this column of a quad where the padding is 'same'.
  static constexpr int shift = modulo(A::start((R - 1) / 2), kQuad);
  static constexpr int quads = (shift + IW + kQuad - 1) / kQuad;
  static_assert(A::advance(TW) % kQuad == 0 && TW % kQuad == 0);
};

// A tensor as a block copies it to shared memory: `rows` rows of `pitch` columns of each plane.
struct Source {
  void const* data;
  int64_t n, c, h, w;    // element strides
  int H, W;              // extents
  int start_h, start_w;  // coordinate of the tile's first row and column for the first tile; may be negative
  int step_h, step_w;    // from tile to tile
  int rows, pitch;
  int width;        // elements of one copy
  int lanes_log2;   // threads that share a row
  Divisor rows_of;  // by `rows`
  // One tile an image: copies are counted over the image, so that no thread waits beside a short row.
  bool whole;
  Divisor image_copies, row_copies;  // of an image, of a row
};

struct Params {
  Source in, y;  // y: wgrad alone
  void const* w;
  void const* bias;
  void* out;      // of fprop and dgrad
  void* partial;  // of wgrad: [split][c][tap]
  int64_t w_c, w_r, w_s, bias_stride;
  int64_t in_m, w_m;  // dgrad: from one filter of a channel to the next
  int multiplier;
  int64_t out_n, out_c, out_h, out_w;
  int out_H, out_W, origin_h, origin_w;
  int out_width;  // elements of one store
  int64_t N;
  int C;
  int strips, row_groups, planes;  // of a block
  Divisor per_plane, per_row;      // by strips * row_groups, by strips
  int tiles_h, tiles_w, channel_units, image_units;
  int lead;  // columns before a tile's first quad
  int splits;
  int weight_bytes, y_offset;  // shared memory: filters, tile of in, tile of y
};

// Copies E elements, of which `valid` are in the tensor, or zeros.
template <class T, int E>
__device__ inline void copy(T* to, T const* from, int valid) {
  if constexpr (sizeof(T) * E >= 4)
    __pipeline_memcpy_async(to, from, sizeof(T) * E, sizeof(T) * (E - valid));
  else
    *to = valid > 0 ? *from : narrow<T>(0.f);
}

template <class T, int E>
__device__ inline void fill(Source const& s, T const* base, int64_t plane_stride, int planes, int present, int h0,
                            int w0, T* tile) {
  int const lanes = 1 << s.lanes_log2, lane = int(threadIdx.x) & (lanes - 1);
  int const step = int(blockDim.x) >> s.lanes_log2;
#pragma unroll 2
  for (int row = int(threadIdx.x) >> s.lanes_log2; row < planes * s.rows; row += step) {
    int const plane = int(s.rows_of.quotient(row)), h = h0 + row - plane * s.rows;
    bool const inside = plane < present && unsigned(h) < unsigned(s.H);
    T const* const from = base + (inside ? plane * plane_stride + h * s.h : 0);
    T* const to = tile + row * s.pitch;
#pragma unroll 2
    for (int i = lane; i < s.pitch / E; i += lanes) {
      int const w = w0 + i * E;
      int valid = w < 0 ? 0 : s.W - w;
      valid = !inside || valid < 0 ? 0 : valid > E ? E : valid;
      copy<T, E>(to + i * E, valid > 0 ? from + w : base, valid);
    }
  }
}

// The same for a whole image, into a tile that holds zeros around it.
template <class T, int E>
__device__ inline void fill_whole(Source const& s, T const* base, int64_t plane_stride, int present, T* tile) {
  constexpr int batch = sizeof(T) * E >= 4 ? 1 : 4;  // loads through registers, several on their way
  int const total = present * int(s.image_copies.value);
  for (int first = threadIdx.x; first < total; first += batch * int(blockDim.x)) {
    T const* from[batch];
    T* to[batch];
    int valid[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      int const i = first + j * int(blockDim.x);
      valid[j] = 0;
      if (i >= total) continue;
      int const plane = int(s.image_copies.quotient(i)), rest = i - plane * int(s.image_copies.value);
      int const h = int(s.row_copies.quotient(rest)), w = (rest - h * int(s.row_copies.value)) * E;
      from[j] = base + plane * plane_stride + h * s.h + w;
      to[j] = tile + (plane * s.rows + h - s.start_h) * s.pitch + w - s.start_w;
      valid[j] = s.W - w < E ? s.W - w : E;
    }
    if constexpr (batch == 1) {
      copy<T, E>(to[0], from[0], valid[0]);
    } else {
      T v[batch];
#pragma unroll
      for (int j = 0; j < batch; ++j)
        if (valid[j] > 0) v[j] = *from[j];
#pragma unroll
      for (int j = 0; j < batch; ++j)
        if (valid[j] > 0) *to[j] = v[j];
    }
  }
}

template <class T>
__device__ inline void clear(T* tile, int elements) {
  float4* const to = reinterpret_cast<float4*>(tile);
  for (int i = threadIdx.x; i < elements * int(sizeof(T)) / 16; i += blockDim.x) to[i] = make_float4(0, 0, 0, 0);
}

template <class T>
__device__ inline void fill(Source const& s, T const* base, int64_t plane_stride, int planes, int present, int h0,
                            int w0, T* tile) {
  constexpr int most = 16 / int(sizeof(T));
  if (s.whole) {
    if (s.width == most) fill_whole<T, most>(s, base, plane_stride, present, tile);
    if constexpr (most > 4)
      if (s.width == 4) fill_whole<T, 4>(s, base, plane_stride, present, tile);
    if (s.width == 2) fill_whole<T, 2>(s, base, plane_stride, present, tile);
    if (s.width == 1) fill_whole<T, 1>(s, base, plane_stride, present, tile);
    return;
  }
  if (s.width == most) fill<T, most>(s, base, plane_stride, planes, present, h0, w0, tile);
  if constexpr (most > 4)
    if (s.width == 4) fill<T, 4>(s, base, plane_stride, planes, present, h0, w0, tile);
  if (s.width == 2) fill<T, 2>(s, base, plane_stride, planes, present, h0, w0, tile);
  if (s.width == 1) fill<T, 1>(s, base, plane_stride, planes, present, h0, w0, tile);
}

// A thread's `count` inputs of a row, in quads.
template <class T, int count, int shift>
__device__ inline void load_row(T const* from, float (&in)[count]) {
#pragma unroll
  for (int quad = 0; quad < (shift + count + kQuad - 1) / kQuad; ++quad) {
    Vector<T, kQuad> const v = *reinterpret_cast<Vector<T, kQuad> const*>(from + quad * kQuad);
#pragma unroll
    for (int e = 0; e < kQuad; ++e) {
      int const j = quad * kQuad + e - shift;
      if (j >= 0 && j < count) in[j] = widen(v.v[e]);
    }
  }
}

}  // namespace conv2d_ext::depthwise
