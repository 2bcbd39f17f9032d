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

// Shared memory: stages | filters | tables of the halves | bias.
struct Shared {
  uint32_t stage;     // address of the first
  uint32_t* weights;  // [n_group][step][shared block][lane][2]
  int64_t* from;      // [half], elements from a filter's first weight
  int* offset;        // [half], bytes from an output's first input
  int* channel;       // [half], its first channel within the unit; negative if there is no such half
  float* bias;        // [n_group * shared block][8]

  __device__ Shared(Params const& p, char* dynamic) : stage(ptx::shared_address(dynamic)) {
    weights = reinterpret_cast<uint32_t*>(dynamic + p.stages * p.stage_bytes);
    from = reinterpret_cast<int64_t*>(dynamic + p.table_offset);
    offset = reinterpret_cast<int*>(from + p.halves);
    channel = offset + p.halves;
    bias = reinterpret_cast<float*>(channel + p.halves);
  }
};

template <class T, int shared_blocks>
__device__ inline void fill_tables(Params const& p, int first_unit, int units, Shared const& s) {
  constexpr int kNone = -(1 << 30);
  for (int half = threadIdx.x; half < p.halves; half += blockDim.x) {
    int phase = 0;
    while (half >= p.phase_half[phase + 1]) ++phase;
    int const first = p.phase_tap[phase], taps = p.phase_tap[phase + 1] - first;
    int const each = p.is_3x3 ? 12 : taps;
    int const index = half - p.phase_half[phase], block = index / each, place = index % each;
    bool const exists = block < p.in_blocks && !(p.is_3x3 && place % 4 == 3);
    Tap const& tap = p.tap[exists ? first + (p.is_3x3 ? place / 4 * 3 + place % 4 : place) : 0];
    s.offset[half] = exists ? block * p.window.plane + tap.offset * kSlot : 0;
    s.channel[half] = exists ? block * kBlock : kNone;
    s.from[half] = tap.r * p.w_r + tap.s * p.w_s + block * kBlock * p.w_in;
  }
  int const blocks = p.n_groups * shared_blocks;  // of outputs, of a unit
  for (int i = threadIdx.x; i < p.bias_count; i += blockDim.x) {
    int const unit = i / (blocks * kBlock), out = i % (blocks * kBlock);
    int64_t const at = int64_t(first_unit + unit) * p.out_blocks * kBlock + out;
    bool const exists = p.bias != nullptr && unit < units && out < p.out_blocks * kBlock && at < p.out.channels;
    s.bias[i] = exists ? widen(static_cast<T const*>(p.bias)[at * p.bias_stride]) : 0;
  }
  __syncthreads();
  // A warp takes a part of the halves of one block of outputs.
  constexpr int parts = 4;
  T const* const w = static_cast<T const*>(p.w);
  int const lane = threadIdx.x % 32, share = (p.halves + parts - 1) / parts;
  for (int i = threadIdx.x / 32; i < units * blocks * parts; i += blockDim.x / 32) {
    int const block = i / parts, unit = block / blocks, j = block % shared_blocks;
    int const out = block % blocks * kBlock + lane / 4, of_group = int(p.filters.quotient(out));
    int64_t const group = int64_t(first_unit + unit) * p.groups_per_unit + of_group;
    bool const exists = of_group < p.groups_per_unit && group < p.groups;
    int const channel = lane % 4 * 2 - of_group * p.in_per_group;  // within the group, of the half's first block
    T const* const from = w + group * p.w_group + (out - of_group * p.out_per_group) * p.w_out + channel * p.w_in;
    uint32_t* const to = s.weights + (block / shared_blocks * p.halves * shared_blocks + j * 2) * 32 + lane * 2;
    int const begin = i % parts * share, end = min(begin + share, p.halves);
#pragma unroll 8
    for (int half = begin; half < end; ++half) {
      int const c = s.channel[half] + channel;
      Vector<T, 2> v;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        v.v[e] =
            exists && unsigned(c + e) < unsigned(p.in_per_group) ? from[s.from[half] + e * p.w_in] : narrow<T>(0.f);
      to[half / 2 * (shared_blocks * 64) + half % 2] = *reinterpret_cast<uint32_t const*>(&v);
    }
  }
}

