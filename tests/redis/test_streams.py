"""Streams over Redis: what is left of them where a peer has gone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import RedisStreamsTransport, RPCChannel
from anyio_kkrpc.testing._server import RedisServer

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
