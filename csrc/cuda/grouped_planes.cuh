// Grouped convolution of many channels a group over NCHW, in place, fprop and dgrad of 16-bit types, on wgmma.
//
// The rows of the product are 64 filters (dgrad: channels), its columns pixels, and it sums over taps and channels. A
// tile is whole images, or whole rows of one, of 64 filters a warpgroup. For each 64 channels of a group a warp has
// the copy engine bring their pixels as they lie in memory, one run for each image (or channel); the multiplying warps
// turn them into lines, 64 channels of a pixel each, with the zeros of the padding between rows and images. A tap of
// the filter is then a distance in lines, so that every pixel is copied and turned once for all of them. With a stride
// the lines of rows and columns that leave the same remainder lie together; dgrad keeps the sums of all phases.
//
// Filters are put in the order of the steps beforehand, 64 filters of a tap and 64 channels a step, swizzled, and come
// through a ring of stages. Results are put together in shared memory as they lie in the result, without the columns
// between rows, and are one run for the copy engine there if the tile is whole images; else the warps store them.
//
// Sizes are worked out in core/planes.h. Two blocks an SM, if there is room: one turns while the other multiplies.
#pragma once

#include "../core/planes.h"
#include "dependent.cuh"
#include "fragments.cuh"
#include "launch.h"
#include "plane_filters.cuh"

namespace conv2d_ext::planes {

// A tensor of which a tile copies whole rows, or whole images, as they lie in memory.
struct Side {
  void const* data;
  int64_t image;             // elements
  int N, channels, H, W;     // channels: of a group
  int step_h, low_h;         // a tile's first row
  int rows, pixels, images;  // of an image of a tile, of a tile
  int pitch, image_bytes,
      shift;  // bytes of a channel in shared memory, of an image; what a channel begins later, in 16
  bool whole;
};

// The rows of an image that a tile copies: of group, first row of a phase and first image.
struct Rows {
  int low, first, end;  // low: the tile's first, which may be outside

