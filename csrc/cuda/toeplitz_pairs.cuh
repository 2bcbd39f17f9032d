// The filter's gradient for toeplitz_wgrad.cuh of filters that reach over up to 5 columns. For two channels and a row
// of the filter, runs of 4 columns of y and the 8 columns of x from each on:
//   d[2 channels, 8 columns of x; 2 channels, 4 columns of y] += x[16 runs; ...]^T * y[16 runs; ...],
// and the sum of a diagonal of a channel's d is that of a tap; what one channel makes of the other is not used. So a
// warp has sums for 8 channels, which its lanes read as 16 bytes, and a block has 128 bytes of each pixel.
//
// All else is as there. A row is two halves, of images or of one image, which are copied to where they begin in
// different banks: lanes t = 0, 1 have the runs of the first, two neighbours at a time, t = 2, 3 those of the second.
#pragma once

#include "../core/toeplitz_pairs.h"
#include "toeplitz_wgrad.cuh"

namespace conv2d_ext::toeplitz {

struct PairsParams : PiecesParams {
  int runs, half_images;  // runs of an image; images of a half
};

// Adds up the diagonals of a warp's d, of which a lane has two columns of y of one of each two channels.
template <class T, int R>
__device__ inline void store_pair_sums(PairsParams const& p, float const (&acc)[R][kToeplitzPairs][4], float* shared) {
  constexpr int channels = 8;
  PieceShare const own(p, ptx::unknown(int(blockIdx.x)), channels * kToeplitzWarps);
  int const thread = ptx::unknown(int(threadIdx.x)), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  float* const d = shared + warp * (R * channels * kPairSums);
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int j = 0; j < kToeplitzPairs; ++j) {
      float* const to = d + ((2 * j + t / 2) * R + r) * kPairSums + g * 4 + t % 2 * 2;
      to[0] = t < 2 ? acc[r][j][0] : acc[r][j][2], to[1] = t < 2 ? acc[r][j][1] : acc[r][j][3];
    }
  __syncwarp();
  int const taps = p.R * p.S;
  float* const sums = shared + kToeplitzWarps * (R * channels * kPairSums) + warp * (channels * R * kPairTaps);
#pragma unroll 1
  for (int i = lane; i < channels * R; i += 32) {
    int const channel = i / R, r = i % R;
    if (r >= p.R) continue;
#pragma unroll 1
    for (int s = 0; s < p.S; ++s) {
      float const* const diagonal = d + i * kPairSums + s * p.dilation_w * 4;
      float sum = 0.f;
#pragma unroll
      for (int column = 0; column < 4; ++column) sum += diagonal[column * 5];
      sums[channel * taps + r * p.S + s] = sum;
    }
  }
  __syncwarp();
  store_taps<T>(p, own, warp * channels, channels, sums);
}

