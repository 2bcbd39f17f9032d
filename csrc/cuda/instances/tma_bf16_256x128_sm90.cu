#include "../tma_classes.cuh"
CONV2D_EXT_TMA(CONV2D_EXT_TMA_STRIDED_INSTANCE, bf16, 256, 128)
