"""Checks the installed package on this machine: results and gradients against float64, in about a minute.

Each line is one group of checks; the last line is the sum. Exit code 0 if all passed, else 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import conv2d_ext
from conv2d_ext import _library
from conv2d_ext.cli import float32_precision

HELP = "self-test of the installed package on this machine"

Sides = tuple[int, int, int, int]
# Unit roundoff of each type; float64 is compared with itself in another order of sums.
ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one convolution; padding is (top, bottom, left, right)."""

    name: str
    size: Sides
    filters: Sides
    stride: tuple[int, int] = (1, 1)
    padding: Sides = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = True


CASES = (
    Case("3x3", (2, 64, 14, 14), (64, 64, 3, 3), padding=(1, 1, 1, 1)),
    Case("1x1", (3, 32, 9, 9), (48, 32, 1, 1)),
    Case("odd channels", (2, 5, 11, 13), (7, 5, 3, 3), padding=(1, 1, 1, 1)),
    Case("stem", (1, 3, 32, 32), (16, 3, 7, 7), (2, 2), (3, 3, 3, 3)),
    Case("patches", (2, 3, 32, 32), (24, 3, 8, 8), (8, 8)),
    Case("strided 1x1", (2, 16, 8, 8), (32, 16, 1, 1), (2, 2)),
    Case("stride 3, 2", (2, 8, 17, 16), (16, 8, 5, 3), (3, 2), (2, 2, 1, 1)),
    Case("dilated", (1, 16, 20, 20), (16, 16, 3, 3), padding=(6, 6, 6, 6), dilation=(6, 6)),
    Case("asymmetric", (2, 12, 9, 15), (20, 12, 1, 7), padding=(0, 0, 3, 3)),
    Case("four-sided", (2, 8, 9, 10), (8, 8, 3, 4), padding=(2, 0, 3, 1)),
    Case("grouped", (2, 32, 10, 10), (32, 8, 3, 3), padding=(1, 1, 1, 1), groups=4),
    Case("depthwise", (2, 24, 12, 12), (24, 1, 5, 5), (2, 2), (2, 2, 2, 2), groups=24),
    Case("multiplier", (1, 6, 9, 9), (18, 1, 3, 3), padding=(1, 1, 1, 1), groups=6),
    Case("kernel of the size", (2, 8, 7, 7), (16, 8, 7, 7), bias=False),
    Case("kernel larger", (1, 4, 3, 3), (4, 4, 9, 9), padding=(4, 4, 4, 4)),
    Case("zero batch", (0, 4, 8, 8), (4, 4, 3, 3)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="check this one alone; default: all there are")


class Wrong(Exception):
    """A check found a wrong result; the text says which."""


def operands(case: Case, dtype: torch.dtype, device: str, channels_last: bool = False) -> list[Tensor]:
    """input, weight and, if the case has one, bias: random, requiring gradients."""
    source = torch.Generator().manual_seed(len(case.name))
    sizes: list[tuple[int, ...]] = [case.size, case.filters] + ([(case.filters[0],)] if case.bias else [])
    tensors = [torch.randn(size, generator=source).to(device, dtype) for size in sizes]
    if channels_last:
        tensors = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    return [tensor.requires_grad_() for tensor in tensors]


def convolve(case: Case, tensors: list[Tensor]) -> Tensor:
    """Through this package."""
    bias = tensors[2] if case.bias else None
    return conv2d_ext.conv2d(tensors[0], tensors[1], bias, case.stride, case.padding, case.dilation, case.groups)


def convolve_all(case: Case, *tensors: Tensor) -> Tensor:
    """The same with the tensors one by one, as gradgradcheck and compile want them."""
    return convolve(case, list(tensors))


def exact(case: Case, tensors: list[Tensor]) -> Tensor:
    """By PyTorch in float64 on the CPU, differentiable."""
    x, w, *b = tensors
    top, bottom, left, right = case.padding
    padded = F.pad(x, (left, right, top, bottom))
    return F.conv2d(padded, w, b[0] if b else None, case.stride, 0, case.dilation, case.groups)


def compare(what: str, ours: Tensor, expected: Tensor, limit: float) -> None:
    """Raises Wrong unless the 2-norm of the difference is at most `limit` of the expected one. NaN never passes."""
    if ours.shape != expected.shape:
        raise Wrong(f"{what}: expected shape {tuple(expected.shape)}, got {tuple(ours.shape)}")
    norm = float(torch.linalg.vector_norm(expected))
    error = float(torch.linalg.vector_norm(ours.detach().cpu().double() - expected))
    if not error <= limit * norm:
        raise Wrong(f"{what}: relative error {error / norm if norm else error:.2e}, expected at most {limit:.2e}")


def check_case(case: Case, dtype: torch.dtype, device: str, channels_last: bool) -> None:
    """Result and gradients of one case against float64."""
    tensors = operands(case, dtype, device, channels_last)
    doubles = [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]
    ours, expected = convolve(case, tensors), exact(case, doubles)
    check_strides(case, dtype, tensors, ours)
    given = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(ours, tensors, given.to(device))
    exacts = torch.autograd.grad(expected, doubles, given.double())
    # A result rounded once is off by 0.4 roundoffs; float sums drift with the root of their length.
    allowed = 2 * ROUNDOFF[dtype] + 4 * max(2.0**-24 if dtype != torch.float64 else 0.0, ROUNDOFF[torch.float64]) * 64
    compare(f"{case.name}, output", ours, expected.detach(), allowed)
    for name, gradient, wanted_gradient in zip(("input", "weight", "bias"), gradients, exacts, strict=False):
        compare(f"{case.name}, gradient of {name}", gradient, wanted_gradient, allowed)


def check_strides(case: Case, dtype: torch.dtype, tensors: list[Tensor], ours: Tensor) -> None:
    """The result's memory format is F.conv2d's.

    Left out: half types, on which F.conv2d can crash on a CPU, and float64, whose rule differs between its backends.
    """
    top, bottom, left, right = case.padding
    if dtype != torch.float32 or (top, left) != (bottom, right):
        return
    x, w = tensors[0].detach(), tensors[1].detach()
    theirs = F.conv2d(x, w, None, case.stride, (top, left), case.dilation, case.groups)
    # The stride of a dimension of size 1 means nothing.
    strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (ours, theirs)]
    if ours.numel() and strides[0] != strides[1]:
        raise Wrong(f"{case.name}: expected strides {theirs.stride()} as from F.conv2d, got {ours.stride()}")


