"""What comes from a socket, in both ways of reading it: bytes, ends, cancels, and what it holds."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError, BusyResourceError, ClosedResourceError, EndOfStream
from anyio.lowlevel import checkpoint, current_token
from hypothesis import given, settings
from hypothesis import strategies as st

from anyio_kkrpc.redis._connection._incoming import (
    READ_SIZE,
    Incoming,
    _Asked,
    _Watched,
    incoming_of,
)
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio

Make = Callable[[socket.socket], Incoming]
Pair = tuple[Incoming, socket.socket, socket.socket]


WAYS: dict[str, Make] = {"of the loop": incoming_of, "asked": _Asked}


@pytest.fixture(params=WAYS)
def make(request: pytest.FixtureRequest) -> Make:
    return WAYS[request.param]


@pytest.fixture
async def pair(make: Make) -> Any:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    incoming = make(ours)
    with ours, theirs:
        yield incoming, ours, theirs
        incoming.close()


class Loop:
    """An event loop of asyncio that counts how often it begins and ends to look at a socket."""

    def __init__(self) -> None:
        loop = current_token().native_token
        if not isinstance(loop, asyncio.AbstractEventLoop):
            pytest.skip("of asyncio only")
        self.loop = loop
        self.begun = self.ended = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)

    def add_reader(self, *args: Any) -> None:
        self.begun += 1
        self.loop.add_reader(*args)

    def remove_reader(self, *args: Any) -> None:
        self.ended += 1
        self.loop.remove_reader(*args)

    @property
    def looks(self) -> bool:
        return self.begun > self.ended


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


async def test_bytes(pair: Pair) -> None:
    """They come as they were written, in pieces that are no larger than asked for."""
    incoming, _, theirs = pair
    theirs.sendall(b"abcdef")
    assert incoming.has_unread()
    with anyio.fail_after(BOUND):
        assert await incoming.receive(4) == b"abcd"
        assert incoming.has_unread()
        assert await incoming.receive(4) == b"ef"
        assert not incoming.has_unread()
        async with anyio.create_task_group() as group:

            async def read() -> None:
                assert await incoming.receive(READ_SIZE) == b"more"

            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            theirs.sendall(b"more")
    assert incoming.count >= 2


async def test_ends(pair: Pair) -> None:
    """What came before the end is received first; the end stays."""
    incoming, _, theirs = pair
    with anyio.fail_after(BOUND):
        theirs.sendall(b"last")
        theirs.close()
        assert await incoming.receive(READ_SIZE) == b"last"
        for _ in range(2):
            with pytest.raises(EndOfStream):
                await incoming.receive(READ_SIZE)
    assert not incoming.has_unread()


async def test_end_while_receiving(pair: Pair) -> None:
    incoming, _, theirs = pair

    async def read() -> None:
        with pytest.raises(EndOfStream):
            await incoming.receive(READ_SIZE)

    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            theirs.close()


async def test_reset(make: Make) -> None:
    """A connection that is torn down is broken, whoever tells it, and stays so."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        ours.setblocking(False)
        incoming = make(ours)
        with ours, anyio.fail_after(BOUND):
            with listener.accept()[0] as peer:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            with pytest.raises(BrokenResourceError) as caught:
                await incoming.receive(READ_SIZE)
            assert isinstance(caught.value.__cause__, ConnectionResetError)
            assert not incoming.has_unread()
            incoming.close()


@pytest.mark.parametrize("size", [8, READ_SIZE, 2 * READ_SIZE + 1])
async def test_data_before_a_reset(make: Make, size: int) -> None:
    """They are received, and then that the connection is gone; also where libuv looks no more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * READ_SIZE)
        ours.setblocking(False)
        incoming = make(ours)
        with ours, anyio.fail_after(BOUND):
            with listener.accept()[0] as peer:
                ours.send(b"PING")
                peer.settimeout(BOUND)
                peer.sendall(b"x" * size)
                assert peer.recv(1) == b"P"  # what it leaves unread makes its end a reset
            got = b""
            with pytest.raises((BrokenResourceError, EndOfStream)):
                while True:
                    got += await incoming.receive(READ_SIZE)
            assert got == b"x" * size
            incoming.close()


async def test_closed(pair: Pair) -> None:
    """Whoever receives is told, also where something has come that nobody wants any more."""
    incoming, ours, _ = pair
    failed: list[int] = []

    async def read() -> None:
        with pytest.raises(ClosedResourceError):
            await incoming.receive(READ_SIZE)
        failed.append(1)

    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            incoming.close()
            ours.close()
        assert failed == [1]
        with pytest.raises(ClosedResourceError):
            await incoming.receive(READ_SIZE)


async def test_closed_with_data(pair: Pair) -> None:
    incoming, ours, theirs = pair
    theirs.sendall(b"abcdef")
    assert await incoming.receive(3) == b"abc"
    incoming.close()
    ours.close()
    with pytest.raises(ClosedResourceError):
        await incoming.receive(3)


async def test_one_at_a_time(pair: Pair) -> None:
    incoming, _, theirs = pair
    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as group:
            group.start_soon(incoming.receive, READ_SIZE)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(BusyResourceError):
                await incoming.receive(READ_SIZE)
            theirs.sendall(b"a")


@pytest.mark.parametrize("turns", range(4))
async def test_cancelled_as_it_comes(pair: Pair, turns: int) -> None:
    """Whenever a read is cancelled, the next one has all that it hasn't returned."""
    incoming, _, theirs = pair
    got: list[bytes] = []

    async def read() -> None:
        got.append(await incoming.receive(READ_SIZE))

    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            theirs.sendall(b"abc")
            for _ in range(turns):
                await checkpoint()
            group.cancel_scope.cancel()
        if not got:
            await read()
        assert got == [b"abc"]
        theirs.sendall(b"def")
        await read()
    assert got == [b"abc", b"def"]


