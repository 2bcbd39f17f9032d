// fprop and dgrad of few channels a group over NCHW, 3x3 filters of stride 1: rows lie in shared memory as they do in
// memory, as in grouped_plain_wgrad.cuh, and are turned in registers. A warp's 16 pixels are the rows of mma.sync's
// operand, two side by side a lane, those behind a short row's last of the next image; it has pairs of channels there,
// so a lane loads the same words of two channels and takes the halves of a pixel together. Float32 has one channel in a
// register, and nothing is to be turned. Rows of odd length begin anywhere: their words are loaded and stored one by
// one, and those of 16-bit types moved into place.
//
// A warp has a job: 8 channels of results of a unit, whose weights stay in registers. It walks down the rows of a tile:
// each row of inputs meets three rows of results, which are stored from the registers. The zeros between a unit's
// groups meet infinities and NaN: results that are NaN are made again, each from the channels of its group. Strict
// float32 splits its operands into two TF32 parts (three products), and adds the sums of each row of the filter.
#pragma once

#include "../core/plain_rows.h"
#include "grouped_plain_wgrad.cuh"

namespace conv2d_ext::plain {

struct RowParams {
  RunSide in;
  void* out;
  void const* w;
  void const* bias;
  int64_t bias_stride, w_group, w_out, w_in, w_r, w_s;
  int N, H, W, in_group, out_group, in_unit, out_unit, out_channels;  // of a group, of a unit, in all
  int jobs, out_jobs, shares, splits;                                 // of a block, of a unit
  int rows, images, pairs, tiles_h, tiles;  // pairs: of pixels, from an image's row to the next one's
  int stage_bytes, stages;
  bool mixed;
};

// The taps between two channels of a unit, of which there are none between groups.
template <class T>
struct Taps {
  T const* first;
  int64_t r, s;
  __device__ T operator()(int row, int column) const {
    return first == nullptr ? narrow<T>(0.f) : first[row * r + column * s];
  }
};

template <class T>
__device__ inline Taps<T> taps_of(RowParams const& p, int unit, int out, int in) {
  int const group = out / p.out_group, groups = p.out_unit / p.out_group;
  if (group != in / p.in_group || group >= groups) return {nullptr, 0, 0};
  T const* const first = static_cast<T const*>(p.w) + (int64_t(unit) * groups + group) * p.w_group;
  return {first + (out - group * p.out_group) * p.w_out + (in - group * p.in_group) * p.w_in, p.w_r, p.w_s};
}

// A result from the channels of its group, product by product.
template <class T>
__device__ inline float result_again(RowParams const& p, int n, int out, int h, int w) {
  int const unit = out / p.out_unit, of_unit = out - unit * p.out_unit, group = of_unit / p.out_group;
  int const first = group * p.in_group;
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < p.in_group * 9 && sum == sum; ++i) {  // a NaN stays one
    int const c = first + i / 9, r = i / 3 % 3, s = i % 3, y = h + r - 1, x = w + s - 1;
    if (unsigned(y) >= unsigned(p.H) || unsigned(x) >= unsigned(p.W)) continue;
    T const* const from =
        reinterpret_cast<T const*>(p.in.data + n * p.in.image + int64_t(unit * p.in_unit + c) * p.in.plane);
    sum += widen(from[y * p.W + x]) * widen(taps_of<T>(p, unit, of_unit, c)(r, s));
  }
  return sum;
}

// The job of a warp: results of 16 pixels by 8 channels, from `blocks` blocks of 8 channels. half: float32, of the last
// block's channels there are four at most, and its products are half as deep.
template <class T, int parts, int blocks, bool odd, bool half>
struct Band {
  static constexpr bool f32 = std::is_same_v<T, float>;
  // Of a row of the filter: steps of the products (16-bit types: two taps or blocks), words of weights.
  static constexpr int taps = 3 * blocks, steps = f32 ? taps : (taps + 1) / 2, words = 2 * steps;
  uint32_t b[3][parts][words];
  uint32_t raw[blocks][2]
              [f32 ? 4 : 3];  // of a lane's two channels: pixels from the one before its two to the one behind
  float d[3][4];              // of three rows of results
  static_assert(f32 || !half);
  // Channels of a lane in a block.
  __device__ static constexpr int channels(int block) { return half && block == blocks - 1 ? 1 : 2; }

