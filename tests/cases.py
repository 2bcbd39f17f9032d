"""The one list of convolution shapes. Tests and benchmarks take their cases from here and nowhere else.

A case is a shape in the field's letters, without a dtype, device or layout; those are arguments of `tensors()`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# Tests of one case in several dtypes and layouts follow each other.
@functools.lru_cache(maxsize=16)
def drawn(size: tuple[int, ...], seed: int, integers: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if integers:
        return torch.randint(-3, 4, size, generator=generator)
    return torch.randn(size, generator=generator, dtype=torch.float64)


# A copy to a GPU waits for it, as long as other processes of the run have it. All values of a case: those of four
# tensors in four dtypes, random and integer.
@functools.lru_cache(maxsize=32)
def drawn_on(device: str, dtype: torch.dtype, size: tuple[int, ...], seed: int, integers: bool) -> Tensor:
    return drawn(size, seed, integers).to(dtype).to(device)


@dataclasses.dataclass(frozen=True)
class Case:
    """x[N,C,H,W] * w[K,C/groups,R,S] + bias[K] -> y[N,K,P,Q]. `padding` is (H, W) or (top, bottom, left, right)."""

    name: str
    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = True
    edge: bool = False  # belongs to the small set that runs under compute-sanitizer

    def __str__(self) -> str:
        return self.name

    @property
    def padding4(self) -> tuple[int, int, int, int]:
        """(top, bottom, left, right)."""
        if len(self.padding) == 4:
            top, bottom, left, right = self.padding
            return top, bottom, left, right
        h, w = self.padding
        return h, h, w, w

    @property
    def P(self) -> int:
        top, bottom, _, _ = self.padding4
        return (self.H + top + bottom - (self.R - 1) * self.dilation[0] - 1) // self.stride[0] + 1

    @property
    def Q(self) -> int:
        _, _, left, right = self.padding4
        return (self.W + left + right - (self.S - 1) * self.dilation[1] - 1) // self.stride[1] + 1

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        return self.K, self.C // self.groups, self.R, self.S

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        return self.N, self.K, self.P, self.Q

    @property
    def args(self) -> tuple[tuple[int, int], tuple[int, ...], tuple[int, int], int]:
        """What follows the tensors in a call: (stride, padding, dilation, groups)."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def empty(self) -> bool:
        """No product is summed: a dimension of the reduction or of the result is zero."""
        return 0 in (self.N, self.C, self.H, self.W, self.K)

    def reduction(self, op: str) -> int:
        """How many products are summed into one element of the result of `op` ("fprop", "dgrad", "wgrad", "bias")."""
        if op == "fprop":
            return self.C // self.groups * self.R * self.S
        if op == "dgrad":
            return self.K // self.groups * self.R * self.S
        return self.N * self.P * self.Q

    @property
    def large(self) -> bool:
        """Large for the sake of a GPU: more tiles than SMs, tensors beyond a cache. The CPU, where such a case takes up
        to a minute and shows what small ones do, leaves it out."""
        elements = math.prod(self.input_size) + math.prod(self.output_size)
        return elements > 1 << 19 or self.N * self.P * self.Q * self.K * self.reduction("fprop") > 1 << 24

    @property
    def seed(self) -> int:
        """Differs from case to case, but not from run to run as hash() does."""
        return zlib.crc32(self.name.encode())

    def draw(
        self,
        size: Sequence[int],
        dtype: torch.dtype,
        seed: int,
        integers: bool = False,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Values drawn and rounded to `dtype` on the CPU: standard normal, or integers in [-3, 3]."""
        if torch.device(device).type == "meta":
            return torch.empty(tuple(size), dtype=dtype, device=device)
        return drawn_on(str(device), dtype, tuple(size), self.seed + seed, integers).clone()

    def tensors(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        layout: str = "nchw",
        seed: int = 0,
        integers: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(input, weight, bias). `layout` is a key of `layouts.LAYOUTS`: the values do not depend on it."""
        from layouts import LAYOUTS

        at_input, at_weight, _ = LAYOUTS[layout]
        x = at_input(self.draw(self.input_size, dtype, seed, integers, device), device)
        w = at_weight(self.draw(self.weight_size, dtype, seed + 1, integers, device), device)
        b = self.draw((self.K,), dtype, seed + 2, integers, device) if self.bias else None
        return x, w, b

    def grad_output(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        layout: str = "nchw",
        seed: int = 0,
        integers: bool = False,
    ) -> Tensor:
        from layouts import LAYOUTS

        return LAYOUTS[layout][2](self.draw(self.output_size, dtype, seed + 3, integers, device), device)


# Sizes are small so that the whole suite takes minutes on two cores; what differs between the cases is which
# branch of a kernel they reach, and the name says which.
CASES: tuple[Case, ...] = (
    # plain layers
    Case("3x3", 2, 16, 9, 10, 24, 3, 3, padding=(1, 1), edge=True),
    Case("3x3_no_bias", 2, 8, 7, 7, 8, 3, 3, bias=False),
    Case("1x1", 2, 32, 7, 9, 40, 1, 1),
    Case("1x1_stride2", 2, 24, 9, 8, 16, 1, 1, stride=(2, 2), edge=True),
    Case("1x1_padded", 1, 8, 4, 4, 8, 1, 1, padding=(1, 2)),
    Case("1x1_strided_padded", 1, 8, 6, 5, 8, 1, 1, stride=(2, 3), padding=(1, 1), bias=False),
    Case("one_pixel", 3, 12, 1, 1, 20, 1, 1),
    # packed as whole runs of channels, results at odd pixels by turns
    Case("runs_3x3_72_channels", 3, 72, 7, 7, 40, 3, 3, padding=(1, 1), edge=True),
    Case("runs_5x5_images_9x7", 2, 24, 9, 7, 136, 5, 5, padding=(2, 2), bias=False),
    Case("odd_pixels_2_columns_of_tiles", 3, 40, 13, 15, 264, 1, 1, edge=True),
    # images of whole vectors of pixels: any number of channels, runs of pixels that end early, blocks of several tiles
    Case("planes_24_to_144", 3, 24, 12, 10, 144, 1, 1, edge=True),
    Case("planes_37_to_61", 5, 37, 8, 9, 61, 1, 1, edge=True),
    Case("planes_200_to_24", 2, 200, 16, 17, 24, 1, 1, bias=False),
    Case("planes_8_to_600_many_images", 37, 8, 8, 25, 600, 1, 1),
    # tiles in turns, whose filters stay, of the next filters in each turn
    Case("planes_24_to_144_in_turns", 37, 24, 32, 32, 144, 1, 1),
    # pixels_turns.cuh: several tiles of one image a block, of 128 rows and fewer.
    Case("planes_12x12_in_turns", 70, 200, 12, 12, 264, 1, 1, edge=True),
    Case("windows_several_tiles_a_block", 37, 24, 37, 35, 136, 1, 1),
    Case("windows_whole_images", 9, 70, 7, 7, 72, 1, 1, edge=True),
    # two channels a row of vectors, tiles of filters alone and in pairs, that end early
    Case("halves_72_to_136", 5, 72, 14, 14, 136, 1, 1, edge=True),
    Case("halves_200_to_328_of_7x28", 70, 200, 7, 28, 328, 1, 1),
    Case("one_of_everything", 1, 1, 1, 1, 1, 1, 1),
    Case("window_is_the_input", 3, 6, 5, 4, 10, 5, 4),
    # axes that a filter covers whole, in products of several tiles (folded.h)
    Case("window_is_the_input_40_channels", 70, 40, 4, 5, 136, 4, 5, stride=(2, 1), edge=True),
    Case("window_as_wide_as_the_input", 5, 1, 19, 40, 72, 3, 40, padding=(1, 0)),
    Case("window_as_high_as_the_input", 2, 24, 9, 37, 40, 9, 3, padding=(0, 1), bias=False),
    Case("steps_2x2_24_channels", 3, 24, 10, 12, 40, 2, 2, stride=(2, 2), edge=True),
    Case("steps_4x8_64_channels", 2, 64, 20, 24, 72, 4, 8, stride=(4, 8), bias=False),
    Case("patches_4x4_stride4", 2, 3, 16, 12, 32, 4, 4, stride=(4, 4)),
    Case("patches_8x2", 1, 2, 24, 10, 24, 8, 2, stride=(8, 2), bias=False),
    # of no whole number of vectors; pixels that no patch meets; longer steps than the copy engine's
    Case("patches_14x14_left_over", 2, 3, 30, 44, 40, 14, 14, stride=(14, 14)),
    Case("patches_10x9_of_5_channels", 3, 5, 21, 20, 24, 10, 9, stride=(10, 9)),
    Case("patches_16x16_by_10", 2, 1, 46, 64, 24, 16, 16, stride=(10, 10)),
    Case("patches_1x20_by_9_padded", 3, 6, 2, 90, 40, 1, 20, stride=(1, 9), padding=(0, 3)),
    Case("patches_of_far_taps", 2, 8, 5, 300, 24, 3, 3, padding=(1, 140), dilation=(1, 140)),
    Case("taps_beyond_the_image", 2, 16, 20, 24, 20, 5, 3, (2, 1), padding=(50, 9), dilation=(25, 9)),
    # dgrad of more phases than a launch takes; steps beyond the filter; far taps, of every other row and column
    Case("phases_9x9_by_5", 2, 24, 33, 37, 20, 9, 9, (5, 5), (2, 3)),
    Case("phases_3x7_by_6x5_dilated", 1, 40, 25, 31, 36, 3, 7, (6, 5), (1, 0), (2, 1)),
    Case("steps_of_10_beyond_3x3", 2, 20, 33, 44, 24, 3, 3, (10, 10), (1, 2)),
    Case("steps_beyond_a_dilated_filter", 1, 12, 40, 37, 20, 3, 2, (7, 9), (2, 0), (3, 2)),
    Case("far_columns_in_two_parts", 1, 24, 9, 300, 20, 3, 3, padding=(1, 130), dilation=(1, 130)),
    Case("far_taps_in_four_parts", 1, 16, 280, 290, 16, 3, 3, padding=(130, 132), dilation=(130, 132)),
    # lean: channels that are no whole vectors, of one and several lines; phases that meet no pixel, one tap and more;
    # patches of a product's columns
    Case("lean_18_to_19", 3, 18, 14, 13, 19, 3, 3, padding=(1, 1), edge=True),
    Case("lean_70_to_37", 2, 70, 9, 11, 37, 3, 3, padding=(1, 0)),
    Case("lean_phases_3x3", 3, 40, 13, 10, 36, 3, 3, (2, 2), (1, 1), edge=True),
    Case("lean_phases_2x1_by_2x2", 2, 68, 10, 9, 72, 2, 1, (2, 2), bias=False),
    Case("lean_phases_of_rows_dilated", 1, 24, 17, 15, 132, 3, 3, (4, 1), (2, 1), (2, 1)),
    Case("patches_of_8_channels_to_136", 2, 8, 13, 12, 136, 4, 4, padding=(2, 2), edge=True),
    Case("patches_of_3_channels_to_200", 3, 3, 12, 11, 200, 3, 5, (2, 1), (1, 2)),
    # Of 128x256, filters that stay, and tiles with rows of taps in the padding.
    Case("far_rows_few_weights", 1, 16, 280, 290, 16, 3, 2, padding=(130, 66), dilation=(130, 132)),
    # dgrad: the one column meets no tap, and its rows' box would begin beyond what a map holds.
    Case("far_rows_no_taps", 1, 160, 7, 1, 96, 3, 2, (1, 7), (0, 137, 2, 1), (2, 1)),
    # few channels or filters
    Case("stem_3x3_stride2", 2, 3, 21, 70, 32, 3, 3, stride=(2, 2), padding=(1, 1)),
    Case("stem_7x7_stride2_72_filters", 1, 3, 22, 40, 72, 7, 7, stride=(2, 2), padding=(3, 3)),
    Case("stem_11x11_stride4", 1, 3, 47, 43, 40, 11, 11, stride=(4, 4), padding=(2, 2), bias=False),
    Case("stem_one_channel_5x20", 2, 1, 12, 75, 20, 5, 20, stride=(2, 2), edge=True),
    Case("stem_five_channels_wide", 1, 5, 6, 600, 16, 3, 2, padding=(1, 0)),
    # An odd number of chunks and few pixels: stem_halo.cuh reads zeros beyond a tile too. Odd rows of results.
    Case("stem_five_channels_stride3", 1, 5, 23, 11, 56, 3, 3, (3, 3), (1, 1), edge=True),
    Case("stem_odd_rows_20_filters", 2, 3, 19, 37, 20, 3, 3, (2, 2), (1, 1), edge=True),
    # Filters that are no whole vectors; rows of x that are, whose columns may lie apart.
    Case("stem_one_channel_30_filters", 2, 1, 12, 40, 30, 3, 3, (2, 2), (1, 1), edge=True),
    # Whole vectors of few channels (stem_vectors.cuh): an odd number of chunks, a tile's end within an image; stride 2.
    Case("few_vectors_of_8_channels", 2, 8, 19, 37, 24, 3, 3, padding=(1, 1), edge=True),
    Case("few_vectors_of_24_channels_stride2", 2, 24, 17, 70, 72, 3, 3, (2, 2), (1, 1), edge=True),
    Case("few_filters_3x3", 1, 72, 37, 20, 3, 3, 3, padding=(1, 1), edge=True),
    Case("few_filters_5x4_four_pads", 2, 24, 9, 33, 7, 5, 4, padding=(2, 1, 0, 3), bias=False),
    # asymmetric kernels, strides, dilations, paddings
    Case("1x7", 2, 8, 6, 13, 12, 1, 7, padding=(0, 3)),
    Case("7x1", 2, 8, 13, 6, 12, 7, 1, padding=(3, 0), bias=False),
    Case("2x5_stride_1x3", 2, 5, 9, 14, 7, 2, 5, stride=(1, 3), padding=(1, 2), edge=True),
    Case("5x2_dilation_1x3", 1, 6, 9, 11, 9, 5, 2, padding=(2, 2), dilation=(1, 3)),
    Case("even_kernel_4x4", 2, 8, 8, 9, 8, 4, 4, stride=(2, 2), padding=(1, 1)),
    Case("four_pads", 2, 7, 6, 7, 11, 3, 3, padding=(0, 2, 1, 3), edge=True),
    Case("four_pads_stride2", 1, 8, 7, 8, 16, 3, 3, stride=(2, 2), padding=(0, 1, 0, 1), bias=False),
    Case("four_pads_one_side", 1, 3, 5, 5, 4, 3, 2, padding=(3, 0, 0, 0)),
    Case("four_pads_grouped_dilated", 2, 8, 8, 9, 8, 3, 3, (2, 1), (2, 1, 0, 3), (2, 3), 4, edge=True),
    Case("one_channel_1x7_stride2", 2, 1, 4, 8, 3, 1, 7, stride=(1, 2)),
    # strides that do not divide, strides larger than the kernel
    Case("stride2", 2, 16, 11, 12, 16, 3, 3, stride=(2, 2), padding=(1, 1), edge=True),
    # dgrad keeps the pixels of a tile for all phases of the stride; to up to 64 channels a warpgroup has two of these.
    Case("stride2_136_channels", 3, 136, 17, 20, 72, 3, 3, stride=(2, 2), padding=(1, 1), edge=True),
    Case("stride2_72_channels_5x4", 2, 72, 12, 9, 40, 5, 4, stride=(2, 2), padding=(2, 1, 0, 3), bias=False),
    Case("stride2_56_channels_4x3", 3, 56, 18, 15, 24, 4, 3, stride=(2, 2), padding=(1, 2, 1, 0), edge=True),
    Case("stride_3x2_uneven", 1, 6, 13, 12, 10, 3, 3, stride=(3, 2)),
    Case("stride_larger_than_kernel", 2, 8, 13, 14, 12, 2, 3, stride=(4, 5), padding=(1, 0), edge=True),
    Case("stride_larger_than_input", 2, 5, 6, 6, 7, 3, 3, stride=(9, 7), padding=(1, 1)),
    Case("1x1_several_tiles_a_block", 3, 16, 112, 112, 192, 1, 1),
    Case("1x1_several_tiles_a_block_72_channels", 2, 72, 96, 96, 136, 1, 1),
    # Filters that stay in shared memory, a part of them in each block.
    Case("1x1_filters_stay_in_parts", 1, 520, 57, 41, 392, 1, 1, padding=(1, 0), edge=True),
    Case("1x1_stride5", 2, 8, 11, 12, 8, 1, 1, stride=(5, 5), bias=False),
    # zeros between results of 1x1 filters: five tiles of channels, rows of an image with a tap and without
    Case("1x1_stride2_C1032_K1032", 3, 1032, 9, 11, 1032, 1, 1, stride=(2, 2), bias=False),
    Case("last_rows_unread", 1, 4, 12, 11, 4, 3, 3, stride=(5, 4)),
    # strides and dilations with and without a common divisor: dgrad's phases differ
    Case("stride2_dilation2", 2, 8, 12, 13, 10, 3, 3, (2, 2), (2, 2), (2, 2), edge=True),
    Case("stride4_dilation6", 1, 6, 20, 19, 8, 3, 3, (4, 4), (5, 6), (6, 6), edge=True),
    Case("stride3_dilation2", 1, 8, 15, 14, 6, 3, 2, (3, 3), (1, 2), (2, 2), edge=True),
    Case("stride_2x3_dilation_3x2", 1, 5, 12, 13, 7, 3, 4, (2, 3), (3, 2), (3, 2)),
    Case("dilation_2x4", 2, 7, 13, 15, 9, 3, 3, padding=(2, 4), dilation=(2, 4)),
    # rows of taps that share fragments, in NCHW (tma_planes_tf32.cuh): several tiles of either side, the last not whole
    Case("planes_7x3", 3, 17, 35, 40, 66, 7, 3, padding=(3, 1), edge=True),
    Case("planes_dilation2", 2, 36, 18, 72, 130, 3, 3, padding=(2, 2), dilation=(2, 2), bias=False),
    Case("dilation_of_one_tap", 1, 4, 5, 5, 4, 1, 1, dilation=(7, 9)),
    Case("dilation_touches_padding_only", 1, 4, 3, 3, 6, 3, 3, padding=(8, 8), dilation=(5, 5)),
    # rows of taps where whole tiles of pixels meet padding
    Case("dilation_rows_in_padding", 2, 40, 41, 23, 72, 3, 3, padding=(24, 9), dilation=(24, 9), edge=True),
    Case("dilation_rows_in_padding_split", 1, 520, 33, 33, 72, 3, 3, padding=(24, 24), dilation=(24, 24)),
    Case("dilation_rows_in_padding_stride2", 1, 72, 50, 60, 104, 3, 3, (2, 2), (40, 4), (40, 4), bias=False),
    # kernels larger than the input
    Case("kernel_larger_than_input", 2, 6, 3, 2, 8, 5, 7, padding=(2, 3), edge=True),
    Case("kernel_larger_one_output", 1, 4, 2, 3, 5, 6, 5, padding=(2, 1)),
    Case("padding_larger_than_kernel", 1, 5, 4, 4, 6, 3, 3, padding=(5, 6)),
    # lines
    Case("W_is_1", 2, 8, 17, 1, 12, 3, 1, padding=(1, 0)),
    Case("H_is_1", 2, 8, 1, 19, 12, 1, 5, stride=(1, 2), padding=(0, 2)),
    Case("W_is_1_padded_3x3", 1, 3, 9, 1, 5, 3, 3, padding=(1, 1), edge=True),
    Case("H_is_1_stride_in_H", 1, 4, 1, 8, 4, 1, 2, stride=(3, 1)),
    # odd channels; channels of 4 and 8
    Case("C1_K1", 2, 1, 9, 9, 1, 3, 3, padding=(1, 1), edge=True),
    Case("C3_K5", 2, 3, 8, 9, 5, 3, 3, padding=(1, 1)),
    Case("C5_K7", 2, 5, 8, 7, 7, 3, 3),
    Case("C7_K13", 1, 7, 9, 8, 13, 3, 3, padding=(1, 0), bias=False),
    Case("C13_K3", 2, 13, 7, 8, 3, 3, 3, edge=True),
    Case("C4_K12", 2, 4, 8, 8, 12, 3, 3, padding=(1, 1), edge=True),
    Case("C12_K4", 2, 12, 8, 8, 4, 3, 3, padding=(1, 1)),
    Case("C8_K32", 1, 8, 10, 9, 32, 3, 3),
    # A few filters more than a tile; steps of the reduction that end within a tap; several of its tables.
    Case("C20_K132", 3, 20, 19, 17, 132, 5, 3, (2, 1), (3, 0), (1, 2), bias=False),
    # winograd.cuh: channels and tiles that end within a block's; the widths of its blocks.
    Case("C36_K132_four_pads", 2, 36, 9, 37, 132, 3, 3, padding=(0, 2, 1, 3), edge=True),
    Case("C64_K36_7x7", 3, 64, 7, 7, 36, 3, 3, padding=(1, 1), edge=True),
    Case("groups3_of_36_and_44", 2, 108, 6, 9, 132, 3, 3, padding=(1, 1), groups=3, edge=True),
    Case("C32_K40_padding_beyond_the_filter", 1, 32, 20, 11, 40, 3, 3, padding=(4, 4), bias=False),
    # tma_strict.cuh: filters of NCHW of more taps than a tile has, split as they lie.
    Case("C36_K132_5x5_four_pads", 2, 36, 9, 37, 132, 5, 5, padding=(1, 2, 0, 3), edge=True),
    # tma_strict_turned.cuh, tma_strict_phases.cuh, small_images_wgrad.cuh: tiles that end early, phases without taps.
    Case("C132_K20_dilated", 2, 132, 14, 15, 20, 3, 5, padding=(2, 3), dilation=(2, 1), bias=False),
    Case("C3_K64_11x11_stride4", 2, 3, 37, 41, 64, 11, 11, (4, 4), (2, 2), edge=True),
    Case("C5_K36_stride_1x3", 1, 5, 20, 33, 36, 3, 7, (1, 3), (0, 2, 2, 1)),
    Case("C9_K20_3x3_stride2", 2, 9, 17, 70, 20, 3, 3, (2, 2), (1, 2), bias=False),
    # few_depth.cuh: planes of whole vectors and others, more filters than a block has.
    Case("C12_K20_1x1_planes", 3, 12, 10, 14, 20, 1, 1, edge=True),
    Case("C7_K300_1x1_odd_planes", 2, 7, 9, 7, 300, 1, 1),
    Case("C300_K5_1x1_odd_planes", 2, 300, 7, 9, 5, 1, 1, bias=False),
    Case("C37_K70_few_pixels", 1, 37, 8, 7, 70, 3, 3, padding=(1, 0, 2, 1), edge=True),
    Case("C1_K64", 1, 1, 12, 12, 64, 5, 5, padding=(2, 2)),
    Case("C64_K1", 1, 64, 10, 8, 1, 3, 3, padding=(1, 1)),
    Case("stem_7x7_stride2", 1, 3, 22, 21, 16, 7, 7, stride=(2, 2), padding=(3, 3), bias=False),
    # groups
    Case("groups2", 2, 8, 7, 8, 12, 3, 3, padding=(1, 1), groups=2, edge=True),
    Case("groups3_odd", 2, 9, 7, 6, 15, 3, 2, stride=(1, 2), groups=3),
    Case("groups4_few_outputs", 1, 32, 6, 6, 4, 3, 3, padding=(1, 1), groups=4, bias=False),
    # More results in a row than there are pixels and zeros beside them.
    Case("groups3_of_8_and_24_padding_beyond_the_filter", 3, 24, 1, 9, 72, 5, 2, padding=(3, 3), groups=3),
    Case("groups8_of_24_and_8_padding_beyond_the_filter", 2, 192, 2, 23, 64, 3, 1, padding=(1, 1), groups=8),
    Case("groups4_many_outputs", 1, 4, 6, 7, 64, 3, 3, padding=(1, 1), groups=4),
    Case("groups8_of_8", 1, 64, 6, 6, 64, 3, 3, padding=(1, 1), groups=8),
    Case("groups2_of_64", 1, 128, 5, 5, 128, 3, 3, padding=(1, 1), groups=2),
    Case("groups2_of_64_stride2", 3, 128, 15, 18, 128, 3, 3, (2, 2), (1, 1), groups=2),
    Case("groups2_of_56_7x7", 3, 112, 7, 7, 80, 7, 7, padding=(3, 3), groups=2),
    Case("groups10_of_12", 2, 120, 9, 10, 120, 3, 3, padding=(1, 1), groups=10, edge=True),
    Case("groups16_of_3", 3, 48, 10, 8, 48, 3, 3, padding=(1, 1), groups=16),
    Case("groups8_of_6", 3, 48, 9, 12, 48, 3, 3, padding=(1, 1), groups=8, edge=True),
    Case("groups8_of_5_odd_rows", 5, 40, 16, 7, 40, 3, 3, padding=(1, 1), groups=8),
    Case("groups8_of_7_to_5", 2, 56, 8, 9, 40, 3, 3, padding=(1, 1), groups=8),
    Case("groups4_of_32", 3, 128, 9, 8, 128, 3, 3, padding=(1, 1), groups=4),
    Case("groups4_of_32_stride2", 5, 128, 15, 14, 128, 3, 3, (2, 2), (1, 1), groups=4, edge=True),
    Case("groups5_of_16", 2, 80, 9, 10, 80, 3, 3, padding=(1, 1), groups=5),  # four merged, and one
    # tma_lean.cuh: steps that are a group's, lines that end with one (80 of 128 channels), several tiles of a group
    Case("groups3_of_80_and_48", 2, 240, 9, 11, 144, 3, 3, padding=(1, 1), groups=3, edge=True),
    Case("groups2_of_32_and_160", 2, 64, 8, 9, 320, 3, 3, padding=(1, 1), groups=2),
    Case("groups3_of_20_stride2", 2, 60, 11, 12, 60, 3, 3, (2, 2), (1, 1), groups=3),
    # Lines: runs of a unit's results that meet parts of its inputs, several runs and more than one pair of blocks.
    Case("groups4_of_20_and_12", 3, 80, 10, 12, 48, 3, 3, padding=(1, 1), groups=4),
    Case("groups4_of_12_and_20", 2, 48, 12, 9, 80, 3, 3, padding=(1, 1), groups=4),
    Case("groups16_of_3_and_6", 2, 48, 9, 17, 96, 3, 3, padding=(1, 1), groups=16, edge=True),
    Case("groups6_of_9", 2, 54, 9, 10, 54, 3, 3, padding=(1, 1), groups=6),
    Case("groups5_of_1x1", 2, 15, 4, 5, 10, 1, 1, groups=5),
    Case("groups4_one_product", 2, 32, 5, 6, 4, 1, 1, groups=4),  # dgrad: what strict float32 rounds once
    # 1x1 over NCHW in place: whole vectors of pixels, fours of them, small planes; filters by words
    Case("groups3_of_40_and_24_1x1", 2, 120, 12, 12, 72, 1, 1, groups=3, edge=True),
    Case("groups2_of_72_and_136_1x1", 3, 144, 14, 14, 272, 1, 1, groups=2),
    Case("groups2_of_48_and_64_1x1", 5, 96, 7, 7, 128, 1, 1, groups=2, edge=True),
    Case("groups4_of_26_and_14_1x1", 3, 104, 9, 7, 56, 1, 1, groups=4, edge=True),
    Case("depthwise", 2, 16, 9, 10, 16, 3, 3, padding=(1, 1), groups=16, edge=True),
    Case("depthwise_stride2", 2, 24, 11, 10, 24, 3, 3, (2, 2), (1, 1), groups=24, bias=False),
    Case("depthwise_multiplier2", 2, 7, 8, 9, 14, 3, 3, padding=(1, 1), groups=7, edge=True),
    Case("depthwise_multiplier3_dilated", 1, 5, 11, 10, 15, 3, 3, (1, 2), (2, 2), (2, 2), 5),
    Case("depthwise_9x9", 1, 8, 14, 13, 8, 9, 9, padding=(4, 4), groups=8),
    Case("depthwise_13x13_of_24", 3, 24, 17, 20, 24, 13, 13, padding=(6, 6), groups=24, edge=True),
    Case("depthwise_31x31", 1, 3, 20, 18, 3, 31, 31, padding=(15, 15), groups=3),
    Case("depthwise_1x1", 2, 8, 5, 5, 8, 1, 1, groups=8),
    Case("depthwise_1x1_stride2", 3, 40, 13, 14, 40, 1, 1, (2, 2), groups=40, edge=True),
    Case("depthwise_1x1_apart", 2, 9, 11, 10, 9, 1, 1, (3, 1), groups=9, bias=False),
    Case("depthwise_1x1_many_pixels", 9, 24, 28, 28, 24, 1, 1, groups=24, edge=True),
    Case("depthwise_copied", 3, 5, 33, 65, 5, 5, 5, padding=(2, 1, 3, 2), groups=5, edge=True),
    Case("depthwise_copied_stride2", 3, 10, 37, 75, 10, 5, 5, (2, 2), (2, 2), groups=10, edge=True),
    Case("depthwise_copied_below", 2, 40, 70, 201, 40, 5, 5, padding=(0, 100, 0, 0), groups=40),
    Case("depthwise_copied_bands", 1, 2, 150, 149, 2, 3, 3, (2, 2), (1, 2, 1, 0), groups=2, bias=False),
    Case("depthwise_multiplier5", 2, 8, 9, 8, 40, 3, 3, (2, 1), (1, 1), groups=8),
    Case("depthwise_2x5_dilated", 2, 9, 13, 15, 9, 2, 5, (2, 1), (0, 1, 4, 2), (3, 2), 9, edge=True),
    # filters that have kernels of their own; 512 outputs or more make their wgrad take two passes
    Case("depthwise_3x3_four_pads", 2, 33, 13, 11, 33, 3, 3, padding=(0, 2, 1, 3), groups=33),
    Case("depthwise_3x3_stride2", 3, 40, 27, 29, 40, 3, 3, (2, 2), (1, 0, 0, 2), groups=40, edge=True),
    Case("depthwise_5x5", 2, 33, 17, 19, 33, 5, 5, padding=(2, 1, 3, 2), groups=33, edge=True),
    Case("depthwise_5x5_stride2", 2, 8, 11, 14, 8, 5, 5, (2, 2), (2, 2), groups=8),
    Case("depthwise_7x7", 1, 40, 15, 14, 40, 7, 7, padding=(3, 3), groups=40, bias=False),
    Case("depthwise_7x7_stride2", 2, 8, 37, 35, 8, 7, 7, (2, 2), (3, 0, 2, 4), groups=8, edge=True),
    Case("depthwise_several_tiles", 1, 2, 60, 131, 2, 3, 3, padding=(1, 1), groups=2),
    Case("depthwise_several_tiles_stride2", 1, 1, 121, 261, 1, 5, 5, (2, 2), (2, 2)),
    # images too wide for one tile in channels_last
    Case("depthwise_wide_3x3", 1, 3, 9, 260, 3, 3, 3, padding=(1, 1), groups=3),
    Case("depthwise_wide_3x3_stride2", 3, 2, 7, 200, 2, 3, 3, (2, 2), (5, 2, 5, 1), groups=2, edge=True),
    Case("depthwise_wide_5x5_stride2", 1, 5, 28, 300, 5, 5, 5, (2, 2), (2, 3, 2, 6), groups=5),
    Case("depthwise_wide_5x5_stride2_four_pads", 1, 2, 28, 200, 2, 5, 5, (2, 2), (6, 3, 3, 0), groups=2),
    Case("depthwise_wide_7x7_stride2", 1, 2, 13, 270, 2, 7, 7, (2, 2), (3, 2, 0, 5), groups=2),
    # depthwise in NCHW by warps that walk down images: stretches, pieces of a row, images of a warp, whole planes
    Case("depthwise_stretches", 2, 2, 131, 40, 2, 3, 3, padding=(1, 1), groups=2, edge=True),
    Case("depthwise_stretches_stride2", 1, 2, 131, 72, 2, 5, 5, (2, 2), (2, 2), groups=2),
    Case("depthwise_pieces", 1, 2, 12, 272, 2, 7, 7, padding=(3, 3), groups=2),
    Case("depthwise_pieces_odd", 1, 2, 9, 263, 2, 5, 5, padding=(2, 2), groups=2),
    Case("depthwise_pieces_stride2", 1, 2, 12, 536, 2, 3, 3, (2, 2), (1, 1), groups=2),
    Case("depthwise_many_images", 37, 3, 9, 12, 3, 3, 3, padding=(1, 1), groups=3, edge=True),
    Case("depthwise_many_images_stride2", 19, 3, 9, 16, 3, 3, 3, (2, 2), (1, 1), groups=3),
    Case("depthwise_planes", 17, 16, 7, 7, 16, 5, 5, padding=(2, 2), groups=16, edge=True),
    Case("depthwise_planes_two_units", 9, 8, 14, 14, 8, 7, 7, padding=(3, 3), groups=8),
    Case("depthwise_planes_valid", 17, 8, 12, 11, 8, 4, 5, groups=8),
    Case("depthwise_planes_stride2", 19, 24, 14, 14, 24, 3, 3, (2, 2), (1, 1), groups=24, edge=True),
    Case("depthwise_planes_stretches", 5, 2, 28, 28, 2, 5, 5, padding=(2, 2), groups=2),
    Case("depthwise_planes_stretches_stride2", 5, 2, 28, 28, 2, 7, 7, (2, 2), (3, 3), groups=2, bias=False),
    # taps that outputs meet: strides and dilations with a common divisor, filters larger than their image
    Case("depthwise_met", 2, 5, 14, 19, 10, 7, 5, (6, 4), (9, 5), (4, 6), groups=5, edge=True),
    Case("groups_few", 3, 72, 7, 9, 40, 3, 5, padding=(1, 2), groups=2, edge=True),
    Case("groups_few_phases", 1, 48, 10, 7, 96, 4, 3, (3, 2), (2, 1), groups=3, edge=True),
    Case("groups_met", 2, 15, 14, 19, 20, 7, 5, (6, 4), (9, 5), (4, 6), groups=5, edge=True),
    Case("groups_met_one_output", 12, 106, 7, 7, 106, 7, 7, (7, 7), (3, 3), groups=53, bias=False),
    Case(
        "depthwise_beyond_its_image", 3, 18, 5, 4, 18, 31, 17, (1, 1), (30, 33, 16, 19), (2, 2), groups=18, bias=False
    ),
    # products of pixels: several blocks of a unit, images that are no multiple of 16, padding of other sides
    Case("depthwise_products", 35, 40, 14, 14, 40, 5, 5, padding=(2, 2), groups=40, edge=True),
    Case("depthwise_products_of_many_channels", 17, 2304, 7, 7, 2304, 7, 7, padding=(3, 3), groups=2304),
    Case("depthwise_products_four_pads", 20, 16, 5, 10, 16, 3, 3, padding=(2, 0, 0, 2), groups=16, edge=True),
    Case("depthwise_planes_of_64", 5, 4, 64, 61, 4, 3, 3, (2, 2), (1, 1), groups=4),
    Case("depthwise_planes_of_one_column", 37, 16, 9, 1, 16, 3, 3, padding=(1, 1), groups=16),
    Case("depthwise_planes_steps", 3, 8, 40, 57, 8, 7, 7, padding=(3, 3), groups=8),
    Case("depthwise_planes_steps_stride2", 2, 8, 58, 100, 8, 5, 5, (2, 2), (2, 1), groups=8),
    Case("depthwise_planes_5x5_stride2", 6, 8, 14, 13, 8, 5, 5, (2, 2), (2, 1), groups=8, edge=True),
    # bands of rows of larger planes: of several images, of rows shared by warps
    Case("depthwise_bands", 5, 8, 45, 57, 8, 3, 3, padding=(1, 1), groups=8, edge=True),
    Case("depthwise_bands_stride2", 6, 8, 67, 75, 8, 5, 5, (2, 2), (2, 1), groups=8, edge=True),
    Case("depthwise_bands_pieces", 4, 8, 41, 149, 8, 7, 7, padding=(3, 2), groups=8),
    Case("depthwise_bands_pieces_stride2", 4, 8, 58, 260, 8, 3, 3, (2, 2), (1, 1), groups=8),
    # their units of several stretches: wide rows, odd ones on either side
    Case("depthwise_units", 4, 8, 21, 150, 8, 3, 3, padding=(1, 1), groups=8),
    Case("depthwise_units_stride2", 6, 8, 36, 75, 8, 3, 3, (2, 2), (1, 1), groups=8, edge=True),
    # depthwise, few outputs: a thread for some of them
    Case("depthwise_few", 1, 37, 7, 6, 37, 3, 3, padding=(1, 1), groups=37, edge=True),
    Case("depthwise_few_stride2", 2, 24, 9, 14, 24, 3, 3, (2, 2), (1, 0), groups=24, edge=True),
    Case("depthwise_few_5x5_stride2", 1, 9, 11, 8, 9, 5, 5, (2, 2), (1, 3), groups=9),
    # filters that don't meet: four rows of outputs a thread, the last of them fewer; gaps between them; one output
    Case("depthwise_patches", 3, 24, 97, 86, 24, 16, 16, (16, 16), (4, 3), groups=24, edge=True),
    Case("depthwise_patches_apart", 3, 4, 30, 35, 4, 5, 6, (7, 8), (2, 0, 1, 3), groups=4, edge=True),
    Case("depthwise_patches_multiplier2", 2, 5, 20, 61, 10, 9, 13, (9, 13), (4, 4), groups=5),
    Case("depthwise_patches_whole", 5, 6, 9, 8, 6, 9, 8, groups=6),
    Case("depthwise_planes_in_turns", 330, 1056, 2, 2, 1056, 3, 3, padding=(1, 1), groups=1056),
    Case("depthwise_7x7_padding_1", 2, 3, 20, 28, 3, 7, 7, padding=(1, 1), groups=3),
    Case("depthwise_7x7_padding_8", 3, 2, 9, 8, 2, 7, 7, padding=(8, 9), groups=2),
    # rows of several warps, whose outputs leave by way of shared memory: rounds of its ring, ends off 16 bytes
    Case("depthwise_team", 1, 3, 70, 254, 3, 3, 3, groups=3, edge=True),
    Case("depthwise_team_odd", 2, 2, 40, 391, 2, 7, 7, padding=(3, 3), groups=2),
    Case("depthwise_team_3x7", 1, 2, 40, 256, 2, 3, 7, groups=2),
    Case("depthwise_team_stride2", 1, 3, 61, 521, 3, 5, 5, (2, 2), (2, 2), groups=3),
    # band.cuh: zeros between taps, between the pixels of grad_output
    Case("depthwise_13x13_stride2", 2, 9, 30, 27, 9, 13, 13, (2, 2), (6, 6), groups=9, edge=True),
    Case("depthwise_9x5_stride3x1", 1, 8, 29, 40, 8, 9, 5, (3, 1), (4, 0), groups=8),
    Case("depthwise_7x7_two_slices", 2, 72, 9, 61, 72, 7, 7, padding=(3, 3), groups=72, edge=True),
    # toeplitz_gather.cuh, toeplitz_wgrad.cuh: channels off 32, columns off 8, strips that begin and end within images;
    # rows in parts; runs of 8 columns alone and in pairs
    Case("depthwise_7x7_cycles", 24, 40, 34, 45, 40, 7, 7, padding=(3, 4, 0, 5), groups=40),
    Case("depthwise_7x7_parts", 3, 40, 17, 141, 40, 7, 7, padding=(3, 3), groups=40),
    Case("depthwise_9x8_parts", 3, 40, 23, 70, 40, 9, 8, padding=(4, 3), groups=40),
    Case("depthwise_5x5_runs", 19, 200, 15, 7, 200, 5, 5, padding=(2, 2), groups=200),
    Case("depthwise_5x5_pairs", 70, 328, 14, 15, 328, 5, 5, padding=(2, 1), groups=328),
    Case("depthwise_5x5_runs_few", 19, 40, 15, 7, 40, 5, 5, padding=(2, 2), groups=40),
    Case("depthwise_5x5_pairs_few", 70, 40, 14, 15, 40, 5, 5, padding=(2, 1), groups=40),
    # toeplitz_pairs.cuh: halves that are images, and parts of one; runs that do not exist, and several tiles of a row
    Case("depthwise_5x5_halves", 33, 120, 19, 26, 120, 5, 5, padding=(2, 3), groups=120),
    Case("depthwise_5x5_halves_parts", 3, 200, 19, 141, 200, 5, 5, padding=(2, 1), groups=200),
    Case("depthwise_3x3_halves", 9, 120, 15, 19, 120, 3, 3, padding=(1, 0), dilation=(2, 2), groups=120, edge=True),
    # stride 2: strips of cycles and of less, rows in parts, D's outputs that are two for each row of grad_output or one
    Case("depthwise_5x5_stride2_cycles", 9, 72, 33, 58, 72, 5, 5, (2, 2), (2, 2), groups=72, edge=True),
    Case("depthwise_5x5_stride2_parts", 2, 40, 18, 141, 40, 5, 5, (2, 2), (0, 3), groups=40),
    Case("depthwise_5x5_stride2_runs", 19, 40, 14, 15, 40, 5, 5, (2, 2), (4, 1), groups=40, bias=False),
    # 8 channels a warp
    Case("depthwise_3x3_octets", 3, 72, 15, 30, 72, 3, 3, padding=(1, 2), groups=72, edge=True),
    # column.cuh: an image of the same size by the phases of its dilation
    Case("depthwise_5x5_phases", 2, 24, 17, 22, 24, 5, 5, padding=(4, 6), dilation=(2, 3), groups=24, edge=True),
    # depthwise_wide.cuh: slices of 16 words of channels, of which the last has fewer; rows of few channels
    Case("depthwise_3x3_slices", 2, 120, 9, 13, 120, 3, 3, padding=(1, 1), groups=120, edge=True),
    Case("depthwise_3x3_stride2_slices", 3, 58, 12, 15, 58, 3, 3, (2, 2), (0, 2), groups=58, edge=True),
    Case("depthwise_3x3_across", 3, 11, 14, 37, 11, 3, 3, padding=(1, 1), groups=11),
    # depthwise_flat.cuh, which small layers do not take: words that are of two pixels, several slices of a row
    Case("depthwise_3x3_flat", 24, 67, 57, 60, 67, 3, 3, padding=(1, 1), groups=67),
    Case("depthwise_3x3_flat_slices", 17, 131, 40, 52, 131, 3, 3, padding=(1, 1), groups=131, bias=False),
    # stream_runs.cuh: words of two rows, planes that begin off 16 bytes, several blocks of a plane
    Case("depthwise_3x3_runs", 3, 5, 13, 67, 5, 3, 3, padding=(1, 1), groups=5, edge=True),
    Case("depthwise_3x3_runs_several", 2, 3, 70, 69, 3, 3, 3, padding=(1, 1), groups=3),
    Case("depthwise_3x3_stride2_runs", 3, 5, 12, 65, 5, 3, 3, (2, 2), (1, 1), groups=5, edge=True),
    Case("depthwise_3x3_stride2_runs_parts", 2, 3, 131, 129, 3, 3, 3, (2, 2), (1, 1), groups=3, bias=False),
    # depthwise_near.cuh: filters of a channel in a word, and in neighbouring lanes
    Case("depthwise_7x7_stride2_multiplier2", 3, 24, 17, 15, 48, 7, 7, (2, 2), (3, 3), groups=24, edge=True),
    Case("depthwise_3x3_stride2_multiplier2", 3, 40, 17, 14, 80, 3, 3, (2, 2), (1, 0), groups=40, edge=True),
    Case("depthwise_5x5_stride2_multiplier2", 5, 16, 15, 18, 32, 5, 5, (2, 2), (2, 1), groups=16, edge=True),
    Case("depthwise_3x3_multiplier2_of_24", 3, 24, 11, 19, 48, 3, 3, padding=(1, 0), groups=24, edge=True),
    Case("depthwise_5x5_multiplier2_of_40", 5, 40, 9, 35, 80, 5, 5, padding=(2, 2), dilation=(2, 1), groups=40),
    Case("depthwise_7x7_multiplier2_of_8", 2, 8, 15, 12, 16, 7, 7, padding=(3, 2), groups=8, edge=True),
    # column.cuh in float32: pairs of lanes that add up; several strips, slices and images, the last not whole
    Case("depthwise_7x7_multiplier2_strips", 5, 28, 13, 30, 56, 7, 7, padding=(2, 3), groups=28),
    Case("depthwise_5x5_multiplier2_dilated", 3, 12, 17, 22, 24, 5, 5, padding=(4, 4), dilation=(2, 2), groups=12),
    Case("depthwise_3x3_multiplier8", 2, 12, 9, 11, 96, 3, 3, padding=(1, 0), groups=12, edge=True),
    Case("depthwise_1x3_far_from_the_image", 1, 50, 12, 3, 50, 1, 3, (3, 3), (1, 1, 690, 2), (7, 1), groups=50),
    Case("depthwise_7x7_dilated", 3, 8, 33, 31, 8, 7, 7, padding=(9, 6), dilation=(3, 2), groups=8),
    Case("depthwise_7x7_wide_phases", 3, 40, 15, 19, 40, 7, 7, padding=(7, 9), dilation=(2, 3), groups=40, edge=True),
    Case("depthwise_3x3_phases", 2, 72, 11, 33, 72, 3, 3, padding=(12, 12), dilation=(12, 12), groups=72),
    Case("depthwise_5x11_stride2_dilated", 1, 16, 40, 50, 16, 5, 11, (2, 3), (3, 1, 8, 9), (3, 2), 16),
    # strip.cuh: neighbouring threads with images, with 8 rows; parts of a filter with a stride, classes of a dilation
    Case("depthwise_11x11_images", 11, 5, 9, 10, 5, 11, 11, padding=(5, 5), groups=5, edge=True),
    Case("depthwise_9x9_rows", 2, 3, 24, 40, 3, 9, 9, padding=(4, 4), groups=3),
    Case("depthwise_10x9_stride2_images", 9, 4, 31, 30, 4, 10, 9, (2, 2), (4, 5), groups=4),
    Case("depthwise_8x8_stride4_dilated", 2, 4, 50, 47, 4, 8, 8, (4, 4), (9, 6), (2, 2), 4),
    # strip_rows.cuh, strip_sums.cuh: tiles of rows and of columns, several images; column.cuh: a thread has few columns
    Case("depthwise_13x15_tiles", 1, 5, 70, 75, 5, 13, 15, padding=(6, 7), groups=5),
    Case("depthwise_9x9_images", 9, 6, 14, 13, 6, 9, 9, padding=(1, 4, 8, 3), groups=6, edge=True),
    Case("depthwise_11x11_columns", 2, 12, 17, 33, 12, 11, 11, padding=(5, 5), groups=12, edge=True),
    Case("depthwise_7x7_four_channels", 2, 4, 15, 197, 4, 7, 7, padding=(5, 1), groups=4),
    Case("depthwise_13x13_columns", 3, 8, 15, 20, 8, 13, 13, padding=(6, 3), groups=8, edge=True),
    # band_split.cuh: tiles of columns, tiles of rows and channels beyond the last
    Case("depthwise_17x9_columns", 1, 6, 30, 141, 6, 17, 9, padding=(9, 4), groups=6),
    Case("depthwise_9x12_rows", 2, 5, 75, 19, 5, 9, 12, padding=(0, 3, 6, 13), groups=5, edge=True),
    # stream_taller.cuh, stream_sums.cuh: windows without a column left, an odd number of rows, steps' last columns
    Case("depthwise_9x9_of_33_columns", 3, 8, 20, 33, 8, 9, 9, groups=8, edge=True),
    Case("depthwise_13x10_of_66_columns", 2, 16, 21, 66, 16, 13, 10, padding=(5, 6, 1, 4), groups=16),
    Case("depthwise_10x10_of_32_columns", 3, 8, 32, 32, 8, 10, 10, padding=(1, 1), groups=8),
    Case("depthwise_12x12_of_48_columns", 3, 8, 33, 48, 8, 12, 12, padding=(3, 3), groups=8),
    Case("depthwise_10x13_small", 5, 24, 9, 7, 24, 10, 13, padding=(4, 6), groups=24),
    Case("depthwise_15x15_of_33_columns", 3, 8, 22, 33, 8, 15, 15, padding=(7, 7), groups=8, edge=True),
    Case("depthwise_14x15_of_50_columns", 2, 16, 19, 50, 16, 14, 15, padding=(3, 8, 6, 4), groups=16),
    Case("depthwise_15x14_small", 5, 24, 9, 7, 24, 15, 14, padding=(7, 6), groups=24),
    Case("depthwise_9x9_stride2_four_pads", 4, 8, 19, 34, 8, 9, 9, (2, 2), (4, 3, 2, 5), groups=8, edge=True),
    # dgrad: rows of y many times as long as x's.
    Case("depthwise_far_padding", 13, 4, 6, 1, 4, 2, 6, padding=(3, 3, 273, 0), groups=4),
    # filters that lie apart, from L1
    Case("depthwise_2x2_apart", 3, 9, 12, 14, 18, 2, 2, (2, 2), groups=9, edge=True),
    Case("depthwise_4x3_gaps", 2, 5, 23, 22, 5, 4, 3, (5, 4), (2, 1, 0, 3), groups=5, edge=True),
    Case("depthwise_7x7_apart", 2, 8, 30, 37, 8, 7, 7, (7, 7), (1, 2), groups=8),
    Case("depthwise_3x1", 2, 5, 17, 20, 5, 3, 1, padding=(1, 0), groups=5),
    Case("depthwise_3x1_stride2x3", 2, 8, 17, 20, 8, 3, 1, (2, 3), (1, 1), groups=8),
    Case("depthwise_5x1_dilated_multiplier2", 2, 5, 17, 19, 10, 5, 1, (1, 1), (4, 1), (2, 3), 5),
    Case("depthwise_3x7", 2, 5, 17, 36, 5, 3, 7, groups=5),
    Case("depthwise_7x2_stride2", 2, 5, 17, 36, 5, 7, 2, (2, 2), (3, 1), groups=5),
    # few channels a group: units of one or several groups, runs of one to four blocks, several squares and images
    Case("groups16_of_4_several_tiles", 3, 64, 19, 37, 64, 3, 3, padding=(1, 1), groups=16, edge=True),
    Case("groups4_of_16_stride2", 2, 64, 19, 21, 64, 3, 3, (2, 2), (1, 0, 2, 1), groups=4, edge=True),
    Case("groups8_of_2_and_4_5x5", 2, 16, 12, 13, 32, 5, 5, padding=(2, 2), groups=8),
    Case("groups2_of_40_and_24", 1, 80, 9, 17, 48, 3, 3, padding=(1, 1), groups=2),
    Case("groups4_of_32_small_images", 5, 128, 7, 7, 128, 3, 3, padding=(1, 1), groups=4),
    Case("groups5_of_16_many_small_images", 150, 80, 7, 7, 80, 3, 3, padding=(1, 1), groups=5),
    Case("groups4_of_16_14_rows", 2, 64, 14, 9, 64, 3, 3, padding=(1, 1), groups=4),
    Case("groups8_of_8_12_rows", 2, 64, 12, 15, 64, 3, 3, padding=(1, 1), groups=8),
    # 3x3 with strides by lines: three blocks of filters, a set of two that stand for three, columns of one remainder
    Case("groups3_of_24_stride2", 3, 72, 13, 18, 72, 3, 3, (2, 2), (1, 1), groups=3, edge=True),
    Case("groups2_of_40_stride2x1", 2, 80, 23, 9, 80, 3, 3, (2, 1), (1, 1), groups=2),
    Case("groups8_of_8_stride1x2", 2, 64, 11, 20, 64, 3, 3, (1, 2), (1, 2), groups=8),
    Case("groups4_of_16_one_column_stride2", 2, 64, 9, 1, 64, 3, 3, (2, 2), (1, 1), groups=4),
    Case("groups132_of_8_many_tiles", 12, 1056, 9, 17, 1056, 3, 3, padding=(1, 1), groups=132),
    Case("groups5_of_24_odd_sides", 3, 120, 13, 21, 120, 3, 3, padding=(1, 1), groups=5, edge=True),
    Case("groups8_of_8_stride3", 2, 64, 20, 26, 64, 5, 5, (3, 3), (2, 2), groups=8),
    # rows of NCHW that begin anywhere within 16 bytes, slabs that are not whole, or are halved
    Case("groups13_of_8_odd_images", 2, 104, 27, 25, 104, 3, 3, padding=(1, 1), groups=13, edge=True),
    Case("groups8_of_8_56_columns_stride2", 1, 64, 20, 56, 64, 3, 3, (2, 2), (1, 1), groups=8),
    Case("groups8_of_8_padding_9", 2, 64, 6, 40, 64, 3, 3, padding=(9, 2), groups=8),
    # many channels a group in NCHW: whole images and parts, two lines of channels, phases
    Case("groups2_of_72_and_136", 3, 144, 14, 14, 272, 3, 3, padding=(1, 1), groups=2, edge=True),
    Case("groups3_of_40_five_images", 5, 120, 7, 7, 72, 3, 3, padding=(1, 1), groups=3),
    Case("groups2_of_64_rows", 2, 128, 27, 28, 128, 3, 3, padding=(1, 1), groups=2),
    Case("groups2_of_64_and_72_stride2", 2, 128, 15, 28, 144, 3, 3, (2, 2), (1, 1), groups=2),
    Case("groups2_of_24_four_pads", 3, 48, 9, 13, 80, 3, 2, (2, 1), (2, 0, 1, 3), (1, 2), 2, edge=True),
    # images of whole vectors of pixels, rows that begin within one, and more tiles than blocks
    Case("groups8_of_8_28_columns", 3, 64, 26, 28, 64, 3, 3, padding=(1, 1), groups=8, edge=True),
    # rings of small images that come round
    Case("groups66_of_8_forty_one_images", 41, 528, 3, 4, 528, 3, 3, padding=(1, 1), groups=66),
    Case("groups4_of_16_28_columns_stride2", 2, 64, 18, 28, 64, 3, 3, (2, 2), (1, 1), groups=4),
    Case("groups2_of_16_14_columns_stride2", 3, 32, 14, 14, 32, 3, 3, (2, 2), (1, 1), groups=2),
    Case("groups8_of_8_several_images", 11, 64, 8, 7, 64, 3, 3, padding=(1, 1), groups=8),
    Case("groups132_of_8_stride2_many_tiles", 4, 1056, 18, 34, 1056, 3, 3, (2, 2), (1, 1), groups=132),
    # NCHW in place: rows of even length whose channels begin anywhere; wgrad in halves of lines
    Case("groups4_of_16_37_rows_of_14", 3, 64, 37, 14, 64, 3, 3, padding=(1, 1), groups=4, edge=True),
    Case("groups2_of_16_and_32_14_rows_stride2", 3, 32, 14, 14, 64, 3, 3, (2, 2), (2, 1, 0, 1), groups=2),
    Case("groups3_of_32_and_96", 3, 96, 11, 14, 288, 3, 3, padding=(1, 1), groups=3, edge=True),
    # groups that end within a line or a step of it
    Case("groups3_of_56_several_images", 5, 168, 9, 11, 168, 3, 3, padding=(1, 1), groups=3),
    Case("groups2_of_72_and_40_stride2", 3, 144, 17, 15, 80, 3, 3, (2, 2), (1, 1), groups=2, edge=True),
    Case("groups2_of_40_padding_9", 1, 80, 6, 7, 80, 3, 3, padding=(9, 9), groups=2),
    Case("groups6_of_16_and_8_1x1_stride2", 3, 96, 15, 18, 48, 1, 1, (2, 2), groups=6),
    Case("groups3_of_8_and_56_5x5", 2, 24, 11, 12, 168, 5, 5, padding=(2, 2), groups=3),
    Case("groups3_of_20_and_12_stride2", 2, 60, 11, 9, 36, 3, 2, (2, 1), (1, 1), (1, 2), 3),
    # as many taps as a launch's parameters hold
    Case("groups8_of_4_and_1_9x9", 2, 32, 11, 13, 8, 9, 9, padding=(4, 4), groups=8, bias=False),
    Case("groups4_of_8_and_2_9x9_stride2", 2, 32, 14, 12, 8, 9, 9, (2, 2), (4, 4), groups=4),
    # rows of NCHW as they lie: units of one group, whose last block of 8 channels is half empty, and of three blocks
    Case("groups4_of_12_and_20_rows", 3, 48, 13, 14, 80, 3, 3, padding=(1, 1), groups=4, edge=True),
    Case("groups2_of_24_rows", 2, 48, 10, 28, 48, 3, 3, padding=(1, 1), groups=2),
    Case("groups4_of_20_and_12_rows_stride2", 3, 80, 12, 16, 48, 3, 3, (2, 2), (1, 1), groups=4, edge=True),
    # tensor cores: pairs of small images, several steps and tiles of an image, bands wider than a window
    Case("depthwise_pairs", 5, 24, 8, 7, 24, 5, 5, padding=(2, 2), groups=24),
    Case("depthwise_slices", 3, 600, 9, 10, 600, 3, 3, padding=(1, 1), groups=600),
    Case("depthwise_turns", 24, 4224, 7, 7, 4224, 3, 3, padding=(1, 1), groups=4224),
    Case("depthwise_strips_stride2", 1, 8, 19, 333, 8, 3, 3, (2, 2), (0, 1, 2, 1), groups=8),
    Case("depthwise_5x5_stride2_four_pads", 2, 24, 18, 13, 24, 5, 5, (2, 2), (4, 1, 3, 2), groups=24, edge=True),
    Case("depthwise_padding_beyond_7x7", 2, 16, 3, 9, 16, 7, 7, padding=(9, 8), groups=16),
    Case("depthwise_3x3_steps", 1, 8, 50, 35, 8, 3, 3, padding=(1, 1), groups=8, edge=True),
    # phases of a dilation, several tiles of a row, images of a block that there are not
    Case("depthwise_dilated_2", 3, 40, 21, 34, 40, 3, 3, (1, 1), (2, 1), (2, 2), 40, edge=True),
    Case("depthwise_nine_images_dilated", 9, 5, 14, 15, 5, 3, 3, (1, 1), (2, 2), (2, 2), 5, edge=True),
    Case("depthwise_nine_images_stride3", 9, 4, 13, 16, 8, 4, 5, (3, 2), (1, 4, 3, 0), (1, 1), 4),
    Case("depthwise_stride4_by_6_dilated", 3, 4, 37, 44, 4, 3, 3, (4, 6), (2, 5), (2, 4), 4),
    Case("depthwise_too_wide_for_shared_memory", 1, 2, 3, 25000, 2, 3, 3, (1, 1), (1, 2), (1, 2), 2),
    Case("depthwise_dilated_3_by_4", 2, 16, 17, 35, 16, 3, 3, (1, 1), (3, 4), (3, 4), 16),
    Case("depthwise_dilated_5x2", 1, 24, 19, 12, 24, 5, 2, (1, 1), (0, 3, 2, 5), (3, 8), 24),
    Case("depthwise_wide_5x5", 1, 8, 6, 300, 8, 5, 5, padding=(2, 2), groups=8),
    Case("depthwise_images_of_7x7", 35, 72, 7, 7, 72, 3, 3, padding=(1, 1), groups=72),
    # walks: filters of more channels than a block has threads, vectors of two channels, several results a channel
    Case("depthwise_5x5_multiplier2", 2, 135, 9, 11, 270, 5, 5, padding=(2, 2), groups=135, edge=True),
    Case("depthwise_7x7_stride2_multiplier3", 1, 9, 15, 14, 27, 7, 7, (2, 2), (3, 2), groups=9),
    # NCHW takes several filters a channel in turns; planes of odd size, so that turns are aligned less than the first
    Case("depthwise_3x3_multiplier3_pairs", 3, 5, 12, 9, 15, 3, 3, padding=(0, 1), groups=5, edge=True),
    Case("depthwise_11x11_multiplier2", 2, 5, 15, 17, 10, 11, 11, padding=(5, 5), groups=5, edge=True),
    Case("depthwise_3x3_stride2_pairs", 9, 66, 21, 13, 66, 3, 3, (2, 2), (1, 1), groups=66, bias=False),
    Case("depthwise_7x7_odd", 1, 261, 8, 9, 261, 7, 7, padding=(3, 3), groups=261),
    # in channels_last more outputs than are asked for at once
    Case("depthwise_5x5_many_outputs", 70, 33, 17, 19, 33, 5, 5, padding=(2, 3), groups=33),
    Case("depthwise_7x7_many_outputs", 40, 37, 18, 20, 37, 7, 7, padding=(3, 2), groups=37, bias=False),
    Case("depthwise_13x9_tiles", 1, 8, 40, 70, 8, 13, 9, padding=(6, 4), groups=8),
    Case("depthwise_3x40", 2, 8, 9, 21, 8, 3, 40, padding=(1, 20), groups=8, bias=False),
    # tile boundaries: K, NPQ and the reduction just below, at and above multiples of 64 and 128
    Case("K63_NPQ63", 1, 16, 9, 11, 63, 3, 3),
    Case("K64_NPQ64", 1, 16, 10, 10, 64, 3, 3, edge=True),
    Case("K65_NPQ65", 1, 16, 7, 15, 65, 3, 3),
    Case("K128_NPQ128", 2, 8, 8, 8, 128, 3, 3, padding=(1, 1)),
    Case("K129_NPQ129", 3, 8, 1, 43, 129, 1, 3, padding=(0, 1), edge=True),
    Case("K127_NPQ255", 1, 8, 15, 17, 127, 1, 1),
    Case("K257_1x1", 1, 33, 3, 5, 257, 1, 1, bias=False),
    Case("C129_K65", 1, 129, 5, 5, 65, 3, 3, padding=(1, 1)),
    # odd channels side by side, packed in vectors of 16 bytes: several lines a vector, several rounds of threads a line
    Case("C21_K9", 2, 21, 9, 7, 9, 3, 3, padding=(1, 1), edge=True),
    Case("C2053_K9_1x1", 1, 2053, 2, 3, 9, 1, 1),
    Case("C65_K130_1x1", 3, 65, 21, 19, 130, 1, 1, bias=False),
    Case("C9_K130_unpacked", 1, 9, 61, 67, 130, 1, 1),  # enough results for a pass that unpacks them
    Case("C63_K31_stride2", 1, 63, 9, 9, 31, 3, 3, (2, 2), (1, 1)),
    Case("C32_K32_5x10_stride2", 2, 32, 15, 45, 32, 5, 10, (2, 2)),
    Case("C24_K96_stride2", 3, 24, 21, 34, 96, 3, 3, (2, 2), (1, 0, 0, 2)),
    Case("C32_K40_4x4_stride2", 2, 32, 18, 23, 40, 4, 4, (2, 2), (2, 1), edge=True),
    # channels in vectors of 8: several tiles of 128 rows, of 64, 128 and 256 columns; steps of 64 that span two taps
    Case("C72_K264_1x3", 1, 72, 12, 14, 264, 1, 3),
    Case("C264_K72_strided_dilated", 1, 264, 25, 11, 72, 3, 1, (2, 1), (2, 0), (2, 1)),
    Case("groups2_of_16_and_24", 1, 32, 11, 12, 48, 3, 2, (2, 3), (1, 1), groups=2),
    Case("groups2_of_24_and_16", 2, 48, 9, 10, 32, 3, 3, (2, 1), (2, 1, 0, 3), (1, 2), 2, edge=True),
    # 1x1 over whole vectors of pixels, which NCHW needs no copies for: several tiles of filters and of pixels, channels
    # that end in a chunk or in an instruction, more images than an im2col box has rows
    Case("1x1_planes", 3, 48, 8, 9, 40, 1, 1, edge=True),
    Case("1x1_planes_several_tiles", 2, 80, 20, 18, 264, 1, 1),
    Case("1x1_planes_off_vectors", 5, 72, 6, 10, 200, 1, 1, edge=True),
    Case("1x1_planes_off_vectors_long_sums", 3, 656, 14, 14, 136, 1, 1),
    Case("1x1_planes_one_image_C24", 1, 24, 8, 11, 72, 1, 1),
    Case("1x1_planes_many_images", 131, 16, 2, 4, 16, 1, 1, bias=False),
    Case("1x1_planes_filters_that_do_not_stay", 1, 600, 6, 8, 552, 1, 1),
    Case("1x1_planes_off_lines", 3, 37, 5, 24, 145, 1, 1, bias=False),
    # filters three wide over planes: tiles that overlap and those of whole rows, several of an image and beyond its
    # end; channels and filters that end within 16 and 64, filters that stay and those that do not
    Case("planes_3x3_50_to_90", 3, 50, 21, 72, 90, 3, 3, padding=(1, 1), edge=True),
    Case("planes_3x3_whole_rows", 2, 64, 16, 64, 64, 3, 3, padding=(1, 1), edge=True),
    Case("planes_5x3_dilated_rows", 5, 17, 13, 40, 136, 5, 3, padding=(3, 2, 1, 1), dilation=(2, 1)),
    Case("planes_1x3_tiles_beyond_the_plane", 7, 40, 3, 104, 24, 1, 3, padding=(0, 1), bias=False),
    Case("planes_3x3_160_to_320", 1, 160, 50, 48, 320, 3, 3, padding=(0, 1)),
    Case("planes_3x3_two_tiles_a_row", 1, 32, 7, 512, 48, 3, 3, padding=(1, 1)),
    # 1x1 over pixels whose channels lie side by side but take no vectors: few and many channels, a last tile whose
    # bytes are no multiple of 16, filters of several warpgroups, more tiles than the warpgroups of 132 SMs
    Case("1x1_lines_of_odd_channels", 1, 29, 7, 9, 21, 1, 1, edge=True),
    Case("1x1_lines_C116", 2, 116, 9, 11, 116, 1, 1),
    Case("1x1_lines_C255_K130", 1, 255, 13, 13, 130, 1, 1, bias=False),
    Case("1x1_lines_one_channel", 3, 1, 5, 5, 200, 1, 1),
    Case("1x1_lines_many_tiles", 9, 5, 65, 63, 7, 1, 1),
    # wgrad by warps that take turns: one column, and some of another warp; few results from the products of all taps
    Case("1x1_lines_C34_K1", 3, 34, 31, 33, 1, 1, 1, edge=True),
    Case("1x1_lines_C66_K19", 2, 66, 40, 31, 19, 1, 1, bias=False),
    # wgrad by tma_matrix.cuh, 8, 4 and 2 pixels a row of its matrices (TF32, by tma_lean_tf32.cuh: 4 and 2), several
    # tiles of either tensor
    Case("1x1_lines_C201_K70_by_eights", 2, 201, 24, 26, 70, 1, 1),
    Case("1x1_lines_C134_K264_by_fours", 3, 134, 18, 20, 264, 1, 1, bias=False),
    Case("1x1_lines_C12_K260_by_twos", 1, 12, 34, 37, 260, 1, 1),
    # fprop and dgrad by pixels_phases.cuh: tiles that blocks take in turns
    Case("1x1_lines_C36_K522_in_turns", 2, 36, 56, 57, 522, 1, 1),
    Case("3x3_few_results_C72_K5", 2, 72, 11, 152, 5, 3, 3, padding=(1, 1), edge=True),
    Case("5x5_few_channels_C2_K136", 1, 2, 9, 64, 136, 5, 5, padding=(2, 1), bias=False),
    Case("7x7_two_results_C24", 2, 24, 5, 136, 2, 7, 7, padding=(3, 3), bias=False),
    Case("3x3_few_results_of_128_columns", 2, 24, 9, 128, 3, 3, 3, padding=(1, 1)),
    Case("3x3_few_channels_of_128_columns", 2, 3, 9, 128, 24, 3, 3, padding=(1, 1), bias=False),
    Case("3x3_few_channels_of_260_columns", 1, 3, 7, 260, 24, 3, 3, padding=(1, 1), bias=False),
    # channels and filters a group that must be padded
    Case("groups2_of_30_and_21", 2, 60, 9, 8, 42, 3, 3, (1, 1), (1, 1), groups=2, edge=True),
    Case("groups3_of_72_and_40", 1, 216, 7, 7, 120, 3, 2, (2, 1), (1, 0), groups=3),
    Case("groups2_of_1_and_70_1x1", 2, 2, 9, 11, 140, 1, 1, groups=2, bias=False),
    # long reductions: fprop and dgrad over channels, wgrad over pixels
    Case("long_channels", 1, 512, 4, 5, 8, 3, 3, padding=(1, 1), edge=True),
    Case("long_filters", 1, 8, 4, 5, 384, 3, 3, padding=(1, 1), edge=True),
    Case("many_pixels", 4, 3, 65, 63, 4, 3, 3, padding=(1, 1), bias=False),
    # two runs of 64 pixels a warp of 256 x 160, whose lines of float are an odd number of pieces
    Case("pixels_of_160_filters", 3, 32, 20, 20, 160, 3, 3, padding=(1, 1)),
    Case("many_pixels_C16_K8", 2, 16, 23, 25, 8, 3, 3, padding=(1, 1), edge=True),
    Case("many_pixels_depthwise", 2, 4, 64, 66, 4, 3, 3, padding=(1, 1), groups=4),
    # more than two tiles of 256 pixels for each of 132 blocks; then, in dgrad, phases that take turns
    Case("many_tiles", 1, 8, 241, 290, 16, 3, 3, padding=(1, 1)),
    Case("many_tiles_stride2", 1, 8, 521, 522, 8, 3, 3, stride=(2, 2), padding=(1, 1), bias=False),
    Case("many_tiles_stride2_C40", 5, 40, 261, 260, 16, 3, 3, stride=(2, 2), padding=(1, 1), bias=False),
    # the same with four, and in dgrad three, tiles of 64 filters, whose taps a block keeps
    Case("many_tiles_K200", 3, 16, 64, 48, 200, 3, 3, padding=(1, 1)),
    Case("many_tiles_C136", 4, 136, 64, 48, 16, 3, 3, padding=(1, 1)),
    # a group's last columns, which a store of 64 must not pass
    Case("groups2_of_96", 2, 192, 11, 13, 192, 3, 3, padding=(1, 1), groups=2),
    # taps that share a copy of the pixels although the stride is 2 or 3, all or some of them
    Case("row_of_taps_stride2", 2, 32, 9, 41, 40, 2, 9, stride=(1, 2), padding=(0, 3)),
    Case("row_of_taps_stride3_dilation2", 1, 24, 7, 50, 72, 3, 7, stride=(2, 3), padding=(1, 2), dilation=(1, 2)),
    Case("batch_of_65", 65, 4, 3, 3, 6, 3, 3, padding=(1, 1)),
    # few tiles, some steps of the reduction: fprop and dgrad, then wgrad (in several parts); for racecheck
    Case("one_tile_long_depth", 1, 48, 4, 5, 48, 3, 3, padding=(1, 1)),
    Case("one_tile_some_pixels", 2, 8, 12, 13, 8, 3, 1, padding=(1, 0)),
    # dense wgrad: tiles of 64 to 128 filters by 64 channels of three taps, in parts that do not divide them evenly
    Case("wgrad_72_to_136", 3, 72, 11, 22, 136, 3, 3, padding=(1, 1), bias=False),
    Case("wgrad_five_taps_dilated", 1, 64, 8, 21, 40, 2, 5, padding=(1, 4), dilation=(1, 4), edge=True),
    # more tiles of 64 pixels than SMs, of an odd number of steps: two warpgroups of a block take turns
    Case("tiles_of_64_pixels_in_turns", 9, 24, 31, 31, 64, 3, 3, padding=(1, 1)),
    # dense wgrad over NCHW as it lies: even and odd taps, rows of x in a ring, rows that step, one tap a row
    Case("wgrad_planes_72_to_80", 3, 72, 19, 24, 80, 3, 3, padding=(1, 1), bias=False, edge=True),
    Case("wgrad_planes_dilated_rows", 2, 40, 13, 80, 200, 5, 2, padding=(3, 4, 1, 0), dilation=(2, 1), bias=False),
    Case("wgrad_planes_row_stride", 2, 200, 11, 32, 72, 1, 5, stride=(2, 1), padding=(0, 2), bias=False),
    Case("wgrad_planes_one_column", 2, 136, 10, 16, 200, 5, 1, padding=(2, 0), bias=False),
    Case("wgrad_many_filters", 1, 8, 12, 13, 712, 7, 7, padding=(3, 3), bias=False),
    Case("wgrad_32_channels", 2, 32, 17, 18, 72, 5, 4, stride=(2, 1), padding=(2, 1)),
    # one round of tiles for every SM and some more, whose reduction is split
    Case("tail_of_tiles", 1, 64, 190, 190, 8, 3, 3, padding=(1, 1), bias=False),
    # two tiles of 64 filters or channels, whose filters do not all stay in shared memory
    Case("two_tiles_of_filters", 2, 72, 40, 61, 104, 3, 3, padding=(1, 1)),
    Case("two_tiles_of_filters_stride2", 3, 72, 41, 62, 104, 3, 3, stride=(2, 2), padding=(1, 1), bias=False),
    # nothing to sum, or nothing to write
    Case("N0", 0, 4, 6, 6, 8, 3, 3, padding=(1, 1), edge=True),
    Case("C0", 2, 0, 6, 5, 4, 3, 3, padding=(1, 1), edge=True),
    Case("C0_no_bias", 2, 0, 6, 5, 4, 3, 3, bias=False),
    Case("K0", 2, 4, 6, 5, 0, 3, 3, padding=(1, 1), edge=True),
    Case("C0_K0_groups2", 1, 0, 4, 4, 0, 3, 3, groups=2),
    Case("H0", 2, 3, 0, 5, 4, 2, 3, padding=(2, 1)),
    Case("N0_C0_K0", 0, 0, 4, 4, 0, 1, 1),
)

BY_NAME = {case.name: case for case in CASES}
# For tests whose subject is not the arithmetic: one of each kind.
FEW = tuple(
    BY_NAME[name]
    for name in (
        "3x3",
        "2x5_stride_1x3",
        "four_pads_grouped_dilated",
        "stride3_dilation2",
        "kernel_larger_than_input",
        "depthwise_multiplier2",
        "C13_K3",
        "K129_NPQ129",
        "C0",
    )
)
assert len(BY_NAME) == len(CASES), "case names must differ"
