"""Cancels of requests to a group: they reach who has the request, and leave nothing behind."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import OverloadedError, RedisStreamsTransport, RPCChannel
from anyio_kkrpc._protocol._records import Cancel, Request
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.redis._stream._holders import MOST
from anyio_kkrpc.redis._stream._keys import HANDED_BACK
from anyio_kkrpc.redis._writing._cancels import Cancels
from anyio_kkrpc.redis._writing._ledger import Post
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND
from tests.faults.proxy import proxy

pytestmark = [pytest.mark.anyio, pytest.mark.server]

GROUP = "kkrpc-group"
# What a cancel is made of, at the server.
COUNTED = ("eval", "xdel", "xadd", "xsetid")


class Api:
    def __init__(self) -> None:
        self.running: set[int] = set()
        self.ran: list[int] = []

    async def work(self, n: int) -> None:
        self.ran.append(n)
        self.running.add(n)
        try:
            await anyio.sleep_forever()
        finally:
            self.running.discard(n)

    def ping(self) -> str:
        return "pong"


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


def peer(server: RedisServer, stream: str, **options: Any) -> RedisStreamsTransport:
    return RedisStreamsTransport(server.url, stream=stream, use_consumer_group=True, **options)


def test_cancelled_lately() -> None:
    """At another server, which may have lost them, cancels of the last seconds go to all peers; not
    more than so many.
    """
    times, stirred = [0.0], list[bool]()
    commands = RedisStreamsTransport(stream="s", use_consumer_group=True)._writer.commands
    cancels = Cancels(
        commands, lambda post: post.waits, lambda: stirred.append(True), lambda: times[0]
    )

    def written() -> list[Any]:
        return [
            post.cancels or (None if post.envelope is None else post.envelope.record)
            for post in cancels.posts()
        ]

    for time, name in [(0.0, "old"), (5.0, "a"), (11.0, "b")]:
        times[0] = time
        cancels.add(Envelope(Cancel(name), token=b"1-0"))
        assert written() == [(Cancel(name),)]
    stirred.clear()
    cancels.repeat()
    assert stirred
    assert written() == [Cancel("a"), Cancel("b")]
    times[0] = 20.0
    cancels.repeat()  # the next one follows soon
    assert written() == [Cancel("a"), Cancel("b")]
    times[0] = 31.0
    stirred.clear()
    cancels.repeat()
    assert not stirred
    for number in range(300):
        cancels.add(Envelope(Cancel(str(number)), token=b"1-0"))
    assert len(written()) == 300 / MOST
    cancels.repeat()
    assert written() == [Cancel(str(number)) for number in range(200, 300)]


def test_where_a_request_is() -> None:
    """A cancel waits until that is known, goes where the request is, and is dropped if nowhere."""
    stirred: list[bool] = []
    made = RedisStreamsTransport(stream="s", use_consumer_group=True)
    cancels = Cancels(
        made._writer.commands, lambda post: post.waits, lambda: stirred.append(True), lambda: 0.0
    )

    def request(name: str) -> Post:
        envelope = Envelope(Request(name, "call", ["f"]))
        envelope.token = post = Post(b"", envelope, to_stream=True)
        return post

    def cancel(name: str, token: Any) -> None:
        cancels.add(Envelope(Cancel(name), token=token))

    def written() -> list[Any]:
        return [post.cancels or post.envelope for post in cancels.posts()]

    early, known, nowhere, waits = map(request, ("early", "known", "nowhere", "waits"))
    cancel("early", early)
    assert written() == []
    cancels.place(early, b"1-0")
    cancels.place(known, b"2-0")
    cancels.leave(nowhere)
    cancel("known", known)
    cancel("nowhere", nowhere)
    assert written() == [(Cancel("early"), Cancel("known"))]
    assert [post.entry_id for post in (early, known, nowhere)] == [b"1-0", b"2-0", b""]
    cancel("known", b"2-0")
    cancel("another", None)
    assert written() == [Envelope(Cancel("another")), (Cancel("known"),)]
    waits.waits, cancels.waiting["waits"] = True, waits
    cancel("waits", waits)
    cancels.forget(waits)
    assert not cancels.waiting
    for n in range(MOST * 2 + 1):
        cancel(str(n), b"%d-0" % n)
    assert [len(posts) for posts in written()] == [MOST, MOST, 1]
    assert written() == []
    assert stirred


def waiting(witness: redis.Redis, stream: str, group: str = GROUP) -> int | None:
    """What Redis says is left for a group; what really is, before Redis 7.0."""
    (info,) = [one for one in witness.xinfo_groups(stream) if one["name"] == group.encode()]
    if "lag" in info:
        return info["lag"]
    return len(witness.xrange(stream, f"({info['last-delivered-id'].decode()}"))


def lose(witness: redis.Redis, stream: str, deliveries: int = 1) -> None:
    """Let anybody take the one request that is held, as who looks for what was lost does it."""
    (held,) = witness.xpending_range(stream, GROUP, "-", "+", 1)
    ids = [held["message_id"]]
    assert witness.xclaim(stream, GROUP, HANDED_BACK, 0, ids, idle=0, retrycount=deliveries)


@pytest.mark.parametrize("key", [None, b"sixteen bytes or more"], ids=["plain", "signed"])
@pytest.mark.parametrize("name", [None, "blue", "consumer-blue"])
async def test_reaches_who_has_it(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    name: str | None,
    key: bytes | None,
) -> None:
    """A cancel goes to the inbox of the worker that has the request, and to nobody else."""
    api = Api()
    async with (
        peer(redis_server, stream_name, consumer_name=name, signing_key=key) as serving,
        peer(redis_server, stream_name, signing_key=key) as using,
        RPCChannel(serving, expose=api, max_concurrency=20),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        async with anyio.create_task_group() as group:
            for n in range(10):
                group.start_soon(channel.get_api().work, n)
            await until(lambda: len(api.running) == 10)
            group.cancel_scope.cancel()
        await until(lambda: not api.running)
        await until(lambda: witness.xpending(stream_name, GROUP)["pending"] == 0)
        assert witness.xlen(stream_name) == 0
        assert not witness.exists(f"{{{stream_name}}}:control")
        assert await channel.get_api().ping() == "pong"


async def test_what_was_taken_by_one_who_died(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A request that was cancelled after its worker was killed isn't run by another one."""
    api = Api()
    async with (
        peer(redis_server, stream_name) as using,
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        async with anyio.create_task_group() as group:
            group.start_soon(channel.get_api().work, 1)
            await until(lambda: witness.xlen(stream_name))
            witness.xgroup_create(stream_name, GROUP, "0")
            assert witness.xreadgroup(GROUP, "consumer-gone", {stream_name: ">"})
            group.cancel_scope.cancel()
        await until(lambda: witness.xlen(stream_name) == 0)
        async with (
            peer(redis_server, stream_name, claim_idle=0.1) as serving,
            RPCChannel(serving, expose=api),
        ):
            await until(lambda: witness.xpending(stream_name, GROUP)["pending"] == 0)
            assert await channel.get_api().ping() == "pong"
    assert api.ran == []


@pytest.mark.parametrize("how", ["unanswered", "away"])
async def test_before_it_is_known_where_it_is(
    server_executable: str, stream_name: str, how: str
) -> None:
    """A request that was cancelled before Redis had answered isn't run by who comes later."""
    api = Api()
    with RedisServer(server_executable, appendonly=True) as server:
        async with (
            peer(server, stream_name) as using,
            RPCChannel(using, timeout=CALL_BOUND) as channel,
        ):
            if how == "away":
                server.kill()
            else:
                server.pause()
            async with anyio.create_task_group() as group:
                for n in range(20):
                    group.start_soon(channel.get_api().work, n)
                await anyio.wait_all_tasks_blocked()
                group.cancel_scope.cancel()
            if how == "away":
                await anyio.to_thread.run_sync(server.start)
            else:
                server.resume()
            with redis.Redis.from_url(server.url) as witness:
                async with (
                    peer(server, stream_name) as serving,
                    RPCChannel(serving, expose=api),
                ):
                    assert await channel.get_api().ping() == "pong"
                await until(lambda: witness.xlen(stream_name) == 1)
    assert api.ran == []


async def test_link_that_is_lost_before_the_answer(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A request that Redis has, though its answer was lost, is found and removed."""
    api = Api()
    async with proxy(redis_server.url) as middle:
        async with (
            RedisStreamsTransport(middle.url, stream=stream_name, use_consumer_group=True) as using,
            RPCChannel(using, timeout=CALL_BOUND) as channel,
        ):
            async with anyio.create_task_group() as group:
                middle.swallow_reply_to(lambda data: b"work" in data)
                group.start_soon(channel.get_api().work, 1)
                with anyio.fail_after(BOUND):
                    await middle.swallowed.wait()
                assert witness.xlen(stream_name) == 1
                group.cancel_scope.cancel()
            await until(lambda: witness.xlen(stream_name) == 0)
            async with peer(redis_server, stream_name) as serving, RPCChannel(serving, expose=api):
                assert await channel.get_api().ping() == "pong"
    assert api.ran == []


@pytest.mark.one_server
async def test_no_memory(own_server: RedisServer, stream_name: str) -> None:
    """While Redis has none, cancels wait for it, as all else does."""
    api = Api()
    with redis.Redis.from_url(own_server.url) as witness:
        async with (
            peer(own_server, stream_name) as serving,
            peer(own_server, stream_name) as using,
            RPCChannel(serving, expose=api, max_concurrency=20),
            RPCChannel(using, timeout=CALL_BOUND) as channel,
        ):
            async with anyio.create_task_group() as group:
                for n in range(10):
                    group.start_soon(channel.get_api().work, n)
                await until(lambda: len(api.running) == 10)
                witness.config_set("maxmemory", 1)
                group.cancel_scope.cancel()
            await until(lambda: using.statistics().refused)
            assert len(api.running) == 10
            witness.config_set("maxmemory", 0)
            await until(lambda: not api.running)
            assert await channel.get_api().ping() == "pong"


@pytest.mark.one_server
async def test_whose_a_consumer_is(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """That is told where the name doesn't, for a while, and no longer than the worker is there."""
    beginning = f"{{{stream_name}}}:worker:{GROUP}:"
    for name in (None, "blue"):
        async with (
            peer(redis_server, stream_name, consumer_name=name) as serving,
            RPCChannel(serving, expose=Api()),
        ):
            assert await call_ping(redis_server, stream_name) == "pong"
            keys = list(witness.scan_iter(f"{beginning}*"))
            assert keys == ([] if name is None else [f"{beginning}blue".encode()])
            for key in keys:
                assert witness.xrange(key)[0][1] == {b"session": serving.session_id.encode()}
                assert 0 < witness.pttl(key) <= 60_000
        assert not list(witness.scan_iter(f"{beginning}*"))


@pytest.mark.one_server
async def test_key_of_another_type(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where a worker can't say who it is it serves all the same, and is told as all are."""
    api = Api()
    witness.set(f"{{{stream_name}}}:worker:{GROUP}:blue", "no stream", ex=300)
    async with (
        peer(redis_server, stream_name, consumer_name="blue") as serving,
        peer(redis_server, stream_name) as using,
        RPCChannel(serving, expose=api),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        async with anyio.create_task_group() as group:
            group.start_soon(channel.get_api().work, 1)
            await until(lambda: api.running)
            group.cancel_scope.cancel()
        await until(lambda: not api.running)
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == 1, told
    assert "to all peers" in told[0]
    assert "WRONGTYPE" in told[0]


async def call_ping(server: RedisServer, stream: str) -> str:
    async with peer(server, stream) as using, RPCChannel(using, timeout=CALL_BOUND) as channel:
        pong: str = await channel.get_api().ping()
        return pong


async def test_what_is_left_is_counted(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """What Redis says is left for each group stays right, whatever was cancelled."""
    async with (
        peer(redis_server, stream_name) as using,
        RPCChannel(using, timeout=CALL_BOUND) as channel,
        anyio.create_task_group() as group,
    ):
        scopes: list[anyio.CancelScope] = []

        async def call(n: int) -> None:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                await channel.get_api().work(n)

        for n in range(30):
            group.start_soon(call, n)
        await until(lambda: witness.xlen(stream_name) == 30)
        for name in ("new", "half", "done"):
            witness.xgroup_create(stream_name, name, "0")
        witness.xreadgroup("half", "somebody", {stream_name: ">"}, count=15)
        witness.xreadgroup("done", "somebody", {stream_name: ">"})
        left = {"new": 30, "half": 15, "done": 0}
        for n in (0, 29, 14, 15, 16, 3):
            scopes[n].cancel()
            left["new"] -= 1
            left["half"] -= n >= 15
            await until(lambda: witness.xlen(stream_name) == left["new"])
            for name, expected in left.items():
                assert waiting(witness, stream_name, name) == expected, (name, n)
        for scope in scopes:
            scope.cancel()
        await until(lambda: witness.xlen(stream_name) == 0)
        for name in left:
            assert waiting(witness, stream_name, name) == 0
        witness.xadd(stream_name, {"from": "x"})
        assert [waiting(witness, stream_name, name) for name in left] == [1, 1, 1]


@pytest.mark.one_server
async def test_in_a_broadcast(redis_server: RedisServer, stream_name: str) -> None:
    """All who run it are told."""
    apis = [Api(), Api()]
    async with contextlib.AsyncExitStack() as stack:
        for api in apis:
            serving = await stack.enter_async_context(
                RedisStreamsTransport(redis_server.url, stream=stream_name)
            )
            await stack.enter_async_context(RPCChannel(serving, expose=api))
        using = await stack.enter_async_context(
            RedisStreamsTransport(redis_server.url, stream=stream_name)
        )
        channel = await stack.enter_async_context(RPCChannel(using, timeout=CALL_BOUND))
        async with anyio.create_task_group() as group:
            for n in range(10):
                group.start_soon(channel.get_api().work, n)
            await until(lambda: [len(api.running) for api in apis] == [10, 10])
            group.cancel_scope.cancel()
        await until(lambda: not any(api.running for api in apis))


@pytest.mark.one_server
async def test_addressed(redis_server: RedisServer, stream_name: str, witness: redis.Redis) -> None:
    """Who was asked alone is told alone, whatever its consumer's name."""
    api, other = Api(), Api()
    async with (
        peer(redis_server, stream_name, session_id="blue", consumer_name="x") as serving,
        peer(redis_server, stream_name) as standing_by,
        peer(redis_server, stream_name) as using,
        RPCChannel(serving, expose=api),
        RPCChannel(standing_by, expose=other),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        async with anyio.create_task_group() as group:
            for n in range(10):
                group.start_soon(channel.get_api(to="blue").work, n)
            await until(lambda: len(api.running) == 10)
            group.cancel_scope.cancel()
        await until(lambda: not api.running)
        assert not other.ran
        assert not witness.exists(f"{{{stream_name}}}:control")


async def test_taken_over_meanwhile(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A worker that was paused, so that another one runs the request too, is told as well."""
    apis = [Api(), Api()]
    async with (
        peer(redis_server, stream_name, claim_idle=1000) as paused,
        peer(redis_server, stream_name, claim_idle=1000) as second,
        peer(redis_server, stream_name) as using,
        RPCChannel(using, timeout=CALL_BOUND) as channel,
        RPCChannel(paused, expose=apis[0], max_concurrency=1),  # no room to take it back
    ):
        async with anyio.create_task_group() as group:
            group.start_soon(channel.get_api().work, 1)
            await until(lambda: apis[0].running)
            lose(witness, stream_name)
            async with RPCChannel(second, expose=apis[1]):
                await until(lambda: apis[1].running)
                group.cancel_scope.cancel()
                await until(lambda: not any(api.running for api in apis))
                await until(lambda: witness.xpending(stream_name, GROUP)["pending"] == 0)
        assert [api.ran for api in apis] == [[1], [1]]


@pytest.mark.parametrize("deliveries", [0, 1])
async def test_of_nobody(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, deliveries: int
) -> None:
    """What was handed back is nobody's; what was lost may still be run by who had it."""
    api = Api()
    async with (
        peer(redis_server, stream_name, session_id="blue", claim_idle=1000) as serving,
        peer(redis_server, stream_name) as using,
        RPCChannel(serving, expose=api),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        assert await channel.get_api().ping() == "pong"
        async with anyio.create_task_group() as group:
            group.start_soon(channel.get_api().work, 1)
            await until(lambda: api.running)
            lose(witness, stream_name, deliveries)
            group.cancel_scope.cancel()
        await until(lambda: witness.xpending(stream_name, GROUP)["pending"] == 0)
        names = {consumer["name"] for consumer in witness.xinfo_consumers(stream_name, GROUP)}
        assert names == {b"consumer-blue"}
        if deliveries:
            await until(lambda: not api.running)
        else:
            assert not witness.exists(f"{{{stream_name}}}:control")


@pytest.mark.one_server
@pytest.mark.parametrize("what", ["stream", "inbox"])
async def test_what_tells_who_has_it_is_gone(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, what: str
) -> None:
    """All are told where nothing leads to the worker."""
    api = Api()
    keys = {"stream": stream_name, "inbox": f"{{{stream_name}}}:inbox:blue"}
    async with (
        peer(redis_server, stream_name, session_id="blue") as serving,
        peer(redis_server, stream_name) as using,
        RPCChannel(serving, expose=api),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        async with anyio.create_task_group() as group:
            group.start_soon(channel.get_api().work, 1)
            await until(lambda: api.running)
            witness.delete(keys[what])
            group.cancel_scope.cancel()
        await until(lambda: not api.running)


@pytest.mark.one_server
async def test_users_without_the_rights(
    own_server: RedisServer, stream_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Who may not ask who has a request, and who may not say whose it is: all are told."""
    base = f"{{{stream_name}}}"
    rules = {
        "asks": f"~{stream_name} ~{base}:* +@all -xpending",
        "serves": f"~{stream_name} ~{base}:inbox:* ~{base}:control ~{base}:claimer:* ~{base}:dead +@all",
    }
    with redis.Redis.from_url(own_server.url) as witness:
        for user, rule in rules.items():
            witness.execute_command(f"ACL SETUSER {user} on >secret resetkeys {rule}")
        for name in ("serves", "default"):
            caplog.clear()
            await _cancel_some(own_server, stream_name, "asks" if name == "default" else None, name)
            told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
            assert len(told) == 1, told
            assert "to all peers" in told[0]
            assert witness.delete(f"{base}:control")


async def _cancel_some(server: RedisServer, stream: str, caller: str | None, worker: str) -> None:
    def options(user: str | None) -> dict[str, Any]:
        login = "" if user in (None, "default") else f"{user}:secret@"
        url = f"redis://{login}127.0.0.1:{server.port}"
        return {"url": url, "stream": stream, "use_consumer_group": True}

    api = Api()
    async with (
        RedisStreamsTransport(**options(worker), consumer_name="blue") as serving,
        RedisStreamsTransport(**options(caller)) as using,
        RPCChannel(serving, expose=api, max_concurrency=20),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        for _ in range(2):
            async with anyio.create_task_group() as group:
                for n in range(3):
                    group.start_soon(channel.get_api().work, n)
                await until(lambda: len(api.running) == 3)
                group.cancel_scope.cancel()
            await until(lambda: not api.running)


async def test_backlog(redis_server: RedisServer, stream_name: str, witness: redis.Redis) -> None:
    """What was cancelled isn't counted as waiting for the group."""
    async with (
        peer(redis_server, stream_name, max_backlog=10) as using,
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        for _ in range(3):
            async with anyio.create_task_group() as group:
                for n in range(10):
                    group.start_soon(channel.get_api().work, n)
                await until(lambda: witness.xlen(stream_name) == 10)
                with pytest.raises(OverloadedError):
                    await channel.get_api().work(11)
                group.cancel_scope.cancel()
            await until(lambda: witness.xlen(stream_name) == 0)
            witness.xgroup_destroy(stream_name, GROUP)
            witness.xgroup_create(stream_name, GROUP, "$")


@pytest.mark.one_server
async def test_cost(own_server: RedisServer, stream_name: str) -> None:
    """A cancel costs a fraction of a script and one entry, however many peers are idle.

    They read nothing.
    """
    count, found = 200, []
    with redis.Redis.from_url(own_server.url) as witness:
        for idle in (0, 20):
            api = Api()
            async with contextlib.AsyncExitStack() as stack:
                waiting = []
                for _ in range(idle):
                    one = await stack.enter_async_context(peer(own_server, stream_name))
                    waiting.append(one)
                    await stack.enter_async_context(RPCChannel(one))
                serving = await stack.enter_async_context(peer(own_server, stream_name))
                using = await stack.enter_async_context(peer(own_server, stream_name))
                await stack.enter_async_context(
                    RPCChannel(serving, expose=api, max_concurrency=count)
                )
                channel = await stack.enter_async_context(RPCChannel(using, timeout=CALL_BOUND))
                async with anyio.create_task_group() as group:
                    for n in range(count):
                        group.start_soon(channel.get_api().work, n)
                    await until(lambda: len(api.running) == count)
                    witness.config_resetstat()
                    group.cancel_scope.cancel()
                await until(lambda: not api.running)
                await until(lambda: witness.xpending(stream_name, GROUP)["pending"] == 0)
                stats = witness.info("commandstats")
                found.append(
                    [stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in COUNTED]
                )
                assert [one.statistics().received for one in waiting] == [0] * idle
                assert not witness.exists(f"{{{stream_name}}}:control")
    for eval_, xdel, xadd, xsetid in found:
        assert (xdel, xadd, xsetid) == (count, count, 0)
        assert eval_ <= count // 10
