"""KernelBench level 1, problem 83: 3x1 depthwise, 8 channels."""

import torch
from torch import Tensor, nn

import conv2d_ext

INPUT = (64, 8, 512, 512)  # N, C, H, W


class Model(nn.Module):
    layer: type[nn.Conv2d] = nn.Conv2d

    def __init__(self, in_channels: int, kernel_size: int, stride: int, padding: int, dilation: int) -> None:
        super().__init__()
        self.conv = self.layer(
            in_channels,
            in_channels,
            (kernel_size, 1),
            stride,
            (padding, 0),
            (dilation, 1),
            groups=in_channels,
            bias=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ModelNew(Model):
    layer = conv2d_ext.Conv2d


def get_inputs() -> list[Tensor]:
    return [torch.rand(INPUT)]


def get_init_inputs() -> list[object]:
    return [8, 3, 1, 0, 1]
