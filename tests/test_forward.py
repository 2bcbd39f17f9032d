"""The forward result: against float64, against torch, in every dtype and layout."""

from __future__ import annotations

import itertools
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from calls import dgrad, fprop, wgrad
from cases import BY_NAME, CASES, DTYPES, FEW, Case
from checks import for_each
from layouts import LAYOUTS, OTHER, PLAIN, place
from reference import (
    assert_close,
    distance,
    error,
    exact,
    exact_parts,
    four_sided,
    layout_to_compare,
    same_bits,
    torchs_output,
    ulp,
)
from torch import Tensor

import conv2d_ext

# All orders that keep the batch outermost, and some that do not.
DENSE = ((0, 1, 2, 3), (0, 2, 3, 1), (0, 1, 3, 2), (0, 2, 1, 3), (0, 3, 1, 2), (0, 3, 2, 1), (1, 0, 2, 3), (2, 3, 0, 1))
GROUPED_ROW = Case("1x3_grouped", 5, 16, 6, 1, 48, 1, 3, (2, 1), (1, 3), (1, 1), 4)

pytestmark = pytest.mark.usefixtures("poisoned")

EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)
A_FEW_CASES = pytest.mark.parametrize("case", FEW, ids=str)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
HALVES_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


def test_fresh_memory_is_nan_in_these_tests(device: str) -> None:
    for dtype in DTYPES:
        assert torch.empty(100, dtype=dtype, device=device).isnan().all()
        assert torch.empty_strided((5, 7), (1, 5), dtype=dtype, device=device).isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_holds_the_values_it_was_given_and_nan_around_them(layout: str, device: str) -> None:
    case = BY_NAME["3x3"]
    for tensor, value in zip(
        (*case.tensors(device, layout=layout)[:2], case.grad_output(device, layout=layout)),
        (*case.tensors("cpu")[:2], case.grad_output("cpu")),
        strict=True,
    ):
        assert torch.equal(tensor.cpu(), value)
        buffer = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
        assert int((~buffer.isnan()).sum()) == tensor.numel()


@EVERY_CASE
@for_each(dtype=DTYPES, layout=PLAIN)
def test_conv2d_agrees_with_float64(case: Case, layout: str, dtype: torch.dtype, device: str) -> None:
    y = conv2d_ext.conv2d(*case.tensors(device, dtype, layout), *case.args)
    assert y.device.type == device
    assert_close(y, exact(case, dtype, device=device).output, dtype, case.reduction("fprop"))


@EVERY_CASE
@for_each(dtype=HALVES_AND_SINGLE, layout=OTHER)
def test_conv2d_agrees_with_float64_in_any_strides(case: Case, layout: str, dtype: torch.dtype, device: str) -> None:
    y = conv2d_ext.conv2d(*case.tensors(device, dtype, layout), *case.args)
    assert_close(y, exact(case, dtype, device=device).output, dtype, case.reduction("fprop"))


@EVERY_CASE
@for_each(dtype=DTYPES, layout=PLAIN)
def test_conv2d_is_as_accurate_as_torch(case: Case, layout: str, dtype: torch.dtype, device: str) -> None:
    if dtype == torch.float64 and case.large:
        return  # the finer reference takes ten convolutions
    y = conv2d_ext.conv2d(*case.tensors(device, dtype, layout), *case.args)
    ours = distance(y, case, dtype, "output")
    theirs = distance(
        torchs_output(case, dtype, device, layout_to_compare(case, device, layout)), case, dtype, "output"
    )
    assert ours <= 2 * theirs + ulp(dtype)


def test_the_finer_reference_of_float64_is_the_sum_of_rational_numbers() -> None:
    """high + low, against fractions; the products of some outputs are summed without any rounding."""
    case = BY_NAME["four_pads_grouped_dilated"]
    x, w, b = case.tensors("cpu", torch.float64)
    high, low = exact_parts(case, of_output=True)["output"]
    top, _, left, _ = case.padding4
    worst = 0.0
    for n, k, p, q in itertools.product((0, 1), (0, 5), range(case.P), range(case.Q)):
        total = Fraction(float(b[k]))
        for c, r, s in itertools.product(range(w.shape[1]), range(case.R), range(case.S)):
            h = p * case.stride[0] - top + r * case.dilation[0]
            at = q * case.stride[1] - left + s * case.dilation[1]
            if 0 <= h < case.H and 0 <= at < case.W:
                channel = k // (case.K // case.groups) * w.shape[1] + c
                total += Fraction(float(x[n, channel, h, at])) * Fraction(float(w[k, c, r, s]))
        found = Fraction(float(high[n, k, p, q])) + Fraction(float(low[n, k, p, q]))
        worst = max(worst, float(abs(found - total)))
    assert worst < 1e-18  # the outputs are of the size of 1, and a unit of float64 there is 1.1e-16


