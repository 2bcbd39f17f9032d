"""conv2d: reads a user's arguments, and calls one op."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _autograd, _library

_LIMIT = 2**63
_op = torch.ops.conv2d_ext.conv2d.default
_plain = _autograd.plain
_is_compiling = torch.compiler.is_compiling
_transforms_active = torch._C._are_functorch_transforms_active
_any_autocast = torch._C._is_any_autocast_enabled
_jit_trace = torch._C._get_tracing_state


def _integer(value: Any, argument: str) -> int:
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype is torch.bool):
            raise TypeError
        result = operator.index(value)  # int, numpy's integers, tensors of one integer
    except TypeError:
        raise TypeError(f"conv2d: {argument}: expected an integer, got {type(value).__name__} {value!r}") from None
    if not -_LIMIT <= result < _LIMIT:
        raise ValueError(f"conv2d: {argument}: expected an integer of 64 bits, got {result}")
    return result


def _integers(value: Any, argument: str, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """An integer or a sequence of them, as a tuple of a wanted length."""
    if type(value) is int and -_LIMIT <= value < _LIMIT:
        return value, value
    if not isinstance(value, (tuple, list)):
        one = _integer(value, argument)
        return one, one
    if len(value) == 1:
        one = _integer(value[0], argument)
        return one, one
    if len(value) not in wanted:
        raise ValueError(
            f"conv2d: {argument}: expected {' or '.join(map(str, (1, *wanted)))} integers, got {len(value)}: {value!r}"
        )
    for v in value:
        if type(v) is not int or not -_LIMIT <= v < _LIMIT:
            return tuple([_integer(v, argument) for v in value])
    return tuple(value)


def _named_padding(padding: str, weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    if padding == "valid":
        return 0, 0
    if padding != "same":
        raise ValueError(f"conv2d: padding: expected 'same', 'valid' or integers, got {padding!r}")
    if stride[0] != 1 or stride[1] != 1:
        raise ValueError(f"conv2d: stride: expected 1 with padding='same', got {tuple(stride)}")
    if weight.dim() != 4 or len(dilation) != 2:
        return 0, 0  # the op says what is wrong
    # As in torch, the odd pixel goes to the bottom and to the right.
    extra_h, extra_w = dilation[0] * (weight.shape[2] - 1), dilation[1] * (weight.shape[3] - 1)
    top, left = extra_h // 2, extra_w // 2
    return top, extra_h - top, left, extra_w - left


def tf32_flag() -> bool:
    """Whether torch's flags let float32 convolutions round their operands to TF32."""
    # The older flag torch.backends.cudnn.allow_tf32 sets this one too, and reading it raises where they disagree. This
    # is torch.backends.cudnn.conv.fp32_precision, without the two attribute hooks in Python on the way.
    return torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32"


# Dynamo cannot trace the getter. Marked so, it calls the function while it traces and keeps the result: a compiled
# graph keeps the precision that it was traced with. (torch.compiler.assume_constant_result sets the same mark, but
# imports all of torch._dynamo to do so.)
tf32_flag._dynamo_marked_constant = True  # type: ignore[attr-defined]


