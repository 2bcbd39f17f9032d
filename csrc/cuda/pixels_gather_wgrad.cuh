// wgrad of 1x1 filters over NCHW in place, whatever the size of the planes: w[m, n] = sum over images and pixels of
// a[m, pixel] * b[n, pixel]. A block has a tile of TM x TN and a part of the steps, runs of 128 bytes of an image's
// pixels. Each of eight warps copies its channels of both operands as they lie, by cp.async of the 16-byte vectors that
// they are in, some steps ahead, and then puts them into lines: of 16-bit types of 64 channels a pixel (M- and
// N-major), floats as lines of 32 pixels a channel, rounded to TF32. pixels_wgrad.cuh adds the parts.
#pragma once

#include "pixels_gather.cuh"
#include "pixels_wgrad.cuh"

namespace conv2d_ext::pixels_gather {

template <int TM, int TN>
struct SumShape {
  static constexpr int groups = TM / 64, threads = groups * kWarpgroup + kGatherWarps * 32;
  static constexpr int blocks = TM == 64 ? 2 : 1;  // an SM
  static constexpr int stages = 3, stage_bytes = (TM + TN) * kLineBytes;
  static constexpr int vectors = kLineBytes / 16 + 1;  // that a run lies in
  static constexpr int raw_a = TM / kGatherWarps * vectors * 16, raw_b = TN / kGatherWarps * vectors * 16;
  static constexpr int raw_bytes = kGatherWarps * (raw_a + raw_b), fixed_bytes = stages * stage_bytes + 1024;
  static constexpr int ahead = int(min64(4, ((blocks == 2 ? 112 : 226) * 1024 - fixed_bytes) / raw_bytes));
  static constexpr int shared_bytes = fixed_bytes + ahead * raw_bytes;
  static_assert(TN == 64 || TM == TN, "see setmaxnreg");
  static constexpr bool moves = threads == 512;  // registers to the warps that gather
};

// A tensor whose planes are gathered.
struct SumSource : Source {
  int32_t channels;
};

struct SumsParams {
  SumSource a, b;
  Divisor runs, tiles_n, tiles;  // runs of an image
  int32_t pixels, steps, share;
  float* parts;
  void* w;
  int64_t w_m, w_group;
};

// A warp's channels of one operand: eight of each 64 of the tile.
template <class T, int V, int channels>
struct SumOperand {
  static constexpr int size = int(sizeof(T)), count = channels / kGatherWarps, vectors = kLineBytes / 16 + 1;
  static constexpr int copies = (count * vectors + 31) / 32, groups = size == 4 ? 1 : 64 / (32 * V);
  char const* from[copies];
  int32_t ahead[copies];  // bytes from the run's begin; too many where nothing is copied
  uint32_t at[count];

  static __device__ __forceinline__ int channel(int warp, int i) { return i / 8 * 64 + warp * 8 + i % 8; }

