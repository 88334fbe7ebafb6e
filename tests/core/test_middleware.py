"""Functions around calls, at both sides."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol

import anyio
import pytest

from anyio_kkrpc import (
    MemoryTransport,
    OverloadedError,
    RemoteError,
    RPCChannel,
    RPCTimeoutError,
    RPCValidationError,
    current_call,
    expose,
    in_thread,
    with_call_options,
)
from anyio_kkrpc.middleware import (
    CallNext,
    Invocation,
    access_log,
    limit_concurrency,
    retry,
)
from tests.bounds import BOUND
from tests.pairs import pair

pytestmark = pytest.mark.anyio


class Point:
    def __init__(self, x: int) -> None:
        self.x = x


class Api:
    Point = Point

    def __init__(self) -> None:
        self.size = 1
        self.runs = 0
        self.most = self.now = 0
        self.gate = anyio.Event()

    def add(self, a: int, b: int = 0) -> int:
        return a + b

    async def slow(self) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        await self.gate.wait()
        self.now -= 1

    async def count(self, n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number

    @in_thread
    def thread(self) -> bool:
        return threading.current_thread() is threading.main_thread()

    def who(self) -> Any:
        return current_call().metadata

    def flaky(self, failures: int) -> int:
        self.runs += 1
        if self.runs <= failures:
            raise RuntimeError("not yet")
        return self.runs


class Recorder:
    """A middleware that notes what it sees."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    async def __call__(self, call: Invocation, call_next: CallNext) -> Any:
        self.seen.append((call.side, call.operation, call.method, list(call.args), call.kwargs))
        return await call_next(call)


async def test_both_sides_see_every_operation() -> None:
    """Calls, properties and constructors; arguments as the handler gets them."""
    client, server = Recorder(), Recorder()
    api = Api()
    table = expose(api, writable=["size"])
    async with pair(table, server={"middleware": [server]}, middleware=[client]) as link:
        assert await link.api.add(1, b=2) == 3
        assert await link.api.size == 1
        await link.client.set_property("size", 5)
        assert await link.client.construct("Point", 7) == {"x": 7}
        assert [n async for n in link.api.count(3)] == [0, 1, 2]
        assert await link.api.thread() is False
    assert api.size == 5
    assert [one[1:] for one in client.seen] == [
        ("call", "add", [1], {"b": 2}),
        ("get", "size", [], {}),
        ("set", "size", [5], {}),
        ("new", "Point", [7], {}),
        ("call", "count", [3], {}),
        ("call", "thread", [], {}),
    ]
    assert [one[1:] for one in server.seen] == [one[1:] for one in client.seen]
    assert {one[0] for one in client.seen} == {"client"}
    assert {one[0] for one in server.seen} == {"server"}


async def test_order_and_changes() -> None:
    """The first is the outermost; arguments, metadata and results can be changed."""

    def named(name: str) -> Any:
        async def middleware(call: Invocation, call_next: CallNext) -> Any:
            if call.method == "who":
                call.metadata["way"] = call.metadata.get("way", "") + name
                return await call_next(call)
            call.args[0] = call.args[0] * 10
            return await call_next(call) + 1

        return middleware

    async with pair(
        Api(), server={"middleware": [named("c"), named("d")]}, middleware=[named("a"), named("b")]
    ) as link:
        assert await link.api.who() == {"way": "abcd"}
        assert await link.api.add(1, 0) == 10_004


async def test_refusals() -> None:
    """A middleware that raises ends the call; the handler isn't run."""

    async def closed(call: Invocation, call_next: CallNext) -> Any:
        if call.metadata.get("token") != "secret":
            raise PermissionError(call.method)
        return await call_next(call)

    async with pair(Api(), server={"middleware": [closed]}) as link:
        with pytest.raises(RemoteError) as caught:
            await link.api.add(1, 2)
        assert caught.value.name == "PermissionError"
        api = with_call_options(link.api, metadata={"token": "secret"})
        assert await api.add(1, 2) == 3
        with pytest.raises(RPCValidationError):
            await api.add("x")

    async def answers(call: Invocation, call_next: CallNext) -> str:
        return "not asked"

    async with pair(Api(), middleware=[answers]) as link:
        assert await link.api.add(1, 2) == "not asked"


async def test_cancelled_in_the_middle() -> None:
    """A call that is given up is cancelled through the middleware of both sides."""
    cancelled: list[str] = []

    async def watch(call: Invocation, call_next: CallNext) -> Any:
        try:
            return await call_next(call)
        except anyio.get_cancelled_exc_class():
            cancelled.append(call.side)
            raise

    api = Api()
    async with pair(api, server={"middleware": [watch]}, middleware=[watch]) as link:
        async with anyio.create_task_group() as group:
            group.start_soon(link.api.slow)
            with anyio.fail_after(BOUND):
                while not api.now:
                    await anyio.sleep(0.01)
            group.cancel_scope.cancel()
        with anyio.fail_after(BOUND):
            while len(cancelled) < 2:
                await anyio.sleep(0.01)
    assert sorted(cancelled) == ["client", "server"]


