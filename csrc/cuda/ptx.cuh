// One function for each PTX instruction that the kernels use, named after it. Inline assembly lives here alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace conv2d_ext::ptx {

__device__ inline uint32_t shared_address(void const* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline float ld_shared_f32(uint32_t shared) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(shared) : "memory");
  return v;
}

// Four 8 x 8 matrices of 16-bit elements as mma lays them out; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void stmatrix_x4(uint32_t shared, uint32_t const (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

// The same of the transposed matrices: column i of matrix j goes to the address of lane 8 j + i.
__device__ inline void stmatrix_x4_trans(uint32_t shared, uint32_t const (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

__device__ inline uint4 ld_shared_v4(uint32_t shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared)
               : "memory");
  return v;
}

__device__ inline uint2 ld_shared_v2(uint32_t shared) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(shared) : "memory");
  return v;
}

__device__ inline void st_shared_f32(uint32_t shared, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared), "f"(v) : "memory");
}

__device__ inline void st_shared_f32x2(uint32_t shared, float low, float high) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared), "f"(low), "f"(high) : "memory");
}

// ---- lanes

// True in one lane of a converged warp. ptxas knows that, and what such a branch is given stays in uniform registers;
// in a branch on the lane's number every copy begins with loops that move them there.
__device__ inline bool elect() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, one;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// ---- barriers

__device__ inline void mbarrier_init(uint64_t* bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}

// `bar`: a barrier's address in shared memory.
__device__ inline void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ inline void mbarrier_arrive(uint64_t* bar) { mbarrier_arrive(shared_address(bar)); }

// Waits until the barrier's phase of this parity has completed.
__device__ inline void mbarrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra retry;\n"
      "}\n" ::"r"(bar),
      "r"(parity)
      : "memory");
}
__device__ inline void mbarrier_wait(uint64_t* bar, uint32_t parity) { mbarrier_wait(shared_address(bar), parity); }

// Arrives, and has the phase wait for so many bytes of the copy engine.
__device__ inline void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ inline void mbarrier_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
  mbarrier_arrive_expect_tx(shared_address(bar), bytes);
}

// A barrier of `threads` threads of the block; id 0 is __syncthreads.
__device__ inline void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same; whether it is true in any of the threads.
template <int id>
__device__ inline bool bar_red_or(int threads, bool value) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred in, out;\n"
      "setp.ne.u32 in, %3, 0;\n"
      "barrier.red.or.pred out, %1, %2, in;\n"
      "selp.s32 %0, 1, 0, out;\n"
      "}\n"
      : "=r"(any)
      : "n"(id), "r"(threads), "r"(unsigned(value))
      : "memory");
  return any != 0;
}

// Arrives at such a barrier and does not wait.
__device__ inline void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Makes this thread's writes to shared memory visible to the tensor cores and the copy engine.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline uint32_t ld_shared(uint32_t shared) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared));
  return v;
}

// Where `on` is false, v stays what it was.
__device__ inline void ld_shared_if(bool on, uint32_t shared, uint32_t& v) {
  asm volatile("{\n.reg .pred on;\nsetp.ne.u32 on, %2, 0;\n@on ld.shared.u32 %0, [%1];\n}"
               : "+r"(v)
               : "r"(shared), "r"(uint32_t(on)));
}

__device__ inline void st_shared(uint32_t shared, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(v) : "memory");
}

