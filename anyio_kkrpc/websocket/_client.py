"""The client's end of a WebSocket: a TCP connection, TLS if asked for, and websockets' protocol."""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast, final

import anyio
from anyio import BrokenResourceError, EndOfStream, Event, Lock, aclose_forcefully, fail_after
from anyio.abc import ByteStream

from .._exceptions import TransportConnectionError
from .._runtime._log import quoted
from ..codecs import get_codec
from ..kit._options import check, flag, seconds
from ._handshake import protocol_of
from ._socket import TOO_BIG, Ending, Socket, end_of
from ._transport import WebSocketOptions, WebSocketTransport

if TYPE_CHECKING:
    from websockets.client import ClientProtocol

__all__ = ("connect_websocket",)

READ_SIZE = 64 * 1024
_connect_seconds = seconds()


@final
class ClientSocket(Socket):
    """A WebSocket over a stream of bytes, after the handshake.

    :param frames: what came together with the end of the handshake
    """

    def __init__(
        self, stream: ByteStream, protocol: ClientProtocol, frames: Sequence[Any] = ()
    ) -> None:
        from websockets.frames import Opcode
        from websockets.protocol import State

        super().__init__()
        self._stream = stream
        self._protocol = protocol
        self._kinds = Opcode
        self._open_state = State.OPEN
        self._lock = Lock(fast_acquire=True)
        self._frames: deque[Any] = deque(frames)
        self._parts: list[bytes] = []
        self._is_text = True
        self._closed = False
        self._reading = False
        self._over = Event()

    async def receive(self) -> tuple[bytes, bool]:
        self._reading = True
        try:
            while True:
                while self._frames:
                    message = self._take(self._frames.popleft())
                    if message is not None:
                        return message, self._is_text
                await self._read()
        except BaseException:
            self._over.set()
            raise
        finally:
            self._reading = False

    def _take(self, frame: Any) -> bytes | None:
        """Return the message that a frame completes."""
        kinds = self._kinds
        if frame.opcode is kinds.CLOSE:
            close = self._protocol.close_rcvd
            assert close is not None
            raise end_of(close.code, quoted(close.reason, 123))
        if frame.opcode not in (kinds.TEXT, kinds.BINARY, kinds.CONT):
            return None
        if frame.opcode is not kinds.CONT:
            self._is_text = frame.opcode is kinds.TEXT
        if frame.fin and not self._parts:
            return bytes(frame.data)
        if frame.data:  # any number of empty ones may come
            self._parts.append(bytes(frame.data))
        if not frame.fin:
            return None
        message = b"".join(self._parts)
        self._parts.clear()
        return message

    async def _read(self) -> None:
        protocol = self._protocol
        if protocol.parser_exc is not None:
            raise self._failure(protocol.parser_exc)
        try:
            protocol.receive_data(await self._stream.receive(READ_SIZE))
        except EndOfStream:
            protocol.receive_eof()
            if protocol.close_rcvd is None:
                raise BrokenResourceError("the connection ended without a farewell") from None
        self.hear()
        self._frames.extend(protocol.events_received())
        await self._flush()

    def _failure(self, exc: Exception) -> Exception:
        from websockets.exceptions import PayloadTooBig

        if isinstance(exc, PayloadTooBig):
            return Ending(TOO_BIG, "a message exceeds max_message_size")
        close = self._protocol.close_sent
        return Ending(1002 if close is None else close.code, quoted(exc, 123))

    async def send(self, message: bytes, text: bool) -> None:
        if self._protocol.state is not self._open_state:
            return  # the other side has closed it, as the reader is about to tell
        if text:
            self._protocol.send_text(message)
        else:
            self._protocol.send_binary(message)
        await self._flush()

    async def ping(self) -> bool:
        if self._protocol.state is self._open_state:
            self._protocol.send_ping(b"")
            await self._flush()
        return True

    async def _flush(self) -> None:
        async with self._lock:
            data = b"".join(self._protocol.data_to_send())
            if data:
                await self._stream.send(data)

    async def close(self, code: int, reason: str) -> None:
        if self._closed:
            return
        try:
            await self._say_goodbye(code, reason)
            self._closed = True
            await self._stream.aclose()
        except (BrokenResourceError, EndOfStream, OSError, ssl.SSLError):
            pass  # nobody is there any more
        finally:
            self._closed = True
            await aclose_forcefully(self._stream)

    async def _say_goodbye(self, code: int, reason: str) -> None:
        """Begin the closing handshake, unless it has begun, and wait for its end."""
        protocol = self._protocol
        if protocol.state is self._open_state:
            protocol.send_close(code, reason)
        await self._flush()
        if self._reading:
            await self._over.wait()
        while protocol.close_rcvd is None:
            protocol.receive_data(await self._stream.receive(READ_SIZE))
            protocol.events_received()  # nobody wants them any more


