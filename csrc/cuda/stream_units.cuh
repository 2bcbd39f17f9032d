// Bands of stream_planes.cuh of which a channel's warps have the units of all images and stretches in turn, whatever
// the width, so that few of a warp's 16 are left over: fprop and dgrad with stride 2 of rows of an odd number of inputs
// or outputs, and wide rows. Windows begin on words as in turned_planes; a row's are asked for while the one before is
// multiplied.
#pragma once

#include "stream_planes.cuh"

namespace conv2d_ext::stream {

// A lane's share of units g and g + 8 of its warp: `count` pairs of columns of a row of inputs. A unit has in_columns
// of inputs and out_columns of outputs; `odd`: rows begin on words and off them in turn, those of kind 0 as the first.
template <class T, int count, bool odd, int in_columns, int out_columns>
struct UnitPairs {
  static constexpr int kinds = odd ? 2 : 1;

  uint32_t address[2];  // of a window, from the first unit's on
  uint32_t to[2];       // of outputs, likewise
  uint32_t mask[kinds][count][2];
  int first[2];   // row of outputs of a band
  int column[2];  // of outputs; beyond all where there is no unit

  // Windows of even rows begin `early` columns before the first tap's; `off`: the first row is off words.
  // in_row(first): the first row of inputs, from the first unit's on.
  template <class InRow>
  __device__ UnitPairs(Params const& p, int part, int images, int early, int off, InRow const& in_row) {
    int const lane = int(threadIdx.x) % 32, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const u = part * kStreamUnits + lane / 4 + 8 * i, rest = u / p.span, place = u - rest * p.span;
      int const image = rest / p.unit_stretches, stretch = rest - image * p.unit_stretches;
      bool const exists = image < images;
      int const x = place * in_columns - p.pad_w - early;
      bool const meets = exists && x + 8 * count > 0 && x < p.in.W;
      first[i] = exists ? stretch * p.rows : 1 << 28;
      column[i] = exists ? place * out_columns + t * (out_columns / 4) : p.out_W;
      address[i] = (exists ? image * p.image_bytes + in_row(first[i]) * p.in.W * int(sizeof(T)) : 0) +
                   ((meets ? place * in_columns : p.pad_w / 2 * 2) - early) * int(sizeof(T)) + 4 * t;
      to[i] = exists ? image * p.image_bytes_y + (first[i] * p.out_W + column[i]) * int(sizeof(T)) : 0;
#pragma unroll
      for (int kind = 0; kind < kinds; ++kind)
#pragma unroll
        for (int k = 0; k < count; ++k) {
          int const from = x - (odd ? kind ^ off : 0) + 8 * k + 2 * t;
          mask[kind][k][i] = (exists && unsigned(from) < unsigned(p.in.W) ? 0xffffu : 0u) |
                             (exists && unsigned(from + 1) < unsigned(p.in.W) ? 0xffff0000u : 0u);
        }
    }
  }
  __device__ void load(uint32_t (&v)[2 * count], uint32_t const (&from)[2], int kind) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int k = 0; k < count; ++k) v[2 * k + i] = ptx::ld_shared(from[i] + 16 * k) & mask[kind][k][i];
  }
};

// Two neighbouring outputs, of which the first `left` exist. `words`: both or none, on a word.
template <bool words>
__device__ inline void store_pair(uint32_t to, int left, uint32_t v) {
  if constexpr (words) {
    if (left > 0) ptx::st_shared(to, v);
  } else {
    if (left > 0) ptx::st_shared_u16(to, uint16_t(v));
    if (left > 1) ptx::st_shared_u16(to + 2, uint16_t(v >> 16));
  }
}

