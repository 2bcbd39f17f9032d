// fprop and dgrad of dense convolutions in strict float32 on tensor cores, in channels_last: implicit GEMMs as in
// tma.cuh, variant im2col, of operands that are each the sum of two TF32 numbers. Three products of these are left, for
// the fourth is smaller than a rounding: high * high + high * low + low * high.
//
// The tensor cores cut off what they add, so their sums are short: those of a step, 32 channels of a tap, which are
// then added to float32 registers, rounded to nearest.
//
// A persistent block of three warpgroups walks over 128 x TN tiles. A thread of the last feeds a ring of stages: pixels
// as they are, and both parts of the filters, which split_kernel has split (for dgrad also turned) beforehand. The
// others multiply 64 pixels each; they load their pixels as fragments and split these in registers, while the products
// of the step before are under way.
//
// A product of an infinity with a split number may be NaN, or a large number's high part infinite: sums that are not
// finite are made again from the operands as they are, product by product.
#pragma once

#include "../core/tma_strict.h"
#include "tma.cuh"

namespace conv2d_ext::strict {

using tma::Params, tma::Phase, tma::Step, tma::Unit;

constexpr int kTM = 128;

template <int TN>
struct Shape {
  static constexpr int a_bytes = kTM * kLineBytes, part_bytes = TN * kLineBytes, b_bytes = 2 * part_bytes;
  static constexpr int stage_bytes = a_bytes + b_bytes, stages = 207 * 1024 / stage_bytes;
  static constexpr int ring_bytes = stages * stage_bytes, shared_bytes = ring_bytes + 2 * tma::kRunBytes + 1024;
  static_assert(stages <= kMaxStages && shared_bytes + int(sizeof(tma::Tables<float, TN>)) + 1024 <= 228 * 1024);
  static constexpr int copy_regs = 40, multiply_regs = 232;
  static_assert((copy_regs + 2 * multiply_regs) * kWarpgroup <= 65536);
  // What params_of asks for.
  static constexpr bool keeps_b = false, stays = false, even_stages = false;
  static constexpr int pieces = 0, ring_beside_pieces = ring_bytes, halo_stages = 0;
  static constexpr int kept_bytes(int, int, bool) { return 0; }
};

// The operands as they are, with element strides. k: the channel that is summed over; its stride in a is 1.
struct Source {
  float const *a, *b;
  int64_t a_n, a_h, a_w;
  int64_t b_n, b_k, b_r, b_s, b_group;
  int32_t H, W, K;
};

// Four fragments of pixels, of eight channels each, as the sum of two TF32 numbers.
struct Parts {
  uint32_t high[4][4], low[4][4];
};

__device__ inline void split(float v, float& high, float& low) {
  high = __uint_as_float(ptx::cvt_rn_tf32(v));
  low = __uint_as_float(ptx::cvt_rn_tf32(v - high));
}

// lines: of a thread's pixel and its first channels.
__device__ inline void load(Parts& parts, uint32_t lines) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    ptx::ldmatrix_x4(parts.high[i], lines ^ (i * 32));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float high, low;
      split(__uint_as_float(parts.high[i][j]), high, low);
      parts.high[i][j] = __float_as_uint(high), parts.low[i][j] = __float_as_uint(low);
    }
  }
}