template <class T, int R>
__global__ void __launch_bounds__(kToeplitzThreads, 1) wgrad_pairs(__grid_constant__ PairsParams const p) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  __shared__ PiecesRing<R> ring;
  constexpr int threads = kToeplitzThreads, readers = 32 * kToeplitzWarps;
  constexpr int pairs = kToeplitzPairs, pixel = kPairChannels * 2;
  uint32_t const padding = -ptx::shared_address(dynamic) % 1024, shared = ptx::shared_address(dynamic) + padding;
  PieceShare const own_share(p, int(blockIdx.x), kPairChannels);
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  if (lane == 0) ring.start(warp, threads / 32);
  __syncthreads();
  if (!take_role()) {
    if (warp == kToeplitzWarps && ptx::elect()) ring.copy(p, own_share.begin, own_share.end, own_share.c0, shared);
    return;
  }
  ptx::griddepcontrol_launch_dependents();

  uint32_t from_x[4], from_y[4], keep[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int const half = t / 2, run = t % 2 + 2 * i, image = run / p.runs, column = run % p.runs * 4;
    bool const exists = image < p.half_images;
    int const x = half * (p.half_x_bytes / pixel) + (exists ? image * p.x_columns + column : 0) + g;
    int const y = half * (p.half_y_bytes / pixel) + (exists ? image * p.y_columns + column : 0) + g % 4;
    from_x[i] = shared + p.y_bytes + swizzled(x, warp, kPairChannels / 8);
    from_y[i] = shared + swizzled(y, warp, kPairChannels / 8);
    keep[i] = exists ? ~0u : 0;
  }
  uint32_t const select = g < 4 ? 0x5410 : 0x7632;  // of the words of two pixels of y, the lane's channel

  float acc[R][pairs][4] = {};
  uint32_t y[R][2][pairs], x[4][pairs];
  Pixel<pairs> next_y[4], next_x[4];
  auto clear = [&] {
#pragma unroll
    for (int i = 0; i < R * 2 * pairs; ++i) y[i / (2 * pairs)][i / pairs % 2][i % pairs] = 0;
  };
  auto load_x = [&](uint32_t at) {
#pragma unroll
    for (int i = 0; i < 4; ++i) next_x[i].load(from_x[i] + at);
  };
  auto load_y = [&](uint32_t at) {
#pragma unroll
    for (int i = 0; i < 4; ++i) next_y[i].load(from_y[i] + at);
  };
  auto take = [&]<int u>(std::integral_constant<int, u>) {
#pragma unroll
    for (int two = 0; two < 2; ++two)
#pragma unroll
      for (int j = 0; j < pairs; ++j) {
        uint32_t const a = next_x[2 * two].v[j], b = next_x[2 * two + 1].v[j];
        x[2 * two][j] = __byte_perm(a, b, 0x5410), x[2 * two + 1][j] = __byte_perm(a, b, 0x7632);
        y[u][two][j] =
            __byte_perm(next_y[2 * two].v[j] & keep[2 * two], next_y[2 * two + 1].v[j] & keep[2 * two + 1], select);
      }
    return x[0][0] | x[1][0] | x[2][0] | x[3][0] | y[u][0][0] | y[u][1][0];
  };
  auto multiply = [&]<int u>(std::integral_constant<int, u>, bool meets, auto const& bring_x, auto const& bring_y) {
    bring_x(), bring_y();
    if (!meets) return;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int j = 0; j < pairs; ++j) {
        auto const& of = y[(u + R - r) % R];
        ptx::mma_m16n8k16<T>(acc[r][j], x[0][j], x[1][j], x[2][j], x[3][j], of[0][j], of[1][j]);
      }
  };
  walk_rows<R>(p, ring, own_share, clear, load_x, load_y, take, multiply);

  ptx::bar_sync(1, readers);
  store_pair_sums<T, R>(p, acc, reinterpret_cast<float*>(dynamic + padding));
}

// ---- host side

template <DType dtype, int R>
cudaError_t launch_tile(Problem const& problem, PairsTile const& t, int shares, int share, Arguments const& args,
                        cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  PairsParams p{};
  p.pieces = 1, p.length = t.blocks * 4;
  p.runs = t.runs, p.half_images = t.half_images;
  if (auto const error = set_pieces<dtype>(p, problem, t, shares, share, t.half_images, args)) return error;
  constexpr int pixel = kPairChannels * int(sizeof(T));
  p.halves = 2, p.half_x_bytes = t.x_half * pixel, p.half_y_bytes = t.y_half * pixel;
  if (t.parts)
    p.half_w = t.runs * 4, p.x_copied *= 2, p.y_copied *= 2;
  else
    p.half_n = t.half_images;
  auto* kernel = wgrad_pairs<T, R>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(t.slices * t.shares), kToeplitzThreads, size_t(t.shared_bytes), stream>>>(p);
  return cudaGetLastError();
}

template <DType dtype, int R, int S>
cudaError_t launch_wgrad(Problem const& all, Plan const& plan, Arguments const& of_all, cudaStream_t stream) {
  Device gpu = h200_sxm;
  if (auto const error = count_sms(gpu.sm_count)) return error;
  int share = 0;
  auto launch_one = [&](Problem const& problem, Arguments const& args) {
    auto of = [&](auto const& t) {
      if (t.ns == 0 || share + t.shares > plan.split_k) return cudaErrorInvalidValue;
      auto const error = launch_tile<dtype, R>(problem, t, plan.split_k, share, args, stream);
      share += int(t.shares);
      return error;
    };
    if constexpr (R <= 5)
      if (takes_pairs(problem, R, gpu)) return of(pairs_tile(problem, R, gpu));
    return of(pieces_tile(problem, R, gpu));
  };
  if (auto const error = launch_phases<Op::wgrad, dtype>(S, all, of_all, launch_one)) return error;
  if (share != plan.split_k) return cudaErrorInvalidValue;
  if (share == 1) return cudaSuccess;
  return depthwise::launch_sum<typename TypeOf<dtype>::type>(all, plan, of_all, stream, true);
}

}  // namespace conv2d_ext::toeplitz

#define CONV2D_EXT_TOEPLITZ_WGRAD_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                        \
    return toeplitz::launch_wgrad<DType::dtype, tm, tn>(p, plan, args, stream);    \
  }
