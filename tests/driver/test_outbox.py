"""What is sent without waiting, and what is put there from other threads and by finalizers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import create_task_group, fail_after, to_thread
from anyio.lowlevel import checkpoint

from anyio_kkrpc import MemoryTransport, OverloadedError
from anyio_kkrpc._driver._outbox import Outbox
from anyio_kkrpc._protocol._conversation import Conversation
from anyio_kkrpc._protocol._records import CallbackRelease, Cancel, StreamRequest
from anyio_kkrpc._protocol._streams import Consumer
from anyio_kkrpc.abc import Envelope
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio


class Watched:
    """A transport that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Envelope] = []
        self.refuses = self.stuck = False
        self.gate: anyio.Event | None = None

    async def send(self, item: Envelope) -> None:
        await checkpoint()
        if self.refuses:
            raise OverloadedError("no room")
        if self.stuck:
            await anyio.sleep(BOUND)
        if self.gate is not None:
            await self.gate.wait()
        self.sent.append(item)

    async def until(self, number: int) -> None:
        with fail_after(BOUND):
            while len(self.sent) < number:
                await checkpoint()


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Outbox, Watched, Any]]:
    transport: Any = Watched()
    peer = Conversation("p-", lambda *ids: lambda: None)
    outbox = Outbox(peer, transport)
    async with create_task_group() as group:
        outbox.open()
        group.start_soon(outbox.run)
        yield outbox, transport, peer
        group.cancel_scope.cancel()


async def test_in_order() -> None:
    async with running() as (outbox, transport, _):
        for number in range(3):
            outbox.post(Cancel(str(number)), "them", token=number)
        await transport.until(3)
    assert [envelope.record.id for envelope in transport.sent] == ["0", "1", "2"]
    assert [envelope.token for envelope in transport.sent] == [0, 1, 2]
    assert {envelope.recipient for envelope in transport.sent} == {"them"}


async def test_from_other_threads() -> None:
    """What finalizers leave there, in any thread, is sent."""
    async with running() as (outbox, transport, peer):
        consumer = Consumer("s", "them", "c", iter("12").__next__)
        assert consumer.wait() is not None
        peer.consumers["them", "s"] = consumer

        def work() -> None:
            outbox.release("f", "them", "r")
            outbox.release("g", "them", "r")
            outbox.abandon(consumer)

        await to_thread.run_sync(work)
        # Callbacks go in one record or two, as the event loop came to look.
        with fail_after(BOUND):
            while len(sent_names(transport)) < 3:
                await checkpoint()
    assert sorted(sent_names(transport)) == ["f", "g", "return"]


def sent_names(transport: Watched) -> list[str]:
    names: list[str] = []
    for envelope in transport.sent:
        record = envelope.record
        assert envelope.recipient == "them"
        if isinstance(record, CallbackRelease):
            assert record.q == ["r"] * len(record.ids)
            names += record.ids
        else:
            assert isinstance(record, StreamRequest)
            names.append(record.op)
    return names


async def test_what_can_not_be_sent(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and keeps nothing else from being sent."""
    async with running() as (outbox, transport, _):
        transport.refuses = True
        outbox.post(Cancel("1"), None)
        with fail_after(BOUND):
            while "a Cancel was not sent" not in caplog.text:
                await checkpoint()
        transport.refuses = False
        outbox.post(Cancel("2"), None)
        await transport.until(1)


@pytest.mark.parametrize("bound", ["MOST_OWED", "MOST_OWED_WEIGHT"])
async def test_what_peers_are_owed_is_bounded(
    bound: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In number and in weight, while nothing can be sent; what this side wants of itself is not."""
    monkeypatch.setattr(f"anyio_kkrpc._driver._outbox.{bound}", 3 if bound == "MOST_OWED" else 7000)
    async with running() as (outbox, transport, _):
        transport.gate = anyio.Event()
        outbox.post(Cancel("first"), None)
        await anyio.wait_all_tasks_blocked()  # it holds up all others
        for number in range(100):
            outbox.owe(StreamRequest(str(number), "s", "return", v="x" * 2000), "them")
        outbox.post(Cancel("last"), None)
        assert outbox.dropped == 97
        transport.gate.set()
        await transport.until(5)
        assert [envelope.record.id for envelope in transport.sent] == [
            "first",
            "0",
            "1",
            "2",
            "last",
        ]
        for number in range(3):  # there is room again
            outbox.owe(StreamRequest(str(number), "s", "return", v="x" * 2000), "them")
        await transport.until(8)
    assert outbox.dropped == 97
    assert caplog.text.count("a StreamRequest was thrown away: 3 records wait to be sent") == 10


async def test_all_that_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What finalizers leave included, while nothing can be sent."""
    monkeypatch.setattr("anyio_kkrpc._driver._outbox.MOST", 5)
    async with running() as (outbox, transport, peer):
        transport.gate = anyio.Event()
        outbox.post(Cancel("first"), None)
        await anyio.wait_all_tasks_blocked()
        for number in range(20):
            consumer = peer._streams.consume(str(number), "them", "r")
            assert consumer.wait() is not None
            outbox.abandon(consumer)
            outbox.release("f", "them", "r")
            with fail_after(BOUND):
                while outbox._released or outbox._abandoned:
                    await checkpoint()
        assert outbox.dropped == 35
        assert len(outbox._waiting) == 5
        transport.gate.set()
        await transport.until(6)
        outbox.post(Cancel("last"), None)
        await transport.until(7)


async def test_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """What is left is sent, as far as that is quick; afterwards nothing is taken."""
    caplog.set_level(logging.INFO, "anyio_kkrpc")
    transport: Any = Watched()
    outbox = Outbox(Conversation("p-", lambda *ids: lambda: None), transport)
    outbox.post(Cancel("1"), None)
    outbox.release("f", "them", "r")
    await outbox.finish(BOUND)
    assert len(transport.sent) == 2
    transport.stuck = True
    outbox.post(Cancel("2"), None)
    with fail_after(BOUND / 2):
        await outbox.finish(0.01)
    transport.stuck, transport.refuses = False, True
    outbox.post(Cancel("3"), None)
    await outbox.finish(BOUND)
    assert "was not told all of the end" in caplog.text
    transport.refuses = False
    outbox.close()
    outbox.post(Cancel("4"), None)
    outbox.release("g", "them", "r")
    await outbox.finish(BOUND)
    assert len(transport.sent) == 2


async def test_a_channel_posts_what_nobody_waits_for() -> None:
    """On a real transport: a cancel reaches the peer though its caller is gone."""
    a, b = MemoryTransport.pair(codec="json")
    async with a, b:
        outbox = Outbox(Conversation("p-", lambda *ids: lambda: None), a)
        outbox.open()
        async with create_task_group() as group:
            group.start_soon(outbox.run)
            outbox.post(Cancel("1"), None)
            with fail_after(BOUND):
                assert (await b.receive()).record == Cancel("1")
            group.cancel_scope.cancel()
