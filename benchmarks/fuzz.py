"""Random small convolutions, every row of the kernel table that supports them, against float64.

    python benchmarks/fuzz.py                              # 10,000 cases on the GPU
    python benchmarks/fuzz.py --cases 1000000 --budget 600 --seed 7 --workers 8
    python benchmarks/fuzz.py --seed 7 --only 1234         # one case again, with everything that is known of it
    python benchmarks/fuzz.py --device cpu --cases 500     # the CPU backend

A case is a shape, op, dtype and layout; tensors are views into buffers of NaN, fresh memory is NaN. Each supporting row
runs twice. A failure is: an element further from float64 than rounding explains, an error in norm beyond the suite's
tolerance, integers that are not exact, NaN or infinity elsewhere than in the reference, two runs that differ in a bit,
or an exception. Prints the counts and each failing case; exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE)]  # Python may have left the script's own folder out

import shapes  # noqa: E402
from cases import Case  # noqa: E402
from layouts import LAYOUTS, SHARED  # noqa: E402
from reference import tolerance, unit  # noqa: E402
from shapes import OPS, STORAGE, some  # noqa: E402

DTYPES = ("fp16", "fp16", "bf16", "bf16", "fp32", "fp32", "tf32", "fp64")
# Of the operands: normal ones; small integers, whose sums are exact; normal ones but one that is not finite.
VALUES = ("normal", "normal", "integer", "special")


@dataclasses.dataclass(frozen=True)
class Example:
    """One case: everything is drawn from the seed and the index."""

    seed: int
    index: int
    case: Case
    op: str
    dtype: str
    layout: str
    values: str

    def __str__(self) -> str:
        what = f"{shapes.text(self.case)}{' bias' if self.case.bias else ''}"
        return f"--seed {self.seed} --only {self.index}: {self.op} {self.dtype} {self.layout} {self.values} {what}"


def example(seed: int, index: int, ops: Sequence[str] = OPS, dtypes: Sequence[str] = DTYPES) -> Example:
    draw = random.Random(f"{seed} {index}")
    case = dataclasses.replace(shapes.small(draw), name=f"fuzz {seed} {index}")
    layout = draw.choice((*("nchw", "nhwc") * 12, *LAYOUTS, *SHARED))
    return Example(seed, index, case, draw.choice(ops), draw.choice(dtypes), layout, draw.choice(VALUES))


# ---- the reference ---------------------------------------------------------------------------------------------------


def windows(case: Case, x: Tensor) -> Tensor:
    """x, padded with zeros, as (N, groups, C/groups, R, S, P, Q): what each output meets with each tap; a view."""
    top, bottom, left, right = case.padding4
    x = F.pad(x, (left, right, top, bottom)).contiguous()
    n, c, h, w = x.stride()
    per_group = case.C // case.groups
    return x.as_strided(
        (case.N, case.groups, per_group, case.R, case.S, case.P, case.Q),
        (n, per_group * c, c, case.dilation[0] * h, case.dilation[1] * w, case.stride[0] * h, case.stride[1] * w),
    )


def reference(op: str, case: Case, x: Tensor, w: Tensor, b: Tensor | None, go: Tensor) -> Tensor:
    """The op by its definition, as matrix products over windows."""
    groups, taps = case.groups, case.C // case.groups * case.R * case.S
    pixels = case.P * case.Q
    if op == "fprop":
        columns = windows(case, x).reshape(case.N, groups, taps, pixels)
        y = (w.reshape(groups, case.K // groups, taps) @ columns).reshape(case.output_size)
        return y if b is None else y + b.view(1, -1, 1, 1)
    gradient = go.reshape(case.N, groups, case.K // groups, pixels)
    if op == "wgrad":
        columns = windows(case, x).reshape(case.N, groups, taps, pixels)
        return (gradient @ columns.transpose(2, 3)).sum(0).reshape(case.weight_size)
    columns = w.reshape(groups, case.K // groups, taps).transpose(1, 2) @ gradient
    columns = columns.reshape(case.N, case.C, case.R, case.S, case.P, case.Q)
    top, bottom, left, right = case.padding4
    dx = go.new_zeros(case.N, case.C, case.H + top + bottom, case.W + left + right)
    for r in range(case.R):
        for s in range(case.S):
            h, v = r * case.dilation[0], s * case.dilation[1]
            rows = slice(h, h + (case.P - 1) * case.stride[0] + 1, case.stride[0])
            dx[:, :, rows, v : v + (case.Q - 1) * case.stride[1] + 1 : case.stride[1]] += columns[:, :, r, s]
    return dx[:, :, top : top + case.H, left : left + case.W]


# ---- one case --------------------------------------------------------------------------------------------------------


def operands(e: Example, device: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    case, dtype = e.case, STORAGE[e.dtype]
    generator = torch.Generator(device).manual_seed(case.seed)

    def draw(*size: int) -> Tensor:
        if e.values == "integer":
            return torch.randint(-3, 4, size, generator=generator, device=device).to(dtype)
        return torch.randn(size, generator=generator, device=device).to(dtype)

    place_x, place_w, place_y = (LAYOUTS | SHARED)[e.layout]
    x, w, go = (
        place_x(draw(*case.input_size), device),
        place_w(draw(*case.weight_size), device),
        draw(*case.output_size),
    )
    go = place_y(go, device)
    if e.values == "special":
        # In the operand that the op reads through windows: what padding does to the other one is not defined.
        random_place = random.Random(case.seed)
        into = go if e.op == "dgrad" else x
        at = tuple(random_place.randrange(n) for n in into.shape)
        into[at] = random_place.choice((math.nan, math.inf, -math.inf))
    return x, w, draw(case.K) if case.bias else None, go


def excess(e: Example, value: Tensor, exact: Tensor, scale: Tensor) -> Tensor:
    """A number above zero, or NaN, if the result is wrong. Nothing is read back from the device.

    `scale` is the sum of the absolute values of the terms: the bound is that for rounding errors of one sign, which no
    order of summation exceeds, with twice that for tensor cores, which truncate. TF32 rounds both operands.
    """
    dtype, length = STORAGE[e.dtype], e.case.reduction(e.op)
    if e.values == "integer":
        return (value.double() != exact.to(dtype).double()).any().double()
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    value = value.double()
    finite = exact.isfinite()
    same = (value == exact) | (value.isnan() & exact.isnan())  # outside `finite`
    difference = torch.where(finite, value - exact, 0.0)
    scale = torch.where(finite, scale, 0.0)
    allowed = unit(dtype) * exact.abs() + 2 * (length + 2) * unit(accumulator) * scale
    norm_allowed = tolerance(dtype, length)
    if e.dtype == "tf32":
        allowed, norm_allowed = allowed + 2.0**-10 * scale, norm_allowed + 2.0**-10
    beyond = torch.where(finite, difference.abs() - 1.01 * allowed - torch.finfo(dtype).smallest_normal, 0.0)
    size = torch.linalg.vector_norm(torch.where(finite, exact, 0.0))
    norm = torch.linalg.vector_norm(difference) - norm_allowed * size - 1e-30
    # A cancellation makes `size` small, and a few results are no sample (of 31,797 cases of TF32 on a CPU, products of
    # rounded operands exceeded the norm's bound with one to three results alone): then the bound on elements counts.
    # So it does where an operand is one number: results are alike, and none averages another's error.
    typical = torch.linalg.vector_norm(scale) / math.sqrt(length + 1)
    sample = (scale > 0).sum() >= (math.inf if e.layout.startswith("one_number") else 8)
    norm = torch.where((size >= 0.1 * typical) & sample, norm, 0.0)
    # A NaN in `value` makes the maximum one.
    return beyond.max().clamp(min=0) + norm.clamp(min=0) + (~finite & ~same).any().double()


def different(a: Tensor, b: Tensor) -> Tensor:
    """1 where the bits differ, else 0."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (a.contiguous().view(width) != b.contiguous().view(width)).any().double()


