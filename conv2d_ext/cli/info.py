"""Prints what is installed: versions, GPU, compiled architectures, libraries and why one did not load."""

from __future__ import annotations

import argparse
import importlib.resources
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import conv2d_ext
from conv2d_ext import _library

HELP = "versions, GPU, compiled architectures, libraries"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def driver_version() -> str | None:
    """The NVIDIA driver's version, or None where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] if found else None


def build_facts() -> dict[str, Any]:
    """What setup.py wrote about the build (cuda_version, arch_list, hopper_arch_list, torch_version), or {}."""
    file = importlib.resources.files("conv2d_ext") / "data" / "build.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """The facts that a measurement depends on, as JSON-able values. None stands for unknown or absent."""
    facts: dict[str, Any] = {
        "conv2d_ext": conv2d_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cudnn": None,
        "driver": None,
        "gpu": None,
    }
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        gpu = torch.cuda.get_device_properties(device or torch.device("cuda", torch.cuda.current_device()))
        facts |= {
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver_version(),
            "gpu": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "sm_count": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "l2_bytes": getattr(gpu, "L2_cache_size", None),
        }
    return facts


def processor() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def libraries() -> list[dict[str, str | None]]:
    """The two libraries: name, path (None: not in this installation), error (None: loaded)."""
    folder = Path(conv2d_ext.__file__).parent
    rows: list[dict[str, str | None]] = []
    for name, error in (("_cpu", None), ("_cuda", _library.CUDA_ERROR)):
        path = folder / f"{name}.abi3.so"
        rows.append({"name": name, "path": str(path) if path.is_file() else None, "error": error})
    return rows


def run(args: argparse.Namespace) -> int:
    facts, build = machine(), build_facts()
    if args.json:
        rows = list(torch.ops.conv2d_ext.kernels())
        print(json.dumps({"machine": facts, "build": build, "libraries": libraries(), "kernels": rows}, indent=1))
        return 0

    def line(name: str, value: object) -> None:
        print(f"{name:<22} {value}")

    def listed(name: str) -> str:
        value = build.get(name)
        if isinstance(value, list):
            return ", ".join(map(str, value)) or "none"
        return str(value or "unknown")

    line("conv2d_ext", facts["conv2d_ext"])
    line("torch", f"{facts['torch']} (CUDA {facts['cuda'] or 'none'}, cuDNN {facts['cudnn'] or 'none'})")
    line("python", f"{facts['python']} on {facts['platform']}")
    line("processor", f"{facts['processor']}, {facts['threads']} threads")
    if facts["gpu"]:
        memory = facts["memory_bytes"] / 2**30
        line(
            "gpu",
            f"{facts['gpu']}: compute capability {facts['compute_capability']}, {facts['sm_count']} SMs, "
            f"{memory:.0f} GiB",
        )
        line("driver", facts["driver"] or "unknown")
    else:
        line("gpu", "none that torch can use")
    line("built with", f"torch {listed('torch_version')}, CUDA {listed('cuda_version')}")
    line("architectures", listed("arch_list"))
    line("Hopper kernels for", listed("hopper_arch_list"))
    for library in libraries():
        line(f"library {library['name']}", library["path"] or "not in this installation")
        if library["error"]:
            line("", f"not loaded: {library['error']}")
    line("kernels", f"{len(torch.ops.conv2d_ext.kernels())} rows")
    return 0
