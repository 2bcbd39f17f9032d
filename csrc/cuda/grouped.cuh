// Grouped convolution with few channels a group, fprop and dgrad, on tensor cores: any strides.
// One pass over the data: a tile of the inputs with its halo is copied to shared memory once (grouped_tile.cuh), and
// mma.sync takes its fragments from there by ldmatrix, whose rows are a pixel's 8 channels wherever the pixel lies: a
// tap of the filter is an offset.
//
// A block keeps the filters of its slab in shared memory, in the order of the fragments, and walks over tiles; the next
// tile is copied while this one is multiplied. A warp computes 8 x 8 outputs of up to 4 blocks of 8 channels as four
// m16 tiles of two rows. k is a tap and 8 channels, so an m16n8k16 does two of those.
//
// dgrad is the same with y for x: taps mirrored, and with strides one phase of the pixels after the other, all from
// the same tile of y.
//
// A unit of several groups has zero weights between them. They are exact zeros unless an input is NaN or infinite;
// a warp that finds NaN in its sums computes its outputs again, each from its own group alone.
#pragma once

#include "fragments.cuh"
#include "grouped_wgrad.cuh"

namespace conv2d_ext::grouped {

// NaN in either half if `marks` has one there, or v is NaN or infinite there.
template <class T>
__device__ inline void mark(Vector<T, 2>& marks, uint32_t v) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2& m = reinterpret_cast<__half2&>(marks);
    m = __hfma2(reinterpret_cast<__half2 const&>(v), __half2half2(__ushort_as_half(0)), m);
  } else {
    __nv_bfloat162& m = reinterpret_cast<__nv_bfloat162&>(marks);
    m = __hfma2(reinterpret_cast<__nv_bfloat162 const&>(v), __bfloat162bfloat162(__ushort_as_bfloat16(0)), m);
  }
}

// Two halves, and one.
template <class T>
__device__ inline void mma_two(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                               uint32_t b1) {
  if constexpr (sizeof(T) == 2)
    ptx::mma_m16n8k16<T>(d, a0, a1, a2, a3, b0, b1);
  else
    ptx::mma_m16n8k8_tf32(d, a0, a1, a2, a3, b0, b1);
}

template <class T>
__device__ inline void mma_one(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (sizeof(T) == 2)
    ptx::mma_m16n8k8<T>(d, a0, a1, b);
  else
    ptx::mma_m16n8k4_tf32(d, a0, a1, b);
}

// Shared memory: stages | filters | tables of the halves | bias.
struct Shared {
  uint32_t stage;     // address of the first
  uint32_t* weights;  // [part][n_group][step][shared block][lane][2]
  int64_t* from;      // [half], elements from a filter's first weight
  int* offset;        // [half], bytes from an output's first input
  int* channel;       // [half], its first channel within the unit; negative if there is no such half
  float* bias;        // [n_group * shared block][8]

  __device__ Shared(Params const& p, char* dynamic) : stage(ptx::shared_address(dynamic)) {
    weights = reinterpret_cast<uint32_t*>(dynamic + p.stages * p.stage_bytes);
    from = reinterpret_cast<int64_t*>(dynamic + p.table_offset);
    offset = reinterpret_cast<int*>(from + p.halves);
    channel = offset + p.halves;
    bias = reinterpret_cast<float*>(channel + p.halves);
  }
};

