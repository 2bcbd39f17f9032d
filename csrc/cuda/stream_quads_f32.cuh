// Depthwise convolution of small square filters in NCHW, float32, wide rows, on the FMA units: four outputs of a row a
// thread.
//
// A block has some neighbouring planes at a time and walks down them. At the command of a warp of its own, the copy
// engine brings four rows of each, with the zeros beside them, to one of a ring of stages in shared memory. A thread of
// the other warps has four columns of outputs of one plane: it reads the inputs that they meet as whole 16 bytes, and
// adds them to the sums of all rows of outputs that the row meets. fprop, and dgrad of stride 1 with the filter turned:
// the first product of a sum moves it on by a row. wgrad: the planes are of neighbouring channels, and a thread keeps
// the rows of y that a row of x meets, and a sum for every tap. Filter and sums stay in registers. A block's share is
// some rows of outputs of all planes (wgrad: of all images), one after the other, and fixed.
#pragma once

#include "../core/quads.h"
#include "give_back.cuh"
#include "launch.h"
#include "ptx.cuh"
#include "second_pass.cuh"
#include "tma_map.h"

namespace conv2d_ext::stream {

// dgrad: in is y, out is x. wgrad: in is x.
struct QuadsParams {
  CUtensorMap in_map, y_map;  // where the copy engine brings the rows
  float const* in;
  float const* y;
  float const* w;
  float const* bias;
  float* out;
  float* partial;
  int64_t in_n, in_c, in_h, y_n, y_c, y_h, out_c, out_h, w_k, w_r, w_s, bias_stride;
  int N, C, in_H, in_W, out_H, out_W, pad_h, pad_w;
  int planes, strips;                                      // of a block; of a row
  int lead;                                                // floats of zeros before a row
  int plane_bytes, row_bytes, plane_bytes_y, row_bytes_y;  // from plane to plane, from row to row in a stage
  int box, box_y;                                          // bytes that the copy engine brings
  int out_width;                                           // floats of a store
  int units;                                               // rows of outputs that the shares divide
  int groups, splits;                                      // wgrad: of channels; shares of each
  int stages, stage_bytes, y_bytes;

  __device__ int share(unsigned which, unsigned shares) const {
    return int(uint64_t(unsigned(units)) * which / shares);
  }
};

// What a block walks down at a time: rows [p0, p0 + rows) of outputs (wgrad: of y) of a group of planes (wgrad: of an
// image); of the rows of inputs that they meet, which begin with `first`, those from `top` to `bottom` are in the
// image.
struct QuadsPiece {
  int group, p0, rows, first, top, bottom, count;

  __device__ QuadsPiece(QuadsParams const& p, int R, int stride, int index, int end) {
    group = int(uint32_t(index) / uint32_t(p.out_H)), p0 = index - group * p.out_H;
    rows = p.out_H - p0 < end - index ? p.out_H - p0 : end - index;
    first = p0 * stride - p.pad_h, count = (rows - 1) * stride + R;
    int const before = first < 0 ? -first : 0, inside = p.in_H - first < count ? p.in_H - first : count;
    top = before < count ? before : count, bottom = inside > top ? inside : top;
  }
};

struct QuadsRing {
  uint64_t full[kQuadsStages], empty[kQuadsStages];

  __device__ void start(QuadsParams const& p) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < p.stages; ++i) {
        ptx::mbarrier_init(&full[i], 1);
        ptx::mbarrier_init(&empty[i], kQuadsReaders / 32);
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
  }
};

template <int loads>
__device__ inline void load_quads(uint32_t from, float (&v)[4 * loads]) {
#pragma unroll
  for (int i = 0; i < loads; ++i) {
    uint4 const q = ptx::ld_shared_v4(from + 16 * i);
    v[4 * i] = __uint_as_float(q.x), v[4 * i + 1] = __uint_as_float(q.y);
    v[4 * i + 2] = __uint_as_float(q.z), v[4 * i + 3] = __uint_as_float(q.w);
  }
}

