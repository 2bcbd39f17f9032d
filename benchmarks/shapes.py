"""Random convolution problems for fuzz.py and sweep.py, and what both ask of the planner."""

from __future__ import annotations

import argparse
import functools
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import calls  # noqa: E402
from calls import OPS  # noqa: E402, F401  (for fuzz.py and sweep.py)
from cases import Case  # noqa: E402

# tf32 and fp32 are the same tensors, with and without allow_tf32.
STORAGE = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
KINDS = ("network", "dense", "few", "grouped", "depthwise")
SMALL = (1, 1, 2, 2, 4, 8, 16)  # batches of large images


def log_uniform(draw: random.Random, least: float, most: float) -> int:
    return int(least * (most / least) ** draw.random() + 0.5)


def channels(draw: random.Random, least: int, most: int) -> int:
    """Mostly multiples of 8, as in networks, and sometimes any number."""
    count = log_uniform(draw, least, most)
    step = draw.choice((1, 8, 8, 16, 32))
    return max(1, count // step * step if count >= step else count)


def kernel(draw: random.Random, kind: str) -> tuple[int, int]:
    if kind == "depthwise":
        sizes = [(3, 3)] * 4 + [(5, 5), (7, 7)] * 2 + [(9, 9), (13, 13), (21, 21), (31, 31), (1, 11), (11, 1), (3, 1)]
    else:
        sizes = [(3, 3)] * 5 + [(1, 1)] * 4 + [(5, 5), (7, 7), (1, 7), (7, 1), (2, 2), (3, 5), (4, 4)]
    return draw.choice(sizes)


@functools.cache
def networks() -> dict[str, list[dict[str, Any]]]:
    """Dense layers of networks: sizes, square where W or S are not given (twice as wide where W is 0), the stride, a
    padding that keeps the size unless it is given, and batches other than those of `of_network`."""

    def layers(of: Iterable[tuple[int, int]], *kinds: Callable[[int, int], dict[str, Any]]) -> list[dict[str, Any]]:
        return [kind(H, C) for H, C in of for kind in kinds]

    def same(R: int, stride: int = 1, c: float = 1, k: float = 1, **more: Any) -> Callable[[int, int], dict[str, Any]]:
        return lambda H, C: {"H": H, "C": int(C * c), "K": int(C * k), "R": R, "stride": stride, **more}

    def each(H: int, pairs: Iterable[tuple[int, int]], R: int, **more: Any) -> list[dict[str, Any]]:
        return [{"H": H, "C": C, "K": K, "R": R, **more} for C, K in pairs]

    stages = [(56, 64), (28, 128), (14, 256), (7, 512)]
    next_stages = [(56, 64), (28, 128), (14, 256)]
    narrow = [(16, 96), (24, 144), (40, 240), (80, 480), (112, 672), (192, 1152), (48, 288), (160, 960), (232, 1392)]
    return {
        "ResNet": layers(stages, same(3), same(1, c=4), same(1, k=4))
        + layers(next_stages, same(3, 2, k=2), same(1, 2, k=2), same(3, 2, c=2, k=2), same(1, 2, c=4, k=8)),
        "VGG": layers([(224, 64), (112, 128), (56, 256), (28, 512), (14, 512)], same(3), same(3, c=0.5)),
        "U-Net": layers(
            [(572, 64), (284, 128), (140, 256), (68, 512), (256, 64), (128, 128), (64, 256), (32, 512), (16, 1024)],
            same(3), same(3, c=0.5), same(3, c=2), same(3, pad=0), same(2, 2, k=2, pad=0),
        ),
        "diffusion": layers(
            [(64, 320), (32, 640), (16, 1280), (8, 1280), (128, 320), (64, 640), (32, 1280), (64, 128), (32, 256)],
            same(3), same(3, c=2), same(3, c=1.5), same(3, 2), same(1), same(1, c=2), same(1, k=2), same(1, k=4),
        ),
        "autoencoder": layers([(512, 128), (256, 256), (128, 512), (64, 512)], same(3), same(3, c=2), same(3, 2)),
        "EfficientNet": [
            layer
            for H in (112, 56, 28, 14, 7)
            for C, K in narrow
            for layer in each(H, [(C, K), (K, C)], 1)
            if 500 <= H * C <= 3000
        ],
        "YOLO": layers(
            [(320, 32), (160, 64), (80, 128), (40, 256), (20, 512), (160, 48), (80, 96), (40, 192), (13, 512)],
            same(3), same(3, 2, k=2), same(1, k=0.5), same(1, c=2), same(1), same(1, c=1.5),
        ),
        "ConvNeXt": layers([(56, 96), (28, 192), (14, 384), (56, 128), (28, 256), (14, 512), (7, 768)],
                           same(2, 2, k=2, pad=0), same(1, k=4), same(1, c=4)),
        "Inception": each(17, [(128, 128), (160, 192), (192, 192)], 1, S=7)
        + each(17, [(128, 192), (160, 160)], 7, S=1)
        + each(35, [(64, 96), (96, 96)], 3)
        + each(35, [(288, 384)], 3, stride=2, pad=0)
        + each(17, [(768, 192)], 1)
        + each(8, [(1280, 320), (2048, 448)], 1)
        + each(8, [(448, 384)], 3)
        + each(35, [(48, 64)], 5),
        "DenseNet": [
            layer
            for H, most in ((56, 256), (28, 512), (14, 1024), (7, 1024))
            for layer in each(H, [(128, 32), (192, 48)], 3) + each(H, [(C, 128) for C in range(64, most, 96)], 1)
        ],
        "DeepLab": [
            layer
            for d in (2, 4, 6, 12)
            for H in (33, 65)
            for layer in each(H, [(2048, 256), (512, 512)], 3, dilation=d)
        ]
        + each(33, [(2048, 256), (1280, 256)], 1),
        "stems": each(224, [(3, 64)], 7, stride=2)
        + each(224, [(3, 32), (3, 16)], 3, stride=2)
        + each(224, [(3, 64)], 3)
        + each(299, [(3, 32)], 3, stride=2, pad=0)
        + each(224, [(3, 64)], 11, stride=4, pad=2)
        + each(224, [(3, 96), (3, 128)], 4, stride=4, pad=0)
        + each(224, [(3, 768), (3, 384)], 16, stride=16, pad=0)
        + each(224, [(3, 1024)], 14, stride=14, pad=0)
        + each(84, [(4, 32)], 8, stride=4, pad=0)
        + each(64, [(3, 64)], 4, stride=2, pad=1)
        + each(28, [(1, 32), (1, 6)], 5)
        + each(32, [(3, 64), (3, 16)], 3)
        + each(19, [(17, 256)], 3),
        "large stems": each(640, [(3, 16), (3, 48), (3, 80)], 3, stride=2, N=SMALL)
        + each(640, [(3, 32)], 6, stride=2, pad=2, N=SMALL)
        + each(800, [(3, 64)], 7, stride=2, W=1344, N=SMALL)
        + each(572, [(3, 64), (1, 64)], 3, pad=0, N=SMALL)
        + each(512, [(3, 128), (128, 3)], 3, N=SMALL)
        + each(64, [(4, 320), (320, 4), (4, 512), (512, 8)], 3, N=SMALL),
        "heads": each(33, [(256, 19), (256, 21), (512, 150)], 1)
        + each(128, [(256, 19), (256, 21), (256, 150)], 1, N=SMALL)
        + each(388, [(64, 1), (64, 2)], 1, N=SMALL)
        + [
            layer
            for H, C in ((80, 256), (40, 512), (20, 1024))
            for layer in each(H, [(C, 255)], 1) + each(H, [(C, 64), (C, 80), (64, 64), (80, 80)], 3)
            + each(H, [(64, 64), (80, 80)], 1)
        ]
        + each(50, [(256, 256), (256, 720), (256, 36)], 3, W=84, N=SMALL)
        + each(100, [(256, 256), (256, 720), (256, 36)], 3, W=168, N=SMALL)
        + each(50, [(256, 3), (256, 12), (1024, 256)], 1, W=84, N=SMALL)
        + each(14, [(256, 256)], 3),
        "detection": layers([(320, 48), (160, 96), (80, 144), (80, 192), (80, 288), (40, 576), (40, 80), (20, 640)],
                            same(3), same(3, 2), same(1), same(3, c=0.5, k=0.5), same(1, c=1.5)),
        "super-resolution": each(256, [(64, 64), (64, 256), (64, 3)], 3, N=SMALL)
        + each(128, [(64, 64), (64, 32), (96, 32), (192, 64)], 3, N=SMALL)
        + each(256, [(3, 64), (1, 64), (64, 3)], 9, N=SMALL)
        + each(256, [(32, 1), (64, 32)], 5, N=SMALL)
        + each(256, [(64, 32)], 1, N=SMALL),
        "high resolution": layers([(256, 18), (128, 36), (64, 72), (32, 144), (256, 32), (256, 48), (128, 96),
                                   (64, 192), (32, 384), (128, 64)], same(3, W=0), same(1, W=0)),
        "MobileNet": layers([(112, 32), (56, 64), (28, 128), (14, 256)], same(1, k=2))
        + layers([(56, 128), (28, 256), (14, 512), (7, 1024)], same(1))
        + each(112, [(16, 64), (32, 16), (96, 24)], 1)
        + each(56, [(24, 72), (72, 24), (24, 144), (144, 32)], 1)
        + each(28, [(40, 120), (120, 40), (32, 192), (192, 32), (58, 58), (116, 116)], 1)
        + each(14, [(80, 200), (184, 80), (480, 112), (112, 672), (96, 576), (576, 96), (232, 232)], 1)
        + each(7, [(160, 960), (960, 160), (320, 1280), (464, 464)], 1),
        "small images": each(8, [(256, 256), (192, 192)], 3)
        + each(19, [(256, 256), (128, 128)], 3)
        + layers([(32, 16), (16, 32), (8, 64), (32, 160), (16, 320), (8, 640)], same(3), same(3, 2, k=2))
        + each(24, [(32, 64)], 3, pad=0)
        + each(20, [(32, 64)], 4, stride=2, pad=0)
        + each(9, [(64, 64)], 3, pad=0)
        + each(14, [(6, 16)], 5, pad=0)
        + layers([(32, 64), (16, 128), (8, 256)], same(4, 2, k=2, pad=1))
        + each(28, [(64, 192)], 5)
        + each(13, [(192, 384), (384, 256), (256, 256)], 3)
        + each(13, [(64, 256), (32, 128)], 1)
        + each(14, [(16, 48), (24, 64), (32, 128)], 5)
        + each(8, [(384, 384)], 1, S=3)
        + each(8, [(384, 384)], 3, S=1)
        + each(1, [(240, 10), (480, 20), (672, 28), (28, 672), (1152, 48), (48, 1152), (512, 32), (1280, 1000)], 1),
        "sounds": each(1, [(80, 384), (384, 384)], 1, S=3, W=3000)
        + each(1, [(512, 512), (256, 256)], 1, S=3, W=1024)
        + each(1, [(128, 128)], 1, S=11, W=4096)
        + each(1, [(512, 512)], 1, S=3, W=4096, stride=2)
        + each(80, [(1, 32), (32, 32)], 3, stride=2, W=1000, N=SMALL),
    }  # fmt: skip


def of_network(draw: random.Random) -> tuple[Any, ...]:
    """N, C, H, W, K, R, S, stride, padding and dilation of a layer; one of eight has sizes a little off."""
    of = draw.choice(draw.choice(list(networks().values())))
    batches = (1, 1, 2, 4, 8, 8, 16, 16, 32, 32, 64, 64, 128, 256, log_uniform(draw, 1, 256))
    N = draw.choice(of.get("N", batches))
    C, H, K, R, stride, dilation = of["C"], of["H"], of["K"], of["R"], of.get("stride", 1), of.get("dilation", 1)
    W, S = of.get("W", H) or 2 * H, of.get("S", R)
    if draw.random() < 0.125:
        H, W = H + draw.randint(-2, 3), W + draw.randint(-2, 3)
        C, K = C + draw.choice((-8, 0, 0, 8)), K + draw.choice((-8, 0, 0, 8))
    pad = [of.get("pad", (taps - 1) * dilation // 2) for taps in (R, S)]
    return N, C, H, W, K, R, S, (stride, stride), tuple(pad), (dilation, dilation)


def layer(draw: random.Random, kind: str, most_elements: float = 2**25, most_flops: float = 4e10) -> Case:
    """A problem of the size that networks have: kinds are network (dense layers of known ones), dense (any sizes, one
    group), few (of up to 24 channels or filters), grouped and depthwise."""
    while True:
        if kind == "network":
            N, C, H, W, K, R, S, *attributes = of_network(draw)
            case = Case("layer", N, C, H, W, K, R, S, *attributes, bias=False)
            exists = min(case.P, case.Q, C, K) >= 1
            if exists and max(elements(case)) <= most_elements and 2e6 <= flops(case) <= most_flops:
                return case
            continue
        R, S = kernel(draw, kind)
        N = log_uniform(draw, 1, 256)
        H = log_uniform(draw, 4, 256)
        W = draw.choice((H, H, H, log_uniform(draw, 4, 256)))
        if kind == "dense":
            groups, C, K = 1, channels(draw, 3, 2048), channels(draw, 8, 2048)
        elif kind == "few":
            groups, few, many = 1, draw.choice((1, 2, 3, 3, 3, 4, 6, 8, 12, 16, 21, 24)), channels(draw, 16, 512)
            C, K = draw.choice(((few, many), (many, few)))
            H, W = 2 * H, 2 * W
        elif kind == "grouped":
            per_c = draw.choice((2, 4, 8, 16, 24, 32, 40, 56, 64, 112, log_uniform(draw, 2, 128)))
            per_k = draw.choice((per_c, per_c, per_c, 2 * per_c, max(1, per_c // 2)))
            groups = log_uniform(draw, 2, max(2, 1024 // per_c))
            C, K = groups * per_c, groups * per_k
        else:
            C = groups = channels(draw, 8, 2048)
            K = C * draw.choice((1, 1, 1, 1, 1, 2, 4))
        stride = draw.choice(((1, 1), (1, 1), (1, 1), (2, 2), (2, 2), (R, S), (2, 1)))
        dilation = draw.choice(((1, 1),) * 8 + ((2, 2), (1, 3)))
        same = ((R - 1) * dilation[0] // 2, (S - 1) * dilation[1] // 2)
        padding = draw.choice((same, same, same, (0, 0), (1, 1), (0, 1, 0, 1)))
        case = Case("layer", N, C, H, W, K, R, S, stride, padding, dilation, groups, bias=False)
        if min(case.P, case.Q) < 1 or max(elements(case)) > most_elements or flops(case) > most_flops:
            continue
        if sum(elements(case)) >= 2**14:  # below, any row takes the time of its launch
            return case


def small(draw: random.Random) -> Case:
    """A problem of any kind and any shape, small enough that a GPU checks hundreds a second."""
    while True:
        kind = draw.choice(("dense", "dense", "grouped", "depthwise", "depthwise"))
        R, S = (draw.choice((1, 1, 2, 3, 3, 3, 4, 5, 7)) for _ in range(2))
        if draw.random() < 0.5:
            S = R
        stride = draw.choice(((1, 1), (1, 1), (2, 2), (2, 2), (1, 2), (3, 1), (4, 3), (R, S)))
        dilation = draw.choice(((1, 1), (1, 1), (1, 1), (2, 2), (1, 3), (4, 2)))
        multiplier = draw.choice((1, 1, 2, 3))
        if kind == "depthwise" and draw.random() < 0.3:
            R, S = draw.choice(
                (*((9, 9), (11, 11), (13, 13), (15, 15)) * 2, (14, 15), (31, 31), (1, 21), (15, 1), (3, 9))
            )
            if draw.random() < 0.8:
                stride, dilation, multiplier = draw.choice(((1, 1), (1, 1), (1, 1), (2, 2))), (1, 1), 1
        elif kind == "depthwise" and draw.random() < 0.7:  # the sizes that have rows of their own
            R = S = draw.choice((3, 5, 7))
            stride, dilation, multiplier = draw.choice(((1, 1), (2, 2))), (1, 1), 1
        padding = tuple(draw.randint(0, 4) for _ in range(draw.choice((2, 2, 4))))
        if draw.random() < 0.4:
            padding = ((R - 1) * dilation[0] // 2, (S - 1) * dilation[1] // 2)
        if kind == "dense":
            groups, per_c, per_k = 1, some_channels(draw), some_channels(draw)
        elif kind == "grouped":
            groups = draw.choice((2, 2, 3, 4, 8))
            per_c, per_k = some_channels(draw, 40), some_channels(draw, 40)
            if draw.random() < 0.4:  # those of ResNeXt's and RegNet's blocks have rows of their own
                R = S = 3
                stride, dilation, padding = draw.choice(((1, 1), (2, 2))), (1, 1), (1, 1)
                if draw.random() < 0.6:
                    per_c = per_k = draw.choice((16, 32))
        else:
            groups, per_c, per_k = some_channels(draw, 100), 1, multiplier
        N = draw.choice((1, 1, 2, 2, 3, 5, 9))
        least = [max(0, (t - 1) * d + 1 - sum(p)) for t, d, p in zip((R, S), dilation, sides(padding), strict=True)]
        H, W = (a + log_uniform(draw, 1, draw.choice((12, 40, 120))) for a in least)
        if kind == "dense" and draw.random() < 0.3:  # 1x1 over whole vectors of pixels has rows of its own in NCHW
            R = S = 1
            stride = (1, 1)
            if draw.random() < 0.8:  # with padding those rows must not take them
                padding = (0, 0)
            per_c, per_k = 16 * draw.randint(1, 8), 16 * draw.randint(1, 8)
            H, W = H + H % 2, W + -W % 4
            if per_c % 48 == 0:  # and over 14x14
                H = W = 14
            elif per_c == 112:  # in channels_last so have channels that are no vectors, and pixels in eights
                per_c, per_k, H = per_c + draw.choice((1, 2, 4)), per_k + draw.choice((0, 2)), H + -H % 8
        elif kind == "dense" and draw.random() < 0.15:  # filters three wide, or columns, over whole vectors have too
            R, S = draw.choice(((R, 3), (R, 3), (3, 1)))
            stride, dilation, padding = (1, 1), (1, 1), (R // 2, S // 2)
            W += -W % 8
        if kind == "grouped" and draw.random() < 0.15:  # and 1x1 over NCHW
            R = S = 1
            stride, padding = (1, 1), (0, 0)
        if kind == "depthwise" and R == S == 9 and stride == dilation == (1, 1):  # wide rows have rows of their own
            padding, W = (4, 4), W + -W % 4
        if kind == "grouped" and padding == (1, 1) and draw.random() < 0.5:  # rows in place in NCHW
            per_c = per_k = draw.choice((2, 4, 8, 16))
            groups, W = 8 * draw.randint(1, 2), W + W % 2
        C, K = groups * per_c, groups * per_k
        case = Case("small", N, C, H, W, K, R, S, stride, padding, dilation, groups, bias=draw.random() < 0.5)
        if max(elements(case)) <= 2**17 and flops(case) <= 2e8 and case.N * case.P * case.Q * R * S * C <= 2**23:
            return case


def some_channels(draw: random.Random, most: int = 272) -> int:
    return draw.choice(
        (1, 2, 3, 4, 8, 8, 16, 16, 24, 32, 48, 64, log_uniform(draw, 1, most), log_uniform(draw, 8, most))
    )


def sides(padding: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((top, bottom), (left, right))"""
    if len(padding) == 2:
        return (padding[0], padding[0]), (padding[1], padding[1])
    return (padding[0], padding[1]), (padding[2], padding[3])


def elements(case: Case) -> tuple[int, int, int]:
    """Of input, weight and output."""
    return (
        case.N * case.C * case.H * case.W,
        case.K * (case.C // case.groups) * case.R * case.S,
        case.N * case.K * case.P * case.Q,
    )


def flops(case: Case) -> int:
    return 2 * elements(case)[2] * case.reduction("fprop")


def text(case: Case) -> str:
    """One line that names everything of a shape."""
    extra = f" s{case.stride[0]},{case.stride[1]} p{','.join(map(str, case.padding))}"
    extra += f" d{case.dilation[0]},{case.dilation[1]}" if case.dilation != (1, 1) else ""
    extra += f" g{case.groups}" if case.groups > 1 else ""
    return f"{case.N}x{case.C}x{case.H}x{case.W} {case.K}x{case.R}x{case.S}{extra}"


def call(
    op: str, case: Case, x: Tensor, w: Tensor, b: Tensor | None, go: Tensor, allow_tf32: bool
) -> Callable[[int], Tensor]:
    """The op on these tensors, as a function of the row; the result of wgrad has weight's strides if they are dense."""
    stride = {"stride": torch.empty_like(w).stride()} if op == "wgrad" else {}
    run = calls.call(op, case, x, w, b, go)
    return lambda row: run(allow_tf32=allow_tf32, row=row, **stride)


def plan(op: str, case: Case, x: Tensor, w: Tensor, y: Tensor, allow_tf32: bool) -> tuple[int, dict[int, float]]:
    """The row that make_plan takes, and the estimated microseconds of every row that supports the problem.

    One of the tensors is the op's result, as it allocates it.
    """
    if x.is_cuda:
        properties = torch.cuda.get_device_properties(x.device)
        sms, capability = properties.multi_processor_count, 10 * properties.major + properties.minor
    else:
        sms, capability = 132, 90
    align = [16 if t.device.type == "meta" else calls.alignment(t)[0] for t in (x, w, y)]
    chosen, _, _, *times = calls.plan(
        op, case, x, w, y, align=align, allow_tf32=allow_tf32, sm_count=sms, capability=capability
    )
    return chosen, {row: ns / 1e3 for row, ns in enumerate(times) if ns >= 0}


def some(known: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: words of `known`, between commas."""

    def words(given: str) -> list[str]:
        chosen = given.split(",")
        if unknown := sorted(set(chosen) - set(known)):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {', '.join(unknown)}")
        return chosen

    return words
