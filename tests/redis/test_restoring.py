"""What is done on a new connection of the link, in which order; with parts that note it."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

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
