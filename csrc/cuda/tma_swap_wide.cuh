// fprop and dgrad for 128 or 192 filters (for dgrad: channels) a tile, with the operands exchanged as in tma_swap.cuh:
//   out[n, pixel] = sum over taps and channels of B[n, tap, channel] * A[pixel moved by the tap, channel]
// Each multiplying warpgroup has 64 of the filters and all pixels of the tile. The pixels are an instruction's columns,
// so their number need only be a multiple of 16: where tiles of 128 are a few more than the SMs, or far fewer, such
// tiles may fill whole rounds. Variant im2col; there are no splits.
//
// fprop's results that take no vectors of channels, but whose pixels follow each other without gaps, are runs of memory
// where a tile has all filters: they are put together in shared memory, and the copy engine stores them.
#pragma once

#include "tma.cuh"

namespace conv2d_ext::tma {

// What a kernel does: all problems, or plain ones, by how their results are stored.
enum class Wide { all, engine, pairs, runs };

struct SwapWideTables {
  uint64_t full_a[kMaxStages], empty_a[kMaxStages], full_b[kMaxStages], empty_b[kMaxStages];
  uint32_t steps[kListed];  // see Tables
};

template <int TP, int TF>
struct SwapWideShape {
  static constexpr int multiplying = TF / 64;  // warpgroups
  static constexpr int threads = (multiplying + 1) * kWarpgroup;
  static constexpr int blocks = 1;  // an SM
  static constexpr bool keeps_b = false, stays = false, splits = false, even_stages = true;
  static constexpr int halo_stages = 0;
  // Pixels that a warpgroup stores at a time, and how many such pieces are on their way, if the copy engine stores
  // them. They divide those of a tile.
  static constexpr int piece = 48, pieces = TP / piece % 2 == 0 ? 2 : 3;
  // Else a piece of up to 64 lines, and behind it where a tile's pixels go, or -1.
  static constexpr int staging = pieces * piece * kLineBytes, offsets = (TP + 63) / 64 * 64;
  static_assert(kRunBytes + offsets * 8 <= staging && TP / piece % pieces == 0);
  static constexpr int columns(int) { return 64; }
  static constexpr int kept_bytes(int, int, bool) { return 0; }
  static constexpr int b_bytes = multiplying * kRunBytes;
  static constexpr int tables_bytes = int(sizeof(SwapWideTables));
  static constexpr int ring_bytes = (226 * 1024 - tables_bytes - multiplying * staging) / 1024 * 1024;
  static constexpr int ring_beside_pieces = ring_bytes;
  static constexpr int shared_bytes = ring_bytes + multiplying * staging + 1024;
  // 64K registers.
  static constexpr int copy_regs = 56, multiply_regs = multiplying == 2 ? 224 : 152;
  static_assert((multiplying * multiply_regs + copy_regs) * kWarpgroup <= 65536);
  static_assert(TP % piece == 0 && TF % 64 == 0 && shared_bytes + tables_bytes <= 227 * 1024);
};

// Stores all warpgroups' accumulators as runs: those of a tile's pixels, as many at a time as there is room for. A tile
// begins with a multiple of 8 pixels, and so with 16 bytes. Lanes side by side have other pixels in turn, that they
// meet other banks where pixels lie some 128 bytes apart.
template <class T, int TP, int TF>
__device__ void swap_wide_store_runs(Params const& p, Unit const& unit, int n, float const (&acc)[TP / 2],
                                     float const (&bias)[2], uint32_t staging) {
  using S = SwapWideShape<TP, TF>;
  constexpr int threads = S::multiplying * kWarpgroup, pixels = S::piece, together = 2;  // of 8 pixels
  constexpr int room = pixels * TF * 2, buffers = S::multiplying * S::staging / room;
  static_assert(pixels % 16 == 0 && buffers > 1);
  int const warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, quad = lane % 4, turn = quad % together;
  int const filter = n + warp % 4 * 16 + lane / 4;
  uint32_t const line = uint32_t(p.N) * 2;
#pragma unroll
  for (int piece = 0; piece < TP / pixels; ++piece) {
    int64_t const first = int64_t(unit.m) * TP + piece * pixels;
    uint32_t const buffer = staging + piece % buffers * room;
    uint32_t const from = buffer + uint32_t(quad) * 2 * line + uint32_t(filter) * 2;
    if (threadIdx.x == 0) ptx::cp_async_bulk_wait_group_read<buffers - 1>();
    ptx::bar_sync(4, threads);  // what was there has been read
#pragma unroll
    for (int j = 0; j < pixels / 8; j += together) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t v[together];  // two pixels
#pragma unroll
        for (int i = 0; i < together; ++i) {
          int const at = (piece * (pixels / 8) + j + i) * 4 + half * 2;
          v[i] = pack<T>(acc[at] + bias[half], acc[at + 1] + bias[half]);
        }
        uint32_t const low = v[0];
        v[0] = turn == 0 ? low : v[1], v[1] = turn == 0 ? v[1] : low;
        if (filter + half * 8 < p.N) {
#pragma unroll
          for (int i = 0; i < together; ++i) {
            uint32_t const to = from + uint32_t(j + (i ^ turn)) * 8 * line + half * 16;
            ptx::st_shared_u16(to, uint16_t(v[i])), ptx::st_shared_u16(to + line, uint16_t(v[i] >> 16));
          }
        }
      }
    }
    ptx::fence_proxy_async();
    ptx::bar_sync(4, threads);
    if (warp > 0) continue;
    int64_t const count = max(min(p.phase[0].M - first, int64_t(pixels)), int64_t(0));
    T* const out = static_cast<T*>(p.out) + first * p.N;
    uint32_t const elements = uint32_t(count) * uint32_t(p.N), whole = elements / 8 * 8;
    if (lane == 0) {
      if (whole > 0) ptx::cp_async_bulk_store(out, buffer, whole * 2);
      ptx::cp_async_bulk_commit_group();  // also of nothing, as these are counted
    }
    if (whole + lane < elements) {  // behind the last whole vector of the tensor
      uint32_t const word = ptx::ld_shared(buffer + (whole + lane) / 2 * 4) >> (lane % 2 * 16);
      reinterpret_cast<uint16_t*>(out)[whole + lane] = uint16_t(word);
    }
  }
}

