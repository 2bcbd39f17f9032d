// fprop and dgrad of stride 1 of groups of up to 32 channels over small images, which lie whole in
// shared memory: a line of channels for each pixel, zeros around them that rows and images share. A tap's operand is
// then 64 lines, so many lines behind the results', and no pixel is copied twice. A block has the filters of one group,
// and four warpgroups with images of their own: a ring each, filled by cp.async. NCHW is turned on the way to the
// lines, and results go through shared memory to planes. Both layouts of either tensor.
//
// A pitch of in_w + max(zeros left, right) lines a row, and the same in height for images: what a result reads behind a
// row's end is the zeros before the next row. Positions between rows are multiplied, too, and not stored.
#pragma once

#include "../core/images.h"
#include "grouped_tile.cuh"
#include "launch.h"
#include "ptx.cuh"
#include "types.cuh"

namespace conv2d_ext::images {

struct ImageParams {
  char const* in;
  char* out;
  void const* w;
  void const* bias;
  int64_t bias_stride, in_n, in_h, in_w, out_n, out_h, out_w, group_in, group_out;  // in and out: bytes
  int64_t w_group, w_k, w_c;
  int taps[kImageTaps], offsets[kImageTaps];  // elements from a filter's first; lines from a result's first tap
  grouped::Divisor columns, pixels, pitch;    // of what is read; lines of a row
  int N, groups, parts, in_channels, out_channels;
  int in_pixels, out_height, out_width, out_pixels;
  int low_h, low_w, step_h, step_w;  // zeros before the first pixel; strides: 1 or 2
  int plane, lines, slots, tiles, tap_count;
  int filter_bytes, line_bytes, raw_bytes;
  bool planes_in, planes_out, backward;
};

template <class T, int channels>
struct Kernel {
  static constexpr bool f32 = std::is_same_v<T, float>;
  static constexpr int line = channels * int(sizeof(T)), chunks = line / 16, vector = 16 / int(sizeof(T));
  static constexpr int swizzle = line, count = channels / 2;
  static_assert(line == 64 || line == 128);

  // Where a line's chunk lies, from a multiple of 1024 bytes on.
  static __device__ uint32_t place(int at, int chunk) {
    int const turn = line == 64 ? (at >> 1) & 3 : at & 7;
    return uint32_t(at * line + ((chunk ^ turn) << 4));
  }
  // The line of a pixel of an image.
  static __device__ int line_of(ImageParams const& p, int pixel) {
    int h = p.columns.quotient(pixel), w = pixel - h * int(p.columns.value);
    h += p.low_h, w += p.low_w;
    int const up = p.step_h - 1, left = p.step_w - 1;
    return ((h & up) * p.step_w + (w & left)) * p.plane + (h >> up) * int(p.pitch.value) + (w >> left);
  }
  static __device__ uint32_t round(uint32_t v) { return ptx::cvt_rn_tf32(__uint_as_float(v)); }

  static __device__ void fill(ImageParams const& p, int n, int group, uint32_t lines, int first, uint32_t raw, int t) {
    char const* const from = p.in + n * p.in_n + group * p.group_in;
    if (p.planes_in) {
      int const bytes = p.in_channels * p.in_pixels * int(sizeof(T));
#pragma unroll 1
      for (int i = t * 16; i < bytes; i += 2048) ptx::cp_async_16(raw + i, from + i, true);
    } else {
#pragma unroll 1
      for (int i = t; i < p.in_pixels * chunks; i += 128) {
        int const chunk = i % chunks, pixel = i / chunks, h = p.columns.quotient(pixel);
        int const w = pixel - h * int(p.columns.value);
        if (chunk * vector < p.in_channels)
          ptx::cp_async_16(lines + place(first + line_of(p, pixel), chunk), from + h * p.in_h + w * p.in_w + chunk * 16,
                           true);
      }
    }
  }

