// 3x3 filters whose reduction has 64 channels (128 to up to 64 filters; TF32: 32): fprop with strides of one and two,
// in 16-bit types dgrad of stride one. A block's filters stay in registers, as the first operand of its instructions,
// for all of its tiles.
//
// Each of two warpgroups has 64 filters (dgrad: channels), the rows of its instructions; of up to 64 in all both have
// the same, and a ring and a copying thread of their own: for tiles of their own, or, of 128 channels, for half of
// them, and the first adds the second's sums to its own. The columns of an instruction are a rectangle of the result's
// pixels. A slot has the pixels of a column of taps, and a row of taps begins a row of pixels later; with a stride of
// two, a slot has the rows of taps of one parity.
#pragma once

#include "tma_held.cuh"
#include "tma_held_part.cuh"

namespace conv2d_ext::tma {

struct AheadParams {
  CUtensorMap in[4], w, out;  // in: rows and columns of a parity, 2 a + b; stride 1: the first alone
  Divisor columns, rows;      // tiles of an image
  int32_t tiles, blocks;      // of the filters of a block
  int32_t width, height;      // pixels of a tile
  int32_t row[2], map_h[2];   // of a slot: its first row at the first pixel; 2 a
  int32_t column[3], map_w[3];
  int32_t lines_bytes, slot_bytes, stages;  // of a ring
  int32_t N;                                // filters
  void const* bias;
  int64_t bias_stride;
};

struct AheadTables {
  uint64_t full[2][kMaxStages], empty[2][kMaxStages];
};

// What a block's two warpgroups share: both, a tile's pixels, and either has 64 filters; filters, and either has tiles
// of its own; sums, of which either adds up 64 channels.
enum class Ahead : uint8_t { pixels, filters, sums };

template <class T, int pixels, Ahead share>
struct AheadShape {
  static constexpr int rings = share == Ahead::pixels ? 1 : 2;
  static constexpr int staging_bytes = pixels * 64 * int(sizeof(T));
  // Results of each warpgroup; of sums, those of the first, and what the second has added up.
  static constexpr int results_bytes = (share == Ahead::sums ? 3 : 2) * staging_bytes;
  static constexpr int ring_bytes = (224 * 1024 - results_bytes) / 1024 * 1024;
  static constexpr int shared_bytes = ring_bytes + results_bytes + 1024;
};

// ring: of a warpgroup, or of both; c: the first channel; k: the first filter.
template <int stride, bool backward>
__device__ void ahead_copy(AheadParams const& p, uint32_t ring, uint64_t* full, uint64_t* empty, int groups, int c,
                           int k, int tile, int step) {
  Stage at;
  auto next = [&](int bytes) {
    ptx::mbarrier_wait(&empty[at.index], at.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(&full[at.index], bytes);
  };
  for (int r = 0; r < 3; ++r)
    for (int s = 0; s < 3; ++s, at.advance(p.stages)) {
      next(groups * kRunBytes);
      for (int group = 0; group < groups; ++group) {
        uint32_t const to = ring + at.index * p.slot_bytes + group * kRunBytes;
        if constexpr (backward)
          ptx::cp_async_bulk_tensor_5d(to, &p.w, &full[at.index], k + group * 64, 2 - s, 2 - r, c, 0);
        else
          ptx::cp_async_bulk_tensor_5d(to, &p.w, &full[at.index], c, s, r, k + group * 64, 0);
      }
    }
  for (; tile < p.tiles; tile += step) {
    HeldTile const from(p, tile);
    for (int s = 0; s < 3; ++s)
      for (int slot = 0; slot < stride; ++slot, at.advance(p.stages)) {
        next(p.lines_bytes);
        ptx::cp_async_bulk_tensor_4d(ring + at.index * p.slot_bytes, &p.in[p.map_h[slot] + p.map_w[s]], &full[at.index],
                                     c, from.j + p.column[s], from.i + p.row[slot], from.n);
      }
  }
}

// filters: where in a slot the warpgroup's are; k: their first.
template <class T, int pixels, int stride, bool backward, Ahead share>
__device__ void ahead_multiply(AheadParams const& p, uint32_t ring, uint32_t full, uint32_t empty, uint32_t filters,
                               uint32_t staging, int k, int tile, int step) {
  uint64_t const layout = layout_of(kLineBytes);
  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32 % 4;
  Stage at;
  auto release = [&](int slot) {
    if (lane == 0 && slot >= 0) ptx::mbarrier_arrive(empty + slot * 8);
  };
  uint32_t a[9 * 4][4];  // of taps and their instructions
#pragma unroll
  for (int tap = 0; tap < 9; ++tap, at.advance(p.stages)) {
    ptx::mbarrier_wait(full + at.index * 8, at.parity);
    uint32_t const from = ring + at.index * p.slot_bytes + filters;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if constexpr (backward)
        ptx::ldmatrix_x4_trans(a[tap * 4 + i], from + (i * 16 + lane / 16 * 8 + lane % 8) * kLineBytes +
                                                   ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16);
      else
        ptx::ldmatrix_x4(a[tap * 4 + i],
                         from + (warp * 16 + lane % 16) * kLineBytes + ((i * 2 + lane / 16) ^ (lane % 8)) * 16);
    uint32_t loaded = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) loaded |= a[tap * 4 + i][0];
    give_back(empty + at.index * 8, loaded);
  }
  float bias[2] = {};
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup);
  bool const second = share == Ahead::sums && group == 1;
  if (p.bias != nullptr && !second) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const at_k = k + warp * 16 + lane / 4 + half * 8;
      if (at_k < p.N) bias[half] = widen(static_cast<T const*>(p.bias)[at_k * p.bias_stride]);
    }
  }
  uint32_t const slots = warp_uniform(ring / 16), slot_bytes = uint32_t(p.slot_bytes) / 16;  // units of 16 bytes
  uint32_t const row = uint32_t(p.width) * (kLineBytes / 16);
  float acc[pixels / 2];
  for (; tile < p.tiles; tile += step) {
    HeldTile const to(p, tile);
#pragma unroll
    for (int i = 0; i < pixels / 2; ++i) acc[i] = bias[i / 2 % 2];
    // In turn: results leave while the other multiplies. Warpgroups that met stayed together.
    if (share == Ahead::filters && (group == 1 || tile >= step)) ptx::bar_sync(3 + group, 2 * kWarpgroup);
    int before = -1;
#pragma unroll
    for (int s = 0; s < 3; ++s)
#pragma unroll
      for (int slot = 0; slot < stride; ++slot) {
        ptx::mbarrier_wait(full + at.index * 8, at.parity);
        uint32_t const from = slots + at.index * slot_bytes;
        ptx::wgmma_fence_operand(acc);
        ptx::wgmma_fence();
#pragma unroll
        for (int r = slot; r < 3; r += stride)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if constexpr (sizeof(T) == 4)
              ptx::wgmma_mma_async_tf32(acc, a[(r * 3 + s) * 4 + i], layout | (from + r / stride * row + i * 2));
            else
              ptx::wgmma_mma_async<T>(acc, a[(r * 3 + s) * 4 + i], layout | (from + r / stride * row + i * 2));
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_fence_operand(acc);
        release(before);
        before = at.index;
        at.advance(p.stages);
      }
    if (share == Ahead::filters && tile + (group == 0 ? 1 : step - 1) < p.tiles)
      ptx::bar_arrive(4 - group, 2 * kWarpgroup);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
    release(before);
    if constexpr (share == Ahead::sums) {
      uint32_t const sums = staging + pixels * kLineBytes + threadIdx.x % kWarpgroup * 16;
      if (second) {
        if (tile >= step) ptx::bar_sync(3, 2 * kWarpgroup);  // the last have been read
#pragma unroll
        for (int i = 0; i < pixels / 2; i += 4)
          ptx::st_shared_v4(sums + i * (4 * kWarpgroup),
                            make_uint4(__float_as_uint(acc[i]), __float_as_uint(acc[i + 1]),
                                       __float_as_uint(acc[i + 2]), __float_as_uint(acc[i + 3])));
        ptx::bar_arrive(4, 2 * kWarpgroup);
        continue;
      }
      ptx::bar_sync(4, 2 * kWarpgroup);
#pragma unroll
      for (int i = 0; i < pixels / 2; i += 4) {
        uint4 const v = ptx::ld_shared_v4(sums + i * (4 * kWarpgroup));
        acc[i] += __uint_as_float(v.x), acc[i + 1] += __uint_as_float(v.y);
        acc[i + 2] += __uint_as_float(v.z), acc[i + 3] += __uint_as_float(v.w);
      }
      if (tile + step < p.tiles) ptx::bar_arrive(3, 2 * kWarpgroup);
    }
    held_store<T, pixels>(p.out, acc, staging, k, p.N, to);
  }
  if (int(threadIdx.x) % kWarpgroup == 0) ptx::cp_async_bulk_wait_group_read<0>();  // shared memory ends with the block
}

