"""How many round trips to Redis the first answer takes, counted and not timed."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import anyio
import hiredis
import pytest

from anyio_kkrpc import RedisStreamsTransport, RPCChannel
from anyio_kkrpc.redis._connection._address import Address
from anyio_kkrpc.testing._server import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server]

MOST = 6


class Api:
    async def echo(self, value: Any) -> Any:
        return value


class Changes:
    """Wakes who waits for the next change."""

    def __init__(self) -> None:
        self._next = anyio.Event()

    def tell(self) -> None:
        self._next.set()
        self._next = anyio.Event()

    async def wait(self) -> None:
        await self._next.wait()


class Line:
    """A stream to Redis whose answers wait until they are let through.

    :ivar owed: commands that are not answered yet; those that may block aside
    :ivar holds: whether an answer waits
    """

    def __init__(self, stream: Any, changes: Changes) -> None:
        self._stream, self._changes = stream, changes
        self._names: deque[bytes] = deque()
        self._commands, self._replies = hiredis.Reader(), hiredis.Reader()
        self.owed = 0
        self.holds = False

    def send_nowait(self, data: bytes) -> int:
        sent: int = self._stream.send_nowait(data)
        self._commands.feed(bytes(data[:sent]))
        while command := self._commands.gets():
            self._names.append(command[0])
            self.owed += not command[0].startswith(b"XREAD")
        self._changes.tell()
        return sent

    async def receive(self, size: int) -> bytes:
        data = await self._read(size)
        self.holds = True
        self._changes.tell()
        while self.holds:
            if self.owed:
                data += await self._read(size)
            else:
                await self._changes.wait()
        return data

    async def _read(self, size: int) -> bytes:
        data: bytes = await self._stream.receive(size)
        self._replies.feed(data)
        while self._replies.gets() is not False:
            self.owed -= not self._names.popleft().startswith(b"XREAD")
        self._changes.tell()
        return data


class RoundTrips:
    """Lets answers through when all of them are there, and all tasks wait for them.

    :ivar count: how often
    """

    def __init__(self) -> None:
        self.count = 0
        self._lines: list[Line] = []
        self._changes = Changes()

    def watch(self, stream: Any) -> Any:
        line = Line(stream, self._changes)
        self._lines.append(line)
        return SimpleNamespace(
            send_nowait=line.send_nowait,
            receive=line.receive,
            send=stream.send,
            aclose=stream.aclose,
            extra=stream.extra,
        )

    async def run(self) -> None:
        while True:
            await anyio.wait_all_tasks_blocked()
            held = [line for line in self._lines if line.holds]
            if held and not any(line.owed for line in self._lines):
                self.count += 1
                for line in held:
                    line.holds = False
                self._changes.tell()
            else:
                await self._changes.wait()


@pytest.mark.parametrize("group", [False, True], ids=["broadcast", "group"])
async def test_round_trips_to_the_first_answer(
    redis_server: RedisServer, stream_name: str, group: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login; which server it is; where to read on; then the call, and its answer is read."""
    trips, dial = RoundTrips(), Address.dial

    async def watched(self: Address) -> Any:
        return trips.watch(await dial(self))

    options: dict[str, Any] = {
        "stream": stream_name,
        "use_consumer_group": group,
        "connect_timeout": CALL_BOUND,
    }
    async with (
        RedisStreamsTransport(redis_server.url, **options) as served,
        RPCChannel(served, expose=Api()),
    ):
        # Now there is a control stream, which is looked after.
        await served._lane.hints.tell_claim()
        monkeypatch.setattr(Address, "dial", watched)
        async with anyio.create_task_group() as group_of_tasks:
            group_of_tasks.start_soon(trips.run)
            with anyio.fail_after(BOUND):
                async with RedisStreamsTransport(redis_server.url, **options) as used:
                    entered = trips.count
                    async with RPCChannel(used, timeout=CALL_BOUND) as channel:
                        assert await channel.get_api().echo(1) == 1
                        found = trips.count
            group_of_tasks.cancel_scope.cancel()
    assert (entered, found) == (4, MOST)
