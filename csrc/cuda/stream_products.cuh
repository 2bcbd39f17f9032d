// wgrad in 16-bit types of small planes, as products of pixels that sum over images. A product has 16 neighbouring
// elements of y of a block's planes, which lie one after the other in memory, and the elements of x around them: of
// these each tap has one for each element of y, and the others belong to none. So nothing is masked; which sums belong
// to which tap is asked in the end. The copy engine brings 16 images of the planes at a time, at the command of a warp
// of its own. A block stays with its channels as long as it has images of them. What is done once is short: it comes
// from memory as instructions do.
#pragma once

#include "../core/products.h"
#include "depthwise.cuh"
#include "give_back.cuh"
#include "launch.h"
#include "ptx.cuh"
#include "tma_map.h"

namespace conv2d_ext::stream {

struct ProductsParams {
  CUtensorMap x_map, y_map;
  void* out;
  float* partial;  // where more than one block has sums of a channel
  int64_t w_k, w_r, w_s;
  int C, H, W, S, pad_h, pad_w, area, taps, channels, positions, below, last;  // last: block of x that is a first one
  int rows;                                                                    // of a unit's boxes
  int pitch, stage_bytes, stages, shares, team_log2;
  uint32_t groups, least, more;  // items: least a block, and one more of so many blocks
  depthwise::Divisor by_groups, by_taps, by_S, by_W;

  __device__ int start(int position) const { return min(max(2 * position - below, 0), last); }
};

template <class T, int blocks>
__global__ void __launch_bounds__((product_warps(blocks) + 1) * 32, products_together(blocks))
    wgrad_products(__grid_constant__ ProductsParams const p) {
  constexpr int each = product_each(blocks), row = product_pitch(blocks);
  extern __shared__ __align__(128) unsigned char shared[];
  ptx::griddepcontrol_launch_dependents();
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared);
  auto full = [&](int stage) { return barriers + stage; };
  auto empty = [&](int stage) { return barriers + p.stages + stage; };
  int const warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0), lane = int(threadIdx.x) % 32;
  int const warps = int(blockDim.x) / 32 - 1;
  uint32_t const stages = ptx::shared_address(shared) + kProductsBegin;
  float* const sums = reinterpret_cast<float*>(shared + kProductsBegin);
  if (threadIdx.x == 0)
    for (int i = 0; i < p.stages; ++i) ptx::mbarrier_init(full(i), 1), ptx::mbarrier_init(empty(i), warps);
  ptx::fence_mbarrier_init();
  __syncthreads();

  auto item_of = [&](uint32_t block) { return block * p.least + min(block, p.more); };
  uint32_t const begin = item_of(blockIdx.x), end = item_of(blockIdx.x + 1);
  int stage = 0;
  uint32_t parity = 0;
  auto advance = [&]() {
    if (++stage == p.stages) stage = 0, parity ^= 1;
  };
