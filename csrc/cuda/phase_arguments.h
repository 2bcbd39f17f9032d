// Where the tensors of a phase begin: of a depthwise layer with a dilation, every so many rows and columns of the image
// are a layer of their own (column.h, toeplitz.h).
#pragma once

#include "launch.h"

namespace conv2d_ext {

// Of the phase from row h and column w on: the filter, or wgrad's result, is the whole layer's.
template <Op op, DType dtype>
Arguments phase_arguments(Problem const& p, Arguments args, int64_t h, int64_t w) {
  auto past = [&](void const* address, Strides const& s) {
    return static_cast<char const*>(address) + (h * s.h + w * s.w) * size_of(dtype);
  };
  args.a = past(args.a, op == Op::dgrad ? p.y : p.x);
  if (op == Op::wgrad)
    args.b = past(args.b, p.y);
  else
    args.out = const_cast<char*>(past(args.out, op == Op::dgrad ? p.x : p.y));
  return args;
}

}  // namespace conv2d_ext