template <class T, int pixels, int stride, bool backward, Ahead share>
__global__ void __launch_bounds__(kThreads, 1) ahead_kernel(__grid_constant__ AheadParams const p) {
  using S = AheadShape<T, pixels, share>;
  extern __shared__ uint8_t dynamic[];
  __shared__ AheadTables tables;
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int const warp = warp_uniform(int(threadIdx.x) / 32);
  if (threadIdx.x % 32 == 0) {
    for (int i = warp; i < p.stages; i += kThreads / 32)
      for (int of = 0; of < S::rings; ++of) {
        ptx::mbarrier_init(&tables.full[of][i], 1);
        ptx::mbarrier_init(&tables.empty[of][i], 8 / S::rings);  // warps that multiply
      }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
  int const part = int(blockIdx.x) / p.blocks, block = int(blockIdx.x) % p.blocks;
  int const group = warp < 8 ? warp / 4 : warp - 8, of = S::rings == 2 ? group : 0;  // copying warps: whose ring
  bool const apart = share == Ahead::filters;
  int const tile = apart ? block * 2 + of : block, step = apart ? p.blocks * 2 : p.blocks;
  int const k = share == Ahead::pixels ? part * 128 : part * 64;
  uint32_t const own = ring + of * p.stages * p.slot_bytes, results = ring + S::ring_bytes;
  if (warp < 8) {
    ptx::setmaxnreg_inc<240>();
    ahead_multiply<T, pixels, stride, backward, share>(
        p, own, warp_uniform(ptx::shared_address(tables.full[of])), warp_uniform(ptx::shared_address(tables.empty[of])),
        S::rings == 2 ? 0 : group * kRunBytes, share == Ahead::sums ? results : results + group * S::staging_bytes,
        share == Ahead::pixels ? k + group * 64 : k, tile, step);
  } else {
    ptx::setmaxnreg_dec<24>();
    if (group < S::rings && ptx::elect())
      ahead_copy<stride, backward>(p, own, tables.full[of], tables.empty[of], 3 - S::rings,
                                   share == Ahead::sums ? of * 64 : 0, k, tile, step);
  }
}

template <Op op, DType dtype>
cudaError_t launch_ahead(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr bool backward = op == Op::dgrad;
  HeldCut const cut = ahead_cut(op, problem);
  Walk const h = walk_h(op, problem, 0), v = walk_w(op, problem, 0);
  int64_t const C = backward ? problem.K : problem.C, N = backward ? problem.C : problem.K, stride = h.stride;
  int64_t const H = backward ? problem.P() : problem.H, W = backward ? problem.Q() : problem.W;
  Strides const &in = backward ? problem.y : problem.x, &out = backward ? problem.x : problem.y;
  AheadParams p{};
  p.width = int32_t(cut.width), p.height = int32_t(cut.height);
  p.columns = Divisor(cut.columns), p.rows = Divisor(cut.rows), p.tiles = int32_t(cut.tiles);
  p.lines_bytes = int32_t(cut.width * (cut.height + (stride == 1 ? 2 : 1)) * kLineBytes);
  p.slot_bytes = int32_t(cut.slot_bytes), p.N = int32_t(N);
  p.bias = args.bias, p.bias_stride = args.bias_stride;
  int sm_count = 0;
  cudaError_t error = count_sms(sm_count);
  if (error != cudaSuccess) return error;
  constexpr int line = kLineBytes / int(sizeof(T));  // channels
  Ahead const share = C > line ? Ahead::sums : N <= 64 ? Ahead::filters : Ahead::pixels;
  int64_t const parts = ceil_div(N, share == Ahead::pixels ? 128 : 64);
  p.blocks = int32_t(held_blocks(share == Ahead::filters ? ceil_div(cut.tiles, 2) : cut.tiles, parts, sm_count));
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
                         {1, stride * in.w, stride * in.h, in.n},
                         true};
    if ((error = encode_tiled(p.in[map], pixels, line, p.width, p.lines_bytes / kLineBytes / p.width, 1)) !=
        cudaSuccess)
      return error;
  }
  if ((error = encode_filters(p.w, args.b, problem, backward ? 64 : line, 64, true)) != cudaSuccess) return error;
  Tensor4 const results{args.out, dtype, {N, v.pixels, h.pixels, problem.N}, {1, out.w, out.h, out.n}};
  if ((error = encode_tiled(p.out, results, line, p.width, p.height, 1)) != cudaSuccess) return error;
  auto launch = [&](auto count, auto of_stride, auto of_share) {
    constexpr Ahead shared = decltype(of_share)::value;
    using S = AheadShape<T, decltype(count)::value, shared>;
    auto const kernel = ahead_kernel<T, decltype(count)::value, decltype(of_stride)::value, backward, shared>;
    p.stages = int32_t(min64(S::ring_bytes / S::rings / cut.slot_bytes, kMaxStages));
    cudaError_t const set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
    if (set != cudaSuccess) return set;
    return launch_dependent(kernel, dim3(unsigned(p.blocks * parts)), kThreads, S::shared_bytes, stream, p);
  };
  auto with_share = [&](auto count, auto of_stride) {
    if constexpr (decltype(of_stride)::value == 1 && sizeof(T) == 2)
      if (share == Ahead::sums) return launch(count, of_stride, std::integral_constant<Ahead, Ahead::sums>{});
    if (share == Ahead::filters) return launch(count, of_stride, std::integral_constant<Ahead, Ahead::filters>{});
    return launch(count, of_stride, std::integral_constant<Ahead, Ahead::pixels>{});
  };
  auto with_stride = [&](auto count) {
    if constexpr (!backward)
      if (stride == 2) return with_share(count, std::integral_constant<int, 2>{});
    return with_share(count, std::integral_constant<int, 1>{});
  };
  return cut.pixels == 112 ? with_stride(std::integral_constant<int, 112>{})
                           : with_stride(std::integral_constant<int, 128>{});
}

