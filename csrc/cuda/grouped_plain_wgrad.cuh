// wgrad of groups over NCHW, 3x3 filters of stride 1 or 2: pixels are what is summed over, and they are contiguous in
// both x and y, as mma.sync wants its operands. So nothing is turned: rows lie in shared memory as they do in memory,
// with zeros between them, and a lane reads four pixels of a row of y (float32: two) and, for the three taps of a row
// of the filter, those beside them in x.
//
// A warp has a job: 16 channels (rows; or two taps of 8) by 8 to 24 filters (columns), all nine taps, whose sums stay
// in registers. It walks down the rows of a tile: each row of x meets three rows of y (with stride 2 each row of y
// three rows of x). Blocks share the tiles, and a second kernel adds their sums in order. Zeros meet whatever x has
// there: sums that are NaN are made again, product by product.
#pragma once

#include "../core/plain.h"
#include "dependent.cuh"
#include "grouped_tile.cuh"
#include "launch.h"
#include "ptx.cuh"
#include "types.cuh"

namespace conv2d_ext::plain {

constexpr int kTaps = 9;

struct Side {
  void const* data;
  int64_t image;                // elements from image to image
  int channels, H, W;           // of the tensor
  int rows, images;             // of a tile
  int piece, chunks;            // bytes that are copied at once; such pieces of a row
  uint32_t per_row, per_image;  // for divisions by chunks, by rows
  int pitch, channel;           // bytes from row to row, channel to channel
  int of_block, step, low;      // channels of a block; rows of the image from tile to tile, above the first
};

struct Params {
  Side x, y;
  void* out;
  float2* sums;  // [unit][8 channels][8 filters][split][tap][lane], pairs of filters
  int64_t w_n, w_c, w_h, w_w;
  int N, P, Q, C_unit, K_unit, C_group, K_group;  // of a unit, of a group
  int units, jobs_c, jobs_k, shares, chunks_c, chunks_k;
  int rows, images, quads, tiles_h, tiles, splits, stride;
  int stage_bytes, stages, y_at;
};

// By a divisor of which `magic` is 2^32 over it, rounded up; 0: by one.
__device__ inline int divide(int i, uint32_t magic) { return magic == 0 ? i : int(__umulhi(uint32_t(i), magic)); }

// A tile's rows of the block's channels, in pieces of kBytes; those outside of the image are zeros.
template <int kBytes>
__device__ void copy_pieces(Side const& s, int size, uint32_t to, int first, int n0, int tile_h, int N) {
  int const warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  int const pieces = s.images * s.rows * s.chunks, count = min(s.of_block, s.channels - first);
  int const plane = s.H * s.W * size, h0 = tile_h * s.step - s.low;
  for (int j = lane; j < pieces; j += 32) {
    int const row = divide(j, s.per_row), image = divide(row, s.per_image);
    int const h = h0 + row - image * s.rows, chunk = j - row * s.chunks;
    bool const exists = n0 + image < N && unsigned(h) < unsigned(s.H);
    char const* from = static_cast<char const*>(s.data) + (exists ? (n0 + image) * s.image + h * s.W : 0) * size +
                       int64_t(first + warp) * plane + chunk * kBytes;
    uint32_t at = to + row * s.pitch + chunk * kBytes + warp * s.channel;
    if constexpr (kBytes == 2) {
      constexpr int together = 4;
      for (int c = warp; c < count; c += warps * together) {
        uint16_t v[together];
#pragma unroll
        for (int i = 0; i < together; ++i)
          v[i] = exists && c + i * warps < count
                     ? __ldg(reinterpret_cast<unsigned short const*>(from + int64_t(i) * warps * plane))
                     : uint16_t(0);
#pragma unroll
        for (int i = 0; i < together; ++i)
          if (c + i * warps < count) ptx::st_shared_u16(at + i * warps * s.channel, v[i]);
        from += int64_t(together) * warps * plane, at += together * warps * s.channel;
      }
    } else {
      for (int c = warp; c < count; c += warps) {
        if constexpr (kBytes == 16)
          ptx::cp_async_16(at, from, exists);
        else
          ptx::cp_async_ca<kBytes>(at, from, exists);
        from += int64_t(warps) * plane, at += warps * s.channel;
      }
    }
  }
}

__device__ inline void copy(Side const& s, int size, uint32_t to, int first, int n0, int tile_h, int N) {
  if (s.piece == 16)
    copy_pieces<16>(s, size, to, first, n0, tile_h, N);
  else if (s.piece == 8)
    copy_pieces<8>(s, size, to, first, n0, tile_h, N);
  else if (s.piece == 4)
    copy_pieces<4>(s, size, to, first, n0, tile_h, N);
  else
    copy_pieces<2>(s, size, to, first, n0, tile_h, N);
}

// The sums of a warp's job. What a lane reads of a row of x is asked for a row ahead.
template <class T, int stride, int blocks_c, int blocks_k>
struct Job {
  static constexpr bool f32 = std::is_same_v<T, float>;
  static constexpr int tiles = blocks_c == 2 ? 3 : 2;  // of a row of the filter
  float d[3][tiles][blocks_k][4];
  uint32_t x[blocks_c][stride == 1 ? 4 : 5], y[blocks_k][2];

