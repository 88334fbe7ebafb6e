"""The stream of a call with a key as Server-Sent Events, for any ASGI application: a page that is
reloaded, or opened a second time, or whose web process was killed, reads on where it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import aclosing
from typing import Any, TypeAlias, final
from urllib.parse import parse_qs

import msgspec
from anyio import Lock, create_task_group, move_on_after, sleep
from anyio.abc import TaskGroup

from ._calling._handle import CallHandle, read_items
from ._calling._keyed import check_key, value_of
from ._channel import RPCChannel
from ._exceptions import (
    CallNotFoundError,
    ItemsLostError,
    KeyNotAllowedError,
    RPCError,
    StreamRestartedError,
    TransportClosedError,
    TransportConnectionError,
)
from ._values._pydantic import plain
from .abc import ItemsEnd
from .kit._items import parse_position

__all__ = ("CallEvents", "key_of")

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Namespace: TypeAlias = Callable[[Scope], "str | Awaitable[str | None] | None"]

# The channel is closed, or has lost its server: another process may have it.
_AWAY = (TransportClosedError, TransportConnectionError)
# The position behind which nothing comes of a call that has ended: who has it was told so, by what
# isn't kept among the items.
_TOLD = "0-0"
# Seconds that a server may take for the last words of a response that was cancelled.
_LAST = 1.0
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # else a proxy may keep events back
]


def key_of(namespace: str, name: str) -> str:
    """Return the key of a call of a user: what he names it, in his namespace.

    ``await channel.start(api.answer(prompt), key=key_of(user, "chat-17"))``

    :param namespace: the user's, without a slash
    :raises ValueError: if it can't be a namespace, or together they are no key
    """
    if not namespace or "/" in namespace:
        raise ValueError(f"namespace: some text without a slash, not {namespace!r:.80}")
    return check_key(f"{namespace}/{name}")


@final
class CallEvents:
    """An ASGI application: ``GET .../name`` streams the items of the call that a user has named so.

    ``app.mount("/chats", CallEvents(channel, user_of))`` in FastAPI and Starlette. The key is that
    of `key_of`. What there is no call for, and what is another user's, is 404 alike. It never makes
    a call.

    Each item is an event with its position as ``id`` and its value as JSON. It begins behind the
    position in the header ``Last-Event-ID``, which browsers send when they connect again, else
    behind ``?after=``, which a page has to give that was reloaded. Other events are ``end``;
    ``failed``, with the error's text; ``restarted``, after which the items come from the first one
    again; and ``lost``, with the numbers of the first item that is lost and of the next that comes.
    Who comes back behind the end gets 204, which tells browsers to come no more. A response that is
    cancelled, or whose channel is closed, as when the web process ends, is a whole one without such
    an event: browsers come again then.

    :param channel: reads
    :param namespace: is given the scope, and returns the user's namespace, or ``None`` if he may
        read nothing; it may be a coroutine function
    :param heartbeat: seconds between two comments, which keep a connection on which nothing comes
    :raises ValueError: if ``heartbeat`` isn't positive
    """

    def __init__(
        self, channel: RPCChannel, namespace: Namespace, *, heartbeat: float = 15.0
    ) -> None:
        if not heartbeat > 0:
            raise ValueError(f"heartbeat: must be positive, not {heartbeat!r}")
        self._channel = channel
        self._namespace = namespace
        self._heartbeat = heartbeat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; called by the server."""
        if scope["type"] != "http":
            raise RuntimeError(f"CallEvents serves HTTP, not {scope['type']}")
        if scope["method"] != "GET":
            await _answer(send, 405, (b"allow", b"GET"))
            return
        handle = await self._handle_for(scope)
        if handle is None:
            await _answer(send, 404)
            return
        after, again = _position_in(scope)
        try:
            parse_position(after)
            ended = (await handle.state()).expires is not None
            events = _Events(handle, after, send, self._heartbeat)
            told = again and after == _TOLD  # it may run still, where an item can't be JSON
            if told or (ended and after is not None and await events.is_end()):
                await _answer(send, 204)
                return
        except (CallNotFoundError, KeyNotAllowedError):
            await _answer(send, 404)
        except ValueError:  # no position
            await _answer(send, 400)
        except _AWAY:
            await _answer(send, 200, *_HEADERS)  # after any error a browser would come no more
        else:
            await events.send(receive)

    async def _handle_for(self, scope: Scope) -> CallHandle[Any] | None:
        namespace = self._namespace(scope)
        if inspect.isawaitable(namespace):
            namespace = await namespace
        if namespace is None:
            return None
        name = scope["path"].removeprefix(scope.get("root_path", "")).removeprefix("/")
        try:
            return self._channel.attach(key_of(namespace, name))
        except ValueError:
            if not namespace or "/" in namespace:
                raise
            return None  # no key, and so no call


