"""A channel that is left: streams that others read have its grace period, and then an error."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_kkrpc import (
    DeliveryError,
    MemoryTransport,
    RemoteError,
    RPCChannel,
    RPCTimeoutError,
    with_call_options,
)
from tests.bounds import BOUND, CALL_BOUND
from tests.pairs import pair

pytestmark = pytest.mark.anyio

ENDED = "ended while the stream was open"
# More than may be sent ahead.
MANY = 500


class Api:
    """Sources that note how they were closed."""

    def __init__(self) -> None:
        self.closed: list[str] = []
        self.begun, self.go_on = anyio.Event(), anyio.Event()

    async def finite(self) -> AsyncIterator[int]:
        try:
            yield 0
            await self.go_on.wait()
            for number in range(1, MANY):
                yield number
        finally:
            with anyio.CancelScope(shield=True):
                await checkpoint()
            self.closed.append("finite")

    async def endless(self) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            await checkpoint()
            self.closed.append("endless")

    async def waiting(self) -> AsyncIterator[int]:
        try:
            yield 1
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await checkpoint()
            self.closed.append("waiting")

    async def total(self, numbers: AsyncIterator[int]) -> int:
        total = 0
        async for number in numbers:
            self.begun.set()
            total += number
        return total


class Leaving:
    """A channel that is left, or whose scope is cancelled, when `leave` is called."""

    def __init__(self, how: str) -> None:
        self._how = how
        self._asked = anyio.Event()
        self._scope = anyio.CancelScope()
        self.left = anyio.Event()
        self.api: Any = None

    def leave(self) -> None:
        if self._how == "cancelled":
            self._scope.cancel()
        self._asked.set()

    async def run(self, transport: MemoryTransport, **options: Any) -> None:
        with self._scope:
            async with RPCChannel(transport, timeout=CALL_BOUND, **options) as channel:
                self.api = channel.get_api()
                await self._asked.wait()
        self.left.set()


@asynccontextmanager
async def leaving(how: str, stays: object = None, **options: Any) -> AsyncIterator[Any]:
    """Two channels; the first is the one to be left, ``options`` are its own."""
    a, b = MemoryTransport.pair(codec="json")
    channel = Leaving(how)
    with anyio.fail_after(BOUND):
        async with (
            a,
            b,
            RPCChannel(b, expose=stays, timeout=CALL_BOUND) as other,
            anyio.create_task_group() as group,
        ):
            group.start_soon(lambda: channel.run(a, **options))
            while channel.api is None:
                await checkpoint()
            yield channel, other.get_api()
            channel.leave()


HOW = pytest.mark.parametrize("how", ["left", "cancelled"])


@HOW
async def test_streams_finish(how: str) -> None:
    """In the grace period, with all that their readers ask for meanwhile."""
    api = Api()
    async with leaving(how, expose=api, grace_period=BOUND) as (channel, other):
        async with other.finite() as items:
            assert await items.__anext__() == 0
            channel.leave()
            for _ in range(20):
                await checkpoint()
            api.go_on.set()
            assert [number async for number in items] == list(range(1, MANY))
        await channel.left.wait()
    assert api.closed == ["finite"]


@HOW
async def test_handlers_and_what_they_read_and_return_finish(how: str) -> None:
    """A handler that reads a stream argument has its items, and its own stream is read."""
    go_on = anyio.Event()

    async def numbers() -> AsyncIterator[int]:
        yield 0
        await go_on.wait()
        for number in range(1, MANY):
            yield number

    begun = anyio.Event()

    async def doubled(numbers: AsyncIterator[int]) -> Any:
        found = [await numbers.__anext__()]
        begun.set()
        found += [number async for number in numbers]

        async def items() -> AsyncIterator[int]:
            for number in found:
                yield 2 * number

        return items()

    results: list[int] = []
    async with leaving(how, expose={"doubled": doubled}, grace_period=BOUND) as (channel, other):
        async with anyio.create_task_group() as group:

            async def call() -> None:
                results.extend([number async for number in other.doubled(numbers())])

            group.start_soon(call)
            await begun.wait()
            channel.leave()
            for _ in range(20):
                await checkpoint()
            go_on.set()
        await channel.left.wait()
    assert results == [2 * number for number in range(MANY)]


@HOW
@pytest.mark.parametrize("grace", [0.0, 0.02])
@pytest.mark.parametrize("name", ["endless", "waiting"])
async def test_what_is_open_then(how: str, grace: float, name: str) -> None:
    """The source is closed, and its reader told, also one that has stopped reading."""
    api = Api()
    async with leaving(how, expose=api, grace_period=grace) as (channel, other):
        async with getattr(other, name)() as items:
            assert await items.__anext__() == 1
            channel.leave()
            await channel.left.wait()
            assert api.closed == [name]
            with pytest.raises(DeliveryError, match=ENDED):
                async for number in items:
                    assert number == 1


async def test_one_that_is_not_read_yet() -> None:
    """Its reader is told as well."""
    api = Api()
    async with leaving("left", expose=api) as (channel, other):
        items = await other.endless()
        channel.leave()
        await channel.left.wait()
        with pytest.raises(DeliveryError, match=ENDED):
            await items.__anext__()


@HOW
@pytest.mark.parametrize("grace", [0, BOUND])
async def test_arguments(how: str, grace: float) -> None:
    """Streams that are arguments of the calls of who leaves are sources, too."""
    api, source = Api(), Api()
    errors: list[Exception] = []
    totals: list[int] = []

    async def total(numbers: AsyncIterator[int]) -> None:
        try:
            totals.append(await api.total(numbers))
        except Exception as exc:
            errors.append(exc)

    async with leaving(how, {"total": total}, grace_period=grace) as (channel, _):
        async with anyio.create_task_group() as group:

            async def call() -> None:
                await channel.api.total(source.finite())

            group.start_soon(call)
            await api.begun.wait()
            channel.leave()
            if grace:
                for _ in range(20):
                    await checkpoint()
                source.go_on.set()
                while not totals:
                    await checkpoint()
            await channel.left.wait()
            group.cancel_scope.cancel()
    if grace:
        assert totals == [sum(range(MANY))]
        assert errors == []
    elif errors:  # else the call was cancelled before it heard of it
        assert isinstance(errors[0], DeliveryError)
    assert source.closed == ["finite"]


async def test_peer_that_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Telling it has an end, and the source is closed."""
    monkeypatch.setattr("anyio_kkrpc._channel.CLOSE_TIMEOUT", 0.05)
    api = Api()
    a, b = MemoryTransport.pair(codec="json")
    blocked = anyio.Event()
    send = MemoryTransport.send

    async def stuck(self: MemoryTransport, item: Any) -> None:
        if self is a and blocked.is_set():
            await anyio.sleep_forever()
        await send(self, item)

    monkeypatch.setattr(MemoryTransport, "send", stuck)
    with anyio.fail_after(BOUND):
        async with a, b, RPCChannel(b, timeout=CALL_BOUND) as other:
            async with RPCChannel(a, expose=api):
                items = await other.get_api().waiting()
                assert await items.__anext__() == 1
                blocked.set()
    assert api.closed == ["waiting"]


