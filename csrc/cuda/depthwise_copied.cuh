// Depthwise convolution over NCHW, planes copied as they lie in memory: square filters with strides of 1 and 2, rows of
// any width.
//
// The bytes of some channels' planes, or of a band of rows of one, follow each other in memory, so the copy engine
// brings them as one run, from the 16 bytes on in which it begins; rows may begin anywhere. A thread has a column of
// outputs of a band of rows and walks down it: it reads the R elements of an input row that it meets, lanes along the
// row, and adds their products to the sums of the R outputs that meet them. A block goes through images with the same
// channels, whose filters stay in registers, and a warp of its own copies ahead. wgrad: sums of all taps stay in
// registers over all images.
#pragma once

#include "../core/copied.h"
#include "depthwise.cuh"
#include "give_back.cuh"
#include "ptx.cuh"

namespace conv2d_ext::depthwise {

struct CopiedParams {
  void const* in;  // of dgrad y
  void const* y;   // wgrad
  void const* w;
  void const* bias;
  void* out;
  void* partial;
  int64_t in_n, y_n, out_n, out_c, out_h, w_k, w_r, w_s, bias_stride;
  int C, H, W, P, Q, pad_h, pad_w;  // H, W of what is read, P, Q of the outputs
  int group, bands, rows, unit_rows, image_units, groups, shares;
  int units, each, in_bytes, y_bytes;
  int out_H, out_W, out_pad_h, out_pad_w;  // dgrad with stride 2: of x
  Divisor by_columns, by_bands;
};

// What is copied at a time: rows [h0, h0 + rows) of outputs, and the input rows [low, high) that they meet.
struct CopiedUnit {
  int64_t n;
  int h0, rows, low, high;

  __device__ CopiedUnit(CopiedParams const& p, int R, int stride, int unit) : n(unit / p.image_units) {
    h0 = (unit - int(n) * p.image_units) * p.unit_rows, rows = min(p.unit_rows, p.P - h0);
    low = max(h0 * stride - p.pad_h, 0), high = max(low, min((h0 + rows - 1) * stride - p.pad_h + R, p.H));
  }
};

struct CopiedBarriers {
  uint64_t full[kCopiedStages], empty[kCopiedStages];

  __device__ void start(int readers) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kCopiedStages; ++i) {
        ptx::mbarrier_init(&full[i], 1);
        ptx::mbarrier_init(&empty[i], readers);
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
  }
};

// Bytes by which a run begins behind 16 bytes.
__device__ inline uint32_t run_offset(float const* from) { return uint32_t(reinterpret_cast<uintptr_t>(from)) & 15; }

__device__ inline uint32_t run_bytes(float const* from, int elements) {
  return elements > 0 ? (run_offset(from) + uint32_t(elements) * sizeof(float) + 15) / 16 * 16 : 0;
}

__device__ inline void copy_run(uint32_t to, float const* from, uint32_t bytes, uint64_t* bar) {
  if (bytes > 0) ptx::cp_async_bulk(to, reinterpret_cast<char const*>(from) - run_offset(from), bytes, bar);
}

// The copies of a block's share, by one thread.
template <int R, int stride, bool sums>
__device__ inline void copy_units(CopiedParams const& p, CopiedBarriers& barriers, int c0, int begin, int end,
                                  uint32_t shared) {
  int const planes = min(p.group, p.C - c0);
  int stage = 0;
  uint32_t parity = 1;
  for (int unit = begin; unit < end; ++unit) {
    CopiedUnit const u(p, R, stride, unit);
    float const* const in = static_cast<float const*>(p.in) + u.n * p.in_n + (int64_t(c0) * p.H + u.low) * p.W;
    uint32_t const bytes = run_bytes(in, ((planes - 1) * p.H + u.high - u.low) * p.W);
    float const* y = nullptr;
    uint32_t y_bytes = 0;
    if constexpr (sums) {
      y = static_cast<float const*>(p.y) + u.n * p.y_n + (int64_t(c0) * p.P + u.h0) * p.Q;
      y_bytes = run_bytes(y, ((planes - 1) * p.P + u.rows) * p.Q);
    }
    ptx::mbarrier_wait(&barriers.empty[stage], parity);
    ptx::mbarrier_arrive_expect_tx(&barriers.full[stage], bytes + y_bytes);
    uint32_t const to = shared + stage * (p.in_bytes + p.y_bytes);
    copy_run(to, in, bytes, &barriers.full[stage]);
    if constexpr (sums) copy_run(to + p.in_bytes, y, y_bytes, &barriers.full[stage]);
    if (++stage == kCopiedStages) stage = 0, parity ^= 1;
  }
}

