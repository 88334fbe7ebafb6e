"""Streams over Redis: what is left of them where a peer has gone."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import DeliveryError, RedisStreamsTransport, RemoteError, RPCChannel
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


@pytest.mark.one_server
@pytest.mark.parametrize("group", [True, False], ids=["group", "broadcast"])
async def test_streams_in_streams(redis_server: RedisServer, stream_name: str, group: bool) -> None:
    """Their items come from the peer that has the outer one, whichever of a group that is."""

    async def row(number: int) -> AsyncIterator[int]:
        for item in range(number, number + 3):
            yield item

    class Table:
        async def rows(self, count: int) -> AsyncIterator[AsyncIterator[int]]:
            for number in range(count):
                yield row(number)

        async def back(self, rows: AsyncIterator[AsyncIterator[int]]) -> list[list[int]]:
            return [[item async for item in one] async for one in rows]

    common: Any = {"stream": stream_name, "connect_timeout": BOUND}
    url, wanted = redis_server.url, [[n, n + 1, n + 2] for n in range(10)]
    async with (
        RedisStreamsTransport(url, use_consumer_group=group, **common) as served,
        RPCChannel(served, expose=Table()) as worker,
        RedisStreamsTransport(url, **common) as client,
        RPCChannel(client, timeout=CALL_BOUND) as channel,
    ):
        api = channel.get_api()
        assert [[item async for item in one] async for one in api.rows(10)] == wanted
        assert await api.back(Table().rows(10)) == wanted
        with anyio.fail_after(BOUND):
            while worker.statistics().outgoing_streams or channel.statistics().outgoing_streams:
                await anyio.sleep(0.001)


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


@pytest.mark.parametrize("group", [True, False], ids=["group", "broadcast"])
async def test_source_whose_peer_leaves(
    redis_server: RedisServer, stream_name: str, group: bool
) -> None:
    """Readers are told, of results and of arguments, before the transport goes."""

    async def endless() -> AsyncIterator[int]:
        while True:
            yield 1

    async def read(numbers: AsyncIterator[int]) -> None:
        with pytest.raises(DeliveryError, match="ended while the stream was open"):
            async for _ in numbers:
                begun.set()

    async def keep(numbers: AsyncIterator[int]) -> None:
        tasks.start_soon(read, numbers)

    begun = anyio.Event()
    stays: Any = {"stream": f"{stream_name}-stays", "use_consumer_group": group}
    leaves: Any = {"stream": stream_name, "use_consumer_group": group}
    url = redis_server.url
    with anyio.fail_after(BOUND):
        async with (
            RedisStreamsTransport(url, stream=stream_name) as reads,
            RPCChannel(reads, timeout=CALL_BOUND) as reading,
            RedisStreamsTransport(url, **stays) as serves,
            RPCChannel(serves, expose={"keep": keep}, timeout=CALL_BOUND),
            anyio.create_task_group() as tasks,
        ):
            async with (
                RedisStreamsTransport(url, **leaves) as served,
                RPCChannel(served, expose={"endless": endless}),
            ):
                items = await reading.get_api().endless()
                assert await items.__anext__() == 1
            with pytest.raises(DeliveryError, match="ended while the stream was open"):
                async for _ in items:
                    pass
            async with (
                RedisStreamsTransport(url, stream=stays["stream"]) as calls,
                RPCChannel(calls, timeout=CALL_BOUND) as calling,
            ):
                await calling.get_api().keep(endless())
                await begun.wait()


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


@pytest.mark.parametrize("taken", [0, 3])
async def test_stream_argument_that_another_worker_asks_for(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, taken: int
) -> None:
    """A worker that was taken for dead has it: the next one reads it from its start, or fails.

    The source is closed, and the first worker, which reads on, is told.
    """

    class Sums:
        def __init__(self) -> None:
            self.got: list[int] = []
            self.error: Exception | None = None
            self.begun = anyio.Event()

        async def total(self, numbers: AsyncIterator[int]) -> int:
            self.begun.set()
            try:
                async for number in numbers:
                    self.got.append(number)
            except Exception as exc:
                self.error = exc
                raise
            return sum(self.got)

    first, second, go_on, closed = Sums(), Sums(), anyio.Event(), anyio.Event()

    async def numbers() -> AsyncIterator[int]:
        try:
            for number in range(taken or 40):
                if not taken:
                    await go_on.wait()
                yield number
            if taken:
                await anyio.sleep_forever()
        finally:
            closed.set()

    async def call() -> None:
        if taken:
            with pytest.raises(RemoteError, match=f"has had {taken} items"):
                await channel.get_api().total(numbers())
        else:
            assert await channel.get_api().total(numbers()) == 780

    options: Any = {"stream": stream_name, "use_consumer_group": True, "claim_idle": 1}
    async with (
        RedisStreamsTransport(redis_server.url, **options) as one,
        RedisStreamsTransport(redis_server.url, **options) as other,
        RedisStreamsTransport(redis_server.url, **options) as using,
        RPCChannel(one, expose=first, timeout=None),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
        anyio.create_task_group() as tasks,
    ):
        with anyio.fail_after(BOUND):
            tasks.start_soon(call)
            await first.begun.wait()
            (producer,) = channel._core.conversation.producers.values()
            while len(first.got) < taken or producer.consumer is None:
                await anyio.sleep(0.01)
            (entry,) = witness.xrange(stream_name)
            witness.xclaim(
                stream_name, "kkrpc-group", "kkrpc-handed-back", 0, [entry[0]], idle=2**31 - 1
            )
            async with RPCChannel(other, expose=second):
                await second.begun.wait()
                while not taken and producer.consumer != other.session_id:
                    await anyio.sleep(0.01)
                go_on.set()
                await closed.wait()
                while first.error is None:
                    await anyio.sleep(0.01)
    assert first.got == list(range(taken))
    assert isinstance(first.error, DeliveryError)
    assert "another worker" in str(first.error)
    assert second.got == ([] if taken else list(range(40)))
    assert channel.statistics().outgoing_streams == 0


async def test_large_items_of_a_reader_that_has_stopped(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """In its inbox wait no more than weigh what its pull has granted, and one beside them."""

    class Large:
        async def items(self) -> AsyncIterator[str]:
            while True:
                yield "x" * 300_000

        def ping(self) -> None: ...

    base = f"{{{stream_name}}}:inbox:"
    async with (
        RedisStreamsTransport(redis_server.url, stream=stream_name, session_id="w") as served,
        RPCChannel(served, expose=Large()),
        RedisStreamsTransport(redis_server.url, stream=stream_name) as client,
        RPCChannel(client, timeout=CALL_BOUND) as channel,
    ):
        await channel.get_api().ping()
        # A client that opens a stream and is stopped once it has pulled.
        witness.xadd(base + "stopped", {"hint": "hello"})
        call = {"t": "q", "id": "1", "op": "call", "p": ["items"]}
        witness.xadd(stream_name, {"from": "stopped", "json": json.dumps(call), "v": "2"})
        with anyio.fail_after(BOUND):
            while len(found := witness.xrange(base + "stopped")) < 2:
                await anyio.sleep(0.01)
            (stream,) = [json.loads(fields[b"json"])["v"]["id"] for _, fields in found[1:]]
            pull = {"t": "sq", "id": "2", "sid": stream, "op": "pull", "n": 32, "b": 1 << 20}
            entry = {"from": "stopped", "json": json.dumps(pull), "n": "a.1", "v": "2"}
            witness.xadd(base + "w", entry)
            while witness.xlen(base + "stopped") < 2 + 4:
                await anyio.sleep(0.01)
        for _ in range(10):
            await channel.get_api().ping()
        items = [json.loads(fields[b"json"]) for _, fields in witness.xrange(base + "stopped")[2:]]
        assert [item["w"] for item in items] == [300_000] * 4
