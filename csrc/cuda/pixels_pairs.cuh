// 1x1 fprop and dgrad over NCHW in place, 16-bit types and TF32, of small planes of any size (7x7): out[n, pixel] = sum
// over k of w[n, k] * in[k, pixel].
//
// Channels of such planes begin anywhere within vectors, where no box of the copy engine can; but 64 channels of an
// image (TF32: 32) are one piece of memory, which it brings as it lies, a box of whole lines. The pixels are the rows
// of the product and pass through registers, in any order: two rows of a thread are neighbouring pixels, in 16 bits a
// word of an even channel and two halves of an odd one. A tile has the pixels of several images; its results, again one
// piece of memory an image and whole vectors, are put together in shared memory and stored at once.
//
// blockIdx.y: the group.
//
// Persistent blocks, of tiles of TM rows by TN filters (dgrad: channels): two warpgroups multiply, a thread copies.
#pragma once

#include "../core/pixels_pairs.h"
#include "dependent.cuh"
#include "pixels_halves.cuh"

namespace conv2d_ext::pixels_pairs {

using tma::Divisor, tma::Tensor4, tma::encode_tiled;

constexpr int kGroups = 2, kThreads = (kGroups + 1) * kWarpgroup, kMultiplyRegs = 232, kCopyRegs = 40;
static_assert((kGroups * kMultiplyRegs + kCopyRegs) * kWarpgroup <= 65536);

// Channels of a step, 128 bytes of a filter.
template <class T>
constexpr int kChannels = kLineBytes / int(sizeof(T));

struct Params {
  CUtensorMap filters, pixels;
  char* out;
  int64_t out_n;  // bytes
  void const* bias;
  int64_t bias_stride;
  Divisor tiles_n, pairs;  // pairs of pixels of an image
  int32_t tiles, steps, depth, N;
  int32_t images, together, plane;  // together: images of a tile; plane: bytes of a channel
  int32_t lines;                    // of a step's channels
  int32_t stages, stage_bytes;
};

template <class T, bool rows, int TN>
__device__ __forceinline__ void copy(Params const& p, uint32_t ring, uint64_t* full, uint64_t* empty) {
  constexpr int filter_bytes = TN * kLineBytes, channels = kChannels<T>;
  ptx::griddepcontrol_wait();
  Stage stage;
#pragma unroll 1
  for (int tile = int(blockIdx.x); tile < p.tiles; tile += int(gridDim.x)) {
    int n = tile;
    int const image = p.tiles_n.divide(n) * p.together, count = min(p.together, p.images - image);
    n *= TN;
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step, stage.advance(p.stages)) {
      uint32_t to = ring + stage.index * p.stage_bytes;
      uint64_t* const bar = &full[stage.index];
      ptx::mbarrier_wait(&empty[stage.index], stage.parity ^ 1);  // passes on the first trip round the ring
      ptx::mbarrier_arrive_expect_tx(bar, filter_bytes + count * channels * p.plane);
      if constexpr (rows) {
#pragma unroll
        for (int i = 0; i < TN / 64; ++i)
          ptx::cp_async_bulk_tensor_4d(to + i * tma::kRunBytes, &p.filters, bar, n + i * 64, step * channels,
                                       int(blockIdx.y), 0);
      } else {
        ptx::cp_async_bulk_tensor_4d(to, &p.filters, bar, step * channels, n, int(blockIdx.y), 0);
      }
      to += filter_bytes;
#pragma unroll 1
      for (int i = 0; i < count; ++i, to += channels * p.plane)
        ptx::cp_async_bulk_tensor_4d(to, &p.pixels, bar, 0, step * p.lines, image + i, int(blockIdx.y));
    }
  }
  ptx::griddepcontrol_launch_dependents();
}

// Operands of an instruction, of a pair of pixels in 16 channels (TF32: 8) from the thread's first on.
template <class T>
__device__ __forceinline__ void load(uint32_t (&v)[4], uint32_t from, int plane) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = ptx::ld_shared(from + i / 2 * 4 * plane + i % 2 * 4);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i, from += 8 * plane) {
      uint32_t const even = ptx::ld_shared(from);
      uint32_t const low = ptx::ld_shared_u16(from + plane), high = ptx::ld_shared_u16(from + plane + 2);
      v[i * 2] = __byte_perm(even, low, 0x5410), v[i * 2 + 1] = __byte_perm(even, high, 0x5432);
    }
  }
}

