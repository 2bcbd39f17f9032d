// Depthwise convolution in channels_last on tensor cores (mma.sync), float16 and bfloat16, filters of up to 9 rows,
// stride 1: along a row of the image, 8 neighbouring outputs of a channel are a window of 16 inputs times a matrix with
// the taps of a row of the filter along its diagonals:
//   out[16 runs of 8 columns; 8 columns] += in[the runs; 16 columns] * taps[r].
// A lane reads 4 channels of a pixel at once; of the words of two pixels a permutation of bytes makes the operands of
// two channels. Two neighbouring runs are the two rows of a lane, so that what both meet is read once. Borders cost
// nothing: the copy engine writes the zeros.
//
// dgrad of 5x5 with stride 2: the inputs are 2 apart, as if zeros lay between them; a run's window is 8 of them, and a
// row of inputs completes two of outputs.
//
// As toeplitz.cuh, but a strip is walked in cycles of R rows, which are a loop unrolled: taps' operands and sums stay
// in their registers (of 9 rows the taps in shared memory). A block has 32 channels of 8 pieces of a row, of several
// images or of an image's parts, which begin in different banks; a warp has 4 channels of them. One warp copies and
// another stores. Of two filters a channel fprop has half of the inputs, dgrad half of the outputs.
#pragma once

#include "../core/toeplitz_gather.h"
#include "toeplitz.cuh"

namespace conv2d_ext::toeplitz {

struct GatherParams : Params {
  int parts, pairs, in_columns, out_columns, ring;  // pairs: of runs, of a piece; ring: cycles of rows of inputs
  int last;                                         // where the last slice begins
};

// The filters of a block's channels: of each channel and row of the filter the words (tap d, tap d + 4) for the
// distances d = -7 .. 12 of an input from an output, zeros where there is no tap; of inputs 2 apart (tap d, tap d + 8)
// for d = -8 .. 7.
constexpr int tap_row(int apart) { return gather_tap_words(apart) * 4; }

// The taps that a thread puts there: all asked for at once, since each may be a wait for memory.
template <class T, int R, int apart>
struct AskedTaps {
  static constexpr int threads = 32 * kToeplitzWarps / kGatherChannels;  // of a channel
  static constexpr int most = (R * gather_taps(R) + threads - 1) / threads;
  static constexpr int row_bytes = tap_row(apart), first = apart == 1 ? 7 : 8;  // of distance 0
  uint16_t value[most];
  uint32_t place[most];

  __device__ AskedTaps(GatherParams const& p, int c0, int thread) {
    int const c = thread / threads;
    T const* const from = static_cast<T const*>(p.w) + (c0 + c) * p.w_k;
#pragma unroll
    for (int i = 0; i < most; ++i) {
      int const tap = thread % threads + i * threads, r = tap / p.S, s = tap - r * p.S;
      place[i] = r < p.R ? (c * R + r + R - p.R) * row_bytes + (s * p.dilation_w + first) * 4 : ~0u;
      if (r < p.R && c0 + c < p.C)
        value[i] = *reinterpret_cast<uint16_t const*>(from + r * p.w_r + s * p.w_s);
      else
        value[i] = 0;
    }
  }
  __device__ void spread(uint32_t table) const {
#pragma unroll
    for (int i = 0; i < most; ++i) {
      if (place[i] == ~0u) continue;
      ptx::st_shared_u16(table + place[i], value[i]);
      ptx::st_shared_u16(table + place[i] - 4 * apart * 4 + 2, value[i]);
    }
  }
};

// A strip's rows, of the inputs: those from begin to end are inside the image, and in cycles of R rows from begin on.
// Row i completes output i - (R - 1), which is stored a row later; of inputs 2 apart it completes two.
template <int R, int apart>
struct GatherRows {
  int first, begin, end, rows;
  int shift = 0;  // of inputs 2 apart: where the first is behind the first output's window's begin