template <class T, int parts, int shared_blocks>
__device__ inline void fill_tables(Params const& p, int first_unit, int units, Shared const& s) {
  constexpr int kNone = -(1 << 30);
  for (int half = threadIdx.x; half < p.halves; half += blockDim.x) {
    int phase = 0;
    while (half >= p.phase_half[phase + 1]) ++phase;
    int const first = p.phase_tap[phase], taps = p.phase_tap[phase + 1] - first;
    int const each = p.is_3x3 ? 12 : taps;
    int const index = half - p.phase_half[phase], block = index / each, place = index % each;
    bool const exists = block < p.in_blocks && !(p.is_3x3 && place % 4 == 3);
    Tap const& tap = p.tap[exists ? first + (p.is_3x3 ? place / 4 * 3 + place % 4 : place) : 0];
    s.offset[half] = exists ? block * p.window.plane + tap.offset * kSlot : 0;
    s.channel[half] = exists ? block * kChannels<T> : kNone;
    s.from[half] = tap.r * p.w_r + tap.s * p.w_s + block * kChannels<T> * p.w_in;
  }
  int const blocks = p.n_groups * shared_blocks;  // of outputs, of a unit
  for (int i = threadIdx.x; i < p.bias_count; i += blockDim.x) {
    int const unit = i / (blocks * kBlock), out = i % (blocks * kBlock);
    int64_t const at = int64_t(first_unit + unit) * p.out_blocks * kBlock + out;
    bool const exists = p.bias != nullptr && unit < units && out < p.out_blocks * kBlock && at < p.out.channels;
    s.bias[i] = exists ? widen(static_cast<T const*>(p.bias)[at * p.bias_stride]) : 0;
  }
  __syncthreads();
  // A warp takes a part of the halves of one block of outputs.
  constexpr int shares = 4, per_word = 4 / int(sizeof(T));
  T const* const w = static_cast<T const*>(p.w);
  int const lane = threadIdx.x % 32, share = (p.halves + shares - 1) / shares;
  for (int i = threadIdx.x / 32; i < units * blocks * shares; i += blockDim.x / 32) {
    int const block = i / shares, unit = block / blocks, j = block % shared_blocks;
    int const out = block % blocks * kBlock + lane / 4, of_group = p.filters.quotient(out);
    int64_t const group = int64_t(first_unit + unit) * p.groups_per_unit + of_group;
    bool const exists = of_group < p.groups_per_unit && group < p.groups;
    int const channel = lane % 4 * per_word - of_group * p.in_per_group;  // within the group, of the half's first block
    T const* const from = w + group * p.w_group + (out - of_group * p.out_per_group) * p.w_out + channel * p.w_in;
    uint32_t* const to = s.weights + (block / shared_blocks * p.halves * shared_blocks + j * 2) * 32 + lane * 2;
    int const begin = i % shares * share, end = min(begin + share, p.halves);
#pragma unroll 4
    for (int half = begin; half < end; ++half) {
      int const c = s.channel[half] + channel;
      Vector<T, per_word> v;
      if (sizeof(T) == 2 && p.paired_weights) {
        v = exists && unsigned(c) < unsigned(p.in_per_group)
                ? *reinterpret_cast<Vector<T, per_word> const*>(from + s.from[half])
                : Vector<T, per_word>{};
      } else {
#pragma unroll
        for (int e = 0; e < per_word; ++e)
          v.v[e] =
              exists && unsigned(c + e) < unsigned(p.in_per_group) ? from[s.from[half] + e * p.w_in] : narrow<T>(0.f);
      }
      uint32_t part[parts];
      split<T, parts>(*reinterpret_cast<uint32_t const*>(&v), part);
#pragma unroll
      for (int k = 0; k < parts; ++k) to[k * p.part_words + half / 2 * (shared_blocks * 64) + half % 2] = part[k];
    }
  }
}

