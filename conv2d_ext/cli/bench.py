"""Times conv2d_ext against F.conv2d with cudnn.benchmark on, over convolution layers of published networks.

Of two lists: layers.json, which were picked; networks.json, all layers of many networks, drawn by how many have them.
A cell is one layer, dtype, layout and op. For each, on a GPU: both contenders run on the same random data; ours is
compared with float64 before any time is shown; each is captured in a CUDA graph; the replays take turns (A B A B),
each after a write that fills L2, timed by events; the median counts. What that write leaves dirty in L2 is written
back during the timed replay, for both alike.
The limit of a cell is max(flops / GEMM peak, bytes / copy bandwidth), both measured at the start; bytes count each
tensor once. Exit code 1 if a cell of ours is wrong or fails, also when others are fine.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.resources
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import conv2d_ext
from conv2d_ext.cli import (
    UsageError,
    float32_precision,
    markdown_table,
    output_file,
    pick_device,
    progress,
    rich_console,
    show_table,
)
from conv2d_ext.cli.info import machine

HELP = "times layers of networks against F.conv2d"

OPS = ("fprop", "dgrad", "wgrad")
LAYOUTS = ("nchw", "nhwc")
# tf32 and fp32 are the same tensors, multiplied in TF32 and strictly.
STORAGE = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
KINDS = ("dense", "few", "depthwise", "grouped")
LISTS = ("layers", "networks")
BATCHES, LARGEST = (1, 8, 32), 2**27  # images of the layers of networks.json, and elements of a tensor
SUBSETS = ("1x1", "strided", "dilated", *(f"batch{N}" for N in BATCHES))
SLOWER = 0.97

# ---------------------------------------------------------------- the part without a device


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution, in the letters N C H W / K R S; stride, pad and dilation are (H, W)."""

    id: str
    network: str
    layer: str
    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    bias: bool

    @property
    def P(self) -> int:
        return (self.H + 2 * self.pad[0] - (self.R - 1) * self.dilation[0] - 1) // self.stride[0] + 1

    @property
    def Q(self) -> int:
        return (self.W + 2 * self.pad[1] - (self.S - 1) * self.dilation[1] - 1) // self.stride[1] + 1

    @property
    def flops(self) -> int:
        """Two per multiply-add, taps on padding included. The same for all three ops."""
        return 2 * self.N * self.K * self.P * self.Q * (self.C // self.groups) * self.R * self.S

    @property
    def elements(self) -> int:
        """Elements of input, weight and output together: what any of the three ops reads or writes at least."""
        weight = self.K * (self.C // self.groups) * self.R * self.S
        return self.N * self.C * self.H * self.W + weight + self.N * self.K * self.P * self.Q

    def reduction(self, op: str) -> int:
        """Products summed per result."""
        if op == "wgrad":
            return self.N * self.P * self.Q
        return (self.C if op == "fprop" else self.K) // self.groups * self.R * self.S

    @property
    def kind(self) -> str:
        """depthwise: one input channel per group; grouped: other groups; few: C or K below 32; else dense."""
        if self.groups > 1:
            return "depthwise" if self.groups == self.C else "grouped"
        return "few" if min(self.C, self.K) < 32 else "dense"

    @property
    def subsets(self) -> tuple[str, ...]:
        """Further groups that the layer belongs to; these overlap."""
        geometry = (self.R == self.S == 1, max(self.stride) > 1, max(self.dilation) > 1)
        belongs = (*geometry, *(self.N == N for N in BATCHES))
        return tuple(name for name, yes in zip(SUBSETS, belongs, strict=True) if yes)

    def __str__(self) -> str:
        def pair(letter: str, values: tuple[int, int]) -> str:
            text = str(values[0]) if values[0] == values[1] else f"{values[0]},{values[1]}"
            return "" if values == (1, 1) else f" {letter}{text}"

        groups = f" g{self.groups}" if self.groups > 1 else ""
        return (
            f"{self.N}x{self.C}x{self.H}x{self.W} {self.K}x{self.R}x{self.S}"
            f"{pair('s', self.stride)}{pair('d', self.dilation)}{groups}"
        )


def data(name: str) -> dict[str, Any]:
    """What a file of data/ has."""
    text = (importlib.resources.files("conv2d_ext") / "data" / f"{name}.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def load_layers() -> list[Layer]:
    """The layers of data/layers.json."""
    layers = []
    for row in data("layers")["layers"]:
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}
        layers.append(Layer(**fields))
    return layers


def draw_layers(seed: int) -> list[Layer]:
    """The layers of data/networks.json with each of BATCHES, in the order that they are drawn: one that n networks have
    is n times as likely to be the next of its kind as one of a single network, and kinds (1x1 apart) and batches take
    turns by how many networks have their layers."""
    draw = random.Random(seed)
    drawn: dict[tuple[object, ...], list[tuple[float, int, Layer]]] = {}
    for i, (C, H, W, K, R, S, *pairs, groups, count) in enumerate(data("networks")["layers"]):
        stride, pad, dilation = zip(pairs[::2], pairs[1::2], strict=True)
        for N in BATCHES:
            sizes = (N, C, H, W, K, R, S, stride, pad, dilation, groups)
            layer = Layer(f"{i}x{N}", f"{count} networks", "", *sizes, bias=False)
            when = draw.random() ** (1 / count)  # the highest first
            if max(N * C * H * W, N * K * layer.P * layer.Q) <= LARGEST:
                drawn.setdefault((layer.kind, R == S == 1, N), []).append((when, count, layer))
    turns: list[tuple[float, Layer]] = []
    for alike in drawn.values():
        alike.sort(key=lambda one: -one[0])
        networks = sum(count for _, count, _ in alike)
        turns += [((i + draw.random()) / networks, layer) for i, (_, _, layer) in enumerate(alike)]
    return [layer for _, layer in sorted(turns, key=lambda turn: turn[0])]


def select_layers(layers: Sequence[Layer], words: Iterable[str]) -> list[Layer]:
    """The layers that any of the words names, in list order. A word is an id, a kind, a subset, or "all"."""
    wanted = [word.strip() for word in words]
    known = {layer.id for layer in layers} | {*KINDS, *SUBSETS, "all"}
    unknown = [word for word in wanted if word not in known]
    if unknown:
        names = f"all, {', '.join(KINDS + SUBSETS)}, ids such as {layers[0].id}"
        raise UsageError(f"--layers: expected some of {names}, got {', '.join(map(repr, unknown))}")
    return [layer for layer in layers if {"all", layer.id, layer.kind, *layer.subsets} & set(wanted)]


def shrink(layer: Layer) -> Layer:
    """A layer of the same kind and geometry, small enough for a CPU to run in milliseconds."""

    def side(size: int, taps: int, dilation: int, pad: int) -> int:
        return min(size, max(16, (taps - 1) * dilation + 1 - 2 * pad + 3))

    groups, per_c, per_k = layer.groups, layer.C // layer.groups, layer.K // layer.groups
    if layer.kind == "depthwise":
        groups = min(groups, 8)
    elif layer.kind == "grouped":
        groups, per_c, per_k = min(groups, 4), min(per_c, 4), min(per_k, 4)
    else:
        per_c, per_k = min(per_c, 32), min(per_k, 32)
    return dataclasses.replace(
        layer,
        N=min(layer.N, 2),
        C=per_c * groups,
        K=per_k * groups,
        groups=groups,
        H=side(layer.H, layer.R, layer.dilation[0], layer.pad[0]),
        W=side(layer.W, layer.S, layer.dilation[1], layer.pad[1]),
    )


def tolerance(dtype: str, reduction: int) -> float:
    """The largest relative error (2-norm) against float64 that counts as right.

    One unit roundoff of the type that the operands (tf32) or the result (the others) are rounded to: rounding to
    nearest lands near 0.4 of it, truncation of TF32 operands near 1.6. Added: a float32 sum of `reduction` random
    terms in one chain, which drifts by about 0.4 * 2^-24 * sqrt(reduction).
    """
    rounded = {"fp16": 2.0**-11, "bf16": 2.0**-8, "tf32": 2.0**-11, "fp32": 4 * 2.0**-24}[dtype]
    return rounded + 2.0**-24 * math.sqrt(reduction)


def limit(flops: int, nbytes: int, peak: float, bandwidth: float) -> tuple[float, str]:
    """The least seconds for the flops and bytes at the given rates (per second), and which of them sets it."""
    math_s, memory_s = flops / peak, nbytes / bandwidth
    return (math_s, "math") if math_s >= memory_s else (memory_s, "memory")


def geomean(values: Iterable[float]) -> float | None:
    """The geometric mean; None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def repeats_for(seconds: float, wanted: int | None) -> int:
    """How many replays of that length: `wanted` if given, else about 40 ms' worth, 5 to 50, and 3 of long ones."""
    if wanted is not None:
        return wanted
    if seconds > 0.1:
        return 3
    return max(5, min(50, math.ceil(0.04 / max(seconds, 1e-6))))


@dataclasses.dataclass
class Cell:
    """One measurement. Times in milliseconds; `ours`/`theirs` are medians; None: not measured.

    status: ok; FAIL (ours is wrong); error (ours raised); capture (ours can't be captured in a CUDA graph);
    memory (out of it); unsupported (the row asked for by --kernel does not take this problem). `reason` says more.
    """

    layer: Layer
    dtype: str
    layout: str
    op: str
    status: str = "ok"
    reason: str = ""
    kernel: str = ""
    error: float | None = None
    error_theirs: float | None = None
    tolerance: float | None = None
    repeats: int = 0
    ours_ms: float | None = None
    theirs_ms: float | None = None
    ours_range_ms: tuple[float, float] | None = None
    theirs_range_ms: tuple[float, float] | None = None
    limit_ms: float | None = None
    bound: str = ""

    @property
    def ratio(self) -> float | None:
        """theirs / ours: above 1, ours is faster."""
        return self.theirs_ms / self.ours_ms if self.ours_ms and self.theirs_ms else None

    @property
    def tflops(self) -> float | None:
        return self.layer.flops / self.ours_ms / 1e9 if self.ours_ms else None

    @property
    def share(self) -> float | None:
        return self.limit_ms / self.ours_ms if self.ours_ms and self.limit_ms else None

    @property
    def share_theirs(self) -> float | None:
        return self.limit_ms / self.theirs_ms if self.theirs_ms and self.limit_ms else None

    @property
    def broken(self) -> bool:
        """Ours was asked for something that it must be able to do, and did not do it."""
        return self.status in ("FAIL", "error", "capture")

    def to_json(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        extra = {name: getattr(self, name) for name in ("ratio", "tflops", "share", "share_theirs")}
        if cell_error := fields["error"]:  # JSON has no NaN.
            fields["error"] = cell_error if math.isfinite(cell_error) else str(cell_error)
        return (
            fields
            | extra
            | {"layer": self.layer.id, "case": str(self.layer), "kind": self.layer.kind, "subsets": self.layer.subsets}
        )


def summarize(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Geometric means over the cells with a ratio: all, by dtype, layout, op, kind and subset."""
    done = [cell for cell in cells if cell.ratio is not None]
    groups: list[tuple[str, str, list[Cell]]] = [("all", "", done)]
    groups += [("dtype", name, [c for c in done if c.dtype == name]) for name in STORAGE]
    groups += [("layout", name, [c for c in done if c.layout == name]) for name in LAYOUTS]
    groups += [("op", name, [c for c in done if c.op == name]) for name in OPS]
    groups += [("kind", name, [c for c in done if c.layer.kind == name]) for name in KINDS]
    groups += [("subset", name, [c for c in done if name in c.layer.subsets]) for name in SUBSETS]
    return [{"group": group, "value": value, **means(members)} for group, value, members in groups if members]


def means(cells: Sequence[Cell]) -> dict[str, Any]:
    """Of some cells: how many, the geometric means of ratio and shares, the least ratio, how many are slower."""
    ratios = [c.ratio for c in cells if c.ratio is not None]
    return {
        "cells": len(ratios),
        "ratio": geomean(ratios),
        "share": geomean(c.share for c in cells if c.share is not None),
        "share_theirs": geomean(c.share_theirs for c in cells if c.share_theirs is not None),
        "least_ratio": min(ratios, default=None),
        "slower": sum(ratio < SLOWER for ratio in ratios),
    }


def cross(cells: Sequence[Cell], value: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table: kinds and subsets down, dtype and layout across, geometric means as
    fprop/dgrad/wgrad.

    `value` is "ratio", or "share" for the two shares of the limit in per cent, ours before theirs in brackets.
    """
    done = [cell for cell in cells if cell.ratio is not None]
    pairs = [(d, y) for d in STORAGE for y in LAYOUTS if any((c.dtype, c.layout) == (d, y) for c in done)]
    ops = [op for op in OPS if any(c.op == op for c in done)]

    def text(members: list[Cell]) -> str:
        found = [means([c for c in members if c.op == op]) for op in ops]
        if value == "ratio":
            return "/".join(f"{m['ratio']:.2f}" if m["ratio"] else "-" for m in found)
        ours, theirs = (
            "/".join(f"{100 * m[name]:.0f}" if m[name] else "-" for m in found) for name in ("share", "share_theirs")
        )
        return f"{ours} ({theirs})"

    rows = []
    for name in (*KINDS, *SUBSETS):
        members = [c for c in done if name in (c.layer.kind, *c.layer.subsets)]
        if members:
            rows.append([name, *(text([c for c in members if (c.dtype, c.layout) == pair]) for pair in pairs)])
    return [f"{'/'.join(ops)}", *(f"{dtype} {layout}" for dtype, layout in pairs)], rows


COLUMNS = (
    "id",
    "case",
    "dtype",
    "layout",
    "op",
    "kernel",
    "ours ms",
    "F.conv2d ms",
    "ratio",
    "TFLOP/s",
    "limit ms",
    "by",
    "share",
    "F.conv2d share",
    "note",
)
WIDTHS = (4, 34, 5, 6, 5, 32, 9, 11, 6, 7, 9, 6, 5, 14, 0)
# What fits into 80 columns.
NARROW = ("id", "dtype", "layout", "op", "ours ms", "F.conv2d ms", "ratio", "TFLOP/s", "share", "note")
LEFT = ("id", "case", "dtype", "layout", "op", "kernel", "by", "note", "group", "value")


def cell_row(cell: Cell) -> list[str]:
    """The texts of COLUMNS for one cell."""

    def number(value: float | None, digits: str) -> str:
        return "-" if value is None else format(value, digits)

    note = cell.reason if cell.status == "ok" else f"{cell.status}: {cell.reason}"
    return [
        cell.layer.id,
        str(cell.layer),
        cell.dtype,
        cell.layout,
        cell.op,
        cell.kernel or "-",
        number(cell.ours_ms, ".4f"),
        number(cell.theirs_ms, ".4f"),
        number(cell.ratio, ".2f"),
        number(cell.tflops, ".3g"),
        number(cell.limit_ms, ".4f"),
        cell.bound,
        number(cell.share, ".0%"),
        number(cell.share_theirs, ".0%"),
        note,
    ]


def text_line(row: Sequence[str]) -> str:
    """One row in fixed widths, so that a run that is cut short has shown its rows."""
    cells = zip(row, WIDTHS, COLUMNS, strict=True)
    return "  ".join(t.ljust(width) if name in LEFT else t.rjust(width) for t, width, name in cells).rstrip()


def summary_rows(summary: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of geometric means."""
    columns = ["group", "value", "cells", "ratio", "least ratio", f"below {SLOWER}", "share", "F.conv2d share"]
    return columns, [
        [
            row["group"],
            row["value"],
            str(row["cells"]),
            f"{row['ratio']:.3f}",
            f"{row['least_ratio']:.2f}",
            str(row["slower"]),
            f"{row['share']:.0%}",
            f"{row['share_theirs']:.0%}",
        ]
        for row in summary
    ]


# ---------------------------------------------------------------- timers


class Captured(Protocol):
    """A call that can be run again and again; `output` is what the last run computed."""

    output: Tensor

    def replay(self) -> None: ...

    def release(self) -> None: ...


class Timer(Protocol):
    """Captures calls and times their replays."""

    def capture(self, call: Callable[[], Tensor]) -> Captured: ...

    def in_turn(self, captured: Sequence[Captured], repeats: int) -> list[list[float]]: ...

    def synchronize(self) -> None: ...


class EagerCall:
    """A call, run anew by each replay."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        self.call = call
        self.output = call()

    def replay(self) -> None:
        self.output = self.call()

    def release(self) -> None:
        pass


class CpuTimer:
    """Wall-clock time, caches as they are."""

    def capture(self, call: Callable[[], Tensor]) -> Captured:
        return EagerCall(call)

    def in_turn(self, captured: Sequence[Captured], repeats: int) -> list[list[float]]:
        times: list[list[float]] = [[] for _ in captured]
        for _ in range(repeats):
            for one, found in zip(captured, times, strict=True):
                start = time.perf_counter()
                one.replay()
                found.append(time.perf_counter() - start)
        return times

    def synchronize(self) -> None:
        pass


class CudaGraph:
    """A call captured in a CUDA graph. The calls before the capture load modules and let cuDNN choose."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = call()

    def replay(self) -> None:
        self.graph.replay()

    def release(self) -> None:
        del self.output
        self.graph.reset()


class CudaTimer:
    """Events around graph replays, each after a write larger than L2.

    That write also keeps the GPU busy (60 us on an H200) while the host enqueues the events and the replay, so that
    the host's speed does not enter the time.
    """

    def __init__(self, device: torch.device) -> None:
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self.flush = torch.empty(max(256 << 20, 4 * l2_bytes), dtype=torch.uint8, device=device)

    def capture(self, call: Callable[[], Tensor]) -> Captured:
        return CudaGraph(call)

    def in_turn(self, captured: Sequence[Captured], repeats: int) -> list[list[float]]:
        def event() -> torch.cuda.Event:
            return torch.cuda.Event(enable_timing=True)

        events = [[(event(), event()) for _ in range(repeats)] for _ in captured]
        for i in range(repeats):
            for one, pairs in zip(captured, events, strict=True):
                self.flush.zero_()
                pairs[i][0].record()
                one.replay()
                pairs[i][1].record()
        torch.cuda.synchronize()
        return [[start.elapsed_time(end) / 1e3 for start, end in pairs] for pairs in events]

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def median_time(timer: Timer, captured: Captured, repeats: int = 10) -> float:
    """Seconds of one call, by itself, after a warm-up."""
    timer.in_turn([captured], 3)
    times = timer.in_turn([captured], repeats)[0]
    captured.release()
    return statistics.median(times)


def measure_peaks(timer: Timer, device: torch.device, dtypes: Sequence[str]) -> dict[str, float]:
    """The machine's rates: "copy" in byte/s, read plus written; per dtype FLOP/s of a square matrix product."""
    cuda = device.type == "cuda"
    nbytes = min(4 << 30, torch.cuda.mem_get_info(device)[0] // 8) if cuda else 256 << 20
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    # The better of a copy and of a kernel that reads and writes as much. Not captured: of 1 GB or more, a graph hands a
    # copy to a copy engine, which reaches 2.8 TB/s on an H200 where both of these reach 4.3.
    ways = (functools.partial(target.copy_, source), functools.partial(torch.neg, source, out=target))
    peaks = {"copy": 2 * nbytes / min(median_time(timer, EagerCall(way)) for way in ways)}
    del source, target
    size = 8192 if cuda else 1024
    for dtype in dtypes:
        a, b, c = (torch.randn(size, size, device=device).to(STORAGE[dtype]) for _ in range(3))
        with float32_precision("tf32" if dtype == "tf32" else "ieee"):
            product = timer.capture(functools.partial(torch.mm, a, b, out=c))
            peaks[dtype] = 2 * size**3 / median_time(timer, product)
    if cuda:
        del a, b, c
        empty = timer.capture(functools.partial(torch.zeros(1, device=device).fill_, 1.0))
        peaks["empty_replay_s"] = median_time(timer, empty, 30)
        torch.cuda.empty_cache()
    return peaks


# ---------------------------------------------------------------- one cell


@dataclasses.dataclass
class Operands:
    """input, weight, bias and grad_output of a layer."""

    x: Tensor
    w: Tensor
    b: Tensor | None
    g: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Operands:
        return Operands(change(self.x), change(self.w), None if self.b is None else change(self.b), change(self.g))


def make_operands(layer: Layer, dtype: torch.dtype, device: torch.device, seed: int) -> Operands:
    """Normal random values, contiguous."""
    source = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=source, device=device).to(dtype)

    return Operands(
        normal(layer.N, layer.C, layer.H, layer.W),
        normal(layer.K, layer.C // layer.groups, layer.R, layer.S),
        normal(layer.K) if layer.bias else None,
        normal(layer.N, layer.K, layer.P, layer.Q),
    )


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values in that layout; a bias stays as it is."""
    if tensor.dim() != 4 or layout == "nchw":
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def torch_call(layer: Layer, op: str, o: Operands) -> Callable[[], Tensor]:
    """The op through PyTorch. dgrad and wgrad ask convolution_backward for the one gradient."""
    stride, pad, dilation = list(layer.stride), list(layer.pad), list(layer.dilation)
    if op == "fprop":
        return lambda: F.conv2d(o.x, o.w, o.b, layer.stride, layer.pad, layer.dilation, layer.groups)
    index = OPS.index(op) - 1
    mask = [index == 0, index == 1, False]
    return lambda: torch.ops.aten.convolution_backward(
        o.g, o.x, o.w, None, stride, pad, dilation, False, [0, 0], layer.groups, mask
    )[index]


def our_call(layer: Layer, op: str, o: Operands, allow_tf32: bool, row: int) -> Callable[[], Tensor]:
    """The op through this package. `row` -1: the planner's choice, and fprop through the public function."""
    stride, pad, dilation = list(layer.stride), list(layer.pad), list(layer.dilation)
    ops = torch.ops.conv2d_ext
    if op == "fprop" and row < 0:
        return lambda: conv2d_ext.conv2d(o.x, o.w, o.b, layer.stride, layer.pad, layer.dilation, layer.groups)
    if op == "fprop":
        return lambda: ops.fprop(o.x, o.w, o.b, stride, pad, dilation, layer.groups, allow_tf32=allow_tf32, row=row)
    if op == "dgrad":
        size = list(o.x.shape)
        return lambda: ops.dgrad(o.g, o.w, size, stride, pad, dilation, layer.groups, allow_tf32=allow_tf32, row=row)
    size, strides = list(o.w.shape), list(o.w.stride())
    return lambda: ops.wgrad(
        o.g, o.x, size, strides, stride, pad, dilation, layer.groups, allow_tf32=allow_tf32, row=row
    )


@contextmanager
def cudnn(enabled: bool, benchmark: bool) -> Iterator[None]:
    """Sets two of cuDNN's flags alone. (torch.backends.cudnn.flags also touches the TF32 flags, in the old way.)"""
    # Through the setters: torch's own test library, where it was imported, forbids assigning to the module's flags.
    before = torch._C._get_cudnn_enabled(), torch._C._get_cudnn_benchmark()
    torch._C._set_cudnn_enabled(enabled)
    torch._C._set_cudnn_benchmark(benchmark)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(before[0])
        torch._C._set_cudnn_benchmark(before[1])


def reference(layer: Layer, op: str, o: Operands) -> tuple[Tensor, str]:
    """The exact result and the arithmetic it was computed in.

    float64 by PyTorch's own kernels (im2col and a matrix product): cuDNN's float64 kernels are slow and differ by
    shape. Where those refuse, for want of memory say, cuDNN in strict float32.
    """
    try:
        with cudnn(enabled=False, benchmark=False):
            return torch_call(layer, op, o.map(lambda t: t.double()))(), "float64"
    except RuntimeError:
        if o.x.is_cuda:
            torch.cuda.empty_cache()
    with cudnn(enabled=True, benchmark=False), float32_precision("ieee"):
        return torch_call(layer, op, o.map(lambda t: t.float()))(), "float32"


def relative_error(result: Tensor, exact: Tensor) -> float:
    """2-norm of the difference over the 2-norm of `exact`; NaN if either has one."""
    if result.shape != exact.shape:
        return math.nan
    norm = torch.linalg.vector_norm
    return float(norm(result.double() - exact) / norm(exact, dtype=torch.double))


def poison(like: Tensor, dtype: torch.dtype) -> None:
    """Leaves NaN in the memory that an output of this size is likely to get next, so that a gap shows."""
    torch.full(like.shape, math.nan, dtype=dtype, device=like.device)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


class DeviceLost(Exception):
    """The device answers nothing any more (an illegal access, say): no later cell can run."""


def supports(row: str, layer: Layer, op: str, o: Operands, allow_tf32: bool) -> bool:
    """Whether the row of that name takes this problem."""
    plan = conv2d_ext.explain(
        o.x, o.w, o.b, layer.stride, layer.pad, layer.dilation, layer.groups, op=op, allow_tf32=allow_tf32
    )
    return dict(plan.candidates).get(row) is not None


def measure(
    cell: Cell,
    operands: Operands,
    exact: Callable[[], tuple[Tensor, str]],
    timer: Timer,
    peaks: dict[str, float],
    row: str | None,
    wanted_repeats: int | None,
) -> None:
    """Fills in a cell: checks ours, then times both. Raises DeviceLost."""
    layer, op, allow_tf32 = cell.layer, cell.op, cell.dtype == "tf32"
    o = operands.map(lambda t: in_layout(t, cell.layout))
    storage = STORAGE[cell.dtype]
    least, cell.bound = limit(layer.flops, layer.elements * storage.itemsize, peaks[cell.dtype], peaks["copy"])
    cell.limit_ms = 1e3 * least
    cell.tolerance = tolerance(cell.dtype, layer.reduction(op))
    index = -1 if row is None else list(torch.ops.conv2d_ext.kernels()).index(row)
    captured: list[Captured] = []
    try:
        if row is not None and not supports(row, layer, op, o, allow_tf32):
            cell.status, cell.reason, cell.kernel = "unsupported", f"{row} does not take it", row
            return
        cell.kernel = row or kernel_name(layer, op, o, allow_tf32)
        ours, theirs = our_call(layer, op, o, allow_tf32, index), torch_call(layer, op, o)

        expected, arithmetic = exact()
        poison(expected, storage)
        result = ours()
        timer.synchronize()
        cell.error = relative_error(result, expected)
        if not cell.error <= cell.tolerance:  # This way round, NaN fails.
            cell.status = "FAIL"
            cell.reason = f"error {cell.error:.2e} against {arithmetic}, tolerance {cell.tolerance:.2e}"
            return
        try:
            cell.error_theirs = relative_error(theirs(), expected)
            timer.synchronize()
        except RuntimeError as error:
            cell.reason = f"F.conv2d: {first_line(error)}"
        del expected

        try:
            captured.append(timer.capture(ours))
        except RuntimeError as error:
            memory = isinstance(error, torch.OutOfMemoryError)
            cell.status, cell.reason = "memory" if memory else "capture", first_line(error)
            return
        if cell.error_theirs is not None:
            try:
                captured.append(timer.capture(theirs))
            except RuntimeError as error:
                cell.reason = f"F.conv2d: {first_line(error)}"

        timer.in_turn(captured, 1)
        if not torch.equal(captured[0].output, result):
            cell.status, cell.reason = "FAIL", "the captured call's result is not that of the eager call"
            return
        del result
        estimate = max(times[0] for times in timer.in_turn(captured, 1))
        cell.repeats = repeats_for(estimate, wanted_repeats)
        times = timer.in_turn(captured, cell.repeats)
        cell.ours_ms = 1e3 * statistics.median(times[0])
        cell.ours_range_ms = (1e3 * min(times[0]), 1e3 * max(times[0]))
        if len(times) == 2:
            cell.theirs_ms = 1e3 * statistics.median(times[1])
            cell.theirs_range_ms = (1e3 * min(times[1]), 1e3 * max(times[1]))
    except torch.OutOfMemoryError as error:
        cell.status, cell.reason = "memory", first_line(error)
    except (RuntimeError, ValueError, TypeError) as error:
        cell.status, cell.reason = "error", first_line(error)
    finally:
        try:
            timer.synchronize()
            for one in captured:
                one.release()
        except RuntimeError as error:
            cell.status, cell.reason = "error", first_line(error)
            raise DeviceLost(cell.reason) from error


def kernel_name(layer: Layer, op: str, o: Operands, allow_tf32: bool) -> str:
    """The row that the planner takes; on a CPU there are no rows."""
    if o.x.device.type != "cuda":
        return "cpu"
    return conv2d_ext.explain(
        o.x, o.w, o.b, layer.stride, layer.pad, layer.dilation, layer.groups, op=op, allow_tf32=allow_tf32
    ).kernel


# ---------------------------------------------------------------- the run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError(text)
        return int(text)

    parser.add_argument(
        "--list",
        choices=LISTS,
        default=LISTS[0],
        help="layers: those that were picked (default); networks: those of many networks, drawn by how many have "
        "them, until --budget is spent",
    )
    parser.add_argument(
        "--layers",
        type=words,
        default=["all"],
        metavar="A,B",
        help=f"ids, kinds ({', '.join(KINDS)}), subsets ({', '.join(SUBSETS)}) or all (default)",
    )
    parser.add_argument("--dtypes", type=words, metavar="A,B", help=f"of {', '.join(STORAGE)}; default: all, CPU: fp32")
    parser.add_argument("--layouts", type=words, default=list(LAYOUTS), metavar="A,B", help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("--ops", type=words, default=list(OPS), metavar="A,B", help=f"of {', '.join(OPS)}")
    parser.add_argument("--kernel", metavar="ROW", help="time this row of the table instead of the planner's choice")
    parser.add_argument("--repeats", type=positive, help="replays per contender; default: 5 to 50, about 40 ms")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no cell after this time")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write everything here (after each layer)")
    parser.add_argument("--markdown", type=output_file, metavar="FILE", help="write the tables here as Markdown")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is one")
    parser.add_argument("--small", action="store_true", help="scale the layers down, to try the program itself")
    parser.add_argument("--seed", type=int, default=0, help="of the random data, and of what is drawn")


def chosen(name: str, words: Sequence[str], known: Sequence[str]) -> list[str]:
    """The words, in the order of `known`. Raises UsageError for others or for none."""
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        got = ", ".join(map(repr, unknown)) or "nothing"
        raise UsageError(f"--{name}: expected some of {', '.join(known)}, got {got}")
    return [word for word in known if word in words]


def plan_cells(
    layers: Sequence[Layer], dtypes: Sequence[str], layouts: Sequence[str], ops: Sequence[str]
) -> list[Cell]:
    """The cells in an order in which neighbours share their data and reference: storage type, then op."""
    storages = list(dict.fromkeys(STORAGE[dtype] for dtype in dtypes))
    return [
        Cell(layer, dtype, layout, op)
        for layer in layers
        for storage in storages
        for op in ops
        for dtype in dtypes
        if STORAGE[dtype] == storage
        for layout in layouts
    ]


class Shared:
    """Data and reference of the latest layer, storage type and op: the cells that need them are neighbours."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.seed = device, seed
        self.operands_key: object = None
        self.exact_key: object = None

    def operands(self, cell: Cell) -> Operands:
        key = cell.layer.id, STORAGE[cell.dtype]
        if key != self.operands_key:
            self.operands_key = self.exact_key = self._operands = self._exact = None
            self._operands = make_operands(cell.layer, STORAGE[cell.dtype], self.device, self.seed)
            self.operands_key = key
        assert self._operands is not None
        return self._operands

    def exact(self, cell: Cell) -> tuple[Tensor, str]:
        key = cell.layer.id, STORAGE[cell.dtype], cell.op
        operands = self.operands(cell)
        if key != self.exact_key:
            self.exact_key = self._exact = None
            self._exact = reference(cell.layer, cell.op, operands)
            self.exact_key = key
        assert self._exact is not None
        return self._exact

    _operands: Operands | None = None
    _exact: tuple[Tensor, str] | None = None


def run_cells(
    cells: Sequence[Cell],
    timer: Timer,
    peaks: dict[str, float],
    device: torch.device,
    args: argparse.Namespace,
    start: float,
    save: Callable[[Sequence[Cell]], None],
) -> tuple[list[Cell], str]:
    """Measures the cells until done, out of time, interrupted, or the device is lost. Returns those it measured and,
    if not all, why. `start` is when the budget began, by time.monotonic()."""
    shared = Shared(device, args.seed)
    done: list[Cell] = []
    lines = rich_console() is None
    with progress(len(cells), "cells") as advance, cudnn(enabled=True, benchmark=True), torch.no_grad():
        for cell in cells:
            if args.budget is not None and time.monotonic() - start > args.budget:
                return done, f"the budget of {args.budget:g} s is spent"
            if done and done[-1].layer.id != cell.layer.id:
                save(done)
            try:
                with float32_precision("tf32" if cell.dtype == "tf32" else "ieee"):
                    measure(
                        cell,
                        shared.operands(cell),
                        functools.partial(shared.exact, cell),
                        timer,
                        peaks,
                        args.kernel,
                        args.repeats,
                    )
            except torch.OutOfMemoryError as error:  # Not even the data fit.
                cell.status, cell.reason = "memory", first_line(error)
            except DeviceLost as error:
                done.append(cell)
                return done, f"the device is lost: {error}"
            except KeyboardInterrupt:
                return done, "interrupted"
            if device.type == "cuda":
                torch.cuda.empty_cache()
            done.append(cell)
            if lines and cell.status != "unsupported":
                print(text_line(cell_row(cell)), flush=True)
            advance(f"{cell.layer.id} {cell.dtype} {cell.layout} {cell.op}")
    return done, ""


def conditions(facts: dict[str, Any], peaks: dict[str, float], dtypes: Sequence[str]) -> str:
    """One line: machine, versions, how timed, measured rates."""
    if facts["gpu"]:
        where = f"{facts['gpu']}, driver {facts['driver']}, torch {facts['torch']}, cuDNN {facts['cudnn']}"
        how = "median of CUDA graph replays taken in turn, L2 flushed, clocks as found"
    else:
        where = f"{facts['processor']}, {facts['threads']} threads, torch {facts['torch']}"
        how = "median wall-clock time, calls taken in turn, caches as found"
    rates = ", ".join(f"{dtype} {peaks[dtype] / 1e12:.4g} TFLOP/s" for dtype in dtypes)
    empty = f"; an empty replay takes {1e6 * peaks['empty_replay_s']:.1f} us" if "empty_replay_s" in peaks else ""
    return (
        f"conv2d_ext {facts['conv2d_ext']}, {facts['date']}. {where}; {how}. "
        f"Measured: {rates}, copy {peaks['copy'] / 1e12:.3g} TB/s{empty}."
    )


def markdown(cells: Sequence[Cell], line: str, stopped: str, command: str) -> str:
    """The page for docs/: conditions, geometric means, every cell."""
    shown = [cell for cell in cells if cell.status != "unsupported"]
    ratio, share = cross(cells, "ratio"), cross(cells, "share")
    columns, rows = summary_rows(summarize(cells))
    parts = [
        f"`{command}`",
        line,
        *([f"Not complete: {stopped}."] if stopped else []),
        "ratio = F.conv2d's time / ours (above 1: ours is faster); share = limit / time, where the limit is "
        "max(flops / GEMM peak, bytes / copy bandwidth) at the measured rates.",
        "Ratio, geometric means:",
        markdown_table(*ratio, ratio[0][:1]),
        "Share of the limit in per cent, ours (F.conv2d), geometric means:",
        markdown_table(*share, share[0][:1]),
        "Groups:",
        markdown_table(columns, rows, LEFT),
        "Cells:",
        markdown_table(COLUMNS, [[t.replace("|", "\\|") for t in cell_row(c)] for c in shown], LEFT),
    ]
    return "\n\n".join(parts) + "\n"


def run(args: argparse.Namespace) -> int:
    start = time.monotonic()
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    dtypes = chosen("dtypes", args.dtypes or (list(STORAGE) if cuda else ["fp32"]), list(STORAGE))
    if not cuda and "tf32" in dtypes:
        raise UsageError("--dtypes: tf32 is an arithmetic of GPUs; --device cpu has none")
    rows = list(torch.ops.conv2d_ext.kernels())
    if args.kernel is not None and args.kernel not in rows:
        raise UsageError(f"--kernel: expected one of {', '.join(rows)}; got {args.kernel!r}")
    if args.kernel is not None and not cuda:
        raise UsageError("--kernel: rows of the table are GPU kernels; --device cpu has none")
    drawn = args.list == "networks"
    layers = select_layers(draw_layers(args.seed) if drawn else load_layers(), args.layers)
    cells = plan_cells(
        [shrink(layer) for layer in layers] if args.small else layers,
        dtypes,
        chosen("layouts", args.layouts, LAYOUTS),
        chosen("ops", args.ops, OPS),
    )
    if drawn:  # no network asks for the gradient of its images
        cells = [cell for cell in cells if cell.op != "dgrad" or cell.layer.C > 4]
    if cuda:
        torch.cuda.set_device(device)
    timer: Timer = CudaTimer(device) if cuda else CpuTimer()
    facts = machine(device) | {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}
    peaks = measure_peaks(timer, device, dtypes)
    line = conditions(facts, peaks, dtypes)
    command = "python -m conv2d_ext " + " ".join(sys.argv[1:])
    print(line, flush=True)

    def save(done: Sequence[Cell], stopped: str = "running") -> None:
        if args.json is not None:
            args.json.write_text(
                json.dumps(
                    {
                        "machine": facts,
                        "peaks": peaks,
                        "command": command,
                        "stopped": stopped,
                        "cells_planned": len(cells),
                        "summary": summarize(done),
                        "slower_than": SLOWER,
                        "cells": [cell.to_json() for cell in done],
                    },
                    indent=1,
                ),
                encoding="utf-8",
            )

    if rich_console() is None:
        print(text_line(COLUMNS))
    done, stopped = run_cells(cells, timer, peaks, device, args, start, save)
    save(done, stopped)
    report(done, stopped, len(cells), time.monotonic() - start)
    if args.markdown is not None:
        shown = sorted(done, key=lambda cell: cell.ratio or 0) if drawn else done  # slowest beside F.conv2d first
        args.markdown.write_text(markdown(shown, line, stopped, command), encoding="utf-8")
    return 1 if any(cell.broken for cell in done) or stopped.startswith("the device") else 0


def report(done: Sequence[Cell], stopped: str, planned: int, seconds: float) -> None:
    """Prints the tables at the end."""
    shown = [cell for cell in done if cell.status != "unsupported"]
    if (console := rich_console()) is not None:
        kept = [i for i, name in enumerate(COLUMNS) if console.width >= sum(WIDTHS) or name in NARROW]
        rows = [cell_row(cell) for cell in shown]
        show_table("cells", [COLUMNS[i] for i in kept], [[row[i] for i in kept] for row in rows], LEFT)
    timed = [cell for cell in shown if cell.ratio is not None]
    if timed:
        for title, value in (
            ("F.conv2d's time / ours, geometric means", "ratio"),
            ("share of the limit in per cent, ours (F.conv2d), geometric means", "share"),
        ):
            columns, table = cross(done, value)
            show_table(title, columns, table, columns[:1])
        show_table("groups, geometric means", *summary_rows(summarize(done)), LEFT)
    counts = {
        status: sum(cell.status == status for cell in done)
        for status in ("FAIL", "error", "capture", "memory", "unsupported")
    }
    problems = "".join(f", {count} {status}" for status, count in counts.items() if count)
    slower = sum(cell.ratio < SLOWER for cell in timed if cell.ratio is not None)
    why = f" ({stopped})" if stopped else ""
    print(
        f"\n{len(done)} of {planned} cells in {seconds:.0f} s{why}: {len(timed)} timed beside F.conv2d, "
        f"{slower} of them slower than {SLOWER}x{problems}",
        flush=True,
    )
