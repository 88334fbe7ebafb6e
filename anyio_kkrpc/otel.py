"""Traces and metrics by OpenTelemetry. Needs the extra ``otel``, and an SDK to send them anywhere.

Names follow the semantic conventions for RPC; what those don't name begins with ``kkrpc``.
"""

from __future__ import annotations

import builtins
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any

try:
    from opentelemetry import context as otel_context
    from opentelemetry import metrics, propagate, trace
    from opentelemetry.metrics import (
        CallbackOptions,
        Meter,
        MeterProvider,
        Observation,
    )
    from opentelemetry.propagators.textmap import TextMapPropagator
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, TracerProvider
except ImportError as _error:
    raise ImportError(f"{_error.name} is missing: pip install 'anyio_kkrpc[otel]'") from _error

from ._calling._handle import CallHandle, read_metadata
from ._exceptions import DeliveryError, RemoteError, RPCError
from .middleware import CallNext, Invocation, Middleware, StreamEnd, is_stream

if TYPE_CHECKING:
    from .redis import RedisStatistics, RedisStreamsTransport

__all__ = ("observe", "reading", "tracing")

_NAME = "anyio_kkrpc"
# What `observe` was given, by meter provider; transports that are of no more use go by themselves.
_observed: weakref.WeakKeyDictionary[MeterProvider, weakref.WeakSet[RedisStreamsTransport]] = (
    weakref.WeakKeyDictionary()
)
_SYSTEM = "kkrpc"
# What the conventions call a method that isn't there, and an error of which too many have come.
_OTHER = "_OTHER"
# Names of errors that are told apart beside Python's own, and their characters: peers choose them.
_MOST_ERRORS = 100
_LONGEST_ERROR = 100
# Bounds in seconds that the conventions advise.
_BUCKETS = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]


def tracing(
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
    propagator: TextMapPropagator | None = None,
    link: bool = False,
    transport: RedisStreamsTransport | None = None,
) -> Middleware:
    """Return a middleware, for either side, that makes a span of each call and measures it.

    The context travels in the call's metadata (``traceparent``, ``tracestate``, ``baggage``), so
    that a call and what its handler calls are one trace, across Python and TypeScript peers. A
    call whose result is a stream ends with that; its span has ``kkrpc.stream.items`` and
    ``kkrpc.stream.outcome``. Beside the spans there are ``rpc.client.call.duration`` and
    ``rpc.server.call.duration`` in seconds, ``kkrpc.client.active_calls``,
    ``kkrpc.client.stream.items``, and the same for ``server``. Names that aren't there are
    ``_OTHER``, and so is an ``error.type`` of the other side's beyond Python's own and the first
    100 others.

    :param tracer_provider: the global one if not given
    :param meter_provider: the global one if not given
    :param propagator: the global one if not given
    :param link: at the serving side, begin a trace of its own that is linked to the caller's
    :param transport: adds ``server.address``, ``server.port``, ``messaging.system`` and
        ``messaging.destination.name`` to the spans, and where the stream has several shards
        ``messaging.destination.partition.id``, but for calls that ``route="spread"`` sends
    """
    about = {} if transport is None else _destination(transport)
    tracer = trace.get_tracer(_NAME, tracer_provider=tracer_provider)
    meter = metrics.get_meter(_NAME, meter_provider=meter_provider)
    return _Tracing(tracer, meter, propagator, about, transport, link=link).run


def _destination(transport: RedisStreamsTransport) -> dict[str, str | int]:
    """Return what is told about where the calls of a transport go."""
    address, port = transport.server_address
    about: dict[str, str | int] = {
        "messaging.system": "redis",
        "messaging.destination.name": transport.stream,
        "server.address": address,
    }
    if port is not None:
        about["server.port"] = port
    return about


@asynccontextmanager
async def reading(
    call: CallHandle[Any],
    *,
    tracer_provider: TracerProvider | None = None,
    propagator: TextMapPropagator | None = None,
) -> AsyncGenerator[Span, None]:
    """Make a span of what is done with a call that has a key, linked to the one that has made it.

    ``async with reading(call): await call.result()``, or a loop over its items. The span is called
    ``attach``, and has the key as ``kkrpc.key``. It is a part of the reader's own trace: the call
    may have been made by another process, days before. It has no link if the call was made without
    `tracing`, nor once the request is gone from the stream, or if this user may not read that.

    :param call: its handle
    :param tracer_provider: the global one if not given
    :param propagator: the global one if not given
    """
    made: Mapping[str, Any] = {}
    with suppress(RPCError):  # what is done within tells it
        made = await read_metadata(call)
    maker = _context_in(made, propagate.get_global_textmap() if propagator is None else propagator)
    span = trace.get_tracer(_NAME, tracer_provider=tracer_provider).start_span(
        "attach",
        kind=SpanKind.CLIENT,
        attributes={"rpc.system.name": _SYSTEM, "kkrpc.operation": "attach", "kkrpc.key": call.key},
        links=_links_to(maker),
    )
    token = otel_context.attach(trace.set_span_in_context(span))
    try:
        yield span
    except BaseException as exc:
        _fail(span, exc, type(exc).__name__ if isinstance(exc, Exception) else "cancelled")
        raise
    finally:
        otel_context.detach(token)
        span.end()


