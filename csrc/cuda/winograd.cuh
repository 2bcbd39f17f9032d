// 3x3 filters of stride 1 in strict float32, in any strides, by Winograd's F(2x2, 3x3): 16 products for 36. The 4 x 4
// inputs of a tile of 2 x 2 outputs become 16 sums of them, the filter 16 sums of its taps; the products of equal
// points, added up over channels, are 16 sums of the outputs. wgrad: the tile's 2 x 2 of y become 16 points, and the
// products, added up over tiles, are 16 sums of the filter's gradient. All sums are of an axis after the other.
//
// The points lie in the workspace as channels_last images of tiles, point by point the channels: the product is that
// of 1x1 filters in 16 groups, which a row of tma_strict*.cuh runs.
//
// A block turns 32 channels of 32 tiles; a lane has a channel, so that points are written, and read, by whole lines.
//
// Sums of infinities, and of what is near, are NaN or infinite where a single product would not be. Outputs and weights
// that are not finite are summed again, product by product.
#pragma once

#include <cfloat>
#include <type_traits>

#include "../core/winograd.h"
#include "launch.h"
#include "ptx.cuh"

namespace conv2d_ext::winograd {

constexpr int kChannels = 32, kTiles = 32, kWarps = 8, kThreads = kWarps * 32, kPoints = int(kWinogradPoints);

// A tensor in its own strides, channels from the point's first pixel on.
struct Image {
  float const* data;
  int64_t n, c, h, w;
  int H, W, channels;
};

// What becomes points: the pixel of the first tile's first row and column.
struct Side {
  Image in;
  float* points;
  int top, left;
};

struct Tiles {
  int h, w;                // of an image
  int blocks_h, blocks_w;  // of threads, of an image
};

__host__ __device__ constexpr int chunks_of(int channels) { return (channels + kChannels - 1) / kChannels; }

// The 32 tiles and 32 channels of a block.
template <int columns>
struct Place {
  static constexpr int rows = kTiles / columns;
  int64_t n;
  int h, w, channel;  // the first of each

  __device__ Place(Tiles const& tiles, int chunks) {
    int const block = int(blockIdx.x) / chunks, image = block / (tiles.blocks_h * tiles.blocks_w),
              of_image = block - image * (tiles.blocks_h * tiles.blocks_w), row = of_image / tiles.blocks_w;
    n = image, h = row * rows, w = (of_image - row * tiles.blocks_w) * columns;
    channel = (int(blockIdx.x) - block * chunks) * kChannels;
  }
};

__device__ inline bool finite(float v) { return fabsf(v) <= FLT_MAX; }

// Sums of an axis. The inputs of a tile, y's pixels of a tile, and a filter's taps; and back.
__device__ inline void input_sums(float const (&v)[4], float (&to)[4]) {
  to[0] = v[0] - v[2], to[1] = v[1] + v[2], to[2] = v[2] - v[1], to[3] = v[1] - v[3];
}
__device__ inline void pixel_sums(float const (&v)[2], float (&to)[4]) {
  to[0] = v[0], to[1] = v[0] + v[1], to[2] = v[0] - v[1], to[3] = -v[1];
}
__device__ inline void tap_sums(float const (&v)[3], float (&to)[4]) {
  float const outer = v[0] + v[2];
  to[0] = v[0], to[1] = 0.5f * (outer + v[1]), to[2] = 0.5f * (outer - v[1]), to[3] = v[2];
}
__device__ inline void outputs_of(float const (&v)[4], float (&to)[2]) {
  to[0] = v[0] + v[1] + v[2], to[1] = v[1] - v[2] - v[3];
}
__device__ inline void taps_of(float const (&v)[4], float (&to)[3]) {
  float const half = 0.5f * (v[1] + v[2]);
  to[0] = v[0] + half, to[1] = 0.5f * (v[1] - v[2]), to[2] = half + v[3];
}

// The same along both axes: of each column, then of each row.
template <int from, int to, class Sums>
__device__ inline void both_axes(float const (&v)[from][from], float (&out)[to][to], Sums const& sums) {
  float half[to][from];
#pragma unroll
  for (int j = 0; j < from; ++j) {
    float column[from], summed[to];
#pragma unroll
    for (int i = 0; i < from; ++i) column[i] = v[i][j];
    sums(column, summed);
#pragma unroll
    for (int i = 0; i < to; ++i) half[i][j] = summed[i];
  }
#pragma unroll
  for (int i = 0; i < to; ++i) sums(half[i], out[i]);
}

// Sums again, by the warp, what is not finite of its lanes' values.
template <int count, class Sum>
__device__ inline void mend(float (&v)[count], bool exists, Sum const& sum) {
  unsigned bad = 0;
#pragma unroll
  for (int i = 0; i < count; ++i)
    if (exists && !finite(v[i])) bad |= 1u << i;
  for (unsigned lanes; (lanes = __ballot_sync(0xffffffff, bad != 0)) != 0;) {
    int const whose = __ffs(int(lanes)) - 1, which = __ffs(int(__shfl_sync(0xffffffff, bad, whose))) - 1;
    float total = sum(whose, which);
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) total += __shfl_xor_sync(0xffffffff, total, lane);
    if (int(threadIdx.x) % 32 != whose) continue;
    bad &= bad - 1;
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (i == which) v[i] = total;
  }
}