async def test_is_a_checkpoint(pair: Pair) -> None:
    """Also where something is there already."""
    incoming, _, theirs = pair
    theirs.sendall(b"abcdef")
    assert await incoming.receive(3) == b"abc"
    with anyio.CancelScope() as scope:
        scope.cancel()
        await incoming.receive(3)
    assert scope.cancelled_caught
    assert await incoming.receive(3) == b"def"


async def test_loop_is_told_once(sockets: tuple[socket.socket, socket.socket]) -> None:
    """However often somebody receives, the loop begins to look once, and ends when it is closed."""
    loop: Any = Loop()
    ours, theirs = sockets
    incoming = _Watched(ours, loop)
    with anyio.fail_after(BOUND):
        for number in range(20):
            async with anyio.create_task_group() as group:

                async def read(number: int = number) -> None:
                    assert await incoming.receive(READ_SIZE) == b"%d" % number

                group.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                theirs.sendall(b"%d" % number)
    assert (loop.begun, loop.ended, incoming.count) == (1, 0, 20)
    incoming.close()
    incoming.close()
    assert (loop.begun, loop.ended) == (1, 1)


async def test_holds_one_piece(sockets: tuple[socket.socket, socket.socket]) -> None:
    """While nobody receives one piece is read, and the loop looks no more; who writes has to wait."""
    loop: Any = Loop()
    ours, theirs = sockets
    theirs.setblocking(False)
    incoming = _Watched(ours, loop)
    with anyio.fail_after(BOUND):
        theirs.send(b"a")
        assert await incoming.receive(READ_SIZE) == b"a"
        written = 0
        while loop.looks:
            try:
                written += theirs.send(b"x" * READ_SIZE)
            except BlockingIOError:
                pass
            await checkpoint()
        with pytest.raises(BlockingIOError):
            while True:
                written += theirs.send(b"x" * READ_SIZE)
        for _ in range(10):
            await checkpoint()
        assert incoming.count == 2
        assert len(incoming._data) <= READ_SIZE
        while written:
            written -= len(await incoming.receive(READ_SIZE))
    incoming.close()
    assert not loop.looks


async def test_end_is_looked_for_no_more(sockets: tuple[socket.socket, socket.socket]) -> None:
    """A socket at its end is readable for ever: the loop would be busy with it."""
    loop: Any = Loop()
    ours, theirs = sockets
    incoming = _Watched(ours, loop)
    with anyio.fail_after(BOUND):
        theirs.send(b"a")
        assert await incoming.receive(READ_SIZE) == b"a"
        theirs.close()
        while loop.looks:
            await checkpoint()
        with pytest.raises(EndOfStream):
            await incoming.receive(READ_SIZE)
    incoming.close()
    assert (loop.begun, loop.ended) == (1, 1)


SEND, RECEIVE, CANCEL = "send", "receive", "cancel"
STEPS = st.lists(
    st.tuples(st.just(SEND), st.integers(1, 3 * READ_SIZE))
    | st.tuples(st.just(RECEIVE), st.integers(1, 2 * READ_SIZE))
    | st.tuples(st.just(CANCEL), st.integers(0, 3)),
    max_size=25,
)


@pytest.mark.parametrize("way", WAYS)
@given(steps=STEPS, ends=st.booleans())
@settings(max_examples=40, deadline=None)
async def test_nothing_is_lost(way: str, steps: list[tuple[str, int]], ends: bool) -> None:
    """Whatever is written, read and cancelled in between: all bytes come, once and in their order."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    incoming, pattern = WAYS[way](ours), bytes(range(251))
    sent, got = 0, b""
    with ours, theirs, anyio.fail_after(BOUND):
        for step, number in steps:
            if step == SEND:
                start = sent % 251
                piece = (pattern * (number // 251 + 2))[start : start + number]
                try:
                    sent += theirs.send(piece)
                except BlockingIOError:
                    pass
            elif step == RECEIVE and len(got) < sent:
                found = await incoming.receive(number)
                assert 0 < len(found) <= number
                got += found
            elif step == CANCEL:
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as group:

                        async def cancel(turns: int, scope: anyio.CancelScope) -> None:
                            for _ in range(turns):
                                await checkpoint()
                            scope.cancel()

                        group.start_soon(cancel, number, scope)
                        got += await incoming.receive(READ_SIZE)
                        group.cancel_scope.cancel()
        if ends:
            theirs.close()
        while len(got) < sent:
            got += await incoming.receive(READ_SIZE)
        assert got == (pattern * (sent // 251 + 1))[:sent]
        if ends:
            with pytest.raises(EndOfStream):
                await incoming.receive(1)
        incoming.close()
