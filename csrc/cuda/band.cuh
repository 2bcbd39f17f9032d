// Depthwise convolution with large filters on tensor cores (mma.sync), float16 and bfloat16: a filter's row
// as a banded matrix. For one channel and one tap row r
//   out[p, q] += sum over w of in[p - pad + r, w] * T_r[w, q],    T_r[w, q] = filter[r][w - q + pad], 0 outside it.
// A: 16 rows of the image by 16 columns, as ldmatrix reads them from a plane in shared memory. B: 16 columns by 8
// outputs of T_r; T is constant along its diagonals, so a lane's pair of elements depends on 8 * (block of columns -
// block of outputs) alone: ceil((S + 7) / 8) registers hold the whole band, and all outputs of the channel use them.
//
// A warp computes 16 * D rows by NB blocks of 8 columns, every other one, of G images; a block's warps come in pairs
// for the even and the odd blocks. The 16 rows of an A are D apart: its products with T_r, T_(r-1), ... belong to D
// rows of outputs, so a warp reads each A once, and holds a window of D bands. Rows are stored by their remainder mod
// D, so that those of an A are neighbours. dgrad is fprop with the filter turned round.
//
// Strides and dilations are zeros too: between the taps of the filter and, in dgrad, between the pixels of y; fprop
// stores one of stride x stride outputs.
//
// T's zeros make NaN of infinite inputs that an output does not meet; a block that finds a NaN among its outputs
// computes them again, one product at a time.
#pragma once

#include "band_tile.cuh"

