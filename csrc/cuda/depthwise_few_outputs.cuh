// Depthwise fprop and dgrad of few outputs in channels_last, any filter: what such a layer takes is a launch, the
// latency of memory and of its code. A block has some channels and rows of an image, and copies all inputs and filters
// that they meet to shared memory at once, as they lie, with zeros beside the rows. A thread has 4 bytes of channels of
// four outputs of a row, of one phase of a stride in dgrad.
#pragma once

#include <type_traits>

#include "../core/few_outputs.h"
#include "depthwise_tile.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace conv2d_ext::depthwise {

// One axis. dgrad: output a meets input (a + pad) / stride with tap (a + pad) % stride, and inputs before it with every
// stride-th tap; fprop: input a * stride - pad with tap 0.
struct FewOutputsAxis {
  int in, out, pad;    // extents
  int taps, tap_step;  // from a tap to the next that an output meets
  int in_step;         // from its input to the next's
  int stride;          // fprop: of inputs
  Divisor phases;      // dgrad: by the stride

  __device__ int first_tap(int a) const {
    int const at = a + pad;
    return phases.value == 1 ? 0 : at - int(phases.quotient(at) * phases.value);
  }
  // Of the first tap.
  __device__ int input(int a) const { return in_step < 0 ? int(phases.quotient(a + pad)) : a * stride - pad; }
};

struct FewOutputsParams {
  unsigned char const* in;
  unsigned char const* w;
  void const* bias;
  void* out;
  int64_t in_n, out_n, out_h, out_w, bias_stride;  // in_n: bytes
  uint32_t in_h, in_w;                             // bytes
  int C, lanes_log2, band, items, left, pitch, bytes_x;
  int bytes_w;  // of a block's filters
  int filters;  // bytes of all of them
  int phases;   // of the columns of outputs
  FewOutputsAxis h, w_axis;
  Divisor by_pitch, by_band, by_phases;
};

// A thread's channels of a pixel in shared memory.
template <class T, int V>
__device__ inline void load_outputs(T const* from, float (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = widen(*from);
  } else {
    uint32_t const both = *reinterpret_cast<uint32_t const*>(from);
    if constexpr (std::is_same_v<T, __half>) {
      float2 const wide = __half22float2(*reinterpret_cast<__half2 const*>(&both));
      to[0] = wide.x, to[1] = wide.y;
    } else {
      to[0] = __uint_as_float(both << 16), to[1] = __uint_as_float(both & 0xffff0000u);
    }
  }
}

