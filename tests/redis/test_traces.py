"""What a peer leaves in Redis, wherever its life is cut off."""

from __future__ import annotations

import itertools
import json
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, RPCError
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND
from tests.fake_server import fake_server

pytestmark = [pytest.mark.anyio, pytest.mark.server]
GROUP = "kkrpc-group"


class Api:
    def __init__(self) -> None:
        self.begun = anyio.Event()

    async def wait(self) -> None:
        self.begun.set()
        await anyio.sleep_forever()

    def add(self, a: int, b: int) -> int:
        return a + b


def ask(witness: redis.Redis, stream: str) -> str:
    """Add a request for `wait`, of a caller that has gone."""
    record = json.dumps({"t": "q", "id": "1", "op": "call", "p": ["wait"], "a": []})
    return str(witness.xadd(stream, {"from": "nobody", "json": record}).decode())


def lasting(witness: redis.Redis, stream: str) -> set[bytes]:
    """Return the keys of a stream that don't go by themselves."""
    return {key for key in witness.keys(f"*{stream}*") if witness.pttl(key) == -1}


@pytest.mark.parametrize("group", [False, True], ids=["broadcast", "group"])
async def test_cut_anywhere(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, group: bool
) -> None:
    """However many of a peer's commands have arrived: beside the stream no key is for ever."""
    for most in itertools.count():
        stream, arrived, api = f"{stream_name}-{most}", 0, Api()
        ask(witness, stream)

        def is_cut(command: Any, most: int = most) -> bool:
            nonlocal arrived
            arrived += 1
            return arrived > most

        with anyio.fail_after(BOUND):
            async with fake_server(redis_server.url) as fake:
                fake.refuse("ERR the process was killed", matches=is_cut)
                try:
                    async with (
                        RedisStreamsTransport(
                            fake.url, stream=stream, use_consumer_group=group, max_len=1000
                        ) as transport,
                        RPCChannel(transport, expose=api),
                    ):
                        while group and not api.begun.is_set() and not fake.refused:
                            await anyio.sleep(0.001)
                except RPCError:
                    assert fake.refused
        assert lasting(witness, stream) == {stream.encode()}
        if arrived <= most:  # it has lived to its end
            assert most > 10
            break


async def test_control_that_was_left(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Who wrote to it was killed before it could say for how long: whoever comes next does."""
    control = f"{{{stream_name}}}:control"
    witness.xadd(control, {"hint": "unknown"})
    async with RedisStreamsTransport(redis_server.url, stream=stream_name):
        assert 0 < witness.pttl(control) <= 3_600_000


async def test_inbox_that_is_written_to_after_its_end(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A peer that tells itself something makes its inbox again for a while only."""
    async with (
        RedisStreamsTransport(redis_server.url, stream=stream_name) as serving,
        RPCChannel(serving, expose=Api()),
        RedisStreamsTransport(redis_server.url, stream=stream_name, dialect="kkrpc-2") as calling,
        RPCChannel(calling, timeout=CALL_BOUND) as channel,
    ):
        inbox = f"{{{stream_name}}}:inbox:{serving.session_id}"
        assert witness.delete(inbox)
        assert await channel.get_api().add(1, 2) == 3
        assert 0 < witness.pttl(inbox) <= 60_000


async def test_last_read_of_a_worker_that_leaves(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """What it took whose reply didn't come any more is for others at once, as if never delivered."""
    api = Api()
    with anyio.fail_after(BOUND):
        async with RedisStreamsTransport(
            redis_server.url, stream=stream_name, use_consumer_group=True, max_queue_size=1
        ) as transport:
            async with RPCChannel(transport, expose=api, max_concurrency=1):
                begun, more, cut = (ask(witness, stream_name) for _ in range(3))
                await api.begun.wait()
                while transport.statistics().outstanding < 1:
                    await anyio.sleep(0.001)
                # One runs, and there is no room to read more.
                name = transport.consumer_name
                witness.xreadgroup(GROUP, name, {stream_name: ">"})
    pending = witness.xpending_range(stream_name, GROUP, "-", "+", 10)
    assert [(p["message_id"].decode(), p["consumer"], p["times_delivered"]) for p in pending] == [
        (begun, b"kkrpc-handed-back", 1),
        (more, b"kkrpc-handed-back", 0),
        (cut, b"kkrpc-handed-back", 0),
    ]
    consumers = [one["name"] for one in witness.xinfo_consumers(stream_name, GROUP)]
    assert consumers == [b"kkrpc-handed-back"]
