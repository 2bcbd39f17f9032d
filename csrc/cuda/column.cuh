// Depthwise convolution in channels_last at memory speed: square filters of compiled size, stride 1 or 2.
//
// A block walks down a strip of images (all their columns, if they fit) with a slice of the channels, input row by
// input row. The copy engine brings the rows, zeros around the image included, to a ring of stages in shared memory, at
// the command of a warp of its own. A thread of the others has some channels of a few neighbouring outputs, reads each
// input of its columns once, and adds its products to the sums of all output rows that meet the row. Filter and sums
// stay in registers. A block goes on with the next strip without emptying the ring; its share of the strips is fixed,
// so wgrad's sums have a fixed order. dgrad with stride 1 is fprop with the filter turned round. Needs 16-byte channel
// vectors; fprop and dgrad of others, and of small layers, go to depthwise_wide.cuh and depthwise_walk.cuh.
#pragma once

#include <utility>

#include "../core/column.h"
#include "../core/sums_once.h"
#include "depthwise_flat.cuh"
#include "depthwise_wide.cuh"
#include "give_back.cuh"
#include "phase_arguments.h"
#include "ptx.cuh"
#include "tma_map.h"

namespace conv2d_ext::column {

// dgrad with stride 1: H, P and Q, too, are of what is read and written.
struct Params {
  CUtensorMap in, y;  // y: wgrad alone
  void const* x_data;
  void const* y_data;  // wgrad: for sums that are made again
  int64_t x_n, x_h, x_w, y_n, y_h, y_w;
  void const* w;
  void const* bias;
  void* out;      // of fprop and dgrad
  void* partial;  // of wgrad: [share][c][tap]
  int64_t w_k, w_r, w_s, bias_stride;
  int64_t out_n, out_h, out_w;
  int64_t N;
  int C, H, W, P, Q, pad_h, start_w, origin;           // start_w: first input column
  int channels, strips, images;                        // of a block
  int slices, last, tiles_w, units, each, shares;      // last: where the last slice begins; shares: partial sums
  int stages, in_bytes, y_bytes, in_copied, y_copied;  // copied: without the padding to 128 bytes
  bool once;                                           // wgrad: L2 gives up first what is read
};

// What a block walks over at a time: rows [h0, h0 + rows) from column w0 on of images n0 on, of y for wgrad, else of
// the result.
struct Strip {
  int n0, h0, w0, rows, first, count;  // first, count: input rows
};

// A block's channels and rows of all strips.
struct Share {
  int share, c0, begin, end;

  __device__ Share(Params const& p, int block)
      : share(block / p.slices),
        c0(min(block % p.slices * p.channels, p.last)),
        begin(share * p.each),
        end(p.units - begin < p.each ? p.units : begin + p.each) {}
};

// From row `index` of all strips on, as far as the strip and the block's share, which ends at row `end`, reach.
template <Op op, int R, int stride>
__device__ inline Strip strip_of(Params const& p, int index, int end) {
  uint32_t rest = uint32_t(index);
  int const height = op == Op::dgrad ? p.H : p.P;
  Strip u;
  u.h0 = depthwise::split_off(rest, height);
  u.w0 = depthwise::split_off(rest, p.tiles_w) * p.strips * column_width(op, R, stride);
  u.n0 = int(rest) * p.images;
  u.rows = height - u.h0 < end - index ? height - u.h0 : end - index;
  if constexpr (op == Op::dgrad) {
    int const past = u.h0 + p.pad_h + u.rows - 1, lowest = u.h0 + p.pad_h - R + stride;
    u.first = stride == 1 ? lowest : lowest >> 1;
    u.count = past / stride - u.first + 1;
  } else {
    u.first = u.h0 * stride - p.pad_h;
    u.count = (u.rows - 1) * stride + R;
  }
  return u;
}

// Rows of zeros around the image are neither copied nor multiplied.
template <Op op>
__device__ inline bool has_in(Params const& p, Strip const& u, int row) {
  return unsigned(u.first + row) < unsigned(op == Op::dgrad ? p.P : p.H);
}
// wgrad: the row of y that an input row is the first to meet comes with it.
template <Op op, int stride>
__device__ inline bool has_y(Strip const& u, int row) {
  return op == Op::wgrad && row % stride == 0 && row / stride < u.rows;
}

// The ring of stages, in shared memory. A warp of its own keeps ahead of those that multiply.
template <Op op, int R, int stride, int m = 1>
struct Ring {
  uint64_t full[kColumnStages], empty[kColumnStages];

  __device__ void start(Params const& p, int readers) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < p.stages; ++i) {
        ptx::mbarrier_init(&full[i], 1);
        ptx::mbarrier_init(&empty[i], readers);
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
  }

