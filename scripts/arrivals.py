"""Arrivals at barriers, in SASS, that pass loads from shared memory which are under way (csrc/cuda/give_back.cuh).

    cuobjdump -sass -arch sm_90a FILE | python scripts/arrivals.py

Prints the kernels that have some, with their addresses and how many loads; exit status 1 if one is not KNOWN, or passes
more loads than it says there. Not each is a fault: the loads may be of another stage than the one that is given back,
which whoever adds a line to KNOWN has to have read. Instructions are followed along all branches, so that a load at a
loop's end passes an arrival at its head; a wait on one of a branch's sides alone is none.
"""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

ANOTHER = "the loads are of another stage than the one that is given back"
UNUSED = "nothing uses the loads, which come before the one that is waited for or lie behind the last row"
# By kernel: the most loads under way at an arrival, and why they may be.
KNOWN = {
    "column::wgrad": (9, "along sides of branches that exclude each other: without x fence.proxy.async waits"),
    "igemm_tf32::kernel": (14, "loads of tables, not of the ring"),
    "pixels_pairs::main_kernel": (8, UNUSED),
    "plain::rows_kernel": (3, UNUSED),
    "plain::sums_kernel": (8, UNUSED),
    "stream::row_planes": (10, "the copying warp arrives, behind a barrier of the block; others have the loads"),
    "strict::strict_kernel": (4, ANOTHER),
    "strict_wgrad::kernel": (8, ANOTHER),
    "tf32::halo::kernel": (1, ANOTHER),
    "tf32::raw_kernel": (1, ANOTHER),
    "tf32::wgrad_kernel": (4, ANOTHER),
    "tma::lean_phases_kernel": (1, ANOTHER),
    "tma::lean_turned_kernel": (1, ANOTHER),
    "tma::part_kernel": (33, "another barrier; the one that gives their place back asks for their words"),
    "toeplitz::gather_pieces": (18, "another barrier, of staged results"),
}

FUNCTION = re.compile(r"Function : (\S+)")
FIRST = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/")
SECOND = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
GUARD = re.compile(r"@!?U?P\d+ ")
LOAD = re.compile(r"\bLDSM?\b")
PARTLY = re.compile(r"\bDEPBAR\.LE SB(\d), 0x([0-9a-f]+)")
TARGET = re.compile(r"0x([0-9a-f]+)")
NO_BOARD = 7


class Instruction(NamedTuple):
    address: int
    text: str
    waits: int  # a mask of the scoreboards that it waits for
    board: int  # the scoreboard that it sets, or NO_BOARD


def functions(lines: Iterable[str]) -> Iterator[tuple[str, list[Instruction]]]:
    name, address, text = "", 0, ""
    body: list[Instruction] = []
    for line in lines:
        if found := FUNCTION.search(line):
            if name:
                yield name, body
            name, body = found[1], []
        elif found := FIRST.match(line):
            address, text = int(found[1], 16), found[2]
        elif text and (found := SECOND.match(line)):
            word = int(found[1], 16)
            body.append(Instruction(address, text, word >> 52 & 0x3F, word >> 46 & 7))
            text = ""
    if name:
        yield name, body


def successors(body: Sequence[Instruction]) -> list[list[int]]:
    """What may follow an instruction. Behind a call follows what it calls, and what stands behind it."""
    at = {instruction.address: i for i, instruction in enumerate(body)}
    found: list[list[int]] = []
    for i, (_, text, _, _) in enumerate(body):
        name = GUARD.sub("", text).split()[0]
        jumps = name.startswith(("BRA", "CALL"))
        # A branch may have a predicate among its operands; BRA.DIV is taken where a warp's lanes are not together.
        always = not GUARD.match(text) and not re.search(r"\bU?P\d\b", text)
        ends = always and (name in ("EXIT", "BRA") or name.startswith("RET"))
        targets = [at[int(t, 16)] for t in TARGET.findall(text)[-1:] if jumps and int(t, 16) in at]
        found.append(targets + ([] if ends or i + 1 == len(body) else [i + 1]))
    return found


def arrivals(body: Sequence[Instruction]) -> dict[int, int]:
    """The arrivals' addresses, and how many loads may be under way."""
    follow = successors(body)
    under_way: list[frozenset[int] | None] = [None] * len(body)
    found: dict[int, int] = {}
    queue = deque([0] if body else [])
    if body:
        under_way[0] = frozenset()
    while queue:
        i = queue.popleft()
        address, text, waits, board = body[i]
        loads = frozenset(k for k in under_way[i] or () if not waits >> body[k].board & 1)
        if partly := PARTLY.search(text):  # all but the last ones
            of_board = sorted((k for k in loads if body[k].board == int(partly[1])), key=lambda k: (k - i) % len(body))
            loads -= frozenset(of_board[: max(0, len(of_board) - int(partly[2], 16))])
        if "SYNCS.ARRIVE" in text:
            found[address] = len(loads)
        if LOAD.search(text) and board != NO_BOARD:
            loads |= {i}
        for j in follow[i]:
            before = under_way[j]
            if before is None or not loads <= before:
                under_way[j] = loads | (before or frozenset())
                queue.append(j)
    return found


def kernel(mangled: str) -> str:
    """Its name, without conv2d_ext and template arguments."""
    names, rest = [], mangled.removeprefix("_ZN")
    while found := re.match(r"\d+", rest):
        rest = rest[found.end() :]
        names.append(rest[: int(found[0])])
        rest = rest[int(found[0]) :]
    return "::".join(name for name in names if name != "conv2d_ext") or mangled


def main() -> int:
    count, unknown = 0, 0
    for mangled, body in functions(sys.stdin):
        if not any("SYNCS.ARRIVE" in instruction.text for instruction in body):
            continue
        count += 1
        passing = {address: loads for address, loads in arrivals(body).items() if loads}
        if not passing:
            continue
        most, why = KNOWN.get(kernel(mangled), (0, "not known"))
        if max(passing.values()) > most:
            unknown, why = unknown + 1, "NOT KNOWN"
        print(f"{kernel(mangled)} ({why}) {mangled}", *(f"{a:#x} ({loads})" for a, loads in passing.items()))
    print(f"{count} kernels with arrivals, {unknown} pass loads that are not known", file=sys.stderr)
    return 1 if unknown or not count else 0


if __name__ == "__main__":
    sys.exit(main())
