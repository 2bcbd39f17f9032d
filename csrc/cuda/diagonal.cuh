// Depthwise convolution in channels_last on tensor cores (mma.sync), float16 and bfloat16, stride 1, filters of up to
// R x S taps: a tap of 8 channels is the 8 x 8 diagonal matrix of their weights,
//   out[16 pixels, 8 channels] += in[the pixels, moved by the tap; 8 channels] * diagonal(w[tap, 8 channels]).
// Seven eighths of the multiplications are with zeros, but no element is converted, and an instruction does 256 of use.
//
// A block has a tile of pixels with its halo in shared memory, as planes [row][pixel] of 8 channels, one for each warp.
// A warp walks down a strip of 16 pixels: each row of inputs, loaded by ldmatrix once for each s, is multiplied with R
// filter rows into R rows of sums. A finished row takes the place of the inputs that no row needs any more; at the end
// the block writes the tile. dgrad is fprop with the filter turned round. Needs C % 8 == 0 and 16-byte alignment.
//
// The zeros make NaN of an infinite neighbour channel; a block that finds a NaN computes its outputs again, one product
// at a time.
#pragma once

#include "../core/diagonal.h"
#include "depthwise.cuh"
#include "ptx.cuh"

namespace conv2d_ext::diagonal {

using depthwise::Divisor;

constexpr int kMaxThreads = 32 * kDiagonalGroups;

// A tensor as a block copies it: planes of rows * pitch pixels.
struct Image {
  void const* data;
  int64_t n, h, w;
  int H, W, rows, pitch, plane_bytes;
};

struct Params {
  Image in;
  void const* w;
  void const* bias;
  void* out;
  int64_t out_n, out_h, out_w;
  int64_t w_k, w_r, w_s, bias_stride;
  int64_t N;
  int C, out_H, out_W, R, S, pad_h, pad_w;
  bool turned;
  int tiles_h, tiles_w, channel_units, groups, rows, strips;
  Divisor groups_of;
};

struct Where {
  int p0, q0, c0, groups;
  int64_t n;
};

// The tile from row h0 and column w0 on; zeros outside the image. A thread stays in a column: rows cost it additions.
template <class T>
__device__ inline void load_tile(Image const& s, int64_t offset, int h0, int w0, int groups, int present,
                                 Divisor const& groups_of, unsigned char* planes) {
  int const total = s.pitch * groups, row_bytes = s.pitch * 16;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    int const column = int(groups_of.quotient(i)), group = i - column * groups, w = w0 + column;
    bool const exists = unsigned(w) < unsigned(s.W) && group < present;
    T const* from = static_cast<T const*>(s.data) + offset + h0 * s.h + w * s.w + group * 8;
    uint32_t to = ptx::shared_address(planes + group * s.plane_bytes + column * 16);
#pragma unroll 4
    for (int row = 0; row < s.rows; ++row, from += s.h, to += row_bytes)
      ptx::cp_async_16(to, from, exists && unsigned(h0 + row) < unsigned(s.H));
  }
}

// A channel group's taps: of lane (g, t) = (lane / 4, lane % 4) rows 2t and 2t + 1 of column g of the diagonal matrix.
template <class T, int R, int S>
__device__ inline void load_taps(Params const& p, int c0, uint32_t (&taps)[R][S]) {
  int const g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
  T const* row = static_cast<T const*>(p.w) + (c0 + g) * p.w_k;
  int64_t const step_r = p.turned ? -p.w_r : p.w_r, step_s = p.turned ? -p.w_s : p.w_s;
  if (p.turned) row += (p.R - 1) * p.w_r + (p.S - 1) * p.w_s;
#pragma unroll
  for (int r = 0; r < R; ++r, row += step_r) {
    T const* from = row;
#pragma unroll
    for (int s = 0; s < S; ++s, from += step_s) {
      uint16_t tap = 0;
      if (g / 2 == t && r < p.R && s < p.S) tap = *reinterpret_cast<uint16_t const*>(from);
      taps[r][s] = uint32_t(tap) << (g % 2 * 16);
    }
  }
}

template <class T>
__device__ inline uint32_t pack(float low, float high) {
  Vector<T, 2> const v{{narrow<T>(low), narrow<T>(high)}};
  return *reinterpret_cast<uint32_t const*>(&v);
}