class _Events:
    """One response."""

    def __init__(
        self, handle: CallHandle[Any], after: str | None, send: Send, heartbeat: float
    ) -> None:
        self._handle = handle
        self._after = after
        self._send = send
        self._heartbeat = heartbeat
        self._sending = Lock()

    async def is_end(self) -> bool:
        """Whether a position is that of the end of a call that has ended."""
        if self._after == _TOLD:
            return True
        try:
            async with aclosing(await read_items(self._handle, self._after)) as items:
                async for one in items:
                    return isinstance(one, ItemsEnd) and one.position == self._after
        except (StreamRestartedError, ItemsLostError):
            return False
        except (CallNotFoundError, *_AWAY):
            raise
        except RPCError:
            return True  # cancelled, or given up: it has been told
        return False

    async def send(self, receive: Receive) -> None:
        """Send it, until the end, or the browser is gone."""
        await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            async with create_task_group() as group:
                group.start_soon(self._wait_gone, receive, group)
                group.start_soon(self._beat)
                await self._send_items()
                group.cancel_scope.cancel()
        finally:
            with move_on_after(_LAST, shield=True):  # this may be cancelled
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _wait_gone(self, receive: Receive, group: TaskGroup) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async def _beat(self) -> None:
        while True:
            await self._write(b":\n\n")
            await sleep(self._heartbeat)

    async def _write(self, data: bytes) -> None:
        async with self._sending:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _send_items(self) -> None:
        while True:
            try:
                await self._send_some()
            except StreamRestartedError:
                self._after = None
                await self._write(_event(b"restarted"))
            except ItemsLostError as exc:
                self._after = exc.position
                told = {"wanted": exc.wanted, "first": exc.first}
                await self._write(_event(b"lost", told))
            except _AWAY:
                return  # it is to come again, to another process
            except (RPCError, TypeError) as exc:  # the latter of what can't be JSON
                failed = _event(b"failed", str(exc))
                await self._write(b"id: %b\n%b" % (_TOLD.encode(), failed))
                return
            else:
                return

    async def _send_some(self) -> None:
        async with aclosing(await read_items(self._handle, self._after)) as items:
            async for one in items:
                position = one.position.encode()
                if isinstance(one, ItemsEnd):
                    await self._write(_end_of(one, position))
                    return
                data = json_of(one.value)
                await self._write(b"id: %b\ndata: %b\n\n" % (position, data))
                self._after = one.position


def _end_of(end: ItemsEnd, position: bytes) -> bytes:
    try:
        value_of(end.reply)
    except RPCError as exc:
        return b"id: %b\n%b" % (position, _event(b"failed", str(exc)))
    return b"id: %b\n%b" % (position, _event(b"end"))


def _event(name: bytes, data: Any = None) -> bytes:
    text = b"" if data is None else json_of(data)
    return b"event: %b\ndata: %b\n\n" % (name, text)


def _position_in(scope: Scope) -> tuple[str | None, bool]:
    """Return where to begin, and whether a browser comes again by itself: a header is newer than
    what the page knew when it was loaded.
    """
    for name, value in scope["headers"]:
        if name == b"last-event-id" and value:
            return str(value.decode("latin-1")), True
    query: str = scope.get("query_string", b"").decode("latin-1")
    found = parse_qs(query).get("after")
    return (None if found is None else found[-1]), False


async def _answer(send: Send, status: int, *headers: tuple[bytes, bytes]) -> None:
    start = {"type": "http.response.start", "status": status, "headers": [*headers]}
    await send(start)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def json_of(value: Any) -> bytes:
    """Return a value in one line: JSON has no newlines but those that are escaped."""
    return msgspec.json.encode(value, enc_hook=_plain)


def _plain(value: Any) -> Any:
    """Return a model as it travels, and what JSON lacks as its text, such as an address."""
    try:
        return plain(value)
    except TypeError:
        own: Any = type(value).__str__
        if own is object.__str__:
            raise  # that would tell nothing
        return str(value)
