"""Inboxes that are gone while something is on its way: after outages, and deleted by somebody."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import (
    DeliveryError,
    RedisStreamsTransport,
    RPCChannel,
    RPCError,
    RPCTimeoutError,
    with_call_options,
)
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND
from tests.fake_server import fake_server

from .proxy import Proxy, proxy

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]

MODES = pytest.mark.parametrize("grouped", [False, True], ids=["broadcast", "group"])
OPTIONS: dict[str, Any] = {
    "block_timeout": 0.2,
    "connect_timeout": 20.0,
    "health_check_interval": 0.5,
}


class Api:
    def __init__(self) -> None:
        self.ran: list[Any] = []
        self.started = anyio.Event()
        self.go_on = anyio.Event()
        self.closed = anyio.Event()

    async def work(self, key: Any) -> Any:
        self.ran.append(key)
        self.started.set()
        try:
            await self.go_on.wait()
        finally:
            self.closed.set()
        return key

    async def call_back(self, function: Callable[[int], Any]) -> str:
        self.started.set()
        await self.go_on.wait()
        for number in range(10):
            await function(number)
        return "done"

    async def items(self) -> AsyncIterator[int]:
        self.started.set()
        await self.go_on.wait()
        for number in range(20):
            yield number

    async def endless(self) -> AsyncIterator[int]:
        try:
            yield 1
            await anyio.sleep_forever()
        finally:
            self.closed.set()

    async def total(self, numbers: AsyncIterator[int]) -> int:
        self.started.set()
        try:
            await self.go_on.wait()
        finally:
            self.closed.set()
        return sum([number async for number in numbers])

    def quick(self, value: Any) -> Any:
        return value


class Link:
    """A worker and a client, one of them behind a proxy.

    :ivar remote: proxy of the worker's API
    :ivar late: the one that is connected again later than the other, after an outage
    """

    def __init__(
        self,
        stream: str,
        witness: redis.Redis,
        middle: Proxy,
        serving: RedisStreamsTransport,
        using: RedisStreamsTransport,
        channel: RPCChannel,
        api: Api,
        late: str,
    ) -> None:
        self.stream, self.witness, self.middle = stream, witness, middle
        self.serving, self.using, self.channel, self.api = serving, using, channel, api
        self.remote: Any = channel.get_api()
        self.late, self.early = (serving, using) if late == "worker" else (using, serving)

    @property
    def kept(self) -> int:
        """What is kept for the inbox of the other one."""
        return len(self.early._writer.undelivered)

    def inbox(self, peer: RedisStreamsTransport) -> str:
        return f"{{{self.stream}}}:inbox:{peer.session_id}"

    async def outage(self) -> None:
        """Both lose their connections, one of them its inbox, and the other one is back before it."""
        early, late = self.early, self.late
        reconnects = early.statistics().reconnects
        self.middle.refuse()
        await self.middle.cut()
        self.witness.delete(self.inbox(late))
        for client in self.witness.client_list():
            if client["name"].endswith(early.session_id):
                self.witness.client_kill_filter(_id=client["id"])
        await until(lambda: early.statistics().reconnects >= reconnects + 2)
        await until(lambda: early._lane.link.connection is not None)

    async def wait_started(self) -> None:
        with anyio.fail_after(BOUND):
            await self.api.started.wait()

    def is_blocked(self, peer: RedisStreamsTransport) -> bool:
        """Whether a peer's blocking read of its inbox has reached the server."""
        name = f"anyio_kkrpc:inbox:{peer.session_id}"
        clients = self.witness.client_list()
        return any(client["name"] == name and "b" in client["flags"] for client in clients)

    def pending(self) -> int:
        return int(self.witness.xpending(self.stream, "kkrpc-group")["pending"])


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


