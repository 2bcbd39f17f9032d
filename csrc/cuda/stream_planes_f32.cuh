// The planes of stream_planes.cuh in float32, on the FMA units: a block has whole planes of small images in shared
// memory, a warp a channel and a stretch of its rows. A unit is 2 neighbouring columns of outputs of an image (wgrad:
// of y), or one where rows are odd; a lane has one or more units, takes the columns of inputs that they meet from every
// row once, and adds them to the sums of all rows of outputs that the row meets, or to the sums of the taps.
#pragma once

#include "stream_planes.cuh"

namespace conv2d_ext::stream {

// One of a warp's units: `half` of Params are the lanes from an image's first unit to the next image's.
struct PlaneUnit {
  int image, place;
  bool exists;

  __device__ PlaneUnit(Params const& p, int i, int images) : image(i / p.half), place(i % p.half) {
    exists = image < images && place < p.span;
    if (!exists) image = place = 0;
  }
};

// Columns of a row of planes that a lane's units meet, `count` of each, zeros beyond the borders. `width`: of a load.
template <int count, int width, int units>
struct PlaneColumns {
  static constexpr int loads = (count + width - 1) / width, columns = loads * width;
  uint32_t address[units];      // of row 0 in stage 0
  uint32_t mask[units][loads];  // all bits or none

  // `first`: the first unit's first column; `step`: from a unit to the next; `planes`: of the first image's channel.
  __device__ PlaneColumns(Params const& p, Source const& s, int images, int first, int step, uint32_t planes,
                          int image_bytes) {
#pragma unroll
    for (int j = 0; j < units; ++j) {
      PlaneUnit const u(p, int(threadIdx.x) % 32 + 32 * j, images);
      int const column = first + u.place * step;
      address[j] = planes + u.image * image_bytes + column * int(sizeof(float));
#pragma unroll
      for (int i = 0; i < loads; ++i) mask[j][i] = u.exists && unsigned(column + i * width) < unsigned(s.W) ? ~0u : 0;
    }
  }
  __device__ void load(int j, uint32_t row, float (&v)[columns]) const {
#pragma unroll
    for (int i = 0; i < loads; ++i) {
      if constexpr (width == 2) {
        uint2 const pair = ptx::ld_shared_v2(address[j] + row + 8 * i);
        v[2 * i] = __uint_as_float(pair.x & mask[j][i]), v[2 * i + 1] = __uint_as_float(pair.y & mask[j][i]);
      } else {
        v[i] = __uint_as_float(ptx::ld_shared(address[j] + row + 4 * i) & mask[j][i]);
      }
    }
  }
};

// A row of a lane's outputs, `width` of each unit, in shared memory. `words`: stored together.
template <int width, int units, bool words>
struct PlaneResults {
  uint32_t address[units];  // of row 0 in the first of two places
  uint32_t keep = 0;

  __device__ PlaneResults(Params const& p, uint32_t planes) {
#pragma unroll
    for (int j = 0; j < units; ++j) {
      PlaneUnit const u(p, int(threadIdx.x) % 32 + 32 * j, p.images);
      address[j] = planes + u.image * p.image_bytes_y + u.place * width * int(sizeof(float));
#pragma unroll
      for (int e = 0; e < width; ++e)
        if (u.exists && u.place * width + e < p.out_W) keep |= 1u << (j * width + e);
    }
  }
  __device__ void store(int j, uint32_t row, float const* v) const {
    if constexpr (words && width == 2) {
      if (keep >> (j * width) & 1) ptx::st_shared_f32x2(address[j] + row, v[0], v[1]);
    } else {
#pragma unroll
      for (int e = 0; e < width; ++e)
        if (keep >> (j * width + e) & 1) ptx::st_shared_f32(address[j] + row + 4 * e, v[e]);
    }
  }
};

// A warp more asks for the copies of fprop and dgrad where that is faster.
constexpr bool planes_f32_beside(int R) { return R == 3; }

// What a warp of fprop or dgrad has of a block's planes.
struct PlanesShare {
  PlanesStretch mine;
  uint32_t row_bytes, planes;   // of inputs; the channel of the first image
  uint32_t out_bytes, outputs;  // the same of outputs

