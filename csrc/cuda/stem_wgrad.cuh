// wgrad of a few channels on tensor cores: the sums over the pixels of big[pixel, 32 or 64 channels] * gathered
// small[pixel, element of the filter]. Of a network's first layer y is big and x small; of its last, with stride one, x
// is big, y small and the filter mirrored.
//
// A block walks over tiles of pixels, runs of 8 along W. Those of big are copied with cp.async, a tile ahead, in
// vectors of 16 bytes as they lie in memory, and become fragments of mma.sync by ldmatrix, or word by word where lines
// begin within a vector. Those of small, with their halo, come likewise; 16 bits that are no whole vectors as in
// stem.cuh. A warp gathers the fragments of its 32 elements of the filter element by element. Pixels beyond a row's end
// are zeros in both. The warps that share a block's pixels add their sums at the end; a second kernel adds those of the
// blocks, in order.
#pragma once

#include "stem.cuh"

namespace conv2d_ext::stem {

struct SumParams {
  Params p;  // in: small; out: big, which is read here
  // row_bytes: from a tile's row to the next; wide: elements, padded
  int channels, channel_slabs, chunks, splits, slots, line, row_bytes, big_bytes, small_bytes, elements, parts, wide;
  int lines, units;  // of a row of big; vectors of 16 bytes, or elements, of a line
  bool whole;        // lines of small are copied as vectors
  int small_units;   // of a line of small
  int step, plane;   // elements of small from a pixel to the next, from a channel to the next
  unsigned origin;   // of big, in elements from where 16 bytes begin
  unsigned shift;    // elements of a vector less one; 0: lines are copied one by one, for their elements lie apart
  Divisor small_units_of, in_rows_of;  // a unit's line of small; its channel
  Divisor units_of;                    // a unit's line
  float* sums;                         // [part][channel][wide]
};

// A line is a row of a channel (nchw), or the channels of a pixel. It lies as in memory: it begins behind its place by
// what its address in memory is beyond a multiple of 16 bytes. A thread copies the same part of each of a tile's rows.
template <class T, bool nchw, int channels>
__device__ inline void copy_big(SumParams const& q, int64_t n, int row0, int column0, int first, char* to) {
  constexpr int size = int(sizeof(T)), lanes = 16 / size;
  Params const& p = q.p;
  T const* const image = static_cast<T const*>(p.out) + n * p.out_n + row0 * p.out_h + first * p.out_c;
  int const rows = min(p.rows, p.P - row0);
  for (int i = threadIdx.x; i < q.lines * q.units; i += int(blockDim.x)) {
    int const line = q.units_of.quotient(i), unit = i - line * q.units;
    int const column = column0 + (nchw ? 0 : line), channel = nchw ? line : 0;
    int const count = nchw           ? (first + channel < p.K ? min(p.groups * 8, p.Q - column) : 0)
                      : column < p.Q ? min(channels, p.K - first)
                                     : 0;
    T const* from = image + channel * p.out_c + column * p.out_w;
    char* at = to + line * q.line;
    if (q.shift != 0) {
      uint32_t place = ptx::shared_address(at) + unit * 16;
#pragma unroll 1
      for (int row = 0; row < p.rows; ++row, from += p.out_h, place += q.row_bytes) {
        int const shift = p.vectors ? 0 : int(reinterpret_cast<uintptr_t>(from) / size % lanes);
        int const left = row < rows && count > 0 ? count + shift - unit * lanes : 0;
        ptx::cp_async_first(place, from - shift + unit * lanes, max(0, min(lanes, left)) * size);
      }
    } else {
      for (int row = 0; row < p.rows; ++row, from += p.out_h, at += q.row_bytes)
        reinterpret_cast<T*>(at)[unit] =
            row < rows && unit < count ? from[unit * (nchw ? p.out_w : p.out_c)] : narrow<T>(0.f);
    }
  }
}

// A tile's small a tile ahead. As vectors, a row (of a channel, but where a row is one run) with what precedes `w` in
// its vector; floats else as copy_inputs of stem.cuh has them, unrounded.
template <class T>
__device__ inline void copy_small(SumParams const& q, int64_t n, int h, int w, uint32_t to) {
  constexpr int size = int(sizeof(T)), lanes = 16 / size;
  Params const& p = q.p;
  int const together = p.runs ? p.C : 1, channels = p.runs ? 1 : p.C;  // of a line; lines of a row
  T const* const image = static_cast<T const*>(p.in) + n * p.in_n;
  if (q.whole) {
    int const begin = w * together & ~(lanes - 1);
    for (int i = threadIdx.x; i < p.in_rows * channels * q.small_units; i += int(blockDim.x)) {
      int const line = q.small_units_of.quotient(i), e = begin + (i - line * q.small_units) * lanes;
      int const c = q.in_rows_of.quotient(line), row = h + line - c * p.in_rows;
      bool const exists = unsigned(row) < unsigned(p.H) && unsigned(e) < unsigned(p.W * together);
      ptx::cp_async_16(to + i * 16, image + row * p.in_h + c * p.in_c + e, exists);
    }
    return;
  }
  if constexpr (size == 4) {
    int const count = p.in_columns * together, begin = -w * together, end = (p.W - w) * together;
    int const lane = int(threadIdx.x) % 32;
    int64_t const step = p.runs ? 1 : p.in_w;
    for (int c = 0; c < channels; ++c)
      for (int row = threadIdx.x / 32; row < p.in_rows; row += int(blockDim.x) / 32) {
        bool const exists = unsigned(h + row) < unsigned(p.H);
        T const* from = image + (h + row) * p.in_h + c * p.in_c + (w * together + lane) * step;
        uint32_t at = to + (row * p.pitch + lane * channels + c) * 4;
#pragma unroll 1
        for (int i = lane; i < count; i += 32, from += 32 * step, at += channels * 128)
          ptx::cp_async_ca<4>(at, from, exists && i >= begin && i < end);
      }
  }
}

// A float of either tensor, rounded or split.
template <class T>
__device__ inline Word<T> float_word(uint32_t bits) {
  if constexpr (std::is_same_v<T, float>)
    return ptx::cvt_rn_tf32(__uint_as_float(bits));
  else
    return word_of<T>(bits);
}

// Where the pixels of a step are, eight and eight (floats: eight), for this lane. Of 16 bits that take no vectors each
// line begins elsewhere: of the first channel, or of the lane's two pixels.
struct BigPlace {
  uint32_t at[2][2];
};

// Of 16 channels from `m` on.
template <class T, bool nchw, int channels>
__device__ inline void load_big(Word<T> (&a)[4], BigPlace const& from, int line, bool vectors, int m) {
  int const lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = lane % 8, low = lane / 8 % 2, high = lane / 16;
  if constexpr (sizeof(T) == 2) {
    if (vectors) {
      uint32_t const big = high != 0 ? from.at[1][0] : from.at[0][0];
      if constexpr (nchw)
        ptx::ldmatrix_x4(a, big + (m + low * 8 + row) * line);
      else
        ptx::ldmatrix_x4_trans(a, big + row * line + (m + low * 8) * 2);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t const(&at)[2] = from.at[i / 2];
      if constexpr (nchw) {  // two neighbours, which may begin at an odd one
        uint32_t const word = at[0] + (m + g + i % 2 * 8) * line + t * 4;
        a[i] = __funnelshift_r(ptx::ld_shared(word & ~3u), ptx::ld_shared((word & ~3u) + 4), word % 4 * 8);
      } else {
        int const at_pixel = t * 2 * line + (m + g + i % 2 * 8) * 2;
        a[i] = ptx::ld_shared_u16(at[0] + at_pixel) | uint32_t(ptx::ld_shared_u16(at[1] + at_pixel + line)) << 16;
      }
    }
  } else {
    constexpr int pixel_line = channels * 4 + 32;  // nhwc
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const channel = m + g + i % 2 * 8, pixel = t + i / 2 * 4;
      a[i] = float_word<T>(
          ptx::ld_shared(from.at[0][0] + (nchw ? channel * line + pixel * 4 : pixel * pixel_line + channel * 4)));
    }
  }
}