  __device__ GatherRows(Params const& p, Strip const& s) : first(s.first), rows(s.rows) {
    if constexpr (apart == 2) shift = first & 1, first = (first + shift) >> 1;
    int const above = first < 0 ? -first : 0, below = p.in_H > first ? p.in_H - first : 0;
    if constexpr (apart == 2) {
      begin = min(above, (R + 1) / 2 - shift), end = min(below, (rows + R - shift) / 2);
      return;
    }
    begin = p.dilation_h == 1 ? above : (above + p.dilation_h - 1) / p.dilation_h;
    begin = min(begin, R);  // the first output is stored with row R
    end = min(p.dilation_h == 1 ? below : (below + p.dilation_h - 1) / p.dilation_h, rows + R - 1);
  }
  __device__ int until() const { return apart == 2 ? (rows + R - shift) / 2 + 1 : rows + R; }
  // Of inputs 2 apart: the first of the two outputs that are stored with row i.
  __device__ int stored(int i) const { return 2 * i - (R + 1) + shift; }
};

// m_in filters have the same input, m_out of them add up to an output.
template <int R, int apart, int m_in, int m_out>
struct GatherBarriers {
  static constexpr int groups = gather_groups(R);
  uint64_t full[kGatherCycles * groups], empty[kGatherCycles * groups];
  uint64_t done[kGatherBuffers], free[kGatherBuffers];
  uint64_t stored;  // all rows

  // By a thread of each of `warps` warps.
  __device__ void start(int warp, int warps) {
    for (int i = warp; i < kGatherCycles * groups; i += warps) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], kToeplitzWarps);
      if (i < kGatherBuffers) {
        ptx::mbarrier_init(&done[i], kToeplitzWarps);
        ptx::mbarrier_init(&free[i], 1);
      }
      if (i == 0) ptx::mbarrier_init(&stored, 1);
    }
    static_assert(kGatherBuffers <= kGatherCycles * groups);
    ptx::fence_mbarrier_init();
  }

  // Has the rows of the block's share copied; by one thread.
  __device__ void copy(GatherParams const& p, int index, int end, int c0, uint32_t shared) {
    int cycle = 0;
    uint32_t parity = 1;
    while (index < end) {
      Strip const s = next_strip<R>(p, index, end);
      GatherRows<R, apart> const walk(p, s);
      for (int first = walk.begin; first < walk.end; first += R) {
        for (int group = 0; group < groups; ++group) {
          int const from = first + group * kGatherRows, to = min(min(from + kGatherRows, first + R), walk.end);
          uint64_t *const bar = &full[cycle * groups + group], *const read = &empty[cycle * groups + group];
          ptx::mbarrier_wait(read, parity);
          if (from >= to) {
            pass_turn(bar, read);
            continue;
          }
          ptx::mbarrier_arrive_expect_tx(bar, uint32_t((to - from) * p.in_copied));
          for (int row = from; row < to; ++row)
            for (int part = 0; part < p.parts; ++part)
              ptx::cp_async_bulk_tensor_4d(
                  shared + (cycle * R + row - first) * p.in_bytes + part * p.in_columns * kGatherChannels / m_in * 2,
                  &p.in, bar, c0 / m_in, (s.w0 - p.pad_w + part * p.pairs * 16 + apart - 1) >> (apart - 1),
                  walk.first + row * p.dilation_h, s.n0);
        }
        if (++cycle == p.ring) cycle = 0, parity ^= 1;
      }
    }
  }

  // Has the finished rows stored; by one thread.
  __device__ void store(GatherParams const& p, int index, int end, int c0, uint32_t outputs) {
    int buffer = 0, last = -1;
    uint32_t parity = 0;
    while (index < end) {
      Strip const s = next_strip<R>(p, index, end);
      GatherRows<R, apart> const walk(p, s);
      // The outputs of a buffer: with stride 1 those that a group of rows stores.
      auto store_rows = [&](int start, int from, int to) {
        if (from >= to) return;
        ptx::mbarrier_wait(&done[buffer], parity);
        for (int row = from; row < to; ++row)
          for (int part = 0; part < p.parts; ++part)
            ptx::cp_async_bulk_tensor_4d_store(&p.out,
                                               outputs + (buffer * kGatherRows + row - start) * p.out_bytes +
                                                   part * p.out_columns * kGatherChannels / m_out * 2,
                                               c0 / m_out, s.w0 + part * p.pairs * 16, s.h0 + row * p.dilation_h, s.n0);
        ptx::cp_async_bulk_commit_group();
        ptx::cp_async_bulk_wait_group_read<1>();  // the group before has been read
        if (last >= 0) ptx::mbarrier_arrive(&free[last]);
        last = buffer;
        if (++buffer == kGatherBuffers) buffer = 0, parity ^= 1;
      };
      if constexpr (apart == 2) {
        for (int row = walk.stored(walk.begin); row < s.rows; row += 2)
          store_rows(row, max(row, 0), min(row + 2, s.rows));
      } else {
        for (int first = walk.begin; first < walk.until(); first += R)
          for (int group = 0; group < groups; ++group) {
            int const start = first + group * kGatherRows - R;
            store_rows(start, max(start, 0), min(min(start + kGatherRows, first), walk.until() - R));
          }
      }
    }
    ptx::cp_async_bulk_wait_group<0>();
  }
};

