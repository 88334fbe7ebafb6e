"""Streams of calls with keys are the same over each transport that keeps them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, NamedTuple

import anyio
import pytest

from anyio_kkrpc import (
    CallCancelledError,
    CallHandle,
    CallNotFoundError,
    DeliveryError,
    Item,
    ItemBounds,
    ItemsLostError,
    MemoryTransport,
    RedisStreamsTransport,
    RemoteError,
    RPCChannel,
    RPCValidationError,
    StreamRestartedError,
    current_call,
    with_call_options,
)
from anyio_kkrpc.testing._server import RedisServer
from tests.bounds import BOUND
from tests.servers import marks_of

pytestmark = pytest.mark.anyio


class Api:
    """What is called: it yields, and waits where it is told to.

    :ivar yielded: how many items a run has yielded so far, that is, was asked for the next one
    :ivar go: lets it go on
    """

    def __init__(self) -> None:
        self.yielded = 0
        self.began = anyio.Event()
        self.go = anyio.Event()
        self.closed = anyio.Event()
        self.resumed: list[Any] = []
        self.scope = anyio.CancelScope()

    async def count(self, items: int, wait_after: int = -1) -> AsyncIterator[int]:
        """Yield numbers, and wait for `go` after some."""
        for number in range(items):
            if number == wait_after:
                self.began.set()
                await self.go.wait()
            yield number
            self.yielded += 1

    async def forever(self) -> AsyncIterator[str]:
        """Yield without end."""
        try:
            while True:
                yield "x" * 100
                self.yielded += 1
        finally:
            self.closed.set()

    async def fail(self, items: int) -> AsyncIterator[Any]:
        """Yield, and fail."""
        for number in range(items):
            yield {"number": number}
        raise LookupError("no tea")

    async def odd(self) -> AsyncIterator[Any]:
        """Yield values of all kinds."""
        for value in (None, 0, "ä\n", [1, {"a": None}], {"__kkrpc_next_arg__": "value"}, 1.5):
            yield value

    async def wrong(self) -> AsyncIterator[int]:
        """Yield what isn't as annotated."""
        yield 1
        yield "two"  # type: ignore[misc]

    async def unsent(self) -> AsyncIterator[Any]:
        """Yield what can't be encoded."""
        yield 1
        yield object()

    async def scoped(self) -> AsyncIterator[int]:
        """Leave a scope around an item that nobody makes room for."""
        with self.scope:
            yield 1
            self.began.set()
            yield 2
            await anyio.sleep_forever()
        yield 3

    async def hasty(self) -> AsyncIterator[int]:
        """Yield, and wait until it is kept for none of it."""
        for number in range(1000):
            with anyio.CancelScope() as scope:
                scope.cancel()
                yield number
            self.yielded += 1

    async def resume(self) -> AsyncIterator[int]:
        """Go on behind what is there, of which there is nothing."""
        self.resumed.append(await current_call().resume())
        yield 1

    async def plain(self) -> int:
        """No stream."""
        return 5

    async def look(self) -> int:
        """No stream either."""
        self.resumed.append(await current_call().resume())
        return 6


class Link(NamedTuple):
    """A caller, another one where there can be one, and what is called."""

    caller: RPCChannel
    other: RPCChannel
    api: Any
    served: Api
    server: RPCChannel


Open = Callable[[], AbstractAsyncContextManager[Link]]


@pytest.fixture(params=["memory", pytest.param("valkey8", marks=marks_of("valkey8"))])
def open_keyed(request: pytest.FixtureRequest, stream_name: str) -> Open:
    """Return what opens a link."""

    @asynccontextmanager
    async def memory() -> AsyncIterator[Link]:
        a, b = MemoryTransport.pair(codec="json")
        served = Api()
        async with (
            a,
            b,
            RPCChannel(a, timeout=BOUND) as caller,
            RPCChannel(b, expose=served) as server,
        ):
            yield Link(caller, caller, caller.get_api(), served, server)

    @asynccontextmanager
    async def redis() -> AsyncIterator[Link]:
        where: RedisServer = request.getfixturevalue("servers")[request.param]
        served = Api()

        def transport(codec: str) -> RedisStreamsTransport:
            return RedisStreamsTransport(
                where.url, stream=stream_name, use_consumer_group=True, codec=codec
            )

        async with (
            transport("json") as a,
            transport("cbor") as b,
            transport("json") as c,
            RPCChannel(a, timeout=BOUND) as caller,
            RPCChannel(b, timeout=BOUND) as other,
            RPCChannel(c, expose=served, timeout=BOUND) as server,
        ):
            yield Link(caller, other, caller.get_api(), served, server)

    return memory if request.param == "memory" else redis


