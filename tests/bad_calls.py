"""Calls with bad arguments: which argument is wrong, and how.

Imported by test_errors.py, and run by it as a program, so that a call that ends the process shows as a failure of its
test and not as the end of all tests:
    python tests/bad_calls.py {conv2d,torch.ops.conv2d,fprop,dgrad,wgrad} {cpu,cuda,meta}
prints for each dangerous call a line "begin <name>" and then "end <name> <tab> <exception type> <tab> <text>".
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import torch
from torch import Tensor

BASE = {
    "input": (2, 4, 8, 7),
    "weight": (6, 2, 3, 3),
    "bias": (6,),
    "grad_output": (2, 6, 6, 5),
    "input_size": [2, 4, 8, 7],
    "weight_size": [6, 2, 3, 3],
    "weight_stride": [18, 9, 3, 1],
    "stride": [1, 1],
    "padding": [0, 0],
    "dilation": [1, 1],
    "groups": 2,
}
# The arguments of each entry, in order, and how its error text calls the operator.
ENTRIES = {
    "conv2d": (("input", "weight", "bias", "stride", "padding", "dilation", "groups"), "conv2d"),
    "torch.ops.conv2d": (("input", "weight", "bias", "stride", "padding", "dilation", "groups"), "conv2d"),
    "fprop": (("input", "weight", "bias", "stride", "padding", "dilation", "groups"), "conv2d"),
    "dgrad": (("grad_output", "weight", "input_size", "stride", "padding", "dilation", "groups"), "dgrad"),
    "wgrad": (
        ("grad_output", "input", "weight_size", "weight_stride", "stride", "padding", "dilation", "groups"),
        "wgrad",
    ),
}


@dataclasses.dataclass(frozen=True)
class Bad:
    """One argument replaced by a bad value. `named`: the arguments of which the error must name one."""

    name: str
    argument: str
    value: Callable[[str], object]  # of the device
    named: tuple[str, ...]
    dangerous: bool = False  # may end the process instead of raising, if unchecked


def shape(*size: int, dtype: torch.dtype = torch.float32) -> Callable[[str], Tensor]:
    return lambda device: torch.ones(size, dtype=dtype, device=device)


def constant(value: object) -> Callable[[str], object]:
    return lambda device: value


def huge(*size: int) -> Callable[[str], Tensor]:
    """One element, expanded."""
    return lambda device: torch.ones(1, device=device).as_strided(size, (0,) * len(size))


TENSORS = ("input", "weight", "grad_output")
BAD: list[Bad] = []
for _name in TENSORS:
    _size = BASE[_name]
    for _dims in (0, 1, 2, 5):
        BAD.append(Bad(f"{_name} of {_dims} dimensions", _name, shape(*[2] * _dims), (_name,)))
    BAD += [
        Bad(f"{_name} of {_dtype}", _name, shape(*_size, dtype=_dtype), TENSORS)
        for _dtype in (
            torch.int32,
            torch.int64,
            torch.bool,
            torch.uint8,
            torch.uint16,
            torch.complex64,
            torch.float8_e4m3fn,
            torch.float64,
            torch.float16,
        )
    ]
    BAD.append(
        Bad(f"{_name} sparse", _name, lambda device, size=_size: torch.ones(size, device=device).to_sparse(), (_name,))
    )
BAD += [
    Bad("input of 3 channels", "input", shape(2, 3, 8, 7), ("input", "weight", "weight_size")),
    Bad("input of 8 channels", "input", shape(2, 8, 8, 7), ("input", "weight", "weight_size")),
    Bad("input of no channels", "input", shape(2, 0, 8, 7), ("input", "weight", "weight_size")),
    Bad("input lower than the kernel", "input", shape(2, 4, 2, 7), ("input", "grad_output")),
    Bad("input narrower than the kernel", "input", shape(2, 4, 8, 2), ("input", "grad_output")),
    Bad("input of no rows", "input", shape(2, 4, 0, 7), ("input", "grad_output")),
    Bad("weight of 5 filters", "weight", shape(5, 2, 3, 3), ("weight", "groups")),
    Bad("weight of 4 channels", "weight", shape(6, 4, 3, 3), ("weight", "input", "input_size")),
    Bad("weight of no channels", "weight", shape(6, 0, 3, 3), ("weight", "input", "input_size")),
    Bad("weight with R = 0", "weight", shape(6, 2, 0, 3), ("weight",), True),
    Bad("weight with S = 0", "weight", shape(6, 2, 3, 0), ("weight",), True),
    Bad("weight larger than the input", "weight", shape(6, 2, 9, 3), ("input", "input_size", "weight")),
    Bad("bias of 5", "bias", shape(5), ("bias",)),
    Bad("bias of 7", "bias", shape(7), ("bias",)),
    Bad("bias of none", "bias", shape(0), ("bias",)),
    Bad("bias of 2 dimensions", "bias", shape(6, 1), ("bias",)),
    Bad("bias of 0 dimensions", "bias", shape(), ("bias",)),
    Bad("bias of float64", "bias", shape(6, dtype=torch.float64), ("bias",)),
    Bad("bias of int64", "bias", shape(6, dtype=torch.int64), ("bias",)),
    Bad("bias of complex64", "bias", shape(6, dtype=torch.complex64), ("bias",)),
    Bad("grad_output of another batch", "grad_output", shape(3, 6, 6, 5), ("grad_output",)),
    Bad("grad_output of other filters", "grad_output", shape(2, 4, 6, 5), ("grad_output",)),
    Bad("grad_output too high", "grad_output", shape(2, 6, 7, 5), ("grad_output",), True),
    Bad("grad_output too narrow", "grad_output", shape(2, 6, 6, 4), ("grad_output",), True),
    Bad("grad_output of one element", "grad_output", shape(1, 1, 1, 1), ("grad_output",), True),
    Bad("groups 0", "groups", constant(0), ("groups",), True),
    Bad("groups -1", "groups", constant(-1), ("groups",), True),
    Bad("groups -2", "groups", constant(-2), ("groups",), True),
    Bad("groups 3", "groups", constant(3), ("groups", "weight", "input", "weight_size")),
    Bad("groups 2^31", "groups", constant(2**31), ("groups", "weight", "input", "weight_size"), True),
    Bad("groups 2^32 + 2", "groups", constant(2**32 + 2), ("groups", "weight", "input", "weight_size"), True),
    Bad("groups 2^63 - 1", "groups", constant(2**63 - 1), ("groups", "weight", "input", "weight_size"), True),
    Bad("groups -2^63", "groups", constant(-(2**63)), ("groups",), True),
]
for _name, _least in (("stride", 1), ("dilation", 1), ("padding", 0)):
    for _list in ([], [_least] * 3, [_least] * 5, [_least] * 100):
        BAD.append(Bad(f"{_name} of {len(_list)} entries", _name, constant(_list), (_name,), True))
    for _value in (_least - 1, -3, -(2**31), -(2**32), -(2**63), 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1):
        # A large dilation makes the window larger than the input: naming either is right.
        _named = (_name, "input", "input_size") if _name != "padding" and _value > 0 else (_name,)
        BAD.append(Bad(f"{_name} ({_value}, {_least})", _name, constant([_value, _least]), _named, True))
        BAD.append(Bad(f"{_name} ({_least}, {_value})", _name, constant([_least, _value]), _named, True))
        BAD.append(Bad(f"{_name} ({_value}, {_value})", _name, constant([_value, _value]), _named, True))
BAD += [
    Bad("padding of four, one negative", "padding", constant([0, -1, 0, 0]), ("padding",), True),
    Bad("padding of four, last 2^31", "padding", constant([0, 0, 0, 2**31]), ("padding",), True),
    Bad("padding of four that sums past 2^63", "padding", constant([2**62, 2**62, 0, 0]), ("padding",), True),
    Bad("padding of four that sums to 2^31", "padding", constant([2**30, 2**30, 0, 0]), ("padding",), True),
    Bad("padding that doubles past 2^31", "padding", constant([2**30, 0]), ("padding",), True),
    Bad("dilation whose window passes 2^31", "dilation", constant([2**30, 1]),
        ("dilation", "input", "input_size"), True),
    Bad("dilation that wraps to a small window", "dilation", constant([2**31 - 1, 1]),
        ("dilation", "input", "input_size"), True),
    Bad("dilation larger than the input", "dilation", constant([4, 1]), ("dilation", "input", "input_size")),
]  # fmt: skip
for _name in ("input_size", "weight_size", "weight_stride"):
    _good = BASE[_name]
    for _count in (0, 1, 3, 5, 50):
        if _name != "weight_stride" or _count:
            BAD.append(Bad(f"{_name} of {_count} entries", _name, constant(([*_good] * 20)[:_count]), (_name,), True))
    for _value in (-1, -(2**63), 2**31, 2**62, 2**63 - 1):
        for _place in range(4):
            _list = [*_good[:_place], _value, *_good[_place + 1 :]]
            BAD.append(
                Bad(f"{_name} with {_value} at {_place}", _name, constant(_list),
                    (_name, "weight", "input", "grad_output", "groups"), True)
            )  # fmt: skip
BAD += [
    Bad("input_size with one row more", "input_size", constant([2, 4, 9, 7]), ("input_size", "grad_output"), True),
    Bad("input_size with one image less", "input_size", constant([1, 4, 8, 7]), ("input_size", "grad_output"), True),
    Bad("weight_size with a larger kernel", "weight_size", constant([6, 2, 4, 3]),
        ("weight_size", "grad_output"), True),
    Bad("weight_size with R = 0", "weight_size", constant([6, 2, 0, 3]), ("weight_size",), True),
    Bad("weight_stride with gaps", "weight_stride", constant([36, 18, 6, 2]), ("weight_stride",), True),
    Bad("weight_stride that overlaps", "weight_stride", constant([9, 9, 3, 1]), ("weight_stride",), True),
    Bad("weight_stride of zeros", "weight_stride", constant([0, 0, 0, 0]), ("weight_stride",), True),
    # Tensors that are views of one element, of sizes whose products pass 2^31 or 2^63.
    Bad("input of 2^31 rows", "input", huge(2, 4, 2**31, 7), ("input", "grad_output"), True),
    Bad("input of 2^40 columns", "input", huge(2, 4, 8, 2**40), ("input", "grad_output"), True),
    Bad("weight of 2^31 rows", "weight", huge(6, 2, 2**31, 3), ("weight", "input", "input_size"), True),
    Bad("weight of 3 * 2^55 filters", "weight", huge(3 * 2**55, 2, 3, 3),
        ("weight", "input", "bias", "grad_output"), True),
]  # fmt: skip

# Legal sizes whose result does not fit into any memory: any error will do, also the allocator's.
TOO_LARGE = [
    Bad("a batch of 2^50", "input", huge(2**50, 4, 8, 7), (), True),
    Bad("padding of 2^28", "padding", constant([2**28, 2**28]), (), True),
    Bad("padding of 2^28 on one side", "padding", constant([0, 2**28, 2**28, 0]), (), True),
    Bad("2^31 - 1 rows of padding and as many columns", "padding", constant([2**31 - 9, 0, 0, 2**31 - 9]), (), True),
]
FORWARD = ("conv2d", "torch.ops.conv2d", "fprop")


def applicable(entry: str) -> list[Bad]:
    return [bad for bad in BAD if bad.argument in ENTRIES[entry][0]]


def arguments(entry: str, device: str, bad: Bad | None = None) -> list[object]:
    """The good arguments of an entry, one of them replaced."""
    made: list[object] = []
    for name in ENTRIES[entry][0]:
        if bad is not None and bad.argument == name:
            made.append(bad.value(device))
        elif name in ("input", "weight", "bias", "grad_output"):
            made.append(torch.ones(BASE[name], device=device))
        else:
            made.append(BASE[name])
    return made


def function(entry: str) -> Callable[..., Tensor]:
    import conv2d_ext

    operators = torch.ops.conv2d_ext
    return {
        "conv2d": conv2d_ext.conv2d,
        "torch.ops.conv2d": operators.conv2d,
        "fprop": operators.fprop,
        "dgrad": operators.dgrad,
        "wgrad": operators.wgrad,
    }[entry]


def main(entry: str, device: str) -> None:
    run = function(entry)
    run(*arguments(entry, device))
    too_large = TOO_LARGE if entry in FORWARD else []
    for bad in (*applicable(entry), *too_large):
        if not bad.dangerous:
            continue
        print(f"begin {bad.name}", flush=True)
        try:
            run(*arguments(entry, device, bad))
            outcome = "returned\t"
        except Exception as e:
            outcome = f"{type(e).__name__}\t{' '.join(str(e).split())}"
        print(f"end {bad.name}\t{outcome}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
