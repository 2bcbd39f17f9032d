// igemm.cuh in TF32. wgmma takes TF32 operands from shared memory with k contiguous only, and cuts their low bits off,
// so operands come through registers: two warpgroups, one of A and one of B, load 16 bytes at a time, round to nearest,
// turn 4 x 4 elements where the rows are contiguous in memory and not k, and store lines of 32 k, swizzled. They hold
// the loads of two steps. Two further warpgroups multiply 64 x TN each and store.
//
// Channels of the operands are contiguous, multiples of 4 and 16-byte aligned; results are stored one by one, in any
// strides. Offsets are counted in vectors of 16 bytes, which keeps them within 32 bits.
//
// Line l of B, and of A where its rows are contiguous, is row 4 (l % (lines / 4)) + l / (lines / 4) of the tile: then
// lanes that hold neighbouring rows store to lines that follow each other, each in banks of its own, and a thread's
// accumulators are runs of four columns.
//
// The tensor cores cut off the lowest bits of what they add, so every kChainSteps steps the sums move to totals in
// shared memory.
#pragma once

#include "igemm.cuh"

namespace conv2d_ext::igemm_tf32 {

using igemm::kNoColumn, igemm::kNoRow, igemm::row_part;

constexpr int TM = 128, TK = 32;
constexpr int kThreads = 4 * kWarpgroup, kMultipliers = 2 * kWarpgroup;
constexpr int kChainSteps = 192;

// 64K registers: two warpgroups gather, two multiply, x 128 threads.
constexpr int kGatherRegs = 144, kMultiplyRegs = 112;
static_assert((2 * kGatherRegs + 2 * kMultiplyRegs) * kWarpgroup <= 65536, "register file");

template <int TN>
struct Ring {
  static constexpr int a_bytes = TM * kLineBytes, stage_bytes = a_bytes + TN * kLineBytes;
  static constexpr int total_bytes = TM * TN * 4;
  static constexpr int stages = TN == 128 ? 4 : 6;
  static constexpr int bytes = stages * stage_bytes + total_bytes + 1024;  // the swizzle wants 1024-byte alignment
  static_assert(bytes < 225 * 1024);
};

// The steps of the reduction that a tile's split does.
struct Span {
  int32_t begin, count;
  __device__ Span(Params const& p, Tile const& t) {
    int64_t const steps = (t.depth + TK - 1) / TK, each = (steps + p.splits - 1) / p.splits;
    int64_t const first = t.split * each, rest = steps - first;
    begin = int32_t(first);
    count = int32_t(rest < 0 ? 0 : rest < each ? rest : each);
  }
};

// What the k's of all threads have in common; in shared memory, since registers are short.
struct Pace {
  int32_t depth, mid_radix, low_radix;
  int32_t high, mid, low;  // the digits of TK

  __device__ void set(Tile const& t) {
    int64_t d[3] = {0, 0, TK};
    if (t.depth > 0) d[1] = divide(d[2], t.k_radix[2]), d[0] = divide(d[1], t.k_radix[1]);
    depth = int32_t(t.depth), mid_radix = int32_t(t.k_radix[1]), low_radix = int32_t(t.k_radix[2]);
    high = int32_t(d[0]), mid = int32_t(d[1]), low = int32_t(d[2]);
  }
};

// The row of a tile that lies in line `line` of `lines`.
template <int lines>
__device__ inline int row_of_line(int line) {
  return line % (lines / 4) * 4 + line / (lines / 4);
}

// A row's or a k's part of an address, in vectors, and of A's image coordinates. Of B h alone is used: 0, or what makes
// the sum invalid.
struct Spot {
  int32_t offset, h, w;
};

// `rows`: the operand's rows are contiguous in memory, not its k.
template <bool is_a, bool rows, int TR>
struct Gatherer {
  // A thread has eight k's, or rows, side by side, in a chunk of 16 bytes.
  static constexpr int loads = TR * 8 / kWarpgroup >= 4 || !rows ? TR * 8 / kWarpgroup : 4;
  static constexpr int spots = rows ? loads / 4 : loads;
  float4 const* base;
  Spot row[spots];
  int32_t k, high, mid, low;
  uint32_t place;  // of the first 16 bytes, from the start of the operand's part of a stage

