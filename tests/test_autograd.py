"""Derivatives of every order, in both directions, by autograd and by torch.func, through every public entry."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from calls import dgrad, wgrad
from cases import BY_NAME, CASES, DTYPES, FEW, Case
from checks import for_each
from layouts import PLAIN
from reference import assert_close, error, exact, four_sided, same_bits, tolerance
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import conv2d_ext

# Numerical derivatives take one call an element, so these are smaller than the shared cases but for one of each kind.
TINY = (
    Case("plain", 2, 3, 4, 4, 2, 3, 3, padding=(1, 1)),
    Case("strided_dilated", 1, 2, 6, 5, 3, 2, 2, (2, 1), (1, 0), (2, 2)),
    Case("grouped", 1, 4, 4, 3, 6, 2, 3, padding=(0, 1), groups=2),
    Case("depthwise", 1, 3, 4, 4, 6, 3, 3, padding=(1, 1), groups=3),
    Case("four_pads", 1, 2, 3, 4, 2, 3, 2, (1, 2), (2, 0, 1, 3)),
    Case("kernel_larger_than_input", 1, 2, 2, 2, 2, 3, 4, padding=(2, 2)),
)
ENTRIES = {"conv2d": conv2d_ext.conv2d, "torch.ops": torch.ops.conv2d_ext.conv2d}
EVERY_ENTRY = pytest.mark.parametrize("entry", ENTRIES)
EVERY_TINY = pytest.mark.parametrize("case", TINY, ids=str)
NEEDED = [c for n in (1, 2, 3) for c in itertools.combinations(("input", "weight", "bias"), n)]
EVERY_NEED = pytest.mark.parametrize("needed", NEEDED, ids="-".join)


def needing(
    entry: str, case: Case, needed: tuple[str, ...], device: str, bias: bool = True, layout: str = "nchw"
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function of the tensors in `needed` alone, and those tensors; the others are constants without gradient."""
    x, w, b = (t.contiguous() for t in case.tensors(device, torch.float64))
    if layout == "nhwc":
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    tensors = {"input": x, "weight": w, "bias": b if bias else None}

    def function(*values: Tensor) -> Tensor:
        merged = {**tensors, **dict(zip(needed, values, strict=True))}
        return ENTRIES[entry](merged["input"], merged["weight"], merged["bias"], *case.args)

    leaves = [tensors[name] for name in needed]
    return function, [leaf.requires_grad_() for leaf in leaves]


@EVERY_ENTRY
@EVERY_NEED
@EVERY_TINY
def test_first_derivatives_are_right(case: Case, needed: tuple[str, ...], entry: str, device: str) -> None:
    function, leaves = needing(entry, case, needed, device)
    assert gradcheck(function, leaves, check_undefined_grad=True, check_batched_grad=False)


@EVERY_ENTRY
@EVERY_NEED
@EVERY_TINY
def test_second_derivatives_are_right(case: Case, needed: tuple[str, ...], entry: str, device: str) -> None:
    function, leaves = needing(entry, case, needed, device)
    assert gradgradcheck(function, leaves, check_undefined_grad=True)


@EVERY_ENTRY
@pytest.mark.parametrize("needed", [n for n in NEEDED if "bias" not in n], ids="-".join)
def test_derivatives_without_a_bias_are_right(needed: tuple[str, ...], entry: str, device: str) -> None:
    function, leaves = needing(entry, TINY[1], needed, device, bias=False)
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@EVERY_ENTRY
def test_derivatives_in_channels_last_are_right(entry: str, device: str) -> None:
    function, leaves = needing(entry, TINY[2], ("input", "weight", "bias"), device, layout="nhwc")
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@EVERY_ENTRY
def test_third_derivatives_are_right(entry: str, device: str) -> None:
    """gradgradcheck of a gradient; the square makes the third derivative differ from zero."""
    case = Case("third", 1, 2, 3, 3, 2, 2, 2)
    function, (x, w) = needing(entry, case, ("input", "weight"), device)

    def gradient(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((function(x, w) ** 2).sum(), (x, w), create_graph=True)

    assert gradgradcheck(gradient, (x, w), fast_mode=True)


@pytest.mark.parametrize("needed", [("input",), ("weight",), ("input", "weight", "bias")], ids="-".join)
@EVERY_TINY
def test_forward_mode_derivatives_are_right(case: Case, needed: tuple[str, ...], device: str) -> None:
    function, leaves = needing("conv2d", case, needed, device)
    assert gradcheck(function, leaves, check_forward_ad=True, check_backward_ad=False)
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_forward_grad=True, check_batched_grad=True)


