// The filter's gradient for toeplitz.cuh, filters of up to 5 and 7 rows. For a channel and a row of the filter, runs of
// 8 columns of y and the 16 columns of x from each on:
//   d[column of x, column of y] += x[16 runs; 16 columns]^T * y[16 runs; 8 columns],
// and the sum of a diagonal of d is that of a tap. Half of the words of two pixels are an operand of two channels.
//
// A block of threads walks down strips of images with 32 channels, of 3x3 also 64; a warp has 4 or 8 of them and all 16
// runs of a row. The rows of a cycle, which are R, are a loop unrolled: a row of y stays in registers, in its place,
// while the next R - 1 rows of x are multiplied by it. Lanes t = 0 .. 3 have pieces of rows which begin in different
// banks: neighbouring images, or parts of a row. A warp of its own has rows of x and y copied, zeros where there are
// none.
//
// What the zeros around the images make of an infinity is a NaN: such a sum is made again by single products. A block's
// share of the strips is fixed; the shares' sums are added by a second pass.
#pragma once

#include "../core/sums_once.h"
#include "../core/toeplitz_wgrad.h"
#include "toeplitz.cuh"

namespace conv2d_ext::toeplitz {

struct PiecesParams {
  CUtensorMap x, y;
  void const* x_data;
  void const* y_data;
  int64_t x_n, x_h, x_w, y_n, y_h, y_w;
  void* w;
  void* partial;  // [share][c][tap]
  int64_t w_k, w_r, w_s;
  int N, C, H, W, P, Q;  // C: filters
  int R, S, dilation_h, dilation_w, pad_h, pad_w;
  int blocks, images, slices, last, tiles_w, rows;  // blocks: 1, as next_strip asks; last: where the last slice begins
  int units, each, skip, shares, cycles, x_bytes, y_bytes, x_copied, y_copied;
  int pieces, length, x_columns, y_columns;
  int filters;  // of a channel
  // A row is copied in `halves`, which are columns and images apart in memory, bytes in shared memory.
  int halves, half_w, half_n, half_x_bytes, half_y_bytes;
  bool once;  // L2 gives up first what is read
};

// What a block of threads has: channels from c0 on of rows from begin to end.
struct PieceShare {
  int share, c0, begin, end;

  __device__ PieceShare(PiecesParams const& p, int block, int channels)
      : share(block / p.slices),
        c0(min(block % p.slices * channels, p.last)),
        begin(share * p.each),
        end(p.units - begin < p.each ? p.units : begin + p.each) {}
};

__device__ inline Strip next_strip(PiecesParams const& p, int& index, int& end) {
  return next_strip(p, index, end, p.pieces * p.length, 0);
}

// The rows of a strip, of x; begin: the first inside the image, start and stop: the rows walked.
struct PieceRows {
  int begin, start, stop;

  template <int R>
  __device__ static PieceRows of(PiecesParams const& p, Strip const& s) {
    PieceRows v;
    int const above = s.first < 0 ? -s.first : 0, below = p.H > s.first ? p.H - s.first : 0;
    v.begin = p.dilation_h == 1 ? above : (above + p.dilation_h - 1) / p.dilation_h;
    v.stop = min(s.rows + p.R - 1, p.dilation_h == 1 ? below : (below + p.dilation_h - 1) / p.dilation_h);
    v.start = max(0, v.begin - (R - 1));
    return v;
  }
};

template <int R>
struct PiecesRing {
  static constexpr int groups = piece_groups(R);
  uint64_t full[kPieceCycles * groups], empty[kPieceCycles * groups];

