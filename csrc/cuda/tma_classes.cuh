// dgrad with a stride of two, f16 and bf16, of few filters: a tile's pixels of y stay in shared memory for all
// four phases of the stride. tma.cuh takes the phases as tiles of their own, which copy y again and of which those of
// few taps are over before the results of the one before are stored.
//   x[2i + a, 2j + b, c] = sum over taps (u, v) and k of w[k, r, s, c] * y[i + u, j + v, k], r(a, u), s(b, v)
//
// The operands are exchanged as in tma_swap.cuh: an instruction has 64 channels as rows and the tile's 256 pixels as
// columns. Each of two warpgroups has 64 channels of a block's 128 and takes the phases one after the other, in an
// order of its own, so that one stores while the other multiplies; in few rounds of tiles, where y's channels fill
// their lines, they take turns with their products. Of up to 64 channels each has all, and two of the phases. A slot
// has the pixels of a row of taps, 64 channels of them, and those of all its columns of taps, as in tma.cuh's halo; it
// is copied anew when both have taken it for the last time. Filters come by a ring for each warpgroup.
//
// Tiles of more than 64 channels that are left after whole rounds of the device are taken phase by phase, those of most
// taps first; after a round of them, blocks take further ones in reverse, so that those with most taps get the fewest
// beside them.
#pragma once

#include "../core/tma_classes.h"
#include "tma_wgrad.cuh"

namespace conv2d_ext::tma {

constexpr int kSlots = kClassesSlots;

struct ClassesShape {
  static constexpr int a_bytes = (kClassesPixels + kHalo) * kLineBytes, stage_bytes = 64 * kLineBytes;
  static constexpr int piece = kClassesPiece, staging_bytes = piece * kLineBytes;  // pixels that are stored at a time
  static constexpr int ring_bytes = kClassesBytes, shared_bytes = ring_bytes + 2 * staging_bytes + 1024;
  static constexpr int copy_regs = 56, multiply_regs = 224;
};

struct ClassesParams {
  CUtensorMap a, b;
  int64_t M;              // pixels of y that tiles are made of, padded columns included
  Divisor rows, columns;  // of an image
  Divisor tiles_n, tiles;
  int32_t valid_columns;
  int32_t whole, units;  // tiles taken as a whole, and with the phases of the others
  int32_t H, W, C;
  int32_t h0, w0;                                    // the first pixel at the first tap
  int32_t taps_h, taps_w;                            // u, v
  int32_t r[kMaxPhaseTaps][2], s[kMaxPhaseTaps][2];  // of a phase, -1: it does not have the tap
  int32_t rows_of[kMaxPhaseTaps];                    // u, in the order in which they are taken
  int32_t phases;                                    // of a warpgroup
  int32_t order[2][4];                               // 2 a + b, for each warpgroup
  int32_t taken[2][kMaxPhaseTaps];                   // by which of these, as bits
  int32_t chunks, last, stages;
  int32_t step;  // channels from a warpgroup's to the other's: 64, or 0
  bool turns;
  int64_t out_n, out_h, out_w;
  void* out;
};

struct ClassesTables {
  int64_t out[2][kClassesPixels];
  uint64_t full_a[kSlots], empty_a[kSlots], full_b[2][kMaxStages], empty_b[2][kMaxStages];
};

// A tile, or a phase of one: bits of phases.
struct ClassesUnit {
  int32_t m, n, phases;

  __device__ ClassesUnit(ClassesParams const& p, int index) {
    int tile = index;
    phases = 15;
    if (index >= p.whole) {
      tile = index - p.whole;
      phases = 1 << p.order[0][p.tiles.divide(tile)];
      tile += p.whole;
    }
    m = p.tiles_n.divide(tile), n = tile;
  }
  // Bits of a warpgroup's order.
  __device__ int turns(ClassesParams const& p, int group) const {
    int bits = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) bits |= int(k < p.phases && (phases >> p.order[group][k] & 1)) << k;
    return bits;
  }
};

