#include "../simt.cuh"
CONV2D_EXT_SIMT(CONV2D_EXT_SIMT_INSTANCE, bf16, 128, 128, 8, any)
