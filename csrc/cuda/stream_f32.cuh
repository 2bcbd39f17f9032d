// Depthwise convolution of small filters in NCHW, float32, stride 1, on the FMA units. fprop: a warp walks down images
// with the ring of stream_ring.cuh. A unit is 2 columns of outputs, or one where rows are odd, and a lane has units for
// 4: it takes the columns that they meet from the ring and adds them to the sums of the R rows of outputs. dgrad is
// fprop with the filter turned round. wgrad: a lane loads 4 columns of every row of x and y once, gets the columns
// beside them from its neighbours, and keeps the last R rows of y, and a sum for each tap. Loads are a ring's length
// ahead.
#pragma once

#include "stream_planes_f32.cuh"
#include "stream_quads_f32.cuh"
#include "stream_ring.cuh"

namespace conv2d_ext::stream {

// One of a team's units: its image among the team's, and its place among the image's.
struct LaneUnit {
  int image, place;
  bool exists;

  __device__ LaneUnit(Params const& p, int i) : image(i / p.span), place(i % p.span), exists(image < p.images) {
    if (!exists) image = place = 0;
  }
};

// A lane's units, every 32nd from `first` on: the columns that a unit of `width` meets, from the ring; zeros beyond the
// borders.
template <int S, int width, int shift>
struct Windows {
  static constexpr int units = 4 / width, columns = (S + width - 1 + shift + width - 1) / width * width;
  static_assert(units * columns / width + units <= 32);
  uint32_t address[units];
  uint32_t inside = 0;  // a bit for each of the loads; and at the other end one for each unit with outputs

  __device__ Windows(Params const& p, Ring<float> const& ring, Walk const& at, int first, int images, int h, int base,
                     int W) {
#pragma unroll
    for (int j = 0; j < units; ++j) {
      LaneUnit const u(p, first + 32 * j);
      int const column = base + u.place * width;
      if (u.exists && u.image < images && at.q0 + u.place * width < p.out_W) inside |= 1u << (31 - j);
      address[j] = unit_address(ring, at, u, h, base, column, columns);
#pragma unroll
      for (int i = 0; i < columns; i += width)
        if (u.exists && u.image < images && unsigned(column + i) < unsigned(W))
          inside |= 1u << (j * columns + i) / width;
    }
  }
  __device__ bool keeps(int j) const { return inside >> (31 - j) & 1; }
  __device__ void load(int j, uint32_t offset, float (&v)[columns]) const {
#pragma unroll
    for (int i = 0; i < columns; i += width) {
      bool const have = inside >> (j * columns + i) / width & 1;
      if constexpr (width == 2) {
        uint2 const pair = ptx::ld_shared_v2(address[j] + offset + 4 * i);
        v[i] = have ? __uint_as_float(pair.x) : 0.f, v[i + 1] = have ? __uint_as_float(pair.y) : 0.f;
      } else {
        float const one = ptx::ld_shared_f32(address[j] + offset + 4 * i);
        v[i] = have ? one : 0.f;
      }
    }
  }
};

// Filters of R x S, or (`part`) of p.R x p.S, which are no more. `stored`: rows of outputs follow each other in memory,
// and go there by way of the ring of outputs.
template <int R, int S, int width, int shift, bool part, bool stored>
__global__ void __launch_bounds__(kStreamWarps * 32, ring_f32_blocks(R, S) - (width == 1 ? 1 : 0))
    gather_f32(__grid_constant__ Params const p) {
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr int units = 4 / width;
  Team const team(p.warps);
  int const first = team.warp * 32 * units + int(threadIdx.x) % 32;
  uint32_t const task = blockIdx.x * ring_teams(p.warps) + team.index;
  if (task >= p.walks * uint32_t(p.C)) return;
  Walk const at(p, int(task % uint32_t(p.C)), task / uint32_t(p.C));
  make_barriers(team, shared + team.index * p.team_bytes, p.stages);
  uint32_t const data = ptx::shared_address(shared) + team.index * p.team_bytes + kStreamRingBegin;
  Ring<float> ring(p.ring, p.in, p.stages, team.index * p.team_bytes, data);
  int const images = int(depthwise::smaller(p.N - at.n0, p.images));
  int const h0 = at.p0 - p.pad_h, steps = at.rows + R - 1, base = at.q0 - p.pad_w - shift;
  ring.start(team, at, images, h0, steps, base);

  float filter[R][S];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int s = 0; s < S; ++s) {
      filter[r][s] = 0;
      if (!part || (r < p.R && s < p.S))
        filter[r][s] = __ldg(static_cast<float const*>(p.w) + at.c * p.w_k + r * p.w_r + s * p.w_s);
    }
  float const bias = p.bias != nullptr ? static_cast<float const*>(p.bias)[at.c * p.bias_stride] : 0.f;
  Stores<float> const stores(p, team, at, images, data + p.stages * p.ring.stage_bytes);
  using Place = std::conditional_t<stored, uint32_t, uint64_t>;
  Place to[units];  // the next row's address in memory, or the first row's in the ring
#pragma unroll
  for (int j = 0; j < units; ++j) {
    LaneUnit const u(p, first + 32 * j);
    if constexpr (stored)
      to[j] = stores.place(at, u.image);
    else
      to[j] = reinterpret_cast<uint64_t>(stores.address(at, u.image));
    to[j] += (at.q0 + u.place * width) * sizeof(float);
  }
  Windows<S, width, shift> const windows(p, ring, at, first, images, h0, base, p.in.W);

