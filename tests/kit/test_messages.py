"""All of a transport but for reading and writing, over streams of messages in memory."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
from anyio import EndOfStream, wait_all_tasks_blocked
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from anyio_kkrpc import OverloadedError, TransportClosedError, TransportConnectionError
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.kit import Messages
from anyio_kkrpc.records import CallbackRelease, Reply, Request, StreamReply, StreamRequest
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio


class Side:
    """`Messages`, and the other side as bare messages."""

    def __init__(self, **options: Any) -> None:
        self._out, self.written = anyio.create_memory_object_stream[bytes](100)
        self.write, self._in = anyio.create_memory_object_stream[bytes](100)
        self.closed = 0
        self.messages = Messages(self._write, self._close, **options)

    async def _write(self, messages: list[bytes]) -> None:
        for message in messages:
            await self._out.send(message)

    async def _close(self) -> None:
        self.closed += 1
        self._in.close()
        self._out.close()

    async def read(self) -> None:
        async for message in self._in:
            self.messages.take(message)

    async def next(self) -> Any:
        return msgspec.json.decode(await self.written.receive())


@asynccontextmanager
async def side(**options: Any) -> AsyncIterator[Side]:
    one = Side(**options)
    ends: list[MemoryObjectSendStream[bytes] | MemoryObjectReceiveStream[bytes]]
    ends = [one.write, one.written]
    try:
        with anyio.fail_after(BOUND):
            async with one.messages.running(one.read):
                yield one
    finally:
        for end in ends:
            end.close()


REQUEST = b'{"t":"q","id":"1","op":"call","p":["f"]}'


async def test_a_peer_that_reads_no_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up before what it is to be told fills the memory."""
    monkeypatch.setattr("anyio_kkrpc.kit._messages.MOST_UNREAD", 2000)
    async with side(max_queue_size=1) as one:
        while one.messages.inbound.ended_reason is None:
            try:
                await one.write.send(REQUEST)
            except anyio.BrokenResourceError:
                break
        await anyio.wait_all_tasks_blocked()
        assert isinstance(one.messages.inbound.ended_reason, TransportConnectionError)
        assert "goes on asking" in str(one.messages.inbound.ended_reason)
    assert one.closed


async def test_there_and_back() -> None:
    """A request is received, and its reply written; both are counted."""
    async with side() as one:
        await one.write.send(REQUEST)
        envelope = await one.messages.inbound.receive()
        assert envelope.record == Request("1", "call", ["f"])
        await one.messages.settle(envelope, Envelope(Reply("1", 5)))
        assert await one.next() == {"t": "r", "id": "1", "v": 5}
        counts = one.messages.statistics()
        assert (counts.sent, counts.received, counts.invalid, counts.oversized) == (1, 1, 0, 0)


async def test_what_cannot_be_read_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    """It is counted, and what comes behind it is received."""
    with caplog.at_level(logging.WARNING):
        async with side(max_message_size=100) as one:
            for message in (b"\xff", b"[]", b" " * 101, REQUEST):
                await one.write.send(message)
            await one.messages.inbound.receive()
            counts = one.messages.statistics()
    assert (counts.received, counts.invalid, counts.oversized) == (1, 2, 1)
    assert len(caplog.records) == 3


async def test_what_is_too_large_is_not_sent() -> None:
    """Nor is what can't be encoded; the next one is."""
    async with side(max_message_size=100) as one:
        with pytest.raises(OverloadedError, match="exceeds max_message_size"):
            await one.messages.send(Envelope(Reply("1", "x" * 100)))
        with pytest.raises(TypeError):
            await one.messages.send(Envelope(Reply("1", object())))
        await one.messages.send(Envelope(Reply("2")))
        assert await one.next() == {"t": "r", "id": "2"}


async def test_a_request_without_room_is_refused() -> None:
    """Its caller is told, unless it wants no reply."""
    async with side(max_queue_size=1) as one:
        for identifier, more in (("1", b""), ("2", b',"o":true'), ("3", b"")):
            message = b'{"t":"q","id":"%s","op":"call","p":["f"]%s}'
            await one.write.send(message % (identifier.encode(), more))
        reply = await one.next()
        assert (reply["id"], reply["e"]["rpc_error"]) == ("3", "overloaded")
        assert (await one.messages.inbound.receive()).record.id == "1"  # type: ignore[union-attr]


