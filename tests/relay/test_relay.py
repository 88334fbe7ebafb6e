"""Two transports joined: what passes, what doesn't, and how it ends."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from math import inf
from typing import Any

import anyio
import pytest

from anyio_kkrpc import (
    ByteStreamTransport,
    DeliveryError,
    MemoryTransport,
    MethodNotFoundError,
    OverloadedError,
    RemoteError,
    RPCChannel,
    RPCTimeoutError,
    RPCValidationError,
    TransportClosedError,
    current_call,
    expose,
    with_call_options,
)
from anyio_kkrpc._calling._proxy import telling_undefined
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.records import Bye, CallbackCall, Cancel, Request, StreamRequest
from anyio_kkrpc.relay import Relay, _may_pass, _pattern, forward, relay
from anyio_kkrpc.typescript import UNDEFINED
from tests.bounds import BOUND, CALL_BOUND
from tests.typescript.replaying import MemoryBytes

pytestmark = pytest.mark.anyio
LARGE = "x" * (1 << 20)


class Chat:
    theme = "light"

    def __init__(self) -> None:
        self.waiting, self.cancelled, self.left = anyio.Event(), anyio.Event(), anyio.Event()
        self.made = 0
        self.kept: list[Any] = []

    def add(self, a: int, b: int = 0) -> int:
        return a + b

    def fail(self) -> None:
        error = ValueError("no")
        error.code = 7  # type: ignore[attr-defined]
        raise error

    def metadata(self) -> dict[str, Any]:
        return current_call().metadata

    async def wait(self) -> None:
        self.waiting.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.cancelled.set()

    def time_left(self) -> float | None:
        deadline = current_call().deadline
        return None if deadline is None else deadline - anyio.current_time()

    async def steps(self, n: int, on_step: Callable[[int], Awaitable[None]]) -> str:
        for step in range(n):
            await on_step(step)
        return "done"

    def keep(self, function: Callable[..., Any]) -> None:
        self.kept.append(function)

    def drop(self) -> None:
        self.kept.clear()

    async def count(self, n: int) -> AsyncIterator[int]:
        try:
            for number in range(n):
                self.made += 1
                yield number
        finally:
            self.left.set()

    async def large(self) -> AsyncIterator[str]:
        while True:
            self.made += 1
            yield LARGE

    async def once(self, function: Callable[[int], Awaitable[int]]) -> int:
        return await function(5)

    async def loose(self, function: Any) -> Any:
        return await function.ask(5)

    async def items(self, function: Any) -> list[int]:
        return [item async for item in await function.ask(3)]

    async def tell(self, function: Callable[[str], Awaitable[None]]) -> None:
        while True:
            await function(LARGE)
            self.made += 1

    async def table(self, rows: int) -> AsyncIterator[AsyncIterator[int]]:
        for _ in range(rows):
            yield self.count(3)

    def nothing(self) -> None:
        return None

    def echo(self, value: Any = 5) -> Any:
        return value

    async def gaps(self) -> AsyncIterator[Any]:
        yield UNDEFINED
        yield None

    async def fail_stream(self) -> AsyncIterator[int]:
        yield 1
        raise ValueError("broke")

    async def sum(self, numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])


class Joined:
    """A client, a relay and a server."""

    def __init__(self, client: RPCChannel, joined: Relay, server: RPCChannel, chat: Chat) -> None:
        self.client, self.relay, self.server, self.chat = client, joined, server, chat
        self.api = client.get_api()
        self.transport: MemoryTransport


@asynccontextmanager
async def joined(
    *, allow: list[str] | None = None, client: Any = None, **options: Any
) -> AsyncIterator[Joined]:
    chat = Chat()
    api = expose({"chat": chat, "secret": chat, "top": lambda: 1}, writable=["chat.theme"])
    (outside, a), (b, inside) = (
        MemoryTransport.pair(codec="json"),
        MemoryTransport.pair(codec="cbor"),
    )
    options.setdefault("timeout", CALL_BOUND)
    async with (
        outside,
        a,
        b,
        inside,
        RPCChannel(inside, expose=api, timeout=CALL_BOUND) as server,
        relay(a, b, allow=allow or ["chat.*"], **options) as both,
        RPCChannel(outside, expose=client, timeout=CALL_BOUND) as caller,
    ):
        made = Joined(caller, both, server, chat)
        made.transport = outside
        yield made


async def test_calls_and_properties() -> None:
    """Arguments, by position and by name, results and properties."""
    async with joined() as both:
        assert await both.api.chat.add(1, 2) == 3
        assert await both.api.chat.add(1, b=2) == 3
        assert await both.api.chat.theme == "light"


async def test_errors() -> None:
    """A handler's arrive as they were; those of the library tell what became of the call."""
    async with joined() as both:
        with pytest.raises(RemoteError) as caught:
            await both.api.chat.fail()
        assert (caught.value.name, caught.value.message) == ("ValueError", "no")
        assert caught.value.data == {"code": 7}
        with pytest.raises(MethodNotFoundError, match="chat.nope"):
            await both.api.chat.nope()
        with pytest.raises(RPCValidationError, match="input"):
            await both.api.chat.add("x")


