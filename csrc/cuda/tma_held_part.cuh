// 3x3 filters, 16-bit types, whose reduction has 64 to 128 channels, to more than 64 filters: fprop with strides of one
// and two (from 65 channels on), dgrad of stride one. As tma_held_ahead.cuh, but from 65 channels on a block's filters,
// 128, stay in registers in part: the others are the first operand from shared memory.
//
// Of more than 96 channels the first warpgroup holds the first 64 and the second the others, so that at any time one of
// them reads filters from shared memory and the other does not. Of 65 to 96 both hold the second run, which is half,
// and four taps of the first. Results leave by one place in shared memory, which the warpgroups have in turn.
#pragma once

#include "tma_held.cuh"

namespace conv2d_ext::tma {

struct PartParams {
  CUtensorMap in[4], w, out;  // in: rows and columns of a parity, 2 a + b; stride 1: the first alone
  Divisor columns, rows;      // tiles of an image
  int32_t tiles, blocks;      // of the filters of a block
  int32_t width, height;      // pixels of a tile
  int32_t row[2], map_h[2];   // of a slot: its first row at the first pixel; 2 a
  int32_t column[3], map_w[3];
  int32_t lines_bytes[2], slot_bytes[2], stages, free;  // free: slots before the filters that go to registers
  int32_t N;                                            // filters
  void const* bias;
  int64_t bias_stride;
};

struct PartTables {
  uint64_t full[kMaxStages], empty[kMaxStages], kept, drained, filters[3], staging[2];
};

// Filters of a tap and 64 channels (a chunk): which of them are in registers, and where.
template <int steps, int group>
struct PartKept {
  static constexpr int chunks = steps > 4 ? 2 : 1, kept = steps == 6 ? 13 : 9, shared = 9 * chunks - kept;
  static constexpr int kept_instructions = steps == 6 ? 34 : 36;
  static constexpr int chunk_kept = steps == 6 ? 1 : steps > 6 ? group : 0;
  static constexpr __device__ bool in_registers(int tap, int chunk) {
    return chunk == chunk_kept || (steps == 6 && tap < 4);
  }
  static constexpr __device__ int instructions(int chunk) { return steps == 6 && chunk == 1 ? 2 : 4; }
  // The first instruction in registers; the place in shared memory.
  static constexpr __device__ int first(int tap, int chunk) {
    return steps != 6 ? tap * 4 : chunk == 1 ? tap * 2 : 18 + tap * 4;
  }
  static constexpr __device__ int place(int tap) { return steps == 6 ? tap - 4 : tap; }
  // The i-th in registers, in the order in which they come; the i-th in shared memory.
  static constexpr __device__ int tap(int i) { return i < 9 ? i : i - 9; }
  static constexpr __device__ int chunk(int i) { return i < 9 ? chunk_kept : 0; }
  static constexpr int shared_chunk = 1 - chunk_kept;
};

// The i-th column of taps and chunk of a tile. With a stride of two, columns 0 and 2 have the same pixels and a pixel's
// chunks are side by side: steps that read memory (the first of column 0, and of 1) stand apart.
template <int chunks, int stride>
struct PartStep {
  static constexpr bool plain = chunks == 1 || stride == 1;
  static constexpr __device__ int column(int i) { return plain ? i / chunks : i < 2 ? 0 : i % 3 == 2 ? 2 : 1; }
  static constexpr __device__ int chunk(int i) { return plain ? i % chunks : int(i == 1 || i > 3); }
};

template <int steps>
struct PartShape {
  static constexpr int pixels = 112, staging_bytes = pixels * kLineBytes;
  static constexpr int filters_bytes = PartKept<steps, 0>::shared * 2 * kRunBytes;
  static constexpr int ring_bytes = (225 * 1024 - filters_bytes - staging_bytes) / 1024 * 1024;
  static constexpr int kept_at = ring_bytes + filters_bytes - PartKept<steps, 0>::kept * 2 * kRunBytes;
  static constexpr int shared_bytes = ring_bytes + filters_bytes + staging_bytes + 1024;
  static_assert(kept_at >= 0);
};

template <int steps, int stride, bool backward>
__device__ void part_copy(PartParams const& p, uint32_t ring, uint32_t filters, PartTables& tables, int k, int tile) {
  using K0 = PartKept<steps, 0>;
  using K1 = PartKept<steps, 1>;
  auto copy_filters = [&](uint32_t to, uint64_t* full, int tap, int chunk, int group) {
    int const r = tap / 3, s = tap % 3, c = chunk * 64;
    if constexpr (backward)
      ptx::cp_async_bulk_tensor_5d(to + group * kRunBytes, &p.w, full, k + group * 64, 2 - s, 2 - r, c, 0);
    else
      ptx::cp_async_bulk_tensor_5d(to + group * kRunBytes, &p.w, full, c, s, r, k + group * 64, 0);
  };
  // Those that go to registers come by the last bytes before the staged results, where slots of pixels and the other
  // filters follow them; slots that lie before them are asked for meanwhile.
  uint32_t const kept = ring + PartShape<steps>::kept_at;
  ptx::mbarrier_arrive_expect_tx(&tables.kept, K0::kept * 2 * kRunBytes);
  for (int i = 0; i < K0::kept; ++i) {
    copy_filters(kept + i * 2 * kRunBytes, &tables.kept, K0::tap(i), K0::chunk(i), 0);
    copy_filters(kept + i * 2 * kRunBytes, &tables.kept, K1::tap(i), K1::chunk(i), 1);
  }
  Stage at;
  int free = p.free;
  auto drain = [&] {
    ptx::mbarrier_wait(&tables.drained, 0);
    for (int s = 0; s < 3 && K0::shared > 0; ++s) {
      int taps = 0;
      for (int tap = s; tap < 9; tap += 3) taps += K0::in_registers(tap, K0::shared_chunk) ? 0 : 1;
      ptx::mbarrier_arrive_expect_tx(&tables.filters[s], taps * 2 * kRunBytes);
      for (int tap = s; tap < 9; tap += 3) {
        if (K0::in_registers(tap, K0::shared_chunk)) continue;
        copy_filters(filters + K0::place(tap) * 2 * kRunBytes, &tables.filters[s], tap, K0::shared_chunk, 0);
        copy_filters(filters + K0::place(tap) * 2 * kRunBytes, &tables.filters[s], tap, K1::shared_chunk, 1);
      }
    }
  };
  for (; tile < p.tiles; tile += p.blocks) {
    HeldTile const from(p, tile);
    for (int i = 0; i < 3 * K0::chunks; ++i) {
      int const s = PartStep<K0::chunks, stride>::column(i), chunk = PartStep<K0::chunks, stride>::chunk(i);
      for (int slot = 0; slot < stride; ++slot, at.advance(p.stages)) {
        if (free-- == 0) drain();
        uint64_t* const full = &tables.full[at.index];
        ptx::mbarrier_wait(&tables.empty[at.index], at.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, p.lines_bytes[slot]);
        uint32_t const to = ring + at.index / 2 * (p.slot_bytes[0] + p.slot_bytes[1]) + at.index % 2 * p.slot_bytes[0];
        ptx::cp_async_bulk_tensor_4d(to, &p.in[p.map_h[slot] + p.map_w[s]], full, chunk * 64, from.j + p.column[s],
                                     from.i + p.row[slot], from.n);
      }
    }
  }
  if (free >= 0) drain();  // few, small tiles
}

template <class T, int steps, int stride, bool backward, int group>
__device__ void part_multiply(PartParams const& p, uint32_t ring, uint32_t filters, uint32_t staging,
                              PartTables& tables, int k, int tile) {
  using K = PartKept<steps, group>;
  constexpr int pixels = PartShape<steps>::pixels;
  uint64_t const layout = layout_of(kLineBytes);
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32 % 4;
  uint32_t const full = warp_uniform(ptx::shared_address(tables.full)),
                 empty = warp_uniform(ptx::shared_address(tables.empty));
  Stage at;
  auto release = [&](int slot) {
    if (lane == 0 && slot >= 0) ptx::mbarrier_arrive(empty + slot * 8);
  };
  uint32_t a[K::kept_instructions][4];
  ptx::mbarrier_wait(&tables.kept, 0);
#pragma unroll
  for (int of = 0; of < K::kept; ++of) {
    int const tap = K::tap(of), chunk = K::chunk(of);
    uint32_t const from = ring + PartShape<steps>::kept_at + of * 2 * kRunBytes + group * kRunBytes;
#pragma unroll
    for (int i = 0; i < K::instructions(chunk); ++i)
      if constexpr (backward)
        ptx::ldmatrix_x4_trans(a[K::first(tap, chunk) + i], from + (i * 16 + lane / 16 * 8 + lane % 8) * kLineBytes +
                                                                ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16);
      else
        ptx::ldmatrix_x4(a[K::first(tap, chunk) + i],
                         from + (warp * 16 + lane % 16) * kLineBytes + ((i * 2 + lane / 16) ^ (lane % 8)) * 16);
  }
  uint32_t loaded = 0;
#pragma unroll
  for (int i = 0; i < K::kept_instructions; ++i) loaded |= a[i][0];
  give_back(&tables.drained, loaded);
  float bias[2] = {};
  if (p.bias != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const at_k = k + warp * 16 + lane / 4 + half * 8;
      if (at_k < p.N) bias[half] = widen(static_cast<T const*>(p.bias)[at_k * p.bias_stride]);
    }
  }
  bool const stores = int(threadIdx.x) % kWarpgroup == 0;
  uint32_t turn = group ^ 1;  // of the staged results, which the warpgroups have in turn
  bool waiting = false;
  auto hand_on = [&] {
    if (!waiting) return;
    ptx::cp_async_bulk_wait_group_read<0>();
    ptx::mbarrier_arrive(&tables.staging[1 - group]);
    waiting = false;
  };
  uint32_t const slots = warp_uniform(ring / 16), first = uint32_t(p.slot_bytes[0]) / 16,
                 pair = uint32_t(p.slot_bytes[0] + p.slot_bytes[1]) / 16;  // units of 16 bytes
  uint32_t const row = uint32_t(p.width) * (kLineBytes / 16);
  uint32_t const held = warp_uniform((filters + group * kRunBytes) / 16);
  float acc[pixels / 2];
  for (; tile < p.tiles; tile += p.blocks) {
    HeldTile const to(p, tile);
#pragma unroll
    for (int i = 0; i < pixels / 2; ++i) acc[i] = bias[i / 2 % 2];
    int before = -1;
#pragma unroll
    for (int step = 0; step < 3 * K::chunks; ++step) {
      int const s = PartStep<K::chunks, stride>::column(step), chunk = PartStep<K::chunks, stride>::chunk(step);
      if (K::shared > 0) ptx::mbarrier_wait(&tables.filters[s], 0);
#pragma unroll
      for (int slot = 0; slot < stride; ++slot) {
        ptx::mbarrier_wait(full + at.index * 8, at.parity);
        uint32_t const from = slots + uint32_t(at.index / 2) * pair + uint32_t(at.index % 2) * first;
        ptx::wgmma_fence_operand(acc);
        ptx::wgmma_fence();
#pragma unroll
        for (int r = slot; r < 3; r += stride) {
          int const tap = r * 3 + s;
          uint32_t const lines = from + r / stride * row;
#pragma unroll
          for (int i = 0; i < K::instructions(chunk); ++i) {
            if (K::in_registers(tap, chunk))
              ptx::wgmma_mma_async<T>(acc, a[K::first(tap, chunk) + i], layout | (lines + i * 2));
            else
              ptx::wgmma_mma_async<T, backward, false>(
                  acc,
                  layout | (held + K::place(tap) * (2 * kRunBytes / 16) + i * (backward ? 2 * kCoreBytes / 16 : 2)),
                  layout | (lines + i * 2));
          }
        }
        ptx::wgmma_commit_group();
        hand_on();
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_fence_operand(acc);
        release(before);
        before = at.index;
        at.advance(p.stages);
      }
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
    release(before);
    ptx::mbarrier_wait(&tables.staging[group], turn);
    turn ^= 1;
#pragma unroll
    for (int t = 0; t < pixels / 16; ++t) {
      uint32_t v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int const from = (t * 2 + e / 2) * 4 + e % 2 * 2;
        v[e] = pack<T>(acc[from], acc[from + 1]);
      }
      int const line = t * 16 + lane / 16 * 8 + lane % 8, unit = warp * 2 + lane / 8 % 2;
      ptx::stmatrix_x4_trans(staging + line * kLineBytes + (unit ^ (line % 8)) * 16, v);
    }
    ptx::fence_proxy_async();
    ptx::bar_sync(1 + group, kWarpgroup);
    if (stores) {
      ptx::cp_async_bulk_tensor_4d_store(&p.out, staging, k, to.j, to.i, to.n);
      ptx::cp_async_bulk_commit_group();
      waiting = true;
    }
  }
  hand_on();
}

