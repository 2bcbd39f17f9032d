#include "../simt.cuh"
CONV2D_EXT_SIMT(CONV2D_EXT_SIMT_INSTANCE, f64, 256, 8, 8, any)
