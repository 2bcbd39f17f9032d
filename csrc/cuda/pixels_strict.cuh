// fprop and dgrad of 1x1 filters in strict float32 on tensor cores, in place in NCHW or channels_last: out[n, pixel] =
// sum over c of filters[n, c] * in[c, pixel], of operands that are each the sum of two TF32 numbers, as in
// tma_strict.cuh: products, short sums and what is made again are those.
//
// A persistent block keeps TN filters in shared memory, which its threads have split. Each of its two warpgroups walks
// over units of 64 pixels by itself, so that one multiplies while the other stores; a thread of a warp for each feeds
// its ring of stages of 32 channels. In NCHW a stage is lines of 32 pixels, of which a thread loads two neighbours of
// two channels: these are two rows of an instruction, whose channels the filters' order matches.
//
// blockIdx.y: the group, of NCHW with filters that stay.
//
// Filters that have no room (NCHW alone: in channels_last tma_strict.cuh is as fast) come with the stages, split
// beforehand; both warpgroups then multiply by them, a unit of 128 pixels at a time.
#pragma once

#include "../core/pixels_strict.h"
#include "tma_strict.cuh"

namespace conv2d_ext::strict_pixels {

using strict::Parts, strict::split, tma::Divisor, tma::Tensor4, tma::encode_tiled;

constexpr int kGroups = 2, kWarps = 4, kThreads = (kGroups + 1) * kWarpgroup, kUnit = StrictPixels::unit;
constexpr int kStageBytes = StrictPixels::stage_bytes, kRunPixels = run_pixels(DType::f32);
constexpr int kSharedBytes = StrictPixels::room + 1024;  // the swizzle wants 1024-byte alignment
constexpr int kCopyRegs = 40, kMultiplyRegs = 232;
static_assert((kCopyRegs + kGroups * kMultiplyRegs) * kWarpgroup <= 65536);

struct Params {
  CUtensorMap in, filters;
  float const *data, *w, *bias;
  float* out;
  // Strides in elements: from an image to the next, a pixel, a channel; of w from a column, a channel that is summed,
  // a group.
  int64_t w_group, in_n, in_pixel, in_k, out_n, out_pixel, out_c, w_n, w_k, bias_stride;
  Divisor runs;                     // of an image
  int32_t all_runs, pixels, units;  // pixels: of an image, in channels_last of all
  int32_t N, depth, chunks, tiles_n, stages;
  bool vectors;  // of w are aligned
};

template <int TN>
struct Tables {
  alignas(16) float bias[TN];
  uint64_t full[kGroups][StrictPixels::most_stages], empty[kGroups][StrictPixels::most_stages];
};

// A warpgroup's units of 64 pixels: from the first in steps. together: two that follow each other are a block's.
struct Units {
  int next, step;
  __device__ Units(Params const& p, int group, bool together) {
    int const blocks = int(gridDim.x) / p.tiles_n, block = int(blockIdx.x) / p.tiles_n;
    next = together ? block * kGroups + group : group * blocks + block, step = kGroups * blocks;
  }
};

// With `keep` the filters stay; a stage is a warpgroup's. Else it has the pixels of both, then both parts of filters.
template <int TN, bool keep>
constexpr int stage_bytes = keep ? kStageBytes : kGroups * kStageBytes + 2 * TN * kLineBytes;

template <int TN, bool planes, bool keep>
__device__ void copy(Params const& p, int group, uint32_t ring, Tables<TN>& tables) {
  constexpr int runs = keep ? 2 : 2 * kGroups, bytes = stage_bytes<TN, keep>;
  int const n0 = int(blockIdx.x) % p.tiles_n * TN;
  Stage stage;
  for (Units at(p, group, !keep); at.next < p.units; at.next += at.step) {
    int image[runs] = {}, pixel[runs] = {};
    if (planes)
#pragma unroll
      for (int i = 0; i < runs; ++i) {
        pixel[i] = at.next * 2 + i;  // a run; beyond the last image there are zeros
        image[i] = int(p.runs.divide(pixel[i]));
        pixel[i] *= kRunPixels;
      }
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      uint64_t* const full = &tables.full[group][stage.index];
      uint32_t const to = ring + stage.index * bytes;
      ptx::mbarrier_wait(&tables.empty[group][stage.index], stage.parity ^ 1);  // passes on the first trip
      ptx::mbarrier_arrive_expect_tx(full, bytes);
      if constexpr (!keep)
#pragma unroll
        for (int part = 0; part < 2; ++part)
          ptx::cp_async_bulk_tensor_4d(to + kGroups * kStageBytes + part * TN * kLineBytes, &p.filters, full,
                                       (chunk * 2 + part) * kTf32Line, n0, 0, 0);
      if constexpr (planes) {
#pragma unroll
        for (int i = 0; i < runs; ++i)
          ptx::cp_async_bulk_tensor_4d(to + i * (kStageBytes / 2), &p.in, full, pixel[i], chunk * kTf32Line, image[i],
                                       int(blockIdx.y));
      } else {
        ptx::cp_async_bulk_tensor_4d(to, &p.in, full, chunk * kTf32Line, at.next * kUnit, 0, 0);
      }
      stage.advance(p.stages);
    }
  }
}

