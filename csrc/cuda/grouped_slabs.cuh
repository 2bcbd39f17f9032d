// fprop and dgrad of stride 1 of 3x3 groups of 16 or 32 channels of 16-bit types and in TF32, channels_last, on
// mma.sync.
//
// A block has a slab of channels, a line of 128 bytes for each pixel, and walks down some of the images, of which the
// copy engine brings a few rows at a time into a ring; in TF32 it rounds them. Each of its four warps has a quarter of
// the slab's filters, which stay in registers, and computes 16 pixels of results at a time: of a row of an image, or of
// two. A row of inputs, shifted by each column of taps, is loaded once for the rows of results that meet it: those are
// summed side by side.
//
// Lanes whose column is outside of the image read zeros.
#pragma once

#include "../core/grouped_slabs.h"
#include "fragments.cuh"
#include "give_back.cuh"
#include "launch.h"
#include "ptx.cuh"
#include "tma_map.h"
#include "types.cuh"

namespace conv2d_ext::slabs {

constexpr int kWarps = kSlabThreads / 32;

struct Params {
  CUtensorMap map;  // of the inputs
  void const *w, *bias;
  void* out;
  int64_t bias_stride, w_group, w_out, w_in, w_r, w_s, out_n, out_h, out_w;  // elements
  int N, channels, splits, images, items, stages, slots;                     // channels: of all groups
  int H, W, P, Q, pad_h, pad_w;                                              // of inputs and results
  int rows, stage_bytes, copied_bytes;                                       // of a stage
  bool paired;  // two of a filter's channels are loaded at once
};

// Places of 16 bytes as the copy engine writes them.
__device__ inline uint32_t swizzled(uint32_t at) { return at ^ (at >> 3 & 0x70); }

// A warp's filters, as fragments: of each tap, 32 bytes of channels of inputs, 8 filters.
template <class T, int channels>
struct Filters {
  static constexpr bool f32 = sizeof(T) == 4;
  static constexpr int depth = channels * int(sizeof(T)) / 32, blocks = f32 ? 1 : 2, count = 8 * blocks;
  uint32_t v[3][3][depth][blocks][2];

  __device__ void load(Params const& p, int first_out) {
    int const lane = threadIdx.x % 32, group = first_out / channels, first = first_out % channels;
    T const* const mine = static_cast<T const*>(p.w) + group * p.w_group + (first + lane / 4) * p.w_out +
                          lane % 4 * (f32 ? 1 : 2) * p.w_in;
    if constexpr (f32) {
      load(p, [&](int64_t at) { return ptx::cvt_rn_tf32(mine[at]); });
    } else if (p.paired) {
      load(p, [&](int64_t at) { return *reinterpret_cast<uint32_t const*>(mine + at); });
    } else {
      load(p, [&](int64_t at) {
        Vector<T, 2> two;
        two.v[0] = mine[at], two.v[1] = mine[at + p.w_in];
        return *reinterpret_cast<uint32_t const*>(&two);
      });
    }
  }

  template <class Word>
  __device__ void load(Params const& p, Word const& word) {
#pragma unroll
    for (int tap = 0; tap < 9; ++tap)
#pragma unroll
      for (int n = 0; n < blocks; ++n)
#pragma unroll
        for (int k = 0; k < depth * 2; ++k)
          v[tap / 3][tap % 3][k / 2][n][k % 2] =
              word(n * 8 * p.w_out + k * (f32 ? 4 : 8) * p.w_in + tap / 3 * p.w_r + tap % 3 * p.w_s);
  }

