// The walks of stream.cuh over small images whose planes lie one after the other in memory. A block takes `channels`
// neighbouring channels of some images at a time: the copy engine brings their planes as one run of each image, whole
// lines wherever rows begin, to one of several stages in shared memory, ahead of the warps. A warp has a channel and a
// stretch of its rows, of 16 units of all the images; fprop's and dgrad's outputs take the same way back. A block stays
// with its channels as long as it has images of them. Of larger images a block takes bands of rows.
#pragma once

#include "stream_walk.cuh"

namespace conv2d_ext::stream {

// What a block takes at a time; the next is of the next images, then of the next channels.
struct PlanesItem {
  int c0;
  uint32_t group;

  __device__ PlanesItem(Params const& p, uint32_t item) {
    uint32_t const unit = item / p.groups;
    c0 = int(unit) * p.channels, group = item - unit * p.groups;
  }
  __device__ void next(Params const& p) {
    if (++group < p.groups) return;
    group = 0, c0 += p.channels;
  }
  __device__ int64_t n0(Params const& p) const { return int64_t(group) * p.images; }
  __device__ int images(Params const& p) const { return int(depthwise::smaller(p.N - n0(p), p.images)); }
};

// A block's items of fprop or dgrad over whole planes: of its channels as long as it has images of them, or
// (`by_images`) a grid's length apart, so that blocks have neighbouring channels of the same images at a time and
// memory is read and written in its order; then the filters change with every item.
struct PlanesTurn {
  uint32_t group;
  int c0;

  __device__ PlanesTurn(Params const& p, uint32_t i) {
    uint32_t const item = p.by_images ? blockIdx.x + i * gridDim.x : first(p, blockIdx.x) + i;
    uint32_t const outer = p.by_images ? p.units : p.groups, high = item / outer, low = item - high * outer;
    group = p.by_images ? high : low, c0 = int(p.by_images ? low : high) * p.channels;
  }
  __device__ static uint32_t first(Params const& p, uint32_t block) {
    return uint32_t(uint64_t(p.items) * block / gridDim.x);
  }
  __device__ static uint32_t count(Params const& p) {
    return p.by_images ? (p.items - blockIdx.x + gridDim.x - 1) / gridDim.x
                       : first(p, blockIdx.x + 1) - first(p, blockIdx.x);
  }
  __device__ int64_t n0(Params const& p) const { return int64_t(group) * p.images; }
  __device__ int images(Params const& p) const { return int(depthwise::smaller(p.N - n0(p), p.images)); }
};

// A warp's channel of a block's, and its rows of outputs: of a band from row `first` on, whose rows `pieces` warps
// share.
struct PlanesStretch {
  int channel, p0, rows;

  __device__ explicit PlanesStretch(Params const& p, int warp) : PlanesStretch(p, warp, 0, 1) {}
  __device__ PlanesStretch(Params const& p, int warp, int first, int pieces) {
    int const stretch = warp / p.channels;
    channel = warp - stretch * p.channels, p0 = first + stretch / pieces * p.rows;
    rows = p.out_H - p0 < p.rows ? p.out_H - p0 : p.rows;
  }
};
// The first of a warp's columns of a band, as Walk counts them.
__device__ inline int band_column(Params const& p, int warp) {
  return int(unsigned(warp / p.channels) % p.pieces) * p.columns;
}

// As a number that the compiler knows to be the same in all lanes.
__device__ inline int planes_warp() { return __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0); }

// The barriers of the stages are at the beginning of shared memory.
__device__ inline uint64_t* planes_barrier(int stage) {
  extern __shared__ __align__(16) unsigned char shared[];
  return reinterpret_cast<uint64_t*>(shared) + stage;
}
__device__ inline uint32_t planes_stages() { return ptx::shared_address(planes_barrier(0)) + kPlanesBegin; }
__device__ inline void make_planes_barriers(int stages) {
  if (threadIdx.x == 0)
    for (int i = 0; i < stages; ++i) ptx::mbarrier_init(planes_barrier(i), 1);
  ptx::fence_mbarrier_init();
  __syncthreads();
}

template <class T>
__device__ inline T const* planes_of(Source const& s, int64_t n, int c0) {
  return static_cast<T const*>(s.data) + n * s.n + c0 * s.c;
}

// Has the copy engine bring a run. What wgrad reads L2 gives up first: lines that other kernels have written stay, and
// need not be written back meanwhile.
template <bool sums>
__device__ inline void bring_run(uint32_t to, void const* from, uint32_t bytes, uint64_t* full) {
  if constexpr (sums)
    ptx::cp_async_bulk(to, from, bytes, full, ptx::createpolicy_evict_first());
  else
    ptx::cp_async_bulk(to, from, bytes, full);
}

// Has the copy engine bring an item to a stage, by a warp: x, and for wgrad y behind it.
template <class T, bool sums, class Item>
__device__ inline void fill_planes(Params const& p, Item const& at, int stage) {
  int const lane = int(threadIdx.x) % 32, images = at.images(p);
  uint32_t const bytes = uint32_t(p.channels * p.in.H * p.in.W) * sizeof(T);
  uint32_t const bytes_y = sums ? uint32_t(p.channels * p.y.H * p.y.W) * sizeof(T) : 0;
  uint64_t* const full = planes_barrier(stage);
  uint32_t const to = planes_stages() + stage * p.stage_bytes;
  if (lane == 0) ptx::mbarrier_arrive_expect_tx(full, uint32_t(images) * (bytes + bytes_y));
  __syncwarp();
  if (lane >= images) return;
  int64_t const n = at.n0(p) + lane;
  bring_run<sums>(to + lane * p.image_bytes, planes_of<T>(p.in, n, at.c0), bytes, full);
  if (sums)
    bring_run<sums>(to + p.images * p.image_bytes + lane * p.image_bytes_y, planes_of<T>(p.y, n, at.c0), bytes_y, full);
}

