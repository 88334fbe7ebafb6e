"""Streams over Redis: what is left of them where a peer has gone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import DeliveryError, RedisStreamsTransport, RPCChannel
from anyio_kkrpc.testing._server import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server]


class Api:
    def __init__(self) -> None:
        self.called = anyio.Event()
        self.go_on = anyio.Event()

    async def items(self) -> AsyncIterator[int]:
        yield 1

    async def late(self) -> Any:
        self.called.set()
        await self.go_on.wait()
        return self.items()


@pytest.mark.parametrize("group", [True, False], ids=["group", "broadcast"])
async def test_reader_that_was_not_told(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, group: bool
) -> None:
    """A stream whose opening reply has no inbox to go to is closed at once."""
    options: Any = {"stream": stream_name, "use_consumer_group": group}
    api, url = Api(), redis_server.url
    with anyio.fail_after(60):
        async with (
            RedisStreamsTransport(url, **options) as served,
            RPCChannel(served, expose=api) as worker,
            RedisStreamsTransport(url, stream=stream_name) as client,
            RPCChannel(client) as channel,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(lambda: channel.get_api().late())
            await api.called.wait()
            witness.delete(f"{{{stream_name}}}:inbox:{client.session_id}")
            api.go_on.set()
            while not worker.statistics().undelivered:
                await anyio.sleep(0.001)
            while worker.statistics().outgoing_streams:
                await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()


async def test_stream_argument_of_a_broadcast(redis_server: RedisServer, stream_name: str) -> None:
    """The first peer that reads it gets it, the others a precise error, and calls succeed."""

    class Sums:
        def __init__(self) -> None:
            self.errors: list[Exception] = []

        async def total(self, numbers: AsyncIterator[int]) -> int:
            try:
                return sum([number async for number in numbers])
            except Exception as exc:
                self.errors.append(exc)
                raise

    async def numbers() -> AsyncIterator[int]:
        for number in range(40):
            yield number

    first, second = Sums(), Sums()
    async with (
        RedisStreamsTransport(redis_server.url, stream=stream_name) as one,
        RedisStreamsTransport(redis_server.url, stream=stream_name) as other,
        RedisStreamsTransport(redis_server.url, stream=stream_name) as using,
        RPCChannel(one, expose=first),
        RPCChannel(other, expose=second),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        for _ in range(20):
            assert await channel.get_api().total(numbers()) == 780
        with anyio.fail_after(BOUND):
            while len(first.errors) + len(second.errors) < 20:
                await anyio.sleep(0.01)
            while channel.statistics().outgoing_streams:
                await anyio.sleep(0.01)
    for error in first.errors + second.errors:
        assert isinstance(error, DeliveryError)
        assert "read by another peer" in str(error)
