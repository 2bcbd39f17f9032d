"""conv2d's ways to say the same thing: ints and tuples, names of paddings, images without a batch, autocast, flags."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, DTYPES, Case
from reference import assert_close, error, four_sided, same_bits, tolerance
from torch import Tensor

import conv2d_ext


def draw(device: str, *size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, dtype=torch.float64).to(device, dtype)


@pytest.mark.parametrize("name", ("stride", "padding", "dilation"))
def test_an_integer_a_pair_and_a_list_of_one_or_two_mean_the_same(name: str, device: str) -> None:
    x, w, b = draw(device, 2, 3, 11, 12), draw(device, 4, 3, 3, 2), draw(device, 4)
    expected = F.conv2d(x, w, b, **{name: 2})  # type: ignore[arg-type]
    for value in (2, (2,), [2], (2, 2), [2, 2], torch.Size((2, 2))):
        assert error(conv2d_ext.conv2d(x, w, b, **{name: value}), expected) <= 1e-13  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ("stride", "padding", "dilation"))
def test_the_first_of_a_pair_is_for_the_height(name: str, device: str) -> None:
    x, w = draw(device, 1, 3, 11, 12), draw(device, 4, 3, 3, 2)
    value = (2, 1) if name != "padding" else (2, 0)
    y = conv2d_ext.conv2d(x, w, None, **{name: value})  # type: ignore[arg-type]
    assert error(y, F.conv2d(x, w, None, **{name: value})) <= 1e-13  # type: ignore[arg-type]


def test_integers_of_numpy_and_of_torch_are_integers(device: str) -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    x, w = draw(device, 1, 4, 7, 7), draw(device, 4, 2, 3, 3)
    y = conv2d_ext.conv2d(x, w, None, numpy.int64(2), (numpy.int32(1), 1), 1, numpy.int64(2))
    assert error(y, F.conv2d(x, w, None, 2, 1, 1, 2)) <= 1e-13
    assert error(conv2d_ext.conv2d(x, w, None, torch.tensor(2), groups=2), F.conv2d(x, w, None, 2, groups=2)) <= 1e-13


@pytest.mark.parametrize("kernel", ((1, 1), (2, 2), (3, 3), (4, 5), (5, 4), (3, 1), (1, 6)), ids=str)
@pytest.mark.parametrize("dilation", (1, 2, (3, 1), (1, 4)), ids=str)
@pytest.mark.parametrize("groups", (1, 2))
def test_same_padding_is_that_of_torch(
    kernel: tuple[int, int], dilation: int | tuple[int, int], groups: int, device: str
) -> None:
    """Where the window is even, the odd pixel goes to the bottom and to the right."""
    x, w, b = draw(device, 2, 4, 7, 8), draw(device, 6, 4 // groups, *kernel), draw(device, 6)
    y = conv2d_ext.conv2d(x, w, b, padding="same", dilation=dilation, groups=groups)
    assert y.shape == (2, 6, 7, 8)
    assert error(y, F.conv2d(x, w, b, padding="same", dilation=dilation, groups=groups)) <= 1e-13


@pytest.mark.parametrize("stride", (1, 2, (3, 1)), ids=str)
def test_valid_padding_is_none(stride: int | tuple[int, int], device: str) -> None:
    x, w = draw(device, 2, 4, 7, 8), draw(device, 6, 4, 3, 2)
    y = conv2d_ext.conv2d(x, w, stride=stride, padding="valid")
    assert same_bits(y, conv2d_ext.conv2d(x, w, stride=stride, padding=0))
    assert error(y, F.conv2d(x, w, stride=stride, padding="valid")) <= 1e-13


@pytest.mark.parametrize("case", [c for c in CASES if len(c.padding) == 4], ids=str)
def test_four_paddings_are_top_bottom_left_and_right(case: Case, device: str) -> None:
    x, w, b = case.tensors(device, torch.float64)
    top, bottom, left, right = case.padding
    padded = F.pad(x, (left, right, top, bottom))
    y = conv2d_ext.conv2d(x, w, b, case.stride, case.padding, case.dilation, case.groups)
    assert error(y, F.conv2d(padded, w, b, case.stride, 0, case.dilation, case.groups)) <= 1e-13


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.N == 1], ids=str)
def test_an_image_without_a_batch_gives_a_result_without_one(case: Case, dtype: torch.dtype, device: str) -> None:
    x, w, b = case.tensors(device, dtype)
    y = conv2d_ext.conv2d(x[0], w, b, *case.args)
    assert same_bits(y, conv2d_ext.conv2d(x, w, b, *case.args)[0])


def test_gradients_of_an_image_without_a_batch_have_its_shape(device: str) -> None:
    x, w = draw(device, 3, 6, 7).requires_grad_(), draw(device, 4, 3, 3, 3).requires_grad_()
    ours = torch.autograd.grad(conv2d_ext.conv2d(x, w, None, 1, "same").pow(2).sum(), (x, w))
    theirs = torch.autograd.grad(F.conv2d(x, w, None, 1, "same").pow(2).sum(), (x, w))
    for mine, other in zip(ours, theirs, strict=True):
        assert error(mine, other) <= 1e-12


def test_all_arguments_may_be_passed_by_name_or_by_place(device: str) -> None:
    x, w, b = draw(device, 2, 4, 9, 9), draw(device, 6, 2, 3, 3), draw(device, 6)
    named = conv2d_ext.conv2d(input=x, weight=w, bias=b, stride=2, padding=(1, 0), dilation=(1, 2), groups=2)
    assert same_bits(named, conv2d_ext.conv2d(x, w, b, 2, (1, 0), (1, 2), 2))
    assert error(named, F.conv2d(x, w, b, 2, (1, 0), (1, 2), 2)) <= 1e-13


AUTOCAST = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("entry", ("conv2d", "torch.ops"))
@pytest.mark.parametrize("lower", AUTOCAST, ids=str)
@pytest.mark.parametrize("grad", (False, True))
def test_autocast_casts_as_for_torchs_convolution(grad: bool, lower: torch.dtype, entry: str, device: str) -> None:
    case = BY_NAME["3x3"]
    function = {"conv2d": conv2d_ext.conv2d, "torch.ops": torch.ops.conv2d_ext.conv2d}[entry]
    x, w, b = (t.requires_grad_(grad) for t in case.tensors(device))
    with torch.autocast(device, dtype=lower):
        y = function(x, w, b, *case.args)
    assert y.dtype == lower and y.requires_grad == grad
    with torch.no_grad():
        assert same_bits(y, function(x.to(lower), w.to(lower), b.to(lower), *case.args))
    if grad:
        y.float().sum().backward()
        assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32


def test_autocast_unites_mixed_dtypes_and_leaves_double_alone(device: str) -> None:
    case = BY_NAME["3x3"]
    x, w, b = case.tensors(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert conv2d_ext.conv2d(x.bfloat16(), w, b.half(), *case.args).dtype == torch.bfloat16
        wide = conv2d_ext.conv2d(x.double(), w.double(), b.double(), *case.args)
        with torch.autocast(device, enabled=False):
            assert conv2d_ext.conv2d(x, w, b, *case.args).dtype == torch.float32
    assert wide.dtype == torch.float64


def test_autocast_of_another_device_changes_nothing(device: str) -> None:
    if device == "cpu" and not torch.cuda.is_available():
        # Without a GPU torch disables a CUDA region with a warning; what is tested is that float32 stays.
        context = pytest.warns(UserWarning)
    else:
        context = torch.autocast("cpu" if device == "cuda" else "cuda", dtype=torch.bfloat16)
    case = BY_NAME["3x3"]
    with context:
        if device == "cpu" and not torch.cuda.is_available():
            with torch.autocast("cuda", dtype=torch.bfloat16):
                y = conv2d_ext.conv2d(*case.tensors(device), *case.args)
        else:
            y = conv2d_ext.conv2d(*case.tensors(device), *case.args)
    assert y.dtype == torch.float32


def test_mixed_dtypes_without_autocast_are_refused(device: str) -> None:
    x, w, b = BY_NAME["3x3"].tensors(device)
    for tensors in ((x.half(), w, b), (x, w.double(), b), (x, w, b.bfloat16())):
        with pytest.raises(RuntimeError, match="input|weight|bias"):
            conv2d_ext.conv2d(*tensors)


def test_strict_float32_is_strict_and_tf32_is_taken_only_where_the_flag_allows(device: str) -> None:
    """The flag has no meaning on a CPU. On a GPU, TF32 keeps 11 bits of each operand."""
    case = BY_NAME["long_channels"]
    x, w, b = case.tensors(device)
    truth = four_sided(x.double().cpu(), w.double().cpu(), b.double().cpu(), *case.args)
    for precision in ("ieee", "tf32"):
        torch.backends.cudnn.conv.fp32_precision = precision
        allowed = tolerance(torch.float32, case.reduction("fprop"))
        if precision == "tf32" and device == "cuda":
            allowed += 2 * 2.0**-11
        assert error(conv2d_ext.conv2d(x, w, b, *case.args), truth) <= allowed


@pytest.mark.parametrize("flag", (True, False))
@pytest.mark.parametrize("api", ("older", "newer"))
def test_both_ways_to_set_the_tf32_flag_are_followed_and_stay_readable(
    api: str, flag: bool, device: str, package_environment: dict[str, str]
) -> None:
    """torch refuses to read the older flag once the newer ones differ, so a reader must use the newer one."""
    program = f"""
