"""Traces and metrics, read by the SDK's exporters in memory."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import count, pairwise
from typing import Any

import anyio
import pytest
import redis
from opentelemetry import baggage, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from anyio_kkrpc import (
    CallNotFoundError,
    MemoryTransport,
    MethodNotFoundError,
    RedisStreamsTransport,
    RemoteError,
    RPCChannel,
    RPCTimeoutError,
    RPCValidationError,
    current_call,
    with_call_options,
)
from anyio_kkrpc.abc import Transport
from anyio_kkrpc.otel import observe, reading, tracing
from anyio_kkrpc.redis._stream._places import home_of, shard_of_key
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.one_server]

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


class Api:
    def __init__(self) -> None:
        self.channel: RPCChannel
        self.started = anyio.Event()

    def add(self, a: int, b: int) -> int:
        return a + b

    async def add_twice(self, a: int) -> int:
        """Call the caller back."""
        return int(await self.channel.get_api(to=current_call().sender).add(a, a))

    def colour(self) -> Any:
        return baggage.get_baggage("colour")

    def fail(self) -> None:
        raise ValueError("no")

    async def sums(self, count: int) -> AsyncIterator[int]:
        """Call the caller back for each item."""
        for number in range(count):
            yield await self.channel.get_api(to=current_call().sender).add(number, number)

    async def broken_after(self, count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number
        raise ValueError("no")

    def fail_as(self, name: str) -> None:
        raise RemoteError(name, "no")

    async def break_as(self, name: str) -> AsyncIterator[int]:
        yield 1
        self.fail_as(name)

    async def sleep(self) -> None:
        self.started.set()
        await anyio.sleep_forever()


class Watched:
    """Two peers, and what they told OpenTelemetry."""

    def __init__(self, *, link: bool = False) -> None:
        self.exporter = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader])
        self.middleware = tracing(
            tracer_provider=self.tracers, meter_provider=self.meters, link=link
        )
        self.served = Api()

    @asynccontextmanager
    async def over(self, one: Transport, two: Transport) -> AsyncGenerator[Any, None]:
        async with (
            RPCChannel(one, expose=self.served, middleware=[self.middleware]) as served,
            RPCChannel(two, expose=Api(), middleware=[self.middleware]) as channel,
        ):
            self.served.channel = served
            self.channel = channel
            yield channel.get_api()
        self.tracers.shutdown()

    @asynccontextmanager
    async def in_memory(self) -> AsyncGenerator[Any, None]:
        one, two = MemoryTransport.pair(codec="json")
        async with one, two, self.over(one, two) as api:
            yield api

    def spans(self) -> Sequence[ReadableSpan]:
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def points(self, name: str) -> list[Any]:
        data = self.reader.get_metrics_data()
        if data is None:
            return []
        return [
            point
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


@pytest.mark.server
async def test_one_trace_across_peers(redis_server: RedisServer, stream_name: str) -> None:
    """A call, and the call back from inside its handler: each span is the next one's parent."""
    watched = Watched()
    async with (
        RedisStreamsTransport(redis_server.url, stream=stream_name) as one,
        RedisStreamsTransport(redis_server.url, stream=stream_name) as two,
        watched.over(one, two) as api,
    ):
        assert await api.add_twice(4) == 8
    spans = watched.spans()
    assert [(span.name, span.kind) for span in spans] == [
        ("add_twice", SpanKind.CLIENT),
        ("add_twice", SpanKind.SERVER),
        ("add", SpanKind.CLIENT),
        ("add", SpanKind.SERVER),
    ]
    assert len({trace_of(span) for span in spans}) == 1
    assert spans[0].parent is None
    for parent, child in pairwise(spans):
        assert child.parent is not None
        assert parent.context is not None
        assert child.parent.span_id == parent.context.span_id
    attributes = spans[2].attributes or {}
    assert attributes["rpc.system.name"] == "kkrpc"
    assert attributes["rpc.method"] == "add"
    assert attributes["kkrpc.peer"] == two.session_id