// Larger images: an item is a band of rows of some images' planes, one run of each plane, or of all of a block's planes
// of an image where a band has whole ones. The copy engine takes multiples of 16 bytes of addresses that are ones: it
// brings what lies around a run, too, and stores what of it are such multiples. A run lies as far from 16 bytes in
// shared memory as in the tensor.
template <class T>
struct Run {
  uint64_t start;
  uint32_t bytes;

  // Rows `row` to `end` of channel c, or whole channels.
  __device__ Run(Params const& p, void const* data, int64_t n_stride, int64_t c_stride, int H, int W, int64_t n, int c,
                 int row, int end)
      : start(reinterpret_cast<uint64_t>(static_cast<T const*>(data) + n * n_stride + c * c_stride + int64_t(row) * W)),
        bytes(uint32_t((p.run_channels > 1 ? p.run_channels * H : end - row) * W) * sizeof(T)) {}
  __device__ uint32_t within() const { return uint32_t(start % 16); }
  __device__ void const* around() const { return reinterpret_cast<void const*>(start - within()); }
  __device__ uint32_t bytes_around() const { return bytes > 0 ? (within() + bytes + 15) / 16 * 16 : 0; }
  __device__ uint32_t head() const { return min((16 - within()) % 16, bytes); }
  __device__ uint32_t middle() const { return (bytes - head()) / 16 * 16; }
};

// Rows p0 to p1 of outputs (wgrad: of y) of a band, and those of inputs that they meet.
template <int R, int stride, bool spread>
struct Band {
  int64_t n0;
  int images, p0, p1, h0, h1;

  __device__ Band(Params const& p, uint32_t group) {
    uint32_t const which = group / p.bands;
    n0 = int64_t(which) * p.images, images = int(depthwise::smaller(p.N - n0, p.images));
    p0 = int(group - which * p.bands) * p.band_rows, p1 = min(p0 + p.band_rows, p.out_H);
    int const low = p0 + p.pad_h - (R - 1);
    h0 = max(!spread ? p0 * stride - p.pad_h : low >= 0 ? low / 2 : (low - 1) / 2, 0);
    if (p.run_channels > 1) h0 = 0;
    h1 = max(min((spread ? (p1 - 1 + p.pad_h) / 2 + 1 : (p1 - 1) * stride - p.pad_h + R), p.in.H), h0);
  }
  template <class T>
  __device__ Run<T> in(Params const& p, int image, int c) const {
    return {p, p.in.data, p.in.n, p.in.c, p.in.H, p.in.W, n0 + image, c, h0, h1};
  }
  template <class T>
  __device__ Run<T> y(Params const& p, int c) const {
    return {p, p.y.data, p.y.n, p.y.c, p.y.H, p.y.W, n0, c, p0, p1};
  }
  template <class T>
  __device__ Run<T> out(Params const& p, int image, int c) const {
    return {p, p.out, p.out_n, p.out_c, p.out_H, p.out_W, n0 + image, c, p0, p1};
  }
};

// As fill_planes, of a band; wgrad has one image.
template <class T, bool sums, class Band>
__device__ inline void fill_band(Params const& p, Band const& band, int c0, int stage) {
  int const lane = int(threadIdx.x) % 32, runs = p.channels / p.run_channels;
  int const image = lane / runs, channel = lane - image * runs;
  bool const copies = image < band.images;
  uint64_t* const full = planes_barrier(stage);
  uint32_t const to = planes_stages() + stage * p.stage_bytes;
  Run<T> const in = band.template in<T>(p, image, c0 + channel);
  uint32_t const bytes = copies ? in.bytes_around() : 0;
  uint32_t all = bytes, bytes_y = 0;
  if constexpr (sums) bytes_y = copies ? band.template y<T>(p, c0 + channel).bytes_around() : 0, all += bytes_y;
  all = __reduce_add_sync(0xffffffffu, all);
  if (lane == 0) ptx::mbarrier_arrive_expect_tx(full, all);
  __syncwarp();
  if (bytes > 0) bring_run<sums>(to + image * p.image_bytes + channel * p.channel_bytes, in.around(), bytes, full);
  if constexpr (sums)
    if (bytes_y > 0)
      bring_run<sums>(to + p.image_bytes + channel * p.channel_bytes_y, band.template y<T>(p, c0 + channel).around(),
                      bytes_y, full);
}

// Has the copy engine take a band's outputs from `place` back. Elements at both ends of a run are for half a warp.
template <class T, class Band>
__device__ inline void store_band(Params const& p, Band const& band, int c0, uint32_t place, int warp) {
  int const lane = int(threadIdx.x) % 32, runs = p.channels / p.run_channels;
  auto run_at = [&](int copy, auto const& store) {
    int const image = copy / runs, of = copy - image * runs;
    if (image >= band.images) return;
    Run<T> const out = band.template out<T>(p, image, c0 + of);
    store(out, place + image * p.image_bytes_y + of * p.channel_bytes_y + out.within());
  };
  if (warp == 0) {
    run_at(lane, [&](Run<T> const& out, uint32_t from) {
      if (out.middle() > 0)
        ptx::cp_async_bulk_store(reinterpret_cast<void*>(out.start + out.head()), from + out.head(), out.middle());
    });
    ptx::cp_async_bulk_commit_group();
  }
#pragma unroll 1
  for (int copy = 2 * warp; copy < band.images * runs; copy += 2 * kPlanesWarps)
    run_at(copy + lane / 16, [&](Run<T> const& out, uint32_t from) {
      uint32_t const i = lane % 8 * 2 + (lane % 16 < 8 ? 0 : out.head() + out.middle());
      if (lane % 16 < 8 ? i < out.head() : i < out.bytes)
        *reinterpret_cast<uint16_t*>(out.start + i) = ptx::ld_shared_u16(from + i);
    });
}

