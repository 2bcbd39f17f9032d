// Depthwise convolution of small filters in NCHW, 16-bit types, stride 1 or 2, on tensor cores. A unit is 8 columns of
// outputs of one image. Its row of outputs is a row of 16 inputs times a banded 16 x 8 matrix for each filter row; mma
// multiplies 16 units, which may be of several images, at once. A warp walks down its units: it copies every row of
// inputs once to a ring of its own in shared memory, a ring's length ahead, and adds it to the sums of the R rows of
// outputs that it meets. No warp waits for another. dgrad is fprop with the filter turned round.
// wgrad: the same walk; ldmatrix transposes x and y, so that mma sums over the 16 units, and the diagonals of its 16 x
// 8 results are the taps.
// Rows of fprop and dgrad that begin anywhere, and wide ones, are for stream_ring.cuh; odd rows of 3x3 for
// stream_runs.cuh.
#pragma once

#include "stream_planes.cuh"
#include "stream_ring.cuh"
#include "stream_rows.cuh"
#include "stream_runs.cuh"
#include "stream_sums.cuh"
#include "stream_taller.cuh"
#include "stream_units.cuh"

namespace conv2d_ext::stream {

// With stride 2 eight units are 32 bytes apart, which would be twice the same banks: those of every other 128 bytes
// have the halves of their 32 bytes exchanged, or, of up to four units a row, images lie an odd number of 16 bytes
// apart.
__device__ inline int swizzled(int offset, int swizzle) { return offset ^ (offset >> 3 & swizzle); }

// A warp's copies of rows of a tensor to its ring, `passes` a lane and row, of `width` elements; `hints`: under a
// policy.
template <class T, int width, int passes, bool hints = false>
struct Copies {
  char const* from[passes];  // in the next row
  int64_t row_bytes;
  uint32_t to[passes];  // in the ring's first slot
  bool exists[passes];
  T held[width == 1 ? passes : 1];
  int held_slot = -1;
  uint64_t policy = 0;

  // `column`: the first that is copied, `place` elements into a segment of `pitch`; `count` copies of each image.
  __device__ Copies(Source const& s, Walk const& at, int64_t N, int row, int column, int place, int count, int images,
                    int pitch, uint32_t ring, int swizzle = 0)
      : row_bytes(s.h * int64_t(sizeof(T))) {
#pragma unroll
    for (int i = 0; i < passes; ++i) {
      int const which = int(threadIdx.x) % 32 + 32 * i, image = which / count, x = which % count * width;
      exists[i] = image < images && at.n0 + image < N && unsigned(column + x) < unsigned(s.W);
      T const* const first = static_cast<T const*>(s.data) + at.n0 * s.n + at.c * s.c + row * s.h + column;
      from[i] = reinterpret_cast<char const*>(first + (exists[i] ? image * s.n + x : 0));
      to[i] = ring + swizzled((image * pitch + place + x) * int(sizeof(T)), swizzle);
    }
  }