class Failing:
    """Fails with the stream that it was given, which somebody holds still."""

    def __init__(self) -> None:
        self.held: list[Any] = []

    async def fail(self, numbers: AsyncIterator[int], read: bool) -> None:
        self.held.append(numbers)
        if read:
            await numbers.__anext__()
        raise ValueError("failed")

    async def wait(self, numbers: AsyncIterator[int], read: bool) -> None:
        self.held.append(numbers)
        await numbers.__anext__()
        await anyio.sleep_forever()


@pytest.mark.parametrize("read", [False, True])
async def test_arguments_of_a_call_that_fails(read: bool) -> None:
    """They end at once; who still reads them is told why."""
    closed = anyio.Event()

    async def numbers() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    api = Failing()
    async with pair(api) as (client, server, remote, _):
        with pytest.raises(RemoteError, match="failed"):
            await remote.fail(numbers(), read)
        with anyio.fail_after(BOUND):
            while client.statistics().outgoing_streams or server.statistics().incoming_streams:
                await checkpoint()
        assert closed.is_set() is read  # a generator that was never begun has nothing to close
        with pytest.raises(DeliveryError, match="has failed"):
            await api.held[0].__anext__()


async def test_arguments_of_a_call_that_is_given_up() -> None:
    """Its handler is cancelled; who holds the stream beside it doesn't wait for more."""

    async def numbers() -> AsyncIterator[int]:
        yield 1
        await anyio.sleep_forever()

    api = Failing()
    async with pair(api) as (_, server, remote, _):
        with pytest.raises(RPCTimeoutError):
            await with_call_options(remote, timeout=0.1).wait(numbers(), True)
        with anyio.fail_after(BOUND):
            while server.statistics().handlers or server.statistics().incoming_streams:
                await checkpoint()
        for held in api.held:
            with pytest.raises(DeliveryError):
                await held.__anext__()
