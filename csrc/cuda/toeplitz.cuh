// Depthwise convolution in channels_last on tensor cores (mma.sync), float16 and bfloat16, stride 1, filters of up to 5
// rows that reach over 5 columns: along a row of the image, two channels of 4 neighbouring outputs are a window of 8
// inputs times a matrix with the taps along its diagonals, of the row of the filter and these channels:
//   out[16 blocks of 4 columns; 4 columns, 2 channels] += in[the blocks; 8 columns, 2 channels] * taps[r].
// A pixel's 8 channels, which a lane reads and writes as 16 bytes, are an operand of four such products, so nothing is
// moved or converted, and borders cost nothing: the copy engine writes the zeros.
//
// A block walks down a strip of images with a slice of the channels, row by row. A warp of its own has the rows copied
// to a ring of stages, swizzled so that eight neighbouring pixels are in different banks, and the finished rows stored,
// which go through shared memory. A warp of the others has 8 channels of 16 blocks of columns, of one image or of
// several; it multiplies each row with all rows of the filter into the sums of all outputs that meet it, while the next
// row is loaded and after what the last row completed is stored. Warps wait for no other but the first one. dgrad is
// fprop with the filter turned round; rows that a dilation sets apart are strips of their own.
//
// The zeros beside the diagonals make NaN of an infinite neighbour; a block that finds a NaN computes its outputs
// again, one product at a time.
#pragma once

#include <utility>

#include "../core/toeplitz.h"
#include "depthwise.cuh"
#include "give_back.cuh"
#include "phase_arguments.h"
#include "ptx.cuh"
#include "tma_map.h"

namespace conv2d_ext::toeplitz {

struct Params {
  CUtensorMap in, out;
  void const* in_data;
  void const* w;
  void const* bias;
  void* out_data;
  int64_t in_n, in_h, in_w, out_n, out_h, out_w;
  int64_t w_k, w_r, w_s, bias_stride;
  int N, C, in_H, in_W, out_H, out_W;
  int R, S, dilation_h, dilation_w, pad_h, pad_w;
  int channels, blocks, images, slices, tiles_w, rows;
  int units, each, skip, stages, in_bytes, in_copied, out_bytes;
};

// Rows first + i * dilation of the inputs, and h0 + i * dilation of the outputs.
struct Strip {
  int n0, w0, h0, first, rows;
};

// From row `index` of all strips on, as far as the strip and the block's turn, which ends at row `end`, reach; `index`
// and `end` move on. `columns`: of a block of columns; `above`: rows of taps that the filter does not have.
template <class Shape>
__device__ inline Strip next_strip(Shape const& p, int& index, int& end, int columns, int above) {
  uint32_t rest = uint32_t(index);
  Strip s;
  int const row = depthwise::split_off(rest, p.rows), phase = depthwise::split_off(rest, p.dilation_h);
  s.w0 = depthwise::split_off(rest, p.tiles_w) * p.blocks * columns;
  s.n0 = int(rest) * p.images;
  s.rows = p.rows - row < end - index ? p.rows - row : end - index;
  s.h0 = phase + row * p.dilation_h;
  s.first = s.h0 - p.pad_h - above * p.dilation_h;
  index += s.rows;
  if (index == end) {
    index += p.skip;
    end = p.units - index < p.each ? p.units : index + p.each;
  }
  return s;
}

template <int R>
__device__ inline Strip next_strip(Params const& p, int& index, int& end) {
  return next_strip(p, index, end, 4, R - p.R);
}

__device__ inline bool has_row(Params const& p, Strip const& s, int row) {
  return unsigned(s.first + row * p.dilation_h) < unsigned(p.in_H);
}

// Bytes from the first pixel's to where the copy engine puts 16 bytes, number `chunk`, of a pixel of `chunks` of them.
__device__ inline uint32_t swizzled(int pixel, int chunk, int chunks) {
  int const offset = (pixel * chunks + chunk) * 16;
  return uint32_t(offset ^ (offset / 128 % chunks * 16));
}

// The rows of the block's share in turn, those outside the image left out; by one thread.
template <int R>
struct Copier {
  Strip strip{};
  int index, end, row = 0, stage = 0;

