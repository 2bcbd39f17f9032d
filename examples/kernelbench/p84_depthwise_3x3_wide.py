"""KernelBench level 1, problem 84: 3x3 depthwise, 128 channels, images twice as wide as high."""

import torch
from torch import Tensor, nn

import conv2d_ext

INPUT = (64, 128, 256, 512)  # N, C, H, W


class Model(nn.Module):
    layer: type[nn.Conv2d] = nn.Conv2d

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = self.layer(in_channels, out_channels, kernel_size, stride, padding, groups=in_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ModelNew(Model):
    layer = conv2d_ext.Conv2d


def get_inputs() -> list[Tensor]:
    return [torch.rand(INPUT)]


def get_init_inputs() -> list[object]:
    return [128, 128, 3, 1, 0]