@EVERY_CASE
def test_the_reference_made_on_a_gpu_is_that_made_on_a_cpu(case: Case, cuda: str) -> None:
    there, here = (vars(exact(case, torch.float64, device=place)) for place in (cuda, "cpu"))
    for name, expected in here.items():
        assert expected is None or error(there[name], expected) <= 1e-13, name


@EVERY_CASE
@for_each(dtype=DTYPES, layout=PLAIN)
def test_conv2d_of_small_integers_is_exact(case: Case, layout: str, dtype: torch.dtype, device: str) -> None:
    """Products and partial sums of integers in [-3, 3] are exact in float32, so one rounding is all that is allowed."""
    y = conv2d_ext.conv2d(*case.tensors(device, dtype, layout, integers=True), *case.args)
    assert torch.equal(y, exact(case, dtype, integers=True, device=device).output.to(dtype))


@EVERY_CASE
def test_fprop_and_conv2d_are_one_operator(case: Case, device: str) -> None:
    x, w, b = case.tensors(device, torch.float32)
    y = fprop(case, x, w, b)
    assert same_bits(y, torch.ops.conv2d_ext.conv2d(x, w, b, *case.args))
    assert same_bits(y, conv2d_ext.conv2d(x, w, b, *case.args))


@EVERY_DTYPE
@pytest.mark.parametrize("layout", PLAIN)
@A_FEW_CASES
def test_the_result_is_the_same_bit_by_bit_in_every_run(
    case: Case, layout: str, dtype: torch.dtype, device: str
) -> None:
    first = conv2d_ext.conv2d(*case.tensors(device, dtype, layout), *case.args)
    for _ in range(3):
        assert same_bits(first, conv2d_ext.conv2d(*case.tensors(device, dtype, layout), *case.args))


@EVERY_DTYPE
@A_FEW_CASES
def test_the_result_is_a_new_dense_tensor_and_inputs_are_unchanged(case: Case, dtype: torch.dtype, device: str) -> None:
    x, w, b = case.tensors(device, dtype, "sliced")
    before = [None if t is None else t.clone() for t in (x, w, b)]
    y = conv2d_ext.conv2d(x, w, b, *case.args)
    dense = y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)
    assert dense and y.storage_offset() == 0 and not y.requires_grad
    for now, then in zip((x, w, b), before, strict=True):
        assert (now is None and then is None) or same_bits(now, then)