async def test_retry() -> None:
    """Idempotent calls are made again, others only if they were refused unrun."""
    api = Api()
    again = retry(3, initial=0.001, on=(RemoteError,))
    async with pair(api, middleware=[again]) as link:
        with pytest.raises(RemoteError):
            await link.api.flaky(1)
        api.runs = 0
        idempotent = with_call_options(link.api, idempotent=True)
        assert await idempotent.flaky(2) == 3
        assert await with_call_options(idempotent, timeout=5).add(1) == 1
        api.runs = 0
        with pytest.raises(RemoteError):
            await idempotent.flaky(3)
        assert api.runs == 3

    refused = 0

    async def overloaded(call: Invocation, call_next: CallNext) -> Any:
        nonlocal refused
        refused += 1
        if refused < 3:
            raise OverloadedError("full")
        return await call_next(call)

    async with pair(Api(), middleware=[retry(5, initial=0), overloaded]) as link:
        assert await link.api.add(2, 2) == 4
    assert refused == 3


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: retry(0), "attempts"),
        (lambda: retry(True), "attempts"),
        (lambda: retry(initial=-1), "initial"),
        (lambda: retry(maximum=float("inf")), "maximum"),
        (lambda: retry(attempt_timeout=0), "attempt_timeout"),
        (lambda: retry(attempt_timeout=float("nan")), "attempt_timeout"),
        (lambda: limit_concurrency(0), "limit"),
        (lambda: limit_concurrency(True), "limit"),
    ],
)
async def test_wrong_options(make: Any, name: str) -> None:
    """They are refused with their name."""
    with pytest.raises(ValueError, match=f"^{name}:"):
        make()


async def test_wrong_middleware() -> None:
    """What isn't a list of functions is refused by the channel."""
    transport, _ = MemoryTransport.pair()
    for wrong in ("text", [1], access_log()):
        with pytest.raises(TypeError, match="^middleware:"):
            RPCChannel(transport, middleware=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("methods", [None, ["slow"]])
async def test_limit(methods: list[str] | None) -> None:
    """So many run at once; other methods aren't held up."""
    api = Api()
    limit = limit_concurrency(2, methods)
    async with (
        pair(api, server={"middleware": [limit]}) as link,
        anyio.create_task_group() as group,
    ):
        for _ in range(6):
            group.start_soon(link.api.slow)
        await anyio.wait_all_tasks_blocked()
        assert api.now == 2
        assert await link.api.add(1, 1) == 2
        api.gate.set()
    assert api.most == 2


async def test_limit_and_deadline() -> None:
    """Who waits for a turn waits no longer than the call may take, and takes nobody's turn."""
    api = Api()
    async with (
        pair(api, middleware=[limit_concurrency(1)], timeout=None) as link,
        anyio.create_task_group() as group,
    ):
        group.start_soon(link.api.slow)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(RPCTimeoutError, match="slow: .* 1 calls of it were running"):
            await with_call_options(link.api, timeout=0.05).slow()
        api.gate.set()
        await link.api.slow()
    assert api.most == 1


async def test_access_log(caplog: pytest.LogCaptureFixture) -> None:
    """A line for each call, with its outcome; never with its arguments."""
    with caplog.at_level(logging.INFO):
        async with pair(Api(), middleware=[access_log()]) as link:
            await link.api.add(123456, 1)
            with pytest.raises(RPCTimeoutError):
                await with_call_options(link.api, timeout=0.05).slow()
            with anyio.move_on_after(0):
                await link.api.add(1, 1)
    lines = [record.message for record in caplog.records if record.name == "anyio_kkrpc.access"]
    assert len(lines) == 3
    assert lines[0].startswith("client call add peer=None attempt=1 ok ")
    assert " RPCTimeoutError " in lines[1]
    assert " cancelled " in lines[2]
    assert "123456" not in caplog.text


async def test_an_alias_is_no_way_around() -> None:
    """The name is that of the function, however the caller writes it."""
    seen = []

    async def refuse(call: Invocation, call_next: CallNext) -> Any:
        seen.append(call.method)
        raise PermissionError("no")

    class Named:
        def make_report(self) -> None: ...

        @property
        def last_report(self) -> str:
            return ""

    table = expose(Named(), naming="camel")
    async with pair(table, server={"middleware": [refuse]}) as link:
        for call in (link.api.makeReport, link.api.make_report):
            with pytest.raises(RemoteError, match="no"):
                await call()
        with pytest.raises(RemoteError, match="no"):
            await link.api.lastReport
    assert seen == ["make_report", "make_report", "last_report"]


async def test_a_stream_is_sent_once() -> None:
    """A retry would send what is left of it."""

    async def numbers() -> AsyncIterator[int]:
        yield 1

    calls = 0

    async def busy(call: Invocation, call_next: CallNext) -> Any:
        nonlocal calls
        calls += 1
        raise OverloadedError("busy")

    async with pair(Api(), middleware=[retry(3, initial=0), busy]) as link:
        with pytest.raises(OverloadedError):
            await link.api.total(numbers())
        assert calls == 1
        with pytest.raises(OverloadedError):
            await link.api.total([1])
        assert calls == 4


async def test_results_that_do_not_fit_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    """By middleware of the side that finds it out."""
    caplog.set_level(logging.INFO)

    class Wrong:
        def number(self) -> int:
            return "text"  # type: ignore[return-value]

        size = "text"

        def untyped(self) -> Any:
            return "text"

    class Typed(Protocol):
        @property
        def size(self) -> Awaitable[int]: ...

        async def untyped(self) -> int: ...

    options = {"middleware": [access_log()]}
    async with pair(Wrong(), server=options, middleware=[access_log()]) as link:
        with pytest.raises(RPCValidationError):
            await link.api.number()
        with pytest.raises(RPCValidationError):
            await link.client.get_api(Typed).untyped()
        with pytest.raises(RPCValidationError):
            await link.client.get_api(Typed).size
    lines = [record.getMessage() for record in caplog.records]
    assert [" ".join(line.split()[:3]) for line in lines if " ok " in line] == [
        "server call untyped",
        "server get size",
    ]
    assert sum("UnfitResultError" in line or "RPCValidationError" in line for line in lines) == 4