template <int R, int stride>
__global__ void __launch_bounds__(kQuadsReaders + 32, quads_blocks(R))
    gather_quads(__grid_constant__ QuadsParams const p) {
  constexpr int shift = quads_shift(R), loads = quads_loads(R, stride), A = (R - 1) / stride + 1;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  __shared__ QuadsRing ring;
  uint32_t const shared = ptx::shared_address(shared_bytes);
  int const begin = p.share(blockIdx.x, gridDim.x), end = p.share(blockIdx.x + 1, gridDim.x);
  int const all = p.N * p.C;
  ring.start(p);
  int stage = 0;

  if (threadIdx.x >= kQuadsReaders) {
    if (threadIdx.x > kQuadsReaders) return;
    uint32_t parity = 1;
    for (int index = begin; index < end;) {
      QuadsPiece const at(p, R, stride, index, end);
      index += at.rows;
#pragma unroll 1
      for (int row = at.top; row < at.bottom; row += kQuadsRows) {
        ptx::mbarrier_wait(&ring.empty[stage], parity);
        ptx::mbarrier_arrive_expect_tx(&ring.full[stage], p.box);
        ptx::cp_async_bulk_tensor_4d(shared + stage * p.stage_bytes, &p.in_map, &ring.full[stage], -p.lead,
                                     at.first + row, at.group * p.planes, 0);
        if (++stage == p.stages) stage = 0, parity ^= 1;
      }
    }
    return;
  }

  int plane = int(threadIdx.x) / p.strips, strip = int(threadIdx.x) - plane * p.strips;
  bool const placed = plane < p.planes;
  if (!placed) plane = strip = 0;
  uint32_t const mine = shared + plane * p.plane_bytes + strip * (16 * stride);
  uint32_t parity = 0;
  for (int index = begin; index < end;) {
    QuadsPiece const at(p, R, stride, index, end);
    index += at.rows;
    int const which = at.group * p.planes + plane;
    bool const exists = placed && which < all;
    int const c = exists ? which % p.C : 0;
    float filter[R][R];
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int s = 0; s < R; ++s) filter[r][s] = __ldg(p.w + c * p.w_k + r * p.w_r + s * p.w_s);
    float const bias = p.bias != nullptr ? p.bias[c * p.bias_stride] : 0.f;

    int out_row = -(A - 1);
    float* to = p.out + which * p.out_c + (at.p0 + out_row) * p.out_h + 4 * strip;
    auto store = [&](float const(&v)[4]) {
      if (exists && unsigned(out_row) < unsigned(at.rows)) {
        if (p.out_width == 4) {
          *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
        } else if (p.out_width == 2) {
          *reinterpret_cast<float2*>(to) = make_float2(v[0], v[1]);
          if (4 * strip + 2 < p.out_W) *reinterpret_cast<float2*>(to + 2) = make_float2(v[2], v[3]);
        } else {
#pragma unroll
          for (int b = 0; b < 4; ++b)
            if (4 * strip + b < p.out_W) to[b] = v[b];
        }
      }
      ++out_row, to += p.out_h;
    };
    float acc[A][4];  // of the rows of outputs that a row of inputs meets, the oldest first
    auto start = [&]() {
#pragma unroll
      for (int i = 0; i < A * 4; ++i) acc[i / 4][i % 4] = bias;
    };
    start();
    for (int row = 0; row < at.top; row += stride) store(acc[0]);
    int row = at.top;
#pragma unroll 1
    while (row < at.bottom) {
      ptx::mbarrier_wait(&ring.full[stage], parity);
      uint32_t from = mine + stage * p.stage_bytes;
      int const last = row + kQuadsRows < at.bottom ? row + kQuadsRows : at.bottom;
#pragma unroll 1
      for (; row < last; ++row, from += p.row_bytes) {
        float in[4 * loads];
        load_quads<loads>(from, in);
        bool const moves = stride == 1 || row % 2 == 0;
        if (moves) {
#pragma unroll
          for (int s = 0; s < R; ++s)
#pragma unroll
            for (int k = 0; k < A; ++k)
#pragma unroll
              for (int b = 0; b < 4; ++b) {
                float const before = s > 0 ? acc[k][b] : k + 1 < A ? acc[k + 1 < A ? k + 1 : k][b] : bias;
                acc[k][b] = fmaf(in[shift + s + stride * b], filter[stride * (A - 1 - k)][s], before);
              }
        } else {
#pragma unroll
          for (int s = 0; s < R; ++s)
#pragma unroll
            for (int k = 1; k < A; ++k)
#pragma unroll
              for (int b = 0; b < 4; ++b)
                acc[k][b] = fmaf(in[shift + s + stride * b], filter[stride * (A - 1 - k) + stride - 1][s], acc[k][b]);
        }
        if (row + 1 == last) {
          float const(&of)[4] = acc[A > 1 ? 1 : 0];
          give_back(&ring.empty[stage], __float_as_uint(of[0]) | __float_as_uint(of[1]) | __float_as_uint(of[3]));
        }
        if (moves) store(acc[0]);
      }
      if (++stage == p.stages) stage = 0, parity ^= 1;
    }
    if (stride == 2 && row % 2 != 0) ++row;
#pragma unroll
    for (int k = 1; k < A; ++k, row += stride)
      if (row < at.count) store(acc[k]);
    if (row < at.count) start();
    for (; row < at.count; row += stride) store(acc[0]);
  }
}

