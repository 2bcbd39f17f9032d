// wgrad of grouped_lines.cuh: dw[k][c][r][s] = sum over pixels of y[pixel][k] * x[pixel * stride + (r, s)][c].
//
// A stage holds a tile's lines of x with their halo and its lines of y. ldmatrix.trans turns 8 pixels of 8 channels
// into a fragment whose k is the pixel. An m16 tile has two halves, a tap and 8 channels of x each; its 8 columns are
// filters, its 16 pixels rows i and i + 4 of an 8 x 8 square. A warp keeps the sums of up to nine such tiles for one
// block of filters for all the pixels that its block of threads walks over: a job. Then they go to the workspace as
// they lie in the registers, and a second kernel, launched early, adds them in order and puts them where they belong.
// 3x3 in 16-bit types with two rows of inputs from output to output, or of one block of channels, has jobs of its own
// (grouped_lines_whole.cuh).
//
// Outputs outside of y are zeros in shared memory, but 0 * NaN would spread. Lanes whose column does not exist read
// zeros for x; what rows that do not exist make NaN is computed once more in the end.
#pragma once

#include "dependent.cuh"
#include "grouped_lines.cuh"
#include "grouped_lines_whole.cuh"

namespace conv2d_ext::grouped {

constexpr int kJobTiles = 9;

struct SumLineParams {
  LineMaps x;
  CUtensorMap y;
  void* w;
  int64_t w_k, w_c, w_r, w_s;
  float* partial;  // [split][slab][job][tile][lane][4]
  int step_h;
  int planes, plane_bytes;  // of x, as in LineParams
  int in_blocks;            // of 8 channels, of a unit
  int jobs, chunks, tiles;  // of a slab; jobs of a block of filters (whole: of a set), not 3x3; m16 tiles of a job
  GroupedSumJobs of_unit;   // 3x3
  int sets;                 // whole: of a unit's blocks of filters
  int shares, splits;
  int y_rows, y_columns, y_offset, stage_bytes, tables_offset;
  int64_t fragments;  // of a split
  bool planar;        // as in LineParams
  Planar raw_x, raw_y;
  Params p;  // of fprop; `out` is y
};

// A square of a tile: its first pixel of x and of y, bytes before swizzling, its first output and its image.
struct SumSquare {
  int x, y, h, w, image;
};

// Shared memory: stages | planar copies | tables | barriers. The sums of shares take the stages' place in the end.
struct SumShared {
  SumSquare* squares;
  uint32_t zero;  // address of 16 bytes of zeros
  uint64_t *full, *empty;

  __device__ SumShared(SumLineParams const& q, char* dynamic) {
    char* const tables = dynamic + q.tables_offset;
    squares = reinterpret_cast<SumSquare*>(tables);
    full = reinterpret_cast<uint64_t*>(squares + kMaxSquares);
    empty = full + kMaxStages;
    zero = ptx::shared_address(empty + kMaxStages);
  }
};

// A warp's fragments of two halves of x and of a block of filters of y. f16: of rows i and i + 4. f32: of row i, of the
// upper or the lower half of a square; its k are the pixels 0 2 4 6 1 3 5 7, which lie in different banks.
template <class T, int parts>
struct SumX {
  uint32_t v[4][parts];
};
template <class T, int parts>
struct SumY {
  uint32_t v[2][parts];
};

// What a lane reads of a square's x. f16: a pixel of one half in one row, or zeros in its place; f32: a channel of two
// neighbouring pixels of both halves.
struct SumLane {
  int other_pixel, other_half;  // bytes; f32
  bool valid, next_valid;       // the pixels
  uint32_t zero;
};

template <class T, int parts>
__device__ inline void load_x(SumX<T, parts>& x, uint32_t at, SumLane const& lane) {
  if constexpr (sizeof(T) == 2) {
    uint32_t v[4];
    ptx::ldmatrix_x4_trans(v, lane.valid ? swizzled(at) : lane.zero);
#pragma unroll
    for (int i = 0; i < 4; ++i) x.v[i][0] = v[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t const from = at + i / 2 * lane.other_pixel + i % 2 * lane.other_half;
      bool const valid = i / 2 == 0 ? lane.valid : lane.next_valid;
      split<T, parts>(valid ? ptx::ld_shared(swizzled(from)) : 0, x.v[i]);
    }
  }
}

// y of rows i and i + 4, f32 of rows i, for i from 0 to 3; `at`: the lane's first.
template <class T, int parts>
__device__ inline void load_y(SumY<T, parts> (&y)[4], uint32_t at, int row_bytes) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      uint32_t v[4];
      ptx::ldmatrix_x4_trans(v, swizzled(at + i * row_bytes));
#pragma unroll
      for (int k = 0; k < 4; ++k) y[i + k / 2].v[k % 2][0] = v[k];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int k = 0; k < 2; ++k) split<T, parts>(ptx::ld_shared(swizzled(at + i * row_bytes + k * kLine)), y[i].v[k]);
  }
}

