// Convolution of 16-bit types, and in TF32 over channels_last, to few results: fprop of a network's last layer, dgrad
// of its first, with a stride of one. First the products of every input with all taps, then sums of neighbours:
//   z[result x tap, pixel] = w[result x tap, depth] * x[depth, pixel]
//   y[result, h, w] = sum of z[result, (r, s), pixel] over the pixels and taps that meet (h, w)
// so that an input is read once, and the rows of an instruction are full where results alone would leave most empty.
//
// Two warpgroups walk down the rows of a segment of columns each, in a ring of stages of their own, which a
// warp fills: 128 bytes of channels of a line of pixels, the columns of wgmma, K-major in channels_last, else N-major;
// its rows are the taps, which stay in shared memory. A line's products go to shared memory, where a thread adds those
// of its output's column to the sums of the R outputs that the line meets, in the order of the taps; the first of these
// is then complete.
#pragma once

#include "../core/stem_taps.h"
#include "fragments.cuh"
#include "launch.h"
#include "tma.cuh"

namespace conv2d_ext::stem {

constexpr int kTapsMostStages = 16;
constexpr int kTapsThreads = (kTapsGroups + 1) * kWarpgroup;

struct TapsParams {
  CUtensorMap in;
  void const* w;
  void const* bias;
  void* out;
  int64_t bias_stride, out_n, out_c, out_h, out_w;
  tma::Divisor segments, ranges, loads_of_row;
  int32_t w_in, w_out, w_r, w_s;
  int32_t depth, results, chunks, stages, stage_bytes, line_bytes, lead;
  int32_t P, Q, pad_h, pad_w, ends_w, ends_h, items;
  bool mirrored, vectors;  // of filters
};

struct TapsTables {
  uint64_t full[kTapsGroups][kTapsMostStages], empty[kTapsGroups][kTapsMostStages];
};

// A segment of an image's rows.
struct TapsItem {
  int n, h, w, rows;
  __device__ TapsItem(TapsParams const& p, int item) {
    w = item, n = p.segments.divide(w);  // w: the remainder
    h = n, n = p.ranges.divide(h);
    w *= p.ends_w, h *= p.ends_h, rows = min(p.ends_h, p.P - h);
  }
};

// By the threads that multiply, `count` neighbours of the depth at a time; all loads of a batch before its stores.
template <class T, int R, int count>
__device__ void load_taps(TapsParams const& p, uint32_t filters) {
  constexpr int size = sizeof(T), line = 128 / size, vector = 16 / size, threads = kTapsGroups * kWarpgroup;
  constexpr int batch = count == 1 ? 16 : 4;
  int const of_row = p.chunks * line / count, all = p.results * R * R * of_row;
  for (int first = int(threadIdx.x); first < all; first += batch * threads) {
    uint32_t v[batch][count * size / 4 + (count == 1 && size == 2)], to[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      int c = first + b * threads, row = p.loads_of_row.divide(c);  // c: the remainder
      c *= count;
      int const result = row / (R * R), tap = row % (R * R), from = p.mirrored ? R * R - 1 - tap : tap;
      T const* const w = static_cast<T const*>(p.w) + result * p.w_out + from / R * p.w_r + from % R * p.w_s;
      to[b] = filters + (c / line * kTapsRows + row) * 128 + ((c / vector) ^ row) % 8 * 16 + c % vector * size;
      bool const exists = first + b * threads < all && c < p.depth;
      if constexpr (count > 1) {
        uint4 const read = exists ? *reinterpret_cast<uint4 const*>(w + c) : uint4{};
        v[b][0] = read.x, v[b][1] = read.y, v[b][2] = read.z, v[b][3] = read.w;
      } else if constexpr (size == 2) {
        v[b][0] = exists ? *reinterpret_cast<uint16_t const*>(w + c * p.w_in) : 0;
      } else {
        v[b][0] = exists ? *reinterpret_cast<uint32_t const*>(w + c * p.w_in) : 0;
      }
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      if (first + b * threads >= all) break;
      if constexpr (size == 4)
#pragma unroll
        for (uint32_t& word : v[b]) word = ptx::cvt_rn_tf32(__uint_as_float(word));
      if constexpr (count > 1)
        ptx::st_shared_v4(to[b], make_uint4(v[b][0], v[b][1], v[b][2], v[b][3]));
      else if constexpr (size == 4)
        ptx::st_shared(to[b], v[b][0]);
      else
        ptx::st_shared_u16(to[b], uint16_t(v[b][0]));
    }
  }
}

template <bool planes, int line, int R>
__device__ void taps_copy(TapsParams const& p, uint32_t ring, TapsTables& tables, int group) {
  Stage at;
  for (int item = group * int(gridDim.x) + int(blockIdx.x); item < p.items; item += kTapsGroups * int(gridDim.x)) {
    TapsItem const of(p, item);
    for (int row = 0; row < of.rows + R - 1; ++row)
      for (int chunk = 0; chunk < p.chunks; ++chunk, at.advance(p.stages)) {
        uint64_t* const full = &tables.full[group][at.index];
        ptx::mbarrier_wait(&tables.empty[group][at.index], at.parity ^ 1);  // passes on the first trip round the ring
        ptx::mbarrier_arrive_expect_tx(full, p.line_bytes);
        uint32_t const to = ring + at.index * p.stage_bytes;
        int const h = of.h + row - p.pad_h, w = of.w - p.pad_w - p.lead;
        if constexpr (planes)
          for (int i = 0; i * tma::kRunBytes < p.line_bytes; ++i)
            ptx::cp_async_bulk_tensor_4d(to + i * tma::kRunBytes, &p.in, full, w + i * 64, h, chunk * line, of.n);
        else
          ptx::cp_async_bulk_tensor_4d(to, &p.in, full, chunk * line, w, h, of.n);
      }
  }
}

template <class T, bool planes, int columns, int R>
__device__ void taps_multiply(TapsParams const& p, uint32_t filters, uint32_t ring, float* products, TapsTables& tables,
                              int group) {
  constexpr int most = int(stem_taps_results(R)), pitch = columns + 8;  // results; lines of products 8 banks apart
  static_assert(pitch % 32 == 8 || pitch % 32 == 24);
  uint64_t const layout = tma::layout_of(128),
                 layout_b = planes ? ptx::wgmma_descriptor(0, tma::kRunBytes, kCoreBytes) : layout;
  int const thread = int(threadIdx.x) % kWarpgroup, lane = thread % 32, warp = warp_uniform(thread / 32);
  uint32_t const full = warp_uniform(ptx::shared_address(tables.full[group])),
                 empty = warp_uniform(ptx::shared_address(tables.empty[group]));
  float bias[most] = {};
#pragma unroll
  for (int k = 0; k < most; ++k)
    if (p.bias != nullptr && k < p.results) bias[k] = widen(static_cast<T const*>(p.bias)[k * p.bias_stride]);
  uint32_t const a = warp_uniform(filters / 16), b = warp_uniform(ring / 16);
  float* const put = products + (warp * 16 + lane / 4) * pitch + lane % 4 * 2;
  float const* const take = products + thread + p.lead;
  Stage at;
  for (int item = group * int(gridDim.x) + int(blockIdx.x); item < p.items; item += kTapsGroups * int(gridDim.x)) {
    TapsItem const of(p, item);
    bool const exists = thread < min(p.ends_w, p.Q - of.w);
    T* out = static_cast<T*>(p.out) + of.n * p.out_n + of.h * p.out_h + int64_t(of.w + thread) * p.out_w;
    float sums[R][most] = {};  // of the outputs that a line meets at its taps r
    for (int line = 0; line < of.rows + R - 1; ++line) {
      float acc[columns / 2];
#pragma unroll
      for (int i = 0; i < columns / 2; ++i) acc[i] = 0;
      int before = -1;
      auto release = [&] {
        if (lane == 0 && before >= 0) ptx::mbarrier_arrive(empty + before * 8);
      };
      for (int chunk = 0; chunk < p.chunks; ++chunk) {
        ptx::mbarrier_wait(full + at.index * 8, at.parity);
        uint32_t const of_a = a + chunk * (kTapsRows * 128 / 16), of_b = b + at.index * (p.stage_bytes / 16);
        ptx::wgmma_fence_operand(acc);
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i)
          ptx::wgmma_mma_async<T, false, planes>(acc, layout | (of_a + i * 2),
                                                 layout_b | (of_b + i * (planes ? 2 * kCoreBytes / 16 : 2)));
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_fence_operand(acc);
        release();
        before = at.index;
        at.advance(p.stages);
      }
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(acc);
      release();
      ptx::bar_sync(1 + group, kWarpgroup);  // the last line's products have been read
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (warp * 16 + half * 8 + lane / 4 < p.results * R * R)
#pragma unroll
          for (int i = 0; i < columns / 8; ++i)
            *reinterpret_cast<float2*>(put + half * 8 * pitch + i * 8) =
                make_float2(acc[i * 4 + half * 2], acc[i * 4 + half * 2 + 1]);
      ptx::bar_sync(1 + group, kWarpgroup);
      if (exists) {
#pragma unroll
        for (int k = 0; k < most; ++k) {
          if (k >= p.results) break;
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int s = 0; s < R; ++s) sums[r][k] += take[(k * R * R + r * R + s) * pitch + s];
        }
        if (line >= R - 1) {
#pragma unroll
          for (int k = 0; k < most; ++k)
            if (k < p.results) out[k * p.out_c] = narrow<T>(sums[R - 1][k] + bias[k]);
          out += p.out_h;
        }
      }
#pragma unroll
      for (int k = 0; k < most; ++k) {
#pragma unroll
        for (int r = R - 1; r > 0; --r) sums[r][k] = sums[r - 1][k];
        sums[0][k] = 0;
      }
    }
  }
}

