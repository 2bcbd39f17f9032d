#include "../simt.cuh"
CONV2D_EXT_SIMT(CONV2D_EXT_SIMT_INSTANCE, f32, 128, 64, 16, any)