  // Copies the next row, or zeros if it is not `inside` the image. Single elements arrive with the next row.
  __device__ void row(int slot, bool inside) {
    if constexpr (width == 1) {
      finish();
      held_slot = slot;
#pragma unroll
      for (int i = 0; i < passes; ++i) {
        held[i] = narrow<T>(0.f);
        if (inside && exists[i]) held[i] = *reinterpret_cast<T const*>(from[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < passes; ++i)
        if (exists[i]) {
          if constexpr (hints)
            ptx::cp_async_ca<width* int(sizeof(T))>(to[i] + slot, from[i], inside, policy);
          else
            ptx::cp_async_ca<width* int(sizeof(T))>(to[i] + slot, from[i], inside);
        }
    }
#pragma unroll
    for (int i = 0; i < passes; ++i) from[i] += row_bytes;
  }
  __device__ void finish() {
    if (held_slot < 0) return;
#pragma unroll
    for (int i = 0; i < passes; ++i)
      if (exists[i]) ptx::st_shared_u16(to[i] + held_slot, reinterpret_cast<uint16_t const&>(held[i]));
  }
};

// The rows of a walk's inputs that exist, counted from its first.
struct Within {
  int low;
  unsigned count;
  __device__ Within(int first, int H, int steps) {
    int const end = steps < H - first ? steps : H - first;
    low = first < 0 ? -first : 0, count = end > low ? unsigned(end - low) : 0;
  }
  __device__ bool operator()(int step) const { return unsigned(step - low) < count; }
};

__device__ inline void clear(uint32_t shared, int bytes) {
  for (int i = int(threadIdx.x) % 32 * 16; i < bytes; i += 32 * 16) ptx::st_shared_v4(shared + i, {});
  __syncwarp();
}

// Slots of the ring: a multiple of `live` rows times the stride, so that all of the loop's addresses are known.
constexpr int ring(int R, int stride) {
  int const turn = live(R, stride) * stride;
  return turn < 6 ? 2 * turn : turn;
}
// A warp's row of inputs, and of y, in its ring.
constexpr int slot_bytes(int stride) { return 512 * stride; }
constexpr int kSlotBytesY = (kStreamUnits + 1) * 16;

template <class T, int R, int stride, int width, int passes>
__global__ void __launch_bounds__(kStreamWarps * 32, stream_blocks(R, stride, width))
    gather(__grid_constant__ Params const p) {
  constexpr int A = live(R, stride), slots = ring(R, stride), slot = slot_bytes(stride);
  static_assert((R - 1) % stride == 0 && stride * (A - 1) == R - 1);
  extern __shared__ __align__(16) unsigned char shared[];
  int const lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4, warp = int(threadIdx.x) / 32;
  uint32_t const task = blockIdx.x * kStreamWarps + warp;
  if (task >= p.walks * uint32_t(p.C)) return;
  Walk const at(p, int(task % uint32_t(p.C)), task / uint32_t(p.C));
  uint32_t const begin = ptx::shared_address(shared) + warp * slots * slot;
  clear(begin, slots * slot);
  int const base = at.q0 * stride - p.pad_w - p.shift, first = p.pieces == 1 ? p.first : base;
  int const h0 = at.p0 * stride - p.pad_h;
  Within const within(h0, p.in.H, (at.rows - 1) * stride + R);
  Copies<T, width, passes> copies(p.in, at, p.N, h0, first, first - base, p.copies, p.images, p.pitch * kStreamColumns,
                                  begin, p.swizzle);
  auto copy = [&](int slot_of, int step) {
    copies.row(slot_of * slot, within(step));
    ptx::cp_async_commit_group();
  };
#pragma unroll
  for (int i = 0; i < slots - 1; ++i) copy(i, i);

  uint32_t band[R][stride][2];
  load_band<T>(p, at.c, band);
  float const bias = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[at.c * p.bias_stride]) : 0.f;
  Outputs<T, true> out0(p, at, g, t), out1(p, at, g + 8, t);
  // ldmatrix takes rows 0 to 7 and 8 to 15 of the units' first 8 inputs, then of the next.
  Unit const mine(p, lane % 16);
  auto rows_of = [&](int k) {
    return begin + swizzled((mine.image * p.pitch + mine.place * stride + lane / 16 + 2 * k) * 16, p.swizzle);
  };
  // A unit's inputs are 24 with stride 2, of which 16 and 8 are multiplied.
  uint32_t const rows = rows_of(0), rest = stride == 2 ? rows_of(1) : 0;

  float acc[A][4];  // of the row of outputs so many rows above the walk's
  auto multiply = [&](int step, int at_slot, int ahead) {
    ptx::cp_async_wait_group<slots - 2>();
    __syncwarp();
    uint32_t a[4], a_rest[2];
    ptx::ldmatrix_x4(a, rows + at_slot * slot);
    if (stride == 2) ptx::ldmatrix_x2(a_rest, rest + at_slot * slot);
    copy((at_slot + slots - 1) % slots, ahead);
    int const odd = step % stride;
    if (odd == 0) {
#pragma unroll
      for (int j = A - 1; j > 0; --j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[j][i] = acc[j - 1][i];
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[0][i] = bias;
    }
#pragma unroll
    for (int j = 0; j < A; ++j)
      if (int const r = stride * j + odd; r < R) {
        ptx::mma_m16n8k16<T>(acc[j], a[0], a[1], a[2], a[3], band[r][0][0], band[r][0][1]);
        if (stride == 2) ptx::mma_m16n8k8<T>(acc[j], a_rest[0], a_rest[1], band[r][stride - 1][0]);
      }
  };
#pragma unroll
  for (int step = 0; step < R - 1; ++step) multiply(step, step % slots, step + slots - 1);
  typename PairOf<T>::type spoilt{};
  int left = at.rows;
#pragma unroll 1
  for (int begin = R - 1; left > 0; begin += slots) {
#pragma unroll
    for (int i = 0; i < slots; ++i) {
      multiply(R - 1 + i, (R - 1 + i) % slots, begin + i + slots - 1);
      if (i % stride != 0) continue;
      Vector<T, 2> const v0{{narrow<T>(acc[A - 1][0]), narrow<T>(acc[A - 1][1])}};
      Vector<T, 2> const v1{{narrow<T>(acc[A - 1][2]), narrow<T>(acc[A - 1][3])}};
      spoilt = spoil(spoil(spoilt, v0), v1);
      out0.store(v0);
      out1.store(v1);
      if (--left == 0) break;
    }
  }
  if (__low2float(spoilt) != 0 || __high2float(spoilt) != 0) again<T, stride>(p, task);
}

// ---- dgrad with stride 2. A unit is 16 columns of x. A row of y meets R rows of x; the even and the odd columns of x
// meet every other tap, so that the sums of a row are two products.

template <class T, int R, int width, int passes>
__global__ void __launch_bounds__(kStreamWarps * 32, R == 3 && width == 4 ? 5 : 3)
    spread(__grid_constant__ Params const p) {
  constexpr int slots = 8, slot = slot_bytes(1);
  extern __shared__ __align__(16) unsigned char shared[];
  int const lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4, warp = int(threadIdx.x) / 32;
  uint32_t const task = blockIdx.x * kStreamWarps + warp;
  if (task >= p.walks * uint32_t(p.C)) return;
  Walk const at(p, int(task % uint32_t(p.C)), task / uint32_t(p.C));
  uint32_t const begin = ptx::shared_address(shared) + warp * slots * slot;
  clear(begin, slots * slot);
  // Row i of y that the walk takes is v0 + i; after it rows 2 (v0 + i) - pad_h and the next of x are complete.
  int const last = at.p0 + at.rows - 1 + p.pad_h, lowest = at.p0 + p.pad_h - (R - 1);
  int const v0 = lowest >= 0 ? lowest / 2 : (lowest - 1) / 2, steps = last / 2 - v0 + 1;
  int const base = at.q0 - p.pad_w - p.shift, first = p.pieces == 1 ? p.first : base;
  Within const within(v0, p.in.H, steps);
  Copies<T, width, passes> copies(p.in, at, p.N, v0, first, first - base, p.copies, p.images,
                                  (p.span + 1) * kStreamColumns, begin);
  auto copy = [&](int slot_of, int step) {
    copies.row(slot_of * slot, within(step));
    ptx::cp_async_commit_group();
  };
#pragma unroll
  for (int i = 0; i < slots - 1; ++i) copy(i, i);

  uint32_t band[R][2][2];
  load_spread_band<T>(p, at.c, band);
  SpreadOutputs<T, true> const out0(p, at, g, t), out1(p, at, g + 8, t);
  int64_t const row_bytes = p.out_h * int64_t(sizeof(T));
  Unit const mine(p, lane % 16);
  uint32_t const rows = begin + ((mine.image * (p.span + 1) + mine.place) + lane / 16) * 16;

  float acc[R][2][4] = {};  // of the rows of x from the next complete one on
  typename PairOf<T>::type spoilt{};
  int y = 2 * v0 - p.pad_h;
#pragma unroll 1
  for (int first_step = 0; first_step < steps; first_step += slots) {
#pragma unroll
    for (int i = 0; i < slots; ++i) {
      if (first_step + i >= steps) break;
      ptx::cp_async_wait_group<slots - 2>();
      __syncwarp();
      uint32_t a[4];
      ptx::ldmatrix_x4(a, rows + i * slot);
      copy((i + slots - 1) % slots, first_step + i + slots - 1);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int b = 0; b < 2; ++b)
          ptx::mma_m16n8k16<T>(acc[r][b], a[0], a[1], a[2], a[3], band[r][b][0], band[r][b][1]);
#pragma unroll
      for (int e = 0; e < 2; ++e, ++y) {
        if (y < at.p0 || y >= at.p0 + at.rows) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Vector<T, 4> v;
#pragma unroll
          for (int j = 0; j < 4; ++j) v.v[j] = narrow<T>(acc[e][j % 2][2 * half + j / 2]);
          spoilt = spoil(spoil(spoilt, Vector<T, 2>{{v.v[0], v.v[1]}}), Vector<T, 2>{{v.v[2], v.v[3]}});
          (half == 0 ? out0 : out1).store(y * row_bytes, v);
        }
      }
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int r = 0; r + 2 < R; ++r) acc[r][b][j] = acc[r + 2][b][j];
          acc[R - 2][b][j] = acc[R - 1][b][j] = 0;
        }
    }
  }
  if (__low2float(spoilt) != 0 || __high2float(spoilt) != 0) spread_again<T>(p, task);
}