  __device__ void start(int warp, int warps) {
    for (int i = warp; i < kPieceCycles * groups; i += warps) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], kToeplitzWarps);
    }
    ptx::fence_mbarrier_init();
  }

  // The rows of the block's share in turn; by one thread.
  __device__ void copy(PiecesParams const& p, int index, int end, int c0, uint32_t shared) {
    uint64_t const once = p.once ? ptx::createpolicy_evict_first() : 0;
    auto bring = [&](uint32_t to, CUtensorMap const& map, uint64_t* bar, int c, int w, int h, int n) {
      if (once != 0)
        ptx::cp_async_bulk_tensor_4d(to, &map, bar, c, w, h, n, once);
      else
        ptx::cp_async_bulk_tensor_4d(to, &map, bar, c, w, h, n);
    };
    int const c_x = c0 / p.filters;  // once: in the loop the compiler divides for each row
    int cycle = 0;
    uint32_t parity = 1;
    while (index < end) {
      Strip const s = next_strip(p, index, end);
      PieceRows const walk = PieceRows::of<R>(p, s);
      for (int first = walk.start; first < walk.stop; first += R) {
        for (int group = 0; group < groups; ++group) {
          int const from = first + group * kPieceRows, to = min(min(from + kPieceRows, first + R), walk.stop);
          uint64_t *const bar = &full[cycle * groups + group], *const read = &empty[cycle * groups + group];
          ptx::mbarrier_wait(read, parity);
          if (from >= to) {
            pass_turn(bar, read);
            continue;
          }
          int const of_x = max(0, to - max(from, walk.begin));
          ptx::mbarrier_arrive_expect_tx(bar, uint32_t((to - from) * p.y_copied + of_x * p.x_copied));
          for (int row = from; row < to; ++row) {
            uint32_t const at = shared + (cycle * R + row - first) * (p.x_bytes + p.y_bytes);
            int const h = row < s.rows ? s.h0 + row * p.dilation_h : p.P;  // behind the last row are zeros
#pragma unroll 1
            for (int half = 0; half < p.halves; ++half) {
              int const w = s.w0 + half * p.half_w, n = s.n0 + half * p.half_n, v = s.first + row * p.dilation_h;
              bring(at + half * p.half_y_bytes, p.y, bar, c0, w, h, n);
              if (row >= walk.begin) bring(at + p.y_bytes + half * p.half_x_bytes, p.x, bar, c_x, w - p.pad_w, v, n);
            }
          }
        }
        if (++cycle == p.cycles) cycle = 0, parity ^= 1;
      }
    }
  }
};

// The rows of the block's share, by a warp that multiplies. R rows are a cycle, unrolled: row u of it leaves its row of
// y in place u, and meets the one of r rows before in place (u + R - r) % R.
//   clear()                  takes all rows of y away, where a strip begins
//   load_x(at), load_y(at)   load the next row, `at` bytes from the ring's begin
//   take(u)                  makes operands of what was loaded; a word that comes of all of it
//   multiply(u, meets, next_x, next_y)   multiplies, if the row meets any of y, and has the next one loaded meanwhile
template <int R, class Clear, class LoadX, class LoadY, class Take, class Multiply>
__device__ inline void walk_rows(PiecesParams const& p, PiecesRing<R> const& ring, PieceShare const& own,
                                 Clear const& clear, LoadX const& load_x, LoadY const& load_y, Take const& take,
                                 Multiply const& multiply) {
  constexpr int groups = PiecesRing<R>::groups;
  constexpr uint32_t empty = sizeof(ring.full);  // behind the full ones
  int const row_bytes = p.x_bytes + p.y_bytes;
  // The cycle's place in the ring and its barriers.
  uint32_t const full = ptx::shared_address(ring.full), over = uint32_t(p.cycles) * groups * 8;
  uint32_t at = 0, bar = full, parity = 0;
  auto bring_x = [&](int u) {
    if (u % kPieceRows == 0) ptx::mbarrier_wait(bar + u / kPieceRows * 8, parity);
    load_x(at + u * row_bytes);
  };
  int index = __shfl_sync(~0u, own.begin, 0), turn = __shfl_sync(~0u, own.end, 0);
  while (index < turn) {
    Strip const s = next_strip(p, index, turn);
    PieceRows const walk = PieceRows::of<R>(p, s);
    clear();
    if (walk.start < walk.stop) bring_x(0), load_y(at);
#pragma unroll 1
    for (int count = walk.stop - walk.start, lower = walk.begin - walk.start; count > 0; count -= R, lower -= R) {
      auto step = [&]<int u>(std::integral_constant<int, u> place) {
        if (u >= count) return;
        uint32_t const word = take(place);
        bool const last = u == count - 1;
        if (u == R - 1 || u % kPieceRows == kPieceRows - 1 || last) give_back(bar + empty + u / kPieceRows * 8, word);
        if (u == R - 1 || last) {
          bar += groups * 8, at += R * row_bytes;
          if (bar == full + over) bar = full, at = 0, parity ^= 1;
        }
        auto next_x = [&] {
          if (!last) bring_x((u + 1) % R);
        };
        auto next_y = [&] {
          if (!last) load_y(at + (u + 1) % R * row_bytes);
        };
        multiply(place, u >= lower, next_x, next_y);
      };
      [&]<int... u>(std::integer_sequence<int, u...>) {
        (step(std::integral_constant<int, u>()), ...);
      }(std::make_integer_sequence<int, R>());
    }
  }
}

