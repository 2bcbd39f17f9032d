// What a row of the table is, and what every family's supports and estimate are made of.
#pragma once

#include <cstdint>

#include "problem.h"

namespace conv2d_ext {

enum class Family : uint8_t {
  tma,
  tma_strict,
  igemm,
  simt,
  depthwise,
  grouped,
  band,
  column,
  strip,
  stream,
  stem,
  pixels,
  toeplitz
};
enum class Variant : uint8_t {
  nhwc,
  any,
  nchw,
  nchw_s2,
  nhwc_s2,
  im2col,
  halo,
  pointwise,
  narrow,
  phases,
  raw,
  raw_halo,
  lines,
  lean
};

struct Row {
  Family family;
  Op op;
  DType dtype;
  int tile_m, tile_n, tile_k;
  Variant variant;
  char const* name;
};

// What the planner knows of a GPU.
struct Device {
  int sm_count = 132;
  int compute_capability = 90;  // 10 * major + minor
  friend constexpr bool operator==(Device const&, Device const&) = default;
};
inline constexpr Device h200_sxm{132, 90};

struct Plan {
  int kernel = -1;  // row of the table
  int split_k = 1;  // parts of the reduction, summed in order by a second pass
  int64_t workspace_bytes = 0;
};

// Partial sums never take more than this.
inline constexpr int64_t kMaxWorkspaceBytes = int64_t(64) << 20;

// A row's estimated time and the split of the reduction that it was estimated with.
struct Estimate {
  double ns = 0;
  int split_k = 1;
};

// Can a group's channels be read and written as vectors of v elements?
constexpr bool channel_vectors(Strides const& s, int align, int64_t channels, int v, DType t) {
  return s.c == 1 && channels % v == 0 && s.n % v == 0 && s.h % v == 0 && s.w % v == 0 && align >= v * size_of(t);
}

// Sizes and strides that a tensor map can hold; a dimension of size one has stride 0 in a Problem.
constexpr bool map_supports(Strides const& s, int64_t n, int64_t h, int64_t w, DType t) {
  constexpr int64_t most = int64_t(1) << 31;
  auto stride = [t](int64_t size, int64_t v) { return size == 1 || (v > 0 && v * size_of(t) < int64_t(1) << 40); };
  return n < most && h < most && w < most && stride(n, s.n) && stride(h, s.h) && stride(w, s.w);
}

constexpr bool is_nhwc(Variant v) { return v == Variant::nhwc || v == Variant::nhwc_s2; }

// Two kinds of work that hide each other in part.
constexpr double overlapped(double a, double b) { return a > b ? a + b / 2 : b + a / 2; }

}  // namespace conv2d_ext
