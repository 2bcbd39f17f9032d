// Convolution of float32 to few results on tensor cores: dgrad of a network's first layer with any stride, fprop of its
// last. First the products of every input with all taps, then sums of neighbours:
//   z[channel x tap, pixel] = w[channel x tap, depth] * x[depth, pixel]
//   y[channel, h, w] = sum of z[channel, (r, s), pixel] over the pixels and taps that meet (h, w)
// so that no product is one with zero, whatever the stride, and inputs are read from shared memory once a tile of taps.
//
// A block has an image's segment of columns and range of rows, and walks down the rows of its inputs. cp.async copies
// those of the next step while mma.sync multiplies: filters are its rows, in shared memory in the order of fragments,
// pixels its columns. The products go to shared memory, where each thread adds up those of its outputs of a line, in
// the order of the taps, to a ring of lines; lines that no later input meets are stored. Neighbouring blocks compute
// the products that both need twice.
//
// Strict float32 (Split): sums of six products of bfloat16 parts, moved to float32 registers after 32 of the depth;
// results that are not finite are summed again from the operands.
#pragma once

#include "../core/stem_lines.h"
#include "stem.cuh"

namespace conv2d_ext::stem {

struct LinesParams {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t bias_stride, in_n, in_h, out_n, out_c, out_h, out_w, strips;
  int64_t in_across, in_along;  // elements from one copied line to the next, and of a line's vector to the next
  int w_in, w_out, w_r, w_s;
  int depth, all, channels, slabs, m_tiles, steps;
  int in_H, in_W, out_H, out_W, R, S, stride_h, stride_w, pad_h, pad_w;
  int first_h, first_w, last_h, last_w, warm_h, warm_w, ends_h, ends_w, ranges, segments;
  int rows, in_columns, pixels, line, pitch, ring_rows, items, terms, vector, elements, align,
      lanes;  // lanes: of a copied line, log2
  int weight_bytes, sum_bytes, ring_bytes, stage_bytes, stages;
  bool nhwc, backward, items_nhwc;
  Divisor stride_of;
};

// What a block computes of an image.
struct Strip {
  int64_t n;
  int column, columns;  // of the inputs that it reads
  int w, width;         // of the outputs
  int row, first, end;  // rows of inputs: from `row` on; those from `first` on end lines of outputs
  __device__ Strip(LinesParams const& p, int64_t index) {
    int const segment = int(index % p.segments);
    int64_t const rest = index / p.segments;
    int const range = int(rest % p.ranges);
    n = rest / p.ranges;
    int const ends = p.first_w + segment * p.ends_w, last = min(ends + p.ends_w, p.last_w + 1);
    column = max(0, ends - p.warm_w) / p.align * p.align;
    columns = min(min(last, p.in_W) - column, p.in_columns);
    w = max(0, ends * p.stride_w - p.pad_w), width = max(0, min(p.out_W, last * p.stride_w - p.pad_w) - w);
    first = p.first_h + range * p.ends_h, end = min(first + p.ends_h, p.last_h + 1), row = max(0, first - p.warm_h);
    row = min(row, first);
  }
};

// Strict float32: a number is the sum of three of bfloat16, but for 2^-27 of it, and a product that of six, but for
// less than float32's rounding. A step has 16 of the depth: word i of a lane has channels lane % 4 + 8 * i and four
// further.
struct ThreeParts {
  uint32_t high, middle, low;
};
__device__ inline ThreeParts three_parts(float a, float b) {
  using T = __nv_bfloat16;
  ThreeParts v;
  v.high = pack<T>(a, b);
  a -= __uint_as_float(v.high << 16), b -= __uint_as_float(v.high & 0xffff0000u);
  v.middle = pack<T>(a, b);
  v.low = pack<T>(a - __uint_as_float(v.middle << 16), b - __uint_as_float(v.middle & 0xffff0000u));
  return v;
}

template <class T>
__device__ inline void load_lines_filters(LinesParams const& p, int first, uint32_t* weights) {
  constexpr int per_word = is_split<T> ? 2 : 1;
  T const* const w = static_cast<T const*>(p.w);
  int const taps = p.R * p.S, words = p.m_tiles * p.steps * 128;
#pragma unroll 4
  for (int i = threadIdx.x; i < words; i += kStemThreads) {
    int const word = i % 4, lane = i / 4 % 32, block = i / 128, tile = block / p.steps, step = block - tile * p.steps;
    int const index = tile * 16 + word % 2 * 8 + lane / 4, c = index / taps, tap = index - c * taps;
    int const r = tap / p.S, s = tap - r * p.S;
    int const channel =
        is_split<T> ? step * 16 + word / 2 * 8 + lane % 4 : (step * 8 + word / 2 * 4 + lane % 4) * per_word;
    int const at_r = p.backward ? r : p.R - 1 - r, at_s = p.backward ? s : p.S - 1 - s;
    T const* const from = w + (first + c) * p.w_out + at_r * p.w_r + at_s * p.w_s;
    bool const exists = c < p.channels && first + c < p.all;
    Vector<T, per_word> v;
#pragma unroll
    for (int e = 0; e < per_word; ++e) {
      int const k = channel + e * (is_split<T> ? 4 : 1);
      v.v[e] = exists && k < p.depth ? rounded(from[k * p.w_in]) : narrow<T>(0.f);
    }
    if constexpr (is_split<T>) {
      ThreeParts const parts = three_parts(v.v[0].v, v.v[1].v);
      weights[i] = parts.high, weights[i + words] = parts.middle, weights[i + 2 * words] = parts.low;
    } else {
      weights[i] = *reinterpret_cast<uint32_t const*>(&v);
    }
  }
}

// A step's inputs: rows from `row` on of a strip's columns.
template <class T>
__device__ inline void copy_lines(LinesParams const& p, Strip const& strip, int row, uint32_t to) {
  constexpr int size = int(sizeof(T));
  int const across = p.nhwc ? strip.columns : p.depth, along = p.nhwc ? p.depth : strip.columns;
  int const lanes = 1 << p.lanes, lane = threadIdx.x & (lanes - 1), begin = threadIdx.x >> p.lanes;
  int const turn = kStemThreads >> p.lanes;
  int const row_bytes = p.in_columns * (p.nhwc ? p.line : size);
  T const* from = static_cast<T const*>(p.in) + strip.n * p.in_n + strip.column * (p.nhwc ? p.in_across : p.in_along) +
                  row * p.in_h;
  int const rows = min(min(p.rows, strip.end - row), p.in_H - row);
  for (int i = 0; i < rows; ++i, from += p.in_h, to += row_bytes) {
    if (p.vector > 0) {
      for (int a = begin; a < across; a += turn) {
        T const* const line = from + a * p.in_across;
        uint32_t const at = to + a * p.line;
        for (int v = lane * p.elements; v < along; v += lanes * p.elements) {
          if (p.vector == 16)
            ptx::cp_async_16(at + v * size, line + v, true);
          else if (p.vector == 8)
            ptx::cp_async_ca<8>(at + v * size, line + v, true);
          else
            ptx::cp_async_ca<4>(at + v * size, line + v, true);
        }
      }
      continue;
    }
    constexpr int together = 8;
    for (int v = lane; v < along; v += lanes)
      for (int a0 = begin; a0 < across; a0 += turn * together) {
        T held[together];
#pragma unroll
        for (int k = 0; k < together; ++k)
          if (a0 + k * turn < across) held[k] = from[(a0 + k * turn) * p.in_across + v * p.in_along];
#pragma unroll
        for (int k = 0; k < together; ++k) {
          uint32_t const at = to + (a0 + k * turn) * p.line + v * size;
          if (a0 + k * turn >= across) continue;
          ptx::st_shared(at, *reinterpret_cast<uint32_t const*>(&held[k]));
        }
      }
  }
}

// z of two tiles of taps and `across` blocks of 8 pixels a warp at a time.
template <class T, int across>
__device__ inline void multiply_lines(LinesParams const& p, uint4 const* weights, uint32_t inputs, uint32_t sums) {
  int const lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int const pairs = (p.m_tiles + 1) / 2, blocks = p.pixels / 8, parts = (blocks + across - 1) / across;
  int const along_depth = p.nhwc ? 4 : p.line, along_pixels = p.nhwc ? p.line : 4;
  int const step_bytes = (is_split<T> ? 16 : 8) * along_depth;
#pragma unroll 1
  for (int turn = threadIdx.x / 32; turn < pairs * parts; turn += kWarps) {
    int const part = turn / pairs, tile = (turn - part * pairs) * 2;
    bool const two = tile + 1 < p.m_tiles;
    uint32_t at[across];
#pragma unroll
    for (int j = 0; j < across; ++j)
      at[j] = inputs + t * along_depth + (min(part * across + j, blocks - 1) * 8 + g) * along_pixels;
    uint4 const* a = weights + tile * p.steps * 32 + lane;
    float acc[2][across][4] = {}, sum[2][across][4] = {};
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step, a += 32) {
      if constexpr (is_split<T>) {
        ThreeParts b[across][2];
#pragma unroll
        for (int j = 0; j < across; ++j) {
          float v[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) v[e] = ptx::ld_shared_f32(at[j] + e * 4 * along_depth);
          b[j][0] = three_parts(v[0], v[1]), b[j][1] = three_parts(v[2], v[3]);
          at[j] += step_bytes;
        }
        int const part = p.m_tiles * p.steps * 32;
        auto multiply = [&]<int tiles>(std::integral_constant<int, tiles>) {
          uint4 v[tiles];
          auto load = [&](int from) {
#pragma unroll
            for (int m = 0; m < tiles; ++m) v[m] = a[m * p.steps * 32 + from];
          };
          auto add = [&](uint32_t ThreeParts::* which) {
#pragma unroll
            for (int m = 0; m < tiles; ++m)
#pragma unroll
              for (int j = 0; j < across; ++j)
                ptx::mma_m16n8k16<__nv_bfloat16>(sum[m][j], v[m].x, v[m].y, v[m].z, v[m].w, b[j][0].*which,
                                                 b[j][1].*which);
          };
          load(2 * part), add(&ThreeParts::high);  // the small products first
          load(part), add(&ThreeParts::middle), add(&ThreeParts::high);
          load(0), add(&ThreeParts::low), add(&ThreeParts::middle), add(&ThreeParts::high);
        };
        if (two)
          multiply(std::integral_constant<int, 2>());
        else
          multiply(std::integral_constant<int, 1>());
        if (step % 2 == 1 || step + 1 == p.steps) {
#pragma unroll
          for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int j = 0; j < across; ++j)
#pragma unroll
              for (int e = 0; e < 4; ++e) acc[m][j][e] += sum[m][j][e], sum[m][j][e] = 0;
        }
      } else {
        uint32_t b[across][2];
#pragma unroll
        for (int j = 0; j < across; ++j) {
          b[j][0] = ptx::cvt_rn_tf32(ptx::ld_shared_f32(at[j]));
          b[j][1] = ptx::cvt_rn_tf32(ptx::ld_shared_f32(at[j] + 4 * along_depth));
          at[j] += step_bytes;
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          if (m == 1 && !two) break;
          uint4 const v = a[m * p.steps * 32];
#pragma unroll
          for (int j = 0; j < across; ++j) mma<T>(acc[m][j], v.x, v.y, v.z, v.w, b[j][0], b[j][1]);
        }
      }
    }
    uint32_t const z = sums + ((tile * 16 + g) * p.pitch + part * across * 8 + t * 2) * 4;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int j = 0; j < across; ++j) {
        if ((m == 1 && !two) || part * across + j >= blocks) continue;
        uint32_t const to = z + (m * 16 * p.pitch + j * 8) * 4;
        ptx::st_shared_f32x2(to, acc[m][j][0], acc[m][j][1]);
        ptx::st_shared_f32x2(to + 8 * p.pitch * 4, acc[m][j][2], acc[m][j][3]);
      }
  }
}