namespace conv2d_ext::band {

constexpr int kLead = kBandLead;            // zeros before a filter's row
constexpr int kPassPairs = kBandPassPairs;  // wider bands are multiplied in passes of this many pairs

struct Params {
  Source in;
  void const* w;
  void const* bias;
  void* out;
  int64_t out_n, out_c, out_h, out_w;
  int64_t w_k, w_r, w_s, bias_stride;
  int64_t N;
  int C;
  int out_H, out_W, R, S, pad_h, pad_w;
  int taps_h, taps_w, tap_step_h, tap_step_w;  // of R x S, the taps that are not zeros
  int out_step_h, out_step_w;                  // of out_H x out_W, the outputs that are stored
  bool turned;
  int tiles_h, tiles_w, channel_units;
  int channels, images, rounds;  // of a block; images of a round
  int origin_w;                  // first column of the first tile, -7 to 0
  int skew;                      // columns from the tile's first input to the first that meets a tap, 0 to 7
  int shift[2];                  // even and odd blocks of outputs: their columns start `shift` units of 8 earlier
  int first_unit;                // of 8 columns: from the tile's first input to the first that is stored
  int plane_bytes, filter_bytes, filter_pitch, filter_copy;
  int passes, blocks;           // over a row of taps; of 16 columns that one of outputs meets
  bool out_vectors;             // nchw: pairs of columns, nhwc: 8 channels
  Divisor taps_of, columns_of;  // by taps_h * taps_w, by taps_w
};

// A block's tile and its first channel and image.
struct Where {
  int p0, q0;
  int c0, channels;
  int64_t n0;
};

// Filters, twice, into zeros: a lane reads pairs of neighbours, and every other lane's begin at odd elements.
template <class T>
__device__ inline void load_filters(Params const& p, Where const& at, T* filters) {
  constexpr int batch = 4;  // loads on their way
  int const taps = p.taps_h * p.taps_w, total = at.channels * taps, step = int(blockDim.x);
  T const* const w = static_cast<T const*>(p.w) + at.c0 * p.w_k;
  for (int first = threadIdx.x; first < total; first += batch * step) {
    T v[batch];
    T* to[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      int const i = first + j * step;
      if (i >= total) continue;
      int const c = int(p.taps_of.quotient(i)), tap = i - c * taps;
      int const r = int(p.columns_of.quotient(tap)), s = tap - r * p.taps_w;
      int const h = r * p.tap_step_h, column = s * p.tap_step_w;
      v[j] = w[c * p.w_k + r * p.w_r + s * p.w_s];
      to[j] = filters + c * 2 * p.filter_copy + (p.turned ? p.R - 1 - h : h) * p.filter_pitch + kLead + p.skew +
              (p.turned ? p.S - 1 - column : column);
    }
#pragma unroll
    for (int j = 0; j < batch; ++j)
      if (first + j * step < total) to[j][0] = v[j], to[j][p.filter_copy - 1] = v[j];
  }
}

// One row of inputs for each remainder: its products with the D bands of the window. `edge`: some of the taps' rows
// e, e-1, ... are not of the filter.
template <class T, int D, int NB, int G, int NT, bool edge>
__device__ inline void multiply(float (&acc)[G][D][NB][4], uint32_t (&window)[D][NT], uint32_t a_row,
                                uint32_t remainder_bytes, uint32_t plane_bytes, uint32_t band, uint32_t band_pitch,
                                int e0, int R, int first, int last) {
  constexpr int J = (NT + 1) / 2;
#pragma unroll
  for (int u = 0; u < D; ++u) {
    int const e = e0 + u;
    if (edge && e >= R + D - 1) break;
    if (!edge || e < R) {
#pragma unroll
      for (int i = 0; i < NT; ++i) window[u][i] = ptx::ld_shared(band + u * band_pitch + i * 16);
    }
#pragma unroll
    for (int b = 0; b < NB + J - 1; ++b) {
      if (b < first || b >= last) continue;
#pragma unroll
      for (int g = 0; g < G; ++g) {
        uint32_t a[4];
        ptx::ldmatrix_x4(a, a_row + u * remainder_bytes + g * plane_bytes + b * 32);
#pragma unroll
        for (int i = 0; i < D; ++i) {
          if (edge && (e - i < 0 || e - i >= R)) continue;
          uint32_t const(&t)[NT] = window[(u - i + D) % D];
#pragma unroll
          for (int nb = 0; nb < NB; ++nb) {
            int const j = b - nb;
            if (j < 0 || j >= J) continue;
            if (2 * j + 1 < NT)
              ptx::mma_m16n8k16<T>(acc[g][i][nb], a[0], a[1], a[2], a[3], t[2 * j], t[2 * j + 1]);
            else
              ptx::mma_m16n8k8<T>(acc[g][i][nb], a[0], a[1], t[2 * j]);
          }
        }
      }
    }
  }
}

// One block of columns against one of outputs, for all rows of the filter.
template <class T, int G>
__device__ inline void multiply_block(float (&acc)[G][1][1][4], uint32_t a_row, uint32_t row_bytes,
                                      uint32_t plane_bytes, uint32_t band, uint32_t band_pitch, int R) {
#pragma unroll 4
  for (int e = 0; e < R; ++e, a_row += row_bytes, band += band_pitch) {
    uint32_t const t0 = ptx::ld_shared(band), t1 = ptx::ld_shared(band + 16);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, a_row + g * plane_bytes);
      ptx::mma_m16n8k16<T>(acc[g][0][0], a[0], a[1], a[2], a[3], t0, t1);
    }
  }
}

// Where an output is stored, if it is.
__device__ inline bool is_stored(Params const& p, int y, int x) {
  return y < p.out_H && unsigned(x) < unsigned(p.out_W) && y % p.out_step_h == 0 && x % p.out_step_w == 0;
}
template <class T>
__device__ inline T* place_of(Params const& p, int64_t n, int c, int y, int x) {
  return static_cast<T*>(p.out) + n * p.out_n + c * p.out_c + y / p.out_step_h * p.out_h + x / p.out_step_w * p.out_w;
}

