// The walks of stream.cuh for rows that begin anywhere, and for wide ones, which several warps share, a team. The copy
// engine brings a team the rows, as they lie in memory, to a ring of its own in shared memory; lanes take their pairs
// of elements from where they are and make zeros of those beyond the borders. Rows of outputs that follow each other in
// memory take the same way back: L2 is then asked for whole lines, wherever rows begin.
#pragma once

#include "stream_outputs.cuh"

namespace conv2d_ext::stream {

// The warps that walk down the same rows.
struct Team {
  int warps, index, warp;  // of a team; this one's place in the block; this warp's place in the team

  __device__ explicit Team(int warps)
      : warps(warps), index(int(threadIdx.x) / 32 / warps), warp(int(threadIdx.x) / 32 % warps) {}
  // Two teams of a block at most need barriers.
  __device__ void sync() const {
    if (warps == 1)
      __syncwarp();
    else if (index == 0)
      ptx::bar_sync(1, 32 * warps);
    else
      ptx::bar_sync(2, 32 * warps);
  }
  // Is it true in any of the team's threads?
  __device__ bool any(bool value) const {
    if (warps == 1) return __any_sync(0xffffffffu, value);
    return index == 0 ? ptx::bar_red_or<1>(32 * warps, value) : ptx::bar_red_or<2>(32 * warps, value);
  }
};

// A team's ring of chunks of rows of a tensor, which its first warp fills. The copy engine takes multiples of 16 bytes
// from addresses that are ones, so that it brings the neighbours of what is wanted too, and every row keeps its place
// within 16 bytes. Where there are no neighbours, at the tensor's ends, single elements are copied.
template <class T>
struct Ring {
  static constexpr int size = int(sizeof(T));
  Source const& s;
  StreamRing const& shape;
  int const stages;
  uint32_t full;  // where in shared memory the barriers of the stages begin
  uint32_t data;  // address of stage 0
  int stage = 0, parity = 0;
  // Of the walk: the steps before its first row that exists, and rows; the next row's place in its chunk, and where it
  // is.
  int before = 0, rows = 0, row = 0;
  uint32_t offset = 0;
  // Of the copies: rows to come, stages that have been read.
  int left = 0, empty = 0;

  __device__ Ring(StreamRing const& shape, Source const& s, int stages, uint32_t full, uint32_t data)
      : s(s), shape(shape), stages(stages), full(full), data(data) {}

  __device__ uint64_t* barrier(int at) const {
    extern __shared__ __align__(16) unsigned char shared[];
    return reinterpret_cast<uint64_t*>(shared + full) + at;
  }

  // The walk's rows are those from `h` on, `count` of them, that exist; its columns those from `column` on.
  __device__ void start(Team const& team, Walk const& at, int images, int h, int count, int column) {
    int const lane = int(threadIdx.x) % 32, last = h + count < s.H ? h + count : s.H;
    before = h < 0 ? -h : 0, rows = last > h + before ? last - h - before : 0, row = 0;
    left = team.warp == 0 ? rows : 0;
    int const x = first_column(column);
    int const stop = shape.whole || column + shape.columns > s.W ? s.W : column + shape.columns;
    int row_bytes = stop > x ? (stop - x) * size : 0;
    int const image = shape.whole ? lane : 0, place = shape.whole ? 0 : lane;
    if (image >= images || place >= shape.chunk) row_bytes = 0;
    char const* const first = address(at, image, h, column);
    char const* const from = first + place * s.h * size;
    uint32_t const to = in_ring(image, first) + place * shape.pitch - within(from);
    if (team.warp == 0) keep(from, to, row_bytes);
    offset = stage * shape.stage_bytes;
    empty = stages;
    refill();
  }
  __device__ static uint32_t within(char const* p) { return uint32_t(reinterpret_cast<uint64_t>(p)) % 16; }
  __device__ int first_column(int column) const { return shape.whole || column < 0 ? 0 : column; }
  // The walk's first element of an image, in memory and in the ring.
  __device__ char const* address(Walk const& at, int image, int h, int column) const {
    return static_cast<char const*>(s.data) +
           ((at.n0 + image) * s.n + at.c * s.c + int64_t(h + before) * s.h + first_column(column)) * size;
  }
  __device__ uint32_t in_ring(int image, char const* first) const {
    return data + image * shape.image_bytes + 16 + within(first);
  }

