// 1x1 fprop and dgrad over NCHW in place, 16-bit types, whatever the size of the planes: out[m, pixel] = sum over k of
// w[m, k] * in[k, pixel]. For few channels and many pixels.
//
// Persistent blocks, of tiles of TM filters (dgrad: channels) by up to 248 pixels, a part of an image or several whole
// ones. Four warps bring a step, 64 of k: they copy runs of pixels as they lie, by the 16-byte vectors that they are
// in, three steps ahead (of up to 32 of k alone: six), and then shift them into lines of 64 pixels (N-major), as the
// filters, which they copy too. Two warpgroups multiply: of TM = 64 a tile each in turn, of 128 each half of a tile. A
// warp puts eight rows of results at a time into shared memory, shifts them and stores whole sectors of memory, but at
// the ends of images: a tile works out the next one's first columns for that.
#pragma once

#include "../core/pixels_windows.h"
#include "pixels_planes.cuh"
#include "window.cuh"

namespace conv2d_ext::pixels_windows {

using tma::Divisor;

constexpr int kSize = 2, kGatherWarps = 4, kThreads = 3 * kWarpgroup, kTN = kWindowsColumns;
// Windows reach over the ends of a warp's rows, by a vector of which nothing is used: these lie apart.
constexpr int kPitch = kTN * kSize, kStagingBytes = 8 * kPitch + 48;  // eight rows of a warp
constexpr int kRowBytes = 512, kRows = 64 / kGatherWarps;             // as they lie; of a step, a warp's
constexpr int kMostAhead = 6, kRowsBytes = kMostAhead / 2 * kRows * kRowBytes, kRawBytes = kRowsBytes + kMostAhead * 16;

template <int TM>
struct Shape {
  static constexpr int groups = TM / 64;  // that share a tile
  static constexpr bool alternate = groups == 1;
  static constexpr int a_bytes = TM * kLineBytes, b_bytes = 4 * tma::kRunBytes;
  static constexpr int stage_bytes = a_bytes + b_bytes, stages = 2;
  static constexpr int shared_bytes = stages * stage_bytes + kGatherWarps * kRawBytes + 8 * kStagingBytes + 1088;
};

struct Params : pixels_gather::Planes {
  Divisor vectors;          // that a tile's columns of an image may lie in
  int32_t width, reach;     // columns of an image from a tile to the next; that a tile works out
  int32_t ahead, raw_step;  // steps that are copied ahead; bytes of one, a warp's
};

struct Tile {
  int m, image, pixel;
  __device__ __forceinline__ Tile(Params const& p, int tile) {
    m = tile;
    pixel = p.tiles_m.divide(m);
    image = p.parts.divide(pixel) * p.together;
    pixel *= p.width;
  }
  __device__ int bytes(Params const& p) const { return min(p.reach, p.pixels - pixel) * kSize; }
  __device__ int images(Params const& p) const { return min(p.together, p.images - image); }
};

// How many instructions' worth of k a step has.
__device__ __forceinline__ int parts_of(Params const& p, int step) { return min(4, (p.depth - step * 64 + 15) / 16); }

template <int groups, int stages>
struct Tables {
  uint64_t full[groups][stages], empty[stages];
};

// A warp's copies of rows as they lie, every fourth of a step: a vector a lane.
struct Copies {
  int tile = int(blockIdx.x), step = 0;
  char const* at;  // this lane's image's part of the warp's first row, and behind it as far as the lane's vector is
  int image, vector;
  bool exists;