async def test_what_a_stream_calls_belongs_to_its_trace() -> None:
    """Each item's calls are children of the span of the call that made it."""
    watched = Watched()
    async with watched.in_memory() as api:
        assert [item async for item in api.sums(2)] == [0, 2]
    spans = watched.spans()
    assert [span.name for span in spans] == ["sums", "sums", "add", "add", "add", "add"]
    assert len({trace_of(span) for span in spans}) == 1


async def test_spans_of_streams_last_until_their_ends() -> None:
    """And tell how many items there were, and what went wrong."""
    watched = Watched()
    async with watched.in_memory() as api:
        numbers = await api.broken_after(2)
        assert watched.spans() == []
        assert [p.value for p in watched.points("kkrpc.server.active_calls")] == [1]
        with pytest.raises(RemoteError, match="no"):
            assert [item async for item in numbers] == []
        async with api.broken_after(1000) as numbers:
            assert await anext(numbers) == 0
        with anyio.fail_after(BOUND):
            while len(watched.spans()) < 4:
                await anyio.sleep(0.01)
        points = {
            (side, p.attributes.get("error.type")): p.count
            for side in ("client", "server")
            for p in watched.points(f"rpc.{side}.call.duration")
        }
        items = watched.points("kkrpc.client.stream.items")
    found = [dict(span.attributes or {}) for span in watched.spans()]
    failed = [one for one in found if one.get("error.type") == "ValueError"]
    left = [one for one in found if "error.type" not in one]
    assert [one["kkrpc.stream.items"] for one in failed] == [2, 2]
    assert {one["kkrpc.stream.outcome"] for one in failed} == {"failed"}
    assert [one["kkrpc.stream.outcome"] for one in left] == ["left", "left"]
    assert points == {
        (side, error): 1 for side in ("client", "server") for error in ("ValueError", None)
    }
    assert sum(p.count for p in items) == 2
    assert all(p.value == 0 for p in watched.points("kkrpc.server.active_calls"))


async def test_names_that_are_not_there() -> None:
    """They don't make metrics grow; a refused call has a span at the serving side, too."""
    watched = Watched()
    async with watched.in_memory() as api:
        for name in ("made_up", "another"):
            with pytest.raises(MethodNotFoundError):
                await api[name]()
        with pytest.raises(RPCValidationError):
            await api.add("x", 1)
    server = [span for span in watched.spans() if span.kind is SpanKind.SERVER]
    assert [span.name for span in server] == ["_OTHER", "_OTHER", "add"]
    assert (server[0].attributes or {})["rpc.method_original"] == "made_up"
    assert [(span.attributes or {})["error.type"] for span in server] == [
        *["MethodNotFoundError"] * 2,
        "RPCValidationError",
    ]
    points = watched.points("rpc.server.call.duration")
    assert {p.attributes["rpc.method"]: p.count for p in points} == {"_OTHER": 2, "add": 1}