// overlap: tiles of 4 x 4 inputs, else of 2 x 2 of y.
template <bool overlap, int columns>
__device__ inline void turn(Side const& a, Tiles const& tiles, float* shared) {
  constexpr int halo = overlap ? 2 : 0, side = 2 + halo, rows = Place<columns>::rows, width = 2 * columns + halo,
                all = (2 * rows + halo) * width, pitch = all | 1;
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  Place<columns> const place(tiles, chunks_of(a.in.channels));
  int const h0 = place.h * 2 + a.top, w0 = place.w * 2 + a.left,
            channels = min(kChannels, a.in.channels - place.channel);
  float const* const from = a.in.data + place.n * a.in.n + place.channel * a.in.c;
  auto value = [&](int at, int c) {
    int const row = at / width, h = h0 + row, w = w0 + at - row * width;
    bool const inside = at < all && c < channels && h >= 0 && h < a.in.H && w >= 0 && w < a.in.W;
    return inside ? __ldg(from + c * a.in.c + h * a.in.h + w * a.in.w) : 0.f;
  };
  if (a.in.c == 1) {
    constexpr int batch = (all + kWarps - 1) / kWarps;
    float v[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) v[i] = value(i * kWarps + warp, lane);
#pragma unroll
    for (int i = 0; i < batch; ++i)
      if (i * kWarps + warp < all) shared[lane * pitch + i * kWarps + warp] = v[i];
  } else {
    constexpr int batch = (all + 31) / 32;
#pragma unroll
    for (int first = 0; first < kChannels; first += 2 * kWarps) {
      float v[2][batch];
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < batch; ++i) v[j][i] = value(i * 32 + lane, first + j * kWarps + warp);
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < batch; ++i)
          if (i * 32 + lane < all) shared[(first + j * kWarps + warp) * pitch + i * 32 + lane] = v[j][i];
    }
  }
  __syncthreads();
  for (int t = warp; t < kTiles; t += kWarps) {
    int const h = place.h + t / columns, w = place.w + t % columns;
    if (h >= tiles.h || w >= tiles.w || lane >= channels) continue;
    float const* const at = shared + lane * pitch + (t / columns * width + t % columns) * 2;
    float v[side][side], sums[4][4];
#pragma unroll
    for (int i = 0; i < side; ++i)
#pragma unroll
      for (int j = 0; j < side; ++j) v[i][j] = at[i * width + j];
    if constexpr (overlap)
      both_axes(v, sums, [](float const(&f)[4], float (&o)[4]) { input_sums(f, o); });
    else
      both_axes(v, sums, [](float const(&f)[2], float (&o)[4]) { pixel_sums(f, o); });
    float* const to =
        a.points + ((place.n * tiles.h + h) * tiles.w + w) * kPoints * a.in.channels + place.channel + lane;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) to[(i * 4 + j) * int64_t(a.in.channels)] = sums[i][j];
  }
}

