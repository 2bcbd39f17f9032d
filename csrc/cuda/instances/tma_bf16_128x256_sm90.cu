#include "../tma_wgrad.cuh"
CONV2D_EXT_TMA_2(CONV2D_EXT_TMA_INSTANCE, bf16, 128, 256)
