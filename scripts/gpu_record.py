"""Installs a built wheel on a GPU machine, tests it there, and writes docs/gpu-record.json: of which code, on what.

    python3 scripts/gpu_record.py --wheel dist/conv2d_ext-*.whl     # on the GPU machine, about 15 minutes
    python3 scripts/gpu_record.py --wheel ... --gpus 2              # the sanitizer on GPUs of its own, beside the suite
    python3 scripts/gpu_record.py --check                           # anywhere: is the record of this code, and green?

Phases: tests (the suite with --device cuda), sanitizer (scripts/sanitize.py), benchmark (dense layers, float32). The
record is rewritten after each, and while the suite runs with the counts so far, so one that was cut off says how far it
came; a phase left out by --skip keeps what an
earlier run on the same code and machine recorded, so a record can be made in several runs. It names the code by
a hash over csrc/, conv2d_ext/, tests/ and setup.py. `--check` needs no GPU, no wheel and no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sanitize import DEFAULT_TOOLS, Counts, Finished, run_command, tail

ROOT = Path(__file__).resolve().parents[1]
RECORD = "docs/gpu-record.json"
PARTS = ("csrc", "conv2d_ext", "tests", "setup.py")
PHASES = ("tests", "sanitizer", "benchmark")

NO_TESTS = 5  # pytest's exit status
BEGAN = {"status": "not run", "reason": "began, and did not end"}

# What builds and runs leave between the sources.
GENERATED_FOLDERS = {"__pycache__", ".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache"}
GENERATED_SUFFIXES = {".so", ".pyc", ".pyo", ".pyd", ".orig", ".rej", ".swp"}


# ---- which code ------------------------------------------------------------------------------------------------------


def generated(path: Path) -> bool:
    return bool(GENERATED_FOLDERS & set(path.parts)) or path.suffix in GENERATED_SUFFIXES or path.name == "build.json"


def in_git(root: Path) -> set[str] | None:
    """What git has or would take of the tree, as relative paths with slashes; None without a .git folder or git."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PARTS]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return {name for name in listed.split("\0") if name}


def sources(root: Path) -> list[str]:
    """The files that the hash covers, sorted, as paths relative to `root` with slashes.

    A walk and git agree: files that git ignores are left out where git can be asked, and the walk knows what they are.
    """
    listed = in_git(root)
    found = []
    for part in PARTS:
        for path in [root / part, *(root / part).rglob("*")]:
            name = path.relative_to(root).as_posix()
            if path.is_file() and not generated(path.relative_to(root)) and (listed is None or name in listed):
                found.append(name)
    return sorted(found)


def digest(root: Path, names: Sequence[str]) -> str:
    """sha256 over the path and the sha256 of the content of each file."""
    total = hashlib.sha256()
    for name in names:
        content = hashlib.sha256((root / name).read_bytes()).hexdigest()
        total.update(f"{content}  {name}\n".encode())
    return total.hexdigest()


def code_of(root: Path) -> dict[str, Any]:
    """{sha256, files, parts}: of all sources, how many they are, and of each part, to say which one differs."""
    names = sources(root)
    parts = {part: digest(root, [n for n in names if n == part or n.startswith(part + "/")]) for part in PARTS}
    return {"sha256": digest(root, names), "files": len(names), "parts": parts}


def wheel_of(wheel: Path, root: Path) -> dict[str, Any]:
    """The wheel's name, its sha256 and those of its libraries, and how its other files differ from conv2d_ext/ here.

    A library can't be compared with csrc/: that it was built from it is for whoever builds and records in one go.
    """
    data = {name: (root / name).read_bytes() for name in sources(root) if name.startswith("conv2d_ext/")}
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("conv2d_ext/") and not n.endswith("/")]
        libraries = {n: hashlib.sha256(archive.read(n)).hexdigest() for n in names if n.endswith(".so")}
        packed = {n: archive.read(n) for n in names if not generated(Path(n))}
    differences = sorted(n for n in data.keys() | packed.keys() if data.get(n) != packed.get(n))
    return {
        "name": wheel.name,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "libraries": libraries,
        "python_is_of_this_tree": not differences,
        "differences": differences,
    }