template <int columns>
constexpr int kShared = kChannels * (((2 * (kTiles / columns) + 2) * (2 * columns + 2)) | 1);

// A filter's points: of output n, of N_group in a group, and the group's input d.
struct Filters {
  float const* w;
  float* points;
  int64_t group, n, d, r, s;
  int N, N_group, D;  // wgrad: 0
  bool mirrored;      // dgrad

  __device__ float const* at(int64_t output, int64_t input) const {
    int64_t const of_group = output / N_group;
    return w + of_group * group + (output - of_group * N_group) * n + input * d;
  }
  __device__ int64_t tap(int i, int j) const { return (mirrored ? 2 - i : i) * r + (mirrored ? 2 - j : j) * s; }
};

__device__ inline void turn_filters(Filters const& f) {
  int64_t const at = int64_t(blockIdx.x) * kThreads + threadIdx.x, n = at / f.D, d = at - n * f.D;
  if (n >= f.N) return;
  float const* const from = f.at(n, d);
  float v[3][3], sums[4][4];
#pragma unroll
  for (int i = 0; i < 3; ++i)
#pragma unroll
    for (int j = 0; j < 3; ++j) v[i][j] = __ldg(from + f.tap(i, j));
  both_axes(v, sums, [](float const(&t)[3], float (&o)[4]) { tap_sums(t, o); });
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) f.points[(int64_t(i * 4 + j) * f.N + n) * f.D + d] = sums[i][j];
}

// blockIdx.y: 0 the inputs, 1 the filters or wgrad's y.
struct Points {
  Side inputs, pixels;
  Filters filters;
  Tiles tiles;
  int64_t images;
};

template <int columns>
__global__ void __launch_bounds__(kThreads) points_kernel(__grid_constant__ Points const p) {
  __shared__ float shared[kShared<columns>];
  ptx::griddepcontrol_launch_dependents();
  if (blockIdx.y == 1 && p.filters.N > 0) return turn_filters(p.filters);
  // The sides may differ in channels.
  int const chunks = chunks_of(blockIdx.y == 0 ? p.inputs.in.channels : p.pixels.in.channels);
  if (int64_t(blockIdx.x) >= p.images * p.tiles.blocks_h * p.tiles.blocks_w * chunks) return;
  if (blockIdx.y == 0)
    turn<true, columns>(p.inputs, p.tiles, shared);
  else
    turn<false, columns>(p.pixels, p.tiles, shared);
}

// fprop's y or dgrad's x from its points.
struct Outputs {
  float const* points;
  float* out;
  int64_t n, c, h, w;
  int H, W, channels;
  float const* bias;
  int64_t bias_stride;
  Side side;  // the inputs, for sums product by product
  Filters filters;
};

// An output's lanes' share of its products.
__device__ inline float output_again(Outputs const& q, int64_t n, int channel, int h, int w) {
  Image const& in = q.side.in;
  float const* const filter = q.filters.at(channel, 0);
  float const* const data = in.data + n * in.n + int64_t(channel / q.filters.N_group) * q.filters.D * in.c;
  float sum = 0;
  for (int begin = 0; begin < q.filters.D * 9; begin += 32) {  // of the whole warp
    int const i = begin + int(threadIdx.x) % 32, c = i / 9, tap = i - c * 9, r = tap / 3, s = tap - r * 3,
              row = h + q.side.top + r, column = w + q.side.left + s;
    if (c < q.filters.D && row >= 0 && row < in.H && column >= 0 && column < in.W)
      sum += data[c * in.c + row * in.h + column * in.w] * filter[c * q.filters.d + q.filters.tap(r, s)];
    if (__any_sync(~0u, sum != sum)) break;  // NaN, whatever comes
  }
  return sum;
}

