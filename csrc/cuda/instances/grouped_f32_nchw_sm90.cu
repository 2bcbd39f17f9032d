#include "../grouped.cuh"
CONV2D_EXT_GROUPED(CONV2D_EXT_GROUPED_INSTANCE, f32, 8, nchw)