  // What fill() has brought, as lines that the tensor cores take.
  static __device__ void turn(ImageParams const& p, uint32_t lines, int first, uint32_t raw, int t) {
    if (p.planes_in) {
      int const items = p.in_channels / vector * p.in_pixels, plane = p.in_pixels * int(sizeof(T));
#pragma unroll 1
      for (int i = t; i < items; i += 128) {
        int const chunk = p.pixels.quotient(i), pixel = i - chunk * p.in_pixels;
        uint32_t const from = raw + chunk * vector * plane + pixel * int(sizeof(T));
        uint32_t v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (f32) {
            v[j] = round(ptx::ld_shared(from + j * plane));
          } else {
            uint32_t const low = ptx::ld_shared_u16(from + 2 * j * plane);
            v[j] = low | uint32_t(ptx::ld_shared_u16(from + (2 * j + 1) * plane)) << 16;
          }
        }
        ptx::st_shared_v4(lines + place(first + line_of(p, pixel), chunk), {v[0], v[1], v[2], v[3]});
      }
    } else if constexpr (f32) {
#pragma unroll 1
      for (int i = t; i < p.in_pixels * chunks; i += 128) {
        uint32_t const at = lines + place(first + line_of(p, i / chunks), i % chunks);
        uint4 const v = ptx::ld_shared_v4(at);
        ptx::st_shared_v4(at, {round(v.x), round(v.y), round(v.z), round(v.w)});
      }
    }
  }

  // The filters of a group: a line for each result's channel, tap by tap. Lanes go along a filter's channels. A thread
  // has two pairs of channels, nine taps at a time.
  struct Weights {
    static constexpr int batch = 9;
    T v[2][batch];