// S: taps of a row at a time; `exact`: of all its taps. step: inputs from a thread's output to that of its next, which
// share what they meet; 0: any, and they share nothing.
template <class T, int S, int step, bool exact>
__global__ void __launch_bounds__(kFewOutputsThreads, 2) few_outputs(__grid_constant__ FewOutputsParams const p) {
  constexpr int V = 4 / int(sizeof(T)), columns = kFewOutputsColumns;
  extern __shared__ __align__(16) unsigned char few_outputs_shared[];
  uint32_t const shared = ptx::shared_address(few_outputs_shared);
  int const channels = V << p.lanes_log2, c0 = int(blockIdx.x) * channels;
  int const begin = int(blockIdx.y) * p.band, end = min(begin + p.band, p.h.out);
  // The rows of inputs that the band meets.
  int const reach = (p.h.taps - 1) * (p.h.in_step < 0 ? -p.h.in_step : p.h.in_step);
  int first = p.h.input(begin), last = p.h.input(end - 1);
  if (p.h.in_step < 0)
    first = max(0, begin + p.h.pad - reach + int(p.h.phases.value) - 1), first = int(p.h.phases.quotient(first));
  else
    last += reach, first = max(0, first);
  last = min(last, p.h.in - 1);
  {
    int const log2 = p.lanes_log2 - 2, piece = (int(threadIdx.x) & ((1 << log2) - 1)) * 16;
    bool const exists = c0 * int(sizeof(T)) + piece < p.C * int(sizeof(T));
    unsigned char const* const from =
        p.in + blockIdx.z * p.in_n + uint32_t(c0) * uint32_t(sizeof(T)) + piece + uint64_t(uint32_t(first)) * p.in_h;
    int const pixels = (last - first + 1) * p.pitch, each = int(blockDim.x) >> log2;
    if (exists)
#pragma unroll 2
      for (int i = int(threadIdx.x) >> log2; i < pixels; i += each) {
        int const row = int(p.by_pitch.quotient(i)), column = i - row * p.pitch - p.left;
        ptx::cp_async_16(shared + (i << (log2 + 4)) + piece,
                         from + uint64_t(uint32_t(row) * p.in_h + uint32_t(column) * p.in_w),
                         unsigned(column) < unsigned(p.w_axis.in));
      }
  }
  int const taps = p.h.taps * p.w_axis.taps;
  T const* const filters = reinterpret_cast<T const*>(few_outputs_shared + p.bytes_x);
  int const from = int(blockIdx.x) * p.bytes_w;
#pragma unroll 1
  for (int i = int(threadIdx.x) * 16; i < p.bytes_w; i += int(blockDim.x) * 16)
    ptx::cp_async_16(shared + p.bytes_x + i, p.w + from + i, from + i < p.filters);
  ptx::cp_async_commit_group();
  int const lane = int(threadIdx.x) & ((1 << p.lanes_log2) - 1), c = c0 + lane * V;
  float bias[V] = {};
  if (p.bias != nullptr && c < p.C)
#pragma unroll
    for (int e = 0; e < V; ++e) bias[e] = widen(static_cast<T const*>(p.bias)[(c + e) * p.bias_stride]);
  ptx::cp_async_wait_group<0>();
  __syncthreads();
  if (c >= p.C) return;

  T const* const x = reinterpret_cast<T const*>(few_outputs_shared) + lane * V;
  T const* const filter = filters + lane * V * taps;
  constexpr int window = step > 0 ? (columns - 1) * step + S : columns * S;
  bool const backward = p.w_axis.in_step < 0, turned = backward && step == 1;
  // To the next input of a row: `along` for a tap, `apart` for an output.
  int const along = channels * p.w_axis.in_step, apart = channels * p.w_axis.stride;
#pragma unroll 1
  for (int item = int(threadIdx.x) >> p.lanes_log2; item < p.items; item += int(blockDim.x) >> p.lanes_log2) {
    int const run = int(p.by_band.quotient(item)), a = begin + item - run * p.band;
    if (a >= end) continue;
    int const b = run + int(p.by_phases.quotient(run)) * p.phases * (columns - 1);
    int const s0 = p.w_axis.first_tap(b);
    // The first output of a thread is the one with the first input in the order of the taps.
    int const column = p.w_axis.input(b) + p.left + (turned ? columns - 1 : 0);
    float sum[columns][V];
#pragma unroll
    for (int i = 0; i < columns * V; ++i) sum[i / V][i % V] = bias[i % V];
    int h = p.h.input(a);
#pragma unroll 1
    for (int r = p.h.first_tap(a); r < p.h.taps; r += p.h.tap_step, h += p.h.in_step) {
      if (unsigned(h) >= unsigned(p.h.in)) continue;
      T const* from = x + ((h - first) * p.pitch + column) * channels;
      T const* tap = filter + r * p.w_axis.taps;
#pragma unroll 1
      for (int s = s0; s < p.w_axis.taps; s += S * p.w_axis.tap_step) {
        auto met = [&](int t) { return exact || t <= 0 || s + t * p.w_axis.tap_step < p.w_axis.taps; };
        float v[window][V], f[S][V];
#pragma unroll
        for (int j = 0; j < window; ++j) {
          int const t = step > 0 ? j - (columns - 1) * step : j % S;
          int const to = step == 1 ? j * along : step > 1 ? j * channels : j / S * apart + t * along;
#pragma unroll
          for (int e = 0; e < V; ++e) v[j][e] = 0.f;
          if (met(t)) load_outputs<T, V>(from + to, v[j]);
        }
#pragma unroll
        for (int t = 0; t < S; ++t)
#pragma unroll
          for (int e = 0; e < V; ++e) f[t][e] = met(t) ? widen(tap[e * taps + s + t * p.w_axis.tap_step]) : 0.f;
#pragma unroll
        for (int t = 0; t < S; ++t) {
          if (!met(t)) break;  // or an infinite input would meet the zero of a tap that does not exist
#pragma unroll
          for (int i = 0; i < columns * V; ++i)
            sum[i / V][i % V] =
                fmaf(v[step > 0 ? i / V * step + t : i / V * S + t][i % V], f[t][i % V], sum[i / V][i % V]);
        }
        if (exact) break;
        from += S * along;
      }
    }
    T* const out = static_cast<T*>(p.out) + blockIdx.z * p.out_n + a * p.out_h + c;
#pragma unroll
    for (int e = 0; e < columns; ++e) {
      int const q = b + (turned ? columns - 1 - e : e) * p.phases;
      Vector<T, V> v;
#pragma unroll
      for (int i = 0; i < V; ++i) v.v[i] = narrow<T>(sum[e][i]);
      if (q < p.w_axis.out) *reinterpret_cast<Vector<T, V>*>(out + q * p.out_w) = v;
    }
  }
}

