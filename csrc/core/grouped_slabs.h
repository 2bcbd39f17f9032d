// grouped_slabs.cuh: fprop and dgrad of stride 1 of 3x3 groups of 16 or 32 channels in channels_last, 16-bit types and
// TF32, results of up to 16 columns.
#pragma once

#include <cstdint>

#include "row.h"

namespace conv2d_ext {

constexpr int kSlabLine = 128;                       // bytes of a pixel's channels, those of a block
constexpr int kSlabThreads = 128, kSlabBlocks = 3;   // of a block; of an SM
constexpr int kSlabSlots = 8, kSlabColumns = 16;     // stages at most; columns of results of a product
constexpr int64_t kSlabTables = 16 * 8 + 16 + 1024;  // bytes: barriers, zeros, and what the alignment may take

constexpr bool is_slabs(Row const& row) {
  return row.family == Family::grouped && row.variant == Variant::nhwc && row.op != Op::wgrad && row.tile_m == 64;
}

// A block walks down one item after the other, an image of up to 16 columns of results or two of up to 8. Stages are
// some rows of an item.
struct Slabs {
  int64_t slabs = 0, splits = 0, images = 0, items = 0;  // splits: blocks of a slab; images: of an item
  int64_t rows = 0, columns = 0, stages = 0, slots = 0;  // of a stage; of an item; of a ring
  int64_t stage_bytes = 0, shared = 0;
  double ns = 0;
};

constexpr Slabs grouped_slabs(Op op, Problem const& p, Device const& d) {
  Slabs t;
  bool const backward = op == Op::dgrad;
  int64_t const channels = p.C_per_group(), size = size_of(p.dtype);
  if (op == Op::wgrad || p.dtype == DType::f64 || (p.dtype == DType::f32 && !p.allow_tf32)) return t;
  if (p.groups == 1 || p.N == 0 || p.P() < 1 || p.Q() < 1) return t;
  if ((channels != 16 && channels != 32) || p.K_per_group() != channels || p.R != 3 || p.S != 3) return t;
  if (p.dilation_h != 1 || p.dilation_w != 1 || p.stride_h != 1 || p.stride_w != 1) return t;
  if (p.pad_top > 2 || p.pad_bottom > 2 || p.pad_left > 2 || p.pad_right > 2) return t;
  constexpr int64_t most = int64_t(1) << 24;
  if (p.N >= most || p.groups >= most || p.H > 256 || p.W > 256 || p.H < 1 || p.W < 1) return t;
  int const v = int(16 / size);
  if (!channel_vectors(p.x, p.x_align, channels, v, p.dtype) || !map_supports(p.x, p.N, p.H, p.W, p.dtype)) return t;
  if (!channel_vectors(p.y, p.y_align, channels, v, p.dtype) || !map_supports(p.y, p.N, p.P(), p.Q(), p.dtype))
    return t;
  int64_t const in_h = backward ? p.P() : p.H, in_w = backward ? p.Q() : p.W, out_h = backward ? p.H : p.P(),
                out_w = backward ? p.W : p.Q();
  if (out_w > kSlabColumns) return t;
  t.images = out_w <= kSlabColumns / 2 ? 2 : 1, t.items = ceil_div(p.N, t.images), t.columns = in_w;
  // Some 16 KiB, as even as can be.
  int64_t const row_bytes = t.images * t.columns * kSlabLine, needed = out_h + 2;
  t.stages = ceil_div(needed, max64(1, 16384 / row_bytes)), t.rows = ceil_div(needed, t.stages);
  t.stages = ceil_div(needed, t.rows), t.stage_bytes = ceil_div(t.rows * row_bytes, 1024) * 1024;
  t.slabs = ceil_div(p.C * size, kSlabLine);
  int64_t const of_slab = max64(1, kSlabBlocks * d.sm_count / t.slabs);
  t.splits = ceil_div(t.items, ceil_div(t.items, of_slab));
  int64_t const each = ceil_div(t.items, t.splits), all = each * t.stages;
  t.slots = min64(min64(kSlabSlots, all), ((228 / kSlabBlocks - 1) * 1024 - kSlabTables) / t.stage_bytes);
  if (t.slots < min64(all, 3)) return {};
  t.shared = t.slots * t.stage_bytes + kSlabTables;
  // As measured (2026-11-29; in every launch 11-30): a row's products, of a block's warps that share a quarter of an SM
  // or one after the other.
  double const products = double(9 * channels * size / 32) * (size == 2 ? 2 : 1);
  double const blocks = double(ceil_div(t.slabs * t.splits, d.sm_count)), alone = 210 + products * 5,
               together = blocks * (products * 9 + 8);
  double const multiply = double(each * needed) * (alone > together ? alone : together) / 1.755;
  double const bytes = double(size) * double(p.N) * double(p.C) * double(in_h * in_w + out_h * out_w) / 3.1;
  double const always = size == 4 ? (channels == 32 ? 8500 : 6500) : t.images == 2 ? 8000 : 9000;
  t.ns = always + overlapped(multiply, bytes / 1000);
  return t;
}

}  // namespace conv2d_ext
