// The one place where packed operands and parts of problems are launched, whatever the row.
#pragma once

#include "launch.h"

namespace conv2d_ext {

// Packs into args.workspace what core/pack.h says, runs the row on the packed problem, and unpacks the result.
cudaError_t launch_packed(Launcher row, Op op, Problem const&, Plan const&, Arguments const&, cudaStream_t);

}  // namespace conv2d_ext