  __device__ void load_weights(RowParams const& p, int unit, int out, int t) {
#pragma unroll
    for (int block = 0; block < blocks; ++block) {
      int const in = block * 8 + (f32 ? t : t * 2);
      Taps<T> const low = taps_of<T>(p, unit, out, in), high = taps_of<T>(p, unit, out, in + (f32 ? 4 : 1));
#pragma unroll
      for (int r = 0; r < 3; ++r)
#pragma unroll
        for (int s = 0; s < 3; ++s) {
          T const v[2] = {low(r, s), high(r, s)};
          int const i = block * 3 + s;
          if constexpr (f32) {
#pragma unroll
            for (int j = 0; j < channels(block); ++j) {
              uint32_t part[parts];
              grouped::split<T, parts>(__float_as_uint(v[j]), part);
#pragma unroll
              for (int k = 0; k < parts; ++k) b[r][k][i * 2 + j] = part[k];
            }
          } else {
            b[r][0][i] = uint32_t(*reinterpret_cast<uint16_t const*>(&v[0])) |
                         uint32_t(*reinterpret_cast<uint16_t const*>(&v[1])) << 16;
          }
        }
    }
    if constexpr (!f32 && taps % 2 != 0) b[0][0][taps] = b[1][0][taps] = b[2][0][taps] = 0;
  }

  // Ways from a lane's first channel: to the second, to the next block, to those of the last block, which may be others
  // of the unit where it is half empty.
  struct Ways {
    uint32_t other, block, last, last_other;
  };

  // The lane's two pixels of a channel, from those of its first one.
  __device__ static uint32_t place(uint32_t at, Ways const& to, int i, int j) {
    return i + 1 < blocks ? at + i * to.block + j * to.other : at + (j == 0 ? to.last : to.last_other);
  }

  __device__ void load(uint32_t at, Ways const& to) {
#pragma unroll
    for (int i = 0; i < blocks; ++i)
#pragma unroll
      for (int j = 0; j < channels(i); ++j) {
        // Odd rows of 16-bit types: the words from the pixel before on, or the one before that.
        uint32_t const to_pixels = place(at, to, i, j), from = odd && !f32 ? (to_pixels + 2) & ~3u : to_pixels;
        raw[i][j][0] = ptx::ld_shared(from - 4);
        if constexpr (f32 && !odd) {
          uint2 const v = ptx::ld_shared_v2(from);
          raw[i][j][1] = v.x, raw[i][j][2] = v.y;
        } else {
          raw[i][j][1] = ptx::ld_shared(from), raw[i][j][2] = ptx::ld_shared(from + 4);
        }
        if constexpr (f32) raw[i][j][3] = ptx::ld_shared(from + 8);
      }
  }

  // A row of inputs, as operands: e[i] is the pixel i - 1 behind the lane's first.
  struct Operands {
    uint32_t e[blocks][f32 ? 2 : 1][parts][4];
  };

  // Where a lane's pixels have neighbours: what the one before, its second and the one behind are anded with.
  struct Borders {
    uint32_t before, second, behind;
  };

