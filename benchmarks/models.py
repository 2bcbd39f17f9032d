"""Networks for networks.py, of plain torch.nn, as published except where a docstring says what is left out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Conv2d, Identity, MaxPool2d, ReLU, ReLU6, Sequential, SiLU


class Residual(nn.Module):
    def __init__(self, body: nn.Module, skip: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.skip, self.act = body, skip or Identity(), act or Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.skip(x))


class Excite(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, c: int, mid: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.scale = Sequential(nn.AdaptiveAvgPool2d(1), Conv2d(c, mid, 1), act(), Conv2d(mid, c, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(x)


class Concat(nn.Module):
    """The input and what each part makes of the one before, side by side."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for part in self.parts:
            found.append(part(found[-1]))
        return torch.cat(found, 1)


class Permuted(nn.Module):
    """A module that wants channels last, applied to N C H W."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv(c: int, k: int, r: int = 1, s: int = 1, g: int = 1, act: type[nn.Module] | None = ReLU) -> Sequential:
    """Convolution, batch norm, activation."""
    body = [Conv2d(c, k, r, s, r // 2, groups=g, bias=False), nn.BatchNorm2d(k)]
    return Sequential(*body, *([act(inplace=True)] if act else []))


def classifier(c: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 1000)]


def resnet(widths: Sequence[int], groups: Sequence[int], depths: Sequence[int], out: int, stem: list[nn.Module],
           strides: Sequence[int] = (1, 2, 2, 2), excite: bool = False) -> Sequential:  # fmt: skip
    """Bottlenecks: 1x1 to a stage's width, 3x3 with groups, 1x1 to `out` times it."""
    c: int = stem[0][0].out_channels
    layers = list(stem)
    for width, g, depth, stride in zip(widths, groups, depths, strides, strict=True):
        for i in range(depth):
            s, k = (1 if i else stride), out * width
            se = [Excite(width, c // 4, ReLU)] if excite else []
            body = Sequential(conv(c, width), conv(width, width, 3, s, g), *se, conv(width, k, act=None))
            layers.append(Residual(body, None if i else conv(c, k, 1, s, act=None), ReLU(inplace=True)))
            c = k
    return Sequential(*layers, *classifier(c))


def resnet50(width: int = 64, groups: int = 1, out: int = 4) -> Sequential:
    widths = [width << i for i in range(4)]
    return resnet(widths, [groups] * 4, (3, 4, 6, 3), out, [conv(3, 64, 7, 2), MaxPool2d(3, 2, 1)])


def regnety() -> Sequential:
    """RegNetY-800MF: groups of 16 channels."""
    widths = (64, 144, 320, 784)
    return resnet(widths, [w // 16 for w in widths], (1, 3, 8, 2), 1, [conv(3, 32, 3, 2)], (2, 2, 2, 2), excite=True)


def inverted(rows: Sequence[tuple[int, int, int, int, int]], act: type[nn.Module], excite: bool) -> Sequential:
    """Inverted bottlenecks around a depthwise layer. A row: expansion, K, taps of a side, how many, stride."""
    layers, c = [conv(3, 32, 3, 2, act=act)], 32
    for t, k, r, n, stride in rows:
        for i in range(n):
            s, mid = (1 if i else stride), t * c
            body: list[nn.Module] = [conv(c, mid, act=act)] if t > 1 else []
            body.append(conv(mid, mid, r, s, mid, act))
            body += [Excite(mid, c // 4, act)] if excite else []
            block = Sequential(*body, conv(mid, k, act=None))
            layers.append(Residual(block) if i else block)
            c = k
    return Sequential(*layers, conv(c, 1280, act=act), *classifier(1280))


def mobilenetv2() -> Sequential:
    rows = ((1, 16, 3, 1, 1), (6, 24, 3, 2, 2), (6, 32, 3, 3, 2), (6, 64, 3, 4, 2), (6, 96, 3, 3, 1))
    return inverted((*rows, (6, 160, 3, 3, 2), (6, 320, 3, 1, 1)), ReLU6, excite=False)


def efficientnet() -> Sequential:
    rows = ((1, 16, 3, 1, 1), (6, 24, 3, 2, 2), (6, 40, 5, 2, 2), (6, 80, 3, 3, 2), (6, 112, 5, 3, 1))
    return inverted((*rows, (6, 192, 5, 4, 2), (6, 320, 3, 1, 1)), SiLU, excite=True)


def convnext() -> Sequential:
    """ConvNeXt-Tiny, without the layers' scale."""
    layers: list[nn.Module] = [Conv2d(3, 96, 4, 4), Permuted(nn.LayerNorm(96))]
    for c, depth in ((96, 3), (192, 3), (384, 9), (768, 3)):
        if c > 96:
            layers += [Permuted(nn.LayerNorm(c // 2)), Conv2d(c // 2, c, 2, 2)]
        for _ in range(depth):
            mlp = Permuted(nn.LayerNorm(c), nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
            layers.append(Residual(Sequential(Conv2d(c, c, 7, 1, 3, groups=c), mlp)))
    return Sequential(*layers, *classifier(768))


def densenet121() -> Sequential:
    layers, c = [conv(3, 64, 7, 2), MaxPool2d(3, 2, 1)], 64
    for stage, depth in enumerate((6, 12, 24, 16)):
        if stage:
            c //= 2
            layers += [nn.BatchNorm2d(2 * c), ReLU(inplace=True), Conv2d(2 * c, c, 1, bias=False), nn.AvgPool2d(2)]
        for _ in range(depth):
            layers.append(Concat(Sequential(nn.BatchNorm2d(c), ReLU(inplace=True), conv(c, 128),
                                            Conv2d(128, 32, 3, 1, 1, bias=False))))  # fmt: skip
            c += 32
    return Sequential(*layers, nn.BatchNorm2d(c), ReLU(inplace=True), *classifier(c))


def vgg16() -> Sequential:
    layers: list[nn.Module] = []
    c = 3
    for k, n in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(n):
            layers += [Conv2d(c, k, 3, 1, 1), ReLU(inplace=True)]
            c = k
        layers.append(MaxPool2d(2))
    head = [nn.Linear(512 * 49, 4096), ReLU(), nn.Linear(4096, 4096), ReLU(), nn.Linear(4096, 1000)]
    return Sequential(*layers, nn.Flatten(), *head)


class UNet(nn.Module):
    """Stable Diffusion's U-Net without its attention and its time embedding: 3x3 layers of 320 to 1280 channels."""

    def __init__(self) -> None:
        super().__init__()

        def block(c: int, k: int) -> nn.Module:
            half = [[nn.GroupNorm(32, i), SiLU(), Conv2d(i, k, 3, 1, 1)] for i in (c, k)]
            return Residual(Sequential(*half[0], *half[1]), Conv2d(c, k, 1) if c != k else None)

        self.down, self.up = nn.ModuleList([Conv2d(4, 320, 3, 1, 1)]), nn.ModuleList()
        skips, c = [320], 320
        for level, k in enumerate((320, 640, 1280, 1280)):
            for _ in range(2):
                self.down.append(block(c, k))
                skips.append(c := k)
            if level < 3:
                self.down.append(Conv2d(c, c, 3, 2, 1))
                skips.append(c)
        self.middle = Sequential(block(c, c), block(c, c))
        for level, k in enumerate((1280, 1280, 640, 320)):
            for i in range(3):
                larger = [nn.Upsample(scale_factor=2), Conv2d(k, k, 3, 1, 1)] if i == 2 and level < 3 else []
                self.up.append(Sequential(block(c + skips.pop(), k), *larger))
                c = k
        self.out = Sequential(nn.GroupNorm(32, c), SiLU(), Conv2d(c, 4, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for part in self.down:
            kept.append(x := part(x))
        x = self.middle(x)
        for part in self.up:
            x = part(torch.cat([x, kept.pop()], 1))
        return self.out(x)


class Yolo(nn.Module):
    """YOLOv8-s: CSP blocks, a pyramid up and down again, two towers a level."""

    def __init__(self) -> None:
        super().__init__()

        class Csp(nn.Module):
            def __init__(self, c: int, k: int, n: int, add: bool) -> None:
                super().__init__()
                pairs = [Sequential(*(conv(k // 2, k // 2, 3, act=SiLU) for _ in range(2))) for _ in range(n)]
                self.first, self.rest = conv(c, k, act=SiLU), Concat(*(Residual(p) if add else p for p in pairs))
                self.last = conv((2 + n) * k // 2, k, act=SiLU)

            def forward(self, x: Tensor) -> Tensor:
                a, b = self.first(x).chunk(2, 1)
                return self.last(torch.cat([a, self.rest(b)], 1))

        def down(c: int, k: int) -> Sequential:
            return conv(c, k, 3, 2, act=SiLU)

        self.p3 = Sequential(down(3, 32), down(32, 64), Csp(64, 64, 1, True), down(64, 128), Csp(128, 128, 2, True))
        self.p4 = Sequential(down(128, 256), Csp(256, 256, 2, True))
        pools = Concat(*(MaxPool2d(5, 1, 2) for _ in range(3)))
        spp = Sequential(conv(512, 256, act=SiLU), pools, conv(1024, 512, act=SiLU))
        self.p5 = Sequential(down(256, 512), Csp(512, 512, 1, True), spp)
        self.larger = nn.Upsample(scale_factor=2)
        self.up4, self.up3 = Csp(768, 256, 1, False), Csp(384, 128, 1, False)
        self.to4, self.down4 = down(128, 128), Csp(384, 256, 1, False)
        self.to5, self.down5 = down(256, 256), Csp(768, 512, 1, False)
        self.heads = nn.ModuleList(
            Sequential(conv(c, k, 3, act=SiLU), conv(k, k, 3, act=SiLU), Conv2d(k, out, 1))
            for c in (128, 256, 512)
            for k, out in ((64, 64), (128, 80))
        )

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.p3(x)
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.up4(torch.cat([self.larger(p5), p4], 1))
        n3 = self.up3(torch.cat([self.larger(n4), p3], 1))
        n4 = self.down4(torch.cat([self.to4(n3), n4], 1))
        n5 = self.down5(torch.cat([self.to5(n4), p5], 1))
        levels = (n3, n3, n4, n4, n5, n5)
        return torch.cat([head(t).flatten(1) for head, t in zip(self.heads, levels, strict=True)], 1)


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


def vit() -> Sequential:
    """ViT-B/16, the mean of the tokens for a class token."""
    layer = nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 12, nn.LayerNorm(768), enable_nested_tensor=False)
    return Sequential(Conv2d(3, 768, 16, 16), Tokens(), encoder, nn.AdaptiveAvgPool2d((1, 768)), nn.Flatten(),
                      nn.Linear(768, 1000))  # fmt: skip


# name: constructor, an image's size, how many of a batch make one of it
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int]] = {
    "resnet50": (resnet50, (3, 224, 224), 1),
    "resnext50": (functools.partial(resnet50, 128, 32, 2), (3, 224, 224), 1),
    "regnety": (regnety, (3, 224, 224), 1),
    "mobilenetv2": (mobilenetv2, (3, 224, 224), 1),
    "efficientnet": (efficientnet, (3, 224, 224), 1),
    "convnext": (convnext, (3, 224, 224), 1),
    "densenet121": (densenet121, (3, 224, 224), 1),
    "vgg16": (vgg16, (3, 224, 224), 1),
    "unet": (UNet, (4, 64, 64), 8),
    "yolo": (Yolo, (3, 640, 640), 4),
    "vit": (vit, (3, 224, 224), 1),
}