  // Are there fewer rows than threads for them?
  __device__ bool idle() const { return rows && TR < 64 && place >= TR / 4 * kLineBytes; }

  // The spots of all rows, or of every fourth if they are contiguous; one thread each, for they take divisions.
  static __device__ void set_spots(Params const& p, Tile const& t, Spot (&table)[TM]) {
    int const at = int(threadIdx.x) % kWarpgroup;
    if (at >= (rows ? TR / 4 : TR)) return;
    if (is_a) {
      Point const point = row_part(p, t, t.m0 * TM + (rows ? at * 4 : at)).a;
      table[at] = {int32_t(point.offset >> 2), point.h, point.w};
    } else {
      int64_t const n = t.n0 * TR + (rows ? at * 4 : row_of_line<TR>(at));
      table[at] = {int32_t((t.b_base + n * p.n_b) >> 2), n < p.N ? 0 : kNoRow, 0};
    }
  }

  __device__ void start(Params const& p, Tile const& t, Span const& span, Spot const (&table)[TM]) {
    int const thread = int(threadIdx.x) % kWarpgroup;
    // Lanes side by side have 128 bytes of memory that lie together.
    int const chunk = rows ? thread / 8 % 8 : thread % 8, line = rows ? thread / 64 * 8 + thread % 8 : thread / 8;
    base = static_cast<float4 const*>(is_a ? p.a : p.b);
    place = line * kLineBytes + (chunk ^ line % 8) * 16;
#pragma unroll
    for (int i = 0; i < spots; ++i) row[i] = table[line + i * 16];
    k = span.begin * TK + chunk * 4;
    int64_t d[3] = {0, 0, k};
    if (t.depth > 0) d[1] = divide(d[2], t.k_radix[2]), d[0] = divide(d[1], t.k_radix[1]);
    high = int32_t(d[0]), mid = int32_t(d[1]), low = int32_t(d[2]);
  }

  __device__ Spot spot(Params const& p, Pace const& pace, int32_t at, int32_t d0, int32_t d1, int32_t d2) const {
    int64_t const* const o = is_a ? p.k.a : p.k.b;
    Spot s{d0 * int32_t(o[0] >> 2) + d1 * int32_t(o[1] >> 2) + (rows ? d2 * int32_t(o[2] >> 2) : d2 >> 2), 0, 0};
    if (is_a) {
      s.h = d0 * p.k.h[0] + d1 * p.k.h[1] + d2 * p.k.h[2];
      s.w = d0 * p.k.w[0] + d1 * p.k.w[1] + d2 * p.k.w[2];
    }
    if (at >= pace.depth) s.h = kNoColumn;
    return s;
  }

  __device__ float4 get(Params const& p, Spot const& r, Spot const& c) const {
    bool const valid =
        uint32_t(r.h + c.h) < uint32_t(is_a ? p.h_extent : 1) && (!is_a || uint32_t(r.w + c.w) < uint32_t(p.w_extent));
    float4 v = make_float4(0, 0, 0, 0);
    if (valid) v = __ldg(base + (r.offset + c.offset));
    return v;
  }

  // What of a step this thread has.
  __device__ void load(Params const& p, Pace const& pace, float4 (&v)[loads]) {
    if (idle()) return;
    if constexpr (rows) {
      int32_t d0 = high, d1 = mid, d2 = low;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Spot const c = spot(p, pace, k + i, d0, d1, d2);
#pragma unroll
        for (int j = 0; j < spots; ++j) v[j * 4 + i] = get(p, row[j], c);
        if (++d2 == pace.low_radix) {
          d2 = 0;
          if (++d1 == pace.mid_radix) d1 = 0, ++d0;
        }
      }
    } else {
      Spot const c = spot(p, pace, k, high, mid, low);
#pragma unroll
      for (int i = 0; i < loads; ++i) v[i] = get(p, row[i], c);
    }
    k += TK;
    low += pace.low;
    bool carry = low >= pace.low_radix;
    low -= carry ? pace.low_radix : 0;
    mid += pace.mid + carry;
    carry = mid >= pace.mid_radix;
    mid -= carry ? pace.mid_radix : 0;
    high += pace.high + carry;
  }