  __device__ __forceinline__ void begin(Params const& p, int warp) {
    if (tile >= p.tiles) return;
    Tile const t(p, tile);
    at = p.in.first() + (t.image + image) * p.in.n + (t.pixel * int64_t(kSize) + vector) + warp * p.in.k;
    exists = image < t.images(p) && vector < t.bytes(p) + 16 - kSize;
  }
  __device__ __forceinline__ void copy(Params const& p, uint32_t raw, int warp) {
    int const rows = min(kRows, (p.depth - step * 64 - warp + kGatherWarps - 1) / kGatherWarps);
    if (tile < p.tiles && rows > 0) {
      char const* row = at;
      raw += (int(threadIdx.x) % 32) * 16;
      auto vector_of = [&row] { return row - (reinterpret_cast<uint64_t>(row) & 15); };
      if (__all_sync(~0u, !exists || at + (rows - 1) * kGatherWarps * p.in.k + 16 <= p.in.end)) {
        if (exists)
#pragma unroll 4
          for (int r = 0; r < rows; ++r, row += kGatherWarps * p.in.k)
            ptx::cp_async_16(raw + r * kRowBytes, vector_of(), true);
      } else {  // nothing is read behind the tensor
#pragma unroll 1
        for (int r = 0; r < rows; ++r, row += kGatherWarps * p.in.k)
          ptx::cp_async_first(raw + r * kRowBytes, vector_of(),
                              exists ? int(max64(0, min64(16, p.in.end - vector_of()))) : 0);
      }
    }
    ptx::cp_async_commit_group();
    if (++step < p.steps) {
      at += 64 * p.in.k;
    } else {
      step = 0, tile += int(gridDim.x);
      begin(p, warp);
    }
  }
};

// A warp's share of a step's filters, through registers, 4 or 16 bytes a lane. (The copy engine takes 10 ns for half a
// line of 128 bytes; `cp.async` would arrive behind the copies ahead.)
template <bool rows, int TM, int bytes>
struct Share {
  static constexpr int lanes = kLineBytes / bytes, apart = kGatherWarps * 32 / lanes, count = TM / apart;  // lines
  using Unit = std::conditional_t<bytes == 16, uint4, uint32_t>;
  Unit v[count];
  int const first = int(threadIdx.x) % kWarpgroup / lanes, at = int(threadIdx.x) % lanes * bytes;  // line; byte of it

  __device__ __forceinline__ void fetch(Params const& p, int m, int k) {
    int row = (rows ? k : m) + first, column = (rows ? m : k) + at / kSize;
    char const* from = p.filters.first() + row * p.filters.k + column * kSize;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (rows && i == 64 / apart) row -= 64, from += 64 * (kSize - p.filters.k), column += 64;
      v[i] = Unit{};
      if (row < p.K && column < p.C) v[i] = __ldg(reinterpret_cast<Unit const*>(from));
      row += apart, from += apart * p.filters.k;
    }
  }
  __device__ __forceinline__ void put(uint32_t to) const {
    to += first * kLineBytes + ((at / 16) ^ (first & 7)) * 16 + at % 16;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      uint32_t const place = (to + i * apart * kLineBytes) ^ (apart % 8 != 0 && i % 2 == 1 ? 64 : 0);
      if constexpr (bytes == 16)
        ptx::st_shared_v4(place, v[i]);
      else
        ptx::st_shared(place, v[i]);
    }
  }
};

template <int TM, bool a_rows, int bytes, class T>
__device__ __forceinline__ void gather(Params const& p, uint32_t ring, uint32_t raw, T& tables, int warp) {
  using S = Shape<TM>;
  int const lane = int(threadIdx.x) % 32;
  raw += warp * kRawBytes;
  ptx::griddepcontrol_wait();
  Copies copies;
  copies.vector = lane;
  int const image = copies.image = p.vectors.divide(copies.vector);  // of this lane's vector
  copies.vector *= 16;
  copies.begin(p, warp);
#pragma unroll 1
  for (int i = 0; i < p.ahead; ++i) copies.copy(p, raw + i * p.raw_step, warp);
  Share<a_rows, TM, bytes> filters;
  filters.fetch(p, Tile(p, int(blockIdx.x)).m * TM, 0);
  Stage stage, place;
  int its = 0;
  uint32_t const apart = uint32_t(p.in.k) * kGatherWarps;
#pragma unroll 1
  for (int tile = int(blockIdx.x); tile < p.tiles; tile += int(gridDim.x)) {
    Tile const t(p, tile);
    int const m = t.m * TM;
    // Where this lane's image's part of the warp's first row begins; the last four bits count.
    uint32_t low = uint32_t(reinterpret_cast<uint64_t>(p.in.first())) + uint32_t(t.image + image) * uint32_t(p.in.n) +
                   uint32_t(t.pixel * kSize) + warp * uint32_t(p.in.k);
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step, stage.advance(S::stages)) {
      uint32_t const to = ring + stage.index * S::stage_bytes, from = raw + place.index * p.raw_step + lane * 16;
      uint64_t* const full = &tables.full[its][stage.index];
      ptx::mbarrier_wait(&tables.empty[stage.index], stage.parity ^ 1);  // passes on the first trip round the ring
      filters.put(to);
      bool const last = step + 1 == p.steps;
      if (int const next = tile + (last ? int(gridDim.x) : 0); next < p.tiles)
        filters.fetch(p, last ? Tile(p, next).m * TM : m, last ? 0 : (step + 1) * 64);
      if (p.ahead == kMostAhead)
        ptx::cp_async_wait_group<kMostAhead - 1>();
      else
        ptx::cp_async_wait_group<kMostAhead / 2 - 1>();
      __syncwarp();
      int const depth = p.depth - step * 64 - warp, rows = parts_of(p, step) * 16 - warp;
      uint32_t lines = to + S::a_bytes + lane / 8 * tma::kRunBytes + warp * kLineBytes + ((lane ^ warp) & 7) * 16,
               rest = low;
#pragma unroll 1
      for (int r = 0; r < rows; r += 16, lines += 16 * kLineBytes, rest += apart * 4) {
        uint4 line[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t const at = from + r / 4 * kRowBytes + i * kRowBytes;
          line[i] = window(ptx::ld_shared_v4(at), ptx::ld_shared_v4(at + 16), (rest + i * apart) & 15);
          if (r + i * 4 >= depth) line[i] = make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) ptx::st_shared_v4((lines + i * 4 * kLineBytes) ^ (i % 2 == 1 ? 64 : 0), line[i]);
      }
      low += 64 * uint32_t(p.in.k);
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(full);
      copies.copy(p, raw + place.index * p.raw_step, warp);
      place.advance(p.ahead);
    }
    if constexpr (S::alternate) its ^= 1;
  }
  ptx::cp_async_wait_all();
  ptx::griddepcontrol_launch_dependents();
}