  // Of this lane's copies: where from, where to in stage 0, bytes of a row. In shared memory, for want of registers.
  __device__ uint32_t kept() const { return ptx::shared_address(barrier(0)) + 64 + threadIdx.x % 32 * 16; }
  __device__ void keep(char const* from, uint32_t to, int row_bytes) const {
    uint64_t const bits = reinterpret_cast<uint64_t>(from);
    ptx::st_shared_v4(kept(), make_uint4(uint32_t(bits), uint32_t(bits >> 32), to, uint32_t(row_bytes)));
  }

  // Copies the next chunk to the next stage, which all lanes have read.
  __device__ void fill() {
    uint4 const state = ptx::ld_shared_v4(kept());
    char const* const from = reinterpret_cast<char const*>(uint64_t(state.y) << 32 | state.x);
    uint32_t const to = state.z;
    int const row_bytes = int(state.w);
    int const into = stage - empty + (stage < empty ? stages : 0);
    int const lane = int(threadIdx.x) % 32, now = left < shape.chunk ? left : shape.chunk;
    int const wanted = shape.whole ? now * row_bytes : lane < now ? row_bytes : 0;
    uint32_t const there = to + into * shape.stage_bytes, place = within(from);
    char const* start = from - place;
    uint32_t bytes = wanted > 0 ? (place + wanted + 15) / 16 * 16 : 0, skip = 0;
    if (wanted > 0 && (start < static_cast<char const*>(s.data) || start + bytes > s.end)) {
      // Single elements, for what the copy engine would have to read with bytes before or behind the tensor.
      char const* const stop = start + bytes > s.end ? start + bytes - 16 : start + bytes;
      if (start < static_cast<char const*>(s.data)) skip = 16;
#pragma unroll 1
      for (char const* i = from; i < from + wanted; i += 2)
        if (i < start + skip || i >= stop)
          ptx::st_shared_u16(there + uint32_t(i - start), *reinterpret_cast<uint16_t const*>(i));
      bytes = stop > start + skip ? uint32_t(stop - start) - skip : 0;
    }
    uint32_t const all = __reduce_add_sync(0xffffffffu, bytes);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive_expect_tx(barrier(into), all);
    if (bytes > 0) ptx::cp_async_bulk(there + skip, start + skip, bytes, barrier(into));
    keep(from + shape.chunk * s.h * size, to, row_bytes);
    left -= now, --empty;
  }
  // The stages that the team has read.
  __device__ void refill() {
#pragma unroll 1
    while (empty > 0 && left > 0) fill();
  }

  __device__ bool has(int step) const { return unsigned(step - before) < unsigned(rows); }
  // Before and after a row that the ring has is read.
  __device__ void open() {
    if (row == 0) ptx::mbarrier_wait(barrier(stage), parity);
  }
  __device__ void close() {
    offset += shape.pitch;
    if (++row == shape.chunk) next();
  }
  __device__ void next() {
    row = 0, ++empty;
    if (++stage == stages) stage = 0, parity ^= 1;
    offset = stage * shape.stage_bytes;
  }
};

// The barriers of a team's ring.
__device__ inline void make_barriers(Team const& team, unsigned char* shared, int count) {
  if (team.warp == 0 && threadIdx.x % 32 == 0)
#pragma unroll 1
    for (int i = 0; i < count; ++i) ptx::mbarrier_init(reinterpret_cast<uint64_t*>(shared) + i, 1);
  ptx::fence_mbarrier_init();
  team.sync();
}

// A team's outputs on their way to memory, where the rows of an image follow each other: a ring for each image, of
// bytes as they lie in memory. The first warp's lanes have an image each and store what is complete, in multiples of 16
// bytes of addresses that are ones; single elements at the walk's ends. The ring's last row ends as many bytes beyond
// it as the first begins late. What a lane knows of its image lies behind that.
template <class T>
struct Stores {
  static constexpr int size = int(sizeof(T));
  Params const& p;
  Team const& team;
  int images;
  uint32_t rings;