  // Every row of the block's share that has something to copy; by one thread.
  __device__ void copy(Params const& p, int index, int end, int c0, unsigned char* shared) {
    constexpr ColumnAxis axis{op == Op::dgrad, R, stride};
    uint64_t const once = op == Op::wgrad && p.once ? ptx::createpolicy_evict_first() : 0;
    auto bring = [&](uint32_t to, CUtensorMap const& map, uint64_t* bar, int c0, int w, int h, int n) {
      if (once != 0)
        ptx::cp_async_bulk_tensor_4d(to, &map, bar, c0, w, h, n, once);
      else
        ptx::cp_async_bulk_tensor_4d(to, &map, bar, c0, w, h, n);
    };
    int stage = 0;
    uint32_t parity = 1;
    while (index < end) {
      Strip const at = strip_of<op, R, stride>(p, index, end);
      index += at.rows;
      for (int row = 0; row < at.count; ++row) {
        bool const in = has_in<op>(p, at, row), y = has_y<op, stride>(at, row);
        if (!in && !y) continue;
        ptx::mbarrier_wait(&empty[stage], parity);
        ptx::mbarrier_arrive_expect_tx(&full[stage], uint32_t((in ? p.in_copied : 0) + (y ? p.y_copied : 0)));
        uint32_t const to = ptx::shared_address(shared) + stage * (p.in_bytes + p.y_bytes);
        if (in)
          bring(to, p.in, &full[stage], op == Op::dgrad ? c0 : c0 / m, axis.advance(at.w0) + p.start_w, at.first + row,
                at.n0);
        if (y) bring(to + p.in_bytes, p.y, &full[stage], c0, at.w0, at.h0 + row / stride, at.n0);
        if (++stage == p.stages) stage = 0, parity ^= 1;
      }
    }
  }
};

template <class T, int V>
__device__ inline void load(uint32_t shared, float (&v)[V]) {
  if constexpr (sizeof(T) == 4 && V == 1) {
    v[0] = __uint_as_float(ptx::ld_shared(shared));
  } else if constexpr (sizeof(T) * V == 16) {
    uint4 const q = ptx::ld_shared_v4(shared);
    v[0] = __uint_as_float(q.x), v[1] = __uint_as_float(q.y), v[2] = __uint_as_float(q.z), v[3] = __uint_as_float(q.w);
  } else if constexpr (sizeof(T) * V == 8) {
    uint2 const q = ptx::ld_shared_v2(shared);
    if constexpr (V == 2) {
      v[0] = __uint_as_float(q.x), v[1] = __uint_as_float(q.y);
    } else {
      Vector<T, 4> const h = *reinterpret_cast<Vector<T, 4> const*>(&q);
#pragma unroll
      for (int e = 0; e < V; ++e) v[e] = widen(h.v[e]);
    }
  } else if constexpr (V == 1) {
    uint16_t const h = ptx::ld_shared_u16(shared);
    v[0] = widen(*reinterpret_cast<T const*>(&h));
  } else {
    uint32_t const q = ptx::ld_shared(shared);
    Vector<T, 2> const h = *reinterpret_cast<Vector<T, 2> const*>(&q);
    v[0] = widen(h.v[0]), v[1] = widen(h.v[1]);
  }
}

// Channels of x, each for m filters.
template <class T, int V, int m>
__device__ inline void load_each(uint32_t shared, float (&v)[V]) {
  float x[(V + m - 1) / m];
  load<T, (V + m - 1) / m>(shared, x);
#pragma unroll
  for (int e = 0; e < V; ++e) v[e] = x[e / m];
}

// A thread's place in its block; a thread without one reads what another reads.
struct Place {
  int quad, strip, image;
  bool exists;  // has a place and channels

  template <int V>
  __device__ static Place of(Params const& p, int c0, int thread) {
    int const quads = p.channels / V, all = thread / quads;
    int const quad = thread - all * quads, image = all / p.strips;
    if (image >= p.images) return {0, 0, 0, false};
    return {quad, all - image * p.strips, image, c0 + quad * V < p.C};
  }
};

// A word that needs the last channel of every column.
template <int columns, int V>
__device__ inline uint32_t last_of(float const (&v)[columns][V]) {
  uint32_t words = 0;
#pragma unroll
  for (int b = 0; b < columns; ++b) words |= __float_as_uint(v[b][V - 1]);
  return words;
}

// Sums of the R rows of outputs that an input row meets with stride 1. The first product of each moves it on by a row.
template <int R, int V, int width>
struct Sums {
  float acc[R][width][V];