// The products of one tile with rows i and, of kRows, i + 4; f32 with row i.
template <class T, int parts, int kRows>
__device__ inline void sum_rows(float (&acc)[4], SumX<T, parts> const& x, SumY<T, parts> const& y) {
  auto const& a = x.v;
  auto const& b = y.v;
  if constexpr (sizeof(T) == 2) {
    if constexpr (kRows > kSide / 2)
      ptx::mma_m16n8k16<T>(acc, a[0][0], a[1][0], a[2][0], a[3][0], b[0][0], b[1][0]);
    else
      ptx::mma_m16n8k8<T>(acc, a[0][0], a[1][0], b[0][0]);
  } else {
    using P = Products<parts>;
#pragma unroll
    for (int i = 0; i < P::count; ++i) {
      int const k = P::a(i), l = P::b(i);
      ptx::mma_m16n8k8_tf32(acc, a[0][k], a[1][k], a[2][k], a[3][k], b[0][l], b[1][l]);
    }
  }
}

// With two parts a square's products are summed apart: the tensor cores cut where they add.
template <int parts, int count, class Multiply>
__device__ inline void add_sums(float (*acc)[4], Multiply const& multiply) {
  if constexpr (parts == 1) {
    multiply(acc);
  } else {
    float sums[count][4] = {};
    multiply(sums);
#pragma unroll
    for (int i = 0; i < count; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][e] += sums[i][e];
  }
}

// 3x3: the columns s of two blocks of channels; tile 3 s + r.
template <class T, int parts, int kRows>
__device__ inline void sum_pair(float (&acc)[kJobTiles][4], uint32_t from, int row_bytes, SumY<T, parts> const (&y)[4],
                                SumLane const& lane) {
#pragma unroll
  for (int s = 0; s < 3; ++s)
    add_sums<parts, 3>(acc + s * 3, [&](float (*sums)[4]) {
#pragma unroll
      for (int row = 0; row < 6; ++row) {
        SumX<T, parts> x;
        load_x(x, from + s * kLine + row * row_bytes, lane);
#pragma unroll
        for (int r = 0; r < 3; ++r)
          if (row - r >= 0 && row - r < 4) sum_rows<T, parts, kRows>(sums[r], x, y[row - r]);
      }
    });
}

