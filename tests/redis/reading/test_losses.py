"""How often an inbox is looked for, and what is made of a look. Time is virtual."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
import trio
from trio.testing import MockClock

from anyio_kkrpc import DeliveryError
from anyio_kkrpc._protocol._records import Request
from anyio_kkrpc.abc import Envelope, Listener
from anyio_kkrpc.kit._inbound import Inbound
from anyio_kkrpc.kit._queue import BoundedQueue
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._reading._losses import Losses
from anyio_kkrpc.redis._reading._repeats import Repeats

INBOX = b"{s}:inbox:me"


class Caller(Listener):
    """A listener that waits for replies."""

    def __init__(self) -> None:
        self.open: dict[str, Envelope] = {}
        self.failed: dict[str, Exception] = {}
        self.lost_by: list[Exception] = []

    def ask(self, name: str, recipient: str | None = None, token: bytes | None = None) -> None:
        request = Request(name, "call", ["f"])
        self.open[name] = Envelope(request, None, recipient, token=token)

    def received(self, envelope: Envelope) -> None:
        assert isinstance(envelope.record, Request)
        assert envelope.error is not None
        del self.open[envelope.record.id]
        self.failed[envelope.record.id] = envelope.error

    def ended(self, reason: Exception) -> None:
        raise AssertionError

    def expects(self) -> bool:
        return bool(self.open)

    def waiting(self) -> list[Envelope]:
        return list(self.open.values())

    def lost(self, reason: Exception) -> None:
        self.lost_by.append(reason)


class Reader:
    def __init__(self) -> None:
        self.positions = {INBOX: b"5-0"}


class Link:
    """A link to a server that tells what was answered.

    :ivar connection: ``None`` while it is made again
    :ivar answered: what is there, and was
    :ivar missing: what was, or was never there
    """

    def __init__(self) -> None:
        self.connection: Any = "there"
        self.answered: set[bytes] = set()
        self.missing: set[bytes] = set()
        self.refusals: list[Exception] = []
        self.end = b"9-0"
        self.asked: list[Any] = []

    async def request(self, *command: Any) -> Any:
        await anyio.sleep(0.01)
        self.asked.append(command)
        if self.refusals:
            raise self.refusals.pop(0)
        found = [one for one in command[5:] if one in self.answered]
        return found + [b"-" + one for one in command[5:] if one in self.missing]

    async def ask(self, what: str, portion: Any, command: Callable[[int], Any]) -> Any:
        await anyio.sleep(0.01)
        return [b"last-generated-id", self.end]


class Rig:
    def __init__(self, group: bytes | None) -> None:
        queue: BoundedQueue[Envelope] = BoundedQueue(10, 1000, "drop_oldest")
        inbound = Inbound(queue)
        self.caller, self.link, self.reader = Caller(), Link(), Reader()
        inbound.listen(self.caller)
        self.opened: list[float] = []
        link: Any = self.link
        reader: Any = self.reader
        where = (b"s", group, INBOX, inbound, Repeats(INBOX), link, reader)
        self.sent_again: set[str] = set()
        self.losses = Losses(*where, [self.opened.append], self._is_sent_again)

    def _is_sent_again(self, request: Envelope) -> bool:
        assert isinstance(request.record, Request)
        return request.record.id in self.sent_again


def with_losses(function: Callable[[Rig], Awaitable[None]], group: bytes | None = b"g") -> None:
    async def check() -> None:
        rig = Rig(group)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rig.losses.run)
            await function(rig)
            tasks.cancel_scope.cancel()

    trio.run(check, clock=MockClock(autojump_threshold=0))


def test_looks() -> None:
    """Only where somebody waits and nothing comes: what comes shows that the inbox is there."""

    async def check(rig: Rig) -> None:
        looks: list[float] = []

        async def keep(execute: Any) -> None:
            assert execute == rig.link.request
            looks.append(anyio.current_time())
            if len(looks) == 3:
                raise ResponseError("OOM not now")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rig.losses.look, keep)
            await anyio.sleep(20)
            assert looks == []
            rig.caller.ask("one")
            await anyio.sleep(20)
            assert 8 <= len(looks) <= 11
            looks.clear()
            for number in range(20):
                rig.reader.positions[INBOX] = b"%d-0" % (10 + number)
                await anyio.sleep(1)
            assert looks == []
            tasks.cancel_scope.cancel()

    with_losses(check)


@pytest.mark.parametrize("made", [b"9-0", b"3-0"], ids=["later", "clock behind"])
def test_deleted(made: bytes) -> None:
    """Those that were answered fail once the new inbox was read, and so do those to one peer."""

    async def check(rig: Rig) -> None:
        rig.caller.ask("answered", token=b"1-1")
        rig.caller.ask("pending", token=b"1-2")
        rig.caller.ask("in the new inbox", token=b"1-3")
        rig.caller.ask("to one", recipient="it")
        rig.caller.ask("not sent yet")
        rig.link.answered = {b"1-1", b"1-3"}
        rig.losses.lost(made)
        assert len(rig.opened) == 1
        assert rig.reader.positions[INBOX] == (b"9-0" if made == b"9-0" else b"0-0")
        rig.link.end = b"12-0"
        await anyio.sleep(1)
        assert [str(one) for one in rig.caller.lost_by] != []
        assert rig.caller.failed == {}
        del rig.caller.open["in the new inbox"]
        rig.reader.positions[INBOX] = b"12-0"
        await anyio.sleep(0.1)
        assert rig.caller.failed.keys() == {"answered", "to one"}
        assert all(isinstance(one, DeliveryError) for one in rig.caller.failed.values())

    with_losses(check)


def test_answered_after_the_question() -> None:
    """A reply that found no inbox may be given up, and acknowledged, once Redis was asked."""

    async def check(rig: Rig) -> None:
        for number in range(6):
            rig.caller.ask(str(number), token=b"1-%d" % number)
        rig.losses.lost(b"9-0")
        rig.reader.positions[INBOX] = b"12-0"
        await anyio.sleep(1)
        assert rig.caller.failed == {}
        rig.link.answered, rig.link.missing = {b"1-0", b"1-1", b"1-2"}, {b"1-5"}
        rig.link.end = b"20-0"
        await anyio.sleep(2)
        del rig.caller.open["1"]  # its reply is in the inbox
        rig.caller.open["2"].token = object()  # sent again
        rig.reader.positions[INBOX] = b"20-0"
        await anyio.sleep(1)
        assert rig.caller.failed.keys() == {"0", "5"}
        rig.link.answered = {b"1-3"}
        await anyio.sleep(10)
        assert rig.caller.failed.keys() == {"0", "5", "3"}
        # It runs on, and is asked about a last time; whoever answers it now finds the inbox.
        asked = len(rig.link.asked)
        await anyio.sleep(1000)
        assert len(rig.link.asked) == asked + 1
        assert rig.caller.open.keys() == {"2", "4"}
        rig.losses.lost(b"30-0")
        rig.reader.positions[INBOX] = b"30-0"
        await anyio.sleep(1)
        rig.link.answered = {b"1-4"}
        rig.losses.lost(b"31-0")  # and a further loss asks about all
        await anyio.sleep(0.1)
        assert rig.caller.failed.keys() == {"0", "3", "4", "5"}

    with_losses(check)


def test_after_an_outage() -> None:
    """Others keep what finds no inbox: only what was certainly answered fails."""

    async def check(rig: Rig) -> None:
        rig.caller.ask("answered", token=b"1-1")
        rig.caller.ask("to one", recipient="it")
        rig.link.answered = {b"1-1"}
        rig.link.connection = None
        rig.losses.lost(b"9-0")
        await anyio.sleep(1)
        assert rig.caller.failed.keys() == {"answered"}
        assert rig.caller.lost_by == []

    with_losses(check)


@pytest.mark.parametrize("when", ["while connecting", "later"])
def test_another_server(when: str) -> None:
    """What it lacks is sent again by who sees to that; and nobody has deleted anything, also if the
    inbox can't be made at once.
    """

    async def check(rig: Rig) -> None:
        rig.caller.ask("answered", token=b"1-1")
        rig.caller.ask("lost", token=b"1-2")
        rig.caller.ask("trimmed", token=b"1-3")
        rig.caller.ask("sent again meanwhile", token=b"1-4")
        rig.caller.ask("to one", recipient="it")
        rig.link.answered, rig.link.missing = {b"1-1"}, {b"1-2", b"1-3", b"1-4"}
        rig.sent_again = {"lost"}
        rig.losses.connecting()
        if when == "while connecting":
            rig.link.connection = None
        rig.losses.lost(b"9-0")
        rig.losses.restored()
        await anyio.sleep(0.015)
        rig.caller.open["sent again meanwhile"].token = object()
        rig.reader.positions[INBOX] = b"12-0"
        await anyio.sleep(1)
        assert rig.caller.failed.keys() == {"answered", "trimmed"}
        assert rig.caller.lost_by == []

    with_losses(check)


def test_after_an_outage_of_a_broadcast() -> None:
    """Redis isn't even asked."""

    async def check(rig: Rig) -> None:
        rig.caller.ask("asked", token=b"1-1")
        rig.link.answered = {b"1-1"}
        rig.link.connection = None
        rig.losses.lost(b"9-0")
        await anyio.sleep(1)
        assert (rig.caller.failed, rig.caller.lost_by, rig.link.asked) == ({}, [], [])

    with_losses(check, None)


@pytest.mark.parametrize("error", [ResponseError("NOPERM no"), ResponseError("OOM no")])
def test_refused_look(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """What passes is asked again; else all are told, with one warning."""

    async def check(rig: Rig) -> None:
        for number in range(2):
            name = f"pending {number}"
            rig.caller.ask(name, token=b"1-2")
            rig.link.refusals = [error] * 3
            rig.losses.lost(b"9-0")
            await anyio.sleep(10)
            assert (name in rig.caller.failed) is ("NOPERM" in str(error))
            rig.caller.open.clear()
        assert caplog.text.count("can't be found") == ("NOPERM" in str(error))

    with_losses(check)


def test_many() -> None:
    """However many wait, one command asks for a bounded number."""

    async def check(rig: Rig) -> None:
        for number in range(1000):
            rig.caller.ask(str(number), token=b"1-%d" % number)
        rig.link.answered = {b"1-%d" % number for number in range(0, 1000, 2)}
        rig.losses.lost(b"9-0")
        await anyio.sleep(1)
        assert len(rig.caller.failed) == 500
        assert all(len(command) < 300 for command in rig.link.asked)
        assert len(rig.link.asked) == 4

    with_losses(check)