    __device__ void load(ImageParams const& p, int group, int pair, int tap0) {
      T const* const from = static_cast<T const*>(p.w) + group * p.w_group;
      int const k_end = p.backward ? p.in_channels : p.out_channels;
      int const c_end = p.backward ? p.out_channels : p.in_channels;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int const k = (pair + j * int(blockDim.x)) / channels, c = pair % channels;
        T const* const at = from + k * p.w_k + c * p.w_c;
#pragma unroll
        for (int tap = 0; tap < batch; ++tap)
          v[j][tap] = k < k_end && c < c_end ? at[p.taps[tap0 + tap]] : narrow<T>(0.f);
      }
    }
    __device__ void store(ImageParams const& p, uint32_t filters, int pair, int tap0) const {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int const k = (pair + j * int(blockDim.x)) / channels, c = pair % channels;
        int const row = p.backward ? c : k, column = p.backward ? k : c;
        if (k >= channels) continue;
        uint32_t const to =
            filters + tap0 * channels * line + place(row, column / vector) + column % vector * int(sizeof(T));
#pragma unroll
        for (int tap = 0; tap < batch; ++tap) {
          if (tap0 + tap >= p.tap_count) continue;
          if constexpr (f32)
            ptx::st_shared(to + tap * channels * line, round(__float_as_uint(v[j][tap])));
          else
            ptx::st_shared_u16(to + tap * channels * line, *reinterpret_cast<uint16_t const*>(&v[j][tap]));
        }
      }
    }
  };

  // Begins the products of 64 lines of results from `at` on.
  static __device__ void multiply(ImageParams const& p, uint32_t lines, int at, uint32_t filters, float (&acc)[count]) {
    uint64_t const layout = ptx::wgmma_descriptor<swizzle>(0, 16, 8 * line);
    ptx::wgmma_fence_operand(acc);
    ptx::wgmma_fence();
    uint32_t b = filters >> 4;
#pragma unroll 1
    for (int tap = 0; tap < p.tap_count; ++tap) {
      uint32_t const a = (lines + (at + p.offsets[tap]) * line) >> 4;
#pragma unroll
      for (int k = 0; k < line / 32; ++k)
        ptx::wgmma_mma_async<T, false, false>(acc, layout | (a + k * 2), layout | (b + k * 2));
      b += channels * line / 16;
    }
    ptx::wgmma_commit_group();
  }

  // Four words of each lane of a quad: lane i gets word i of all four.
  static __device__ void exchange(uint32_t (&v)[4], int t) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      bool const upper = (t & bit) != 0;
      int const i = 0, j = bit, k = 3 - bit, l = 3;  // pairs (i, j), (k, l)
      uint32_t const a = __shfl_xor_sync(~0u, upper ? v[i] : v[j], bit);
      uint32_t const b = __shfl_xor_sync(~0u, upper ? v[k] : v[l], bit);
      if (upper)
        v[i] = a, v[k] = b;
      else
        v[j] = a, v[l] = b;
    }
  }

  static __device__ void store(ImageParams const& p, int n, int group, int tile, float const (&acc)[count],
                               uint32_t raw) {
    int const lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const at = tile * kImageTile + threadIdx.x / 32 % 4 * 16 + half * 8 + lane / 4;
      int const h = p.pitch.quotient(at), w = at - h * int(p.pitch.value);
      bool const valid = h < p.out_height && w < p.out_width;
      if (p.planes_out) {
        uint32_t const to = raw + (h * p.out_width + w) * int(sizeof(T));
#pragma unroll
        for (int j = 0; j < count / 2; ++j) {
          int const c = j / 2 * 8 + t * 2 + j % 2;
          if (!valid || c >= p.out_channels) continue;
          T const v = narrow<T>(acc[j / 2 * 4 + half * 2 + j % 2]);
          if constexpr (f32)
            ptx::st_shared(to + c * p.out_pixels * 4, __float_as_uint(v));
          else
            ptx::st_shared_u16(to + c * p.out_pixels * 2, *reinterpret_cast<uint16_t const*>(&v));
        }
      } else {
        char* const to = p.out + n * p.out_n + group * p.group_out + h * p.out_h + w * p.out_w;
        if constexpr (f32) {
#pragma unroll
          for (int j = 0; j < count / 4; ++j)
            if (int const c = j * 8 + t * 2; valid && c < p.out_channels)
              *reinterpret_cast<float2*>(to + c * 4) = make_float2(acc[j * 4 + half * 2], acc[j * 4 + half * 2 + 1]);
        } else {
#pragma unroll
          for (int part = 0; part < count / 16; ++part) {
            uint32_t v[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              float const* const a = acc + (part * 4 + j) * 4 + half * 2;
              Vector<T, 2> two;
              two.v[0] = narrow<T>(a[0]), two.v[1] = narrow<T>(a[1]);
              v[j] = *reinterpret_cast<uint32_t const*>(&two);
            }
            exchange(v, t);
            int const c = part * 32 + t * 8;
            if (valid && c < p.out_channels) *reinterpret_cast<uint4*>(to + c * 2) = make_uint4(v[0], v[1], v[2], v[3]);
          }
        }
      }
    }
  }
};