Run = Callable[[int], Tensor]


def check(e: Example, device: str, change: Callable[[Run], Run] = lambda run: run) -> tuple[list[str], list[int]]:
    """The failures of a case, and the rows that ran. `change` replaces the op, for the tests of this program."""
    x, w, b, go = operands(e, device)
    case, allow_tf32 = e.case, e.dtype == "tf32"
    run = change(shapes.call(e.op, case, x, w, b, go, allow_tf32))
    wide = [None if t is None else t.double() for t in (x, w, b, go)]
    exact = reference(e.op, case, *wide)
    scale = reference(e.op, case, *(None if t is None else t.abs() for t in wide))
    made = run(-1)
    if made.shape != exact.shape or made.dtype != x.dtype:
        return [f"result is {made.dtype} {tuple(made.shape)}, expected {x.dtype} {tuple(exact.shape)}"], []
    rows = [-1]
    if device != "cpu":
        problem = {"fprop": (x, w, made), "dgrad": (made, w, go), "wgrad": (x, made, go)}[e.op]
        chosen, supported = shapes.plan(e.op, case, *problem, allow_tf32)
        rows = list(supported)
        if chosen not in supported:
            return [f"the planner chose row {chosen}, which is not among those that support the problem"], rows
    found = []
    for row in rows:
        first = run(row)
        found += [excess(e, first, exact, scale), different(first, run(row))]
    numbers = torch.stack(found).tolist()
    names = {-1: "the op", **dict(enumerate(torch.ops.conv2d_ext.kernels()))}
    failures = []
    for row, wrong, unlike in zip(rows, numbers[::2], numbers[1::2], strict=True):
        if not wrong <= 0:
            failures.append(f"{names[row]}: wrong, beyond the allowed error by {wrong:.3g}")
        if unlike:
            failures.append(f"{names[row]}: two runs differ")
    return failures, rows


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Found:
    """What one process found. `rows`: how often each row ran."""

    cases: int = 0
    runs: Counter[int] = dataclasses.field(default_factory=Counter)
    failed: list[tuple[str, list[str]]] = dataclasses.field(default_factory=list)
    lost: bool = False  # the device answers no more

    def add(self, other: Found) -> None:
        self.cases += other.cases
        self.runs += other.runs
        self.failed += other.failed
        self.lost = self.lost or other.lost