// Both parts of a block's filters, lines of 32 channels: of each chunk the high parts of all, then the low ones. In
// NCHW places 8 i + q and 8 i + q + 4 of a line are channels 8 i + 2 q and the next. In channels_last the lines' order
// gives a thread four columns side by side.
template <int TN, bool planes>
__device__ void keep_filters(Params const& p, uint32_t kept, int n0) {
  constexpr int at_once = 2;
  bool const along = p.w_k == 1;  // channels lie side by side; else columns
  // A task has four columns and eight channels; those of neighbouring threads are in different banks.
  for (int first = int(threadIdx.x); first < TN * p.chunks; first += at_once * kGroups * kWarpgroup) {
    float4 v[at_once][8];
    auto place = [&](int t, int& octet, int& column, int& apart) {
      int const task = first + t * (kGroups * kWarpgroup), rest = task % TN;
      octet = task / TN * 4 + (along ? rest % 4 : rest / 2 % 4);
      column = along ? rest / 4 : (rest / 8 * 2 + rest % 2) * 4, apart = along ? TN / 4 : 1;
      return octet < p.chunks * 4;
    };
#pragma unroll
    for (int t = 0; t < at_once; ++t) {
      int octet, column, apart;
      bool const exists = place(t, octet, column, apart);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        int const n = n0 + column + (along ? i / 2 * apart : 0), k = octet * 8 + (along ? i % 2 * 4 : i);
        bool const inside = exists && n < p.N && k < p.depth;
        float const* const from = p.w + blockIdx.y * p.w_group + n * p.w_n + k * p.w_k;
        if (p.vectors) {
          v[t][i] = inside ? *reinterpret_cast<float4 const*>(from) : make_float4(0, 0, 0, 0);
        } else {
          int const left = along ? p.depth - k : p.N - n;
          auto of = [&](int j) { return inside && j < left ? from[j * (along ? p.w_k : p.w_n)] : 0.0f; };
          v[t][i] = make_float4(of(0), of(1), of(2), of(3));
        }
      }
    }
#pragma unroll
    for (int t = 0; t < at_once; ++t) {
      int octet, column, apart;
      if (!place(t, octet, column, apart)) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int n = column + i * apart;
        if (!planes) n = n / 16 * 16 + n % 4 / 2 * 8 + n % 16 / 4 * 2 + n % 2;
        uint32_t const line = kept + (octet / 4 * 2 * TN + n) * kLineBytes;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t high[4], low[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            int const k = planes ? j * 2 + half : half * 4 + j;
            float4 const &a = v[t][i * 2 + k / 4], &b = v[t][k];
            float const of_a[4] = {a.x, a.y, a.z, a.w}, of_b[4] = {b.x, b.y, b.z, b.w};
            float h, l;
            split(along ? of_a[k % 4] : of_b[i], h, l);
            high[j] = __float_as_uint(h), low[j] = __float_as_uint(l);
          }
          uint32_t const to = line + ((octet % 4 * 2 + half) ^ (n % 8)) * 16;
          ptx::st_shared_v4(to, make_uint4(high[0], high[1], high[2], high[3]));
          ptx::st_shared_v4(to + TN * kLineBytes, make_uint4(low[0], low[1], low[2], low[3]));
        }
      }
    }
  }
}

// Of NCHW: `even` and `odd` are where a thread's first channels of a stage lie.
__device__ inline void load_planes(Parts& parts, uint32_t even, uint32_t odd) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint2 const a = ptx::ld_shared_v2(even + i * kCoreBytes), b = ptx::ld_shared_v2(odd + i * kCoreBytes);
    uint32_t const values[4] = {a.x, a.y, b.x, b.y};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float high, low;
      split(__uint_as_float(values[j]), high, low);
      parts.high[i][j] = __float_as_uint(high), parts.low[i][j] = __float_as_uint(low);
    }
  }
}

