#include "../tma_held_ahead.cuh"
#include "../tma_wgrad_tf32.cuh"
CONV2D_EXT_TMA_TF32_256X32(CONV2D_EXT_TMA_TF32_HELD_INSTANCE)