import torch, conv2d_ext
from conv2d_ext.functional import tf32_allowed
if {api == "older"}:
    torch.backends.cudnn.allow_tf32 = {flag}
else:
    torch.backends.cudnn.conv.fp32_precision = "tf32" if {flag} else "ieee"
x, w = torch.ones(1, 4, 5, 5, device="{device}"), torch.ones(3, 4, 3, 3, device="{device}")
assert (conv2d_ext.conv2d(x, w) == 36).all()
assert tf32_allowed(x) == ({flag} and x.is_cuda)
assert not tf32_allowed(x.double()) and not tf32_allowed(x.half())
if {api == "older"}:
    assert torch.backends.cudnn.allow_tf32 is {flag}
else:
    assert torch.backends.cudnn.conv.fp32_precision == ("tf32" if {flag} else "ieee")
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, env=package_environment
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_result_does_not_depend_on_torchs_other_switches(device: str) -> None:
    """Deterministic algorithms, the precision of matrix products and oneDNN's switch are for torch's own operators."""
    case = BY_NAME["3x3"]
    y = conv2d_ext.conv2d(*case.tensors(device), *case.args)
    before = torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    try:
        assert same_bits(y, conv2d_ext.conv2d(*case.tensors(device), *case.args))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(before)
    with torch.backends.mkldnn.flags(enabled=False):
        again = conv2d_ext.conv2d(*case.tensors(device), *case.args)
    assert error(again, y.double()) <= tolerance(torch.float32, case.reduction("fprop"))


