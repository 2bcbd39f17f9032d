"""Times every row of the kernel table over random layers: how far is the planner's choice from the best row?

    python benchmarks/sweep.py                                   # 200 shapes, all three ops of each
    python benchmarks/sweep.py --kinds depthwise --dtypes fp16 --shapes 1000 --budget 120 --seed 3 --json sweep.json
    python benchmarks/sweep.py --kinds network --dtypes fp16,tf32 --reach 2.6 --shapes 250  # dense layers of networks
    python benchmarks/sweep.py --torch                           # F.conv2d with cudnn.benchmark beside them
    python benchmarks/sweep.py --replay sweep.json               # its times with today's estimates; needs no GPU
    python benchmarks/sweep.py --cliffs                          # neighbouring sizes instead of random ones

Regret is the time of the row that make_plan takes over that of the best row. The JSON has every row's time and
estimate, to fit the estimates of csrc/core. A row is timed by CUDA events around replays of a graph of one call, each
after a write that fills L2; rows near the best are timed again, in turn, and their medians count; where that leaves a
regret above --again, the medians of 15 later replays do. Rows estimated at over --reach times the least, and at more
than the chosen one takes, are left out.

By cause: problems whose regret is above 1.1, by op, layout and the families of the chosen and the best row. Where the
chosen row's time over its estimate is high, that is too low; where the best one's is low, that is too high. Then what
the regret would be if the estimates of one family alone were exact.

--cliffs walks along C, K, W, the filter's size, groups and the batch, one at a time. The cost of a layer is its time
over what its bytes and flops take at the machine's measured rates, plus a launch; it prints the worst ratio of the
costs of two neighbours, and the exit status is 1 if that is above --jump. Each walk is timed twice, the lesser median
counts, and the ratio of the two is printed as the step's noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE)]  # Python may have left the script's own folder out

import shapes  # noqa: E402
from cases import Case  # noqa: E402
from shapes import KINDS, OPS, STORAGE, some  # noqa: E402

from conv2d_ext.cli import bench, float32_precision, plain_table  # noqa: E402
from conv2d_ext.cli.info import machine  # noqa: E402

DTYPES = ("fp16", "bf16", "tf32", "fp32")
LAYOUTS = ("nchw", "nhwc")
LAUNCH_S = 3e-6  # that no kernel is faster than


# ---- results ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Problem:
    """One shape, op, dtype and layout. Times are microseconds; `rows` maps a row to (time, estimate)."""

    kind: str
    case: Case
    op: str
    dtype: str
    layout: str
    chosen: str = ""
    rows: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    left_out: int = 0
    torch_us: float | None = None

    @property
    def best(self) -> str:
        return min(self.rows, key=lambda name: self.rows[name][0])

    @property
    def regret(self) -> float:
        return self.rows[self.chosen][0] / self.rows[self.best][0]

    def to_json(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"case": dataclasses.asdict(self.case), "best": self.best, "regret": self.regret}


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def summary(problems: Sequence[Problem]) -> list[tuple[str, int, float, float, list[float]]]:
    """(group, problems, geometric mean of the regret, worst regret, torch's times over ours)."""
    order = ("all", *KINDS, *OPS, *STORAGE, *LAYOUTS)
    groups: dict[str, list[Problem]] = {name: [] for name in order} | {"all": list(problems)}
    for p in sorted(problems, key=lambda p: [order.index(name) for name in (p.kind, p.op, p.dtype, p.layout)]):
        both = f"{p.dtype} {p.layout}"
        for name in (p.kind, p.op, p.dtype, p.layout, both, f"{p.kind} {p.op} {both}"):
            groups.setdefault(name, []).append(p)
    found = []
    for name, members in groups.items():
        if not members:
            continue
        regrets = [p.regret for p in members]
        ratios = [p.torch_us / p.rows[p.chosen][0] for p in members if p.torch_us]
        found.append((name, len(members), geometric_mean(regrets), max(regrets), ratios))
    return found


NOTABLE = 1.1  # regret of problems whose cause is looked for


def family(row: str) -> str:
    """A row's name without its op, dtype and tile: "tma halo"."""
    found = re.fullmatch(r"(\w+?)_(?:fprop|dgrad|wgrad)_b?f\d+_\d+x\d+_([a-z][a-z0-9_]*?)(?:_s\d)?", row)
    return f"{found[1]} {found[2]}" if found else row


@dataclasses.dataclass(frozen=True)
class Cause:
    """Problems of an op and layout whose regret is notable and whose chosen and best rows are of these families."""

    where: str
    chosen: str
    best: str
    problems: Sequence[Problem]

    @property
    def loss(self) -> float:
        return sum(math.log(p.regret) for p in self.problems)

    def cells(self, everything: float) -> tuple[str, ...]:
        off = [
            geometric_mean(us / estimate for us, estimate in rows)
            for rows in ([p.rows[p.chosen] for p in self.problems], [p.rows[p.best] for p in self.problems])
        ]
        worst = max(p.regret for p in self.problems)
        return (
            *(self.where, self.chosen, self.best, str(len(self.problems)), f"{worst:.2f}"),
            *(f"{self.loss / everything:.1%}", f"{off[0]:.2f}", f"{off[1]:.2f}"),
        )


def causes(problems: Sequence[Problem]) -> list[Cause]:
    """The one that loses most first."""
    groups: dict[tuple[str, str, str], list[Problem]] = {}
    for p in problems:
        if p.regret > NOTABLE:
            groups.setdefault((f"{p.op} {p.layout}", family(p.chosen), family(p.best)), []).append(p)
    return sorted((Cause(*names, members) for names, members in groups.items()), key=lambda cause: -cause.loss)


def exact_estimates(problems: Sequence[Problem]) -> list[tuple[str, int, float, float]]:
    """(family, its rows' times, their scatter, regret if its estimates were exact), the least regret first.

    Exact: the rows' times, as far off in the mean as the family's estimates are. Scatter: standard deviation of the
    logarithm of time over estimate.
    """
    logs: dict[str, list[float]] = {}
    for p in problems:
        for row, (us, estimate) in p.rows.items():
            logs.setdefault(family(row), []).append(math.log(us / estimate))
    found = []
    for name, values in logs.items():
        mean, regrets = math.exp(statistics.fmean(values)), []
        for p in problems:
            estimates = {row: us / mean if family(row) == name else e for row, (us, e) in p.rows.items()}
            chosen = min(estimates, key=estimates.__getitem__)
            regrets.append(p.rows[chosen][0] / p.rows[p.best][0])
        found.append((name, len(values), statistics.pstdev(values), geometric_mean(regrets)))
    return sorted(found, key=lambda line: line[3])


def report_causes(problems: Sequence[Problem], most: int = 24) -> str:
    everything = sum(math.log(p.regret) for p in problems)
    by_cause = [cause.cells(everything) for cause in causes(problems)[:most]]
    columns = ("problem", "chosen", "best", "problems", "worst", "share", "chosen / estimate", "best / estimate")
    over = ", ".join(f"{sum(p.regret > limit for p in problems)} above {limit:g}" for limit in (NOTABLE, 1.25, 1.5))
    exact = [
        (name, str(count), f"{scatter:.2f}", f"{regret:.4f}")
        for name, count, scatter, regret in exact_estimates(problems)[: most // 2]
    ]
    return (
        f"regret: {over}\n{plain_table(columns, by_cause, columns[:3])}\n\n"
        f"regret if the estimates of one family were exact, now {geometric_mean(p.regret for p in problems):.4f}\n"
        f"{plain_table(('family', 'times', 'scatter', 'regret'), exact, ('family',))}"
    )


def report(problems: Sequence[Problem]) -> str:
    columns = ("group", "problems", "regret", "worst", "torch / ours", "least", "below 0.97")
    lines = [
        (
            *(name, str(count), f"{mean:.3f}", f"{worst:.2f}"),
            *(
                (f"{geometric_mean(ratios):.2f}", f"{min(ratios):.2f}", str(sum(r < 0.97 for r in ratios)))
                if ratios
                else "---"
            ),
        )
        for name, count, mean, worst, ratios in summary(problems)
    ]
    worst_ten = sorted(problems, key=lambda p: -p.regret)[:10]
    shown = [
        (
            f"{p.regret:.2f}",
            f"{p.op} {p.dtype} {p.layout}",
            shapes.text(p.case),
            f"{p.chosen} {p.rows[p.chosen][0]:.1f} us",
            f"{p.best} {p.rows[p.best][0]:.1f} us",
        )
        for p in worst_ten
    ]
    names = ("regret", "problem", "shape", "chosen", "best")
    return (
        f"{plain_table(columns, lines, columns[:1])}\n\nthe worst ten\n{plain_table(names, shown, names[1:])}\n\n"
        f"{report_causes(problems)}"
    )


# ---- time ------------------------------------------------------------------------------------------------------------


class Replay:
    """A call in a CUDA graph, which keeps its tensors. torch.cuda.graph would empty the allocator's cache each time."""

    def __init__(self, call: Callable[[], object], pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
        self.call, self.graph = call, torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self.graph.capture_begin(pool=pool)
            call()
            self.graph.capture_end()


class Stopwatch:
    """Microseconds of calls, each replayed after a write that fills L2 and hides the host's work.

    A replay is one call of the driver. An eager call takes the host longer than that write takes the GPU if it has to
    wait for memory or for its core, and all later calls then show the host's time.
    """

    def __init__(self) -> None:
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        torch.zeros(1, device="cuda")
        self.keeps_the_pool = self.capture(lambda: torch.zeros(1, device="cuda"))

    def capture(self, call: Callable[[], object]) -> Replay:
        """Of a call that has run before. Its result is gone; the next capture may use its memory."""
        return Replay(call, self.pool, self.stream)

    def in_turn(self, replays: Sequence[Replay], repeats: int) -> list[list[float]]:
        def event() -> torch.cuda.Event:
            return torch.cuda.Event(enable_timing=True)

        events = [[(event(), event()) for _ in range(repeats)] for _ in replays]
        torch.cuda._sleep(300_000)  # the host gets ahead
        for i in range(repeats):
            for replay, pairs in zip(replays, events, strict=True):
                self.flush.zero_()
                pairs[i][0].record()
                replay.graph.replay()
                pairs[i][1].record()
        torch.cuda.synchronize()
        return [[1e3 * a.elapsed_time(b) for a, b in pairs] for pairs in events]


def operands(case: Case, dtype: str, layout: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and grad_output of random values."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format

    def draw(size: tuple[int, ...]) -> Tensor:
        made = torch.empty(size, dtype=STORAGE[dtype], device=device).to(memory_format=memory_format)
        return made.normal_(generator=generator)

    return draw(case.input_size), draw(case.weight_size), draw(case.output_size)


def torch_call(op: str, case: Case, x: Tensor, w: Tensor, go: Tensor) -> Callable[[], object]:
    stride, padding, dilation, groups = case.args
    if op == "fprop":
        return lambda: torch.nn.functional.conv2d(x, w, None, stride, padding, dilation, groups)
    mask = [op == "dgrad", op == "wgrad", False]
    return lambda: torch.ops.aten.convolution_backward(
        go, x, w, None, stride, padding, dilation, False, [0, 0], groups, mask
    )


def measure(p: Problem, tensors: tuple[Tensor, Tensor, Tensor], watch: Stopwatch, options: argparse.Namespace) -> None:
    """Fills in the times of a problem's rows."""
    x, w, go = tensors
    tf32 = p.dtype == "tf32"
    run = shapes.call(p.op, p.case, x, w, None, go, tf32)
    made = run(-1)
    problem = {"fprop": (x, w, made), "dgrad": (made, w, go), "wgrad": (x, made, go)}[p.op]
    chosen, estimates = shapes.plan(p.op, p.case, *problem, tf32)
    del made, problem
    names = torch.ops.conv2d_ext.kernels()
    least = min(estimates.values())
    taken = watch.in_turn([watch.capture(lambda: run(chosen))], 1)[0][0]
    rows = [row for row, us in estimates.items() if us <= max(options.reach * least, taken) or row == chosen]
    p.left_out = len(estimates) - len(rows)
    calls = {}
    for row in rows:
        run(row)
        calls[row] = watch.capture(lambda row=row: run(row))
    once = [times[1] for times in watch.in_turn(list(calls.values()), 2)]  # a graph's first replay may take longer
    times: dict[int, list[float]] = {row: [us] for row, us in zip(rows, once, strict=True)}
    for near, repeats in ((2.0, 4), (1.2, 6)):
        best = min(statistics.median(t) for t in times.values())
        again = [row for row in rows if row == chosen or statistics.median(times[row]) <= near * best]
        if len(again) > 1:
            for row, more in zip(again, watch.in_turn([calls[row] for row in again], repeats), strict=True):
                times[row] += more
    p.chosen = names[chosen]
    p.rows = {names[row]: (statistics.median(times[row]), estimates[row]) for row in rows}
    if p.regret > options.again:  # lest what disturbed one time count
        near = [row for row in rows if row == chosen or p.rows[names[row]][0] <= 1.2 * p.rows[p.best][0]]
        torch.cuda.synchronize()
        time.sleep(0.005)
        for row, more in zip(near, watch.in_turn([calls[row] for row in near], 15), strict=True):
            p.rows[names[row]] = (statistics.median(more), estimates[row])
    if options.torch and len(p.case.padding) == 2:
        theirs = torch_call(p.op, p.case, x, w, go)
        with bench.cudnn(enabled=True, benchmark=True), float32_precision("tf32" if tf32 else "ieee"):
            theirs()
            theirs()
            # In turn, as the rows: a kernel that ran just before finds its instructions in the caches of the SMs.
            p.torch_us = statistics.median(watch.in_turn([calls[chosen], watch.capture(theirs)], 7)[1])


# ---- random layers ---------------------------------------------------------------------------------------------------


def drawn(options: argparse.Namespace) -> Iterator[tuple[str, Case, str, str]]:
    """(kind, shape, dtype, layout), the same for a seed whatever the machine."""
    draw = random.Random(options.seed)
    for _ in range(options.shapes):
        kind = draw.choice(options.kinds)
        case = shapes.layer(draw, kind, options.most_elements, options.most_gflops * 1e9)
        yield kind, case, draw.choice(options.dtypes), draw.choice(options.layouts)


def run_random(options: argparse.Namespace) -> int:
    begin, watch = time.monotonic(), Stopwatch()
    problems: list[Problem] = []
    stopped = ""
    for kind, case, dtype, layout in drawn(options):
        if options.budget and time.monotonic() - begin > options.budget:
            stopped = f"; the budget of {options.budget:g} s is spent"
            break
        tensors = operands(case, dtype, layout, "cuda")
        for op in options.ops:
            p = Problem(kind, case, op, dtype, layout)
            measure(p, tensors, watch, options)
            problems.append(p)
    print(report(problems))
    print(f"\n{len(problems)} problems, {sum(len(p.rows) for p in problems)} rows timed, ", end="")
    print(f"{sum(p.left_out for p in problems)} left out, {time.monotonic() - begin:.0f} s{stopped}")
    write(options, [p.to_json() for p in problems], stopped)
    return 0


def write(options: argparse.Namespace, problems: list[dict[str, Any]], stopped: str = "", **more: object) -> None:
    if options.json:
        given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        data = {"machine": machine(), "options": given, "stopped": stopped, **more, "problems": problems}
        options.json.write_text(json.dumps(data, indent=1) + "\n")


# ---- replay --------------------------------------------------------------------------------------------------------


def replayed(stored: dict[str, Any]) -> Problem:
    """A problem of a JSON of this program, with the choice and the estimates of today."""
    case = Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored["case"].items()})
    p = Problem(stored["kind"], case, stored["op"], stored["dtype"], stored["layout"], torch_us=stored["torch_us"])
    x, w, go = operands(case, p.dtype, p.layout, "meta")
    made = shapes.call(p.op, case, x, w, None, go, p.dtype == "tf32")(-1)
    tensors = {"fprop": (x, w, made), "dgrad": (made, w, go), "wgrad": (x, made, go)}[p.op]
    chosen, estimates = shapes.plan(p.op, case, *tensors, p.dtype == "tf32")
    names = torch.ops.conv2d_ext.kernels()
    today = {names[row]: us for row, us in estimates.items()}
    p.chosen = names[chosen]
    p.rows = {row: (us, today[row]) for row, (us, _) in stored["rows"].items() if row in today}
    return p


def run_replay(options: argparse.Namespace) -> int:
    stored = [p for file in options.replay for p in json.loads(file.read_text())["problems"]]
    problems = [replayed(p) for p in stored]
    timed = [p for p in problems if p.chosen in p.rows]
    print(report(timed))
    changed = sum(p.chosen != before["chosen"] for p, before in zip(problems, stored, strict=True))
    before = [p["regret"] for p in stored]
    print(
        f"\n{len(stored)} problems, {changed} choices changed, {len(problems) - len(timed)} to rows without a time; ",
        end="",
    )
    print(f"regret when they were timed {geometric_mean(before):.4f}, worst {max(before):.2f}")
    return 0


# ---- cliffs ----------------------------------------------------------------------------------------------------------

AROUND = (32, 40, 48, 56, 60, 63, 64, 65, 68, 72, 80, 96, 112, 120, 127, 128, 129, 136, 160)
BATCHES = (8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96)
WIDTHS = tuple(range(40, 73))


def sweeps() -> dict[str, list[tuple[int, Case]]]:
    """Name of a walk -> (value of what changes, layer)."""

    def depthwise(N: int = 32, C: int = 128, W: int = 56, R: int = 3, stride: int = 1) -> Case:
        return Case("cliff", N, C, 56, W, C, R, R, (stride, stride), (R // 2, R // 2), (1, 1), C, bias=False)

    def dense(N: int = 32, C: int = 128, K: int = 128, W: int = 28, R: int = 3, stride: int = 1) -> Case:
        return Case("cliff", N, C, 28, W, K, R, R, (stride, stride), (R // 2, R // 2), bias=False)

    def grouped(N: int = 32, per_group: int = 16, groups: int = 16, W: int = 28) -> Case:
        C = per_group * groups
        return Case("cliff", N, C, 28, W, C, 3, 3, (1, 1), (1, 1), (1, 1), groups, bias=False)

    return {
        "depthwise C": [(v, depthwise(C=v)) for v in AROUND],
        "depthwise W": [(v, depthwise(W=v)) for v in WIDTHS],
        "depthwise stride 2 W": [(v, depthwise(W=v, stride=2)) for v in WIDTHS],
        "depthwise R": [(v, depthwise(R=v, C=64)) for v in range(1, 32, 2)],
        "depthwise N": [(v, depthwise(N=v)) for v in BATCHES],
        "dense C": [(v, dense(C=v)) for v in AROUND],
        "dense K": [(v, dense(K=v)) for v in AROUND],
        "dense W": [(v, dense(W=v)) for v in range(20, 41)],
        "dense R": [(v, dense(R=v)) for v in range(1, 10, 2)],
        "dense N": [(v, dense(N=v)) for v in BATCHES],
        "dense stride 2 N": [(v, dense(N=v, stride=2)) for v in BATCHES],
        "grouped C/groups": [(v, grouped(per_group=v)) for v in (2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64)],
        "grouped groups": [(v, grouped(groups=v)) for v in (2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)],
        "grouped W": [(v, grouped(W=v)) for v in range(20, 41)],
        "grouped N": [(v, grouped(N=v)) for v in BATCHES],
    }


@dataclasses.dataclass(frozen=True)
class Step:
    """Two neighbours of a walk. Costs are times over what the machine's rates allow."""

    walk: str
    values: tuple[int, int]
    microseconds: tuple[float, float]
    costs: tuple[float, float]
    kernels: tuple[str, str]
    noise: float  # the greater of two medians of a point's time over the lesser

    @property
    def jump(self) -> float:
        a, b = self.costs
        return max(a / b, b / a)


def limit_us(case: Case, dtype: str, peaks: dict[str, float]) -> float:
    nbytes = sum(shapes.elements(case)) * STORAGE[dtype].itemsize
    return 1e6 * (LAUNCH_S + max(nbytes / peaks["copy"], shapes.flops(case) / peaks[dtype]))


@dataclasses.dataclass(frozen=True)
class Point:
    """A layer of a walk. `medians`: microseconds, of two turns."""

    value: int
    medians: tuple[float, float]
    limit: float
    kernel: str

    @property
    def microseconds(self) -> float:
        return min(self.medians)

    @property
    def noise(self) -> float:
        return max(self.medians) / min(self.medians)


def steps_of(walk: str, points: Sequence[Point]) -> list[Step]:
    return [
        Step(
            walk,
            (a.value, b.value),
            (a.microseconds, b.microseconds),
            (a.microseconds / a.limit, b.microseconds / b.limit),
            (a.kernel, b.kernel),
            max(a.noise, b.noise),
        )
        for a, b in zip(points, points[1:], strict=False)
    ]


def run_cliffs(options: argparse.Namespace) -> int:
    begin, watch, device = time.monotonic(), Stopwatch(), torch.device("cuda")
    peaks = bench.measure_peaks(bench.CudaTimer(device), device, sorted({*options.dtypes, "tf32"}))
    if "fp32" in peaks:  # three products in TF32 for one
        peaks["fp32"] = max(peaks["fp32"], peaks["tf32"] / 3)
    names, stopped = torch.ops.conv2d_ext.kernels(), ""
    steps: list[Step] = []
    noises: list[float] = []
    todo = [
        (w, d, y) for w in sweeps() if w.split()[0] in options.kinds for d in options.dtypes for y in options.layouts
    ]
    random.Random(options.seed).shuffle(todo)  # so that a short budget still sees something of everything
    for walk, dtype, layout in todo:
        if options.budget and time.monotonic() - begin > options.budget:
            stopped = f"; the budget of {options.budget:g} s is spent"
            break
        replays, about = [], []
        for value, case in sweeps()[walk]:
            x, w, go = operands(case, dtype, layout, "cuda")
            for op in options.ops:
                run = shapes.call(op, case, x, w, None, go, dtype == "tf32")
                made = run(-1)
                problem = {"fprop": (x, w, made), "dgrad": (made, w, go), "wgrad": (x, made, go)}[op]
                kernel = names[shapes.plan(op, case, *problem, dtype == "tf32")[0]]
                del made, problem
                replays.append(watch.capture(lambda run=run: run(-1)))
                about.append((op, value, limit_us(case, dtype, peaks), kernel))
        turns = [[statistics.median(times) for times in watch.in_turn(replays, 5)] for _ in range(2)]
        points: dict[str, list[Point]] = {op: [] for op in options.ops}
        for (op, value, limit, kernel), *medians in zip(about, *turns, strict=True):
            points[op].append(Point(value, (medians[0], medians[1]), limit, kernel))
        for op, found in points.items():
            steps += steps_of(f"{op} {dtype} {layout} {walk}", found)
            noises += [point.noise for point in found]
    steps.sort(key=lambda step: -step.jump)
    rows = [
        (
            f"{s.jump:.2f}",
            s.walk,
            f"{s.values[0]} -> {s.values[1]}",
            f"{s.microseconds[0]:.1f} -> {s.microseconds[1]:.1f}",
            f"{s.costs[0]:.2f} -> {s.costs[1]:.2f}",
            f"{s.noise:.2f}",
            s.kernels[0] if s.kernels[0] == s.kernels[1] else f"{s.kernels[0]} -> {s.kernels[1]}",
        )
        for s in steps[: options.show]
    ]
    columns = ("jump", "walk", "values", "us", "cost", "noise", "kernel")
    print(plain_table(columns, rows, columns[1:]))
    over = sum(step.jump > options.jump for step in steps)
    worst = steps[0].jump if steps else math.nan
    print(f"\n{len(steps)} pairs of neighbours, worst {worst:.2f}, {over} above {options.jump:g}{stopped}")
    if noises:
        print(f"{len(noises)} points timed twice, noise {geometric_mean(noises):.3f} in the mean, worst ", end="")
        print(f"{max(noises):.2f}, {sum(noise > 1.1 for noise in noises)} above 1.1")
    write(options, [dataclasses.asdict(s) | {"jump": s.jump} for s in steps], stopped, peaks=peaks)
    return 1 if over or not steps else 0


# ---- command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, known, default in (
        ("kinds", KINDS, KINDS),
        ("dtypes", tuple(STORAGE), DTYPES),
        ("layouts", LAYOUTS, LAYOUTS),
        ("ops", OPS, OPS),
    ):
        text = f"of {', '.join(known)}; default: {'all' if known == default else ','.join(default)}"
        found.add_argument(f"--{name}", type=some(known), default=list(default), metavar="A,B", help=text)
    found.add_argument("--shapes", type=int, default=200, help="default: %(default)s")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--budget", type=float, metavar="SECONDS", help="start no shape after this time")
    found.add_argument("--most-elements", type=float, default=2**25, help="of a tensor (default: %(default)g)")
    found.add_argument("--most-gflops", type=float, default=40, help="of a layer (default: %(default)g)")
    found.add_argument("--reach", type=float, default=50, help="times the least estimate (default: %(default)g)")
    found.add_argument("--again", type=float, default=1.15, help="regret above which rows are timed anew")
    found.add_argument("--torch", action="store_true", help="time F.conv2d with cudnn.benchmark as well")
    found.add_argument("--json", type=Path, metavar="FILE", help="write every time here")
    found.add_argument("--replay", type=Path, nargs="+", metavar="FILE", help="no new times: those of these JSON files")
    found.add_argument("--cliffs", action="store_true", help="compare neighbouring sizes instead")
    found.add_argument("--jump", type=float, default=1.5, help="most that --cliffs allows (default: %(default)s)")
    found.add_argument("--show", type=int, default=20, help="steps that --cliffs prints (default: %(default)s)")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.replay:
        return run_replay(options)
    if not torch.cuda.is_available():
        print("sweep: torch finds no GPU here, and the rows of the table are GPU kernels", file=sys.stderr)
        return 2
    with torch.no_grad():
        return run_cliffs(options) if options.cliffs else run_random(options)


if __name__ == "__main__":
    sys.exit(main())
