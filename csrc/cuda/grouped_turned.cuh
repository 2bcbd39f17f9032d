// Grouped convolution of many channels a group over NCHW, in place, fprop and dgrad of 16-bit types and TF32, on wgmma,
// with warps of their own that turn pixels into lines.
//
// The rows of the product are 64 filters (dgrad: channels) a warpgroup, its columns pixels, and it sums over taps and
// channels. A tile is whole images, or whole rows of one. Seven warps load a tile's pixels from NCHW, 128 bytes of
// channels at a time, round floats to TF32, and store them as lines of a pixel each, with the zeros of the padding
// between rows and images. A tap of the filter is then a distance in lines, so that every pixel is loaded and turned
// once for all of them. With a stride the lines of rows and columns that leave the same remainder lie together. There
// are two buffers of lines: two warpgroups multiply one while the other is filled.
//
// The two warpgroups have 128 filters of a tile, or, if a group has few, the same 64 filters of two. Filters are put in
// the order of the steps beforehand, 64 filters of a tap and 128 bytes of channels a step, swizzled, and come through a
// ring of stages. dgrad's phases of a row lie side by side in the registers, those of a column follow each other.
// Results go from the registers to where they belong: eight pixels of eight channels an instruction.
//
// Sizes are worked out in core/turned.h.
#pragma once

#include "../core/turned.h"
#include "dependent.cuh"
#include "fragments.cuh"
#include "grouped_tile.cuh"
#include "launch.h"
#include "plane_filters.cuh"

namespace conv2d_ext::turned {

using planes::swizzled;

// 64K registers: two warpgroups multiply; of the others seven warps turn, and one has the filters copied.
constexpr int kMultiplying = 2 * kWarpgroup, kTurnedThreads = 4 * kWarpgroup, kTurningWarps = 7;
constexpr int kMultiplyRegs = 168, kTurnRegs = 88;
static_assert((2 * kMultiplyRegs + 2 * kTurnRegs) * kWarpgroup <= 65536, "register file");

struct Params {
  void const* in;
  void* out;
  void const* bias;
  int64_t bias_stride;
  void const* filters;          // in the order of the steps
  int64_t in_image, out_image;  // elements
  int N, in_per_group, in_H, in_W, out_per_group, out_H, out_W;
  int step_h, low_h, step_w, low_w, planes_h, planes_w;  // of the inputs
  int out_step_h, out_step_w, passes;
  int rows, images, in_rows, in_pixels;
  int pitch, image_pitch, plane_pitch, long_planes, lines_bytes;  // see TurnedTile; bytes of a tile's lines
  int subs, tiles_h, tiles_m, places, tiles;                      // tiles_m, places: of a group
  int chunks, last_slots, taps, stages;
  int ring_offset, tables_offset;
  int vector;  // results that are stored together
  bool whole;
  int phase_tap[kTurnedPhases + 1];
  short offset[kPlaneTaps];  // of a tap, in lines
};

// A tile of a warpgroup: its group, filters, first row of a phase and first image.
struct Tile {
  int group, m, h, n;

  __device__ Tile(Params const& p, int number, int sub) {
    int const of_m = number / p.tiles_m;
    m = number - of_m * p.tiles_m, group = of_m / p.places;
    int const place = (of_m - group * p.places) * p.subs + sub, images = place / p.tiles_h;
    h = (place - images * p.tiles_h) * p.rows, n = images * p.images;
  }
  __device__ bool exists(Params const& p) const { return n < p.N; }
};

// Shared memory: buffers of lines | ring of filters | barriers | tables.
struct Shared {
  uint32_t lines, ring;
  uint64_t *full_lines, *empty_lines, *full, *empty;
  int* line_of;  // of the pixels that are loaded: bytes from the lines' begin, negative: none
  int* place;    // of a pass's, a phase's columns: elements from a channel's first of the tile, negative: none