  __device__ Rows(Side const& p, int h) {
    low = p.whole ? 0 : h * p.step_h + p.low_h;
    first = max(low, 0), end = p.whole ? p.H : max(first, min(low + p.rows, p.H));
  }
};

// The bytes that copy_raw brings, in a lane's share.
template <class F>
__device__ inline void each_raw(Side const& p, int group, int h, int n, int channel, int channels, F const& f) {
  int const lane = threadIdx.x % 32;
  Rows const rows(p, h);
  int64_t const plane = int64_t(p.H) * p.W * 2;
  char const* const from =
      static_cast<char const*>(p.data) + n * p.image * 2 + (int64_t(group) * p.channels + channel) * plane;
  if (p.whole) {
    for (int i = lane; i < min(p.images, p.N - n); i += 32)
      f(i * p.image_bytes, from + i * p.image * 2, uint32_t(channels * plane));
    return;
  }
  int64_t const begin = int64_t(rows.first) * p.W * 2, length = int64_t(rows.end - rows.first) * p.W * 2;
  for (int c = lane; c < channels && length > 0; c += 32) {
    int64_t const at = c * plane + begin, aligned = at & ~int64_t(15);
    f(c * p.pitch, from + aligned, uint32_t(((at + length + 15) & ~int64_t(15)) - aligned));
  }
}

// Turns what was copied into lines. A warp takes 32 pixels, or 32 pairs of them, and four slots of 8 channels each.
// line_of: bytes from `lines` on, of each pixel that is copied; negative: none.
template <int together>
__device__ inline void turn(Side const& p, uint32_t raw, uint32_t lines, int const* line_of, int h, int n, int slots,
                            int warp, int warps) {
  Rows const rows(p, h);
  int const lane = threadIdx.x % 32, W = p.W, of_image = p.rows * W;
  int const begin = (rows.first - rows.low) * W,
            end = p.whole ? min(p.images, p.N - n) * of_image : (rows.end - rows.low) * W;
  int const runs = (p.pixels + 32 * together - 1) / (32 * together);
  int const start = p.whole ? 0 : rows.first * W * 2;
  int offset[8];  // of a slot's channels, which begin like any other slot's
#pragma unroll
  for (int c = 0; c < 8; ++c) offset[c] = c * p.pitch + (p.whole ? 0 : (start + c * p.shift) & 15);
  int const even = slots + slots % 2;  // an instruction has two
  for (int unit = warp; unit < runs * 2; unit += warps) {
    int const pixel = (unit / 2 * 32 + lane) * together;
    if (pixel >= p.pixels) continue;
    bool const inside = pixel >= begin && pixel < end;
    int const swap = together == 2 ? lane / 4 % 2 : 0;
    uint32_t to[together];
#pragma unroll
    for (int i = 0; i < together; ++i) {
      int const line = line_of[pixel + (i ^ swap)];
      to[i] = line < 0 ? 0 : swizzled(lines + line);
    }
    int from = 0;
    if (inside) {
      int const image = p.images == 1 ? 0 : pixel / of_image;
      from = image * p.image_bytes + (pixel - image * of_image - begin) * 2;
    }
    // Two slots at a time, so that loads do not wait for each other.
    for (int slot = unit % 2 * 4; slot < min(unit % 2 * 4 + 4, even); slot += 2) {
      uint32_t v[2][8];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        uint32_t const at = raw + from + min(slot + k, slots - 1) * 8 * p.pitch;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          if constexpr (together == 2)
            v[k][c] = ptx::ld_shared(at + offset[c]);
          else
            v[k][c] = ptx::ld_shared_u16(at + offset[c]);
        }
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        bool const zero = !inside || slot + k >= slots;
#pragma unroll
        for (int i = 0; i < together; ++i) {
          uint32_t words[4];
#pragma unroll
          for (int j = 0; j < 4; ++j)
            words[j] = zero ? 0 : __byte_perm(v[k][j * 2], v[k][j * 2 + 1], (i ^ swap) == 0 ? 0x5410 : 0x7632);
          if (to[i] != 0)
            ptx::st_shared_v4(to[i] ^ (slot + k) * 16, make_uint4(words[0], words[1], words[2], words[3]));
        }
      }
    }
  }
}
__device__ inline void turn(Side const& p, uint32_t raw, uint32_t lines, int const* line_of, int h, int n, int slots,
                            int warp, int warps) {
  if (p.W % 2 == 0)
    turn<2>(p, raw, lines, line_of, h, n, slots, warp, warps);
  else
    turn<1>(p, raw, lines, line_of, h, n, slots, warp, warps);
}

// 64K registers: up to two warpgroups multiply, one copies.
constexpr int kPlaneThreads = 3 * kWarpgroup, kMultiplyRegs = 216, kCopyRegs = 72;
static_assert((2 * kMultiplyRegs + kCopyRegs) * kWarpgroup <= 65536, "register file");

struct Params {
  Side in;
  void* out;
  void const* bias;
  int64_t bias_stride;
  void const* filters;  // in the order of the steps
  int64_t out_image;    // elements
  int out_per_group, out_H, out_W;
  int low_w, step_w, planes_w;
  int out_step_h, out_step_w;
  int pitch, image_pitch, plane_pitch;        // lines
  int rows, images, tiles_h, tiles_m, tiles;  // rows of a phase of a tile; tiles_m: of a group
  int teams, turns;  // that turn lines of their own, and how often all of them have a tile of a group's filters
  bool whole;
  int out_rows, out_pitch, vector;                    // bytes: of a channel, of a store
  int chunks, last_slots, taps, stages, multiplying;  // multiplying: threads
  int lines_bytes, raw_bytes, ring_offset, raw_offset, out_offset, tables_offset, out_bytes;  // from the lines, first
  int phase_tap[5];
  short offset[kPlaneTaps];  // of a tap, in lines
};

// A tile of a team: its group, 64 filters of the group (or as many as there are warpgroups), first row of a phase and
// first image.
struct Tile {
  int group, m, h, n;