// The share of a block: walk(band, from, to), which is a warp's of an item, between the copies there and back. `from`
// is the row of inputs in_first(band) of its channel, at column -pad_w; `to` row 0 of the band's outputs. It returns
// whether something is not finite; outputs that are NaN are then made again by exact(n, c, y, x).
template <class T, class Band, class InFirst, class Begin, class Walking, class Exact>
__device__ inline void for_each_units_band(Params const& p, int channel, int warp, InFirst const& in_first,
                                           Begin const& begin_item, Walking const& walk, Exact const& exact) {
  uint32_t const begin = uint32_t(uint64_t(p.items) * blockIdx.x / gridDim.x);
  uint32_t const end = uint32_t(uint64_t(p.items) * (blockIdx.x + 1) / gridDim.x);
  uint32_t const stages = planes_stages(), outputs = stages + p.stages * p.stage_bytes;
  uint32_t const planes = stages + channel * p.channel_bytes, to_planes = outputs + channel * p.channel_bytes_y;
  PlanesItem at(p, begin), ahead = at;
  auto fill = [&](int stage) {
    fill_band<T, false>(p, Band(p, ahead.group), ahead.c0, stage);
    ahead.next(p);
  };
  if (warp == 0)
#pragma unroll 1
    for (uint32_t i = begin; i < end && i < begin + p.stages; ++i) fill(int(i - begin));
  int const of_run = p.run_channels > 1 ? 0 : channel;
  int stage = 0, parity = 0;
  uint32_t place = 0;
  bool spoilt = false;
#pragma unroll 1
  for (uint32_t item = begin; item < end; ++item, at.next(p)) {
    Band const band(p, at.group);
    uint32_t const from = planes + stage * p.stage_bytes + band.template in<T>(p, 0, at.c0 + of_run).within() +
                          ((in_first(band) - band.h0) * p.in.W - p.pad_w) * int(sizeof(T));
    begin_item(band, at.c0 + channel, from);
    ptx::mbarrier_wait(planes_barrier(stage), parity);
    spoilt |= walk(band, from, to_planes + place + band.template out<T>(p, 0, at.c0 + of_run).within());
    // The next outputs' place is free, the stage has been read, and these outputs are there.
    ptx::fence_proxy_async();
    if (warp == 0) ptx::cp_async_bulk_wait_group_read<0>();
    __syncthreads();
    store_band<T>(p, band, at.c0, outputs + place, warp);
    if (warp == 0 && item + p.stages < end) fill(stage);
    place = place == 0 ? uint32_t(p.images * p.image_bytes_y) : 0;
    if (++stage == p.stages) stage = 0, parity ^= 1;
  }
  // A zero may have met an infinity.
  if (warp == 0) ptx::cp_async_bulk_wait_group_read<0>();
  if (__syncthreads_or(spoilt) == 0) return;
  if (warp == 0) ptx::cp_async_bulk_wait_all();
  __syncthreads();
  PlanesItem again(p, begin);
#pragma unroll 1
  for (uint32_t item = begin; item < end; ++item, again.next(p)) {
    Band const band(p, again.group);
    int const rows = band.p1 - band.p0, all = band.images * p.channels * rows * p.out_W;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < all; i += kPlanesWarps * 32) {
      int const row = i / p.out_W, x = i - row * p.out_W, plane = row / rows, y = band.p0 + row - plane * rows;
      int64_t const n = band.n0 + plane / p.channels;
      int const c = again.c0 + plane % p.channels;
      T* const out = static_cast<T*>(p.out) + n * p.out_n + c * p.out_c + y * p.out_h + x;
      if (widen(*out) != widen(*out)) *out = narrow<T>(exact(n, c, y, x));
    }
  }
}

// What both kernels begin with: zeros instead of rows outside, and barriers.
__device__ inline uint32_t begin_units(Params const& p) {
  uint32_t const zeros = planes_stages() - 64;
  if (threadIdx.x < 16) ptx::st_shared(zeros + threadIdx.x * 4, 0);
  make_planes_barriers(p.stages);
  return zeros;
}