@pytest.mark.parametrize("needed", [("input",), ("weight",), ("input", "weight", "bias")], ids="-".join)
def test_forward_over_reverse_derivatives_are_right(needed: tuple[str, ...], device: str) -> None:
    function, leaves = needing("conv2d", TINY[1], needed, device)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, check_rev_over_rev=True)


@EVERY_ENTRY
@pytest.mark.parametrize("which", ("input", "weight", "bias", "all"))
def test_a_dual_number_gives_torchs_tangent_or_an_error(which: str, entry: str, device: str) -> None:
    """torch.ops need not support forward mode, but must not lose a tangent in silence."""
    case = BY_NAME["groups2"]
    tensors = dict(zip(("input", "weight", "bias"), case.tensors(device, torch.float64), strict=True))
    tangents = {name: torch.randn_like(t) for name, t in tensors.items() if which in (name, "all")}

    def tangent(function: Callable[..., Tensor]) -> Tensor | None:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, tangents[n]) if n in tangents else t for n, t in tensors.items()]
            return forward_ad.unpack_dual(function(*duals, *case.args)).tangent

    theirs = tangent(four_sided)
    assert theirs is not None
    if entry == "torch.ops":
        try:
            ours = tangent(ENTRIES[entry])
        except (RuntimeError, NotImplementedError):
            return
    else:
        ours = tangent(ENTRIES[entry])
    assert ours is not None, "the tangent was dropped"
    assert error(ours, theirs) <= 1e-12


@pytest.mark.parametrize("case", CASES, ids=str)
@for_each(dtype=DTYPES, layout=PLAIN, entry=ENTRIES)
def test_gradients_by_autograd_agree_with_float64(
    case: Case, layout: str, dtype: torch.dtype, entry: str, device: str
) -> None:
    leaves = [t.requires_grad_() for t in case.tensors(device, dtype, layout) if t is not None]
    x, w, b = (*leaves, None)[:3]
    y = ENTRIES[entry](x, w, b, *case.args)
    grads = torch.autograd.grad(y, leaves, case.grad_output(device, dtype, layout))
    truth = exact(case, dtype, device=device)
    assert_close(y, truth.output, dtype, case.reduction("fprop"), "output")
    assert_close(grads[0], truth.grad_input, dtype, case.reduction("dgrad"), "grad_input")
    assert_close(grads[1], truth.grad_weight, dtype, case.reduction("wgrad"), "grad_weight")
    if b is not None:
        assert_close(grads[2], truth.grad_bias, dtype, case.reduction("bias"), "grad_bias")


@EVERY_ENTRY
@EVERY_NEED
def test_only_the_gradients_that_are_needed_are_there(needed: tuple[str, ...], entry: str, device: str) -> None:
    case = BY_NAME["groups2"]
    tensors = dict(zip(("input", "weight", "bias"), case.tensors(device, torch.float64), strict=True))
    for name in needed:
        tensors[name].requires_grad_()
    y = ENTRIES[entry](*tensors.values(), *case.args)
    y.backward(case.grad_output(device, torch.float64))
    truth = exact(case, torch.float64)
    expected = {"input": truth.grad_input, "weight": truth.grad_weight, "bias": truth.grad_bias}
    for name, tensor in tensors.items():
        if name in needed:
            assert error(tensor.grad, expected[name]) <= tolerance(torch.float64, 1000)
        else:
            assert tensor.grad is None


@EVERY_ENTRY
def test_no_graph_is_kept_where_none_is_wanted(entry: str, device: str) -> None:
    case = BY_NAME["3x3"]
    x, w, b = (t.requires_grad_() for t in case.tensors(device))
    with torch.no_grad():
        assert not ENTRIES[entry](x, w, b, *case.args).requires_grad
    with torch.inference_mode():
        y = ENTRIES[entry](x, w, b, *case.args)
        assert y.is_inference() and not y.requires_grad
    assert not ENTRIES[entry](x.detach(), w.detach(), b.detach(), *case.args).requires_grad
    assert ENTRIES[entry](x, w.detach(), None, *case.args).requires_grad


@EVERY_ENTRY
def test_a_tensor_changed_after_the_forward_pass_is_noticed(entry: str, device: str) -> None:
    """A saved tensor that is overwritten would give a wrong gradient; autograd's version counter must see it."""
    case = BY_NAME["3x3"]
    x, w, b = (t.requires_grad_() for t in case.tensors(device))
    y = ENTRIES[entry](x, w, b, *case.args)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@EVERY_ENTRY
