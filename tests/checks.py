"""One test for many combinations of arguments, where a test for each would take pytest longer than the check itself."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Collection

import pytest

LINES = 4  # of each error, in the message of a test that fails


def for_each(**values: Collection[object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Like parametrize for all combinations of `values`, but one test: it runs all of them, the last name's values the
    fastest, and fails with the list of those that failed, each with its error."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(check)
        def test(**given: object) -> None:
            failures: list[str] = []
            first: Exception | None = None
            for combination in itertools.product(*values.values()):
                try:
                    check(**given, **dict(zip(values, combination, strict=True)))
                except Exception as error:
                    first = first or error
                    failures.append(f"{name_of(combination)}: {summary(error)}")
                except pytest.skip.Exception as skipped:  # would skip what follows, too
                    raise RuntimeError(f"{name_of(combination)} wants to be skipped: not under for_each") from skipped
            if failures:
                total = len(list(itertools.product(*values.values())))
                raise AssertionError("\n".join([f"{len(failures)} of {total} fail", *failures])) from first

        signature = inspect.signature(check)
        kept = [parameter for name, parameter in signature.parameters.items() if name not in values]
        test.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return test

    return decorate


def name_of(combination: tuple[object, ...]) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in combination)


def summary(error: Exception) -> str:
    lines = str(error).splitlines() or ["no message"]
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return kind + "\n  ".join(lines[:LINES])
