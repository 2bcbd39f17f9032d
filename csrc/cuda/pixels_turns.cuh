// 1x1 fprop and dgrad over NCHW of 16-bit types in place, of many tiles: out[m, pixel] = sum over c of w[m, c] *
// in[c, pixel]. pixels_runs.cuh has those of few.
//
// Persistent blocks. A warpgroup has 64 filters (dgrad: channels) by 256 pixels, four runs of 64 of any images, or 128
// by 128, or by 144 or 160 pixels of one image. Tiles are the warpgroups' in turns, so that one stores while the other
// multiplies, but for those of 128 by 256, which are both's. A thread
// copies the filters' part of a step of 64 channels and another the pixels', which lie as they come (N-major), into one
// ring. Results are put into pieces of 16 rows by 64 pixels, which the copy engine stores; it leaves out what lies
// outside of the tensor. The code is short on purpose: what runs first comes from memory.
//
// blockIdx.y: the group.
//
// Turns: a warpgroup begins a tile when the other has seen all stages of the one before arrive, lest it wait for a
// stage two trips round the ring ahead, whose parity is that of now.
#pragma once

#include "../core/pixels_runs.h"
#include "dependent.cuh"
#include "pixels_maps.cuh"

namespace conv2d_ext::pixel_turns {

using tma::Divisor;

constexpr int kRunBytes = 64 * kLineBytes;
constexpr int kPieces = 2, kPieceBytes = 16 * kLineBytes, kWarps = 8;  // kWarps: that multiply
constexpr int kThreads = 3 * kWarpgroup;
// 64K registers: two multiplying warpgroups and one that copies.
constexpr int kMultiplyRegs = 232, kCopyRegs = 40;
static_assert((2 * kMultiplyRegs + kCopyRegs) * kWarpgroup <= 65536);

template <int TM, int TN>
struct Shape {
  static constexpr bool turns = TM == 64 || TN < 256;
  static constexpr int blocks = turns ? TM / 64 : 1;  // of 64 rows, a warpgroup
  static constexpr int runs = (TN + 63) / 64, last = TN % 64;
  static constexpr bool of_image = last != 0;  // a tile's pixels are one image's
  static constexpr int stage_bytes = TM * kLineBytes + runs * kRunBytes;
  static constexpr int stages = 196 * 1024 / stage_bytes < 6 ? 196 * 1024 / stage_bytes : 6;
  static constexpr int shared_bytes = stages * stage_bytes + kWarps * kPieces * kPieceBytes + 1024;
};

struct Params {
  CUtensorMap a, b, out;
  CUtensorMap b_end;             // of an image's last run, if it is no whole one
  CUtensorMap b_last, out_last;  // of a tile's last run, if it is no whole one
  Divisor tiles_m, per_image;    // per_image: runs
  int32_t tiles, steps, M, images;
  int32_t pixels;  // of an image
  int32_t lines;   // of a step: channels, 64 or, of fewer, 16 to 48
  bool stays;      // all filters do, each tile's step in the place of its own among the stages
  bool rotates;    // see tile_of
  bool once;       // L2 gives up pixels first
  void const* bias;
  int64_t bias_stride;
};

template <class T, int TM, int TN, bool a_rows>
__global__ void __launch_bounds__(kThreads, 1) main_kernel(__grid_constant__ Params const p) {
  using S = Shape<TM, TN>;
  constexpr int kRuns = S::runs;
  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t full_a[S::stages], full_b[S::stages], empty[S::stages];
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), warp = warp_uniform(int(threadIdx.x) / 32 % 4);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; ++i) {
      ptx::mbarrier_init(&full_a[i], 1);
      ptx::mbarrier_init(&full_b[i], 1);
      ptx::mbarrier_init(&empty[i], S::turns ? 4 : kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  auto place_of = [&](int first, int run, int& pixel) {  // of a tile's run
    int at = S::of_image ? first : first + run;
    int const image = p.per_image.divide(at);
    pixel = S::of_image ? at * TN + run * 64 : at * 64;
    return image;
  };
  // Its first run of pixels; m: of tiles of rows. Where as many blocks as there are fit all rows, a block would have
  // the same ones in each turn, and some of them may end early: so it has the next ones in its next turn.
  auto tile_of = [&](int tile, int i, int& m) {
    m = tile;
    int const first = p.tiles_m.divide(m) * (S::of_image ? 1 : kRuns);
    if (p.rotates) {
      p.tiles_m.divide(i);
      m += i;
      if (m >= int(p.tiles_m.value)) m -= int(p.tiles_m.value);
    }
    return first;
  };
  if (group == 2) {
    ptx::setmaxnreg_dec<kCopyRegs>();
    if (warp >= 2 || !ptx::elect()) return;
    ptx::griddepcontrol_wait();
    auto copy_a = [&](int m0, int step, int stage) {
      uint32_t const to = ring + stage * S::stage_bytes;
      uint64_t* const full = &full_a[stage];
      int const boxes = min(TM / 64, (p.M - m0 + 63) / 64);  // of turned filters
      ptx::mbarrier_arrive_expect_tx(full, (a_rows ? boxes * p.lines : TM) * kLineBytes);
      if constexpr (a_rows) {
#pragma unroll 1
        for (int i = 0; i < boxes; ++i)
          ptx::cp_async_bulk_tensor_4d(to + i * kRunBytes, &p.a, full, m0 + i * 64, step * 64, int(blockIdx.y), 0);
      } else {
        ptx::cp_async_bulk_tensor_4d(to, &p.a, full, step * 64, m0, int(blockIdx.y), 0);
      }
    };
    if (warp == 0 && p.stays) {
#pragma unroll 1
      for (int i = 0; i < int(p.tiles_m.value) * p.steps; ++i) copy_a(i / p.steps * TM, i % p.steps, i);
      ptx::griddepcontrol_launch_dependents();
      for (int i = 0; i < int(p.tiles_m.value) * p.steps; ++i)  // shared memory ends with the block
        ptx::mbarrier_wait(&full_a[i], 0);
      return;
    }
    Stage stage;
    uint64_t const once = p.once ? ptx::createpolicy_evict_first() : 0;
#pragma unroll 1
    for (int tile = int(blockIdx.x), i = 0; tile < p.tiles; tile += int(gridDim.x), ++i) {
      int m0, pixel[kRuns], image[kRuns];
      int const first = tile_of(tile, i, m0);
      m0 *= TM;
#pragma unroll
      for (int i = 0; i < kRuns; ++i) image[i] = place_of(first, i, pixel[i]);
      // Boxes that reach beyond the image take the engine longer.
      int width = 0;
#pragma unroll
      for (int i = 0; i < kRuns; ++i)
        width += S::of_image && i == kRuns - 1 ? S::last : S::of_image ? 64 : min(64, p.pixels - pixel[i]);
#pragma unroll 1
      for (int step = 0; step < p.steps; ++step, stage.advance(S::stages)) {
        uint32_t const to = ring + stage.index * S::stage_bytes;
        ptx::mbarrier_wait(&empty[stage.index], stage.parity ^ 1);  // passes on the first trip round the ring
        if (warp == 1) {
          uint64_t* const full = &full_b[stage.index];
          ptx::mbarrier_arrive_expect_tx(full, width * p.lines * 2);
#pragma unroll
          for (int i = 0; i < kRuns; ++i) {
            uint32_t const run = to + TM * kLineBytes + i * kRunBytes;
            CUtensorMap const& map = S::of_image                 ? i == kRuns - 1 ? p.b_last : p.b
                                     : pixel[i] + 64 <= p.pixels ? p.b
                                                                 : p.b_end;
            if (once != 0)
              ptx::cp_async_bulk_tensor_4d(run, &map, full, pixel[i], step * 64, image[i], int(blockIdx.y), once);
            else
              ptx::cp_async_bulk_tensor_4d(run, &map, full, pixel[i], step * 64, image[i], int(blockIdx.y));
          }
        } else {
          copy_a(m0, step, stage.index);
        }
      }
    }
    ptx::griddepcontrol_launch_dependents();
    return;
  }
  ptx::setmaxnreg_inc<kMultiplyRegs>();
  int const lane = int(threadIdx.x) % 32;
  uint64_t const layout_a = a_rows ? ptx::wgmma_descriptor(0, kRunBytes, kCoreBytes) : tma::layout_of(kLineBytes),
                 layout_b = ptx::wgmma_descriptor(0, kRunBytes, kCoreBytes);
  constexpr uint32_t step_a = a_rows ? 2 * kCoreBytes : 32;
  uint32_t const pieces = ring + S::stages * S::stage_bytes + (group * 4 + warp) * (kPieces * kPieceBytes);
  // stmatrix stores two blocks of 8 columns of 16 rows.
  uint32_t const row = pieces + (lane % 16) * kLineBytes, place = uint32_t((lane / 16) ^ (lane % 8)) * 16;
  int position = S::turns ? group * p.steps : 0;  // in the ring, of all steps
#pragma unroll 1
  for (int i = S::turns ? group : 0;; i += S::turns ? 2 : 1) {
    int const tile = int(blockIdx.x) + i * int(gridDim.x);
    if (tile >= p.tiles) break;
    int m;
    int const first = tile_of(tile, i, m), place_a = m * p.steps;
    m = m * TM + (S::turns ? 0 : group * 64) + warp * 16;
    if (!S::turns && m - warp * 16 >= p.M) {  // none of the rows
#pragma unroll 1
      for (int step = 0; step < p.steps; ++step, ++position) {
        ptx::mbarrier_wait(&full_b[position % S::stages], position / S::stages % 2);
        __syncwarp();  // no lane falls behind
        if (lane == 0) ptx::mbarrier_arrive(&empty[position % S::stages]);
      }
      continue;
    }
    float acc[S::blocks][TN / 2] = {};
    auto fence_operands = [&] {
#pragma unroll
      for (int b = 0; b < S::blocks; ++b) ptx::wgmma_fence_operand(acc[b]);
    };
    if (S::turns && i > 0) ptx::bar_sync(1 + group, 2 * kWarpgroup);
    int before = -1;
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step, ++position) {
      int const stage = position % S::stages;
      uint32_t const parity = position / S::stages % 2, from = ring + stage * S::stage_bytes;
      int const stage_a = p.stays ? place_a + step : stage;
      uint32_t const from_a = ring + stage_a * S::stage_bytes + (S::turns ? 0 : group * kRunBytes);
      ptx::mbarrier_wait(&full_a[stage_a], p.stays ? 0 : parity);
      ptx::mbarrier_wait(&full_b[stage], parity);
      auto multiply = [&](int k) {
#pragma unroll
        for (int b = 0; b < S::blocks; ++b)
          ptx::wgmma_mma_async<T, a_rows, true>(
              acc[b], tma::at_address(layout_a, from_a + b * kRunBytes + k * step_a),
              tma::at_address(layout_b, from + TM * kLineBytes + k * (2 * kCoreBytes)));
      };
      fence_operands();
      if (p.lines == 64) {
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply(k);
        ptx::wgmma_commit_group();
      } else {
#pragma unroll 1
        for (int k = 0; k < p.lines / 16; ++k) {
          ptx::wgmma_fence();
          multiply(k);
          ptx::wgmma_commit_group();
        }
      }
      ptx::wgmma_wait_group<1>();
      fence_operands();
      if (before >= 0 && lane == 0) ptx::mbarrier_arrive(&empty[before]);
      before = stage;
    }
    if (S::turns) {
      position += p.steps;  // the other's
      if (tile + int(gridDim.x) < p.tiles) ptx::bar_arrive(2 - group, 2 * kWarpgroup);
    }
    ptx::wgmma_wait_group<0>();
    fence_operands();
    if (lane == 0) ptx::mbarrier_arrive(&empty[before]);
    if (p.bias != nullptr) {
      ptx::griddepcontrol_wait();
#pragma unroll
      for (int b = 0; b < S::blocks; ++b) {
        float bias[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (int const at = m + b * 64 + lane / 4 + half * 8; at < p.M)
            bias[half] = widen(static_cast<T const*>(p.bias)[(int64_t(blockIdx.y) * p.M + at) * p.bias_stride]);
#pragma unroll
        for (int j = 0; j < TN / 2; ++j) acc[b][j] += bias[j / 2 % 2];
      }
    }
#pragma unroll
    for (int i = 0; i < S::blocks * kRuns; ++i) {
      int const b = i / kRuns, run = i % kRuns;
      bool const last = S::of_image && run == kRuns - 1;
      uint32_t const offset = i % kPieces * kPieceBytes;
      if (lane == 0) ptx::cp_async_bulk_wait_group_read<kPieces - 1>();  // the piece is free
      __syncwarp();
#pragma unroll
      for (int j = 0; j < (last ? S::last / 8 : 8); j += 2) {
        float const* const v = acc[b] + run * 32 + j * 4;
        uint32_t const words[4] = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
        ptx::stmatrix_x4(row + offset + (place ^ (j * 16)), words);
      }
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) {
        int pixel;
        int const image = place_of(first, run, pixel);
        if (image < p.images && m + b * 64 < p.M)
          ptx::cp_async_bulk_tensor_4d_store(last ? &p.out_last : &p.out, pieces + offset, pixel, m + b * 64, image,
                                             int(blockIdx.y));
        ptx::cp_async_bulk_commit_group();
      }
    }
  }
  if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();  // shared memory ends with the block
}

