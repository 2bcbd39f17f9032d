// The filter's gradient for toeplitz.cuh. For a channel and a row of the filter, blocks of 8 columns of y and the 16
// columns of x from each on:
//   d[column of x, column of y] += x[16 blocks; 16 columns]^T * y[16 blocks; 8 columns],
// and the sum of a diagonal of d is that of a tap. Half of the words of two pixels are an operand of two channels.
//
// A block of threads walks down strips as toeplitz.cuh does, with a row of x and a row of y in a stage; a warp has 4
// channels of 16 blocks of columns, of one image or of several. It keeps the last R rows of y in registers, and adds
// their products with a row of x to R sums. A block's share of the strips is fixed; the shares' sums are added by a
// second pass. What the zeros around the images make of an infinity is a NaN: such a sum is made again by single
// products.
#pragma once

#include "toeplitz.cuh"

namespace conv2d_ext::toeplitz {

struct SumsParams {
  CUtensorMap x, y;
  void const* x_data;
  void const* y_data;
  int64_t x_n, x_h, x_w, y_n, y_h, y_w;
  void* w;
  void* partial;  // [share][c][tap]
  int64_t w_k, w_r, w_s;
  int N, C, H, W, P, Q;
  int R, S, dilation_h, dilation_w, pad_h, pad_w;
  int channels, blocks, images, slices, tiles_w, rows;
  int units, each, skip, shares, stages, x_bytes, y_bytes, x_copied, y_copied, columns;  // columns: of x
};

__device__ inline Strip next_strip(SumsParams const& p, int& index, int& end) {
  return next_strip(p, index, end, 8, 0);
}

__device__ inline bool has_x(SumsParams const& p, Strip const& s, int row) {
  return unsigned(s.first + row * p.dilation_h) < unsigned(p.H);
}

struct SumsRing {
  uint64_t full[kToeplitzStages], empty[kToeplitzStages];

  __device__ void start(int stages, int readers) {
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], readers);
    }
    ptx::fence_mbarrier_init();
  }

  // The rows of the block's share in turn: of x inside the image, and of y. By one thread.
  __device__ void copy(SumsParams const& p, int index, int end, int c0, uint32_t shared) {
    int stage = 0;
    uint32_t parity = 1;
    while (index < end) {
      Strip const s = next_strip(p, index, end);
      for (int row = 0; row < s.rows + p.R - 1; ++row) {
        bool const with_x = has_x(p, s, row), with_y = row < s.rows;
        if (!with_x && !with_y) continue;
        ptx::mbarrier_wait(&empty[stage], parity);
        ptx::mbarrier_arrive_expect_tx(&full[stage], uint32_t((with_x ? p.x_copied : 0) + (with_y ? p.y_copied : 0)));
        uint32_t const to = shared + stage * (p.x_bytes + p.y_bytes);
        if (with_x)
          ptx::cp_async_bulk_tensor_4d(to, &p.x, &full[stage], c0, s.w0 - p.pad_w, s.first + row * p.dilation_h, s.n0);
        if (with_y)
          ptx::cp_async_bulk_tensor_4d(to + p.x_bytes, &p.y, &full[stage], c0, s.w0, s.h0 + row * p.dilation_h, s.n0);
        if (++stage == p.stages) stage = 0, parity ^= 1;
      }
    }
  }
};

// A tap from global memory, over the block's share.
template <class T>
__device__ __noinline__ float exact_sum(SumsParams const& p, int index, int end, int c, int r, int s) {
  float sum = 0.f;
  while (index < end) {
    Strip const strip = next_strip(p, index, end);
    for (int64_t n = strip.n0; n < strip.n0 + p.images && n < p.N; ++n) {
      T const* const x = static_cast<T const*>(p.x_data) + n * p.x_n + c;
      T const* const y = static_cast<T const*>(p.y_data) + n * p.y_n + c;
      for (int row = 0; row < strip.rows; ++row) {
        int const h = strip.h0 + row * p.dilation_h, v = h - p.pad_h + r * p.dilation_h;
        if (h >= p.P || unsigned(v) >= unsigned(p.H)) continue;
        for (int q = strip.w0; q < strip.w0 + p.blocks * 8 && q < p.Q; ++q) {
          int const u = q - p.pad_w + s * p.dilation_w;
          if (unsigned(u) < unsigned(p.W))
            sum = fmaf(widen(x[v * p.x_h + u * p.x_w]), widen(y[h * p.y_h + q * p.y_w]), sum);
        }
      }
    }
  }
  return sum;
}

