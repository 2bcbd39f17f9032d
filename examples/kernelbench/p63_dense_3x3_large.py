"""KernelBench level 1, problem 63: 3x3, 16 -> 128 channels, an output of 8.6 GB."""

import torch
from torch import Tensor, nn

import conv2d_ext

INPUT = (16, 16, 1024, 1024)  # N, C, H, W


class Model(nn.Module):
    layer: type[nn.Conv2d] = nn.Conv2d

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = self.layer(in_channels, out_channels, kernel_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ModelNew(Model):
    layer = conv2d_ext.Conv2d


def get_inputs() -> list[Tensor]:
    return [torch.rand(INPUT)]


def get_init_inputs() -> list[object]:
    return [16, 128, 3]