template <class T, int channels>
__global__ void __launch_bounds__(128 * kImageTeams, 1) images_kernel(__grid_constant__ ImageParams const p) {
  extern __shared__ __align__(1024) char shared[];
  using K = Kernel<T, channels>;
  uint32_t const filters = (ptx::shared_address(shared) + 1023) & ~1023u, lines = filters + p.filter_bytes;
  int const teams = blockDim.x / 128, team = threadIdx.x / 128, t = threadIdx.x % 128, bar = 1 + team;
  int const group = blockIdx.x % p.groups, part = blockIdx.x / p.groups * teams + team;
  int const parts = p.parts * teams, least = p.N / parts, more = p.N % parts;
  int const n0 = part * least + min(part, more), images = least + (part < more ? 1 : 0);
  uint32_t const raw0 = lines + p.line_bytes + team * p.slots * p.raw_bytes;
  typename K::Weights weights;
  weights.load(p, group, threadIdx.x, 0);
  for (int i = threadIdx.x * 16; i < p.line_bytes; i += blockDim.x * 16) ptx::st_shared_v4(lines + i, {0, 0, 0, 0});
  __syncthreads();
  int next_fill = 0, next = 0;  // the next image's slots
  auto line0 = [&](int slot) { return (team * p.slots + slot) * p.lines; };
  auto fill = [&](int i) {
    if (i < images) K::fill(p, n0 + i, group, lines, line0(next_fill), raw0 + next_fill * p.raw_bytes, t);
    ptx::cp_async_commit_group();
    if (++next_fill == p.slots) next_fill = 0;
  };
  // The next image becomes lines; all others that were asked for, `behind`, may be on their way.
  auto prepare = [&](int behind) {
    if (behind == 0)
      ptx::cp_async_wait_group<0>();
    else if (behind == 1)
      ptx::cp_async_wait_group<1>();
    else if (behind == 2)
      ptx::cp_async_wait_group<2>();
    else
      ptx::cp_async_wait_group<3>();
    if (p.planes_in) ptx::bar_sync(bar, 128);
    K::turn(p, lines, line0(next), raw0 + next * p.raw_bytes, t);
    ptx::fence_proxy_async();
    if (++next == p.slots) next = 0;
  };
#pragma unroll 1
  for (int i = 0; i < p.slots; ++i) fill(i);
  for (int pair = threadIdx.x; pair < channels * channels; pair += blockDim.x * 2)
    for (int tap0 = 0; tap0 < p.tap_count; tap0 += K::Weights::batch) {
      if (pair >= blockDim.x || tap0 > 0) weights.load(p, group, pair, tap0);
      weights.store(p, filters, pair, tap0);
    }
  float bias[K::count / 2], acc[K::count], done[K::count];
#pragma unroll
  for (int j = 0; j < K::count / 2; ++j) {
    int const c = j / 2 * 8 + t % 4 * 2 + j % 2;
    bias[j] = p.bias != nullptr && c < p.out_channels
                  ? widen(static_cast<T const*>(p.bias)[(group * p.out_channels + c) * p.bias_stride])
                  : 0.f;
  }
  prepare(p.slots - 1);
  __syncthreads();
  // Stores what the products before these came to.
  auto store = [&](int i, int slot, int tile) {
    uint32_t const raw = raw0 + slot * p.raw_bytes;
    K::store(p, n0 + i, group, tile, done, raw);
    if (!p.planes_out || tile + 1 < p.tiles) return;
    ptx::bar_sync(bar, 128);
    char* const to = p.out + (n0 + i) * p.out_n + group * p.group_out;
    int const bytes = p.out_channels * p.out_pixels * int(sizeof(T));
#pragma unroll 1
    for (int j = t * 16; j < bytes; j += 2048) *reinterpret_cast<uint4*>(to + j) = ptx::ld_shared_v4(raw + j);
    if (p.planes_in) ptx::bar_sync(bar, 128);
  };
  int const steps = images * p.tiles;
  auto before = [&](int slot) { return slot == 0 ? p.slots - 1 : slot - 1; };
  int i = 0, slot = 0, tile = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int j = 0; j < K::count; ++j) acc[j] = bias[j / 4 * 2 + j % 2];
    K::multiply(p, lines, line0(slot) + tile * kImageTile, filters, acc);
    // Meanwhile.
    if (step > 0) {
      bool const first = tile == 0;
      store(first ? i - 1 : i, first ? before(slot) : slot, (first ? p.tiles : tile) - 1);
      if (first) fill(i - 1 + p.slots);
    }
    if (tile == 0 && i + 1 < images) prepare(p.slots - 2);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc);
#pragma unroll
    for (int j = 0; j < K::count; ++j) done[j] = acc[j];
    if (++tile == p.tiles) {
      tile = 0, ++i;
      if (++slot == p.slots) slot = 0;
      ptx::bar_sync(bar, 128);
    }
  }
  if (steps > 0) store(images - 1, before(slot), p.tiles - 1);
}