  __device__ void start(float const (&bias)[V]) {
#pragma unroll
    for (int i = 0; i < R * width * V; ++i) acc[i / V / width][i / V % width][i % V] = bias[i % V];
  }
  // Column j of the row: a function of its own, for loops that leave out most of their rounds are not unrolled.
  template <int j, class Load>
  __device__ void add_column(Load const& load, float const (&filter)[R][R][V], float const (&bias)[V]) {
    constexpr int low = j < R - 1 ? 0 : j - R + 1, high = j < width ? j : width - 1;  // outputs that meet it
    float in[V];
    load(j, in);
#pragma unroll
    for (int k = 0; k < R; ++k)
#pragma unroll
      for (int b = low; b <= high; ++b)
#pragma unroll
        for (int e = 0; e < V; ++e) {
          float const before = b != j ? acc[k][b][e] : k + 1 < R ? acc[k + 1 < R ? k + 1 : k][b][e] : bias[e];
          acc[k][b][e] = fmaf(in[e], filter[R - 1 - k][j - b][e], before);
        }
  }
  template <class Load>
  __device__ void add(Load const& load, float const (&filter)[R][R][V], float const (&bias)[V]) {
    [&]<int... j>(std::integer_sequence<int, j...>) {
      (add_column<j>(load, filter, bias), ...);
    }(std::make_integer_sequence<int, width + R - 1>());
  }
};

// The slice's filters come through shared memory: a thread's own are far apart in global memory. To tap i of all of its
// channels, of which `present` are there, goes put(i, channel, tap); then the block's readers meet.
template <class T, int R, class Put>
__device__ inline void fetch_filters(Params const& p, int readers, int c0, Put const& put) {
  int const present = p.C - c0 < p.channels ? p.C - c0 : p.channels;
  constexpr int batch = 8;  // asked for at once, since each may be a wait for memory
  for (int first = threadIdx.x; first < present * R * R; first += batch * readers) {
    T v[batch];
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      int const i = first + k * readers, channel = i / (R * R), tap = i % (R * R);
      if (i < present * R * R)
        v[k] = static_cast<T const*>(p.w)[(c0 + channel) * p.w_k + tap / R * p.w_r + tap % R * p.w_s];
    }
#pragma unroll
    for (int k = 0; k < batch; ++k)
      if (first + k * readers < present * R * R) put(first + k * readers, v[k]);
  }
  ptx::bar_sync(1, readers);
}

template <class T, int R, int V>
__device__ inline void load_filters(Params const& p, T* filters, int readers, int c0, Place const& me,
                                    float (&filter)[R][R][V], float (&bias)[V]) {
  fetch_filters<T, R>(p, readers, c0, [&](int i, T w) { filters[i] = w; });
#pragma unroll
  for (int e = 0; e < V; ++e) {
    T const* const w = filters + (me.exists ? me.quad * V + e : 0) * R * R;
#pragma unroll
    for (int tap = 0; tap < R * R; ++tap) filter[tap / R][tap % R][e] = widen(w[tap]);
    bias[e] = me.exists && p.bias != nullptr
                  ? widen(static_cast<T const*>(p.bias)[(c0 + me.quad * V + e) * p.bias_stride])
                  : 0.f;
  }
}

// Registers are in two banks, even and odd ones, and a product of which two operands have to come from the same takes a
// second cycle. What a pair is loaded to has two neighbouring registers for good: so a tap is loaded together with the
// bias that a sum begins with, and no product meets a bank twice.
template <int R, int width>
__device__ inline void load_filters(Params const& p, float2* pairs, int readers, int c0, Place const& me,
                                    float (&filter)[R][R][1], float (&bias)[1], Sums<R, 1, width>& sums) {
  float const* const biases = static_cast<float const*>(p.bias);
  fetch_filters<float, R>(p, readers, c0, [&](int i, float w) {
    pairs[i] = {w, biases != nullptr ? biases[(c0 + i / (R * R)) * p.bias_stride] : 0.f};
  });
  uint32_t const from = ptx::shared_address(pairs + (me.exists ? me.quad * R * R : 0));
#pragma unroll
  for (int tap = 0; tap < R * R; ++tap) {
    uint2 const pair = ptx::ld_shared_v2(from + tap * 8);
    filter[tap / R][tap % R][0] = __uint_as_float(pair.x);
    if (tap < R * width) sums.acc[tap / width][tap % width][0] = __uint_as_float(pair.y);
    if (tap == 0) bias[0] = __uint_as_float(pair.y);
  }
}