  // A row of inputs at column s of the taps.
  __device__ void multiply(float (&sums)[blocks][4], uint32_t const (&x)[4], int k, int r, int s) const {
#pragma unroll
    for (int n = 0; n < blocks; ++n) {
      auto const& w = v[r][s][k][n];
      if constexpr (f32)
        ptx::mma_m16n8k8_tf32(sums[n], x[0], x[1], x[2], x[3], w[0], w[1]);
      else
        ptx::mma_m16n8k16<T>(sums[n], x[0], x[1], x[2], x[3], w[0], w[1]);
    }
  }
};

template <class T, int channels>
__global__ void __launch_bounds__(kSlabThreads, kSlabBlocks) slabs_kernel(__grid_constant__ Params const p) {
  extern __shared__ __align__(1024) char dynamic[];
  using Weights = Filters<T, channels>;
  constexpr int depth = Weights::depth, blocks = Weights::blocks;
  uint32_t const begin = ptx::shared_address(dynamic), ring = (begin + 1023) & ~1023u;
  uint64_t* const full = reinterpret_cast<uint64_t*>(dynamic + (ring - begin) + p.slots * p.stage_bytes);
  uint64_t* const empty = full + kSlabSlots;
  uint32_t const zero = ptx::shared_address(empty + kSlabSlots);
  int const slab = blockIdx.x / p.splits, split = blockIdx.x - slab * p.splits;
  int const least = p.items / p.splits, more = p.items - least * p.splits;
  int const first = split * least + min(split, more), count = (least + (split < more ? 1 : 0)) * p.stages;
  int const lane = threadIdx.x % 32, warp = warp_uniform(int(threadIdx.x) / 32);
  int const channel = slab * (kSlabLine / int(sizeof(T))), first_out = channel + warp * Weights::count;
  bool const works = first_out < p.channels;
  auto copy = [&](int i, int slot) {
    int const item = first + i / p.stages, stage = i % p.stages;
    ptx::mbarrier_arrive_expect_tx(full + slot, p.copied_bytes);
    ptx::cp_async_bulk_tensor_4d(ring + slot * p.stage_bytes, &p.map, full + slot, channel, 0, stage * p.rows - p.pad_h,
                                 item * p.images);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.slots; ++i) ptx::mbarrier_init(full + i, 1), ptx::mbarrier_init(empty + i, kWarps);
    ptx::fence_mbarrier_init();
    for (int i = 0; i < min(p.slots, count); ++i) copy(i, i);
    ptx::st_shared_v4(zero, uint4{});
  }
  Weights w;
  Vector<T, 2> bias[blocks] = {};
  if (works) {
    w.load(p, first_out);
    if (p.bias != nullptr)
#pragma unroll
      for (int i = 0; i < 2 * blocks; ++i)
        bias[i / 2].v[i % 2] =
            static_cast<T const*>(p.bias)[(first_out + i / 2 * 8 + lane % 4 * 2 + i % 2) * p.bias_stride];
  }
  __syncthreads();

  bool const two = p.images == 2;
  // Of inputs, a lane has a pixel's address; of results, after they are turned, 8 filters of a pixel.
  int const pixel = lane % 16, column = two ? pixel % 8 : pixel;
  int const of_group = warp * Weights::count / channels * channels * int(sizeof(T)) + lane / 16 * 16;
  int const out_pixel = lane / 4 + (Weights::f32 ? 0 : lane % 4 / 2 * 8), out_column = two ? out_pixel % 8 : out_pixel;
  int const row_bytes = p.W * kLineBytes;
  // A pixel's place in a stage, at the first column of taps; the columns at which there is one: all bits, or none.
  uint32_t const from = uint32_t(((two ? pixel / 8 * p.rows * p.W : 0) + column - p.pad_w) * kLineBytes + of_group);
  uint32_t inside[3];
#pragma unroll
  for (int s = 0; s < 3; ++s) inside[s] = column < p.Q && unsigned(column + s - p.pad_w) < unsigned(p.W) ? ~0u : 0;
  // f32: a lane has another pixel of results, eight further on.
  int64_t const next_pixel = two ? p.out_n : 8 * p.out_w;
  int i = 0, slot = 0;  // the stage
  uint32_t parity = 0;
#pragma unroll 1
  for (int item = first; i < count; ++item) {
    int const n = item * p.images, image = n + (two ? out_pixel / 8 : 0);
    bool const stores = works && out_column < p.Q && image < p.N;
    bool const stores_next = works && (two ? stores && image + 1 < p.N : out_column + 8 < p.Q);
    T* to = static_cast<T*>(p.out) + image * p.out_n + out_column * p.out_w + first_out +
            (Weights::f32 ? lane % 4 * 2 : lane % 2 * 8);
    float sums[3][blocks][4] = {};  // rows of results under way
    int row = 0;                    // of the stage
    uint32_t seen = 0;              // a word of what was loaded last
#pragma unroll 1
    for (int o = 0; o < p.P + 2; ++o) {
#pragma unroll
      for (int e = 0; e < 4 * blocks; ++e) {
        auto at = [&](int k) -> float& { return sums[k][e / 4][e % 4]; };
        at(2) = at(1), at(1) = at(0), at(0) = widen(bias[e / 4].v[e % 2]);
      }
      if (row == 0) ptx::mbarrier_wait(full + slot, parity);
      uint32_t const at_row = ring + slot * p.stage_bytes + from + row * row_bytes;
      if (works && unsigned(o - p.pad_h) < unsigned(p.H)) {
#pragma unroll
        for (int s = 0; s < 3; ++s) {
          uint32_t x[depth][4];
          uint32_t const at = swizzled(at_row + s * kLineBytes);
#pragma unroll
          for (int k = 0; k < depth; ++k) ptx::ldmatrix_x4(x[k], ((at ^ k * 32) & inside[s]) | (zero & ~inside[s]));
#pragma unroll
          for (int k = 0; k < depth; ++k)
#pragma unroll
            for (int r = 0; r < 3; ++r) w.multiply(sums[r], x[k], k, r, s);
          seen = x[depth - 1][3];
        }
      }
      if (++row == p.rows || o == p.P + 1) {
        row = 0;
        give_back(empty + slot, seen);
        // To the place of the stage before this one, which the other warps are likely to have left.
        int const before = slot == 0 ? p.slots - 1 : slot - 1, next = i - 1 + p.slots;
        if (threadIdx.x == 0 && i > 0 && next < count) {
          ptx::mbarrier_wait(empty + before, slot == 0 ? parity ^ 1 : parity);
          copy(next, before);
        }
        __syncwarp();
        ++i;
        if (++slot == p.slots) slot = 0, parity ^= 1;
      }
      if (o < 2) continue;
      auto const& v = sums[2];
      if constexpr (Weights::f32) {
        if (stores) *reinterpret_cast<float2*>(to) = make_float2(v[0][0], v[0][1]);
        if (stores_next) *reinterpret_cast<float2*>(to + next_pixel) = make_float2(v[0][2], v[0][3]);
      } else {
        uint32_t words[4] = {pack<T>(v[0][0], v[0][1]), pack<T>(v[1][0], v[1][1]), pack<T>(v[0][2], v[0][3]),
                             pack<T>(v[1][2], v[1][3])};
        transpose_quad(words);
        if (stores) *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
      }
      to += p.out_h;
    }
  }
}