  __device__ PlanesShare(Params const& p, int warp)
      : mine(p, warp),
        row_bytes(p.in.W * sizeof(float)),
        planes(planes_stages() + mine.channel * p.in.H * row_bytes),
        out_bytes(p.out_W * sizeof(float)),
        outputs(planes_stages() + p.stages * p.stage_bytes + mine.channel * p.out_H * out_bytes) {}
};

template <int R, class Begin, class Walking>
__device__ inline void for_each_share(Params const& p, int warp, PlanesShare const& share, Begin const& begin,
                                      Walking const& walk) {
  if constexpr (planes_f32_beside(R))
    for_each_turn<float>(p, warp, share.mine.channel, begin, walk);
  else
    for_each_item<float>(p, warp, share.mine.channel, uint32_t(uint64_t(p.items) * blockIdx.x / gridDim.x),
                         uint32_t(uint64_t(p.items) * (blockIdx.x + 1) / gridDim.x), begin, walk);
  if (warp == (planes_f32_beside(R) ? kPlanesWarps : 0)) ptx::cp_async_bulk_wait_group_read<0>();
}

template <int R>
__device__ inline void load_filter(Params const& p, int c, float (&filter)[R][R]) {
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int s = 0; s < R; ++s)
      filter[r][s] = __ldg(static_cast<float const*>(p.w) + c * p.w_k + r * p.w_r + s * p.w_s);
}

// fprop, and dgrad without a stride. `shift`: columns from a unit's first input to its first tap.
template <int R, int stride, int width, int shift, int units, bool words>
__global__ void __launch_bounds__((kPlanesWarps + planes_f32_beside(R)) * 32, planes_f32_blocks(R))
    gather_planes_f32(__grid_constant__ Params const p) {
  constexpr int A = live(R, stride), turn = A * stride;
  using Columns = PlaneColumns<(width - 1) * stride + R + shift, width, units>;
  int const warp = planes_warp();
  PlanesShare const share(p, warp);
  PlanesStretch const& mine = share.mine;
  PlaneResults<width, units, words> const results(p, share.outputs);
  auto inputs_of = [&](int images) {
    return Columns(p, p.in, images, -p.pad_w - shift, width * stride, share.planes, p.image_bytes);
  };
  int present = p.images;
  Columns inputs = inputs_of(present);
  float filter[R][R], bias = 0;
  for_each_share<R>(
      p, warp, share,
      [&](int c) {
        load_filter<R>(p, c, filter);
        bias = p.bias != nullptr ? static_cast<float const*>(p.bias)[c * p.bias_stride] : 0.f;
      },
      [&](int images, uint32_t stage, uint32_t place) {
        if (images != present) inputs = inputs_of(present = images);
        int const h0 = mine.p0 * stride - p.pad_h, steps = mine.rows > 0 ? (mine.rows - 1) * stride + R : 0;
        uint32_t row = stage + h0 * int(share.row_bytes), out = place + mine.p0 * share.out_bytes;
        float acc[A][units * width];  // of the rows of outputs that a row meets, each in its place till it is complete
#pragma unroll 1
        for (int first = 0; first < steps; first += turn) {
#pragma unroll
          for (int i = 0; i < turn; ++i, row += share.row_bytes) {
            int const step = first + i, odd_row = i % stride;
            if (step >= steps) break;
            if (odd_row == 0)
#pragma unroll
              for (int e = 0; e < units * width; ++e) acc[i / stride][e] = bias;
            if (unsigned(h0 + step) < unsigned(p.in.H)) {
#pragma unroll
              for (int u = 0; u < units; ++u) {
                float window[Columns::columns];
                inputs.load(u, row, window);
#pragma unroll
                for (int j = 0; j < A; ++j)
                  if (stride * j + odd_row < R)
#pragma unroll
                    for (int s = 0; s < R; ++s)
#pragma unroll
                      for (int e = 0; e < width; ++e) {
                        float& sum = acc[(i / stride - j + A) % A][u * width + e];
                        sum = fmaf(window[shift + s + e * stride], filter[stride * j + odd_row][s], sum);
                      }
              }
            }
            if (odd_row != (R - 1) % stride || step < R - 1) continue;
            float const(&sum)[units * width] = acc[(i / stride - (R - 1) / stride + A) % A];
#pragma unroll
            for (int u = 0; u < units; ++u) results.store(u, out, sum + u * width);
            out += share.out_bytes;
          }
        }
      });
}