// One run of output blocks, any taps: `count` halves from `begin` on, from the lane's first input on. With two parts,
// products are summed apart before they are added: the tensor cores cut where they add to a sum, so the sums they add
// to stay small.
template <class T, int parts, int blocks>
__device__ inline void multiply_any(float (&acc)[blocks][4][4], uint32_t from, int row_bytes, int const* offset,
                                    uint32_t const* weights, int part_words, int begin, int count) {
  using P = Products<parts>;
  int const lane = threadIdx.x % 32;
  weights += lane * 2 + begin * blocks * 32;
  offset += begin;
  from += lane / 8 % 2 * row_bytes;
#pragma unroll 1  // registers are short
  for (; count > 1; count -= 2, offset += 2, weights += blocks * 64) {
    uint32_t const a = from + offset[lane / 16];
    uint2 b[blocks][parts];
#pragma unroll
    for (int j = 0; j < blocks; ++j)
#pragma unroll
      for (int k = 0; k < parts; ++k) b[j][k] = *reinterpret_cast<uint2 const*>(weights + k * part_words + j * 64);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t raw[4], v[4][parts];
      ptx::ldmatrix_x4(raw, a + 2 * m * row_bytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) split<T, parts>(raw[i], v[i]);
#pragma unroll
      for (int j = 0; j < blocks; ++j) {
        float sums[4] = {};
        float (&to)[4] = parts == 1 ? acc[j][m] : sums;
#pragma unroll
        for (int i = 0; i < P::count; ++i)
          mma_two<T>(to, v[0][P::a(i)], v[1][P::a(i)], v[2][P::a(i)], v[3][P::a(i)], b[j][P::b(i)].x, b[j][P::b(i)].y);
        if constexpr (parts == 2) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[j][m][e] += sums[e];
        }
      }
    }
  }
  if (count > 0) {
    uint32_t const a = from + offset[0];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t raw[2], v[2][parts];
      ptx::ldmatrix_x2(raw, a + 2 * m * row_bytes);
#pragma unroll
      for (int i = 0; i < 2; ++i) split<T, parts>(raw[i], v[i]);
#pragma unroll
      for (int j = 0; j < blocks; ++j)
#pragma unroll
        for (int i = 0; i < P::count; ++i)
          mma_one<T>(acc[j][m], v[0][P::a(i)], v[1][P::a(i)], weights[P::b(i) * part_words + j * 64]);
    }
  }
}

// 3x3 taps one input apart: every row of 8 inputs is read once for each column of the filter, and serves three rows of
// outputs from registers.
template <class T, int parts, int blocks>
__device__ inline void multiply_3x3(float (&acc)[blocks][4][4], uint32_t from, int pitch_bytes, int plane,
                                    int in_blocks, uint32_t const* weights, int part_words) {
  using P = Products<parts>;
  constexpr int rows = parts == 2 ? 4 : 8;  // of outputs at a time: two parts take twice the registers
  int const lane = threadIdx.x % 32;
  weights += lane * 2;
  from += lane / 8 * pitch_bytes;
#pragma unroll 1
  for (int block = 0; block < in_blocks; ++block, from += plane) {
#pragma unroll(blocks == 1 && parts == 1 ? 3 : 1)  // registers are short
    for (int s = 0; s < 3; ++s, weights += 2 * blocks * 64) {
      uint32_t const at = from + s * kSlot;
      uint32_t raw[12];
      ptx::ldmatrix_x4(*reinterpret_cast<uint32_t (*)[4]>(raw), at);
      ptx::ldmatrix_x4(*reinterpret_cast<uint32_t (*)[4]>(raw + 4), at + 4 * pitch_bytes);
      ptx::ldmatrix_x2(*reinterpret_cast<uint32_t (*)[2]>(raw + 8), at + 8 * pitch_bytes);
#pragma unroll
      for (int m0 = 0; m0 < 8; m0 += rows) {
        uint32_t row[rows + 2][parts];
#pragma unroll
        for (int i = 0; i < rows + 2; ++i) split<T, parts>(raw[m0 + i], row[i]);
#pragma unroll
        for (int j = 0; j < blocks; ++j) {
          uint2 two[parts];
          uint32_t last[parts];
#pragma unroll
          for (int k = 0; k < parts; ++k) {
            two[k] = *reinterpret_cast<uint2 const*>(weights + k * part_words + j * 64);
            last[k] = weights[k * part_words + (blocks + j) * 64];
          }
          float sums[rows / 2][4] = {};
          auto to = [&](int m) -> float (&)[4] { return parts == 1 ? acc[j][(m0 + m) / 2] : sums[m / 2]; };
#pragma unroll
          for (int i = 0; i < P::count; ++i) {
            int const a = P::a(i), b = P::b(i);
#pragma unroll
            for (int m = 0; m < rows; m += 2)
              mma_two<T>(to(m), row[m][a], row[m + 1][a], row[m + 1][a], row[m + 2][a], two[b].x, two[b].y);
#pragma unroll
            for (int m = 0; m < rows; m += 2) mma_one<T>(to(m), row[m + 2][a], row[m + 3][a], last[b]);
          }
          if constexpr (parts == 2) {
#pragma unroll
            for (int m = 0; m < rows / 2; ++m)
#pragma unroll
              for (int e = 0; e < 4; ++e) acc[j][m0 / 2 + m][e] += sums[m][e];
          }
        }
      }
    }
  }
}