// Stride 1. Rows of zeros beside the image cost neither products nor moves. m_in filters have the same input, m_out of
// them add up to an output.
template <class T, int R, int channels, int m_in, int m_out>
__global__ void __launch_bounds__(column_threads(R, 1) + 32, column_blocks(R, 1))
    slide(__grid_constant__ Params const p) {
  constexpr int V = column_vector(R, 1), width = column_width(Op::fprop, R, 1), results = V > m_out ? V / m_out : 1;
  constexpr bool lanes = V < m_out;  // two neighbours' sums are a result, which the first of them stores
  extern __shared__ __align__(128) unsigned char shared[];
  int const slice = int(blockIdx.x) % p.slices, share = int(blockIdx.x) / p.slices;
  int const c0 = min(slice * p.channels, p.last);
  int const begin = share * p.each, end = p.units - begin < p.each ? p.units : begin + p.each;
  __shared__ Ring<Op::fprop, R, 1, m_in> ring;
  int const readers = int(blockDim.x) - 32;  // threads
  ring.start(p, readers / 32);

  if (int(threadIdx.x) >= readers) {
    if (int(threadIdx.x) == readers) ring.copy(p, begin, end, c0, shared);
    return;
  }
  Place me = Place::of<V>(p, c0, int(threadIdx.x));
  int const c = c0 + me.quad * V;
  float filter[R][R][V], bias[V];
  Sums<R, V, width> sums;
  unsigned char* const filters = shared + p.stages * p.in_bytes;
  if constexpr (column_pairs(R)) {
    load_filters(p, reinterpret_cast<float2*>(filters), readers, c0, me, filter, bias, sums);
  } else {
    load_filters<T, R, V>(p, reinterpret_cast<T*>(filters), readers, c0, me, filter, bias);
    sums.start(bias);
  }
  if constexpr (lanes) me.exists = me.exists && me.quad % m_out == 0;

  int const pitch = (channels != 0 ? channels : p.channels) / m_in * int(sizeof(T));
  int const columns = (p.in_copied / p.images) / pitch;
  uint32_t const mine = ptx::shared_address(shared) + (me.image * columns + me.strip * width) * pitch +
                        me.quad * V / m_in * int(sizeof(T));
  int stage = 0;
  uint32_t parity = 0;
  // By shuffles, what strips are is known to be the same in all lanes, and takes none of their registers.
  int index = __shfl_sync(~0u, begin, 0), last = __shfl_sync(~0u, end, 0);
  while (index < last) {
    Strip const strip = strip_of<Op::fprop, R, 1>(p, index, last);
    index += strip.rows;
    int const w0 = strip.w0 + me.strip * width;
    int const present = me.exists && strip.n0 + me.image < p.N ? p.Q - w0 : 0;  // columns
    // Of the strip's input rows, those from `top` to `bottom` are in the image.
    int const before = strip.first < 0 ? -strip.first : 0, top = before < strip.count ? before : strip.count;
    int const inside = p.H - strip.first < strip.count ? p.H - strip.first : strip.count;
    int const bottom = inside > top ? inside : top;
    T* to = static_cast<T*>(p.out) + int64_t(strip.n0 + me.image) * p.out_n +
            int64_t(strip.h0 + (top < R - 1 ? top - (R - 1) : 0)) * p.out_h + w0 * p.out_w + c / m_out;
    auto put = [&](T* at, float const(&done)[V]) {
      Vector<T, results> v;
#pragma unroll
      for (int e = 0; e < results; ++e)
        v.v[e] = narrow<T>(V > 1 && m_out == 2 ? done[e * m_out] + done[e * m_out + m_out - 1] : done[e]);
      *reinterpret_cast<Vector<T, results>*>(at) = v;
    };
    // The row of outputs that input row `row` is the last of, if there is one.
    auto store_row = [&](int row, float const(&done)[width][V]) {
      if (row >= R - 1) {
        T* at = to;
        if (channels != 0 && present >= width) {  // fewer instructions
#pragma unroll
          for (int b = 0; b < width; ++b, at += p.out_w) put(at, done[b]);
        } else {
#pragma unroll
          for (int b = 0; b < width; ++b, at += p.out_w)
            if (b < present) put(at, done[b]);
        }
      }
      to += p.out_h;
    };
    auto store = [&](int row, float const(&done)[width][V]) {
      if constexpr (lanes) {
        float both[width][V];
#pragma unroll
        for (int b = 0; b < width; ++b) both[b][0] = done[b][0] + __shfl_xor_sync(~0u, done[b][0], 1);
        store_row(row, both);
      } else {
        store_row(row, done);
      }
    };
    float nothing[width][V];
#pragma unroll
    for (int i = 0; i < width * V; ++i) nothing[i / V][i % V] = bias[i % V];
    for (int row = R - 1; row < top; ++row) store(row, nothing);
#pragma unroll 1
    for (int row = top; row < bottom; ++row) {
      ptx::mbarrier_wait(&ring.full[stage], parity);
      uint32_t const from = mine + stage * p.in_bytes;
      sums.add([&](int j, float (&in)[V]) { load_each<T, V, m_in>(from + j * pitch, in); }, filter, bias);
      store(row, sums.acc[0]);
      give_back(&ring.empty[stage], last_of(sums.acc[0]));  // behind a branch: before it, these sums would come first
      if (++stage == p.stages) stage = 0, parity ^= 1;
    }
    int row = bottom;
#pragma unroll
    for (int k = 1; k < R; ++k)
      if (row < strip.count) store(row++, sums.acc[k]);
    sums.start(bias);
    for (; row < strip.count; ++row) store(row, nothing);
  }
}

