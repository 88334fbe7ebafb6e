"""What is done on a new connection of the link, in which order; with parts that note it."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from anyio_kkrpc.redis import _restoring
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._restoring import Restoring

pytestmark = pytest.mark.anyio


class Parts:
    """All of them in one."""

    def __init__(self, *, another: bool, error: Exception | None = None) -> None:
        self.told: list[str] = []
        self.inbox = self.sign = self.open_calls = self.identity = self.losses = self
        self.made, self.offset, self.read, self.is_sure = True, 1.5, None, False
        self._another, self._error = another, error

    async def ask(self, connection: Any, along: Any) -> bool:
        await anyio.lowlevel.checkpoint()
        return self._another

    def meet_another(self, sure: bool | None = None) -> None:
        self.told.append("another" if sure is None else f"another, {sure}")

    def note(self) -> None:
        self.told.append("open calls")

    def lose(self) -> None:
        self.told.append("lose")

    def connecting(self) -> None:
        self.told.append("connecting")

    def restored(self) -> None:
        self.told.append("restored")

    def pause(self, exc: Exception) -> None:
        self.told.append("pause")

    async def keep(self, execute: Any) -> None:
        await anyio.lowlevel.checkpoint()
        if self._error is not None:
            raise self._error
        self.told.append("keep")

    async def make(self, execute: Any) -> None:
        await anyio.lowlevel.checkpoint()
        self.told.append("make")

    async def attach(self, connection: Any, offset: float) -> None:
        await anyio.lowlevel.checkpoint()
        self.told.append(f"attach {offset}")

    execute = None


def restoring(parts: Any) -> Restoring:
    return Restoring(parts, parts, parts, parts, parts, parts, lambda connection: None)


@pytest.mark.parametrize("another", [False, True])
@pytest.mark.parametrize("sure", [False, True])
@pytest.mark.parametrize("entered", [False, True])
async def test_order(another: bool, sure: bool, entered: bool) -> None:
    """What there is to restore is there before anything is written."""
    parts: Any = Parts(another=another)
    parts.is_sure = sure
    part = restoring(parts)
    if entered:
        part.enter()
    await part.prepare(parts)
    told = [f"another, {sure}", "open calls", "another"] if another else []
    restored = ["lose", "connecting", "keep", "restored", "make", "keep"] if entered else []
    assert parts.told == [*told, *restored, "attach 1.5"]


async def test_refused() -> None:
    """For now, housekeeping makes up for it; a replica is left."""
    parts: Any = Parts(another=False, error=ResponseError("OOM not now"))
    part = restoring(parts)
    part.enter()
    await part.prepare(parts)
    assert parts.told == ["lose", "connecting", "pause", "attach 1.5"]
    parts = Parts(another=False, error=ResponseError("READONLY You can't write"))
    part = restoring(parts)
    part.enter()
    with pytest.raises(ResponseError, match="READONLY"):
        await part.prepare(parts)


class Asked:
    """A peer and its connection; notes what it asks, and how long it rests."""

    def __init__(self, *, serves: bool = False, waits: bool = False, silence: float = 5.0) -> None:
        self.wanted, self.silence = serves, silence
        self.calm, self.made, self.waits, self.kept = True, False, waits, True
        self.inbox = self.losses = self
        self.asked = 0.0
        self.done: list[Any] = []

    @property
    def traffic(self) -> Asked:
        return self

    def idles(self) -> bool:
        return self.wanted

    def expects(self) -> bool:
        return self.waits

    def is_kept(self, seconds: float) -> bool:
        assert seconds == 2 * (5.0 + self.silence / 2)
        return self.kept

    async def read(self, execute: Any) -> None:
        self.done.append("clock")

    async def keep(self, execute: Any) -> None:
        self.done.append("inbox")

    def restored(self) -> None:
        pass

    async def introduce(self, execute: Any) -> None:
        pass

    groups = property(lambda self: self)

    async def sleep(self, seconds: float) -> None:
        self.done.append(seconds)
        self.asked += seconds

    async def rounds(self, count: int) -> list[Any]:
        parts: Any = self
        part = restoring(parts)
        part._connection = parts
        for _ in range(count):
            await part.rest(parts, 5.0, 20.0)
            for step in part.steps(parts, None):  # type: ignore[arg-type]
                await step()
        return self.done


async def test_one_that_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks one thing in each round, and none as long as another part has asked something."""
    peer = Asked()
    monkeypatch.setattr(_restoring, "sleep", peer.sleep)
    assert await peer.rounds(4) == [7.5, 0, "clock", 7.5, 0, "inbox"] * 2
    peer = Asked()
    peer.asked = -2.0
    monkeypatch.setattr(_restoring, "sleep", peer.sleep)
    assert await peer.rounds(1) == [7.5, 2.0, "clock"]
    peer = Asked()
    peer.kept = False
    monkeypatch.setattr(_restoring, "sleep", peer.sleep)
    assert await peer.rounds(2) == [7.5, 0, "clock", "inbox", 7.5, 0, "inbox"]


@pytest.mark.parametrize(
    ("serves", "waits", "silence", "expected"),
    [
        (False, True, 5.0, [7.5, "clock", "inbox", 7.5, "inbox"]),
        (True, True, 5.0, [7.5, "clock", "inbox", 7.5, "clock", "inbox"]),
        (True, False, 5.0, [7.5, "clock", "inbox", 7.5]),
        (True, False, 1.0, [5.5, "clock", "inbox", 5.5]),
    ],
)
async def test_one_that_does(
    serves: bool, waits: bool, silence: float, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits has its inbox looked for in each round, who serves and idles in each second one."""
    peer = Asked(serves=serves, waits=waits, silence=silence)
    peer.asked = -2.0
    monkeypatch.setattr(_restoring, "sleep", peer.sleep)
    assert await peer.rounds(2) == expected
