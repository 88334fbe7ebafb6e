"""Streams whose other peer is gone, as a transport tells it: they end, are counted and logged."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from msgspec import UNSET

from anyio_kkrpc import DeliveryError, RPCChannel, by_reference
from anyio_kkrpc._protocol._dependencies import Role
from anyio_kkrpc._protocol._records import CallbackCall, Reply, StreamReply, StreamRequest
from anyio_kkrpc._protocol._values import STREAM
from anyio_kkrpc.abc import Capabilities, Envelope
from tests.bounds import BOUND

from .test_late_events import Scripted

pytestmark = pytest.mark.anyio


class Watching(Scripted):
    """Keeps what it is to watch as well, and whom each record was sent to."""

    def __init__(self, *, broadcast: bool = False) -> None:
        super().__init__(broadcast=broadcast)
        self.watched: set[tuple[str | None, Role]] = set()
        self.envelopes: list[Envelope] = []

    def watch(self, peer: str | None, role: Role, wanted: bool) -> None:
        (self.watched.add if wanted else self.watched.discard)((peer, role))

    async def send(self, item: Envelope) -> None:
        await super().send(item)
        self.envelopes.append(item)

    def lose(self, peer: str, role: Role) -> None:
        assert self.listener is not None
        self.listener.peer_gone(peer, role, DeliveryError(f"peer {peer!r} is gone"))

    def told(self, peer: str) -> list[Any]:
        return [one.record for one in self.envelopes if one.recipient == peer]


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await checkpoint()


async def begin(transport: Watching, sender: str, number: int) -> Any:
    """Answer the call of that number with a stream."""
    await transport.until_asked(number)
    call = transport.requests()[number - 1]
    transport.deliver(Reply(call.id, {STREAM: "async-iterable", "id": f"s{number}"}), sender)


async def test_source_that_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    """What came is read, then there is an error, though nothing has a time-out; others go on."""
    transport = Watching()
    found: dict[str, list[int]] = {"lost": [], "kept": []}
    errors: list[Exception] = []

    async def read(name: str) -> None:
        try:
            async for item in getattr(channel.get_api(), name)():
                found[name].append(item)
        except DeliveryError as exc:
            errors.append(exc)

    async with RPCChannel(transport, timeout=None) as channel, anyio.create_task_group() as group:
        for number, (name, sender) in enumerate((("lost", "one"), ("kept", "two")), 1):
            group.start_soon(read, name)
            await begin(transport, sender, number)
        await until(lambda: transport.told("one") and transport.told("two"))
        assert transport.watched == {("one", "source"), ("two", "source")}
        transport.deliver(StreamReply("1", "s1", d=False, v=1, i=0), "one")
        transport.lose("one", "reader")  # it isn't needed as one
        transport.lose("one", "source")
        await until(lambda: errors)
        assert found == {"lost": [1], "kept": []}
        assert "peer 'one' is gone" in str(errors[0])
        # Should it be there after all, it closes the source, and what it sends meets nobody.
        await until(lambda: len(transport.told("one")) == 2)
        assert [record.op for record in transport.told("one")] == ["pull", "return"]
        transport.deliver(StreamReply("2", "s1", d=False, v=2, i=1), "one")
        assert transport.watched == {("two", "source")}
        transport.deliver(StreamReply("3", "s2", d=True, i=0), "two")
        with anyio.fail_after(BOUND):
            while transport.watched:
                await checkpoint()
        statistics = channel.statistics()
        assert (statistics.lost_streams, statistics.incoming_streams) == (1, 0)
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "peer 'one' is gone; streams that end with it: 1"
    ]


async def test_readers_that_are_lost(caplog: pytest.LogCaptureFixture) -> None:
    """Sources are closed: of one that waits for credit, and of one that was sent no item yet."""
    transport = Watching(broadcast=True)
    closed: list[int] = []

    async def source(number: int) -> AsyncIterator[int]:
        try:
            yield number
            await anyio.sleep_forever()
        finally:
            closed.append(number)

    async def call(number: int) -> None:
        await channel.get_api().take(source(number))

    async with RPCChannel(transport, timeout=None) as channel, anyio.create_task_group() as group:
        for number in (1, 2):
            group.start_soon(call, number)
            await transport.until_asked(number)
        (first, second) = channel._core.conversation.producers.values()
        assert transport.watched == {(None, "reader")}
        transport.deliver(StreamRequest("1", first.id, "pull", n=1), "one")
        transport.deliver(StreamRequest("2", second.id, "pull", n=2), "one")
        assert transport.watched == {("one", "reader")}
        await until(lambda: len(transport.told("one")) == 2)
        transport.lose("one", "reader")
        await until(lambda: len(closed) == 2)
        statistics = channel.statistics()
        assert (statistics.lost_streams, statistics.outgoing_streams) == (2, 0)
        assert not transport.watched
        group.cancel_scope.cancel()
    assert "peer 'one' is gone; streams that end with it: 2" in caplog.messages


async def test_item_that_can_not_be_delivered() -> None:
    """Its stream ends with an error: what comes behind it would not be missed otherwise."""
    transport = Watching(broadcast=True)
    closed = anyio.Event()

    async def source() -> AsyncIterator[int]:
        try:
            yield 1
            await anyio.sleep_forever()
        finally:
            closed.set()

    async def call() -> None:
        await channel.get_api().take(source())

    async with RPCChannel(transport, timeout=None) as channel, anyio.create_task_group() as group:
        group.start_soon(call)
        await transport.until_asked(1)
        (producer,) = channel._core.conversation.producers.values()
        transport.deliver(StreamRequest("1", producer.id, "pull", n=5), "one")
        await until(lambda: transport.told("one"))
        (item,) = transport.told("one")
        assert transport.listener is not None
        for _ in range(2):
            transport.listener.received(
                Envelope(item, None, "one", error=DeliveryError("Redis refused the message"))
            )
        with anyio.fail_after(BOUND):
            await closed.wait()
        await until(lambda: len(transport.told("one")) == 2)
        error = transport.told("one")[1].e
        assert error["rpc_error"] == "delivery"
        assert error["m"] == "an item could not be delivered: Redis refused the message"
        await until(lambda: not channel.statistics().outgoing_streams)
        assert channel.statistics().undelivered == 2
        group.cancel_scope.cancel()


async def test_stream_that_is_asked_of_all() -> None:
    """A question to all peers may have a stream as its argument; it ends with the question."""
    transport = Watching(broadcast=True)
    closed = anyio.Event()

    async def source() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    async with RPCChannel(transport) as channel:
        replies = channel.broadcast(channel.get_api().take(source()), timeout=60)
        async with replies, anyio.create_task_group() as group:
            group.start_soon(replies.__anext__)
            await transport.until_asked(1)
            (producer,) = channel._core.conversation.producers.values()
            transport.deliver(StreamRequest("1", producer.id, "pull", n=2), "one")
            await until(lambda: len(transport.told("one")) == 2)
            transport.deliver(Reply(transport.requests()[0].id, 2), "one")
        with anyio.fail_after(BOUND):
            await closed.wait()
        await until(lambda: not channel.statistics().outgoing_streams)


@pytest.mark.parametrize("kind", ["reference", "callback"])
async def test_what_runs_for_a_peer_that_is_lost(kind: str) -> None:
    """It is cancelled; what runs for others goes on."""
    transport = Watching()
    transport.capabilities_ = Capabilities(addressing=True)
    begun: list[int] = []
    stopped: list[int] = []

    async def stuck(number: int) -> None:
        begun.append(number)
        try:
            await anyio.sleep_forever()
        finally:
            stopped.append(number)

    async with RPCChannel(transport, timeout=None) as channel, anyio.create_task_group() as group:
        given = by_reference(stuck) if kind == "reference" else stuck
        group.start_soon(channel.get_api().keep, given)
        await transport.until_asked(1)
        (argument,) = transport.requests()[0].a
        known = argument["v"] if kind == "reference" else argument
        path: Any = ["apply"] if kind == "reference" else UNSET
        for number, peer in enumerate(("one", "two")):
            transport.deliver(CallbackCall(known["id"], [number], r=f"u{number}", p=path), peer)
        await until(lambda: len(begun) == 2)
        transport.lose("one", "reader")
        await until(lambda: stopped == [0])
        group.cancel_scope.cancel()