  // at: what was loaded from.
  __device__ void take(Operands& o, Borders const& m, uint32_t at, Ways const& to) const {
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
      if constexpr (f32) {
#pragma unroll
        for (int j = 0; j < channels(i); ++j)
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            uint32_t part[parts];
            uint32_t const mask = k == 0 ? m.before : k == 3 ? m.behind : odd && k == 2 ? m.second : ~0u;
            grouped::split<T, parts>(raw[i][j][k] & mask, part);
#pragma unroll
            for (int l = 0; l < parts; ++l) o.e[i][j][l][k] = part[l];
          }
      } else if constexpr (odd) {
        // The pixels from the one before on, two a word.
        uint32_t v[2][2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t const bytes = 0x5432 - (place(at, to, i, j) & 2) * 0x1111;
#pragma unroll
          for (int k = 0; k < 2; ++k) v[j][k] = __byte_perm(raw[i][j][k], raw[i][j][k + 1], bytes);
        }
        o.e[i][0][0][0] = __byte_perm(v[0][0], v[1][0], 0x5410) & m.before;
        o.e[i][0][0][1] = __byte_perm(v[0][0], v[1][0], 0x7632);
        o.e[i][0][0][2] = __byte_perm(v[0][1], v[1][1], 0x5410) & m.second;
        o.e[i][0][0][3] = __byte_perm(v[0][1], v[1][1], 0x7632) & m.behind;
      } else {
        uint32_t const(&v)[3] = raw[i][0], (&w)[3] = raw[i][1];
        o.e[i][0][0][0] = __byte_perm(v[0], w[0], 0x7632) & m.before;
        o.e[i][0][0][1] = __byte_perm(v[1], w[1], 0x5410), o.e[i][0][0][2] = __byte_perm(v[1], w[1], 0x7632);
        o.e[i][0][0][3] = __byte_perm(v[2], w[2], 0x5410) & m.behind;
      }
    }
  }

  template <int r>
  __device__ void multiply(float (&sum)[4], Operands const& o) {
    if constexpr (f32 && parts == 1) {
      multiply<r, 0, 0>(sum, o);
    } else if constexpr (f32) {
      // A row of the filter apart: the tensor cores cut where they add.
      float apart[4] = {};
      multiply<r, 1, 0>(apart, o), multiply<r, 0, 1>(apart, o), multiply<r, 0, 0>(apart, o);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += apart[i];
    } else {
#pragma unroll
      for (int i = 0; i < taps; i += 2) {
        uint32_t const(&e)[4] = o.e[i / 3][0][0];
        uint32_t const(&f)[4] = o.e[i + 1 < taps ? (i + 1) / 3 : 0][0][0];
        bool const two = i + 1 < taps;
        ptx::mma_m16n8k16<T>(sum, e[i % 3], e[i % 3 + 1], two ? f[(i + 1) % 3] : 0, two ? f[(i + 1) % 3 + 1] : 0,
                             b[r][0][i], b[r][0][i + 1]);
      }
    }
  }

  template <int r, int part_in, int part_w>
  __device__ void multiply(float (&sum)[4], Operands const& o) {
#pragma unroll
    for (int i = 0; i < taps; ++i) {
      int const s = i % 3;
      uint32_t const(&e)[2][parts][4] = o.e[i / 3];
      uint32_t const(&v)[words] = b[r][part_w];
      if (channels(i / 3) == 1)
        ptx::mma_m16n8k4_tf32(sum, e[0][part_in][s], e[0][part_in][s + 1], v[i * 2]);
      else
        ptx::mma_m16n8k8_tf32(sum, e[0][part_in][s], e[0][part_in][s + 1], e[1][part_in][s], e[1][part_in][s + 1],
                              v[i * 2], v[i * 2 + 1]);
    }
  }

  // A value that comes of the last loads.
  __device__ uint32_t last() const { return raw[blocks - 1][channels(blocks - 1) - 1][f32 ? 3 : 2]; }
};

template <class T, int parts, int blocks, bool half>
constexpr int kWarps = rows_warps(sizeof(T) == 4 ? DType::f32 : DType::f16, parts == 2, blocks, half);