  __device__ void load_x(uint32_t at, uint32_t block) {
#pragma unroll
    for (int c = 0; c < blocks_c; ++c, at += block) {
      x[c][0] = ptx::ld_shared(at - 4);
      if constexpr (stride == 1) {
        uint2 const v = ptx::ld_shared_v2(at);
        x[c][1] = v.x, x[c][2] = v.y, x[c][3] = ptx::ld_shared(at + 8);
      } else {
        uint4 const v = ptx::ld_shared_v4(at);
        x[c][1] = v.x, x[c][2] = v.y, x[c][3] = v.z, x[c][4] = v.w;
      }
    }
  }

  __device__ void load_y(uint32_t at, uint32_t block) {
#pragma unroll
    for (int k = 0; k < blocks_k; ++k, at += block) {
      uint2 const v = ptx::ld_shared_v2(at);
      y[k][0] = v.x, y[k][1] = v.y;
    }
  }

  __device__ void take_y(uint32_t (&to)[blocks_k][2]) const {
#pragma unroll
    for (int k = 0; k < blocks_k; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i) to[k][i] = f32 ? ptx::cvt_rn_tf32(__uint_as_float(y[k][i])) : y[k][i];
  }

  // The operands of the three taps.
  __device__ void take_x(uint32_t (&a)[tiles][4]) const {
#pragma unroll
    for (int c = 0; c < blocks_c; ++c)
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        uint32_t const(&v)[stride == 1 ? 4 : 5] = x[c];
        uint32_t low, high;
        if constexpr (f32) {
          low = ptx::cvt_rn_tf32(__uint_as_float(v[s]));
          high = ptx::cvt_rn_tf32(__uint_as_float(v[s + stride]));
        } else if constexpr (stride == 1) {
          low = s == 1 ? v[1] : __byte_perm(v[s / 2], v[s / 2 + 1], 0x5432);
          high = s == 1 ? v[2] : __byte_perm(v[s / 2 + 1], v[s / 2 + 2], 0x5432);
        } else {
          low = s == 1 ? __byte_perm(v[1], v[2], 0x5410) : __byte_perm(v[s / 2], v[s / 2 + 1], 0x7632);
          high = s == 1 ? __byte_perm(v[3], v[4], 0x5410) : __byte_perm(v[s / 2 + 2], v[s / 2 + 3], 0x7632);
        }
        int const tile = blocks_c == 2 ? s : s / 2, half = blocks_c == 2 ? c : s % 2;
        a[tile][half] = low, a[tile][half + 2] = high;
        if (blocks_c == 1 && s == 2) a[tile][1] = a[tile][3] = 0;
      }
  }