// A word of the reduction of small: one or two pixels, `step` bytes apart.
template <class T>
__device__ inline uint32_t load_small(uint32_t at, int step) {
  if constexpr (sizeof(T) == 2)
    return ptx::ld_shared_u16(at) | uint32_t(ptx::ld_shared_u16(at + step)) << 16;
  else
    return ptx::ld_shared(at);
}

// What a warp sums: the first of the channels and of 32 elements of the filter, over a part of the tiles; `split` is
// its share of their pixels.
template <int channels>
struct SumPlace {
  int lane, chunk, split, part, first, element;
  __device__ SumPlace(SumParams const& q) {
    int const slabs = q.p.slabs, warp = int(threadIdx.x) / 32, block = int(blockIdx.x);
    lane = int(threadIdx.x) % 32, chunk = warp % q.chunks, split = warp / q.chunks;
    part = block / (slabs * q.channel_slabs), first = block / slabs % q.channel_slabs * channels;
    element = (block % slabs * q.chunks + chunk) * 32;
  }
};

template <class T, bool nchw, int channels>
__global__ void __launch_bounds__(kStemThreads, 2) sum(__grid_constant__ SumParams const q) {
  extern __shared__ __align__(16) char dynamic[];
  Params const& p = q.p;
  constexpr int size = int(sizeof(T)), slots_of_step = 4 / size, blocks = channels / 16;
  T* const small = reinterpret_cast<T*>(dynamic + 2 * q.big_bytes);
  SumPlace<channels> const my(q);
  int const pixel_bytes = p.stride_w * q.step * size;
  uint32_t from[4];  // of this lane's elements of the filter
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    int const element = my.element + j * 8 + my.lane / 4, run = p.S * p.C, r = element / run;
    int const s = element % run / p.C, c = element % p.C;
    from[j] = ptx::shared_address(small) + my.lane % 4 * slots_of_step * pixel_bytes +
              (r < p.R ? r * p.dilation_h * p.pitch + s * q.step + c * q.plane : 0) * size;
  }
  float acc[blocks][4][4] = {};
  auto place = [&](int64_t tile, int64_t& n, int& row0, int& column0) {
    n = tile / (p.tiles_h * p.tiles_w);
    int const of_image = int(tile - n * (p.tiles_h * p.tiles_w));
    row0 = of_image / p.tiles_w * p.rows, column0 = of_image % p.tiles_w * (p.groups * 8);
  };
  int64_t n;
  int row0, column0, stage = 0;
  place(my.part, n, row0, column0);
  auto copy = [&](int64_t n, int row0, int column0, int first, int stage) {
    copy_big<T, nchw, channels>(q, n, row0, column0, first, dynamic + stage * q.big_bytes);
    if (size == 4 || q.whole)
      copy_small<T>(q, n, row0 * p.stride_h - p.pad_h, column0 * p.stride_w - p.pad_w,
                    ptx::shared_address(small) + stage * q.small_bytes);
  };
  if (q.slots > p.rows * p.groups) {  // the odd slot
    int const bytes = nchw ? (p.vectors ? 16 : 32) : 8 * q.line, lines = nchw ? channels : 1;
    for (int i = int(threadIdx.x) * 16; i < 2 * lines * bytes; i += int(blockDim.x) * 16)
      *reinterpret_cast<uint4*>(dynamic + i / (lines * bytes) * q.big_bytes + i / bytes % lines * q.line +
                                p.rows * q.row_bytes + i % bytes) = make_uint4(0, 0, 0, 0);
  }
  copy(n, row0, column0, my.first, 0);
  ptx::cp_async_commit_group();