// The larger of each half; NaN if one of the two is.
template <class T>
__device__ inline uint32_t max_or_nan(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 const v = __hmax2_nan(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<uint32_t const*>(&v);
  } else {
    __nv_bfloat162 const v =
        __hmax2_nan(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
    return *reinterpret_cast<uint32_t const*>(&v);
  }
}

template <class T>
__device__ inline bool has_nan(uint32_t v) {
  Vector<T, 2> const halves = *reinterpret_cast<Vector<T, 2>*>(&v);
  float const a = widen(halves.v[0]), b = widen(halves.v[1]);
  return a != a || b != b;
}

// One output from global memory.
template <class T>
__device__ __noinline__ float exact(Params const& p, int64_t n, int c, int y, int x) {
  T const* const in = static_cast<T const*>(p.in.data) + n * p.in.n + c;
  T const* const w = static_cast<T const*>(p.w) + c * p.w_k;
  float sum = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
  for (int r = 0; r < p.R; ++r) {
    int const h = y - p.pad_h + r;
    if (unsigned(h) >= unsigned(p.in.H)) continue;
    for (int s = 0; s < p.S; ++s) {
      int const v = x - p.pad_w + s;
      if (unsigned(v) >= unsigned(p.in.W)) continue;
      sum = fmaf(widen(in[h * p.in.h + v * p.in.w]),
                 widen(w[(p.turned ? p.R - 1 - r : r) * p.w_r + (p.turned ? p.S - 1 - s : s) * p.w_s]), sum);
    }
  }
  return sum;
}

template <class T>
__device__ inline void store_again(Params const& p, Where const& at) {
  int const columns = 16 * p.strips, total = p.rows * columns * at.groups * 8;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    int const pixel = i / (at.groups * 8), c = at.c0 + i % (at.groups * 8);
    int const y = at.p0 + pixel / columns, x = at.q0 + pixel % columns;
    if (y < p.out_H && x < p.out_W)
      static_cast<T*>(p.out)[at.n * p.out_n + y * p.out_h + x * p.out_w + c] = narrow<T>(exact<T>(p, at.n, c, y, x));
  }
}

// A thread stays in a column.
template <class T>
__device__ inline void store_tile(Params const& p, Where const& at, int rows, int columns,
                                  unsigned char const* planes) {
  int const total = columns * p.groups;
  T* const base = static_cast<T*>(p.out) + at.n * p.out_n + at.p0 * p.out_h + at.q0 * p.out_w + at.c0;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    int const column = int(p.groups_of.quotient(i)), group = i - column * p.groups;
    if (group >= at.groups) continue;
    T* to = base + column * p.out_w + group * 8;
    unsigned char const* from = planes + group * p.in.plane_bytes + column * 16;
#pragma unroll 4
    for (int row = 0; row < rows; ++row, to += p.out_h, from += p.in.pitch * 16)
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<uint4 const*>(from);
  }
}

// R rows of inputs from i0 on, for NS strips. `edge`: some of their outputs are outside the tile.
template <class T, int R, int S, int NS, bool edge>
__device__ inline void walk(float (&acc)[R][NS][4], uint32_t const (&taps)[R][S], float bias0, float bias1,
                            uint32_t from, uint32_t to, uint32_t row_bytes, int i0, int rows, uint32_t& most) {
#pragma unroll
  for (int u = 0; u < R; ++u) {
    int const i = i0 + u;
    if (edge && i >= rows + R - 1) break;
    uint32_t a[NS][S / 2 + 1][4];
#pragma unroll
    for (int ns = 0; ns < NS; ++ns)
#pragma unroll
      for (int s = 0; s < S; s += 2) {
        if (s + 1 < S)
          ptx::ldmatrix_x4(a[ns][s / 2], from + u * row_bytes + ns * 256 + s * 16);
        else
          ptx::ldmatrix_x2(reinterpret_cast<uint32_t (&)[2]>(a[ns][s / 2]), from + u * row_bytes + ns * 256 + s * 16);
      }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      constexpr auto slot = [](int u, int r) { return (u - r + R) % R; };
      if (edge && (i - r < 0 || i - r >= rows)) continue;
#pragma unroll
      for (int ns = 0; ns < NS; ++ns) {
        float (&sum)[4] = acc[slot(u, r)][ns];
        if (r == 0) sum[0] = bias0, sum[1] = bias1, sum[2] = bias0, sum[3] = bias1;
#pragma unroll
        for (int s = 0; s < S; s += 2) {
          uint32_t const(&v)[4] = a[ns][s / 2];
          if (s + 1 < S)
            ptx::mma_m16n8k16<T>(sum, v[0], v[1], v[2], v[3], taps[r][s], taps[r][s + 1]);
          else
            ptx::mma_m16n8k8<T>(sum, v[0], v[1], taps[r][s]);
        }
      }
    }
    if (edge && i - R + 1 < 0) continue;
    __syncwarp();  // the row has been read
#pragma unroll
    for (int ns = 0; ns < NS; ++ns) {
      float const(&sum)[4] = acc[(u + 1) % R][ns];
      uint32_t const low = pack<T>(sum[0], sum[1]), high = pack<T>(sum[2], sum[3]);
      most = max_or_nan<T>(max_or_nan<T>(most, low), high);
      ptx::stmatrix_x2(to + u * row_bytes + ns * 256, low, high);
    }
  }
}