# ---- checking a record -----------------------------------------------------------------------------------------------


def verdict(record: Mapping[str, Any] | None, code: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the record is of this code and all green, and the line that says so."""
    if record is None:
        return False, f"{RECORD}: there is none; scripts/gpu_record.py writes it on a GPU machine"
    recorded = record.get("code", {})
    if recorded.get("sha256") != code["sha256"]:
        parts = recorded.get("parts", {})
        changed = [part for part, value in code["parts"].items() if parts.get(part) != value]
        return (
            False,
            f"{RECORD}: of other code than this: {', '.join(changed) or 'the record is damaged'} changed since",
        )
    faults = [f"{name} {state}" for name in PHASES if (state := phase_status(record, name)) != "passed"]
    if (tools := record.get("phases", {}).get("sanitizer", {}).get("tools")) is not None:
        ran = {one["tool"] for one in tools}
        faults += [f"sanitizer without {tool}" for tool in DEFAULT_TOOLS if tool not in ran]
    if problem := str(record.get("problem", "")):
        faults.insert(0, problem.splitlines()[0])
    if not record.get("wheel", {}).get("python_is_of_this_tree", False):
        faults.append("the wheel was built from other sources")
    if faults:
        return False, f"{RECORD}: of this code, not green: {', '.join(faults)}"
    machine, tests = record.get("machine", {}), record["phases"]["tests"]
    where = f"{machine.get('gpu')}, torch {machine.get('torch')}, {record.get('date')}"
    counts = f"{tests.get('passed')} passed, {tests.get('skipped')} skipped"
    return True, f"{RECORD}: of this code, all green ({where}; {counts})"


def phase_status(record: Mapping[str, Any], name: str) -> str:
    return str(record.get("phases", {}).get(name, {}).get("status", "not run"))


def read_record(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


# ---- making a record -------------------------------------------------------------------------------------------------

# Run with the installed wheel first on the path; prints JSON.
MACHINE = """
import json, platform, subprocess, sys
import torch, conv2d_ext
from conv2d_ext import _library

def driver():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None

gpu = torch.cuda.is_available()
print(json.dumps({
    "gpu": torch.cuda.get_device_name() if gpu else None,
    "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
    "driver": driver(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version() if gpu else None,
    "python": platform.python_version(),
    "conv2d_ext": conv2d_ext.__version__,
    "cuda_library": _library.CUDA_ERROR or "loaded",
}))
"""

# A pytest plugin: every process of the run, xdist's workers included, holds the wheel's package before a test can put
# the repository on the path.
PLUGIN = """
import json
import os
import pathlib
import time
import pytest

SITE = pathlib.Path({site!r})

# Each process of the suite has another of the GPUs as its first, where its tests run, but for those that take two.
worker, gpus = os.environ.get("PYTEST_XDIST_WORKER"), os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
if worker and len(gpus) > 1:
    first = int(worker.removeprefix("gw")) % len(gpus)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:] + gpus[:first])

def pytest_configure(config):
    import conv2d_ext
    found = pathlib.Path(conv2d_ext.__file__).resolve()
    if SITE not in found.parents:
        raise pytest.UsageError(f"conv2d_ext: expected the wheel installed in {{SITE}}, got {{found}}")

def pytest_addoption(parser):
    parser.addoption("--results", help="a line for each result as it comes: the counts of a run that is cut off")

# Each result is written as it comes, by the one process that sees all, and at the end what each process did when.
class Results:
    def __init__(self, path):
        self.file = open(path, "w", buffering=1)
        self.begin = time.time()
        self.times = {{}}

    def pytest_sessionfinish(self):
        print()
        for name, t in sorted(self.times.items()):
            spent = {{when: t[when] for when in ("setup", "call", "teardown")}}
            spent["between"] = t["last"] - t["first"] - sum(spent.values())
            parts = ", ".join(f"{{when}} {{seconds:.0f}}" for when, seconds in spent.items())
            idle, first = time.time() - t["last"], t["first"] - self.begin
            print(f"{{name}}: first test after {{first:.0f}} s; {{parts}}; idle at the end {{idle:.0f}}")

    def pytest_runtest_logstart(self, nodeid):
        self.file.write(json.dumps([nodeid, "began", "", 0]) + "\\n")

    def pytest_runtest_logreport(self, report):
        node = getattr(report, "node", None)
        new = dict(first=report.start, last=report.stop, setup=0, call=0, teardown=0)
        t = self.times.setdefault(node.gateway.id if node else "one process", new)
        t[report.when] += report.duration
        t["last"] = report.stop
        if report.when == "call" or report.outcome != "passed":
            text = ""
            if report.outcome == "failed":
                crash = getattr(report.longrepr, "reprcrash", None)
                text = crash.message if crash else str(report.longrepr)
            elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                text = report.longrepr[2]
            self.file.write(json.dumps([report.nodeid, report.outcome, text[:1000], report.duration]) + "\\n")