// dgrad with stride 2: a unit is columns 2 u and 2 u + 1 of x. Column 2 u + b meets tap s = q + 2 k, q = (odd + b) % 2,
// of column u + (odd + b) / 2 - k of y, counted from pad_left / 2 on; `odd`: pad_left is.
template <int R, bool odd, int units, bool words>
__global__ void __launch_bounds__((kPlanesWarps + planes_f32_beside(R)) * 32, planes_f32_blocks(R))
    spread_planes_f32(__grid_constant__ Params const p) {
  constexpr int count = (R + 1) / 2;
  using Columns = PlaneColumns<count, 1, units>;
  int const warp = planes_warp();
  PlanesShare const share(p, warp);
  PlanesStretch const& mine = share.mine;
  PlaneResults<2, units, words> const results(p, share.outputs);
  auto inputs_of = [&](int images) {
    return Columns(p, p.in, images, p.pad_left / 2 + odd + 1 - count, 1, share.planes, p.image_bytes);
  };
  int present = p.images;
  Columns inputs = inputs_of(present);
  float filter[R][R];
  for_each_share<R>(
      p, warp, share, [&](int c) { load_filter<R>(p, c, filter); },
      [&](int images, uint32_t stage, uint32_t place) {
        if (images != present) inputs = inputs_of(present = images);
        // Row i of y that the walk takes is v0 + i; after it rows 2 (v0 + i) - pad_h and the next of x are complete.
        int const last = mine.p0 + mine.rows - 1 + p.pad_h, lowest = mine.p0 + p.pad_h - (R - 1);
        int const v0 = lowest >= 0 ? lowest / 2 : (lowest - 1) / 2, steps = mine.rows > 0 ? last / 2 - v0 + 1 : 0;
        uint32_t row = stage + v0 * int(share.row_bytes);
        int y = 2 * v0 - p.pad_h;
        float acc[R][units * 2] = {};  // of the rows of x that a row of y meets, each in its place till it is complete
#pragma unroll 1
        for (int first = 0; first < steps; first += R) {
#pragma unroll
          for (int i = 0; i < R; ++i, row += share.row_bytes) {
            if (first + i >= steps) break;
            if (unsigned(v0 + first + i) < unsigned(p.in.H)) {
#pragma unroll
              for (int u = 0; u < units; ++u) {
                float window[Columns::columns];
                inputs.load(u, row, window);
#pragma unroll
                for (int r = 0; r < R; ++r)
#pragma unroll
                  for (int b = 0; b < 2; ++b)
#pragma unroll
                    for (int s = (odd + b) % 2; s < R; s += 2) {
                      float& sum = acc[(2 * i + r) % R][u * 2 + b];
                      sum = fmaf(window[(odd + b) / 2 - s / 2 - odd - 1 + count], filter[r][s], sum);
                    }
              }
            }
#pragma unroll
            for (int e = 0; e < 2; ++e, ++y) {
              float (&sum)[units * 2] = acc[(2 * i + e) % R];
              if (y >= mine.p0 && y < mine.p0 + mine.rows)
#pragma unroll
                for (int u = 0; u < units; ++u) results.store(u, place + y * share.out_bytes, sum + u * 2);
#pragma unroll
              for (int j = 0; j < units * 2; ++j) sum[j] = 0;
            }
          }
        }
      });
}