// What a tile stores of a row of results: whole sectors of memory, but at the ends of images. Addresses' last 32 bits.
struct Span {
  uint32_t begin, end;
  __device__ Span(uint32_t row, bool first, int width, int bytes) {
    begin = first ? row : (row + 31) & ~31u;
    end = row + min(width + int(-(row + width) & 31), bytes);
  }
};

// A warp's 16 rows of results, from row m on.
template <class T>
__device__ __forceinline__ void store(Params const& p, float (&acc)[kTN / 2], uint32_t staging, int m, Tile const& t) {
  int const lane = int(threadIdx.x) % 32, bytes = t.bytes(p), images = t.images(p), width = p.width * kSize;
  bool const first = t.pixel == 0, ends = first || t.pixel + p.reach >= p.pixels;
  if (p.bias != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = m + half * 8 + lane / 4;
      float const bias = row < p.M ? widen(static_cast<T const*>(p.bias)[p.row_of_all(row) * p.bias_stride]) : 0.f;
#pragma unroll
      for (int j = 0; j < kTN / 8; ++j) acc[j * 4 + half * 2] += bias, acc[j * 4 + half * 2 + 1] += bias;
    }
  }
  int v = lane;
  int const image = p.vectors.divide(v);
  v *= 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const rows = min(8, p.M - m - half * 8);
    if (rows <= 0) break;
    uint32_t const to = staging + lane / 4 * kPitch + lane % 4 * 4;
#pragma unroll
    for (int j = 0; j < kTN / 8; ++j)
      ptx::st_shared(to + j * 16, pack<T>(acc[j * 4 + half * 2], acc[j * 4 + half * 2 + 1]));
    __syncwarp();
    char* const out = static_cast<char*>(p.out) +
                      (t.image * p.out_n + p.row_of_all(m + half * 8) * p.out_m + t.pixel * int64_t(kSize));
    char* mine = out + image * p.out_n;
    uint32_t from = staging + lane * 16;
#pragma unroll 1
    for (int row = 0; row < rows; row += 4) {
      uint4 whole[4];
      bool stored[4];
#pragma unroll
      for (int i = 0; i < 4; ++i, from += kPitch) {
        uint32_t const low = uint32_t(reinterpret_cast<uint64_t>(mine + i * p.out_m)), mis = low & 15;
        Span const span(low, first, width, bytes);
        uint32_t const its = low - mis + v;
        stored[i] = row + i < rows && image < images && int(its - span.begin) >= 0 && int(span.end - its) >= 16;
        uint32_t const at = from - (mis > 0 ? 16 : 0);
        whole[i] = window(ptx::ld_shared_v4(at), ptx::ld_shared_v4(at + 16), -low & 15);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i, mine += p.out_m)
        if (stored[i]) *reinterpret_cast<uint4*>(mine - (reinterpret_cast<uint64_t>(mine) & 15) + v) = whole[i];
    }
    if (ends) {  // single elements: of 16 lanes up to seven at either end
#pragma unroll 1
      for (int j = lane / 16; j < images * 8; j += 2) {
        int const its = j / 8, row = j % 8;
        char* const at = out + its * p.out_n + row * p.out_m;
        uint32_t const low = uint32_t(reinterpret_cast<uint64_t>(at));
        Span const span(low, first, width, bytes);
        int const begin = int(span.begin - low), end = int(span.end - low), head = begin + int(-span.begin & 15);
        int const byte = lane % 8 * kSize + (lane & 8 ? max(end - int(span.end & 15), head) : begin);
        if (row < rows && byte < (lane & 8 ? end : min(head, end)))
          *reinterpret_cast<uint16_t*>(at + byte) =
              ptx::ld_shared_u16(staging + row * kPitch + its * p.vectors.value * 16 + byte);
      }
    }
    __syncwarp();
  }
}