async def test_errors_that_peers_make_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many names they have, of calls and of streams, few are kept; known ones stay."""
    monkeypatch.setattr("anyio_kkrpc.otel._MOST_ERRORS", 5)
    watched = Watched()
    async with watched.in_memory() as api:
        names = ["first", "x" * 101, *(f"made-up-{number}" for number in range(10))]
        for name in (*names, "first", "KeyError"):
            with pytest.raises(RemoteError):
                await api.fail_as(name)
            async with await api.break_as(name) as stream:
                with pytest.raises(RemoteError):
                    assert [item async for item in stream] == []
    for side in ("client", "server"):
        for method in ("fail_as", "break_as"):
            counts = {
                point.attributes["error.type"]: point.count
                for point in watched.points(f"rpc.{side}.call.duration")
                if point.attributes["rpc.method"] == method
            }
            assert len(counts) == 7
            assert (counts["first"], counts["KeyError"]) == (2, 1)
            assert counts["made-up-3"] == 1
            assert counts["_OTHER"] == 7
    told = {
        str(span.status.description): (span.attributes or {})["error.type"]
        for span in watched.spans()
    }
    assert told["made-up-3: no"] == "made-up-3"
    assert told["made-up-9: no"] == "_OTHER"


async def test_broadcast_is_part_of_the_trace() -> None:
    """Those who answer belong to the trace of who asks."""
    watched = Watched()
    async with watched.in_memory() as api:
        replies = watched.channel.broadcast(api.add(1, 2), timeout=CALL_BOUND, limit=1)
        assert [reply.result() async for reply in replies] == [3]
    spans = watched.spans()
    assert [(span.name, span.kind) for span in spans] == [
        ("add", SpanKind.CLIENT),
        ("add", SpanKind.SERVER),
    ]
    assert (spans[0].attributes or {})["kkrpc.operation"] == "broadcast"
    assert len({trace_of(span) for span in spans}) == 1


async def test_a_foreign_trace_goes_on() -> None:
    """As a TypeScript peer would send it; the propagator of this side overwrites it otherwise."""
    watched = Watched()
    one, two = MemoryTransport.pair(codec="json")
    async with (
        one,
        two,
        RPCChannel(one, expose=Api(), middleware=[watched.middleware]),
        RPCChannel(two) as channel,
    ):
        metadata = {"traceparent": TRACEPARENT, "baggage": "colour=green"}
        api = with_call_options(channel.get_api(), metadata=metadata)
        assert await api.colour() == "green"
        assert await with_call_options(api, metadata={}).colour() is None
    first, second = watched.spans()
    assert trace_of(first) == TRACE
    assert trace_of(second) != TRACE
    assert second.parent is None


async def test_link() -> None:
    """The serving side's trace is its own, and names the caller's."""
    watched = Watched(link=True)
    async with watched.in_memory() as api:
        assert await api.add(1, 2) == 3
    client, server = watched.spans()
    assert trace_of(client) != trace_of(server)
    (link,) = server.links
    assert client.context is not None
    assert link.context.span_id == client.context.span_id
    assert server.parent is None


async def read_by_key(watched: Watched, reader: RPCChannel) -> None:
    """Start calls, and read them at another channel: each span is linked to who has started it."""
    api, read = watched.channel.get_api(), partial(reading, tracer_provider=watched.tracers)
    await watched.channel.start(api.add(1, 2), key="sum")
    await watched.channel.start(api.broken_after(2), key="numbers")
    async with read(reader.attach("sum")) as span:
        assert await reader.attach("sum").result() == 3
    with pytest.raises(RemoteError, match="no"):
        async with read(reader.attach("numbers")):
            assert [item.value async for item in reader.attach("numbers").items()] == [0, 1]
    with pytest.raises(CallNotFoundError):
        async with read(reader.attach("none")) as none:
            await reader.attach("none").result()
    made = {
        one.name: one.context.span_id
        for one in watched.spans()
        if one.context is not None and one.kind is SpanKind.CLIENT and one.name != "attach"
    }
    first, second, third = (one for one in watched.spans() if one.name == "attach")
    assert [link.context.span_id for link in first.links] == [made["add"]]
    assert [link.context.span_id for link in second.links] == [made["broken_after"]]
    assert not third.links
    assert first.attributes is not None
    assert first.attributes["kkrpc.key"] == "sum"
    assert [one.status.is_ok for one in (first, second, third)] == [True, False, False]
    assert first.context == span.get_span_context()
    assert third.context == none.get_span_context()


async def test_readers_of_calls_with_keys_in_memory() -> None:
    watched = Watched()
    async with watched.in_memory():
        await read_by_key(watched, watched.channel)


@pytest.mark.server
async def test_readers_of_calls_with_keys(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Also those in other processes; when the request is gone from the stream there is no link."""
    watched = Watched()
    make = partial(
        RedisStreamsTransport, redis_server.url, stream=stream_name, use_consumer_group=True
    )
    async with (
        make() as one,
        make() as two,
        make() as three,
        RPCChannel(three) as reader,
        watched.over(one, two),
    ):
        await read_by_key(watched, reader)
        witness.xtrim(stream_name, maxlen=0)
        async with reading(reader.attach("sum"), tracer_provider=watched.tracers):
            assert await reader.attach("sum").result() == 3
        assert not watched.spans()[-1].links