def _context_in(metadata: Mapping[str, Any], propagator: TextMapPropagator) -> otel_context.Context:
    """Return the context that metadata tell of."""
    return propagator.extract(_texts(metadata), context=otel_context.Context())


def _links_to(context: otel_context.Context) -> list[trace.Link] | None:
    """Return a link to the span of a context, if it has one."""
    found = trace.get_current_span(context).get_span_context()
    return [trace.Link(found)] if found.is_valid else None


class _Tracing:
    """Makes a span of each call, and measures it.

    :param about: what all spans tell
    :param transport: knows which shard a call goes to
    """

    def __init__(
        self,
        tracer: Tracer,
        meter: Meter,
        propagator: TextMapPropagator | None,
        about: dict[str, str | int],
        transport: RedisStreamsTransport | None,
        *,
        link: bool,
    ) -> None:
        self._transport = transport
        self._tracer, self._propagator, self._about, self._link = tracer, propagator, about, link
        errors = _ErrorNames()
        self._sides = {side: _Side(side, meter, errors) for side in ("client", "server")}

    async def run(self, call: Invocation, call_next: CallNext) -> Any:
        """Run a call within its span; this is the middleware."""
        side, attributes = call.side, _attributes(call)
        propagator = self._propagator
        if propagator is None:
            propagator = propagate.get_global_textmap()
        parent, links = self._caller(call, propagator) if side == "server" else (None, None)
        span = self._tracer.start_span(
            str(attributes["rpc.method"]),
            context=parent,
            kind=SpanKind.CLIENT if side == "client" else SpanKind.SERVER,
            attributes={**attributes, **self._about, **_details(call, self._transport)},
            links=links,
        )
        token = otel_context.attach(trace.set_span_in_context(span, parent))
        running = _Running(self._sides[side], span, attributes)
        try:
            if side == "client":
                propagator.inject(call.metadata)
            result = await call_next(call)
        except BaseException as exc:
            running.end(exc)
            raise
        finally:
            if side == "client":  # a handler's context is its own, and its stream goes on in it
                otel_context.detach(token)
        if is_stream(result):
            call.stream_ended.append(running.end_stream)
        else:
            running.end()
        return result

    def _caller(
        self, call: Invocation, propagator: TextMapPropagator
    ) -> tuple[otel_context.Context, list[trace.Link] | None]:
        """Return the parent of a handler's span, and what it is linked to if it has none."""
        parent = _context_in(call.metadata, propagator)
        if not self._link:
            return parent, None
        # The baggage stays, and the span has no parent.
        return trace.set_span_in_context(trace.INVALID_SPAN, parent), _links_to(parent)


class _ErrorNames:
    """What errors are called in measurements, where each name is kept for as long as they last."""

    def __init__(self) -> None:
        self._names = {
            name
            for name, one in vars(builtins).items()
            if isinstance(one, type) and issubclass(one, BaseException)
        }
        self._most = len(self._names) + _MOST_ERRORS

    def of(self, exc: BaseException) -> str:
        """Return the name of an error, or of all others if it is the other side's and too many."""
        if not isinstance(exc, Exception):
            return "cancelled"
        if not isinstance(exc, RemoteError):
            return type(exc).__name__
        name = exc.name
        if name in self._names:
            return name
        if len(self._names) >= self._most or len(name) > _LONGEST_ERROR:
            return _OTHER
        self._names.add(name)
        return name


class _Side:
    """The instruments of one side.

    :ivar errors: what errors are called
    """

    def __init__(self, side: str, meter: Meter, errors: _ErrorNames) -> None:
        self.errors = errors
        self.duration = meter.create_histogram(
            f"rpc.{side}.call.duration",
            unit="s",
            description="How long calls took.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self.active = meter.create_up_down_counter(
            f"kkrpc.{side}.active_calls", unit="{call}", description="Calls that run now."
        )
        self.items = meter.create_histogram(
            f"kkrpc.{side}.stream.items", unit="{item}", description="Items of each stream."
        )