  __device__ Stores(Params const& p, Team const& team, Walk const& at, int images, uint32_t rings)
      : p(p), team(team), images(images), rings(rings) {
    if (!copies()) return;
    char* const first = address(at, lane());
    uint64_t const to = reinterpret_cast<uint64_t>(first);
    uint32_t const done = within(first) > 0 ? 16 : 0;
    ptx::st_shared_v4(kept(), make_uint4(uint32_t(to), uint32_t(to >> 32), done, done));
  }
  __device__ static int lane() { return int(threadIdx.x) % 32; }
  __device__ bool copies() const { return p.out_bytes > 0 && team.warp == 0 && lane() < images; }
  __device__ uint32_t ring(int image) const { return rings + image * (p.out_bytes + kStreamRingEnd); }
  __device__ uint32_t kept() const { return ring(lane()) + p.out_bytes + 16; }
  __device__ static uint32_t within(char const* p) { return uint32_t(reinterpret_cast<uint64_t>(p)) % 16; }
  // The walk's first output of an image, and its place in the ring.
  __device__ char* address(Walk const& at, int image) const {
    return reinterpret_cast<char*>(static_cast<T*>(p.out) + (at.n0 + image) * p.out_n + at.c * p.out_c +
                                   at.p0 * p.out_h);
  }
  __device__ uint32_t place(Walk const& at, int image) const { return ring(image) + within(address(at, image)); }

  // Before the team's sync, then after it: `bytes` of outputs are in the rings.
  __device__ static void prepare() {
    ptx::fence_proxy_async();
    ptx::cp_async_bulk_wait_group_read<0>();
  }
  __device__ void store(uint32_t bytes, bool last) const {
    if (!copies()) return;
    // The address of the first output; bytes from there, rounded down to 16, to what is not stored yet; its place.
    uint4 const state = ptx::ld_shared_v4(kept());
    uint32_t const begin = ring(lane()), lead = state.x % 16, end = lead + bytes, stop = end / 16 * 16;
    char* const to = reinterpret_cast<char*>(uint64_t(state.y) << 32 | (state.x - lead));
    uint32_t done = state.z, place = state.w;
    if (lead > 0 && done == 16) elements(to, begin, lead, 16);
#pragma unroll 1
    while (done < stop) {
      uint32_t const left = p.out_bytes - place, now = stop - done < left ? stop - done : left;
      ptx::cp_async_bulk_store(to + done, begin + place, now);
      done += now, place += now;
      if (now < left) continue;
      place = 0;
      if (lead > 0) {
#pragma unroll 1
        for (uint32_t i = 0; i < lead; i += 2)
          ptx::st_shared_u16(begin + i, ptx::ld_shared_u16(begin + p.out_bytes + i));
        ptx::fence_proxy_async();
      }
    }
    ptx::cp_async_bulk_commit_group();
    if (last) elements(to + done, begin + place, 0, end - done);
    ptx::st_shared_v4(kept(), make_uint4(state.x, state.y, done, place));
  }
  __device__ static void elements(char* to, uint32_t from, uint32_t begin, uint32_t end) {
#pragma unroll 1
    for (uint32_t i = begin; i < end; i += size) {
      if constexpr (size == 2)
        *reinterpret_cast<uint16_t*>(to + i) = ptx::ld_shared_u16(from + i);
      else
        *reinterpret_cast<uint32_t*>(to + i) = ptx::ld_shared(from + i);
    }
  }
};

// Bytes from the first row of the ring to the next.
__device__ inline uint32_t next_row(Params const& p, uint32_t row) {
  row += p.row_bytes;
  return row == uint32_t(p.out_bytes) ? 0 : row;
}

// Two neighbouring outputs of a unit, in the ring. `pairs`: both exist or none.
template <class T, bool pairs>
struct RingOutputs {
  uint32_t to;  // the first row's
  bool keep[2];