template <class T, int parts, int blocks, bool odd, bool half>
__global__ void __launch_bounds__(kWarps<T, parts, blocks, half> * 32 + 128, 1)
    rows_kernel(__grid_constant__ RowParams const p) {
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t full[4], empty[4];
  constexpr int warps = kWarps<T, parts, blocks, half>,
                registers = warps == 16   ? 112
                            : warps == 12 ? 152
                                          : 232,
                copying = warps == 8 ? 40 : 32;  // as in sums_kernel
  uint32_t const stages = ptx::shared_address(shared);
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int const split = blockIdx.x % p.splits, job0 = blockIdx.x / p.splits * p.jobs, unit0 = job0 / p.out_jobs;
  int const least = p.tiles / p.splits, more = p.tiles % p.splits;  // tiles
  int const first = split * least + min(split, more), end = first + least + (split < more ? 1 : 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::mbarrier_init(&full[i], kCopyingWarps);
      ptx::mbarrier_init(&empty[i], warps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (warp >= warps) {
    ptx::setmaxnreg_dec<copying>();
    int stage = 0;
    for (int number = first; number < end; ++number) {
      if (number - first >= p.stages) ptx::mbarrier_wait(&empty[stage], ((number - first) / p.stages - 1) & 1);
      int const image = number / p.tiles_h, tile_h = number - image * p.tiles_h, n0 = image * p.images;
      int const images = min(p.images, p.N - n0), rows = min(p.rows, p.H - tile_h * p.rows) + 2;
      int const first_c = unit0 * p.in_unit;
      Runs const in(p.in, first_c, n0, tile_h, rows);
      expect_runs(&full[stage], in.bytes_of_lane(p.in, images));
      in.copy(p.in, stages + stage * p.stage_bytes + uint32_t(kRunsFront), images, &full[stage]);
      if (++stage == p.stages) stage = 0;
    }
    return;
  }
  ptx::setmaxnreg_inc<registers>();

  int const share = warp % p.shares, job = job0 + warp / p.shares;
  int const u = job / p.out_jobs - unit0, block_out = job % p.out_jobs;
  int const out_first = (unit0 + u) * p.out_unit + block_out * 8;  // channel of the results
  bool const works = job < job0 + p.jobs && out_first < p.out_channels;
  int const results = min(p.out_unit - block_out * 8 - t * 2, 2);  // of the lane's two channels
  using Rows = Band<T, parts, blocks, odd, half>;
  Rows band;
  float bias[2] = {0, 0};
  if (works) {
    band.load_weights(p, unit0 + u, block_out * 8 + g, t);
    if (p.bias != nullptr)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (i < results) bias[i] = widen(static_cast<T const*>(p.bias)[(out_first + t * 2 + i) * p.bias_stride]);
  }
  // A lane's two channels of a block, and in the last, where those behind the unit's give way to the ones before.
  int const c0 = sizeof(T) == 2 ? t * 2 : t, c1 = c0 + (sizeof(T) == 2 ? 1 : 4), in_last = blocks * 8 - 8;
  int const last0 = in_last + c0 - (in_last + c0 < p.in_unit ? 0 : 4);
  int const last1 = in_last + c1 - (in_last + c1 < p.in_unit ? 0 : 4);
  auto at_channel = [&](int c) {
    return uint32_t(kRunsFront) + channel_at(p.in, unit0 * p.in_unit, u * p.in_unit + c);
  };
  uint32_t const in_at[4] = {at_channel(c0), at_channel(c1), at_channel(last0), at_channel(last1)};
  uint32_t const to_block = 8 / p.in.together * p.in.run;
  int64_t const plane = int64_t(p.H) * p.W;
  int stage = 0, phase = 0;
  for (int number = first; number < end; ++number) {
    ptx::mbarrier_wait(&full[stage], phase);
    uint32_t seen = 0;
    if (works) {
      int const image0 = number / p.tiles_h, tile_h = number - image0 * p.tiles_h, h0 = tile_h * p.rows;
      int const images = min(p.images, p.N - image0 * p.images), rows = min(p.rows, p.H - h0);
      int const pairs = images * p.pairs;
      auto row_of = [&](int i) { return row_at(p.in, in_at[i], tile_h); };
      uint32_t const row_in = row_of(0);
      typename Rows::Ways const ways{row_of(1) - row_in, to_block, row_of(2) - row_in, row_of(3) - row_in};
      for (int item = share; item * kRowPairs < pairs; item += p.shares) {
        int const pair = min(item * kRowPairs + g, pairs - 1), image = pair / p.pairs, w = (pair - image * p.pairs) * 2;
        bool const exists = item * kRowPairs + g < pairs && w < p.W;
        bool const second = !odd || w + 1 < p.W;
        typename Rows::Borders const borders{w == 0 ? 0 : ~0u, second ? ~0u : 0, w + 2 < p.W ? ~0u : 0};
        uint32_t at = stages + stage * p.stage_bytes + row_in + image * p.in.run_image + w * int(sizeof(T));
        int const n = image0 * p.images + image;
        T* to =
            static_cast<T*>(p.out) + (int64_t(n) * p.out_channels + out_first + t * 2) * plane + int64_t(h0) * p.W + w;
        band.load(at, ways);
        typename Rows::Operands o;
        auto begin = [&](float (&d)[4]) { d[0] = d[2] = bias[0], d[1] = d[3] = bias[1]; };
        bool nan = false;
        auto store = [&](float (&d)[4]) {
          if (exists) {
            nan |= !(d[0] == d[0]) || !(d[1] == d[1]) || !(d[2] == d[2]) || !(d[3] == d[3]);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              if (i >= results) continue;
              Vector<T, 2> v;
              v.v[0] = narrow<T>(d[i]), v.v[1] = narrow<T>(d[i + 2]);
              if constexpr (odd) {
                to[i * plane] = v.v[0];
                if (second) to[i * plane + 1] = v.v[1];
              } else {
                *reinterpret_cast<Vector<T, 2>*>(to + i * plane) = v;
              }
            }
          }
          to += p.W;
        };
        // A row of inputs and those of results that it meets, with the first, second and last row of the filter.
        auto step = [&]<bool r0, bool r1, bool r2>(bool in_image) {
          band.take(o, borders, at, ways);
          if constexpr (r0 || r1) band.load(at += p.in.pitch, ways);
          if constexpr (r0) begin(band.d[0]);
          if (in_image) {
            if constexpr (r0) band.template multiply<0>(band.d[0], o);
            if constexpr (r1) band.template multiply<1>(band.d[1], o);
            if constexpr (r2) band.template multiply<2>(band.d[2], o);
          }
          if constexpr (r2) store(band.d[2]);
#pragma unroll
          for (int j = 0; j < 4; ++j) band.d[2][j] = band.d[1][j], band.d[1][j] = band.d[0][j];
        };
        step.template operator()<true, false, false>(h0 > 0);
        step.template operator()<true, true, false>(true);
#pragma unroll 3
        for (int i = 2; i < rows; ++i) step.template operator()<true, true, true>(true);
        step.template operator()<false, true, true>(true);
        step.template operator()<false, false, true>(h0 + rows < p.H);
        seen = band.last();
        if (p.mixed && nan) {
          to -= rows * p.W;
#pragma unroll 1
          for (int i = 0; i < rows * 4; ++i) {
            if (i % 2 >= results || (i / 2 % 2 == 1 && !second)) continue;
            T* const at = to + i % 2 * plane + i / 4 * p.W + i / 2 % 2;
            float const was = widen(*at);
            if (!(was == was))
              *at = narrow<T>(result_again<T>(p, n, out_first + t * 2 + i % 2, h0 + i / 4, w + i / 2 % 2) +
                              (i % 2 == 0 ? bias[0] : bias[1]));
          }
        }
      }
    }
    give_back(&empty[stage], seen);
    if (++stage == p.stages) stage = 0, phase ^= 1;
  }
}

template <class T, int parts, int blocks, bool odd, bool half>
cudaError_t launch_rows_of(Op op, Problem const& problem, PlainRows const& t, Arguments const& args,
                           cudaStream_t stream) {
  bool const backward = op == Op::dgrad;
  int64_t const per_unit = plain_per_unit(problem), C = problem.C_per_group(), K = problem.K_per_group();
  RowParams p{};
  p.in = make_run_side(args.a, backward ? problem.K : problem.C, problem.H, problem.W, problem.dtype, t.x, t.channels,
                       t.rows, 1);
  p.out = args.out, p.bias = args.bias, p.bias_stride = args.bias_stride;
  // dgrad goes through the taps from the last to the first.
  p.w = static_cast<T const*>(args.b) + (backward ? 2 * (problem.w.h + problem.w.w) : 0);
  p.w_group = K * problem.w.n, p.w_r = backward ? -problem.w.h : problem.w.h;
  p.w_s = backward ? -problem.w.w : problem.w.w;
  p.w_out = backward ? problem.w.c : problem.w.n, p.w_in = backward ? problem.w.n : problem.w.c;
  p.N = int(problem.N), p.H = int(problem.H), p.W = int(problem.W);
  p.in_group = int(backward ? K : C), p.out_group = int(backward ? C : K), p.in_unit = int(per_unit * p.in_group);
  p.out_unit = int(per_unit * p.out_group);
  p.out_channels = int(backward ? problem.C : problem.K);
  p.jobs = int(t.jobs), p.out_jobs = int(t.out), p.shares = int(t.shares), p.splits = int(t.splits);
  p.rows = int(t.rows), p.images = int(t.images), p.pairs = int(t.pairs);
  p.tiles_h = int(ceil_div(problem.H, t.rows)), p.tiles = int(t.tiles);
  p.stage_bytes = int(t.stage_bytes), p.stages = int(t.stages);
  p.mixed = per_unit > 1 || p.in_unit % 8 != 0 || parts == 2;
  auto* const kernel = rows_kernel<T, parts, blocks, odd, half>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared));
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(t.places * t.splits), kWarps<T, parts, blocks, half> * 32 + 128, size_t(t.shared), stream>>>(p);
  return cudaGetLastError();
}