#pragma unroll 1
  for (uint32_t first = begin; first < end;) {
    uint32_t const unit = p.by_groups.quotient(first), group = first - unit * p.groups;
    uint32_t const count = min(end - first, p.groups - group);
    float acc[each][blocks][4] = {};
    if (warp == warps) {
      if (lane == 0) {
        uint64_t const once = ptx::createpolicy_evict_first();  // as bring_run
#pragma unroll 1
        for (uint32_t i = 0; i < count; ++i, advance()) {
          if (i >= p.stages) ptx::mbarrier_wait(empty(stage), parity ^ 1);
          ptx::mbarrier_arrive_expect_tx(full(stage), p.stage_bytes);
          uint32_t const to = stages + stage * p.stage_bytes;
          int const image = int(group + i) * kProductImages, at = int(unit) * p.rows;
          ptx::cp_async_bulk_tensor_4d(to, &p.x_map, full(stage), 0, at, image, 0, once);
          ptx::cp_async_bulk_tensor_4d(to + kProductImages * p.pitch, &p.y_map, full(stage), 0, at, image, 0, once);
        }
      }
      __syncwarp();
      // The other lanes' and the next segment's.
      stage = __shfl_sync(0xffffffffu, stage, 0), parity = __shfl_sync(0xffffffffu, parity, 0);
    } else {
      // A product that does not exist reads what is there.
      uint32_t const from_y = stages + kProductImages * p.pitch + (lane % 8 + lane / 16 * 8) * p.pitch +
                              warp * each * 32 + lane / 8 % 2 * 16;
      uint32_t from_x[each];
#pragma unroll
      for (int j = 0; j < each; ++j)
        from_x[j] = stages + lane % 16 * p.pitch + lane / 16 * 16 + p.start(warp * each + j) * 16;
#pragma unroll 1
      for (uint32_t i = 0; i < count; ++i, advance()) {
        uint32_t const at = stage * p.stage_bytes;
        ptx::mbarrier_wait(full(stage), parity);
#pragma unroll
        for (int j = 0; j < each; ++j) {
          uint32_t y[4];
          ptx::ldmatrix_x4_trans(y, from_y + at + 32 * j);
#pragma unroll
          for (int k = 0; k < blocks; k += 2) {
            uint32_t x[4];
            ptx::ldmatrix_x4_trans(x, from_x[j] + at + 16 * k);
            ptx::mma_m16n8k16<T>(acc[j][k], y[0], y[1], y[2], y[3], x[0], x[1]);
            ptx::mma_m16n8k16<T>(acc[j][k + 1], y[0], y[1], y[2], y[3], x[2], x[3]);
          }
        }
        uint32_t seen = 0;
#pragma unroll
        for (int j = 0; j < each * blocks; ++j) seen |= __float_as_uint(acc[j / blocks][j % blocks][0]);
        give_back(empty(stage), seen);
      }
    }
    // The stages have been read: sums take their place.
    __syncthreads();
    if (warp != warps) {
#pragma unroll
      for (int j = 0; j < each; ++j)
        if (int const position = warp * each + j; position < p.positions)
#pragma unroll
          for (int k = 0; k < blocks; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half)
              *reinterpret_cast<float2*>(sums + (position * 16 + lane / 4 + 8 * half) * row + 8 * k + lane % 4 * 2) =
                  make_float2(acc[j][k][2 * half], acc[j][k][2 * half + 1]);
    }
    __syncthreads();
    // Some lanes add a tap's sums of a channel. Worked out again, for registers do not suffice to keep them:
    uint32_t const again = uint32_t(ptx::unknown(int(first))), of_unit = p.by_groups.quotient(again);
    int const thread = ptx::unknown(int(threadIdx.x)), team = 1 << p.team_log2, member = thread & (team - 1);
    int const all = p.channels * p.taps, c0 = int(of_unit) * p.channels;
    // The block with the unit's first item.
    int slot = 0;
    if (p.shares > 1)
      while (slot < int(blockIdx.x) && item_of(blockIdx.x - slot) > of_unit * p.groups) ++slot;
    bool const last = again + count == (of_unit + 1) * p.groups;
#pragma unroll 1
    for (int base = 0; base < all; base += int(blockDim.x) >> p.team_log2) {
      int const i = min(base + (thread >> p.team_log2), all - 1), which = int(p.by_taps.quotient(i));
      int const tap = i - which * p.taps, r = int(p.by_S.quotient(tap)), s = tap - r * p.S - p.pad_w;
      int y = int(p.by_W.quotient(member)), q = member - y * p.W, e = which * p.area + member;
      int const dy = int(p.by_W.quotient(team)), dq = team - dy * p.W;
      float sum = 0;
#pragma unroll 2
      for (int a = member; a < p.area; a += team, e += team) {
        int const h = y + r - p.pad_h, w = q + s;
        bool const inside = unsigned(h) < unsigned(p.H) && unsigned(w) < unsigned(p.W);
        int const x = (which * p.H + h) * p.W + w;
        float const v = sums[inside ? e * row + x - 8 * p.start(e / 16) : 0];
        sum += inside ? v : 0.f;
        q += dq, y += dy;
        if (q >= p.W) q -= p.W, ++y;
      }
      for (int distance = team / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (member != 0 || base + (thread >> p.team_log2) >= all) continue;
      if (p.shares == 1) {
        static_cast<T*>(p.out)[(c0 + which) * p.w_k + r * p.w_r + (s + p.pad_w) * p.w_s] = narrow<T>(sum);
      } else {
        int64_t const step = int64_t(p.C) * p.taps;
        float* const to = p.partial + int64_t(c0) * p.taps + i;
        to[slot * step] = sum;
        if (last)
          for (int other = slot + 1; other < p.shares; ++other) to[other * step] = 0;
      }
    }
    // The copy engine writes where others have read and written.
    ptx::fence_proxy_async();
    __syncthreads();
    first += count;
  }
}

// ---- host side

template <DType dtype>
cudaError_t launch_products(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  ProductsTile const t = products_tile(problem, h200_sxm);
  if (!t.used) return cudaErrorInvalidValue;
  ProductsParams p{};
  p.out = args.out, p.partial = static_cast<float*>(args.workspace);
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.C = int(problem.C), p.H = int(problem.H), p.W = int(problem.W), p.S = int(problem.S);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.area = p.H * p.W, p.taps = int(problem.R * problem.S), p.channels = t.channels, p.positions = t.positions;
  int const run = p.channels * p.area;
  p.below = t.below, p.last = run / 8 - t.blocks, p.rows = run / t.inner;
  p.pitch = 2 * run, p.stage_bytes = t.stage_bytes, p.stages = t.stages;
  p.shares = plan.split_k, p.team_log2 = t.team_log2;
  p.groups = uint32_t(t.groups), p.least = uint32_t(t.items / t.grid), p.more = uint32_t(t.items % t.grid);
  p.by_groups = depthwise::Divisor(p.groups), p.by_taps = depthwise::Divisor(uint32_t(p.taps));
  p.by_S = depthwise::Divisor(uint32_t(p.S)), p.by_W = depthwise::Divisor(uint32_t(p.W));
  auto encode = [&](CUtensorMap& map, void const* data, int64_t n) {
    tma::Tensor4 const tensor{
        data, dtype, {t.inner, problem.C * p.area / t.inner, problem.N, 1}, {1, t.inner, n, n * problem.N}};
    return tma::encode_boxes(map, tensor, t.inner, p.rows, kProductImages, 1);
  };
  if (auto const error = encode(p.x_map, args.a, problem.x.n)) return error;
  if (auto const error = encode(p.y_map, args.b, problem.y.n)) return error;
  auto* const kernel = t.blocks == 4   ? wgrad_products<T, 4>
                       : t.blocks == 6 ? wgrad_products<T, 6>
                       : t.blocks == 8 ? wgrad_products<T, 8>
                                       : wgrad_products<T, 10>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, t.shared_bytes))
    return error;
  kernel<<<unsigned(t.grid), (t.warps + 1) * 32, size_t(t.shared_bytes), stream>>>(p);
  if (cudaError_t const error = cudaGetLastError(); error != cudaSuccess || p.shares == 1) return error;
  return depthwise::launch_sum<T>(problem, plan, args, stream, true);
}

}  // namespace conv2d_ext::stream

#define CONV2D_EXT_STREAM_PRODUCTS_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                         \
    return stream::launch_products<DType::dtype>(p, plan, args, stream);            \
  }
