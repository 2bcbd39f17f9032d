// wgrad over NCHW on Hopper's copy engine and tensor cores, f16, bf16 and TF32, stride 1 along W. The pixels that are
// summed over are contiguous in both operands, which are copied as they lie: boxes of 64 channels, or filters, by
// pixels of a row. What is outside of an image arrives as zeros.
//   out[filter; tap, channel] = sum over pixels of y[filter, pixel moved by the tap] * x[channel, pixel]
//
// Variant nchw (PlanesPieces): the rows of the instruction are 64 filters. The engine copies from multiples of 16 bytes
// on alone, so that pixels of y are moved along their row where they are loaded: y is the operand in registers. x is
// copied in the swizzled order of wgmma's operands. Each of three warpgroups has a tap of a row of the filter. The
// columns are up to three blocks of 64: rows of the filter, or channels if it has but one row. Of several rows blocks
// walk down an image: a row of y meets the rows of x that it needs in a ring of them. The first two of the ring lie
// behind its last, too, so that those of an instruction always follow each other.
//
// Blocks share the work as those of tma_wgrad.cuh do, in pieces of a few rows, and its second pass adds their parts.
#pragma once

#include "../core/tma_planes_wgrad.h"
#include "../core/tma_tf32.h"
#include "tma_wgrad.cuh"

namespace conv2d_ext::tma {

template <int tile_m>
struct PlanesShape {
  static constexpr bool filters = true;  // are rows
  static constexpr int TM = tile_m, TN = 64, row_groups = 1, halves = 1, warpgroups = kPlanesTaps;
  static constexpr int block = planes_block(TM), blocks = planes_blocks(TM), block_bytes = block * kLineBytes;
  static constexpr int columns = block * blocks, run_columns = columns, runs = 1;
  // Eight lines of the box begin in different banks.
  static constexpr int line = kPlanesBox, y_bytes = 64 * line;
  static_assert(line % 128 == 16 || line % 128 == 48);
  static constexpr int y_stages = 8, x_stages = 14;  // x_stages: at most
  static constexpr int room = 225 * 1024, shared_bytes = room + 1024;
  static constexpr int multiplying = 12, threads = 4 * kWarpgroup;  // multiplying: warps
  static constexpr int multiply_regs = 152, copy_regs = 56;
  static_assert((3 * multiply_regs + copy_regs) * kWarpgroup <= 65536);
};

constexpr int kLineParts = kLineBytes / 32;  // what an instruction sums over

template <class T, int TM, int stride>
struct WgradShape<T, Variant::nchw, TM, 64, stride> : PlanesShape<TM> {};

// r is none of the filter's where the run has fewer columns.
template <>
struct WgradRun<Variant::nchw> {
  int r, s, c;
  __device__ WgradRun(WgradParams const& p, int run, int column = 0) {
    s = run % p.s_runs;
    run /= p.s_runs;
    if (p.r_runs > 0) {
      r = run % p.r_runs * p.blocks + column / p.block;
      c = run / p.r_runs * p.block + column % p.block;
    } else {
      r = column < p.width ? 0 : p.R;
      c = run * p.width + column;
    }
  }
};

struct PlanesParams : WgradParams {
  int32_t row_chunks, parts, phases, step, piece_rows;  // PlanesPieces
  int32_t W, x_stages, x_bytes;
};

// Lines of pixels of x at (n, q), for `rows` rows of y, one below the other, from p on.
template <class T>
struct PlanesPiece {
  static constexpr int pixels = kLineBytes / int(sizeof(T));
  int n, p, q, rows;
  __device__ PlanesPiece(PlanesParams const& params, int piece) {
    int const chunk = piece % params.row_chunks;
    piece /= params.row_chunks;
    q = (chunk + piece / 7) % params.row_chunks * pixels;  // lest a block that takes every so many get all short ones
    int const first = piece % params.parts * params.piece_rows;
    piece /= params.parts;
    p = piece % params.phases + first * params.step;
    n = piece / params.phases;
    rows = min(params.piece_rows, (params.P - p + params.step - 1) / params.step);  // none, or fewer, of the last part
  }
};

// What a unit's tile is made of.
template <class T, class S>
struct PlanesTile {
  WgradRun<Variant::nchw> at;  // of the warpgroup
  int k;                       // its first filter
  int blocks;                  // of columns
  int taps;                    // rows of x that a row of y meets
  int shift;                   // from a pixel of x to the first of y's box