def test_the_graph_is_freed_after_backward_unless_retained(entry: str, device: str) -> None:
    case = BY_NAME["3x3"]
    x, w, b = (t.requires_grad_() for t in case.tensors(device))
    y = ENTRIES[entry](x, w, b, *case.args).sum()
    y.backward(retain_graph=True)
    once = w.grad.clone()
    y.backward()
    assert torch.equal(w.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@EVERY_ENTRY
@pytest.mark.parametrize("reduce", ("sum", "mean", "one_channel", "one_pixel"))
def test_gradients_through_expanded_and_strided_outputs_are_right(reduce: str, entry: str, device: str) -> None:
    case = BY_NAME["four_pads_grouped_dilated"]
    reduction = {
        "sum": lambda y: y.sum(),
        "mean": lambda y: y.mean((2, 3)).pow(2).sum(),
        "one_channel": lambda y: y[:, 1].sum(),
        "one_pixel": lambda y: y[..., ::2, -1].sum(),
    }[reduce]

    def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x, w, b = (t.requires_grad_() for t in case.tensors(device, torch.float64))
        return torch.autograd.grad(reduction(function(x, w, b, *case.args)), (x, w, b))

    for ours, theirs in zip(gradients(ENTRIES[entry]), gradients(four_sided), strict=True):
        assert error(ours, theirs) <= 1e-12


@EVERY_ENTRY
def test_gradients_reach_a_base_through_its_views(entry: str, device: str) -> None:
    case = BY_NAME["3x3"]

    def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        _, w, b = case.tensors(device, torch.float64)
        base = case.draw((2, 20, 9, 12), torch.float64, 7).to(device).requires_grad_()
        row = w[:1].detach().requires_grad_()
        y = function(base[:, 2:-2, :, 1:-1], row.expand(case.weight_size), b, *case.args)
        return torch.autograd.grad(y.pow(2).sum(), (base, row))

    for ours, theirs in zip(gradients(ENTRIES[entry]), gradients(four_sided), strict=True):
        assert error(ours, theirs) <= 1e-12


def weights_in_memory(case: Case, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    w = case.tensors(device, dtype)[1].contiguous()
    return {
        "contiguous": w,
        "channels_last": w.contiguous(memory_format=torch.channels_last),
        "permuted": w.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
    }


@EVERY_ENTRY
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("memory", ("contiguous", "channels_last", "permuted"))
@pytest.mark.parametrize("layout", PLAIN)
def test_the_gradient_of_the_weight_has_the_strides_of_the_weight(
    layout: str, memory: str, dtype: torch.dtype, entry: str, device: str
) -> None:
    """DistributedDataParallel warns and copies otherwise."""
    case = BY_NAME["3x3"]
    x, _, b = case.tensors(device, dtype, layout)
    w = weights_in_memory(case, device, dtype)[memory].requires_grad_()
    (grad,) = torch.autograd.grad(ENTRIES[entry](x, w, b, *case.args).sum(), w)
    assert grad.stride() == w.stride()


@EVERY_ENTRY
def test_the_gradient_of_a_sliced_or_expanded_weight_is_right(entry: str, device: str) -> None:
    """Such strides cannot be those of a new dense tensor, so the gradient takes others."""
    case = BY_NAME["3x3"]
    x, w, b = case.tensors(device, torch.float64, "every_other")
    for weight in (w, w[:, :, :1].expand(case.weight_size), w[:1].expand(case.weight_size)):
        weight = weight.detach().requires_grad_()
        (ours,) = torch.autograd.grad(ENTRIES[entry](x, weight, b, *case.args).pow(2).sum(), weight)
        (theirs,) = torch.autograd.grad(four_sided(x, weight, b, *case.args).pow(2).sum(), weight)
        assert error(ours, theirs) <= 1e-12


@pytest.mark.parametrize("reentrant", (False, True))
def test_a_checkpointed_convolution_has_the_same_gradients(reentrant: bool, device: str) -> None:
    case = BY_NAME["2x5_stride_1x3"]

    def gradients(save: bool) -> tuple[Tensor, ...]:
        x, w, b = (t.requires_grad_() for t in case.tensors(device))
        run = functools.partial(conv2d_ext.conv2d, stride=case.stride, padding=case.padding)
        y = run(x, w, b) if save else checkpoint(run, x, w, b, use_reentrant=reentrant)
        y.pow(2).sum().backward()
        return x.grad, w.grad, b.grad

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert same_bits(a, b)


def test_saved_tensor_hooks_see_the_input_and_the_weight(device: str) -> None:
    """Offloading and quantising activations rely on these hooks."""
    case = BY_NAME["3x3"]
    x, w, b = (t.requires_grad_() for t in case.tensors(device))
    packed: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(tuple(t.shape))
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = conv2d_ext.conv2d(x, w, b, *case.args)
    y.sum().backward()
    assert case.input_size in packed and case.weight_size in packed
    assert x.grad is not None and w.grad is not None


def test_a_frozen_weight_does_not_keep_the_input_alive(device: str) -> None:
    """With no gradient for the weight, the input is not needed in the backward pass; fine-tuning counts on that."""
    case = BY_NAME["3x3"]
    x, w, b = case.tensors(device)
    sizes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        conv2d_ext.conv2d(x.requires_grad_(), w, b, *case.args)
    assert case.input_size not in sizes


@EVERY_ENTRY
def test_what_the_backward_pass_does_not_read_is_freed_after_the_forward_pass(entry: str, device: str) -> None:
    case = BY_NAME["3x3"]
    x, w, b = case.tensors(device)
    between = x.requires_grad_() * 1
    watch = weakref.ref(between)
    y = ENTRIES[entry](between, w, b, *case.args)
    del between
    assert watch() is None
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("needed", ((True, False), (False, True), (True, True)), ids=("first", "second", "both"))
@pytest.mark.parametrize("case", (TINY[1], TINY[2]), ids=str)
def test_the_raw_gradient_operators_are_differentiable(case: Case, needed: tuple[bool, bool], device: str) -> None:
    """dgrad and wgrad are linear in each of their tensors too; who calls them directly gets their derivatives."""
    x, w, _ = (t.contiguous() for t in case.tensors(device, torch.float64))
    go = case.grad_output(device, torch.float64).contiguous()
    for function, tensors in (
        (functools.partial(dgrad, case), (go, w)),
        (functools.partial(wgrad, case), (go, x)),
    ):
        leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
        assert gradcheck(function, leaves)
        assert gradgradcheck(function, leaves)


def test_anomaly_mode_names_a_nan_gradient(device: str) -> None:
    case = BY_NAME["3x3_no_bias"]
    x, w, _ = case.tensors(device)
    w.requires_grad_()
    x[0, 0, 3, 3] = float("nan")
    with (
        pytest.warns(UserWarning),  # detect_anomaly says that it is slow, and shows the forward call
        torch.autograd.detect_anomaly(check_nan=True),
        pytest.raises(RuntimeError, match="nan values"),
    ):
        conv2d_ext.conv2d(x, w, None, *case.args).sum().backward()


# torch.func


def f_sum(function: Callable[..., Tensor], case: Case) -> Callable[..., Tensor]:
    return lambda x, w, b: function(x, w, b, *case.args).pow(2).sum()


def f(function: Callable[..., Tensor], case: Case) -> Callable[..., Tensor]:
    return lambda x, w, b: function(x, w, b, *case.args)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Case], Callable[..., object]]] = {
    "grad": lambda g, c: torch.func.grad(f_sum(g, c), (0, 1, 2)),
    "grad_of_input": lambda g, c: torch.func.grad(f_sum(g, c), 0),
    "grad_of_weight": lambda g, c: torch.func.grad(f_sum(g, c), 1),
    "grad_of_bias": lambda g, c: torch.func.grad(f_sum(g, c), 2),
    "grad_of_grad": lambda g, c: torch.func.grad(
        lambda *t: sum(v.pow(3).sum() for v in torch.func.grad(f_sum(g, c), (0, 1, 2))(*t)), (0, 1, 2)
    ),
    "grad_and_value": lambda g, c: torch.func.grad_and_value(f_sum(g, c), (0, 1)),
    "vjp": lambda g, c: lambda x, w, b: torch.func.vjp(f(g, c), x, w, b)[1](torch.ones(c.output_size).to(x) * 0.5),
    "jvp": lambda g, c: lambda x, w, b: torch.func.jvp(f(g, c), (x, w, b), (x.cos(), w.sin(), b.exp())),
    "jvp_of_input": lambda g, c: lambda x, w, b: torch.func.jvp(lambda x: f(g, c)(x, w, b), (x,), (x.cos(),)),
    "jvp_of_weight": lambda g, c: lambda x, w, b: torch.func.jvp(lambda w: f(g, c)(x, w, b), (w,), (w.cos(),)),
    "jvp_of_bias": lambda g, c: lambda x, w, b: torch.func.jvp(lambda b: f(g, c)(x, w, b), (b,), (b.cos(),)),
    "jvp_of_grad": lambda g, c: (
        lambda x, w, b: torch.func.jvp(torch.func.grad(f_sum(g, c), (0, 1, 2)), (x, w, b), (x.cos(), w.sin(), b))
    ),
    "grad_of_jvp": lambda g, c: torch.func.grad(
        lambda x, w, b: torch.func.jvp(f_sum(g, c), (x, w, b), (x.cos(), w.sin(), b))[1], (0, 1, 2)
    ),
    "jacrev": lambda g, c: torch.func.jacrev(f(g, c), (0, 1, 2)),
    "jacfwd": lambda g, c: torch.func.jacfwd(f(g, c), (0, 1, 2)),
    "jacrev_in_chunks": lambda g, c: torch.func.jacrev(f(g, c), (0, 1), chunk_size=5),
    "hessian": lambda g, c: torch.func.hessian(f_sum(g, c), (0, 1)),
    "jacrev_of_jacrev": lambda g, c: torch.func.jacrev(torch.func.jacrev(f_sum(g, c), 1), (0, 1)),
    "linearize": lambda g, c: lambda x, w, b: torch.func.linearize(lambda x, w: f(g, c)(x, w, b), x, w)[1](x.cos(), w),
}
# Forward mode inside forward mode: torch's autograd.Function drops the inner tangent's tangent in silence (torch 2.13),
# so that a package built on it must see this and refuse, or take another way.
NESTED_FORWARD: dict[str, Callable[[Callable[..., Tensor], Case], Callable[..., object]]] = {
    "jacfwd_of_jacfwd": lambda g, c: torch.func.jacfwd(torch.func.jacfwd(f_sum(g, c), (0, 1)), (0, 1)),
    "jvp_of_jvp": lambda g, c: (
        lambda x, w, b: torch.func.jvp(
            lambda x, w: torch.func.jvp(lambda x, w: f(g, c)(x, w, b).pow(2), (x, w), (x, w))[1],
            (x, w),
            (x.cos(), w.sin()),
        )
    ),
}


