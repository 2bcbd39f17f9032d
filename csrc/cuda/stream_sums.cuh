// wgrad in 16-bit types of images whose planes lie one after the other in memory (stream_planes.cuh brings them).
// A product sums over columns as they lie: its 16 rows are rows of x, its 8 columns rows of y, and what it sums over 16
// columns of both, y's moved by a tap s. Its element of rows m of x and n of y belongs to tap r = m - n * stride, if
// there is one, so the sums of all images stay in the same registers. With stride 2, columns of y have zeros between
// them. Images of up to 8 columns are summed over by twos.
#pragma once

#include "give_back.cuh"
#include "stream_planes.cuh"

namespace conv2d_ext::stream {

// What a lane takes of a row of y: words, or with stride 2 elements. Its own columns begin `low` after the first.
template <int R, int stride>
struct SumsWindow {
  static constexpr int half = R / 2, low = stride == 1 ? (half + 1) / 2 * 2 : half / 2;
  static constexpr int count = stride == 1 ? (half + 3 + low) / 2 + 1 : 2 + (half + 1) / 2 + low;

  // Columns 2 i and 2 i + 1 of x meet these of y by tap s.
  __device__ static uint32_t pair(uint32_t const (&v)[count], int s, int i) {
    if constexpr (stride == 1) {
      int const o = half - s + 2 * i + low;
      return o % 2 == 0 ? v[o / 2] : __byte_perm(v[o / 2], v[o / 2 + 1], 0x5432);
    } else {
      int const o = half - s;
      return o % 2 == 0 ? v[low + i + o / 2] : v[low + i + (o + 1) / 2] << 16;
    }
  }
};

// `count` words from `from` on; `odd`: which may lie across words.
template <int count, bool odd>
__device__ inline void load_words(uint32_t from, uint32_t (&v)[count]) {
  if constexpr (odd) {
    uint32_t words[count + 1];
#pragma unroll
    for (int i = 0; i <= count; ++i) words[i] = ptx::ld_shared((from & ~3u) + 4 * i);
    uint32_t const which = from & 2 ? 0x5432 : 0x3210;
#pragma unroll
    for (int i = 0; i < count; ++i) v[i] = __byte_perm(words[i], words[i + 1], which);
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) v[i] = ptx::ld_shared(from + 4 * i);
  }
}

// A value that the compiler would else work out again for every product, which takes longer than that.
__device__ inline uint32_t kept(uint32_t v) { return uint32_t(ptx::unknown(int(v))); }

__device__ inline uint32_t inside(int column, int columns) {
  return (unsigned(column) < unsigned(columns) ? 0xffffu : 0u) |
         (unsigned(column + 1) < unsigned(columns) ? 0xffff0000u : 0u);
}

// A block sums over its share of the groups of images; of a channel's images and products of rows, 8 / channels warps
// take turns.
template <class T, int R, int stride, bool odd, bool bands = false>
__global__ void __launch_bounds__(kPlanesWarps * 32, sums_blocks(R)) sum_planes(__grid_constant__ Params const p) {
  using Window = SumsWindow<R, stride>;
  constexpr int count = Window::count;
  extern __shared__ __align__(16) unsigned char shared[];
  ptx::griddepcontrol_launch_dependents();
  SumsTile const& tile = p.sums;
  int const lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4, warp = planes_warp();
  int const part = warp / p.channels, parts = kPlanesWarps / p.channels, channel = warp - part * p.channels;
  int const units = p.C / p.channels;
  int const unit = int(blockIdx.x % unsigned(units)), split = int(blockIdx.x / unsigned(units)), c0 = unit * p.channels;
  uint32_t const begin = uint32_t(uint64_t(p.groups) * split / p.splits);
  uint32_t const end = uint32_t(uint64_t(p.groups) * (split + 1) / p.splits);
  int const row_bytes = p.in.W * int(sizeof(T)), row_bytes_y = p.y.W * int(sizeof(T));

  // Lane t has columns 4 t to 4 t + 3 of 16.
  int const twice = tile.twice, pair = twice ? t / 2 : 0, quad = twice ? t % 2 : t;
  int const x0 = tile.x0 + 4 * quad, y0 = tile.y0 + (stride == 1 ? 4 : 2) * quad - Window::low;
  uint32_t first_x[2], first_y[count], last_x[2], last_y[count];  // masks of the first and the last step
  auto masks = [&](int k, uint32_t (&x)[2], uint32_t (&y)[count]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) x[i] = kept(inside(x0 + 16 * k + 2 * i, p.in.W));
#pragma unroll
    for (int i = 0; i < count; ++i)
      if constexpr (stride == 1)
        y[i] = kept(inside(y0 + 16 * k + 2 * i, p.y.W));
      else
        y[i] = kept(unsigned(y0 + 8 * k + i) < unsigned(p.y.W) ? 0xffff : 0);
  };
  masks(0, first_x, first_y);
  masks(tile.steps - 1, last_x, last_y);
  uint32_t const planes = kept(planes_stages() + channel * (bands ? p.channel_bytes : p.in.H * row_bytes) +
                               pair * p.image_bytes + x0 * int(sizeof(T)));
  uint32_t const planes_y =
      kept(planes_stages() + p.images * p.image_bytes + channel * (bands ? p.channel_bytes_y : p.y.H * row_bytes_y) +
           pair * p.image_bytes_y + y0 * int(sizeof(T)));
  uint32_t const zeros = kept(planes_stages() + p.stages * p.stage_bytes);  // instead of rows outside

  auto full = [](int stage) { return planes_barrier(stage); };
  auto empty = [&](int stage) { return planes_barrier(p.stages + stage); };
  if (threadIdx.x == 0)
    for (int i = 0; i < p.stages; ++i) ptx::mbarrier_init(full(i), 1), ptx::mbarrier_init(empty(i), kPlanesWarps);
  ptx::fence_mbarrier_init();
  for (int i = 4 * int(threadIdx.x); i < tile.zeros; i += 4 * int(blockDim.x)) ptx::st_shared(zeros + i, 0);
  __syncthreads();
  PlanesItem at(p, unit * p.groups + begin), ahead = at;
  auto fill = [&](int stage) {
    if constexpr (bands)
      fill_band<T, true>(p, Band<R, stride, false>(p, ahead.group), c0, stage);
    else
      fill_planes<T, true>(p, ahead, stage);
    ahead.next(p);
  };
  if (warp == 0)
