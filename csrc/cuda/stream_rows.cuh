// fprop, and dgrad without a stride, of whole planes (stream_planes.cuh brings and stores them) of even rows of up to
// 32 columns. A warp's products are of two sets of eight images' rows: the upper and the lower half of its rows of up
// to 16 columns, or the left and the right 16 columns of wider ones. Two neighbouring units of each row share the 8
// columns between them, of R rows of inputs that are in registers; the next row is loaded while those are multiplied.
#pragma once

#include "stream_planes.cuh"

namespace conv2d_ext::stream {

// The two sets of a warp's rows of outputs.
struct RowSets {
  bool wide;                // the right columns are the second set, or the lower rows
  int rows, second, rows1;  // of the first set; the second one's first, and its rows

  __device__ RowSets(Params const& p, PlanesStretch const& mine) {
    wide = p.span > 2, rows = wide ? mine.rows : (mine.rows + 1) / 2;
    second = wide ? 0 : rows, rows1 = mine.rows - second;
  }
  __device__ uint32_t apart(uint32_t row_bytes) const { return wide ? 32 : second * row_bytes; }
};

// What a lane has of rows of a tensor: columns 2t and 2t + 1 of each of `blocks` times 8 columns of image g, of both
// sets.
template <int blocks>
struct RowPairs {
  uint32_t address;  // of row 0 of the first set in stage 0
  uint32_t mask[blocks][2];

  // `planes`: of the warp's channel of the first image.
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
  // A row of which the sets' rows exist or not; not masked yet, lest the warp wait for it at once.
  __device__ void load(uint32_t row, uint32_t apart, bool exists0, bool exists1, uint32_t (&v)[blocks][2]) const {
    auto of = [&](int set, int k) { return ptx::ld_shared(row + set * apart + 16 * k); };
    if (exists0 && exists1) {
#pragma unroll
      for (int i = 0; i < 2 * blocks; ++i) v[i / 2][i % 2] = of(i % 2, i / 2);
    } else {
#pragma unroll
      for (int i = 0; i < 2 * blocks; ++i) v[i / 2][i % 2] = (i % 2 == 0 ? exists0 : exists1) ? of(i % 2, i / 2) : 0;
    }
  }
  __device__ void apply_mask(uint32_t (&v)[blocks][2]) const {
#pragma unroll
    for (int i = 0; i < 2 * blocks; ++i) v[i / 2][i % 2] &= mask[i / 2][i % 2];
  }
};

template <class T, int R, int blocks>
__global__ void __launch_bounds__((kPlanesWarps + 1) * 32, row_planes_blocks(R, blocks))
    row_planes(__grid_constant__ Params const p) {
  constexpr int kept = R + 1;  // rows of inputs in registers
  int const warp = planes_warp(), g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
  PlanesStretch const mine(p, warp);
  uint32_t const row_bytes = p.in.W * sizeof(T), out_row_bytes = p.out_W * sizeof(T);
  uint32_t const planes = planes_stages() + mine.channel * p.in.H * row_bytes;
  RowSets const sets(p, mine);
  uint32_t const apart = sets.apart(row_bytes), apart_out = sets.apart(out_row_bytes);
  uint32_t const outputs = planes_stages() + p.stages * p.stage_bytes + mine.channel * p.out_H * out_row_bytes +
                           mine.p0 * out_row_bytes + (g < p.images ? g : 0) * p.image_bytes_y + 4 * t;
  bool keep[2][2];  // of units, of sets
#pragma unroll
  for (int unit = 0; unit < 2; ++unit)
#pragma unroll
    for (int set = 0; set < 2; ++set)
      keep[unit][set] = g < p.images && 8 * unit + 2 * t + (sets.wide ? 16 * set : 0) < p.out_W;
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
      inputs.load(row, apart, unsigned(h) < unsigned(p.in.H), unsigned(h + sets.second) < unsigned(p.in.H), v);
      ++h, row += row_bytes;
    };
#pragma unroll
    for (int r = 0; r < R; ++r) {
      load(x[r]);
      if (r < R - 1) inputs.apply_mask(x[r]);
    }
#pragma unroll 1
    for (int first = 0; first < sets.rows; first += kept) {
#pragma unroll
      for (int i = 0; i < kept; ++i) {
        if (first + i >= sets.rows) break;
        load(x[(i + R) % kept]);
        inputs.apply_mask(x[(i + R - 1) % kept]);
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
            if (keep[unit][set] && (set == 0 || first + i < sets.rows1))
              ptx::st_shared(out + set * apart_out + 16 * unit, v);
          }
        out += out_row_bytes;
      }
    }
  };
  for_each_turn<T>(p, warp, mine.channel, begin_channel, walk);
  if_spoilt(p, warp, is_spoilt(spoilt), [&](uint32_t task) {
    again<T, 1>(p, task);
    if (sets.wide) again<T, 1>(p, task, kStreamUnits);
  });
}

