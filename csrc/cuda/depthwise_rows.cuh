// The depthwise rows: which kernels a GPU has for them. depthwise_any.cuh and the plainest kernels of
// depthwise_lines.cuh, which are compiled in a source of their own, are for all GPUs; the others are for Hopper.
#pragma once

#include "depthwise_flat.cuh"
#include "depthwise_lines.cuh"
#include "depthwise_patches.cuh"
#include "depthwise_staged.cuh"
#include "depthwise_tiles.cuh"
#include "depthwise_walk.cuh"

namespace conv2d_ext::depthwise {

template <Op op, DType dtype, Variant variant>
cudaError_t launch_plain(Problem const& problem, Plan const& plan, Device const& gpu, Arguments const& args,
                         cudaStream_t stream);

template <Op op, DType dtype, Variant variant>
cudaError_t launch_any_filter(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  int device = 0, major = 0, minor = 0;
  Device gpu = h200_sxm;
  if (auto const error = cudaGetDevice(&device)) return error;
  if (auto const error = cudaDeviceGetAttribute(&gpu.sm_count, cudaDevAttrMultiProcessorCount, device)) return error;
  if (auto const error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  if (auto const error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) return error;
  gpu.compute_capability = 10 * major + minor;
  if (gpu.compute_capability == 90) {
    if constexpr (is_nhwc(variant)) {
      return launch_lines<op, dtype, false>(problem, plan, gpu, args, stream);
    } else {
      AnyFilter const any = any_filter(op, problem, h200_sxm);
      if (any.patches.used) return launch_patches<op, dtype>(problem, any.patches, plan, args, stream);
      if (any.few.used) return launch_few<op, dtype>(problem, any.few, plan, args, stream);
      if (any.staged.used) return launch_staged<op, dtype>(problem, any.staged, plan, args, stream);
    }
  }
  return launch_plain<op, dtype, variant>(problem, plan, gpu, args, stream);
}

// wgrad of 3x3 with stride 1 in channels_last, 16 bits.
template <DType dtype>
cudaError_t launch_sums(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  Device gpu = h200_sxm;
  if (auto const error = count_sms(gpu.sm_count)) return error;
  if (!sums_are_flat(problem, 3, 1, gpu)) return launch_walks<Op::wgrad, dtype, 3, 3, 1>(problem, plan, args, stream);
  return launch_flat_sums<typename TypeOf<dtype>::type>(problem, plan, flat_sums_tile(problem, gpu), args, stream);
}

template <Op op, DType dtype, int R, int S, int stride, Variant variant>
cudaError_t launch_row(Problem const& problem, Plan const& plan, Arguments const& args, cudaStream_t stream) {
  if constexpr (R == 0)
    return launch_any_filter<op, dtype, variant>(problem, plan, args, stream);
  else if constexpr (is_nhwc(variant) && op == Op::wgrad && R == 3 && stride == 1 && size_of(dtype) == 2)
    return launch_sums<dtype>(problem, plan, args, stream);
  else if constexpr (is_nhwc(variant))
    return launch_walks<op, dtype, R, S, stride>(problem, plan, args, stream);
  else if constexpr (op == Op::dgrad && stride == 2)
    return launch_spread<R>(problem, args, stream);
  else
    return launch_tiles<op, R, stride>(problem, args, stream);
}

}  // namespace conv2d_ext::depthwise

#define CONV2D_EXT_DEPTHWISE_INSTANCE(family, op, dtype, tm, tn, tk, variant)                                \
  CONV2D_EXT_LAUNCHER(family, op, dtype, tm, tn, variant) {                                                  \
    return depthwise::launch_row<Op::op, DType::dtype, tm, tn, tk, Variant::variant>(p, plan, args, stream); \
  }
