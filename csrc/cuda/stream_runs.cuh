// Depthwise 3x3 with stride 1 over NCHW, 16-bit types, whose rows are no whole words. A plane is one run of memory: a
// thread has a word of it, eight outputs that may be of two rows, and asks for the words of each row of inputs that
// hold what they meet. Where these begin in the words is the same everywhere but for the row, so that a shift by a
// constant of the launch puts them in place. Products with padded columns are left out one by one, those with padded
// rows meet zeros; words that reach beyond the plane are loaded by element. dgrad is fprop with the filter turned.
#pragma once

#include "../core/runs.h"
#include "depthwise.cuh"
#include "depthwise_walk.cuh"

namespace conv2d_ext::stream {

using depthwise::Divisor;

struct RunsParams {
  void const* in;
  void const* w;
  void const* bias;
  void* out;
  int64_t w_k, w_r, w_s, bias_stride;
  int C, W, plane;  // plane: elements
  // The rows above and below: words from an output's own to the first that is needed, and the first element in it.
  int apart[2], begin[2];
  Divisor by_width;
};

// Eight elements from `first` of a plane on; zeros outside of it.
template <class T>
__device__ inline uint4 word_of_plane(T const* at, int first, int plane) {
  if (first >= 0 && first + kRunsWord <= plane) return __ldg(reinterpret_cast<uint4 const*>(at));
  uint32_t v[4] = {};
  if (first > -kRunsWord && first < plane)
#pragma unroll
    for (int e = 0; e < kRunsWord; ++e)
      if (unsigned(first + e) < unsigned(plane)) v[e / 2] |= *reinterpret_cast<uint16_t const*>(at + e) << e % 2 * 16;
  return make_uint4(v[0], v[1], v[2], v[3]);
}

// The inputs of eight outputs, ten of each row: of the rows above and below two words, of their own row theirs and the
// elements beside it.
template <class T>
struct RunsWindow {
  uint4 own, words[2][2];
  uint16_t before, behind;

  // at: the outputs' own word, whose first element is the plane's `first`.
  __device__ void load(RunsParams const& p, T const* at, int first) {
    uint4 const* const word = reinterpret_cast<uint4 const*>(at);
    uint16_t const* const element = reinterpret_cast<uint16_t const*>(at);
    if (first + kRunsWord * p.apart[0] >= 0 && first + kRunsWord * (p.apart[1] + 2) <= p.plane) {
      own = __ldg(word), before = __ldg(element - 1), behind = __ldg(element + kRunsWord);
#pragma unroll
      for (int side = 0; side < 2; ++side)
        words[side][0] = __ldg(word + p.apart[side]), words[side][1] = __ldg(word + p.apart[side] + 1);
      return;
    }
    own = word_of_plane(at, first, p.plane);
    before = first > 0 ? element[-1] : 0, behind = first + kRunsWord < p.plane ? element[kRunsWord] : 0;
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      int const apart = (i < 2 ? p.apart[0] : p.apart[1]) + i % 2;
      uint4 const found = word_of_plane(at + apart * kRunsWord, first + apart * kRunsWord, p.plane);
      if (i == 0) words[0][0] = found;
      if (i == 1) words[0][1] = found;
      if (i == 2) words[1][0] = found;
      if (i == 3) words[1][1] = found;
    }
  }
  __device__ void row(RunsParams const& p, int r, float (&x)[kRunsWord + 2]) const {
    uint32_t pairs[5];
    if (r == 1) {
      uint32_t const v[4] = {own.x, own.y, own.z, own.w};
      pairs[0] = __byte_perm(before, v[0], 0x5410), pairs[4] = __byte_perm(v[3], behind, 0x5432);
#pragma unroll
      for (int i = 1; i < 4; ++i) pairs[i] = __byte_perm(v[i - 1], v[i], 0x5432);
    } else {
      uint4 const a = words[r / 2][0], b = words[r / 2][1];
      int const begin = p.begin[r / 2];
      uint32_t v[9] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, 0};
#pragma unroll
      for (int i = 0; i < 7; ++i) v[i] = begin & 4 ? v[i + 2] : v[i];
#pragma unroll
      for (int i = 0; i < 6; ++i) v[i] = begin & 2 ? v[i + 1] : v[i];
#pragma unroll
      for (int i = 0; i < 5; ++i) pairs[i] = __funnelshift_r(v[i], v[i + 1], begin % 2 * 16);
    }
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      Vector<T, 2> const h = *reinterpret_cast<Vector<T, 2> const*>(&pairs[i]);
      x[2 * i] = widen(h.v[0]), x[2 * i + 1] = widen(h.v[1]);
    }
  }
};

