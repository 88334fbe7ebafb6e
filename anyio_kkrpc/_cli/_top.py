"""``anyio-kkrpc top``: a live view of streams, their groups and workers.

What is asked stands in ``_top_look``, how it is shown in ``_top_view``.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import redis
from redis.exceptions import AskError, MovedError, RedisError
from rich.console import Console
from rich.live import Live

from .._exceptions import TransportConnectionError
from ..redis._connection._errors import reason
from ..redis._stream._places import name_of_shard
from ._asking import Servers, as_reply
from ._terminal import ends_on_sigterm
from ._top_keys import look_for_keys
from ._top_look import Search, StreamLook, look
from ._top_view import Fitted, Frame

# Seconds that an answer may take until it is shown that the server isn't reachable.
TIMEOUT = 3.0
# Seconds of the first look and of each further one that go to the search for streams.
FIRST_SLICE, SLICE = 1.0, 0.1


class Watch:
    """Looks again and again at all streams, or one.

    :param stream: only this one; all, if ``None``
    :param shards: how many it has
    """

    def __init__(self, url: str, stream: str | None, shards: int = 1) -> None:
        servers = self._servers = Servers(url, TIMEOUT)
        self._only = stream
        self._names = [] if stream is None else [name_of_shard(stream, n) for n in range(shards)]
        self._searches: dict[redis.Redis, Search] = {}
        self._frame = Frame(f"anyio-kkrpc top - {servers.target}", [])
        self._when: float | None = None

    def first(self, seconds: float | None) -> Frame:
        """Look for the first time.

        :param seconds: how long to search for streams; until all keys have been seen, if ``None``
        :raises TransportConnectionError: if the server can't be asked
        :raises ValueError: if the only stream is something else
        """
        try:
            frame = self._look(seconds)
        except RedisError as exc:
            raise self._servers.error(exc) from exc
        error = frame.streams[0].error if self._only is not None else None
        if error is not None:
            if "WRONGTYPE" in str(error):
                raise ValueError(f"--stream: {self._only} is no stream")
            raise self._servers.error(error) from error
        return frame

    def next(self) -> Frame:
        """Look again; if the server can't be asked, return what was there before, and why."""
        try:
            return self._look(SLICE)
        except (RedisError, TransportConnectionError) as exc:
            last = self._frame
            if last.trouble is None:
                since = time.strftime("%H:%M:%S")
                why = reason(as_reply(exc) if isinstance(exc, RedisError) else exc)
                last.trouble = f"since {since} ({why}); this is how it was before"
            return last

    def _look(self, seconds: float | None) -> Frame:
        if self._only is not None:
            streams = [
                one for name in self._names for one in _look_at(self._servers.of(name), [name])
            ]
        else:
            streams = self._find(seconds)
        now, last = time.monotonic(), self._frame
        self._frame = Frame(
            last.title,
            streams,
            {stream.name: stream for stream in last.streams},
            0.0 if self._when is None else now - self._when,
            time.time(),
            searching=not all(search.complete for search in self._searches.values()),
        )
        self._when = now
        return self._frame

    def _find(self, seconds: float | None) -> list[StreamLook]:
        """Look at the streams of all servers; each has a part of the time to search for others."""
        clients = self._servers.every()
        # Another node may have what one had that isn't there any more.
        self._searches = {one: self._searches.get(one) or Search(one) for one in clients}
        streams: dict[str, StreamLook] = {}
        for client, search in self._searches.items():
            search.go_on(None if seconds is None else seconds / len(clients))
            for found in _look_at(client, search.names):
                # A slot that has just moved is here no longer, or not yet.
                if not isinstance(found.error, (AskError, MovedError)):
                    streams[found.name] = found
        return [streams[name] for name in sorted(streams)]

    def close(self) -> None:
        """Close the connections."""
        self._servers.close()


def _look_at(client: redis.Redis, names: Sequence[str]) -> list[StreamLook]:
    found = look(client, names)
    look_for_keys(client, found)
    return found


def run(url: str, stream: str | None, shards: int, interval: float, *, once: bool) -> None:
    """Show it until interrupted, which is how it is meant to end.

    :param shards: how many the stream has
    :raises TransportConnectionError: if the server can't be reached at first; once it was, that is
        shown until it can be again
    """
    watch, console = Watch(url, stream, shards), Console()
    try:
        if once:
            console.print(watch.first(None))
            return
        frame = watch.first(FIRST_SLICE)
        try:
            with ends_on_sigterm():
                _show(watch, frame, console, interval)
        except KeyboardInterrupt:
            pass
    finally:
        watch.close()


def _show(watch: Watch, frame: Frame, console: Console, interval: float) -> None:
    if not console.is_terminal or console.is_dumb_terminal:
        while True:
            console.print(frame)
            time.sleep(interval)
            frame = watch.next()
    # It is drawn in between too, for the terminal may have got another size.
    with (
        _pressed_keys() as pressed,
        Live(Fitted(frame), console=console, screen=True, refresh_per_second=2) as live,
    ):
        while not pressed(b"q", interval):
            live.update(Fitted(watch.next()), refresh=True)


@contextmanager
def _pressed_keys() -> Iterator[Callable[[bytes, float], bool]]:
    """Give a function that waits for a key, at most so many seconds; keys aren't shown."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    import termios  # not on Windows
    import tty

    old = termios.tcgetattr(0)
    tty.setcbreak(0)
    try:
        yield _key
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, old)


def _no_key(key: bytes, seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _key(key: bytes, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while select.select([0], [], [], max(end - time.monotonic(), 0.0))[0]:
        keys = os.read(0, 1024)
        if key in keys or not keys:  # the terminal is gone
            return True
    return False
