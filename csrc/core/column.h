// The tiles of cuda/column.cuh for a problem: shared by the planner and the launcher.
#pragma once

#include "phases.h"
#include "wide.h"

namespace conv2d_ext {

inline constexpr int kColumnStages = 12;

// A thread has single channels of seven columns: strips an odd number of pixels apart are in different banks.
constexpr bool column_sevens(int R, int stride) { return stride == 1 && (R == 5 || R == 7); }
// A thread's channels, and outputs in a row: its sums and its filter are in registers.
// With m filters a channel, filters: those of one channel of x or of two; stride 1, and wgrad of 7x7: single ones.
constexpr int column_vector(int R, int stride, int m = 1, bool sums = false) {
  return R == 3 ? 4 : stride == 2 && (R == 5 || (m > 1 && !sums)) ? 2 : 1;
}
// Two filters a channel: 16 bits with stride 1 are for tensor cores, larger filters for whoever takes any.
constexpr bool column_takes_pairs(DType dtype, int R, int stride) {
  return stride == 2 || (dtype == DType::f32 && R <= 7);
}
constexpr int column_width(Op op, int R, int stride) {
  if (R == 13) return op == Op::wgrad ? 1 : 2;
  if (R == 9 && op != Op::wgrad) return 7;
  return column_sevens(R, stride) ? 7 : R == 11 && op == Op::wgrad ? 2 : 4;
}
// Those that multiply; one warp more copies.
constexpr int column_threads(int R, int stride) { return column_sevens(R, stride) ? 128 : 224; }
// wgrad of 7x7: a row is unrolled for each of seven rows of y, more code than caches of instructions hold; so one block
// with all of an SM's warps, which are close together.
constexpr int column_sums_threads(int R, int stride) {
  return R == 7 && stride == 1 ? 3 * column_threads(R, stride) : column_threads(R, stride);
}
// 9x9 and more: sums and filter leave registers for one block an SM.
constexpr int column_blocks(int R, int stride, int vector = 1) {
  return column_sevens(R, stride) ? (R == 5 ? 4 : 3) : R > 7 || (R == 7 && vector > 1) ? 1 : 2;
}
constexpr int column_registers(int R, int stride, int vector = 1) {
  return 65536 / column_blocks(R, stride, vector) / (column_threads(R, stride) + 32);
}
// fprop and dgrad: taps are loaded together with what sums begin with. Of larger filters registers are too few.
constexpr bool column_pairs(int R) { return column_vector(R, 1) == 1 && R <= 9; }
// Channels of a slice that a kernel of its own is compiled for: their addresses are no instructions. 0: none.
constexpr int column_channels(Op op, int R, int stride, int size) {
  if (size != 4 || stride != 1 || (R != 5 && R != 7)) return 0;
  return R == 5 && op != Op::wgrad ? 32 : 16;
}

struct ColumnTile {
  int channels = 8, strips = 1, images = 1;  // of a block
  int64_t slices = 1, tiles_w = 1, image_units = 1;
  int64_t units = 1, each = 1, shares = 1;  // rows of outputs of a slice, of a block; blocks of a slice
  bool turns = false;                       // many short shares, one after the other
  int resident = 1, stages = 1;             // blocks of an SM
  int64_t in_bytes = 0, y_bytes = 0, shared_bytes = 0;
  double ns = 0;

