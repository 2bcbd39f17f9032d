"""Runs compute-sanitizer over the tests marked for it: one line per tool, exit status 0 if all are clean.

    python scripts/sanitize.py                                      # memcheck, racecheck and synccheck
    python scripts/sanitize.py --tools racecheck
    python scripts/sanitize.py -- -k dgrad                          # the rest goes to pytest

conv2d_ext must be importable, and its kernels launched by the tests; only those are instrumented, since cuDNN's,
which the tests use as a reference, would take most of the time. In place of PyTorch's caching allocator each tensor is
an allocation of its own, so that an access past its end is seen; a stream-ordered one, since cudaMalloc and cudaFree
go to the driver and wait for the GPU.

memcheck runs the tests marked `sanitizer`, which reach every edge, each op's in a process of its own: no two ops share
a kernel. (12 processes that shared out the cases, and so all ran all kernels, had half the speed of one.) Under
racecheck a launch takes 0.05 to 0.3 s on an H200, however often the kernel has run: it and synccheck run the tests
marked `once`, one launch of each row but bfloat16's, whose kernels are float16's with another type.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
DEFAULT_TOOLS = ("memcheck", "racecheck", "synccheck")
# Of the tests that a tool runs, by process.
EDGES = tuple(f"sanitizer and {op}" for op in ("fprop", "dgrad", "wgrad"))
MARKS = {"memcheck": EDGES, "racecheck": ("once",), "synccheck": ("once",), "initcheck": EDGES}
FOUND = 86  # exit status of compute-sanitizer when the tool found something; pytest's own are 0 to 5
NAMESPACE = "conv2d_ext"  # of our kernels: part of their mangled names

# Racecheck counts hazards, the other tools errors. memcheck's second line, "... errors were not printed", is not a sum.
ERRORS = re.compile(r"^=+ ERROR SUMMARY: (\d+) errors?\s*$", re.MULTILINE)
HAZARDS = re.compile(r"^=+ RACECHECK SUMMARY: (\d+) hazards? displayed", re.MULTILINE)

# Launches one of our kernels, and again under torch's profiler; prints the names of all kernels that it saw.
KERNEL_NAMES = """
import torch, conv2d_ext
from torch.profiler import ProfilerActivity, profile
x, w = torch.ones(1, 4, 8, 8, device="cuda"), torch.ones(4, 4, 3, 3, device="cuda")
conv2d_ext.conv2d(x, w)
torch.cuda.synchronize()
try:
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        conv2d_ext.conv2d(x, w)
        torch.cuda.synchronize()
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            print("kernel", event.name)
except RuntimeError as error:
    print("the profiler does not work here:", error)
"""


# ---- pieces that gpu_record.py uses too ------------------------------------------------------------------------------


@dataclass
class Counts:
    """What a pytest run did, from its junit XML. Reasons and failures map a text to how often it came."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    skip_reasons: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)


def count_tests(junit: Path) -> Counts | None:
    """The counts of a junit XML file; None where pytest has not written one. A setup error counts as a failure."""
    try:
        cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return None
    counts, reasons, failures = Counts(), Counter[str](), Counter[str]()
    for case in cases:
        broken = [e for kind in ("failure", "error") for e in case.iter(kind)]
        skipped = case.find("skipped")
        if broken:
            counts.failed += 1
            message = (broken[0].get("message") or "").strip().splitlines()
            failures[f"{case.get('classname')}::{case.get('name')}: {message[0] if message else ''}"[:300]] += 1
        elif skipped is not None:
            counts.skipped += 1
            reasons[skipped.get("message") or skipped.get("type") or "no reason given"] += 1
        else:
            counts.passed += 1
    counts.skip_reasons, counts.failures = dict(reasons.most_common()), dict(failures.most_common(20))
    return counts


@dataclass(frozen=True)
class Finished:
    """A command that has ended: `code` is None if it ran past its time; `output` is stdout and stderr together."""

    code: int | None
    output: str
    seconds: float


def run_command(
    command: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    timeout: float,
    meanwhile: Callable[[], None] = lambda: None,
    every: float = 10,
) -> Finished:
    """Runs a command with its output kept in memory. Past `timeout` seconds it is interrupted, which lets pytest write
    its report, and 20 seconds later its whole process group is killed. Until then `meanwhile` is called, `every` so
    many seconds."""
    begin = time.monotonic()
    end = begin + timeout
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            list(command), stdout=log, stderr=subprocess.STDOUT, env=dict(env), cwd=cwd, start_new_session=True
        )
        code: int | None = None
        try:
            while end - time.monotonic() > every and code is None:
                try:
                    code = process.wait(every)
                except subprocess.TimeoutExpired:
                    meanwhile()
            code = process.wait(max(end - time.monotonic(), 0)) if code is None else code
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # compute-sanitizer does not hand it on
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                pass
        finally:
            try:  # also children that outlived it
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        log.seek(0)
        return Finished(code, log.read(), round(time.monotonic() - begin, 1))


