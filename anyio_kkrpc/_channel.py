"""The channel: drives the protocol core over a transport, and owns every task of it."""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import Any, TypeVar, final, overload
from weakref import WeakSet

import anyio
from anyio import (
    AsyncContextManagerMixin,
    EndOfStream,
    Event,
    current_time,
    move_on_after,
)
from anyio.abc import TaskGroup
from msgspec import UNSET, Struct
from msgspec.structs import replace

from ._callbacks import CallbackRunner, RemoteCallback
from ._context import _current
from ._entrance import Entrance
from ._errors_wire import error_from_wire
from ._exceptions import (
    ProtocolError,
    RPCError,
    RPCTimeoutError,
    TransportClosedError,
)
from ._exposure import Exposed
from ._exposure import expose as build_table
from ._gathering import Replies
from ._groups import lone_error
from ._loop import OneShot, clock, one_shots
from ._outbox import Outbox
from ._protocol._calls import Call
from ._protocol._events import (
    Answer,
    CallbackInvoked,
    CallbacksReleased,
    CallFinished,
    HandlingCancelled,
    PeerLeft,
    PeerReplied,
    StreamEnded,
    StreamFailed,
    StreamItem,
    StreamLeft,
    StreamPulled,
)
from ._protocol._peer import Operation, Peer
from ._protocol._records import Cancel, Record, Reply, Request
from ._protocol._state import CallInput, CallState
from ._protocol._streams import Consumer, Producer
from ._proxy import CallOptions, RemoteAPI, RemoteCall, check_timeout
from ._pump import Outlet, Pump, close_unopened
from ._serving import Server
from ._streaming import Inflow, RemoteStream, stream_error
from ._timer import Timer
from ._typing import NO_TYPES, TypesOf
from .abc import Envelope, Listener, Transport
from .middleware import Invocation, Middleware, check_middleware, pass_through

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

__all__ = ("ChannelStatistics", "RPCChannel")

P = TypeVar("P")
T = TypeVar("T")
logger = logging.getLogger("anyio_kkrpc")

# How long, in seconds, closing may take to tell the other side.
CLOSE_TIMEOUT = 2.0
DEFAULT_TIMEOUT = 30.0
DEFAULT_CONCURRENCY = 100
_OPTIONS = CallOptions()
# Transports that a channel listens to.
_USED: WeakSet[Transport] = WeakSet()


class ChannelStatistics(Struct, frozen=True):
    """What a channel holds and has seen.

    :ivar calls: calls of this side that wait for their answer
    :ivar handlers: requests that run here
    :ivar callbacks: functions that the other side may call
    :ivar incoming_streams: streams that this side reads
    :ivar outgoing_streams: streams that the other side reads
    :ivar served: requests finished here
    :ivar expired: requests that were out of time when they came, and were not started
    :ivar refused: records that were not legal, and were skipped
    :ivar ignored: records that came too late to matter
    :ivar undelivered: records of this side that the transport gave back
    """

    calls: int
    handlers: int
    callbacks: int
    incoming_streams: int
    outgoing_streams: int
    served: int
    expired: int
    refused: int
    ignored: int
    undelivered: int


