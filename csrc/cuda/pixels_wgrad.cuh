// wgrad of 1x1 filters in NCHW, in TF32 and the 16-bit types, in place: w[m, n] = sum over images and pixels of
// a[m, pixel] * b[n, pixel], by wgmma, both of whose operands have the reduction contiguous. a is y and b x, or the
// other way round.
//
// A block has a tile of TM x TN and a part of its steps, runs of 128 bytes of pixels of an image: a stage is such a run
// of TM channels of one tensor and TN of the other, swizzled. The copy engine brings it, and rounds floats to TF32.
// Images of 16-bit types whose planes are multiples of 8 bytes, which it does not take, are gathered by four warps,
// four pixels at a time. Sums go to the workspace as threads have them, and sum_kernel adds the parts in their order.
//
// blockIdx.y: the group.
//
// The code is short on purpose: a block runs most of it once, and it comes from memory.
#pragma once

#include "../core/pixels_wgrad.h"
#include "dependent.cuh"
#include "tma.cuh"

namespace conv2d_ext::pixels_wgrad {

using tma::Divisor, tma::Tensor4, tma::encode_tiled;

constexpr int kSteps = kLineBytes / 32;  // instructions along a run
constexpr int kSumThreads = 256;

template <int TM, int TN>
struct Shape {
  static constexpr int blocks = TM == 256 ? 2 : 1, groups = TM / 64 / blocks;  // of 64 rows, a warpgroup
  static constexpr int threads = (groups + 1) * kWarpgroup;                    // the last warpgroup copies
  static constexpr int stage_bytes = (TM + TN) * kLineBytes, stages = 220 * 1024 / stage_bytes;
  static constexpr int shared_bytes = stages * stage_bytes + 1024;  // the swizzle wants 1024-byte alignment
  static constexpr int multiply_regs = groups == 2 ? 224 : 152, copy_regs = 56;
  static_assert((groups * multiply_regs + copy_regs) * kWarpgroup <= 65536);
};

// A tensor as it lies, whose channels, of a group, are a tile's rows or columns.
struct Planes {
  void const* at;
  int64_t n, c;
  int32_t channels;

