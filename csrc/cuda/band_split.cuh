// fprop and dgrad of depthwise convolution with large filters in float32 on tensor cores: bands of taps as in band.cuh,
// of operands that are each the sum of two TF32 numbers, of whose products three are left (as in tma_strict.cuh).
//
// A warpgroup has a channel, and wgmma's M = 64 rows are 8 rows of taps by 8 neighbouring columns of outputs:
//   D[(r, q), n] = sum over k of T[(r, q), k] * B[k, n],    T = filter[r][k - q + ...], 0 outside it.
// B: 8 columns of the inputs by N "slots", rows of inputs by images. The planes lie in shared memory as [unit of 4
// columns][slot][4], high parts, then low parts: 8 slots are a core matrix wherever they begin, so the next 8 rows of
// taps have the same planes from 8 rows further on. T comes from shared memory to registers and is split there. What a
// step (8 rows of taps) adds up is moved to float32 registers, since tensor cores cut off what they add. At the end of
// a block of 8 columns the 8 rows of taps, which belong to 8 rows of outputs, are added up through shared memory.
//
// dgrad is fprop with the filter turned round. nhwc: a block has 4 channels, a warpgroup each.
//
// An infinity makes NaN of sums that it has no part in: what is not finite is made again, product by product.
#pragma once

#include "../core/band_split.h"
#include "depthwise_tile.cuh"
#include "ptx.cuh"

namespace conv2d_ext::band_split {

using depthwise::Divisor;

constexpr int kWarpgroup = 128;

struct Params {
  float const* in;
  float const* w;
  float const* bias;
  float* out;
  int64_t in_n, in_c, in_h, in_w, out_n, out_c, out_h, out_w;
  int64_t w_k, w_r, w_s, bias_stride;
  int64_t N;
  int C, in_H, in_W, out_H, out_W, R, S, pad_h, pad_w;
  int images, rows, columns, steps, units, slots, filter_pitch;
  int tiles_h, tiles_w, channel_units;
  uint32_t plane_bytes, filter_bytes, sums_bytes;  // a channel's
  bool in_vectors, out_vectors;
  Divisor by_images, by_units, by_pitch;
};

// A block's outputs, and its first channel and image.
struct Where {
  int p0, q0, c0, channels;
  int64_t n0;
};

struct Split {
  uint32_t high, low;
};
__device__ inline Split split(float v) {
  uint32_t const high = ptx::cvt_rn_tf32(v);
  return {high, ptx::cvt_rn_tf32(v - __uint_as_float(high))};
}

__device__ inline float4 loaded(float const* from, int64_t stride, bool vector, int count) {
  if (vector) return *reinterpret_cast<float4 const*>(from);
  float4 v = make_float4(0, 0, 0, 0);
  if (count > 0) v.x = from[0];
  if (count > 1) v.y = from[stride];
  if (count > 2) v.z = from[2 * stride];
  if (count > 3) v.w = from[3 * stride];
  return v;
}

// The slots of rows from `h0` on: nchw, 4 columns of one channel at a time; nhwc, 4 channels of one column. Lanes have
// neighbouring slots, which are neighbours in shared memory: 8 by some units, or by the 4 columns of one.
template <bool nhwc>
__device__ inline void fill(Params const& p, Where const& at, int h0, int origin, uint32_t planes) {
  constexpr int batch = 4;
  int const slots = (p.rows + kSplitTaps * p.steps - 1) * p.images, step = int(blockDim.x);
  int const total = (slots + 7) / 8 * p.units * (nhwc ? 32 : 8);
  uint32_t const unit_bytes = p.slots * 16, part = p.units * unit_bytes;
  float const* const in = p.in + at.n0 * p.in_n + at.c0 * p.in_c;
#pragma unroll 1
  for (int first = threadIdx.x; first < total; first += batch * step) {
    float4 v[batch];
    uint32_t to[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      int const i = first + b * step, column = nhwc ? i % 4 : 0, rest = nhwc ? i / 4 : i;
      int const group = int(p.by_units.quotient(rest / 8)), unit = rest / 8 - group * p.units;
      int const slot = group * 8 + rest % 8, row = int(p.by_images.quotient(slot)), image = slot - row * p.images;
      int const h = h0 + row, w = origin + unit * 4 + column;
      v[b] = make_float4(0, 0, 0, 0);
      to[b] = planes + unit * unit_bytes + slot * 16 + column * 4;
      if (i < total && unsigned(h) < unsigned(p.in_H) && w < p.in_W && at.n0 + image < p.N) {
        float const* const from = in + image * p.in_n + h * p.in_h + w * p.in_w;
        if constexpr (nhwc)
          v[b] = loaded(from, p.in_c, p.in_vectors, at.channels);
        else
          v[b] = loaded(from, 1, p.in_vectors && w + 4 <= p.in_W, p.in_W - w);
      }
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      if (first + b * step >= total) continue;
      Split const s[4] = {split(v[b].x), split(v[b].y), split(v[b].z), split(v[b].w)};
      if constexpr (nhwc) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          ptx::st_shared(to[b] + c * p.plane_bytes, s[c].high);
          ptx::st_shared(to[b] + c * p.plane_bytes + part, s[c].low);
        }
      } else {
        ptx::st_shared_v4(to[b], {s[0].high, s[1].high, s[2].high, s[3].high});
        ptx::st_shared_v4(to[b] + part, {s[0].low, s[1].low, s[2].low, s[3].low});
      }
    }
  }
}