// An output from global memory, product by product.
template <class T>
__device__ __noinline__ float exact(Params const& p, int64_t n, int c, int y, int x) {
  T const* const in = static_cast<T const*>(p.in.data) + n * p.in.n + c * p.in.c;
  T const* const w = static_cast<T const*>(p.w) + c * p.w_k;
  float sum = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
  for (int r = 0; r < p.taps_h && sum == sum; ++r)  // a NaN stays one
    for (int s = 0; s < p.taps_w; ++s) {
      int const h = y - p.pad_h + (p.turned ? p.R - 1 - r * p.tap_step_h : r * p.tap_step_h);
      int const column = x - p.pad_w + (p.turned ? p.S - 1 - s * p.tap_step_w : s * p.tap_step_w);
      if (unsigned(h) >= unsigned(p.in.H) || unsigned(column) >= unsigned(p.in.W)) continue;
      if (h % p.in.step_h != 0 || column % p.in.step_w != 0) continue;
      sum = fmaf(widen(in[h / p.in.step_h * p.in.h + column / p.in.step_w * p.in.w]), widen(w[r * p.w_r + s * p.w_s]),
                 sum);
    }
  return sum;
}

template <class T, int D, int NB>
__device__ inline void store_again(Params const& p, Where const& at, int64_t n0) {
  constexpr int pixels = 16 * D * 16 * NB;
  int const total = at.channels * p.images * pixels;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    int const plane = i / pixels, y = at.p0 + i % pixels / (16 * NB), x = at.q0 + i % (16 * NB);
    int const c = at.c0 + plane / p.images;
    int64_t const n = n0 + plane % p.images;
    if (n < p.N && is_stored(p, y, x)) *place_of<T>(p, n, c, y, x) = narrow<T>(exact<T>(p, n, c, y, x));
  }
}

// nhwc: from planes of outputs, [row][16 * NB + 8], to memory.
template <class T, int D, int NB>
__device__ inline void store_nhwc(Params const& p, Where const& at, int64_t n0, unsigned char const* planes) {
  constexpr int pitch = 16 * NB + 8, pairs = 8 * NB;
  int const total = p.images * 16 * D * pairs;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    int const image = i / (16 * D * pairs), row = i / pairs % (16 * D), column = i % pairs * 2;
    int const y = at.p0 + row, x = at.q0 + column;
    int64_t const n = n0 + image;
    if (n >= p.N || !(is_stored(p, y, x) || is_stored(p, y, x + 1))) continue;
    unsigned char const* from = planes + image * p.plane_bytes + (row * pitch + column) * int(sizeof(T));
    Vector<T, 8> pixel[2];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      if (c >= at.channels) break;
      Vector<T, 2> const v = *reinterpret_cast<Vector<T, 2> const*>(from + c * p.images * p.plane_bytes);
      pixel[0].v[c] = v.v[0], pixel[1].v[c] = v.v[1];
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (!is_stored(p, y, x + side)) continue;
      T* const to = place_of<T>(p, n, at.c0, y, x + side);
      if (p.out_vectors) {
        *reinterpret_cast<Vector<T, 8>*>(to) = pixel[side];
      } else {
#pragma unroll
        for (int c = 0; c < 8; ++c)
          if (c < at.channels) to[c] = pixel[side].v[c];
      }
    }
  }
}

// nchw: the same for outputs that are no whole pairs of columns, or not all stored.
template <class T, int D, int NB>
__device__ inline void store_nchw(Params const& p, Where const& at, int64_t n0, unsigned char const* planes) {
  constexpr int pitch = 16 * NB + 8;
  bool const some = p.out_step_h > 1 || p.out_step_w > 1;
#pragma unroll 1
  for (int plane = 0; plane < at.channels * p.images; ++plane, planes += p.plane_bytes) {
    int const c = plane / p.images;
    int64_t const n = n0 + plane - c * p.images;
    if (n >= p.N) continue;
    T* const out = static_cast<T*>(p.out) + n * p.out_n + (at.c0 + c) * p.out_c;
#pragma unroll 1
    for (int i = threadIdx.x; i < 16 * D * 16 * NB; i += blockDim.x) {
      int const row = i / (16 * NB), column = i % (16 * NB), y = at.p0 + row, x = at.q0 + column;
      if (y >= p.out_H || unsigned(x) >= unsigned(p.out_W) || (some && !is_stored(p, y, x))) continue;
      T* const to = some ? place_of<T>(p, n, at.c0 + c, y, x) : out + y * p.out_h + x;
      *to = *reinterpret_cast<T const*>(planes + (row * pitch + column) * int(sizeof(T)));
    }
  }
}

