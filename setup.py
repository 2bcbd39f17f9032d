"""Builds the two libraries of the package: `_cpu` (schema and CPU) and `_cuda`. Everything else is in pyproject.toml.

Neither is a Python module: conv2d_ext loads them with torch.ops.load_library. They use torch's stable ABI only, so one
wheel serves every Python >= 3.10 and every torch >= 2.10, and the torch of the build may be one without CUDA.

Environment:
    CONV2D_EXT_CUDA       unset: build `_cuda` if nvcc is found; 1: a missing nvcc is an error; 0: leave it out
    CUDA_HOME             the CUDA toolkit; default: the one of the nvcc on PATH
    TORCH_CUDA_ARCH_LIST  architectures of the sources that are not for Hopper alone; default: 8.0+PTX;9.0
    CONV2D_EXT_LINEINFO   1: keep source lines for profilers, in modules three times as large and as slow to load
    MAX_JOBS              compilers at a time
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU, CUDA = "conv2d_ext._cpu", "conv2d_ext._cuda"

TORCH_TARGET = "0x020a000000000000"  # 2.10: the oldest torch that the wheel runs with
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0"  # every GPU from Ampere on; 9.0 so that a first call on Hopper needs no JIT
HOPPER_MARK, HOPPER = "sm90", "arch=compute_90a,code=sm_90a"  # sources named *sm90* are compiled for this alone

# What an installed libtorch_cuda.so exports of the stable ABI and `_cuda` may call. A CPU build of torch has no such
# file, so a library with these symbols and the same soname stands in for it when linking, whichever torch is there.
STAND_IN = """
int aoti_torch_get_current_cuda_stream(int device_index, void** stream) { return 1; }
void torch_c10_cuda_check_msg(int error, char const* file, char const* function, unsigned line, _Bool device_failures,
                              char** message) {}
void torch_c10_cuda_free_error_msg(char* message) {}
"""


class Build(build):
    """`build` from an empty build/lib, so that no file of an earlier build, `_cuda` above all, gets into a wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    """Hands over to torch's BuildExtension when it runs: metadata and sdist are made without importing torch."""

    def run(self) -> None:
        distribution = self.distribution
        try:
            distribution.cmdclass["build_ext"] = torch_build_ext()
        except ModuleNotFoundError as error:
            raise SystemExit(
                f"conv2d_ext: {error}. Building needs torch, and build isolation hides it: install torch, ninja and "
                "setuptools, then `pip install --no-build-isolation .` (`make wheel` does all of this)."
            ) from error
        del distribution.command_obj["build_ext"]
        command: Any = distribution.get_command_obj("build_ext")
        command.inplace, command.editable_mode = self.inplace, self.editable_mode
        distribution.run_command("build_ext")


