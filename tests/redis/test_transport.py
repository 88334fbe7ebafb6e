"""The Redis transport on real servers, with redis-py as an independent witness."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import (
    DeliveryError,
    MethodNotFoundError,
    OverloadedError,
    RedisStreamsTransport,
    RPCChannel,
    RPCTimeoutError,
    TransportClosedError,
    TransportConnectionError,
    current_call,
    with_call_options,
)
from anyio_kkrpc._protocol._records import Reply, Request
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.testing._server import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server]


class Worker:
    """Tells who served a call."""

    def __init__(self, name: str = "worker") -> None:
        self._name = name
        self._calls: list[Any] = []
        self._gate = anyio.Event()
        self._started = anyio.Event()

    async def who(self) -> str:
        await anyio.sleep(0)
        return self._name

    def note(self, value: Any) -> str:
        self._calls.append(value)
        return self._name

    async def gated(self, value: Any) -> Any:
        self._calls.append(value)
        self._started.set()
        await self._gate.wait()
        return value

    async def count(self, n: int) -> AsyncIterator[str]:
        for number in range(n):
            yield f"{self._name} {number}"

    async def call_me_back(self, times: int, callback: Callable[..., Any]) -> str:
        for number in range(times):
            await callback(f"{self._name} {number}")
        return self._name

    async def ask_back(self) -> str:
        raise NotImplementedError


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition on the server holds; each look is a round trip to it."""
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.005)


@asynccontextmanager
async def peers(
    url: str, stream: str, *served: Any, **options: Any
) -> AsyncIterator[list[RPCChannel]]:
    """Open a channel for each; those of ``None`` serve nothing."""
    async with AsyncExitStack() as stack:
        channels = []
        for api in served:
            transport = await stack.enter_async_context(
                RedisStreamsTransport(url, stream=stream, **options)
            )
            channels.append(
                await stack.enter_async_context(
                    RPCChannel(transport, expose=api, timeout=CALL_BOUND)
                )
            )
        yield channels


async def test_broadcast_reaches_everyone(redis_server: RedisServer, stream_name: str) -> None:
    """Each peer that serves gets each request; the first answer wins; others are silent."""
    one, two = Worker("one"), Worker("two")
    async with peers(redis_server.url, stream_name, one, two, None) as (_, _, client):
        for number in range(20):
            assert await client.get_api().note(number) in ("one", "two")
        await until(lambda: len(one._calls) == len(two._calls) == 20)
        assert one._calls == two._calls == list(range(20))


async def test_broadcast_peer_without_the_method_is_silent(
    redis_server: RedisServer, stream_name: str
) -> None:
    """The peer that has the method answers, whoever else is there; if none has it: timeout."""

    class Other:
        def other(self) -> str:
            return "other"

    async with peers(redis_server.url, stream_name, Worker(), Other(), None) as (_, _, client):
        for _ in range(10):
            assert await client.get_api().other() == "other"
            assert await client.get_api().who() == "worker"
        with pytest.raises(RPCTimeoutError):
            await with_call_options(client.get_api(), timeout=0.2).nobody_has_it()


async def test_nothing_is_missed_between_blocking_reads(
    redis_server: RedisServer, stream_name: str
) -> None:
    """With reads that last a millisecond, every request of many is received, in order."""
    worker = Worker()
    async with peers(redis_server.url, stream_name, worker, None, block_timeout=0.001) as (
        _,
        client,
    ):
        api = with_call_options(client.get_api(), reply=False)
        for number in range(300):
            await api.note(number)
        await until(lambda: len(worker._calls) == 300)
        assert worker._calls == list(range(300))


async def test_requests_since_connect_are_not_missed(
    redis_server: RedisServer, stream_name: str
) -> None:
    """What is sent after a peer has connected, but before its channel serves, is served; what was
    sent before isn't."""
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            RedisStreamsTransport(redis_server.url, stream=stream_name)
        )
        await client.send(Envelope(Request("early", "call", ["note"], a=["early"], o=True)))
        late = await stack.enter_async_context(
            RedisStreamsTransport(redis_server.url, stream=stream_name)
        )
        await client.send(Envelope(Request("late", "call", ["note"], a=["late"], o=True)))
        worker = Worker()
        await stack.enter_async_context(RPCChannel(late, expose=worker))
        await until(lambda: bool(worker._calls))
        assert worker._calls == ["late"]