template <class T, int R, int S>
__global__ void __launch_bounds__(kMaxThreads, diagonal_blocks(Op::fprop, R)) gather(__grid_constant__ Params const p) {
  constexpr int NS = R == 3 ? 2 : 1;
  extern __shared__ __align__(16) unsigned char planes[];
  uint32_t index = blockIdx.x;
  Where at;
  at.c0 = depthwise::split_off(index, p.channel_units) * p.groups * 8;
  at.groups = (p.C - at.c0) / 8 < p.groups ? (p.C - at.c0) / 8 : p.groups;
  at.q0 = depthwise::split_off(index, p.tiles_w) * 16 * p.strips;
  at.p0 = depthwise::split_off(index, p.tiles_h) * p.rows;
  at.n = index;

  load_tile<T>(p.in, at.n * p.in.n + at.c0, at.p0 - p.pad_h, at.q0 - p.pad_w, p.groups, at.groups, p.groups_of, planes);
  int const lane = int(threadIdx.x) % 32, group = int(threadIdx.x) / 32, c0 = at.c0 + group * 8;
  int const rows = p.out_H - at.p0 < p.rows ? p.out_H - at.p0 : p.rows;
  int const columns = p.out_W - at.q0 < 16 * p.strips ? p.out_W - at.q0 : 16 * p.strips;
  bool const exists = group < at.groups;
  uint32_t taps[R][S];
  float bias0 = 0.f, bias1 = 0.f;
  if (exists) {
    load_taps<T>(p, c0, taps);
    if (p.bias != nullptr) {
      T const* const bias = static_cast<T const*>(p.bias) + (c0 + lane % 4 * 2) * p.bias_stride;
      bias0 = widen(bias[0]), bias1 = widen(bias[p.bias_stride]);
    }
  }
  ptx::cp_async_wait_all();
  __syncthreads();

  uint32_t most = 0;
  if (exists) {
    uint32_t const plane = ptx::shared_address(planes) + group * p.in.plane_bytes, row_bytes = p.in.pitch * 16;
    auto strip = [&]<int count>(std::integral_constant<int, count>, int first) {
      uint32_t from = plane + (first * 16 + lane % 16 + lane / 16) * 16;
      uint32_t to = plane + (first * 16 + lane % 16) * 16 - (R - 1) * row_bytes;
      float acc[R][count][4];
      auto step = [&](int i0, auto edge) {
        walk<T, R, S, count, decltype(edge)::value>(acc, taps, bias0, bias1, from, to, row_bytes, i0, rows, most);
        from += R * row_bytes, to += R * row_bytes;
      };
      int i0 = R;
      step(0, std::true_type{});
      for (; i0 + R <= rows; i0 += R) step(i0, std::false_type{});
      for (; i0 < rows + R - 1; i0 += R) step(i0, std::true_type{});
    };
    int const strips = (columns + 15) / 16;
    int first = 0;
    if constexpr (NS > 1)
      for (; first + NS <= strips; first += NS) strip(std::integral_constant<int, NS>{}, first);
    for (; first < strips; ++first) strip(std::integral_constant<int, 1>{}, first);
  }

  if (__syncthreads_or(has_nan<T>(most)) != 0)
    store_again<T>(p, at);
  else
    store_tile<T>(p, at, rows, columns, planes);
}

// ---- host side

template <Op op, DType dtype, int R, int S>
cudaError_t launch(Problem const& problem, Plan const&, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  int const P = int(problem.P()), Q = int(problem.Q());
  Params p{};
  p.w = args.b, p.bias = args.bias, p.out = args.out, p.bias_stride = args.bias_stride;
  p.out_n = out.n, p.out_h = out.h, p.out_w = out.w;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.N = problem.N, p.C = int(problem.C), p.R = int(problem.R), p.S = int(problem.S), p.turned = backward;
  p.out_H = backward ? int(problem.H) : P, p.out_W = backward ? int(problem.W) : Q;
  p.pad_h = int(backward ? problem.R - 1 - problem.pad_top : problem.pad_top);
  p.pad_w = int(backward ? problem.S - 1 - problem.pad_left : problem.pad_left);
  DiagonalTile const t = diagonal_tile(p.out_H, p.out_W, problem.C, R, S);
  p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w), p.channel_units = int(t.channel_units);
  p.groups = t.groups, p.rows = t.rows, p.strips = t.strips, p.groups_of = Divisor(uint32_t(t.groups));
  p.in = {args.a,
          in.n,
          in.h,
          in.w,
          backward ? P : int(problem.H),
          backward ? Q : int(problem.W),
          t.rows + R - 1,
          t.pitch,
          int(t.plane_bytes)};
  auto* const kernel = gather<T, R, S>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  int64_t const blocks = t.tiles_h * t.tiles_w * t.channel_units * problem.N;
  kernel<<<unsigned(blocks), unsigned(32 * t.groups), size_t(t.shared_bytes), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::diagonal

#define CONV2D_EXT_DIAGONAL_INSTANCE(family, op, dtype, tm, tn, tk, variant)            \
  cudaError_t conv2d_ext::family##_##op##_##dtype##_##tm##x##tn##_##variant(            \
      Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) { \
    return diagonal::launch<Op::op, DType::dtype, tm, tn>(p, plan, args, stream);       \
  }