// What a warp works on within a block.
struct Item {
  int image, h, w;  // of its 8 x 8 outputs in the tile
  int n_group;      // its first run of output blocks
};

// Computes a warp's outputs again, one at a time, each from the channels of its group.
template <class T, int shared_blocks, int runs>
__device__ __noinline__ void repair(Params const& p, int number, Item item, int phase, int first_unit, int units,
                                    int stage, char* dynamic) {
  __syncwarp();  // the outputs that are overwritten here have been written
  Shared const s(p, dynamic);
  Tile const tile(p, number);
  char const* const data = dynamic + stage * p.stage_bytes;
  int const lane = threadIdx.x % 32;
  int const phase_h = phase / p.axis_w.phases, phase_w = phase % p.axis_w.phases;
  T const* const w = static_cast<T const*>(p.w);
  for (int i = lane; i < runs * shared_blocks * kBlock * kSide * kSide; i += 32) {
    int const index = i % (runs * shared_blocks * kBlock), pixel = i / (runs * shared_blocks * kBlock);
    int const n_group = item.n_group + index / (shared_blocks * kBlock), unit = n_group / p.n_groups;
    int const out = n_group % p.n_groups * shared_blocks * kBlock + index % (shared_blocks * kBlock);
    int const row = item.h + pixel / kSide, column = item.w + pixel % kSide;
    int64_t const n = tile.n + item.image;
    int64_t const h = int64_t(tile.h + row) * p.axis_h.out_step + phase_h;
    int64_t const x = int64_t(tile.w + column) * p.axis_w.out_step + phase_w;
    int64_t const channel_out = int64_t(first_unit + unit) * p.out_blocks * kBlock + out;
    if (unit >= units || out >= p.out_blocks * kBlock || channel_out >= p.out.channels) continue;
    if (n >= p.N || h >= p.out.H || x >= p.out.W) continue;
    int const group = out / p.out_per_group;
    T const* const weights =
        w + (int64_t(first_unit + unit) * p.groups_per_unit + group) * p.w_group + out % p.out_per_group * p.w_out;
    int const slot = (item.image * p.window.rows + row * p.axis_h.step) * p.window.pitch + column;
    float sum = 0;
    for (int t = p.phase_tap[phase]; t < p.phase_tap[phase + 1]; ++t)
      for (int c = 0; c < p.in_per_group; ++c) {
        int const channel = group * p.in_per_group + c;
        char const* const from =
            data + (unit * p.in_blocks + channel / kChannels<T>)*p.window.plane + (slot + p.tap[t].offset) * kSlot;
        sum += widen(reinterpret_cast<T const*>(from)[channel % kChannels<T>]) *
               widen(weights[p.tap[t].r * p.w_r + p.tap[t].s * p.w_s + c * p.w_in]);
      }
    sum += s.bias[n_group * shared_blocks * kBlock + index % (shared_blocks * kBlock)];
    static_cast<T*>(p.out.data)[n * p.out.n + channel_out * p.out.c + h * p.out.h + x * p.out.w] = narrow<T>(sum);
  }
}

// Stores the 8 pixels of a row; `left` of them exist, whole runs of `width`.
template <class T>
__device__ inline void store_row(T* out, int64_t step, int left, int width, uint32_t const (&v)[4]) {
  if (width == 8) {
    if (left > 0) *reinterpret_cast<uint4*>(out) = make_uint4(v[0], v[1], v[2], v[3]);
  } else if (width == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (i * 4 < left) reinterpret_cast<uint2*>(out)[i] = make_uint2(v[i * 2], v[i * 2 + 1]);
  } else if (width == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i * 2 < left) reinterpret_cast<uint32_t*>(out)[i] = v[i];
  } else {
    T const* const elements = reinterpret_cast<T const*>(v);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < left) out[i * step] = elements[i];
  }
}

