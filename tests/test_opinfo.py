"""PyTorch's own samples for nn.functional.conv2d, as they come with the installed torch."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from reference import error, tolerance
from torch import Tensor

import conv2d_ext

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@functools.cache
def info() -> Any:
    # The import takes seconds, in each process that collects the tests.
    from torch.testing._internal.common_methods_invocations import op_db

    (found,) = (info for info in op_db if info.name == "nn.functional.conv2d")
    return found


def samples(device: str, dtype: torch.dtype, requires_grad: bool = False) -> list[tuple[Tensor, tuple, dict]]:
    torch.manual_seed(0)
    return [(s.input, s.args, s.kwargs) for s in info().sample_inputs(device, dtype, requires_grad=requires_grad)]


def double(value: object) -> object:
    return value.detach().double().cpu() if isinstance(value, Tensor) else value


def test_torch_still_ships_samples() -> None:
    assert len(samples("cpu", torch.float32)) >= 20


@EVERY_DTYPE
def test_the_samples_agree_with_float64(dtype: torch.dtype, device: str) -> None:
    for x, args, kwargs in samples(device, dtype):
        y = conv2d_ext.conv2d(x, *args, **kwargs)
        expected = F.conv2d(double(x), *(double(a) for a in args), **kwargs)
        length = args[0].shape[1:].numel()
        # make_tensor draws from [-9, 9] and not from a normal; signs are random all the same
        assert y.dtype == dtype
        assert error(y, expected) <= 2 * tolerance(dtype, length), (tuple(x.shape), kwargs)


@EVERY_DTYPE
def test_the_samples_may_be_passed_by_name(dtype: torch.dtype, device: str) -> None:
    for x, args, kwargs in samples(device, dtype):
        named = dict(zip(("weight", "bias"), args, strict=False))
        assert torch.equal(conv2d_ext.conv2d(input=x, **named, **kwargs), conv2d_ext.conv2d(x, *args, **kwargs))


@EVERY_DTYPE
def test_the_gradients_of_the_samples_agree_with_float64(dtype: torch.dtype, device: str) -> None:
    for x, args, kwargs in samples(device, dtype, requires_grad=True):
        leaves = [t for t in (x, *args) if t is not None]
        y = conv2d_ext.conv2d(x, *args, **kwargs)
        go = torch.randn(y.shape, dtype=torch.float64).to(dtype)
        ours = torch.autograd.grad(y, leaves, go.to(device))
        wide = [None if t is None else double(t).requires_grad_() for t in (x, *args)]
        theirs = torch.autograd.grad(F.conv2d(*wide, **kwargs), [t for t in wide if t is not None], go.double())
        for mine, other in zip(ours, theirs, strict=True):
            assert error(mine, other) <= 2 * tolerance(dtype, 300), (tuple(x.shape), kwargs)


def test_the_samples_give_the_same_results_with_noncontiguous_tensors(device: str) -> None:
    for sample in info().sample_inputs(device, torch.float64, requires_grad=False):
        odd = sample.noncontiguous()
        ours = conv2d_ext.conv2d(odd.input, *odd.args, **odd.kwargs)
        assert error(ours, conv2d_ext.conv2d(sample.input, *sample.args, **sample.kwargs)) <= 1e-12


def test_the_samples_pass_gradcheck(device: str) -> None:
    for x, args, kwargs in samples(device, torch.float64, requires_grad=True):
        leaves = [t for t in (x, *args) if t is not None]
        assert torch.autograd.gradcheck(
            lambda *t, kwargs=kwargs: conv2d_ext.conv2d(*t, **kwargs),
            leaves,
            fast_mode=True,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        assert torch.autograd.gradgradcheck(
            lambda *t, kwargs=kwargs: conv2d_ext.conv2d(*t, **kwargs), leaves, fast_mode=True, check_fwd_over_rev=True
        )


def test_the_error_samples_raise_as_torch_does(device: str) -> None:
    """torch's text names no argument; the type and the fact of the error are compared, and that ours names one."""
    torch.manual_seed(0)
    cases = list(info().error_inputs(device))
    assert len(cases) >= 8
    for case in cases:
        sample = case.sample_input
        with pytest.raises((RuntimeError, ValueError, TypeError)) as theirs:
            F.conv2d(sample.input, *sample.args, **sample.kwargs)
        with pytest.raises((RuntimeError, ValueError, TypeError)) as ours:
            conv2d_ext.conv2d(sample.input, *sample.args, **sample.kwargs)
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        assert any(name in str(ours.value) for name in names), f"{ours.value} (torch: {theirs.value})"


def test_complex_samples_are_refused(device: str) -> None:
    for x, args, kwargs in samples(device, torch.complex128):
        with pytest.raises(RuntimeError, match="conv2d: input: expected .*, got complex128"):
            conv2d_ext.conv2d(x, *args, **kwargs)


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.uint8, torch.bool), ids=str)
def test_integer_samples_are_refused(dtype: torch.dtype, device: str) -> None:
    x = torch.ones(1, 2, 4, 4, dtype=dtype, device=device)
    w = torch.ones(2, 2, 3, 3, dtype=dtype, device=device)
    with pytest.raises((RuntimeError, TypeError), match="input"):
        conv2d_ext.conv2d(x, w)


def test_the_parameters_are_those_of_torch_in_its_order() -> None:
    parameters = inspect.signature(conv2d_ext.conv2d).parameters
    assert list(parameters) == ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    assert [p.default for p in parameters.values()][2:] == [None, 1, 0, 1, 1]
