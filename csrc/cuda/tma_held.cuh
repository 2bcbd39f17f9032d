// dgrad of 3x3 filters with a stride of two, 16-bit types, of up to 128 filters: a block's filters stay in registers,
// as the first operand of its instructions, for all of its tiles.
//   x[2i + a, 2j + b, c] = sum over taps (u, v) and k of w[k, r(a, u), s(b, v), c] * y[i + u, j + v, k]
//
// A block has 64 channels, the rows of its instructions; their columns are a rectangle of pixels of y. Along an axis
// one phase of the stride has two taps and the other one, so of the four phases one has four taps, two have two and one
// has one. The first warpgroup takes the phases of one and of four taps, the second those of two: either holds four
// taps; the filters of the phase of one tap are in shared memory. A slot of the ring has 64 of y's channels at one
// column of taps: the second row of taps begins a row of pixels later. The copy engine stores a phase's pixels as a
// rectangle, so a warpgroup goes on while its results are on their way.
#pragma once

#include "../core/tma_held.h"
#include "give_back.cuh"
#include "tma_wgrad.cuh"

namespace conv2d_ext::tma {

struct HeldParams {
  CUtensorMap y, w, x[4];      // x: of a phase, 2 a + b
  Divisor columns, rows;       // tiles of an image
  int32_t tiles, blocks;       // of 64 channels
  int32_t width, height;       // pixels of a tile
  int32_t h0, w0;              // of y, at the first tap of the first pixel
  int32_t single_h, single_w;  // u, v of the phases that have one
  int32_t r[2][4], s[2][4];    // of the taps that a warpgroup holds
  int32_t single_r, single_s;  // of the tap in shared memory
  int32_t phase[2][2];         // of each warpgroup, in their order
  int32_t lines_bytes, slot_bytes, stages;
};

struct HeldTables {
  uint64_t full[kMaxStages], empty[kMaxStages], filters;
};

template <int pixels>
struct HeldShape {
  static constexpr int staging_bytes = pixels * kLineBytes, filters_bytes = 2 * kRunBytes;
  static constexpr int ring_bytes = (224 * 1024 - 2 * staging_bytes - filters_bytes) / 1024 * 1024;
  static constexpr int shared_bytes = ring_bytes + filters_bytes + 2 * staging_bytes + 1024;
  // 64K registers: two warpgroups that multiply, one that copies.
  static constexpr int copy_regs = 24, multiply_regs = 240;
};

// Where a tile begins.
struct HeldTile {
  int32_t n, i, j;