template <int TN>
__device__ void copy(Params const& p, uint32_t ring, tma::Barriers const& bars) {
  using S = Shape<TN>;
  Stage stage;
  tma::WorkBy<false> work(p);  // registers are short
  for (Unit unit; work.take(p, unit);) {
    Phase const& phase = p.phase[unit.phase];
    int64_t j = int64_t(unit.m) * kTM;
    int64_t i = phase.columns.divide(j);
    int const n = int(phase.rows.divide(i));
    int const h = phase.h0 + int(i) * p.stride_h, w = phase.w0 + int(j) * p.stride_w;
    int const first = unit.n * TN, bytes = S::a_bytes + 2 * min(TN, p.N) * kLineBytes;
    CUtensorMap const& map = p.a[unit.phase];
    Step at(p, phase, unit.begin);
#pragma unroll 1
    for (int step = 0; step < unit.count; ++step, at.advance()) {
      uint32_t const full = bars.full_a + stage.index * 8, to = ring + stage.index * S::stage_bytes;
      // Passes at once on the first trip round the ring.
      ptx::mbarrier_wait(bars.empty_a + stage.index * 8, stage.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, bytes);
      tma::copy_pixels(p, to, map, full, unit.group, at.chunk * kStrictLine, w, h, n, at.tap_w * phase.tap_w,
                       at.tap_h * phase.tap_h);
      int const r = phase.first_r + at.tap_h * phase.step_r, s = phase.first_s + at.tap_w * phase.step_s;
#pragma unroll
      for (int part = 0; part < 2; ++part)
        ptx::cp_async_bulk_tensor_5d(to + S::a_bytes + part * S::part_bytes, &p.b, full,
                                     (at.chunk * 2 + part) * kStrictLine, s, r, first, unit.group);
      stage.advance(S::stages);
    }
  }
}

// A unit's sum of pixel m and column n of its group, product by product.
__device__ inline float made_again(Params const& p, Source const& q, Unit const& unit, int64_t m, int n) {
  Phase const& phase = p.phase[unit.phase];
  int64_t j = m, i = phase.columns.divide(j);
  int64_t const image = phase.rows.divide(i);
  float sum = 0;
  Step at(p, phase, unit.begin);
#pragma unroll 1
  for (int step = 0; step < unit.count; ++step, at.advance()) {
    int const h = phase.h0 + int(i) * p.stride_h + at.tap_h * phase.tap_h,
              w = phase.w0 + int(j) * p.stride_w + at.tap_w * phase.tap_w;
    if (h < 0 || h >= q.H || w < 0 || w >= q.W) continue;
    int const r = phase.first_r + at.tap_h * phase.step_r, s = phase.first_s + at.tap_w * phase.step_s;
    int const k = at.chunk * kStrictLine;
    float const* a = q.a + image * q.a_n + h * q.a_h + w * q.a_w + unit.group * p.group_a + k;
    float const* b = q.b + unit.group * q.b_group + n * q.b_n + k * q.b_k + r * q.b_r + s * q.b_s;
#pragma unroll 1
    for (int c = 0; c < min(kStrictLine, q.K - k); ++c) sum = fmaf(a[c], b[c * q.b_k], sum);
    if (sum != sum) return sum;  // NaN, whatever comes
  }
  return sum;
}

// Looks through a warpgroup's results, which have been stored, for those that are not finite.
template <int TN>
__device__ void mend(Params const& p, Source const& q, Unit const& unit, int first) {
  int const row = first + int(threadIdx.x) / 32 % 4 * 16 + int(threadIdx.x) % 32 / 4;
#pragma unroll 1
  for (int i = 0; i < TN / 2; ++i) {
    int const at = row + i / 2 % 2 * 8, column = i / 4 * 8 + int(threadIdx.x) % 4 * 2 + i % 2;
    int const n = unit.n * TN + column;
    int64_t const m = int64_t(unit.m) * kTM + at, to = tma::out_of(p, p.phase[unit.phase], m);
    if (to < 0 || n >= p.N) continue;
    float* const out = unit.part >= 0
                           ? static_cast<float*>(p.workspace) + int64_t(unit.part) * (kTM * TN) + at * TN + column
                           : static_cast<float*>(p.out) + unit.group * p.group_out + to + n * p.out_c;
    if (isfinite(*out)) continue;
    float const bias = unit.part >= 0 || p.bias == nullptr
                           ? 0.0f
                           : static_cast<float const*>(p.bias)[unit.group * p.group_bias + n * p.bias_stride];
    *out = made_again(p, q, unit, m, n) + bias;
  }
}

