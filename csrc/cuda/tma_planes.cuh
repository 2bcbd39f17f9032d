// Dense fprop and dgrad over NCHW in 16-bit types, filters three wide with a padding of one: x's planes as they lie,
// nothing is packed but filters. The copy engine takes no box that begins within 16 bytes of a row, so pixels are not
// moved by the columns of a filter. Their products are:
//   Y_s[n, pixel] = sum over rows r of the filter and channels of A[n, r, s, channel] * x[channel, pixel + r's rows]
//   out[n, pixel] = Y_0[n, pixel - 1] + Y_1[n, pixel] + Y_2[n, pixel + 1], but for those of another row
// Pixels are counted through a plane, so that rows of any number of vectors leave no tile empty; a row of the filter
// moves them by whole rows, and before and behind the plane there are zeros.
//
// A persistent block of three warpgroups: one thread copies pixels of 32 channels, and what a row of 64 filters has for
// them, a stage; two warpgroups multiply 64 filters by 128 pixels each, in three sums, and add neighbours by shuffles.
// The first and last eight pixels of a tile may lack a neighbour: tiles overlap, and do not store these.
// turns: all filters stay in shared memory, and the warpgroups have tiles of their own: one multiplies while the other
// adds and stores. Otherwise they share a tile of 256 pixels, and hand each other what their halves lack.
#pragma once

#include "../core/tma_planes.h"
#include "tma.cuh"

namespace conv2d_ext::tma {

struct PlanesTables {
  uint64_t full[PlanesCut::most_stages], empty[PlanesCut::most_stages], kept;
  float edge[2][2][64];  // of two tiles in turn: the first half's last Y_0, the second's first Y_2
};

struct PlanesParams {
  CUtensorMap x, w;
  Divisor tiles_n, tiles_image;  // tiles of an image
  Divisor columns;               // vectors of a row
  int32_t tiles, advance;
  bool whole;      // tiles are whole rows
  int32_t chunks;  // of the reduction's channels
  int32_t taps_h, steps;
  int32_t first, step;  // from pixel 0 to that of tap 0; from a tap to the next
  int32_t first_r, step_r, first_s, step_s;
  int32_t N, pixels;  // planes, and pixels of each
  int32_t stage_bytes, stages;
  int64_t out_n, out_c;
  void const* bias;
  int64_t bias_stride;
  void* out;
};

struct PlanesTile {
  int32_t n, pixel, image;

