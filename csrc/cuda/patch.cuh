// Copies images in any strides to padded patches and back (core/patch.h). A thread moves 16 bytes of a patch, or, back
// to planes, fills pixels that lie side by side.
#pragma once

#include "../core/patch.h"
#include "launch.h"
#include "types.cuh"

namespace conv2d_ext::patch {

constexpr int kThreads = 256;
constexpr int kFilledRows = 4;  // of a warp

struct Params {
  void* image;
  void* patches;
  int64_t n, c, h, w;  // element strides of the image
  int C, H, W, R, S, P, Q;
  int stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int length;                    // 16 bytes of a patch
  bool channels_first, vectors;  // vectors: 16 bytes of a patch lie together in the image
  int64_t count;                 // of 16 bytes
  uint32_t rows;                 // of all planes
};

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

// The patch and the tap that meet a coordinate of one axis, counted from the padding; no patch: `count`.
struct Met {
  int patch, tap;
  __device__ Met(int at, int taps, int stride, int dilation, int count) : patch(count), tap(0) {
    for (; tap < taps && at >= 0; ++tap, at -= dilation)
      if (at % stride == 0 && at / stride < count) {
        patch = at / stride;
        return;
      }
  }
};

// Each warp fills rows of planes, V pixels of a lane at a time. Where a column's pixels are in the patches of a row is
// worked out once.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) fill_planes(__grid_constant__ Params const p) {
  __shared__ alignas(16) int columns[kMostFilledColumns];  // -1: in no patch
  int const elements = p.length * (16 / int(sizeof(T)));
  for (int w = int(threadIdx.x); w < p.W; w += kThreads) {
    Met const at(w + p.pad_left, p.S, p.stride_w, p.dilation_w, p.Q);
    columns[w] = at.patch < p.Q ? at.patch * elements + at.tap * (p.channels_first ? 1 : p.C) : -1;
  }
  __syncthreads();
  uint32_t const first = (blockIdx.x * (kThreads / 32) + threadIdx.x / 32) * kFilledRows;
  for (uint32_t i = first; i < first + kFilledRows && i < p.rows; ++i) {
    uint32_t const plane = i / uint32_t(p.H), n = plane / uint32_t(p.C);
    int const h = int(i - plane * p.H), c = int(plane - n * p.C);
    Met const at(h + p.pad_top, p.R, p.stride_h, p.dilation_h, p.P);
    T const* const from = static_cast<T const*>(p.patches) + (int64_t(n) * p.P + at.patch) * p.Q * elements +
                          (p.channels_first ? (c * p.R + at.tap) * p.S : at.tap * p.S * p.C + c);
    T* const to = static_cast<T*>(p.image) + n * p.n + c * p.c + h * p.h;
#pragma unroll 4
    for (int w = int(threadIdx.x) % 32 * V; w < p.W; w += 32 * V) {
      Vector<int, V> const column = *reinterpret_cast<Vector<int, V> const*>(columns + w);
      Vector<T, V> v = {};
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (at.patch < p.P && column.v[k] >= 0) v.v[k] = from[column.v[k]];
      *reinterpret_cast<Vector<T, V>*>(to + w) = v;
    }
  }
}

// Of rows without gaps, which are written once, whole.
template <class T>
cudaError_t launch_planes(Params p, Problem const& problem, cudaStream_t stream) {
  auto fits = [&](int v) {
    return p.W % v == 0 && p.n % v == 0 && p.c % v == 0 && p.h % v == 0 && problem.x_align >= v * int(sizeof(T));
  };
  p.rows = uint32_t(problem.N * problem.C * problem.H);
  auto* const kernel = fits(4) ? fill_planes<T, 4> : fits(2) ? fill_planes<T, 2> : fill_planes<T, 1>;
  kernel<<<unsigned(ceil_div(p.rows, kFilledRows * (kThreads / 32))), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
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
  p.channels_first = patch_channels_first(problem);
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