def flatten(tree: object) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(tree)


def assert_trees_close(ours: object, theirs: object) -> None:
    a, b = flatten(ours), flatten(theirs)
    assert len(a) == len(b)
    for mine, other in zip(a, b, strict=True):
        assert error(mine, other) <= 1e-11


@pytest.mark.parametrize("transform", TRANSFORMS)
@EVERY_TINY
def test_function_transforms_agree_with_torchs_convolution(case: Case, transform: str, device: str) -> None:
    tensors = tuple(t.contiguous() for t in case.tensors(device, torch.float64))
    apply = TRANSFORMS[transform]
    assert_trees_close(apply(conv2d_ext.conv2d, case)(*tensors), apply(four_sided, case)(*tensors))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_of_the_raw_operator_are_right_or_refused(transform: str, device: str) -> None:
    """torch.ops.conv2d_ext.conv2d need not support every transform, but must not answer wrongly."""
    case = TINY[1]
    tensors = tuple(t.contiguous() for t in case.tensors(device, torch.float64))
    apply = TRANSFORMS[transform]
    theirs = apply(four_sided, case)(*tensors)
    try:
        ours = apply(torch.ops.conv2d_ext.conv2d, case)(*tensors)
    except (RuntimeError, NotImplementedError):
        return
    assert_trees_close(ours, theirs)


