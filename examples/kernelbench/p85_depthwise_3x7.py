"""KernelBench level 1, problem 85: 3x7 depthwise, 128 channels, every argument given by its two sides."""

import torch
from torch import Tensor, nn

import conv2d_ext

INPUT = (32, 128, 128, 256)  # N, C, H, W


class Model(nn.Module):
    layer: type[nn.Conv2d] = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_height: int,
        kernel_width: int,
        stride_h: int,
        stride_w: int,
        padding_h: int,
        padding_w: int,
        dilation_h: int,
        dilation_w: int,
        groups: int,
    ) -> None:
        super().__init__()
        self.conv = self.layer(
            in_channels,
            out_channels,
            (kernel_height, kernel_width),
            (stride_h, stride_w),
            (padding_h, padding_w),
            (dilation_h, dilation_w),
            groups,
            bias=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ModelNew(Model):
    layer = conv2d_ext.Conv2d


def get_inputs() -> list[Tensor]:
    return [torch.rand(INPUT)]


def get_init_inputs() -> list[object]:
    return [128, 128, 3, 7, 1, 1, 0, 0, 1, 1, 128]
