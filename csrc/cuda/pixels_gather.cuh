// 1x1 fprop and dgrad over NCHW in place, whatever the size of the planes: out[m, pixel] = sum over k of w[m, k] *
// in[k, pixel].
//
// Persistent blocks, of tiles of TM filters (dgrad: channels) by up to TN pixels, a part of an image or several whole
// ones. A step has 128 bytes of k, of which each of eight warps has 16: it copies their pixels as they lie, by cp.async
// of the 16-byte vectors that they are in, some steps ahead, and then puts them into lines of 128 bytes of k a pixel
// (K-major), floats rounded to TF32. The copy engine brings the filters; where it does not take them they are loaded by
// words. A warp that multiplies puts its 16
// rows of results into shared memory as they lie in memory modulo 16 bytes, and stores them by whole vectors, and by
// single elements at the ends of rows.
#pragma once

#include "../core/pixels_gather.h"
#include "pixels_planes.cuh"

namespace conv2d_ext::pixels_gather {

constexpr int kGatherWarps = 8;  // as many as a line has vectors

// Of a step of `lines` pixels: what a warp copies, at most.
template <class T, int lines>
struct Raw {
  static constexpr int vector = 16 / int(sizeof(T)), vectors = lines * int(sizeof(T)) / 16 + 1;
  static constexpr int copies = (vector * vectors + 31) / 32, bytes = vector * vectors * 16;
};

template <class T, int TM, int TN>
struct Shape {
  static constexpr int groups = TM / 64, multiplying = groups * kWarpgroup;
  static constexpr int threads = multiplying + kGatherWarps * 32;
  static constexpr int blocks = TM == 64 && TN == 64 ? 2 : 1;  // an SM
  static constexpr int a_bytes = TM * kLineBytes, b_bytes = TN * kLineBytes;
  static constexpr int pitch = TN * int(sizeof(T)) + 16, staging_bytes = TM * pitch;
  static constexpr int stages_a = 4, stages_b = 3, raw_bytes = kGatherWarps * Raw<T, TN>::bytes;
  static constexpr int fixed_bytes = staging_bytes + stages_a * a_bytes + stages_b * b_bytes + 1024;
  static constexpr int ahead = int(min64(4, ((blocks == 2 ? 112 : 226) * 1024 - fixed_bytes) / raw_bytes));
  static constexpr int shared_bytes = fixed_bytes + ahead * raw_bytes;
  static_assert(ahead >= 2);
};

struct Params : Planes {
  CUtensorMap a;
  Divisor width;           // columns of a tile that one image has
  Divisor vectors, per_k;  // of 16 bytes that such columns are in; of all images of a tile
};

// The copies of a warp's share of an operand, a step after the other. first, of `begin`: of the warp's first k, the
// first column of the first image; `columns` of each of `images` exist.
template <class T, int lines>
struct Copies {
  using R = Raw<T, lines>;
  static constexpr int size = int(sizeof(T));
  char const* from[R::copies];
  int32_t k_of[R::copies];  // -1: nothing is copied

  __device__ __forceinline__ void begin(Source const& s, char const* first, int columns, int images,
                                        Divisor const& vectors, Divisor const& per_k, int lane) {
#pragma unroll
    for (int i = 0; i < R::copies; ++i) {
      int v = i * 32 + lane;
      int const k = per_k.divide(v), image = vectors.divide(v);
      char const* const row = first + image * s.n + k * s.k;
      int const off = int(reinterpret_cast<uint64_t>(row)) & 15;
      from[i] = row - off + v * 16;
      k_of[i] = k < R::vector && image < images && v * 16 < off + columns * size ? k : -1;
    }
  }
  // depth: how many k the warp has from here.
  __device__ __forceinline__ void copy(Source const& s, uint32_t raw, int depth, int lane) const {
#pragma unroll
    for (int i = 0; i < R::copies; ++i) {
      if (k_of[i] < 0) continue;
      // Zeros from `depth` on; nothing is read behind the tensor.
      ptx::cp_async_first(raw + (i * 32 + lane) * 16, from[i], k_of[i] < depth ? int(min64(16, s.end - from[i])) : 0);
    }
  }
  __device__ __forceinline__ void advance(Source const& s) {
#pragma unroll
    for (int i = 0; i < R::copies; ++i) from[i] += s.k * (kLineBytes / size);
  }
};

// How they are put into lines. width: places of an image's columns.
template <class T, int V, int lines>
struct Turns {
  using R = Raw<T, lines>;
  static constexpr int size = int(sizeof(T)), groups = lines / (32 * V);
  uint32_t at[groups][R::vector];

