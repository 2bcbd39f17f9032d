// wgrad in channels_last on Hopper's copy engine and tensor cores, f16 and bf16: the sibling of tma.cuh.
//   out[tap, channel; filter] = sum over pixels of x[pixel moved by the tap, channel] * y[pixel, filter]
// A stage holds 64 pixels. Both operands are contiguous along their rows, not along the pixels that are summed over: M-
// and N-major.
//
// Variant im2col: rows are runs of 64 channels of one tap, TM / 64 of them a tile; columns are TN filters. Each run of
// x comes by an im2col copy of its own.
//
// Variants halo and narrow: filters are the rows of the instruction; its columns are one or more runs of x, and each
// multiplying warpgroup has columns of its own.
//   halo (stride 1 or 2 along W): a run is 64 channels of kTaps taps of a row of the filter. x's pixels include the
//   padded columns, so that those of the next tap are the same lines moved by the dilation: one copy serves the run,
//   and the distance of the instruction's blocks of 64 columns is that of two taps, some lines. y is zero at padded
//   columns. With stride 2 that holds of every other tap, so the one between has a copy and an instruction of its own.
//   narrow: a run is the 32 channels of a tap; lines of 64 bytes.
//
// WgradShares says which tiles and steps a block has. Parts of tiles go to the workspace, and wgrad_reduce adds them in
// the order of the blocks.
#pragma once

#include "merged.cuh"
#include "tma_lag.cuh"
#include "tma_phases.cuh"
#include "tma_small.cuh"
#include "tma_swap.cuh"
#include "tma_swap_wide.cuh"

namespace conv2d_ext::tma {

constexpr int kPixels = kWgradPixels, kTaps = kWgradTaps;

// A stage holds x_copies runs of x and y_copies times 64 filters of y. An instruction's rows are 64, its columns
// `columns`; a multiplying warpgroup has `halves` of them, and `runs` of the runs.
template <class T, Variant variant, int TM, int TN, int stride = 1>
struct WgradShape {
  static constexpr bool filters = false;  // are rows
  static constexpr int row_groups = 1;    // warpgroups that share the columns
  static constexpr int warpgroups = TM == 64 ? 1 : 2, halves = TM / 64 / warpgroups, columns = TN, runs = halves;
  static constexpr int blocks = TM == 64 ? 2 : Shape<T, TM, TN>::blocks, threads = (warpgroups + 1) * kWarpgroup;
  static constexpr int copy_regs = blocks == 2 ? 48 : 56, multiply_regs = TM == 64 ? 160 : blocks == 2 ? 96 : 224;
  static constexpr int line_bytes = kLineBytes, x_bytes = kRunBytes;  // x_bytes: of a run
  static constexpr int x_copies = TM / 64, y_copies = (TN + 63) / 64;
  static constexpr int x_at = 0, y_at = x_copies * x_bytes, stage_bytes = y_at + y_copies * kRunBytes;
  // Results on their way to memory: 64 channels of TN filters for each multiplying warpgroup.
  static constexpr int staging_bytes = TN * kLineBytes, room = (blocks == 2 ? 111 : 225) * 1024;
  static constexpr int stages = room / stage_bytes;
  static constexpr int stages_beside_staging = (room - warpgroups * staging_bytes) / stage_bytes;
  static constexpr int shared_bytes = room + 1024;
  static_assert(blocks * (shared_bytes + 16 * stages + 1024) <= 228 * 1024);  // an SM keeps one more of each block
};

// Of the variants whose rows are filters.
template <class T, Variant variant, int TM, int TN, int stride>
  requires(variant != Variant::im2col)
struct WgradShape<T, variant, TM, TN, stride> {
  static constexpr bool halo = is_halo(variant), filters = true;
  static constexpr int row_groups = 1;
  static constexpr int columns = halo ? kTaps * 64 : 160, run_columns = halo ? columns : 32;
  static constexpr int warpgroups = TM / columns, halves = TN / 64, runs = columns / run_columns;
  static constexpr int blocks = 1, threads = (warpgroups + 1) * kWarpgroup;
  static constexpr int copy_regs = 56, multiply_regs = warpgroups == 3 ? 152 : 224;
  static_assert((warpgroups * multiply_regs + copy_regs) * kWarpgroup <= 65536);
  static constexpr int line_bytes = halo ? kLineBytes : kLineBytes / 2;
  static constexpr int x_bytes = (halo ? kPixels + kHalo : kPixels) * line_bytes;
  static constexpr int x_copies = warpgroups * runs * stride, y_copies = halves;
  // y last: compute-sanitizer takes halo's blocks of columns, which lie over each other, for one behind the other.
  static constexpr int x_at = 0, y_at = x_copies * x_bytes, stage_bytes = y_at + y_copies * kRunBytes;
  static constexpr int stages = 225 * 1024 / stage_bytes, shared_bytes = stages * stage_bytes + 1024;
  static_assert(x_bytes % kCoreBytes == 0);
};

// im2col with filters as rows: two warpgroups with 64 filters each meet the same columns.
template <class T>
struct WgradShape<T, Variant::im2col, 192, 128> {
  static constexpr bool filters = true;
  static constexpr int row_groups = 2, warpgroups = 1, halves = 2, columns = 192, run_columns = 64, runs = 3;
  static constexpr int blocks = 1, threads = 3 * kWarpgroup, copy_regs = 56, multiply_regs = 224;
  static constexpr int line_bytes = kLineBytes, x_bytes = kRunBytes, x_copies = 3, y_copies = 2;
  static constexpr int x_at = 0, y_at = x_copies * x_bytes, stage_bytes = y_at + y_copies * kRunBytes;
  static constexpr int stages = 225 * 1024 / stage_bytes, shared_bytes = stages * stage_bytes + 1024;
};

struct WgradParams {
  CUtensorMap x, y, w;  // w: what whole tiles are stored to
  int32_t P, columns;   // rows and columns of y; columns may include padded ones
  int32_t h0, w0, stride_h, stride_w, dilation_h, dilation_w;
  int32_t R, S, C, K;             // C, K: of a group
  int32_t s_runs, r_runs, width;  // nchw: PlanesPieces
  int32_t block, blocks;          // of columns
  int32_t runs, chunks;           // chunks: runs a tap
  int32_t steps, groups;
  int32_t tiles_n;
  int32_t stages;
  int32_t copy_bytes;  // of a run
  WgradShares shares;
  int64_t out_k, out_c, out_r, out_s;
  bool pairs;    // of channels are stored at once
  OwnGroup own;  // of merged ones
  void* out;
  void* workspace;
};

// What a block works on next.
struct WgradUnit {
  int32_t m, n, group;
  int32_t begin, count, stride;  // steps
  int32_t slot;                  // of the partial tile in the workspace, or -1: the tile is whole