  __device__ RingOutputs(Params const& p, Stores<T> const& stores, Walk const& at, int unit, int t) {
    Outputs<T, pairs> const out(p, at, unit, t);
    Unit const u(p, unit);
    keep[0] = out.keep[0], keep[1] = out.keep[1];
    to = stores.place(at, u.image) + (u.place * kStreamColumns + 2 * t) * sizeof(T);
  }
  __device__ void store(uint32_t row, Vector<T, 2> const& v) const {
    if constexpr (pairs) {
      if (keep[0]) ptx::st_shared(to + row, reinterpret_cast<uint32_t const&>(v));
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (keep[e]) ptx::st_shared_u16(to + row + 2 * e, reinterpret_cast<uint16_t const&>(v.v[e]));
    }
  }
};

template <class To, class T>
__device__ inline To outputs_of(Params const& p, Stores<T> const& stores, Walk const& at, int unit, int t) {
  if constexpr (std::is_constructible_v<To, Params const&, Stores<T> const&, Walk const&, int, int>)
    return To(p, stores, at, unit, t);
  else
    return To(p, at, unit, t);
}

// A unit's inputs: where their first column is in the ring's first row, or any place for one without inputs.
template <class T, class U>
__device__ inline uint32_t unit_address(Ring<T> const& ring, Walk const& at, U const& u, int h, int base, int column,
                                        int window) {
  bool const meets = u.exists && column + window > 0 && column < ring.s.W;
  return ring.in_ring(u.image, ring.address(at, u.image, h, base)) +
         (meets ? column - ring.first_column(base) : 0) * int(sizeof(T));
}

// Ones where the elements of a pair are.
__device__ inline uint32_t pair_mask(bool exists, int column, int W) {
  return (exists && unsigned(column) < unsigned(W) ? 0xffffu : 0u) |
         (exists && unsigned(column + 1) < unsigned(W) ? 0xffff0000u : 0u);
}

// The fragments of a row of 16 units: pairs of columns 2t and 2t + 8 of units g and g + 8.
template <class T, int stride, bool odd>
struct Fragments {
  uint32_t address[2];
  uint32_t mask[stride][4];

  // The warp's units are those from `first` on.
  __device__ Fragments(Params const& p, Ring<T> const& ring, Walk const& at, int first, int images, int h, int base) {
    int const lane = int(threadIdx.x) % 32, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Unit const u(p, first + lane / 4 + 8 * i);
      int const column = base + u.place * kStreamColumns * stride;
      address[i] = unit_address(ring, at, u, h, base, column, 16 * stride) + 4 * t;
#pragma unroll
      for (int k = 0; k < stride; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          mask[k][2 * half + i] = pair_mask(u.exists && u.image < images, column + 16 * k + 8 * half + 2 * t, p.in.W);
    }
  }
  __device__ void load(uint32_t offset, uint32_t (&a)[stride][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t const from = address[i] + offset, word = odd ? from & ~3u : from;
#pragma unroll
      for (int k = 0; k < stride; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t v = ptx::ld_shared(word + 32 * k + 16 * half);
          if (odd) v = __byte_perm(v, ptx::ld_shared(word + 32 * k + 16 * half + 4), from & 2 ? 0x5432 : 0x3210);
          a[k][2 * half + i] = v & mask[k][2 * half + i];
        }
    }
  }
};

// `stored`: rows of outputs follow each other in memory, and go there by way of the ring of outputs.
template <class T, int R, int stride, bool odd, bool stored>
__global__ void __launch_bounds__(kStreamWarps * 32, ring_blocks(R, stride, false))
    gather_ring(__grid_constant__ Params const p) {
  constexpr int A = live(R, stride), turn = A * stride;
  static_assert((R - 1) % stride == 0 && stride * (A - 1) == R - 1);
  extern __shared__ __align__(16) unsigned char shared[];
  Team const team(p.warps);
  int const lane = int(threadIdx.x) % 32, t = lane % 4, first = team.warp * kStreamUnits, g = first + lane / 4;
  uint32_t const task = blockIdx.x * ring_teams(p.warps) + team.index;
  if (task >= p.walks * uint32_t(p.C)) return;
  Walk const at(p, int(task % uint32_t(p.C)), task / uint32_t(p.C));
  make_barriers(team, shared + team.index * p.team_bytes, p.stages);
  uint32_t const data = ptx::shared_address(shared) + team.index * p.team_bytes + kStreamRingBegin;
  Ring<T> ring(p.ring, p.in, p.stages, team.index * p.team_bytes, data);
  int const images = int(depthwise::smaller(p.N - at.n0, p.images));
  int const h0 = at.p0 * stride - p.pad_h, steps = (at.rows - 1) * stride + R;
  int const base = at.q0 * stride - p.pad_w - p.shift;
  ring.start(team, at, images, h0, steps, base);

  uint32_t band[R][stride][2];
  load_band<T>(p, at.c, band);
  float const bias = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[at.c * p.bias_stride]) : 0.f;
  Stores<T> const stores(p, team, at, images, data + p.stages * p.ring.stage_bytes);
  using To = std::conditional_t<stored, RingOutputs<T, !odd>, Outputs<T, !odd>>;
  To out0 = outputs_of<To>(p, stores, at, g, t), out1 = outputs_of<To>(p, stores, at, g + 8, t);
  Fragments<T, stride, odd> const inputs(p, ring, at, first, images, h0, base);