@pytest.mark.parametrize("transform", NESTED_FORWARD)
@EVERY_ENTRY
@EVERY_TINY
def test_forward_mode_inside_forward_mode_is_right_or_refused(
    case: Case, entry: str, transform: str, device: str
) -> None:
    tensors = tuple(t.contiguous() for t in case.tensors(device, torch.float64))
    apply = NESTED_FORWARD[transform]
    try:
        ours = apply(ENTRIES[entry], case)(*tensors)
    except (RuntimeError, NotImplementedError):
        return
    assert_trees_close(ours, apply(four_sided, case)(*tensors))


# in_dims of (input, weight, bias); the batch of each is moved to the front, the back or the middle
VMAPS = {
    "input": (0, None, None),
    "input_at_3": (3, None, None),
    "input_at_minus_1": (-1, None, None),
    "weight": (None, 0, None),
    "weight_at_2": (None, 2, None),
    "weight_at_minus_1": (None, -1, None),
    "bias": (None, None, 0),
    "bias_at_1": (None, None, 1),
    "input_and_weight": (0, 0, None),
    "input_at_1_and_weight_at_2": (1, 2, None),
    "input_and_bias": (0, None, 0),
    "weight_and_bias": (None, 0, 0),
    "all": (0, 0, 0),
    "all_elsewhere": (2, 3, 1),
}
EVERY_VMAP = pytest.mark.parametrize("dims", VMAPS)
VMAP_CASES = (*TINY, BY_NAME["depthwise"], BY_NAME["K129_NPQ129"], BY_NAME["1x1_strided_padded"])


