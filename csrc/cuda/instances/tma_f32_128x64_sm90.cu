#include "../tma_wgrad.cuh"
CONV2D_EXT_TMA_TF32(CONV2D_EXT_TMA_INSTANCE, f32, 128, 64)