  __device__ PlanesTile(PlanesParams const& p, int index) {
    n = index;
    int m = p.tiles_n.divide(n);
    image = p.tiles_image.divide(m);
    pixel = m * p.advance;
  }
};

template <bool a_rows, bool turns>
__device__ void planes_copy(PlanesParams const& p, uint32_t ring, PlanesTables& tables) {
  constexpr int line = PlanesCut::chunk * kLineBytes;
  auto copy_filters = [&](int n, int chunk, int r, uint32_t to, uint64_t* bar) {
    int const k = chunk * PlanesCut::chunk, tap = p.first_r + r * p.step_r;
    ptx::cp_async_bulk_tensor_4d(to, &p.w, bar, a_rows ? n * 64 : k, a_rows ? k : n * 64, 0, tap);
  };
  if constexpr (turns) {
    int const n = int(blockIdx.x) % p.tiles_n;
    uint32_t to = ring + p.stages * p.stage_bytes;
    ptx::mbarrier_arrive_expect_tx(&tables.kept, p.chunks * p.taps_h * PlanesCut::w_bytes);
#pragma unroll 1
    for (int chunk = 0; chunk < p.chunks; ++chunk)
#pragma unroll 1
      for (int r = 0; r < p.taps_h; ++r, to += PlanesCut::w_bytes) copy_filters(n, chunk, r, to, &tables.kept);
  }
  Stage at;
#pragma unroll 1
  for (int index = int(blockIdx.x); index < p.tiles; index += int(gridDim.x)) {
    PlanesTile const tile(p, index);
#pragma unroll 1
    for (int chunk = 0; chunk < p.chunks; ++chunk)
#pragma unroll 1
      for (int r = 0; r < p.taps_h; ++r) {
        uint64_t* const full = &tables.full[at.index];
        uint32_t const to = ring + at.index * p.stage_bytes;
        ptx::mbarrier_wait(&tables.empty[at.index], at.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, p.stage_bytes);
        int const pixel = tile.pixel + p.first + r * p.step;
#pragma unroll
        for (int run = 0; run < (turns ? 2 : 4); ++run)
          ptx::cp_async_bulk_tensor_4d(to + run * line, &p.x, full, pixel + run * 64, chunk * PlanesCut::chunk,
                                       tile.image, 0);
        if constexpr (!turns) copy_filters(tile.n, chunk, r, to + 2 * PlanesCut::half_bytes, full);
        at.advance(p.stages);
      }
  }
}

// Adds to the middle sums those of the neighbouring pixels. edge: the other warpgroup's neighbours of this one's first
// and last pixels, of two rows each; vector: of the row, that the first pixels are.
__device__ inline void add_neighbours(float (&acc)[3][64], float const (&edge)[2], int vector, int columns) {
  int const lane = int(threadIdx.x) % 32, quad = lane % 4, before = (lane & ~3) | ((quad + 3) & 3),
            behind = (lane & ~3) | ((quad + 1) & 3);
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    bool const begins = vector == 0;
    if (++vector == columns) vector = 0;
    bool const ends = vector == 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const at = j * 4 + half * 2;
      // Lane 3 gives lane 0 what is before this vector, lane 0 lane 3 what is behind it.
      float const last = j == 0 ? 0.0f : acc[0][at - 3], next = j == 15 ? 0.0f : acc[2][at + 4];
      float low = __shfl_sync(0xffffffff, quad == 3 ? last : acc[0][at + 1], before);
      float high = __shfl_sync(0xffffffff, quad == 0 ? next : acc[2][at], behind);
      if (j == 0 && quad == 0) low = edge[half];
      if (j == 15 && quad == 3) high = edge[half];
      if (begins && quad == 0) low = 0;
      if (ends && quad == 3) high = 0;
      acc[1][at] += low + acc[2][at + 1];
      acc[1][at + 1] += acc[0][at] + high;
    }
  }
}

template <class T, bool a_rows, bool turns>
__device__ void planes_multiply(PlanesParams const& p, uint32_t ring, PlanesTables& tables) {
  constexpr int run_bytes = PlanesCut::chunk * kLineBytes;
  constexpr uint32_t step_a = a_rows ? 2 * kCoreBytes : 32, step_b = 2 * kCoreBytes;
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), warp = int(threadIdx.x) / 32,
            lane = int(threadIdx.x) % 32, quad = lane % 4;
  uint64_t const layout_b = ptx::wgmma_descriptor(0, run_bytes, kCoreBytes),
                 layout_a = a_rows ? ptx::wgmma_descriptor(0, run_bytes, kCoreBytes) : layout_of(64);
  uint32_t const kept = ring + p.stages * p.stage_bytes,
                 lines = kept + (turns ? p.steps * PlanesCut::w_bytes : 0) + warp * kPieceBytes,
                 full = warp_uniform(ptx::shared_address(tables.full)),
                 empty = warp_uniform(ptx::shared_address(tables.empty)),
                 my_b = ring + (turns ? 0 : group * PlanesCut::half_bytes),
                 my_a = (turns ? kept : ring + 2 * PlanesCut::half_bytes) + p.first_s * run_bytes;
  int const tap_a = p.step_s * run_bytes;
  Stage at;
  float acc[3][64];
  int turn = 0;
  if constexpr (turns) ptx::mbarrier_wait(&tables.kept, 0);
  int index = int(blockIdx.x);
  auto skip_tile = [&] {  // the other warpgroup's
    index += int(gridDim.x);
    at.index += p.steps;
    for (; at.index >= p.stages; at.index -= p.stages) at.parity ^= 1;
  };
  if (turns && group == 1) skip_tile();