// rows: filters are N-major.
template <class T, bool rows, int TM, int TN>
__global__ void __launch_bounds__(kThreads, 1) main_kernel(__grid_constant__ Params const p) {
  constexpr bool f32 = sizeof(T) == 4;
  constexpr int blocks = TM / 64 / kGroups, filter_bytes = TN * kLineBytes, size = int(sizeof(T)),
                channels = kChannels<T>,
                quarter = channels / 4;  // channels of an instruction
  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t full[kPairsStages], empty[kPairsStages];
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), warp = warp_uniform(int(threadIdx.x) / 32 % 4);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], kGroups * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (group == kGroups) {
    ptx::setmaxnreg_dec<kCopyRegs>();
    if (warp == 0 && ptx::elect()) copy<T, rows, TN>(p, ring, full, empty);
    return;
  }
  ptx::setmaxnreg_inc<kMultiplyRegs>();
  int const lane = int(threadIdx.x) % 32, column = lane % 4 * 2, plane = p.plane;
  uint64_t const layout = rows ? ptx::wgmma_descriptor(0, tma::kRunBytes, kCoreBytes) : tma::layout_of(kLineBytes);
  constexpr int step_b = rows ? 2 * kCoreBytes : 32;
  uint32_t const staging = ring + p.stages * p.stage_bytes;
  // A block's pair of rows: where its first pixel is in a stage's images and in the staged results.
  uint32_t in[blocks], out[blocks];
  bool single[blocks];  // the pair is the plane's last pixel
  int of[blocks];       // the image
#pragma unroll
  for (int b = 0; b < blocks; ++b) {
    // Pairs of a warp are as far apart as leaves its loads in different banks, where planes are 49 pixels.
    int pair = (group * blocks + b) * 32 + (f32 ? warp / 2 * 16 + lane / 4 * 2 + warp % 2 : lane / 4 * 4 + warp);
    of[b] = p.pairs.divide(pair);
    single[b] = (pair * 2 + 1) * size >= plane;
    bool const exists = of[b] < p.together;
    in[b] =
        filter_bytes + (exists ? of[b] * channels * plane + pair * 2 * size : 0) + (f32 ? lane % 4 : column) * plane;
    out[b] = staging + of[b] * TN * plane + pair * 2 * size + column * plane;
  }
  float acc[blocks][TN / 2];
  uint32_t v[2][blocks * 2][4] = {};
  auto fence_sums = [&] {
#pragma unroll
    for (int b = 0; b < blocks; ++b) ptx::wgmma_fence_operand(acc[b]);
  };
  auto give_back = [&](uint64_t* bar) {  // products have used what all lanes loaded
    if (lane == 0) ptx::mbarrier_arrive(bar);
  };
  Stage stage;
#pragma unroll 1
  for (int tile = int(blockIdx.x); tile < p.tiles; tile += int(gridDim.x)) {
    int n0 = tile;
    int const image = p.tiles_n.divide(n0) * p.together, count = min(p.together, p.images - image);
    n0 *= TN;
#pragma unroll
    for (int b = 0; b < blocks; ++b)
#pragma unroll
      for (int i = 0; i < TN / 2; ++i) acc[b][i] = 0;
    int before = -1;
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step, stage.advance(p.stages)) {
      uint32_t const from = ring + stage.index * p.stage_bytes;
      int const parts = (p.depth - step * channels) / quarter;  // 4, or fewer of the last step
      auto filters = [&](int part) { return tma::at_address(layout, from + part * step_b); };
      ptx::mbarrier_wait(&full[stage.index], stage.parity);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_fence_operand(v[half]);
        if (half == 1 && before >= 0) give_back(&empty[before]);
        if (half * 2 < parts) {
#pragma unroll
          for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int b = 0; b < blocks; ++b)
              load<T>(v[half][b * 2 + k], from + in[b] + (half * 2 + k) * quarter * plane, plane);
          fence_sums();
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < 2; ++k)
            if (half * 2 + k < parts)
#pragma unroll
              for (int b = 0; b < blocks; ++b)
                if constexpr (f32)
                  ptx::wgmma_mma_async_tf32(acc[b], v[half][b * 2 + k], filters(half * 2 + k));
                else
                  ptx::wgmma_mma_async<T, rows>(acc[b], v[half][b * 2 + k], filters(half * 2 + k));
        }
        ptx::wgmma_commit_group();
      }
      before = stage.index;
    }
    ptx::wgmma_wait_group<0>();
    fence_sums();
    give_back(&empty[before]);
    if (p.bias != nullptr) ptx::griddepcontrol_wait();
    if (threadIdx.x < 32) ptx::cp_async_bulk_wait_group_read<0>();  // the results before are stored
    ptx::bar_sync(1, kGroups * kWarpgroup);
