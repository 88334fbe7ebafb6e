"""A lone call costs its client few system calls on each event loop. The number may only shrink."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import anyio
import pytest

from anyio_kkrpc import RedisStreamsTransport, RPCChannel
from tests.bounds import BOUND
from tests.servers import Servers

from .system_calls import can_watch, count

pytestmark = [pytest.mark.server, pytest.mark.slow]

# Two writes, two reads, and two to five looks at the sockets: how many depends on what comes
# together. On trio each read has the socket registered.
MOST = {"asyncio": 9, "uvloop": 8, "trio": 9.2}
_TRIES = 6


async def _echo(value: Any) -> Any:
    return value


async def _serve(url: str, stream: str, ready: Event, stopped: Event) -> None:
    async with (
        RedisStreamsTransport(url, stream=stream, use_consumer_group=True) as transport,
        RPCChannel(transport, expose={"echo": _echo}),
    ):
        ready.set()
        await anyio.to_thread.run_sync(stopped.wait)


@pytest.mark.parametrize("loop", MOST)
def test_system_calls_of_a_lone_call(loop: str, tmp_path: Path, servers: Servers) -> None:
    if not can_watch():
        pytest.skip("needs strace, and the right to use it")
    url, stream = servers["valkey8"].url, f"watched-{loop}"
    ready, stopped = Event(), Event()
    serve = partial(_serve, url, stream, ready, stopped)
    worker = Thread(target=partial(anyio.run, serve, backend="trio"))
    worker.start()
    try:
        assert ready.wait(BOUND)
        for _ in range(_TRIES):
            found = count(tmp_path, loop, url, stream)
            assert found.get("sendto", 0) >= 2
            assert found.get("recvfrom", 0) >= 2
            # On uvloop: for an error behind what was read, a look for all reads of some time.
            assert found.get("getsockopt", 0) < 1
            if sum(found.values()) <= MOST[loop]:
                return
    finally:
        stopped.set()
        worker.join(BOUND)
    pytest.fail(f"{sum(found.values())} system calls, and {MOST[loop]} at most: {found}")