#pragma unroll 1
  for (int64_t tile = my.part; tile < p.tiles; tile += q.parts, stage ^= 1) {
    __syncthreads();  // the tile before has been read
    if constexpr (size == 2) {
      place(tile, n, row0, column0);
      if (!q.whole) copy_inputs<T>(p, n, row0 * p.stride_h - p.pad_h, column0 * p.stride_w - p.pad_w, p.pitch, small);
    }
    if (tile + q.parts < p.tiles) {
      int64_t next_n;
      int next_row, next_column;
      place(tile + q.parts, next_n, next_row, next_column);
      copy(next_n, next_row, next_column, my.first, stage ^ 1);
    }
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<1>();
    __syncthreads();
    if constexpr (size == 4) place(tile, n, row0, column0);
    // Of small's stage, and by how much its lines begin behind their places.
    int const small_at = (size == 4 || q.whole ? stage * q.small_bytes : 0) +
                         (q.whole ? (column0 * p.stride_w - p.pad_w) * (p.runs ? p.C : 1) & (16 / size - 1) : 0) * size;
    int const rows_left = p.P - row0, columns_left = p.Q - column0 - my.lane % 4 * slots_of_step;
    // By how many elements the lines of this lane's channels, or pixels, of the first row begin behind their places.
    unsigned const origin = q.origin + unsigned(n) * unsigned(p.out_n) + unsigned(row0) * unsigned(p.out_h) +
                            unsigned(my.first + (nchw ? my.lane / 4 : 0)) * unsigned(p.out_c) +
                            unsigned(column0 + (nchw ? 0 : my.lane % 4 * slots_of_step)) * unsigned(p.out_w);
#pragma unroll 1
    for (int slot = my.split * slots_of_step; slot < q.slots; slot += q.splits * slots_of_step) {
      uint32_t base[2], mask[2];  // mask: zeros beyond the end of a row (split: see add_parts)
      BigPlace from_big;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int const at = slot + (slots_of_step == 2 ? i : 0), row = p.groups_of.quotient(at), run = at - row * p.groups;
        int const pixel = slots_of_step == 2 ? 0 : i * 4;
        bool const has_row = size == 4 || row < p.rows, exists = has_row && row < rows_left;
        int const left = exists ? columns_left - run * 8 - pixel : 0;
        mask[i] = left >= slots_of_step ? 0xffffffffu : left == 1 ? 0xffffu : 0;
        base[i] = small_at + (has_row ? row * p.stride_h * p.pitch * size + (run * 8 + pixel) * pixel_bytes : 0);
        int const row_at = nchw ? row * q.row_bytes + run * 8 * size : at * 8 * q.line;
#pragma unroll
        for (int k = 0; k < slots_of_step; ++k) {
          unsigned const shift =
              (origin + unsigned(row) * unsigned(p.out_h) + unsigned(k) * unsigned(p.out_w)) & q.shift;
          from_big.at[i][k] = ptx::shared_address(dynamic) + stage * q.big_bytes + row_at + shift * size;
        }
      }
      Word<T> b[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t const word = load_small<T>(from[j] + base[i], pixel_bytes) & (is_split<T> ? ~0u : mask[i]);
          if constexpr (size == 4)
            b[j][i] = float_word<T>(word);
          else
            b[j][i] = word;
        }
#pragma unroll
      for (int m = 0; m < blocks; ++m) {
        Word<T> a[4];
        load_big<T, nchw, channels>(a, from_big, q.line, p.vectors, m * 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) mma<T>(acc[m][j], a[0], a[1], a[2], a[3], b[j][0], b[j][1]);
      }
    }
  }
  ptx::cp_async_wait_all();
  float4* const shared = reinterpret_cast<float4*>(dynamic) + my.chunk * (channels * 8) + my.lane;
  for (int s = 1; s < q.splits; ++s) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < channels / 4; ++i) {
      float (&v)[4] = acc[i / 4][i % 4];
      if (my.split == s) shared[i * 32] = make_float4(v[0], v[1], v[2], v[3]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < channels / 4; ++i) {
      float (&v)[4] = acc[i / 4][i % 4];
      if (my.split == 0) {
        float4 const other = shared[i * 32];
        v[0] += other.x, v[1] += other.y, v[2] += other.z, v[3] += other.w;
      }
    }
  }
  if (my.split == 0) {
    float* const to = q.sums + (int64_t(my.part) * q.channel_slabs * channels + my.first + my.lane / 4) * q.wide +
                      my.element + my.lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < blocks; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          *reinterpret_cast<float2*>(to + (m * 16 + i * 8) * q.wide + j * 8) =
              make_float2(acc[m][j][i * 2], acc[m][j][i * 2 + 1]);
  }
}

