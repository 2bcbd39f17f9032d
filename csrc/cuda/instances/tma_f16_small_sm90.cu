#include "../tma_resident.cuh"
#include "../tma_wgrad.cuh"
CONV2D_EXT_TMA_SMALL(CONV2D_EXT_TMA_RESIDENT_INSTANCE, f16)
