"""What a worker takes over, with a group that is told what to have: who gets what, and who learns."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from anyio_kkrpc._protocol._records import Request
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._connection._patience import Outages
from anyio_kkrpc.redis._connection._target import Target
from anyio_kkrpc.redis._group._claims import Claims, Taken
from anyio_kkrpc.redis._group._findings import Died
from anyio_kkrpc.redis._group._held import HeldEntry
from anyio_kkrpc.redis._group._keeping import Keeper
from anyio_kkrpc.redis._group._takeover import Takeover
from anyio_kkrpc.redis.dialects import Entry

pytestmark = pytest.mark.anyio


class Group:
    """What there is to take; in place of the scripts, the writer and the decoder."""

    stream = b"s"
    unanswered: dict[bytes, int] = {}

    def __init__(self) -> None:
        self.claims: list[Claims | Exception] = []
        self.asked: list[Any] = []
        self.acknowledged: list[bytes] = []
        self.sent: list[Envelope] = []
        self.taken: list[tuple[bytes, int, float]] = []
        self.died: list[Died] = []
        self.admitted = 0
        self.keeper = Keeper(
            self,  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            Outages(Target.parse("redis://nowhere")),
            10.0,
            lambda: 3,
            anyio.lowlevel.checkpoint,
            lambda: 100.0,
        )
        self.outages = Outages(Target.parse("redis://nowhere"))
        self.takeover = Takeover(
            self,  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            self.keeper,
            self.outages,
            self,  # type: ignore[arg-type]
            lambda: 1000.0,
            lambda key, entry, attempt, sure: self.taken.append((key, attempt, sure)),
            self.admit,
            self.died.append,
        )

    async def _answer(self, *asked: Any) -> Claims:
        self.asked.append(asked)
        await anyio.lowlevel.checkpoint()
        claims = self.claims.pop(0)
        if isinstance(claims, Exception):
            raise claims
        return claims

    async def take(self, count: int, now: float) -> Claims:
        return await self._answer(count, now)

    async def recover(self, now: float, known: Any, *, counted: bool, start: bytes) -> Claims:
        return await self._answer(sorted(known), counted, start)

    def unfinished(self) -> list[bytes]:
        return [b"9-0"]

    def settle(self, entry_id: bytes, reply: None) -> None:
        self.acknowledged.append(entry_id)

    async def send(self, envelope: Envelope) -> None:
        await anyio.lowlevel.checkpoint()
        self.sent.append(envelope)

    def decode(self, stream: bytes, entry_id: bytes, fields: list[bytes]) -> Entry | None:
        return Entry(Request("r", "call", ["f"]), "x", 1) if fields else None

    async def admit(self) -> None:
        self.admitted += 1

    def hold(self, entry_id: bytes) -> HeldEntry:
        held = self.keeper.held.entries[entry_id] = HeldEntry(
            entry_id, 1, 50.0, "x", False, Request("r", "call", ["f"])
        )
        return held


def found(*ids: bytes, fields: tuple[bytes, ...] = (b"f",)) -> list[Taken]:
    return [Taken(entry_id, 4, [*fields], b"ERR no") for entry_id in ids]


async def test_each_has_its_way(caplog: pytest.LogCaptureFixture) -> None:
    """Held already, new, not to be read, given up: run, acknowledged, answered, counted."""
    group = Group()
    held = group.hold(b"1-0")
    taken = [*found(b"1-0", b"2-0"), *found(b"3-0", fields=())]
    group.claims = [Claims(taken, found(b"4-0"), found(b"5-0"), more=True)]
    assert await group.takeover.take()
    assert group.asked == [(3, 1000.0)]
    assert held.sure_until == 109.0
    assert group.taken == [(b"2-0", 4, 109.0)]
    assert group.acknowledged == [b"3-0"]
    assert [one.recipient for one in group.sent] == ["x", "x"]
    counts = group.takeover
    assert (counts.claimed, counts.dead_lettered, counts.refused) == (1, 1, 1)
    assert group.admitted == 1
    assert "entry 4-0 became a dead letter" in caplog.text
    assert "1 requests were delivered too often and could not become dead letters" in caplog.text
    assert "ERR no" in caplog.text


async def test_no_room() -> None:
    """It says that there may be more, and asks for nothing."""
    group = Group()
    group.keeper.room.set_limit(1)
    group.hold(b"1-0")
    assert await group.takeover.take()
    assert group.asked == []


async def test_nothing_there() -> None:
    group = Group()
    group.claims = [Claims([], [], [])]
    assert not await group.takeover.take()
    assert group.admitted == 0


async def test_recovered_page_by_page() -> None:
    """What it knows of isn't taken; the first time counts as a delivery, since a process died."""
    group = Group()
    group.hold(b"1-0")
    group.keeper.held.give_back({b"2-0": 1})
    first = Claims(found(b"3-0"), [], [], after=b"(3-0")
    group.claims = [first, Claims([], [], []), Claims([], [], [])]
    await group.takeover.recover()
    await group.takeover.recover()
    known = [b"1-0", b"2-0", b"9-0"]
    assert group.asked == [(known, True, b"-"), (known, True, b"(3-0"), (known, False, b"-")]
    assert group.taken == [(b"3-0", 4, 109.0)]


async def test_refused() -> None:
    """At first that is an error: it has yet to show that it can work. Later, others will take it."""
    refused = ResponseError("ERR unknown command 'EVAL'")
    group = Group()
    group.claims = [refused, Claims([], [], []), refused, Claims([], [], [])]
    with pytest.raises(ResponseError):
        await group.takeover.recover()
    await group.takeover.recover()
    await group.takeover.recover()
    assert group.outages.refused == 1
    await group.takeover.recover()
    assert [counted for _, counted, _ in group.asked] == [True, True, False, False]