template <class T, int parts, int blocks, bool odd>
cudaError_t launch_rows(Op op, Problem const& problem, PlainRows const& t, Arguments const& args, cudaStream_t stream) {
  if constexpr (sizeof(T) == 4 && blocks > 1)
    if (rows_half(op, problem)) return launch_rows_of<T, parts, blocks, odd, true>(op, problem, t, args, stream);
  return launch_rows_of<T, parts, blocks, odd, false>(op, problem, t, args, stream);
}

template <class T, int parts, bool odd>
cudaError_t start_rows_of(Op op, Problem const& problem, PlainRows const& t, Arguments const& args,
                          cudaStream_t stream) {
  int64_t const blocks = rows_in(op, problem);
  if (blocks == 1) return launch_rows<T, parts, 1, odd>(op, problem, t, args, stream);
  if (blocks == 2) return launch_rows<T, parts, 2, odd>(op, problem, t, args, stream);
  return launch_rows<T, parts, 3, odd>(op, problem, t, args, stream);
}
template <class T, int parts>
cudaError_t start_rows_of(Op op, Problem const& problem, PlainRows const& t, Arguments const& args,
                          cudaStream_t stream) {
  return problem.W % 2 == 0 ? start_rows_of<T, parts, false>(op, problem, t, args, stream)
                            : start_rows_of<T, parts, true>(op, problem, t, args, stream);
}

template <DType dtype>
cudaError_t start_rows(Op op, Problem const& problem, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  int sm_count = 0;
  if (cudaError_t const error = count_sms(sm_count)) return error;
  PlainRows const t = plain_rows(op, problem, Device{sm_count, 90});
  if constexpr (dtype == DType::f32)
    if (!problem.allow_tf32) return start_rows_of<T, 2>(op, problem, t, args, stream);
  return start_rows_of<T, 1>(op, problem, t, args, stream);
}

}  // namespace conv2d_ext::plain

#define CONV2D_EXT_GROUPED_ROWS_INSTANCE(family, op, dtype, tm, tn, tk, variant) \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                      \
    return plain::start_rows<DType::dtype>(Op::op, p, args, stream);             \
  }
