"""Whether requests are read is known, whatever else works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, TransportConnectionError
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._connection._patience import Patience
from anyio_kkrpc.redis._reading._broadcast import Broadcast
from anyio_kkrpc.redis._reading._flow import Flow
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND
from tests.redis.parts import KEYS, Parts, Server, make_outages, request

pytestmark = pytest.mark.anyio


class Watching(Server):
    """Notes at each read whether requests are said to be read."""

    def __init__(self, *replies: Any) -> None:
        super().__init__(*replies)
        self.going: Callable[[], bool] = lambda: False
        self.seen: list[bool] = []

    async def execute(self, *command: Any) -> Any:
        if command[0] == b"XREAD":
            self.seen.append(self.going())
        return await super().execute(*command)


async def test_refused_and_lost() -> None:
    """One that was refused doesn't go on before an answer came, nor does a lost one."""
    refused, came = ResponseError("NOREPLICAS no"), [(KEYS.stream, [(b"5-0", request("a"))])]
    server = Watching(came, refused, came, came, TransportConnectionError("lost"))
    parts = Parts(server)
    flow = parts.common.loop.flow
    server.going = lambda: flow.going
    assert not flow.going
    async with anyio.create_task_group() as tasks:
        await Broadcast(KEYS.stream, parts.common, None).begin(tasks)()
    assert server.seen == [True, True, False, True, True]
    assert not flow.going


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


@pytest.mark.one_server
@pytest.mark.parametrize("grouped", [False, True], ids=["broadcast", "group"])
async def test_told(own_server: RedisServer, grouped: bool) -> None:
    """Who serves reads, and a client doesn't. Nobody does without the server, or where it refuses
    that, though it answers what it is asked.
    """
    options: dict[str, Any] = {"stream": "s", "use_consumer_group": grouped, "block_timeout": 0.1}
    async with (
        RedisStreamsTransport(own_server.url, **options) as serving,
        RedisStreamsTransport(own_server.url, **options) as using,
        RPCChannel(serving, expose={"add": lambda a, b: a + b}),
        RPCChannel(using, timeout=BOUND) as client,
    ):

        def reads() -> bool:
            return serving.statistics().reading

        await until(reads)
        assert not using.statistics().reading
        own_server.kill()
        await until(lambda: not reads())
        await anyio.to_thread.run_sync(own_server.start)
        await until(reads)
        if grouped:
            with redis.Redis.from_url(own_server.url) as admin:
                admin.config_set("min-replicas-to-write", 1)
                await until(lambda: not reads())
                assert (await serving.get_stream_info()).groups == 1
                assert not reads()
                admin.config_set("min-replicas-to-write", 0)
        assert await client.get_api().add(1, 2) == 3
        await until(reads)


async def test_within_the_block() -> None:
    """As long as they are read, and nothing is refused; whatever ends that."""
    flow, patience = Flow(), Patience("reading", make_outages())
    assert not flow.going
    with pytest.raises(ZeroDivisionError), flow.through(patience):
        assert flow.going
        patience.pause(ResponseError("NOREPLICAS no"))
        assert not flow.going
        patience.worked()
        assert flow.going
        raise ZeroDivisionError
    assert not flow.going