// A channel's taps between zeros; by its warpgroup.
__device__ inline void load_filter(Params const& p, int c, uint32_t filter) {
  constexpr int batch = 8;  // loads on their way
  int const total = p.steps * kSplitTaps * p.filter_pitch;
  float const* const w = p.w + c * p.w_k;
#pragma unroll 1
  for (int first = int(threadIdx.x) % kWarpgroup; first < total; first += batch * kWarpgroup) {
    float v[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      int const i = first + b * kWarpgroup, r = int(p.by_pitch.quotient(i)), s = i - r * p.filter_pitch - kSplitLead;
      v[b] = 0;
      if (c < p.C && r < p.R && unsigned(s) < unsigned(p.S)) v[b] = __ldg(w + r * p.w_r + s * p.w_s);
    }
#pragma unroll
    for (int b = 0; b < batch; ++b)
      if (first + b * kWarpgroup < total) ptx::st_shared_f32(filter + (first + b * kWarpgroup) * 4, v[b]);
  }
}

// An output from global memory, product by product.
__device__ inline float exact(Params const& p, int64_t n, int c, int y, int x) {
  float const* const in = p.in + n * p.in_n + c * p.in_c;
  float sum = 0;
  for (int r = 0; r < p.R; ++r)
    for (int s = 0; s < p.S; ++s) {
      int const h = y - p.pad_h + r, w = x - p.pad_w + s;
      if (unsigned(h) < unsigned(p.in_H) && unsigned(w) < unsigned(p.in_W))
        sum = fmaf(in[h * p.in_h + w * p.in_w], p.w[c * p.w_k + r * p.w_r + s * p.w_s], sum);
    }
  return sum;
}

// A thread's outputs of column x, once more where they are not finite.
template <int items, int channels>
__device__ __noinline__ void mend(Params const& p, Where const& at, int x, int first, int apart) {
  for (int i = 0; i < items; ++i) {
    int const slot = first + i * apart, down = int(p.by_images.quotient(slot)), image = slot - down * p.images;
    int const y = at.p0 + down;
    int64_t const n = at.n0 + image;
    if (down >= p.rows || y >= p.out_H || n >= p.N) continue;
    for (int c = 0; c < at.channels; ++c) {
      float* const to = p.out + n * p.out_n + (at.c0 + c) * p.out_c + y * p.out_h + x * p.out_w;
      if (isfinite(*to)) continue;
      *to = exact(p, n, at.c0 + c, y, x) + (p.bias != nullptr ? p.bias[(at.c0 + c) * p.bias_stride] : 0.f);
    }
  }
}

// wgmma's operand in lines of 128 bytes that follow each other, not swizzled. low: its address, and in the upper half
// the bytes from 4 columns to the next 4; all / 16.
__device__ inline uint64_t descriptor(uint32_t low) { return uint64_t(128 / 16) << 32 | low; }

// Of 8 rows of taps and 8 columns: the products of some blocks of 8 inputs, in `acc`. filter: a lane's first tap.
template <int count>
__device__ inline void multiply(float (&acc)[count], uint32_t filter, uint32_t pitch_bytes, uint32_t inputs,
                                uint32_t block_step, uint32_t part_step, int blocks) {
  uint32_t taps[4];
  auto load = [&] {
#pragma unroll
    for (int i = 0; i < 4; ++i) taps[i] = ptx::ld_shared(filter + i % 2 * pitch_bytes + i / 2 * 16);
    filter += 32;
  };
  auto one = [&](auto first) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Split const v = split(__uint_as_float(taps[i]));
      high[i] = v.high, low[i] = v.low;
    }
    ptx::wgmma_fence_operand(acc);
    ptx::wgmma_fence();
    if constexpr (decltype(first)::value)
      ptx::wgmma_mma_async_tf32_first(acc, low, descriptor(inputs));
    else
      ptx::wgmma_mma_async_tf32(acc, low, descriptor(inputs));
    ptx::wgmma_mma_async_tf32(acc, high, descriptor(inputs + part_step));
    ptx::wgmma_mma_async_tf32(acc, high, descriptor(inputs));
    ptx::wgmma_commit_group();
    load();  // beyond the last block: zeros, or what follows
    inputs += block_step;
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
  };
  load();
  one(std::true_type());
