// wgrad of 1x1 filters over NCHW in strict float32 on tensor cores, in place: w[m, n] = sum over pixels of a[m, pixel]
// * b[n, pixel], of operands that are each the sum of two TF32 numbers. Tiles, runs of 32 pixels and parts are
// pixels_wgrad.cuh's, products and short sums tma_strict_wgrad.cuh's.
//
// A run's lines of 128 bytes are what wgmma takes. Two warpgroups load rows of a as fragments and split them in
// registers; b is split by a warpgroup of its own, which writes both parts as b lies. What the split makes NaN, of an
// infinity or what rounds to one, is summed again, product by product, by the part's own warps.
#pragma once

#include "pixels_wgrad.cuh"
#include "tma_strict.cuh"
#include "tma_strict_wgrad.cuh"

namespace conv2d_ext::strict_pixels_wgrad {

using pixels_wgrad::Params, pixels_wgrad::Planes, strict::Parts;
template <int TM, int TN>
using Shape = strict_wgrad::Shape<TM, TN>;

template <class S>
struct Barriers {
  uint64_t full[S::stages], empty[S::stages], turned[S::turned_stages], used[S::turned_stages];
};

// Both parts of the columns.
template <int TM, int TN>
__device__ void split_columns(int count, uint32_t ring, Barriers<Shape<TM, TN>>& bars) {
  using S = Shape<TM, TN>;
  uint32_t const at = int(threadIdx.x) % kWarpgroup * 16, to = ring + S::ring_bytes + at;
  Stage stage, turned;
  for (int step = 0; step < count; ++step) {
    uint32_t const from = ring + stage.index * S::stage_bytes + S::a_bytes + at;
    ptx::mbarrier_wait(&bars.full[stage.index], stage.parity);
    ptx::mbarrier_wait(&bars.used[turned.index], turned.parity ^ 1);
#pragma unroll 4
    for (int i = 0; i < S::b_bytes; i += kWarpgroup * 16) {
      uint4 const v = ptx::ld_shared_v4(from + i);
      uint32_t const of[4] = {v.x, v.y, v.z, v.w};
      uint32_t high[4], low[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        high[j] = ptx::cvt_rn_tf32(__uint_as_float(of[j])), low[j] = strict_wgrad::low_part(of[j], high[j]);
      uint32_t const line = to + turned.index * S::turned_bytes + i;
      ptx::st_shared_v4(line, make_uint4(high[0], high[1], high[2], high[3]));
      ptx::st_shared_v4(line + S::b_bytes, make_uint4(low[0], low[1], low[2], low[3]));
    }
    ptx::fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      ptx::mbarrier_arrive(&bars.turned[turned.index]);
      ptx::mbarrier_arrive(&bars.empty[stage.index]);
    }
    stage.advance(S::stages);
    turned.advance(S::turned_stages);
  }
}

// A part's sum of row m and column n, by a warp.
__device__ __noinline__ float made_again(Params const& p, int at, int count, int m, int n) {
  float total = 0;
  float const *a = p.a.group<float>() + m * p.a.c, *b = p.b.group<float>() + n * p.b.c;
  for (int step = 0; step < count && total == total; ++step, at += p.apart) {  // a NaN stays one
    int run = at;
    int64_t const image = p.runs.divide(run);
    int const pixel = run * 32 + int(threadIdx.x) % 32;
    if (pixel < p.pixels) total += a[image * p.a.n + pixel] * b[image * p.b.n + pixel];
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) total += __shfl_xor_sync(0xffffffff, total, lane);
  return total;
}

// Looks through what a warp's threads have stored, each four sums `step` apart: of rows m and m + 8, columns n and the
// next, then so of the next 8 columns.
template <int TN>
__device__ __noinline__ void mend(Params const& p, int at, int count, float4* to, int m, int n) {
#pragma unroll 1
  for (int j = 0; j < TN / 8; ++j, to += kWarpgroup, n += 8) {
    float* const values = reinterpret_cast<float*>(to);
#pragma unroll 1
    for (int e = 0; e < 4; ++e) {
      int const row = m + e / 2 * 8, column = n + e % 2;
      bool const exists = row < p.a.channels && n < p.b.channels && column < p.b.channels;
      bool const nan = exists && values[e] != values[e];
      for (unsigned lanes = __ballot_sync(0xffffffff, nan); lanes != 0; lanes &= lanes - 1) {
        int const whose = __ffs(int(lanes)) - 1;
        float const sum =
            made_again(p, at, count, __shfl_sync(0xffffffff, row, whose), __shfl_sync(0xffffffff, column, whose));
        if (int(threadIdx.x) % 32 == whose) values[e] = sum;
      }
    }
  }
}

template <int TM, int TN>
__device__ void multiply(Params const& p, int at, int count, int m0, int n0, float4* to, uint32_t ring,
                         Barriers<Shape<TM, TN>>& bars) {
  using S = Shape<TM, TN>;
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32;
  int const warp = int(threadIdx.x) / 32 % 4;
  uint32_t const lines = ring + (group * 64 + warp * 16 + lane % 16) * kLineBytes + ((lane / 16) ^ (lane % 8)) * 16;
  uint64_t const layout = tma::layout_of(kLineBytes);
  Stage stage, turned;
  float total[TN / 2] = {}, acc[TN / 2] = {};
  Parts parts[2] = {};
  auto take = [&](Parts& next) {
    ptx::mbarrier_wait(&bars.full[stage.index], stage.parity);
    strict::load(next, lines + stage.index * S::stage_bytes);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) bits |= next.low[i][j];
    give_back(&bars.empty[stage.index], bits);
    stage.advance(S::stages);
  };
  int before = -1;  // turned stage of the products that are under way
  auto move = [&] {
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
#pragma unroll
    for (int i = 0; i < TN / 2; ++i) total[i] += acc[i];
    if (before >= 0 && lane == 0) ptx::mbarrier_arrive(&bars.used[before]);
  };
  auto one = [&](Parts& now, Parts& next, bool last) {
    ptx::mbarrier_wait(&bars.turned[turned.index], turned.parity);
    uint32_t const high = ring + S::ring_bytes + turned.index * S::turned_bytes, low = high + S::b_bytes;
    move();
    before = turned.index;
    ptx::wgmma_fence_operand(acc);
    ptx::wgmma_fence();
    // The small products first: what is cut off of their sums is smaller.
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k == 0)
        ptx::wgmma_mma_async_tf32_first(acc, now.low[k], tma::at_address(layout, high));
      else
        ptx::wgmma_mma_async_tf32(acc, now.low[k], tma::at_address(layout, high + k * 32));
      ptx::wgmma_mma_async_tf32(acc, now.high[k], tma::at_address(layout, low + k * 32));
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) ptx::wgmma_mma_async_tf32(acc, now.high[k], tma::at_address(layout, high + k * 32));
    ptx::wgmma_commit_group();
    turned.advance(S::turned_stages);
    if (!last) take(next);
  };
  take(parts[0]);
  for (int step = 0; step < count; step += 2) {
    one(parts[0], parts[1], step + 1 == count);
    if (step + 1 == count) break;
    one(parts[1], parts[0], step + 2 == count);
  }
  move();
  bool nan = false;
  int const m = m0 + group * 64 + warp * 16 + lane / 4, n = n0 + lane % 4 * 2;
  to += group * (TN / 8 * kWarpgroup) + int(threadIdx.x) % kWarpgroup;
