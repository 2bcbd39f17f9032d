// wgrad of grouped_planes.cuh: x and y are copied and turned into lines alike, and both are operands whose rows and
// columns, 64 filters and 64 channels, are contiguous; the pixels of a tile are summed over. A tap is a distance
// between the lines of y and of x. y's lines between rows and images are zeros.
//
// A block sums 64 filters by 64 channels over a share of the tiles: three warpgroups turn a tile, then multiply it,
// three taps each, while a warp has the next one copied. The three taps of a row of the filter, with stride 1, are one
// instruction, whose columns are 64 channels of each: their blocks begin a tap's distance apart. Shares go to the
// workspace, and a second kernel adds them in order. Zeros meet whatever x has there: sums that are NaN are made again,
// product by product.
#pragma once

#include "grouped_planes.cuh"
#include "grouped_tile.cuh"

namespace conv2d_ext::planes {

// 64K registers: three warpgroups turn and multiply, one copies.
constexpr int kSumming = 3 * kWarpgroup, kSumThreads = kSumming + kWarpgroup, kSumRegs = 144;
static_assert(3 * kSumRegs * kWarpgroup + kCopyRegs * kWarpgroup <= 65536, "register file");

struct SumParams {
  Side x, y;
  void* out;
  float* sums;  // [unit][split][tap][8 channels][8 filters][thread] pairs
  int64_t w_n, w_c, w_h, w_w;
  int low_w, step_w, planes_w, pitch, image_pitch, plane_pitch, rows, images, tiles_h, tiles, splits;
  int tiles_c, tiles_k, R, S, taps;
  int x_bytes, y_bytes, raw_x, raw_y, tables, pixels;  // bytes of lines, offsets in shared memory
  int distance;                                        // bytes between a row's taps
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, P, Q;
  short offset[kSumTaps];
};

struct SumTile {
  int h, n;
  __device__ SumTile(SumParams const& p, int number) {
    int const images = number / p.tiles_h;
    h = (number - images * p.tiles_h) * p.rows, n = images * p.images;
  }
};

struct SumUnit {
  int group, c, k;  // 64 channels, 64 filters of the group
  __device__ SumUnit(SumParams const& p, int unit) {
    int const of_c = unit / p.tiles_c;
    c = (unit - of_c * p.tiles_c) * 64, group = of_c / p.tiles_k, k = (of_c - group * p.tiles_k) * 64;
  }
};

template <class T, bool joined>
__device__ void sum_products(SumParams const& p, SumUnit const& unit, uint32_t lines, uint64_t* full, uint64_t* empty,
                             int const* x_line, int const* y_line, int first, int end) {
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), thread = threadIdx.x % kWarpgroup;
  int const warp = threadIdx.x / 32, warps = kSumming / 32;
  int const C = min(64, p.x.channels - unit.c), K = min(64, p.y.channels - unit.k);
  uint64_t const layout = ptx::wgmma_descriptor(0, 0, kCoreBytes);
  uint64_t const layout_b = ptx::wgmma_descriptor(0, joined ? uint32_t(p.distance) : 1024u, kCoreBytes);
  constexpr int blocks = joined ? 1 : 3;
  float acc[blocks][96 / blocks];
#pragma unroll
  for (int b = 0; b < blocks; ++b)
#pragma unroll
    for (int i = 0; i < 96 / blocks; ++i) acc[b][i] = 0;
  int const tap = group * 3, taps = min(3, p.taps - tap);
  uint32_t from[blocks];
#pragma unroll
  for (int b = 0; b < blocks; ++b) from[b] = lines / 16 + (tap + b < p.taps ? p.offset[tap + b] * 8 : 0);
  uint32_t const y = (lines + p.x_bytes) / 16;
  uint32_t parity = 0;
  for (int number = first; number < end; ++number, parity ^= 1) {
    SumTile const t(p, number);
    ptx::mbarrier_wait(full, parity);
    turn(p.x, lines + p.raw_x, lines, x_line, t.h, t.n, C / 8, warp, warps);
    turn(p.y, lines + p.raw_y, lines + p.x_bytes, y_line, t.h, t.n, K / 8, warp, warps);
    ptx::fence_proxy_async();
    ptx::bar_sync(1, kSumming);
    if (threadIdx.x == 0) ptx::mbarrier_arrive(empty);
    if (taps > 0) {
#pragma unroll
      for (int b = 0; b < blocks; ++b) ptx::wgmma_fence_operand(acc[b]);
      ptx::wgmma_fence();
#pragma unroll 1  // or descriptors are made ahead, and spill
      for (int k = 0; k < p.pixels / 16; ++k) {
#pragma unroll
        for (int b = 0; b < blocks; ++b)
          ptx::wgmma_mma_async<T, true, true>(acc[b], layout | (y + k * 128), layout_b | (from[b] + k * 128));
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
#pragma unroll
      for (int b = 0; b < blocks; ++b) ptx::wgmma_fence_operand(acc[b]);
    }
    ptx::bar_sync(1, kSumming);  // all have read the lines
  }
  float2* const to = reinterpret_cast<float2*>(p.sums) + (int64_t(blockIdx.x) * p.taps + tap) * 2048 + thread;
#pragma unroll
  for (int t = 0; t < 3; ++t) {
    if (t >= taps) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int const at = (t * 8 + j) * 4 + i * 2;
        to[t * 2048 + (j * 2 + i) * 128] =
            make_float2(acc[at / (96 / blocks)][at % (96 / blocks)], acc[at / (96 / blocks)][at % (96 / blocks) + 1]);
      }
  }
}