// Stores a warpgroup's accumulators: 64 filters from n on by the TP pixels whose offsets are `to`, as swap_store does.
template <class T, int TP, int TF, Wide wide>
__device__ void swap_wide_store(Params const& p, Unit const& unit, int n, float (&acc)[TP / 2], int64_t const* to,
                                uint32_t staging) {
  constexpr int pixels = SwapWideShape<TP, TF>::piece;
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  int const thread = int(threadIdx.x) % kWarpgroup;
  float bias[2] = {};
  if (p.bias != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const at = n + warp * 16 + lane / 4 + half * 8;
      if (at < p.N) bias[half] = widen(static_cast<T const*>(p.bias)[unit.group * p.group_bias + at * p.bias_stride]);
    }
  }
  if constexpr (wide == Wide::runs) {
    swap_wide_store_runs<T, TP, TF>(p, unit, n, acc, bias, staging - group * SwapWideShape<TP, TF>::staging);
    return;
  }
  auto pair = [&](int j, int half) {  // two pixels of a filter
    return pack<T>(acc[j * 4 + half * 2] + bias[half], acc[j * 4 + half * 2 + 1] + bias[half]);
  };
  auto stage = [&](int piece, uint32_t lines) {
#pragma unroll
    for (int t = 0; t < pixels / 16; ++t) {
      int const j = piece * (pixels / 8) + t * 2;
      uint32_t const v[4] = {pair(j, 0), pair(j, 1), pair(j + 1, 0), pair(j + 1, 1)};
      int const line = t * 16 + lane / 16 * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
      ptx::stmatrix_x4_trans(lines + line * kLineBytes + (chunk ^ (line % 8)) * 16, v);
    }
  };
  if (wide == Wide::pairs || (wide == Wide::all && p.singly)) {  // a warp's 16 filters as lines of pixels
#pragma unroll
    for (int piece = 0; piece < (TP + 63) / 64; ++piece) {
      __syncwarp();
#pragma unroll
      for (int t = 0; t < 4; ++t) {  // 16 pixels
        int const j = piece * 8 + t * 2;
        if (j * 8 >= TP) break;
        uint32_t const v[4] = {pair(j, 0), pair(j, 1), pair(j + 1, 0), pair(j + 1, 1)};
        int const line = warp * 16 + lane / 8 % 2 * 8 + lane % 8, chunk = t * 2 + lane / 16;
        ptx::stmatrix_x4(staging + line * kLineBytes + (chunk ^ (line % 8)) * 16, v);
      }
      __syncwarp();
      store_pairs(p, static_cast<T*>(p.out) + unit.group * p.group_out, n + warp * 16, p.N, to + piece * 64,
                  staging + warp * 16 * kLineBytes);
    }
    return;
  }
  if (wide == Wide::engine || p.by_engine) {
    constexpr int pieces = SwapWideShape<TP, TF>::pieces;
#pragma unroll
    for (int piece = 0; piece < TP / pixels; ++piece) {
      uint32_t const lines = staging + piece % pieces * pixels * kLineBytes;
      if (lane == 0) ptx::cp_async_bulk_wait_group_read<pieces - 1>();
      ptx::bar_sync(1 + group, kWarpgroup);  // the lines are free
      stage(piece, lines);
      ptx::fence_proxy_async();
      ptx::bar_sync(1 + group, kWarpgroup);
      if (lane != 0 || warp * 16 >= pixels) continue;
      ptx::cp_async_bulk_tensor_4d_store(&p.out_rows, lines + warp * kPieceBytes, n,
                                         unit.m * TP + piece * pixels + warp * 16, unit.group, 0);
      ptx::cp_async_bulk_commit_group();
    }
    return;
  }
  int const column = n + thread % 8 * 8;
  T* const out = static_cast<T*>(p.out) + unit.group * p.group_out + column;
