"""scripts/gpu_record.py and scripts/sanitize.py, as far as they can be tried without a GPU."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[Any, Any]]:
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("gpu_record"), importlib.import_module("sanitize")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def gpu_record(scripts: tuple[Any, Any]) -> Any:
    return scripts[0]


@pytest.fixture
def sanitize(scripts: tuple[Any, Any]) -> Any:
    return scripts[1]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project of four sources."""
    root = tmp_path / "tree"
    for name in ("csrc/core/plan.h", "conv2d_ext/__init__.py", "tests/test_a.py", "setup.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"contents of {name}\n")
    return root


@pytest.fixture
def record(gpu_record: Any, tree: Path) -> dict[str, Any]:
    """A record of `tree` with nothing wrong."""
    return {
        "code": gpu_record.code_of(tree),
        "wheel": {"python_is_of_this_tree": True},
        "machine": {"gpu": "a GPU", "torch": "2.11"},
        "date": "2026-01-01 00:00 UTC",
        "phases": {
            "tests": {"status": "passed", "passed": 3, "skipped": 1},
            "sanitizer": {"status": "passed"},
            "benchmark": {"status": "passed"},
        },
    }


# ---- the hash --------------------------------------------------------------------------------------------------------


def test_the_hash_covers_every_source(gpu_record: Any, tree: Path) -> None:
    assert gpu_record.sources(tree) == ["conv2d_ext/__init__.py", "csrc/core/plan.h", "setup.py", "tests/test_a.py"]


@pytest.mark.parametrize("name", ["csrc/core/plan.h", "conv2d_ext/__init__.py", "tests/test_a.py", "setup.py"])
def test_a_changed_byte_changes_the_hash_of_its_part_alone(gpu_record: Any, tree: Path, name: str) -> None:
    before = gpu_record.code_of(tree)
    (tree / name).write_text("other contents\n")
    after = gpu_record.code_of(tree)
    assert after["sha256"] != before["sha256"]
    assert [part for part in gpu_record.PARTS if after["parts"][part] != before["parts"][part]] == [name.split("/")[0]]


def test_a_renamed_file_and_a_new_file_change_the_hash(gpu_record: Any, tree: Path) -> None:
    before = gpu_record.code_of(tree)["sha256"]
    (tree / "csrc/core/plan.h").rename(tree / "csrc/core/choice.h")
    renamed = gpu_record.code_of(tree)["sha256"]
    (tree / "csrc/core/plan.h").write_text("contents of csrc/core/plan.h\n")
    assert len({before, renamed, gpu_record.code_of(tree)["sha256"]}) == 3


def test_built_files_and_other_folders_do_not_change_the_hash(gpu_record: Any, tree: Path) -> None:
    before = gpu_record.code_of(tree)
    names = ("conv2d_ext/_cuda.abi3.so", "tests/__pycache__/a.pyc", "tests/.hypothesis/b", "docs/a.md", "build/c.h")
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"\0")
    assert gpu_record.code_of(tree) == before


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_hash_is_the_same_with_and_without_git(gpu_record: Any, tree: Path) -> None:
    before = gpu_record.code_of(tree)
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tree), *arguments], check=True, capture_output=True, env=environment)

    git("init")
    (tree / ".gitignore").write_text("scratch.txt\n")
    (tree / "tests/scratch.txt").write_text("git ignores this\n")
    assert gpu_record.code_of(tree) == before  # nothing is added yet
    git("add", ".")
    assert gpu_record.code_of(tree) == before
    (tree / "setup.py").unlink()  # still in git's index
    assert gpu_record.code_of(tree)["files"] == before["files"] - 1


# ---- the wheel -------------------------------------------------------------------------------------------------------


def make_wheel(tree: Path, **changed: str) -> Path:
    wheel = tree.parent / "conv2d_ext-0-cp310-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted((tree / "conv2d_ext").rglob("*.py")):
            name = path.relative_to(tree).as_posix()
            archive.writestr(name, changed.pop(path.stem, path.read_text()))
        for stem, text in changed.items():
            archive.writestr(f"conv2d_ext/{stem}.py", text)
        archive.writestr("conv2d_ext/_cpu.abi3.so", "binary")
        archive.writestr("conv2d_ext-0.dist-info/METADATA", "")
    return wheel


