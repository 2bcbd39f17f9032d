#include "pack.cuh"
#include "pack.h"
#include "patch.cuh"
#include "spread.cuh"

namespace conv2d_ext {
namespace {

// Describes a tensor's dimensions, of which the packed ones may be larger.
struct Shape {
  int64_t n, n_packed, groups_n;  // a group
  int64_t c, c_packed, groups_c;  // a group
  int64_t H, W;
  int64_t step_h = 1, step_w = 1, packed_H = 0, packed_W = 0;  // of a result of which not all pixels are packed
};

// Pixels that are contiguous and may be moved at once; 0 if channels lie closer than pixels.
int vector_of(Strides const& s, int align, int size, Shape const& shape) {
  bool const flat = shape.H == 1 || shape.W == 1 || s.h == shape.W * s.w;
  int64_t const step = shape.W > 1 ? s.w : shape.H > 1 ? s.h : s.n;
  if (step != 1) return step < s.c ? 1 : 0;
  int64_t const run = flat ? shape.H * shape.W : shape.W;
  for (int v : {16 / size, 8 / size})
    if (align >= v * size && run % v == 0 && s.n % v == 0 && s.c % v == 0 && (flat || s.h % v == 0)) return v;
  return 1;
}

pack::Tensor tensor_of(void* plain, void* packed, Strides const& s, int align, int size, Shape const& shape) {
  pack::Tensor t{};
  t.plain = plain, t.packed = packed;
  t.lines = shape.n_packed * shape.groups_n * shape.H * shape.W;
  t.n = s.n, t.c = s.c, t.h = s.h, t.w = s.w;
  t.pixels = uint32_t(shape.H * shape.W), t.W = uint32_t(shape.W);
  t.group_n = uint32_t(shape.n), t.group_n_packed = uint32_t(shape.n_packed);
  t.group_c = int32_t(shape.c), t.group_c_packed = int32_t(shape.c_packed);
  t.channels = int32_t(shape.c_packed * shape.groups_c);
  t.vector = vector_of(s, align, size, shape);
  int const v = 16 / size;
  int64_t const H = shape.H, W = shape.W, pixels = H * W;
  bool const dense = (W == 1 || s.w == 1) && (H == 1 || s.h == W) && (shape.c == 1 || s.c == pixels);
  bool const all = shape.step_w == 1;
  if (!all) {
    t.step_h = int32_t(shape.step_h), t.step_w = int32_t(shape.step_w);
    t.packed_pixels = uint32_t(shape.packed_H * shape.packed_W), t.packed_W = uint32_t(shape.packed_W);
  }
  if (all && t.vector == 1 && pixels * 2 <= pack::kMaxRunVectors && dense && shape.groups_c == 1 && shape.c % v == 0 &&
      s.n % v == 0 && align >= 16 && shape.c * pixels < 1 << 30) {
    t.run_log_vectors = 3;  // a line of 128 bytes
    while (pixels << t.run_log_vectors > pack::kMaxRunVectors) --t.run_log_vectors;
    t.run_images = int32_t(max64(1, pack::kRunVectors / (pixels << t.run_log_vectors)));
    t.tiles_c = uint32_t(ceil_div(t.channels, int64_t(v) << t.run_log_vectors));
    return t;
  }
  bool const adjacent = s.c == 1 && ((H == 1 && W == 1) || (W == 1 ? s.h : s.w) == shape.c) &&
                        (W == 1 || H == 1 || s.h == W * shape.c) && (shape.n == 1 || s.n == pixels * shape.c);
  if (all && adjacent && shape.c > 1 && shape.groups_c == 1 && shape.groups_n == 1 && align >= 16 &&
      shape.c_packed < 1 << 24) {
    t.dense = t.tiles_c = 1;
    return t;
  }
  // The widest tile that leaves at most an eighth of its words empty, or the narrowest.
  int64_t const words = t.channels * int64_t(size) / 4;
  int64_t wide = 32;
  while (wide > 4 && round_up(words, wide) * 8 > words * 9) wide /= 2;
  while (wide << t.log_lines < pack::kTile) ++t.log_lines;
  while (1 << t.log_words < wide) ++t.log_words;
  t.tiles_c = uint32_t(ceil_div(words, wide));
  return t;
}

// Blocks that pack, of an SM, beyond which a launch behind that wants its blocks beside each other waits for all: else
// they would be where SMs become free first.
constexpr int64_t kEarlyBlocks = 8;

// Blocks that unpack, which gain nothing if they are spread.
constexpr int64_t kTooFew = 32;

struct Launch {
  pack::Params params{};
  int64_t blocks = 0;

