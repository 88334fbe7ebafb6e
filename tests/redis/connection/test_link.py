"""What goes on over one connection after the other, with connections that break when told to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from anyio import Event, create_task_group, fail_after
from anyio.lowlevel import checkpoint

from anyio_kkrpc import TransportClosedError, TransportConnectionError
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._connection._link import Link
from anyio_kkrpc.redis._connection._portion import Portion
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio


class Line:
    """A connection that answers with what it was given; ``None`` is where it breaks."""

    address = "redis://here"

    def __init__(self, *answers: Any) -> None:
        self.answers = [*answers]
        self.asked: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.closed = False
        self._broken = Event()

    async def run(self) -> None:
        await self._broken.wait()
        assert self.error is not None
        raise self.error

    def break_off(self, exc: Exception) -> None:
        self.error = TransportConnectionError(f"lost: {exc}")
        self._broken.set()

    async def request(self, *command: Any) -> Any:
        if self.error is not None:
            raise self.error
        await checkpoint()
        self.asked.append(command)
        answer = self.answers.pop(0)
        if answer is None:
            self.break_off(OSError("cut"))
            raise TransportConnectionError("lost")
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def aclose(self) -> None:
        self.closed = True
        await checkpoint()


class Rig:
    """A link whose dialer has these lines to give."""

    def __init__(self, *lines: Line) -> None:
        self.first, *self.others = lines
        self.refusals: list[Exception] = []
        self.prepared: list[Any] = []
        self.lost = 0
        self.pauses: list[Exception] = []
        self.worked_ = 0
        anything: Any = self
        self.noted: list[tuple[Any, Exception]] = []
        self.link = Link(anything, self.prepare, self.count, anything)

    def note_lost(self, connection: Any, exc: Exception) -> None:
        self.noted.append((connection, exc))

    async def again(self) -> Any:
        await checkpoint()
        if not self.others:
            raise TransportConnectionError("nobody there")
        return self.others.pop(0)

    async def prepare(self, connection: Any) -> None:
        await checkpoint()
        self.prepared.append(connection)
        if self.refusals:
            raise self.refusals.pop(0)

    def count(self) -> None:
        self.lost += 1

    def pause(self, exc: Exception) -> float:
        self.pauses.append(exc)
        return 0.0

    def worked(self) -> None:
        self.worked_ += 1


@asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[Link]:
    first: Any = rig.first

    async def run() -> None:
        try:
            await rig.link.run(first)
        except TransportConnectionError:
            pass  # `request` raises it, too

    with fail_after(BOUND):
        async with create_task_group() as group:
            group.start_soon(run)
            yield rig.link
            group.cancel_scope.cancel()


async def test_repeated_on_the_next_connection() -> None:
    """What may be repeated is; the rest is told that nobody knows."""
    rig = Rig(Line(1, None), Line(2, None), Line(3))
    first, second, third = rig.first, *rig.others
    async with running(rig) as link:
        assert await link.request("a") == 1
        assert await link.request("b") == 2
        assert (first.asked, second.asked) == ([("a",), ("b",)], [("b",)])
        with pytest.raises(TransportConnectionError):
            await link.attempt("c")
        assert await link.attempt("d") == 3
        assert third.asked == [("d",)]
        assert (rig.lost, link.reconnects) == (2, 2)
        assert first.closed
        assert second.closed


async def test_errors_of_the_command_are_its_own() -> None:
    rig = Rig(Line(ResponseError("ERR wrong"), 1))
    async with running(rig) as link:
        with pytest.raises(ResponseError, match="wrong"):
            await link.request("a")
        assert await link.request("b") == 1
        assert link.reconnects == 0


async def test_a_server_that_takes_no_writes_is_left() -> None:
    """A replica refuses what it was asked, so even what must not be repeated is."""
    rig = Rig(Line(ResponseError("READONLY You can't write against a read only replica.")), Line(1))
    async with running(rig) as link:
        assert await link.attempt("a") == 1
        assert link.reconnects == 1
        assert "READONLY" in str(link.lost_by) or "read only" in str(link.lost_by)


async def test_nobody_uses_it_before_it_is_prepared() -> None:
    """What is refused then is tried again on it, unless another server is to be asked."""
    rig = Rig(Line(1), Line(2))
    first, second = rig.first, rig.others[0]
    full = ResponseError("OOM command not allowed")
    rig.refusals = [full, ResponseError("READONLY You can't write")]
    async with running(rig) as link:
        assert await link.request("a") == 2
    assert rig.prepared == [first, first, second]
    assert rig.pauses == [full]
    assert first.asked == []
    assert rig.worked_ == 1


async def test_the_end() -> None:
    """Whoever waits is told, each by an error of his own; nothing is sent any more."""
    rig = Rig(Line())
    found: list[BaseException] = []

    async def ask() -> None:
        try:
            await rig.link.request("a")
        except TransportClosedError as exc:
            found.append(exc)

    async with create_task_group() as group:
        for _ in range(2):
            group.start_soon(ask)
        for _ in range(3):
            await checkpoint()
        assert not rig.link.ended
        rig.link.end(TransportClosedError("closed here"))
    assert rig.link.ended
    assert [str(exc) for exc in found] == ["closed here"] * 2
    assert found[0] is not found[1]
    assert rig.first.asked == []


async def test_one_that_can_not_be_made_again() -> None:
    rig = Rig(Line(None))
    async with running(rig) as link:
        with pytest.raises(TransportConnectionError):
            await link.request("a")
        with pytest.raises(TransportConnectionError, match="nobody there"):
            await link.request("b")


async def test_less_is_asked_for_when_it_does_not_come() -> None:
    rig = Rig(Line(None), Line(None), Line(5))
    lines = [rig.first, *rig.others]
    portion = Portion(100, 1)
    async with running(rig) as link:
        assert await link.ask("entries", portion, lambda size: ("READ", size)) == 5
    sizes = [line.asked[0][1] for line in lines]
    assert sizes[0] == 100 > sizes[1] > sizes[2] >= 1
