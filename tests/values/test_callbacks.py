"""What functions that are passed to the other side are called with is checked at both sides."""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Optional, Protocol

import anyio
import pytest
from anyio import fail_after
from pydantic import BaseModel, Field

from anyio_kkrpc import Callback, RemoteCallback, RPCValidationError, expose
from anyio_kkrpc._values._callbacks import arguments_of, callback_kind
from tests.bounds import BOUND
from tests.pairs import pair

pytestmark = pytest.mark.anyio


@dataclass
class Progress:
    done: int
    due: date = date(2026, 1, 1)


class Model(BaseModel):
    weight: float = Field(gt=0)


class OnStep(Protocol):
    def __call__(self, step: Progress, /, *, last: bool = False) -> Awaitable[None]: ...


class Handlers:
    """What a worker exposes, with annotations of its own."""

    async def typed(self, on: Callable[[Progress], Awaitable[None]], value: Any) -> None:
        await on(value)

    async def steps(self, on: OnStep) -> None:
        await on(Progress(1), last=True)

    async def models(self, on: Callable[[Model], Awaitable[None]], value: Any) -> None:
        await on(value)

    async def untyped(self, on: Callable[..., Awaitable[None]], *values: Any) -> None:
        await on(*values)

    async def maybe(self, on: Callable[[Progress], Awaitable[None]] | None = None) -> bool:
        return on is None


class Typed(Protocol):
    """What its caller says of it."""

    async def typed(self, on: Callable[[Progress], object], value: Any) -> None: ...
    async def steps(self, on: OnStep) -> None: ...
    async def models(self, on: Callback[[Model]], value: Any) -> None: ...
    async def untyped(self, on: Callback[[Progress]], *values: Any) -> None: ...
    async def maybe(self, on: Callback[[Progress]] | None = None) -> bool: ...


PROGRESS = {"done": 1, "due": "2026-12-24"}


async def test_protocols_convert() -> None:
    """Lambdas, bound methods of lists, and functions get what the Protocol says."""
    got: list[Any] = []

    async def later(value: Any) -> None:
        got.append(value)

    def steps(step: Progress, /, *, last: bool = False) -> Any:
        got.append((step, last))

    async with pair(Handlers()) as link:
        api = link.client.get_api(Typed)
        expected = Progress(1, date(2026, 12, 24))
        for function in (got.append, later, lambda value: got.append(value)):
            await api.typed(function, PROGRESS)
            await api.typed(on=function, value=expected)
            await api.untyped(function, PROGRESS)
        assert got == [expected] * 9
        got.clear()
        await api.steps(steps)
        await api.models(got.append, Model(weight=1.5))
        assert got == [(Progress(1), True), Model(weight=1.5)]
        assert await api.maybe()
        assert await api.maybe(None)
        assert not await api.maybe(got.append)


async def test_own_annotations_convert() -> None:
    """Where no Protocol says more: of functions, methods, partial ones and objects."""
    got: list[Any] = []

    def take(value: Progress, *more: date, **named: Any) -> None:
        got.append((value, *more))

    class Taker:
        def take(self, value: Progress) -> None:
            got.append((value,))

        async def __call__(self, value: Progress) -> None:
            got.append((value,))

    expected = Progress(1, date(2026, 12, 24))
    async with pair(Handlers()) as link:
        for function in (take, Taker().take, Taker(), functools.partial(take, flag=True)):
            await link.api.untyped(function, PROGRESS)
        await link.api.untyped(take, PROGRESS, "2026-12-24")
    assert got == [(expected,)] * 4 + [(expected, date(2026, 12, 24))]


async def test_what_does_not_fit_at_who_calls() -> None:
    """It is raised in the handler; nothing was sent."""
    got: list[Any] = []
    async with pair(Handlers()) as link:
        for value, text in (
            ({"done": "x"}, "Expected `int`, got `str` - at `[0].done`"),
            ("x", "Expected `object`, got `str` - at `[0]`"),
        ):
            with pytest.raises(RPCValidationError) as caught:
                await link.api.typed(got.append, value)
            assert (caught.value.phase, caught.value.method) == ("output", "typed.on")
            assert caught.value.issues == [text]
        with pytest.raises(RPCValidationError, match="greater than 0 - at `\\[0\\].weight`"):
            await link.api.models(got.append, {"weight": -1})
        for wrong in (5, "text", {"a": 1}, None):
            with pytest.raises(RPCValidationError, match="Expected a function.* - at `on`"):
                await link.api.typed(wrong, 1)
        assert got == []
    async with pair(expose(Handlers(), validate_results=False)) as link:
        await link.api.typed(got.append, {"done": "x"})
        assert got == [{"done": "x"}]


async def test_what_does_not_fit_at_who_is_called(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged there, as what the function raises is; the call and others go on."""
    got: list[Any] = []
    async with pair(Handlers()) as link:
        api = link.client.get_api(Typed)
        await api.untyped(got.append, {"done": "x"})
        await api.untyped(got.append, PROGRESS, 2)
        await api.untyped(got.append, PROGRESS)
        with fail_after(BOUND):
            while not got:
                await anyio.sleep(0.01)
    assert len(got) == 1
    assert "untyped.on: invalid input: Expected `int`, got `str` - at `[0].done`" in caplog.text
    assert "untyped.on: invalid input: Expected 1 arguments, got 2" in caplog.text
    assert len([one for one in caplog.records if one.levelno >= logging.WARNING]) == 2


async def test_the_same_function_is_the_same() -> None:
    """A Protocol's check doesn't make it another one at each call."""
    seen: list[RemoteCallback] = []

    class Keeps:
        def keep(self, on: Callable[[Progress], Awaitable[None]]) -> None:
            seen.append(on)  # type: ignore[arg-type]

    class KeepsTyped(Protocol):
        async def keep(self, on: Callable[[Progress], object]) -> None: ...

    got: list[Any] = []
    async with pair(Keeps()) as link:
        api = link.client.get_api(KeepsTyped)
        await api.keep(got.append)
        await api.keep(got.append)
        assert seen[0] == seen[1]
        assert link.client.statistics().callbacks == 1
        await seen[0](Progress(3))
        with fail_after(BOUND):
            while not got:
                await anyio.sleep(0.01)
        assert got == [Progress(3)]
        seen.clear()


def test_what_annotations_tell() -> None:
    """Those that tell nothing of the arguments are left to what checks other values."""
    for nothing in (
        Any,
        int,
        Callable,
        Callable[..., int],
        Callable[[int], None] | int,
        Callable[[int], None] | Callable[[str], None],
        "Callable[[int], None]",
    ):
        assert callback_kind(nothing, "on") is None, nothing
    for something in (
        Callable[[int], None],
        Callback[int],
        Callback[[int]],
        Annotated[Callable[[int], None], "note"],
        Optional[Callable[[int], None]],  # noqa: UP045
        Callable[[int], None] | Callable[[int], Awaitable[None]] | None,
        OnStep,
    ):
        assert callback_kind(something, "on") is not None, something


def test_functions_that_tell_nothing() -> None:
    """They cost nothing, and what they are annotated with that doesn't resolve is not told."""

    class Local: ...

    def local(value: Local) -> None: ...

    for function in ([].append, print, lambda value: None, functools.partial(print), local):
        assert arguments_of(function) is None