// A thread's channel of the block, band and column.
struct CopiedThread {
  int channel, band, column;
  bool exists;

  __device__ CopiedThread(CopiedParams const& p, int c0, int thread) {
    int const line = int(p.by_columns.quotient(thread));
    column = thread - line * p.Q;
    channel = int(p.by_bands.quotient(line)), band = line - channel * p.bands;
    exists = channel < p.group && c0 + channel < p.C;
    if (!exists) channel = band = 0;
  }
};

// Once what a warp has read last is there.
template <int count>
__device__ inline void give_back_run(uint64_t* bar, uint32_t const (&in)[count]) {
  uint32_t words = 0;
#pragma unroll
  for (int s = 0; s < count; ++s) words |= in[s];
  give_back(bar, words);
}

// fprop, and dgrad with stride 1, by filters that are turned round.
template <int R, int stride>
__global__ void __launch_bounds__(copied_threads(R), 2) copied(__grid_constant__ CopiedParams const p) {
  constexpr int size = sizeof(float), slots = (R + stride - 1) / stride;
  extern __shared__ __align__(128) unsigned char dynamic[];
  __shared__ CopiedBarriers barriers;
  __shared__ __align__(16) uint32_t zeros[8];
  int const readers = int(blockDim.x) - 32, group = int(blockIdx.x) % p.groups, share = int(blockIdx.x) / p.groups;
  int const c0 = group * p.group, begin = share * p.each, end = min(begin + p.each, p.units);
  uint32_t const shared = ptx::shared_address(dynamic);
  if (threadIdx.x < 8) zeros[threadIdx.x] = 0;
  barriers.start(readers / 32);
  if (int(threadIdx.x) >= readers) {
    if (int(threadIdx.x) == readers) copy_units<R, stride, false>(p, barriers, c0, begin, end, shared);
    return;
  }
  CopiedThread const me(p, c0, int(threadIdx.x));
  int const c = c0 + me.channel;
  float filter[R][R];
#pragma unroll
  for (int tap = 0; tap < R * R; ++tap)
    filter[tap / R][tap % R] = static_cast<float const*>(p.w)[c * p.w_k + tap / R * p.w_r + tap % R * p.w_s];
  float const bias = p.bias != nullptr ? static_cast<float const*>(p.bias)[c * p.bias_stride] : 0.f;
  bool met[R];
#pragma unroll
  for (int s = 0; s < R; ++s) met[s] = unsigned(me.column * stride + s - p.pad_w) < unsigned(p.W);
  uint32_t in[R] = {};
  float acc[slots];
  uint32_t const none = ptx::shared_address(zeros), pitch = p.W * size;
  int const mine = me.band * p.rows, last = p.rows + slots - 1;
  int stage = 0;
  uint32_t parity = 0;
  for (int unit = begin; unit < end; ++unit) {
    CopiedUnit const u(p, R, stride, unit);
    float const* const run = static_cast<float const*>(p.in) + u.n * p.in_n + (int64_t(c0) * p.H + u.low) * p.W;
    // Row i of those that the band's outputs meet; rows outside of the image are zeros.
    int const first = (u.h0 + mine) * stride - p.pad_h - u.low, inside = u.high - u.low;
    uint32_t from = shared + stage * p.in_bytes + run_offset(run) +
                    uint32_t((me.channel * p.H + first) * p.W + me.column * stride - p.pad_w) * size;
    int const start = p.bands == 1 && u.h0 == 0 ? p.pad_h / stride : 0, count = me.exists ? u.rows - mine : 0;
    float* to = static_cast<float*>(p.out) + u.n * p.out_n + c * p.out_c +
                (u.h0 + mine + start - (slots - 1)) * p.out_h + me.column;
#pragma unroll
    for (int k = 0; k < slots; ++k) acc[k] = bias;
    ptx::mbarrier_wait(&barriers.full[stage], parity);
    int row = first + start * stride;
    from += start * stride * pitch;
#pragma unroll 1
    for (int i = start; i < last; ++i, to += p.out_h) {
#pragma unroll
      for (int v = 0; v < stride; ++v, ++row, from += pitch) {
        uint32_t const at = unsigned(row) < unsigned(inside) ? from : none;
#pragma unroll
        for (int s = 0; s < R; ++s) ptx::ld_shared_if(met[s], at + s * size, in[s]);
#pragma unroll
        for (int k = 0; k < slots; ++k) {
          int const r = (slots - 1 - k) * stride + v;
          if (r >= R) continue;
#pragma unroll
          for (int s = 0; s < R; ++s) {
            float const before = s > 0 || v > 0 ? acc[k] : k + 1 < slots ? acc[k + 1 < slots ? k + 1 : k] : bias;
            acc[k] = fmaf(__uint_as_float(in[s]), filter[r][s], before);
          }
        }
        // Complete after the first of `stride` rows.
        if (v == 0 && i >= slots - 1 && i - (slots - 1) < min(count, p.rows)) *to = acc[0];
      }
    }
    give_back_run(&barriers.empty[stage], in);
    if (++stage == kCopiedStages) stage = 0, parity ^= 1;
  }
}

