// Small TF32 problems whose operands lie so that wgmma does not take one of them from shared memory, by tiles of
// tma_lean.cuh: dgrad in channels_last, whose filters have channels side by side, and fprop of 1x1 filters over NCHW,
// whose pixels are.
//
// That operand, the turned one, has the instruction's rows, 64 a warpgroup, as in tma_tf32.cuh: fragments are loaded
// from the lines that the copy engine brought. The other, straight one has its columns.
//   dgrad   out[pixel, c] = sum over taps and filters of w[filter, tap, c] * y[moved pixel, filter]: channels are rows
//   planes  out[k, pixel] = sum over channels of x[channel, pixel] * w[k, channel]: pixels of an image are rows
// A thread has two neighbouring rows, which it stores at once.
//
// wgrad in channels_last, whose operands both lie so, multiplies by mma.sync, which takes both from registers:
//   wgrad   out[k, tap, c] = sum over pixels of y[pixel, k] * x[moved pixel, c]
#pragma once

#include "tma_lean.cuh"
#include "tma_tf32.cuh"

namespace conv2d_ext::tma {

// The ring is that of tma_lean.cuh: A is the straight operand, B the turned one, in runs of 32 rows.
template <int R, int N>
struct TurnedShape : LeanShape<N, R, kLineBytes, kTf32Line> {
  static constexpr int multiplying = R / 64 * kWarpgroup, threads = multiplying + 2 * 32;
};

template <int R, int N, bool planes>
__device__ void turned_multiply(LeanParams const& p, uint32_t ring, LeanTables& tables, int64_t const* columns,
                                int count, int rank, int row0, int column0) {
  using S = TurnedShape<R, N>;
  constexpr int together = 2, parts = kTf32Line / 8 / together, blocks = N / 8;
  static_assert(parts == 2);
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), warp = int(threadIdx.x) / 32 % 4;
  int const lane = int(threadIdx.x) % 32, quad = lane % 4;
  // A thread's two rows in the lines of the reduction's quad and quad + 4.
  int const first = tf32::raw_channel(warp, lane / 4), chunk = first % 32 / 4;
  uint32_t const lines = ring + S::steps * S::a_bytes + (group * 2 + first / 32) * S::run_bytes + first % 4 * 4;
  uint32_t const low = lines + quad * kLineBytes + (chunk ^ quad) * 16;
  uint32_t const high = lines + (quad + 4) * kLineBytes + (chunk ^ (quad + 4)) * 16;
  uint64_t const layout = layout_of(kLineBytes);
  int const row = row0 + group * 64 + first;
  float acc[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0;
  uint32_t v[parts][together][4] = {};
  Stage stage;
  int before = -1;
#pragma unroll 1
  for (int step = 0; step < count; step += S::steps, stage.advance(p.stages)) {
    ptx::mbarrier_wait(&tables.full_a[stage.index], stage.parity);
    ptx::mbarrier_wait(&tables.full_b[stage.index], stage.parity);
    uint32_t const at = stage.index * S::stage_bytes;
#pragma unroll
    for (int t = 0; t < S::steps; ++t) {
      if (step + t >= count) break;
#pragma unroll
      for (int part = 0; part < parts; ++part) {  // fragments are loaded while those before are multiplied
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_fence_operand(v[part]);
#pragma unroll
        for (int i = 0; i < together; ++i) {
          uint32_t const offset = at + t * S::b_bytes + (part * together + i) * kCoreBytes;
          uint2 const l = ptx::ld_shared_v2(low + offset), h = ptx::ld_shared_v2(high + offset);
          v[part][i][0] = l.x, v[part][i][1] = l.y, v[part][i][2] = h.x, v[part][i][3] = h.y;
        }
        if (t == 0 && part == 1 && lane == 0 && before >= 0) ptx::mbarrier_arrive(&tables.empty[before]);
        ptx::wgmma_fence_operand(acc);
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < together; ++i)
          ptx::wgmma_mma_async_tf32(acc, v[part][i],
                                    at_address(layout, ring + at + t * S::a_bytes + (part * together + i) * 32));
        ptx::wgmma_commit_group();
      }
    }
    before = stage.index;
  }
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_fence_operand(acc);
  float const* const bias = planes ? static_cast<float const*>(p.bias) : nullptr;
  auto store = [&](float const* sum, int j) {  // of 8 columns
    if (row >= p.N) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const column = j * 8 + quad * 2 + i;
      int64_t const to = columns[column];
      if (to < 0) continue;
      float const add = planes && bias != nullptr ? bias[(column0 + column) * p.bias_stride] : 0.0f;
      float* const out = static_cast<float*>(p.out) + to + row * (planes ? 1 : p.out_c);
      if (planes || p.pairs) {
        *reinterpret_cast<float2*>(out) = make_float2(sum[i] + add, sum[2 + i] + add);
        continue;
      }
      out[0] = sum[i];
      if (row + 1 < p.N) out[p.out_c] = sum[2 + i];
    }
  };
  if (p.splits == 1) {
#pragma unroll
    for (int j = 0; j < blocks; ++j) store(acc + j * 4, j);
    return;
  }
  lean_add_parts<blocks, S::multiplying>(p, ring + p.stages * S::stage_bytes, tables, rank, acc, store);
}