// One block: tile r is columns 0 and 1 of row r, tile 3 column 2 of rows 0 and 1, tile 4 column 2 of row 2.
template <class T, int parts, int kRows>
__device__ inline void sum_single(float (&acc)[kJobTiles][4], uint32_t columns, SumLane const& of_columns,
                                  uint32_t column, SumLane const& of_column, int row_bytes,
                                  SumY<T, parts> const (&y)[4]) {
  add_sums<parts, 3>(acc, [&](float (*sums)[4]) {
#pragma unroll
    for (int row = 0; row < 6; ++row) {
      SumX<T, parts> x;
      load_x(x, columns + row * row_bytes, of_columns);
#pragma unroll
      for (int r = 0; r < 3; ++r)
        if (row - r >= 0 && row - r < 4) sum_rows<T, parts, kRows>(sums[r], x, y[row - r]);
    }
  });
  add_sums<parts, 2>(acc + 3, [&](float (*sums)[4]) {
#pragma unroll
    for (int row = 0; row < 6; ++row) {
      // The second half's row is one further, so that of row 9 does not exist; nor is it needed there.
      SumX<T, parts> x;
      load_x(x, column + row * row_bytes, of_column);
      if (row < 4) sum_rows<T, parts, kRows>(sums[0], x, y[row]);
      if (row >= 2) sum_rows<T, parts, kRows>(sums[1], x, y[row - 2]);
    }
  });
}

// What a job is: any filter; 3x3 with one input between outputs, as sum_pair and sum_single; or whole, of so many
// blocks of filters, so many rows of inputs from output to output.
enum class Sums { any, is_3x3, whole };
template <Sums sums_, int blocks_ = 1, int step_ = 1>
struct SumForm {
  static constexpr Sums sums = sums_;
  static constexpr bool is_3x3 = sums == Sums::is_3x3, whole = sums == Sums::whole;
  static constexpr int blocks = blocks_, step = step_, tiles = whole ? blocks * kWholeTiles : kJobTiles;
};

// Which of a slab's jobs: its unit, its block or set of filters in the unit and its run of halves, 3x3: of `blocks`
// blocks of channels that begin `first` vectors of 16 bytes into the unit.
struct SumJob {
  int unit, filters, chunk, first, blocks;
};
template <class Form>
__device__ inline SumJob sum_job(SumLineParams const& q, int job) {
  if constexpr (Form::is_3x3) {
    int const unit = job / q.of_unit.count;
    GroupedSumJobs::Job const j = q.of_unit.job[job - unit * q.of_unit.count];
    return {unit, j.filters, j.pair, j.first, j.blocks};
  } else {
    int const of_slab = job / q.chunks, sets = Form::whole ? q.sets : q.p.out_blocks, unit = of_slab / sets;
    return {unit, of_slab - unit * sets, job - of_slab * q.chunks, 0, q.in_blocks};
  }
}

// The halves of a job's tile: 8 channels of x and a tap each.
template <bool is_3x3>
__device__ inline bool sum_half(SumLineParams const& q, SumJob const& job, int tile, int upper, int& block, int& tap) {
  int const chunk = job.chunk;
  if constexpr (is_3x3) {
    if (chunk * 2 + 1 < job.blocks) {
      block = chunk * 2 + upper, tap = tile;
      return true;
    }
    block = job.blocks - 1;
    tap = tile < 3 ? upper * 3 + tile : tile == 3 ? 6 + upper : 8;
    return tile < 4 || (tile == 4 && upper == 0);
  } else {
    int const index = (chunk * kJobTiles + tile) * 2 + upper;
    tap = index / q.in_blocks, block = index - tap * q.in_blocks;
    return tap < q.p.taps;
  }
}

// Where a sum belongs: element e of a lane's four.
struct Place {
  bool exists;
  int tap, c;  // within the group
  int64_t k;
};
template <class T, class Form>
__device__ inline Place place_of(SumLineParams const& q, int slab, int job, int tile, int lane, int e) {
  Params const& p = q.p;
  SumJob const of = sum_job<Form>(q, job);
  int out_block = of.filters, block, tap;
  bool exists;
  if constexpr (Form::whole) {
    out_block = of.filters * Form::blocks + tile / kWholeTiles;
    block = of.chunk, tap = whole_tap(tile % kWholeTiles, e / 2);
    exists = out_block < p.out_blocks && tap < p.taps;
  } else {
    exists = sum_half<Form::is_3x3>(q, of, tile, e / 2, block, tap);
  }
  int const filter = out_block * kBlock + lane % 4 * 2 + e % 2;
  int const of_group = p.filters.quotient(filter),
            c = of.first * (kSlot / int(sizeof(T))) + block * kBlock + lane / 4 - of_group * p.in_per_group;
  int64_t const k = (int64_t(slab) * p.slab + of.unit) * p.out_blocks * kBlock + filter;
  return {exists && unsigned(c) < unsigned(p.in_per_group) && k < p.out.channels, tap, c, k};
}