// dgrad with stride 2. A thread has two columns of pairs of rows of x, and reads the elements of a row of y that they
// meet; rows of y take the place of the inputs, pairs that of the outputs.
template <int R>
__global__ void __launch_bounds__(copied_threads(R), 2) copied_spread(__grid_constant__ CopiedParams const p) {
  constexpr int size = sizeof(float), slots = (R + 1) / 2;
  extern __shared__ __align__(128) unsigned char dynamic[];
  __shared__ CopiedBarriers barriers;
  __shared__ __align__(16) uint32_t zeros[8];
  int const readers = int(blockDim.x) - 32, group = int(blockIdx.x) % p.groups, share = int(blockIdx.x) / p.groups;
  int const c0 = group * p.group, begin = share * p.each, end = min(begin + p.each, p.units);
  uint32_t const shared = ptx::shared_address(dynamic);
  if (threadIdx.x < 8) zeros[threadIdx.x] = 0;
  barriers.start(readers / 32);
  if (int(threadIdx.x) >= readers) {
    if (int(threadIdx.x) == readers) copy_units<slots, 1, false>(p, barriers, c0, begin, end, shared);
    return;
  }
  CopiedThread const me(p, c0, int(threadIdx.x));
  int const c = c0 + me.channel, column = me.column * 2 - p.out_pad_w;
  float filter[R][R];
#pragma unroll
  for (int tap = 0; tap < R * R; ++tap)
    filter[tap / R][tap % R] = static_cast<float const*>(p.w)[c * p.w_k + tap / R * p.w_r + tap % R * p.w_s];
  bool met[slots];
#pragma unroll
  for (int s = 0; s < slots; ++s) met[s] = unsigned(me.column + s - (slots - 1)) < unsigned(p.W);
  bool const left = me.exists && column >= 0, right = me.exists && unsigned(column + 1) < unsigned(p.out_W);
  uint32_t in[slots] = {};
  float acc[slots][2][2];
  uint32_t const none = ptx::shared_address(zeros), pitch = p.W * size;
  int const mine = me.band * p.rows, last = p.rows + slots - 1;
  int stage = 0;
  uint32_t parity = 0;
  for (int unit = begin; unit < end; ++unit) {
    CopiedUnit const u(p, slots, 1, unit);
    float const* const run = static_cast<float const*>(p.in) + u.n * p.in_n + (int64_t(c0) * p.H + u.low) * p.W;
    int const first = u.h0 + mine - p.pad_h - u.low, inside = u.high - u.low;
    uint32_t from = shared + stage * p.in_bytes + run_offset(run) +
                    uint32_t((me.channel * p.H + first) * p.W + me.column - (slots - 1)) * size;
    int const count = min(u.rows - mine, p.rows);
    int out_row = (u.h0 + mine - (slots - 1)) * 2 - p.out_pad_h;
    float* to = static_cast<float*>(p.out) + u.n * p.out_n + c * p.out_c + out_row * p.out_h + column;
#pragma unroll
    for (int i = 0; i < slots * 4; ++i) acc[i / 4][i / 2 % 2][i % 2] = 0.f;
    ptx::mbarrier_wait(&barriers.full[stage], parity);
#pragma unroll 1
    for (int i = 0; i < last; ++i, from += pitch, out_row += 2, to += 2 * p.out_h) {
      uint32_t const at = unsigned(first + i) < unsigned(inside) ? from : none;
#pragma unroll
      for (int s = 0; s < slots; ++s) ptx::ld_shared_if(met[s], at + s * size, in[s]);
#pragma unroll
      for (int k = 0; k < slots; ++k)
#pragma unroll
        for (int ab = 0; ab < 4; ++ab) {
          int const a = ab / 2, b = ab % 2, r = a + 2 * k, whole = b + 2 * (slots - 1) < R ? 0 : 1;
          float const before = k + 1 < slots ? acc[k + 1 < slots ? k + 1 : k][a][b] : 0.f;
          if (r >= R) {
            acc[k][a][b] = before;
            continue;
          }
#pragma unroll
          for (int s = whole; s < slots; ++s)
            acc[k][a][b] =
                fmaf(__uint_as_float(in[s]), filter[r][b + 2 * (slots - 1 - s)], s > whole ? acc[k][a][b] : before);
        }
      if (i < slots - 1 || i - (slots - 1) >= count) continue;
#pragma unroll
      for (int a = 0; a < 2; ++a) {
        if (unsigned(out_row + a) >= unsigned(p.out_H)) continue;
        if (left) to[a * p.out_h] = acc[0][a][0];
        if (right) to[a * p.out_h + 1] = acc[0][a][1];
      }
    }
    give_back_run(&barriers.empty[stage], in);
    if (++stage == kCopiedStages) stage = 0, parity ^= 1;
  }
}