  __device__ void multiply(int r, uint32_t const (&a)[tiles][4], uint32_t const (&b)[blocks_k][2]) {
#pragma unroll
    for (int k = 0; k < blocks_k; ++k)
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        if constexpr (f32)
          ptx::mma_m16n8k8_tf32(d[r][i][k], a[i][0], a[i][1], a[i][2], a[i][3], b[k][0], b[k][1]);
        else
          ptx::mma_m16n8k16<T>(d[r][i][k], a[i][0], a[i][1], a[i][2], a[i][3], b[k][0], b[k][1]);
      }
  }

  // A row of x and those of y that it meets, with the first, the second and the last row of the filter.
  template <bool r0, bool r1, bool r2>
  __device__ void step(uint32_t (&b)[3][blocks_k][2], uint32_t& x_at, uint32_t x_pitch, uint32_t x_block,
                       uint32_t& y_at, uint32_t y_pitch, uint32_t y_block) {
    uint32_t a[tiles][4];
    take_x(a);
    if constexpr (r0) take_y(b[0]);
    if constexpr (r0 || r1) load_x(x_at += x_pitch, x_block);
    if constexpr (r0) load_y(y_at += y_pitch, y_block), multiply(0, a, b[0]);
    if constexpr (r1) multiply(1, a, b[1]);
    if constexpr (r2) multiply(2, a, b[2]);
    move(b[2], b[1]), move(b[1], b[0]);
  }

  __device__ static void move(uint32_t (&to)[blocks_k][2], uint32_t const (&from)[blocks_k][2]) {
#pragma unroll
    for (int k = 0; k < blocks_k; ++k) to[k][0] = from[k][0], to[k][1] = from[k][1];
  }

  // Down two rows of a tile or more. One row of y is read, and not used, behind the last.
  __device__ void walk(uint32_t x_at, uint32_t x_pitch, uint32_t x_block, uint32_t y_at, uint32_t y_pitch,
                       uint32_t y_block, int rows) {
    uint32_t b[3][blocks_k][2];  // of this row of y, and of those above
    load_x(x_at, x_block), load_y(y_at, y_block);
    if constexpr (stride == 1) {
      step<true, false, false>(b, x_at, x_pitch, x_block, y_at, y_pitch, y_block);
      step<true, true, false>(b, x_at, x_pitch, x_block, y_at, y_pitch, y_block);
#pragma unroll 1
      for (int i = 2; i < rows; ++i) step<true, true, true>(b, x_at, x_pitch, x_block, y_at, y_pitch, y_block);
      step<false, true, true>(b, x_at, x_pitch, x_block, y_at, y_pitch, y_block);
      step<false, false, true>(b, x_at, x_pitch, x_block, y_at, y_pitch, y_block);
    } else {
      uint32_t a[tiles][4];
      auto down = [&](bool last) {
        take_x(a), take_y(b[0]);
        load_x(x_at += x_pitch, x_block), load_y(y_at += y_pitch, y_block);
        multiply(0, a, b[0]);
        if (last) multiply(2, a, b[1]);
        take_x(a);
        load_x(x_at += x_pitch, x_block);
        multiply(1, a, b[0]);
        move(b[1], b[0]);
      };
      down(false);
#pragma unroll 1
      for (int i = 1; i < rows; ++i) down(true);
      take_x(a);
      multiply(2, a, b[1]);
    }
  }
};

