// fprop and dgrad of groups over few pixels in channels_last, on mma.sync: pixels and filters come from memory to
// registers, so that nothing but the sums of a warp follows each other.
//
// A warp has 16 channels of the result of two runs of 8 pixels, which meet the same taps. A lane loads four channels
// that are summed over, of a pixel of each run, and filters likewise; which of the four is which k of an instruction is
// the same for both. All loads of three taps of a row are asked for at once.
//
// Pixels that do not exist are zeros; infinite filters meet them, so results that are NaN are made once more.
#pragma once

#include "../core/grouped_few.h"
#include "bring.cuh"
#include "fragments.cuh"
#include "grouped_tile.cuh"
#include "launch.h"
#include "ptx.cuh"
#include "types.cuh"

namespace conv2d_ext::few_groups_outputs {

constexpr int kThreads = 32 * kFewGroupWarps, kTaps = 3;
using grouped::Divisor;

struct Params {
  void const *in, *w, *bias;
  void* out;
  int64_t bias_stride;
  int in_n, in_h, in_w, out_n, out_h, out_w, w_k, w_r, w_s;
  int in_H, in_W, out_H, out_W, R, S;
  int stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w;
  int sums, outputs, tiles, phases_w, N;  // sums, outputs: channels of a group
  Share share_in, share_w;
  Divisor by_in_row[2], by_rows[2];  // dgrad: of phases with as many rows or columns as any, and of those with one less
};

template <int words>
__device__ inline void load(uint32_t (&to)[words], void const* from, bool exists) {
#pragma unroll
  for (int i = 0; i < words; ++i) to[i] = 0;
  if (!exists) return;
  if constexpr (words == 1) {
    to[0] = __ldg(static_cast<uint32_t const*>(from));
  } else if constexpr (words == 2) {
    uint2 const v = __ldg(static_cast<uint2 const*>(from));
    to[0] = v.x, to[1] = v.y;
  } else {
    uint4 const v = __ldg(static_cast<uint4 const*>(from));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
}

// Along an axis: does a tap meet a phase's outputs, and with which input the first of them?
template <bool backward>
__device__ inline bool meets(int& first, int phase, int tap, int stride, int dilation, int pad) {
  first = backward ? phase + pad - tap * dilation : tap * dilation - pad;
  if (!backward || stride == 1) return true;
  int const whole = first / stride;
  bool const exact = whole * stride == first;
  first = whole;
  return exact;
}

// A result once more.
template <class T, bool backward>
__device__ __noinline__ float exact_sum(Params const& p, int n, int h, int w, int group, int output) {
  float sum = 0;
  for (int r = 0; r < p.R; ++r)
    for (int s = 0; s < p.S; ++s) {
      int i, j;
      if (backward) {
        if (!meets<true>(i, h, r, p.stride_h, p.dilation_h, p.pad_h)) continue;
        if (!meets<true>(j, w, s, p.stride_w, p.dilation_w, p.pad_w)) continue;
      } else {
        i = h * p.stride_h + r * p.dilation_h - p.pad_h, j = w * p.stride_w + s * p.dilation_w - p.pad_w;
      }
      if (unsigned(i) >= unsigned(p.in_H) || unsigned(j) >= unsigned(p.in_W)) continue;
      T const* const in = static_cast<T const*>(p.in) + n * p.in_n + i * p.in_h + j * p.in_w + group * p.sums;
      T const* const filter = static_cast<T const*>(p.w) + r * p.w_r + s * p.w_s;
      for (int c = 0; c < p.sums; ++c)
        sum += widen(in[c]) * widen(backward ? filter[(group * p.sums + c) * p.w_k + output]
                                             : filter[(group * p.outputs + output) * p.w_k + c]);
      if (!(sum == sum)) return sum;
    }
  return sum;
}

template <class T, bool backward, int sums>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 && sums == 32 ? 3 : 5)
    few_kernel(__grid_constant__ Params const p) {
  constexpr bool half = sizeof(T) == 2;
  constexpr int chunks = sums / 16, words = int(sizeof(T));  // words: of a lane's four channels
  int const lane = threadIdx.x % 32, i = lane / 4, j = lane % 4;
  int const step = int(blockIdx.x) * kFewGroupWarps + warp_uniform(int(threadIdx.x) / 32);
  uint32_t const block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  p.share_in.bring(block), p.share_w.bring(block);
  int const group = blockIdx.y / p.tiles, first_output = (blockIdx.y - group * p.tiles) * kFewGroupOutputs;
  int const phase_h = blockIdx.z / p.phases_w, phase_w = blockIdx.z - phase_h * p.phases_w;
  int const step_h = backward ? 1 : p.stride_h, step_w = backward ? 1 : p.stride_w;
  int const between_h = backward ? p.stride_h : 1, between_w = backward ? p.stride_w : 1;
  int const rows = (p.out_H - phase_h + between_h - 1) / between_h;
  int const columns = (p.out_W - phase_w + between_w - 1) / between_w;
  int const in_row = (columns + kFewGroupRun - 1) / kFewGroupRun, runs = p.N * rows * in_row;
  if (step * 2 >= runs) return;
  Divisor const& by_in_row = p.by_in_row[in_row != int(p.by_in_row[0].value)];
  Divisor const& by_rows = p.by_rows[rows != int(p.by_rows[0].value)];

  struct Pixel {
    int n, row, column;
    bool exists;
  } pixel[2];
  T const* from[2];
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    int const at = step * 2 + run, row = by_in_row.quotient(at), n = by_rows.quotient(row);
    pixel[run] = {n, row - n * rows, (at - row * in_row) * kFewGroupRun + i, false};
    pixel[run].exists = at < runs && pixel[run].column < columns;
    from[run] = static_cast<T const*>(p.in) + n * p.in_n + group * p.sums + 4 * j;
  }
  // fprop: of a lane, filters whose results a lane stores together; dgrad: two neighbouring channels.
  int const output = first_output + (backward ? 2 * i : i / 2 * 4 + i % 2);
  T const* const filters = static_cast<T const*>(p.w) + (backward ? (group * p.sums + 4 * j) * p.w_k + output
                                                                  : (group * p.outputs + output) * p.w_k + 4 * j);
  float acc[2][4] = {};
#pragma unroll 1
  for (int c = 0; c < p.sums; c += sums)
#pragma unroll 1
    for (int r = 0; r < p.R; ++r) {
      int h;
      if (!meets<backward>(h, phase_h, r, p.stride_h, p.dilation_h, p.pad_h)) continue;
#pragma unroll 1
      for (int s0 = 0; s0 < p.S; s0 += kTaps) {
        uint32_t a[kTaps][chunks][2][words], b[kTaps][chunks][backward ? 4 : 2][backward ? words / 2 : words];
        bool tap[kTaps];
#pragma unroll
        for (int s = 0; s < kTaps; ++s) {
          int w;
          tap[s] = s0 + s < p.S && meets<backward>(w, phase_w, s0 + s, p.stride_w, p.dilation_w, p.pad_w);
          if (!tap[s]) continue;
          T const* const filter = filters + r * p.w_r + (s0 + s) * p.w_s;
#pragma unroll
          for (int k = 0; k < chunks; ++k) {
            int const channel = c + k * 16;
#pragma unroll
            for (int run = 0; run < 2; ++run) {
              int const y = pixel[run].row * step_h + h, x = pixel[run].column * step_w + w;
              bool const inside = pixel[run].exists && unsigned(y) < unsigned(p.in_H) && unsigned(x) < unsigned(p.in_W);
              load(a[s][k][run], from[run] + (y * p.in_h + x * p.in_w + channel), inside && channel + 4 * j < p.sums);
            }
            if constexpr (backward) {
#pragma unroll
              for (int e = 0; e < 4; ++e)
                load(b[s][k][e], filter + (channel + e) * p.w_k, channel + 4 * j < p.sums && output < p.outputs);
            } else {
#pragma unroll
              for (int u = 0; u < 2; ++u)
                load(b[s][k][u], filter + 2 * u * p.w_k + channel,
                     channel + 4 * j < p.sums && output + 2 * u < p.outputs);
            }
          }
        }
#pragma unroll
        for (int s = 0; s < kTaps; ++s) {
          if (!tap[s]) continue;
#pragma unroll
          for (int k = 0; k < chunks; ++k)
#pragma unroll
            for (int u = 0; u < 2; ++u) {
              auto const& pixels = a[s][k];
              auto const& of = b[s][k];
              if constexpr (half) {
                auto pair = [&](int e) {
                  if constexpr (backward)
                    return __byte_perm(of[2 * e][0], of[2 * e + 1][0], u == 0 ? 0x5410 : 0x7632);
                  else
                    return of[u][e];
                };
                ptx::mma_m16n8k16<T>(acc[u], pixels[0][0], pixels[1][0], pixels[0][1], pixels[1][1], pair(0), pair(1));
              } else {
                auto rounded = [](uint32_t word) { return ptx::cvt_rn_tf32(__uint_as_float(word)); };
#pragma unroll
                for (int e = 0; e < 4; e += 2)
                  ptx::mma_m16n8k8_tf32(acc[u], rounded(pixels[0][e]), rounded(pixels[1][e]), rounded(pixels[0][e + 1]),
                                        rounded(pixels[1][e + 1]), rounded(backward ? of[e][u] : of[u][e]),
                                        rounded(backward ? of[e + 1][u] : of[u][e + 1]));
              }
            }
        }
      }
    }
  int const first = first_output + 4 * j;
  if (first >= p.outputs) return;
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    // The lane's pixel is the one that it loaded.
    if (!pixel[run].exists) continue;
    int const h = pixel[run].row * between_h + phase_h, w = pixel[run].column * between_w + phase_w;
    Vector<T, 4> v;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float sum = backward ? acc[e % 2][run * 2 + e / 2] : acc[e / 2][run * 2 + e % 2];
      if (!(sum == sum)) sum = exact_sum<T, backward>(p, pixel[run].n, h, w, group, first + e);
      if (!backward && p.bias != nullptr)
        sum += widen(static_cast<T const*>(p.bias)[(group * p.outputs + first + e) * p.bias_stride]);
      v.v[e] = narrow<T>(sum);
    }
    *reinterpret_cast<Vector<T, 4>*>(static_cast<T*>(p.out) + pixel[run].n * p.out_n + h * p.out_h + w * p.out_w +
                                     group * p.outputs + first) = v;
  }
}

