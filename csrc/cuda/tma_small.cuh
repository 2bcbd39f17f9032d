// Tiles of 64 pixels, for layers of few tiles: fprop and dgrad as in tma.cuh, variant im2col.
//
// The products of such a tile's step take less time than what a step asks of barriers: an SM takes some 20 cycles for
// each wait or arrival of a warp, of which tma.cuh has 20 a step. So both operands are in one ring here, and a stage is
// two steps. Four threads copy, two each operand, each to every other stage; two warpgroups take turns with whole
// tiles.
#pragma once

#include "tma.cuh"

namespace conv2d_ext::tma {

constexpr int kTogether = 2;  // steps of a stage

__device__ inline int small_stages(Params const& p) { return p.stages_a.value / kTogether; }

// Bytes of B's columns that a stage has of a step.
template <class T, int TN, bool b_rows>
__device__ int small_bytes_b(Params const& p, Unit const& unit) {
  int const runs = min(Shape<T, 64, TN>::runs, (p.N - unit.n * TN + 63) / 64);
  return b_rows ? runs * (p.line / int(sizeof(T))) * kLineBytes : min(TN, p.N) * p.line;
}

// A copying thread's units, in turn: the first pixel and step of each. The first is worked out while other warps set up
// the barriers.
template <bool plain>
struct SmallCopies {
  WorkOf<plain> work;
  Unit unit;
  Step at;
  int n, h, w;
  bool more;

  __device__ void begin(Params const& p) {
    work = WorkOf<plain>(p);
    next(p);
  }
  __device__ void next(Params const& p) {
    more = work.take(p, unit, true);
    if (!more) return;
    Phase const& phase = p.phase[unit.phase];
    int64_t j = int64_t(unit.m) * 64;
    int64_t i = phase.columns.divide(j);
    n = int(phase.rows.divide(i));
    h = phase.h0 + int(i) * p.stride_h, w = phase.w0 + int(j) * p.stride_w;
    at = Step(p, phase, plain ? 0 : unit.begin);
  }
};

// One thread. of_a: copies A, else B. `full` waits for the bytes of both, which the thread of A announces.
template <class T, int TN, bool b_rows, bool of_a, bool plain>
__device__ void small_copy(Params const& p, uint32_t ring, Tables<T, TN>& tables, int copier,
                           SmallCopies<plain>& copies) {
  int const chunk_size = p.line / int(sizeof(T)), stages = small_stages(p), a_bytes = p.a_bytes, b_bytes = p.b_bytes;
  int const stage_bytes = kTogether * (a_bytes + b_bytes);
  Barriers const bars(tables);
  Stage stage;
  for (; copies.more; copies.next(p)) {
    Unit const& unit = copies.unit;
    Step& at = copies.at;
    Phase const& phase = p.phase[unit.phase];
    int const tap_h = phase.tap_h, tap_w = phase.tap_w;
    int const first_r = phase.first_r, step_r = phase.step_r, first_s = phase.first_s, step_s = phase.step_s;
    int const bytes_b = small_bytes_b<T, TN, b_rows>(p, unit), first = unit.n * TN;
    CUtensorMap const& map = p.a[unit.phase];
#pragma unroll 1
    for (int step = 0; step < unit.count; step += kTogether) {
      int const steps = min(kTogether, unit.count - step);
      bool const mine = stage.index % 2 == copier;
      uint32_t const full = bars.full_a + stage.index * 8;
      uint32_t to = ring + stage.index * stage_bytes + (of_a ? 0 : kTogether * a_bytes);
      if (mine) {
        // Passes at once on the first trip round the ring.
        ptx::mbarrier_wait(bars.empty_a + stage.index * 8, stage.parity ^ 1);
        if (of_a) ptx::mbarrier_arrive_expect_tx(full, steps * (a_bytes + bytes_b));
      }
#pragma unroll 1
      for (int t = 0; t < steps; ++t, at.advance()) {
        int const chunk = at.chunk * chunk_size;
        if (!mine) continue;
        if constexpr (of_a) {
          if constexpr (plain)
            ptx::cp_async_bulk_tensor_im2col(to, &map, full, chunk, copies.w, copies.h, copies.n, at.tap_w * tap_w,
                                             at.tap_h * tap_h);
          else
            copy_pixels(p, to, map, full, unit.group, chunk, copies.w, copies.h, copies.n, at.tap_w * tap_w,
                        at.tap_h * tap_h);
          to += a_bytes;
        } else {
          int const r = first_r + at.tap_h * step_r, s = first_s + at.tap_w * step_s;
          if constexpr (b_rows) {
            for (int run = 0; run * 64 < min(TN, p.N - first); ++run)
              ptx::cp_async_bulk_tensor_5d(to + run * kRunBytes, &p.b, full, first + run * 64, s, r, chunk, unit.group);
          } else {
            ptx::cp_async_bulk_tensor_5d(to, &p.b, full, chunk, s, r, first, unit.group);
          }
          to += b_bytes;
        }
      }
      stage.advance(stages);
    }
  }
  if (of_a) ptx::griddepcontrol_launch_dependents();
}

template <class T, int TN, bool b_rows, bool plain>
__device__ void small_multiply(Params const& p, uint32_t ring, Tables<T, TN>& tables) {
  constexpr int TM = 64;
  using S = Shape<T, TM, TN>;
  constexpr uint32_t step_b = b_rows ? 2 * kCoreBytes : 32;
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32;
  uint64_t const layout = layout_of(p.line),
                 layout_b = b_rows ? ptx::wgmma_descriptor(0, kRunBytes, kCoreBytes) : layout;
  uint32_t const stage_bytes = kTogether * (p.a_bytes + p.b_bytes);
  int const stages = small_stages(p);
  Barriers const bars(tables);
  uint32_t const staging = ring + (p.by_engine ? S::ring_beside_pieces : S::ring_bytes + group * kRunBytes);
  Stage stage;
  float acc[TN / 2];
  auto release = [&](int before) {  // -1: none
    if (lane == 0 && before >= 0) ptx::mbarrier_arrive(bars.empty_a + before * 8);
  };
  WorkOf<plain> work(p);
  Unit unit, next;
  bool mine = group == 0, first = true;
  for (bool more = work.take(p, next, true); more;) {
    unit = next;
    if (!mine) {
      int const at = stage.index + (unit.count + kTogether - 1) / kTogether;
      stage.index = at % stages, stage.parity ^= at / stages & 1;
      mine = true, first = false;
      more = work.take(p, next, true);
      continue;
    }
#pragma unroll
    for (int i = 0; i < TN / 2; ++i) acc[i] = 0;
    int before = -1;           // stage of the multiplications that are under way
    T bias = narrow<T>(0.0f);  // on its way while the tile is multiplied
    int const column = int(threadIdx.x) % kWarpgroup;
    if (p.bias != nullptr && column < TN && unit.n * TN + column < p.N)
      bias = static_cast<T const*>(p.bias)[unit.group * p.group_bias + (unit.n * TN + column) * p.bias_stride];
    Step at(p, p.phase[unit.phase], plain ? 0 : unit.begin);
    // A turn begins when the other has seen its last stage arrive, as in tma_swap.cuh.
    if (!first) ptx::bar_sync(3 + group, 2 * kWarpgroup);
    for (int step = 0; step < unit.count; step += kTogether) {
      ptx::mbarrier_wait(bars.full_a + stage.index * 8, stage.parity);
      uint32_t const from = ring + stage.index * stage_bytes;
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        if (step + t >= unit.count) break;
        ptx::wgmma_fence_operand(acc);
        uint32_t const from_a = from + t * p.a_bytes, from_b = from + kTogether * p.a_bytes + t * p.b_bytes;
        auto instruct = [&](auto count) {
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < decltype(count)::value; ++k)
            ptx::wgmma_mma_async<T, false, b_rows>(acc, at_address(layout, from_a + k * 32),
                                                   at_address(layout_b, from_b + k * step_b));
          // Not after the choice of `count`: a group that ends elsewhere is another one, of nothing, to wait for.
          ptx::wgmma_commit_group();
        };
        with_constant(at.last_chunk() ? p.last : 4, instruct);
        at.advance();
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_fence_operand(acc);
        if (t == 0) release(before);  // the stage before has been read
      }
      before = stage.index;
      stage.advance(stages);
    }
    if (work.more(p)) ptx::bar_arrive(4 - group, 2 * kWarpgroup);
    mine = first = false;
    more = work.take(p, next, true);  // while the last multiplications are under way
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
    release(before);
    if (p.bias != nullptr) {
      ptx::bar_sync(1 + group, kWarpgroup);  // the last tile's have been read
      if (column < TN) tables.bias[group][column] = bias;
      ptx::bar_sync(1 + group, kWarpgroup);
    }
    if (!plain && unit.part >= 0)
      store_part<TM, TN>(p, unit.part, 0, acc);
    else
      store<T, TM, TN, false, plain>(p, unit, 0, acc, tables, staging);
  }
  if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();  // shared memory ends with the block
}

