// Grouped convolution with few channels a group, fprop and dgrad, on tensor cores: f16 and bf16, channels contiguous.
// One pass over the data: a tile of the inputs with its halo is copied to shared memory once (grouped_tile.cuh), and
// mma.sync takes its fragments from there by ldmatrix, whose rows are a pixel's 8 channels wherever the pixel lies: a
// tap of the filter is an offset.
//
// A block keeps the filters of its slab in shared memory, in the order of the fragments, and walks over tiles; the next
// tile is copied while this one is multiplied. A warp computes 8 x 8 outputs of up to 4 blocks of 8 channels as four
// m16 tiles of two rows. k is a tap and 8 channels, so an m16n8k16 does two of those.
//
// dgrad is the same with y for x: taps mirrored, and with strides one phase of the pixels after the other, all from
// the same tile of y.
//
// A unit of several groups has zero weights between them. They are exact zeros unless an input is NaN or infinite;
// a warp that finds NaN in its sums computes its outputs again, each from its own group alone.
#pragma once

#include "grouped_wgrad.cuh"

namespace conv2d_ext::grouped {

template <class T>
__device__ inline uint32_t pack(float low, float high) {
  Vector<T, 2> const v{narrow<T>(low), narrow<T>(high)};
  return *reinterpret_cast<uint32_t const*>(&v);
}

// Four lanes hold four words each; lane i gets word i of all four, in the order of the lanes.
__device__ inline void transpose_quad(uint32_t (&v)[4]) {
  bool const odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t const got = __shfl_xor_sync(0xffffffff, odd ? v[i] : v[i + 1], 1);
    (odd ? v[i] : v[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t const got = __shfl_xor_sync(0xffffffff, upper ? v[i] : v[i + 2], 2);
    (upper ? v[i] : v[i + 2]) = got;
  }
}

// Bits 15 and 31 are set if a half is NaN; other bits mean nothing.
template <class T>
__device__ inline uint32_t nan_marks(uint32_t v) {
  return (v & 0x7fff7fff) + (std::is_same_v<T, __half> ? 0x03ff03ff : 0x007f007f);
}

// Shared memory: stages | filters | bias | the offset and the tap of each half.
struct Shared {
  uint32_t stage;     // address of the first
  uint32_t* weights;  // [n_group][step][shared block][lane][2]
  float* bias;        // [n_group * shared block][8]
  int* offset;        // [half], bytes
  int* tap;           // [half], tap + kMaxTaps * input block; -1: none
};

template <class T, int shared_blocks>
__device__ inline void fill_tables(Params const& p, int first_unit, int units, Shared const& s) {
  for (int half = threadIdx.x; half < p.halves; half += blockDim.x) {
    int phase = 0;
    while (half >= p.phase_half[phase + 1]) ++phase;
    int const first = p.phase_tap[phase], taps = p.phase_tap[phase + 1] - first;
    int const each = p.is_3x3 ? 12 : taps;
    int const index = half - p.phase_half[phase], block = index / each, place = index % each;
    int const tap = p.is_3x3 ? place / 4 * 3 + place % 4 : place;
    bool const exists = block < p.in_blocks && !(p.is_3x3 && place % 4 == 3);
    s.offset[half] = exists ? block * p.plane + p.tap[first + tap].offset * kSlot : 0;
    s.tap[half] = exists ? first + tap + kMaxTaps * block : -1;
  }
  __syncthreads();
  T const* const w = static_cast<T const*>(p.w);
  int const blocks = p.n_groups * shared_blocks;  // of outputs, of a unit
  int const words = p.halves * shared_blocks * 32;
  for (int group = 0; group < units * p.n_groups; ++group) {
    int const unit = group / p.n_groups, block0 = group % p.n_groups * shared_blocks;
    int64_t const first_group = int64_t(first_unit + unit) * p.groups_per_unit;
    for (int i = threadIdx.x; i < words; i += blockDim.x) {
      // i = ((step * shared_blocks + block) * 32 + lane) * 2 + word
      int const lane = i / 2 % 32, block = i / 64 % shared_blocks, half = i / (64 * shared_blocks) * 2 + i % 2;
      int const tap = s.tap[half], out = (block0 + block) * kBlock + lane / 4;
      int const of_group = out / p.out_per_group, o = out % p.out_per_group;
      Vector<T, 2> v{narrow<T>(0.f), narrow<T>(0.f)};
      if (tap >= 0 && of_group < p.groups_per_unit) {
        Tap const& t = p.tap[tap % kMaxTaps];
        T const* const from = w + (first_group + of_group) * p.w_group + o * p.w_out + t.r * p.w_r + t.s * p.w_s;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          int const c = tap / kMaxTaps * kBlock + lane % 4 * 2 + e - of_group * p.in_per_group;
          if (unsigned(c) < unsigned(p.in_per_group)) v.v[e] = from[c * p.w_in];
        }
      }
      s.weights[group * words + i] = *reinterpret_cast<uint32_t const*>(&v);
    }
  }
  for (int i = threadIdx.x; i < p.bias_count; i += blockDim.x) {
    int const unit = i / (blocks * kBlock), out = i % (blocks * kBlock);
    bool const exists = p.bias != nullptr && unit < units && out < p.out_blocks * kBlock;
    int64_t const at = int64_t(first_unit + unit) * p.out_blocks * kBlock + out;
    s.bias[i] = exists ? widen(static_cast<T const*>(p.bias)[at * p.bias_stride]) : 0;
  }
}

// One run of output blocks, any taps: halves [begin, end) from the lane's first input on.
template <class T, int blocks>
__device__ inline void multiply_any(float (&acc)[blocks][4][4], uint32_t from, int row_bytes, int const* offset,
                                    uint32_t const* weights, int begin, int end) {
  int const lane = threadIdx.x % 32;
  from += lane / 8 % 2 * row_bytes;
#pragma unroll 2
  for (int half = begin; half + 1 < end; half += 2) {
    uint32_t const a = from + offset[half + lane / 16];
    uint2 b[blocks];
#pragma unroll
    for (int j = 0; j < blocks; ++j)
      b[j] = reinterpret_cast<uint2 const*>(weights)[(half / 2 * blocks + j) * 32 + lane];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t v[4];
      ptx::ldmatrix_x4(v, a + 2 * m * row_bytes);
#pragma unroll
      for (int j = 0; j < blocks; ++j) ptx::mma_m16n8k16<T>(acc[j][m], v[0], v[1], v[2], v[3], b[j].x, b[j].y);
    }
  }
  if ((end - begin) % 2 != 0) {
    uint32_t const a = from + offset[end - 1];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t v[2];
      ptx::ldmatrix_x2(v, a + 2 * m * row_bytes);
#pragma unroll
      for (int j = 0; j < blocks; ++j)
        ptx::mma_m16n8k8<T>(acc[j][m], v[0], v[1], weights[((end / 2 * blocks + j) * 32 + lane) * 2]);
    }
  }
}