  template <class Params>
  __device__ HeldTile(Params const& p, int tile) {
    j = tile, i = p.columns.divide(j), n = p.rows.divide(i);
    i *= p.height, j *= p.width;
  }
};

// Filters come by the ring, too, before all tiles: of either warpgroup 64 of y's channels of a tap.
template <int chunks>
__device__ void held_copy(HeldParams const& p, uint32_t ring, uint32_t filters, HeldTables& tables, int c, int tile) {
  Stage at;
  auto next = [&](int bytes) {
    ptx::mbarrier_wait(&tables.empty[at.index], at.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(&tables.full[at.index], bytes);
  };
  for (int tap = 0; tap < 4; ++tap)
    for (int chunk = 0; chunk < chunks; ++chunk, at.advance(p.stages)) {
      next(2 * kRunBytes);
      for (int group = 0; group < 2; ++group)
        ptx::cp_async_bulk_tensor_5d(ring + at.index * p.slot_bytes + group * kRunBytes, &p.w, &tables.full[at.index],
                                     c, p.s[group][tap], p.r[group][tap], chunk * 64, 0);
    }
  ptx::mbarrier_arrive_expect_tx(&tables.filters, chunks * kRunBytes);
  for (int chunk = 0; chunk < chunks; ++chunk)
    ptx::cp_async_bulk_tensor_5d(filters + chunk * kRunBytes, &p.w, &tables.filters, c, p.single_s, p.single_r,
                                 chunk * 64, 0);
  for (; tile < p.tiles; tile += p.blocks) {
    HeldTile const from(p, tile);
    for (int v = 0; v < 2; ++v)
      for (int chunk = 0; chunk < chunks; ++chunk, at.advance(p.stages)) {
        next(p.lines_bytes);
        ptx::cp_async_bulk_tensor_4d(ring + at.index * p.slot_bytes, &p.y, &tables.full[at.index], chunk * 64,
                                     from.j + p.w0 + (v ^ p.single_w), from.i + p.h0, from.n);
      }
  }
}

// Stores a warpgroup's 64 channels (fprop: filters) from c on by a tile's pixels.
template <class T, int pixels>
__device__ void held_store(CUtensorMap const& out, float (&acc)[pixels / 2], uint32_t staging, int c, int channels,
                           HeldTile const& to) {
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  bool const stores = int(threadIdx.x) % kWarpgroup == 0;
  if (stores) ptx::cp_async_bulk_wait_group_read<0>();
  ptx::bar_sync(1 + group, kWarpgroup);  // the last results have been read
  if constexpr (sizeof(T) == 4) {        // lines of 32 channels
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int const line = lane % 4 * 2 + e % 2, at = warp % 2 * 16 + e / 2 * 8 + lane / 4;
      uint32_t const to = staging + (warp / 2 * pixels + line) * kLineBytes + ((at / 4) ^ line) * 16 + at % 4 * 4;
#pragma unroll
      for (int i = 0; i < pixels / 8; ++i) ptx::st_shared(to + i * kCoreBytes, __float_as_uint(acc[i * 4 + e]));
    }
  } else {
#pragma unroll
    for (int t = 0; t < pixels / 16; ++t) {
      uint32_t v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int const from = (t * 2 + e / 2) * 4 + e % 2 * 2;
        v[e] = pack<T>(acc[from], acc[from + 1]);
      }
      int const line = t * 16 + lane / 16 * 8 + lane % 8, at = warp * 2 + lane / 8 % 2;
      ptx::stmatrix_x4_trans(staging + line * kLineBytes + (at ^ (line % 8)) * 16, v);
    }
  }
  ptx::fence_proxy_async();
  ptx::bar_sync(1 + group, kWarpgroup);
  if (!stores) return;
  ptx::cp_async_bulk_tensor_4d_store(&out, staging, c, to.j, to.i, to.n);
  if (sizeof(T) == 4 && c + 32 < channels)
    ptx::cp_async_bulk_tensor_4d_store(&out, staging + pixels * kLineBytes, c + 32, to.j, to.i, to.n);
  ptx::cp_async_bulk_commit_group();
}

