"""One connection after the other: which errors are waited for, which ask for a new connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import anyio
import pytest

from anyio_kkrpc import TransportConnectionError
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._connection._link import Dialer
from anyio_kkrpc.redis._connection._patience import Outages, Patience
from anyio_kkrpc.redis._connection._portion import ReadPortion
from anyio_kkrpc.redis._connection._resp import Connection
from anyio_kkrpc.redis._connection._target import Target
from anyio_kkrpc.redis._reading._loop import ReadLoop

pytestmark = pytest.mark.anyio

LOST = TransportConnectionError("lost")


class Socket:
    """A connection that is only closed."""

    def __init__(self) -> None:
        self.closed = False

    async def aclose(self) -> None:
        self.closed = True
        await anyio.lowlevel.checkpoint()


class Dialled:
    def __init__(self, limit: int) -> None:
        self.sockets: list[Socket] = []
        self.limit = limit
        self.noted: list[Exception] = []

    async def again(self) -> Connection:
        await anyio.lowlevel.checkpoint()
        if len(self.sockets) == self.limit:
            raise TransportConnectionError("there is no server any more")
        self.sockets.append(Socket())
        return cast(Connection, self.sockets[-1])

    def note_lost(self, connection: Connection, exc: Exception) -> None:
        assert connection is cast(Connection, self.sockets[-1])
        self.noted.append(exc)


def looped(dialled: Dialled, failed: Callable[[Exception], object]) -> ReadLoop:
    return ReadLoop(lambda what: cast(Dialer, dialled), 1000, failed)


def patience() -> Patience:
    return Patience("reading", Outages(Target.parse("redis://nowhere")), heals=())


@pytest.mark.parametrize("error", [LOST, ResponseError("NOGROUP no"), ResponseError("OOM no")])
async def test_goes_on(error: Exception) -> None:
    """What is lost is read on a new connection, what is refused for now on the same one."""
    failures: list[Exception] = []
    used: list[Any] = []
    dialled = Dialled(2)
    loop = looped(dialled, failures.append)

    async def read(connection: Connection, portion: ReadPortion) -> None:
        used.append(connection)
        if len(used) == 1:
            raise error
        raise LOST

    await loop.run("requests", read, patience())
    assert [str(failure) for failure in failures] == ["there is no server any more"]
    kept = "OOM" in str(error)
    assert (used[0] is used[1]) is kept
    assert loop.reconnects == len(dialled.sockets) == 2
    assert all(socket.closed for socket in dialled.sockets)


async def test_no_right(caplog: pytest.LogCaptureFixture) -> None:
    """What will not pass is the end."""
    failures: list[Exception] = []
    first, error = Socket(), ResponseError("NOPERM no")
    loop = looped(Dialled(0), failures.append)

    async def read(connection: Connection, portion: ReadPortion) -> None:
        raise error

    await loop.run("requests", read, patience(), cast(Connection, first))
    assert failures == [error]
    assert first.closed
    assert loop.reconnects == 0


async def test_cancelled() -> None:
    """Nobody is told, and the connection is closed."""
    failures: list[Exception] = []
    dialled = Dialled(1)
    loop = looped(dialled, failures.append)

    async def read(connection: Connection, portion: ReadPortion) -> None:
        scope.cancel()
        await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        await loop.run("inbox", read, patience())
    assert failures == []
    assert dialled.sockets[0].closed