def torch_build_ext() -> type[build_ext]:
    """torch's BuildExtension with what this package's libraries need."""
    import torch
    from torch.utils import cpp_extension

    class TorchBuildExt(cpp_extension.BuildExtension):
        build_temp: str
        facts: dict[str, Any]

        def build_extensions(self) -> None:
            home = cuda_home()
            names = [ext.name for ext in self.extensions if ext.name == CPU or home is not None]
            changes: list[Any] = [mock.patch.dict(os.environ, PATH=path_with_this_python())]
            if home is not None:
                # A link below the root, so that scripts/nvcc.py can name the toolkit relative to the root.
                link = Path(self.build_temp).absolute() / "cuda"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(home)
                changes += [
                    # torch takes the folder around the nvcc on PATH, which may be a script, or none without CUDA.
                    mock.patch.object(cpp_extension, "CUDA_HOME", str(link)),
                    # Which CUDA torch was built with does not matter to the stable ABI, but torch compares the two, and
                    # has nvcc list the headers for ninja only if it was built with CUDA itself.
                    mock.patch.object(torch.version, "cuda", nvcc_release(home)),
                    mock.patch.dict(os.environ, PYTORCH_NVCC=nvcc_command(link)),
                ]
            for change in changes:
                change.start()
            try:
                if not cpp_extension.is_ninja_available():
                    raise SystemExit("conv2d_ext: building needs ninja (`pip install ninja`).")
                for ext in self.extensions:
                    if ext.name in names:
                        self.fill_in(ext)
                self.extensions[:] = [ext for ext in self.extensions if ext.name in names]
                super().build_extensions()
                self.facts = build_facts(home, torch.__version__)
                write_facts(self.facts, Path(self.get_ext_fullpath(CPU)).parent)
            finally:
                for change in reversed(changes):
                    change.stop()

        def copy_extensions_to_source(self) -> None:  # --inplace
            super().copy_extensions_to_source()
            write_facts(self.facts, ROOT / "conv2d_ext")
            if CUDA not in [ext.name for ext in self.extensions]:  # one of an earlier build would be loaded
                (ROOT / "conv2d_ext" / "_cuda.abi3.so").unlink(missing_ok=True)

        def build_extension(self, ext: Extension) -> None:
            # A folder of their own: both libraries would write the same build.ninja otherwise.
            shared, self.build_temp = self.build_temp, self.temp_of(ext)
            try:
                super().build_extension(ext)
            finally:
                self.build_temp = shared

        def temp_of(self, ext: Extension) -> str:
            return os.path.join(self.build_temp, ext.name)

        def fill_in(self, ext: Extension) -> None:
            """Sets sources, flags and libraries of the placeholder that setup() was given."""
            include_dirs = [str(ROOT / "csrc")]
            prefixes = {str(ROOT): ".", os.path.join(cpp_extension.include_paths()[0], "torch"): "torch"}
            flags: dict[str, Any] = dict(
                sources=sources(ext.name),
                include_dirs=include_dirs,
                py_limited_api=True,
                define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("TORCH_STABLE_ONLY", None)],
                # strip-all: the names of nvcc's temporary files, which hold process numbers, go with the local symbols.
                extra_link_args=["-Wl,-z,defs", "-Wl,--exclude-libs,ALL", "-Wl,--strip-all"],
            )
            cxx = ["-std=c++20", "-O3", "-DNDEBUG", "-g0", "-fvisibility=hidden"]
            if ext.name == CPU:
                flags["extra_compile_args"] = {"cxx": cxx + prefix_maps(prefixes)}
                made = cpp_extension.CppExtension(ext.name, **flags)
                made.libraries = ["torch_cpu", "dl"]
            else:
                flags["define_macros"] += [("USE_CUDA", None)]
                flags["extra_compile_args"] = {
                    "cxx": cxx + prefix_maps(prefixes),
                    "nvcc": nvcc_flags(),
                }
                made = cpp_extension.CUDAExtension(ext.name, **flags)
                made.libraries = ["torch_cpu", "cudart_static", "dl", "rt", "pthread"]
                # The planner, as the CPU's library has compiled it.
                made.extra_objects.append(os.path.join(self.build_temp, CPU, "csrc", "core", "planner.o"))
                made.library_dirs.insert(0, self.make_stand_in(ext))
                wrapped = ("__cudaRegisterFunction", "cudaFuncSetAttribute")  # csrc/cuda/load.cpp
                made.extra_link_args += [f"-Wl,--wrap={name}" for name in wrapped]
                made.extra_link_args += ["-Wl,--no-as-needed", "-ltorch_cuda"]
            vars(ext).update({name: value for name, value in vars(made).items() if not name.startswith("_")})

        def make_stand_in(self, ext: Extension) -> str:
            folder = Path(self.temp_of(ext)) / "stand_in"
            folder.mkdir(parents=True, exist_ok=True)
            source, library = folder / "torch_cuda.c", folder / "libtorch_cuda.so"
            source.write_text(STAND_IN)
            compiler = shlex.split(os.environ.get("CC", "cc"))
            subprocess.run(
                [*compiler, "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}", source, "-o", library], check=True
            )
            return str(folder)

    return TorchBuildExt


def sources(name: str) -> list[str]:
    """The sources of a library, relative to the root, those that take longest to compile first."""
    patterns = ["core/planner.cpp", "ops/schema.cpp", "ops/cpu.cpp"]
    if name == CUDA:
        patterns = ["ops/cuda.cpp", "cuda/**/*.cu", "cuda/**/*.cpp"]
    found = [str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern)]
    return sorted(found, key=lambda name: ("instances" in name, name))


def prefix_maps(prefixes: dict[str, str]) -> list[str]:
    """Flags that keep folders of the build machine out of __FILE__, which error messages show."""
    return [f"-ffile-prefix-map={folder}={name}" for folder, name in prefixes.items()]