template <class T, int R, int stride, int width, int passes, int passes_y>
__global__ void __launch_bounds__(kStreamWarps * 32, stream_blocks(R, stride, width) - (R<7 || passes> stride))
    wgrad(__grid_constant__ Params const p) {
  constexpr int A = live(R, stride), slots = ring(R, stride), slot = slot_bytes(stride) + kSlotBytesY;
  extern __shared__ __align__(16) unsigned char shared[];
  ptx::griddepcontrol_launch_dependents();
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int const c = int(blockIdx.x % uint32_t(p.C)), split = int(blockIdx.x / uint32_t(p.C));
  uint32_t const begin = uint32_t(uint64_t(p.walks) * split / p.splits);
  uint32_t const end = uint32_t(uint64_t(p.walks) * (split + 1) / p.splits);
  uint32_t const ring_begin = ptx::shared_address(shared) + warp * slots * slot;
  // ldmatrix takes the first and the next 8 inputs of units 0 to 7, then of the others.
  Unit const mine(p, lane % 8 + lane / 16 * 8), mine_y(p, lane % 16);
  uint32_t const rows = ring_begin + ((mine.image * (p.span + 1) + mine.place) * stride + lane / 8 % 2) * 16;
  // The last 16 bytes of a row of y stay zero.
  uint32_t const rows_y =
      ring_begin + slot_bytes(stride) + (mine_y.exists ? mine_y.image * p.span + mine_y.place : kStreamUnits) * 16;

  constexpr bool hints = stream_hints(R);
  uint64_t const policy = hints ? walks_policy(p.once) : 0;
  float acc[R][stride][4] = {};
  for (uint32_t index = begin + warp; index < end; index += kStreamWarps) {
    Walk const at(p, c, index);
    __syncwarp();
    clear(ring_begin, slots * slot);
    int const base = at.q0 * stride - p.pad_w - p.shift, first = p.pieces == 1 ? p.first : base;
    int const h0 = at.p0 * stride - p.pad_h, steps = (at.rows - 1) * stride + R;
    Within const within(h0, p.in.H, steps);
    Copies<T, width, passes, hints> copies(p.in, at, p.N, h0, first, first - base, p.copies, p.images,
                                           (p.span + 1) * kStreamColumns * stride, ring_begin);
    Copies<T, width, passes_y, hints> copies_y(p.y, at, p.N, at.p0, at.q0, 0, p.copies_y, p.images,
                                               p.span * kStreamColumns, ring_begin + slot_bytes(stride));
    copies.policy = copies_y.policy = policy;
    auto copy = [&](int slot_of, int step, bool odd) {
      copies.row(slot_of * slot, within(step));
      if (!odd) copies_y.row(slot_of * slot, step < at.rows * stride);
      ptx::cp_async_commit_group();
    };
#pragma unroll
    for (int i = 0; i < slots - 1; ++i) copy(i, i, i % stride != 0);
    uint32_t y[A][2] = {};
#pragma unroll 1
    for (int step = 0; step < steps; step += slots) {
#pragma unroll
      for (int i = 0; i < slots; ++i) {
        ptx::cp_async_wait_group<slots - 2>();
        __syncwarp();
        uint32_t x[stride][4];
#pragma unroll
        for (int k = 0; k < stride; ++k) ptx::ldmatrix_x4_trans(x[k], rows + i * slot + k * 32);
        if (i % stride == 0) {
#pragma unroll
          for (int j = A - 1; j > 0; --j) y[j][0] = y[j - 1][0], y[j][1] = y[j - 1][1];
          ptx::ldmatrix_x2_trans(y[0], rows_y + i * slot);
        }
        copy((i + slots - 1) % slots, step + i + slots - 1, (i + slots - 1) % stride != 0);
#pragma unroll
        for (int j = 0; j < A; ++j)
          if (stride * j + i % stride < R)
#pragma unroll
            for (int k = 0; k < stride; ++k)
              ptx::mma_m16n8k16<T>(acc[stride * j + i % stride][k], x[k][0], x[k][1], x[k][2], x[k][3], y[j][0],
                                   y[j][1]);
      }
    }
    ptx::cp_async_wait_all();
  }

  store_sums<T, R, stride>(p, c, split, begin, end, acc, shared);
}

