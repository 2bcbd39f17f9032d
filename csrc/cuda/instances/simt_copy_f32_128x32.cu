#include "../simt_copy.cuh"
CONV2D_EXT_SIMT(CONV2D_EXT_SIMT_COPY_INSTANCE, f32, 128, 32, 16, nhwc)