@pytest.mark.parametrize(
    "metadata",
    [
        {"traceparent": 5, "tracestate": ["x"], "baggage": {"a": 1}},
        {"traceparent": "00-zz", "baggage": "=;=;" * 1000},
        {"traceparent": "x" * 10_000},
    ],
)
async def test_damaged_metadata_does_no_harm(metadata: dict[str, Any]) -> None:
    """It's a call without a trace."""
    watched = Watched()
    one, two = MemoryTransport.pair(codec="json")
    async with (
        one,
        two,
        RPCChannel(one, expose=Api(), middleware=[watched.middleware]),
        RPCChannel(two) as channel,
    ):
        assert await with_call_options(channel.get_api(), metadata=metadata).add(1, 2) == 3
    (span,) = watched.spans()
    assert span.parent is None


async def test_errors_and_cancellation() -> None:
    """Both sides' spans say what went wrong, and the metrics count it."""
    watched = Watched()
    async with watched.in_memory() as api:
        with pytest.raises(RemoteError, match="no"):
            await api.fail()
        async with anyio.create_task_group() as group:
            group.start_soon(api.sleep)
            await watched.served.started.wait()
            assert sum(p.value for p in watched.points("kkrpc.server.active_calls")) == 1
            group.cancel_scope.cancel()
        assert await api.add(1, 2) == 3
    spans = watched.spans()
    found = [(span.name, (span.attributes or {}).get("error.type")) for span in spans]
    assert found == [
        ("fail", "ValueError"),
        ("fail", "ValueError"),
        ("sleep", "cancelled"),
        ("sleep", "cancelled"),
        ("add", None),
        ("add", None),
    ]
    assert not spans[0].status.is_ok
    assert spans[4].status.is_ok or spans[4].status.is_unset
    for side in ("client", "server"):
        points = watched.points(f"rpc.{side}.call.duration")
        assert {
            (p.attributes["rpc.method"], p.attributes.get("error.type")): p.count for p in points
        } == {
            ("fail", "ValueError"): 1,
            ("sleep", "cancelled"): 1,
            ("add", None): 1,
        }
        assert all(p.value == 0 for p in watched.points(f"kkrpc.{side}.active_calls"))
    assert trace.get_current_span() is trace.INVALID_SPAN


@pytest.mark.server
@pytest.mark.parametrize("unix", [False, True])
async def test_where_calls_go(redis_server: RedisServer, stream_name: str, unix: bool) -> None:
    """Spans say which server and stream, if the transport is given."""
    watched = Watched()
    url = redis_server.unix_url if unix else redis_server.url
    async with RedisStreamsTransport(url, stream=stream_name) as transport:
        middleware = tracing(tracer_provider=watched.tracers, transport=transport)
        async with RPCChannel(transport, middleware=[middleware], timeout=0.01) as channel:
            with pytest.raises(RPCTimeoutError):
                await channel.get_api().nobody()
    (span,) = watched.spans()
    attributes = dict(span.attributes or {})
    assert attributes["messaging.system"] == "redis"
    assert attributes["messaging.destination.name"] == stream_name
    if unix:
        assert str(attributes["server.address"]).endswith("redis.sock")
        assert "server.port" not in attributes
    else:
        assert (attributes["server.address"], attributes["server.port"]) == (
            "127.0.0.1",
            redis_server.port,
        )