  float acc[R][4];  // of the rows of outputs that a row of inputs meets, each in its place till it is complete
  uint32_t row = 0;
#pragma unroll 1
  for (int begin = 0; begin < steps; begin += R) {
    if (stored) stores.prepare();
    team.sync();
    ring.refill();
    if (stored && begin >= R) stores.store((begin - R + 1) * p.row_bytes, false);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      int const step = begin + i;
      if (step >= steps) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][e] = bias;
      if (ring.has(step)) {
        ring.open();
#pragma unroll
        for (int j = 0; j < units; ++j) {
          float window[Windows<S, width, shift>::columns];
          windows.load(j, ring.offset, window);
#pragma unroll
          for (int r = 0; r < R; ++r) {
            if (part && r >= p.R) break;
#pragma unroll
            for (int s = 0; s < S; ++s) {
              if (part && s >= p.S) break;
#pragma unroll
              for (int e = 0; e < width; ++e) {
                float& sum = acc[(i - r + R) % R][j * width + e];
                sum = fmaf(window[shift + s + e], filter[r][s], sum);
              }
            }
          }
        }
        ring.close();
      }
      if (step < R - 1) continue;
      float const(&sum)[4] = acc[(i + 1) % R];
#pragma unroll
      for (int j = 0; j < units; ++j) {
        if constexpr (stored) {
          if constexpr (width == 2) {
            if (windows.keeps(j)) ptx::st_shared_f32x2(to[j] + row, sum[2 * j], sum[2 * j + 1]);
          } else {
            if (windows.keeps(j)) ptx::st_shared(to[j] + row, __float_as_uint(sum[j]));
          }
        } else {
          if constexpr (width == 2) {
            if (windows.keeps(j)) *reinterpret_cast<float2*>(to[j]) = make_float2(sum[2 * j], sum[2 * j + 1]);
          } else {
            if (windows.keeps(j)) *reinterpret_cast<float*>(to[j]) = sum[j];
          }
          to[j] += p.out_h * sizeof(float);
        }
      }
      if constexpr (stored) row = next_row(p, row);
    }
  }
  if constexpr (!stored) return;
  stores.prepare();
  team.sync();
  stores.store(at.rows * p.row_bytes, true);
  ptx::cp_async_bulk_wait_group_read<0>();
}

// ---- wgrad

struct ParamsF32 {
  Source in, y;
  float* partial;
  float* out;
  int64_t w_k, w_r, w_s;
  int64_t N;
  int C, R, S, out_H, out_W, pad_h, pad_w, origin, first, rows, in_width, out_width, splits;
  uint32_t walks;  // of a channel
  uint32_t stretches, pieces, planes, slots, quads;
  bool once;  // walks_read_once
};

// Row after row of 4 columns.
struct Quad {
  float const* from;
  uint32_t mask;  // which columns are within the image

