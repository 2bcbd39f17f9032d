// fprop, and dgrad without a stride, of whole planes (stream_planes.cuh brings and stores them) of even rows of up to 32
// columns. A warp's products are of two sets of eight images' rows: the upper and the lower half of its rows of up to 16
// columns, or the left and the right 16 columns of wider ones. Two neighbouring units of each row share the 8 columns
// between them, of R rows of inputs that are in registers; the next row is loaded while those are multiplied.
#pragma once

#include "stream_planes.cuh"

namespace conv2d_ext::stream {

// What a lane has of the rows of inputs: columns 2t and 2t + 1 of each of `blocks` times 8 columns of image g, of both
// sets.
template <int blocks>
struct RowPairs {
  uint32_t address;  // of row 0 of the first set in stage 0
  uint32_t mask[blocks][2];

  __device__ RowPairs(Params const& p, int images, uint32_t planes) {
    int const image = int(threadIdx.x) % 32 / 4, x = -p.pad_w - p.shift + int(threadIdx.x) % 4 * 2;
    address = planes + (image < p.images ? image : 0) * p.image_bytes + x * 2;
#pragma unroll
    for (int set = 0; set < 2; ++set)
#pragma unroll
      for (int k = 0; k < blocks; ++k) {
        int const column = x + 8 * k + (p.span > 2 ? 16 * set : 0);
        mask[k][set] = image < images ? (unsigned(column) < unsigned(p.in.W) ? 0xffffu : 0u) |
                                            (unsigned(column + 1) < unsigned(p.in.W) ? 0xffff0000u : 0u)
                                      : 0u;
      }
  }
};

template <class T, int R, int blocks>
__global__ void __launch_bounds__(kPlanesWarps * 32, row_planes_blocks(R, blocks))
    row_planes(__grid_constant__ Params const p) {
  constexpr int kept = R + 1;  // rows of inputs in registers
  int const warp = planes_warp(), g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
  PlanesStretch const mine(p, warp);
  uint32_t const begin = uint32_t(uint64_t(p.items) * blockIdx.x / gridDim.x);
  uint32_t const end = uint32_t(uint64_t(p.items) * (blockIdx.x + 1) / gridDim.x);
  uint32_t const row_bytes = p.in.W * sizeof(T), out_row_bytes = p.out_W * sizeof(T);
  uint32_t const planes = planes_stages() + mine.channel * p.in.H * row_bytes;
  bool const wide = p.span > 2;
  int const rows = wide ? mine.rows : (mine.rows + 1) / 2;            // of outputs, of the first set
  int const second = wide ? 0 : rows, rows1 = mine.rows - second;     // the second set's first row, and its rows
  uint32_t const apart = wide ? 32 : second * row_bytes, apart_out = wide ? 32 : second * out_row_bytes;
  uint32_t const outputs = planes_stages() + p.stages * p.stage_bytes + mine.channel * p.out_H * out_row_bytes +
                           mine.p0 * out_row_bytes + (g < p.images ? g : 0) * p.image_bytes_y + 4 * t;
  bool keep[2][2];  // of units, of sets
#pragma unroll
  for (int unit = 0; unit < 2; ++unit)
#pragma unroll
    for (int set = 0; set < 2; ++set)
      keep[unit][set] = g < p.images && 8 * unit + 2 * t + (wide ? 16 * set : 0) < p.out_W;
  int present = p.images;
  RowPairs<blocks> inputs(p, present, planes);
  uint32_t band[R][1][2];
  float start[4] = {};  // the bias four times, which the compiler is not to make anew for each product
  uint32_t spoilt = 0;
  auto begin_channel = [&](int c) {
    load_band<T>(p, c, band);
    float const bias = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
#pragma unroll
    for (int e = 0; e < 4; ++e) start[e] = ptx::unknown(bias);
  };
  auto walk = [&](int images, uint32_t stage, uint32_t place) {
    if (images != present) inputs = RowPairs<blocks>(p, present = images, planes);
    int h = mine.p0 - p.pad_h;
    uint32_t row = inputs.address + stage + h * int(row_bytes), out = outputs + place;
    uint32_t x[kept][blocks][2];
    auto load = [&](uint32_t (&v)[blocks][2]) {
      bool const exists[2]{unsigned(h) < unsigned(p.in.H), unsigned(h + second) < unsigned(p.in.H)};
      auto of = [&](int set, int k) { return ptx::ld_shared(row + set * apart + 16 * k); };
      if (exists[0] && exists[1]) {
#pragma unroll
        for (int i = 0; i < 2 * blocks; ++i) v[i / 2][i % 2] = of(i % 2, i / 2);
      } else {
#pragma unroll
        for (int i = 0; i < 2 * blocks; ++i) v[i / 2][i % 2] = exists[i % 2] ? of(i % 2, i / 2) : 0;
      }
      ++h, row += row_bytes;
    };
    // Apart from the load, so that no warp waits for it at once.
    auto mask = [&](uint32_t (&v)[blocks][2]) {
#pragma unroll
      for (int i = 0; i < 2 * blocks; ++i) v[i / 2][i % 2] &= inputs.mask[i / 2][i % 2];
    };
#pragma unroll
    for (int r = 0; r < R; ++r) {
      load(x[r]);
      if (r < R - 1) mask(x[r]);
    }
#pragma unroll 1
    for (int first = 0; first < rows; first += kept) {
#pragma unroll
      for (int i = 0; i < kept; ++i) {
        if (first + i >= rows) break;
        load(x[(i + R) % kept]);
        mask(x[(i + R - 1) % kept]);
        float sum[2][4];
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e / 4][e % 4] = start[e % 4];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          uint32_t const(&v)[blocks][2] = x[(i + r) % kept];
          ptx::mma_m16n8k16<T>(sum[0], v[0][0], v[0][1], v[1][0], v[1][1], band[r][0][0], band[r][0][1]);
          if constexpr (blocks == 2)
            ptx::mma_m16n8k8<T>(sum[1], v[1][0], v[1][1], band[r][0][0]);
          else
            ptx::mma_m16n8k16<T>(sum[1], v[1][0], v[1][1], v[2][0], v[2][1], band[r][0][0], band[r][0][1]);
        }
#pragma unroll
        for (int set = 0; set < 2; ++set)
#pragma unroll
          for (int unit = 0; unit < 2; ++unit) {
            uint32_t const v = planes_pair<T>(sum[unit][2 * set], sum[unit][2 * set + 1], spoilt);
            if (keep[unit][set] && (set == 0 || first + i < rows1)) ptx::st_shared(out + set * apart_out + 16 * unit, v);
          }
        out += out_row_bytes;
      }
    }
  };
  for_each_item<T>(p, warp, mine.channel, begin, end, begin_channel, walk);
  if_spoilt(p, warp, begin, end, is_spoilt(spoilt), [&](uint32_t task) {
    again<T, 1>(p, task);
    if (wide) again<T, 1>(p, task, kStreamUnits);
  });
}

}  // namespace conv2d_ext::stream
