// Outputs of 16 bits whose rows begin anywhere, as shifted.cuh stores them.
#pragma once

#include "shifted.cuh"
#include "stream_walk.cuh"

namespace conv2d_ext::stream {

// Four neighbouring columns of a unit, as SpreadOutputs.
template <class T>
struct ShiftedSpreadOutputs {
  char* to;  // in row 0
  Shifted<4> shifted;

  __device__ ShiftedSpreadOutputs(Params const& p, Walk const& at, int unit, int t)
      : ShiftedSpreadOutputs(p, at, Unit(p, unit), t) {}
  __device__ ShiftedSpreadOutputs(Params const& p, Walk const& at, Unit const& u, int t)
      : shifted(u.exists && at.n0 + u.image < p.N, u.image, at.q0 * 2 + u.place * 16 + 4 * t, p.out_W) {
    int const x = at.q0 * 2 + u.place * 16 + 4 * t;
    to = reinterpret_cast<char*>(static_cast<T*>(p.out) + (at.n0 + u.image) * p.out_n + at.c * p.out_c + x);
  }
  __device__ void store(int64_t offset, Vector<T, 4> const& v) const {
    uint2 const own = reinterpret_cast<uint2 const&>(v);
    uint32_t const next0 = __shfl_down_sync(0xffffffffu, own.x, 1), next1 = __shfl_down_sync(0xffffffffu, own.y, 1);
    T* const at = reinterpret_cast<T*>(to + offset);
    int const s = int((8 - reinterpret_cast<uint64_t>(at) % 8) / 2 % 4), bits = s % 2 * 16;
    uint32_t const a = s < 2 ? own.x : own.y, b = s < 2 ? own.y : next0, c = s < 2 ? next0 : next1;
    if (shifted.word(s))
      *reinterpret_cast<uint2*>(at + s) = make_uint2(__funnelshift_r(a, b, bits), __funnelshift_r(b, c, bits));
    uint32_t const singles = shifted.singles(s);
    if (singles == 0) return;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (singles >> i & 1) at[i] = v.v[i];
  }
};

}  // namespace conv2d_ext::stream