// Stride 2. A channel of x has m filters.
template <class T, Op op, int R, int stride, int m>
__global__ void __launch_bounds__(column_threads(R, stride) + 32, column_blocks(R, stride, column_vector(R, stride, m)))
    gather(__grid_constant__ Params const p) {
  using Rows = depthwise::WalkRows<op, R, stride>;
  constexpr ColumnAxis axis{op == Op::dgrad, R, stride};
  constexpr bool backward = op == Op::dgrad;
  constexpr int V = column_vector(R, stride, m), width = column_width(op, R, stride), slots = Rows::slots,
                done = Rows::done, of_in = backward ? 1 : m, of_out = backward ? m : 1;
  extern __shared__ __align__(128) unsigned char shared[];
  int const slice = int(blockIdx.x) % p.slices, share = int(blockIdx.x) / p.slices;
  int const c0 = min(slice * p.channels, p.last);
  int const begin = share * p.each, end = p.units - begin < p.each ? p.units : begin + p.each;
  __shared__ Ring<op, R, stride, m> ring;
  int const readers = int(blockDim.x) - 32;  // threads
  ring.start(p, readers / 32);

  if (int(threadIdx.x) >= readers) {
    if (int(threadIdx.x) == readers) ring.copy(p, begin, end, c0, shared);
    return;
  }
  Place const me = Place::of<V>(p, c0, int(threadIdx.x));
  int const c = c0 + me.quad * V;
  float filter[R][R][V], bias[V];
  load_filters<T, R, V>(p, reinterpret_cast<T*>(shared + p.stages * p.in_bytes), readers, c0, me, filter, bias);

  int const pitch = p.channels / of_in * int(sizeof(T)), columns = (p.in_copied / p.images) / pitch;
  uint32_t const mine = ptx::shared_address(shared) + (me.image * columns + axis.advance(me.strip * width)) * pitch +
                        me.quad * (V / of_in) * int(sizeof(T));
  float acc[slots][width][V];
  int stage = 0;
  uint32_t parity = 0;
  for (int index = begin; index < end;) {
    Strip const strip = strip_of<op, R, stride>(p, index, end);
    index += strip.rows;
    int const w0 = p.origin + strip.w0 + me.strip * width, columns_out = op == Op::dgrad ? p.W : p.Q;
    bool const exists = me.exists && strip.n0 + me.image < p.N;
    int out_row = op == Op::dgrad ? strip.first * stride - p.pad_h - strip.h0 : -(slots - 1);
    T* to = static_cast<T*>(p.out) + int64_t(strip.n0 + me.image) * p.out_n + int64_t(strip.h0 + out_row) * p.out_h +
            w0 * p.out_w + c / of_out;

    auto store = [&](float const(&sums)[width][V]) {
      if (exists && unsigned(out_row) < unsigned(strip.rows)) {
#pragma unroll
        for (int b = 0; b < width; ++b) {
          Vector<T, V / of_out> v;
#pragma unroll
          for (int e = 0; e < V / of_out; ++e)
            v.v[e] = narrow<T>(of_out == 1 ? sums[b][e] : sums[b][e * of_out] + sums[b][e * of_out + 1]);
          if (unsigned(w0 + b) < unsigned(columns_out)) *reinterpret_cast<Vector<T, V / of_out>*>(to + b * p.out_w) = v;
        }
      }
      ++out_row, to += p.out_h;
    };
    // Row u of every `stride` rows; dgrad: 0.
    auto step = [&]<int u>(std::integral_constant<int, u>, int row) {
      bool const with_in = has_in<op>(p, strip, row);
      if (with_in) {
        ptx::mbarrier_wait(&ring.full[stage], parity);
        uint32_t const from = mine + stage * p.in_bytes;
        Rows::template add<u>([&](int j, float (&in)[V]) { load_each<T, V, of_in>(from + j * pitch, in); }, filter,
                              bias, acc);
        give_back(&ring.empty[stage], last_of(acc[backward ? 0 : slots - 1]));
        if (++stage == p.stages) stage = 0, parity ^= 1;
      } else if constexpr (u == 0) {
#pragma unroll
        for (int k = 0; k < slots; ++k)
#pragma unroll
          for (int i = 0; i < width * V; ++i)
            acc[k][i / V][i % V] = k + done < slots ? acc[k + done][i / V][i % V] : bias[i % V];
      }
      if constexpr (u == (backward ? 0 : (R - 1) % stride)) {
#pragma unroll
        for (int k = 0; k < done; ++k) store(acc[k]);
      }
    };
#pragma unroll 1
    for (int row = 0; row < strip.count; row += backward ? 1 : stride) {
      step(std::integral_constant<int, 0>(), row);
      if constexpr (!backward && stride == 2)
        if (row + 1 < strip.count) step(std::integral_constant<int, 1>(), row + 1);
    }
  }
}

