"""Arrivals at barriers, in SASS, that pass loads from shared memory which are under way (csrc/cuda/give_back.cuh).

    cuobjdump -sass -arch sm_90a FILE | python scripts/arrivals.py

Prints the kernels that have some, with their addresses. Not each is a fault: the loads may be of another stage than the
one that is given back, which its author has to say. Instructions are read in their order, without branches.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator

FUNCTION = re.compile(r"Function : (\S+)")
FIRST = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/")
SECOND = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")


def instructions(lines: Iterable[str]) -> Iterator[tuple[str, str, str, int]]:
    """(function, address, instruction, upper word) of each instruction."""
    function, address, text = "", "", ""
    for line in lines:
        if found := FUNCTION.search(line):
            function = found[1]
        elif found := FIRST.match(line):
            address, text = found[1], found[2]
        elif text and (found := SECOND.match(line)):
            yield function, address, text, int(found[1], 16)
            text = ""


def arrivals(lines: Iterable[str]) -> dict[str, list[tuple[str, int]]]:
    """By function, the arrivals: their address, and how many loads are under way."""
    found: dict[str, list[tuple[str, int]]] = {}
    current = ""
    pending: list[int] = []  # scoreboards of the loads under way
    for function, address, text, word in instructions(lines):
        if function != current:
            current, pending = function, []
        waited = word >> 52 & 0x3F
        pending = [board for board in pending if not waited >> board & 1]
        if "SYNCS.ARRIVE" in text:
            found.setdefault(function, []).append((address, len(pending)))
        board = word >> 46 & 7  # 7: none
        if board != 7 and re.search(r"\bLDSM?\b", text):
            pending.append(board)
    return found


def main() -> int:
    found = arrivals(sys.stdin)
    for function, all_of_it in found.items():
        passing = [f"0x{address} ({loads})" for address, loads in all_of_it if loads]
        if passing:
            print(function, *passing)
    print(f"{len(found)} kernels with arrivals", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
