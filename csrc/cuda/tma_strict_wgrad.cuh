// wgrad in channels_last in strict float32 on tensor cores: three TF32 products of split operands. v = hi + lo, both
// rounded to TF32; hi * hi + hi * lo + lo * hi lacks lo * lo alone, 2^-22 of the product at most.
//
// The skeleton is tma_wgrad_tf32.cuh's: x is loaded as fragments, and split in registers; y is turned by a warpgroup of
// its own, which writes filters x pixels twice, hi and lo. The rows of a tile are runs of 32 channels of one tap, 64 a
// multiplying warpgroup, of which there are two or three.
//
// The tensor cores cut off the lowest bits of what they add. So their sums are of 32 pixels, the small products first,
// and are then added to totals in registers, as float32. While one warpgroup adds, the others multiply.
//
// An infinity has no lo (inf - inf), nor has what rounds to one: every sum with such becomes NaN. Weights that are NaN
// are summed again, product by product, by the second launch.
#pragma once

#include "give_back.cuh"
#include "tma_wgrad_tf32.cuh"

namespace conv2d_ext::strict_wgrad {

using tf32::wgrad_out_of, tf32::WgradBarriers, tf32::WgradParams, tf32::WgradUnit;

template <int TM, int TN>
struct Shape {
  static constexpr int tm = TM, tn = TN, multipliers = TM / 64, threads = (multipliers + 2) * kWarpgroup;
  static constexpr int run = 32, pixels = 32;  // channels or filters of a line; pixels of a step
  static constexpr int run_bytes = pixels * kLineBytes;
  static constexpr int a_bytes = TM * kLineBytes, b_bytes = TN * kLineBytes, stage_bytes = a_bytes + b_bytes;
  static constexpr int turned_stages = 3, turned_bytes = 2 * b_bytes;  // hi, lo
  static constexpr int stages = (225 * 1024 - turned_stages * turned_bytes) / stage_bytes;
  static constexpr int ring_bytes = stages * stage_bytes;
  static constexpr int shared_bytes = ring_bytes + turned_stages * turned_bytes + 1024;
  static constexpr int multiply_regs = multipliers == 2 ? 208 : 128, turn_regs = 56, copy_regs = 40;
  static_assert((multipliers == 2 || multipliers == 3) && TM % 64 == 0 && TN % 32 == 0);
  // Of what the block has at launch, a multiple of 8 registers a thread.
  static_assert((multipliers * multiply_regs + turn_regs + copy_regs) * kWarpgroup <=
                65536 / threads / 8 * 8 * threads);
};

// Where the operands' values are, for sums product by product.
struct Images {
  float const *x, *y;
  int64_t x_n, x_h, x_w, y_n, y_h, y_w;
  int32_t H, W;
};

__device__ inline uint32_t low_part(uint32_t v, uint32_t high) {
  return ptx::cvt_rn_tf32(__uint_as_float(v) - __uint_as_float(high));
}

// A warp turns 8 pixels of all filters; a lane has a filter of each run.
template <int TM, int TN>
__device__ void turn(WgradParams const& p, uint32_t ring, WgradBarriers<Shape<TM, TN>>& bars) {
  using S = Shape<TM, TN>;
  int const warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  uint32_t from[8];  // of the pixels
#pragma unroll
  for (int i = 0; i < 8; ++i)
    from[i] = ring + S::a_bytes + (warp * 8 + i) * kLineBytes + ((lane / 4) ^ i) * 16 + lane % 4 * 4;
  uint32_t const to = ring + S::ring_bytes + lane * kLineBytes;
  uint32_t const even = ((warp * 2) ^ (lane % 8)) * 16, odd = ((warp * 2 + 1) ^ (lane % 8)) * 16;
  Stage stage, turned;
  for (int u = blockIdx.x; u < p.tiles * p.splits; u += gridDim.x) {
    WgradUnit const unit(p, u);
    for (int step = 0; step < unit.count; ++step) {
      ptx::mbarrier_wait(&bars.full[stage.index], stage.parity);
#pragma unroll
      for (int run = 0; run < TN / S::run; ++run) {
        uint32_t v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = ptx::ld_shared(from[i] + stage.index * S::stage_bytes + run * S::run_bytes);
        if (run == 0) ptx::mbarrier_wait(&bars.used[turned.index], turned.parity ^ 1);
        uint32_t const line = to + turned.index * S::turned_bytes + run * S::run * kLineBytes;
        uint32_t high[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) high[i] = ptx::cvt_rn_tf32(__uint_as_float(v[i])), v[i] = low_part(v[i], high[i]);
        ptx::st_shared_v4(line + even, make_uint4(high[0], high[2], high[4], high[6]));
        ptx::st_shared_v4(line + odd, make_uint4(high[1], high[3], high[5], high[7]));
        ptx::st_shared_v4(line + S::b_bytes + even, make_uint4(v[0], v[2], v[4], v[6]));
        ptx::st_shared_v4(line + S::b_bytes + odd, make_uint4(v[1], v[3], v[5], v[7]));
      }
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) {
        ptx::mbarrier_arrive(&bars.turned[turned.index]);
        ptx::mbarrier_arrive(&bars.empty[stage.index]);
      }
      stage.advance(S::stages);
      turned.advance(S::turned_stages);
    }
  }
}