async def test_undefined_with_other_options() -> None:
    """Options that are given later leave it as it is."""
    async with joined() as both:
        api = with_call_options(telling_undefined(both.api), timeout=CALL_BOUND)
        assert await api.chat.nothing() is UNDEFINED


async def test_overload() -> None:
    """It is told as that: the call did not run, and may be made again."""

    async def full(call: Any, call_next: Any) -> Any:
        raise OverloadedError("full")

    outside, a = MemoryTransport.pair()
    b, _ = MemoryTransport.pair()
    async with outside, a, b, RPCChannel(b, middleware=[full]) as inner:
        table = forward(inner, allow=["x"])
        async with RPCChannel(a, expose=table), RPCChannel(outside) as client:
            with pytest.raises(OverloadedError):
                await client.get_api().x()


async def test_results_of_callbacks() -> None:
    """They come from who has the function: values, errors, streams, and undefined as such."""

    async def count(last: int) -> AsyncIterator[int]:
        for number in range(last):
            yield number

    def fails(number: int) -> int:
        raise ValueError(f"not {number}")

    async with joined() as both:
        chat = both.api.chat
        assert await chat.once(lambda number: number + 1) == 6
        assert await chat.loose(lambda number: number + 1) == 6
        assert await chat.items(count) == [0, 1, 2]
        with pytest.raises(RemoteError, match="not 5"):
            await chat.loose(fails)
        assert await telling_undefined(chat).loose(lambda number: UNDEFINED) is None


async def test_callbacks() -> None:
    """They come back, in order, and wait for each other; one that is dropped is released."""
    async with joined() as both:
        steps: list[int] = []
        assert await both.api.chat.steps(200, steps.append) == "done"
        assert steps == list(range(200))
        await both.api.chat.keep(steps.append)
        await both.chat.kept[0](7)
        with anyio.fail_after(BOUND):
            while steps[-1] != 7:
                await anyio.sleep(0.001)
        await both.api.chat.drop()
        with anyio.fail_after(BOUND):
            while both.client.statistics().callbacks:
                gc.collect()  # the function that was handed on is in a cycle with what ran it
                await anyio.sleep(0.001)
        assert both.relay.statistics().b.callbacks == 0


async def test_streams() -> None:
    """In both directions, with errors and backpressure; leaving one closes its source."""
    async with joined() as both:
        assert [item async for item in both.api.chat.count(500)] == list(range(500))

        async def numbers() -> AsyncIterator[int]:
            for number in range(100):
                yield number

        assert await both.api.chat.sum(numbers()) == 4950
        with pytest.raises(RemoteError, match="broke"):
            async for _ in both.api.chat.fail_stream():
                pass
        both.chat.made = 0
        both.chat.left = anyio.Event()
        async with both.api.chat.count(10**9) as items:
            assert await items.__anext__() == 0
            await anyio.wait_all_tasks_blocked()
            assert both.chat.made < 1000, "nobody reads them"
        with anyio.fail_after(BOUND):
            await both.chat.left.wait()