// Words of two pixels, of two channels each, to words of two channels.
__device__ inline void transpose(uint2 a, uint2 b, uint32_t (&v)[4]) {
  v[0] = __byte_perm(a.x, b.x, 0x5410), v[1] = __byte_perm(a.x, b.x, 0x7632);
  v[2] = __byte_perm(a.y, b.y, 0x5410), v[3] = __byte_perm(a.y, b.y, 0x7632);
}

template <class T, int R>
__global__ void __launch_bounds__(toeplitz_threads(kToeplitzWarps), 1) wgrad(__grid_constant__ SumsParams const p) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  __shared__ SumsRing ring;
  uint32_t const padding = -ptx::shared_address(dynamic) % 1024, shared = ptx::shared_address(dynamic) + padding;
  int const share = int(blockIdx.x) / p.slices, c0 = int(blockIdx.x) % p.slices * p.channels;
  int const begin = share * p.each, end = p.units - begin < p.each ? p.units : begin + p.each;
  int const readers = p.channels / 4 * ((p.blocks * p.images + 15) / 16) * 32;  // threads
  if (threadIdx.x == 0) ring.start(p.stages, readers / 32);
  __syncthreads();
  if (!take_role<kToeplitzWarps>()) {
    if (int(threadIdx.x) == 32 * kToeplitzWarps) ring.copy(p, begin, end, c0, shared);
    return;
  }
  if (int(threadIdx.x) >= readers) return;
  ptx::griddepcontrol_launch_dependents();

  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  int const quads = p.channels / 4, quad = warp % quads, octets = p.channels / 8;
  // Blocks 4t to 4t + 3 of the warp's; of those that there are not, y is zero. Eight pixels on, the swizzle is the
  // same.
  uint32_t from_x[4], from_y[4];
  bool exists[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int const block = warp / quads * 16 + t * 4 + i;
    exists[i] = block < p.blocks * p.images;
    int const image = exists[i] ? block / p.blocks : 0;
    int const column = (exists[i] ? block - image * p.blocks : 0) * 8 + g;
    from_x[i] = shared + swizzled(image * p.columns + column, quad / 2, octets) + quad % 2 * 8;
    from_y[i] = shared + p.x_bytes + swizzled(image * p.blocks * 8 + column, quad / 2, octets) + quad % 2 * 8;
  }

  float acc[R][4][4] = {};
  uint32_t y[R][2][4];
  int stage = 0;
  uint32_t parity = 0;
  for (int index = begin, turn = end; index < turn;) {
    Strip const s = next_strip(p, index, turn);
    int const rows = s.rows + p.R - 1;
#pragma unroll
    for (int i = 0; i < R * 8; ++i) y[i / 8][i / 4 % 2][i % 4] = 0;
    // Row u of a cycle of R rows: its row of y is in place u, the one of r rows before in place (u + R - r) % R.
    auto step = [&]<int u>(std::integral_constant<int, u>, int row) {
      bool const with_x = has_x(p, s, row), with_y = row < s.rows;
      if (with_x || with_y) ptx::mbarrier_wait(&ring.full[stage], parity);
      uint32_t const offset = stage * (p.x_bytes + p.y_bytes);
      if (with_y) {
        uint2 v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i] = ptx::ld_shared_v2(from_y[i] + offset);
          if (!exists[i]) v[i] = make_uint2(0, 0);
        }
        transpose(v[0], v[1], y[u][0]), transpose(v[2], v[3], y[u][1]);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) y[u][i / 4][i % 4] = 0;
      }
      if (with_x) {
        uint32_t x[4][4];  // operand, channel
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint2 v[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) v[i] = ptx::ld_shared_v2(from_x[i] + offset + half * (p.channels * 16));
          transpose(v[0], v[1], x[half]), transpose(v[2], v[3], x[2 + half]);
        }
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            auto const& at = y[(u + R - r) % R];
            ptx::mma_m16n8k16<T>(acc[r][c], x[0][c], x[1][c], x[2][c], x[3][c], at[0][c], at[1][c]);
          }
      }
      if (!with_x && !with_y) return;
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&ring.empty[stage]);
      if (++stage == p.stages) stage = 0, parity ^= 1;
    };
