"""What the first call of a shape costs beyond the second: planning, loading kernels, tensor maps, memory.

    python benchmarks/first_call.py                      # every row that the planner takes over 1,500 random layers
    python benchmarks/first_call.py --rows               # every row of the table, on the first random layer it supports
    python benchmarks/first_call.py --trace              # and which kernels and CUDA calls the slow ones spend it in

A call is timed by the host, from before it until the GPU is idle again. Memory for tensors, results and workspaces is
there beforehand, and one convolution has run, with which all kernels are loaded. Exit status 1 if a shape's first call
takes more than --limit longer than the fastest of its later ones. Those are repeated in up to seven more processes,
since a time may be the host's or of others' work on the GPU: the fastest of all first calls counts, beside the fastest
of all later ones. --budget ends the measurement, of calls in random order, after so many seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE)]  # Python may have left the script's own folder out

import shapes  # noqa: E402
from cases import Case  # noqa: E402
from shapes import KINDS, OPS, STORAGE, some  # noqa: E402

from conv2d_ext.cli import plain_table  # noqa: E402

LAYOUTS = ("nchw", "nhwc")
MOST_ELEMENTS, MOST_FLOPS = 2**23, 1e10


class Call(NamedTuple):
    """One op on one shape; row -1 is the planner's choice."""

    case: Case
    op: str
    dtype: str
    layout: str
    row: int = -1

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} {self.layout} {shapes.text(self.case)}"


class Times(NamedTuple):
    """Microseconds of the first call and of the fastest later one: until the op returns, and until the GPU is idle;
    segments: how often the allocator asked CUDA for memory."""

    first_host: float
    first: float
    later_host: float
    later: float
    segments: int

    @property
    def extra(self) -> float:
        return self.first - self.later


def layers(options: argparse.Namespace) -> Iterator[tuple[Case, str, str]]:
    draw = random.Random(options.seed)
    for _ in range(options.shapes):
        case = shapes.layer(draw, draw.choice(options.kinds), MOST_ELEMENTS, MOST_FLOPS)
        yield case, draw.choice(options.dtypes), draw.choice(options.layouts)


def meta(case: Case, dtype: str, layout: str) -> list[Tensor]:
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    sizes = (case.input_size, case.weight_size, case.output_size)
    return [torch.empty(s, dtype=STORAGE[dtype], device="meta", memory_format=memory_format) for s in sizes]


def todo(options: argparse.Namespace) -> list[Call]:
    found, seen = [], set()
    for case, dtype, layout in layers(options):
        for op in OPS:
            chosen, estimates = shapes.plan(op, case, *meta(case, dtype, layout), dtype == "tf32")
            for row, us in estimates.items() if options.rows else ((chosen, 0.0),):
                if row not in seen and us < 5000:
                    seen.add(row)
                    found.append(Call(case, op, dtype, layout, row if options.rows else -1))
    random.Random(options.seed).shuffle(found)
    return found


class Operands:
    """Tensors of any problem in memory that is there beforehand."""

    def __init__(self) -> None:
        self.memory = [torch.ones(MOST_ELEMENTS, dtype=torch.float64, device="cuda") for _ in range(3)]
        # What the allocator has once had from CUDA it gives again: large blocks from one, small ones of 1 MiB.
        held = [torch.empty(4 << 30, dtype=torch.uint8, device="cuda")]
        held += [torch.empty(1 << 20, dtype=torch.uint8, device="cuda") for _ in range(64)]

    def run(self, call: Call) -> Callable[[], Tensor]:
        tensors = [
            memory.view(t.dtype)[: t.numel()].as_strided(t.shape, t.stride())
            for memory, t in zip(self.memory, meta(call.case, call.dtype, call.layout), strict=True)
        ]
        x, w, go = tensors
        row = shapes.call(call.op, call.case, x, w, None, go, call.dtype == "tf32")
        return lambda: row(call.row)


def once(run: Callable[[], Tensor]) -> tuple[float, float]:
    begin = time.perf_counter_ns()
    out = run()
    host = time.perf_counter_ns()
    torch.cuda.synchronize()
    end = time.perf_counter_ns()
    del out
    return (host - begin) / 1e3, (end - begin) / 1e3