// A sum without the products with what lies outside of small, by all threads of a block; the value of thread 0 counts.
template <class T>
__device__ inline float exact_sum(SumParams const& q, int channel, int element) {
  __shared__ double shares[kWarps];
  Params const& p = q.p;
  int const run = p.S * p.C, r = element / run, s = element % run / p.C, c = element % p.C;
  T const* const big = static_cast<T const*>(p.out) + channel * p.out_c;
  T const* const small = static_cast<T const*>(p.in) + c * p.in_c;
  int64_t const lines = p.tiles / (p.tiles_h * p.tiles_w) * p.P;  // of all images
  double sum = 0;
  for (int64_t line = threadIdx.x / 32; line < lines && sum == sum; line += kWarps) {  // a NaN stays one
    int64_t const n = line / p.P;
    int const row = int(line - n * p.P), h = row * p.stride_h - p.pad_h + r * p.dilation_h;
    if (unsigned(h) >= unsigned(p.H)) continue;
    for (int column = threadIdx.x % 32; column < p.Q; column += 32) {
      int const w = column * p.stride_w - p.pad_w + s;
      if (unsigned(w) < unsigned(p.W))
        sum += double(widen(big[n * p.out_n + row * p.out_h + column * p.out_w])) *
               double(widen(small[n * p.in_n + h * p.in_h + w * p.in_w]));
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  __syncthreads();  // the shares of the sum before have been read
  if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = sum;
  __syncthreads();
  for (int i = 1; threadIdx.x == 0 && i < kWarps; ++i) sum += shares[i];
  return float(sum);
}

// 32 sums by 8 shares of the parts. Where big is x, the zeros around small may make a NaN of an infinite or NaN pixel
// that no product has: such sums are taken again, and those of split numbers that are not finite.
template <class T>
__global__ void __launch_bounds__(kStemThreads) add_parts(__grid_constant__ SumParams const q) {
  __shared__ float shares[8][32];
  __shared__ unsigned again;
  Params const& p = q.p;
  int const share = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const element = int(blockIdx.x) * 32 % q.wide + lane, channel = int(blockIdx.x) * 32 / q.wide;
  int const begin = q.parts * share / 8, end = q.parts * (share + 1) / 8;
  int64_t const step = int64_t(q.channels) * q.wide;
  float const* from = q.sums + begin * step + int64_t(channel) * q.wide + element;
  float sum = 0;
#pragma unroll 8
  for (int i = begin; i < end; ++i, from += step) sum += *from;
  shares[share][lane] = sum;
  __syncthreads();
  auto store = [&](int element, float sum) {
    int const run = p.S * p.C, r = element / run, s = element % run / p.C, c = element % p.C;
    static_cast<T*>(
        const_cast<void*>(p.w))[int64_t(channel) * p.w_out + c * p.w_in + (p.mirrored ? p.R - 1 - r : r) * p.w_r +
                                (p.mirrored ? p.S - 1 - s : s) * p.w_s] = narrow<T>(sum);
  };
  if (share == 0) {
#pragma unroll
    for (int i = 1; i < 8; ++i) sum += shares[i][lane];
    bool const exists = channel < p.K && element < q.elements;
    if (exists) store(element, sum);
    unsigned const wrong = __ballot_sync(0xffffffffu, exists && (is_split<T> ? !isfinite(sum) : sum != sum));
    if (lane == 0) again = wrong;
  }
  if (!p.mirrored && !is_split<T>) return;
  __syncthreads();
  for (unsigned left = again; left != 0; left &= left - 1) {
    int const i = element - lane + __ffs(int(left)) - 1;
    float const exact = exact_sum<T>(q, channel, i);
    if (threadIdx.x == 0) store(i, exact);
  }
}

template <DType dtype, Variant variant>
cudaError_t launch_wgrad(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool nchw = variant == Variant::nchw;
  Op const op = stem_wgrad_view(problem);
  StemSums const t = stem_sums(row_of(plan), problem, h200_sxm);
  SumParams q{};
  Params& p = q.p;
  p = view_params<nchw, dtype>(op, problem, 16 / size_of(dtype));
  p.in = op == Op::fprop ? args.a : args.b, p.out = const_cast<void*>(op == Op::fprop ? args.b : args.a);
  p.w = args.out, p.pitch = int(t.pitch), p.copies = 1;
  p.rows = int(t.rows), p.groups = int(t.groups), p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w);
  p.slabs = int(t.slabs), p.in_rows = int(t.in_rows), p.in_columns = int(t.in_columns);
  p.tiles = problem.N * t.tiles_h * t.tiles_w;
  q.channels = int(t.channel_slabs * t.channels), q.channel_slabs = int(t.channel_slabs);
  q.chunks = int(t.chunks), q.splits = int(t.splits), q.slots = int(t.slots), q.line = int(t.line);
  q.big_bytes = int(t.big_bytes), q.small_bytes = int(t.small_bytes);
  q.elements = p.R * p.S * p.C, q.parts = int(t.parts), q.wide = int(t.slabs * t.chunks * 32);
  constexpr int lanes = 16 / int(size_of(dtype));
  p.groups_of = Divisor(uint32_t(p.groups));
  q.whole = t.whole, q.step = t.whole && !p.runs ? 1 : p.C, q.plane = t.whole && !p.runs ? p.in_rows * p.pitch : 1;
  q.small_units = t.whole ? p.pitch / lanes : 1, q.small_units_of = Divisor(uint32_t(q.small_units));
  q.in_rows_of = Divisor(uint32_t(p.in_rows));
  StemView const v = stem_view(op, problem);
  int const count = nchw ? p.groups * 8 : int(t.channels);
  q.shift = (nchw ? v.out.w == 1 : v.out.c == 1) ? lanes - 1 : 0;
  q.origin = unsigned(reinterpret_cast<uintptr_t>(p.out) / size_of(dtype) % lanes);
  q.units = q.shift == 0 ? count : count / lanes + (p.vectors ? 0 : 1), q.units_of = Divisor(uint32_t(q.units));
  q.lines = nchw ? int(t.channels) : p.groups * 8, q.row_bytes = int(t.row_bytes);
  q.sums = static_cast<float*>(args.workspace);
  auto* kernel = t.channels == 32 ? sum<T, nchw, 32> : sum<T, nchw, 64>;
  auto* add = add_parts<T>;
  if constexpr (dtype == DType::f32)
    if (!problem.allow_tf32) kernel = sum<Split, nchw, 32>, add = add_parts<Split>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(t.parts * t.channel_slabs * t.slabs), unsigned(t.chunks * t.splits * 32), size_t(t.shared_bytes),
           stream>>>(q);
  if (auto const error = cudaGetLastError()) return error;
  add<<<unsigned(q.channels * q.wide / 32), kStemThreads, 0, stream>>>(q);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::stem

#define CONV2D_EXT_STEM_WGRAD_INSTANCE(family, op, dtype, tm, tn, tk, variant)        \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                           \
    return stem::launch_wgrad<DType::dtype, Variant::variant>(p, plan, args, stream); \
  }