def test_functions_and_subclasses_of_tensor_are_respected(device: str) -> None:
    """A torch-function mode or a tensor subclass sees the call by its public name."""

    class Logged(Tensor):
        seen: list[object] = []

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    case = BY_NAME["3x3"]
    x, w, b = case.tensors(device)
    y = conv2d_ext.conv2d(x.as_subclass(Logged), w, b, *case.args)
    assert isinstance(y, Logged) and conv2d_ext.conv2d in Logged.seen
    assert same_bits(y.as_subclass(Tensor), conv2d_ext.conv2d(x, w, b, *case.args))


def test_parameters_are_read_like_tensors(device: str) -> None:
    case = BY_NAME["3x3"]
    x, w, b = case.tensors(device)
    y = conv2d_ext.conv2d(x, torch.nn.Parameter(w), torch.nn.Parameter(b), *case.args)
    assert same_bits(y.detach(), conv2d_ext.conv2d(x, w, b, *case.args))


@pytest.mark.parametrize("view", ("conj", "neg"))
def test_a_lazily_negated_view_is_resolved(view: str, device: str) -> None:
    """The imaginary part of a conjugate is a view with a bit that says: negate on reading."""
    value = torch.randn(2, 4, 5, 5, dtype=torch.complex64).to(device)
    x = value.conj().imag if view == "neg" else value.conj().real
    w = torch.randn(3, 4, 3, 3).to(device)
    y = conv2d_ext.conv2d(x, w)
    expected = F.conv2d(x.clone().double().cpu(), w.double().cpu())
    assert_close(y, expected, torch.float32, 36)


def test_calls_from_several_threads_do_not_disturb_each_other(device: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    cases = [c for c in CASES if not c.empty][:16]
    expected = [conv2d_ext.conv2d(*c.tensors(device), *c.args) for c in cases]
    run = functools.partial(lambda c: conv2d_ext.conv2d(*c.tensors(device), *c.args))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for case, a, b in zip(cases, expected, pool.map(run, cases), strict=True):
                assert error(b, a.double()) <= tolerance(torch.float32, case.reduction("fprop"))


def test_what_equals_a_number_that_was_taken_before_is_refused_all_the_same(device: str) -> None:
    """conv2d remembers the arguments that it has read."""
    x, w = torch.ones(1, 2, 5, 5, device=device), torch.ones(2, 2, 3, 3, device=device)
    tuples = ((1, 1), (1, 1), (1, 1), 1)
    for good in ((1, 1, 1, 1), tuples):
        for _ in range(2):
            conv2d_ext.conv2d(x, w, None, *good)
        for place in range(4):
            for wrong in (True, 1.0, (True, 1), (1, 1.0)):
                arguments = [wrong if i == place else value for i, value in enumerate(good)]
                with pytest.raises(TypeError, match="expected an integer"):
                    conv2d_ext.conv2d(x, w, None, *arguments)
