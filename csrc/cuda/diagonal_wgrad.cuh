// The filter's gradient for diagonal.cuh: for 8 channels and 16 pixels of a row
//   d[channel of y, channel of x] += y[16 pixels, 8 channels]^T * x[the pixels moved by s; 8 channels],
// of which the diagonal is the sum for a tap. The 16 rows of an instruction are the 8 channels in two rows of y: taps r
// and r + 1 for one row of x. ldmatrix turns both operands round.
//
// A block has its share of strips of images and walks down them in steps of R rows of x and of y, which wait in shared
// memory, in a ring of stages, as planes [row][pixel] of 8 channels, one for each warp; a row of x meets rows of y of
// this stage and the one before. Images of up to 8 columns go in pairs. Splits are added by a second pass. What an
// infinity makes of the zeros beside the diagonal is not read; of the zeros around the images: then the sum is made
// again by single products.
#pragma once

#include "diagonal.cuh"

namespace conv2d_ext::diagonal {

struct SumsParams {
  Image x, y;
  void* out;
  void* partial;
  int64_t w_k, w_r, w_s, N;
  int units, C, R, S, pad_h, pad_w;
  int tiles_h, tiles_w, channel_units, groups, rows, splits;
  bool pairs;
  Divisor groups_of;
};

// A strip of an image, or of two.
struct Strip {
  int h0, q0, rows, n0;  // n0: of its images, or of its pairs
};

__device__ inline Strip strip_of(SumsParams const& p, int unit) {
  uint32_t rest = uint32_t(unit);
  Strip s;
  s.q0 = depthwise::split_off(rest, p.tiles_w) * 16;
  s.h0 = depthwise::split_off(rest, p.tiles_h) * p.rows;
  s.rows = p.x.H - s.h0 < p.rows ? p.x.H - s.h0 : p.rows;
  s.n0 = int(rest);
  return s;
}

// A tap from global memory, over the block's strips.
template <class T>
__device__ __noinline__ float exact_sum(SumsParams const& p, int begin, int end, int c, int r, int s) {
  float sum = 0.f;
  for (int unit = begin; unit < end; ++unit) {
    Strip const at = strip_of(p, unit);
    int64_t const images = p.pairs ? 2 : 1;
    for (int64_t n = at.n0 * images; n < (at.n0 + 1) * images && n < p.N; ++n) {
      T const* const x = static_cast<T const*>(p.x.data) + n * p.x.n + c;
      T const* const y = static_cast<T const*>(p.y.data) + n * p.y.n + c;
      for (int h = at.h0; h < at.h0 + at.rows; ++h) {
        int const row = h + p.pad_h - r;
        if (unsigned(row) >= unsigned(p.y.H)) continue;
        for (int q = at.q0; q < at.q0 + 16 && q < p.y.W; ++q) {
          int const w = q + s - p.pad_w;
          if (unsigned(w) < unsigned(p.x.W))
            sum = fmaf(widen(x[h * p.x.h + w * p.x.w]), widen(y[row * p.y.h + q * p.y.w]), sum);
        }
      }
    }
  }
  return sum;
}

template <class T, int R, int S>
__global__ void __launch_bounds__(kMaxThreads, kDiagonalBlocks) wgrad(__grid_constant__ SumsParams const p) {
  constexpr int pairs = (R + 1) / 2, stages = kDiagonalSumsStages;
  static_assert(2 * pairs - 1 <= R, "a row of x meets rows of y of two stages");
  extern __shared__ __align__(16) unsigned char shared[];
  int const stage_bytes = p.groups * (p.x.plane_bytes + p.y.plane_bytes);
  uint32_t index = blockIdx.x;
  Where at{};
  at.c0 = depthwise::split_off(index, p.channel_units) * p.groups * 8;
  at.groups = (p.C - at.c0) / 8 < p.groups ? (p.C - at.c0) / 8 : p.groups;
  int const split = int(index);
  int const begin = int(int64_t(p.units) * split / p.splits), end = int(int64_t(p.units) * (split + 1) / p.splits);
  int const half_x = p.pairs ? p.x.pitch / 2 : p.x.pitch, half_y = p.pairs ? 8 : p.y.pitch;

  // Step 0 of a strip has the rows of y above those of step 1, and none of x.
  int next_unit = begin;
  int next = 0, next_row = -R;
  Strip ahead = strip_of(p, begin);
  auto load = [&] {
    if (next_unit < end) {
      unsigned char* const to = shared + next % stages * stage_bytes;
      at.n0 = int64_t(ahead.n0) * (p.pairs ? 2 : 1), at.images = int(depthwise::smaller(p.N - at.n0, 2));
      if (next_row >= 0)
        load_rows<T>(p.x, at, 0, half_x, ahead.h0 + next_row, ahead.q0 - p.pad_w, p.groups, p.groups_of, to);
      load_rows<T>(p.y, at, 0, half_y, ahead.h0 + p.pad_h + next_row, ahead.q0, p.groups, p.groups_of,
                   to + p.groups * p.x.plane_bytes);
      next_row += R;
      if (next_row >= ahead.rows) {
        next_row = -R;
        if (++next_unit < end) ahead = strip_of(p, next_unit);
      }
    }
    ptx::cp_async_commit_group();
    ++next;
  };
#pragma unroll
  for (int stage = 0; stage < stages - 2; ++stage) load();

  int const lane = int(threadIdx.x) % 32, group = int(threadIdx.x) / 32;
  uint32_t const pitch_x = p.x.pitch * 16, pitch_y = p.y.pitch * 16;
  // Matrices of B: pixels 0 to 7 and 8 to 15 for s, then for s + 1; of A: 8 pixels of row y, of row y - 1, then the
  // other 8.
  uint32_t const x = ptx::shared_address(shared) + group * p.x.plane_bytes +
                     (lane % 8 + (lane % 16 >= 8 ? (p.pairs ? half_x : 8) : 0) + lane / 16) * 16;
  bool const above = lane / 8 % 2 == 1;
  uint32_t const y = ptx::shared_address(shared) + p.groups * p.x.plane_bytes + group * p.y.plane_bytes +
                     (lane % 8 + lane / 16 * 8) * 16 - (above ? pitch_y : 0);
  float acc[pairs][S][4] = {};
  int step = 0;
  for (int unit = begin; unit < end; ++unit) {
    Strip const strip = strip_of(p, unit);
    for (int row = -R; row < strip.rows; row += R, ++step) {
      ptx::cp_async_wait_group<stages - 3>();
      __syncthreads();  // the step's rows are there, and nobody reads the stage before the last
      load();
      if (row < 0 || group >= at.groups) continue;
      uint32_t const stage = step % stages * stage_bytes, last = (step + stages - 1) % stages * stage_bytes;
      uint32_t const from_x = x + stage;
      uint32_t const now = y + stage, before = y + last + R * pitch_y;
#pragma unroll
      for (int u = 0; u < R; ++u) {
        uint32_t b[S + 1][2];
#pragma unroll
        for (int s = 0; s < S; s += 2) {
          uint32_t v[4];
          if (s + 1 < S) {
            ptx::ldmatrix_x4_trans(v, from_x + u * pitch_x + s * 16);
            b[s + 1][0] = v[2], b[s + 1][1] = v[3];
          } else {
            ptx::ldmatrix_x2_trans(reinterpret_cast<uint32_t (&)[2]>(v), from_x + u * pitch_x + s * 16);
          }
          b[s][0] = v[0], b[s][1] = v[1];
        }
#pragma unroll
        for (int k = 0; k < pairs; ++k) {
          int const up = u - 2 * k;  // rows `up` and `up` - 1 of y
          uint32_t a[4];
          ptx::ldmatrix_x4_trans(a, (up > 0 || (up == 0 && !above) ? now : before) + up * pitch_y);
#pragma unroll
          for (int s = 0; s < S; ++s) ptx::mma_m16n8k16<T>(acc[k][s], a[0], a[1], a[2], a[3], b[s][0], b[s][1]);
        }
      }
    }
  }

  // Lane (g, t) has columns 2t and 2t + 1 of rows g and g + 8: the diagonal is where g / 2 == t.
  int const g = lane / 4, c = at.c0 + group * 8 + g;
  if (group >= at.groups || g / 2 != lane % 4) return;
#pragma unroll
  for (int k = 0; k < pairs; ++k)
#pragma unroll
    for (int s = 0; s < S; ++s)
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        int const r = 2 * k + second;
        if (r >= R || r >= p.R || s >= p.S) continue;
        float sum = g % 2 == 0 ? acc[k][s][2 * second] : acc[k][s][2 * second + 1];
        if (sum != sum) sum = exact_sum<T>(p, begin, end, c, r, s);
        depthwise::store_sum<T>(p.out, p.partial, p.splits, c * p.w_k + r * p.w_r + s * p.w_s,
                                (int64_t(split) * p.C + c) * p.R * p.S + r * p.S + s, sum);
      }
}