// Stores a thread's totals, or adds them to what it has stored: of rows `first` and the next, columns
// 8 j + 2 (lane % 4) + {0, 1}. True: a weight is NaN.
template <int TM, int TN>
__device__ bool store(WgradParams const& p, WgradUnit const& unit, int first, float const (&total)[TN / 2], bool add) {
  int const quad = int(threadIdx.x) % 4;
  bool nan = false;
  auto store_pair = [&](float* to, int j, int e) {
    float2 v = add ? *reinterpret_cast<float2 const*>(to) : make_float2(0, 0);
    v.x += total[j * 4 + e], v.y += total[j * 4 + 2 + e];
    nan |= v.x != v.x || v.y != v.y;
    *reinterpret_cast<float2*>(to) = v;
  };
  if (p.splits > 1) {
    float* const partial = static_cast<float*>(p.workspace) + int64_t(unit.index) * (TM * TN) + first;
#pragma unroll
    for (int j = 0; j < TN / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) store_pair(partial + (j * 8 + quad * 2 + e) * TM, j, e);
      if (j % 4 == 3) ptx::compiler_fence();
    }
    return nan;
  }
  int64_t const to = wgrad_out_of(p, unit.m * TM + first);
  if (to < 0) return false;
  int n = unit.n * TN + quad * 2;
  float* to_n = static_cast<float*>(p.out) + to + (unit.group * p.K + n) * p.out_k;
#pragma unroll
  for (int j = 0; j < TN / 8; ++j, n += 8, to_n += 8 * p.out_k) {
    if (n >= p.K) break;
    store_pair(to_n, j, 0);  // K is a multiple of 4: n + 1 exists too
    store_pair(to_n + p.out_k, j, 1);
    ptx::compiler_fence();
  }
  return nan;
}