  __device__ Tile(Params const& p, int number, int team) {
    int const of_m = number / p.tiles_m;
    m = number - of_m * p.tiles_m, group = of_m / p.turns;
    int const place = (of_m - group * p.turns) * p.teams + team, images = place / p.tiles_h;
    h = (place - images * p.tiles_h) * p.rows, n = images * p.images;
  }
  __device__ bool exists(Params const& p) const { return n < p.in.N; }
};

struct Shared {
  uint32_t lines, raw, out, ring, dump;
  uint64_t *full_raw, *empty_raw, *full, *empty;
  int* line_of;  // of the pixels that are copied: bytes from the lines' begin, negative: none
  int* place;    // of an instruction's columns, phase by phase: bytes from a channel's begin in `out`, negative: none

  __device__ Shared(Params const& p, char* dynamic) {
    char* const begin = dynamic;
    lines = ptx::shared_address(begin);
    raw = lines + p.raw_offset, out = lines + p.out_offset, ring = lines + p.ring_offset;
    full_raw = reinterpret_cast<uint64_t*>(begin + p.tables_offset);
    empty_raw = full_raw + 2, full = full_raw + 4, empty = full + 8,
    dump = lines + p.tables_offset + 256 + threadIdx.x % 256 * 2;
    line_of = reinterpret_cast<int*>(begin + p.tables_offset + kPlaneTables),
    place = line_of + (p.in.pixels + 1) / 2 * 2;
  }
};

// Zero lines, and the tables.
__device__ inline void fill(Params const& p, Shared const& s, int columns, int phases) {
  for (uint32_t i = threadIdx.x * 16; i < uint32_t(p.teams * p.lines_bytes); i += blockDim.x * 16)
    ptx::st_shared_v4(s.lines + i, uint4{});
  for (int i = threadIdx.x; i < p.in.pixels; i += blockDim.x) {
    int const row = i / p.in.W, w = i - row * p.in.W, image = row / p.in.rows;
    int const h = row - image * p.in.rows - (p.whole ? p.in.low_h : 0), u = w - p.low_w;
    int const line_h = h / p.in.step_h, plane_h = h - line_h * p.in.step_h;
    int const line_w = u / p.step_w, plane_w = u - line_w * p.step_w;
    int const plane = plane_h * p.planes_w + plane_w;
    int const line = plane * p.plane_pitch + image * p.image_pitch + line_h * p.pitch + line_w;
    bool const exists = h >= 0 && u >= 0 && plane_w < p.planes_w && line_w < p.pitch &&
                        line_h * p.pitch < p.image_pitch && (plane + 1) * p.plane_pitch * kLineBytes <= p.lines_bytes;
    s.line_of[i] = exists ? line * kLineBytes : -1;
  }
  for (int i = threadIdx.x; i < columns * phases; i += blockDim.x) {
    int const phase = i / columns, column = i - phase * columns;
    int const image = column / p.image_pitch, in_image = column - image * p.image_pitch;
    int const row = in_image / p.pitch, w = in_image - row * p.pitch;
    int const phases_w = phases == 1 ? 1 : p.out_step_w;
    int const at_h = row * p.out_step_h + phase / phases_w, at_w = w * p.out_step_w + phase % phases_w;
    bool const exists = image < p.images && row < p.rows && at_h < p.out_rows && at_w < p.out_W;
    s.place[i] = exists ? image * 64 * p.out_pitch + (at_h * p.out_W + at_w) * 2 : -1;
  }
  ptx::fence_proxy_async();
}

// One chunk of a tile's channels. By a warp.
__device__ inline void copy_raw(Params const& p, Shared const& s, Tile const& t, int chunk, int team) {
  uint64_t* const full = s.full_raw + team;
  uint32_t const raw = s.raw + team * p.raw_bytes;
  int const slots = chunk + 1 == p.chunks ? p.last_slots : kPlaneChannels / 8;
  auto each = [&](auto const& f) { each_raw(p.in, t.group, t.h, t.n, chunk * kPlaneChannels, slots * 8, f); };
  uint32_t bytes = 0;
  each([&](int, char const*, uint32_t count) { bytes += count; });
  bytes = __reduce_add_sync(0xffffffff, bytes);
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_expect_tx(full, bytes);
  __syncwarp();
  each([&](int to, char const* from, uint32_t count) { ptx::cp_async_bulk(raw + to, from, count, full); });
}

