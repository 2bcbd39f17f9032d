// wgrad of groups over NCHW, 3x3 filters of stride 1 or 2: pixels are what is summed over, and they are contiguous in
// both x and y, as mma.sync wants its operands. So nothing is turned: rows lie in shared memory as they do in memory,
// and a lane reads four pixels of a row of y (float32: two) and, for the three taps of a row of the filter, those
// beside them in x.
//
// A tile's rows of a channel are one run of memory, which may begin and end within 16 bytes, those of whole images
// several channels'; a warpgroup has the copy engine bring them. So nothing lies between rows: a lane at the border of
// the image puts zeros in what it loads, rows above and below the image are left out, and lanes behind the last column
// read zeros.
//
// A warp has a job: 16 channels (rows; or two taps of 8) by 8 to 32 filters (columns), all nine taps, whose sums stay
// in registers. It walks down the rows of a tile: each row of x meets three rows of y (with stride 2 each row of y
// three rows of x). Blocks share the tiles, and a second kernel adds their sums in order. Zeros meet whatever x has
// there: sums that are NaN are made again, product by product. Strict float32 splits its operands into two TF32 parts
// (three products), and adds each row's sums to the totals in registers.
#pragma once

#include "../core/plain.h"
#include "dependent.cuh"
#include "give_back.cuh"
#include "grouped_tile.cuh"
#include "launch.h"
#include "ptx.cuh"
#include "types.cuh"

