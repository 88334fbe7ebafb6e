"""Whatever the source of a stream or a callback does, its channel goes on and its reader hears."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_kkrpc import RemoteError, RPCTimeoutError
from anyio_kkrpc._driver import _pump
from anyio_kkrpc.testing import connected
from tests.pairs import Pair, pair

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

pytestmark = pytest.mark.anyio

MANY = 1000  # more than may be sent ahead


class PanicException(BaseException):
    """As extensions written in Rust raise it."""


class Api:
    """Sources that record how they were closed."""

    def __init__(self) -> None:
        self.closed: list[str] = []
        self.errors: list[BaseException] = []

    def ping(self) -> str:
        return "pong"

    async def _cleaned(self, name: str) -> None:
        """What a source does at its end, and takes a while."""
        await checkpoint()
        await anyio.sleep(0.01)
        self.closed.append(name)

    async def plain(self) -> AsyncIterator[int]:
        try:
            for number in range(MANY):
                yield number
        finally:
            await self._cleaned("plain")

    async def scope(self) -> AsyncIterator[int]:
        try:
            with anyio.fail_after(300):
                for number in range(MANY):
                    yield number
        finally:
            await self._cleaned("scope")

    async def tasks(self) -> AsyncIterator[int]:
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep, 3600)
                for number in range(MANY):
                    yield number
        finally:
            await self._cleaned("tasks")

    async def tasks_in_scopes(self) -> AsyncIterator[int]:
        try:
            with anyio.move_on_after(300):
                async with anyio.create_task_group() as group:
                    group.start_soon(anyio.sleep, 3600)
                    with anyio.CancelScope():
                        for number in range(MANY):
                            yield number
        finally:
            await self._cleaned("tasks_in_scopes")

    async def waits_in_tasks(self) -> AsyncIterator[int]:
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep, 3600)
                yield 0
                await anyio.sleep(3600)
        finally:
            with anyio.CancelScope(shield=True):
                await self._cleaned("waits_in_tasks")

    async def limited(self) -> AsyncIterator[int]:
        """Its time is over while it is at its yield: nobody takes more."""
        with anyio.fail_after(0.02):
            for number in range(MANY):
                yield number

    async def goes_on(self) -> AsyncIterator[str]:
        with anyio.move_on_after(0.02):
            for number in range(MANY):
                yield str(number)
        for _ in range(3):
            yield "late"

    async def raises(self, index: int) -> AsyncIterator[int]:
        yield 1
        raise self.errors[index]

    async def raises_in_the_end(self, index: int) -> AsyncIterator[int]:
        try:
            for number in range(MANY):
                yield number
        finally:
            raise self.errors[index]

    async def others_cancel(self) -> AsyncIterator[int]:
        yield 1
        task = asyncio.ensure_future(asyncio.sleep(3600))
        await asyncio.sleep(0)
        task.cancel()
        await task

    async def call(self, callback: Callable[[int], Any]) -> None:
        await callback(1)


SCOPES = ["plain", "scope", "tasks", "tasks_in_scopes"]


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(60):
        while not condition():
            await anyio.sleep(0.001)


async def works_on(link: Pair) -> None:
    """The channels are whole, and no stream is left behind."""
    await until(lambda: not link.server.statistics().outgoing_streams)
    assert await link.api.ping() == "pong"
    assert not link.server.closed
    assert not link.client.closed


@pytest.mark.parametrize("take", [0, 1, 3, 40])
@pytest.mark.parametrize("name", SCOPES)
async def test_left_early(name: str, take: int) -> None:
    """A source that holds scopes or tasks around its yield is closed, inside them."""
    api = Api()
    async with pair(api) as link:
        async with getattr(link.api, name)() as items:
            for number in range(take):
                assert await items.__anext__() == number
        await works_on(link)
    assert api.closed == ([name] if take else [])


async def test_left_while_it_waits() -> None:
    """A source that waits for something is cancelled there."""
    api = Api()
    async with pair(api) as link:
        async with link.api.waits_in_tasks() as items:
            assert await items.__anext__() == 0
        await works_on(link)
    assert api.closed == ["waits_in_tasks"]


@pytest.mark.parametrize("name", [*SCOPES, "waits_in_tasks"])
async def test_channel_that_ends(name: str) -> None:
    """Sources have time to clean up also when their channel is left or cancelled."""
    for cancelled in (False, True):
        api = Api()
        async with pair(api) as link:
            items = await getattr(link.api, name)()
            assert await items.__anext__() == 0
            if cancelled:
                with anyio.CancelScope() as scope:
                    async with pair(api) as other:
                        found = await getattr(other.api, name)()
                        assert await found.__anext__() == 0
                        scope.cancel()
                        await anyio.sleep(3600)
                assert api.closed == [name]
        assert api.closed == [name] * (1 + cancelled)


async def test_read_to_the_end() -> None:
    """Scopes around the yields make no difference to who reads on."""
    async with pair(Api()) as link:
        for name in ("scope", "tasks_in_scopes"):
            async with getattr(link.api, name)() as items:
                count = 0
                with anyio.move_on_after(60):  # the tasks in the second one don't end
                    async for number in items:
                        assert number == count
                        count += 1
                        if count == MANY:
                            break
                assert count == MANY
        await works_on(link)


async def test_time_that_runs_out_at_the_yield() -> None:
    """It is raised where it belongs: in the source, whose reader gets it."""
    async with pair(Api()) as link:
        async with link.api.limited() as items:
            assert await items.__anext__() == 0
            await until(lambda: not link.server.statistics().outgoing_streams)
            with pytest.raises(RemoteError) as caught:
                async for _ in items:
                    pass
        assert caught.value.name == "TimeoutError"
        await works_on(link)


async def test_time_that_runs_out_and_a_source_that_goes_on() -> None:
    async with pair(Api()) as link:
        async with link.api.goes_on() as items:
            first = await items.__anext__()
            await anyio.sleep(0.1)
            found = [item async for item in items]
        assert first == "0"
        assert found[-3:] == ["late"] * 3
        assert found[:-3] == [str(number + 1) for number in range(len(found) - 3)]
        await works_on(link)


HOSTILE: list[Any] = [
    pytest.param(PanicException("panic"), id="panic"),
    pytest.param(GeneratorExit(), id="generator-exit"),
    pytest.param(SystemExit(3), id="exit"),
    pytest.param(
        BaseExceptionGroup("some", [PanicException("one"), ValueError("two")]), id="group"
    ),
    pytest.param(ValueError("x" * 200_000), id="huge"),
]
SURROGATES = pytest.param(ValueError("\udcff" * 50_000), id="surrogates")


@pytest.mark.parametrize("error", [*HOSTILE, SURROGATES])
async def test_what_a_source_raises(error: BaseException) -> None:
    """Its reader gets an error with its name, and the channel goes on."""
    api = Api()
    api.errors = [error]
    async with pair(api, server={"send_tracebacks": True}) as link:
        async with link.api.raises(0) as items:
            assert await items.__anext__() == 1
            with pytest.raises(RemoteError) as caught:
                await items.__anext__()
        assert caught.value.name == type(error).__name__
        await works_on(link)


@pytest.mark.parametrize("error", HOSTILE)
async def test_what_a_source_raises_when_it_is_closed(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged: nobody waits for it."""
    api = Api()
    api.errors = [error]
    async with pair(api) as link:
        async with link.api.raises_in_the_end(0) as items:
            await items.__anext__()
        await works_on(link)
    # An async generator may end with GeneratorExit.
    expected = [] if isinstance(error, GeneratorExit) else ["closing the source of a stream failed"]
    assert [r.message for r in caplog.records if r.levelno == logging.ERROR] == expected