// Which of the eight elements from `first` of a plane on is the first of a row; none: another number.
__device__ inline int row_begin(RunsParams const& p, int first) {
  if (first <= 0) return -first;
  int const column = first - int(p.by_width.quotient(first)) * p.W;
  return column == 0 ? 0 : p.W - column;
}

// A thread's words of a plane come to L2 together; then it waits for one after the other.
template <class T>
__device__ inline void bring(T const* at, int first, int plane) {
  int const step = int(blockDim.x) * kRunsWord;
#pragma unroll 1
  for (; first < plane; first += step, at += step)
    if (first >= 0) ptx::prefetch_l2(at);
}

template <class T>
__global__ void __launch_bounds__(kRunsThreads, 2) runs(__grid_constant__ RunsParams const p) {
  int const plane = int(blockIdx.x), c = plane % p.C;
  int64_t const begin = int64_t(plane) * p.plane;
  int const before = int(begin & (kRunsWord - 1));  // elements of the first word that are not the plane's
  T const* at = static_cast<T const*>(p.in) + (begin - before + threadIdx.x * kRunsWord);
  bring(at, int(threadIdx.x) * kRunsWord - before, p.plane);
  float filter[9];
#pragma unroll
  for (int i = 0; i < 9; ++i) filter[i] = widen(static_cast<T const*>(p.w)[c * p.w_k + i / 3 * p.w_r + i % 3 * p.w_s]);
  float const bias = p.bias != nullptr ? widen(static_cast<T const*>(p.bias)[c * p.bias_stride]) : 0.f;
  int const step = int(blockDim.x) * kRunsWord;
  T* to = static_cast<T*>(p.out) + (begin - before + threadIdx.x * kRunsWord);
#pragma unroll 1
  for (int first = int(threadIdx.x) * kRunsWord - before; first < p.plane; first += step, at += step, to += step) {
    RunsWindow<T> window;
    window.load(p, at, first);
    int const begins = row_begin(p, first);
    float x[3][kRunsWord + 2], sum[kRunsWord];
#pragma unroll
    for (int r = 0; r < 3; ++r) window.row(p, r, x[r]);
#pragma unroll
    for (int e = 0; e < kRunsWord; ++e) {
      sum[e] = bias;
      bool const has_left = e != begins, has_right = e + 1 != begins;
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        sum[e] = fmaf(x[r][e + 1], filter[r * 3 + 1], sum[e]);
        if (has_left) sum[e] = fmaf(x[r][e], filter[r * 3], sum[e]);
        if (has_right) sum[e] = fmaf(x[r][e + 2], filter[r * 3 + 2], sum[e]);
      }
    }
    if (first >= 0 && first + kRunsWord <= p.plane) {
      Vector<T, kRunsWord> word;
#pragma unroll
      for (int e = 0; e < kRunsWord; ++e) word.v[e] = narrow<T>(sum[e]);
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<uint4 const*>(&word);
    } else {
#pragma unroll
      for (int e = 0; e < kRunsWord; ++e)
        if (unsigned(first + e) < unsigned(p.plane)) to[e] = narrow<T>(sum[e]);
    }
  }
}

// dgrad with stride 2: a thread has an output gradient and what lies to its right, below and both, and makes of these
// the four results that they meet. A block has some rows of a plane, which it puts together in shared memory as they
// lie, and stores in words.
struct SpreadRunsParams {
  void const* y;
  void const* w;
  void* x;
  int64_t w_k, w_r, w_s;
  int C, H, W, P, Q, rows, chunks;  // rows: of y, of a block
  Divisor by_chunks, by_channels, by_width;
};