  __device__ void next(Params const& p, uint64_t* full, int c0, uint32_t shared) {
    for (;; ++row) {
      if (row == strip.rows + R - 1 || strip.rows == 0) {
        if (index >= end) return;
        strip = next_strip<R>(p, index, end);
        row = 0;
      }
      if (has_row(p, strip, row)) break;
    }
    ptx::mbarrier_arrive_expect_tx(&full[stage], uint32_t(p.in_copied));
    ptx::cp_async_bulk_tensor_4d(shared + stage * p.in_bytes, &p.in, &full[stage], c0, strip.w0 - p.pad_w,
                                 strip.first + row * p.dilation_h, strip.n0);
    ++row;
    if (++stage == p.stages) stage = 0;
  }
};

// The taps of four pairs of channels as operands: lane (g, t) has inputs t and t + 4 of output g / 2, channel g % 2 of
// a pair. One half of an operand is zero, so two of them share a register.
template <class T, int R>
struct Taps {
  uint32_t words[kToeplitzPairs][R];
  uint32_t low, high;  // bytes of the operand in the low half, and in the high one

  // The bytes come of shared memory: operands that the compiler could make ahead would take all registers.
  __device__ Taps(Params const& p, int c0, uint32_t constants) {
    int const lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    int const c = c0 + g % 2, above = R - p.R;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      int const distance = t + 4 * j - g / 2, s = p.dilation_w == 1 ? distance : distance / p.dilation_w;
      bool const exists = distance >= 0 && s * p.dilation_w == distance && s < p.S;
      T const* const w = static_cast<T const*>(p.w) + c * p.w_k + s * p.w_s;
#pragma unroll
      for (int pair = 0; pair < kToeplitzPairs; ++pair) {
        bool const present = exists && c + pair * 2 < p.C;
        T const* from = w + pair * 2 * p.w_k;
#pragma unroll
        for (int row = 0; row < R; ++row) {
          uint32_t tap = 0;
          if (row >= above) {
            if (present) tap = *reinterpret_cast<uint16_t const*>(from);
            from += p.w_r;
          }
          words[pair][row] = j == 0 ? tap : words[pair][row] | tap << 16;
        }
      }
    }
    uint2 const v = ptx::ld_shared_v2(constants + g % 2 * uint32_t(sizeof(uint2)));
    low = v.x, high = v.y;
  }
  __device__ uint32_t operator()(int pair, int row, int j) const {
    return __byte_perm(words[pair][row], 0, j == 0 ? low : high);
  }
};

template <class T>
__device__ inline uint32_t pack(float low, float high) {
  Vector<T, 2> const v{{narrow<T>(low), narrow<T>(high)}};
  return *reinterpret_cast<uint32_t const*>(&v);
}