// One result from its own taps, of numbers that are not split.
template <class T>
__device__ __noinline__ float sum_lines_again(LinesParams const& p, int64_t n, int h, int w, int c) {
  T const* const image = static_cast<T const*>(p.in) + n * p.in_n;
  T const* const filter = static_cast<T const*>(p.w) + c * p.w_out;
  int64_t const in_w = p.nhwc ? p.in_across : p.in_along, in_c = p.nhwc ? p.in_along : p.in_across;
  float sum = 0;
  for (int r = 0; r < p.R; ++r)
    for (int s = 0; s < p.S; ++s) {
      int const row = h + p.pad_h - r, column = w + p.pad_w - s;
      if (row < 0 || column < 0 || row % p.stride_h != 0 || column % p.stride_w != 0) continue;
      if (row / p.stride_h >= p.in_H || column / p.stride_w >= p.in_W) continue;
      int const at_r = p.backward ? r : p.R - 1 - r, at_s = p.backward ? s : p.S - 1 - s;
      for (int k = 0; k < p.depth; ++k)
        sum += widen(image[row / p.stride_h * p.in_h + column / p.stride_w * in_w + k * in_c]) *
               widen(filter[at_r * p.w_r + at_s * p.w_s + k * p.w_in]);
    }
  return sum;
}

