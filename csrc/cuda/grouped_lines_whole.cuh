// The sums of wgrad by lines for 3x3 filters in 16-bit types, strides of 1 or 2: whole jobs.
//
// A job is one block of 8 channels, all taps, and up to three blocks of 8 filters of a unit. A fragment of 8 pixels of
// 8 channels, a row of one of the filter's columns, is one register, loaded once for a square: the halves of an m16
// tile are two taps of a column, or the third taps of two columns, and its 16 pixels are two neighbouring rows, so
// every operand of a product is one of these registers. The same fragments serve all blocks of filters.
#pragma once

#include <type_traits>

#include "fragments.cuh"
#include "ptx.cuh"
#include "types.cuh"

namespace conv2d_ext::grouped {

constexpr int kWholeTiles = 5;  // m16 tiles of a block of filters

// The tap of a tile's half, counted by columns; 9: none.
__device__ inline int whole_tap(int tile, int upper) {
  return tile < 3 ? tile * 3 + upper : tile == 3 ? upper * 3 + 2 : 8 + upper;
}

// A warp's job. Its lanes are 8 pixels in each of four rows of lines.
template <class T, int blocks, int step>
struct WholeJob {
  static constexpr int kSide = 8, kLine = 128, kSlot = 16;
  // Rows of outputs whose fragments are there together.
  static constexpr int kRowsAtOnce = blocks * step > 2 ? 4 : 8;

  int channels, filters, last_filters;  // blocks of a line: of x the job's, of y its first and its unit's last
  int row_bytes, y_row, planes, plane_bytes;

  // Adds a square's products. x, y: its first lines; valid: the lane's column of outputs exists, else its inputs are
  // the zeros. kRows: of outputs, those that exist among them; the others are zeros.
  template <int kRows>
  __device__ void sum(float (&acc)[blocks * kWholeTiles][4], uint32_t x, uint32_t y, int rows, bool valid,
                      uint32_t zero) const {
    // Opaque: else the compiler keeps every load's distance from the first in a register of its own.
    int const pitch = warp_uniform(row_bytes), y_pitch = warp_uniform(y_row), lane = threadIdx.x % 32;
    x += lane / 8 * pitch + lane % 8 * kLine;
    y += lane / 8 * y_pitch + lane % 8 * kLine;
    if constexpr (kRows <= kRowsAtOnce) {
      add<kRows>(acc, x, y, pitch, y_pitch, valid, zero);
    } else {
#pragma unroll 1
      for (int first = 0; first < min(rows, kRows); first += kRowsAtOnce)
        add<kRowsAtOnce>(acc, x + first * step * pitch, y + first * y_pitch, pitch, y_pitch, valid, zero);
    }
  }

  template <int count>
  __device__ void add(float (&acc)[blocks * kWholeTiles][4], uint32_t x, uint32_t y, int pitch, int y_pitch, bool valid,
                      uint32_t zero) const {
    constexpr int inputs = (count - 1) * step + 3, loads = (inputs + 3) / 4;
    uint32_t b[blocks][count];
#pragma unroll
    for (int j = 0; j < blocks; ++j) {
      // A tile's rows of y are multiples of 8 lines. Behind the unit's last block there is nothing to be summed.
      int const slot = (min(filters + j, last_filters) ^ int(threadIdx.x % 8)) * kSlot;
#pragma unroll
      for (int row = 0; row < count; row += 4) {
        uint32_t v[4];
        ptx::ldmatrix_x4_trans(v, y + slot + row * y_pitch);
#pragma unroll
        for (int i = 0; i < 4; ++i) b[j][row + i] = v[i];
      }
    }
    uint32_t third[count];  // the first column's inputs of its third tap
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      int const column = s == 0 ? 0 : planes == 1 ? s * kLine : s == 1 ? plane_bytes : kLine;
      uint32_t a[loads * 4];
#pragma unroll
      for (int i = 0; i < loads; ++i) {
        uint32_t const line = x + column + i * 4 * pitch;
        uint32_t const from = valid ? line + ((line >> 3 & 0x70) ^ channels * kSlot) : zero;
        if (inputs - i * 4 > 2) {
          uint32_t v[4];
          ptx::ldmatrix_x4_trans(v, from);
#pragma unroll
          for (int k = 0; k < 4; ++k) a[i * 4 + k] = v[k];
        } else {
          uint32_t v[2];
          ptx::ldmatrix_x2_trans(v, from);
          a[i * 4] = v[0], a[i * 4 + 1] = v[1];
        }
      }
      // The tile's halves: a row's inputs of one tap and of another.
      auto multiply = [&](int tile, auto const& lower, auto const& upper) {
#pragma unroll
        for (int row = 0; row < count; row += 2)
#pragma unroll
          for (int j = 0; j < blocks; ++j) {
            float (&to)[4] = acc[j * kWholeTiles + tile];
            ptx::mma_m16n8k16<T>(to, lower(row), upper(row), lower(row + 1), upper(row + 1), b[j][row], b[j][row + 1]);
          }
      };
      auto tap = [&a](int r) { return [&a, r](int row) { return a[row * step + r]; }; };
      multiply(s, tap(0), tap(1));
      if (s == 0) {
#pragma unroll
        for (int row = 0; row < count; ++row) third[row] = a[row * step + 2];
      } else if (s == 1) {
        multiply(3, [&](int row) { return third[row]; }, tap(2));
      } else {
        multiply(4, tap(2), [](int) { return 0u; });
      }
    }
  }
};

}  // namespace conv2d_ext::grouped