  static __device__ void put(uint32_t to, float a, float b, float c, float d) {
    ptx::st_shared_v4(to,
                      make_uint4(ptx::cvt_rn_tf32(a), ptx::cvt_rn_tf32(b), ptx::cvt_rn_tf32(c), ptx::cvt_rn_tf32(d)));
  }

  // The chunk c of line l is at c ^ (l % 8).
  __device__ void store(float4 const (&v)[loads], uint32_t to) const {
    to += place;
    if constexpr (rows) {
      if (idle()) return;
#pragma unroll
      for (int j = 0; j < spots; ++j, to += 16 * kLineBytes) {
        float4 const &a = v[j * 4], &b = v[j * 4 + 1], &c = v[j * 4 + 2], &d = v[j * 4 + 3];
        put(to, a.x, b.x, c.x, d.x);
        put(to + TR / 4 * kLineBytes, a.y, b.y, c.y, d.y);
        put(to + TR / 2 * kLineBytes, a.z, b.z, c.z, d.z);
        put(to + TR / 4 * 3 * kLineBytes, a.w, b.w, c.w, d.w);
      }
    } else {
#pragma unroll
      for (int i = 0; i < loads; ++i) put(to + i * 16 * kLineBytes, v[i].x, v[i].y, v[i].z, v[i].w);
    }
  }
};

template <bool is_a, bool rows, int TN>
__device__ void gather(Params const& p, Tile& tile, Pace& pace, Spot (&table)[TM], uint32_t ring, uint64_t* full,
                       uint64_t* empty) {
  using R = Ring<TN>;
  using G = Gatherer<is_a, rows, is_a ? TM : TN>;
  int const barrier = 1 + int(threadIdx.x) / kWarpgroup;
  uint32_t const place = ring + (is_a ? 0 : R::a_bytes);
  Stage stage;
  G g;
  auto hand_over = [&](float4 const(&v)[G::loads]) {
    ptx::mbarrier_wait(&empty[stage.index], stage.parity ^ 1);  // passes at once on the first trip round the ring
    g.store(v, place + stage.index * R::stage_bytes);
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&full[stage.index]);
    stage.advance(R::stages);
  };
  for (int64_t unit = blockIdx.x; unit < p.tiles * p.splits; unit += gridDim.x) {
    ptx::bar_sync(barrier, kWarpgroup);
    if (threadIdx.x % kWarpgroup == 0) locate(p, unit, tile), pace.set(tile);
    ptx::bar_sync(barrier, kWarpgroup);
    if (tile.m0 * TM >= tile.M) continue;
    G::set_spots(p, tile, table);
    ptx::bar_sync(barrier, kWarpgroup);
    Span const span(p, tile);
    g.start(p, tile, span, table);
    float4 first[G::loads], second[G::loads];
    if (span.count > 0) g.load(p, pace, first);
    for (int step = 0; step < span.count; step += 2) {
      if (step + 1 < span.count) g.load(p, pace, second);
      hand_over(first);
      if (step + 2 < span.count) g.load(p, pace, first);
      if (step + 1 < span.count) hand_over(second);
    }
  }
}

// Where the rows of a tile's lines are stored, -1: no such row; `count` of them from `first` on.
template <bool a_rows>
__device__ void set_lines(Params const& p, Tile const& t, int first, int count, int thread, int64_t (&lines)[TM]) {
  if (thread >= count) return;
  int const line = first + thread;
  lines[line] = row_part(p, t, t.m0 * TM + (a_rows ? row_of_line<TM>(line) : line)).out;
}