// steps: instructions of a tap, 16 of y's channels each.
template <class T, int pixels, int steps, int group>
__device__ void held_multiply(HeldParams const& p, uint32_t ring, uint32_t filters, uint32_t staging,
                              HeldTables& tables, int c, int tile) {
  constexpr int chunks = (steps + 3) / 4;
  uint64_t const layout = layout_of(kLineBytes);
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32 % 4;
  uint32_t const full = warp_uniform(ptx::shared_address(tables.full)),
                 empty = warp_uniform(ptx::shared_address(tables.empty));
  Stage at;
  auto wait = [&](Stage const& s) { ptx::mbarrier_wait(full + s.index * 8, s.parity); };
  auto release = [&](Stage const& s) {
    if (lane == 0) ptx::mbarrier_arrive(empty + s.index * 8);
  };
  uint32_t a[4 * steps][4];  // of taps and their instructions
#pragma unroll
  for (int i = 0; i < 4 * chunks; ++i, at.advance(p.stages)) {
    wait(at);
    uint32_t const from = ring + at.index * p.slot_bytes + group * kRunBytes + (lane / 16 * 8 + lane % 8) * kLineBytes +
                          (((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16);
    uint32_t loaded = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (i % chunks * 4 + k < steps) {
        auto& v = a[i / chunks * steps + i % chunks * 4 + k];
        ptx::ldmatrix_x4_trans(v, from + k * 16 * kLineBytes);
        loaded |= v[0];
      }
    give_back(empty + at.index * 8, loaded);
  }
  if (group == 0) ptx::mbarrier_wait(&tables.filters, 0);
  // Units of 16 bytes.
  uint32_t const slots = warp_uniform(ring / 16), slot_bytes = uint32_t(p.slot_bytes) / 16;
  uint32_t const row = uint32_t(p.width) * (kLineBytes / 16), single = p.single_h != 0 ? row : 0;
  uint32_t const shared = warp_uniform(filters / 16);
  float acc[pixels / 2];
  auto begin = [&] {
    ptx::wgmma_fence_operand(acc);
    ptx::wgmma_fence();
  };
  auto finish = [&] {
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
  };
  auto clear = [&] {
#pragma unroll
    for (int i = 0; i < pixels / 2; ++i) acc[i] = 0;
  };
  // The instructions of half of a tap, 64 of y's channels, that is held.
  auto multiply = [&](int tap, int chunk, uint32_t lines) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (chunk * 4 + k < steps) ptx::wgmma_mma_async<T>(acc, a[tap * steps + chunk * 4 + k], layout | (lines + k * 2));
  };
  for (; tile < p.tiles; tile += p.blocks) {
    HeldTile const to(p, tile);
    Stage s[2 * chunks];
    uint32_t lines[2 * chunks];
#pragma unroll
    for (int i = 0; i < 2 * chunks; ++i, at.advance(p.stages)) s[i] = at, lines[i] = slots + at.index * slot_bytes;
    clear();
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      wait(s[i]);
      begin();
      if constexpr (group == 0) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (i * 4 + k < steps)
            ptx::wgmma_mma_async<T, true, false>(acc,
                                                 layout | (shared + i * (kRunBytes / 16) + k * (2 * kCoreBytes / 16)),
                                                 layout | (lines[i] + single + k * 2));
      } else {
        multiply(0, i, lines[i]);
        multiply(1, i, lines[i] + row);
      }
      ptx::wgmma_commit_group();
    }
    finish();
    held_store<T, pixels>(p.x[p.phase[group][0]], acc, staging, c, 0, to);
    clear();
#pragma unroll
    for (int i = 0; i < 2 * chunks; ++i) {
      if (i >= chunks) wait(s[i]);
      begin();
      if constexpr (group == 0) {
        multiply(i / chunks * 2, i % chunks, lines[i]);
        multiply(i / chunks * 2 + 1, i % chunks, lines[i] + row);
      } else {
        multiply(2 + i / chunks, i % chunks, lines[i] + single);
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(acc);
      if (i > 0) release(s[i - 1]);
    }
    finish();
    release(s[2 * chunks - 1]);
    held_store<T, pixels>(p.x[p.phase[group][1]], acc, staging, c, 0, to);
  }
  if (int(threadIdx.x) % kWarpgroup == 0) ptx::cp_async_bulk_wait_group_read<0>();  // shared memory ends with the block
}

template <class T, int pixels, int steps>
__global__ void __launch_bounds__(kThreads, 1) held_kernel(__grid_constant__ HeldParams const p) {
  using S = HeldShape<pixels>;
  extern __shared__ uint8_t dynamic[];
  __shared__ HeldTables tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  uint32_t const filters = ring + S::ring_bytes, staging = filters + S::filters_bytes;
  int const warp = warp_uniform(int(threadIdx.x) / 32);
  if (threadIdx.x % 32 == 0) {
    for (int i = warp; i < p.stages; i += kThreads / 32) {
      ptx::mbarrier_init(&tables.full[i], 1);
      ptx::mbarrier_init(&tables.empty[i], 8);  // all warps that multiply
    }
    if (warp == 0) ptx::mbarrier_init(&tables.filters, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
  int const c = int(blockIdx.x) / p.blocks * 64, tile = int(blockIdx.x) % p.blocks;
  if (warp < 4) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    held_multiply<T, pixels, steps, 0>(p, ring, filters, staging, tables, c, tile);
  } else if (warp < 8) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    held_multiply<T, pixels, steps, 1>(p, ring, filters, staging + S::staging_bytes, tables, c, tile);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    if (warp == 8 && ptx::elect()) held_copy<(steps + 3) / 4>(p, ring, filters, tables, c, tile);
  }
}