// The products of a warp; returns the larger of its outputs, or a NaN.
template <class T, int R, int apart, int m_in, int m_out>
__device__ inline uint32_t gather_rows(GatherParams const& p, GatherBarriers<R, apart, m_in, m_out>& barriers,
                                       float const* biases, uint32_t table, uint32_t outputs, int index, int end,
                                       uint32_t shared) {
  constexpr int groups = GatherBarriers<R, apart, m_in, m_out>::groups, channels = 4, octets = kGatherChannels / 8;
  constexpr int inputs = channels / m_in, results = channels / m_out, pairs_in = inputs / 2, pairs_out = results / 2;
  // Operands of a pair of runs, of two pixels that a lane loads; of a run's window `parts` of them.
  constexpr int operands = apart == 2 ? 2 : 3, pixels = apart == 2 ? 3 : 6, parts = apart == 2 ? 1 : 2;
  constexpr int kTapRow = tap_row(apart);
  constexpr uint32_t eight_in = kGatherChannels / m_in * 2 * 8, eight_out = kGatherChannels / m_out * 2 * 8;
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  // Outputs of a lane: columns near and near + 8, far and far + 8 of a pair of runs. One of the first and one of the
  // last of each run are near: one of these is a NaN if an input of the run's window is infinite.
  int const near = t < 3 ? t : 7, far = 3 + t, own = g % 2 == 0 ? (g < 6 ? g / 2 : 7) : 3 + g / 2;
  constexpr int held = gather_holds_taps(R) ? channels : 1;  // else those of a channel at a time, for each row
  uint32_t taps[held][R][parts];
  uint32_t const from_taps =
      table + warp * channels * R * kTapRow + (apart == 2 ? 2 * t - own + 8 + (p.pad_w & 1) : t - own + 7) * 4;
  auto load_taps = [&](int c) {
#pragma unroll
    for (int i = 0; i < R * parts; ++i)
      taps[c % held][i / parts][i % parts] =
          ptx::ld_shared(from_taps + (c * R + i / parts) * kTapRow + i % parts * 8 * 4);
  };
  if constexpr (gather_holds_taps(R))
#pragma unroll
    for (int c = 0; c < channels; ++c) load_taps(c);
  if constexpr (gather_holds_taps(R)) ptx::bar_sync(1, 32 * kToeplitzWarps);  // the table's place is the buffers'
  uint32_t from[2], to[2];
  {
    int const pieces = 8 / p.pairs, piece = g % pieces, column = g / pieces * 16;
    int const in = piece * p.in_columns + column / apart + t, out = piece * p.out_columns + column;
    int const octet_in = warp * inputs / 8, byte_in = warp * inputs % 8 * 2;
    int const octet_out = warp * results / 8, byte_out = warp * results % 8 * 2;
    from[0] = shared + swizzled(in, octet_in, octets / m_in) + byte_in;
    from[1] = shared + swizzled(in + 4, octet_in, octets / m_in) + byte_in;
    to[0] = outputs + swizzled(out + near, octet_out, octets / m_out) + byte_out;
    to[1] = outputs + swizzled(out + far, octet_out, octets / m_out) + byte_out;
  }
  uint32_t const from_bias = ptx::shared_address(biases + warp * channels);
  uint32_t const full = ptx::shared_address(barriers.full), over = full + uint32_t(p.ring) * groups * 8;
  constexpr uint32_t empty = sizeof(barriers.full);
  uint32_t at = 0, bar = full, parity = 0, parity_out = 1, most = 0;  // at, bar: of the cycle, in the ring
  int buffer = 0;
  float acc[R][results][4];
  Pixel<pairs_in> in[pixels];  // of the next row
  // By shuffles, what strips are is known to be the same in all lanes, and takes none of their registers.
  index = __shfl_sync(~0u, index, 0), end = __shfl_sync(~0u, end, 0);
  while (index < end) {
    Strip const s = next_strip<R>(p, index, end);
    GatherRows<R, apart> const walk(p, s);
#pragma unroll
    for (int i = 0; i < R * results * 4; ++i) acc[i / (results * 4)][i / 4 % results][i % 4] = 0.f;
    auto load = [&](int u) {
      if (u % kGatherRows == 0) ptx::mbarrier_wait(bar + u / kGatherRows * 8, parity);
      uint32_t const offset = at + u * p.in_bytes;
#pragma unroll
      for (int j = 0; j < pixels; ++j) in[j].load(from[j % 2] + offset + j / 2 * eight_in);
    };
    if (walk.begin < walk.end) load(0);
#pragma unroll 1
    for (int row = walk.begin; row < walk.until(); row += R) {
      int const count = walk.end - row, lower = R - row,
                upper = walk.until() - row;  // of inputs, outputs: lower <= u < upper
      // To a place of a buffer, the first that is stored there, or the last.
      auto store = [&](int place, bool begins, bool ends, float (&sums)[results][4]) {
        if (m_out == 1 && p.bias != nullptr) {
          uint4 const bias = ptx::ld_shared_v4(from_bias);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[0][i] += __uint_as_float(bias.x), sums[1][i] += __uint_as_float(bias.y);
            sums[2 % results][i] += __uint_as_float(bias.z), sums[3 % results][i] += __uint_as_float(bias.w);
          }
        }
        Pixel<pairs_out> out[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int pair = 0; pair < pairs_out; ++pair)
            out[i].v[pair] = pack<T>(sums[pair * 2][i], sums[pair * 2 + 1][i]);
#pragma unroll
        for (int i = 0; i < 2 * pairs_out; ++i) most = max_or_nan<T>(most, out[i / pairs_out * 2].v[i % pairs_out]);
        if (begins) ptx::mbarrier_wait(&barriers.free[buffer], parity_out);
        uint32_t const offset = (buffer * kGatherRows + place) * p.out_bytes;
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i].store(to[i % 2] + offset + i / 2 * eight_out);
        if (!ends) return;
        ptx::fence_proxy_async();
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&barriers.done[buffer]);
        if (++buffer == kGatherBuffers) buffer = 0, parity_out ^= 1;
      };
      // Row u of the cycle: the sums that it meets with tap r are in place slot(apart * u - r). What the row before has
      // completed is stored, and its place is taken.
      constexpr auto slot = [](int row) { return (row + 2 * R) % R; };
      auto step = [&]<int u>(std::integral_constant<int, u>) {
        auto& first = acc[slot(apart == 2 ? 2 * u - (R + 1) : u - R)];
        auto& second = acc[slot(2 * u - R)];  // of inputs 2 apart
        if constexpr (apart == 2) {
          int const output = walk.stored(row + u);
          bool const has_first = unsigned(output) < unsigned(walk.rows),
                     has_second = unsigned(output + 1) < unsigned(walk.rows);
          if (has_first) store(0, true, !has_second, first);
          if (has_second) store(1, !has_first, true, second);
        } else if (u >= lower && u < upper) {
          store(u % kGatherRows, u % kGatherRows == 0 || u == lower,
                u % kGatherRows == kGatherRows - 1 || u == R - 1 || u == upper - 1, first);
        }
        auto clear = [&](float zero) {
#pragma unroll
          for (int i = 0; i < results * 4; ++i) {
            first[i / 4][i % 4] = zero;
            if constexpr (apart == 2) second[i / 4][i % 4] = zero;
          }
        };
        if (u >= count) return clear(ptx::unknown(0.f));  // no input: what no one knows is not made ahead, for each row
        uint32_t words[operands][inputs];
#pragma unroll
        for (int j = 0; j < operands; ++j)
#pragma unroll
          for (int pair = 0; pair < pairs_in; ++pair) {
            int const pixel = apart == 2 ? j : j * 2;
            uint32_t const a = in[pixel].v[pair], b = in[pixel + 1].v[pair];
            words[j][pair * 2] = __byte_perm(a, b, 0x5410), words[j][pair * 2 + 1] = __byte_perm(a, b, 0x7632);
          }
#pragma unroll
        for (int j = 0; j < operands * inputs; ++j)
          words[j / inputs][j % inputs] = uint32_t(ptx::unknown(int(words[j / inputs][j % inputs])));  // now
        constexpr int group = u / kGatherRows;
        bool const last = u == count - 1;
        if (u == R - 1 || u % kGatherRows == kGatherRows - 1 || last) {
          uint32_t all = 0;
#pragma unroll
          for (int j = 0; j < operands; ++j) all |= words[j][0];
          give_back(bar + empty + group * 8, all);
        }
        if (u == R - 1 || last) {
          bar += groups * 8, at += R * p.in_bytes;
          if (bar == over) bar = full, at = 0, parity ^= 1;
        }
        if (!last) load((u + 1) % R);
        clear(0.f);
        auto multiply = [&](int k, int c) {
          auto& sums = acc[slot(apart * u - (R - 1 - k))][c / m_out];
          int const i = c / m_in;
          auto const& tap = taps[c % held][R - 1 - k];
          if constexpr (apart == 2)
            ptx::mma_m16n8k8<T>(sums, words[0][i], words[1][i], tap[0]);
          else
            ptx::mma_m16n8k16<T>(sums, words[0][i], words[1][i], words[1][i], words[2][i], tap[0], tap[1]);
        };
        if constexpr (gather_holds_taps(R)) {
#pragma unroll
          for (int k = 0; k < R; ++k)
#pragma unroll
            for (int c = 0; c < channels; ++c) multiply(k, c);
        } else {
#pragma unroll
          for (int c = 0; c < channels; ++c) {
            load_taps(c);
#pragma unroll
            for (int k = 0; k < R; ++k) multiply(k, c);
          }
        }
      };
      [&]<int... u>(std::integer_sequence<int, u...>) {
        (step(std::integral_constant<int, u>()), ...);
      }(std::make_integer_sequence<int, R>());
    }
  }
  return most;
}

