"""What finds no inbox: kept where its owner may make it again, given up where it has left.

A writer against a model of a server whose inboxes come and go. Time is virtual.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyio_kkrpc import DeliveryError, RPCTimeoutError
from anyio_kkrpc._protocol._records import CallbackCall, Cancel, Reply, Request
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.redis._writing import _undelivered
from anyio_kkrpc.redis.dialects.native import VERSION

from .test_writer import CALLER, KEYS, Model, Rig, acknowledged, ids, in_virtual_time, running

INBOX = KEYS.inbox(CALLER)
NOBODY = b"$-1\r\n"
CHANCE = 60.0


class Inboxes(Model):
    """A server that may lose inboxes.

    :ivar gone: those that aren't there
    :ivar own_lost: whether this peer's own is gone, too
    """

    def __init__(self, verdicts: list[str], sizes: list[int] | None = None) -> None:
        super().__init__(verdicts, sizes)
        self.gone: set[bytes] = set()
        self.own_lost = False
        self.asked = 0

    def execute(self, command: list[bytes]) -> bytes:
        if command[0] == b"EXISTS":
            self.asked += 1
            return b":%d\r\n" % len(set(command[1:]) - self.gone)
        if command[0] == b"XADD" and command[1] in self.gone:
            return NOBODY
        return super().execute(command)


@asynccontextmanager
async def peer(model: Inboxes, version: int = VERSION) -> AsyncIterator[Rig]:
    async with running(model, version=version) as rig, anyio.create_task_group() as group:
        undelivered = rig.writer.undelivered

        async def request(*command: bytes) -> Any:
            await anyio.sleep(0.001)
            reader = hiredis.Reader()
            reader.feed(model.execute([*command]))
            return reader.gets()

        async def keep_own(execute: Callable[..., Awaitable[Any]]) -> None:
            await anyio.sleep(0.001)
            if model.own_lost:
                model.own_lost = False
                undelivered.open(anyio.current_time())

        group.start_soon(undelivered.run, request, keep_own)
        yield rig
        group.cancel_scope.cancel()


async def reconnect(rig: Rig) -> None:
    """Lose the connection, and have the next one."""
    connections = rig.connections
    rig.stream.feed(b"")
    while rig.connections == connections:
        await anyio.sleep(0.001)
    await rig.settled()


@pytest.mark.parametrize("version", [VERSION, 0])
def test_kept_in_order(version: int) -> None:
    """After an outage: nothing is lost or doubled, what is new waits behind what found no inbox, and
    the request is pending until its reply is there.
    """

    async def check() -> None:
        model = Inboxes([])
        async with peer(model, version) as rig:
            await reconnect(rig)
            model.gone.add(INBOX)
            rig.reply(1)
            rig.post(CallbackCall("c2", []))
            await anyio.sleep(1)
            rig.post(CallbackCall("c3", []))
            rig.reply(4)
            rig.post(CallbackCall("other", []), "another")
            await anyio.sleep(CHANCE - 5)
            assert len(rig.writer.undelivered) == 4
            assert model.pending == {b"1-0", b"4-0"}
            assert dict(rig.writer.unanswered) == {b"1-0": 1, b"4-0": 1}
            assert ids(model.read("another")) == ["other"]
            model.gone.clear()
            await anyio.sleep(1)
            await rig.settled()
            read = model.read() if version else model.read_before()
            assert ids(read) == ["r1", "c2", "c3", "r4"]
            rig.reply(5)
            await rig.settled()
            assert model.pending == set()
            assert len(rig.writer.undelivered) == 0
        assert rig.returned == []
        # It was not written again and again, nor asked for without pauses.
        assert sum(command[0] == b"XADD" for command in model.commands) == 8
        assert model.asked < 200

    in_virtual_time(check)


@pytest.mark.parametrize("version", [VERSION, 0])
def test_read_before_the_outage(version: int) -> None:
    """What arrived as the connection was lost, was read, and finds no inbox at the second time, is
    recognized by its number when it comes again.
    """

    async def check() -> None:
        model = Inboxes([])
        async with peer(model, version) as rig:
            rig.post(CallbackCall("c1", []))
            await rig.settled()
            connections = rig.connections
            model.verdicts.append("cut behind")
            rig.post(CallbackCall("c2", []))
            rig.post(CallbackCall("c3", []))
            while model.verdicts:
                await anyio.sleep(0.0001)
            model.gone.add(INBOX)
            while rig.connections == connections:
                await anyio.sleep(0.001)
            await anyio.sleep(1)
            rig.post(CallbackCall("c4", []))
            assert len(rig.writer.undelivered) == 3
            model.gone.clear()
            await anyio.sleep(1)
            await rig.settled()
        assert len(model.inboxes[INBOX]) == 5
        read = model.read() if version else model.read_before()
        assert ids(read) == ["c1", "c2", "c3", "c4"]

    in_virtual_time(check)


def test_acknowledged_already() -> None:
    """A reply that turns out to have found no inbox makes its request pending again."""

    async def check() -> None:
        model = Inboxes([])
        async with peer(model) as rig:
            model.gone.add(INBOX)
            model.own_lost = True
            rig.reply(1)
            await anyio.sleep(1)
            assert acknowledged(model) == [b"1-0"]
            assert model.pending == {b"1-0"}
            model.gone.clear()
            await anyio.sleep(1)
        assert ids(model.read()) == ["r1"]
        assert model.pending == set()

    in_virtual_time(check)


def test_peer_that_has_left() -> None:
    """Where no outage was and this peer's own inbox is there, it is given up at once, each time."""

    async def check() -> None:
        model = Inboxes([])
        async with peer(model) as rig:
            model.gone.add(INBOX)
            for number in range(1, 4):
                rig.reply(number)
                rig.post(CallbackCall(f"c{number}", []))
                await anyio.sleep(0.1)
                assert len(rig.returned) == 2 * number
                assert isinstance(rig.returned[-1].error, DeliveryError)
                assert rig.writer.undeliverable == 2 * number
            assert len(rig.writer.undelivered) == 0
            # Nothing was made pending again for it.
            assert acknowledged(model) == [b"1-0", b"2-0", b"3-0"]
            assert {command[0] for command in model.commands} == {b"XADD", b"XACK"}
            model.gone.clear()
            rig.reply(4)
            await rig.settled()
        assert ids(model.read()) == ["r4"]
        assert model.pending == set()

    in_virtual_time(check)