// The larger of each half; NaN if one of the two is.
template <class T>
__device__ inline uint32_t max_or_nan(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 const v = __hmax2_nan(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<uint32_t const*>(&v);
  } else {
    __nv_bfloat162 const v =
        __hmax2_nan(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
    return *reinterpret_cast<uint32_t const*>(&v);
  }
}

template <class T>
__device__ inline bool has_nan(uint32_t v) {
  Vector<T, 2> const halves = *reinterpret_cast<Vector<T, 2>*>(&v);
  float const a = widen(halves.v[0]), b = widen(halves.v[1]);
  return a != a || b != b;
}

// The block's outputs that are NaN, from global memory, product by product. `block`: columns of a block of them; `m_in`
// filters have the same input, `m_out` of them add up to an output.
template <class T, int R, int block = 4, int apart = 1, int m_in = 1, int m_out = 1>
__device__ __noinline__ void store_again(Params const& p, int index, int end, int c0, int threads) {
  int const columns = p.blocks * block, channels = p.channels / m_out;
  while (index < end) {
    Strip const strip = next_strip(p, index, end, block, R - p.R);
    for (int64_t i = threadIdx.x; i < int64_t(strip.rows) * p.images * columns * channels; i += threads) {
      int64_t rest = i / channels;
      int const c = c0 / m_out + int(i % channels), x = strip.w0 + int(rest % columns);
      rest /= columns;
      int64_t const n = strip.n0 + rest % p.images;
      int const y = strip.h0 + int(rest / p.images) * p.dilation_h;
      if (c >= p.C / m_out || x >= p.out_W || y >= p.out_H || n >= p.N) continue;
      // Spoilt outputs are NaN. Others stay: the next slice's block may store the same ones (last_slice).
      T& out = static_cast<T*>(p.out_data)[n * p.out_n + y * p.out_h + x * p.out_w + c];
      if (float const was = widen(out); was == was) continue;
      T const* const in = static_cast<T const*>(p.in_data) + n * p.in_n + c * m_out / m_in;
      T const* const w = static_cast<T const*>(p.w) + c * m_out * p.w_k;
      float sum = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
      for (int r = 0; r < p.R && sum == sum; ++r)  // a NaN stays one
        for (int s = 0; s < p.S; ++s) {
          int h = y - p.pad_h + r * p.dilation_h, v = x - p.pad_w + s * p.dilation_w;
          if constexpr (apart == 2) {
            if ((h | v) & 1) continue;  // a zero between inputs
            h >>= 1, v >>= 1;
          }
          if (unsigned(h) < unsigned(p.in_H) && unsigned(v) < unsigned(p.in_W))
            for (int j = 0; j < m_out; ++j)
              sum = fmaf(widen(in[h * p.in_h + v * p.in_w + j]), widen(w[j * p.w_k + r * p.w_r + s * p.w_s]), sum);
        }
      out = narrow<T>(sum);
    }
  }
}

// Of the stages and of the buffers of finished rows.
struct Barriers {
  uint64_t full[kToeplitzStages], empty[kToeplitzStages];
  uint64_t done[kToeplitzBuffers], free[kToeplitzBuffers];
  uint64_t stored;  // all rows

  __device__ void start(int stages, int readers) {
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], readers);
    }
    for (int i = 0; i < kToeplitzBuffers; ++i) {
      ptx::mbarrier_init(&done[i], readers);
      ptx::mbarrier_init(&free[i], 1);
    }
    ptx::mbarrier_init(&stored, 1);
    ptx::fence_mbarrier_init();
  }
};

// By the copying thread, for a group of rows of a ring that a turn does not have: both barriers go on to the next turn.
// The warps neither wait for it nor give it back: they would not wait for this thread, and where they had given it back
// before it looked whether it was free from the turn before, it would wait for ever, for the next phase of that parity.
__device__ inline void pass_turn(uint64_t* full, uint64_t* empty) {
  ptx::mbarrier_arrive(full);
#pragma unroll 1
  for (int i = 0; i < kToeplitzWarps; ++i) ptx::mbarrier_arrive(empty);
}

// Has the rows of the block's share copied, each as soon as its stage is free, and the finished ones stored.
template <int R>
__device__ inline void move_rows(Params const& p, Barriers& barriers, int begin, int end, int c0, uint32_t shared) {
  Copier<R> copier;
  copier.index = begin, copier.end = end;
  for (int i = 0; i < p.stages; ++i) copier.next(p, barriers.full, c0, shared);
  uint32_t const outputs = shared + p.stages * p.in_bytes;
  int stage = 0, buffer = 0, last = -1;
  uint32_t parity = 0, parity_out = 0;
  for (int index = begin; index < end;) {
    Strip const s = next_strip<R>(p, index, end);
    for (int row = 0; row < s.rows + R - 1; ++row) {
      if (has_row(p, s, row)) {
        ptx::mbarrier_wait(&barriers.empty[stage], parity);
        copier.next(p, barriers.full, c0, shared);
        if (++stage == p.stages) stage = 0, parity ^= 1;
      }
      if (row < R - 1) continue;
      ptx::mbarrier_wait(&barriers.done[buffer], parity_out);
      ptx::cp_async_bulk_tensor_4d_store(&p.out, outputs + buffer * p.out_bytes, c0, s.w0,
                                         s.h0 + (row - (R - 1)) * p.dilation_h, s.n0);
      ptx::cp_async_bulk_commit_group();
      ptx::cp_async_bulk_wait_group_read<1>();  // the row before has been read
      if (last >= 0) ptx::mbarrier_arrive(&barriers.free[last]);
      last = buffer;
      if (++buffer == kToeplitzBuffers) buffer = 0, parity_out ^= 1;
    }
  }
  ptx::cp_async_bulk_wait_group<0>();
}

