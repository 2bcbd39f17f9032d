"""Writes conv2d_ext/data/networks.json: the distinct convolutions of published networks, each with how many have it.

    pip install torchvision timm
    python benchmarks/collect.py

The networks are torchvision's, timm's and two of models.py, built on the meta device with the size of image that each
was published with; no weights are fetched. `python -m conv2d_ext bench --list networks` draws from the file. Left out
are transposed convolutions, and 1x1 filters on images of one pixel, which are products of matrices.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "conv2d_ext" / "data" / "networks.json"
COLUMNS = "C H W K R S stride_h stride_w pad_h pad_w dilation_h dilation_w groups networks".split()

# torchvision's, by the size of the image.
CLASSIFIERS = {
    224: "resnet18 resnet34 resnet50 resnet101 resnext50_32x4d wide_resnet50_2 vgg11 vgg16 alexnet densenet121 "
    "densenet161 densenet201 squeezenet1_0 squeezenet1_1 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small "
    "efficientnet_b0 efficientnet_v2_s convnext_tiny shufflenet_v2_x1_0 mnasnet1_0 googlenet vit_b_16 vit_b_32 "
    "vit_l_16 swin_t",
    299: "inception_v3",
    380: "efficientnet_b4",
}
SEGMENTATION = {520: "deeplabv3_resnet50 deeplabv3_mobilenet_v3_large fcn_resnet50"}
DETECTION = ("maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn")  # their pyramids and heads, of 800x1216

TIMM = """
bat_resnext26ts beit_base_patch16_224 botnet26t_256 coatnet_0_rw_224 convit_small convmixer_768_32 convnextv2_base
crossvit_18_240 cs3darknet_m cspdarknet53 cspresnet50 darknet53 davit_tiny deit3_base_patch16_224 dla34 dla60
dm_nfnet_f0 dpn92 eca_nfnet_l0 ecaresnet50t edgenext_small efficientformerv2_s1 efficientnet_b7 efficientnet_lite0
efficientvit_b1 ese_vovnet39b fastvit_t8 fbnetc_100 fbnetv3_b focalnet_tiny_srf gcvit_tiny gernet_m ghostnet_100
halonet26t hardcorenas_a hgnet_small hgnetv2_b4 hrnet_w18 hrnet_w32 inception_next_tiny inception_resnet_v2
inception_v4 lambda_resnet26t lcnet_100 legacy_xception levit_256 maxvit_tiny_tf_224 mixnet_s mobilenetv4_conv_medium
mobilenetv4_hybrid_medium mobileone_s1 mobilevit_s nextvit_small nf_regnet_b1 nfnet_f0 poolformer_s12 pvt_v2_b1
regnetx_032 regnety_080 regnetz_c16 repghostnet_100 repvgg_a2 repvgg_b0 repvit_m1 res2net50_26w_4s res2next50
resmlp_24_224 resnest50d resnet26t resnet50d resnetrs50 resnetv2_50 rexnet_100 selecsls60 semnasnet_100 seresnet50
skresnet50 spnasnet_100 starnet_s2 swinv2_tiny_window8_256 tf_efficientnetv2_s tiny_vit_11m_224 tinynet_a
twins_svt_small vgg19 visformer_small vovnet39a wide_resnet101_2 xception41
""".split()


class Note(TorchDispatchMode):
    """The convolutions that run under it: C, H, W, K, R, S, stride, padding, dilation, groups."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and args[0].dim() == 4 and not args[6]:
            x, w, _, stride, padding, dilation, _, _, groups = args
            sizes = (*x.shape[1:], w.shape[0], *w.shape[2:])
            if sizes[1:3] != (1, 1) or sizes[4:6] != (1, 1):
                self.found.add((*sizes, *stride, *padding, *dilation, groups))
        return func(*args, **(kwargs or {}))


class Detector(nn.Module):
    """What a detector computes for every image: the parts behind the proposals get 100 boxes."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: torch.Tensor) -> None:
        levels = list(self.whole.backbone(x).values())
        if hasattr(self.whole, "rpn"):
            self.whole.rpn.head(levels)
            self.whole.roi_heads.mask_head(torch.empty(100, levels[0].shape[1], 14, 14, device=x.device))
        else:
            self.whole.head(levels)


def networks() -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    """Name, how to build it, and C, H, W of its input."""
    import models
    import timm
    import torchvision

    for size, names in CLASSIFIERS.items():
        for name in names.split():
            more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            build = getattr(torchvision.models, name)
            yield name, lambda build=build, more=more: build(**more), (3, size, size)
    for size, names in SEGMENTATION.items():
        for name in names.split():
            build = getattr(torchvision.models.segmentation, name)
            yield name, lambda build=build: build(weights_backbone=None), (3, size, size)
    for name in DETECTION:
        build = getattr(torchvision.models.detection, name)
        yield name, lambda build=build: Detector(build(weights_backbone=None)), (3, 800, 1216)
    for name in TIMM:
        size = timm.get_pretrained_cfg(name).input_size
        yield f"timm.{name}", lambda name=name: timm.create_model(name), size
    yield "Stable Diffusion's U-Net", models.UNet, (4, 64, 64)
    yield "the same, of 128x128", models.UNet, (4, 128, 128)
    yield "YOLOv8-s", models.Yolo, (3, 640, 640)


def convolutions(build: Callable[[], nn.Module], size: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The distinct ones of a call with one image."""
    with torch.device("meta"), torch.no_grad():
        network, x = build().eval(), torch.empty(1, *size)
        with Note() as note:
            network(x)
    return note.found


def text(names: list[str], counts: Counter[tuple[int, ...]], versions: str) -> str:
    """The file: a row a layer, so that a difference is readable."""
    note = (
        f"Distinct convolutions of {len(names)} networks at one image, by benchmarks/collect.py with {versions}; "
        "the last column is how many of the networks have the layer."
    )
    head = {"note": note, "networks": names, "columns": COLUMNS}
    rows = ",\n".join(json.dumps([*row, count], separators=(",", ":")) for row, count in sorted(counts.items()))
    return json.dumps(head)[:-1] + ',\n"layers": [\n' + rows + "\n]}\n"


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        import timm
        import torchvision
    except ImportError as error:
        print(f"collect: {error}; it needs torchvision and timm", file=sys.stderr)
        return 2
    names: list[str] = []
    counts: Counter[tuple[int, ...]] = Counter()
    for name, build, size in networks():
        found = convolutions(build, size)
        print(f"{name}: {len(found)}", flush=True)
        names.append(name)
        counts.update(found)
    of = {"torch": torch, "torchvision": torchvision, "timm": timm}
    versions = ", ".join(f"{name} {module.__version__.partition('+')[0]}" for name, module in of.items())
    FILE.write_text(text(names, counts, versions), encoding="utf-8")
    print(f"{len(counts)} layers of {len(names)} networks: {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