  __device__ PlanesTile(PlanesParams const& p, WgradUnit const& unit, int group)
      : at(p, unit.m * S::warpgroups + group),
        k(unit.n * S::TN),
        blocks(p.r_runs > 0 ? min(S::blocks, p.R - at.r) : (min(p.width, p.C - at.c) + 63) / 64),
        taps(p.r_runs > 0 ? blocks : 1) {
    int const last = min(at.s / kPlanesTaps * kPlanesTaps + kPlanesTaps, p.S) - 1;
    shift = (-p.w0 - last * p.dilation_w) & ~(16 / int(sizeof(T)) - 1);
  }
  __device__ int offset(PlanesParams const& p) const { return -p.w0 - at.s * p.dilation_w - shift; }
  __device__ bool idle(PlanesParams const& p) const { return at.s >= p.S || k >= p.K; }
};

// bars: of x's stages, then of y's.
template <class T, class S>
__device__ void planes_copy(PlanesParams const& p, uint32_t x_ring, uint32_t y_ring, uint64_t* full, uint64_t* empty) {
  Stage x, y;
  WgradUnit unit;
  for (WgradWork work(p); work.next(p, unit);) {
    PlanesTile<T, S> const tile(p, unit, 0);
    int const x_boxes = p.r_runs > 0 ? 1 : tile.blocks;
    for (int step = 0; step < unit.count; ++step) {
      PlanesPiece<T> const piece(p, unit.begin + step * unit.stride);
      if (piece.rows <= 0) continue;
#pragma unroll 1
      for (int i = 0; i < piece.rows + tile.taps - 1; ++i) {
        ptx::mbarrier_wait(&empty[x.index], x.parity ^ 1);
        uint64_t* bar = &full[x.index];
        bool const twice = x.index < tile.taps - 1;
        ptx::mbarrier_arrive_expect_tx(bar, x_boxes * S::block_bytes * (twice ? 2 : 1));
        int const h = p.h0 + (piece.p + i * p.step) * p.stride_h + tile.at.r * p.dilation_h;
        uint32_t const to = x_ring + x.index * p.x_bytes;
        for (int j = 0; j < x_boxes; ++j)
          ptx::cp_async_bulk_tensor_4d(to + j * S::block_bytes, &p.x, bar, piece.q, h, tile.at.c + j * S::block,
                                       piece.n);
        if (twice) ptx::cp_async_bulk_tensor_4d(to + p.x_stages * p.x_bytes, &p.x, bar, piece.q, h, tile.at.c, piece.n);
        x.advance(p.x_stages);
        if (i < tile.taps - 1) continue;
        ptx::mbarrier_wait(&empty[S::x_stages + y.index], y.parity ^ 1);
        bar = &full[S::x_stages + y.index];
        ptx::mbarrier_arrive_expect_tx(bar, S::y_bytes);
        ptx::cp_async_bulk_tensor_4d(y_ring + y.index * S::y_bytes, &p.y, bar, piece.q + tile.shift,
                                     piece.p + (i - tile.taps + 1) * p.step, tile.k, piece.n);
        y.advance(S::y_stages);
      }
    }
  }
}

// The fragments of 32 bytes of pixels; `at`: this lane's first word. 16-bit pixels from an odd one on lie in two words.
template <int line>
__device__ inline void planes_fragments(uint32_t (&a)[4], uint32_t at, bool odd) {
  auto from = [&](int i) { return at + i / 2 * 16 + i % 2 * 8 * line; };
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = ptx::ld_shared(from(i));
  if (!odd) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = __funnelshift_r(a[i], ptx::ld_shared(from(i) + 4), 16);
}

// Tensor cores cut off the lowest bits of what they add, in TF32 more than the result's: after so many rows of pixels
// the sums are added to what was stored before.
constexpr int kChainRows = int(kTf32Pixels) / wgrad_pixels(DType::f32);

// 64 filters by all columns, `parts` times 32 bytes of pixels. Fragments are loaded while the instructions of those
// before are under way. Variants for fewer columns, or for odd numbers of parts, would have the compiler run out of
// registers and wait for every instruction.
template <class T, int line, int parts, int count>
__device__ inline void planes_row(float (&acc)[count], uint32_t (&a)[kLineParts][1][4], uint32_t at, bool odd,
                                  uint64_t b) {
#pragma unroll
  for (int k = 0; k < parts; ++k) {
    ptx::wgmma_wait_group<parts - 1>();  // a[k] has been read
    ptx::wgmma_fence_operand(acc);
    planes_fragments<line>(a[k][0], at + k * 32, odd);
    ptx::wgmma_fence_operand(a[k]);
    ptx::wgmma_fence();
    if constexpr (std::is_same_v<T, float>)
      ptx::wgmma_mma_async_tf32(acc, a[k][0], b + k * 2);
    else
      ptx::wgmma_mma_async<T>(acc, a[k][0], b + k * 2);
    ptx::wgmma_commit_group();
  }
}

template <class T, class S>
__device__ void planes_sums(PlanesParams const& p, uint32_t x_ring, uint32_t y_ring, uint64_t* full, uint64_t* empty) {
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32;
  uint32_t const my_line = y_ring + (int(threadIdx.x) / 32 % 4 * 16 + lane / 4) * S::line + lane % 4 * 4;
  uint64_t const layout = ptx::wgmma_descriptor(0, 0, kCoreBytes);
  constexpr bool f32 = std::is_same_v<T, float>;
  auto release = [&](uint64_t* bar) {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(bar);
  };
  Stage x, y;
  float acc[S::columns / 2];
  uint32_t a[kLineParts][1][4];
  WgradUnit unit;
  for (WgradWork work(p); work.next(p, unit);) {
    PlanesTile<T, S> const tile(p, unit, group);
    bool const idle = warp_uniform(tile.idle(p));
    int const offset = warp_uniform(tile.offset(p));
    uint32_t const my_word = my_line + (f32 ? offset : offset / 2) * 4;
    bool const odd = !f32 && offset % 2 != 0;
    int held = 0, first_held = 0;  // stages of x that instructions under way may read
    auto release_held = [&] {
      for (; held > 0; --held) {
        release(&empty[first_held]);
        if (++first_held == p.x_stages) first_held = 0;
      }
    };
    int step = 0;
    do {
      bool const add = step > 0;
#pragma unroll
      for (int i = 0; i < S::columns / 2; ++i) acc[i] = 0;
      int before = 0;  // parts of the piece before
      int chain = 0;   // rows that are summed
      for (; step < unit.count; ++step) {
        PlanesPiece<T> const piece(p, unit.begin + step * unit.stride);
        if (piece.rows <= 0) continue;
        if (f32 && chain + piece.rows > kChainRows) break;
        chain += piece.rows;
        int const parts = warp_uniform(p.W - piece.q > piece.pixels / 2 ? 4 : 2);
        if (before < parts) ptx::wgmma_wait_group<0>();  // planes_row would let too many be under way
        before = parts;
        Stage ahead = x;
        for (int i = 0; i < tile.taps - 1; ++i) {
          ptx::mbarrier_wait(&full[ahead.index], ahead.parity);
          ahead.advance(p.x_stages);
        }
#pragma unroll 1
        for (int i = 0; i < piece.rows; ++i) {
          ptx::mbarrier_wait(&full[S::x_stages + y.index], y.parity);
          ptx::mbarrier_wait(&full[ahead.index], ahead.parity);
          ahead.advance(p.x_stages);
          if (!idle) {
            uint64_t const b = layout | ((x_ring + x.index * p.x_bytes) >> 4);
            uint32_t const at = my_word + y.index * S::y_bytes;
            if (parts == 4)
              planes_row<T, S::line, 4>(acc, a, at, odd, b);
            else
              planes_row<T, S::line, 2>(acc, a, at, odd, b);
          }
          release_held();  // planes_row has waited for the instructions of the row before
          release(&empty[S::x_stages + y.index]);
          y.advance(S::y_stages);
          first_held = x.index, held = i + 1 < piece.rows ? 1 : tile.taps;
          x.advance(p.x_stages);
        }
        x = ahead;
      }
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(acc);
      release_held();
      if (!idle) wgrad_store_part(p, int64_t(unit.slot) * (S::TM * S::TN) + group * 64 * S::columns, acc, f32 && add);
    } while (f32 && step < unit.count);
  }
}

template <class T, int TM>
__global__ void __launch_bounds__(PlanesShape<TM>::threads, 1)
    planes_wgrad_kernel(__grid_constant__ PlanesParams const p) {
  using S = PlanesShape<TM>;
  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t full[S::x_stages + S::y_stages], empty[S::x_stages + S::y_stages];
  uint32_t const x_ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024),
                 y_ring = x_ring + (p.x_stages + (p.r_runs > 0 ? S::blocks - 1 : 0)) * p.x_bytes;
  int const warp = warp_uniform(int(threadIdx.x) / 32);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::x_stages + S::y_stages; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], S::multiplying);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();  // the workspace may be read by the kernel before
  if (warp < S::multiplying) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    planes_sums<T, S>(p, x_ring, y_ring, full, empty);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    if (warp == S::multiplying && ptx::elect()) planes_copy<T, S>(p, x_ring, y_ring, full, empty);
  }
}