#pragma unroll 1
  for (int i = 1; i < blocks; ++i) one(std::false_type());
}

template <int wide, bool nhwc>
__global__ void __launch_bounds__(kWarpgroup* split_channels(nhwc), nhwc         ? 1
                                                                    : wide == 64 ? 4
                                                                                 : 2)
    gather(__grid_constant__ Params const p) {
  constexpr int channels = split_channels(nhwc), threads = kWarpgroup * channels, count = wide / 2;
  constexpr int pitch = split_sums_pitch(wide), items = wide * kSplitColumns / threads;
  extern __shared__ __align__(128) unsigned char shared[];
  uint32_t const planes = ptx::shared_address(shared), filters = planes + channels * p.plane_bytes;
  uint32_t index = blockIdx.x;
  auto digit = [&](int size) {
    uint32_t const rest = index % uint32_t(size);
    index /= uint32_t(size);
    return int(rest);
  };
  Where at;
  at.c0 = digit(p.channel_units) * channels;
  at.channels = p.C - at.c0 < channels ? p.C - at.c0 : channels;
  at.q0 = digit(p.tiles_w) * p.columns, at.p0 = digit(p.tiles_h) * p.rows, at.n0 = int64_t(index) * p.images;
  SplitColumns const columns(at.q0, p.pad_w);
  int const h0 = at.p0 - p.pad_h, width = min(p.in_W - columns.origin, p.units * 4);

  int const group = int(threadIdx.x) / kWarpgroup, warp = __shfl_sync(~0u, int(threadIdx.x) / 32 % 4, 0);
  int const lane = int(threadIdx.x) % 32, row = lane / 4, column = lane % 4;  // of T
  load_filter(p, at.c0 + group, filters + group * p.filter_bytes);
  fill<nhwc>(p, at, h0, columns.origin, planes);
  ptx::fence_proxy_async();
  __syncthreads();

  // Steps whose rows meet the image.
  int step_begin = 0, step_end = p.steps;
  while (step_begin < step_end && h0 + step_begin * kSplitTaps + p.rows + kSplitTaps - 1 <= 0) ++step_begin;
  while (step_end > step_begin && h0 + (step_end - 1) * kSplitTaps >= p.in_H) --step_end;

  uint32_t const unit_bytes = p.slots * 16, pitch_bytes = p.filter_pitch * 4;
  uint32_t const filter =
      filters + group * p.filter_bytes + 2 * warp * pitch_bytes + (kSplitLead + columns.delta + column - row) * 4;
  uint32_t const block_step = 2 * p.slots;  // in 16 bytes
  uint32_t const inputs = unit_bytes >> 4 << 16 | (planes + group * p.plane_bytes) >> 4;
  int const last = min(p.columns, p.out_W - at.q0);

  // A thread's outputs of a block of columns: column item % 8, slots item / 8 and every so many.
  constexpr int apart = threads / kSplitColumns;
  uint32_t const sums = filters + channels * p.filter_bytes;
  uint32_t const to = sums + group * p.sums_bytes + ((warp % 2 * 16 + row) * pitch + 2 * column) * 4;
  int const item_column = int(threadIdx.x) % kSplitColumns, item_slot = int(threadIdx.x) / kSplitColumns;
  uint32_t const from = sums + (item_column * pitch + item_slot) * 4;
  float* out[items];
  uint32_t exists = 0;
#pragma unroll
  for (int i = 0; i < items; ++i) {
    int const slot = item_slot + i * apart, down = int(p.by_images.quotient(slot)), image = slot - down * p.images;
    if (down < p.rows && at.p0 + down < p.out_H && at.n0 + image < p.N) exists |= 1u << i;
    out[i] = p.out + (at.n0 + image) * p.out_n + at.c0 * p.out_c + (at.p0 + down) * p.out_h +
             (at.q0 + item_column) * p.out_w;
  }
  float bias[channels] = {};
#pragma unroll
  for (int c = 0; c < channels; ++c)
    if (p.bias != nullptr && c < at.channels) bias[c] = p.bias[(at.c0 + c) * p.bias_stride];

  float total[count], acc[count];
#pragma unroll 1
  for (int j = 0; j * kSplitColumns < last; ++j) {
    int const begin = columns.begin(j), end = columns.end(j, p.S, width);
#pragma unroll
    for (int i = 0; i < count; ++i) total[i] = 0;
    if (begin < end)
#pragma unroll 1
      for (int step = step_begin; step < step_end; ++step) {
        multiply(acc, filter + step * kSplitTaps * pitch_bytes + (begin - j) * 32, pitch_bytes,
                 inputs + begin * block_step + step * kSplitTaps * p.images, block_step, p.units * p.slots,
                 end - begin);
#pragma unroll
        for (int i = 0; i < count; ++i) total[i] += acc[i];
      }

    float done[items][channels] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      __syncthreads();  // what was there has been read
      if (warp / 2 == half) {
#pragma unroll
        for (int i = 0; i < count; i += 2)
          ptx::st_shared_f32x2(to + (i / 2 % 2 * 8 * pitch + i / 4 * 8) * 4, total[i], total[i + 1]);
      }
      __syncthreads();
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        uint32_t const line = from + (r * 8 * pitch + (4 * half + r) * p.images) * 4;
#pragma unroll
        for (int c = 0; c < channels; ++c)
#pragma unroll
          for (int i = 0; i < items; ++i) done[i][c] += ptx::ld_shared_f32(line + c * p.sums_bytes + i * apart * 4);
      }
    }
    int const x = at.q0 + j * kSplitColumns + item_column;
    if (x < p.out_W) {
      float all = 0;  // not finite, if one of them is not
#pragma unroll
      for (int i = 0; i < items; ++i)
#pragma unroll
        for (int c = 0; c < channels; ++c)
          if (exists >> i & 1) all = fmaf(done[i][c], 0.f, all);
#pragma unroll
      for (int i = 0; i < items; ++i) {
        if ((exists >> i & 1) == 0) continue;
#pragma unroll
        for (int c = 0; c < channels; ++c) done[i][c] += bias[c];
        if constexpr (nhwc) {
          if (p.out_vectors) {
            *reinterpret_cast<float4*>(out[i]) = make_float4(done[i][0], done[i][1], done[i][2], done[i][3]);
            continue;
          }
        }
#pragma unroll
        for (int c = 0; c < channels; ++c)
          if (c < at.channels) out[i][c * p.out_c] = done[i][c];
      }
      if (all != 0) mend<items, channels>(p, at, x, item_slot, apart);
    }