// A warpgroup's results, from shared memory, where they lie as in the result.
template <class T>
__device__ inline void store(Params const& p, Tile const& t, uint32_t from, int first, int channels) {
  int const thread = threadIdx.x % kWarpgroup, lane = thread % 32;
  int64_t const plane = int64_t(p.out_H) * p.out_W;
  T* const to = static_cast<T*>(p.out) + t.n * p.out_image + (int64_t(t.group) * p.out_per_group + first) * plane;
  if (p.whole) {
    if (thread != 0) return;
    for (int i = 0; i < min(p.images, p.in.N - t.n); ++i)
      ptx::cp_async_bulk_store(to + i * p.out_image, from + i * 64 * p.out_pitch, uint32_t(channels * plane * 2));
    ptx::cp_async_bulk_commit_group();
    return;
  }
  int const h = t.h * p.out_step_h, bytes = min(p.out_rows, p.out_H - h) * p.out_W * 2;
  // A warp has 16 channels, whose vectors are loaded, eight at a time, before they are stored.
  auto vectors = [&](auto load) {
    using V = decltype(load(0u));
    for (int i = lane * int(sizeof(V)); i < bytes; i += 32 * int(sizeof(V)))
      for (int c = thread / 32 * 16; c < min(thread / 32 * 16 + 16, channels); c += 8) {
        V v[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = load(from + (c + k) * p.out_pitch + i);
        char* const row = reinterpret_cast<char*>(to + c * plane + int64_t(h) * p.out_W) + i;
#pragma unroll
        for (int k = 0; k < 8; ++k) *reinterpret_cast<V*>(row + k * plane * 2) = v[k];
      }
  };
  if (p.vector == 16)
    vectors([](uint32_t at) { return ptx::ld_shared_v4(at); });
  else if (p.vector == 8)
    vectors([](uint32_t at) { return ptx::ld_shared_v2(at); });
  else if (p.vector == 4)
    vectors([](uint32_t at) { return ptx::ld_shared(at); });
  else
    vectors([](uint32_t at) { return ptx::ld_shared_u16(at); });
}

template <class T, int columns, int phases>
__device__ void multiply(Params const& p, Shared const& s) {
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), groups = p.multiplying / kWarpgroup;
  int const thread = threadIdx.x % kWarpgroup, lane = threadIdx.x % 32, warp = thread / 32;
  uint32_t const out = s.out + group * p.out_bytes;
  uint64_t const layout = ptx::wgmma_descriptor(0, 16, kCoreBytes);
  int const team = p.teams == 1 ? 0 : group, members = p.teams == 1 ? groups : 1;  // warpgroups that turn together
  uint32_t const my_lines = s.lines + team * p.lines_bytes, raw = s.raw + team * p.raw_bytes;
  uint32_t const lines = my_lines / 16, ring = s.ring / 16 + (p.teams == 1 ? group : 0) * uint32_t(kPlaneStep / 16);
  uint32_t const stage_size = uint32_t(members) * uint32_t(kPlaneStep / 16);
  auto meet = [&] { ptx::bar_sync(1 + team, members * kWarpgroup); };
  Stage stage;
  uint32_t raw_parity = 0;
  float acc[phases][columns / 2];
  // Two teams multiply in turns, a chunk each; the filters come in this order.
  bool first_turn = team == 0;
  auto take_turn = [&] {
    if (p.teams == 2 && !first_turn) ptx::bar_sync(6 + team, 2 * kWarpgroup);
    first_turn = false;
  };
  auto pass_turn = [&] {
    if (p.teams == 2) ptx::bar_arrive(7 - team, 2 * kWarpgroup);
  };
  auto skip = [&] {  // the other team's steps of a chunk
    for (int i = 0; i < p.taps; ++i) stage.advance(p.stages);
  };
  for (int number = blockIdx.x; number < p.tiles; number += gridDim.x) {
    Tile const t(p, number, team);
    if (!t.exists(p)) {
      for (int chunk = 0; chunk < p.chunks; ++chunk) {
        take_turn();
        skip();
        pass_turn();
      }
      continue;
    }
    bool const other = p.teams == 2 && Tile(p, number, 1 - team).exists(p);
#pragma unroll
    for (int f = 0; f < phases; ++f)
#pragma unroll
      for (int i = 0; i < columns / 2; ++i) acc[f][i] = 0;
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      int const slots = chunk + 1 == p.chunks ? p.last_slots : kPlaneChannels / 8, count = (slots + 1) / 2;
      ptx::mbarrier_wait(s.full_raw + team, raw_parity);
      raw_parity ^= 1;
      turn(p.in, raw, my_lines, s.line_of, t.h, t.n, slots, threadIdx.x / 32 % (members * 4), members * 4);
      ptx::fence_proxy_async();
      meet();
      if (threadIdx.x % (members * kWarpgroup) == 0) ptx::mbarrier_arrive(s.empty_raw + team);
      take_turn();
      if (team == 1) skip();
      int before = -1;
      auto multiply_taps = [&](auto constant) {
        constexpr int steps = decltype(constant)::value;
#pragma unroll
        for (int f = 0; f < phases; ++f) {
          for (int tap = p.phase_tap[f]; tap < p.phase_tap[f + 1]; ++tap) {
            uint32_t const from = lines + p.offset[tap] * 8, filters = ring + stage.index * stage_size;
            ptx::mbarrier_wait(s.full + stage.index, stage.parity);
            ptx::wgmma_fence_operand(acc[f]);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < steps; ++k)
              ptx::wgmma_mma_async<T, false, false>(acc[f], layout | (filters + k * 2), layout | (from + k * 2));
            ptx::wgmma_commit_group();
            ptx::wgmma_wait_group<1>();
            ptx::wgmma_fence_operand(acc[f]);
            if (lane == 0 && before >= 0) ptx::mbarrier_arrive(s.empty + before);
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
      pass_turn();
      if (team == 0 && other) skip();
      ptx::wgmma_wait_group<0>();
#pragma unroll
      for (int f = 0; f < phases; ++f) ptx::wgmma_fence_operand(acc[f]);
      if (lane == 0 && before >= 0) ptx::mbarrier_arrive(s.empty + before);
      if (chunk + 1 < p.chunks) meet();  // all have read the lines
    }
    int const first = (t.m * members + (p.teams == 1 ? group : 0)) * 64, channels = min(64, p.out_per_group - first);
    int const row = warp * 16 + lane / 4;
    float bias[2] = {0, 0};
    if (p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (row + i * 8 < channels)
          bias[i] = widen(static_cast<T const*>(
              p.bias)[(int64_t(t.group) * p.out_per_group + first + row + i * 8) * p.bias_stride]);
    }
    if (p.whole && thread == 0) ptx::cp_async_bulk_wait_group_read<0>();  // the last tile's results have been stored
    meet();
    uint32_t const to = out + row * p.out_pitch;
#pragma unroll
    for (int f = 0; f < phases; ++f) {
      int const* const place = s.place + f * columns + lane % 4 * 2;
      constexpr int most = 8;  // places that are loaded at once
#pragma unroll
      for (int j0 = 0; j0 < columns / 8; j0 += most) {
        int2 at[most];
#pragma unroll
        for (int j = 0; j < most && j0 + j < columns / 8; ++j)
          at[j] = *reinterpret_cast<int2 const*>(place + (j0 + j) * 8);
#pragma unroll
        for (int j = 0; j < most && j0 + j < columns / 8; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            int const k = (j0 + j) * 4 + i * 2;
            uint32_t const v = pack<T>(acc[f][k] + bias[i], acc[f][k + 1] + bias[i]), row = to + i * 8 * p.out_pitch;
            ptx::st_shared_u16(at[j].x >= 0 ? row + at[j].x : s.dump, uint16_t(v));
            ptx::st_shared_u16(at[j].y >= 0 ? row + at[j].y : s.dump, uint16_t(v >> 16));
          }
      }
    }
    if (p.whole) ptx::fence_proxy_async();
    ptx::bar_sync(3 + group, kWarpgroup);
    if (channels > 0) store<T>(p, t, out, first, channels);
  }
  if (team == 0) take_turn();  // what the other has passed last
  if (p.whole && thread == 0) ptx::cp_async_bulk_wait_all();
}

template <class T, int columns, int phases>
__global__ void __launch_bounds__(kPlaneThreads, 1) planes_kernel(__grid_constant__ Params const p) {
  extern __shared__ __align__(1024) char planes[];
  Shared const s(p, planes);
  int const multiplying = p.multiplying, warp = int(threadIdx.x) / 32, copier = warp - multiplying / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.teams; ++i) {
      ptx::mbarrier_init(s.full_raw + i, 1);
      ptx::mbarrier_init(s.empty_raw + i, 1);
    }
    for (int i = 0; i < p.stages; ++i) {
      ptx::mbarrier_init(s.full + i, 1);
      ptx::mbarrier_init(s.empty + i, multiplying / 32 / p.teams);
    }
    ptx::fence_mbarrier_init();
  }
  fill(p, s, columns, phases);
  __syncthreads();
  if (copier < 0) {
    ptx::setmaxnreg_inc<kMultiplyRegs>();
    multiply<T, columns, phases>(p, s);
    return;
  }
  ptx::setmaxnreg_dec<kCopyRegs>();
  if (copier < p.teams) {
    uint32_t parity = 1;
    for (int number = blockIdx.x; number < p.tiles; number += gridDim.x) {
      Tile const t(p, number, copier);
      if (!t.exists(p)) continue;
      for (int chunk = 0; chunk < p.chunks; ++chunk, parity ^= 1) {
        ptx::mbarrier_wait(s.empty_raw + copier, parity);
        copy_raw(p, s, t, chunk, copier);
      }
    }
  } else if (copier == p.teams && threadIdx.x % 32 == 0) {
    ptx::griddepcontrol_wait();  // for the filters
    Stage stage;
    int const members = p.teams == 1 ? multiplying / kWarpgroup : 1;
    uint32_t const bytes = uint32_t(members) * uint32_t(kPlaneStep);
    for (int number = blockIdx.x; number < p.tiles; number += gridDim.x) {
      Tile const t(p, number, 0);
      bool const both = p.teams == 2 && Tile(p, number, 1).exists(p);
      int64_t const steps = int64_t(p.chunks) * p.taps, m = int64_t(t.group * p.tiles_m + t.m) * members;
      char const* const from = static_cast<char const*>(p.filters) + m * steps * kPlaneStep;
      for (int chunk = 0; chunk < p.chunks; ++chunk)
        for (int i = 0; i < p.taps * (both ? 2 : 1); ++i) {
          int const step = chunk * p.taps + (i < p.taps ? i : i - p.taps);
          ptx::mbarrier_wait(s.empty + stage.index, stage.parity ^ 1);
          ptx::mbarrier_arrive_expect_tx(s.full + stage.index, bytes);
          for (int g = 0; g < members; ++g)
            ptx::cp_async_bulk(s.ring + stage.index * bytes + g * kPlaneStep, from + (g * steps + step) * kPlaneStep,
                               kPlaneStep, s.full + stage.index);
          stage.advance(p.stages);
        }
    }
  }
}

