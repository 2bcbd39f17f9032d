#include "../grouped_plain_wgrad.cuh"
CONV2D_EXT_GROUPED_PLAIN(CONV2D_EXT_GROUPED_PLAIN_INSTANCE, bf16)
