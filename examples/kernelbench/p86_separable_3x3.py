"""KernelBench level 1, problem 86: a depthwise 3x3, then a pointwise convolution, 64 -> 128 channels."""

import torch
from torch import Tensor, nn

import conv2d_ext

INPUT = (16, 64, 512, 512)  # N, C, H, W


class Model(nn.Module):
    layer: type[nn.Conv2d] = nn.Conv2d

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int, dilation: int
    ) -> None:
        super().__init__()
        self.depthwise = self.layer(
            in_channels, in_channels, kernel_size, stride, padding, dilation, groups=in_channels, bias=False
        )
        self.pointwise = self.layer(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class ModelNew(Model):
    layer = conv2d_ext.Conv2d


def get_inputs() -> list[Tensor]:
    return [torch.rand(INPUT)]


def get_init_inputs() -> list[object]:
    return [64, 128, 3, 1, 1, 1]