// Rounds and stores a warp's outputs; says whether one may be NaN. Row lane / 4 of an m16 tile is the pixel
// of that column in the first of two rows of outputs, row lane / 4 + 8 that of the second.
template <class T, int shared_blocks, int runs>
__device__ inline bool store(Params const& p, Tile const& tile, Item const& item, int phase, int first_unit, int units,
                             float const (&acc)[runs][shared_blocks][4][4]) {
  int const lane = threadIdx.x % 32, quad = lane % 4;
  int64_t const n = tile.n + item.image;
  int const h0 = (tile.h + item.h) * p.axis_h.out_step + phase / p.axis_w.phases;
  int const w0 = (tile.w + item.w) * p.axis_w.out_step + phase % p.axis_w.phases;
  T* const out = static_cast<T*>(p.out.data) + n * p.out.n + h0 * p.out.h + w0 * p.out.w;
  int64_t const row_step = p.axis_h.out_step * p.out.h, column_step = p.axis_w.out_step * p.out.w;
  // Outputs that exist from the first on.
  int const rows = p.out.H <= h0            ? 0
                   : p.axis_h.out_step == 1 ? p.out.H - h0
                                            : (p.out.H - h0 - 1) / p.axis_h.out_step + 1;
  int const columns = p.out.W <= w0            ? 0
                      : p.axis_w.out_step == 1 ? p.out.W - w0
                                               : (p.out.W - w0 - 1) / p.axis_w.out_step + 1;
  auto packed = [&](int r, int j, int row) {
    float const(&sums)[4] = acc[r][j][row / 2];
    return pack<T>(sums[row % 2 * 2], sums[row % 2 * 2 + 1]);
  };
  auto channel_of = [&](int r, int j) {  // negative: there is no such block
    int const n_group = item.n_group + r, unit = p.runs_of.quotient(n_group);
    int const block = (n_group - unit * p.n_groups) * shared_blocks + j;
    return unit < units && block < p.out_blocks ? (int64_t(first_unit + unit) * p.out_blocks + block) * kBlock : -1;
  };
  if constexpr (sizeof(T) == 4) {  // eight lanes store the pixels of a row, a quad the channels of a block
    bool nan = false;
#pragma unroll
    for (int r = 0; r < runs; ++r)
#pragma unroll
      for (int j = 0; j < shared_blocks; ++j) {
        int64_t const first = channel_of(r, j), channel = first + quad * 2;
        if (first < 0) continue;
        T* to = out + lane / 4 * column_step + channel * p.out.c;
#pragma unroll
        for (int row = 0; row < kSide; ++row, to += row_step) {
          float const low = acc[r][j][row / 2][row % 2 * 2], high = acc[r][j][row / 2][row % 2 * 2 + 1];
          nan = nan || !(low == low) || !(high == high);
          if (n >= p.N || lane / 4 >= columns || row >= rows) continue;
          if (channel < p.out.channels) *to = low;
          if (channel + 1 < p.out.channels) to[p.out.c] = high;
        }
      }
    return nan;
  }
  Vector<T, 2> marks{};
  if constexpr (sizeof(T) == 2) {  // a lane stores the 8 pixels of a row, of the channel lane / 4 of a block
#pragma unroll
    for (int r = 0; r < runs; ++r)
#pragma unroll
      for (int j = 0; j < shared_blocks; ++j) {
        int64_t const first = channel_of(r, j), channel = first + lane / 4;
        if (first < 0) continue;
#pragma unroll
        for (int half = 0; half < kSide; half += 4) {
          uint32_t v[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            v[i] = packed(r, j, half + i);
            mark<T>(marks, v[i]);
            v[i] = ptx::movmatrix_trans(v[i]);
          }
          transpose_quad(v);
          if (n < p.N && channel < p.out.channels && half + quad < rows)
            store_row<T>(out + channel * p.out.c + (half + quad) * row_step, column_step, columns, p.store_width, v);
        }
      }
  }
  float const low = widen(marks.v[0]), high = widen(marks.v[1]);
  return !(low == low) || !(high == high);
}

// Which taps a kernel has code for: both, unless registers are short.
enum class Taps { both, is_3x3, any };