template <Op op, DType dtype, int TM, int TN>
cudaError_t launch(Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using S = Shape<TM, TN>;
  Problem const g = group_of(problem);
  PixelRuns const t(TM, TN, op, g);
  Params p{};
  p.tiles = int32_t(t.tiles);
  int64_t const depth = op == Op::fprop ? g.C : g.K;
  p.lines = depth < 64 ? int32_t(ceil_div(depth, 16) * 16) : 64;
  if (auto const error = pixel_runs::set_params<op, dtype>(p, t, problem, args, TM, 64, p.lines, &p.b_end, S::last,
                                                           &p.b_last, &p.out_last))
    return error;
  p.pixels = int32_t(problem.H * problem.W);
  int sm_count = 0;
  if (auto const error = count_sms(sm_count)) return error;
  int64_t const blocks = min64(t.tiles, group_blocks(problem, sm_count));
  p.stays =
      t.tiles_m * p.steps <= S::stages && t.tiles >= t.tiles_m * blocks;  // else a block copies more than it needs
  p.rotates = blocks % t.tiles_m == 0, p.once = pixels_once(problem);
  auto* const kernel = main_kernel<typename TypeOf<dtype>::type, TM, TN, op == Op::dgrad>;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes))
    return error;
  return launch_dependent(kernel, dim3(unsigned(blocks), unsigned(problem.groups)), kThreads, S::shared_bytes, stream,
                          p);
}

}  // namespace conv2d_ext::pixel_turns

#define CONV2D_EXT_PIXEL_TURNS_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                     \
    return pixel_turns::launch<Op::op, DType::dtype, tm, tn>(p, args, stream);  \
  }
