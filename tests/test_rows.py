"""Every row of the table of kernels, on every case that it supports; not only the row that the planner would take."""

from __future__ import annotations

import functools

import conv2d_ext  # noqa: F401
import pytest
import torch
from calls import OPS, alignment, call, candidates, plan
from cases import BY_NAME, CASES, DTYPES, Case
from layouts import LAYOUTS
from reference import exact, same_bits, tolerance, error
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned")

ROWS = tuple(torch.ops.conv2d_ext.kernels())
# The layouts that a kernel may treat differently: both plain ones, both unaligned, one that has no unit stride.
ROW_LAYOUTS = ("nchw", "nhwc", "nhwc_weight", "unaligned", "unaligned_nhwc", "sliced_nhwc", "every_other")


@functools.lru_cache(maxsize=1)
def machine() -> tuple[int, int]:
    """(number of SMs, compute capability) as the operator sees them."""
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return p.multi_processor_count, 10 * p.major + p.minor


def output_like(op: str, case: Case, x: Tensor, w: Tensor, go: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x, w, y) with the operator's result, as the operator would allocate it, in its place."""
    made = call(op, case, x, w, None, go)()
    return {"fprop": (x, w, made), "dgrad": (made, w, go), "wgrad": (x, made, go)}[op]


def expected(op: str, case: Case, dtype: torch.dtype, integers: bool = False) -> Tensor:
    r = exact(case, dtype, integers=integers)
    return {"fprop": r.output, "dgrad": r.grad_input, "wgrad": r.grad_weight}[op]


def row_cases() -> list[object]:
    """Cases by dtype and layout; the edge cases in the plain layouts and main dtypes are the sanitizer's share."""
    parameters = []
    for case in CASES:
        for dtype in DTYPES:
            for layout in ROW_LAYOUTS:
                chosen = case.edge and (
                    (dtype in (torch.float16, torch.float32) and layout in ("nchw", "nhwc"))
                    or (dtype == torch.bfloat16 and layout in ("unaligned", "sliced_nhwc"))
                    or (dtype == torch.float64 and layout == "nchw")
                )
                name = f"{case}-{str(dtype).removeprefix('torch.')}-{layout}"
                marks = (pytest.mark.sanitizer,) if chosen else ()
                parameters.append(pytest.param(case, dtype, layout, id=name, marks=marks))
    return parameters


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case,dtype,layout", row_cases())
def test_every_row_that_supports_a_case_computes_it(
    op: str, case: Case, dtype: torch.dtype, layout: str, cuda: str
) -> None:
    x, w, b = case.tensors(cuda, dtype, layout)
    go = case.grad_output(cuda, dtype, layout)
    problem = output_like(op, case, x, w, go)
    sms, capability = machine()
    chosen = plan(op, case, *problem, align=alignment(*problem), sm_count=sms, capability=capability)
    rows = candidates(chosen)
    assert chosen[0] in rows
    run, true, allowed = call(op, case, x, w, b, go), expected(op, case, dtype), tolerance(dtype, case.reduction(op))
    wrong = []
    for row in rows:
        first = run(kernel=row)
        found = error(first, true)
        if found > allowed:
            wrong.append(f"{ROWS[row]}: error {found:.3g}, allowed {allowed:.3g}")
        elif not same_bits(first, run(kernel=row)):
            wrong.append(f"{ROWS[row]}: two runs differ")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_row_is_exact_on_small_integers(
    case: Case, dtype: torch.dtype, layout: str, op: str, cuda: str
) -> None:
    x, w, b = case.tensors(cuda, dtype, layout, integers=True)
    go = case.grad_output(cuda, dtype, layout, integers=True)
    problem = output_like(op, case, x, w, go)
    sms, capability = machine()
    rows = candidates(plan(op, case, *problem, align=alignment(*problem), sm_count=sms, capability=capability))
    run, true = call(op, case, x, w, b, go), expected(op, case, dtype, integers=True).to(dtype)
    wrong = [ROWS[row] for row in rows if not torch.equal(run(kernel=row).cpu(), true)]
    assert not wrong, f"not exact: {', '.join(wrong)}"


@pytest.mark.parametrize("op", OPS)
def test_a_row_that_does_not_support_the_problem_is_refused(op: str, cuda: str) -> None:
    case = BY_NAME["3x3"]
    x, w, b = case.tensors(cuda)
    go = case.grad_output(cuda)
    sms, capability = machine()
    problem = output_like(op, case, x, w, go)
    rows = candidates(plan(op, case, *problem, align=alignment(*problem), sm_count=sms, capability=capability))
    refused = [row for row in range(len(ROWS)) if row not in rows]
    assert refused, "no row is for another operator or dtype?"
    for row in refused:
        with pytest.raises(RuntimeError, match="kernel"):
            call(op, case, x, w, b, go)(kernel=row)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kernel", (len(ROWS), -2, 2**31, 2**40, -(2**63), 2**63 - 1))
def test_a_row_outside_the_table_is_refused(op: str, kernel: int, device: str) -> None:
    case = BY_NAME["3x3"]
    x, w, b = case.tensors(device)
    with pytest.raises(RuntimeError, match="kernel"):
        call(op, case, x, w, b, case.grad_output(device))(kernel=kernel)


@pytest.mark.parametrize("op", OPS)
def test_the_cpu_refuses_a_row_of_the_table(op: str) -> None:
    """The rows are CUDA kernels; to ignore the argument would let a test believe that it ran one."""
    case = BY_NAME["3x3"]
    x, w, b = case.tensors("cpu")
    with pytest.raises(RuntimeError, match="kernel"):
        call(op, case, x, w, b, case.grad_output("cpu"))(kernel=0)


@pytest.mark.parametrize("op", OPS)
def test_minus_one_lets_the_planner_choose(op: str, device: str) -> None:
    case = BY_NAME["3x3"]
    x, w, b = case.tensors(device)
    run = call(op, case, x, w, b, case.grad_output(device))
    assert same_bits(run(kernel=-1), run())


def test_the_names_of_the_rows_differ() -> None:
    assert ROWS and len(set(ROWS)) == len(ROWS)


@pytest.mark.parametrize("row", range(len(ROWS)), ids=ROWS)
def test_every_row_supports_some_case(row: int) -> None:
    """Otherwise the list of cases does not test it. Asked of an H200; a row for another GPU would be asked of that."""
    for case in CASES:
        for dtype in DTYPES:
            for layout in ("nchw", "nhwc"):
                x, w, _ = case.tensors("cpu", dtype, layout)
                y = case.grad_output("cpu", dtype, layout)
                for op in OPS:
                    if row in candidates(plan(op, case, x, w, y)):
                        return
    pytest.fail(f"{ROWS[row]} supports no case of the list")


def test_the_layouts_of_these_tests_exist() -> None:
    assert set(ROW_LAYOUTS) <= set(LAYOUTS)
