"""The command line: `python -m conv2d_ext info | check | bench | explain | demo`.

One module per command. Each has HELP, `add_arguments(parser)` and `run(args) -> int` (the exit code).
This file holds the parser and what the commands share: tables, extras, the float32 precision switch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

COMMANDS = ("info", "check", "bench", "explain", "demo")


class UsageError(Exception):
    """The command line asks for something that can't be done here; the text says what."""


def require(module: str, extra: str = "demo") -> Any:
    """Imports an optional module. Raises UsageError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise UsageError(f"this command needs {name} ({error}); pip install 'conv2d_ext[{extra}]'") from error


def rich_console() -> Any | None:
    """A rich console if rich is installed and stdout is a terminal, else None."""
    if not sys.stdout.isatty():
        return None
    try:
        return importlib.import_module("rich.console").Console()
    except ImportError:
        return None


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """Text columns, right-aligned except those named in `left`."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        pairs = zip(row, widths, columns, strict=True)
        return "  ".join(t.ljust(w) if c in left else t.rjust(w) for t, w, c in pairs).rstrip()

    return "\n".join([line(columns), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """The same as a Markdown table."""
    rule = [":---" if c in left else "---:" for c in columns]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *rows])


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> None:
    """Prints a table: with rich on a terminal that has it, else as text."""
    console = rich_console()
    if console is None:
        print(f"\n{title}\n{plain_table(columns, rows, left)}", flush=True)
        return
    console.print(f"\n{title}", markup=False, highlight=False)
    table = importlib.import_module("rich.table").Table(box=importlib.import_module("rich.box").SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    for row in rows:
        # Names may hold brackets, which rich reads as markup.
        table.add_row(*(importlib.import_module("rich.text").Text(text) for text in row))
    console.print(table)


@contextlib.contextmanager
def progress(total: int, description: str) -> Iterator[Callable[[str], None]]:
    """A progress bar over `total` steps on a terminal with rich; silent elsewhere.

    Yields a function to call after each step with a text that says what comes next.
    """
    console = rich_console()
    if console is None:
        yield lambda text: None
        return
    rich = importlib.import_module("rich.progress")
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


@contextlib.contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Sets how cuDNN and cuBLAS multiply float32: "ieee" (strict) or "tf32". Restored at the end.

    The recurrent flag goes along: torch refuses to answer some queries while it differs from the one for convolutions.
    """
    backends: Any = torch.backends
    owners = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before = [owner.fp32_precision for owner in owners]
    for owner in owners:
        owner.fp32_precision = precision
    try:
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.fp32_precision = value


def pick_device(name: str | None) -> torch.device:
    """The device of that name; by default CUDA where there is one. Raises UsageError if it isn't there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here"
        )
    if device.type == "cuda" and device.index is None:  # torch.cuda.set_device wants a number.
        return torch.device("cuda", torch.cuda.current_device())
    return device


def output_file(name: str) -> Path:
    """For argparse: a file to be written later, whose folder is there now."""
    path = Path(name)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"no file can be written to {name!r}")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (2: it could not run at all)."""
    parser = argparse.ArgumentParser(prog="python -m conv2d_ext", description="Convolution for PyTorch: tools.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        sub = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except UsageError as error:
        print(f"python -m conv2d_ext {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # The reader of a pipe (`| head`) went away. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
