"""Connections that are given up, and those that are only slow. Looks are counted, no time passes."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from anyio.abc import SocketAttribute

from anyio_kkrpc._exceptions import TransportConnectionError
from anyio_kkrpc.redis._connection import _socket
from anyio_kkrpc.redis._connection._address import Address
from anyio_kkrpc.redis._connection._resp import Connection
from anyio_kkrpc.redis._connection._socket import PlainSocket
from anyio_kkrpc.redis._connection._watch import Watch
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio

# Seconds within which what should come has to come.
LIMIT = BOUND
PAUSE = 2 * BOUND  # which no test takes
# More bytes than the buffers on the way take.
BIG = 2_000_000
# Looks that a silent connection survives: the first one only notes what there is to see.
LOOKS = 4


class Peer:
    """The other side of a connection, which does what the test says."""

    def __init__(self, connection: Connection, watch: Watch, stream: PlainSocket) -> None:
        self.connection = connection
        self.watch = watch
        self.stream = stream
        self.failed: list[BaseException | None] = []
        self.replies: list[object] = []

    async def request(self, size: int = 10) -> None:
        try:
            self.replies.append(await self.connection.request("ECHO", b"x" * size))
        except TransportConnectionError as exc:
            self.failed.append(exc.__cause__)

    async def execute(self, size: int = 10) -> None:
        try:
            self.replies.append(await self.connection.execute("ECHO", b"x" * size))
        except TransportConnectionError as exc:
            self.failed.append(exc.__cause__)

    async def looks(self, count: int) -> None:
        for _ in range(count):
            await self.watch.look()


@asynccontextmanager
async def watched() -> AsyncIterator[tuple[Peer, anyio.abc.TaskGroup]]:
    watch = Watch(2 * PAUSE)
    assert watch.pause == PAUSE
    with anyio.fail_after(LIMIT), socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        address = Address(host="127.0.0.1", port=listener.getsockname()[1])
        stream = await address.dial()
        raw = stream.extra(SocketAttribute.raw_socket)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
        async with (
            Connection(stream, address, silence=LOOKS * PAUSE) as connection,
            PlainSocket(listener.accept()[0]) as other,
            anyio.create_task_group() as group,
        ):
            watch.add(connection)
            yield Peer(connection, watch, other), group
            group.cancel_scope.cancel()


async def run(connection: Connection) -> None:
    try:
        await connection.run()
    except TransportConnectionError:
        pass


async def settled(condition: Callable[[], bool]) -> None:
    while not condition():
        await anyio.sleep(0.005)


@pytest.mark.parametrize("size", [10, BIG], ids=["answer", "room"])
@pytest.mark.parametrize("exclusive", [False, True], ids=["pipelined", "exclusive"])
async def test_silent(size: int, exclusive: bool) -> None:
    """A peer that doesn't answer, or takes no more, is given up for everybody after its time."""
    async with watched() as (peer, group):
        if exclusive:
            group.start_soon(peer.execute, size)
        else:
            group.start_soon(run, peer.connection)
            for _ in range(2):
                group.start_soon(peer.request, size)
        await wait_all_tasks_blocked()
        await peer.looks(LOOKS)
        assert not peer.connection.closed
        await peer.looks(1)
        assert peer.connection.closed
        await settled(lambda: len(peer.failed) == 1 + (not exclusive))
    assert all(isinstance(cause, TimeoutError) for cause in peer.failed)
    assert f"nothing moved for {LOOKS * PAUSE:g} seconds, though an answer is due" in str(
        peer.failed[0]
    )