// A tap's sum over the block's share of images, by a warp: for those that a zero made NaN.
template <int stride>
__device__ __noinline__ float exact_planes_sum(Params const& p, int c, int64_t n0, int64_t n1, int r, int s) {
  float sum = 0;
  for (int64_t n = n0; n < n1 && sum == sum; ++n)  // a NaN stays one
    for (int pixel = int(threadIdx.x) % 32; pixel < p.out_H * p.out_W; pixel += 32) {
      int const y = pixel / p.out_W, x = pixel % p.out_W, h = y * stride - p.pad_h + r, w = x * stride - p.pad_w + s;
      if (unsigned(h) < unsigned(p.in.H) && unsigned(w) < unsigned(p.in.W))
        sum = fmaf(static_cast<float const*>(p.in.data)[n * p.in.n + c * p.in.c + h * p.in.h + w],
                   static_cast<float const*>(p.y.data)[n * p.y.n + c * p.y.c + y * p.y.h + x], sum);
    }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

// A block sums over its share of the groups of images. `words`: rows of y are loaded as units are wide.
template <int R, int stride, int width, int shift, int units, bool words>
__global__ void __launch_bounds__(kPlanesWarps * 32, planes_f32_blocks(R))
    wgrad_planes_f32(__grid_constant__ Params const p) {
  constexpr int A = live(R, stride), turn = A * stride, taps = R * R;
  using Columns = PlaneColumns<(width - 1) * stride + R + shift, width, units>;
  using Gradients = PlaneColumns<width, words ? width : 1, units>;
  extern __shared__ __align__(16) unsigned char shared[];
  ptx::griddepcontrol_launch_dependents();
  int const warp = planes_warp(), lane = int(threadIdx.x) % 32;
  PlanesStretch const mine(p, warp);
  int const blocks = p.C / p.channels;  // of channels
  int const block = int(blockIdx.x % unsigned(blocks)), split = int(blockIdx.x / unsigned(blocks));
  int const c0 = block * p.channels;
  uint32_t const begin = uint32_t(uint64_t(p.groups) * split / p.splits);
  uint32_t const end = uint32_t(uint64_t(p.groups) * (split + 1) / p.splits);
  uint32_t const row_bytes = p.in.W * sizeof(float), row_bytes_y = p.y.W * sizeof(float);
  uint32_t const planes = planes_stages() + mine.channel * p.in.H * row_bytes;
  uint32_t const planes_y = planes_stages() + p.images * p.image_bytes + mine.channel * p.y.H * row_bytes_y;
  auto inputs_of = [&](int images) {
    return Columns(p, p.in, images, -p.pad_w - shift, width * stride, planes, p.image_bytes);
  };
  auto gradients_of = [&](int images) { return Gradients(p, p.y, images, 0, width, planes_y, p.image_bytes_y); };
  int present = p.images;
  Columns inputs = inputs_of(present);
  Gradients gradients = gradients_of(present);
  make_planes_barriers(p.stages);
  PlanesItem at(p, block * p.groups + begin), ahead = at;
  auto fill = [&](int stage) {
    fill_planes<float, true>(p, ahead, stage);
    ahead.next(p);
  };
  if (warp == 0)
#pragma unroll 1
    for (uint32_t i = begin; i < end && i < begin + p.stages; ++i) fill(int(i - begin));

  float acc[R][R] = {};
  int stage = 0, parity = 0;
#pragma unroll 1
  for (uint32_t item = begin; item < end; ++item, at.next(p)) {
    if (int const images = at.images(p); images != present)
      present = images, inputs = inputs_of(present), gradients = gradients_of(present);
    int const h0 = mine.p0 * stride - p.pad_h, steps = mine.rows > 0 ? (mine.rows - 1) * stride + R : 0;
    uint32_t row = stage * p.stage_bytes + h0 * int(row_bytes);
    uint32_t row_y = stage * p.stage_bytes + mine.p0 * row_bytes_y;
    float y[A][units][width] = {};
    ptx::mbarrier_wait(planes_barrier(stage), parity);
#pragma unroll 1
    for (int first = 0; first < steps; first += turn) {
#pragma unroll
      for (int i = 0; i < turn; ++i, row += row_bytes) {
        int const step = first + i;
        if (step >= steps) break;
        if (i % stride == 0) {
#pragma unroll
          for (int u = 0; u < units; ++u) {
            if (step < mine.rows * stride) {
              gradients.load(u, row_y, y[i / stride][u]);
            } else {
#pragma unroll
              for (int e = 0; e < width; ++e) y[i / stride][u][e] = 0;
            }
          }
          row_y += row_bytes_y;
        }
        if (unsigned(h0 + step) >= unsigned(p.in.H)) continue;
#pragma unroll
        for (int u = 0; u < units; ++u) {
          float window[Columns::columns];
          inputs.load(u, row, window);
#pragma unroll
          for (int j = 0; j < A; ++j)
            if (stride * j + i % stride < R)
#pragma unroll
              for (int s = 0; s < R; ++s)
#pragma unroll
                for (int e = 0; e < width; ++e) {
                  float& sum = acc[stride * j + i % stride][s];
                  sum = fmaf(window[shift + s + e * stride], y[(i / stride - j + A) % A][u][e], sum);
                }
        }
      }
    }
    ptx::fence_proxy_async();
    __syncthreads();  // the stage has been read
    if (warp == 0 && item + p.stages < end) fill(stage);
    if (++stage == p.stages) stage = 0, parity ^= 1;
  }

  float (*const sums)[taps] = reinterpret_cast<float (*)[taps]>(shared + kPlanesBegin);
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) {
    float v = acc[tap / R][tap % R];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
    if (lane == 0) sums[warp][tap] = v;
  }
  __syncthreads();
  auto store = [&](int which, int tap, float sum) {
    depthwise::store_sum<float>(p.out, p.partial, p.splits, (c0 + which) * p.w_k + tap / R * p.w_r + tap % R * p.w_s,
                                (int64_t(split) * p.C + c0 + which) * taps + tap, sum);
  };
  bool nan = false;
  for (int i = threadIdx.x; i < p.channels * taps; i += blockDim.x) {
    int const which = i / taps, tap = i - which * taps;
    float sum = sums[which][tap];
#pragma unroll 1
    for (int other = which + p.channels; other < kPlanesWarps; other += p.channels) sum += sums[other][tap];
    nan = nan || sum != sum;
    store(which, tap, sum);
  }
  if (__syncthreads_or(nan) == 0) return;
  int64_t const n0 = int64_t(begin) * p.images, n1 = depthwise::smaller(p.N, int64_t(end) * p.images);
#pragma unroll 1
  for (int i = warp; i < p.channels * taps; i += kPlanesWarps) {
    int const which = i / taps, tap = i - which * taps;
    float const sum = exact_planes_sum<stride>(p, c0 + which, n0, n1, tap / R, tap % R);
    if (lane == 0) store(which, tap, sum);
  }
}

