// wgrad of 3x3 groups of 16 channels of 16-bit types in channels_last, on mma.sync: whole small images in shared
// memory, in one launch.
//
// A block has a slab of two groups, a line of 64 bytes of x and of y for each pixel, and some of the images, which the
// copy engine brings stage by stage. The blocks of a slab are a cluster, which adds their sums in the end, in order. A
// warp has a job, a group's 16 filters by 16 channels by nine taps, of a share of the stages or of parts of their rows.
// It walks down the rows of x: a row's pixels, shifted by each column of taps, are loaded once for the three rows of
// taps that meet them. 16 pixels of a product are a row of an image, or of two.
//
// A lane whose pixel does not exist, of y or, for its tap, of x, reads zeros: what lies there may be infinite. Infinite
// y meets those zeros of x, so sums that are NaN are made once more.
#pragma once

#include <cooperative_groups.h>

#include "../core/image_sums.h"
#include "fragments.cuh"
#include "give_back.cuh"
#include "launch.h"
#include "ptx.cuh"
#include "tma_map.h"
#include "types.cuh"

namespace conv2d_ext::image_sums_wgrad {

constexpr int kThreads = 32 * kImageSumWarps;
constexpr int kChannels = 16, kJobs = int(kImageSlab) / kChannels, kShares = kImageSumWarps / kJobs;
constexpr int kSumTiles = 18;  // of 16 filters by 8 channels, of a job
constexpr int kSlabLine = int(kImageSlab) * 2;

struct Params {
  CUtensorMap x_map[2], y_map;  // x: with a stride, of each other column
  void const *x, *y;
  void* w;
  Strides x_strides, y_strides, w_strides;
  int N, channels, splits, images, stages, slots;  // channels: of all groups
  int H, W, P, Q, pad_h, pad_w;
  int columns, plane_bytes, x_bytes, stage_bytes, copied_bytes, ring_bytes;  // columns: of a plane of x
  int row_parts;                                                             // of a stage
};

// Places of 16 bytes as the copy engine writes them.
__device__ inline uint32_t swizzled(uint32_t at) { return at ^ (at >> 3 & 0x30); }

template <class T, int step>
struct Job {
  uint32_t zero;
  int first;                    // byte of a line
  float sums[3][3][2][4] = {};  // row and column of the tap, 8 channels

  __device__ Job(int job, uint32_t zero) : zero(zero), first(job * kChannels * 2) {}

  __device__ void multiply(float (&of_row)[3][2][4], uint32_t const (&y)[4], uint32_t const (&x)[3][4]) {
#pragma unroll
    for (int s = 0; s < 3; ++s)
#pragma unroll
      for (int n = 0; n < 2; ++n)
        ptx::mma_m16n8k16<T>(of_row[s][n], y[0], y[1], y[2], y[3], x[s][n * 2], x[s][n * 2 + 1]);
  }