namespace conv2d_ext::plain {

constexpr int kTaps = 9;

struct Tensor {
  void const* data;
  int64_t image;  // elements from image to image
  int H, W;
};

// What both kernels take.
struct Params {
  Tensor x, y;
  void* out;
  float2* sums;  // [unit][8 channels][8 filters][split][tap][lane], pairs of filters
  int64_t w_n, w_c, w_h, w_w;
  int N, P, Q, C_unit, K_unit, C_group, K_group;  // of a unit, of a group
  int splits, stride;
};

struct RunSide {
  char const* data;
  int64_t image, plane;  // bytes from image to image, channel to channel
  int channels, H, pitch, together;
  int of_block, step, low;   // channels of a block; rows of the image from tile to tile, above the first output's
  int lead, run_image, run;  // of a run in shared memory, as in PlainRun
  bool shifts;
};

struct RunParams {
  Params add;
  RunSide x, y;
  int units, jobs_c, jobs_k, shares, chunks_c, chunks_k;
  int rows, images, quads, tiles_h, tiles;  // quads: 8 bytes of a row of y
  int stage_bytes, stages, y_at;
};

// An operand's register of what was loaded: float32 rounded to the nearest TF32 number.
template <class T>
__device__ inline uint32_t operand(uint32_t raw) {
  uint32_t part[1];
  grouped::split<T, 1>(raw, part);
  return part[0];
}

// How a row of a side is loaded: 8 bytes and more at once, words, or halves of words, which are moved into place.
enum Loads { kVectors, kWords, kHalves };

// What a lane's words of a row are anded with, so that nothing is left of columns outside of the image.
struct Borders {
  uint32_t x[5], y[2];
};

// Of a word's columns, from `column` on, those within a row.
template <int each>
__device__ inline uint32_t inside(int column, int width) {
  uint32_t const first = unsigned(column) < unsigned(width) ? (each == 1 ? ~0u : 0xffffu) : 0;
  return each == 1 ? first : first | (unsigned(column + 1) < unsigned(width) ? 0xffff0000u : 0);
}

template <class T, int parts, int stride, int blocks_c, int blocks_k, Loads how>
struct Walk {
  static constexpr bool f32 = std::is_same_v<T, float>;
  static constexpr int tiles = blocks_c == 2 ? 3 : 2;  // of a row of the filter
  static constexpr int loads = stride == 1 ? 4 : 5;    // words of a row of x
  static constexpr bool x_halves = how == kHalves && stride == 1, y_halves = how == kHalves;
  static constexpr int count = 3 * tiles * blocks_k * 4;
  // Of a word of y, in registers: its parts, or itself, to be split again for each of the three rows that it meets.
  static constexpr int kept = blocks_k == 3 ? 1 : parts;
  static_assert(how != kHalves || !f32);
  float d[3][tiles][blocks_k][4];
  uint32_t x[blocks_c][loads + x_halves], y[blocks_k][2 + y_halves];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < count; ++i) (&d[0][0][0][0])[i] = 0;
  }

  // A place that a lane reads from, the way to the next row and to the next block of 8 channels; how the words of the
  // row that is taken next are moved (the bytes of two of them), and what that changes by from row to row.
  struct Lane {
    uint32_t at, pitch, block, bytes, change;
    __device__ Lane(uint32_t at, uint32_t pitch, uint32_t block)
        : at(at),
          pitch(pitch),
          block(block),
          bytes(at & 2 ? 0x5432 : 0x3210),
          change(pitch & 2 ? 0x5432 ^ 0x3210 : 0) {}
  };

  __device__ void load_x(Lane const& from) {
    uint32_t at = x_halves ? from.at & ~3u : from.at;
#pragma unroll
    for (int c = 0; c < blocks_c; ++c, at += from.block) {
      x[c][0] = ptx::ld_shared(at - 4);
      if constexpr (how != kVectors) {
#pragma unroll
        for (int i = 1; i < loads + x_halves; ++i) x[c][i] = ptx::ld_shared(at + i * 4 - 4);
      } else if constexpr (stride == 1) {
        uint2 const v = ptx::ld_shared_v2(at);
        x[c][1] = v.x, x[c][2] = v.y, x[c][3] = ptx::ld_shared(at + 8);
      } else {
        uint4 const v = ptx::ld_shared_v4(at);
        x[c][1] = v.x, x[c][2] = v.y, x[c][3] = v.z, x[c][4] = v.w;
      }
    }
  }

  __device__ void load_y(Lane const& from) {
    uint32_t at = y_halves ? from.at & ~3u : from.at;
#pragma unroll
    for (int k = 0; k < blocks_k; ++k, at += from.block) {
      if constexpr (how != kVectors) {
#pragma unroll
        for (int i = 0; i < 2 + y_halves; ++i) y[k][i] = ptx::ld_shared(at + i * 4);
      } else {
        uint2 const v = ptx::ld_shared_v2(at);
        y[k][0] = v.x, y[k][1] = v.y;
      }
    }
  }

  __device__ void next_x(Lane& from) { from.at += from.pitch, load_x(from); }
  __device__ void next_y(Lane& from) { from.at += from.pitch, load_y(from); }

  __device__ void take_y(uint32_t (&to)[kept][blocks_k][2], Lane& of, Borders const& m) const {
#pragma unroll
    for (int k = 0; k < blocks_k; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t word = y[k][i];
        if constexpr (y_halves) word = __byte_perm(word, y[k][i + 1], of.bytes);
        if (y_halves || (how == kWords && i == 1)) word &= m.y[i];
        uint32_t part[kept] = {word};
        if constexpr (kept == parts) grouped::split<T, parts>(word, part);
#pragma unroll
        for (int j = 0; j < kept; ++j) to[j][k][i] = part[j];
      }
    if constexpr (y_halves) of.bytes ^= of.change;
  }

  // The operands of the three taps.
  __device__ void take_x(uint32_t (&a)[parts][tiles][4], Lane& of, Borders const& m) const {
#pragma unroll
    for (int c = 0; c < blocks_c; ++c) {
      uint32_t v[loads];
#pragma unroll
      for (int i = 0; i < loads; ++i) {
        v[i] = x[c][i];
        if constexpr (x_halves) v[i] = __byte_perm(v[i], x[c][i + 1], of.bytes);
        if (i == 0 || (how == kVectors ? stride == 1 && i == loads - 1 : i > 1 || x_halves)) v[i] &= m.x[i];
      }
      uint32_t part[loads][parts];
      if constexpr (f32) {
#pragma unroll
        for (int i = 0; i < loads; ++i) grouped::split<T, parts>(v[i], part[i]);
      }
#pragma unroll
      for (int s = 0; s < 3; ++s)
#pragma unroll
        for (int j = 0; j < parts; ++j) {
          uint32_t low, high;
          if constexpr (f32) {
            low = part[s][j], high = part[s + stride][j];
          } else if constexpr (stride == 1) {
            low = s == 1 ? v[1] : __byte_perm(v[s / 2], v[s / 2 + 1], 0x5432);
            high = s == 1 ? v[2] : __byte_perm(v[s / 2 + 1], v[s / 2 + 2], 0x5432);
          } else {
            low = s == 1 ? __byte_perm(v[1], v[2], 0x5410) : __byte_perm(v[s / 2], v[s / 2 + 1], 0x7632);
            high = s == 1 ? __byte_perm(v[3], v[4], 0x5410) : __byte_perm(v[s / 2 + 2], v[s / 2 + 3], 0x7632);
          }
          int const tile = blocks_c == 2 ? s : s / 2, half = blocks_c == 2 ? c : s % 2;
          a[j][tile][half] = low, a[j][tile][half + 2] = high;
          if (blocks_c == 1 && s == 2) a[j][tile][1] = a[j][tile][3] = 0;
        }
    }
    if constexpr (x_halves) of.bytes ^= of.change;
  }

  // With two parts the products of a row are summed apart: the tensor cores cut where they add.
  __device__ void multiply(int r, uint32_t const (&a)[parts][tiles][4], uint32_t const (&b)[kept][blocks_k][2]) {
#pragma unroll
    for (int k = 0; k < blocks_k; ++k) {
      uint32_t v[2][parts];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (kept == parts) {
#pragma unroll
          for (int j = 0; j < parts; ++j) v[i][j] = b[j][k][i];
        } else {
          grouped::split<T, parts>(b[0][k][i], v[i]);
        }
      }
      if constexpr (parts == 1) {
        multiply<0, 0>(d[r], k, a, v);
      } else {
        float sums[tiles][blocks_k][4] = {};
        multiply<1, 0>(sums, k, a, v), multiply<0, 1>(sums, k, a, v), multiply<0, 0>(sums, k, a, v);
#pragma unroll
        for (int i = 0; i < tiles * 4; ++i) d[r][i / 4][k][i % 4] += sums[i / 4][k][i % 4];
      }
    }
  }

  template <int part_x, int part_y>
  __device__ static void multiply(float (&to)[tiles][blocks_k][4], int k, uint32_t const (&a)[parts][tiles][4],
                                  uint32_t const (&v)[2][parts]) {
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
      uint32_t const(&u)[4] = a[part_x][i];
      if constexpr (f32)
        ptx::mma_m16n8k8_tf32(to[i][k], u[0], u[1], u[2], u[3], v[0][part_y], v[1][part_y]);
      else
        ptx::mma_m16n8k16<T>(to[i][k], u[0], u[1], u[2], u[3], v[0][part_y], v[1][part_y]);
    }
  }

  __device__ static void move(uint32_t (&to)[kept][blocks_k][2], uint32_t const (&from)[kept][blocks_k][2]) {
#pragma unroll
    for (int j = 0; j < kept; ++j)
#pragma unroll
      for (int k = 0; k < blocks_k; ++k) to[j][k][0] = from[j][k][0], to[j][k][1] = from[j][k][1];
  }

  // A row of x and those of y that it meets, with the first, the second and the last row of the filter.
  template <bool r0, bool r1, bool r2>
  __device__ void step(uint32_t (&b)[3][kept][blocks_k][2], Lane& of_x, Lane& of_y, Borders const& m, bool exists) {
    uint32_t a[parts][tiles][4];
    take_x(a, of_x, m);
    if constexpr (r0) take_y(b[0], of_y, m);
    if constexpr (r0 || r1) next_x(of_x);
    if constexpr (r0) next_y(of_y);
    if (exists) {
      if constexpr (r0) multiply(0, a, b[0]);
      if constexpr (r1) multiply(1, a, b[1]);
      if constexpr (r2) multiply(2, a, b[2]);
    }
    move(b[2], b[1]), move(b[1], b[0]);
  }

  // Down two rows of a tile or more; the row above the first may not exist, nor the one below the last. What is read
  // behind them is not used.
  __device__ void walk(Lane of_x, Lane of_y, Borders const& m, int rows, bool above, bool below) {
    uint32_t b[3][kept][blocks_k][2];  // of this row of y, and of those above
    load_x(of_x), load_y(of_y);
    if constexpr (stride == 1 && kept < parts) {
      // One step for all rows: five of them would leave no registers for as many sums.
#pragma unroll 1
      for (int i = 0; i < rows + 2; ++i) {
        bool const r0 = i < rows, r1 = i > 0 && i <= rows, r2 = i > 1;
        uint32_t a[parts][tiles][4];
        take_x(a, of_x, m);
        if (r0) take_y(b[0], of_y, m), next_y(of_y);
        if (i <= rows) next_x(of_x);
        if (i == 0 ? above : i <= rows || below) {
          if (r0) multiply(0, a, b[0]);
          if (r1) multiply(1, a, b[1]);
          if (r2) multiply(2, a, b[2]);
        }
        move(b[2], b[1]), move(b[1], b[0]);
      }
    } else if constexpr (stride == 1) {
      step<true, false, false>(b, of_x, of_y, m, above);
      step<true, true, false>(b, of_x, of_y, m, true);
#pragma unroll 1
      for (int i = 2; i < rows; ++i) step<true, true, true>(b, of_x, of_y, m, true);
      step<false, true, true>(b, of_x, of_y, m, true);
      step<false, false, true>(b, of_x, of_y, m, below);
    } else {
      uint32_t a[parts][tiles][4];
      auto down = [&](bool last, bool first) {
        take_x(a, of_x, m), take_y(b[0], of_y, m);
        next_x(of_x), next_y(of_y);
        if (first) multiply(0, a, b[0]);
        if (last) multiply(2, a, b[1]);
        take_x(a, of_x, m);
        next_x(of_x);
        multiply(1, a, b[0]);
        move(b[1], b[0]);
      };
      down(false, above);
#pragma unroll 1
      for (int i = 1; i < rows; ++i) down(true, true);
      if (below) {
        take_x(a, of_x, m);
        multiply(2, a, b[1]);
      }
    }
  }

  // A value that comes of the last loads.
  __device__ uint32_t last() const { return x[blocks_c - 1][loads + x_halves - 1] | y[blocks_k - 1][1 + y_halves]; }
};

