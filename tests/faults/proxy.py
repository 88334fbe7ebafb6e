"""A TCP proxy on loopback that can go wrong in the ways that networks do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import anyio
from anyio.abc import SocketAttribute, SocketStream


class Proxy:
    """Forwards to a server, unless told otherwise.

    :ivar url: where it listens
    :ivar connections: how many there are now
    """

    def __init__(self, url: str, target: int) -> None:
        self.url = url
        self._target = target
        self._open: set[SocketStream] = set()
        self._up, self._down = anyio.Event(), anyio.Event()
        self._up.set()
        self._down.set()
        self._refusing = False
        self._swallow: Callable[[bytes], bool] | None = None
        self.swallowed = anyio.Event()
        self._silence: Callable[[bytes], bool] | None = None
        self.silenced = anyio.Event()
        self._rate: float | None = None

    @property
    def connections(self) -> int:
        return len(self._open) // 2

    def freeze(self, *, up: bool = True, down: bool = True) -> None:
        """Forward no more to the server (up) or from it (down); nobody is told."""
        if up:
            self._up = anyio.Event()
        if down:
            self._down = anyio.Event()

    def thaw(self) -> None:
        """Forward again, also what was held."""
        self._up.set()
        self._down.set()

    def refuse(self, refusing: bool = True) -> None:
        """Accept no connection."""
        self._refusing = refusing

    def lead_to(self, url: str) -> None:
        """Forward new connections to another server."""
        port = urlsplit(url).port
        assert port is not None
        self._target = port

    async def cut(self) -> None:
        """Close all connections, in both directions."""
        for stream in tuple(self._open):
            await anyio.aclose_forcefully(stream)

    def swallow_reply_to(self, matches: Callable[[bytes], bool]) -> None:
        """Forward the next data to the server that match, then cut before the reply comes back."""
        self._swallow = matches
        self.swallowed = anyio.Event()

    def silence(self, matches: Callable[[bytes], bool]) -> None:
        """Forward no more to the server on the connection that next has data that match."""
        self._silence = matches
        self.silenced = anyio.Event()

    def slow_down(self, rate: float | None) -> None:
        """Forward so many bytes per second on each connection, in each direction."""
        self._rate = rate

    async def handle(self, client: SocketStream) -> None:
        if self._refusing:
            await anyio.aclose_forcefully(client)
            return
        try:
            # On asyncio a connect that is cancelled as it succeeds leaks its socket.
            with anyio.CancelScope(shield=True):
                server = await anyio.connect_tcp("127.0.0.1", self._target)
        except OSError:
            await anyio.aclose_forcefully(client)
            return
        self._open |= {client, server}
        cut = anyio.Event()  # the answer to what was swallowed is the end of this connection
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._forward, client, server, True, group.cancel_scope, cut)
                group.start_soon(self._forward, server, client, False, group.cancel_scope, cut)
        finally:
            self._open -= {client, server}
            with anyio.CancelScope(shield=True):
                await anyio.aclose_forcefully(client)
                await anyio.aclose_forcefully(server)

    async def _forward(
        self,
        source: SocketStream,
        sink: SocketStream,
        up: bool,
        scope: anyio.CancelScope,
        cut: anyio.Event,
    ) -> None:
        try:
            while True:
                data = await source.receive(65536 if self._rate is None else 16384)
                await (self._up if up else self._down).wait()
                if self._rate is not None:
                    await anyio.sleep(len(data) / self._rate)
                if up and self._silence is not None and self._silence(data):
                    self._silence = None
                    self.silenced.set()
                    await anyio.sleep_forever()
                if up and self._swallow is not None and self._swallow(data):
                    self._swallow = None
                    cut.set()
                elif not up and cut.is_set():
                    self.swallowed.set()
                    break
                await sink.send(data)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        scope.cancel()


@asynccontextmanager
async def proxy(url: str) -> AsyncIterator[Proxy]:
    """Run a proxy in front of a server."""
    parts = urlsplit(url)
    assert parts.port is not None
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(SocketAttribute.local_port)
        middle = Proxy(url.replace(f":{parts.port}", f":{port}"), parts.port)
        async with anyio.create_task_group() as group:
            group.start_soon(listener.serve, middle.handle)
            yield middle
            group.cancel_scope.cancel()