template <int TN>
__device__ void multiply(Params const& p, Source const& source, uint32_t ring, tma::Tables<float, TN>& tables) {
  using S = Shape<TN>;
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32;
  int const warp = int(threadIdx.x) / 32 % 4, first = group * 64;
  uint32_t const lines = ring + (first + warp * 16 + lane % 16) * kLineBytes + ((lane / 16) ^ (lane % 8)) * 16;
  uint64_t const layout = tma::layout_of(kLineBytes);
  tma::Barriers const bars(tables);
  uint32_t const staging = ring + S::ring_bytes + group * tma::kRunBytes;
  bool const short_last = p.last <= 2;  // instructions of the last channels
  Stage stage;
  float total[TN / 2], acc[TN / 2];
  Parts parts[2] = {};
  auto release = [&](int before) {
    if (lane == 0) ptx::mbarrier_arrive(bars.empty_a + before * 8);
  };
  tma::WorkBy<false> work(p);  // registers are short
  for (Unit unit; work.take(p, unit);) {
    int const count = unit.count;
#pragma unroll
    for (int i = 0; i < TN / 2; ++i) total[i] = acc[i] = 0;
    float bias = 0;  // on its way while the tile is multiplied
    int const column = int(threadIdx.x) % kWarpgroup;
    if (p.bias != nullptr && column < TN && unit.n * TN + column < p.N)
      bias = static_cast<float const*>(p.bias)[unit.group * p.group_bias + (unit.n * TN + column) * p.bias_stride];
    int before = -1;  // stage of the products that are under way
    auto move = [&] {
      ptx::wgmma_fence_operand(acc);
#pragma unroll
      for (int i = 0; i < TN / 2; ++i) total[i] += acc[i];
    };
    auto take = [&](Parts& next) {
      uint32_t const full = bars.full_a + stage.index * 8;
      ptx::mbarrier_wait(full, stage.parity);
      load(next, lines + stage.index * S::stage_bytes);
      if constexpr (TN == 128) {
        // Again, at an address that needs the parts, by a mask that is zero: or ptxas has them made behind the next
        // wait for products. With fewer columns that is faster.
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) bits |= next.low[i][j];
        ptx::mbarrier_wait(full | (bits & uint32_t(p.last >> 31)), stage.parity);
      }
    };
    Step at(p, p.phase[unit.phase], unit.begin);
    // A step: its products, and beside them the pixels of the next one.
    auto one = [&](Parts& now, Parts& next, bool last) {
      uint32_t const high = ring + stage.index * S::stage_bytes + S::a_bytes, low = high + S::part_bytes;
      ptx::wgmma_wait_group<0>();
      move();
      if (before >= 0) release(before);
      auto instruct = [&](auto instructions) {
        ptx::wgmma_fence_operand(acc);
        ptx::wgmma_fence();
        // The small products first: what is cut off of their sums is smaller.
#pragma unroll
        for (int k = 0; k < decltype(instructions)::value; ++k) {
          if (k == 0)
            ptx::wgmma_mma_async_tf32_first(acc, now.low[k], tma::at_address(layout, high));
          else
            ptx::wgmma_mma_async_tf32(acc, now.low[k], tma::at_address(layout, high + k * 32));
          ptx::wgmma_mma_async_tf32(acc, now.high[k], tma::at_address(layout, low + k * 32));
        }
#pragma unroll
        for (int k = 0; k < decltype(instructions)::value; ++k)
          ptx::wgmma_mma_async_tf32(acc, now.high[k], tma::at_address(layout, high + k * 32));
        ptx::wgmma_commit_group();
      };
      if (short_last && at.last_chunk())
        instruct(std::integral_constant<int, 2>());
      else
        instruct(std::integral_constant<int, 4>());
      at.advance();
      before = stage.index;
      stage.advance(S::stages);
      if (!last) take(next);
    };
    if (count > 0) take(parts[0]);
    for (int step = 0; step < count; step += 2) {
      one(parts[0], parts[1], step + 1 == count);
      if (step + 1 == count) break;
      one(parts[1], parts[0], step + 2 == count);
    }
    ptx::wgmma_wait_group<0>();
    move();
    if (before >= 0) release(before);
    float nothing[4] = {};  // NaN, if a sum is not finite
#pragma unroll
    for (int i = 0; i < TN / 2; ++i)
      if (unit.n * TN + i / 4 * 8 + lane % 4 * 2 < p.N) nothing[i % 4] += total[i] * 0.0f;
    bool const wrong = (nothing[0] + nothing[1]) + (nothing[2] + nothing[3]) != 0.0f;
    if (p.bias != nullptr) {
      ptx::bar_sync(1 + group, kWarpgroup);  // the last tile's have been read
      if (column < TN) tables.bias[group][column] = bias;
      ptx::bar_sync(1 + group, kWarpgroup);
    }
    if (unit.part >= 0)
      tma::store_part<kTM, TN>(p, unit.part, first, total);
    else
      tma::store<float, kTM, TN, false, false, false>(p, unit, first, total, tables, staging);
    bool const any = group == 0 ? ptx::bar_red_or<3>(kWarpgroup, wrong) : ptx::bar_red_or<4>(kWarpgroup, wrong);
    if (any) mend<TN>(p, source, unit, first);
  }
}