template <class T, bool joined>
__global__ void __launch_bounds__(kSumThreads, 1) sums_kernel(__grid_constant__ SumParams const p) {
  extern __shared__ __align__(1024) char planes[];
  uint32_t const lines = ptx::shared_address(planes);
  uint64_t* const full = reinterpret_cast<uint64_t*>(planes + p.tables);
  uint64_t* const empty = full + 1;
  int* const x_line = reinterpret_cast<int*>(planes + p.tables + kPlaneTables);
  int* const y_line = x_line + p.x.pixels;
  int const split = blockIdx.x % p.splits;
  SumUnit const unit(p, blockIdx.x / p.splits);
  int const first = int(int64_t(split) * p.tiles / p.splits), end = int(int64_t(split + 1) * p.tiles / p.splits);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(empty, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= kSumming) {
    ptx::setmaxnreg_dec<kCopyRegs>();
    if (threadIdx.x >= kSumming + 32) return;
    int const C = min(64, p.x.channels - unit.c), K = min(64, p.y.channels - unit.k);
    uint32_t parity = 1;
    for (int number = first; number < end; ++number, parity ^= 1) {
      SumTile const t(p, number);
      ptx::mbarrier_wait(empty, parity);
      auto each = [&](auto const& f) {
        each_raw(p.x, unit.group, t.h, t.n, unit.c, C,
                 [&](int to, char const* from, uint32_t n) { f(p.raw_x + to, from, n); });
        each_raw(p.y, unit.group, t.h, t.n, unit.k, K,
                 [&](int to, char const* from, uint32_t n) { f(p.raw_y + to, from, n); });
      };
      uint32_t bytes = 0;
      each([&](int, char const*, uint32_t count) { bytes += count; });
      bytes = __reduce_add_sync(0xffffffff, bytes);
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_expect_tx(full, bytes);
      __syncwarp();
      each([&](int to, char const* from, uint32_t count) { ptx::cp_async_bulk(lines + to, from, count, full); });
    }
    return;
  }
  ptx::setmaxnreg_inc<kSumRegs>();
  for (int i = threadIdx.x * 16; i < p.x_bytes + p.y_bytes; i += kSumming * 16) ptx::st_shared_v4(lines + i, uint4{});
  for (int i = threadIdx.x; i < p.x.pixels; i += kSumming) {
    int const row = i / p.x.W, w = i - row * p.x.W, image = row / p.x.rows;
    int const h = row - image * p.x.rows - (p.x.whole ? p.x.low_h : 0), u = w - p.low_w;
    int const line_h = h / p.x.step_h, plane_h = h - line_h * p.x.step_h;
    int const line_w = u / p.step_w, plane = plane_h * p.planes_w + u - line_w * p.step_w;
    int const line = plane * p.plane_pitch + image * p.image_pitch + line_h * p.pitch + line_w;
    bool const exists = h >= 0 && u >= 0 && u - line_w * p.step_w < p.planes_w && line_w < p.pitch &&
                        line_h * p.pitch < p.image_pitch && (plane + 1) * p.plane_pitch * kLineBytes <= p.x_bytes;
    x_line[i] = exists ? line * kLineBytes : -1;
  }
  for (int i = threadIdx.x; i < p.y.pixels; i += kSumming) {
    int const row = i / p.y.W, w = i - row * p.y.W, image = row / p.y.rows, h = row - image * p.y.rows;
    y_line[i] = (image * p.image_pitch + h * p.pitch + w) * kLineBytes;
  }
  ptx::fence_proxy_async();
  ptx::bar_sync(1, kSumming);
  sum_products<T, joined>(p, unit, lines, full, empty, x_line, y_line, first, end);
  ptx::griddepcontrol_launch_dependents();
}