  template <class T>
  __device__ T const* group() const {
    return static_cast<T const*>(at) + int64_t(blockIdx.y) * channels * c;
  }
};

// Where a tile's part lies in the workspace, in tiles.
__device__ __forceinline__ int64_t part_place(int part, uint32_t tiles, int tile) {
  return int64_t(blockIdx.y) * gridDim.x + (part * tiles + tile);
}

struct Params {
  CUtensorMap map_a, map_b;
  Planes a, b;
  Divisor runs, tiles_n, tiles;  // runs of an image
  int32_t steps, share;          // in all; of a part, at most
  int32_t between, apart;        // parts' first steps; a part's
  int32_t pixels, bytes;         // of an image; of a stage that are copied
  int32_t last;                  // instructions along an image's last run
  float* parts;
  void* w;               // not null: the result is stored at once, as there is one part
  int64_t w_m, w_group;  // from a row of it to the next, a group
  bool once;             // L2 gives up first what is read
};

// What a thread of the copying warpgroup gathers of a tensor in a step: four pixels of every eighth channel.
template <class T, int channels>
__device__ __forceinline__ void gather(Planes const& p, int image, int first, int pixel, bool valid, uint32_t to) {
  int const line = int(threadIdx.x) % kWarpgroup / 16, unit = int(threadIdx.x) % 16;
  to += line * kLineBytes + ((unit / 2) ^ line) * 16 + unit % 2 * 8;
  first += line;
  T const* const at = p.group<T>();
  T const* from = at + image * p.n + first * p.c + pixel;
#pragma unroll 8
  for (int i = 0; i < channels; i += 8, from += 8 * p.c, to += kCoreBytes) {
    bool const exists = valid && first + i < p.channels;
    ptx::cp_async_ca<8>(to, exists ? from : at, exists);
  }
}

template <class T, int TM, int TN, bool gathered>
__global__ void __launch_bounds__(Shape<TM, TN>::threads, 1) main_kernel(__grid_constant__ Params const p) {
  using S = Shape<TM, TN>;
  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t full[S::stages], empty[S::stages];
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), thread = int(threadIdx.x) % kWarpgroup;
  ptx::griddepcontrol_launch_dependents();
  // Neighbouring blocks have different tiles of the same pixels.
  int n0 = int(blockIdx.x);
  int const part = p.tiles.divide(n0), tile = n0, m0 = p.tiles_n.divide(n0) * TM;
  n0 *= TN;
  int at = part * p.between;
  int const count = min(p.share, (p.steps - at + p.apart - 1) / p.apart);
  if (threadIdx.x == 0) {
    int const groups = min(S::groups, (p.a.channels - m0 + S::blocks * 64 - 1) / (S::blocks * 64));  // that have rows
    for (int i = 0; i < S::stages; ++i) {
      ptx::mbarrier_init(&full[i], gathered ? kWarpgroup : 1);
      ptx::mbarrier_init(&empty[i], groups * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  Stage stage;
  if (group == S::groups) {
    ptx::setmaxnreg_dec<S::copy_regs>();
    if (!gathered && (thread >= 32 || !ptx::elect())) return;
    ptx::griddepcontrol_wait();
    uint64_t const once = p.once ? ptx::createpolicy_evict_first() : 0;
    auto copy = [&](uint32_t to, CUtensorMap const& map, uint64_t* bar, int pixel, int first, int image) {
      if (once != 0)
        ptx::cp_async_bulk_tensor_4d(to, &map, bar, pixel, first, image, int(blockIdx.y), once);
      else
        ptx::cp_async_bulk_tensor_4d(to, &map, bar, pixel, first, image, int(blockIdx.y));
    };
#pragma unroll 1
    for (int step = 0; step < count; ++step, at += p.apart, stage.advance(S::stages)) {
      int run = at;
      int const image = p.runs.divide(run);
      uint32_t const to = ring + stage.index * S::stage_bytes;
      uint64_t* const bar = &full[stage.index];
      ptx::mbarrier_wait(&empty[stage.index], stage.parity ^ 1);  // passes on the first trip round the ring
      if constexpr (gathered) {
        int const pixel = run * 64 + thread % 16 * 4;
        gather<T, TM>(p.a, image, m0, pixel, pixel < p.pixels, to);
        gather<T, TN>(p.b, image, n0, pixel, pixel < p.pixels, to + TM * kLineBytes);
        ptx::cp_async_mbarrier_arrive_noinc(bar);
      } else {
        int const pixel = run * (kLineBytes / int(sizeof(T)));
        ptx::mbarrier_arrive_expect_tx(bar, p.bytes);
        copy(to, p.map_a, bar, pixel, m0, image);
        copy(to + TM * kLineBytes, p.map_b, bar, pixel, n0, image);
      }
    }
    if constexpr (gathered) ptx::cp_async_wait_all();
    return;
  }
  ptx::setmaxnreg_inc<S::multiply_regs>();
  if (m0 + group * (S::blocks * 64) >= p.a.channels) return;
  uint64_t const layout = tma::layout_of(kLineBytes);
  float acc[S::blocks][TN / 2] = {};
  auto fence_operands = [&] {
#pragma unroll
    for (int b = 0; b < S::blocks; ++b) ptx::wgmma_fence_operand(acc[b]);
  };
  int before = 0;
#pragma unroll 1
  for (int step = 0; step < count; ++step, at += p.apart) {
    ptx::mbarrier_wait(&full[stage.index], stage.parity);
    if constexpr (gathered) ptx::fence_proxy_async();  // cp.async wrote through the generic proxy
    uint32_t const from = ring + stage.index * S::stage_bytes;
    auto multiply = [&](int k) {
#pragma unroll
      for (int b = 0; b < S::blocks; ++b)
        ptx::wgmma_mma_async<T, false, false>(
            acc[b], tma::at_address(layout, from + (group * S::blocks + b) * (64 * kLineBytes) + k * 32),
            tma::at_address(layout, from + TM * kLineBytes + k * 32));
    };
    int run = at;
    p.runs.divide(run);
    fence_operands();
    if (run + 1 < p.runs.value || p.last == kSteps) {
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kSteps; ++k) multiply(k);
      ptx::wgmma_commit_group();
    } else {
#pragma unroll 1
      for (int k = 0; k < p.last; ++k) {
        ptx::wgmma_fence();
        multiply(k);
        ptx::wgmma_commit_group();
      }
    }
    ptx::wgmma_wait_group<1>();
    fence_operands();
    if (step > 0 && thread % 32 == 0) ptx::mbarrier_arrive(&empty[before]);
    before = stage.index;
    stage.advance(S::stages);
  }
  ptx::wgmma_wait_group<0>();
  fence_operands();
  if (p.w != nullptr) {
#pragma unroll
    for (int b = 0; b < S::blocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const m = m0 + (group * S::blocks + b) * 64 + thread / 32 * 16 + thread % 32 / 4 + half * 8;
        T* const to = static_cast<T*>(p.w) + blockIdx.y * p.w_group + m * p.w_m + n0 + thread % 4 * 2;
#pragma unroll
        for (int j = 0; j < TN / 8; ++j)
          if (m < p.a.channels && n0 + j * 8 + thread % 4 * 2 < p.b.channels)
            *reinterpret_cast<Vector<T, 2>*>(to + j * 8) = {narrow<T>(acc[b][j * 4 + half * 2]),
                                                            narrow<T>(acc[b][j * 4 + half * 2 + 1])};
      }
    return;
  }
  float4* const to = reinterpret_cast<float4*>(p.parts + part_place(part, p.tiles.value, tile) * (TM * TN)) +
                     group * (S::blocks * TN / 8 * kWarpgroup) + thread;
#pragma unroll
  for (int b = 0; b < S::blocks; ++b)
#pragma unroll
    for (int j = 0; j < TN / 8; ++j)
      if (n0 + j * 8 < p.b.channels)
        to[(b * (TN / 8) + j) * kWarpgroup] =
            make_float4(acc[b][j * 4], acc[b][j * 4 + 1], acc[b][j * 4 + 2], acc[b][j * 4 + 3]);
}

struct SumParams {
  float const* parts;
  void* w;
  int64_t m, n, group;         // strides of w
  Divisor tiles_n, of_tile;    // of_tile: places of a tile
  Divisor columns, lanes;      // columns: blocks of 8 of a tile; lanes: places of a block of threads
  int32_t M, N, tiles, split;  // split: parts
  int32_t tile_m, tile_n;
  bool pairs;
};

// A thread has a place, what one of main_kernel stored at once, and every n-th part of it, n threads a place.
template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(__grid_constant__ SumParams const p) {
  __shared__ float4 sums[kSumThreads];
  int lane = int(threadIdx.x);
  int const first = p.lanes.divide(lane), groups = kSumThreads / p.lanes.value;
  int place = int(blockIdx.x) * p.lanes.value + lane;
  int n = p.of_tile.divide(place);
  int64_t const at = int64_t(n) * p.of_tile.value + place, next = int64_t(p.tiles) * p.of_tile.value;
  bool const in_tiles = n < p.tiles;
  int const thread = place % kWarpgroup;
  int j = place / kWarpgroup;
  int const block = p.columns.divide(j);  // of 64 rows
  int const m = p.tiles_n.divide(n) * p.tile_m + block * 64 + thread / 32 * 16 + thread % 32 / 4;
  n = n * p.tile_n + j * 8 + thread % 4 * 2;
  bool const exists = in_tiles && m < p.M && n < p.N;
  float4 sum = make_float4(0, 0, 0, 0);
  auto add = [&](float4 v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; };
  ptx::griddepcontrol_wait();
  if (exists) {
    float4 const* from = reinterpret_cast<float4 const*>(p.parts) + (int64_t(blockIdx.y) * p.split + first) * next + at;
#pragma unroll 4
    for (int i = first; i < p.split; i += groups, from += groups * next) add(*from);
  }
  if (groups > 1) {
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (first != 0) return;
#pragma unroll 1
    for (int i = 1; i < groups; ++i) add(sums[threadIdx.x + i * p.lanes.value]);
  }
  if (!exists) return;
  auto store = [&](int row, float low, float high) {
    if (row >= p.M) return;
    T* const to = static_cast<T*>(p.w) + blockIdx.y * p.group + row * p.m + n * p.n;
    if (p.pairs) {
      *reinterpret_cast<Vector<T, 2>*>(to) = {narrow<T>(low), narrow<T>(high)};
      return;
    }
    to[0] = narrow<T>(low);
    if (n + 1 < p.N) to[p.n] = narrow<T>(high);
  };
  store(m, sum.x, sum.y);
  store(m + 8, sum.z, sum.w);
}

// The result as tiles see it: strides, and whether pairs of columns can be stored at once.
struct Weights {
  int64_t m, n;
  bool pairs;

  // p: a group's problem.
  Weights(PixelsWgrad const& shape, Problem const& p)
      : m(shape.swapped ? p.w.c : p.w.n),
        n(shape.swapped ? p.w.n : p.w.c),
        pairs(n == 1 && (shape.swapped ? p.K : p.C) % 2 == 0 && m % 2 == 0 && p.w_align >= 2 * size_of(p.dtype)) {}
};

// Adds `split` parts, which lie in the workspace as the threads of a tile had them. shape: of a group.
template <class T>
cudaError_t add_parts(int tile_m, int tile_n, PixelsWgrad const& shape, Problem const& problem, int64_t split,
                      Arguments const& args, cudaStream_t stream) {
  Problem const g = group_of(problem);
  Weights const w(shape, g);
  SumParams r{};
  r.parts = static_cast<float const*>(args.workspace), r.w = args.out, r.m = w.m, r.n = w.n, r.pairs = w.pairs;
  r.group = g.K * problem.w.n;
  r.M = int32_t(shape.swapped ? g.C : g.K), r.N = int32_t(shape.swapped ? g.K : g.C);
  r.tiles = int32_t(shape.tiles), r.split = int32_t(split), r.tile_m = tile_m, r.tile_n = tile_n;
  int const groups = split <= 2 ? 1 : split <= 8 ? 2 : split <= 24 ? 4 : split <= 100 ? 8 : 16;  // threads of a place
  r.tiles_n = Divisor(shape.tiles_n), r.of_tile = Divisor(tile_m * tile_n / 4), r.columns = Divisor(tile_n / 8);
  r.lanes = Divisor(kSumThreads / groups);
  int64_t const blocks = ceil_div(shape.tiles * r.of_tile.value, r.lanes.value);
  return launch_dependent(sum_kernel<T>, dim3(unsigned(blocks), unsigned(problem.groups)), kSumThreads, 0, stream, r);
}

// S: a kernel's threads and shared memory; direct: it can store a single part as the result.
template <class S, DType dtype, int TM, int TN>
cudaError_t launch_sums(void (*kernel)(Params const), bool gathered, bool direct, Problem const& problem,
                        Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr int run = run_pixels(dtype);
  Problem const g = group_of(problem);
  PixelsWgrad const shape(TM, TN, g);
  int64_t const pixels = problem.H * problem.W;
  Planes const x{args.a, problem.x.n, problem.x.c, int32_t(g.C)}, y{args.b, problem.y.n, problem.y.c, int32_t(g.K)};
  Params p{};
  p.a = shape.swapped ? x : y, p.b = shape.swapped ? y : x;
  int const rows = int(min64(TM, p.a.channels)), columns = int(min64(TN, p.b.channels));
  cudaError_t error = cudaSuccess;
  if (!gathered) {
    auto encode = [&](CUtensorMap& map, Planes const& t, int channels) {
      Tensor4 const tensor{t.at,
                           dtype,
                           {pixels, t.channels, problem.N, problem.groups},
                           {1, t.c, t.n, t.channels * t.c},
                           problem.allow_tf32};
      return encode_tiled(map, tensor, run, channels, 1, 1);
    };
    if ((error = encode(p.map_a, p.a, rows)) != cudaSuccess) return error;
    if ((error = encode(p.map_b, p.b, columns)) != cudaSuccess) return error;
  }
  p.pixels = int32_t(pixels), p.bytes = (rows + columns) * kLineBytes;
  p.runs = Divisor(ceil_div(pixels, run)), p.tiles_n = Divisor(shape.tiles_n), p.tiles = Divisor(shape.tiles);
  p.last = int32_t(ceil_div(pixels - (p.runs.value - 1) * run, run / kSteps));
  p.steps = int32_t(runs_of(problem)), p.share = int32_t(ceil_div(p.steps, plan.split_k));
  int64_t const split = ceil_div(p.steps, p.share);  // without empty parts
  p.once = !gathered && pixels_wgrad_reads_once(shape, problem);
  // Parts take turns with the steps, so that at any time all blocks read neighbouring pixels.
  bool const in_turn = p.once || gathered;
  p.between = in_turn ? 1 : p.share, p.apart = in_turn ? int32_t(split) : 1;
  p.parts = static_cast<float*>(args.workspace);
  if (Weights const w(shape, g); direct && split == 1 && w.pairs)
    p.w = args.out, p.w_m = w.m, p.w_group = g.K * problem.w.n;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
  if (error != cudaSuccess) return error;
  dim3 const blocks(unsigned(shape.tiles * split), unsigned(problem.groups));
  error = launch_dependent(kernel, blocks, S::threads, S::shared_bytes, stream, p);
  if (error != cudaSuccess || p.w != nullptr) return error;
  return add_parts<T>(TM, TN, shape, problem, split, args, stream);
}

template <DType dtype, int TM, int TN>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool may_gather = dtype != DType::f32 && TN == 128 && TM != 192;
  bool const gathered = may_gather && pixels_wgrad_gathers(TM, TN, problem);
  auto* kernel = main_kernel<T, TM, TN, false>;
  if constexpr (may_gather)
    if (gathered) kernel = main_kernel<T, TM, TN, true>;
  return launch_sums<Shape<TM, TN>, dtype, TM, TN>(kernel, gathered, true, problem, plan, args, stream);
}

}  // namespace conv2d_ext::pixels_wgrad

#define CONV2D_EXT_PIXELS_WGRAD_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                      \
    return pixels_wgrad::launch<DType::dtype, tm, tn>(p, plan, args, stream);    \
  }