// A sum of wgrad from global memory, over the block's units: for those that a zero made NaN.
template <int R, int stride>
__device__ __noinline__ float copied_exact_sum(CopiedParams const& p, int begin, int end, int c, int r, int s) {
  float sum = 0.f;
  for (int unit = begin; unit < end; ++unit) {
    CopiedUnit const u(p, R, stride, unit);
    float const* const x = static_cast<float const*>(p.in) + u.n * p.in_n + int64_t(c) * p.H * p.W;
    float const* const y = static_cast<float const*>(p.y) + u.n * p.y_n + int64_t(c) * p.P * p.Q;
    for (int row = u.h0; row < u.h0 + u.rows; ++row) {
      int const h = row * stride - p.pad_h + r;
      if (unsigned(h) >= unsigned(p.H)) continue;
      for (int q = 0; q < p.Q; ++q)
        if (int const v = q * stride - p.pad_w + s; unsigned(v) < unsigned(p.W))
          sum = fmaf((x[h * p.W + v]), (y[row * p.Q + q]), sum);
      if (sum != sum) return sum;  // NaN, whatever comes
    }
  }
  return sum;
}

template <int R, int stride>
__global__ void __launch_bounds__(copied_threads(R), 2) copied_sums(__grid_constant__ CopiedParams const p) {
  constexpr int size = sizeof(float), taps = R * R, slots = (R + stride - 1) / stride;
  extern __shared__ __align__(128) unsigned char dynamic[];
  __shared__ CopiedBarriers barriers;
  __shared__ __align__(16) uint32_t zeros[8];
  int const readers = int(blockDim.x) - 32, group = int(blockIdx.x) % p.groups, share = int(blockIdx.x) / p.groups;
  int const c0 = group * p.group, begin = share * p.each, end = min(begin + p.each, p.units);
  uint32_t const shared = ptx::shared_address(dynamic);
  if (threadIdx.x < 8) zeros[threadIdx.x] = 0;
  barriers.start(readers / 32);
  if (int(threadIdx.x) >= readers) {
    if (int(threadIdx.x) == readers) copy_units<R, stride, true>(p, barriers, c0, begin, end, shared);
    return;
  }
  ptx::griddepcontrol_launch_dependents();
  CopiedThread const me(p, c0, int(threadIdx.x));
  bool met[R];
#pragma unroll
  for (int s = 0; s < R; ++s) met[s] = unsigned(me.column * stride + s - p.pad_w) < unsigned(p.W);
  uint32_t in[R] = {};
  float acc[R][R], y[slots];
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) acc[tap / R][tap % R] = 0.f;
  uint32_t const none = ptx::shared_address(zeros), pitch = p.W * size, pitch_y = p.Q * size;
  int const mine = me.band * p.rows, last = p.rows + slots - 1;
  int stage = 0;
  uint32_t parity = 0;
  for (int unit = begin; unit < end; ++unit) {
    CopiedUnit const u(p, R, stride, unit);
    float const* const run = static_cast<float const*>(p.in) + u.n * p.in_n + (int64_t(c0) * p.H + u.low) * p.W;
    float const* const run_y = static_cast<float const*>(p.y) + u.n * p.y_n + (int64_t(c0) * p.P + u.h0) * p.Q;
    int const first = (u.h0 + mine) * stride - p.pad_h - u.low, inside = u.high - u.low;
    uint32_t const base = shared + stage * (p.in_bytes + p.y_bytes);
    uint32_t from =
        base + run_offset(run) + uint32_t((me.channel * p.H + first) * p.W + me.column * stride - p.pad_w) * size;
    uint32_t from_y =
        base + p.in_bytes + run_offset(run_y) + uint32_t((me.channel * p.P + mine) * p.Q + me.column) * size;
    int const count = me.exists ? min(u.rows - mine, p.rows) : 0;
#pragma unroll
    for (int k = 0; k < slots; ++k) y[k] = 0.f;
    ptx::mbarrier_wait(&barriers.full[stage], parity);
    uint32_t word = 0;
    int row = first;
#pragma unroll 1
    for (int i = 0; i < last; ++i, from_y += pitch_y) {
      word = 0;
      ptx::ld_shared_if(i < count, from_y, word);
#pragma unroll
      for (int k = slots - 1; k > 0; --k) y[k] = y[k - 1];
      y[0] = __uint_as_float(word);
#pragma unroll
      for (int v = 0; v < stride; ++v, ++row, from += pitch) {
        uint32_t const at = unsigned(row) < unsigned(inside) ? from : none;
#pragma unroll
        for (int s = 0; s < R; ++s) ptx::ld_shared_if(met[s], at + s * size, in[s]);
#pragma unroll
        for (int s = 0; s < R; ++s)
#pragma unroll
          for (int k = 0; k < slots; ++k)
            if (int const r = k * stride + v; r < R) acc[r][s] = fmaf(__uint_as_float(in[s]), y[k], acc[r][s]);
      }
    }
    in[0] |= word & blockIdx.z;  // 0
    give_back_run(&barriers.empty[stage], in);
    if (++stage == kCopiedStages) stage = 0, parity ^= 1;
  }
  // Sums of the threads that share a channel, in their order: parts of them at first.
  ptx::bar_sync(1, readers);
  float* const sums = reinterpret_cast<float*>(dynamic);
  int const pitch_sums = readers | 1, members = p.bands * p.Q, all = p.group * taps;
  if (me.exists)