template <int columns>
__global__ void __launch_bounds__(kThreads)
    outputs_kernel(__grid_constant__ Outputs const q, __grid_constant__ Tiles const tiles) {
  constexpr int rows = Place<columns>::rows, width = 2 * columns, all = 4 * kTiles, pitch = all | 1;
  __shared__ float shared[kChannels * pitch];
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  Place<columns> const place(tiles, chunks_of(q.channels));
  int const channel = place.channel + lane;
  bool const exists = channel < q.channels;
  float const bias = q.bias != nullptr && exists ? q.bias[channel * q.bias_stride] : 0.f;
#pragma unroll
  for (int k = 0; k < kTiles / kWarps; ++k) {
    int const t = k * kWarps + warp, h = place.h + t / columns, w = place.w + t % columns;
    if (h >= tiles.h || w >= tiles.w) continue;  // of the whole warp
    float const* const from = q.points + ((place.n * tiles.h + h) * tiles.w + w) * kPoints * q.channels + channel;
    float v[4][4], sums[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i][j] = exists ? __ldg(from + (i * 4 + j) * int64_t(q.channels)) : 0.f;
    both_axes(v, sums, [](float const(&f)[4], float (&o)[2]) { outputs_of(f, o); });
    float four[4] = {sums[0][0], sums[0][1], sums[1][0], sums[1][1]};
    mend(four, exists, [&](int whose, int which) {
      int const row = 2 * h + which / 2, column = 2 * w + which % 2;
      return row < q.H && column < q.W ? output_again(q, place.n, place.channel + whose, row, column) : 0.f;
    });
    float* const to = shared + lane * pitch + (t / columns * width + t % columns) * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i / 2 * width + i % 2] = four[i] + bias;
  }
  __syncthreads();
  float* const out = q.out + place.n * q.n + place.channel * q.c;
  auto put = [&](int at, int c) {
    int const row = at / width, h = place.h * 2 + row, w = place.w * 2 + at - row * width;
    if (place.channel + c < q.channels && h < q.H && w < q.W) out[c * q.c + h * q.h + w * q.w] = shared[c * pitch + at];
  };
  static_assert(all % 32 == 0 && rows * columns == kTiles);
  if (q.c == 1)
    for (int at = warp; at < all; at += kWarps) put(at, lane);
  else
    for (int c = warp; c < kChannels; c += kWarps)
#pragma unroll
      for (int i = 0; i < all; i += 32) put(i + lane, c);
}

// wgrad's weights from their points.
struct Weights {
  float const* points;
  float* out;
  int64_t k, c, r, s;
  Side x;
  Image y;
  int64_t N;
  int C, K;  // of a group
};

// A weight's lanes' share of its products, in chains of 16.
__device__ inline float weight_again(Weights const& q, int k, int c, int r, int s) {
  float const *const x = q.x.in.data + int64_t(k / q.K * q.C + c) * q.x.in.c, *const y = q.y.data + int64_t(k) * q.y.c;
  float total = 0, sum = 0;
  int64_t const pixels = q.N * q.y.H * q.y.W;
  for (int64_t begin = 0; begin < pixels; begin += 32) {  // of the whole warp
    int64_t const i = begin + int(threadIdx.x) % 32, row = i / q.y.W, n = row / q.y.H;
    int const w = int(i - row * q.y.W), h = int(row - n * q.y.H), above = h + q.x.top + r, left = w + q.x.left + s;
    if (begin % (32 * 16) == 0) total += sum, sum = 0;
    if (i < pixels && above >= 0 && above < q.x.in.H && left >= 0 && left < q.x.in.W)
      sum += x[n * q.x.in.n + above * q.x.in.h + left * q.x.in.w] * y[n * q.y.n + h * q.y.h + w * q.y.w];
    if (__any_sync(~0u, sum != sum)) break;  // NaN, whatever comes
  }
  return total + sum;
}

// A warp: 32 channels of a filter.
__global__ void __launch_bounds__(kThreads) weights_kernel(__grid_constant__ Weights const q) {
  __shared__ float shared[kWarps][kChannels * 9];
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int const K = q.y.channels, C = q.C, k = int(blockIdx.y) * kWarps + warp, first = int(blockIdx.x) * kChannels,
            c = first + lane;
  if (k >= K) return;
  float v[4][4], sums[3][3];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) v[i][j] = c < C ? __ldg(q.points + (int64_t(i * 4 + j) * K + k) * C + c) : 0.f;
  both_axes(v, sums, [](float const(&f)[4], float (&o)[3]) { taps_of(f, o); });
  float nine[9];
