"""A reader that raises an error in a source, or ends it with a value: `athrow` and `areturn`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from anyio_kkrpc import (
    DeliveryError,
    OverloadedError,
    RemoteError,
    RPCTimeoutError,
    RPCValidationError,
    TransportClosedError,
)
from anyio_kkrpc._driver._pump import MOST_THROWN
from anyio_kkrpc.records import StreamReply, StreamRequest
from tests.bounds import BOUND
from tests.pairs import Pair, pair

pytestmark = pytest.mark.anyio


class SourceError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"of the source: {code}")
        self.code = code


class Api:
    def __init__(self) -> None:
        self.closed = 0
        self.caught: list[RemoteError] = []
        self.thrown, self.gate = anyio.Event(), anyio.Event()

    async def patient(self) -> AsyncIterator[Any]:
        """Goes on, whatever is raised in it."""
        number = 0
        item: Any = 0
        try:
            while True:
                try:
                    yield item
                    number += 1
                    item = number
                except RemoteError as exc:
                    self.caught.append(exc)
                    item = f"caught {exc.message}"
        finally:
            self.closed += 1

    async def numbers(self) -> AsyncIterator[int]:
        try:
            for number in range(1000):
                yield number
        finally:
            self.closed += 1

    # All of these run ahead of their reader: an error is raised where they yield next.

    async def ends(self) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        except RemoteError:
            return

    async def raises(self) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        except RemoteError:
            raise SourceError(7) from None

    async def unfit(self) -> AsyncIterator[int]:
        while True:
            try:
                yield 1
            except RemoteError:
                yield "no number"  # type: ignore[misc]

    async def breaks(self) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            raise SourceError(8)

    async def stuck(self) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        except RemoteError:
            await anyio.sleep_forever()

    async def gated(self) -> AsyncIterator[Any]:
        """Holds the first error until `gate` is set, and yields what a later one says."""
        number = 0
        item: Any = 0
        while True:
            try:
                yield item
                number += 1
                item = number
            except RemoteError as exc:
                self.caught.append(exc)
                self.thrown.set()
                await self.gate.wait()
                item = exc.message

    def plain(self) -> AsyncIterator[int]:
        return _Plain()

    async def read(self, items: AsyncIterator[int]) -> Any:
        first = await items.__anext__()
        try:
            return [first, await items.athrow(SourceError(first))]  # type: ignore[attr-defined]
        except RemoteError as exc:
            return [first, exc.name, exc.data]

    async def pass_on(self, items: AsyncIterator[int]) -> AsyncIterator[int]:
        return items


class _Plain:
    """An iterator that is no generator."""

    def __aiter__(self) -> _Plain:
        return self

    async def __anext__(self) -> int:
        return 1


async def settled(opened: Pair) -> None:
    """Wait until no stream is open."""
    with anyio.fail_after(BOUND):
        while opened.server.statistics().outgoing_streams:
            await anyio.sleep(0.001)
    assert opened.client.statistics().incoming_streams == 0


async def test_a_source_goes_on() -> None:
    """It catches the error as it was, and what it yields then is the answer; nothing is lost."""
    api = Api()
    async with pair(api) as opened:
        async with await opened.api.patient() as items:
            assert await items.__anext__() == 0
            assert await items.athrow(SourceError(1)) == "caught of the source: 1"
            assert await items.athrow(KeyError("key")) == "caught key"
            assert [await items.__anext__() for _ in range(400)] == list(range(1, 401))
        await settled(opened)
    assert [(exc.name, exc.data) for exc in api.caught] == [
        ("SourceError", {"code": 1}),
        ("KeyError", {}),
    ]
    assert api.closed == 1


@pytest.mark.parametrize(
    ("source", "name", "data"),
    [
        ("numbers", "SourceError", {"code": 5}),
        ("plain", "SourceError", {"code": 5}),
        ("raises", "SourceError", {"code": 7}),
    ],
)
async def test_an_error_comes_back(source: str, name: str, data: dict[str, Any]) -> None:
    """If the source doesn't catch it, can't, or raises another one; what came before is read."""
    async with pair(Api()) as opened:
        items = await opened.api[source]()
        await items.__anext__()
        with pytest.raises(RemoteError) as failed:
            await items.athrow(SourceError(5))
        assert (failed.value.name, failed.value.data) == (name, data)
        assert all([isinstance(item, int) async for item in items])
        with pytest.raises(StopAsyncIteration):
            await items.__anext__()
        with pytest.raises(SourceError):
            await items.athrow(SourceError(9))
        await settled(opened)


async def test_a_source_that_ends_or_is_wrong_then() -> None:
    """The end is StopAsyncIteration, as of a generator; an item is checked as others are."""
    async with pair(Api()) as opened:
        items = await opened.api.ends()
        await items.__anext__()
        with pytest.raises(StopAsyncIteration):
            await items.athrow(ValueError("x"))
        items = await opened.api.unfit()
        await items.__anext__()
        with pytest.raises(RPCValidationError, match="int"):
            await items.athrow(ValueError("x"))
        await settled(opened)


async def test_before_the_first_item() -> None:
    """The body of the source never runs."""
    api = Api()
    async with pair(api) as opened:
        items = await opened.api.numbers()
        with pytest.raises(RemoteError, match="of the source"):
            await items.athrow(SourceError(1))
        items = await opened.api.numbers()
        assert await items.areturn(5) == 5
        await settled(opened)
    assert api.closed == 0


async def test_a_stream_that_is_an_argument() -> None:
    """A handler raises errors in the source of its caller, and those of a stream that it passes on
    reach the first one."""
    caught: list[str] = []

    async def source(*, catches: bool) -> AsyncIterator[int]:
        while True:
            try:
                yield 1
            except RemoteError as exc:
                caught.append(exc.name)
                if not catches:
                    raise
                yield 3

    async with pair(Api()) as opened:
        assert await opened.api.read(source(catches=True)) == [1, 3]
        assert await opened.api.read(source(catches=False)) == [1, "SourceError", {"code": 1}]
        items = await opened.api.pass_on(source(catches=True))
        assert await items.__anext__() == 1
        assert await items.athrow(SourceError(2)) == 3
        await items.aclose()
    assert caught == ["SourceError"] * 3


async def test_return() -> None:
    """It waits until the source is closed, and gives the value back."""
    api = Api()
    async with pair(api) as opened:
        items = await opened.api.numbers()
        await items.__anext__()
        assert await items.areturn({"why": [1]}) == {"why": [1]}
        assert api.closed == 1
        assert await items.areturn() is None
        assert [item async for item in items] == []
        await settled(opened)


async def test_closing_fails(caplog: pytest.LogCaptureFixture) -> None:
    """Who waits for the end gets the error; who only leaves doesn't."""
    with caplog.at_level(logging.CRITICAL):
        async with pair(Api()) as opened:
            items = await opened.api.breaks()
            await items.__anext__()
            with pytest.raises(RemoteError) as failed:
                await items.areturn(1)
            assert failed.value.data == {"code": 8}
            async with await opened.api.breaks() as items:
                await items.__anext__()
            await settled(opened)