#pragma unroll
  for (int j = 0; j < TN / 8; ++j) {
    float const* const v = total + j * 4;
    if (n0 + j * 8 < p.b.channels) to[j * kWarpgroup] = make_float4(v[0], v[1], v[2], v[3]);
    float const sum = (m < p.a.channels ? v[0] + v[1] : 0) + (m + 8 < p.a.channels ? v[2] + v[3] : 0);
    nan |= n + j * 8 < p.b.channels && sum != sum;
  }
  if (__any_sync(0xffffffff, nan)) mend<TN>(p, at, count, to, m, n);
}

template <int TM, int TN>
__global__ void __launch_bounds__(Shape<TM, TN>::threads, 1) main_kernel(__grid_constant__ Params const p) {
  using S = Shape<TM, TN>;
  static_assert(S::multipliers == 2);
  extern __shared__ uint8_t dynamic[];
  __shared__ Barriers<S> bars;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int const role = warp_uniform(int(threadIdx.x) / kWarpgroup);
  ptx::griddepcontrol_launch_dependents();
  // Neighbouring blocks have different tiles of the same pixels.
  int n0 = int(blockIdx.x);
  int const part = p.tiles.divide(n0), tile = n0, m0 = p.tiles_n.divide(n0) * TM;
  n0 *= TN;
  int at = part * p.between;
  int const count = min(p.share, (p.steps - at + p.apart - 1) / p.apart);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; ++i) {
      ptx::mbarrier_init(&bars.full[i], 1);
      ptx::mbarrier_init(&bars.empty[i], (S::multipliers + 1) * 4);
    }
    for (int i = 0; i < S::turned_stages; ++i) {
      ptx::mbarrier_init(&bars.turned[i], 4);
      ptx::mbarrier_init(&bars.used[i], S::multipliers * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (role < S::multipliers) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    float4* const to =
        reinterpret_cast<float4*>(p.parts + pixels_wgrad::part_place(part, p.tiles.value, tile) * (TM * TN));
    multiply<TM, TN>(p, at, count, m0, n0, to, ring, bars);
  } else if (role == S::multipliers) {
    ptx::setmaxnreg_dec<S::turn_regs>();
    split_columns<TM, TN>(count, ring, bars);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    if (int(threadIdx.x) % kWarpgroup >= 32 || !ptx::elect()) return;
    ptx::griddepcontrol_wait();
    uint64_t const once = p.once ? ptx::createpolicy_evict_first() : 0;
    auto copy = [&](uint32_t to, CUtensorMap const& map, uint64_t* bar, int pixel, int first, int image) {
      if (once != 0)
        ptx::cp_async_bulk_tensor_4d(to, &map, bar, pixel, first, image, int(blockIdx.y), once);
      else
        ptx::cp_async_bulk_tensor_4d(to, &map, bar, pixel, first, image, int(blockIdx.y));
    };
    Stage stage;
#pragma unroll 1
    for (int step = 0; step < count; ++step, at += p.apart, stage.advance(S::stages)) {
      int run = at;
      int const image = p.runs.divide(run);
      uint32_t const to = ring + stage.index * S::stage_bytes;
      uint64_t* const bar = &bars.full[stage.index];
      ptx::mbarrier_wait(&bars.empty[stage.index], stage.parity ^ 1);  // passes on the first trip round the ring
      ptx::mbarrier_arrive_expect_tx(bar, p.bytes);
      copy(to, p.map_a, bar, run * 32, m0, image);
      copy(to + S::a_bytes, p.map_b, bar, run * 32, n0, image);
    }
  }
}

template <int TM, int TN>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  return pixels_wgrad::launch_sums<Shape<TM, TN>, DType::f32, TM, TN>(main_kernel<TM, TN>, false, false, problem, plan,
                                                                      args, stream);
}

}  // namespace conv2d_ext::strict_pixels_wgrad

#define CONV2D_EXT_PIXELS_STRICT_WGRAD_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                             \
    return strict_pixels_wgrad::launch<tm, tn>(p, plan, args, stream);                  \
  }