// 16 bytes to shared memory.
__device__ inline void st_shared_v4(uint32_t shared, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// ---- cp.async

// 16 bytes to shared memory, past L1; zeros if not `valid`, and then nothing is read and `global` may be any address.
__device__ inline void cp_async_16(uint32_t shared, void const* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// 16 bytes to shared memory, of which `bytes` are read and the rest are zeros; if 0, `global` may be any address.
__device__ inline void cp_async_first(uint32_t shared, void const* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// 4, 8 or 16 bytes by way of L1, and the 256 around them to L2; the same where they are not `valid`.
template <int bytes>
__device__ inline void cp_async_ca(uint32_t shared, void const* global, bool valid) {
  asm volatile("cp.async.ca.shared.global.L2::256B [%0], [%1], %2, %3;" ::"r"(shared), "l"(global), "n"(bytes),
               "r"(valid ? bytes : 0)
               : "memory");
}

// The same under a policy of L2.
template <int bytes>
__device__ inline void cp_async_ca(uint32_t shared, void const* global, bool valid, uint64_t policy) {
  asm volatile("cp.async.ca.shared.global.L2::cache_hint.L2::256B [%0], [%1], %2, %3, %4;" ::"r"(shared), "l"(global),
               "n"(bytes), "r"(valid ? bytes : 0), "l"(policy)
               : "memory");
}

// What no kernel writes meanwhile, under a policy of L2.
__device__ inline float4 ld_global_nc(float4 const* global, uint64_t policy) {
  float4 v;
  asm volatile("ld.global.nc.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(global), "l"(policy));
  return v;
}

__device__ inline uint16_t ld_shared_u16(uint32_t shared) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(shared) : "memory");
  return v;
}

__device__ inline void st_shared_u16(uint32_t shared, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(shared), "h"(v) : "memory");
}

__device__ inline void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's groups have not landed.
template <int pending>
__device__ inline void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ inline void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Arrives at the barrier once all of this thread's cp.async so far have landed.
__device__ inline void cp_async_mbarrier_arrive_noinc(uint64_t* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
}

// The line of an address is brought to L2.
__device__ inline void prefetch_l2(void const* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// ---- dependent launches

// Lets the next kernel of the stream begin, if it was launched so.
__device__ inline void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits until the kernel before this one has ended and its writes are visible.
__device__ inline void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- clusters

// The address, in the cluster's window, of what block `rank` has at this address of its own.
__device__ inline uint32_t mapa(uint32_t shared, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(shared), "r"(rank));
  return mapped;
}

// All threads of a cluster's blocks arrive, and wait.
__device__ inline void barrier_cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
// Only barriers that fence_mbarrier_init has made known are seen by who waits.
__device__ inline void barrier_cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void barrier_cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// Writes to a block of the cluster; its barrier counts the bytes.
__device__ inline void st_async_v4(uint32_t mapped, float const* v, uint32_t mapped_bar) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(mapped),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(mapped_bar)
      : "memory");
}

// Arrives at a barrier of a block of the cluster, which orders nothing: what the warp has read, it has read.
__device__ inline void mbarrier_arrive_cluster(uint32_t mapped) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
}

// Waits for what blocks of the cluster write.
__device__ inline void mbarrier_wait_cluster(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra retry;\n"
      "}\n" ::"r"(bar),
      "r"(parity)
      : "memory");
}

// ---- the copy engine (TMA). `map` is a CUtensorMap in parameter space; `bar` counts the bytes that land.

// `bytes` of memory as they lie; addresses and bytes are multiples of 16.
__device__ inline void cp_async_bulk(uint32_t shared, void const* global, uint32_t bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}

// The same under a policy of L2.
__device__ inline void cp_async_bulk(uint32_t shared, void const* global, uint32_t bytes, uint64_t* bar,
                                     uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(shared_address(bar)), "l"(policy)
      : "memory");
}

// The other way.
__device__ inline void cp_async_bulk_store(void* global, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes)
               : "memory");
}

// A box of a 4-D tensor.
__device__ inline void cp_async_bulk_tensor_4d(uint32_t shared, void const* map, uint64_t* bar, int c0, int c1, int c2,
                                               int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared),
      "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// The same under a policy of L2.
__device__ inline void cp_async_bulk_tensor_4d(uint32_t shared, void const* map, uint64_t* bar, int c0, int c1, int c2,
                                               int c3, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared),
      "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
      : "memory");
}

// A box of a 4-D tensor to each block of the cluster that is in `blocks`, at the same place, where the same barrier
// counts.
__device__ inline void cp_async_bulk_tensor_4d_multicast(uint32_t shared, void const* map, uint64_t* bar, int c0,
                                                         int c1, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %5}], [%2], %6;" ::"r"(shared),
      "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(0), "h"(blocks)
      : "memory");
}

