"""The planner: pure, defined for every problem, testable without a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from pathlib import Path

import pytest
import torch
from calls import OPS, candidates, machine, meta, packed, plan
from cases import BY_NAME, CASES, DTYPES, Case

import conv2d_ext

ROWS = tuple(torch.ops.conv2d_ext.kernels())
H200 = {"sm_count": 132, "capability": 90}
DEVICES = (
    H200,
    {"sm_count": 1, "capability": 80},
    {"sm_count": 108, "capability": 80},
    {"sm_count": 160, "capability": 100},
    {"sm_count": 16, "capability": 90},  # a slice of an H200
)


def ask(op: str, case: Case, dtype: torch.dtype, layout: str = "nchw", **kwargs: object) -> list[int]:
    return plan(op, case, *meta(case, dtype, layout), **kwargs)


def random_cases(count: int) -> list[Case]:
    """From one pixel to 2^31 elements and beyond, with every kind of group."""
    dice = random.Random(2)
    made: list[Case] = []
    while len(made) < count:
        groups = dice.choice((1, 1, 1, 2, 3, 8, 64))
        C, K = groups * dice.choice((1, 2, 3, 4, 8, 40, 256)), groups * dice.choice((1, 2, 3, 8, 24, 512))
        H, W = dice.choice((1, 2, 7, 14, 56, 225, 4096)), dice.choice((1, 3, 7, 28, 112, 224, 5000))
        case = Case(
            f"random{len(made)}",
            dice.choice((0, 1, 2, 32, 129, 4096)),
            C, H, W, K,
            dice.choice((1, 2, 3, 5, 7, 31)),
            dice.choice((1, 2, 3, 4, 7)),
            (dice.choice((1, 2, 3, 16)), dice.choice((1, 2, 5))),
            tuple(dice.choice((0, 1, 3, 15)) for _ in range(4)),
            (dice.choice((1, 2, 6)), dice.choice((1, 3))),
            groups,
        )  # fmt: skip
        if case.P > 0 and case.Q > 0:
            made.append(case)
    return made


RANDOM = random_cases(300)


@pytest.mark.parametrize("op", OPS)
def test_every_problem_has_a_plan_and_the_plan_is_the_cheapest_candidate(op: str) -> None:
    for case, dtype, layout in itertools.product((*CASES, *RANDOM), DTYPES, ("nchw", "nhwc")):
        row, split_k, workspace, *estimates = ask(op, case, dtype, layout)
        what = f"{case} {op} {dtype} {layout}"
        assert len(estimates) == len(ROWS), what
        assert 0 <= row < len(ROWS) and estimates[row] >= 0, what
        assert estimates[row] == min(e for e in estimates if e >= 0), what
        assert split_k >= 1, what
        assert workspace >= 0, what
        assert min(estimates) >= -1, what


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_every_device_has_a_plan(op: str, device: dict[str, int]) -> None:
    for case, layout in itertools.product((*CASES, *RANDOM[:100]), ("nchw", "nhwc")):
        chosen = ask(op, case, torch.float16, layout, **device)
        assert chosen[0] in candidates(chosen)
        assert min(chosen[3:]) >= -1, case  # what is no number is the least integer


@pytest.mark.parametrize("op", OPS)
def test_estimates_of_nothing_are_numbers(op: str) -> None:
    """Some divided by the tiles, filters or taps that such problems do not have."""
    nothing = {"N": 0}, {"C": 0}, {"K": 0}, {"C": 0, "K": 0}, {"H": 0, "padding": (2, 2)}
    for sizes, stride, dtype, layout in itertools.product(nothing, (1, 2), DTYPES, ("nchw", "nhwc")):
        case = Case(
            "nothing", **{"N": 2, "C": 8, "H": 9, "W": 9, "K": 8, "R": 3, "S": 3} | sizes, stride=(stride, stride)
        )
        for tf32 in (False, True):
            assert min(ask(op, case, dtype, layout, allow_tf32=tf32)[3:]) >= -1, f"{case} {dtype} {layout}"


@pytest.mark.parametrize("op", OPS)
def test_a_workspace_is_no_larger_than_a_gigabyte_or_a_few_times_the_tensors(op: str) -> None:
    """Split sums need copies of the result, and conversions copies of the operands: both are bounded."""
    # Patches of many taps are many times as large as the pixels.
    patches = Case("patches", 15, 16, 231, 231, 208, 11, 11), Case("patches", 39, 16, 110, 110, 288, 10, 10)
    far = (
        Case("far_padding", 3, 86, 5731, 1, 43, 5731, 1, (3, 3), (11460, 0), (2, 1)),
        Case("far_steps", 2, 24, 130668, 1, 2, 2, 1, (1, 2), (125, 54, 0, 686), (124, 32)),
        Case("as_wide_as_the_image", 1, 1, 1, 92637, 80, 3, 92637, padding=(1655, 2, 2, 9)),
        Case("weights", 1, 412, 1, 69124, 2, 1, 69124, (2, 3), dilation=(5, 1)),
    )
    for case, dtype in itertools.product((*CASES, *RANDOM, *patches, *far), DTYPES):
        workspace = ask(op, case, dtype)[2]
        sizes = (case.input_size, case.weight_size, case.output_size)
        tensors = sum(torch.Size(size).numel() for size in sizes) * dtype.itemsize
        assert workspace <= max(2**30, 5 * tensors), f"{case} {op} {dtype}: {workspace} bytes beside {tensors}"


def test_winograd_takes_a_workspace_of_two_gigabytes_at_most() -> None:
    row = ROWS.index("tma_strict_dgrad_f32_2x2_any")
    large = {"padding": (1, 1), "groups": 6}
    taken = [ask("dgrad", Case("points", n, 3960, 14, 14, 5040, 3, 3, **large), torch.float32) for n in (32, 64, 96)]
    assert [row == chosen[0] for chosen in taken] == [True, False, False]
    assert 2**30 < taken[0][2] <= 2**31


def test_products_of_repeated_images_are_counted_by_their_sizes() -> None:
    """Images that all are one have no stride, and yet too many products for a thread's 32 bits."""
    row = ROWS.index("depthwise_wgrad_f32_0x1_nchw")
    for n, taken in ((200, True), (70_000, False)):
        case = Case("repeated", n, 3, 200, 200, 3, 3, 3, groups=3)
        x, w, y = meta(case, torch.float32, "nchw")
        x, y = (t[:1].expand(t.shape) for t in (x, y))
        assert (row in candidates(plan("wgrad", case, x, w, y))) == taken


def test_pixels_that_are_rows_of_a_matrix_are_counted_in_32_bits() -> None:
    row = ROWS.index("pixels_fprop_f16_64x128_lines")
    for n, taken in ((2**23, True), (2**25, False)):
        case = Case("planes", n, 8, 8, 8, 8, 1, 1)
        assert (row in candidates(ask("fprop", case, torch.float16))) == taken


def test_copies_take_32_gib_at_most() -> None:
    row = ROWS.index("simt_dgrad_f32_128x64_nhwc")
    for n, packs in ((8, True), (64, False)):  # the gradient of the input takes 8 GiB, or 64
        case = Case("step", n, 64, 2048, 2048, 64, 3, 3, stride=(16, 16), padding=(1, 1))
        assert (row in candidates(ask("dgrad", case, torch.float32))) == packs


@pytest.mark.parametrize("op", OPS)
def test_no_estimate_is_negative_in_whatever_padding(op: str) -> None:
    for padding, groups, dtype, layout in itertools.product(
        ((8191, 0), (1646587, 1646587, 3, 3), (0, 70000, 70000, 0)), (1, 3), DTYPES, ("nchw", "nhwc")
    ):
        case = Case("padded", 5, groups, 14, 13, groups, 2, 2, stride=(2, 2), padding=padding, groups=groups)
        chosen = ask(op, case, dtype, layout)
        assert all(estimate == -1 or estimate > 0 for estimate in chosen[3:]), f"{case.args} {dtype} {layout}"


@pytest.mark.parametrize("op", OPS)
def test_the_plan_is_a_pure_function(op: str) -> None:
    """Asked again after other questions, more than the planner remembers, the answer is the same."""
    facts = ({"align": 16}, {"align": 4}, {"allow_tf32": True}, {"capability": 80})
    asked = list(itertools.product(RANDOM, (torch.float16, torch.float32), facts))
    first = [ask(op, case, dtype, "nhwc", **fact) for case, dtype, fact in asked]
    second = [ask(op, case, dtype, "nhwc", **fact) for case, dtype, fact in reversed(asked)]
    assert first == second[::-1]


@pytest.mark.parametrize("op", OPS)
def test_the_last_rows_of_an_operator_support_everything(op: str) -> None:
    """The widest row of each dtype supports every case in every stride, so nothing is left without a kernel."""
    for dtype in DTYPES:
        common = set(range(len(ROWS)))
        for case in CASES:
            x, w, _ = case.tensors("meta", dtype, "every_other")
            y = case.grad_output("meta", dtype, "every_other")
            common &= set(candidates(plan(op, case, x, w, y, align=dtype.itemsize)))
        assert common, f"no row supports every case for {op} in {dtype}"


def test_a_row_serves_one_operator() -> None:
    """What a row supports for one operator it does not support for another: names tell them apart."""
    for dtype in DTYPES:
        sets = [set(candidates(ask(op, BY_NAME["3x3"], dtype))) for op in OPS]
        assert all(sets)
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_the_name_of_the_chosen_row_contains_the_operator() -> None:
    for op, dtype in itertools.product(OPS, DTYPES):
        assert op in ROWS[ask(op, BY_NAME["3x3"], dtype)[0]]


def test_more_work_is_never_estimated_to_take_less_time() -> None:
    small = Case("small", 1, 64, 28, 28, 64, 3, 3, padding=(1, 1))
    large = Case("large", 64, 64, 28, 28, 64, 3, 3, padding=(1, 1))
    for op in OPS:
        a, b = ask(op, small, torch.float32), ask(op, large, torch.float32)
        assert b[3 + b[0]] > a[3 + a[0]]


def test_a_large_layer_is_not_split_in_the_forward_pass() -> None:
    """Its tiles fill the machine already; a split would only add a second pass."""
    case = Case("resnet", 64, 64, 56, 56, 64, 3, 3, padding=(1, 1))
    for dtype in DTYPES:
        assert ask("fprop", case, dtype)[1] == 1


# The end of the names of the rows for any filter, in NCHW. With strides and few outputs they are near the rows of one
# filter, or before them (depthwise_few.cuh).
ANY_FILTER = "_0x0_nchw"
# Of the rows of few outputs: depthwise_lanes.cuh, depthwise_near.cuh.
FEW_OUTPUTS = ("_0x2_nchw", "_0x2_nhwc")
# Of the rows that go over the taps alone that an output meets (depthwise_met.cuh).
MET = ("_0x1_nchw", "_0x1_nhwc")