template <class T>
__global__ void __launch_bounds__(kRunsThreads) spread_runs(__grid_constant__ SpreadRunsParams const p) {
  extern __shared__ __align__(16) unsigned char shared[];
  T* const outputs = reinterpret_cast<T*>(shared);
  int const plane = int(p.by_chunks.quotient(blockIdx.x)), chunk = int(blockIdx.x) - plane * p.chunks;
  int const c = plane - int(p.by_channels.quotient(plane)) * p.C;
  int const first = chunk * p.rows, rows = min(p.rows, p.P - first);
  float filter[9];
#pragma unroll
  for (int i = 0; i < 9; ++i) filter[i] = widen(static_cast<T const*>(p.w)[c * p.w_k + i / 3 * p.w_r + i % 3 * p.w_s]);
  T const* const y = static_cast<T const*>(p.y) + (int64_t(plane) * p.P + first) * p.Q;
  int64_t const begin = (int64_t(plane) * p.H + 2 * first) * p.W;  // of the results
  int const before = int(begin & (kRunsWord - 1)), height = min(2 * rows, p.H - 2 * first), count = height * p.W;
  for (int i = int(threadIdx.x); i < rows * p.Q; i += int(blockDim.x)) {
    int const row = int(p.by_width.quotient(i)), q = i - row * p.Q;
    bool const right = q + 1 < p.Q, below = first + row + 1 < p.P;
    T const* const at = y + i;
    float const own = widen(__ldg(at)), beside = right ? widen(__ldg(at + 1)) : 0.f;
    float const under = below ? widen(__ldg(at + p.Q)) : 0.f,
                across = right && below ? widen(__ldg(at + p.Q + 1)) : 0.f;
    T* const to = outputs + before + 2 * row * p.W + 2 * q;
    bool const has_right = 2 * q + 1 < p.W;
    to[0] = narrow<T>(own * filter[4]);
    if (has_right) to[1] = narrow<T>(fmaf(beside, filter[3], own * filter[5]));
    if (2 * row + 1 < height) {
      to[p.W] = narrow<T>(fmaf(under, filter[1], own * filter[7]));
      if (has_right)
        to[p.W + 1] =
            narrow<T>(fmaf(across, filter[0], fmaf(under, filter[2], fmaf(beside, filter[6], own * filter[8]))));
    }
  }
  __syncthreads();
  T* const x = static_cast<T*>(p.x) + (begin - before);
  for (int i = int(threadIdx.x) * kRunsWord; i < before + count; i += int(blockDim.x) * kRunsWord)
    if (i >= before && i + kRunsWord <= before + count)
      *reinterpret_cast<uint4*>(x + i) = *reinterpret_cast<uint4 const*>(outputs + i);
    else
      for (int e = max(i, before); e < min(i + kRunsWord, before + count); ++e) x[e] = outputs[e];
}

// ---- host side

template <Op op, class T>
cudaError_t launch_runs(Problem const& problem, RunsTile const& t, Arguments const& args, cudaStream_t stream) {
  static_assert(op != Op::wgrad);
  RunsParams p{};
  p.in = args.a, p.w = args.b, p.bias = args.bias, p.bias_stride = args.bias_stride, p.out = args.out;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  if (op == Op::dgrad) {
    p.w = static_cast<T const*>(args.b) + 2 * (p.w_r + p.w_s);
    p.w_r = -p.w_r, p.w_s = -p.w_s;
  }
  p.C = int(problem.C), p.W = int(problem.W), p.plane = int(problem.H * problem.W);
  p.by_width = Divisor(uint32_t(p.W));
  for (int side = 0; side < 2; ++side) {
    int const begin = (side == 0 ? -p.W : p.W) - 1;  // of a word's inputs, in elements
    p.begin[side] = begin & (kRunsWord - 1), p.apart[side] = (begin - p.begin[side]) / kRunsWord;
  }
  runs<T><<<unsigned(problem.N * problem.C), unsigned(t.threads), 0, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_spread_runs(Problem const& problem, SpreadRuns const& t, Arguments const& args,
                               cudaStream_t stream) {
  SpreadRunsParams p{};
  p.y = args.a, p.w = args.b, p.x = args.out;
  p.w_k = problem.w.n, p.w_r = problem.w.h, p.w_s = problem.w.w;
  p.C = int(problem.C), p.H = int(problem.H), p.W = int(problem.W), p.P = int(problem.P()), p.Q = int(problem.Q());
  p.rows = t.rows, p.chunks = int(t.chunks);
  p.by_chunks = Divisor(uint32_t(p.chunks)), p.by_channels = Divisor(uint32_t(p.C));
  p.by_width = Divisor(uint32_t(p.Q));
  spread_runs<T><<<unsigned(problem.N * problem.C * t.chunks), unsigned(t.threads), t.shared_bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::stream