__device__ inline void cp_async_bulk_tensor_5d(uint32_t shared, void const* map, uint32_t bar, int c0, int c1, int c2,
                                               int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared),
      "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
__device__ inline void cp_async_bulk_tensor_5d(uint32_t shared, void const* map, uint64_t* bar, int c0, int c1, int c2,
                                               int c3, int c4) {
  cp_async_bulk_tensor_5d(shared, map, shared_address(bar), c0, c1, c2, c3, c4);
}

// The other way; what lies outside of the tensor is not written.
__device__ inline void cp_async_bulk_tensor_4d_store(void const* map, uint32_t shared, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// The same under a policy of L2.
__device__ inline void cp_async_bulk_tensor_4d_store(void const* map, uint32_t shared, int c0, int c1, int c2, int c3,
                                                     uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5}], [%1], %6;" ::"l"(
          map),
      "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
      : "memory");
}

// A policy of L2 whose lines are given up first.
__device__ inline uint64_t createpolicy_evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// A policy of L2 that leaves the order in which lines are given up as it is.
__device__ inline uint64_t createpolicy_evict_unchanged() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_unchanged.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but `pending` of this thread's groups of stores are in global memory.
template <int pending>
__device__ inline void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

// Waits until at most `pending` of this thread's groups of stores have shared memory left to read.
template <int pending>
__device__ inline void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Waits until all of this thread's groups of stores have been written.
__device__ inline void cp_async_bulk_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Pixels of an NHWC tensor from (c, w, h, n) on, in the order of the map's bounding box, all moved by the offsets.
__device__ inline void cp_async_bulk_tensor_im2col(uint32_t shared, void const* map, uint32_t bar, int c, int w, int h,
                                                   int n, int offset_w, int offset_h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared),
      "l"(map), "r"(bar), "r"(c), "r"(w), "r"(h), "r"(n), "h"(uint16_t(offset_w)), "h"(uint16_t(offset_h))
      : "memory");
}
__device__ inline void cp_async_bulk_tensor_im2col(uint32_t shared, void const* map, uint64_t* bar, int c, int w, int h,
                                                   int n, int offset_w, int offset_h) {
  cp_async_bulk_tensor_im2col(shared, map, shared_address(bar), c, w, h, n, offset_w, offset_h);
}

// The same under a policy of L2.
__device__ inline void cp_async_bulk_tensor_im2col(uint32_t shared, void const* map, uint32_t bar, int c, int w, int h,
                                                   int n, int offset_w, int offset_h, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8}, %9;" ::"r"(shared),
      "l"(map), "r"(bar), "r"(c), "r"(w), "r"(h), "r"(n), "h"(uint16_t(offset_w)), "h"(uint16_t(offset_h)), "l"(policy)
      : "memory");
}

// The same where the tensor has a fifth dimension, which nothing moves along.
__device__ inline void cp_async_bulk_tensor_im2col_5d(uint32_t shared, void const* map, uint32_t bar, int c, int w,
                                                      int h, int n, int g, int offset_w, int offset_h) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], {%8, %9, %10};" ::"r"(shared),
      "l"(map), "r"(bar), "r"(c), "r"(w), "r"(h), "r"(n), "r"(g), "h"(uint16_t(offset_w)), "h"(uint16_t(offset_h)),
      "h"(uint16_t(0))
      : "memory");
}
__device__ inline void cp_async_bulk_tensor_im2col_5d(uint32_t shared, void const* map, uint64_t* bar, int c, int w,
                                                      int h, int n, int g, int offset_w, int offset_h) {
  cp_async_bulk_tensor_im2col_5d(shared, map, shared_address(bar), c, w, h, n, g, offset_w, offset_h);
}

// From shared memory to a box of a 5-D tensor; what lies outside of the tensor is not written.
__device__ inline void cp_async_bulk_tensor_store_5d(void const* map, uint32_t shared, int c0, int c1, int c2, int c3,
                                                     int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
               "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}

// ---- mma.sync

// Four 8 x 8 matrices of 16-bit elements; lane i's address is of row i % 8 of matrix i / 8, 16 bytes. A lane gets
// elements 2 (lane % 4) and the next of row lane / 4 of each.
__device__ inline void ldmatrix_x4(uint32_t (&d)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared));
}