template <DType dtype>
cudaError_t launch_held(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  HeldCut const cut = held_cut(problem);
  PhaseTaps const h = phase_taps(problem.H, 3, problem.pad_top), v = phase_taps(problem.W, 3, problem.pad_left);
  int const two_h = h.phase[1].taps == 2, two_w = v.phase[1].taps == 2;  // the phases of two taps
  HeldParams p{};
  p.h0 = int32_t(h.lower), p.w0 = int32_t(v.lower);
  p.single_h = int32_t(h.phase[1 - two_h].lower - h.lower), p.single_w = int32_t(v.phase[1 - two_w].lower - v.lower);
  // In the order of the slots: first the column of taps that all phases have.
  for (int i = 0; i < 4; ++i) {
    p.r[0][i] = int32_t(h.tap(i % 2, two_h)), p.s[0][i] = int32_t(v.tap(p.single_w ^ i / 2, two_w));
    p.r[1][i] = int32_t(i < 2 ? h.tap(i, two_h) : h.tap(p.single_h, 1 - two_h));
    p.s[1][i] = int32_t(i < 2 ? v.tap(p.single_w, 1 - two_w) : v.tap(p.single_w ^ i % 2, two_w));
  }
  p.single_r = int32_t(h.tap(p.single_h, 1 - two_h)), p.single_s = int32_t(v.tap(p.single_w, 1 - two_w));
  p.phase[0][0] = 2 * (1 - two_h) + 1 - two_w, p.phase[0][1] = 2 * two_h + two_w;
  p.phase[1][0] = 2 * two_h + 1 - two_w, p.phase[1][1] = 2 * (1 - two_h) + two_w;
  p.width = int32_t(cut.width), p.height = int32_t(cut.height);
  p.columns = Divisor(cut.columns), p.rows = Divisor(cut.rows), p.tiles = int32_t(cut.tiles);
  p.lines_bytes = int32_t(cut.width * (cut.height + 1) * kLineBytes), p.slot_bytes = int32_t(cut.slot_bytes);
  int sm_count = 0;
  cudaError_t error = count_sms(sm_count);
  if (error != cudaSuccess) return error;
  int64_t const parts = ceil_div(problem.C, 64);
  p.blocks = int32_t(held_blocks(cut.tiles, parts, sm_count));
  Strides const &x = problem.x, &y = problem.y;
  Tensor4 const pixels{args.a, dtype, {problem.K, problem.Q(), problem.P(), problem.N}, {1, y.w, y.h, y.n}};
  if ((error = encode_tiled(p.y, pixels, 64, p.width, p.height + 1, 1)) != cudaSuccess) return error;
  if ((error = encode_filters(p.w, args.b, problem, 64, 64)) != cudaSuccess) return error;
  for (int phase = 0; phase < 4; ++phase) {
    int64_t const a = phase / 2, b = phase % 2;
    Tensor4 const out{static_cast<T*>(args.out) + a * x.h + b * x.w,
                      dtype,
                      {problem.C, (problem.W - b + 1) / 2, (problem.H - a + 1) / 2, problem.N},
                      {1, 2 * x.w, 2 * x.h, x.n}};
    if ((error = encode_tiled(p.x[phase], out, 64, p.width, p.height, 1)) != cudaSuccess) return error;
  }
  auto launch = [&](auto count, auto steps) {
    using S = HeldShape<decltype(count)::value>;
    auto const kernel = held_kernel<T, decltype(count)::value, decltype(steps)::value>;
    p.stages = int32_t(min64(S::ring_bytes / cut.slot_bytes, kMaxStages));
    cudaError_t const set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
    if (set != cudaSuccess) return set;
    return launch_dependent(kernel, dim3(unsigned(p.blocks * parts)), kThreads, S::shared_bytes, stream, p);
  };
  auto of_steps = [&](auto count) {
    if (problem.K <= 64) return launch(count, std::integral_constant<int, 4>{});
    if (problem.K <= 96) return launch(count, std::integral_constant<int, 6>{});
    return launch(count, std::integral_constant<int, 8>{});
  };
  return cut.pixels == 112 ? of_steps(std::integral_constant<int, 112>{})
                           : of_steps(std::integral_constant<int, 128>{});
}

}  // namespace conv2d_ext::tma