async def read(call: CallHandle[Any], after: str | None = None) -> list[Item[Any]]:
    with anyio.fail_after(BOUND):
        return [item async for item in call.items(after=after)]


async def test_from_anywhere(open_keyed: Open) -> None:
    """Live and later, from the first item or from any, in whatever process."""
    async with open_keyed() as link:
        call = await link.caller.start(link.api.count(300, 200), key="k")
        seen: list[Item[Any]] = []
        async with anyio.create_task_group() as group:

            async def live() -> None:
                seen.extend(await read(link.other.attach("k")))

            group.start_soon(live)
            await link.served.began.wait()
            async with aclosing(call.items()) as some:
                first = [await some.__anext__() for _ in range(150)]
            link.served.go.set()
        assert [item.value for item in seen] == list(range(300))
        assert [item.number for item in seen] == list(range(1, 301))
        assert len({item.position for item in seen}) == 300
        assert seen[:150] == first
        for reader in (link.caller, link.other):
            for number in (1, 2, 150, 299, 300):
                rest = await read(reader.attach("k"), seen[number - 1].position)
                assert rest == seen[number:]
        assert await call.result() is None
        assert (await call.state()).kind == "done"


async def test_invented_positions(open_keyed: Open) -> None:
    """Are errors at once, whether the call runs or has ended; nobody waits for what never comes."""
    async with open_keyed() as link:
        call = await link.caller.start(link.api.count(6, 4), key="k")
        await link.served.began.wait()
        async with aclosing(call.items()) as some:
            first = await some.__anext__()
        epoch, number = int(first.position.partition("-")[0]), 10**18 - 1
        invented = [f"{epoch}-{n}" for n in (5, 6, 99, number)]
        invented += [f"{epoch + n}-{m}" for n in (1, 2, 1000) for m in (1, number)]
        invented += [f"{number}-{number}", f"{number}-1", "0-1", f"{epoch - 1}-1"]
        for after in invented:
            with pytest.raises(StreamRestartedError):
                await read(link.other.attach("k"), after)
        link.served.go.set()
        whole = await read(call)
        for after in [*invented[2:], f"{epoch}-8"]:
            with pytest.raises(StreamRestartedError):
                await read(link.other.attach("k"), after)
        assert await read(call, f"{epoch}-05") == whole[5:]
        assert await read(call, f"{epoch}-7") == []  # behind the end


async def test_values(open_keyed: Open) -> None:
    async with open_keyed() as link:
        values = [None, 0, "ä\n", [1, {"a": None}], {"__kkrpc_next_arg__": "value"}, 1.5]
        for channel in (link.caller, link.other):
            key = str(channel is link.other)  # its codec is that of who asks
            call = await channel.start(channel.get_api().odd(), key=key)
            assert [item.value for item in await read(call)] == values
            assert [item.value for item in await read(link.other.attach(key))] == values
        await link.caller.start(link.api.count(3), key="n")
        typed = link.caller.attach("n", returns=AsyncIterator[float])
        assert [type(item.value) for item in await read(typed)] == [float] * 3
        assert await typed.result() is None
        with pytest.raises(RPCValidationError):
            await read(link.caller.attach("n", returns=AsyncIterator[str]))


