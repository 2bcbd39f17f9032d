// How warps give a stage of shared memory back to the copy engine.
//
// An arrival at a barrier does not wait for loads that are under way: these may stand behind stores to global memory
// while the arrival passes them, and the copy engine then writes over what they have yet to read. Seen with column.cuh
// on an H200: a few lanes' last columns of a row, in one call of three. So an arrival needs values that come of the
// stage's loads.
#pragma once

#include "ptx.cuh"

namespace conv2d_ext {

// A warp arrives once `word`, which comes of all that its lanes have loaded, is there: blockIdx.z is 0 in every launch,
// which the compiler does not know.
__device__ inline void give_back(uint32_t bar, uint32_t word) {
  bar += word & blockIdx.z;
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(bar);
}
__device__ inline void give_back(uint64_t* bar, uint32_t word) { give_back(ptx::shared_address(bar), word); }

}  // namespace conv2d_ext