// A sum of wgrad from global memory, over the block's units: for those that a zero made NaN.
template <class T, int R, int stride, int m>
__device__ __noinline__ float exact_sum(Params const& p, int begin, int end, int c, int r, int s) {
  float sum = 0.f;
  for (int index = begin; index < end;) {
    Strip const strip = strip_of<Op::wgrad, R, stride>(p, index, end);
    index += strip.rows;
    for (int64_t n = strip.n0; n < strip.n0 + p.images && n < p.N; ++n) {
      T const* const x = static_cast<T const*>(p.x_data) + n * p.x_n + c / m;
      T const* const y = static_cast<T const*>(p.y_data) + n * p.y_n + c;
      for (int row = strip.h0; row < strip.h0 + strip.rows; ++row) {
        int const h = row * stride - p.pad_h + r;
        if (unsigned(h) >= unsigned(p.H)) continue;
        for (int q = strip.w0; q < strip.w0 + p.strips * column_width(Op::wgrad, R, stride) && q < p.Q; ++q) {
          int const v = q * stride + p.start_w + s;
          if (unsigned(v) < unsigned(p.W))
            sum = fmaf(widen(x[h * p.x_h + v * p.x_w]), widen(y[row * p.y_h + q * p.y_w]), sum);
        }
        if (sum != sum) return sum;  // NaN, whatever comes
      }
    }
  }
  return sum;
}

// The products of column j of an input row with those rows of y that it meets.
template <int R, int stride, int u, int j, int V, int width, int slots, class Load>
__device__ inline void add_taps(Load const& load, float const (&y)[slots][width][V], float (&acc)[R][R][V]) {
  using Taps = depthwise::WalkTaps<R, stride>;
  float in[V];
  load(j, in);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (Taps::slot(u, r) < 0) continue;
#pragma unroll
    for (int s = 0; s < R; ++s) {
      if (j < s || (j - s) % stride != 0 || (j - s) / stride >= width) continue;
#pragma unroll
      for (int e = 0; e < V; ++e) acc[r][s][e] = fmaf(in[e], y[Taps::slot(u, r)][(j - s) / stride][e], acc[r][s][e]);
    }
  }
}