// 3x3 taps one input apart: every row of 8 inputs is read once for each column of the filter, and serves three rows of
// outputs from registers.
template <class T, int blocks>
__device__ inline void multiply_3x3(float (&acc)[blocks][4][4], uint32_t from, int pitch_bytes, int plane,
                                    int in_blocks, uint32_t const* weights) {
  int const lane = threadIdx.x % 32;
  uint2 const* b = reinterpret_cast<uint2 const*>(weights) + lane;
  from += lane / 8 * pitch_bytes;
#pragma unroll 1
  for (int block = 0; block < in_blocks; ++block, from += plane) {
#pragma unroll 1
    for (int s = 0; s < 3; ++s, b += 2 * blocks * 32) {
      uint32_t const at = from + s * kSlot;
      uint32_t row[12];
      ptx::ldmatrix_x4(*reinterpret_cast<uint32_t (*)[4]>(row), at);
      ptx::ldmatrix_x4(*reinterpret_cast<uint32_t (*)[4]>(row + 4), at + 4 * pitch_bytes);
      ptx::ldmatrix_x2(*reinterpret_cast<uint32_t (*)[2]>(row + 8), at + 8 * pitch_bytes);
#pragma unroll
      for (int j = 0; j < blocks; ++j) {
        uint2 const two = b[j * 32];
        uint32_t const last = b[(blocks + j) * 32].x;
#pragma unroll
        for (int m = 0; m < 8; m += 2)
          ptx::mma_m16n8k16<T>(acc[j][m / 2], row[m], row[m + 1], row[m + 1], row[m + 2], two.x, two.y);
#pragma unroll
        for (int m = 0; m < 8; m += 2) ptx::mma_m16n8k8<T>(acc[j][m / 2], row[m + 2], row[m + 3], last);
      }
    }
  }
}

