"""Calls of the raw operators on a case, and the planner's question for the same tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from cases import Case
from torch import Tensor

import conv2d_ext  # noqa: F401  (loads torch.ops.conv2d_ext)

OPS = ("fprop", "dgrad", "wgrad")


def fprop(case: Case, x: Tensor, w: Tensor, b: Tensor | None, **kwargs: object) -> Tensor:
    return torch.ops.conv2d_ext.fprop(x, w, b, *case.args, **kwargs)


def dgrad(case: Case, go: Tensor, w: Tensor, **kwargs: object) -> Tensor:
    return torch.ops.conv2d_ext.dgrad(go, w, case.input_size, *case.args, **kwargs)


def wgrad(case: Case, go: Tensor, x: Tensor, stride: Sequence[int] | None = None, **kwargs: object) -> Tensor:
    return torch.ops.conv2d_ext.wgrad(go, x, case.weight_size, stride, *case.args, **kwargs)


def call(op: str, case: Case, x: Tensor, w: Tensor, b: Tensor | None, go: Tensor) -> Callable[..., Tensor]:
    """The operator `op` on these tensors; what is left open are its keyword arguments."""
    return {
        "fprop": lambda **kwargs: fprop(case, x, w, b, **kwargs),
        "dgrad": lambda **kwargs: dgrad(case, go, w, **kwargs),
        "wgrad": lambda **kwargs: wgrad(case, go, x, **kwargs),
    }[op]


@functools.lru_cache(maxsize=1)
def machine() -> tuple[int, int]:
    """(number of SMs, compute capability) as the operator sees them."""
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return p.multi_processor_count, 10 * p.major + p.minor


def problem(op: str, x: Tensor, w: Tensor, go: Tensor, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x, w, y) with the operator's result, as the operator allocates it, in its place."""
    return {"fprop": (x, w, made), "dgrad": (made, w, go), "wgrad": (x, made, go)}[op]


def alignment(*tensors: Tensor) -> tuple[int, ...]:
    """Of each the largest power of two, at most 16, that divides its address."""
    return tuple(min(16, t.data_ptr() & -t.data_ptr() or 16) for t in tensors)


def plan(op: str, case: Case, x: Tensor, w: Tensor, y: Tensor, **kwargs: object) -> list[int]:
    """[row, split_k, workspace bytes, estimate of each row in ns or -1]; the tensors give sizes, strides and dtype."""
    row, split_k, workspace, _, *estimates = answer(op, case, x, w, y, **kwargs)  # type: ignore[arg-type]
    return [row, split_k, workspace, *estimates]


def packed(op: str, case: Case, x: Tensor, w: Tensor, y: Tensor, **kwargs: object) -> str:
    """Those of x, w, y that the planned row runs on packed copies of, such as "xy"."""
    mask = answer(op, case, x, w, y, **kwargs)[3]  # type: ignore[arg-type]
    return "".join(name for i, name in enumerate("xwy") if mask >> i & 1)


def answer(
    op: str,
    case: Case,
    x: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    align: int | Sequence[int] = 16,
    allow_tf32: bool = False,
    sm_count: int = 132,
    capability: int = 90,
) -> list[int]:
    """All that the operator `plan` says."""
    return list(
        torch.ops.conv2d_ext.plan(
            op,
            x.dtype,
            list(x.shape),
            list(x.stride()),
            list(w.shape),
            list(w.stride()),
            list(y.stride()),
            list(case.stride),
            list(case.padding),
            list(case.dilation),
            case.groups,
            [align] * 3 if isinstance(align, int) else align,
            allow_tf32,
            sm_count,
            capability,
        )
    )


def candidates(plan: Sequence[int]) -> list[int]:
    """The rows that support the planned problem."""
    return [row for row, estimate in enumerate(plan[3:]) if estimate >= 0]


def meta(case: Case, dtype: torch.dtype, layout: str) -> tuple[torch.Tensor, ...]:
    """x, w and y of a case of any size: meta tensors have strides but no memory."""
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    return tuple(
        torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)
        for size in (case.input_size, case.weight_size, case.output_size)
    )