#pragma unroll 1
    for (uint32_t i = begin; i < end && i < begin + p.stages; ++i) fill(int(i - begin));

  float acc[R][4] = {};  // of taps s
  int stage = 0, parity = 0;
#pragma unroll 1
  for (uint32_t item = begin; item < end; ++item, at.next(p)) {
    // The stage of the item before, once all warps have read it.
    if (warp == 0 && item > begin && item - 1 + p.stages < end) {
      int const before = stage == 0 ? p.stages - 1 : stage - 1;
      ptx::mbarrier_wait(empty(before), stage == 0 ? parity ^ 1 : parity);
      fill(before);
    }
    ptx::mbarrier_wait(full(stage), parity);
    uint32_t from = planes + stage * p.stage_bytes, from_y = planes_y + stage * p.stage_bytes;
    int images = 1, first = tile.first, v0 = 0, v1 = p.y.H, h0 = 0, h1 = p.in.H;  // rows
    if constexpr (bands) {
      Band<R, stride, false> const band(p, item);
      v0 = band.p0, v1 = band.p1, h0 = band.h0, h1 = band.h1, first += v0 * stride;
      // Where rows 0 would lie.
      from += band.template in<T>(p, 0, c0 + channel).within() - h0 * row_bytes;
      from_y += band.template y<T>(p, c0 + channel).within() - v0 * row_bytes_y;
    } else {
      images = ptx::unknown(at.images(p));
    }
    int const step_image = 1 + twice;
#pragma unroll 1
    for (int image = 0, b = part;;) {
      while (b >= tile.blocks) {
        b -= tile.blocks, image += step_image;
        from += p.image_bytes << twice, from_y += p.image_bytes_y << twice;
      }
      if (image >= images) break;
      bool const exists = image + pair < images;
      int const h = first + b * tile.rows * stride + g, v = v0 + b * tile.rows + g;
      bool const low = exists && unsigned(h - h0) < unsigned(h1 - h0);
      bool const high = exists && unsigned(h + 8 - h0) < unsigned(h1 - h0);
      bool const gradient = exists && g < tile.rows && v < v1;
      uint32_t at_low = low ? from + h * row_bytes : zeros, at_high = high ? from + (h + 8) * row_bytes : zeros;
      uint32_t at_y = gradient ? from_y + v * row_bytes_y : zeros;
      auto step = [&](bool masked, uint32_t const(&mask_x)[2], uint32_t const(&mask_y)[count]) {
        uint32_t x[2][2], y[count];
        load_words<2, odd>(at_low, x[0]);
        load_words<2, odd>(at_high, x[1]);
        if constexpr (stride == 1)
          load_words<count, odd>(at_y, y);
        else
#pragma unroll
          for (int i = 0; i < count; ++i) y[i] = ptx::ld_shared_u16(at_y + 2 * i);
        at_low += 32, at_high += 32, at_y += 32 / stride;
        if (masked) {
#pragma unroll
          for (int i = 0; i < 2; ++i) x[0][i] &= mask_x[i], x[1][i] &= mask_x[i];
#pragma unroll
          for (int i = 0; i < count; ++i) y[i] &= mask_y[i];
        }
#pragma unroll
        for (int s = 0; s < R; ++s)
          ptx::mma_m16n8k16<T>(acc[s], x[0][0], x[1][0], x[0][1], x[1][1], Window::pair(y, s, 0),
                               Window::pair(y, s, 1));
      };
      step(true, first_x, first_y);
#pragma unroll 1
      for (int k = 1; k < tile.steps; ++k) step(k == tile.steps - 1, last_x, last_y);
      b += parts;
    }
    uint32_t seen = 0;
#pragma unroll
    for (int s = 0; s < R; ++s) seen ^= __float_as_uint(acc[s][0]);
    give_back(empty(stage), seen);
    if (++stage == p.stages) stage = 0, parity ^= 1;
  }

  __syncthreads();
  auto add = [&](float& sum, auto& of_a_warp, int tap) {
    int const m0 = tap / p.S - tile.first - p.pad_h;
#pragma unroll 1
    for (int n = 0; n < tile.rows; ++n)
      if (int const m = m0 + n * stride; unsigned(m) < 16u) sum += of_a_warp[tap % p.S][m][n];
  };
  auto exact = [&](int c, int tap) { return exact_sum<T, stride>(p, c, begin, end, tap / p.S, tap % p.S); };
  store_planes_sums<T>(p, c0, split, acc, shared, lane, warp, add, exact);
}

}  // namespace conv2d_ext::stream
