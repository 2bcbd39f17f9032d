// Planes in shared memory for band.cuh, band_wgrad.cuh and strip.cuh: one channel of one image each, rows on multiples
// of 16 bytes that are odd ones, so that 8 neighbouring rows are read without a bank conflict, 16 bytes of each. Rows
// are stored by their remainder mod D: a kernel reads rows that are D apart at once.
#pragma once

#include "../core/band.h"
#include "depthwise.cuh"
#include "ptx.cuh"

namespace conv2d_ext::band {

using depthwise::Divisor;

// A tensor as a block copies it.
struct Source {
  void const* data;
  int64_t n, c, h, w;  // element strides
  int64_t N;
  int H, W;
  int step_h = 1, step_w = 1;  // only every so many of the H rows and W columns exist, those between are zeros
  int pitch, rows;             // elements of a row; rows of each remainder
  int width;                   // elements of one copy: columns (nchw) or channels (nhwc); a vector of 16 bytes, 2 or 1
  Divisor copies_of_row, copies_of_plane;
};

// Which part of it: first row and column, which may be outside the image; channels and images.
struct Window {
  int h0, w0, c0, channels, images;
  int64_t n0;
};

template <class T>
__device__ inline void clear(T* to, int bytes) {
  float4* const v = reinterpret_cast<float4*>(to);
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) v[i] = make_float4(0, 0, 0, 0);
}

// A row's place in its plane.
template <int D>
__device__ inline int row_place(int rows, int row) {
  return row % D * rows + row / D;
}

// Copies what of the window is in the image. E elements of a row at a time, or (`pixels`) 8 channels of two
// neighbouring pixels, which go to 8 planes. Planes are [channel][image]. A thread takes the same place of several
// planes: the block is cut into parts that are as large as a plane has copies.
template <class T, int D, int E, bool pixels, int pairs>
__device__ inline void copy_window(Source const& s, Window const& at, unsigned char* planes, int plane_bytes) {
  constexpr int vector = 16 / int(sizeof(T));
  constexpr int batch = E * sizeof(T) < 4 ? 4 : pixels ? pairs : 1;  // loads through registers, several on their way
  int const row0 = at.h0 < 0 ? -at.h0 : 0, column0 = at.w0 < 0 ? -at.w0 : 0, copies = int(s.copies_of_plane.value);
  int const part = copies >= int(blockDim.x) ? int(blockDim.x) : (copies + 31) / 32 * 32;
  int const parts = int(blockDim.x) / part, which = int(threadIdx.x) / part;
  int const images = s.N - at.n0 < at.images ? int(s.N - at.n0) : at.images;
  if (which >= parts) return;
  for (int i = int(threadIdx.x) - which * part; i < copies; i += part) {
    int const y = int(s.copies_of_row.quotient(i)), x = (i - y * int(s.copies_of_row.value)) * E;
    int const row = row0 + y, column = column0 + x, h = at.h0 + row, w = at.w0 + column;
    if (row >= s.rows * D || column >= s.pitch || h >= s.H || w >= s.W) continue;
    unsigned char* const to = planes + (row_place<D>(s.rows, row) * s.pitch + column) * int(sizeof(T));
    T const* from = static_cast<T const*>(s.data) + at.n0 * s.n + at.c0 * s.c;
    if (E == 1 && (s.step_h > 1 || s.step_w > 1)) {
      if (h % s.step_h != 0 || w % s.step_w != 0) continue;
      from += h / s.step_h * s.h + w / s.step_w * s.w;
    } else {
      from += h * s.h + w * s.w;
    }
    int const valid = s.W - w < E ? s.W - w : E;
    for (int c = 0; c < (pixels ? 1 : at.channels); ++c) {
      for (int first = which; first < images; first += parts * batch) {
        if constexpr (batch == 1 && !pixels) {
          depthwise::copy<T, E>(reinterpret_cast<T*>(to + (c * at.images + first) * plane_bytes),
                                from + first * s.n + c * s.c, valid);
        } else if constexpr (!pixels) {
          T v[batch];
#pragma unroll
          for (int j = 0; j < batch; ++j)
            if (first + j * parts < images) v[j] = from[(first + j * parts) * s.n + c * s.c];
#pragma unroll
          for (int j = 0; j < batch; ++j)
            if (first + j * parts < images)
              *reinterpret_cast<T*>(to + (c * at.images + first + j * parts) * plane_bytes) = v[j];
        } else {
          Vector<T, vector> v[batch][2];
#pragma unroll
          for (int j = 0; j < batch; ++j) {
            v[j][1] = {};
            if (first + j * parts >= images) continue;
            T const* const pixel = from + (first + j * parts) * s.n;
            v[j][0] = *reinterpret_cast<Vector<T, vector> const*>(pixel);
            if (valid > 1) v[j][1] = *reinterpret_cast<Vector<T, vector> const*>(pixel + s.w);
          }
#pragma unroll
          for (int j = 0; j < batch; ++j) {
            if (first + j * parts >= images) continue;
#pragma unroll
            for (int k = 0; k < vector; ++k) {
              T* const pair = reinterpret_cast<T*>(to + (k * at.images + first + j * parts) * plane_bytes);
              if constexpr (sizeof(T) == 2) {  // those windows begin on multiples of 8
                *reinterpret_cast<Vector<T, 2>*>(pair) = Vector<T, 2>{{v[j][0].v[k], v[j][1].v[k]}};
              } else {
                pair[0] = v[j][0].v[k];
                if (valid > 1 && column + 1 < s.pitch) pair[1] = v[j][1].v[k];
              }
            }
          }
        }
      }
    }
  }
}