// ---- host side

template <Op op, DType dtype, int R, int stride>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  constexpr Row row{Family::stream, op, dtype, R, R, stride, stride == 2 ? Variant::nchw_s2 : Variant::nchw, ""};
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad, sums = op == Op::wgrad;
  constexpr bool spreads = backward && stride == 2;
  if constexpr (R == 3 && stride == 1 && !sums)
    if (RunsTile const runs = runs_tile(op, problem, h200_sxm); runs.used)
      return launch_runs<op, T>(problem, runs, args, stream);
  if constexpr (R == 3 && spreads)
    if (SpreadRuns const runs = spread_runs_tile(problem, h200_sxm); runs.used)
      return launch_spread_runs<T>(problem, runs, args, stream);
  StreamTile const t = stream_tile(row, op, problem, h200_sxm);
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  Strides const& w = problem.w;
  Params p{};
  p.in = source_of(args.a, in, problem, t.in_H, t.in_W, sizeof(T));
  p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride, p.out = args.out, p.partial = args.workspace;
  p.out_n = out.n, p.out_c = out.c, p.out_h = out.h;
  p.w_k = w.n, p.w_r = w.h, p.w_s = w.w;
  if (backward && !spreads) {
    p.w = static_cast<T const*>(args.b) + (problem.R - 1) * w.h + (problem.S - 1) * w.w;
    p.w_r = -w.h, p.w_s = -w.w;
  }
  p.N = problem.N, p.C = int(problem.C), p.R = int(problem.R), p.S = int(problem.S);
  p.out_H = t.out_H, p.out_W = t.out_W, p.pad_h = t.pad_h, p.pad_w = t.pad_w, p.pad_left = int(problem.pad_left);
  p.origin = t.origin, p.shift = t.shift, p.splits = plan.split_k;
  p.span = t.span, p.of_span = span_divisor(t.span), p.images = t.images, p.half = t.half, p.first = t.first,
  p.copies = t.copies;
  p.copies_y = t.copies_y, p.rows = t.rows;
  p.columns = t.span * (sums ? kStreamColumns : stream_columns(R)), p.pieces = uint32_t(t.pieces),
  p.stretches = uint32_t(t.stretches), p.walks = uint32_t(t.walks());
  int64_t const rings = int64_t(kStreamWarps) * ring(R, stride) * (slot_bytes(stride) + (sums ? kSlotBytesY : 0));
  int64_t const shared = max64(rings, sums ? kStreamWarps * R * 16 * stride * (kStreamColumns + 1) * 4 : 0);
  auto start = [&](auto* kernel, int64_t blocks) {
    kernel<<<unsigned(blocks), kStreamWarps * 32, size_t(shared), stream>>>(p);
    return cudaGetLastError();
  };
  if constexpr (sums)
    p.y = source_of(args.b, out, problem, t.out_H, t.out_W, sizeof(T)), p.once = walks_read_once(problem);
  if (R > 9 && !t.planes.used) return cudaErrorInvalidValue;
  if (t.planes.used) {
    p.channels = t.planes.channels, p.stages = t.planes.stages, p.stage_bytes = t.planes.stage_bytes;
    p.image_bytes = t.planes.in_bytes, p.image_bytes_y = t.planes.y_bytes;
    p.channel_bytes = t.planes.channel_bytes, p.channel_bytes_y = t.planes.channel_y_bytes;
    p.bands = uint32_t(t.planes.bands), p.band_rows = t.planes.band_rows;
    p.run_channels = t.planes.run_channels, p.unit_stretches = t.planes.unit_stretches;
    int64_t const units = problem.C / p.channels;
    p.by_images = R == 3 && stride == 1 && (t.planes.row_blocks == 2 || t.out_W > 24);
    p.units = uint32_t(units), p.groups = uint32_t(t.groups * p.bands), p.items = uint32_t(units * p.groups);
    auto start_planes = [&](auto* kernel, int64_t blocks, int warps = kPlanesWarps) {
      int const bytes = int(t.planes.shared_bytes);
      if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
        return error;
      kernel<<<unsigned(blocks), warps * 32, size_t(bytes), stream>>>(p);
      return cudaGetLastError();
    };
    int64_t const blocks = min64(p.items, int64_t(t.planes.together) * h200_sxm.sm_count);
    constexpr int with_copies = kPlanesWarps + 1;  // of whole planes
    bool const odd = t.planes.odd, words = t.out_W % 2 == 0;
    bool const banded = t.planes.band_rows > 0;
    if constexpr (spreads) {
      if (t.planes.unit_stretches > 0) {
        if constexpr (R < 7)  // else registers do not suffice
          if (odd)
            return start_planes(words ? spread_units<T, R, true, true> : spread_units<T, R, true, false>, blocks);
        return start_planes(spread_units<T, R, false, false>, blocks);
      }
      return start_planes(!words ? spread_planes<T, R, true, false>
                          : odd  ? spread_planes<T, R, true, true>
                                 : spread_planes<T, R, false, true>,
                          blocks, kPlanesWarps);
    } else if constexpr (!sums && R > 9) {
      return start_planes(odd     ? gather_taller<T, R, true, false>
                          : words ? gather_taller<T, R, false, true>
                                  : gather_taller<T, R, false, false>,
                          blocks);
    } else if constexpr (!sums) {
      if constexpr (stride == 2) {
        if (t.planes.unit_stretches > 0)
          return start_planes(odd     ? gather_units<T, R, 2, true, false>
                              : words ? gather_units<T, R, 2, false, true>
                                      : gather_units<T, R, 2, false, false>,
                              blocks);
      } else {
        if (t.planes.unit_stretches > 0) return start_planes(gather_units<T, R, 1, false, true>, blocks);
        if constexpr (R == 5 || R == 7)
          if (t.planes.row_blocks == 1) return start_planes(odd_row_planes<T, R, 1>, blocks, with_copies);
        if constexpr (R == 3)
          if (t.planes.row_blocks == 3) return start_planes(row_planes<T, R, 3>, blocks, with_copies);
        if constexpr (R < 7)
          if (t.planes.row_blocks == 2) return start_planes(row_planes<T, R, 2>, blocks, with_copies);
        if constexpr (R == 9) {  // windows have no column left for those that begin earlier
          if (banded && odd) return start_planes(gather_planes<T, R, 1, true, false, true>, blocks);
        } else {
          if (banded && odd) return start_planes(turned_planes<T, R, true>, blocks);
        }
        if (banded)
          return start_planes(
              words ? gather_planes<T, R, 1, false, true, true> : gather_planes<T, R, 1, false, false, true>, blocks);
      }
      // With a stride, images of even rows may have odd rows of outputs.
      if constexpr (R == 3 && stride == 1) {
        if (odd) return start_planes(turned_planes<T, R, false>, blocks);
      } else {
        if (odd) return start_planes(gather_planes<T, R, stride, true, false>, blocks);
      }
      return start_planes(words ? gather_planes<T, R, stride, false, true> : gather_planes<T, R, stride, false, false>,
                          blocks, kPlanesWarps + gather_beside(stride, false, false));
    } else {
      p.sums = t.sums;
      auto start_sums = [&]() {
        // With stride 1 filters up to 5x5 are there for odd rows alone (set_sums).
        constexpr bool odd_alone = stride == 1 && R < 7;
        if (banded)
          return start_planes(odd ? sum_planes<T, R, stride, true, true> : sum_planes<T, R, stride, false, true>,
                              units * p.splits);
        if (t.sums.blocks > 0)
          return start_planes(odd ? sum_planes<T, R, stride, true> : sum_planes<T, R, stride, odd_alone>,
                              units * p.splits);
        if constexpr (stride == 1 && R <= 9) {
          return start_planes(odd ? wgrad_planes<T, R, true> : wgrad_planes<T, R, false>, units * p.splits);
        } else {
          return cudaErrorInvalidValue;
        }
      };
      cudaError_t const error = start_sums();
      if (error != cudaSuccess || p.splits == 1) return error;
      return depthwise::launch_sum<T>(problem, plan, args, stream, true);
    }
  }
  if constexpr (!sums && R <= 9) {
    if (t.ring.used) {
      int64_t const walks = t.walks() * problem.C;
      if constexpr (spreads)
        return start_ring(t.ring.odd ? spread_ring<T, R, true> : spread_ring<T, R, false>, p, 2, walks, t.ring, stream);
      else
        return start_ring(t.ring.out_bytes > 0 ? t.ring.odd ? gather_ring<T, R, stride, true, true>
                                                            : gather_ring<T, R, stride, false, true>
                          : t.ring.odd         ? gather_ring<T, R, stride, true, false>
                                               : gather_ring<T, R, stride, false, false>,
                          p, 2, walks, t.ring, stream);
    }
  }
  bool const apart = stride == 2 && t.span <= 4 && t.images * (2 * t.span + 3) <= 32 * stride;
  p.pitch = apart ? 2 * t.span + 3 : (t.span + 1) * stride, p.swizzle = stride == 2 && !apart ? 16 : 0;
  if constexpr (spreads) {
    auto start_spread = [&](auto* kernel) {
      kernel<<<unsigned(ceil_div(t.walks() * problem.C, kStreamWarps)), kStreamWarps * 32,
               kStreamWarps * 8 * slot_bytes(1), stream>>>(p);
      return cudaGetLastError();
    };
    return start_spread(t.width == 4 ? spread<T, R, 4, 1> : spread<T, R, 2, 2>);
  } else if constexpr (!sums && R <= 9) {
    int64_t const blocks = ceil_div(t.walks() * problem.C, kStreamWarps);
    return start(t.width == 4 ? gather<T, R, stride, 4, stride> : gather<T, R, stride, 2, 2 * stride>, blocks);
  } else if constexpr (sums && stream_sums_walk(R, stride)) {
    bool const once = t.images * t.copies <= 32 * stride;
    auto* const kernel = t.width == 4 && once ? wgrad<T, R, stride, 4, stride, 1>
                         : t.width == 4       ? wgrad<T, R, stride, 4, 2 * stride, 1>
                         : t.width == 2       ? wgrad<T, R, stride, 2, 2 * stride, 2>
                                              : wgrad<T, R, stride, 1, 4 * stride, 4>;
    cudaError_t const error = start(kernel, problem.C * p.splits);
    if (error != cudaSuccess || p.splits == 1) return error;
    return depthwise::launch_sum<T>(problem, plan, args, stream, true);
  } else {
    return cudaErrorInvalidValue;
  }
}

}  // namespace conv2d_ext::stream

#define CONV2D_EXT_STREAM_INSTANCE(family, op, dtype, tm, tn, tk, variant)      \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                     \
    return stream::launch<Op::op, DType::dtype, tm, tk>(p, plan, args, stream); \
  }
