"""Reading for everybody: what is handed on, and from where the next connection goes on."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from anyio_kkrpc import TransportConnectionError
from anyio_kkrpc._protocol._records import Request
from anyio_kkrpc.redis._reading._broadcast import Broadcast
from tests.bounds import BOUND
from tests.redis.parts import KEYS, ME, Parts, Server, request, written

pytestmark = pytest.mark.anyio

STREAM = KEYS.stream
LOST = TransportConnectionError("lost")


def entries(*items: tuple[bytes, list[bytes] | None]) -> Any:
    return [(STREAM, [*items])]


async def test_reads() -> None:
    """Its own, what was deleted and what can't be read is left out; the position is ahead of all."""
    own = written(Request("own", "call", ["f"]), ME)
    server = Server(
        entries((b"5-0", request("a")), (b"6-0", own), (b"7-0", None), (b"8-0", [b"x", b"y"])),
        None,
        entries((b"9-0", request("b"))),
        LOST,
    )
    parts, counted = Parts(server), list[int]()
    broadcast = Broadcast(STREAM, parts.common, counted.append)
    broadcast.begin_after(b"4-0")
    async with anyio.create_task_group() as tasks:
        await broadcast.begin(tasks)()
    assert [str(one) for one in parts.failures] == ["there is no server any more"]
    assert parts.queued() == ["a", "b"]
    assert (broadcast.received, broadcast.position) == (2, b"9-0")
    assert (parts.expected, parts.followed_up, sum(counted)) == (1, 3, 5)
    assert parts.common.decoder.invalid == 1
    assert read_from(server) == [b"4-0", b"8-0", b"8-0", b"9-0"]
    assert server.silence == 7.0


async def test_goes_on_where_it_stopped() -> None:
    """What was written while nothing was read is read by the next one."""
    server = Server(entries((b"5-0", request("a"))))
    parts = Parts(server)
    broadcast = Broadcast(STREAM, parts.common, None)
    for position in (b"0-0", b"5-0"):
        async with anyio.create_task_group() as tasks:
            server.connects = 1
            tasks.start_soon(broadcast.begin(tasks))
            with anyio.fail_after(BOUND):
                while read_from(server)[-1:] != [b"5-0"]:
                    await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
        assert read_from(server)[0] == position
        server.asked.clear()
    assert parts.queued() == ["a"]
    assert parts.failures == []


def read_from(server: Server) -> list[Any]:
    """Return the positions of all reads."""
    return [command[-1] for command in server.asked if command[0] == b"XREAD"]