// blockIdx: x rows (planes: columns), y the others. image: of planes; of groups the group.
template <int R, int N, bool planes, bool groups = false>
__device__ __forceinline__ void turned_block(LeanParams const& p, int tile, int image) {
  using S = TurnedShape<R, N>;
  extern __shared__ uint8_t dynamic[];
  __shared__ LeanTables tables;
  __shared__ int64_t columns[N];  // where the results of a column go, or -1
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int const row0 = tile * R, column0 = int(blockIdx.y) * N;
  using Straight = std::conditional_t<planes, PlaneCopies<float, N, R, false, true, true>,
                                      LeanCopies<float, N, R, kLineBytes, false, true, true, groups>>;
  using Turned = std::conditional_t<planes, PlaneCopies<float, N, R, false, true, false>,
                                    LeanCopies<float, N, R, kLineBytes, false, true, false, groups>>;
  auto places = [&] {
    if (threadIdx.x >= N) return;
    int const column = column0 + int(threadIdx.x);
    int64_t to = -1;
    if (column < p.M) {
      if constexpr (planes) {
        to = column * p.out_h + image * p.out_n;
      } else {
        int j = column, i = p.columns.divide(j), n = p.rows.divide(i);
        to = n * p.out_n + i * p.out_h + j * p.out_w;
        if constexpr (groups) to += int64_t(image) * p.N * p.out_c;
      }
    }
    columns[threadIdx.x] = to;
  };
  lean_block<S, N / 8, Straight, Turned>(p, ring, tables, tile, image, places, [&](int count, int rank) {
    turned_multiply<R, N, planes>(p, ring, tables, columns, count, rank, row0, column0);
  });
}

template <int R, int N, bool planes>
__global__ void __launch_bounds__(TurnedShape<R, N>::threads, R == 64 ? 2 : 1)
    lean_turned_kernel(__grid_constant__ LeanParams const p) {
  int tile = int(blockIdx.x), image = 0;
  if constexpr (planes) image = p.tiles_n.divide(tile);
  turned_block<R, N, planes>(p, tile, image);
}

template <int R, int N>
__global__ void __launch_bounds__(TurnedShape<R, N>::threads, R == 64 ? 2 : 1)
    lean_turned_groups_kernel(__grid_constant__ LeanParams const p) {
  int tile = int(blockIdx.x);
  int const group = p.tiles_n.divide(tile);
  turned_block<R, N, false, true>(p, tile, group);
}

// dgrad with strides: the phases' tiles of channels follow each other along x.
struct LeanPhases {
  LeanParams phase[4];
  Divisor tiles_n;
};
template <int R, int N>
__global__ void __launch_bounds__(TurnedShape<R, N>::threads, R == 64 ? 2 : 1)
    lean_phases_kernel(__grid_constant__ LeanPhases const all) {
  int tile = int(blockIdx.x);
  LeanParams const& p = all.phase[all.tiles_n.divide(tile)];
  if (int(blockIdx.y) * N < p.M) turned_block<R, N, false>(p, tile, 0);  // a cluster's blocks are of one tile
}

// Where thread `thread` of a block stores what it has of a tile: rows of wgrad's result are filters, of dgrad's
// (planes) channels, whose tap is an image.
template <int TM, int TN>
struct SumsPlaces {
  int64_t out[2][2];
  int column;