// Of an output of a line: its first term in z, which of the terms are there, its place in the image, its bias.
__device__ inline void place_items(LinesParams const& p, Strip const& strip, int first_channel, int4* places,
                                   float* ring) {
  int const channels = min(p.channels, p.all - first_channel), items = channels * strip.width;
  for (int item = threadIdx.x; item < items; item += kStemThreads) {
    int const line = unsigned(item) / unsigned(p.items_nhwc ? channels : strip.width);
    int const in_line = item - line * (p.items_nhwc ? channels : strip.width);
    int const c = p.items_nhwc ? in_line : line, w = strip.w + (p.items_nhwc ? line : in_line);
    int const u = w + p.pad_w, last = int(p.stride_of.quotient(u)), tap = u - last * p.stride_w;
    int const taps = tap < p.S ? int(p.stride_of.quotient(p.S - tap + p.stride_w - 1)) : 0;
    int const most = max(0, min(taps, last - strip.column + 1));
    int const least = min(most, max(0, last - (strip.column + strip.columns - 1)));
    places[item] = {(c * p.R * p.S + tap) * p.pitch + last - strip.column, least | most << 16,
                    int((first_channel + c) * p.out_c + w * p.out_w), first_channel + c};
    for (int r = 0; r < p.ring_rows; ++r) ring[r * p.items + item] = 0;
  }
}