// Two; lanes 0 to 15 give the addresses.
__device__ inline void ldmatrix_x2(uint32_t (&d)[2], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(shared));
}

// The same of the transposed matrices: a lane gets elements lane / 4 of rows 2 (lane % 4) and the next.
__device__ inline void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared));
}

__device__ inline void ldmatrix_x2_trans(uint32_t (&d)[2], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(shared));
}

// The transposed matrix, in the layout of ldmatrix on both sides.
__device__ inline uint32_t movmatrix_trans(uint32_t v) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
  return d;
}

// d[16, 8] += a[16, 16] * b[16, 8]. a: rows 0-7 and 8-15 of k 0-7, then of k 8-15; b: k 0-7, then k 8-15.
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d[16, 8] += a[16, 8] * b[8, 8].
template <class T>
__device__ inline void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
  else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
}

// d[16, 8] += a[16, 8] * b[8, 8] in TF32. a: rows 0-7 and 8-15 of k 0-3, then of k 4-7; b: k 0-3, then k 4-7.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d[16, 8] += a[16, 4] * b[4, 8] in TF32.
__device__ inline void mma_m16n8k4_tf32(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

// Has a tensor map of the kernel's parameters fetched before it is needed.
__device__ inline void prefetch_tensormap(void const* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- registers

template <int count>
__device__ inline void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ inline void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// ---- wgmma

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int pending>
__device__ inline void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving accumulators across the point where wgmma works on them behind its back.
template <int count>
__device__ inline void wgmma_fence_operand(float (&d)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The same for an operand in registers: they are not used for anything else before this point.
template <int n>
__device__ inline void wgmma_fence_operand(uint32_t (&v)[n][4]) {
#pragma unroll
  for (int i = 0; i < n * 4; ++i) asm volatile("" : "+r"(v[i / 4][i % 4])::"memory");
}

// The same value, of which the compiler knows nothing: what is made of it is worked out where it is needed, not ahead
// and kept in registers, and sums with it are not simplified.
__device__ inline int unknown(int v) {
  asm volatile("" : "+r"(v));
  return v;
}
__device__ inline float unknown(float v) {
  asm volatile("" : "+f"(v));
  return v;
}
__device__ inline double unknown(double v) {
  asm volatile("" : "+d"(v));
  return v;
}

// Keeps the compiler from moving memory accesses across this point, which can take more registers than there are.
__device__ inline void compiler_fence() { asm volatile("" ::: "memory"); }

// The shared-memory operand of wgmma, swizzled by 128 bytes (mode 1) or 64 (mode 2): bits 0-13 address, 16-29 leading,
// 32-45 stride byte offset (all / 16), 62-63 mode.
template <int swizzle = 128>
__device__ inline uint64_t wgmma_descriptor(uint32_t shared, uint32_t leading, uint32_t stride) {
  static_assert(swizzle == 128 || swizzle == 64);
  return uint64_t((shared & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t(128 / swizzle) << 62;
}

// The accumulators of n = 8, 32, 64, 128, 144, 160, 192, 216 and 256, as the first operands.
#define CONV2D_EXT_REGS_8 "%0, %1, %2, %3"
#define CONV2D_EXT_REGS_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CONV2D_EXT_REGS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define CONV2D_EXT_REGS_64                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CONV2D_EXT_REGS_128                                                          \
  CONV2D_EXT_REGS_64                                                                 \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CONV2D_EXT_REGS_144 \
  CONV2D_EXT_REGS_128       \
  ", "                      \
  "%64, %65, %66, %67, %68, %69, %70, %71"
#define CONV2D_EXT_REGS_160 \
  CONV2D_EXT_REGS_128       \
  ", "                      \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define CONV2D_EXT_REGS_192 \
  CONV2D_EXT_REGS_160       \
  ", "                      \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define CONV2D_EXT_REGS_256                                                                      \
  CONV2D_EXT_REGS_128                                                                            \
  ", "                                                                                           \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define CONV2D_EXT_ACC_8(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define CONV2D_EXT_ACC_16(d) CONV2D_EXT_ACC_8(d), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define CONV2D_EXT_ACC_32(d)                                                                                  \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define CONV2D_EXT_ACC_64(d)                                                                                  \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define CONV2D_EXT_ACC_128(d)                                                                                      \
  CONV2D_EXT_ACC_64(d), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), \
      "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]),      \
      "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]),      \
      "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),      \
      "+f"(d[63])
#define CONV2D_EXT_ACC_144(d)                                                                                       \
  CONV2D_EXT_ACC_128(d), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), \
      "+f"(d[71])
#define CONV2D_EXT_ACC_160(d)                                                                                       \
  CONV2D_EXT_ACC_128(d), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), \
      "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]),       \
      "+f"(d[79])
#define CONV2D_EXT_ACC_192(d)                                                                                       \
  CONV2D_EXT_ACC_160(d), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), \
      "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]),       \
      "+f"(d[95])
