"""Derivatives of the ops, of every order, and their vmap rules.

The three ops are linear in each of their two tensors, and the derivative of each is made of the other two:

    y  = fprop(x, w)     dx = dgrad(dy, w)    dw = wgrad(dy, x)
    dx = dgrad(g, w)     dg = fprop(u, w)     dw = wgrad(g, u)      (u: the cotangent of dx)
    dw = wgrad(g, x)     dg = fprop(x, v)     dx = dgrad(g, v)      (v: the cotangent of dw)

so three autograd Functions that call each other give every order. fprop(), dgrad() and wgrad() below are the one road
to the ops from Python: a Function where a derivative or a torch.func transform may follow, else the op itself.

plain_conv2d() is a shorter one for the host's sake, where nothing else looks on (plain()): of ops that nothing but
eager calls need to know, with an autograd node of torch's in C++ (csrc/ops/eager.h). Where its gradients are to be
differentiated it goes on by the three (plain_backward_of_all()).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import _shapes

Ints = Sequence[int]

_conv2d_op = torch.ops.conv2d_ext.conv2d.default
_fprop_op = torch.ops.conv2d_ext.fprop.default
_dgrad_op = torch.ops.conv2d_ext.dgrad.default
_wgrad_op = torch.ops.conv2d_ext.wgrad.default
_plain_fprop_op = torch.ops.conv2d_ext.plain_fprop.default
_node_op = torch.ops.aten.convolution_overrideable.default

_is_compiling = torch.compiler.is_compiling
_traced_by_dynamo = torch.compiler.is_dynamo_compiling
_jit_trace = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_no_guard = nullcontext()
_below_autograd = torch._C._AutoDispatchBelowAutograd
_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_unwrap = torch._C._functorch.unwrap_if_dead


def recorded(a: Tensor, b: Tensor, c: Tensor | None = None) -> bool:
    """True where a derivative of a call on these tensors may be asked for, or a torch.func transform is active."""
    if (a.requires_grad or b.requires_grad or (c is not None and c.requires_grad)) and _grad_enabled():
        return True
    # The level is -1 outside of forward_ad.dual_level(). Inside, any tensor may carry a tangent.
    return forward_ad._current_level >= 0 or _transforms_active()


def like_torch(error: RuntimeError) -> RuntimeError:
    """What torch would raise: no memory left on a GPU has a type of its own, which C interfaces do not pass on."""
    lost = type(error) is RuntimeError and "CUDA out of memory" in str(error)
    return torch.OutOfMemoryError(*error.args) if lost else error


def call(op: Any, *args: Any) -> Tensor:
    """The op without autograd; the last two arguments are allow_tf32 and row, which cost time where they are passed.

    Dispatch starts below autograd, which saves the hop through the Python kernel that _library.py registers there for
    those who call torch.ops directly. Dynamo, which traces this in compiled autograd, cannot trace the guard.
    """
    try:
        with _no_guard if _traced_by_dynamo() else _below_autograd():
            if args[-2] or args[-1] != -1:
                return op(*args[:-2], allow_tf32=args[-2], row=args[-1])
            return op(*args[:-2])
    except RuntimeError as error:
        raise like_torch(error) from None


def _plainly(op: Any, *args: Any) -> Any:
    """An op of plain tensors, without the hop through OpOverload.__call__."""
    try:
        return op._op(*args)
    except RuntimeError as error:
        raise like_torch(error) from None


def _apply(function: type[Function], a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    # Function.apply looks up signatures, 12 us a call. Outside of torch.func all that it adds to its base class is to
    # unwrap tensors that outlived a transform.
    if _transforms_active():
        return function.apply(a, b, *rest)
    return super(Function, function).apply(_unwrap(a), _unwrap(b), *rest)  # type: ignore[misc]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = (1, 1),
    padding: Ints = (0, 0),
    dilation: Ints = (1, 1),
    groups: int = 1,
    allow_tf32: bool = False,
    row: int = -1,
) -> Tensor:
    """fprop, under the name conv2d in a trace that needs no gradients."""
    if recorded(input, weight, bias):
        return _apply(Fprop, input, weight, bias, stride, padding, dilation, groups, allow_tf32, row)
    return call(_conv2d_op, input, weight, bias, stride, padding, dilation, groups, allow_tf32, row)


def fprop(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    allow_tf32: bool = False,
    row: int = -1,
) -> Tensor:
    if recorded(input, weight, bias):
        return _apply(Fprop, input, weight, bias, stride, padding, dilation, groups, allow_tf32, row)
    return call(_fprop_op, input, weight, bias, stride, padding, dilation, groups, allow_tf32, row)


def dgrad(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    allow_tf32: bool = False,
    row: int = -1,
) -> Tensor:
    args = (input_size, stride, padding, dilation, groups, allow_tf32, row)
    if recorded(grad_output, weight):
        return _apply(Dgrad, grad_output, weight, *args)
    return call(_dgrad_op, grad_output, weight, *args)


def wgrad(
    grad_output: Tensor,
    input: Tensor,
    weight_size: Ints,
    weight_stride: Ints | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    allow_tf32: bool = False,
    row: int = -1,
) -> Tensor:
    args = (weight_size, weight_stride, stride, padding, dilation, groups, allow_tf32, row)
    if recorded(grad_output, input):
        return _apply(Wgrad, grad_output, input, *args)
    return call(_wgrad_op, grad_output, input, *args)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


def _bias_grad(grad_output: Tensor) -> Tensor:
    # ATen's CPU sum of a half type rounds to that type between the dimensions that it reduces one after the other; its
    # CUDA sum keeps float32 to the end.
    if grad_output.dtype in (torch.float16, torch.bfloat16) and not grad_output.is_cuda:
        return grad_output.sum((0, 2, 3), dtype=torch.float32).to(grad_output.dtype)
    return grad_output.sum((0, 2, 3))


def _layout_of(weight: Tensor) -> Ints | None:
    """The strides that the gradient of weight is to have: weight's own if they are dense, else the op's choice."""
    stride = weight.stride()
    if weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last):
        return stride
    return stride if _shapes.is_dense(weight.shape, stride) else None


# ctx.attributes are stride, padding, dilation, groups and allow_tf32. A derivative leaves the kernel to the planner,
# since an argument `row` names a kernel for one op.


# Function.jvp is called with forward AD switched off at every level, so that a jvp of a jvp would silently lack the
# mixed derivatives (torch 2.13). Each jvp below switches it on again, over the primals of its own level.
_forward_ad = forward_ad._set_fwd_grad_enabled


def _primals(ctx: Any) -> list[Tensor]:
    return [forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]


@functools.lru_cache(maxsize=4096)
def packed(stride: Ints, padding: Ints, dilation: Ints, groups: int) -> tuple[int, int] | None:
    """For the ops of plain tensors (csrc/ops/eager.h), but for allow_tf32; None where a number is too large."""
    sides = padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])
    numbers = (*stride, *sides, *dilation)
    if min(numbers) < 0 or max(numbers) > 127 or not 0 <= groups < 2**31:
        return None
    return int.from_bytes(numbers, "little"), 2 * groups


def _unpacked(window: int, groups_and_tf32: int) -> tuple[Any, ...]:
    """stride, padding, dilation, groups, allow_tf32"""
    numbers = tuple([window >> 8 * i & 255 for i in range(8)])  # Dynamo traces no int.to_bytes (compiled autograd)
    return numbers[0:2], numbers[2:6], numbers[6:8], groups_and_tf32 >> 1, bool(groups_and_tf32 & 1)


def plain_fprop_of_all(input: Tensor, weight: Tensor, bias: Tensor | None, window: int, groups_and_tf32: int) -> Tensor:
    """What the op plain_fprop computes, by the op of all tensors."""
    return call(_fprop_op, input, weight, bias, *_unpacked(window, groups_and_tf32), -1)


def plain_backward_of_all(
    grad_output: Tensor, input: Tensor, weight: Tensor, window: int, groups_and_tf32: int, wanted: int
) -> tuple[Tensor | None, ...]:
    """What the op plain_backward computes, by the ops of all tensors; differentiable."""
    attributes = _unpacked(window, groups_and_tf32)
    grad_input = grad_weight = None
    grad_bias = _bias_grad(grad_output) if wanted & 4 else None
    if wanted & 2:
        grad_weight = wgrad(grad_output, input, weight.shape, _layout_of(weight), *attributes)
    if wanted & 1:
        grad_input = dgrad(grad_output, weight, input.shape, *attributes)
    return grad_input, grad_weight, grad_bias


_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_TENSORS_OR_NONE = frozenset((Tensor, torch.nn.Parameter, type(None)))


def plain(a: Tensor, b: Tensor, c: Tensor | None) -> bool:
    """True where these tensors are nothing but tensors and no trace, mode or transform looks on."""
    return (
        not _is_compiling()
        and type(a) in _TENSORS
        and type(b) in _TENSORS
        and type(c) in _TENSORS_OR_NONE
        and _dispatch_modes() == 0
        and forward_ad._current_level < 0
        and not _transforms_active()
        and _jit_trace() is None
    )


def plain_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, window: int, groups_and_tf32: int) -> Tensor:
    """fprop of tensors that are plain()."""
    if not _grad_enabled():
        return _plainly(_plain_fprop_op, input, weight, bias, window, groups_and_tf32)
    # Not for weights without a gradient: the node in C++ would keep their input. Nor for other devices, which may have
    # kernels of their own for its op.
    if weight.requires_grad and (input.is_cuda or input.is_cpu):
        call = (window, groups_and_tf32)
        try:
            return _node_op._op(_unwrap(input), _unwrap(weight), bias, call, (), (), False, (), 0)
        except NotImplementedError:
            pass  # by torch, of tensors that there is no kernel for: fprop says why
        except RuntimeError as error:
            raise like_torch(error) from None
    if recorded(input, weight, bias):
        return fprop(input, weight, bias, *_unpacked(window, groups_and_tf32))
    return _plainly(_plain_fprop_op, input, weight, bias, window, groups_and_tf32)


class Fprop(Function):
    """(input, weight, bias, stride, padding, dilation, groups, allow_tf32, row) -> output"""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return call(_fprop_op, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight = inputs[0], inputs[1]
        need_input, need_weight = ctx.needs_input_grad[:2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input if need_weight else None, weight if need_input else None)
        ctx.save_for_forward(input, weight)
        ctx.input_size, ctx.weight_size, ctx.output_size = input.shape, weight.shape, output.shape
        ctx.weight_stride = _layout_of(weight) if need_weight else None
        ctx.attributes = inputs[3:8]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_input = grad_weight = grad_bias = None
        if grad_output is not None:
            input, weight = ctx.saved_tensors
            need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
            if need_bias:  # in the order of csrc/ops/eager.h
                grad_bias = _bias_grad(grad_output)
            if need_weight:
                grad_weight = wgrad(grad_output, input, ctx.weight_size, ctx.weight_stride, *ctx.attributes)
            if need_input:
                grad_input = dgrad(grad_output, weight, ctx.input_size, *ctx.attributes)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        input_t, weight_t, bias_t = tangents[:3]
        with _forward_ad(True):
            input, weight = _primals(ctx)
            from_input = from_weight = None
            if input_t is not None:
                from_input = fprop(input_t, weight, bias_t, *ctx.attributes)
            if weight_t is not None:
                from_weight = fprop(input, weight_t, bias_t if input_t is None else None, *ctx.attributes)
            if input_t is None and weight_t is None and bias_t is not None:
                return bias_t.view(1, -1, 1, 1).expand(ctx.output_size)
            return _add(from_input, from_weight)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _vmap_fprop(info.batch_size, in_dims, *args)


class Dgrad(Function):
    """(grad_output, weight, input_size, stride, padding, dilation, groups, allow_tf32, row) -> grad_input"""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return call(_dgrad_op, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_output, weight = inputs[0], inputs[1]
        need_grad_output, need_weight = ctx.needs_input_grad[:2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output if need_weight else None, weight if need_grad_output else None)
        ctx.save_for_forward(grad_output, weight)
        ctx.input_size, ctx.weight_size = inputs[2], weight.shape
        ctx.weight_stride = _layout_of(weight) if need_weight else None
        ctx.attributes = inputs[3:8]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_grad_output = grad_weight = None
        if cotangent is not None:
            grad_output, weight = ctx.saved_tensors
            if ctx.needs_input_grad[0]:
                grad_grad_output = fprop(cotangent, weight, None, *ctx.attributes)
            if ctx.needs_input_grad[1]:
                grad_weight = wgrad(grad_output, cotangent, ctx.weight_size, ctx.weight_stride, *ctx.attributes)
        return grad_grad_output, grad_weight, None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        grad_output_t, weight_t = tangents[:2]
        with _forward_ad(True):
            grad_output, weight = _primals(ctx)
            a = b = None
            if grad_output_t is not None:
                a = dgrad(grad_output_t, weight, ctx.input_size, *ctx.attributes)
            if weight_t is not None:
                b = dgrad(grad_output, weight_t, ctx.input_size, *ctx.attributes)
            return _add(a, b)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _vmap_dgrad(info.batch_size, in_dims, *args)


class Wgrad(Function):
    """(grad_output, input, weight_size, weight_stride, stride, padding, dilation, groups, allow_tf32, row)
    -> grad_weight"""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return call(_wgrad_op, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_output, input = inputs[0], inputs[1]
        need_grad_output, need_input = ctx.needs_input_grad[:2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output if need_input else None, input if need_grad_output else None)
        ctx.save_for_forward(grad_output, input)
        ctx.input_size, ctx.weight_size, ctx.weight_stride = input.shape, inputs[2], inputs[3]
        ctx.attributes = inputs[4:9]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_grad_output = grad_input = None
        if cotangent is not None:
            grad_output, input = ctx.saved_tensors
            if ctx.needs_input_grad[0]:
                grad_grad_output = fprop(input, cotangent, None, *ctx.attributes)
            if ctx.needs_input_grad[1]:
                grad_input = dgrad(grad_output, cotangent, ctx.input_size, *ctx.attributes)
        return grad_grad_output, grad_input, None, None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        grad_output_t, input_t = tangents[:2]
        with _forward_ad(True):
            grad_output, input = _primals(ctx)
            a = b = None
            if grad_output_t is not None:
                a = wgrad(grad_output_t, input, ctx.weight_size, ctx.weight_stride, *ctx.attributes)
            if input_t is not None:
                b = wgrad(grad_output, input_t, ctx.weight_size, ctx.weight_stride, *ctx.attributes)
            return _add(a, b)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _vmap_wgrad(info.batch_size, in_dims, *args)


# vmap: one call of the same op one level below, with the vmapped dimension folded into one that the op has. With B
# for the vmapped size and g for groups:
#   only the tensor of the pixels (input, grad_output) is batched: B joins N;
#   only the weight is batched: B joins K (fprop) or C (dgrad), inside each group;
#   both are batched: B joins the groups.
# For wgrad, whose result is the weight, the roles of N and the groups change places.


def _unbatched_size(t: Tensor, dim: int | None) -> list[int]:
    size = list(t.shape)
    if dim is not None:
        del size[dim]
    return size


def _check_rank(op: str, argument: str, t: Tensor, dim: int | None, rank: int, shape: str) -> None:
    got = t.dim() - (dim is not None)
    if got != rank:
        _shapes.fail(op, argument, f"{rank} dimension{'' if rank == 1 else 's'} {shape}", got)


def _join(t: Tensor, dim: int, target: int) -> Tensor:
    """The vmapped dimension becomes the outer part of dimension `target` of the others."""
    return t.movedim(dim, target).flatten(target, target + 1)


def _join_inside_groups(t: Tensor, dim: int, target: int, groups: int) -> Tensor:
    """Dimension `target` is (groups, n); it becomes (groups, B, n)."""
    t = t.movedim(dim, target)  # (B, groups * n)
    t = t.unflatten(target + 1, (groups, t.shape[target + 1] // groups)).transpose(target, target + 1)
    return t.flatten(target, target + 2)


def _split_inside_groups(t: Tensor, target: int, groups: int, batch: int) -> tuple[Tensor, int]:
    """Undoes _join_inside_groups; the vmapped dimension comes out at 0."""
    size = t.shape[target] // (groups * batch) if batch else 0
    t = t.unflatten(target, (groups, batch, size)).movedim(target + 1, 0)
    return t.flatten(target + 1, target + 2), 0


def _batched(t: Tensor, dim: int | None, batch: int) -> Tensor:
    """With the vmapped dimension at 0, also where the tensor has none."""
    return t.expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)


def _nothing(batch: int, like: Tensor, size: Ints) -> tuple[Tensor, int]:
    return like.new_empty((batch, *size)), 0


def _vmap_fprop(batch: int, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    input, weight, bias, stride, padding, dilation, groups, allow_tf32, row = args
    x_dim, w_dim, b_dim = in_dims[:3]
    _check_rank("conv2d", "input", input, x_dim, 4, "(N, C, H, W)")
    _check_rank("conv2d", "weight", weight, w_dim, 4, "(K, C/groups, R, S)")
    x, w = _unbatched_size(input, x_dim), _unbatched_size(weight, w_dim)
    output = _shapes.check_problem("conv2d", "input", x, "weight", w, stride, padding, dilation, groups)
    if bias is not None:
        _check_rank("conv2d", "bias", bias, b_dim, 1, "(K)")
    window, choice = (stride, padding, dilation), (allow_tf32, row)
    if batch == 0:
        return _nothing(batch, input, output)

    if w_dim is None and b_dim is None:
        y = fprop(_join(input, x_dim, 0), weight, bias, *window, groups, *choice)
        return y.unflatten(0, (batch, x[0])), 0
    # A batched bias asks for batched filters: added afterwards it would be added to a rounded result.
    weight = _batched(weight, w_dim, batch)
    if bias is not None:
        bias = _batched(bias, b_dim, batch)
    if x_dim is None:
        bias = None if bias is None else _join_inside_groups(bias, 0, 0, groups)
        y = fprop(input, _join_inside_groups(weight, 0, 0, groups), bias, *window, groups, *choice)
        return _split_inside_groups(y, 1, groups, batch)
    bias = None if bias is None else bias.flatten()
    y = fprop(_join(input, x_dim, 1), weight.flatten(0, 1), bias, *window, groups * batch, *choice)
    return y.unflatten(1, (batch, w[0])), 1


def _vmap_dgrad(batch: int, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    grad_output, weight, input_size, stride, padding, dilation, groups, allow_tf32, row = args
    g_dim, w_dim = in_dims[:2]
    _check_rank("dgrad", "grad_output", grad_output, g_dim, 4, "(N, K, P, Q)")
    _check_rank("dgrad", "weight", weight, w_dim, 4, "(K, C/groups, R, S)")
    _check_size("dgrad", "input_size", input_size, "(N, C, H, W)")
    n, c, h, width = input_size
    w = _unbatched_size(weight, w_dim)
    _shapes.check_problem("dgrad", "input_size", input_size, "weight", w, stride, padding, dilation, groups)
    window, choice = (stride, padding, dilation), (allow_tf32, row)
    if batch == 0:
        return _nothing(batch, grad_output, input_size)

    if w_dim is None:
        x = dgrad(_join(grad_output, g_dim, 0), weight, (batch * n, c, h, width), *window, groups, *choice)
        return x.unflatten(0, (batch, n)), 0
    if g_dim is None:
        # (K, B, C/g): the channels of the result are (g, B, C/g).
        x = dgrad(grad_output, _join(weight, w_dim, 1), (n, batch * c, h, width), *window, groups, *choice)
        return _split_inside_groups(x, 1, groups, batch)
    x = dgrad(
        _join(grad_output, g_dim, 1),
        _join(weight, w_dim, 0),
        (n, batch * c, h, width),
        *window,
        groups * batch,
        *choice,
    )
    return x.unflatten(1, (batch, c)), 1


def _vmap_wgrad(batch: int, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    grad_output, input, weight_size, _, stride, padding, dilation, groups, allow_tf32, row = args
    g_dim, x_dim = in_dims[:2]
    _check_rank("wgrad", "grad_output", grad_output, g_dim, 4, "(N, K, P, Q)")
    _check_rank("wgrad", "input", input, x_dim, 4, "(N, C, H, W)")
    _check_size("wgrad", "weight_size", weight_size, "(K, C/groups, R, S)")
    k, c, r, s = weight_size
    x = _unbatched_size(input, x_dim)
    _shapes.check_problem("wgrad", "input", x, "weight_size", weight_size, stride, padding, dilation, groups)
    window, choice = (stride, padding, dilation), (allow_tf32, row)
    if batch == 0:
        return _nothing(batch, input, weight_size)

    if x_dim is None:
        w = wgrad(
            _join_inside_groups(grad_output, g_dim, 1, groups),
            input,
            (batch * k, c, r, s),
            None,
            *window,
            groups,
            *choice,
        )
        return _split_inside_groups(w, 0, groups, batch)
    if g_dim is None:
        w = wgrad(
            grad_output,
            _join_inside_groups(input, x_dim, 1, groups),
            (k, batch * c, r, s),
            None,
            *window,
            groups,
            *choice,
        )
        return w.unflatten(1, (batch, c)), 1
    w = wgrad(
        _join(grad_output, g_dim, 1),
        _join(input, x_dim, 1),
        (batch * k, c, r, s),
        None,
        *window,
        groups * batch,
        *choice,
    )
    return w.unflatten(0, (batch, k)), 0


def _check_size(op: str, argument: str, size: Ints, shape: str) -> None:
    if len(size) != 4:
        _shapes.fail(op, argument, f"4 integers {shape}", len(size))
