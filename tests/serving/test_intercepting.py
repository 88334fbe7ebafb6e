"""What middleware sees of requests, without a channel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import copy_context
from typing import Any

import pytest
from anyio.lowlevel import checkpoint

from anyio_kkrpc import MethodNotFoundError
from anyio_kkrpc._driver._context import CallInfo, running
from anyio_kkrpc._serving._intercepting import NOT_SENT, Interceptor, watchers_in
from anyio_kkrpc._serving._invoking import own_fields
from anyio_kkrpc._serving._table import Method
from anyio_kkrpc._values._conversion import UnfitResultError
from anyio_kkrpc.middleware import CallNext, Invocation, StreamEnd

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def in_a_call() -> Any:
    token = running.set(CallInfo("1", "f", "x", 2, 9.0, {"k": 1}))
    yield
    running.reset(token)


class Seeing:
    """Middleware that notes what it sees, and what it is told."""

    def __init__(self, change: Callable[[Any], Any] = lambda result: result) -> None:
        self.calls: list[Invocation] = []
        self.told: list[StreamEnd] = []
        self.change = change

    async def __call__(self, call: Invocation, call_next: CallNext) -> Any:
        self.calls.append(call)
        result = await call_next(call)
        call.stream_ended.append(self.told.append)
        return self.change(result)


def wrap(function: Any, *middleware: Any, op: str = "call") -> Callable[..., Awaitable[Any]]:
    return Interceptor(middleware).wrap(function, op, Method("name", function))


async def test_what_it_sees() -> None:
    """The name in the table, whatever alias was called; it may change what is called with."""

    async def add(a: int, *, b: int) -> int:
        await checkpoint()
        return a + b

    async def more(call: Invocation, call_next: CallNext) -> Any:
        call.kwargs["b"] += 10
        return await call_next(call)

    seeing = Seeing()
    assert await wrap(add, seeing, more)(1, b=2) == 13
    (call,) = seeing.calls
    assert (call.side, call.operation, call.method) == ("server", "call", "name")
    assert (call.metadata, call.peer, call.deadline, call.attempt) == ({"k": 1}, "x", 9.0, 2)
    assert seeing.told == [NOT_SENT]  # it isn't a stream


async def test_results_are_checked() -> None:
    """What the handler returns, and what middleware makes of it."""

    def lie() -> int:
        return "x"  # type: ignore[return-value]

    def tell() -> int:
        return 1

    with pytest.raises(UnfitResultError):
        await wrap(lie, Seeing())()
    with pytest.raises(UnfitResultError):
        await wrap(tell, Seeing(str))()
    assert await wrap(tell, Seeing(lambda result: result + 1))() == 2
    # The result of writing is nobody's.
    assert await wrap(lie, Seeing(), op="set")() == "x"


async def test_streams_are_told_of_later() -> None:
    """Whoever wants to know the end of a stream is remembered with its request."""

    async def count() -> AsyncIterator[int]:
        yield 1

    seeing = Seeing()
    stream = await wrap(count, seeing)()
    assert seeing.told == []
    (watcher,) = watchers_in(copy_context())
    watcher(NOT_SENT)
    assert seeing.told == [NOT_SENT]
    assert [item async for item in stream] == [1]


async def test_refused() -> None:
    """It sees a call that isn't made as one that raises, and may answer in its place."""
    seeing, error = Seeing(), MethodNotFoundError("no")
    with pytest.raises(MethodNotFoundError) as caught:
        await Interceptor((seeing,)).refuse(error, "call", "no", known=False)
    assert caught.value is error
    assert (seeing.calls[0].refused, seeing.calls[0].known) == (error, False)

    async def answer(call: Invocation, call_next: CallNext) -> Any:
        await checkpoint()
        return "instead"

    assert await Interceptor((answer,)).refuse(error, "call", "no", known=True) == "instead"


def test_what_a_new_object_is_by_value() -> None:
    class Point:
        def __init__(self) -> None:
            self.x, self._y = 1, 2

    assert own_fields(Point()) == {"x": 1}
    assert own_fields(5) == 5
