// The tile of cuda/depthwise_staged.cuh for a problem, and what it costs: shared by the planner and the launcher.
#pragma once

#include "depthwise.h"
#include "few.h"
#include "patches.h"
#include "rounds.h"

namespace conv2d_ext {

// Images of one channel in shared memory, zeros around them. With a stride, rows and columns of the same remainder lie
// together, so that a tap's inputs are one run: output f = row * pitch + column meets with a tap element f + offset.
// Columns beyond a row's end are the zeros before the next.
struct StagedTile {
  bool used = false;
  int in_H = 0, in_W = 0, out_H = 0, out_W = 0;
  int pad_h = 0, pad_w = 0;            // input coordinate = output coordinate * stride - pad + tap * dilation
  int step_h = 1, step_w = 1;          // dgrad: from a tap of a class to the next
  int64_t classes = 1;                 // dgrad: outputs of the same remainder meet the same taps; out_H, out_W: of each
  int phases_h = 1, phases_w = 1;      // remainders of rows and columns of inputs
  int pitch = 1;                       // of a row of one remainder
  int rows = 1, images = 1;            // of outputs: of a band; of a block
  int image_rows = 1, phase_rows = 1;  // of inputs of one remainder: of an image; of all, and one of zeros
  int64_t bands = 1, groups = 1;       // of an image; of images
  int width = 1, width_y = 1;          // elements of one load
  int outputs = 0;                     // the run of outputs, gaps included
  int64_t elements = 0, elements_y = 0;  // in shared memory: of inputs; wgrad: of y
  int64_t shared_bytes = 0;
  // wgrad: warps of a block for different taps; warps that share out the outputs; blocks for different taps.
  int tap_groups = 1, parts = 1, tap_units = 1;
  double block_ns = 0, together = 1;      // a block's or, for wgrad, a step's time; blocks of an SM
  double loads = 0, items = 0, item = 0;  // instructions of a block's copies; its runs of outputs, instructions of one

