"""Two small jobs on real data: filters a photograph, then trains a network on handwritten digits.

Each filter is checked against F.conv2d; the digits are also learnt by the same network made of nn.Conv2d, from the same
seed. Exit code 1 if a check fails. Needs the extra: pip install 'conv2d_ext[demo]'.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import conv2d_ext
from conv2d_ext.cli import float32_precision, output_file, pick_device, require, show_table

HELP = "filters a photograph and trains a network, beside PyTorch"

Sides = tuple[int, int, int, int]
FILTER_TOLERANCE = 1e-5  # Of pixels in [0, 1]; the filters' weights sum to at most about 10.
GRADIENT_TOLERANCE = 1e-5  # Relative, of the first step, where both networks still have equal parameters.
BATCH = 64
PEAK_RATE = 1e-2
LEAST_ACCURACY = 0.94
ACCURACY_TOLERANCE = 0.02  # Seven of the 360 test digits: rounding in another order sends training on another path.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: cuda if there is one")
    parser.add_argument("--photo", choices=("china", "flower"), default="flower", help="which of scikit-learn's two")
    parser.add_argument("--output", type=output_file, default=Path("conv2d_ext_demo.png"), help="the PNG to write")
    parser.add_argument("--epochs", type=int, default=12)


# ---------------------------------------------------------------- the photograph


@dataclasses.dataclass(frozen=True)
class Filter:
    """One convolution of the photograph: its name, what it does, its arguments. `show` makes pixels of its result."""

    name: str
    text: str
    weight: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: Sides = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    show: Callable[[Tensor], Tensor] = lambda y: y

    def ours(self, x: Tensor) -> Tensor:
        return conv2d_ext.conv2d(x, self.weight.to(x), None, self.stride, self.padding, self.dilation, self.groups)

    def theirs(self, x: Tensor) -> Tensor:
        """F.conv2d pads both sides alike, so the four sides are padded first."""
        top, bottom, left, right = self.padding
        padded = F.pad(x, (left, right, top, bottom))
        return F.conv2d(padded, self.weight.to(x), None, self.stride, 0, self.dilation, self.groups)


def gaussian(size: int, sigma: float) -> Tensor:
    """A size x size bell that sums to 1."""
    line = torch.exp(-((torch.arange(size) - (size - 1) / 2) ** 2) / (2 * sigma**2))
    return torch.outer(line, line) / line.sum() ** 2


def edge_strength(y: Tensor) -> Tensor:
    """The length of the gradient from its two components, light on dark."""
    return (y.square().sum(1, keepdim=True).sqrt() / 3).sqrt()


def filters() -> list[Filter]:
    """One filter for each kind of convolution, and one that is all kinds at once."""
    light = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    edges = torch.stack([sobel, sobel.T]).view(2, 1, 3, 3) * light
    sharpen = 2.5 * F.pad(torch.ones(1, 1), (4, 4, 4, 4)) - 1.5 * gaussian(9, 2.0)
    slope = (torch.arange(7.0) - 3).expand(3, 1, 3, 7) / 6
    return [
        Filter(
            "strided",
            "9x9 Gaussian mean, every 6th pixel",
            gaussian(9, 3.0).expand(3, 1, 9, 9).contiguous(),
            stride=(6, 6),
            padding=(4, 4, 4, 4),
            groups=3,
        ),
        Filter(
            "dilated", "3x3 Sobel pair, taps 3 apart", edges, padding=(3, 3, 3, 3), dilation=(3, 3), show=edge_strength
        ),
        Filter(
            "grouped",
            "9x9 sharpening, each color by itself",
            sharpen.expand(3, 1, 9, 9).contiguous(),
            padding=(4, 4, 4, 4),
            groups=3,
        ),
        Filter(
            "asymmetric",
            "1x41 trail, padded on the left alone",
            torch.full((3, 1, 1, 41), 1 / 41),
            padding=(0, 0, 40, 0),
            groups=3,
        ),
        Filter(
            "all at once",
            "3x7 slope, stride 1x4, dilation 2x1, 3 groups",
            slope.contiguous(),
            stride=(1, 4),
            padding=(4, 0, 5, 1),
            dilation=(2, 1),
            groups=3,
            show=lambda y: y / 3 + 0.5,
        ),
    ]


def filter_photo(name: str, output: Path, device: torch.device) -> bool:
    """Filters, checks and draws; whether all results agree with F.conv2d."""
    pyplot = headless_pyplot()
    photo = require("sklearn.datasets").load_sample_image(f"{name}.jpg")
    x = torch.from_numpy(photo.copy()).to(device).permute(2, 0, 1)[None].float() / 255
    size = "x".join(map(str, x.shape[2:]))
    pictures, rows, good = [("original", f"scikit-learn's {name}.jpg, {size}", x)], [], True
    for one in filters():
        ours, theirs = one.ours(x), one.theirs(x)
        difference = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("nan")
        passed = difference <= FILTER_TOLERANCE
        good &= passed
        pictures.append((one.name, one.text, one.show(ours)))
        rows.append(
            [
                f"{one.name}: {one.text}",
                "x".join(map(str, ours.shape[1:])),
                f"{difference:.1e}",
                "ok" if passed else "FAILED",
            ]
        )
    show_table("photograph, against F.conv2d", ["filter", "result", "largest difference", "check"], rows, ["filter"])

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 7.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    for axis, (title, text, pixels) in zip(axes.flat, pictures, strict=True):
        array = pixels[0].clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        # Stretched back to the photograph's shape, so that coarse results show their pixels.
        extent = (0, x.shape[3], x.shape[2], 0)
        axis.imshow(array, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=extent)
        axis.set_title(title, fontsize=13, fontweight="bold", loc="left")
        axis.set_title(text, fontsize=10, loc="right")
        axis.set_axis_off()
    figure.savefig(output, dpi=110)
    pyplot.close(figure)
    print(f"picture: {output.resolve()}")
    return good


def headless_pyplot() -> Any:
    """pyplot that draws into files, so that no display is needed."""
    require("matplotlib").use("Agg")
    return require("matplotlib.pyplot")


# ---------------------------------------------------------------- the digits


@dataclasses.dataclass
class Digits:
    """8x8 images in [0, 1] with their labels, split into training and test."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits(device: torch.device) -> Digits:
    """scikit-learn's 1797 digits; a fifth is for the test."""
    data = require("sklearn.datasets").load_digits()
    x = torch.from_numpy(data.images).float().to(device)[:, None] / 16
    y = torch.from_numpy(data.target).long().to(device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(device)
    cut = len(x) * 4 // 5
    return Digits(x[order[:cut]], y[order[:cut]], x[order[cut:]], y[order[cut:]])


def make_net(conv: type[nn.Conv2d], device: torch.device) -> nn.Module:
    """A ConvNet with dense, strided, depthwise, grouped and 1x1 layers, from a fixed seed."""
    torch.manual_seed(0)
    return nn.Sequential(
        conv(1, 32, 3, padding=1),
        nn.ReLU(),
        conv(32, 64, 3, padding=1, groups=4),
        nn.ReLU(),
        conv(64, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        conv(64, 64, 3, padding=2, dilation=2, groups=64),
        conv(64, 96, 1),
        nn.ReLU(),
        conv(96, 96, (1, 3), padding=(0, 1)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, 10),
    ).to(device)


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The loss and its gradient in each parameter."""
    loss = F.cross_entropy(net(x), y)
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]


class Training:
    """One network in training with Adam. `seconds` counts what its epochs took."""

    def __init__(self, net: nn.Module, digits: Digits, epochs: int, step: Callable[[], None]) -> None:
        self.net, self.digits, self.step, self.seconds = net, digits, step, 0.0
        self.optimizer = torch.optim.Adam(net.parameters())
        steps = max(1, epochs * batches(digits))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, PEAK_RATE, total_steps=steps)
        self.order = torch.Generator().manual_seed(1)

    def epoch(self) -> None:
        x, y = self.digits.train_x, self.digits.train_y
        synchronize(x.device)
        start = time.perf_counter()
        for batch in torch.randperm(len(x), generator=self.order).to(x.device).split(BATCH):
            self.optimizer.zero_grad()
            F.cross_entropy(self.net(x[batch]), y[batch]).backward()
            self.optimizer.step()
            self.schedule.step()
            self.step()
        synchronize(x.device)
        self.seconds += time.perf_counter() - start

    def outputs(self) -> Tensor:
        """Of the test digits."""
        with torch.no_grad():
            return self.net(self.digits.test_x)


def batches(digits: Digits) -> int:
    """Steps of an epoch."""
    return (len(digits.train_x) + BATCH - 1) // BATCH


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread: on layers of 8x8 pixels several wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def training_bar(total: int) -> Iterator[Callable[[str], Callable[[], None]]]:
    """Progress bars of `total` steps; yields a function that adds one and returns what to call after each step."""
    rich = require("rich.progress")
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
    )
    with rich.Progress(*columns) as bar:

        def add(name: str) -> Callable[[], None]:
            task = bar.add_task(name, total=total)
            return lambda: bar.advance(task)

        yield add


def train_digits(epochs: int, device: torch.device) -> bool:
    """Trains both networks and prints them side by side; whether they agree and have learnt."""
    digits = load_digits(device)
    kinds: dict[str, type[nn.Conv2d]] = {"conv2d_ext.Conv2d": conv2d_ext.Conv2d, "nn.Conv2d": nn.Conv2d}
    nets = {name: make_net(kind, device) for name, kind in kinds.items()}
    # This is also the warm-up of both.
    ours, theirs = (gradients(net, digits.train_x[:BATCH], digits.train_y[:BATCH]) for net in nets.values())
    first = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
    with training_bar(epochs * batches(digits)) as add:
        trainings = {name: Training(net, digits, epochs, add(f"{name:<18}")) for name, net in nets.items()}
        # Epoch by epoch in turn, so that whatever else the machine does slows both.
        for _ in range(epochs):
            for training in trainings.values():
                training.epoch()
    outputs, expected = (training.outputs() for training in trainings.values())
    accuracies = [float((found.argmax(1) == digits.test_y).float().mean()) for found in (outputs, expected)]
    rows = [
        [name, f"{accuracy:.2%}", f"{training.seconds:.2f}"]
        for (name, training), accuracy in zip(trainings.items(), accuracies, strict=True)
    ]
    show_table(
        f"digits: {len(digits.train_x)} to train on, {len(digits.test_x)} to test, {epochs} epochs, {device}",
        ["network of", "test accuracy", "seconds"],
        rows,
        ["network of"],
    )
    last = float((outputs - expected).abs().max() / expected.abs().max())
    apart = int((outputs.argmax(1) != expected.argmax(1)).sum())
    print(
        f"largest difference, relative: {first:.1e} of loss and gradients in the first step,\n"
        f"{last:.1e} of the outputs after training (each step enlarges what rounding began); "
        f"{apart} of {len(outputs)} test digits are read differently"
    )
    checks = {
        f"first step within {GRADIENT_TOLERANCE:.0e}": first <= GRADIENT_TOLERANCE,
        f"accuracy at least {LEAST_ACCURACY:.0%}": min(accuracies) >= LEAST_ACCURACY,
        f"accuracies within {ACCURACY_TOLERANCE:.0%}": max(accuracies) - min(accuracies) <= ACCURACY_TOLERANCE,
    }
    print("; ".join(f"{text}: {'ok' if passed else 'FAILED'}" for text, passed in checks.items()))
    return all(checks.values())


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    for module in ("rich", "sklearn", "matplotlib"):
        require(module)
    start = time.monotonic()
    # Strict float32 on both sides: TF32 differs from itself in another order by more than the tolerances.
    with float32_precision("ieee"):
        good = filter_photo(args.photo, args.output, device)
        print()
        with one_thread():
            good &= train_digits(args.epochs, device)
    print(f"{'all checks passed' if good else 'FAILED'}, {time.monotonic() - start:.0f} s")
    return 0 if good else 1