// A row of a warp's units: pairs of columns 2t and 2t + 1 of each of `count` times 8 columns of units g and g + 8.
// `odd`: pairs may lie across words.
template <int count, bool odd>
struct PlanePairs {
  uint32_t address[2];  // of row 0 in stage 0
  uint32_t mask[count][2];

  // `column`: the first unit's first; `planes`: of the warp's channel of the first image.
  __device__ PlanePairs(Params const& p, Source const& s, int images, int column, int unit_columns, uint32_t planes,
                        int image_bytes) {
    int const lane = int(threadIdx.x) % 32, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Unit const u(p, lane / 4 + 8 * i);
      int const x = column + u.place * unit_columns;
      bool const meets = u.exists && x + 8 * count > 0 && x < s.W;
      address[i] = planes + u.image * image_bytes + ((meets ? x : 0) + 2 * t) * 2;
#pragma unroll
      for (int k = 0; k < count; ++k) {
        bool const exists = u.exists && u.image < images;
        mask[k][i] = (exists && unsigned(x + 8 * k + 2 * t) < unsigned(s.W) ? 0xffffu : 0u) |
                     (exists && unsigned(x + 8 * k + 2 * t + 1) < unsigned(s.W) ? 0xffff0000u : 0u);
      }
    }
  }
  __device__ uint32_t load(uint32_t offset, int k, int i) const {
    uint32_t const from = address[i] + offset, word = (odd ? from & ~3u : from) + 16 * k;
    uint32_t v = ptx::ld_shared(word);
    if (odd) v = __byte_perm(v, ptx::ld_shared(word + 4), from & 2 ? 0x5432 : 0x3210);
    return v & mask[k][i];
  }
};

// Rows of an odd number of elements begin on words and off them in turn: windows of those off words begin an element
// earlier, and meet taps an element later, so that all pairs are words.
template <int count>
struct TurnedPairs {
  uint32_t address[2];         // from a window's first word
  uint32_t mask[2][count][2];  // of rows of the first one's kind, and the others

  __device__ TurnedPairs(Params const& p, int images, int column) {
    int const lane = int(threadIdx.x) % 32, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Unit const u(p, lane / 4 + 8 * i);
      int const at = column + u.place * kStreamColumns, x = at - p.pad_w;
      bool const meets = u.exists && x + 8 * count > 0 && x < p.in.W;
      address[i] = u.image * p.image_bytes + (meets ? at : p.pad_w / 2 * 2) * 2 + 4 * t;
#pragma unroll
      for (int off = 0; off < 2; ++off)
#pragma unroll
        for (int k = 0; k < count; ++k) {
          bool const exists = u.exists && u.image < images;
          int const from = x - off + 8 * k + 2 * t;
          mask[off][k][i] = (exists && unsigned(from) < unsigned(p.in.W) ? 0xffffu : 0u) |
                            (exists && unsigned(from + 1) < unsigned(p.in.W) ? 0xffff0000u : 0u);
        }
    }
  }
  // Exchanges the two kinds of rows.
  __device__ void turn() {
#pragma unroll
    for (int k = 0; k < count; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t const other = mask[0][k][i];
        mask[0][k][i] = mask[1][k][i], mask[1][k][i] = other;
      }
  }
  __device__ uint32_t load(uint32_t word, int off, int k, int i) const {
    return ptx::ld_shared(address[i] + word + 16 * k) & mask[off][k][i];
  }
};

// Neighbouring pairs of outputs of a unit, in shared memory. `words`: rows begin on words.
template <class T, int pairs, bool words>
struct PlaneOutputs {
  uint32_t to;  // of row 0 in the first of two places
  bool keep[2 * pairs];

  __device__ PlaneOutputs(Params const& p, int unit, int unit_columns, uint32_t planes, int column) {
    Unit const u(p, unit);
    int const x = column + u.place * unit_columns + int(threadIdx.x) % 4 * 2 * pairs;
    to = planes + u.image * p.image_bytes_y + x * sizeof(T);
#pragma unroll
    for (int e = 0; e < 2 * pairs; ++e) keep[e] = u.exists && x + e < p.out_W;
  }
  __device__ void store(uint32_t offset, int pair, uint32_t v) const {
    uint32_t const at = to + offset + pair * 4;
    if constexpr (words) {
      if (keep[2 * pair]) ptx::st_shared(at, v);
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (keep[2 * pair + e]) ptx::st_shared_u16(at + 2 * e, uint16_t(v >> 16 * e));
    }
  }
};

// Two sums as elements of 16 bits; what is not finite makes a NaN of `spoilt`, which begins as zero. `packed`: by one
// instruction.
template <class T, bool packed = true>
__device__ inline uint32_t planes_pair(float low, float high, uint32_t& spoilt) {
  using Pair = typename PairOf<T>::type;
  if constexpr (packed) {
    Pair v;
    if constexpr (std::is_same_v<T, __half>)
      v = __floats2half2_rn(low, high);
    else
      v = __floats2bfloat162_rn(low, high);
    Pair const sum = __hfma2(v, Pair(), reinterpret_cast<Pair const&>(spoilt));
    spoilt = reinterpret_cast<uint32_t const&>(sum);
    return reinterpret_cast<uint32_t const&>(v);
  } else {
    Vector<T, 2> const v{{narrow<T>(low), narrow<T>(high)}};
    Pair const sum = spoil(reinterpret_cast<Pair const&>(spoilt), v);
    spoilt = reinterpret_cast<uint32_t const&>(sum);
    return reinterpret_cast<uint32_t const&>(v);
  }
}
// NaN in either half is no zero.
__device__ inline bool is_spoilt(uint32_t spoilt) { return (spoilt & 0x7fff7fff) != 0; }

