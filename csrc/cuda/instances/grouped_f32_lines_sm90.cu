#include "../grouped_lines_wgrad.cuh"
CONV2D_EXT_GROUPED(CONV2D_EXT_GROUPED_LINES_INSTANCE, f32, 8, lines)
