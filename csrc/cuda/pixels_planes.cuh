// What pixels_gather.cuh and pixels_windows.cuh are told of a problem, and where its tiles are.
#pragma once

#include "dependent.cuh"
#include "tma.cuh"

namespace conv2d_ext::pixels_gather {

using tma::Divisor;

// A tensor whose planes are gathered, in bytes. blockIdx.y: the group.
struct Source {
  char const* at;
  char const* end;      // behind its last element
  int64_t n, k, group;  // strides

  __device__ char const* first() const { return at + blockIdx.y * group; }
};

struct Planes {
  Source in, filters;
  Divisor tiles_m, parts;  // parts: tiles of an image
  int32_t together;        // images of a tile
  int32_t tiles, steps, depth, M, pixels, images, C, K;
  void* out;
  int64_t out_n, out_m;
  void const* bias;
  int64_t bias_stride;

  // Of a row of results among those of all groups.
  __device__ int64_t row_of_all(int m) const { return int64_t(blockIdx.y) * M + m; }
};

// cut: PixelsGather or PixelsWindows.
template <Op op, DType dtype, class Cut>
void set_planes(Planes& p, Cut const& cut, Problem const& problem, Arguments const& args) {
  constexpr bool forward = op == Op::fprop;
  constexpr int size = size_of(dtype);
  Strides const &in = forward ? problem.x : problem.y, &out = forward ? problem.y : problem.x;
  Problem const g = group_of(problem);
  int64_t const plane = problem.H * problem.W, depth = forward ? g.C : g.K, groups = problem.groups;
  auto source = [&](void const* at, int64_t n, int64_t k, int64_t images, int64_t depth, int64_t columns) {
    char const* const first = static_cast<char const*>(at);
    int64_t const elements = (images - 1) * n + (groups * depth - 1) * k + columns;
    return Source{first, first + elements * size, n * size, k * size, depth * k * size};
  };
  p.in = source(args.a, in.n, in.c, problem.N, depth, plane);
  p.filters = source(args.b, 0, problem.w.n, 1, g.K, g.C);
  p.M = int32_t(forward ? g.K : g.C), p.depth = int32_t(depth);
  p.steps = int32_t(ceil_div(depth, kLineBytes / size));
  p.pixels = int32_t(plane), p.images = int32_t(problem.N), p.C = int32_t(g.C), p.K = int32_t(g.K);
  p.together = int32_t(cut.together), p.tiles = int32_t(cut.tiles);
  p.tiles_m = Divisor(cut.tiles_m), p.parts = Divisor(cut.parts);
  p.out = args.out, p.out_n = out.n * size, p.out_m = out.c * size;
  p.bias = args.bias, p.bias_stride = args.bias_stride;
}

}  // namespace conv2d_ext::pixels_gather