// A block's unit of the round that begins with `first`; it may have none of the last.
__device__ inline int classes_index(ClassesParams const& p, int first) {
  return first + int(first <= p.whole ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

__device__ inline void classes_copy_a(ClassesParams const& p, uint32_t ring, ClassesTables& tables) {
  uint32_t parity = 0;  // of the slots
  for (int first = 0; first < p.units; first += int(gridDim.x)) {
    int const index = classes_index(p, first);
    if (index >= p.units) break;
    ClassesUnit const unit(p, index);
    int const turns = unit.turns(p, 0);
    int64_t j = int64_t(unit.m) * kClassesPixels;
    int64_t i = p.columns.divide(j);
    int const n = int(p.rows.divide(i)), h = p.h0 + int(i), w = p.w0 + int(j);
    for (int row = 0; row < p.taps_h; ++row) {
      int const u = p.rows_of[row];
      if ((p.taken[0][u] & turns) == 0) continue;
      for (int chunk = 0; chunk < p.chunks; ++chunk) {
        int const slot = u * p.chunks + chunk;
        ptx::mbarrier_wait(&tables.empty_a[slot], (parity >> slot & 1) ^ 1);  // passes the first time
        parity ^= 1u << slot;
        ptx::mbarrier_arrive_expect_tx(&tables.full_a[slot], ClassesShape::a_bytes);
        ptx::cp_async_bulk_tensor_im2col(ring + slot * ClassesShape::a_bytes, &p.a, &tables.full_a[slot], chunk * 64, w,
                                         h, n, 0, u);
      }
    }
  }
}

__device__ inline void classes_copy_b(ClassesParams const& p, uint32_t ring, ClassesTables& tables, int group) {
  using S = ClassesShape;
  Stage b;
  for (int first = 0; first < p.units; first += int(gridDim.x)) {
    int const index = classes_index(p, first);
    if (index >= p.units) break;
    ClassesUnit const unit(p, index);
    int const turns = unit.turns(p, group), c = (unit.n * 2 + group) * p.step;
    for (int k = 0; k < 4; ++k) {
      if (!(turns >> k & 1)) continue;
      int const phase = p.order[group][k];
      for (int row = 0; row < p.taps_h; ++row) {
        int const r = p.r[p.rows_of[row]][phase / 2];
        if (r < 0) continue;
        for (int chunk = 0; chunk < p.chunks; ++chunk)
          for (int v = 0; v < p.taps_w; ++v) {
            int const s = p.s[v][phase % 2];
            if (s < 0) continue;
            uint64_t* const bar = &tables.full_b[group][b.index];
            ptx::mbarrier_wait(&tables.empty_b[group][b.index], b.parity ^ 1);
            ptx::mbarrier_arrive_expect_tx(bar, S::stage_bytes);
            ptx::cp_async_bulk_tensor_5d(ring + b.index * S::stage_bytes, &p.b, bar, c, s, r, chunk * 64, 0);
            b.advance(p.stages);
          }
      }
    }
  }
}

// Stores a warpgroup's 64 channels from n on by the tile's pixels of a phase, as swap_store does.
template <class T>
__device__ void classes_store(ClassesParams const& p, int n, int phase, float (&acc)[kClassesPixels / 2],
                              int64_t const* to, uint32_t staging) {
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  int const thread = int(threadIdx.x) % kWarpgroup, column = n + thread % 8 * 8;
  int const needs = phase % 2 | phase / 2 << 1;
  T* const out = static_cast<T*>(p.out) + phase / 2 * p.out_h + phase % 2 * p.out_w + column;
  using S = ClassesShape;
#pragma unroll
  for (int piece = 0; piece < kClassesPixels / S::piece; ++piece) {
    int64_t at[S::piece / 16];  // on their way while the barrier is waited for
#pragma unroll
    for (int i = 0; i < S::piece / 16; ++i) at[i] = to[piece * S::piece + thread / 8 + i * 16];
    ptx::bar_sync(1 + group, kWarpgroup);  // the last piece has been read
#pragma unroll
    for (int t = 0; t < S::piece / 16; ++t) {  // 16 pixels
      uint32_t v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int const from = (piece * (S::piece / 8) + t * 2 + e / 2) * 4 + e % 2 * 2;
        v[e] = pack<T>(acc[from], acc[from + 1]);
      }
      int const line = t * 16 + lane / 16 * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
      ptx::stmatrix_x4_trans(staging + line * kLineBytes + (chunk ^ (line % 8)) * 16, v);
    }
    ptx::bar_sync(1 + group, kWarpgroup);
#pragma unroll
    for (int i = 0; i < S::piece / 16; ++i) {
      int const line = thread / 8 + i * 16;
      uint4 const v = ptx::ld_shared_v4(staging + line * kLineBytes + ((thread % 8) ^ (line % 8)) * 16);
      // As in phases_store.
      if (at[i] >= 0 && (int(at[i]) & needs) == needs && column < p.C) reinterpret_cast<uint4*>(out)[at[i] / 8] = v;
    }
  }
}

template <class T>
__device__ void classes_multiply(ClassesParams const& p, uint32_t ring, uint32_t ring_b, uint32_t staging,
                                 ClassesTables& tables) {
  using S = ClassesShape;
  uint64_t const layout = layout_of(kLineBytes);
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32;
  int const thread = int(threadIdx.x) % kWarpgroup;
  uint32_t const slots = warp_uniform(ring / 16), filters = warp_uniform(ring_b / 16);  // units of 16 bytes
  uint32_t const full_a = warp_uniform(ptx::shared_address(tables.full_a)),
                 empty_a = warp_uniform(ptx::shared_address(tables.empty_a)),
                 full_b = warp_uniform(ptx::shared_address(tables.full_b[group])),
                 empty_b = warp_uniform(ptx::shared_address(tables.empty_b[group]));
  int64_t* const to = tables.out[group];
  uint32_t parity = 0;  // of the slots
  Stage b;
  bool first_turn = group == 0;
  float acc[kClassesPixels / 2];
  auto release = [&](int slot, int stage) {  // -1: none
    if (lane == 0 && slot >= 0) ptx::mbarrier_arrive(empty_a + slot * 8);
    if (lane == 0 && stage >= 0) ptx::mbarrier_arrive(empty_b + stage * 8);
  };
  for (int first = 0; first < p.units; first += int(gridDim.x)) {
    int const index = classes_index(p, first);
    if (index >= p.units) break;
    ClassesUnit const unit(p, index);
    int const turns = unit.turns(p, group);
    // The offset in phase (0, 0), a multiple of 8, or -1; bits 0 and 1: there are pixels of b = 1, a = 1. The last
    // unit's have been read: before its last piece's barrier.
    for (int at = thread; at < kClassesPixels; at += kWarpgroup) {
      int64_t j = int64_t(unit.m) * kClassesPixels + at;
      bool const is_pixel = j < p.M;
      int64_t i = p.columns.divide(j);
      int64_t const n = p.rows.divide(i);
      to[at] = is_pixel && j < p.valid_columns ? (n * p.out_n + i * 2 * p.out_h + j * 2 * p.out_w) |
                                                     int64_t(2 * j + 1 < p.W) | int64_t(2 * i + 1 < p.H) << 1
                                               : -1;
    }
    ptx::bar_sync(1 + group, kWarpgroup);  // the offsets have been written
    for (int k = 0; k < 4; ++k) {
      if (!(turns >> k & 1)) continue;
      int const phase = p.order[group][k];
#pragma unroll
      for (int i = 0; i < kClassesPixels / 2; ++i) acc[i] = 0;
      int before_a = -1, before_b = -1;  // what the multiplications that are under way read
      if (p.turns && !first_turn) ptx::bar_sync(3 + group, 2 * kWarpgroup);
      first_turn = false;
      for (int row = 0; row < p.taps_h; ++row) {
        int const u = p.rows_of[row];
        if (p.r[u][phase / 2] < 0) continue;
        bool const is_last = (p.taken[group][u] & turns) >> k == 1;
        for (int chunk = 0; chunk < p.chunks; ++chunk) {
          int const slot = u * p.chunks + chunk, instructions = chunk == p.chunks - 1 ? p.last : 4;
          ptx::mbarrier_wait(full_a + slot * 8, parity >> slot & 1);
          for (int v = 0; v < p.taps_w; ++v) {
            if (p.s[v][phase % 2] < 0) continue;
            uint32_t const from_a = slots + slot * (S::a_bytes / 16) + v * (kLineBytes / 16);
            ptx::mbarrier_wait(full_b + b.index * 8, b.parity);
            uint32_t const from_b = filters + b.index * (S::stage_bytes / 16);
            ptx::wgmma_fence_operand(acc);
            auto instruct = [&](auto count) {
              ptx::wgmma_fence();
#pragma unroll
              for (int i = 0; i < decltype(count)::value; ++i)
                ptx::wgmma_mma_async<T, true, false>(acc, layout | (from_b + i * (2 * kCoreBytes / 16)),
                                                     layout | (from_a + i * 2));
              ptx::wgmma_commit_group();
            };
            with_constant(instructions, instruct);
            ptx::wgmma_wait_group<1>();
            ptx::wgmma_fence_operand(acc);
            release(before_a, before_b);  // the tap before has been read
            before_a = -1, before_b = b.index;
            b.advance(p.stages);
          }
          if (is_last) before_a = slot;
        }
      }
      // Nobody waits for the last turn of the second.
      bool const more = turns >> (k + 1) != 0 || classes_index(p, first + int(gridDim.x)) < p.units;
      if (p.turns && (group == 0 || more)) ptx::bar_arrive(4 - group, 2 * kWarpgroup);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(acc);
      release(before_a, before_b);
      classes_store<T>(p, (unit.n * 2 + group) * p.step, phase, acc, to, staging);
    }
    for (int u = 0; u < p.taps_h; ++u)
      if (p.taken[group][u] & turns) parity ^= ((1u << p.chunks) - 1) << (u * p.chunks);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) classes_kernel(__grid_constant__ ClassesParams const p) {
  using S = ClassesShape;
  extern __shared__ uint8_t dynamic[];
  __shared__ ClassesTables tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  uint32_t const ring_b = ring + p.taps_h * p.chunks * S::a_bytes, staging = ring + S::ring_bytes;
  if (threadIdx.x % 32 == 0) {
    constexpr int warps = kWarpgroup / 32;
    for (int i = int(threadIdx.x) / 32; i < kSlots; i += kThreads / 32) {
      ptx::mbarrier_init(&tables.full_a[i], 1);
      ptx::mbarrier_init(&tables.empty_a[i], 2 * warps);
      for (int group = 0; group < 2; ++group) {
        ptx::mbarrier_init(&tables.full_b[group][i], 1);
        ptx::mbarrier_init(&tables.empty_b[group][i], warps);
      }
    }
    ptx::fence_mbarrier_init();
  }
  static_assert(kSlots == kMaxStages);
  __syncthreads();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
  int const warpgroup = int(threadIdx.x) / kWarpgroup;
  if (warpgroup < 2) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    classes_multiply<T>(p, ring, ring_b + warpgroup * p.stages * S::stage_bytes, staging + warpgroup * S::staging_bytes,
                        tables);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    int const copier = int(threadIdx.x) / 32 % 4;
    if (threadIdx.x % 32 != 0) return;
    if (copier < 2)
      classes_copy_b(p, ring_b + copier * p.stages * S::stage_bytes, tables, copier);
    else if (copier == 2)
      classes_copy_a(p, ring, tables);
  }
}

template <DType dtype>
cudaError_t launch_classes(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  using S = ClassesShape;
  static_assert(S::shared_bytes + sizeof(ClassesTables) + 1024 <= 228 * 1024);
  Strides const &x = problem.x, &y = problem.y;
  ClassesParams p{};
  PhaseTaps const h = phase_taps(problem.H, problem.R, problem.pad_top),
                  v = phase_taps(problem.W, problem.S, problem.pad_left);
  for (int phase = 0; phase < 2; ++phase) {
    for (int i = 0; i < h.count; ++i) p.r[i][phase] = int32_t(h.tap(i, phase));
    for (int i = 0; i < v.count; ++i) p.s[i][phase] = int32_t(v.tap(i, phase));
  }
  // The phases with more rows of taps come first, and the rows of taps that these alone have, so that their slots are
  // free early. Warpgroups that share phases have those of most and of fewest taps, and the two others: either all
  // rows.
  int const most = h.phase[1].taps >= h.phase[0].taps, wide = v.phase[1].taps >= v.phase[0].taps;
  bool const narrow = classes_narrow(problem);
  p.phases = narrow ? 2 : 4;
  for (int group = 0; group < 2; ++group)
    for (int k = 0; k < p.phases; ++k) {
      int const rows = narrow ? k : k / 2, columns = narrow ? group ^ k : group ^ k % 2;
      p.order[group][k] = (most ^ rows) * 2 + (wide ^ columns);
      for (int u = 0; u < h.count; ++u) p.taken[group][u] |= (p.r[u][most ^ rows] >= 0) << k;
    }
  p.step = narrow ? 0 : 64;
  int rows = 0;
  for (int shared = 0; shared < 2; ++shared)
    for (int u = 0; u < h.count; ++u)
      if ((p.r[u][1 - most] >= 0) == (shared == 1)) p.rows_of[rows++] = u;
  Walk const walk_h = h.walk(), walk_w = halo_walk(v.walk());
  p.rows = Divisor(walk_h.pixels), p.columns = Divisor(walk_w.pixels), p.valid_columns = int32_t(v.walk().pixels);
  p.M = problem.N * walk_h.pixels * walk_w.pixels;
  p.H = int32_t(problem.H), p.W = int32_t(problem.W), p.C = int32_t(problem.C);
  p.h0 = int32_t(walk_h.lower), p.w0 = int32_t(walk_w.lower), p.taps_h = int32_t(h.count), p.taps_w = int32_t(v.count);
  p.chunks = int32_t(ceil_div(problem.K, 64)), p.last = int32_t(ceil_div(problem.K - (p.chunks - 1) * 64, 16));
  p.stages = int32_t(classes_stages(problem));
  p.out_n = x.n, p.out_h = x.h, p.out_w = x.w, p.out = args.out;
  Tensor4 const a{args.a, dtype, {problem.K, problem.Q(), problem.P(), problem.N}, {1, y.w, y.h, y.n}};
  cudaError_t error = encode_im2col(p.a, a, walk_h, walk_w, 64, kClassesPixels + kHalo);
  if (error != cudaSuccess) return error;
  if ((error = encode_filters(p.b, args.b, problem, 64, 64)) != cudaSuccess) return error;
  auto const kernel = classes_kernel<T>;
  if ((error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes)) !=
      cudaSuccess)
    return error;
  int sm_count = 0;
  if ((error = count_sms(sm_count)) != cudaSuccess) return error;
  int64_t const tiles_n = ceil_div(problem.C, 128), tiles = ceil_div(p.M, kClassesPixels) * tiles_n;
  p.turns = !narrow && problem.K % 64 == 0 && (tiles < 3 * sm_count || p.chunks == 1);  // as measured
  p.tiles_n = Divisor(tiles_n), p.whole = int32_t(narrow ? tiles : tiles / sm_count * sm_count);
  p.tiles = Divisor(max64(tiles - p.whole, 1)), p.units = int32_t(p.whole + (tiles - p.whole) * 4);
  return launch_dependent(kernel, dim3(unsigned(min64(p.units, sm_count))), kThreads, S::shared_bytes, stream, p);
}

// The rows of 256x128, of which dgrad's halo has this second kernel.
template <Op op, DType dtype, int TM, int TN, Variant variant>
cudaError_t launch_strided_row(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  if constexpr (op == Op::dgrad && variant == Variant::halo) {
    if (classes_supports(problem)) return launch_classes<dtype>(problem, args, stream);
  }
  return launch_row<op, dtype, TM, TN, variant>(problem, plan, args, stream);
}

}  // namespace conv2d_ext::tma

#define CONV2D_EXT_TMA_STRIDED_INSTANCE(family, op, dtype, tm, tn, tk, variant)                            \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                                \
    return tma::launch_strided_row<Op::op, DType::dtype, tm, tn, Variant::variant>(p, plan, args, stream); \
  }