template <class T, int D, int NB, int G, int NT, bool nhwc>
__global__ void __launch_bounds__(nhwc ? 512 : 256, nhwc     ? 1
                                                    : D == 1 ? 3
                                                             : 2) gather(__grid_constant__ Params const p) {
  constexpr int J = (NT + 1) / 2, NX = NB + J - 1;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const filters = reinterpret_cast<T*>(shared);
  unsigned char* const planes = shared + p.channels * p.filter_bytes;

  uint32_t index = blockIdx.x;
  auto digit = [&](int count) {
    uint32_t const rest = index % uint32_t(count);
    index /= uint32_t(count);
    return int(rest);
  };
  Where at;
  at.c0 = digit(p.channel_units) * p.channels;
  at.channels = p.C - at.c0 < p.channels ? p.C - at.c0 : p.channels;
  at.q0 = p.origin_w + digit(p.tiles_w) * 16 * NB, at.p0 = digit(p.tiles_h) * 16 * D;
  int const base_w = at.q0 - p.pad_w - p.skew;  // a multiple of 8
  at.n0 = int64_t(index) * p.images * p.rounds;

  int const lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int const odd = warp % 2, groups = p.images / G, group = warp / 2 % groups, c = warp / 2 / groups;
  int const unit = odd - p.shift[odd];
  int const row = lane % 4 * 2, column = lane / 4;  // of T: k and n
  uint32_t const band =
      ptx::shared_address(filters + c * 2 * p.filter_copy + (column % 2 == 0 ? 0 : p.filter_copy - 1) + kLead + row -
                          column - 8 * p.shift[odd]);
  unsigned char* const plane = planes + (c * p.images + group * G) * p.plane_bytes;
  uint32_t const a = ptx::shared_address(plane) +
                     uint32_t((lane % 16 * p.in.pitch + lane / 16 * 8 + (unit - p.first_unit) * 8) * int(sizeof(T)));
  bool const exists = c < at.channels;
  float const bias =
      p.bias != nullptr && exists ? widen(static_cast<T const*>(p.bias)[(at.c0 + c) * p.bias_stride]) : 0.f;

  // Outputs go by way of the planes, if they are not stored in pairs of columns.
  bool const some = p.out_step_h > 1 || p.out_step_w > 1, staged = nhwc || (D > 1 && (some || !p.out_vectors));
  // A large tile has one round: nothing is held in registers for the next.
  int const rounds = D == 4 ? 1 : p.rounds;
  for (int round = 0; round < rounds; ++round) {
    int64_t const n0 = at.n0 + round * p.images;
    if (n0 >= p.N) break;
    __syncthreads();  // the last round's planes have been read
    if (round == 0) {
      clear(shared, p.channels * (p.filter_bytes + p.images * p.plane_bytes));
      __syncthreads();
      load_filters<T>(p, at, filters);
    } else if (staged) {
      clear(planes, p.channels * p.images * p.plane_bytes);
      __syncthreads();
    }
    fill<T, D, nhwc>(p.in, {at.p0 - p.pad_h, base_w + 8 * p.first_unit, at.c0, at.channels, p.images, n0}, planes,
                     p.plane_bytes);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();

    bool const busy = exists && n0 + group * G < p.N;
    float acc[G][D][NB][4];
#pragma unroll
    for (int g = 0; g < G; ++g)
#pragma unroll
      for (int i = 0; i < D; ++i)
#pragma unroll
        for (int nb = 0; nb < NB; ++nb)
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[g][i][nb][j] = bias;
    for (int pass = 0; pass < p.passes && busy; ++pass) {
      int const from = base_w + 8 * (unit + pass * kPassPairs);  // the first column that the warp multiplies
      int const first = from + 15 >= 0 ? 0 : (-from) / 16, last = p.in.W > from ? (p.in.W - from + 15) / 16 : 0;
      uint32_t const row_bytes = p.in.pitch * int(sizeof(T)), band_pitch = p.filter_pitch * int(sizeof(T));
      if constexpr (D == 1 && NB == 1) {
        for (int b = first; b < last && b < p.blocks; ++b)
          multiply_block<T, G>(acc, a + b * 32, row_bytes, p.plane_bytes, band + b * 32, band_pitch, p.R);
        continue;
      }
      uint32_t a_row = a + pass * kPassPairs * 16, b = band + pass * kPassPairs * 16;
      uint32_t window[D][NT];
      auto step = [&](int e0, auto edge) {
        multiply<T, D, NB, G, NT, decltype(edge)::value>(acc, window, a_row, p.in.rows * row_bytes, p.plane_bytes, b,
                                                         band_pitch, e0, p.R, first, last < NX ? last : NX);
        a_row += row_bytes;
        b += D * band_pitch;
      };
#pragma unroll 1
      for (int e0 = 0; e0 < p.R + D - 1; e0 += D)
        if (e0 >= D - 1 && e0 + D <= p.R)
          step(e0, std::false_type{});
        else
          step(e0, std::true_type{});
    }

    bool nan = false;
    if (staged) __syncthreads();  // the planes have been read, and take the outputs
    if (busy) {
      constexpr int pitch = 16 * NB + 8;
      int const x = at.q0 + 8 * odd + row;
      bool const pairs = p.out_vectors && x >= 0;
#pragma unroll
      for (int g = 0; g < G; ++g) {
        int64_t const n = n0 + group * G + g;
        if (n >= p.N) continue;
        T* const out = static_cast<T*>(p.out) + n * p.out_n + (at.c0 + c) * p.out_c + x;
#pragma unroll
        for (int i = 0; i < D; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            int const r = (column + 8 * half) * D + i, y = at.p0 + r;
            if (!staged && y >= p.out_H) continue;
            T* const to = out + y * p.out_h;
#pragma unroll
            for (int nb = 0; nb < NB; ++nb) {
              float const v0 = acc[g][i][nb][2 * half], v1 = acc[g][i][nb][2 * half + 1];
              Vector<T, 2> const v{{narrow<T>(v0), narrow<T>(v1)}};
              nan = nan || v0 != v0 || v1 != v1;
              if (staged) {
                *reinterpret_cast<Vector<T, 2>*>(plane + g * p.plane_bytes +
                                                 (r * pitch + 8 * odd + 16 * nb + row) * int(sizeof(T))) = v;
              } else if (D > 1) {
                if (unsigned(x + 16 * nb) < unsigned(p.out_W)) *reinterpret_cast<Vector<T, 2>*>(to + 16 * nb) = v;
              } else if (some) {
#pragma unroll
                for (int side = 0; side < 2; ++side)
                  if (is_stored(p, y, x + 16 * nb + side))
                    *place_of<T>(p, n, at.c0 + c, y, x + 16 * nb + side) = v.v[side];
              } else if (pairs && x + 16 * nb + 1 < p.out_W) {
                *reinterpret_cast<Vector<T, 2>*>(to + 16 * nb) = v;
              } else {
                if (unsigned(x + 16 * nb) < unsigned(p.out_W)) to[16 * nb] = v.v[0];
                if (unsigned(x + 16 * nb + 1) < unsigned(p.out_W)) to[16 * nb + 1] = v.v[1];
              }
            }
          }
      }
    }
    if (staged) {
      __syncthreads();
      if constexpr (nhwc)
        store_nhwc<T, D, NB>(p, at, n0, planes);
      else if constexpr (D > 1)
        store_nchw<T, D, NB>(p, at, n0, planes);
    }
    if (__syncthreads_or(nan) != 0) store_again<T, D, NB>(p, at, n0);
  }
}

