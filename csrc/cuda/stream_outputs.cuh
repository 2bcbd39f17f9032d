// Outputs of 16 bits whose rows begin anywhere. Stores that begin off their own size would be single elements, and each
// of them another write of L2's sectors: lanes shift their outputs by what the row begins off, with their neighbours'
// beside them, and store whole words. All lanes of a warp store at a time.
#pragma once

#include "stream_walk.cuh"

namespace conv2d_ext::stream {

// Of a lane's `count` neighbouring outputs of a row, where the row begins s of them before a word of as many: bit s:
// the word that begins with output s, and ends in the next lane, is the lane's to store; bits 4 + 4 s and on: outputs
// that are in no such word.
template <int count>
struct Shifted {
  uint32_t bits = 0;

  // x: the first output's column; `row` is the same for outputs of the same row alone.
  __device__ Shifted(bool exists, int row, int x, int W) {
    constexpr uint32_t all = 0xffffffff;
    auto inside = [&](int i) { return exists && unsigned(x + i) < unsigned(W); };
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) own |= uint32_t(inside(i)) << i;
    int const lane = int(threadIdx.x) % 32, number = exists ? row : -1;
    int const next_row = __shfl_down_sync(all, number, 1), next_x = __shfl_down_sync(all, x, 1);
    uint32_t const next = __shfl_down_sync(all, own, 1);
    uint32_t const both = own | (lane < 31 && next_row == number && next_x == x + count ? next << count : 0);
    uint32_t whole = 0;
#pragma unroll
    for (int s = 0; s < count; ++s) whole |= uint32_t((both >> s & ((1u << count) - 1)) == (1u << count) - 1) << s;
    // Of the lane before; its words from 1 on, if any, end in this lane.
    uint32_t before = __shfl_up_sync(all, whole, 1);
    if (lane == 0) before = 0;
    bits = whole;
#pragma unroll
    for (int s = 0; s < count; ++s)
#pragma unroll
      for (int i = 0; i < count; ++i)
        bits |= uint32_t((own >> i & 1) != 0 && ((i >= s ? whole : before) >> s & 1) == 0) << (4 + 4 * s + i);
  }
  __device__ bool word(int s) const { return bits >> s & 1; }
  __device__ uint32_t singles(int s) const { return bits >> (4 + 4 * s) & 15; }
};

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
