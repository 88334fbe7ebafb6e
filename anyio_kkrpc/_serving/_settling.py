"""Settling requests whose reply can't be sent, or that could not be run to their end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from anyio import EndOfStream
from msgspec import UNSET

from .._driver._core import Core
from .._driver._endings import close_unopened
from .._exceptions import TransportClosedError, TransportConnectionError
from .._protocol._records import Reply, Request
from .._runtime._log import quoted
from .._wire_errors import handler_error, send_shortened
from ..abc import Envelope
from ._refusals import name_of
from ._table import Method, Property

__all__ = ("ENDS", "Settling", "label")

logger = logging.getLogger("anyio_kkrpc")

# After these nothing more is received.
ENDS = (EndOfStream, TransportClosedError, TransportConnectionError)


class Settling:
    """Finds what such a request is settled with.

    :param find: returns what a request is about, if there is that
    :param note_failure: counts and logs the failure of that, of a request, from a peer
    """

    def __init__(
        self,
        core: Core,
        find: Callable[[Request], Method | Property | None],
        note_failure: Callable[[Method | Property, Request, str | None, BaseException], object],
    ) -> None:
        self._core = core
        self._settle = core.transport.settle
        self._find = find
        self._note_failure = note_failure

    async def settle_with_error(
        self, envelope: Envelope, reply: Envelope | None, exc: Exception
    ) -> None:
        """Settle a request whose reply can't be sent, with an error that can.

        Of a result, that is the handler's error; of an error, its name and the beginning of its
        text arrive.
        """
        if reply is None:
            logger.warning("a request could not be acknowledged: %r", exc)
            return
        record = reply.record
        assert isinstance(record, Reply)
        close_unopened(self._core, record, reply.recipient)
        error = record.e
        if error is UNSET:
            error = handler_error(exc)
            self._note_unsent(envelope, exc)

        async def send(error: dict[str, Any]) -> None:
            short = Envelope(Reply(record.id, e=error), None, envelope.sender)
            await self._settle(envelope, short)

        try:
            await send_shortened(error, send)
        except ENDS:
            raise
        except Exception as reason:
            logger.warning("an error could not be sent to its caller: %s", reason)
            await self._settle(envelope, None)

    def failed(self, envelope: Envelope, exc: BaseException) -> Envelope | None:
        """Return the reply to a request that could not be run to its end."""
        logger.error("%s could not be run to its end", label(envelope), exc_info=exc)
        request = envelope.record
        if not isinstance(request, Request):
            return None
        source = self._find(request)
        if source is not None:
            source.failed += 1
        if request.o is True:
            return None
        return Envelope(Reply(request.id, e=handler_error(exc)), None, envelope.sender)

    def _note_unsent(self, envelope: Envelope, exc: Exception) -> None:
        """A result that can't be sent is a failure of the handler that gave it."""
        request = envelope.record
        assert isinstance(request, Request)
        source = self._find(request)
        if source is not None:
            self._note_failure(source, request, envelope.sender, exc)


def label(envelope: Envelope) -> str:
    """Name a request for the log."""
    request = envelope.record
    if not isinstance(request, Request):
        return f"a {type(request).__name__}"
    return f"{quoted(name_of(request))}()"