template <class T, int channels>
cudaError_t launch(Op op, Problem const& problem, Arguments const& args, cudaStream_t stream) {
  bool const backward = op == Op::dgrad;
  int sm_count = 0;
  if (cudaError_t const error = count_sms(sm_count)) return error;
  ImageTile const t = image_tile(op, problem, Device{sm_count, 90}, channels);
  int64_t const C = problem.C_per_group(), K = problem.K_per_group(), P = problem.P(), Q = problem.Q();
  constexpr int64_t size = sizeof(T);
  Strides const& x = backward ? problem.y : problem.x;
  Strides const& y = backward ? problem.x : problem.y;
  ImageParams p{};
  p.in = static_cast<char const*>(args.a), p.out = static_cast<char*>(args.out);
  p.bias = args.bias, p.bias_stride = args.bias_stride;
  p.in_n = x.n * size, p.in_h = x.h * size, p.in_w = x.w * size;
  p.out_n = y.n * size, p.out_h = y.h * size, p.out_w = y.w * size;
  p.in_channels = int(backward ? K : C), p.out_channels = int(backward ? C : K);
  p.group_in = p.in_channels * x.c * size, p.group_out = p.out_channels * y.c * size;
  // dgrad goes through the taps from the last to the first.
  p.w = static_cast<T const*>(args.b) + (backward ? (problem.R - 1) * problem.w.h + (problem.S - 1) * problem.w.w : 0);
  p.w_group = K * problem.w.n, p.w_k = problem.w.n, p.w_c = problem.w.c;
  int64_t const in_h = backward ? P : problem.H, in_w = backward ? Q : problem.W;
  p.out_height = int(backward ? problem.H : P), p.out_width = int(backward ? problem.W : Q);
  p.in_pixels = int(in_h * in_w), p.out_pixels = p.out_height * p.out_width;
  p.columns = grouped::Divisor(uint32_t(in_w)), p.pixels = grouped::Divisor(uint32_t(p.in_pixels));
  p.pitch = grouped::Divisor(uint32_t(t.pitch));
  int64_t const step_h = problem.stride_h, step_w = problem.stride_w;  // dgrad: 1
  int64_t const w_r = backward ? -problem.w.h : problem.w.h, w_s = backward ? -problem.w.w : problem.w.w;
  for (int64_t i = 0; i < problem.R * problem.S; ++i) {
    int64_t const r = i / problem.S, s = i % problem.S, h = r * problem.dilation_h, w = s * problem.dilation_w;
    p.taps[i] = int(r * w_r + s * w_s);
    p.offsets[i] = int((h % step_h * step_w + w % step_w) * t.plane + h / step_h * t.pitch + w / step_w);
  }
  p.N = int(problem.N), p.groups = int(problem.groups), p.parts = int(t.parts);
  p.low_h = int(image_zeros(op, problem.pad_top, problem.pad_bottom, problem.R, problem.dilation_h).low);
  p.low_w = int(image_zeros(op, problem.pad_left, problem.pad_right, problem.S, problem.dilation_w).low);
  p.step_h = int(step_h), p.step_w = int(step_w), p.tap_count = int(problem.R * problem.S);
  p.plane = int(t.plane), p.lines = int(t.lines), p.slots = int(t.slots), p.tiles = int(t.tiles);
  p.filter_bytes = int(t.filter_bytes), p.line_bytes = int(t.line_bytes), p.raw_bytes = int(t.raw_bytes);
  p.backward = backward;
  p.planes_in = !image_lines(x, backward ? problem.y_align : problem.x_align, p.in_channels, problem.dtype);
  p.planes_out = !image_lines(y, backward ? problem.x_align : problem.y_align, p.out_channels, problem.dtype);
  auto* const kernel = images_kernel<T, channels>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared));
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(p.groups * p.parts), unsigned(128 * t.teams), size_t(t.shared), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::images

#define CONV2D_EXT_GROUPED_IMAGES_INSTANCE(family, op, dtype, tm, tn, tk, variant)           \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                  \
    return images::launch<typename TypeOf<DType::dtype>::type, tn>(Op::op, p, args, stream); \
  }
