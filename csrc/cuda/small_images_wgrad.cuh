// wgrad of 3x3 filters over one small image in strict float32, by FMA, in any strides. A block has all taps of 32
// filters by 16 channels; it copies the pixels that the taps meet, padding included, and y's to shared memory. A thread
// sums the taps of a channel for four filters. Where the weights lie tap by tap they pass through shared memory.
#pragma once

#include "../core/small_images.h"
#include "launch.h"

namespace conv2d_ext::small_images {

constexpr int kThreads = 128, kFilters = kSmallFilters, kChannels = kSmallChannels, kEach = 4, kRow = kChannels * 9,
              kRowPitch = kRow + 4;  // 16 rows further begin 16 banks further
static_assert(kThreads == kFilters / kEach * kChannels);

struct Params {
  float const *x, *y;
  float* out;
  Strides x_at, y_at, w_at;
  int C, K, H, W, P, Q, pad_top, pad_left;
  int image_H, image_W, channel;  // in shared memory
  bool whole;                     // filters of whole vectors, channel by channel
};

// A weight, product by product, until it is NaN.
__device__ inline float sum_again(Params const& p, int k, int c, int r, int s) {
  float sum = 0;
  for (int at = 0; at < p.P * p.Q && sum == sum; ++at) {
    int const i = at / p.Q, j = at - i * p.Q, h = i + r - p.pad_top, w = j + s - p.pad_left;
    if (h >= 0 && h < p.H && w >= 0 && w < p.W)
      sum += p.x[c * p.x_at.c + h * p.x_at.h + w * p.x_at.w] * p.y[k * p.y_at.c + i * p.y_at.h + j * p.y_at.w];
  }
  return sum;
}

// Sixteen loads of a thread at once. of: an element's address, null for zero, and its place.
template <class Of>
__device__ inline void copy(int count, float* to, Of const& of) {
  constexpr int batch = 16;
  for (int first = int(threadIdx.x); first < count; first += batch * kThreads) {
    float v[batch];
    int place[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      int const at = first + i * kThreads;
      float const* const from = at < count ? of(at, place[i]) : nullptr;
      v[i] = from != nullptr ? __ldg(from) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < batch; ++i)
      if (first + i * kThreads < count) to[place[i]] = v[i];
  }
}

// One image of a block's channels and filters.
__device__ inline void copy_image(Params const& p, int c0, int k0, float* image, float* pixels) {
  int const whole = p.image_H * p.image_W, outputs = p.P * p.Q;
  float const *const x = p.x + c0 * p.x_at.c, *const y = p.y + k0 * p.y_at.c;
  copy(outputs * kFilters, pixels, [&](int at, int& place) {
    int const k = p.y_at.c == 1 ? at % kFilters : at / outputs,
              pixel = p.y_at.c == 1 ? at / kFilters : at - k * outputs, row = pixel / p.Q;
    place = pixel * kSmallPitch + k;
    return k0 + k < p.K ? y + k * p.y_at.c + row * p.y_at.h + (pixel - row * p.Q) * p.y_at.w : nullptr;
  });
  copy(whole * kChannels, image, [&](int at, int& place) {
    int const c = p.x_at.c == 1 ? at % kChannels : at / whole, pixel = p.x_at.c == 1 ? at / kChannels : at - c * whole,
              row = pixel / p.image_W, h = row - p.pad_top, w = pixel - row * p.image_W - p.pad_left;
    place = c * p.channel + pixel;
    bool const exists = c0 + c < p.C && h >= 0 && h < p.H && w >= 0 && w < p.W;
    return exists ? x + c * p.x_at.c + h * p.x_at.h + w * p.x_at.w : nullptr;
  });
}

__device__ inline void add(float (&sums)[kEach][9], float4 const& y, float const (&taps)[3][3]) {
#pragma unroll
  for (int r = 0; r < 3; ++r)
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      sums[0][r * 3 + s] += y.x * taps[r][s], sums[1][r * 3 + s] += y.y * taps[r][s];
      sums[2][r * 3 + s] += y.z * taps[r][s], sums[3][r * 3 + s] += y.w * taps[r][s];
    }
}