// A tap from global memory, over the block's share.
template <class T>
__device__ __noinline__ float exact_sum(PiecesParams const& p, int index, int end, int c, int r, int s) {
  float sum = 0.f;
  while (index < end) {
    Strip const strip = next_strip(p, index, end);
    for (int64_t n = strip.n0; n < strip.n0 + p.images && n < p.N; ++n) {
      T const* const x = static_cast<T const*>(p.x_data) + n * p.x_n + c / p.filters;
      T const* const y = static_cast<T const*>(p.y_data) + n * p.y_n + c;
      for (int row = 0; row < strip.rows; ++row) {
        int const h = strip.h0 + row * p.dilation_h, v = h - p.pad_h + r * p.dilation_h;
        if (h >= p.P || unsigned(v) >= unsigned(p.H)) continue;
        for (int q = strip.w0; q < strip.w0 + p.pieces * p.length && q < p.Q; ++q) {
          int const u = q - p.pad_w + s * p.dilation_w;
          if (unsigned(u) < unsigned(p.W))
            sum = fmaf(widen(x[v * p.x_h + u * p.x_w]), widen(y[h * p.y_h + q * p.y_w]), sum);
        }
        if (sum != sum) return sum;  // NaN, whatever comes
      }
    }
  }
  return sum;
}

// Words of two pixels, of two channels each, to words of two channels.
template <int channels>
__device__ inline void transpose(Pixel<channels / 2> const& a, Pixel<channels / 2> const& b, uint32_t (&v)[channels]) {
#pragma unroll
  for (int i = 0; i < channels / 2; ++i)
    v[2 * i] = __byte_perm(a.v[i], b.v[i], 0x5410), v[2 * i + 1] = __byte_perm(a.v[i], b.v[i], 0x7632);
}

// What a warp has summed up for its channels, of the slice's from `channel` on, channel by channel.
template <class T>
__device__ inline void store_taps(PiecesParams const& p, PieceShare const& own, int channel, int channels,
                                  float const* sums) {
  int const taps = p.R * p.S, c0 = own.c0 + channel, count = min(channels, p.C - c0) * taps;
  int64_t const first = (int64_t(own.share) * p.C + c0) * taps;
  for (int i = ptx::unknown(int(threadIdx.x)) % 32; i < count; i += 32) {
    float sum = sums[i];
    int64_t offset = 0;
    if (p.shares == 1 || sum != sum) {
      int const c = c0 + i / taps, tap = i % taps, r = tap / p.S, s = tap - r * p.S;
      if (sum != sum) sum = exact_sum<T>(p, own.begin, own.end, c, r, s);
      offset = c * p.w_k + r * p.w_r + s * p.w_s;
    }
    depthwise::store_sum<T>(p.w, p.partial, p.shares, offset, first + i, sum);
  }
}

// Adds up the diagonals of a warp's d: each lane has a row of the filter of a channel.
template <class T, int R, int channels>
__device__ inline void store_sums(PiecesParams const& p, float const (&acc)[R][channels][4], float* shared) {
  static_assert(channels * R <= 32);
  // Worked out again, not kept.
  PieceShare const own(p, ptx::unknown(int(blockIdx.x)), channels * kToeplitzWarps);
  int const thread = ptx::unknown(int(threadIdx.x)), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  float* const d = shared + warp * (R * channels * kPieceSums);
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int c = 0; c < channels; ++c) {
      float* const to = d + (c * R + r) * kPieceSums + g * 8 + t * 2;
      *reinterpret_cast<float2*>(to) = make_float2(acc[r][c][0], acc[r][c][1]);
      *reinterpret_cast<float2*>(to + 64) = make_float2(acc[r][c][2], acc[r][c][3]);
    }
  __syncwarp();
  // As they lie in memory: of a channel after the other.
  int const taps = p.R * p.S, channel = lane / R;
  float* const sums = shared + kToeplitzWarps * (R * channels * kPieceSums) + warp * (channels * R * kPieceTaps);
  if (lane < channels * R && lane % R < p.R)
#pragma unroll 1
    for (int s = 0; s < p.S; ++s) {
      float const* const diagonal = d + lane * kPieceSums + s * p.dilation_w * 8;
      float sum = 0.f;
#pragma unroll
      for (int column = 0; column < 8; ++column) sum += diagonal[column * 9];
      sums[channel * taps + lane % R * p.S + s] = sum;
    }
  __syncwarp();
  store_taps<T>(p, own, warp * channels, channels, sums);
}

