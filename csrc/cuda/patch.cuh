// Copies images in any strides to padded patches and back (core/patch.h). A thread moves 16 bytes of a patch.
#pragma once

#include "../core/patch.h"
#include "launch.h"
#include "types.cuh"

namespace conv2d_ext::patch {

constexpr int kThreads = 256;

struct Params {
  void* image;
  void* patches;
  int64_t n, c, h, w;  // element strides of the image
  int C, H, W, R, S, P, Q;
  int stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int length;                    // 16 bytes of a patch
  bool channels_first, vectors;  // vectors: 16 bytes of a patch lie together in the image
  int64_t count;                 // of 16 bytes
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
    if constexpr (back)
      *plain = *packed;
    else
      *packed = plain != nullptr ? *plain : make_uint4(0, 0, 0, 0);
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
  if (back && (problem.P() * problem.R != problem.H || problem.Q() * problem.S != problem.W)) {
    auto const bytes = size_t(problem.N * problem.C * problem.H * problem.W * size);
    if (auto const error = cudaMemsetAsync(p.image, 0, bytes, stream)) return error;
  }
  auto* const kernel = size == 2 ? copy<uint16_t, back> : copy<uint32_t, back>;
  kernel<<<unsigned(ceil_div(p.count, kThreads)), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::patch