// The share of a block of fprop or dgrad: walk(images, stage, outputs), which is a warp's of an item, between the
// copies there and back; begin(c): the warp's channel changes.
template <class T, class Begin, class Walking>
__device__ inline void for_each_item(Params const& p, int warp, int channel, uint32_t begin_item, uint32_t end,
                                     Begin const& begin, Walking const& walk) {
  int const lane = int(threadIdx.x) % 32;
  uint32_t const outputs = planes_stages() + p.stages * p.stage_bytes;
  make_planes_barriers(p.stages);
  PlanesItem at(p, begin_item), ahead = at;
  auto fill = [&](int stage) {
    fill_planes<T, false>(p, ahead, stage);
    ahead.next(p);
  };
  if (warp == 0)
#pragma unroll 1
    for (uint32_t i = begin_item; i < end && i < begin_item + p.stages; ++i) fill(int(i - begin_item));
  int stage = 0, parity = 0, c0 = -1;
  uint32_t place = 0;
#pragma unroll 1
  for (uint32_t item = begin_item; item < end; ++item, at.next(p)) {
    int const images = at.images(p);
    if (at.c0 != c0) begin(channel + (c0 = at.c0));
    ptx::mbarrier_wait(planes_barrier(stage), parity);
    walk(images, uint32_t(stage * p.stage_bytes), place);
    // The next outputs' place is free, the stage has been read, and these outputs are there.
    ptx::fence_proxy_async();
    if (warp == 0) ptx::cp_async_bulk_wait_group_read<0>();
    __syncthreads();
    if (warp == 0) {
      if (lane < images)
        ptx::cp_async_bulk_store(static_cast<T*>(p.out) + (at.n0(p) + lane) * p.out_n + at.c0 * p.out_c,
                                 outputs + place + lane * p.image_bytes_y,
                                 uint32_t(p.channels * p.out_H * p.out_W) * sizeof(T));
      ptx::cp_async_bulk_commit_group();
      if (item + p.stages < end) fill(stage);
    }
    place = place == 0 ? uint32_t(p.images * p.image_bytes_y) : 0;
    if (++stage == p.stages) stage = 0, parity ^= 1;
  }
}

// The share of a block of fprop or dgrad over whole planes: walk(images, stage, outputs), which is a warp's of an item,
// between the copies there and back; begin(c): the warp's channel changes. A warp more asks for the copies, while the
// others walk on.
template <class T, class Begin, class Walking>
__device__ inline void for_each_turn(Params const& p, int warp, int channel, Begin const& begin, Walking const& walk) {
  make_planes_barriers(p.stages);
  bool const copies = warp == kPlanesWarps;
  uint32_t const count = PlanesTurn::count(p), place_bytes = uint32_t(p.images * p.image_bytes_y);
  int stage = 0, parity = 0, c0 = PlanesTurn(p, 0).c0;
  uint32_t place = 0;
  auto copy_back = [&](uint32_t i) {
    int const lane = int(threadIdx.x) % 32;
    PlanesTurn const at(p, i);
    if (lane < at.images(p))
      ptx::cp_async_bulk_store(static_cast<T*>(p.out) + (at.n0(p) + lane) * p.out_n + at.c0 * p.out_c,
                               planes_stages() + p.stages * p.stage_bytes + place + lane * p.image_bytes_y,
                               uint32_t(p.channels * p.out_H * p.out_W) * sizeof(T));
    ptx::cp_async_bulk_commit_group();
    if (i + p.stages < count) fill_planes<T, false>(p, PlanesTurn(p, i + p.stages), stage);
  };
  if (!copies) begin(channel + c0);
  if (copies)
#pragma unroll 1
    for (uint32_t i = 0; i < count && i < p.stages; ++i) fill_planes<T, false>(p, PlanesTurn(p, i), int(i));
#pragma unroll 1
  for (uint32_t i = 0; i < count; ++i) {
    if (copies) {
      ptx::cp_async_bulk_wait_group_read<0>();  // the next outputs' place is free
    } else {
      int const images = PlanesTurn(p, i).images(p);
      ptx::mbarrier_wait(planes_barrier(stage), parity);
      walk(images, uint32_t(stage * p.stage_bytes), place);
      ptx::fence_proxy_async();
      // The filters come while the warps wait for each other.
      if (i + 1 < count)
        if (int const next = PlanesTurn(p, i + 1).c0; next != c0) begin(channel + (c0 = next));
    }
    __syncthreads();  // one for all warps: the stage has been read, and these outputs are there
    if (copies) copy_back(i);
    place = place == 0 ? place_bytes : 0;
    if (++stage == p.stages) stage = 0, parity ^= 1;
  }
}