template <Op op, class T>
cudaError_t launch(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  constexpr bool backward = op == Op::dgrad;
  FewGroups const t = few_groups(op, problem, h200_sxm);
  Strides const &in = backward ? problem.y : problem.x, &out = backward ? problem.x : problem.y;
  Params p{};
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride, p.out = args.out;
  p.in_n = int(in.n), p.in_h = int(in.h), p.in_w = int(in.w);
  p.out_n = int(out.n), p.out_h = int(out.h), p.out_w = int(out.w);
  p.w_k = int(problem.w.n), p.w_r = int(problem.w.h), p.w_s = int(problem.w.w);
  p.in_H = int(backward ? problem.P() : problem.H), p.in_W = int(backward ? problem.Q() : problem.W);
  p.out_H = int(backward ? problem.H : problem.P()), p.out_W = int(backward ? problem.W : problem.Q());
  p.R = int(problem.R), p.S = int(problem.S), p.stride_h = int(problem.stride_h), p.stride_w = int(problem.stride_w);
  p.dilation_h = int(problem.dilation_h), p.dilation_w = int(problem.dilation_w);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left), p.N = int(problem.N);
  p.sums = int(backward ? problem.K_per_group() : problem.C_per_group());
  p.outputs = int(backward ? problem.C_per_group() : problem.K_per_group());
  p.tiles = int(t.tiles), p.phases_w = int(t.phases_w);
  int64_t const fewer_rows = max64(t.rows - 1, 1), fewer_columns = max64(t.columns - 1, 1);
  p.by_in_row[0] = Divisor(uint32_t(t.in_row)),
  p.by_in_row[1] = Divisor(uint32_t(ceil_div(fewer_columns, kFewGroupRun)));
  p.by_rows[0] = Divisor(uint32_t(t.rows)), p.by_rows[1] = Divisor(uint32_t(fewer_rows));
  dim3 const grid(unsigned(ceil_div(t.steps, kFewGroupWarps)), unsigned(problem.groups * t.tiles),
                  unsigned(t.phases_h * t.phases_w));
  int64_t const blocks = int64_t(grid.x) * grid.y * grid.z;
  p.share_in = backward ? Share(args.a, problem.y, problem.N, problem.K, problem.P(), problem.Q(), sizeof(T), blocks)
                        : Share(args.a, problem.x, problem.N, problem.C, problem.H, problem.W, sizeof(T), blocks);
  p.share_w = Share(args.b, problem.w, problem.K, problem.C_per_group(), problem.R, problem.S, sizeof(T), blocks);
  if (t.sums == 32)
    few_kernel<T, backward, 32><<<grid, kThreads, 0, stream>>>(p);
  else
    few_kernel<T, backward, 16><<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::few_groups_outputs

#define CONV2D_EXT_GROUPED_FEW_INSTANCE(family, op, dtype, tm, tn, tk, variant)                      \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                          \
    return few_groups_outputs::launch<Op::op, typename TypeOf<DType::dtype>::type>(p, args, stream); \
  }