template <class T, int R, int stride, int channels, int m>
__global__ void __launch_bounds__(column_sums_threads(R, stride) + 32,
                                  R == 7 && stride == 1 ? 1 : column_blocks(R, stride))
    wgrad(__grid_constant__ Params const p) {
  using Taps = depthwise::WalkTaps<R, stride>;
  constexpr ColumnAxis axis{false, R, stride};
  constexpr int V = column_vector(R, stride, m, true), width = column_width(Op::wgrad, R, stride);
  constexpr int taps = R * R, slots = Taps::slots, period = Taps::period;
  extern __shared__ __align__(128) unsigned char shared[];
  Share const share(p, int(blockIdx.x));
  constexpr int pairs = V == 1 ? (R > width ? R * R : R * width) : 1;
  __shared__ Ring<Op::wgrad, R, stride, m> ring;
  __shared__ float2 zeros[pairs];
  int const readers = int(blockDim.x) - 32;  // threads
  for (int i = threadIdx.x; i < pairs; i += int(blockDim.x)) zeros[i] = {0.f, 0.f};
  ring.start(p, readers / 32);

  if (int(threadIdx.x) >= readers) {
    if (int(threadIdx.x) == readers) ring.copy(p, share.begin, share.end, share.c0, shared);
    return;
  }
  ptx::griddepcontrol_launch_dependents();
  Place const me = Place::of<V>(p, share.c0, int(threadIdx.x));
  int const pitch = (channels != 0 ? channels : p.channels) * int(sizeof(T));
  int const pitch_x = pitch / m, columns = (p.in_copied / p.images) / pitch_x;
  uint32_t const base = ptx::shared_address(shared);
  uint32_t const mine =
      base + me.quad * V / m * int(sizeof(T)) + (me.image * columns + axis.advance(me.strip * width)) * pitch_x;
  uint32_t const mine_y =
      base + me.quad * V * int(sizeof(T)) + p.in_bytes + (me.image * p.strips + me.strip) * width * pitch;
  float acc[R][R][V], y[slots][width][V];
  if constexpr (V == 1) {  // in pairs, as filters are
#pragma unroll
    for (int i = 0; i < R * R || i < slots * width; ++i) {
      uint2 const pair = ptx::ld_shared_v2(ptx::shared_address(zeros + i));
      if (i < R * R) acc[i / R % R][i % R][0] = __uint_as_float(pair.y);
      if (i < slots * width) y[i / width % slots][i % width][0] = __uint_as_float(pair.x);
    }
  } else {
#pragma unroll
    for (int i = 0; i < R * R * V; ++i) acc[i / V / R][i / V % R][i % V] = 0.f;
#pragma unroll
    for (int i = 0; i < slots * width * V; ++i) y[i / (width * V)][i / V % width][i % V] = 0.f;
  }
  uint32_t const none =
      blockIdx.z;  // 0, which the compiler does not know: it would clear neighbouring registers at once
  int stage = 0;
  uint32_t parity = 0;
  int index = __shfl_sync(~0u, share.begin, 0), last = __shfl_sync(~0u, share.end, 0);  // as in slide
  while (index < last) {
    Strip const strip = strip_of<Op::wgrad, R, stride>(p, index, last);
    index += strip.rows;
    auto step = [&]<int u>(std::integral_constant<int, u>, int row) {
      bool const with_in = has_in<Op::wgrad>(p, strip, row), with_y = has_y<Op::wgrad, stride>(strip, row);
      if (with_in || with_y) ptx::mbarrier_wait(&ring.full[stage], parity);
      uint32_t const from = mine + stage * (p.in_bytes + p.y_bytes), from_y = mine_y + stage * (p.in_bytes + p.y_bytes);
      if constexpr (u % stride == 0) {  // beyond the unit y is zero
#pragma unroll
        for (int b = 0; b < width; ++b) {
          if (with_y)
            load<T, V>(from_y + b * pitch, y[Taps::slot(u, 0)][b]);
          else
#pragma unroll
            for (int e = 0; e < V; ++e) {
              float& v = y[Taps::slot(u, 0)][b][e];
              v = __uint_as_float(__float_as_uint(v) & none);
            }
        }
      }
      if (with_in)
        [&]<int... j>(std::integer_sequence<int, j...>) {
          auto const read = [&](int column, float (&in)[V]) { load_each<T, V, m>(from + column * pitch_x, in); };
          (add_taps<R, stride, u, j>(read, y, acc), ...);
        }(std::make_integer_sequence<int, axis.extent(width)>());
      if (!with_in && !with_y) return;
      uint32_t words = 0;  // of all columns: outputs meet others with the first tap, with the last, and between
      if (with_in) {
#pragma unroll
        for (int s = 0; s < R; ++s)
          if (stride == 2 ? s != 2 || R == 3 : s % width == 0 || s == R - 1)
            words |= __float_as_uint(acc[u % stride][s][V - 1]);
      } else {
        ptx::fence_proxy_async();  // waits for y's
      }
      give_back(&ring.empty[stage], words);
      if (++stage == p.stages) stage = 0, parity ^= 1;
    };
    for (int row = 0; row < strip.count; row += period)
      [&]<int... u>(std::integer_sequence<int, u...>) {
        ((row + u < strip.count ? step(std::integral_constant<int, u>(), row + u) : void()), ...);
      }(std::make_integer_sequence<int, period>());
#pragma unroll
    for (int i = 0; i < slots * width * V; ++i) y[i / (width * V)][i / V % width][i % V] = __uint_as_float(none);
  }

  // Sums of the threads that share channels, in their order. Who and where they are is worked out again, not kept.
  Share const own(p, ptx::unknown(int(blockIdx.x)));
  Place const adds = Place::of<V>(p, own.c0, ptx::unknown(int(threadIdx.x)));
  int const members = p.strips * p.images, apart = (p.channels / V) | 1;  // odd: taps are in different banks
  float* const sums = reinterpret_cast<float*>(shared);
  ptx::bar_sync(1, readers);
  if (adds.exists) {
    float* const to = sums + (adds.image * p.strips + adds.strip) * (taps * V) * apart + adds.quad;
#pragma unroll
    for (int i = 0; i < taps * V; ++i) to[i * apart] = acc[i / V / R][i / V % R][i % V];
  }
  ptx::bar_sync(1, readers);
  for (int i = threadIdx.x; i < p.channels * taps; i += readers) {
    int const tap = i % taps, channel = i / taps, c = own.c0 + channel;
    if (c >= p.C) break;
    float const* const from = sums + (tap * V + channel % V) * apart + channel / V;
    float sum = 0.f;
    for (int member = 0; member < members; ++member) sum += from[member * (taps * V) * apart];
    if (sum != sum) sum = exact_sum<T, R, stride, m>(p, own.begin, own.end, c, tap / R, tap % R);
    depthwise::store_sum<T>(p.out, p.partial, p.shares, c * p.w_k + tap / R * p.w_r + tap % R * p.w_s,
                            (int64_t(own.share) * p.C + c) * taps + tap, sum);
  }
}

// ---- host side