template <class T, int stride, int blocks_c, int blocks_k>
__global__ void __launch_bounds__(plain_warps(blocks_k) * 32, 1) sums_kernel(__grid_constant__ Params const p) {
  extern __shared__ __align__(128) char shared[];
  constexpr int size = int(sizeof(T));
  uint32_t const stages = ptx::shared_address(shared);
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int const split = blockIdx.x % p.splits, place = blockIdx.x / p.splits;
  int const chunk = place % (p.chunks_c * p.chunks_k), unit0 = place / (p.chunks_c * p.chunks_k) * p.units;
  int const chunk_c = chunk % p.chunks_c, chunk_k = chunk / p.chunks_c;
  int const first = int(int64_t(split) * p.tiles / p.splits), end = int(int64_t(split + 1) * p.tiles / p.splits);
  for (int i = threadIdx.x * 16; i < p.stages * p.stage_bytes; i += blockDim.x * 16)
    ptx::st_shared_v4(stages + i, uint4{});
  __syncthreads();

  int const first_c = unit0 * p.C_unit + chunk_c * p.jobs_c * blocks_c * 8;
  int const first_k = unit0 * p.K_unit + chunk_k * p.jobs_k * blocks_k * 8;
  auto fetch = [&](int number) {
    if (number < end) {
      int const image = number / p.tiles_h, tile_h = number - image * p.tiles_h;
      uint32_t const to = stages + (number - first) % p.stages * p.stage_bytes;
      copy(p.x, size, to + kPlainFront, first_c, image * p.images, tile_h, p.N);
      copy(p.y, size, to + p.y_at, first_k, image * p.images, tile_h, p.N);
    }
    ptx::cp_async_commit_group();
  };

  // This warp's job: unit, blocks of channels and of filters, share.
  int const share = warp % p.shares, job = warp / p.shares;
  int const j_c = job % p.jobs_c, j_k = job / p.jobs_c % p.jobs_k, u = job / (p.jobs_c * p.jobs_k);
  int const c0 = (chunk_c * p.jobs_c + j_c) * blocks_c * 8, k0 = (chunk_k * p.jobs_k + j_k) * blocks_k * 8;
  bool const works = u < p.units && c0 < p.C_unit && k0 < p.K_unit && (unit0 + u) * p.C_unit < p.x.channels;
  uint32_t const x_at = (u * p.C_unit + j_c * blocks_c * 8 + g) * p.x.channel;
  uint32_t const y_at = (u * p.K_unit + j_k * blocks_k * 8 + g) * p.y.channel;
  // Blocks behind the last are others again, and nobody takes their sums.
  uint32_t const x_block = c0 + 8 < p.C_unit ? 8 * p.x.channel : 0, y_block = 8 * p.y.channel;
  int const columns = p.images * p.quads, steps = (columns + 3) / 4;

  Job<T, stride, blocks_c, blocks_k> sums;
  constexpr int tiles = Job<T, stride, blocks_c, blocks_k>::tiles;
#pragma unroll
  for (int r = 0; r < 3; ++r)
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
      for (int k = 0; k < blocks_k; ++k)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums.d[r][i][k][j] = 0;

  for (int i = 0; i < p.stages - 1; ++i) fetch(first + i);
  for (int number = first; number < end; ++number) {
    if (p.stages == 1) fetch(number);
    p.stages <= 2 ? ptx::cp_async_wait_group<0>() : ptx::cp_async_wait_group<1>();
    __syncthreads();
    // Half of the warps copy first, the others multiply meanwhile.
    bool const first_copies = warp / 4 % 2 == 0;
    if (p.stages > 1 && first_copies) fetch(number + p.stages - 1);
    if (works) {
      uint32_t const stage = stages + (number - first) % p.stages * p.stage_bytes;
      int const tile_h = number % p.tiles_h, rows = max(2, min(p.rows, p.P - tile_h * p.rows));
      for (int step = share; step < steps; step += p.shares) {
        int const column = step * 4 + t, image = column / p.quads, quad = column - image * p.quads;
        // Behind the last column of y there are four pixels of zeros, if there are such lanes.
        bool const exists = column < columns;
        uint32_t const x_off = exists ? image * p.x.rows * p.x.pitch + quad * 8 * stride : 0;
        uint32_t const y_off = exists ? image * p.y.rows * p.y.pitch + quad * 8 : p.quads * 8;
        sums.walk(stage + kPlainFront + x_at + x_off, p.x.pitch, x_block, stage + p.y_at + y_at + y_off, p.y.pitch,
                  y_block, rows);
      }
    }
    if (p.stages > 1 && !first_copies) fetch(number + p.stages - 1);
    if (p.stages == 1) __syncthreads();
  }
  ptx::griddepcontrol_launch_dependents();
  ptx::cp_async_wait_all();

  // The shares of a job, in order.
  constexpr int pairs = 3 * tiles * blocks_k * 2;
  if (p.shares > 1) {
    __syncthreads();
    float2* const mine = reinterpret_cast<float2*>(shared) + warp * pairs * 32 + lane;
    if (share > 0 && works)
#pragma unroll
      for (int i = 0; i < pairs; ++i) {
        float const* const d = &sums.d[0][0][0][0] + i * 2;
        mine[i * 32] = make_float2(d[0], d[1]);
      }
    __syncthreads();
    if (share > 0 || !works) return;
    for (int other = 1; other < p.shares; ++other)
#pragma unroll
      for (int i = 0; i < pairs; ++i) {
        float2 const v = mine[(other * pairs + i) * 32];
        float* const d = &sums.d[0][0][0][0] + i * 2;
        d[0] += v.x, d[1] += v.y;
      }
  }
  if (!works) return;
  int const of_c = p.C_unit / 8, of_k = p.K_unit / 8;
#pragma unroll
  for (int k = 0; k < blocks_k; ++k) {
    if (k0 + k * 8 >= p.K_unit) continue;
#pragma unroll
    for (int c = 0; c < blocks_c; ++c) {
      if (c0 + c * 8 >= p.C_unit) continue;
      int64_t const pair = (int64_t(unit0 + u) * of_c + c0 / 8 + c) * of_k + k0 / 8 + k;
      float2* const to = p.sums + (pair * p.splits + split) * kTaps * 32 + lane;
#pragma unroll
      for (int r = 0; r < 3; ++r)
#pragma unroll
        for (int s = 0; s < 3; ++s) {
          float const(&d)[4] = sums.d[r][blocks_c == 2 ? s : s / 2][k];
          int const half = blocks_c == 2 ? c : s % 2;
          to[(r * 3 + s) * 32] = make_float2(d[half * 2], d[half * 2 + 1]);
        }
    }
  }
}

