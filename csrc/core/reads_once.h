// Does L2 keep what wgrad by tma_matrix.cuh and tma_sums.cuh reads?
#pragma once

#include "row.h"

namespace conv2d_ext {

// 1x1 filters read each line in one go, and what it would put out of L2, results of kernels before among it, has to be
// written back. So L2 gives up the lines that are read first. Of more than L2 holds twice that gains nothing, and lines
// that tiles share may be read again.
constexpr bool reads_once(Problem const& p) {
  double const elements = double(p.N) * (double(p.C) * double(p.H * p.W) + double(p.K) * double(p.P() * p.Q()));
  return p.R * p.S == 1 && elements * size_of(p.dtype) < 100e6;
}

}  // namespace conv2d_ext