// A thread's accumulators: of lines lane / 4 and lane / 4 + 8 of its warp's 16, columns 8 j + 2 (lane % 4) + {0, 1}.
// Stores those of columns j = part + i TN / 32, which are v[4 i] to v[4 i + 3].
template <bool a_rows, int TN>
__device__ void store(Params const& p, Tile const& t, int64_t const (&lines)[TM], int thread, int part,
                      float const (&v)[16]) {
  int const line = thread / kWarpgroup * 64 + thread / 32 % 4 * 16 + thread % 32 / 4;
  int64_t const first = t.n0 * TN + (part * 8 + thread % 4 * 2) * 4;
  int64_t const steps = p.m.out[0] | p.m.out[1] | p.m.out[2] | p.group_out | p.phase_out_h | p.phase_out_w | p.N;
  bool const vectors = !a_rows && p.n_out == 1 && steps % 4 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int64_t const to = lines[line + half * 8];
    if (to < 0) continue;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      int64_t const n = first + e * 4, left = p.N - n;
      float* const out = static_cast<float*>(p.out) + to + n * p.n_out;
      float const* const bias = static_cast<float const*>(p.bias) + t.group * p.group_bias + n * p.bias_stride;
      float sum[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sum[i] = v[i * 4 + half * 2 + e] + (p.bias != nullptr && i < left ? bias[i * p.bias_stride] : 0);
      if (vectors) {
        if (left > 0) *reinterpret_cast<float4*>(out) = make_float4(sum[0], sum[1], sum[2], sum[3]);
        continue;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < left) out[i * p.n_out] = sum[i];
    }
  }
}

template <bool a_rows, int TN>
__device__ void multiply(Params const& p, Tile& tile, int64_t (&lines)[TM], uint32_t ring, float* totals,
                         uint64_t* full, uint64_t* empty) {
  using R = Ring<TN>;
  int const thread = int(threadIdx.x) - kMultipliers, group = thread / kWarpgroup, lane = thread % 32;
  int const barrier = 3 + group;
  float* const total = totals + thread;
  Stage stage;
  float acc[TN / 2];
  for (int64_t unit = blockIdx.x; unit < p.tiles * p.splits; unit += gridDim.x) {
    ptx::bar_sync(barrier, kWarpgroup);
    if (thread % kWarpgroup == 0) locate(p, unit, tile);
    ptx::bar_sync(barrier, kWarpgroup);
    Tile const& t = tile;
    if (t.m0 * TM >= t.M) continue;
    set_lines<a_rows>(p, t, group * 64, 64, thread % kWarpgroup, lines);
    ptx::bar_sync(barrier, kWarpgroup);
    Span const span(p, t);
#pragma unroll
    for (int i = 0; i < TN / 2; ++i) acc[i] = 0;
    int before = -1, chain = 0;
    bool chained = false;
    for (int step = 0; step < span.count; ++step) {
      ptx::mbarrier_wait(&full[stage.index], stage.parity);
      ptx::fence_proxy_async();  // they wrote through the generic proxy, wgmma reads through the async one
      uint32_t const from_a = ring + stage.index * R::stage_bytes + group * 64 * kLineBytes;
      uint32_t const from_b = ring + stage.index * R::stage_bytes + R::a_bytes;
      ptx::wgmma_fence_operand(acc);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < TK / 8; ++k)
        ptx::wgmma_mma_async<float, false, false>(acc, ptx::wgmma_descriptor(from_a + k * 32, kCoreBytes, kCoreBytes),
                                                  ptx::wgmma_descriptor(from_b + k * 32, kCoreBytes, kCoreBytes));
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(acc);
      if (before >= 0 && lane == 0) ptx::mbarrier_arrive(&empty[before]);  // the step before has been read
      before = stage.index;
      stage.advance(R::stages);
      if (++chain == kChainSteps) {
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_fence_operand(acc);
#pragma unroll
        for (int i = 0; i < TN / 2; ++i) {
          float& at = total[i * kMultipliers];
          at = chained ? at + acc[i] : acc[i];
          acc[i] = 0;
        }
        chained = true, chain = 0;
      }
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
    if (before >= 0 && lane == 0) ptx::mbarrier_arrive(&empty[before]);
    if (chained)
#pragma unroll
      for (int i = 0; i < TN / 2; ++i) acc[i] += total[i * kMultipliers];
    if (p.splits > 1) {
      float* const partial = static_cast<float*>(p.workspace) + unit * (TM * TN) + thread;
#pragma unroll
      for (int i = 0; i < TN / 2; ++i) partial[i * kMultipliers] = acc[i];
    } else {
#pragma unroll
      for (int part = 0; part < TN / 32; ++part) {
        float v[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) v[i] = acc[(part + i / 4 * (TN / 32)) * 4 + i % 4];
        store<a_rows, TN>(p, t, lines, thread, part, v);
      }
    }
  }
}