#pragma unroll
  for (int piece = 0; piece < TP / pixels; ++piece) {
    if (piece > 0) ptx::bar_sync(1 + group, kWarpgroup);
    stage(piece, staging);
    ptx::bar_sync(1 + group, kWarpgroup);
#pragma unroll
    for (int i = 0; i < pixels / 16; ++i) {
      int const line = thread / 8 + i * 16;
      uint4 const v = ptx::ld_shared_v4(staging + line * kLineBytes + ((thread % 8) ^ (line % 8)) * 16);
      int64_t const pixel = to[piece * pixels + line];
      if (pixel >= 0 && column < p.N) *reinterpret_cast<uint4*>(out + pixel) = v;
    }
  }
}

template <class T, int TP, int TF, bool b_rows, Wide wide>
__device__ void swap_wide_multiply(Params const& p, uint32_t ring, uint8_t* memory, SwapWideTables& tables) {
  using S = SwapWideShape<TP, TF>;
  constexpr uint32_t step_b = b_rows ? 2 * kCoreBytes / 16 : 2;  // 16 k
  uint64_t const layout = layout_of(p.line), layout_b = b_rows ? layout_of(kLineBytes) : layout;
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32;
  int const thread = int(threadIdx.x) % kWarpgroup;
  int const offset = S::ring_bytes + group * S::staging;
  uint32_t const staging = ring + offset;
  // Addresses in units of 16 bytes.
  uint32_t const ring_a = warp_uniform(ring / 16), a_bytes = uint32_t(p.a_bytes) / 16;
  uint32_t const b_bytes = uint32_t(p.b_bytes) / 16, filters = uint32_t(b_rows ? kRunBytes : 64 * p.line) / 16;
  uint32_t const ring_b = warp_uniform(ring_a + p.stages_a * a_bytes + group * filters);
  Barriers const bars(tables);
  int64_t* const to = reinterpret_cast<int64_t*>(memory + offset + kRunBytes);
  Stage a, b;
  float acc[TP / 2];
  auto release = [&](int stage_a, int stage_b) {  // -1: none
    if (lane == 0 && stage_a >= 0) {
      ptx::mbarrier_arrive(bars.empty_a + stage_a * 8);
      ptx::mbarrier_arrive(bars.empty_b + stage_b * 8);
    }
  };
  constexpr bool some_go_apart = wide == Wide::all || wide == Wide::pairs;
  WorkOf<wide != Wide::all> work(p);
  for (Unit unit; work.take(p, unit);) {
    Phase const& phase = p.phase[unit.phase];
    if (some_go_apart && !p.by_engine) {
      ptx::bar_sync(1 + group, kWarpgroup);  // the last tile's offsets and piece have been read
      for (int i = thread; i < S::offsets; i += kWarpgroup)
        to[i] = i < TP ? out_of(p, phase, int64_t(unit.m) * TP + i) : -1;
    }
#pragma unroll
    for (int i = 0; i < TP / 2; ++i) acc[i] = 0;
    int before_a = -1, before_b = -1;  // stages of the multiplications that are under way
    Step at(p, phase, 0);
    for (int step = 0; step < unit.count; ++step, at.advance()) {
      int const instructions = at.last_chunk() ? p.last : 4;
      ptx::mbarrier_wait(bars.full_a + a.index * 8, a.parity);
      ptx::mbarrier_wait(bars.full_b + b.index * 8, b.parity);
      uint32_t const from_a = ring_a + a.index * a_bytes, from_b = ring_b + b.index * b_bytes;
      ptx::wgmma_fence_operand(acc);
      auto instruct = [&](auto count) {
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < decltype(count)::value; ++k)
          ptx::wgmma_mma_async<T, b_rows, false>(acc, layout_b | (from_b + k * step_b), layout | (from_a + k * 2));
        ptx::wgmma_commit_group();
      };
      with_constant(instructions, instruct);
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(acc);
      release(before_a, before_b);  // the step before has been read
      before_a = a.index, before_b = b.index;
      a.advance(p.stages_a), b.advance(p.stages_b);
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
    release(before_a, before_b);
    if (some_go_apart && !p.by_engine) ptx::bar_sync(1 + group, kWarpgroup);  // the offsets have been written
    swap_wide_store<T, TP, TF, wide>(p, unit, unit.n * TF + group * 64, acc, to, staging);
  }
  if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();  // shared memory ends with the block
}