// One run of output blocks, any taps: halves [begin, end) from the lane's first input on.
template <class T, int blocks>
__device__ inline void multiply_any(float (&acc)[blocks][4][4], uint32_t from, int row_bytes, int const* offset,
                                    uint32_t const* weights, int begin, int end) {
  int const lane = threadIdx.x % 32;
  from += lane / 8 % 2 * row_bytes;
#pragma unroll(blocks == 4 ? 1 : 2)
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
#pragma unroll(blocks == 1 ? 3 : 1)  // registers are short
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
  int const phase_h = phase / p.axis_w.phases, phase_w = phase % p.axis_w.phases;
  T const* const w = static_cast<T const*>(p.w);
  for (int i = lane; i < runs * shared_blocks * kBlock * kSide * kSide; i += 32) {
    int const index = i % (runs * shared_blocks * kBlock), pixel = i / (runs * shared_blocks * kBlock);
    int const n_group = item.n_group + index / (shared_blocks * kBlock), unit = n_group / p.n_groups;
    int const out = n_group % p.n_groups * shared_blocks * kBlock + index % (shared_blocks * kBlock);
    int const row = item.h + pixel / kSide, column = item.w + pixel % kSide;
    int64_t const n = tile.n + item.image;
    int64_t const h = int64_t(tile.h + row) * p.axis_h.out_step + phase_h;
    int64_t const x = int64_t(tile.w + column) * p.axis_w.out_step + phase_w;
    int64_t const channel_out = int64_t(first_unit + unit) * p.out_blocks * kBlock + out;
    if (unit >= units || out >= p.out_blocks * kBlock || channel_out >= p.out.channels) continue;
    if (n >= p.N || h >= p.out.H || x >= p.out.W) continue;
    int const group = out / p.out_per_group;
    T const* const weights =
        w + (int64_t(first_unit + unit) * p.groups_per_unit + group) * p.w_group + out % p.out_per_group * p.w_out;
    int const slot = (item.image * p.window.rows + row * p.axis_h.step) * p.window.pitch + column;
    float sum = 0;
    for (int t = p.phase_tap[phase]; t < p.phase_tap[phase + 1]; ++t)
      for (int c = 0; c < p.in_per_group; ++c) {
        int const channel = group * p.in_per_group + c;
        char const* const from = shared + stage - s.stage + (unit * p.in_blocks + channel / kBlock) * p.window.plane +
                                 (slot + p.tap[t].offset) * kSlot;
        sum += widen(reinterpret_cast<T const*>(from)[channel % kBlock]) *
               widen(weights[p.tap[t].r * p.w_r + p.tap[t].s * p.w_s + c * p.w_in]);
      }
    sum += s.bias[n_group * shared_blocks * kBlock + index % (shared_blocks * kBlock)];
    static_cast<T*>(p.out.data)[n * p.out.n + channel_out * p.out.c + h * p.out.h + x * p.out.w] = narrow<T>(sum);
  }
}

// Stores the 8 pixels of a row; `left` of them exist, whole runs of `width`.
template <class T>
__device__ inline void store_row(T* out, int64_t step, int left, int width, uint32_t const (&v)[4]) {
  if (width == 8) {
    if (left > 0) *reinterpret_cast<uint4*>(out) = make_uint4(v[0], v[1], v[2], v[3]);
  } else if (width == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (i * 4 < left) reinterpret_cast<uint2*>(out)[i] = make_uint2(v[i * 2], v[i * 2 + 1]);
  } else if (width == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i * 2 < left) reinterpret_cast<uint32_t*>(out)[i] = v[i];
  } else {
    T const* const elements = reinterpret_cast<T const*>(v);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < left) out[i * step] = elements[i];
  }
}

