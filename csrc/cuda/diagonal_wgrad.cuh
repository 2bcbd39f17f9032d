// The filter's gradient for diagonal.cuh: for 8 channels and 16 pixels of a row
//   d[channel of y, channel of x] += y[16 pixels, 8 channels]^T * x[the pixels moved by s; 8 channels],
// of which the diagonal is the sum for a tap. The 16 rows of an instruction are the 8 channels in two rows of y: taps r
// and r + 1 for one row of x. ldmatrix turns both operands round.
//
// A block has a tile of x and of y, with the halo in rows on y's side, as planes [row][pixel] of 8 channels, one for
// each warp, and walks over its share of the tiles. Splits are added by a second pass. What an infinity makes of the
// zeros beside the diagonal is not read; of the zeros around the images: then the sum is made again by single products.
#pragma once

#include "diagonal.cuh"

namespace conv2d_ext::diagonal {

struct SumsParams {
  Image x, y;
  void* out;
  void* partial;
  int64_t w_k, w_r, w_s, N, steps;
  int C, R, S, pad_h, pad_w;
  int tiles_h, tiles_w, channel_units, groups, rows, strips, splits;
  Divisor groups_of;
};

// A tap from global memory, over the block's steps.
template <class T>
__device__ __noinline__ float exact_sum(SumsParams const& p, int64_t begin, int64_t end, int c, int r, int s) {
  T const* const x = static_cast<T const*>(p.x.data) + c;
  T const* const y = static_cast<T const*>(p.y.data) + c;
  int const columns = 16 * p.strips;
  float sum = 0.f;
  for (int64_t step = begin; step < end; ++step) {
    int const tile_w = int(step % p.tiles_w), tile_h = int(step / p.tiles_w % p.tiles_h);
    int64_t const n = step / p.tiles_w / p.tiles_h;
    for (int h = tile_h * p.rows; h < (tile_h + 1) * p.rows && h < p.x.H; ++h) {
      int const row = h + p.pad_h - r;
      if (unsigned(row) >= unsigned(p.y.H)) continue;
      for (int q = tile_w * columns; q < (tile_w + 1) * columns && q < p.y.W; ++q) {
        int const w = q + s - p.pad_w;
        if (unsigned(w) < unsigned(p.x.W))
          sum = fmaf(widen(x[n * p.x.n + h * p.x.h + w * p.x.w]), widen(y[n * p.y.n + row * p.y.h + q * p.y.w]), sum);
      }
    }
  }
  return sum;
}

template <class T, int R, int S>
__global__ void __launch_bounds__(kMaxThreads, diagonal_blocks(Op::wgrad, R))
    wgrad(__grid_constant__ SumsParams const p) {
  constexpr int pairs = (R + 1) / 2, halo = 2 * pairs - 1;
  extern __shared__ __align__(16) unsigned char shared[];
  unsigned char* const planes_y = shared + p.groups * p.x.plane_bytes;
  uint32_t index = blockIdx.x;
  int const c0 = depthwise::split_off(index, p.channel_units) * p.groups * 8, split = int(index);
  int const present = (p.C - c0) / 8 < p.groups ? (p.C - c0) / 8 : p.groups;
  int64_t const begin = p.steps * split / p.splits, end = p.steps * (split + 1) / p.splits;

  int const lane = int(threadIdx.x) % 32, group = int(threadIdx.x) / 32;
  // Matrices of B: 8 and 8 pixels for s, then for s + 1; of A: 8 pixels of row y, of y - 1, then 8 more of both.
  uint32_t const x = ptx::shared_address(shared) + group * p.x.plane_bytes + (lane % 16 + lane / 16) * 16;
  uint32_t const y = ptx::shared_address(planes_y) + group * p.y.plane_bytes +
                     ((halo - lane / 8 % 2) * p.y.pitch + lane % 8 + lane / 16 * 8) * 16;
  float acc[pairs][S][4] = {};
  for (int64_t step = begin; step < end; ++step) {
    uint32_t rest = uint32_t(step);
    int const tile_w = depthwise::split_off(rest, p.tiles_w), tile_h = depthwise::split_off(rest, p.tiles_h);
    int const h0 = tile_h * p.rows, q0 = tile_w * 16 * p.strips;
    __syncthreads();  // the last step's tiles have been read
    load_tile<T>(p.x, int64_t(rest) * p.x.n + c0, h0, q0 - p.pad_w, p.groups, present, p.groups_of, shared);
    load_tile<T>(p.y, int64_t(rest) * p.y.n + c0, h0 + p.pad_h - halo, q0, p.groups, present, p.groups_of, planes_y);
    ptx::cp_async_wait_all();
    __syncthreads();
    if (group >= present) continue;
    int const rows = p.x.H - h0 < p.rows ? p.x.H - h0 : p.rows;
    int const columns = p.y.W - q0 < 16 * p.strips ? p.y.W - q0 : 16 * p.strips;
    for (int strip = 0; strip * 16 < columns; ++strip) {
      uint32_t from_x = x + strip * 256, from_y = y + strip * 256;
#pragma unroll 1
      for (int h = 0; h < rows; ++h, from_x += p.x.pitch * 16, from_y += p.y.pitch * 16) {
        uint32_t b[S + 1][2];
#pragma unroll
        for (int s = 0; s < S; s += 2) {
          uint32_t v[4];
          if (s + 1 < S) {
            ptx::ldmatrix_x4_trans(v, from_x + s * 16);
            b[s + 1][0] = v[2], b[s + 1][1] = v[3];
          } else {
            ptx::ldmatrix_x2_trans(reinterpret_cast<uint32_t (&)[2]>(v), from_x + s * 16);
          }
          b[s][0] = v[0], b[s][1] = v[1];
        }
#pragma unroll
        for (int k = 0; k < pairs; ++k) {
          uint32_t a[4];
          ptx::ldmatrix_x4_trans(a, from_y - 2 * k * p.y.pitch * 16);
#pragma unroll
          for (int s = 0; s < S; ++s) ptx::mma_m16n8k16<T>(acc[k][s], a[0], a[1], a[2], a[3], b[s][0], b[s][1]);
        }
      }
    }
  }

  // Lane (g, t) has columns 2t and 2t + 1 of rows g and g + 8: the diagonal is where g / 2 == t.
  int const g = lane / 4, c = c0 + group * 8 + g;
  if (group >= present || g / 2 != lane % 4) return;
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
  DiagonalSumsTile const t = diagonal_sums_tile(problem, R, S);
  SumsParams p{};
  auto image = [](void const* data, Strides const& s, int64_t H, int64_t W, int rows, int pitch, int64_t bytes) {
    return Image{data, s.n, s.h, s.w, int(H), int(W), rows, pitch, int(bytes)};
  };
  p.x = image(args.a, problem.x, problem.H, problem.W, t.rows, t.pitch_x, t.x_bytes);
  p.y = image(args.b, problem.y, problem.P(), problem.Q(), t.rows_y, t.pitch_y, t.y_bytes);
  p.out = args.out, p.partial = args.workspace, p.splits = plan.split_k;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.N = problem.N, p.C = int(problem.C), p.R = int(problem.R), p.S = int(problem.S);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w), p.channel_units = int(t.channel_units);
  p.steps = problem.N * t.tiles_h * t.tiles_w, p.groups = t.groups, p.rows = t.rows, p.strips = t.strips;
  p.groups_of = Divisor(uint32_t(t.groups));
  auto* const kernel = wgrad<T, R, S>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(t.channel_units * plan.split_k), unsigned(32 * t.groups), size_t(t.shared_bytes), stream>>>(p);
  if (cudaError_t const error = cudaGetLastError(); error != cudaSuccess || p.splits == 1) return error;
  return depthwise::launch_sum<T>(problem, plan, args, stream);
}

}  // namespace conv2d_ext::diagonal

#define CONV2D_EXT_DIAGONAL_WGRAD_INSTANCE(family, op, dtype, tm, tn, tk, variant)      \
  cudaError_t conv2d_ext::family##_##op##_##dtype##_##tm##x##tn##_##variant(            \
      Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) { \
    return diagonal::launch_wgrad<DType::dtype, tm, tn>(p, plan, args, stream);         \
  }