  __device__ Shared(Params const& p, char* dynamic) {
    lines = ptx::shared_address(dynamic), ring = lines + p.ring_offset;
    full_lines = reinterpret_cast<uint64_t*>(dynamic + p.tables_offset);
    empty_lines = full_lines + kTurnedBuffers, full = empty_lines + kTurnedBuffers, empty = full + kTurnedStages;
    line_of = reinterpret_cast<int*>(dynamic + p.tables_offset + kTurnedBarriers);
    place = line_of + (p.in_pixels + 1) / 2 * 2;
  }
};
static_assert((kTurnedBuffers + kTurnedStages) * 2 * 8 <= kTurnedBarriers);

// Zero lines, and the tables.
__device__ inline void fill(Params const& p, Shared const& s, int columns, int phases) {
  for (uint32_t i = threadIdx.x * 16; i < uint32_t(kTurnedBuffers * p.subs * p.lines_bytes); i += kTurnedThreads * 16)
    ptx::st_shared_v4(s.lines + i, uint4{});
  auto begin_of = [&](int plane) { return plane * p.plane_pitch - max(plane - p.long_planes, 0) * p.pitch; };
  for (int i = threadIdx.x; i < p.in_pixels; i += kTurnedThreads) {
    int const row = i / p.in_W, w = i - row * p.in_W, image = row / p.in_rows;
    int const h = row - image * p.in_rows - (p.whole ? p.low_h : 0), u = w - p.low_w;
    int const line_h = h / p.step_h, plane_h = h - line_h * p.step_h;
    int const line_w = u / p.step_w, plane_w = u - line_w * p.step_w;
    int const plane = plane_h * p.planes_w + plane_w;
    int const line = begin_of(plane) + image * p.image_pitch + line_h * p.pitch + line_w;
    bool const exists = h >= 0 && u >= 0 && plane_h < p.planes_h && plane_w < p.planes_w && line_w < p.pitch &&
                        line_h * p.pitch < p.image_pitch && line < begin_of(plane + 1);
    s.line_of[i] = exists ? line * kLineBytes : -1;
  }
  for (int i = threadIdx.x; i < columns * phases * p.passes; i += kTurnedThreads) {
    int const of_phase = i / columns, column = i - of_phase * columns, pass = of_phase / phases;
    int const image = column / p.image_pitch, in_image = column - image * p.image_pitch;
    int const row = in_image / p.pitch, w = in_image - row * p.pitch;
    int const at_h = row * p.out_step_h + pass, at_w = w * p.out_step_w + of_phase - pass * phases;
    bool const exists = image < p.images && row < p.rows && at_w < p.out_W && (!p.whole || at_h < p.out_H);
    s.place[i] = exists ? int(image * p.out_image) + at_h * p.out_W + at_w : -1;
  }
  ptx::fence_proxy_async();
}

// What is loaded at once of a channel: one or two pixels.
template <class T, int together>
struct Loaded;
template <>
struct Loaded<float, 1> {
  using type = uint32_t;
};
template <>
struct Loaded<float, 2> {
  using type = uint2;
};
template <class T>
struct Loaded<T, 1> {
  using type = uint16_t;
};
template <class T>
struct Loaded<T, 2> {
  using type = uint32_t;
};

__device__ inline uint32_t to_tf32(uint32_t v) { return ptx::cvt_rn_tf32(__uint_as_float(v)); }

// 16 bytes of channels of pixel i of those that were loaded together.
template <class T, int together>
__device__ inline uint4 slot_of(typename Loaded<T, together>::type const* v, int i) {
  if constexpr (sizeof(T) == 4 && together == 2)
    return i == 0 ? make_uint4(to_tf32(v[0].x), to_tf32(v[1].x), to_tf32(v[2].x), to_tf32(v[3].x))
                  : make_uint4(to_tf32(v[0].y), to_tf32(v[1].y), to_tf32(v[2].y), to_tf32(v[3].y));
  else if constexpr (sizeof(T) == 4)
    return make_uint4(to_tf32(v[0]), to_tf32(v[1]), to_tf32(v[2]), to_tf32(v[3]));
  else {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = __byte_perm(v[j * 2], v[j * 2 + 1], i == 0 ? 0x5410 : 0x7632);
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Loads a chunk of a tile's channels and stores it as lines. By a warp, its share.
template <class T, int together>
__device__ inline void turn(Params const& p, Tile const& t, uint32_t lines, int const* line_of, int chunk, int warp) {
  using V = typename Loaded<T, together>::type;
  constexpr int of_slot = 16 / int(sizeof(T)), all = 8;
  constexpr int at_once = sizeof(V) == 4 && sizeof(T) == 4 ? 8 : 4, parts = all / at_once;  // slots; 32 registers
  int const slots = chunk + 1 == p.chunks ? p.last_slots : all, even = slots + slots % 2;   // an instruction has two
  int const low = p.whole ? 0 : t.h * p.step_h + p.low_h, first = max(low, 0);
  int const end_h = p.whole ? p.in_H : max(first, min(low + p.in_rows, p.in_H)), of_image = p.in_rows * p.in_W;
  int const begin = (first - low) * p.in_W,
            end = p.whole ? min(p.images, p.N - t.n) * of_image : (end_h - low) * p.in_W;
  int64_t const plane = int64_t(p.in_H) * p.in_W;
  T const* const from = static_cast<T const*>(p.in) + t.n * p.in_image +
                        (int64_t(t.group) * p.in_per_group + chunk * (all * of_slot)) * plane + first * p.in_W;
  int const runs = p.in_pixels / together, lane = threadIdx.x % 32;
  for (int i = warp * 32 + lane; i < runs * parts; i += kTurningWarps * 32) {
    int const part = parts > 1 && i >= runs ? 1 : 0, pixel = (i - part * runs) * together, slot = part * at_once;
    bool const inside = pixel >= begin && pixel < end;
    int const swap = together == 2 ? lane / 4 % 2 : 0;
    uint32_t to[together];
#pragma unroll
    for (int e = 0; e < together; ++e) {
      int const line = line_of[pixel + (e ^ swap)];
      to[e] = line < 0 ? 0 : swizzled(lines + line) ^ slot * 16;
    }
    int const image = p.images == 1 ? 0 : pixel / of_image;
    T const* at = from + image * p.in_image + (pixel - image * of_image - begin) + slot * of_slot * plane;
    int const next = ptx::unknown(p.in_H * p.in_W);  // or 32 multiples of it are kept
    V v[at_once][of_slot];
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      bool const exists = inside && slot + k < slots;
#pragma unroll
      for (int c = 0; c < of_slot; ++c) {
        v[k][c] = exists ? __ldg(reinterpret_cast<V const*>(at)) : V{};
        at += next;
      }
    }
#pragma unroll
    for (int e = 0; e < together; ++e)
#pragma unroll
      for (int k = 0; k < at_once; ++k)
        if (to[e] != 0 && slot + k < even) {
          uint4 const low_one = slot_of<T, together>(v[k], 0);
          if constexpr (together == 1) {
            ptx::st_shared_v4(to[e] ^ k * 16, low_one);
          } else {
            uint4 const high_one = slot_of<T, together>(v[k], 1);
            bool const high = (e ^ swap) != 0;
            ptx::st_shared_v4(to[e] ^ k * 16, make_uint4(high ? high_one.x : low_one.x, high ? high_one.y : low_one.y,
                                                         high ? high_one.z : low_one.z, high ? high_one.w : low_one.w));
          }
        }
  }
}

// The turning warps' tiles, a pass and a chunk after the other.
template <class T>
__device__ void turn_tiles(Params const& p, Shared const& s, int phases, int warp) {
  Stage buffer;
  for (int number = blockIdx.x; number < p.tiles; number += gridDim.x)
    for (int pass = 0; pass < p.passes; ++pass) {
      if (p.phase_tap[pass * phases] == p.phase_tap[(pass + 1) * phases]) continue;
      for (int chunk = 0; chunk < p.chunks; ++chunk) {
        ptx::mbarrier_wait(s.empty_lines + buffer.index, buffer.parity ^ 1);
        for (int sub = 0; sub < p.subs; ++sub) {
          Tile const t(p, number, sub);
          uint32_t const lines = s.lines + (buffer.index * p.subs + sub) * p.lines_bytes;
          if (!t.exists(p)) continue;
          if (p.in_W % 2 == 0)
            turn<T, 2>(p, t, lines, s.line_of, chunk, warp);
          else
            turn<T, 1>(p, t, lines, s.line_of, chunk, warp);
        }
        ptx::fence_proxy_async();
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(s.full_lines + buffer.index);
        buffer.advance(kTurnedBuffers);
      }
    }
}

// By one thread.
__device__ inline void copy_filters(Params const& p, Shared const& s, int phases) {
  ptx::griddepcontrol_wait();
  Stage stage;
  int const members = 2 / p.subs;
  uint32_t const bytes = uint32_t(members) * uint32_t(kPlaneStep);
  for (int number = blockIdx.x; number < p.tiles; number += gridDim.x) {
    Tile const t(p, number, 0);
    int64_t const steps = int64_t(p.chunks) * p.taps, m = int64_t(t.group * p.tiles_m + t.m) * members;
    char const* const from = static_cast<char const*>(p.filters) + m * steps * kPlaneStep;
    for (int pass = 0; pass < p.passes; ++pass)
      for (int chunk = 0; chunk < p.chunks; ++chunk)
        for (int tap = p.phase_tap[pass * phases]; tap < p.phase_tap[(pass + 1) * phases]; ++tap) {
          int const step = chunk * p.taps + tap;
          ptx::mbarrier_wait(s.empty + stage.index, stage.parity ^ 1);
          ptx::mbarrier_arrive_expect_tx(s.full + stage.index, bytes);
          for (int g = 0; g < members; ++g)
            ptx::cp_async_bulk(s.ring + stage.index * bytes + g * kPlaneStep, from + (g * steps + step) * kPlaneStep,
                               kPlaneStep, s.full + stage.index);
          stage.advance(p.stages);
        }
  }
}

// 224 and 256 columns are two instructions'.
template <class T, int count>
__device__ inline void multiply_step(float (&acc)[count], uint64_t a, uint64_t b) {
  if constexpr (count > 96) {
    constexpr int most = count - 32;
    ptx::wgmma_mma_async<T, false, false>(reinterpret_cast<float (&)[most]>(acc[0]), a, b);
    ptx::wgmma_mma_async<T, false, false>(reinterpret_cast<float (&)[32]>(acc[most]), a,
                                          b + most * 2 * (kLineBytes / 16));
  } else {
    ptx::wgmma_mma_async<T, false, false>(acc, a, b);
  }
}

template <class T, int count>
__device__ inline void store_vector(T* to, float const (&v)[count]) {
  Vector<T, count> w;
#pragma unroll
  for (int i = 0; i < count; ++i) w.v[i] = narrow<T>(v[i]);
  *reinterpret_cast<Vector<T, count>*>(to) = w;
}

// A pass's results: of a thread, two channels and pairs of columns.
template <class T, int columns, int phases>
__device__ inline void store(Params const& p, Shared const& s, Tile const& t, int first, int pass,
                             float const (&acc)[phases][columns / 2]) {
  int const lane = threadIdx.x % 32, row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
  int64_t const plane = int64_t(p.out_H) * p.out_W;
  int64_t const left = p.whole ? (p.N - t.n) * p.out_image : int64_t(p.out_H - t.h * p.out_step_h) * p.out_W;
  uint32_t const limit = uint32_t(min(left, int64_t(INT32_MAX)));
  int const* const place = s.place + pass * phases * columns + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int const channel = first + row + i * 8;
    if (channel >= p.out_per_group) continue;
    int64_t const of_all = int64_t(t.group) * p.out_per_group + channel;
    float const bias = p.bias == nullptr ? 0.f : widen(static_cast<T const*>(p.bias)[of_all * p.bias_stride]);
    T* const to = static_cast<T*>(p.out) + t.n * p.out_image + of_all * plane + int64_t(t.h) * p.out_step_h * p.out_W;
    auto each = [&](auto const& f) {
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) f(j, *reinterpret_cast<int2 const*>(place + j * 8));
    };
    if (p.vector == 2 * phases) {
      each([&](int j, int2 at) {
        float v[2 * phases];
#pragma unroll
        for (int e = 0; e < 2 * phases; ++e) v[e] = acc[e % phases][j * 4 + i * 2 + e / phases] + bias;
        if (uint32_t(at.x) < limit) store_vector<T>(to + at.x, v);
      });
    } else if (phases == 2 && p.vector == 2) {
      each([&](int j, int2 at) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          int const k = j * 4 + i * 2 + e, to_e = e == 0 ? at.x : at.y;
          float const v[2] = {acc[0][k] + bias, acc[phases - 1][k] + bias};
          if (uint32_t(to_e) < limit) store_vector<T>(to + to_e, v);
        }
      });
    } else {
#pragma unroll
      for (int f = 0; f < phases; ++f)
#pragma unroll
        for (int j = 0; j < columns / 8; ++j) {
          int2 const at = *reinterpret_cast<int2 const*>(place + f * columns + j * 8);
          int const k = j * 4 + i * 2;
          if (uint32_t(at.x) < limit) to[at.x] = narrow<T>(acc[f][k] + bias);
          if (uint32_t(at.y) < limit) to[at.y] = narrow<T>(acc[f][k + 1] + bias);
        }
    }
  }
}