async def test_streams_in_streams() -> None:
    """In both directions; their sources wait for their turn as without a relay."""
    async with joined() as both:
        rows = 0
        async for row in both.api.chat.table(20):
            rows += 1
            assert [item async for item in row] == [0, 1, 2]
            assert both.chat.made <= 3 * (rows + 1)
        assert rows == 20
        with anyio.fail_after(BOUND):
            while both.server.statistics().outgoing_streams:
                await anyio.sleep(0.001)


async def test_nothing_piles_up() -> None:
    """Of a reader that stops, and of a slow function, a few large values wait on each way."""
    async with joined() as both:
        items = await both.api.chat.large()
        assert await items.__anext__() == LARGE
        await anyio.wait_all_tasks_blocked()
        assert both.chat.made <= 6
        await items.aclose()
        both.chat.made = 0
        called = anyio.Event()

        async def slow(text: str) -> None:
            called.set()
            await anyio.sleep_forever()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(both.api.chat.tell, slow)
            with anyio.fail_after(BOUND):
                await called.wait()
            await anyio.wait_all_tasks_blocked()
            assert both.chat.made <= 6
            tasks.cancel_scope.cancel()


async def test_undefined() -> None:
    """What JavaScript's sees as undefined, and what as null, is the same behind a relay."""
    async with joined() as both:
        api = telling_undefined(both.api)
        assert await api.chat.nothing() is UNDEFINED
        assert await api.chat.echo(None) is None
        assert await api.chat.echo(UNDEFINED) == 5
        assert await both.api.chat.nothing() is None
        assert [item async for item in both.api.chat.gaps()] == [UNDEFINED, None]


async def test_cancel() -> None:
    async with joined() as both:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(both.api.chat.wait)
            with anyio.fail_after(BOUND):
                await both.chat.waiting.wait()
            tasks.cancel_scope.cancel()
        with anyio.fail_after(BOUND):
            await both.chat.cancelled.wait()


async def test_deadlines() -> None:
    """What is left of the caller's time travels on; without any it is the relay's."""
    async with joined(timeout=200.0) as both:
        left = await with_call_options(both.api, timeout=100).chat.time_left()
        assert 0 < left <= 100
        left = await with_call_options(both.api, timeout=None).chat.time_left()
        assert 100 < left <= 200
        with pytest.raises(RPCTimeoutError):
            await with_call_options(both.api, timeout=0.01).chat.wait()


async def test_back() -> None:
    """What is served outside, if that is allowed; nothing of it unless it is."""
    own = {"name": lambda: "ada", "other": lambda: 1}
    async with joined(client=own, back=["name"]) as both:
        assert await both.server.get_api().name() == "ada"
        with pytest.raises(MethodNotFoundError):
            await both.server.get_api().other()
    async with joined(client=own) as both:
        with pytest.raises(RPCTimeoutError):
            await with_call_options(both.server.get_api(), timeout=0.05).name()


# What doesn't pass


PATHS = [
    ["secret", "add"],
    ["top"],
    ["chat"],
    ["chat", "add", "add"],
    ["chat", "sub", "add"],
    ["chat", ""],
    ["", "chat", "add"],
    ["chat.add"],
    ["chat", "add."],
    ["chat", "..", "secret", "add"],
    ["Chat", "add"],
    ["ｃｈａｔ", "add"],
    ["chat\u200b", "add"],
    ["chat", "__class__"],
    ["chat", "_private"],
    ["chat", "__init__", "__globals__"],
    ["chat", "constructor"],
    ["chat", "prototype"],
    ["chat", "then"],
    ["chat", "*"],
    ["*"],
    ["**"],
    ["chat", "**"],
    ["chat"] + ["a"] * 10_000,
    [],
]


async def test_names_that_may_not_pass(caplog: pytest.LogCaptureFixture) -> None:
    """Each is answered, counted, and seen by nobody behind the relay; some are logged."""
    caplog.set_level("INFO")
    async with joined() as both:
        for number, path in enumerate(PATHS):
            for op in ("call", "get", "new", "set"):
                record = Request(f"{op}{number}", op, path, [] if op in ("call", "new") else None)
                if op in ("get", "set"):
                    record = Request(f"{op}{number}", op, path, v=1)
                await both.transport.send(Envelope(record))
        assert await both.api.chat.add(1, 2) == 3
        statistics = both.relay.statistics()
        assert statistics.a.unknown == 4 * len(PATHS)
        assert both.server.statistics().served == 1
        assert both.server.statistics().unknown == 0
    assert 1 <= caplog.text.count("a relay lets no") < 4 * len(PATHS)


