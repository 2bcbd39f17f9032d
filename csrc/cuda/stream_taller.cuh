// Filters of ten to fifteen taps in 16-bit types with stride 1, fprop and dgrad: as stream_planes.cuh's bands, but that
// a unit is 4 columns of two rows of outputs (from 14 taps on 2 of four), whose 16 columns of inputs meet all taps. A
// row of inputs is multiplied by a matrix for each such group of rows of outputs that it meets: tap j of the upper row
// is tap j - 1 of the one below.
#pragma once

#include "stream_planes.cuh"

namespace conv2d_ext::stream {

template <class T, int R, bool odd, bool words>
__global__ void __launch_bounds__(kPlanesWarps * 32, kTallerBlocks) gather_taller(__grid_constant__ Params const p) {
  // Of a unit; the last row of inputs that a group of rows meets; groups of outputs that a row of inputs meets.
  constexpr int columns = stream_columns(R), tall = stream_unit_rows(R), last = R + tall - 2, A = last / tall + 1;
  constexpr int turn = tall * A;
  int const warp = planes_warp(), g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
  int const channel = PlanesStretch(p, warp).channel;
  uint32_t const begin = uint32_t(uint64_t(p.items) * blockIdx.x / gridDim.x);
  uint32_t const end = uint32_t(uint64_t(p.items) * (blockIdx.x + 1) / gridDim.x);
  uint32_t const row_bytes = p.in.W * sizeof(T), out_row_bytes = p.out_W * sizeof(T);
  int const column = band_column(p, warp);
  uint32_t to[2];  // this lane's two outputs of units g and g + 8, in the first of two places
  bool keep[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Unit const u(p, g + 8 * i);
    int const x = column + u.place * columns + 2 * t % columns;
    to[i] = planes_stages() + p.stages * p.stage_bytes + channel * p.channel_bytes_y + u.image * p.image_bytes_y +
            2 * t / columns * out_row_bytes + x * sizeof(T);
#pragma unroll
    for (int e = 0; e < 2; ++e) keep[i][e] = u.exists && x + e < p.out_W;
  }
  auto inputs_of = [&](int images) {
    return PlanePairs<2, odd>(p, p.in, images, column - p.pad_w - p.shift, columns,
                              planes_stages() + channel * p.channel_bytes, p.image_bytes);
  };
  int present = p.images;
  PlanePairs<2, odd> inputs = inputs_of(present);
  uint32_t band[last + 1][2];
  float bias = 0;
  uint32_t spoilt = 0;
  auto begin_channel = [&](int c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const s = 8 * i + 2 * t - g % columns - p.shift, lower = g / columns;
      T const* from = static_cast<T const*>(p.w) + c * p.w_k + s * p.w_s - lower * p.w_r;
#pragma unroll
      for (int j = 0; j <= last; ++j, from += p.w_r) {
        Vector<T, 2> v{{narrow<T>(0.f), narrow<T>(0.f)}};
        bool const exists = unsigned(j - lower) < unsigned(p.R);
        if (exists && unsigned(s) < unsigned(p.S)) v.v[0] = from[0];
        if (exists && unsigned(s + 1) < unsigned(p.S)) v.v[1] = from[p.w_s];
        band[j][i] = reinterpret_cast<uint32_t const&>(v);
      }
    }
    bias = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
  };
  auto walk = [&](int images, uint32_t stage, uint32_t place, PlanesStretch const& mine) {
    if (images != present) inputs = inputs_of(present = images);
    int const h0 = mine.p0 - p.pad_h, steps = mine.rows > 0 ? (mine.rows + tall - 1) / tall * tall + R - 1 : 0;
    // What lies behind the rows that are met may not be there: a zero would meet it.
    unsigned const h1 = unsigned(max(min(p.in.H, h0 + mine.rows + R - 1), 0));
    // The rows above the image that come before the first group is complete are passed over.
    int const above = min(max(-h0, 0), R - 1) / tall * tall;
    uint32_t row = stage + (h0 + above) * int(row_bytes), out = place + mine.p0 * out_row_bytes;
    float acc[A][4] = {};  // of the groups that a row of inputs meets, each in its place till it is complete
#pragma unroll 1
    for (int first = above; first < steps; first += turn) {
#pragma unroll
      for (int i = 0; i < turn; ++i, row += row_bytes) {
        int const step = first + i;
        if (step >= steps) break;
        if (i % tall == 0)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i / tall][e] = 0;
        if (unsigned(h0 + step) < h1) {
          uint32_t a[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) a[j] = inputs.load(row, j / 2, j % 2);
#pragma unroll
          for (int j = 0; j < A; ++j)
            if (int const k = i % tall + tall * j; k <= last)
              ptx::mma_m16n8k16<T>(acc[(i / tall - j + A) % A], a[0], a[1], a[2], a[3], band[k][0], band[k][1]);
        }
        if (i % tall != last % tall || step < last) continue;
        float const(&sum)[4] = acc[(i / tall + 1) % A];
        bool const exists = step - last + 2 * t / columns < mine.rows;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          uint32_t const v = planes_pair<T>(sum[2 * k] + bias, sum[2 * k + 1] + bias, spoilt);
          uint32_t const at = to[k] + out;
          if constexpr (words) {
            if (keep[k][0] && exists) ptx::st_shared(at, v);
          } else {
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (keep[k][e] && exists) ptx::st_shared_u16(at + 2 * e, uint16_t(v >> 16 * e));
          }
        }
        out += tall * out_row_bytes;
      }
    }
  };
  for_each_band<T, Band<R, 1, false>>(p, warp, channel, begin, end, begin_channel, walk);
  if_spoilt(p, warp, begin, end, is_spoilt(spoilt), [&](uint32_t task) { again<T, 1, columns>(p, task); });
}

}  // namespace conv2d_ext::stream