  // Rows of y from `begin` to `end` of a stage; y: row i, and those before it, zeros where there is none. A word of
  // what was loaded last.
  __device__ uint32_t add(Params const& p, uint32_t stage, int begin, int end) {
    int const lane = threadIdx.x % 32, y_row = p.Q * kSlabLine, x_row = p.columns * kSlabLine;
    auto column = [&](int pixel) { return p.images == 2 ? pixel % 8 : pixel; };
    auto image = [&](int pixel) { return p.images == 2 ? pixel / 8 : 0; };
    // As fragments lie in registers, other lanes have these addresses than those of x. The last row's, before
    // swizzling; what exists: all bits of an address, or none.
    int const y_pixel = lane / 16 * 8 + lane % 8, x_pixel = lane % 16;
    uint32_t const y_exists = column(y_pixel) < p.Q ? ~0u : 0;
    uint32_t const y_lane =
        stage + p.x_bytes + (image(y_pixel) * p.P * p.Q + column(y_pixel)) * kSlabLine + first + lane / 8 % 2 * 16;
    uint32_t x_exists[3], x_lane[3];
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      int const w = s - p.pad_w, plane = step == 1 ? 0 : w & 1, line = column(x_pixel) + (w - plane) / step;
      x_exists[s] = column(x_pixel) < p.Q && unsigned(column(x_pixel) * step + w) < unsigned(p.W) ? ~0u : 0;
      x_lane[s] = stage + plane * p.plane_bytes + (image(x_pixel) * p.H * p.columns + line) * kSlabLine + first +
                  lane / 16 * 16;
    }
    // 16 pixels of y by 16 filters.
    auto load_y = [&](uint32_t (&y)[4], int row) {
      ptx::ldmatrix_x4_trans(y, (swizzled(y_lane + row * y_row) & y_exists) | (zero & ~y_exists));
    };
    // The pixels of x that they meet in a row, by 16 channels.
    auto load_x = [&](uint32_t (&x)[3][4], int h) {
#pragma unroll
      for (int s = 0; s < 3; ++s)
        ptx::ldmatrix_x4_trans(x[s], (swizzled(x_lane[s] + h * x_row) & x_exists[s]) | (zero & ~x_exists[s]));
    };
    uint32_t y[3][4] = {}, x[3][4] = {};
    auto exists = [&](int h) { return unsigned(h) < unsigned(p.H); };
#pragma unroll 1
    for (int i = begin; i < end + (step == 1 ? 2 : 1); ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) y[2][e] = y[1][e], y[1][e] = y[0][e], y[0][e] = 0;
      if (i < end) load_y(y[0], i);
      int const h = i * step - p.pad_h;
      if (exists(h)) {
        load_x(x, h);
        multiply(sums[0], y[0], x);
        if (step == 1) multiply(sums[1], y[1], x);
        multiply(sums[2], y[3 - step], x);
      }
      if (step == 2 && i < end && exists(h + 1)) {
        load_x(x, h + 1);
        multiply(sums[1], y[0], x);
      }
    }
    return y[0][3] | x[2][3];
  }
};

// A weight's sum once more.
template <class T>
__device__ __noinline__ float exact_sum(Params const& p, int step, int k, int c, int r, int s) {
  float sum = 0;
  for (int64_t n = 0; n < p.N; ++n)
    for (int i = 0; i < p.P; ++i)
      for (int j = 0; j < p.Q; ++j) {
        int const h = i * step + r - p.pad_h, w = j * step + s - p.pad_w;
        if (unsigned(h) >= unsigned(p.H) || unsigned(w) >= unsigned(p.W)) continue;
        Strides const &x = p.x_strides, &y = p.y_strides;
        sum += widen(static_cast<T const*>(p.x)[n * x.n + h * x.h + w * x.w + c]) *
               widen(static_cast<T const*>(p.y)[n * y.n + i * y.h + j * y.w + k]);
        if (!(sum == sum)) return sum;
      }
  return sum;
}

// Four of a slab's sums, as they lie in a lane's registers.
template <class T, int step>
__device__ inline void store(Params const& p, int slab, int i, float4 sum) {
  int const lane = i % 32, tile = i / 32 % kSumTiles, job = i / 32 / kSumTiles, r = tile / 6, s = tile / 2 % 3;
  int const k = slab * int(kImageSlab) + job * kChannels + lane / 4;
  int const c = tile % 2 * 8 + lane % 4 * 2;
  if (k >= p.channels) return;
  float const values[4] = {sum.x, sum.y, sum.z, sum.w};
  T* const to = static_cast<T*>(p.w) + k * p.w_strides.n + c * p.w_strides.c + r * p.w_strides.h + s * p.w_strides.w;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    float v = values[e];
    int const filter = k + e / 2 * 8, channel = c + e % 2;
    if (!(v == v)) v = exact_sum<T>(p, step, filter, filter / kChannels * kChannels + channel, r, s);
    to[e / 2 * 8 * p.w_strides.n + e % 2 * p.w_strides.c] = narrow<T>(v);
  }
}

