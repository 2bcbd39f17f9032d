"""checks.for_each: a test of many combinations says which of them failed, and why."""

from __future__ import annotations

import inspect

import pytest
import torch
from checks import for_each


def test_every_combination_runs_the_last_name_the_fastest() -> None:
    seen = []

    @for_each(dtype=(torch.float16, torch.float32), layout=("nchw", "nhwc"))
    def check(layout: str, device: str, dtype: torch.dtype) -> None:
        seen.append((device, dtype, layout))

    assert list(inspect.signature(check).parameters) == ["device"]  # what pytest fills in
    check(device="cpu")
    half, single = torch.float16, torch.float32
    assert seen == [("cpu", half, "nchw"), ("cpu", half, "nhwc"), ("cpu", single, "nchw"), ("cpu", single, "nhwc")]


def test_a_failure_names_each_combination_that_failed_and_its_error() -> None:
    @for_each(dtype=(torch.float16, torch.float32), n=(1, 2, 3))
    def check(dtype: torch.dtype, n: int) -> None:
        assert n < 3, "three"
        if n == 2 and dtype == torch.float32:
            raise RuntimeError("no kernel\nfor it")

    with pytest.raises(AssertionError) as caught:
        check()
    assert str(caught.value).splitlines()[0] == "3 of 6 fail"
    text = "\n".join(line for line in str(caught.value).splitlines() if not line.startswith("  assert"))
    assert "float16-3: three" in text and "float32-3: three" in text
    assert "float32-2: RuntimeError: no kernel\n  for it" in text and "float16-2" not in text
    assert "three" in str(caught.value.__cause__)  # whose traceback pytest shows


def test_a_check_does_not_skip_those_after_it() -> None:
    @for_each(n=(1, 2))
    def check(n: int) -> None:
        pytest.skip("needs sm90")

    with pytest.raises(RuntimeError, match="1 wants to be skipped"):
        check()