template <class T, int TM, bool a_rows, int bytes>
__global__ void __launch_bounds__(kThreads, 1) main_kernel(__grid_constant__ Params const p) {
  using S = Shape<TM>;
  extern __shared__ uint8_t dynamic[];
  __shared__ Tables<3 - S::groups, S::stages> tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024),
                 raw = ring + S::stages * S::stage_bytes, staging = raw + kGatherWarps * kRawBytes;
  int const warp = warp_uniform(int(threadIdx.x) / 32), lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; ++i) {
      for (auto& full : tables.full) ptx::mbarrier_init(&full[i], kGatherWarps);
      ptx::mbarrier_init(&tables.empty[i], S::groups * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (warp >= 8) {
    gather<TM, a_rows, bytes>(p, ring, raw, tables, warp - 8);
    return;
  }
  int const group = S::alternate ? 0 : warp / 4, its = S::alternate ? warp / 4 : 0;
  uint64_t const rows = ptx::wgmma_descriptor(0, tma::kRunBytes, kCoreBytes),
                 layout_a = a_rows ? rows : tma::layout_of(kLineBytes);
  constexpr uint32_t step_a = a_rows ? 2 * kCoreBytes : 32;
  // A bit for each stage: how often, modulo 2, it has had a step of these warps' tiles.
  uint32_t parities = 0;
  int stage = S::alternate ? its * p.steps % S::stages : 0;
#pragma unroll 1
  for (int tile = int(blockIdx.x + its * gridDim.x); tile < p.tiles; tile += int(gridDim.x) * (S::alternate ? 2 : 1)) {
    Tile const t(p, tile);
    float acc[kTN / 2] = {};
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step) {
      uint32_t const a = ring + stage * S::stage_bytes + group * 64 * kLineBytes,
                     b = ring + stage * S::stage_bytes + S::a_bytes;
      ptx::mbarrier_wait(&tables.full[its][stage], parities >> stage & 1);
      parities ^= 1u << stage;
      int const parts = parts_of(p, step);
      ptx::wgmma_fence_operand(acc);
#pragma unroll 1
      for (int k = 0; k < parts; ++k) {
        ptx::wgmma_fence();
        ptx::wgmma_mma_async<T, a_rows, true>(acc, tma::at_address(layout_a, a + k * step_a),
                                              tma::at_address(rows, b + k * 2 * kCoreBytes));
        ptx::wgmma_commit_group();
      }
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(acc);
      if (lane == 0) ptx::mbarrier_arrive(&tables.empty[stage]);
      if (++stage == S::stages) stage = 0;
    }
    if constexpr (S::alternate) stage = (stage + p.steps) % S::stages;
    int const m = t.m * TM + (group * 4 + warp % 4) * 16;
    if (m < p.M) store<T>(p, acc, staging + warp * kStagingBytes + 16, m, t);
  }
}

template <Op op, DType dtype, int TM>
cudaError_t launch(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  using S = Shape<TM>;
  constexpr bool forward = op == Op::fprop;
  bool const vectors = channel_vectors(problem.w, problem.w_align, problem.C_per_group(), 8, dtype);
  int sm_count = 0;
  if (auto const error = count_sms(sm_count)) return error;
  sm_count = int(group_blocks(problem, sm_count));
  PixelsWindows const cut(TM, op, group_of(problem), sm_count);
  Params p{};
  pixels_gather::set_planes<op, dtype>(p, cut, problem, args);
  p.vectors = Divisor(cut.vectors), p.width = int32_t(cut.width), p.reach = int32_t(cut.reach);
  p.ahead = p.depth <= 32 ? kMostAhead : kMostAhead / 2, p.raw_step = kRowsBytes / p.ahead + 16;
  auto* const kernel = vectors ? main_kernel<T, TM, !forward, 16> : main_kernel<T, TM, !forward, 4>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes))
    return error;
  dim3 const blocks(unsigned(min64(p.tiles, sm_count)), unsigned(problem.groups));
  return launch_dependent(kernel, blocks, kThreads, S::shared_bytes, stream, p);
}

}  // namespace conv2d_ext::pixels_windows

#define CONV2D_EXT_PIXELS_WINDOWS_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                        \
    return pixels_windows::launch<Op::op, DType::dtype, tm>(p, args, stream);      \
  }