// Product by product.
template <class T>
__device__ __noinline__ float sum_again(Params const& p, int k, int c, int r, int s) {
  float sum = 0;
  T const* const x = static_cast<T const*>(p.x.data) + int64_t(c) * p.x.H * p.x.W;
  T const* const y = static_cast<T const*>(p.y.data) + int64_t(k) * p.P * p.Q;
  for (int n = 0; n < p.N; ++n)
    for (int i = 0; i < p.P; ++i)
      for (int j = 0; j < p.Q; ++j) {
        int const h = i * p.stride - 1 + r, w = j * p.stride - 1 + s;
        if (unsigned(h) < unsigned(p.x.H) && unsigned(w) < unsigned(p.x.W))
          sum += widen(x[n * p.x.image + h * p.x.W + w]) * widen(y[n * p.y.image + i * p.Q + j]);
      }
  return sum;
}

// Adds the splits. A block has 8 channels by 8 filters, a warp for each tap.
template <class T>
__global__ void __launch_bounds__(kTaps * 32) add_kernel(__grid_constant__ Params const p) {
  __shared__ T values[8][8][kTaps];
  int const tap = threadIdx.x / 32, lane = threadIdx.x % 32, of_c = p.C_unit / 8, of_k = p.K_unit / 8;
  int const block_k = blockIdx.x % of_k, of_unit = blockIdx.x / of_k, block_c = of_unit % of_c, unit = of_unit / of_c;
  ptx::griddepcontrol_wait();
  float2 const* from = p.sums + int64_t(blockIdx.x) * p.splits * kTaps * 32 + tap * 32 + lane;
  float low = 0, high = 0;
#pragma unroll 8
  for (int s = 0; s < p.splits; ++s, from += kTaps * 32) {
    float2 const v = *from;
    low += v.x, high += v.y;
  }
  int const c = lane / 4, k = lane % 4 * 2;
  int const channel = unit * p.C_unit + block_c * 8 + c, filter = unit * p.K_unit + block_k * 8 + k;
  int const group = channel / p.C_group;
  if (!(low == low) && filter / p.K_group == group) low = sum_again<T>(p, filter, channel, tap / 3, tap % 3);
  if (!(high == high) && (filter + 1) / p.K_group == group)
    high = sum_again<T>(p, filter + 1, channel, tap / 3, tap % 3);
  values[k][c][tap] = narrow<T>(low), values[k + 1][c][tap] = narrow<T>(high);
  __syncthreads();
  for (int n = threadIdx.x; n < 64 * kTaps; n += blockDim.x) {
    int const f = n / (8 * kTaps), rest = n - f * 8 * kTaps;
    int const at = p.w_c == 1 ? rest % 8 : rest / kTaps, taps = p.w_c == 1 ? rest / 8 : rest % kTaps;
    int const to_c = unit * p.C_unit + block_c * 8 + at, to_k = unit * p.K_unit + block_k * 8 + f;
    int const of = to_c / p.C_group;
    if (to_k / p.K_group == of)
      static_cast<T*>(p.out)[to_k * p.w_n + (to_c - of * p.C_group) * p.w_c + taps / 3 * p.w_h + taps % 3 * p.w_w] =
          values[f][at][taps];
  }
}

inline uint32_t magic(int64_t divisor) { return divisor == 1 ? 0 : uint32_t((int64_t(1) << 32) / divisor + 1); }