template <class T, int columns, int phases>
__device__ void multiply(Params const& p, Shared const& s) {
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = threadIdx.x % 32;
  int const sub = p.subs == 2 ? group : 0, member = p.subs == 2 ? 0 : group, members = 2 / p.subs;
  uint64_t const layout = ptx::wgmma_descriptor(0, 16, kCoreBytes);
  uint32_t const ring = (s.ring + member * uint32_t(kPlaneStep)) / 16;
  uint32_t const stage_size = uint32_t(members) * uint32_t(kPlaneStep / 16);
  Stage stage, buffer;
  float acc[phases][columns / 2];
  for (int number = blockIdx.x; number < p.tiles; number += gridDim.x) {
    Tile const t(p, number, sub);
    for (int pass = 0; pass < p.passes; ++pass) {
#pragma unroll
      for (int f = 0; f < phases; ++f)
#pragma unroll
        for (int i = 0; i < columns / 2; ++i) acc[f][i] = 0;
      int before = -1, lines_before = -1;  // a stage and a buffer whose products have begun
      auto pass_on = [&] {
        if (lane == 0 && before >= 0) ptx::mbarrier_arrive(s.empty + before);
        if (lane == 0 && lines_before >= 0) ptx::mbarrier_arrive(s.empty_lines + lines_before);
        lines_before = -1;
      };
      bool const some = p.phase_tap[pass * phases] != p.phase_tap[(pass + 1) * phases];
      for (int chunk = 0; some && chunk < p.chunks; ++chunk) {
        int const slots = chunk + 1 == p.chunks ? p.last_slots : 8, count = (slots + 1) / 2;
        uint32_t const lines = (s.lines + (buffer.index * p.subs + sub) * p.lines_bytes) / 16;
        ptx::mbarrier_wait(s.full_lines + buffer.index, buffer.parity);
        auto multiply_taps = [&](auto constant) {
          constexpr int steps = decltype(constant)::value;
#pragma unroll
          for (int f = 0; f < phases; ++f) {
            for (int tap = p.phase_tap[pass * phases + f]; tap < p.phase_tap[pass * phases + f + 1]; ++tap) {
              uint32_t const from = lines + p.offset[tap] * 8, filters = ring + stage.index * stage_size;
              ptx::mbarrier_wait(s.full + stage.index, stage.parity);
              ptx::wgmma_fence_operand(acc[f]);
              ptx::wgmma_fence();
#pragma unroll
              for (int k = 0; k < steps; ++k)
                multiply_step<T>(acc[f], layout | (filters + k * 2), layout | (from + k * 2));
              ptx::wgmma_commit_group();
              ptx::wgmma_wait_group<1>();
              ptx::wgmma_fence_operand(acc[f]);
              pass_on();
              before = stage.index;
              stage.advance(p.stages);
            }
          }
        };
        switch (count) {
          case 1:
            multiply_taps(std::integral_constant<int, 1>{});
            break;
          case 2:
            multiply_taps(std::integral_constant<int, 2>{});
            break;
          case 3:
            multiply_taps(std::integral_constant<int, 3>{});
            break;
          default:
            multiply_taps(std::integral_constant<int, 4>{});
        }
        lines_before = buffer.index;
        buffer.advance(kTurnedBuffers);
      }
      ptx::wgmma_wait_group<0>();
#pragma unroll
      for (int f = 0; f < phases; ++f) ptx::wgmma_fence_operand(acc[f]);
      pass_on();
      if (t.exists(p)) store<T, columns, phases>(p, s, t, (t.m * members + member) * 64, pass, acc);
    }
  }
}