async def test_ends(open_keyed: Open) -> None:
    """By an error behind the items, at once, and of what has none."""
    async with open_keyed() as link:
        await link.caller.start(link.api.fail(3), key="fails")
        for reader in (link.caller, link.other):
            seen = []
            with pytest.raises(RemoteError, match="no tea"):
                async for item in reader.attach("fails").items():
                    seen.append(item)
            assert [item.value for item in seen] == [{"number": n} for n in range(3)]
            with pytest.raises(RemoteError, match="no tea"):
                await read(reader.attach("fails"), seen[-1].position)
        with pytest.raises(RemoteError, match="no tea"):
            await link.caller.attach("fails").result()
        assert await read(await link.caller.start(link.api.count(0), key="empty")) == []
        with pytest.raises(RemoteError, match="no tea"):
            await read(await link.caller.start(link.api.fail(0), key="at once"))
        call = await link.caller.start(link.api.plain(), key="plain")
        with pytest.raises(DeliveryError, match="no items of it are there"):
            await read(call)
        with pytest.raises(CallNotFoundError, match="nothing"):
            await read(link.caller.attach("nothing"))


async def test_items_that_do_not_fit(open_keyed: Open) -> None:
    """End the stream, behind those before."""
    async with open_keyed() as link:
        for name, error in (("wrong", RPCValidationError), ("unsent", RemoteError)):
            call = await link.caller.start(link.api[name](), key=name)
            seen = []
            with pytest.raises(error):
                async for item in call.items():
                    seen.append(item.value)
            assert seen == [1]


async def test_cancel(open_keyed: Open) -> None:
    """Who reads is told, and the next call with the key is another stream."""
    async with open_keyed() as link:
        call = await link.caller.start(link.api.count(10, 5), key="k")
        await link.served.began.wait()
        positions = []
        with pytest.raises(CallCancelledError), anyio.fail_after(BOUND):
            async for item in link.other.attach("k").items():
                positions.append(item.position)
                if len(positions) == 5:
                    assert await call.cancel()
        with pytest.raises(CallCancelledError):
            await read(call, positions[-1])
        again = await link.caller.start(link.api.count(3), key="k")
        with pytest.raises(StreamRestartedError):
            await read(link.other.attach("k"), positions[1])
        assert [item.value for item in await read(again)] == [0, 1, 2]


async def test_forget(open_keyed: Open) -> None:
    async with open_keyed() as link:
        call = await link.caller.start(link.api.count(3), key="k")
        position = (await read(call))[0].position
        assert await call.forget()
        with pytest.raises(CallNotFoundError):
            await read(call)
        await link.caller.start(link.api.count(5), key="k")
        with pytest.raises(StreamRestartedError, match="begun anew"):
            await read(call, position)
        assert len(await read(call)) == 5


async def test_leaving_leaves_the_call(open_keyed: Open) -> None:
    async with open_keyed() as link:
        call = await link.caller.start(link.api.count(4, 2), key="k")
        await link.served.began.wait()
        with anyio.move_on_after(0.01) as scope:
            await read(call)
        assert scope.cancelled_caught
        link.served.go.set()
        assert len(await read(call)) == 4


@pytest.mark.parametrize("bounds", [{"keep_items": 8}, {"keep_items": None, "keep_bytes": 800}])
async def test_the_fastest_paces(open_keyed: Open, bounds: dict[str, Any]) -> None:
    """The handler waits once so much is kept; who reads makes room, and who doesn't loses items."""
    async with open_keyed() as link:
        call = await link.caller.start(link.api.forever(), key="k", bounds=ItemBounds(**bounds))
        items: list[Item[Any]] = []
        with anyio.fail_after(BOUND):
            async with aclosing(call.items()) as reader:
                async for item in reader:
                    items.append(item)
                    # Some more may be on the way to where they are kept.
                    assert link.served.yielded <= len(items) + 8
                    if len(items) == 50:
                        break
            assert [item.number for item in items] == list(range(1, 51))
            with pytest.raises(ItemsLostError) as lost:
                await read(link.other.attach("k"), items[0].position)
            assert lost.value.wanted == 2
            assert 2 < lost.value.first <= 51
            assert "items 2 to" in str(lost.value)
            while True:  # until nothing more of what was read is on its way to who writes
                reader = link.other.attach("k").items(after=lost.value.position)
                async with aclosing(reader) as rest:
                    try:
                        assert (await rest.__anext__()).number == lost.value.first
                        break
                    except ItemsLostError as exc:
                        assert exc.wanted == lost.value.first
                        lost.value.__init__(exc.wanted, exc.first, exc.position)  # type: ignore[misc]
            await call.cancel()
            await link.served.closed.wait()