async def test_operations_that_do_not_pass() -> None:
    """Setting and constructing, of names that pass as calls; metadata; made-up references."""
    async with joined() as both:
        with pytest.raises(MethodNotFoundError):
            await both.client.set_property("chat.theme", "dark")
        assert await both.api.chat.theme == "light"
        with pytest.raises(MethodNotFoundError):
            await both.client.construct("chat.Chat")
        api = with_call_options(both.api, metadata={"tenant": "other", "traceparent": "x"})
        assert await api.chat.metadata() == {}
        await both.transport.send(Envelope(Request("r", "ref", ["id", "release"])))
        assert both.server.statistics().unknown == 0
        with pytest.raises(ValueError, match="one peer only"):
            both.client.get_api(to="worker")


async def test_ids_of_others() -> None:
    """Callbacks, streams, calls and replies that this side was never given are ignored."""
    async with joined() as both, anyio.create_task_group() as tasks:
        called: list[Any] = []
        await both.api.chat.keep(called.append)
        tasks.start_soon(both.api.chat.wait)
        with anyio.fail_after(BOUND):
            await both.chat.waiting.wait()
        inside = [*both.relay._channels[1]._conversation.callbacks]
        inside += [*both.relay._channels[1]._conversation.calls]
        assert len(inside) == 2
        for guessed in [*inside, "1", ""]:
            await both.transport.send(Envelope(CallbackCall(guessed, [1])))
            await both.transport.send(Envelope(Cancel(guessed)))
            await both.transport.send(Envelope(StreamRequest("s", guessed, "pull", n=10)))
        assert await both.api.chat.add(1, 2) == 3
        assert not both.chat.cancelled.is_set()
        assert called == []
        tasks.cancel_scope.cancel()


async def test_destroy_signal() -> None:
    """It ends the side that it came over, and the relay; nobody behind it is told."""
    async with joined(close_other=False) as both:
        await both.transport.send(Envelope(Bye()))
        with anyio.fail_after(BOUND):
            while not both.relay._channels[0].closed:
                await anyio.sleep(0.001)
        assert not both.server.closed


# The end


async def test_either_end_closes_the_other() -> None:
    async with joined() as both:
        await both.transport.aclose()
        with anyio.fail_after(BOUND):
            await both.server.serve_forever()
            await both.relay.serve_forever()


async def test_an_end_that_leaves_the_other_open() -> None:
    """Calls say that nobody is there; what waits is told at once."""
    async with joined(close_other=False) as both, anyio.create_task_group() as tasks:

        async def wait() -> None:
            with pytest.raises(DeliveryError, match="other side of the relay"):
                await both.api.chat.wait()

        tasks.start_soon(wait)
        with anyio.fail_after(BOUND):
            await both.chat.waiting.wait()
            await both.server._transport.aclose()
        with pytest.raises(DeliveryError, match="other side of the relay"):
            await both.api.chat.add(1, 2)
        assert not both.client.closed


async def test_one_channel_for_many() -> None:
    """`forward` is a table as any other: several channels serve it, each with counts of its own."""
    chat = Chat()
    inside, b = MemoryTransport.pair()
    async with (
        inside,
        b,
        RPCChannel(inside, expose={"chat": chat}),
        RPCChannel(b, timeout=CALL_BOUND) as shared,
    ):
        table = forward(shared, allow=["chat.*"])
        for _ in range(2):
            outside, a = MemoryTransport.pair()
            async with outside, a, RPCChannel(a, expose=table) as served:
                async with RPCChannel(outside) as client:
                    assert await client.get_api().chat.add(1, 2) == 3
                    assert served.statistics().methods["chat.*"].served == 1