// Adds `terms` terms of an output of each line that the filter's rows meet to the ring, from `slot` on; lines from
// `fresh` on begin with them.
template <int terms>
__device__ inline void add_terms(LinesParams const& p, float const* z, int least, int most, float* ring, int slot,
                                 int fresh) {
  int const next = p.stride_w * p.pitch - 1, tap_row = p.S * p.pitch, wrap = p.ring_rows * p.items;
  bool exists[terms];
#pragma unroll
  for (int e = 0; e < terms; ++e) exists[e] = e >= least && e < most;
  float* held = ring + slot * p.items;
  float* const end = ring + wrap;
  constexpr int together = 4;  // lines, loaded before any is stored
  for (int r0 = 0; r0 < p.R; r0 += together) {
    float sum[together];
    float* at[together];
#pragma unroll
    for (int k = 0; k < together; ++k, z += tap_row) {
      at[k] = held, held += p.items;
      if (held >= end) held -= wrap;
      float v[terms];
#pragma unroll
      for (int e = 0; e < terms; ++e) v[e] = exists[e] && r0 + k < p.R ? z[e * next] : 0.f;
      sum[k] = r0 + k < fresh ? *at[k] : 0.f;
#pragma unroll
      for (int e = 0; e < terms; ++e) sum[k] += v[e];
    }
#pragma unroll
    for (int k = 0; k < together; ++k)
      if (r0 + k < p.R) *at[k] = sum[k];
  }
}