def nvcc_flags() -> list[str]:
    return [
        # -O is of the host's code alone.
        *["-std=c++20", "-O2", "-DNDEBUG", "-Xcompiler=-fvisibility=hidden,-Wall"],
        *(["-lineinfo"] if os.environ.get("CONV2D_EXT_LINEINFO") == "1" else []),
        # Registers and spills go to the log, which scripts/nvcc.py reads.
        "-Xptxas=-v",
        # torch switches these off for its own headers' sake; no device source includes one.
        *[
            f"-U__CUDA_NO_{name}__"
            for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
        ],
        *[f"-gencode={architecture}" for architecture in architectures()],
        f"--{HOPPER_MARK}-gencode={HOPPER}",
    ]


def listed_architectures() -> list[str]:
    """Such as ["8.0", "9.0+PTX"]."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    return listed.replace(";", " ").replace(",", " ").split()


def architectures() -> list[str]:
    """nvcc's -gencode values for the sources that are not for Hopper alone."""
    values: list[str] = []
    for item in listed_architectures():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if match is None:
            raise SystemExit(f"conv2d_ext: TORCH_CUDA_ARCH_LIST: expected items like 8.0 or 9.0+PTX, got {item!r}")
        number = match[1] + match[2]
        values.append(f"arch=compute_{number},code=sm_{number}")
        if match[3]:
            values.append(f"arch=compute_{number},code=compute_{number}")
    return values


def cuda_home() -> Path | None:
    """The CUDA toolkit's folder, the one with include/ and lib64/, or None to build without CUDA."""
    wish = os.environ.get("CONV2D_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"conv2d_ext: CONV2D_EXT_CUDA: expected 0, 1 or nothing, got {wish!r}")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if nvcc is not None and os.access(nvcc, os.X_OK):
        # nvcc itself says where its toolkit is; the file on PATH may be a link or a script that calls another.
        report = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
        match = re.search(r"^#\$ TOP=(.*)$", report, re.MULTILINE)
        if match is not None:
            return Path(match[1].strip()).resolve()
    what = f"no nvcc in {home}/bin (CUDA_HOME)" if home else "no nvcc on PATH"
    if wish == "1":
        raise SystemExit(f"conv2d_ext: CONV2D_EXT_CUDA=1, but there is {what}.")
    bar = "*" * 78
    print(
        f"{bar}\nconv2d_ext: {what}: building for the CPU ONLY. CUDA tensors will be refused.\n"
        f"Set CUDA_HOME, or CONV2D_EXT_CUDA=1 to make this an error, or =0 to say that it is meant.\n{bar}",
        file=sys.stderr,
    )
    return None


def build_facts(home: Path | None, torch_version: str) -> dict[str, Any]:
    """What `python -m conv2d_ext info` says of the build."""
    hopper = any(HOPPER_MARK in Path(source).name for source in sources(CUDA))
    return {
        "torch_version": torch_version,
        "cuda_version": nvcc_release(home) if home else None,
        "arch_list": listed_architectures() if home else [],
        "hopper_arch_list": ["9.0a"] if home and hopper else [],
    }


def write_facts(facts: dict[str, Any], package: Path) -> None:
    (package / "data").mkdir(parents=True, exist_ok=True)
    (package / "data" / "build.json").write_text(json.dumps(facts, indent=1) + "\n")


def nvcc_release(home: Path) -> str:
    text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    if match is None:
        raise SystemExit(f"conv2d_ext: cannot read the version of {home}/bin/nvcc from: {text}")
    return match[1]


def nvcc_command(home: Path) -> str:
    """What ninja runs as nvcc: a script that runs it below the root and turns spills into errors."""
    nvcc = os.environ.get("PYTORCH_NVCC") or shlex.quote(str(home / "bin" / "nvcc"))
    return f"{shlex.join([sys.executable, str(ROOT / 'scripts' / 'nvcc.py')])} {nvcc}"


def path_with_this_python() -> str:
    """PATH with ninja of the environment that runs this, also where the environment is not activated."""
    return os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")


setup(
    # Placeholders: setuptools must know that there are extensions; TorchBuildExt fills them in.
    ext_modules=[Extension(name, sources(name), py_limited_api=True) for name in (CPU, CUDA)],
    cmdclass={"build": Build, "build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