async def test_leaving_cancels_what_passes() -> None:
    chat = Chat()
    (outside, a), (b, inside) = MemoryTransport.pair(), MemoryTransport.pair()
    async with outside, a, b, inside, RPCChannel(inside, expose={"chat": chat}):
        async with RPCChannel(outside) as client, anyio.create_task_group() as tasks:

            async def wait() -> None:
                with pytest.raises((DeliveryError, TransportClosedError)):
                    await client.get_api().chat.wait()

            async with relay(a, b, allow=["chat.*"]):
                tasks.start_soon(wait)
                with anyio.fail_after(BOUND):
                    await chat.waiting.wait()
            with anyio.fail_after(BOUND):
                await chat.cancelled.wait()
            await a.aclose()


def test_patterns() -> None:
    for text, path, passes in (
        ("a.b", ("a", "b"), True),
        ("a.*", ("a", "b"), True),
        ("a.*", ("a",), False),
        ("a.*", ("a", "b", "c"), False),
        ("*.b", ("x", "b"), True),
        ("a.**", ("a", "b"), True),
        ("a.**", ("a", "b", "c"), True),
        ("a.**", ("a",), False),
        ("a.**", ("a", "b", "constructor"), False),
        ("a.constructor", ("a", "constructor"), True),
        ("**", ("a",), True),
    ):
        assert _may_pass(path, _pattern("allow", text)) is passes, (text, path)
    for wrong in ("", "a.", ".a", "a..b", "a*", "a.b*", "**.a", "_a", "a._b", "a.*b.c"):
        with pytest.raises(ValueError, match="allow"):
            _pattern("allow", wrong)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"allow": "chat.*"}, TypeError),
        ({"allow": []}, ValueError),
        ({"allow": [1]}, TypeError),
        ({"allow": ["a"], "back": "x"}, TypeError),
        ({"allow": ["a"], "close_other": 1}, TypeError),
        ({"allow": ["a"], "timeout": -1}, ValueError),
    ],
)
async def test_options(options: dict[str, Any], error: type[Exception]) -> None:
    (_, a), (b, _) = MemoryTransport.pair(), MemoryTransport.pair()
    async with a, b:
        with pytest.raises(error, match=[*options][-1]):
            async with relay(a, b, **options):
                pytest.fail("joined")


VALUES = [datetime(2027, 1, 2, tzinfo=timezone.utc), {1: "a"}, b"ab", {1, 2}, inf]


@pytest.mark.parametrize(
    ("codec", "arrive"),
    [
        ("cbor", [VALUES[0], {1: "a"}, b"ab", [1, 2], inf]),
        ("json", ["2027-01-02T00:00:00Z", {"1": "a"}, "YWI=", [1, 2], None]),
    ],
)
async def test_values_by_codec(codec: str, arrive: list[Any]) -> None:
    """What arrives is what both sides can say: docs/relay.md has it in a table."""

    class Api:
        def echo(self, values: Any) -> Any:
            seen.append(values)
            return values

        def typed(self, day: datetime, data: bytes) -> bool:
            return [day, data] == [VALUES[0], VALUES[2]]

    seen: list[Any] = []
    pages, work = lines(dialect="kkrpc-0"), lines({"codec": codec}, codec=codec)
    async with (
        pages[0],
        pages[1],
        work[0],
        work[1],
        RPCChannel(work[1], expose=Api(), timeout=CALL_BOUND),
        relay(pages[1], work[0], allow=["**"]),
        RPCChannel(pages[0], timeout=CALL_BOUND) as channel,
    ):
        assert await channel.get_api().echo(VALUES) == arrive
        assert await channel.get_api().typed(VALUES[0], VALUES[2]) is True
    assert seen == [arrive]


def lines(
    theirs: dict[str, Any] | None = None, **options: Any
) -> tuple[ByteStreamTransport, ByteStreamTransport]:
    """Return two ends of a pipe in memory, of which the first has options."""
    to_second, from_first = anyio.create_memory_object_stream[bytes](100)
    to_first, from_second = anyio.create_memory_object_stream[bytes](100)
    first = ByteStreamTransport(MemoryBytes(from_second, to_second), **options)
    return first, ByteStreamTransport(MemoryBytes(from_first, to_first), **(theirs or {}))