#define CONV2D_EXT_ACC_256(d)                                                                                         \
  CONV2D_EXT_ACC_128(d), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]),   \
      "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]),         \
      "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]),         \
      "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]),         \
      "+f"(d[95]), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]),      \
      "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), \
      "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), \
      "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), \
      "+f"(d[127])
#define CONV2D_EXT_REGS_216 \
  CONV2D_EXT_REGS_192       \
  ", "                      \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107"
#define CONV2D_EXT_ACC_216(d)                                                                                          \
  CONV2D_EXT_ACC_192(d), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), \
      "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])

#define CONV2D_EXT_REGS_232 \
  CONV2D_EXT_REGS_216       \
  ", "                      \
  "%108, %109, %110, %111, %112, %113, %114, %115"
#define CONV2D_EXT_ACC_232(d)                                                                                \
  CONV2D_EXT_ACC_216(d), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), \
      "+f"(d[114]), "+f"(d[115])
#define CONV2D_EXT_REGS_248 \
  CONV2D_EXT_REGS_232       \
  ", "                      \
  "%116, %117, %118, %119, %120, %121, %122, %123"
#define CONV2D_EXT_ACC_248(d)                                                                                \
  CONV2D_EXT_ACC_232(d), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), \
      "+f"(d[122]), "+f"(d[123])
#define CONV2D_EXT_REGS_80 \
  CONV2D_EXT_REGS_64       \
  ", "                     \
  "%32, %33, %34, %35, %36, %37, %38, %39"
#define CONV2D_EXT_REGS_96 \
  CONV2D_EXT_REGS_80       \
  ", "                     \
  "%40, %41, %42, %43, %44, %45, %46, %47"
#define CONV2D_EXT_REGS_112 \
  CONV2D_EXT_REGS_96        \
  ", "                      \
  "%48, %49, %50, %51, %52, %53, %54, %55"
#define CONV2D_EXT_ACC_80(d)                                                                                       \
  CONV2D_EXT_ACC_64(d), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), \
      "+f"(d[39])
#define CONV2D_EXT_ACC_96(d)                                                                                       \
  CONV2D_EXT_ACC_80(d), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), \
      "+f"(d[47])
#define CONV2D_EXT_ACC_112(d)                                                                                      \
  CONV2D_EXT_ACC_96(d), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), \
      "+f"(d[55])

// TF32, both operands in shared memory; i and j number them after the accumulators.
#define CONV2D_EXT_WGMMA_TF32_SHARED(n, d, a, b, i, j)                                                            \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k8.f32.tf32.tf32 {" CONV2D_EXT_REGS_##n "}, %" #i ", %" #j \
                                                                                               ", 1, 1, 1;"       \
               : CONV2D_EXT_ACC_##n(d)                                                                            \
               : "l"(a), "l"(b))

// Both operands in shared memory; i to l number the four operands after the accumulators.
#define CONV2D_EXT_WGMMA(n, type, d, a, b, ta, tb, i, j, k, l)                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" CONV2D_EXT_REGS_##n \
               "}, %" #i ", %" #j ", 1, 1, 1, %" #k ", %" #l ";"                                        \
               : CONV2D_EXT_ACC_##n(d)                                                                  \
               : "l"(a), "l"(b), "n"(ta), "n"(tb))

