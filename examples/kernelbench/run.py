"""Runs the KernelBench problems of this folder, or files of one's own, by the rules of KernelBench's harness.

    python examples/kernelbench/run.py                          # the 12 problems, full size, on the GPU
    python examples/kernelbench/run.py --problems 50,87         # two of them
    python examples/kernelbench/run.py --small --device cpu     # a few seconds each on a CPU
    python examples/kernelbench/run.py --file my_problem.py     # one's own, with its convolutions replaced

Each problem is judged twice: by the harness's tolerance against eager PyTorch, and against float64.
The exit status is 1 if a problem did not run or is wrong against float64, whatever the speed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import conv2d_ext

HERE = Path(__file__).resolve().parent

# The harness's rules.
SEED = 42
TOLERANCE = 1e-4  # atol and rtol for float32
CORRECTNESS_TRIALS = 5
WARM_UPS = 3
TRIALS, SMALL_TRIALS = 100, 10
DISCARDED = 1  # timed, and left out of the mean
FLUSH_BYTES = 256 << 20  # more than any L2 cache of today

# Beside it, of our own: float32's roundoff after a sum of 4096 terms, below which no difference to eager counts.
FLOAT32_SUM = 2.0**-24 * math.sqrt(4096)
# Operands rounded to TF32's 11 bits, where torch's flags allow it: eager may use float32 for the same layer.
TF32_ROUNDING = 2.0**-11


# ---- what runs -------------------------------------------------------------------------------------------------------


class FunctionalConv2d(TorchFunctionMode):
    """While active, `F.conv2d` is `conv2d_ext.conv2d`, under whatever name the caller has imported it."""

    calls = 0

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d:
            self.calls += 1
            func = conv2d_ext.conv2d
        return func(*args, **(kwargs or {}))


class Converted(nn.Module):
    """A model whose nn.Conv2d layers and calls of F.conv2d go to conv2d_ext."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = conv2d_ext.convert(model)
        self.layers = sum(isinstance(m, conv2d_ext.Conv2d) for m in self.model.modules())
        self.calls: int | None = None  # of F.conv2d in one forward; unknown before the first

    def forward(self, *inputs: Any) -> Any:
        if self.calls == 0:  # nothing left to intercept: don't time the interception
            return self.model(*inputs)
        with FunctionalConv2d() as functional:
            output = self.model(*inputs)
        self.calls = functional.calls
        return output


@dataclass(frozen=True)
class Problem:
    """What a problem file defines; `new` makes the model that is judged, from the arguments that `model` takes."""

    name: str
    model: Callable[..., nn.Module]
    new: Callable[..., nn.Module]
    get_inputs: Callable[[], list[Any]]
    get_init_inputs: Callable[[], list[Any]]
    shape: tuple[int, ...] | None


