"""A server that answers as it is told to, in place of the real one behind it.

It speaks RESP2 and passes commands on, so that all but the scripted replies are a real server's.
"""

from __future__ import annotations

import ssl
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import anyio
import hiredis
from anyio.abc import ByteStream, SocketAttribute, SocketStream
from anyio.streams.tls import TLSListener

Command = list[bytes]
Matches = Callable[[Command], bool]

_END = object()
_LOST = (anyio.BrokenResourceError, anyio.ClosedResourceError)


class FakeServer:
    """What a test scripts.

    :ivar url: where it listens
    :ivar refused: how often commands of each name were answered here
    """

    def __init__(self, url: str, target: int) -> None:
        self.url = url
        self.refused: Counter[str] = Counter()
        self._target = target
        self._refusal: tuple[Matches, bytes] | None = None
        self._changed = anyio.Event()

    def refuse(self, error: str, *names: str, matches: Matches | None = None) -> None:
        """Answer these commands, or those that match, with an error from now on; all if none."""
        wanted = {name.upper() for name in names}

        def named(command: Command) -> bool:
            return not wanted or command[0].upper().decode() in wanted

        self.refused.clear()
        self._refusal = (matches or named, f"-{error}\r\n".encode())

    def accept(self) -> None:
        """Answer nothing here any more."""
        self._refusal = None

    async def wait_refused(self, count: int = 1) -> None:
        """Wait until that many commands have been refused since `refuse`."""
        while self.refused.total() < count:
            await self._changed.wait()

    async def handle(self, client: SocketStream) -> None:
        # On asyncio a connect that is cancelled as it succeeds leaks its socket.
        with anyio.CancelScope(shield=True):
            server = await anyio.connect_tcp("127.0.0.1", self._target)
        pair = _Pair(client, server)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._pass_commands, pair, group.cancel_scope)
                group.start_soon(pair.pass_replies, group.cancel_scope)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.aclose_forcefully(client)
                await anyio.aclose_forcefully(server)

    async def _pass_commands(self, pair: _Pair, scope: anyio.CancelScope) -> None:
        commands = _Parser(pair.client)
        try:
            while (command := await commands.next()) is not _END:
                refusal = self._refusal
                if refusal is not None and refusal[0](command):
                    self.refused[command[0].upper().decode()] += 1
                    self._changed.set()
                    self._changed = anyio.Event()
                    await pair.answer(refusal[1])
                else:
                    await pair.ask(command)
        except _LOST:
            pass
        scope.cancel()


class FakeNode:
    """A server, or a sentinel, that knows no data, only what a test lets it answer.

    :ivar answers: by the names of commands, what they are answered with: what `_encoded` takes. An
        answer may be a function, which is given the command.
    :ivar asked: how often each command came
    :ivar connections: how many were made
    :ivar frozen: whether it answers nothing
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: dict[str, Any] = {"PING": b"PONG", "CLIENT": b"OK"}
        self.asked: Counter[str] = Counter()
        self.connections = 0
        self.frozen = False
        self._changed = anyio.Event()

    async def wait_asked(self, name: str, count: int) -> None:
        """Wait until a command has come that often, in all."""
        while self.asked[name] < count:
            await self._changed.wait()

    async def handle(self, client: ByteStream) -> None:
        self.connections += 1
        commands = _Parser(client)
        async with client:
            try:
                while (command := await commands.next()) is not _END:
                    name = command[0].upper().decode()
                    answer = self.answers.get(name, hiredis.ReplyError(f"ERR unknown {name}"))
                    self.asked[name] += 1
                    self._changed.set()
                    self._changed = anyio.Event()
                    if not self.frozen:
                        await client.send(_encoded(answer(command) if callable(answer) else answer))
            except _LOST:
                pass


@asynccontextmanager
async def fake_node(tls: ssl.SSLContext | None = None) -> AsyncIterator[FakeNode]:
    """Run one."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        node = FakeNode(listener.extra(SocketAttribute.local_port))
        outer = listener if tls is None else TLSListener(listener, tls, standard_compatible=False)
        async with anyio.create_task_group() as group:
            group.start_soon(outer.serve, node.handle)
            yield node
            group.cancel_scope.cancel()


class _Pair:
    """A connection of a client, and one to the real server for it."""

    def __init__(self, client: SocketStream, server: SocketStream) -> None:
        self.client = client
        self._server = server
        self._lock = anyio.Lock()
        # In the order of the commands: the replies given here, and None for those to come.
        self._order: deque[bytes | None] = deque()

    async def ask(self, command: Command) -> None:
        self._order.append(None)
        await self._server.send(hiredis.pack_command(tuple(command)))

    async def answer(self, reply: bytes) -> None:
        self._order.append(reply)
        await self._flush()

    async def pass_replies(self, scope: anyio.CancelScope) -> None:
        replies = _Parser(self._server)
        try:
            while (reply := await replies.next()) is not _END:
                self._order[self._order.index(None)] = _encoded(reply)
                await self._flush()
        except _LOST:
            pass
        scope.cancel()

    async def _flush(self) -> None:
        """Send the replies that nothing has to come before."""
        async with self._lock:
            while self._order and (reply := self._order[0]) is not None:
                self._order.popleft()
                await self.client.send(reply)


class _Parser:
    """Cuts what is received into commands, or replies."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._reader = hiredis.Reader(notEnoughData=_END)

    async def next(self) -> Any:
        """Return the next one; `_END` if there is none."""
        try:
            while (item := self._reader.gets()) is _END:
                self._reader.feed(await self._stream.receive())
        except anyio.EndOfStream:
            return _END
        return item


def _encoded(reply: Any) -> bytes:
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, Exception):
        return b"-%s\r\n" % str(reply).encode()
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, bytes):
        return b"$%d\r\n%s\r\n" % (len(reply), reply)
    items: Iterable[Any] = reply
    return b"*%d\r\n%s" % (len(reply), b"".join(map(_encoded, items)))


@asynccontextmanager
async def fake_server(url: str) -> AsyncIterator[FakeServer]:
    """Run one in front of a real server."""
    port = urlsplit(url).port
    assert port is not None
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        own = listener.extra(SocketAttribute.local_port)
        fake = FakeServer(url.replace(f":{port}", f":{own}"), port)
        async with anyio.create_task_group() as group:
            group.start_soon(listener.serve, fake.handle)
            yield fake
            group.cancel_scope.cancel()