// `m` filters of a channel of x: its products are with gradients of neighbouring channels of y.
template <class T, int R, int run, int channels, int m = 1>
__global__ void __launch_bounds__(kToeplitzThreads, 1) wgrad(__grid_constant__ PiecesParams const p) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  __shared__ PiecesRing<R> ring;
  constexpr int threads = kToeplitzThreads, readers = 32 * kToeplitzWarps;
  uint32_t const padding = -ptx::shared_address(dynamic) % 1024, shared = ptx::shared_address(dynamic) + padding;
  PieceShare const own_share(p, int(blockIdx.x), channels * kToeplitzWarps);
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  int const row_bytes = p.x_bytes + p.y_bytes;
  if (lane == 0) ring.start(warp, threads / 32);
  __syncthreads();
  if (!take_role()) {
    if (warp == kToeplitzWarps && ptx::elect()) ring.copy(p, own_share.begin, own_share.end, own_share.c0, shared);
    return;
  }
  if (p.x_bytes != p.x_copied) {  // zeros behind a row's last image, which the last windows reach
    int const chunks = (p.x_bytes - p.x_copied) / 16;
    for (int i = threadIdx.x; i < p.cycles * R * chunks; i += readers)
      ptx::st_shared_v4(shared + i / chunks * row_bytes + p.y_bytes + p.x_copied + i % chunks * 16,
                        make_uint4(0, 0, 0, 0));
    ptx::bar_sync(1, readers);
  }
  ptx::griddepcontrol_launch_dependents();

  // Of piece t + 4 i; eight pixels on, the swizzle is the same.
  constexpr int own = 4 / run, wide = channels * kToeplitzWarps, octets = wide / 8, eight = wide * 2 * 8;
  int const octet = warp * channels / 8, byte = warp * channels % 8 * 2;
  int const octet_x = warp * channels / m / 8, byte_x = warp * channels / m % 8 * 2;
  uint32_t from_x[own], from_y[own];
#pragma unroll
  for (int i = 0; i < own; ++i) {
    int const piece = t + 4 * i, image = piece / p.pieces, column = piece % p.pieces * p.length + g;
    from_x[i] = shared + p.y_bytes + swizzled(image * p.x_columns + column, octet_x, octets / m) + byte_x;
    from_y[i] = shared + swizzled(image * p.y_columns + column, octet, octets) + byte;
  }
  uint32_t const keep = (run - 1) * 8 + g < p.length ? ~0u : 0;  // of a piece's last run

  float acc[R][channels][4] = {};
  uint32_t y[R][2][channels], x[4][channels / m];  // operand, channel
  Pixel<channels / 2> next_y[4];
  Pixel<channels / m / 2> next_x[own * (run + 1)];
  auto clear = [&] {
#pragma unroll
    for (int i = 0; i < R * 2 * channels; ++i) y[i / (2 * channels)][i / channels % 2][i % channels] = 0;
  };
  auto load_x = [&](uint32_t at) {
#pragma unroll
    for (int i = 0; i < own; ++i)
#pragma unroll
      for (int j = 0; j <= run; ++j) next_x[i * (run + 1) + j].load(from_x[i] + at + j * (eight / m));
  };
  auto load_y = [&](uint32_t at) {
#pragma unroll
    for (int i = 0; i < own; ++i)
#pragma unroll
      for (int j = 0; j < run; ++j) next_y[i * run + j].load(from_y[i] + at + j * eight);
  };
  auto take = [&]<int u>(std::integral_constant<int, u>) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      Pixel<channels / 2> v[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int const k = pair * 2 + i;
        v[i] = next_y[k];
        if (run > 1 && k % run == run - 1)
#pragma unroll
          for (uint32_t& word : v[i].v) word &= keep;
      }
      transpose<channels>(v[0], v[1], y[u][pair]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const a = pair * 2, b = a + 1;
        transpose<channels / m>(next_x[a / run * (run + 1) + a % run + half],
                                next_x[b / run * (run + 1) + b % run + half], x[pair * 2 + half]);
      }
    }
    return x[0][0] | x[1][0] | x[2][0] | x[3][0] | y[u][0][0] | y[u][1][0];
  };
  auto multiply = [&]<int u>(std::integral_constant<int, u>, bool meets, auto const& bring_x, auto const& bring_y) {
    auto products = [&](int from, int to, int c0, int c1) {
      if (!meets) return;
#pragma unroll
      for (int r = from; r < to; ++r)
#pragma unroll
        for (int c = c0; c < c1; ++c) {
          auto const& of = y[(u + R - r) % R];
          ptx::mma_m16n8k16<T>(acc[r][c], x[0][c / m], x[1][c / m], x[2][c / m], x[3][c / m], of[0][c], of[1][c]);
        }
    };
    // The next rows take the registers of what has been multiplied: of half of the channels of x, or of the row of y
    // that is furthest behind.
    if constexpr (channels == 8) {
      products(0, R, 0, 4);
      bring_x();
      products(0, R, 4, 8);
      bring_y();
    } else {
      bring_x();
      products(R - 1, R, 0, channels);
      bring_y();
      products(0, R - 1, 0, channels);
    }
  };
  walk_rows<R>(p, ring, own_share, clear, load_x, load_y, take, multiply);

  ptx::bar_sync(1, readers);
  store_sums<T, R, channels>(p, acc, reinterpret_cast<float*>(dynamic + padding));
}

