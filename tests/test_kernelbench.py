"""The KernelBench examples at their small sizes: every problem runs, and ours gives what torch's module gives."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from reference import error, tolerance

FOLDER = Path(__file__).parent.parent / "examples" / "kernelbench"
PROBLEMS = sorted(FOLDER.glob("p*.py"))

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the examples are not beside the tests")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def test_there_are_twelve_problems() -> None:
    assert len(PROBLEMS) == 12


@pytest.mark.parametrize("path", PROBLEMS, ids=lambda p: p.stem)
def test_equal_seeds_give_both_models_equal_parameters(path: Path) -> None:
    problem = load(path)
    made = []
    for name in ("Model", "ModelNew"):
        torch.manual_seed(42)
        made.append(getattr(problem, name)(*problem.get_init_inputs()))
    ours, theirs = made[1], made[0]
    assert isinstance(ours, torch.nn.Module)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    layers = [m for m in theirs.modules() if isinstance(m, torch.nn.Conv2d)]
    assert layers and not [m for m in ours.modules() if type(m) is torch.nn.Conv2d]
    image = torch.rand(1, layers[0].in_channels, 40, 40)
    length = max(m.weight[0].numel() for m in layers)
    assert error(ours(image), theirs(image).double()) <= 2 * tolerance(torch.float32, length)


@pytest.mark.slow
def test_the_runner_runs_every_problem_small(device: str, tmp_path: Path, package_environment: dict[str, str]) -> None:
    run = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--small", "--device", device, "--trials", "3", "--no-compile"],
        capture_output=True, text=True, timeout=280, cwd=tmp_path, env=package_environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    for path in PROBLEMS:
        assert path.stem in run.stdout or path.stem.split("_", 1)[0].removeprefix("p") in run.stdout
    assert "fast_1" in run.stdout and "fast_2" in run.stdout