  // `hints`: 16 bytes under a policy of L2.
  template <bool hints>
  __device__ void load(Source const& s, int width, bool inside, uint64_t policy, float (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = 0;
    if (inside) {
      if (width == 4) {
        float4 const* const four = reinterpret_cast<float4 const*>(from);
        if (mask & 1) *reinterpret_cast<float4*>(to) = hints ? ptx::ld_global_nc(four, policy) : __ldg(four);
      } else if (width == 2) {
#pragma unroll
        for (int i = 0; i < 4; i += 2)
          if (mask >> i & 1) *reinterpret_cast<float2*>(to + i) = __ldg(reinterpret_cast<float2 const*>(from + i));
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (mask >> i & 1) to[i] = __ldg(from + i);
      }
    }
    from += s.h;
  }
};

// The 12 columns of a lane and its neighbours, of which `used` from `first` on are needed.
template <int first, int used>
__device__ inline void window_of(float const (&own)[4], int lane, float (&window)[12]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    window[4 + i] = own[i];
    if (i >= first) window[i] = __shfl_up_sync(0xffffffffu, own[i], 1);
    if (8 + i < first + used) {
      float const right = __shfl_down_sync(0xffffffffu, own[i], 1);
      window[8 + i] = lane == 31 ? 0.f : right;
    }
  }
}

__device__ inline uint32_t columns_within(int column, int W) {
  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (unsigned(column + i) < unsigned(W)) mask |= 1u << i;
  return mask;
}

// Where a lane of wgrad works: a piece of a stretch of an image.
struct Share {
  int64_t n;
  int p0, rows, quad;
  bool exists, sums;  // sums: has columns of y, not the halo alone

  __device__ Share(ParamsF32 const& p, uint32_t index) {
    int const lane = int(threadIdx.x) % 32;
    uint32_t const piece = index % p.pieces;
    index /= p.pieces;
    uint32_t const stretch = index % p.stretches, which = uint32_t(lane) / p.slots;
    n = int64_t(index / p.stretches) * p.planes + which;
    int const slot = lane - int(which * p.slots) - 1;
    exists = which < p.planes && n < p.N, sums = exists && slot >= 0 && slot < int(p.quads);
    quad = int(piece * p.quads) + slot;
    p0 = int(stretch) * p.rows, rows = p.out_H - p0 < p.rows ? p.out_H - p0 : p.rows;
  }
};