  __device__ void locate(WgradParams const& p, int tile) {
    n = tile % p.tiles_n;
    tile /= p.tiles_n;
    group = tile % p.groups;
    m = tile / p.groups;
  }
};

// A block's parts of the work, in turn.
class WgradWork {
  int tile_;
  int64_t strip_, strip_end_;

 public:
  WgradWork() = default;
  __device__ explicit WgradWork(WgradParams const& p) : tile_(int(blockIdx.x)), strip_(0), strip_end_(0) {
    WgradShares const& s = p.shares;
    int64_t const worker = blockIdx.x - s.shared * s.aligned;
    if (worker < 0 || s.strip_workers == 0) return;
    strip_ = worker * (s.shared * s.strip_steps) / s.strip_workers;
    strip_end_ = (worker + 1) * (s.shared * s.strip_steps) / s.strip_workers;
  }
  __device__ bool next(WgradParams const& p, WgradUnit& unit) {
    WgradShares const& s = p.shares;
    int const shared = tile_ - int(s.whole);
    if (shared < 0) {
      unit.locate(p, tile_);
      unit.begin = 0, unit.count = p.steps, unit.stride = 1, unit.slot = -1;
      tile_ += int(gridDim.x);
      return true;
    }
    // Past the whole tiles, of which each block has as many, tile_ counts blocks again.
    if (shared < s.shared * s.aligned) {
      int64_t tile = shared;
      int64_t const part = divide(tile, s.shared);
      unit.locate(p, int(s.whole + tile));
      unit.begin = int(part), unit.stride = int(s.aligned);
      unit.count = (int(s.aligned_steps) - unit.begin + unit.stride - 1) / unit.stride;
      unit.slot = shared;
      tile_ += 1 << 30;
      return true;
    }
    if (strip_ >= strip_end_) return false;
    int64_t rest = strip_;
    int64_t const tile = divide(rest, s.strip_steps);
    unit.locate(p, int(s.whole + tile));
    unit.count = int(min64(strip_end_ - strip_, s.strip_steps - rest));
    // Downwards, so that blocks with the ends, or the beginnings, of strips keep pace.
    unit.begin = int(s.aligned_steps + rest) + unit.count - 1, unit.stride = -1;
    unit.slot = int(blockIdx.x + tile);  // both grow along the strips
    strip_ += unit.count;
    return true;
  }
};

// The first pixel of a unit's steps, in turn. Divisions at each step took longer than its copies.
struct WgradPixel {
  int n, p, q;
  int next_n, next_p, next_q;  // from a step to the next; backwards, if that is so, in images alone

  WgradPixel() = default;
  __device__ WgradPixel(WgradParams const& params, WgradUnit const& unit) {
    int64_t column = int64_t(unit.begin) * kPixels, row = divide(column, params.columns);
    n = int(divide(row, params.P)), p = int(row), q = int(column);
    int64_t const image = int64_t(params.P) * params.columns, by = int64_t(unit.stride) * kPixels;
    next_n = by < 0 ? -int((image - 1 - by) / image) : 0;
    column = by - next_n * image, row = divide(column, params.columns);
    next_n += int(divide(row, params.P)), next_p = int(row), next_q = int(column);
  }
  __device__ void advance(WgradParams const& params) {
    q += next_q, p += next_p, n += next_n;
    if (q >= params.columns) q -= params.columns, ++p;
    if (p >= params.P) p -= params.P, ++n;
  }
};

// What a column of a run is. halo: rows of the filter first, so that neighbours share pixels.
template <Variant variant>
struct WgradRun {
  int r, s, c;
  __device__ WgradRun(WgradParams const& p, int run, int column = 0) {
    if constexpr (is_halo(variant)) {
      r = run % p.R;
      int const rest = run / p.R, in_row = (p.S + kTaps - 1) / kTaps;
      s = rest % in_row * kTaps + column / 64 * p.stride_w % kTaps;  // stride 2: taps 0, 2, 1
      c = rest / in_row * 64 + column % 64;
    } else {
      int const tap = run / p.chunks;
      r = tap / p.S, s = tap % p.S;
      c = run % p.chunks * 64 + column;
    }
  }
};

// A copying warp's units, in turn: of each its copies and its first pixel. The first unit is worked out while other
// warps set up the barriers.
template <class T, Variant variant, int TM, int TN, int stride>
struct WgradCopies {
  using S = WgradShape<T, variant, TM, TN, stride>;
  static constexpr int each = (S::x_copies + S::y_copies + 3) / 4;
  static constexpr int copiers = S::x_copies + S::y_copies < 4 ? S::x_copies + S::y_copies : 4;  // warps
  WgradWork work;
  WgradUnit unit;
  WgradPixel pixel;
  int of_x, bytes, c[each], offset_h[each],
      offset_w[each];  // of_x: copies of x; bytes: of the warp's copies of a step, may be none
  bool more;

