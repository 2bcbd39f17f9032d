#include "../simt_copy.cuh"
CONV2D_EXT_SIMT(CONV2D_EXT_SIMT_COPY_INSTANCE, f64, 64, 64, 8, nhwc)
