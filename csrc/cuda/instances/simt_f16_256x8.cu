#include "../simt.cuh"
CONV2D_EXT_SIMT(CONV2D_EXT_SIMT_INSTANCE, f16, 256, 8, 16, any)