template <class T, int parts, class Form,
          int most_warps = grouped_most_jobs(parts == 2, Form::whole ? Form::blocks : 0)>
__global__ void __launch_bounds__(most_warps * 32, 1) sum_lines_kernel(__grid_constant__ SumLineParams const q) {
  extern __shared__ __align__(1024) char lines[];
  constexpr bool wide = sizeof(T) == 4, is_3x3 = Form::is_3x3;
  constexpr int kTiles = Form::tiles;
  constexpr int block_bytes = kBlock * int(sizeof(T));
  Params const& p = q.p;
  uint32_t const base = ptx::shared_address(lines);
  SumShared const t(q, lines);
  uint32_t const zero = t.zero;
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int const squares = p.squares_h * p.squares_w * p.images;
  int const first_unit = blockIdx.y * p.slab;
  // The first thread has the engine fill the stages, ...
  int const x_bytes = q.planes * p.images * p.window.rows * p.window.columns * p.slab * q.in_blocks * block_bytes;
  int const y_bytes = p.images * q.y_rows * q.y_columns * p.slab * p.out_blocks * block_bytes;
  auto copy = [&](int number, int stage) {
    Tile const tile(p, number);
    uint32_t const to = base + stage * q.stage_bytes;
    ptx::mbarrier_arrive_expect_tx(&t.full[stage], x_bytes + y_bytes);
    for (int plane = 0; plane < q.planes; ++plane)
      ptx::cp_async_bulk_tensor_4d(to + plane * q.plane_bytes, &q.x.plane[plane], &t.full[stage],
                                   first_unit * q.in_blocks * kBlock, tile.w + q.x.column[plane],
                                   tile.h * p.axis_h.step + p.axis_h.low, int(tile.n));
    ptx::cp_async_bulk_tensor_4d(to + q.y_offset, &q.y, &t.full[stage], first_unit * p.out_blocks * kBlock, tile.w,
                                 tile.h, int(tile.n));
  };
  auto copy_raw = [&](int number) {
    Tile const tile(p, number);
    copy_planar<T>(q.raw_x, p.in, p.N, tile, first_unit * q.in_blocks * kBlock, base + q.raw_x.offset, t.full);
    copy_planar<T>(q.raw_y, p.out, p.N, tile, first_unit * p.out_blocks * kBlock, base + q.raw_y.offset, t.full);
  };
  int next = blockIdx.x;  // tile to be copied
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::mbarrier_init(&t.full[i], q.planar ? 2 * warps : 1);
      ptx::mbarrier_init(&t.empty[i], warps);
    }
    ptx::fence_mbarrier_init();
    if (!q.planar)
      for (int i = 0; i < p.stages && next < p.tiles; ++i, next += gridDim.x) copy(next, i);
  }
  if (q.planar) {
    __syncthreads();  // the barriers are there
    copy_raw(next);
    next += gridDim.x;
  }
  if (threadIdx.x < squares) {
    Square const a(p, threadIdx.x);
    t.squares[threadIdx.x] = {((a.image * p.window.rows + a.h * q.step_h) * p.window.columns + a.w) * kLine,
                              ((a.image * q.y_rows + a.h) * q.y_columns + a.w) * kLine, a.h, a.w, a.image};
  }
  if (threadIdx.x < 4) reinterpret_cast<uint32_t*>(t.empty + kMaxStages)[threadIdx.x] = 0;
  __syncthreads();

  int const per_share = warps / q.shares, share = warp / per_share;
  int const job = blockIdx.z * per_share + warp % per_share;
  SumJob const of = sum_job<Form>(q, job);
  int const unit = of.unit, chunk = of.chunk;
  bool const works = job < q.jobs && first_unit + unit < p.units;
  bool const single = is_3x3 && chunk * 2 + 1 >= of.blocks;
  int const row_bytes = q.step_h * p.window.columns * kLine, y_row = q.y_columns * kLine;
  // f16, x: matrices are half 0 of row i, half 1 of row i, and of row i + 4; y: rows i, i + 4, i + 1, i + 5. f32: a
  // lane has channel lane / 4 of a block, of pixels 2 (lane % 4) and the next.
  int const upper = lane / 8 % 2, pixel = wide ? lane % 4 * 2 : lane % 8;
  int const of_lane = wide ? lane / 16 * kSlot + lane / 4 % 4 * 4 : 0;
  int const x_lane = ((wide ? 0 : lane / 16 * 4 * q.step_h) * p.window.columns + pixel) * kLine +
                     unit * q.in_blocks * block_bytes + of_lane;
  int const y_lane = ((wide ? 0 : lane / 8 % 2 * 4 + lane / 16) * q.y_columns + pixel) * kLine +
                     (unit * p.out_blocks + of.filters) * block_bytes + of_lane + q.y_offset;
  // Of a tile's two halves, in 16 bytes each: where the lane's first is and, f32, from there to the second.
  constexpr int offsets = is_3x3 ? 2 : Form::whole ? 1 : kJobTiles;
  uint32_t halves[offsets];
  auto set_halves = [&](int i, int first, int second) {
    int const mine = !wide && upper > 0 ? second : first;
    halves[i] = uint32_t(mine / kSlot) | uint32_t((second - first) / kSlot) << 16;
  };
  if constexpr (is_3x3) {
    int const begin = of.first * kSlot, last = begin + (of.blocks - 1) * block_bytes,
              one = single ? last : begin + chunk * 2 * block_bytes;
    set_halves(0, one, one + (single ? kLine : block_bytes));
    set_halves(1, last + 2 * kLine, last + 2 * kLine + row_bytes);
  } else if constexpr (!Form::whole) {
#pragma unroll
    for (int i = 0; i < offsets; ++i) {
      int at[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        int block, tap;
        bool const exists = sum_half<false>(q, of, i, k, block, tap);
        at[k] = exists ? p.tap[tap].offset * kLine + block * block_bytes : 0;
      }
      set_halves(i, at[0], at[1]);
    }
  }
  int const tiles = min(q.tiles, is_3x3 || Form::whole ? kTiles : (p.taps * q.in_blocks + 1) / 2 - chunk * kJobTiles);

  [[maybe_unused]] WholeJob<T, Form::blocks, Form::step> const whole{unit * q.in_blocks + chunk,
                                                                     unit * p.out_blocks + of.filters * Form::blocks,
                                                                     (unit + 1) * p.out_blocks - 1,
                                                                     p.window.columns * kLine,
                                                                     y_row,
                                                                     q.planes,
                                                                     q.plane_bytes};

  float acc[kTiles][4] = {};
  Stage stage, refill;
  int square = share;  // the next one of the share, counted from the tile's first
  for (int number = blockIdx.x; number < p.tiles; number += gridDim.x, square -= squares) {
    uint32_t const data = base + stage.index * q.stage_bytes;
    ptx::mbarrier_wait(&t.full[stage.index], stage.parity);
    Tile const tile(p, number);
    if (q.planar) {
      bool const first = number == int(blockIdx.x);
      turn<T>(q.raw_x, p.in, p.N, tile, lines, lines + q.raw_x.offset, first);
      turn<T>(q.raw_y, p.out, p.N, tile, lines + q.y_offset, lines + q.raw_y.offset, first);
      __syncthreads();
      if (next < p.tiles) copy_raw(next);
      next += gridDim.x;
    }
    for (; square < squares; square += q.shares) {
      if (!works) continue;
      SumSquare const a = t.squares[square];
      int const rows = p.out.H - tile.h - a.h, columns = p.out.W - tile.w - a.w;
      if (rows <= 0 || columns <= 0 || tile.n + a.image >= p.N) continue;
      auto sum_whole = [&](auto known) {
        whole.template sum<decltype(known)::value>(acc, data + a.x, data + a.y + q.y_offset, rows, pixel < columns,
                                                   zero);
      };
      auto first_of = [&](int i) { return (halves[i] & 0xffff) * kSlot; };
      auto lane_of = [&](int i) {
        return SumLane{kLine, (int(halves[i]) >> 16) * kSlot, pixel < columns, pixel + 1 < columns, zero};
      };
      auto sum_from = [&](auto known, uint32_t from, uint32_t at) {
        SumY<T, parts> y[4];
        load_y(y, at, y_row);
        constexpr int kRows = decltype(known)::value;
        if constexpr (is_3x3) {
          if (single)
            sum_single<T, parts, kRows>(acc, from + first_of(0), lane_of(0), from + first_of(1), lane_of(1), row_bytes,
                                        y);
          else
            sum_pair<T, parts, kRows>(acc, from + first_of(0), row_bytes, y, lane_of(0));
        } else {
#pragma unroll
          for (int i = 0; i < kJobTiles; ++i) {
            if (i >= tiles) break;
            add_sums<parts, 1>(acc + i, [&](float (*sums)[4]) {
#pragma unroll
              for (int m = 0; m < 4; ++m) {
                SumX<T, parts> x;
                load_x(x, from + first_of(i) + m * row_bytes, lane_of(i));
                sum_rows<T, parts, kRows>(sums[0], x, y[m]);
              }
            });
          }
        }
      };
      auto sum = [&](auto known) {
        if constexpr (Form::whole) {
          sum_whole(known);
        } else {
          uint32_t const from = data + a.x + x_lane, at = data + a.y + y_lane;
#pragma unroll 1
          for (int first = 0; first < (wide ? min(rows, kSide) : kSide); first += wide ? 4 : kSide)
            sum_from(known, from + first * row_bytes, at + first * y_row);
        }
      };
      // Rows that do not exist are zeros of y: what NaN makes of them is computed once more in the end.
      constexpr int half = kSide / 2;
      constexpr bool halves_alone =
          !wide && (is_3x3 || (Form::whole && WholeJob<T, Form::blocks, Form::step>::kRowsAtOnce == kSide));
      if (!halves_alone || rows > half)
        sum(std::integral_constant<int, kSide>{});
      else
        sum(std::integral_constant<int, halves_alone ? half : kSide>{});
    }
    if (q.planar) {
      __syncthreads();
      stage.advance(1);
      continue;
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&t.empty[stage.index]);
    stage.advance(p.stages);
    // ... and again, of three a tile later, when the other warps are likely to have left them too.
    if (threadIdx.x == 0 && next < p.tiles && (p.stages <= 2 || number != int(blockIdx.x))) {
      ptx::mbarrier_wait(&t.empty[refill.index], refill.parity);
      copy(next, refill.index);
      refill.advance(p.stages);
      next += gridDim.x;
    }
  }
  ptx::griddepcontrol_launch_dependents();
  // The first share adds the others' sums to its own, in order.
  if (q.shares > 1) {
    ptx::bar_sync(1, warps * 32);  // everybody has read the stages
    float4* const sums = reinterpret_cast<float4*>(lines) + warp * (kTiles * 32) + lane;
    if (share > 0) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) sums[i * 32] = make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    }
    ptx::bar_sync(1, warps * 32);
    if (share > 0) return;
    for (int other = 1; other < q.shares; ++other)
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        float4 const v = sums[(other * per_share * kTiles + i) * 32];
        acc[i][0] += v.x, acc[i][1] += v.y, acc[i][2] += v.z, acc[i][3] += v.w;
      }
  }
  if (!works) return;
  float4* const partial = reinterpret_cast<float4*>(q.partial) +
                          (blockIdx.x * q.fragments + (int64_t(blockIdx.y) * q.jobs + job) * q.tiles) * 32 + lane;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if (i >= tiles) break;
    partial[i * 32] = make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
  }
  // Sums that are not numbers once more.
  bool nan = false;
