"""The exact result of a case, torch's own result for it, and the error that rounding allows."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor

# scripts/sanitize.py sets it. Each launch and allocation is slow then: results are compared on the CPU, once.
SANITIZING = "CONV2D_EXT_SANITIZING" in os.environ


@dataclasses.dataclass(frozen=True)
class Result:
    """A forward result and the gradients of (output * grad_output).sum()."""

    output: Tensor
    grad_input: Tensor
    grad_weight: Tensor
    grad_bias: Tensor | None


def four_sided(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """F.conv2d, with padding of four entries done by F.pad."""
    if len(padding) == 4:
        top, bottom, left, right = padding
        input, padding = F.pad(input, (left, right, top, bottom)), (0, 0)
    return F.conv2d(input, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)


def result(case: Case, input: Tensor, weight: Tensor, bias: Tensor | None, grad_output: Tensor) -> Result:
    """torch's output and gradients for one case."""
    with torch.no_grad():
        output = output_of(case, input, weight, bias)
        grad_input, grad_weight = gradients_of(case, input, weight, grad_output)
        return Result(output, grad_input, grad_weight, None if bias is None else grad_output.sum((0, 2, 3)))


def output_of(case: Case, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The output alone. Where F.conv2d refuses an empty tensor, the definition is used."""
    if case.empty:
        output = input.new_zeros(case.output_size)
        return output if bias is None else output + bias.view(1, -1, 1, 1)
    return four_sided(input, weight, bias, *case.args)


def gradients_of(case: Case, input: Tensor, weight: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """(grad_input, grad_weight) alone, as autograd would ask for them. Its first call imports SymPy, for seconds."""
    if case.empty:
        return torch.zeros_like(input), torch.zeros_like(weight)
    top, bottom, left, right = case.padding4
    inner = (top, left)
    if len(case.padding) == 4:
        input, inner = F.pad(input, (left, right, top, bottom)), (0, 0)
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        *(grad_output, input, weight, None, case.stride, inner, case.dilation, False, (0, 0), case.groups),
        (True, True, False),
    )
    if len(case.padding) == 4:
        grad_input = grad_input[:, :, top : top + case.H, left : left + case.W]
    return grad_input, grad_weight


def wide(t: Tensor | None) -> Tensor | None:
    """In float64 on the CPU, contiguous: some of ATen's float64 kernels there refuse other strides."""
    return None if t is None else t.detach().double().cpu().contiguous()


def of_tensors(case: Case, input: Tensor, weight: Tensor, bias: Tensor | None, grad_output: Tensor) -> Result:
    """The result in float64 of tensors that are not the case's own."""
    return result(case, wide(input), wide(weight), wide(bias), wide(grad_output))  # type: ignore[arg-type]


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """ATen's own convolutions, on a GPU as well: the reference owes nothing to the library that is compared with ours,
    and no time goes into that library's choice for each new shape."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@functools.lru_cache(maxsize=16)
def exact(case: Case, dtype: torch.dtype, seed: int = 0, integers: bool = False, device: str = "cpu") -> Result:
    """The result in float64, made on `device`, of the case's values as they are once rounded to `dtype`."""
    values = (
        *case.tensors(device, dtype, "nchw", seed, integers),
        case.grad_output(device, dtype, "nchw", seed, integers),
    )
    x, w, b, go = (None if t is None else t.double().contiguous() for t in values)
    with without_cudnn():
        return result(case, x, w, b, go)  # type: ignore[arg-type]


SLICE_BITS, SLICES = 17, 4


def slices(t: Tensor) -> list[Tensor]:
    """Tensors of few bits that add up to the float64 `t`: multiples of 2^-17, 2^-34, ... of a power of two above it."""
    unit = 2.0 ** math.ceil(math.log2(float(t.abs().max()) + 1e-300))
    found = []
    for _ in range(SLICES):
        unit *= 2.0**-SLICE_BITS
        found.append((t / unit).round() * unit)
        t = t - found[-1]  # exact: the bits below
    return found


@functools.lru_cache(maxsize=16)
def exact_parts(case: Case, of_output: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """The output of the float64 values, or the gradients, each as an unevaluated sum of two float64 tensors.

    That is far closer than either alone. The operands are cut into slices of 17 bits; the products of two slices, and
    sums of 2^17 of them, are exact in float64, whatever the order in which torch adds. What those partial results lose
    when added is kept in the second tensor. Slices whose products are below 2^-68 of the largest are left out.
    """
    x, w, b = case.tensors("cpu", torch.float64, "nchw")
    go = case.grad_output("cpu", torch.float64, "nchw")
    if case.empty:
        whole = vars(result(case, x, w, b, go))
        return {name: (t, torch.zeros_like(t)) for name, t in whole.items() if t is not None}
    xs, ws, gos = slices(x), slices(w), slices(go)
    pairs = [(i, j) for i in range(SLICES) for j in range(SLICES - i)]
    if of_output:
        outputs = [output_of(case, xs[i], ws[j], None) for i, j in pairs]
        bias = [] if b is None else [b.view(1, -1, 1, 1).expand(case.output_size)]
        return {"output": two_part_sum(outputs + bias)}
    parts = [gradients_of(case, xs[j], ws[j], gos[i]) for i, j in pairs]
    return {
        name: two_part_sum(terms)
        for name, terms in zip(("grad_input", "grad_weight"), zip(*parts, strict=True), strict=True)
    }


def two_part_sum(terms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum as a rounded one and what rounding left out (Knuth's two-sum)."""
    high, low = torch.zeros_like(terms[0]), torch.zeros_like(terms[0])
    for t in terms:
        total = high + t
        back = total - high
        low = low + ((high - (total - back)) + (t - back))
        high = total
    return high, low


def distance(value: Tensor, case: Case, dtype: torch.dtype, what: str) -> float:
    """The error of a result of the case, where a float64 one is measured by a finer reference than float64."""
    if dtype == torch.float64:
        return error(value, *exact_parts(case, what == "output")[what])
    return error(value, getattr(exact(case, dtype, device=value.device.type), what))


@functools.lru_cache(maxsize=4)
def torchs_gradients(case: Case, dtype: torch.dtype, device: str, layout: str) -> tuple[Tensor, Tensor]:
    """What torch itself makes of the case, in the same dtype and layout: (grad_input, grad_weight).

    On a CPU 16-bit types are computed in float32 and rounded once, because torch's own 16-bit CPU convolution ends the
    process on some shapes.
    """
    x, w, _ = case.tensors(device, dtype, layout)
    go = case.grad_output(device, dtype, layout)
    if device != "cpu" or dtype in (torch.float32, torch.float64):
        return gradients_of(case, x, w, go)
    grad_input, grad_weight = gradients_of(case, x.float(), w.float(), go.float())
    return grad_input.to(dtype), grad_weight.to(dtype)


@functools.lru_cache(maxsize=4)
def torchs_output(case: Case, dtype: torch.dtype, device: str, layout: str) -> Tensor:
    """The same for the output."""
    x, w, b = case.tensors(device, dtype, layout)
    if device != "cpu" or dtype in (torch.float32, torch.float64):
        return output_of(case, x, w, b)
    return output_of(case, x.float(), w.float(), None if b is None else b.float()).to(dtype)


def layout_to_compare(case: Case, device: str, layout: str) -> str:
    """The layout in which torch is asked for results whose rounding errors are compared with ours.

    On the CPU our grouped convolutions run ATen's of NCHW (csrc/ops/cpu.cpp), whose sums have another order than those
    of channels_last.
    """
    return "nchw" if device == "cpu" and case.groups > 1 else layout


def error(value: Tensor, expected: Tensor, low: Tensor | None = None) -> float:
    """Norm of the difference over norm of `expected`, in float64; where that is zero, the norm of the difference.

    `low`: what is to be added to a float64 `expected` and would be lost in it.
    """
    assert value.shape == expected.shape, f"shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
    value = value.detach().cpu() if SANITIZING else value.detach()
    expected = expected.detach().double().to(value.device)
    gap = value.double() - expected
    gap = gap if low is None else gap - low.to(value.device)
    norms = torch.stack([torch.linalg.vector_norm(gap), torch.linalg.vector_norm(expected)])
    difference, scale = norms.tolist()  # a single wait for the GPU, which other processes of the run share
    ratio = difference / scale if scale > 0 else difference
    return ratio if math.isfinite(ratio) else math.inf


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to nearest in `dtype`."""
    return torch.finfo(dtype).eps / 2


def ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def tolerance(dtype: torch.dtype, length: int) -> float:
    """The error that a sum of `length` products of random signs may have, rounded once to `dtype` at the end.

    Partial sums of k such products grow as sqrt(k), each addition adds at most one unit of the accumulator's type of
    that, with a random sign: sqrt(length / 2) units in all. Four times that leaves room for an unlucky draw and for the
    bias. The accumulator is float32 for float32 and the 16-bit types.

    Tensor cores, which serve the 16-bit types alone, cut where others round: up to two units for each 16 products, all
    towards zero, so length / 12 units in all. Rounding to a 16-bit type takes about 0.43 of the unit allowed for it,
    as a norm; the rest is 4600 units of float32 or more.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return unit(dtype) + 4 * math.sqrt(length / 2 + 1) * unit(accumulator)


def assert_close(value: Tensor, expected: Tensor, dtype: torch.dtype, length: int, what: str = "result") -> None:
    assert value.dtype == dtype, f"{what} has dtype {value.dtype}, expected {dtype}"
    allowed, found = tolerance(dtype, length), error(value, expected)
    assert found <= allowed, f"{what}: error {found:.3g} against float64, allowed {allowed:.3g}"


def bits(t: Tensor) -> Tensor:
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit by bit, NaN included."""
    return a.shape == b.shape and torch.equal(bits(a), bits(b))