def test_a_wheel_of_this_tree_is_recognised(gpu_record: Any, tree: Path) -> None:
    found = gpu_record.wheel_of(make_wheel(tree), tree)
    assert found["python_is_of_this_tree"] and found["differences"] == []
    assert list(found["libraries"]) == ["conv2d_ext/_cpu.abi3.so"]


def test_a_wheel_of_another_tree_is_recognised(gpu_record: Any, tree: Path) -> None:
    (tree / "conv2d_ext/missing.py").write_text("not in the wheel\n")
    wheel = make_wheel(tree, __init__="older\n", extra="not in the tree\n")
    with zipfile.ZipFile(wheel) as archive:
        assert "conv2d_ext/missing.py" in archive.namelist()
    (tree / "conv2d_ext/later.py").write_text("written after the wheel\n")
    found = gpu_record.wheel_of(wheel, tree)
    assert not found["python_is_of_this_tree"]
    assert found["differences"] == ["conv2d_ext/__init__.py", "conv2d_ext/extra.py", "conv2d_ext/later.py"]


# ---- the verdict -----------------------------------------------------------------------------------------------------


def test_a_green_record_of_this_code_passes(gpu_record: Any, tree: Path, record: dict[str, Any]) -> None:
    green, line = gpu_record.verdict(record, gpu_record.code_of(tree))
    assert green and "all green" in line and "a GPU" in line and "3 passed, 1 skipped" in line and "\n" not in line


def test_a_record_of_other_code_fails_and_names_the_part(gpu_record: Any, tree: Path, record: dict[str, Any]) -> None:
    (tree / "csrc/core/plan.h").write_text("changed\n")
    green, line = gpu_record.verdict(record, gpu_record.code_of(tree))
    assert not green and "csrc changed since" in line and "setup.py" not in line


@pytest.mark.parametrize("record", [{}, {"code": {}}, None])
def test_a_damaged_or_missing_record_fails(gpu_record: Any, tree: Path, record: dict[str, Any] | None) -> None:
    green, line = gpu_record.verdict(record, gpu_record.code_of(tree))
    assert not green and "\n" not in line


@pytest.mark.parametrize("phase", ["tests", "sanitizer", "benchmark"])
@pytest.mark.parametrize("state", ["failed", "not run", None])
def test_a_phase_that_did_not_pass_fails(
    gpu_record: Any, tree: Path, record: dict[str, Any], phase: str, state: str | None
) -> None:
    changed = copy.deepcopy(record)
    if state is None:
        del changed["phases"][phase]
    else:
        changed["phases"][phase]["status"] = state
    green, line = gpu_record.verdict(changed, gpu_record.code_of(tree))
    assert not green and f"{phase} {state or 'not run'}" in line


def test_a_sanitizer_phase_without_one_of_its_tools_is_not_green(
    gpu_record: Any, tree: Path, record: dict[str, Any]
) -> None:
    tools = [{"tool": tool, "status": "passed"} for tool in ("memcheck", "racecheck", "synccheck")]
    record["phases"]["sanitizer"]["tools"] = tools
    assert gpu_record.verdict(record, gpu_record.code_of(tree))[0]
    record["phases"]["sanitizer"]["tools"] = tools[1:]
    green, line = gpu_record.verdict(record, gpu_record.code_of(tree))
    assert not green and "sanitizer without memcheck" in line and "racecheck" not in line


def test_a_wheel_of_other_sources_fails(gpu_record: Any, tree: Path, record: dict[str, Any]) -> None:
    record["wheel"]["python_is_of_this_tree"] = False
    green, line = gpu_record.verdict(record, gpu_record.code_of(tree))
    assert not green and "wheel" in line