  // The first run of an image; first: the tile's first channel.
  __device__ __forceinline__ void begin_copies(SumSource const& s, int image, int run, int first, int warp, int lane) {
#pragma unroll
    for (int j = 0; j < copies; ++j) {
      int const i = (j * 32 + lane) / vectors, v = (j * 32 + lane) % vectors, c = first + channel(warp, i);
      char const* const row = s.first() + image * s.n + c * s.k + run * kLineBytes;
      int const off = int(reinterpret_cast<uint64_t>(row)) & 15;
      from[j] = row - off + v * 16;
      ahead[j] = i < count && c < s.channels ? v * 16 - off : 1 << 20;
    }
  }
  __device__ __forceinline__ void copy(SumSource const& s, uint32_t raw, int bytes, int lane) {
#pragma unroll
    for (int j = 0; j < copies; ++j) {
      if (ahead[j] < bytes)  // nothing is read behind the tensor
        ptx::cp_async_first(raw + (j * 32 + lane) * 16, from[j], int(min64(16, s.end - from[j])));
      from[j] += kLineBytes;
    }
  }
  __device__ __forceinline__ void begin_turns(SumSource const& s, int image, int first, int warp, int lane) {
    uint32_t const plane = uint32_t(reinterpret_cast<uint64_t>(s.first())) + uint32_t(image) * uint32_t(s.n);
#pragma unroll
    for (int i = 0; i < count; ++i)
      at[i] =
          i * (vectors * 16) + ((plane + uint32_t(first + channel(warp, i)) * uint32_t(s.k)) & 15) + lane * V * size;
  }
  // Into lines; pixels: that there are of the run.
  __device__ __forceinline__ void turn(uint32_t raw, uint32_t to, int pixels, int warp, int lane) const {
    if constexpr (size == 4) {
      to += warp * kCoreBytes + lane % 4 * 4;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        uint32_t const v = ptx::cvt_rn_tf32(__uint_as_float(ptx::ld_shared(raw + at[i])));
        ptx::st_shared(to + i / 8 * (64 * kLineBytes) + i % 8 * kLineBytes + ((lane / 4) ^ (i % 8)) * 16,
                       lane < pixels ? v : 0);
      }
    } else {
#pragma unroll
      for (int run = 0; run < count / 8; ++run) {
        uint32_t v[groups][8];
#pragma unroll
        for (int g = 0; g < groups; ++g)
#pragma unroll
          for (int i = 0; i < 8; ++i)
            v[g][i] =
                V == 1 ? ptx::ld_shared_u16(raw + at[run * 8 + i] + g * 64) : ptx::ld_shared(raw + at[run * 8 + i]);
#pragma unroll
        for (int g = 0; g < groups; ++g)
#pragma unroll
          for (int k = 0; k < V; ++k) {
            int const half = V == 2 ? k ^ (lane >> 2 & 1) : 0, line = (g * 32 + lane) * V + half;
            uint32_t w[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
              w[j] = line < pixels ? __byte_perm(v[g][j * 2], v[g][j * 2 + 1], half == 1 ? 0x7632 : 0x5410) : 0;
            ptx::st_shared_v4(to + run * (64 * kLineBytes) + line * kLineBytes + ((warp ^ line) & 7) * 16,
                              make_uint4(w[0], w[1], w[2], w[3]));
          }
      }
    }
  }
};

template <class T, int TM, int TN, int V>
__global__ void __launch_bounds__(SumShape<TM, TN>::threads, SumShape<TM, TN>::blocks)
    sums_kernel(__grid_constant__ SumsParams const p) {
  using S = SumShape<TM, TN>;
  constexpr bool rows = sizeof(T) == 2;
  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t full[S::stages], empty[S::stages];
  uint32_t const ring = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  int const warp = warp_uniform(int(threadIdx.x) / 32), lane = int(threadIdx.x) % 32;
  ptx::griddepcontrol_launch_dependents();
  int n0 = int(blockIdx.x);
  int const part = p.tiles.divide(n0), tile = n0, m0 = p.tiles_n.divide(n0) * TM;
  n0 *= TN;
  int const begin = part * p.share, end = min(begin + p.share, p.steps);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; ++i) {
      ptx::mbarrier_init(&full[i], kGatherWarps);
      ptx::mbarrier_init(&empty[i], S::groups * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  Stage stage;
  if (warp >= S::groups * 4) {
    if constexpr (S::moves) ptx::setmaxnreg_inc<160>();
    int const mine = warp - S::groups * 4;
    constexpr int run_pixels = kLineBytes / int(sizeof(T));
    uint32_t const raw = ring + S::stages * S::stage_bytes + mine * (S::ahead * (S::raw_a + S::raw_b));
    SumOperand<T, V, TM> a;
    SumOperand<T, V, TN> b;
    int step = begin, run = begin, image = p.runs.divide(run), its_run = run, its_image = image;
    auto pixels_of = [&](int run) { return min(run_pixels, p.pixels - run * run_pixels); };
    auto copy = [&](int place) {
      if (step < end) {
        if (step == begin || run == 0) {
          a.begin_copies(p.a, image, run, m0, mine, lane);
          b.begin_copies(p.b, image, run, n0, mine, lane);
        }
        uint32_t const to = raw + place * (S::raw_a + S::raw_b);
        int const bytes = pixels_of(run) * int(sizeof(T));
        a.copy(p.a, to, bytes, lane);
        b.copy(p.b, to + S::raw_a, bytes, lane);
        ++step;
        if (++run == p.runs.value) run = 0, ++image;
      }
      ptx::cp_async_commit_group();
    };
    ptx::griddepcontrol_wait();
#pragma unroll 1
    for (int i = 0; i < S::ahead; ++i) copy(i);
    Stage place;
#pragma unroll 1
    for (int i = begin; i < end; ++i, stage.advance(S::stages), place.advance(S::ahead)) {
      if (i == begin || its_run == 0) {
        a.begin_turns(p.a, its_image, m0, mine, lane);
        b.begin_turns(p.b, its_image, n0, mine, lane);
      }
      ptx::cp_async_wait_group<S::ahead - 1>();
      __syncwarp();
      ptx::mbarrier_wait(&empty[stage.index], stage.parity ^ 1);  // passes on the first trip round the ring
      uint32_t const from = raw + place.index * (S::raw_a + S::raw_b), to = ring + stage.index * S::stage_bytes;
      int const pixels = pixels_of(its_run);
      a.turn(from, to, pixels, mine, lane);
      b.turn(from + S::raw_a, to + TM * kLineBytes, pixels, mine, lane);
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&full[stage.index]);
      copy(place.index);
      if (++its_run == p.runs.value) its_run = 0, ++its_image;
    }
    return;
  }
  if constexpr (S::moves) ptx::setmaxnreg_dec<96>();
  int const group = warp / 4, thread = int(threadIdx.x) % kWarpgroup;
  uint64_t const layout = rows ? ptx::wgmma_descriptor(0, tma::kRunBytes, kCoreBytes) : tma::layout_of(kLineBytes);
  constexpr uint32_t part_bytes = rows ? 2 * kCoreBytes : 32;
  float acc[TN / 2] = {};
  int before = -1;
#pragma unroll 1
  for (int step = begin; step < end; ++step, stage.advance(S::stages)) {
    ptx::mbarrier_wait(&full[stage.index], stage.parity);
    uint32_t const from = ring + stage.index * S::stage_bytes;
    ptx::wgmma_fence_operand(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      ptx::wgmma_mma_async<T, rows, rows>(acc, tma::at_address(layout, from + group * 64 * kLineBytes + k * part_bytes),
                                          tma::at_address(layout, from + TM * kLineBytes + k * part_bytes));
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_fence_operand(acc);
    if (before >= 0 && lane == 0) ptx::mbarrier_arrive(&empty[before]);
    before = stage.index;
  }
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_fence_operand(acc);
  if (p.w != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const m = m0 + warp * 16 + lane / 4 + half * 8;
      T* const to = static_cast<T*>(p.w) + blockIdx.y * p.w_group + m * p.w_m + n0 + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < TN / 8; ++j)
        if (m < p.a.channels && n0 + j * 8 + lane % 4 * 2 < p.b.channels)
          *reinterpret_cast<Vector<T, 2>*>(to + j * 8) = {narrow<T>(acc[j * 4 + half * 2]),
                                                          narrow<T>(acc[j * 4 + half * 2 + 1])};
    }
    return;
  }
  float4* const to =
      reinterpret_cast<float4*>(p.parts + pixels_wgrad::part_place(part, p.tiles.value, tile) * (TM * TN)) +
      group * (TN / 8 * kWarpgroup) + thread;
#pragma unroll
  for (int j = 0; j < TN / 8; ++j)
    if (n0 + j * 8 < p.b.channels)
      to[j * kWarpgroup] = make_float4(acc[j * 4], acc[j * 4 + 1], acc[j * 4 + 2], acc[j * 4 + 3]);
}