// Where a thread's rows and columns of a unit lie; exists: the pixel and its neighbour of NCHW.
template <bool planes>
struct Place {
  int64_t in[2], out[2];
  bool exists[2];

  __device__ Place(Params const& p, int unit, int warp, int g) {
    if constexpr (planes) {
      int const run = unit * 2 + warp / 2;
      int pixel = run;
      int64_t const image = p.runs.divide(pixel);
      pixel = pixel * kRunPixels + warp % 2 * 16 + g * 2;
      exists[0] = exists[1] = run < p.all_runs && pixel < p.pixels;
#pragma unroll
      for (int i = 0; i < 2; ++i) in[i] = image * p.in_n + pixel + i, out[i] = image * p.out_n + pixel + i;
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int64_t const pixel = int64_t(unit) * kUnit + warp * 16 + g + i * 8;
        exists[i] = pixel < p.pixels, in[i] = pixel * p.in_pixel, out[i] = pixel * p.out_pixel;
      }
    }
  }
};

// A thread's column of a unit: of two of its eights, j and the next, four lie side by side in channels_last.
template <bool planes>
__device__ inline int column_of(int j, int quad, int e) {
  return planes ? j * 8 + quad * 2 + e : j / 2 * 16 + quad * 4 + j % 2 * 2 + e;
}

// Looks through a thread's results, which have been stored, for those that are not finite.
template <int TN, bool planes>
__device__ __noinline__ void mend(Params const& p, int unit, int n0, int warp, int lane) {
  Place<planes> const at(p, unit, warp, lane / 4);
#pragma unroll 1
  for (int i = 0; i < TN / 2; ++i) {
    int const row = i / 2 % 2, n = n0 + column_of<planes>(i / 4, lane % 4, i % 2);
    if (!(row == 0 ? at.exists[0] : at.exists[1]) || n >= p.N) continue;
    int64_t const group = blockIdx.y, column = group * p.N + n;
    float* const out = p.out + (row == 0 ? at.out[0] : at.out[1]) + column * p.out_c;
    if (isfinite(*out)) continue;
    float sum = 0;
    float const *a = p.data + (row == 0 ? at.in[0] : at.in[1]) + group * p.depth * p.in_k,
                *b = p.w + group * p.w_group + n * p.w_n;
#pragma unroll 1
    for (int k = 0; k < p.depth && sum == sum; ++k) sum = fmaf(a[k * p.in_k], b[k * p.w_k], sum);  // a NaN stays one
    *out = sum + (p.bias == nullptr ? 0.0f : p.bias[column * p.bias_stride]);
  }
}