// A warp's channels of a pixel, two a word.
template <int pairs>
struct Pixel {
  static_assert(pairs == 1 || pairs == 2 || pairs == 4);
  uint32_t v[pairs];

  __device__ void load(uint32_t shared) {
    if constexpr (pairs == 4) {
      uint4 const a = ptx::ld_shared_v4(shared);
      v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    } else if constexpr (pairs == 2) {
      uint2 const a = ptx::ld_shared_v2(shared);
      v[0] = a.x, v[1] = a.y;
    } else {
      v[0] = ptx::ld_shared(shared);
    }
  }
  __device__ void store(uint32_t shared) const {
    if constexpr (pairs == 4)
      ptx::st_shared_v4(shared, make_uint4(v[0], v[1], v[2], v[3]));
    else if constexpr (pairs == 2)
      ptx::st_shared_f32x2(shared, __uint_as_float(v[0]), __uint_as_float(v[1]));
    else
      ptx::st_shared(shared, v[0]);
  }
};

// The products of a warp; returns the larger of its outputs, or a NaN.
template <class T, int R>
__device__ inline uint32_t multiply_rows(Params const& p, Barriers& barriers, float const* biases, uint32_t constants,
                                         int begin, int end, int c0, uint32_t shared) {
  constexpr int pairs = kToeplitzPairs;
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  int const octets = p.channels / 8, octet = warp % octets;
  Taps<T, R> const taps(p, c0 + octet * 8, constants);
  int const columns = (p.blocks + 1) * 4;
  // Of blocks g and g + 8 of the warp's. Four pixels on, the swizzle has changed by `flip`.
  uint32_t const step_in = p.channels * 8, flip = octets > 1 ? p.channels : 0;
  uint32_t from[2], to[2];
  bool exists[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const block = warp / octets * 16 + g + 8 * half;
    exists[half] = block < p.blocks * p.images;
    int const image = exists[half] ? block / p.blocks : 0;
    int const column = (exists[half] ? block - image * p.blocks : 0) * 4 + t;
    from[half] = shared + swizzled(image * columns + column, octet, octets);
    to[half] = shared + p.stages * p.in_bytes + swizzled(image * p.blocks * 4 + column, octet, octets);
  }

  // What the compiler cannot know: of plain copies it makes one for each instruction that reads them.
  uint32_t const one = ptx::ld_shared(constants + 2 * uint32_t(sizeof(uint2)));
  uint32_t most = 0, parity = 0, parity_out = 1;
  float acc[R][pairs][4];
  // Barriers and bytes from the first of the stage that is loaded next and of the buffer that is stored to next, which
  // are not worked out again for each row; held: the barrier of the row that is loaded.
  uint32_t const full = uint32_t(ptx::unknown(int(ptx::shared_address(barriers.full)))), over = full + p.stages * 8;
  constexpr uint32_t empty = sizeof(barriers.full), free = sizeof(barriers.done);
  uint32_t const done = full + uint32_t(offsetof(Barriers, done)), over_out = done + free;
  uint32_t bar = full, at = 0, held = full, bar_out = done, at_out = 0;
  for (int index = begin; index < end;) {
    Strip const s = next_strip<R>(p, index, end);
    int const rows = s.rows + R - 1;
    // Rows of inputs inside the image: `count` from `lower` on.
    int const above = s.first < 0 ? -s.first : 0, below = p.in_H > s.first ? p.in_H - s.first : 0;
    int const lower = p.dilation_h == 1 ? above : (above + p.dilation_h - 1) / p.dilation_h;
    int const upper = min(p.dilation_h == 1 ? below : (below + p.dilation_h - 1) / p.dilation_h, rows);
    uint32_t const count = uint32_t(max(upper - lower, 0));
    Pixel<pairs> in[2][2];  // of the next row
    auto load = [&](int row) {
      if (uint32_t(row - lower) >= count) return;
      ptx::mbarrier_wait(bar, parity);
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) in[half][j].load(((from[half] + j * step_in) ^ (j % 2 * flip)) + at);
      held = bar;
      bar += 8, at += p.in_bytes;
      if (bar == over) bar = full, at = 0, parity ^= 1;
    };
    auto store = [&](float const(&sums)[pairs][4]) {
      Pixel<pairs> out[2];
#pragma unroll
      for (int pair = 0; pair < pairs; ++pair) {
        float2 b = make_float2(0.f, 0.f);
        if (p.bias != nullptr) b = *reinterpret_cast<float2 const*>(biases + (octet * pairs + pair) * 2);
        out[0].v[pair] = pack<T>(sums[pair][0] + b.x, sums[pair][1] + b.y);
        out[1].v[pair] = pack<T>(sums[pair][2] + b.x, sums[pair][3] + b.y);
      }
      ptx::mbarrier_wait(bar_out + free, parity_out);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!exists[half]) continue;
#pragma unroll
        for (int pair = 0; pair < pairs; ++pair) most = max_or_nan<T>(most, out[half].v[pair]);
        out[half].store(to[half] + at_out);
      }
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(bar_out);
      bar_out += 8, at_out += p.out_bytes;
      if (bar_out == over_out) bar_out = done, at_out = 0, parity_out ^= 1;
    };
    // Row u of a cycle of R rows: the sums that it completes are in place u, those of k rows on in place (u + k) % R.
    // What the row before has completed is stored first, and its place is taken.
    auto step = [&]<int u>(std::integral_constant<int, u>, int row) {
      bool const present = uint32_t(row - lower) < count;
      uint32_t words[pairs][2][2];
      if (present) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int pair = 0; pair < pairs; ++pair) words[pair][half][j] = in[half][j].v[pair] * one;
        uint32_t all = 0;