  __device__ SumsPlaces(LeanParams const& p, int m_tile, int n_tile, int tap, int thread) {
    int const warp = thread / 32, lane = thread % 32;
    int tap_w = tap;
    int const tap_h = p.taps_w.divide(tap_w);
    column = n_tile * TN + warp % 2 * (TN / 2) + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const row = m_tile * TM + warp / 2 * 32 + i * 16 + lane / 4 * 2 + half;
        out[i][half] = row < p.M ? row * p.out_n + tap_h * p.out_h + tap_w * p.out_w : -1;
      }
  }
  // The j-th of its 8 columns by two rows.
  __device__ void store(LeanParams const& p, float const* sum, int j) const {
    constexpr int blocks = TN / 16;
    int64_t const to[2] = {j < blocks ? out[0][0] : out[1][0], j < blocks ? out[0][1] : out[1][1]};
    int const at = column + j % blocks * 8;
    lean_store_block<float>(p, sum, to, at < p.N ? at : -1);
  }
};

// wgrad: of each warp's 32 rows by half of the columns. Of each 8 pixels an instruction takes 0 2 4 6 1 3 5 7, and row
// i + 8 of its rows is the neighbour of row i, so that the loads meet each bank once and leave the registers in order.
template <int TM, int TN, bool planes>
__device__ void sums_multiply(LeanParams const& p, uint32_t ring, LeanTables& tables, int count, int rank, int n_tile,
                              int tap) {
  using S = LeanShapeOf<float, TM, TN, kLineBytes>;
  constexpr int runs = TN / 64, blocks = TN / 16;  // of 32 columns, of 8
  int const warp = warp_uniform(int(threadIdx.x) / 32), lane = int(threadIdx.x) % 32, g = lane / 4, quad = lane % 4;
  uint32_t const pixels = quad * 2 * kLineBytes;
  uint32_t const rows = ring + warp / 2 * S::run_bytes,
                 columns = ring + S::steps * S::a_bytes + warp % 2 * runs * S::run_bytes;
  uint32_t of_rows[2], of_columns[4];  // those of pixel 2 * quad; of the one behind it another of the two chunks
#pragma unroll
  for (int i = 0; i < 2; ++i) of_rows[i] = pixels + ((i * 4 + g / 2) ^ (quad * 2)) * 16 + g % 2 * 8;
#pragma unroll
  for (int j = 0; j < 4; ++j) of_columns[j] = pixels + ((j * 2 + g / 4) ^ (quad * 2)) * 16 + g % 4 * 4;
  float acc[2][blocks][4] = {};
  Stage stage;
  int before = -1;
  uint32_t word = 0;                                                    // that was loaded last
  uint32_t const none = uint32_t(reinterpret_cast<uintptr_t>(p.bias));  // 0, which the compiler does not know
#pragma unroll 1
  for (int step = 0; step < count; step += S::steps, stage.advance(p.stages)) {
    ptx::mbarrier_wait(&tables.full_a[stage.index], stage.parity);
    ptx::mbarrier_wait(&tables.full_b[stage.index], stage.parity);
    if (before >= 0) {  // as in give_back.cuh
      uint32_t const bar = ptx::shared_address(&tables.empty[before]) + (word & none);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(bar);
    }
    uint32_t const at = stage.index * S::stage_bytes;
#pragma unroll
    for (int t = 0; t < S::steps; ++t) {
      if (step + t >= count) break;
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // of 8 pixels
        uint32_t const a = rows + at + t * S::a_bytes + k * kCoreBytes;
        uint2 l[2], h[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          l[i] = ptx::ld_shared_v2(a + of_rows[i]);
          h[i] = ptx::ld_shared_v2(a + kLineBytes + (of_rows[i] ^ 16));
        }
#pragma unroll
        for (int j = 0; j < blocks; ++j) {
          uint32_t const b = columns + at + t * S::b_bytes + j / 4 * S::run_bytes + k * kCoreBytes;
          uint32_t const b0 = ptx::ld_shared(b + of_columns[j % 4]);
          word = ptx::ld_shared(b + kLineBytes + (of_columns[j % 4] ^ 16));
#pragma unroll
          for (int i = 0; i < 2; ++i) ptx::mma_m16n8k8_tf32(acc[i][j], l[i].x, l[i].y, h[i].x, h[i].y, b0, word);
        }
      }
    }
    before = stage.index;
  }
  SumsPlaces<TM, TN> const places(p, int(blockIdx.y), n_tile, tap, int(threadIdx.x));
  if (p.splits > 1) {
    lean_add_parts<2 * blocks, S::multiplying>(p, ring + p.stages * S::stage_bytes, tables, rank, acc[0][0],
                                               [&](float const* sum, int j) { places.store(p, sum, j); });
  } else if (gridDim.z > 1) {  // for sums_second
    int64_t const tile = (int64_t(rank) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    float4* const to = static_cast<float4*>(p.out) + tile * (2 * blocks * S::multiplying) + threadIdx.x;
#pragma unroll
    for (int j = 0; j < 2 * blocks; ++j) {
      float const(&v)[4] = acc[j / blocks][j % blocks];
      to[j * S::multiplying] = make_float4(v[0], v[1], v[2], v[3]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 2 * blocks; ++j) places.store(p, acc[j / blocks][j % blocks], j);
  }
}

// The steps of one of the two copying threads for wgrad of several pixels a row (lean_period): `columns` divides by the
// steps of all parts of a pixel, whose channels, stride_h of y and stride_w of x, are copied from a vector on.
template <int TM, int TN, bool of_a>
struct PeriodCopies {
  using S = LeanShapeOf<float, TM, TN, kLineBytes>;
  int32_t left, chunk, first, runs;
  uint32_t to;
  Stage stage;

  __device__ void begin(LeanParams const& p, uint32_t ring, int begin, int count, int n_tile, int) {
    left = count, chunk = begin;
    int const pixel = p.columns.divide(chunk), tile = of_a ? int(blockIdx.y) * TM : n_tile * TN;
    to = ring + (of_a ? 0 : S::steps * S::a_bytes);
    first = (pixel * (of_a ? p.stride_h : p.stride_w) & ~3) + tile;
    runs = min((of_a ? TM : TN) / kTf32Line, ((of_a ? p.M : p.N) - tile + kTf32Line - 1) / kTf32Line);
  }

  __device__ void copy_stage(LeanParams const& p, LeanTables& tables) {
    int const steps = min(left, S::steps);
    uint64_t* const full = of_a ? &tables.full_a[stage.index] : &tables.full_b[stage.index];
    ptx::mbarrier_arrive_expect_tx(full, steps * runs * S::run_bytes);
    uint32_t at = to + stage.index * S::stage_bytes;
#pragma unroll 1
    for (int i = 0; i < steps; ++i, ++chunk, at += of_a ? S::a_bytes : S::b_bytes)
#pragma unroll 1
      for (int run = 0; run < runs; ++run)
        ptx::cp_async_bulk_tensor_4d(at + run * S::run_bytes, of_a ? &p.a : &p.b, full, first + run * kTf32Line,
                                     chunk * kTf32Line, 0, 0);
    left -= steps;
  }
};

enum class SumsOf { boxes, planes, period };  // how operands are copied
template <int TM, int TN, SumsOf of, bool of_a>
struct SumsCopies : LeanCopies<float, TM, TN, kLineBytes, true, true, of_a> {};
template <int TM, int TN, bool of_a>
struct SumsCopies<TM, TN, SumsOf::planes, of_a> : PlaneCopies<float, TM, TN, true, true, of_a> {};
template <int TM, int TN, bool of_a>
struct SumsCopies<TM, TN, SumsOf::period, of_a> : PeriodCopies<TM, TN, of_a> {};

template <int TM, int TN, SumsOf of>
__global__ void __launch_bounds__(LeanShape<TM, TN, kLineBytes>::threads, 2)
    lean_sums_kernel(__grid_constant__ LeanParams const p) {
  using S = LeanShapeOf<float, TM, TN, kLineBytes>;
  extern __shared__ uint8_t dynamic[];
  __shared__ LeanTables tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int n_tile = int(blockIdx.x);
  int const tap = p.tiles_n.divide(n_tile);
  lean_block<S, TN / 8, SumsCopies<TM, TN, of, true>, SumsCopies<TM, TN, of, false>>(
      p, ring, tables, n_tile, tap, [] {},
      [&](int count, int rank) {
        sums_multiply<TM, TN, of == SumsOf::planes>(p, ring, tables, count, rank, n_tile, tap);
      });
}

// Adds the `parts` that blocks have stored of each tile. An item is a thread's 8 columns by two rows; a warp adds every
// kSecondWarps-th part of 32 of them.
inline constexpr int kSecondWarps = 16;
template <int TM, int TN>
__global__ void __launch_bounds__(kSecondWarps * 32)
    lean_sums_second(__grid_constant__ LeanParams const p, float4 const* from, int parts, int tiles) {
  constexpr int units = TN / 8, multiplying = TM / 64 * kWarpgroup;
  __shared__ float4 sums[kSecondWarps][32];
  int const slice = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, item = int(blockIdx.x) * 32 + lane;
  int64_t const items = int64_t(tiles) * (units * multiplying);
  ptx::griddepcontrol_wait();
  float4 sum = {};
#pragma unroll 4
  for (int i = slice; i < parts; i += kSecondWarps) {
    float4 const v = from[i * items + item];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  sums[slice][lane] = sum;
  __syncthreads();
  if (slice > 0) return;
  for (int i = 1; i < kSecondWarps; ++i) {
    float4 const v = sums[i][lane];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  int const in_row = p.tiles_n * p.taps, thread = item % multiplying, tile = item / (multiplying * units);
  int n_tile = tile % in_row;
  int const tap = p.tiles_n.divide(n_tile);
  float const v[4] = {sum.x, sum.y, sum.z, sum.w};
  SumsPlaces<TM, TN>(p, tile / in_row, n_tile, tap, thread).store(p, v, item / multiplying % units);
}

// The same of several pixels a row, of which each of `pixel_parts` parts in turn has one: filters and channels are as
// far into a part's tiles as they lie behind a vector. Eight warps have every eighth part of 32 weights.
template <int TM, int TN>
__global__ void __launch_bounds__(256)
    lean_sums_shifted(__grid_constant__ LeanParams const p, float const* from, int parts, int pixel_parts, int tiles) {
  constexpr int blocks = TN / 16, multiplying = TM / 64 * kWarpgroup;
  __shared__ float sums[8][32];
  int const slice = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  int const column = int(blockIdx.x) * 32 + lane, row = int(blockIdx.y), columns = p.stride_w;
  ptx::griddepcontrol_wait();
  float sum = 0;
#pragma unroll 4
  for (int part = slice; part < parts; part += 8) {
    int const pixel = part / pixel_parts, m = row + (pixel * p.stride_h & 3), n = column + (pixel * columns & 3);
    int const r = m % TM, c = n % TN, tile = m / TM * p.tiles_n.value + n / TN;
    int const j = r % 32 / 16 * blocks + c % (TN / 2) / 8;  // as SumsPlaces has them
    int const thread = (r / 32 * 2 + c / (TN / 2)) * 32 + r % 16 / 2 * 4 + c % 8 / 2;
    if (column < columns)
      sum += from[((int64_t(part) * tiles + tile) * (2 * blocks * multiplying) + j * multiplying + thread) * 4 +
                  r % 2 * 2 + c % 2];
  }
  sums[slice][lane] = sum;
  __syncthreads();
  if (slice > 0 || column >= columns) return;
  for (int i = 1; i < 8; ++i) sum += sums[i][lane];
  static_cast<float*>(p.out)[row * p.out_n + column] = sum;
}

// dgrad's phase i along H and j along W.
template <int TM>
cudaError_t turned_params(LeanParams& q, Problem const& p, Plan const& plan, Arguments const& args, int64_t i,
                          int64_t j) {
  Walk const h = walk_h(Op::dgrad, p, i), w = walk_w(Op::dgrad, p, j);
  int64_t const pixels = p.N * h.pixels * w.pixels, taps = h.taps * w.taps, K = p.K_per_group();
  q.columns = Divisor(max64(w.pixels, 1)), q.rows = Divisor(max64(h.pixels, 1)), q.tiles_n = Divisor(1);
  q.taps_w = Divisor(max64(w.taps, 1)), q.taps = Divisor(max64(taps, 1));
  q.M = int32_t(pixels), q.N = int32_t(p.C_per_group()), q.steps = int32_t(ceil_div(K, kTf32Line) * taps);
  q.splits = plan.split_k, q.share = int32_t(ceil_div(q.steps, q.splits)), q.per = int32_t(ceil_div(TM / 8, q.splits));
  q.h0 = int32_t(h.lower), q.w0 = int32_t(w.lower);
  q.stride_h = int32_t(h.stride), q.stride_w = int32_t(w.stride);
  q.tap_h = int32_t(h.tap_stride), q.tap_w = int32_t(w.tap_stride);
  q.first_r = int32_t(h.first_tap), q.step_r = int32_t(h.tap_step);
  q.first_s = int32_t(w.first_tap), q.step_s = int32_t(w.tap_step);
  lean_stores(q, p, p.x, p.x_align);
  q.out = static_cast<float*>(args.out) + i * p.x.h + j * p.x.w;
  q.out_h *= phases_of(p.H, p.stride_h), q.out_w *= phases_of(p.W, p.stride_w);
  if (pixels == 0 || taps == 0) return cudaSuccess;
  Tensor4 const walks{args.a, p.dtype, {K, p.Q(), p.P(), p.N}, {1, p.y.w, p.y.h, p.y.n}, true};
  cudaError_t const error = encode_im2col(q.a, walks, h, w, kTf32Line, TM, p.groups > 1 ? p.groups : 0);
  return error != cudaSuccess ? error : encode_filters(q.b, args.b, p, kTf32Line, kTf32Line, true);
}

// TM pixels by TN channels of a group.
template <int TM, int TN>
cudaError_t launch_lean_turned_groups(Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  LeanParams q{};
  cudaError_t const error = turned_params<TM>(q, p, plan, args, 0, 0);
  if (error != cudaSuccess) return error;
  q.tiles_n = Divisor(ceil_div(p.C_per_group(), TN));
  return start_lean<TurnedShape<TN, TM>>(lean_turned_groups_kernel<TN, TM>, q, q.tiles_n.value * p.groups,
                                         ceil_div(q.M, TM), stream);
}

// TM pixels by TN channels.
template <int TM, int TN>
cudaError_t launch_lean_turned(Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using S = TurnedShape<TN, TM>;
  int64_t const phases_h = phases_of(p.H, p.stride_h), phases_w = phases_of(p.W, p.stride_w);
  int64_t const tiles_n = ceil_div(p.C, TN);
  LeanPhases all{};
  LeanParams longest;  // steps, pixels: of the phase that has most
  for (int64_t i = 0; i < phases_h; ++i)
    for (int64_t j = 0; j < phases_w; ++j) {
      LeanParams& q = all.phase[i * phases_w + j];
      cudaError_t const error = turned_params<TM>(q, p, plan, args, i, j);
      if (error != cudaSuccess) return error;
      if (i + j == 0) longest = q;
      longest.share = int32_t(max64(longest.share, q.share)), longest.M = int32_t(max64(longest.M, q.M));
    }
  int64_t const phases = phases_h * phases_w, tiles_m = ceil_div(longest.M, TM);
  if (phases == 1) return start_lean<S>(lean_turned_kernel<TN, TM, false>, all.phase[0], tiles_n, tiles_m, stream);
  all.tiles_n = Divisor(tiles_n);
  int const shared_bytes = lean_ring<S>(longest, tiles_n * tiles_m * phases * plan.split_k, false);
  for (LeanParams& q : all.phase) q.stages = longest.stages;
  dim3 const grid(unsigned(tiles_n * phases), unsigned(tiles_m), unsigned(plan.split_k));
  return launch_lean_grid(lean_phases_kernel<TN, TM>, all, grid, plan.split_k, S::threads, shared_bytes, stream);
}

// fprop of 1x1 filters over NCHW: TN pixels by TM filters.
template <int TM, int TN>
cudaError_t launch_lean_turned_planes(Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  int64_t const pixels = p.H * p.W;
  LeanParams q{};
  q.M = int32_t(p.K), q.N = int32_t(pixels), q.columns = q.rows = q.taps_w = q.taps = Divisor(1);
  q.tiles_n = Divisor(ceil_div(pixels, TN)), q.steps = int32_t(ceil_div(p.C, kTf32Line));
  q.splits = plan.split_k, q.share = int32_t(ceil_div(q.steps, q.splits)), q.per = int32_t(ceil_div(TM / 8, q.splits));
  q.out_h = p.y.c, q.out_n = p.y.n, q.bias = args.bias, q.bias_stride = args.bias_stride, q.out = args.out;
  Tensor4 const w{args.b, p.dtype, {p.C, p.K, 1, 1}, {1, p.w.n, 0, 0}, true};
  Tensor4 const x{args.a, p.dtype, {pixels, p.C, p.N, 1}, {1, p.x.c, p.x.n, 0}, true};
  cudaError_t error = encode_tiled(q.a, w, kTf32Line, TM, 1, 1);
  if (error != cudaSuccess) return error;
  error = encode_tiled(q.b, x, kTf32Line, kTf32Line, 1, 1);
  if (error != cudaSuccess) return error;
  return start_lean<TurnedShape<TN, TM>>(lean_turned_kernel<TN, TM, true>, q, q.tiles_n.value * p.N, ceil_div(p.K, TM),
                                         stream);
}

// TM filters by TN channels, several pixels a row.
template <int TM, int TN>
cudaError_t launch_lean_period(Problem const& p, Plan const& plan, int64_t period, Arguments const& args,
                               cudaStream_t stream) {
  using S = LeanShapeOf<float, TM, TN, kLineBytes>;
  int64_t const lines = p.N * p.H * p.W / period, parts = plan.split_k, pixel_parts = parts / period;
  LeanParams q{};
  q.M = int32_t(matrix_shifted(p.K, p.dtype)), q.N = int32_t(matrix_shifted(p.C, p.dtype));
  int64_t const tiles_m = ceil_div(q.M, TM), tiles_n = ceil_div(q.N, TN);
  q.taps = q.taps_w = Divisor(1), q.tiles_n = Divisor(tiles_n);
  // All parts have as many steps: beyond the last line there are zeros.
  q.splits = 1, q.share = int32_t(ceil_div(ceil_div(lines, kTf32Line), pixel_parts));
  q.steps = int32_t(parts * q.share), q.columns = Divisor(pixel_parts * q.share);
  q.stride_h = int32_t(p.K), q.stride_w = int32_t(p.C), q.out_n = p.w.n, q.out = args.workspace;
  auto rows = [&](void const* at, int64_t channels) {
    return Tensor4{at, p.dtype, {period * channels, lines, 1, 1}, {1, period * channels, 0, 0}, true};
  };
  cudaError_t error = encode_tiled(q.a, rows(args.b, p.K), kTf32Line, kTf32Line, 1, 1);
  if (error == cudaSuccess) error = encode_tiled(q.b, rows(args.a, p.C), kTf32Line, kTf32Line, 1, 1);
  if (error == cudaSuccess)
    error = start_lean<S>(lean_sums_kernel<TM, TN, SumsOf::period>, q, tiles_n, tiles_m, stream, S::threads, parts);
  if (error != cudaSuccess) return error;
  q.out = args.out;
  return launch_dependent(lean_sums_shifted<TM, TN>, dim3(unsigned(ceil_div(p.C, 32)), unsigned(p.K)), 256, 0, stream,
                          q, static_cast<float const*>(args.workspace), int(parts), int(pixel_parts),
                          int(tiles_n * tiles_m));
}

// TM filters by TN channels of a tap.
template <int TM, int TN>
cudaError_t launch_lean_sums(Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using S = LeanShapeOf<float, TM, TN, kLineBytes>;
  if (int64_t const period = lean_period(row_of(plan), p); period > 1)
    return launch_lean_period<TM, TN>(p, plan, period, args, stream);
  Walk const h = walk_h(Op::fprop, p, 0), w = walk_w(Op::fprop, p, 0);
  LeanParams q{};
  q.columns = Divisor(w.pixels), q.rows = Divisor(h.pixels);
  // The copies do not ask for the number of taps.
  q.taps_w = Divisor(w.taps), q.taps = Divisor(h.taps * w.taps), q.tiles_n = Divisor(ceil_div(p.C, TN));
  q.M = int32_t(p.K), q.N = int32_t(p.C), q.steps = int32_t(lean_wgrad_steps(row_of(plan), p));
  bool const parts = plan.split_k > kLeanMostCluster;
  q.splits = parts ? 1 : plan.split_k, q.share = int32_t(ceil_div(q.steps, plan.split_k));
  q.per = int32_t(ceil_div(TN / 8, q.splits));
  q.h0 = int32_t(h.lower), q.w0 = int32_t(w.lower);
  q.stride_h = int32_t(h.stride), q.stride_w = int32_t(w.stride);
  q.tap_h = int32_t(h.tap_stride), q.tap_w = int32_t(w.tap_stride);
  lean_stores(q, p, p.w, p.w_align);
  q.out = args.out;
  Tensor4 const y{
      args.b, p.dtype, {lean_channels(p.K, p.y, p.dtype), p.Q(), p.P(), p.N}, {1, p.y.w, p.y.h, p.y.n}, true};
  Tensor4 const x{args.a, p.dtype, {lean_channels(p.C, p.x, p.dtype), p.W, p.H, p.N}, {1, p.x.w, p.x.h, p.x.n}, true};
  cudaError_t error = encode_im2col(q.a, y, Walk{p.P(), 1}, Walk{p.Q(), 1}, kTf32Line, kTf32Line);
  if (error != cudaSuccess) return error;
  error = encode_im2col(q.b, x, h, w, kTf32Line, kTf32Line);
  if (error != cudaSuccess) return error;
  int64_t const tiles_n = q.tiles_n.value * h.taps * w.taps, tiles_m = ceil_div(p.K, TM), tiles = tiles_n * tiles_m;
  if (parts) q.out = args.workspace;
  error = start_lean<S>(lean_sums_kernel<TM, TN, SumsOf::boxes>, q, tiles_n, tiles_m, stream, S::threads,
                        parts ? plan.split_k : 1);
  if (error != cudaSuccess || !parts) return error;
  q.out = args.out;
  int64_t const items = tiles * (TN / 8) * S::multiplying;
  return launch_dependent(lean_sums_second<TM, TN>, dim3(unsigned(items / 32)), kSecondWarps * 32, 0, stream, q,
                          static_cast<float4 const*>(args.workspace), plan.split_k, int(tiles));
}

// dgrad of 1x1 filters over NCHW: TM channels by TN pixels of an image.
template <int TM, int TN>
cudaError_t launch_lean_sums_planes(Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using S = LeanShapeOf<float, TM, TN, kLineBytes>;
  int64_t const pixels = p.H * p.W;
  LeanParams q{};
  q.M = int32_t(p.C), q.N = int32_t(pixels), q.columns = q.rows = q.taps_w = q.taps = Divisor(1);
  q.tiles_n = Divisor(ceil_div(pixels, TN)), q.steps = int32_t(ceil_div(p.K, kTf32Line));
  q.splits = plan.split_k, q.share = int32_t(ceil_div(q.steps, q.splits));
  q.per = int32_t(ceil_div(TN / 8, q.splits));
  q.out_n = p.x.c, q.out_h = p.x.n, q.out = args.out;
  Tensor4 const w{args.b, p.dtype, {p.C, p.K, 1, 1}, {1, p.w.n, 0, 0}, true};
  Tensor4 const y{args.a, p.dtype, {pixels, p.K, p.N, 1}, {1, p.y.c, p.y.n, 0}, true};
  cudaError_t error = encode_tiled(q.a, w, kTf32Line, kTf32Line, 1, 1);
  if (error != cudaSuccess) return error;
  error = encode_tiled(q.b, y, kTf32Line, kTf32Line, 1, 1);
  if (error != cudaSuccess) return error;
  return start_lean<S>(lean_sums_kernel<TM, TN, SumsOf::planes>, q, q.tiles_n.value * p.N, ceil_div(p.C, TM), stream);
}

template <Op op, DType dtype, int TM, int TN>
cudaError_t launch_lean_tf32(Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  if constexpr (op == Op::dgrad) {
    if constexpr (TM == 64 && TN == 64)
      if (lean_takes_planes(row_of(plan), p)) return launch_lean_sums_planes<TM, TN>(p, plan, args, stream);
    if constexpr (TM == 64)
      if (p.groups > 1) return launch_lean_turned_groups<TM, TN>(p, plan, args, stream);
    return launch_lean_turned<TM, TN>(p, plan, args, stream);
  } else {
    bool const planes = TM == 64 && TN >= 64 && lean_takes_planes(row_of(plan), p);
    if constexpr (op == Op::wgrad) {
      if (planes) return launch_lean_planes<op, dtype, TM, TN>(p, plan, args, stream);
      return launch_lean_sums<TM, TN>(p, plan, args, stream);
    } else {
      if constexpr (TM == 64 && TN >= 64)
        if (planes) return launch_lean_turned_planes<TM, TN>(p, plan, args, stream);
      return launch_lean<op, dtype, TM, TN>(p, plan, args, stream);
    }
  }
}

}  // namespace conv2d_ext::tma

#define CONV2D_EXT_TMA_LEAN_TF32_INSTANCE(family, op, dtype, tm, tn, tk, variant)      \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                            \
    return tma::launch_lean_tf32<Op::op, DType::dtype, tm, tn>(p, plan, args, stream); \
  }