template <class T, int parts, int shared_blocks, int runs, Taps taps>
__global__ void __launch_bounds__(kMaxWarps * 32, 2) grouped_kernel(__grid_constant__ Params const p) {
  extern __shared__ __align__(128) char dynamic[];
  Shared const s(p, dynamic);
  int const first_unit = blockIdx.y * p.slab, units = min(p.slab, p.units - first_unit);
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int const squares = p.squares_h * p.squares_w * p.images;
  int const items = squares * ((units * p.n_groups + runs - 1) / runs);

  // With two stages the block is one tile ahead with its copies.
  int const step = gridDim.x, ahead = p.stages == 2 ? step : 0;
  for (int number = int(blockIdx.x) - ahead, stage = p.stages - 1; number < p.tiles;
       number += step, stage ^= p.stages - 1) {
    int const next = number + ahead;
    if (next < p.tiles)
      load_inputs<T>(p, Tile(p, next), first_unit, s.stage + (stage ^ (p.stages - 1)) * p.stage_bytes);
    ptx::cp_async_commit_group();
    if (next == int(blockIdx.x)) fill_tables<T, parts, shared_blocks>(p, first_unit, units, s);
    if (number < 0) continue;
    if (p.stages == 2)
      ptx::cp_async_wait_group<1>();
    else
      ptx::cp_async_wait_group<0>();
    __syncthreads();
    Tile const tile(p, number);
    uint32_t const data = s.stage + stage * p.stage_bytes;
    for (int i = warp; i < items; i += warps) {
      int const n_item = p.squares_of.quotient(i), square = i - n_item * squares;
      int const row = p.columns_of.quotient(square), column = square - row * p.squares_w;
      Item const item{row / p.squares_h, row % p.squares_h * kSide, column * kSide, n_item * runs};
      int const row_bytes = p.axis_h.step * p.window.pitch * kSlot;  // from a row of outputs to the next
      uint32_t const from =
          data + item.image * p.window.rows * p.window.pitch * kSlot + item.h * row_bytes + (item.w + lane % 8) * kSlot;
      bool const is_3x3 = taps == Taps::is_3x3 || (taps == Taps::both && p.is_3x3);
      int const phases = is_3x3 ? 1 : p.axis_h.phases * p.axis_w.phases;
      for (int phase = 0; phase < phases; ++phase) {
        float acc[runs][shared_blocks][4][4];
#pragma unroll
        for (int r = 0; r < runs; ++r) {
          int const n_group = item.n_group + r, unit = p.runs_of.quotient(n_group);
#pragma unroll
          for (int j = 0; j < shared_blocks; ++j) {
            float2 const bias =
                reinterpret_cast<float2 const*>(s.bias)[(n_group * shared_blocks + j) * (kBlock / 2) + lane % 4];
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
              for (int e = 0; e < 4; ++e) acc[r][j][m][e] = e % 2 == 0 ? bias.x : bias.y;
          }
          if (unit >= units) continue;
          uint32_t const* const weights = s.weights + n_group * p.halves * shared_blocks * 32;
          uint32_t const plane = unit * p.in_blocks * p.window.plane;
          if (is_3x3)
            multiply_3x3<T, parts, shared_blocks>(acc[r], from + plane, row_bytes, p.window.plane, p.in_blocks, weights,
                                                  p.part_words);
          else
            multiply_any<T, parts, shared_blocks>(acc[r], from + plane, row_bytes, s.offset, weights, p.part_words,
                                                  p.phase_half[phase], p.phase_count[phase]);
        }
        bool const nan = store<T, shared_blocks, runs>(p, tile, item, phase, first_unit, units, acc);
        if (p.mixed && __any_sync(0xffffffff, nan))
          repair<T, shared_blocks, runs>(p, number, item, phase, first_unit, units, stage, dynamic);
      }
    }
    __syncthreads();
  }
}