@asynccontextmanager
async def link(
    server: RedisServer,
    stream: str,
    witness: redis.Redis,
    grouped: bool,
    *,
    late: str = "client",
    **options: Any,
) -> AsyncIterator[Link]:
    api = Api()
    options = {"stream": stream, "use_consumer_group": grouped, **OPTIONS, **options}
    async with (
        proxy(server.url) as middle,
        RedisStreamsTransport(server.url if late == "client" else middle.url, **options) as serving,
        RedisStreamsTransport(middle.url if late == "client" else server.url, **options) as using,
        RPCChannel(serving, expose=api),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        yield Link(stream, witness, middle, serving, using, channel, api, late)


@MODES
async def test_reply_that_comes_before_its_caller(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, grouped: bool
) -> None:
    """The worker is connected again before the client, whose inbox is gone: the reply is kept, its
    request stays pending meanwhile, and what it does runs once.
    """
    async with link(redis_server, stream_name, witness, grouped) as peers:
        results: list[Any] = []

        async def call() -> None:
            results.append(await peers.remote.work("it"))

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await peers.wait_started()
            await peers.outage()
            peers.api.go_on.set()
            await until(lambda: peers.kept == 1)
            if grouped:
                await until(lambda: peers.pending() == 1)
            peers.middle.refuse(False)
        assert results == ["it"]
        assert peers.api.ran == ["it"]
        assert peers.serving.statistics().undeliverable == 0
        if grouped:
            await until(lambda: peers.pending() == 0)
        assert await peers.remote.quick(1) == 1


@MODES
async def test_callbacks_and_items_that_come_before_their_reader(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, grouped: bool
) -> None:
    """The same with all else that goes to an inbox: it is kept in its order."""
    async with link(redis_server, stream_name, witness, grouped) as peers:
        called: list[int] = []
        found: list[Any] = []

        async def call() -> None:
            found.append(await peers.remote.call_back(called.append))

        async def read() -> None:
            found.append([item async for item in peers.remote.items()])

        for function, wanted in ((call, "done"), (read, list(range(20)))):
            peers.api.started, peers.api.go_on = anyio.Event(), anyio.Event()
            async with anyio.create_task_group() as group:
                group.start_soon(function)
                await peers.wait_started()
                await peers.outage()
                peers.api.go_on.set()
                await until(lambda: peers.kept)
                peers.middle.refuse(False)
            assert found.pop() == wanted
        assert called == list(range(10))
        assert peers.serving.statistics().undeliverable == 0


@MODES
async def test_asked_before_the_worker_has_its_inbox(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, grouped: bool
) -> None:
    """A request for one peer waits for its inbox, too."""
    async with link(redis_server, stream_name, witness, grouped, late="worker") as peers:
        remote = peers.channel.get_api(to=peers.serving.session_id)
        assert await remote.quick(1) == 1
        await peers.outage()
        results: list[Any] = []

        async def call() -> None:
            results.append(await remote.quick(2))

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await until(lambda: peers.kept == 1)
            with pytest.raises(RPCTimeoutError):
                await with_call_options(remote, timeout=0.3).quick(3)
            peers.middle.refuse(False)
        assert results == [2]
        assert await remote.quick(4) == 4


@MODES
async def test_server_that_comes_back_without_inboxes(
    own_server: RedisServer, stream_name: str, grouped: bool
) -> None:
    """A real server is killed and comes back empty while a call runs: its result arrives, whoever is
    connected first.
    """
    with redis.Redis.from_url(own_server.url) as witness:
        async with link(own_server, stream_name, witness, grouped) as peers:
            results: list[Any] = []

            async def call() -> None:
                results.append(await peers.remote.work("it"))

            async with anyio.create_task_group() as group:
                group.start_soon(call)
                await peers.wait_started()
                peers.middle.refuse()
                own_server.kill()
                await anyio.to_thread.run_sync(own_server.start)
                await until(lambda: peers.serving._lane.link.reconnects)
                await until(lambda: peers.serving._lane.link.connection is not None)
                peers.api.go_on.set()
                await until(lambda: peers.kept == 1)
                peers.middle.refuse(False)
            assert results == ["it"]


async def test_vanished_after_an_outage(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Who doesn't come back isn't waited for longer than its inbox would have lived."""
    async with link(redis_server, stream_name, witness, True, inbox_ttl=1.0) as peers:
        await peers.outage()
        request = b'{"t":"q","id":"1","op":"call","p":["quick"],"a":[7]}'
        witness.xadd(stream_name, {"from": "vanished", "json": request})
        await until(lambda: peers.serving.statistics().undeliverable == 1)
        assert peers.kept == 0
        await until(lambda: peers.pending() == 0)
        # From then on it is not waited for at all.
        await until(lambda: anyio.current_time() > peers.serving._writer.undelivered.until)
        witness.xadd(stream_name, {"from": "vanished", "json": request.replace(b"1", b"2")})
        await until(lambda: peers.serving.statistics().undeliverable == 2)
        await until(lambda: peers.pending() == 0)


async def failing(call: Any) -> Exception:
    """Return what a call fails with, long before its time is over."""
    with anyio.fail_after(BOUND):
        try:
            await call
        except RPCError as exc:
            return exc
    raise AssertionError("it has not failed")


@MODES
async def test_deleted_while_a_call_runs(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, grouped: bool
) -> None:
    """In a group Redis knows that the request is pending, and the reply goes to the new inbox. In a
    broadcast nobody knows: the caller is told at once, and the handler cancelled.
    """
    async with link(redis_server, stream_name, witness, grouped) as peers:
        outcomes: list[Any] = []

        async def call() -> None:
            try:
                outcomes.append(await peers.remote.work("it"))
            except RPCError as exc:
                outcomes.append(exc)

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await peers.wait_started()
            witness.delete(peers.inbox(peers.using))
            if grouped:
                await until(lambda: witness.exists(peers.inbox(peers.using)))
                assert outcomes == []
                peers.api.go_on.set()
        if grouped:
            assert outcomes == ["it"]
        else:
            (error,) = outcomes
            assert isinstance(error, DeliveryError)
            assert "inbox" in str(error)
            with anyio.fail_after(BOUND):
                await peers.api.closed.wait()
        assert peers.api.ran == ["it"]
        assert await peers.remote.quick(1) == 1


async def test_deleted_with_the_reply_in_it(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """The request was acknowledged, and its reply not read: its caller is told, others go on."""
    async with link(redis_server, stream_name, witness, True) as peers:
        errors: list[Exception] = []
        results: list[Any] = []

        async def call() -> None:
            errors.append(await failing(peers.remote.work("it")))

        async def go_on() -> None:
            results.append(await peers.remote.call_back(lambda number: None))

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await peers.wait_started()
            reply, peers.api.go_on = peers.api.go_on, anyio.Event()
            group.start_soon(go_on)
            await until(lambda: peers.pending() == 2)
            # The next read doesn't reach the server before the reply is there and gone.
            peers.middle.freeze(down=False)
            await until(lambda: not peers.is_blocked(peers.using))
            reply.set()
            await until(lambda: peers.pending() == 1)
            witness.delete(peers.inbox(peers.using))
            peers.middle.thaw()
            await until(lambda: errors)
            assert results == []
            peers.api.go_on.set()
        (error,) = errors
        assert isinstance(error, DeliveryError)
        assert results == ["done"]


@MODES
async def test_calls_to_one_peer(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, grouped: bool
) -> None:
    """Nobody knows whether it was answered: it fails at once."""
    async with link(redis_server, stream_name, witness, grouped) as peers:
        errors: list[Exception] = []

        async def call() -> None:
            remote = peers.channel.get_api(to=peers.serving.session_id)
            errors.append(await failing(remote.work("it")))

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await peers.wait_started()
            witness.delete(peers.inbox(peers.using))
        (error,) = errors
        assert isinstance(error, DeliveryError)
        with anyio.fail_after(BOUND):
            await peers.api.closed.wait()


@MODES
@pytest.mark.parametrize("whose", ["reader", "source"])
async def test_streams_end(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, grouped: bool, whose: str
) -> None:
    """Items or pulls may be lost: the reader is told at once, and the source is closed."""
    async with link(redis_server, stream_name, witness, grouped) as peers:
        items = await peers.remote.endless()
        assert await anext(items) == 1
        witness.delete(peers.inbox(peers.using if whose == "reader" else peers.serving))
        error = await failing(anext(items))
        assert isinstance(error, DeliveryError)
        assert "inbox" in str(error)
        with anyio.fail_after(BOUND):
            await peers.api.closed.wait()
        with pytest.raises(StopAsyncIteration):
            await anext(items)
        assert await peers.remote.quick(1) == 1


@MODES
async def test_stream_argument_that_nobody_reads_yet(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, grouped: bool
) -> None:
    """The first pull may be lost, and nobody knows of whom: the call fails, and is cancelled."""
    async with link(redis_server, stream_name, witness, grouped) as peers:
        errors: list[Exception] = []

        async def numbers() -> AsyncIterator[int]:
            yield 1

        async def call() -> None:
            errors.append(await failing(peers.remote.total(numbers())))

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await peers.wait_started()
            witness.delete(peers.inbox(peers.using))
        (error,) = errors
        assert isinstance(error, DeliveryError)
        with anyio.fail_after(BOUND):
            await peers.api.closed.wait()
        await until(lambda: peers.channel.statistics().outgoing_streams == 0)


async def test_look_up_that_is_refused(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Who may not ask which requests were answered fails them all, with one warning."""
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": True, **OPTIONS}
    api = Api()
    async with (
        fake_server(redis_server.url) as fake,
        RedisStreamsTransport(redis_server.url, **options) as serving,
        RedisStreamsTransport(fake.url, **options) as using,
        RPCChannel(serving, expose=api),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        fake.refuse("NOPERM no", matches=lambda c: c[0] == b"EVAL" and b"entries-added" in c[1])
        for key in range(2):
            errors: list[Exception] = []
            api.started = anyio.Event()

            async def call(key: int = key, errors: list[Exception] = errors) -> None:
                errors.append(await failing(channel.get_api().work(key)))

            async with anyio.create_task_group() as group:
                group.start_soon(call)
                with anyio.fail_after(BOUND):
                    await api.started.wait()
                witness.delete(f"{{{stream_name}}}:inbox:{using.session_id}")
            (error,) = errors
            assert isinstance(error, DeliveryError)
    assert caplog.text.count("which replies were lost can't be found") == 1


async def test_emptied_while_a_call_runs(own_server: RedisServer, stream_name: str) -> None:
    """FLUSHALL: nothing says that the request was answered, and its reply arrives."""
    with redis.Redis.from_url(own_server.url) as witness:
        async with link(own_server, stream_name, witness, True) as peers:
            results: list[Any] = []

            async def call() -> None:
                results.append(await peers.remote.work("it"))

            async with anyio.create_task_group() as group:
                group.start_soon(call)
                await peers.wait_started()
                witness.flushall()
                await until(lambda: witness.exists(peers.inbox(peers.using)))
                assert await peers.remote.quick(1) == 1
                peers.api.go_on.set()
            assert results == ["it"]


async def test_told_before_housekeeping(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Where somebody waits, the inbox is looked for, however seldom the house is kept."""
    seldom: dict[str, Any] = {"health_check_interval": 300.0, "inbox_ttl": 3000.0}
    async with link(redis_server, stream_name, witness, False, **seldom) as peers:
        errors: list[Exception] = []

        async def call() -> None:
            errors.append(await failing(peers.remote.work("it")))

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await peers.wait_started()
            witness.delete(peers.inbox(peers.using))
        (error,) = errors
        assert isinstance(error, DeliveryError)