def batched(case: Case, dims: str, device: str, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors with a batch of `size` at the places that `dims` names."""
    made = []
    for shape, dim, seed in zip((case.input_size, case.weight_size, (case.K,)), VMAPS[dims], (1, 2, 3), strict=True):
        if dim is None:
            made.append(case.draw(shape, dtype, seed).to(device))
        else:
            made.append(case.draw((size, *shape), dtype, seed).to(device).movedim(0, dim).contiguous())
    return made[0], made[1], made[2]


def looped(function: Callable[..., Tensor], dims: str, tensors: tuple[Tensor, ...], size: int) -> Tensor:
    """What vmap means: one call an element of the batch, stacked."""
    return torch.stack([
        function(*(t if d is None else t.select(d, i) for t, d in zip(tensors, VMAPS[dims], strict=True)))
        for i in range(size)
    ])  # fmt: skip


@EVERY_VMAP
@pytest.mark.parametrize("case", VMAP_CASES, ids=str)
def test_vmap_agrees_with_a_loop_over_torchs_convolution(case: Case, dims: str, device: str) -> None:
    tensors = batched(case, dims, device, 3, torch.float64)
    ours = torch.vmap(f(conv2d_ext.conv2d, case), VMAPS[dims])(*tensors)
    assert error(ours, looped(f(four_sided, case), dims, tensors, 3)) <= 1e-12


@EVERY_VMAP
@pytest.mark.parametrize("size", (0, 1))
def test_vmap_over_no_and_one_element_agrees_with_torch(size: int, dims: str, device: str) -> None:
    case = TINY[2]
    tensors = batched(case, dims, device, size, torch.float64)
    if size == 0:
        with pytest.raises(Exception):  # noqa: B017  (torch.stack of nothing: the loop has no answer)
            looped(f(four_sided, case), dims, tensors, size)
        assert torch.vmap(f(conv2d_ext.conv2d, case), VMAPS[dims])(*tensors).shape == (0, *case.output_size)
        return
    ours = torch.vmap(f(conv2d_ext.conv2d, case), VMAPS[dims])(*tensors)
    assert error(ours, looped(f(four_sided, case), dims, tensors, size)) <= 1e-12


@EVERY_VMAP
def test_vmap_of_the_raw_operator_is_right(dims: str, device: str) -> None:
    case = TINY[2]
    tensors = batched(case, dims, device, 3, torch.float64)
    ours = torch.vmap(f(torch.ops.conv2d_ext.conv2d, case), VMAPS[dims])(*tensors)
    assert error(ours, looped(f(four_sided, case), dims, tensors, 3)) <= 1e-12


@EVERY_VMAP
@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradients_for_each_element_agree_with_a_loop(case: Case, dims: str, device: str) -> None:
    """Per-sample gradients: vmap of grad."""
    tensors = batched(case, dims, device, 3, torch.float64)
    ours = torch.vmap(torch.func.grad(f_sum(conv2d_ext.conv2d, case), (0, 1, 2)), VMAPS[dims])(*tensors)
    gradient = torch.func.grad(f_sum(four_sided, case), (0, 1, 2))
    for k, mine in enumerate(ours):
        assert error(mine, looped(lambda *t, k=k: gradient(*t)[k], dims, tensors, 3)) <= 1e-11


@EVERY_VMAP
def test_gradients_through_vmap_agree_with_a_loop(dims: str, device: str) -> None:
    """grad of vmap, by both torch.func and autograd."""
    case = TINY[4]
    tensors = batched(case, dims, device, 3, torch.float64)

    def loss(function: Callable[..., Tensor], *t: Tensor) -> Tensor:
        return torch.vmap(f(function, case), VMAPS[dims])(*t).pow(2).sum()

    expected_leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(
        looped(f(four_sided, case), dims, tuple(expected_leaves), 3).pow(2).sum(), expected_leaves
    )
    by_func = torch.func.grad(functools.partial(loss, conv2d_ext.conv2d), (0, 1, 2))(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    by_autograd = torch.autograd.grad(loss(conv2d_ext.conv2d, *leaves), leaves)
    assert_trees_close(by_func, expected)
    assert_trees_close(by_autograd, expected)


@pytest.mark.parametrize("outer", ("input", "weight", "bias", "all"))
@pytest.mark.parametrize("inner", ("input", "weight", "bias", "all"))
def test_nested_vmap_agrees_with_nested_loops(inner: str, outer: str, device: str) -> None:
    case = TINY[2]
    index = {"input": 0, "weight": 1, "bias": 2}
    tensors = list(case.tensors(device, torch.float64))
    for which, size in ((inner, 2), (outer, 3)):  # the inner batch first, then the outer one before it
        for name, i in index.items():
            if which in (name, "all"):
                tensors[i] = torch.stack([tensors[i] * (1 + 0.3 * k) for k in range(size)])
    dims = [tuple(0 if which in (name, "all") else None for name in index) for which in (inner, outer)]
    nested = torch.vmap(torch.vmap(f(conv2d_ext.conv2d, case), dims[0]), dims[1])(*tensors)
    theirs = torch.vmap(torch.vmap(f(four_sided, case), dims[0]), dims[1])(*tensors)
    assert error(nested, theirs) <= 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", ("input", "weight", "all"))
def test_vmap_keeps_the_dtype_and_its_accuracy(dims: str, dtype: torch.dtype, device: str) -> None:
    case = BY_NAME["groups2"]
    tensors = batched(case, dims, device, 3, dtype)
    ours = torch.vmap(f(conv2d_ext.conv2d, case), VMAPS[dims])(*tensors)
    theirs = looped(f(four_sided, case), dims, tuple(t.double().cpu() for t in tensors), 3)
    assert_close(ours, theirs, dtype, case.reduction("fprop"))


def test_vmap_over_an_ensemble_of_modules_agrees_with_a_loop(device: str) -> None:
    modules = [conv2d_ext.Conv2d(4, 6, 3, padding=1, device=device, dtype=torch.float64) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = torch.randn(2, 4, 5, 5, device=device, dtype=torch.float64)
    base = conv2d_ext.Conv2d(4, 6, 3, padding=1, device="meta", dtype=torch.float64)
    ours = torch.vmap(lambda p, q, x: torch.func.functional_call(base, (p, q), x), (0, 0, None))(parameters, buffers, x)
    assert error(ours, torch.stack([m(x) for m in modules])) <= 1e-12


def test_the_gradient_of_a_bias_added_to_16_bits_is_summed_in_float32(device: str) -> None:
    """A bfloat16 sum of ones stops at 256."""
    x = torch.zeros(1, 1, 40, 40, dtype=torch.bfloat16, device=device)
    w = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16, device=device)
    b = torch.zeros(1, dtype=torch.bfloat16, device=device, requires_grad=True)
    conv2d_ext.conv2d(x, w, b).sum().backward()
    assert float(b.grad) == 1600


@EVERY_ENTRY
@pytest.mark.parametrize("case", [c for c in FEW if not c.empty], ids=str)
def test_double_backward_in_float32_agrees_with_float64(case: Case, entry: str, device: str) -> None:
    def second(function: Callable[..., Tensor], dtype: torch.dtype, where: str) -> tuple[Tensor, ...]:
        x, w, b = (None if t is None else t.to(where, dtype).requires_grad_() for t in case.tensors())
        leaves = [t for t in (x, w, b) if t is not None]
        y = function(x, w, b, *case.args)
        grads = torch.autograd.grad(y, leaves, case.grad_output().to(where, dtype), create_graph=True)
        return torch.autograd.grad(grads[0].pow(2).sum() + grads[1].pow(2).sum(), leaves[:2])

    length = sum(case.reduction(op) for op in ("fprop", "dgrad", "wgrad"))
    for ours, theirs in zip(
        second(ENTRIES[entry], torch.float32, device), second(four_sided, torch.float64, "cpu"), strict=True
    ):
        assert error(ours, theirs) <= 2 * tolerance(torch.float32, length)


# ---- the road of plain tensors ---------------------------------------------------------------------------------------


class Looking(TorchDispatchMode):
    """Looks on, so that nothing takes the shorter road."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@EVERY_NEED
@pytest.mark.parametrize("case", FEW, ids=str)
def test_plain_tensors_get_the_bits_and_strides_that_others_get(
    case: Case, needed: tuple[str, ...], device: str
) -> None:
    for dtype, layout in ((torch.float32, "nchw"), (torch.float16, "nhwc")):
        x, w, b = case.tensors(device, dtype, layout)
        b = torch.ones(w.shape[0], device=device, dtype=dtype)
        leaves = [{"input": x, "weight": w, "bias": b}[name].requires_grad_() for name in needed]
        grad_output = case.grad_output(device, dtype, layout)
        results = []
        for looks_on in (nullcontext(), Looking()):
            with looks_on:
                y = conv2d_ext.conv2d(x, w, b, *case.args)
                results.append((y, *torch.autograd.grad(y, leaves, grad_output)))
        for ours, theirs in zip(*results, strict=True):
            assert same_bits(ours, theirs) and ours.stride() == theirs.stride()


def graph(device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    """Of a plain call: the output and the leaves."""
    x, w, b = (t.requires_grad_() for t in BY_NAME["groups2"].tensors(device, dtype))
    return conv2d_ext.conv2d(x, w, b, *BY_NAME["groups2"].args), [x, w, b]


def test_a_tangent_that_only_the_backward_pass_meets_is_not_lost(device: str) -> None:
    y, leaves = graph(device)
    tangent = torch.randn_like(y).detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.zeros_like(y), tangent)
        made = [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(y, leaves, dual, retain_graph=True)]
    for ours, expected in zip(made, torch.autograd.grad(y, leaves, tangent), strict=True):
        assert error(ours, expected) <= 1e-12


def test_batched_gradients_of_a_plain_call_agree_with_a_loop(device: str) -> None:
    y, leaves = graph(device)
    many = torch.randn(3, *y.shape, dtype=y.dtype, device=device)
    made = torch.autograd.grad(y, leaves, many, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in many]
    for ours, expected in zip(made, zip(*one_by_one, strict=True), strict=True):
        assert error(ours, torch.stack(expected)) <= 1e-12


def test_gradients_are_given_in_inference_mode_too(device: str) -> None:
    """Kernels for the Autograd keys are passed over there."""
    y, leaves = graph(device)
    grad_output = torch.randn_like(y).detach()
    with torch.inference_mode():
        made = torch.autograd.grad(y, leaves, grad_output, retain_graph=True)
    for ours, expected in zip(made, torch.autograd.grad(y, leaves, grad_output), strict=True):
        assert same_bits(ours, expected)


def test_flops_are_counted_where_only_the_backward_pass_is_looked_at(device: str) -> None:
    case = BY_NAME["groups2"]
    y, leaves = graph(device)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y.sum(), leaves)
    assert counter.get_total_flops() == 4 * case.N * case.K * case.P * case.Q * case.reduction("fprop")