@pytest.mark.parametrize("phase", [0.01, 0.99])
@pytest.mark.parametrize("size", [10, BIG], ids=["little", "much"])
@pytest.mark.parametrize("exclusive", [False, True], ids=["pipelined", "exclusive"])
async def test_when(
    exclusive: bool, size: int, phase: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a command is written, nothing moves for as long as is allowed, and no longer: when
    that is over is looked at once. Of what takes long to leave nobody knows when the last has left.
    """
    now = 1000.0
    monkeypatch.setattr(_socket, "monotonic", lambda: now)
    async with watched() as (peer, group):
        if not exclusive:
            group.start_soon(run, peer.connection)
        group.start_soon(peer.execute if exclusive else peer.request)
        await peer.stream.receive()
        await peer.stream.send(b"+done\r\n")
        await settled(lambda: peer.replies == [b"done"])
        now += peer.watch.pause
        await peer.watch.look()
        now += phase * peer.watch.pause
        group.start_soon(peer.execute if exclusive else peer.request, size)
        await wait_all_tasks_blocked()
        written, got = now, 0
        while got < size / 5:
            got += len(await peer.stream.receive(100_000))
        now += (1 - phase) * peer.watch.pause
        since = written if size < BIG else now
        await peer.watch.look()
        while not peer.connection.closed:
            now += peer.watch.pause
            await peer.watch.look()
        if size < BIG:
            assert now - since == pytest.approx(LOOKS * PAUSE, abs=0.1)
        else:
            assert now - since >= LOOKS * PAUSE


async def test_no_time_passes_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that stands still looks once when it goes on, however long that was; and what has
    come since the last command says that the connection lives.
    """
    now = 1000.0
    monkeypatch.setattr(_socket, "monotonic", lambda: now)
    async with watched() as (peer, group):
        group.start_soon(run, peer.connection)
        group.start_soon(peer.request)
        await peer.stream.receive()
        now += 1000 * PAUSE
        await peer.looks(LOOKS - 1)
        assert not peer.connection.closed
        group.start_soon(peer.request)
        await wait_all_tasks_blocked()
        now += PAUSE / 2
        await peer.stream.send(b"+done\r\n")
        await settled(lambda: peer.replies == [b"done"])
        now += PAUSE / 2
        assert peer.connection.traffic[3:] == (1001 * PAUSE, True)
        await peer.looks(LOOKS)
        assert not peer.connection.closed
        await peer.looks(1)
        assert peer.connection.closed


async def test_nothing_due() -> None:
    """A connection that waits for nothing may be silent for ever, and so may one that is closed."""
    async with watched() as (peer, group):
        group.start_soon(run, peer.connection)
        await peer.looks(10 * LOOKS)
        group.start_soon(peer.request)
        await peer.stream.receive()
        await peer.looks(LOOKS)
        await peer.stream.send(b"+done\r\n")
        await settled(lambda: peer.replies == [b"done"])
        await peer.looks(10 * LOOKS)
        assert not peer.connection.closed
        await peer.connection.aclose()
        await peer.looks(10 * LOOKS)


@pytest.mark.parametrize("exclusive", [False, True], ids=["pipelined", "exclusive"])
async def test_slow_answer(exclusive: bool) -> None:
    """An answer that comes byte by byte is waited for, though it takes many times as long."""
    async with watched() as (peer, group):
        if exclusive:
            group.start_soon(peer.execute)
        else:
            group.start_soon(run, peer.connection)
            group.start_soon(peer.request)
        await peer.stream.receive()
        for byte in b"$40\r\n%s" % (b"x" * 40):
            await peer.looks(LOOKS)
            received = peer.connection.traffic.received
            await peer.stream.send(bytes((byte,)))
            await settled(lambda seen=received: peer.connection.traffic.received > seen)  # type: ignore[misc]
        await peer.stream.send(b"\r\n")
        await settled(lambda: peer.replies == [b"x" * 40])


async def test_slow_upload() -> None:
    """So is what leaves piece by piece; once it has left, the answer is due."""
    async with watched() as (peer, group):
        group.start_soon(run, peer.connection)
        group.start_soon(peer.request, BIG)
        await wait_all_tasks_blocked()
        got = rounds = 0
        while got < BIG:
            await peer.looks(LOOKS - 1)
            gone = peer.connection.traffic.gone
            while got < BIG and peer.connection.traffic.gone == gone:
                got += len(await peer.stream.receive(100_000))
            rounds += 1
        assert rounds > LOOKS
        assert not peer.connection.closed
        while peer.connection.traffic.gone < peer.connection.traffic.given:
            await peer.stream.receive(100_000)
        # Some of it may be on its way still, where nobody sees it.
        await peer.looks(2 * LOOKS + BIG // 500_000)
        assert peer.connection.closed


async def test_later_writes_are_no_life() -> None:
    """What is written behind a command that isn't answered doesn't keep its connection alive."""
    async with watched() as (peer, group):
        group.start_soon(run, peer.connection)
        group.start_soon(peer.request)
        for _ in range(LOOKS + 1):
            await peer.stream.receive()
            await peer.looks(1)
            group.start_soon(peer.request)
            if not peer.connection.closed:
                await settled(lambda: peer.connection.traffic.gone == peer.connection.traffic.given)
        assert peer.connection.closed


async def test_traffic() -> None:
    """What a socket tells of its traffic adds up."""
    async with watched() as (peer, group):
        group.start_soon(run, peer.connection)
        assert peer.connection.traffic[:3] == (0, 0, 0)
        group.start_soon(peer.request, BIG)
        await wait_all_tasks_blocked()
        stuck = peer.connection.traffic
        assert 0 < stuck.given - BIG < 100
        assert stuck.gone < BIG
        got = 0
        while got < stuck.given:
            got += len(await peer.stream.receive(100_000))
        await settled(lambda: peer.connection.traffic[:3] == (0, got, got))
        raw = peer.connection._stream.extra(SocketAttribute.raw_socket)
        raw.close()
        assert peer.connection.traffic.given == got