__device__ inline void store(Params const& p, int c0, int k0, int c, int of_filters, float const (&sums)[kEach][9],
                             float* rows) {
  float* const out = p.out + k0 * p.w_at.n + c0 * p.w_at.c;
  if (p.w_at.c == 1) {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int tap = 0; tap < 9; ++tap)
        if (c0 + c < p.C && k0 + of_filters + i < p.K)
          out[(of_filters + i) * p.w_at.n + c + tap / 3 * p.w_at.h + tap % 3 * p.w_at.w] = sums[i][tap];
    return;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kEach; ++i)
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) rows[(of_filters + i) * kRowPitch + c * 9 + tap] = sums[i][tap];
  __syncthreads();
  if (p.whole && c0 + kChannels <= p.C) {
    for (int at = int(threadIdx.x); at < kFilters * kRow / 4; at += kThreads) {
      int const k = at / (kRow / 4), four = at - k * (kRow / 4);
      if (k0 + k < p.K)
        reinterpret_cast<float4*>(out + k * p.w_at.n)[four] = reinterpret_cast<float4*>(rows + k * kRowPitch)[four];
    }
    return;
  }
  for (int at = int(threadIdx.x); at < kFilters * kRow; at += kThreads) {
    int const k = at / kRow, rest = at - k * kRow, channel = rest / 9, tap = rest - channel * 9;
    if (k0 + k < p.K && c0 + channel < p.C)
      out[k * p.w_at.n + channel * p.w_at.c + tap / 3 * p.w_at.h + tap % 3 * p.w_at.w] = rows[k * kRowPitch + rest];
  }
}

__global__ void __launch_bounds__(kThreads) small_images_kernel(__grid_constant__ Params const p) {
  extern __shared__ float4 dynamic[];
  float* const pixels = reinterpret_cast<float*>(dynamic);
  float* const image = pixels + p.P * p.Q * kSmallPitch;
  int const c = int(threadIdx.x) % kChannels, of_filters = int(threadIdx.x) / kChannels * kEach,
            c0 = int(blockIdx.x) * kChannels, k0 = int(blockIdx.y) * kFilters;
  copy_image(p, c0, k0, image, pixels);
  __syncthreads();
  float sums[kEach][9] = {};
  float const* y = pixels + of_filters;
  for (int i = 0; i < p.P; ++i) {
    float const* x = image + c * p.channel + i * p.image_W;
    float taps[3][3];  // neighbouring pixels have two columns in common
#pragma unroll
    for (int r = 0; r < 3; ++r) taps[r][1] = x[r * p.image_W], taps[r][2] = x[r * p.image_W + 1];
#pragma unroll 3
    for (int j = 0; j < p.Q; ++j, ++x, y += kSmallPitch) {
#pragma unroll
      for (int r = 0; r < 3; ++r) taps[r][0] = taps[r][1], taps[r][1] = taps[r][2], taps[r][2] = x[r * p.image_W + 2];
      add(sums, *reinterpret_cast<float4 const*>(y), taps);
    }
  }
  bool number = true;
#pragma unroll
  for (int i = 0; i < kEach; ++i)
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) number &= sums[i][tap] == sums[i][tap];
  store(p, c0, k0, c, of_filters, sums, pixels);
  if (__syncthreads_and(number)) return;
  for (int at = int(threadIdx.x); at < kFilters * kRow; at += kThreads) {
    int const k = k0 + at / kRow, rest = at % kRow, channel = c0 + rest / 9, r = rest % 9 / 3, s = rest % 3;
    if (k >= p.K || channel >= p.C) continue;
    float* const out = p.out + k * p.w_at.n + channel * p.w_at.c + r * p.w_at.h + s * p.w_at.w;
    if (*out != *out) *out = sum_again(p, k, channel, r, s);
  }
}

inline cudaError_t launch(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  SmallImage const image(problem);
  Params p{};
  p.x = static_cast<float const*>(args.a), p.y = static_cast<float const*>(args.b);
  p.out = static_cast<float*>(args.out);
  p.x_at = problem.x, p.y_at = problem.y, p.w_at = problem.w;
  p.C = int(problem.C), p.K = int(problem.K), p.H = int(problem.H), p.W = int(problem.W);
  p.P = int(problem.P()), p.Q = int(problem.Q());
  p.pad_top = int(problem.pad_top), p.pad_left = int(problem.pad_left);
  Strides const& w = problem.w;
  p.whole = w.c == 9 && w.h == 3 && w.w == 1 && w.n % 4 == 0 && problem.w_align >= 16;
  p.image_H = int(image.H), p.image_W = int(image.W), p.channel = int(image.channel);
  auto const error =
      cudaFuncSetAttribute(small_images_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(image.bytes));
  if (error != cudaSuccess) return error;
  dim3 const grid(unsigned(ceil_div(problem.C, int64_t(kChannels))), unsigned(ceil_div(problem.K, int64_t(kFilters))));
  small_images_kernel<<<grid, kThreads, size_t(image.bytes), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::small_images

#define CONV2D_EXT_SMALL_IMAGES_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) { return small_images::launch(p, args, stream); }