template <class T, int step>
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(__grid_constant__ Params const p) {
  extern __shared__ __align__(1024) char dynamic[];
  constexpr int all = kJobs * kSumTiles * 32;  // of a share
  uint32_t const begin = ptx::shared_address(dynamic), ring = (begin + 1023) & ~1023u;
  float4* const sums = reinterpret_cast<float4*>(dynamic + (ring - begin));
  uint64_t* const full = reinterpret_cast<uint64_t*>(dynamic + (ring - begin) + p.ring_bytes);
  uint64_t* const empty = full + kImageSumSlots;
  uint32_t const zero = ptx::shared_address(empty + kImageSumSlots);
  int const slab = blockIdx.x / p.splits, rank = blockIdx.x - slab * p.splits;
  int const least = p.stages / p.splits, more = p.stages - least * p.splits;
  int const first = rank * least + min(rank, more), count = least + (rank < more ? 1 : 0);
  int const lane = threadIdx.x % 32, warp = warp_uniform(int(threadIdx.x) / 32);
  int const share = warp / kJobs, job = warp % kJobs;
  auto copy = [&](int i, int slot) {
    uint32_t const to = ring + slot * p.stage_bytes;
    ptx::mbarrier_arrive_expect_tx(full + slot, p.copied_bytes);
    int const n = (first + i) * p.images, c = slab * int(kImageSlab);
#pragma unroll
    for (int plane = 0; plane < step; ++plane)
      ptx::cp_async_bulk_tensor_4d(to + plane * p.plane_bytes, &p.x_map[plane], full + slot, c, 0, 0, n);
    ptx::cp_async_bulk_tensor_4d(to + p.x_bytes, &p.y_map, full + slot, c, 0, 0, n);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.slots; ++i) ptx::mbarrier_init(full + i, 1), ptx::mbarrier_init(empty + i, kImageSumWarps);
    ptx::fence_mbarrier_init();
    for (int i = 0; i < min(p.slots, count); ++i) copy(i, i);
    ptx::st_shared_v4(zero, uint4{});
  }
  Job<T, step> work(job, zero);
  __syncthreads();
  bool const exists = slab * int(kImageSlab) + job * kChannels < p.channels;
  Stage stage;
  int next = share;  // the share's part, from the stage's first
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    // All warps wait for each stage and give it back, lest one fall behind by two phases.
    ptx::mbarrier_wait(full + stage.index, stage.parity);
    uint32_t const at = ring + stage.index * p.stage_bytes;
    uint32_t word = 0;
    bool mine = false;
#pragma unroll 1
    for (; next < p.row_parts; next += kShares) {
      if (exists) word |= work.add(p, at, next * p.P / p.row_parts, (next + 1) * p.P / p.row_parts);
      mine = next == p.row_parts - 1;
    }
    next -= p.row_parts;
    give_back(empty + stage.index, word);
    // The next copy is asked for by the share that had the last part, once the others have passed.
    if (mine && job == 0 && i + p.slots < count) {
      if (lane == 0) {
        ptx::mbarrier_wait(empty + stage.index, stage.parity);
        copy(i + p.slots, stage.index);
      }
      __syncwarp();
    }
    stage.advance(p.slots);
  }
  __syncthreads();                                     // all stages have been read
  int const used = min(kShares, count * p.row_parts);  // shares that have sums
  auto* const of_job = reinterpret_cast<float4(&)[kSumTiles]>(work.sums);
  if (share < used)
#pragma unroll
    for (int i = 0; i < kSumTiles; ++i) sums[(warp * kSumTiles + i) * 32 + lane] = of_job[i];
  auto add = [](float4& sum, float4 const& v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; };
  if (used > 1) {
    __syncthreads();
    for (int i = threadIdx.x; i < all; i += kThreads) {
      float4 sum = sums[i];
#pragma unroll
      for (int k = 1; k < kShares; ++k)
        if (k < used) add(sum, sums[k * all + i]);
      sums[i] = sum;
    }
  }
  if (p.splits == 1) {
    __syncthreads();
    for (int i = threadIdx.x; i < all; i += kThreads) store<T, step>(p, slab, i, sums[i]);
    return;
  }
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
  auto const cluster = cooperative_groups::this_cluster();
  int const per = (all + p.splits - 1) / p.splits, end = min(all, (rank + 1) * per);
