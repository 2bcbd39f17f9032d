#include "../tma_wgrad.cuh"
CONV2D_EXT_TMA(CONV2D_EXT_TMA_INSTANCE, f16, 128, 256)
