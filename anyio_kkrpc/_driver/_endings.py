"""How streams end, for those who watch them, and with what their sources end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

from .._protocol._events import StreamsClosed
from .._protocol._records import Reply, StreamReply
from .._protocol._values import unpack_result
from .._references._marking import USE
from ._core import Core

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

logger = logging.getLogger("anyio_kkrpc")

# By itself, by its source's error, because its reader has left, or because an end of it is gone.
Outcome: TypeAlias = Literal["ok", "failed", "left", "lost"]
# Called with how many items there were, and with the error if there was one.
StreamOver: TypeAlias = Callable[[Outcome, int, BaseException | None], object]


def tell(watchers: Iterable[Callable[[Any], object]], end: object) -> None:
    """Tell all of them; what they raise is logged, and ends nothing."""
    for watcher in watchers:
        try:
            watcher(end)
        except KeyboardInterrupt:
            raise
        except BaseException:  # nothing is awaited: it is the watcher's own
            logger.exception("what was told of the end of a stream failed")


def close_streams(core: Core, closed: StreamsClosed | None) -> None:
    """Close the sources of streams that ended with their call, and tell who else had it."""
    if closed is None:
        return
    for producer in closed.producers:
        producer.driver.stop(None)
    for answer in closed.told:
        core.post(answer.record, answer.recipient)


def close_unopened(core: Core, record: Reply | StreamReply, recipient: str | None) -> None:
    """Close the source of a stream whose reader wasn't told of it, since the record was lost, and
    take back what that gave by reference.
    """
    if USE.begun:
        core.references.not_sent(record.v, recipient)
        core.references.not_sent(record.e, recipient)
    opened: list[str] = []
    unpack_result(record.v, opened.append)
    for stream_id in opened:
        producer = core.conversation.producers.get(stream_id)
        if producer is not None:
            producer.driver.stop(None)


def is_closing(exc: BaseException) -> bool:
    """Whether it is what closes a generator, as it comes back from a task group in that on trio."""
    if isinstance(exc, BaseExceptionGroup):
        return all(map(is_closing, exc.exceptions))
    return isinstance(exc, GeneratorExit)