@pytest.mark.parametrize("op", OPS)
def test_depthwise_layers_take_the_row_of_their_filter_and_stride(op: str) -> None:
    for size, stride, layout in itertools.product((3, 5, 7), (1, 2), ("nchw", "nhwc")):
        case = Case("depthwise", 32, 96, 56, 56, 96, size, size, (stride, stride), (size // 2,) * 2, groups=96)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            want = f"{size}x{size}_{layout}" + ("_s2" if stride == 2 else "")
            name = ROWS[ask(op, case, dtype, layout)[0]]
            if layout == "nchw" and stride == 2 and op == "wgrad" and name.endswith(ANY_FILTER):
                continue  # near each other
            if name.endswith(("_0x4_nhwc", *FEW_OUTPUTS)):
                continue  # depthwise_few_sums.cuh and depthwise_lanes.cuh are near, too
            families = ("depthwise",)
            if layout == "nchw":
                families = ("stream",) if dtype != torch.float32 else ("depthwise", "stream")
                if dtype == torch.float32:  # stream's row of float32 takes stride 2 too, where images are small
                    want = f"{size}x{size}_nchw"
            elif size == 3:  # near each other, but for float32 and stride 2, which tensor cores do not take
                families = ("column", "depthwise") if op == "wgrad" else ("column",)
                if dtype != torch.float32 and stride == 1:
                    families, want = (*families, "toeplitz"), "_nhwc"
            elif (size, stride) == (5, 2):  # near each other: by the operator and the shape
                families = ("column", "depthwise", "toeplitz")
                want = want.removesuffix("_s2") if name.startswith("toeplitz_dgrad_") else want
            elif stride == 2 or dtype == torch.float32:  # 7x7 with stride 2, which small layers take by walks
                families = ("column", "depthwise")[:stride]
            else:
                families = ("toeplitz",)
                want = f"_{size}x{9 if op == 'wgrad' else 5}_nhwc" if size == 5 else "_nhwc"
            assert name.startswith(tuple(f"{family}_{op}_" for family in families)) and name.removesuffix(
                "_s2" if "_s2" not in want else ""
            ).endswith(want), name


@pytest.mark.parametrize("op", OPS)
def test_depthwise_channels_that_fill_no_vectors_keep_a_fast_row_in_channels_last(op: str) -> None:
    for channels, stride, dtype in itertools.product((3, 12, 36, 100), (1, 2), (torch.float16, torch.float32)):
        case = Case("odd", 64, channels, 56, 56, channels, 3, 3, (stride, stride), (1, 1), groups=channels, bias=False)
        name = ROWS[ask(op, case, dtype, "nhwc")[0]]
        if name.endswith(FEW_OUTPUTS):
            continue
        vectors = channels % (16 // dtype.itemsize) == 0
        want = {f"column_{op}_"} if op != "wgrad" else {f"depthwise_{op}_"} | ({f"column_{op}_"} if vectors else set())
        assert name.startswith(tuple(want)) and "_3x3_nhwc" in name, (channels, name)


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_large_depthwise_3x3_of_whole_pixels_or_even_slices_is_not_for_tensor_cores(op: str) -> None:
    # By toeplitz 72 channels took twice as long.
    for N, C, H in ((256, 72, 56), (128, 80, 56), (128, 144, 56), (64, 48, 190), (64, 336, 48)):
        case = Case("whole", N, C, H, H, C, 3, 3, padding=(1, 1), groups=C)
        for dtype in (torch.float16, torch.bfloat16):
            assert ROWS[ask(op, case, dtype, "nhwc")[0]].startswith(f"column_{op}_"), (N, C, H)


def test_depthwise_dgrad_of_5x5_with_stride_2_takes_tensor_cores_but_for_slices_that_share_sectors() -> None:
    for N, C, H, family in (
        (256, 672, 14, "toeplitz"),
        (64, 1344, 38, "toeplitz"),
        (16, 192, 95, "toeplitz"),
        (32, 144, 56, "toeplitz"),
        (256, 72, 56, "column"),  # 122 us, 75
        (64, 40, 100, "column"),
    ):
        case = Case("strided", N, C, H, H, C, 5, 5, (2, 2), (2, 2), groups=C)
        for dtype in (torch.float16, torch.bfloat16):
            assert ROWS[ask("dgrad", case, dtype, "nhwc")[0]].startswith(f"{family}_dgrad_"), (N, C, H)


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_depthwise_3x3_of_medium_size_is_neither_for_tensor_cores_nor_for_few_outputs(op: str) -> None:
    for N, C, H in ((8, 768, 19), (8, 256, 38), (1, 32, 300)):
        case = Case("medium", N, C, H, H, C, 3, 3, padding=(1, 1), groups=C)
        assert ROWS[ask(op, case, torch.float16, "nhwc")[0]] == f"column_{op}_f16_3x3_nhwc"


@pytest.mark.parametrize("op", OPS)
def test_dilated_depthwise_layers_take_columns_of_few_phases_or_the_row_for_any_filter(op: str) -> None:
    for multiplier, dilation, dtype in ((1, 2, torch.float32), (2, 2, torch.float16), (1, 5, torch.float32)):
        pad = (dilation, dilation)
        case = Case("any", 64, 96, 56, 56, 96 * multiplier, 3, 3, (1, 1), pad, pad, 96)
        name = ROWS[ask(op, case, dtype, "nhwc")[0]]
        if multiplier == 2:  # two filters a channel in 16 bits
            assert name.startswith(f"toeplitz_{op}_"), name
        elif dilation == 2:
            assert name.startswith(f"column_{op}_") and name.endswith("_3x3_nhwc"), name
        else:
            ends = ("_0x0_nhwc", "_0x1_nhwc", "_0x4_nhwc") if op == "wgrad" else ("_0x0_nhwc", "_0x1_nhwc")
            assert name.startswith(f"depthwise_{op}_") and name.endswith(ends), name
        if dilation == 2:  # of a size of its own, or with other padding, an image is not made of its phases
            for other in ((3, 2), (1, 2)):
                odd = dataclasses.replace(case, padding=other)
                assert not ROWS[ask(op, odd, dtype, "nhwc")[0]].startswith("column"), other


def test_dgrad_of_depthwise_multipliers_that_are_powers_of_two_adds_them_up_in_a_warp() -> None:
    for multiplier, end in ((2, "_0x2_nhwc"), (8, "_0x2_nhwc"), (32, "_0x2_nhwc"), (3, "_0x1_nhwc")):
        case = Case("multiplier", 8, 96, 28, 28, 96 * multiplier, 3, 3, (2, 2), (1, 1), groups=96)
        for dtype in (torch.float16, torch.float32):
            assert ROWS[ask("dgrad", case, dtype, "nhwc")[0]].endswith(end), (multiplier, dtype)


@pytest.mark.parametrize("op", OPS)
def test_small_layers_of_few_channels_a_group_are_summed_tap_by_tap(op: str) -> None:
    for case, dtype, layout in (
        (Case("one output", 12, 106, 7, 7, 106, 7, 7, (7, 7), (3, 3), groups=53), torch.float16, "nchw"),
        (Case("1x1", 19, 12, 7, 7, 24, 1, 1, groups=6), torch.float32, "nhwc"),
        (Case("stride", 9, 6, 82, 76, 6, 1, 1, (2, 1), groups=3), torch.float32, "nchw"),
        (Case("dilated", 1, 32, 77, 10, 32, 4, 4, (4, 4), dilation=(1, 3), groups=4), torch.float32, "nchw"),
    ):
        assert ROWS[ask(op, case, dtype, layout)[0]].endswith(f"_0x1_{layout}"), case


@pytest.mark.parametrize("op", OPS)
def test_depthwise_layers_of_mixed_layouts_run_on_a_packed_copy_of_one_tensor(op: str) -> None:
    """All of float64 in channels_last are mixed, whose results torch lays out in NCHW; it has no packed copies."""
    vectors = Case("mixed", 32, 96, 56, 56, 96, 3, 3, padding=(1, 1), groups=96, bias=False)
    for case, dtype, last in itertools.product(
        (vectors, dataclasses.replace(vectors, C=98, K=98, groups=98)), DTYPES, ("x", "y")
    ):
        (x, w, y), (x_last, _, y_last) = meta(case, dtype, "nchw"), meta(case, dtype, "nhwc")
        tensors = (x_last, w, y) if last == "x" else (x, w, y_last)
        name = ROWS[plan(op, case, *tensors)[0]]
        packs = case is vectors and dtype != torch.float64
        assert packed(op, case, *tensors) == ("y" if last == "x" else "x") * packs, (case, dtype, last)
        assert "_nhwc" in name and name.endswith("_0x0_nhwc") != packs, (name, case, dtype, last)


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("op", OPS)
def test_depthwise_filters_of_which_outputs_meet_few_taps_go_over_these_alone(op: str, layout: str) -> None:
    beyond = Case("larger than its image", 4, 256, 5, 5, 256, 31, 31, (1, 1), (30, 30), (2, 2), 256)  # 17 us for 6.4
    apart = Case("strided and dilated", 28, 64, 14, 14, 64, 5, 5, (5, 5), (4, 4), (2, 2), 64)
    for case, dtype in itertools.product((beyond, apart), (torch.float16, torch.float32)):
        row, split_k, workspace, *_ = ask(op, case, dtype, layout)
        near = (op, layout) == ("wgrad", "nhwc") and ROWS[row].endswith("_0x4_nhwc")
        assert (near or ROWS[row].endswith(f"_0x1_{layout}")) and split_k == 1 and workspace == 0, (case, dtype)


def test_rows_of_met_taps_are_of_the_layout_of_their_tensors() -> None:
    """The other order of threads has none of its neighbours together; of mixed layouts each has one tensor's."""
    case = Case("met", 2, 16, 9, 11, 16, 5, 3, (2, 1), (2, 1), groups=16)
    for op, layout in itertools.product(OPS, ("nchw", "nhwc")):
        rows = {ROWS[i] for i, ns in enumerate(ask(op, case, torch.float16, layout)[3:]) if ns >= 0}
        assert {name[-8:] for name in rows if "_0x1_" in name} == {f"0x1_{layout}"}, (op, layout)
    x, w, y = meta(case, torch.float16, "nchw")
    mixed = {
        ROWS[i] for i, ns in enumerate(plan("wgrad", case, meta(case, torch.float16, "nhwc")[0], w, y)[3:]) if ns >= 0
    }
    assert {name[-8:] for name in mixed if "_0x1_" in name} == {"0x1_nchw", "0x1_nhwc"}


def test_dilated_depthwise_wgrad_of_few_pixels_takes_one_launch() -> None:
    for dtype in (torch.float16, torch.float32):
        case = Case("few", 2, 128, 7, 7, 128, 5, 5, (1, 1), (8, 8), (4, 4), 128, bias=False)
        assert ROWS[ask("wgrad", case, dtype, "nhwc")[0]].endswith(("_0x1_nhwc", "_0x4_nhwc")), dtype


def test_depthwise_filters_that_do_not_meet_take_the_row_for_any_filter_in_nchw() -> None:
    patches = Case("patches", 8, 64, 130, 130, 64, 13, 13, (13, 13), groups=64)
    whole = Case("whole", 128, 512, 7, 7, 512, 7, 7, groups=512)
    for case, dtype, op in itertools.product((patches, whole), (torch.float16, torch.float32), ("fprop", "wgrad")):
        near = (case is whole and op == "fprop") or (case is patches and op == "wgrad")
        assert ROWS[ask(op, case, dtype)[0]].endswith(ANY_FILTER) or near, (
            case,
            dtype,
            op,
        )


def test_shares_of_depthwise_wgrad_divide_the_walks_of_an_image_among_warps() -> None:
    """As measured: 16 shares of 64 walks are one of each warp, 11 are two of some."""
    for n, channels, size, shares in (
        (256, 144, 3, 32),
        (128, 144, 3, 16),
        (128, 128, 3, 4),
        (64, 48, 3, 8),
        (64, 144, 5, 16),
    ):
        case = Case("walks", n, channels, 56, 56, channels, size, size, padding=(size // 2,) * 2, groups=channels)
        row, split_k, *_ = ask("wgrad", case, torch.float16)
        assert ROWS[row] == f"stream_wgrad_f16_{size}x{size}_nchw" and split_k == shares, (case, split_k)


def test_odd_channels_and_rows_of_3x3_cost_little_more_than_their_neighbours() -> None:
    """As measured: rows as runs of memory take up to 1.6 times as long where a pixel or a row is no whole words."""

    def least_ns(op: str, channels: int, width: int, stride: int, layout: str) -> int:
        case = Case("runs", 32, channels, 56, width, channels, 3, 3, (stride, stride), (1, 1), groups=channels)
        row, _, _, *times = ask(op, case, torch.float16, layout)
        return times[row]

    for op in OPS:
        for odd, even in ((127, 128), (129, 128), (65, 64)):
            assert least_ns(op, odd, 56, 1, "nhwc") < 1.65 * least_ns(op, even, 56, 1, "nhwc"), (op, odd)
    for op, stride in (("fprop", 1), ("dgrad", 1), ("dgrad", 2)):
        assert least_ns(op, 128, 65, stride, "nchw") < 1.4 * least_ns(op, 128, 64, stride, "nchw"), (op, stride)


def test_single_taps_and_odd_rows_of_5x5_are_copied_or_read_once() -> None:
    for op, (size, stride), dtype, layout in (
        ("wgrad", (1, 1), torch.float16, "nchw"),
        ("wgrad", (1, 1), torch.float32, "nhwc"),
        ("fprop", (1, 2), torch.float16, "nhwc"),
        ("dgrad", (1, 2), torch.float32, "nchw"),
        ("fprop", (5, 1), torch.float32, "nchw"),
        ("dgrad", (5, 1), torch.float32, "nchw"),
        ("wgrad", (5, 1), torch.float32, "nchw"),
    ):
        pad = (size // 2, size // 2)
        side = 64 if size == 1 else 65
        case = Case("one", 32, 120, side, side, 120, size, size, (stride, stride), pad, groups=120)
        name = ROWS[ask(op, case, dtype, layout)[0]]
        assert name.endswith(("_0x2_nchw", "_0x2_nhwc", "_0x4_nhwc")), name


def test_strided_depthwise_layers_of_rows_off_16_bytes_are_copied_as_planes_whatever_their_size() -> None:
    case = Case("planes", 8, 288, 150, 150, 288, 5, 5, (2, 2), (2, 2), groups=288)
    assert ROWS[ask("fprop", case, torch.float32)[0]].endswith("_0x2_nchw")
    # depthwise_spread.cuh stores such rows by 16 bytes.
    assert ROWS[ask("dgrad", case, torch.float32)[0]] == "depthwise_dgrad_f32_5x5_nchw_s2"


@pytest.mark.parametrize("op", OPS)
def test_multipliers_take_the_rows_of_their_filter_in_nchw(op: str) -> None:
    for (size, stride), dtype in itertools.product(((3, 1), (3, 2), (5, 1)), (torch.float16, torch.float32)):
        case = Case("m", 32, 96, 56, 56, 192, size, size, (stride, stride), (size // 2,) * 2, groups=96)
        name = ROWS[ask(op, case, dtype)[0]]
        if (stride == 2 or op == "dgrad") and name.endswith(ANY_FILTER):  # dgrad adds up over a channel's filters
            continue
        if op == "wgrad" and dtype == torch.float32 and name.endswith("_0x0_nchw"):  # 68.4 us, by turns 68.7
            continue
        if op == "dgrad" and name.startswith(("column_", "toeplitz_")):
            assert "_nhwc" in name  # on packed copies
            continue
        assert f"{size}x{size}_nchw" in name and name.startswith((f"depthwise_{op}_", f"stream_{op}_")), name


@pytest.mark.parametrize("op", OPS)
def test_dilated_depthwise_layers_of_16_bits_take_tensor_cores_in_channels_last(op: str) -> None:
    for size, dilation in ((3, 2), (3, 4), (5, 2)):
        pad = (size // 2 * dilation,) * 2
        case = Case("dilated", 64, 96, 56, 56, 96, size, size, (1, 1), pad, (dilation, dilation), 96)
        for dtype in (torch.float16, torch.bfloat16):
            assert ROWS[ask(op, case, dtype, "nhwc")[0]].startswith(f"toeplitz_{op}_"), (size, dilation)


@pytest.mark.parametrize("op", OPS)
def test_wide_dilations_of_depthwise_layers_are_phases_of_the_rows_without_one(op: str) -> None:
    """Over planes, too, on packed copies, where the filter is large."""
    case = Case("dilated", 64, 64, 56, 56, 64, 7, 7, padding=(9, 9), dilation=(3, 3), groups=64)
    for dtype, layout in itertools.product((torch.float16, torch.bfloat16), ("nchw", "nhwc")):
        row, split = ask(op, case, dtype, layout)[:2]
        assert ROWS[row].startswith(f"toeplitz_{op}_") and ROWS[row].endswith("_7x9_nhwc"), layout
        assert packed(op, case, *meta(case, dtype, layout)) == ("xy" if layout == "nchw" else "")
        assert op != "wgrad" or split >= 3  # each phase has sums of its own
    uneven = dataclasses.replace(case, padding=(9, 8))
    assert ask(op, uneven, torch.float16, "nhwc")[3 + ROWS.index(f"toeplitz_{op}_f16_7x9_nhwc")] < 0


@pytest.mark.parametrize("op", OPS)
def test_two_filters_a_channel_with_stride_2_take_columns(op: str) -> None:
    for size, dtype in itertools.product((3, 7), (torch.float16, torch.float32)):
        case = Case("pairs", 128, 48, 64, 64, 96, size, size, (2, 2), (size // 2,) * 2, groups=48)
        assert named(op, case, dtype, "nhwc").startswith(f"column_{op}_"), (size, dtype)
        if op == "dgrad" or size == 7:  # over planes on packed copies, but fprop
            assert named(op, case, dtype, "nchw").startswith("column_") == (op != "fprop"), (size, dtype)


@pytest.mark.parametrize("op", OPS)
def test_two_filters_a_channel_in_float32_take_columns_in_channels_last(op: str) -> None:
    for size in (3, 5, 7):
        case = Case("pairs", 64, 96, 56, 56, 192, size, size, padding=(size // 2,) * 2, groups=96)
        assert named(op, case, torch.float32, "nhwc") == f"column_{op}_f32_{size}x{size}_nhwc"
        three = dataclasses.replace(case, K=288)
        walks = size == 3 and op == "fprop"  # of column's row
        assert named(op, three, torch.float32, "nhwc").startswith("column_") == walks


@pytest.mark.parametrize("op", OPS)
def test_two_filters_a_channel_in_16_bits_take_tensor_cores_in_channels_last(op: str) -> None:
    for size, dtype in itertools.product((3, 5, 7), (torch.float16, torch.bfloat16)):
        case = Case("pairs", 64, 96, 56, 56, 192, size, size, padding=(size // 2,) * 2, groups=96)
        assert named(op, case, dtype, "nhwc").startswith(f"toeplitz_{op}_"), (size, dtype)
    narrow = dataclasses.replace(case, W=8)  # wgrad of a single run
    assert named(op, narrow, torch.float16, "nhwc").startswith("toeplitz_") == (op != "wgrad")


def test_few_results_come_of_the_products_of_all_taps() -> None:
    """stem_taps.cuh: 16 bits in either layout, TF32 in channels_last; not strict float32, nor rows off vectors."""
    last, first = (
        Case("last", 1, 128, 512, 512, 3, 3, 3, padding=(1, 1)),
        Case("first", 32, 3, 224, 224, 64, 3, 3, padding=(1, 1)),
    )
    for dtype, name in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
        for layout in ("nhwc", "nchw"):
            assert named("fprop", last, dtype, layout) == f"stem_fprop_{name}_64x144_lines"
            assert named("dgrad", first, dtype, layout) == f"stem_dgrad_{name}_64x144_lines"
    assert named("fprop", last, torch.float32, "nhwc", allow_tf32=True) == "stem_fprop_f32_64x144_lines"
    assert named("fprop", last, torch.float32, "nhwc") == "stem_fprop_f32_32x32_lines"
    row = ROWS.index("stem_fprop_f16_64x144_lines")
    odd = Case("odd", 1, 36, 64, 63, 3, 3, 3, padding=(1, 1))
    assert all(row not in candidates(ask("fprop", odd, torch.float16, layout)) for layout in ("nhwc", "nchw"))
    many = (
        Case("strided", 1, 64, 64, 64, 3, 3, 3, (2, 2), (1, 1)),
        Case("rows", 1, 64, 64, 64, 8, 3, 3, padding=(1, 1)),
    )
    assert all(row not in candidates(ask("fprop", case, torch.float16, "nhwc")) for case in many)


def test_wgrad_of_one_filter_takes_all_warps() -> None:
    """pixels_sums.cuh, whose warps take turns where columns are few: 8x64x388x388 to 1 53.0 us, 73.1 without."""
    head = Case("head", 8, 64, 388, 388, 1, 1, 1)
    assert named("wgrad", head, torch.float16, "nhwc") == "pixels_wgrad_f16_64x64_nhwc"
    assert named("wgrad", head, torch.float32, "nhwc", allow_tf32=True) == "pixels_wgrad_f32_64x64_nhwc"


@pytest.mark.parametrize("op", OPS)
def test_small_depthwise_filters_of_any_size_walk_down_images(op: str) -> None:
    for (r, s), dtype in itertools.product(((3, 1), (1, 7), (3, 7), (2, 3)), (torch.float16, torch.float32)):
        case = Case("any", 32, 64, 56, 56, 64, r, s, padding=(r // 2, 0), groups=64)
        side = next(side for side in (3, 5, 7) if side >= max(r, s))
        name = ROWS[ask(op, case, dtype)[0]]
        if op == "wgrad" and dtype == torch.float32 and name.endswith(ANY_FILTER):
            continue
        assert name.startswith(f"stream_{op}_") and name.endswith(f"{side}x{side}_nchw"), name


@pytest.mark.parametrize("op", OPS)
def test_depthwise_filters_of_nine_to_13_taps_of_16_bits_walk_down_images(op: str) -> None:
    for (side, channels), size in itertools.product(((7, 960), (14, 384), (57, 64)), (9, 11, 13)):
        case = Case("taps", 64, channels, side, side, channels, size, size, padding=(size // 2,) * 2, groups=channels)
        row = f"stream_{op}_f16_{9 if size == 9 else 13}x{9 if size == 9 else 13}_nchw"
        assert ROWS[ask(op, case, torch.float16)[0]] == row, case
        if op == "wgrad":  # over copies of both tensors as planes
            assert ROWS[ask(op, case, torch.float16, "nhwc")[0]] == row, case


@pytest.mark.parametrize("op", OPS)
def test_windows_of_as_many_taps_as_they_hold_begin_on_words(op: str) -> None:
    """Such rows had one column too few: an odd padding moves the window by one."""
    for size, padding in itertools.product((9, 13), (3, 4)):
        case = Case("windows", 32, 64, 56, 56, 64, size, size, padding=(4, padding), groups=64)
        name = ROWS[ask(op, case, torch.float16)[0]]
        assert name.startswith("stream_") == (padding == 4), (size, padding, name)


@pytest.mark.parametrize("op", OPS)
def test_small_images_of_float32_walk_down_whole_planes(op: str) -> None:
    for side, size, stride in itertools.product((7, 14), (3, 5, 7), (1, 2)):
        case = Case("small", 256, 384, side, side, 384, size, size, (stride, stride), (size // 2,) * 2, groups=384)
        name = ROWS[ask(op, case, torch.float32)[0]]
        if stride == 2 and op == "wgrad" and name.endswith(ANY_FILTER):
            continue
        if name.endswith(FEW_OUTPUTS):  # near each other for 3x3
            continue
        assert name == f"stream_{op}_f32_{size}x{size}_nchw", (side, size, stride)


@pytest.mark.parametrize("op", OPS)
def test_few_small_images_take_one_launch_whose_threads_ask_for_all_inputs_at_once(op: str) -> None:
    layers = ((14, 3, 576, 1), (7, 3, 960, 2), (28, 3, 192, 1), (14, 5, 480, 1), (14, 5, 672, 2), (14, 7, 384, 1))
    for (side, size, channels, stride), batch, dtype in itertools.product(layers, (1, 4), DTYPES):
        if dtype == torch.float64:
            continue
        pad = (size // 2,) * 2
        case = Case("few", batch, channels, side, side, channels, size, size, (stride, stride), pad, groups=channels)
        for layout in ("nchw", "nhwc"):
            row, split_k, workspace, *_ = ask(op, case, dtype, layout)
            assert split_k == 1 and workspace == 0, (case, dtype, layout)
            # Whole planes, and the copy engine's columns of float32, are near; so are taps alone, with a stride.
            near = (size == 7 or dtype == torch.float32) and ROWS[row].startswith(("stream_", "column_"))
            near = near or (stride == 2 and ROWS[row].endswith(MET))
            assert near or ROWS[row].endswith("_0x4_nhwc" if (op, layout) == ("wgrad", "nhwc") else FEW_OUTPUTS), (
                ROWS[row],
                case,
            )


@pytest.mark.parametrize("op", OPS)
def test_few_outputs_of_any_padding_width_and_channels_take_one_launch(op: str) -> None:
    for case, layout in (
        (Case("padding", 2, 184, 14, 14, 184, 3, 3, groups=184), "nchw"),
        (Case("wide", 1, 24, 112, 112, 24, 5, 5, padding=(2, 2), groups=24), "nchw"),
        (Case("channels", 4, 58, 14, 14, 58, 3, 3, padding=(1, 1), groups=58), "nhwc"),
        (Case("filter", 1, 116, 28, 28, 116, 4, 4, padding=(1, 1), groups=116), "nhwc"),
    ):
        name = ROWS[ask(op, case, torch.float16, layout)[0]]
        ends = ("_0x4_nhwc",) if (op, layout) == ("wgrad", "nhwc") else FEW_OUTPUTS
        assert name.endswith((*ends, *MET) if case.name == "filter" else ends), (case, name)


@pytest.mark.parametrize("op", OPS)
def test_small_images_of_16_bits_walk_down_whole_planes(op: str) -> None:
    for side, size, stride in itertools.product((7, 14, 28), (3, 5, 7), (1, 2)):
        case = Case("small", 128, 384, side, side, 384, size, size, (stride, stride), (size // 2,) * 2, groups=384)
        name = ROWS[ask(op, case, torch.float16)[0]]
        if stride == 2 and op != "dgrad" and name.endswith(ANY_FILTER):
            continue
        if name.endswith(FEW_OUTPUTS):  # depthwise_lanes.cuh is near
            continue
        if name == "stream_wgrad_f16_16x16_nchw":  # stream_products.cuh is near
            continue
        assert name == f"stream_{op}_f16_{size}x{size}_nchw" + ("_s2" if stride == 2 else ""), (side, name)


def test_weights_of_many_small_planes_are_products_of_pixels_without_a_second_pass() -> None:
    for channels, size, dtype in itertools.product((960, 1024), (3, 5, 7), (torch.float16, torch.bfloat16)):
        case = Case("small", 128, channels, 7, 7, channels, size, size, padding=(size // 2,) * 2, groups=channels)
        row, split_k, workspace, *_ = ask("wgrad", case, dtype)
        assert ROWS[row].endswith("_16x16_nchw") and split_k == 1 and workspace == 0, ROWS[row]
    # Of up to 16 images there is nothing to copy meanwhile.
    for images, size, C, taps in ((8, 6, 1152, 5), (16, 6, 1152, 5), (16, 10, 1536, 3)):
        case = Case("few", images, C, size, size, C, taps, taps, padding=(taps // 2,) * 2, groups=C)
        assert not named("wgrad", case, torch.float16).endswith("_16x16_nchw"), case


@pytest.mark.parametrize("op", OPS)
def test_large_depthwise_filters_take_tensor_cores_or_strips(op: str) -> None:
    for layout, (image, size, tile) in itertools.product(("nchw", "nhwc"), ((56, 31, 64), (28, 29, 32), (14, 27, 16))):
        case = Case("large", 32, 128, image, image, 128, size, size, padding=(size // 2,) * 2, groups=128)
        tile = 32 if op == "wgrad" else tile
        for dtype in (torch.float16, torch.bfloat16):
            name = ROWS[ask(op, case, dtype, layout)[0]]
            copied = op == "wgrad" and layout == "nhwc"  # as planes
            rows = "nchw" if copied else layout
            assert name.startswith(f"band_{op}_") and name.endswith(f"{tile}x{tile}_{rows}"), name
            assert packed(op, case, *meta(case, dtype, layout)) == ("xy" if copied else ""), name
        name = ROWS[ask(op, case, torch.float32, layout)[0]]
        # fprop and dgrad in two parts on tensor cores, but where their tiles are mostly empty.
        assert name.startswith((f"band_{op}_f32_", f"strip_{op}_f32_")) and name.endswith(layout), name
        assert image != 56 or name.startswith("strip_" if op == "wgrad" else "band_"), name


@pytest.mark.parametrize("op", OPS)
def test_float32_filters_from_9x9_to_13x13_take_columns_quads_or_strips_of_seven_rows(op: str) -> None:
    for size in (9, 11, 13):
        case = Case("large", 32, 96, 56, 56, 96, size, size, padding=(size // 2,) * 2, groups=96)
        assert ROWS[ask(op, case, torch.float32, "nhwc")[0]] == f"column_{op}_f32_{size}x{size}_nhwc"
        name = ROWS[ask(op, case, torch.float32, "nchw")[0]]
        near = (f"strip_{op}_f32_", f"band_{op}_f32_8x8") if size == 13 else (f"strip_{op}_f32_",)
        if size == 9:  # stream_quads_f32.cuh
            near = (f"stream_{op}_f32_9x9",)
        assert name.startswith(near) and "1x8" not in name, name


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_15x15_filters_of_small_or_odd_images_take_units_of_four_rows(op: str) -> None:
    for N, C, size in ((64, 960, 7), (32, 64, 57), (32, 64, 65)):
        case = Case("large", N, C, size, size, C, 15, 15, padding=(7, 7), groups=C)
        assert ROWS[ask(op, case, torch.float16)[0]] == f"stream_{op}_f16_15x15_nchw", size
        over_planes = ROWS[ask(op, case, torch.float16, "nhwc")[0]] == f"stream_{op}_f16_15x15_nchw"
        assert over_planes == (size != 57), size  # there copies take too long


@pytest.mark.parametrize("op", OPS)
def test_large_depthwise_filters_with_a_stride_or_a_dilation_take_tensor_cores_or_shared_memory(op: str) -> None:
    for stride, dilation in ((2, 1), (1, 2)):
        steps = (stride,) * 2, (6 * dilation,) * 2, (dilation,) * 2
        case = Case("large", 32, 128, 56, 56, 128, 13, 13, *steps, groups=128)
        # In two of these the estimates of both families are within 2 % of each other.
        near = ("band", "depthwise") if (op, stride) == ("fprop", 2) else ("band",)
        for dtype in (torch.float16, torch.bfloat16):
            assert ROWS[ask(op, case, dtype)[0]].startswith(tuple(f"{family}_{op}_" for family in near))
        family = ("depthwise",) if dilation == 1 else ("column",)  # on packed copies
        assert ROWS[ask(op, case, torch.float32)[0]].startswith(tuple(f"{f}_{op}_f32_" for f in family))


@pytest.mark.parametrize("op", OPS)
def test_first_and_last_layers_take_stem_rows(op: str) -> None:
    first = Case("first", 64, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3))
    last = Case("last", 1, 64, 1080, 1920, 3, 3, 3, padding=(1, 1))
    for case, dtype, layout in itertools.product((first, last), (torch.float16, torch.bfloat16), ("nchw", "nhwc")):
        name = ROWS[ask(op, case, dtype, layout)[0]]
        narrow = op != "wgrad" and (op == "fprop") == (case is last)
        if (op, layout) == ("fprop", "nchw") and case is last:
            continue  # tma_planes.cuh is near
        ends = ("_any", "_lines") if narrow else (f"_{layout}", "_lean", "_halo")
        assert name.startswith(f"stem_{op}_") and name.endswith(ends), name
    for case, tf32 in itertools.product((first, last), (True, False)):
        assert ROWS[ask(op, case, torch.float32, allow_tf32=tf32)[0]].startswith("stem_")
    short = Case("short sums", 32, 3, 224, 224, 32, 3, 3, (2, 2), (1, 1))
    for dtype, layout in itertools.product((torch.float16, torch.bfloat16, torch.float32), ("nchw", "nhwc")):
        if op == "fprop":
            rows = [ROWS[ask(op, case, dtype, layout, allow_tf32=True)[0]] for case in (short, first)]
            near = "_nchw" if layout == "nchw" and dtype != torch.float32 else "_halo"
            assert rows[0].endswith("_lean") and rows[1].endswith((near, "_halo")), rows
    # Words that are read whole would take a step more: no alignment of x may take a row away.
    steps = Case("four steps of whole words", 1, 3, 15, 16, 32, 4, 4, (1, 2), (1, 1))
    lean = ROWS.index("stem_fprop_f16_16x64_lean")
    assert all(ask("fprop", steps, torch.float16, "nchw", align=align)[3 + lean] > 0 for align in (16, 2))
    nine = Case("nine products", 64, 1, 28, 28, 32, 3, 3, padding=(1, 1))  # whose split operands' error shows
    assert op != "fprop" or not ROWS[ask(op, nine, torch.float32)[0]].startswith("stem_")


@pytest.mark.parametrize("op", OPS)
def test_few_channels_in_patches_are_copied_and_take_dense_rows(op: str) -> None:
    """Also if a patch is no whole number of vectors, or no patch meets the last pixels; long steps of any channels."""
    of_few = (
        Case("vit/16", 64, 3, 224, 224, 768, 16, 16, (16, 16)),
        Case("vit/14", 64, 3, 224, 224, 1024, 14, 14, (14, 14)),
        Case("left over", 64, 3, 223, 226, 768, 16, 16, (16, 16)),
    )
    steps = Case("steps of 12", 32, 48, 230, 230, 96, 12, 12, (12, 12))
    for case, layout in (*itertools.product(of_few, ("nchw", "nhwc")), (steps, "nchw")):
        name = ROWS[ask(op, case, torch.float16, layout)[0]]
        assert name.startswith(f"tma_{op}_") or (case is steps and name.startswith("igemm_")), (case, layout, name)
        assert "x" in packed(op, case, *meta(case, torch.float16, layout))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("op", OPS)
def test_a_filter_as_large_as_the_image_is_planned_as_a_1x1_filter_of_more_channels(op: str, layout: str) -> None:
    whole = Case("whole", 32, 64, 7, 6, 256, 7, 6)
    as_channels = Case("channels", 32, 64 * 7 * 6, 1, 1, 256, 1, 1)
    for dtype in DTYPES:
        assert ask(op, whole, dtype, layout) == ask(op, as_channels, dtype, layout)


@pytest.mark.parametrize("op", OPS)
def test_steps_of_a_filter_s_own_width_are_planned_as_channels(op: str) -> None:
    steps = Case("steps", 8, 32, 24, 40, 64, 4, 4, (4, 4))
    as_channels = Case("channels", 8, 128, 24, 10, 64, 4, 1, (4, 1))
    for dtype in (torch.float16, torch.bfloat16):
        assert ask(op, steps, dtype, "nhwc") == ask(op, as_channels, dtype, "nhwc")


@pytest.mark.parametrize("op", OPS)
def test_asymmetric_depthwise_filters_take_the_row_that_holds_them(op: str) -> None:
    for r, s in ((1, 7), (7, 1), (3, 5), (2, 4)):
        case = Case("asymmetric", 32, 128, 28, 28, 128, r, s, padding=(r // 2, s // 2), groups=128)
        name = ROWS[ask(op, case, torch.float16, "nhwc")[0]]
        if op == "wgrad" and name.endswith("_0x4_nhwc"):
            continue  # depthwise_few_sums.cuh is near
        if max(r, s) < 7:
            # wgrad: the rows for more taps are near
            assert name.startswith(f"toeplitz_{op}_") and name.endswith("x9_nhwc" if op == "wgrad" else "3x5_nhwc"), (
                name
            )
        else:
            assert name.startswith(f"toeplitz_{op}_"), name


@pytest.mark.parametrize("op", OPS)
def test_layers_of_few_channels_a_group_take_the_grouped_row_of_their_layout(op: str) -> None:
    for per_group, layout, dtype in itertools.product((2, 4, 8, 24), ("nchw", "nhwc"), (torch.float16, torch.bfloat16)):
        case = Case("resnext", 64, 24 * 8, 28, 28, 24 * 8, 3, 3, padding=(1, 1), groups=24 * 8 // per_group)
        name = ROWS[ask(op, case, dtype, layout)[0]]
        if (op, per_group, layout) == ("wgrad", 24, "nhwc"):
            continue  # about where the dense rows take over
        variants = {"nchw": ("nchw", "lines"), "nhwc": ("lines",)}[layout]  # lines takes NCHW too
        assert name.startswith(f"grouped_{op}_") and name.endswith(variants), f"{per_group} {layout} {name}"


@pytest.mark.parametrize("tf32", (False, True))
@pytest.mark.parametrize("op", OPS)
def test_grouped_layers_in_float32_take_lines_in_channels_last(op: str, tf32: bool) -> None:
    for channels, side in ((128, 56), (256, 56), (512, 28)):
        if channels == 512 and op == "wgrad" and tf32:
            continue  # about where merged groups take over
        case = Case("resnext", 64, channels, side, side, channels, 3, 3, padding=(1, 1), groups=32)
        name = named(op, case, torch.float32, allow_tf32=tf32)
        assert name == f"grouped_{op}_f32_8x8_lines", f"{channels} {name}"


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_float32_groups_of_12_and_20_channels_are_units_of_lines(op: str) -> None:
    for per_group, groups, tf32 in itertools.product((12, 20), (5, 16), (False, True)):
        channels = per_group * groups
        case = Case("vectors", 32, channels, 28, 28, channels, 3, 3, padding=(1, 1), groups=groups)
        name = named(op, case, torch.float32, allow_tf32=tf32)
        assert name == f"grouped_{op}_f32_8x8_lines", f"{per_group} {name}"
        assert packed(op, case, *meta(case, torch.float32, "nhwc"), allow_tf32=tf32) == "", str(case)


@pytest.mark.parametrize("op", OPS)
def test_groups_of_9x9_filters_take_tensor_cores(op: str) -> None:
    for channels, side in ((64, 56), (128, 28), (256, 14)):
        case = Case("pyramid", 32, channels, side, side, channels // 4, 9, 9, padding=(4, 4), groups=16)
        for layout, dtype in itertools.product(("nchw", "nhwc"), (torch.float16, torch.float32)):
            name = named(op, case, dtype, layout, allow_tf32=True)
            assert name.startswith(("grouped_", "tma_")), f"{case} {layout} {dtype} {name}"


@pytest.mark.parametrize("op", OPS)
def test_groups_whose_units_are_too_large_for_lines_are_padded(op: str) -> None:
    for per_group, groups in ((5, 16), (7, 16), (10, 16), (14, 24), (6, 9)):
        channels = per_group * groups
        case = Case("odd groups", 32, channels, 28, 28, channels, 3, 3, padding=(1, 1), groups=groups)
        for layout in ("nchw", "nhwc") if per_group > 8 else ("nhwc",):
            assert named(op, case, torch.float32, layout) == f"grouped_{op}_f32_8x8_lines", f"{per_group} {layout}"
            assert packed(op, case, *meta(case, torch.float32, layout)) == "xwy", f"{per_group} {layout}"


@pytest.mark.parametrize("op", OPS)
def test_few_channels_a_group_and_rows_of_odd_length_stay_as_they_lie(op: str) -> None:
    row = "16x64" if op == "wgrad" else "32x64"
    for per_group, side in ((3, 28), (5, 28), (6, 28), (7, 28), (16, 27), (16, 33), (8, 15)):
        case = Case("rows", 32, per_group * 16, side, side, per_group * 16, 3, 3, padding=(1, 1), groups=16)
        for dtype in (torch.float16, torch.float32):
            name = named(op, case, dtype, "nchw")
            assert name == f"grouped_{op}_{'f16' if dtype == torch.float16 else 'f32'}_{row}_nchw", f"{case} {name}"
            assert packed(op, case, *meta(case, dtype, "nchw")) == "", f"{case} {dtype}"


def test_choices_that_estimates_had_wrong_stay_mended() -> None:
    """Each was 1.2 to 1.9 times as slow as the row that is expected here (docs/tuning/planner.md)."""
    taps = Case("strided", 8, 256, 28, 28, 512, 3, 3, stride=(2, 2), padding=(1, 1))
    assert named("fprop", taps, torch.float32, allow_tf32=True) == "tma_fprop_f32_64x128_lean"
    small = Case("small planes", 32, 1024, 8, 8, 2048, 1, 1)
    assert named("wgrad", small, torch.float32, "nchw", allow_tf32=True) == "pixels_wgrad_f32_128x128_nchw"
    off_lines = Case("off lines", 32, 768, 12, 12, 1536, 1, 1)
    assert named("fprop", off_lines, torch.float16, "nchw") == "pixels_fprop_f16_192x128_lines"
    packed_lines = Case("packed", 8, 832, 7, 7, 256, 1, 1)
    assert named("wgrad", packed_lines, torch.float16, "nchw") == "tma_wgrad_f16_64x64_lines"
    one_tap = Case("one tap", 6, 2, 338, 338, 32, 1, 1)
    assert named("fprop", one_tap, torch.float32, "nchw", allow_tf32=True) == "pixels_fprop_f32_256x64_nchw"


@pytest.mark.parametrize("op", OPS)
def test_few_channels_a_group_with_a_stride_take_lines(op: str) -> None:
    for channels, side, per_group in ((512, 28, 16), (512, 56, 16), (168, 56, 24), (888, 14, 24)):
        if op == "wgrad" and per_group == 16:
            continue  # about where merged groups take over
        case = Case("strided", 64, channels, side, side, channels, 3, 3, (2, 2), (1, 1), groups=channels // per_group)
        name = named(op, case, torch.float16)
        assert name == f"grouped_{op}_f16_8x8_lines", f"{case} {name}"


def test_groups_over_few_pixels_come_from_memory_to_registers() -> None:
    for op, N, channels, size, stride, groups in (
        ("fprop", 8, 608, 14, 2, 38),
        ("fprop", 1, 256, 14, 1, 32),
        ("dgrad", 1, 512, 28, 2, 32),
    ):
        case = Case("few", N, channels, size, size, channels, 3, 3, (stride, stride), (1, 1), groups=groups)
        assert named(op, case, torch.float16) == f"grouped_{op}_f16_16x16_nhwc", case


def test_small_images_of_16_or_32_channels_a_group_take_slabs_of_channels() -> None:
    for op, channels, groups in (("fprop", 672, 42), ("dgrad", 672, 42)):
        case = Case("small", 64, channels, 7, 7, channels, 3, 3, padding=(1, 1), groups=groups)
        for dtype, short in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
            assert named(op, case, dtype) == f"grouped_{op}_{short}_64x64_nhwc", f"{op} {dtype}"


def test_strided_groups_of_many_channels_over_nchw_take_warps_that_turn() -> None:
    wide = Case("L18", 32, 224, 112, 112, 224, 3, 3, (2, 2), (1, 1), groups=2)
    short = Case("RegNet", 32, 448, 56, 56, 448, 3, 3, (2, 2), (1, 1), groups=8)
    for op, dtype in itertools.product(("fprop", "dgrad"), (torch.float16, torch.bfloat16, torch.float32)):
        name = named(op, wide, dtype, "nchw", allow_tf32=True)
        assert name.endswith("_128x256_nchw"), f"{op} {dtype} {name}"
    assert named("fprop", short, torch.float32, "nchw", allow_tf32=True) == "grouped_fprop_f32_128x256_nchw"
    # Short rows of results: its stores take long.
    assert named("dgrad", short, torch.float16, "nchw") == "grouped_dgrad_f16_64x256_nchw"


def test_layers_that_draws_found_slow_take_the_faster_row() -> None:
    """Each took another row by an estimate, for 1.4 to 1.9 times the time."""
    half, single = torch.float16, torch.float32
    large = Case("31x31", 6, 109, 33, 33, 109, 31, 31, (2, 2), (15, 15), groups=109)
    for row, case, dtype, layout in (
        ("depthwise_wgrad_f32_0x4_nhwc", large, single, "nhwc"),
        ("tma_fprop_f32_64x128_im2col", Case("patches", 32, 3, 224, 224, 96, 4, 4, (4, 4)), single, "nhwc"),
        ("tma_fprop_f32_128x128_im2col", Case("1x1", 8, 1536, 10, 10, 2048, 1, 1), single, "nchw"),
        ("pixels_wgrad_f16_128x128_nchw", Case("1x1", 8, 1392, 14, 14, 192, 1, 1), half, "nchw"),
    ):
        assert named(row.split("_")[1], case, dtype, layout, allow_tf32=True) == row, case
    few = Case("7x7", 2, 6, 92, 92, 320, 7, 7, (2, 2), (3, 3))
    assert not named("fprop", few, half, "nchw").endswith("_halo")


def test_groups_of_networks_take_what_was_timed_to_be_faster() -> None:
    """Each took another row by an estimate, for 1.2 to 1.6 times the time."""

    def case(N: int, C: int, side: int, stride: int, groups: int) -> Case:
        return Case("network", N, C, side, side, C, 3, 3, (stride, stride), (1, 1), groups=groups)

    for op, dtype, layout, layer, row in (
        ("wgrad", torch.float16, "nchw", case(32, 2520, 14, 2, 15), "tma_"),  # 95 us, by rows as they lie 153
        ("wgrad", torch.float32, "nchw", case(8, 3024, 7, 1, 27), "tma_"),  # 44 us for 60
        ("dgrad", torch.float16, "nchw", case(1, 144, 28, 1, 9), "grouped_"),  # 12 to 13 us, packed 17
        ("dgrad", torch.float16, "nchw", case(32, 72, 112, 2, 3), "grouped_dgrad_f16_128x256"),  # 83 us for 115
        ("fprop", torch.float32, "nhwc", case(32, 128, 28, 2, 8), "grouped_fprop_f32_8x8_lines"),  # 15 us for 18
        ("fprop", torch.float16, "nchw", case(64, 432, 14, 1, 9), "grouped_fprop_f16_64x256"),  # 30 us for 36
        ("wgrad", torch.float16, "nhwc", case(128, 400, 7, 1, 25), "grouped_wgrad_f16_192x64"),  # 15 us for 20
        ("wgrad", torch.float16, "nhwc", case(1, 512, 14, 1, 16), "grouped_wgrad_f16_192x64"),  # 8.4 us for 9.8
        ("wgrad", torch.float16, "nhwc", case(1, 2048, 14, 2, 32), "tma_wgrad_f16_256x64"),  # 8.7 us for 10.8
        ("fprop", torch.float32, "nhwc", case(8, 160, 28, 2, 10), "tma_fprop_f32_64x32_lean"),  # 9.2 us for 10.0
        ("dgrad", torch.float32, "nhwc", case(32, 512, 28, 2, 32), "grouped_dgrad_f32_8x8_lines"),  # 35 us for 44
    ):
        name = named(op, layer, dtype, layout, allow_tf32=True)
        assert name.startswith(row), f"{layer} {op} {layout} {name}"


def test_small_layers_of_groups_take_a_tile_a_block() -> None:
    """Each was timed to be 1.2 to 1.4 times as fast as what was taken before."""
    half, single = torch.float16, torch.float32
    for op, dtype, (N, C, side, groups), tile in (
        ("fprop", half, (8, 128, 28, 4), "64x32"),  # 11.2 us by 128x64_halo, 9.2
        ("dgrad", half, (8, 128, 28, 4), "64x64"),  # 10.4, 8.3
        ("fprop", single, (16, 256, 14, 4), "64x64"),  # 14.8 by 256x32_halo, 12.5
        ("fprop", single, (8, 512, 7, 4), "64x128"),  # 15.0, 10.9
    ):
        case = Case("small", N, C, side, side, C, 3, 3, padding=(1, 1), groups=groups)
        short = "f16" if dtype == half else "f32"
        assert named(op, case, dtype, "nhwc", allow_tf32=True) == f"tma_{op}_{short}_{tile}_lean", case
        # Neither over NCHW nor of few channels, nor dgrad with a stride.
        others = (
            (case, "nchw"),
            (dataclasses.replace(case, groups=C // 8), "nhwc"),
            (dataclasses.replace(case, stride=(2, 2)), "nhwc"),
        )
        for other, layout in others if op == "dgrad" else others[:2]:
            rows = candidates(ask(op, other, dtype, layout, allow_tf32=True))
            assert not any(re.search("^tma_.*_lean$", ROWS[row]) for row in rows), f"{other} {layout}"


def test_two_groups_of_32_channels_are_copied_as_one() -> None:
    def sliced(op: str, case: Case, dtype: torch.dtype) -> bool:
        names = [ROWS[row] for row in candidates(ask(op, case, dtype, "nhwc", allow_tf32=True))]
        return any(re.fullmatch(rf"tma_{op}_b?f16_128x64_halo", name) for name in names)

    for op, dtype in itertools.product(("fprop", "dgrad"), (torch.float16, torch.bfloat16)):
        for side, stride in ((14, 1), (28, 2), (7, 1)):
            case = Case("resnext", 64, 1024, side, side, 1024, 3, 3, (stride, stride), (1, 1), groups=32)
            assert sliced(op, case, dtype), f"{op} {case}"
        # An odd group is left over; and fprop alone has that row for what is not sliced, without strides.
        for channels, groups, stride in ((96, 3, 2), (512, 32, 2), (256, 4, 2)):
            case = Case("others", 8, channels, 28, 28, channels, 3, 3, (stride, stride), (1, 1), groups=groups)
            assert not sliced(op, case, dtype), f"{op} {case}"
    large = Case("resnext", 64, 1024, 14, 14, 1024, 3, 3, padding=(1, 1), groups=32)
    # TF32 has a row of that tile for dgrad, which slices do not take away.
    rows = candidates(ask("dgrad", large, torch.float32, "nhwc", allow_tf32=True))
    assert "tma_dgrad_f32_128x64_halo" in [ROWS[row] for row in rows]
    strided = Case("resnext", 32, 1024, 28, 28, 1024, 3, 3, (2, 2), (1, 1), groups=32)
    for op, case in itertools.product(("fprop", "dgrad"), (large, strided)):
        assert named(op, case, torch.float16) == f"tma_{op}_f16_128x64_halo", f"{op} {case}"


def test_two_groups_of_16_channels_are_copied_as_one_in_tf32_with_a_stride() -> None:
    layer = Case("regnet", 32, 64, 112, 112, 64, 3, 3, (2, 2), (1, 1), groups=4)  # 48 us for 61
    assert named("fprop", layer, torch.float32, allow_tf32=True) == "tma_fprop_f32_256x32_halo"
    plain = Case("regnet", 32, 64, 112, 112, 64, 3, 3, (1, 1), (1, 1), groups=4)
    assert named("fprop", plain, torch.float32, allow_tf32=True) == "grouped_fprop_f32_8x8_lines"


def test_strided_wgrad_of_some_50_channels_a_group_copies_pixels_for_whole_rows_of_taps() -> None:
    for case in (
        Case("regnet", 32, 448, 56, 56, 448, 3, 3, (2, 2), (1, 1), groups=8),  # 60 us for 95
        Case("regnet", 32, 896, 28, 28, 896, 3, 3, (2, 2), (1, 1), groups=16),  # 42 us for 48
    ):
        for dtype in (torch.float16, torch.bfloat16):
            tiles = ("_576x64_halo", "_192x64_halo")  # the second layer takes 40 us by either
            assert named("wgrad", case, dtype).endswith(tiles), f"{case} {dtype}"
    for stride, groups in ((3, 8), (2, 1)):
        other = Case("other", 32, 448, 56, 56, 448, 3, 3, (stride, stride), (1, 1), groups=groups)
        rows = candidates(ask("wgrad", other, torch.float16, "nhwc"))
        assert not any(ROWS[row].endswith("_576x64_halo") for row in rows), str(other)


def test_wgrad_of_small_groups_is_one_launch_of_clusters() -> None:
    """Without a workspace, faster than two launches or a block a tile (docs/tuning/grouped.md)."""
    for N, channels, side, stride, groups in (
        (64, 1024, 7, 1, 32),
        (32, 512, 16, 2, 16),
        (64, 1024, 14, 1, 32),
        (64, 512, 14, 1, 8),
        (32, 672, 7, 1, 42),
        (32, 888, 7, 1, 37),
        (8, 208, 14, 1, 26),
    ):
        case = Case("groups", N, channels, side, side, channels, 3, 3, (stride, stride), (1, 1), groups=groups)
        for dtype, short in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
            assert named("wgrad", case, dtype) == f"grouped_wgrad_{short}_192x64_halo", f"{case} {dtype}"


def test_wgrad_of_groups_of_20_to_32_merges_those_that_share_a_tile() -> None:
    """Two or three groups are multiplied as one, and nothing is copied."""
    for per_group, dtype in itertools.product((20, 24, 32), (torch.float16, torch.bfloat16, torch.float32)):
        case = Case("resnext", 32, 16 * per_group, 28, 28, 16 * per_group, 3, 3, padding=(1, 1), groups=16)
        name = named("wgrad", case, dtype, allow_tf32=True)
        row = "_576x64_halo"
        if dtype != torch.float32 and per_group != 24:  # lines of 20 meet no other group's channels
            row = "_192x64_halo" if per_group == 32 else "_8x8_lines"
        assert name.endswith(row), f"{per_group} {dtype} {name}"
        assert packed("wgrad", case, *meta(case, dtype, "nhwc"), allow_tf32=True) == "", f"{per_group} {dtype}"
    # The last of the merged groups may lack some: 25 groups are four and a quarter.
    for channels, groups in ((400, 25), (384, 24)):
        case = Case("regnet", 8, channels, 7, 7, channels, 3, 3, padding=(1, 1), groups=groups)
        assert named("wgrad", case, torch.float16).endswith("_192x64_halo"), str(case)
    # Of 12 channels two groups, but not one, have whole vectors.
    vectors = Case("vectors", 32, 192, 28, 28, 192, 5, 5, padding=(2, 2), groups=16)
    assert packed("wgrad", vectors, *meta(vectors, torch.float16, "nhwc")) == ""


@pytest.mark.parametrize("op", OPS)
def test_grouped_layers_in_nchw_run_in_place_where_whole_rows_fit(op: str) -> None:
    def taken(width: int) -> tuple[str, str]:
        case = Case("strided", 64, 256, 56, width, 256, 3, 3, (2, 2), (1, 1), groups=32)
        x, w, y = (torch.empty(size, dtype=torch.float16, device="meta") for size in
                   (case.input_size, case.weight_size, case.output_size))  # fmt: skip
        return named(op, case, torch.float16, "nchw"), packed(op, case, x, w, y)

    row = f"grouped_{op}_f16_" + ("16x64_nchw" if op == "wgrad" else "8x8_lines")
    assert taken(28) == (row, "")
    assert taken(224) == ((row, "") if op == "wgrad" else (row, "xy"))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("op", OPS)
def test_layers_of_many_channels_a_group_in_nchw_run_in_place(op: str, dtype: torch.dtype) -> None:
    both = ((512, 14, 8), (896, 14, 16), (448, 28, 8))
    for channels, side, groups in both if op == "wgrad" else (*both, (1232, 14, 11), (2048, 7, 32)):
        case = Case("regnet", 64, channels, side, side, channels, 3, 3, padding=(1, 1), groups=groups)
        x, w, y = (torch.empty(size, dtype=dtype, device="meta") for size in
                   (case.input_size, case.weight_size, case.output_size))  # fmt: skip
        name = named(op, case, dtype, "nchw")
        assert re.fullmatch(rf"grouped_{op}_\w+_(64|128)x\d+_nchw", name), f"{case} {name}"
        assert packed(op, case, x, w, y) == "", str(case)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_wgrad_of_few_channels_a_group_in_nchw_reads_rows_as_they_lie(dtype: torch.dtype) -> None:
    for channels, side, groups, stride in ((128, 56, 32, 1), (512, 28, 32, 1), (256, 56, 32, 2), (1024, 28, 32, 2)):
        case = Case("resnext", 64, channels, side, side, channels, 3, 3, (stride, stride), (1, 1), groups=groups)
        name = named("wgrad", case, dtype, "nchw", allow_tf32=True)
        assert re.fullmatch(r"grouped_wgrad_\w+_16x64_nchw", name), f"{case} {name}"


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_groups_in_nchw_read_rows_that_begin_anywhere_as_they_lie(dtype: torch.dtype) -> None:
    """Tiles of rows were of rows of 16 bytes alone, and other wide images went to lines or were packed."""
    for channels, height, width, groups in ((512, 100, 167, 32), (256, 28, 33, 16), (256, 65, 65, 16)):
        case = Case("wide", 4, channels, height, width, channels, 3, 3, padding=(1, 1), groups=groups)
        for op, tile in (("fprop", "32x64"), ("dgrad", "32x64"), ("wgrad", "16x64")):
            name = named(op, case, dtype, "nchw", allow_tf32=True)
            assert re.fullmatch(rf"grouped_{op}_\w+_{tile}_nchw", name), f"{case} {name}"


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_results_off_vectors_are_runs_of_memory_where_a_tile_has_all_filters(dtype: torch.dtype) -> None:
    """They were packed, and unpacked by a launch of 4 to 8 us."""
    for filters in (65, 100, 127):
        case = Case("odd_filters", 32, 128, 28, 28, filters, 3, 3, padding=(1, 1))
        assert named("fprop", case, dtype).endswith("192x128_im2col"), case
        assert packed("fprop", case, *meta(case, dtype, "nhwc")) == "", case
    two = Case("two_tiles", 32, 128, 28, 28, 255, 3, 3, padding=(1, 1))
    assert packed("fprop", two, *meta(two, dtype, "nhwc")) == "wy"


def named(op: str, case: Case, dtype: torch.dtype, layout: str = "nhwc", **kwargs: object) -> str:
    return ROWS[ask(op, case, dtype, layout, **kwargs)[0]]


def stores_anywhere(name: str) -> bool:
    """Whether this row of wgrad writes few weights in any strides: all of its sums go through the workspace."""
    return name.startswith("tma_wgrad_") and "_halo" in name


DENSE = Case("dense", 32, 128, 56, 56, 128, 3, 3, padding=(1, 1))
ODD = Case("odd", 32, 128, 57, 57, 128, 3, 3, padding=(1, 1))  # rows of no whole vectors


@pytest.mark.parametrize(
    ("wrong", "op", "case", "dtype", "layout"),
    (
        # strip_rows.cuh stores rows off 16 bytes one by one: 315 us, 177.
        (
            "strip_fprop_f32_7x8",
            "fprop",
            Case("11x1", 222, 45, 151, 13, 45, 11, 1, (1, 1), (5, 0), groups=45),
            torch.float32,
            "nchw",
        ),
        (
            "strip_dgrad_f32_7x8",
            "dgrad",
            Case("11x1", 256, 48, 14, 14, 48, 11, 1, (1, 1), (5, 0), groups=48),
            torch.float32,
            "nchw",
        ),
        # depthwise_met.cuh reads filters of many taps once: 11.8, 8.0.
        (
            "column_dgrad_f32",
            "dgrad",
            Case("11x11", 2, 8, 24, 19, 8, 11, 11, (1, 1), (1, 0), groups=8),
            torch.float32,
            "nhwc",
        ),
        # pixels_direct.cuh in TF32, pixels_windows.cuh over 7x7: 28.1, 16.5; 36.3, 21; 25.6, 19.3.
        ("pixels_fprop_f32_32x32", "fprop", Case("direct", 32, 1024, 7, 7, 128, 1, 1), torch.float32, "nchw"),
        ("pixels_wgrad_f32_32x32", "wgrad", Case("direct", 32, 1440, 7, 7, 128, 1, 1), torch.float32, "nchw"),
        ("pixels_dgrad_f16_128x248", "dgrad", Case("windows", 128, 576, 7, 7, 128, 1, 1), torch.float16, "nchw"),
        # Phases of SIMT's dgrad over groups: 23.3, 14.6.
        (
            "simt_dgrad_f16_64x64",
            "dgrad",
            Case("groups", 92, 69, 8, 8, 69, 3, 3, (3, 3), groups=3),
            torch.float16,
            "nchw",
        ),
    ),
    ids=str,
)
def test_rows_that_were_estimated_too_short_are_not_chosen(
    wrong: str, op: str, case: Case, dtype: torch.dtype, layout: str
) -> None:
    """Each was chosen, and took as long as the first figure, the row that is now the second."""
    assert not named(op, case, dtype, layout, allow_tf32=True).startswith(wrong)


@pytest.mark.parametrize("op", OPS)
def test_dense_channels_last_layers_take_the_copy_engine(op: str) -> None:
    layers = (
        DENSE,
        Case("strided", 32, 128, 56, 56, 256, 3, 3, (2, 2), (1, 1)),
        Case("dilated", 8, 2048, 65, 65, 256, 3, 3, (1, 1), (36, 36), (36, 36)),
        Case("pointwise", 32, 256, 28, 28, 64, 1, 1),
        Case("asymmetric", 32, 160, 17, 17, 160, 1, 7, (1, 1), (0, 3)),
        Case("groups", 32, 224, 28, 28, 224, 3, 3, (1, 1), (1, 1), groups=2),
        Case("latency", 1, 512, 7, 7, 512, 3, 3, padding=(1, 1)),
    )
    for case, dtype in itertools.product(layers, (torch.float16, torch.bfloat16)):
        assert named(op, case, dtype).startswith(f"tma_{op}_"), case
        assert packed(op, case, *meta(case, dtype, "nhwc")) == "", case
        assert not named(op, case, dtype, capability=100).startswith("tma_"), case


@pytest.mark.parametrize("op", OPS)
def test_float32_is_rounded_to_tf32_only_where_that_is_allowed(op: str) -> None:
    strict = named(op, DENSE, torch.float32, allow_tf32=False)
    assert strict.startswith(f"tma_strict_{op}_f32_")
    assert named(op, DENSE, torch.float32, allow_tf32=True).startswith(f"tma_{op}_f32_")


# Rows that round float32 operands to TF32 whatever they are asked for.
ROUNDING = re.compile(r"(tma|igemm)_\w+_f32_")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
def test_no_row_that_rounds_to_tf32_supports_strict_float32(op: str, layout: str) -> None:
    rounding = {row for row, name in enumerate(ROWS) if ROUNDING.match(name) and "strict" not in name}
    met: set[int] = set()
    for case in CASES:
        tensors = meta(case, torch.float32, layout)
        wrong = rounding.intersection(candidates(plan(op, case, *tensors, allow_tf32=False)))
        assert not wrong, f"{case}: {', '.join(ROWS[row] for row in wrong)}"
        met |= rounding.intersection(candidates(plan(op, case, *tensors, allow_tf32=True)))
    assert met, "no such row is ever supported?"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ("nhwc", "nchw"))
def test_strict_float32_packs_the_operands_of_another_layout(op: str, layout: str) -> None:
    read = {"fprop": "x", "dgrad": "y", "wgrad": "xwy"}[op] if layout == "nchw" else ""
    case = dataclasses.replace(DENSE, C=64, K=64)  # of more channels winograd.cuh reads any layout
    assert packed(op, case, *meta(case, torch.float32, layout), allow_tf32=False) == read
    # Filters are split as they lie, unless their channels are padded.
    if op != "wgrad" and layout == "nchw":
        case = dataclasses.replace(DENSE, C=48, K=48)
        assert "w" in packed(op, case, *meta(case, torch.float32, layout), allow_tf32=False)


@pytest.mark.parametrize("op", OPS)
def test_strict_float32_by_fma_copies_vectors_of_channels(op: str) -> None:
    row = ROWS.index(f"simt_{op}_f32_128x64_nhwc")
    odd = Case("odd", 32, 127, 56, 56, 129, 3, 3, padding=(1, 1))
    # 2^30 elements: the vectors' addresses have 32 bits.
    large = Case("large", 2688, 128, 56, 56, 128, 3, 3, padding=(1, 1))
    for case, layout in itertools.product((DENSE, odd, large), ("nhwc", "nchw")):
        assert (row in candidates(ask(op, case, torch.float32, layout))) == (case is DENSE), (case, layout)
    assert named(op, DENSE, torch.float32, capability=100) == ROWS[row]


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_strict_float32_takes_tensor_cores_where_that_is_faster(op: str) -> None:
    def strict(case: Case, layout: str = "nhwc") -> str:
        return named(op, case, torch.float32, layout, allow_tf32=False)

    for layout in ("nhwc", "nchw"):
        assert strict(DENSE, layout) == f"tma_strict_{op}_f32_128x128_im2col"
        assert strict(Case("64", 32, 64, 56, 56, 64, 3, 3, padding=(1, 1)), layout) == (
            f"tma_strict_{op}_f32_128x64_im2col"
        )
        assert strict(Case("32", 32, 32, 56, 56, 32, 3, 3, padding=(1, 1)), layout) == (
            f"tma_strict_{op}_f32_128x32_im2col"
        )
    assert strict(Case("odd", 32, 127, 56, 56, 129, 3, 3, padding=(1, 1))).startswith("tma_strict_")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ("nhwc", "nchw"))
def test_strict_3x3_filters_of_many_channels_take_fewer_products(op: str, layout: str) -> None:
    def named_strictly(case: Case, **facts: object) -> str:
        return named(op, case, torch.float32, layout, allow_tf32=False, **facts)

    row = f"tma_strict_{op}_f32_2x2_any"
    many = Case("512", 64, 512, 28, 28, 512, 3, 3, padding=(1, 1))
    assert named_strictly(many) == row
    assert not named_strictly(many, capability=100).startswith("tma_")
    # Memory bounds few channels; steps, dilations and other filters have no such form.
    for other in (
        dataclasses.replace(many, C=64, K=64),
        dataclasses.replace(many, stride=(2, 2)),
        dataclasses.replace(many, dilation=(2, 2), padding=(2, 2)),
        dataclasses.replace(many, R=5, padding=(2, 1)),
    ):
        assert named_strictly(other) != row, other
    if op == "wgrad" and layout == "nchw":
        assert named_strictly(Case("168 a group", 8, 672, 28, 28, 672, 3, 3, padding=(1, 1), groups=4)) == row


@pytest.mark.parametrize("layout", ("nhwc", "nchw"))
def test_strict_float32_has_rows_for_few_filters_few_channels_and_few_pixels(layout: str) -> None:
    def named_strictly(op: str, *sizes: int, **facts: object) -> str:
        return named(op, Case("few", *sizes, **facts), torch.float32, layout, allow_tf32=False)

    turned = "tma_strict_wgrad_f32_128x64_narrow"
    assert named_strictly("wgrad", 64, 128, 28, 28, 32, 3, 3, padding=(1, 1)) == turned
    assert named_strictly("wgrad", 64, 32, 28, 28, 128, 3, 3, padding=(1, 1)) != turned
    assert named_strictly("wgrad", 64, 128, 28, 28, 32, 3, 3, (2, 2), padding=(1, 1)) != turned
    phases = "tma_strict_dgrad_f32_128x64_phases"
    assert named_strictly("dgrad", 128, 3, 224, 224, 64, 11, 11, (4, 4), padding=(2, 2)) == phases
    assert named_strictly("dgrad", 256, 3, 224, 224, 64, 7, 7, (2, 2), padding=(3, 3)) != phases
    small = "pixels_wgrad_f32_32x16_halo"
    assert (named_strictly("wgrad", 1, 512, 7, 7, 512, 3, 3, padding=(1, 1)) == small) == (layout == "nchw")
    few = named_strictly("fprop", 32, 8, 112, 112, 16, 1, 1), named_strictly("dgrad", 32, 64, 55, 55, 16, 1, 1)
    assert [name.endswith("_1024x16_halo") for name in few] == [layout == "nchw"] * 2
    assert named_strictly("wgrad", 8, 512, 14, 14, 512, 3, 3, padding=(1, 1)) != small


def test_groups_of_many_inputs_and_one_result_are_not_summed_tap_by_tap_in_channels_last() -> None:
    """A warp's lanes have results of one group after the other, whose inputs lie in lines of their own."""
    case = Case("32 to 1", 64, 96, 32, 80, 3, 3, 1, padding=(1, 0), groups=3)
    assert named("fprop", case, torch.float32, "nhwc", allow_tf32=False).startswith("tma_strict_")
    assert named("fprop", case, torch.float32, "nchw", allow_tf32=False).startswith("depthwise_")


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_strict_float32_of_a_few_products_stays_on_fma(op: str) -> None:
    # Packed copies, which these layouts may take, have more channels.
    for channels, layout in itertools.product((1, 3, 4, 15), ("nhwc", "nchw")):
        few = Case("few", 32, channels, 28, 28, channels, 3, 3, padding=(1, 1))
        rows = candidates(ask(op, few, torch.float32, layout, allow_tf32=False))
        assert not any(ROWS[row].startswith("tma_strict") for row in rows), (channels, layout)


@pytest.mark.parametrize("op", OPS)
def test_float64_copies_vectors_of_channels_where_they_are_contiguous(op: str) -> None:
    x, w, y = (t.contiguous(memory_format=torch.channels_last) for t in meta(DENSE, torch.float64, "nchw"))
    rows = candidates(plan(op, DENSE, x, w, y))
    assert ROWS.index(f"simt_{op}_f64_64x64_nhwc") in rows
    assert ROWS.index(f"simt_{op}_f64_64x64_nhwc") not in candidates(
        plan(op, DENSE, *meta(DENSE, torch.float64, "nchw"))
    )


def test_tf32_dgrad_reads_filters_as_they_are_where_few_pixels_meet_them() -> None:
    few = Case("few", 2, 1280, 8, 8, 1280, 3, 3, padding=(1, 1))
    many = Case("many", 64, 256, 56, 56, 256, 3, 3, padding=(1, 1))
    assert "_raw" in named("dgrad", few, torch.float32, allow_tf32=True)
    assert "_raw" not in named("dgrad", many, torch.float32, allow_tf32=True)


@pytest.mark.parametrize("op", OPS)
def test_tf32_tiles_are_as_wide_as_the_layer(op: str) -> None:
    for channels in (160, 192):
        case = Case("inception", 64, channels, 17, 17, channels, 7, 1, padding=(3, 0))
        assert f"x{channels}_" in named(op, case, torch.float32, allow_tf32=True)


def test_tf32_splits_the_tiles_of_the_last_round() -> None:
    """145 tiles for 132 SMs: the steps of the last 13 are shared out; only they take workspace beside the filters."""
    case = Case("inception", 64, 192, 17, 17, 192, 7, 1, padding=(3, 0))
    plan = ask("fprop", case, torch.float32, "nhwc", allow_tf32=True)
    assert plan[1] > 1
    assert plan[2] <= (13 + 132) * 128 * 192 * 4 + 192 * 192 * 7 * 4


def test_tf32_shares_no_tiles_that_would_be_cut_into_many_strips() -> None:
    """392 tiles: of the last 128 four blocks would take a strip each of 32, which cost more than the rest."""
    assert ask("fprop", Case("pointwise", 64, 512, 28, 28, 128, 1, 1), torch.float32, "nhwc", allow_tf32=True)[1] == 1


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
def test_tf32_layers_of_64_filters_exchange_operands(op: str, layout: str) -> None:
    case = Case("vgg", 32, 64, 224, 222, 64, 3, 3, padding=(1, 1))
    assert named(op, case, torch.float32, layout, allow_tf32=True) == f"tma_{op}_f32_256x64_halo"


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_tf32_layers_over_nchw_run_in_place_where_rows_are_vectors(op: str) -> None:
    def taken(case: Case, layout: str = "nchw") -> tuple[str, str]:
        tensors = meta(case, torch.float32, layout)
        return named(op, case, torch.float32, layout, allow_tf32=True), packed(op, case, *tensors, allow_tf32=True)

    for case in (
        Case("vgg", 32, 64, 224, 224, 64, 3, 3, padding=(1, 1)),
        Case("resnet", 256, 64, 56, 56, 64, 3, 3, padding=(1, 1)),
        Case("column", 16, 128, 64, 64, 128, 7, 1, padding=(3, 0)),
    ):
        name, copies = taken(case)
        assert re.fullmatch(rf"tma_{op}_f32_(512x64|256x128|256x64)_nchw", name) and copies == "", case
    for case, layout in (
        (Case("rows off vectors", 32, 64, 224, 222, 64, 3, 3, padding=(1, 1)), "nchw"),
        (Case("stride", 32, 64, 224, 224, 64, 3, 3, (2, 2), (1, 1)), "nchw"),
        (Case("channels_last", 32, 64, 224, 224, 64, 3, 3, padding=(1, 1)), "nhwc"),
    ):
        assert not taken(case, layout)[0].endswith("_nchw"), case


def test_tf32_weight_gradients_take_a_row_of_taps_at_once() -> None:
    halo = Case("halo", 32, 64, 224, 224, 64, 3, 3, padding=(1, 1))
    assert named("wgrad", halo, torch.float32, allow_tf32=True) == "tma_wgrad_f32_576x64_halo"
    # By lean tiles of 128 columns these took 1.25 times as long.
    for few in (
        Case("densenet", 64, 128, 28, 28, 32, 3, 3, padding=(1, 1)),
        Case("densenet", 16, 96, 56, 56, 32, 3, 3, padding=(1, 1)),
    ):
        assert not named("wgrad", few, torch.float32, allow_tf32=True).endswith("lean")


@pytest.mark.parametrize("layout", ("nhwc", "nchw"))
def test_strict_float32_weight_gradients_take_tensor_cores_by_tiles_that_fit(layout: str) -> None:
    for case, tile in (
        (dataclasses.replace(DENSE, stride=(2, 2)), "128x128"),
        (Case("64", 32, 64, 56, 56, 64, 3, 3, padding=(1, 1)), "192x64"),
        (Case("32", 32, 128, 7, 7, 32, 3, 3, padding=(1, 1)), "192x32"),
        (Case("56 a group", 32, 448, 28, 28, 448, 3, 3, padding=(1, 1), groups=8), "192x64"),
    ):
        assert named("wgrad", case, torch.float32, layout) == f"tma_strict_wgrad_f32_{tile}_im2col"
        assert not named("wgrad", case, torch.float32, layout, capability=100).startswith("tma_")
    few = Case("4 a group", 64, 128, 56, 56, 128, 3, 3, padding=(1, 1), groups=32)
    assert named("wgrad", few, torch.float32, layout).startswith("grouped_")


@pytest.mark.parametrize("op", OPS)
def test_what_the_copy_engine_cannot_take_is_gathered(op: str) -> None:
    beyond = [
        Case("corner", 8, 136, 56, 56, 136, 3, 3, (1, 1), (130, 130)),  # a padding beyond 127
        Case("long steps", 8, 64, 112, 112, 128, 3, 3, (9, 9), (1, 1)),
    ]
    offset = Case("offset", 8, 64, 280, 280, 64, 3, 3, (1, 1), (1, 1), (128, 128))  # (3 - 1) * 128 > 255
    prime = Case("prime offset", 8, 64, 280, 280, 64, 3, 3, (1, 1), (1, 1), (131, 131))  # no parts' taps are nearer
    beyond.append(offset if op == "wgrad" else prime)
    for case in beyond:
        # Pixel by pixel from where they are, or into patches.
        gathered = named(op, case, torch.float16).startswith(f"igemm_{op}_")
        assert gathered or "x" in packed(op, case, *meta(case, torch.float16, "nhwc")), case
        if op != "dgrad":
            assert "x" in packed(op, case, *meta(case, torch.float16, "nchw")), case
        name = named(op, case, torch.float32, allow_tf32=True)
        most_phases_empty = op == "dgrad" and case.stride[0] > case.R  # mostly zeros to store
        assert name.startswith((f"igemm_{op}_f32", f"tma_{op}_f32")) or most_phases_empty, (case, name)
    many = Case("phases", 8, 64, 60, 60, 64, 5, 5, (5, 5), (2, 2))  # 25 phases of dgrad
    assert named(op, many, torch.float16).startswith("tma_")


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=("f16", "tf32"))
def test_what_the_copy_engine_takes_in_parts_is_not_gathered(dtype: torch.dtype) -> None:
    overlapping = Case("25 phases", 8, 64, 256, 256, 128, 9, 9, (5, 5))
    far = Case("far taps", 4, 128, 256, 256, 128, 3, 3, (1, 1), (140, 140), (140, 140))
    for op, case in (("dgrad", overlapping), ("dgrad", far), ("fprop", far)):
        for layout in ("nchw", "nhwc"):
            row, *_ = ask(op, case, dtype, layout, allow_tf32=True)
            assert ROWS[row].startswith(f"tma_{op}_"), (op, case, layout)
        assert packed(op, case, *meta(case, dtype, "nhwc"), allow_tf32=True) == "", (op, case)


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
def test_dgrad_of_steps_beyond_the_filter_is_one_product_of_patches(layout: str) -> None:
    for case in (
        Case("3x3 by 10", 16, 67, 100, 100, 133, 3, 3, (10, 10)),
        Case("7x7 by 7", 32, 64, 224, 224, 64, 7, 7, (7, 7)),
        Case("dilated", 8, 128, 96, 96, 256, 3, 3, (7, 7), (2, 2), (3, 3)),
    ):
        for dtype in (torch.float16, torch.float32):
            tensors = meta(case, dtype, layout)
            name = ROWS[plan("dgrad", case, *tensors, allow_tf32=True)[0]]
            assert name.startswith("tma_dgrad_"), (case, name)
            in_place = layout == "nhwc" and case.stride[1] == case.S  # core/folded.h: its columns become channels
            assert in_place != ("x" in packed("dgrad", case, *tensors, allow_tf32=True)), case


def large_dense_cases(count: int) -> list[Case]:
    """Whose arithmetic is worth tensor cores: far taps, long steps, overlapping or not, large filters, any padding."""
    dice = random.Random(7)

    def near(least: float, most: float) -> int:
        return round(math.exp(dice.uniform(math.log(least), math.log(most))))

    made: list[Case] = []
    while len(made) < count:
        R, S = dice.choice(((3, 3), (3, 3), (5, 5), (7, 7), (2, 5), (1, 9), (near(7, 48), near(7, 48))))
        stride = dice.choice(((1, 1), (1, 1), (2, 2), (near(1, 12), near(1, 12)), (R, S), (near(1, R), near(1, S))))
        dilation = dice.choice(((1, 1), (1, 1), (2, 3), (near(4, 64), near(4, 64)), (near(64, 300), near(1, 300))))
        reach = dilation[0] * (R - 1), dilation[1] * (S - 1)
        padding = dice.choice(
            ((0, 0), (reach[0] // 2, reach[1] // 2), tuple(dice.randrange(r + 1) for r in reach for _ in range(2)))
        )
        case = Case(
            f"large{len(made)}", near(1, 128), near(16, 1024), near(1, 400), near(1, 400), near(16, 1024), R, S,
            stride, padding, dilation,
        )  # fmt: skip
        if case.H + sum(case.padding4[:2]) < 1 or case.W + sum(case.padding4[2:]) < 1 or case.P < 1 or case.Q < 1:
            continue
        x, w, y = (math.prod(size) for size in (case.input_size, case.weight_size, case.output_size))
        flops = 2.0 * y * case.C * R * S
        # At 40 TFLOP/s of FMA units it would take three times what its elements take at 3 TB/s, and 20 us.
        if max(x, w, y) < 2**29 and flops < 1e13 and flops / 40e12 > 3 * (x + w + y) * 4 / 3e12 + 20e-6:
            made.append(case)
    return made


def flops_in_images(case: Case) -> float:
    """Of taps that meet an image, not its padding."""

    def meetings(extent: int, pixels: int, taps: int, stride: int, pad: int, dilation: int) -> int:
        return sum(0 <= i * stride + tap * dilation - pad < extent for i in range(pixels) for tap in range(taps))

    top, _, left, _ = case.padding4
    along_h = meetings(case.H, case.P, case.R, case.stride[0], top, case.dilation[0])
    along_w = meetings(case.W, case.Q, case.S, case.stride[1], left, case.dilation[1])
    return 2.0 * case.N * case.C * case.K * along_h * along_w


LARGE = [case for case in large_dense_cases(400) if flops_in_images(case) > 0.8e9]


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("op", OPS)
def test_large_dense_layers_always_take_tensor_cores(op: str, layout: str) -> None:
    """Whatever their taps, steps, padding, channel counts and alignment are."""
    for case, align in zip(LARGE, itertools.cycle((16, 16, 8, 2)), strict=False):
        for dtype in (torch.float16, torch.float32):
            name = named(op, case, dtype, layout, align=max(align, dtype.itemsize), allow_tf32=True)
            apart = op == "dgrad" and layout == "nchw" and case.stride[1] > 1 and dtype == torch.float32
            assert apart or not name.startswith(("simt_", "depthwise_")), (case, layout, name)


@pytest.mark.parametrize("op", OPS)
def test_other_layouts_and_channel_counts_are_packed(op: str) -> None:
    """Only what needs it: fprop and dgrad write their results in any strides, dgrad only whole vectors of channels, and
    fprop no odd channels that lie side by side. Lean's rows do.

    So does wgrad, if every sum goes through the workspace (halo) and there are few weights.
    """
    odd_c = Case("odd C", 32, 60, 56, 56, 64, 3, 3, padding=(1, 1))  # lines of x off 16 bytes
    odd_k = Case("odd K", 32, 64, 56, 56, 63, 3, 3, padding=(1, 1))
    # its filters are channels_last in any layout
    pointwise = Case("pointwise", 64, 256, 27, 27, 512, 1, 1, padding=(1, 0))
    groups = Case("groups", 64, 1024, 14, 14, 1024, 3, 3, padding=(1, 1), groups=4)
    strided = Case("strided", 64, 128, 56, 56, 128, 3, 3, (2, 2), (1, 1))  # a phase's pixels are no neighbours

    for case, layout, which in (
        (ODD, "nchw", {"fprop": "xw", "dgrad": "wy", "wgrad": "xwy"}),
        (odd_c, "nhwc", {"fprop": "xw", "dgrad": "xw", "wgrad": "xw"}),
        (odd_k, "nhwc", {"fprop": "wy", "dgrad": "wy", "wgrad": "wy"}),
        (pointwise, "nchw", {"fprop": "x", "dgrad": "y", "wgrad": "xy"}),
        (groups, "nchw", {"fprop": "xw", "dgrad": "wy", "wgrad": "xwy"}),
        (strided, "nchw", {"fprop": "xw", "dgrad": "xwy", "wgrad": "xwy"}),
    ):
        for dtype in (torch.float16, torch.bfloat16):
            name = named(op, case, dtype, layout)
            assert name.startswith(f"tma_{op}_"), case
            # Results of any number of channels, in any strides.
            anywhere = stores_anywhere(name) if case is ODD else case is odd_k and name.endswith("_lean")
            expected = which[op].replace("w", "") if anywhere else which[op]
            assert packed(op, case, *meta(case, dtype, layout)) == expected, case
            assert not named(op, case, dtype, layout, capability=100).startswith("tma_"), case
    # In TF32 fprop and dgrad store lines of odd channels, of few by rows of lean.
    for filters, expected in ((63, ""), (65, ""), (91, ""), (129, ""), (17, "")):
        lines = Case("lines", 16, 64, 56, 56, filters, 3, 3, padding=(1, 1))
        name, which = (
            named("fprop", lines, torch.float32, "nhwc", allow_tf32=True),
            packed("fprop", lines, *meta(lines, torch.float32, "nhwc"), allow_tf32=True),
        )
        assert which == expected, f"{filters} {name} {which}"
    for channels, expected in ((129, "w"), (117, "w"), (18, "xw")):
        lines = Case("lines", 16, channels, 56, 56, 128, 3, 3, padding=(1, 1))
        assert packed("dgrad", lines, *meta(lines, torch.float32, "nhwc"), allow_tf32=True) == expected, channels
    in_place = stores_anywhere(named(op, DENSE, torch.float16, align=8))
    # Results off 16 bytes are stored by pairs.
    unaligned = {"fprop": "xw", "dgrad": "wy", "wgrad": "xy" if in_place else "xwy"}[op]
    assert packed(op, DENSE, *meta(DENSE, torch.float16, "nhwc"), align=8) == unaligned
    depthwise = Case("depthwise", 32, 96, 56, 56, 96, 3, 3, padding=(1, 1), groups=96)
    tiny = Case("tiny", 1, 3, 8, 8, 4, 3, 3)
    for case in (depthwise, tiny):
        expected = "xy" if case is tiny and op == "wgrad" else ""  # 8.7 us by lean on packed copies, as estimated
        assert packed(op, case, *meta(case, torch.float16, "nchw")) == expected, case


def test_few_gradients_in_tf32_over_nchw_are_stored_where_they_belong() -> None:
    """Rather than by a launch that unpacks them: dgrad's pixels of a stride's phases, and wgrad's filters."""
    few = Case("few", 8, 64, 28, 28, 128, 3, 3, (2, 2), (1, 1))
    many = Case("many", 64, 256, 56, 56, 256, 3, 3, (2, 2), (1, 1))
    for case, which in ((few, {"dgrad": "wy", "wgrad": "xy"}), (many, {"dgrad": "xwy", "wgrad": "xwy"})):
        for op, expected in which.items():
            tensors = meta(case, torch.float32, "nchw")
            assert named(op, case, torch.float32, "nchw", allow_tf32=True).startswith(f"tma_{op}_"), case
            assert packed(op, case, *tensors, allow_tf32=True) == expected, (op, case)


@pytest.mark.parametrize("op", OPS)
def test_a_group_that_ends_within_a_step_is_copied_in_place(op: str) -> None:
    """fprop and dgrad reduce 16 channels at a time, TF32 32: zeros follow the group's, not the next group's."""
    for per_group, dtype, tf32 in ((56, torch.float16, False), (112, torch.float32, True)):
        channels = 4 * per_group
        case = Case("groups", 32, channels, 56, 56, channels, 3, 3, padding=(1, 1), groups=4)
        assert named(op, case, dtype, allow_tf32=tf32).startswith(f"tma_{op}_"), case
        assert packed(op, case, *meta(case, dtype, "nhwc"), allow_tf32=tf32) == "", case
    # A map of groups allows for small padding alone; beyond, the groups are padded.
    case = Case("padding", 32, 224, 28, 28, 224, 3, 3, padding=(9, 9), groups=4)
    rows = [ROWS[row] for row in candidates(plan(op, case, *meta(case, torch.float16, "nhwc")))]
    assert any(name.startswith("tma_") for name in rows)


@pytest.mark.parametrize("op", OPS)
def test_pointwise_layers_of_whole_vectors_of_pixels_stay_in_place(op: str) -> None:
    """Any number of channels; filters are packed only where those of a filter take no vectors."""
    layers = (
        Case("planes", 64, 64, 56, 56, 256, 1, 1),
        Case("planes", 32, 512, 28, 28, 128, 1, 1),
        Case("planes", 64, 24, 56, 56, 144, 1, 1),
        Case("planes", 64, 144, 28, 28, 40, 1, 1),
    )
    for case, dtype in itertools.product(layers, (torch.float16, torch.bfloat16)):
        name = named(op, case, dtype, "nchw")
        assert re.match("pixels_wgrad_" if op == "wgrad" else "pixels_|tma_.*_pointwise", name), case
        assert packed(op, case, *meta(case, dtype, "nchw")) == "", case
        assert not named(op, case, dtype, "nhwc").endswith("_pointwise"), case
    if op != "wgrad":
        any_channels = Case("planes", 64, 100, 56, 56, 44, 1, 1)
        assert named(op, any_channels, torch.float16, "nchw").endswith("_pointwise")
        assert packed(op, any_channels, *meta(any_channels, torch.float16, "nchw")) == "w"
    for odd in (Case("pixels", 256, 256, 13, 13, 256, 1, 1), Case("stride", 64, 64, 56, 56, 256, 1, 1, (2, 2))):
        gathered = odd.stride == (1, 1)
        name = named(op, odd, torch.float16, "nchw")
        assert re.search(
            "_(raw|narrow)$" if gathered else "_im2col$|_lean$|_lines$" if op == "wgrad" else "_im2col$", name
        ), odd
        assert (packed(op, odd, *meta(odd, torch.float16, "nchw")) == "") == gathered, odd


@pytest.mark.parametrize("op", OPS)
def test_pointwise_layers_in_groups_over_nchw_stay_in_place(op: str) -> None:
    """ShuffleNet's, FBNet's, CondenseNet's: whole vectors of pixels, planes of 14x14 and 7x7, filters off vectors."""
    layers = (
        Case("28x28", 64, 240, 28, 28, 120, 1, 1, groups=3),
        Case("92 a group", 64, 184, 32, 32, 92, 1, 1, groups=2),
        Case("14x14", 64, 768, 14, 14, 192, 1, 1, groups=8),
        Case("7x7", 64, 1536, 7, 7, 384, 1, 1, groups=8),
    )
    for case, (dtype, tf32) in itertools.product(
        layers, ((torch.float16, False), (torch.bfloat16, False), (torch.float32, True), (torch.float32, False))
    ):
        if case.name in ("14x14", "7x7") and dtype == torch.float32:
            continue  # packed where planes are off vectors, or few
        name = named(op, case, dtype, "nchw", allow_tf32=tf32)
        assert name.startswith(f"pixels_{op}_"), f"{case} {dtype} {name}"
        assert packed(op, case, *meta(case, dtype, "nchw"), allow_tf32=tf32) == "", case
        assert not named(op, case, dtype, "nhwc", allow_tf32=tf32).startswith("pixels_"), case
    padded = Case("padded", 64, 240, 28, 28, 120, 1, 1, padding=(1, 1), groups=3)
    assert not named(op, padded, torch.float16, "nchw").startswith("pixels_")


@pytest.mark.parametrize("op", OPS)
def test_pointwise_layers_over_planes_of_any_size_stay_in_place(op: str) -> None:
    """Where that is faster than packing them; whatever the channels."""
    for case, dtype in itertools.product(
        (Case("Inception", 8, 192, 35, 35, 64, 1, 1), Case("any channels", 8, 190, 35, 35, 63, 1, 1)),
        (torch.float16, torch.bfloat16, torch.float32),
    ):
        if dtype is torch.float32 and op == "dgrad":
            continue
        row, _, workspace, *_ = ask(op, case, dtype, "nchw", allow_tf32=True)
        assert re.match(f"pixels_{op}_.*_raw$", ROWS[row]), (case, dtype)
        assert packed(op, case, *meta(case, dtype, "nchw"), allow_tf32=True) == "", (case, dtype)
        assert (workspace > 0) == (op == "wgrad")
        padded = Case("padded", 8, 192, 35, 35, 64, 1, 1, padding=(1, 1))
        assert not ROWS[ask(op, padded, dtype, "nchw", allow_tf32=True)[0]].endswith("_raw")
    strict = ask(op, Case("strict", 8, 192, 35, 35, 64, 1, 1), torch.float32, "nchw")[0]
    assert not ROWS[strict].endswith("_raw")
    for case in (
        Case("EfficientNet-B4", 8, 24, 95, 95, 144, 1, 1),
        Case("planes of half vectors", 8, 24, 190, 190, 144, 1, 1),
    ):
        assert op == "wgrad" or named(op, case, torch.float16, "nchw").endswith("x248_raw"), case


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_1x1_layers_over_planes_of_14x14_have_rows_of_their_own(op: str) -> None:
    """Filters are turned for fprop alone (pixels_halves.cuh)."""
    for size, channels, filters in ((14, 1024, 256), (14, 256, 1024), (14, 320, 784)):
        case = Case("planes", 64, channels, size, size, filters, 1, 1)
        for dtype, name in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
            row, _, workspace, *_ = ask(op, case, dtype, "nchw")
            assert ROWS[row] == f"pixels_{op}_{name}_128x196_raw", case
            assert workspace == (channels * filters * 2 if op == "fprop" else 0)
    for other in (
        Case("odd channels", 64, 1020, 14, 14, 256, 1, 1),
        Case("few pixels", 1, 256, 14, 14, 64, 1, 1),
        Case("other planes", 64, 1024, 10, 10, 256, 1, 1),
        *([Case("filters of 128 MiB", 4, 8192, 14, 14, 8192, 1, 1)] if op == "fprop" else []),
    ):
        assert not named(op, other, torch.float16, "nchw").endswith("196_raw"), other
    assert not named(op, case, torch.float16, "nhwc").endswith("196_raw")


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_1x1_layers_over_planes_of_7x7_are_multiplied_as_they_lie(op: str) -> None:
    """TF32's dgrad turns filters (pixels_pairs.cuh)."""
    for channels, filters in ((512, 2048), (2048, 512), (960, 160), (192, 1152)):
        case = Case("planes", 64, channels, 7, 7, filters, 1, 1)
        for dtype, name in ((torch.float16, "f16"), (torch.bfloat16, "bf16"), (torch.float32, "f32")):
            row, _, workspace, *_ = ask(op, case, dtype, "nchw", allow_tf32=True)
            assert re.fullmatch(rf"pixels_{op}_{name}_\d+x\d+_narrow", ROWS[row]), case
            assert workspace == (channels * filters * 4 if (op, name) == ("dgrad", "f32") else 0)
            assert packed(op, case, *meta(case, dtype, "nchw"), allow_tf32=True) == "", case
            assert not ROWS[ask(op, case, dtype, "nhwc", allow_tf32=True)[0]].endswith("narrow")
    assert not named(op, case, torch.float32, "nchw").endswith("narrow")
    for other in (
        Case("odd channels", 64, 1020, 7, 7, 252, 1, 1),
        Case("halves of 16 channels", 64, 1032, 7, 7, 1032, 1, 1),
        Case("large planes", 64, 512, 17, 17, 512, 1, 1),
        Case("padded", 64, 512, 7, 7, 512, 1, 1, padding=(1, 1)),
    ):
        assert not named(op, other, torch.float16, "nchw").endswith("narrow"), other


def test_pointwise_layers_over_nchw_take_tiles_that_fit_them() -> None:
    """Tiles of 160 for 320 and 1600; gradients of filters over planes of half vectors are gathered."""
    sums, half = Case("sums", 16, 320, 64, 64, 960, 1, 1), Case("half", 64, 256, 14, 14, 1024, 1, 1)
    for case, op, dtype, tile in (
        (Case("long sums", 4, 3072, 40, 40, 672, 1, 1), "fprop", torch.float16, "160x128_lines"),
        (Case("few tiles", 8, 2560, 16, 16, 1280, 1, 1), "dgrad", torch.bfloat16, "160x128_lines"),
        (Case("turns", 32, 128, 28, 28, 512, 1, 1), "fprop", torch.float16, "128x128_nchw"),  # 14.8 us, 64x256 16.3
        (Case("turns", 8, 512, 64, 64, 576, 1, 1), "dgrad", torch.bfloat16, "128x128_nchw"),  # 33.4 us, 128x256 35.2
        (sums, "wgrad", torch.float16, "192x160_nchw"),
        (sums, "wgrad", torch.float32, "192x160_nchw"),
        (half, "wgrad", torch.bfloat16, "256x128_nchw"),
    ):
        name = ROWS[ask(op, case, dtype, "nchw", allow_tf32=True)[0]]
        assert re.fullmatch(rf"pixels_{op}_\w+_{tile}", name), f"{case} {name}"
        assert packed(op, case, *meta(case, dtype, "nchw"), allow_tf32=True) == "", case


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_filters_three_wide_over_nchw_leave_pixels_as_they_lie(op: str) -> None:
    """Of 16-bit types, where rows are whole vectors: only filters are packed."""
    layers = (
        Case("L03", 32, 64, 224, 224, 64, 3, 3, padding=(1, 1)),
        Case("L06", 256, 64, 56, 56, 64, 3, 3, padding=(1, 1)),
        Case("L49", 1, 128, 512, 512, 128, 3, 3, padding=(1, 1)),
        Case("L48", 8, 320, 128, 128, 320, 3, 3, padding=(1, 1)),
        Case("high", 16, 64, 112, 112, 64, 5, 3, padding=(2, 1)),
    )
    for case, dtype in itertools.product(layers, (torch.float16, torch.bfloat16)):
        assert named(op, case, dtype, "nchw").endswith("_240x64_nchw"), case
        assert packed(op, case, *meta(case, dtype, "nchw")) == "w", case
        assert not named(op, case, dtype, "nhwc").endswith("_nchw"), case
    for other in (
        ODD,
        Case("no padding", 16, 64, 112, 112, 64, 3, 3),
        Case("dilated", 16, 64, 112, 112, 64, 3, 3, padding=(2, 2), dilation=(2, 2)),
        Case("strided", 16, 64, 112, 112, 64, 3, 3, (2, 2), (1, 1)),
        Case("wide", 16, 64, 112, 112, 64, 3, 5, padding=(1, 2)),
    ):
        assert not named(op, other, torch.float16, "nchw").endswith("_nchw"), other


@pytest.mark.parametrize("op", OPS)
def test_pointwise_layers_in_tf32_take_pixels_rows_in_nchw(op: str) -> None:
    """Also with channels off vectors, and where pixels of a 16-bit type would be; others between few channels alone."""
    for C, K, H in ((64, 128, 256), (24, 144, 56), (144, 24, 56), (256, 64, 56), (37, 61, 28), (384, 96, 28)):
        case = Case("planes", 32, C, H, H, K, 1, 1)
        assert ROWS[ask(op, case, torch.float32, "nchw", allow_tf32=True)[0]].startswith(f"pixels_{op}_f32_"), case
        assert ROWS[ask(op, case, torch.float32, "nchw")[0]].startswith(f"pixels_{op}_f32_"), case
        if min(C, K) > 32:
            assert not ROWS[ask(op, case, torch.float32, "nhwc", allow_tf32=True)[0]].endswith("_nchw"), case
    pixels = Case("pixels", 32, 64, 13, 13, 128, 1, 1)
    assert not ROWS[ask(op, pixels, torch.float32, "nchw", allow_tf32=True)[0]].endswith("_nchw")
    for case in (
        Case("stride", 32, 64, 56, 56, 128, 1, 1, (2, 2)),
        Case("3x3", 32, 64, 56, 56, 128, 3, 3, padding=(1, 1)),
    ):
        assert not ROWS[ask(op, case, torch.float32, "nchw", allow_tf32=True)[0]].startswith("pixels_"), case


def test_small_1x1_layers_take_one_launch_whatever_their_channels() -> None:
    """Without packing, turned filters or a second pass; larger layers and those that lean takes as they are do not."""
    squeeze, deep = Case("squeeze", 32, 10, 1, 1, 240, 1, 1), Case("deep", 1, 1024, 14, 14, 256, 1, 1)
    small, large = Case("small", 6, 256, 7, 7, 128, 1, 1), Case("large", 32, 256, 56, 56, 256, 1, 1)
    for op, layout in itertools.product(OPS, ("nchw", "nhwc")):
        layers = [(squeeze, torch.float32)]
        row, _, workspace, *_ = ask(op, deep, torch.float32, layout, allow_tf32=True)  # tma_lean_tf32.cuh
        assert ROWS[row].endswith("_lean") and workspace == 0, (op, layout)
        if op != "wgrad" and layout == "nchw":
            layers.append((small, torch.float16))
        for case, dtype in layers:
            row, _, workspace, *_ = ask(op, case, dtype, layout, allow_tf32=True)
            assert re.match(f"pixels_{op}_.*_(any|raw|narrow)$", ROWS[row]) and workspace == 0, (op, layout, case)
        for dtype in (torch.float32, torch.bfloat16):
            assert not ROWS[ask(op, large, dtype, layout, allow_tf32=True)[0]].endswith("_any"), (op, layout)
    strict = ask("fprop", squeeze, torch.float32, "nhwc")[0]
    assert ROWS[strict] == "pixels_fprop_f32_1024x16_halo"  # planes of a pixel lie either way


def test_the_smallest_1x1_layers_are_read_from_memory_to_registers() -> None:
    """pixels_direct.cuh, by tiles of 32x32; where those are many, or channels are what the copy engine takes, not."""
    shuffle, mnas = Case("shuffle", 1, 116, 28, 28, 116, 1, 1), Case("mnas", 1, 84, 14, 14, 504, 1, 1)
    for op, case, layout in (
        *((op, case, layout) for op in ("fprop", "dgrad") for case in (shuffle, mnas) for layout in ("nchw", "nhwc")),
        *(("wgrad", case, "nhwc") for case in (shuffle, mnas)),
    ):
        for dtype in (torch.float16, torch.bfloat16):
            row, _, workspace, *_ = ask(op, case, dtype, layout)
            assert ROWS[row].endswith("_32x32_any") and workspace == 0, (op, case, layout)
    for op in OPS:
        for case in (Case("many", 8, 116, 28, 28, 116, 1, 1), Case("whole", 8, 256, 14, 14, 256, 1, 1)):
            assert not named(op, case, torch.float16, "nhwc").endswith("_32x32_any"), (op, case)


def test_up_to_a_round_of_small_tiles_takes_channels_that_do_not_fill_lines() -> None:
    for op, sizes, end in (
        ("fprop", (1, 992, 14, 14, 128), "_64x32_lean"),  # 6.9 us by 80x64_lines, 6.0
        ("dgrad", (1, 272, 12, 12, 1632), "_64x64_lean"),  # 8.6 by 80x64_lines, 7.1
        ("dgrad", (32, 256, 28, 28, 64), "_64x128_lines"),  # 11.0 by 64x128_im2col, 10.4
        ("fprop", (8, 64, 64, 64, 256), "_64x128_lines"),  # 12.7, 11.3
    ):
        assert named(op, Case("few", *sizes, 1, 1), torch.float16, "nhwc").endswith(end), (op, sizes)
    assert named("dgrad", Case("many", 32, 144, 28, 28, 40, 1, 1), torch.float16, "nhwc").endswith("_64x128_im2col")


def test_1x1_layers_of_networks_take_what_is_faster_with_operands_in_l2_too() -> None:
    for op, sizes, end in (
        ("dgrad", (32, 40, 28, 28, 120), "_192x64_lines"),  # 131 tiles: 11.8 us by 96x64_lines, 10.5
        ("fprop", (32, 120, 28, 28, 40), "_192x64_lines"),
        ("fprop", (32, 128, 28, 28, 512), "_64x128_im2col"),  # 15.6 by 96x128_lines, 14.4
        ("wgrad", (32, 24, 56, 56, 144), "_128x64_lines"),  # 23.6 by 128x64_lean, 21.4
    ):
        for dtype in (torch.float16, torch.bfloat16):
            assert named(op, Case("network", *sizes, 1, 1), dtype, "nhwc").endswith(end), (op, sizes)
    assert named("fprop", Case("few", 32, 64, 28, 28, 256, 1, 1), torch.float16, "nhwc").endswith("_lines")


def test_1x1_layers_between_few_channels_of_many_pixels_flow_through_a_warp() -> None:
    """pixels_flow.cuh: pixels without gaps, filters that shared memory holds, any number of channels."""
    for op, (N, C, H, K) in (
        ("fprop", (32, 32, 112, 16)),  # 22.0 us, 17.5
        ("dgrad", (32, 32, 112, 16)),  # 20.6 us, 17.0
        ("fprop", (32, 16, 56, 72)),  # 14.1 us, 12.2
        ("fprop", (32, 24, 56, 144)),  # 17.7 us, 16.2
    ):
        case = Case("few", N, C, H, H, K, 1, 1)
        for dtype, name in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
            assert named(op, case, dtype, "nhwc") == f"pixels_{op}_{name}_16x32_lean", (op, case)
            assert not named(op, case, dtype, "nchw").endswith("_16x32_lean")
    assert named("dgrad", Case("few", 8, 32, 112, 112, 16, 1, 1), torch.float32, "nhwc", allow_tf32=True).endswith(
        "_16x16_lean"
    )
    for op, (N, C, H, K), dtype in (
        ("fprop", (64, 58, 28, 58), torch.float32),
        ("dgrad", (64, 58, 28, 58), torch.float32),
        ("fprop", (32, 27, 56, 162), torch.float32),
        ("fprop", (32, 27, 56, 162), torch.float16),
        ("dgrad", (32, 27, 56, 162), torch.float16),
        ("fprop", (32, 36, 28, 256), torch.float32),
    ):
        case = Case("odd", N, C, H, H, K, 1, 1)
        assert re.search("_16x(16|32)_lean$", named(op, case, dtype, "nhwc", allow_tf32=True)), (op, case, dtype)
    row = ROWS.index("pixels_fprop_f16_16x32_lean")
    for case in (
        Case("wide", 8, 264, 56, 56, 32, 1, 1),
        Case("stride", 8, 32, 56, 56, 32, 1, 1, (2, 2)),
        Case("padded", 8, 32, 56, 56, 32, 1, 1, padding=(1, 1)),
    ):
        assert row not in candidates(ask("fprop", case, torch.float16, "nhwc")), case
    x, w, y = meta(Case("gaps", 8, 32, 56, 56, 32, 1, 1), torch.float16, "nhwc")
    gaps = torch.empty(8, 40, 56, 56, dtype=x.dtype, device="meta", memory_format=torch.channels_last)[:, :32]
    case = Case("gaps", 8, 32, 56, 56, 32, 1, 1)
    assert row in candidates(plan("fprop", case, x, w, y)) and row not in candidates(plan("fprop", case, gaps, w, y))


def test_16_bit_weight_gradients_of_odd_channels_are_products_of_matrices_in_place() -> None:
    """tma_matrix.cuh: no copy of the operands; not over planes, nor where pixels do not share out to whole vectors."""
    for N, C, H, K in ((128, 570, 14, 106), (32, 95, 14, 570), (32, 192, 28, 387), (32, 96, 56, 195)):
        case = Case("odd", N, C, H, H, K, 1, 1)
        for dtype in (torch.float16, torch.bfloat16):
            tensors = meta(case, dtype, "nhwc")
            row, *_ = ask("wgrad", case, dtype, "nhwc")
            assert re.fullmatch("tma_wgrad_b?f16_.*_lines", ROWS[row]), (case, ROWS[row])
            assert packed("wgrad", case, *tensors) == "", case
            assert not any(ROWS[r].endswith("_lines") for r in candidates(ask("wgrad", case, dtype, "nchw")))
    for case in (
        Case("pixels", 1, 570, 35, 35, 106, 1, 1),  # 1225, not a multiple of 4
        Case("weights", 32, 1030, 14, 14, 1030, 1, 1),  # many parts of sums
        Case("filters", 32, 3, 14, 14, 100_001, 1, 1),
    ):
        assert not any(
            re.fullmatch("tma_wgrad_.*_lines", ROWS[r]) for r in candidates(ask("wgrad", case, torch.float16, "nhwc"))
        ), case
    for wide in (Case("wide", 32, 61, 14, 14, 8191, 1, 1), Case("wide", 32, 8191, 14, 14, 61, 1, 1)):
        assert ask("wgrad", wide, torch.float16, "nhwc")[2] <= 64 << 20, wide
    x, w, y = meta(Case("odd", 32, 570, 14, 14, 106, 1, 1), torch.float16, "nhwc")
    gaps = torch.empty(32, 576, 14, 14, dtype=x.dtype, device="meta", memory_format=torch.channels_last)[:, :570]
    found = candidates(plan("wgrad", Case("odd", 32, 570, 14, 14, 106, 1, 1), gaps, w, y))
    assert not any(re.fullmatch("tma_wgrad_.*_lines", ROWS[r]) for r in found)


def test_few_channels_of_many_pixels_do_not_take_a_line_of_memory_each() -> None:
    """Of 16 and 32 bytes a pixel, which cost the copy engine as much as whole lines."""
    for op, (N, C, H, K) in (
        ("fprop", (256, 8, 49, 8)),  # 32.6 us by 64x128_im2col, 20.7
        ("dgrad", (256, 8, 49, 8)),
        ("fprop", (64, 8, 112, 8)),  # 39.2, 17.9
        ("fprop", (16, 64, 128, 8)),  # 25.2 by stem_taps.cuh, 17.7
    ):
        assert named(op, Case("few", N, C, H, H, K, 1, 1), torch.float16).endswith("_16x32_lean"), (op, C, K)
    for N, C, H, K in ((69, 24, 168, 25), (81, 4, 148, 29)):  # odd ones: 104.8 us by 64x128_nhwc, 64.0; 86.9, 49.6
        assert named("dgrad", Case("odd", N, C, H, H, K, 1, 1), torch.float16, "nhwc").endswith("_16x32_lean"), (C, K)
    two_stages = Case("two stages", 16, 216, 80, 80, 144, 1, 1)  # 82.0 us by filters that stay, 58.3
    assert not named("fprop", two_stages, torch.float32, "nhwc", allow_tf32=True).endswith("64x128_im2col")


def test_tf32_weight_gradients_of_odd_channels_are_summed_in_place() -> None:
    """No copy of the operands, and no longer sums than other rows of TF32 (tma_lean_tf32.cuh: several pixels a row)."""
    for N, C, H, K in ((64, 61, 28, 366), (128, 117, 14, 702), (32, 192, 28, 387)):  # 84.8 us packed, 46.4; 83.6, 62.4
        case = Case("odd", N, C, H, H, K, 1, 1)
        row, parts, workspace, *_ = ask("wgrad", case, torch.float32, "nhwc", allow_tf32=True)
        assert ROWS[row] == "tma_wgrad_f32_64x64_lean", case
        assert packed("wgrad", case, *meta(case, torch.float32, "nhwc"), allow_tf32=True) == "", case
        period = 4 if C % 2 or K % 2 else 2
        assert parts % period == 0 and case.N * H * H <= parts * 6144 and workspace % (parts * 64 * 64 * 4) == 0, case
        assert not named("wgrad", case, torch.float32, "nhwc").endswith("_64x64_lean")  # strict
    for N, C, H, K in ((64, 58, 28, 58), (32, 36, 28, 18)):  # few weights: pixels_sums.cuh
        case = Case("few", N, C, H, H, K, 1, 1)
        row, _, workspace, *_ = ask("wgrad", case, torch.float32, "nhwc", allow_tf32=True)
        assert ROWS[row] == "pixels_wgrad_f32_64x64_nhwc", case
        assert workspace * 6144 >= case.N * H * H * 64 * 64 * 4
    # Pixels that do not share out to whole vectors are packed, or summed as they lie.
    odd = Case("pixels", 1, 61, 35, 35, 366, 1, 1)
    assert ask("wgrad", odd, torch.float32, "nhwc", allow_tf32=True)[0] != ROWS.index("tma_wgrad_f32_64x64_lean")


def test_tf32_weight_gradients_of_many_pixels_are_not_summed_by_the_smallest_tiles() -> None:
    for case, layout, end in (
        (Case("planes", 32, 184, 7, 7, 736, 1, 1), "nchw", "_im2col"),  # 35.7 us by 32x32_any, 20.7
        (Case("pairs", 64, 174, 7, 7, 1044, 1, 1), "nhwc", "_im2col"),  # 46.6, 25.4
        (Case("whole", 8, 512, 14, 14, 128, 1, 1), "nhwc", "_64x64_lean"),  # 15.7, 11.8
        (Case("wide", 64, 128, 48, 48, 128, 1, 1), "nhwc", "_64x64_lean"),  # 58.3 by 128x128_im2col, 53.1
    ):
        assert named("wgrad", case, torch.float32, layout, allow_tf32=True).endswith(end), case


def test_small_weight_gradients_in_tf32_take_one_launch_and_no_long_sums() -> None:
    deep, taps = Case("deep", 1, 1024, 14, 14, 256, 1, 1), Case("taps", 8, 96, 8, 8, 96, 3, 3, padding=(1, 1))
    for case, layout in ((deep, "nhwc"), (deep, "nchw"), (taps, "nhwc")):
        row, _, workspace, *_ = ask("wgrad", case, torch.float32, layout, allow_tf32=True)
        assert ROWS[row].endswith("_lean") and workspace == 0, (case, layout)
    # Of more pixels than eight blocks of a cluster add up: shared out to more, whose sums a second launch adds.
    long = Case("long", 64, 64, 56, 56, 64, 1, 1)
    row, parts, workspace, *_ = ask("wgrad", long, torch.float32, "nhwc", allow_tf32=True)
    assert ROWS[row].endswith("64x64_lean") and long.N * long.P * long.Q <= parts * 6144
    assert workspace == parts * 64 * 64 * 4
    # Few pixels and many weights: tiles that read little, and filters of NCHW are not stored one by one.
    few = Case("diffusion", 2, 1280, 8, 8, 1280, 3, 3, padding=(1, 1))
    for layout in ("nhwc", "nchw"):
        assert named("wgrad", few, torch.float32, layout, allow_tf32=True).endswith("_im2col"), layout


def test_pointwise_layers_between_few_channels_in_float32_stay_in_place() -> None:
    for C, K in ((16, 96), (32, 16), (8, 48)):
        case = Case("few", 64, C, 112, 112, K, 1, 1)
        for layout, tf32 in itertools.product(("nchw", "nhwc"), (True, False)):
            name = ROWS[ask("wgrad", case, torch.float32, layout, allow_tf32=tf32)[0]]
            lean = tf32 and layout == "nhwc"  # shares few weights out to many blocks
            rows = "tma_wgrad_f32_64x64_lean" if lean else f"pixels_wgrad_f32_(16x32|128x64|192x160)_{layout}"
            if layout == "nchw" and not tf32:  # 64x16x112x112 to 96 137.5 us, 16x32 140.8
                rows = f"({rows}|pixels_wgrad_f32_128x64_pointwise)"
            assert re.match(f"{rows}$", name), (case, tf32, name)
        for op in ("fprop", "dgrad"):
            few = (C if op == "fprop" else K) <= 16  # products of a sum
            name = ROWS[ask(op, case, torch.float32, "nchw")[0]]
            assert name.endswith("_1024x16_halo" if few else "_pointwise"), (case, name)
    wide = Case("wide", 8, 24, 56, 56, 144, 1, 1)
    assert ROWS[ask("wgrad", wide, torch.float32, "nchw")[0]] == "pixels_wgrad_f32_128x64_pointwise"
    assert ROWS[ask("wgrad", wide, torch.float32, "nhwc")[0]].startswith("tma_strict_")


def test_packed_copies_are_part_of_the_workspace() -> None:
    copies = 2 * 32 * 128 * 57 * 57 + 2 * 128 * 128 * 9
    assert ask("fprop", ODD, torch.float16, "nchw")[2] >= copies
    assert ask("fprop", ODD, torch.float16, "nhwc")[2] == 0


@pytest.mark.parametrize("op", OPS)
def test_tf32_packs_tensors_of_another_layout_but_results(op: str) -> None:
    odd = dataclasses.replace(DENSE, W=DENSE.W + 1)  # not in place
    name = named(op, odd, torch.float32, "nchw", allow_tf32=True)
    assert name.startswith(f"tma_{op}_f32_")
    read = {"fprop": "xw", "dgrad": "wy", "wgrad": "xy" if stores_anywhere(name) else "xwy"}[op]
    assert packed(op, odd, *meta(odd, torch.float32, "nchw"), allow_tf32=True) == read
    assert packed(op, DENSE, *meta(DENSE, torch.float32, "nhwc"), allow_tf32=True) == ""


def test_explain_names_the_packed_tensors() -> None:
    def ask_explain(op: str, channels_last: bool) -> conv2d_ext.Explanation:
        return conv2d_ext.explain(
            ODD.input_size, ODD.weight_size, None, *ODD.args, op=op, dtype=torch.float16,
            channels_last=channels_last,
        )  # fmt: skip

    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm90")
    assert ask_explain("fprop", False).packed == ("input", "weight")
    assert "packed: input, weight" in str(ask_explain("fprop", False))
    assert ask_explain("wgrad", False).packed == ("input", "grad_weight", "grad_output")
    assert ask_explain("fprop", True).packed == () and "packed" not in str(ask_explain("fprop", True))


def test_layers_take_what_was_timed_to_be_faster() -> None:
    """Each took another row by an estimate, for 1.2 to 2.0 times the time."""

    def case(N: int, C: int, H: int, W: int, K: int, R: int, pad: int, stride: int = 1, groups: int = 1) -> Case:
        return Case("layer", N, C, H, W, K, R, R, (stride, stride), (pad, pad), groups=groups)

    for op, dtype, tf32, layout, layer, row in (
        ("wgrad", torch.float32, True, "nhwc", case(64, 128, 28, 28, 32, 3, 1), "tma_wgrad_f32_576x64_halo"),
        ("wgrad", torch.float32, True, "nchw", case(8, 256, 14, 14, 2048, 1, 0), "pixels_"),
        ("wgrad", torch.float32, False, "nchw", case(35, 192, 13, 13, 192, 1, 0, 2, 3), "tma_strict_"),
        ("fprop", torch.float32, True, "nhwc", case(32, 60, 28, 28, 128, 3, 1), "tma_fprop_f32_256x64_halo"),
        ("fprop", torch.float16, False, "nhwc", case(16, 384, 35, 35, 384, 3, 1, groups=384), "toeplitz_fprop_f16_3x5"),
        ("fprop", torch.float16, False, "nhwc", case(64, 256, 56, 56, 256, 3, 1, groups=256), "column_fprop_f16_3x3"),
        ("fprop", torch.float16, False, "nhwc", case(32, 72, 56, 56, 72, 5, 2, 2, 72), "column_fprop_f16_5x5"),
        ("dgrad", torch.float16, False, "nhwc", case(2, 96, 80, 80, 96, 3, 1), "tma_dgrad_f16_256x64_halo"),
        ("dgrad", torch.float16, False, "nhwc", case(32, 128, 28, 28, 72, 3, 1), "tma_dgrad_f16_256x128_halo"),
        ("dgrad", torch.float32, False, "nchw", case(2, 8, 174, 174, 264, 7, 3), "tma_strict_"),
        ("wgrad", torch.float16, False, "nchw", case(32, 24, 190, 190, 24, 1, 0), "pixels_wgrad_f16_64x64_raw"),
        ("wgrad", torch.float16, False, "nchw", case(8, 972, 7, 7, 174, 1, 0), "pixels_wgrad_f16_64x64_raw"),
        ("wgrad", torch.float32, True, "nhwc", case(1, 256, 65, 65, 21, 1, 0), "pixels_wgrad_f32_32x32"),
        ("fprop", torch.float32, True, "nhwc", case(32, 84, 14, 14, 504, 1, 0), "pixels_fprop_f32_16x16"),
        ("fprop", torch.float32, True, "nchw", case(32, 576, 7, 7, 96, 1, 0), "pixels_fprop_f32_128x64_narrow"),
        ("dgrad", torch.float32, True, "nhwc", case(2, 256, 50, 76, 3, 1, 0), "stem_dgrad_f32_16x64"),
        ("dgrad", torch.float32, False, "nchw", case(1, 96, 56, 56, 24, 1, 0), "pixels_dgrad_f32_64x64_pointwise"),
        ("fprop", torch.float32, True, "nhwc", case(8, 96, 56, 56, 96, 5, 2, groups=96), "column_fprop_f32_5x5"),
        ("dgrad", torch.float16, False, "nhwc", case(32, 40, 27, 23, 64, 3, 0), "tma_dgrad_f16_256x64_halo"),
        ("wgrad", torch.float32, True, "nchw", case(8, 72, 130, 130, 72, 3, 1, groups=72), "depthwise_wgrad_f32_0x0"),
        ("fprop", torch.float32, True, "nchw", case(2, 64, 191, 191, 64, 3, 1, groups=64), "depthwise_fprop_f32_0x2"),
        ("fprop", torch.float16, False, "nchw", case(14, 13, 183, 183, 13, 7, 3, 2, 13), "depthwise_fprop_f16_0x2"),
        ("fprop", torch.float32, True, "nchw", case(1, 3, 224, 224, 64, 7, 2, 4), "stem_fprop_f32_64x64_halo"),
        ("dgrad", torch.float32, True, "nchw", case(32, 256, 16, 16, 1024, 1, 0), "pixels_dgrad_f32_256x64"),
        ("dgrad", torch.float32, True, "nchw", case(1, 320, 128, 128, 1280, 1, 0), "pixels_dgrad_f32_256x128"),
        ("wgrad", torch.float16, False, "nchw", case(8, 288, 56, 56, 96, 1, 0), "pixels_wgrad_f16_128x64"),
        ("dgrad", torch.float16, False, "nhwc", case(107, 5, 61, 61, 8, 1, 0), "pixels_dgrad_f16_16x32"),
        ("fprop", torch.float32, True, "nhwc", case(32, 224, 38, 38, 1344, 1, 0), "tma_fprop_f32_128x192"),
        ("dgrad", torch.float32, True, "nchw", case(2, 384, 100, 100, 32, 2, 0, 2), "tma_dgrad_f32_128x64_im2col"),
        ("wgrad", torch.float16, False, "nchw", case(32, 3, 299, 299, 32, 3, 0, 2), "stem_wgrad_f16_64x32"),
        ("wgrad", torch.float32, True, "nchw", case(32, 3, 299, 299, 32, 3, 0, 2), "stem_wgrad_f32_64x32"),
        ("wgrad", torch.float32, False, "nchw", case(16, 1, 161, 700, 64, 5, 2, 2), "stem_wgrad_f32_64x32"),
        ("wgrad", torch.float32, False, "nchw", case(48, 3, 10, 10, 64, 5, 0), "stem_wgrad_f32_64x32"),
        ("wgrad", torch.float32, True, "nchw", case(16, 8, 112, 112, 48, 1, 0), "pixels_wgrad_f32_128x64"),
        ("fprop", torch.float32, True, "nchw", case(8, 4, 100, 100, 435, 3, 0), "tma_fprop_f32_256x64"),
        ("dgrad", torch.float32, True, "nchw", case(2, 512, 5, 5, 2048, 1, 0), "pixels_dgrad_f32_64x64_any"),
        ("dgrad", torch.float32, True, "nhwc", case(4, 192, 64, 64, 192, 5, 2, 2, 192), "column_dgrad_f32_5x5"),
        ("fprop", torch.float16, False, "nchw", case(1, 384, 35, 35, 192, 1, 0), "pixels_fprop_f16_64x64_any"),
    ):
        name = named(op, layer, dtype, layout, allow_tf32=tf32)
        assert name.startswith(row), f"{layer} {op} {layout} {name}"


def test_small_layers_of_any_channels_take_lean() -> None:
    """HRNet's 36 channels (8x36x28x28 F 15.5 us by 64x64_im2col on packed copies, 10.5): operands are packed,
    results are stored where they belong."""
    case = Case("hrnet", 8, 36, 28, 28, 36, 3, 3, padding=(1, 1))
    for layout in ("nhwc", "nchw"):
        for op, which in (("fprop", "xw"), ("dgrad", "wy"), ("wgrad", "xy")):
            assert re.fullmatch(rf"tma_{op}_f16_64x\d+_lean", named(op, case, torch.float16, layout)), (op, layout)
            assert packed(op, case, *meta(case, torch.float16, layout)) == which, (op, layout)
    # Copies in whole lines are much larger than a tensor of a channel: not of large ones.
    one = Case("one channel", 64, 1, 1024, 1024, 64, 3, 3, padding=(1, 1))
    estimates = zip(ROWS, ask("fprop", one, torch.float16, "nhwc")[3:], strict=True)
    assert not [row for row, ns in estimates if ns > 0 and re.fullmatch("tma_fprop_f16.*_lean", row)]


def test_small_strided_dgrad_in_tf32_is_one_launch_of_small_tiles() -> None:
    """Phases of a stride of two by lean: 1x128x56x56 s2 13 us by tiles of 128x128."""
    for case in (
        Case("resnet", 1, 128, 56, 56, 128, 3, 3, (2, 2), (1, 1)),
        Case("resnet", 1, 256, 14, 14, 512, 3, 3, (2, 2), (1, 1)),
    ):
        name = named("dgrad", case, torch.float32, allow_tf32=True)
        assert name.startswith("tma_dgrad_f32_64x") and name.endswith("_lean"), f"{case} {name}"
    nine = Case("nine phases", 1, 128, 57, 57, 128, 3, 3, (3, 3), (1, 1))
    assert not named("dgrad", nine, torch.float32, allow_tf32=True).endswith("_lean")


def test_192_filters_are_one_tile_wide() -> None:
    case = Case("encoder", 64, 192, 28, 28, 384, 2, 2, stride=(2, 2))
    assert named("dgrad", case, torch.float16) == "tma_dgrad_f16_128x192_im2col"


def test_tiles_fill_one_round_of_the_device() -> None:
    """Tiles of 128 pixels of these would be a few more than the SMs, or three quarters of them."""
    for dtype, name in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
        for op, (tile, case) in itertools.product(
            ("fprop", "dgrad"),
            (
                ("144x192", Case("inception", 64, 192, 17, 17, 192, 7, 1, padding=(3, 0))),
                ("192x128", Case("resnet50", 64, 256, 14, 14, 256, 3, 3, padding=(1, 1))),
                ("192x128", Case("resnet50", 32, 128, 28, 28, 128, 3, 3, padding=(1, 1))),
            ),
        ):
            assert named(op, case, dtype) == f"tma_{op}_{name}_{tile}_im2col", (op, case)
        wide = Case("inception", 64, 160, 17, 17, 160, 1, 7, padding=(0, 3))
        assert named("fprop", wide, dtype) == f"tma_fprop_{name}_144x192_im2col"
        assert named("dgrad", wide, dtype) == f"tma_dgrad_{name}_256x64_halo"  # of 248 pixels; rows share three columns


def test_filters_in_lines_off_32_bytes_take_tiles_that_copy_few_of_them() -> None:
    """Lines of 80 bytes: fprop's begin off them, dgrad's, of the results' channels, end off them."""
    for dtype, name in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
        for C in (40, 72, 136):
            case = Case("layer", 32, C, 28, 28, 128, 3, 3, padding=(1, 1))
            assert named("fprop", case, dtype) == f"tma_fprop_{name}_256x{64 if C == 40 else 128}_halo"
        for C in (24, 40, 56):
            case = Case("layer", 32, C, 28, 28, 128, 3, 3, padding=(1, 1))
            assert named("dgrad", case, dtype, "nchw") == f"tma_dgrad_{name}_256x64_halo"


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_few_whole_vectors_of_channels_take_windows_that_overlap(op: str) -> None:
    for N, C, H, K in ((8, 16, 64, 16), (16, 8, 64, 64), (8, 16, 256, 16), (1, 24, 192, 24)):
        C, K = (C, K) if op == "fprop" else (K, C)
        case = Case("layer", N, C, H, H, K, 3, 3, padding=(1, 1))
        for dtype, name in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
            assert named(op, case, dtype) == f"stem_{op}_{name}_64x32_halo", case
    row = ROWS.index(f"stem_{op}_f32_64x32_halo")

    def takes(channels: int, layout: str = "nhwc", stride: int = 1, **kwargs: bool) -> bool:
        case = Case("layer", 2, channels, 33, 33, channels, 3, 3, (stride, stride), (1, 1))
        return ask(op, case, torch.float32, layout, **kwargs)[3 + row] >= 0

    assert takes(12, allow_tf32=True) and takes(12, stride=2, allow_tf32=True) == (op == "fprop")
    assert not takes(12) and not takes(12, "nchw", allow_tf32=True) and not takes(10, allow_tf32=True)


def test_results_of_short_lines_count_in_wgrad() -> None:
    """Lines of 16 bytes of many filters and taps: 88 and 34 us by tiles of a tap's channels, 23 and 13 by patches."""
    for case in (
        Case("layer", 2, 8, 26, 26, 1360, 7, 7, padding=(3, 3)),
        Case("layer", 2, 8, 19, 19, 1736, 4, 4, padding=(2, 2)),
    ):
        assert named("wgrad", case, torch.float16) == "tma_wgrad_f16_128x64_lean", case
        assert named("wgrad", case, torch.float32, allow_tf32=True) == "tma_wgrad_f32_64x64_lean", case


def test_wgrad_of_few_filters_over_planes_has_blocks_of_32_columns() -> None:
    """16x192x28x28 to 32 5x5: 57 us by blocks of 64 channels, half of whose rows, filters, are empty; 40 by these."""
    for case, columns in (
        (Case("googlenet", 16, 192, 28, 28, 32, 5, 5, padding=(2, 2)), 480),
        (Case("inception", 32, 32, 28, 28, 96, 5, 5, padding=(2, 2)), 480),
        (Case("densenet", 32, 128, 56, 56, 32, 3, 3, padding=(1, 1)), 288),
        (Case("wide", 32, 64, 224, 224, 64, 3, 3, padding=(1, 1)), 576),
    ):
        name = named("wgrad", case, torch.float32, "nchw", allow_tf32=True)
        assert name == f"tma_wgrad_f32_{columns}x64_nchw", f"{case} {name}"
    # Padding beyond the filter cannot be turned round.
    beyond = Case("beyond", 16, 192, 24, 24, 32, 5, 5, padding=(6, 6))
    times = ask("wgrad", beyond, torch.float32, "nchw", allow_tf32=True)[3:]
    assert times[ROWS.index("tma_wgrad_f32_576x64_nchw")] >= 0 > times[ROWS.index("tma_wgrad_f32_480x64_nchw")]


def test_one_large_image_of_128_channels_takes_the_tile_that_holds_filters() -> None:
    """1x128x512x512 to 128 3x3: 113 us by 256x64, 102 by this, whose estimates were alike."""
    for op, side in itertools.product(("fprop", "dgrad"), (512, 768)):
        case = Case("decoder", 1, 128, side, side, 128, 3, 3, padding=(1, 1))
        assert named(op, case, torch.float16) == f"tma_{op}_f16_256x96_halo", f"{op} {case}"


def test_rows_of_taps_in_padding_cost_little() -> None:
    def estimate(op: str, dilation: int) -> float:
        case = Case("aspp", 8, 2048, 65, 65, 256, 3, 3, (1, 1), (dilation, dilation), (dilation, dilation))
        return ask(op, case, torch.float16, "nhwc")[3 + ROWS.index(f"tma_{op}_f16_128x256_im2col")]

    for op in ("fprop", "dgrad"):
        assert estimate(op, 36) < 0.85 * estimate(op, 6), op


def test_few_steps_take_tiles_that_are_stored_beside_multiplication() -> None:
    for case in (
        Case("downsample", 256, 512, 14, 14, 512, 3, 3, (2, 2), (1, 1)),
        Case("yolo", 32, 256, 40, 40, 512, 3, 3, (2, 2), (1, 1)),
    ):
        assert named("fprop", case, torch.float16) == "tma_fprop_f16_128x128_im2col", case


def test_full_rounds_take_tiles_that_read_little_for_their_products() -> None:
    for case in (
        Case("vgg16", 64, 512, 28, 28, 512, 3, 3, padding=(1, 1)),
        Case("resnet50", 256, 1024, 14, 14, 2048, 1, 1, (2, 2)),
    ):
        # The second's by 128x128 was measured within 1.5 % of the others.
        known = ("256x128", "128x256", "128x128") if case.R == 1 else ("256x128", "128x256")
        assert named("fprop", case, torch.float16) in [f"tma_fprop_f16_{tile}_im2col" for tile in known], case


def test_tf32_shares_few_tiles_unevenly_and_reads_pixels_for_few_tiles_of_filters() -> None:
    for op, row, case in (
        ("fprop", "128x256_im2col", Case("vgg16", 64, 512, 28, 28, 512, 3, 3, padding=(1, 1))),
        ("fprop", "128x128_im2col", Case("aspp", 8, 2048, 33, 33, 256, 3, 3, padding=(6, 6), dilation=(6, 6))),
        ("dgrad", "128x128_lean", Case("resnet50", 64, 512, 7, 7, 2048, 1, 1)),
        ("fprop", "64x128_im2col", Case("64 channels", 32, 64, 56, 56, 256, 1, 1)),
    ):
        assert named(op, case, torch.float32, allow_tf32=True) == f"tma_{op}_f32_{row}", case


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("f16", "bf16"))
def test_1x1_over_odd_channels_in_channels_last_stays_in_place(dtype: torch.dtype) -> None:
    def chosen(op: str, *sizes: int, **more: object) -> str:
        return ROWS[ask(op, Case("lines", *sizes, 1, 1, **more), dtype, "nhwc")[0]]

    for op, sizes in itertools.product(OPS, ((64, 116, 28, 28, 116), (64, 58, 28, 28, 58), (64, 24, 56, 56, 58))):
        assert re.match(f"pixels_{op}_.*_(nhwc|lean)$", chosen(op, *sizes)), (op, sizes)
    assert chosen("fprop", 8, 256, 64, 64, 21).endswith("_64x32_nhwc")
    # Vectors of channels are the copy engine's; many odd channels are better packed.
    for op, sizes in (
        ("fprop", (64, 128, 28, 28, 128)),
        ("fprop", (32, 255, 52, 52, 255)),
        ("wgrad", (64, 128, 28, 28, 128)),
    ):
        assert not chosen(op, *sizes).startswith("pixels_"), (op, sizes)
    assert not chosen("fprop", 64, 116, 28, 28, 116, stride=(2, 2)).startswith("pixels_")


def test_1x1_over_channels_off_vectors_in_channels_last_moves_pixels_to_vectors() -> None:
    """pixels_phases.cuh: many channels to few, pixels without gaps that come in whole rows of a matrix."""
    for op, sizes, dtype in (
        ("fprop", (128, 570, 14, 14, 106), torch.float16),  # 33.5 us packed, 26.5
        ("fprop", (128, 570, 14, 14, 106), torch.float32),  # 77.4 us, 37.2
        ("dgrad", (128, 106, 14, 14, 636), torch.bfloat16),  # 40.7 us, 27.8
        ("dgrad", (128, 117, 14, 14, 702), torch.float32),  # 76.2 us, 41.3
    ):
        case = Case("odd", *sizes, 1, 1)
        assert named(op, case, dtype, "nhwc", allow_tf32=True).endswith("_phases"), (op, sizes)
        assert packed(op, case, *meta(case, dtype, "nhwc"), allow_tf32=True) == "", (op, sizes)
    for row, case in (
        ("fprop_f16", Case("vectors", 8, 64, 14, 14, 64, 1, 1)),
        ("fprop_f16", Case("pixels", 1, 61, 35, 35, 366, 1, 1)),  # 1225, not a multiple of 8
        ("fprop_f16", Case("stride", 8, 61, 14, 14, 366, 1, 1, (2, 2))),
        ("dgrad_f32", Case("pixels", 1, 64, 35, 35, 61, 1, 1)),
    ):
        op, dtype = row.split("_")
        like = torch.float16 if dtype == "f16" else torch.float32
        answer = ask(op, case, like, "nhwc", allow_tf32=True)
        assert ROWS.index(f"pixels_{row}_64x64_phases") not in candidates(answer), case


def test_windows_that_do_not_fit_a_block_are_not_summed_by_groups_of_any_stride() -> None:
    """wgrad of grouped.cuh has several units of groups side by side; all their windows must fit."""
    for dilation, fits in (((1, 1), True), ((4, 2), False)):
        case = Case("wide", 1, 32, 25, 16, 32, 7, 7, (4, 3), (3, 0), dilation, groups=8)
        estimates = dict(zip(ROWS, ask("wgrad", case, torch.float32, allow_tf32=True)[3:], strict=True))
        assert (estimates["grouped_wgrad_f32_8x8_nchw"] >= 0) == fits, dilation


def test_few_tiles_have_a_block_each() -> None:
    """1x1 filters on small images, single images: many small tiles, or parts of them in clusters, in one launch."""
    for dtype in (torch.float16, torch.bfloat16):
        for op, case in itertools.product(
            OPS,
            (
                Case("mobilenet", 1, 960, 7, 7, 960, 1, 1),
                Case("resnet", 1, 256, 14, 14, 1024, 1, 1),
                Case("latency", 1, 512, 7, 7, 512, 3, 3, padding=(1, 1)),
            ),
        ):
            row, _, workspace, *_ = ask(op, case, dtype, "nhwc")
            small = ("_lean", "_lines") if case.R == 1 else "_lean"
            assert ROWS[row].endswith(small) and workspace == 0, (op, case)
    deep = Case("latency", 1, 512, 7, 7, 512, 3, 3, padding=(1, 1))
    assert ask("fprop", deep, torch.float16, "nhwc")[1] > 1
    assert named("fprop", deep, torch.float32, allow_tf32=True).endswith("_lean")


def test_1x1_layers_in_channels_last_are_products_of_matrices_by_tiles_that_fill_rounds() -> None:
    """tma_matrix.cuh, tiles of pixels by filters (dgrad: channels; wgrad: filters by channels)."""
    for dtype, (tile, op, case) in itertools.product(
        (torch.float16, torch.bfloat16),
        (
            ("144x128_lines", "fprop", Case("resnet", 64, 3072, 7, 7, 768, 1, 1)),
            ("160x128_lines", "fprop", Case("diffusion", 8, 1280, 16, 16, 1280, 1, 1)),
            ("160x128_lines", "dgrad", Case("diffusion", 8, 1280, 16, 16, 1280, 1, 1)),
            ("160x128_lines", "dgrad", Case("convnext", 8, 1152, 24, 24, 3072, 1, 1)),
            ("96x128_lines", "fprop", Case("wide", 8, 1920, 14, 14, 896, 1, 1)),
            ("64x128_lines", "fprop", Case("diffusion", 2, 1920, 16, 16, 1280, 1, 1)),
            ("64x128_lines", "dgrad", Case("deep", 1, 2048, 20, 20, 2560, 1, 1)),
            ("128x64_lines", "wgrad", Case("resnet", 64, 512, 7, 7, 2048, 1, 1)),
            ("64x64_lines", "wgrad", Case("efficientnet", 32, 1152, 7, 7, 320, 1, 1)),
            ("128x128_lines", "wgrad", Case("diffusion", 8, 1280, 16, 16, 1280, 1, 1)),
            ("96x128_lines", "wgrad", Case("wide", 8, 1920, 14, 14, 768, 1, 1)),
            ("160x128_lines", "wgrad", Case("diffusion", 2, 1920, 16, 16, 1280, 1, 1)),
        ),
    ):
        row, _, workspace, *_ = ask(op, case, dtype, "nhwc")
        assert ROWS[row].endswith(f"_{tile}") and workspace == 0, case
    for op, other in itertools.product(
        ("fprop", "dgrad"),
        (
            Case("stride", 8, 256, 16, 16, 256, 1, 1, (2, 2)),
            Case("padding", 8, 256, 16, 16, 256, 1, 1, padding=(1, 1)),
            Case("3x3", 8, 256, 16, 16, 256, 3, 3, padding=(1, 1)),
            Case("no vectors", 8, 252, 16, 16, 252, 1, 1),
            Case("patches", 8, 3, 224, 224, 768, 16, 16, (16, 16)),
        ),
    ):
        assert not named(op, other, torch.float16).endswith("_lines"), other


def test_small_layers_over_nchw_take_lean_on_packed_copies() -> None:
    """Results stay in place; many weights do not. Filters whose lines end early are left to others."""
    layers = (Case("3x3", 1, 128, 28, 28, 128, 3, 3, padding=(1, 1)), Case("1x1 s2", 1, 448, 28, 28, 896, 1, 1, (2, 2)))
    for case, op, tf32 in itertools.product(layers, OPS, (False, True)):
        if op == "dgrad" and case.stride != (1, 1):
            continue
        dtype = torch.float32 if tf32 else torch.float16
        row = named(op, case, dtype, "nchw", allow_tf32=tf32)
        if (op, tf32, case.R) != ("wgrad", False, 1):  # by packed pixels 12.0 us, 13.4 by lean
            assert row.endswith("_lean"), (row, case)
            operands = {"fprop": "xw" if case.R > 1 else "x", "dgrad": "wy", "wgrad": "xwy" if case.R > 1 else "xy"}
            assert packed(op, case, *meta(case, dtype, "nchw"), allow_tf32=tf32) == operands[op], (op, case)
    few = Case("weights", 5, 4, 14, 14, 88, 7, 1, (2, 2))
    assert packed("wgrad", few, *meta(few, torch.float32, "nchw"), allow_tf32=True) == "xy"
    assert not named("dgrad", Case("40", 32, 40, 28, 28, 128, 3, 3, padding=(1, 1)), torch.float16, "nchw").endswith(
        "_lean"
    )


def test_strict_first_layers_of_short_sums_read_words_from_where_they_lie() -> None:
    first = Case("first", 8, 3, 224, 224, 32, 3, 3, (2, 2), (1, 1))
    for layout in ("nchw", "nhwc"):
        assert named("fprop", first, torch.float32, layout) == "stem_fprop_f32_16x64_lean"
    lean = ROWS.index("stem_fprop_f32_16x64_lean")
    for C, taken in ((1, False), (2, True), (3, True), (4, False)):  # FMA is more exact; more steps than are held
        assert (ask("fprop", Case("first", 8, C, 64, 64, 32, 3, 3), torch.float32, "nchw")[3 + lean] >= 0) == taken, C


def test_small_deep_layers_are_shared_out_by_as_many_blocks_as_pay() -> None:
    """A few parts where each more takes longer to add than it saves steps, and some where there were none."""
    deep = Case("deep", 1, 380, 8, 8, 380, 3, 3, padding=(1, 1))  # of 384 16.1 us by 19 parts, 13.9 by 6
    few_tiles = Case("few tiles", 8, 260, 7, 7, 260, 3, 3, padding=(1, 1))  # of 256 15.7 us unsplit, 13.6 by 4
    for op, case in itertools.product(("fprop", "dgrad"), (deep, few_tiles)):
        row, parts, *_ = ask(op, case, torch.float16, "nchw")
        assert ROWS[row].endswith(("_64x64_im2col", "_64x64_lean")) and 2 <= parts <= 9, (op, case)
    for op, case, layout in (
        ("fprop", Case("1x1", 1, 480, 14, 14, 384, 1, 1), "nchw"),
        ("fprop", Case("1x1", 1, 1024, 14, 14, 256, 1, 1), "nchw"),
    ):
        row, parts, *_ = ask(op, case, torch.float32, layout, allow_tf32=True)
        assert ROWS[row].endswith("_lean") and parts > 2, case
    # Depthwise with two filters a channel.
    two = Case("11x1", 16, 72, 32, 32, 144, 11, 1, padding=(5, 0), groups=72)
    row, parts, *_ = ask("wgrad", two, torch.float32, "nhwc")
    assert ROWS[row].endswith("_0x0_nhwc") and parts >= 48
    assert named("wgrad", two, torch.float16).endswith("_im2col")  # padded and merged: 77 us for 116


def test_long_sums_for_few_weights_have_an_sm_a_block_and_as_few_parts_as_that_takes() -> None:
    """tma_sums.cuh: a tile's blocks are a cluster, or their sums are added by a second pass."""
    for dtype, (tile, blocks, second_pass, case) in itertools.product(
        (torch.float16, torch.bfloat16),
        (
            ("64x64", 8, True, Case("resnet50", 32, 128, 56, 56, 512, 1, 1)),
            ("64x64", 16, True, Case("resnet50", 32, 128, 56, 56, 256, 1, 1)),
            ("64x64", 16, True, Case("resnet50", 32, 256, 56, 56, 128, 1, 1)),
            ("128x128", 3, False, Case("resnet50", 32, 256, 14, 14, 256, 3, 3, padding=(1, 1))),
        ),
    ):
        row, parts, workspace, *_ = ask("wgrad", case, dtype, "nhwc")
        assert ROWS[row].endswith(f"_{tile}_lean") and parts == blocks, case
        assert (workspace > 0) == second_pass, case


def test_few_weights_of_1x1_filters_are_products_of_matrices_in_parts_by_tiles_that_fit_their_channels() -> None:
    for dtype, (tile, blocks, case) in itertools.product(
        (torch.float16, torch.bfloat16),
        (
            ("160x128", 14, Case("160 filters", 32, 672, 24, 24, 160, 1, 1)),  # 31.2 us by 64x64 tiles, 19.6
            ("128x64", 5, Case("288 filters", 32, 576, 14, 14, 288, 1, 1)),  # 16.7, 15.2
            ("128x64", 10, Case("resnet50", 32, 128, 28, 28, 512, 1, 1)),  # 18.9 by 64x64, 17.6
            ("128x64", 10, Case("resnet50", 32, 512, 28, 28, 128, 1, 1)),  # 19.8 by 64x64, 17.6
            ("192x128", 5, Case("xception", 32, 728, 19, 19, 728, 1, 1)),  # 43.7, 33.6
        ),
    ):
        row, parts, workspace, *_ = ask("wgrad", case, dtype, "nhwc")
        columns, rows = map(int, tile.split("x"))
        assert ROWS[row].endswith(f"_{tile}_lines") and parts == blocks, (case, ROWS[row], parts)
        assert workspace % (parts * rows * columns * 4) == 0 < workspace <= 132 * rows * columns * 4, case


def test_1x1_weight_gradients_over_odd_planes_are_packed_and_over_even_ones_of_that_size_are_not() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for case in (Case("odd", 8, 112, 7, 7, 664, 1, 1), Case("odd", 64, 2048, 7, 7, 512, 1, 1)):
            name = named("wgrad", case, dtype, "nchw")
            assert re.search("_lines$|_lean$", name) and packed("wgrad", case, *meta(case, dtype, "nchw")) == "xy", case
        assert named("wgrad", Case("even", 2, 640, 14, 14, 128, 1, 1), dtype, "nchw").endswith("_any")
        padded = Case("padded", 8, 112, 7, 7, 664, 1, 1, padding=(1, 2))  # no matrix of pixels
        assert not re.search("_lines$|_lean$", named("wgrad", padded, dtype, "nchw"))


@pytest.mark.parametrize("op", OPS)
def test_small_1x1_layers_over_nchw_in_16_bits_take_one_tile_a_block_in_place(op: str) -> None:
    for case, dtype in itertools.product(
        (Case("planes", 1, 64, 56, 56, 256, 1, 1), Case("planes", 1, 1024, 20, 20, 512, 1, 1)),
        (torch.float16, torch.bfloat16),
    ):
        row, _, workspace, *_ = ask(op, case, dtype, "nchw")
        assert re.search("_lean$|^pixels_.*_(nchw|lines)$", ROWS[row]) and workspace == 0, case
        assert packed(op, case, *meta(case, dtype, "nchw")) == "", case
    round_of_tiles = Case("planes", 8, 256, 40, 40, 256, 1, 1)
    if op != "wgrad":
        assert re.fullmatch(rf"pixels_{op}_f16_128x\d+_(nchw|lines)", named(op, round_of_tiles, torch.float16, "nchw"))
    # Images of other sizes, and filters that take no vectors, are packed.
    for odd in (Case("planes", 1, 64, 7, 7, 256, 1, 1), Case("planes", 1, 60, 56, 56, 256, 1, 1)):
        lean = named(op, odd, torch.float16, "nchw").endswith("_lean")
        assert not lean or packed(op, odd, *meta(odd, torch.float16, "nchw")) == "xy", odd


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_1x1_layers_over_planes_of_half_vectors_stay_in_place_in_16_bits(op: str) -> None:
    """Four pixels are copied at a time (tma_lean_gather.cuh)."""
    for case, dtype in itertools.product(
        (
            Case("resnet50", 8, 1024, 14, 14, 256, 1, 1),
            Case("effnet", 64, 112, 14, 14, 672, 1, 1),
            Case("planes", 16, 640, 10, 10, 640, 1, 1),
        ),
        (torch.float16, torch.bfloat16),
    ):
        row, _, workspace, *_ = ask(op, case, dtype, "nchw")
        assert re.search("_(lean|raw|narrow)$", ROWS[row]), case
        assert workspace == 0 or (op == "fprop" and ROWS[row].endswith("128x196_raw")), case
        assert packed(op, case, *meta(case, dtype, "nchw")) == "", case
    for other in (
        Case("three filters wide", 8, 256, 14, 14, 256, 3, 3, padding=(1, 1)),
        Case("stride", 8, 256, 14, 14, 256, 1, 1, (2, 2)),
    ):
        assert packed(op, other, *meta(other, torch.float16, "nchw")) != "", other
    assert not named(op, Case("filters", 8, 260, 14, 14, 260, 1, 1), torch.float16, "nchw").endswith("_lean")


def test_filters_of_1x1_stay_where_memory_bounds_the_layer() -> None:
    """The second kernel of the rows of 64x128; it takes what the first does not, and small problems are not its own."""
    for dtype in (torch.float16, torch.bfloat16):
        assert named("fprop", Case("wide", 64, 64, 56, 56, 256, 1, 1), dtype).endswith("_64x128_im2col")
        for C, K in ((64, 256), (256, 64)):
            assert named("dgrad", Case("wide", 64, C, 56, 56, K, 1, 1), dtype).endswith("_64x128_im2col")
        assert named("fprop", Case("one", 1, 64, 56, 56, 256, 1, 1), dtype).endswith("_lean")
        assert not named("fprop", Case("deep", 64, 512, 28, 28, 512, 1, 1), dtype).endswith("_64x128_im2col")
    wide = Case("wide", 64, 128, 28, 28, 512, 1, 1)
    assert named("fprop", wide, torch.float32, allow_tf32=True).endswith("_64x128_im2col")


def test_1x1_layers_take_tiles_of_64_rows_by_as_many_pixels_as_fill_a_round() -> None:
    for op, size, tile in (
        ("fprop", (8, 432, 80, 80, 288), "256x64"),
        ("dgrad", (8, 144, 56, 56, 192), "192x64"),
        ("dgrad", (32, 272, 12, 12, 1632), "192x64"),
    ):
        assert named(op, Case("1x1", *size, 1, 1), torch.float16) == f"tma_{op}_f16_{tile}_lines", size


def test_129_to_192_results_of_1x1_filters_that_stay_are_multiplied_at_once() -> None:
    for op, case in (
        ("fprop", Case("mobilenet", 32, 144, 80, 80, 144, 1, 1)),
        ("dgrad", Case("mobilenet", 32, 144, 80, 80, 144, 1, 1)),
        ("fprop", Case("mobilenet", 64, 144, 56, 56, 160, 1, 1)),
    ):
        assert named(op, case, torch.float16).endswith("_64x128_im2col"), case


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_few_channels_and_many_results_over_nchw_take_turns(op: str) -> None:
    """A block has the next tile of filters in its next turn, and only the channels that there are are copied (L22)."""
    for N, few, side, many in ((64, 16, 112, 96), (32, 24, 56, 144), (128, 40, 28, 240), (64, 32, 112, 16)):
        C, K = (few, many) if op == "fprop" else (many, few)
        name = named(op, Case("mobilenet", N, C, side, side, K, 1, 1), torch.float16, "nchw")
        assert re.fullmatch(rf"pixels_{op}_f16_\d+x256_nchw", name), name


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_few_filters_multiply_256_pixels_at_once(op: str) -> None:
    for size in ((32, 64, 224, 224, 64), (1, 64, 540, 960, 64)):
        case = Case("few_filters", *size, 5, 5, padding=(2, 2))
        assert named(op, case, torch.float16) == f"tma_{op}_f16_256x64_halo", case


def test_taps_share_copies_of_pixels_with_a_stride_too() -> None:
    case = Case("speech", 32, 32, 79, 341, 32, 5, 10, stride=(2, 2))
    assert named("fprop", case, torch.float16) == "tma_fprop_f16_256x64_halo"


def test_few_channels_have_the_phases_of_a_stride_computed_together() -> None:
    for case in (
        Case("speech", 32, 32, 79, 341, 32, 5, 10, stride=(2, 2)),
        Case("yolo", 32, 32, 320, 320, 64, 3, 3, stride=(2, 2), padding=(1, 1)),
    ):
        assert named("dgrad", case, torch.float16) == "tma_dgrad_f16_128x128_phases", case


def test_few_filters_keep_their_pixels_for_all_phases_of_a_stride() -> None:
    case = Case("patches", 64, 128, 56, 56, 256, 2, 2, stride=(2, 2))
    for dtype, name in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
        assert named("dgrad", case, dtype) == f"tma_dgrad_{name}_256x128_halo"
        assert ask("dgrad", case, dtype, "nhwc")[1:3] == [1, 0]


def test_up_to_128_filters_of_3x3_with_a_stride_stay_in_registers() -> None:
    for N, C, K in ((256, 128, 128), (32, 64, 128), (8, 64, 128), (32, 128, 64), (16, 192, 128), (16, 96, 96)):
        case = Case("resnet", N, C, 56, 56, K, 3, 3, stride=(2, 2), padding=(1, 1))
        for dtype, name in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
            assert named("dgrad", case, dtype) == f"tma_dgrad_{name}_256x96_halo", case
            assert ask("dgrad", case, dtype, "nhwc")[1:3] == [1, 0]


def test_3x3_of_64_channels_stays_in_registers() -> None:
    for N, K, stride in ((256, 64, 1), (32, 64, 1), (64, 128, 1), (64, 128, 2)):
        case = Case("resnet", N, 64, 56 * stride, 56 * stride, K, 3, 3, stride=(stride, stride), padding=(1, 1))
        assert named("fprop", case, torch.float16) == "tma_fprop_f16_256x96_halo", case
        if K == 64:
            assert named("dgrad", case, torch.bfloat16) == "tma_dgrad_bf16_256x96_halo", case


def test_3x3_of_65_to_128_channels_stays_in_registers_in_part() -> None:
    for N, C, size, K, stride in (
        (128, 128, 28, 128, 1),
        (32, 128, 56, 256, 1),
        (32, 96, 56, 96, 1),
        (32, 96, 112, 96, 2),
        (64, 120, 56, 240, 2),
    ):
        case = Case("resnet", N, C, size, size, K, 3, 3, stride=(stride, stride), padding=(1, 1))
        assert named("fprop", case, torch.float16) == "tma_fprop_f16_256x96_halo", case
        if stride == 1 and C == K:
            assert named("dgrad", case, torch.bfloat16) == "tma_dgrad_bf16_256x96_halo", case


def test_3x3_of_32_channels_in_tf32_stays_in_registers() -> None:
    for K, stride in ((64, 1), (128, 2)):
        case = Case("layer", 32, 32, 112, 112, K, 3, 3, stride=(stride, stride), padding=(1, 1))
        assert named("fprop", case, torch.float32, allow_tf32=True) == "tma_fprop_f32_256x32_halo", case


def test_65_to_96_filters_have_a_tile_of_their_own() -> None:
    case = Case("layer", 32, 96, 56, 56, 96, 3, 3, padding=(1, 1))
    for op in ("fprop", "dgrad"):
        assert named(op, case, torch.float16) == f"tma_{op}_f16_256x96_halo"


def test_layers_of_several_taps_that_fill_the_device_once_take_large_lean_tiles() -> None:
    assert named("fprop", Case("resnet50", 32, 256, 14, 14, 256, 3, 3, padding=(1, 1)), torch.float16).endswith("lean")
    few = Case("resnet50", 32, 512, 7, 7, 512, 3, 3, padding=(1, 1))
    assert named("wgrad", few, torch.float16) == "tma_wgrad_f16_128x192_lean"
    many = Case("diffusion", 2, 1280, 16, 16, 1280, 3, 3, padding=(1, 1))
    assert named("wgrad", many, torch.float16).endswith("im2col")
    # Nor few pixels whose many weights take several rounds.
    for C, dtype in ((1280, torch.float16), (1280, torch.bfloat16), (2560, torch.float16)):
        deep = Case("diffusion", 2, C, 8, 8, 1280, 3, 3, padding=(1, 1))
        assert named("wgrad", deep, dtype).endswith("im2col"), (C, dtype)


def test_an_incomplete_last_round_of_tiles_is_shared_out() -> None:
    """265 tiles for 132 blocks: without it, 131 of them would wait while one computes a third tile."""
    case = Case("dilated", 8, 2048, 65, 65, 256, 3, 3, (1, 1), (36, 36), (36, 36))
    row, split_k, workspace, *_ = ask("fprop", case, torch.float16, "nhwc")
    assert split_k > 1 and workspace > 0


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_wide_images_copy_a_row_of_taps_at_once_and_small_ones_do_not(op: str) -> None:
    wide = Case("wide", 8, 64, 224, 224, 64, 3, 3, padding=(1, 1))
    small = Case("small", 1024, 256, 7, 7, 256, 3, 3, padding=(1, 1))
    assert named(op, wide, torch.float16).endswith("_halo")
    assert named(op, small, torch.float16).endswith("_im2col")


def test_weight_gradients_of_few_filters_copy_a_row_of_taps_at_once_and_of_32_channels_in_narrow_lines() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert named("wgrad", Case("halo", 32, 64, 224, 224, 64, 3, 3, padding=(1, 1)), dtype).endswith("576x64_halo")
        assert named("wgrad", Case("narrow", 32, 32, 320, 320, 64, 3, 3, (2, 2), (1, 1)), dtype).endswith("_narrow")
        assert named("wgrad", Case("many", 2, 2560, 16, 16, 1280, 3, 3, padding=(1, 1)), dtype).endswith("_im2col")


def test_weight_gradients_over_nchw_take_rows_of_whole_vectors_as_they_lie() -> None:
    """Many weights alone are packed: neighbouring channels of a tap are stored at once."""
    layers = (
        (Case("planes", 32, 64, 224, 224, 64, 3, 3, padding=(1, 1)), ""),
        (Case("planes", 256, 64, 56, 56, 64, 3, 3, padding=(1, 1)), ""),
        (Case("planes", 1, 128, 512, 512, 128, 3, 3, padding=(1, 1)), ""),
        (Case("planes", 8, 320, 128, 128, 320, 3, 3, padding=(1, 1)), "w"),
    )
    for dtype, (case, which) in itertools.product((torch.float16, torch.bfloat16), layers):
        assert named("wgrad", case, dtype, "nchw").endswith("576x64_nchw"), case
        assert packed("wgrad", case, *meta(case, dtype, "nchw")) == which, case
        assert named("wgrad", case, torch.float32, "nchw", allow_tf32=True) == "tma_wgrad_f32_576x64_nchw", case
    odd_rows = Case("planes", 32, 64, 222, 222, 64, 3, 3, padding=(1, 1))
    for dtype in (torch.float16, torch.float32):
        assert named("wgrad", odd_rows, dtype, "nchw", allow_tf32=True).endswith("576x64_halo"), dtype


def test_1x1_filters_with_strides_over_nchw_copy_the_pixels_that_they_meet() -> None:
    case = Case("downsample", 64, 256, 56, 56, 512, 1, 1, (2, 2))
    for dtype, (op, which) in itertools.product(
        (torch.float16, torch.float32), zip(OPS, ("x", "xy", "xy"), strict=True)
    ):
        tensors = meta(case, dtype, "nchw")
        assert packed(op, case, *tensors, allow_tf32=True) == which, (op, dtype)
        copies = (
            sum({"x": case.C, "y": case.K}[name] for name in which) * case.N * case.P * case.Q * tensors[0].itemsize
        )
        partial = 0 if op != "wgrad" else 2**25  # sums
        assert 0 <= ask(op, case, dtype, "nchw", allow_tf32=True)[2] - copies <= partial + 2**20, (op, dtype)


def test_a_weight_gradient_with_few_filters_and_many_pixels_is_split() -> None:
    """3x3 weights of 12 channels are less than one tile of work for 132 SMs, the 400000 pixels are not."""
    case = Case("pixels", 32, 12, 112, 112, 12, 3, 3, padding=(1, 1))
    assert ask("wgrad", case, torch.float32)[1] > 1


@pytest.mark.parametrize("op", OPS)
def test_explain_names_the_row_of_the_plan(op: str) -> None:
    case = BY_NAME["3x3"]
    text = conv2d_ext.explain(
        case.input_size, case.weight_size, None, *case.args, op=op, dtype=torch.float32, channels_last=False,
        allow_tf32=False,
    )  # fmt: skip
    chosen = ask(op, case, torch.float32)
    assert text.op == op
    if not torch.cuda.is_available():
        assert text.kernel == ROWS[chosen[0]]
        assert text.split_k == chosen[1]
        assert text.workspace_bytes == chosen[2]
    assert text.kernel in str(text)
    assert [name for name, _ in text.candidates] and text.kernel in {n for n, us in text.candidates if us is not None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
def test_explain_plans_what_the_ops_are_given(layout: str, dtype: torch.dtype) -> None:
    """The output and the gradients as the ops lay them out, in NCHW for all of float64."""
    ops = torch.ops.conv2d_ext
    for name in ("3x3", "depthwise", "groups2"):
        case = BY_NAME[name]
        x, w, _ = meta(case, dtype, layout)
        y = ops.fprop(x, w, None, *map(list, case.args[:3]), case.groups)
        dx = ops.dgrad(y, w, list(x.shape), *map(list, case.args[:3]), case.groups)
        for op, tensors in (("fprop", (x, w, y)), ("dgrad", (dx, w, y)), ("wgrad", (x, w, y))):
            found = conv2d_ext.explain(x, w, None, *case.args, op=op, allow_tf32=False).candidates
            asked = plan(op, case, *tensors)[-len(ROWS) :]
            assert {row for row, us in found if us is not None} == {
                r for r, ns in zip(ROWS, asked, strict=True) if ns >= 0
            }, (
                op,
                name,
            )


def test_steps_that_take_seconds_are_planned() -> None:
    """Nanoseconds of a tile of dgrad's phases left 32 bits: a division by zero ended the process.

    `plan` answers -1 for a row that does not support the problem, and the least integer for a time that is not finite.
    """
    for case, dtype in (
        (Case("2 images", 2, 8, 32, 32, 8192, 218, 114, (1, 2), (109, 57)), torch.float32),
        (Case("1 image", 1, 8, 64, 64, 32768, 300, 300, (2, 2), (150, 150)), torch.float16),
    ):
        row, _, _, *estimates = ask("dgrad", case, dtype, allow_tf32=True)
        assert min(estimates) >= -1
        assert 0 < estimates[row] < 1e9 < max(estimates)


@pytest.mark.parametrize("op", OPS)
def test_explain_plans_each_tensor_as_it_is_aligned(op: str) -> None:
    case = BY_NAME["3x3_few_channels_of_128_columns"]
    x, w = (
        torch.zeros(math.prod(size) + 4, dtype=torch.float16)[4:].view(size)
        for size in (case.input_size, case.weight_size)
    )
    aligned = {"fprop": (8, 8, 16), "dgrad": (16, 8, 16), "wgrad": (8, 16, 16)}[op]  # new tensors are aligned
    found = [us for _, us in conv2d_ext.explain(x, w, None, *case.args, op=op).candidates]
    gpu = dict(zip(("sm_count", "capability"), machine(), strict=True)) if torch.cuda.is_available() else {}
    for align, same in ((aligned, True), (8, False)):
        asked = ask(op, case, torch.float16, align=align, **gpu)[3:]
        assert (found == [None if ns < 0 else ns / 1000 for ns in asked]) == same


def test_explain_takes_tensors_and_shapes_alike() -> None:
    case = BY_NAME["groups2"]
    x, w, b = case.tensors("cpu", torch.float16)
    meta = conv2d_ext.explain(x.to("meta"), w.to("meta"), None, *case.args)
    assert meta == conv2d_ext.explain(x, w, b, *case.args)
    assert meta == conv2d_ext.explain(case.input_size, case.weight_size, None, *case.args, dtype=torch.float16)


@pytest.mark.parametrize(
    "change,named",
    (
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": "image"}, "input"),
        ({"input": (1, 4, 8)[:2]}, "input"),
        ({"input": (-1, 4, 8, 8)}, "input"),
        ({"input": (2**31, 4, 2**20, 2**20)}, "input"),
        ({"input": torch.ones(1, 4, 8, 8).to_sparse()}, "input"),
        ({"input": torch.ones(1, 3, 8, 8)}, "weight"),
        ({"weight": None}, "weight"),
        ({"weight": (4, 3, 3)}, "weight"),
        ({"weight": torch.ones(8, 4, 3, 3).half(), "input": torch.ones(1, 4, 8, 8)}, "weight"),
        ({"bias": torch.ones(3)}, "bias"),
        ({"bias": torch.ones(8).double()}, "bias"),
        ({"bias": 8}, "bias"),
        ({"dtype": torch.int8}, "dtype"),
        ({"dtype": "float16"}, "dtype"),
        ({"stride": 0}, "stride"),
        ({"padding": (1, 1, 1)}, "padding"),
        ({"groups": 3}, "weight"),
        ({"channels_last": torch.channels_last}, "channels_last"),
        ({"allow_tf32": "no"}, "allow_tf32"),
    ),
    ids=str,
)
def test_explain_refuses_bad_arguments_by_name(change: dict[str, object], named: str) -> None:
    good = {"input": (1, 4, 8, 8), "weight": (8, 4, 3, 3), "bias": torch.ones(8)}
    assert conv2d_ext.explain(**good).op == "fprop"  # type: ignore[arg-type]
    with pytest.raises((RuntimeError, ValueError, TypeError), match=f"(explain|conv2d): {named}: expected .+, got ."):
        conv2d_ext.explain(**{**good, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ("meta", "cpu", torch.device("meta"), "cuda:99", 99, -1, "gpu", ""), ids=repr)
def test_explain_names_a_device_that_is_not_a_cuda_device(wrong: object) -> None:
    case = BY_NAME["3x3"]
    with pytest.raises(RuntimeError, match="explain: device: expected .*, got "):
        conv2d_ext.explain(case.input_size, case.weight_size, None, *case.args, device=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    (
        {"op": "forward"},
        {"op": ""},
        {"weight_size": [4, 3, 3]},
        {"input_size": []},
        {"stride": [0, 1]},
        {"padding": [1, 1, 1]},
        {"groups": 0},
        {"groups": 3},
        {"alignments": [16]},
        {"dilation": [2**62, 2**62]},
        {"input_size": [2**40, 2**40, 2**40, 2**40]},
    ),
    ids=str,
)
def test_the_planner_refuses_what_is_not_a_problem(change: dict[str, object]) -> None:
    question: dict[str, object] = {
        "op": "fprop", "dtype": torch.float32,
        "input_size": [1, 4, 5, 5], "input_stride": [100, 25, 5, 1],
        "weight_size": [4, 4, 3, 3], "weight_stride": [36, 9, 3, 1], "output_stride": [36, 9, 3, 1],
        "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, "alignments": [16, 16, 16],
        "allow_tf32": False, "sm_count": 132, "compute_capability": 90,
    }  # fmt: skip
    assert torch.ops.conv2d_ext.plan(*question.values())[0] >= 0
    with pytest.raises(RuntimeError):
        torch.ops.conv2d_ext.plan(*{**question, **change}.values())


@pytest.mark.parametrize("size", ((4, 0), (0, 0)))
def test_an_empty_result_of_a_few_channels_is_planned(size: tuple[int, int]) -> None:
    """stem_taps divided by its parts, of which there are none."""
    for dtype in (torch.float16, torch.float32):
        case = Case("empty", 2, 3, *size, 64, 3, 3, padding=(2, 2))
        for op in OPS:
            assert ask(op, case, dtype, "nhwc", allow_tf32=True)[0] >= 0


@pytest.mark.parametrize("W,R,pad", ((32, 10, 1), (48, 10, 1), (96, 10, 1), (32, 12, 3)))
def test_wgrad_whose_first_step_has_seven_columns_is_not_for_longer_filters(W: int, R: int, pad: int) -> None:
    """stream_sums.cuh: a tap of column 7 would meet the last column of the row before."""
    row = ROWS.index("stream_wgrad_f16_13x13_nchw")
    case = Case("sums", 32, 256, 32, W, 256, R, R, padding=(pad, pad), groups=256)
    assert row not in candidates(ask("wgrad", case, torch.float16))
    even = dataclasses.replace(case, R=11, S=11, padding=(5, 5))
    assert row in candidates(ask("wgrad", even, torch.float16))


def test_each_factor_beside_other_rows_is_one_rows() -> None:
    """A factor of a row that has gone would change nothing, and be read as if it did."""
    text = (Path(__file__).parent.parent / "csrc/core/beside.def").read_text()
    factors = re.findall(r"^BESIDE\((\w+), (\w+), (\w+), (\w+), (\w+), (\w+), (?:nchw|nhwc), [\d.]+[,)]", text, re.M)
    assert len(factors) == len(re.findall("^BESIDE", text, re.M)) > 15
    for family, variant, op, kind, m, n in factors:
        tile = r"\d+x\d+" if m == "any" else f"{m}x{n}"
        row = re.compile(f"{family}_{op}_f{16 if kind == 'half' else 32}_{tile}_{variant}")
        assert any(row.fullmatch(name) for name in ROWS), row.pattern


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_strided_1x1_of_many_filters_has_warpgroups_some_steps_apart(dtype: torch.dtype) -> None:
    """tma_lag.cuh: L10 76.2 us, 79.8 by 128x128, whose estimate was alike; its 98 pairs of tiles take six rounds."""
    for case in (
        Case("L10", 256, 1024, 14, 14, 2048, 1, 1, (2, 2)),
        Case("50x76", 8, 1024, 50, 76, 2048, 1, 1, (2, 2)),
    ):
        assert named("fprop", case, dtype).endswith("_128x256_im2col"), case