  constexpr int threads(Op op) const { return op == Op::wgrad ? 32 * tap_groups * parts : 256; }
};

inline constexpr int kStagedRun = 128;          // outputs of a warp at a time
inline constexpr int kStagedTaps = 9;           // of a warp of wgrad
inline constexpr int kStagedImages = 8;         // of a block, at most
inline constexpr int kStagedSplits = 512;       // at most
inline constexpr int kStagedWarps = 11;         // of a block of wgrad: two leave a thread 88 registers
inline constexpr int kStagedBytes = 96 * 1024;  // that a GPU of 8.x has
inline constexpr int64_t kStagedMost = 1024;    // taps, strides and dilations: products of three are 32 bits

struct StagedAxis {
  int in = 0, out = 0, pad = 0, reach = 0;  // reach: from the first tap's input to the last one's
  int stride = 1, step = 1, classes = 1;
};

constexpr StagedAxis staged_axis(bool backward, int64_t x, int64_t y, int64_t taps, int64_t pad, int64_t stride,
                                 int64_t dilation) {
  StagedAxis a;
  int64_t const last = (taps - 1) * dilation;
  if (!backward) {
    a.in = int(x), a.out = int(y), a.pad = int(pad), a.reach = int(last / stride), a.stride = int(stride);
    return a;
  }
  auto up = [&](int64_t v) { return v >= 0 ? ceil_div(v, stride) : -(-v / stride); };
  a.in = int(y), a.out = int(ceil_div(x, stride)), a.pad = int(-up(pad - last)),
  a.reach = int(up(pad) - up(pad - last));
  a.classes = int(stride), a.step = int(stride / gcd64(stride, dilation));
  return a;
}

constexpr StagedTile staged_tile(Op op, Problem const& p) {
  Device const d = h200_sxm;  // the launcher, which knows no device, has the planner's tile
  StagedTile t;
  bool const backward = op == Op::dgrad, sums = op == Op::wgrad;
  if (p.N == 0 || p.C == 0 || p.R == 0 || p.S == 0 || p.P() == 0 || p.Q() == 0 || p.H == 0 || p.W == 0) return t;
  if (p.R > kStagedMost || p.S > kStagedMost || p.R * p.S > kStagedMost) return t;
  if (max64(p.stride_h, p.stride_w) > kStagedMost || max64(p.dilation_h, p.dilation_w) > kStagedMost) return t;
  if (backward && p.K_per_group() > kMostFiltersAChannel) return t;
  int64_t const far = max64(max64(p.x.n, p.x.h), max64(p.y.n, p.y.h));  // steps that 32 bits hold
  if (far * kStagedImages >= int64_t(1) << 31 || double(p.H) * double(p.x.h) + double(p.W) >= 2147483648.0 ||
      double(p.P()) * double(p.y.h) + double(p.Q()) >= 2147483648.0)
    return t;
  int const acc = p.dtype == DType::f64 ? 8 : 4, filters = backward ? int(p.K_per_group()) : 1;
  // dgrad: an output's inputs with a tap are ceil((pad - tap * dilation) / stride) from its place in its class.
  StagedAxis const h = staged_axis(backward, p.H, p.P(), p.R, p.pad_top, p.stride_h, p.dilation_h);
  StagedAxis const w = staged_axis(backward, p.W, p.Q(), p.S, p.pad_left, p.stride_w, p.dilation_w);
  t.in_H = h.in, t.in_W = w.in, t.out_H = h.out, t.out_W = w.out, t.pad_h = h.pad, t.pad_w = w.pad;
  t.step_h = h.step, t.step_w = w.step, t.classes = int64_t(h.classes) * w.classes;
  t.phases_h = h.stride, t.phases_w = w.stride;
  int64_t const steps_w = w.stride;
  int64_t const wide = w.out + w.reach, before = max64(w.pad, 0) / steps_w;
  int64_t const last = (int64_t(w.in) - 1 + w.pad) / steps_w + 1;
  int64_t const pitch = max64(2, max64(max64(w.out, wide - before), min64(last, wide)));
  if (pitch * steps_w * t.phases_h * acc > kStagedBytes) return t;
  t.pitch = int(pitch);

  auto width = [&](Strides const& st, int align, int64_t columns) {
    int v = p.dtype == DType::f64 ? 2 : 4;
    while (v > 1 &&
           (columns % v != 0 || st.n % v != 0 || st.c % v != 0 || st.h % v != 0 || align < v * size_of(p.dtype)))
      v /= 2;
    return v;
  };
  t.width = width(backward ? p.y : p.x, backward ? p.y_align : p.x_align, t.in_W);
  if (sums) t.width_y = width(p.y, p.y_align, t.out_W);
  int64_t const taps = p.R * p.S;
  // Copies of single elements cost more than they save a few taps that skip most of them; and so do those of few
  // pixels.
  if (t.width == 1 && taps <= 9 && !backward && p.stride_h * p.stride_w >= (sums ? 4 : 9)) return t;
  if (double(t.out_H) * t.out_W * double(min64(p.N, kStagedImages)) < 96) return t;
  if (sums) {
    int64_t const all = ceil_div(taps, kStagedTaps);
    t.tap_units = int(ceil_div(all, kStagedWarps)), t.tap_groups = int(ceil_div(all, t.tap_units));
    t.parts = kStagedWarps / t.tap_groups;
  }
  int const warps = t.threads(op) / 32;
  // Instructions of a warp, and a wait for each block or step.
  auto fit = [&](int64_t images, int64_t rows) {
    StagedTile c = t;
    c.images = int(images), c.rows = int(rows), c.groups = ceil_div(p.N, images), c.bands = ceil_div(t.out_H, rows);
    int64_t const image_rows = rows + h.reach, phase_rows = images * image_rows + (wide > pitch ? 1 : 0);
    int64_t const outputs = ((images - 1) * image_rows + rows - 1) * pitch + t.out_W;
    auto sixteen_bytes = [](int64_t n) { return ceil_div(n, 4) * 4; };
    c.elements = sixteen_bytes(phase_rows * pitch * t.phases_h * t.phases_w) * filters;
    c.elements_y = sums ? sixteen_bytes(phase_rows * pitch) : 0;
    c.shared_bytes = (c.elements + c.elements_y + (sums ? 2 : 1) * kStagedRun) * acc +
                     (sums ? 0 : (taps * filters * (acc == 8 ? 16 : 8) + (p.stride_h + p.stride_w) * 4));
    c.shared_bytes = max64(c.shared_bytes, sums ? int64_t(warps) * kStagedTaps * acc : 0);
    c.used = c.shared_bytes <= kStagedBytes;
    c.used = c.used && double(c.bands) * double(c.groups) * double(p.K) < double(1 << 30);
    c.used = c.used && (!sums || double(t.tap_units) * double(p.K) * kStagedSplits < double(1 << 30));
    if (!c.used) return c;
    c.image_rows = int(image_rows), c.phase_rows = int(phase_rows), c.outputs = int(outputs);
    double const pixels = double(images) * double(min64(t.in_H, (rows + h.reach) * h.stride)) * t.in_W * filters;
    double const loads = pixels / 32 * (4 + 30.0 / t.width + (steps_w > 1 ? 3 : 0)) + double(c.elements) / 128 * 4 +
                         (sums ? double(images * rows) * t.out_W / 32 * (4 + 30.0 / t.width_y) : 0);
    int64_t const items = ceil_div(outputs, kStagedRun) * t.classes;
    double const rounds = double(ceil_div(items, sums ? t.parts : warps));
    c.item = sums ? 90.0 : 120.0 + 11 * double(taps * filters) / double(t.classes);
    c.loads = loads, c.items = double(items);
    double const steps = rounds * warps * c.item;
    double const registers = sums ? 88 : 64;
    double together = double(227 * 1024) / double(c.shared_bytes + 1024);
    double const most = 65536 / (registers * t.threads(op));
    c.together = together < most ? together : most;
    c.together = c.together < 1 ? 1 : double(int(c.together));
    // Of a round of blocks that an SM has at once. As measured: few warps hide little; wgrad's barriers and dgrad's
    // outputs of every remainder cost more than their instructions.
    double const slower = sums ? 1.6 : (c.together <= 2 ? 1.5 : 1.0) * (t.classes > 1 ? 1.7 : backward ? 1.3 : 1.0);
    c.block_ns =
        (1500 + (loads + steps + (sums ? 0 : 400.0 * warps)) * c.together / (4 * 1.755 * 0.65)) * slower / c.together;
    return c;
  };
  StagedTile best;
  double least = 0;
  auto consider = [&](int64_t images, int64_t rows) {
    StagedTile const c = fit(images, rows);
    if (!c.used) return;
    double blocks = double(c.bands) * double(c.groups) * double(backward ? p.C : p.K);
    // Few blocks leave SMs without one.
    if (!sums && blocks < c.together * d.sm_count) blocks = c.together * d.sm_count;
    double const cost = blocks * c.block_ns;
    if (best.used && cost >= least) return;
    best = c, least = cost;
  };
  for (int64_t images = min64(p.N, kStagedImages); images > 0; --images) consider(images, t.out_H);
  int64_t rows = t.out_H;
  for (int64_t bands = 2; bands < 4096 && rows > 1; bands += 1 + bands / 4) {
    rows = ceil_div(t.out_H, bands);
    consider(1, rows);
  }
  return best;
}

// Fitted to 1,100 times (docs/tuning.md). The tile's choice above has constants of its own.
constexpr Estimate staged_estimate(StagedTile const& t, Op op, Problem const& p, Device const& d) {
  double const elements =
      double(p.N) * (double(p.C) * double(p.H) * double(p.W) + double(p.K) * double(p.P()) * double(p.Q()));
  double const memory_ns = elements * size_of(p.dtype) / 3500 * 132 / d.sm_count, slots = t.together * d.sm_count;
  if (op != Op::wgrad) {
    double const slower = t.classes > 1 ? 1.78 : op == Op::dgrad ? 1.24 : 1.0;
    double const work_ns = (1.46 * t.loads + t.items * t.item) / 4.61 * slower;
    int64_t const blocks = ceil_div(t.bands * t.groups * (op == Op::dgrad ? p.C : p.K), d.sm_count);
    double const ns =
        in_rounds(blocks, int64_t(t.together), 1.3, [&](double together) { return 1950 + together * work_ns; });
    return {5950 + (ns > memory_ns ? ns : memory_ns), 1};
  }
  // A step's runs follow each other in a warp; other blocks of the SM do not lengthen it.
  double const sums = double(p.K) * double(p.R) * double(p.S) * (p.dtype == DType::f64 ? 8 : 4);
  double const units = double(p.K) * t.tap_units;
  double const step_ns =
      1500 + 345 * double(ceil_div(int64_t(t.items), t.parts)) + 1.04 * t.loads + 14.4 * t.items * t.tap_groups;
  int64_t const steps = t.bands * t.groups;
  Estimate best;
  for (int64_t split = 1; split <= steps && split <= kStagedSplits; split += 1 + split / 16) {
    if (split > 1 && sums * double(split) > double(kMaxWorkspaceBytes)) break;
    double const rounds = double(ceil_div(int64_t(units * double(split)), int64_t(slots)));
    double ns = rounds * (double(ceil_div(steps, split)) * step_ns + 3000);
    ns = 4800 + (ns > memory_ns ? ns : memory_ns);
    if (split > 1) ns += 4360 + sums * double(split) * 2 / 2500;
    if (split == 1 || ns < best.ns) best = {ns, int(split)};
  }
  return best;
}

// The rows for any filter: which of their kernels. GPUs other than Hopper have depthwise_any.cuh alone.
struct AnyFilter {
  FewTile few;
  StagedTile staged;
  PatchesTile patches;
  Estimate estimate;
};

constexpr AnyFilter any_filter(Op op, Problem const& p, Device const& d) {
  AnyFilter a;
  if (d.compute_capability != 90) {
    a.estimate = depthwise_any_estimate(op, p, d);
    return a;
  }
  a.staged = staged_tile(op, p), a.few = few_tile(op, p);
  a.estimate = a.staged.used ? staged_estimate(a.staged, op, p, d) : depthwise_any_estimate(op, p, d);
  // As measured beside each other.
  if (!a.staged.used)
    a.estimate.ns *= a.few.taps > 0 || op == Op::wgrad ? 1.2 : 1.0;
  else if (p.dtype == DType::f64)
    a.estimate.ns *= op == Op::wgrad ? 1.8 : 1.2;
  // The launcher, which knows no device, takes the same.
  a.few.used = a.few.used && a.few.ns < a.estimate.ns;
  if (a.few.used) a.estimate = {a.few.ns, a.few.split_k};
  a.patches = patches_tile(op, p, d);
  a.patches.used = a.patches.used && a.patches.ns < a.estimate.ns;
  if (a.patches.used) a.estimate = {a.patches.ns, a.patches.split_k};
  return a;
}

}  // namespace conv2d_ext
