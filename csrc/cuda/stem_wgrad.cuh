// wgrad of a few channels on tensor cores: the sums over the pixels of big[pixel, 64 channels] * gathered small[pixel,
// element of the filter]. Of a network's first layer y is big and x small; of its last, with stride one, x is big, y
// small and the filter mirrored.
//
// A block walks over tiles of pixels, runs of 8 along W. Those of big are copied with cp.async, a tile ahead, and
// become fragments of mma.sync by ldmatrix; those of small, with their halo, are copied as in stem.cuh, and a warp
// gathers the fragments of its 32 elements of the filter element by element. Pixels beyond a row's end are zeros in
// both. The warps that share a block's pixels add their sums at the end; a second kernel adds those of the blocks, in
// order.
#pragma once

#include "stem.cuh"

namespace conv2d_ext::stem {

struct SumParams {
  Params p;  // in: small; out: big, which is read here
  int channel_slabs, chunks, splits, slots, line, big_bytes, elements, parts, wide;  // wide: elements, padded
  Divisor lines_of;                                                                  // a vector's channel (nchw)
  float* sums;                                                                       // [part][channel][wide]
};

template <class T, bool nchw>
__device__ inline void copy_big(SumParams const& q, int64_t n, int row0, int column0, int first, char* to) {
  constexpr int lanes = 16 / int(sizeof(T));
  Params const& p = q.p;
  T const* const image = static_cast<T const*>(p.out) + n * p.out_n + first * p.out_c;
  int const threads = int(blockDim.x);
  auto exists = [&](int row, int w) { return row < p.rows && row0 + row < p.P && w < p.Q; };
  if (p.vectors && nchw) {
    constexpr int each = 8 / lanes;  // vectors of a run
    for (int i = threadIdx.x; i < 64 * q.slots * each; i += threads) {
      int const k = q.lines_of.quotient(i), vector = i - k * (q.slots * each), slot = vector / each;
      int const row = p.groups_of.quotient(slot), w = column0 + (slot - row * p.groups) * 8;
      bool const valid = exists(row, w) && first + k < p.K;
      ptx::cp_async_16(ptx::shared_address(to) + k * q.line + vector * 16,
                       image + k * p.out_c + (row0 + row) * p.out_h + w + vector % each * lanes, valid);
    }
  } else if (p.vectors) {
    constexpr int each = 64 / lanes;  // vectors of a pixel
    for (int i = threadIdx.x; i < q.slots * 8 * each; i += threads) {
      int const pixel = i / each, vector = i % each, slot = pixel / 8, row = p.groups_of.quotient(slot);
      int const w = column0 + (slot - row * p.groups) * 8 + pixel % 8;
      bool const valid = exists(row, w) && first + vector * lanes < p.K;
      ptx::cp_async_16(ptx::shared_address(to) + pixel * q.line + vector * 16,
                       image + vector * lanes + (row0 + row) * p.out_h + w * p.out_w, valid);
    }
  } else if (nchw && std::is_same_v<T, float>) {
    int const count = p.groups * 8, lines = 64 * p.rows;
    int const pad = q.slots > p.rows * p.groups ? 8 : 0;  // the last row has the odd slot
    for (int line = threadIdx.x / 32; line < lines; line += threads / 32) {
      int const row = line / 64, k = line % 64;
      bool const valid = row0 + row < p.P && first + k < p.K;
      T const* const from = image + k * p.out_c + (row0 + row) * p.out_h + column0 * p.out_w;
      uint32_t const at = ptx::shared_address(to) + k * q.line + row * count * 4;
      for (int i = threadIdx.x % 32; i < count + (row == p.rows - 1 ? pad : 0); i += 32)
        ptx::cp_async_ca<4>(at + i * 4, from + i * p.out_w, valid && i < count && column0 + i < p.Q);
    }
  } else if (nchw) {
    int const pad = q.slots - p.rows * p.groups, parts = (p.groups + pad + 7) / 8;  // the last row has the odd slot
    for (int unit = threadIdx.x / 32; unit < 16 * p.rows * parts; unit += threads / 32) {
      int const index = unit / parts, row = index / 16, k = index % 16 * 4;
      Lines<T> const l{image + k * p.out_c + (row0 + row) * p.out_h + column0 * p.out_w,
                       p.out_c,
                       p.out_w,
                       0,
                       row0 + row < p.P ? p.K - first - k : 0,
                       0,
                       min(p.Q - column0, p.groups * 8),
                       reinterpret_cast<T*>(to + k * q.line) + row * p.groups * 8,
                       q.line / int(sizeof(T)),
                       1,
                       4,
                       (p.groups + (row == p.rows - 1 ? pad : 0)) * 8};
      copy_lines(l, unit - index * parts, 0);
    }
  } else {
    for (int four = threadIdx.x / 32; four < q.slots * 2; four += threads / 32) {
      int const row = p.groups_of.quotient(four / 2), w = column0 + four * 4 - row * p.groups * 8;
      Lines<T> const l{image + (row0 + row) * p.out_h + w * p.out_w,
                       p.out_w,
                       p.out_c,
                       0,
                       row < p.rows && row0 + row < p.P ? p.Q - w : 0,
                       0,
                       p.K - first,
                       reinterpret_cast<T*>(to + four * 4 * q.line),
                       q.line / int(sizeof(T)),
                       1,
                       4,
                       64};
      copy_lines(l, 0, 0);
    }
  }
}

// Of 16 channels from `m` on and the pixels of a step from slot on.
template <class T, bool nchw>
__device__ inline void load_big(Word<T> (&a)[4], uint32_t big, int line, int slot, int m) {
  int const lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = lane % 8, low = lane / 8 % 2, high = lane / 16;
  if constexpr (sizeof(T) == 2) {
    if constexpr (nchw)
      ptx::ldmatrix_x4(a, big + (m + low * 8 + row) * line + (slot + high) * 16);
    else
      ptx::ldmatrix_x4_trans(a, big + ((slot + high) * 8 + row) * line + (m + low * 8) * 2);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const pixel_line = is_split<T> ? 288 : line;  // nhwc
      int const channel = m + g + i % 2 * 8, pixel = slot * 8 + t + i / 2 * 4;
      float const v = ptx::ld_shared_f32(big + (nchw ? channel * line + pixel * 4 : pixel * pixel_line + channel * 4));
      if constexpr (is_split<T>)
        a[i] = word_of<T>(__float_as_uint(v));
      else
        a[i] = ptx::cvt_rn_tf32(v);
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

// What a warp sums: the first of 64 channels and of 32 elements of the filter, over a part of the tiles; `split` is its
// share of their pixels.
struct SumPlace {
  int lane, chunk, split, part, first, element;
  __device__ SumPlace(SumParams const& q, unsigned thread) {
    int const slabs = q.p.slabs, warp = int(thread) / 32, block = int(blockIdx.x);
    lane = int(thread) % 32, chunk = warp % q.chunks, split = warp / q.chunks;
    part = block / (slabs * q.channel_slabs), first = block / slabs % q.channel_slabs * 64;
    element = (block % slabs * q.chunks + chunk) * 32;
  }
};

template <class T, bool nchw>
__global__ void __launch_bounds__(kStemThreads, 2) sum(__grid_constant__ SumParams const q) {
  extern __shared__ __align__(16) char dynamic[];
  Params const& p = q.p;
  constexpr int size = int(sizeof(T)), slots_of_step = 4 / size;
  T* const small = reinterpret_cast<T*>(dynamic + 2 * q.big_bytes);
  SumPlace const at(q, threadIdx.x);
  int const t = at.lane % 4;
  // Of split numbers once more, of a thread's number that the compiler takes for another: registers are short.
  auto again = [&] {
    if constexpr (is_split<T>)
      return SumPlace(q, __shfl_xor_sync(0xffffffffu, threadIdx.x, 0));
    else
      return at;
  };
  int const pixel_bytes = p.stride_w * p.C * size;
  uint32_t from[4];  // of this lane's elements of the filter
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    int const element = at.element + j * 8 + at.lane / 4, r = element / (p.S * p.C), rest = element % (p.S * p.C);
    from[j] = ptx::shared_address(small) + t * slots_of_step * pixel_bytes +
              (r < p.R ? (r * p.dilation_h * p.pitch + rest) * size : 0);
  }
  float acc[4][4][4] = {};
  using Tile = std::conditional_t<is_split<T>, int, int64_t>;
  auto place = [&](Tile tile, int64_t& n, int& row0, int& column0) {
    n = tile / (p.tiles_h * p.tiles_w);
    int const of_image = int(tile - Tile(n) * (p.tiles_h * p.tiles_w));
    row0 = of_image / p.tiles_w * p.rows, column0 = of_image % p.tiles_w * (p.groups * 8);
  };
  int64_t n;
  int row0, column0, stage = 0;
  place(at.part, n, row0, column0);
  copy_big<T, nchw>(q, n, row0, column0, at.first, dynamic);
  ptx::cp_async_commit_group();
  for (Tile tile = at.part; tile < Tile(p.tiles); tile += q.parts, stage ^= 1) {
    place(tile, n, row0, column0);
    __syncthreads();  // the tile before has been read
    copy_inputs<T>(p, n, row0 * p.stride_h - p.pad_h, column0 * p.stride_w - p.pad_w, p.pitch, small);
    if (tile + q.parts < Tile(p.tiles)) {
      int64_t next_n;
      int next_row, next_column;
      place(tile + q.parts, next_n, next_row, next_column);
      copy_big<T, nchw>(q, next_n, next_row, next_column, again().first, dynamic + (stage ^ 1) * q.big_bytes);
    }
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<1>();
    __syncthreads();
    uint32_t const big = ptx::shared_address(dynamic) + stage * q.big_bytes;
#pragma unroll 1
    for (int slot = again().split * slots_of_step; slot < q.slots; slot += q.splits * slots_of_step) {
      uint32_t base[2], mask[2];  // mask: zeros beyond the end of a row
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int const at = slot + (slots_of_step == 2 ? i : 0), row = p.groups_of.quotient(at), run = at - row * p.groups;
        int const pixel = slots_of_step == 2 ? 0 : i * 4;
        bool const exists = row < p.rows && row0 + row < p.P;
        int const left = exists ? p.Q - column0 - run * 8 - pixel - t * slots_of_step : 0;
        mask[i] = left >= slots_of_step ? 0xffffffffu : left == 1 ? 0xffffu : 0;
        base[i] = exists ? row * p.stride_h * p.pitch * size + (run * 8 + pixel) * pixel_bytes : 0;
      }
      Word<T> b[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) b[j][i] = word_of<T>(load_small<T>(from[j] + base[i], pixel_bytes) & mask[i]);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        Word<T> a[4];
        load_big<T, nchw>(a, big, nchw && is_split<T> ? warp_uniform(q.line) : q.line, slot, m * 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) mma<T>(acc[m][j], a[0], a[1], a[2], a[3], b[j][0], b[j][1]);
      }
    }
  }
  ptx::cp_async_wait_all();
  SumPlace const my = again();
  float4* const shared = reinterpret_cast<float4*>(dynamic) + my.chunk * 512 + my.lane;
  for (int s = 1; s < q.splits; ++s) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float (&v)[4] = acc[i / 4][i % 4];
      if (my.split == s) shared[i * 32] = make_float4(v[0], v[1], v[2], v[3]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float (&v)[4] = acc[i / 4][i % 4];
      if (my.split == 0) {
        float4 const other = shared[i * 32];
        v[0] += other.x, v[1] += other.y, v[2] += other.z, v[3] += other.w;
      }
    }
  }
  if (my.split == 0) {
    float* const to = q.sums + (int64_t(my.part) * q.channel_slabs * 64 + my.first + my.lane / 4) * q.wide +
                      my.element + my.lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < 4; ++m)
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
  for (int64_t line = threadIdx.x / 32; line < lines; line += kWarps) {
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
  int64_t const step = int64_t(q.channel_slabs) * 64 * q.wide;
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
  q.channel_slabs = int(t.channel_slabs), q.chunks = int(t.chunks), q.splits = int(t.splits);
  q.slots = int(ceil_div(t.rows * t.groups, 2) * 2), q.line = int(t.line), q.big_bytes = int(t.big_bytes);
  q.elements = p.R * p.S * p.C, q.parts = int(t.parts), q.wide = int(t.slabs * t.chunks * 32);
  q.lines_of = Divisor(uint32_t(q.slots * size_of(dtype) / 2)), p.groups_of = Divisor(uint32_t(p.groups));
  q.sums = static_cast<float*>(args.workspace);
  auto* kernel = sum<T, nchw>;
  auto* add = add_parts<T>;
  if constexpr (dtype == DType::f32)
    if (!problem.allow_tf32) kernel = sum<Split, nchw>, add = add_parts<Split>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(t.parts * t.channel_slabs * t.slabs), unsigned(t.chunks * t.splits * 32), size_t(t.shared_bytes),
           stream>>>(q);
  if (auto const error = cudaGetLastError()) return error;
  add<<<unsigned(t.channel_slabs * 64 * q.wide / 32), kStemThreads, 0, stream>>>(q);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::stem

#define CONV2D_EXT_STEM_WGRAD_INSTANCE(family, op, dtype, tm, tn, tk, variant)        \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                           \
    return stem::launch_wgrad<DType::dtype, Variant::variant>(p, plan, args, stream); \
  }