class Names(TorchDispatchMode):
    """Of the ops that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def test_no_derivative_of_a_plain_call_ends_in_torchs_convolution(device: str) -> None:
    y, leaves = graph(device)
    with Names() as first:
        gradients = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
    with Names() as second:
        torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), leaves)
    assert {"conv2d_ext::dgrad", "conv2d_ext::wgrad"} <= first.seen
    assert {"conv2d_ext::fprop", "conv2d_ext::dgrad", "conv2d_ext::wgrad"} <= second.seen
    assert not [name for name in first.seen | second.seen if name.startswith("aten::") and "conv" in name]


def test_torchs_op_for_other_backends_refuses_calls_that_are_not_ours(device: str) -> None:
    """Its autograd node serves plain calls (csrc/ops/eager.h)."""
    x, w = torch.ones(1, 1, 4, 4, device=device), torch.ones(1, 1, 2, 2, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="convolution_overrideable: stride: expected .*conv2d_ext"):
        torch.ops.aten.convolution_overrideable(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def test_numbers_beyond_a_byte_go_by_the_other_road(device: str) -> None:
    x, w = torch.ones(1, 1, 400, 3, device=device), torch.ones(1, 1, 2, 1, device=device).requires_grad_()
    y = conv2d_ext.conv2d(x, w, None, (300, 1), (130, 0), (255, 1))
    (grad,) = torch.autograd.grad(y.sum(), w)
    expected = torch.nn.functional.conv2d(x, w, None, (300, 1), (130, 0), (255, 1))
    assert torch.equal(y, expected)
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), w)[0])
