// fprop and dgrad of column.cuh without the copy engine: a thread has V channels of `width` neighbouring columns, walks
// down some rows of them with its inputs straight from L1, and adds its products to the sums of all output rows that
// meet an input row. Nothing is set up and nobody waits, which small layers need; and channels need no vectors of 16
// bytes. dgrad with stride 1 is fprop with the filter turned round.
#pragma once

#include "../core/column.h"
#include "types.cuh"

namespace conv2d_ext::column {

struct WalkParams {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t in_n, in_h, in_w, out_n, out_h, out_w;
  int64_t w_k, w_r, w_s, bias_stride;
  int in_H, in_W, out_H, out_W;
  int pad_h, start_w, origin;  // rows before the first output's; first input and output column of strip 0
  int quads, strips, chunks, rows;
  uint32_t threads;
};

// V elements as one access; merged with zeros element by element, 16-bit types take twice the moves.
template <class T, int V>
struct Packed {
  static constexpr int bytes = int(sizeof(T)) * V;
  using Word = std::conditional_t<bytes == 2, uint16_t, std::conditional_t<bytes == 4, uint32_t, uint2>>;
  static_assert(sizeof(Word) == bytes);
  Word word;

  __device__ void clear() { word = Word{}; }
  __device__ void widen_to(float (&v)[V]) const {
    Vector<T, V> const h = *reinterpret_cast<Vector<T, V> const*>(&word);
#pragma unroll
    for (int e = 0; e < V; ++e) v[e] = widen(h.v[e]);
  }
  __device__ static void store(T* to, float const (&v)[V]) {
    Vector<T, V> h;
#pragma unroll
    for (int e = 0; e < V; ++e) h.v[e] = narrow<T>(v[e]);
    *reinterpret_cast<Word*>(to) = *reinterpret_cast<Word const*>(&h);
  }
};

template <class T, Op op, int R, int stride, int V, int width>
__global__ void __launch_bounds__(kWalkThreads, 2) walk(__grid_constant__ WalkParams const p) {
  constexpr bool backward = op == Op::dgrad;
  constexpr ColumnAxis axis{backward, R, stride};
  constexpr int IW = axis.extent(width);
  // As in gather: sums of output rows that further input rows meet, and rows that an input row completes.
  constexpr int slots = backward ? R : (R + stride - 1) / stride, done = backward ? stride : 1;
  uint32_t const thread = blockIdx.x * kWalkThreads + threadIdx.x;
  if (thread >= p.threads) return;
  uint32_t rest = thread / p.quads;
  int const c = int(thread - rest * p.quads) * V;
  uint32_t const strip = rest;
  rest /= p.strips;
  int const column = int(strip - rest * p.strips) * width;
  int64_t const n = rest / p.chunks;
  int const h0 = int(rest - uint32_t(n) * p.chunks) * p.rows, rows = p.out_H - h0 < p.rows ? p.out_H - h0 : p.rows;

  float filter[R][R][V], bias[V];
#pragma unroll
  for (int e = 0; e < V; ++e) {
    T const* const w = static_cast<T const*>(p.w) + (c + e) * p.w_k;
#pragma unroll
    for (int tap = 0; tap < R * R; ++tap) filter[tap / R][tap % R][e] = widen(w[tap / R * p.w_r + tap % R * p.w_s]);
    bias[e] = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[(c + e) * p.bias_stride]) : 0.f;
  }

  int first, count;  // input rows
  if constexpr (backward) {
    int const past = h0 + p.pad_h + rows - 1, lowest = h0 + p.pad_h - R + stride;
    first = lowest >> 1, count = past / stride - first + 1;
  } else {
    first = h0 * stride - p.pad_h, count = (rows - 1) * stride + R;
  }
  int const w0 = p.start_w + axis.advance(column), q0 = p.origin + column;
  T const* from = static_cast<T const*>(p.in) + n * p.in_n + first * p.in_h + w0 * p.in_w + c;
  int out_row = backward ? first * stride - p.pad_h - h0 : -(slots - 1);
  T* to = static_cast<T*>(p.out) + n * p.out_n + int64_t(h0 + out_row) * p.out_h + q0 * p.out_w + c;
  uint32_t const step_in = uint32_t(p.in_w) * sizeof(T), step_out = uint32_t(p.out_w) * sizeof(T);
  bool const whole = w0 >= 0 && w0 + IW <= p.in_W, whole_out = q0 >= 0 && q0 + width <= p.out_W;

  Packed<T, V> next[IW];
  auto load = [&](int row) {  // of the input, counted from the first
    auto at = [&](int j) {
      return *reinterpret_cast<typename Packed<T, V>::Word const*>(reinterpret_cast<char const*>(from) + j * step_in);
    };
    if (row < count && unsigned(first + row) < unsigned(p.in_H)) {
      if (whole) {
#pragma unroll
        for (int j = 0; j < IW; ++j) next[j].word = at(j);
      } else {
#pragma unroll
        for (int j = 0; j < IW; ++j) {
          next[j].clear();
          if (unsigned(w0 + j) < unsigned(p.in_W)) next[j].word = at(j);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < IW; ++j) next[j].clear();
    }
    from += p.in_h;
  };
  float acc[slots][width][V];
  auto store = [&](float const(&sums)[width][V]) {
    if (unsigned(out_row) < unsigned(rows)) {
#pragma unroll
      for (int b = 0; b < width; ++b)
        if (whole_out || unsigned(q0 + b) < unsigned(p.out_W))
          Packed<T, V>::store(reinterpret_cast<T*>(reinterpret_cast<char*>(to) + b * int64_t(step_out)), sums[b]);
    }
    ++out_row, to += p.out_h;
  };
  // Row u of every `stride` rows; dgrad: 0. The first product of each sum moves it on by `done` rows.
  auto step = [&]<int u>(std::integral_constant<int, u>, int row) {
    auto tap = [](int k) constexpr { return backward ? k : u + (slots - 1 - k) * stride; };
    Packed<T, V> now[IW];
#pragma unroll
    for (int j = 0; j < IW; ++j) now[j] = next[j];
    load(row + 1);
#pragma unroll
    for (int j = 0; j < IW; ++j) {
      float in[V];
      now[j].widen_to(in);
#pragma unroll
      for (int k = 0; k < slots; ++k) {
        if (tap(k) >= R) continue;
#pragma unroll
        for (int b = 0; b < width; ++b)
#pragma unroll
          for (int s = 0; s < R; ++s) {
            if (axis.index(b, s) != j) continue;
#pragma unroll
            for (int e = 0; e < V; ++e) {
              float const before = u != 0 || !axis.first(b, s) ? acc[k][b][e]
                                   : k + done < slots          ? acc[k + done][b][e]
                                                               : bias[e];
              acc[k][b][e] = fmaf(in[e], filter[tap(k)][s][e], before);
            }
          }
      }
    }
    if constexpr (u == (backward ? 0 : (R - 1) % stride)) {
#pragma unroll
      for (int k = 0; k < done; ++k) store(acc[k]);
    }
  };
  load(0);
#pragma unroll 1
  for (int row = 0; row < count; row += backward ? 1 : stride) {
    step(std::integral_constant<int, 0>(), row);
    if constexpr (!backward && stride == 2)
      if (row + 1 < count) step(std::integral_constant<int, 1>(), row + 1);
  }
}

}  // namespace conv2d_ext::column