// What a warp works on within a block.
struct Item {
  int image, h, w;  // of its 8 x 8 outputs in the tile
  int n_group;      // its first run of output blocks
};

// Computes a warp's outputs again, one at a time, each from the channels of its group.
template <class T, int shared_blocks, int runs>
__device__ __noinline__ void repair(Params const& p, Tile const& tile, Item const& item, int phase, int first_unit,
                                    int units, uint32_t stage, Shared const& s, char const* shared) {
  __syncwarp();  // the outputs that are overwritten here have been written
  int const lane = threadIdx.x % 32;
  int const phase_h = phase / p.w_axis.phases, phase_w = phase % p.w_axis.phases;
  T const* const w = static_cast<T const*>(p.w);
  for (int i = lane; i < runs * shared_blocks * kBlock * kSide * kSide; i += 32) {
    int const index = i % (runs * shared_blocks * kBlock), pixel = i / (runs * shared_blocks * kBlock);
    int const n_group = item.n_group + index / (shared_blocks * kBlock), unit = n_group / p.n_groups;
    int const out = n_group % p.n_groups * shared_blocks * kBlock + index % (shared_blocks * kBlock);
    int const row = item.h + pixel / kSide, column = item.w + pixel % kSide;
    int64_t const n = tile.n + item.image;
    int64_t const h = int64_t(tile.h + row) * p.h.out_step + phase_h;
    int64_t const x = int64_t(tile.w + column) * p.w_axis.out_step + phase_w;
    if (unit >= units || out >= p.out_blocks * kBlock || n >= p.N || h >= p.h.out_extent || x >= p.w_axis.out_extent)
      continue;
    int const group = out / p.out_per_group;
    T const* const weights =
        w + (int64_t(first_unit + unit) * p.groups_per_unit + group) * p.w_group + out % p.out_per_group * p.w_out;
    int const slot = (item.image * p.halo_h + row * p.h.step) * p.pitch + column;
    float sum = 0;
    for (int t = p.phase_tap[phase]; t < p.phase_tap[phase + 1]; ++t)
      for (int c = 0; c < p.in_per_group; ++c) {
        int const channel = group * p.in_per_group + c;
        char const* const from = shared + stage - s.stage + (unit * p.in_blocks + channel / kBlock) * p.plane +
                                 (slot + p.tap[t].offset) * kSlot;
        sum += widen(reinterpret_cast<T const*>(from)[channel % kBlock]) *
               widen(weights[p.tap[t].r * p.w_r + p.tap[t].s * p.w_s + c * p.w_in]);
      }
    int64_t const channel = int64_t(first_unit + unit) * p.out_blocks * kBlock + out;
    sum += s.bias[n_group * shared_blocks * kBlock + index % (shared_blocks * kBlock)];
    static_cast<T*>(p.out)[n * p.out_n + h * p.out_h + x * p.out_w + channel] = narrow<T>(sum);
  }
}