#pragma unroll
    for (int j = 0; j < TN / 8; ++j) {
      float bias[2] = {};
      if (p.bias != nullptr)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (int const at = n0 + j * 8 + column + i; at < p.N)
            bias[i] = widen(static_cast<T const*>(p.bias)[(int64_t(blockIdx.y) * p.N + at) * p.bias_stride]);
#pragma unroll
      for (int b = 0; b < blocks; ++b) {
        if (of[b] >= count) continue;
        float const* const sums = &acc[b][j * 4];
        uint32_t const to = out[b] + j * 8 * plane;
        if constexpr (f32) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (i < 2 || !single[b]) ptx::st_shared_f32(to + i % 2 * plane + i / 2 * size, sums[i] + bias[i % 2]);
        } else {
          uint32_t const even = pack<T>(sums[0] + bias[0], sums[2] + bias[0]),
                         odd = pack<T>(sums[1] + bias[1], sums[3] + bias[1]);
          ptx::st_shared_u16(to + plane, uint16_t(odd));
          if (single[b]) {
            ptx::st_shared_u16(to, uint16_t(even));
          } else {
            ptx::st_shared(to, even);
            ptx::st_shared_u16(to + plane + 2, uint16_t(odd >> 16));
          }
        }
      }
    }
    ptx::fence_proxy_async();
    ptx::bar_sync(1, kGroups * kWarpgroup);
    if (threadIdx.x < 32) {
#pragma unroll 1
      for (int i = lane; i < count; i += 32)
        ptx::cp_async_bulk_store(p.out + (image + i) * p.out_n + (int64_t(blockIdx.y) * p.N + n0) * plane,
                                 staging + i * TN * plane, min(TN, p.N - n0) * plane);
      ptx::cp_async_bulk_commit_group();
    }
  }
  if (threadIdx.x < 32) ptx::cp_async_bulk_wait_group_read<0>();  // shared memory ends with the block
}

template <Op op, DType dtype, int TM, int TN>
cudaError_t launch(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool forward = op == Op::fprop;
  constexpr bool f32 = dtype == DType::f32;
  Problem const g = group_of(problem);
  PixelsPairs const cut(TM, TN, op, g);
  Strides const &in = forward ? problem.x : problem.y, &out = forward ? problem.y : problem.x;
  Params p{};
  p.out = static_cast<char*>(args.out), p.out_n = out.n * int(sizeof(T));
  p.bias = args.bias, p.bias_stride = args.bias_stride;
  p.depth = int32_t(forward ? g.C : g.K), p.N = int32_t(forward ? g.K : g.C);
  p.steps = int32_t(ceil_div(p.depth, kChannels<T>)), p.plane = int32_t(problem.H * problem.W * int(sizeof(T)));
  p.images = int32_t(problem.N), p.together = int32_t(cut.together), p.tiles = int32_t(cut.tiles);
  p.tiles_n = Divisor(cut.tiles_n), p.pairs = Divisor(cut.pairs);
  p.lines = cut.lines, p.stages = cut.stages, p.stage_bytes = cut.stage_bytes;
  Tensor4 w{args.b, dtype, {g.C, g.K, problem.groups, 1}, {1, problem.w.n, g.K * problem.w.n, 0}, f32};
  if constexpr (f32 && !forward) {
    dim3 const grid(unsigned(ceil_div(g.C, 64)), unsigned(ceil_div(g.K, 64)), unsigned(problem.groups));
    auto* const turned = static_cast<T*>(args.workspace);
    pixels_halves::turn_kernel<T>
        <<<grid, 256, 0, stream>>>(static_cast<T const*>(args.b), problem.w.n, turned, int(g.K), int(g.C));
    if (auto const error = cudaGetLastError()) return error;
    w = {turned, dtype, {g.K, g.C, problem.groups, 1}, {1, g.K, g.K * g.C, 0}, true};
  }
  if (auto const error = encode_tiled(p.filters, w, kChannels<T>, forward || f32 ? TN : 64, 1, 1)) return error;
  int64_t const elements = cut.line / int(sizeof(T)), lines = p.depth * problem.H * problem.W / elements;
  Tensor4 const pixels{
      args.a, dtype, {elements, lines, problem.N, problem.groups}, {1, elements, in.n, elements * lines}, f32};
  if (auto const error = tma::encode_boxes(p.pixels, pixels, int(elements), cut.lines, 1, 1)) return error;
  int sm_count = 0;
  if (auto const error = count_sms(sm_count)) return error;
  auto *const kernel = main_kernel < T, !forward && !f32, TM, TN > ;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, cut.shared_bytes))
    return error;
  dim3 const blocks(unsigned(min64(p.tiles, group_blocks(problem, sm_count))), unsigned(problem.groups));
  return launch_dependent(kernel, blocks, kThreads, cut.shared_bytes, stream, p);
}

}  // namespace conv2d_ext::pixels_pairs

#define CONV2D_EXT_PIXELS_PAIRS_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                      \
    return pixels_pairs::launch<Op::op, DType::dtype, tm, tn>(p, args, stream);  \
  }
