"""Callbacks over Redis: what waits in an inbox is bounded, whatever its owner does."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import DeliveryError, RedisStreamsTransport, RPCChannel
from anyio_kkrpc.redis._stream._keys import Keys
from anyio_kkrpc.testing._server import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server]

AHEAD = 6


class Api:
    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    async def flood(self, function: Callable[..., Awaitable[None]], count: int) -> int:
        try:
            for number in range(count):
                await function(number)
        except BaseException as exc:
            self.errors.append(exc)
            raise
        return count


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


class Ghost:
    """A client by hand: it asks, and reads its inbox when it is told to."""

    def __init__(self, witness: redis.Redis, stream: str) -> None:
        self._witness = witness
        self.inbox = Keys.of(stream).inbox("ghost")
        witness.xadd(self.inbox, {"hint": "hello"})
        function = {"__kkrpc_next_arg__": "callback", "id": "function"}
        record = {"t": "q", "id": "1", "op": "call", "p": ["flood"], "a": [function, 1000]}
        witness.xadd(stream, {"from": "ghost", "json": json.dumps({**record, "cw": AHEAD})})

    def records(self) -> list[dict[str, Any]]:
        entries = self._witness.xrange(self.inbox)
        return [json.loads(fields[b"json"]) for _, fields in entries if b"json" in fields]

    def tell(self, key: bytes, **record: Any) -> None:
        self._witness.xadd(key, {"from": "ghost", "json": json.dumps(record), "n": "e.1"})


@pytest.mark.parametrize("group", [True, False], ids=["group", "broadcast"])
async def test_inbox_of_a_client_that_does_not_read(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, group: bool
) -> None:
    """No more than the client allows lies in it; the handler goes on as it reads."""
    api = Api()
    async with RedisStreamsTransport(
        redis_server.url, stream=stream_name, use_consumer_group=group
    ) as served:
        async with RPCChannel(served, expose=api):
            ghost = Ghost(witness, stream_name)
            await until(lambda: len(ghost.records()) >= AHEAD)
            await anyio.wait_all_tasks_blocked()
            records = ghost.records()
            assert [record["a"] for record in records] == [[n] for n in range(AHEAD)]
            asked = [record for record in records if "f" in record]
            assert [record["i"] for record in asked] == [AHEAD // 2, AHEAD]
            mine = Keys.of(stream_name).inbox(served.session_id)
            ghost.tell(mine, t="cbp", id=asked[0]["f"], n=AHEAD // 2)
            await until(lambda: len(ghost.records()) >= AHEAD + AHEAD // 2)
            await anyio.wait_all_tasks_blocked()
            assert len(ghost.records()) == AHEAD + AHEAD // 2
            assert not api.errors


async def test_inbox_that_is_gone(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """What can't be delivered is an error for who goes on calling, within what may be ahead."""
    api = Api()
    async with RedisStreamsTransport(
        redis_server.url, stream=stream_name, use_consumer_group=True
    ) as served:
        async with RPCChannel(served, expose=api):
            ghost = Ghost(witness, stream_name)
            await until(lambda: len(ghost.records()) >= AHEAD)
            (asked, _) = (record for record in ghost.records() if "f" in record)
            witness.delete(ghost.inbox)
            mine = Keys.of(stream_name).inbox(served.session_id)
            ghost.tell(mine, t="cbp", id=asked["f"], n=AHEAD // 2)
            await until(lambda: api.errors)
    (error,) = api.errors
    assert isinstance(error, DeliveryError)
    assert "no inbox" in str(error)


@pytest.mark.parametrize("group", [True, False], ids=["group", "broadcast"])
async def test_flood(redis_server: RedisServer, stream_name: str, group: bool) -> None:
    """All arrive and run, in their order, before the call returns."""
    count = 500
    seen: list[int] = []

    async def slow(number: int) -> None:
        seen.append(number)
        await anyio.lowlevel.checkpoint()

    options: Any = {"stream": stream_name, "use_consumer_group": group}
    async with (
        RedisStreamsTransport(redis_server.url, **options) as served,
        RPCChannel(served, expose=Api()),
        RedisStreamsTransport(redis_server.url, **options) as transport,
        RPCChannel(transport, timeout=CALL_BOUND) as channel,
    ):
        assert await channel.get_api().flood(slow, count) == count
        assert seen == list(range(count))
        assert channel.statistics().dropped_callbacks == 0


class Asking:
    def __init__(self) -> None:
        self.begun = anyio.Event()

    async def twice(self, function: Any) -> list[Any]:
        return [await function.ask(1), await function.ask(2)]

    async def gives_up(self, function: Any) -> str:
        """Leave it once it runs."""
        async with anyio.create_task_group() as group:
            group.start_soon(function.ask, 0)
            await self.begun.wait()
            group.cancel_scope.cancel()
        return "gave up"

    async def waits(self, function: Any) -> str:
        try:
            await function.ask(0)
        except DeliveryError:
            return "gone"
        return "answered"


@pytest.mark.parametrize("group", [True, False], ids=["group", "broadcast"])
async def test_results_of_functions(
    redis_server: RedisServer, stream_name: str, group: bool
) -> None:
    """They come back by the inbox of who has asked, and a cancel reaches the function."""
    asking, cancelled = Asking(), anyio.Event()

    async def function(number: int) -> int:
        if not number:
            asking.begun.set()
            try:
                await anyio.sleep_forever()
            finally:
                cancelled.set()
        return number * 10

    async with (
        RedisStreamsTransport(
            redis_server.url, stream=stream_name, use_consumer_group=group
        ) as served,
        RedisStreamsTransport(
            redis_server.url, stream=stream_name, use_consumer_group=group
        ) as used,
        RPCChannel(served, expose=asking, timeout=CALL_BOUND),
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):
        api = channel.get_api()
        assert await api.twice(function) == [10, 20]
        assert await api.gives_up(function) == "gave up"
        with anyio.fail_after(BOUND):
            await cancelled.wait()
        await until(lambda: not channel.statistics().handlers)


async def test_the_owner_of_a_function_that_is_asked_is_gone(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Who waits for its result learns that from its inbox, which isn't there any more."""
    async with RedisStreamsTransport(
        redis_server.url, stream=stream_name, claim_idle=1.0, use_consumer_group=True
    ) as served:
        async with RPCChannel(served, expose=Asking(), timeout=CALL_BOUND) as channel:
            ghost = Ghost(witness, stream_name)
            function = {"__kkrpc_next_arg__": "callback", "id": "function"}
            record = {"t": "q", "id": "2", "op": "call", "p": ["waits"], "a": [function]}
            asked = {**record, "cw": AHEAD, "cr": True}
            witness.xadd(stream_name, {"from": "ghost", "json": json.dumps(asked)})
            await until(lambda: any("r" in one for one in ghost.records()))
            witness.delete(ghost.inbox)
            await until(lambda: not channel.statistics().handlers)
            assert not channel._conversation.functions.all_asked()
