"""What waits beside the queue: for one peer alone, or put aside because it is large."""

from __future__ import annotations

import anyio
import pytest

from anyio_kkrpc import TransportClosedError
from anyio_kkrpc._protocol._records import Record, Reply, Request
from anyio_kkrpc.abc import Envelope, Listener
from anyio_kkrpc.kit._inbound import Inbound
from anyio_kkrpc.kit._queue import BoundedQueue
from anyio_kkrpc.redis._reading._aside import Aside
from anyio_kkrpc.redis._reading._large import LargeRequest

pytestmark = pytest.mark.anyio


class Ear(Listener):
    def received(self, envelope: Envelope) -> None:
        raise AssertionError

    def ended(self, reason: Exception) -> None:
        pass


class Peer:
    """As a transport uses it: three may wait, and what runs weighs 100 at most."""

    def __init__(self) -> None:
        self.queue: BoundedQueue[Envelope] = BoundedQueue(3, 100, "drop_oldest", on_drop=self.drop)
        self.inbound = Inbound(self.queue)
        self.refused: list[str] = []
        self.invalid: list[str] = []
        self.aside = Aside(
            self.queue,
            self.inbound,
            (3, 100),
            self.decode,
            self.answer,
            lambda envelope: self.invalid.append(name(envelope)),
        )

    def decode(self, fields: list[bytes]) -> Record:
        return Request(fields[0].decode(), "call", ["f"], a=[1])

    def answer(self, envelope: Envelope) -> None:
        reply = envelope.record
        assert isinstance(reply, Reply)
        assert isinstance(reply.e, dict)
        assert (reply.e["n"], envelope.recipient) == ("OverloadedError", "x")
        self.refused.append(reply.id)

    def drop(self, envelope: Envelope) -> None:
        self.aside.take_back(envelope)

    def ask(self, *names: str, to: str | None = None) -> None:
        for one in names:
            envelope = Envelope(Request(one, "call", ["f"]), "x", to)
            if to is None:
                self.inbound.deliver(envelope, 1)
            else:
                self.aside.deliver(envelope, 1)

    def ask_much(self, one: str, weight: int, *, size: int = 1, token: bytes | None = None) -> None:
        request = LargeRequest(Request(one, "call", ["f"]), "x", None, token=token)
        request.fields, request.weight = [one.encode(), b"x" * (size - len(one))], weight
        self.inbound.deliver(request, 1)

    async def receive(self) -> Envelope:
        while True:
            aside = self.aside
            envelope = await (aside.receive() if aside.waiting else self.inbound.receive())
            if envelope.__class__ is Envelope or aside.begin(envelope):
                if aside.waiting:
                    aside.go_on()
                return envelope

    async def take(self, count: int) -> list[str]:
        return [name(await self.receive()) for _ in range(count)]


def name(envelope: Envelope) -> str:
    record = envelope.record
    assert isinstance(record, Request)
    return record.id


async def test_in_turn() -> None:
    """What is for this peer alone keeps its order, and takes turns with the rest."""
    peer = Peer()
    peer.ask("1", "2", "3")
    peer.ask("a", "b", "c", to="me")
    assert await peer.take(3) == ["a", "1", "b"]
    peer.ask("d", to="me")
    assert await peer.take(4) == ["2", "c", "3", "d"]
    peer.ask("e", "f", to="me")
    assert await peer.take(2) == ["e", "f"]
    assert not peer.aside.waiting


async def test_room_of_their_own() -> None:
    """Others take no room of theirs, and they no others'; they are refused if there are too many."""
    peer = Peer()
    peer.ask("a", to="me")
    peer.ask("1", "2", "3", "4")
    peer.ask("b", "c", "d", to="me")
    assert peer.refused == ["1", "d"]
    statistics = peer.aside.statistics()
    assert (statistics.current_items, statistics.dropped) == (6, 2)
    assert sorted(await peer.take(6)) == ["2", "3", "4", "a", "b", "c"]


async def test_evicted() -> None:
    """One that got into the queue, because somebody waited there, isn't dropped for others."""
    peer = Peer()
    got: list[str] = []

    async def receive() -> None:
        got.extend(await peer.take(1))

    async with anyio.create_task_group() as group:
        group.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        peer.ask("a", to="me")
        assert len(peer.queue) == 1
        peer.ask("1", "2", "3", "4")
    assert peer.refused == ["1"]
    assert sorted(got + await peer.take(3)) == ["2", "3", "4", "a"]