// Rounds and stores a warp's outputs; says whether one is NaN. Row lane / 4 of an m16 tile is the pixel
// of that column in the first of two rows of outputs, row lane / 4 + 8 that of the second.
template <class T, bool nhwc, int shared_blocks, int runs>
__device__ inline bool store(Params const& p, Tile const& tile, Item const& item, int phase, int first_unit, int units,
                             float const (&acc)[runs][shared_blocks][4][4]) {
  int const lane = threadIdx.x % 32, quad = lane % 4;
  int64_t const n = tile.n + item.image;
  int const h0 = (tile.h + item.h) * p.axis_h.out_step + phase / p.axis_w.phases;
  int const w0 = (tile.w + item.w) * p.axis_w.out_step + phase % p.axis_w.phases;
  T* const out = static_cast<T*>(p.out.data) + n * p.out.n + h0 * p.out.h + w0 * p.out.w;
  int64_t const row_step = p.axis_h.out_step * p.out.h, column_step = p.axis_w.out_step * p.out.w;
  // Outputs that exist from the first on.
  int const rows = p.out.H <= h0            ? 0
                   : p.axis_h.out_step == 1 ? p.out.H - h0
                                            : (p.out.H - h0 - 1) / p.axis_h.out_step + 1;
  int const columns = p.out.W <= w0            ? 0
                      : p.axis_w.out_step == 1 ? p.out.W - w0
                                               : (p.out.W - w0 - 1) / p.axis_w.out_step + 1;
  auto packed = [&](int r, int j, int row) {
    float const(&sums)[4] = acc[r][j][row / 2];
    return pack<T>(sums[row % 2 * 2], sums[row % 2 * 2 + 1]);
  };
  auto channel_of = [&](int r, int j) {  // negative: there is no such block
    int const n_group = item.n_group + r, unit = int(p.runs_of.quotient(n_group));
    int const block = (n_group - unit * p.n_groups) * shared_blocks + j;
    return unit < units && block < p.out_blocks ? (int64_t(first_unit + unit) * p.out_blocks + block) * kBlock : -1;
  };
  uint32_t marks = 0;
  if constexpr (nhwc) {  // a quad of lanes stores a pixel's 64 bytes, a block each
    int64_t const channel = quad < runs * shared_blocks ? channel_of(quad / shared_blocks, quad % shared_blocks) : -1;
    bool const exists = n < p.N && channel >= 0 && lane / 4 < columns;
    T* to = out + lane / 4 * column_step + channel;
#pragma unroll
    for (int row = 0; row < kSide; ++row) {
      uint32_t v[4] = {};
#pragma unroll
      for (int r = 0; r < runs; ++r)
#pragma unroll
        for (int j = 0; j < shared_blocks; ++j) {
          v[r * shared_blocks + j] = packed(r, j, row);
          if (p.mixed) marks |= nan_marks<T>(v[r * shared_blocks + j]);
        }
      transpose_quad(v);
      if (exists && row < rows) *reinterpret_cast<uint4*>(to) = make_uint4(v[0], v[1], v[2], v[3]);
      to += row_step;
    }
  } else {  // a lane stores the 8 pixels of a row, of the channel lane / 4 of a block
#pragma unroll
    for (int r = 0; r < runs; ++r)
#pragma unroll
      for (int j = 0; j < shared_blocks; ++j) {
        int64_t const first = channel_of(r, j), channel = first + lane / 4;
        if (first < 0) continue;
#pragma unroll
        for (int half = 0; half < kSide; half += 4) {
          uint32_t v[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            v[i] = packed(r, j, half + i);
            if (p.mixed) marks |= nan_marks<T>(v[i]);
            v[i] = ptx::movmatrix_trans(v[i]);
          }
          transpose_quad(v);
          if (n < p.N && channel < p.out.channels && half + quad < rows)
            store_row<T>(out + channel * p.out.c + (half + quad) * row_step, column_step, columns, p.store_width, v);
        }
      }
  }
  return (marks & 0x80008000) != 0;
}

template <class T, bool nhwc, int shared_blocks, int runs, bool is_3x3>
__global__ void __launch_bounds__(kMaxWarps * 32, 2) grouped_kernel(__grid_constant__ Params const p) {
  extern __shared__ __align__(128) char dynamic[];
  Shared const s(p, dynamic);
  int const first_unit = blockIdx.y * p.slab, units = min(p.slab, p.units - first_unit);
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int const squares = p.squares_h * p.squares_w * p.images;
  int const items = squares * ((units * p.n_groups + runs - 1) / runs);

  // With two stages the block is one tile ahead with its copies.
  Tile tile(p, blockIdx.x), next = tile;
  bool first = true;
  for (int stage = p.stages - 1; tile.number < p.tiles; stage ^= p.stages - 1) {
    if (next.number < p.tiles)
      load_inputs<T, nhwc>(p, next, first_unit, s.stage + (stage ^ (p.stages - 1)) * p.stage_bytes);
    ptx::cp_async_commit_group();
    next.advance(p);
    if (first) {
      fill_tables<T, shared_blocks>(p, first_unit, units, s);
      first = false;
      if (p.stages == 2) continue;
    }
    if (p.stages == 2)
      ptx::cp_async_wait_group<1>();
    else
      ptx::cp_async_wait_group<0>();
    __syncthreads();
    uint32_t const data = s.stage + stage * p.stage_bytes;
    for (int i = warp; i < items; i += warps) {
      int const n_item = int(p.squares_of.quotient(i)), square = i - n_item * squares;
      int const row = int(p.columns_of.quotient(square)), column = square - row * p.squares_w;
      Item const item{row / p.squares_h, row % p.squares_h * kSide, column * kSide, n_item * runs};
      int const row_bytes = p.axis_h.step * p.window.pitch * kSlot;  // from a row of outputs to the next
      uint32_t const from =
          data + item.image * p.window.rows * p.window.pitch * kSlot + item.h * row_bytes + (item.w + lane % 8) * kSlot;
      int const phases = is_3x3 ? 1 : p.axis_h.phases * p.axis_w.phases;
      for (int phase = 0; phase < phases; ++phase) {
        float acc[runs][shared_blocks][4][4];
#pragma unroll
        for (int r = 0; r < runs; ++r) {
          int const n_group = item.n_group + r, unit = int(p.runs_of.quotient(n_group));
#pragma unroll
          for (int j = 0; j < shared_blocks; ++j) {
            float2 const bias =
                reinterpret_cast<float2 const*>(s.bias)[(n_group * shared_blocks + j) * (kBlock / 2) + lane % 4];
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
              for (int e = 0; e < 4; ++e) acc[r][j][m][e] = e % 2 == 0 ? bias.x : bias.y;
          }
          if (unit >= units) continue;
          uint32_t const* const weights = s.weights + n_group * p.halves * shared_blocks * 32;
          uint32_t const plane = unit * p.in_blocks * p.window.plane;
          if constexpr (is_3x3)
            multiply_3x3<T, shared_blocks>(acc[r], from + plane, row_bytes, p.window.plane, p.in_blocks, weights);
          else
            multiply_any<T, shared_blocks>(acc[r], from + plane, row_bytes, s.offset, weights, p.phase_half[phase],
                                           p.phase_half[phase] + p.phase_count[phase]);
        }
        bool const nan = store<T, nhwc, shared_blocks, runs>(p, tile, item, phase, first_unit, units, acc);
        if (p.mixed && __any_sync(0xffffffff, nan))
          repair<T, shared_blocks, runs>(p, tile, item, phase, first_unit, units, data, s, dynamic);
      }
    }
    __syncthreads();
    tile.advance(p);
  }
}