// TF32, a in registers: four a thread; i to m number the five operands after the accumulators. adds: 1, or 0 to begin
// a sum.
#define CONV2D_EXT_WGMMA_TF32_SCALED(adds, n, d, a, b, i, j, k, l, m)                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k8.f32.tf32.tf32 {" CONV2D_EXT_REGS_##n \
               "}, {%" #i ", %" #j ", %" #k ", %" #l "}, %" #m ", " #adds ", 1, 1;"            \
               : CONV2D_EXT_ACC_##n(d)                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define CONV2D_EXT_WGMMA_TF32(n, d, a, b, i, j, k, l, m) CONV2D_EXT_WGMMA_TF32_SCALED(1, n, d, a, b, i, j, k, l, m)

// d[64, n] += a[64, 16] * b[16, n]; an operand is K-major, or transposed: M- or N-major. Floats, in TF32: a[64, 8] and
// b[8, n], K-major. Float accumulators as wgmma.mma_async lays them out: n/2 of them a thread.
template <class T, bool transpose_a, bool transpose_b, int count>
__device__ inline void wgmma_mma_async(float (&d)[count], uint64_t a, uint64_t b) {
  constexpr int ta = transpose_a, tb = transpose_b;
  static_assert(count == 4 || count == 8 || count == 16 || count == 32 || count == 40 || count == 48 || count == 56 ||
                count == 64 || count == 72 || count == 80 || count == 96 || count == 108 || count == 116 ||
                count == 124 || count == 128);
  if constexpr (std::is_same_v<T, float>) {
    static_assert(!transpose_a && !transpose_b && count != 4 && count != 40 && count != 48 && count != 56 &&
                  count != 72);
    if constexpr (count == 8) CONV2D_EXT_WGMMA_TF32_SHARED(16, d, a, b, 8, 9);
    if constexpr (count == 16) CONV2D_EXT_WGMMA_TF32_SHARED(32, d, a, b, 16, 17);
    if constexpr (count == 32) CONV2D_EXT_WGMMA_TF32_SHARED(64, d, a, b, 32, 33);
    if constexpr (count == 64) CONV2D_EXT_WGMMA_TF32_SHARED(128, d, a, b, 64, 65);
    if constexpr (count == 80) CONV2D_EXT_WGMMA_TF32_SHARED(160, d, a, b, 80, 81);
    if constexpr (count == 96) CONV2D_EXT_WGMMA_TF32_SHARED(192, d, a, b, 96, 97);
    if constexpr (count == 116) CONV2D_EXT_WGMMA_TF32_SHARED(232, d, a, b, 116, 117);
    if constexpr (count == 124) CONV2D_EXT_WGMMA_TF32_SHARED(248, d, a, b, 124, 125);
    if constexpr (count == 128) CONV2D_EXT_WGMMA_TF32_SHARED(256, d, a, b, 128, 129);
  } else if constexpr (std::is_same_v<T, __half>) {
    if constexpr (count == 4) CONV2D_EXT_WGMMA(8, "f16", d, a, b, ta, tb, 4, 5, 6, 7);
    if constexpr (count == 16) CONV2D_EXT_WGMMA(32, "f16", d, a, b, ta, tb, 16, 17, 18, 19);
    if constexpr (count == 32) CONV2D_EXT_WGMMA(64, "f16", d, a, b, ta, tb, 32, 33, 34, 35);
    if constexpr (count == 40) CONV2D_EXT_WGMMA(80, "f16", d, a, b, ta, tb, 40, 41, 42, 43);
    if constexpr (count == 48) CONV2D_EXT_WGMMA(96, "f16", d, a, b, ta, tb, 48, 49, 50, 51);
    if constexpr (count == 56) CONV2D_EXT_WGMMA(112, "f16", d, a, b, ta, tb, 56, 57, 58, 59);
    if constexpr (count == 64) CONV2D_EXT_WGMMA(128, "f16", d, a, b, ta, tb, 64, 65, 66, 67);
    if constexpr (count == 72) CONV2D_EXT_WGMMA(144, "f16", d, a, b, ta, tb, 72, 73, 74, 75);
    if constexpr (count == 80) CONV2D_EXT_WGMMA(160, "f16", d, a, b, ta, tb, 80, 81, 82, 83);
    if constexpr (count == 96) CONV2D_EXT_WGMMA(192, "f16", d, a, b, ta, tb, 96, 97, 98, 99);
    if constexpr (count == 108) CONV2D_EXT_WGMMA(216, "f16", d, a, b, ta, tb, 108, 109, 110, 111);
    if constexpr (count == 116) CONV2D_EXT_WGMMA(232, "f16", d, a, b, ta, tb, 116, 117, 118, 119);
    if constexpr (count == 124) CONV2D_EXT_WGMMA(248, "f16", d, a, b, ta, tb, 124, 125, 126, 127);
    if constexpr (count == 128) CONV2D_EXT_WGMMA(256, "f16", d, a, b, ta, tb, 128, 129, 130, 131);
  } else {
    if constexpr (count == 4) CONV2D_EXT_WGMMA(8, "bf16", d, a, b, ta, tb, 4, 5, 6, 7);
    if constexpr (count == 16) CONV2D_EXT_WGMMA(32, "bf16", d, a, b, ta, tb, 16, 17, 18, 19);
    if constexpr (count == 32) CONV2D_EXT_WGMMA(64, "bf16", d, a, b, ta, tb, 32, 33, 34, 35);
    if constexpr (count == 40) CONV2D_EXT_WGMMA(80, "bf16", d, a, b, ta, tb, 40, 41, 42, 43);
    if constexpr (count == 48) CONV2D_EXT_WGMMA(96, "bf16", d, a, b, ta, tb, 48, 49, 50, 51);
    if constexpr (count == 56) CONV2D_EXT_WGMMA(112, "bf16", d, a, b, ta, tb, 56, 57, 58, 59);
    if constexpr (count == 64) CONV2D_EXT_WGMMA(128, "bf16", d, a, b, ta, tb, 64, 65, 66, 67);
    if constexpr (count == 72) CONV2D_EXT_WGMMA(144, "bf16", d, a, b, ta, tb, 72, 73, 74, 75);
    if constexpr (count == 80) CONV2D_EXT_WGMMA(160, "bf16", d, a, b, ta, tb, 80, 81, 82, 83);
    if constexpr (count == 96) CONV2D_EXT_WGMMA(192, "bf16", d, a, b, ta, tb, 96, 97, 98, 99);
    if constexpr (count == 108) CONV2D_EXT_WGMMA(216, "bf16", d, a, b, ta, tb, 108, 109, 110, 111);
    if constexpr (count == 116) CONV2D_EXT_WGMMA(232, "bf16", d, a, b, ta, tb, 116, 117, 118, 119);
    if constexpr (count == 124) CONV2D_EXT_WGMMA(248, "bf16", d, a, b, ta, tb, 124, 125, 126, 127);
    if constexpr (count == 128) CONV2D_EXT_WGMMA(256, "bf16", d, a, b, ta, tb, 128, 129, 130, 131);
  }
}