#pragma unroll
    for (int tap = 0; tap < taps; ++tap) sums[tap * pitch_sums + int(threadIdx.x)] = acc[tap / R][tap % R];
  ptx::bar_sync(1, readers);
  int const parts = max(1, min(16, readers / all)), of_part = (members + parts - 1) / parts;
  for (int first = 0; first < all * parts; first += readers) {
    int const i = first + int(threadIdx.x), part = i / all, tap = i % all % taps, channel = i % all / taps;
    float sum = 0.f;
    bool const adds = i < all * parts && c0 + channel < p.C;
    float* const from = sums + tap * pitch_sums + channel * members;
    if (adds)
#pragma unroll 8
      for (int member = part * of_part; member < min(members, (part + 1) * of_part); ++member) sum += from[member];
    if (parts > 1) {
      ptx::bar_sync(1, readers);
      if (adds) from[part] = sum;
      ptx::bar_sync(1, readers);
      if (adds && part == 0)
        for (int other = 1; other < parts; ++other) sum += from[other];
    }
    if (!adds || part > 0) continue;
    int const c = c0 + channel, r = tap / R, s = tap % R;
    if (sum != sum) sum = copied_exact_sum<R, stride>(p, begin, end, c, r, s);
    store_sum<float>(p.out, p.partial, p.shares, c * p.w_k + r * p.w_r + s * p.w_s,
                     (int64_t(share) * p.C + c) * taps + tap, sum);
  }
}

