// stem*.cuh, as measured: what their blocks take with the tiles that stem_tile(), stem_narrow(), stem_sums() and their
// like chose. Apart from what kernels include, so that a new constant compiles none.
#pragma once

#include "stem_halo.h"

namespace conv2d_ext {

// fprop and dgrad. A block gathers its filters, then in each round of tiles copies inputs; a warp's steps and stores
// wait in turn, and those of all share the SM. Fitted to 2,144 times of random layers.
constexpr Estimate stem_tile_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  struct Times {
    double step, step_waits;
  };
  bool const nhwc = is_nhwc(row.variant), half = size_of(p.dtype) == 2, wide = row.tile_n == 64;
  Times const of = half           ? (wide ? Times{4.1, 314} : Times{15.6, 272})
                   : p.allow_tf32 ? (wide ? Times{0, 382} : Times{15.1, 300})
                                  : (wide ? Times{28.5, 523} : Times{54.9, 165});
  StemTile const t = stem_tile(row, op, p, d);
  StemView const v = stem_view(op, p);
  int const align = op == Op::dgrad ? p.x_align : p.y_align;
  bool const vectors = half ? stem_has_vectors(nhwc, v, align, 8, 2) : nhwc ? v.K % 2 == 0 : v.Q % 8 == 0;
  double const store = vectors ? (half ? 47 : 72)
                       : nhwc  ? (half ? 166 : 132)
                               : 103,
               store_waits = vectors ? 403
                             : nhwc  ? 1960
                                     : 873;
  int64_t const tiles = p.N * t.tiles_h * t.tiles_w, items = ceil_div(t.rows * t.groups, row.tile_m / 8);
  double const of_sm = double(max64(1, min64(t.blocks_of_sm, ceil_div(tiles * t.slabs, d.sm_count))));
  double const turns = double(ceil_div(items, kStemThreads / 32)), steps = double(t.steps);
  double const round = 1140 + stem_copied(v, t.in_rows, t.in_columns) * double(t.copies) * 0.36 +
                       turns * (steps * of.step_waits + store_waits) +
                       of_sm * double(items) * (steps * of.step + store);
  double const rounds = double(ceil_div(tiles, max64(1, t.blocks_of_sm * d.sm_count / t.slabs)));
  double const bytes = double(p.N) * size_of(p.dtype) *
                       (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  return {6970 + steps * double(min64(v.K, row.tile_n)) * 6.05 + rounds * round + bytes * 0.198 / 1000, 1};
}

// wgrad. A round of tiles: steps and copies of all blocks share the SM; inputs that are no whole vectors are waited
// for. Then the blocks' sums are written and added. Fitted to 893 times of random layers (6 to 7 % rms).
constexpr Estimate stem_sums_estimate(Row const& row, Problem const& p, Device const& d) {
  struct Times {
    double block, step, channels, vector, behind, input, single, copied, waits;  // channels: of a step of 64
  };
  bool const nhwc = is_nhwc(row.variant), half = size_of(p.dtype) == 2;
  Times const of = half           ? Times{634, 5.8, 23, 0.36, 0.6, 0.035, 0.21, 1.33, 158}
                   : p.allow_tf32 ? Times{531, 11, 16.8, 0.38, 0.45, 0.073, 0.15, 2, 27}
                                  : Times{386, 27.9, 0, 0.38, 0.48, 0.064, 0.2, 0, 234};
  StemSums const t = stem_sums(row, p, d);
  StemView const v = stem_view(stem_wgrad_view(p), p);
  int64_t const size = size_of(p.dtype), each = t.channel_slabs * t.slabs, tiles = p.N * t.tiles_h * t.tiles_w;
  int const align = stem_wgrad_view(p) == Op::dgrad ? p.x_align : p.y_align;
  bool const vectors = stem_has_vectors(nhwc, v, align, 16 / size, size);
  int64_t const line = (nhwc ? t.channels : t.groups * 8) * size / 16 + (vectors ? 0 : 1);
  double const copies = double((nhwc ? t.slots * 8 : t.rows * t.channels) * line);
  double const warps = double(t.chunks * t.splits), steps = double(ceil_div(t.slots, t.splits * (half ? 2 : 1)));
  double const of_sm = double(max64(1, min64(t.blocks_of_sm, ceil_div(tiles * each, d.sm_count))));
  double const of_block = of.block + steps * warps * (of.step + of.channels * double(t.channels) / 64) +
                          copies * (vectors ? of.vector : of.behind) +
                          double(t.in_rows * t.in_columns * v.C) * (t.whole ? of.input : of.single);
  double const waits = steps * of.waits + (t.whole ? 0 : stem_copied(v, t.in_rows, t.in_columns) * of.copied / warps);
  double const rounds = double(ceil_div(tiles, max64(1, t.blocks_of_sm * d.sm_count / each)));
  return {10450 + rounds * (of_sm * of_block + waits) + double(stem_sums_bytes(t)) * 0.0002 +
              double(v.K * t.slabs * t.chunks) * 1.3,
          1};
}

// Few results. A block gathers its filters; in each round of tiles it goes through chunks of channels, whose copies and
// products share the SM, and waits for each. Fitted to 1,837 times of random layers; 1.05: rows beside it are estimated
// above their times.
constexpr Estimate stem_narrow_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  bool const half = size_of(p.dtype) == 2, backward = op == Op::dgrad;
  int64_t const size = size_of(p.dtype);
  bool const vectors = backward ? channel_vectors(p.y, p.y_align, p.K, 16 / size, p.dtype)
                                : channel_vectors(p.x, p.x_align, p.C, 16 / size, p.dtype);
  auto by_columns = [&](double of_8, double of_16, double of_48) {
    return row.tile_n == 8 ? of_8 : row.tile_n == 16 ? of_16 : of_48;
  };
  StemNarrow const t = stem_narrow(row, op, p, d);
  int64_t const tiles = p.N * t.tiles_h * t.tiles_w, sets = max64(1, d.sm_count * t.blocks_of_sm / t.slabs);
  double const of_sm = double(min64(t.blocks_of_sm, ceil_div(min64(tiles, sets) * t.slabs, d.sm_count)));
  // Cycles of all warps: wavefronts of shared memory, or products.
  double const loads = double(row.tile_m) / 16 * 4 + 2 * double(row.tile_n),
               products = double(row.tile_m) / 16 * double(row.tile_n) / 8 * 1.7 * double(size) / 2;
  double const work = double(t.h.span * t.w.span) * 2 * (loads > products ? loads : products) / 1.7 *
                      (half                ? 0.836
                       : stem_is_strict(p) ? 1.682
                                           : 0.708);
  double const copied = double(t.in_rows * t.in_columns) * 64 * (vectors ? 0.012 : half ? 0.057 : 0.042);
  double const round =
      double(t.chunks) * ((copied + work) * of_sm + (t.stages > 1 ? 929 : 1308)) + by_columns(1522, 2793, 3902);
  double const bytes = double(p.N) * double(size) *
                       (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  double const ns = by_columns(7173, 9962, 12182) + double(t.weight_bytes) * (backward ? 0.276 : 0.452) +
                    double(ceil_div(tiles, sets)) * round + bytes * 0.111 / 1000;
  bool const alone = !backward && t.blocks_of_sm == 1 && !stem_is_strict(p);  // on its SM: nothing hides its waits
  return {1.05 * ns * (alone ? 1.18 : 1), 1};
}

// stem_lean.cuh. The filters, then rounds of tiles: products and stores, or bytes. Fitted to 173 layers in
// channels_last and 16 bits (5.3 % rms), what stores take otherwise to 90 others.
constexpr Estimate stem_lean_estimate(Op op, Problem const& p, Device const& d) {
  StemLean const t = stem_lean(op, p);
  StemView const v = stem_view(op, p);
  double const steps = double(t.steps), blocks = double(t.blocks);
  bool const half = size_of(p.dtype) == 2, strict = stem_is_strict(p);
  double const store = t.vector == 4   ? (t.nhwc ? 0.0
                                          : half ? 3.0
                                                 : 1.0)
                       : strict        ? (t.nhwc ? 22.0 : 12.0)
                       : t.vector == 2 ? (half ? 8.0 : 20.0)
                       : t.nhwc        ? 29.0
                                       : 20.0;
  double const product = !strict ? 0.95 : t.nhwc ? 3.0 : 2 + 0.3 * blocks;
  double const tile_ns = 17.5 + steps * (t.pairs ? 6.5 : 10.9) + product * blocks * steps + store * blocks;
  double const work = double(t.tiles * t.slabs) / d.sm_count * tile_ns;
  double const bytes = double(p.N) * size_of(p.dtype) *
                       (double(v.C) * double(v.H) * double(v.W) + double(v.K) * double(v.P) * double(v.Q));
  int64_t const of_sm = kStemLeanWarps * stem_lean_blocks(t.blocks, t.steps, t.pairs, t.nhwc, strict);
  double const rounds = double(ceil_div(t.tiles * t.slabs, int64_t(d.sm_count) * of_sm));
  return {6160 + 76 * steps * blocks + 87 * rounds + overlapped(work, bytes / 5170), 1};
}

// stem_halo.cuh. The filters, then tiles, or bytes; NCHW in 16 bits takes longer, and rows that take no vectors. As 76
// layers were measured, long sums of NCHW in 16 bits as seven others (of short ones it would be too low by up to half).
constexpr Estimate stem_halo_estimate(Op op, Problem const& p, Device const& d) {
  StemHalo const t = stem_halo(op, p, d);
  bool const half = size_of(p.dtype) == 2, fast = !half && t.nhwc;
  if (half && !t.nhwc) {  // fitted to 72 times: products, inputs and stores follow each other
    double const tiles = double(p.N * t.tiles_h * t.tiles_w) / d.sm_count;
    double const stores = (t.vector == 8 ? 918 : t.vector == 2 ? 2100 : 3070) * double(p.K) / 64;
    double const pixels = double(ceil_div(t.rows * t.pitch, 128));
    double const inputs = 1.38 * double(t.slabs * t.in_rows * t.positions);
    return {6000 + 300 * double(t.chunks) + tiles * (pixels * (9 * double(t.chunks * t.slabs) + stores) + inputs), 1};
  }
  double const bytes = double(p.N) * size_of(p.dtype) *
                       (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  double const stores = t.nhwc ? (half ? 1 : 0.94) : t.vector == 1 ? 1.5 : 1;
  double const filters = (half ? 11000 : fast ? 6000 : 9000) + (fast ? 50 : 60) * double(t.chunks);
  return {filters + overlapped(0.8 * stores * t.ns, bytes / 3500), 1};
}

}  // namespace conv2d_ext