template <int TM, int TN>
__device__ void multiply(WgradParams const& p, uint32_t ring, WgradBarriers<Shape<TM, TN>>& bars) {
  using S = Shape<TM, TN>;
  constexpr int parts = S::pixels / 8;  // an instruction's pixels
  int const warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  int const first = warp * 16 + lane / 4 * 2;  // row
  // A thread's pair in the lines of pixel 2 (lane % 4) and the next.
  uint32_t const lines = ring + first / S::run * S::run_bytes + lane % 4 * 2 * kLineBytes;
  uint32_t const chunk = first % S::run / 4, within = first % 4 * 4;
  uint32_t const even = lines + (chunk ^ (lane % 4 * 2)) * 16 + within;
  uint32_t const odd = lines + kLineBytes + (chunk ^ (lane % 4 * 2 + 1)) * 16 + within;
  Stage stage, turned;
  float acc[TN / 2] = {}, total[TN / 2];
  uint32_t raw[parts][4], high[parts][4], low[parts][4];
  auto load = [&] {
    ptx::mbarrier_wait(&bars.full[stage.index], stage.parity);
#pragma unroll
    for (int i = 0; i < parts; ++i) {
      uint32_t const at = stage.index * S::stage_bytes + i * kCoreBytes;
      uint2 const a = ptx::ld_shared_v2(even + at), b = ptx::ld_shared_v2(odd + at);
      raw[i][0] = a.x, raw[i][1] = a.y, raw[i][2] = b.x, raw[i][3] = b.y;
    }
  };
  for (int u = blockIdx.x; u < p.tiles * p.splits; u += gridDim.x) {
    WgradUnit const unit(p, u);
    if (unit.count > 0) load();
    bool nan;
    int step = 0;
    do {
      int const begin = step, end = min(step + tf32::kChainSteps, unit.count);
#pragma unroll
      for (int i = 0; i < TN / 2; ++i) total[i] = 0;
      for (; step < end; ++step) {
#pragma unroll
        for (int i = 0; i < parts; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            high[i][j] = ptx::cvt_rn_tf32(__uint_as_float(raw[i][j])), low[i][j] = low_part(raw[i][j], high[i][j]);
        uint32_t words = 0;
#pragma unroll
        for (int i = 0; i < parts; ++i) words |= high[i][1] | high[i][3];
        give_back(&bars.empty[stage.index], words);
        stage.advance(S::stages);
        ptx::mbarrier_wait(&bars.turned[turned.index], turned.parity);
        uint32_t const from_b = ring + S::ring_bytes + turned.index * S::turned_bytes;
        auto b = [&](int i, bool is_low) {
          return ptx::wgmma_descriptor(from_b + (is_low ? S::b_bytes : 0) + i * 32, 0, kCoreBytes);
        };
        ptx::wgmma_fence_operand(acc);
        ptx::wgmma_fence_operand(high);
        ptx::wgmma_fence_operand(low);
        ptx::wgmma_fence();
        ptx::wgmma_mma_async_tf32_first(acc, low[0], b(0, false));
#pragma unroll
        for (int i = 0; i < parts; ++i) {
          ptx::wgmma_mma_async_tf32(acc, high[i], b(i, true));
          if (i > 0) ptx::wgmma_mma_async_tf32(acc, low[i], b(i, false));
        }
#pragma unroll
        for (int i = 0; i < parts; ++i) ptx::wgmma_mma_async_tf32(acc, high[i], b(i, false));
        ptx::wgmma_commit_group();
        if (step + 1 < unit.count) load();
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_fence_operand(acc);
        ptx::wgmma_fence_operand(high);
        ptx::wgmma_fence_operand(low);
        if (lane == 0) ptx::mbarrier_arrive(&bars.used[turned.index]);
        turned.advance(S::turned_stages);
#pragma unroll
        for (int i = 0; i < TN / 2; ++i) total[i] += acc[i];
      }
      nan = store<TM, TN>(p, unit, first, total, begin > 0);
    } while (step < unit.count);
    if (p.splits == 1) {
      nan = __any_sync(0xffffffff, nan);
      if (lane == 0) static_cast<int*>(p.workspace)[unit.index * (TM / 16) + warp] = nan;
    }
  }
}

template <int TM, int TN>
__global__ void __launch_bounds__(Shape<TM, TN>::threads, 1) kernel(__grid_constant__ WgradParams const p) {
  using S = Shape<TM, TN>;
  extern __shared__ uint8_t dynamic[];
  __shared__ WgradBarriers<S> bars;
  uint32_t const ring = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  tf32::wgrad_init<S>(p, bars);
  int const role = int(threadIdx.x) / kWarpgroup;
  if (role < S::multipliers) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    multiply<TM, TN>(p, ring, bars);
  } else if (role == S::multipliers) {
    ptx::setmaxnreg_dec<S::turn_regs>();
    turn<TM, TN>(p, ring, bars);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    if (threadIdx.x % 32 == 0) {
      tf32::wgrad_copy<S>(p, ring, bars);
      ptx::griddepcontrol_launch_dependents();
    }
  }
}

// The weight of row m of all tiles' and filter k of all groups', product by product, by a warp. Chains of kChain
// products.
__device__ inline float exact(WgradParams const& p, Images const& images, int group, int m, int k) {
  int const run = m / 32, tap = run / p.chunks, c = group * p.C + run % p.chunks * 32 + m % 32;
  int const above = p.h0 + tap / p.S * p.dilation_h, left = p.w0 + tap % p.S * p.dilation_w;
  float total = 0;
  for (int64_t from = 0; from < p.pixels; from += 32 * kChain) {
    float sum = 0;
#pragma unroll 1
    for (int i = 0; i < kChain; ++i) {
      int64_t q = from + i * 32 + int(threadIdx.x) % 32;
      bool const inside = q < p.pixels;
      int64_t row = divide(q, p.Q);
      int64_t const n = divide(row, p.P), h = row * p.stride_h + above, w = q * p.stride_w + left;
      if (inside && h >= 0 && h < images.H && w >= 0 && w < images.W)
        sum += images.x[n * images.x_n + h * images.x_h + w * images.x_w + c] *
               images.y[n * images.y_n + row * images.y_h + q * images.y_w + group * p.K + k];
      if (__any_sync(0xffffffff, sum != sum)) return NAN;  // whatever comes
    }
    total += sum;
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) total += __shfl_xor_sync(0xffffffff, total, lane);
  return total;
}