def measure(calls: Sequence[Call], budget: float) -> list[Times]:
    """Of the calls that the budget allows, in seconds from here."""
    end = time.monotonic() + budget
    operands, found = Operands(), []
    for op in OPS:
        operands.run(Call(Case("warm", 1, 8, 8, 8, 8, 1, 1, bias=False), op, "fp64", "nchw"))()
    torch.cuda.synchronize()
    gc.collect()
    gc.disable()
    for call in calls:
        if time.monotonic() > end:
            break
        run = operands.run(call)
        before = torch.cuda.memory_stats()["segment.all.allocated"]
        try:
            first_host, first = once(run)
        except RuntimeError as error:  # a named row, of which the result's strides ask too much
            print(f"{call}: {error}", file=sys.stderr)
            found.append(Times(0, 0, 0, 0, 0))
            continue
        segments = torch.cuda.memory_stats()["segment.all.allocated"] - before
        later = [once(run) for _ in range(3)]
        found.append(Times(first_host, first, min(t[0] for t in later), min(t[1] for t in later), segments))
    gc.enable()
    return found


def in_a_process(calls: Sequence[Call], options: argparse.Namespace, traced: bool = False) -> Any:
    """measure(), or trace(), in a process whose first calls these are."""
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder, "calls.json"), Path(folder, "answer.json")
        given.write_text(json.dumps([(vars(c.case), *c[1:]) for c in calls]))
        arguments = [sys.executable, __file__, "--of", given, answer, "--budget", str(options.budget)]
        subprocess.run(arguments + ["--trace"] * traced, check=True)
        return json.loads(answer.read_text())


def repeated(times: list[Times], limit: float, again: Callable[[list[int]], Sequence[Sequence[float]]]) -> list[int]:
    """The numbers of the calls that are over the limit after seven more processes; `times` become the fastest of all.

    `again` measures the calls of some numbers in a process of their own; it may return fewer.
    """
    over = [i for i, t in enumerate(times) if t.extra > limit]
    # No more comes before each than the first time.
    for _ in range(7):
        for i, t in zip(over, again(over) if over else (), strict=False):
            times[i] = Times(*map(min, times[i], Times(*t)))
        over = [i for i in over if times[i].extra > limit]
    return over


def of_file(options: argparse.Namespace) -> None:
    def tuples(fields: dict[str, Any]) -> Case:
        return Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

    given, answer = options.of
    calls = [Call(tuples(case), *rest) for case, *rest in json.loads(given.read_text())]
    answer.write_text(json.dumps(trace(calls) if options.trace else measure(calls, options.budget)))