async def test_values_that_cannot_be_sent() -> None:
    """The stream is ended all the same."""
    api = Api()
    async with pair(api) as opened:
        items = await opened.api.numbers()
        await items.__anext__()
        with pytest.raises(TypeError):
            await items.areturn(object())
        await settled(opened)
    assert api.closed == 1


async def test_what_is_no_error() -> None:
    """What isn't an Exception, such as a cancellation, isn't for the other side."""
    api = Api()
    async with pair(api) as opened:
        items = await opened.api.patient()
        await items.__anext__()
        with pytest.raises(KeyboardInterrupt):
            await items.athrow(KeyboardInterrupt())
        await settled(opened)
    assert api.caught == []


async def test_no_answer_in_time() -> None:
    """The stream is ended."""
    async with pair(Api()) as opened:
        items = await opened.api.stuck()
        await items.__anext__()
        items._inflow._timeout = 0.01
        with pytest.raises(RPCTimeoutError, match="no answer"):
            await items.athrow(ValueError("x"))
        await settled(opened)


async def test_an_error_that_is_not_waited_for() -> None:
    """Its answer is lost, and no item with it."""
    api = Api()
    async with pair(api) as opened:
        items = await opened.api.gated()
        read = [await items.__anext__()]
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(items.athrow, ValueError("one"))
                with anyio.fail_after(BOUND):
                    await api.thrown.wait()
                scope.cancel()
        api.gate.set()
        assert await items.athrow(ValueError("two")) == "two"
        while len(read) < 100:
            read.append(await items.__anext__())
        await items.aclose()
        await settled(opened)
    assert read == list(range(100))