#pragma unroll
  for (int i = 0; i < kTiles * 4; ++i) nan = nan || !(acc[i / 4][i % 4] == acc[i / 4][i % 4]);
#pragma unroll 1
  for (int i = 0; nan && i < tiles * 4; ++i) {
    float& sum = reinterpret_cast<float*>(&partial[i / 4 * 32])[i % 4];
    if (sum == sum) continue;
    Place const at = place_of<T, Form>(q, blockIdx.y, job, i / 4, lane, i % 4);
    if (at.exists) sum = exact_sum<T>(p, 1, 0, p.tap[at.tap], at.k, at.k / p.out_per_group * p.in_per_group + at.c);
  }
}

constexpr int kAddLineWarps = 8;

// Adds the partial sums of a fragment: `together` warps those of every together-th split, then one of them the sums,
// in order.
template <class T, class Form>
__global__ void __launch_bounds__(32 * kAddLineWarps)
    add_lines_kernel(__grid_constant__ SumLineParams const q, int together) {
  __shared__ float4 sums[kAddLineWarps][32];
  Params const& p = q.p;
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = warp % together;
  int64_t const fragment = int64_t(blockIdx.x) * (kAddLineWarps / together) + warp / together;
  auto add = [](float4& a, float4 const& b) { a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w; };
  float4 sum{};
  ptx::griddepcontrol_wait();
  if (fragment < q.fragments) {
    float4 const* const partial = reinterpret_cast<float4 const*>(q.partial) + fragment * 32 + lane;
#pragma unroll 4
    for (int split = first; split < q.splits; split += together) add(sum, partial[split * q.fragments * 32]);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (first > 0 || fragment >= q.fragments) return;
  for (int i = 1; i < together; ++i) add(sum, sums[warp + i][lane]);
  int const tile = int(fragment % q.tiles), job = int(fragment / q.tiles % q.jobs);
  int const slab = int(fragment / (int64_t(q.tiles) * q.jobs));
  float const values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    Place const at = place_of<T, Form>(q, slab, job, tile, lane, e);
    if (at.exists)
      static_cast<T*>(q.w)[at.k * q.w_k + at.c * q.w_c + p.tap[at.tap].r * q.w_r + p.tap[at.tap].s * q.w_s] =
          narrow<T>(values[e]);
  }
}