// A tap's sum over a share, by a warp: for those that a zero made NaN.
template <int stride>
__device__ __noinline__ float exact_quads_sum(QuadsParams const& p, int c, int begin, int end, int r, int s) {
  float sum = 0;
  for (int index = begin; index < end && sum == sum; ++index) {  // a NaN stays one
    int const n = index / p.out_H, row = index - n * p.out_H, h = row * stride - p.pad_h + r;
    if (unsigned(h) >= unsigned(p.in_H)) continue;
    for (int q = int(threadIdx.x) % 32; q < p.out_W; q += 32)
      if (int const v = q * stride - p.pad_w + s; unsigned(v) < unsigned(p.in_W))
        sum = fmaf(p.in[n * p.in_n + c * p.in_c + h * p.in_h + v], p.y[n * p.y_n + c * p.y_c + row * p.y_h + q], sum);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

template <int R, int stride>
__global__ void __launch_bounds__(kQuadsReaders + 32, quads_blocks(R))
    wgrad_quads(__grid_constant__ QuadsParams const p) {
  constexpr int shift = quads_shift(R), loads = quads_loads(R, stride), taps = R * R, A = (R - 1) / stride + 1;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  __shared__ QuadsRing ring;
  uint32_t const shared = ptx::shared_address(shared_bytes);
  int const group = int(blockIdx.x) % p.groups, split = int(blockIdx.x) / p.groups, c0 = group * p.planes;
  int const begin = p.share(split, p.splits), end = p.share(split + 1, p.splits);
  int const present = p.C - c0 < p.planes ? p.C - c0 : p.planes;
  ptx::griddepcontrol_launch_dependents();
  ring.start(p);
  int stage = 0;

  if (threadIdx.x >= kQuadsReaders) {
    if (threadIdx.x > kQuadsReaders) return;
    uint32_t parity = 1;
    for (int index = begin; index < end;) {
      QuadsPiece const at(p, R, stride, index, end);
      index += at.rows;
#pragma unroll 1
      for (int row = 0; row < at.bottom; row += kQuadsRows) {
        uint32_t const to = shared + stage * p.stage_bytes;
        ptx::mbarrier_wait(&ring.empty[stage], parity);
        ptx::mbarrier_arrive_expect_tx(&ring.full[stage], p.box + p.box_y);
        ptx::cp_async_bulk_tensor_4d(to, &p.in_map, &ring.full[stage], -p.lead, at.first + row, c0, at.group);
        ptx::cp_async_bulk_tensor_4d(to + p.y_bytes, &p.y_map, &ring.full[stage], 0, at.p0 + row / stride, c0,
                                     at.group);
        if (++stage == p.stages) stage = 0, parity ^= 1;
      }
    }
    return;
  }

  int plane = int(threadIdx.x) / p.strips, strip = int(threadIdx.x) - plane * p.strips;
  bool const placed = plane < p.planes;
  if (!placed) plane = strip = 0;
  uint32_t const mine = shared + plane * p.plane_bytes + strip * (16 * stride);
  uint32_t const mine_y = shared + p.y_bytes + plane * p.plane_bytes_y + strip * 16;
  float acc[R][R] = {};
  uint32_t parity = 0;
  for (int index = begin; index < end;) {
    QuadsPiece const at(p, R, stride, index, end);
    index += at.rows;
    float y[A][4] = {};
    uint32_t from = 0, from_y = 0;
#pragma unroll 1
    for (int turn = 0; turn < at.bottom; turn += A * stride) {
#pragma unroll
      for (int i = 0; i < A * stride; ++i) {
        int const row = turn + i;
        if (row >= at.bottom) break;
        if (row % kQuadsRows == 0) {
          ptx::mbarrier_wait(&ring.full[stage], parity);
          from = mine + stage * p.stage_bytes, from_y = mine_y + stage * p.stage_bytes;
        }
        uint32_t word = 0;
        if (i % stride == 0) {
          float (&now)[4] = y[i / stride];
          if (row < at.rows * stride)
            load_quads<1>(from_y, now);
          else
#pragma unroll
            for (int b = 0; b < 4; ++b) now[b] = 0;
          word = __float_as_uint(now[3]), from_y += p.row_bytes_y;
        }
        if (row >= at.top) {
          float in[4 * loads];
          load_quads<loads>(from, in);
#pragma unroll
          for (int j = 0; j < A; ++j)
            if (stride * j + i % stride < R)
#pragma unroll
              for (int b = 0; b < 4; ++b)
#pragma unroll
                for (int s = 0; s < R; ++s) {
                  float& sum = acc[stride * j + i % stride][s];
                  sum = fmaf(in[shift + s + stride * b], y[(i / stride - j + A) % A][b], sum);
                }
#pragma unroll
          for (int s = 0; s < R; ++s) word |= __float_as_uint(acc[i % stride][s]);
        }
        from += p.row_bytes;
        if (row % kQuadsRows == kQuadsRows - 1 || row + 1 == at.bottom) {
          give_back(&ring.empty[stage], word);
          if (++stage == p.stages) stage = 0, parity ^= 1;
        }
      }
    }
  }

  // Sums of the threads that share a channel, in their order.
  float* const sums = reinterpret_cast<float*>(shared_bytes);
  ptx::bar_sync(1, kQuadsReaders);
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) sums[tap * kQuadsReaders + threadIdx.x] = acc[tap / R][tap % R];
  ptx::bar_sync(1, kQuadsReaders);
  bool nan = false;
  auto store = [&](int which, int tap, float sum) {
    int const c = c0 + which;
    depthwise::store_sum<float>(p.out, p.partial, p.splits, c * p.w_k + tap / R * p.w_r + tap % R * p.w_s,
                                (int64_t(split) * p.C + c) * taps + tap, sum);
  };
  for (int i = threadIdx.x; i < present * taps; i += kQuadsReaders) {
    int const which = i / taps, tap = i - which * taps;
    float const* const of = sums + tap * kQuadsReaders + which * p.strips;
    float sum = 0;
    for (int member = 0; member < p.strips; ++member) sum += of[member];
    nan = nan || sum != sum;
    store(which, tap, sum);
  }
  if (!ptx::bar_red_or<1>(kQuadsReaders, nan)) return;
  for (int i = int(threadIdx.x) / 32; i < present * taps; i += kQuadsReaders / 32) {
    int const which = i / taps, tap = i - which * taps;
    float const sum = exact_quads_sum<stride>(p, c0 + which, begin, end, tap / R, tap % R);
    if (threadIdx.x % 32 == 0) store(which, tap, sum);
  }
}

// ---- host side

template <Op op, int R, int stride>
cudaError_t launch_quads(Problem const& problem, QuadsTile const& t, Plan const& plan, Arguments const& args,
                         cudaStream_t stream) {
  constexpr bool backward = op == Op::dgrad, sums = op == Op::wgrad;
  constexpr int rows_y = kQuadsRows / stride;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  Strides const& w = problem.w;
  QuadsParams p{};
  p.in = static_cast<float const*>(args.a), p.y = static_cast<float const*>(args.b);
  p.w = static_cast<float const*>(args.b), p.w_k = w.n, p.w_r = w.h, p.w_s = w.w;
  if (backward) p.w += (R - 1) * (w.h + w.w), p.w_r = -w.h, p.w_s = -w.w;
  p.bias = static_cast<float const*>(args.bias), p.bias_stride = args.bias_stride;
  p.out = static_cast<float*>(args.out), p.partial = static_cast<float*>(args.workspace);
  p.in_n = in.n, p.in_c = in.c, p.in_h = in.h, p.out_c = out.c, p.out_h = out.h;
  p.y_n = out.n, p.y_c = out.c, p.y_h = out.h;
  p.N = int(problem.N), p.C = int(problem.C);
  p.in_H = t.in_H, p.in_W = t.in_W, p.out_H = t.out_H, p.out_W = t.out_W;
  p.pad_h = t.pad_h, p.pad_w = t.lead - quads_shift(R), p.lead = t.lead;
  p.planes = t.planes, p.strips = t.strips;
  p.out_width = t.stored;
  p.row_bytes = 4 * t.pitch, p.plane_bytes = kQuadsRows * p.row_bytes;
  p.row_bytes_y = 16 * t.strips, p.plane_bytes_y = rows_y * p.row_bytes_y;
  p.box = t.planes * p.plane_bytes, p.box_y = t.planes * p.plane_bytes_y;
  p.units = int(t.units), p.groups = int(t.groups), p.splits = sums ? plan.split_k : 1;
  p.stages = t.stages, p.stage_bytes = t.stage_bytes, p.y_bytes = t.y_bytes;
  // fprop, dgrad: planes are counted over the images.
  int64_t const planes = sums ? problem.C : problem.N * problem.C, images = sums ? problem.N : 1;
  tma::Tensor4 const from{args.a, DType::f32, {t.in_W, t.in_H, planes, images}, {1, in.h, in.c, in.n}};
  if (auto const error = tma::encode_boxes(p.in_map, from, t.pitch, kQuadsRows, t.planes, 1)) return error;
  if constexpr (sums) {
    tma::Tensor4 const y{args.b, DType::f32, {t.out_W, t.out_H, planes, images}, {1, out.h, out.c, out.n}};
    if (auto const error = tma::encode_boxes(p.y_map, y, 4 * t.strips, rows_y, t.planes, 1)) return error;
  }
  void (*kernel)(QuadsParams);
  if constexpr (sums)
    kernel = wgrad_quads<R, stride>;
  else
    kernel = gather_quads<R, stride>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, t.shared_bytes))
    return error;
  int64_t const blocks = sums ? t.groups * plan.split_k : t.shares;
  kernel<<<unsigned(blocks), kQuadsReaders + 32, size_t(t.shared_bytes), stream>>>(p);
  if (cudaError_t const error = cudaGetLastError(); error != cudaSuccess || !sums || p.splits == 1) return error;
  return depthwise::launch_sum<float>(problem, plan, args, stream, true);
}

// A row that has no other kernels.
template <Op op, int R>
cudaError_t launch_quads(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  return launch_quads<op, R, 1>(problem, quads_tile(R, op, problem, h200_sxm), plan, args, stream);
}

}  // namespace conv2d_ext::stream

#define CONV2D_EXT_STREAM_QUADS_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                      \
    return stream::launch_quads<Op::op, tm>(p, plan, args, stream);              \
  }