// The rows of 256x96 with halo, of which these are the second kernels, and fprop's of 256x32 in TF32.
template <Op op, DType dtype, int TM, int TN, Variant variant>
cudaError_t launch_held_or(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  if (part_supports(op, problem)) return launch_part<op, dtype>(problem, args, stream);
  if (ahead_supports(op, problem)) return launch_ahead<op, dtype>(problem, args, stream);
  if constexpr (op == Op::dgrad)
    if (held_supports(problem)) return launch_held<dtype>(problem, args, stream);
  return launch_row<op, dtype, TM, TN, variant>(problem, plan, args, stream);
}

}  // namespace conv2d_ext::tma

#define CONV2D_EXT_TMA_TF32_HELD_INSTANCE(family, op, dtype, tm, tn, tk, variant)                   \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                         \
    if constexpr (Op::op == Op::fprop)                                                              \
      if (ahead_supports(Op::op, p)) return tma::launch_ahead<Op::op, DType::f32>(p, args, stream); \
    return tf32::launch_row<Op::op, tm, tn, Variant::variant>(p, plan, args, stream);               \
  }
#define CONV2D_EXT_TMA_HELD_INSTANCE(family, op, dtype, tm, tn, tk, variant)                           \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                            \
    return tma::launch_held_or<Op::op, DType::dtype, tm, tn, Variant::variant>(p, plan, args, stream); \
  }
