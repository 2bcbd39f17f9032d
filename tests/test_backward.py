"""The raw gradient operators dgrad and wgrad: against float64, against torch, in every dtype and layout."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from calls import OPS, call, dgrad, fprop, wgrad
from cases import BY_NAME, CASES, DTYPES, FEW, Case
from checks import for_each
from layouts import OTHER, PLAIN
from reference import (
    Result,
    assert_close,
    distance,
    exact,
    layout_to_compare,
    of_tensors,
    same_bits,
    torchs_gradients,
    ulp,
)
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned")

EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)
A_FEW_CASES = pytest.mark.parametrize("case", FEW, ids=str)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
HALVES_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


def gradients(
    case: Case, dtype: torch.dtype, device: str, layout: str, integers: bool = False
) -> tuple[Tensor, Tensor]:
    """(grad_input, grad_weight) by our operators."""
    x, w, _ = case.tensors(device, dtype, layout, integers=integers)
    go = case.grad_output(device, dtype, layout, integers=integers)
    return dgrad(case, go, w), wgrad(case, go, x)


def assert_gradients(
    case: Case, dtype: torch.dtype, got: tuple[Tensor, Tensor], expected: Result, times: int = 1
) -> None:
    assert_close(got[0], expected.grad_input, dtype, times * case.reduction("dgrad"), "grad_input")
    assert_close(got[1], expected.grad_weight, dtype, times * case.reduction("wgrad"), "grad_weight")


@EVERY_CASE
@for_each(dtype=DTYPES, layout=PLAIN)
def test_gradients_agree_with_float64(case: Case, layout: str, dtype: torch.dtype, device: str) -> None:
    assert_gradients(case, dtype, gradients(case, dtype, device, layout), exact(case, dtype, device=device))


@EVERY_CASE
@for_each(dtype=HALVES_AND_SINGLE, layout=OTHER)
def test_gradients_agree_with_float64_in_any_strides(case: Case, layout: str, dtype: torch.dtype, device: str) -> None:
    assert_gradients(case, dtype, gradients(case, dtype, device, layout), exact(case, dtype, device=device))


@EVERY_CASE
@for_each(dtype=DTYPES, layout=PLAIN)
def test_gradients_are_as_accurate_as_torchs(case: Case, layout: str, dtype: torch.dtype, device: str) -> None:
    if dtype == torch.float64 and case.large:
        return  # the finer reference takes ten convolutions
    theirs = torchs_gradients(case, dtype, device, layout_to_compare(case, device, layout))
    for what, our, their in zip(
        ("grad_input", "grad_weight"), gradients(case, dtype, device, layout), theirs, strict=True
    ):
        assert distance(our, case, dtype, what) <= 2 * distance(their, case, dtype, what) + ulp(dtype), what


@EVERY_CASE
@for_each(dtype=DTYPES, layout=PLAIN)
def test_gradients_of_small_integers_are_exact(case: Case, layout: str, dtype: torch.dtype, device: str) -> None:
    truth = exact(case, dtype, integers=True, device=device)
    grad_input, grad_weight = gradients(case, dtype, device, layout, integers=True)
    assert torch.equal(grad_input, truth.grad_input.to(dtype))
    assert torch.equal(grad_weight, truth.grad_weight.to(dtype))


@EVERY_DTYPE
@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize("case", (*FEW, BY_NAME["many_pixels"], BY_NAME["many_pixels_depthwise"]), ids=str)
def test_gradients_are_the_same_bit_by_bit_in_every_run(
    case: Case, layout: str, dtype: torch.dtype, device: str
) -> None:
    first = gradients(case, dtype, device, layout)
    for _ in range(3):
        for a, b in zip(first, gradients(case, dtype, device, layout), strict=True):
            assert same_bits(a, b)


@EVERY_DTYPE
@A_FEW_CASES
def test_a_constant_gradient_with_zero_strides_reads_as_its_copy(case: Case, dtype: torch.dtype, device: str) -> None:
    """What autograd hands over for y.sum(): one element, expanded to the shape of y."""
    x, w, _ = case.tensors(device, dtype)
    go = torch.tensor(0.75, dtype=dtype, device=device).expand(case.output_size)
    truth = of_tensors(case, x, w, None, go)
    assert_gradients(case, dtype, (dgrad(case, go, w), wgrad(case, go, x)), truth, times=4)


@EVERY_DTYPE
@pytest.mark.parametrize("dims", ((0,), (1,), (2,), (3,), (2, 3)), ids=str)
def test_a_gradient_expanded_in_some_dimensions_reads_as_its_copy(
    dims: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    """What autograd hands over for y.mean(dims).backward(...)."""
    case = BY_NAME["2x5_stride_1x3"]
    x, w, _ = case.tensors(device, dtype)
    go = case.grad_output(device, dtype)
    for dim in dims:
        go = go.narrow(dim, 0, 1)
    go = go.expand(case.output_size)
    truth = of_tensors(case, x, w, None, go)
    assert_gradients(case, dtype, (dgrad(case, go, w), wgrad(case, go, x)), truth, times=4)


@EVERY_DTYPE
def test_gradients_with_an_expanded_input_or_weight_read_them_as_copies(dtype: torch.dtype, device: str) -> None:
    case = BY_NAME["groups2"]
    x, w, _ = case.tensors(device, dtype)
    go = case.grad_output(device, dtype)
    x, w = x[:1].expand(case.input_size), w[:, :1].expand(case.weight_size)
    truth = of_tensors(case, x, w, None, go)
    assert_gradients(case, dtype, (dgrad(case, go, w), wgrad(case, go, x)), truth, times=4)


@A_FEW_CASES
@for_each(dtype=DTYPES, order=((0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)))
def test_wgrad_writes_the_strides_it_is_asked_for(
    case: Case, order: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    stride, total = [0, 0, 0, 0], 1
    for dim in reversed(order):
        stride[dim] = total
        total *= max(1, case.weight_size[dim])
    x, _, _ = case.tensors(device, dtype)
    got = wgrad(case, case.grad_output(device, dtype), x, stride)
    assert got.stride() == tuple(stride)
    assert_close(got, exact(case, dtype).grad_weight, dtype, case.reduction("wgrad"))


@pytest.mark.parametrize("layout", PLAIN)
def test_wgrad_is_contiguous_when_no_strides_are_asked_for(layout: str, device: str) -> None:
    case = BY_NAME["3x3"]
    x, _, _ = case.tensors(device, layout=layout)
    assert wgrad(case, case.grad_output(device, layout=layout), x).is_contiguous()


@EVERY_DTYPE
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize(
    "name",
    ("3x3", "stride3_dilation2", "depthwise_multiplier2", "four_pads", "1x1_stride2", "groups8_of_2_and_4_5x5"),
)
def test_a_gradient_that_is_not_finite_reaches_the_inputs_of_its_window_only(
    name: str, layout: str, dtype: torch.dtype, device: str
) -> None:
    case = BY_NAME[name]
    x, w, _ = case.tensors(device, dtype, layout)
    go = case.grad_output(device, dtype, layout)
    go[0, -1, case.P // 2, case.Q // 2] = float("nan")
    truth = of_tensors(case, x, w, None, go)
    assert torch.equal(dgrad(case, go, w).isnan().cpu(), truth.grad_input.isnan())


@EVERY_DTYPE
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize(
    "name", ("3x3_no_bias", "stride_3x2_uneven", "groups3_odd", "1x1", "groups4_of_32_small_images")
)
def test_an_input_that_is_not_finite_reaches_the_weights_it_meets_only(
    name: str, layout: str, dtype: torch.dtype, device: str
) -> None:
    case = BY_NAME[name]
    x, w, _ = case.tensors(device, dtype, layout)
    go = case.grad_output(device, dtype, layout)
    # The corners meet some of the taps, the last pixel that of a square of outputs with rows that do not exist.
    x[0, 0, 0, 0] = x[-1, -1, -1, -1] = float("nan")
    truth = of_tensors(case, x, w, None, go)
    assert torch.equal(wgrad(case, go, x).isnan().cpu(), truth.grad_weight.isnan())


def test_the_weights_of_strided_1x1_filters_may_have_rows_left_over(device: str) -> None:
    # On a CPU torch's own gradient writes beyond its memory in channels_last, and so ends the process sooner or later.
    case = Case("rows left over", 3, 8, 120, 22, 4, 1, 1, stride=(3, 1), bias=False)
    x, go = (
        case.tensors(device, layout="nhwc", integers=True)[0],
        case.grad_output(device, layout="nhwc", integers=True),
    )
    truth = exact(case, torch.float32, integers=True, device=device).grad_weight
    for _ in range(20):
        assert torch.equal(wgrad(case, go, x).double(), truth.to(device))


def test_inputs_that_no_window_reads_have_zero_gradient(device: str) -> None:
    case = BY_NAME["last_rows_unread"]
    x, w, _ = case.tensors(device)
    got = dgrad(case, case.grad_output(device), w)
    read = (case.P - 1) * case.stride[0] + case.R
    assert read < case.H, "the case must have rows that no window reads"
    assert bool((got[:, :, read:] == 0).all()) and bool((got[:, :, :read] != 0).any())


@pytest.mark.parametrize("step", (100_000, 2**31 - 1))
def test_the_length_of_a_step_beyond_the_image_changes_nothing(step: int, device: str) -> None:
    # On a CPU torch's own gradient of the input takes minutes, or divides by zero, which ends the process.
    for dtype, layout, padding in itertools.product(DTYPES, PLAIN, ((4, 9), (0, 8, 0, 18))):
        far = Case("far", 3, 4, 8, 2, 12, 8, 2, (3, step), padding, bias=False)
        near = dataclasses.replace(far, stride=(3, 20))
        tensors = (
            *near.tensors(device, dtype, layout, integers=True)[:2],
            near.grad_output(device, dtype, layout, integers=True),
        )
        for op in OPS:
            got, expected = (call(op, case, *tensors[:2], None, tensors[2])() for case in (far, near))
            assert torch.equal(got, expected), (op, dtype, layout, padding)


@pytest.mark.parametrize(
    "case",
    (
        Case("as long as the image", 3, 60, 208, 2, 1, 208, 1, (1, 2), (103, 0)),
        Case("longer than the image", 2, 3, 40, 14, 33, 50, 1, (2, 1), (25, 0)),
        Case("longer and dilated", 3, 24, 31, 14, 12, 40, 3, (3, 1), (20, 0), (1, 2)),
        Case("as long on both sides", 2, 1, 32, 7, 1, 32, 7, (3, 1), (16, 6)),
    ),
    ids=str,
)
def test_filters_as_long_as_the_image_are_exact(case: Case, device: str) -> None:
    # On a CPU torch's own kernels give wrong numbers here, and write beyond their memory.
    truth = exact(case, torch.float32, integers=True, device=device)
    for layout in PLAIN:
        x, w, b = case.tensors(device, torch.float32, layout, integers=True)
        go = case.grad_output(device, torch.float32, layout, integers=True)
        assert torch.equal(fprop(case, x, w, b).double(), truth.output.to(device))
        assert torch.equal(dgrad(case, go, w).double(), truth.grad_input.to(device))
        assert torch.equal(wgrad(case, go, x).double(), truth.grad_weight.to(device))