async def test_several_receivers() -> None:
    """Nobody waits at the queue while there is something beside it; cancels lose nothing."""
    peer = Peer()
    got: list[str] = []

    async def receive() -> None:
        while True:
            got.append(name(await peer.receive()))

    async with anyio.create_task_group() as group:
        scopes = [anyio.CancelScope() for _ in range(3)]

        async def run(scope: anyio.CancelScope) -> None:
            with scope:
                await receive()

        for scope in scopes:
            group.start_soon(run, scope)
        await anyio.wait_all_tasks_blocked()
        peer.ask("1", "2")
        peer.ask("a", "b", to="me")
        scopes[0].cancel()
        await anyio.wait_all_tasks_blocked()
        assert sorted(got) == ["1", "2", "a", "b"]
        peer.ask("c", to="me")
        scopes[1].cancel()
        await anyio.wait_all_tasks_blocked()
        assert got[4:] == ["c"]
        scopes[2].cancel()


async def test_small_ones_pass_large_ones() -> None:
    """As many run as weigh no more than allowed; the others wait in their order."""
    peer = Peer()
    peer.ask_much("A", 60)
    peer.ask_much("B", 60)
    first = await peer.receive()
    peer.ask("1")
    assert await peer.take(1) == ["1"]
    peer.ask_much("C", 30)
    assert await peer.take(1) == ["C"]
    assert peer.aside.statistics().current_items == 1
    got: list[str] = []

    async def receive() -> None:
        got.append(name(await peer.receive()))

    async with anyio.create_task_group() as group:
        group.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        assert got == []
        peer.aside.end(first)
    assert got == ["B"]
    assert peer.aside.statistics().current_items == 0


async def test_crowded() -> None:
    """When much was put aside nothing else is taken, until there is room, or it is forgotten."""
    peer = Peer()
    peer.ask_much("A", 1000)
    first = await peer.receive()
    for ends in (True, False):
        got: list[str] = []

        async def receive(got: list[str] = got) -> None:
            got.extend(await peer.take(2))

        async with anyio.create_task_group() as group:
            peer.ask_much("B", 1000, size=100, token=b"1-1")
            peer.ask("1", "2")
            group.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            assert got == []
            with anyio.move_on_after(0):  # who waits here can be cancelled
                await peer.receive()
            if ends:
                peer.aside.end(first)
                await anyio.wait_all_tasks_blocked()
                assert got == ["B", "1"]
                assert await peer.take(1) == ["2"]
            else:
                peer.aside.forget(begun=False)  # a group gets its own back
                await anyio.wait_all_tasks_blocked()
                assert got == ["1", "2"]


async def test_what_is_forgotten() -> None:
    """It is counted unless a group gets it back; without a listener it waits for who comes next."""
    peer = Peer()
    peer.ask_much("A", 1000)
    await peer.receive()
    peer.ask_much("B", 1000, token=b"1-1")
    peer.ask_much("C", 1000)
    peer.ask("1")
    peer.ask("a", "b", to="me")
    assert sorted(await peer.take(3)) == ["1", "a", "b"]
    peer.ask("c", to="me")
    assert peer.aside.statistics().current_items == 3
    peer.inbound.listen(None)
    peer.aside.forget(begun=True)
    assert peer.aside.statistics().current_items == 2
    # What was begun is nobody's any more, so there is room.
    assert await peer.take(2) == ["C", "c"]
    peer.ask_much("D", 1000)
    peer.ask("1")
    assert await peer.take(1) == ["1"]
    peer.ask("d", to="me")
    peer.inbound.listen(Ear())
    peer.aside.forget(begun=False)
    assert peer.aside.statistics().current_items == 0
    assert peer.inbound.unserved == 2


async def test_end() -> None:
    """Nothing is received after the end, whatever waits."""
    peer = Peer()
    peer.ask("1")
    peer.ask("a", to="me")
    peer.inbound.end(TransportClosedError("over"))
    peer.aside.forget(begun=True)
    peer.ask("b", to="me")
    for _ in range(2):
        with pytest.raises(TransportClosedError, match="over"):
            await peer.receive()
    assert peer.aside.statistics().current_items == 0