// The rows of the image that a tile has of a side.
struct Rows {
  int first, count, before;  // before: rows of the tile that lie above the image
};

__device__ inline Rows rows_of(RunSide const& s, int tile_h, int rows) {
  int const from = tile_h * s.step - s.low, first = max(from, 0);
  return {first, min(from + rows, s.H) - first, first - from};
}

// Where a channel's first row lies in shared memory, the one above the image if tiles have that. Where runs begin
// within 16 bytes: of the tile at the image's upper end, without `lead`.
__device__ inline uint32_t channel_at(RunSide const& s, int first, int c) {
  uint32_t const at = c / s.together * s.run + c % s.together * int(s.plane);
  return s.shifts ? at + uint32_t(first + c) * uint32_t(s.plane) % 16 : at + (s.lead > 0 ? s.lead - s.pitch : 0);
}

// The same of a tile. Rows further down begin elsewhere within 16 bytes; a row above the image has its place in `lead`.
__device__ inline uint32_t row_at(RunSide const& s, uint32_t at, int tile_h) {
  if (!s.shifts) return at;
  int const first = tile_h * s.step - s.low;
  return (at & ~15u) + (at + uint32_t(max(first, 0) * s.pitch)) % 16 + (first < 0 ? s.lead - s.pitch : 0);
}