@pytest.mark.parametrize("count", [MOST_THROWN, MOST_THROWN + 1])
async def test_errors_that_wait(count: int, caplog: pytest.LogCaptureFixture) -> None:
    """A reader that doesn't wait for answers is stopped before they are too many."""
    api = Api()
    with caplog.at_level(logging.CRITICAL):
        async with pair(api) as opened:
            items = await opened.api.gated()
            await items.__anext__()
            (consumer,) = opened.client._conversation.consumers.values()
            opened.client._core.post(consumer.throw({"n": "Error", "m": "first"}), None)
            with anyio.fail_after(BOUND):
                await api.thrown.wait()
            for number in range(count):
                thrown = StreamRequest(str(number), consumer.id, "throw", e={"n": "E", "m": "x"})
                opened.client._core.post(thrown, None)
            await opened.client._core.send(StreamRequest("p", consumer.id, "pull", n=1), None)
            await anyio.wait_all_tasks_blocked()
            api.gate.set()
            if count > MOST_THROWN:
                with pytest.raises(OverloadedError, match="too many errors"):
                    while True:
                        await items.__anext__()
            await items.aclose()
            await settled(opened)
    assert len(api.caught) <= MOST_THROWN + 1


async def test_who_reads_after_bare_errors() -> None:
    """Is taken for there, however many of them came together."""
    api = Api()
    async with pair(api) as opened:
        items = await opened.api.gated()
        await items.__anext__()
        (consumer,) = opened.client._conversation.consumers.values()
        (producer,) = opened.server._conversation.producers.values()
        pump: Any = producer.driver
        entries: list[Any] = []
        timer = opened.server._core.timer
        at = timer.at

        def noted(*args: Any) -> Any:
            entries.append(at(*args))
            return entries[-1]

        pump._core.timer = SimpleNamespace(at=noted, cancel=timer.cancel)
        for number in range(3):
            error = {"n": "Error", "m": "x", "rpc_error": "bare"}
            opened.client._core.post(
                StreamRequest(str(number), consumer.id, "throw", e=error), None
            )
        with anyio.fail_after(BOUND):
            await api.thrown.wait()
            api.gate.set()
            while len(entries) < 3:
                await anyio.sleep(0.001)
        pump._core.timer = timer
        opened.client._core.post(StreamRequest("p", consumer.id, "pull", n=1), None)
        await anyio.wait_all_tasks_blocked()
        assert [entry.action for entry in entries] == [None, None, None]


async def test_the_channel_ends_meanwhile() -> None:
    """Who waits for an answer is told."""
    async with pair(Api()) as opened:
        items = await opened.api.stuck()
        await items.__anext__()

        async def throw() -> None:
            with pytest.raises(TransportClosedError):
                await items.athrow(ValueError("x"))

        async with anyio.create_task_group() as group:
            group.start_soon(throw)
            await anyio.wait_all_tasks_blocked()
            await opened.transports[0].aclose()


async def test_an_answer_that_may_be_lost() -> None:
    """An error is not raised twice, so nobody waits for its answer; a return is said again."""
    async with pair(Api()) as opened:
        items = await opened.api.stuck()
        await items.__anext__()

        async def throw() -> None:
            with pytest.raises(DeliveryError, match="known"):
                await items.athrow(ValueError("x"))

        async with anyio.create_task_group() as group:
            group.start_soon(throw)
            await anyio.wait_all_tasks_blocked()
            opened.client._reactions.doubted()


async def test_an_end_that_crosses_a_return() -> None:
    """A source that ended by itself before it heard of that is an answer, too."""
    async with pair(Api()) as opened:
        items = await opened.api.numbers()
        await items.__anext__()
        (consumer,) = opened.client._conversation.consumers.values()
        leave = opened.client._conversation.leave(consumer, 5, ask=True)
        assert isinstance(leave, StreamRequest)
        assert leave.v == 5
        again = opened.client._conversation.ask_again()[0].record
        assert isinstance(again, StreamRequest)
        assert (again.op, again.v) == ("return", 5)
        event: Any = opened.client._conversation.receive(
            StreamReply("other", consumer.id, d=True, v=6), None
        )
        assert event.reply.v == 6
        assert not opened.client._conversation.consumers
        opened.client._core.post(leave, None)
        await settled(opened)