// The same over bands: walk(images, inputs, outputs, stretch); the places are where rows 0 of the planes would lie.
template <class T, class Band, class Begin, class Walking>
__device__ inline void for_each_band(Params const& p, int warp, int channel, uint32_t begin_item, uint32_t end,
                                     Begin const& begin, Walking const& walk) {
  uint32_t const outputs = planes_stages() + p.stages * p.stage_bytes;
  make_planes_barriers(p.stages);
  PlanesItem at(p, begin_item), ahead = at;
  auto fill = [&](int stage) {
    fill_band<T, false>(p, Band(p, ahead.group), ahead.c0, stage);
    ahead.next(p);
  };
  if (warp == 0)
#pragma unroll 1
    for (uint32_t i = begin_item; i < end && i < begin_item + p.stages; ++i) fill(int(i - begin_item));
  int const of_run = p.run_channels > 1 ? 0 : channel;
  int stage = 0, parity = 0, c0 = -1;
  uint32_t place = 0;
#pragma unroll 1
  for (uint32_t item = begin_item; item < end; ++item, at.next(p)) {
    Band const band(p, at.group);
    if (at.c0 != c0) begin(channel + (c0 = at.c0));
    ptx::mbarrier_wait(planes_barrier(stage), parity);
    walk(band.images,
         uint32_t(stage * p.stage_bytes) + band.template in<T>(p, 0, c0 + of_run).within() -
             uint32_t(band.h0 * p.in.W) * uint32_t(sizeof(T)),
         place + band.template out<T>(p, 0, c0 + of_run).within() - uint32_t(band.p0 * p.out_W) * uint32_t(sizeof(T)),
         PlanesStretch(p, warp, band.p0, int(p.pieces)));
    // The next outputs' place is free, the stage has been read, and these outputs are there.
    ptx::fence_proxy_async();
    if (warp == 0) ptx::cp_async_bulk_wait_group_read<0>();
    __syncthreads();
    store_band<T>(p, band, c0, outputs + place, warp);
    if (warp == 0 && item + p.stages < end) fill(stage);
    place = place == 0 ? uint32_t(p.images * p.image_bytes_y) : 0;
    if (++stage == p.stages) stage = 0, parity ^= 1;
  }
}

// Has every warp make its outputs of the block's items again that are NaN, if there are any: for_each(item) calls
// item(c0, group) of each, again(task) makes them.
template <class ForEach, class Again>
__device__ inline void if_spoilt(Params const& p, int warp, int copying, bool spoilt, ForEach const& for_each,
                                 Again const& again) {
  if (warp == copying) ptx::cp_async_bulk_wait_group_read<0>();
  if (__syncthreads_or(spoilt) == 0) return;
  if (warp == copying) ptx::cp_async_bulk_wait_all();
  __syncthreads();
  if (warp >= kPlanesWarps) return;
  int const channel = warp % p.channels, part = warp / p.channels, parts = kPlanesWarps / p.channels;
  for_each([&](int c0, uint32_t group) {
    // As Walk counts: of a band, `parts` warps have pieces of rows of its stretches.
    uint32_t const which = group / p.bands, first = (group - which * p.bands) * parts;
    again((which * p.stretches * p.pieces + first + part) * uint32_t(p.C) + c0 + channel);
  });
}
// Of for_each_turn.
template <class Again>
__device__ inline void if_spoilt(Params const& p, int warp, bool spoilt, Again const& again) {
  auto const each = [&](auto const& item) {
#pragma unroll 1
    for (uint32_t i = 0; i < PlanesTurn::count(p); ++i) item(PlanesTurn(p, i).c0, PlanesTurn(p, i).group);
  };
  if_spoilt(p, warp, kPlanesWarps, spoilt, each, again);
}
// Of the others.
template <class Again>
__device__ inline void if_spoilt(Params const& p, int warp, uint32_t begin, uint32_t end, bool spoilt,
                                 Again const& again) {
  auto const each = [&](auto const& item) {
    PlanesItem at(p, begin);
#pragma unroll 1
    for (uint32_t i = begin; i < end; ++i, at.next(p)) item(at.c0, at.group);
  };
  if_spoilt(p, warp, 0, spoilt, each, again);
}

// A warp more asks for the copies where that is faster.
constexpr bool gather_beside(int stride, bool odd, bool bands) { return stride == 1 && !odd && !bands; }
template <class T, int R, int stride, bool odd, bool words, bool bands = false>
__global__ void __launch_bounds__((kPlanesWarps + gather_beside(stride, odd, bands)) * 32, planes_blocks(R, stride))
    gather_planes(__grid_constant__ Params const p) {
  constexpr int A = live(R, stride), turn = A * stride;
  constexpr bool packed = bands || gather_beside(stride, odd, bands);
  int const warp = planes_warp(), g = int(threadIdx.x) % 32 / 4;
  PlanesStretch const mine(p, warp);
  uint32_t const row_bytes = p.in.W * sizeof(T), out_row_bytes = p.out_W * sizeof(T);
  uint32_t const planes = planes_stages() + mine.channel * (bands ? p.channel_bytes : p.in.H * row_bytes);
  uint32_t const outputs =
      planes_stages() + p.stages * p.stage_bytes + mine.channel * (bands ? p.channel_bytes_y : p.out_H * out_row_bytes);
  int const column = bands ? band_column(p, warp) : 0;
  PlaneOutputs<T, 1, words> const out0(p, g, kStreamColumns, outputs, column);
  PlaneOutputs<T, 1, words> const out1(p, g + 8, kStreamColumns, outputs, column);
  auto inputs_of = [&](int images) {
    return PlanePairs<1 + stride, odd>(p, p.in, images, column * stride - p.pad_w - p.shift, kStreamColumns * stride,
                                       planes, p.image_bytes);
  };
  int present = p.images;
  PlanePairs<1 + stride, odd> inputs = inputs_of(present);
  uint32_t band[R][stride][2];
  float bias = 0;
  uint32_t spoilt = 0;
  auto begin_channel = [&](int c) {
    load_band<T>(p, c, band);
    bias = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
  };
  auto walk = [&](int images, uint32_t stage, uint32_t place, PlanesStretch const& mine) {
    if (images != present) inputs = inputs_of(present = images);
    int const h0 = mine.p0 * stride - p.pad_h, steps = mine.rows > 0 ? (mine.rows - 1) * stride + R : 0;
    uint32_t row = stage + h0 * int(row_bytes), out = place + mine.p0 * out_row_bytes;
    float acc[A][4];  // of the rows of outputs that a row of inputs meets, each in its place till it is complete
#pragma unroll 1
    for (int first = 0; first < steps; first += turn) {
#pragma unroll
      for (int i = 0; i < turn; ++i, row += row_bytes) {
        int const step = first + i, odd_row = i % stride;
        if (step >= steps) break;
        if (odd_row == 0)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i / stride][e] = 0;
        if (unsigned(h0 + step) < unsigned(p.in.H)) {
          uint32_t a[2 + 2 * stride];  // with stride 2 of 24 columns
#pragma unroll
          for (int j = 0; j < 2 + 2 * stride; ++j) a[j] = inputs.load(row, j / 2, j % 2);
#pragma unroll
          for (int j = 0; j < A; ++j)
            if (int const r = stride * j + odd_row; r < R) {
              float (&sum)[4] = acc[(i / stride - j + A) % A];
              ptx::mma_m16n8k16<T>(sum, a[0], a[1], a[2], a[3], band[r][0][0], band[r][0][1]);
              if constexpr (stride == 2) ptx::mma_m16n8k8<T>(sum, a[4], a[5], band[r][1][0]);
            }
        }
        if (odd_row != 0 || step < R - 1) continue;
        float const(&sum)[4] = acc[(i / stride + 1) % A];
        out0.store(out, 0, planes_pair<T, packed>(sum[0] + bias, sum[1] + bias, spoilt));
        out1.store(out, 0, planes_pair<T, packed>(sum[2] + bias, sum[3] + bias, spoilt));
        out += out_row_bytes;
      }
    }
  };
  auto const make_again = [&](uint32_t task) { again<T, stride>(p, task); };
  auto const walk_all = [&](int images, uint32_t stage, uint32_t place) { walk(images, stage, place, mine); };
  if constexpr (gather_beside(stride, odd, bands)) {
    for_each_turn<T>(p, warp, mine.channel, begin_channel, walk_all);
    if_spoilt(p, warp, is_spoilt(spoilt), make_again);
  } else {
    uint32_t const begin = uint32_t(uint64_t(p.items) * blockIdx.x / gridDim.x);
    uint32_t const end = uint32_t(uint64_t(p.items) * (blockIdx.x + 1) / gridDim.x);
    if constexpr (bands)
      for_each_band<T, Band<R, stride, false>>(p, warp, mine.channel, begin, end, begin_channel, walk);
    else
      for_each_item<T>(p, warp, mine.channel, begin, end, begin_channel, walk_all);
    if_spoilt(p, warp, begin, end, is_spoilt(spoilt), make_again);
  }
}