#pragma unroll 1
  for (; index < p.tiles; index += int(gridDim.x), ++turn) {
#pragma unroll
    for (int s = 0; s < 3; ++s)
#pragma unroll
      for (int i = 0; i < 64; ++i) acc[s][i] = 0;
    int before = -1;
    uint32_t kept_a = my_a;
    // A turn begins when the other has asked for its last products.
    if (turns && (turn > 0 || group == 1)) ptx::bar_sync(1 + group, 2 * kWarpgroup);
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step) {
      ptx::mbarrier_wait(full + at.index * 8, at.parity);
      uint32_t const a = turns ? kept_a : my_a + at.index * p.stage_bytes, b = my_b + at.index * p.stage_bytes;
#pragma unroll
      for (int s = 0; s < 3; ++s) ptx::wgmma_fence_operand(acc[s]);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < PlanesCut::chunk / 16; ++k)
#pragma unroll
        for (int s = 0; s < 3; ++s)
          ptx::wgmma_mma_async<T, a_rows, true>(acc[s], at_address(layout_a, a + s * tap_a + k * step_a),
                                                at_address(layout_b, b + k * step_b));
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
#pragma unroll
      for (int s = 0; s < 3; ++s) ptx::wgmma_fence_operand(acc[s]);
      if (before >= 0 && lane == 0) ptx::mbarrier_arrive(empty + before * 8);  // the stage before has been read
      before = at.index, kept_a += PlanesCut::w_bytes;
      at.advance(p.stages);
    }
    if (turns && index + int(gridDim.x) < p.tiles) ptx::bar_arrive(2 - group, 2 * kWarpgroup);
    PlanesTile const tile(p, index);
    int const n = tile.n * 64 + warp % 4 * 16, pixel = tile.pixel + (turns ? 0 : group * 128);
    float bias[2] = {};
    if (p.bias != nullptr)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (int const row = n + lane / 4 + half * 8; row < p.N)
          bias[half] = widen(static_cast<T const*>(p.bias)[row * p.bias_stride]);
    int vector = pixel / 8;
    p.columns.divide(vector);
    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (int s = 0; s < 3; ++s) ptx::wgmma_fence_operand(acc[s]);
    if (lane == 0) ptx::mbarrier_arrive(empty + before * 8);
    float edge[2] = {};
    if constexpr (!turns) {
      int const row = warp % 4 * 16 + lane / 4, parity = turn % 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (group == 0 && quad == 3) tables.edge[parity][0][row + half * 8] = acc[0][15 * 4 + half * 2 + 1];
        if (group == 1 && quad == 0) tables.edge[parity][1][row + half * 8] = acc[2][half * 2];
      }
      ptx::bar_sync(1, 2 * kWarpgroup);
#pragma unroll
      for (int half = 0; half < 2; ++half) edge[half] = tables.edge[parity][group ^ 1][row + half * 8];
    }
    add_neighbours(acc, edge, vector, p.columns);
    if (p.bias != nullptr)
#pragma unroll
      for (int i = 0; i < 64; ++i) acc[1][i] += bias[i / 2 % 2];
    // Pixels that are stored: whole vectors.
    int const behind = tile.pixel + (turns ? 128 : 256), from = p.whole || tile.pixel == 0 ? 0 : tile.pixel + 8,
              end = p.whole || behind >= p.pixels ? p.pixels : behind - 8;
    T* const out = static_cast<T*>(p.out) + tile.image * p.out_n;
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      __syncwarp();
      stage_piece<T, 128>(acc[1], piece, lines);
      __syncwarp();
      int const first = pixel + piece * 64 + lane % 8 * 8;
      uint4 v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const line = i * 4 + lane / 8;
        v[i] = ptx::ld_shared_v4(lines + line * kLineBytes + ((lane % 8) ^ (line % 8)) * 16);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const plane = n + i * 4 + lane / 8;
        if (plane < p.N && first >= from && first < end)
          *reinterpret_cast<uint4*>(out + plane * p.out_c + first) = v[i];
      }
    }
    if constexpr (turns) skip_tile();
  }
}