def tf32_allowed(t: Tensor) -> bool:
    """Whether a convolution of t may round its operands to TF32."""
    return t.dtype is torch.float32 and t.is_cuda and tf32_flag()


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution (cross-correlation): the arguments and result of torch.nn.functional.conv2d.

    input:    (N, C, H, W) or (C, H, W); float16, bfloat16, float32 or float64, on the CPU or a CUDA device
    weight:   (K, C/groups, R, S), of input's dtype and device
    bias:     (K), of input's dtype and device, or None
    stride:   pixels between windows, one integer or (vertical, horizontal)
    padding:  zeros around the input in pixels, one integer, (vertical, horizontal), (top, bottom, left, right),
              'valid' (none) or 'same' (P, Q = H, W; stride 1 only; an odd pixel goes to the bottom and the right)
    dilation: pixels between the taps of a filter, one integer or (vertical, horizontal)
    groups:   the channels are cut into so many groups, each with K/groups filters of its own

    Returns (N, K, P, Q), or (K, P, Q) for an input without N, with P = (H + top + bottom - (R-1)*dilation - 1) / stride
    + 1, rounded down, and Q likewise. It is channels_last in memory where input or weight is, except for float64.
    Differentiable to any order. Under autocast the tensors are cast as for torch's conv2d. float32 on CUDA uses TF32
    where torch.backends.cudnn.conv.fp32_precision says "tf32"; torch.compile reads that flag when it traces.

    Raises TypeError, ValueError or RuntimeError that names the argument, what was expected and what came, and where
    memory is short what torch raises (for a gradient maybe a plain RuntimeError: "CUDA out of memory").
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv2d, (input, weight, bias), input, weight, bias, stride, padding, dilation, groups
        )
    plain = weight is not None and _plain(input, weight, bias)
    if plain:
        known = _known.get((id(stride), id(padding), id(dilation), id(groups)))
        if known is not None and input.dim() == 4 and not (input.is_nested or weight.is_nested):
            return _plain_conv2d(input, weight, bias, known[0])
    if not isinstance(input, Tensor):
        raise TypeError(f"conv2d: input: expected a Tensor, got {type(input).__name__}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"conv2d: weight: expected a Tensor, got {type(weight).__name__}")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"conv2d: bias: expected a Tensor or None, got {type(bias).__name__}")
    if input.is_nested or weight.is_nested:
        raise RuntimeError(
            f"conv2d: {'input' if input.is_nested else 'weight'}: expected a strided tensor, got a nested one"
        )

    given = (stride, padding, dilation, groups)
    stride = _integers(stride, "stride", (2,))
    dilation = _integers(dilation, "dilation", (2,))
    if isinstance(padding, str):
        padding = _named_padding(padding, weight, stride, dilation)
    else:
        padding = _integers(padding, "padding", (2, 4))
    if type(groups) is not int or groups >= _LIMIT:
        groups = _integer(groups, "groups")

    rank = input.dim()
    if rank == 4:
        if plain and (window := _window(given, stride, padding, dilation, groups)) is not None:
            return _plain_conv2d(input, weight, bias, window)
        return _conv2d(input, weight, bias, stride, padding, dilation, groups)
    if rank != 3:
        raise RuntimeError(f"conv2d: input: expected 4 dimensions (N, C, H, W) or 3 (C, H, W), got {rank}")
    return _conv2d(input.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)


# What arguments that were read before came to, and the arguments, so that no other objects get their ids. Integers and
# tuples of them alone, which stay what they are; equal ones may be something else (True, 1.0).
_known: dict[tuple[int, ...], tuple[tuple[int, int], tuple[Any, ...]]] = {}


def _window(given: tuple[Any, ...], *read: Any) -> tuple[int, int] | None:
    """_autograd.packed() of the arguments as read, remembered for those given."""
    try:
        window = _autograd.packed(*read)
    except TypeError:  # a SymInt
        return None
    if window and all(type(v) is int for a in given for v in (a if type(a) is tuple else (a,))):
        if len(_known) >= 1024:
            _known.clear()
        _known[tuple(map(id, given))] = window, given
    return window


def _plain_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, window: tuple[int, int]) -> Tensor:
    if _any_autocast():
        input, weight, bias = _library.autocast(input, weight, bias)
    return _autograd.plain_conv2d(input, weight, bias, window[0], window[1] + tf32_allowed(input))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    if _jit_trace() is not None:
        # torch.jit.trace can record the op and call it again, but no Function. Under it sizes are tensors, of which
        # padding='same' is made here.
        padding = [int(p) for p in padding]
        return _op(input, weight, bias, stride, padding, dilation, groups, allow_tf32=tf32_allowed(input))
    if _is_compiling() or _transforms_active():
        return _op(input, weight, bias, stride, padding, dilation, groups, allow_tf32=tf32_allowed(input))
    if _any_autocast():
        input, weight, bias = _library.autocast(input, weight, bias)
    return _autograd.conv2d(input, weight, bias, stride, padding, dilation, groups, tf32_allowed(input))
