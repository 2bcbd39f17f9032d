"""The rules that the tree itself must keep: who includes whom, where PTX is, that the table of kernels and the compiled
instances agree, that nothing names the machine it was made on, and what scripts/nvcc.py refuses.

These read the sources, so they need the repository (or the sdist), no GPU, and for the table a C++ preprocessor.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"

# What a folder may include from csrc/, and a predicate on what it may include from elsewhere.
ALLOWED = {"core": {"core"}, "cuda": {"core", "cuda"}, "ops": {"core", "cuda", "ops"}}
STANDARD = re.compile(r"[a-z_0-9]+")  # <cstdint>, not <cuda.h>, not <torch/...>
TORCH = re.compile(r"(torch|ATen|c10|caffe2)/|Python\.h|pybind11")

SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu", ".def"})
INSTANCES = sorted((CSRC / "cuda" / "instances").glob("*.cu"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code_of(path: Path) -> str:
    """The text without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def includes_of(path: Path) -> tuple[list[str], list[str]]:
    """The names that a source includes in quotes and in angle brackets."""
    found = re.findall(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', code_of(path), re.MULTILINE)
    return [quoted for quoted, _ in found if quoted], [angled for _, angled in found if angled]


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_includes_go_one_way(source: Path) -> None:
    folder = source.relative_to(CSRC).parts[0]
    quoted, angled = includes_of(source)
    for name in quoted:
        target = next((base / name for base in (source.parent, CSRC) if (base / name).exists()), None)
        assert target is not None, f"{name_of(source)} includes {name}, which is not in csrc/"
        other = target.resolve().relative_to(CSRC).parts[0]
        assert other in ALLOWED[folder], f"{name_of(source)}: {folder}/ may not include {other}/ ({name})"
    for name in angled:
        if folder == "core":
            assert STANDARD.fullmatch(name), f"{name_of(source)}: {folder}/ is standard C++ only, not <{name}>"
        if folder != "ops":
            assert not TORCH.match(name), f"{name_of(source)}: torch is for ops/ only, not <{name}>"


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_ptx_is_in_ptx_cuh_alone(source: Path) -> None:
    if source.name != "ptx.cuh":
        assert not re.search(r"\b(asm|__asm__)\b", code_of(source))


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_no_source_reads_the_environment(source: Path) -> None:
    assert not re.search(r"\b(secure_)?getenv\b", code_of(source))


# ---- the table and the instances -------------------------------------------------------------------------------------


def expanded_rows(text: str) -> list[tuple[str, ...]]:
    """The argument lists of all macro calls that are left after the preprocessor ran over kernels.def and `text`."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs a C++ preprocessor; there is no {compiler[0]}")
    source = f'#include "{CSRC}/core/kernels.def"\n{text}\n'
    command = [*compiler, "-E", "-P", "-x", "c++", "-"]
    output = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    calls = re.findall(r"\bCONV2D_EXT_\w+\s*\(([^()]*)\)", output)
    return [tuple(part.strip() for part in call.split(",")) for call in calls]


def table_rows() -> list[tuple[str, ...]]:
    return expanded_rows("CONV2D_EXT_KERNELS(CONV2D_EXT_ROW_IN_TABLE)")


def test_every_row_of_the_table_is_compiled_once() -> None:
    table = Counter(table_rows())
    assert table, "no rows in kernels.def"
    compiled: Counter[tuple[str, ...]] = Counter()
    for path in INSTANCES:
        lines = [line for line in code_of(path).splitlines() if not line.lstrip().startswith("#")]
        # What depthwise rows have for all GPUs is compiled apart from them.
        compiled.update(expanded_rows("\n".join(line for line in lines if "DEPTHWISE_PLAIN" not in line)))
    assert {row: count for row, count in table.items() if count > 1} == {}, "rows that are in the table twice"
    assert sorted(table - compiled) == [], "rows of kernels.def that no file of cuda/instances compiles"
    assert sorted(compiled - table) == [], "compiled twice, or not in kernels.def"


@pytest.mark.parametrize("path", INSTANCES, ids=name_of)
def test_an_instance_is_includes_and_rows_of_the_table(path: Path) -> None:
    text = path.read_text()
    assert re.fullmatch(r'(#include "\.\./\w+\.cuh"\n)+(CONV2D_EXT_\w+\([\w, ]+\)\n)+', text), text


def test_kernels_do_not_see_the_table() -> None:
    """A new row compiles no kernel but its own: instances see the macros that name their rows, not what these hold."""
    for path in SOURCES:
        if path.parent.name == "cuda":
            assert not re.search(r"\bCONV2D_EXT_KERNELS\b|\btable\.h\b|\bplan\.h\b", code_of(path)), name_of(path)


def test_the_ops_name_the_rows_of_the_table() -> None:
    """kernels() of the installed library is made from the same kernels.def as this tree has."""
    import torch

    import conv2d_ext  # noqa: F401

    # family_op_dtype_<tile_m>x<tile_n>_variant: a row's first three arguments open its name.
    names = torch.ops.conv2d_ext.kernels()
    assert len(names) == len(set(names))
    assert ["_".join(row[:3]) for row in table_rows()] == [re.sub(r"_\d+x\d+_.*", "", name) for name in names]


def test_the_kernels_page_names_every_kernel_file_and_no_other() -> None:
    """Where the page writes tma*.cuh, the table at its head has the names."""
    kernels = {path.name for path in (CSRC / "cuda").glob("*.cuh") if "__global__" in code_of(path)}
    named = set(re.findall(r"\b\w+\.cuh\b", (ROOT / "docs" / "kernels.md").read_text()))
    assert sorted(kernels - named) == [] and sorted(named - {path.name for path in SOURCES}) == []


# ---- nothing names a machine -----------------------------------------------------------------------------------------

# Folders of one machine, and hosts of package registries: the project says neither, whoever builds it chooses them.
# Written with brackets so that this file does not match itself.
MACHINE = re.compile(r"(?<![\w.~}])/(?:[r]oot|[h]ome|[U]sers|[w]ork|[m]nt|[o]pt)/")
REGISTRY = re.compile(r"[p]ypi\.org|[p]ythonhosted\.org|[d]ownload\.pytorch\.org|(?:extra-|--)[i]ndex-url|[f]ind-links")


def tracked_files() -> list[Path]:
    """The files that git has or would take; in an sdist, all of them."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [ROOT / name for name in sorted(set(listed.split("\0"))) if name and (ROOT / name).is_file()]
    skipped = {".venv", "build", "dist", "__pycache__", ".hypothesis"}
    return sorted(path for path in ROOT.rglob("*") if path.is_file() and not skipped & set(path.parts))


def test_the_tree_holds_sources_alone() -> None:
    """No wheel, library or archive by mistake: docs/bench.md, the largest file that belongs here, has some 250 kB."""
    built = (".whl", ".so", ".o", ".a", ".pyc", ".gz", ".tgz", ".zip", ".zst")
    # An sdist's folder may hold what was built in it since; there git says what is the project's.
    files = tracked_files() if (ROOT / ".git").exists() else []
    assert [name_of(path) for path in files if path.suffix in built or path.stat().st_size > 500_000] == []


@pytest.mark.parametrize("pattern", [MACHINE, REGISTRY], ids=["folders", "registries"])
def test_the_tree_names_no_machine(pattern: re.Pattern[str]) -> None:
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture
        found += [f"{name_of(path)}:{number}: {line.strip()[:100]}" for number, line in enumerate(lines, 1)
                  if pattern.search(line)]  # fmt: skip
    assert found == []


def test_the_libraries_name_no_folder_of_the_build_machine() -> None:
    """Neither in error messages (__FILE__) nor in the line tables of kernels."""
    import conv2d_ext

    libraries = sorted(Path(conv2d_ext.__file__).parent.glob("*.so"))
    assert libraries
    for library in libraries:
        found = re.findall(rb"[ -~]*(?:/site-packages/|/csrc/)[ -~]*", library.read_bytes())
        absolute = [text for text in found if text.startswith(b"/") and not text.startswith(b"/proc/self/cwd/")]
        assert absolute == [], library.name


# ---- the build's own check -------------------------------------------------------------------------------------------


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nvcc() -> ModuleType:
    return script("nvcc")


PTXAS = """ptxas info    : Compiling entry function '_Z3oneI6__halfEvPT_' for 'sm_80'
ptxas info    : Function properties for _Z3oneI6__halfEvPT_
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers, 8 bytes cumulative stack size, 376 bytes cmem[0]
"""


def test_a_build_without_spills_passes(nvcc: ModuleType) -> None:
    assert nvcc.complaints(PTXAS.format(stack=8, spill=0)) == []


def test_a_spill_is_refused_and_names_the_kernel(nvcc: ModuleType) -> None:
    (line,) = nvcc.complaints(PTXAS.format(stack=736, spill=872))
    assert "_Z3oneI6__halfEvPT_ (sm_80)" in line and "872 bytes spill stores" in line


@pytest.mark.parametrize("code", ["C7510", "C7511", "C7508"])
def test_lost_performance_is_refused(nvcc: ModuleType, code: str) -> None:
    loss = (
        f"ptxas info    : ({code}) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    )
    assert nvcc.complaints(PTXAS.format(stack=0, spill=0) + loss) == [loss]


def test_without_an_object_the_compiler_is_run_as_it_stands(nvcc: ModuleType) -> None:
    assert nvcc.compile_one([sys.executable, "-c", "raise SystemExit(3)"]) == 3


def test_without_arguments_the_build_s_check_says_how_it_is_run() -> None:
    run = subprocess.run([sys.executable, ROOT / "scripts" / "nvcc.py"], capture_output=True, text=True)
    assert run.returncode == 1 and "--report" in run.stderr and "Traceback" not in run.stderr


def test_hopper_sources_are_compiled_for_hopper_alone(nvcc: ModuleType) -> None:
    generic, hopper = "-gencode=arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"
    flags = [generic, f"--sm90-gencode={hopper}", "-c"]
    assert nvcc.arguments(["nvcc", *flags, f"{ROOT}/csrc/cuda/a_sm90.cu"]) == [
        "nvcc", "-c", "csrc/cuda/a_sm90.cu", f"-gencode={hopper}",
    ]  # fmt: skip
    assert nvcc.arguments(["nvcc", *flags, f"-I{ROOT}/csrc", f"{ROOT}/csrc/cuda/sm90/a.cu"]) == [
        "nvcc", generic, "-c", "-Icsrc", "csrc/cuda/sm90/a.cu",
    ]  # fmt: skip


def test_a_source_of_one_ptx_is_compiled_once_for_all_architectures(nvcc: ModuleType) -> None:
    listed = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_80,code=compute_80"]
    listed.append("-gencode=arch=compute_90,code=sm_90")
    once = "-gencode=arch=compute_80,code=[sm_80,compute_80,sm_90]"
    assert nvcc.arguments(["nvcc", *listed, "--sm90-gencode=x", "a_ptx.cu"]) == ["nvcc", "a_ptx.cu", once]
    assert nvcc.arguments(["nvcc", *listed, "a.cu"]) == ["nvcc", *listed, "a.cu"]
    special = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
    assert nvcc.arguments(["nvcc", *special, "a_ptx.cu"]) == ["nvcc", *special, "a_ptx.cu"]


# ---- arrivals that pass loads ----------------------------------------------------------------------------------------


def sass(*instructions: tuple[str, int, int]) -> list[str]:
    """cuobjdump's lines of (text, mask of scoreboards that are waited for, scoreboard that is set)."""
    lines = ["\t\tFunction : _ZN10conv2d_ext5tests4loopILi3EEEvv"]
    for i, (text, waits, board) in enumerate(instructions):
        lines.append(f"        /*{16 * i:04x}*/                   {text} ;  /* 0x{0:016x} */")
        lines.append(f"                                            /* 0x{waits << 52 | board << 46:016x} */")
    return lines


@pytest.mark.parametrize(
    "before,after,loads",
    (
        (("NOP", 0, 7), ("NOP", 0, 7), 1),  # the load at the loop's end passes the arrival at its head
        (("IADD3 R1, R2, R3, RZ", 1, 7), ("NOP", 0, 7), 0),
        (("IADD3 R1, R2, R3, RZ", 2, 7), ("NOP", 0, 7), 1),  # a wait for another scoreboard
        (("DEPBAR.LE SB0, 0x0", 0, 7), ("NOP", 0, 7), 0),
        (("DEPBAR.LE SB0, 0x1", 0, 7), ("LDS R6, [R5]", 0, 0), 1),  # the older of two has ended
        (("@P1 BRA 0x20", 0, 7), ("MOV R4, R2", 1, 7), 0),
        (("BRA.DIV UR4, 0x20", 0, 7), ("NOP", 0, 7), 1),
    ),
)
def test_arrivals_are_found_along_branches(
    before: tuple[str, int, int], after: tuple[str, int, int], loads: int
) -> None:
    arrivals = script("arrivals")
    loop = (("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R1], RZ", 0, 7), ("LDS R2, [R3]", 0, 0), after, ("@P0 BRA 0x0", 0, 7))
    ((name, body),) = arrivals.functions(sass(before, *loop, ("EXIT", 0, 7)))
    assert arrivals.kernel(name) == "tests::loop"
    assert list(arrivals.arrivals(body).values()) == [loads]


def test_kernels_whose_arrivals_may_pass_loads_exist() -> None:
    sources = [path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh")]

    def exists(name: str) -> bool:
        space, _, kernel = name.rpartition("::")
        return any(f"namespace conv2d_ext::{space} {{" in s and re.search(rf"\b{kernel}\(", s) for s in sources)

    assert {name for name in script("arrivals").KNOWN if not exists(name)} == set()