  __device__ void begin(WgradParams const& p, int warp) {
    work = WgradWork(p);
    next(p, warp);
  }
  __device__ void next(WgradParams const& p, int warp) {
    more = work.next(p, unit);
    if (!more) return;
    int const first = unit.m * (S::x_copies / stride);  // run
    of_x = min((p.runs - first) * stride, S::x_copies), bytes = 0;
#pragma unroll
    for (int i = 0; i < each; ++i) {
      int const copy = warp + 4 * i;
      bytes += copy < of_x ? p.copy_bytes : copy >= S::x_copies && copy < S::x_copies + S::y_copies ? kRunBytes : 0;
      WgradRun<variant> const run(p, first + copy / stride);
      offset_h[i] = run.r * p.dilation_h, offset_w[i] = (run.s + copy % stride) * p.dilation_w;
      c[i] = copy < S::x_copies ? unit.group * p.C + run.c : unit.group * p.K + unit.n * TN + (copy - S::x_copies) * 64;
    }
    pixel = WgradPixel(p, unit);
  }
};

// One thread of each warp of the last warpgroup shares in the copies: one alone would take longer to issue them than a
// step is multiplied. Each arrives, also if a tile of few runs leaves it nothing to copy: a stage that did not wait for
// it could get two trips round the ring ahead of it, of which parity tells nothing, and it would wait for ever.
template <class T, Variant variant, int TM, int TN, int stride>
__device__ void wgrad_copy(WgradParams const& p, uint32_t ring, uint32_t full, uint32_t empty, int warp,
                           WgradCopies<T, variant, TM, TN, stride>& copies) {
  using S = WgradShape<T, variant, TM, TN, stride>;
  if (warp >= copies.copiers) return;
  Stage stage;
  for (; copies.more; copies.next(p, warp)) {
    WgradPixel& pixel = copies.pixel;
#pragma unroll 1
    for (int step = 0; step < copies.unit.count; ++step, pixel.advance(p)) {
      int const h = p.h0 + pixel.p * p.stride_h, w = p.w0 + pixel.q * p.stride_w;
      uint32_t const bar = full + stage.index * 8;
      ptx::mbarrier_wait(empty + stage.index * 8, stage.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(bar, copies.bytes);
      uint32_t const to = ring + stage.index * S::stage_bytes;
#pragma unroll
      for (int i = 0; i < copies.each; ++i) {
        int const copy = warp + 4 * i;
        if (copy < copies.of_x)
          ptx::cp_async_bulk_tensor_im2col(to + S::x_at + copy * S::x_bytes, &p.x, bar, copies.c[i], w, h, pixel.n,
                                           copies.offset_w[i], copies.offset_h[i]);
        else if (copy >= S::x_copies && copy < S::x_copies + S::y_copies)
          ptx::cp_async_bulk_tensor_im2col(to + S::y_at + (copy - S::x_copies) * kRunBytes, &p.y, bar, copies.c[i],
                                           pixel.q, pixel.p, pixel.n, 0, 0);
      }
      stage.advance(p.stages);
    }
  }
}

// Stores a warpgroup's sums `first` elements into the workspace, or adds them to what is there: a thread's neighbours
// together, and those of all threads.
template <int count>
__device__ inline void wgrad_store_part(WgradParams const& p, int64_t first, float const (&acc)[count],
                                        bool add = false) {
  float4* const to = static_cast<float4*>(p.workspace) + first / 4 + threadIdx.x % kWarpgroup;
#pragma unroll
  for (int j = 0; j < count / 4; ++j) {
    float4 v = make_float4(acc[j * 4], acc[j * 4 + 1], acc[j * 4 + 2], acc[j * 4 + 3]);
    if (add) {
      float4 const before = to[j * kWarpgroup];
      v = make_float4(before.x + v.x, before.y + v.y, before.z + v.z, before.w + v.w);
    }
    to[j * kWarpgroup] = v;
    if (add && j % 4 == 3) ptx::compiler_fence();
  }
}

// Stores a warpgroup's sums, 64 channels of a run by TN filters. A thread has those of rows lane / 4 and lane / 4 + 8
// of its warp's 16, columns 8 j + 2 (lane % 4) + {0, 1}. They are turned round on the way through shared memory, where
// a line is a filter; the copy engine stores the lines.
template <class T, int TN>
__device__ void wgrad_store(WgradParams const& p, WgradUnit const& unit, int run, float const (&acc)[TN / 2],
                            uint32_t staging) {
  int const group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
  bool const stores = threadIdx.x % kWarpgroup == 0;
  if (stores) ptx::cp_async_bulk_wait_group_read<0>();  // the lines are free
  ptx::bar_sync(1 + group, kWarpgroup);
#pragma unroll
  for (int t = 0; t < TN / 16; ++t) {  // 16 filters
    uint32_t const v[4] = {pack<T>(acc[t * 8], acc[t * 8 + 1]), pack<T>(acc[t * 8 + 2], acc[t * 8 + 3]),
                           pack<T>(acc[t * 8 + 4], acc[t * 8 + 5]), pack<T>(acc[t * 8 + 6], acc[t * 8 + 7])};
    int const line = t * 16 + lane / 16 * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
    ptx::stmatrix_x4_trans(staging + line * kLineBytes + (chunk ^ (line % 8)) * 16, v);
  }
  ptx::fence_proxy_async();
  ptx::bar_sync(1 + group, kWarpgroup);
  int const tap = run / p.chunks;
  if (p.own.C > 0) {  // a run is all channels of a tap; a thread stores two of them at a time
    if (run >= p.runs) return;
    T* const out = static_cast<T*>(p.out) + tap / p.S * p.out_r + tap % p.S * p.out_s;
    int const pairs = p.own.C / 2, filters = min(TN, p.own.filters(unit.group, p.K) - unit.n * TN);
    for (int i = int(threadIdx.x) % kWarpgroup; i < filters * pairs; i += kWarpgroup) {
      int const line = i / pairs, own = i % pairs * 2, k = unit.n * TN + line, byte = (p.own.first(k) + own) * 2;
      *reinterpret_cast<uint32_t*>(out + (int64_t(unit.group) * p.K + k) * p.out_k + own) =
          ptx::ld_shared(staging + line * kLineBytes + (byte / 16 ^ line % 8) * 16 + byte % 16);
    }
    return;
  }
  if (stores && run < p.runs) {
    ptx::cp_async_bulk_tensor_store_5d(&p.w, staging, run % p.chunks * 64, tap % p.S, tap / p.S, unit.n * TN,
                                       unit.group);
    ptx::cp_async_bulk_commit_group();
  }
}

template <class T, Variant variant, int TM, int TN, int stride>
__device__ void wgrad_multiply(WgradParams const& p, uint32_t ring, uint64_t* full, uint64_t* empty) {
  using S = WgradShape<T, variant, TM, TN, stride>;
  constexpr bool filters = S::filters;
  constexpr int halves = S::halves / S::row_groups;  // of a warpgroup
  constexpr int core_bytes = 8 * S::line_bytes;      // of B
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32;
  uint32_t const full_at = warp_uniform(ptx::shared_address(full));
  uint32_t const empty_at = warp_uniform(ptx::shared_address(empty));
  int const my_x = S::x_at + group / S::row_groups * (S::runs * stride) * S::x_bytes,
            a_at = filters ? S::y_at + group % S::row_groups * halves * kRunBytes : my_x,
            b_at = filters ? my_x : S::y_at;
  // Of B's blocks of 64, or 32, columns.
  uint32_t const distance = is_halo(variant) ? p.dilation_w * kLineBytes : S::line_bytes * kPixels;
  auto release = [&](int stage) {  // -1: none
    if (lane == 0 && stage >= 0) ptx::mbarrier_arrive(empty_at + stage * 8);
  };
  Stage stage;
  float acc[halves][S::columns / 2];
  WgradUnit unit;
  for (WgradWork work(p); work.next(p, unit);) {
    int const first = (unit.m * S::warpgroups + group / S::row_groups) * S::runs;
    if (first >= p.runs) {  // nothing to do
      for (int step = 0; step < unit.count; ++step) {
        ptx::mbarrier_wait(full_at + stage.index * 8, stage.parity);
        release(stage.index);
        stage.advance(p.stages);
      }
      continue;
    }
#pragma unroll
    for (int h = 0; h < halves; ++h)
#pragma unroll
      for (int i = 0; i < S::columns / 2; ++i) acc[h][i] = 0;
    int before = -1;
    for (int step = 0; step < unit.count; ++step) {
      ptx::mbarrier_wait(full_at + stage.index * 8, stage.parity);
      uint32_t const from_a = ring + stage.index * S::stage_bytes + a_at;
      uint32_t const from_b = ring + stage.index * S::stage_bytes + b_at;
#pragma unroll
      for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kPixels / 16; ++k)
#pragma unroll
        for (int h = 0; h < halves; ++h) {
          uint64_t const a = ptx::wgmma_descriptor(from_a + h * kRunBytes + k * 2 * kCoreBytes, kRunBytes, kCoreBytes);
          auto b = [&](int copy) {
            uint32_t const from = from_b + copy * S::x_bytes + k * 2 * core_bytes;
            return ptx::wgmma_descriptor<S::line_bytes>(from, distance, core_bytes);
          };
          if constexpr (stride == 1) {
            ptx::wgmma_mma_async<T, true, true>(acc[h], a, b(0));
          } else {
            ptx::wgmma_mma_async<T, true, true>(reinterpret_cast<float (&)[64]>(acc[h]), a, b(0));
            ptx::wgmma_mma_async<T, true, true>(reinterpret_cast<float (&)[32]>(acc[h][64]), a, b(1));
          }
        }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
#pragma unroll
      for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
      release(before);  // the step before has been read
      before = stage.index;
      stage.advance(p.stages);
    }
    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (int h = 0; h < halves; ++h) ptx::wgmma_fence_operand(acc[h]);
    release(before);
    if (filters || unit.slot >= 0) {
#pragma unroll
      for (int h = 0; h < halves; ++h)
        // Of filters behind the last, wgrad_reduce reads nothing.
        if (!filters || unit.n * TN + (group % S::row_groups * halves + h) * 64 + int(threadIdx.x) / 32 % 4 * 16 < p.K)
          wgrad_store_part(p, int64_t(unit.slot) * (TM * TN) + (group * halves + h) * 64 * S::columns, acc[h]);
    } else if constexpr (!filters) {
      uint32_t const staging = ring + p.stages * S::stage_bytes + group * S::staging_bytes;
#pragma unroll
      for (int h = 0; h < halves; ++h) wgrad_store<T, TN>(p, unit, first + h, acc[h], staging);
    }
  }
  if (!filters && threadIdx.x % kWarpgroup == 0)
    ptx::cp_async_bulk_wait_group_read<0>();  // shared memory ends with the block
}

template <class T, Variant variant, int TM, int TN, int stride>
__global__ void __launch_bounds__(WgradShape<T, variant, TM, TN>::threads, WgradShape<T, variant, TM, TN>::blocks)
    wgrad_kernel(__grid_constant__ WgradParams const p) {
  using S = WgradShape<T, variant, TM, TN, stride>;
  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t full[S::stages], empty[S::stages];
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int const warp = warp_uniform(int(threadIdx.x) / 32), copier = warp % 4;
  constexpr int multiplying = S::warpgroups * S::row_groups * 4;  // warps
  WgradCopies<T, variant, TM, TN, stride> copies;
  if (warp < multiplying) {
    if (threadIdx.x % 32 == 0) {
      for (int i = warp; i < S::stages; i += multiplying) {
        ptx::mbarrier_init(&full[i], copies.copiers);
        ptx::mbarrier_init(&empty[i], multiplying);
      }
      ptx::fence_mbarrier_init();
    }
  } else {
    copies.begin(p, copier);
  }
  __syncthreads();
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
  if (warp < multiplying) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    wgrad_multiply<T, variant, TM, TN, stride>(p, ring, full, empty);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    uint32_t const full_at = warp_uniform(ptx::shared_address(full)),
                   empty_at = warp_uniform(ptx::shared_address(empty));
    if (ptx::elect()) wgrad_copy<T, variant, TM, TN, stride>(p, ring, full_at, empty_at, copier, copies);
  }
}