@pytest.mark.server
@pytest.mark.one_server
async def test_shards(redis_server: RedisServer, stream_name: str) -> None:
    """Spans of handlers say by which shard the call came."""
    watched = Watched()
    options: dict[str, Any] = {"stream": stream_name, "shards": 4, "use_consumer_group": True}
    keys = {shard_of_key(f"k{number}", 4): f"k{number}" for number in range(50)}
    async with (
        RedisStreamsTransport(redis_server.url, **options) as serving,
        RedisStreamsTransport(redis_server.url, **options) as using,
    ):
        middleware = tracing(tracer_provider=watched.tracers, transport=serving)
        async with (
            RPCChannel(serving, expose={"f": lambda: None}, middleware=[middleware]),
            RPCChannel(using, timeout=CALL_BOUND) as channel,
        ):
            for shard in range(4):
                await with_call_options(channel.get_api(), shard_key=keys[shard]).f()
    found = [dict(span.attributes or {}) for span in watched.spans()]
    name = "messaging.destination.partition.id"
    assert [attributes[name] for attributes in found] == ["0", "1", "2", "3"]


@pytest.mark.server
@pytest.mark.one_server
async def test_the_shard_of_a_call(redis_server: RedisServer, stream_name: str) -> None:
    """Spans of calls tell it: of the key, of the peer, or where this peer's calls go now."""
    watched, shards = Watched(), 4
    options: Any = {"stream": stream_name, "use_consumer_group": True, "shards": shards}
    key = next(f"k{n}" for n in count() if shard_of_key(f"k{n}", shards) == 3)
    me = next(f"p{n}" for n in count() if home_of(f"p{n}", shards) == 1)
    async with (
        RedisStreamsTransport(redis_server.url, **options, session_id="served") as serving,
        RedisStreamsTransport(redis_server.url, **options, session_id=me) as using,
        RPCChannel(serving, expose={"f": lambda: None}),
    ):
        middleware = tracing(tracer_provider=watched.tracers, transport=using)
        async with RPCChannel(using, middleware=[middleware], timeout=CALL_BOUND) as channel:
            api = channel.get_api()
            await api.f()
            await with_call_options(api, shard_key=key).f()
            await with_call_options(api, key=key).f()
            await channel.get_api(to="served@2").f()
            await channel.start(api.f(), key=f"{key} ")
            using._shards._home.leave_behind(2)  # type: ignore[union-attr]
            await api.f()
    name, last = "messaging.destination.partition.id", shard_of_key(f"{key} ", shards)
    told = [(span.attributes or {}).get(name) for span in watched.spans()]
    assert told == ["1", "3", "3", "2", str(last), "2"]


@pytest.mark.server
async def test_statistics(redis_server: RedisServer, stream_name: str) -> None:
    """What the transport counts is reported, and the transport isn't kept alive."""
    watched = Watched()
    transport = RedisStreamsTransport(redis_server.url, stream=stream_name, max_queue_size=2)
    async with transport, RedisStreamsTransport(redis_server.url, stream=stream_name) as used:
        observe(transport, meter_provider=watched.meters)
        observe(used, meter_provider=watched.meters)
        async with (
            RPCChannel(transport, expose=watched.served, max_concurrency=1),
            RPCChannel(used, timeout=CALL_BOUND) as channel,
        ):
            api = with_call_options(channel.get_api(), reply=False)
            await api.sleep()
            await watched.served.started.wait()
            for _ in range(5):
                await api.sleep()
            with anyio.fail_after(BOUND):
                while transport.statistics().queue.dropped < 3:
                    await anyio.sleep(0.01)
            depths = {
                point.attributes["kkrpc.session_id"]: point
                for point in watched.points("kkrpc.queue.depth")
            }
            assert {name: point.value for name, point in depths.items()} == {
                transport.session_id: 2,
                used.session_id: 0,
            }
            for point in depths.values():
                assert point.attributes["messaging.destination.name"] == stream_name
            assert sorted(p.value for p in watched.points("kkrpc.queue.dropped")) == [0, 3]
            assert [p.value for p in watched.points("kkrpc.reconnects")] == [0, 0]
    del transport
    gc.collect()

    def observed() -> list[str]:
        points = watched.points("kkrpc.queue.depth")
        return [point.attributes["kkrpc.session_id"] for point in points]

    assert observed() == [used.session_id]
    async with RedisStreamsTransport(redis_server.url, stream=stream_name) as next_one:
        observe(next_one, meter_provider=watched.meters)
        assert sorted(observed()) == sorted([used.session_id, next_one.session_id])