template <class T, int R, int stride, bool odd, bool words>
__global__ void __launch_bounds__(kPlanesWarps * 32, planes_blocks(R, stride))
    gather_units(__grid_constant__ Params const p) {
  // Outputs are stored a row after they are complete, with stride 1 beside the sums of the next.
  constexpr int A = live(R, stride), slots = stride == 1 ? A + 1 : A, turn = slots * stride, count = 1 + stride;
  static_assert(turn % 2 == 0 && R % 2 == 1);
  using Band = Band<R, stride, false>;
  using Pairs = UnitPairs<T, count, odd, kStreamColumns * stride, kStreamColumns>;
  int const warp = planes_warp(), part = warp / p.channels, channel = warp - part * p.channels;
  int const row_bytes = p.in.W * int(sizeof(T)), out_row_bytes = p.out_W * int(sizeof(T));
  uint32_t const zeros = begin_units(p);
  int const early = odd ? 0 : p.pad_w & 1;
  auto pairs_of = [&](int images, int off) {
    return Pairs(p, part, images, early, off, [](int first) { return first * stride; });
  };
  int present = p.images, off = 0, present_c = -1;
  Pairs pairs = pairs_of(present, off);
  uint32_t taps[Pairs::kinds][R][stride][2];
  float bias = 0;
  auto in_first = [&](Band const& b) { return b.p0 * stride - p.pad_h; };
  auto begin_item = [&](Band const& b, int c, uint32_t from) {
    int const now = odd ? int(from >> 1 & 1) : 0;
    if (c != present_c || now != off) {
#pragma unroll
      for (int kind = 0; kind < Pairs::kinds; ++kind) load_band<T>(p, c, taps[kind], odd ? now ^ kind : early);
      bias = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
    }
    if (b.images != present || now != off) pairs = pairs_of(b.images, now);
    present = b.images, off = now, present_c = c;
  };
  auto walk = [&](Band const& b, uint32_t row, uint32_t out) {
    int const band_rows = b.p1 - b.p0, steps = (min(p.rows, band_rows) - 1) * stride + R;
    unsigned const existing = unsigned(b.h1 - b.h0);
    int rows[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      rows[i] = min(p.rows, band_rows - pairs.first[i]), low[i] = pairs.first[i] * stride + in_first(b) - b.h0;
    uint32_t a[2][2 * count];
    auto load = [&](uint32_t (&v)[2 * count], int kind, int step) {
      uint32_t from[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        from[i] = unsigned(low[i] + step) < existing ? pairs.address[i] + (odd ? row & ~3u : row) : zeros;
      pairs.load(v, from, kind);
      row += row_bytes;
    };
    load(a[0], 0, 0);
    float acc[slots][4] = {};
    uint32_t spoilt = 0;
#pragma unroll 1
    for (int first = 0; first <= steps; first += turn) {
#pragma unroll
      for (int i = 0; i < turn; ++i) {
        int const step = first + i, odd_row = i % stride, q = i / stride;
        if (step > steps) break;
        load(a[(i + 1) % 2], odd ? (i + 1) % 2 : 0, step + 1);
        if (odd_row == 0)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[q][e] = 0;
        uint32_t const(&v)[2 * count] = a[i % 2];
        auto const& tap = taps[odd ? i % 2 : 0];
#pragma unroll
        for (int j = 0; j < A; ++j)
          if (int const r = stride * j + odd_row; r < R) {
            float (&sum)[4] = acc[(q - j + slots) % slots];
            ptx::mma_m16n8k16<T>(sum, v[0], v[1], v[2], v[3], tap[r][0][0], tap[r][0][1]);
            if constexpr (stride == 2) ptx::mma_m16n8k8<T>(sum, v[4], v[5], tap[r][1][0]);
          }
        if (odd_row != stride - 1 || step < R) continue;
        // The row of outputs that the step before completed.
        float const(&sum)[4] = acc[(q + 1) % slots];
        int const y = (step - R) / stride;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t of_pair = 0;
          uint32_t const v = planes_pair<T>(sum[2 * j] + bias, sum[2 * j + 1] + bias, of_pair);
          int const left = y < rows[j] ? p.out_W - pairs.column[j] : 0;
          if (left > 0) spoilt |= of_pair;
          store_pair<words>(out + pairs.to[j], left, v);
        }
        out += out_row_bytes;
      }
    }
    return is_spoilt(spoilt);
  };
  for_each_units_band<T, Band>(p, channel, warp, in_first, begin_item, walk,
                               [&](int64_t n, int c, int y, int x) { return exact<T, stride>(p, n, c, y, x); });
}

// dgrad with stride 2; see `spread`.
template <class T, int R, bool odd, bool words>
__global__ void __launch_bounds__(kPlanesWarps * 32, kSpreadUnitsBlocks)
    spread_units(__grid_constant__ Params const p) {
  constexpr int turn = 2 * R;
  using Band = Band<R, 2, true>;
  using Pairs = UnitPairs<T, 2, odd, kStreamColumns, 2 * kStreamColumns>;
  int const warp = planes_warp(), part = warp / p.channels, channel = warp - part * p.channels;
  int const row_bytes = p.in.W * int(sizeof(T)), out_row_bytes = p.out_W * int(sizeof(T));
  uint32_t const zeros = begin_units(p);
  int const early = odd ? 0 : p.pad_w & 1;
  auto pairs_of = [&](int images, int off) {
    return Pairs(p, part, images, early, off, [](int first) { return first / 2; });
  };
  int present = p.images, off = 0, present_c = -1;
  Pairs pairs = pairs_of(present, off);
  uint32_t taps[Pairs::kinds][R][2][2];
  // Row i of y that a walk takes is in_first + i; after it rows 2 (in_first + i) - pad_h and the next of x are
  // complete.
  auto in_first = [&](Band const& b) {
    int const lowest = b.p0 + p.pad_h - (R - 1);
    return lowest >= 0 ? lowest / 2 : (lowest - 1) / 2;
  };
  auto begin_item = [&](Band const& b, int c, uint32_t from) {
    int const now = odd ? int(from >> 1 & 1) : 0;
    if (c != present_c || now != off)
#pragma unroll
      for (int kind = 0; kind < Pairs::kinds; ++kind) load_spread_band<T>(p, c, taps[kind], odd ? now ^ kind : early);
    if (b.images != present || now != off) pairs = pairs_of(b.images, now);
    present = b.images, off = now, present_c = c;
  };
  auto walk = [&](Band const& b, uint32_t row, uint32_t out) {
    int const band_rows = b.p1 - b.p0, v0 = in_first(b);
    int const steps = (b.p0 + min(p.rows, band_rows) - 1 + p.pad_h) / 2 - v0 + 1;
    unsigned const existing = unsigned(b.h1 - b.h0);
    int rows[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      rows[i] = min(p.rows, band_rows - pairs.first[i]), low[i] = pairs.first[i] / 2 + v0 - b.h0;
    uint32_t a[2][4];
    auto load = [&](uint32_t (&v)[4], int kind, int step) {
      uint32_t from[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        from[i] = unsigned(low[i] + step) < existing ? pairs.address[i] + (odd ? row & ~3u : row) : zeros;
      pairs.load(v, from, kind);
      row += row_bytes;
    };
    load(a[0], 0, 0);
    int y = 2 * v0 - p.pad_h - b.p0;
    out += y * out_row_bytes;
    float acc[R][2][4] = {};  // of the rows of x that a row of y meets, each in its place till it is complete
    uint32_t spoilt = 0;
#pragma unroll 1
    for (int first = 0; first < steps; first += turn) {
#pragma unroll
      for (int i = 0; i < turn; ++i) {
        int const step = first + i;
        if (step >= steps) break;
        load(a[(i + 1) % 2], odd ? (i + 1) % 2 : 0, step + 1);
        uint32_t const(&v)[4] = a[i % 2];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            auto const& tap = taps[odd ? i % 2 : 0][r][b];
            ptx::mma_m16n8k16<T>(acc[(2 * i + r) % R][b], v[0], v[1], v[2], v[3], tap[0], tap[1]);
          }
#pragma unroll
        for (int e = 0; e < 2; ++e, ++y, out += out_row_bytes) {
          float (&sum)[2][4] = acc[(2 * i + e) % R];
          if (y >= 0)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              uint32_t of_pair = 0;
              uint32_t const v = planes_pair<T>(sum[0][j], sum[1][j], of_pair);
              int const left = y < rows[j / 2] ? p.out_W - pairs.column[j / 2] - j % 2 * 2 : 0;
              if (left > 0) spoilt |= of_pair;
              store_pair<words>(out + pairs.to[j / 2] + j % 2 * 4, left, v);
            }
#pragma unroll
          for (int b = 0; b < 2; ++b)
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[b][j] = 0;
        }
      }
    }
    return is_spoilt(spoilt);
  };
  for_each_units_band<T, Band>(p, channel, warp, in_first, begin_item, walk,
                               [&](int64_t n, int c, int y, int x) { return exact_spread<T>(p, n, c, y, x); });
}

}  // namespace conv2d_ext::stream
