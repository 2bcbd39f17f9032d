// The table itself. Kernels do not include it: a new row compiles none of them.
#pragma once

#include "kernels.def"
#include "row.h"

namespace conv2d_ext {

#define CONV2D_EXT_ROW(family, op, dtype, tm, tn, tk, variant) \
  Row{Family::family,                                          \
      Op::op,                                                  \
      DType::dtype,                                            \
      tm,                                                      \
      tn,                                                      \
      tk,                                                      \
      Variant::variant,                                        \
      #family "_" #op "_" #dtype "_" #tm "x" #tn "_" #variant},
inline constexpr Row kRows[] = {CONV2D_EXT_KERNELS(CONV2D_EXT_ROW)};
#undef CONV2D_EXT_ROW
inline constexpr int kRowCount = sizeof(kRows) / sizeof(kRows[0]);

}  // namespace conv2d_ext