def test_owner_that_does_not_come_back() -> None:
    """It is kept for so long after the connection was made again, and then given up."""

    async def check() -> None:
        model = Inboxes([])
        async with peer(model) as rig:
            await reconnect(rig)
            model.gone.add(INBOX)
            await anyio.sleep(CHANCE / 2)
            rig.reply(1)
            await anyio.sleep(CHANCE / 2 - 2)
            assert rig.returned == []
            assert model.pending == {b"1-0"}
            await anyio.sleep(4)
            assert [type(one.error) for one in rig.returned] == [DeliveryError]
            assert model.pending == set()
            assert dict(rig.writer.unanswered) == {}

    in_virtual_time(check)


def test_deadlines() -> None:
    """Nothing is kept for longer than its caller waits; a request that is kept has less time left."""

    async def check() -> None:
        model = Inboxes([])
        async with peer(model) as rig:
            await reconnect(rig)
            model.gone.add(INBOX)
            now = anyio.current_time()
            model.pending.add(b"1-0")
            reply = Envelope(Reply("r1", 1), None, CALLER, deadline=now + 5)
            rig.writer.settle(b"1-0", reply, 1)
            rig.writer.flush_nowait()
            for name, seconds in (("a", 5), ("b", 20)):
                request = Request(name, "call", ["f"], d=seconds * 1000)
                envelope = Envelope(request, None, CALLER, deadline=now + seconds)
                rig.writer.send_nowait(envelope)
            await anyio.sleep(4)
            assert rig.returned == []
            await anyio.sleep(2)
            assert {one.record.id for one in rig.returned} == {"r1", "a"}  # type: ignore[union-attr]
            assert all(isinstance(one.error, RPCTimeoutError) for one in rig.returned)
            assert model.pending == set()
            model.gone.clear()
            await anyio.sleep(1)
        (request,) = model.read()
        assert request.id == "b"
        assert 10_000 < request.d < 15_000

    in_virtual_time(check)