template <DType dtype, int R, int S>
cudaError_t launch_wgrad(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  int device = 0;
  Device gpu = h200_sxm;
  if (auto const error = cudaGetDevice(&device)) return error;
  if (auto const error = cudaDeviceGetAttribute(&gpu.sm_count, cudaDevAttrMultiProcessorCount, device)) return error;
  DiagonalSumsTile const t = diagonal_sums_tile(problem, R, S, gpu);
  SumsParams p{};
  Strides const &x = problem.x, &y = problem.y;
  p.x = {args.a, x.n, x.h, x.w, int(problem.H), int(problem.W), R, t.pitch_x, int(t.x_bytes)};
  p.y = {args.b, y.n, y.h, y.w, int(problem.P()), int(problem.Q()), R, t.pitch_y, int(t.y_bytes)};
  p.out = args.out, p.partial = args.workspace, p.splits = plan.split_k;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.N = problem.N, p.C = int(problem.C), p.R = int(problem.R), p.S = int(problem.S);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w), p.channel_units = int(t.channel_units);
  p.units = int(t.units()), p.groups = t.groups, p.rows = t.rows, p.pairs = t.pairs;
  p.groups_of = Divisor(uint32_t(t.groups));
  auto* const kernel = wgrad<T, R, S>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(t.channel_units * plan.split_k), unsigned(32 * t.groups), size_t(t.shared_bytes), stream>>>(p);
  if (cudaError_t const error = cudaGetLastError(); error != cudaSuccess || p.splits == 1) return error;
  return depthwise::launch_sum<T>(problem, plan, args, stream);
}

}  // namespace conv2d_ext::diagonal

#define CONV2D_EXT_DIAGONAL_WGRAD_INSTANCE(family, op, dtype, tm, tn, tk, variant)                            \
  namespace conv2d_ext {                                                                                      \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const& plan,           \
                                                                Arguments const& args, cudaStream_t stream) { \
    return diagonal::launch_wgrad<DType::dtype, tm, tn>(p, plan, args, stream);                               \
  }                                                                                                           \
  }