// Whole tiles of 64 channels by TN filters, one for each of two warpgroups, of which the second is half a tile behind
// the first. They share y's pixels, which come round again for every tile: the second's steps begin in the middle of
// them. So one multiplies while the other stores; results leave by one place in shared memory, which they have in turn.
// All tiles of a block have the same filters; a warpgroup's are every stride-th run of x.
template <class T, int TN>
struct WgradLag {
  using S = WgradShape<T, Variant::im2col, 128, TN>;
  static constexpr int stages = (S::room - S::staging_bytes) / S::stage_bytes;
  int32_t n, first, stride, half, total;  // half: steps; total: stages

  __device__ explicit WgradLag(WgradParams const& p)
      : n(int(blockIdx.x) % p.tiles_n),
        first(int(blockIdx.x) / p.tiles_n * 2),
        stride(int(gridDim.x) / p.tiles_n * 2),
        half(p.steps / 2) {
    int const rounds[2] = {(p.runs - first + stride - 1) / stride, (p.runs - first + stride - 2) / stride};
    total = max(rounds[0] * p.steps, rounds[1] > 0 ? half + rounds[1] * p.steps : 0);
  }
};

// A thread of each of four warps: two of them copy a warpgroup's x, all a share of y.
template <class T, int TN>
__device__ void wgrad_lag_copy(WgradParams const& p, WgradLag<T, TN> const& lag, uint32_t ring, uint32_t full,
                               uint32_t empty, int warp) {
  using S = WgradShape<T, Variant::im2col, 128, TN>;
  int run = lag.first + warp, own = -warp * lag.half, c = 0, offset_h = 0, offset_w = 0;
  bool of_x = false;
  int const y_bytes = (S::y_copies + 3 - warp) / 4 * kRunBytes;
  WgradUnit all;
  all.begin = 0, all.stride = 1;
  WgradPixel const start(p, all);
  WgradPixel pixel;
  Stage stage;
  int step = p.steps;
#pragma unroll 1
  for (int i = 0; i < lag.total; ++i, ++step, ++own) {
    if (step == p.steps) step = 0, pixel = start;
    if (warp < 2 && own == 0) {
      WgradRun<Variant::im2col> const of(p, run);
      c = of.c, offset_h = of.r * p.dilation_h, offset_w = of.s * p.dilation_w;
      of_x = run < p.runs;
      run += lag.stride, own = -p.steps;
    }
    uint32_t const bar = full + stage.index * 8, to = ring + stage.index * S::stage_bytes;
    ptx::mbarrier_wait(empty + stage.index * 8, stage.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(bar, (of_x ? kRunBytes : 0) + y_bytes);
    if (of_x)
      ptx::cp_async_bulk_tensor_im2col(to + S::x_at + warp * S::x_bytes, &p.x, bar, c, p.w0 + pixel.q * p.stride_w,
                                       p.h0 + pixel.p * p.stride_h, pixel.n, offset_w, offset_h);
    for (int copy = warp; copy < S::y_copies; copy += 4)
      ptx::cp_async_bulk_tensor_im2col(to + S::y_at + copy * kRunBytes, &p.y, bar, lag.n * TN + copy * 64, pixel.q,
                                       pixel.p, pixel.n, 0, 0);
    stage.advance(lag.stages);
    pixel.advance(p);
  }
}

template <class T, int TN>
__device__ void wgrad_lag_multiply(WgradParams const& p, WgradLag<T, TN> const& lag, uint32_t ring, uint64_t* full,
                                   uint64_t* empty, uint64_t* free) {
  using S = WgradShape<T, Variant::im2col, 128, TN>;
  int const group = warp_uniform(int(threadIdx.x) / kWarpgroup), lane = int(threadIdx.x) % 32;
  uint32_t const full_at = warp_uniform(ptx::shared_address(full)), empty_at = warp_uniform(ptx::shared_address(empty));
  bool const stores = int(threadIdx.x) % kWarpgroup == 0;
  Stage stage;
  auto release = [&](int stage) {  // -1: none
    if (lane == 0 && stage >= 0) ptx::mbarrier_arrive(empty_at + stage * 8);
  };
  int passed = 0;
  auto pass = [&](int count) {  // stages of the other warpgroup's tiles alone
    for (passed += count; count > 0; --count) {
      ptx::mbarrier_wait(full_at + stage.index * 8, stage.parity);
      __syncwarp();
      release(stage.index);
      stage.advance(lag.stages);
    }
  };
  bool staged = false;  // results that the copy engine reads; then it is the other warpgroup's turn
  auto hand_on = [&] {
    if (staged && stores) {
      ptx::cp_async_bulk_wait_group_read<0>();
      ptx::mbarrier_arrive(&free[1 - group]);
    }
    staged = false;
  };
  uint32_t turn = group ^ 1;
  WgradUnit unit;
  unit.n = lag.n, unit.group = 0;
  float acc[TN / 2];
  pass(group * lag.half);
  for (int run = lag.first + group; run < p.runs; run += lag.stride) {
#pragma unroll
    for (int i = 0; i < TN / 2; ++i) acc[i] = 0;
    int before = -1;
    for (int step = 0; step < p.steps; ++step) {
      ptx::mbarrier_wait(full_at + stage.index * 8, stage.parity);
      uint32_t const from = ring + stage.index * S::stage_bytes, from_x = from + S::x_at + group * S::x_bytes;
      ptx::wgmma_fence_operand(acc);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kPixels / 16; ++k)
        ptx::wgmma_mma_async<T, true, true>(
            acc, ptx::wgmma_descriptor(from_x + k * 2 * kCoreBytes, kRunBytes, kCoreBytes),
            ptx::wgmma_descriptor(from + S::y_at + k * 2 * kCoreBytes, kRunBytes, kCoreBytes));
      ptx::wgmma_commit_group();
      if (step == 1) hand_on();
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(acc);
      release(before);
      before = stage.index;
      stage.advance(lag.stages);
    }
    passed += p.steps;
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
    release(before);
    ptx::mbarrier_wait(&free[group], turn);
    turn ^= 1;
    wgrad_store<T, TN>(p, unit, run, acc, ring + lag.stages * S::stage_bytes);
    staged = true;
  }
  hand_on();
  pass(lag.total - passed);
}