#pragma unroll 1
    for (int row = 0; row < rows; row += R)
      [&]<int... u>(std::integer_sequence<int, u...>) {
        ((row + u < rows ? step(std::integral_constant<int, u>(), row + u) : void()), ...);
      }(std::make_integer_sequence<int, R>());
  }

  // Diagonals of a warp's d, one row of the filter after the other, then the sums of the warps that share channels.
  ptx::bar_sync(1, readers);
  float* const d = reinterpret_cast<float*>(dynamic + padding) + warp * 512;
  float* const totals = reinterpret_cast<float*>(dynamic + padding) + readers / 32 * 512;
  int const taps = p.R * p.S, group = warp / quads;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r >= p.R) break;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float* const to = d + c * 128 + g * 8 + t * 2;
      *reinterpret_cast<float2*>(to) = make_float2(acc[r][c][0], acc[r][c][1]);
      *reinterpret_cast<float2*>(to + 64) = make_float2(acc[r][c][2], acc[r][c][3]);
    }
    __syncwarp();
    for (int i = lane; i < 4 * p.S; i += 32) {
      int const c = i / p.S, s = i - c * p.S;
      float const* const diagonal = d + c * 128 + s * p.dilation_w * 8;
      float sum = 0.f;
#pragma unroll
      for (int column = 0; column < 8; ++column) sum += diagonal[column * 9];
      totals[(group * p.channels + quad * 4 + c) * taps + r * p.S + s] = sum;
    }
    __syncwarp();
  }
  ptx::bar_sync(1, readers);
  int const groups = readers / 32 / quads;
  for (int i = threadIdx.x; i < p.channels * taps; i += readers) {
    int const c = c0 + i / taps, tap = i % taps, r = tap / p.S, s = tap % p.S;
    if (c >= p.C) break;
    float sum = 0.f;
    for (int other = 0; other < groups; ++other) sum += totals[other * p.channels * taps + i];
    if (sum != sum) sum = exact_sum<T>(p, begin, end, c, r, s);
    depthwise::store_sum<T>(p.w, p.partial, p.shares, c * p.w_k + r * p.w_r + s * p.w_s,
                            (int64_t(share) * p.C + c) * taps + tap, sum);
  }
}

template <DType dtype, int R>
cudaError_t launch_wgrad(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  Strides const &x = problem.x, &y = problem.y;
  int device = 0;
  Device gpu = h200_sxm;
  if (auto const error = cudaGetDevice(&device)) return error;
  if (auto const error = cudaDeviceGetAttribute(&gpu.sm_count, cudaDevAttrMultiProcessorCount, device)) return error;
  ToeplitzSumsTile const t = toeplitz_sums_tile(problem, R, gpu);
  if (t.shares != plan.split_k) return cudaErrorInvalidValue;
  SumsParams p{};
  p.x_data = args.a, p.y_data = args.b, p.w = args.out, p.partial = args.workspace;
  p.x_n = x.n, p.x_h = x.h, p.x_w = x.w, p.y_n = y.n, p.y_h = y.h, p.y_w = y.w;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.N = int(problem.N), p.C = int(problem.C), p.R = int(problem.R), p.S = int(problem.S);
  p.H = int(problem.H), p.W = int(problem.W), p.P = int(problem.P()), p.Q = int(problem.Q());
  p.dilation_h = int(problem.dilation_h), p.dilation_w = int(problem.dilation_w);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.channels = t.channels, p.blocks = t.blocks, p.images = t.images;
  p.slices = int(t.slices), p.tiles_w = int(t.tiles_w), p.rows = int(t.rows);
  p.units = int(t.units), p.each = int(t.each), p.skip = int((t.shares - 1) * t.each);
  p.shares = int(t.shares), p.stages = t.stages;
  p.x_bytes = int(t.x_bytes), p.y_bytes = int(t.y_bytes), p.columns = t.x_columns(problem);
  int const pixel = t.images * t.channels * int(sizeof(T));
  p.x_copied = p.columns * pixel, p.y_copied = t.blocks * 8 * pixel;
  if (auto const error = map_of(p.x, args.a, dtype, x, problem.C, p.W, p.H, problem.N, t.channels, p.columns, t.images))
    return error;
  if (auto const error =
          map_of(p.y, args.b, dtype, y, problem.C, p.Q, p.P, problem.N, t.channels, t.blocks * 8, t.images))
    return error;
  auto* const kernel = wgrad<T, R>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(t.slices * t.shares), toeplitz_threads(kToeplitzWarps), size_t(t.shared_bytes), stream>>>(p);
  if (cudaError_t const error = cudaGetLastError(); error != cudaSuccess || p.shares == 1) return error;
  return depthwise::launch_sum<T>(problem, plan, args, stream, true);
}

}  // namespace conv2d_ext::toeplitz

#define CONV2D_EXT_TOEPLITZ_WGRAD_INSTANCE(family, op, dtype, tm, tn, tk, variant)                            \
  namespace conv2d_ext {                                                                                      \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const& plan,           \
                                                                Arguments const& args, cudaStream_t stream) { \
    return toeplitz::launch_wgrad<DType::dtype, tm>(p, plan, args, stream);                                   \
  }                                                                                                           \
  }