// b_rows: B's columns are contiguous in memory, not its k. plain: of plain problems (see tma_kernel in tma.cuh).
template <class T, int TN, bool b_rows, bool plain>
__global__ void __launch_bounds__(kThreads, 1) small_kernel(__grid_constant__ Params const p) {
  extern __shared__ uint8_t dynamic[];
  __shared__ Tables<T, TN> tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int const warp = warp_uniform(int(threadIdx.x) / 32), copier = warp % 4;
  bool const multiplies = warp < 2 * kWarpgroup / 32;
  SmallCopies<plain> copies;
  if (multiplies) {
    if (threadIdx.x % 32 == 0) {
      for (int i = warp; i < small_stages(p); i += 2 * kWarpgroup / 32) {
        ptx::mbarrier_init(&tables.full_a[i], 1);
        ptx::mbarrier_init(&tables.empty_a[i], kWarpgroup / 32);  // the warps that read a stage
      }
      ptx::fence_mbarrier_init();
    }
  } else {
    copies.begin(p);
  }
  __syncthreads();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
  if (multiplies) {
    small_multiply<T, TN, b_rows, plain>(p, ring, tables);
  } else if (ptx::elect()) {
    if (copier < kCopiers)
      small_copy<T, TN, b_rows, true, plain>(p, ring, tables, copier, copies);
    else
      small_copy<T, TN, b_rows, false, plain>(p, ring, tables, copier - kCopiers, copies);
  }
}

template <Op op, DType dtype, int TN>
cudaError_t launch_small(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  return launch_kernel<Shape<T, 64, TN>, op, dtype, 64, TN>(small_kernel<T, TN, op == Op::dgrad, false>, problem, plan,
                                                            args, stream, nullptr,
                                                            small_kernel<T, TN, op == Op::dgrad, true>);
}

}  // namespace conv2d_ext::tma