// The same of planes of odd rows of up to 15 columns, which begin on words and off them in turn: the 8 or 16 columns
// that are loaded, and those that are stored, of a row off words begin one before the first. The second set are images
// 8 to 15 of rows of up to 7 columns.
template <class T, int R, int blocks>
__global__ void __launch_bounds__((kPlanesWarps + 1) * 32, kOddRowPlanesBlocks)
    odd_row_planes(__grid_constant__ Params const p) {
  constexpr int kept = R + 1;  // rows of inputs in registers: an even number, so that it is known which are off words
  static_assert(kept % 2 == 0, "odd filters");
  int const warp = planes_warp(), g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
  PlanesStretch const mine(p, warp);
  uint32_t const row_bytes = p.in.W * sizeof(T), out_row_bytes = p.out_W * sizeof(T);
  int const second = blocks == 1 ? 0 : (mine.rows + 3) / 4 * 2, rows1 = mine.rows - second;
  int const rows = blocks == 1 || mine.rows < second ? mine.rows : second;
  uint32_t const inputs =
      planes_stages() + mine.channel * p.in.H * row_bytes + (mine.p0 - p.pad_h) * int(row_bytes);  // the first row
  uint32_t const outputs =
      planes_stages() + p.stages * p.stage_bytes + (mine.channel * p.out_H + mine.p0) * out_row_bytes;
  auto in_off = [&](int row) { return int(inputs / 2 + row) % 2; };  // of rows counted from the first
  auto out_off = [&](int row) { return int(outputs / 2 + row) % 2; };
  auto image_of = [&](int set) { return g + (blocks == 1 ? 8 * set : 0); };
  uint32_t mask[2][blocks][2];  // of rows of either kind, of sets
  bool keep[2][blocks][2], half[2][blocks][2];
  auto set_masks = [&](int images) {
#pragma unroll
    for (int i = 0; i < 4 * blocks; ++i) {
      int const column = i / 2 % blocks * 8 + 2 * t - in_off(i / 2 / blocks);
      mask[i / 2 / blocks][i / 2 % blocks][i % 2] =
          image_of(i % 2) < images ? (unsigned(column) < unsigned(p.in.W) ? 0xffffu : 0u) |
                                         (unsigned(column + 1) < unsigned(p.in.W) ? 0xffff0000u : 0u)
                                   : 0u;
    }
  };
#pragma unroll
  for (int i = 0; i < 4 * blocks; ++i) {
    int const column = i / 2 % blocks * 8 + 2 * t - out_off(i / 2 / blocks);
    bool const low = unsigned(column) < unsigned(p.out_W), high = unsigned(column + 1) < unsigned(p.out_W);
    bool const exists = image_of(i % 2) < p.images;
    keep[i / 2 / blocks][i / 2 % blocks][i % 2] = exists && low && high;
    half[i / 2 / blocks][i / 2 % blocks][i % 2] = exists && low != high;
  }
  int present = p.images;
  set_masks(present);
  uint32_t in_at[2], out_at[2];  // of sets, from the first one's row
#pragma unroll
  for (int set = 0; set < 2; ++set) {
    int const image = image_of(set) < p.images ? image_of(set) : 0;
    in_at[set] = image * p.image_bytes + set * second * row_bytes + 4 * t;
    out_at[set] = image * p.image_bytes_y + set * second * out_row_bytes + 4 * t;
  }
  uint32_t band[2][R][blocks][blocks];  // of rows of outputs of either kind; of units, of 8 columns of inputs
  float start[4] = {};
  uint32_t spoilt = 0;
  auto begin_channel = [&](int c) {
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int i = 0; i < blocks * blocks; ++i) {
          int const unit = i / blocks, k = i % blocks;
          int const s = 8 * k + 2 * t - in_off(v + r) - (8 * unit + g - out_off(v)) + p.pad_w;
          T const* const from = static_cast<T const*>(p.w) + c * p.w_k + r * p.w_r + s * p.w_s;
          Vector<T, 2> pair{{narrow<T>(0.f), narrow<T>(0.f)}};
          if (r < p.R && unsigned(s) < unsigned(p.S)) pair.v[0] = from[0];
          if (r < p.R && unsigned(s + 1) < unsigned(p.S)) pair.v[1] = from[p.w_s];
          band[v][r][unit][k] = reinterpret_cast<uint32_t const&>(pair);
        }
    float const bias = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
#pragma unroll
    for (int e = 0; e < 4; ++e) start[e] = ptx::unknown(bias);
  };
  auto walk = [&](int images, uint32_t stage, uint32_t place) {
    if (images != present) set_masks(present = images);
    int h = mine.p0 - p.pad_h;
    uint32_t row = inputs + stage, out = outputs + place;
    uint32_t x[kept][blocks][2];
    auto load = [&](uint32_t (&v)[blocks][2]) {
      bool const exists[2]{unsigned(h) < unsigned(p.in.H), unsigned(h + second) < unsigned(p.in.H)};
      uint32_t const word = row & ~3u;
#pragma unroll
      for (int i = 0; i < 2 * blocks; ++i)
        v[i / 2][i % 2] = exists[i % 2] ? ptx::ld_shared(word + in_at[i % 2] + i / 2 * 16) : 0;
      ++h, row += row_bytes;
    };
    auto apply_mask = [&](int kind, uint32_t (&v)[blocks][2]) {
#pragma unroll
      for (int i = 0; i < 2 * blocks; ++i) v[i / 2][i % 2] &= mask[kind][i / 2][i % 2];
    };
#pragma unroll
    for (int r = 0; r < R; ++r) {
      load(x[r]);
      if (r < R - 1) apply_mask(r % 2, x[r]);
    }
#pragma unroll 1
    for (int first = 0; first < rows; first += kept) {
#pragma unroll
      for (int i = 0; i < kept; ++i, out += out_row_bytes) {
        if (first + i >= rows) break;
        load(x[(i + R) % kept]);
        apply_mask((i + R - 1) % 2, x[(i + R - 1) % kept]);
        float sum[blocks][4];
#pragma unroll
        for (int e = 0; e < 4 * blocks; ++e) sum[e / 4][e % 4] = start[e % 4];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int unit = 0; unit < blocks; ++unit) {
            uint32_t const(&v)[blocks][2] = x[(i + r) % kept];
            uint32_t const(&b)[blocks] = band[i % 2][r][unit];
            if constexpr (blocks == 1)
              ptx::mma_m16n8k8<T>(sum[unit], v[0][0], v[0][1], b[0]);
            else
              ptx::mma_m16n8k16<T>(sum[unit], v[0][0], v[0][1], v[1][0], v[1][1], b[0], b[1]);
          }
        uint32_t const word = out & ~3u, off = out & 2;
#pragma unroll
        for (int set = 0; set < 2; ++set)
#pragma unroll
          for (int unit = 0; unit < blocks; ++unit) {
            uint32_t const v = planes_pair<T>(sum[unit][2 * set], sum[unit][2 * set + 1], spoilt);
            uint32_t const at = word + out_at[set] + 16 * unit;
            bool const exists = set == 0 || first + i < rows1;
            if (keep[i % 2][unit][set] && exists) ptx::st_shared(at, v);
            if (half[i % 2][unit][set] && exists) ptx::st_shared_u16(at + off, uint16_t(v >> 8 * off));
          }
      }
    }
  };
  for_each_turn<T>(p, warp, mine.channel, begin_channel, walk);
  if_spoilt(p, warp, is_spoilt(spoilt), [&](uint32_t task) { again<T, 1>(p, task); });
}

}  // namespace conv2d_ext::stream