// The same with stride 1 of rows of an odd number of elements.
template <class T, int R, bool bands>
__global__ void __launch_bounds__(kPlanesWarps * 32, planes_blocks(R, 1))
    turned_planes(__grid_constant__ Params const p) {
  constexpr int A = R, turn = 2 * R;
  int const warp = planes_warp(), g = int(threadIdx.x) % 32 / 4;
  PlanesStretch const mine(p, warp);
  uint32_t const begin = uint32_t(uint64_t(p.items) * blockIdx.x / gridDim.x);
  uint32_t const end = uint32_t(uint64_t(p.items) * (blockIdx.x + 1) / gridDim.x);
  uint32_t const row_bytes = p.in.W * sizeof(T), out_row_bytes = p.out_W * sizeof(T);
  uint32_t const planes = planes_stages() + mine.channel * (bands ? p.channel_bytes : p.in.H * row_bytes);
  uint32_t const outputs =
      planes_stages() + p.stages * p.stage_bytes + mine.channel * (bands ? p.channel_bytes_y : p.out_H * out_row_bytes);
  int const column = bands ? band_column(p, warp) : 0;
  PlaneOutputs<T, 1, false> const out0(p, g, kStreamColumns, outputs, column);
  PlaneOutputs<T, 1, false> const out1(p, g + 8, kStreamColumns, outputs, column);
  int present = p.images, off = 0;
  TurnedPairs<2> inputs(p, present, column);
  uint32_t band[2][R][1][2];  // of the first row's kind, and the other
  float bias = 0;
  uint32_t spoilt = 0;
  auto begin_channel = [&](int c) {
    load_band<T>(p, c, band[0], off);
    load_band<T>(p, c, band[1], 1 - off);
    bias = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
  };
  auto walk = [&](int images, uint32_t stage, uint32_t place, PlanesStretch const& mine) {
    int const h0 = mine.p0 - p.pad_h, steps = mine.rows > 0 ? mine.rows - 1 + R : 0;
    uint32_t row = planes + stage + h0 * int(row_bytes) - 2 * p.pad_w, out = place + mine.p0 * out_row_bytes;
    if (images != present) {
      inputs = TurnedPairs<2>(p, present = images, column);
      if (off) inputs.turn();
    }
    if ((row & 2) != 2 * off) {
      off = 1 - off, inputs.turn();
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t const other = band[0][r][0][i];
          band[0][r][0][i] = band[1][r][0][i], band[1][r][0][i] = other;
        }
    }
    float acc[A][4];  // of the rows of outputs that a row of inputs meets, each in its place till it is complete
#pragma unroll 1
    for (int first = 0; first < steps; first += turn) {
#pragma unroll
      for (int i = 0; i < turn; ++i, row += row_bytes) {
        int const step = first + i;
        if (step >= steps) break;
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i % A][e] = 0;
        if (unsigned(h0 + step) < unsigned(p.in.H)) {
          uint32_t a[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) a[j] = inputs.load(row & ~3u, i % 2, j / 2, j % 2);
#pragma unroll
          for (int j = 0; j < A; ++j)
            ptx::mma_m16n8k16<T>(acc[(i - j + 2 * A) % A], a[0], a[1], a[2], a[3], band[i % 2][j][0][0],
                                 band[i % 2][j][0][1]);
        }
        if (step < R - 1) continue;
        float const(&sum)[4] = acc[(i + 1) % A];
        out0.store(out, 0, planes_pair<T>(sum[0] + bias, sum[1] + bias, spoilt));
        out1.store(out, 0, planes_pair<T>(sum[2] + bias, sum[3] + bias, spoilt));
        out += out_row_bytes;
      }
    }
  };
  if constexpr (bands)
    for_each_band<T, Band<R, 1, false>>(p, warp, mine.channel, begin, end, begin_channel, walk);
  else
    for_each_item<T>(p, warp, mine.channel, begin, end, begin_channel,
                     [&](int images, uint32_t stage, uint32_t place) { walk(images, stage, place, mine); });
  if_spoilt(p, warp, begin, end, is_spoilt(spoilt), [&](uint32_t task) { again<T, 1>(p, task); });
}