@asynccontextmanager
async def connect_websocket(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    origin: str | None = None,
    subprotocols: Sequence[str] | None = None,
    ssl_context: ssl.SSLContext | None = None,
    connect_timeout: float = 10.0,
    compress: bool = False,
    **options: Any,
) -> AsyncIterator[WebSocketTransport]:
    """Connect to a server over a WebSocket. Needs the extra ``websocket``.

    It connects once: who wants to go on after the connection was lost opens another one.

    :param url: ``ws://`` or ``wss://``; a user and password in it are sent as basic authentication
    :param headers: further ones of the handshake, such as ``Authorization``
    :param origin: for servers that ask for one
    :param subprotocols: offered to the server, the best first. Unless given, it is in the native
        dialect this library's own, which the server has to know, and none in kkrpc's.
    :param ssl_context: for ``wss://``, in place of the system's CAs
    :param connect_timeout: seconds that connecting may take, the handshake included
    :param compress: whether the server is offered to compress messages
    :param options: those of `WebSocketTransport`
    :raises ValueError: if an option is out of range; the text names it
    :raises TransportConnectionError: if there is no server, or it refuses; ``__cause__`` has more
    """
    given = check(WebSocketOptions(cast(Socket, None), **options))  # before there is a socket
    protocol, asks = _protocol(url, origin, subprotocols, flag("compress", compress), given)
    if ssl_context is not None and not protocol.uri.secure:
        raise ValueError("ssl_context: only for wss:// URLs")
    timeout = _connect_seconds("connect_timeout", connect_timeout)
    where = f"{protocol.uri.host}:{protocol.uri.port}"
    try:
        with fail_after(timeout):
            socket = await _open(protocol, ssl_context, _checked(headers or {}), asks)
    except TimeoutError as exc:
        error = TransportConnectionError(f"{where} did not answer within {timeout:g} seconds")
        raise error from exc
    except (OSError, EndOfStream, BrokenResourceError, ssl.SSLError) as exc:
        if isinstance(exc, TransportConnectionError):
            raise
        said = exc if str(exc) else type(exc).__name__
        raise TransportConnectionError(f"{where} can't be connected to: {said}") from exc
    async with WebSocketTransport(socket, **options) as transport:
        yield transport


async def _open(
    protocol: ClientProtocol,
    ssl_context: ssl.SSLContext | None,
    headers: Mapping[str, str],
    asks: str | None,
) -> ClientSocket:
    stream = await _dial(protocol, ssl_context)
    try:
        frames = await _shake_hands(stream, protocol, headers)
        if asks is not None and protocol.subprotocol != asks:
            raise TransportConnectionError(
                f"the server doesn't speak {asks}; one of kkrpc is spoken to with "
                "dialect='kkrpc-2' or 'kkrpc-0'"
            )
    except BaseException:
        await aclose_forcefully(stream)
        raise
    return ClientSocket(stream, protocol, frames)


def _checked(headers: Mapping[str, str]) -> Mapping[str, str]:
    for name, value in headers.items():
        if not name.isascii() or any(one in name + value for one in "\r\n\0"):
            raise ValueError(f"headers: {name!r} can't be sent")
    return headers


def _protocol(
    url: str,
    origin: str | None,
    subprotocols: Sequence[str] | None,
    compress: bool,
    options: WebSocketOptions,
) -> tuple[ClientProtocol, str | None]:
    """Return the protocol, and the sub-protocol on which this side insists."""
    try:
        from websockets.client import ClientProtocol
        from websockets.exceptions import InvalidURI
        from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
        from websockets.uri import parse_uri
    except ImportError as exc:
        raise ImportError(f"{exc.name} is missing: pip install 'anyio_kkrpc[websocket]'") from exc
    try:
        uri = parse_uri(url)
    except (InvalidURI, ValueError) as exc:
        raise ValueError("url: needs ws://host or wss://host") from exc
    asks = None
    if subprotocols is None and options.dialect == "native":
        asks = protocol_of(get_codec(options.codec))
        subprotocols = [asks]
    return ClientProtocol(
        uri,
        origin=origin,  # type: ignore[arg-type]
        extensions=[ClientPerMessageDeflateFactory()] if compress else None,
        subprotocols=subprotocols or None,  # type: ignore[arg-type]
        max_size=options.max_message_size,
    ), asks


async def _dial(protocol: ClientProtocol, ssl_context: ssl.SSLContext | None) -> ByteStream:
    host, port = protocol.uri.host, protocol.uri.port
    if not protocol.uri.secure:
        return await anyio.connect_tcp(host, port)
    return await anyio.connect_tcp(
        host,
        port,
        ssl_context=ssl_context or ssl.create_default_context(),
        tls_hostname=host,
        tls_standard_compatible=False,  # the WebSocket's own farewell is enough
    )


async def _shake_hands(
    stream: ByteStream, protocol: ClientProtocol, headers: Mapping[str, str]
) -> list[Any]:
    """Ask for a WebSocket; return the frames that came with the answer, if any."""
    request = protocol.connect()
    for name, value in headers.items():
        request.headers[name] = value
    protocol.send_request(request)
    await stream.send(b"".join(protocol.data_to_send()))
    events: list[Any] = []
    while not events and protocol.handshake_exc is None:
        try:
            protocol.receive_data(await stream.receive(READ_SIZE))
        except EndOfStream:
            protocol.receive_eof()
        events = protocol.events_received()
    if protocol.handshake_exc is not None:
        raise _refusal(events[0] if events else None, protocol.handshake_exc)
    return events[1:]


def _refusal(response: Any, exc: Exception) -> TransportConnectionError:
    """Return why there is no WebSocket, in the server's words if it said anything."""
    if response is None or response.status_code == 101:
        return _because(f"the server can't speak WebSocket: {quoted(exc, 200)}", exc)
    said = f"{response.status_code} {quoted(response.reason_phrase, 100)}"
    if response.body:
        said += f": {quoted(response.body.decode(errors='replace'), 200)}"
    return _because(f"the server refused the WebSocket: {said}", exc)


def _because(text: str, exc: Exception) -> TransportConnectionError:
    error = TransportConnectionError(text)
    error.__cause__ = exc
    return error