// a_rows: A's rows are contiguous in memory, not its k.
template <class T, bool a_rows, bool turns>
__global__ void __launch_bounds__(kThreads, 1) planes_kernel(__grid_constant__ PlanesParams const p) {
  static_assert(PlanesCut::shared_bytes + sizeof(PlanesTables) <= 227 * 1024);
  extern __shared__ uint8_t dynamic[];
  __shared__ PlanesTables tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    for (int i = 0; i < PlanesCut::most_stages; ++i) {
      ptx::mbarrier_init(&tables.full[i], 1);
      ptx::mbarrier_init(&tables.empty[i], turns ? 4 : 8);  // warps that read a stage
    }
    ptx::mbarrier_init(&tables.kept, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();  // for filters that the kernel before has packed
  if (threadIdx.x < 2 * kWarpgroup) {
    ptx::setmaxnreg_inc<232>();
    planes_multiply<T, a_rows, turns>(p, ring, tables);
  } else {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x / 32 != 8 || !ptx::elect()) return;
    planes_copy<a_rows, turns>(p, ring, tables);
    ptx::griddepcontrol_launch_dependents();
  }
}

template <Op op, DType dtype>
cudaError_t launch_planes(Problem const& p, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool forward = op == Op::fprop;
  PlanesCut const cut(op, p);
  int64_t const C = forward ? p.C : p.K, pixels = forward ? p.H * p.W : p.P() * p.W;
  Strides const &in = forward ? p.x : p.y, &out = forward ? p.y : p.x;
  PlanesParams q{};
  q.tiles_n = Divisor(cut.tiles_n), q.tiles_image = Divisor(cut.tiles_image), q.columns = Divisor(p.W / 8);
  q.tiles = int32_t(cut.tiles), q.advance = int32_t(cut.advance), q.whole = cut.whole;
  q.chunks = int32_t(cut.chunks);
  q.taps_h = int32_t(cut.h.taps), q.steps = q.chunks * q.taps_h;
  q.first = int32_t(cut.h.lower * p.W), q.step = int32_t(cut.h.tap_stride * p.W);
  q.first_r = int32_t(cut.h.first_tap), q.step_r = int32_t(cut.h.tap_step);
  q.first_s = int32_t(cut.w.first_tap), q.step_s = int32_t(cut.w.tap_step);
  q.N = int32_t(forward ? p.K : p.C), q.pixels = int32_t(cut.pixels);
  q.stage_bytes = int32_t(cut.turns ? PlanesCut::half_bytes : 2 * PlanesCut::half_bytes + PlanesCut::w_bytes);
  q.stages = int32_t(cut.stages);
  q.out_n = out.n, q.out_c = out.c;
  q.bias = args.bias, q.bias_stride = args.bias_stride, q.out = args.out;
  Tensor4 const x{args.a, dtype, {pixels, C, p.N, 1}, {1, in.c, in.n, 0}};
  cudaError_t error = encode_tiled(q.x, x, 64, PlanesCut::chunk, 1, 1);
  if (error != cudaSuccess) return error;
  Tensor4 const filters{args.b, dtype, {p.C, p.K, p.S, p.R}, {1, p.w.n, p.w.w, p.w.h}};
  error = forward ? encode_tiled(q.w, filters, PlanesCut::chunk, 64, 3, 1, 1, 1, CU_TENSOR_MAP_SWIZZLE_64B)
                  : encode_tiled(q.w, filters, 64, PlanesCut::chunk, 3, 1);
  if (error != cudaSuccess) return error;
  void (*const kernel)(PlanesParams) = cut.turns ? planes_kernel<T, !forward, true> : planes_kernel<T, !forward, false>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, PlanesCut::shared_bytes);
  if (error != cudaSuccess) return error;
  int sm_count = 0;
  if ((error = count_sms(sm_count)) != cudaSuccess) return error;
  int64_t blocks = min64(cut.tiles, sm_count);
  if (cut.turns) blocks -= blocks % cut.tiles_n;  // a block's tiles have the same filters
  return launch_dependent(kernel, dim3(unsigned(blocks)), kThreads, PlanesCut::shared_bytes, stream, q);
}

}  // namespace conv2d_ext::tma

#define CONV2D_EXT_TMA_PLANES_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                    \
    return tma::launch_planes<Op::op, DType::dtype>(p, args, stream);          \
  }