// dgrad with stride 2; see `spread`.
template <class T, int R, bool odd, bool words>
__global__ void __launch_bounds__(kPlanesWarps * 32, planes_blocks(R, 2))
    spread_planes(__grid_constant__ Params const p) {
  int const warp = planes_warp(), g = int(threadIdx.x) % 32 / 4;
  PlanesStretch const mine(p, warp);
  uint32_t const begin = uint32_t(uint64_t(p.items) * blockIdx.x / gridDim.x);
  uint32_t const end = uint32_t(uint64_t(p.items) * (blockIdx.x + 1) / gridDim.x);
  uint32_t const row_bytes = p.in.W * sizeof(T), out_row_bytes = p.out_W * sizeof(T);
  uint32_t const planes = planes_stages() + mine.channel * p.in.H * row_bytes;
  uint32_t const outputs = planes_stages() + p.stages * p.stage_bytes + mine.channel * p.out_H * out_row_bytes;
  PlaneOutputs<T, 2, words> const out0(p, g, 2 * kStreamColumns, outputs, 0);
  PlaneOutputs<T, 2, words> const out1(p, g + 8, 2 * kStreamColumns, outputs, 0);
  auto inputs_of = [&](int images) {
    return PlanePairs<2, odd>(p, p.in, images, -p.pad_w - p.shift, kStreamColumns, planes, p.image_bytes);
  };
  int present = p.images;
  PlanePairs<2, odd> inputs = inputs_of(present);
  uint32_t band[R][2][2];
  uint32_t spoilt = 0;
  auto begin_channel = [&](int c) { load_spread_band<T>(p, c, band); };
  auto walk = [&](int images, uint32_t stage, uint32_t place, PlanesStretch const& mine) {
    if (images != present) inputs = inputs_of(present = images);
    // Row i of y that the walk takes is v0 + i; after it rows 2 (v0 + i) - pad_h and the next of x are complete.
    int const last = mine.p0 + mine.rows - 1 + p.pad_h, lowest = mine.p0 + p.pad_h - (R - 1);
    int const v0 = lowest >= 0 ? lowest / 2 : (lowest - 1) / 2, steps = mine.rows > 0 ? last / 2 - v0 + 1 : 0;
    uint32_t row = stage + v0 * int(row_bytes);
    int y = 2 * v0 - p.pad_h;
    float acc[R][2][4] = {};  // of the rows of x that a row of y meets, each in its place till it is complete
#pragma unroll 1
    for (int first = 0; first < steps; first += R) {
#pragma unroll
      for (int i = 0; i < R; ++i, row += row_bytes) {
        if (first + i >= steps) break;
        if (unsigned(v0 + first + i) < unsigned(p.in.H)) {
          uint32_t a[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) a[j] = inputs.load(row, j / 2, j % 2);
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int b = 0; b < 2; ++b)
              ptx::mma_m16n8k16<T>(acc[(2 * i + r) % R][b], a[0], a[1], a[2], a[3], band[r][b][0], band[r][b][1]);
        }
#pragma unroll
        for (int e = 0; e < 2; ++e, ++y) {
          float (&sum)[2][4] = acc[(2 * i + e) % R];
          if (y >= mine.p0 && y < mine.p0 + mine.rows) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
              for (int pair = 0; pair < 2; ++pair) {
                int const j = 2 * half + pair;
                (half == 0 ? out0 : out1)
                    .store(place + y * out_row_bytes, pair, planes_pair<T, false>(sum[0][j], sum[1][j], spoilt));
              }
          }
#pragma unroll
          for (int b = 0; b < 2; ++b)
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[b][j] = 0;
        }
      }
    }
  };
  for_each_item<T>(p, warp, mine.channel, begin, end, begin_channel,
                   [&](int images, uint32_t stage, uint32_t place) { walk(images, stage, place, mine); });
  if_spoilt(p, warp, begin, end, is_spoilt(spoilt), [&](uint32_t task) { spread_again<T>(p, task); });
}