#pragma unroll
    for (int i = 0; i < items; ++i) out[i] += kSplitColumns * p.out_w;
  }
}

// ---- host side

template <Op op, bool nhwc>
cudaError_t launch(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  constexpr bool backward = op == Op::dgrad;
  SplitTile const t = split_tile(op, problem, nhwc);
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  int const in_align = backward ? problem.y_align : problem.x_align;
  int const out_align = backward ? problem.x_align : problem.y_align;
  Params p{};
  depthwise::set_turned<op, float>(p, problem, args);
  p.in = static_cast<float const*>(args.a), p.out = static_cast<float*>(args.out);
  p.bias = static_cast<float const*>(args.bias);
  p.in_c = in.c, p.in_w = nhwc ? in.w : 1, p.out_c = out.c, p.out_w = nhwc ? out.w : 1, p.N = problem.N;
  p.images = t.images, p.rows = t.rows, p.columns = t.columns, p.steps = t.steps, p.units = t.units, p.slots = t.slots;
  p.filter_pitch = t.filter_pitch;
  p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w), p.channel_units = int(t.channel_units);
  p.plane_bytes = uint32_t(t.plane_bytes), p.filter_bytes = uint32_t(t.filter_bytes);
  p.sums_bytes = uint32_t(t.sums_bytes);
  p.by_images = Divisor(uint32_t(t.images)), p.by_units = Divisor(uint32_t(t.units));
  p.by_pitch = Divisor(uint32_t(t.filter_pitch));
  constexpr int v = 4;
  auto vectors = [&](Strides const& s, int align) {
    return nhwc ? channel_vectors(s, align, problem.C, v, DType::f32)
                : align >= 16 && s.n % v == 0 && s.c % v == 0 && s.h % v == 0;
  };
  p.in_vectors = vectors(in, in_align), p.out_vectors = vectors(out, out_align);
  auto run = [&](auto* kernel) {
    if (auto const error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
      return error;
    kernel<<<unsigned(t.blocks()), unsigned(kWarpgroup * split_channels(nhwc)), size_t(t.shared_bytes), stream>>>(p);
    return cudaGetLastError();
  };
  if constexpr (!nhwc)
    if (t.wide == 128) return run(gather<128, false>);
  return run(gather<64, nhwc>);
}

}  // namespace conv2d_ext::band_split

#define CONV2D_EXT_BAND_SPLIT_INSTANCE(family, op, dtype, tm, tn, tk, variant)             \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                \
    return band_split::launch<Op::op, Variant::variant == Variant::nhwc>(p, args, stream); \
  }