// 16 bits, a in registers; i to o number the operands after the accumulators.
#define CONV2D_EXT_WGMMA_REGISTERS(n, type, d, a, b, tb, i, j, k, l, m, o)                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" CONV2D_EXT_REGS_##n \
               "}, {%" #i ", %" #j ", %" #k ", %" #l "}, %" #m ", 1, 1, 1, %" #o ";"                    \
               : CONV2D_EXT_ACC_##n(d)                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(tb))
#define CONV2D_EXT_WGMMA_REGISTERS_COLUMNS(type, d, a, b, tb)                                            \
  if constexpr (count == 32) CONV2D_EXT_WGMMA_REGISTERS(64, type, d, a, b, tb, 32, 33, 34, 35, 36, 37);  \
  if constexpr (count == 48) CONV2D_EXT_WGMMA_REGISTERS(96, type, d, a, b, tb, 48, 49, 50, 51, 52, 53);  \
  if constexpr (count == 56) CONV2D_EXT_WGMMA_REGISTERS(112, type, d, a, b, tb, 56, 57, 58, 59, 60, 61); \
  if constexpr (count == 64) CONV2D_EXT_WGMMA_REGISTERS(128, type, d, a, b, tb, 64, 65, 66, 67, 68, 69); \
  if constexpr (count == 80) CONV2D_EXT_WGMMA_REGISTERS(160, type, d, a, b, tb, 80, 81, 82, 83, 84, 85); \
  if constexpr (count == 96) CONV2D_EXT_WGMMA_REGISTERS(192, type, d, a, b, tb, 96, 97, 98, 99, 100, 101)