#pragma unroll
        for (int j = 0; j < 2; ++j) all |= words[pairs - 1][0][j] | words[pairs - 1][1][j];
        give_back(held + empty, all);
      }
      load(row + 1);
      auto& last = acc[(u + R - 1) % R];
      if (row >= R) store(last);
#pragma unroll
      for (int i = 0; i < pairs * 4; ++i) last[i / 4][i % 4] = 0.f;
      if (!present) return;
#pragma unroll
      for (int pair = 0; pair < pairs; ++pair) {
        auto const& v = words[pair];
#pragma unroll
        for (int k = 0; k < R; ++k)
          ptx::mma_m16n8k16<T>(acc[(u + k) % R][pair], v[0][0], v[1][0], v[0][1], v[1][1], taps(pair, R - 1 - k, 0),
                               taps(pair, R - 1 - k, 1));
      }
    };
    load(0);
#pragma unroll 1
    for (int row = 0; row <= rows; row += R)
      [&]<int... u>(std::integer_sequence<int, u...>) {
        ((row + u <= rows ? step(std::integral_constant<int, u>(), row + u) : void()), ...);
      }(std::make_integer_sequence<int, R>());
  }
  return most;
}

// Is the thread one of those that multiply? These have the registers of the copying warps.
__device__ inline bool take_role() {
  bool const multiplies = int(threadIdx.x) < 32 * kToeplitzWarps;
  if (multiplies)
    ptx::setmaxnreg_inc<kToeplitzRegisters>();
  else
    ptx::setmaxnreg_dec<kToeplitzCopyRegisters>();
  return multiplies;
}