// ---- host side

template <Op op>
cudaError_t launch_copied(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  constexpr bool backward = op == Op::dgrad, sums = op == Op::wgrad;
  CopiedTile const t = copied_tile(op, problem);
  if (!t.used) return cudaErrorInvalidValue;
  Strides const &in = backward ? problem.y : problem.x, &out = backward ? problem.x : problem.y;
  CopiedParams p{};
  p.in = args.a, p.y = args.b, p.w = args.b, p.bias = backward ? nullptr : args.bias, p.bias_stride = args.bias_stride;
  p.out = args.out, p.partial = args.workspace;
  p.in_n = in.n, p.y_n = problem.y.n, p.out_n = out.n, p.out_c = out.c, p.out_h = out.h;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.C = int(problem.C), p.H = int(backward ? problem.P() : problem.H), p.W = int(backward ? problem.Q() : problem.W);
  p.P = int(backward ? problem.H : problem.P()), p.Q = int(backward ? problem.W : problem.Q());
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  bool const strided = problem.stride_h == 2;
  if (backward && strided) {
    p.out_H = p.P, p.out_W = p.Q, p.out_pad_h = p.pad_h, p.out_pad_w = p.pad_w;
    p.P = int(ceil_div(p.P + p.pad_h, 2)), p.Q = int(ceil_div(p.Q + p.pad_w, 2));  // pairs
    p.pad_h = p.pad_w = int(problem.R) / 2;
  } else if (backward) {
    p.pad_h = int(problem.R) - 1 - p.pad_h, p.pad_w = int(problem.S) - 1 - p.pad_w;
    p.w = static_cast<float const*>(args.b) + (problem.R - 1) * p.w_r + (problem.S - 1) * p.w_s;
    p.w_r = -p.w_r, p.w_s = -p.w_s;
  }
  p.group = t.group, p.bands = t.bands, p.rows = t.rows, p.unit_rows = int(t.unit_rows);
  p.image_units = int(t.image_units), p.groups = int(t.groups), p.shares = int(t.shares);
  p.units = int(t.units), p.each = int(t.each), p.in_bytes = int(t.in_bytes), p.y_bytes = int(t.y_bytes);
  p.by_columns = Divisor(uint32_t(p.Q)), p.by_bands = Divisor(uint32_t(p.bands));
  auto start = [&](void (*kernel)(CopiedParams)) {
    if (auto const error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
      return error;
    kernel<<<unsigned(t.groups * t.shares), unsigned(t.threads), size_t(t.shared_bytes), stream>>>(p);
    return cudaGetLastError();
  };
  auto of_size = [&]<int R>() {
    if constexpr (sums)
      return start(strided ? copied_sums<R, 2> : copied_sums<5, 1>);
    else if constexpr (backward)
      return start(strided ? copied_spread<R> : copied<5, 1>);
    else
      return start(strided ? copied<R, 2> : copied<5, 1>);
  };
  cudaError_t const error = problem.R == 3   ? of_size.template operator()<3>()
                            : problem.R == 5 ? of_size.template operator()<5>()
                                             : of_size.template operator()<7>();
  if (error != cudaSuccess || !sums || t.shares == 1) return error;
  if (plan.split_k != t.shares) return cudaErrorInvalidValue;
  return launch_sum<float>(problem, plan, args, stream, true);
}

}  // namespace conv2d_ext::depthwise
