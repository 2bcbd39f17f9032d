// Depthwise convolution in channels_last on tensor cores (mma.sync), float16 and bfloat16, stride 1, filters of up to
// R x S taps: a tap of 8 channels is the 8 x 8 diagonal matrix of their weights,
//   out[16 pixels, 8 channels] += in[the pixels, moved by the tap; 8 channels] * diagonal(w[tap, 8 channels]).
// Seven eighths of the multiplications are with zeros, but no element is converted, and an instruction does 256 of use.
//
// A block walks down a strip of an image in steps of R rows, which wait in shared memory, in a ring of stages, as
// planes [row][pixel] of 8 channels, one for each warp. A row of inputs, loaded by ldmatrix once for each s, is
// multiplied with R filter rows into R rows of sums, which a warp holds from step to step; a finished row takes the
// place of the inputs of the step, and then goes to memory. Images of up to 8 columns go in pairs: pixels 8 to 15 are
// of the second. dgrad is fprop with the filter turned round. Needs C % 8 == 0 and 16-byte alignment.
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
  bool turned, pairs;
  int tiles_h, tiles_w, channel_units, groups, rows, strips, images;
  Divisor groups_of;
};

struct Where {
  int p0, q0, c0, groups, images;
  int64_t n0;  // of the first image
};

