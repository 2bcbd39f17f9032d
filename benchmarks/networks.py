"""Whole networks of plain torch.nn, as they are and after conv2d_ext.convert.

    python benchmarks/networks.py                                      # float16 channels_last, batch 32
    python benchmarks/networks.py --networks resnet50,vgg16 --modes infer --how eager --batches 1
    python benchmarks/networks.py --dtypes amp,tf32 --layouts nhwc,nchw --budget 300 --json networks.json
    python benchmarks/networks.py --networks densenet121 --layers      # its layers, most time lost first

infer: model.eval() under no_grad. train: forward, loss, backward, SGD with momentum. eager: calls in a row, until the
GPU is idle; graph: replays of one CUDA graph of the call; compile: torch.compile. Both contenders hold the same
parameters and take turns; the median counts. fp16, bf16: the whole model in that type; amp, amp-bf16: float32
parameters under autocast; tf32, fp32: float32. torch runs with cudnn.benchmark.

Before a time is shown, the output and the gradient of every parameter (of the parameters alone in train mode) are
compared with the same network in float64 without cuDNN: the relative error (2-norm) of ours may be at most twice
torch's, plus a few roundings. `error` is the worst of ours over what is allowed; a cell above 1 says FAIL, and the
exit status is 1. conv: the share of the GPU's time that torch.profiler finds in convolutions. GiB: most memory that the
call held beyond what it found.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Conv2d

import conv2d_ext
from conv2d_ext.cli import bench, float32_precision, pick_device, show_table
from conv2d_ext.cli.info import machine

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]  # Python may have left the script's own folder out

from models import NETWORKS  # noqa: E402
from shapes import some  # noqa: E402

# name: the model's type, autocast's type, "tf32" or "ieee", unit roundoff
DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None, str, float]] = {
    "fp16": (torch.float16, None, "ieee", 2.0**-11),
    "bf16": (torch.bfloat16, None, "ieee", 2.0**-8),
    "amp": (torch.float32, torch.float16, "ieee", 2.0**-11),
    "amp-bf16": (torch.float32, torch.bfloat16, "ieee", 2.0**-8),
    "tf32": (torch.float32, None, "tf32", 2.0**-11),
    "fp32": (torch.float32, None, "ieee", 2.0**-24),
}
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
Results = dict[str, Tensor]  # "output", and the gradient of each parameter by its name
MODES, HOW = ("infer", "train"), ("eager", "graph", "compile")
SCALE = 1024.0  # of the loss, so that gradients in half precision do not vanish


# ---- one network -----------------------------------------------------------------------------------------------------


def make(name: str, batch: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A network and images. Every value is one of float16 and of bfloat16, so that all types hold the same network."""
    build, size, share = NETWORKS[name]
    torch.manual_seed(0)
    with device:
        network = build()
        x = torch.randn(max(1, batch // share), *size)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in network.modules():
        if isinstance(module, Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0  # the statistics become those of these images
        network(x)
        for norm in norms:
            norm.momentum = 0.1
        for t in (x, *network.parameters(), *network.buffers()):
            if t.is_floating_point():
                t.copy_(t.bfloat16().half())
    return network, x


class Runner:
    """A copy of a network in a type and layout. `step()` infers or trains; train() leaves gradients."""

    def __init__(self, network: nn.Module, x: Tensor, mode: str, dtype: str, layout: str, ours: bool) -> None:
        storage, self.autocast, self.precision, _ = DTYPES[dtype]
        self.x = x.to(dtype=storage, memory_format=LAYOUTS[layout])
        self.network = copy.deepcopy(network).to(dtype=storage, memory_format=LAYOUTS[layout]).train(mode == "train")
        if ours:
            conv2d_ext.convert(self.network)
        self.call: Callable[[Tensor], Tensor] = self.network
        self.optimizer = torch.optim.SGD(self.network.parameters(), 1e-6, 0.9, fused=True) if mode == "train" else None

    def forward(self) -> Tensor:
        cast = torch.autocast(self.x.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        with cast:
            return self.call(self.x)

    def step(self) -> Tensor:
        if self.optimizer is None:
            with torch.no_grad():
                return self.forward()
        self.optimizer.zero_grad()
        y = self.forward()
        (y.float().square().mean() * SCALE).backward()
        self.optimizer.step()
        return y

    def results(self) -> Results:
        """Of one step that is taken back."""
        before = copy.deepcopy(self.network.state_dict())
        found = {"output": self.step().detach()}
        found |= {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        self.network.load_state_dict(before)
        return found


def exact(network: nn.Module, x: Tensor, mode: str) -> Results:
    """The results in float64, without cuDNN, by torch."""
    network = copy.deepcopy(network).double().train(mode == "train")
    with bench.cudnn(enabled=False, benchmark=False), torch.set_grad_enabled(mode == "train"):
        y = network(x.double())
        if mode == "train":
            (y.square().mean() * SCALE).backward()
    return {"output": y.detach()} | {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


def worst(ours: Results, theirs: Results, truth: Results, unit: float) -> tuple[float, str]:
    """The greatest error of ours over the allowed one, and of what. NaN is the greatest."""
    found = {}
    for name, expected in truth.items():
        a, b = (bench.relative_error(results[name], expected) for results in (ours, theirs))
        found[name] = a / (2 * b + 8 * unit)
    name = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
    return found[name], name


def conv_share(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Milliseconds of one call's kernels, and of those of convolutions, forward and backward."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cuda else [])]) as profile:
        step()
    pattern = re.compile(r"aten::convolution(_backward)?(_overrideable)?$|conv2d_ext::")
    # Of the host's events alone: a kernel is one of its own as well, and counts with the call that launched it.
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CPU]
    total = sum(e.self_device_time_total if cuda else e.self_cpu_time_total for e in events)

    def inner(event: Any) -> bool:
        parent = event.cpu_parent
        return parent is not None and (bool(pattern.match(parent.name)) or inner(parent))

    tops = [e for e in events if pattern.match(e.name) and not inner(e)]
    part = sum(e.device_time_total if cuda else e.cpu_time_total for e in tops)
    return total / 1e3, part / 1e3


def peak_memory(step: Callable[[], object]) -> float | None:
    """GiB that one call held at most, beyond what was there."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def in_turn(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Milliseconds of a call each: medians of rounds of calls in a row, about 30 ms' worth, until the GPU is idle."""

    def seconds(call: Callable[[], object], count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / count

    counts = [max(1, min(50, round(0.03 / seconds(call, 1)))) for call in calls]
    times = [[seconds(*pair) for pair in zip(calls, counts, strict=True)] for _ in range(5)]
    return [1e3 * statistics.median(column) for column in zip(*times, strict=True)]


# ---- cells -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Cell:
    """One network in one way; the pairs are ours and torch's."""

    network: str
    mode: str
    dtype: str
    layout: str
    images: int
    error: float = math.nan
    worst: str = ""
    status: str = "ok"
    ms: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # by `how`
    gpu_ms: list[float] = dataclasses.field(default_factory=list)
    conv_ms: list[float] = dataclasses.field(default_factory=list)
    gib: list[float | None] = dataclasses.field(default_factory=list)

    def ratio(self, how: str) -> float:
        return self.ms[how][1] / self.ms[how][0]


def measure(cell: Cell, network: nn.Module, x: Tensor, truth: Results, how: Sequence[str]) -> None:
    """Checks, profiles and times both."""
    device, unit = x.device, DTYPES[cell.dtype][3]
    runners = [Runner(network, x, cell.mode, cell.dtype, cell.layout, ours) for ours in (True, False)]
    with bench.cudnn(enabled=True, benchmark=True), float32_precision(runners[0].precision):
        results = [runner.results() for runner in runners]
        cell.error, cell.worst = worst(*results, truth, unit)
        del results
        if not cell.error <= 1:
            cell.status = "FAIL"
            return
        for runner in runners:
            runner.step()
            cell.gib.append(peak_memory(runner.step))
            gpu, convolutions = conv_share(runner.step, device)
            cell.gpu_ms.append(gpu)
            cell.conv_ms.append(convolutions)
        for one in how:
            calls: list[Callable[[], object]] = [runner.step for runner in runners]
            captured: list[bench.CudaGraph] = []
            if one == "graph":
                captured = [bench.CudaGraph(runner.step) for runner in runners]
                calls = [graph.replay for graph in captured]
            if one == "compile":
                for runner in runners:
                    runner.call = torch.compile(runner.network)
                    runner.step()
            cell.ms[one] = in_turn(calls, device)
            for graph in captured:
                graph.release()


def layers_of(network: nn.Module, x: Tensor) -> dict[bench.Layer, int]:
    """The distinct convolutions of a call, and how often each runs; those of the images, without dgrad, say so."""
    found: dict[bench.Layer, int] = {}

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(module, Conv2d) and not isinstance(module.padding, str)
        (N, C, H, W), (K, _, R, S) = inputs[0].shape, module.weight.shape
        pairs = [tuple(map(int, pair)) for pair in (module.stride, module.padding, module.dilation)]
        where = "" if inputs[0].requires_grad else "images"
        layer = bench.Layer("", "", where, N, C, H, W, K, R, S, *pairs, module.groups, module.bias is not None)
        found[layer] = found.get(layer, 0) + 1

    hooks = [m.register_forward_pre_hook(note) for m in network.modules() if isinstance(m, Conv2d)]
    network(x)
    for hook in hooks:
        hook.remove()
    return {dataclasses.replace(layer, id=f"{i:02}"): count for i, (layer, count) in enumerate(found.items())}


def run_layers(name: str, options: argparse.Namespace, device: torch.device, left: float) -> list[dict[str, Any]]:
    """Times each layer of a network by the means of `bench`, and prints them, most time lost first."""
    counts = layers_of(*make(name, options.batches[0], device))
    ops = bench.OPS if "train" in options.modes else bench.OPS[:1]
    dtypes = list(dict.fromkeys({"amp": "fp16", "amp-bf16": "bf16"}.get(d, d) for d in options.dtypes))
    cells = bench.plan_cells(list(counts), dtypes, options.layouts, ops)
    cells = [cell for cell in cells if cell.op != "dgrad" or cell.layer.layer != "images"]
    timer: bench.Timer = bench.CudaTimer(device) if device.type == "cuda" else bench.CpuTimer()
    peaks = bench.measure_peaks(timer, device, dtypes)
    given = argparse.Namespace(kernel=None, repeats=None, seed=0, budget=left)
    with contextlib.redirect_stdout(sys.stderr):
        done, stopped = bench.run_cells(cells, timer, peaks, device, given, time.monotonic(), lambda _: None)
    rows = []
    for cell in done:
        times = counts[next(layer for layer in counts if layer.id == cell.layer.id)]
        lost = times * (cell.ours_ms - cell.theirs_ms) if cell.ours_ms and cell.theirs_ms else math.nan
        rows.append(cell.to_json() | {"network": name, "times": times, "lost_us": 1e3 * lost})
    rows.sort(key=lambda row: -math.inf if math.isnan(row["lost_us"]) else row["lost_us"], reverse=True)
    columns = ("layer", "times", "dtype", "layout", "op", "ours us", "torch us", "ratio", "lost us", "kernel")

    def text(row: dict[str, Any]) -> list[str]:
        if row["ratio"] is None:
            numbers = ["-", "-", row["status"], "-"]
        else:
            us = [1e3 * row["ours_ms"], 1e3 * row["theirs_ms"]]
            numbers = [f"{us[0]:.1f}", f"{us[1]:.1f}", f"{row['ratio']:.2f}", f"{row['lost_us']:.0f}"]
        return [row["case"], str(row["times"]), row["dtype"], row["layout"], row["op"], *numbers, row["kernel"]]

    title = f"{name}: layers, most time lost first{f' ({stopped})' if stopped else ''}"
    show_table(title, columns, [text(row) for row in rows], ("layer", "dtype", "layout", "op", "kernel"))
    return rows


def run(name: str, batch: int, options: argparse.Namespace, device: torch.device, deadline: float,
        cells: list[Cell]) -> None:  # fmt: skip
    """Adds the cells of a network and batch, as long as there is time."""
    if time.monotonic() >= deadline:
        return
    network, x = make(name, batch, device)
    for mode in options.modes:
        truth = exact(network, x, mode)
        for dtype, layout in itertools.product(options.dtypes, options.layouts):
            if time.monotonic() >= deadline:
                return
            cell = Cell(name, mode, dtype, layout, x.shape[0])
            cells.append(cell)
            try:
                measure(cell, network, x, truth, options.how)
            except RuntimeError as error:  # out of memory, say
                cell.status, cell.worst = "error", bench.first_line(error)
            for row in rows_of(cell):
                print("  ".join(row), file=sys.stderr, flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()


# ---- tables ----------------------------------------------------------------------------------------------------------


COLUMNS = ("network", "mode", "dtype", "layout", "images", "how", "ours/s", "torch/s", "ratio", "conv", "conv ratio",
           "GiB", "error", "note")  # fmt: skip


def rows_of(cell: Cell) -> list[list[str]]:
    """The texts of COLUMNS, a row for each way that was timed."""
    first = [cell.network, cell.mode, cell.dtype, cell.layout, str(cell.images)]
    error = f"{cell.error:.2f}"
    if cell.status != "ok":
        return [[*first, *"-------", error, f"{cell.status} {cell.worst}"]]
    shares = "/".join(f"{part / all_:.0%}" for part, all_ in zip(cell.conv_ms, cell.gpu_ms, strict=True) if all_)
    convs = f"{cell.conv_ms[1] / cell.conv_ms[0]:.2f}" if all(cell.conv_ms) else "-"
    gib = "/".join("-" if g is None else f"{g:.2f}" for g in cell.gib)
    rates = {how: [f"{1e3 * cell.images / ms:.0f}" for ms in both] for how, both in cell.ms.items()}
    return [[*first, how, *rates[how], f"{cell.ratio(how):.2f}", shares, convs, gib, error, ""] for how in cell.ms]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, known, default in (
        ("networks", tuple(NETWORKS), tuple(NETWORKS)),
        ("modes", MODES, MODES),
        ("how", HOW, ("eager", "graph")),
        ("dtypes", tuple(DTYPES), ("fp16",)),
        ("layouts", tuple(LAYOUTS), ("nhwc",)),
    ):
        text = f"of {', '.join(known)}; default: {'all' if known == default else ','.join(default)}"
        found.add_argument(f"--{name}", type=some(known), default=list(default), metavar="A,B", help=text)
    found.add_argument("--batches", type=lambda text: [int(word) for word in text.split(",")], default=[32],
                       metavar="A,B", help="images; unet takes an 8th, yolo a 4th of them (default: 32)")  # fmt: skip
    found.add_argument("--layers", action="store_true", help="time each layer of the networks instead")
    found.add_argument("--budget", type=float, metavar="SECONDS", help="start nothing after this time")
    found.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    found.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is one")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    deadline = time.monotonic() + (math.inf if options.budget is None else options.budget)
    device = pick_device(options.device)
    if device.type != "cuda":
        options.how = [how for how in options.how if how != "graph"]
    cells: list[Cell] = []
    layers: list[dict[str, Any]] = []
    for name in options.networks:
        if options.layers and time.monotonic() < deadline:
            layers += run_layers(name, options, device, deadline - time.monotonic())
        for batch in [] if options.layers else options.batches:
            run(name, batch, options, device, deadline, cells)
    if cells:
        rows = [row for cell in cells for row in rows_of(cell)]
        show_table("networks: images a second", COLUMNS, rows, (*COLUMNS[:4], "how", "note"))
    for how in options.how:
        ratios = [cell.ratio(how) for cell in cells if how in cell.ms]
        if ratios:
            slower = sum(ratio < bench.SLOWER for ratio in ratios)
            print(f"{how}: {bench.geomean(ratios):.2f} in the mean, least {min(ratios):.2f}, {slower} < {bench.SLOWER}")
    if options.json:
        facts = machine(device) | {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}
        found = {"machine": facts, "cells": [dataclasses.asdict(cell) for cell in cells], "layers": layers}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    broken = any(c.status != "ok" for c in cells) or any(r["status"] in ("FAIL", "error", "capture") for r in layers)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