template <class T, int TN>
__global__ void __launch_bounds__(kThreads, 1) wgrad_lag_kernel(__grid_constant__ WgradParams const p) {
  using S = WgradShape<T, Variant::im2col, 128, TN>;
  using Lag = WgradLag<T, TN>;
  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t full[Lag::stages], empty[Lag::stages], free[2];
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int const warp = warp_uniform(int(threadIdx.x) / 32);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Lag::stages; ++i) {
      ptx::mbarrier_init(&full[i], 4);   // copying threads
      ptx::mbarrier_init(&empty[i], 8);  // warps that multiply
    }
    ptx::mbarrier_init(&free[0], 1);
    ptx::mbarrier_init(&free[1], 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();  // for operands that the kernel before has packed
  Lag const lag(p);
  if (warp < 8) {
    ptx::setmaxnreg_inc<S::multiply_regs>();
    wgrad_lag_multiply<T, TN>(p, lag, ring, full, empty, free);
  } else {
    ptx::setmaxnreg_dec<S::copy_regs>();
    uint32_t const full_at = warp_uniform(ptx::shared_address(full)),
                   empty_at = warp_uniform(ptx::shared_address(empty));
    if (ptx::elect()) wgrad_lag_copy<T, TN>(p, lag, ring, full_at, empty_at, warp % 4);
  }
}