template <int TN>
__global__ void __launch_bounds__(tma::kThreads, 1)
    strict_kernel(__grid_constant__ Params const p, __grid_constant__ Source const source) {
  using S = Shape<TN>;
  extern __shared__ uint8_t dynamic[];
  __shared__ tma::Tables<float, TN> tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  if (threadIdx.x % 32 == 0) {
    constexpr int warps = 8;  // that read a stage
    for (int i = int(threadIdx.x) / 32; i < S::stages; i += tma::kThreads / 32) {
      ptx::mbarrier_init(&tables.full_a[i], 1);
      ptx::mbarrier_init(&tables.empty_a[i], warps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();  // for filters that the kernel before has split
  if (threadIdx.x < 2 * kWarpgroup) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    multiply<TN>(p, source, ring, tables);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    if (threadIdx.x != 2 * kWarpgroup) return;
    copy<TN>(p, ring, tma::Barriers(tables));
    ptx::griddepcontrol_launch_dependents();
  }
}

// The filters in two parts: for each column and tap lines of 32 channels, zeros after the last; of each line the high
// parts, then the low ones.
struct SplitParams {
  float const* w;
  float* out;
  int32_t N, K, taps, taps_w;  // columns and channels a group; R * S; S
  int32_t lines, blocks;       // lines: of a column and tap; blocks: of 32 columns
  int32_t groups;
  int64_t tiles;
  int64_t n, k, r, s, g;  // element strides of w; g: from a group to the next
};

// paired: in the order of pixels_strict.cuh.
template <bool paired>
__device__ inline void store_parts(float* line, int j, float const (&v)[4]) {
  float high[4], low[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) split(v[i], high[i], low[i]);
  if constexpr (paired) {
    float* const to = line + j / 8 * 8 + j % 8 / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i % 2 * 4 + i / 2] = high[i], to[i % 2 * 4 + i / 2 + kStrictLine] = low[i];
  } else {
    *reinterpret_cast<float4*>(line + j) = make_float4(high[0], high[1], high[2], high[3]);
    *reinterpret_cast<float4*>(line + j + kStrictLine) = make_float4(low[0], low[1], low[2], low[3]);
  }
}

// turned: w's columns are contiguous, not its channels. A tile, 32 columns of a line of one tap, then passes through
// shared memory.
template <bool turned, bool paired>
__global__ void __launch_bounds__(256) split_kernel(__grid_constant__ SplitParams const p) {
  __shared__ float tile[32][turned ? kStrictLine + 1 : 1];  // column, channel
  ptx::griddepcontrol_wait();                               // for the kernel before, which may have made the filters
  ptx::griddepcontrol_launch_dependents();
  int const i = int(threadIdx.x) / 8, j = int(threadIdx.x) % 8 * 4;
  for (int64_t t = blockIdx.x; t < p.tiles; t += gridDim.x) {
    int64_t line = t, tap = divide(line, p.lines), block = divide(tap, p.taps), group = divide(block, p.blocks);
    int64_t s = tap, r = divide(s, p.taps_w);
    int const n0 = int(block) * 32;
    float const* const w = p.w + group * p.g + r * p.r + s * p.s;
    int64_t const to = (((group * p.N + n0 + i) * p.taps + r * p.taps_w + s) * p.lines + line) * (2 * kStrictLine);
    int const n = n0 + (turned ? j : i), k = int(line) * kStrictLine + (turned ? i : j);
    float4 v = make_float4(0, 0, 0, 0);
    if (n < p.N && k < p.K) v = *reinterpret_cast<float4 const*>(w + n * p.n + k * p.k);
    if constexpr (turned) {
      tile[j][i] = v.x, tile[j + 1][i] = v.y, tile[j + 2][i] = v.z, tile[j + 3][i] = v.w;
      __syncthreads();
      v = make_float4(tile[i][j], tile[i][j + 1], tile[i][j + 2], tile[i][j + 3]);
      __syncthreads();
    }
    if (n0 + i < p.N) store_parts<paired>(p.out + to, j, {v.x, v.y, v.z, v.w});
  }
}

// Of filters whose taps lie together, then channels: a tile, kTurnedColumns columns by 32 channels and kTurnedTaps taps
// at most, passes through shared memory. It is small, since few filters are to keep many blocks busy.
constexpr int kTurnedColumns = 8, kTurnedTaps = 9;

template <bool backward>
__global__ void __launch_bounds__(256, 4) split_turned_kernel(__grid_constant__ SplitParams const p) {
  constexpr int run = (backward ? kTurnedColumns : kStrictLine) * kTurnedTaps, pitch = run + 1,
                each = kTurnedColumns * kStrictLine * kTurnedTaps / 256;
  __shared__ float tile[(backward ? kStrictLine : kTurnedColumns) * pitch];  // filter; channel, tap
  ptx::griddepcontrol_wait();  // for the kernel before, which may have made the filters
  ptx::griddepcontrol_launch_dependents();
  int const j = int(threadIdx.x) % 8 * 4, i = int(threadIdx.x) / 8 % kTurnedColumns, first = int(threadIdx.x) / 64;
  int const parts = (p.taps + kTurnedTaps - 1) / kTurnedTaps, blocks = (p.N + kTurnedColumns - 1) / kTurnedColumns;
  int64_t const tiles = int64_t(p.groups) * blocks * p.lines * parts, step = backward ? p.k : p.n;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    int64_t part = t, line = divide(part, parts), block = divide(line, p.lines), group = divide(block, blocks);
    int const n0 = int(block) * kTurnedColumns, k0 = int(line) * kStrictLine, tap0 = int(part) * kTurnedTaps,
              taps = min(kTurnedTaps, p.taps - tap0);
    int const filters = backward ? p.K - k0 : p.N - n0, channels = backward ? p.N - n0 : p.K - k0;
    float const* const w = p.w + group * p.g + n0 * p.n + k0 * p.k + tap0;
    float v[each];
#pragma unroll
    for (int q = 0; q < each; ++q) {
      int const at = q * 256 + int(threadIdx.x), filter = at / run, of_filter = at - filter * run,
                channel = of_filter / kTurnedTaps, tap = of_filter - channel * kTurnedTaps;
      bool const exists = filter < filters && channel < channels && tap < taps;
      v[q] = exists ? __ldg(w + filter * step + channel * p.taps + tap) : 0.f;
    }
#pragma unroll
    for (int q = 0; q < each; ++q) {
      int const at = q * 256 + int(threadIdx.x), filter = at / run;
      tile[at + filter] = v[q];  // filter * pitch + at - filter * run
    }
    __syncthreads();
    for (int tap = first; tap < taps && n0 + i < p.N; tap += 4) {
      float of_line[4];
#pragma unroll
      for (int q = 0; q < 4; ++q)
        of_line[q] = tile[(backward ? j + q : i) * pitch + (backward ? i : j + q) * kTurnedTaps + tap];
      int64_t const to = (((group * p.N + n0 + i) * p.taps + tap0 + tap) * p.lines + line) * (2 * kStrictLine);
      store_parts<false>(p.out + to, j, of_line);
    }
    __syncthreads();
  }
}

