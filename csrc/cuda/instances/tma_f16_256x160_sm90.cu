#include "../tma_lean.cuh"
#include "../tma_wgrad.cuh"
CONV2D_EXT_TMA(CONV2D_EXT_TMA_INSTANCE, f16, 256, 160)
CONV2D_EXT_TMA_LEAN(CONV2D_EXT_TMA_LEAN_INSTANCE, f16)
