"""Every row of the table of kernels, on every case that it supports; not only the row that the planner would take."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
from calls import OPS, alignment, call, candidates, machine, meta, plan, problem
from cases import BY_NAME, CASES, DTYPES, Case
from checks import for_each, name_of
from layouts import LAYOUTS
from reference import SANITIZING, bits, error, exact, of_tensors, result, same_bits, tolerance, without_cudnn
from torch import Tensor

import conv2d_ext  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned")

ROWS = tuple(torch.ops.conv2d_ext.kernels())
DTYPE_NAMES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "tf32": torch.float32,
               "f64": torch.float64}  # fmt: skip
# The layouts that a kernel may treat differently: both plain ones, both unaligned, one that has no unit stride.
ROW_LAYOUTS = ("nchw", "nhwc", "nhwc_weight", "unaligned", "unaligned_nhwc", "sliced_nhwc", "every_other")


def destinations(op: str, w: Tensor) -> tuple[dict[str, object], ...]:
    """Keyword arguments for each layout that the result may have: wgrad's follows from no operand but from the caller.

    Autograd asks for the weight's own layout, and some rows of wgrad write no other.
    """
    if op != "wgrad":
        return ({},)
    like = torch.empty_like(w).stride()
    return ({"stride": like},) if like == torch.empty(w.shape, device="meta").stride() else ({}, {"stride": like})


RESULT = {"fprop": "y", "dgrad": "x", "wgrad": "w"}


def needs_sm90() -> NoReturn:
    """For a case that the test's row does not take: a mistake of the test's on the machine that the row is for."""
    if machine()[1] == 90:
        pytest.fail("the row does not take the case")
    pytest.skip("needs sm90")


def expected(op: str, case: Case, dtype: torch.dtype, device: str, integers: bool = False) -> Tensor:
    r = exact(case, dtype, integers=integers, device=device)
    return {"fprop": r.output, "dgrad": r.grad_input, "wgrad": r.grad_weight}[op]


def modes(dtype: torch.dtype) -> tuple[bool, ...]:
    """Values of allow_tf32 that make a difference."""
    return (False, True) if dtype == torch.float32 else (False,)


TF32_FAMILIES = ("tma_", "grouped_", "stem_", "pixels_", "igemm_")


def rows_of(planned: list[int], tf32: bool) -> list[int]:
    """The rows to test: with TF32 allowed, those that make use of it."""
    return [row for row in candidates(planned) if not tf32 or ROWS[row].startswith(TF32_FAMILIES)]


Kind = tuple[torch.dtype, str]  # and the layout


def sanitized(case: Case, kind: Kind) -> bool:
    """The edge cases in the plain layouts and main dtypes are the sanitizer's share."""
    dtype, layout = kind
    return case.edge and (
        (dtype in (torch.float16, torch.float32) and layout in ("nchw", "nhwc"))
        or (dtype == torch.bfloat16 and layout in ("unaligned", "sliced_nhwc"))
        or (dtype == torch.float64 and layout == "nchw")
    )


def row_cases() -> list[object]:
    """Cases, each with the kinds that one test runs."""
    parameters = []
    for case in CASES:
        kinds = list(itertools.product(DTYPES, ROW_LAYOUTS))
        if case.edge:
            share = [kind for kind in kinds if sanitized(case, kind)]
            parameters.append(pytest.param(case, share, id=f"{case}-main", marks=pytest.mark.sanitizer))
            kinds = [kind for kind in kinds if kind not in share]
        parameters.append(pytest.param(case, kinds, id=f"{case}-other" if case.edge else str(case)))
    return parameters


@pytest.mark.parametrize("op", [pytest.param(op, marks=getattr(pytest.mark, op)) for op in OPS])
@pytest.mark.parametrize("case,kinds", row_cases())
def test_every_row_that_supports_a_case_computes_it(op: str, case: Case, kinds: list[Kind], cuda: str) -> None:
    wrong = [f"{name_of(kind)}: {fault}" for kind in kinds for fault in faults_of_rows(op, case, *kind, cuda)]
    assert not wrong, "\n".join(wrong)


def faults_of_rows(op: str, case: Case, dtype: torch.dtype, layout: str, cuda: str) -> list[str]:
    """What is wrong with the results of all rows, by name: far from float64, or not the same in two runs."""
    x, w, b = case.tensors(cuda, dtype, layout)
    go = case.grad_output(cuda, dtype, layout)
    # Few launches, and one wait for the GPU, which other processes of the run share.
    judge = "cpu" if SANITIZING else cuda
    true = expected(op, case, dtype, judge)
    strict = tolerance(dtype, case.reduction(op))
    sms, capability = machine()
    names, limits, distances, different = [], [], [torch.linalg.vector_norm(true)], []
    for where, tf32 in itertools.product(destinations(op, w), modes(dtype)):
        run = functools.partial(call(op, case, x, w, b, go), allow_tf32=tf32, **where)
        tensors = problem(op, x, w, go, run())
        chosen = plan(
            op, case, *tensors, align=alignment(*tensors), allow_tf32=tf32, sm_count=sms, capability=capability
        )
        assert chosen[0] in candidates(chosen)
        for row in rows_of(chosen, tf32):
            first = run(row=row).to(judge)
            assert first.shape == true.shape and first.dtype == dtype
            names.append(f"{ROWS[row]} {where}{' TF32' if tf32 else ''}")
            limits.append(strict + (2.0**-10 if tf32 else 0))
            distances.append(torch.linalg.vector_norm(first - true))  # in float64, as `true` is
            different.append((bits(first) != bits(first if SANITIZING else run(row=row))).any())
    scale, *found = torch.stack([*distances, *different]).tolist()
    errors, differs = found[: len(names)], found[len(names) :]
    wrong = []
    for name, allowed, off, differ in zip(names, limits, errors, differs, strict=True):
        off = off / scale if scale > 0 else off
        if not off <= allowed:  # this way round, NaN is wrong
            wrong.append(f"{name}: error {off:.3g}, allowed {allowed:.3g}")
        elif differ:
            wrong.append(f"{name}: two runs differ")
    return wrong


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES, ids=str)
@for_each(dtype=DTYPES, layout=("nchw", "nhwc"))
def test_every_row_is_exact_on_small_integers(case: Case, dtype: torch.dtype, layout: str, op: str, cuda: str) -> None:
    wrong = inexact_rows(op, case, dtype, layout, cuda)
    assert not wrong, f"not exact: {', '.join(wrong)}"


def inexact_rows(op: str, case: Case, dtype: torch.dtype, layout: str, cuda: str) -> list[str]:
    x, w, b = case.tensors(cuda, dtype, layout, integers=True)
    go = case.grad_output(cuda, dtype, layout, integers=True)
    true = expected(op, case, dtype, cuda, integers=True).to(dtype)
    sms, capability = machine()
    names, found = [], []
    for where, tf32 in itertools.product(destinations(op, w), modes(dtype)):
        run = functools.partial(call(op, case, x, w, b, go), allow_tf32=tf32, **where)
        tensors = problem(op, x, w, go, run())
        align = alignment(*tensors)
        rows = rows_of(
            plan(op, case, *tensors, align=align, allow_tf32=tf32, sm_count=sms, capability=capability), tf32
        )
        names += [ROWS[row] for row in rows]
        found += [(run(row=row) != true).any() for row in rows]
    return [name for name, differs in zip(names, torch.stack(found).tolist(), strict=True) if differs]


class Launched(NamedTuple):
    """One op of a problem that reaches a kernel which no case of the list does."""

    op: str
    dtype: torch.dtype
    layout: str
    case: Case

    def __str__(self) -> str:
        return f"{self.case}-{self.op}-{name_of((self.dtype, self.layout))}"

    def written(self) -> list[object]:
        return [self.op, str(self.dtype).removeprefix("torch."), self.layout, *dataclasses.astuple(self.case)[1:12]]

    @staticmethod
    def read(place: int, entry: list[Any]) -> Launched:
        op, dtype, layout, *values = entry
        case = Case(f"launched_{place}", *(tuple(v) if isinstance(v, list) else v for v in values))
        return Launched(op, getattr(torch, dtype), layout, case)