// Rows of a tensor from row h0 and column w0 of an image on; zeros outside the image. `half`: columns of an image, if
// there are two. A thread stays in a column: rows cost it additions.
template <class T>
__device__ inline void load_rows(Image const& s, Where const& at, int image, int half, int h0, int w0, int groups,
                                 Divisor const& groups_of, unsigned char* planes) {
  int const total = s.pitch * groups, row_bytes = s.pitch * 16;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    int const column = int(groups_of.quotient(i)), group = i - column * groups, second = column >= half;
    int const w = w0 + column - (second ? half : 0);
    bool const exists = unsigned(w) < unsigned(s.W) && group < at.groups && image + second < at.images;
    T const* from =
        static_cast<T const*>(s.data) + (at.n0 + image + second) * s.n + h0 * s.h + w * s.w + at.c0 + group * 8;
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

template <class T>
__device__ inline void store_again(Params const& p, Where const& at) {
  int const columns = p.pairs ? 8 : 16 * p.strips, channels = at.groups * 8, pixels = p.rows * columns;
  for (int64_t n = at.n0; n < at.n0 + at.images; ++n)
    for (int i = threadIdx.x; i < pixels * channels; i += blockDim.x) {
      int const pixel = i / channels, c = at.c0 + i % channels;
      int const y = at.p0 + pixel / columns, x = at.q0 + pixel % columns;
      if (y < p.out_H && x < p.out_W)
        static_cast<T*>(p.out)[n * p.out_n + y * p.out_h + x * p.out_w + c] =
            narrow<T>(depthwise::exact<T, true>(p, n, c, y, x));
    }
}

// A step's outputs, rows `first` to `last` of the stage; row 0 is row y of the image. A thread stays in a column.
template <class T>
__device__ inline void store_rows(Params const& p, Where const& at, int image, int y, int first, int last,
                                  unsigned char const* planes) {
  int const total = 16 * p.strips * p.groups, row_bytes = p.in.pitch * 16;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    int const column = int(p.groups_of.quotient(i)), group = i - column * p.groups;
    int const second = p.pairs && column >= 8, x = at.q0 + column - 8 * second;
    if (group >= at.groups || x >= p.out_W || image + second >= at.images) continue;
    T* to = static_cast<T*>(p.out) + (at.n0 + image + second) * p.out_n + (y + first) * p.out_h + x * p.out_w + at.c0 +
            group * 8;
    unsigned char const* from =
        planes + group * p.in.plane_bytes + (column + second * (p.in.pitch / 2 - 8)) * 16 + first * row_bytes;
#pragma unroll 4
    for (int row = first; row < last; ++row, to += p.out_h, from += row_bytes)
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
#pragma unroll
    for (int ns = 0; ns < NS; ++ns) {
      uint32_t a[S / 2 + 1][4];
#pragma unroll
      for (int s = 0; s < S; s += 2) {
        uint32_t const address = from + u * row_bytes + ns * 256 + s * 16;
        if (s + 1 < S)
          ptx::ldmatrix_x4(a[s / 2], address);
        else
          ptx::ldmatrix_x2(reinterpret_cast<uint32_t (&)[2]>(a[s / 2]), address);
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (edge && (i - r < 0 || i - r >= rows)) continue;
        float (&sum)[4] = acc[(u - r + R) % R][ns];
        if (r == 0) sum[0] = bias0, sum[1] = bias1, sum[2] = bias0, sum[3] = bias1;
#pragma unroll
        for (int s = 0; s < S; s += 2) {
          uint32_t const(&v)[4] = a[s / 2];
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

template <class T, int R, int S, int NS>
__global__ void __launch_bounds__(kMaxThreads, kDiagonalBlocks) gather(__grid_constant__ Params const p) {
  extern __shared__ __align__(16) unsigned char shared[];
  uint32_t index = blockIdx.x;
  Where at;
  at.c0 = depthwise::split_off(index, p.channel_units) * p.groups * 8;
  at.groups = (p.C - at.c0) / 8 < p.groups ? (p.C - at.c0) / 8 : p.groups;
  at.q0 = depthwise::split_off(index, p.tiles_w) * 16 * NS;
  at.p0 = depthwise::split_off(index, p.tiles_h) * p.rows;
  int const images = p.pairs ? 2 : 1, half = p.pairs ? p.in.pitch / 2 : p.in.pitch;
  at.n0 = int64_t(index) * p.images * images;
  at.images = int(depthwise::smaller(p.N - at.n0, p.images * images));
  int const rows = p.out_H - at.p0 < p.rows ? p.out_H - at.p0 : p.rows;
  int const steps_of_image = (rows + R - 1 + R - 1) / R;
  int const steps = (at.images + images - 1) / images * steps_of_image, stage_bytes = p.groups * p.in.plane_bytes;

  int next = 0, next_row = 0, next_image = 0;
  auto load = [&] {  // of step `next`; a group of copies that is empty behind the last
    if (next < steps)
      load_rows<T>(p.in, at, next_image, half, at.p0 - p.pad_h + next_row, at.q0 - p.pad_w, p.groups, p.groups_of,
                   shared + next % kDiagonalStages * stage_bytes);
    ptx::cp_async_commit_group();
    ++next, next_row += R;
    if (next_row >= steps_of_image * R) next_row = 0, next_image += images;
  };
#pragma unroll
  for (int stage = 0; stage < kDiagonalStages - 1; ++stage) load();

  int const lane = int(threadIdx.x) % 32, group = int(threadIdx.x) / 32, c0 = at.c0 + group * 8;
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
  uint32_t const row_bytes = p.in.pitch * 16;
  uint32_t const plane = ptx::shared_address(shared) + group * p.in.plane_bytes +
                         (lane % 8 + (lane % 16 >= 8 ? (p.pairs ? half : 8) : 0)) * 16;
  uint32_t most = 0;
  float acc[R][NS][4];
  int image = 0, i0 = 0;  // the step's, and its first row
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<kDiagonalStages - 2>();
    __syncthreads();  // the step's rows are there, and the stage before has gone to memory
    load();
    uint32_t const stage = step % kDiagonalStages * stage_bytes;
    if (exists) {
      uint32_t const to = plane + stage, from = to + lane / 16 * 16;
      if (i0 >= R && i0 + R <= rows)
        walk<T, R, S, NS, false>(acc, taps, bias0, bias1, from, to, row_bytes, i0, rows, most);
      else
        walk<T, R, S, NS, true>(acc, taps, bias0, bias1, from, to, row_bytes, i0, rows, most);
    }
    __syncthreads();
    int const first = i0 < R - 1 ? R - 1 - i0 : 0, past = rows + R - 1 - i0;
    store_rows<T>(p, at, image, at.p0 + i0 - (R - 1), first, past < R ? past : R, shared + stage);
    i0 += R;
    if (i0 >= steps_of_image * R) i0 = 0, image += images;
  }
  if (__syncthreads_or(has_nan<T>(most)) != 0) store_again<T>(p, at);
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
  int device = 0;
  Device gpu = h200_sxm;
  if (auto const error = cudaGetDevice(&device)) return error;
  if (auto const error = cudaDeviceGetAttribute(&gpu.sm_count, cudaDevAttrMultiProcessorCount, device)) return error;
  DiagonalTile const t = diagonal_tile(op, problem, R, S, gpu);
  p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w), p.channel_units = int(t.channel_units);
  p.groups = t.groups, p.rows = t.rows, p.strips = t.strips, p.images = t.images, p.pairs = t.pairs;
  p.groups_of = Divisor(uint32_t(t.groups));
  p.in = {args.a,
          in.n,
          in.h,
          in.w,
          backward ? P : int(problem.H),
          backward ? Q : int(problem.W),
          R,
          t.pitch,
          int(t.plane_bytes)};
  auto* kernel = gather<T, R, S, 1>;
  if constexpr (R != 7)
    if (t.strips == 2) kernel = gather<T, R, S, 2>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(t.blocks()), unsigned(32 * t.groups), size_t(t.shared_bytes), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::diagonal

#define CONV2D_EXT_DIAGONAL_INSTANCE(family, op, dtype, tm, tn, tk, variant)                                  \
  namespace conv2d_ext {                                                                                      \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const& plan,           \
                                                                Arguments const& args, cudaStream_t stream) { \
    return diagonal::launch<Op::op, DType::dtype, tm, tn>(p, plan, args, stream);                             \
  }                                                                                                           \
  }