def check_all_cases(dtype: torch.dtype, device: str, channels_last: bool) -> int:
    for case in CASES:
        check_case(case, dtype, device, channels_last)
    return len(CASES)


def check_tf32(device: str) -> int:
    """float32 with TF32 allowed: products of operands rounded to 11 bits."""
    with float32_precision("tf32"):
        for case in CASES:
            tensors = operands(case, torch.float32, device)
            compare(
                f"{case.name}, output",
                convolve(case, tensors),
                exact(case, [t.detach().cpu().double() for t in tensors]),
                2.0**-11,
            )
    return len(CASES)


def check_rows(device: str) -> int:
    """Every row of the table that takes a case computes it, in each op, dtype and layout."""
    count = 0
    for case, dtype, last in itertools.product(CASES, ROUNDOFF, (False, True)):
        x, w = (t.detach() for t in operands(case, dtype, device, last)[:2])
        doubles = [t.cpu().double().requires_grad_() for t in (x, w)]
        y = exact(dataclasses.replace(case, bias=False), doubles)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        if last and dtype != torch.float64:  # as results lie
            g = g.contiguous(memory_format=torch.channels_last)
        gradients = torch.autograd.grad(y, doubles, g.cpu().double())
        for op, expected in zip(("fprop", "dgrad", "wgrad"), (y.detach(), *gradients), strict=True):
            for index, name in rows_for(case, op, x, w):
                compare(
                    f"{name}, {op}, {case.name}, {dtype}",
                    run_row(index, case, op, x, w, g),
                    expected,
                    2 * ROUNDOFF[dtype] + 2.0**-16,
                )
                count += 1
    return count


def rows_for(case: Case, op: str, x: Tensor, w: Tensor) -> list[tuple[int, str]]:
    """Index and name of the rows that take this problem in strict arithmetic."""
    plan = conv2d_ext.explain(
        x, w, None, case.stride, case.padding, case.dilation, case.groups, op=op, allow_tf32=False
    )
    taken = {name for name, estimate in plan.candidates if estimate is not None}
    return [(index, name) for index, name in enumerate(torch.ops.conv2d_ext.kernels()) if name in taken]