#pragma unroll
  for (int i = 0; i < 9; ++i) nine[i] = sums[i / 3][i % 3];
  mend(nine, c < C, [&](int whose, int which) { return weight_again(q, k, first + whose, which / 3, which % 3); });
  float* const out = q.out + k * q.k + first * q.c;
  if (q.c == 1) {
#pragma unroll
    for (int i = 0; i < 9; ++i)
      if (c < C) out[lane + i / 3 * q.r + i % 3 * q.s] = nine[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < 9; ++i) shared[warp][lane * 9 + i] = nine[i];
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 9; ++i) {
    int const at = i * 32 + lane, channel = at / 9, tap = at - channel * 9;
    if (first + channel < C) out[channel * q.c + tap / 3 * q.r + tap % 3 * q.s] = shared[warp][at];
  }
}

inline Image image_of(void const* data, Strides const& s, int64_t H, int64_t W, int64_t channels) {
  return {static_cast<float const*>(data), s.n, s.c, s.h, s.w, int(H), int(W), int(channels)};
}

// columns: as many tiles of a row as a block has; f is called with them as a constant.
template <class F>
cudaError_t with_columns(int64_t tiles_w, F const& f) {
  if (tiles_w <= 4) return f(std::integral_constant<int, 4>{});
  if (tiles_w <= 8) return f(std::integral_constant<int, 8>{});
  return f(std::integral_constant<int, 16>{});
}

// product: what launches the row of tma_strict with these tiles.
inline cudaError_t launch(Op op, Launcher (*product)(int tile_m, int tile_n), Problem const& problem, Plan const& plan,
                          Arguments const& args, cudaStream_t stream) {
  int sm_count = 0;
  cudaError_t error = count_sms(sm_count);
  if (error != cudaSuccess) return error;
  Winograd const t = winograd_of(op, problem, Device{sm_count, 90});
  if (t.tile_m == 0) return cudaErrorInvalidValue;
  bool const backward = op == Op::dgrad, sums = op == Op::wgrad;
  Problem const& q = t.product;
  char* const workspace = static_cast<char*>(args.workspace);
  auto points = [&](int64_t at) { return reinterpret_cast<float*>(workspace + at); };
  int64_t const P = problem.P(), Q = problem.Q();
  Side const inputs = backward ? Side{image_of(args.a, problem.y, P, Q, problem.K), points(t.x),
                                      int(problem.pad_top) - 2, int(problem.pad_left) - 2}
                               : Side{image_of(args.a, problem.x, problem.H, problem.W, problem.C), points(t.x),
                                      -int(problem.pad_top), -int(problem.pad_left)};
  Side const pixels = sums ? Side{image_of(args.b, problem.y, P, Q, problem.K), points(t.y), 0, 0} : Side{};
  Tiles tiles{int(q.H), int(q.W), 0, 0};
  auto blocks_of = [&](int columns, int64_t channels) {
    tiles.blocks_h = int(ceil_div(q.H, int64_t(kTiles / columns))),
    tiles.blocks_w = int(ceil_div(q.W, int64_t(columns)));
    return unsigned(q.N * tiles.blocks_h * tiles.blocks_w * ceil_div(channels, int64_t(kChannels)));
  };
  Filters filters{};
  filters.w = static_cast<float const*>(args.b), filters.points = points(t.w);
  filters.group = problem.K_per_group() * problem.w.n;
  filters.n = backward ? problem.w.c : problem.w.n, filters.d = backward ? problem.w.n : problem.w.c;
  filters.r = problem.w.h, filters.s = problem.w.w, filters.mirrored = backward;
  filters.N = sums ? 0 : int(q.K / kPoints), filters.N_group = int(q.K_per_group()), filters.D = int(q.C_per_group());
  error = with_columns(q.W, [&](auto columns) {
    unsigned const most = blocks_of(columns.value, max64(inputs.in.channels, pixels.in.channels)),
                   of_filters = unsigned(ceil_div(int64_t(filters.N) * filters.D, int64_t(kThreads)));
    dim3 const grid(most > of_filters ? most : of_filters, 2);
    points_kernel<columns.value><<<grid, kThreads, 0, stream>>>(Points{inputs, pixels, filters, tiles, q.N});
    return cudaGetLastError();
  });
  if (error != cudaSuccess) return error;
  Plan own_plan = t.plan;
  own_plan.kernel = plan.kernel;
  Arguments own{};
  own.a = points(t.x), own.b = points(sums ? t.y : t.w), own.out = points(sums ? t.w : t.y);
  own.workspace = workspace + t.own;
  if ((error = product(t.tile_m, t.tile_n)(q, own_plan, own, stream)) != cudaSuccess) return error;
  if (sums) {
    Weights weights{};
    weights.points = points(t.w), weights.out = static_cast<float*>(args.out);
    weights.k = problem.w.n, weights.c = problem.w.c, weights.r = problem.w.h, weights.s = problem.w.w;
    weights.x = inputs, weights.y = pixels.in, weights.N = problem.N;
    weights.C = int(problem.C_per_group()), weights.K = int(problem.K_per_group());
    dim3 const grid(unsigned(chunks_of(weights.C)), unsigned(ceil_div(problem.K, int64_t(kWarps))));
    weights_kernel<<<grid, kThreads, 0, stream>>>(weights);
    return cudaGetLastError();
  }
  Strides const& s = backward ? problem.x : problem.y;
  Outputs outputs{};
  outputs.points = points(t.y), outputs.out = static_cast<float*>(args.out);
  outputs.n = s.n, outputs.c = s.c, outputs.h = s.h, outputs.w = s.w;
  outputs.H = int(backward ? problem.H : P), outputs.W = int(backward ? problem.W : Q);
  outputs.channels = int(q.K / kPoints), outputs.side = inputs, outputs.filters = filters;
  outputs.bias = static_cast<float const*>(args.bias), outputs.bias_stride = args.bias_stride;
  return with_columns(q.W, [&](auto columns) {
    unsigned const blocks = blocks_of(columns.value, outputs.channels);
    outputs_kernel<columns.value><<<blocks, kThreads, 0, stream>>>(outputs, tiles);
    return cudaGetLastError();
  });
}

}  // namespace conv2d_ext::winograd

