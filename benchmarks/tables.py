"""Runs what docs/bench.md and README.md's tables are made of, and writes them.

    python benchmarks/tables.py --run results                 # on a GPU: every table's command, into results/
    python benchmarks/tables.py --run results --only dense-f16-nhwc,kernelbench
    python benchmarks/tables.py --write results               # anywhere: docs/bench.md, and README.md's tables

A table that was not run keeps its text and its rows of means, with the date that they have. The commit that ran is
git's HEAD where the results were made, or --commit.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conv2d_ext.cli import markdown_table
from conv2d_ext.cli.bench import OPS, SLOWER, geomean

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]  # Python may have left the script's own folder out

import networks  # noqa: E402

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "tf32": "TF32", "fp32": "float32 (TF32 off)"}
LAYOUTS = {"nhwc": "channels_last", "nchw": "NCHW"}
KINDS = {"dense": "dense", "few": "few channels or filters", "grouped": "grouped", "depthwise": "depthwise"}
DRAWN = "drawn from networks"

# README.md's tables stand between these lines.
BEGIN, END = "<!-- {}: begin (benchmarks/tables.py) -->", "<!-- {}: end -->"


@dataclass(frozen=True)
class Table:
    """One section of docs/bench.md and the `bench` that makes it; `budget` is in seconds of one H200."""

    name: str
    title: str
    layers: str
    dtypes: str
    layouts: str
    budget: int
    drawn: bool = False  # from the layers of networks, as many as there is time for

    @property
    def arguments(self) -> list[str]:
        return [
            *("bench", *(["--list", "networks"] if self.drawn else []), "--layers", self.layers),
            *("--dtypes", self.dtypes, "--layouts", self.layouts, "--budget", str(self.budget)),
        ]


TABLES = (
    Table("dense-f16-nhwc", "float16, dense layers, channels_last", "dense", "fp16", "nhwc", 80),
    Table("dense-bf16-nhwc", "bfloat16, dense layers, channels_last", "dense", "bf16", "nhwc", 80),
    Table("dense-f16-nchw", "float16, dense layers, NCHW", "dense", "fp16", "nchw", 80),
    Table("dense-tf32-nhwc", "TF32, dense layers, channels_last", "dense", "tf32", "nhwc", 80),
    Table("dense-tf32-nchw", "TF32, dense layers, NCHW", "dense", "tf32", "nchw", 80),
    Table("grouped", "Grouped layers", "grouped", "fp16,bf16,tf32,fp32", "nchw,nhwc", 100),
    Table("depthwise-f16", "Depthwise layers, float16", "depthwise", "fp16", "nchw,nhwc", 80),
    Table("depthwise-f32", "Depthwise layers, float32", "depthwise", "fp32", "nchw,nhwc", 90),
    Table("depthwise-bf16", "Depthwise layers, bfloat16", "depthwise", "bf16", "nchw,nhwc", 80),
    Table("few-f16-tf32", "Few channels or few filters, float16 and TF32", "few", "fp16,tf32", "nchw,nhwc", 60),
    Table("few-f32", "Few channels or few filters, float32 (TF32 off)", "few", "fp32", "nchw,nhwc", 120),
    Table("dense-f32-nhwc", "float32 (TF32 off), dense layers, channels_last", "dense", "fp32", "nhwc", 160),
    Table("dense-f32-nchw", "float32 (TF32 off), dense layers, NCHW", "dense", "fp32", "nchw", 120),
    Table("drawn-f16", "float16, layers of networks, drawn", "all", "fp16", "nchw,nhwc", 150, drawn=True),
)
KERNELBENCH, NETWORKS = "kernelbench", "networks"
NAMES = (*(table.name for table in TABLES), KERNELBENCH, NETWORKS)
NETWORKS_COMMAND = [str(Path("benchmarks") / "networks.py"), "--dtypes", "fp16", "--batches", "32", "--budget", "300"]


# ---- running ---------------------------------------------------------------------------------------------------------


def command_of(name: str, folder: Path) -> list[str]:
    """What makes the results of a table: FOLDER/NAME.json, and NAME.md where it is a table of `bench`."""
    results = ["--json", str(folder / f"{name}.json")]
    if name == KERNELBENCH:
        return [str(ROOT / "examples" / "kernelbench" / "run.py"), *results]
    if name == NETWORKS:
        return [str(ROOT / NETWORKS_COMMAND[0]), *NETWORKS_COMMAND[1:], *results]
    table = next(table for table in TABLES if table.name == name)
    return ["-m", "conv2d_ext", *table.arguments, *results, "--markdown", str(folder / f"{name}.md")]


def head() -> str:
    try:
        found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:
        return ""
    return found.stdout.strip()


def run(names: Iterable[str], folder: Path, commit: str) -> int:
    """Runs the tables one after the other; the exit status is the worst of theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    worst = 0
    for name in names:
        begin = time.monotonic()
        for left in folder.glob(f"{name}.*"):  # of an earlier run
            left.unlink()
        # In the folder: in the repository's root Python would import conv2d_ext/ there instead of the installed wheel.
        code = subprocess.run([sys.executable, *command_of(name, folder)], cwd=folder).returncode
        print(f"== {name}: exit status {code}, {time.monotonic() - begin:.0f} s", flush=True)
        (folder / f"{name}.commit").write_text(commit + "\n")
        worst = max(worst, abs(code))
    return worst