template <class T, bool planes, int columns, int R>
__global__ void __launch_bounds__(kTapsThreads, 1) taps_kernel(__grid_constant__ TapsParams const p) {
  extern __shared__ uint8_t dynamic[];
  __shared__ TapsTables tables;
  uint32_t const filters = warp_uniform((ptx::shared_address(dynamic) + 1023) / 1024 * 1024);
  uint32_t const rings = filters + p.chunks * kTapsRows * 128, ring_bytes = p.stages * p.stage_bytes;
  // In multiples of 128 bytes each.
  uint32_t const products = rings + kTapsGroups * ring_bytes - ptx::shared_address(dynamic),
                 sum_bytes = (p.results * R * R * (columns + 8) * 4 + 127) / 128 * 128;
  if (threadIdx.x == 0) {
    for (int group = 0; group < kTapsGroups; ++group)
      for (int i = 0; i < p.stages; ++i) {
        ptx::mbarrier_init(&tables.full[group][i], 1);
        ptx::mbarrier_init(&tables.empty[group][i], 4);  // the warps that multiply
      }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  int const warp = warp_uniform(int(threadIdx.x) / 32), copying = kTapsGroups * 4;
  int const group = warp < copying ? warp / 4 : warp - copying;
  if (warp < copying) {
    if (p.vectors)
      load_taps<T, R, 16 / int(sizeof(T))>(p, filters);
    else
      load_taps<T, R, 1>(p, filters);
    ptx::fence_proxy_async();
    ptx::bar_sync(1 + kTapsGroups, kTapsGroups * kWarpgroup);
    taps_multiply<T, planes, columns, R>(p, filters, rings + group * ring_bytes,
                                         reinterpret_cast<float*>(dynamic + products + group * sum_bytes), tables,
                                         group);
  } else if (group < kTapsGroups && ptx::elect()) {
    taps_copy<planes, 128 / int(sizeof(T)), R>(p, rings + group * ring_bytes, tables, group);
  }
}

template <DType dtype>
cudaError_t launch_taps(Op op, Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  StemTaps const t(op, problem, h200_sxm);
  StemView const v = stem_view(op, problem);
  TapsParams p{};
  p.w = args.b, p.bias = args.bias, p.out = args.out, p.bias_stride = args.bias_stride;
  p.out_n = v.out.n, p.out_c = v.out.c, p.out_h = v.out.h, p.out_w = v.out.w;
  p.segments = tma::Divisor(t.segments), p.ranges = tma::Divisor(t.ranges);
  p.w_in = int32_t(v.w_in), p.w_out = int32_t(v.w_out), p.w_r = int32_t(problem.w.h), p.w_s = int32_t(problem.w.w);
  p.depth = int32_t(v.C), p.results = int32_t(v.K), p.chunks = int32_t(t.chunks), p.stages = int32_t(t.stages);
  int const vector = 16 / int(sizeof(T));
  auto const whole = [&](int64_t stride) { return stride % vector == 0; };
  p.vectors =
      v.w_in == 1 && whole(v.C) && whole(v.w_out) && whole(problem.w.h) && whole(problem.w.w) && problem.w_align >= 16;
  p.loads_of_row = tma::Divisor(t.chunks * 128 / int64_t(sizeof(T)) / (p.vectors ? vector : 1));
  p.stage_bytes = int32_t(t.stage_bytes), p.lead = int32_t(t.lead);
  p.line_bytes = int32_t(t.planes ? ceil_div(t.box, 64) * tma::kRunBytes : t.box * 128);
  p.P = int32_t(v.P), p.Q = int32_t(v.Q), p.pad_h = int32_t(v.pad_h);
  p.pad_w = int32_t(v.pad_w), p.ends_w = int32_t(t.ends_w), p.ends_h = int32_t(t.ends_h), p.items = int32_t(t.items);
  p.mirrored = v.mirrored;
  tma::Tensor4 const lines{args.a, dtype, {v.C, v.W, v.H, problem.N}, {1, v.in.w, v.in.h, v.in.n}, true},
      planes{args.a, dtype, {v.W, v.H, v.C, problem.N}, {1, v.in.h, v.in.c, v.in.n}};
  if (auto const error = t.planes ? tma::encode_tiled(p.in, planes, 64, 1, 64, 1)
                                  : tma::encode_tiled(p.in, lines, 128 / int(sizeof(T)), int(t.box), 1, 1))
    return error;
  auto const launch = [&](auto of_planes, auto columns, auto taps) {
    auto* const kernel = taps_kernel<T, decltype(of_planes)::value, decltype(columns)::value, decltype(taps)::value>;
    if (auto const error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
      return error;
    kernel<<<unsigned(min64(h200_sxm.sm_count, t.items)), kTapsThreads, size_t(t.shared_bytes), stream>>>(p);
    return cudaGetLastError();
  };
  auto const with_taps = [&](auto of_planes, auto columns) {
    return problem.R == 1   ? launch(of_planes, columns, std::integral_constant<int, 1>{})
           : problem.R == 3 ? launch(of_planes, columns, std::integral_constant<int, 3>{})
           : problem.R == 5 ? launch(of_planes, columns, std::integral_constant<int, 5>{})
                            : launch(of_planes, columns, std::integral_constant<int, 7>{});
  };
  if constexpr (sizeof(T) == 4)
    return t.columns == 128 ? with_taps(std::false_type{}, std::integral_constant<int, 128>{})
                            : with_taps(std::false_type{}, std::integral_constant<int, 160>{});
  else if (t.planes)
    return t.columns == 80 ? with_taps(std::true_type{}, std::integral_constant<int, 80>{})
                           : with_taps(std::true_type{}, std::integral_constant<int, 128>{});
  else
    return t.columns == 80 ? with_taps(std::false_type{}, std::integral_constant<int, 80>{})
                           : with_taps(std::false_type{}, std::integral_constant<int, 144>{});
}

}  // namespace conv2d_ext::stem

#define CONV2D_EXT_STEM_TAPS_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                   \
    return stem::launch_taps<DType::dtype>(Op::op, p, args, stream);          \
  }
