"""Streams are over, for middleware, log and counts, when they have ended and not when they begin."""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
from anyio import create_task_group, fail_after

from anyio_kkrpc import (
    MemoryTransport,
    MethodStatistics,
    OverloadedError,
    RemoteError,
    RPCChannel,
    RPCTimeoutError,
    RPCValidationError,
    with_call_options,
)
from anyio_kkrpc.middleware import CallNext, Invocation, StreamEnd, access_log, is_stream
from tests.bounds import BOUND
from tests.pairs import pair

pytestmark = pytest.mark.anyio


class Api:
    async def count(self, n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number

    async def fail(self, n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number
        raise ValueError("no")

    async def wrong(self) -> AsyncIterator[int]:
        yield 1
        yield "text"  # type: ignore[misc]

    async def stall(self) -> AsyncIterator[int]:
        yield 1
        await anyio.sleep_forever()

    def plain(self) -> int:
        return 1


class Ends:
    """A middleware that notes how streams end."""

    def __init__(self) -> None:
        self.begun = 0
        self.ends: list[tuple[str, int, str]] = []

    async def __call__(self, call: Invocation, call_next: CallNext) -> Any:
        result = await call_next(call)
        if is_stream(result):
            self.begun += 1
            call.stream_ended.append(self._note)
        return result

    def _note(self, end: StreamEnd) -> None:
        self.ends.append((end.outcome, end.items, type(end.error).__name__))


async def until(condition: Callable[[], Any]) -> None:
    with fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


async def read_all(api: Any) -> None:
    assert [item async for item in api.count(100)] == [*range(100)]


async def read_none(api: Any) -> None:
    assert [item async for item in api.count(0)] == []


async def read_to_the_error(api: Any) -> None:
    with pytest.raises(RemoteError, match="^ValueError: no$"):
        assert [item async for item in api.fail(3)] == []


async def read_what_does_not_fit(api: Any) -> None:
    with pytest.raises(RPCValidationError):
        assert [item async for item in api.wrong()] == []


async def leave(api: Any) -> None:
    async with api.count(10_000) as numbers:
        assert await anext(numbers) == 0


async def forget(api: Any) -> None:
    numbers = await api.stall()
    assert await anext(numbers) == 1
    del numbers
    gc.collect()


async def wait_too_long(api: Any) -> None:
    with pytest.raises(RPCTimeoutError):
        assert [item async for item in with_call_options(api, timeout=BOUND).stall()] == []


NONE = "NoneType"
CASES: dict[
    Callable[[Any], Any], tuple[tuple[str, int | None, str], tuple[str, int | None, str]]
] = {
    read_all: (("ok", 100, NONE), ("ok", 100, NONE)),
    read_none: (("ok", 0, NONE), ("ok", 0, NONE)),
    read_to_the_error: (("failed", 3, "RemoteError"), ("failed", 3, "ValueError")),
    read_what_does_not_fit: (
        ("lost", 1, "RPCValidationError"),
        ("failed", 1, "UnfitResultError"),
    ),
    leave: (("left", None, NONE), ("left", None, NONE)),
    forget: (("left", 1, NONE), ("left", 1, NONE)),
    wait_too_long: (("lost", None, "RPCTimeoutError"), ("left", None, NONE)),
}


@pytest.mark.parametrize("read", CASES, ids=lambda read: read.__name__)
async def test_how_streams_end(read: Callable[[Any], Any]) -> None:
    """Each is told once, at both sides, with what was sent and what came."""
    client, server = Ends(), Ends()
    timeout = 0.2 if read is wait_too_long else BOUND
    options = {"middleware": [client], "timeout": timeout}
    async with pair(Api(), server={"middleware": [server]}, **options) as link:
        assert await with_call_options(link.api, timeout=BOUND).plain() == 1
        await read(link.api)
        await until(lambda: client.ends and server.ends)
        statistics = link.server.statistics()
    for found, (outcome, items, error) in zip((client.ends, server.ends), CASES[read], strict=True):
        assert [(one[0], one[2]) for one in found] == [(outcome, error)]
        assert items is None or [one[1] for one in found] == [items]
    failed = read in (read_to_the_error, read_what_does_not_fit)
    assert statistics.served == 1 + (not failed)
    assert statistics.failed == failed


@pytest.mark.parametrize("ending", ["client", "server"])
async def test_ends_with_its_channel(ending: str) -> None:
    """Both sides are told, whichever goes."""
    ends = {"client": Ends(), "server": Ends()}
    a, b = MemoryTransport.pair()
    client = RPCChannel(a, middleware=[ends["client"]])
    server = RPCChannel(b, expose=Api(), middleware=[ends["server"]])
    first, second = (client, server) if ending == "client" else (server, client)
    async with a, b, second:
        async with first:
            numbers = await client.get_api().stall()
            assert await anext(numbers) == 1
            assert ends["client"].ends == ends["server"].ends == []
        await until(lambda: ends["client"].ends and ends["server"].ends)
        await numbers.aclose()
    left = ending == "client"
    assert [(one[0], one[1]) for one in ends["client"].ends] == [("lost", 1)]
    assert [(one[0], one[1]) for one in ends["server"].ends] == [("left" if left else "lost", 1)]


async def test_middleware_that_keeps_the_stream() -> None:
    """Who watches it hears of its end, also where it reaches nobody, or the call is made again."""
    client, server = Ends(), Ends()

    async def gather(call: Invocation, call_next: CallNext) -> Any:
        result = await call_next(call)
        return [item async for item in result] if is_stream(result) else result

    tries = 0

    async def again(call: Invocation, call_next: CallNext) -> Any:
        nonlocal tries
        await call_next(call)
        tries += 1
        result = await call_next(call)
        if tries == 2:
            raise OverloadedError("no")
        return result

    async with pair(
        Api(), server={"middleware": [gather, server]}, middleware=[again, client]
    ) as link:
        with pytest.raises(RPCValidationError):  # a list where a stream was promised
            await link.api.count(2)
        assert [one[0] for one in server.ends] == ["lost"]
    async with pair(Api(), middleware=[again, client]) as link:
        assert [item async for item in link.api.count(2)] == [0, 1]
        with pytest.raises(OverloadedError):
            await link.api.count(2)
        gc.collect()
        await until(lambda: len(client.ends) == 4)
    assert client.begun == 4
    assert sorted(one[0] for one in client.ends) == ["left", "left", "left", "ok"]


@pytest.mark.parametrize("error", [LookupError("broken"), SystemExit("broken")], ids=repr)
async def test_watchers_that_raise(caplog: pytest.LogCaptureFixture, error: BaseException) -> None:
    """That is logged; the others are told, and the channel goes on."""
    ends = Ends()

    def broken(end: StreamEnd) -> None:
        raise error

    async def watch(call: Invocation, call_next: CallNext) -> Any:
        result = await call_next(call)
        call.stream_ended.insert(0, broken)
        return result

    options: Any = {"middleware": [watch, ends]}
    async with pair(Api(), server=options, **options) as link:
        await read_all(link.api)
        await leave(link.api)
        await until(lambda: len(ends.ends) == 4)
        await read_all(link.api)
    assert caplog.text.count(f"{type(error).__name__}: broken") >= 4


async def test_access_log(caplog: pytest.LogCaptureFixture) -> None:
    """A line for each stream when it has ended, with the number of its items."""
    caplog.set_level(logging.INFO)
    options: Any = {"middleware": [access_log()]}

    def lines() -> list[str]:
        found = [record.getMessage() for record in caplog.records if "access" in record.name]
        return [f"{line.split()[0]} {line.split()[5]} {line.split()[-1]}" for line in found]

    async with pair(Api(), server=options, **options) as link:
        numbers = await link.api.count(3)
        async with create_task_group() as group:
            group.start_soon(anyio.lowlevel.checkpoint)
        assert lines() == []
        assert [item async for item in numbers] == [0, 1, 2]
        await read_to_the_error(link.api)
        await until(lambda: len(lines()) == 4)
    assert sorted(lines()) == [
        "client RemoteError items=3",
        "client ok items=3",
        "server ValueError items=3",
        "server ok items=3",
    ]


async def test_sources_that_raise_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """As handlers are, and counted as failed."""
    async with pair(Api()) as link:
        await read_to_the_error(link.api)
        await until(lambda: link.server.statistics().failed)
        assert link.server.statistics().methods == {"fail": MethodStatistics(failed=1)}
    (record,) = (one for one in caplog.records if one.levelno >= logging.WARNING)
    assert record.getMessage().startswith("fail failed: request ")
    assert ", in fail\n" in caplog.text
