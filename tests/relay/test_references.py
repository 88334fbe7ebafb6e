"""Objects by reference through a relay, which stands between who uses one and who has it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest

from anyio_kkrpc import (
    DeliveryError,
    MemoryTransport,
    MethodNotFoundError,
    RedisStreamsTransport,
    RemoteError,
    RemoteObject,
    RPCChannel,
    RPCTimeoutError,
    RPCValidationError,
    by_reference,
    expose,
    release,
    set_member,
)
from anyio_kkrpc._references import _given
from anyio_kkrpc.abc import Transport
from anyio_kkrpc.relay import Relay, forward, relay
from anyio_kkrpc.testing import RedisServer
from anyio_kkrpc.typescript import UNDEFINED
from tests.bounds import BOUND, CALL_BOUND
from tests.conformance.conftest import _tcp
from tests.driver.test_references import Deep, Session, do
from tests.pairs import none_left
from tests.websocket.test_parts import transports as websockets

pytestmark = pytest.mark.anyio


class Api:
    def __init__(self) -> None:
        self.session = Session("ada")
        self.kept: Any = None

    def get(self) -> Any:
        return self.session

    def get_many(self, count: int) -> Any:
        return {"all": [by_reference(Deep()) for _ in range(count)]}

    def exposed(self) -> Any:
        return by_reference(expose(self.session, writable=["title"]))

    def is_same(self, value: Any) -> list[bool]:
        return [value is self.session, value is self.session.deep]

    def function(self) -> Any:
        return by_reference(lambda given=5: given)

    def keep(self, value: Any) -> None:
        self.kept = value

    def kept_one(self) -> Any:
        return self.kept

    async def use(self, value: Any, *args: Any) -> Any:
        return await value(*args)

    async def each(self) -> AsyncIterator[Any]:
        for _ in range(3):
            yield self.session

    async def read(self, things: AsyncIterator[Any]) -> list[Any]:
        return [await thing.ask("item") async for thing in things]


class Joined:
    """A client, a relay and a server."""

    def __init__(self, client: RPCChannel, both: Relay, server: RPCChannel, served: Api) -> None:
        self.client, self.relay, self.server, self.served = client, both, server, served
        self.api: Any = client.get_api().api

    @property
    def channels(self) -> list[RPCChannel]:
        return [self.client, self.server, *self.relay._channels]

    async def nothing_left(self) -> None:
        """Wait until no party has anything of another one."""
        self.served.kept = None
        await none_left(*self.channels)


@asynccontextmanager
async def _link(kind: str, url: str | None) -> AsyncIterator[tuple[Transport, Transport]]:
    if kind == "stdio":  # lines, as over the pipes of a process
        async with _tcp("json") as two:
            yield two
    elif kind == "websocket":
        async with websockets(codec="json") as both:
            yield both
    elif kind == "memory":
        a, b = MemoryTransport.pair(codec="json")
        async with a, b:
            yield a, b
    else:
        options: dict[str, Any] = {"stream": kind, "use_consumer_group": True}
        assert url is not None
        async with (
            RedisStreamsTransport(url, **options) as one,
            RedisStreamsTransport(url, **options) as two,
        ):
            yield one, two


@asynccontextmanager
async def joined(
    outer: str = "memory", inner: str = "memory", url: str | None = None, **options: Any
) -> AsyncIterator[Joined]:
    served = Api()
    options.setdefault("timeout", CALL_BOUND)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        outside, a = await enter(_link(outer, url))
        b, inside = await enter(_link(inner, url))
        server = await enter(RPCChannel(inside, expose={"api": served}, timeout=CALL_BOUND))
        both = await enter(relay(a, b, allow=["api.*"], **options))
        client = await enter(RPCChannel(outside, timeout=CALL_BOUND))
        yield Joined(client, both, server, served)


async def check_all(both: Joined) -> None:
    """All that can be done to an object, from either side."""
    async with both.api.get() as session:
        assert isinstance(session, RemoteObject)
        assert await session.ask("who?") == "ada: who?"
        assert await session.name == "ada"
        assert await session.deep.add(3) == 8
        assert [number async for number in await session.count(3)] == [0, 1, 2]
        with pytest.raises(RemoteError, match="of the session") as failed:
            await session.fails()
        assert failed.value.name == "ValueError"
        # Passed back it is the object again, and so is what is below it.
        assert await both.api.is_same(session) == [True, False]
        assert await both.api.is_same(session.deep) == [False, True]
        assert await both.api.get() == session
        assert [one async for one in both.api.each()] == [session] * 3
    mine = Session("mine")

    async def items() -> AsyncIterator[Any]:
        yield mine
        yield mine

    await both.api.keep({"list": [mine]})
    kept = both.served.kept["list"][0]
    assert await kept.ask("back") == "mine: back"
    assert (await both.api.kept_one())["list"][0] is mine
    assert await both.api.read(items()) == ["mine: item"] * 2
    assert await both.api.use(by_reference(lambda a, b: a + b), 2, 3) == 5
    assert await both.api.use(by_reference(lambda: mine)) is mine
    del kept, session, failed
    await both.nothing_left()


async def test_all_of_it() -> None:
    """Nothing of it is left at any of three."""
    async with joined() as both:
        await check_all(both)


@pytest.mark.parametrize("outer", ["stdio", "websocket", "outer"])
async def test_in_front_of_redis(redis_server: RedisServer, stream_name: str, outer: str) -> None:
    """From lines, from a WebSocket, and from another stream."""
    outer = f"{stream_name}-{outer}" if outer == "outer" else outer
    async with joined(outer, f"{stream_name}-inner", redis_server.url) as both:
        await check_all(both)


async def test_a_thousand() -> None:
    """Released one by one, all at once, or by nobody but the garbage collector."""
    async with joined() as both:
        things = (await both.api.get_many(1000))["all"]
        assert both.relay.statistics().b.references_held == 1000
        assert both.relay.statistics().a.references_given == 1000
        assert await things[-1].add(1) == 6
        for thing in things[:500]:
            release(thing)
        with anyio.fail_after(BOUND):
            while both.server.statistics().references_given != 500:
                await anyio.lowlevel.checkpoint()
        del thing
        things.clear()
        await both.nothing_left()


async def test_what_may_be_set_and_what_is_undefined() -> None:
    """What its owner made writable; JavaScript's undefined stays that."""
    async with joined() as both:
        session = await both.api.exposed()
        await set_member(session.title, "changed")
        assert both.served.session.title == "changed"
        with pytest.raises(RPCValidationError):
            await set_member(session.title, 5)
        with pytest.raises(MethodNotFoundError, match="name"):
            await set_member(session.name, "changed")
        function = await both.api.function()
        assert await function() == 5
        assert await function(None) is None
        assert await function(UNDEFINED) == 5