template <int TN, bool planes, bool keep>
__device__ void multiply(Params const& p, uint32_t kept, uint32_t ring, Tables<TN>& tables) {
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32, g = lane / 4;
  int const warp = int(threadIdx.x) / 32 % kWarps, quad = lane % 4, n0 = int(blockIdx.x) % p.tiles_n * TN;
  uint64_t const layout = tma::layout_of(kLineBytes);
  constexpr int bytes = stage_bytes<TN, keep>;
  uint32_t const full = ptx::shared_address(tables.full[keep ? group : 0]),
                 empty = ptx::shared_address(tables.empty[keep ? group : 0]);
  // Where a thread's pixels lie in a stage.
  uint32_t even, odd = 0;
  if constexpr (planes) {
    uint32_t const run = ring + warp / 2 * (kStageBytes / 2) + g % 2 * 8;
    even = run + quad * 2 * kLineBytes + ((warp % 2 * 4 + g / 2) ^ (quad * 2)) * 16;
    odd = run + (quad * 2 + 1) * kLineBytes + ((warp % 2 * 4 + g / 2) ^ (quad * 2 + 1)) * 16;
  } else {
    even = ring + (warp * 16 + lane % 16) * kLineBytes + ((lane / 16) ^ (lane % 8)) * 16;
  }
  Stage stage;
  float total[TN / 2], acc[TN / 2];
  Parts parts[2] = {};
  int filters = 0;  // the stage of those that come
  auto release = [&](int index) {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(empty + index * 8);
  };
  auto take = [&](Parts& next) {
    uint32_t const bar = full + stage.index * 8, offset = stage.index * bytes;
    ptx::mbarrier_wait(bar, stage.parity);
    if constexpr (planes)
      load_planes(next, even + offset, odd + offset);
    else
      strict::load(next, even + offset);
    // Again, at an address that needs the parts, by a mask that is zero: or ptxas has them made behind the next wait
    // for products.
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) bits |= next.low[i][j];
    ptx::mbarrier_wait(bar | (bits & uint32_t(p.chunks >> 31)), stage.parity);
    if (keep) release(stage.index);  // its pixels are in registers
    filters = stage.index;
    stage.advance(p.stages);
  };
  for (Units at(p, group, !keep); at.next - (keep ? 0 : group) < p.units; at.next += at.step) {
#pragma unroll
    for (int i = 0; i < TN / 2; ++i) total[i] = acc[i] = 0;
    auto move = [&] {
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(acc);
#pragma unroll
      for (int i = 0; i < TN / 2; ++i) total[i] += acc[i];
    };
    // A step: its products, and beside them the pixels of the next one.
    int before = -1;  // stage of the products that are under way
    auto one = [&](Parts& now, Parts& next, int chunk) {
      uint32_t const high = keep ? kept + chunk * (2 * TN * kLineBytes)
                                 : ring + filters * bytes + (kGroups - group) * kStageBytes,
                     low = high + TN * kLineBytes;
      move();
      if (!keep && before >= 0) release(before);
      before = filters;
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
      if (chunk + 1 < p.chunks) take(next);
    };
    take(parts[0]);
    for (int chunk = 0; chunk < p.chunks; chunk += 2) {
      one(parts[0], parts[1], chunk);
      if (chunk + 1 == p.chunks) break;
      one(parts[1], parts[0], chunk + 1);
    }
    move();
    if (!keep) release(before);
    float nothing[4] = {};  // NaN, if a sum is not finite
#pragma unroll
    for (int i = 0; i < TN / 2; ++i)
      if (n0 + column_of<planes>(i / 4, quad, i % 2) < p.N) nothing[i % 4] += total[i] * 0.0f;
    Place<planes> const place(p, at.next, warp, g);
#pragma unroll
    for (int j = 0; j < TN / 8; j += planes ? 1 : 2) {
      int const column = column_of<planes>(j, quad, 0), n = n0 + column;
      float const* const sum = total + j * 4;  // of the first row two columns, of the second
      if constexpr (planes) {
        float2 const bias = *reinterpret_cast<float2 const*>(tables.bias + column);
        float* const to = p.out + place.out[0] + (int64_t(blockIdx.y) * p.N + n) * p.out_c;
        if (place.exists[0] && n < p.N) *reinterpret_cast<float2*>(to) = make_float2(sum[0] + bias.x, sum[2] + bias.x);
        if (place.exists[0] && n + 1 < p.N)
          *reinterpret_cast<float2*>(to + p.out_c) = make_float2(sum[1] + bias.y, sum[3] + bias.y);
      } else {
        float4 const bias = *reinterpret_cast<float4 const*>(tables.bias + column);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (place.exists[i] && n < p.N)
            *reinterpret_cast<float4*>(p.out + place.out[i] + n) = make_float4(
                sum[i * 2] + bias.x, sum[i * 2 + 1] + bias.y, sum[4 + i * 2] + bias.z, sum[4 + i * 2 + 1] + bias.w);
      }
    }
    if ((nothing[0] + nothing[1]) + (nothing[2] + nothing[3]) != 0.0f) mend<TN, planes>(p, at.next, n0, warp, lane);
    __syncwarp();
  }
}