template <class T, int parts, int shared_blocks>
cudaError_t start(Params const& p, dim3 grid, unsigned threads, int64_t shared, cudaStream_t stream) {
  constexpr int runs = grouped_runs(shared_blocks, sizeof(T));
  constexpr bool both = shared_blocks == 1 || (parts == 1 && shared_blocks == 2);
  auto *const kernel = p.is_3x3                  ? grouped_kernel < T, parts, shared_blocks, runs,
              both ? Taps::both : Taps::is_3x3 > : grouped_kernel < T, parts, shared_blocks, runs,
              both ? Taps::both : Taps::any > ;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, size_t(shared), stream>>>(p);
  return cudaGetLastError();
}

// How many neighbours of a row of outputs can be stored at once.
template <class T>
int store_width_of(Params const& p, int align) {
  Image const& out = p.out;
  if (p.axis_w.out_step != 1 || (out.W > 1 && out.w != 1)) return 1;
  for (int width = 8; width > 1; width /= 2)
    if (out.W % width == 0 && out.n % width == 0 && out.c % width == 0 && out.h % width == 0 &&
        align >= width * int(sizeof(T)))
      return width;
  return 1;
}

inline void set_tiles(Params& p, GroupedTile const& t) {
  p.n_groups = int(t.n_groups), p.slab = int(t.slab);
  p.squares_h = int(t.squares_h), p.squares_w = int(t.squares_w), p.images = int(t.images);
  set_window(p.window, t.window, p.slab * p.in_blocks);
  p.stages = int(t.stages), p.stage_bytes = int(t.window.bytes), p.weight_bytes = int(t.weight_bytes);
  p.table_offset = p.stages * p.stage_bytes + p.weight_bytes;
  p.bias_count = int(ceil_div(t.slab * t.n_groups, t.runs) * t.runs * t.at_once * kBlock);
  p.warps = int(t.warps);
  set_offsets(p, p.warps);
}

template <class T, int parts>
cudaError_t launch_gather(Op op, Problem const& problem, Arguments const& args, cudaStream_t stream) {
  Params p = params_of(op, problem, args);
  // Infinity is NaN once it is split into parts, so that is looked for too.
  if (parts == 2) p.mixed = true;
  bool const is_3x3 = grouped_is_3x3(problem);
  p.paired_weights = p.w_in == 1 && p.in_per_group % 2 == 0 && p.w_group % 2 == 0 && p.w_out % 2 == 0 &&
                     p.w_r % 2 == 0 && p.w_s % 2 == 0 && problem.w_align >= 4;
  set_halves(p, is_3x3);
  p.store_width = store_width_of<T>(p, op == Op::dgrad ? problem.x_align : problem.y_align);
  GroupedTile const t = grouped_tile(op, problem);
  set_tiles(p, t);
  p.part_words = p.weight_bytes / 4 / parts;
  int sm_count = 0;
  cudaError_t const error = count_sms(sm_count);
  if (error != cudaSuccess) return error;
  int const slabs = int(ceil_div(p.units, p.slab));
  int64_t const resident = int64_t(sm_count) * t.of_sm;
  dim3 const grid(even_blocks(p, resident / slabs), unsigned(slabs));
  unsigned const threads = 32 * unsigned(p.warps);
  if constexpr (sizeof(T) == 2) {
    if (t.at_once == 3) return start<T, parts, 3>(p, grid, threads, t.shared, stream);
    if (t.at_once == 4) return start<T, parts, 4>(p, grid, threads, t.shared, stream);
  }
  return t.at_once == 1 ? start<T, parts, 1>(p, grid, threads, t.shared, stream)
                        : start<T, parts, 2>(p, grid, threads, t.shared, stream);
}

template <Op op, DType dtype>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  if constexpr (op == Op::wgrad)
    return launch_wgrad<dtype>(problem, plan, args, stream);
  else if constexpr (dtype == DType::f32)
    return problem.allow_tf32 ? launch_gather<T, 1>(op, problem, args, stream)
                              : launch_gather<T, 2>(op, problem, args, stream);
  else
    return launch_gather<T, 1>(op, problem, args, stream);
}

}  // namespace conv2d_ext::grouped

#define CONV2D_EXT_GROUPED_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                 \
    return grouped::launch<Op::op, DType::dtype>(p, plan, args, stream);    \
  }