inline Side make_side(void const* data, int64_t channels, int64_t H, int64_t W, DType dtype, int64_t rows,
                      int64_t images, int64_t pitch, int64_t channel, int64_t of_block, int64_t step, int64_t low) {
  Side s{};
  s.data = data, s.image = channels * H * W, s.channels = int(channels), s.H = int(H), s.W = int(W);
  s.rows = int(rows), s.images = int(images), s.piece = plain_piece(W, dtype);
  s.chunks = int(W * size_of(dtype) / s.piece), s.per_row = magic(s.chunks), s.per_image = magic(rows);
  s.pitch = int(pitch), s.channel = int(channel), s.of_block = int(of_block), s.step = int(step), s.low = int(low);
  return s;
}

inline Params make_params(Problem const& problem, PlainSums const& t, Arguments const& args) {
  int64_t const per_unit = groups_per_unit(problem);
  Params p{};
  p.x = make_side(args.a, problem.C, problem.H, problem.W, problem.dtype, t.x_rows, t.images, t.x_pitch, t.x_channel,
                  t.x_channels, t.rows * problem.stride_h, 1);
  p.y = make_side(args.b, problem.K, problem.P(), problem.Q(), problem.dtype, t.rows, t.images, t.y_pitch, t.y_channel,
                  t.y_channels, t.rows, 0);
  p.out = args.out, p.sums = static_cast<float2*>(args.workspace);
  p.w_n = problem.w.n, p.w_c = problem.w.c, p.w_h = problem.w.h, p.w_w = problem.w.w;
  p.N = int(problem.N), p.P = int(problem.P()), p.Q = int(problem.Q());
  p.C_group = int(problem.C_per_group()), p.K_group = int(problem.K_per_group());
  p.C_unit = int(per_unit * p.C_group), p.K_unit = int(per_unit * p.K_group);
  p.units = int(t.units), p.jobs_c = int(t.jobs_c), p.jobs_k = int(t.jobs_k), p.shares = int(t.shares);
  p.chunks_c = int(t.chunks_c), p.chunks_k = int(t.chunks_k), p.rows = int(t.rows), p.images = int(t.images);
  p.quads = int(t.quads), p.tiles_h = int(ceil_div(problem.P(), t.rows)), p.tiles = int(t.tiles);
  p.splits = int(t.splits), p.stride = int(problem.stride_h);
  p.stage_bytes = int(t.stage_bytes), p.stages = int(t.stages);
  p.y_at = int(t.y_at);
  return p;
}

template <class T, int stride, int blocks_c, int blocks_k>
cudaError_t launch(Problem const& problem, PlainSums const& t, Arguments const& args, cudaStream_t stream) {
  Params const p = make_params(problem, t, args);
  auto* const kernel = sums_kernel<T, stride, blocks_c, blocks_k>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared));
  if (error != cudaSuccess) return error;
  int64_t const units = problem.C / p.C_unit;
  kernel<<<unsigned(t.places * t.splits), plain_warps(blocks_k) * 32, size_t(t.shared), stream>>>(p);
  if (cudaError_t const failed = cudaGetLastError()) return failed;
  return launch_dependent(add_kernel<T>, dim3(unsigned(units * (p.C_unit / 8) * (p.K_unit / 8))), kTaps * 32, 0, stream,
                          p);
}

template <DType dtype>
cudaError_t start_row(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  int sm_count = 0;
  if (cudaError_t const error = grouped::count_sms(sm_count)) return error;
  PlainSums const t = plain_sums(problem, Device{sm_count, 90});
  bool const strided = problem.stride_h == 2;
  auto* const start = t.blocks_k == 1   ? (strided ? launch<T, 2, 1, 1> : launch<T, 1, 1, 1>)
                      : t.blocks_k == 2 ? (strided ? launch<T, 2, 2, 2> : launch<T, 1, 2, 2>)
                                        : (strided ? launch<T, 2, 2, 4> : launch<T, 1, 2, 4>);
  return start(problem, t, args, stream);
}

}  // namespace conv2d_ext::plain

#define CONV2D_EXT_GROUPED_PLAIN_INSTANCE(family, op, dtype, tm, tn, tk, variant)                                     \
  namespace conv2d_ext {                                                                                              \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const& p, Plan const&, Arguments const& args, \
                                                                cudaStream_t stream) {                                \
    return plain::start_row<DType::dtype>(p, args, stream);                                                           \
  }                                                                                                                   \
  }