PATHS = ["_hidden", "__class__", "constructor", "prototype", "then", "", "deep._x", "ask.__self__"]


async def test_what_may_not_pass() -> None:
    """Names that hide, or that all objects of JavaScript have: the relay itself refuses them."""
    async with joined() as both:
        session = await both.api.get()
        for path in [*(tuple(one.split(".")) for one in PATHS), ("x",) * 17, ("deep.add",)]:
            for what in ("call", "get", "set", "apply"):
                with pytest.raises(MethodNotFoundError):
                    await do(session, what, path, *([1] if what == "set" else []))
        for what in ("new", "member", "nonsense"):
            with pytest.raises(MethodNotFoundError):
                await do(session, what, ("ask", "x") if what == "member" else ("ask",))
        assert both.server.statistics().references_given == 1
        # Names of the list mean nothing there, and what is below an object isn't in the list.
        with pytest.raises(MethodNotFoundError):
            await session.api.get()
        with pytest.raises(MethodNotFoundError):
            await both.client.get_api().session.ask("?")


async def test_cancels_and_deadlines() -> None:
    """Who uses an object through a relay and leaves, or is out of time, stops what runs there."""
    async with joined() as both, anyio.create_task_group() as tasks:
        session = await both.api.get()
        tasks.start_soon(session.stuck)
        with anyio.fail_after(BOUND):
            while both.served.session.asked != ["stuck"]:
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await both.served.session.stopped.wait()
    async with joined(timeout=0.05) as both:
        session = await both.api.get()
        with pytest.raises(RPCTimeoutError):
            await session.stuck()
        with anyio.fail_after(BOUND):
            await both.served.session.stopped.wait()


async def test_its_owner_is_gone_or_has_it_no_more() -> None:
    """Whoever uses it through the relay is told so, and so is who passes it back."""
    async with joined(close_other=False) as both:
        session = await both.api.get()
        holding = both.relay._channels[1]._core.references.holding
        for one in [*holding.held._handles[None].values()]:
            holding.release(one)
        with pytest.raises(DeliveryError, match="released"):
            await session.ask("?")
        with pytest.raises(DeliveryError, match="released"):
            await both.api.is_same(session)
        other = await both.api.get()
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                with pytest.raises(DeliveryError):
                    await other.stuck()

            tasks.start_soon(wait)
            with anyio.fail_after(BOUND):
                while both.served.session.asked != ["stuck"]:
                    await anyio.lowlevel.checkpoint()
                await both.server._transport.aclose()
        with pytest.raises(DeliveryError):
            await other.ask("?")


async def test_the_relay_ends() -> None:
    """What is held through it is gone, and its owner has it no more for anybody."""
    async with joined() as both:
        session = await both.api.get()
        await both.api.keep(Session("mine"))
        await both.relay._channels[0]._transport.aclose()
        with anyio.fail_after(BOUND):
            await both.relay.serve_forever()
        for use in (session.ask, both.served.kept.ask):
            with pytest.raises(Exception, match=r"closed|gone"):
                await use("?")
        del session
        await both.nothing_left()


async def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one side holds through a relay counts as what it holds."""
    monkeypatch.setattr(_given.GivenTable.__init__, "__kwdefaults__", {"most": 10})
    async with joined() as both:
        with pytest.raises(RemoteError, match="holds 10 references"):
            await both.api.get_many(11)
        await both.nothing_left()
        same = [await both.api.get() for _ in range(20)]
        assert both.relay.statistics().a.references_given == 1
        del same


async def test_a_table_for_many() -> None:
    """`forward` passes them, too; what one page was given means nothing for another one."""
    served = Api()
    inside, b = MemoryTransport.pair()
    async with (
        inside,
        b,
        RPCChannel(inside, expose={"api": served}),
        RPCChannel(b, timeout=CALL_BOUND) as shared,
    ):
        table = forward(shared, allow=["api.*"])
        async with page(table) as one, page(table) as two:
            session = await one.api.get()
            assert await session.ask("1") == "ada: 1"
            assert await two.api.is_same(await two.api.get()) == [True, False]
            with pytest.raises(TypeError, match="another channel"):
                await two.api.is_same(session)
            await one.api.keep(Session("mine"))
            assert await served.kept.ask("2") == "mine: 2"
            with pytest.raises(RemoteError, match="another channel"):
                await two.api.kept_one()


@asynccontextmanager
async def page(table: Any) -> AsyncIterator[Any]:
    outside, a = MemoryTransport.pair()
    async with outside, a, RPCChannel(a, expose=table), RPCChannel(outside) as client:
        yield client.get_api()
