"""The inbox as a key, kept alive whatever else its owner does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import trio
from trio.testing import MockClock

from anyio_kkrpc import TransportConnectionError
from anyio_kkrpc.redis._connection._resp import Connection
from anyio_kkrpc.redis._reading._inbox import Inbox
from anyio_kkrpc.redis._stream._scripts import ADD_BRIEFLY
from tests.redis.conftest import NOWHERE, FakeStream

KEY = b"{s}:inbox:me"


class Server:
    """A server that has an inbox for some time.

    :ivar expires_at: when it is gone
    :ivar busy: whether commands on the link wait
    """

    def __init__(self) -> None:
        self.expires_at = 0.0
        self.busy = self.away = False
        self.dials = self.lost = 0

    async def execute(self, *command: Any) -> Any:
        await anyio.sleep(0.01)
        now = anyio.current_time()
        if command[0] == b"PEXPIRE":
            if now >= self.expires_at:
                return 0
            self.expires_at = now + int(command[2]) / 1000
            return 1
        assert command[:4] == (b"EVAL", ADD_BRIEFLY, b"1", KEY)
        self.expires_at = now + int(command[4]) / 1000
        return b"1-0"

    async def request(self, *command: Any) -> Any:
        while self.busy:
            await anyio.sleep(0.1)
        return await self.execute(*command)

    async def dial(self) -> Connection:
        self.dials += 1
        if self.away:
            raise TransportConnectionError("away")
        connection = Connection(FakeStream(), NOWHERE)
        connection.execute = self.execute  # type: ignore[method-assign]
        return connection

    def lose(self, made: bytes) -> None:
        assert made == b"1-0"
        self.lost += 1


def with_inbox(function: Callable[[Server, Inbox], Awaitable[None]]) -> None:
    """Run a function beside an inbox that is kept each second, for 6 s, over the link."""

    async def check() -> None:
        server = Server()
        inbox = Inbox(KEY, 6.0, server.request, server.lose)
        await inbox.make(server.execute)

        async def keep() -> None:
            while True:
                await anyio.sleep(1)
                await inbox.keep(server.request)

        async with anyio.create_task_group() as group:
            group.start_soon(keep)
            group.start_soon(inbox.run, server.dial)
            await function(server, inbox)
            group.cancel_scope.cancel()

    trio.run(check, clock=MockClock(autojump_threshold=0))


def test_link_that_has_time() -> None:
    """No other connection is made."""

    async def check(server: Server, inbox: Inbox) -> None:
        await anyio.sleep(100)
        assert server.expires_at > anyio.current_time()
        assert (server.dials, server.lost) == (0, 0)

    with_inbox(check)


def test_link_that_is_busy() -> None:
    """It is kept over another connection, a few times; not any more once the link has time."""

    async def check(server: Server, inbox: Inbox) -> None:
        server.busy = True
        for _ in range(100):
            await anyio.sleep(1)
            assert server.expires_at > anyio.current_time()
        assert 20 < server.dials < 60
        server.busy = False
        await anyio.sleep(5)
        dials = server.dials
        await anyio.sleep(100)
        assert server.dials == dials
        assert server.lost == 0

    with_inbox(check)


def test_server_that_is_away() -> None:
    """An inbox that was gone meanwhile is made again, once."""

    async def check(server: Server, inbox: Inbox) -> None:
        server.busy = server.away = True
        await anyio.sleep(30)
        assert 1 < server.dials < 40
        server.away = False
        await anyio.sleep(5)
        assert server.lost == 1
        assert server.expires_at > anyio.current_time()

    with_inbox(check)
