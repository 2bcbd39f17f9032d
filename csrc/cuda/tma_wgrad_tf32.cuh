// wgrad in channels_last in TF32: what tma_wgrad.cuh does for the 16-bit types, for float operands. wgmma takes those
// K-major only, with the pixels contiguous, while the copies' lines hold the channels of a pixel. So both operands pass
// through registers (the copy engine has rounded them):
//   A (x) is loaded as fragments and multiplied from the registers;
//   B (y) is turned by a warpgroup of its own: stages of pixels x filters become filters x pixels.
// Rows are runs of 32 channels of one tap, TM / 32 of them a tile; columns are TN filters. A stage holds 32 pixels.
//
// Four warpgroups: two multiply, one turns B, one copies. Barriers of the ring: `full` (copied) and
// `empty` (read by the multiplying and the turning warps); of the ring of turned stages: `turned` and `used`.
//
// The order of the sum is free as long as A and B agree: of each 8 pixels an instruction takes 0 2 4 6 1 3 5 7, so that
// the lanes of a load of A lie in different banks. The order of the rows is free too: lane i of a warp has rows of
// neighbouring channels, which are loaded and stored as vectors.
//
// The tensor cores cut off the lowest bits of what they add, so sums are stored, and added to what was stored before,
// after every kChainSteps steps.
#pragma once

#include "merged.cuh"
#include "tma_tf32.cuh"

namespace conv2d_ext::tf32 {

constexpr int kChainSteps = int(kTf32Pixels) / wgrad_pixels(DType::f32);

struct WgradParams {
  CUtensorMap a, b;  // x, y
  int64_t pixels;    // N * P * Q
  int32_t P, Q;
  int32_t h0, w0, stride_h, stride_w, dilation_h, dilation_w;
  int32_t S, C, K;       // C, K: of a group
  int32_t runs, chunks;  // chunks: runs a tap
  int32_t steps, groups, splits;
  int32_t tiles, tiles_n;
  int64_t out_k, out_c, out_r, out_s;
  bool vectors;       // of four channels are stored at once
  bool parts;         // sums go to the workspace, for a second launch
  tma::OwnGroup own;  // of merged ones
  void* out;
  void* workspace;
};

struct WgradUnit {
  int32_t m, n, group, index;
  int32_t begin, count;

