"""Which kernels of the library the tests' cases launch on an H200; needs no GPU, but a build (setup.py build_ext).

    python scripts/launches.py                  # those that no case of tests/test_rows.py launches
    python scripts/launches.py --cases edge     # that none of memcheck's share does
    python scripts/launches.py --draw 250000    # and writes random problems that reach more to tests/launched.json

A row has many kernels, and tiles and layouts decide between them, so that "every row has a case" leaves kernels out.
The launchers run for every row that supports a problem, linked with a stand-in for the CUDA runtime (launches.cpp),
which says on stderr which launches and tensor maps CUDA would refuse. Kernels of bfloat16, which are float16's with
another type, are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import shapes  # noqa: E402
import test_rows as rows  # noqa: E402
from calls import OPS, call, problem  # noqa: E402
from cases import CASES, Case  # noqa: E402
from layouts import LAYOUTS  # noqa: E402
from torch import Tensor  # noqa: E402

CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


class Question(NamedTuple):
    """One op of a problem, of which every row that supports it is launched."""

    op: str
    case: Case
    dtype: torch.dtype
    layout: str
    tf32: bool
    keywords: dict[str, object]  # wgrad's strides

    def line(self) -> str:
        """What launches.cpp reads."""
        case = self.case
        x, w, go = (
            place(torch.empty(size, dtype=self.dtype, device="meta"), "meta")
            for place, size in zip(
                LAYOUTS[self.layout], (case.input_size, case.weight_size, case.output_size), strict=True
            )
        )
        tensors = problem(self.op, x, w, go, call(self.op, case, x, w, None, go)(**self.keywords))
        sizes = (case.N, case.C, case.H, case.W, case.K, case.R, case.S)
        strides = [step if size > 1 else 0 for t in tensors for step, size in zip(t.stride(), t.shape, strict=True)]
        window = (*case.stride, *case.padding4, *case.dilation, case.groups)
        numbers = (OPS.index(self.op), CODES[self.dtype], self.tf32, *sizes, *strides, *window)
        return " ".join(str(int(n)) for n in (*numbers, *map(alignment, tensors), case.bias))


def alignment(t: Tensor) -> int:
    offset = int(t.storage_offset()) * t.element_size()
    return min(16, offset & -offset or 16)


def questions(cases: Iterable[Case], kinds: Sequence[rows.Kind], ops: Sequence[str] = OPS) -> Iterator[Question]:
    for case, (dtype, layout) in itertools.product(cases, kinds):
        if case.empty:
            continue
        weight = LAYOUTS[layout][1](torch.empty(case.weight_size, device="meta"), "meta")
        for op in ops:
            for keywords, tf32 in itertools.product(rows.destinations(op, weight), rows.modes(dtype)):
                yield Question(op, case, dtype, layout, tf32, keywords)


def share(name: str) -> list[Question]:
    """The problems of some of tests/test_rows.py."""
    dtypes = (torch.float16, torch.float32, torch.float64)
    kinds = tuple(itertools.product(dtypes, rows.ROW_LAYOUTS))
    if name == "edge":
        edges = questions((case for case in CASES if case.edge), kinds)
        wide = questions(rows.SANITIZED_WIDE_ROWS, ((torch.float32, "nchw"),))
        return [*(q for q in edges if rows.sanitized(q.case, (q.dtype, q.layout))), *wide]
    return [*questions(CASES, kinds), *questions(rows.WIDE_ROWS, ((torch.float32, "nchw"),))]


def build(program: Path) -> None:
    objects = next(ROOT.glob("build/temp.*/conv2d_ext._cuda/csrc/cuda"), None)
    if objects is None:
        raise SystemExit("launches: no objects in build/: run `python setup.py build_ext --inplace`")
    planner = objects.parents[2] / "conv2d_ext._cpu" / "csrc" / "core" / "planner.o"
    inputs = [ROOT / "scripts" / "launches.cpp", *objects.glob("instances/*.o"), objects / "pack_sm90.o", planner]
    include = f"-I{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/include"
    subprocess.run(["g++", "-O1", "-std=c++20", include, *map(str, inputs), "-o", str(program)], check=True)


def first_launches(program: Path, asked: Sequence[Question]) -> dict[str, int]:
    """Of each kernel the first question that launches it, or -1."""
    lines = "\n".join(question.line() for question in asked)
    answer = subprocess.run([str(program)], input=lines, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = {name: int(first) for first, name in (line.split() for line in answer.splitlines())}
    return {name: first for name, first in found.items() if "__nv_bfloat16" not in name}


def drawn(count: int, seed: int) -> list[Question]:
    """Random problems whose sums are exact on the tests' integers, the smallest first."""
    draw, found = random.Random(seed), list[Question]()
    for _ in range(count):
        case = shapes.small(draw) if draw.random() < 0.4 else shapes.layer(draw, draw.choice(shapes.KINDS), 1e7, 3e10)
        kind = (
            draw.choice((torch.float16, torch.float16, torch.float32, torch.float32, torch.float64)),
            draw.choice((*("nchw", "nhwc") * 6, *LAYOUTS)),
        )
        if max(map(case.reduction, OPS)) * 9 < 2**24:
            found += questions((dataclasses.replace(case, bias=True),), (kind,), (draw.choice(OPS),))
    return sorted(found, key=lambda q: (max(shapes.elements(q.case)), shapes.flops(q.case)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=("all", "edge"), default="all", help="default: %(default)s")
    parser.add_argument("--draw", type=int, metavar="N", help="look for problems that reach the others, among so many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    asked = share(options.cases)
    if options.draw is None and options.cases == "all":
        for of in rows.LAUNCHED:
            asked += questions((of.case,), ((of.dtype, of.layout),), (of.op,))
    known = len(asked)
    if options.draw is not None:
        asked += drawn(options.draw, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "launches"
        build(program)
        first = first_launches(program, asked)
    if options.draw is not None:
        found = [asked[place] for place in sorted({place for place in first.values() if place >= known})]
        lines = [json.dumps(rows.Launched(q.op, q.dtype, q.layout, q.case).written()) for q in found]
        rows.LAUNCHED_FILE.write_text("[\n" + ",\n".join(dict.fromkeys(lines)) + "\n]\n")
        print(f"{len(set(lines))} problems written to {rows.LAUNCHED_FILE}")
    missed = sorted(name for name, place in first.items() if place < 0)
    named = subprocess.run(["c++filt"], input="\n".join(missed), capture_output=True, text=True, check=True).stdout
    print(named, end="\n" if missed else "")
    print(f"{len(missed)} of {len(first)} kernels are launched by none of {len(asked)} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