// ---- host side

template <class T, int D, int NB, bool nhwc>
cudaError_t start(Params const& p, BandTile const& t, int64_t blocks, cudaStream_t stream) {
  constexpr int G = band_images(D);
  auto run = [&](auto* kernel) {
    if (t.shared_bytes > 48 * 1024)
      if (auto const error =
              cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)))
        return error;
    kernel<<<unsigned(blocks), unsigned(64 * t.channels * (t.images / G)), size_t(t.shared_bytes), stream>>>(p);
    return cudaGetLastError();
  };
  if constexpr (NB == 1) {
    return run(gather<T, D, NB, G, 2, nhwc>);
  } else {
    if (t.pairs == 2) return run(gather<T, D, NB, G, 2, nhwc>);
    if (t.pairs == 3) return run(gather<T, D, NB, G, 3, nhwc>);
    if (t.pairs == 4) return run(gather<T, D, NB, G, 4, nhwc>);
    return run(gather<T, D, NB, G, 5, nhwc>);
  }
}

template <Op op, DType dtype, int tile_m, int tile_n, Variant variant>
cudaError_t launch(Problem const& problem, Plan const&, Arguments const& args, cudaStream_t stream) {
  using T = typename TypeOf<dtype>::type;
  constexpr int D = tile_m / 16, NB = tile_n / 16;
  constexpr bool nhwc = variant == Variant::nhwc, backward = op == Op::dgrad;
  Problem const whole = spread(problem);
  BandTile const t = band_tile(op, whole, D, NB, nhwc);
  Strides const& in = backward ? problem.y : problem.x;
  Strides const& out = backward ? problem.x : problem.y;
  Params p{};
  p.w = args.b, p.bias = args.bias, p.out = args.out, p.bias_stride = args.bias_stride;
  p.out_n = out.n, p.out_c = out.c, p.out_h = out.h, p.out_w = nhwc ? out.w : 1;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.N = problem.N, p.C = int(problem.C), p.R = int(whole.R), p.S = int(whole.S);
  p.taps_h = int(problem.R), p.taps_w = int(problem.S);
  p.tap_step_h = int(problem.dilation_h), p.tap_step_w = int(problem.dilation_w);
  p.out_step_h = backward ? 1 : int(problem.stride_h), p.out_step_w = backward ? 1 : int(problem.stride_w);
  p.out_H = t.out_H, p.out_W = t.out_W, p.pad_h = t.pad_h, p.pad_w = t.pad_w;
  p.turned = backward;
  p.tiles_h = int(t.tiles_h), p.tiles_w = int(t.tiles_w), p.channel_units = int(t.channel_units);
  p.channels = t.channels, p.images = t.images;
  p.origin_w = t.origin_w, p.skew = t.skew, p.shift[0] = t.shift[0], p.shift[1] = t.shift[1];
  p.first_unit = t.first_unit, p.passes = t.passes, p.blocks = t.pairs / 2;
  p.plane_bytes = int(t.plane_bytes), p.filter_bytes = int(t.filter_bytes);
  p.filter_pitch = t.filter_pitch, p.filter_copy = t.filter_copy;

  int64_t const image_units = ceil_div(problem.N, t.images);
  p.rounds = int(band_rounds(t, problem.N, D));
  bool const vectors = t.channels == 8 && problem.C % 8 == 0;
  p.in = backward ? source_of<T>(in, args.a, problem.N, problem.P(), problem.Q(), nhwc, problem.y_align,
                                 vectors || !nhwc, D, t.rows, 8 * t.units, problem.stride_h, problem.stride_w)
                  : source_of<T>(in, args.a, problem.N, problem.H, problem.W, nhwc, problem.x_align, vectors || !nhwc,
                                 D, t.rows, 8 * t.units);
  int const out_align = backward ? problem.x_align : problem.y_align;
  p.out_vectors = nhwc
                      ? vectors && depthwise::rows_aligned(out, true, out_align, 16, 2)
                      : depthwise::rows_aligned(out, false, out_align, 4, 2) && t.origin_w % 2 == 0 && t.out_W % 2 == 0;
  p.taps_of = Divisor(uint32_t(p.taps_h * p.taps_w)), p.columns_of = Divisor(uint32_t(p.taps_w));
  return start<T, D, NB, nhwc>(p, t, t.tiles_h * t.tiles_w * t.channel_units * ceil_div(image_units, p.rounds), stream);
}

}  // namespace conv2d_ext::band

#define CONV2D_EXT_BAND_INSTANCE(family, op, dtype, tm, tn, tk, variant)                        \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                     \
    return band::launch<Op::op, DType::dtype, tm, tn, Variant::variant>(p, plan, args, stream); \
  }