class _Running:
    """A call that runs, or whose stream does."""

    def __init__(self, side: _Side, span: Span, attributes: dict[str, str | int]) -> None:
        self._side = side
        self._span = span
        self._attributes = attributes
        self._started = perf_counter()
        side.active.add(1, attributes)

    def end(self, error: BaseException | None = None) -> None:
        """Note that it is over."""
        outcome: dict[str, str | int] = {}
        if error is not None:
            outcome["error.type"] = kind = self._side.errors.of(error)
            _fail(self._span, error, kind)
        took = perf_counter() - self._started
        self._side.duration.record(took, {**self._attributes, **outcome})
        self._side.active.add(-1, self._attributes)
        self._span.end()

    def end_stream(self, end: StreamEnd) -> None:
        """Note that its stream is over."""
        self._side.items.record(end.items, self._attributes)
        self._span.set_attribute("kkrpc.stream.items", end.items)
        self._span.set_attribute("kkrpc.stream.outcome", end.outcome)
        lost = end.outcome == "lost" and end.error is None
        self.end(DeliveryError("the other side is gone") if lost else end.error)


def _attributes(call: Invocation) -> dict[str, str | int]:
    """Return what tells calls apart in measurements; names that peers make up are all one."""
    return {
        "rpc.system.name": _SYSTEM,
        "rpc.method": call.method if call.known else _OTHER,
        "kkrpc.operation": call.operation,
    }


def _details(call: Invocation, transport: RedisStreamsTransport | None) -> dict[str, str | int]:
    """Return what only the span of a call tells, and not its measurements.

    :param transport: knows which shard it goes to
    """
    details: dict[str, str | int] = {}
    if not call.known:
        details["rpc.method_original"] = call.method
    if call.peer is not None:
        details["kkrpc.peer"] = call.peer
    shard = None if transport is None else transport.shard_of(call.peer, call.shard_key)
    if shard is not None:
        details["messaging.destination.partition.id"] = str(shard)
    if call.attempt > 1:
        details["kkrpc.attempt"] = call.attempt
    return details


def _fail(span: Span, exc: BaseException, kind: str) -> None:
    """Note at a span why its call failed."""
    if isinstance(exc, Exception):
        span.record_exception(exc)
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, str(exc) if isinstance(exc, Exception) else kind))


def _texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return what a propagator may read: metadata is what a peer sent, and can be anything."""
    return {name: value for name, value in metadata.items() if isinstance(value, str)}


def observe(
    transport: RedisStreamsTransport, *, meter_provider: MeterProvider | None = None
) -> None:
    """Report what `RedisStreamsTransport.statistics` tells as metrics, while the transport is used.

    ``kkrpc.queue.depth`` (requests that wait here), ``kkrpc.queue.dropped``,
    ``kkrpc.outstanding``, ``kkrpc.claimed``, ``kkrpc.dead_lettered``, ``kkrpc.handed_back``,
    ``kkrpc.lost``, ``kkrpc.sent_again``, ``kkrpc.moved`` and ``kkrpc.reconnects``, each with the
    stream as ``messaging.destination.name``. Give it each transport that is to be seen.

    :param meter_provider: the global one if not given
    """
    provider = metrics.get_meter_provider() if meter_provider is None else meter_provider
    transports = _observed.get(provider)
    if transports is None:
        # An instrument is made once for a provider: a second one of its name isn't asked.
        transports = _observed[provider] = weakref.WeakSet()
        _make_instruments(metrics.get_meter(_NAME, meter_provider=provider), transports)
    transports.add(transport)


def _make_instruments(
    meter: metrics.Meter, transports: weakref.WeakSet[RedisStreamsTransport]
) -> None:
    def reading(
        read: Callable[[RedisStatistics], int],
    ) -> Callable[[CallbackOptions], Iterator[Observation]]:
        def callback(options: CallbackOptions) -> Iterator[Observation]:
            for transport in list(transports):
                attributes = {
                    "messaging.system": "redis",
                    "messaging.destination.name": transport.stream,
                    "kkrpc.session_id": transport.session_id,
                }
                yield Observation(read(transport.statistics()), attributes)

        return callback

    gauges: dict[str, Callable[[RedisStatistics], int]] = {
        "kkrpc.queue.depth": lambda s: s.queue.current_items,
        "kkrpc.outstanding": lambda s: s.outstanding,
    }
    counters: dict[str, Callable[[RedisStatistics], int]] = {
        "kkrpc.queue.dropped": lambda s: s.queue.dropped,
        "kkrpc.claimed": lambda s: s.claimed,
        "kkrpc.dead_lettered": lambda s: s.dead_lettered,
        "kkrpc.handed_back": lambda s: s.handed_back,
        "kkrpc.lost": lambda s: s.lost,
        "kkrpc.sent_again": lambda s: s.sent_again,
        "kkrpc.moved": lambda s: s.moved,
        "kkrpc.reconnects": lambda s: s.reconnects,
    }
    for name, read in gauges.items():
        meter.create_observable_gauge(name, [reading(read)], unit="{request}")
    for name, read in counters.items():
        unit = "{reconnect}" if name == "kkrpc.reconnects" else "{request}"
        meter.create_observable_counter(name, [reading(read)], unit=unit)