  void add(pack::Tensor t, int size, bool result) {
    t.first_block = uint32_t(blocks);
    int64_t const lines = t.run_images > 0 ? t.run_images * int64_t(t.pixels) : int64_t(1) << t.log_lines;
    if (t.dense > 0) {
      // Four rounds of blocks on an H200 before a thread has more vectors.
      int64_t const written = result ? int64_t(t.group_n) * t.pixels * t.group_c : t.lines * t.channels,
                    each = ceil_div(written * size, int64_t(pack::kThreads) * 16);
      t.dense = each > 8 * 4 * 132 ? 4 : each > 4 * 132 ? 2 : 1;
      blocks += ceil_div(each, t.dense);
    } else {
      blocks += ceil_div(t.lines, lines) * t.tiles_c;
    }
    params.tensor[params.count++] = t;
  }
  template <bool unpack>
  cudaError_t run(int size, cudaStream_t stream) {
    if (blocks == 0) return cudaSuccess;
    auto* const kernel = size == 2 ? pack::pack_kernel<uint16_t, unpack> : pack::pack_kernel<uint32_t, unpack>;
    dim3 const grid{unsigned(blocks)};
    if constexpr (unpack) {
      if (blocks <= kTooFew) return launch_dependent(kernel, grid, pack::kThreads, 0, stream, params);
      return launch_spread(kernel, grid, pack::kThreads, int(sizeof(pack::Tables)), stream, params);
    }
    kernel<<<grid, pack::kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  }
};

// The row on the problem as it is, or on its parts.
cudaError_t launch_in_place(Launcher row, Op op, Problem const& p, Plan plan, Arguments const& given,
                            cudaStream_t stream) {
  Row const& entry = row_of(plan);
  Parts const parts = parts_of(entry, p);
  if (parts.count() == 0) return row(p, plan, given, stream);
  int const size = size_of(p.dtype);
  for (int64_t i = 0; i < parts.count(); ++i) {
    if (part_of(parts, i).problem.R > 0) continue;
    auto const bytes = size_t(span_of(p.x, p.N, p.C, p.H, p.W)) * size;  // dense
    if (auto const error = cudaMemsetAsync(given.out, 0, bytes, stream)) return error;
    break;
  }
  for (int64_t i = 0; i < parts.count(); ++i) {
    Part const part = part_of(parts, i);
    if (part.problem.R == 0) continue;
    Arguments args = given;
    bool const forward = op == Op::fprop;
    args.a = static_cast<char const*>(given.a) + (forward ? part.x : part.y) * size;
    args.b = static_cast<char const*>(given.b) + part.w * size;
    args.out = static_cast<char*>(given.out) + (forward ? part.y : part.x) * size;
    plan.split_k = in_place_estimate(entry, op, part.problem, h200_sxm).split_k;
    if (auto const error = row(part.problem, plan, args, stream)) return error;
  }
  return cudaSuccess;
}

cudaError_t launch_operands(Launcher row, Op op, Problem const& p, Plan const& plan, Arguments const& given,
                            cudaStream_t stream) {
  Row const& entry = row_of(plan);
  Packed const q = packed(entry, p);
  Problem const& c = q.problem;
  PackedPlaces const at = packed_places(q);
  int const size = size_of(p.dtype);
  int64_t const g = p.groups;
  Arguments args = given;
  args.workspace = static_cast<char*>(given.workspace) + at.bytes;
  Launch in, out;
  bool const planes = q.which.x && c.x.c != 1;  // the copies are what is strided
  // `address` is changed to the packed copy's.
  auto add = [&](bool packed, bool result, void const* address, int64_t place, Strides const& s, int align,
                 Shape const& shape) {
    void* const copy = static_cast<char*>(given.workspace) + place;
    if (packed) {
      void* const from = const_cast<void*>(address);
      auto const tensor =
          planes ? tensor_of(copy, from, s, 16, size, shape) : tensor_of(from, copy, s, align, size, shape);
      (result ? out : in).add(tensor, size, result);
    }
    return packed ? copy : const_cast<void*>(address);
  };
  // Channels of copies, with what may be left between pixels; planes have none.
  int64_t const C = planes ? p.C : c.x.w, K = planes ? p.K : c.y.w;
  Shape x{p.N, p.N, 1, p.C_per_group(), C / g, g, p.H, p.W};
  if (packs_met_pixels(entry, p)) x.step_h = p.stride_h, x.step_w = p.stride_w, x.packed_H = c.H, x.packed_W = c.W;
  Shape const w{
      p.K_per_group(), c.K_per_group(), g, p.C_per_group(), packed_w_channels(c.C_per_group(), p.dtype), 1, p.R, p.S};
  Shape const y{p.N, p.N, 1, p.K_per_group(), K / g, g, p.P(), p.Q()};
  if (op == Op::fprop) {
    args.a = add(q.which.x, false, given.a, at.x, planes ? c.x : p.x, p.x_align, x);
    args.b = add(q.which.w, false, given.b, at.w, p.w, p.w_align, w);
    if (given.bias != nullptr && q.which.y && c.K != p.K) {
      Shape const bias{1, 1, 1, p.K_per_group(), c.K_per_group(), g, 1, 1};
      args.bias = add(true, false, given.bias, at.bias, {0, given.bias_stride, 0, 0}, size, bias);
      args.bias_stride = 1;
    }
    args.out = add(q.which.y, true, given.out, at.y, planes ? c.y : p.y, p.y_align, y);
  } else if (op == Op::dgrad) {
    args.a = add(q.which.y, false, given.a, at.y, planes ? c.y : p.y, p.y_align, y);
    // For 1x1 filters over NCHW, and for turned ones, k is to be contiguous.
    args.b =
        q.which.w && wants_turned_filters(entry) && has_turned_filters(c)
            ? add(true, false, given.b, at.w, {0, p.w.n, 0, 1}, p.w_align, {1, 1, 1, p.K, c.w.w, 1, 1, p.C * p.R * p.S})
        : is_pointwise(entry) ? add(q.which.w, false, given.b, at.w, {0, p.w.n, 0, p.w.c}, p.w_align,
                                    {1, 1, 1, p.K, packed_w_channels(p.K, p.dtype), 1, 1, p.C})
                              : add(q.which.w, false, given.b, at.w, p.w, p.w_align, w);
    args.out = add(q.which.x, true, given.out, at.x, planes ? c.x : p.x, p.x_align, x);
  } else {
    args.a = add(q.which.x, false, given.a, at.x, planes ? c.x : p.x, p.x_align, x);
    args.b = add(q.which.y, false, given.b, at.y, planes ? c.y : p.y, p.y_align, y);
    args.out = add(q.which.w, true, given.out, at.w, p.w, p.w_align, w);
  }
  in.params.early = in.blocks <= kEarlyBlocks * 132;
  cudaError_t error = planes ? in.run<true>(size, stream) : in.run<false>(size, stream);
  if (error != cudaSuccess) return error;
  if ((error = launch_in_place(row, op, c, plan, args, stream)) != cudaSuccess) return error;
  return planes ? out.run<false>(size, stream) : out.run<true>(size, stream);
}

}  // namespace

cudaError_t launch_packed(Launcher row, Op op, Problem const& p, Plan const& plan, Arguments const& given,
                          cudaStream_t stream) {
  if (!is_patches(row_of(plan), p)) return launch_operands(row, op, p, plan, given, stream);
  Problem const c = patches(p), filters = patch_filters(p);
  bool const pads = patch_pads(p);
  char* const images = static_cast<char*>(given.workspace);
  char* const padded = images + patch_images_bytes(p);  // filters
  Arguments args = given;
  args.workspace = images + patch_bytes(row_of(plan), p);
  if (op == Op::dgrad) args.out = images;
  if (op != Op::dgrad) {
    args.a = images;
    if (auto const error = patch::launch<false>(p, given.a, images, stream)) return error;
  }
  if (pads && op == Op::wgrad) args.out = padded;
  if (pads && op != Op::wgrad) {
    args.b = padded;
    if (auto const error = patch::launch<false>(filters, given.b, padded, stream)) return error;
  }
  if (auto const error = launch_operands(row, op, c, plan, args, stream)) return error;
  if (op == Op::dgrad) return patch::launch<true>(p, given.out, images, stream);
  return pads && op == Op::wgrad ? patch::launch<true>(filters, given.out, padded, stream) : cudaSuccess;
}

}  // namespace conv2d_ext