async def test_nobody_reads(open_keyed: Open, caplog: pytest.LogCaptureFixture) -> None:
    """The handler pauses, or is cancelled, or goes on without what is oldest."""
    async with open_keyed() as link:
        bounds = ItemBounds(keep_items=4, when_unread="go on")
        for key in ("goes on", "also"):
            call = await link.caller.start(link.api.count(20), key=key, bounds=bounds)
            assert await call.result() is None
        with pytest.raises(ItemsLostError) as lost:
            await read(call)
        rest = await read(call, lost.value.position)
        assert [item.number for item in rest] == list(range(lost.value.first, 21))
        assert 1 <= len(rest) <= 4
        assert link.server.statistics().unread_items == 2 * (lost.value.first - 1)
        told = [text for text in caplog.messages if "nobody has read them" in text]
        assert ["goes on go" in told[0], "also go" in told[1], len(told)] == [True, True, 2]
        bounds = ItemBounds(keep_items=4, when_unread="cancel", unread_timeout=0.01)
        call = await link.caller.start(link.api.forever(), key="cancelled", bounds=bounds)
        with pytest.raises(CallCancelledError), anyio.fail_after(BOUND):
            await call.result()
        with anyio.fail_after(BOUND):
            await link.served.closed.wait()
        link.served.yielded = 0
        bounds = ItemBounds(keep_items=4)
        call = await link.caller.start(link.api.count(20), key="paused", bounds=bounds)
        with anyio.fail_after(BOUND):
            while link.served.yielded < 4:
                await anyio.sleep(0.01)
            await anyio.wait_all_tasks_blocked()
        assert link.served.yielded == 4
        assert await call.cancel()


async def test_a_scope_around_what_is_yielded(open_keyed: Open) -> None:
    """Is left, when it is cancelled, as if the item had gone out; none is lost, or comes twice."""
    async with open_keyed() as link:
        call = await link.caller.start(link.api.scoped(), key="k", bounds=ItemBounds(keep_items=1))
        await link.served.began.wait()
        link.served.scope.cancel()
        assert [item.value for item in await read(call)] == [1, 2, 3]


async def test_a_handler_that_waits_for_nothing(open_keyed: Open) -> None:
    """Doesn't fill the memory: it fails, behind what it has yielded until then."""
    async with open_keyed() as link:
        call = await link.caller.start(link.api.hasty(), key="k")
        seen = []
        with pytest.raises(RemoteError, match="there is no room"), anyio.fail_after(BOUND):
            async for item in call.items():
                seen.append(item.value)
        assert seen == list(range(128))
        assert link.served.yielded == 128


async def test_nothing_to_resume(open_keyed: Open) -> None:
    async with open_keyed() as link:
        call = await link.caller.start(link.api.resume(), key="k")
        assert [item.value for item in await read(call)] == [1]
        assert link.served.resumed == [None]
        assert await link.api.look() == 6  # without a key
        assert link.served.resumed == [None, None]


async def test_wrong_use(open_keyed: Open) -> None:
    async with open_keyed() as link:
        api = with_call_options(link.api, key="k")
        with pytest.raises(TypeError, match=r"^count: the stream .* by items\(\)"):
            await api.count(1)
        with pytest.raises(TypeError, match=r"^count: the stream"):
            async for _ in api.count(1):
                pass
        assert [item.value for item in await read(link.caller.attach("k"))] == [0]
        odd = (
            "1-2-3",
            " 1-1",
            "1-1\n",
            "1-\u0661",
            "\u00b2-1",
            "+1-1",
            "1-1e3",
            "0x1-1",
            "1\x00-1",
        )
        for after in ("", "-", "1", "1-", "1-x", "-1-1", "1-" + "9" * 30, "9" * 5000 + "-1", *odd):
            with pytest.raises(ValueError, match="^after: "):
                await read(link.caller.attach("k"), after)
        with pytest.raises(TypeError, match="^after: "):
            await read(link.caller.attach("k"), 5)  # type: ignore[arg-type]