// `pairs`: of pixels that a thread loads at once.
template <class T, int D, bool nhwc, int pairs = 2>
__device__ inline void fill(Source const& s, Window const& at, unsigned char* planes, int plane_bytes) {
  if (s.width == 1) return copy_window<T, D, 1, false, 1>(s, at, planes, plane_bytes);
  if constexpr (nhwc) {
    copy_window<T, D, 2, true, pairs>(s, at, planes, plane_bytes);
  } else {
    constexpr int vector = 16 / int(sizeof(T));
    if (s.width == vector) return copy_window<T, D, vector, false, 1>(s, at, planes, plane_bytes);
    if constexpr (sizeof(T) == 2) copy_window<T, D, 2, false, 1>(s, at, planes, plane_bytes);
  }
}

// ---- host side

// `rows`, `pitch`: of the plane; `vectors`: nchw: tiles begin on a multiple of 16 bytes; nhwc: a block's channels are a
// whole vector. `H`, `W`: of the tensor, whose rows and columns are steps apart.
template <class T>
Source source_of(Strides const& strides, void const* data, int64_t N, int64_t H, int64_t W, bool nhwc, int align,
                 bool vectors, int depth, int rows, int pitch, int64_t step_h = 1, int64_t step_w = 1) {
  constexpr int element = int(sizeof(T)), vector = 16 / element;
  auto aligned = [&](int bytes) { return depthwise::rows_aligned(strides, nhwc, align, bytes, element); };
  Source s{};
  H = spread_extent(H, step_h), W = spread_extent(W, step_w);
  s.step_h = int(step_h), s.step_w = int(step_w);
  s.data = data, s.n = strides.n, s.c = strides.c, s.h = strides.h, s.w = nhwc ? strides.w : 1;
  s.N = N, s.H = int(H), s.W = int(W), s.rows = rows, s.pitch = pitch;
  bool const whole = step_h == 1 && step_w == 1;
  s.width = !whole ? 1 : vectors && aligned(16) ? vector : !nhwc && element == 2 && aligned(4) ? 2 : 1;
  int const columns = nhwc ? (s.width == vector ? 2 : 1) : s.width;
  int64_t const copies = ceil_div(min64(pitch, W), columns);
  s.copies_of_row = Divisor(uint32_t(copies));
  s.copies_of_plane = Divisor(uint32_t(copies * min64(int64_t(rows) * depth, H)));
  return s;
}

}  // namespace conv2d_ext::band