  __device__ __forceinline__ void begin(Source const& s, char const* first, int columns, int images,
                                        Divisor const& width, Divisor const& vectors, Divisor const& per_k, int lane) {
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      int column = (g * 32 + lane) * V;
      int image = width.divide(column);
      if (image >= images || column >= columns) image = column = 0;
      uint32_t const row = uint32_t(reinterpret_cast<uint64_t>(first)) + uint32_t(image) * uint32_t(s.n);
#pragma unroll
      for (int i = 0; i < R::vector; ++i)
        at[g][i] = (i * per_k.value + image * vectors.value) * 16 + ((row + i * uint32_t(s.k)) & 15) + column * size;
    }
  }
  // Into lines; place: the warp's among a line's vectors.
  __device__ __forceinline__ void turn(uint32_t raw, uint32_t to, int place, int lane) const {
    uint32_t v[groups][R::vector];
#pragma unroll
    for (int g = 0; g < groups; ++g)
#pragma unroll
      for (int i = 0; i < R::vector; ++i)
        v[g][i] = V * size == 2 ? ptx::ld_shared_u16(raw + at[g][i]) : ptx::ld_shared(raw + at[g][i]);
#pragma unroll
    for (int g = 0; g < groups; ++g)
#pragma unroll
      for (int i = 0; i < V; ++i) {
        // Of two lines every other four lanes begin with the second, so that eight lanes meet all banks.
        int const half = V == 2 ? i ^ (lane >> 2 & 1) : 0, line = (g * 32 + lane) * V + half;
        uint32_t w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (size == 4)
            w[j] = ptx::cvt_rn_tf32(__uint_as_float(v[g][j]));
          else
            w[j] = __byte_perm(v[g][j * 2], v[g][j * 2 + 1], half == 1 ? 0x7632 : 0x5410);
        }
        ptx::st_shared_v4(to + line * kLineBytes + ((place ^ line) & 7) * 16, make_uint4(w[0], w[1], w[2], w[3]));
      }
  }
};

// What the copy engine would bring of the filters: 128 bytes of each eighth line, a word a lane.
template <class T, int TM>
struct Words {
  static constexpr int count = TM / 8;
  uint32_t v[count];

  // rows: of filters summed over, runs of 64 lines side by side.
  template <bool rows>
  __device__ __forceinline__ void fetch(Params const& p, int m, int k, int warp, int lane) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      int const line = warp + i * 8;
      int const row = rows ? k + line % 64 : m + line,
                column = (rows ? m + line / 64 * 64 : k) + lane * (4 / int(sizeof(T)));
      v[i] = row < p.K && column < p.C ? __ldg(reinterpret_cast<uint32_t const*>(p.filters.first() + row * p.filters.k +
                                                                                 column * int(sizeof(T))))
                                       : 0;
    }
  }
  __device__ __forceinline__ void put(uint32_t to, int warp, int lane) const {
    to += warp * kLineBytes + ((lane / 4) ^ warp) * 16 + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < count; ++i)
      ptx::st_shared(to + i * kCoreBytes, sizeof(T) == 4 ? ptx::cvt_rn_tf32(__uint_as_float(v[i])) : v[i]);
  }
};