#pragma unroll 1
  for (int i = rank * per + threadIdx.x; i < end; i += kThreads) {
    float4 parts_of[kImageCluster];
#pragma unroll
    for (int k = 0; k < kImageCluster; ++k)
      if (k < p.splits) parts_of[k] = cluster.map_shared_rank(sums, k)[i];
    float4 sum = parts_of[0];
#pragma unroll
    for (int k = 1; k < kImageCluster; ++k)
      if (k < p.splits) add(sum, parts_of[k]);
    store<T, step>(p, slab, i, sum);
  }
  // No block ends while others read its sums.
  __syncwarp();
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}

template <class T, int step>
cudaError_t start(Params const& p, ImageSums const& t, cudaStream_t stream) {
  auto* const kernel = sums_kernel<T, step>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(t.splits), attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(t.slabs * t.splits)), config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(t.shared), config.stream = stream;
  config.attrs = &attribute, config.numAttrs = t.splits > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <class T>
cudaError_t launch(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  ImageSums const t = image_sums(Op::wgrad, problem, h200_sxm);
  Params p{};
  int64_t const P = problem.P(), Q = problem.Q();
  auto encode = [&](CUtensorMap& map, void const* data, Strides const& s, int64_t C, int64_t H, int64_t W, int first,
                    int64_t step, int64_t columns) {
    tma::Tensor4 const tensor{static_cast<T const*>(data) + first * s.w,
                              problem.dtype,
                              {C, ceil_div(W - first, step), H, problem.N},
                              {1, s.w * step, s.h, s.n}};
    return tma::encode_tiled(map, tensor, int(kImageSlab), int(columns), int(H), int(t.images), 1, 1,
                             CU_TENSOR_MAP_SWIZZLE_64B);
  };
  int64_t const step = problem.stride_w;
  cudaError_t error = encode(p.y_map, args.b, problem.y, problem.K, P, Q, 0, 1, Q);
  for (int plane = 0; plane < step && error == cudaSuccess; ++plane)
    // An image of one column has no odd ones, and none is read.
    error = encode(p.x_map[plane], args.a, problem.x, problem.C, problem.H, problem.W, plane < problem.W ? plane : 0,
                   step, t.columns);
  if (error != cudaSuccess) return error;
  p.x = args.a, p.y = args.b, p.w = args.out;
  p.x_strides = problem.x, p.y_strides = problem.y, p.w_strides = problem.w;
  p.N = int(problem.N), p.channels = int(problem.C), p.splits = int(t.splits), p.images = int(t.images);
  p.stages = int(t.stages), p.slots = int(t.slots);
  p.H = int(problem.H), p.W = int(problem.W), p.P = int(P), p.Q = int(Q);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.columns = int(t.columns), p.plane_bytes = int(t.plane_bytes);
  p.x_bytes = int(t.x_bytes), p.stage_bytes = int(t.x_bytes + t.y_bytes), p.ring_bytes = int(t.ring_bytes);
  p.copied_bytes = int(t.images * (step * problem.H * t.columns + P * Q)) * kSlabLine;
  p.row_parts = int(t.row_parts);
  return step == 2 ? start<T, 2>(p, t, stream) : start<T, 1>(p, t, stream);
}

}  // namespace conv2d_ext::image_sums_wgrad

#define CONV2D_EXT_GROUPED_IMAGE_SUMS_INSTANCE(family, op, dtype, tm, tn, tk, variant)                                \
  namespace conv2d_ext {                                                                                              \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const&, Arguments const& args, \
                                                                cudaStream_t stream) {                                \
    return image_sums_wgrad::launch<typename TypeOf<DType::dtype>::type>(p, args, stream);                            \
  }                                                                                                                   \
  }