def visible_gpus(env: Mapping[str, str]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES names; nothing where it isn't set."""
    return [gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]


def tail(text: str, lines: int = 15) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def first_findings(output: str, lines: int = 40) -> str:
    """The first lines that compute-sanitizer itself wrote, without host frames: later findings follow from them."""
    own = [line for line in output.splitlines() if line.startswith("=========") and "Host Frame" not in line]
    return "\n".join(own[:lines])


# ---- one tool --------------------------------------------------------------------------------------------------------


@dataclass
class ToolResult:
    """`findings` are errors, or hazards for racecheck; None where the tool has printed no summary."""

    tool: str
    status: str = "not run"  # or "passed", "failed"
    findings: int | None = None
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        what = "hazards" if self.tool == "racecheck" else "errors"
        found = "no summary" if self.findings is None else f"{self.findings} {what}"
        tests = f"tests: {self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        why = f"; {self.reason}" if self.reason else ""
        return f"{self.tool}: {self.status}: {found}; {tests}; {self.seconds:.0f} s{why}"


def findings(tool: str, output: str) -> int | None:
    """The sum over the summaries of all processes in compute-sanitizer's output; None if there is no summary."""
    found = (HAZARDS if tool == "racecheck" else ERRORS).findall(output)
    return sum(map(int, found)) if found else None


def judge(tool: str, finished: Finished, counts: Counts | None) -> ToolResult:
    """Clean only if the tool gave a summary of nothing, pytest succeeded, and at least one test ran."""
    counts = counts or Counts()
    result = ToolResult(
        tool,
        "failed",
        findings(tool, finished.output),
        counts.passed,
        counts.failed,
        counts.skipped,
        finished.seconds,
    )
    if finished.code is None:
        result.reason = "ran out of time"
    elif result.findings is None:
        result.reason = f"exit status {finished.code}, and no summary in its output"
    elif result.findings or finished.code == FOUND:
        result.reason = "see the output above"
    elif finished.code != 0:
        result.reason = f"pytest failed with exit status {finished.code}"
    elif not counts.passed:
        result.reason = "no test ran"
    else:
        result.status = "passed"
    return result


def together(tool: str, parts: Sequence[ToolResult]) -> ToolResult:
    """A tool's result, of those of its processes."""
    found = [part.findings for part in parts if part.findings is not None]
    return ToolResult(
        tool,
        "passed" if all(part.status == "passed" for part in parts) else "failed",
        sum(found) if len(found) == len(parts) else None,
        sum(part.passed for part in parts),
        sum(part.failed for part in parts),
        sum(part.skipped for part in parts),
        max(part.seconds for part in parts),
        "; ".join(dict.fromkeys(part.reason for part in parts if part.reason)),
    )


def sanitizer_command(
    program: str, tool: str, marks: str, only: str, junit: Path, pytest_arguments: Sequence[str], tests: Path
) -> list[str]:
    return [
        program,
        *("--tool", tool),
        *("--target-processes", "all"),  # a python in a virtual environment may be a launcher
        *("--error-exitcode", str(FOUND)),
        *(
            "--report-api-errors",
            "no",
        ),  # torch probes the driver for functions that it may lack; launches it checks itself
        *("--print-limit", "20"),
        *(("--kernel-name", f"kns={only}") if only else ()),  # kns: a part of the mangled name
        *(sys.executable, "-m", "pytest", str(tests), "-m", marks, "--device", "cuda"),
        *("-p", "no:cacheprovider", "-p", "no:xdist", "-o", "timeout=0", "-q", f"--junitxml={junit}"),
        *pytest_arguments,
    ]


# ---- the whole -------------------------------------------------------------------------------------------------------


def find_program(given: str | None) -> str | None:
    """compute-sanitizer: as given, on PATH, or in the toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = [given] if given else ["compute-sanitizer", f"{home}/bin/compute-sanitizer"]
    return next((found for candidate in candidates if (found := shutil.which(candidate))), None)


def filter_problem(only: str, env: Mapping[str, str], cwd: Path) -> tuple[bool, str]:
    """Whether the filter meets the kernels that conv2d_ext launches: (False, why not) stops the run.

    A filter that meets nothing would make every tool report no errors.
    """
    finished = run_command([sys.executable, "-c", KERNEL_NAMES], env, cwd, 120)
    if finished.code != 0:
        return False, f"conv2d_ext launches no kernel here:\n{tail(finished.output)}"
    names = [line.removeprefix("kernel ") for line in finished.output.splitlines() if line.startswith("kernel ")]
    if not names:
        return True, "torch's profiler saw no kernel, so it is not known whether the filter meets ours"
    if not any(only in name for name in names):
        return False, f"the filter {only!r} meets none of the kernels that conv2d_ext launched: {names}"
    return True, ""


def parser() -> argparse.ArgumentParser:
    def tools(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := sorted(set(chosen) - set(TOOLS)):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(TOOLS)}, got {', '.join(unknown)}")
        return chosen

    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--tools", type=tools, default=list(DEFAULT_TOOLS), metavar="A,B", help="default: %(default)s")
    found.add_argument("--timeout", type=float, default=600, help="seconds for all tools (default: %(default)s)")
    found.add_argument(
        "--only", default=NAMESPACE, help="part of the names of the kernels to check; empty: all kernels"
    )
    # All marked tests are in this file; to collect the others as well takes seconds, and under a tool many more.
    found.add_argument("--tests", type=Path, default=ROOT / "tests" / "test_rows.py", help="file or folder of tests")
    found.add_argument("--together", action="store_true", help="run the tools beside each other: sooner done")
    found.add_argument("--json", type=Path, help="write the results to this file as well, after each tool")
    found.add_argument("--program", help="compute-sanitizer, if it is not on PATH or in CUDA_HOME")
    found.add_argument("pytest_arguments", nargs="*", metavar="-- ...", help="for pytest")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    results = [ToolResult(tool) for tool in options.tools]

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")

    def give_up(reason: str) -> int:
        for result in results:
            result.reason = reason
        save()
        print(f"sanitize: not run: {reason}")
        return 1

    program = find_program(options.program)
    if program is None:
        return give_up("no compute-sanitizer on PATH or in CUDA_HOME; it comes with the CUDA toolkit")
    # With a thread for each of many cores, the comparisons on the CPU take several times as long under a tool.
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
    memory = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync", "CONV2D_EXT_SANITIZING": "1"}
    env: dict[str, Any] = {**os.environ, **threads, **memory, "PYTHONDONTWRITEBYTECODE": "1"}
    end = time.monotonic() + options.timeout
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)  # not the repository: its conv2d_ext/ must not hide the installed one
        if options.only:
            useful, note = filter_problem(options.only, env, cwd)
            if not useful:
                return give_up(note)
            if note:
                print(f"sanitize: {note}", flush=True)

        def run(tool: str, marks: str, gpu: str | None) -> ToolResult:
            junit = cwd / f"{tool}_{marks.replace(' ', '_')}.xml"
            command = sanitizer_command(
                program, tool, marks, options.only, junit, options.pytest_arguments, options.tests.resolve()
            )
            chosen = env if gpu is None else {**env, "CUDA_VISIBLE_DEVICES": gpu}
            finished = run_command(command, chosen, cwd, max(end - time.monotonic(), 1))
            result = judge(tool, finished, count_tests(junit))
            if result.status != "passed":
                print(first_findings(finished.output), tail(finished.output), sep="\n", flush=True)
            return result

        # Beside each other a tool takes longer, all of them less. GPUs named by CUDA_VISIBLE_DEVICES are taken in turn.
        gpus = visible_gpus(env) if options.together else []
        runs = [(tool, marks) for tool in options.tools for marks in MARKS[tool]]
        parts: dict[str, list[ToolResult]] = {tool: [] for tool in options.tools}
        with ThreadPoolExecutor(len(runs) if options.together else 1) as pool:
            ends = {
                pool.submit(run, tool, marks, gpus[index % len(gpus)] if gpus else None): tool
                for index, (tool, marks) in enumerate(runs)
            }
            for finished in as_completed(ends):
                tool = ends[finished]
                parts[tool].append(finished.result())
                if len(parts[tool]) == len(MARKS[tool]):
                    results[options.tools.index(tool)] = result = together(tool, parts[tool])
                    print(result, flush=True)
                    save()
    return 0 if all(result.status == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
