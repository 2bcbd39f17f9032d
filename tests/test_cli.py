"""The command line, as a user starts it: in a process of its own, from a folder that is not the project's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import conv2d_ext
from conv2d_ext.cli import main

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tmp_path: Path, package_environment: dict[str, str]) -> Command:
    def run(*arguments: str, timeout: float = 250) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "conv2d_ext", *arguments],
            capture_output=True, text=True, timeout=timeout, cwd=tmp_path, env=package_environment,
        )  # fmt: skip

    return run


def test_help_names_the_commands(command: Command) -> None:
    run = command("--help")
    assert run.returncode == 0
    for name in ("info", "check", "bench", "explain", "demo"):
        assert name in run.stdout


@pytest.mark.parametrize("name", ("info", "check", "bench", "explain", "demo"))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"conv2d_ext {name}" in capsys.readouterr().out


def test_info_prints_versions_and_libraries(command: Command) -> None:
    run = command("info")
    assert run.returncode == 0, run.stderr
    assert conv2d_ext.__version__ in run.stdout
    assert torch.__version__ in run.stdout
    from conv2d_ext import _library

    if _library.CUDA_ERROR is not None:
        assert _library.CUDA_ERROR in run.stdout


def test_info_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    assert torch.__version__ in json.dumps(json.loads(capsys.readouterr().out))


def test_explain_prints_the_kernel_of_a_shape(command: Command) -> None:
    run = command("explain", "--input", "8", "64", "56", "56", "--weight", "64", "64", "3", "3", "--padding", "1")
    assert run.returncode == 0, run.stderr
    assert any(name in run.stdout for name in torch.ops.conv2d_ext.kernels())


@pytest.mark.parametrize(
    "arguments,word",
    (
        (("--input", "1", "3", "8", "8", "--weight", "4", "5", "3", "3"), "weight"),
        (("--input", "1", "3", "2", "2", "--weight", "4", "3", "3", "3"), "input"),
        (("--input", "1", "3", "8", "8", "--weight", "4", "3", "3", "3", "--stride", "0"), "stride"),
        (("--input", "1", "3", "8", "8", "--weight", "4", "3", "3", "3", "--padding", "1", "1", "1"), "padding"),
    ),
    ids=("channels", "size", "stride", "padding"),
)
def test_explain_of_a_bad_shape_is_one_line_and_not_a_traceback(
    arguments: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *arguments]) == 2
    text = capsys.readouterr().err
    assert word in text and len(text.splitlines()) == 1


@pytest.mark.parametrize("name", ("bench", "demo"))
@pytest.mark.parametrize("wrong", ("tpu", "meta", "cuda:99", "cuda:x"))
def test_a_device_that_is_not_there_is_one_line_and_not_a_traceback(
    name: str, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--device", wrong]) == 2
    text = capsys.readouterr().err
    assert wrong in text and len(text.splitlines()) == 1


@pytest.mark.parametrize("arguments", (("bench", "--json"), ("bench", "--markdown"), ("demo", "--output")), ids=str)
def test_a_file_that_could_not_be_written_is_refused_before_the_work(
    arguments: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (str(tmp_path / "no folder" / "file"), str(tmp_path)):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, wrong])
        assert ended.value.code == 2 and wrong in capsys.readouterr().err


@pytest.mark.slow
def test_check_passes(command: Command, device: str) -> None:
    run = command("check", "--device", device)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.strip()


@pytest.mark.slow
def test_bench_times_a_scaled_down_layer_and_writes_json(command: Command, device: str, tmp_path: Path) -> None:
    run = command(
        "bench", "--small", "--device", device, "--dtypes", "fp32", "--layouts", "nchw", "--ops", "fprop",
        "--layers", "batch1", "--repeats", "2", "--json", str(tmp_path / "bench.json"), "--markdown",
        str(tmp_path / "bench.md"), "--budget", "30",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert json.loads((tmp_path / "bench.json").read_text())
    assert "|" in (tmp_path / "bench.md").read_text()


@pytest.mark.slow
def test_the_demo_writes_a_picture_and_both_networks_learn(command: Command, device: str, tmp_path: Path) -> None:
    for module in ("sklearn", "matplotlib"):
        pytest.importorskip(module, reason=f"{module} is not installed: the demo needs it")
    picture = tmp_path / "demo.png"
    run = command("demo", "--device", device, "--output", str(picture))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 50_000


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tune"])
    assert ended.value.code == 2 and "tune" in capsys.readouterr().err


def test_importing_the_package_is_quiet_and_imports_no_extra(package_environment: dict[str, str]) -> None:
    """No output, no warning, no GPU context, none of the demo's packages."""
    program = (
        "import sys, conv2d_ext, torch\n"
        "assert not {'sklearn', 'matplotlib', 'rich', 'pytest'} & set(sys.modules)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, env=package_environment
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "" and run.stderr == ""
