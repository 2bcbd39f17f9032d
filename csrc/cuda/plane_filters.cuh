// What grouped_planes.cuh and grouped_turned.cuh have in common: filters in the order of a tile's steps, and the place
// of each tap in a tile's lines.
#pragma once

#include "../core/planes.h"
#include "launch.h"
#include "ptx.cuh"
#include "types.cuh"

namespace conv2d_ext::planes {

__device__ inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

struct Prepare {
  void const* from;
  void* to;
  int64_t group, out, in, h, w;  // elements from one to the next
  int in_per_group, out_per_group, tiles_m, chunks, taps;
  int64_t vectors;
  unsigned char r[kPlaneTaps], s[kPlaneTaps];
};

// Filters in the order of the steps: [group][64 filters][128 bytes of channels][tap], swizzled, floats rounded to TF32;
// zeros where there are none.
template <class T>
__global__ void __launch_bounds__(256) prepare_kernel(__grid_constant__ Prepare const q) {
  ptx::griddepcontrol_launch_dependents();
  constexpr int of_slot = 16 / int(sizeof(T));
  int64_t const i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= q.vectors) return;
  int const tap = int(i % q.taps);
  int64_t const rest = i / q.taps;
  int const slot = int(rest % 8), chunk = int(rest / 8 % q.chunks), row = int(rest / 8 / q.chunks % 64);
  int64_t const tile = rest / 8 / q.chunks / 64, group = tile / q.tiles_m;
  int const out = int(tile % q.tiles_m) * 64 + row, in = (chunk * 8 + slot) * of_slot;
  T const* const from =
      static_cast<T const*>(q.from) + group * q.group + out * q.out + in * q.in + q.r[tap] * q.h + q.s[tap] * q.w;
  Vector<T, of_slot> v;
#pragma unroll
  for (int e = 0; e < of_slot; ++e) {
    v.v[e] = out < q.out_per_group && in + e < q.in_per_group ? from[e * q.in] : narrow<T>(0.f);
    if constexpr (sizeof(T) == 4) v.v[e] = __uint_as_float(ptx::cvt_rn_tf32(v.v[e]));
  }
  int64_t const step = (tile * q.chunks + chunk) * q.taps + tap;
  *reinterpret_cast<uint4*>(static_cast<char*>(q.to) + step * kPlaneStep + row * 128 + (slot ^ row % 8) * 16) =
      *reinterpret_cast<uint4 const*>(&v);
}

// Writes p's taps (how many, of which phase, their distances in lines) by the tile's lines, and launches what puts the
// filters into the workspace. Before it p has tiles_m, chunks and out_per_group.
template <Op op, class T, class Params, class Tile>
cudaError_t prepare(Params& p, Problem const& problem, GroupedAxis const& h, GroupedAxis const& w, Tile const& t,
                    Arguments const& args, cudaStream_t stream) {
  constexpr bool backward = op == Op::dgrad;
  Prepare q{};
  Strides const& f = problem.w;
  q.from = args.b, q.to = args.workspace;
  q.group = problem.K_per_group() * f.n, q.out = backward ? f.c : f.n, q.in = backward ? f.n : f.c, q.h = f.h,
  q.w = f.w;
  q.in_per_group = int(backward ? problem.K_per_group() : problem.C_per_group());
  q.out_per_group = p.out_per_group, q.tiles_m = p.tiles_m * int(t.members()), q.chunks = p.chunks;
  for (int phase_h = 0, phase = 0; phase_h < h.phases; ++phase_h)
    for (int phase_w = 0; phase_w < w.phases; ++phase_w) {
      for (int r = 0; r < problem.R; ++r)
        for (int s = 0; s < problem.S; ++s) {
          int64_t at_h = backward ? phase_h + problem.pad_top - r * problem.dilation_h : r * problem.dilation_h;
          int64_t at_w = backward ? phase_w + problem.pad_left - s * problem.dilation_w : s * problem.dilation_w;
          if (backward) {
            if (at_h % problem.stride_h != 0 || at_w % problem.stride_w != 0) continue;
            at_h = at_h / problem.stride_h - h.low, at_w = at_w / problem.stride_w - w.low;
          }
          int64_t const plane = at_h % h.step * t.planes_w + at_w % w.step;
          p.offset[p.taps] = short(t.plane_begin(plane) + at_h / h.step * t.pitch + at_w / w.step);
          q.r[p.taps] = uint8_t(r), q.s[p.taps] = uint8_t(s), ++p.taps;
        }
      p.phase_tap[++phase] = p.taps;
    }
  q.taps = p.taps;
  q.vectors = problem.groups * q.tiles_m * p.chunks * p.taps * 64 * 8;
  if (q.vectors > 0) prepare_kernel<T><<<unsigned(ceil_div(q.vectors, 256)), 256, 0, stream>>>(q);
  return cudaGetLastError();
}

}  // namespace conv2d_ext::planes
