#include "../simt.cuh"
CONV2D_EXT_SIMT(CONV2D_EXT_SIMT_INSTANCE, bf16, 64, 64, 16, any)