// A problem without a dilation. wgrad: of `shares` partial sums of taps, those from `share` on, which moves on.
template <Op op, DType dtype, int R, int stride, int m = 1>
cudaError_t launch_one(Problem const& problem, Arguments const& args, int shares, int& share, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad, sums = op == Op::wgrad, turned = backward && stride == 1;
  constexpr ColumnAxis axis{backward, R, stride};
  Strides const &x = problem.x, &y = problem.y;
  Strides const& in = backward ? y : x;
  Strides const& out = backward ? x : y;
  Device gpu = h200_sxm;
  if (auto const error = count_sms(gpu.sm_count)) return error;
  if constexpr (!sums && R == 3) {
    ColumnRoad const road = column_choice(op, problem, R, stride, gpu).road;
    if (road == ColumnRoad::walk)
      return depthwise::launch_walk<op, T, R, stride>(problem, walk_tile(op, problem, R, stride, gpu), args, stream);
    if constexpr (stride == 1 && sizeof(T) == 2)
      if (road == ColumnRoad::flat)
        return depthwise::launch_flat<op, T>(problem, flat_tile(problem, gpu), args, stream);
    if constexpr (op == Op::fprop || stride == 1)
      if (road == ColumnRoad::wide) return depthwise::launch_wide<op, T, stride>(problem, args, stream);
  }
  ColumnTile const t = column_tile(op, problem, R, stride, gpu);
  if (sums && share + t.shares > shares) return cudaErrorInvalidValue;
  Params p{};
  p.N = problem.N, p.C = int(problem.K), p.H = int(problem.H), p.W = int(problem.W);
  p.P = int(problem.P()), p.Q = int(problem.Q());
  p.pad_h = int(problem.pad_top), p.start_w = int(axis.start(problem.pad_left));
  p.origin = int(axis.origin(problem.pad_left));
  p.x_data = args.a, p.y_data = args.b;
  p.x_n = x.n, p.x_h = x.h, p.x_w = x.w, p.y_n = y.n, p.y_h = y.h, p.y_w = y.w;
  p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  if constexpr (turned) {
    p.H = int(problem.P()), p.P = int(problem.H), p.Q = int(problem.W);
    p.pad_h = R - 1 - p.pad_h;
    p.w = static_cast<T const*>(args.b) + (R - 1) * (p.w_r + p.w_s);
    p.w_r = -p.w_r, p.w_s = -p.w_s;
  }
  p.out = args.out, p.once = sums && sums_read_once(problem);
  if (sums && shares > 1) p.partial = static_cast<float*>(args.workspace) + share * problem.K * (R * R);
  p.out_n = out.n, p.out_h = out.h, p.out_w = out.w;
  p.channels = t.channels, p.strips = t.strips, p.images = t.images;
  p.slices = int(t.slices), p.last = last_slice(op, problem.K, t.channels), p.tiles_w = int(t.tiles_w);
  p.units = int(t.units), p.each = int(t.each), p.shares = shares;
  p.stages = t.stages, p.in_bytes = int(t.in_bytes), p.y_bytes = int(t.y_bytes);
  constexpr int width = column_width(op, R, stride), fixed = column_channels(op, R, stride, int(sizeof(T)));
  int const columns = axis.extent(t.strips * width), pixel = t.channels * t.images * int(sizeof(T));
  constexpr int of_in = backward ? 1 : m, of_out = backward ? m : 1;
  p.in_copied = columns * pixel / of_in, p.y_copied = t.strips * width * pixel;
  tma::Tensor4 const from{
      args.a,
      dtype,
      {backward ? problem.K : problem.C, backward ? problem.Q() : p.W, backward ? problem.P() : p.H, problem.N},
      {1, in.w, in.h, in.n}};
  if (auto const error = tma::encode_boxes(p.in, from, t.channels / of_in, columns, 1, t.images)) return error;
  if constexpr (sums)
    if (auto const error = tma::encode_boxes(p.y, {args.b, dtype, {problem.K, p.Q, p.P, problem.N}, {1, y.w, y.h, y.n}},
                                             t.channels, t.strips * width, 1, t.images))
      return error;
  void (*kernel)(Params);
  if constexpr (sums)
    kernel = t.channels == fixed ? wgrad<T, R, stride, fixed, m> : wgrad<T, R, stride, 0, m>;
  else if constexpr (stride == 1)
    kernel = t.channels == fixed ? slide<T, R, fixed, of_in, of_out> : slide<T, R, 0, of_in, of_out>;
  else
    kernel = gather<T, op, R, stride, m>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  unsigned const threads = unsigned(t.warps(column_vector(R, stride, m, sums)) * 32 + 32);
  kernel<<<unsigned(t.slices * t.shares), threads, size_t(t.shared_bytes), stream>>>(p);
  share += int(t.shares);
  return cudaGetLastError();
}

template <Op op, DType dtype, int R, int S, int stride>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  static_assert(R == S);
  bool const phased = column_phased(problem);
  int64_t const rows = phased ? problem.dilation_h : 1, columns = phased ? problem.dilation_w : 1;
  int share = 0;
  for (int64_t h = 0; h < rows; ++h)
    for (int64_t w = 0; w < columns; ++w) {
      Arguments const part = phase_arguments<op, dtype>(problem, args, h, w);
      Problem const phase = phased ? column_phase(problem, h, w) : problem;
      auto launch_of = launch_one<op, dtype, R, stride>;
      if constexpr (column_takes_pairs(dtype, R, stride))
        if (problem.K == 2 * problem.C) launch_of = launch_one<op, dtype, R, stride, 2>;
      if (auto const error = launch_of(phase, part, plan.split_k, share, stream)) return error;
    }
  if (op != Op::wgrad || plan.split_k == 1) return cudaSuccess;
  if (share != plan.split_k) return cudaErrorInvalidValue;
  return depthwise::launch_sum<typename TypeOf<dtype>::type>(problem, plan, args, stream, true);
}

}  // namespace conv2d_ext::column

#define CONV2D_EXT_COLUMN_INSTANCE(family, op, dtype, tm, tn, tk, variant)          \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                         \
    return column::launch<Op::op, DType::dtype, tm, tn, tk>(p, plan, args, stream); \
  }