// ---- host side

template <Op op, int R, int stride>
cudaError_t launch_planes_f32(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  constexpr bool backward = op == Op::dgrad, sums = op == Op::wgrad, spreads = backward && stride == 2;
  PlanesF32Tile const t = planes_f32_tile(R, op, problem, h200_sxm);
  if (!t.planes.used) return cudaErrorInvalidValue;
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  Strides const& w = problem.w;
  Params p{};
  p.in = source_of(args.a, in, problem, t.in_H, t.in_W, 4);
  if constexpr (sums) p.y = source_of(args.b, out, problem, t.out_H, t.out_W, 4);
  p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride, p.out = args.out, p.partial = args.workspace;
  p.out_n = out.n, p.out_c = out.c, p.out_h = out.h;
  p.w_k = w.n, p.w_r = w.h, p.w_s = w.w;
  if (backward && !spreads) {
    p.w = static_cast<float const*>(args.b) + (R - 1) * w.h + (R - 1) * w.w;
    p.w_r = -w.h, p.w_s = -w.w;
  }
  p.N = problem.N, p.C = int(problem.C), p.R = R, p.S = R;
  p.out_H = t.out_H, p.out_W = t.out_W, p.pad_h = t.pad_h, p.pad_w = t.pad_w, p.pad_left = int(problem.pad_left);
  p.splits = plan.split_k, p.span = t.span, p.half = t.slots, p.images = t.images;
  PlanesTile const& q = t.planes;
  p.stretches = uint32_t(kPlanesWarps / q.channels), p.rows = int(ceil_div(t.out_H, p.stretches));
  p.channels = q.channels, p.stages = q.stages, p.stage_bytes = q.stage_bytes;
  p.image_bytes = q.in_bytes, p.image_bytes_y = q.y_bytes;
  int64_t const units = problem.C / p.channels, groups = ceil_div(problem.N, t.images);
  p.by_images = true, p.units = uint32_t(units), p.groups = uint32_t(groups), p.items = uint32_t(units * groups);
  auto start = [&](auto* kernel) {
    int const bytes = int(q.shared_bytes);
    if (auto const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
      return error;
    int64_t const blocks = sums ? units * p.splits : min64(p.items, int64_t(q.together) * h200_sxm.sm_count);
    kernel<<<unsigned(blocks), (kPlanesWarps + (!sums && planes_f32_beside(R))) * 32, size_t(bytes), stream>>>(p);
    return cudaGetLastError();
  };
  bool const words = t.out_W % 2 == 0;
  if constexpr (spreads) {
    constexpr int units = planes_f32_units(2);
    if (problem.pad_left % 2 != 0)
      return start(words ? spread_planes_f32<R, true, units, true> : spread_planes_f32<R, true, units, false>);
    return start(words ? spread_planes_f32<R, false, units, true> : spread_planes_f32<R, false, units, false>);
  } else {
    auto with = [&]<int width, int shift, bool together>() {
      constexpr int units = planes_f32_units(width);
      if constexpr (sums)
        return start(wgrad_planes_f32<R, stride, width, shift, units, together>);
      else
        return start(gather_planes_f32<R, stride, width, shift, units, together>);
    };
    auto of = [&]() {
      if (t.width == 1) return with.template operator()<1, 0, false>();
      // With a stride, images of even rows may have odd rows of outputs.
      if constexpr (stride == 2)
        if (!words)
          return t.shift == 0 ? with.template operator()<2, 0, false>() : with.template operator()<2, 1, false>();
      return t.shift == 0 ? with.template operator()<2, 0, true>() : with.template operator()<2, 1, true>();
    };
    cudaError_t const error = of();
    if (!sums || error != cudaSuccess || p.splits == 1) return error;
    return depthwise::launch_sum<float>(problem, plan, args, stream, true);
  }
}

}  // namespace conv2d_ext::stream
