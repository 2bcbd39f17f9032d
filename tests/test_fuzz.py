"""Random shapes, strides, views and dtypes, in NaN-filled buffers, against float64. `--fuzz N` sets the examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from calls import dgrad, wgrad
from cases import DTYPES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import place
from reference import error, four_sided, of_tensors, same_bits, unit, without_cudnn
from torch import Tensor

import conv2d_ext

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.timeout(0)]

Check = Callable[[Case, torch.dtype, "tuple[Memory, ...]", bool, int], None]
CHANNELS = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 7, 8, 8, 12, 16, 17, 24, 33])
KERNEL = st.sampled_from([1, 1, 2, 3, 3, 4, 5, 7])


@dataclasses.dataclass(frozen=True)
class Memory:
    """How one tensor lies in memory; see layouts.place."""

    order: tuple[int, ...]
    step: tuple[int, ...]
    margin: tuple[int, ...]
    offset: int
    expanded: tuple[int, ...]


ORDERS = st.one_of(st.sampled_from([(0, 1, 2, 3), (0, 2, 3, 1)]), st.permutations(range(4)).map(tuple))
MEMORIES = st.builds(
    Memory,
    order=ORDERS,
    step=st.one_of(st.just((1, 1, 1, 1)), st.tuples(*[st.integers(1, 3)] * 4)),
    margin=st.one_of(st.just((0, 0, 0, 0)), st.tuples(*[st.integers(0, 3)] * 4)),
    offset=st.integers(0, 9),
    expanded=st.one_of(
        st.just(()), st.just(()), st.sets(st.integers(0, 3), max_size=4).map(lambda s: tuple(sorted(s)))
    ),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 4]))
    shape = draw(st.sampled_from(["any", "depthwise", "any"]))
    if shape == "depthwise":
        C = groups = draw(st.integers(1, 12))
        K = C * draw(st.integers(1, 3))
    else:
        C, K = groups * draw(CHANNELS), groups * draw(CHANNELS)
    R, S = draw(KERNEL), draw(KERNEL)
    stride = draw(st.tuples(*[st.sampled_from([1, 1, 2, 3, 4, 6])] * 2))
    dilation = draw(st.tuples(*[st.sampled_from([1, 1, 2, 3, 4])] * 2))
    padding = draw(st.one_of(st.tuples(*[st.integers(0, 4)] * 2), st.tuples(*[st.integers(0, 4)] * 4)))
    N = draw(st.sampled_from([0, 1, 1, 2, 3, 5]))
    case = Case("fuzz", N, C, 1, 1, K, R, S, stride, padding, dilation, groups, draw(st.booleans()))
    top, bottom, left, right = case.padding4
    least_h = max(0, (R - 1) * dilation[0] + 1 - top - bottom)
    least_w = max(0, (S - 1) * dilation[1] + 1 - left - right)
    return dataclasses.replace(case, H=least_h + draw(st.integers(0, 14)), W=least_w + draw(st.integers(0, 14)))


def lay(value: Tensor, memory: Memory, device: str) -> Tensor:
    """The values in that memory; an expanded dimension repeats its first index."""
    dims = [d for d in memory.expanded if value.shape[d] > 0]
    narrow = value
    for d in dims:
        narrow = narrow.narrow(d, 0, 1)
    return place(narrow, device, memory.order, memory.step, memory.margin, memory.offset).expand(value.shape)


def check(what: str, value: Tensor, expected: Tensor, scale: Tensor, dtype: torch.dtype, length: int) -> None:
    """Element by element. `scale` is the sum of the absolute values of the `length` terms.

    Terms from expanded tensors are equal, and their rounding errors have one sign: the bound is that for any terms, one
    unit of the accumulator's type for each addition, and not the smaller one for random signs.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    assert value.dtype == dtype and value.shape == expected.shape, what
    difference = (value.double().cpu() - expected).abs()
    # Twice, since the float64 reference is rounded as well, and the bias is one more term.
    allowed = unit(dtype) * expected.abs() + 2 * (length + 2) * unit(accumulator) * scale
    allowed = 1.01 * allowed + torch.finfo(dtype).smallest_normal
    worst = (difference - allowed).max() if difference.numel() else torch.zeros(())
    assert bool(worst <= 0), f"{what}: beyond the allowed error by {float(worst):.3g}"