def shrunk(shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The input of a problem for a CPU: two images of at least 32 pixels a side, all of the channels."""
    n, c, h, w = shape
    return min(n, 2), c, max(h // 16, 32), max(w // 16, 32)


def import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--file: expected a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(path: Path, small: bool) -> Problem:
    """The problem of a file that defines Model, get_inputs and get_init_inputs, and may define ModelNew.

    `small` shrinks the file's INPUT if it has one. Without a ModelNew, Model with its convolutions replaced is judged.
    """
    module = import_file(path)
    missing = [name for name in ("Model", "get_inputs", "get_init_inputs") if not hasattr(module, name)]
    if missing:
        raise SystemExit(f"{path}: expected Model, get_inputs and get_init_inputs, got no {', '.join(missing)}")
    shape = getattr(module, "INPUT", None)
    if small and shape is not None:
        shape = module.INPUT = shrunk(shape)  # type: ignore[attr-defined]
    elif small:
        print(f"# {path.name} has no INPUT to shrink: it runs at the size it asks for")
    model = module.Model
    new = getattr(module, "ModelNew", None) or (lambda *arguments: Converted(model(*arguments)))
    return Problem(path.stem, model, new, module.get_inputs, module.get_init_inputs, shape)


def build(factory: Callable[..., nn.Module], problem: Problem, device: torch.device) -> nn.Module:
    torch.manual_seed(SEED)
    arguments = problem.get_init_inputs()
    torch.manual_seed(SEED)
    return factory(*arguments).to(device)


def draw(problem: Problem, seed: int, device: torch.device) -> list[Any]:
    # The harness draws on the CPU and copies; drawn on the device, 4 GB take milliseconds instead of seconds.
    torch.manual_seed(seed)
    with device:
        inputs = problem.get_inputs()
    return [x.to(device) if isinstance(x, Tensor) else x for x in inputs]


# ---- correctness -----------------------------------------------------------------------------------------------------


def compare(expected: Tensor, got: Tensor) -> tuple[bool, float]:
    """torch.allclose by the harness's tolerance, and the largest difference; one image at a time, to spare memory."""
    if expected.shape != got.shape:
        return False, math.inf
    if expected.dim() == 0:
        expected, got = expected[None], got[None]
    close, largest = True, 0.0
    for a, b in zip(expected, got, strict=True):
        close = close and torch.allclose(a, b, atol=TOLERANCE, rtol=TOLERANCE)
        if a.numel():
            difference = (a - b).abs_().max().item()
            largest = difference if math.isnan(difference) else max(largest, difference)
    return close, largest


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||, in float64; the plain norm of the difference where exact is all zeros."""
    norm = exact.norm().item()
    return (value.double() - exact).norm().item() / (norm or 1.0)


def against_float64(
    problem: Problem, inputs: list[Any], eager: Tensor, ours: Tensor, device: torch.device
) -> dict[str, Any]:
    """Errors of the two outputs against the model in float64: {images, ours, eager, passed}.

    Only the first and the last image are computed in float64: the last is where an overflowing offset shows. Where
    that isn't what eager computed, because the images depend on each other, the whole batch is.
    """
    batch = eager.shape[0] if eager.dim() else 1
    batched = batch > 2 and all(x.shape[:1] == (batch,) for x in inputs if isinstance(x, Tensor) and x.dim())
    model = build(problem.model, problem, device).double()

    def exact_for(images: list[int] | None) -> tuple[Tensor, float, float]:
        def pick(x: Any) -> Any:
            return x[images] if images is not None and isinstance(x, Tensor) and x.dim() else x

        def widen(x: Any) -> Any:
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        exact = model(*(widen(pick(x)) for x in inputs))
        return exact, relative_error(pick(ours), exact), relative_error(pick(eager), exact)

    images = [0, batch - 1] if batched else None
    exact, our_error, eager_error = exact_for(images)
    if images is not None and not eager_error < 1e-2:
        images = None
        del exact
        exact, our_error, eager_error = exact_for(images)
    return {
        "images": batch if images is None else len(images),
        "ours": our_error,
        "eager": eager_error,
        "passed": our_error <= 2 * eager_error + FLOAT32_SUM,
        "rounded": device.type == "cuda" and tf32_of_convolutions() == "tf32" and our_error <= TF32_ROUNDING,
    }


def check(problem: Problem, eager: nn.Module, ours: nn.Module, trials: int, device: torch.device) -> dict[str, Any]:
    """The harness's correctness trials, the first of them also against float64."""
    torch.manual_seed(SEED)
    seeds = [int(torch.randint(0, 2**32 - 1, (1,)).item()) for _ in range(trials)]
    passed, largest = 0, 0.0
    float64: dict[str, Any] = {}
    for trial, seed in enumerate(seeds):
        inputs = draw(problem, seed, device)
        expected, got = eager(*inputs), ours(*inputs)
        close, difference = compare(expected, got)
        passed += close
        largest = difference if math.isnan(difference) else max(largest, difference)
        if trial == 0 and expected.shape == got.shape:
            float64 = against_float64(problem, inputs, expected, got, device)
        del inputs, expected, got
    return {"trials": trials, "passed": passed, "max_difference": largest, "float64": float64}


# ---- time ------------------------------------------------------------------------------------------------------------


def measure(model: Callable[..., Any], inputs: list[Any], trials: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of `trials` calls with a cold cache: {mean, median, min}. CUDA events, or wall clock on a CPU."""
    for _ in range(WARM_UPS):
        model(*inputs)
    times = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        for _ in range(trials + DISCARDED):
            torch.cuda.synchronize(device)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            model(*inputs)
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end))
    else:
        for _ in range(trials + DISCARDED):
            begin = time.perf_counter()
            model(*inputs)
            times.append((time.perf_counter() - begin) * 1e3)
    times = times[DISCARDED:]
    return {"mean": statistics.fmean(times), "median": statistics.median(times), "min": min(times)}


# ---- one problem -----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table. Times are milliseconds; a field is None where nothing was measured: see `errors`."""

    problem: str
    input: str = ""
    replaced: str = ""
    ours: dict[str, float] | None = None
    eager: dict[str, float] | None = None
    compiled: dict[str, float] | None = None
    correctness: dict[str, Any] | None = None
    errors: tuple[str, ...] = ()

    def correct(self, judge: str) -> bool:
        found = self.correctness
        if found is None:
            return False
        if judge == "harness":
            return found["passed"] == found["trials"] > 0
        return bool(found["float64"].get("passed", False))

    def wrong(self) -> bool:
        """Against float64: further from it than eager, and than TF32's rounding explains where it is allowed."""
        return not self.correct("float64") and not (self.correctness or {}).get("float64", {}).get("rounded", False)

    def speedup(self, baseline: str) -> float | None:
        theirs = self.eager if baseline == "eager" else self.compiled
        return theirs["mean"] / self.ours["mean"] if theirs and self.ours else None


def run(problem: Problem, options: argparse.Namespace, device: torch.device) -> Row:
    row = Row(problem.name)

    def attempt(what: str, work: Callable[[], Any]) -> Any:
        # A problem that fails is a row of the table that says so, not the end of the run.
        try:
            return work()
        except Exception as error:
            row.errors += (
                f"{what}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
            )
            if options.verbose:
                traceback.print_exc()
            return None
        finally:
            release(device)

    def timed(factory: Callable[[], Callable[..., Any]]) -> dict[str, float]:
        return measure(factory(), draw(problem, SEED, device), options.trials, device)

    def compiled() -> Callable[..., Any]:
        torch.compiler.reset()
        return torch.compile(build(problem.model, problem, device))

    with torch.no_grad():
        eager = build(problem.model, problem, device)
        ours = attempt("ModelNew", lambda: build(problem.new, problem, device))
        if ours is not None:
            row.correctness = attempt(
                "correctness", lambda: check(problem, eager, ours, options.correctness_trials, device)
            )
            row.ours = attempt("ours", lambda: timed(lambda: ours))
        row.eager = attempt("eager", lambda: timed(lambda: eager))
        if options.compile:
            row.compiled = attempt("torch.compile", lambda: timed(compiled))
    row.input = "x".join(map(str, problem.shape)) if problem.shape else "its own"
    row.replaced = describe(ours)
    return row


def describe(ours: nn.Module | None) -> str:
    if not isinstance(ours, Converted):
        return "ModelNew"
    return f"{ours.layers} nn.Conv2d, {ours.calls or 0} F.conv2d"


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- the report ------------------------------------------------------------------------------------------------------


def fast(rows: Sequence[Row], p: float, baseline: str, judge: str) -> float | None:
    """KernelBench's fast_p: the fraction of all problems that are correct and more than p times as fast."""
    speedups = [(row.speedup(baseline), row.correct(judge)) for row in rows]
    if not any(speedup is not None for speedup, _ in speedups):
        return None
    return sum(correct and speedup is not None and speedup > p for speedup, correct in speedups) / len(rows)


def geometric_mean(rows: Sequence[Row], baseline: str) -> float | None:
    speedups = [speedup for row in rows if (speedup := row.speedup(baseline)) is not None]
    return statistics.geometric_mean(speedups) if speedups else None


def tf32_of_convolutions() -> str:
    # torch.backends.cudnn.allow_tf32 raises once the newer flag has been set, so the newer one is asked first.
    conv = getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(conv, "fp32_precision", None)
    if precision not in (None, "none"):
        return str(precision)
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def conditions(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "conv2d_ext": conv2d_ext.__version__,
        "convolutions_in_eager": tf32_of_convolutions() if gpu else "ieee",
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "size": "small" if options.small else "full",
        "trials": options.trials,
        "warm_ups": WARM_UPS,
        "clock": f"CUDA events, {FLUSH_BYTES >> 20} MiB written before each trial" if gpu else "wall clock",
        "tolerance": TOLERANCE,
    }


def number(value: float | None, form: str, width: int) -> str:
    return (format(value, form) if value is not None else "-").rjust(width)


def times(speedup: float | None, width: int = 0) -> str:
    return (f"{speedup:.2f}x" if speedup is not None else "-").rjust(width)


HEADER = (
    f"{'problem':24} {'input':>17} {'ours ms':>9} {'eager ms':>9} {'compile ms':>10} {'vs eager':>8} "
    f"{'vs compile':>10} {'harness':>7} {'max diff':>8} {'err ours':>8} {'err eager':>9} {'float64':>7}"
)


def line(row: Row) -> str:
    def mean(measured: dict[str, float] | None) -> float | None:
        return measured["mean"] if measured else None

    found = row.correctness or {}
    float64 = found.get("float64") or {}
    harness = f"{found['passed']}/{found['trials']}" if found else "-"
    verdict = ("ok" if float64["passed"] else "tf32" if float64["rounded"] else "FAILS") if float64 else "-"
    return (
        f"{row.problem:24} {row.input:>17} {number(mean(row.ours), '.3f', 9)} {number(mean(row.eager), '.3f', 9)} "
        f"{number(mean(row.compiled), '.3f', 10)} {times(row.speedup('eager'), 8)} "
        f"{times(row.speedup('compile'), 10)} {harness:>7} {number(found.get('max_difference'), '.1e', 8)} "
        f"{number(float64.get('ours'), '.1e', 8)} {number(float64.get('eager'), '.1e', 9)} {verdict:>7}"
    )


JUDGES = {"harness": f"within {TOLERANCE:g} of eager", "float64": "as near to float64"}
BASELINES = ("eager", "compile")


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "problems": len(rows),
        "correct": {judge: sum(row.correct(judge) for row in rows) for judge in JUDGES},
        "fast": {
            judge: {base: {f"fast_{p}": fast(rows, p, base, judge) for p in (1, 2)} for base in BASELINES}
            for judge in JUDGES
        },
        "geometric_mean_speedup": {base: geometric_mean(rows, base) for base in BASELINES},
    }


def report(rows: Sequence[Row]) -> str:
    found = summary(rows)
    out = [
        "",
        f"{'correct means':24} {'correct':>9} | {'vs eager: fast_1':>16} {'fast_2':>7} | "
        f"{'vs torch.compile: fast_1':>24} {'fast_2':>7}",
    ]
    for judge, meaning in JUDGES.items():
        eager, compiled = (found["fast"][judge][base] for base in BASELINES)
        out.append(
            f"{meaning:24} {found['correct'][judge]:>4} of {len(rows):>2} | {number(eager['fast_1'], '.2f', 16)} "
            f"{number(eager['fast_2'], '.2f', 7)} | {number(compiled['fast_1'], '.2f', 24)} "
            f"{number(compiled['fast_2'], '.2f', 7)}"
        )
    means = (f"{times(found['geometric_mean_speedup'][base])} vs {base}" for base in BASELINES)
    out.append(f"geometric mean of the speed, correct or not: {', '.join(means)}")
    return "\n".join(out)


def write_json(path: Path, rows: Sequence[Row], options: argparse.Namespace, device: torch.device) -> None:
    problems = [
        asdict(row)
        | {
            "correct": {judge: row.correct(judge) for judge in JUDGES},
            "speedup": {base: row.speedup(base) for base in BASELINES},
        }
        for row in rows
    ]
    data = {"conditions": conditions(options, device), "problems": problems, "summary": summary(rows)}
    path.write_text(json.dumps(data, indent=1) + "\n")


# ---- command line ----------------------------------------------------------------------------------------------------


def chosen_files(options: argparse.Namespace) -> list[Path]:
    if options.file:
        return list(options.file)
    ours = {int(path.stem[1:3]): path for path in sorted(HERE.glob("p[0-9][0-9]_*.py"))}
    if not options.problems:
        return list(ours.values())
    unknown = sorted(set(options.problems) - set(ours))
    if unknown:
        raise SystemExit(f"--problems: expected some of {', '.join(map(str, ours))}, got {unknown}")
    return [ours[number] for number in options.problems]


def parser() -> argparse.ArgumentParser:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
        return value

    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--problems", type=numbers, metavar="50,87", help="numbers of the problems (default: all 12)")
    found.add_argument(
        "--file", type=Path, action="append", help="a problem file of your own, instead of the 12; can be repeated"
    )
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--small", action="store_true", help="2 images of 1/16 of the sides, for a CPU")
    found.add_argument("--trials", type=positive, help=f"timed calls (default: {TRIALS}; {SMALL_TRIALS} with --small)")
    found.add_argument("--correctness-trials", type=positive, default=CORRECTNESS_TRIALS)
    found.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    found.add_argument("--json", type=Path, help="write the results to this file as well, after each problem")
    found.add_argument("--verbose", action="store_true", help="print the traceback of what fails")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    options.trials = options.trials or (SMALL_TRIALS if options.small else TRIALS)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    problems = [load(path, options.small) for path in chosen_files(options)]
    print("# " + ", ".join(f"{key} {value}" for key, value in conditions(options, device).items() if value is not None))
    print(HEADER, flush=True)
    rows: list[Row] = []
    for problem in problems:
        row = run(problem, options, device)
        rows.append(row)
        print(line(row), flush=True)
        if row.replaced != "ModelNew":
            print(f"    replaced: {row.replaced}")
        for error in row.errors:
            print(f"    {error}", flush=True)
        if options.json:
            write_json(options.json, rows, options, device)
    print(report(rows))
    # A torch.compile that does not work here leaves a column empty, no more.
    return 0 if all(row.ours and row.eager and not row.wrong() for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