def pytest_sessionstart(session):
    if not worker and session.config.getoption("--results"):
        session.config.pluginmanager.register(Results(session.config.getoption("--results")))
"""
PLUGIN_NAME = "the_installed_wheel"


class Recorder:
    """Runs the phases one after the other in a temporary folder, and keeps the record on disk up to date."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.saving = threading.Lock()
        self.sanitized = threading.Event()  # the sanitizer does not run, or no longer
        self.work = folder / "work"  # where commands run: not in the repository, whose conv2d_ext/ has no libraries
        self.site = (folder / "site").resolve()
        self.work.mkdir()
        path = [str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])]
        # Byte code is kept, though not in the repository: to compile torch's sources takes each process seven seconds.
        cache = {"PYTHONPYCACHEPREFIX": str(folder / "pycache")}
        self.env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), **cache}
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)
        self.record: dict[str, Any] = {
            "code": code_of(ROOT),
            "wheel": wheel_of(options.wheel, ROOT),
            "machine": {},
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "phases": {name: {"status": "not run"} for name in PHASES},
        }
        self.earlier = read_record(options.output) or {}

    def earlier_phase(self, name: str) -> dict[str, Any]:
        """What an earlier run recorded of this phase, if it was on the same code and machine. Its wheel may be another
        build of this code: two builds differ in bytes."""
        if any(self.earlier.get(key) != self.record[key] for key in ("code", "machine")):
            return {}
        if self.earlier["wheel"]["differences"] != self.record["wheel"]["differences"]:
            return {}
        return dict(self.earlier.get("phases", {}).get(name, {}))

    def save(self) -> None:
        """Whatever ends this process meanwhile, a whole record is left."""
        self.options.output.parent.mkdir(parents=True, exist_ok=True)
        beside = self.options.output.with_suffix(".partial")
        with self.saving:
            beside.write_text(json.dumps(self.record, indent=1) + "\n")
            beside.replace(self.options.output)

    def python(
        self, *arguments: str, timeout: float, phase: str = "", meanwhile: Callable[[], None] = lambda: None
    ) -> Finished:
        gpus = shares(self.options.gpus).get(phase)
        chosen = {**self.env, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else self.env
        return run_command([sys.executable, *arguments], chosen, self.work, timeout, meanwhile)

    def install(self) -> str:
        """Installs the wheel and describes the machine; returns what is wrong, if anything is."""
        pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(self.site)]
        finished = self.python(*pip, str(self.options.wheel), timeout=60)
        if finished.code != 0:
            return f"pip could not install the wheel:\n{tail(finished.output)}"
        (self.site / f"{PLUGIN_NAME}.py").write_text(PLUGIN.format(site=str(self.site)))
        finished = self.python("-c", MACHINE, timeout=60)
        if finished.code != 0:
            return f"the wheel does not import:\n{tail(finished.output)}"
        machine: dict[str, Any] = json.loads(finished.output.strip().splitlines()[-1])
        self.record["machine"] = machine
        if machine["gpu"] is None:
            return "torch finds no GPU here"
        if machine["cuda_library"] != "loaded":
            return f"the CUDA library is not loaded: {machine['cuda_library']}"
        return ""

    def tests(self) -> dict[str, Any]:
        """The suite in two runs: most in parallel, then huge tensors and times alone, one at a time."""
        begin = time.monotonic()
        end = begin + self.options.tests_timeout
        # worksteal: tests of a case, which share values and references, mostly stay in one process.
        workers = ["-n", str(self.options.workers), "--dist", "worksteal"] if self.options.workers else []
        runs = {"not alone": workers, "alone": []}
        results = {marked: self.work / f"{marked.replace(' ', '_')}.jsonl" for marked in runs}

        def found() -> dict[str, Any]:
            counts = add_counts([count_results(path) for path in results.values()])
            hanging = unfinished(results.values())[:20]
            return {**asdict(counts), "unfinished": hanging, "seconds": round(time.monotonic() - begin, 1)}

        def save() -> None:
            self.record["phases"]["tests"] = {**BEGAN, **found()}
            self.save()

        ends = [self.pytest(marked, runs[marked], end, results[marked], save) for marked in runs]
        print("\n".join(slowest(results.values())), flush=True)
        codes = [finished.code for finished in ends]
        if None in codes:
            hanging = ", ".join(unfinished(results.values())[:3])
            during = f" in {hanging}" if hanging else ""
            limit = f"{self.options.tests_timeout:g} s"
            return failed(f"ran out of time ({limit}){during}; the counts are of what ran", found())
        # The second run may have nothing to do: a project without such tests, or arguments that leave them out.
        if codes[0] != 0 or codes[1] not in (0, NO_TESTS):
            return failed(f"pytest ended with exit status {codes[0] or codes[1]}", found())
        if not found()["passed"]:
            return failed("no test ran", found())
        return {"status": "passed", **found()}

    def pytest(
        self, marked: str, workers: Sequence[str], end: float, results: Path, meanwhile: Callable[[], None]
    ) -> Finished:
        if marked == "alone" and self.options.gpus < 2:
            self.sanitized.wait(max(end - time.monotonic(), 0))
        finished = self.python(
            *("-m", "pytest", str(ROOT / "tests"), "-m", marked, "--device", "cuda", "-q", "--tb=short"),
            *("-p", "no:cacheprovider", "-p", PLUGIN_NAME, f"--results={results}"),
            *workers,
            *shlex.split(self.options.pytest_arguments),
            timeout=max(end - time.monotonic(), 1),
            phase="alone" if marked == "alone" else "tests",
            meanwhile=meanwhile,
        )
        print(tail(finished.output, 200), flush=True)
        return finished

    def sanitizer(self) -> dict[str, Any]:
        results = self.work / "sanitizer.json"
        finished = self.python(
            *(
                str(ROOT / "scripts" / "sanitize.py"),
                "--json",
                str(results),
                "--timeout",
                str(self.options.sanitizer_timeout),
                "--tools",
                self.options.sanitizer_tools,
                *(["--together"] if self.options.together or self.options.gpus > 1 else []),
            ),
            *("--", "-p", PLUGIN_NAME),
            timeout=self.options.sanitizer_timeout + 30,  # it keeps to its own time
            phase="sanitizer",
        )
        print(tail(finished.output, 60), flush=True)
        tools = json.loads(results.read_text()) if results.exists() else []
        found = {"tools": tools, "seconds": finished.seconds}
        if finished.code == 0:
            return {"status": "passed", **found}
        reasons = dict.fromkeys(f"{t['tool']}: {t['reason']}" for t in tools if t["status"] != "passed")
        return failed("; ".join(reasons) or tail(finished.output, 1), found)

    def benchmark(self) -> dict[str, Any]:
        results = self.work / "bench.json"
        budget = self.options.benchmark_timeout
        where = self.options.benchmark_markdown
        tables = ["--markdown", str(where.resolve())] if where else []
        command = ["-m", "conv2d_ext", "bench", "--layers", "dense", "--dtypes", "fp32", "--budget", f"{budget:g}"]
        finished = self.python(
            *command,
            *("--json", str(results)),
            *tables,
            timeout=budget + 30,  # the budget is looked at between cells
            phase="benchmark",
        )
        print(tail(finished.output, 40), flush=True)
        try:
            data = json.loads(results.read_text())
        except (OSError, json.JSONDecodeError):
            data = {}
        found = {"command": shlex.join(["python", *command]), **benchmark_summary(data), "seconds": finished.seconds}
        if finished.code != 0 or not found["cells"]:
            return failed(tail(finished.output, 1), found)
        return {"status": "passed", **found}

    def run(self) -> int:
        self.save()
        problem = self.install()
        self.save()
        if problem:
            print(f"gpu_record: {problem}")
            self.record["problem"] = problem
            self.save()
            return 1
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "tests": self.tests,
            "sanitizer": self.sanitizer,
            "benchmark": self.benchmark,
        }
        # A benchmark must have the machine for itself; the others may share it.
        rounds: list[tuple[str, ...]] = [(name,) for name in work]
        if self.options.together or self.options.gpus > 1:
            rounds = [("tests", "sanitizer"), ("benchmark",)]
        for names in rounds:
            left_out = [name for name in names if name in self.options.skip]
            for name in left_out:
                missing = {"status": "not run", "reason": "left out by --skip"}
                self.record["phases"][name] = self.earlier_phase(name) or missing
            running = [name for name in names if name not in left_out]
            if "sanitizer" not in running:
                self.sanitized.set()  # or it is over, or comes later
            for name in running:
                print(f"== {name}", flush=True)
                self.record["phases"][name] = BEGAN
            self.save()
            with ThreadPoolExecutor() as pool:
                ends = {pool.submit(work[name]): name for name in running}
                for end in as_completed(ends):
                    error = end.exception()  # must not cost the other phases' results
                    result = end.result() if error is None else failed(f"{type(error).__name__}: {error}", {})
                    if ends[end] == "sanitizer":
                        self.sanitized.set()
                    self.record["phases"][ends[end]] = {**result, "wheel": self.record["wheel"]["sha256"]}
                    self.save()
                    print(f"== {ends[end]}: {self.record['phases'][ends[end]]['status']}", flush=True)
        green, line = verdict(self.record, self.record["code"])
        print(line)
        return 0 if green else 1


