"""A network of ours and one of torch's, trained from the same seed on real digits, follow the same curve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import conv2d_ext


def network(layer: type[nn.Conv2d]) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(
        layer(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        layer(16, 16, 3, padding=1, groups=16, stride=2),
        layer(16, 32, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        layer(32, 32, 3, padding="same", dilation=2, groups=4),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed: its digits are the data")
    data = datasets.load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def losses(model: nn.Module, images: Tensor, labels: Tensor, steps: int, rate: float = 0.05) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    curve = []
    for step in range(steps):
        start = step * 100 % (len(images) - 99)
        at = slice(start, start + 100)
        loss = nn.functional.cross_entropy(model(images[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    return curve


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_the_loss_follows_the_curve_of_torchs_network(
    memory_format: torch.memory_format, digits: tuple[Tensor, Tensor], device: str
) -> None:
    """In float64 rounding cannot grow into another curve within 60 steps."""
    images, labels = digits[0].to(device, torch.float64), digits[1].to(device)
    images = images.to(memory_format=memory_format)
    curves = [
        losses(network(layer).to(device, torch.float64, memory_format=memory_format), images, labels, 60)
        for layer in (conv2d_ext.Conv2d, nn.Conv2d)
    ]
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) <= 1e-6
    assert curves[0][-1] < 0.5 * curves[0][0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_network_learns_the_digits_as_well_as_torchs_in_float32(
    dtype: torch.dtype, digits: tuple[Tensor, Tensor], device: str
) -> None:
    """bfloat16 by autocast, as it is used in training."""
    images, labels = digits[0].to(device), digits[1].to(device)
    right = []
    for layer, cast in ((conv2d_ext.Conv2d, dtype == torch.bfloat16), (nn.Conv2d, False)):
        model = network(layer).to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=cast):
            losses(model.train(), images[:1400], labels[:1400], 14 * 10, rate=0.01)
            right.append(float((model.eval()(images[1400:]).argmax(1) == labels[1400:]).float().mean()))
    assert right[0] > 0.85
    assert abs(right[0] - right[1]) < 0.05


def test_training_from_one_seed_is_the_same_bit_by_bit(digits: tuple[Tensor, Tensor], device: str) -> None:
    images, labels = digits[0].to(device), digits[1].to(device)
    first, second = (losses(network(conv2d_ext.Conv2d).to(device), images, labels, 10) for _ in range(2))
    assert first == second
