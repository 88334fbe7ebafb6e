"""Cancelled at each step: whatever the moment, nothing is left behind and the next call works."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
import redis
from anyio.lowlevel import checkpoint

from anyio_kkrpc import RedisStreamsTransport, RPCChannel
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND
from tests.pairs import pair

pytestmark = pytest.mark.anyio


class Api:
    def __init__(self) -> None:
        self.open = 0
        self.channel: RPCChannel | None = None

    def fine(self) -> int:
        return 1

    async def slowly(self, steps: int) -> int:
        self.open += 1
        try:
            for _ in range(steps):
                await checkpoint()
            return steps
        finally:
            self.open -= 1

    async def items(self, count: int) -> AsyncIterator[int]:
        self.open += 1
        try:
            for number in range(count):
                await checkpoint()
                yield number
        finally:
            self.open -= 1

    async def add_up(self, numbers: AsyncIterator[int]) -> int:
        self.open += 1
        try:
            return sum([number async for number in numbers])
        finally:
            self.open -= 1

    async def call_back(self, function: Callable[[int], Awaitable[None]]) -> int:
        self.open += 1
        try:
            for number in range(3):
                await function(number)
                await checkpoint()
            return 3
        finally:
            self.open -= 1


async def call(api: Any) -> None:
    assert await api.slowly(5) == 5


async def stream(api: Any) -> None:
    assert [n async for n in api.items(5)] == [0, 1, 2, 3, 4]


async def stream_left_early(api: Any) -> None:
    async with api.items(100) as items:
        async for number in items:
            if number == 2:
                break


async def stream_as_argument(api: Any) -> None:
    async def numbers() -> AsyncIterator[int]:
        for number in range(3):
            await checkpoint()
            yield number

    assert await api.add_up(numbers()) == 3


async def callback(api: Any) -> None:
    seen: list[int] = []

    async def function(number: int) -> None:
        await checkpoint()
        seen.append(number)

    assert await api.call_back(function) == 3
    assert seen == [0, 1, 2]


async def concurrent(api: Any) -> None:
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(call, api)


SCENARIOS = [call, stream, stream_left_early, stream_as_argument, callback, concurrent]


async def cancelled_after(ticks: int, scenario: Callable[[Any], Awaitable[None]], api: Any) -> bool:
    """Run a scenario, cancelled after so many turns of the event loop; tell whether it finished."""
    finished = False
    async with anyio.create_task_group() as group:

        async def run() -> None:
            nonlocal finished
            with scope:
                await scenario(api)
                finished = True

        scope = anyio.CancelScope()
        group.start_soon(run)
        for _ in range(ticks):
            await checkpoint()
            if finished:
                break
        scope.cancel()
    return finished


async def settled(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.001)


def _is_empty(channel: RPCChannel) -> bool:
    found = channel.statistics()
    return not (
        found.calls
        or found.handlers
        or found.callbacks
        or found.incoming_streams
        or found.outgoing_streams
    )


@pytest.mark.usefixtures("no_blocking_calls")
@pytest.mark.parametrize("codec", [None, "cbor"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda f: f.__name__)
async def test_at_each_turn(scenario: Callable[[Any], Awaitable[None]], codec: str | None) -> None:
    """On a memory transport, from before the first await to after the last."""
    before = len(anyio.get_running_tasks())
    api = Api()
    async with pair(api, codec=codec) as link:
        idle: int | None = None
        for ticks in range(2000):
            finished = await cancelled_after(ticks, scenario, link.api)
            await settled(
                lambda: _is_empty(link.client) and _is_empty(link.server) and not api.open
            )
            assert await link.api.fine() == 1
            if idle is None:
                idle = len(anyio.get_running_tasks())
            if finished:
                break
        else:
            pytest.fail("it never finished")
        assert ticks > 5
        # Standing handler tasks stay, a few at most; nothing else does.
        assert len(anyio.get_running_tasks()) <= idle + 10
    assert len(anyio.get_running_tasks()) == before


@pytest.mark.server
@pytest.mark.parametrize("grouped", [False, True], ids=["broadcast", "group"])
@pytest.mark.parametrize("scenario", [call, stream, callback], ids=lambda f: f.__name__)
async def test_at_many_turns_on_redis(
    scenario: Callable[[Any], Awaitable[None]],
    grouped: bool,
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
) -> None:
    """On Redis, where turns are waits for the network: nothing stays here, pending or in Redis."""
    before = len(anyio.get_running_tasks())
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": grouped}
    api = Api()
    async with (
        RedisStreamsTransport(redis_server.url, **options) as serving,
        RedisStreamsTransport(redis_server.url, **options) as calling,
        RPCChannel(serving, expose=api) as server,
        RPCChannel(calling, timeout=CALL_BOUND) as client,
    ):
        for ticks in (*range(12), *range(12, 60, 6), *range(60, 2000, 100)):
            finished = await cancelled_after(ticks, scenario, client.get_api())
            await settled(lambda: _is_empty(client) and _is_empty(server) and not api.open)
            assert await client.get_api().fine() == 1
            if finished:
                break
        if grouped:
            await settled(lambda: witness.xpending(stream_name, "kkrpc-group")["pending"] == 0)
    assert len(anyio.get_running_tasks()) == before
    assert witness.keys(f"*{stream_name}*inbox*") == []
    if grouped:
        assert witness.xinfo_consumers(stream_name, "kkrpc-group") == []
    sessions = (serving.session_id, calling.session_id)
    await settled(
        lambda: not [entry for entry in witness.client_list() if entry["name"].endswith(sessions)]
    )


@pytest.mark.parametrize("ticks", range(0, 30, 3))
async def test_entering_and_leaving(ticks: int) -> None:
    """A channel that is cancelled while it opens or closes leaves no task."""
    before = len(anyio.get_running_tasks())

    async def scenario(_: Any) -> None:
        async with pair(Api()) as link:
            await link.api.slowly(3)

    await cancelled_after(ticks, scenario, None)
    assert len(anyio.get_running_tasks()) == before


@pytest.mark.server
@pytest.mark.parametrize("ticks", range(0, 60, 6))
async def test_entering_and_leaving_on_redis(
    ticks: int, redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A Redis transport that is cancelled while it opens or closes leaves no task or connection."""
    before = len(anyio.get_running_tasks())
    session = f"s-{ticks}-{stream_name}"

    async def scenario(_: Any) -> None:
        async with (
            RedisStreamsTransport(
                redis_server.url, stream=stream_name, session_id=session, use_consumer_group=True
            ) as transport,
            RPCChannel(transport, expose=Api()) as channel,
        ):
            await channel.get_api().fine()

    await cancelled_after(ticks, scenario, None)
    assert len(anyio.get_running_tasks()) == before
    await settled(
        lambda: not [c for c in witness.client_list() if c["name"].endswith(session[:32])]
    )