  __device__ WgradUnit(WgradParams const& p, int unit) {
    int const split = unit / p.tiles;
    int tile = unit % p.tiles;
    n = tile % p.tiles_n;
    tile /= p.tiles_n;
    group = tile % p.groups;
    m = tile / p.groups;
    index = unit;
    int const each = (p.steps + p.splits - 1) / p.splits;
    begin = split * each;
    int const rest = p.steps - begin;
    count = rest < 0 ? 0 : rest < each ? rest : each;
  }
};

template <int TM, int TN>
struct WgradShape {
  static constexpr int tm = TM, tn = TN, multipliers = 2, threads = (multipliers + 2) * kWarpgroup;
  static constexpr int run = 32, pixels = 32;  // channels or filters of a line; pixels of a step
  static constexpr int run_bytes = pixels * kLineBytes;
  static constexpr int a_bytes = TM * kLineBytes, b_bytes = TN * kLineBytes, stage_bytes = a_bytes + b_bytes;
  static constexpr int turned_stages = 3;
  static constexpr int stages = (225 * 1024 - turned_stages * b_bytes) / stage_bytes;
  static constexpr int ring_bytes = stages * stage_bytes;
  static constexpr int shared_bytes = ring_bytes + turned_stages * b_bytes + 1024;
  static constexpr int halves = TM / 128;    // 64-row instructions of a warpgroup
  static constexpr int vector = 2 * halves;  // neighbouring rows of a thread
  // 64K registers: two multiplying warpgroups, one that turns, one that copies.
  static constexpr int multiply_regs = 208, turn_regs = 56, copy_regs = 40;
  static_assert((2 * multiply_regs + turn_regs + copy_regs) * kWarpgroup <= 65536);
};

// S: WgradShape, or that of tma_strict_wgrad.cuh.
template <class S>
struct WgradBarriers {
  uint64_t full[S::stages], empty[S::stages], turned[S::turned_stages], used[S::turned_stages];
};

template <class S>
__device__ void wgrad_init(WgradParams const& p, WgradBarriers<S>& bars) {
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&p.a);
    ptx::prefetch_tensormap(&p.b);
  }
  if (threadIdx.x % 32 == 0) {
    int const warp = int(threadIdx.x) / 32;
    for (int i = warp; i < S::stages; i += S::threads / 32) {
      ptx::mbarrier_init(&bars.full[i], 4);                          // copying warps
      ptx::mbarrier_init(&bars.empty[i], (S::multipliers + 1) * 4);  // multiplying and turning warps
    }
    for (int i = warp; i < S::turned_stages; i += S::threads / 32) {
      ptx::mbarrier_init(&bars.turned[i], 4);
      ptx::mbarrier_init(&bars.used[i], S::multipliers * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
}

// One thread of each warp of the copying warpgroup copies a share of the runs: a single one could not keep up.
template <class S>
__device__ void wgrad_copy(WgradParams const& p, uint32_t ring, WgradBarriers<S>& bars) {
  constexpr int runs_a = S::tm / S::run, runs_b = S::tn / S::run, copiers = 4;
  constexpr int share = (runs_a + copiers - 1) / copiers;
  int const copier = int(threadIdx.x) / 32 % copiers;
  Stage stage;
  for (int u = blockIdx.x; u < p.tiles * p.splits; u += gridDim.x) {
    WgradUnit const unit(p, u);
    int c[share], offset_h[share], offset_w[share];
    int runs = 0;
#pragma unroll
    for (int i = 0; i < share; ++i) {
      int const at = i * copiers + copier, run = unit.m * runs_a + at, tap = run / p.chunks;
      if (at < runs_a && run < p.runs) ++runs;
      c[i] = unit.group * p.C + run % p.chunks * S::run;
      offset_h[i] = tap / p.S * p.dilation_h, offset_w[i] = tap % p.S * p.dilation_w;
    }
    int const k = unit.group * p.K + unit.n * S::tn;
    for (int step = 0; step < unit.count; ++step) {
      int64_t q = int64_t(unit.begin + step) * S::pixels;
      int64_t ph = divide(q, p.Q);
      int const n = int(divide(ph, p.P));
      int const h = p.h0 + int(ph) * p.stride_h, w = p.w0 + int(q) * p.stride_w;
      uint64_t* const full = &bars.full[stage.index];
      ptx::mbarrier_wait(&bars.empty[stage.index], stage.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, (runs + (runs_b + copiers - 1 - copier) / copiers) * S::run_bytes);
      uint32_t const to = ring + stage.index * S::stage_bytes;
      for (int i = copier; i < runs_b; i += copiers)  // first, for these have the longer way
        ptx::cp_async_bulk_tensor_im2col(to + S::a_bytes + i * S::run_bytes, &p.b, full, k + i * S::run, int(q),
                                         int(ph), n, 0, 0);
#pragma unroll
      for (int i = 0; i < share; ++i)
        if (i < runs)
          ptx::cp_async_bulk_tensor_im2col(to + (i * copiers + copier) * S::run_bytes, &p.a, full, c[i], w, h, n,
                                           offset_w[i], offset_h[i]);
      stage.advance(S::stages);
    }
  }
}

// A warp turns 8 pixels of all filters; a lane has a filter of each run.
template <int TM, int TN>
__device__ void wgrad_turn(WgradParams const& p, uint32_t ring, WgradBarriers<WgradShape<TM, TN>>& bars) {
  using S = WgradShape<TM, TN>;
  constexpr int runs = TN / S::run, together = 3;  // as many as there are registers for
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
      for (int first = 0; first < runs; first += together) {
        uint32_t v[together][8];
#pragma unroll
        for (int run = 0; run < together && first + run < runs; ++run)
#pragma unroll
          for (int i = 0; i < 8; ++i)
            v[run][i] = ptx::ld_shared(from[i] + stage.index * S::stage_bytes + (first + run) * S::run_bytes);
        if (first == 0) ptx::mbarrier_wait(&bars.used[turned.index], turned.parity ^ 1);
#pragma unroll
        for (int run = 0; run < together && first + run < runs; ++run) {
          uint32_t const line = to + turned.index * S::b_bytes + (first + run) * S::run * kLineBytes;
          ptx::st_shared_v4(line + even, make_uint4(v[run][0], v[run][2], v[run][4], v[run][6]));
          ptx::st_shared_v4(line + odd, make_uint4(v[run][1], v[run][3], v[run][5], v[run][7]));
        }
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

// A's values for an instruction of 8 pixels and each half of the rows: of pixel 2 (lane % 4) and of the next.
template <int halves>
__device__ inline void wgrad_load(uint32_t (*v)[4], uint32_t even, uint32_t odd) {
  if constexpr (halves == 2) {
    uint4 const a = ptx::ld_shared_v4(even), b = ptx::ld_shared_v4(odd);
    v[0][0] = a.x, v[0][1] = a.y, v[1][0] = a.z, v[1][1] = a.w;
    v[0][2] = b.x, v[0][3] = b.y, v[1][2] = b.z, v[1][3] = b.w;
  } else {
    uint2 const a = ptx::ld_shared_v2(even), b = ptx::ld_shared_v2(odd);
    v[0][0] = a.x, v[0][1] = a.y, v[0][2] = b.x, v[0][3] = b.y;
  }
}

// The offset of row m (channel m % 32 of a run) within a filter, or -1.
__device__ inline int64_t wgrad_out_of(WgradParams const& p, int m) {
  int const run = m / 32, tap = run / p.chunks, c = run % p.chunks * 32 + m % 32;
  return run < p.runs && c < p.C ? tap / p.S * p.out_r + tap % p.S * p.out_s + c * p.out_c : -1;
}

// Stores a thread's sums, or adds them to what it has stored: of rows `first` to first + 2 halves - 1, columns
// 8 j + 2 (lane % 4) + {0, 1}.
template <int TM, int TN, int halves>
__device__ void wgrad_store(WgradParams const& p, WgradUnit const& unit, int first, float const (&acc)[halves][TN / 2],
                            bool add) {
  using V = Vector<float, 2 * halves>;
  int const quad = int(threadIdx.x) % 4;
  auto store = [&](float* to, int j, int e) {
    V v{};
    if (add) v = *reinterpret_cast<V const*>(to);
#pragma unroll
    for (int i = 0; i < 2 * halves; ++i) v.v[i] += acc[i / 2][j * 4 + i % 2 * 2 + e];
    *reinterpret_cast<V*>(to) = v;
  };
  if (p.parts) {
    float* const partial = static_cast<float*>(p.workspace) + int64_t(unit.index) * (TM * TN) + first;
#pragma unroll
    for (int j = 0; j < TN / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) store(partial + (j * 8 + quad * 2 + e) * TM, j, e);
      if (j % 4 == 3) ptx::compiler_fence();
    }
    return;
  }
  int const m = unit.m * TM + first, c = m / 32 % p.chunks * 32 + m % 32;
  int64_t const to = wgrad_out_of(p, m);
  if (to < 0) return;
  // Of merged groups the channels' own has these filters.
  int const own = p.own.C == 0 ? 0 : c / p.own.C, begin = own * p.own.K,
            end = p.own.C == 0 ? p.K : min(begin + p.own.K, p.own.filters(unit.group, p.K));
  int n = unit.n * TN + quad * 2;
  float* to_n = static_cast<float*>(p.out) + to - own * p.own.C + (unit.group * p.K + n) * p.out_k;
#pragma unroll
  for (int j = 0; j < TN / 8; ++j, n += 8, to_n += 8 * p.out_k) {
    if (n >= end) break;
    if (n >= begin) store(to_n, j, 0);
    if (n + 1 >= begin && n + 1 < end) store(to_n + p.out_k, j, 1);
    ptx::compiler_fence();
  }
}

template <int TM, int TN>
__device__ void wgrad_multiply(WgradParams const& p, uint32_t ring, WgradBarriers<WgradShape<TM, TN>>& bars) {
  using S = WgradShape<TM, TN>;
  // Instructions of a half of the rows that go together, if there are registers for them.
  constexpr int halves = S::halves, together = TM * TN <= 256 * 128 ? 2 : 1;
  int const warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  int const first = warp * 16 * halves + lane / 4 * S::vector;  // row
  // A thread's vector in the lines of pixel 2 (lane % 4) and the next.
  uint32_t const lines = ring + first / S::run * S::run_bytes + lane % 4 * 2 * kLineBytes;
  uint32_t const chunk = first % S::run / 4, within = first % 4 * 4;
  uint32_t const even = lines + (chunk ^ (lane % 4 * 2)) * 16 + within;
  uint32_t const odd = lines + kLineBytes + (chunk ^ (lane % 4 * 2 + 1)) * 16 + within;
  Stage stage, turned;
  float acc[halves][TN / 2];
  uint32_t a[2][together * halves][4] = {};
  for (int u = blockIdx.x; u < p.tiles * p.splits; u += gridDim.x) {
    WgradUnit const unit(p, u);
    int step = 0;
    do {
      int const begin = step, end = min(step + kChainSteps, unit.count);
#pragma unroll
      for (int h = 0; h < halves; ++h)
#pragma unroll
        for (int i = 0; i < TN / 2; ++i) acc[h][i] = 0;
      int before = -1;  // turned stage of the multiplications that are under way
      for (; step < end; ++step) {
        ptx::mbarrier_wait(&bars.full[stage.index], stage.parity);
        uint32_t const from_b = ring + S::ring_bytes + turned.index * S::b_bytes;
#pragma unroll
        for (int part = 0; part < S::pixels / 8 / together;
             ++part) {  // fragments are loaded while those before are multiplied
          ptx::wgmma_wait_group<1>();
          ptx::wgmma_fence_operand(a[part % 2]);
#pragma unroll
          for (int i = 0; i < together; ++i) {
            uint32_t const at = stage.index * S::stage_bytes + (part * together + i) * kCoreBytes;
            wgrad_load<halves>(&a[part % 2][i * halves], even + at, odd + at);
          }
          if (part == 0) ptx::mbarrier_wait(&bars.turned[turned.index], turned.parity);
          if (part == 1 && lane == 0 && before >= 0) ptx::mbarrier_arrive(&bars.used[before]);
#pragma unroll
          for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
          ptx::wgmma_fence();
#pragma unroll
          for (int i = 0; i < together * halves; ++i)
            ptx::wgmma_mma_async_tf32(
                acc[i % halves], a[part % 2][i],
                ptx::wgmma_descriptor(from_b + (part * together + i / halves) * 32, 0, kCoreBytes));
          ptx::wgmma_commit_group();
        }
        if (lane == 0) ptx::mbarrier_arrive(&bars.empty[stage.index]);
        before = turned.index;
        stage.advance(S::stages);
        turned.advance(S::turned_stages);
      }
      ptx::wgmma_wait_group<0>();
#pragma unroll
      for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
      if (lane == 0 && before >= 0) ptx::mbarrier_arrive(&bars.used[before]);
      wgrad_store<TM, TN, halves>(p, unit, first, acc, begin > 0);
    } while (step < unit.count);
  }
}

template <int TM, int TN>
__global__ void __launch_bounds__(WgradShape<TM, TN>::threads, 1) wgrad_kernel(__grid_constant__ WgradParams const p) {
  using S = WgradShape<TM, TN>;
  extern __shared__ uint8_t dynamic[];
  __shared__ WgradBarriers<S> bars;
  uint32_t const ring = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  wgrad_init<S>(p, bars);
  int const role = int(threadIdx.x) / kWarpgroup;
  if (role < S::multipliers) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    wgrad_multiply<TM, TN>(p, ring, bars);
  } else if (role == S::multipliers) {
    ptx::setmaxnreg_dec<S::turn_regs>();
    wgrad_turn<TM, TN>(p, ring, bars);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    if (threadIdx.x % 32 == 0) {
      wgrad_copy<S>(p, ring, bars);
      ptx::griddepcontrol_launch_dependents();
    }
  }
}

// Four rows' sums of the partial tiles, in the order of the splits, or in `runs` runs of these, which are then added in
// their order. A thread has one run; many splits of few tiles would leave most SMs idle with one. Shared memory would
// keep its blocks from an SM until the kernel before has left it, so runs are lanes of a warp, 32 / runs apart.
inline constexpr int kReduceThreads = 256, kReduceRuns = 4, kReduceRunSplits = 16;
template <int TM, int TN, int runs>
__device__ inline float4 wgrad_total(WgradParams const& p, WgradUnit const& unit, int first, int run, bool exists) {
  constexpr int together = 8;
  float const* const partial = static_cast<float const*>(p.workspace) + int64_t(unit.index) * (TM * TN) + first;
  int const each = runs == 1 ? p.splits : (p.splits + runs - 1) / runs;
  int const end = exists ? min((run + 1) * each, p.splits) : 0;
  ptx::griddepcontrol_wait();
  float4 sum = make_float4(0, 0, 0, 0);
  for (int split = run * each; split < end; split += together) {
    float4 v[together];
#pragma unroll
    for (int i = 0; i < together; ++i)
      v[i] = split + i < end ? *reinterpret_cast<float4 const*>(partial + (split + i) * int64_t(p.tiles) * (TM * TN))
                             : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < together; ++i) sum.x += v[i].x, sum.y += v[i].y, sum.z += v[i].z, sum.w += v[i].w;
  }
  float4 total = sum;
#pragma unroll
  for (int i = 1; i < runs; ++i) {
    auto of_run = [&](float v) { return __shfl_down_sync(0xffffffff, v, unsigned(i * (32 / runs))); };
    total.x += of_run(sum.x), total.y += of_run(sum.y), total.z += of_run(sum.z), total.w += of_run(sum.w);
  }
  return total;
}

template <int TM, int TN, int runs>
__global__ void __launch_bounds__(kReduceThreads) wgrad_reduce(__grid_constant__ WgradParams const p) {
  constexpr int fours = 32 / runs;  // of a warp
  WgradUnit const unit(p, int(blockIdx.x));
  int const thread = int(blockIdx.y) * kReduceThreads + int(threadIdx.x);
  int const first = (thread / 32 * fours + thread % fours) * 4, run = thread % 32 / fours;
  int const m = unit.m * TM + first % TM, n = unit.n * TN + first / TM;
  int const c = m / 32 % p.chunks * 32 + m % 32;
  int64_t const to = wgrad_out_of(p, m);
  bool const stores = to >= 0 && n < p.own.filters(unit.group, p.K) && p.own.meets(n, 1, c, 4);
  if (runs == 1 && !stores) return;
  float4 const total = wgrad_total<TM, TN, runs>(p, unit, first, run, stores);
  if (run != 0 || !stores) return;
  float* const out = static_cast<float*>(p.out) + to + (unit.group * p.K + n) * p.out_k - p.own.first(n) * p.out_c;
  if (p.vectors) {
    *reinterpret_cast<float4*>(out) = total;
    return;
  }
  float const each[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (p.own.has(n, c + i)) out[i * p.out_c] = each[i];
}

// Fills p in, and launches the main kernel. rounded: the copy engine rounds to TF32.
template <class S>
cudaError_t launch_sums(WgradParams& p, void (*kernel)(WgradParams), bool rounded, Problem const& given,
                        Plan const& plan, Arguments const& args, cudaStream_t stream) {
  Problem const problem = as_merged(row_of(plan), given);
  p.own = tma::OwnGroup(given, problem);
  Walk const h = walk_h(Op::wgrad, problem, 0), w = walk_w(Op::wgrad, problem, 0);
  int64_t const P = problem.P(), Q = problem.Q();
  p.pixels = problem.N * P * Q, p.P = int32_t(P), p.Q = int32_t(Q);
  p.h0 = int32_t(h.lower), p.w0 = int32_t(w.lower);
  p.stride_h = int32_t(h.stride), p.stride_w = int32_t(w.stride);
  p.dilation_h = int32_t(h.tap_stride), p.dilation_w = int32_t(w.tap_stride);
  p.S = int32_t(problem.S), p.C = int32_t(problem.C_per_group()), p.K = int32_t(problem.K_per_group());
  p.chunks = int32_t(ceil_div(p.C, S::run)), p.runs = int32_t(problem.R * problem.S * p.chunks);
  p.steps = int32_t(ceil_div(p.pixels, S::pixels)), p.groups = int32_t(problem.groups), p.splits = plan.split_k;
  p.tiles_n = int32_t(ceil_div(p.K, S::tn));
  p.tiles = int32_t(ceil_div(p.runs, S::tm / S::run)) * p.tiles_n * p.groups;
  p.out_k = given.w.n, p.out_c = given.w.c, p.out_r = given.w.h, p.out_s = given.w.w;
  p.vectors = channel_vectors(given.w, given.w_align, given.C_per_group(), 4, DType::f32);
  p.parts = p.splits > 1 || p.out_c != 1 || (p.own.C > 0 && !p.vectors);
  p.out = args.out, p.workspace = args.workspace;
  Strides const &x = problem.x, &y = problem.y;
  cudaError_t error =
      encode_im2col(p.a, {args.a, DType::f32, {given.C, problem.W, problem.H, problem.N}, {1, x.w, x.h, x.n}, rounded},
                    h, w, S::run, S::pixels);
  if (error != cudaSuccess) return error;
  error = encode_im2col(p.b, {args.b, DType::f32, {given.K, Q, P, problem.N}, {1, y.w, y.h, y.n}, rounded}, Walk{P, 1},
                        Walk{Q, 1}, S::run, S::pixels);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
  if (error != cudaSuccess) return error;
  int sm_count = 0;
  if ((error = count_sms(sm_count)) != cudaSuccess) return error;
  int64_t const blocks = min64(int64_t(p.tiles) * p.splits, int64_t(sm_count));
  return launch_dependent(kernel, dim3(unsigned(blocks)), S::threads, S::shared_bytes, stream, p);
}

// The second launch, of a kernel whose threads have four sums of one run each.
template <class S, class... More>
cudaError_t launch_second(void (*kernel)(WgradParams, More...), WgradParams const& p, cudaStream_t stream,
                          More const&... more) {
  int const runs = p.splits > kReduceRunSplits ? kReduceRuns : 1;
  dim3 const grid{unsigned(p.tiles), unsigned(S::tm * S::tn / 4 / kReduceThreads * runs)};
  return launch_spread(kernel, grid, kReduceThreads, 0, stream, p, more...);
}

template <int TM, int TN>
cudaError_t launch_wgrad(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using S = WgradShape<TM, TN>;
  WgradParams p{};
  cudaError_t const error = launch_sums<S>(p, wgrad_kernel<TM, TN>, true, problem, plan, args, stream);
  if (error != cudaSuccess || !p.parts) return error;
  bool const many = p.splits > kReduceRunSplits;
  return launch_second<S>(many ? wgrad_reduce<TM, TN, kReduceRuns> : wgrad_reduce<TM, TN, 1>, p, stream);
}

template <Op op, int TM, int TN, Variant variant>
cudaError_t launch_row(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  if constexpr (op == Op::wgrad)
    return launch_wgrad<TM, TN>(problem, plan, args, stream);
  else
    return launch<op, TM, TN, variant>(problem, plan, args, stream);
}

}  // namespace conv2d_ext::tf32

#define CONV2D_EXT_TMA_TF32_INSTANCE(family, op, dtype, tm, tn, tk, variant)          \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                           \
    return tf32::launch_row<Op::op, tm, tn, Variant::variant>(p, plan, args, stream); \
  }