// Of a stage's copies, by a warpgroup. All its warps arrive, also one that has no run to copy: else nobody waits for
// it, and before it looks, two phases of `empty` may pass, whose second hides the first. It then waits for ever.
constexpr int kCopyingWarps = 4;
__device__ inline void expect_runs(uint64_t* full, uint32_t bytes_of_lane) {
  uint32_t const bytes = __reduce_add_sync(~0u, bytes_of_lane);
  __syncwarp();  // the same of lanes: all have seen the stage empty before it is filled
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_expect_tx(full, bytes);
}

// By a warpgroup: the runs of a side's tile. An instruction takes the copies of a warp's lanes one after the other.
// A tensor ends with 16 bytes, as images of 8 channels do.
struct Runs {
  int first, count;  // this lane's, every 128th
  char const* from;
  uint32_t at, bytes;

  __device__ Runs(RunSide const& s, int first_channel, int n0, int tile_h, int rows) {
    Rows const r = rows_of(s, tile_h, rows);
    first = threadIdx.x % 32 * 4 + threadIdx.x / 32 % 4;
    count = (min(s.of_block, s.channels - first_channel) + s.together - 1) / s.together;
    bytes = uint32_t(s.together > 1 ? s.together * int(s.plane) : r.count * s.pitch);
    from = s.data + n0 * s.image + first_channel * s.plane + int64_t(r.first) * s.pitch;
    at = r.before > 0 ? s.lead : 0;
  }
  __device__ char const* source(RunSide const& s, int run) const { return from + int64_t(run * s.together) * s.plane; }
  __device__ static uint32_t shift(char const* source) { return uint32_t(reinterpret_cast<uintptr_t>(source)) % 16; }