// x and y, for sums of single products.
struct Images {
  void const* x;
  void const* y;
  Strides at_x, at_y;
  int64_t pixels;  // N * P * Q
  int32_t H, W, Q;
};

// One weight by single products, by a whole warp: zeros of y at padded columns make NaN of an infinite x, zeros around
// x of an infinite y. Sums that are NaN stay so.
template <class T>
__device__ float wgrad_exact(WgradParams const& p, Images const& images, int k, int c, int r, int s) {
  T const* const x = static_cast<T const*>(images.x) + c * images.at_x.c;
  T const* const y = static_cast<T const*>(images.y) + k * images.at_y.c;
  float total = 0;
  for (int64_t first = 0; first < images.pixels; first += 32 * kChain) {
    float sum = 0;
#pragma unroll 4
    for (int i = 0; i < kChain; ++i) {
      int64_t j = first + i * 32 + int(threadIdx.x) % 32;
      bool const inside = j < images.pixels;
      int64_t row = divide(j, images.Q);
      int64_t const n = divide(row, p.P), h = row * p.stride_h + p.h0 + r * p.dilation_h,
                    w = j * p.stride_w + p.w0 + s * p.dilation_w;
      if (inside && h >= 0 && h < images.H && w >= 0 && w < images.W)
        sum += widen(x[n * images.at_x.n + h * images.at_x.h + w * images.at_x.w]) *
               widen(y[n * images.at_y.n + row * images.at_y.h + j * images.at_y.w]);
      if (i % 4 == 3 && __any_sync(0xffffffff, sum != sum)) return NAN;  // whatever comes
    }
    total += sum;
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) total += __shfl_xor_sync(0xffffffff, total, lane);
  return total;
}

// A warp's sums that are NaN once more, where exists(i) says that the i-th of a lane's is a weight.
template <class T, int count, class Exists, class FilterOf, class ChannelOf>
__device__ inline void wgrad_mend(WgradParams const& p, Images const& images, float (&values)[count], int r, int s,
                                  Exists exists, FilterOf filter_of, ChannelOf channel_of) {
  int const lane = int(threadIdx.x) % 32;
  unsigned tried = 0;
  while (true) {
    int mine = -1;
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (values[i] != values[i] && exists(i) && (tried >> i & 1) == 0) mine = i;
    unsigned const left = __ballot_sync(0xffffffff, mine >= 0);
    if (left == 0) break;
    int const whose = __ffs(int(left)) - 1, which = __shfl_sync(0xffffffff, mine, whose);
    float const exact = wgrad_exact<T>(p, images, filter_of(whose, which), channel_of(whose, which), r, s);
    if (lane != whose) continue;
    tried |= 1u << which;
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (i == which) values[i] = exact;
  }
}

// Where the parts of a shared tile are: those of the aligned blocks, then of the blocks with strips.
struct WgradParts {
  int shared, stride, aligned, first_strip, count;

  __device__ WgradParts(WgradShares const& s, int shared)
      : shared(shared), stride(int(s.shared)), aligned(int(s.aligned)), first_strip(0), count(aligned) {
    if (s.strip_workers == 0) return;
    auto worker_of = [&](int64_t step) { return int(((step + 1) * s.strip_workers - 1) / (s.shared * s.strip_steps)); };
    first_strip = worker_of(shared * s.strip_steps);
    count += worker_of((shared + 1) * s.strip_steps - 1) - first_strip + 1;
    first_strip += int(s.shared * s.aligned) + shared - aligned;
  }
  __device__ int64_t slot(int part) const { return part < aligned ? shared + part * stride : first_strip + part; }
};

// Two neighbouring results.
template <class T>
struct WgradPair {
  using type = uint32_t;
  static __device__ type of(float a, float b) { return pack<T>(a, b); }
};
template <>
struct WgradPair<float> {
  using type = float2;
  static __device__ type of(float a, float b) { return make_float2(a, b); }
};

// both: the second channel exists.
template <class T>
__device__ inline void wgrad_store_pair(WgradParams const& p, T* to, typename WgradPair<T>::type pair, bool both) {
  if (p.pairs) {
    *reinterpret_cast<typename WgradPair<T>::type*>(to) = pair;
    return;
  }
  T const* const each = reinterpret_cast<T const*>(&pair);
  to[0] = each[0];
  if (both) to[p.out_c] = each[1];
}

constexpr int kReduceWarps = 16, kReduceBytes = kReduceWarps * 2 * 32 * int(sizeof(float4));