@pytest.fixture(scope="module")
def one_example(device: str) -> Check:
    def run(case: Case, dtype: torch.dtype, memories: tuple[Memory, ...], integers: bool, seed: int) -> None:
        x = lay(case.draw(case.input_size, dtype, seed, integers), memories[0], device)
        w = lay(case.draw(case.weight_size, dtype, seed + 1, integers), memories[1], device)
        go = lay(case.draw(case.output_size, dtype, seed + 3, integers), memories[2], device)
        b = case.draw((case.K,), dtype, seed + 2, integers).to(device) if case.bias else None
        before = [t.clone() for t in (x, w, go)]
        y = conv2d_ext.conv2d(x, w, b, *case.args)
        gx, gw = dgrad(case, go, w), wgrad(case, go, x)
        truth = of_tensors(case, x, w, b, go)
        scale = of_tensors(case, x.abs(), w.abs(), None if b is None else b.abs(), go.abs())
        for what, value, exact, size, length in (
            ("output", y, truth.output, scale.output, case.reduction("fprop")),
            ("grad_input", gx, truth.grad_input, scale.grad_input, case.reduction("dgrad")),
            ("grad_weight", gw, truth.grad_weight, scale.grad_weight, case.reduction("wgrad")),
        ):
            if integers:
                assert torch.equal(value.cpu(), exact.to(dtype)), what
            else:
                check(what, value, exact, size, dtype, length)
        for t, then in zip((x, w, go), before, strict=True):
            assert same_bits(t, then)

    return run


def test_random_problems_agree_with_float64(one_example: Check, examples: int) -> None:
    @settings(max_examples=examples)
    @given(
        case=cases(),
        dtype=st.sampled_from(DTYPES),
        memories=st.tuples(MEMORIES, MEMORIES, MEMORIES),
        seed=st.integers(0, 2**16),
    )
    def run(case: Case, dtype: torch.dtype, memories: tuple[Memory, ...], seed: int) -> None:
        one_example(case, dtype, memories, False, seed)

    run()


def test_random_problems_of_small_integers_are_exact(one_example: Check, examples: int) -> None:
    @settings(max_examples=examples)
    @given(
        case=cases(),
        dtype=st.sampled_from(DTYPES),
        memories=st.tuples(MEMORIES, MEMORIES, MEMORIES),
        seed=st.integers(0, 2**16),
    )
    def run(case: Case, dtype: torch.dtype, memories: tuple[Memory, ...], seed: int) -> None:
        one_example(case, dtype, memories, True, seed)

    run()


def test_random_problems_have_the_gradients_of_torch(device: str, examples: int) -> None:
    """Through autograd, with bias, from views, for random sets of tensors that need a gradient."""

    @settings(max_examples=max(1, examples // 3))
    @given(case=cases().filter(lambda c: not c.empty), memories=st.tuples(MEMORIES, MEMORIES), needs=st.sets(
        st.integers(0, 2), min_size=1), seed=st.integers(0, 2**16))  # fmt: skip
    def run(case: Case, memories: tuple[Memory, ...], needs: set[int], seed: int) -> None:
        x = lay(case.draw(case.input_size, torch.float64, seed), memories[0], device)
        w = lay(case.draw(case.weight_size, torch.float64, seed + 1), memories[1], device)
        b = case.draw((case.K,), torch.float64, seed + 2).to(device)
        go = case.draw(case.output_size, torch.float64, seed + 3).to(device)
        tensors = [t.detach().requires_grad_(i in needs) for i, t in enumerate((x, w, b))]
        leaves = [t for t in tensors if t.requires_grad]
        ours = torch.autograd.grad(conv2d_ext.conv2d(*tensors, *case.args), leaves, go, create_graph=True)
        with without_cudnn():
            theirs = torch.autograd.grad(four_sided(*tensors, *case.args), leaves, go, create_graph=True)
        for mine, other in zip(ours, theirs, strict=True):
            assert error(mine, other) <= 1e-10
        if {0, 1} <= needs:  # the gradient of one of them depends on the other
            seconds = []
            for grads in (ours, theirs):
                total = sum(g.pow(2).sum() for g in grads)
                with without_cudnn():
                    seconds.append(torch.autograd.grad(total, leaves, allow_unused=True))
            for mine, other in zip(*seconds, strict=True):
                mine, other = (torch.zeros(()) if t is None else t for t in (mine, other))
                assert error(mine.sum(), other.sum()) <= 1e-8 or abs(float(mine.sum() - other.sum())) <= 1e-8

    run()