template <DType dtype, int TM, int TN>
cudaError_t launch_sums(Problem const& problem, int split_k, Arguments const& args, cudaStream_t stream) {
  using S = SumShape<TM, TN>;
  using T = typename TypeOf<dtype>::type;
  Problem const g = group_of(problem);
  PixelsWgrad const shape(TM, TN, g);
  int64_t const plane = problem.H * problem.W;
  auto source = [&](void const* at, Strides const& t, int64_t channels) {
    char const* const first = static_cast<char const*>(at);
    int64_t const size = sizeof(T), all = problem.groups * channels;
    int64_t const elements = (problem.N - 1) * t.n + (all - 1) * t.c + plane;
    return SumSource{{first, first + elements * size, t.n * size, t.c * size, channels * t.c * size},
                     int32_t(channels)};
  };
  SumSource const x = source(args.a, problem.x, g.C), y = source(args.b, problem.y, g.K);
  SumsParams p{};
  p.a = shape.swapped ? x : y, p.b = shape.swapped ? y : x;
  p.runs = Divisor(ceil_div(plane, run_pixels(dtype))), p.tiles_n = Divisor(shape.tiles_n);
  p.tiles = Divisor(shape.tiles), p.pixels = int32_t(plane), p.steps = int32_t(runs_of(problem));
  p.share = int32_t(ceil_div(p.steps, split_k));
  int64_t const split = ceil_div(p.steps, p.share);  // without empty parts
  p.parts = static_cast<float*>(args.workspace);
  if (pixels_wgrad::Weights const w(shape, g); split == 1 && w.pairs)
    p.w = args.out, p.w_m = w.m, p.w_group = g.K * problem.w.n;
  auto even = [&](SumSource const& t) {
    return plane % 2 == 0 && t.k % 4 == 0 && t.n % 4 == 0 && reinterpret_cast<uint64_t>(t.at) % 4 == 0;
  };
  auto* kernel = sums_kernel<T, TM, TN, 1>;
  if constexpr (sizeof(T) == 2)
    if (even(p.a) && even(p.b)) kernel = sums_kernel<T, TM, TN, 2>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
  if (error != cudaSuccess) return error;
  dim3 const blocks(unsigned(shape.tiles * split), unsigned(problem.groups));
  error = launch_dependent(kernel, blocks, S::threads, S::shared_bytes, stream, p);
  if (error != cudaSuccess || p.w != nullptr) return error;
  return pixels_wgrad::add_parts<T>(TM, TN, shape, problem, split, args, stream);
}

}  // namespace conv2d_ext::pixels_gather

#define CONV2D_EXT_PIXELS_GATHER_SUMS_INSTANCE(family, op, dtype, tm, tn, tk, variant)      \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                 \
    return pixels_gather::launch_sums<DType::dtype, tm, tn>(p, plan.split_k, args, stream); \
  }