template <class T, int R, int apart, int m_in, int m_out>
__global__ void __launch_bounds__(kToeplitzThreads, 1) gather_pieces(__grid_constant__ GatherParams const p) {
  constexpr int threads = kToeplitzThreads, readers = 32 * kToeplitzWarps;
  extern __shared__ __align__(1024) unsigned char dynamic[];
  __shared__ GatherBarriers<R, apart, m_in, m_out> barriers;
  __shared__ __align__(16) float biases[kGatherChannels];
  __shared__ int again;
  uint32_t const shared = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  auto const slice = [&](int block) { return min(block % p.slices * kGatherChannels, p.last); };
  int const share = int(blockIdx.x) / p.slices, c0 = slice(int(blockIdx.x));
  int const begin = share * p.each, end = p.units - begin < p.each ? p.units : begin + p.each;
  uint32_t const outputs = shared + p.ring * R * p.in_bytes;
  // The taps' table is in the kGatherBuffers' place if it is read but once.
  uint32_t const table = outputs + (gather_holds_taps(R) ? 0 : kGatherBuffers * kGatherRows * p.out_bytes);
  int const warp = int(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) barriers.start(warp, threads / 32);
  if (threadIdx.x == 0) again = 0;
  __syncthreads();
  if (!take_role()) {
    if (warp == kToeplitzWarps && ptx::elect()) barriers.copy(p, begin, end, c0, shared);
    if (warp == kToeplitzWarps + 1 && ptx::elect()) {
      barriers.store(p, begin, end, c0, outputs);
      ptx::mbarrier_arrive(&barriers.stored);
    }
    return;
  }
  AskedTaps<T, R, apart> const taps(p, c0, int(threadIdx.x));
  if (int(threadIdx.x) < kGatherChannels)
    biases[threadIdx.x] = p.bias != nullptr && c0 + int(threadIdx.x) < p.C
                              ? widen(static_cast<T const*>(p.bias)[(c0 + int(threadIdx.x)) * p.bias_stride])
                              : 0.f;
  for (int i = threadIdx.x; i < kGatherChannels * R * (tap_row(apart) / 16); i += readers)
    ptx::st_shared_v4(table + i * 16, make_uint4(0, 0, 0, 0));
  {  // zeros behind a row's last piece, which the last windows reach
    int const chunks = (p.in_bytes - p.in_copied) / 16;
    for (int i = threadIdx.x; i < p.ring * R * chunks; i += readers)
      ptx::st_shared_v4(shared + i / chunks * p.in_bytes + p.in_copied + i % chunks * 16, make_uint4(0, 0, 0, 0));
  }
  ptx::bar_sync(1, readers);
  taps.spread(table);
  ptx::bar_sync(1, readers);
  uint32_t const most = gather_rows<T, R, apart, m_in, m_out>(p, barriers, biases, table, outputs, begin, end, shared);
  if (has_nan<T>(most)) again = 1;
  ptx::bar_sync(1, readers);
  if (again == 0) return;
  ptx::mbarrier_wait(&barriers.stored, 0);
  // The slice is worked out again.
  store_again<T, R, 4, apart, m_in, m_out>(p, begin, end, slice(ptx::unknown(int(blockIdx.x))), readers);
}