def run_row(index: int, case: Case, op: str, x: Tensor, w: Tensor, g: Tensor) -> Tensor:
    """One op by one row."""
    ops, attributes = torch.ops.conv2d_ext, [list(case.stride), list(case.padding), list(case.dilation), case.groups]
    if op == "fprop":
        return ops.fprop(x, w, None, *attributes, row=index)
    if op == "dgrad":
        return ops.dgrad(g, w, list(x.shape), *attributes, row=index)
    return ops.wgrad(g, x, list(w.shape), list(w.stride()), *attributes, row=index)


def check_views(device: str) -> int:
    """Operands that are slices with odd offsets, transposed or expanded."""
    case = CASES[2]
    x, w, b = (t.detach() for t in operands(case, torch.float32, device))
    expected = exact(case, [t.cpu().double() for t in (x, w, b)])
    room = torch.full((x.numel() + 1,), float("nan"), device=device)
    room[1:] = x.flatten()
    views = {"offset by one element": room[1:].view_as(x), "transposed": x.transpose(2, 3).contiguous().transpose(2, 3)}
    for name, view in views.items():
        compare(name, convolve(case, [view, w, b]), expected, 2.0**-18)
    one = x[:1].expand_as(x)
    wanted = exact(case, [one.cpu().double(), w.cpu().double(), b.cpu().double()])
    compare("expanded", convolve(case, [one, w, b]), wanted, 2.0**-18)
    return len(views) + 1


def check_second_order(device: str) -> int:
    """Gradients of gradients, numerically, in float64."""
    cases = [
        dataclasses.replace(c, size=(1, c.groups * 2, 5, 5), filters=(c.groups * 2, 2, 2, 2), bias=True)
        for c in (CASES[0], dataclasses.replace(CASES[10], groups=2), CASES[9])
    ]
    for case in cases:
        function = functools.partial(convolve_all, case)
        if not torch.autograd.gradgradcheck(function, operands(case, torch.float64, device), raise_exception=False):
            raise Wrong(f"{case.name}: second-order gradients differ from numerical ones")
    return len(cases)


def check_determinism(device: str) -> int:
    """Result and gradients of equal calls are equal in every bit."""
    cases, dtypes = CASES[:1] + CASES[10:12], (torch.float16, torch.bfloat16, torch.float32)
    for case, dtype in itertools.product(cases, dtypes):
        tensors = operands(case, dtype, device)
        runs = []
        for _ in range(3):
            out = convolve(case, tensors)
            runs.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out))])
        if not all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True)):
            raise Wrong(f"{case.name}, {dtype}: three equal calls differ")
    return len(cases) * len(dtypes)


def check_compile(device: str) -> int:
    """torch.compile without graph breaks gives the eager result and gradients (no compiler is run)."""
    cases = CASES[:1] + CASES[9:12]
    for case in cases:
        torch._dynamo.reset()
        function = functools.partial(convolve_all, case)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        tensors = operands(case, torch.float32, device)
        eager, ours = function(*tensors), compiled(*tensors)
        results = zip(
            [ours, *torch.autograd.grad(ours.sum(), tensors)],
            [eager, *torch.autograd.grad(eager.sum(), tensors)],
            strict=True,
        )
        for mine, wanted in results:
            compare(f"{case.name}, compiled", mine, wanted.detach().cpu().double(), 2.0**-20)
    return len(cases)


def check_graph(device: str) -> int:
    """A captured CUDA graph computes what the eager call does, on new data."""
    case = CASES[0]
    x, w, b = (t.detach() for t in operands(case, torch.float16, device))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        convolve(case, [x, w, b])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = convolve(case, [x, w, b])
    x.normal_()
    graph.replay()
    if not torch.equal(out, convolve(case, [x, w, b])):
        raise Wrong("a replay differs from the eager call")
    return 1