def test_bounded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What exceeds the bounds, in posts or bytes, is given up, counted and logged."""
    monkeypatch.setattr(_undelivered, "_MOST", 10)
    monkeypatch.setattr(_undelivered, "_MOST_BYTES", 10_000)

    async def check() -> None:
        model = Inboxes([])
        async with peer(model) as rig:
            await reconnect(rig)
            model.gone.add(INBOX)
            rig.post(CallbackCall("large", ["x" * 5000]))
            rig.post(CallbackCall("larger", ["x" * 10_000]))
            for number in range(20):
                rig.reply(number)
                await anyio.sleep(0.01)
            assert len(rig.writer.undelivered) <= 10
            kept = len(rig.writer.undelivered)
            assert rig.writer.undeliverable == len(rig.returned) == 22 - kept
            assert len(model.pending) == kept - 1
            assert caplog.text.count("no more is kept") == 1
            model.gone.clear()
            await anyio.sleep(1)
            assert len(model.read()) == kept
            assert model.pending == set()

    in_virtual_time(check)


def test_taken_back() -> None:
    """A cancel takes back the request that waits, and who stops waiting for one does, too."""

    async def check() -> None:
        model = Inboxes([])
        async with peer(model) as rig:
            await reconnect(rig)
            model.gone.add(INBOX)
            for name in ("a", "b", "c"):
                rig.post(Request(name, "call", ["f"]))
            await anyio.sleep(0.1)
            rig.post(Cancel("b"))
            envelope = Envelope(Request("one-way", "call", ["f"], o=True), None, CALLER)
            with anyio.move_on_after(1):
                await rig.writer.send_and_confirm(envelope)
            model.gone.clear()
            await anyio.sleep(1)
            rig.post(Cancel("c"))
            await rig.settled()
        assert [(type(one), one.id) for one in model.read()] == [
            (Request, "a"),
            (Request, "c"),
            (Cancel, "c"),
        ]
        assert rig.returned == []

    in_virtual_time(check)


def test_end_while_something_waits() -> None:
    """Requests whose reply waits go back to the group; who waits for a confirmation is told."""

    async def check() -> None:
        model = Inboxes([])
        async with peer(model) as rig:
            await reconnect(rig)
            model.gone.add(INBOX)
            rig.reply(1)
            errors = []

            async def ask() -> None:
                envelope = Envelope(Request("one-way", "call", ["f"], o=True), None, CALLER)
                try:
                    await rig.writer.send_and_confirm(envelope)
                except DeliveryError as exc:
                    errors.append(exc)

            async with anyio.create_task_group() as group:
                group.start_soon(ask)
                await anyio.sleep(1)
                rig.writer.end(DeliveryError("over"))
            assert len(errors) == 1
            assert dict(rig.writer.unanswered) == {b"1-0": 1}

    in_virtual_time(check)


def test_reply_that_was_taken_as_the_peer_ends() -> None:
    """Its request doesn't go back to the group, though the answer comes after the end."""

    async def check() -> None:
        model = Inboxes([])
        async with peer(model) as rig:
            await reconnect(rig)
            rig.reply(1)
            rig.writer.end(DeliveryError("over"))
            assert dict(rig.writer.unanswered) == {b"1-0": 1}
            await anyio.sleep(1)
            assert dict(rig.writer.unanswered) == {}
            assert rig.writer.unfinished() == []
        assert acknowledged(model) == [b"1-0"]

    in_virtual_time(check)


@given(
    st.lists(
        st.tuples(st.sampled_from("rrcc-+."), st.integers(0, 30)),
        max_size=40,
    ),
    st.lists(st.integers(1, 8), min_size=1, max_size=5),
    st.lists(st.sampled_from(["take", "take", "take", "oom", "cut", "cut behind"]), max_size=20),
)
def test_any_order(work: list[tuple[str, int]], sizes: list[int], verdicts: list[str]) -> None:
    """Inboxes that come and go, connections that are lost, writes that are refused: each record is
    there once, each sender's in order from when the inbox is there for good, and nothing stays
    pending.
    """

    async def check() -> None:
        model = Inboxes(verdicts, sizes)
        async with peer(model) as rig:
            await reconnect(rig)
            sent = []
            for number, (kind, pause) in enumerate(work):
                if kind == "r":
                    rig.reply(number)
                    sent.append(f"r{number}")
                elif kind == "c":
                    rig.post(CallbackCall(f"c{number}", []))
                    sent.append(f"c{number}")
                elif kind == "-":
                    model.gone.add(INBOX)
                elif kind == "+":
                    model.gone.clear()
                else:
                    rig.stream.feed(b"")
                await anyio.sleep(pause / 1000)
            model.gone.clear()
            await anyio.sleep(20)
            await rig.settled()
            assert len(rig.writer.undelivered) == 0
        found = ids(model.read())
        assert sorted(found) == sorted(sent)
        if "+" not in [kind for kind, _ in work]:
            assert found == sent
        assert model.pending == set()
        assert (rig.returned, rig.given_up, rig.failures) == ([], [], [])

    in_virtual_time(check)
