"""Bad arguments: an error that names the argument, what was wanted and what came; through every entry and the fakes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import bad_calls
import pytest
import torch
from bad_calls import ENTRIES, Bad, applicable, arguments, function
from torch._subclasses.fake_tensor import FakeTensorMode

import conv2d_ext

ERRORS = (RuntimeError, ValueError, TypeError)
SAFE = [
    pytest.param(entry, bad, id=f"{entry}-{bad.name}")
    for entry in ENTRIES
    for bad in applicable(entry)
    if not bad.dangerous
]
ALL = [pytest.param(entry, bad, id=f"{entry}-{bad.name}") for entry in ENTRIES for bad in applicable(entry)]


def complaint(text: str, entry: str, bad: Bad) -> str | None:
    """Why an error text is not good enough; None if it is."""
    operator = ENTRIES[entry][1]
    match = re.search(rf"{operator}: (\w+): expected .+, got .", text, re.DOTALL)
    if not match:
        return f"the text does not read '{operator}: <argument>: expected <what>, got <what>': {text}"
    if match.group(1) not in bad.named:
        return f"names {match.group(1)}, expected {' or '.join(bad.named)}: {text}"
    return None


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_good_arguments_that_bad_ones_replace_are_accepted(entry: str, device: str) -> None:
    result = function(entry)(*arguments(entry, device))
    assert result.isfinite().all()


@pytest.mark.parametrize("entry,bad", SAFE)
def test_a_bad_argument_is_named_with_what_was_wanted_and_what_came(entry: str, bad: Bad, device: str) -> None:
    if entry == "conv2d" and bad.name == "input of 3 dimensions":
        pytest.skip("an input of 3 dimensions is an unbatched one here")
    with pytest.raises(ERRORS) as caught:
        function(entry)(*arguments(entry, device, bad))
    why = complaint(str(caught.value), entry, bad)
    assert why is None, why


@pytest.mark.parametrize("entry", ENTRIES)
def test_dangerous_arguments_raise_and_do_not_end_the_process(
    entry: str, device: str, package_environment: dict[str, str]
) -> None:
    """Lists of any length, values near 2^31 and 2^63, sizes whose products overflow: all in one subprocess."""
    run = subprocess.run(
        [sys.executable, bad_calls.__file__, entry, device],
        capture_output=True,
        text=True,
        timeout=280,
        env=package_environment,
        cwd=Path(bad_calls.__file__).parent,
    )
    expected = {bad.name: bad for bad in applicable(entry) if bad.dangerous}
    too_large = {bad.name for bad in bad_calls.TOO_LARGE} if entry in bad_calls.FORWARD else set()
    begun = [line.removeprefix("begin ") for line in run.stdout.splitlines() if line.startswith("begin ")]
    assert run.returncode == 0, f"ended with {run.returncode} in '{begun[-1:]}': {run.stderr[-2000:]}"
    ended = dict(
        line.removeprefix("end ").split("\t", 1) for line in run.stdout.splitlines() if line.startswith("end ")
    )
    assert set(ended) == set(expected) | too_large
    wrong = []
    for name, outcome in ended.items():
        kind, text = outcome.split("\t", 1)
        if kind == "returned":
            wrong.append(f"{name}: no error")
        elif kind not in ("RuntimeError", "ValueError", "TypeError", "OverflowError", "OutOfMemoryError"):
            wrong.append(f"{name}: {kind}: {text}")
        elif name not in too_large:
            why = complaint(text, entry, expected[name])
            if why is not None:
                wrong.append(f"{name}: {why}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", ("meta", "fake"))
@pytest.mark.parametrize("entry,bad", ALL)
def test_the_fake_kernel_raises_for_what_the_real_one_refuses(entry: str, bad: Bad, kind: str, device: str) -> None:
    if bad.name.endswith("sparse") and kind == "meta":
        pytest.skip("torch makes no sparse tensor of a dense one on meta")
    with pytest.raises(ERRORS) as caught:
        if kind == "meta":
            function(entry)(*arguments(entry, "meta", bad))
        else:
            with FakeTensorMode(allow_non_fake_inputs=True):
                function(entry)(*arguments(entry, device, bad))
    why = complaint(str(caught.value), entry, bad)
    assert why is None, why


def test_the_real_and_the_fake_kernel_say_the_same(device: str) -> None:
    differing = []
    for entry in ENTRIES:
        for bad in applicable(entry):
            if bad.dangerous or bad.name.endswith("sparse"):
                continue
            texts = []
            for where in (device, "meta"):
                with pytest.raises(ERRORS) as caught:
                    function(entry)(*arguments(entry, where, bad))
                texts.append(str(caught.value).split("\n")[0])
            if texts[0] != texts[1]:
                differing.append(f"{entry}, {bad.name}: real: {texts[0]}; fake: {texts[1]}")
    assert not differing, "\n".join(differing)


@pytest.mark.parametrize("name", ("input", "weight", "bias"))
@pytest.mark.parametrize("entry", ("conv2d", "torch.ops.conv2d", "fprop"))
def test_tensors_on_two_devices_are_refused(entry: str, name: str, device: str) -> None:
    values = arguments(entry, device)
    index = ENTRIES[entry][0].index(name)
    values[index] = values[index].to("meta" if device == "cpu" else "cpu")
    with pytest.raises(ERRORS) as caught:
        function(entry)(*values)
    assert "device" in str(caught.value) or re.search(
        r"expected .*(cpu|cuda|meta).*got .*(cpu|cuda|meta)", str(caught.value)
    )


@pytest.mark.parametrize("name", ("input", "weight"))
def test_a_sparse_tensor_is_refused_by_name_where_gradients_are_wanted(name: str, device: str) -> None:
    tensors = {"input": torch.ones(2, 4, 8, 8, device=device), "weight": torch.ones(4, 4, 3, 3, device=device)}
    tensors[name] = tensors[name].to_sparse()
    tensors["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match=f"conv2d: {name}: expected a strided tensor, got "):
        conv2d_ext.conv2d(**tensors)


def test_the_import_says_nothing(package_environment: dict[str, str]) -> None:
    """Torch warns of a kernel that replaces one for the same op and key."""
    command = [sys.executable, "-c", "import conv2d_ext"]
    run = subprocess.run(command, env=package_environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("entry", ("conv2d", "torch.ops.conv2d"))
def test_a_padding_of_four_is_checked_on_every_side(entry: str, device: str) -> None:
    x, w, b = (torch.ones(bad_calls.BASE[name], device=device) for name in ("input", "weight", "bias"))
    for side in range(4):
        padding = [0, 0, 0, 0]
        padding[side] = -1
        with pytest.raises(ERRORS, match="padding"):
            function(entry)(x, w, b, [1, 1], padding, [1, 1], 2)
        padding[side] = 3
        y = function(entry)(x, w, b, [1, 1], padding, [1, 1], 2)
        assert tuple(y.shape) == ((2, 6, 9, 5) if side < 2 else (2, 6, 6, 8))


@pytest.mark.parametrize(
    "arguments",
    (
        {"padding": "Same"},
        {"padding": ""},
        {"padding": "same", "stride": 2},
        {"padding": "same", "stride": (1, 2)},
        {"padding": 0.5},
        {"padding": (1.0, 1.0)},
        {"padding": None},
        {"stride": "1"},
        {"stride": 1.5},
        {"stride": (1, None)},
        {"stride": (1, 1, 1)},
        {"stride": ()},
        {"dilation": None},
        {"dilation": (2, 2, 2, 2)},
        {"groups": 1.0},
        {"groups": None},
        {"groups": (1, 1)},
    ),
    ids=str,
)
def test_an_argument_of_the_wrong_kind_is_named(arguments: dict[str, object], device: str) -> None:
    x, w = torch.ones(1, 4, 5, 5, device=device), torch.ones(3, 4, 3, 3, device=device)
    with pytest.raises(ERRORS) as caught:
        conv2d_ext.conv2d(x, w, None, **arguments)  # type: ignore[arg-type]
    assert next(iter(arguments)) in str(caught.value)


@pytest.mark.parametrize("name", ("input", "weight"))
@pytest.mark.parametrize("value", (None, 1.0, [[1.0]]), ids=str)
def test_what_is_not_a_tensor_is_refused_by_name(name: str, value: object, device: str) -> None:
    tensors: dict[str, object] = {
        "input": torch.ones(1, 4, 5, 5, device=device), "weight": torch.ones(3, 4, 3, 3, device=device)
    }  # fmt: skip
    with pytest.raises((*ERRORS, AttributeError), match=name):
        conv2d_ext.conv2d(**{**tensors, name: value})


def test_a_failed_call_leaves_the_next_one_right(device: str) -> None:
    x, w = torch.ones(1, 4, 5, 5, device=device), torch.ones(3, 4, 3, 3, device=device)
    with pytest.raises(ERRORS):
        conv2d_ext.conv2d(x, w, None, 0)
    assert torch.equal(conv2d_ext.conv2d(x, w), torch.full((1, 3, 3, 3), 36.0, device=device))


@pytest.mark.parametrize("grad", (False, True))
def test_a_result_that_memory_is_too_small_for_raises_what_torch_raises(grad: bool, device: str) -> None:
    kind = RuntimeError if device == "cpu" else torch.OutOfMemoryError
    with pytest.raises(kind, match="memory"):
        torch.empty(2**56, device=device)
    x = torch.ones(1, 1, 1, 1, device=device)
    huge, w = x.expand(2**28, 1, 2**14, 2**14), torch.ones(4, 1, 1, 1, device=device, requires_grad=grad)
    for call in (conv2d_ext.conv2d, torch.ops.conv2d_ext.conv2d):
        with pytest.raises(kind, match="memory"):
            call(huge, w)
    assert torch.equal(conv2d_ext.conv2d(x, w), torch.ones(1, 4, 1, 1, device=device))


def test_a_nested_tensor_is_refused_also_where_the_other_arguments_are_known(device: str) -> None:
    x, w = torch.ones(2, 4, 8, 8, device=device), torch.ones(4, 4, 3, 3, device=device)
    nested = torch.nested.nested_tensor([x[0], x[1]])
    conv2d_ext.conv2d(x, w, None, 1, 1)
    for tensors, name in (((nested, w), "input"), ((x, nested), "weight")):
        with pytest.raises(RuntimeError, match=f"conv2d: {name}: expected a strided tensor, got a nested one"):
            conv2d_ext.conv2d(*tensors, None, 1, 1)
