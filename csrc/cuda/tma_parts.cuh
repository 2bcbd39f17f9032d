// The second pass of wgrad by parts: sums of four floats, `items` of a part, of which `slices` warps have every
// slices'th part of 32.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace conv2d_ext::tma {

constexpr int kPartsWarps = 16, kPartsTogether = 8;

struct PartsLaunch {
  int slices = 1, threads, shared_bytes;
  dim3 grid;
  PartsLaunch(int64_t items, int64_t parts) {
    while (slices < kPartsWarps && slices * kPartsTogether < parts) slices *= 2;
    threads = 32 * (slices > 4 ? slices : 4);
    shared_bytes =
        slices > 1 ? threads * int(sizeof(float4)) : 0;  // little, so that blocks fit beside the first pass's
    grid = dim3(unsigned((items * slices + threads - 1) / threads));
  }
};

__device__ inline int parts_slice(int slices) { return int(threadIdx.x) / 32 % slices; }

// This thread's.
__device__ inline int parts_item(int slices) {
  int const warps = int(blockDim.x) / 32 / slices;
  return (int(blockIdx.x) * warps + int(threadIdx.x) / 32 / slices) * 32 + int(threadIdx.x) % 32;
}

// The sum of all parts, in one order, in the threads of the first slice. All threads of the block have to call it.
__device__ inline float4 parts_sum(float4 const* from, int items, int parts, int slices) {
  extern __shared__ float4 parts_shared[];
  int const slice = parts_slice(slices);
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  float4 sum = {};
#pragma unroll 1
  for (int i = slice; i < parts; i += slices * kPartsTogether) {  // all loads under way
    float4 v[kPartsTogether];
#pragma unroll
    for (int u = 0; u < kPartsTogether; ++u)
      v[u] = i + u * slices < parts ? from[int64_t(i + u * slices) * items] : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int u = 0; u < kPartsTogether; ++u) sum.x += v[u].x, sum.y += v[u].y, sum.z += v[u].z, sum.w += v[u].w;
  }
  if (slices == 1) return sum;
  parts_shared[threadIdx.x] = sum;
  __syncthreads();
  if (slice > 0) return sum;
  for (int i = 1; i < slices; ++i) {
    float4 const v = parts_shared[threadIdx.x + i * 32];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  return sum;
}

}  // namespace conv2d_ext::tma