template <bool a_rows, bool b_rows, int TN>
__global__ void __launch_bounds__(kThreads, 1) kernel(__grid_constant__ Params const p) {
  using R = Ring<TN>;
  extern __shared__ uint8_t dynamic[];
  __shared__ Tile tiles[4];
  __shared__ Pace paces[2];
  __shared__ Spot spots[2][TM];
  __shared__ int64_t lines[TM];
  __shared__ uint64_t full[R::stages], empty[R::stages];
  uint32_t const begin = ptx::shared_address(dynamic), ring = (begin + 1023) / 1024 * 1024;
  auto* const totals = reinterpret_cast<float*>(dynamic + (ring - begin) + R::stages * R::stage_bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < R::stages; ++i) {
      ptx::mbarrier_init(&full[i], 8);   // gathering warps
      ptx::mbarrier_init(&empty[i], 8);  // multiplying warps
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  int const role = threadIdx.x / kWarpgroup;
  if (role < 2) {
    ptx::setmaxnreg_inc<kGatherRegs>();
    if (role == 0)
      gather<true, a_rows, TN>(p, tiles[0], paces[0], spots[0], ring, full, empty);
    else
      gather<false, b_rows, TN>(p, tiles[1], paces[1], spots[1], ring, full, empty);
  } else {
    ptx::setmaxnreg_dec<kMultiplyRegs>();
    multiply<a_rows, TN>(p, tiles[role], lines, ring, totals, full, empty);
  }
}

// Adds the partial tiles in the order of the splits. A thread has a part of what one of the multiplying threads had.
template <bool a_rows, int TN>
__global__ void __launch_bounds__(kMultipliers) reduce(__grid_constant__ Params const p) {
  __shared__ Tile tile;
  if (threadIdx.x == 0) locate(p, blockIdx.x, tile);
  __syncthreads();
  __shared__ int64_t lines[TM];
  set_lines<a_rows>(p, tile, 0, TM, int(threadIdx.x), lines);
  __syncthreads();
  int const part = int(blockIdx.y);
  float const* partial = static_cast<float const*>(p.workspace) + int64_t(blockIdx.x) * (TM * TN) +
                         part * 4 * kMultipliers + int(threadIdx.x);
  float sum[16] = {};
  for (int64_t split = 0; split < p.splits; ++split, partial += p.tiles * (TM * TN))
#pragma unroll
    for (int i = 0; i < 16; ++i) sum[i] += partial[(i / 4 * (TN / 8) + i % 4) * kMultipliers];
  store<a_rows, TN>(p, tile, lines, int(threadIdx.x), part, sum);
}

template <Op op, int TN>
igemm::Kernels kernels() {
  constexpr bool a_rows = op == Op::wgrad, b_rows = op != Op::fprop;
  return {kernel<a_rows, b_rows, TN>, kThreads, Ring<TN>::bytes, reduce<a_rows, TN>, TN / 32, kMultipliers};
}

}  // namespace conv2d_ext::igemm_tf32

#define CONV2D_EXT_IGEMM_TF32_INSTANCE(family, op, dtype, tm, tn, tk, variant)              \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                 \
    static_assert(tm == igemm_tf32::TM && tk == igemm_tf32::TK);                            \
    return igemm::launch(Op::op, igemm_tf32::kernels<Op::op, tn>(), p, plan, args, stream); \
  }
