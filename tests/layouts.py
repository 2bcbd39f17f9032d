"""Where the values of a test tensor lie in memory.

Every tensor is a view into a buffer that is NaN elsewhere, so that a kernel that reads outside the view, or reads
padding from memory, gives a wrong result and not a right one by luck.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GUARD = 64  # elements of NaN before and after the view; 64 elements keep the start 16-byte aligned in every dtype

NCHW = (0, 1, 2, 3)
NHWC = (0, 2, 3, 1)


def place(
    value: Tensor,
    device: torch.device | str,
    order: Sequence[int] = NCHW,
    step: Sequence[int] = (1, 1, 1, 1),
    margin: Sequence[int] = (0, 0, 0, 0),
    offset: int = 0,
) -> Tensor:
    """A copy of the 4-D `value` on `device`, as a view into a larger buffer of NaN.

    order: dimensions from the outermost to the innermost in memory. step: elements from one index to the next.
    margin: elements of NaN on either side, for each dimension. offset: elements by which the start is moved.
    """
    extent = [max(1, n) * s + 2 * m for n, s, m in zip(value.shape, step, margin, strict=True)]
    stride = [0] * value.dim()
    total = 1
    for dim in reversed(order):
        stride[dim] = total
        total *= extent[dim]
    start = GUARD + offset + sum(m * s for m, s in zip(margin, stride, strict=True))
    buffer = torch.full((total + 2 * GUARD + offset,), float("nan"), dtype=value.dtype, device=device)
    view = buffer.as_strided(value.shape, [a * b for a, b in zip(stride, step, strict=True)], start)
    return view.copy_(value)


def placed(**kwargs: object) -> Callable[[Tensor, torch.device | str], Tensor]:
    return functools.partial(place, **kwargs)  # type: ignore[arg-type]


_nchw = placed()
_nhwc = placed(order=NHWC)

# name -> how (input, weight, grad_output) lie in memory
LAYOUTS = {
    "nchw": (_nchw, _nchw, _nchw),
    "nhwc": (_nhwc, _nhwc, _nhwc),
    "nhwc_input": (_nhwc, _nchw, _nchw),
    "nhwc_weight": (_nchw, _nhwc, _nhwc),
    "sliced": tuple(placed(margin=m) for m in ((1, 1, 1, 2), (0, 1, 1, 1), (1, 2, 1, 0))),
    "sliced_nhwc": tuple(placed(order=NHWC, margin=m) for m in ((1, 8, 1, 2), (1, 8, 1, 1), (0, 8, 1, 1))),
    "every_other": tuple(placed(step=s) for s in ((1, 2, 1, 2), (2, 1, 1, 2), (1, 1, 2, 2))),
    "every_other_nhwc": tuple(placed(order=NHWC, step=s) for s in ((1, 2, 1, 1), (1, 1, 2, 1), (1, 2, 1, 1))),
    "transposed": tuple(placed(order=o) for o in ((3, 1, 0, 2), (1, 0, 3, 2), (2, 3, 0, 1))),
    "unaligned": tuple(placed(offset=o) for o in (1, 3, 1)),
    "unaligned_nhwc": tuple(placed(order=NHWC, offset=o) for o in (1, 1, 3)),
}


def repeated(*dims: int, **kwargs: object) -> Callable[[Tensor, torch.device | str], Tensor]:
    """The first of these dimensions, as often as there are others: strides of zero."""

    def view(value: Tensor, device: torch.device | str) -> Tensor:
        first = value[tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(4))]
        return place(first, device, **kwargs).expand(value.shape)  # type: ignore[arg-type]

    return view


def overlapping(value: Tensor, device: torch.device | str, order: Sequence[int] = NCHW) -> Tensor:
    """Rows that begin two columns after each other, as those of a spectrum do."""
    n, c, h, w = value.shape
    line = value[:, :, 0].repeat(1, 1, 2 * h // w + 2)[:, :, None, : 2 * h + w]
    placed = place(line.contiguous(), device, order=order)
    strides = list(placed.stride())
    return placed.as_strided(value.shape, (*strides[:2], 2 * strides[3], strides[3]))


# Views whose elements share memory: what is written to may not be one.
SHARED = {
    "repeated_images": (repeated(0), repeated(0), repeated(0)),
    "repeated_images_nhwc": (repeated(0, order=NHWC), _nhwc, repeated(0, order=NHWC)),
    "repeated_channels": (repeated(1), repeated(1), repeated(1)),
    "repeated_rows": (repeated(2), repeated(2), repeated(2)),
    "one_number": (_nchw, _nchw, repeated(0, 1, 2, 3)),
    "one_number_nhwc": (_nhwc, _nhwc, repeated(0, 1, 2, 3)),
    "overlapping": (overlapping, _nchw, _nchw),
    "overlapping_nhwc": (functools.partial(overlapping, order=NHWC), _nhwc, _nhwc),
}
PLAIN = ("nchw", "nhwc")
OTHER = tuple(name for name in LAYOUTS if name not in PLAIN)