// The end of wgrad, by a block's warps. `add` adds what a warp's products have of a tap; `exact` is a channel's sum of
// a tap, by a warp, for those that a zero made NaN.
template <class T, int R, class Add, class Exact>
__device__ inline void store_planes_sums(Params const& p, int c0, int split, float const (&acc)[R][4],
                                         unsigned char* shared, int lane, int warp, Add add, Exact exact) {
  int const g = lane / 4, t = lane % 4;
  float (*const sums)[R][16][kStreamColumns + 1] =
      reinterpret_cast<float (*)[R][16][kStreamColumns + 1]>(shared + kPlanesBegin);
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[warp][i][g + j / 2 * 8][2 * t + j % 2] = acc[i][j];
  __syncthreads();
  int const taps = p.R * p.S;
  auto store = [&](int which, int tap, float sum) {
    depthwise::store_sum<T>(p.out, p.partial, p.splits, (c0 + which) * p.w_k + tap / p.S * p.w_r + tap % p.S * p.w_s,
                            (int64_t(split) * p.C + c0 + which) * taps + tap, sum);
  };
  // A thread sums up a tap of one warp's products, beside whose eight columns is a place; then one of all warps.
  for (int i = threadIdx.x; i < kPlanesWarps * taps; i += blockDim.x) {
    int const of = i / taps, tap = i - of * taps;
    float sum = 0;
    add(sum, sums[of], tap);
    sums[of][tap % p.S][tap / p.S][kStreamColumns] = sum;
  }
  __syncthreads();
  bool nan = false;
  for (int i = threadIdx.x; i < p.channels * taps; i += blockDim.x) {
    int const which = i / taps, tap = i - which * taps;
    float sum = 0;
#pragma unroll 1
    for (int other = which; other < kPlanesWarps; other += p.channels)
      sum += sums[other][tap % p.S][tap / p.S][kStreamColumns];
    nan = nan || sum != sum;
    store(which, tap, sum);
  }
  if (__syncthreads_or(nan) == 0) return;
#pragma unroll 1
  for (int i = warp; i < p.channels * taps; i += kPlanesWarps) {
    int const which = i / taps, tap = i - which * taps;
    float const sum = exact(c0 + which, tap);
    if (lane == 0) store(which, tap, sum);
  }
}

// wgrad with stride 1 (others: stream_sums.cuh). A block sums over its share of the groups of images. movmatrix
// transposes the units' rows, so that mma sums over them.
template <class T, int R, bool odd>
__global__ void __launch_bounds__(kPlanesWarps * 32, planes_blocks(R, 1))
    wgrad_planes(__grid_constant__ Params const p) {
  extern __shared__ __align__(16) unsigned char shared[];
  ptx::griddepcontrol_launch_dependents();
  int const lane = int(threadIdx.x) % 32, warp = planes_warp();
  PlanesStretch const mine(p, warp);
  int const units = p.C / p.channels;
  int const unit = int(blockIdx.x % unsigned(units)), split = int(blockIdx.x / unsigned(units)), c0 = unit * p.channels;
  uint32_t const begin = uint32_t(uint64_t(p.groups) * split / p.splits);
  uint32_t const end = uint32_t(uint64_t(p.groups) * (split + 1) / p.splits);
  uint32_t const row_bytes = p.in.W * sizeof(T), row_bytes_y = p.y.W * sizeof(T);
  uint32_t const planes = planes_stages() + mine.channel * p.in.H * row_bytes;
  uint32_t const planes_y = planes_stages() + p.images * p.image_bytes + mine.channel * p.y.H * row_bytes_y;
  auto inputs_of = [&](int images) {
    return PlanePairs<2, odd>(p, p.in, images, -p.pad_w - p.shift, kStreamColumns, planes, p.image_bytes);
  };
  auto gradients_of = [&](int images) {
    return PlanePairs<1, odd>(p, p.y, images, 0, kStreamColumns, planes_y, p.image_bytes_y);
  };
  int present = p.images;
  PlanePairs<2, odd> inputs = inputs_of(present);
  PlanePairs<1, odd> gradients = gradients_of(present);
  make_planes_barriers(p.stages);
  PlanesItem at(p, unit * p.groups + begin), ahead = at;
  auto fill = [&](int stage) {
    fill_planes<T, true>(p, ahead, stage);
    ahead.next(p);
  };
  if (warp == 0)
#pragma unroll 1
    for (uint32_t i = begin; i < end && i < begin + p.stages; ++i) fill(int(i - begin));

  float acc[R][4] = {};
  int stage = 0, parity = 0;
#pragma unroll 1
  for (uint32_t item = begin; item < end; ++item, at.next(p)) {
    if (int const images = at.images(p); images != present)
      present = images, inputs = inputs_of(present), gradients = gradients_of(present);
    int const h0 = mine.p0 - p.pad_h, steps = mine.rows > 0 ? mine.rows - 1 + R : 0;
    uint32_t row = stage * p.stage_bytes + h0 * int(row_bytes);
    uint32_t row_y = stage * p.stage_bytes + mine.p0 * row_bytes_y;
    uint32_t y[R][2] = {};
    ptx::mbarrier_wait(planes_barrier(stage), parity);
#pragma unroll 1
    for (int first = 0; first < steps; first += R) {
#pragma unroll
      for (int i = 0; i < R; ++i, row += row_bytes) {
        int const step = first + i;
        if (step >= steps) break;
        bool const exists = step < mine.rows;
#pragma unroll
        for (int j = 0; j < 2; ++j) y[i][j] = exists ? ptx::movmatrix_trans(gradients.load(row_y, 0, j)) : 0;
        row_y += row_bytes_y;
        if (unsigned(h0 + step) >= unsigned(p.in.H)) continue;
        uint32_t x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = ptx::movmatrix_trans(inputs.load(row, j % 2, j / 2));
#pragma unroll
        for (int j = 0; j < R; ++j)
          ptx::mma_m16n8k16<T>(acc[j], x[0], x[1], x[2], x[3], y[(i - j + R) % R][0], y[(i - j + R) % R][1]);
      }
    }
    __syncthreads();  // the stage has been read
    if (warp == 0 && item + p.stages < end) fill(stage);
    if (++stage == p.stages) stage = 0, parity ^= 1;
  }

  auto add = [&](float& sum, auto& of_a_warp, int tap) {
#pragma unroll
    for (int j = 0; j < kStreamColumns; ++j) sum += of_a_warp[tap / p.S][tap % p.S + p.shift + j][j];
  };
  auto exact = [&](int c, int tap) {
    return exact_sum<T, 1>(p, c, begin * p.stretches, end * p.stretches, tap / p.S, tap % p.S);
  };
  store_planes_sums<T>(p, c0, split, acc, shared, lane, warp, add, exact);
}

}  // namespace conv2d_ext::stream