# ---- writing ---------------------------------------------------------------------------------------------------------


def row_of(cells: Sequence[Mapping[str, Any]], label: str, planned: int, date: str) -> str:
    """The row of a kind, dtype and layout: geometric means by op, how many cells, how many lose."""
    ratios = {op: [c["ratio"] for c in cells if c["op"] == op and c["ratio"]] for op in OPS}
    every = [ratio for values in ratios.values() for ratio in values]
    losing = sum(ratio < SLOWER for ratio in every)
    means = " | ".join(f"{geomean(values):.2f}" if values else "-" for values in ratios.values())
    count = f"{len(every)}" if len(every) == planned else f"{len(every)} of {planned}"
    slow = f"{losing}, least {min(every):.2f}" if losing else "0"
    return f"| {label} | {means} | {count} | {slow} | {date} |"


MEANS = "Geometric means"  # the first section of docs/bench.md
MEANS_HEAD = [
    f"| | fprop | dgrad | wgrad | cells | slower than {SLOWER} | run |",
    "|---|---|---|---|---|---|---|",
]


def mean_rows(table: Table, data: Mapping[str, Any], commit: str) -> dict[str, str]:
    """The rows of a table, by their labels; of drawn layers, whose number is the budget's, all kinds in one."""
    rows = {}
    when = f"{short(data['machine']['date'])}, {commit}"
    if table.drawn:
        for layout in table.layouts.split(","):
            cells = [c for c in data["cells"] if c["layout"] == layout]
            label = f"{DTYPES[table.dtypes]}, {DRAWN}, {LAYOUTS[layout]}"
            rows[label] = row_of(cells, label, sum(bool(c["ratio"]) for c in cells), when)
        return rows
    for kind in KINDS:
        for dtype in table.dtypes.split(","):
            for layout in table.layouts.split(","):
                cells = [c for c in data["cells"] if (c["kind"], c["dtype"], c["layout"]) == (kind, dtype, layout)]
                if cells:
                    label = f"{DTYPES[dtype]}, {KINDS[kind]}, {LAYOUTS[layout]}"
                    parts = len(table.dtypes.split(",")) * len(table.layouts.split(","))
                    rows[label] = row_of(cells, label, data["cells_planned"] // parts, when)
    return rows


COLUMNS = {"16 bits": ("float16", "bfloat16"), "TF32": ("TF32",), "float32 (TF32 off)": ("float32 (TF32 off)",)}


def readme_table(rows: Iterable[str]) -> list[str]:
    """README's table, of the rows of means: all ops and layouts of a kind together, each row by its number of cells."""
    found: dict[str, dict[str, list[tuple[int, int, float, float]]]] = {}
    for row in rows:
        label, *means, cells, slow = [word.strip() for word in row.split("|")[1:7]]
        dtype, kind, _ = label.split(", ")
        logs = [math.log(float(mean)) for mean in means if mean != "-"]
        count, (losing, _, least) = int(cells.split()[0]), slow.partition(", least ")
        column = next(column for column, dtypes in COLUMNS.items() if dtype in dtypes)
        of = found.setdefault(kind, {}).setdefault(column, [])
        of.append((count, int(losing), float(least or 1), count * statistics.mean(logs)))

    def text(of: Sequence[tuple[int, int, float, float]]) -> str:
        if not of:
            return "-"
        count, losing = sum(a for a, *_ in of), sum(b for _, b, *_ in of)
        slow = f"{losing} of {count}, least {min(c for _, _, c, _ in of):.2f}" if losing else f"0 of {count}"
        return f"{math.exp(sum(d for *_, d in of) / count):.2f} ({slow})"

    lines = [f"| | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 1)]
    for kind in (*KINDS.values(), DRAWN):
        if kind in found:
            lines.append(f"| {kind} | {' | '.join(text(found[kind].get(column, [])) for column in COLUMNS)} |")
    return lines


def short(date: str) -> str:
    """2026-11-28 05:56 UTC -> 11-28 05:56."""
    return date.removesuffix(" UTC").partition("-")[2]


def kernelbench_section(data: Mapping[str, Any], commit: str) -> str:
    """KernelBench's problems as a table, with what fails and what loses."""
    conditions, summary = data["conditions"], data["summary"]

    def mean(row: Mapping[str, Any], who: str) -> str:
        return f"{row[who]['mean']:.3f}" if row[who] else "-"

    def times(value: float | None) -> str:
        return f"{value:.2f}x" if value else "-"

    lines = [
        "| problem | input | ours ms | eager ms | compile ms | vs eager | vs compile | harness | float64 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in data["problems"]:
        found = row["correctness"] or {}
        float64 = found.get("float64") or {}
        verdict = "ok" if float64.get("passed") else "tf32" if float64.get("rounded") else "FAILS"
        lines.append(
            f"| {row['problem']} | {row['input']} | {mean(row, 'ours')} | {mean(row, 'eager')} "
            f"| {mean(row, 'compiled')} | {times(row['speedup']['eager'])} | {times(row['speedup']['compile'])} "
            f"| {found.get('passed', 0)}/{found.get('trials', 0)} | {verdict} |"
        )
    eager = {row["problem"]: row["speedup"]["eager"] for row in data["problems"] if row["speedup"]["eager"]}
    depthwise = [value for name, value in eager.items() if re.match(r"p8[2-6]_", name)]
    losing = [f"{name} {value:.2f}" for name, value in eager.items() if value < 1]
    correct = "; ".join(f"{judge}: {count} of {summary['problems']}" for judge, count in summary["correct"].items())
    means = {base: times(value) for base, value in summary["geometric_mean_speedup"].items()}
    facts = ", ".join(f"{key} {value}" for key, value in conditions.items() if value is not None)
    return "\n".join(
        [
            f"`python examples/kernelbench/run.py`, commit {commit}: {facts}.",
            "",
            f"Correct, by each judge: {correct}. Geometric means: {means['eager']} of eager, {means['compile']} of "
            f"torch.compile; 82 to 86 {times(geomean(depthwise))} of eager."
            + (f" Slower than eager: {', '.join(losing)}." if losing else ""),
            "",
            *lines,
            "",
        ]
    )


def networks_section(data: Mapping[str, Any], commit: str) -> str:
    """Every cell, as networks.py prints it."""
    facts = data["machine"]
    where = f"{facts['gpu']}, torch {facts['torch']}, cuDNN {facts['cudnn']}"
    rows = [row for cell in data["cells"] for row in networks.rows_of(networks.Cell(**cell))]
    ran = ["--networks", ",".join(dict.fromkeys(cell["network"] for cell in data["cells"]))]  # not all, maybe
    return "\n".join(
        [
            f"`{shlex.join(['python', *NETWORKS_COMMAND, *ran])}`, commit {commit}: {facts['date']}, {where}.",
            "conv: share of the GPU's time in convolutions, ours/torch's; conv ratio: torch's time in them over ours;",
            "GiB: memory of a call beyond what it found, ours/torch's; error: the worst of ours over what it may be.",
            "",
            markdown_table(networks.COLUMNS, rows, (*networks.COLUMNS[:4], "how", "note")),
            "",
        ]
    )


def networks_rows(data: Mapping[str, Any], commit: str) -> list[str]:
    """README's table: a network's ratios, and the share of convolutions in torch's training step."""
    cells: dict[str, dict[str, Mapping[str, Any]]] = {}
    for cell in data["cells"]:
        if cell["status"] == "ok":
            cells.setdefault(cell["network"], {})[cell["mode"]] = cell
    ways = [(mode, how) for mode in networks.MODES for how in ("eager", "graph")]

    def ratio(cell: Mapping[str, Any] | None, how: str) -> str:
        return f"{cell['ms'][how][1] / cell['ms'][how][0]:.2f}" if cell and how in cell["ms"] else "-"

    lines = [
        f"| run {short(data['machine']['date'])}, {commit} | {' | '.join(map(' '.join, ways))} | convolutions |",
        "|" + "---|" * (len(ways) + 2),
    ]
    for name, by_mode in cells.items():
        train = by_mode.get("train")
        share = f"{train['conv_ms'][1] / train['gpu_ms'][1]:.0%}" if train and train["gpu_ms"][1] else "-"
        lines.append(f"| {name} | {' | '.join(ratio(by_mode.get(mode), how) for mode, how in ways)} | {share} |")
    return lines


def sections(page: str) -> dict[str, str]:
    """The text of each `## ` section of a page, by its title; the part before the first is ''."""
    parts = re.split(r"^## (.*)\n", page, flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


BENCH_HEAD = f"""# Benchmark

`python benchmarks/tables.py` writes this page. Ratio is F.conv2d's time (cuDNN with `cudnn.benchmark`, or ATen) over
ours: above 1, ours is faster. Every cell's result was compared with float64 before its time counted, and a captured
call's with the eager one. A table whose `--budget` ran out has fewer cells than its layers, in the order of the layers.
Cells of drawn layers stand in the order of their ratio, those first that are slower beside cuDNN.
Each table names the commit that it is of; a cell below {SLOWER} is slower than cuDNN by more than the clock's noise.

"""


def finished(folder: Path, name: str) -> bool:
    """Whether the table's command ran to its end; the file with the commit is written last."""
    return (folder / f"{name}.commit").exists() and (folder / f"{name}.json").exists()


def between(page: str, name: str, text: str) -> str:
    """The page with the text between the two lines of that name."""
    begin, end = BEGIN.format(name), END.format(name)
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise SystemExit(f"tables.py: expected the lines {begin!r} and {end!r} once, in this order")
    return page[: page.index(begin) + len(begin)] + "\n" + text + page[page.index(end) :]


def write(folder: Path, bench: Path, readme: Path) -> None:
    """Writes both pages from the results in the folder and, for tables that were not run, from the pages."""
    old = sections(bench.read_text()) if bench.exists() else {}
    page: list[str] = []
    text = readme.read_text()
    rows = {line.split("|")[1].strip(): line for line in old.get(MEANS, "").splitlines()[2:] if line}
    for table in TABLES:
        if finished(folder, table.name):
            data = json.loads((folder / f"{table.name}.json").read_text())
            commit = (folder / f"{table.name}.commit").read_text().strip()
            rows |= mean_rows(table, data, commit)
            # The command without where its results went.
            command = shlex.join(["python", "-m", "conv2d_ext", *table.arguments])
            body = (folder / f"{table.name}.md").read_text().partition("\n")[2]
            page.append(f"## {table.title}\n`{command}`, commit {commit}\n{body}\n")
        elif table.title in old:
            page.append(f"## {table.title}\n{old[table.title]}")
    title = "KernelBench's problems"
    if finished(folder, KERNELBENCH):
        data = json.loads((folder / f"{KERNELBENCH}.json").read_text())
        commit = (folder / f"{KERNELBENCH}.commit").read_text().strip()
        page.append(f"## {title}\n{kernelbench_section(data, commit)}")
    elif title in old:
        page.append(f"## {title}\n{old[title]}")
    title = "Whole networks"
    if finished(folder, NETWORKS):
        data = json.loads((folder / f"{NETWORKS}.json").read_text())
        commit = (folder / f"{NETWORKS}.commit").read_text().strip()
        page.append(f"## {title}\n{networks_section(data, commit)}")
        text = between(text, NETWORKS, "\n".join(networks_rows(data, commit)) + "\n")
    elif title in old:
        page.append(f"## {title}\n{old[title]}")
    known = {"", MEANS, "KernelBench's problems", "Whole networks", *(table.title for table in TABLES)}
    # Tables of other commands than today's stay, at the end, until they are taken out by hand.
    page += [f"## {title}\n{body}" for title, body in old.items() if title not in known]
    means = "\n".join([f"## {MEANS}", *MEANS_HEAD, *rows.values(), "", ""])
    bench.write_text("".join([BENCH_HEAD, means, *page]).rstrip("\n") + "\n")
    readme.write_text(between(text, "speed", "\n".join(readme_table(rows.values())) + "\n"))


# ---- command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    def names(text: str) -> list[str]:
        found = [word for word in text.split(",") if word]
        unknown = [word for word in found if word not in NAMES]
        if unknown or not found:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(NAMES)}, got {', '.join(unknown) or 'none'}")
        return [name for name in NAMES if name in found]

    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--run", type=Path, metavar="FOLDER", help="run the tables on the GPU, results into FOLDER")
    found.add_argument("--write", type=Path, metavar="FOLDER", help="write the pages from the results in FOLDER")
    found.add_argument("--only", type=names, default=NAMES, metavar="A,B", help=f"of {', '.join(NAMES)}")
    found.add_argument("--commit", default=None, help="what ran (default: git's HEAD)")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if not options.run and not options.write:
        raise SystemExit("tables.py: expected --run FOLDER or --write FOLDER, got neither")
    code = 0
    if options.run:
        commit = head() if options.commit is None else options.commit
        code = run(options.only, options.run.resolve(), commit or "unknown")
    if options.write:
        write(options.write.resolve(), ROOT / "docs" / "bench.md", ROOT / "README.md")
    return code


if __name__ == "__main__":
    sys.exit(main())