@pytest.mark.parametrize("error", HOSTILE)
async def test_what_a_callback_raises(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and ends neither the channel nor the other invocations."""
    seen: list[int] = []

    async def callback(value: int) -> None:
        seen.append(value)
        await checkpoint()
        raise error

    async with pair(Api()) as link:
        await link.api.call(callback)
        await link.api.call(callback)
        assert seen == [1, 1]
        await works_on(link)
    assert len([r for r in caplog.records if "failed" in r.message]) == 2


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_tasks_that_others_cancel() -> None:
    """A CancelledError of another task is an error of the source or callback that awaits it."""

    async def callback(value: int) -> None:
        async for _ in api.others_cancel():
            pass

    api = Api()
    async with pair(api) as link:
        async with link.api.others_cancel() as items:
            assert await items.__anext__() == 1
            with pytest.raises(RemoteError) as caught:
                await items.__anext__()
        assert caught.value.name == "CancelledError"
        await link.api.call(callback)
        await works_on(link)


class Scoped:
    """An iterator of one's own that stays in a scope from its first item on."""

    def __init__(self) -> None:
        self.scope: AbstractContextManager[Any] = anyio.CancelScope()
        self.begun = False
        self.closed = 0

    def __aiter__(self) -> Scoped:
        return self

    async def __anext__(self) -> int:
        if not self.begun:
            self.begun = True
            self.scope.__enter__()
        await checkpoint()
        return 1

    async def aclose(self) -> None:
        self.closed += 1
        self.scope.__exit__(None, None, None)


async def test_iterators_that_are_no_generators() -> None:
    source = Scoped()
    async with pair({"stream": lambda: source, "ping": lambda: "pong"}) as link:
        async with link.api.stream() as items:
            assert await items.__anext__() == 1
        await works_on(link)
    assert source.closed == 1


async def test_a_source_that_takes_long_to_close(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_pump, "CLOSE_TIMEOUT", 0.05)

    async def slow() -> AsyncIterator[int]:
        try:
            for number in range(MANY):
                yield number
        finally:
            await anyio.sleep(3600)

    async with pair({"slow": slow, "ping": lambda: "pong"}) as link:
        async with link.api.slow() as items:
            await items.__anext__()
        await works_on(link)
    assert "took over 0.05 s to close" in caplog.text


async def test_nobody_begins_to_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The source is closed, and who comes later is told so."""
    monkeypatch.setattr(_pump, "FIRST_PULL", 0.05)
    api = Api()
    async with pair(api) as link:
        items = await link.api.plain()
        await works_on(link)
        with pytest.raises(RPCTimeoutError, match="nobody began to read the stream within"):
            await items.__anext__()
    assert "the stream of plain was closed" in caplog.text


async def test_reader_that_came_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is for the first item only."""
    monkeypatch.setattr(_pump, "FIRST_PULL", 0.05)
    async with connected(Api()) as api, api.plain() as items:
        await items.__anext__()
        await anyio.sleep(0.2)
        assert [number async for number in items] == list(range(1, MANY))