// Adds the products of rows `row` to row + count - 1 to the ring, and stores the lines that these end.
template <class T>
__device__ inline void add_lines(LinesParams const& p, Strip const& strip, int items, int row, int count,
                                 float const* z, float* ring, int4 const* places) {
  int const fresh = max(0, p.R - p.stride_h), next = p.stride_w * p.pitch - 1;
  for (int item = threadIdx.x; item < items; item += kStemThreads) {
    int4 const place = places[item];
    T* const image = static_cast<T*>(p.out) + strip.n * p.out_n + place.z;
    int const least = place.y & 0xffff, most = place.y >> 16, c = place.w;
    float const bias = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
    int slot = row * p.stride_h % p.ring_rows;
    for (int i = 0; i < count; ++i) {
      float const* const from = z + place.x + i * p.in_columns;
      if (row + i < p.in_H) {
        if (p.terms <= 2) {
          add_terms<2>(p, from, least, most, ring + item, slot, fresh);
        } else if (p.terms == 3) {
          add_terms<3>(p, from, least, most, ring + item, slot, fresh);
        } else {
          for (int k = 0; k < p.terms; k += 4)
            add_terms<4>(p, from + k * next, least - k, most - k, ring + item, slot, k == 0 ? fresh : p.R);
        }
      } else {
        for (int r = fresh; r < p.R; ++r) ring[(slot + r) % p.ring_rows * p.items + item] = 0;
      }
      int const h = (row + i) * p.stride_h - p.pad_h;
      T* out = image + h * p.out_h;
      for (int j = 0; j < p.stride_h; ++j, out += p.out_h) {
        if (row + i >= strip.first && unsigned(h + j) < unsigned(p.out_H)) {
          float sum = j < p.R ? ring[slot * p.items + item] : 0.f;
          if constexpr (is_split<T>)
            if (!isfinite(sum)) {
              int const w = (place.z - c * int(p.out_c)) / max(1, int(p.out_w));
              sum = sum_lines_again<T>(p, strip.n, h + j, w, c);
            }
          *out = narrow<T>(sum + bias);
        }
        slot = slot + 1 == p.ring_rows ? 0 : slot + 1;
      }
    }
  }
}

// Shared memory: filters | products | places | ring | stages.
template <class T, int across>
__global__ void __launch_bounds__(kStemThreads, across == 4 || is_split<T> ? 2 : 3)
    spread_lines(__grid_constant__ LinesParams const p) {
  extern __shared__ __align__(16) char dynamic[];
  uint4* const weights = reinterpret_cast<uint4*>(dynamic);
  float* const z = reinterpret_cast<float*>(dynamic + p.weight_bytes);
  int4* const places = reinterpret_cast<int4*>(dynamic + p.weight_bytes + p.sum_bytes);
  float* const ring = reinterpret_cast<float*>(places + p.items);
  char* const stages = reinterpret_cast<char*>(places + p.items) + p.ring_bytes;
  int const slab = int(blockIdx.x) % p.slabs, first_channel = slab * p.channels;
  // What no copy fills is multiplied by zero.
  uint32_t const clear = ptx::shared_address(stages);
  for (int i = threadIdx.x; i < p.stages * p.stage_bytes / 16; i += kStemThreads)
    ptx::st_shared_v4(clear + i * 16, uint4{});
  __syncthreads();
  int64_t const turn = gridDim.x / p.slabs;
  int64_t index = blockIdx.x / p.slabs, next_index = index;
  Strip strip(p, index), next = strip;
  int row = strip.row, next_row = row, stage = 0, filling = 0;
  auto copy_next = [&] {
    if (next_index < p.strips) {
      copy_lines<T>(p, next, next_row, ptx::shared_address(stages) + filling * p.stage_bytes);
      next_row += p.rows;
      if (next_row >= next.end) {
        next_index += turn;
        if (next_index < p.strips) next = Strip(p, next_index), next_row = next.row;
      }
      filling ^= p.stages - 1;
    }
    ptx::cp_async_commit_group();
  };
  copy_next();
  load_lines_filters<T>(p, first_channel, reinterpret_cast<uint32_t*>(weights));
  for (; index < p.strips; index += turn) {
    strip = Strip(p, index);
    __syncthreads();  // of the strip before, whose outputs are other threads', all have been added up
    place_items(p, strip, first_channel, places, ring);
    int const items = min(p.channels, p.all - first_channel) * strip.width;
    for (row = strip.row; row < strip.end; row += p.rows) {
      ptx::cp_async_wait_all();
      __syncthreads();  // the inputs are there, and the products before have been added up
      if (p.stages == 2) copy_next();
      multiply_lines<T, across>(p, weights, ptx::shared_address(stages) + stage * p.stage_bytes,
                                ptx::shared_address(z));
      stage ^= p.stages - 1;
      __syncthreads();
      if (p.stages == 1) copy_next();
      add_lines<T>(p, strip, items, row, min(p.rows, strip.end - row), z, ring, places);
    }
  }
}