// A block's tiles.
struct Tile {
  int tile, m, image, pixel;
  __device__ explicit Tile(Params const& p, int tile) : tile(tile) {
    m = tile;
    pixel = p.tiles_m.divide(m);
    image = p.parts.divide(pixel) * p.together;
    pixel *= p.width.value;
  }
  __device__ int columns(Params const& p) const { return min(p.width.value, p.pixels - pixel); }
  __device__ int images(Params const& p) const { return min(p.together, p.images - image); }
};

// How many instructions' worth of k a step has.
template <class T>
__device__ __forceinline__ int parts_of(Params const& p, int step) {
  return min(4, ((p.depth - step * (kLineBytes / int(sizeof(T)))) * int(sizeof(T)) + 31) / 32);
}

template <int stages_a, int stages_b>
struct Tables {
  uint64_t full_a[stages_a], empty_a[stages_a], full_b[stages_b], empty_b[stages_b];
};

template <class T, int TM, int TN, int V, bool a_rows, bool boxes, class S, class Its>
__device__ __forceinline__ void gather(Params const& p, uint32_t ring_a, uint32_t ring_b, uint32_t raw, Its& tables,
                                       int warp) {
  constexpr int chunk = kLineBytes / int(sizeof(T)), vector = 16 / int(sizeof(T));
  constexpr int raw_each = Raw<T, TN>::bytes;
  int const lane = int(threadIdx.x) % 32;
  raw += warp * (S::ahead * raw_each);
  auto first_b = [&](Tile const& t) {
    return p.in.first() + t.image * p.in.n + t.pixel * int64_t(sizeof(T)) + warp * vector * p.in.k;
  };
  Copies<T, TN> copies_b;
  int tile = int(blockIdx.x), step = 0;
  auto copy = [&](int place) {
    if (tile < p.tiles) {
      if (step == 0) {
        Tile const t(p, tile);
        copies_b.begin(p.in, first_b(t), t.columns(p), t.images(p), p.vectors, p.per_k, lane);
      }
      if (warp < 2 * parts_of<T>(p, step))
        copies_b.copy(p.in, raw + place * raw_each, p.depth - step * chunk - warp * vector, lane);
      copies_b.advance(p.in);
      if (++step == p.steps) step = 0, tile += int(gridDim.x);
    }
    ptx::cp_async_commit_group();
  };
  Turns<T, V, TN> turns_b;
  Words<T, TM> words;
  ptx::griddepcontrol_wait();
  if constexpr (!boxes) words.template fetch<a_rows>(p, Tile(p, tile).m * TM, 0, warp, lane);
#pragma unroll 1
  for (int i = 0; i < S::ahead; ++i) copy(i);
  Stage stage_a, stage_b, place;
  // The copies of filters, by one thread, as many steps ahead as they have more stages than pixels.
  bool const brings = boxes && warp == 0 && ptx::elect();
  int tile_a = int(blockIdx.x), step_a = 0;
  auto bring = [&] {
    if (!brings || tile_a >= p.tiles) return;
    uint32_t const to = ring_a + stage_a.index * S::a_bytes;
    uint64_t* const bar = &tables.full_a[stage_a.index];
    int const m = Tile(p, tile_a).m * TM;
    ptx::mbarrier_wait(&tables.empty_a[stage_a.index], stage_a.parity ^ 1);  // passes on the first trip round the ring
    ptx::mbarrier_arrive_expect_tx(bar, S::a_bytes);
    if constexpr (a_rows) {
#pragma unroll
      for (int i = 0; i < TM / 64; ++i)
        ptx::cp_async_bulk_tensor_4d(to + i * tma::kRunBytes, &p.a, bar, m + i * 64, step_a * 64, int(blockIdx.y), 0);
    } else {
      ptx::cp_async_bulk_tensor_4d(to, &p.a, bar, step_a * chunk, m, int(blockIdx.y), 0);
    }
    stage_a.advance(S::stages_a);
    if (++step_a == p.steps) step_a = 0, tile_a += int(gridDim.x);
  };
#pragma unroll 1
  for (int i = 0; i < S::stages_a - S::stages_b; ++i) bring();
#pragma unroll 1
  for (int its = int(blockIdx.x); its < p.tiles; its += int(gridDim.x)) {
    Tile const t(p, its);
    turns_b.begin(p.in, first_b(t), t.columns(p), t.images(p), p.width, p.vectors, p.per_k, lane);
#pragma unroll 1
    for (int i = 0; i < p.steps; ++i) {
      ptx::cp_async_wait_group<S::ahead - 1>();
      __syncwarp();
      if constexpr (!boxes) {
        ptx::mbarrier_wait(&tables.empty_a[stage_a.index], stage_a.parity ^ 1);  // passes on the first trip
        words.put(ring_a + stage_a.index * S::a_bytes, warp, lane);
        bool const last = i + 1 == p.steps;
        if (!last || its + int(gridDim.x) < p.tiles)
          words.template fetch<a_rows>(p, last ? Tile(p, its + int(gridDim.x)).m * TM : t.m * TM,
                                       last ? 0 : (i + 1) * chunk, warp, lane);
        stage_a.advance(S::stages_a);
      }
      ptx::mbarrier_wait(&tables.empty_b[stage_b.index], stage_b.parity ^ 1);
      bring();
      if (warp < 2 * parts_of<T>(p, i))
        turns_b.turn(raw + place.index * raw_each, ring_b + stage_b.index * S::b_bytes, warp, lane);
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&tables.full_b[stage_b.index]);
      stage_b.advance(S::stages_b);
      copy(place.index);
      place.advance(S::ahead);
    }
  }
  ptx::griddepcontrol_launch_dependents();
}