LAUNCHED_FILE = Path(__file__).with_name("launched.json")  # scripts/launches.py finds them
LAUNCHED = tuple(Launched.read(i, entry) for i, entry in enumerate(json.loads(LAUNCHED_FILE.read_text())))


@pytest.mark.parametrize("of", LAUNCHED, ids=str)
def test_kernels_that_no_case_of_the_list_reaches_are_exact(of: Launched, cuda: str) -> None:
    wrong = inexact_rows(of.op, of.case, of.dtype, of.layout, cuda)
    assert not wrong, f"not exact: {', '.join(wrong)}"


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    "name",
    (
        "depthwise",
        "depthwise_5x5",
        "depthwise_5x5_stride2_four_pads",
        "depthwise_slices",
        "depthwise_5x5_multiplier2",
        "depthwise_7x7_multiplier2_of_8",
        "depthwise_7x7_odd",
        "depthwise_3x3_stride2_pairs",
        "depthwise_nine_images_dilated",
        "depthwise_nine_images_stride3",
    ),
)
def test_an_infinite_pixel_reaches_the_taps_that_meet_it_in_every_depthwise_row(
    name: str, dtype: torch.dtype, cuda: str
) -> None:
    """Beside the image's edge a kernel may multiply a pixel with a gradient that it made zero."""
    case = BY_NAME[name]
    x, w, b = case.tensors(cuda, dtype, "nhwc")
    go = case.grad_output(cuda, dtype, "nhwc")
    for index in ((0, 0, 0, 0), (-1, -1, -1, -1), (0, case.C // 2, -1, -1)):
        x[index] = float("inf")
    infinite = of_tensors(case, x, w, None, go).grad_weight.isfinite().logical_not().to(cuda)
    run = call("wgrad", case, x, w, b, go)
    sms, capability = machine()
    tensors = problem("wgrad", x, w, go, run())
    rows = candidates(plan("wgrad", case, *tensors, align=alignment(*tensors), sm_count=sms, capability=capability))
    for row in rows:
        if ROWS[row].startswith(("column_", "depthwise_", "toeplitz_")):
            assert torch.equal(run(row=row).isfinite().logical_not(), infinite), ROWS[row]


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    "size,stride,width",
    ((3, 1, 37), (7, 1, 37), (5, 1, 22), (7, 1, 150), (3, 1, 254), (5, 1, 513), (3, 2, 37), (7, 2, 75), (5, 2, 261)),
)
def test_walks_down_whole_images_use_their_ring_many_times(
    size: int, stride: int, width: int, dtype: torch.dtype, op: str, cuda: str
) -> None:
    """Small problems are cut into short stretches, so that few rows of a ring are filled twice."""
    case = Case(
        "walks", 16, 256, 61, width, 256, size, size, (stride, stride), (size // 2, size // 2), groups=256, bias=False
    )
    generator = torch.Generator(cuda).manual_seed(1)
    x, w, go = (
        torch.randn(shape, dtype=dtype, device=cuda, generator=generator)
        for shape in (case.input_size, case.weight_size, case.output_size)
    )
    if op == "fprop":
        true = torch.nn.functional.conv2d(x.double(), w.double(), None, *case.args)
    else:
        true = torch.nn.grad.conv2d_input(case.input_size, w.double(), go.double(), *case.args)
    run = call(op, case, x, w, None, go)
    sms, capability = machine()
    tensors = problem(op, x, w, go, run())
    rows = candidates(plan(op, case, *tensors, align=alignment(*tensors), sm_count=sms, capability=capability))
    walking = [row for row in rows if ROWS[row].startswith("stream_")]
    assert len(walking) <= 1
    assert walking or (dtype == torch.float32 and stride == 2)  # of these, small images alone
    for row in walking:
        gap = float((run(row=row).double() - true).norm() / true.norm())  # on the GPU: the tensors are large
        assert gap < tolerance(dtype, size * size), ROWS[row]


# For stream_quads_f32.cuh, large enough: shares begin and end within images, channels are off those of a block.
WIDE_ROWS = (
    Case("quads_7x7", 39, 50, 37, 40, 50, 7, 7, padding=(3, 3), groups=50),
    Case("quads_7x7_four_pads", 41, 50, 36, 60, 50, 7, 7, padding=(0, 5, 3, 3), groups=50),
    Case("quads_9x9", 39, 50, 37, 40, 50, 9, 9, padding=(3, 4), groups=50),
    Case("quads_5x5", 39, 50, 37, 36, 50, 5, 5, padding=(3, 2), groups=50),
    Case("quads_3x3_stride2", 47, 15, 80, 136, 15, 3, 3, (2, 2), (1, 1), groups=15),
    Case("quads_5x5_stride2", 47, 28, 79, 72, 28, 5, 5, (2, 2), (2, 2), groups=28),
)


# One kernel's rows are taken for such cases alone: memcheck's share of these.
SANITIZED_WIDE_ROWS = tuple(case for case in WIDE_ROWS if case.name == "quads_9x9")


@pytest.mark.parametrize("op", [pytest.param(op, marks=getattr(pytest.mark, op)) for op in OPS])
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.sanitizer if case in SANITIZED_WIDE_ROWS else ()) for case in WIDE_ROWS],
    ids=str,
)
def test_wide_rows_in_float32_are_right_and_deterministic(case: Case, op: str, cuda: str) -> None:
    generator = torch.Generator(cuda).manual_seed(1)
    x, w, go = (
        torch.randn(shape, device=cuda, generator=generator)
        for shape in (case.input_size, case.weight_size, case.output_size)
    )
    b = torch.randn(case.K, device=cuda, generator=generator)
    top, bottom, left, right = case.padding4
    padded = torch.nn.functional.pad(x.double(), (left, right, top, bottom)).requires_grad_()
    weight = w.double().requires_grad_()
    y = torch.nn.functional.conv2d(padded, weight, b.double(), case.stride, groups=case.groups)
    grad_x, grad_w = torch.autograd.grad(y, (padded, weight), go.double())
    true = {"fprop": y.detach(), "dgrad": grad_x[:, :, top : top + case.H, left : left + case.W], "wgrad": grad_w}[op]
    run = call(op, case, x, w, b, go)
    sms, capability = machine()
    tensors = problem(op, x, w, go, run())
    rows = candidates(plan(op, case, *tensors, align=alignment(*tensors), sm_count=sms, capability=capability))
    walking = [row for row in rows if ROWS[row].startswith("stream_")]
    assert len(walking) == (op != "dgrad" or case.stride == (1, 1))  # none for dgrad with a stride
    for row in walking:
        out = run(row=row)
        gap = float((out.double() - true).norm() / true.norm())
        assert gap < tolerance(torch.float32, case.R * case.S), ROWS[row]
        assert all(same_bits(run(row=row), out) for _ in range(5)), ROWS[row]


def ends(seconds: float = 60) -> bool:
    """Is the GPU done with all that this process has given it, within a time that is ample?"""
    done = torch.cuda.Event()
    done.record()
    deadline = time.monotonic() + seconds
    while not done.query():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0002)
    return True