@EVERY_DTYPE
@pytest.mark.parametrize("dims", [(0,), (1,), (2, 3), (0, 1, 2, 3)], ids=str)
def test_an_expanded_input_reads_as_its_copy(dims: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    case = BY_NAME["3x3"]
    x, w, b = case.tensors(device, dtype)
    narrow = x
    for dim in dims:
        narrow = narrow.narrow(dim, 0, 1)
    x = narrow.expand(case.input_size)
    expected = four_sided(x.double().cpu(), w.double().cpu(), b.double().cpu(), *case.args)
    assert_close(conv2d_ext.conv2d(x, w, b, *case.args), expected, dtype, 8 * case.reduction("fprop"))


@EVERY_DTYPE
def test_an_expanded_weight_and_bias_read_as_their_copies(dtype: torch.dtype, device: str) -> None:
    case = BY_NAME["3x3"]
    x, w, b = case.tensors(device, dtype)
    w, b = w[:1].expand(case.weight_size), b[:1].expand(case.K)
    expected = four_sided(x.double().cpu(), w.double().cpu(), b.double().cpu(), *case.args)
    assert_close(conv2d_ext.conv2d(x, w, b, *case.args), expected, dtype, case.reduction("fprop"))


@EVERY_DTYPE
def test_an_input_whose_elements_overlap_reads_as_its_copy(dtype: torch.dtype, device: str) -> None:
    """Sliding windows over a signal: the strides of two dimensions are the same."""
    case = BY_NAME["C4_K12"]
    _, w, b = case.tensors(device, dtype)
    line = case.draw((64,), dtype, 9).to(device)
    x = line.as_strided(case.input_size, (16, 8, 1, 1))
    expected = four_sided(x.double().cpu(), w.double().cpu(), b.double().cpu(), *case.args)
    assert_close(conv2d_ext.conv2d(x, w, b, *case.args), expected, dtype, 4 * case.reduction("fprop"))


@EVERY_DTYPE
def test_a_strided_bias_reads_as_its_copy(dtype: torch.dtype, device: str) -> None:
    case = BY_NAME["3x3"]
    x, w, b = case.tensors(device, dtype)
    strided = torch.full((3 * case.K,), float("nan"), dtype=dtype, device=device)[1::3].copy_(b)
    assert same_bits(conv2d_ext.conv2d(x, w, strided, *case.args), conv2d_ext.conv2d(x, w, b, *case.args))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_the_bias_is_added_before_the_only_rounding(dtype: torch.dtype, device: str) -> None:
    """1 + u/2 rounds to 1 in 16 bits; with a bias of u/2 the exact sum is 1 + u, which does not."""
    u = torch.finfo(dtype).eps
    x = torch.tensor([1.0, u / 2], dtype=dtype, device=device).view(1, 2, 1, 1)
    w = torch.ones(1, 2, 1, 1, dtype=dtype, device=device)
    b = torch.tensor([u / 2], dtype=dtype, device=device)
    assert float(conv2d_ext.conv2d(x, w, b)) == 1 + u


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_long_sums_of_16_bit_values_do_not_stall(dtype: torch.dtype, device: str) -> None:
    """A sum of ones kept in bfloat16 stops at 256, in float16 at 2048."""
    x = torch.ones(1, 1024, 3, 3, dtype=dtype, device=device)
    w = torch.ones(1, 1024, 3, 3, dtype=dtype, device=device)
    assert float(conv2d_ext.conv2d(x, w)) == 9216


def masks(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return t.isnan().cpu(), t.isposinf().cpu(), t.isneginf().cpu()


@pytest.mark.parametrize(
    "name",
    ("3x3", "1x1_stride2", "2x5_stride_1x3", "four_pads_grouped_dilated", "stride3_dilation2", "depthwise", "C1_K1",
     "depthwise_multiplier2", "stride_larger_than_kernel", "K129_NPQ129", "groups8_of_2_and_4_5x5",
     "groups5_of_24_odd_sides"),
)  # fmt: skip
@for_each(dtype=DTYPES, layout=("nchw", "nhwc", "sliced"), value=(float("nan"), float("inf"), float("-inf")))
def test_a_value_that_is_not_finite_reaches_the_outputs_whose_window_holds_it(
    name: str, value: float, layout: str, dtype: torch.dtype, device: str
) -> None:
    case = BY_NAME[name]
    x, w, b = case.tensors(device, dtype, layout)
    for index in ((0, 0, 0, 0), (-1, -1, -1, -1), (0, case.C // 2, case.H // 2, case.W // 2)):
        x[index] = value
    expected = four_sided(x.double().cpu(), w.double().cpu(), None if b is None else b.double().cpu(), *case.args)
    y = conv2d_ext.conv2d(x, w, b, *case.args)
    for ours, theirs in zip(masks(y), masks(expected), strict=True):
        assert torch.equal(ours, theirs)


@EVERY_DTYPE
@pytest.mark.parametrize("name", ("3x3_no_bias", "C5_K7", "stride_3x2_uneven", "groups3_odd"))
def test_a_weight_that_is_not_finite_reaches_its_own_filter_only(name: str, dtype: torch.dtype, device: str) -> None:
    case = BY_NAME[name]
    x, w, b = case.tensors(device, dtype)
    w[1, 0, 1, 1] = float("nan")
    y = conv2d_ext.conv2d(x, w, b, *case.args)
    assert y[:, 1].isnan().all() and not y[:, 0].isnan().any() and not y[:, 2:].isnan().any()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_a_sum_beyond_the_largest_number_is_infinite(dtype: torch.dtype, device: str) -> None:
    big = torch.finfo(dtype).max
    x = torch.full((1, 4, 2, 2), big, dtype=dtype, device=device)
    w = torch.ones(2, 4, 1, 1, dtype=dtype, device=device)
    w[1] = -1
    y = conv2d_ext.conv2d(x, w)
    assert y[:, 0].isposinf().all() and y[:, 1].isneginf().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_below_the_smallest_normal_are_kept(dtype: torch.dtype, device: str) -> None:
    """Flushing them to zero is a loss that torch does not make by default."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    x = torch.full((1, 1, 3, 3), tiny, dtype=dtype, device=device)
    y = conv2d_ext.conv2d(x, torch.ones(1, 1, 1, 1, dtype=dtype, device=device))
    assert torch.equal(y, x)


def test_the_batch_may_lie_in_the_middle_of_a_larger_tensor(device: str) -> None:
    """Slices of one buffer, taken in turn, give the slices of the whole result."""
    case = BY_NAME["3x3"]
    value = case.draw((6, *case.input_size[1:]), torch.float32, 5)
    whole = place(value, device)
    _, w, b = case.tensors(device)
    y = conv2d_ext.conv2d(whole, w, b, *case.args)
    for start in (0, 2, 4):
        part = conv2d_ext.conv2d(whole[start : start + 2], w, b, *case.args)
        assert error(part, y[start : start + 2]) <= ulp(torch.float32)


@pytest.mark.parametrize(
    "name",
    (
        "1x7",
        "7x1",
        "1x1",
        "W_is_1",
        "H_is_1",
        "K129_NPQ129",
        "depthwise",
        "C1_K1",
        "one_pixel",
        "groups5_of_1x1",
        "1x3_grouped",
    ),
)
@for_each(dtype=DTYPES, layout=PLAIN, odd=(0, 1, 2, 7, 1000))
def test_strides_of_dimensions_of_size_one_mean_nothing(
    name: str, odd: int, layout: str, dtype: torch.dtype, device: str
) -> None:
    """torch 2.13's own CPU convolution in float32 reads past the weight for some of them."""
    case = {**BY_NAME, GROUPED_ROW.name: GROUPED_ROW}[name]
    x, w, b = case.tensors(device, dtype, layout)
    go = case.grad_output(device, dtype, layout)
    truth = exact(case, dtype, device=device)
    for odd_x, odd_w in ((odd, None), (None, odd), (odd, odd)):
        X, G, W = odd_strides(x, odd_x), odd_strides(go, odd_x), odd_strides(w, odd_w)
        assert_close(conv2d_ext.conv2d(X, W, b, *case.args), truth.output, dtype, case.reduction("fprop"))
        assert_close(dgrad(case, G, W), truth.grad_input, dtype, case.reduction("dgrad"))
        assert_close(wgrad(case, G, X), truth.grad_weight, dtype, case.reduction("wgrad"))


def odd_strides(t: Tensor, stride: int | None) -> Tensor:
    if stride is None:
        return t
    return t.as_strided(t.shape, [stride if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)])


@pytest.mark.parametrize("name", ("1x7", "7x1", "1x1", "3x3", "groups2", "depthwise_1x1", "1x3_grouped"))
@for_each(dtype=HALVES_AND_SINGLE, first=DENSE, second=DENSE)
def test_any_order_of_dimensions_in_memory_reads_the_same(
    name: str, first: tuple[int, ...], second: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    case = {**BY_NAME, GROUPED_ROW.name: GROUPED_ROW}[name]
    x = place(case.draw(case.input_size, dtype, 0, device=device), device, first)
    w = place(case.draw(case.weight_size, dtype, 1, device=device), device, second)
    go = place(case.draw(case.output_size, dtype, 3, device=device), device, first)
    b = case.draw((case.K,), dtype, 2, device=device) if case.bias else None
    truth = exact(case, dtype, device=device)
    assert_close(conv2d_ext.conv2d(x, w, b, *case.args), truth.output, dtype, case.reduction("fprop"))
    assert_close(dgrad(case, go, w), truth.grad_input, dtype, case.reduction("dgrad"))
    assert_close(wgrad(case, go, x), truth.grad_weight, dtype, case.reduction("wgrad"))


def test_a_depthwise_weight_with_its_filters_innermost_does_not_end_the_process(
    device: str, package_environment: dict[str, str]
) -> None:
    """torch 2.13's own CPU convolution in float32 crashes on it beside a channels_last input."""
    program = f"""
import torch, conv2d_ext
x = torch.randn(2, 3, 13, 2).contiguous(memory_format=torch.channels_last).to("{device}")
w = torch.randn(360).as_strided((72, 1, 5, 1), (1, 72, 72, 72)).to("{device}")
b = torch.randn(72).to("{device}")
arguments = dict(stride=(1, 6), padding=(2, 4), dilation=(1, 3), groups=3)
torch.set_num_threads(1)
y = conv2d_ext.conv2d(x, w, b, **arguments).cpu()
x, w, b = (t.cpu().contiguous().double() for t in (x, w, b))
expected = torch.nn.functional.conv2d(x, w, b, **arguments)
assert torch.allclose(y.double(), expected, atol=1e-5)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, env=package_environment
    )
    assert run.returncode == 0, f"ended with {run.returncode}: {run.stderr[-1000:]}"