// A warp's 16 rows of results, from row m on.
template <class T, int TN, int pitch>
__device__ __forceinline__ void store(Params const& p, float (&acc)[TN / 2], uint32_t staging, int m, Tile const& t) {
  constexpr int size = int(sizeof(T)), per = 16 / size;
  int const lane = int(threadIdx.x) % 32, rows = min(16, p.M - m), columns = t.columns(p), images = t.images(p);
  char* const out =
      static_cast<char*>(p.out) + (t.image * p.out_n + p.row_of_all(m) * p.out_m + t.pixel * int64_t(size));
  auto off = [&](int row, int image) {  // where a row begins within 16 bytes
    return (uint32_t(reinterpret_cast<uint64_t>(out)) + image * uint32_t(p.out_n) + row * uint32_t(p.out_m)) & 15;
  };
  auto put = [&](uint32_t to, uint32_t apart, float low, float high) {
    if constexpr (size == 4) {
      ptx::st_shared_f32(to, low);
      ptx::st_shared_f32(to + apart, high);
    } else {
      uint32_t const both = pack<T>(low, high);
      ptx::st_shared_u16(to, uint16_t(both));
      ptx::st_shared_u16(to + apart, uint16_t(both >> 16));
    }
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = lane / 4 + half * 8;
    uint32_t const to = staging + row * pitch;
    float const bias = p.bias != nullptr && row < rows
                           ? widen(static_cast<T const*>(p.bias)[p.row_of_all(m + row) * p.bias_stride])
                           : 0.f;
    auto at = [&](int column) -> uint32_t {
      int const image = p.together == 1 ? 0 : p.width.divide(column);
      return to + image * p.vectors.value * 16 + off(row, image) + column * size;
    };
    uint32_t const first = at(lane % 4 * 2);
#pragma unroll
    for (int j = 0; j < TN / 8; ++j) {
      float const low = acc[j * 4 + half * 2] + bias, high = acc[j * 4 + half * 2 + 1] + bias;
      if (p.together == 1) {
        put(first + j * 8 * size, size, low, high);
      } else if (int const column = j * 8 + lane % 4 * 2; column < p.width.value * images) {
        uint32_t const to_low = at(column), to_high = column + 1 < p.width.value * images ? at(column + 1) : to_low;
        put(to_high, to_low - to_high, high, low);  // of a last column alone this is what stays
      }
    }
  }
  __syncwarp();
  // Whole vectors, as many lanes a row as it may have, and the elements at both its ends.
  constexpr int lanes = int(max64(TN * size / 16, 2 * per)), at_once = 32 / lanes;
  int const of_row = lane / lanes, v = lane % lanes, bytes = columns * size;
#pragma unroll 1
  for (int image = 0; image < images; ++image) {
    char* to = out + image * p.out_n + of_row * p.out_m;
    uint32_t from = staging + image * p.vectors.value * 16 + of_row * pitch;
#pragma unroll 4
    for (int i = 0; i < 16 / at_once; ++i, to += at_once * p.out_m, from += at_once * pitch) {
      if (i * at_once + of_row >= rows) continue;
      int const mis = int(reinterpret_cast<uint64_t>(to)) & 15, end = mis + bytes;
      if (v * 16 >= mis && v * 16 + 16 <= end)
        *reinterpret_cast<uint4*>(to - mis + v * 16) = ptx::ld_shared_v4(from + v * 16);
      if (v < 2 * per) {
        int const last = end / 16 * 16, its = (v < per ? 0 : last) + v % per * size;
        bool const left = v < per ? mis > 0 || last == 0 : last > 0;  // is that vector not a whole one?
        if (left && its >= mis && its < end) {
          if constexpr (size == 4)
            *reinterpret_cast<uint32_t*>(to - mis + its) = ptx::ld_shared(from + its);
          else
            *reinterpret_cast<uint16_t*>(to - mis + its) = ptx::ld_shared_u16(from + its);
        }
      }
    }
  }
  __syncwarp();
}