template <class T, bool nhwc, int shared_blocks>
cudaError_t start(Params const& p, bool is_3x3, dim3 grid, unsigned threads, int64_t shared, cudaStream_t stream) {
  constexpr int runs = groups_of_warp(shared_blocks);
  auto* const kernel =
      is_3x3 ? grouped_kernel<T, nhwc, shared_blocks, runs, true> : grouped_kernel<T, nhwc, shared_blocks, runs, false>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, size_t(shared), stream>>>(p);
  return cudaGetLastError();
}

// How many neighbours of a row of outputs can be stored at once.
template <class T>
int store_width_of(Params const& p, int align) {
  Image const& out = p.out;
  if (p.axis_w.out_step != 1 || (out.W > 1 && out.w != 1)) return 1;
  for (int width = 8; width > 1; width /= 2)
    if (out.W % width == 0 && out.n % width == 0 && out.c % width == 0 && out.h % width == 0 &&
        align >= width * int(sizeof(T)))
      return width;
  return 1;
}

template <Op op, DType dtype, Variant variant>
cudaError_t launch(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  constexpr bool nhwc = variant == Variant::nhwc;
  if constexpr (op == Op::wgrad) return launch_wgrad<dtype, nhwc>(problem, plan, args, stream);
  using T = typename TypeOf<dtype>::type;
  Params p = params_of(op, problem, args);
  bool const is_3x3 = problem.stride_h == 1 && problem.stride_w == 1 && problem.dilation_h == 1 &&
                      problem.dilation_w == 1 && problem.R == 3 && problem.S == 3;
  set_halves(p, is_3x3);
  p.store_width = store_width_of<T>(p, op == Op::dgrad ? problem.x_align : problem.y_align);
  int const blocks = grouped_shared_blocks(p.out_blocks), runs = groups_of_warp(blocks);
  int64_t const shared = set_tiles(p, blocks, runs);
  int sm_count = 0, device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if ((error = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device)) != cudaSuccess) return error;
  int const slabs = int(ceil_div(p.units, p.slab));
  int64_t const resident = int64_t(sm_count) * (shared <= kSharedHalf ? 2 : 1);
  dim3 const grid(set_steps(p, resident / slabs), unsigned(slabs));
  unsigned const threads = 32 * unsigned(p.warps);
  if (blocks == 1) return start<T, nhwc, 1>(p, is_3x3, grid, threads, shared, stream);
  if (blocks == 2) return start<T, nhwc, 2>(p, is_3x3, grid, threads, shared, stream);
  if (blocks == 3) return start<T, nhwc, 3>(p, is_3x3, grid, threads, shared, stream);
  return start<T, nhwc, 4>(p, is_3x3, grid, threads, shared, stream);
}

}  // namespace conv2d_ext::grouped

#define CONV2D_EXT_GROUPED_INSTANCE(family, op, dtype, tm, tn, tk, variant)                \
  cudaError_t conv2d_ext::family##_##op##_##dtype##_##tm##x##tn##_##variant(               \
      Problem const& p, Plan const& plan, Arguments const& args, cudaStream_t stream) {    \
    return grouped::launch<Op::op, DType::dtype, Variant::variant>(p, plan, args, stream); \
  }