  constexpr int64_t warps(int vector) const { return ceil_div(int64_t(channels) / vector * strips * images, 32); }
};

constexpr int64_t to128(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// An SM copies so many bytes a cycle, and issues so many of its four instructions.
inline constexpr double kColumnBytes = 17, kColumnIssue = 3.0;
inline constexpr double kColumnLatency = 6000;  // cycles of a copy on a busy GPU

// float32 with stride 1, as measured: 5x5, 7x7, and wgrad of 3x3, but for rows of 57 to 108 columns.
constexpr bool column_as_measured(Op op, Problem const& p, int R, int stride) {
  int64_t const Q = p.Q();
  return p.dtype == DType::f32 && stride == 1 && (R > 3 || (op == Op::wgrad && (Q <= 56 || (Q > 108 && Q <= 224))));
}

// Their channels, strips (of `all`) and images: slices of a few channels, whole rows of the image, and four warps that
// multiply, seven, or twelve. Not where a block of 3x3 would have few rows.
constexpr bool take_measured(ColumnTile& t, Op op, Problem const& p, int R, int64_t all, Device const& d) {
  bool const sums = op == Op::wgrad, alone = R == 3 && all > 7 && (all <= 14 || p.K == 32);  // a block an SM
  bool const pieces = R == 5 && !sums && all > 4 && p.K > 32 && p.K % 32 == 0;               // of rows of the image
  bool const thirds = alone && all <= 14 && p.K % 72 == 0;                                   // slices of 24 channels
  int const vector = column_vector(R, 1);
  int64_t const wanted = R == 3                                    ? (thirds    ? 24
                                                                      : all > 7 ? 16
                                                                                : 32)
                         : sums && R > 7                           ? 8
                         : R == 5 && !sums && (pieces || all <= 4) ? 32
                                                                   : 16;
  int64_t const lanes = R > 7 || (alone && all > 14) ? 224 : thirds ? 168 : 128;
  int64_t const piece = p.K % 8 == 0 ? 8 : 4;  // whole sectors of L2
  t.channels = int(ceil_div(ceil_div(p.K, piece), ceil_div(p.K, wanted)) * piece);
  int64_t const vectors = t.channels / vector, most = lanes / vectors;
  int64_t const box = (256 - (R - 1)) / column_width(op, R, 1);  // of the copy engine
  int64_t const tiles = ceil_div(all, most < box ? most : box);
  t.strips = int(ceil_div(all, tiles)), t.images = 1;
  while (tiles == 1 && 2 * t.images <= min64(p.N, 8) && 2 * t.images * t.strips * vectors <= lanes) t.images *= 2;
  t.resident = int(min64(65536 / 32 / column_registers(R, 1) / (t.warps(vector) + 1), 16));
  int64_t const H = op == Op::dgrad ? p.H : p.P(), slices = ceil_div(p.K, t.channels);
  if (sums && R == 7 && t.channels == 16) {  // a block an SM, where nearly all SMs and lanes have work
    int64_t const images = 24 / t.strips, blocks = d.sm_count / slices * slices;
    if (20 * blocks >= 19 * d.sm_count && 19 * ceil_div(p.N, images) * images <= 20 * p.N)
      t.images = int(images), t.resident = 1;
  }
  int64_t const rows = tiles * ceil_div(p.N, t.images) * H;
  // Fewer and longer shares, though more blocks would fit.
  int64_t const even = ceil_div(rows, max64(1, t.resident * d.sm_count / slices));
  bool const apart = R == 5 && sums && H >= 28 && 10 * ceil_div(even, H) * H > 11 * even;  // shares would end in images
  if (R == 3 || apart) t.resident = int(min64(t.resident, alone ? 1 : 2));
  if (R == 5) t.resident = int(min64(t.resident, sums || pieces ? 3 : all > 4 ? 2 : H >= 28 ? 4 : 3));
  bool const three = R == 5 ? H >= 28 && all <= 4 : sums && (R == 3 || (R == 7 && all > 4 && t.resident > 1));
  bool const four = pieces || (sums && (R == 7 || (R == 5 && all <= 4)));
  t.stages = thirds ? 3 : alone ? (all > 14 ? kColumnStages : 5) : three ? 3 : four ? 4 : 5;
  // 5x5: many turns of 14 rows, one after the other, are as even as shares and closer together.
  int64_t const turns = tiles * ceil_div(p.N, t.images) * ceil_div(H, 14) * slices;
  if (R == 5 && !sums && H % 14 == 0 && (all <= 2 || pieces) && 2 * turns >= 7 * t.resident * d.sm_count)
    t.each = 14, t.stages = 8;
  if (R > 3) return true;
  return (all <= 7 || all > 14 || thirds || p.K % 16 == 0) && rows * slices >= 8 * t.resident * d.sm_count;
}

// Channels of a slice of up to `most` where slices are alike and whole sectors, or one; else 0.
constexpr int64_t even_slices(Problem const& p, int64_t most) {
  if (p.C <= most && p.C % 8 == 0) return p.C;
  int64_t channels = p.C % 16 == 0 ? most / 16 * 16 : 0;
  while (channels > 0 && p.C % channels != 0) channels -= 16;
  return channels;
}

// 3x3 with stride 2 in 16-bit types, fprop of images of up to 7 strips and wgrad, and in float32 fprop of others and
// wgrad, as measured: few blocks an SM, of slices of 16 to 96 channels, and whole rows of some images. False if a block
// would have few rows.
constexpr bool take_few_blocks(ColumnTile& t, Op op, Problem const& p, int R, int stride, int64_t all,
                               Device const& d) {
  bool const sums = op == Op::wgrad, f32 = p.dtype == DType::f32;
  bool const small = sums && !f32 && all <= 4 && p.C % 16 == 0, many = sums && f32;
  if (R != 3 || stride != 2 || op == Op::dgrad || (!sums && (f32 ? all < 7 : all > 7))) return false;
  constexpr int64_t vector = column_vector(3, 2);
  bool const thirds = many && all > 4 && all <= 7 && p.C % 72 == 0;
  int64_t const lanes = many || small ? 128 : 168;
  int64_t const wanted = thirds ? 24 : many ? (all <= 2 ? 32 : 16) : f32 ? 96 : small ? 32 : sums && all > 7 ? 48 : 64;
  int64_t const slices = ceil_div(p.C, wanted);
  int64_t channels = ceil_div(ceil_div(p.C, 8), slices) * 8;
  if (!f32 && channels % 16 != 0) channels = p.C % 16 == 0 ? even_slices(p, wanted) : p.C <= 72 ? p.C : channels;
  int64_t const vectors = channels / vector;
  int64_t const box = 126 / column_width(op, 3, 2);  // 256 columns of x, with the halo
  int64_t const tiles = ceil_div(all, min64(lanes / vectors, box)), strips = ceil_div(all, tiles);
  int64_t images = 1;
  while (tiles == 1 && 2 * images <= min64(p.N, 8) && 2 * images * strips * vectors <= lanes) images *= 2;
  if (many && tiles == 1) images = max64(1, min64(min64(p.N, 8), lanes / (strips * vectors)));
  int64_t const warps = ceil_div(vectors * strips * images, 32), resident = small         ? 2
                                                                            : sums || f32 ? 1
                                                                                          : max64(1, 10 / (warps + 1));
  int64_t const rows = tiles * ceil_div(p.N, images) * p.P() * ceil_div(p.C, channels);
  if (rows < (many ? 10 : sums || f32 ? 15 : 15 * resident) * d.sm_count) return false;
  t.channels = int(channels), t.strips = int(strips), t.images = int(images), t.resident = int(resident);
  t.stages = thirds ? 3 : many || small ? 4 : 5;
  return true;
}

// 3x3, fprop and dgrad of large layers, as measured, in turns: in 16-bit types with stride 1 whole pixels of up to 144
// channels, or slices of 64 or 128, or up to 112, of some 128 lanes; dgrad with stride 2 of small images, slices of 64,
// 48 or 32; float32 of small images, slices of 64. False if there are few turns.
constexpr bool take_turns(ColumnTile& t, Op op, Problem const& p, int R, int stride, int64_t all, Device const& d) {
  bool const f32 = p.dtype == DType::f32, strided = stride == 2;
  if (R != 3 || op == Op::wgrad) return false;
  if (strided ? f32 || op != Op::dgrad || all > 7 || p.C < 32 : f32 && (all > 4 || p.C < 64)) return false;
  int const vector = column_vector(3, stride);
  bool const wide = !f32 && !strided && p.C % 128 == 0 && all >= 7;
  bool const seven = strided && all > 4;
  bool const pairs = !f32 && seven && (p.C + 16) / 64 > (p.C - 1) / 64;  // slices of 64 fill the channels
  int64_t const wanted = wide ? 128 : seven && !pairs ? 48 : strided && !seven ? 32 : 64;
  int64_t channels = ceil_div(ceil_div(p.C, 8), ceil_div(p.C, wanted)) * 8;
  if (!f32 && !strided && p.C % 64 != 0 && all >= 7) {
    // Rows of fewer strips would be cut unevenly by whole pixels of more channels.
    int64_t const even = even_slices(p, all >= 14 ? 144 : 112);
    if (even >= 48) channels = even;
  }
  if (strided && channels % 16 != 0) return false;
  int64_t const lanes = wide || pairs || channels > 112 ? 224 : channels == 80 ? 140 : 128;
  int64_t const vectors = channels / vector, most = lanes / vectors;
  int64_t const strips = f32 || strided ? all : min64(wide ? most / 7 * 7 : most, 56);
  int64_t const tiles = ceil_div(all, strips);
  t.channels = int(channels), t.strips = int(ceil_div(all, tiles)), t.images = 1;
  while (tiles == 1 && 2 * t.images <= min64(p.N, 8) && 2 * t.images * t.strips * vectors <= lanes) t.images *= 2;
  t.resident = int(min64(65536 / 32 / column_registers(3, stride) / (t.warps(vector) + 1), f32 ? 2 : 16));
  int64_t const H = op == Op::dgrad ? p.H : p.P(), longest = f32 ? 7 : !wide && channels > 112 ? 28 : 14;
  if (!f32 && (H < 14 || p.C <= 32 || p.C == 64)) return false;
  t.each = ceil_div(H, ceil_div(H, longest)), t.stages = f32 || (strided && !pairs) ? 5 : 8;
  int64_t const turns = tiles * ceil_div(p.N, t.images) * ceil_div(H, t.each) * ceil_div(p.C, channels);
  return 10 * turns >= (seven ? 12 * t.resident : f32 || strided ? 20 * t.resident : 18) * d.sm_count;
}

// 5x5 with stride 2 in float32, as measured: whole rows of some images, slices of 32 or 48 channels, of dgrad of wide
// rows 24 by seven strips; one block an SM, or two. dgrad of rows of more than 16 columns walks in turns of 14 rows.
constexpr bool column_fives(Op op, Problem const& p, int R, int stride) {
  int64_t const strips = ceil_div(p.W + p.pad_left % 2, column_width(op, 5, 2));  // dgrad: of seven, if they are many
  return R == 5 && stride == 2 && p.dtype == DType::f32 && p.K == p.C &&
         (op != Op::dgrad || strips <= 7 || strips % 7 == 0);
}
constexpr void take_fives(ColumnTile& t, Op op, Problem const& p, int64_t all) {
  bool const backward = op == Op::dgrad, pieces = backward && all > 7;
  constexpr int64_t vector = column_vector(5, 2);
  int64_t const wanted = pieces ? 24 : op == Op::fprop && all <= 4 ? 48 : 32, lanes = op == Op::fprop ? 192 : 224;
  t.channels = int(ceil_div(ceil_div(p.C, 8), ceil_div(p.C, wanted)) * 8);
  int64_t const vectors = t.channels / vector, box = 126 / column_width(op, 5, 2);  // 256 columns of x, with the halo
  int64_t const tiles = ceil_div(all, pieces ? 7 : min64(lanes / vectors, box));
  t.strips = int(ceil_div(all, tiles)), t.images = 1;
  int64_t least = p.N;  // images that are not there cost as others do
  for (int64_t images = 2; tiles == 1 && images <= min64(p.N, 8) && images * t.strips * vectors <= lanes; ++images) {
    int64_t const walked = ceil_div(p.N, images);
    if (walked * 10 <= least * 9) t.images = int(images), least = walked;
  }
  int64_t const warps = t.warps(vector);
  t.resident = warps <= 3 ? 3 : warps <= 4 || (op != Op::fprop && all <= 4) ? 2 : 1;
  t.stages = op == Op::dgrad ? 8 : t.resident > 1 ? 3 : 5;
}

// 7x7 with stride 2, fprop and wgrad, as measured: slices of 16 filters, whole rows of some images. False if a block
// would have few rows.
constexpr bool take_sevens(ColumnTile& t, Op op, Problem const& p, int R, int stride, int64_t all, Device const& d) {
  bool const pairs = op == Op::fprop && p.K > p.C;
  int64_t const vectors = pairs ? 8 : 16, lanes = pairs && all > 4 ? 192 : 128;
  if (R != 7 || stride != 2 || op == Op::dgrad || p.K % 16 != 0 || all * vectors > lanes) return false;
  int64_t const images = min64(min64(p.N, 8), lanes / (all * vectors)), resident = pairs ? 1 : 3;
  if (ceil_div(p.N, images) * p.P() * (p.K / 16) < 15 * resident * d.sm_count) return false;
  t.channels = 16, t.strips = int(all), t.images = int(images), t.resident = int(resident), t.stages = 8;
  return true;
}

constexpr ColumnTile column_tile(Op op, Problem const& p, int R, int stride, Device const& d) {
  bool const backward = op == Op::dgrad, sums = op == Op::wgrad, strided = op == Op::fprop && stride == 2;
  int const m = int(p.K / p.C), vector = column_vector(R, stride, m, sums), width = column_width(op, R, stride),
            size = size_of(p.dtype), piece = 16 / size * m;
  ColumnAxis const axis{backward, R, stride};
  int64_t const H = backward ? p.H : p.P(), W = (backward ? p.W : p.Q()) - axis.origin(p.pad_left);
  int64_t const all = ceil_div(W, width), vectors = ceil_div(p.K, piece) * piece / vector;
  int const most = column_threads(R, stride), warps_of_sm = 65536 / 32 / column_registers(R, stride, vector);
  // Of a thread, for an input row: outputs that it makes of it, and instructions.
  double const outputs = width * vector * (backward ? double(stride) : 1.0 / stride);
  double const issue = outputs * R * R / (backward ? stride * stride : 1) + axis.extent(width) * (vector + 2.0) +
                       outputs * (1 + 3.0 / vector) + 60;

  // Few idle lanes, little halo.
  ColumnTile t;
  double best = 0;
  int64_t most_strips = min64(all, most / (piece / vector));
  while (axis.extent(int(most_strips) * width) > 256) --most_strips;
  int64_t const first = ceil_div(all, most_strips);
  int const lane_counts[] = {most, 128, 64};
  for (int64_t tiles = first; tiles <= min64(all, first + 7); ++tiles) {
    int64_t const strips = ceil_div(all, tiles);
    double const halo = double(axis.extent(int(strips) * width)) / axis.advance(int(strips) * width);
    double const memory = 32 * size * (axis.advance(width) * vector * halo + outputs) / kColumnBytes *
                          double(tiles * strips) / double(all);
    for (int64_t images = 1; images <= (tiles > 1 ? 1 : min64(p.N, 8)); images *= 2)
      for (int lanes_wanted : lane_counts) {
        int64_t const least = ceil_div(vectors, max64(1, min64(lanes_wanted / (strips * images), 256 / vector)));
        for (int64_t slices = least; slices < least + 3; ++slices) {
          int64_t const channels = ceil_div(ceil_div(p.K, piece), slices) * piece;
          int64_t const lanes = channels / vector * strips * images, warps = ceil_div(lanes, 32);
          if (lanes > most) continue;
          double const idle = double(warps * 32) / double(lanes) * double(ceil_div(p.K, channels) * channels) /
                              double(p.K) * double(tiles * strips) / double(all);
          int64_t const blocks = min64(warps_of_sm / (warps + 1), 16);
          double const multiply = issue * idle / kColumnIssue;
          // As measured: bytes of a pixel that a block reads, and what it does for each of its channels at its begin or
          // end.
          double const cost = (memory > multiply ? memory + multiply / 8 : multiply + memory / 8) *
                              (1.5 - 0.5 * double(blocks * (warps + 1)) / double(warps_of_sm)) *
                              (channels * size % 32 != 0 && slices > 1 ? (size == 2 ? 1.4 : 1.1) : 1.0) *
                              (channels * size < 128 && slices > 1 ? 1.05 : 1.0) * (images > 1 ? 1.02 : 1.0) *
                              (images > 1 && strips * images > 16 ? 1.1 : 1.0) * (sums && tiles > 1 ? 1.1 : 1.0) *
                              (1 + (sums && size == 4      ? 24
                                    : strided && size == 4 ? 40
                                                           : 8) /
                                       double(channels * size)) *
                              (1 + 0.3 / double(strips * images));
          if (best != 0 && cost >= best) continue;
          best = cost;
          t.channels = int(channels), t.strips = int(strips), t.images = int(images), t.resident = int(blocks);
        }
      }
  }
  ColumnTile taken = t;
  bool const measured = column_as_measured(op, p, R, stride) && take_measured(taken, op, p, R, all, d);
  bool const in_turns = m == 1 && !measured && take_turns(taken, op, p, R, stride, all, d);
  if (measured || in_turns) t = taken;
  bool const few_blocks = m == 1 && take_few_blocks(t, op, p, R, stride, all, d);
  bool const fives = column_fives(op, p, R, stride), sevens = take_sevens(t, op, p, R, stride, all, d);
  if (fives) take_fives(t, op, p, all);
  t.slices = ceil_div(p.K, t.channels), t.tiles_w = ceil_div(all, t.strips), t.image_units = ceil_div(p.N, t.images);
  int64_t const pixel = int64_t(t.channels) * size * t.images, warps = t.warps(vector);
  t.in_bytes = to128(pixel / (backward ? 1 : m) * axis.extent(t.strips * width));
  t.y_bytes = sums ? to128(pixel * t.strips * width) : 0;
  int64_t const stage = t.in_bytes + t.y_bytes;
  // wgrad: sums of the block's threads, in place of the stages; else the filters, beside them, in pairs with a bias
  // where channels are single.
  int64_t const totals = sums ? ((t.channels / vector) | 1) * t.strips * t.images * R * R * vector * 4 : 0,
                filters = sums ? 0 : int64_t(t.channels) * R * R * (stride == 1 && column_pairs(R) ? 2 : 1) * size;
  auto room = [](int resident) constexpr { return 220 * 1024 / resident - 1024; };
  while (t.resident > 1 && max64(3 * stage + filters, totals) > room(t.resident)) --t.resident;

  // Shares: rows of all strips, one after the other, as even as they go; or whole strips, whose first and last rows are
  // not read twice. wgrad: fewer of them leave fewer partial sums.
  t.units = t.tiles_w * t.image_units * H;
  double const copied =
      double(t.in_bytes) + double(pixel) * t.strips * width * (backward ? double(stride) : 1.0 / stride);
  int64_t const slots = max64(1, int64_t(t.resident) * d.sm_count / t.slices), taps = p.K * R * R;
  // As measured: float16 of 5x5 and dgrad of stride 2, and 5x5 on small images, take longer by turns.
  bool const turns = !sums && (size == 4 ? R == 3 || H >= 28 : stride == 2 && R == 3 && !backward);
  int const in_flight = measured || in_turns || few_blocks || fives || sevens ? t.stages : 5;
  auto consider = [&](int64_t each) {
    ColumnTile u = t;
    u.each = min64(each, t.units), u.shares = ceil_div(t.units, u.each);
    if (sums && u.shares > 1 && u.shares * taps * 4 > kMaxWorkspaceBytes) return;
    int64_t const blocks = u.shares * t.slices, full = int64_t(t.resident) * d.sm_count;
    int64_t const resident = ceil_div(min64(blocks, full), d.sm_count);
    // Where all blocks of an SM are there, more in flight are slower.
    int64_t const wanted = resident != t.resident && !fives && !sevens ? kColumnStages : in_flight;
    u.stages = int(max64(3, min64(wanted, (room(int(resident)) - filters) / stage)));
    u.shared_bytes = max64(u.stages * stage + filters, totals);
    double const copy = double(resident) * copied / kColumnBytes;
    double const multiply = double(resident) * double(warps) * issue / kColumnIssue;
    double const latency =
        kColumnLatency / ((u.stages > (measured ? 5 : 3) ? u.stages : 5) - 1);  // fewer, where as fast
    double step = copy > multiply ? copy + multiply / 8 : multiply + copy / 8;
    step = step > latency ? step : latency;
    double const halo = u.each % H == 0 ? 0 : R - 1, rows = backward ? 1.0 / stride : stride;
    u.ns = 1500 + double(ceil_div(blocks, full)) * ((double(u.each) * rows + halo) * step / 1.8 + 1500);
    // Short turns of many blocks, one after the other: what all read at a time is close together, and comes at the rate
    // of large layers.
    u.turns = in_turns || (turns && 2 * blocks > 3 * full);
    if (u.turns) {
      double const issue_ns =
          double(blocks) * (double(u.each) * rows + halo) * double(warps) * issue / kColumnIssue / 1.8 / d.sm_count;
      double const memory_ns = 0.79 * walk_memory_ns(p, d);
      u.ns = 3000 + 1.05 * (memory_ns > issue_ns ? memory_ns : issue_ns);
    }
    // In 16-bit types, as measured: slices that are no whole sectors take longer, and a last round of few blocks.
    if (in_turns && size == 2) {
      double const rounds = double(blocks) / double(full), late = double(ceil_div(blocks, full)) / rounds - 1;
      double const memory_ns = walk_memory_ns(p, d);
      bool const alike = all >= 7 && p.K % u.channels == 0;
      u.ns = stride == 2            ? (u.stages > 5 ? 0.84 : 0.88) * memory_ns
             : u.channels == 128    ? 1800 + 0.846 * memory_ns
             : alike                ? 2000 + 0.89 * memory_ns
             : u.channels % 16 == 0 ? 0.98 * memory_ns
                                    : 1.45 * memory_ns;
      if (rounds > 1 && late > 0.1) u.ns *= 1 + 0.6 * late;
    }
    if (measured && R == 3) u.ns = 4500 + 0.79 * walk_memory_ns(p, d);
    if (fives) {
      double const memory_ns = walk_memory_ns(p, d);
      u.ns = sums ? 18500 + 0.83 * memory_ns : backward ? 9000 + 0.9 * memory_ns : 11300 + 0.833 * memory_ns;
      if (sums && u.shares > 1) u.ns += double(u.shares) * double(taps) * 8 / 2500 - 500;
      if (t.ns == 0) t = u;
      return;
    }
    if (few_blocks) u.ns = (sums ? 6500 : 0) + 0.83 * walk_memory_ns(p, d);
    if (sums) u.ns += 2000 + (u.shares > 1 ? 3500 + double(u.shares) * double(taps) * 8 / 2500 : 0);
    if (t.ns == 0 || u.ns < t.ns) t = u;
  };
  if (in_turns) {
    consider(t.each);
    return t;
  }
  int64_t const even = ceil_div(t.units, slots);
  if (fives) {
    int64_t const whole = ceil_div(even, H) * H;
    consider(backward && all > 4 && even > 28 ? 14 : 20 * whole <= 23 * even ? whole : even);
    if (t.ns == 0) consider(t.units);  // there is no room for partial sums
    return t;
  }
  if (measured && t.each > 1) {
    consider(t.each);
    return t;
  }
  if (measured && even >= 8) {
    int64_t const whole = ceil_div(even, H) * H;
    bool const near = (R > 3 || H <= 28) && (10 * whole <= 11 * even || whole <= even + R / 2 + 1) &&
                      (R != 7 || sums || whole <= 2 * H);
    consider(near ? whole : even);
    if (t.ns != 0) return t;
  }
  if (few_blocks || sevens) {
    int64_t const whole = ceil_div(even, H) * H;
    consider(sums && whole <= even + 1 ? whole : even);
    if (t.ns != 0) return t;
  }
  consider(even);
  consider(ceil_div(even, H) * H);
  if (H > 1 && even < H) consider(ceil_div(H, H / even));
  if (turns) consider(ceil_div(H, max64(1, H / (strided ? 14 : 7))));
  if (sums && even >= 16 && even <= 32) consider(2 * even);
  if (sums && even < 16) {
    consider(4 * even);
    consider(t.units);
  }
  if (t.ns == 0) consider(t.units);  // there is no room for partial sums
  return t;
}

// As measured: what a block sets up before its first row, float32, and 5x5.
constexpr double column_one_ns(Op op, Problem const& p, ColumnTile const& t, int R, int stride) {
  if (column_fives(op, p, R, stride)) return t.ns;
  if (R == 7 && stride == 2) {
    bool const sums = op == Op::wgrad, sevens = op != Op::dgrad && t.channels == 16;  // take_sevens
    double const memory_ns = (sums ? 9000 : 6500) + (sums ? 1.15 : 1.0) * walk_memory_ns(p, h200_sxm);
    // dgrad: blocks that leave SMs idle take up to twice as long as estimated.
    double const few = p.K == p.C && 10 * t.shares * t.slices < 9 * t.resident * h200_sxm.sm_count ? 2 : 1;
    double const ns = op == Op::dgrad ? 9000 + (p.dtype == DType::f32 ? 0.63 : 0.7) * few * t.ns
                      : sevens        ? (sums ? 0.95 * (9000 + t.ns) : (p.K > p.C ? 0.75 : 0.87) * (6500 + t.ns))
                      : sums          ? 15000 + 0.54 * t.ns
                                      : 10000 + 0.48 * t.ns;
    return max64(int64_t(ns), int64_t(memory_ns));
  }
  bool const measured = column_as_measured(op, p, R, stride), sums = op == Op::wgrad;
  double const large = R < 9 ? 1.0 : R == 9 ? (sums ? 0.87 : 0.73) : !sums ? 0.93 : R == 11 || p.Q() <= 8 ? 0.71 : 0.6;
  double const five = t.strips > 4 ? 0.6 : sums ? 0.86 : 0.85;
  if (measured && sums && R > 3) return (R == 5 ? 5000 : 7000) + (R == 5 ? five : R == 7 ? 0.86 : large) * t.ns;
  if (measured && !sums)
    return (t.each < 8 || R == 7 ? 5000 : 4000) + (R == 5 ? five : R == 7 ? 0.73 : 0.95 * large) * t.ns;
  if (sums) return (R == 3 ? 5000 : 9000) + large * t.ns;
  if (t.turns) return 6500 + t.ns;
  double const pieces = stride == 1 && t.tiles_w > 1 ? 1.2 : 1.0;  // of a row of the image
  double const slower = p.dtype != DType::f32 ? (stride == 1 ? 1.1 : 1.0)
                        : stride == 1         ? (t.tiles_w > 1 ? 1.04 : 0.95)
                        : op == Op::dgrad     ? 1.15
                                              : 1.0;
  return 6500 + pieces * slower * t.ns;
}

// The same of two filters a channel with stride 1: 3x3 F and D of few turns are estimated too long (8x64x56x56 D 12.7
// us, 17.9 without), 7x7 too short (64x96x56x56 D 114, 100; 4x200x20x20 W 25.2, 19.2).
constexpr double column_ns(Op op, Problem const& p, ColumnTile const& t, int R, int stride) {
  double const ns = column_one_ns(op, p, t, R, stride);
  if (p.K == p.C || stride == 2) return ns;
  if (R == 3 && op != Op::wgrad) return t.turns ? ns : 6500 + 0.57 * (ns - 6500);
  if (R < 7) return ns;
  return op == Op::fprop ? 1.02 * ns + 1200 : op == Op::dgrad ? 1.13 * ns + 700 : ns < 25000 ? ns + 2500 : ns;
}

// Can the copy engine bring the rows?
constexpr bool column_copies(Op op, Problem const& p) {
  int const v = 16 / size_of(p.dtype);
  return (p.K == p.C || (p.K == 2 * p.C && column_takes_pairs(p.dtype, int(p.R), int(p.stride_h)))) &&
         channel_vectors(p.x, p.x_align, p.C, v, p.dtype) && channel_vectors(p.y, p.y_align, p.K, v, p.dtype) &&
         (op == Op::dgrad || map_supports(p.x, p.N, p.H, p.W, p.dtype)) &&
         (op == Op::fprop || map_supports(p.y, p.N, p.P(), p.Q(), p.dtype));
}

// 3x3, fprop and dgrad: small layers, and channels that the copy engine cannot take, are in these rows too, by
// depthwise_flat.cuh, depthwise_wide.cuh or depthwise_walk.cuh.
enum class ColumnRoad { none, column, walk, wide, flat };
struct ColumnChoice {
  ColumnRoad road = ColumnRoad::none;
  double ns = 0;
  int shares = 1;  // of wgrad
};
constexpr ColumnChoice column_choice(Op op, Problem const& p, int R, int stride, Device const& d) {
  ColumnChoice best;
  auto consider = [&](ColumnRoad road, double ns) constexpr {
    if (best.road == ColumnRoad::none || ns < best.ns) best.road = road, best.ns = ns;
  };
  if (column_copies(op, p)) {
    ColumnTile const t = column_tile(op, p, R, stride, d);
    consider(ColumnRoad::column, column_ns(op, p, t, R, stride));
    if (op == Op::wgrad) best.shares = int(t.shares);
  }
  if (R != 3 || op == Op::wgrad || !walks(op, p)) return best;
  WalkTile const walk = walk_tile(op, p, R, stride, d);
  WideTile const wide = wide_tile(op, p, stride, d);
  // As measured beside each other: walks are faster where many go through whole columns of small images.
  int64_t const H = op == Op::dgrad ? p.H : p.P();
  bool const many = stride == 1 && H <= 16 && walk.chunks == 1 && walk.vector > 1 && walk.threads >= 30000;
  if (wide.used) consider(ColumnRoad::wide, wide.ns);
  if (FlatTile const flat = stride == 1 ? flat_tile(p, d) : FlatTile{}; flat.used) consider(ColumnRoad::flat, flat.ns);
  if (!wide.used || many)
    consider(ColumnRoad::walk, wide.used && size_of(p.dtype) == 2 ? 3200 + 0.74 * walk.ns : walk.ns);
  return best;
}

// With a dilation an image of the same size is made of images without one, its phases: every dilation_h-th row and
// dilation_w-th column of x and y. Each is a launch of its own.
inline constexpr int64_t kColumnPhases = 9;
constexpr bool column_phased(Problem const& p) {
  return p.stride_h == 1 && p.stride_w == 1 && p.dilation_h * p.dilation_w > 1 &&
         p.dilation_h * p.dilation_w <= kColumnPhases && p.P() == p.H && p.Q() == p.W && p.H >= p.dilation_h &&
         p.W >= p.dilation_w && p.pad_top % p.dilation_h == 0 && p.pad_left % p.dilation_w == 0 && p.pad_top >= 0 &&
         p.pad_top <= (p.R - 1) * p.dilation_h && p.pad_left >= 0 && p.pad_left <= (p.S - 1) * p.dilation_w;
}
constexpr Problem column_phase(Problem const& p, int64_t h, int64_t w) {
  Problem phase = p;
  phase.H = ceil_div(p.H - h, p.dilation_h), phase.W = ceil_div(p.W - w, p.dilation_w);
  phase.pad_top /= p.dilation_h, phase.pad_left /= p.dilation_w;
  phase.pad_bottom = p.R - 1 - phase.pad_top, phase.pad_right = p.S - 1 - phase.pad_left;
  align_phases(phase, p.dilation_h > 1, p.dilation_w > 1);
  phase.x.h *= p.dilation_h, phase.x.w *= p.dilation_w, phase.y.h *= p.dilation_h, phase.y.w *= p.dilation_w;
  phase.dilation_h = phase.dilation_w = 1;
  return phase;
}
// What a launch takes that follows another less than one alone; wgrad: its sums are added once.
constexpr double column_phase_ns(Op op) { return op == Op::wgrad ? 8000 : 3000; }

constexpr Estimate column_estimate(Row const& row, Op op, Problem const& p, Device const& d) {
  if (column_phased(p)) {
    Estimate all{column_phase_ns(op), 0};
    for (int64_t h = 0; h < p.dilation_h; ++h)
      for (int64_t w = 0; w < p.dilation_w; ++w) {
        Estimate const one = column_estimate(row, op, column_phase(p, h, w), d);
        all.ns += one.ns - column_phase_ns(op), all.split_k += one.split_k;
      }
    return all;
  }
  ColumnChoice const taken = column_choice(op, p, row.tile_m, row.tile_k, d);
  return {taken.ns, taken.shares};
}

constexpr bool column_supports(Row const& row, Op op, Problem const& p) {
  if (p.C_per_group() != 1) return false;
  if (column_phased(p))
    return column_supports(row, op, column_phase(p, 0, 0)) &&
           (op != Op::wgrad ||
            column_estimate(row, op, p, h200_sxm).split_k * p.K * p.R * p.S * 4 <= kMaxWorkspaceBytes);
  return walk_filter(row, p) && (column_copies(op, p) || (row.tile_m == 3 && op != Op::wgrad && walks(op, p)));
}

}  // namespace conv2d_ext