# Tensors larger than L2 even in 16 bits, and more blocks of most kernels than a GPU holds at a time.
LARGER_THAN_L2 = (
    Case("depthwise_56", 128, 144, 56, 56, 144, 3, 3, padding=(1, 1), groups=144, bias=False),
    Case("depthwise_112", 96, 32, 112, 112, 32, 3, 3, padding=(1, 1), groups=32, bias=False),
    Case("depthwise_28_5x5", 256, 192, 28, 28, 192, 5, 5, padding=(2, 2), groups=192, bias=False),
    Case("dense_112", 48, 64, 112, 112, 64, 3, 3, padding=(1, 1), bias=False),
    Case("grouped_56", 96, 128, 56, 56, 128, 3, 3, padding=(1, 1), groups=8, bias=False),
    Case("pointwise_112", 96, 24, 112, 112, 72, 1, 1, bias=False),
)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", LARGER_THAN_L2, ids=str)
def test_replays_over_tensors_larger_than_l2_give_the_bits_of_the_eager_call_in_every_row(
    case: Case, dtype: torch.dtype, layout: str, op: str, cuda: str
) -> None:
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    generator = torch.Generator(cuda).manual_seed(1)
    x, w, go = (
        torch.randn(shape, dtype=dtype, device=cuda, generator=generator).contiguous(memory_format=memory_format)
        for shape in (case.input_size, case.weight_size, case.output_size)
    )
    run = call(op, case, x, w, None, go)
    sms, capability = machine()
    tensors = problem(op, x, w, go, run())
    rows = candidates(plan(op, case, *tensors, align=alignment(*tensors), sm_count=sms, capability=capability))
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=cuda)
    for row in rows:
        eager = run(row=row)
        assert ends(), ROWS[row]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(row=row)
        for _ in range(3):
            captured.fill_(float("nan"))
            flush.zero_()
            graph.replay()
            assert ends(), ROWS[row]  # a kernel that hangs would keep its name to itself
            assert same_bits(captured, eager), ROWS[row]


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize(
    "dtype", (torch.float16, torch.bfloat16, torch.float32), ids=lambda d: str(d).removeprefix("torch.")
)
@pytest.mark.parametrize("name", ("3x3", "wgrad_72_to_136", "wgrad_five_taps_dilated"))
def test_no_row_of_wgrad_lets_an_input_that_is_not_finite_reach_weights_that_do_not_meet_it(
    name: str, dtype: torch.dtype, value: float, cuda: str
) -> None:
    """Rows may multiply what lies beyond the ends of grad_output's lines, as zeros, with it."""
    case = BY_NAME[name]
    x, w, b = case.tensors(cuda, dtype, "nhwc")
    go = case.grad_output(cuda, dtype, "nhwc")
    for channel, (h, column) in enumerate(((0, 0), (0, case.W - 1), (case.H // 2, 1), (case.H - 1, case.W - 2))):
        x[-1, channel, h, column] = value
    meets = ~of_tensors(case, x, w, None, go).grad_weight.isfinite()
    sms, capability = machine()
    tf32 = dtype == torch.float32
    run = functools.partial(call("wgrad", case, x, w, b, go), stride=w.stride(), allow_tf32=tf32)
    tensors = problem("wgrad", x, w, go, run())
    align = alignment(*tensors)
    rows = candidates(plan("wgrad", case, *tensors, align=align, sm_count=sms, capability=capability, allow_tf32=tf32))
    wrong = [ROWS[row] for row in rows if not torch.equal(~run(row=row).isfinite().cpu(), meets)]
    assert not wrong, ", ".join(wrong)


# Each family has rows for some of them; whole tiles of wgrad and parts, with and without padding, stride, dilation.
INFINITE = (
    "3x3",
    "1x1_padded",
    "planes_24_to_144",
    "patches_4x4_stride4",
    "patches_14x14_left_over",
    "patches_1x20_by_9_padded",
    "stem_3x3_stride2",
    "few_filters_3x3",
    "four_pads_grouped_dilated",
    "stride2",
    "stride2_dilation2",
    "stride_larger_than_kernel",
    "dilation_rows_in_padding",
    "C24_K96_stride2",
    "C72_K264_1x3",
    "wgrad_72_to_136",
    "wgrad_five_taps_dilated",
    "wgrad_many_filters",
    "wgrad_planes_72_to_80",
    "wgrad_32_channels",
    "two_tiles_of_filters_stride2",
    "planes_3x3_50_to_90",
    "groups2_of_30_and_21",
    "groups16_of_4_several_tiles",
    "groups4_of_16_stride2",
    "groups8_of_2_and_4_5x5",
    "groups6_of_16_and_8_1x1_stride2",
    "groups8_of_8_28_columns",
    "groups3_of_40_five_images",
    "groups2_of_64_and_72_stride2",
    "depthwise_5x5",
    "depthwise_3x3_stride2",
    "depthwise_dilated_2",
    "depthwise_13x13_stride2",
    "depthwise_11x11_images",
    "depthwise_planes",
    "depthwise_5x5_multiplier2",
    "depthwise_7x7_multiplier2_of_8",
    "C132_K20_dilated",
    "C3_K64_11x11_stride4",
    "C37_K70_few_pixels",
    "C12_K20_1x1_planes",
    "1x1_lines_C36_K522_in_turns",
    "groups4_of_26_and_14_1x1",
    "depthwise_3x3_flat",
    "depthwise_3x3_runs",
    "depthwise_3x3_stride2_runs",
)


def multiplies_padding(row: str, op: str, operand: str) -> bool:
    """May an infinity of this operand make NaN with the zeros around the other one, as cuDNN's and ATen's kernels do?

    docs/design.md, "Infinities and NaN". The results concerned are those of the same filter, for dgrad channel.
    """
    if op != "wgrad":
        return operand == "w"
    return operand == "y" and (row.startswith(("igemm_", "simt_", "stem_")) or row.endswith(("_im2col", "_lean")))


@pytest.mark.parametrize("op,operand", [(op, operand) for op in OPS for operand in "xwy" if operand != RESULT[op]])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", INFINITE)
def test_an_infinity_reaches_all_results_that_meet_it_and_no_others(
    name: str, dtype: torch.dtype, op: str, operand: str, cuda: str
) -> None:
    """Rows multiply with zeros: around images, beyond the ends of runs and tiles, between groups and taps."""
    case = BY_NAME[name]
    names, counts = [], []
    for layout, tf32 in itertools.product(("nchw", "nhwc"), modes(dtype)):
        x, w, b = case.tensors(cuda, dtype, layout)
        go = case.grad_output(cuda, dtype, layout)
        operands = {"x": x, "w": w, "y": go}
        changed = operands[operand]
        rows, columns = changed.shape[2:]
        for i, (h, column) in enumerate(((0, 0), (0, -1), (rows // 2, 0), (-1, columns // 2), (-1, -1))):
            changed[-1 - i % changed.shape[0], i % changed.shape[1], h, column] = float("inf")
        # How many infinities each result meets.
        ones = [(t.isinf() if t is changed else torch.ones_like(t)).double() for t in operands.values()]
        with without_cudnn():
            r = result(case, ones[0], ones[1], None, ones[2])
        meets = {"fprop": r.output, "dgrad": r.grad_input, "wgrad": r.grad_weight}[op].round()
        # Results whose filter, for dgrad channel, has one at all.
        if op == "wgrad":
            of_filter = go.isinf().any((0, 2, 3)).view(-1, 1, 1, 1)
        elif op == "fprop":
            of_filter = w.isinf().any((1, 2, 3)).view(1, -1, 1, 1)
        else:
            of_filter = w.isinf().unflatten(0, (case.groups, -1)).any((1, 3, 4)).view(1, -1, 1, 1)
        sms, capability = machine()
        for where in destinations(op, w):
            run = functools.partial(call(op, case, x, w, b, go), allow_tf32=tf32, **where)
            tensors = problem(op, x, w, go, run())
            planned = plan(
                op, case, *tensors, align=alignment(*tensors), allow_tf32=tf32, sm_count=sms, capability=capability
            )
            for row in rows_of(planned, tf32):
                found = run(row=row)
                loose = multiplies_padding(ROWS[row], op, operand)
                spread = (~found.isfinite() & ~(of_filter if loose else meets > 0)).sum()
                dropped = (found.isfinite() & (meets > 0)).sum()
                if not loose:
                    dropped = dropped + (~found.isinf() & (meets == 1)).sum()
                names.append(f"{ROWS[row]} {layout}{' TF32' if tf32 else ''}")
                counts.append(torch.stack([spread, dropped]))
    # One wait for the GPU, which other processes of the run share.
    wrong = [
        f"{row}: {spread} spread, {dropped} dropped"
        for row, (spread, dropped) in zip(names, torch.stack(counts).tolist(), strict=True)
        if spread or dropped
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("op", ("fprop", "dgrad"))
@pytest.mark.parametrize("channels", (48, 144))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=lambda d: str(d).removeprefix("torch."))
def test_an_infinity_changes_no_bit_of_other_channels(dtype: torch.dtype, channels: int, op: str, cuda: str) -> None:
    """toeplitz: blocks whose sums are NaN sum anew; the last slice of channels shares some with the one before."""
    case = Case("shared", 32, channels, 28, 28, channels, 7, 7, padding=(3, 3), groups=channels)
    x, w, b = case.tensors(cuda, dtype, "nhwc")
    go = case.grad_output(cuda, dtype, "nhwc")
    sms, capability = machine()
    run = call(op, case, x, w, b, go)
    tensors = problem(op, x, w, go, run())
    planned = plan(op, case, *tensors, align=alignment(*tensors), sm_count=sms, capability=capability)
    rows = [row for row in candidates(planned) if ROWS[row].startswith("toeplitz_")]
    if not rows:
        needs_sm90()
    before = [run(row=row) for row in rows]
    spoilt = channels - 8
    (x if op == "fprop" else go)[0, spoilt, 5, 5] = float("inf")
    others = torch.arange(channels, device=cuda) != spoilt
    for row, made in zip(rows, before, strict=True):
        assert not run(row=row)[:, spoilt].isfinite().all(), ROWS[row]
        assert same_bits(made[:, others], run(row=row)[:, others]), ROWS[row]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    "name", ("stem_3x3_stride2", "stem_11x11_stride4", "stem_one_channel_5x20", "few_filters_5x4_four_pads")
)
def test_a_stem_row_spreads_what_is_not_finite_to_what_meets_it_alone(
    name: str, dtype: torch.dtype, value: float, op: str, cuda: str
) -> None:
    """Rows multiply ends of runs, pixels beyond a row's end and taps that a phase does not meet with zeros."""
    case = BY_NAME[name]
    for layout in ("nchw", "nhwc"):
        x, w, b = case.tensors(cuda, dtype, layout)
        go = case.grad_output(cuda, dtype, layout)
        changed = go if op == "dgrad" else x
        for channel, (h, column) in enumerate(((0, 0), (0, -1), (changed.shape[2] // 2, 3), (-1, -2))):
            changed[-1, channel % changed.shape[1], h, column] = value
        r = of_tensors(case, x, w, b, go)
        meets = ~{"fprop": r.output, "dgrad": r.grad_input, "wgrad": r.grad_weight}[op].isfinite()
        sms, capability = machine()
        run = call(op, case, x, w, b, go)
        tensors = problem(op, x, w, go, run())
        planned = plan(op, case, *tensors, align=alignment(*tensors), sm_count=sms, capability=capability)
        rows = [row for row in candidates(planned) if ROWS[row].startswith("stem_")]
        assert rows
        wrong = [ROWS[row] for row in rows if not torch.equal(~run(row=row).isfinite().cpu(), meets.cpu())]
        assert not wrong, ", ".join(wrong)


@pytest.mark.parametrize("padding", (1, 0))
@pytest.mark.parametrize("pixels", (232, 248, 256, 300))
@pytest.mark.parametrize("row", [name for name in ROWS if re.match(r"tma_(fprop|dgrad)_.*_256x64_(im2col|halo)", name)])
def test_tiles_have_as_many_pixels_as_fill_a_round(row: str, pixels: int, padding: int, cuda: str) -> None:
    """tma_swap.cuh: tiles of 232, 248 or 256 pixels, one or two a block; rows share a column if they are padded."""
    _, op, name, *_ = row.split("_")
    dtype, tf32 = DTYPE_NAMES[name], name == "f32"
    columns = 62 + (2 if padding == 0 else 1)  # of halo; im2col has fewer, and the last blocks nothing
    size = (16, 132 * pixels // columns, 62, 24) if op == "fprop" else (24, 132 * pixels // columns, 62, 16)
    C, H, W, K = size
    case = Case("one_round", 1, C, H + 2 - 2 * padding, W + 2 - 2 * padding, K, 3, 3, padding=(padding, padding))
    x, w, b = case.tensors(cuda, dtype, "nhwc")
    go = case.grad_output(cuda, dtype, "nhwc")
    if ROWS.index(row) not in candidates(plan(op, case, x, w, go, allow_tf32=tf32, capability=machine()[1])):
        needs_sm90()
    run = functools.partial(call(op, case, x, w, b, go), row=ROWS.index(row), allow_tf32=tf32)
    r, made = exact(case, dtype, device=cuda), run()
    allowed = tolerance(dtype, case.reduction(op)) + (2.0**-10 if tf32 else 0)
    assert error(made, r.output if op == "fprop" else r.grad_input) <= allowed
    assert same_bits(made, run())


SHORT_TILES = (
    Case("last_tile", 33, 24, 180, 182, 56, 3, 3, (2, 2), padding=(1, 1)),
    Case("rows_in_turn", 12, 20, 171, 300, 40, 3, 3, (1, 2), padding=(1, 1)),
)


@pytest.mark.parametrize("case", SHORT_TILES, ids=str)
def test_short_tiles_of_tf32_are_exact(case: Case, cuda: str) -> None:
    """core/tma_tf32.h: tiles of 128 pixels where 256x64 waits for memory."""
    draw = torch.Generator(cuda).manual_seed(0)
    x, w = (
        torch.randint(-2, 3, size, generator=draw, device=cuda).float().to(memory_format=torch.channels_last)
        for size in (case.input_size, case.weight_size)
    )
    b = torch.randint(-2, 3, (case.K,), generator=draw, device=cuda).float()
    row, go = ROWS.index("tma_fprop_f32_256x64_halo"), torch.empty(case.output_size, device=cuda)
    go = go.to(memory_format=torch.channels_last)
    if row not in candidates(plan("fprop", case, x, w, go, allow_tf32=True, capability=machine()[1])):
        needs_sm90()
    run = functools.partial(call("fprop", case, x, w, b, go), row=row, allow_tf32=True)
    made = run()
    assert torch.equal(made, torch.nn.functional.conv2d(x.double(), w.double(), b.double(), *case.args[:2]).float())
    assert same_bits(made, run())


@pytest.mark.parametrize("row", ("tma_dgrad_f16_256x128_halo", "tma_dgrad_bf16_256x128_halo"))
def test_phases_of_tiles_that_fill_no_round_are_all_taken(row: str, cuda: str) -> None:
    """tma_classes.cuh: the phases of 36 tiles, more than a round of 132 blocks; the second is taken in reverse."""
    dtype = DTYPE_NAMES[row.split("_")[2]]
    case = Case("phases", 1, 1032, 40, 90, 8, 3, 3, stride=(2, 2), padding=(1, 1))
    x, w, b = case.tensors(cuda, dtype, "nhwc")
    go = case.grad_output(cuda, dtype, "nhwc")
    if ROWS.index(row) not in candidates(plan("dgrad", case, x, w, go, capability=machine()[1])):
        needs_sm90()
    run = functools.partial(call("dgrad", case, x, w, b, go), row=ROWS.index(row))
    made = run()
    assert error(made, exact(case, dtype, device=cuda).grad_input) <= tolerance(dtype, case.reduction("dgrad"))
    assert same_bits(made, run())


HELD = [
    ("dgrad", Case("two", 3, 72, 30, 57, 72, 3, 3, stride=(2, 2), padding=(1, 1))),
    ("dgrad", Case("no_padding", 2, 136, 33, 40, 128, 3, 3, stride=(2, 2))),
    ("dgrad", Case("rows_of_padding", 2, 40, 14, 9, 104, 3, 3, stride=(2, 2), padding=(2, 1))),
    ("dgrad", Case("rounds", 90, 192, 56, 56, 24, 3, 3, stride=(2, 2), padding=(1, 1))),
    ("dgrad", Case("wide_row", 1, 64, 3, 300, 128, 3, 3, stride=(2, 2), padding=(0, 1))),
    ("fprop", Case("both_meet_the_pixels", 40, 64, 56, 57, 136, 3, 3, padding=(1, 1))),
    ("fprop", Case("both_have_the_filters", 30, 64, 31, 56, 40, 3, 3, padding=(2, 0))),
    ("fprop", Case("each_has_channels", 90, 128, 28, 28, 40, 3, 3, padding=(1, 1))),
    ("fprop", Case("a_stride", 7, 64, 56, 57, 72, 3, 3, stride=(2, 2), padding=(1, 0))),
    ("fprop", Case("a_stride_of_many", 30, 40, 56, 29, 200, 3, 3, stride=(2, 2), padding=(0, 3))),
    ("fprop", Case("in_part_half_a_line", 40, 96, 57, 56, 136, 3, 3, padding=(1, 1))),
    ("fprop", Case("in_part", 40, 120, 32, 33, 200, 3, 3, padding=(0, 1))),
    ("fprop", Case("in_part_a_stride", 60, 128, 57, 56, 136, 3, 3, stride=(2, 2), padding=(1, 0))),
    ("fprop", Case("in_part_half_a_line_a_stride", 60, 72, 56, 57, 96, 3, 3, stride=(2, 2), padding=(1, 1))),
    ("fprop", Case("in_part_one_small_tile", 3, 128, 7, 7, 136, 3, 3, padding=(1, 1))),
    ("fprop", Case("in_part_one_small_tile_a_stride", 3, 128, 10, 10, 136, 3, 3, stride=(2, 2), padding=(1, 1))),
    ("dgrad", Case("in_part_one_small_tile", 3, 136, 7, 7, 128, 3, 3, padding=(1, 1))),
    ("dgrad", Case("in_part", 40, 136, 32, 33, 128, 3, 3, padding=(1, 1))),
    ("dgrad", Case("in_part_half_a_line", 40, 136, 57, 56, 80, 3, 3, padding=(2, 0))),
    ("dgrad", Case("both_meet_the_pixels", 40, 136, 56, 57, 64, 3, 3, padding=(1, 1))),
    ("dgrad", Case("both_have_the_filters", 30, 40, 31, 56, 64, 3, 3, padding=(2, 0))),
    ("dgrad", Case("each_has_channels", 90, 40, 28, 28, 128, 3, 3, padding=(1, 1))),
]


@pytest.mark.parametrize("op, case", HELD, ids=str)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("f16", "bf16"))
def test_filters_that_stay_in_registers_meet_every_tile(op: str, case: Case, dtype: torch.dtype, cuda: str) -> None:
    """tma_held*.cuh: many tiles a block, parts of the channels, tiles that end beyond the image."""
    row = f"tma_{op}_{'f16' if dtype == torch.float16 else 'bf16'}_256x96_halo"
    x, w, b = case.tensors(cuda, dtype, "nhwc")
    go = case.grad_output(cuda, dtype, "nhwc")
    if ROWS.index(row) not in candidates(plan(op, case, x, w, go, capability=machine()[1])):
        needs_sm90()
    run = functools.partial(call(op, case, x, w, b, go), row=ROWS.index(row))
    made, r = run(), exact(case, dtype, device=cuda)
    assert error(made, r.output if op == "fprop" else r.grad_input) <= tolerance(dtype, case.reduction(op))
    assert same_bits(made, run())


HELD_TF32 = [
    Case("both_have_the_filters", 40, 32, 31, 56, 40, 3, 3, padding=(2, 0)),
    Case("both_meet_the_pixels", 40, 32, 56, 57, 200, 3, 3, padding=(1, 1)),
    Case("a_stride", 40, 20, 56, 57, 64, 3, 3, stride=(2, 2), padding=(1, 0)),
    Case("a_stride_of_many", 40, 28, 56, 29, 136, 3, 3, stride=(2, 2), padding=(0, 3)),
]


@pytest.mark.parametrize("case", HELD_TF32, ids=str)
def test_filters_that_stay_in_registers_meet_every_tile_in_tf32(case: Case, cuda: str) -> None:
    row = ROWS.index("tma_fprop_f32_256x32_halo")
    x, w, b = case.tensors(cuda, torch.float32, "nhwc")
    x, w = (t.bfloat16().float() for t in (x, w))  # which TF32 does not round
    go = case.grad_output(cuda, torch.float32, "nhwc")
    if row not in candidates(plan("fprop", case, x, w, go, allow_tf32=True, capability=machine()[1])):
        needs_sm90()
    run = functools.partial(call("fprop", case, x, w, b, go), row=row, allow_tf32=True)
    made = run()
    expected = torch.nn.functional.conv2d(
        x.double(), w.double(), b if b is None else b.double(), case.stride, case.padding
    )
    assert (made - expected).norm() <= 1e-6 * expected.norm()
    assert same_bits(made, run())


LAGGING_TILES = (  # tma_lag.cuh: two tiles and more for each warpgroup, and one more for the first
    ("fprop", "128x256", Case("one_tile_of_filters", 40, 72, 29, 30, 200, 3, 3, padding=(1, 1))),
    ("fprop", "128x256", Case("strided", 67, 264, 33, 35, 520, 3, 3, (2, 2), padding=(1, 1))),
    ("fprop", "128x256", Case("1x1", 23, 512, 28, 28, 768, 1, 1)),
    ("dgrad", "128x256", Case("five_taps", 40, 256, 29, 30, 40, 5, 3, padding=(2, 1))),
    ("dgrad", "128x256", Case("1x1", 22, 320, 28, 28, 456, 1, 1)),
    # Some blocks have several tiles of filters: four of 132 two each, two of 132 three and two, of a single tile each.
    ("fprop", "128x256", Case("two_each", 8, 392, 28, 28, 2000, 1, 1)),
    ("fprop", "128x256", Case("three_and_two", 1, 392, 115, 116, 1280, 1, 1)),
    ("fprop", "128x256", Case("strided_1x1", 67, 520, 21, 21, 1160, 1, 1, (2, 2))),
    ("dgrad", "128x256", Case("three_and_two", 1, 1280, 115, 116, 392, 1, 1)),
    # TF32 alone, where the warpgroups of a block take turns
    ("fprop", "128x128", Case("turns", 131, 136, 46, 43, 200, 3, 3, (2, 2), padding=(1, 1))),
)


@pytest.mark.parametrize(
    "op, tile, case, dtype",
    [
        (op, tile, case, dtype)
        for op, tile, case in LAGGING_TILES
        for dtype in ("f16", "bf16", "f32")
        if (dtype == "f32" or case.name != "turns") and (dtype != "f32" or op == "fprop")  # dgrad: in 16 bits alone
    ],
    ids=str,
)
def test_tiles_of_warpgroups_that_are_some_steps_apart_are_exact(
    op: str, tile: str, case: Case, dtype: str, cuda: str
) -> None:
    draw = torch.Generator(cuda).manual_seed(0)
    x, w, go = (
        torch.randint(-2, 3, size, generator=draw, device=cuda)
        .to(DTYPE_NAMES[dtype])
        .to(memory_format=torch.channels_last)
        for size in (case.input_size, case.weight_size, case.output_size)
    )
    b = torch.randint(-2, 3, (case.K,), generator=draw, device=cuda).to(x.dtype) if op == "fprop" else None
    row, tf32 = ROWS.index(f"tma_{op}_{dtype}_{tile}_im2col"), dtype == "f32"
    if row not in candidates(plan(op, case, x, w, go, allow_tf32=tf32, capability=machine()[1])):
        needs_sm90()
    run = functools.partial(call(op, case, x, w, b, go), row=row, allow_tf32=tf32)
    made = run()
    if b is None:
        expected = torch.nn.grad.conv2d_input(
            case.input_size, w.double(), go.double(), case.stride, case.padding, case.dilation
        )
    else:
        expected = torch.nn.functional.conv2d(
            x.double(), w.double(), b.double(), case.stride, case.padding, case.dilation
        )
    assert torch.equal(made, expected.to(x.dtype))
    assert all(same_bits(made, run()) for _ in range(5))


LAGGING = (  # tma_wgrad.cuh: the warpgroups of a block have as many tiles, one more, and runs of half a line
    Case("as_many", 2, 384, 16, 16, 2048, 3, 3, padding=(1, 1), bias=False),
    Case("one_more", 4, 1288, 15, 13, 1304, 3, 3, (2, 1), padding=(1, 1), bias=False),
    Case("some_without", 3, 192, 13, 15, 4096, 3, 3, padding=(2, 2), dilation=(2, 2), bias=False),
)


@pytest.mark.parametrize("case", LAGGING, ids=str)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("f16", "bf16"))
def test_weight_gradients_of_few_pixels_and_many_weights_are_exact(case: Case, dtype: torch.dtype, cuda: str) -> None:
    """Warpgroups half a tile apart: a stage has pixels of one tile for the first, of another one for the second."""
    draw = torch.Generator(cuda).manual_seed(0)
    x, w, go = (
        torch.randint(-2, 3, size, generator=draw, device=cuda).to(dtype).to(memory_format=torch.channels_last)
        for size in (case.input_size, case.weight_size, case.output_size)
    )
    row = ROWS.index("tma_wgrad_f16_128x256_im2col" if dtype is torch.float16 else "tma_wgrad_bf16_128x256_im2col")
    if row not in candidates(plan("wgrad", case, x, w, go, capability=machine()[1])):
        needs_sm90()
    run = functools.partial(call("wgrad", case, x, w, None, go), row=row, stride=w.stride())
    made = run()
    expected = torch.nn.grad.conv2d_weight(
        x.double(), case.weight_size, go.double(), case.stride, case.padding, case.dilation
    )
    assert torch.equal(made, expected.to(dtype))
    assert all(same_bits(made, run()) for _ in range(5))


@pytest.mark.parametrize("allow_tf32", (False, True), ids=("strict", "tf32"))
@pytest.mark.parametrize("case", (Case("1", 1, 8, 1080, 1920, 8, 1, 1), Case("8", 8, 16, 640, 640, 16, 1, 1)), ids=str)
def test_weight_gradients_of_large_images_meet_the_last_pixels(case: Case, allow_tf32: bool, cuda: str) -> None:
    """pixels_few_wgrad.cuh took the last 16 pixels of such images for the next image's."""
    draw = torch.Generator(cuda).manual_seed(0)
    x, go = (torch.zeros(size, device=cuda) for size in (case.input_size, case.output_size))
    for t in (x, go):
        t.flatten(2)[..., -16:] = torch.randint(-2, 3, (*t.shape[:2], 16), generator=draw, device=cuda).float()
    w = torch.zeros(case.weight_size, device=cuda)
    row = ROWS.index("pixels_wgrad_f32_16x32_nchw")
    if row not in candidates(plan("wgrad", case, x, w, go, allow_tf32=allow_tf32, capability=machine()[1])):
        needs_sm90()
    made = call("wgrad", case, x, w, None, go)(row=row, allow_tf32=allow_tf32)
    last_x, last_go = (t.flatten(2)[..., -16:].double() for t in (x, go))
    assert torch.equal(made.flatten(1).double(), torch.einsum("nkp,ncp->kc", last_go, last_x))


@pytest.mark.parametrize("size", (7, 14, 28))
@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_filters_that_are_one_expanded_filter_are_right(op: str, size: int, cuda: str) -> None:
    """The copy engine's tensors have no stride of 0."""
    case = Case("expanded", 32, 256, size, size, 512, 1, 1)
    draw = torch.Generator(cuda).manual_seed(0)
    x, w, go = (
        torch.randint(-1, 2, shape, generator=draw, device=cuda).half()
        for shape in (case.input_size, (1, 256, 1, 1), case.output_size)
    )
    w = w.expand(case.weight_size)
    made = call(op, case, x, w, None, go)(row=-1)
    equation, read = ("kc,ncp->nkp", x) if op == "fprop" else ("kc,nkp->ncp", go)
    assert torch.equal(
        made.flatten(2).double(), torch.einsum(equation, w.flatten(1).double(), read.flatten(2).double())
    )


@pytest.mark.parametrize("row", [name for name in ROWS if name.startswith("tma_wgrad_f32_")])
def test_tf32_weight_gradients_of_many_pixels_are_as_exact_as_those_of_few(row: str, cuda: str) -> None:
    """The tensor cores' sums lose their lowest bits, more of them the longer the chain of pixels."""
    N, size = (8, 78) if row.endswith("_lean") else (20, 320)  # which takes no longer sums
    case = Case("many_pixels", N, 8, size, size, 8, 3, 3, padding=(1, 1))
    layout = torch.contiguous_format if row.endswith("_nchw") else torch.channels_last
    draw = torch.Generator(cuda).manual_seed(0)
    x, go = (
        torch.randn(size, generator=draw, device=cuda).bfloat16().float().to(memory_format=layout)
        for size in (case.input_size, case.output_size)
    )
    w = torch.empty(case.weight_size, device=cuda).to(memory_format=layout)
    sms, capability = machine()
    if ROWS.index(row) not in candidates(
        plan("wgrad", case, x, w, go, allow_tf32=True, sm_count=sms, capability=capability)
    ):
        needs_sm90()
    made = call("wgrad", case, x, w, None, go)(row=ROWS.index(row), allow_tf32=True, stride=w.stride())
    exact_made = torch.nn.grad.conv2d_weight(x.double(), case.weight_size, go.double(), padding=case.padding)
    assert (made - exact_made).norm() <= 2e-5 * exact_made.norm()


WINOGRAD_WGRAD = "tma_strict_wgrad_f32_2x2_any"  # of 32 channels and more


def filters_of(row: str, channels: int) -> int:
    return channels // 2 if row.endswith("_narrow") else channels  # which takes fewer filters than channels


@pytest.mark.parametrize("row", [name for name in ROWS if name.startswith("tma_strict_wgrad_")])
def test_strict_weight_gradients_of_many_pixels_are_as_exact_as_float32(row: str, cuda: str) -> None:
    """Three TF32 products, whose sums the tensor cores cut off: short ones, which float32 adds up."""
    n, channels = (3, 32) if row == WINOGRAD_WGRAD else (20, 8)
    case = Case("many_pixels", n, channels, 320, 320, filters_of(row, channels), 3, 3, padding=(1, 1))
    draw = torch.Generator(cuda).manual_seed(0)
    x, go = (
        torch.randn(size, generator=draw, device=cuda).to(memory_format=torch.channels_last)
        for size in (case.input_size, case.output_size)
    )
    w = torch.empty(case.weight_size, device=cuda).to(memory_format=torch.channels_last)
    if ROWS.index(row) not in candidates(plan("wgrad", case, x, w, go, capability=machine()[1])):
        needs_sm90()
    made = call("wgrad", case, x, w, None, go)(row=ROWS.index(row), stride=w.stride())
    exact_made = torch.nn.grad.conv2d_weight(x.double(), case.weight_size, go.double(), padding=1)
    assert (made - exact_made).norm() <= 5e-7 * exact_made.norm()


@pytest.mark.parametrize("row", [name for name in ROWS if name.startswith("tma_strict_wgrad_")])
def test_strict_weight_gradients_of_the_largest_floats_are_finite(row: str, cuda: str) -> None:
    """TF32 rounds these to infinity. (Winograd: an error is that of the largest product of a tile.)"""
    channels = 32 if row == WINOGRAD_WGRAD else 8
    case = Case("largest", 2, channels, 9, 9, filters_of(row, channels), 3, 3, padding=(1, 1))
    x, w, _ = case.tensors(cuda, torch.float32, "nhwc")
    go = case.grad_output(cuda, torch.float32, "nhwc") * 0.125
    x[0, 3, 4, 4] = torch.finfo(torch.float32).max
    if ROWS.index(row) not in candidates(plan("wgrad", case, x, w, go, capability=machine()[1])):
        needs_sm90()
    made = call("wgrad", case, x, w, None, go)(row=ROWS.index(row), stride=w.stride())
    exact_made = torch.nn.grad.conv2d_weight(x.double(), case.weight_size, go.double(), padding=1)
    if row == WINOGRAD_WGRAD:
        assert (made - exact_made).norm() <= 5e-7 * exact_made.norm()
    else:
        torch.testing.assert_close(made, exact_made.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("largest", (False, True))
@pytest.mark.parametrize("row", ("fprop_f32_32x64", "dgrad_f32_32x64", "wgrad_f32_16x64"))
def test_strict_sums_of_few_channels_a_group_are_as_exact_as_float32(row: str, largest: bool, cuda: str) -> None:
    """grouped_plain*.cuh: sums of tensor cores are short, and what TF32 rounds to infinity is made again."""
    op, row_index = row.split("_")[0], ROWS.index(f"grouped_{row}_nchw")
    case = Case("groups", 20, 32, 9 if largest else 40, 10 if largest else 40, 32, 3, 3, padding=(1, 1), groups=4)
    x, w, _ = case.tensors(cuda)
    go = case.grad_output(cuda)
    w, go = w * 0.125, go * 0.125
    if largest:
        (go if op == "dgrad" else x)[0, 3, 4, 4] = torch.finfo(torch.float32).max
    run = call(op, case, x, w, None, go)
    if row_index not in candidates(plan(op, case, *problem(op, x, w, go, run()), capability=machine()[1])):
        needs_sm90()
    made = run(row=row_index).cpu()
    truth = of_tensors(case, x.double(), w.double(), None, go.double())
    exact_made = {"fprop": truth.output, "dgrad": truth.grad_input, "wgrad": truth.grad_weight}[op]
    if largest:
        torch.testing.assert_close(made, exact_made.float(), rtol=1e-5, atol=1e-5)
    else:
        assert (made - exact_made).norm() <= 2.5e-7 * exact_made.norm()


@pytest.mark.parametrize("largest", (False, True))
@pytest.mark.parametrize("row", [name for name in ROWS if name.startswith("pixels_") and name.endswith("_pointwise")])
def test_strict_1x1_layers_in_place_are_as_exact_as_float32(row: str, largest: bool, cuda: str) -> None:
    """pixels_strict*.cuh, in the layouts that the row takes: likewise."""
    op, row_index, ran = row.split("_")[1], ROWS.index(row), 0
    case = Case("pixels", 20, 36, 8 if largest else 40, 10 if largest else 40, 72, 1, 1)
    for layout in ("nchw", "nhwc"):
        x, w, _ = case.tensors(cuda, torch.float32, layout)
        go = case.grad_output(cuda, torch.float32, layout)
        w, go = w * 0.125, go * 0.125
        if largest:
            (go if op == "dgrad" else x)[0, 3, 4, 4] = torch.finfo(torch.float32).max
        run = call(op, case, x, w, None, go)
        if row_index not in candidates(plan(op, case, *problem(op, x, w, go, run()), capability=machine()[1])):
            continue
        made, ran = run(row=row_index).cpu(), ran + 1
        truth = of_tensors(case, x.double(), w.double(), None, go.double())
        exact_made = {"fprop": truth.output, "dgrad": truth.grad_input, "wgrad": truth.grad_weight}[op]
        if largest:
            torch.testing.assert_close(made, exact_made.float(), rtol=1e-5, atol=1e-5)
        else:
            assert (made - exact_made).norm() <= 2.5e-7 * exact_made.norm()
    if ran == 0:
        needs_sm90()


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("op", ("fprop", "dgrad"))
def test_strict_sums_that_pass_the_largest_float_on_the_way_alone_depend_on_their_order(
    op: str, layout: str, cuda: str
) -> None:
    """Two products that are too large cancel in float64. In float32 they do in some orders of a sum, and in others
    are an infinity, or a NaN beside one; all other results are what float64's are."""
    few, many = (3, 64) if op == "fprop" else (64, 3)
    case = Case("largest", 2, few, 14, 40, many, 3, 3, padding=(3, 0), dilation=(2, 1))
    x, w, _ = case.tensors(cuda, torch.float32, layout)
    go = case.grad_output(cuda, torch.float32, layout)
    changed = x if op == "fprop" else go
    for value, at in ((3.4e38, (0, 2, 2, 15)), (3.4e38, (0, 0, 4, 14)), (float("inf"), (1, 2, 5, 15)),
                      (3.4e38, (1, 1, 9, 14))):  # fmt: skip
        changed[at] = value

    def of(a: Tensor, b: Tensor) -> Tensor:
        with without_cudnn():
            if op == "fprop":
                return torch.nn.functional.conv2d(a, b, None, case.stride, case.padding, case.dilation)
            return torch.nn.grad.conv2d_input(case.input_size, b, a, case.stride, case.padding, case.dilation)

    true = of(changed.double(), w.double()).float()
    finite = changed.double().nan_to_num(0, posinf=0)
    certain = of(finite.abs(), w.double().abs()) <= torch.finfo(torch.float32).max / 2
    meets = of(changed.isinf().double(), torch.ones_like(w).double()) > 0.5
    run = call(op, case, x, w, None, go)
    wrong = []
    for row in candidates(plan(op, case, *problem(op, x, w, go, run()), capability=machine()[1])):
        made = run(row=row)
        same = torch.isclose(made, true, rtol=1e-5, atol=1e-3, equal_nan=True)
        if not bool(same[certain].all()) or bool(made[meets].isfinite().any()):
            wrong.append(ROWS[row])
    assert not wrong, ", ".join(wrong)


@pytest.mark.alone
@pytest.mark.parametrize("operand", ("x", "w", "y"))
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("groups", (1, 4, 64))
def test_rows_of_a_tensor_that_lie_far_apart_are_reached(groups: int, op: str, operand: str, cuda: str) -> None:
    """Steps beyond 2^31 elements: no kernel that counts in 32 bits may be chosen."""
    if operand == RESULT[op]:
        pytest.skip("the op lays out its result")
    step = 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 6 * step:
        pytest.skip("needs 12 GiB of memory")
    case = Case("far", 2, 64, 3, 16, 64, 3, 3, padding=(1, 1), groups=groups)
    for layout in ("nchw", "nhwc"):
        x, w, b = case.tensors(cuda, torch.float16, layout, integers=True)
        go = case.grad_output(cuda, torch.float16, layout, integers=True)
        operands = {"x": x, "w": w, "y": go}
        near = operands[operand]
        n, c, rows, columns = near.shape
        strides = (c * columns, 1, step, c) if layout == "nhwc" else (c * columns, columns, step, 1)
        far = torch.empty((rows - 1) * step + n * c * columns, dtype=near.dtype, device=cuda)
        operands[operand] = far.as_strided(near.shape, strides).copy_(near)
        keywords = {"stride": torch.empty_like(w).stride()} if op == "wgrad" else {}
        wanted = call(op, case, x, w, b, go)(**keywords)
        x, w, go = operands.values()
        run = functools.partial(call(op, case, x, w, b, go), **keywords)
        sms, capability = machine()
        tensors = problem(op, x, w, go, wanted)
        planned = plan(op, case, *tensors, align=alignment(*tensors), sm_count=sms, capability=capability)
        wrong = [ROWS[row] for row in candidates(planned) if not torch.equal(run(row=row), wanted)]
        assert not wrong, ", ".join(wrong)
        del far, operands, x, w, go, run, tensors


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size, pixel", ((3, 99), (3, 100), (7, 100)))
def test_phases_of_a_dilation_may_be_less_aligned_than_the_tensors(size: int, pixel: int, op: str, cuda: str) -> None:
    """Every other pixel begins on a vector, and those between do not."""
    dilation = 2 if size == 3 else 4
    pad = size // 2 * dilation
    case = Case("phases", 2, 96, 26, 24, 96, size, size, padding=(pad, pad), dilation=(dilation,) * 2, groups=96)
    x, w, _ = case.tensors(cuda, torch.bfloat16, "nhwc", integers=True)
    go = case.grad_output(cuda, torch.bfloat16, "nhwc", integers=True)
    wanted = call(op, case, x, w, None, go)()
    x, go = (
        torch.empty(t.shape[0], *t.shape[2:], pixel, dtype=t.dtype, device=cuda)[..., :96].permute(0, 3, 1, 2).copy_(t)
        for t in (x, go)
    )
    run = call(op, case, x, w, None, go)
    made = run()
    tensors = problem(op, x, w, go, made)
    sms, capability = machine()
    planned = plan(op, case, *tensors, align=alignment(*tensors), sm_count=sms, capability=capability)
    assert torch.equal(made, wanted)
    wrong = [ROWS[row] for row in candidates(planned) if not torch.equal(run(row=row), wanted)]
    assert not wrong, ", ".join(wrong)


# Tried in this order, then all others: small, and yet several steps of a kernel's loops.
ONCE = ("depthwise_3x3_four_pads", "depthwise_3x3_stride2", "depthwise_5x5", "depthwise_5x5_stride2", "depthwise_7x7",
        "depthwise_7x7_stride2")  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "_bf16_" in name else pytest.mark.once) for name in ROWS]
)
def test_every_row_runs_once(name: str, cuda: str) -> None:
    """The least that reaches every kernel, for the tools of compute-sanitizer that slow it down most.

    These leave out rows of bf16: the threads of a kernel do the same for both 16-bit types.
    """
    parts = name.split("_")
    op = next(part for part in parts if part in OPS)
    dtype = next(DTYPE_NAMES[part] for part in parts if part in DTYPE_NAMES)
    first = "one_tile_long_depth"
    if op == "wgrad":  # enough pixels for a second pass
        first = "one_tile_some_pixels" if parts[0] == "simt" else "many_pixels_C16_K8"
    elif "_256x64" in name:  # filters that go round their ring
        first = "two_tiles_of_filters"
    cases = [BY_NAME[n] for n in (first, *ONCE)]
    for case, layout, tf32 in itertools.product((*cases, *CASES, *WIDE_ROWS), ("nchw", "nhwc"), (False, True)):
        if (tf32 and dtype != torch.float32) or ROWS.index(name) not in candidates(
            plan(op, case, *meta(case, dtype, layout), allow_tf32=tf32, capability=machine()[1])
        ):
            continue
        x, w, b = case.tensors(cuda, dtype, layout)
        go = case.grad_output(cuda, dtype, layout)
        keywords: dict[str, object] = {"stride": w.stride()} if op == "wgrad" else {}
        try:
            result = call(op, case, x, w, b, go)(row=ROWS.index(name), allow_tf32=tf32, **keywords)
        except RuntimeError as e:  # float64 results are never channels_last
            if "a row that supports" not in str(e):
                raise
            continue
        allowed = tolerance(dtype, case.reduction(op)) + (2.0**-10 if tf32 else 0)
        assert error(result, expected(op, case, dtype, "cpu" if SANITIZING else cuda)) <= allowed
        return
    pytest.fail("no case of the list has a plain layout that the row supports")


@pytest.mark.parametrize("op", OPS)
def test_a_row_that_does_not_support_the_problem_is_refused(op: str, cuda: str) -> None:
    case = BY_NAME["3x3"]
    x, w, b = case.tensors(cuda)
    go = case.grad_output(cuda)
    sms, capability = machine()
    tensors = problem(op, x, w, go, call(op, case, x, w, b, go)())
    rows = candidates(plan(op, case, *tensors, align=alignment(*tensors), sm_count=sms, capability=capability))
    refused = [row for row in range(len(ROWS)) if row not in rows]
    assert refused, "no row is for another operator or dtype?"
    for row in refused:
        with pytest.raises(RuntimeError, match="row"):
            call(op, case, x, w, b, go)(row=row)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("row", (len(ROWS), -2, 2**31, 2**40, -(2**63), 2**63 - 1))
def test_a_row_outside_the_table_is_refused(op: str, row: int, device: str) -> None:
    case = BY_NAME["3x3"]
    x, w, b = case.tensors(device)
    with pytest.raises(RuntimeError, match="row"):
        call(op, case, x, w, b, case.grad_output(device))(row=row)


@pytest.mark.parametrize("op", OPS)
def test_the_cpu_refuses_a_row_of_the_table(op: str) -> None:
    """The rows are CUDA kernels; to ignore the argument would let a test believe that it ran one."""
    case = BY_NAME["3x3"]
    x, w, b = case.tensors("cpu")
    with pytest.raises(RuntimeError, match="row"):
        call(op, case, x, w, b, case.grad_output("cpu"))(row=0)


@pytest.mark.parametrize("op", OPS)
def test_minus_one_lets_the_planner_choose(op: str, device: str) -> None:
    case = BY_NAME["3x3"]
    x, w, b = case.tensors(device)
    run = call(op, case, x, w, b, case.grad_output(device))
    assert same_bits(run(row=-1), run())


def test_the_names_of_the_rows_differ() -> None:
    assert ROWS and len(set(ROWS)) == len(ROWS)


def rows_that_support(cases: Iterable[Case], kinds: Sequence[Kind]) -> frozenset[int]:
    """Asked of an H200; a row for another GPU would be asked of that."""
    found: set[int] = set()
    for case, (dtype, layout) in itertools.product(cases, kinds):
        for op, tf32 in itertools.product(OPS, modes(dtype)):
            found.update(candidates(plan(op, case, *meta(case, dtype, layout), allow_tf32=tf32)))
    return frozenset(found)


def test_every_row_supports_some_case() -> None:
    """Otherwise the list of cases does not test it."""
    tested = rows_that_support((*CASES, *WIDE_ROWS), tuple(itertools.product(DTYPES, ("nchw", "nhwc"))))
    without = [name for row, name in enumerate(ROWS) if row not in tested]
    assert not without, f"no case of the list: {', '.join(without)}"


def test_memcheck_reaches_every_row_but_those_of_bfloat16() -> None:
    """Those are float16's kernels with another type; most of them are reached too, by tensors at odd addresses."""
    kinds = ((torch.float16, "nchw"), (torch.float16, "nhwc"), (torch.float32, "nchw"), (torch.float32, "nhwc"))
    checked = rows_that_support((*(case for case in CASES if case.edge), *SANITIZED_WIDE_ROWS), kinds)
    checked |= rows_that_support((case for case in CASES if case.edge), ((torch.float64, "nchw"),))
    without = [name for row, name in enumerate(ROWS) if row not in checked and "_bf16_" not in name]
    assert not without, f"no case marked `edge`: {', '.join(without)}"


def test_the_layouts_of_these_tests_exist() -> None:
    assert set(ROW_LAYOUTS) <= set(LAYOUTS)