def shares(gpus: int) -> dict[str, list[int]]:
    """The GPUs of each phase where there are several. The sanitizer has half of them, three at most, for a tool each;
    the suite's processes have the others, since a tool beside those takes half as long again. The tests that run alone
    and the benchmark, which comes when all are done, have the first."""
    if gpus < 2:
        return {}
    own = gpus - min(gpus // 2, 3)
    return {"tests": list(range(own)), "sanitizer": list(range(own, gpus)), "alone": [0], "benchmark": [0]}


def results_in(paths: Iterable[Path]) -> Iterator[tuple[str, str, str, float]]:
    """What the plugin wrote, so far: a test, that it began or its outcome, the message, seconds."""
    for line in itertools.chain.from_iterable(path.read_text().splitlines() for path in paths if path.exists()):
        with contextlib.suppress(ValueError):  # being written
            test, outcome, text, seconds = json.loads(line)
            yield test, outcome, text, seconds


def unfinished(paths: Iterable[Path]) -> list[str]:
    """The tests that began and have no result, such as one whose kernel never ends."""
    began: dict[str, bool] = {}
    for test, outcome, *_ in results_in(paths):
        began[test] = outcome == "began"
    return [test for test, alone in began.items() if alone]


def count_results(path: Path) -> Counts:
    """The counts of what the plugin wrote; of a test's several results the worst counts."""
    order = ("passed", "skipped", "failed")
    worst: dict[str, tuple[str, str]] = {}
    for test, outcome, text, _ in results_in([path]):
        if outcome == "began":
            continue
        if order.index(outcome) >= order.index(worst.get(test, ("passed", ""))[0]):
            worst[test] = (outcome, " ".join(text.split()))
    outcomes = Counter(outcome for outcome, _ in worst.values())
    reasons = Counter(text for outcome, text in worst.values() if outcome == "skipped")
    failures = [f"{test}: {text}"[:300] for test, (outcome, text) in worst.items() if outcome == "failed"]
    counts = Counts(outcomes["passed"], outcomes["failed"], outcomes["skipped"])
    counts.skip_reasons, counts.failures = dict(reasons.most_common()), dict.fromkeys(failures[:20], 1)
    return counts


def slowest(paths: Iterable[Path], shown: int = 25) -> list[str]:
    """What the plugin wrote of how long tests took, added up by function: seconds of all processes, and the longest."""
    times: dict[str, list[float]] = {}
    for test, outcome, _, seconds in results_in(paths):
        if outcome != "began":
            times.setdefault(test.split("[")[0], []).append(seconds)
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))
    return [f"{sum(t):8.1f} s {len(t):6} tests, longest {max(t):6.1f} s  {name}" for name, t in ordered[:shown]]