@pytest.mark.parametrize("allow", [False, True])
async def test_self_messages(redis_server: RedisServer, stream_name: str, allow: bool) -> None:
    """A peer gets its own requests only if that is allowed."""
    worker = Worker()
    async with peers(redis_server.url, stream_name, worker, allow_self_messages=allow) as (
        channel,
    ):
        if allow:
            assert await channel.get_api().who() == "worker"
        else:
            with pytest.raises(RPCTimeoutError):
                await with_call_options(channel.get_api(), timeout=0.2).who()


async def test_group_shares_requests(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Each request is handled by exactly one worker, and each worker gets some of them."""
    workers = [Worker(str(n)) for n in range(3)]
    async with peers(
        redis_server.url, stream_name, *workers, None, None, use_consumer_group=True
    ) as channels:
        results: list[str] = []

        async def call(channel: RPCChannel, start: int) -> None:
            for number in range(start, start + 50):
                results.append(await channel.get_api().note(number))

        async with anyio.create_task_group() as group:
            for n in range(6):
                group.start_soon(call, channels[3 + n % 2], n * 50)
        done = sorted(value for worker in workers for value in worker._calls)
        assert done == list(range(300))
        assert all(worker._calls for worker in workers)
        (info,) = witness.xinfo_groups(stream_name)
        assert (info["name"], info["pending"], info["consumers"]) == (b"kkrpc-group", 0, 3)


async def test_group_of_many_peers_answers_the_right_one(
    redis_server: RedisServer, stream_name: str
) -> None:
    """Results, callbacks and streams reach the client that they are for, from the worker that
    serves them, with many of both at once."""
    workers = [Worker(str(n)) for n in range(3)]
    async with peers(
        redis_server.url, stream_name, *workers, *[None] * 4, use_consumer_group=True
    ) as channels:

        async def use(channel: RPCChannel) -> None:
            api = channel.get_api()
            for _ in range(10):
                items = [item async for item in api.count(40)]
                name = items[0].split()[0]
                assert items == [f"{name} {n}" for n in range(40)]
                seen: list[str] = []
                name = await api.call_me_back(5, seen.append)
                assert seen == [f"{name} {n}" for n in range(5)]

        async with anyio.create_task_group() as group:
            for channel in channels[3:]:
                group.start_soon(use, channel)
                group.start_soon(use, channel)


async def test_addressed_calls(redis_server: RedisServer, stream_name: str) -> None:
    """``to`` reaches one peer; a name that it lacks, and a peer that isn't there, are errors."""
    async with AsyncExitStack() as stack:
        names = {}
        for n in range(3):
            transport = await stack.enter_async_context(
                RedisStreamsTransport(redis_server.url, stream=stream_name)
            )
            await stack.enter_async_context(RPCChannel(transport, expose=Worker(str(n))))
            names[transport.session_id] = str(n)
        mine = await stack.enter_async_context(
            RedisStreamsTransport(redis_server.url, stream=stream_name)
        )
        client = await stack.enter_async_context(RPCChannel(mine, timeout=CALL_BOUND))
        for peer, name in names.items():
            assert await client.get_api(to=peer).who() == name
        with pytest.raises(MethodNotFoundError):
            await client.get_api(to=next(iter(names))).nope()
        with pytest.raises(DeliveryError, match="'nobody' is not there"):
            await client.get_api(to="nobody").who()
        with pytest.raises(DeliveryError, match="'nobody' is not there"):
            await with_call_options(client.get_api(to="nobody"), reply=False).who()


async def test_reverse_calls_of_many_clients(redis_server: RedisServer, stream_name: str) -> None:
    """A worker that calls back its caller reaches that caller, not another one."""

    class Asking:
        def __init__(self) -> None:
            self._channel: RPCChannel | None = None

        async def ask(self) -> str:
            assert self._channel is not None
            return str(await self._channel.get_api(to=current_call().sender).who())

    async with AsyncExitStack() as stack:
        workers = [Asking(), Asking()]
        for worker in workers:
            (worker._channel,) = await stack.enter_async_context(
                peers(redis_server.url, stream_name, worker, use_consumer_group=True)
            )
        clients = await stack.enter_async_context(
            peers(redis_server.url, stream_name, *[Worker(str(n)) for n in range(3)])
        )

        async def ask(n: int) -> None:
            for _ in range(10):
                assert await clients[n].get_api().ask() == str(n)

        async with anyio.create_task_group() as group:
            for n in range(3):
                group.start_soon(ask, n)


async def test_acknowledged_after_the_handler(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A request is pending while its handler runs, and acknowledged when its reply is there."""
    worker = Worker()
    async with peers(redis_server.url, stream_name, worker, None, use_consumer_group=True) as (
        _,
        client,
    ):
        async with anyio.create_task_group() as group:
            group.start_soon(client.get_api().gated, 1)
            with anyio.fail_after(BOUND):
                await worker._started.wait()
            assert witness.xpending(stream_name, "kkrpc-group")["pending"] == 1
            worker._gate.set()
        assert witness.xpending(stream_name, "kkrpc-group")["pending"] == 0


async def test_acknowledgement_is_ahead_of_what_comes_later(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """What asks Redis for this worker's entries behind a reply doesn't find the one it answers."""
    async with (
        peers(redis_server.url, stream_name, None) as (client,),
        RedisStreamsTransport(
            redis_server.url, stream=stream_name, use_consumer_group=True
        ) as transport,
        anyio.create_task_group() as group,
    ):
        for number in range(3):
            group.start_soon(client.get_api().who, number)
        for _ in range(3):
            with anyio.fail_after(BOUND):
                envelope = await transport.receive()
            # Not transport.settle(), which writes: here nothing is written in between.
            transport._writer.settle(
                envelope.token.id, Envelope(Reply(envelope.record.id, 1), None, envelope.sender)
            )
        pending = await transport._lane.link.request(b"XPENDING", stream_name, b"kkrpc-group")
        assert pending[0] == 0


async def test_worker_takes_no_more_than_it_has_room_for(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A worker that may run one request at a time leaves the rest to others."""
    slow, quick = Worker("slow"), Worker("quick")
    async with AsyncExitStack() as stack:
        channels = []
        for worker in (slow, quick):
            transport = await stack.enter_async_context(
                RedisStreamsTransport(redis_server.url, stream=stream_name, use_consumer_group=True)
            )
            channels.append(
                await stack.enter_async_context(
                    RPCChannel(transport, expose=worker, max_concurrency=1)
                )
            )
        (client,) = await stack.enter_async_context(peers(redis_server.url, stream_name, None))
        async with anyio.create_task_group() as group:
            group.start_soon(with_call_options(client.get_api(), timeout=CALL_BOUND).gated, "first")
            await until(lambda: bool(slow._calls or quick._calls))
            busy, idle = (slow, quick) if slow._calls else (quick, slow)
            for number in range(30):
                assert await client.get_api().note(number) == idle._name
            assert witness.xpending(stream_name, "kkrpc-group")["pending"] == 1
            busy._gate.set()


async def test_group_starts_with_what_was_asked_before(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Requests that were sent before the first worker came are answered."""
    async with peers(redis_server.url, stream_name, None) as (client,):
        results: list[str] = []
        worker = Worker()

        async def call() -> None:
            results.append(await client.get_api().who())

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            with pytest.raises(RPCTimeoutError):
                await with_call_options(client.get_api(), timeout=0.05).gated("out of time")
            # A busy worker reads Redis' clock with an error of half a round trip.
            expired = witness.time()[0] + 1
            await until(lambda: witness.time()[0] > expired)
            async with peers(redis_server.url, stream_name, worker, use_consumer_group=True):
                await until(lambda: bool(results))
        assert results == ["worker"]
        assert worker._calls == []  # the one that was out of time was not started


@pytest.mark.parametrize("group", [False, True], ids=["broadcast", "group"])
async def test_orderly_end_leaves_nothing(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, group: bool
) -> None:
    """Inboxes and consumers go with their peers; pending entries there are none."""
    async with peers(
        redis_server.url, stream_name, Worker(), Worker(), None, use_consumer_group=group
    ) as channels:
        for _ in range(20):
            await channels[2].get_api().who()
        assert len(list(witness.scan_iter(f"{{{stream_name}}}:inbox:*"))) == 3
        if group:
            await until(lambda: len(witness.xinfo_consumers(stream_name, "kkrpc-group")) == 2)
    assert not list(witness.scan_iter(f"{{{stream_name}}}:inbox:*"))
    if group:
        assert not witness.xinfo_consumers(stream_name, "kkrpc-group")
        assert witness.xpending(stream_name, "kkrpc-group")["pending"] == 0
    names = [client["name"] for client in witness.client_list()]
    assert not [name for name in names if stream_name in name]


async def test_cancelled_end_leaves_nothing(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """The same when the body is cancelled from outside."""
    with anyio.CancelScope() as scope:
        async with peers(
            redis_server.url, stream_name, Worker(), None, use_consumer_group=True
        ) as (_, client):
            await client.get_api().who()
            scope.cancel()
            await anyio.sleep_forever()
    assert not list(witness.scan_iter(f"{{{stream_name}}}:inbox:*"))
    assert not witness.xinfo_consumers(stream_name, "kkrpc-group")


@pytest.mark.parametrize("version", [(6, 2), (5, 0)])
async def test_inbox_expires_and_is_trimmed(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    version: tuple[int, int],
) -> None:
    """An inbox has a time to live, and what was read of it is deleted, with old commands too."""

    async def look(*args: Any) -> tuple[tuple[int, int], str]:
        return version, "noeviction"

    monkeypatch.setattr("anyio_kkrpc.redis._stream._server.look_at_server", look)
    async with peers(redis_server.url, stream_name, Worker(), None, inbox_ttl=30) as (_, client):
        for _ in range(400):
            await client.get_api().who()
        sizes = {
            key: (witness.xlen(key), witness.pttl(key))
            for key in witness.scan_iter(f"{{{stream_name}}}:inbox:*")
        }
        assert len(sizes) == 2
        for size, ttl in sizes.values():
            assert size < 200
            assert 0 < ttl <= 30_000


async def test_reply_to_a_vanished_client_leaves_nothing(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A client that is gone gets no inbox back."""
    worker = Worker()
    async with peers(redis_server.url, stream_name, worker) as (server,):
        async with peers(redis_server.url, stream_name, None) as (client,):
            async with anyio.create_task_group() as group:
                group.start_soon(client.get_api().gated, 1)
                with anyio.fail_after(BOUND):
                    await worker._started.wait()
                for key in witness.scan_iter(f"{{{stream_name}}}:inbox:*"):
                    if key.decode().endswith(client._transport.session_id):  # type: ignore[attr-defined]
                        witness.delete(key)
                worker._gate.set()
                transport = server._transport
                assert isinstance(transport, RedisStreamsTransport)
                await until(lambda: transport.statistics().undeliverable == 1)
                group.cancel_scope.cancel()
        assert len(list(witness.scan_iter(f"{{{stream_name}}}:inbox:*"))) == 1


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_entries(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, codec: str
) -> None:
    """Entries have the fields of the native dialect, and answers are encoded as requests are."""
    async with (
        peers(redis_server.url, stream_name, Worker(), codec="json"),
        peers(redis_server.url, stream_name, None, codec=codec) as (client,),
    ):
        transport = client._transport
        assert isinstance(transport, RedisStreamsTransport)
        await client.get_api().who()
        ((_, fields),) = witness.xrange(stream_name)
        assert list(fields) == [b"from", codec.encode(), b"v"]
        assert fields[b"from"].decode() == transport.session_id
        (entry,) = witness.xrange(f"{{{stream_name}}}:inbox:{transport.session_id}")
        assert list(entry[1]) == [b"from", codec.encode(), b"n", b"v"]
        if codec == "json":
            record = json.loads(fields[b"json"])
            assert record.pop("id")
            assert 0 < record.pop("d") <= 250_000
            assert record == {"t": "q", "op": "call", "p": ["who"], "a": []}


async def test_invalid_entries_are_skipped(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever somebody writes to the streams is counted, logged, acknowledged and skipped."""
    inbox = f"{{{stream_name}}}:inbox:the-worker"
    rubbish: list[dict[str, bytes]] = [
        {"x": b"1"},
        {"from": b"me", "json": b"{"},
        {"from": b"me", "json": b'{"t":"q","id":1}'},
        {"from": b"me", "json": b"[" * 100_000},
        {"from": b"me", "json": b'{"t":"zap"}'},
        {"from": b"me", "cbor": b"\x9b\x7f\xff\xff\xff\xff\xff\xff\xff"},
        {"from": b"", "json": b'{"t":"q","id":"1","op":"call","p":["note"]}'},
        {"from": b"\xff", "json": b'{"t":"q","id":"1","op":"call","p":["note"]}'},
        {"from": b"f" * 300, "json": b'{"t":"q","id":"1","op":"call","p":["note"]}'},
        {"from": b"me", "json": b'{"t":"r","id":"1","v":1}'},
        {"data": b"classic", "sessionId": b"x"},
    ]
    for grouped in (False, True):
        worker = Worker()
        async with (
            peers(
                redis_server.url,
                stream_name,
                worker,
                use_consumer_group=grouped,
                session_id="the-worker",
            ) as (server,),
            peers(redis_server.url, stream_name, None) as (client,),
        ):
            transport = server._transport
            assert isinstance(transport, RedisStreamsTransport)
            for fields in rubbish:
                witness.xadd(stream_name, fields)  # type: ignore[arg-type]
                if fields.get("json") != b'{"t":"r","id":"1","v":1}':
                    witness.xadd(inbox, fields)  # type: ignore[arg-type]
            assert await client.get_api().who() == "worker"
            await until(lambda: transport.statistics().invalid == 2 * len(rubbish) - 1)
            if grouped:
                await until(lambda: witness.xpending(stream_name, "kkrpc-group")["pending"] == 0)
        assert worker._calls == []
        witness.delete(stream_name)
    assert "skipped entry" in caplog.text
    assert max(len(record.getMessage()) for record in caplog.records) < 1000


async def test_oversized_messages(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A message above the limit fails at its sender; a result above it, at its caller."""

    class Big:
        def big(self, n: int) -> str:
            return "x" * n

    async with peers(redis_server.url, stream_name, Big(), None, max_message_size=10_000) as (
        _,
        client,
    ):
        with pytest.raises(OverloadedError, match=r"exceeds max_message_size \(10000 bytes\)"):
            await client.get_api().big("x" * 10_000)
        assert witness.xlen(stream_name) == 0
        assert len(await client.get_api().big(9_000)) == 9_000
        from anyio_kkrpc import RemoteError

        with pytest.raises((OverloadedError, RemoteError), match="exceeds max_message_size"):
            await client.get_api().big(10_000)


@pytest.mark.parametrize("group", [False, True], ids=["broadcast", "group"])
async def test_max_len(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, group: bool
) -> None:
    """The stream is kept at about its length."""
    async with peers(
        redis_server.url, stream_name, Worker(), None, max_len=50, use_consumer_group=group
    ) as (_, client):
        for _ in range(300):
            await client.get_api().who()
        await until(lambda: witness.xlen(stream_name) <= 55)
        assert witness.xlen(stream_name) >= 40


async def test_max_len_keeps_what_a_group_has_not_done(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Requests that wait, or run, are never trimmed."""
    witness.xgroup_create(stream_name, "kkrpc-group", "0", mkstream=True)
    async with AsyncExitStack() as stack:
        (client,) = await stack.enter_async_context(
            peers(redis_server.url, stream_name, None, max_len=10)
        )
        api = with_call_options(client.get_api(), reply=False)
        for number in range(100):
            await api.note(number)
        assert witness.xlen(stream_name) == 100
        worker = Worker()
        await stack.enter_async_context(
            peers(redis_server.url, stream_name, worker, use_consumer_group=True, max_len=10)
        )
        await until(lambda: len(worker._calls) == 100)
        assert sorted(worker._calls) == list(range(100))
        for number in range(10):
            await client.get_api().note(number)
        await until(lambda: witness.xlen(stream_name) <= 11)


async def test_admin_calls(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Info, all entries and trimming tell and do what the server has."""
    async with RedisStreamsTransport(redis_server.url, stream=stream_name) as transport:
        assert await transport.get_all_entries() == []
        info = await transport.get_stream_info()
        assert (info.length, info.groups, info.last_entry) == (0, 0, None)
        assert info.last_generated_id == "0-0"
        ids = [
            witness.xadd(stream_name, {"n": str(n), "raw": b"\xff"}).decode() for n in range(1234)
        ]
        witness.xgroup_create(stream_name, "g")
        entries = await transport.get_all_entries()
        assert [entry.id for entry in entries] == ids
        assert entries[7].fields == {"n": b"7", "raw": b"\xff"}
        info = await transport.get_stream_info()
        assert (info.length, info.groups) == (1234, 1)
        assert info.last_entry == entries[-1]
        assert await transport.trim_stream(100) == 1134
        assert [entry.id for entry in await transport.get_all_entries()] == ids[-100:]
        assert await transport.trim_stream(100) == 0
        assert await transport.trim_stream(0) == 100
        info = await transport.get_stream_info()
        assert (info.length, info.last_entry, info.last_generated_id) == (0, None, ids[-1])
        with pytest.raises(ValueError, match="max_len"):
            await transport.trim_stream(-1)
        with pytest.raises(TypeError, match="max_len"):
            await transport.trim_stream("1")  # type: ignore[arg-type]


async def test_destroy(redis_server: RedisServer, stream_name: str) -> None:
    """After `destroy` everything fails with the adapter's own words, and waiting calls at once."""
    message = "Redis Streams adapter has been destroyed"
    async with RedisStreamsTransport(redis_server.url, stream=stream_name) as transport:
        async with RPCChannel(transport, timeout=None) as channel:
            async with anyio.create_task_group() as group:

                async def wait() -> None:
                    with pytest.raises(TransportClosedError, match=message):
                        await channel.get_api().who()

                group.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                await transport.destroy()
            await transport.destroy()
            await channel.serve_forever()
            for call in (
                lambda: channel.get_api().who(),
                transport.get_stream_info,
                transport.get_all_entries,
                lambda: transport.trim_stream(1),
                transport.signal_destroy,
                transport.receive,
                lambda: transport.send(Envelope(Request("1", "call", ["x"]))),
            ):
                with anyio.fail_after(BOUND), pytest.raises(TransportClosedError, match=message):
                    await call()


async def test_client_makes_no_group(redis_server: RedisServer, stream_name: str) -> None:
    """A group in which nobody serves would keep all requests from being trimmed."""
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": True, "max_len": 10}
    async with (
        RedisStreamsTransport(redis_server.url, consumer_group="workers", **options) as served,
        RedisStreamsTransport(redis_server.url, max_backlog=5, **options) as used,
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):
        with pytest.raises(RPCTimeoutError):
            await with_call_options(channel.get_api(), timeout=0.05).who()
        assert (await used.get_stream_info()).groups == 0
        async with RPCChannel(served, expose=Worker()):
            for _ in range(100):
                await channel.get_api().who()
            info = await used.get_stream_info()
            assert info.groups == 1
            assert info.length < 50


async def test_who_serves_nothing(
    redis_server: RedisServer, stream_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is asked of it is thrown away, counted and logged."""
    caplog.set_level(logging.INFO, "anyio_kkrpc")
    async with (
        RedisStreamsTransport(redis_server.url, stream=stream_name) as one,
        RedisStreamsTransport(redis_server.url, stream=stream_name) as other,
        RPCChannel(one),
        RPCChannel(other, timeout=CALL_BOUND) as channel,
    ):
        api = with_call_options(channel.get_api(to=one.session_id), reply=False)
        for _ in range(3):
            await api.who()
        await until(lambda: one.statistics().unserved == 3)
        assert other.statistics().unserved == 0
    assert "1 requests were thrown away: nobody serves them here" in caplog.text


@pytest.mark.parametrize("group", [False, True], ids=["broadcast", "group"])
async def test_signal_destroy(redis_server: RedisServer, stream_name: str, group: bool) -> None:
    """The signal ends others' channels, except of those who opted out, and not the sender's own."""
    async with AsyncExitStack() as stack:
        options = {"stream": stream_name, "use_consumer_group": group}
        ended = [
            await stack.enter_async_context(RedisStreamsTransport(redis_server.url, **options))  # type: ignore[arg-type]
            for _ in range(2)
        ]
        stubborn = await stack.enter_async_context(
            RedisStreamsTransport(redis_server.url, honor_destroy_signal=False, **options)  # type: ignore[arg-type]
        )
        sender = await stack.enter_async_context(
            RedisStreamsTransport(redis_server.url, **options)  # type: ignore[arg-type]
        )
        server = await stack.enter_async_context(RPCChannel(ended[0], expose=Worker()))
        caller = await stack.enter_async_context(RPCChannel(ended[1], timeout=None))
        await stack.enter_async_context(RPCChannel(stubborn, expose=Worker("stubborn")))
        admin = await stack.enter_async_context(RPCChannel(sender, timeout=CALL_BOUND))
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                with pytest.raises(TransportClosedError, match="destroy"):
                    await caller.get_api().gated(1)

            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            await sender.signal_destroy()
            with anyio.fail_after(BOUND):
                await server.serve_forever()
                await caller.serve_forever()
        assert await admin.get_api().who() == "stubborn"


async def test_old_destroy_signal_is_ignored(redis_server: RedisServer, stream_name: str) -> None:
    """A signal written before a peer connected isn't for it."""
    async with RedisStreamsTransport(redis_server.url, stream=stream_name) as sender:
        await sender.signal_destroy()
    async with peers(redis_server.url, stream_name, Worker(), None) as (_, client):
        assert await client.get_api().who() == "worker"


async def test_memory_protection(
    redis_server: RedisServer, stream_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A full queue drops the oldest requests, says so once, counts them, and tells their callers."""
    worker = Worker()
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(
            RedisStreamsTransport(redis_server.url, stream=stream_name, max_queue_size=5)
        )
        await stack.enter_async_context(RPCChannel(transport, expose=worker, max_concurrency=1))
        (client,) = await stack.enter_async_context(peers(redis_server.url, stream_name, None))
        results: dict[int, Any] = {}

        async def call(n: int) -> None:
            try:
                results[n] = await client.get_api().gated(n)
            except OverloadedError as exc:
                results[n] = exc

        with caplog.at_level(logging.WARNING):
            async with anyio.create_task_group() as group:
                group.start_soon(call, 0)
                with anyio.fail_after(BOUND):
                    await worker._started.wait()
                for n in range(1, 21):
                    group.start_soon(call, n)
                    await until(lambda n=n: transport.statistics().received == n + 1)  # type: ignore[misc]
                await until(lambda: len(results) == 15)
                statistics = transport.statistics().queue
                assert (statistics.current_items, statistics.dropped) == (5, 15)
                worker._gate.set()
        assert [n for n in results if isinstance(results[n], OverloadedError)] == list(range(1, 16))
        assert worker._calls == [0, 16, 17, 18, 19, 20]
        warnings = [record.getMessage() for record in caplog.records]
        assert warnings.count("Message queue full (5 messages), dropping oldest message") == 1


async def test_broadcast_that_blocks_loses_nothing(
    redis_server: RedisServer, stream_name: str
) -> None:
    """With ``block`` a full queue leaves requests in Redis."""
    worker = Worker()
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(
            RedisStreamsTransport(
                redis_server.url, stream=stream_name, max_queue_size=200, overflow="block"
            )
        )
        await stack.enter_async_context(RPCChannel(transport, expose=worker, max_concurrency=1))
        (client,) = await stack.enter_async_context(peers(redis_server.url, stream_name, None))
        api = with_call_options(client.get_api(), reply=False)
        await api.gated(0)
        for n in range(1, 1000):
            await api.note(n)
        worker._gate.set()
        await until(lambda: len(worker._calls) == 1000)
        assert worker._calls == list(range(1000))


async def test_no_server() -> None:
    """Nobody listens: an error within the time, with the address, without the password."""
    url = "redis://user:secret@127.0.0.1:1/0"
    with anyio.fail_after(BOUND), pytest.raises(TransportConnectionError) as caught:
        async with RedisStreamsTransport(url, connect_timeout=20):
            pytest.fail("there is no server")
    text = str(caught.value)
    assert "Redis Streams connection error" in text
    assert "127.0.0.1:1" in text
    assert "secret" not in text
    assert "Check" in text


async def test_server_that_stays_away(own_server: RedisServer, stream_name: str) -> None:
    """After `reconnect_timeout` all that waits fails with a connection error and its cause."""
    async with peers(
        own_server.url, stream_name, Worker(), None, reconnect_timeout=0.2, connect_timeout=20.0
    ) as (server, client):
        async with anyio.create_task_group() as group:

            async def wait(channel: RPCChannel) -> None:
                with pytest.raises(TransportConnectionError, match="connection error"):
                    await channel.get_api().nobody_has_this()

            async def serve() -> None:
                with pytest.raises(TransportConnectionError):
                    await server.serve_forever()

            group.start_soon(wait, client)
            group.start_soon(serve)
            await anyio.wait_all_tasks_blocked()
            own_server.kill()
        with pytest.raises(TransportConnectionError) as caught:
            await client.get_api().who()
        assert caught.value.__cause__ is not None


async def test_wrong_kind_of_key(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A stream's name that belongs to a string is an error that says so, not a hang."""
    witness.set(stream_name, "not a stream")
    with (
        anyio.fail_after(BOUND),
        pytest.raises(Exception, match="WRONGTYPE|Redis refused|wrong kind"),
    ):
        async with peers(redis_server.url, stream_name, Worker(), None) as (_, client):
            await client.get_api().who()


async def test_password_and_database(server_executable: str, stream_name: str) -> None:
    """User, password and database of the URL are used."""
    with RedisServer(server_executable, password="pass word/@:") as server:
        async with peers(server.url.removesuffix("/0") + "/3", stream_name, Worker(), None) as (
            _,
            client,
        ):
            assert await client.get_api().who() == "worker"
        witness = redis.Redis.from_url(server.url.removesuffix("/0") + "/3")
        assert witness.exists(stream_name)
        witness.close()
        wrong = f"redis://:wrong@127.0.0.1:{server.port}"
        with pytest.raises(TransportConnectionError, match="password"):
            async with RedisStreamsTransport(wrong):
                pytest.fail("the password is wrong")


async def test_eviction_policy_is_warned_about(
    server_executable: str, stream_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that may evict streams is warned about."""
    with RedisServer(server_executable, args=["--maxmemory-policy", "volatile-lru"]) as server:
        async with RedisStreamsTransport(server.url, stream=stream_name):
            pass
    assert "maxmemory-policy of Redis is volatile-lru" in caplog.text


async def test_used_wrongly(redis_server: RedisServer, stream_name: str) -> None:
    """Not entered, entered twice, and a channel that is not entered."""
    transport = RedisStreamsTransport(redis_server.url, stream=stream_name)
    with pytest.raises(RuntimeError, match="async with"):
        await transport.get_stream_info()
    with pytest.raises(RuntimeError, match="async with"):
        await RPCChannel(transport).get_api().who()
    async with transport:
        with pytest.raises(RuntimeError, match="entered"):
            async with transport:
                pytest.fail("entered twice")
