"""What is taken for Redis' time, by samples whose round trips differ."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from anyio_kkrpc.redis._stream._clock import ServerClock


class Server:
    """A server whose clock is ahead of AnyIO's."""

    def __init__(self) -> None:
        self.ahead = 1e6
        self.way_there = self.way_back = 0.0

    async def execute(self, *command: Any) -> list[bytes]:
        assert command == (b"TIME",)
        await anyio.sleep(self.way_there)
        now = anyio.current_time() + self.ahead
        await anyio.sleep(self.way_back)
        return [b"%d" % int(now), b"%d" % int(now % 1 * 1e6)]


def error(server: Server, clock: ServerClock) -> float:
    return abs(clock.now() - anyio.current_time() - server.ahead)


WAYS = st.tuples(st.floats(0, 3), st.floats(0, 3))


@given(st.lists(WAYS, min_size=1, max_size=20), st.floats(0, 5))
def test_shortest_round_trip(ways: list[tuple[float, float]], pause: float) -> None:
    """The sample of the shortest round trip counts, so that a slow one does no harm."""

    async def check() -> None:
        server, clock = Server(), ServerClock(anyio.current_time)
        shortest = 10.0
        for server.way_there, server.way_back in ways:
            await clock.read(server.execute)
            shortest = min(shortest, server.way_there + server.way_back)
            assert error(server, clock) <= shortest / 2 + 0.1
            await anyio.sleep(pause)

    trio.run(check, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("step", [3600.0, -3600.0, 1.0])
def test_clock_that_is_set(step: float) -> None:
    """A server's clock that was set is followed at the next look, however good the last one was."""

    async def check() -> None:
        server, clock = Server(), ServerClock(anyio.current_time)
        await clock.read(server.execute)
        assert error(server, clock) < 0.001
        server.ahead += step
        server.way_there = 0.5
        await clock.read(server.execute)
        assert error(server, clock) <= 0.251

    trio.run(check, clock=MockClock(autojump_threshold=0))


def test_clocks_that_drift_apart() -> None:
    """An old sample is worth less with time, so that a new one replaces it."""

    async def check() -> None:
        server, clock = Server(), ServerClock(anyio.current_time)
        await clock.read(server.execute)
        server.way_there = 0.2
        for _ in range(1000):
            await anyio.sleep(5)
            server.ahead += 5 * 0.0002
            await clock.read(server.execute)
            assert error(server, clock) <= 0.2

    trio.run(check, clock=MockClock(autojump_threshold=0))