def add_counts(counts: Sequence[Counts]) -> Counts:
    total = Counts()
    for one in counts:
        total.passed += one.passed
        total.failed += one.failed
        total.skipped += one.skipped
        total.skip_reasons = dict(Counter(total.skip_reasons) + Counter(one.skip_reasons))
        total.failures = dict(Counter(total.failures) + Counter(one.failures))
    return total


def failed(reason: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {"status": "failed", "reason": reason, **found}


def benchmark_summary(data: Mapping[str, Any]) -> dict[str, Any]:
    """Of the JSON of `conv2d_ext bench`: how much ran, and the geometric means in all, by layout and by op.

    `ratio` is cuDNN's time over ours; `share` is the limit of the machine over our time.
    """
    rows = [row for row in data.get("summary", []) if row.get("group") in ("all", "layout", "op")]
    numbers = ("cells", "ratio", "share", "share_theirs", "least_ratio", "slower")
    means = {
        f"{row['group']} {row.get('value', '')}".strip(): {
            name: round(row[name], 4) for name in numbers if row.get(name) is not None
        }
        for row in rows
    }
    return {
        "cells": sum(1 for cell in data.get("cells", []) if cell.get("ratio")),
        "cells_by_status": dict(Counter(str(cell.get("status")) for cell in data.get("cells", []))),
        "cells_planned": data.get("cells_planned", 0),
        "stopped": data.get("stopped", ""),
        "peaks": data.get("peaks", {}),
        "geometric_means": means,
    }


# ---- command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    def phases(text: str) -> list[str]:
        chosen = [name for name in text.split(",") if name]
        if unknown := sorted(set(chosen) - set(PHASES)):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(PHASES)}, got {', '.join(unknown)}")
        return chosen

    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--check", action="store_true", help="say in a line whether the record is of this code and green"
    )
    found.add_argument("--wheel", type=Path, help="the wheel to install and test")
    found.add_argument("--output", type=Path, default=ROOT / RECORD, help=f"default: {RECORD}")
    found.add_argument("--skip", type=phases, default=[], metavar="A,B", help=f"leave out: {', '.join(PHASES)}")
    # 2026-11-28, H200: eight ran 96 % of the suite in 410 s.
    found.add_argument(
        "--workers", type=int, default=6, help="processes of pytest, about six a GPU; 0: one, without xdist"
    )
    found.add_argument("--tests-timeout", type=float, default=600, help="seconds (default: %(default)s)")
    found.add_argument("--sanitizer-timeout", type=float, default=900, help="seconds, all tools (default: %(default)s)")
    found.add_argument("--benchmark-timeout", type=float, default=240, help="seconds (default: %(default)s)")
    found.add_argument("--benchmark-markdown", type=Path, metavar="FILE", help="write the benchmark's tables here")
    found.add_argument(
        "--sanitizer-tools", default="memcheck,racecheck,synccheck", metavar="A,B", help="default: %(default)s"
    )
    found.add_argument(
        "--together",
        action="store_true",
        help="run the sanitizer's tools beside the tests, but for those that run alone",
    )
    found.add_argument(
        "--gpus",
        type=int,
        default=1,
        help="run suite and sanitizer beside each other on so many GPUs (default: %(default)s)",
    )
    found.add_argument("--pytest-arguments", default="", help="more arguments for the suite, in one string")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    options.output = options.output.resolve()
    if options.check:
        green, line = verdict(read_record(options.output), code_of(ROOT))
        print(line)
        return 0 if green else 1
    if options.wheel is None or not options.wheel.is_file():
        raise SystemExit(f"gpu_record: --wheel: expected a wheel that exists, got {options.wheel}")
    options.wheel = options.wheel.resolve()
    with tempfile.TemporaryDirectory() as folder:
        return Recorder(options, Path(folder)).run()


if __name__ == "__main__":
    sys.exit(main())
