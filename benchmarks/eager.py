"""What an eager call takes the host, beside F.conv2d: layers so small that the GPU waits for it.

    python benchmarks/eager.py

Microseconds a call: calls in a row, until the GPU is idle again, over their number; the fastest of five such runs.
`inference` is under torch.no_grad(), `forward` records for gradients, `both` asks for all three gradients as well.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

import conv2d_ext
from conv2d_ext.cli import plain_table

RUNS = 5

# name: images, channels, pixels of a side, filters, taps of a side, groups, stride, dtype, layout
LAYERS = {
    "1x1": (1, 64, 28, 64, 1, 1, 1, torch.float16, torch.channels_last),
    "3x3": (1, 128, 14, 128, 3, 1, 1, torch.float16, torch.channels_last),
    "3x3, NCHW": (1, 128, 14, 128, 3, 1, 1, torch.float16, torch.contiguous_format),
    "3x3, float32": (1, 128, 14, 128, 3, 1, 1, torch.float32, torch.channels_last),
    "3x3, float32, NCHW": (1, 128, 14, 128, 3, 1, 1, torch.float32, torch.contiguous_format),
    "depthwise": (1, 96, 14, 96, 3, 96, 1, torch.float16, torch.channels_last),
    "depthwise, NCHW": (1, 96, 14, 96, 3, 96, 1, torch.float16, torch.contiguous_format),
    "8 groups": (1, 128, 14, 128, 3, 8, 1, torch.float16, torch.channels_last),
    "8 groups, NCHW": (1, 128, 14, 128, 3, 8, 1, torch.float16, torch.contiguous_format),
    "3 channels, stride 2": (1, 3, 64, 32, 3, 1, 2, torch.float16, torch.channels_last),
}


def us_a_call(run: Callable[[], object], calls: int) -> float:
    for _ in range(calls // 10):
        run()
    times = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / calls * 1e6)
    return min(times)


def measure(conv2d: Callable[..., Tensor], name: str, calls: int) -> tuple[float, float, float]:
    """Of a layer: inference, forward, both."""
    images, channels, pixels, filters, taps, groups, stride, dtype, layout = LAYERS[name]
    sizes = ((images, channels, pixels, pixels), (filters, channels // groups, taps, taps))
    x, w = (torch.randn(size, device="cuda", dtype=dtype).to(memory_format=layout) for size in sizes)
    leaves = [t.requires_grad_() for t in (x, w, torch.randn(filters, device="cuda", dtype=dtype))]

    def forward() -> Tensor:
        return conv2d(*leaves, stride, taps // 2, 1, groups)

    grad_output = torch.randn_like(forward())
    with torch.no_grad():
        inference = us_a_call(forward, calls)
    return (
        inference,
        us_a_call(forward, calls),
        us_a_call(lambda: torch.autograd.grad(forward(), leaves, grad_output), calls),
    )


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--calls", type=int, default=300, help="in a row (default: %(default)s)")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("eager: torch finds no GPU here", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True
    rows = []
    for name in LAYERS:
        ours = measure(conv2d_ext.conv2d, name, options.calls)
        theirs = measure(functional.conv2d, name, options.calls)
        rows.append((name, *(f"{a:.1f} / {b:.1f}" for a, b in zip(ours, theirs, strict=True))))
    print("us a call, ours / F.conv2d")
    print(plain_table(("layer", "inference", "forward", "both"), rows, ("layer",)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