// ---- host side

template <Op op>
cudaError_t launch_lines(Problem const& problem, Plan const&, Arguments const& args, cudaStream_t stream) {
  constexpr bool backward = op == Op::dgrad;
  StemLines const t = stem_lines(op, problem, h200_sxm);
  StemLinesAxis const h = stem_lines_axis_h(op, problem), w = stem_lines_axis_w(op, problem);
  Strides const &in = backward ? problem.y : problem.x, &out = backward ? problem.x : problem.y;
  LinesParams p{};
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.out = args.out, p.bias_stride = args.bias_stride;
  p.in_n = in.n, p.in_h = in.h, p.out_n = out.n, p.out_c = out.c, p.out_h = out.h, p.out_w = out.w;
  p.in_across = t.nhwc ? in.w : in.c, p.in_along = t.nhwc ? in.c : in.w, p.strips = t.strips;
  p.w_in = int(backward ? problem.w.n : problem.w.c), p.w_out = int(backward ? problem.w.c : problem.w.n);
  p.w_r = int(problem.w.h), p.w_s = int(problem.w.w);
  p.depth = int(t.depth), p.all = int(backward ? problem.C : problem.K), p.channels = int(t.channels);
  p.slabs = int(t.slabs), p.m_tiles = int(t.m_tiles), p.steps = int(t.steps);
  p.in_H = int(h.in), p.in_W = int(w.in), p.out_H = int(h.out), p.out_W = int(w.out);
  p.R = int(h.taps), p.S = int(w.taps), p.stride_h = int(h.stride), p.stride_w = int(w.stride);
  p.pad_h = int(h.pad), p.pad_w = int(w.pad), p.first_h = int(h.first), p.first_w = int(w.first);
  p.last_h = int(h.last), p.last_w = int(w.last), p.warm_h = int(h.warm), p.warm_w = int(w.warm);
  p.ends_h = int(t.ends_h), p.ends_w = int(t.ends_w), p.ranges = int(t.ranges), p.segments = int(t.segments);
  p.rows = int(t.rows), p.in_columns = int(t.in_columns), p.pixels = int(t.pixels), p.line = int(t.line);
  p.pitch = int(t.pitch), p.ring_rows = int(t.ring_rows), p.items = int(t.items), p.vector = int(t.vector);
  p.elements = t.vector > 0 ? int(t.vector) / int(sizeof(float)) : 1;
  p.align = t.nhwc ? 1 : p.elements, p.terms = int(ceil_div(w.taps, w.stride));
  int64_t const vectors = ceil_div(t.nhwc ? t.depth : t.in_columns, p.elements);
  while (p.lanes < 5 && (1 << p.lanes) < vectors) ++p.lanes;
  p.weight_bytes = int(t.weight_bytes), p.sum_bytes = int(t.sum_bytes), p.ring_bytes = int(t.ring_bytes);
  p.stage_bytes = int(t.stage_bytes), p.stages = int(t.stages), p.nhwc = t.nhwc, p.backward = backward;
  p.items_nhwc = stem_is_nhwc(out, p.all, p.out_W);
  p.stride_of = Divisor(uint32_t(p.stride_w));
  auto* kernel = t.wide ? spread_lines<float, 4> : spread_lines<float, 2>;
  if (!problem.allow_tf32) kernel = spread_lines<Split, 2>;
  return launch_blocks(kernel, p, t.strips, t, stream);
}

}  // namespace conv2d_ext::stem

#define CONV2D_EXT_STEM_LINES_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) { return stem::launch_lines<Op::op>(p, plan, args, stream); }