// Product by product.
template <class T>
__device__ __noinline__ float sum_again(SumParams const& p, int group, int k, int c, int r, int s) {
  float sum = 0;
  T const* const x = static_cast<T const*>(p.x.data) + (int64_t(group) * p.x.channels + c) * p.x.H * p.x.W;
  T const* const y = static_cast<T const*>(p.y.data) + (int64_t(group) * p.y.channels + k) * p.P * p.Q;
  for (int n = 0; n < p.x.N; ++n)
    for (int i = 0; i < p.P; ++i) {
      for (int j = 0; j < p.Q; ++j) {
        int const h = i * p.stride_h - p.pad_h + r * p.dilation_h, w = j * p.stride_w - p.pad_w + s * p.dilation_w;
        if (unsigned(h) < unsigned(p.x.H) && unsigned(w) < unsigned(p.x.W))
          sum += widen(x[n * p.x.image + h * p.x.W + w]) * widen(y[n * p.y.image + i * p.Q + j]);
      }
      if (sum != sum) return sum;  // NaN, whatever comes
    }
  return sum;
}

// Adds the shares. A block has 8 filters by 8 channels, a warp for each tap.
template <class T>
__global__ void __launch_bounds__(kSumTaps * 32) add_kernel(__grid_constant__ SumParams const p) {
  __shared__ T values[8][8][kSumTaps];
  int const tap = threadIdx.x / 32, lane = threadIdx.x % 32, part = blockIdx.x % 64;
  SumUnit const unit(p, blockIdx.x / 64);
  // [8 channels j][half i][warp][lane]
  int const j = part / 8, i = part / 4 % 2, warp = part % 4;
  int const k0 = unit.k + warp * 16 + i * 8, c0 = unit.c + j * 8;
  ptx::griddepcontrol_wait();
  if (k0 >= p.y.channels || c0 >= p.x.channels) return;
  float2 const* from = reinterpret_cast<float2 const*>(p.sums) +
                       (int64_t(blockIdx.x / 64) * p.splits * p.taps + tap) * 2048 + (j * 2 + i) * 128 + warp * 32 +
                       lane;
  float low = 0, high = 0;
#pragma unroll 8
  for (int s = 0; s < p.splits; ++s, from += p.taps * 2048) {
    float2 const v = *from;
    low += v.x, high += v.y;
  }
  int const k = lane / 4, c = lane % 4 * 2;
  if (!(low == low)) low = sum_again<T>(p, unit.group, k0 + k, c0 + c, tap / p.S, tap % p.S);
  if (!(high == high)) high = sum_again<T>(p, unit.group, k0 + k, c0 + c + 1, tap / p.S, tap % p.S);
  values[k][c][tap] = narrow<T>(low), values[k][c + 1][tap] = narrow<T>(high);
  __syncthreads();
  T* const out = static_cast<T*>(p.out) + (int64_t(unit.group) * p.y.channels + k0) * p.w_n + c0 * p.w_c;
  for (int n = threadIdx.x; n < 64 * p.taps; n += blockDim.x) {
    int const filter = n / (8 * p.taps), rest = n - filter * 8 * p.taps;
    int const channel = p.w_c == 1 ? rest % 8 : rest / p.taps, t = p.w_c == 1 ? rest / 8 : rest % p.taps;
    out[filter * p.w_n + channel * p.w_c + t / p.S * p.w_h + t % p.S * p.w_w] = values[filter][channel][t];
  }
}

