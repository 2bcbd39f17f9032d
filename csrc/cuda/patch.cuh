// Copies images in any strides to padded patches and back (core/patch.h). A thread moves 16 bytes of a patch, or, back
// to planes, fills pixels that lie side by side.
#pragma once

#include "../core/patch.h"
#include "launch.h"
#include "types.cuh"

namespace conv2d_ext::patch {

constexpr int kThreads = 256;
constexpr int kFilledSteps = 16;  // of a thread, at most

struct Params;

// Of a result whose planes have no gaps, or a step from one to another.
struct Pixel {
  int n = 0, c = 0, h = 0, w = 0;

  Pixel() = default;
  __host__ __device__ Pixel(int n, int c, int h, int w) : n(n), c(c), h(h), w(w) {}
  __host__ __device__ Pixel(int64_t at, Params const& p);
  __device__ bool advance(Pixel const& step, Params const& p);  // to another plane?
};

struct Params {
  void* image;
  void* patches;
  int64_t n, c, h, w;  // element strides of the image
  int C, H, W, R, S, P, Q;
  int stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int length;                    // 16 bytes of a patch
  bool channels_first, vectors;  // vectors: 16 bytes of a patch lie together in the image
  int64_t count;                 // of 16 bytes of patches, or of pixels that are filled
  Pixel step;                    // from what a thread fills to the next
  int steps;                     // of a thread
};

__host__ __device__ inline Pixel::Pixel(int64_t at, Params const& p) {
  int64_t const plane = at / (p.H * p.W);
  int const pixel = int(at - plane * (p.H * p.W));
  n = int(plane / p.C), c = int(plane - int64_t(n) * p.C), h = pixel / p.W, w = pixel - h * p.W;
}

__device__ inline bool Pixel::advance(Pixel const& step, Params const& p) {
  auto add = [](int& to, int more, int extent, int carry) {
    to += more + carry;
    bool const wraps = to >= extent;
    if (wraps) to -= extent;
    return int(wraps);
  };
  int const carry = add(h, step.h, p.H, add(w, step.w, p.W, 0));
  if (carry + step.c + step.n == 0) return false;
  n += step.n + add(c, step.c, p.C, carry);
  return true;
}

// Places of the rows' table: whole vectors.
__host__ __device__ inline int filled_rows(int H) { return (H + 3) / 4 * 4; }

template <class T, bool back>
__global__ void __launch_bounds__(kThreads) copy(__grid_constant__ Params const p) {
  constexpr int lanes = 16 / int(sizeof(T));
  int64_t const i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.count) return;
  int64_t const patch = i / p.length, row = patch / p.Q, n = row / p.P;
  int const e = int(i - patch * p.length) * lanes, left = p.C * p.R * p.S - e;
  int const first_h = int(row - n * p.P) * p.stride_h - p.pad_top,
            first_w = int(patch - row * p.Q) * p.stride_w - p.pad_left;
  int c, r, s;
  if (p.channels_first)
    c = e / (p.R * p.S), r = e / p.S % p.R, s = e % p.S;
  else
    r = e / (p.S * p.C), s = e / p.C % p.S, c = e % p.C;
  // Null in the padding.
  auto address = [&]() -> T* {
    int const h = first_h + r * p.dilation_h, w = first_w + s * p.dilation_w;
    bool const inside = unsigned(h) < unsigned(p.H) && unsigned(w) < unsigned(p.W);
    return inside ? static_cast<T*>(p.image) + n * p.n + c * p.c + h * p.h + w * p.w : nullptr;
  };
  uint4* const packed = static_cast<uint4*>(p.patches) + i;
  if (p.vectors) {
    auto* const plain = reinterpret_cast<uint4*>(address());
    if constexpr (back) {
      if (plain != nullptr) *plain = *packed;
    } else {
      *packed = plain != nullptr ? *plain : make_uint4(0, 0, 0, 0);
    }
    return;
  }
  Vector<T, lanes> v;
  if constexpr (back) v = *reinterpret_cast<Vector<T, lanes> const*>(packed);
#pragma unroll
  for (int k = 0; k < lanes; ++k) {
    T* const element = k < left ? address() : nullptr;
    if constexpr (back) {
      if (element != nullptr) *element = v.v[k];
    } else {
      v.v[k] = element != nullptr ? *element : T(0);
    }
    if (p.channels_first) {
      if (++s == p.S) s = 0, ++r;
      if (r == p.R) r = 0, ++c;
    } else {
      if (++c == p.C) c = 0, ++s;
      if (s == p.S) s = 0, ++r;
    }
  }
  if constexpr (!back) *packed = *reinterpret_cast<uint4 const*>(&v);
}

// For each coordinate of an axis of the image, where its elements are in the patches; nothing where there are none.
__device__ inline void find_elements(int* to, int extent, int patches, int taps, int stride, int dilation, int pad,
                                     int of_patch, int of_tap) {
  for (int i = int(threadIdx.x); i < patches * taps; i += kThreads) {
    int const patch = i / taps, tap = i - patch * taps, at = patch * stride + tap * dilation - pad;
    if (unsigned(at) < unsigned(extent)) to[at] = patch * of_patch + tap * of_tap;
  }
}