template <class T, int channels>
cudaError_t start(Params const& p, Slabs const& t, cudaStream_t stream) {
  auto* const kernel = slabs_kernel<T, channels>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared));
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(t.slabs * t.splits), kSlabThreads, size_t(t.shared), stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(Op op, Problem const& problem, Arguments const& args, cudaStream_t stream) {
  int sm_count = 0;
  if (cudaError_t const error = count_sms(sm_count)) return error;
  bool const backward = op == Op::dgrad;
  Slabs const t = grouped_slabs(op, problem, Device{sm_count, 90});
  int64_t const P = problem.P(), Q = problem.Q();
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  Params p{};
  p.N = int(problem.N), p.channels = int(problem.C), p.splits = int(t.splits), p.images = int(t.images);
  p.items = int(t.items), p.stages = int(t.stages), p.slots = int(t.slots);
  p.H = int(backward ? P : problem.H), p.W = int(backward ? Q : problem.W);
  p.P = int(backward ? problem.H : P), p.Q = int(backward ? problem.W : Q);
  p.pad_h = int(backward ? 2 - problem.pad_top : problem.pad_top);
  p.pad_w = int(backward ? 2 - problem.pad_left : problem.pad_left);
  p.rows = int(t.rows), p.stage_bytes = int(t.stage_bytes);
  p.copied_bytes = int(t.images * t.rows * t.columns) * kLineBytes;
  tma::Tensor4 const tensor{
      args.a, problem.dtype, {problem.C, p.W, p.H, problem.N}, {1, in.w, in.h, in.n}, problem.dtype == DType::f32};
  cudaError_t const error = tma::encode_tiled(p.map, tensor, kSlabLine / int(sizeof(T)), p.W, p.rows, p.images);
  if (error != cudaSuccess) return error;
  Strides const& w = problem.w;
  p.out = args.out, p.bias = args.bias, p.bias_stride = args.bias_stride;
  p.out_n = out.n, p.out_h = out.h, p.out_w = out.w;
  // dgrad goes through the taps from the last to the first.
  p.w = static_cast<T const*>(args.b) + (backward ? 2 * w.h + 2 * w.w : 0);
  p.w_r = backward ? -w.h : w.h, p.w_s = backward ? -w.w : w.w;
  p.w_group = problem.K_per_group() * w.n;
  p.w_out = backward ? w.c : w.n, p.w_in = backward ? w.n : w.c;
  p.paired = p.w_in == 1 && w.n % 2 == 0 && w.h % 2 == 0 && w.w % 2 == 0 && problem.w_align >= 4;
  return problem.C_per_group() == 32 ? start<T, 32>(p, t, stream) : start<T, 16>(p, t, stream);
}

}  // namespace conv2d_ext::slabs

#define CONV2D_EXT_GROUPED_SLABS_INSTANCE(family, op, dtype, tm, tn, tk, variant)       \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                             \
    return slabs::launch<typename TypeOf<DType::dtype>::type>(Op::op, p, args, stream); \
  }
