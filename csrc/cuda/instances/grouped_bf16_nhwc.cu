#include "../grouped.cuh"
CONV2D_EXT_GROUPED(CONV2D_EXT_GROUPED_INSTANCE, bf16, 16, nhwc)
