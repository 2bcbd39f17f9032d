"""Loads the two libraries of compiled code and registers what torch wants to know of the ops beyond their kernels:
shapes for fake tensors, derivatives, autocast, torch.func transforms, flop counts, and errors for foreign tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _shapes

Ints = Sequence[int]

_FOLDER = Path(__file__).parent


def _load_cuda() -> str | None:
    """Loads the CUDA library; returns why not, where it cannot be."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    library = _FOLDER / "_cuda.abi3.so"
    if not library.exists():
        return "this wheel was built without CUDA"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return str(error)
    return None


torch.ops.load_library(str(_FOLDER / "_cpu.abi3.so"))
#: Why the CUDA library is not loaded, or None where it is.
CUDA_ERROR: str | None = _load_cuda()

from . import _autograd  # noqa: E402  (it reads the ops that were loaded above)

_library = torch.library.Library("conv2d_ext", "IMPL")  # registrations last as long as this object


# Shapes. The fake kernels also serve tensors on the meta device.


def _made(op: str, like: Tensor, row: int, size_and_stride: tuple[Ints, Ints]) -> Tensor:
    if row != -1:
        if like.device.type == "cpu":
            _shapes.fail(op, "row", "-1 for CPU tensors (the rows are CUDA kernels)", row)
        rows = len(torch.ops.conv2d_ext.kernels())
        if not 0 <= row < rows:
            _shapes.fail(op, "row", f"-1 or a row of the table, 0 to {rows - 1}", row)
    size, stride = size_and_stride
    return like.new_empty_strided(size, stride)


@torch.library.register_fake("conv2d_ext::conv2d")
def _fake_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = (1, 1),
    padding: Ints = (0, 0),
    dilation: Ints = (1, 1),
    groups: int = 1,
    *,
    allow_tf32: bool = False,
    row: int = -1,
) -> Tensor:
    shape = _shapes.fprop(input, weight, bias, stride, padding, dilation, groups)
    return _made("conv2d", input, row, shape)


torch.library.register_fake("conv2d_ext::fprop", _fake_conv2d)


@torch.library.register_fake("conv2d_ext::dgrad")
def _fake_dgrad(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    *,
    allow_tf32: bool = False,
    row: int = -1,
) -> Tensor:
    shape = _shapes.dgrad(grad_output, weight, input_size, stride, padding, dilation, groups)
    return _made("dgrad", grad_output, row, shape)


@torch.library.register_fake("conv2d_ext::wgrad")
def _fake_wgrad(
    grad_output: Tensor,
    input: Tensor,
    weight_size: Ints,
    weight_stride: Ints | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    *,
    allow_tf32: bool = False,
    row: int = -1,
) -> Tensor:
    shape = _shapes.wgrad(grad_output, input, weight_size, weight_stride, stride, padding, dilation, groups)
    return _made("wgrad", grad_output, row, shape)


# Derivatives of the ops where they are called through torch.ops. Found by experiment with torch 2.13:
# - With no kernel for the Autograd keys, torch.func.grad and jvp of an op are silently zero; backward() warns.
# - With torch.library.register_autograd, torch.func.grad raises and jvp is silently zero.
# - With a kernel for Autograd that calls an autograd Function, backward(), double backward and forward AD are right and
#   torch.func raises: Function.apply has to be called above the stack of transforms, and this kernel is below its top.
# - With the same kernel registered for the key at the top of that stack as well, torch.func is right too, and vmap goes
#   by the Functions' rules.
# The raw ops take the same road, so that calling one on a tensor that requires grad is as right as conv2d.