// Of `shares` partial sums those from `share` on; copies are of a tile's columns of `images`.
template <DType dtype, class Tile>
cudaError_t set_pieces(PiecesParams& p, Problem const& problem, Tile const& t, int shares, int share, int images,
                       Arguments const& args) {
  using T = typename TypeOf<dtype>::type;
  Strides const &x = problem.x, &y = problem.y;
  p.x_data = args.a, p.y_data = args.b, p.w = args.out;
  if (shares > 1) p.partial = static_cast<float*>(args.workspace) + share * problem.K * problem.R * problem.S;
  p.x_n = x.n, p.x_h = x.h, p.x_w = x.w, p.y_n = y.n, p.y_h = y.h, p.y_w = y.w;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.N = int(problem.N), p.C = int(problem.K), p.R = int(problem.R), p.S = int(problem.S);
  p.H = int(problem.H), p.W = int(problem.W), p.P = int(problem.P()), p.Q = int(problem.Q());
  p.dilation_h = int(problem.dilation_h), p.dilation_w = int(problem.dilation_w);
  p.pad_h = int(problem.pad_top), p.pad_w = int(problem.pad_left);
  p.blocks = 1, p.images = t.images;
  p.slices = int(t.slices), p.last = last_slice(Op::wgrad, problem.K, t.channels);
  p.filters = int(problem.K / problem.C);
  p.tiles_w = int(t.tiles_w), p.rows = int(t.rows);
  p.units = int(t.units), p.each = int(t.each), p.skip = int((t.shares - 1) * t.each);
  p.shares = shares, p.cycles = t.cycles;
  p.once = pieces_read_once(problem, t.channels);
  p.x_columns = t.x_columns, p.y_columns = t.y_columns;
  p.x_bytes = int(t.x_bytes), p.y_bytes = int(t.y_bytes);
  int const pixel = t.images * t.channels * int(sizeof(T));
  p.x_copied = t.x_columns * pixel / p.filters, p.y_copied = t.y_columns * pixel;
  if (auto const error =
          map_of(p.x, args.a, dtype, x, problem.C, p.W, p.H, problem.N, t.channels / p.filters, t.x_columns, images))
    return error;
  return map_of(p.y, args.b, dtype, y, problem.K, p.Q, p.P, problem.N, t.channels, t.y_columns, images);
}

template <DType dtype, int R>
cudaError_t launch_tile(Problem const& problem, PiecesTile const& t, int shares, int share, Arguments const& args,
                        cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  PiecesParams p{};
  p.pieces = t.pieces, p.length = t.length, p.halves = 1;
  if (auto const error = set_pieces<dtype>(p, problem, t, shares, share, t.images, args)) return error;
  auto* kernel = t.run == 4 ? wgrad<T, R, 4, 4> : t.run == 2 ? wgrad<T, R, 2, 4> : wgrad<T, R, 1, 4>;
  if (p.filters == 2) kernel = t.run == 4 ? wgrad<T, R, 4, 4, 2> : wgrad<T, R, 2, 4, 2>;
  if constexpr (R == 3)
    if (t.warp_channels == 8) kernel = t.run == 4 ? wgrad<T, R, 4, 8> : wgrad<T, R, 2, 8>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(t.slices * t.shares), kToeplitzThreads, size_t(t.shared_bytes), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::toeplitz