// ---- host side

// m: filters of a channel.
template <Op op, DType dtype, int R, int apart = 1, int m = 1>
cudaError_t launch_gather(Problem const& problem, GatherTile const& t, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad;
  constexpr int m_in = backward ? 1 : m, m_out = backward ? m : 1;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  GatherParams p{};
  depthwise::set_turned<op, T>(p, problem, args);
  p.C = int(problem.K);
  p.in_data = args.a, p.out_data = args.out, p.bias = args.bias, p.N = int(problem.N);
  p.dilation_h = int(problem.dilation_h), p.dilation_w = int(problem.dilation_w);
  p.channels = kGatherChannels, p.blocks = t.parts * t.pairs * 4, p.images = t.images;  // blocks of 4 columns
  p.slices = int(t.slices), p.last = last_slice(op, problem.K, kGatherChannels);
  p.tiles_w = int(t.tiles_w), p.rows = int(t.rows);
  p.units = int(t.units), p.each = int(t.each), p.skip = int((t.shares - 1) * t.each), p.ring = t.cycles;
  p.parts = t.parts, p.pairs = t.pairs, p.in_columns = t.in_columns, p.out_columns = t.out_columns;
  p.in_bytes = int(t.in_bytes), p.out_bytes = int(t.out_bytes);
  p.in_copied = t.parts * t.images * t.in_columns * kGatherChannels / m_in * int(sizeof(T));
  if (auto const error = map_of(p.in, args.a, dtype, in, problem.K / m_in, p.in_W, p.in_H, problem.N,
                                kGatherChannels / m_in, t.in_columns, t.images))
    return error;
  if (auto const error = map_of(p.out, args.out, dtype, out, problem.K / m_out, p.out_W, p.out_H, problem.N,
                                kGatherChannels / m_out, t.parts > 1 ? t.pairs * 16 : t.out_columns, t.images))
    return error;
  auto* const kernel = gather_pieces<T, R, apart, m_in, m_out>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(t.slices * t.shares), kToeplitzThreads, size_t(t.shared_bytes), stream>>>(p);
  return cudaGetLastError();
}