// ---- host side

template <DType dtype>
cudaError_t launch_few_outputs(Op op, Problem const& problem, FewOutputsTile const& t, Arguments const& args,
                               cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr int size = int(sizeof(T));
  if (!t.used) return cudaErrorInvalidValue;
  bool const backward = op == Op::dgrad;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  auto axis = [&](int64_t image, int64_t pixels, int64_t pad, int64_t taps, int64_t stride, int64_t dilation) {
    FewOutputsAxis a{};
    a.in = int(backward ? pixels : image), a.out = int(backward ? image : pixels), a.pad = int(pad), a.taps = int(taps);
    a.tap_step = int(backward ? stride : 1), a.stride = int(backward ? 1 : stride);
    a.in_step = int(taps == 1 ? 1 : dilation) * (backward ? -1 : 1), a.phases = Divisor(uint32_t(a.tap_step));
    return a;
  };
  FewOutputsParams p{};
  p.h = axis(problem.H, problem.P(), problem.pad_top, problem.R, problem.stride_h, problem.dilation_h);
  p.w_axis = axis(problem.W, problem.Q(), problem.pad_left, problem.S, problem.stride_w, problem.dilation_w);
  p.in = static_cast<unsigned char const*>(args.a), p.w = static_cast<unsigned char const*>(args.b);
  p.bias = args.bias, p.bias_stride = args.bias_stride, p.out = args.out;
  p.in_n = in.n * size, p.in_h = uint32_t(in.h * size), p.in_w = uint32_t(in.w * size);
  p.out_n = out.n, p.out_h = out.h, p.out_w = out.w;
  p.C = int(problem.C), p.band = t.band, p.items = t.band * t.groups, p.left = t.left, p.pitch = t.pitch;
  while (1 << p.lanes_log2 < t.lanes) ++p.lanes_log2;
  p.bytes_x = int(t.bytes_x), p.phases = p.w_axis.tap_step;
  int64_t const taps = problem.R * problem.S;
  p.bytes_w = int(t.lanes * 4 * taps), p.filters = int(problem.C * taps * size);
  p.by_pitch = Divisor(uint32_t(p.pitch)), p.by_band = Divisor(uint32_t(p.band));
  p.by_phases = Divisor(uint32_t(p.phases));
  int const bytes = int(t.bytes_x + t.bytes_w);
  auto start = [&](auto* kernel) {
    if (bytes > 48 * 1024)
      if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
        return error;
    kernel<<<dim3(unsigned(t.slices), unsigned(t.bands), unsigned(problem.N)), unsigned(t.threads), size_t(bytes),
             stream>>>(p);
    return cudaGetLastError();
  };
  if (t.step == 1 && t.taps == 3) return start(few_outputs<T, 3, 1, true>);
  if (t.step == 1 && t.taps == 5) return start(few_outputs<T, 5, 1, true>);
  if (t.step == 1 && t.taps == 7) return start(few_outputs<T, 7, 1, true>);
  if (t.step == 1) return start(few_outputs<T, 3, 1, false>);
  if (t.step == 2 && t.taps == 3) return start(few_outputs<T, 3, 2, true>);
  if (t.step == 2 && t.taps == 5) return start(few_outputs<T, 5, 2, true>);
  return start(few_outputs<T, 3, 0, false>);
}

}  // namespace conv2d_ext::depthwise

#define CONV2D_EXT_DEPTHWISE_FEW_OUTPUTS_INSTANCE(family, op, dtype, tm, tn, tk, variant)                             \
  namespace conv2d_ext {                                                                                              \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const&, Arguments const& args, \
                                                                cudaStream_t stream) {                                \
    return depthwise::launch_few_outputs<DType::dtype>(Op::op, p, few_outputs_tile(Op::op, p, h200_sxm), args,        \
                                                       stream);                                                       \
  }                                                                                                                   \
  }