template <class T, int columns, int phases>
__global__ void __launch_bounds__(kTurnedThreads, 1) turned_kernel(__grid_constant__ Params const p) {
  extern __shared__ __align__(1024) char turned[];
  Shared const s(p, turned);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kTurnedBuffers; ++i) {
      ptx::mbarrier_init(s.full_lines + i, kTurningWarps);
      ptx::mbarrier_init(s.empty_lines + i, kMultiplying / 32);
    }
    for (int i = 0; i < p.stages; ++i) {
      ptx::mbarrier_init(s.full + i, 1);
      ptx::mbarrier_init(s.empty + i, kMultiplying / 32);
    }
    ptx::fence_mbarrier_init();
  }
  fill(p, s, columns, phases);
  __syncthreads();
  if (threadIdx.x < kMultiplying) {
    ptx::setmaxnreg_inc<kMultiplyRegs>();
    multiply<T, columns, phases>(p, s);
    return;
  }
  ptx::setmaxnreg_dec<kTurnRegs>();
  int const warp = (int(threadIdx.x) - kMultiplying) / 32;
  if (warp < kTurningWarps)
    turn_tiles<T>(p, s, phases, warp);
  else if (threadIdx.x % 32 == 0)
    copy_filters(p, s, phases);
}

template <class T, int columns, int phases>
cudaError_t start(Params const& p, TurnedTile const& t, int blocks, cudaStream_t stream) {
  auto* const kernel = turned_kernel<T, columns, phases>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared));
  if (error != cudaSuccess) return error;
  return launch_dependent(kernel, dim3(unsigned(blocks)), kTurnedThreads, int(t.shared), stream, p);
}