template <Op op, DType dtype, int R, int S>
cudaError_t launch_gather_or(Problem const& all, Plan const& plan, Arguments const& of_all, cudaStream_t stream) {
  Device gpu = h200_sxm;
  if (auto const error = count_sms(gpu.sm_count)) return error;
  return launch_phases<op, dtype>(S, all, of_all, [&](Problem const& problem, Arguments const& args) {
    if constexpr (R == 5 && op == Op::dgrad)
      if (problem.stride_h == 2)
        return launch_gather<op, dtype, R, 2>(problem, gather_tile(op, problem, R, gpu), args, stream);
    if constexpr (R <= kGatherPairs)
      if (problem.K > problem.C)
        return launch_gather<op, dtype, R, 1, 2>(problem, gather_tile(op, problem, R, gpu), args, stream);
    if (takes_gather(op, problem, R, gpu))
      return launch_gather<op, dtype, R>(problem, gather_tile(op, problem, R, gpu), args, stream);
    if constexpr (R < 7) return launch<op, dtype, R>(problem, plan, args, stream);
    return cudaErrorInvalidValue;
  });
}

}  // namespace conv2d_ext::toeplitz

#define CONV2D_EXT_TOEPLITZ_GATHER_INSTANCE(family, op, dtype, tm, tn, tk, variant)         \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                 \
    return toeplitz::launch_gather_or<Op::op, DType::dtype, tm, tn>(p, plan, args, stream); \
  }