def check_module(device: str) -> int:
    """Conv2d and convert: the same parameters, state_dict and results as nn.Conv2d."""
    arguments: list[dict[str, Any]] = [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 5), "stride": 2, "groups": 4, "bias": False},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    ]
    x = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(0)).to(device)
    for keywords in arguments:
        torch.manual_seed(3)
        theirs = nn.Conv2d(8, 16, **keywords).to(device)
        torch.manual_seed(3)
        ours = conv2d_ext.Conv2d(8, 16, **keywords).to(device)
        states = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        if not all(torch.equal(mine, other) for mine, other in states):
            raise Wrong(f"Conv2d({keywords}): equal seeds give other parameters than nn.Conv2d")
        exactly = theirs.cpu().double()(x.cpu().double()).detach()
        compare(f"Conv2d({keywords})", ours(x), exactly, 2.0**-18)
        converted = conv2d_ext.convert(nn.Sequential(theirs.float().to(device)))
        compare(f"convert, {keywords}", converted(x), exactly, 2.0**-18)
    return 2 * len(arguments)


def check_errors(device: str) -> int:
    """Wrong arguments raise, and the text names the op."""
    x, w = torch.zeros(1, 4, 8, 8, device=device), torch.zeros(4, 4, 3, 3, device=device)
    op = torch.ops.conv2d_ext.conv2d
    calls: dict[str, Callable[[], Tensor]] = {
        "channels": lambda: op(x[:, :3], w),
        "stride 0": lambda: op(x, w, None, [0, 0]),
        "stride of three": lambda: op(x, w, None, [1, 1, 1]),
        "dimensions": lambda: op(x[0], w),
        "dtypes": lambda: op(x, w.double()),
        "integers": lambda: op(x.int(), w.int()),
        "groups": lambda: op(x, w, None, [1, 1], [0, 0], [1, 1], 3),
        "bias": lambda: op(x, w, x[0, 0, 0, :3]),
        "too large a kernel": lambda: op(x, w, None, [1, 1], [0, 0], [9, 9]),
    }
    for name, call in calls.items():
        try:
            call()
        except (RuntimeError, ValueError, TypeError):
            continue
        raise Wrong(f"{name}: expected an error, got a result")
    return len(calls)


def groups(only: str | None) -> Iterator[tuple[str, Callable[[], int]]]:
    """The lines of the check: a name and a function that returns how many checks it made, or raises."""
    devices = [d for d in ("cpu", "cuda") if (only or d) == d and (d == "cpu" or torch.cuda.is_available())]
    for device in devices:
        for dtype, last in itertools.product(ROUNDOFF, (False, True)):
            layout = "nhwc" if last else "nchw"
            yield f"{device} {str(dtype)[6:]} {layout}", functools.partial(check_all_cases, dtype, device, last)
        checks = [
            ("views", check_views),
            ("second order", check_second_order),
            ("determinism", check_determinism),
            ("torch.compile", check_compile),
            ("Conv2d, convert", check_module),
            ("errors", check_errors),
        ]
        if device == "cuda":
            checks += [("tf32", check_tf32), ("every kernel", check_rows), ("CUDA graph", check_graph)]
        for name, check in checks:
            yield f"{device} {name}", functools.partial(check, device)


def run(args: argparse.Namespace) -> int:
    start = time.monotonic()
    print(f"conv2d_ext {conv2d_ext.__version__}, torch {torch.__version__}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("cuda: torch sees no CUDA device here")
        return 1
    failed = done = 0
    if torch.cuda.is_available() and args.device != "cpu":
        state = "loaded" if _library.CUDA_ERROR is None else f"not loaded: {_library.CUDA_ERROR}"
        print(f"{torch.cuda.get_device_name()}; CUDA library {state}")
    with float32_precision("ieee"):
        for name, check in groups(args.device):
            began = time.monotonic()
            try:
                count = check()
            except Exception as error:  # Whatever breaks one group, the others still say something.
                failed += 1
                text = str(error).strip().partition("\n")[0]
                print(
                    f"{name:<24} FAILED  {text if isinstance(error, Wrong) else f'{type(error).__name__}: {text}'}",
                    flush=True,
                )
            else:
                done += count
                print(f"{name:<24} ok      {count:4d} checks  {time.monotonic() - began:5.1f} s", flush=True)
    seconds = time.monotonic() - start
    print(f"FAILED: {failed} groups, {seconds:.0f} s" if failed else f"all {done} checks passed in {seconds:.0f} s")
    return 1 if failed else 0
