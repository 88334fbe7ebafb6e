"""Which of what was written replicas have, for those who wait until they do.

WAIT tells how many replicas have all that was written on its connection before. It goes along with
the write that it is for; while too few have it, it is sent again. Redis answers nothing that comes
behind a WAIT before that is over, so none takes long.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import inf
from typing import Any

from ..._exceptions import RPCTimeoutError, TransportClosedError, TransportConnectionError
from ...records import Request
from .._connection._command import pack
from .._connection._errors import Meaning, RedisError, leads_elsewhere, meaning_of, reason
from .._connection._resp import Connection
from ._ledger import Post

__all__ = ("Confirmations",)

logger = logging.getLogger("anyio_kkrpc")

# Milliseconds that one WAIT may take, and seconds until the next one, at first and at most.
_WAIT = 100
_SOONEST, _LATEST = 0.05, 1.0
# What an error means after which no answer is to be had, whoever asks again.
_NEVER = frozenset((Meaning.RIGHTS, Meaning.REFUSED))


class Confirmations:
    """Lets posts wait for them, and has what else is due go along with writes.

    :param wanted: how many are to have what was written; 0 if nobody waits for that
    :param now: AnyIO's clock
    :param stir: has `look` called
    :ivar due: when `look` is to be called
    """

    def __init__(self, wanted: int, now: Callable[[], float], stir: Callable[[], object]) -> None:
        self._wanted = wanted
        self._now = now
        self._stir = stir
        self._packed = pack((b"WAIT", wanted, _WAIT))
        self._connection: Connection | None = None
        self._also: Callable[[], None] | None = None
        self._unconfirmed: dict[Post, None] = {}
        self._expects = False
        # How often, on this connection, it was asked and not answered yet.
        self._asked = 0
        self._pause = _SOONEST
        self._has = 0
        self._complained = False
        self.due = inf

    def expect(self) -> None:
        """Note that something is about to be written that is to be confirmed."""
        self._expects = self._wanted > 0

    def take(self, post: Post, answer: Any) -> None:
        """Take Redis' answer to a post that somebody waits for: that it has it."""
        post.result = answer
        envelope = post.envelope
        if self._wanted and envelope is not None and isinstance(envelope.record, Request):
            self._unconfirmed[post] = None
            if not self._asked:  # else that was behind it
                self.due = self._now()
                self._stir()
        elif post.event is not None:
            post.event.set()

    def take_along(self, also: Callable[[], None]) -> None:
        """Have something else called before each write, too."""
        self._also = also
        if self._connection is not None:
            self._connection.before_write = self._before_write()

    def _before_write(self) -> Callable[[], None] | None:
        """Return what is to be called before each write."""
        also = self._also
        if not self._wanted:
            return also

        def write() -> None:
            if also is not None:
                also()
            if self._expects:
                self._ask()

        return write

    def look(self) -> None:
        """Ask again, if that is due."""
        connection = self._connection
        if self._now() < self.due or connection is None or connection.error is not None:
            return
        self.due = inf
        if self._unconfirmed:
            self._ask()
            connection.flush_nowait()

    def error(self, post: Post) -> RPCTimeoutError | None:
        """Return the error for a post that isn't confirmed in time, if it is written."""
        if post not in self._unconfirmed:
            return None
        return RPCTimeoutError(
            f"it was written, and may run, but {self._has} of {self._wanted} replicas have "
            "confirmed it (replicas_to_confirm)"
        )

    def forget(self, post: Post) -> None:
        """Let a post wait no more."""
        self._unconfirmed.pop(post, None)

    # Connections

    def attach(self, connection: Connection) -> None:
        """Ask on this connection from now on, also for what was found to be there already."""
        self._connection = connection
        self._expects = bool(self._unconfirmed)
        connection.before_write = self._before_write()

    def detach(self) -> list[Post]:
        """Take what isn't confirmed: whether the next server has it isn't known."""
        self._connection, self.due = None, inf
        self._asked = 0
        return self.clear()

    def clear(self) -> list[Post]:
        """Take what isn't confirmed."""
        posts = [*self._unconfirmed]
        self._unconfirmed.clear()
        return posts

    # What is answered

    def _ask(self) -> None:
        connection = self._connection
        if connection is not None and connection.error is None:
            self._expects = False
            self._asked += 1
            connection.post(self._packed, 1, self._answered)

    def _answered(self, answer: Any) -> None:
        """Take how many have what was written before. All posts that are open were: those that were
        written behind it have no answer yet.
        """
        if isinstance(answer, (TransportConnectionError, TransportClosedError)):
            return
        self._asked -= 1
        if isinstance(answer, RedisError) and meaning_of(answer) in _NEVER:
            logger.warning("no replica is waited for (replicas_to_confirm): %s", reason(answer))
            self._wanted = 0
        elif not isinstance(answer, int) or answer < self._wanted:
            self._take_too_few(answer)
            return
        else:
            self._complained, self._pause = False, _SOONEST
        for post in self.clear():
            if post.event is not None:
                post.event.set()

    def _take_too_few(self, answer: Any) -> None:
        """Wait on. A server that becomes a replica says so to who waits just then, and the next one
        is asked.
        """
        if isinstance(answer, int):
            self._has = answer
        elif isinstance(answer, RedisError) and leads_elsewhere(answer):
            if self._connection is not None:
                self._connection.break_off(answer)
            return
        if self._unconfirmed:
            self._wait_on()

    def _wait_on(self) -> None:
        if not self._complained:
            self._complained = True
            logger.warning(
                "%d of %d replicas have what was written (replicas_to_confirm): one-way calls wait",
                self._has,
                self._wanted,
            )
        self.due = self._now() + self._pause
        self._pause = min(self._pause * 2, _LATEST)
        self._stir()
