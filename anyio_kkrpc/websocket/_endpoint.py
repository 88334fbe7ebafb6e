"""An ASGI application that serves an API to whoever opens a WebSocket."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Annotated, Any, final

from anyio import (
    CancelScope,
    Event,
    create_task_group,
    get_cancelled_exc_class,
    move_on_after,
)
from msgspec import Struct

from .._channel import RPCChannel
from .._exceptions import RPCError
from .._runtime._lone import lone_error
from .._serving._table import Exposed
from .._serving._table import expose as build_table
from .._spoken._base import DialectName
from ..abc import Codec
from ..codecs import get_codec
from ..kit._carrying import CarryingOptions
from ..kit._options import AnyDialect, Count, Flag, Seconds, check, seconds, takes
from ..middleware import Middleware, check_middleware
from ._asgi import AsgiSocket, Receive, Scope, Send, refuse, respond
from ._handshake import (
    Handshake,
    Origins,
    Refused,
    choose,
    handshake_of,
    known_protocols,
    may_come,
    origins_of,
)
from ._socket import FAILED, GOING_AWAY, short
from ._transport import WebSocketTransport

__all__ = ("Connection", "Endpoint", "EndpointStatistics", "current_connection")

logger: logging.Logger = logging.getLogger("anyio_kkrpc")
_current: ContextVar[Connection | None] = ContextVar("anyio_kkrpc_connection", default=None)
# Seconds in which all connections are gone, beyond the time that handlers may have.
CLOSE_TIMEOUT = 5.0


class Connection(Struct, frozen=True, eq=False):
    """One WebSocket that was let in.

    :ivar handshake: what the other side said when it came
    :ivar identity: what ``authenticate`` returned for it
    :ivar channel: calls what the other side exposes: ``connection.channel.get_api()``
    """

    handshake: Handshake
    identity: Any
    channel: RPCChannel


def current_connection() -> Connection:
    """Return the WebSocket over which the running handler was called.

    :raises LookupError: outside of a handler that an `Endpoint` runs
    """
    connection = _current.get()
    if connection is None:
        raise LookupError("current_connection() works only in handlers that an endpoint runs")
    return connection


class EndpointStatistics(Struct, frozen=True):
    """What an `Endpoint` has done and holds.

    :ivar connections: that are open, or about to be
    :ivar accepted: all that were
    :ivar refused: for their origin, by ``authenticate``, or since there were too many
    :ivar failed: that ended with an error: lost ones, silent ones, those that broke a bound
    """

    connections: int
    accepted: int
    refused: int
    failed: int


Authenticate = Callable[[Handshake], Awaitable[Any]]
Connected = Callable[[Connection], Awaitable[object]]


def _function(name: str, value: Any) -> Any:
    if not callable(value):
        raise TypeError(f"{name}: needs an asynchronous function, not {value!r:.80}")
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(one, str) and one for one in value):
        raise TypeError(f"{name}: needs a list of names, not {value!r:.80}")
    return tuple(value)


def _middleware(name: str, value: Any) -> Any:
    return check_middleware(value)


@dataclass(frozen=True, kw_only=True, repr=False)
class EndpointOptions(CarryingOptions):
    """All that `Endpoint` takes."""

    api: object = field(kw_only=False)
    origins: Annotated[Origins, origins_of] = "same"
    authenticate: Annotated[Authenticate, _function] | None = None
    connected: Annotated[Connected, _function] | None = None
    subprotocols: Annotated[Sequence[str], _names] = ()
    max_connections: Count = 1000
    handshake_timeout: Seconds = 10.0
    ping_interval: Seconds | None = 20.0
    ping_timeout: Seconds = 20.0
    dialect: AnyDialect = "kkrpc-2"
    write_timeout: Seconds = 30.0
    timeout: Seconds | None = 30.0
    max_concurrency: Count = 100
    send_tracebacks: Flag = False
    grace_period: Annotated[float, seconds(0.0)] = 0.0
    middleware: Annotated[Sequence[Middleware], _middleware] = ()

    def channel(self) -> dict[str, Any]:
        """Return those of a channel by name."""
        names = ("timeout", "max_concurrency", "send_tracebacks", "grace_period", "middleware")
        return {name: getattr(self, name) for name in names}


@final
class Endpoint:
    """An ASGI application that serves an API over WebSockets, to kkrpc's peers and this library's.

    It runs under any ASGI server, by itself or mounted: ``app.mount("/rpc", Endpoint(api))``. Each
    WebSocket has a channel of its own. Peers of this library offer the sub-protocol
    ``anyio-kkrpc.json`` or ``anyio-kkrpc.cbor``, and are spoken to natively; to others it speaks as
    they do.

    :param api: what is exposed, see `RPCChannel`, ``None`` for nothing; what
        has to be entered is entered for each connection
    :param origins: pages of which origins may connect: ``"same"``, that of the host which they
        connect to, ``"any"``, or a list such as ``["https://shop.example"]``. Programs that are no
        browsers have no origin, and may.
    :param authenticate: awaited with the `Handshake` before anybody is let in; what it returns is
        ``Connection.identity``, and `Refused` is raised to let nobody in
    :param connected: awaited with each `Connection` that is open; cancelled when it ends. An error
        ends the connection.
    :param subprotocols: of the application, which others than peers of this library may offer, the
        best first
    :param max_connections: more of them are refused, with HTTP's status 503
    :param handshake_timeout: seconds that ``authenticate`` and the acceptance may take
    :param ping_interval: seconds of silence after which the other side is asked whether it is
        there; ``None`` for never
    :param ping_timeout: seconds that it has to answer
    :param dialect: how peers are spoken to that offer no sub-protocol of this library, before they
        have said anything: ``"kkrpc-2"``, ``"kkrpc-0"`` or ``"native"``. A peer of kkrpc 0.x that
        begins is spoken to as it speaks.
    :param codec: of native peers that offer no sub-protocol of this library
    :param superjson: with ``"kkrpc-0"``, whether this side writes superjson; if not, JSON
    :param max_message_size: bytes of one message, sent or received; set the server's bound, too
    :param max_queue_size: requests of one connection that may wait for a handler
    :param max_queue_bytes: their size together, in bytes
    :param overflow: which request is refused when the queue is full: ``"drop_newest"`` or
        ``"drop_oldest"``
    :param write_timeout: seconds that the other side may take no data before it is given up
    :param timeout: as for `RPCChannel`, and so the others
    :param max_concurrency: of one connection
    :raises ValueError: if an option is out of range; the text names it
    :raises TypeError: if an option has the wrong type
    """

    @takes(EndpointOptions, check)
    def __init__(self, options: EndpointOptions) -> None:
        self._options = options
        api = options.api
        table = api if api is None or isinstance(api, Exposed) else build_table(api)
        self._exposed = table
        self._codec = get_codec(options.codec)
        self._own = known_protocols(self._codec)
        self._scopes: set[CancelScope] = set()
        self._gone = Event()
        self._closing = False
        self._count = self._accepted = self._refused = self._failed = 0

    def statistics(self) -> EndpointStatistics:
        """Return what it has done and holds."""
        return EndpointStatistics(
            connections=self._count,
            accepted=self._accepted,
            refused=self._refused,
            failed=self._failed,
        )

    async def aclose(self) -> None:
        """Let nobody in any more, and close all connections with code 1001. Idempotent.

        Handlers have ``grace_period`` to finish. Servers that tell their applications of their end
        (ASGI's lifespan) do it by themselves, where the endpoint isn't mounted in another one.
        """
        self._closing = True
        for scope in self._scopes:
            scope.cancel()
        with move_on_after(self._options.grace_period + CLOSE_TIMEOUT):
            while self._count:
                if self._gone.is_set():
                    self._gone = Event()
                await self._gone.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve what an ASGI server has got."""
        kind = scope["type"]
        if kind == "websocket":
            await self._take(scope, receive, send)
        elif kind == "lifespan":
            await self._live(receive, send)
        elif kind == "http":
            text = "this is a WebSocket"
            await respond(send, "http", 426, text, (("upgrade", "websocket"),))
        else:
            raise RuntimeError(f"ASGI: {kind!r} isn't known here")

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.aclose()
                await send({"type": "lifespan.shutdown.complete"})
                return

    # One connection

    async def _take(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._closing or self._count >= self._options.max_connections:
            await self._refuse(scope, send, Refused("too many connections", status=503))
            return
        self._count += 1
        try:
            with CancelScope() as whole:
                self._scopes.add(whole)
                try:
                    await self._let_in(scope, receive, send)
                finally:
                    self._scopes.discard(whole)
        finally:
            self._count -= 1
            self._gone.set()

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        handshake = handshake_of(scope)
        accepted = None
        with move_on_after(self._options.handshake_timeout) as in_time:
            accepted = await self._shake_hands(handshake, receive, send)
        if in_time.cancelled_caught:
            with move_on_after(CLOSE_TIMEOUT):
                await self._refuse(scope, send, Refused("it took too long", status=503))
        elif accepted is not None:
            self._accepted += 1
            await self._serve(AsgiSocket(receive, send), handshake, *accepted)

    async def _shake_hands(
        self, handshake: Handshake, receive: Receive, send: Send
    ) -> tuple[Any, DialectName, Codec] | None:
        """Return who was let in, and how it is spoken to; ``None`` if it wasn't."""
        options = self._options
        if (await receive())["type"] != "websocket.connect":
            return None
        try:
            identity = await self._admit(handshake)
        except Refused as exc:
            await self._refuse(handshake.scope, send, exc)
            return None
        spoken = options.subprotocols, options.dialect, self._codec
        name, dialect, codec = choose(handshake.subprotocols, self._own, *spoken)
        await send({"type": "websocket.accept", "subprotocol": name})
        return identity, dialect, codec

    async def _admit(self, handshake: Handshake) -> Any:
        """Return who it is.

        :raises Refused: if it may not come
        """
        if not may_come(handshake, self._options.origins):
            raise Refused(f"pages of {handshake.origin} may not connect here")
        if self._options.authenticate is None:
            return None
        try:
            return await self._options.authenticate(handshake)
        except Refused:
            raise
        except Exception as exc:
            logger.exception("authenticate failed")
            raise Refused("who you are can't be found out", status=500) from exc

    async def _refuse(self, scope: Scope, send: Send, refused: Refused) -> None:
        self._refused += 1
        logger.info("a WebSocket was refused: %s", refused)
        if refused.code is None:
            headers = tuple(refused.headers.items())
            await refuse(scope, send, refused.status, refused.reason, headers)
            return
        await send({"type": "websocket.accept"})
        reason = short(refused.reason)
        await send({"type": "websocket.close", "code": refused.code, "reason": reason})

    async def _serve(
        self,
        socket: AsgiSocket,
        handshake: Handshake,
        identity: Any,
        dialect: DialectName,
        codec: Codec,
    ) -> None:
        options = self._options
        own = {"dialect": dialect, "codec": codec, "write_timeout": options.write_timeout}
        carrying = {**options.carrying(), **own}
        transport = WebSocketTransport(
            socket,
            ping_interval=options.ping_interval,
            ping_timeout=options.ping_timeout,
            **carrying,
        )
        channel = RPCChannel(transport, expose=self._exposed, **options.channel())
        connection = Connection(handshake, identity, channel)
        token = _current.set(connection)
        try:
            async with transport:
                try:
                    async with channel:
                        await self._accompany(connection)
                except get_cancelled_exc_class():
                    transport.say_at_the_end(GOING_AWAY)
                    raise
                except RPCError:
                    raise
                except Exception:
                    transport.say_at_the_end(FAILED)
                    raise
        except RPCError as exc:
            self._failed += 1
            logger.info("a WebSocket ended: %s", exc)
        except Exception:
            self._failed += 1
            logger.exception("what serves a WebSocket failed")
        finally:
            _current.reset(token)

    async def _accompany(self, connection: Connection) -> None:
        """Wait for the end of a connection, and run what the application wants to run meanwhile."""
        connected = self._options.connected
        if connected is None:
            await connection.channel.serve_forever()
            return
        with lone_error():
            async with create_task_group() as tasks:
                tasks.start_soon(_await, connected, connection)
                await connection.channel.serve_forever()
                tasks.cancel_scope.cancel()


async def _await(connected: Connected, connection: Connection) -> None:
    await connected(connection)