// Adds the parts of the shared tiles in the order of the blocks that made them. `slices` warps have 16 rows by 16
// columns as two instructions hold them, and each adds every slices'th part.
template <class T, Variant variant, int TM, int TN>
__global__ void __launch_bounds__(kReduceWarps * 32)
    wgrad_reduce(__grid_constant__ WgradParams const p, __grid_constant__ Images const images, int slices) {
  using S = WgradShape<T, variant, TM, TN>;
  constexpr bool filters = S::filters;
  constexpr int pieces = TM * TN / (64 * 8), in_row = S::columns / 8;  // pieces: 64 rows by 8 columns
  constexpr int together = 4;
  __shared__ float4 sums[kReduceWarps][2][32];
  WgradShares const& s = p.shares;
  int const warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, slice = warp % slices;
  int const item = int(blockIdx.x) * (kReduceWarps / slices) + warp / slices;
  int const shared = item / (pieces * 2), rows = item % 4 * 16, piece = item / 4 % (pieces / 2) * 2;
  bool valid = shared < s.shared;

  // Where the first of the weights are: filter k, channel c of a tap.
  WgradUnit unit;
  unit.locate(p, int(s.whole) + shared);
  int k = unit.n * TN, column = rows, run;
  if constexpr (filters) {
    constexpr int in_run = S::run_columns / 8;
    run = (unit.m * S::warpgroups + piece / in_row / S::halves) * S::runs + piece % in_row / in_run;
    k += piece / in_row % S::halves * 64 + rows;
    column = piece % in_run * 8;
  } else {
    run = unit.m * S::x_copies + piece / in_row;
    k += piece % in_row * 8;
  }
  WgradRun<variant> const at(p, run, column);
  int const filters_end = p.own.filters(unit.group, p.K);
  valid = valid && run < p.runs && at.r < p.R && at.s < p.S && k < filters_end && at.c < p.C &&
          p.own.meets(k, 16, at.c, 16);

  WgradParts const parts(s, shared);
  int const count = valid ? parts.count : 0;
  float4 const* const from = static_cast<float4 const*>(p.workspace) + piece * kWarpgroup + rows * 2 + lane;
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  float4 sum[2] = {};
  for (int i = slice; i < count; i += slices * together) {
    float4 v[together][2];
#pragma unroll
    for (int u = 0; u < together; ++u) {
      int const part = i + u * slices;
#pragma unroll
      for (int j = 0; j < 2; ++j)
        v[u][j] =
            part < count ? from[parts.slot(part) * (pieces * kWarpgroup) + j * kWarpgroup] : make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int u = 0; u < together; ++u)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        sum[j].x += v[u][j].x, sum[j].y += v[u][j].y, sum[j].z += v[u][j].z, sum[j].w += v[u][j].w;
  }
  if (slices > 1) {
    for (int j = 0; j < 2; ++j) sums[warp][j][lane] = sum[j];
    __syncthreads();
    if (slice > 0) return;
    for (int i = 1; i < slices; ++i)
      for (int j = 0; j < 2; ++j) {
        float4 const v = sums[warp + i][j][lane];
        sum[j].x += v.x, sum[j].y += v.y, sum[j].z += v.z, sum[j].w += v.w;
      }
  }
  if (!valid) return;

  // A lane's sums are pairs of neighbours of a row; it stores two channels of a filter.
  float values[8] = {sum[0].x, sum[0].y, sum[0].z, sum[0].w, sum[1].x, sum[1].y, sum[1].z, sum[1].w};
  auto filter_of = [&](int lane, int i) { return k + lane / 4 + (filters ? i / 2 % 2 : i / 4) * 8; };
  auto channel_of = [&](int lane, int i) { return at.c + lane % 4 * 2 + i % 2 + (filters ? i / 4 : i / 2 % 2) * 8; };
  auto exists = [&](int i) {
    int const filter = filter_of(lane, i), channel = channel_of(lane, i);
    return filter < filters_end && channel < p.C && p.own.has(filter, channel);
  };
  if constexpr (filters) {
    wgrad_mend<T>(
        p, images, values, at.r, at.s, exists, [&](int lane, int i) { return unit.group * p.K + filter_of(lane, i); },
        [&](int lane, int i) { return unit.group * p.C + channel_of(lane, i); });
  }
  T* const out = static_cast<T*>(p.out) + at.r * p.out_r + at.s * p.out_s;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    typename WgradPair<T>::type pair = WgradPair<T>::of(values[i], values[i + 1]);
    if constexpr (!filters) pair = ptx::movmatrix_trans(pair);
    if (!exists(i)) continue;
    int const filter = filter_of(lane, i), channel = channel_of(lane, i) - p.own.first(filter);
    T* const to = out + (int64_t(unit.group) * p.K + filter) * p.out_k + channel * p.out_c;
    wgrad_store_pair<T>(p, to, pair, exists(i + 1));
  }
}

inline Images images_of(Problem const& problem, Arguments const& args) {
  return {args.a,
          args.b,
          problem.x,
          problem.y,
          problem.N * problem.P() * problem.Q(),
          int32_t(problem.H),
          int32_t(problem.W),
          int32_t(problem.Q())};
}

// The second pass behind `workers` blocks.
template <class T, Variant variant, int TM, int TN>
cudaError_t launch_reduce(Problem const& problem, Arguments const& args, cudaStream_t stream, WgradParams const& p,
                          int64_t workers) {
  Images const images = images_of(problem, args);
  int64_t const shared = p.shares.shared;
  int slices = 1;
  while (slices < kReduceWarps && slices * shared * 4 < workers) slices *= 2;
  int64_t const items = shared * (TM * TN / 256);  // 16 rows by 16 columns
  return launch_spread(wgrad_reduce<T, variant, TM, TN>, dim3(unsigned(ceil_div(items * slices, kReduceWarps))),
                       kReduceWarps * 32, kReduceBytes, stream, p, images, slices);
}

