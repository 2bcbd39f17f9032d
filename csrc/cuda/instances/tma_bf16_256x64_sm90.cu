#include "../tma_wgrad.cuh"
CONV2D_EXT_TMA(CONV2D_EXT_TMA_INSTANCE, bf16, 256, 64)