template <DType dtype, int TM>
cudaError_t launch_planes_wgrad(Row const& row, Problem const& given, Plan const& plan, Arguments args,
                                cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  using S = PlanesShape<TM>;
  constexpr bool f32 = dtype == DType::f32;
  Problem const problem = planes_problem(row, given);
  bool const exchanged = planes_exchanged(row, given);
  if (exchanged) {
    std::swap(args.a, args.b);
    args.out = static_cast<T*>(args.out) + (given.R - 1) * given.w.h + (given.S - 1) * given.w.w;
  }
  PlanesPieces const pieces(row, problem);
  WgradTiles const t = pieces.tiles(row, problem);
  int64_t const P = problem.P(), Q = problem.Q();
  PlanesParams p{};
  p.P = int32_t(P), p.W = int32_t(problem.W);
  p.h0 = -int32_t(problem.pad_top), p.w0 = -int32_t(problem.pad_left);
  p.stride_h = int32_t(problem.stride_h), p.stride_w = 1;
  p.dilation_h = int32_t(problem.dilation_h), p.dilation_w = int32_t(problem.dilation_w);
  p.R = int32_t(problem.R), p.S = int32_t(problem.S), p.C = int32_t(problem.C), p.K = int32_t(problem.K);
  p.s_runs = int32_t(pieces.s_runs), p.r_runs = int32_t(pieces.r_runs), p.width = int32_t(pieces.width);
  p.block = S::block, p.blocks = S::blocks;
  p.runs = int32_t(t.runs), p.steps = int32_t(t.steps), p.groups = 1, p.tiles_n = int32_t(ceil_div(problem.K, S::TN));
  p.row_chunks = int32_t(pieces.chunks), p.parts = int32_t(pieces.parts), p.phases = int32_t(pieces.phases);
  p.step = int32_t(pieces.step), p.piece_rows = int32_t(pieces.rows);
  p.x_bytes = (p.r_runs > 0 ? 1 : p.width / S::block) * S::block_bytes;
  p.x_stages = (S::room - S::y_stages * S::y_bytes) / p.x_bytes - (p.r_runs > 0 ? S::blocks - 1 : 0);
  p.x_stages = min(p.x_stages, S::x_stages);
  p.shares = wgrad_shares(t, plan.split_k);
  p.out_k = problem.w.n, p.out_c = problem.w.c, p.out_r = problem.w.h, p.out_s = problem.w.w;
  p.pairs = !exchanged && channel_vectors(problem.w, problem.w_align, p.C, 2, dtype);
  p.out = args.out, p.workspace = args.workspace;
  Strides const &x = problem.x, &y = problem.y;
  cudaError_t error =
      encode_tiled(p.x, {args.a, dtype, {problem.W, problem.H, problem.C, problem.N}, {1, x.h, x.c, x.n}, f32},
                   PlanesPiece<T>::pixels, 1, S::block, 1);
  if (error != cudaSuccess) return error;
  error = encode_boxes(p.y, {args.b, dtype, {Q, P, problem.K, problem.N}, {1, y.h, y.c, y.n}, f32},
                       kPlanesBox / size_of(dtype), 1, 64, 1);
  if (error != cudaSuccess) return error;
  auto* const kernel = planes_wgrad_kernel<T, TM>;
  if ((error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes)) !=
      cudaSuccess)
    return error;
  error = launch_dependent(kernel, dim3(unsigned(plan.split_k)), S::threads, S::shared_bytes, stream, p);
  if (error != cudaSuccess) return error;
  return launch_reduce<T, Variant::nchw, S::TM, S::TN>(problem, args, stream, p, plan.split_k);
}

}  // namespace conv2d_ext::tma

#define CONV2D_EXT_TMA_PLANES_WGRAD_INSTANCE(family, op, dtype, tm, tn, tk, variant)        \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                 \
    return tma::launch_planes_wgrad<DType::dtype, tm>(row_of(plan), p, plan, args, stream); \
  }