// Sums what is NaN of a warp's weights again: of each lane those of rows m to m + 3 and of filter k.
__device__ inline void mend(WgradParams const& p, Images const& images, bool valid, int group, int m, int k,
                            float (&values)[4]) {
  unsigned nan = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (valid && values[i] != values[i]) nan |= 1u << i;
  for (unsigned lanes; (lanes = __ballot_sync(0xffffffff, nan != 0)) != 0;) {
    int const whose = __ffs(int(lanes)) - 1, which = __ffs(int(__shfl_sync(0xffffffff, nan, whose))) - 1;
    float const sum =
        exact(p, images, group, __shfl_sync(0xffffffff, m, whose) + which, __shfl_sync(0xffffffff, k, whose));
    if (int(threadIdx.x) % 32 != whose) continue;
    nan &= nan - 1;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i == which) values[i] = sum;
  }
}

// The second launch. Sums partial tiles as tf32::wgrad_reduce does. runs == 0: there are none, but flags of the warps
// whose weights in place are NaN.
template <int TM, int TN, int runs>
__global__ void __launch_bounds__(tf32::kReduceThreads)
    finish(__grid_constant__ WgradParams const p, __grid_constant__ Images const images) {
  constexpr int lanes = runs == 0 ? 1 : runs, fours = 32 / lanes;  // of a warp
  WgradUnit const unit(p, int(blockIdx.x));
  int const thread = int(blockIdx.y) * tf32::kReduceThreads + int(threadIdx.x);
  int const first = (thread / 32 * fours + thread % fours) * 4, run = thread % 32 / fours;
  int const m = unit.m * TM + first % TM, k = unit.n * TN + first / TM;
  int64_t const to = wgrad_out_of(p, m);
  bool const stores = to >= 0 && k < p.K && run == 0;
  float4* const out = reinterpret_cast<float4*>(static_cast<float*>(p.out) + to + (unit.group * p.K + k) * p.out_k);
  float values[4] = {};
  if constexpr (runs == 0) {
    ptx::griddepcontrol_wait();
    bool const flag = static_cast<int const*>(p.workspace)[unit.index * (TM / 16) + first % TM / 16] != 0;
    if (__ballot_sync(0xffffffff, flag) == 0) return;
    float4 const v = stores ? *out : make_float4(0, 0, 0, 0);
    values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
  } else {
    float4 const total = tf32::wgrad_total<TM, TN, runs>(p, unit, first, run, to >= 0 && k < p.K);
    values[0] = total.x, values[1] = total.y, values[2] = total.z, values[3] = total.w;
  }
  mend(p, images, stores, unit.group, m, k, values);
  if (stores) *out = make_float4(values[0], values[1], values[2], values[3]);
}

template <int TM, int TN>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using S = Shape<TM, TN>;
  WgradParams p{};
  cudaError_t const error = tf32::launch_sums<S>(p, kernel<TM, TN>, false, problem, plan, args, stream);
  if (error != cudaSuccess) return error;
  Strides const &x = problem.x, &y = problem.y;
  Images const images{static_cast<float const*>(args.a),
                      static_cast<float const*>(args.b),
                      x.n,
                      x.h,
                      x.w,
                      y.n,
                      y.h,
                      y.w,
                      int32_t(problem.H),
                      int32_t(problem.W)};
  bool const many = p.splits > tf32::kReduceRunSplits;
  auto* const second = p.splits == 1 ? finish<TM, TN, 0> : many ? finish<TM, TN, tf32::kReduceRuns> : finish<TM, TN, 1>;
  return tf32::launch_second<S>(second, p, stream, images);
}

}  // namespace conv2d_ext::strict_wgrad

#define CONV2D_EXT_TMA_STRICT_WGRAD_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                          \
    return strict_wgrad::launch<tm, tn>(p, plan, args, stream);                      \
  }