  float acc[A][4];  // of the rows of outputs that a row of inputs meets, each in its place till it is complete
  typename PairOf<T>::type spoilt{};
  uint32_t row = 0;
#pragma unroll 1
  for (int begin = 0; begin < steps; begin += turn) {
    if (stored) stores.prepare();
    team.sync();
    ring.refill();
    if (stored && begin >= R) stores.store(((begin - R) / stride + 1) * p.row_bytes, false);
#pragma unroll
    for (int i = 0; i < turn; ++i) {
      int const step = begin + i, odd_row = i % stride;
      if (step >= steps) break;
      if (odd_row == 0)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i / stride][e] = bias;
      if (ring.has(step)) {
        ring.open();
        uint32_t a[stride][4];
        inputs.load(ring.offset, a);
#pragma unroll
        for (int j = 0; j < A; ++j)
          if (stride * j + odd_row < R)
#pragma unroll
            for (int k = 0; k < stride; ++k)
              ptx::mma_m16n8k16<T>(acc[(i / stride - j + A) % A], a[k][0], a[k][1], a[k][2], a[k][3],
                                   band[stride * j + odd_row][k][0], band[stride * j + odd_row][k][1]);
        ring.close();
      }
      if (odd_row != 0 || step < R - 1) continue;
      float const(&sum)[4] = acc[(i / stride + 1) % A];
      Vector<T, 2> const v0{{narrow<T>(sum[0]), narrow<T>(sum[1])}};
      Vector<T, 2> const v1{{narrow<T>(sum[2]), narrow<T>(sum[3])}};
      spoilt = spoil(spoil(spoilt, v0), v1);
      if constexpr (stored) {
        out0.store(row, v0);
        out1.store(row, v1);
        row = next_row(p, row);
      } else {
        out0.store(v0);
        out1.store(v1);
      }
    }
  }
  if (stored) {
    stores.prepare();
    team.sync();
    stores.store(at.rows * p.row_bytes, true);
    ptx::cp_async_bulk_wait_group_read<0>();
  }
  if (!team.any(__low2float(spoilt) != 0 || __high2float(spoilt) != 0)) return;
  ptx::cp_async_bulk_wait_all();
  team.sync();
  again<T, stride>(p, task, first);
}

