// grouped_images_wgrad.cuh: wgrad of 3x3 groups of 16 channels over small images, channels_last, 16-bit types.
#pragma once

#include <cstdint>

#include "row.h"

namespace conv2d_ext {

constexpr int64_t kImageSlab = 32;                       // channels of a block: a line of 64 bytes
constexpr int kImageSumWarps = 8;                        // of a block
constexpr int kImageSumSlots = 8;                        // stages at most
constexpr int64_t kImageSumTables = 16 * 8 + 16 + 1024;  // bytes: barriers, zeros, and what the alignment may take
constexpr int64_t kImageCluster = 8;                     // blocks that add up their sums

constexpr bool is_image_sums(Row const& row) {
  return row.family == Family::grouped && row.variant == Variant::nhwc && row.op == Op::wgrad;
}

// What a block holds: a ring of stages, an image of up to 16 columns of results each, or two of up to 8.
struct ImageSums {
  int64_t slabs = 0, splits = 0, images = 0, stages = 0, slots = 0;  // blocks of a slab; of a stage; of all; of a ring
  int64_t columns = 0, plane_bytes = 0;                              // of x: with a stride, even or odd columns
  int64_t x_bytes = 0, y_bytes = 0, ring_bytes = 0, shared = 0;      // of a stage
  int64_t row_parts = 0;                                             // of a stage's products, for shares of a block
  double ns = 0;
};

constexpr ImageSums image_sums(Op op, Problem const& p, Device const& d) {
  ImageSums t;
  int64_t const channels = p.C_per_group();
  if (op != Op::wgrad || size_of(p.dtype) != 2 || p.groups == 1 || p.N == 0 || p.P() < 1 || p.Q() < 1) return t;
  if (channels != 16 || p.K_per_group() != channels || p.R != 3 || p.S != 3) return t;
  if (p.dilation_h != 1 || p.dilation_w != 1 || p.stride_h != p.stride_w || p.stride_h > 2) return t;
  constexpr int64_t most = int64_t(1) << 24;
  if (p.N >= most || p.groups >= most || p.Q() > 16 || p.P() > 64 || p.H > 64 || p.W > 64) return t;
  if (!channel_vectors(p.x, p.x_align, channels, 8, p.dtype) || !map_supports(p.x, p.N, p.H, p.W, p.dtype)) return t;
  if (!channel_vectors(p.y, p.y_align, channels, 8, p.dtype) || !map_supports(p.y, p.N, p.P(), p.Q(), p.dtype))
    return t;
  t.images = p.Q() <= 8 ? 2 : 1, t.stages = ceil_div(p.N, t.images);
  constexpr int64_t line = kImageSlab * 2, shares = kImageSumWarps / 2;
  t.columns = ceil_div(p.W, p.stride_w), t.plane_bytes = ceil_div(t.images * p.H * t.columns * line, 1024) * 1024;
  t.x_bytes = p.stride_w * t.plane_bytes, t.y_bytes = ceil_div(t.images * p.P() * p.Q() * line, 1024) * 1024;
  t.slabs = ceil_div(p.C, kImageSlab), t.splits = kImageCluster;
  // As measured: clusters of 5 to 7 blocks are slower; up to 200 blocks, two of the larger stages each.
  while (t.splits > 1 && (t.slabs * t.splits > 200 || t.stages < t.splits * (t.images == 1 ? 2 : 1))) t.splits /= 2;
  int64_t const stage = t.x_bytes + t.y_bytes, of_block = ceil_div(t.stages, t.splits);
  t.row_parts = max64(1, min64(shares / of_block, p.P() / 2));
  constexpr int64_t sums = kImageSumWarps * 9 * 1024;             // they take the ring's place in the end
  for (int blocks = 2; blocks >= 1 && t.shared == 0; --blocks) {  // of an SM
    int64_t const room = (228 / blocks - 1) * 1024 - kImageSumTables;
    t.slots = min64(min64(kImageSumSlots, of_block), room / stage), t.ring_bytes = max64(t.slots * stage, sums);
    if (t.slots >= min64(of_block, 2 * blocks) && t.ring_bytes <= room) t.shared = t.ring_bytes + kImageSumTables;
  }
  if (t.shared == 0) return {};
  // As measured (2026-11-29): a block's products or all bytes.
  double const rows = t.row_parts > 1 ? double(ceil_div(p.P(), t.row_parts) + 1) : double(p.P());
  double const multiply = double(of_block) * rows * 18 * 5.5;
  double const bytes = double(p.N) * double(p.C) * double(p.H * p.W + p.P() * p.Q()) * 2;
  t.ns = (t.splits > 1 ? 10000 : 8800) + (multiply > bytes / 1700 ? multiply : bytes / 1700);
  return t;
}

}  // namespace conv2d_ext
