"""Prints the kernel that would run for a shape, and why. Needs no GPU: without one it plans for an H200.

python -m conv2d_ext explain --input 32 64 56 56 --weight 128 64 3 3 --padding 1 --dtype bf16 --layout nhwc
"""

from __future__ import annotations

import argparse

import torch

import conv2d_ext
from conv2d_ext.cli import UsageError

HELP = "the kernel that would run for a shape, and why"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs=4, type=int, required=True, metavar=("N", "C", "H", "W"))
    parser.add_argument("--weight", nargs=4, type=int, required=True, metavar=("K", "C/groups", "R", "S"))
    parser.add_argument("--stride", nargs="+", type=int, default=[1], help="1 or 2 integers (H, W)")
    parser.add_argument(
        "--padding", nargs="+", type=int, default=[0], help="1, 2 (H, W) or 4 integers (top, bottom, left, right)"
    )
    parser.add_argument("--dilation", nargs="+", type=int, default=[1], help="1 or 2 integers (H, W)")
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--layout", choices=("nchw", "nhwc"), default="nchw")
    parser.add_argument("--op", choices=("fprop", "dgrad", "wgrad"), default="fprop")
    parser.add_argument("--tf32", action="store_true", help="let fp32 use the TF32 tensor cores")


def pair(name: str, values: list[int], lengths: tuple[int, ...] = (1, 2)) -> tuple[int, ...]:
    """One integer becomes two. Raises UsageError for a length that isn't in `lengths`."""
    if len(values) not in lengths:
        raise UsageError(f"--{name}: expected {' or '.join(map(str, lengths))} integers, got {len(values)}")
    return tuple(values * 2 if len(values) == 1 else values)


def run(args: argparse.Namespace) -> int:
    stride = pair("stride", args.stride)
    padding = pair("padding", args.padding, (1, 2, 4))
    dilation = pair("dilation", args.dilation)
    try:
        explanation = conv2d_ext.explain(
            tuple(args.input),
            tuple(args.weight),
            None,
            stride,
            padding,
            dilation,
            args.groups,
            op=args.op,
            dtype=DTYPES[args.dtype],
            channels_last=args.layout == "nhwc",
            allow_tf32=args.tf32,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise UsageError(str(error).partition("\n")[0]) from error
    print(explanation)
    return 0