// d[64, n] += a[64, 16] * b[16, n]: a as wgmma.mma_async lays it out, b K-major, or transposed: N-major.
template <class T, bool transpose_b = false, int count>
__device__ inline void wgmma_mma_async(float (&d)[count], uint32_t const (&a)[4], uint64_t b) {
  constexpr int tb = transpose_b;
  static_assert(count == 32 || count == 48 || count == 56 || count == 64 || count == 80 || count == 96);
  if constexpr (std::is_same_v<T, __half>) {
    CONV2D_EXT_WGMMA_REGISTERS_COLUMNS("f16", d, a, b, tb);
  } else {
    CONV2D_EXT_WGMMA_REGISTERS_COLUMNS("bf16", d, a, b, tb);
  }
}

// d[64, n] += a[64, 8] * b[8, n] in TF32: a in registers, as wgmma.mma_async lays it out; b K-major.
template <int count>
__device__ inline void wgmma_mma_async_tf32(float (&d)[count], uint32_t const (&a)[4], uint64_t b) {
  static_assert(count == 16 || count == 32 || count == 48 || count == 56 || count == 64 || count == 80 || count == 96 ||
                count == 128);
  if constexpr (count == 48) CONV2D_EXT_WGMMA_TF32(96, d, a, b, 48, 49, 50, 51, 52);
  if constexpr (count == 56) CONV2D_EXT_WGMMA_TF32(112, d, a, b, 56, 57, 58, 59, 60);
  if constexpr (count == 16) CONV2D_EXT_WGMMA_TF32(32, d, a, b, 16, 17, 18, 19, 20);
  if constexpr (count == 32) CONV2D_EXT_WGMMA_TF32(64, d, a, b, 32, 33, 34, 35, 36);
  if constexpr (count == 64) CONV2D_EXT_WGMMA_TF32(128, d, a, b, 64, 65, 66, 67, 68);
  if constexpr (count == 80) CONV2D_EXT_WGMMA_TF32(160, d, a, b, 80, 81, 82, 83, 84);
  if constexpr (count == 96) CONV2D_EXT_WGMMA_TF32(192, d, a, b, 96, 97, 98, 99, 100);
  if constexpr (count == 128) CONV2D_EXT_WGMMA_TF32(256, d, a, b, 128, 129, 130, 131, 132);
}

// The same without what d was.
template <int count>
__device__ inline void wgmma_mma_async_tf32_first(float (&d)[count], uint32_t const (&a)[4], uint64_t b) {
  static_assert(count == 16 || count == 32 || count == 64);
  if constexpr (count == 16) CONV2D_EXT_WGMMA_TF32_SCALED(0, 32, d, a, b, 16, 17, 18, 19, 20);
  if constexpr (count == 32) CONV2D_EXT_WGMMA_TF32_SCALED(0, 64, d, a, b, 32, 33, 34, 35, 36);
  if constexpr (count == 64) CONV2D_EXT_WGMMA_TF32_SCALED(0, 128, d, a, b, 64, 65, 66, 67, 68);
}

// To TF32, to nearest and ties to even: a float whose low 13 bits are zero. One instruction on Hopper, where cvt.rna
// takes three.
__device__ inline uint32_t cvt_rn_tf32(float v) {
  uint32_t rounded;
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(v));
  return rounded;
}

}  // namespace conv2d_ext::ptx
