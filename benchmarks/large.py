"""Tensors of more than 2^31 elements, on every row of the kernel table that takes them, beside the plainest row.

    python benchmarks/large.py                             # on a GPU with 120 GiB to spare
    python benchmarks/large.py --axes H,W --dtypes fp32 --budget 60

The cases are those of tests/cases.py, of so many images (N), or of one with so many rows (H) or columns (W), that input
or output passes 2^31 elements. Each row runs once an axis. Values are small integers whose sums are exact, so that all
rows' results are equal, and fresh memory is NaN. Prints what differs; exit status 1 if anything does.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE)]  # Python may have left the script's own folder out

from calls import call, candidates, meta, plan, problem  # noqa: E402
from cases import CASES, Case  # noqa: E402
from shapes import OPS, STORAGE, some, text  # noqa: E402

MOST_BYTES, MOST_NS = 2**35, 3e8  # of a case's tensors; of a row's estimated time
PIECE = 2**30  # elements that are drawn at once


def scaled(case: Case, axis: str) -> Case:
    """So long along an axis that input or output has more than 2^31 elements."""
    found = dataclasses.replace(case, N=1)
    while max(found.N * found.C * found.H * found.W, found.N * found.K * found.P * found.Q) <= 2**31:
        of_one = max(found.C * found.H * found.W, found.K * found.P * found.Q)
        size = getattr(found, axis)
        found = dataclasses.replace(found, **{axis: size * (2**31 // (of_one * found.N)) + max(16, size // 16)})
    return found


def drawn(like: Tensor, rare: bool, device: str) -> Tensor:
    """-1, 0 and 1 in the strides of `like`; eight of nine are 0 if they are to be rare."""
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    flat, most = made.as_strided((made.numel(),), (1,)), 9 if rare else 1
    for begin in range(0, made.numel(), PIECE):
        piece = flat[begin : begin + PIECE]
        values = torch.randint(-most, most + 1, piece.shape, dtype=torch.int8, device=device)
        piece.copy_(values.div_(most, rounding_mode="trunc"))
    return made


def difference(got: Tensor, expected: Tensor) -> str:
    """Where they differ: the first and last index of each dimension."""
    wrong = got != expected
    ends = []
    for dim in range(4):
        met = wrong.movedim(dim, 0).flatten(1).any(1).nonzero()
        ends.append(f"{'NCHW'[dim]} {int(met[0])} to {int(met[-1])}")
    return f"{int(wrong.sum())} of {wrong.numel()} differ, {int(got.isnan().sum())} are NaN; {', '.join(ends)}"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--axes", type=some(("N", "H", "W")), default=["N", "H"], metavar="A,B", help="of N, H, W")
    found.add_argument("--ops", type=some(OPS), default=list(OPS), metavar="A,B", help=f"of {', '.join(OPS)}")
    found.add_argument(
        "--dtypes",
        type=some(tuple(STORAGE)),
        default=["fp16", "fp32", "tf32", "fp64"],
        metavar="A,B",
        help=f"of {', '.join(STORAGE)}; bf16 has fp16's kernels",
    )
    found.add_argument("--budget", type=float, default=1e9, metavar="SECONDS", help="start no case after this time")
    found.add_argument("--device", default="cuda")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    kernels, begin = torch.ops.conv2d_ext.kernels(), time.monotonic()
    seen: set[tuple[str, int]] = set()  # axis and row
    wrong = 0
    for axis, case, dtype, layout in itertools.product(options.axes, CASES, options.dtypes, ("nchw", "nhwc")):
        if case.empty or case.large or case.R * case.S > 1200:
            continue
        large = scaled(case, axis)
        like = meta(large, STORAGE[dtype], layout)
        if sum(t.numel() * t.element_size() for t in like) > MOST_BYTES or max(large.H, large.W) >= 2**31:
            continue
        tensors: list[Tensor] = []
        for op in options.ops:
            keywords = {"allow_tf32": dtype == "tf32"} | ({"stride": like[1].stride()} if op == "wgrad" else {})
            made = call(op, large, like[0], like[1], None, like[2])(**keywords)
            planned = plan(op, large, *problem(op, *like, made), allow_tf32=dtype == "tf32")
            rows, plainest = candidates(planned), candidates(planned)[-1]
            rows = [row for row in rows if row != plainest and (axis, row) not in seen and planned[3 + row] < MOST_NS]
            if not rows or planned[3 + plainest] > 3 * MOST_NS or time.monotonic() - begin > options.budget:
                continue
            if not tensors:
                torch.cuda.empty_cache()
                tensors = [drawn(t, rare, options.device) for t, rare in zip(like, (False, False, True), strict=True)]
            run = call(op, large, tensors[0], tensors[1], None, tensors[2])
            expected = run(row=plainest, **keywords)
            for row in rows:
                seen.add((axis, row))
                poison = torch.full_like(expected, torch.nan)
                del poison
                got = run(row=row, **keywords)
                if not torch.equal(got, expected):
                    wrong += 1
                    print(f"{kernels[row]} {layout} {text(large)}: {difference(got, expected)}", flush=True)
    rows_met = len({row for _, row in seen})
    print(f"large: {len(seen)} runs of {rows_met} rows, {wrong} wrong, {time.monotonic() - begin:.0f} s")
    return 1 if wrong or not seen else 0


if __name__ == "__main__":
    sys.exit(main())