template <Op op>
SplitParams split_params(Problem const& problem, Arguments const& args) {
  constexpr bool forward = op == Op::fprop;
  Strides const& w = problem.w;
  int64_t const K = forward ? problem.C_per_group() : problem.K_per_group(), taps = problem.R * problem.S;
  SplitParams q{};
  q.w = static_cast<float const*>(args.b), q.out = static_cast<float*>(args.workspace);
  q.N = int32_t(forward ? problem.K_per_group() : problem.C_per_group()), q.K = int32_t(K), q.taps = int32_t(taps);
  q.taps_w = int32_t(problem.S);
  q.lines = int32_t(ceil_div(K, kStrictLine)), q.blocks = int32_t(ceil_div(q.N, 32));
  int64_t const c = strict_turns_filters(op, problem) ? w.c : 1;
  q.groups = int32_t(problem.groups), q.tiles = problem.groups * q.blocks * taps * q.lines;
  q.n = forward ? w.n : c, q.k = forward ? c : w.n, q.r = w.h, q.s = w.w, q.g = problem.K_per_group() * w.n;
  return q;
}

template <Op op, bool paired>
cudaError_t launch_split(SplitParams const& q, int sm_count, cudaStream_t stream) {
  return launch_dependent(split_kernel<op != Op::fprop, paired>, dim3(unsigned(min64(q.tiles, sm_count * 8))), 256, 0,
                          stream, q);
}

