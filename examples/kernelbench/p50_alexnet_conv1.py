"""KernelBench level 1, problem 50: the first layer of AlexNet, 11x11 with stride 4, 3 -> 96 channels, with bias."""

import torch
from torch import Tensor, nn

import conv2d_ext

INPUT = (256, 3, 224, 224)  # N, C, H, W


class Model(nn.Module):
    layer: type[nn.Conv2d] = nn.Conv2d

    def __init__(self, num_classes: int) -> None:  # the argument belongs to the rest of the network
        super().__init__()
        self.conv = self.layer(3, 96, kernel_size=11, stride=4, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ModelNew(Model):
    layer = conv2d_ext.Conv2d


def get_inputs() -> list[Tensor]:
    return [torch.rand(INPUT)]


def get_init_inputs() -> list[object]:
    return [1000]