def _autograd_kernel(road: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # The dispatcher leaves out arguments that equal their defaults, and passes keyword-only ones by keyword.
    def call(*args: Any, allow_tf32: bool = False, row: int = -1) -> Tensor:
        return road(*args, allow_tf32=allow_tf32, row=row)

    return call


def _top_of_transforms(op: Any, road: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        from torch._C._functorch import TransformType
        from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
        from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI

        interpreter: Any = retrieve_current_functorch_interpreter()
        if interpreter.key() != TransformType.Functionalize:
            return road(*args, **kwargs)
        # torch.func.functionalize has no rule for a Function; the op neither mutates nor aliases, so that it only has
        # to be called one level below.
        api = FunctorchFunctionalizeAPI(interpreter)
        with api.redispatch_to_next():
            result = op(*api.unwrap_tensors(args), **kwargs)
        return api.wrap_tensors((result,))[0]

    return call


for _op, _road in (
    (torch.ops.conv2d_ext.conv2d.default, _autograd.conv2d),
    (torch.ops.conv2d_ext.fprop.default, _autograd.fprop),
    (torch.ops.conv2d_ext.dgrad.default, _autograd.dgrad),
    (torch.ops.conv2d_ext.wgrad.default, _autograd.wgrad),
):
    _library.impl(_op, _autograd_kernel(_road), "Autograd")
    _library.impl(_op, _top_of_transforms(_op, _road), "FuncTorchDynamicLayerFrontMode")


# Autocast of the public op, like that of aten::conv2d.


def autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three tensors in the dtype of the autocast region that is active for input's device, if there is one."""
    device_type = input.device.type
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device_type)

    def cast(t: Tensor) -> Tensor:
        lower = t.is_floating_point() and t.dtype is not torch.float64 and t.device.type == device_type
        return t.to(dtype) if lower else t

    return cast(input), cast(weight), None if bias is None else cast(bias)


def _autocast_kernel(key: str) -> Callable[..., Tensor]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        input, weight, bias = autocast(input, weight, bias)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.ops.conv2d_ext.conv2d.default(input, weight, bias, *args, **kwargs)

    return call


for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("conv2d", _autocast_kernel(_key), _key)


# Tensors that no kernel is for: sparse, nested, quantised and oneDNN ones, other devices, and CUDA without the library.


def _unsupported(op: str, arguments: tuple[str, ...]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        for argument, t in zip(arguments, args, strict=False):
            if not isinstance(t, Tensor):
                continue
            if t.is_nested:
                _shapes.fail(op, argument, "a strided tensor", "a nested one")
            if t.layout is not torch.strided:
                _shapes.fail(op, argument, "a strided tensor", f"layout {t.layout}")
            if t.is_quantized:
                _shapes.fail(op, argument, "float16, bfloat16, float32 or float64", _shapes.dtype_text(t.dtype))
            if t.is_cuda and CUDA_ERROR:
                raise RuntimeError(f"{op}: {argument}: its device is {t.device}, but {CUDA_ERROR}")
            if t.device.type not in ("cpu", "cuda"):
                _shapes.fail(op, argument, "a tensor on cpu or cuda", t.device)
        raise RuntimeError(f"{op}: no kernel for these tensors")

    return call


for _name, _prefix, _arguments in (
    ("conv2d", "conv2d", ("input", "weight", "bias")),
    ("fprop", "conv2d", ("input", "weight", "bias")),
    ("dgrad", "dgrad", ("grad_output", "weight")),
    ("wgrad", "wgrad", ("grad_output", "input")),
):
    for _key in ("CompositeExplicitAutograd", "NestedTensorCPU", "NestedTensorCUDA"):
        _library.impl(_name, _unsupported(_prefix, _arguments), _key)


# The ops of plain tensors have no kernel for these either, nor for the meta device: the ops of all tensors know what to
# do, or to say. As CompositeImplicitAutograd, modes and fake tensors see those ops instead.
_library.impl("plain_fprop", _autograd.plain_fprop_of_all, "CompositeImplicitAutograd")
for _name in ("plain_backward", "derived_backward"):
    _library.impl(_name, _autograd.plain_backward_of_all, "CompositeImplicitAutograd")


# The backward pass of plain tensors' calls (csrc/ops/eager.h) where a transform asks for it: batched gradients.


def _node_backward(grad_output: Tensor, input: Tensor, weight: Tensor, call: Ints, *others: Any) -> Any:
    if len(call) != 2 or others[0]:  # as check_ours()
        _shapes.fail("convolution_overrideable", "stride", "the two integers of conv2d_ext, whose kernel this is", call)
    window, groups_and_tf32 = call
    wanted = sum(bit for bit, asked in zip((1, 2, 4), others[-1], strict=True) if asked)
    return _autograd.plain_backward_of_all(grad_output, input, weight, window, groups_and_tf32, wanted)


_aten = torch.library.Library("aten", "IMPL")
_node_backward_op = torch.ops.aten.convolution_backward_overrideable.default
_aten.impl(_node_backward_op, _top_of_transforms(_node_backward_op, _node_backward), "FuncTorchDynamicLayerFrontMode")


# Flops for torch.utils.flop_counter, which passes shapes for tensors: 2 * N*K*P*Q * C/groups*R*S, the same for all
# three ops.


def _flops(y: Ints, w: Ints) -> int:
    n, k, p, q = y
    _, c, r, s = w
    return 2 * n * k * p * q * c * r * s


@register_flop_formula([torch.ops.conv2d_ext.conv2d, torch.ops.conv2d_ext.fprop])
def _fprop_flops(input: Ints, weight: Ints, *args: Any, out_shape: Ints, **kwargs: Any) -> int:
    return _flops(out_shape, weight)


@register_flop_formula(torch.ops.conv2d_ext.dgrad)
def _dgrad_flops(grad_output: Ints, weight: Ints, *args: Any, out_shape: Ints, **kwargs: Any) -> int:
    return _flops(grad_output, weight)


@register_flop_formula(torch.ops.conv2d_ext.wgrad)
def _wgrad_flops(grad_output: Ints, input: Ints, *args: Any, out_shape: Ints, **kwargs: Any) -> int:
    return _flops(grad_output, out_shape)