template <class T, int parts, class Form>
cudaError_t start_sum_lines(SumLineParams const& q, dim3 grid, unsigned threads, int64_t shared, cudaStream_t stream) {
  auto* kernel = sum_lines_kernel<T, parts, Form>;
  if constexpr (parts == 2 && Form::is_3x3)
    if (threads > 32 * grouped_most_jobs(true, 0)) kernel = sum_lines_kernel<T, parts, Form, kMoreJobs>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, size_t(shared), stream>>>(q);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  int together = 1;
  while (together < kAddLineWarps && together * 4 <= q.splits) together *= 2;
  return launch_dependent(add_lines_kernel<T, Form>, dim3(unsigned(ceil_div(q.fragments, kAddLineWarps / together))),
                          32 * kAddLineWarps, 0, stream, q, together);
}

template <class T, int parts>
cudaError_t launch_sum_lines(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  int sm_count = 0;
  cudaError_t error = count_sms(sm_count);
  if (error != cudaSuccess) return error;
  GroupedSumLines const t = grouped_sum_lines(problem, Device{sm_count, 90});
  SumLineParams q{};
  Arguments swapped = args;
  swapped.out = const_cast<void*>(args.b), swapped.b = nullptr, swapped.bias = nullptr;
  Params& p = q.p = params_of(Op::fprop, problem, swapped);
  set_lines(p, t);
  q.in_blocks = p.in_blocks * kSlot / (kBlock * int(sizeof(T)));
  q.w = args.out, q.partial = static_cast<float*>(args.workspace);
  q.w_k = problem.w.n, q.w_c = problem.w.c, q.w_r = problem.w.h, q.w_s = problem.w.w;
  if (grouped_is_3x3(problem)) q.of_unit = grouped_sum_jobs(problem);
  q.step_h = int(t.step_h);
  q.planes = int(t.planes), q.plane_bytes = int(t.plane_bytes);
  q.jobs = int(t.jobs), q.sets = int(t.sets), q.chunks = int(t.chunks), q.tiles = int(t.tiles),
  q.shares = int(t.shares);
  q.y_rows = p.squares_h * kSide, q.y_columns = p.squares_w * kSide;
  q.y_offset = int(t.x_bytes), q.stage_bytes = int(t.stage_bytes), q.tables_offset = int(t.shared) - int(kSumTables);
  int64_t const slabs = ceil_div(p.units, p.slab);
  q.fragments = slabs * q.jobs * q.tiles;
  q.planar = t.planar;
  if (t.planar) {
    int const size = size_of(problem.dtype);
    q.raw_x = planar_inputs(p, t, size, t.stage_bytes, t.x_pitch);
    q.raw_y = planar_of(p.out, size, q.raw_x.whole, t.stage_bytes + t.raw_x_bytes, t.y_pitch, p.images, q.y_rows,
                        q.y_columns, p.slab * p.out_blocks * kBlock * size / kSlot);
  } else {
    error = encode_lines(q.x, q.y, p, problem.dtype, q.step_h, q.planes, q.y_rows, q.y_columns, p.out_blocks * kBlock);
    if (error != cudaSuccess) return error;
  }
  dim3 const grid(even_blocks(p, plan.split_k), unsigned(slabs), unsigned(t.passes));
  q.splits = int(grid.x);
  unsigned const threads = 32 * unsigned(t.warps);
  auto start = [&](auto form) { return start_sum_lines<T, parts, decltype(form)>(q, grid, threads, t.shared, stream); };
  if constexpr (sizeof(T) == 2) {
    if (t.together == 1 && t.step_h == 1) return start(SumForm<Sums::whole, 1, 1>{});
    if (t.together == 1) return start(SumForm<Sums::whole, 1, 2>{});
    if (t.together == 2) return start(SumForm<Sums::whole, 2, 2>{});
    if (t.together == 3) return start(SumForm<Sums::whole, 3, 2>{});
  }
  if (grouped_is_3x3(problem)) return start(SumForm<Sums::is_3x3>{});
  return start(SumForm<Sums::any>{});
}

template <Op op, DType dtype>
cudaError_t start_rows(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr int strict = dtype == DType::f32 ? 2 : 1;
  if constexpr (op == Op::wgrad)
    return problem.allow_tf32 ? launch_sum_lines<T, 1>(problem, plan, args, stream)
                              : launch_sum_lines<T, strict>(problem, plan, args, stream);
  else
    return problem.allow_tf32 ? launch_lines<T, 1>(op, problem, args, stream)
                              : launch_lines<T, strict>(op, problem, args, stream);
}

}  // namespace conv2d_ext::grouped

#define CONV2D_EXT_GROUPED_LINES_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                       \
    return grouped::start_rows<Op::op, DType::dtype>(p, plan, args, stream);      \
  }