async def test_the_other_side_ends() -> None:
    """What came is received, then the end is told, and nothing can be sent."""
    async with side() as one:
        await one.write.send(REQUEST)
        one.write.close()
        await one.messages.inbound.receive()
        with pytest.raises(EndOfStream):
            await one.messages.inbound.receive()
        with pytest.raises(TransportClosedError, match="other side"):
            await one.messages.send(Envelope(Reply("1")))


async def test_writing_fails() -> None:
    """The connection is lost for all, and closed."""
    async with side() as one:
        one.written.close()
        with pytest.raises(TransportConnectionError, match="lost"):
            await one.messages.send(Envelope(Reply("1")))
        assert one.closed
        with pytest.raises(TransportConnectionError):
            await one.messages.inbound.receive()


async def test_what_waits_is_written_before_the_end() -> None:
    """Leaving writes what was left to the task, and nothing is sent afterwards."""
    one = Side(max_queue_size=1)
    async with one.messages.running(one.read):
        for _ in range(3):
            one.messages.take(REQUEST)
    assert [msgspec.json.decode(message)["t"] async for message in one.written] == ["r", "r"]
    with pytest.raises(TransportClosedError):
        await one.messages.send(Envelope(Reply("1")))
    for end in (one.write, one.written):
        end.close()


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("codec", "xml", ValueError),
        ("dialect", "kkrpc-9", ValueError),
        ("superjson", 1, TypeError),
        ("max_message_size", 0, ValueError),
        ("max_message_size", 1 << 32, ValueError),
        ("max_message_size", 1.5, TypeError),
        ("max_queue_size", 0, ValueError),
        ("max_queue_bytes", True, TypeError),
        ("overflow", "block", ValueError),
        ("write_timeout", 0, ValueError),
        ("write_timeout", "1", TypeError),
    ],
)
def test_wrong_options(option: str, value: object, error: type[Exception]) -> None:
    """The text names the option."""

    async def nothing(*_: object) -> None:
        raise AssertionError

    Messages(nothing, nothing)  # needs no event loop yet
    with pytest.raises(error, match=f"^{option}:"):
        Messages(nothing, nothing, **{option: value})  # type: ignore[arg-type]


async def test_used_wrongly() -> None:
    """Before it runs it sends nothing, and it runs once."""
    one = Side(name="thing")
    with pytest.raises(RuntimeError, match="not been entered"):
        await one.messages.send(Envelope(Reply("1")))
    async with one.messages.running(one.read):
        pass
    with pytest.raises(RuntimeError, match="thing can be entered once"):
        async with one.messages.running(one.read):
            pass
    for end in (one.write, one.written):
        end.close()


async def test_callbacks_of_kkrpc_2_are_released_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task that runs by itself sends what is due, and goes on to the next time."""
    monkeypatch.setattr("anyio_kkrpc.typescript._releases.DELAY", 0.01)
    async with side(dialect="kkrpc-2") as one:
        assert not one.messages.capabilities.cancellation
        for number in range(2):
            callback = b'{"__kkrpc_next_arg__":"callback","id":"f%d"}' % number
            one.messages.take(REQUEST[:-1] + b',"a":[%s]}' % callback)
            await one.messages.send(Envelope(CallbackRelease([f"f{number}"])))
            assert await one.next() == {"t": "cbr", "ids": [f"f{number}"]}


async def test_streams_to_kkrpc_0_are_paced() -> None:
    """A peer that speaks so is answered so, and its stream gets pulls without asking."""
    async with side() as one:
        assert one.messages.capabilities.cancellation
        line = {"id": "1", "method": "f", "args": [], "type": "request", "version": "json"}
        one.messages.take(msgspec.json.encode(line))
        assert not one.messages.capabilities.cancellation
        inbound = one.messages.inbound
        envelope = await inbound.receive()
        stream = {"__kkrpc_next_stream__": "async-iterable", "id": "s"}
        await one.messages.settle(envelope, Envelope(Reply("1", stream)))
        assert (await one.next())["type"] == "response"
        pull = (await inbound.receive()).record  # there is no listener
        assert isinstance(pull, StreamRequest)
        assert (pull.sid, pull.op) == ("s", "pull")
        await one.messages.send(Envelope(StreamReply("1", "s", d=True)))
        assert (await one.next())["type"] == "stream-end"
        await wait_all_tasks_blocked()
