"""What type checkers see of a proxy. mypy and pyright check this file; nothing runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from msgspec import Struct
from typing_extensions import assert_type

from anyio_kkrpc import (
    Callback,
    CallInfo,
    ChannelStatistics,
    MemoryTransport,
    RedisStreamsTransport,
    RemoteStream,
    Replies,
    RPCChannel,
    current_call,
    with_call_options,
)
from anyio_kkrpc.middleware import CallNext, Invocation, Middleware, access_log, retry
from anyio_kkrpc.redis import RedisStatistics, StreamEntry, StreamInfo


class Point(Struct):
    """A value that travels."""

    x: int
    y: int


class Math(Protocol):
    """A nested object."""

    async def add(self, a: int, b: int) -> int: ...

    @property
    def zero(self) -> Awaitable[int]: ...


class Api(Protocol):
    """A remote API as its users describe it."""

    math: Math
    counter: Awaitable[int]

    async def greet(self, name: str, *, loud: bool = False) -> str: ...

    async def middle(self, a: Point, b: Point) -> Point: ...

    async def with_progress(self, steps: int, on_step: Callable[[int], object]) -> list[int]: ...

    async def with_points(
        self, on_point: Callback[[Point]], done: Callback[[]] | None = None
    ) -> None: ...

    def count_to(self, end: int) -> AsyncIterator[int]: ...


async def check_typed(channel: RPCChannel) -> None:
    """A Protocol's annotations come through."""
    api = channel.get_api(Api)
    assert_type(api, Api)
    assert_type(channel.get_api(Api, to="worker-7"), Api)
    assert_type(await api.greet("a", loud=True), str)
    assert_type(await api.middle(Point(1, 2), Point(3, 4)), Point)
    assert_type(await api.math.add(1, 2), int)
    assert_type(await api.math.zero, int)
    assert_type(await api.counter, int)
    assert_type(await api.with_progress(3, print), list[int])
    async for item in api.count_to(5):
        assert_type(item, int)
    assert_type(with_call_options(api, timeout=1.5), Api)
    assert_type(with_call_options(api, timeout=None, metadata={"a": 1}), Api)


def take(point: Point) -> None: ...


async def take_later(point: Point) -> None: ...


async def check_callbacks(channel: RPCChannel) -> None:
    """Synchronous or asynchronous, with or without a result."""
    api, points = channel.get_api(Api), list[Point]()
    await api.with_points(points.append)
    await api.with_points(lambda point: print(point.x))
    await api.with_points(lambda point: points.append(point), lambda: None)
    await api.with_points(take)
    await api.with_points(take_later, done=points.clear)
    await api.with_points(print)
    await api.with_points(len)  # type: ignore[arg-type]
    await api.with_points(lambda point: print(point.z))  # type: ignore[attr-defined]
    await api.with_points(lambda: None)  # type: ignore[misc,arg-type]


async def check_mistakes(channel: RPCChannel) -> None:
    """Mistakes are seen: an ignore that isn't needed is an error too."""
    api = channel.get_api(Api)
    await api.greet(1)  # type: ignore[arg-type]
    await api.great("a")  # type: ignore[attr-defined]
    await api.math.add("1", 2)  # type: ignore[arg-type]
    with_call_options(api, time_out=1)  # type: ignore[call-arg]


async def check_untyped(channel: RPCChannel) -> None:
    """Without a Protocol everything is allowed."""
    api = channel.get_api()
    assert_type(api, Any)
    assert_type(await api.any.name["at all"](1, a=2), Any)
    assert_type(await channel.construct("Counter", 5, step=2), Any)
    await channel.set_property("settings.theme", "dark")
    await channel.set_property(["settings", "a.b"], 1)


async def check_channel(transport: MemoryTransport) -> None:
    """Context managers give what they are."""
    async with transport as entered, RPCChannel(entered, expose=object()) as channel:
        assert_type(entered, MemoryTransport)
        assert_type(channel, RPCChannel)
        assert_type(channel.statistics(), ChannelStatistics)
    assert_type(MemoryTransport.pair(), tuple[MemoryTransport, MemoryTransport])
    assert_type(current_call(), CallInfo)


async def check_redis() -> None:
    """The transport for Redis is seen through the lazy name."""
    async with RedisStreamsTransport("redis://localhost", max_len=10) as transport:
        assert_type(transport, RedisStreamsTransport)
        assert_type(await transport.get_stream_info(), StreamInfo)
        assert_type(await transport.trim_stream(3), int)
        assert_type(await transport.get_all_entries(), list[StreamEntry])
        assert_type(transport.statistics(), RedisStatistics)
        assert_type(transport.session_id, str)


class Streaming(Protocol):
    """A stream may be described as a context manager, so that it is closed on exit."""

    def lines(self) -> AbstractAsyncContextManager[AsyncIterator[str]]: ...


async def check_stream(channel: RPCChannel) -> None:
    """Items keep their type through a context manager."""
    async with channel.get_api(Streaming).lines() as lines:
        async for line in lines:
            assert_type(line, str)


class Both(Protocol):
    """Or as what it is, which can be iterated over and closed on exit."""

    def lines(self) -> RemoteStream[str]: ...


async def check_remote_stream(channel: RPCChannel) -> None:
    """Items keep their type in both ways."""
    api = channel.get_api(Both)
    async for line in api.lines():
        assert_type(line, str)
    async with api.lines() as lines:
        assert_type([line async for line in lines], list[str])


async def check_broadcast(channel: RPCChannel) -> None:
    """Answers have the type of what was asked."""
    api = channel.get_api(Math)
    replies = channel.broadcast(api.add(1, 2), timeout=0.5)
    assert_type(replies, Replies[int])
    async for reply in replies:
        assert_type(reply.result(), int)
        assert_type(reply.value, int | None)


async def check_middleware(call: Invocation, call_next: CallNext) -> Any:
    """A function with this signature is one."""
    assert_type(call.args, list[Any])
    return await call_next(call)


MIDDLEWARE: list[Middleware] = [check_middleware, retry(3), access_log()]
