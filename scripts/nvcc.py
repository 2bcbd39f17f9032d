"""Runs nvcc for one source and refuses an object whose kernels are slow by accident. setup.py puts it in nvcc's place.

    python scripts/nvcc.py <nvcc> <arguments of nvcc>
    python scripts/nvcc.py --report <build folder>       # sums up what ptxas said; exit 1 if an object is refused

Three things that nvcc cannot be told by flags alone:
- Spills and lost performance (C7510: ptxas serialises wgmma; C7508: setmaxnreg ignored) are errors: the object is
  removed, so that the next build fails too. What ptxas printed stays beside the object, in <object>.ptxas.txt.
- `--sm90-gencode=X`: a source with `sm90` in its name is compiled for X alone, any other for the -gencode flags; if its
  name ends in `_ptx`, every architecture's code is made from one PTX, the oldest architecture's, in half the time.
- Names in line tables: nvcc has no -ffile-prefix-map for device code, so it runs in the root with relative paths.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPILL = re.compile(r"\b[1-9]\d* bytes spill (?:stores|loads)")
LOSS = re.compile(r"\(C\d+\) Potential Performance Loss")
FUNCTION = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")


def arguments(given: list[str]) -> list[str]:
    """The arguments for nvcc proper: paths relative to the root, one set of -gencode flags by the source's name."""
    hopper = [arg.partition("=")[2] for arg in given if arg.startswith("--sm90-gencode=")]
    rest = [arg for arg in given if not arg.startswith("--sm90-gencode=")]
    names = [Path(arg).stem for arg in rest if arg.endswith(".cu")]
    if hopper and any("sm90" in name for name in names):
        rest = [arg for arg in rest if not arg.startswith("-gencode=")] + [f"-gencode={value}" for value in hopper]
    elif any(name.endswith("_ptx") for name in names):
        rest = from_one_ptx(rest)
    return [re.sub(rf"^(-I|-isystem)?{re.escape(str(ROOT))}/", r"\1", arg) for arg in rest]


def from_one_ptx(args: list[str]) -> list[str]:
    """`args` with the -gencode flags as one. PTX of 9.0a and the like is for no other architecture: these stay."""
    pairs = [re.fullmatch(r"-gencode=arch=compute_(\d+),code=(sm|compute)_\d+", arg) for arg in args]
    if sum(arg.startswith("-gencode=") for arg in args) != sum(pair is not None for pair in pairs):
        return args
    found = [pair for pair in pairs if pair is not None]
    if not found:
        return args
    oldest = min((pair[1] for pair in found), key=int)
    codes = dict.fromkeys(f"{pair[2]}_{pair[1] if pair[2] == 'sm' else oldest}" for pair in found)
    rest = [arg for arg in args if not arg.startswith("-gencode=")]
    return [*rest, f"-gencode=arch=compute_{oldest},code=[{','.join(codes)}]"]


def absolute_dependencies(text: str) -> str:
    """A list of headers as nvcc writes it, for ninja, which runs in another folder than nvcc did."""
    root = str(ROOT).replace(" ", "\\ ")
    return re.sub(r"(?<!\\)(^|\s)(?=[^\s\\/:])", lambda match: f"{match[1]}{root}/", text)


def complaints(log: str) -> list[str]:
    """What in the output of ptxas is an error here, one line each."""
    found, function = [], ""
    for line in log.splitlines():
        named = FUNCTION.search(line)
        function = f"{named[1]} ({named[2]}): " if named else function
        if SPILL.search(line):
            found.append(function + line.strip())
        if LOSS.search(line):
            found.append(line.strip())
    return found


def compile_one(given: list[str]) -> int:
    args = arguments(given)
    if "-o" not in args:  # such as --version: there is no object to judge
        return subprocess.run(args, cwd=ROOT).returncode
    target = ROOT / args[args.index("-o") + 1]
    # A compiler takes the current folder's name from PWD if that leads there, and writes it into line tables.
    result = subprocess.run(
        args, cwd=ROOT, env={**os.environ, "PWD": "/proc/self/cwd"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(result.stdout, end="")
    if result.returncode != 0:
        return result.returncode
    if "-MF" in args:
        listing = ROOT / args[args.index("-MF") + 1]
        listing.write_text(absolute_dependencies(listing.read_text()))
    target.with_suffix(".ptxas.txt").write_text(result.stdout)
    bad = complaints(result.stdout)
    if bad:
        target.unlink()
        print("error: refused, see scripts/nvcc.py:", *bad, sep="\n  ")
    return 1 if bad else 0


def report(folder: Path) -> int:
    logs = {path: path.read_text() for path in sorted(folder.rglob("*.ptxas.txt"))}
    bad = {path: complaints(log) for path, log in logs.items()}
    kernels = sum(len(FUNCTION.findall(log)) for log in logs.values())
    for path, lines in bad.items():
        print(*[f"{path.name}: {line}" for line in lines], sep="\n", end="\n" if lines else "")
    print(f"ptxas: {len(logs)} objects, {kernels} kernels, {sum(map(len, bad.values()))} spills or losses")
    return 0 if logs and not any(bad.values()) else 1


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--report", folder]:
            sys.exit(report(Path(folder)))
        case [] | ["--report", *_]:
            sys.exit(__doc__)
        case given:
            sys.exit(compile_one(given))