def work(options: argparse.Namespace, worker: int) -> Found:
    """Every `workers`-th case, until the cases or the time are used up."""
    found, end = Found(), time.monotonic() + options.budget if options.budget else math.inf
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch fills fresh memory with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)
    indices = [options.only] if options.only is not None else range(worker, options.cases, options.workers)
    for index in indices:
        if time.monotonic() > end or len(found.failed) >= options.most:
            break
        e = example(options.seed, index, options.ops, options.dtypes)
        try:
            failures, rows = check(e, options.device)
            found.runs.update(rows)
        except Exception as error:
            failures = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
        found.cases += 1
        if failures:
            found.failed.append((str(e), failures))
            print(f"FAIL {e}", *failures, sep="\n     ", flush=True)
            if options.device != "cpu":
                try:
                    torch.cuda.synchronize()
                except RuntimeError:
                    found.lost = True
                    break
    return found


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--cases", type=int, default=10_000, help="default: %(default)s")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--only", type=int, metavar="INDEX", help="run this case of the seed alone")
    found.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after this time")
    found.add_argument("--ops", type=some(OPS), default=list(OPS), metavar="A,B", help=f"of {', '.join(OPS)}")
    found.add_argument(
        "--dtypes", type=some(tuple(STORAGE)), default=list(DTYPES), metavar="A,B", help=f"of {', '.join(STORAGE)}"
    )
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--workers", type=int, default=1, help="processes that share the cases (default: %(default)s)")
    found.add_argument("--most", type=int, default=20, help="failures after which a process stops")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    begin, found = time.monotonic(), Found()
    if options.workers == 1:
        found = work(options, 0)
    else:
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
            for one in pool.starmap(work, [(options, worker) for worker in range(options.workers)]):
                found.add(one)
    kernels = torch.ops.conv2d_ext.kernels()
    idle = [name for row, name in enumerate(kernels) if not found.runs[row]] if options.device != "cpu" else []
    if idle:
        print(f"{len(idle)} of {len(kernels)} rows met no case: {', '.join(idle)}")
    print(
        f"fuzz: {found.cases} cases, {sum(found.runs.values())} results checked, {len(found.failed)} cases failed, "
        f"{time.monotonic() - begin:.0f} s{'; the device is lost' if found.lost else ''}"
    )
    return 1 if found.failed or not found.cases else 0


if __name__ == "__main__":
    sys.exit(main())