template <class T, int R>
__global__ void __launch_bounds__(kToeplitzThreads, 1) gather(__grid_constant__ Params const p) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  __shared__ Barriers barriers;
  __shared__ float biases[kToeplitzChannels];
  __shared__ int again;
  __shared__ uint2 constants[3];
  uint32_t const shared = (ptx::shared_address(dynamic) + 1023) / 1024 * 1024;
  int const slice = int(blockIdx.x) % p.slices, share = int(blockIdx.x) / p.slices, c0 = slice * p.channels;
  int const begin = share * p.each, end = p.units - begin < p.each ? p.units : begin + p.each;
  int const readers = p.channels / 8 * ((p.blocks * p.images + 15) / 16) * 32;  // threads
  if (threadIdx.x == 0) {
    barriers.start(p.stages, readers / 32), again = 0;
    constants[0] = make_uint2(0x4410, 0x4432), constants[1] = make_uint2(0x1044, 0x3244);  // Taps' low and high
    constants[2].x = 1;
  }
  if (p.bias != nullptr && int(threadIdx.x) < p.channels)
    biases[threadIdx.x] = c0 + int(threadIdx.x) < p.C
                              ? widen(static_cast<T const*>(p.bias)[(c0 + int(threadIdx.x)) * p.bias_stride])
                              : 0.f;
  __syncthreads();
  if (!take_role()) {
    if (int(threadIdx.x) != 32 * kToeplitzWarps) return;
    move_rows<R>(p, barriers, begin, end, c0, shared);
    ptx::mbarrier_arrive(&barriers.stored);
  } else if (int(threadIdx.x) < readers) {
    uint32_t const most =
        multiply_rows<T, R>(p, barriers, biases, ptx::shared_address(constants), begin, end, c0, shared);
    if (has_nan<T>(most)) again = 1;
    ptx::bar_sync(1, readers);
    if (again == 0) return;
    ptx::mbarrier_wait(&barriers.stored, 0);
    store_again<T, R>(p, begin, end, c0, readers);
  }
}

// ---- host side

// launch(problem, args) of each phase of a dilation (toeplitz_phased), or of the problem.
template <Op op, DType dtype, class Launch>
cudaError_t launch_phases(int columns, Problem const& problem, Arguments const& args, Launch const& launch) {
  if (!toeplitz_phased(columns, problem)) return launch(problem, args);
  for (int64_t w = 0; w < problem.dilation_w; ++w)
    if (auto const error = launch(toeplitz_phase(problem, w), phase_arguments<op, dtype>(problem, args, 0, w)))
      return error;
  return cudaSuccess;
}

inline cudaError_t map_of(CUtensorMap& map, void const* data, DType dtype, Strides const& s, int64_t C, int64_t W,
                          int64_t H, int64_t N, int channels, int columns, int images) {
  CUtensorMapSwizzle const swizzle = channels == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : channels == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : channels == 16 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                      : CU_TENSOR_MAP_SWIZZLE_NONE;
  return tma::encode_tiled(map, {data, dtype, {C, W, H, N}, {1, s.w, s.h, s.n}}, channels, columns, 1, images, 1, 1,
                           swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
}

template <Op op, DType dtype, int R>
cudaError_t launch(Problem const& problem, Plan const&, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  Device gpu = h200_sxm;
  if (auto const error = count_sms(gpu.sm_count)) return error;
  ToeplitzTile const t = toeplitz_tile(op, problem, R, gpu);
  Params p{};
  depthwise::set_turned<op, T>(p, problem, args);
  p.in_data = args.a, p.out_data = args.out, p.bias = args.bias, p.N = int(problem.N);
  p.dilation_h = int(problem.dilation_h), p.dilation_w = int(problem.dilation_w);
  p.channels = t.channels, p.blocks = t.blocks, p.images = t.images;
  p.slices = int(t.slices), p.tiles_w = int(t.tiles_w), p.rows = int(t.rows);
  p.units = int(t.units), p.each = int(t.each), p.skip = int((t.shares - 1) * t.each), p.stages = t.stages;
  p.in_bytes = int(t.in_bytes), p.out_bytes = int(t.out_bytes);
  int const columns = (t.blocks + 1) * 4;
  p.in_copied = columns * t.images * t.channels * int(sizeof(T));
  if (auto const error =
          map_of(p.in, args.a, dtype, in, problem.C, p.in_W, p.in_H, problem.N, t.channels, columns, t.images))
    return error;
  if (auto const error = map_of(p.out, args.out, dtype, out, problem.C, p.out_W, p.out_H, problem.N, t.channels,
                                t.blocks * 4, t.images))
    return error;
  auto* const kernel = gather<T, R>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(t.slices * t.shares), kToeplitzThreads, size_t(t.shared_bytes), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::toeplitz
