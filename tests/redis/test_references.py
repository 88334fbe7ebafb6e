"""Objects by reference over Redis: a session is served by the worker that has it."""

from __future__ import annotations

import gc
from typing import Any

import anyio
import pytest

from anyio_kkrpc import DeliveryError, RedisStreamsTransport, RPCChannel, by_reference
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND
from tests.pairs import LOOK, none_left

pytestmark = [pytest.mark.anyio, pytest.mark.server]


@by_reference
class Session:
    def __init__(self, name: str, worker: str) -> None:
        self.name, self.worker = name, worker
        self.asked = 0

    async def ask(self, question: str) -> list[Any]:
        self.asked += 1
        return [self.name, self.worker, self.asked, question]


class Api:
    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.kept: Any = None

    def open_session(self, name: str) -> Session:
        return Session(name, self.worker)

    def is_of(self, session: Any) -> str:
        return self.worker if isinstance(session, Session) else "somebody else"

    async def use(self, thing: Any) -> Any:
        return await thing.ask("of the caller")

    async def keep(self, thing: Any) -> str:
        self.kept = thing
        return self.worker


@pytest.mark.parametrize("group", [True, False], ids=["group", "broadcast"])
async def test_a_session(redis_server: RedisServer, stream_name: str, group: bool) -> None:
    """All its calls reach the worker that opened it, and so do calls that it is passed back in."""
    options: Any = {"stream": stream_name, "use_consumer_group": group}
    apis = Api("one"), Api("two")
    async with (
        RedisStreamsTransport(redis_server.url, **options) as one,
        RedisStreamsTransport(redis_server.url, **options) as two,
        RedisStreamsTransport(redis_server.url, **options) as used,
        RPCChannel(one, expose=apis[0]) as first,
        RPCChannel(two, expose=apis[1]) as second,
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):
        api, mine = channel.get_api(), Session("mine", "client")
        async with api.open_session("ada") as session, api.open_session("bob") as other:
            worker = await session.worker
            for number in range(1, 6):
                assert await session.ask("who?") == ["ada", worker, number, "who?"]
                assert await api.is_of(session) == worker
            assert (await other.ask("?"))[0] == "bob"
        del session, other
        assert (await api.use(mine))[:2] == ["mine", "client"]
        kept = await api.keep(mine)
        if group:
            keeper = apis[kept == "two"].kept
            assert (await keeper.ask("kept"))[0] == "mine"
            del keeper
        for one_api in apis:
            one_api.kept = None
        await none_left(first, second, channel)


async def test_each_peer_has_its_own(redis_server: RedisServer, stream_name: str) -> None:
    """What a question to all peers passes, each of them can use, and keep if it answers."""
    options: Any = {"stream": stream_name}
    apis = Api("one"), Api("two")
    async with (
        RedisStreamsTransport(redis_server.url, **options) as one,
        RedisStreamsTransport(redis_server.url, **options) as two,
        RedisStreamsTransport(redis_server.url, **options) as used,
        RPCChannel(one, expose=apis[0]) as first,
        RPCChannel(two, expose=apis[1]) as second,
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):
        api, mine = channel.get_api(), Session("mine", "client")
        for question in (api.use(mine), api.keep(mine)):
            replies = channel.broadcast(question, timeout=BOUND, limit=2)
            assert len([reply.result() async for reply in replies]) == 2
        assert channel.statistics().references_given == 2
        assert [(await one_api.kept.ask("kept"))[0] for one_api in apis] == ["mine", "mine"]
        with pytest.raises(TypeError, match="the peer that has the object only"):
            async for _ in first.broadcast(first.get_api().use(apis[0].kept), timeout=BOUND):
                pass  # it goes to others, too
        apis[0].kept = None
        with anyio.fail_after(BOUND):
            while channel.statistics().references_given == 2:
                gc.collect()
                await anyio.sleep(LOOK)
        assert (await apis[1].kept.ask("still"))[0] == "mine"
        with pytest.raises(TypeError, match="another"):
            await api.use([apis[1].kept])
        apis[1].kept = None
        await none_left(first, second, channel)


async def test_as_kkrpc_has_them(
    redis_server: RedisServer, stream_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a peer that speaks as kkrpc 2 and a native one, over the stream that they share."""
    monkeypatch.setattr("anyio_kkrpc.typescript._releases.DELAY", 1e6)
    options: Any = {"stream": stream_name}
    async with (
        RedisStreamsTransport(redis_server.url, **options) as served,
        RedisStreamsTransport(
            redis_server.url, dialect="kkrpc-2", remote_peer_id=served.session_id, **options
        ) as used,
        RPCChannel(served, expose=Api("one"), timeout=CALL_BOUND) as serving,
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):
        api, mine = channel.get_api(), Session("mine", "client")
        async with api.open_session("ada") as session:
            assert await session.ask("who?") == ["ada", "one", 1, "who?"]
            assert await session.worker == "one"
            assert await api.is_of(session) == "one"
        with anyio.fail_after(BOUND):
            while serving.statistics().references_given:
                await anyio.sleep(0.01)
        monkeypatch.setattr("anyio_kkrpc.typescript._releases.DELAY", 0.2)
        assert (await api.use(mine))[:2] == ["mine", "client"]
        with pytest.raises(DeliveryError, match="released"):
            await session.ask("again")
        del session
        await none_left(serving, channel)


async def test_who_leaves(redis_server: RedisServer, stream_name: str) -> None:
    """Sessions of a worker that leaves fail; what a channel that ends has held is released."""
    options: Any = {"stream": stream_name, "use_consumer_group": True}
    async with (
        RedisStreamsTransport(redis_server.url, **options) as served,
        RPCChannel(served, expose=Api("one")) as serving,
    ):
        async with RedisStreamsTransport(redis_server.url, **options) as used:
            async with RPCChannel(used, timeout=CALL_BOUND) as channel:
                session = await channel.get_api().open_session("ada")
                assert (await session.ask("?"))[0] == "ada"
                assert serving.statistics().references_given == 1
            await none_left(serving)
    async with RedisStreamsTransport(redis_server.url, **options) as used:
        async with RPCChannel(used, timeout=CALL_BOUND) as channel:
            async with RedisStreamsTransport(redis_server.url, **options) as served:
                async with RPCChannel(served, expose=Api("one")):
                    session = await channel.get_api().open_session("ada")
            with pytest.raises(DeliveryError):
                await session.ask("still there?")
            await none_left(channel)