template <Op op>
cudaError_t launch_split_turned(SplitParams const& q, int sm_count, cudaStream_t stream) {
  int64_t const tiles = q.groups * ceil_div(q.N, kTurnedColumns) * q.lines * ceil_div(q.taps, kTurnedTaps);
  return launch_dependent(split_turned_kernel<op != Op::fprop>, dim3(unsigned(min64(tiles, sm_count * 8))), 256, 0,
                          stream, q);
}

template <Op op, int TM, int TN>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using S = Shape<TN>;
  static_assert(TM == kTM);
  constexpr bool forward = op == Op::fprop;
  int sm_count = 0;
  cudaError_t error = count_sms(sm_count);
  if (error != cudaSuccess) return error;
  Params p{};
  int64_t blocks = 0;
  // Not the plan's: winograd.cuh's rows come here too.
  constexpr Row row{Family::tma_strict, op, DType::f32, TM, TN, kStrictLine, Variant::im2col, ""};
  error = tma::params_of<S, float, TM, TN>(p, blocks, op, problem, row, plan, args, false);
  if (error != cudaSuccess) return error;
  if (p.shares.shared == 0) blocks = min64(blocks, sm_count);

  Strides const& in = forward ? problem.x : problem.y;
  int64_t const K = forward ? problem.C_per_group() : problem.K_per_group(), taps = problem.R * problem.S;
  SplitParams const q = split_params<op>(problem, args);
  if (strict_turns_filters(op, problem))
    error = launch_split_turned<op>(q, sm_count, stream);
  else
    error = launch_split<op, false>(q, sm_count, stream);
  if (error != cudaSuccess) return error;

  int64_t const line = q.lines * (2 * kStrictLine);
  Problem filters = problem;
  filters.C = line * problem.groups, filters.K = p.N * problem.groups;
  filters.w = {taps * line, 1, problem.S * line, line};
  error = tma::encode_filters(p.b, q.out, filters, kStrictLine, int(min64(TN, p.N)));
  if (error != cudaSuccess) return error;
  p.workspace = q.out + strict_prepared_bytes(op, problem) / 4;
  Source const source{static_cast<float const*>(args.a),
                      q.w,
                      in.n,
                      in.h,
                      in.w,
                      q.n,
                      q.k,
                      q.r,
                      q.s,
                      q.g,
                      int32_t(forward ? problem.H : problem.P()),
                      int32_t(forward ? problem.W : problem.Q()),
                      int32_t(K)};
  auto* const kernel = strict_kernel<TN>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
  if (error != cudaSuccess) return error;
  error = launch_dependent(kernel, dim3(unsigned(blocks)), tma::kThreads, S::shared_bytes, stream, p, source);
  if (error != cudaSuccess || p.shares.shared == 0) return error;
  return tma::launch_reduce(tma::tma_reduce<float, TM, TN>, p, TM * TN / (4 * tma::kReduceThreads), stream);
}

}  // namespace conv2d_ext::strict

#define CONV2D_EXT_TMA_STRICT_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                    \
    return strict::launch<Op::op, tm, tn>(p, plan, args, stream);              \
  }
