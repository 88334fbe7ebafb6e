"""Calls from one transport to another, by name: what isn't allowed doesn't pass.

A relay isn't a pipe. It serves what it lets pass on one side as any channel does, and makes each
call anew on the other one, so that ids, callbacks, streams, credits, cancels and deadlines are
those of two channels, each with its bounds, and nothing of one side is seen at the other one but
names, arguments and results.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from time import monotonic
from typing import Any, cast, final

from anyio import Event, create_task_group
from msgspec import Struct

from ._calling._proxy import telling_undefined
from ._channel import ChannelStatistics, RPCChannel, pass_references
from ._driver._context import current_call
from ._exceptions import TransportConnectionError
from ._runtime._log import quoted
from ._runtime._sparing import Sparing
from ._serving._outcomes import Counted
from ._serving._refusals import Refused
from ._serving._relaying import INHERITED, MOST_SEGMENTS, is_clean, pass_on
from ._serving._table import Exposed, Method, Path
from .abc import Transport

__all__ = ("Relay", "RelayStatistics", "forward", "relay")

logger: logging.Logger = logging.getLogger("anyio_kkrpc")

ONE, ANY = "*", "**"


def forward(channel: RPCChannel, *, allow: Sequence[str]) -> Exposed:
    """Return a table that serves calls by making them on another channel.

    It is exposed as any API, to many channels if need be: ``endpoint(forward(channel,
    allow=["chat.*"]))`` lets pages call what workers in Redis have. Calls and reading of properties
    pass, with arguments, callbacks and streams; metadata, ``to=``, setting and constructing don't.
    The other channel's ``timeout`` bounds each call and each item of a stream, and so does what is
    left of the caller's own.

    :param channel: opened before the table is used
    :param allow: names that pass. ``*`` stands for one segment, ``**`` at the end for one or more:
        ``"chat.*"`` is for ``chat.send``, and neither for ``chat`` nor for ``chat.a.b``. Segments
        that are empty, have a dot or begin with an underscore never pass.
    :raises ValueError: if a name can't be one
    """
    patterns = _patterns("allow", allow)
    pass_references(channel)
    return _table(patterns, lambda: channel)


class RelayStatistics(Struct, frozen=True):
    """What the two channels of a relay hold and have seen.

    :ivar a: of the side whose calls ``allow`` lets pass; ``a.unknown`` counts what didn't
    :ivar b: of the other side
    """

    a: ChannelStatistics
    b: ChannelStatistics


@final
class Relay:
    """Two transports that `relay` has joined."""

    def __init__(self, a: RPCChannel, b: RPCChannel) -> None:
        self._channels = a, b
        self._ended = Event()
        self._open = 2

    async def serve_forever(self) -> None:
        """Wait until both sides have ended."""
        await self._ended.wait()

    def statistics(self) -> RelayStatistics:
        """Return what it holds and has seen."""
        a, b = self._channels
        return RelayStatistics(a.statistics(), b.statistics())

    async def watch(self, channel: RPCChannel, other: Transport | None) -> None:
        """Wait for the end of one side, and close the other one, if it is given."""
        try:
            await channel.serve_forever()
        except TransportConnectionError as exc:
            logger.info("a side of a relay was lost: %s", exc)
        self._open -= 1
        if not self._open:
            self._ended.set()
        if other is not None:
            await other.aclose()


@asynccontextmanager
async def relay(
    a: Transport,
    b: Transport,
    *,
    allow: Sequence[str],
    back: Sequence[str] = (),
    close_other: bool = True,
    timeout: float | None = 30.0,
    max_concurrency: int = 100,
) -> AsyncIterator[Relay]:
    """Join two transports: calls that come from ``a`` are made on ``b``, if their names may pass.

    Both are entered by who calls this, and used by nobody else. See `forward` for what passes.

    :param a: from where calls come
    :param b: where they are served
    :param allow: names that pass from ``a`` to ``b``, see `forward`
    :param back: names that pass from ``b`` to ``a``; if there are none, no requests are taken from
        ``b``, also where it is a consumer group
    :param close_other: whether the end of one side closes the other one
    :param timeout: seconds that a call waits for its result and a stream for its next item, if the
        caller doesn't wait for less; ``None`` for ever
    :param max_concurrency: how many calls of each side run at once; more of them wait
    :raises ValueError: if a name can't be one, or an option is out of range; the text names it
    """
    forth, home = _patterns("allow", allow), _patterns("back", back, may_be_empty=True)
    if not isinstance(close_other, bool):
        raise TypeError(f"close_other: needs a bool, not {close_other!r:.80}")
    options: dict[str, Any] = {"timeout": timeout, "max_concurrency": max_concurrency}
    to_a = _table(home, lambda: one) if home else None
    other = RPCChannel(b, expose=to_a, **options)
    one = RPCChannel(a, expose=_table(forth, lambda: other), **options)
    pass_references(one)
    pass_references(other)
    joined = Relay(one, other)
    async with other, one, create_task_group() as tasks:
        tasks.start_soon(joined.watch, one, b if close_other else None)
        tasks.start_soon(joined.watch, other, a if close_other else None)
        try:
            yield joined
        finally:
            tasks.cancel_scope.cancel()


# Names


def _patterns(name: str, given: Any, *, may_be_empty: bool = False) -> list[Path]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{name}: needs a list of names, not {given!r:.80}")
    if not given and not may_be_empty:
        raise ValueError(f"{name}: needs a name; nothing would pass")
    return [_pattern(name, one) for one in given]


def _pattern(name: str, text: Any) -> Path:
    if not isinstance(text, str):
        raise TypeError(f"{name}: needs text, not {text!r:.80}")
    path = tuple(text.split("."))
    wild = any(ONE in part and part != ONE for part in path[:-1]) or (
        ONE in path[-1] and path[-1] not in (ONE, ANY)
    )
    if wild or len(path) > MOST_SEGMENTS or not all(part and part[0] != "_" for part in path):
        raise ValueError(
            f"{name}: {text!r:.80} can't be one: '*' stands for a whole segment, '**' for the last "
            "ones, and segments are neither empty nor begin with '_'"
        )
    return path


def _may_pass(path: Path, pattern: Path) -> bool:
    """Whether a path is one of those that a pattern stands for."""
    if pattern[-1] == ANY:
        if len(path) < len(pattern):
            return False
        pattern = (*pattern[:-1], *(ONE for _ in range(len(path) - len(pattern) + 1)))
    if len(path) != len(pattern):
        return False
    return all(
        part == wanted or (wanted == ONE and part not in INHERITED)
        for part, wanted in zip(path, pattern, strict=True)
    )


# The table


class _Names(dict[Path, Any]):
    """Finds what stands for a path by patterns, which are its keys."""

    def __init__(self, entries: dict[Path, Any]) -> None:
        super().__init__(entries)
        self._log = Sparing()

    def get(self, path: Path, default: Any = None) -> Any:
        if is_clean(path) and ONE not in path and ANY not in path:
            for pattern, entry in self.items():
                if _may_pass(path, pattern):
                    return entry
        more = self._log.admit(monotonic(), "not shown")
        if more is not None:
            logger.info("a relay lets no %s pass%s", quoted(".".join(path), 200), more)
        return default


class _Reading(Counted):
    """Reads properties at the other side."""

    __slots__ = ("get",)

    void = writable = False
    result = item = Any

    def __init__(self, name: str, get: Callable[[], Awaitable[Any]]) -> None:
        super().__init__(name)
        self.get: Callable[[], Awaitable[Any]] = get


def _table(patterns: Sequence[Path], channel: Callable[[], RPCChannel]) -> Exposed:
    """Return a table whose entries ask another channel."""

    async def call(*args: Any, **kwargs: Any) -> Any:
        return await pass_on(_target(channel())(*args, **kwargs), Refused)

    async def read() -> Any:
        return await pass_on(_target(channel()), Refused)

    def fill(_: object) -> Exposed:
        made = Exposed()
        dotted = {pattern: ".".join(pattern) for pattern in patterns}
        made.methods = _Names({path: Method(name, call) for path, name in dotted.items()})
        reading = {path: _Reading(name, read) for path, name in dotted.items()}
        made.properties = cast("dict[Path, Any]", _Names(reading))
        return made

    table = fill(None)
    # Each channel that serves it has counts of its own, as with other tables.
    table.lifespan = nullcontext
    table.of = fill
    return table


def _target(channel: RPCChannel) -> Any:
    """Return the proxy for what the running handler was called as."""
    target = telling_undefined(channel.get_api())
    for part in current_call().method.split("."):
        target = target[part]
    return target