// Fills planes without gaps, V pixels side by side by a thread: of one row, or a word of them that may be of two.
template <class T, int V, bool one_row>
__global__ void __launch_bounds__(kThreads) fill_planes(__grid_constant__ Params const p) {
  static_assert(one_row || V * sizeof(T) == 4);
  extern __shared__ int4 tables[];  // of rows, of columns; -1: in no patch
  int* const rows = reinterpret_cast<int*>(tables);
  int* const columns = rows + filled_rows(p.H);
  for (int i = int(threadIdx.x); i < filled_rows(p.H) + p.W; i += kThreads) rows[i] = -1;
  __syncthreads();
  int const elements = p.length * (16 / int(sizeof(T))), of_s = p.channels_first ? 1 : p.C;
  find_elements(rows, p.H, p.P, p.R, p.stride_h, p.dilation_h, p.pad_top, p.Q * elements, p.S * of_s);
  find_elements(columns, p.W, p.Q, p.S, p.stride_w, p.dilation_w, p.pad_left, elements, of_s);
  __syncthreads();

  int64_t const image = int64_t(p.P) * p.Q * elements;
  int const of_c = p.channels_first ? p.R * p.S : 1;
  auto plane = [&](Pixel const& at) { return static_cast<T const*>(p.patches) + at.n * image + at.c * of_c; };
  auto value = [](T const* from, int row, int column) {
    return (row | column) < 0 ? T(0) : __ldg(from + row + column);
  };
  int64_t i = (int64_t(blockIdx.x) * p.steps * kThreads + threadIdx.x) * V;
  Pixel at(i, p);
  T const* from = plane(at);
#pragma unroll 2
  for (int step = 0; step < p.steps && i < p.count; ++step, i += kThreads * V) {
    Vector<T, V> v;
    if constexpr (one_row) {
      Vector<int, V> const column = *reinterpret_cast<Vector<int, V> const*>(columns + at.w);
      int const row = rows[at.h];
#pragma unroll
      for (int k = 0; k < V; ++k) v.v[k] = value(from, row, column.v[k]);
    } else {
      v.v[0] = value(from, rows[at.h], columns[at.w]);
      if constexpr (V == 2) {
        Pixel next = at;
        bool const other = next.advance({0, 0, 0, 1}, p);
        v.v[1] = i + 1 < p.count ? value(other ? plane(next) : from, rows[next.h], columns[next.w]) : T(0);
      }
    }
    T* const to = static_cast<T*>(p.image) + i;
    if (one_row || i + V <= p.count)
      *reinterpret_cast<Vector<T, V>*>(to) = v;
    else
      *to = v.v[0];
    if (at.advance(p.step, p)) from = plane(at);
  }
}

template <class T, int V, bool one_row>
cudaError_t fill(Params p, Problem const& problem, cudaStream_t stream) {
  int64_t const step = kThreads * V;  // from a thread's pixels to its next ones
  p.count = problem.N * problem.C * problem.H * problem.W;
  p.step = Pixel(step, p);
  p.steps = int(min64(ceil_div(p.count, step * 8 * 132), kFilledSteps));  // a round of blocks on an H200, if few
  int const bytes = (filled_rows(p.H) + p.W) * 4;
  fill_planes<T, V, one_row><<<unsigned(ceil_div(p.count, step * p.steps)), kThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_planes(Params const& p, Problem const& problem, cudaStream_t stream) {
  return p.W % 4 == 0 ? fill<T, 4, true>(p, problem, stream) : fill<T, 4 / sizeof(T), false>(p, problem, stream);
}

// back: of patches that share no input; what none has is set to zero.
template <bool back>
cudaError_t launch(Problem const& problem, void const* image, void* patches, cudaStream_t stream) {
  int const size = size_of(problem.dtype), lanes = 16 / size;
  Strides const& s = problem.x;
  Params p{};
  p.image = const_cast<void*>(image), p.patches = patches;
  p.n = s.n, p.c = s.c, p.h = s.h, p.w = s.w;
  p.C = int(problem.C), p.H = int(problem.H), p.W = int(problem.W), p.R = int(problem.R), p.S = int(problem.S);
  p.P = int(problem.P()), p.Q = int(problem.Q());
  p.stride_h = int(problem.stride_h), p.stride_w = int(problem.stride_w);
  p.dilation_h = int(problem.dilation_h), p.dilation_w = int(problem.dilation_w);
  p.pad_top = int(problem.pad_top), p.pad_left = int(problem.pad_left);
  p.length = int(patch_length(problem) / lanes);
  p.count = problem.N * problem.P() * problem.Q() * p.length;
  p.channels_first = filters_channels_first(problem);
  p.vectors = patch_vectors(problem);
  if (back && patch_fills_planes(problem))
    return size == 2 ? launch_planes<uint16_t>(p, problem, stream) : launch_planes<uint32_t>(p, problem, stream);
  if (back && !patch_fills(problem)) {
    auto const bytes = size_t(problem.N * problem.C * problem.H * problem.W * size);
    if (auto const error = cudaMemsetAsync(p.image, 0, bytes, stream)) return error;
  }
  auto* const kernel = size == 2 ? copy<uint16_t, back> : copy<uint32_t, back>;
  kernel<<<unsigned(ceil_div(p.count, kThreads)), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::patch
