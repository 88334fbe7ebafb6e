"""``anyio-kkrpc server``: a server to try things out on, until told to end."""

from __future__ import annotations

import signal
import socket
import sys

import anyio
from anyio import create_task_group, open_signal_receiver, sleep

from .._runtime._lone import lone_error
from ..testing import RedisServer, ServerError
from ._terminal import ends_on_sigterm

# Seconds between two looks whether it still runs.
LOOK_INTERVAL = 0.5


def run(port: int) -> None:
    """Run it on a port of the loopback interface.

    :raises ServerError: if there is none, the port is taken, or it ended by itself
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as exc:
            text = f"port {port} can't be used, --port takes another one: {exc}"
            raise ServerError(text) from exc
    # From here on, since a signal while it starts would leave it behind.
    with ends_on_sigterm(), RedisServer(port=port) as server:
        anyio.run(_wait, server)


async def _wait(server: RedisServer) -> None:
    with lone_error():
        async with create_task_group() as group:

            async def watch() -> None:
                while True:
                    await sleep(LOOK_INTERVAL)
                    if not server.running:
                        raise ServerError(f"the server has ended; it wrote: {server.log[-500:]}")

            with open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as caught:
                group.start_soon(watch, name="anyio_kkrpc server")
                sys.stdout.write(f"{server.version} at {server.url}, in memory; Ctrl-C ends it\n")
                sys.stdout.flush()
                async for _ in caught:
                    break
            group.cancel_scope.cancel()