template <class T, int columns, int phases>
cudaError_t start(Params const& p, PlaneTile const& t, int blocks, cudaStream_t stream) {
  auto* const kernel = planes_kernel<T, columns, phases>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared));
  if (error != cudaSuccess) return error;
  return launch_dependent(kernel, dim3(unsigned(blocks)), p.multiplying + kWarpgroup, int(t.shared), stream, p);
}

template <Op op, DType dtype>
cudaError_t launch(Problem const& problem, PlaneTile const& t, int sm_count, Arguments const& args,
                   cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad;
  GroupedAxis const h = grouped_axis_h(op, problem), w = grouped_axis_w(op, problem);
  Params p{};
  p.out = args.out, p.filters = args.workspace;
  p.bias = backward ? nullptr : args.bias, p.bias_stride = args.bias_stride;
  Side& in = p.in;
  in.data = args.a, in.N = int(problem.N);
  in.channels = int(backward ? problem.K_per_group() : problem.C_per_group());
  in.H = int(backward ? problem.P() : problem.H), in.W = int(backward ? problem.Q() : problem.W);
  in.image = problem.groups * in.channels * int64_t(in.H) * in.W;
  in.step_h = h.step, in.low_h = h.low, in.rows = int(t.in_rows), in.pixels = int(t.in_pixels);
  in.images = int(t.images), in.pitch = int(t.raw_pitch), in.image_bytes = int(t.raw_image);
  in.shift = int(int64_t(in.H) * in.W * 2 % 16), in.whole = t.whole;
  p.out_per_group = int(backward ? problem.C_per_group() : problem.K_per_group());
  p.out_H = int(backward ? problem.H : problem.P()), p.out_W = int(backward ? problem.W : problem.Q());
  p.out_image = problem.groups * p.out_per_group * int64_t(p.out_H) * p.out_W;
  p.low_w = w.low, p.step_w = w.step, p.planes_w = int(t.planes_w);
  p.out_step_h = h.out_step, p.out_step_w = w.out_step;
  p.pitch = int(t.pitch), p.image_pitch = int(t.image_pitch), p.plane_pitch = int(t.plane_pitch);
  p.rows = int(t.rows), p.images = int(t.images), p.whole = t.whole;
  p.tiles_h = int(ceil_div(h.positions, t.rows)), p.tiles_m = int(ceil_div(p.out_per_group, 64 * t.members()));
  p.tiles = int(t.tiles), p.teams = int(t.teams), p.multiplying = int(t.groups) * kWarpgroup;
  p.turns = int(ceil_div(p.tiles_h * ceil_div(in.N, t.images), t.teams));
  p.out_rows = int(t.out_rows), p.out_pitch = int(t.out_pitch), p.out_bytes = int(t.out_bytes);
  // What every channel and tile begins at and has is a multiple of.
  p.vector = int(gcd64(gcd64(int64_t(p.out_H) * p.out_W * 2, t.out_rows * p.out_W * 2), 16));
  p.chunks = int(ceil_div(in.channels, kPlaneChannels));
  p.last_slots = int((in.channels - (p.chunks - 1) * kPlaneChannels) / 8);
  p.stages = int(t.stages);
  // Lines | ring | raw | results | tables: what is swizzled begins at multiples of 1024 bytes.
  p.lines_bytes = int(t.lines * 128), p.raw_bytes = int(t.raw_bytes), p.ring_offset = p.teams * p.lines_bytes;
  p.raw_offset = int(p.ring_offset + t.stages * t.members() * kPlaneStep);
  p.out_offset = p.raw_offset + p.teams * p.raw_bytes, p.tables_offset = int(p.out_offset + t.groups * t.out_bytes);

  if (cudaError_t const error = prepare<op, T>(p, problem, h, w, t, args, stream)) return error;
  int const blocks = int(min64(t.tiles, sm_count));
  if (t.phases == 4) {
    if constexpr (backward) return start<T, 64, 4>(p, t, blocks, stream);
    return cudaErrorInvalidValue;
  }
  switch (t.columns) {
    case 64:
      return start<T, 64, 1>(p, t, blocks, stream);
    case 128:
      return start<T, 128, 1>(p, t, blocks, stream);
    case 192:
      return start<T, 192, 1>(p, t, blocks, stream);
    default:
      return start<T, 216, 1>(p, t, blocks, stream);
  }
}

}  // namespace conv2d_ext::planes