def test_check_prints_one_line_about_this_project(gpu_record: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu_record.main(["--check"])
    out = capsys.readouterr().out
    assert status in (0, 1) and out.count("\n") == 1 and (status == 0) == ("all green" in out)


def test_check_of_a_file_that_is_not_json_fails(gpu_record: Any, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('{"code": {')  # a write that was cut off
    assert gpu_record.main(["--check", "--output", str(tmp_path / "record.json")]) == 1


def test_the_benchmark_summary_keeps_the_geometric_means(gpu_record: Any) -> None:
    row = {"cells": 2, "ratio": 0.512345, "share": None, "slower": 2}
    data = {
        "summary": [{"group": "all", "value": "", **row}, {"group": "op", "value": "dgrad", **row}, {"group": "kind"}],
        "cells": [{"ratio": 0.5}, {"ratio": None}],
        "cells_planned": 9,
        "stopped": "the budget of 60 s is spent",
    }
    found = gpu_record.benchmark_summary(data)
    assert found["geometric_means"] == {
        "all": {"cells": 2, "ratio": 0.5123, "slower": 2},
        "op dgrad": {"cells": 2, "ratio": 0.5123, "slower": 2},
    }
    assert (found["cells"], found["cells_planned"]) == (1, 9)
    assert gpu_record.benchmark_summary({})["cells"] == 0


def recorder(gpu_record: Any, tmp_path: Path, *options: str) -> Any:
    """A Recorder with the command line's own options, whose commands are printed instead of run."""
    wheel = tmp_path / "conv2d_ext-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo("conv2d_ext/__init__.py"), "")  # of 1980: each time the same wheel
    output = tmp_path / "record.json"
    chosen = gpu_record.parser().parse_args(["--wheel", str(wheel), "--output", str(output), *options])
    made = gpu_record.Recorder(chosen, tmp_path)
    made.install = lambda: ""
    made.commands = []

    def python(*arguments: str, timeout: float, phase: str = "", meanwhile: Any = None) -> Any:
        made.commands.append((arguments, timeout))
        return gpu_record.Finished(0, "", 0.0)

    made.python = python
    return made


@pytest.mark.parametrize(
    "options", [(), ("--together",), ("--gpus", "4"), ("--sanitizer-tools", "synccheck", "--workers", "3")]
)
def test_every_phase_runs_with_the_options_of_the_command_line(
    gpu_record: Any, sanitize: Any, tmp_path: Path, options: tuple[str, ...]
) -> None:
    made = recorder(gpu_record, tmp_path, *options)
    assert made.run() == 1  # nothing was tested
    phases = json.loads((tmp_path / "record.json").read_text())["phases"]
    assert {name: phase["status"] for name, phase in phases.items()} == {
        "tests": "failed", "sanitizer": "passed", "benchmark": "failed",
    }  # fmt: skip
    (given,) = [arguments[1:] for arguments, _ in made.commands if arguments[0].endswith("sanitize.py")]
    read = sanitize.parser().parse_args(given)
    assert read.tools == (["synccheck"] if "synccheck" in options else ["memcheck", "racecheck", "synccheck"])
    assert read.together == bool({"--together", "--gpus"} & set(options))


def test_what_runs_alone_waits_for_a_sanitizer_on_the_same_gpu(gpu_record: Any, tmp_path: Path) -> None:
    made, over = recorder(gpu_record, tmp_path, "--together"), []

    def python(*arguments: str, timeout: float, phase: str = "", meanwhile: Any = None) -> Any:
        time.sleep(0.3 if phase == "sanitizer" else 0)
        over.append(phase)
        return gpu_record.Finished(0, "", 0.0)

    made.python = python
    made.run()
    assert over == ["tests", "sanitizer", "alone", "benchmark"]


@pytest.mark.parametrize("gpus,own", [(2, 1), (3, 2), (4, 2), (8, 5)])
def test_the_suite_and_the_sanitizer_have_gpus_of_their_own(gpu_record: Any, gpus: int, own: int) -> None:
    shares = gpu_record.shares(gpus)
    assert shares.keys() == {*gpu_record.PHASES, "alone"}
    assert shares["tests"] == list(range(own)) and shares["sanitizer"] == list(range(own, gpus))
    assert shares["alone"] == shares["benchmark"] == [0]


def test_one_gpu_is_nobodys_share(gpu_record: Any) -> None:
    assert gpu_record.shares(1) == {}


def test_a_phase_sees_its_gpus_alone(gpu_record: Any, tmp_path: Path) -> None:
    made = recorder(gpu_record, tmp_path, "--gpus", "4")
    seen = ["-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"]
    run = gpu_record.Recorder.python
    assert run(made, *seen, timeout=60, phase="sanitizer").output.strip() == "2,3"
    assert run(made, *seen, timeout=60, phase="benchmark").output.strip() == "0"
    made.options.gpus = 1
    assert run(made, *seen, timeout=60, phase="tests").output.strip() == str(os.environ.get("CUDA_VISIBLE_DEVICES"))


@pytest.mark.parametrize("options", [(), ("--together",), ("--gpus", "2")])
def test_a_phase_that_raises_costs_no_other_phase_its_result(
    gpu_record: Any, tmp_path: Path, options: tuple[str, ...]
) -> None:
    made = recorder(gpu_record, tmp_path, *options)

    def broken() -> dict[str, Any]:
        raise AttributeError("no such option")

    made.sanitizer = broken
    made.tests = made.benchmark = lambda: {"status": "passed"}
    assert made.run() == 1
    phases = json.loads((tmp_path / "record.json").read_text())["phases"]
    assert phases["tests"]["status"] == phases["benchmark"]["status"] == "passed"
    assert phases["sanitizer"]["status"] == "failed" and "no such option" in phases["sanitizer"]["reason"]


def test_a_record_can_be_made_in_several_runs(gpu_record: Any, tmp_path: Path) -> None:
    def run(machine: str, *options: str) -> dict[str, Any]:
        shutil.rmtree(tmp_path / "work", ignore_errors=True)  # of the run before
        made = recorder(gpu_record, tmp_path, *options)
        made.tests = made.sanitizer = made.benchmark = lambda: {"status": "passed"}
        made.record["machine"] = {"gpu": machine}
        made.run()
        return {name: p["status"] for name, p in json.loads((tmp_path / "record.json").read_text())["phases"].items()}

    assert run("a", "--skip", "sanitizer") == {"tests": "passed", "sanitizer": "not run", "benchmark": "passed"}
    assert set(run("a", "--skip", "tests,benchmark").values()) == {"passed"}
    # Another machine's results are not taken over.
    assert run("b", "--skip", "tests") == {"tests": "not run", "sanitizer": "passed", "benchmark": "passed"}


SUITE = """
import time, pytest

@pytest.mark.parametrize("n", range(3))
def test_quick(n): assert n != 1, "one of three"

@pytest.mark.skip(reason="needs sm90")
def test_skipped(): pass

@pytest.fixture
def broken():
    yield
    raise RuntimeError("on the way out")

def test_teardown(broken): pass

def test_that_hangs(): time.sleep(100)
"""


def test_a_suite_that_is_cut_off_leaves_the_counts_of_what_ran(
    gpu_record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the record while it runs: this script may be cut off itself."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--device')")
    (tmp_path / "tests" / "test_all.py").write_text(SUITE)
    made = recorder(gpu_record, tmp_path, "--workers", "2", "--tests-timeout", "20")
    (made.work / "conv2d_ext.py").write_text("")
    (made.work / f"{gpu_record.PLUGIN_NAME}.py").write_text(gpu_record.PLUGIN.format(site=str(made.work)))
    # This test may run in a worker of xdist; the suite that it starts does not.
    made.env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(made.work)}
    made.python = functools.partial(gpu_record.Recorder.python, made)
    monkeypatch.setattr(gpu_record, "ROOT", tmp_path)
    saved: list[dict[str, Any]] = []
    made.save = lambda: saved.append(dict(made.record["phases"]["tests"]))
    found = made.tests()
    assert found["status"] == "failed" and "ran out of time (20 s) in " in found["reason"]
    for counts in (found, saved[-1]):
        assert [name.split("::")[-1] for name in counts["unfinished"]] == ["test_that_hangs"]
        assert (counts["passed"], counts["failed"], counts["skipped"]) == (2, 2, 1)
        assert counts["skip_reasons"] == {"Skipped: needs sm90": 1}
        failures = " ".join(counts["failures"])
        assert "test_quick[1]: AssertionError: one of three" in failures and "on the way out" in failures
    assert saved[-1]["status"] == "not run"


# ---- the sanitizer ---------------------------------------------------------------------------------------------------

JUNIT = """\
<testsuites><testsuite>
<testcase classname="a" name="one"/>
<testcase classname="a" name="two"><failure message="assert 1 == 2&#10;more">text</failure></testcase>
<testcase classname="a" name="three"><error message="failed on setup">text</error></testcase>
<testcase classname="a" name="four"><skipped type="pytest.skip" message="needs sm90">text</skipped></testcase>
<testcase classname="a" name="five"><skipped type="pytest.skip" message="needs sm90">text</skipped></testcase>
</testsuite></testsuites>
"""


def test_tests_are_counted_from_pytests_report(sanitize: Any, tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT)
    counts = sanitize.count_tests(tmp_path / "junit.xml")
    assert (counts.passed, counts.failed, counts.skipped) == (1, 2, 2)
    assert counts.skip_reasons == {"needs sm90": 2}
    assert list(counts.failures) == ["a::two: assert 1 == 2", "a::three: failed on setup"]
    assert sanitize.count_tests(tmp_path / "absent.xml") is None


def test_the_counts_of_several_runs_add_up(gpu_record: Any, sanitize: Any) -> None:
    one = sanitize.Counts(3, 1, 2, {"needs sm90": 2}, {"a::b: x": 1})
    two = sanitize.Counts(1, 0, 1, {"needs sm90": 1})
    assert gpu_record.add_counts([one, two]) == sanitize.Counts(4, 1, 3, {"needs sm90": 3}, {"a::b: x": 1})


@pytest.mark.parametrize(
    ("tool", "output", "expected"),
    [
        ("memcheck", "========= ERROR SUMMARY: 0 errors\n", 0),
        ("memcheck", "========= ERROR SUMMARY: 1 error\n", 1),
        ("memcheck", "========= ERROR SUMMARY: 0 errors\nx\n========= ERROR SUMMARY: 30 errors\n", 30),
        (
            "memcheck",
            "= ERROR SUMMARY: 30 errors\n= ERROR SUMMARY: 10 errors were not printed. Use --print-limit\n",
            30,
        ),
        ("racecheck", "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n", 2),
        ("racecheck", "========= ERROR SUMMARY: 0 errors\n", None),
        ("memcheck", "5 passed\n", None),
    ],
)
def test_findings_are_summed_from_the_summaries(sanitize: Any, tool: str, output: str, expected: int | None) -> None:
    assert sanitize.findings(tool, output) == expected


def test_a_tool_is_clean_only_if_everything_says_so(sanitize: Any) -> None:
    clean, some = "========= ERROR SUMMARY: 0 errors\n", sanitize.Counts(passed=1)

    def status(code: int | None = 0, output: str = clean, counts: Any = some) -> str:
        return str(sanitize.judge("memcheck", sanitize.Finished(code, output, 1.0), counts).status)

    assert status() == "passed"
    assert status(code=1) == status(code=sanitize.FOUND) == status(code=None) == "failed"
    assert status(output="") == status(output=clean.replace("0", "3")) == "failed"
    assert status(counts=None) == status(counts=sanitize.Counts(skipped=4)) == "failed"


def test_a_tool_is_clean_only_if_all_its_processes_are(sanitize: Any) -> None:
    clean = sanitize.ToolResult("memcheck", "passed", 0, 4, 0, 1, 9.0)
    cut = sanitize.ToolResult("memcheck", "failed", None, 2, 0, 0, 30.0, "ran out of time")
    found = sanitize.ToolResult("memcheck", "failed", 3, 2, 1, 0, 5.0, "see the output above")
    assert sanitize.together("memcheck", [clean, clean]) == sanitize.ToolResult("memcheck", "passed", 0, 8, 0, 2, 9.0)
    assert sanitize.together("memcheck", [clean, found]).status == "failed"
    assert sanitize.together("memcheck", [clean, found]).findings == 3
    whole = sanitize.together("memcheck", [cut, clean, found])
    assert (whole.status, whole.findings, whole.passed, whole.seconds) == ("failed", None, 8, 30.0)
    assert whole.reason == "ran out of time; see the output above"


def test_every_test_for_memcheck_is_in_one_of_its_processes(sanitize: Any) -> None:
    def collected(marks: str) -> list[str]:
        tests = str(SCRIPTS.parent / "tests" / "test_rows.py")
        command = [sys.executable, "-m", "pytest", tests, "--collect-only", "-q", "--device", "cuda", "-m", marks]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [line for line in found.splitlines() if "::" in line]

    parts = [test for marks in sanitize.MARKS["memcheck"] for test in collected(marks)]
    assert parts and sorted(parts) == sorted(collected("sanitizer"))


def fake_sanitizer(folder: Path, found: int) -> Path:
    """A program that prints what compute-sanitizer prints and writes pytest's report of one passed test."""
    program = folder / "compute-sanitizer"
    program.write_text(
        f"#!{sys.executable}\n"
        + textwrap.dedent(f"""\
            import os, pathlib, sys
            assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "backend:cudaMallocAsync"
            assert sys.argv[sys.argv.index("--kernel-name") + 1] == "kns=conv2d_ext"
            tool = sys.argv[sys.argv.index("--tool") + 1]
            mark = sys.argv[sys.argv.index("-m", sys.argv.index("pytest")) + 1]
            ops = [f"sanitizer and {{op}}" for op in ("fprop", "dgrad", "wgrad")]
            assert mark in (ops if tool == "memcheck" else ["once"])
            junit = next(a for a in sys.argv if a.startswith("--junitxml=")).removeprefix("--junitxml=")
            pathlib.Path(junit).write_text('<testsuite><testcase classname="a" name="one"/></testsuite>')
            if tool == "racecheck":
                print("========= RACECHECK SUMMARY: {found} hazards displayed (0 errors, {found} warnings)")
            else:
                print("========= ERROR SUMMARY: {found} errors")
            sys.exit({86 if found else 0})
            """)
    )
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("found", [0, 2])
def test_the_sanitizer_pass_reports_every_tool(
    sanitize: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, found: int
) -> None:
    monkeypatch.setattr(sanitize, "filter_problem", lambda *arguments: (True, ""))
    results = tmp_path / "results.json"
    status = sanitize.main(["--program", str(fake_sanitizer(tmp_path, found)), "--json", str(results)])
    assert status == (1 if found else 0)
    assert [(r["tool"], r["status"], r["findings"]) for r in json.loads(results.read_text())] == [
        ("memcheck", "failed" if found else "passed", 3 * found),  # of three processes
        *((tool, "failed" if found else "passed", found) for tool in ("racecheck", "synccheck")),
    ]
    out = capsys.readouterr().out
    assert "memcheck: " in out and f"racecheck: {'failed' if found else 'passed'}: {found} hazards" in out


def test_a_missing_sanitizer_is_not_a_pass(sanitize: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.json"
    assert sanitize.main(["--program", str(tmp_path / "absent"), "--json", str(results)]) == 1
    assert "no compute-sanitizer" in capsys.readouterr().out
    assert {r["status"] for r in json.loads(results.read_text())} == {"not run"}


def test_a_filter_that_meets_no_kernel_is_not_a_pass(
    sanitize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanitize, "KERNEL_NAMES", "print('kernel void conv2d_ext::simt<float>()')")
    assert sanitize.filter_problem("conv2d_ext", os.environ, tmp_path) == (True, "")
    useful, reason = sanitize.filter_problem("other", os.environ, tmp_path)
    assert not useful and "meets none" in reason
    monkeypatch.setattr(sanitize, "KERNEL_NAMES", "raise SystemExit('no GPU')")
    assert not sanitize.filter_problem("conv2d_ext", os.environ, tmp_path)[0]


def test_a_command_past_its_time_is_interrupted_and_its_output_kept(sanitize: Any, tmp_path: Path) -> None:
    code = "import time; print('began', flush=True); time.sleep(100)"
    finished = sanitize.run_command([sys.executable, "-c", code], os.environ, tmp_path, 1.5)
    assert finished.code is None and "began" in finished.output and finished.seconds < 30
