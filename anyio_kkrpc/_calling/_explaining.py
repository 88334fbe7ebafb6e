"""Why calls have no answer: found out shortly before they time out, for all of them together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from anyio import move_on_after, sleep
from msgspec import Struct

from .._driver._core import Core
from .._exceptions import DeliveryError
from .._protocol._calls import Call
from .._protocol._state import CallState
from ..abc import Envelope, Explanation

logger = logging.getLogger("anyio_kkrpc")

# In seconds: how long before its deadline a call is asked for, how long behind it that may last at
# most, how long one look may take, and the time between two.
LOOK = 0.1
# Seconds in which those come that are asked for together.
_GATHER = 0.01


async def explain(core: Core, requests: Sequence[Envelope]) -> Sequence[Explanation | None]:
    """Return why requests have no answer, as far as the transport tells; nothing if it fails."""
    try:
        return await core.transport.explain(requests)
    except Exception as exc:  # whatever it is, calls end as they would without
        logger.debug("why calls have no answer could not be found out: %r", exc)
        return ()


class _Inquiry(Struct, eq=False):
    """A call whose reason is wanted.

    :ivar deadline: when it times out, on AnyIO's clock; ``None`` if it is to fail at once where
        nobody serves it
    :ivar done: whether it was asked for
    :ivar reason: what was found
    """

    call: Call
    deadline: float | None
    done: bool = False
    reason: str | None = None


class Explainer:
    """Asks the transport of one channel why calls have no answer.

    :param expire: ends a call whose time is over, with the reason
    :param lose: ends a call that nobody serves
    :param within: seconds that a look may take
    """

    def __init__(
        self,
        core: Core,
        expire: Callable[[Call, str | None], object],
        lose: Callable[[Call, Exception], object],
        *,
        within: float = LOOK,
    ) -> None:
        self._within = within
        self._core = core
        self._expire = expire
        self._lose = lose
        self._new: list[_Inquiry] = []
        self._running = False
        self._next_at = 0.0

    def suspect(self, call: Call, deadline: float) -> None:
        """Find out why a call that is about to time out has no answer, and let it time out."""
        if call.state is CallState.WAITING:
            inquiry = _Inquiry(call, deadline)
            self._core.timer.at(deadline, partial(self._due, inquiry))
            self._ask(inquiry)

    def check(self, call: Call) -> None:
        """End a call that was just sent, unless somebody serves it."""
        if call.state is CallState.WAITING:
            self._ask(_Inquiry(call, None))

    def _ask(self, inquiry: _Inquiry) -> None:
        self._new.append(inquiry)
        if not self._running:
            self._running = True
            self._core.start_standing(self._run, "explanations")

    def _due(self, inquiry: _Inquiry) -> None:
        """Let a call time out whose deadline has come; if the look is not over, a little later."""
        if inquiry.done:
            self._end(inquiry)
        else:
            self._core.timer.at(self._core.now() + LOOK, partial(self._end, inquiry))

    def _end(self, inquiry: _Inquiry) -> None:
        if inquiry.call.state is CallState.WAITING:
            self._expire(inquiry.call, inquiry.reason)

    async def _run(self) -> None:
        try:
            while self._new:
                now = self._core.now()
                until = min((one.deadline for one in self._new if one.deadline), default=now + 1)
                await sleep(max(self._next_at - now, min(until - now, _GATHER), 0))
                self._next_at = self._core.now() + LOOK
                batch, self._new = self._new, []
                await self._look([one for one in batch if one.call.state is CallState.WAITING])
        finally:
            self._running = False

    async def _look(self, batch: list[_Inquiry]) -> None:
        found: Sequence[Explanation | None] = ()
        requests = [one.call.sent for one in batch]
        with move_on_after(self._within) as scope:
            found = await explain(self._core, requests)
        now = self._core.now()
        again = scope.cancelled_caught
        for number, one in enumerate(batch):
            explanation = found[number] if number < len(found) else None
            one.done = True
            if explanation is not None:
                one.reason = explanation.text
            if one.deadline is not None:
                if now >= one.deadline:
                    self._end(one)
            elif one.call.state is not CallState.WAITING:
                pass
            elif again or (explanation and explanation.unknown):
                self._new.append(one)
            elif explanation and explanation.unserved:
                self._lose(one.call, DeliveryError(explanation.text))