// What all kernels are told, and the maps of x and y. channels: of a copy of x.
template <DType dtype>
cudaError_t encode_wgrad(WgradParams& p, Problem const& given, Problem const& problem, WgradTiles const& t,
                         Arguments const& args, bool halo, int channels) {
  Walk const h = walk_h(Op::wgrad, problem, 0), w = walk_w(Op::wgrad, problem, 0);
  int64_t const P = problem.P(), Q = problem.Q();
  p.P = int32_t(P), p.columns = int32_t(t.columns);
  p.h0 = int32_t(h.lower), p.w0 = int32_t(w.lower);
  p.stride_h = int32_t(h.stride), p.stride_w = int32_t(w.stride);
  p.dilation_h = int32_t(h.tap_stride), p.dilation_w = int32_t(w.tap_stride);
  p.R = int32_t(problem.R), p.S = int32_t(problem.S);
  p.C = int32_t(problem.C_per_group()), p.K = int32_t(problem.K_per_group());
  p.chunks = int32_t(ceil_div(p.C, 64)), p.runs = int32_t(t.runs);
  p.steps = int32_t(t.steps), p.groups = int32_t(problem.groups);
  p.own = OwnGroup(given, problem);
  p.out_k = given.w.n, p.out_c = given.w.c, p.out_r = given.w.h, p.out_s = given.w.w;
  p.pairs = channel_vectors(given.w, given.w_align, given.C_per_group(), 2, dtype);
  p.out = args.out, p.workspace = args.workspace;
  Strides const &x = problem.x, &y = problem.y;
  Walk box_x = w, box_y{Q, 1};
  if (halo) box_x.pixels = box_y.pixels = t.columns;
  int const lines = kPixels + (halo ? int((min64(problem.S, kTaps) - 1) / w.stride * w.tap_stride) : 0);
  p.copy_bytes = lines * channels * size_of(dtype);
  cudaError_t error = encode_im2col(
      p.x, {args.a, dtype, {given.C, problem.W, problem.H, problem.N}, {1, x.w, x.h, x.n}}, h, box_x, channels, lines);
  if (error != cudaSuccess) return error;
  return encode_im2col(p.y, {args.b, dtype, {given.K, Q, P, problem.N}, {1, y.w, y.h, y.n}}, Walk{P, 1}, box_y, 64,
                       kPixels);
}

template <DType dtype, int TM, int TN, Variant variant, int stride = 1>
cudaError_t launch_wgrad(Problem const& given, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  using S = WgradShape<T, variant, TM, TN, stride>;
  Problem const problem = as_merged(row_of(plan), given);
  constexpr bool halo = is_halo(variant), filters = S::filters;
  WgradTiles const t = wgrad_tiles(row_of(plan), problem);
  WgradParams p{};
  cudaError_t error = encode_wgrad<dtype>(p, given, problem, t, args, halo, variant == Variant::narrow ? 32 : 64);
  if (error != cudaSuccess) return error;
  p.tiles_n = int32_t(ceil_div(p.K, TN));
  p.shares = wgrad_shares(t, plan.split_k);
  p.stages = S::stages;
  if constexpr (!filters) {
    if (p.shares.whole > 0) p.stages = S::stages_beside_staging;
    if (p.own.C == 0 && (error = encode_filters(p.w, args.out, problem, 64, TN)) != cudaSuccess) return error;
  }

  int64_t const shared = p.shares.shared;
  int64_t workers = plan.split_k;
  void (*kernel)(WgradParams) = wgrad_kernel<T, variant, TM, TN, stride>;
  bool lags = false;
  if constexpr (variant == Variant::im2col && TM == 128 && TN == 256) {
    lags = shared == 0 && given.groups == 1 && wgrad_lags(row_of(plan), problem, t);
    if (lags) kernel = wgrad_lag_kernel<T, TN>, workers = wgrad_lag_blocks(p.tiles_n);
  }
  if ((error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes)) !=
      cudaSuccess)
    return error;
  if (shared == 0 && !lags) {  // as many blocks as there is room for
    int sm_count = 0;
    if ((error = count_sms(sm_count)) != cudaSuccess) return error;
    workers = min64(t.tiles, int64_t(sm_count) * S::blocks);
  }
  error = launch_dependent(kernel, dim3(unsigned(workers)), S::threads, S::shared_bytes, stream, p);
  if (error != cudaSuccess || shared == 0) return error;

  return launch_reduce<T, variant, TM, TN>(problem, args, stream, p, workers);
}

template <Op op, DType dtype, int TM, int TN, Variant variant>
cudaError_t launch_row(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  if constexpr (variant == Variant::pointwise) {  // the turned problem's rows are filters
    Arguments turned_args = args;
    turned_args.a = args.b, turned_args.b = args.a;
    return launch<Op::dgrad, dtype, TN, TM, variant>(turned(op, problem), plan, turned_args, stream);
  } else if constexpr (op == Op::wgrad) {
    if constexpr (variant == Variant::halo)
      if (problem.stride_w == 2) return launch_wgrad<dtype, TM, TN, variant, 2>(problem, plan, args, stream);
    return launch_wgrad<dtype, TM, TN, variant>(problem, plan, args, stream);
  } else if constexpr (variant == Variant::phases)
    return launch_phases<dtype>(problem, args, stream);
  else if constexpr (TM == SwapShape::TM && TN == SwapShape::TN)
    return launch_swapped<op, dtype>(problem, plan, args, stream);
  else if constexpr (TM % 128 != 0 && TM != 64)
    return launch_swapped_wide<op, dtype, TM, TN>(problem, plan, args, stream);
  else if constexpr (TM == 64)
    return launch_small<op, dtype, TN>(problem, plan, args, stream);
  else {
    if constexpr (TM == 128 && TN == kLagColumns && variant == Variant::im2col)
      if (tma_lags(row_of(plan), op, problem, plan.split_k))
        return launch_lag<op, dtype, kLagPixels, TN>(problem, plan, args, stream);
    return launch<op, dtype, TM, TN, variant>(problem, plan, args, stream);
  }
}

}  // namespace conv2d_ext::tma

#define CONV2D_EXT_TMA_INSTANCE(family, op, dtype, tm, tn, tk, variant)                            \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                        \
    return tma::launch_row<Op::op, DType::dtype, tm, tn, Variant::variant>(p, plan, args, stream); \
  }
