#include "../tma_wgrad.cuh"
CONV2D_EXT_TMA_ROUNDS(CONV2D_EXT_TMA_INSTANCE, f16)