template <DType dtype>
cudaError_t launch_sums(Problem const& problem, PlaneSums const& t, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  GroupedAxis const h = grouped_axis_h(Op::wgrad, problem), w = grouped_axis_w(Op::wgrad, problem);
  SumParams p{};
  auto side = [&](void const* data, int64_t channels, int64_t H, int64_t W, int step_h, int low_h, int64_t rows,
                  int64_t pixels, int64_t pitch, int64_t image_bytes) {
    Side s{};
    s.data = data, s.N = int(problem.N), s.channels = int(channels), s.H = int(H), s.W = int(W);
    s.image = problem.groups * channels * H * W, s.step_h = step_h, s.low_h = low_h;
    s.rows = int(rows), s.pixels = int(pixels), s.images = int(t.images);
    s.pitch = int(pitch), s.image_bytes = int(image_bytes), s.shift = int(H * W * 2 % 16), s.whole = t.whole;
    return s;
  };
  p.x = side(args.a, problem.C_per_group(), problem.H, problem.W, h.step, h.low, t.x_rows, t.x_pixels, t.x_pitch,
             t.x_image);
  p.y = side(args.b, problem.K_per_group(), problem.P(), problem.Q(), 1, 0, t.y_rows, t.y_pixels, t.y_pitch, t.y_image);
  p.out = args.out, p.sums = static_cast<float*>(args.workspace);
  p.w_n = problem.w.n, p.w_c = problem.w.c, p.w_h = problem.w.h, p.w_w = problem.w.w;
  p.low_w = w.low, p.step_w = w.step, p.planes_w = int(t.planes_w);
  p.pitch = int(t.pitch), p.image_pitch = int(t.image_pitch), p.plane_pitch = int(t.plane_pitch);
  p.rows = int(t.rows), p.images = int(t.images), p.tiles_h = int(ceil_div(problem.P(), t.rows));
  p.tiles = int(t.tiles), p.splits = int(t.splits);
  p.tiles_c = int(ceil_div(problem.C_per_group(), 64)), p.tiles_k = int(ceil_div(problem.K_per_group(), 64));
  p.R = int(problem.R), p.S = int(problem.S), p.taps = p.R * p.S, p.pixels = int(t.pixels);
  p.x_bytes = int(t.x_lines * kLineBytes), p.y_bytes = int(t.pixels * kLineBytes);
  p.raw_x = p.x_bytes + p.y_bytes, p.raw_y = int(p.raw_x + t.x_raw);
  p.tables = int(p.raw_y + t.y_raw), p.distance = int(problem.dilation_w) * kLineBytes;
  p.stride_h = int(problem.stride_h), p.stride_w = int(problem.stride_w);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.dilation_h = int(problem.dilation_h), p.dilation_w = int(problem.dilation_w);
  p.P = int(problem.P()), p.Q = int(problem.Q());
  for (int r = 0; r < p.R; ++r)
    for (int s = 0; s < p.S; ++s) {
      int const at_h = r * p.dilation_h, at_w = s * p.dilation_w;
      int64_t const plane = at_h % h.step * t.planes_w + at_w % w.step;
      p.offset[r * p.S + s] = short(plane * t.plane_pitch + at_h / h.step * t.pitch + at_w / w.step);
    }
  auto* const kernel = plane_sums_joined(problem) ? sums_kernel<T, true> : sums_kernel<T, false>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared));
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(t.units * t.splits), kSumThreads, size_t(t.shared), stream>>>(p);
  if (cudaError_t const failed = cudaGetLastError()) return failed;
  return launch_dependent(add_kernel<T>, dim3(unsigned(t.units * 64)), p.taps * 32, 0, stream, p);
}

template <Op op, DType dtype>
cudaError_t start_row(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  int sm_count = 0;
  if (cudaError_t const error = count_sms(sm_count)) return error;
  Device const device{sm_count, 90};
  if constexpr (op == Op::wgrad)
    return launch_sums<dtype>(problem, plane_sums(problem, device), args, stream);
  else
    return launch<op, dtype>(problem, plane_tile(op, problem, device), sm_count, args, stream);
}

}  // namespace conv2d_ext::planes

#define CONV2D_EXT_GROUPED_PLANES_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                        \
    return planes::start_row<Op::op, DType::dtype>(p, args, stream);               \
  }
