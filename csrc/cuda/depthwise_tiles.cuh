// Depthwise convolution in NCHW (float32, one filter a channel) at memory speed: square filters of compiled size,
// stride 1 or 2, no dilation. dgrad, of stride 1, is fprop with the filter turned round. A block copies a tile of the
// input with its halo to shared memory (asynchronous copies, zero outside the image), and each thread computes TH x TW
// outputs from it, neighbours along W; a block takes several planes of small images. Blocks hide each other's copies:
// shared memory and registers allow several on an SM.
#pragma once

#include "depthwise.cuh"
#include "depthwise_spread.cuh"

namespace conv2d_ext::depthwise {

constexpr int kQuad = 4;                 // elements that a lane reads from shared memory at once
constexpr int kSharedBytes = 74 * 1024;  // three blocks fit an SM
constexpr int kMaxPlanes = 128;

// One thread's outputs, and the inputs that they meet. 7 rows: images of 7 * 2^i rows leave no row of a tile empty.
template <int R, int stride>
struct Patch {
  static constexpr int TH = 7, TW = 4;
  static constexpr int IH = (TH - 1) * stride + R, IW = (TW - 1) * stride + R;
  // A strip's inputs begin at this column of a quad where the padding is 'same'.
  static constexpr int shift = modulo(-(R - 1) / 2, kQuad);
  static constexpr int quads = (shift + IW + kQuad - 1) / kQuad;
  static_assert(TW * stride % kQuad == 0 && TW % kQuad == 0);
};

// A tensor as a block copies it to shared memory: `rows` rows of `pitch` columns of each plane.
struct Source {
  void const* data;
  int64_t n, c, h;       // element strides
  int H, W;              // extents
  int start_h, start_w;  // coordinate of the tile's first row and column for the first tile; may be negative
  int step_h, step_w;    // from tile to tile
  int rows, pitch;
  int width;        // elements of one copy
  int lanes_log2;   // threads that share a row
  Divisor rows_of;  // by `rows`
  // One tile an image: copies are counted over the image, so that no thread waits beside a short row.
  bool whole;
  Divisor image_copies, row_copies;  // of an image, of a row
};

struct Params {
  Source in;
  void const* w;
  void const* bias;
  void* out;
  int64_t w_k, w_r, w_s, bias_stride;
  int64_t out_n, out_c, out_h;
  int out_H, out_W;
  int out_width;  // elements of one store
  int C;
  int strips, row_groups, planes;  // of a block
  Divisor per_plane, per_row;      // by strips * row_groups, by strips
  int tiles_h, tiles_w, channel_units;
  int lead;          // columns before a tile's first quad
  int weight_bytes;  // of filters in shared memory, before the tile
};

template <int E>
__device__ inline void fill(Source const& s, float const* base, int64_t plane_stride, int planes, int present, int h0,
                            int w0, float* tile) {
  int const lanes = 1 << s.lanes_log2, lane = int(threadIdx.x) & (lanes - 1);
  int const step = int(blockDim.x) >> s.lanes_log2;
#pragma unroll 2
  for (int row = int(threadIdx.x) >> s.lanes_log2; row < planes * s.rows; row += step) {
    int const plane = int(s.rows_of.quotient(row)), h = h0 + row - plane * s.rows;
    bool const inside = plane < present && unsigned(h) < unsigned(s.H);
    float const* const from = base + (inside ? plane * plane_stride + h * s.h : 0);
    float* const to = tile + row * s.pitch;
#pragma unroll 2
    for (int i = lane; i < s.pitch / E; i += lanes) {
      int const w = w0 + i * E;
      int valid = w < 0 ? 0 : s.W - w;
      valid = !inside || valid < 0 ? 0 : valid > E ? E : valid;
      copy<float, E>(to + i * E, valid > 0 ? from + w : base, valid);
    }
  }
}

// The same for a whole image, into a tile that holds zeros around it.
template <int E>
__device__ inline void fill_whole(Source const& s, float const* base, int64_t plane_stride, int present, float* tile) {
  int const total = present * int(s.image_copies.value);
  for (int i = threadIdx.x; i < total; i += int(blockDim.x)) {
    int const plane = int(s.image_copies.quotient(i)), rest = i - plane * int(s.image_copies.value);
    int const h = int(s.row_copies.quotient(rest)), w = (rest - h * int(s.row_copies.value)) * E;
    copy<float, E>(tile + (plane * s.rows + h - s.start_h) * s.pitch + w - s.start_w,
                   base + plane * plane_stride + h * s.h + w, s.W - w < E ? s.W - w : E);
  }
}

__device__ inline void fill(Source const& s, float const* base, int64_t plane_stride, int planes, int present, int h0,
                            int w0, float* tile) {
  if (s.whole) {
    if (s.width == 4) fill_whole<4>(s, base, plane_stride, present, tile);
    if (s.width == 2) fill_whole<2>(s, base, plane_stride, present, tile);
    if (s.width == 1) fill_whole<1>(s, base, plane_stride, present, tile);
    return;
  }
  if (s.width == 4) fill<4>(s, base, plane_stride, planes, present, h0, w0, tile);
  if (s.width == 2) fill<2>(s, base, plane_stride, planes, present, h0, w0, tile);
  if (s.width == 1) fill<1>(s, base, plane_stride, planes, present, h0, w0, tile);
}

// A thread's `count` inputs of a row, in quads.
template <int count, int shift>
__device__ inline void load_row(float const* from, float (&in)[count]) {
#pragma unroll
  for (int quad = 0; quad < (shift + count + kQuad - 1) / kQuad; ++quad) {
    Vector<float, kQuad> const v = *reinterpret_cast<Vector<float, kQuad> const*>(from + quad * kQuad);
#pragma unroll
    for (int e = 0; e < kQuad; ++e) {
      int const j = quad * kQuad + e - shift;
      if (j >= 0 && j < count) in[j] = v.v[e];
    }
  }
}

// What a thread of a block works on: plane, row group and strip of its patch.
struct Item {
  int plane, row_group, strip;
  bool exists;
  __device__ static Item of_thread(Params const& p) {
    int const i = int(threadIdx.x);
    int const plane = int(p.per_plane.quotient(i)), rest = i - plane * int(p.per_plane.value);
    int const row_group = int(p.per_row.quotient(rest));
    return {plane, row_group, rest - row_group * int(p.per_row.value), plane < p.planes};
  }
};

template <int TH, int TW>
__device__ inline void store_rows(Params const& p, float* out, int h0, int w0, float const (&acc)[TH][TW]) {
  auto store = [&]<int width>(Vector<float, width> const&) {
#pragma unroll
    for (int a = 0; a < TH; ++a) {
      int const h = h0 + a;
      if (h >= p.out_H) break;
      float* const row = out + h * p.out_h;
#pragma unroll
      for (int b = 0; b < TW; b += width) {
        int const w = w0 + b;
        if (w + width <= p.out_W) {
          Vector<float, width> v;
#pragma unroll
          for (int e = 0; e < width; ++e) v.v[e] = acc[a][b + e];
          *reinterpret_cast<Vector<float, width>*>(row + w) = v;
        } else if constexpr (width > 1) {
#pragma unroll
          for (int e = 0; e < width; ++e)
            if (w + e < p.out_W) row[w + e] = acc[a][b + e];
        }
      }
    }
  };
  if (p.out_width == 4)
    store(Vector<float, 4>{});
  else if (p.out_width == 2)
    store(Vector<float, 2>{});
  else
    store(Vector<float, 1>{});
}

template <int R, int stride>
__global__ void __launch_bounds__(kMaxThreads, 2) gather(__grid_constant__ Params const p) {
  using F = Patch<R, stride>;
  constexpr int taps = R * R;
  extern __shared__ __align__(16) unsigned char shared[];
  float* const filters = reinterpret_cast<float*>(shared);
  float* const tile = reinterpret_cast<float*>(shared + p.weight_bytes);

  uint32_t index = blockIdx.x;
  int const tile_w = split_off(index, p.tiles_w), tile_h = split_off(index, p.tiles_h);
  int64_t const c0 = split_off(index, p.channel_units) * p.planes, n0 = index;
  int const present = int(smaller(p.C - c0, p.planes));
  float const* const base = static_cast<float const*>(p.in.data) + n0 * p.in.n + c0 * p.in.c;
  Item const item = Item::of_thread(p);
  int const c = item.plane;
  bool const works = item.exists && c < present;
  float acc[F::TH][F::TW];
  float const bias = works && p.bias != nullptr ? static_cast<float const*>(p.bias)[(c0 + c) * p.bias_stride] : 0.f;
#pragma unroll
  for (int a = 0; a < F::TH; ++a)
#pragma unroll
    for (int b = 0; b < F::TW; ++b) acc[a][b] = bias;
  if (p.in.whole) {
    clear(tile, p.planes * p.in.rows * p.in.pitch);
    __syncthreads();
  }

  fill(p.in, base, p.in.c, p.planes, present, p.in.start_h + tile_h * p.in.step_h, p.in.start_w + tile_w * p.in.step_w,
       tile);
  __pipeline_commit();
  // Filters: [channel][tap].
  float const* const w = static_cast<float const*>(p.w);
  for (int i = threadIdx.x; i < present * taps; i += blockDim.x) {
    int const which = i / taps, tap = i % taps;
    filters[i] = w[(c0 + which) * p.w_k + tap / R * p.w_r + tap % R * p.w_s];
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  if (!works) return;

  float filter[R][R];
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) filter[tap / R][tap % R] = filters[c * taps + tap];
  int const column = item.strip * F::TW * stride;
  float const* from = tile + (c * p.in.rows + item.row_group * F::TH * stride) * p.in.pitch + column + p.lead;
#pragma unroll
  for (int i = 0; i < F::IH; ++i, from += p.in.pitch) {
    float in[F::IW];
    load_row<F::IW, F::shift>(from, in);
#pragma unroll
    for (int a = 0; a < F::TH; ++a) {
      int const r = i - a * stride;
      if (r < 0 || r >= R) continue;
#pragma unroll
      for (int b = 0; b < F::TW; ++b)
#pragma unroll
        for (int s = 0; s < R; ++s) acc[a][b] = fmaf(in[b * stride + s], filter[r][s], acc[a][b]);
    }
  }

  int const h0 = (tile_h * p.row_groups + item.row_group) * F::TH;
  int const w0 = (tile_w * p.strips + item.strip) * F::TW;
  store_rows(p, static_cast<float*>(p.out) + n0 * p.out_n + (c0 + c) * p.out_c, h0, w0, acc);
}

// ---- host side

inline int log2_at_least(int64_t value) {
  int log2 = 0;
  while (log2 < 5 && (1 << log2) < value) ++log2;
  return log2;
}

// Sets how the rows of a tile are copied; `lead` columns are put before the first, so that copies are aligned.
inline int set_copies(Source& s, Strides const& strides, int align, int shift, bool several_tiles_w) {
  int lead = 0;
  s.width = 1;
  for (int v = 4; v > 1; v /= 2) {
    int const rest = modulo(int64_t(s.start_w) - shift, v);
    if (!rows_aligned(strides, false, align, 4 * v, 4)) continue;
    if (rest % kQuad != 0 || (several_tiles_w && s.step_w % v != 0)) continue;
    lead = rest, s.width = v;
    break;
  }
  s.start_w -= shift + lead;
  return lead;
}

// For one tile an image. Rows and columns that no output meets may be missing from the tile.
inline void copy_whole(Source& s) {
  int64_t const rows = min64(s.H, int64_t(s.start_h) + s.rows), columns = min64(s.W, int64_t(s.start_w) + s.pitch);
  s.whole = s.start_h <= 0 && s.start_w <= 0 && rows > 0 && columns > 0;
  if (!s.whole) return;
  int64_t const copies = ceil_div(columns, s.width);
  s.row_copies = Divisor(uint32_t(copies));
  s.image_copies = Divisor(uint32_t(copies * rows));
}

template <int R, int stride>
struct Tiling {
  using F = Patch<R, stride>;
  static constexpr int kMaxFilterBytes = kMaxPlanes * R * R * 4;
  int strips = 1, row_groups = 1, planes = 1, tiles_h = 1, tiles_w = 1;