template <Op op, DType dtype>
cudaError_t launch(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad;
  int sm_count = 0;
  if (cudaError_t const error = count_sms(sm_count)) return error;
  TurnedTile const t = turned_tile(op, problem, Device{sm_count, 90});
  GroupedAxis const h = grouped_axis_h(op, problem), w = grouped_axis_w(op, problem);
  Params p{};
  p.in = args.a, p.out = args.out, p.filters = args.workspace;
  p.bias = backward ? nullptr : args.bias, p.bias_stride = args.bias_stride;
  p.N = int(problem.N);
  p.in_per_group = int(backward ? problem.K_per_group() : problem.C_per_group());
  p.in_H = int(backward ? problem.P() : problem.H), p.in_W = int(backward ? problem.Q() : problem.W);
  p.in_image = problem.groups * p.in_per_group * int64_t(p.in_H) * p.in_W;
  p.out_per_group = int(backward ? problem.C_per_group() : problem.K_per_group());
  p.out_H = int(backward ? problem.H : problem.P()), p.out_W = int(backward ? problem.W : problem.Q());
  p.out_image = problem.groups * p.out_per_group * int64_t(p.out_H) * p.out_W;
  p.step_h = h.step, p.low_h = h.low, p.step_w = w.step, p.low_w = w.low;
  p.planes_h = int(t.planes_h), p.planes_w = int(t.planes_w), p.long_planes = int(t.long_planes);
  p.out_step_h = h.out_step, p.out_step_w = w.out_step, p.passes = t.passes;
  p.rows = int(t.rows), p.images = int(t.images), p.whole = t.whole;
  p.in_rows = int(t.in_rows), p.in_pixels = int(t.in_pixels);
  p.pitch = int(t.pitch), p.image_pitch = int(t.image_pitch), p.plane_pitch = int(t.plane_pitch);
  p.lines_bytes = int(t.lines * kTurnedLine), p.subs = t.subs;
  p.tiles_h = int(ceil_div(h.positions, t.rows)), p.tiles_m = int(ceil_div(p.out_per_group, 64 * t.members()));
  p.places = int(ceil_div(p.tiles_h * ceil_div(problem.N, t.images), t.subs)), p.tiles = int(t.tiles);
  int const line = int(turned_line(dtype)), of_slot = line / 8;
  p.chunks = int(ceil_div(p.in_per_group, line));
  p.last_slots = int((p.in_per_group - (p.chunks - 1) * line) / of_slot);
  p.stages = int(t.stages);
  p.ring_offset = kTurnedBuffers * t.subs * p.lines_bytes;
  p.tables_offset = int(p.ring_offset + t.stages * t.members() * kPlaneStep);
  p.vector = p.out_W % (2 * t.phases_w) == 0 ? 2 * t.phases_w : p.out_W % 2 == 0 && t.phases_w == 2 ? 2 : 1;

  if (cudaError_t const error = planes::prepare<op, T>(p, problem, h, w, t, args, stream)) return error;
  int const blocks = int(min64(t.tiles, sm_count));
  if (t.phases_w == 2) {
    if constexpr (backward && sizeof(T) == 4)
      if (t.columns == 64) return start<T, 64, 2>(p, t, blocks, stream);
    if constexpr (backward) return start<T, kTurnedSingle, 2>(p, t, blocks, stream);
    return cudaErrorInvalidValue;
  }
  if constexpr (sizeof(T) == 4) {
    if (t.columns == 64) return start<T, 64, 1>(p, t, blocks, stream);
    if (t.columns == 192) return start<T, 192, 1>(p, t, blocks, stream);
    if (t.columns == 224) return start<T, 224, 1>(p, t, blocks, stream);
    if (t.columns == 256) return start<T, 256, 1>(p, t, blocks, stream);
  }
  return start<T, kTurnedSingle, 1>(p, t, blocks, stream);
}

}  // namespace conv2d_ext::turned

#define CONV2D_EXT_GROUPED_TURNED_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                        \
    return turned::launch<Op::op, DType::dtype>(p, args, stream);                  \
  }
