"""KernelBench level 1, problem 56: 5x7, 64 -> 128 channels, images twice as high as wide."""

import torch
from torch import Tensor, nn

import conv2d_ext

INPUT = (8, 64, 512, 256)  # N, C, H, W


class Model(nn.Module):
    layer: type[nn.Conv2d] = nn.Conv2d

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int]) -> None:
        super().__init__()
        self.conv = self.layer(in_channels, out_channels, kernel_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ModelNew(Model):
    layer = conv2d_ext.Conv2d


def get_inputs() -> list[Tensor]:
    return [torch.rand(INPUT)]


def get_init_inputs() -> list[object]:
    return [64, 128, (5, 7)]
