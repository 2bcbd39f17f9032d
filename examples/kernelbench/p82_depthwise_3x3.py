"""KernelBench level 1, problem 82: 3x3 depthwise, 64 channels."""

import torch
from torch import Tensor, nn

import conv2d_ext

INPUT = (16, 64, 512, 512)  # N, C, H, W


class Model(nn.Module):
    layer: type[nn.Conv2d] = nn.Conv2d

    def __init__(self, in_channels: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = self.layer(in_channels, in_channels, kernel_size, stride, padding, groups=in_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ModelNew(Model):
    layer = conv2d_ext.Conv2d


def get_inputs() -> list[Tensor]:
    return [torch.rand(INPUT)]


def get_init_inputs() -> list[object]:
    return [64, 3, 1, 0]
