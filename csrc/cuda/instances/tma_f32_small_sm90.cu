#include "../tma_resident.cuh"
#include "../tma_wgrad_tf32.cuh"
CONV2D_EXT_TMA_TF32_SMALL(CONV2D_EXT_TMA_TF32_RESIDENT_INSTANCE)
