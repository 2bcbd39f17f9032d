// What pixels_runs.cuh and pixels_turns.cuh are told of a problem.
#pragma once

#include "../core/pixels_runs.h"
#include "tma.cuh"

namespace conv2d_ext::pixel_runs {

// Of tiles of tile_m rows, whose results are stored in boxes of 16 rows by out_run pixels. lines: channels a step that
// are copied. end: the map of an image's last run of pixels, where it is no whole one. out_end: of a tile's last run of
// so many pixels.
template <Op op, DType dtype, class Params>
cudaError_t set_params(Params& p, PixelRuns const& t, Problem const& problem, Arguments const& args, int tile_m,
                       int out_run, int lines = 64, CUtensorMap* end = nullptr, int last = 0,
                       CUtensorMap* in_last = nullptr, CUtensorMap* out_last = nullptr) {
  using tma::Divisor, tma::Tensor4, tma::encode_tiled;
  constexpr bool forward = op == Op::fprop;
  int64_t const pixels = problem.H * problem.W, C = problem.C_per_group(), K = problem.K_per_group();
  auto planes = [&](Strides const& s, int64_t channels) {
    return Tensor4{nullptr, dtype, {pixels, channels, problem.N, problem.groups}, {1, s.c, s.n, channels * s.c}};
  };
  Tensor4 const x = planes(problem.x, C), y = planes(problem.y, K);
  Tensor4 const w{args.b, dtype, {C, K, problem.groups, 1}, {1, problem.w.n, K * problem.w.n, 0}};
  Tensor4 in = forward ? x : y, out = forward ? y : x;
  in.address = args.a, out.address = args.out;
  p.M = int32_t(forward ? K : C), p.images = int32_t(problem.N);
  p.steps = int32_t(ceil_div(forward ? C : K, 64));
  p.tiles_m = Divisor(t.tiles_m), p.per_image = Divisor(t.per_image);
  p.bias = args.bias, p.bias_stride = args.bias_stride;
  if (auto const error = encode_tiled(p.a, w, 64, forward ? tile_m : lines, 1, 1)) return error;
  if (auto const error = encode_tiled(p.b, in, 64, lines, 1, 1)) return error;
  if (end != nullptr && pixels % 64 != 0)
    if (auto const error = encode_tiled(*end, in, int(pixels % 64), lines, 1, 1)) return error;
  if (last != 0) {
    if (auto const error = encode_tiled(*in_last, in, last, lines, 1, 1)) return error;
    if (auto const error = encode_tiled(*out_last, out, last, 16, 1, 1)) return error;
  }
  return encode_tiled(p.out, out, out_run, 16, 1, 1, 1, 1,
                      out_run == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
}

}  // namespace conv2d_ext::pixel_runs