def trace(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """For each first call: its kernels' names, and the microseconds of CUDA's functions."""
    from torch.profiler import ProfilerActivity, profile, record_function

    operands = Operands()
    operands.run(Call(Case("warm", 1, 8, 8, 8, 8, 1, 1, bias=False), "fprop", "fp64", "nchw"))()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for i, call in enumerate(calls):
            run = operands.run(call)
            with record_function(f"call {i}"):
                run()
                torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    spans = sorted(
        (e["ts"], e["ts"] + e["dur"], int(e["name"].split()[1]))
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith("call ")
    )
    found: list[dict[str, Any]] = [{"kernels": [], "cuda": {}} for _ in calls]
    inner = sorted((e for e in events if e.get("cat") in ("kernel", "cuda_runtime", "cuda_driver")),
                   key=lambda e: e["ts"])  # fmt: skip
    at = 0
    for event in inner:
        while at < len(spans) and spans[at][1] < event["ts"]:
            at += 1
        if at == len(spans) or event["ts"] < spans[at][0]:
            continue
        into = found[spans[at][2]]
        if event["cat"] == "kernel":
            into["kernels"].append(event["name"])
        else:
            into["cuda"][event["name"]] = into["cuda"].get(event["name"], 0) + event["dur"]
    return found


def report(calls: Sequence[Call], times: Sequence[Times], traces: Sequence[dict[str, Any]], show_us: float) -> str:
    names = torch.ops.conv2d_ext.kernels()
    families: dict[str, list[float]] = {}
    kernels: set[str] = set()
    lines = []
    for i, (call, t) in enumerate(zip(calls, times, strict=True)):
        begin = time.perf_counter_ns()
        chosen = shapes.plan(call.op, call.case, *meta(call.case, call.dtype, call.layout), call.dtype == "tf32")[0]
        plan_us = (time.perf_counter_ns() - begin) / 1e3
        name = names[chosen if call.row < 0 else call.row]
        family, _, dtype = name.replace("tma_strict", "strict").split("_")[:3]
        families.setdefault(f"{family} {dtype}", []).append(t.extra)
        notes = []
        if traces:
            fresh = [k for k in traces[i]["kernels"] if k not in kernels]
            kernels.update(fresh)
            notes.append(f"{len(fresh)} of {len(traces[i]['kernels'])} kernels new")
            notes += [f"{f} {us:.0f}" for f, us in traces[i]["cuda"].items() if us > 50]
        if t.segments:
            notes.append(f"{t.segments} cudaMalloc")
        if t.extra > show_us:
            lines.append((t.extra, t, f"{plan_us:.0f}", name, str(call), ", ".join(notes)))
    lines.sort(key=lambda line: -line[0])
    shown = [
        (f"{extra:.0f}", f"{t.first:.0f}", f"{t.first_host:.0f}", f"{t.later:.0f}", f"{t.later_host:.0f}", *rest)
        for extra, t, *rest in lines
    ]
    columns = ("extra", "first", "host", "later", "host", "plan", "row", "call", "notes")
    sums = [
        (name, str(len(extra)), f"{statistics.median(extra):.0f}", f"{max(extra):.0f}")
        for name, extra in sorted(families.items(), key=lambda item: -max(item[1]))
    ]
    table = plain_table(("family", "calls", "extra, median", "most"), sums, ("family",))
    return f"{table}\n\n{plain_table(columns, shown, columns[6:])}"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, known in (("kinds", KINDS), ("dtypes", tuple(STORAGE)), ("layouts", LAYOUTS)):
        text = f"of {', '.join(known)}; default: all"
        found.add_argument(f"--{name}", type=some(known), default=list(known), metavar="A,B", help=text)
    found.add_argument("--shapes", type=int, default=1500, help="default: %(default)s")
    found.add_argument("--budget", type=float, default=15, metavar="S", help="of each process (default: %(default)g)")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--rows", action="store_true", help="every row once instead of the planner's choices")
    found.add_argument("--trace", action="store_true", help="repeat the first calls under torch's profiler")
    found.add_argument("--show", type=float, default=300, metavar="US", help="least shown (default: %(default)s)")
    found.add_argument("--limit", type=float, default=1000, metavar="US", help="default: %(default)s")
    found.add_argument("--of", type=Path, nargs=2, help=argparse.SUPPRESS)  # calls and answer of in_a_process
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("first_call: torch finds no GPU here", file=sys.stderr)
        return 2
    with torch.no_grad():
        if options.of:
            of_file(options)
            return 0
        calls = todo(options)
        times = [Times(*t) for t in in_a_process(calls, options)]
        left_out = len(calls) - len(times)
        calls = calls[: len(times)]
        traces = in_a_process(calls, options, traced=True) if options.trace else []
    over = repeated(times, options.limit, lambda over: in_a_process([calls[i] for i in over], options))
    print(report(calls, times, traces, options.show))
    extra = [t.extra for t in times]
    print(f"\n{len(calls)} first calls: ", end="")
    print(f"{statistics.median(extra):.0f} us longer in the median, {statistics.mean(extra):.0f} in the mean, ", end="")
    print(f"{max(extra):.0f} at most; {sum(e > options.show for e in extra)} above {options.show:g}, ", end="")
    print(f"{len(over)} above {options.limit:g}{f'; the budget left out {left_out}' if left_out else ''}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
