"""Options, and what every test gets: the device, a fixed seed, torch's strict float32, NaN in fresh memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from cases import CASES, Case

PLACES: dict[Case | None, int] = {case: place for place, case in enumerate(CASES)}
LARGE = {case for case in CASES if case.large}

# torch.testing._internal, where OpInfo and opcheck are, forbids on import to set flags but by a context manager, in the
# whole process. These tests and the program that they test set flags.
torch.backends.disable_global_flags = lambda: None

hypothesis.settings.register_profile(
    "default", deadline=None, print_blob=True, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("default"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors of the tests live")
    parser.addoption("--fuzz", type=int, default=300, help="examples of each hypothesis test in test_fuzz.py")


def pytest_configure(config: pytest.Config) -> None:
    # Several workers share the cores; one thread each also keeps the order of summation the same in every run.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def case_of(item: pytest.Item) -> Case | None:
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    return case if isinstance(case, Case) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --device cuda, one instance of each test that needs a GPU is kept, to be skipped, and no large case.

    The others are left out of the run: thousands of skips would hide those that say something.
    """
    device = config.getoption("--device")
    absent = device == "cuda" and not torch.cuda.is_available()
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    seen: set[str] = set()
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if absent and "device" in fixtures:
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device here"))
        if device == "cpu" and "cuda" in fixtures:
            function = item.nodeid.split("[")[0]
            (left_out if function in seen else kept).append(item)
            seen.add(function)
        elif device == "cpu" and case_of(item) in LARGE:
            left_out.append(item)
        else:
            kept.append(item)
    # Tests of a case follow each other, and use the same values and references again.
    items[:] = sorted(kept, key=lambda item: PLACES.get(case_of(item), -1))
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish() -> None:
    gc.freeze()  # thousands of tests, which live as long as the process: the collector need not look at them again


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("--device"))


@pytest.fixture
def cuda(device: str) -> str:
    """For a test that has no meaning on a CPU."""
    if device != "cuda":
        pytest.skip("needs --device cuda")
    return device


@pytest.fixture(scope="session")
def examples(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--fuzz"))


@pytest.fixture(autouse=True)
def fixed_state() -> Iterator[None]:
    """The seed and strict float32, so that an error bound of float32 holds; a test that wants TF32 sets it itself."""
    torch.manual_seed(0)
    # Not the newer fp32_precision: with it torch.export fails, because torch refuses to read the older flag beside it.
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch hands out is NaN until written: an element of a result that no kernel wrote shows.

    Torch fills it so in its deterministic mode; the same covers the workspaces of the operators.
    """
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms imports Inductor, which takes seconds
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(scope="session")
def package_environment() -> dict[str, str]:
    """The environment of a subprocess that must import the same conv2d_ext as this process, from any folder."""
    import conv2d_ext

    folder = str(Path(conv2d_ext.__file__).parent.parent)
    path = os.pathsep.join(p for p in (folder, os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