// A tap's sum over some walks, by a warp: for those that a zero made NaN.
__device__ __noinline__ inline float exact_sum(ParamsF32 const& p, int c, uint32_t begin, uint32_t end, int r, int s) {
  float const* const in = static_cast<float const*>(p.in.data) + c * p.in.c;
  float const* const y = static_cast<float const*>(p.y.data) + c * p.y.c;
  float sum = 0;
  for (uint32_t index = begin; index < end && sum == sum; ++index) {  // a NaN stays one
    Share const at(p, index);
    for (int i = 0; at.sums && i < 4 * at.rows; ++i) {
      int const row = at.p0 + i / 4, x = 4 * at.quad - p.origin + i % 4, h = row - p.pad_h + r, w = x - p.pad_w + s;
      if (unsigned(x) < unsigned(p.out_W) && unsigned(h) < unsigned(p.in.H) && unsigned(w) < unsigned(p.in.W))
        sum = fmaf(in[at.n * p.in.n + h * p.in.h + w], y[at.n * p.y.n + row * p.y.h + x], sum);
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

template <int R, int shift>
__global__ void __launch_bounds__(kStreamWarps * 32, R == 3   ? 4
                                                     : R == 5 ? 3
                                                              : 2) wgrad_f32(__grid_constant__ ParamsF32 const p) {
  constexpr int U = R, taps = R * R;
  constexpr bool hints = stream_hints(R);
  __shared__ float sums[kStreamWarps][taps];
  ptx::griddepcontrol_launch_dependents();
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int const c = int(blockIdx.x % uint32_t(p.C)), split = int(blockIdx.x / uint32_t(p.C));
  uint32_t const begin = uint32_t(uint64_t(p.walks) * split / p.splits);
  uint32_t const end = uint32_t(uint64_t(p.walks) * (split + 1) / p.splits);
  uint64_t const policy = hints ? walks_policy(p.once) : 0;
  float acc[R][R] = {};
  for (uint32_t index = begin + warp; index < end; index += kStreamWarps) {
    Share const at(p, index);
    int64_t const n = at.exists ? at.n : 0;
    int const h0 = at.p0 - p.pad_h, steps = at.rows + R - 1, column = p.first + 4 * at.quad;
    int const x = 4 * at.quad - p.origin;
    Quad in{static_cast<float const*>(p.in.data) + n * p.in.n + c * p.in.c + h0 * p.in.h + column,
            at.exists ? columns_within(column, p.in.W) : 0};
    Quad y{static_cast<float const*>(p.y.data) + n * p.y.n + c * p.y.c + at.p0 * p.y.h + x,
           at.sums ? columns_within(x, p.out_W) : 0};
    float own[U][4], own_y[U][4], last[R][4] = {};
    auto load = [&](int i, int step) {
      bool const inside = step < steps && unsigned(h0 + step) < unsigned(p.in.H);
      in.load<hints>(p.in, p.in_width, inside, policy, own[i]);
      y.load<hints>(p.y, p.out_width, step < at.rows, policy, own_y[i]);
    };
#pragma unroll
    for (int i = 0; i < U; ++i) load(i, i);
#pragma unroll 1
    for (int first = 0; first < steps; first += U) {
#pragma unroll
      for (int i = 0; i < U; ++i) {
#pragma unroll
        for (int r = R - 1; r > 0; --r)
#pragma unroll
          for (int j = 0; j < 4; ++j) last[r][j] = last[r - 1][j];
#pragma unroll
        for (int j = 0; j < 4; ++j) last[0][j] = own_y[i][j];
        float window[12];
        window_of<shift, R + 3>(own[i], lane, window);
        load(i, first + i + U);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int s = 0; s < R; ++s) acc[r][s] = fmaf(window[shift + s + j], last[r][j], acc[r][s]);
      }
    }
  }
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) {
    float v = acc[tap / R][tap % R];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
    if (lane == 0) sums[warp][tap] = v;
  }
  __syncthreads();
  auto store = [&](int r, int s, float sum) {
    depthwise::store_sum<float>(p.out, p.partial, p.splits, c * p.w_k + r * p.w_r + s * p.w_s,
                                (int64_t(split) * p.C + c) * p.R * p.S + r * p.S + s, sum);
  };
  bool nan = false;
  for (int i = threadIdx.x; i < taps; i += blockDim.x) {
    if (i / R >= p.R || i % R >= p.S) continue;
    float sum = sums[0][i];
    for (int other = 1; other < kStreamWarps; ++other) sum += sums[other][i];
    nan = nan || sum != sum;
    store(i / R, i % R, sum);
  }
  if (__syncthreads_or(nan) == 0) return;
  for (int i = warp; i < p.R * p.S; i += kStreamWarps) {
    float const sum = exact_sum(p, c, begin, end, i / p.S, i % p.S);
    if (lane == 0) store(i / p.S, i % p.S, sum);
  }
}

// ---- host side

template <Op op, int R>
cudaError_t launch_f32(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  bool const strided = problem.stride_h == 2;
  if (QuadsTile const t = quads_tile(R, op, problem, h200_sxm); t.used) {
    if constexpr (quads_least(op, R, 2) > 0)
      if (strided) return launch_quads<op, R, 2>(problem, t, plan, args, stream);
    if constexpr (quads_least(op, R, 1) > 0)
      if (!strided) return launch_quads<op, R, 1>(problem, t, plan, args, stream);
    return cudaErrorInvalidValue;
  }
  if (strided) return launch_planes_f32<op, R, 2>(problem, plan, args, stream);
  if (planes_f32_tile(R, op, problem, h200_sxm).planes.used)
    return launch_planes_f32<op, R, 1>(problem, plan, args, stream);
  if constexpr (op == Op::wgrad) {
    StreamF32Tile const t = stream_f32_tile(R, problem, h200_sxm);
    Strides const &x = problem.x, &y = problem.y, &w = problem.w;
    ParamsF32 p{};
    p.in = source_of(args.a, x, problem, t.in_H, t.in_W, 4), p.y = source_of(args.b, y, problem, t.out_H, t.out_W, 4);
    p.out = static_cast<float*>(args.out), p.partial = static_cast<float*>(args.workspace);
    p.w_k = w.n, p.w_r = w.h, p.w_s = w.w;
    p.C = int(problem.C), p.R = int(problem.R), p.S = int(problem.S), p.N = problem.N, p.splits = plan.split_k;
    p.once = walks_read_once(problem);
    p.out_H = t.out_H, p.out_W = t.out_W, p.pad_h = t.pad_h, p.pad_w = t.pad_w, p.origin = t.origin;
    p.first = 4 - t.origin - t.pad_w - t.shift, p.rows = t.rows, p.in_width = t.width;
    p.out_width = t.origin == 0 && stream_aligned(y, problem.y_align, 16, 4) ? 4
                  : stream_aligned(y, problem.y_align, 8, 4)                 ? 2
                                                                             : 1;
    if (t.out_W % p.out_width != 0) p.out_width = 1;
    p.stretches = uint32_t(t.stretches), p.pieces = uint32_t(t.pieces), p.walks = uint32_t(t.walks());
    p.planes = uint32_t(t.planes), p.slots = uint32_t(t.slots), p.quads = uint32_t(t.quads);
    auto start = [&](auto* kernel) {
      kernel<<<unsigned(problem.C * p.splits), kStreamWarps * 32, 0, stream>>>(p);
      return cudaGetLastError();
    };
    cudaError_t error = cudaErrorInvalidValue;
    if (t.shift == 0) error = start(wgrad_f32<R, 0>);
    if (t.shift == 1) error = start(wgrad_f32<R, 1>);
    if (t.shift == 2) error = start(wgrad_f32<R, 2>);
    if constexpr (R + 3 <= 9)
      if (t.shift == 3) error = start(wgrad_f32<R, 3>);
    if (error != cudaSuccess || p.splits == 1) return error;
    return depthwise::launch_sum<float>(problem, plan, args, stream, true);
  } else {
    constexpr bool backward = op == Op::dgrad;
    StreamLanesTile const t = stream_lanes_tile(R, op, problem, h200_sxm);
    Strides const& in = backward ? problem.y : problem.x;
    Strides const& out = backward ? problem.x : problem.y;
    Strides const& w = problem.w;
    Params p{};
    p.in = source_of(args.a, in, problem, t.in_H, t.in_W, 4);
    p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride, p.out = args.out;
    p.out_n = out.n, p.out_c = out.c, p.out_h = out.h;
    p.w_k = w.n, p.w_r = w.h, p.w_s = w.w;
    if (backward) {
      p.w = static_cast<float const*>(args.b) + (problem.R - 1) * w.h + (problem.S - 1) * w.w;
      p.w_r = -w.h, p.w_s = -w.w;
    }
    p.N = problem.N, p.C = int(problem.C), p.R = int(problem.R), p.S = int(problem.S);
    p.out_H = t.out_H, p.out_W = t.out_W, p.pad_h = t.pad_h, p.pad_w = t.pad_w;
    p.span = t.span, p.columns = t.span * t.width, p.images = t.images, p.rows = t.rows;
    p.pieces = uint32_t(t.pieces), p.stretches = uint32_t(t.stretches), p.walks = uint32_t(t.walks());
    int64_t const walks = t.walks() * problem.C;
    auto with = [&]<int rows, int columns, bool part, bool stored>() {
      auto* const kernel = t.width == 1   ? gather_f32<rows, columns, 1, 0, part, stored>
                           : t.shift == 0 ? gather_f32<rows, columns, 2, 0, part, stored>
                                          : gather_f32<rows, columns, 2, 1, part, stored>;
      return start_ring(kernel, p, 4, walks, t.ring, stream);
    };
    auto of = [&]<int rows, int columns, bool part>() {
      if constexpr (R == 3)
        if (t.ring.out_bytes > 0) return with.template operator()<rows, columns, part, true>();
      return with.template operator()<rows, columns, part, false>();
    };
    if (problem.R == R && problem.S == R) return of.template operator()<R, R, false>();
    if constexpr (R == 7) {
      if (problem.R == 3 && problem.S == R) return of.template operator()<3, R, false>();
      if (problem.R == R && problem.S == 3) return of.template operator()<R, 3, false>();
      if (problem.R <= 3) return of.template operator()<3, R, true>();
      if (problem.S <= 3) return of.template operator()<R, 3, true>();
    }
    if constexpr (R < 7) return of.template operator()<R, R, true>();
    return cudaErrorInvalidValue;
  }
}

}  // namespace conv2d_ext::stream

#define CONV2D_EXT_STREAM_F32_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                    \
    return stream::launch_f32<Op::op, tm>(p, plan, args, stream);              \
  }
