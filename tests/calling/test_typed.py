"""What a Protocol tells of the names below it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import pytest

from anyio_kkrpc import RPCValidationError
from anyio_kkrpc._calling._options import CallOptions
from anyio_kkrpc._calling._question import Question
from anyio_kkrpc._calling._typed import NO_TYPES, TypesOf


class Math(Protocol):
    pi: float

    async def add(self, a: int, b: int) -> int: ...


class Api(Protocol):
    math: Math
    name: str

    @property
    def version(self) -> int: ...

    @staticmethod
    async def each(function: Callable[[int], object]) -> None: ...

    async def watch(self, told: Callable[[str], object], times: int) -> AsyncIterator[int]: ...


def at(*path: str) -> TypesOf:
    types = TypesOf(Api)
    for name in path:
        types = types.child(name)
    return types


@pytest.mark.parametrize(
    ("path", "good", "bad"),
    [
        (("name",), "x", 1),
        (("version",), 2, "x"),
        (("math", "pi"), 3.0, "x"),
    ],
)
def test_values(path: tuple[str, ...], good: Any, bad: Any) -> None:
    """Fields and properties, also of what is nested."""
    types = at(*path)
    assert types.convert_value(good, path) == good
    with pytest.raises(RPCValidationError) as caught:
        types.convert_value(bad, path)
    assert caught.value.method == ".".join(path)
    # Nothing is known of the result of calling it, or of what is below.
    assert types.convert_result(bad, path) == bad
    assert types.child("further") is NO_TYPES


def test_results() -> None:
    assert at("math", "add").convert_result(3, ("math", "add")) == 3
    with pytest.raises(RPCValidationError, match=r"math\.add: invalid output"):
        at("math", "add").convert_result("x", ("math", "add"))
    with pytest.raises(RPCValidationError):
        at("watch").convert_result(3, ("watch",))  # is to be a stream
    # What returns None promises nothing, since who calls it looks at nothing.
    assert at("each").convert_result(3, ("each",)) == 3


@pytest.mark.parametrize("name", ["each", "watch"])
def test_functions_that_are_passed(name: str) -> None:
    """They are found by their place whether or not the method is bound."""
    types = at(name)
    assert types.callbacks is not None
    seen: list[Any] = []
    (bound, *_), _ = types.callbacks.bound((seen.append, 1), {}, name)
    bound(3 if name == "each" else "x")
    with pytest.raises(RPCValidationError):
        bound(None)
    assert len(seen) == 1
    assert at("math", "add").callbacks is None


def test_looked_at_once() -> None:
    types = TypesOf(Api)
    assert types.child("math") is types.child("math")
    assert types.child("unknown").convert_value(object, ("unknown",)) is object
    assert NO_TYPES.child("x") is NO_TYPES


def test_question() -> None:
    question = Question(("math", "add"), (1,), {}, CallOptions(), NO_TYPES)
    assert question.method == "math.add"