template <int TN, bool planes, bool keep>
__global__ void __launch_bounds__(kThreads, 1) main_kernel(__grid_constant__ Params const p) {
  extern __shared__ uint8_t dynamic[];
  __shared__ Tables<TN> tables;
  uint32_t const kept = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  uint32_t const rings = kept + (keep ? p.chunks * (2 * TN * kLineBytes) : 0);
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), n0 = int(blockIdx.x) % p.tiles_n * TN;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kGroups * StrictPixels::most_stages; ++i) {
      ptx::mbarrier_init(&tables.full[0][0] + i, 1);
      ptx::mbarrier_init(&tables.empty[0][0] + i, keep ? kWarps : kGroups * kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  if (int const n = n0 + int(threadIdx.x); threadIdx.x < TN)
    tables.bias[threadIdx.x] =
        p.bias != nullptr && n < p.N ? p.bias[(int64_t(blockIdx.y) * p.N + n) * p.bias_stride] : 0.f;
  __syncthreads();
  int const ring_bytes = p.stages * kStageBytes;
  if (group == kGroups) {
    ptx::setmaxnreg_dec<kCopyRegs>();
    int const warp = warp_uniform(int(threadIdx.x) / 32 % kWarps);
    if (warp < (keep ? kGroups : 1) && ptx::elect()) {
      if (!keep) ptx::griddepcontrol_wait();  // for filters that the kernel before has split
      copy<TN, planes, keep>(p, warp, rings + warp * ring_bytes, tables);
    }
  } else {
    ptx::setmaxnreg_inc<kMultiplyRegs>();
    if constexpr (keep) {
      keep_filters<TN, planes>(p, kept, n0);
      ptx::fence_proxy_async();
      ptx::bar_sync(1, kGroups * kWarpgroup);
    }
    multiply<TN, planes, keep>(p, kept, rings + group * (keep ? ring_bytes : kStageBytes), tables);
  }
}

// ---- host side

template <Op op, int TM, int TN>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  constexpr bool forward = op == Op::fprop, keep = TM == kUnit;
  Device gpu = h200_sxm;
  cudaError_t error = count_sms(gpu.sm_count);
  if (error != cudaSuccess) return error;
  Problem const g = group_of(problem);
  StrictPixels const s(row_of(plan), g, group_blocks(problem, gpu.sm_count));
  Strides const &in = forward ? problem.x : problem.y, &out = forward ? problem.y : problem.x, &w = problem.w;
  int64_t const pixels = problem.H * problem.W, all = pixels * problem.N;
  auto step = [&](Strides const& t) { return problem.W > 1 ? t.w : problem.H > 1 ? t.h : t.n; };
  Params p{};
  Tensor4 const lines{args.a, DType::f32, {s.depth, all, 1, 1}, {1, step(in), 0, 0}};
  Tensor4 const planes{
      args.a, DType::f32, {pixels, s.depth, problem.N, problem.groups}, {1, in.c, in.n, s.depth * in.c}};
  error = s.lines ? encode_tiled(p.in, lines, kTf32Line, kUnit, 1, 1)
                  : encode_tiled(p.in, planes, kRunPixels, kTf32Line, 1, 1);
  if (error != cudaSuccess) return error;
  p.data = static_cast<float const*>(args.a), p.w = static_cast<float const*>(args.b);
  p.bias = static_cast<float const*>(args.bias), p.bias_stride = args.bias_stride;
  p.out = static_cast<float*>(args.out);
  p.in_n = in.n, p.in_pixel = s.lines ? step(in) : 1, p.in_k = s.lines ? 1 : in.c;
  p.out_n = out.n, p.out_pixel = s.lines ? step(out) : 1, p.out_c = s.lines ? 1 : out.c;
  p.w_n = forward ? w.n : 1, p.w_k = forward ? 1 : w.n, p.w_group = g.K * w.n, p.vectors = strict_filter_vectors(g);
  p.runs = Divisor(ceil_div(pixels, kRunPixels)), p.all_runs = int32_t(runs_of(problem));
  p.pixels = int32_t(s.lines ? all : pixels), p.units = int32_t(s.units);
  p.N = int32_t(s.columns), p.depth = int32_t(s.depth), p.chunks = int32_t(s.chunks);
  p.tiles_n = int32_t(s.tiles_n), p.stages = int32_t(s.stages);
  auto* kernel = main_kernel<TN, true, keep>;
  if constexpr (keep)
    if (s.lines) kernel = main_kernel<TN, false, keep>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  dim3 const blocks(unsigned(s.blocks * s.tiles_n), unsigned(problem.groups));
  if constexpr (keep) {
    kernel<<<blocks, kThreads, kSharedBytes, stream>>>(p);
    return cudaGetLastError();
  } else {
    strict::SplitParams q = strict::split_params<op>(problem, args);
    if ((error = strict::launch_split<op, true>(q, gpu.sm_count, stream)) != cudaSuccess) return error;
    Tensor4 const filters{
        q.out, DType::f32, {s.chunks * 2 * kTf32Line, s.columns, 1, 1}, {1, s.chunks * 2 * kTf32Line}};
    if ((error = encode_tiled(p.filters, filters, kTf32Line, TN, 1, 1)) != cudaSuccess) return error;
    return launch_dependent(kernel, blocks, kThreads, kSharedBytes, stream, p);
  }
}

}  // namespace conv2d_ext::strict_pixels

#define CONV2D_EXT_PIXELS_STRICT_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                       \
    return strict_pixels::launch<Op::op, tm, tn>(p, plan, args, stream);          \
  }
