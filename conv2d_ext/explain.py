"""explain: which kernel the planner would choose for a convolution, and what it weighed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _shapes
from .functional import _integer, _integers, _named_padding, tf32_flag

_H200 = ("NVIDIA H200", 132, 90)  # name, SMs, compute capability
# What an operator calls x, w and y.
_TENSORS = {
    "fprop": ("input", "weight", "output"),
    "dgrad": ("grad_input", "weight", "grad_output"),
    "wgrad": ("input", "grad_weight", "grad_output"),
}
_MAX_ALIGNMENT = 16  # bytes; what the planner tells apart, and less than the allocator gives


@dataclass(frozen=True)
class Explanation:
    """What the planner says of one convolution on one GPU."""

    op: str  # "fprop", "dgrad" or "wgrad"
    kernel: str  # the row of the table of kernels that would run
    split_k: int  # parts that the reduction is cut into
    workspace_bytes: int  # memory for their partial sums and for packed tensors
    packed: tuple[str, ...]  # tensors that the kernel runs on copies of, in channels_last with padded channels
    candidates: tuple[tuple[str, float | None], ...]  # (row, estimated us or None: unsupported)
    reason: str

    def __str__(self) -> str:
        supported = [(us, name) for name, us in self.candidates if us is not None]
        width = max((len(name) for _, name in supported), default=0)
        lines = [f"{self.op}: {self.kernel}", f"  {self.reason}"]
        if self.packed:
            lines.append(f"  packed: {', '.join(self.packed)}")
        if self.workspace_bytes or self.split_k > 1:
            lines.append(f"  split_k {self.split_k}, workspace {self.workspace_bytes} bytes")
        lines += [
            f"  {'->' if name == self.kernel else '  '} {name:{width}}  {us:12.1f} us" for us, name in sorted(supported)
        ]
        lines.append(f"  {len(self.candidates) - len(supported)} other rows do not support this problem")
        return "\n".join(lines)


def _size(value: Tensor | Sequence[int], argument: str) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        if value.is_nested or value.layout is not torch.strided:
            _shapes.fail("explain", argument, "a strided tensor", "a nested one" if value.is_nested else value.layout)
        size = tuple(value.shape)
    elif isinstance(value, (tuple, list)):
        size = tuple(_integer(v, argument) for v in value)
    else:
        raise TypeError(f"explain: {argument}: expected a Tensor or its size, got {type(value).__name__}")
    if len(size) == 3 and argument == "input":
        size = (1, *size)
    if len(size) != 4:
        _shapes.fail("explain", argument, "4 dimensions", len(size))
    if min(size) < 0 or math.prod(size) >= 2**60:
        _shapes.fail("explain", argument, "sizes of 0 or more, fewer than 2^60 elements", list(size))
    return size


def _device(device: torch.device | str | int | None) -> tuple[str, int, int]:
    if device is None and not torch.cuda.is_available():
        return _H200
    count = torch.cuda.device_count()
    known = None
    if not isinstance(device, int):
        try:
            known = torch.device("cuda" if device is None else device)
        except (RuntimeError, TypeError):
            pass  # torch's message does not say which argument is meant
    elif 0 <= device < count:
        known = torch.device("cuda", device)
    if known is None or known.type != "cuda" or (known.index or 0) >= count:
        _shapes.fail("explain", "device", f"a CUDA device, of which torch finds {count} here", repr(device))
    properties = torch.cuda.get_device_properties(known)
    return properties.name, properties.multi_processor_count, 10 * properties.major + properties.minor


def _alignment(value: object) -> int:
    address = value.data_ptr() if isinstance(value, Tensor) and value.device.type != "meta" else 0
    return min(address & -address or _MAX_ALIGNMENT, _MAX_ALIGNMENT)


def explain(
    input: Tensor | Sequence[int],
    weight: Tensor | Sequence[int],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    op: str = "fprop",
    dtype: torch.dtype | None = None,
    channels_last: bool | None = None,
    allow_tf32: bool | None = None,
    device: torch.device | str | int | None = None,
) -> Explanation:
    """The kernel that conv2d (or its gradients: op="dgrad", "wgrad") would run for these arguments on a CUDA device.

    input, weight: tensors on any device, or their sizes: (N, C, H, W) or (C, H, W), and (K, C/groups, R, S)
    bias:          a tensor or None; only checked
    dtype:         what all of them are cast to; None: that of the tensors, or float32
    channels_last: the layout of both tensors; None: that of the tensors given, or contiguous
    allow_tf32:    None: torch's flags
    device:        a CUDA device; None: the current one, or an H200 (132 SMs, 9.0) where there is no GPU

    Nothing is computed and no GPU is needed. The gradients are planned for a grad_output in the output's layout.
    Raises what conv2d raises for these arguments.
    """
    if op not in ("fprop", "dgrad", "wgrad"):
        raise ValueError(f"explain: op: expected 'fprop', 'dgrad' or 'wgrad', got {op!r}")
    for argument, value in (("channels_last", channels_last), ("allow_tf32", allow_tf32)):
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"explain: {argument}: expected True, False or None, got {type(value).__name__} {value!r}")
    x_size, w_size = _size(input, "input"), _size(weight, "weight")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"explain: bias: expected a Tensor or None, got {type(bias).__name__}")
    cast = dtype is not None  # else each tensor has its own
    if dtype is None:
        dtype = next((t.dtype for t in (input, weight) if isinstance(t, Tensor)), torch.float32)
    if dtype not in _shapes.DTYPES:
        _shapes.fail("explain", "dtype", "float16, bfloat16, float32 or float64", _shapes.dtype_text(dtype))

    def meta(value: Tensor | Sequence[int], size: tuple[int, ...]) -> Tensor:
        kind = value.dtype if isinstance(value, Tensor) and not cast else dtype
        if channels_last is not None or not isinstance(value, Tensor):
            layout = torch.channels_last if channels_last else torch.contiguous_format
            return torch.empty(size, dtype=kind, device="meta", memory_format=layout)
        stride = value.stride() if value.dim() == 4 else (value.shape[0] * value.stride(0), *value.stride())
        return torch.empty_strided(size, stride, dtype=kind, device="meta")

    x, w = meta(input, x_size), meta(weight, w_size)
    b = None if bias is None else torch.empty(bias.shape, dtype=dtype if cast else bias.dtype, device="meta")
    stride, dilation = _integers(stride, "stride", (2,)), _integers(dilation, "dilation", (2,))
    if isinstance(padding, str):
        padding = _named_padding(padding, w, stride, dilation)
    else:
        padding = _integers(padding, "padding", (2, 4))
    groups = _integer(groups, "groups")
    y_size, y_stride = _shapes.fprop(x, w, b, stride, padding, dilation, groups)
    x_stride: Sequence[int] = x.stride()
    if op == "dgrad":  # whose result is laid out as grad_output and weight are, not as the input was
        y = torch.empty_strided(y_size, y_stride, dtype=dtype, device="meta")
        _, x_stride = _shapes.dgrad(y, w, x_size, stride, padding, dilation, groups)
    if allow_tf32 is None:
        allow_tf32 = tf32_flag()
    allow_tf32 = allow_tf32 and dtype is torch.float32

    name, sm_count, capability = _device(device)
    row, split_k, workspace_bytes, mask, *times = torch.ops.conv2d_ext.plan(
        op,
        dtype,
        x_size,
        x_stride,
        w_size,
        w.stride(),
        y_stride,
        stride,
        padding,
        dilation,
        groups,
        (  # new tensors are aligned
            _MAX_ALIGNMENT if op == "dgrad" else _alignment(input),
            _MAX_ALIGNMENT if op == "wgrad" else _alignment(weight),
            _MAX_ALIGNMENT,
        ),
        allow_tf32,
        sm_count,
        capability,
    )
    rows = torch.ops.conv2d_ext.kernels()
    candidates = tuple((r, None if ns < 0 else ns / 1000) for r, ns in zip(rows, times, strict=True))
    where = f"{name} ({sm_count} SMs, compute capability {capability // 10}.{capability % 10})"
    if row < 0:
        raise RuntimeError(f"explain: no kernel supports this problem on {where}")
    supported = sum(us is not None for _, us in candidates)
    reason = f"least estimated time of {supported} rows that support the problem on {where}"
    packed = tuple(name for i, name in enumerate(_TENSORS[op]) if mask >> i & 1)
    return Explanation(op, rows[row], split_k, workspace_bytes, packed, candidates, reason)