template <class T, int R, bool odd>
__global__ void __launch_bounds__(kStreamWarps * 32, ring_blocks(R, 2, true))
    spread_ring(__grid_constant__ Params const p) {
  extern __shared__ __align__(16) unsigned char shared[];
  Team const team(p.warps);
  int const lane = int(threadIdx.x) % 32, t = lane % 4, first = team.warp * kStreamUnits, g = first + lane / 4;
  uint32_t const task = blockIdx.x * ring_teams(p.warps) + team.index;
  if (task >= p.walks * uint32_t(p.C)) return;
  Walk const at(p, int(task % uint32_t(p.C)), task / uint32_t(p.C));
  make_barriers(team, shared + team.index * p.team_bytes, p.stages);
  uint32_t const data = ptx::shared_address(shared) + team.index * p.team_bytes + kStreamRingBegin;
  Ring<T> ring(p.ring, p.in, p.stages, team.index * p.team_bytes, data);
  int const images = int(depthwise::smaller(p.N - at.n0, p.images));
  // Row i of y that the walk takes is v0 + i; after it rows 2 (v0 + i) - pad_h and the next of x are complete.
  int const last = at.p0 + at.rows - 1 + p.pad_h, lowest = at.p0 + p.pad_h - (R - 1);
  int const v0 = lowest >= 0 ? lowest / 2 : (lowest - 1) / 2, steps = last / 2 - v0 + 1;
  int const base = at.q0 - p.pad_w - p.shift;
  ring.start(team, at, images, v0, steps, base);

  uint32_t band[R][2][2];
  load_spread_band<T>(p, at.c, band);
  using To = std::conditional_t<odd, ShiftedSpreadOutputs<T>, SpreadOutputs<T, true>>;
  To const out0(p, at, g, t), out1(p, at, g + 8, t);
  int64_t const row_bytes = p.out_h * int64_t(sizeof(T));
  Fragments<T, 1, odd> const inputs(p, ring, at, first, images, v0, base);

  float acc[R][2][4] = {};  // of the rows of x that a row of y meets, each in its place till it is complete
  typename PairOf<T>::type spoilt{};
  int y = 2 * v0 - p.pad_h;
#pragma unroll 1
  for (int first_step = 0; first_step < steps; first_step += R) {
    team.sync();
    ring.refill();
#pragma unroll
    for (int i = 0; i < R; ++i) {
      if (first_step + i >= steps) break;
      if (ring.has(first_step + i)) {
        ring.open();
        uint32_t a[1][4];
        inputs.load(ring.offset, a);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int b = 0; b < 2; ++b)
            ptx::mma_m16n8k16<T>(acc[(2 * i + r) % R][b], a[0][0], a[0][1], a[0][2], a[0][3], band[r][b][0],
                                 band[r][b][1]);
        ring.close();
      }
#pragma unroll
      for (int e = 0; e < 2; ++e, ++y) {
        if (y < at.p0 || y >= at.p0 + at.rows) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Vector<T, 4> v;
#pragma unroll
          for (int j = 0; j < 4; ++j) v.v[j] = narrow<T>(acc[(2 * i + e) % R][j % 2][2 * half + j / 2]);
          spoilt = spoil(spoil(spoilt, Vector<T, 2>{{v.v[0], v.v[1]}}), Vector<T, 2>{{v.v[2], v.v[3]}});
          (half == 0 ? out0 : out1).store(y * row_bytes, v);
        }
      }
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[2 * i % R][b][j] = acc[(2 * i + 1) % R][b][j] = 0;
    }
  }
  __syncwarp();  // other lanes may have stored what this one looks at again
  if (__low2float(spoilt) != 0 || __high2float(spoilt) != 0) spread_again<T>(p, task, first);
}

// ---- host side

inline cudaError_t start_ring(void (*kernel)(Params), Params p, int element, int64_t walks, RingTile const& t,
                              cudaStream_t stream) {
  p.ring = t.in, p.warps = t.warps, p.stages = t.stages, p.team_bytes = int(t.team_bytes), p.out_bytes = t.out_bytes;
  p.row_bytes = uint32_t(p.out_W) * element;
  if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
    return error;
  kernel<<<unsigned(ceil_div(walks, t.teams)), t.teams * t.warps * 32, size_t(t.shared_bytes), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::stream