template <class T, int steps, int stride, bool backward>
__global__ void __launch_bounds__(kThreads, 1) part_kernel(__grid_constant__ PartParams const p) {
  using S = PartShape<steps>;
  extern __shared__ uint8_t dynamic[];
  __shared__ PartTables tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  uint32_t const filters = ring + S::ring_bytes, staging = filters + S::filters_bytes;
  int const warp = warp_uniform(int(threadIdx.x) / 32);
  if (threadIdx.x % 32 == 0) {
    for (int i = warp; i < p.stages; i += kThreads / 32) {
      ptx::mbarrier_init(&tables.full[i], 1);
      ptx::mbarrier_init(&tables.empty[i], 8);  // all warps that multiply
    }
    if (warp == 0) {
      ptx::mbarrier_init(&tables.kept, 1);
      ptx::mbarrier_init(&tables.drained, 8);
      for (int s = 0; s < 3; ++s) ptx::mbarrier_init(&tables.filters[s], 1);
      ptx::mbarrier_init(&tables.staging[0], 1);
      ptx::mbarrier_init(&tables.staging[1], 1);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
  int const k = int(blockIdx.x) / p.blocks * 128, tile = int(blockIdx.x) % p.blocks;
  if (warp < 4) {
    ptx::setmaxnreg_inc<232>();
    part_multiply<T, steps, stride, backward, 0>(p, ring, filters, staging, tables, k, tile);
  } else if (warp < 8) {
    ptx::setmaxnreg_inc<232>();
    part_multiply<T, steps, stride, backward, 1>(p, ring, filters, staging, tables, k + 64, tile);
  } else {
    ptx::setmaxnreg_dec<40>();
    if (warp == 8 && ptx::elect()) part_copy<steps, stride, backward>(p, ring, filters, tables, k, tile);
  }
}

template <Op op, DType dtype>
cudaError_t launch_part(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad;
  HeldCut const cut = ahead_cut(op, problem, 112);
  Walk const h = walk_h(op, problem, 0), v = walk_w(op, problem, 0);
  int64_t const C = backward ? problem.K : problem.C, N = backward ? problem.C : problem.K, stride = h.stride;
  int64_t const H = backward ? problem.P() : problem.H, W = backward ? problem.Q() : problem.W;
  Strides const &in = backward ? problem.y : problem.x, &out = backward ? problem.x : problem.y;
  PartParams p{};
  p.width = int32_t(cut.width), p.height = int32_t(cut.height);
  p.columns = Divisor(cut.columns), p.rows = Divisor(cut.rows), p.tiles = int32_t(cut.tiles);
  for (int slot = 0; slot < 2; ++slot) {
    p.lines_bytes[slot] = int32_t(cut.width * (cut.height + (stride == 1 ? 2 : 1 - slot)) * kLineBytes);
    p.slot_bytes[slot] = int32_t(ceil_div(p.lines_bytes[slot], kCoreBytes) * kCoreBytes);
  }
  p.N = int32_t(N), p.bias = args.bias, p.bias_stride = args.bias_stride;
  int sm_count = 0;
  cudaError_t error = count_sms(sm_count);
  if (error != cudaSuccess) return error;
  int64_t const parts = ceil_div(N, 128);
  p.blocks = int32_t(held_blocks(cut.tiles, parts, sm_count));
  // Coordinates of a parity's rows and columns; one that is negative is odd, too.
  auto parity = [&](int64_t at) { return int32_t(stride == 1 ? 0 : at & 1); };
  auto half = [&](int64_t at) { return int32_t(stride == 1 ? at : (at - (at & 1)) / 2); };
  for (int slot = 0; slot < 2; ++slot) p.row[slot] = half(h.lower + slot), p.map_h[slot] = 2 * parity(h.lower + slot);
  for (int s = 0; s < 3; ++s) p.column[s] = half(v.lower + s), p.map_w[s] = parity(v.lower + s);
  for (int map = 0; map < (stride == 1 ? 1 : 4); ++map) {
    int64_t const a = map / 2, b = map % 2;
    Tensor4 const pixels{static_cast<T const*>(args.a) + a * in.h + b * in.w,
                         dtype,
                         {C, ceil_div(W - b, stride), ceil_div(H - a, stride), problem.N},
                         {1, stride * in.w, stride * in.h, in.n}};
    int const lines = p.lines_bytes[2 * a != p.map_h[0]] / kLineBytes;
    if ((error = encode_tiled(p.in[map], pixels, 64, p.width, lines / p.width, 1)) != cudaSuccess) return error;
  }
  if ((error = encode_filters(p.w, args.b, problem, 64, 64)) != cudaSuccess) return error;
  Tensor4 const results{args.out, dtype, {N, v.pixels, h.pixels, problem.N}, {1, out.w, out.h, out.n}};
  if ((error = encode_tiled(p.out, results, 64, p.width, p.height, 1)) != cudaSuccess) return error;
  auto launch = [&](auto of_steps, auto of_stride) {
    constexpr int steps = decltype(of_steps)::value;
    using S = PartShape<steps>;
    auto const kernel = part_kernel<T, steps, decltype(of_stride)::value, backward>;
    p.stages = int32_t(min64(S::ring_bytes / (p.slot_bytes[0] + p.slot_bytes[1]), kMaxStages / 2) * 2);
    p.free = int32_t(min64(p.stages, S::kept_at / (p.slot_bytes[0] + p.slot_bytes[1]) * 2));
    cudaError_t const set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
    if (set != cudaSuccess) return set;
    return launch_dependent(kernel, dim3(unsigned(p.blocks * parts)), kThreads, S::shared_bytes, stream, p);
  };
  auto with_steps = [&](auto of_stride) {
    if constexpr (decltype(of_stride)::value == 1)
      if (C <= 64) return launch(std::integral_constant<int, 4>{}, of_stride);
    if (C <= 96) return launch(std::integral_constant<int, 6>{}, of_stride);
    return launch(std::integral_constant<int, 8>{}, of_stride);
  };
  if constexpr (!backward)
    if (stride == 2) return with_steps(std::integral_constant<int, 2>{});
  return with_steps(std::integral_constant<int, 1>{});
}

}  // namespace conv2d_ext::tma