template <class T, int TM, int TN, int V, bool a_rows, bool boxes>
__global__ void __launch_bounds__(Shape<T, TM, TN>::threads, Shape<T, TM, TN>::blocks)
    main_kernel(__grid_constant__ Params const p) {
  using S = Shape<T, TM, TN>;
  extern __shared__ uint8_t dynamic[];
  __shared__ Tables<S::stages_a, S::stages_b> tables;
  uint32_t const ring_a = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024),
                 ring_b = ring_a + S::stages_a * S::a_bytes, staging = ring_b + S::stages_b * S::b_bytes;
  int const warp = warp_uniform(int(threadIdx.x) / 32), lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages_a; ++i) {
      ptx::mbarrier_init(&tables.full_a[i], 1);
      ptx::mbarrier_init(&tables.empty_a[i], S::groups * 4);
    }
    for (int i = 0; i < S::stages_b; ++i) {
      ptx::mbarrier_init(&tables.full_b[i], kGatherWarps);
      ptx::mbarrier_init(&tables.empty_b[i], S::groups * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (warp >= S::groups * 4) {
    gather<T, TM, TN, V, a_rows, boxes, S>(p, ring_a, ring_b, staging + S::staging_bytes, tables, warp - S::groups * 4);
    return;
  }
  int const group = warp / 4;
  uint64_t const layout_a = a_rows ? ptx::wgmma_descriptor(0, tma::kRunBytes, kCoreBytes) : tma::layout_of(kLineBytes),
                 layout_b = tma::layout_of(kLineBytes);
  constexpr uint32_t step_a = a_rows ? 2 * kCoreBytes : 32;
  Stage stage_a, stage_b;
#pragma unroll 1
  for (int tile = int(blockIdx.x); tile < p.tiles; tile += int(gridDim.x)) {
    Tile const t(p, tile);
    float acc[TN / 2] = {};
    int before_a = -1, before_b = 0;
    auto give_back = [&] {
      if (before_a < 0 || lane != 0) return;
      ptx::mbarrier_arrive(&tables.empty_a[before_a]);
      ptx::mbarrier_arrive(&tables.empty_b[before_b]);
    };
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step, stage_a.advance(S::stages_a), stage_b.advance(S::stages_b)) {
      uint32_t const a = ring_a + stage_a.index * S::a_bytes + group * 64 * kLineBytes,
                     b = ring_b + stage_b.index * S::b_bytes;
      if constexpr (boxes) ptx::mbarrier_wait(&tables.full_a[stage_a.index], stage_a.parity);
      ptx::mbarrier_wait(&tables.full_b[stage_b.index], stage_b.parity);
      auto multiply = [&](int k) {
        ptx::wgmma_mma_async<T, a_rows, false>(acc, tma::at_address(layout_a, a + k * step_a),
                                               tma::at_address(layout_b, b + k * 32));
      };
      int const parts = parts_of<T>(p, step);
      ptx::wgmma_fence_operand(acc);
      if (parts == 4) {
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply(k);
        ptx::wgmma_commit_group();
      } else {
#pragma unroll 1
        for (int k = 0; k < parts; ++k) {
          ptx::wgmma_fence();
          multiply(k);
          ptx::wgmma_commit_group();
        }
      }
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(acc);
      give_back();
      before_a = stage_a.index, before_b = stage_b.index;
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
    give_back();
    int const m = t.m * TM + warp * 16;
    if (m < p.M) store<T, TN, S::pitch>(p, acc, staging + warp * 16 * S::pitch, m, t);
  }
}

template <Op op, DType dtype, int TM, int TN>
cudaError_t launch(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool forward = op == Op::fprop, f32 = dtype == DType::f32;
  constexpr int size = int(sizeof(T));
  using S = Shape<T, TM, TN>;
  static_assert(forward || !f32, "wgmma wants TF32's filters K-major");
  int sm_count = 0;
  if (auto const error = count_sms(sm_count)) return error;
  Problem const g = group_of(problem);
  sm_count = int(group_blocks(problem, sm_count));
  PixelsGather const cut(TM, TN, op, g, sm_count);
  Params p{};
  set_planes<op, dtype>(p, cut, problem, args);
  p.width = Divisor(cut.width), p.vectors = Divisor(cut.vectors), p.per_k = Divisor(cut.vectors * cut.together);
  bool const copied = channel_vectors(problem.w, problem.w_align, g.C, 16 / size, dtype);
  if (copied) {
    tma::Tensor4 w{args.b, dtype, {g.C, g.K, problem.groups, 1}, {1, problem.w.n, g.K * problem.w.n, 0}};
    w.rounded = f32;
    if (auto const error = tma::encode_tiled(p.a, w, f32 ? 32 : 64, forward ? TM : 64, 1, 1)) return error;
  }
  auto start = [&](auto* kernel) {
    if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes))
      return error;
    dim3 const blocks(unsigned(min64(p.tiles, sm_count * S::blocks)), unsigned(problem.groups));
    return launch_dependent(kernel, blocks, S::threads, S::shared_bytes, stream, p);
  };
  if (!copied) return start(main_kernel<T, TM, TN, 1, !forward, false>);
  if constexpr (!f32) {
    bool const pairs = p.pixels % 2 == 0 && p.in.k % 4 == 0 && p.in.n % 4 == 0 && cut.width % 2 == 0 &&
                       reinterpret_cast<uint64_t>(args.a) % 4 == 0;
    if (pairs) return start(main_kernel<T, TM, TN, 2, !forward, true>);
  }
  return start(main_kernel<T, TM, TN, 1, !forward, true>);
}

}  // namespace conv2d_ext::pixels_gather

#define CONV2D_EXT_PIXELS_GATHER_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                       \
    return pixels_gather::launch<Op::op, DType::dtype, tm, tn>(p, args, stream);  \
  }