// The rows' launchers are of another source.
namespace conv2d_ext {
#define CONV2D_EXT_WINOGRAD_PRODUCT(family, op, dtype, tm, tn, tk, variant)                                    \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const&, Plan const&, Arguments const&, \
                                                                cudaStream_t);
CONV2D_EXT_TMA_STRICT_TILES(CONV2D_EXT_WINOGRAD_PRODUCT)
CONV2D_EXT_TMA_STRICT_WGRAD(CONV2D_EXT_WINOGRAD_PRODUCT)
#undef CONV2D_EXT_WINOGRAD_PRODUCT

namespace winograd {
template <Op product>
Launcher product_launcher(int tile_m, int tile_n) {
#define CONV2D_EXT_WINOGRAD_PRODUCT(family, op, dtype, tm, tn, tk, variant) \
  if (Op::op == product && tile_m == tm && tile_n == tn) return &family##_##op##_##dtype##_##tm##x##tn##_##variant;
  CONV2D_EXT_TMA_STRICT_TILES(CONV2D_EXT_WINOGRAD_PRODUCT)
  CONV2D_EXT_TMA_STRICT_WGRAD(CONV2D_EXT_WINOGRAD_PRODUCT)
#undef CONV2D_EXT_WINOGRAD_PRODUCT
  return nullptr;
}
}  // namespace winograd
}  // namespace conv2d_ext

#define CONV2D_EXT_WINOGRAD_INSTANCE(family, op, dtype, tm, tn, tk, variant)                      \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                       \
    constexpr Op product = Op::op == Op::wgrad ? Op::wgrad : Op::fprop;                           \
    return winograd::launch(Op::op, &winograd::product_launcher<product>, p, plan, args, stream); \
  }
