"""The channel: the page that puts core, calls, server and outbox together, and owns every task.

There is one task group, that of ``async with``. In it run *deadlines*, one heap for all; *outbox*,
which sends for those who can't wait; the *server* with its crew; and what these start: a pump for
each stream that leaves, and callbacks. It has no connection: the transport has, and hands what
comes to `Reactions` by plain calls from its reader. A call runs in the task of who makes it.

Deadlines, outbox and callbacks run in shielded scopes, since handlers and streams may have time to
finish (``grace_period``) when the scope around the channel is cancelled already. The end, in order:

- `RPCChannel._leave`: no more requests are taken, what runs has its time, then the crew is
  cancelled and the other side is told what ends, within `CLOSE_TIMEOUT`.
- `RPCChannel._end`, at once and without awaiting: who waits for a call, a stream or a callback is
  told, and what runs for the other side is cancelled. Where the peer, a destroy signal or an error
  ends the channel, it begins with this.
- The transport loses its listener, so that nothing comes; the shielded scopes and the task group
  are cancelled.
- Last, what is served is left: a lifespan is entered before the first of these tasks begins.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar, final, overload
from weakref import WeakSet

import anyio
from anyio import AsyncContextManagerMixin, EndOfStream, Event, current_time

from ._calling._access import KeyGuard, check_guard
from ._calling._calls import Calls
from ._calling._gathering import Replies
from ._calling._handle import CallHandle, attach, start
from ._calling._keyed import check_key, key_options, keyed_calls
from ._calling._options import CallOptions, check_flag, check_takeover, check_timeout
from ._calling._proxy import RemoteAPI, question_of
from ._calling._typed import NO_TYPES, TypesOf
from ._driver._callbacks import RemoteCallback
from ._driver._core import Core
from ._driver._losing import end_lost
from ._driver._references import References
from ._driver._sources import Sources
from ._exceptions import TransportClosedError
from ._protocol._ahead import Ahead
from ._reactions import Reactions
from ._runtime._entrance import Entrance
from ._runtime._lone import lone_error
from ._serving._operations import Server
from ._serving._outcomes import ChannelStatistics, MethodStatistics, tell
from ._serving._referring import operation
from ._serving._table import Exposed, entered
from ._serving._table import expose as build_table
from .abc import ItemBounds, Transport
from .middleware import Middleware, check_middleware

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

__all__ = ("ChannelStatistics", "MethodStatistics", "RPCChannel")

P = TypeVar("P")
T = TypeVar("T")

# How long, in seconds, closing may take to tell the other side.
CLOSE_TIMEOUT = 2.0
CLOSED = "the RPC channel has been closed"
DEFAULT_TIMEOUT = 30.0
DEFAULT_CONCURRENCY = 100
# Transports that a channel listens to.
_USED: WeakSet[Transport] = WeakSet()


@final
class RPCChannel(AsyncContextManagerMixin):
    """Calls what the other side exposes, and serves what this side exposes, over one transport.

    It is an async context manager that owns every task. When it is left, calls that wait fail with
    `TransportClosedError`, handlers are cancelled, and streams and callbacks are released. A single
    exception that leaves its body arrives as itself, not in an exception group. The channel doesn't
    close the transport; whoever entered that does.

    :param transport: an entered transport that no other channel uses
    :param expose: what the other side may reach: an object, a module, a dict, an
        `asynccontextmanager` function that yields one, or the table that `expose` made of it;
        ``None`` for nothing. What is an asynchronous context manager is entered before the first
        request is taken, and left after the last handler has ended; see `expose`.
    :param timeout: seconds that a call waits for its result and a stream for its next item, unless
        `with_call_options` says otherwise; ``None`` for ever
    :param fail_fast: whether calls fail with `DeliveryError` at once if they are for a consumer
        group that no worker serves, unless `with_call_options` says otherwise; else they wait for
        one
    :param key_guard: awaited with a `KeyUse` before anything is done with a key here; what it
        doesn't return ``True`` for raises `KeyNotAllowedError`
    :param max_concurrency: how many requests of other peers run at once; more of them wait in the
        transport's queue
    :param send_tracebacks: whether errors carry the handler's traceback to the caller
    :param grace_period: seconds that handlers, and streams that other peers read, have to finish
        when the channel is left or cancelled, before they are cancelled and readers get a
        `DeliveryError`; no further requests are taken meanwhile
    :param middleware: functions around each call that is made and each that is served, see
        `anyio_kkrpc.middleware`; the first one is the outermost
    """

    def __init__(
        self,
        transport: Transport,
        *,
        expose: object = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        fail_fast: bool = False,
        key_guard: KeyGuard | None = None,
        max_concurrency: int = DEFAULT_CONCURRENCY,
        send_tracebacks: bool = False,
        grace_period: float = 0.0,
        middleware: Sequence[Middleware] = (),
    ) -> None:
        if not isinstance(transport, Transport):
            raise TypeError(f"transport: needs a Transport, not {transport!r:.80}")
        check_timeout(timeout)
        check_flag("fail_fast", fail_fast)
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
        self._core = core = Core(
            transport, self._make_callback, timeout=timeout, send_tracebacks=send_tracebacks
        )
        self._conversation = core.conversation
        self._server: Server | None = None
        if expose is not None:
            self._server = self._make_server(expose, max_concurrency)
        if self._server is not None:
            core.serve_with(self._server)
        core.refer_with(References(core, operation))
        guard = check_guard(key_guard)
        self._calls = Calls(core, self._middleware, fail_fast=fail_fast, key_guard=guard)
        self._sources = Sources(core)
        self._reactions = Reactions(core, self._calls, self._end)
        self._ended = Event()

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self, None]:
        self._entrance.enter()
        if self._transport in _USED:
            raise RuntimeError("another channel uses this transport; each needs one of its own")
        _USED.add(self._transport)
        try:
            if self._server is None:
                async with self._open():
                    yield self
                return
            # Around all tasks, so that it is left when the last handler has ended.
            async with entered(self._server.exposed) as exposed:
                self._server.serve(exposed)
                async with self._open():
                    yield self
        finally:
            self._end(TransportClosedError(CLOSED))
            _USED.discard(self._transport)

    @asynccontextmanager
    async def _open(self) -> AsyncGenerator[None, None]:
        """Take and send what comes."""
        core = self._core
        check_takeover(core.timeout, self._transport.capabilities.takeover)
        core.enter()
        with lone_error():
            async with anyio.create_task_group() as tasks:
                core.open(tasks)
                try:
                    core.start_standing(core.timer.run, "deadlines")
                    core.start_standing(core.outbox.run, "outbox")
                    if self._server is not None:
                        tasks.start_soon(self._server.run, name="anyio_kkrpc server")
                    serve = 0 if self._server is None else self._server.crew.limit
                    self._transport.listen(self._reactions, serve=serve)
                    yield
                finally:
                    try:
                        await self._leave()
                    finally:
                        self._end(TransportClosedError(CLOSED))
                        self._transport.listen(None)
                        core.close()

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
        return RemoteAPI(self._calls, (), CallOptions(to=to), types)

    async def set_property(
        self, name: str | Sequence[str], value: Any, *, to: str | None = None
    ) -> None:
        """Set a property that the other side made writable, and wait until it is set.

        :param name: dotted name, or its segments if one of them has a dot
        :param to: id of the peer, any if not given
        :raises MethodNotFoundError: if there is none such, or it isn't writable
        :raises RPCValidationError: if the value doesn't fit its annotation
        """
        await self._calls.ask("set", _path(name), CallOptions(to=to), value=value)

    async def construct(
        self, name: str | Sequence[str], /, *args: Any, to: str | None = None, **kwargs: Any
    ) -> Any:
        """Make an instance of a class that the other side exposes; return its public fields.

        :param name: dotted name, or its segments if one of them has a dot
        :param to: id of the peer, any if not given
        :raises MethodNotFoundError: if there is no such class
        """
        return await self._calls.ask(
            "new", _path(name), CallOptions(to=to), args=args, kwargs=kwargs
        )

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
        if timeout is None:
            raise ValueError("timeout: must be given, since nobody knows how many will answer")
        check_timeout(timeout)
        if limit is not None and (
            isinstance(limit, bool) or not isinstance(limit, int) or limit < 1
        ):
            raise ValueError(f"limit: must be an int of at least 1, not {limit!r}")
        asked = question_of(question, self._calls)
        return Replies(self._core, self._calls, asked, timeout, limit)

    async def start(
        self,
        question: Awaitable[T],
        *,
        key: str,
        keep: float | None = None,
        keep_errors: float | None = None,
        run_within: float | None = None,
        delay: float = 0.0,
        at: float | None = None,
        bounds: ItemBounds | None = None,
    ) -> CallHandle[T]:
        """Have a call run without waiting for it; return its handle once that is sure to happen.

        ``call = await channel.start(api.render(doc), key="render-17", keep=3600)``. If a call with
        the key is there already, it is that one's handle.

        :param question: a call of a proxy from `get_api` that wasn't awaited
        :param key: and the next three, and ``bounds``: see `with_call_options`
        :param delay: seconds before it may begin, on Redis' clock; up to a second more
        :param at: when it may begin, in seconds since the epoch, in place of ``delay``
        :raises KeyConflictError: if the key belongs to another call
        :raises OverloadedError: if the transport takes no more; it won't run
        :raises ValueError: if an option is out of range, or the transport keeps no calls
        """
        options = key_options(
            check_key(key),
            keep=keep,
            keep_errors=keep_errors,
            run_within=run_within,
            delay=delay,
            at=at,
            bounds=bounds,
        )
        assert options is not None
        keyed_calls(self._core)
        asked = question_of(question, self._calls)
        return await start(self._core, self._calls, asked, options)

    def attach(
        self, key: str, *, returns: Any = None, metadata: dict[str, Any] | None = None
    ) -> CallHandle[Any]:
        """Return the handle of a call that any peer has made, or will make. It does no I/O.

        :param key: the call's
        :param returns: annotation of its result, which is converted to that
        :param metadata: what ``key_guard`` is told of whom this is for
        :raises ValueError: if the transport keeps no calls
        """
        access = self._calls.access
        return attach(self._core, access, check_key(key), returns, metadata)

    async def serve_forever(self) -> None:
        """Wait until the channel ends.

        Returns when it was closed, when the peer ended it, and on a destroy signal.

        :raises TransportConnectionError: if the transport broke
        """
        await self._ended.wait()
        if not isinstance(self._reason, (TransportClosedError, EndOfStream)):
            raise self._core.closed_error()

    @property
    def closed(self) -> bool:
        """Whether it is of no more use: left, ended by its peer or a destroy signal, or broken."""
        return self._reason is not None

    def statistics(self) -> ChannelStatistics:
        """Return what the channel holds now and has seen."""
        peer, server = self._conversation, self._server
        methods = {} if server is None else tell(server.exposed.counted())
        return ChannelStatistics(
            calls=len(peer.calls),
            handlers=len(peer.handlings),
            callbacks=len(peer.callbacks),
            incoming_streams=len(peer.consumers),
            outgoing_streams=len(peer.producers),
            served=sum(one.served for one in methods.values()),
            expired=sum(one.expired for one in methods.values()),
            refused=self._core.refused,
            ignored=peer.ignored,
            undelivered=self._reactions.undelivered + self._core.outbox.dropped,
            lost_streams=self._reactions.lost_streams,
            dropped_callbacks=self._core.dropped_callbacks,
            references_given=len(self._core.references.given),
            references_held=len(self._core.references.holding.held),
            failed=sum(one.failed for one in methods.values()),
            cancelled=sum(one.cancelled for one in methods.values()),
            unknown=0 if server is None else server.unknown,
            methods=methods,
            unread_items=0 if (keyed := self._core.transport.keyed) is None else keyed.items.unread,
        )

    # Callbacks and streams

    def _make_callback(
        self, callback_id: str, owner: str | None, request_id: str, ahead: Ahead | None
    ) -> RemoteCallback:
        return RemoteCallback(self._core, callback_id, owner, request_id, ahead)

    def _make_server(self, exposed: object, limit: int) -> Server:
        return Server(
            exposed if isinstance(exposed, Exposed) else build_table(exposed),
            limit,
            self._middleware,
            core=self._core,
            received=lambda envelope: self._reactions.received(envelope),
        )

    # The end

    @property
    def _reason(self) -> Exception | None:
        return self._core.reason

    def _end(self, reason: Exception) -> None:
        """End everything that waits, without awaiting."""
        if self._reason is not None:
            return
        self._core.end(reason)
        lost = self._conversation.lose()
        self._core.references.lose()
        end_lost(self._core, lost)
        if self._server is not None:
            self._server.crew.cancel()
        self._ended.set()

    async def _leave(self) -> None:
        """Let handlers and sources finish in their time, and tell the other side what ends."""
        server = self._server
        if self._grace and self._reason is None:
            until = current_time() + self._grace
            if server is not None:
                self._transport.listen(self._reactions, serve=0)
                await server.crew.drain(self._grace)
            await self._sources.drain(until - current_time())
        if server is not None:
            server.crew.cancel()
        if self._reason is None:
            await self._say_goodbye()

    async def _say_goodbye(self) -> None:
        """Tell the other side what is no longer wanted, as far as that is quick."""
        conversation, core = self._conversation, self._core
        until = current_time() + CLOSE_TIMEOUT
        self._sources.cut()
        for consumer in list(conversation.consumers.values()):
            record = conversation.leave(consumer)
            if record is not None:
                core.post(record, consumer.producer)
            if consumer.driver is not None:  # what answers that isn't for its reader
                consumer.driver.finish(TransportClosedError(CLOSED))
        for call in list(conversation.calls.values()):
            self._calls.cancel(call)
        for export in conversation.callbacks.values():
            if export.driver is not None:
                export.driver.close()
        core.references.close()
        await core.outbox.finish(CLOSE_TIMEOUT)
        await self._sources.drain(until - current_time())


def _path(name: str | Sequence[str]) -> list[str]:
    path = name.split(".") if isinstance(name, str) else list(name)
    if not path or not all(isinstance(segment, str) and segment for segment in path):
        raise ValueError(f"name: needs non-empty names, not {name!r:.80}")
    return path


def pass_references(channel: RPCChannel) -> None:
    """Let objects of other peers pass from a channel to others, and from those to it."""
    channel._core.references.relay()
