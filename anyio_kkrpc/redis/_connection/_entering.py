"""How long a server may take to let a peer in, and what is said if it takes longer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from math import inf
from typing import Any, NamedTuple

from anyio import CancelScope, current_time

from ..._exceptions import TransportConnectionError
from ._address import describe
from ._command import Argument, Command
from ._errors import RedisError, command_name, reason
from ._link import Link
from ._patience import Outages, Patience, persist
from ._portion import Portion
from ._target import Target


class _Wait(NamedTuple):
    """That a command is to be answered.

    :ivar end: when it is late, on AnyIO's clock; those that are waited for have the same time, so
        the first one is late first
    """

    end: float
    what: str
    patience: Patience


class Entering:
    """Bounds the time until the server has answered each of the few commands that entering takes.

    Several may be sent at once. A refusal that may pass is no answer. Connecting has its own bound,
    of the same length.

    :param target: of the server
    :param timeout: seconds for each answer; ``socket_connect_timeout`` in the URL has priority
    :param link: sends the commands
    :param outages: told of what the server refuses for now
    :ivar scope: to be entered around all of it
    """

    def __init__(self, target: Target, timeout: float, link: Link, outages: Outages) -> None:
        self.scope = CancelScope()
        self._target = target
        self._timeout = timeout if target.connect_timeout is None else target.connect_timeout
        self._link = link
        self._outages = outages
        # What is waited for; also what wasn't answered in time.
        self._waits: list[_Wait] = []

    async def execute(self, *command: Argument) -> Any:
        """Send a command, as `Link.request` does."""
        return await self._wait(command_name(command), partial(self._link.request, *command))

    async def ask(self, what: str, portion: Portion, command: Callable[[int], Command]) -> Any:
        """Ask for entries, as `Link.ask` does."""
        name = command_name(command(portion.size))
        return await self._wait(name, partial(self._link.ask, what, portion, command))

    async def _wait(self, what: str, attempt: Callable[[], Awaitable[Any]]) -> Any:
        # A new one for each command: that one was allowed is no reason to wait for another right.
        patience = Patience("the start", self._outages, heals=())
        wait = _Wait(current_time() + self._timeout, what, patience)
        self._waits.append(wait)
        self._aim()
        try:
            return await persist(patience, attempt)
        finally:
            if not self.scope.cancel_called:
                self._waits.remove(wait)
                self._aim()

    def _aim(self) -> None:
        self.scope.deadline = self._waits[0].end if self._waits else inf

    def error(self) -> TransportConnectionError:
        """Return the error for an answer that didn't come in time."""
        late = self._waits[0]
        cause: BaseException | None = late.patience.refusal or self._link.lost_by
        if isinstance(cause, TransportConnectionError) and cause.__cause__ is not None:
            cause = cause.__cause__
        why, advice = "", "whether the server is paused (CLIENT PAUSE), or busy with something else"
        if isinstance(cause, RedisError):
            why = f" but {reason(cause)!r}"
            advice = "that the url leads to a server that takes writes, which a replica does not"
        elif cause is not None:
            why = f" (the connection was lost: {describe(cause)})"
            advice = "what closes connections, there or in between"
        error = TransportConnectionError(
            f"Redis Streams connection error: {self._target} did not let this peer in: no answer "
            f"to {late.what} within {self._timeout:g} seconds{why}. Check {advice}."
        )
        error.__cause__ = cause if cause is not None else TimeoutError(late.what)
        return error