template <class T, int shared_blocks, int runs, bool is_3x3>
__global__ void __launch_bounds__(kMaxWarps * 32, 2) grouped_kernel(__grid_constant__ Params const p) {
  extern __shared__ __align__(128) char dynamic[];
  Shared const s{ptx::shared_address(dynamic), reinterpret_cast<uint32_t*>(dynamic + p.stages * p.stage_bytes),
                 reinterpret_cast<float*>(dynamic + p.stages * p.stage_bytes + p.weight_bytes),
                 reinterpret_cast<int*>(dynamic + p.table_offset),
                 reinterpret_cast<int*>(dynamic + p.table_offset) + p.halves};
  int const first_unit = blockIdx.y * p.slab, units = min(p.slab, p.units - first_unit);
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int const squares = p.squares_h * p.squares_w * p.images;
  int const items = squares * ((units * p.n_groups + runs - 1) / runs);

  // With two stages the block is one tile ahead with its copies.
  int const step = gridDim.x, ahead = p.stages == 2 ? step : 0;
  int const first = int(blockIdx.x) - ahead;
  for (int index = first, stage = p.stages - 1; index < p.tiles; index += step, stage ^= p.stages - 1) {
    if (index + ahead < p.tiles)
      load_tile<T>(p, tile_of(p, index + ahead), first_unit * p.in_blocks, units * p.in_blocks,
                   s.stage + (stage ^ (p.stages - 1)) * p.stage_bytes);
    ptx::cp_async_commit_group();
    if (index == first) fill_tables<T, shared_blocks>(p, first_unit, units, s);
    if (index < 0) continue;
    if (p.stages == 2)
      ptx::cp_async_wait_group<1>();
    else
      ptx::cp_async_wait_group<0>();
    __syncthreads();
    Tile const tile = tile_of(p, index);
    uint32_t const data = s.stage + stage * p.stage_bytes;
    for (int i = warp; i < items; i += warps) {
      int const n_item = int(p.squares_of.quotient(i)), square = i - n_item * squares;
      int const row = int(p.columns_of.quotient(square)), column = square - row * p.squares_w;
      Item item;
      item.image = row / p.squares_h;
      item.h = row % p.squares_h * kSide, item.w = column * kSide;
      item.n_group = n_item * runs;
      int const pitch_bytes = p.pitch * kSlot;
      uint32_t const from =
          data + (item.image * p.halo_h + item.h * p.h.step) * pitch_bytes + (item.w + lane % 8) * kSlot;
      int const phases = is_3x3 ? 1 : p.h.phases * p.w_axis.phases;
      for (int phase = 0; phase < phases; ++phase) {
        float acc[runs][shared_blocks][4][4] = {};
#pragma unroll
        for (int r = 0; r < runs; ++r) {
          int const n_group = item.n_group + r, unit = n_group / p.n_groups;
          if (unit >= units) continue;
          uint32_t const* const weights = s.weights + n_group * p.halves * shared_blocks * 32;
          uint32_t const plane = unit * p.in_blocks * p.plane;
          if constexpr (is_3x3)
            multiply_3x3<T, shared_blocks>(acc[r], from + plane, pitch_bytes, p.plane, p.in_blocks, weights);
          else
            multiply_any<T, shared_blocks>(acc[r], from + plane, p.h.step * pitch_bytes, s.offset, weights,
                                           p.phase_half[phase], p.phase_half[phase] + p.phase_count[phase]);
        }
        // The lane stores the output block of its place in the quad.
        int const run = lane % 4 / shared_blocks, own_group = item.n_group + run;
        int const own_unit = own_group / p.n_groups;
        int const own_block = own_group % p.n_groups * shared_blocks + lane % 4 % shared_blocks;
        bool const stores = run < runs && own_unit < units && own_block < p.out_blocks;
        int64_t const channel = (int64_t(first_unit + own_unit) * p.out_blocks + own_block) * kBlock;
        // Row lane / 4 of an m16 tile's first 8 is column lane / 4 of the first row of outputs, and so on.
        int64_t const n = tile.n + item.image;
        int const h0 = (tile.h + item.h) * p.h.out_step + phase / p.w_axis.phases;
        int const w = (tile.w + item.w + lane / 4) * p.w_axis.out_step + phase % p.w_axis.phases;
        bool const exists = stores && n < p.N && w < p.w_axis.out_extent;
        T* const out = static_cast<T*>(p.out) + n * p.out_n + w * p.out_w + channel;
        uint32_t marks = 0;
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            uint32_t v[4] = {};
#pragma unroll
            for (int r = 0; r < runs; ++r)
#pragma unroll
              for (int j = 0; j < shared_blocks; ++j) {
                float2 const b = reinterpret_cast<float2 const*>(
                    s.bias)[((item.n_group + r) * shared_blocks + j) * (kBlock / 2) + lane % 4];
                v[r * shared_blocks + j] = pack<T>(acc[r][j][m][upper * 2] + b.x, acc[r][j][m][upper * 2 + 1] + b.y);
              }
            if (p.mixed) {
#pragma unroll
              for (int i = 0; i < runs * shared_blocks; ++i) marks |= nan_marks<T>(v[i]);
            }
            transpose_quad(v);
            int const h = h0 + (m * 2 + upper) * p.h.out_step;
            if (exists && h < p.h.out_extent)
              *reinterpret_cast<uint4*>(out + h * p.out_h) = make_uint4(v[0], v[1], v[2], v[3]);
          }
        if (p.mixed && __any_sync(0xffffffff, (marks & 0x80008000) != 0))
          repair<T, shared_blocks, runs>(p, tile, item, phase, first_unit, units, data, s, dynamic);
      }
    }
    __syncthreads();
  }
}