// b_rows: B's columns are contiguous in memory, not its k.
template <class T, int TP, int TF, bool b_rows, Wide wide>
__global__ void __launch_bounds__(SwapWideShape<TP, TF>::threads, 1)
    tma_swap_wide_kernel(__grid_constant__ Params const p) {
  using S = SwapWideShape<TP, TF>;
  constexpr bool plain = wide != Wide::all;
  extern __shared__ uint8_t dynamic[];
  __shared__ SwapWideTables tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  uint8_t* const memory = dynamic + (ring - ptx::shared_address(dynamic));
  if (threadIdx.x % 32 == 0) {
    constexpr int warps = S::multiplying * 4;  // that read a stage
    for (int i = int(threadIdx.x) / 32; i < kMaxStages; i += S::threads / 32) {
      ptx::mbarrier_init(&tables.full_a[i], 1);
      ptx::mbarrier_init(&tables.empty_a[i], warps);
      ptx::mbarrier_init(&tables.full_b[i], 1);
      ptx::mbarrier_init(&tables.empty_b[i], warps);
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (plain) list_steps(p, tables.steps, S::threads);
  __syncthreads();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
  if (threadIdx.x < S::multiplying * kWarpgroup) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    swap_wide_multiply<T, TP, TF, b_rows, wide>(p, ring, memory, tables);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    Barriers const bars(tables);
    int const copier = warp_uniform(int(threadIdx.x) / 32 % 4);
    if (!ptx::elect()) return;
    if (copier < kCopiers) {
      if constexpr (plain)
        copy_listed_a<T, TP>(p, ring, bars, tables.steps, copier);
      else
        copy_a<T, TP, A::pixels>(p, ring, bars, copier);
      ptx::griddepcontrol_launch_dependents();
    } else if constexpr (plain) {
      copy_listed_b<T, TF, b_rows>(p, ring, bars, tables.steps, copier - kCopiers);
    } else {
      copy_b<T, TP, TF, b_rows>(p, ring, bars, copier - kCopiers);
    }
  }
}

template <Op op, DType dtype, int TP, int TF>
cudaError_t launch_swapped_wide(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool b_rows = op == Op::dgrad;
  void (*runs)(Params) = nullptr;
  if constexpr (op == Op::fprop) runs = tma_swap_wide_kernel<T, TP, TF, b_rows, Wide::runs>;
  return launch_kernel<SwapWideShape<TP, TF>, op, dtype, TP, TF>(
      tma_swap_wide_kernel<T, TP, TF, b_rows, Wide::all>, problem, plan, args, stream, nullptr,
      tma_swap_wide_kernel<T, TP, TF, b_rows, Wide::engine>, nullptr,
      tma_swap_wide_kernel<T, TP, TF, b_rows, Wide::pairs>, runs);
}

}  // namespace conv2d_ext::tma