  __device__ uint32_t bytes_of_lane(RunSide const& s, int images) const {
    if (!s.shifts) return first < count ? uint32_t((count - first + 127) / 128 * images) * bytes : 0;
    uint32_t sum = 0;  // of one image
#pragma unroll 1
    for (int run = first; run < count; run += 128) sum += (shift(source(s, run)) + bytes + 15) / 16 * 16;
    return sum;
  }
  __device__ void copy(RunSide const& s, uint32_t to, int images, uint64_t* bar) const {
#pragma unroll 1
    for (int i = 0; i < images; ++i)
#pragma unroll 1
      for (int run = first; run < count; run += 128) {
        char const* const data = source(s, run) + i * s.image;
        uint32_t const behind = shift(data);
        ptx::cp_async_bulk(to + at + run * s.run + i * s.run_image, data - behind, (behind + bytes + 15) / 16 * 16,
                           bar);
      }
  }
};

template <class T, int parts, int stride, int blocks_c, int blocks_k, Loads how>
__global__ void __launch_bounds__(runs_warps(blocks_k, parts == 2) * 32 + 128, 1)
    sums_kernel(__grid_constant__ RunParams const p) {
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t full[4], empty[4];
  __shared__ __align__(16) uint32_t zeros[12];
  constexpr int warps = runs_warps(blocks_k, parts == 2);
  // Of what the launch gives to all threads: registers of warps that multiply, and of the warpgroup that copies.
  constexpr int registers = warps == 16 ? 112 : warps == 12 ? 152 : 232, copying = warps == 16 ? 32 : 40;
  static_assert(registers * warps + copying * 4 <= 65536 / (warps * 32 + 128) / 8 * 8 * (warps + 4));
  Params const& q = p.add;
  uint32_t const stages = ptx::shared_address(shared);
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int const split = blockIdx.x % q.splits, place = blockIdx.x / q.splits;
  int const chunk = place % (p.chunks_c * p.chunks_k), unit0 = place / (p.chunks_c * p.chunks_k) * p.units;
  int const chunk_c = chunk % p.chunks_c, chunk_k = chunk / p.chunks_c;
  int const least = p.tiles / q.splits, more = p.tiles % q.splits;  // tiles
  int const first = split * least + min(split, more), end = first + least + (split < more ? 1 : 0);
  if (threadIdx.x < 12) zeros[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::mbarrier_init(&full[i], kCopyingWarps);
      ptx::mbarrier_init(&empty[i], warps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  int const first_c = unit0 * q.C_unit + chunk_c * p.jobs_c * blocks_c * 8;
  int const first_k = unit0 * q.K_unit + chunk_k * p.jobs_k * blocks_k * 8;
  if (warp >= warps) {
    ptx::setmaxnreg_dec<copying>();
    int stage = 0;
    for (int number = first; number < end; ++number) {
      if (number - first >= p.stages) ptx::mbarrier_wait(&empty[stage], ((number - first) / p.stages - 1) & 1);
      int const image = number / p.tiles_h, tile_h = number - image * p.tiles_h, n0 = image * p.images;
      int const images = min(p.images, q.N - n0), rows = min(p.rows, q.P - tile_h * p.rows);
      int const x_rows = (rows - 1) * stride + 3;
      Runs const x(p.x, first_c, n0, tile_h, x_rows), y(p.y, first_k, n0, tile_h, rows);
      expect_runs(&full[stage], x.bytes_of_lane(p.x, images) + y.bytes_of_lane(p.y, images));
      uint32_t const to = stages + stage * p.stage_bytes;
      x.copy(p.x, to + uint32_t(kRunsFront), images, &full[stage]), y.copy(p.y, to + p.y_at, images, &full[stage]);
      if (++stage == p.stages) stage = 0;
    }
    return;
  }
  ptx::setmaxnreg_inc<registers>();

  // This warp's job: unit, blocks of channels and of filters, share.
  int const share = warp % p.shares, job = warp / p.shares;
  int const j_c = job % p.jobs_c, j_k = job / p.jobs_c % p.jobs_k, u = job / (p.jobs_c * p.jobs_k);
  int const c0 = (chunk_c * p.jobs_c + j_c) * blocks_c * 8, k0 = (chunk_k * p.jobs_k + j_k) * blocks_k * 8;
  bool const works = u < p.units && c0 < q.C_unit && k0 < q.K_unit && (unit0 + u) * q.C_unit < p.x.channels;

  using Sums = Walk<T, parts, stride, blocks_c, blocks_k, how>;
  Sums sums;
  sums.clear();

  int const c = u * q.C_unit + j_c * blocks_c * 8 + g, k = u * q.K_unit + j_k * blocks_k * 8 + g;
  uint32_t const x_at = kRunsFront + channel_at(p.x, first_c, c), y_at = channel_at(p.y, first_k, k);
  // Blocks behind the last are others again, and nobody takes their sums.
  uint32_t const x_block = c0 + 8 < q.C_unit ? 8 / p.x.together * p.x.run : 0, y_block = 8 / p.y.together * p.y.run;
  int stage = 0, phase = 0;
  for (int number = first; number < end; ++number) {
    ptx::mbarrier_wait(&full[stage], phase);
    if (works) {
      uint32_t const at = stages + stage * p.stage_bytes;
      int const image0 = number / p.tiles_h, tile_h = number - image0 * p.tiles_h;
      int const images = min(p.images, q.N - image0 * p.images), rows = min(p.rows, q.P - tile_h * p.rows);
      int const columns = images * p.quads, steps = (columns + 3) / 4;
      uint32_t const x_row = at + row_at(p.x, x_at, tile_h), y_row = at + p.y_at + row_at(p.y, y_at, tile_h);
      bool const above = tile_h > 0, below = (tile_h * p.rows + rows - 1) * stride + 1 < p.x.H;
      for (int step = share; step < steps; step += p.shares) {
        int const column = step * 4 + t, image = column / p.quads, quad = column - image * p.quads;
        bool const exists = column < columns;
        uint32_t const zero = ptx::shared_address(zeros) + 16;
        typename Sums::Lane const of_x(exists ? x_row + image * p.x.run_image + quad * 8 * stride : zero,
                                       exists ? uint32_t(p.x.pitch) : 0, exists ? x_block : 0);
        typename Sums::Lane const of_y(exists ? y_row + image * p.y.run_image + quad * 8 : zero,
                                       exists ? uint32_t(p.y.pitch) : 0, exists ? y_block : 0);
        constexpr int each = 4 / int(sizeof(T));  // columns of a word
        Borders m;
#pragma unroll
        for (int i = 0; i < 5; ++i) m.x[i] = inside<each>((quad * 2 * stride + i - 1) * each, q.x.W);
#pragma unroll
        for (int i = 0; i < 2; ++i) m.y[i] = inside<each>((quad * 2 + i) * each, q.Q);
        sums.walk(of_x, of_y, m, rows, above, below);
      }
    }
    give_back(&empty[stage], works ? sums.last() : 0);
    if (++stage == p.stages) stage = 0, phase ^= 1;
  }
  ptx::griddepcontrol_launch_dependents();

  // The shares of a job, in order.
  constexpr int pairs = Sums::count / 2;
  if (p.shares > 1) {
    ptx::bar_sync(1, warps * 32);
    float2* const mine = reinterpret_cast<float2*>(shared) + warp * pairs * 32 + lane;
    if (share > 0 && works)
#pragma unroll
      for (int i = 0; i < pairs; ++i) {
        float const* const d = &sums.d[0][0][0][0] + i * 2;
        mine[i * 32] = make_float2(d[0], d[1]);
      }
    ptx::bar_sync(1, warps * 32);
    if (share > 0 || !works) return;
#pragma unroll 1
    for (int other = 1; other < p.shares; ++other)
#pragma unroll
      for (int i = 0; i < pairs; ++i) {
        float2 const v = mine[(other * pairs + i) * 32];
        float* const d = &sums.d[0][0][0][0] + i * 2;
        d[0] += v.x, d[1] += v.y;
      }
  }
  if (!works) return;
  int const of_c = (q.C_unit + 7) / 8, of_k = (q.K_unit + 7) / 8;
#pragma unroll
  for (int k = 0; k < blocks_k; ++k) {
    if (k0 + k * 8 >= q.K_unit) continue;
#pragma unroll
    for (int c = 0; c < blocks_c; ++c) {
      if (c0 + c * 8 >= q.C_unit) continue;
      int64_t const pair = (int64_t(unit0 + u) * of_c + c0 / 8 + c) * of_k + k0 / 8 + k;
      float2* const to = q.sums + (pair * q.splits + split) * kTaps * 32 + lane;
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
    for (int i = 0; i < p.P; ++i) {
      for (int j = 0; j < p.Q; ++j) {
        int const h = i * p.stride - 1 + r, w = j * p.stride - 1 + s;
        if (unsigned(h) < unsigned(p.x.H) && unsigned(w) < unsigned(p.x.W))
          sum += widen(x[n * p.x.image + h * p.x.W + w]) * widen(y[n * p.y.image + i * p.Q + j]);
      }
      if (sum != sum) return sum;  // NaN, whatever comes
    }
  return sum;
}

// Adds the splits. A block has 8 channels by 8 filters, a warp for each tap.
template <class T>
__global__ void __launch_bounds__(kTaps * 32) add_kernel(__grid_constant__ Params const p) {
  __shared__ T values[8][8][kTaps];
  int const tap = threadIdx.x / 32, lane = threadIdx.x % 32, of_c = (p.C_unit + 7) / 8, of_k = (p.K_unit + 7) / 8;
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
  // What lies behind the unit's channels and filters is of no group.
  int const group = block_c * 8 + c < p.C_unit ? channel / p.C_group : -1;
  int const filters = p.K_unit - block_k * 8;
  if (!(low == low) && filter / p.K_group == group && k < filters)
    low = sum_again<T>(p, filter, channel, tap / 3, tap % 3);
  if (!(high == high) && (filter + 1) / p.K_group == group && k + 1 < filters)
    high = sum_again<T>(p, filter + 1, channel, tap / 3, tap % 3);
  values[k][c][tap] = narrow<T>(low), values[k + 1][c][tap] = narrow<T>(high);
  __syncthreads();
  for (int n = threadIdx.x; n < 64 * kTaps; n += blockDim.x) {
    int const f = n / (8 * kTaps), rest = n - f * 8 * kTaps;
    int const at = p.w_c == 1 ? rest % 8 : rest / kTaps, taps = p.w_c == 1 ? rest / 8 : rest % kTaps;
    int const to_c = unit * p.C_unit + block_c * 8 + at, to_k = unit * p.K_unit + block_k * 8 + f;
    int const of = to_c / p.C_group;
    if (to_k / p.K_group == of && block_c * 8 + at < p.C_unit && f < filters)
      static_cast<T*>(p.out)[to_k * p.w_n + (to_c - of * p.C_group) * p.w_c + taps / 3 * p.w_h + taps % 3 * p.w_w] =
          values[f][at][taps];
  }
}

inline RunSide make_run_side(void const* data, int64_t channels, int64_t H, int64_t W, DType dtype, PlainRun const& r,
                             int64_t of_block, int64_t step, int64_t low) {
  RunSide s{};
  int64_t const size = size_of(dtype);
  s.data = static_cast<char const*>(data), s.image = channels * H * W * size, s.plane = H * W * size;
  s.channels = int(channels), s.H = int(H), s.pitch = int(W * size), s.together = int(r.together);
  s.of_block = int(of_block), s.step = int(step), s.low = int(low);
  s.lead = int(r.lead), s.run_image = int(r.image), s.run = int(r.stride), s.shifts = r.shifts;
  return s;
}

template <class T, int parts, int stride, int blocks_c, int blocks_k, Loads how>
cudaError_t launch_runs(Problem const& problem, PlainRuns const& t, Arguments const& args, cudaStream_t stream) {
  int64_t const per_unit = plain_per_unit(problem), stride_h = problem.stride_h;
  RunParams p{};
  Params& q = p.add;
  q.x = {args.a, problem.C * problem.H * problem.W, int(problem.H), int(problem.W)};
  q.y = {args.b, problem.K * problem.P() * problem.Q(), int(problem.P()), int(problem.Q())};
  q.out = args.out, q.sums = static_cast<float2*>(args.workspace);
  q.w_n = problem.w.n, q.w_c = problem.w.c, q.w_h = problem.w.h, q.w_w = problem.w.w;
  q.N = int(problem.N), q.P = int(problem.P()), q.Q = int(problem.Q());
  q.C_group = int(problem.C_per_group()), q.K_group = int(problem.K_per_group());
  q.C_unit = int(per_unit * q.C_group), q.K_unit = int(per_unit * q.K_group);
  q.splits = int(t.splits), q.stride = stride;
  p.x = make_run_side(args.a, problem.C, problem.H, problem.W, problem.dtype, t.x, t.x_channels, t.rows * stride_h, 1);
  p.y = make_run_side(args.b, problem.K, problem.P(), problem.Q(), problem.dtype, t.y, t.y_channels, t.rows, 0);
  p.units = int(t.units), p.jobs_c = int(t.jobs_c), p.jobs_k = int(t.jobs_k), p.shares = int(t.shares);
  p.chunks_c = int(t.chunks_c), p.chunks_k = int(t.chunks_k), p.rows = int(t.rows), p.images = int(t.images);
  p.quads = int(t.quads), p.tiles_h = int(ceil_div(problem.P(), t.rows)), p.tiles = int(t.tiles);
  p.stage_bytes = int(t.stage_bytes), p.stages = int(t.stages), p.y_at = int(t.y_at);
  auto* const kernel = sums_kernel<T, parts, stride, blocks_c, blocks_k, how>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared));
  if (error != cudaSuccess) return error;
  int64_t const units = problem.C / q.C_unit;
  kernel<<<unsigned(t.places * t.splits), runs_warps(blocks_k, parts == 2) * 32 + 128, size_t(t.shared), stream>>>(p);
  if (cudaError_t const failed = cudaGetLastError()) return failed;
  return launch_dependent(add_kernel<T>, dim3(unsigned(units * ceil_div(q.C_unit, 8) * ceil_div(q.K_unit, 8))),
                          kTaps * 32, 0, stream, q);
}

template <class T, int stride, Loads how>
cudaError_t start_runs_of(Problem const& problem, PlainRuns const& t, Arguments const& args, cudaStream_t stream) {
  if (t.blocks_k == 1) return launch_runs<T, 1, stride, 1, 1, how>(problem, t, args, stream);
  if (t.blocks_k == 2) return launch_runs<T, 1, stride, 2, 2, how>(problem, t, args, stream);
  if (t.blocks_k == 3) return launch_runs<T, 1, stride, 2, 3, how>(problem, t, args, stream);
  return launch_runs<T, 1, stride, 2, 4, how>(problem, t, args, stream);
}

template <class T, int stride>
cudaError_t start_runs(Problem const& problem, PlainRuns const& t, Arguments const& args, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>) {
    // Words alone: loads are hidden behind three products.
    if (!problem.allow_tf32) {
      if (t.blocks_k == 1) return launch_runs<T, 2, stride, 1, 1, kWords>(problem, t, args, stream);
      if (t.blocks_k == 2) return launch_runs<T, 2, stride, 2, 2, kWords>(problem, t, args, stream);
      return launch_runs<T, 2, stride, 2, 3, kWords>(problem, t, args, stream);
    }
  }
  // Float32 is as fast by words, but for a stride.
  if constexpr (sizeof(T) == 2 || stride == 2) {
    if (!runs_off_vectors(problem)) return start_runs_of<T, stride, kVectors>(problem, t, args, stream);
  }
  if constexpr (sizeof(T) == 2) {
    // With a stride only y has rows of odd length.
    if (stride == 2 || problem.W % 2 != 0) return start_runs_of<T, stride, kHalves>(problem, t, args, stream);
  }
  return start_runs_of<T, sizeof(T) == 2 ? 1 : stride, kWords>(problem, t, args, stream);
}

template <DType dtype>
cudaError_t start_plain(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  int sm_count = 0;
  if (cudaError_t const error = count_sms(sm_count)) return error;
  PlainRuns const t = plain_runs(problem, Device{sm_count, 90});
  return problem.stride_h == 2 ? start_runs<T, 2>(problem, t, args, stream)
                               : start_runs<T, 1>(problem, t, args, stream);
}

}  // namespace conv2d_ext::plain

#define CONV2D_EXT_GROUPED_PLAIN_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) { return plain::start_plain<DType::dtype>(p, args, stream); }