template <class T, int shared_blocks>
cudaError_t start(Params const& p, bool is_3x3, dim3 grid, unsigned threads, int64_t shared, cudaStream_t stream) {
  constexpr int runs = groups_of_warp(shared_blocks);
  auto* const kernel =
      is_3x3 ? grouped_kernel<T, shared_blocks, runs, true> : grouped_kernel<T, shared_blocks, runs, false>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, size_t(shared), stream>>>(p);
  return cudaGetLastError();
}

template <Op op, DType dtype>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  if constexpr (op == Op::wgrad) return launch_wgrad<dtype>(problem, plan, args, stream);
  using T = typename TypeOf<dtype>::type;
  Params p = params_of(op, problem, args);
  bool const is_3x3 = problem.stride_h == 1 && problem.stride_w == 1 && problem.dilation_h == 1 &&
                      problem.dilation_w == 1 && problem.R == 3 && problem.S == 3;
  set_halves(p, is_3x3);
  int const blocks = grouped_shared_blocks(p.out_blocks), runs = groups_of_warp(blocks);
  int64_t const shared = set_tiles(p, blocks, runs);
  int sm_count = 0, device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if ((error = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device)) != cudaSuccess) return error;
  int const slabs = int(ceil_div(p.units, p.slab));
  int64_t const resident = int64_t(sm_count) * (shared <= kSharedHalf ? 2 : 1);
  int64_t const wanted = max64(1, resident / slabs), each = ceil_div(p.tiles, wanted);
  dim3 const grid(unsigned(ceil_div(p.tiles, each)), unsigned(slabs));
  int const items = p.squares_h * p.squares_w * p.images * int(ceil_div(p.slab * p.n_groups, runs));
  unsigned const threads = 32 * unsigned(min64(kMaxWarps, items));
  if (blocks == 1) return start<T, 1>(p, is_3x3, grid, threads, shared, stream);
  if (blocks == 2) return start<T, 2>(p, is_3x3, grid, threads, shared, stream);
  if (blocks == 3) return start<T, 3>(p, is_3x3, grid, threads, shared, stream);
  return start<T, 4>(p, is_3x3, grid, threads, shared, stream);
}

}  // namespace conv2d_ext::grouped

#define CONV2D_EXT_GROUPED_INSTANCE(family, op, dtype, tm, tn, tk, variant)             \
  cudaError_t conv2d_ext::family##_##op##_##dtype##_##tm##x##tn##_##variant(            \
      Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) { \
    return grouped::launch<Op::op, DType::dtype>(p, plan, args, stream);                \
  }