@final
class RPCChannel(AsyncContextManagerMixin, Listener):
    """Calls what the other side exposes, and serves what this side exposes, over one transport.

    It is an async context manager that owns every task. When it is left, calls that wait fail with
    `TransportClosedError`, handlers are cancelled, and streams and callbacks are released. A single
    exception that leaves its body arrives as itself, not in an exception group. The channel doesn't
    close the transport; whoever entered that does.

    :param transport: an entered transport that no other channel uses
    :param expose: what the other side may reach: an object, a module, a dict, or the table that
        `expose` made of one; ``None`` for nothing
    :param timeout: seconds that a call waits for its result and a stream for its next item, unless
        `with_call_options` says otherwise; ``None`` for ever
    :param max_concurrency: how many requests of other peers run at once; more of them wait in the
        transport's queue
    :param send_tracebacks: whether errors carry the handler's traceback to the caller
    :param grace_period: seconds that handlers have to finish when the channel is left or cancelled,
        before they are cancelled; no further requests are taken meanwhile
    :param middleware: functions around each call that is made and each that is served, see
        `anyio_kkrpc.middleware`; the first one is the outermost
    """

    def __init__(
        self,
        transport: Transport,
        *,
        expose: object = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        max_concurrency: int = DEFAULT_CONCURRENCY,
        send_tracebacks: bool = False,
        grace_period: float = 0.0,
        middleware: Sequence[Middleware] = (),
    ) -> None:
        if not isinstance(transport, Transport):
            raise TypeError(f"transport: needs a Transport, not {transport!r:.80}")
        check_timeout(timeout)
        if isinstance(max_concurrency, bool) or not isinstance(max_concurrency, int):
            raise TypeError(f"max_concurrency: needs an int, not {max_concurrency!r}")
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency: must be at least 1, not {max_concurrency}")
        if isinstance(grace_period, bool) or not isinstance(grace_period, (int, float)):
            raise TypeError(f"grace_period: needs seconds, not {grace_period!r}")
        if not 0 <= grace_period < 1e7:
            raise ValueError(f"grace_period: must not be negative, not {grace_period}")
        self._entrance = Entrance("RPCChannel")
        self._middleware = check_middleware(middleware)
        self._transport = transport
        self._grace = grace_period
        self._timeout = timeout
        many = transport.capabilities.broadcast
        self._peer = Peer(secrets.token_hex(8) + "-", self._make_callback, broadcast=many)
        self._outbox = Outbox(self._peer, transport)
        self._post = self._outbox.post
        self._abandon_stream = self._outbox.abandon
        self._release_callback = self._outbox.release
        self._timer = Timer()
        self._now: Callable[[], float] = current_time
        self._one_shot: Callable[[], OneShot] = Event
        self._outlet = Outlet(
            self._peer, self._timer, self._send, transport.send, self._start_if, send_tracebacks
        )
        self._server: Server | None = None
        if expose is not None:
            self._server = self._make_server(expose, max_concurrency)
        self._group: TaskGroup | None = None
        self._reason: Exception | None = None
        self._ended = Event()
        self._refused = self._undelivered = 0

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self, None]:
        self._entrance.enter()
        if self._transport in _USED:
            raise RuntimeError("another channel uses this transport; each needs one of its own")
        self._now, self._one_shot = clock(), one_shots()
        self._outbox.open()
        _USED.add(self._transport)
        with lone_error():
            async with anyio.create_task_group() as self._group:
                try:
                    self._group.start_soon(self._timer.run, name="anyio_kkrpc deadlines")
                    self._group.start_soon(self._outbox.run, name="anyio_kkrpc outbox")
                    if self._server is not None:
                        self._group.start_soon(self._server.run, name="anyio_kkrpc server")
                    serve = 0 if self._server is None else self._server.crew.limit
                    self._transport.listen(self, serve=serve)
                    yield self
                finally:
                    if self._server is not None:
                        if self._grace and self._reason is None:
                            self._transport.listen(self, serve=0)
                            await self._server.crew.drain(self._grace)
                        self._server.crew.cancel()
                    await self._say_goodbye()
                    self._end(TransportClosedError("the RPC channel has been closed"))
                    self._transport.listen(None)
                    _USED.discard(self._transport)
                    self._group.cancel_scope.cancel()

    # Public

    @overload
    def get_api(self, protocol: None = None, *, to: str | None = None) -> Any: ...

    # Not type[P]: mypy refuses a Protocol class there, since it is abstract.
    @overload
    def get_api(self, protocol: Callable[..., P], *, to: str | None = None) -> P: ...

    def get_api(self, protocol: Any = None, *, to: str | None = None) -> Any:
        """Return a proxy of what the other side exposes. It does no I/O.

        :param protocol: a `typing.Protocol` class that describes it: type checkers see its methods,
            and results are converted to its annotations
        :param to: id of the peer that is to serve the calls; any peer if not given
        :raises ValueError: if ``to`` is given and the transport can't address peers
        """
        if to is not None and not self._transport.capabilities.addressing:
            raise ValueError("to: this transport has one peer only")
        types = NO_TYPES if protocol is None else TypesOf(protocol)
        return RemoteAPI(self, (), CallOptions(to=to), types)

    async def set_property(
        self, name: str | Sequence[str], value: Any, *, to: str | None = None
    ) -> None:
        """Set a property that the other side made writable, and wait until it is set.

        :param name: dotted name, or its segments if one of them has a dot
        :param to: id of the peer, any if not given
        :raises MethodNotFoundError: if there is none such, or it isn't writable
        :raises RPCValidationError: if the value doesn't fit its annotation
        """
        await self._ask("set", _path(name), CallOptions(to=to), value=value)

    async def construct(
        self, name: str | Sequence[str], /, *args: Any, to: str | None = None, **kwargs: Any
    ) -> Any:
        """Make an instance of a class that the other side exposes; return its public fields.

        :param name: dotted name, or its segments if one of them has a dot
        :param to: id of the peer, any if not given
        :raises MethodNotFoundError: if there is no such class
        """
        return await self._ask("new", _path(name), CallOptions(to=to), args=args, kwargs=kwargs)

    def broadcast(
        self, question: Awaitable[T], *, timeout: float = 1.0, limit: int | None = None
    ) -> Replies[T]:
        """Ask all peers, and return what iterates over their answers as they come.

        ``async for reply in channel.broadcast(api.health()): print(reply.sender, reply.result())``.
        Each peer in broadcast mode answers, and one worker of each consumer group. Peers that don't
        have the method stay silent in broadcast mode. Middleware sees the question being sent, as
        operation ``"broadcast"`` without a result.

        :param question: a call of a proxy from `get_api` that wasn't awaited
        :param timeout: seconds to wait for answers
        :param limit: how many answers are enough; as many as come if not given
        :raises TypeError: if ``question`` isn't such a call
        :raises ValueError: if a number is out of range
        """
        if not isinstance(question, RemoteCall) or question._proxy._rpc_channel is not self:
            raise TypeError(f"question: needs a call of this channel, not {question!r:.80}")
        if timeout is None:
            raise ValueError("timeout: must be given, since nobody knows how many will answer")
        check_timeout(timeout)
        if limit is not None and (
            isinstance(limit, bool) or not isinstance(limit, int) or limit < 1
        ):
            raise ValueError(f"limit: must be an int of at least 1, not {limit!r}")
        question._take()
        return Replies(self, question, timeout, limit)

    async def serve_forever(self) -> None:
        """Wait until the channel ends.

        Returns when it was closed, when the peer ended it, and on a destroy signal.

        :raises TransportConnectionError: if the transport broke
        """
        await self._ended.wait()
        if not isinstance(self._reason, (TransportClosedError, EndOfStream)):
            raise self._closed_error()

    @property
    def closed(self) -> bool:
        """Whether it is of no more use: left, ended by its peer or a destroy signal, or broken."""
        return self._reason is not None

    def statistics(self) -> ChannelStatistics:
        """Return what the channel holds now and has seen."""
        peer, server = self._peer, self._server
        return ChannelStatistics(
            calls=len(peer.calls),
            handlers=len(peer.handlings),
            callbacks=len(peer.callbacks),
            incoming_streams=len(peer.consumers),
            outgoing_streams=len(peer.producers),
            served=0 if server is None else server.served,
            expired=0 if server is None else server.expired,
            refused=self._refused,
            ignored=peer.ignored,
            undelivered=self._undelivered,
        )

    # Calls

    def _ask(
        self, op: Operation, path: list[str], options: CallOptions, **what: Any
    ) -> Coroutine[Any, Any, Any]:
        """Make a request, through the middleware if there is any."""
        return (self._intercept if self._middleware else self._request)(op, path, options, **what)

    async def _intercept(
        self,
        op: Operation,
        path: list[str],
        options: CallOptions = _OPTIONS,
        *,
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        value: Any = UNSET,
        convert: Callable[[Any], Any] | None = None,
    ) -> Any:
        call = Invocation(
            side="client",
            operation=op,
            method=".".join(path),
            args=list(args) if value is UNSET else [value],
            kwargs=dict(kwargs or {}),
            metadata=dict(options.metadata or {}),
            peer=options.to,
            idempotent=options.idempotent,
        )

        async def last(call: Invocation) -> Any:
            changed = replace(options, metadata=call.metadata or None)
            if op == "set":
                return await self._request(op, path, changed, value=call.args[0])
            if op == "get":
                result = await self._request(op, path, changed)
            else:
                result = await self._request(op, path, changed, args=call.args, kwargs=call.kwargs)
            return result if convert is None else convert(result)

        return await pass_through(self._middleware, call, last)

    async def _request(
        self,
        op: Operation,
        path: list[str],
        options: CallOptions = _OPTIONS,
        *,
        args: Iterable[Any] | None = None,
        kwargs: dict[str, Any] | None = None,
        value: Any = UNSET,
    ) -> Any:
        if self._reason is not None or self._group is None:
            raise self._closed_error()
        timeout = self._timeout if options.timeout is UNSET else options.timeout
        now = self._now()
        deadline: float | None = None if timeout is None else now + timeout
        serving = _current.get()
        if serving is not None and serving.deadline is not None:
            deadline = serving.deadline if deadline is None else min(deadline, serving.deadline)
        budget: int | None = None
        if deadline is not None:
            left = deadline - now
            if left <= 0:
                raise _timed_out(path, timeout)
            budget = max(int(left * 1000), 1)
        call, request = self._peer.call(
            op,
            path,
            options.to,
            args=args,
            kwargs=kwargs,
            value=value,
            budget=budget,
            one_way=not options.reply,
            meta=options.metadata,
        )
        for producer in call.producers or ():
            Pump(self._outlet, producer, copy_context())
        envelope = call.sent = Envelope(request, None, options.to, deadline=deadline)
        if not options.reply:
            with move_on_after(None if deadline is None else deadline - current_time()) as scope:
                await self._transport.send(envelope)
            if scope.cancelled_caught:
                raise _timed_out(path, timeout)
            return None
        answered = call.handle = self._one_shot()
        timer = None
        if deadline is not None:
            timer = self._timer.at(deadline, lambda: self._expire(call))
        lent = serving is not None and self._server is not None
        if lent:
            self._server.lend()  # type: ignore[union-attr]
        try:
            await self._transport.send(envelope)
            await answered.wait()
        except BaseException as exc:
            self._give_up(call, not isinstance(exc, (TypeError, RPCError)))
            raise
        finally:
            if lent:
                self._server.take_back()  # type: ignore[union-attr]
            if timer is not None:
                timer.cancel()
        if call.state is CallState.ANSWERED:
            if call.callbacks:
                await self._wait_for_callbacks(call, deadline)
            result = call.value
            if isinstance(result, Inflow):
                return RemoteStream(result)
            return result
        if call.state is CallState.FAILED:
            assert call.error is not None
            raise error_from_wire(call.error)
        if call.state is CallState.EXPIRED:
            raise _timed_out(path, timeout)
        raise self._closed_error(call.value)

    def _expire(self, call: Call) -> None:
        if call.state is CallState.WAITING:  # its reply may have come in the same turn
            self._finish_call(call, CallInput.TIMEOUT)
            self._post_cancel(call)
            call.handle.set()

    def _give_up(self, call: Call, was_sent: bool) -> None:
        """The caller stopped waiting, or sending failed."""
        if call.state is CallState.WAITING:
            self._finish_call(call, CallInput.CANCEL)
            if was_sent:
                self._post_cancel(call)
        elif isinstance(call.value, Inflow):
            call.value.leave()

    def _finish_call(self, call: Call, step: CallInput) -> None:
        for producer in self._peer.finish_call(call, step):
            self._stop_producer(producer)

    def _post_cancel(self, call: Call) -> None:
        if self._transport.capabilities.cancellation:
            token = None if call.sent is None else call.sent.token
            self._post(Cancel(call.id), call.recipient, token)

    async def _wait_for_callbacks(self, call: Call, deadline: float | None) -> None:
        """Let the invocations that came before the reply finish before the caller goes on."""
        with move_on_after(None if deadline is None else deadline - current_time()):
            for export in call.callbacks or ():
                if export.handle is not None:
                    await export.handle.idle()

    # Callbacks and streams

    def _make_callback(
        self, callback_id: str, owner: str | None, request_id: str
    ) -> RemoteCallback:
        return RemoteCallback(self, callback_id, owner, request_id)

    async def _call_callback(
        self,
        callback_id: str,
        owner: str | None,
        request_id: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        said = request_id if self._transport.capabilities.broadcast else None
        await self._send(self._peer.callback_call(callback_id, args, kwargs, said), owner)

    def _make_server(self, exposed: object, limit: int) -> Server:
        return Server(
            exposed if isinstance(exposed, Exposed) else build_table(exposed),
            limit,
            self._middleware,
            transport=self._transport,
            outlet=self._outlet,
            read=lambda consumer: RemoteStream(Inflow(self, consumer, self._timeout)),
            abandon=self._abandon_stream,
            refuse=self._refuse,
            received=self.received,
        )

    def _stop_producer(self, producer: Producer) -> None:
        self._start_if(producer.handle.stop(None), producer.handle.run, "stream")

    def _start_if(self, wanted: bool, function: Callable[[], Any], what: str) -> None:
        if wanted and self._group is not None:
            self._group.start_soon(function, name=f"anyio_kkrpc {what}")

    # Sending

    async def _send(self, record: Record, recipient: str | None) -> None:
        if self._reason is not None:
            raise self._closed_error()
        await self._transport.send(Envelope(record, None, recipient))

    # Receiving

    def received(self, envelope: Envelope) -> None:
        """Take what the transport received. Called by the transport."""
        if envelope.error is not None:
            self._returned(envelope, envelope.error)
            return
        record, sender = envelope.record, envelope.sender
        overheard = sender is not None and envelope.recipient is None
        try:
            event = self._peer.receive(record, sender, overheard=overheard)
        except ProtocolError as exc:
            self._refuse(exc)
            return
        if event is not None:
            try:
                _REACT[event.__class__](self, event)
            except KeyboardInterrupt:
                raise
            except BaseException:  # the transport's reader is not to end by it
                logger.exception("what came of a %s failed", type(record).__name__)

    def ended(self, reason: Exception) -> None:
        """Learn that the transport ended. Called by the transport."""
        self._end(reason)

    def _refuse(self, exc: ProtocolError) -> None:
        self._refused += 1
        logger.warning("a record was refused: %s", exc)

    def _returned(self, envelope: Envelope, error: Exception) -> None:
        """A record of ours could not be delivered."""
        self._undelivered += 1
        record = envelope.record
        if isinstance(record, Request):
            call = self._peer.calls.get(record.id)
            if call is not None:
                self._finish_call(call, CallInput.LOSE)
                call.value = error
                call.handle.set()
                return
        elif isinstance(record, Reply):
            close_unopened(self._outlet, record)
        logger.info("a %s could not be delivered: %s", type(record).__name__, error)

    def _on_call_finished(self, event: CallFinished) -> None:
        call = event.call
        if isinstance(call.value, Consumer):
            call.value = Inflow(self, call.value, self._timeout)
        call.handle.set()

    def _on_peer_replied(self, event: PeerReplied) -> None:
        wanted = event.call.handle.add(event.sender, event.value, event.error)
        if not wanted and isinstance(event.value, Consumer):
            self._abandon_stream(event.value)

    def _on_cancelled(self, event: HandlingCancelled) -> None:
        event.handling.handle.cancel(event.handling)

    def _on_callback(self, event: CallbackInvoked) -> None:
        export = event.export
        if export.handle is None:
            export.handle = CallbackRunner(export)
        runner: CallbackRunner = export.handle
        self._start_if(runner.invoke(event.args, event.kwargs), runner.run, "callback")

    def _on_released(self, event: CallbacksReleased) -> None:
        """Nothing to do: the table dropped the functions, and their runners end by themselves."""

    def _on_item(self, event: StreamItem) -> None:
        event.consumer.handle.add(event.value)

    def _on_stream_end(self, event: StreamEnded) -> None:
        if event.consumer.handle is not None:  # of a reply that nobody wanted
            event.consumer.handle.finish(StopAsyncIteration())

    def _on_stream_error(self, event: StreamFailed) -> None:
        if event.consumer.handle is not None:
            event.consumer.handle.finish(stream_error(event.error))

    def _on_pull(self, event: StreamPulled) -> None:
        pump: Pump = event.producer.handle
        self._start_if(pump.wake(), pump.run, "stream")

    def _on_left(self, event: StreamLeft) -> None:
        pump: Pump = event.producer.handle
        self._start_if(pump.stop(event.answer), pump.run, "stream")

    def _on_answer(self, event: Answer) -> None:
        self._post(event.record, event.recipient)

    def _on_peer_left(self, event: PeerLeft) -> None:
        self._end(TransportClosedError("the peer sent a destroy signal"))

    # The end

    def _end(self, reason: Exception) -> None:
        """Settle everything that waits, without awaiting."""
        if self._reason is not None:
            return
        self._reason = reason
        lost = self._peer.lose()
        for call in lost.calls:
            call.value = None
            call.handle.set()
        for consumer in lost.consumers:
            if consumer.handle is not None:
                consumer.handle.finish(self._closed_error())
        for producer in lost.producers:
            if producer.handle is not None:
                self._stop_producer(producer)
        if self._server is not None:
            self._server.crew.cancel()
        self._outbox.close()
        self._ended.set()

    def _closed_error(self, cause: Any = None) -> Exception:
        """Return a new exception that tells why the channel or the transport is of no use."""
        if isinstance(cause, RPCError):
            return cause
        reason = self._reason
        if self._group is None:
            return RuntimeError("the channel has not been entered: use 'async with'")
        if isinstance(reason, EndOfStream):
            return TransportClosedError("the other side has closed the connection")
        if isinstance(reason, RPCError):
            error = type(reason)(*reason.args)
            error.__cause__ = reason.__cause__
            return error
        error = TransportClosedError("the RPC channel has ended")
        error.__cause__ = reason
        return error

    async def _say_goodbye(self) -> None:
        """Tell the other side what is no longer wanted, as far as that is quick."""
        if self._reason is not None:
            return
        peer = self._peer
        for consumer in list(peer.consumers.values()):
            record = peer.leave(consumer)
            if record is not None:
                self._post(record, consumer.producer)
        for call in list(peer.calls.values()):
            self._post_cancel(call)
        await self._outbox.finish(CLOSE_TIMEOUT)


_REACT: dict[type, Callable[[RPCChannel, Any], None]] = {
    CallFinished: RPCChannel._on_call_finished,
    PeerReplied: RPCChannel._on_peer_replied,
    HandlingCancelled: RPCChannel._on_cancelled,
    CallbackInvoked: RPCChannel._on_callback,
    CallbacksReleased: RPCChannel._on_released,
    StreamItem: RPCChannel._on_item,
    StreamEnded: RPCChannel._on_stream_end,
    StreamFailed: RPCChannel._on_stream_error,
    StreamPulled: RPCChannel._on_pull,
    StreamLeft: RPCChannel._on_left,
    Answer: RPCChannel._on_answer,
    PeerLeft: RPCChannel._on_peer_left,
}


def _path(name: str | Sequence[str]) -> list[str]:
    path = name.split(".") if isinstance(name, str) else list(name)
    if not path or not all(isinstance(segment, str) and segment for segment in path):
        raise ValueError(f"name: needs non-empty names, not {name!r:.80}")
    return path


def _timed_out(path: list[str], timeout: float | None) -> RPCTimeoutError:
    within = "its caller's deadline" if timeout is None else f"{timeout} s"
    return RPCTimeoutError(f"{'.'.join(path)}: no answer within {within}")
