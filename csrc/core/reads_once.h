// Does L2 keep what wgrad by tma_matrix.cuh and tma_sums.cuh reads?
#pragma once

#include <cstdint>
#include <initializer_list>

#include "row.h"

namespace conv2d_ext {

// 1x1 filters read each line in one go, and what it would put out of L2, results of kernels before among it, has to be
// written back. So L2 gives up the lines that are read first; not where tiles far apart need them too, as lines that
// begin within sectors are, or where L2 does not hold half of all, which gains nothing.
constexpr bool reads_once(Problem const& p) {
  double const elements = double(p.N) * double(p.C + p.K) * double(p.H * p.W);
  for (int64_t const channels : {p.C, p.K})
    if (channels > 64 && channels % 16 != 0) return false;
  return p.R * p.S * p.stride_h * p.stride_w == 1 && elements * size_of(p.dtype) < 100e6;
}

}  // namespace conv2d_ext
