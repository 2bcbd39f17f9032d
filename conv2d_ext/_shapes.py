"""Checks and output shapes of the ops, for fake tensors: the Python half of csrc/ops/checks.h.

The texts, their order and the strides are those of the C++ file. Sizes may be symbols (torch.SymInt): a condition that
the arithmetic needs becomes a guard through torch._check, a limit such as 2^31 is not checked on symbols, because a
guard on it would tell nothing about the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

MAX_EXTENT = 2**31 - 1
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Size = tuple[int, int, int, int]


def fail(op: str, argument: str, expected: str, got: object) -> NoReturn:
    raise RuntimeError(f"{op}: {argument}: expected {expected}, got {got}")


def _require(condition: Any, op: str, argument: str, expected: str, got: object) -> None:
    if condition is False:
        fail(op, argument, expected, got)
    if condition is not True:
        torch._check(condition, lambda: f"{op}: {argument}: expected {expected}, got {got}")


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_rank(op: str, argument: str, t: Tensor, rank: int, shape: str) -> None:
    if t.layout is not torch.strided or t.is_nested:
        fail(op, argument, "a strided tensor", "a nested one" if t.is_nested else f"layout {t.layout}")
    if t.dim() != rank:
        fail(op, argument, f"{rank} dimension{'' if rank == 1 else 's'} {shape}", t.dim())


def check_dtype(op: str, argument: str, t: Tensor) -> None:
    if t.dtype not in DTYPES:
        fail(op, argument, "float16, bfloat16, float32 or float64", dtype_text(t.dtype))


def _check_same(op: str, argument: str, t: Tensor, leader_name: str, leader: Tensor) -> None:
    if t.dtype != leader.dtype:
        fail(op, argument, f"{dtype_text(leader.dtype)} like {leader_name}", dtype_text(t.dtype))
    if t.device != leader.device:
        fail(op, argument, f"a tensor on {leader.device} like {leader_name}", t.device)


def _check_list(op: str, argument: str, values: Sequence[int], least: int, four_allowed: bool) -> None:
    if len(values) != 2 and not (four_allowed and len(values) == 4):
        fail(op, argument, f"{'2 or 4' if four_allowed else '2'} integers", len(values))
    for v in values:
        good = least <= v <= MAX_EXTENT if isinstance(v, int) else v >= least
        _require(good, op, argument, f"integers from {least} to {MAX_EXTENT}", list(values))


def _too_large(value: int) -> bool:
    return isinstance(value, int) and value > MAX_EXTENT


def _negative(value: int) -> bool:
    return isinstance(value, int) and value < 0


def four_sides(padding: Sequence[int]) -> Size:
    """(H, W) or (top, bottom, left, right) as (top, bottom, left, right)."""
    if len(padding) == 2:
        return padding[0], padding[0], padding[1], padding[1]
    top, bottom, left, right = padding
    return top, bottom, left, right


def check_problem(
    op: str,
    x_name: str,
    x: Sequence[int],
    w_name: str,
    w: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Size:
    """Checks one convolution of an input of size x and a weight of size w; returns the size of its output.

    x_name and w_name are what the op calls the arguments that the sizes came from.
    """
    _check_list(op, "stride", stride, 1, False)
    _check_list(op, "padding", padding, 0, True)
    _check_list(op, "dilation", dilation, 1, False)
    good_groups = 1 <= groups <= MAX_EXTENT if isinstance(groups, int) else groups >= 1
    _require(good_groups, op, "groups", f"an integer from 1 to {MAX_EXTENT}", groups)

    if any(_negative(v) or _too_large(v) for v in x[1:]):
        fail(op, x_name, f"channels, height and width from 0 to {MAX_EXTENT}", list(x))
    if _negative(x[0]):
        fail(op, x_name, "a batch of 0 or more", list(x))
    expected = "0 or more channels and a kernel of at least 1x1, all below 2^31"
    for i, v in enumerate(w):
        if _negative(v) or _too_large(v):
            fail(op, w_name, expected, list(w))
        if i >= 2:
            _require(v >= 1, op, w_name, expected, list(w))

    (n, c, h, width), (k, c_per_group, r, s) = x, w
    _require(c_per_group * groups == c, op, w_name, f"{c} input channels / {groups} groups in dimension 1", c_per_group)
    _require(k % groups == 0, op, w_name, f"a number of filters divisible by groups = {groups}", k)
    top, bottom, left, right = four_sides(padding)
    padded_h, padded_w = h + top + bottom, width + left + right
    if _too_large(padded_h) or _too_large(padded_w):
        fail(op, "padding", "a padded input below 2^31 in height and width", f"{padded_h}x{padded_w}")
    window_h, window_w = (r - 1) * dilation[0] + 1, (s - 1) * dilation[1] + 1
    for padded, window in ((padded_h, window_h), (padded_w, window_w)):
        _require(
            padded >= window,
            op,
            x_name,
            f"a padded size of at least {window_h}x{window_w} (the dilated kernel)",
            f"{padded_h}x{padded_w}",
        )
    p, q = (padded_h - window_h) // stride[0] + 1, (padded_w - window_w) // stride[1] + 1
    count = n * k * p * q
    if isinstance(count, int) and count >= 2**60:
        fail(op, x_name, "an output of fewer than 2^60 elements", f"{n}x{k}x{p}x{q}")
    return n, k, p, q


def _suggests_channels_last(t: Tensor) -> bool:
    """ATen's rule, as in csrc/ops/checks.h. torch's copy of it in Python differs from it before 2.13."""
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    if t.layout is not torch.strided or t.dim() != 4:
        return False
    size, stride = t.shape, t.stride()
    if guard_or_true(stride[1] == 0):
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if guard_or_true(size[d] == 0) or guard_or_true(stride[d] < least):
            return False
        if d == 0 and least == stride[1]:
            return False
        least = stride[d] * size[d]
    return True


def _dense_strides(size: Size, channels_last: bool) -> Size:
    # ATen's contiguous strides count an empty dimension as one long; so do ours, in both layouts.
    _, c, h, w = (1 if isinstance(v, int) and v < 1 else v for v in size)
    return (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)


def _strides_like(size: Size, *tensors: Tensor) -> Size:
    channels_last = tensors[0].dtype is not torch.float64 and any(map(_suggests_channels_last, tensors))
    return _dense_strides(size, channels_last)


def is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """True where a tensor of this size and stride has no gaps and no element twice."""
    step = 1
    for n, s in sorted(zip(size, stride, strict=True), key=lambda pair: pair[1]):
        if n == 0:
            return True
        if n != 1:
            if s != step:
                return 0 in size
            step *= n
    return True


def fprop(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Size, Size]:
    """Size and strides of the output of conv2d and fprop."""
    op = "conv2d"
    check_rank(op, "input", input, 4, "(N, C, H, W)")
    check_rank(op, "weight", weight, 4, "(K, C/groups, R, S)")
    check_dtype(op, "input", input)
    _check_same(op, "weight", weight, "input", input)
    size = check_problem(op, "input", input.shape, "weight", weight.shape, stride, padding, dilation, groups)
    if bias is not None:
        check_rank(op, "bias", bias, 1, "(K)")
        _check_same(op, "bias", bias, "input", input)
        k = weight.shape[0]
        _require(bias.shape[0] == k, op, "bias", f"{k} elements (weight's filters)", bias.shape[0])
    return size, _strides_like(size, input, weight)


def _check_grad_output(op: str, grad_output: Tensor, want: Size) -> None:
    for got, wanted in zip(grad_output.shape, want, strict=True):
        _require(got == wanted, op, "grad_output", str(list(want)), list(grad_output.shape))


def dgrad(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Size, Size]:
    """Size and strides of the gradient of the input."""
    op = "dgrad"
    check_rank(op, "grad_output", grad_output, 4, "(N, K, P, Q)")
    check_rank(op, "weight", weight, 4, "(K, C/groups, R, S)")
    check_dtype(op, "grad_output", grad_output)
    _check_same(op, "weight", weight, "grad_output", grad_output)
    if len(input_size) != 4:
        fail(op, "input_size", "4 integers (N, C, H, W)", len(input_size))
    want = check_problem(op, "input_size", input_size, "weight", weight.shape, stride, padding, dilation, groups)
    _check_grad_output(op, grad_output, want)
    n, c, h, w = input_size
    return (n, c, h, w), _strides_like((n, c, h, w), grad_output, weight)


def wgrad(
    grad_output: Tensor,
    input: Tensor,
    weight_size: Sequence[int],
    weight_stride: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Size, Size]:
    """Size and strides of the gradient of the weight."""
    op = "wgrad"
    check_rank(op, "grad_output", grad_output, 4, "(N, K, P, Q)")
    check_rank(op, "input", input, 4, "(N, C, H, W)")
    check_dtype(op, "grad_output", grad_output)
    _check_same(op, "input", input, "grad_output", grad_output)
    if len(weight_size) != 4:
        fail(op, "weight_size", "4 integers (K, C/groups, R, S)", len(weight_size))
    want = check_problem(op, "input", input.shape, "weight_size", weight_size, stride, padding, dilation, groups)
    _check_grad_output(op, grad_output, want)
    k, c, r, s = weight_size
    if weight_stride is None:
        return (k, c, r, s), _dense_strides((k, c, r, s), False)
    if len(weight_stride) != 4:
        fail(op, "weight_stride", "4 integers", len(weight_stride))
    fixed = all(isinstance(v, int) for v in (*weight_size, *weight_stride))
    if fixed and not is_dense(weight_size, weight_stride):
        fail(op, "weight_stride", f"the strides of a dense tensor of size {list(weight_size)}", list(weight_stride))
    return (k, c, r, s), (weight_stride[0], weight_stride[1], weight_stride[2], weight_stride[3])
