#include "../pixels_turns.cuh"
CONV2D_EXT_PIXEL_TURNS_TILES(CONV2D_EXT_PIXEL_TURNS_INSTANCE, f16)
CONV2D_EXT_PIXEL_TURNS_TILES(CONV2D_EXT_PIXEL_TURNS_INSTANCE, bf16)
extern "C" __attribute__((visibility("default"))) int conv2d_ext_trial = 0;