  // Elements of a row of the tile: the most that any alignment may need.
  static constexpr int64_t pitch(int64_t strips) {
    return ceil_div(F::TW * stride * (strips - 1) + F::quads * kQuad, 8) * 8 + 8;
  }
  static constexpr int64_t rows(int64_t row_groups) { return F::TH * stride * (row_groups - 1) + F::IH; }
  static constexpr int64_t bytes(int64_t strips, int64_t row_groups) { return pitch(strips) * rows(row_groups) * 4; }

  // Takes the tile with the least copied inputs and computed outputs.
  Tiling(int64_t height, int64_t width, int64_t count) {
    constexpr int64_t budget = kSharedBytes - kMaxFilterBytes;
    int most_strips = 32;
    while (most_strips > 2 && bytes(most_strips, 1) > budget) most_strips -= 2;  // even, and two always fit
    static_assert(bytes(2, 1) <= budget);
    int64_t const all_strips = ceil_div(width, F::TW), all_groups = ceil_div(height, F::TH);
    int64_t const first = ceil_div(all_strips, most_strips);
    double best = 0;
    for (int64_t across = first; across < first + 8 && (across == first || across <= all_strips); ++across) {
      int64_t s = ceil_div(all_strips, across);
      if (across > 1 && s % 2 == 1 && s < most_strips) ++s;  // tiles begin on multiples of 8 columns
      int64_t groups = min64(kMaxThreads / s, all_groups);
      while (groups > 1 && bytes(s, groups) > budget) --groups;
      if (bytes(s, groups) > budget && s > 1) continue;
      int64_t const down = ceil_div(all_groups, groups);
      groups = ceil_div(all_groups, down);
      int64_t const tiles = ceil_div(all_strips, s) * down;
      double const cost = double(tiles) * (double(bytes(s, groups)) / 4 + 2.0 * double(s * F::TW * groups * F::TH));
      if (best != 0 && cost >= best) continue;
      best = cost;
      strips = int(s), row_groups = int(groups), tiles_h = int(down), tiles_w = int(ceil_div(all_strips, s));
    }
    int64_t const fit = min64(kMaxThreads / (strips * row_groups), budget / bytes(strips, row_groups));
    planes = int(max64(1, min64(min64(fit, kMaxPlanes), count)));
  }
};

template <Op op, int R, int stride>
cudaError_t launch_tiles(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  constexpr bool backward = op == Op::dgrad;
  static_assert(!backward || stride == 1);
  using F = Patch<R, stride>;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;

  Params p{};
  p.C = int(problem.C);
  p.out_H = int(backward ? problem.H : problem.P()), p.out_W = int(backward ? problem.W : problem.Q());
  Tiling<R, stride> const tile(p.out_H, p.out_W, problem.C);
  p.strips = tile.strips, p.row_groups = tile.row_groups, p.planes = tile.planes;
  p.tiles_h = tile.tiles_h, p.tiles_w = tile.tiles_w;
  p.per_plane = Divisor(uint32_t(p.strips * p.row_groups)), p.per_row = Divisor(uint32_t(p.strips));
  p.channel_units = int(ceil_div(problem.C, p.planes));

  p.in.data = args.a, p.in.n = in.n, p.in.c = in.c, p.in.h = in.h;
  p.in.H = int(backward ? problem.P() : problem.H), p.in.W = int(backward ? problem.Q() : problem.W);
  p.in.start_h = -int(backward ? R - 1 - problem.pad_top : problem.pad_top);
  p.in.start_w = -int(backward ? R - 1 - problem.pad_left : problem.pad_left);
  p.in.step_h = p.row_groups * F::TH * stride, p.in.step_w = p.strips * F::TW * stride;
  p.in.rows = int(tile.rows(tile.row_groups)), p.in.rows_of = Divisor(uint32_t(p.in.rows));
  p.lead = set_copies(p.in, in, backward ? problem.y_align : problem.x_align, F::shift, p.tiles_w > 1);
  p.in.pitch = int(ceil_div(p.lead + F::TW * stride * (p.strips - 1) + F::quads * kQuad, 8) * 8);
  p.in.lanes_log2 = log2_at_least(p.in.pitch / p.in.width);
  if (p.tiles_h == 1 && p.tiles_w == 1) copy_whole(p.in);

  p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  if (backward) {
    p.w = static_cast<float const*>(p.w) + (R - 1) * (p.w_r + p.w_s);
    p.w_r = -p.w_r, p.w_s = -p.w_s;
  }
  p.out = args.out, p.out_n = out.n, p.out_c = out.c, p.out_h = out.h;
  p.out_width = 1;
  for (int width = kQuad; width > 1 && p.out_width == 1; width /= 2)
    if (rows_aligned(out, false, backward ? problem.x_align : problem.y_align, width * 4, 4)) p.out_width = width;

  unsigned const threads = unsigned(ceil_div(p.planes * p.strips * p.row_groups, 32) * 32);
  p.weight_bytes = int(ceil_div(int64_t(p.planes) * R * R * 4, 16) * 16);
  int64_t const shared = p.weight_bytes + ceil_div(int64_t(p.planes) * p.in.rows * p.in.pitch * 4, 16) * 16;
  int64_t const blocks = int64_t(p.tiles_h) * p.tiles_w * p.channel_units * problem.N;
  auto* const kernel = gather<R, stride>;
  if (shared > 48 * 1024)
    if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)))
      return error;
  kernel<<<unsigned(blocks), threads, size_t(shared), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::depthwise
